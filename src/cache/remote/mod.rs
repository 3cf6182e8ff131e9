//! A cache of many machines behind this one's: what is asked of it, what is sent to it, and what
//! of it is believed.
//!
//! ```text
//! PREFIX/v1/cache.json                what it is; written when a machine first may
//! PREFIX/v1/actions/ab/<key>.json     records, as in the local cache
//! PREFIX/v1/objects/ab/<hash>...      what they name, as in the local cache
//! PREFIX/v1/runs/<machine>/<run>/...  records of runs, where they are wanted there
//! PREFIX/v1/slurm/...                 what runners and jobs without a folder tell each other
//! ```
//! An object is put there before the record that names it, each whole or not at all, so a runner
//! that is killed leaves at most an object that nothing names. What arrives is held to its name
//! before it gets a name here: a record by its check and its fields, an object by its hash. A
//! store that fails is left alone for the rest of the run: results are computed, and stay here.

#[cfg(not(feature = "remote"))]
mod absent;
#[cfg(feature = "remote")]
mod bucket;
mod letters;
mod runs;
mod upkeep;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::key::{Key, KeyWalk};
use super::stamps::Stamps;
use super::store::{Action, CacheError, Store, WithName, decode_record};
use crate::interrupt;
use crate::terminal::tell_line;
use crate::text::shown;

#[cfg(not(feature = "remote"))]
use absent::Bucket;
#[cfg(feature = "remote")]
use bucket::Bucket;
pub use runs::{bring_runs, is_url};
pub use upkeep::{RemoteBudget, RemoteCleared};

/// What says that a store is such a cache.
const MARK: &str = "v1/cache.json";
/// Its text.
const MARK_TEXT: &[u8] = b"{\"runner\": \"cache\", \"format\": 1}\n";
/// Where runners and their jobs leave letters for each other.
const LETTERS: &str = "v1/slurm";
/// Nobody waits for a letter that is older.
const LETTERS_LAST: Duration = Duration::from_secs(14 * 24 * 3600);
/// The largest record that is read; the largest known has some hundred kilobytes.
const LARGEST_RECORD: u64 = 64 << 20;
/// Results above this size stay here unless somebody asks for it.
pub const LARGEST_SENT: u64 = 4 << 30;
/// Threads that send.
const SENDERS: usize = 3;
/// For so long a key that was not there is not asked for again.
const MISSING_FOR: Duration = Duration::from_secs(5);
/// A record that is older is written anew when it is used: `gc` goes by its age.
const FRESH_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// So many objects that could not be read whole, and the store is left alone.
const MOST_CUTS: usize = 3;
/// How often an object whose transfer broke off is asked for.
const FETCHES: usize = 3;

/// Where the cache of many machines is, and what this one may do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteOptions {
    /// `s3://`, `gs://`, `az://`, `https://` or `file://`.
    pub url: String,
    /// Nothing is sent.
    pub read_only: bool,
    /// Nothing is signed.
    pub anonymous: bool,
    /// Larger results stay here.
    pub largest: u64,
    /// Whether commands' results are sent, with what the programs printed.
    pub commands: bool,
    /// Whether the run.json of each run is put there, for a report of all machines.
    pub runs: bool,
}

/// What a run had of the cache of many machines; it stands in run.json.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RemoteReport {
    /// Where it is, without anything secret.
    pub url: String,
    /// Whether this machine may only read.
    pub read_only: bool,
    /// Results that came from it.
    pub fetched: usize,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Results that were sent to it, or were there with the same content.
    pub sent: usize,
    /// Bytes that were sent.
    pub sent_bytes: u64,
    /// Results that stay here because of their size.
    pub too_large: usize,
    /// Results that should have been sent and were not.
    pub unsent: usize,
    /// Seconds that the run waited at its end for what was being sent.
    pub waited: f64,
    /// What went wrong, in words.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// Why a store did not do what it was asked.
