//! The content-addressed store on disk.
//!
//! ```text
//! cache/v1/objects/ab/<blake3 of the file>.safetensors   tensors
//! cache/v1/objects/ab/<blake3 of the file>               what programs wrote and said
//! cache/v1/actions/ab/<key>.json                         what made them
//! cache/v1/latest.log                                    the last key of each (stage, arm)
//! cache/v1/actions.lock                                  a byte of it is held while an action is computed
//! cache/v1/in-use                                        shared by runs, exclusive to `gc`
//! ```
//! Everything is written to a temporary file and renamed, so a reader sees a whole
//! file or none; what took long to compute is flushed to disk before. Objects are
//! verified by their names when they are read, records and lines by a check at
//! their end, so what a power cut leaves behind is found and computed again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_WRLCK, SEEK_SET, flock};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::key::{Key, KeyWalk};
use super::remote::{Remote, RemoteReport};
use super::stamps::{Stamps, check_of};
use crate::files;
use crate::interrupt;
use crate::model::synthetic;
use crate::text::{Shown, shown};

const LATEST: &str = "latest.log";
const IN_USE: &str = "in-use";
const LOCKS: &str = "actions.lock";
/// How the name of a file begins that is being written.
pub(super) const DRAFT: &str = ".writing-";
/// Files smaller than this are copied without asking for shared blocks.
const WORTH_SHARING: u64 = 64 << 10;

/// A cache that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("cannot {action} `{}`: {source}; check the folder's rights and the free space, or choose another with `--runs`", path.shown())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A stored file is not what was stored.
    #[error("`{}` is damaged ({problem}); it was moved aside and will be computed again", path.shown())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// The record of one computation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Action {
    /// Its key.
    pub key: Key,
    /// What the key is made of.
    pub fields: Vec<(String, String)>,
    /// The run that computed it.
    pub run: String,
    /// When, in UTC.
    pub created: String,
    /// The machine that computed it; older records name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The tensors, by the blake3 hash of their file; absent if it made none.
    pub object: Option<String>,
    /// What it says besides tensors, as JSON: parsed by who knows what it is.
    pub payload: Box<RawValue>,
}

impl Action {
    /// What it says besides tensors.
    ///
    /// # Errors
    /// If it says something else.
    pub fn read<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(self.payload.get())
    }

    /// The record of a computation whose result is not kept.
    pub fn unsaved(walk: &KeyWalk, run: &str, created: &str, payload: Box<RawValue>) -> Action {
        Action {
            key: walk.key(),
            fields: walk.fields().to_vec(),
            run: run.to_owned(),
            created: created.to_owned(),
            machine: Some(crate::machine::name().to_owned()),
            object: None,
            payload,
        }
    }
}

/// A folder of actions and objects.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    latest: Arc<Mutex<Option<Latest>>>,
    /// What stages of this run are computing.
    held: Arc<Mutex<BTreeSet<Key>>>,
    /// The cache of many machines behind this one.
    remote: Option<Arc<Remote>>,
}

/// A file that an action names.
#[derive(Debug)]
pub(super) struct WithName {
    /// Its hash.
    pub digest: String,
    /// Where it is here, or would be.
    pub path: PathBuf,
    /// Whether it belongs to a command.
    pub of_command: bool,
    /// Whether a program printed it.
    pub private: bool,
}

impl WithName {
    /// Where it is in a cache of many machines.
    pub fn remote_name(&self) -> String {
        let file = self.path.file_name().unwrap_or_default().to_string_lossy();
        format!("v1/objects/{}/{file}", self.digest.get(..2).unwrap_or("__"))
    }
}

/// What `latest.log` says: the key of each who, and the lines that it has.
#[derive(Debug, Default)]
struct Latest {
    keys: HashMap<String, Key>,
    lines: usize,
}

/// The right to compute an action, which no other runner has at the same time.
#[derive(Debug)]
pub struct ActionLock {
    file: Option<File>,
    key: Key,
    held: Arc<Mutex<BTreeSet<Key>>>,
}

