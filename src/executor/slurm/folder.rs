//! The folder through which a runner and its jobs speak to each other.
//!
//! ```text
//! slurm/lock                        held while somebody decides what to submit
//! slurm/<run>/lock                  held while that runner lives
//! slurm/<run>/<n>/head.json         one submission: who wrote it, and the keys of its items
//!                /<task>.orders     what a task of the array is to do
//!                /<task>.<k>.results  what its start number k said, a line each
//!                /<task>.log        what its programs printed
//!                /job               Slurm's number of it, once it is known
//! ```
//! A file is whole or not there; each line of results has a check of its own, since it is
//! appended to while others read it.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::SlurmError;
use super::post::Letters;
use crate::cache::{self, CacheError};

/// The file that is locked.
const LOCK: &str = "lock";

/// What a submission says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// The runner that wrote it, as [`build`] names it.
    pub build: String,
    /// The run.
    pub run: String,
    /// When, in seconds since 1970.
    pub submitted: i64,
    /// The name that the job has in the queue.
    pub name: String,
    /// The keys of each task's items.
    pub keys: Vec<Vec<String>>,
    /// Whether its tasks speak through letters in the shared cache.
    #[serde(default)]
    pub by_letters: bool,
    /// What every task needs to know; whoever submits knows what it is.
    pub common: Box<RawValue>,
}

/// What a task of an array is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    /// One for each item; whoever submits knows what it is.
    pub items: Vec<Box<RawValue>>,
}

/// What a task says, a line each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// It began an item.
    Began {
        /// Its place in the task.
        item: usize,
        /// The machine.
        node: String,
    },
    /// It has finished an item.
    Done {
        /// Its place in the task.
        item: usize,
        /// What came of it.
        answer: Box<RawValue>,
        /// How long it took.
        seconds: f64,
    },
    /// It does nothing here, and why.
    Refused {
        /// The machine.
        node: String,
        /// The reason, and what to do.
        problem: String,
    },
}

/// What names the build of a runner: its version, and digests of what its results depend on.
pub fn build() -> String {
    let digest = |text: &'static str| text.get(..8).unwrap_or(text);
    format!(
        "{} (arms {}, measures {})",
        env!("CARGO_PKG_VERSION"),
        digest(env!("RUNNER_ARMS_CODE")),
        digest(env!("RUNNER_MEASURES_CODE"))
    )
}

/// Writes a whole file with a check at its end.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), SlurmError> {
    let text = serde_json::to_vec(value);
    let text = text.map_err(|error| SlurmError::Folder(format!("cannot be encoded: {error}")))?;
    cache::write_whole(path, &cache::sealed(text)).map_err(SlurmError::from)
}

/// Reads what `write` wrote.
///
/// # Errors
/// In words.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let cannot = |problem: &dyn std::fmt::Display| {
        format!("cannot read `{}`: {problem}", crate::text::Shown::shown(path))
    };
    let bytes = std::fs::read(path).map_err(|error| cannot(&error))?;
    let text = cache::unsealed(&bytes).ok_or_else(|| cannot(&"it is damaged"))?;
    serde_json::from_slice(text).map_err(|error| cannot(&error))
}

/// A file that this runner has written, as it is.
pub(super) fn bytes_of(path: &Path) -> Result<Vec<u8>, SlurmError> {
    std::fs::read(path).map_err(|error| io(path, &error))
}

/// The file of a task's orders.
pub fn orders_of(batch: &Path, task: usize) -> PathBuf {
    batch.join(format!("{task}.orders"))
}

/// The file of what the start number `start` of a task says.
pub fn results_of(batch: &Path, task: usize, start: usize) -> PathBuf {
    batch.join(format!("{task}.{start}.results"))
}

/// The file of what a task's programs print.
pub fn log_of(batch: &Path, task: usize) -> PathBuf {
    batch.join(format!("{task}.log"))
}

/// Says something of a task, where its runner reads it.
pub struct Teller {
    file: File,
    synced: Instant,
    /// Where nobody else sees the file.
    letters: Option<Letters>,
}

/// How often what is said is made sure to be seen on other machines.
const SYNC: Duration = Duration::from_millis(200);

impl Teller {
    /// Of this start of a task.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn open(batch: &Path, task: usize, start: usize) -> std::io::Result<Teller> {
        // One that ended before it could open its file has said nothing.
        for earlier in 0..start {
            let path = results_of(batch, task, earlier);
            File::options().create(true).append(true).open(path)?;
        }
        let path = results_of(batch, task, start);
        let mut file = File::options().create(true).append(true).open(path)?;
        // What a killed one began is a line of its own, and no part of the next.
        file.write_all(b"\n")?;
        Ok(Teller { file, synced: Instant::now(), letters: None })
    }

    /// The same where the runner does not see the file: what is said is also left as letters.
    #[must_use]
    pub fn by_letters(self, letters: Letters) -> Teller {
        Teller { letters: Some(letters), ..self }
    }

    /// The letters, where there are any.
    pub fn letters(&self) -> Option<&Letters> {
        self.letters.as_ref()
    }

    /// Makes sure that all that was said can be read elsewhere.
    ///
    /// # Errors
    /// If it cannot.
    pub fn finish(mut self) -> std::io::Result<()> {
        match &mut self.letters {
            Some(letters) => letters.finish(),
            None => Ok(()),
        }
    }

    /// Says it, in one line and one piece.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn say(&mut self, said: &Said) -> std::io::Result<()> {
        let text = serde_json::to_string(said)?;
        let line = format!("{} {text}\n", check_of(text.as_bytes()));
        self.file.write_all(line.as_bytes())?;
        if let Some(letters) = &mut self.letters {
            return letters.say(line.as_bytes());
        }
        // A shared file system shows it elsewhere then, or when the file is closed.
        if self.synced.elapsed() > SYNC {
            self.synced = Instant::now();
            self.file.sync_data()?;
        }
        Ok(())
    }
}