#[derive(Debug)]
#[cfg_attr(not(feature = "remote"), expect(dead_code, reason = "no store is ever opened"))]
enum Trouble {
    /// It does not let this machine do it, or is not there: no other try would help.
    Refused(String),
    /// It cannot be reached, or fails again and again.
    Down(String),
    /// It broke off in the middle.
    Cut(String),
    /// It holds something that cannot be right.
    Wrong(String),
    /// This machine's own disk.
    Here(String),
    /// The user asked to stop.
    Stopped,
}

impl Trouble {
    fn text(&self) -> &str {
        match self {
            Trouble::Refused(text) | Trouble::Down(text) | Trouble::Cut(text) => text,
            Trouble::Wrong(text) | Trouble::Here(text) => text,
            Trouble::Stopped => "stopped on request",
        }
    }
}

/// What became of a small object that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "remote"), expect(dead_code, reason = "no store is ever opened"))]
enum Put {
    /// It is there.
    Written,
    /// Another one was there before.
    Exists,
}

/// An object of a store.
#[derive(Clone, Debug)]
struct Listed {
    /// As it is asked for.
    name: String,
    /// Bytes.
    size: u64,
    /// When it was last written.
    written: SystemTime,
}

/// Why a cache of many machines cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The URL names no store.
    #[error("the shared cache `{url}` cannot be used: {problem}")]
    Url {
        /// It, without anything secret.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The store does not let this machine in.
    #[error(
        "the shared cache `{url}` refuses {what}: {problem}; are its name and the credentials \
         right? (docs/shared-cache.md says which variables are read; `--cache-mode read-only` sends \
         nothing, `--cache off` does without it)"
    )]
    Refused {
        /// Where.
        url: String,
        /// What was tried.
        what: &'static str,
        /// What it said.
        problem: String,
    },
    /// It does not answer, where nothing can be done without it.
    #[error("the shared cache `{url}` cannot be used now: {problem}; try again later")]
    Down {
        /// Where.
        url: String,
        /// What it said, or did not.
        problem: String,
    },
}

impl RemoteError {
    /// What a store that did not do `what` means for whoever asked.
    fn of(url: &str, what: &'static str, trouble: Trouble) -> RemoteError {
        let url = url.to_owned();
        match trouble {
            Trouble::Refused(problem) => RemoteError::Refused { url, what, problem },
            trouble => RemoteError::Down { url, problem: trouble.text().to_owned() },
        }
    }
}

/// A cache of many machines.
#[derive(Debug)]
pub struct Remote {
    bucket: Bucket,
    options: RemoteOptions,
    shown: String,
    state: Mutex<State>,
    sending: Mutex<Sending>,
}

#[derive(Debug, Default)]
struct State {
    report: RemoteReport,
    /// Keys that were not there, and when that was seen.
    missing: BTreeMap<Key, Instant>,
    /// Names of what is not what it should be: the next who has the right thing replaces it.
    poisoned: BTreeSet<String>,
    /// Keys whose result is there and could not be had: nobody asks again in this run.
    given_up: BTreeSet<Key>,
    /// Keys whose record came from there.
    fetched: BTreeSet<Key>,
    /// Keys whose result this run has sent, or found there.
    sent: BTreeSet<Key>,
    /// Problems that are not told one by one.
    untold: usize,
    /// Whether it is left alone for the rest of the run.
    down: bool,
    cuts: usize,
}

#[derive(Debug, Default)]
struct Sending {
    give: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

/// What became of a result that was to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// It is there.
    There,
    /// It is no result any more.
    Gone,
    /// What programs made is not sent.
    OfCommand,
    /// It has so many bytes.
    TooLarge(u64),
}

/// What a thread that sends has to do.
#[derive(Debug)]
enum Job {
    /// Send a result.
    Send(Key),
    /// Write a record that is there anew, so that `gc` sees that it was of use.
    Touch(Key),
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of a URL no store is asked with, and nobody should write down.
fn secret_in(url: &str) -> Option<&'static str> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    if rest.contains(['?', '#']) {
        return Some("its `?` or `#`");
    }
    let server = rest.split('/').next().unwrap_or(rest);
    // `abfss://CONTAINER@ACCOUNT/` names no user.
    let named = server.rsplit_once('@').map(|(user, _)| user);
    let of_web = url.starts_with("http");
    named.filter(|user| of_web || user.contains(':')).map(|_| "its user or password")
}