impl Drop for ActionLock {
    fn drop(&mut self) {
        // First the lock: whoever does not get it must find the key here.
        self.file = None;
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// A result to keep.
pub struct NewAction<'a> {
    /// The fields of its key.
    pub walk: &'a KeyWalk,
    /// The run that computed it.
    pub run: &'a str,
    /// When.
    pub created: &'a str,
    /// The tensors' file, if it made any.
    pub object: Option<&'a [u8]>,
    /// What it says besides tensors.
    pub payload: Box<RawValue>,
    /// Seconds that it took.
    pub seconds: f64,
}

/// Results that took longer are flushed to disk; others cost less to compute again
/// than the flush.
const WORTH_FLUSHING: f64 = 0.25;

impl Store {
    /// The store in `folder`, which is made when something is first stored.
    pub fn new(folder: &Path) -> Store {
        Store {
            root: folder.join("v1"),
            latest: Arc::default(),
            held: Arc::default(),
            remote: None,
        }
    }

    /// The same store with a cache of many machines behind it: what is not here is looked for
    /// there, and what is kept here is sent there beside the work.
    #[must_use]
    pub fn behind(&self, remote: Arc<Remote>) -> Store {
        Store { remote: Some(remote), ..self.clone() }
    }

    pub(super) fn without_remote(&self) -> Store {
        Store { remote: None, ..self.clone() }
    }

    pub(super) fn remote_handle(&self) -> Option<Arc<Remote>> {
        self.remote.clone()
    }

    /// Has a result that is here sent to the cache of many machines beside the work: somebody
    /// else kept it, who does not know that cache.
    pub fn share(&self, key: &Key) {
        if let Some(remote) = &self.remote {
            remote.send(self, key);
        }
    }

    /// Waits until what was kept is sent to the cache of many machines, and says what was had of
    /// it; nothing where there is none.
    pub fn settled(&self) -> Option<RemoteReport> {
        self.remote.as_ref().map(|remote| remote.finish())
    }

    /// The folder of this version's format.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Says that a run uses the store, for as long as the result lives: `gc` waits.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn in_use(&self) -> Result<File, CacheError> {
        let file = self.in_use_file()?;
        file.lock_shared().map_err(|source| io("lock", &self.root.join(IN_USE), source))?;
        Ok(file)
    }

    /// The file that [`Store::in_use`] locks.
    pub(super) fn in_use_file(&self) -> Result<File, CacheError> {
        std::fs::create_dir_all(&self.root).map_err(|source| io("make", &self.root, source))?;
        let path = self.root.join(IN_USE);
        // Readable too: on a shared file system only such a file can be locked together.
        let file = File::options().create(true).read(true).append(true).open(&path);
        file.map_err(|source| io("open", &path, source))
    }