fn check_of(text: &[u8]) -> String {
    blake3::hash(text).to_hex()[..16].to_owned()
}

/// What was said in whole lines from `offset` on, which moves behind them. A line whose check
/// is wrong counts as not said.
pub fn heard(path: &Path, offset: &mut u64) -> Vec<Said> {
    let text = new_text(path, offset);
    text.split(|byte| *byte == b'\n').filter_map(said_in).collect()
}

fn said_in(line: &[u8]) -> Option<Said> {
    let (check, text) = (line.get(..16)?, line.get(17..)?);
    (check == check_of(text).as_bytes()).then(|| serde_json::from_slice(text).ok())?
}

/// The whole lines that a file has from `offset` on, which moves behind them.
pub(super) fn new_text(path: &Path, offset: &mut u64) -> Vec<u8> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        if file.metadata()?.len() <= *offset {
            return Ok(Vec::new());
        }
        file.seek(SeekFrom::Start(*offset))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(text)
    };
    // Not there yet, or out of reach for now.
    let mut text = read().unwrap_or_default();
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    text.truncate(whole);
    *offset += whole as u64;
    text
}

/// Where runners and their jobs speak to each other.
pub(super) struct Root(PathBuf);

impl Root {
    pub fn open(folder: &Path) -> Result<Root, SlurmError> {
        std::fs::create_dir_all(folder).map_err(|error| io(folder, &error))?;
        // Jobs work elsewhere.
        Ok(Root(folder.canonicalize().map_err(|error| io(folder, &error))?))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The right to decide what is submitted, which no other runner has at the same time.
    pub fn alone(&self) -> Result<File, SlurmError> {
        let path = self.0.join(LOCK);
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|error| io(&path, &error))?;
        file.lock().map_err(|error| io(&path, &error))?;
        Ok(file)
    }

    /// Makes the folder of a run, and locks it.
    pub fn make(&self, run: &str) -> Result<(PathBuf, File), SlurmError> {
        let folder = self.0.join(run);
        std::fs::create_dir_all(&folder).map_err(|error| io(&folder, &error))?;
        match lock_of(&folder)? {
            Some(lock) => Ok((folder, lock)),
            None => Err(SlurmError::Folder(format!(
                "another runner holds `{}`; run again",
                crate::text::Shown::shown(folder.as_path())
            ))),
        }
    }

    /// The folders of other runs, each with its lock if its runner is dead.
    pub fn others(&self, own: &str) -> Result<Vec<(PathBuf, Option<File>)>, SlurmError> {
        let mut others = Vec::new();
        for entry in std::fs::read_dir(&self.0).map_err(|error| io(&self.0, &error))? {
            let folder = entry.map_err(|error| io(&self.0, &error))?.path();
            let is_own = folder.file_name().is_some_and(|name| name == own);
            if folder.is_dir() && !is_own {
                let lock = lock_of(&folder)?;
                others.push((folder, lock));
            }
        }
        others.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(others)
    }
}

fn lock_of(folder: &Path) -> Result<Option<File>, SlurmError> {
    let path = folder.join(LOCK);
    let file = match File::options().create(true).append(true).open(&path) {
        // Its runner has just removed it.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|error| io(&path, &error))?,
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(io(&path, &error)),
    }
}

/// The submissions in a run's folder, in their order.
pub(super) fn batches_in(run: &Path) -> Vec<(usize, PathBuf)> {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    let numbered =
        entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())));
    let mut batches: Vec<(usize, PathBuf)> = numbered.collect();
    batches.sort();
    batches
}

pub(super) fn io(path: &Path, error: &std::io::Error) -> SlurmError {
    SlurmError::Folder(format!(
        "cannot use `{}`: {error}; jobs and the runner speak to each other there",
        crate::text::Shown::shown(path)
    ))
}

impl From<CacheError> for SlurmError {
    fn from(error: CacheError) -> SlurmError {
        SlurmError::Folder(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_task_half_said_is_not_heard_and_hides_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let began = |item| Said::Began { item, node: "n1".to_owned() };
        let mut teller = Teller::open(folder.path(), 3, 0).expect("opened");
        teller.say(&began(0)).expect("said");
        let path = results_of(folder.path(), 3, 0);
        let mut offset = 0;
        assert_eq!(heard(&path, &mut offset).len(), 1);
        let mut file = File::options().append(true).open(&path).expect("opened");
        file.write_all(b"0123456789abcdef {\"Began\":{\"it").expect("written");
        assert_eq!(heard(&path, &mut offset).len(), 0);
        let mut teller = Teller::open(folder.path(), 3, 0).expect("opened");
        teller.say(&began(1)).expect("said");
        let said = heard(&path, &mut offset);
        assert!(matches!(said.as_slice(), [Said::Began { item: 1, .. }]), "{said:?}");
        assert!(heard(&path, &mut offset).is_empty());
    }

    #[test]
    fn a_line_whose_check_is_wrong_is_not_believed() {
        let text = br#"{"Began":{"item":7,"node":"n1"}}"#;
        let good = [check_of(text).as_bytes(), b" ", text].concat();
        assert!(said_in(&good).is_some());
        let bad = String::from_utf8(good).expect("a text").replace(":7", ":8");
        assert!(said_in(bad.as_bytes()).is_none());
    }
}