/// A URL as people may see it: no user, no password, no query.
fn without_secrets(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let clean = match url.split_once("://") {
        Some((scheme, rest)) if secret_in(url).is_some() => {
            let (host, path) = rest.split_once('/').map_or((rest, None), |(h, p)| (h, Some(p)));
            let host = host.rsplit('@').next().unwrap_or(host);
            format!("{scheme}://{host}{}", path.map_or(String::new(), |path| format!("/{path}")))
        }
        _ => url.to_owned(),
    };
    shown(&clean)
}

/// The name of a record.
fn name_of_record(key: &Key) -> String {
    format!("v1/actions/{}/{}.json", key.0.get(..2).unwrap_or("__"), key.0)
}

/// Whether a text can be a hash or a key: it names a place.
fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl Remote {
    /// Opens the cache of many machines and tries what this one will do there.
    ///
    /// A store that does not answer is no error here: the run goes on without it, and says so.
    ///
    /// # Errors
    /// If the URL names no store, or the store refuses.
    pub fn open(options: &RemoteOptions) -> Result<Remote, RemoteError> {
        let remote = Remote::named(options)?;
        match remote.greet() {
            Ok(()) => Ok(remote),
            Err(RemoteError::Down { problem, .. }) => {
                remote.leave_alone(&problem);
                Ok(remote)
            }
            Err(refused) => Err(refused),
        }
    }

    /// The same for those who can do nothing without it.
    ///
    /// # Errors
    /// As [`Remote::open`], and if it does not answer.
    pub fn reached(options: &RemoteOptions) -> Result<Remote, RemoteError> {
        let remote = Remote::named(options)?;
        remote.greet().map(|()| remote)
    }

    fn named(options: &RemoteOptions) -> Result<Remote, RemoteError> {
        let url = without_secrets(&options.url);
        if let Some(what) = secret_in(&options.url) {
            let problem = format!(
                "{what} would be seen by whoever sees the command line or the manifest; \
                 credentials are read from variables (docs/shared-cache.md)"
            );
            return Err(RemoteError::Url { url, problem });
        }
        let bucket = Bucket::open(&options.url, options.anonymous)
            .map_err(|problem| RemoteError::Url { url: url.clone(), problem })?;
        let report =
            RemoteReport { url: url.clone(), read_only: options.read_only, ..Default::default() };
        Ok(Remote {
            bucket,
            options: options.clone(),
            shown: url,
            state: Mutex::new(State { report, ..State::default() }),
            sending: Mutex::default(),
        })
    }

    /// Tries whether it may be read and, where that is wanted, written.
    fn greet(&self) -> Result<(), RemoteError> {
        let url = || self.shown.clone();
        let failed = |what: &'static str, trouble: Trouble| match trouble {
            Trouble::Refused(problem) | Trouble::Wrong(problem) => {
                RemoteError::Refused { url: url(), what, problem }
            }
            trouble => RemoteError::Down { url: url(), problem: trouble.text().to_owned() },
        };
        let mark = self.bucket.get(MARK, LARGEST_RECORD);
        let found = mark.map_err(|trouble| failed("to be read", trouble))?;
        if found.is_some_and(|(mark, _)| mark != MARK_TEXT) {
            let problem = format!(
                "`{MARK}` there is not what this runner writes; give another path, or remove that \
                 file if nothing else lies there"
            );
            return Err(RemoteError::Url { url: url(), problem });
        }
        if !self.options.read_only {
            // Also where it is there: whoever may not write learns it now.
            let put = self.bucket.put(MARK, MARK_TEXT, false);
            put.map_err(|trouble| failed("to be written", trouble))?;
        }
        Ok(())
    }

    /// Whether nothing is sent.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Says that it failed, and asks nothing more of it.
    fn leave_alone(&self, problem: &str) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.down, true) {
            let text = format!(
                "the shared cache `{}` was left alone after it failed: {problem}; what was \
                 computed is in this machine's cache",
                self.shown
            );
            state.report.problems.push(text);
        }
    }

    fn is_down(&self) -> bool {
        self.state().down
    }

    fn note(&self, problem: String) {
        // A store that is full of them says the same again and again.
        const MOST: usize = 50;
        // Told at the end of the run.
        tracing::debug!("{problem}");
        let mut state = self.state();
        if state.report.problems.len() < MOST {
            state.report.problems.push(problem);
        } else {
            state.untold += 1;
        }
    }

    /// Names something that is not believed.
    fn poisoned(&self, name: &str, problem: &str) {
        if !self.state().poisoned.insert(name.to_owned()) {
            return;
        }
        self.note(format!(
            "`{}` in the shared cache `{}` is not believed: {problem}; what it was of is computed \
             again",
            shown(name),
            self.shown
        ));
    }

    /// What failed is told, and decides whether more is asked of the store.
    fn heed(&self, name: &str, trouble: &Trouble) {
        match trouble {
            Trouble::Stopped => {}
            Trouble::Refused(text) | Trouble::Down(text) => self.leave_alone(text),
            Trouble::Wrong(text) => self.poisoned(name, text),
            Trouble::Here(text) => {
                self.note(format!("`{}` of the shared cache cannot be kept: {text}", shown(name)));
            }
            Trouble::Cut(text) => {
                self.note(format!(
                    "`{}` in the shared cache `{}` broke off {FETCHES} times: {text}",
                    shown(name),
                    self.shown
                ));
                let mut state = self.state();
                state.cuts += 1;
                let too_many = state.cuts >= MOST_CUTS;
                drop(state);
                if too_many {
                    self.leave_alone("too many objects broke off");
                }
            }
        }
    }

    /// Brings a result here, whole and verified; nothing if it is not there, or not believed.
    pub(super) fn bring(&self, store: &Store, key: &Key) -> Option<Action> {
        {
            let mut state = self.state();
            let missing = || state.missing.get(key).is_some_and(|at| at.elapsed() < MISSING_FOR);
            if state.down || state.given_up.contains(key) || missing() {
                return None;
            }
            state.missing.remove(key);
        }
        let name = name_of_record(key);
        let brought = self.brought(store, key, &name);
        match brought {
            Ok(Some(action)) => Some(action),
            Ok(None) => {
                self.state().missing.insert(key.clone(), Instant::now());
                None
            }
            Err((name, trouble)) => {
                self.state().given_up.insert(key.clone());
                self.heed(&name, &trouble);
                None
            }
        }
    }

    fn brought(
        &self,
        store: &Store,
        key: &Key,
        name: &str,
    ) -> Result<Option<Action>, (String, Trouble)> {
        let of_record = |trouble| (name.to_owned(), trouble);
        let found = self.bucket.get(name, LARGEST_RECORD).map_err(of_record)?;
        let Some((bytes, written)) = found else { return Ok(None) };
        let action = sound_record(&bytes, key)
            .map_err(|problem| of_record(Trouble::Wrong(problem.to_owned())))?;
        let mut size = bytes.len() as u64;
        for object in store.named_by(&action) {
            if !is_hash(&object.digest) {
                let problem = "it names a result by what is no hash".to_owned();
                return Err(of_record(Trouble::Wrong(problem)));
            }
            if object.path.is_file() {
                continue;
            }
            let remote = object.remote_name();
            match self.fetch(&object, &remote).map_err(|trouble| (remote, trouble))? {
                Some(bytes) => size += bytes,
                // Cleared away, or its writer was killed before this version of it: no result.
                None => return Ok(None),
            }
        }
        store
            .write_record(key, &bytes)
            .map_err(|error| of_record(Trouble::Here(error.to_string())))?;
        let mut state = self.state();
        state.report.fetched += 1;
        state.report.fetched_bytes += size;
        state.fetched.insert(key.clone());
        drop(state);
        let old = written.elapsed().is_ok_and(|age| age > FRESH_FOR);
        if old && !self.options.read_only {
            self.give(store, Job::Touch(key.clone()));
        }
        Ok(Some(action))
    }

    /// Brings one object to its place; its size, or nothing if it is not there.
    fn fetch(&self, object: &WithName, remote: &str) -> Result<Option<u64>, Trouble> {
        let here = |error: std::io::Error| Trouble::Here(error.to_string());
        let folder = object.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(here)?;
        // What a program printed is for its user alone.
        let mode = Permissions::from_mode(if object.private { 0o600 } else { 0o666 });
        let mut tries = 0;
        loop {
            tries += 1;
            let mut builder = tempfile::Builder::new();
            builder.prefix(super::store::DRAFT).permissions(mode.clone());
            let mut draft = builder.tempfile_in(folder).map_err(here)?;
            match self.bucket.fetch(remote, draft.as_file_mut()) {
                Err(Trouble::Cut(_)) if tries < FETCHES && !interrupt::requested() => {
                    std::thread::sleep(Duration::from_millis(100 << tries));
                }
                Err(trouble) => return Err(trouble),
                Ok(None) => return Ok(None),
                Ok(Some(hash)) if hash.to_hex().as_str() != object.digest => {
                    return Err(Trouble::Wrong("its hash is not its name".to_owned()));
                }
                Ok(Some(_)) => {
                    let size = draft.as_file().metadata().map_err(here)?.len();
                    draft.persist(&object.path).map_err(|error| here(error.error))?;
                    return Ok(Some(size));
                }
            }
        }
    }

    /// Says that a record which came from there is no result that this runner can use.
    pub(super) fn disbelieve(&self, key: &Key, problem: &str) {
        if self.state().fetched.contains(key) {
            self.poisoned(&name_of_record(key), problem);
        }
    }

    /// Has a result sent beside the work.
    pub(super) fn send(self: &Arc<Self>, store: &Store, key: &Key) {
        if self.options.read_only || self.state().fetched.contains(key) {
            return;
        }
        if self.is_down() {
            self.state().report.unsent += 1;
            return;
        }
        self.give(store, Job::Send(key.clone()));
    }

    /// Hands a job to the threads that send, and starts them with the first one.
    fn give(&self, store: &Store, job: Job) {
        let Some(this) = store.remote_handle() else { return };
        let mut sending = locked(&self.sending);
        let give = match &sending.give {
            Some(give) => give.clone(),
            None => {
                let (give, take) = channel();
                let take = Arc::new(Mutex::new(take));
                for _ in 0..SENDERS {
                    let (this, take) = (Arc::clone(&this), Arc::clone(&take));
                    let local = store.without_remote();
                    let thread = std::thread::Builder::new().name("cache-sender".to_owned());
                    match thread.spawn(move || this.serve(&local, &take)) {
                        Ok(thread) => sending.threads.push(thread),
                        Err(error) => tracing::debug!("no thread to send with: {error}"),
                    }
                }
                sending.give = Some(give.clone());
                give
            }
        };
        if sending.threads.is_empty() || give.send(job).is_err() {
            drop(sending);
            self.state().report.unsent += 1;
        }
    }

    /// What a thread that sends does until nobody has work for it.
    fn serve(&self, store: &Store, take: &Mutex<Receiver<Job>>) {
        loop {
            let job = locked(take).recv();
            let Ok(job) = job else { return };
            let touch = matches!(job, Job::Touch(_));
            let (Job::Send(key) | Job::Touch(key)) = job;
            let sent = match self.is_down() || interrupt::requested() {
                true => Err((String::new(), Trouble::Stopped)),
                false if touch => self.touched(store, &key),
                false => self.sent(store, &key).map(drop),
            };
            if let Err((name, trouble)) = sent {
                self.heed(&name, &trouble);
                if !touch {
                    self.state().report.unsent += 1;
                }
            }
        }
    }

    fn touched(&self, store: &Store, key: &Key) -> Result<(), (String, Trouble)> {
        let name = name_of_record(key);
        let Some((bytes, _)) = store.sealed_record(key) else { return Ok(()) };
        self.bucket.put(&name, &bytes, false).map(drop).map_err(|trouble| (name, trouble))
    }

    /// Sends one result: first what it names, then its record.
    fn sent(&self, store: &Store, key: &Key) -> Result<Sent, (String, Trouble)> {
        // Cleared away meanwhile: then it is no result any more.
        let Some((bytes, action)) = store.sealed_record(key) else { return Ok(Sent::Gone) };
        let objects = store.named_by(&action);
        if objects.iter().any(|object| object.of_command) && !self.options.commands {
            return Ok(Sent::OfCommand);
        }
        let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |facts| facts.len());
        let whole: u64 = objects.iter().map(|object| size(&object.path)).sum();
        if whole > self.options.largest {
            self.state().report.too_large += 1;
            return Ok(Sent::TooLarge(whole));
        }
        let name = name_of_record(key);
        let of_record = |trouble| (name.clone(), trouble);
        let poisoned = |name: &str| self.state().poisoned.contains(name);
        let replaces = poisoned(&name);
        // Where nothing was there a moment ago, nobody asks again.
        let missing = self.state().missing.contains_key(key);
        if !replaces && !missing {
            let there = self.bucket.get(&name, LARGEST_RECORD).map_err(of_record)?;
            if let Some((other, _)) = there {
                self.compare(key, &action, &other);
                // Its objects may have been cleared away before it.
                let bytes = self.send_objects(&objects, false)?;
                self.was_sent(key, bytes);
                return Ok(Sent::There);
            }
        }
        let mut sent = self.send_objects(&objects, missing)?;
        match self.bucket.put(&name, &bytes, !replaces).map_err(of_record)? {
            Put::Written => sent += bytes.len() as u64,
            Put::Exists => {
                let there = self.bucket.get(&name, LARGEST_RECORD).map_err(of_record)?;
                if let Some((other, _)) = there {
                    self.compare(key, &action, &other);
                }
            }
        }
        if replaces {
            self.state().poisoned.remove(&name);
        }
        self.was_sent(key, sent);
        Ok(Sent::There)
    }

    /// Whether a result came from there, or was sent in this run.
    fn is_known_there(&self, key: &Key) -> bool {
        let state = self.state();
        state.fetched.contains(key) || state.sent.contains(key)
    }

    fn was_sent(&self, key: &Key, bytes: u64) {
        let mut state = self.state();
        state.sent.insert(key.clone());
        state.report.sent += 1;
        state.report.sent_bytes += bytes;
    }

    /// Sends what is not there yet; gives the bytes that were sent.
    fn send_objects(&self, objects: &[WithName], new: bool) -> Result<u64, (String, Trouble)> {
        // A small object is sent sooner than it is asked for.
        const WORTH_ASKING: u64 = 64 << 10;
        let mut sent = 0;
        for object in objects {
            let name = object.remote_name();
            let failed = |trouble| (name.clone(), trouble);
            let here = |error: std::io::Error| failed(Trouble::Here(error.to_string()));
            let size = std::fs::metadata(&object.path).map_err(here)?.len();
            let replaces = self.state().poisoned.contains(&name);
            let ask = !replaces && (!new || size > WORTH_ASKING);
            if ask && self.bucket.size(&name).map_err(failed)? == Some(size) {
                continue;
            }
            // A file that a power cut damaged is nobody else's affair.
            let hash = Stamps::forgetful().digest(&object.path).map_err(here)?;
            if hash.to_hex().as_str() != object.digest {
                return Err(failed(Trouble::Here("this machine's copy is damaged".to_owned())));
            }
            self.bucket.put_file(&name, &object.path).map_err(failed)?;
            sent += size;
            if replaces {
                self.state().poisoned.remove(&name);
            }
        }
        Ok(sent)
    }

    /// Whether another writer of the same key had the same result; if not, it is told.
    fn compare(&self, key: &Key, mine: &Action, other: &[u8]) {
        let name = name_of_record(key);
        let theirs = match sound_record(other, key) {
            Ok(theirs) => theirs,
            Err(problem) => return self.poisoned(&name, problem),
        };
        if same_result(mine, &theirs) {
            return;
        }
        let whom = match &theirs.machine {
            Some(machine) => format!("{} (run {})", shown(machine), shown(&theirs.run)),
            None => format!("run {}", shown(&theirs.run)),
        };
        let field = |name: &str| {
            let found = mine.fields.iter().find(|(known, _)| known == name);
            found.map_or("", |(_, value)| value.as_str())
        };
        let what = [field("kind"), field("arm")].join(" ");
        self.note(format!(
            "the shared cache `{}` has another result of {whom} under the key {} ({}) than this \
             run computed: that arm is not deterministic, or one machine's hardware fails; the \
             earlier one stays there",
            self.shown,
            key.0.get(..16).unwrap_or(&key.0),
            shown(what.trim()),
        ));
    }

    /// Waits until everything is sent, or given up; says what the run had of it.
    pub fn finish(&self) -> RemoteReport {
        const PATIENCE: Duration = Duration::from_secs(2);
        // Whoever asks to stop waits for no server. What is under way is there whole or not at all.
        const AFTER_STOP: Duration = Duration::from_secs(1);
        const LOOK: Duration = Duration::from_millis(10);
        let started = Instant::now();
        let mut sending = locked(&self.sending);
        // Whoever sends ends when there is nothing left.
        sending.give = None;
        let threads = std::mem::take(&mut sending.threads);
        drop(sending);
        let (mut told, mut stopped) = (false, None);
        while threads.iter().any(|thread| !thread.is_finished()) {
            if interrupt::requested() {
                let since: Instant = *stopped.get_or_insert_with(Instant::now);
                if since.elapsed() > AFTER_STOP {
                    break;
                }
            }
            if !told && started.elapsed() > PATIENCE {
                tell_line(&format!("results are still being sent to `{}`", self.shown));
                told = true;
            }
            std::thread::sleep(LOOK);
        }
        let (mut bugs, mut under_way) = (0, 0);
        for thread in threads {
            match thread.is_finished() {
                true => bugs += usize::from(thread.join().is_err()),
                false => under_way += 1,
            }
        }
        let state = self.state();
        let mut report = state.report.clone();
        let untold = state.untold;
        drop(state);
        report.waited = started.elapsed().as_secs_f64();
        report.unsent += bugs + under_way;
        if bugs > 0 {
            report.problems.push("a thread that sends results panicked: a bug of ours".to_owned());
        }
        if untold > 0 {
            let more = crate::manifest::problem::plural(untold, "other problem");
            report.problems.push(format!("{more} of the shared cache `{}`", self.shown));
        }
        if report.unsent > 0 {
            report.problems.push(format!(
                "{} of this run {} not sent to the shared cache `{}`; `runner cache push --cache \
                 URL` sends what it lacks",
                crate::manifest::problem::plural(report.unsent, "result"),
                if report.unsent == 1 { "was" } else { "were" },
                self.shown
            ));
        }
        report
    }

    /// Sends everything that the store has and this cache lacks, and waits for it.
    ///
    /// # Errors
    /// If the local cache cannot be read.
    pub fn push(self: &Arc<Self>, store: &Store) -> Result<RemoteReport, CacheError> {
        let behind = store.behind(Arc::clone(self));
        for held in store.held()? {
            self.send(&behind, &held.action.key);
        }
        Ok(self.finish())
    }
}