    /// Waits for the right to compute an action; none if the user asked to stop.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn lock(&self, key: &Key) -> Result<Option<ActionLock>, CacheError> {
        let path = self.root.join(LOCKS);
        let failed = |source| io("lock", &path, source);
        let open = || File::options().create(true).read(true).append(true).open(&path);
        let file = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                std::fs::create_dir_all(&self.root).map_err(failed)?;
                open()
            }
            file => file,
        };
        let file = file.map_err(failed)?;
        let byte = byte_of(key);
        let (mut tries, mut told) = (0, false);
        while !interrupt::requested() {
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&byte)) {
                Ok(_) => {
                    let held = Arc::clone(&self.held);
                    held.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
                    return Ok(Some(ActionLock { file: Some(file), key: key.clone(), held }));
                }
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    // Where another stage of this run computes it, nobody else is waited for.
                    let here = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                    // The first time the other stage may just be about to say so.
                    tries += 1;
                    if tries > 1 && !told && !here.contains(key) {
                        tracing::warn!(
                            "another runner computes what is needed here; waiting for it"
                        );
                        told = true;
                    }
                    drop(here);
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
        Ok(None)
    }

    /// Where generated models are kept.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Where compiled GPU programs, and what this machine has, are kept.
    pub fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    /// The file of an object.
    pub fn object_path(&self, digest: &str) -> PathBuf {
        self.place("objects", digest, "safetensors")
    }

    fn place(&self, kind: &str, name: &str, extension: &str) -> PathBuf {
        let fan = name.get(..2).unwrap_or("__");
        self.root.join(kind).join(fan).join(format!("{name}.{extension}"))
    }

    /// The record of an action, if there is one and its tensors are there; here, or in the cache
    /// of many machines, from which all of it is brought here.
    ///
    /// A damaged record is moved aside and counts as absent: it is computed again.
    pub fn find(&self, key: &Key) -> Option<Action> {
        self.find_here(key).or_else(|| self.remote.as_ref()?.bring(self, key))
    }

    fn find_here(&self, key: &Key) -> Option<Action> {
        let action = self.record(key)?;
        let whole = action.object.as_ref().is_none_or(|o| self.object_path(o).is_file());
        whole.then(|| {
            self.touch(key);
            action
        })
    }

    /// The record of an action, whether or not its tensors are still there.
    pub fn record(&self, key: &Key) -> Option<Action> {
        let path = self.action_path(key);
        let bytes = std::fs::read(&path).ok()?;
        match decode_record(&bytes) {
            Some(action) if action.key == *key => Some(action),
            _ => {
                self.move_aside(&path);
                None
            }
        }
    }

    /// Sets a record aside that is whole and cannot be read all the same, such as another version's.
    /// It counts as absent from then on: what it was of is computed again.
    pub fn set_aside(&self, key: &Key, problem: &str) {
        let path = self.action_path(key);
        tracing::warn!(
            "`{}` is no record that this runner reads ({}); what it was of is computed again",
            path.shown(),
            shown(problem)
        );
        if let Some(remote) = &self.remote {
            remote.disbelieve(key, problem);
        }
        self.move_aside(&path);
    }

    /// The text of a record that is here and whole, with what it says.
    pub(super) fn sealed_record(&self, key: &Key) -> Option<(Vec<u8>, Action)> {
        let bytes = std::fs::read(self.action_path(key)).ok()?;
        let action = decode_record(&bytes).filter(|action| action.key == *key)?;
        Some((bytes, action))
    }

    /// Keeps a record that came from elsewhere, when all that it names is here.
    pub(super) fn write_record(&self, key: &Key, bytes: &[u8]) -> Result<(), CacheError> {
        write_file(&self.action_path(key), bytes, false)
    }

    pub(super) fn action_path(&self, key: &Key) -> PathBuf {
        self.place("actions", &key.0, "json")
    }

    /// Notes that an action was of use, for `gc`. Once an hour is often enough.
    fn touch(&self, key: &Key) {
        const OFTEN: Duration = Duration::from_secs(3600);
        let path = self.action_path(key);
        let used = std::fs::metadata(&path).and_then(|facts| facts.modified());
        let age = used.ok().and_then(|used| used.elapsed().ok());
        if age.is_some_and(|age| age > OFTEN)
            && let Ok(file) = File::options().append(true).open(&path)
        {
            // A read-only cache is as good to read from.
            let _ = file.set_modified(SystemTime::now());
        }
    }

    /// Keeps an action with its tensors, if it made any.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn save(&self, new: NewAction<'_>) -> Result<Action, CacheError> {
        let flush = new.seconds > WORTH_FLUSHING;
        let object = match new.object {
            None => None,
            Some(bytes) => {
                let digest = blake3::hash(bytes).to_hex().to_string();
                // Also over one that is there: if that is damaged, this is its repair.
                write_file(&self.object_path(&digest), bytes, flush)?;
                Some(digest)
            }
        };
        let action =
            Action { object, ..Action::unsaved(new.walk, new.run, new.created, new.payload) };
        let path = self.action_path(&action.key);
        write_file(&path, &sealed(to_json(&action, &path)?), flush)?;
        self.share(&action.key);
        Ok(action)
    }

    /// The bytes of an object, verified.
    ///
    /// # Errors
    /// If it cannot be read, or is not what was stored; then it is moved aside.
    pub fn read_object(&self, digest: &str) -> Result<Vec<u8>, CacheError> {
        self.read_verified(self.object_path(digest), digest)
    }

    /// The same, mapped instead of read.
    ///
    /// # Errors
    /// As [`Store::read_object`].
    pub fn map_object(&self, digest: &str) -> Result<files::Mapped, CacheError> {
        let path = self.object_path(digest);
        let map = || Ok(files::Mapped::of(&files::open(&path)?, &path)?.0);
        let map = map().map_err(|source| io("read", &path, source))?;
        self.verified(&map, &path, digest)?;
        Ok(map)
    }

    /// The matrices of f32 that an object holds, by their names, with rows and width; of its content
    /// only the head is read.
    ///
    /// # Errors
    /// In words, if it is no file of tensors.
    pub fn tensors_of(&self, digest: &str) -> Result<BTreeMap<String, [usize; 2]>, String> {
        let path = self.object_path(digest);
        let map = || Ok(files::Mapped::of(&files::open(&path)?, &path)?.0);
        let map = map().map_err(|error: std::io::Error| error.to_string())?;
        let (_, head) = SafeTensors::read_metadata(&map).map_err(|error| error.to_string())?;
        let matrices = head.tensors().into_iter().filter_map(|(name, info)| match info.shape[..] {
            [rows, width] if info.dtype == Dtype::F32 => Some((name, [rows, width])),
            _ => None,
        });
        Ok(matrices.collect())
    }

    fn read_verified(&self, path: PathBuf, digest: &str) -> Result<Vec<u8>, CacheError> {
        let bytes = std::fs::read(&path).map_err(|source| io("read", &path, source))?;
        self.verified(&bytes, &path, digest)?;
        Ok(bytes)
    }

    /// Refuses bytes that are not what was stored, and moves their file aside.
    fn verified(&self, bytes: &[u8], path: &Path, digest: &str) -> Result<(), CacheError> {
        if blake3::hash(bytes).to_hex().as_str() == digest {
            return Ok(());
        }
        self.move_aside(path);
        let (path, problem) = (path.to_owned(), "its hash is not its name".to_owned());
        Err(CacheError::Damaged { path, problem })
    }

    /// The file of something that a program wrote.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let fan = digest.get(..2).unwrap_or("__");
        self.root.join("objects").join(fan).join(digest)
    }

    /// Where attempts have their folders; on the same file system as the objects.
    pub fn attempts(&self) -> PathBuf {
        self.root.join("attempts")
    }

    /// Takes a finished file into the store by moving it; gives its hash, or nothing if it
    /// could not be read until then.
    ///
    /// # Errors
    /// If it cannot be read or moved.
    pub fn adopt(&self, file: &Path, until: Option<Instant>) -> Result<Option<String>, CacheError> {
        let hash = match Stamps::forgetful().digest_until(file, until) {
            Err(error) if error.kind() == ErrorKind::TimedOut => return Ok(None),
            hash => hash.map_err(|source| io("read", file, source))?,
        };
        let digest = hash.to_hex().to_string();
        let path = self.blob_path(&digest);
        let folder = path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(folder).map_err(|source| io("make", folder, source))?;
        // Also over one that is there: if that is damaged, this is its repair.
        std::fs::rename(file, &path).map_err(|source| io("write", &path, source))?;
        Ok(Some(digest))
    }

    /// Whether something that a program wrote is there and is what it was; if it is
    /// not, it is moved aside.
    pub fn has_blob(&self, digest: &str, stamps: &Stamps) -> bool {
        let path = self.blob_path(digest);
        match stamps.digest(&path) {
            Ok(found) if found.to_hex().as_str() == digest => true,
            Ok(_) => {
                self.move_aside(&path);
                false
            }
            Err(_) => false,
        }
    }

    /// Something that a program wrote, verified.
    ///
    /// # Errors
    /// If it cannot be read, or is not what was stored; then it is moved aside.
    pub fn read_blob(&self, digest: &str) -> Result<Vec<u8>, CacheError> {
        self.read_verified(self.blob_path(digest), digest)
    }

    /// Puts a copy of something that a program wrote at `target`, whole or not at
    /// all. Where the file system can share blocks between files, it does.
    ///
    /// # Errors
    /// If the place cannot be written.
    pub fn publish(&self, digest: &str, target: &Path, executable: bool) -> Result<(), CacheError> {
        copy_whole(&self.blob_path(digest), target, executable)
    }

    /// Puts a copy of tensors at `target`, verified, as [`Store::publish`] does.
    ///
    /// # Errors
    /// If they cannot be read, are not what was stored, or the place cannot be written.
    pub fn export_object(&self, digest: &str, target: &Path) -> Result<(), CacheError> {
        let path = self.object_path(digest);
        let found = Stamps::forgetful().digest(&path).map_err(|s| io("read", &path, s))?;
        if found.to_hex().as_str() != digest {
            self.move_aside(&path);
            let problem = "its hash is not its name".to_owned();
            return Err(CacheError::Damaged { path, problem });
        }
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder).map_err(|source| io("make", folder, source))?;
        }
        match taker(target) {
            Some(taker) => taker
                .and_then(|mut taker| std::io::copy(&mut files::open(&path)?, &mut taker))
                .map(drop)
                .map_err(|source| io("write", target, source)),
            None => copy_whole(&path, &followed(target), false),
        }
    }

    /// Remembers somebody's last action, for [`Store::latest`].
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn remember(&self, who: &str, key: &Key) -> Result<(), CacheError> {
        let path = self.root.join(LATEST);
        let who = name_of(who);
        let mut guard = self.latest_keys();
        let latest = guard.get_or_insert_default();
        if latest.keys.get(&who) == Some(key) {
            return Ok(());
        }
        let text = latest_line(&who, key);
        latest.keys.insert(who, key.clone());
        latest.lines += 1;
        if latest.lines > 1000 && latest.lines > 4 * latest.keys.len() {
            latest.lines = latest.keys.len();
            let all: String = latest.keys.iter().map(|(who, key)| latest_line(who, key)).collect();
            return write_whole(&path, all.as_bytes());
        }
        let append = || {
            let mut file = File::options().create(true).append(true).open(&path)?;
            file.write_all(text.as_bytes())
        };
        append().map_err(|source| io("write", &path, source))
    }

    /// The last action that was remembered for somebody.
    pub fn latest(&self, who: &str) -> Option<Key> {
        self.latest_keys().as_ref()?.keys.get(&name_of(who)).cloned()
    }

    /// How many whole lines of the log are damaged. The last one may be half-written now.
    pub(super) fn damaged_lines(&self) -> usize {
        let bytes = std::fs::read(self.root.join(LATEST)).unwrap_or_default();
        let whole = bytes.split_inclusive(|byte| *byte == b'\n');
        let whole = whole.filter_map(|line| line.strip_suffix(b"\n"));
        whole.filter(|line| !line.is_empty() && sound_line(line).is_none()).count()
    }

    fn latest_keys(&self) -> MutexGuard<'_, Option<Latest>> {
        let mut guard = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        guard.get_or_insert_with(|| read_latest(&self.root.join(LATEST)));
        guard
    }

    /// Renames a damaged file, so that it is neither used nor lost.
    pub(super) fn move_aside(&self, path: &Path) {
        let aside = path.with_extension("damaged");
        if let Err(error) = std::fs::rename(path, &aside) {
            tracing::warn!("cannot move `{}` aside: {error}", path.shown());
        } else {
            tracing::warn!("`{}` was damaged and was moved aside", path.shown());
        }
    }
}

