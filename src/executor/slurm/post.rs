//! What a runner and its jobs tell each other where they share no folder: letters in the shared
//! cache.
//!
//! ```text
//! <run>/<n>/head.json            as the folder has it
//! <run>/<n>/<task>.orders        likewise
//! <run>/<n>/<task>/<start>.<k>   what the start number `start` of a task says, in its order
//! ```
//! On a node they are brought into a folder of its own, and what the task says there is left as
//! letters. On the runner's side a thread gathers them into the folder that a task would
//! have written to. So all else is as with a folder that everybody sees.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::SlurmError;
use super::folder::{self, log_of, orders_of, results_of};
use crate::cache::{Remote, RemoteError};
use crate::text::{Shown, no_threads};

/// Between two looks for letters: each is a request that may cost something.
const LOOK: Duration = Duration::from_secs(1);
/// What a task says within this time goes into one letter.
const GATHER: Duration = Duration::from_millis(200);
/// What a letter begins with that holds what programs have printed.
const PRINTED: &[u8] = b"printed\n";
/// So much of what programs have printed goes into one letter.
const MOST_PRINTED: usize = 1 << 20;

/// Where a node finds what it is to do.
pub const STORE_VARIABLE: &str = "RUNNER_TASK_STORE";
/// Where Slurm writes what a task prints.
pub const LOG_VARIABLE: &str = "RUNNER_TASK_LOG";

/// A letter's place: the submission, the task, its start, and the number of the letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    batch: usize,
    task: usize,
    start: usize,
    number: usize,
}

impl Place {
    /// From a name such as `<run>/2/0/1.17`.
    fn of(name: &str) -> Option<(&str, Place)> {
        let mut parts = name.rsplitn(4, '/');
        let (last, task, batch, run) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let (start, number) = last.split_once('.')?;
        let place = Place {
            batch: batch.parse().ok()?,
            task: task.parse().ok()?,
            start: start.parse().ok()?,
            number: number.parse().ok()?,
        };
        Some((run, place))
    }
}

/// Appends what a letter holds to the file where a task would have written it.
fn deliver(batch: &Path, place: Place, letter: &[u8]) -> std::io::Result<()> {
    let (path, text) = match letter.strip_prefix(PRINTED) {
        Some(printed) => (log_of(batch, place.task), printed),
        None => (results_of(batch, place.task, place.start), letter),
    };
    let mut file = File::options().create(true).append(true).open(path)?;
    file.write_all(text)?;
    // The letter is removed after it.
    file.sync_data()
}