/// A record as it stands in a store, if it is the one of this key and whole.
fn sound_record(bytes: &[u8], key: &Key) -> Result<Action, &'static str> {
    let action = decode_record(bytes).ok_or("its check does not fit")?;
    if action.key != *key {
        return Err("it is another key's");
    }
    if KeyWalk::again(&action.fields).key() != *key {
        return Err("its fields do not give its key");
    }
    Ok(action)
}

/// Whether two records of one key say the same but for the time that it took.
fn same_result(a: &Action, b: &Action) -> bool {
    let said = |action: &Action| {
        let mut payload: Value = action.read().unwrap_or_default();
        without_times(&mut payload);
        payload
    };
    a.object == b.object && said(a) == said(b)
}

/// Times are another machine's, and what is printed may hold them.
fn without_times(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for name in ["seconds", "stdout", "stderr"] {
                fields.remove(name);
            }
            fields.values_mut().for_each(without_times);
        }
        Value::Array(items) => items.iter_mut().for_each(without_times),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_what_is_secret() {
        let shown = without_secrets;
        assert_eq!(shown("https://me:pw@host/a?sig=x#y"), "https://host/a");
        assert_eq!(shown("s3://bucket/team"), "s3://bucket/team");
        assert_eq!(shown("az://box@account/a"), "az://box@account/a");
        assert_eq!(shown("s3://key:pw@bucket/a"), "s3://bucket/a");
        let refused =
            ["https://me@host/a", "http://me:pw@host", "s3://key:pw@bucket/a", "s3://b/a?key=pw"];
        assert_eq!(refused.map(secret_in).map(|what| what.is_some()), [true; 4]);
        let taken = ["s3://bucket/a@b:c", "abfss://box@account/a", "file:///a:b@c"];
        assert_eq!(taken.map(secret_in), [None; 3]);
    }

    /// One machine's store before a shared folder.
    #[cfg(feature = "remote")]
    fn machine(shared: &Path, read_only: bool) -> (tempfile::TempDir, Store) {
        let own = tempfile::tempdir().expect("a folder");
        let options = RemoteOptions {
            url: format!("file://{}", shared.display()),
            read_only,
            anonymous: false,
            largest: LARGEST_SENT,
            commands: false,
            runs: false,
        };
        let remote = Remote::open(&options).expect("opened");
        let store = Store::new(own.path()).behind(Arc::new(remote));
        (own, store)
    }

    #[cfg(feature = "remote")]
    #[test]
    fn two_writers_of_one_key_agree_or_are_reported() {
        use super::super::store::NewAction;
        let shared = tempfile::tempdir().expect("a folder");
        let mut walk = KeyWalk::new("test");
        walk.field("arm", "device");
        let keep = |store: &Store, run: &str, object: &[u8], said: &str| {
            let payload = serde_json::value::RawValue::from_string(said.to_owned()).expect("JSON");
            let (walk, created, object) = (&walk, "now", Some(object));
            let new = NewAction { walk, run, created, object, payload, seconds: 1.0 };
            store.save(new).expect("saved");
            store.settled().expect("a report")
        };
        let (_first, store) = machine(shared.path(), false);
        let report = keep(&store, "one", b"tensors", r#"{"seconds": 1, "x": 2}"#);
        assert_eq!((report.sent, report.problems.len()), (1, 0));
        // The same, in another time.
        let (_second, store) = machine(shared.path(), false);
        let report = keep(&store, "two", b"tensors", r#"{"seconds": 9, "x": 2}"#);
        assert_eq!((report.sent, report.sent_bytes, report.problems.len()), (1, 0, 0));
        // Other bits, and other words.
        for (object, said) in [(&b"tensorz"[..], r#"{"x": 2}"#), (b"tensors", r#"{"x": 3}"#)] {
            let (_other, store) = machine(shared.path(), false);
            let report = keep(&store, "three", object, said);
            let [problem] = report.problems.as_slice() else { panic!("{:?}", report.problems) };
            assert!(problem.contains("(run one)") && problem.contains("not deterministic"));
        }
        // The first one's stays, and a machine that only reads sends nothing.
        let (_reader, store) = machine(shared.path(), true);
        assert_eq!(store.find(&walk.key()).map(|found| found.run), Some("one".to_owned()));
        let report = keep(&store, "four", b"tensors", r#"{"x": 4}"#);
        assert_eq!((report.fetched, report.sent, report.problems.len()), (1, 0, 0));
    }

    #[test]
    fn times_and_logs_are_no_difference_between_two_results() {
        let read = |text: &str| {
            let mut value: Value = serde_json::from_str(text).expect("JSON");
            without_times(&mut value);
            value
        };
        let (a, b) =
            (r#"{"seconds":1,"x":[{"seconds":2,"y":3}]}"#, r#"{"x":[{"y":3}],"seconds":9}"#);
        assert_eq!(read(a), read(b));
        assert_ne!(read(a), read(r#"{"x":[{"y":4}]}"#));
    }
}