/// Whether this is the name of a file that a runner is writing, and will give another name:
/// as `tempfile` makes it, with six letters and digits.
pub fn is_draft(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    let drawn = [DRAFT, synthetic::DRAFT].iter().find_map(|d| name.strip_prefix(d.as_bytes()));
    drawn.is_some_and(|drawn| drawn.len() == 6 && drawn.iter().all(u8::is_ascii_alphanumeric))
}

/// The byte that stands for a key, to be locked: a file for each would have to be made
/// and removed. Two keys with one byte would wait for each other; there are 2^60.
fn byte_of(key: &Key) -> flock {
    let digits = key.0.get(..15).unwrap_or(&key.0);
    flock {
        l_type: F_WRLCK as i16,
        l_whence: SEEK_SET as i16,
        l_start: i64::from_str_radix(digits, 16).unwrap_or(0),
        l_len: 1,
        l_pid: 0,
    }
}

fn name_of(who: &str) -> String {
    blake3::hash(who.as_bytes()).to_hex().to_string()
}

fn latest_line(who: &str, key: &Key) -> String {
    let text = format!("{who} {}", key.0);
    let check = check_of(text.as_bytes());
    format!("{text} {check}\n")
}

/// Who a line speaks of, and the key; none if its check does not fit.
fn sound_line(line: &[u8]) -> Option<(&str, &str)> {
    let (text, check) = std::str::from_utf8(line).ok()?.rsplit_once(' ')?;
    (check_of(text.as_bytes()) == check).then(|| text.split_once(' '))?
}