/// The letters of some runs, gathered beside everything else.
pub(super) struct PostBox {
    remote: Arc<Remote>,
    shared: Arc<Mutex<Gathered>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// How the gathering stands.
struct Gathered {
    /// The runs whose letters are wanted.
    runs: BTreeSet<String>,
    /// When the last look that went well began.
    looked: Instant,
    /// Why the last one did not go well.
    trouble: Option<String>,
}

impl PostBox {
    /// Gathers into the folder `root`, which has a folder for each run.
    pub fn open(remote: Arc<Remote>, root: &Path) -> Result<PostBox, SlurmError> {
        let gathered = Gathered { runs: BTreeSet::new(), looked: Instant::now(), trouble: None };
        let shared = Arc::new(Mutex::new(gathered));
        let (stop, stopped) = channel();
        let gatherer = Gatherer {
            remote: Arc::clone(&remote),
            shared: Arc::clone(&shared),
            root: root.to_owned(),
        };
        let thread = std::thread::Builder::new().name("letters".to_owned());
        let thread = thread
            .spawn(move || gatherer.go_on(&stopped))
            .map_err(|error| SlurmError::Folder(no_threads(1, &error)))?;
        Ok(PostBox { remote, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// Also gathers the letters of this run.
    pub fn watch(&self, run: &str) {
        locked(&self.shared).runs.insert(run.to_owned());
    }

    /// Whether all that was left before `moment` has been gathered.
    pub fn has_looked_since(&self, moment: Instant) -> bool {
        locked(&self.shared).looked > moment
    }

    /// Why the store does not answer, if it does not.
    pub fn trouble(&self) -> Option<String> {
        locked(&self.shared).trouble.clone()
    }

    /// Leaves a submission's orders for its tasks; the head comes last.
    pub fn send(
        &self,
        run: &str,
        batch: &Path,
        number: usize,
        tasks: usize,
    ) -> Result<(), SlurmError> {
        let read = |path: PathBuf, name: &str| -> Result<(String, Vec<u8>), SlurmError> {
            Ok((format!("{run}/{number}/{name}"), folder::bytes_of(&path)?))
        };
        let orders: Result<Vec<_>, SlurmError> = (0..tasks)
            .map(|task| read(orders_of(batch, task), &format!("{task}.orders")))
            .collect();
        self.remote.leave_all(&orders?)?;
        let (name, head) = read(batch.join("head.json"), "head.json")?;
        Ok(self.remote.leave(&name, &head)?)
    }

    /// Removes what is left of a run's letters.
    pub fn clear(&self, run: &str) {
        let cleared = self.remote.letters_in(run).and_then(|names| self.remote.discard(&names));
        if let Err(error) = cleared {
            tracing::debug!("{error}");
        }
    }
}

impl Drop for PostBox {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A bug in it has been told by its panic.
            let _ = thread.join();
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the thread that gathers letters has.
struct Gatherer {
    remote: Arc<Remote>,
    shared: Arc<Mutex<Gathered>>,
    root: PathBuf,
}

impl Gatherer {
    fn go_on(&self, stopped: &Receiver<()>) {
        while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(LOOK) {
            let began = Instant::now();
            let runs = locked(&self.shared).runs.clone();
            let looked: Result<(), String> = runs.iter().try_for_each(|run| self.gather(run));
            let mut shared = locked(&self.shared);
            match looked {
                Ok(()) => (shared.looked, shared.trouble) = (began, None),
                Err(problem) => shared.trouble = Some(problem),
            }
        }
    }

    /// Writes each new letter where a task would have written it, and removes it.
    fn gather(&self, run: &str) -> Result<(), String> {
        let said = |error: RemoteError| error.to_string();
        let mut found = BTreeMap::new();
        for name in self.remote.letters_in(run).map_err(said)? {
            if let Some((of, place)) = Place::of(&name)
                && of == run
            {
                found.insert(place, name);
            }
        }
        let names: Vec<String> = found.values().cloned().collect();
        let letters = self.remote.letters(&names).map_err(said)?;
        let mut taken = Vec::new();
        for ((place, name), letter) in found.into_iter().zip(letters) {
            let batch = self.root.join(run).join(place.batch.to_string());
            if let Some(letter) = letter {
                deliver(&batch, place, &letter)
                    .map_err(|error| folder::io(&batch, &error).to_string())?;
                taken.push(name);
            }
        }
        self.remote.discard(&taken).map_err(said)
    }
}

/// A task's end of it, on a node.
#[derive(Debug)]
pub struct Letters {
    remote: Arc<Remote>,
    /// Where the task's letters lie.
    folder: String,
    start: usize,
    /// What is to be said; nothing more where it was dropped.
    give: Option<Sender<Vec<u8>>>,
    thread: Option<JoinHandle<Result<(), RemoteError>>>,
}

impl Letters {
    /// Brings what a task is to do, and what its earlier starts have said, into `folder`.
    ///
    /// # Errors
    /// In words, if the store does not answer or holds nothing of it.
    pub fn bring(
        remote: &Arc<Remote>,
        batch: &str,
        task: usize,
        start: usize,
        folder: &Path,
    ) -> Result<Letters, String> {
        let said = |error: RemoteError| error.to_string();
        let wrote = |path: &Path, error: std::io::Error| {
            format!("cannot write to `{}`: {error}", path.shown())
        };
        for (name, path) in [
            ("head.json".to_owned(), folder.join("head.json")),
            (format!("{task}.orders"), orders_of(folder, task)),
        ] {
            let name = format!("{batch}/{name}");
            let letter = remote.letter(&name).map_err(said)?;
            let (bytes, _) = letter.ok_or_else(|| {
                format!("the shared cache has no `{name}`: the run that submitted this job is over")
            })?;
            std::fs::write(&path, bytes).map_err(|error| wrote(&path, error))?;
        }
        let own = format!("{batch}/{task}");
        let mut earlier: Vec<(Place, String)> = remote
            .letters_in(&own)
            .map_err(said)?
            .into_iter()
            .filter_map(|name| Some((Place::of(&name)?.1, name)))
            .collect();
        earlier.sort();
        let names: Vec<String> = earlier.iter().map(|(_, name)| name.clone()).collect();
        for ((place, _), letter) in earlier.iter().zip(remote.letters(&names).map_err(said)?) {
            if let Some(letter) = letter {
                deliver(folder, *place, &letter).map_err(|error| wrote(folder, error))?;
            }
        }
        // A start that said nothing leaves none, and one that was killed early may be this one's.
        let last = earlier.iter().filter(|(place, _)| place.start == start);
        let next = last.map(|(place, _)| place.number + 1).max().unwrap_or(0);
        let letters =
            Letters { remote: Arc::clone(remote), folder: own, start, give: None, thread: None };
        letters.started(next)
    }

    fn started(mut self, next: usize) -> Result<Letters, String> {
        let (give, take) = channel();
        let (remote, folder, start) = (Arc::clone(&self.remote), self.folder.clone(), self.start);
        let log = std::env::var_os(LOG_VARIABLE).map(PathBuf::from);
        let thread = std::thread::Builder::new().name("letters".to_owned());
        let writer = Writer { remote, folder, start, next, log, printed: 0 };
        let thread = thread.spawn(move || writer.go_on(&take));
        self.thread = Some(thread.map_err(|error| no_threads(1, &error))?);
        self.give = Some(give);
        Ok(self)
    }

    /// Says a line; it is left within a moment.
    ///
    /// # Errors
    /// If an earlier one could not be left.
    pub fn say(&mut self, line: &[u8]) -> std::io::Result<()> {
        let given = self.give.as_ref().is_some_and(|give| give.send(line.to_vec()).is_ok());
        if given { Ok(()) } else { self.finish() }
    }

    /// Waits until all is left.
    ///
    /// # Errors
    /// If it could not be.
    pub fn finish(&mut self) -> std::io::Result<()> {
        self.give = None;
        let ended = self.thread.take().map(JoinHandle::join);
        match ended {
            None => Err(std::io::Error::other("nothing more can be said")),
            Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(error))) => Err(std::io::Error::other(error.to_string())),
            Some(Err(_)) => Err(std::io::Error::other("the thread that writes letters panicked")),
        }
    }

    /// The store's clock now, in seconds since 1970.
    ///
    /// # Errors
    /// In words, if the store does not answer.
    pub fn clock(&self) -> Result<i64, String> {
        let name = format!("{}/clock-{}", self.folder, self.start);
        let said = |error: RemoteError| error.to_string();
        self.remote.leave(&name, b"now\n").map_err(said)?;
        let found = self.remote.letter(&name).map_err(said)?;
        self.remote.discard(&[name]).map_err(said)?;
        let (_, left) = found.ok_or("the shared cache does not hold what was just put there")?;
        let since = left.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
    }
}

/// What the thread that writes a task's letters has.
struct Writer {
    remote: Arc<Remote>,
    folder: String,
    start: usize,
    next: usize,
    log: Option<PathBuf>,
    /// How much of the log has been sent.
    printed: u64,
}

impl Writer {
    fn go_on(mut self, take: &Receiver<Vec<u8>>) -> Result<(), RemoteError> {
        while let Ok(mut said) = take.recv() {
            let began = Instant::now();
            while let Ok(more) = take.recv_timeout(GATHER.saturating_sub(began.elapsed())) {
                said.extend(more);
            }
            // What was printed before an item's end is told before it.
            self.send_log()?;
            self.leave(&said)?;
        }
        self.send_log()
    }

    fn leave(&mut self, text: &[u8]) -> Result<(), RemoteError> {
        let name = format!("{}/{}.{}", self.folder, self.start, self.next);
        self.next += 1;
        self.remote.leave(&name, text)
    }

    fn send_log(&mut self) -> Result<(), RemoteError> {
        let Some(log) = self.log.clone() else { return Ok(()) };
        loop {
            let mut offset = self.printed;
            let text = folder::new_text(&log, &mut offset);
            let text = &text[..text.len().min(MOST_PRINTED)];
            if text.is_empty() {
                return Ok(());
            }
            self.printed += text.len() as u64;
            self.leave(&[PRINTED, text].concat())?;
        }
    }
}

impl From<RemoteError> for SlurmError {
    fn from(error: RemoteError) -> SlurmError {
        SlurmError::Post(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letters_name_says_where_what_it_holds_belongs() {
        let place = Place { batch: 12, task: 3, start: 0, number: 17 };
        assert_eq!(Place::of("20261130T-ab/12/3/0.17"), Some(("20261130T-ab", place)));
        for strange in ["a/12/head.json", "a/12/3.orders", "a/12/3/clock-0", "12/3/0.1"] {
            assert_eq!(Place::of(strange), None, "{strange}");
        }
        let [one, other] =
            ["r/1/0/0.9", "r/1/0/0.10"].map(|name| Place::of(name).expect("a place"));
        assert!(one < other, "they are read in the order in which they were written");
    }

    #[test]
    fn what_is_printed_goes_to_the_log_and_what_is_said_to_the_results() {
        let folder = tempfile::tempdir().expect("a folder");
        let place = Place { batch: 0, task: 2, start: 1, number: 0 };
        deliver(folder.path(), place, b"a line\n").expect("delivered");
        deliver(folder.path(), place, b"printed\nhello\n").expect("delivered");
        deliver(folder.path(), place, b"another\n").expect("delivered");
        let read = |path| std::fs::read_to_string(path).expect("read");
        assert_eq!(read(results_of(folder.path(), 2, 1)), "a line\nanother\n");
        assert_eq!(read(log_of(folder.path(), 2)), "hello\n");
    }
}