fn read_latest(path: &Path) -> Latest {
    let mut latest = Latest::default();
    let bytes = std::fs::read(path).unwrap_or_default();
    let mut damaged = 0;
    for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        latest.lines += 1;
        match sound_line(line) {
            Some((who, key)) => {
                latest.keys.insert(who.to_owned(), Key(key.to_owned()));
            }
            None => damaged += 1,
        }
    }
    if damaged > 0 {
        tracing::warn!("{damaged} lines of `{}` are damaged and are ignored", path.shown());
    }
    latest
}

pub(super) fn decode_record(bytes: &[u8]) -> Option<Action> {
    serde_json::from_slice(unsealed(bytes)?).ok()
}

/// A text with a check at its end, by which [`unsealed`] knows that it is whole.
pub fn sealed(mut text: Vec<u8>) -> Vec<u8> {
    let check = check_of(&text);
    text.extend_from_slice(format!("\n{check}\n").as_bytes());
    text
}

/// The check at the end of a sealed text.
pub fn seal_of(sealed: &[u8]) -> String {
    let end = sealed.strip_suffix(b"\n").unwrap_or(sealed);
    String::from_utf8_lossy(end.rsplit(|byte| *byte == b'\n').next().unwrap_or_default()).into()
}

/// The text that was sealed, if it is what it was.
pub fn unsealed(bytes: &[u8]) -> Option<&[u8]> {
    let text = bytes.strip_suffix(b"\n")?;
    let end = text.iter().rposition(|byte| *byte == b'\n')?;
    let (text, check) = (&text[..end], &text[end + 1..]);
    (check_of(text).as_bytes() == check).then_some(text)
}

fn to_json(value: &impl Serialize, path: &Path) -> Result<Vec<u8>, CacheError> {
    serde_json::to_vec(value).map_err(|error| io("encode", path, std::io::Error::other(error)))
}

/// Copies a file, whole or not at all. Where the file system can share blocks
/// between files, it does.
fn copy_whole(source: &Path, target: &Path, executable: bool) -> Result<(), CacheError> {
    let folder = target.parent().filter(|folder| *folder != Path::new(""));
    let folder = folder.unwrap_or(Path::new("."));
    let write = || {
        let mut from = File::open(source)?;
        // For whoever the user's mask lets use it.
        let mode = Permissions::from_mode(if executable { 0o777 } else { 0o666 });
        let mut builder = tempfile::Builder::new();
        let mut draft = builder.prefix(DRAFT).permissions(mode).tempfile_in(folder)?;
        let shared = from.metadata()?.len() >= WORTH_SHARING
            && rustix::fs::ioctl_ficlone(draft.as_file(), &from).is_ok();
        if !shared {
            std::io::copy(&mut from, draft.as_file_mut())?;
        }
        draft.persist(target).map_err(|error| error.error)
    };
    write().map(drop).map_err(|source| io("write", target, source))
}

/// Writes a file so that it is there whole or not at all, also after a power cut. A device
/// or a pipe, which is not to be replaced by a file, takes the bytes as they come.
///
/// # Errors
/// If the folder cannot be written.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CacheError> {
    match taker(path) {
        Some(taker) => taker
            .and_then(|mut taker| taker.write_all(bytes))
            .map_err(|source| io("write", path, source)),
        None => write_file(&followed(path), bytes, true),
    }
}

/// What takes bytes as they come, ready to write: a device, a pipe, or a file that the
/// process was given open, as `/dev/stdout` names.
fn taker(path: &Path) -> Option<std::io::Result<File>> {
    let special = std::fs::metadata(path).is_ok_and(|facts| !facts.is_file() && !facts.is_dir());
    let takes = special || is_given_open(&followed(path));
    takes.then(|| File::options().append(true).open(path))
}

/// Whether a path is one of a process's open files.
fn is_given_open(path: &Path) -> bool {
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    folder.is_some_and(|folder| folder.starts_with("/proc") && folder.ends_with("fd"))
}

/// The file that a path that a user named leads to, there or not: a link stays a link.
fn followed(path: &Path) -> PathBuf {
    // As many links as Linux follows.
    const LINKS: usize = 40;
    let mut place = path.to_owned();
    for _ in 0..LINKS {
        match std::fs::read_link(&place) {
            Ok(target) if !is_given_open(&place) => {
                place = place.parent().unwrap_or(Path::new("")).join(target);
            }
            _ => break,
        }
    }
    place
}

/// As [`write_whole`]; without `flush` a power cut may leave a file of the right
/// length with another content.
fn write_file(path: &Path, bytes: &[u8], flush: bool) -> Result<(), CacheError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || {
        // For whoever the user's mask lets read it, unlike other temporary files.
        let readable = Permissions::from_mode(0o666);
        let mut builder = tempfile::Builder::new();
        builder.prefix(DRAFT).permissions(readable);
        let draft = || builder.tempfile_in(folder);
        let mut file = match draft() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                std::fs::create_dir_all(folder)?;
                draft()?
            }
            file => file?,
        };
        file.write_all(bytes)?;
        if flush {
            file.as_file().sync_data()?;
        }
        file.persist(path).map_err(|error| error.error)
    };
    write().map(drop).map_err(|source| io("write", path, source))
}

pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> CacheError {
    CacheError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn save(store: &Store, walk: &KeyWalk, object: Option<&[u8]>) -> Result<Action, CacheError> {
        let payload = RawValue::from_string("7".to_owned()).expect("JSON");
        store.save(NewAction { walk, run: "run", created: "now", object, payload, seconds: 1.0 })
    }

    fn walk(value: &str) -> KeyWalk {
        let mut walk = KeyWalk::new("test");
        walk.field("value", value);
        walk
    }

    fn text(action: &Action) -> String {
        serde_json::to_string(action).expect("JSON")
    }

    #[test]
    fn what_was_saved_is_found_again_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        assert!(store.find(&walk("a").key()).is_none());
        let saved = save(&store, &walk("a"), Some(b"tensors")).expect("saved");
        assert_eq!(store.find(&walk("a").key()).map(|found| text(&found)), Some(text(&saved)));
        assert!(store.find(&walk("b").key()).is_none());
        let object = saved.object.expect("an object");
        assert_eq!(store.read_object(&object).expect("readable"), b"tensors");
    }

    #[test]
    fn a_flipped_bit_in_an_object_is_found_and_the_object_is_set_aside() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let saved = save(&store, &walk("a"), Some(b"tensors")).expect("saved");
        let object = saved.object.expect("an object");
        std::fs::write(store.object_path(&object), b"tensorz").expect("written");
        assert!(matches!(store.read_object(&object), Err(CacheError::Damaged { .. })));
        assert!(
            store.find(&walk("a").key()).is_none(),
            "an action without its tensors is no result"
        );
    }

    #[test]
    fn a_damaged_record_counts_as_absent() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let saved = save(&store, &walk("a"), None).expect("saved");
        let path = store.action_path(&saved.key);
        let whole = std::fs::read(&path).expect("read");
        for place in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 4;
            std::fs::write(&path, damaged).expect("written");
            assert!(store.find(&walk("a").key()).is_none(), "byte {place}");
            assert!(path.with_extension("damaged").is_file());
        }
        std::fs::write(&path, &whole).expect("written");
        assert!(store.find(&walk("a").key()).is_some());
    }

    #[test]
    fn the_last_key_of_each_is_remembered_and_a_damaged_line_is_not_believed() {
        let folder = tempfile::tempdir().expect("a folder");
        let key = |value: &str| walk(value).key();
        let store = Store::new(folder.path());
        save(&store, &walk("a"), None).expect("saved");
        for value in ["a", "b"] {
            store.remember("me", &key(value)).expect("remembered");
        }
        store.remember("you", &key("a")).expect("remembered");
        let later = Store::new(folder.path());
        assert_eq!(later.latest("me"), Some(key("b")));
        let log = store.root().join(LATEST);
        let mut bytes = std::fs::read(&log).expect("read");
        let last = bytes.len() - 20;
        bytes[last] ^= 1;
        std::fs::write(&log, bytes).expect("written");
        let later = Store::new(folder.path());
        assert_eq!((later.latest("me"), later.latest("you")), (Some(key("b")), None));
    }

    #[test]
    fn one_action_is_computed_by_one_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let inside = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        let lock = store.lock(&walk("a").key()).expect("a lock");
                        let before = inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        assert!(lock.is_some() && before == 0);
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    }
                });
            }
        });
        let both = [walk("a"), walk("b")].map(|walk| store.lock(&walk.key()).expect("a lock"));
        assert!(both.iter().all(Option::is_some), "another action waits for nothing");
    }

    #[test]
    fn a_file_that_a_user_names_is_written_where_it_leads_and_no_device_becomes_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::os::unix::fs::symlink(&file, &link).expect("a link");
        std::fs::write(&file, b"before").expect("written");
        write_whole(&link, b"after").expect("written");
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&file).expect("read"), b"after");
        let (nothing, dangling) = (folder.path().join("nothing"), folder.path().join("dangling"));
        std::os::unix::fs::symlink("nothing", &dangling).expect("a link");
        write_whole(&dangling, b"new").expect("written");
        assert!(dangling.is_symlink());
        assert_eq!(std::fs::read(&nothing).expect("read"), b"new");
        let open = File::options().append(true).open(&file).expect("opened");
        for (folder, all) in [("/proc/self/fd", &b"after"[..]), ("/dev/fd", b"afterall")] {
            assert_eq!(std::fs::read(&file).expect("read"), all, "nothing in it is lost");
            let handed = PathBuf::from(format!("{folder}/{}", open.as_raw_fd()));
            write_whole(&handed, b"all").expect("written");
        }
        let ordinary = folder.path().join("ordinary");
        File::create(&ordinary).expect("made");
        let mode = |path| std::fs::metadata(path).expect("it is there").permissions().mode();
        assert_eq!(mode(&file), mode(&ordinary), "as readable as any other file");

        // A pipe stands for all devices: the test is not to damage one.
        let pipe = folder.path().join("pipe");
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, 0o600.into(), 0).expect("a pipe");
        let store = Store::new(folder.path());
        let action = save(&store, &walk("a"), Some(b"tensors")).expect("saved");
        let object = action.object.expect("tensors");
        for expected in [&b"text"[..], b"tensors"] {
            let read = std::thread::scope(|scope| {
                let reader = scope.spawn(|| std::fs::read(&pipe).expect("read"));
                match expected {
                    b"text" => write_whole(&pipe, expected),
                    _ => store.export_object(&object, &pipe),
                }
                .expect("written");
                reader.join().expect("a reader")
            });
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, b"").expect("written");
        let error = save(&Store::new(&file), &walk("a"), None);
        assert!(error.expect_err("refused").to_string().contains("file"));
    }
}
