//! Digests of files that were hashed before, known again by their stamps.
//!
//! A stamp is what the file system says of a file without reading it: device,
//! inode, size, times of change. While it stays the same, so does the content,
//! with one exception, which git calls racy: a file that changed so shortly before
//! it was hashed that another change could carry the same time. Such a digest
//! serves the run that made it and is confirmed before it is written down.
//!
//! ```text
//! stamps.log    device inode size mtime ctime digest part check
//! ```
//! One line each, appended; the last one of a file and part counts. A line whose
//! check is wrong (a flipped bit, a torn write) is reported and not believed.

use crate::files;
use crate::interrupt;
use crate::text::Shown;
use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use blake3::Hash;
use rayon::prelude::*;

/// What tells without reading that a file is still the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970.
    modified: i64,
    /// Of anything about it, its name and its mode included.
    changed: i64,
}

impl Stamp {
    /// The stamp of an opened or inspected file.
    pub fn of(facts: &Metadata) -> Stamp {
        let time = |seconds: i64, nanoseconds: i64| {
            seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
        };
        Stamp {
            device: facts.dev(),
            inode: facts.ino(),
            size: facts.size(),
            modified: time(facts.mtime(), facts.mtime_nsec()),
            changed: time(facts.ctime(), facts.ctime_nsec()),
        }
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The stamp as plain numbers.
    pub fn to_words(self) -> [u64; 5] {
        let Stamp { device, inode, size, modified, changed } = self;
        [device, inode, size, modified as u64, changed as u64]
    }

    /// Whether a change after `now` would show in the times.
    pub fn settled(&self, now: i64) -> bool {
        const SECOND: i64 = 1_000_000_000;
        // Who gives a file the times of another cannot choose when it was changed.
        let last = self.modified.max(self.changed);
        // A whole second is what a coarse file system writes. Kernels count time in
        // ticks of at most 10 ms.
        let grain = if last % SECOND == 0 { 2 * SECOND } else { 20_000_000 };
        now.saturating_sub(last) > grain
    }
}

/// What is known of a file without reading it, to tell later whether it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its stamp.
    pub stamp: Stamp,
    mode: u32,
    links: u64,
    is_file: bool,
}

impl Facts {
    /// Of an opened or inspected file.
    pub fn of(facts: &Metadata) -> Facts {
        let (mode, links, is_file) = (facts.mode(), facts.nlink(), facts.is_file());
        Facts { stamp: Stamp::of(facts), mode, links, is_file }
    }

    /// Whether the file was written, or is another one, since these were the facts. Its name,
    /// its mode and the number of its links may have changed. Where something changed and
    /// nothing shows what, it was written and given its old times back.
    pub fn is_written_since(&self, earlier: &Facts) -> bool {
        let content = |Stamp { device, inode, size, modified, .. }: &Stamp| {
            (*device, *inode, *size, *modified)
        };
        let hidden = self.is_file
            && self.stamp != earlier.stamp
            && (self.mode, self.links) == (earlier.mode, earlier.links);
        content(&self.stamp) != content(&earlier.stamp) || hidden
    }
}

/// Which part of a file a digest is of; empty for the whole.
type Part = String;

#[derive(Clone, Debug)]
struct Entry {
    stamp: Stamp,
    digest: Hash,
    trust: Trust,
}

/// How far an entry is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// Read from the log, or to be found there soon.
    Full,
    /// The runner wrote the file itself a moment ago: believed while this run lasts.
    ThisRun,
}

/// The digests of files, kept between runs in a log.
#[derive(Debug)]
pub struct Stamps {
    log: Option<PathBuf>,
    /// Whether digests of earlier runs are believed.
    believe: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    loaded: bool,
    entries: HashMap<(u64, u64, Part), Entry>,
    /// Lines for the log.
    new: Vec<String>,
    /// Files that the run made; confirmed by reading them once more.
    unconfirmed: Vec<PathBuf>,
    lines: usize,
    hashed: u64,
    /// Files whose stamp changed and whose content did not.
    touched: HashSet<(u64, u64)>,
}

/// A log with this many times the lines that count is written anew.
const WASTE: usize = 4;
/// Files up to this size are read again to confirm a racy digest; greater ones
/// are simply hashed again by whoever needs them next.
const SMALL: u64 = 1 << 20;

impl Stamps {
    /// Digests kept in `folder`. With `rehash` those of earlier runs are not believed.
    pub fn new(folder: &Path, rehash: bool) -> Stamps {
        let log = Some(folder.join("stamps.log"));
        Stamps { log, believe: !rehash, state: Mutex::default() }
    }

    /// Digests that nobody keeps.
    pub fn forgetful() -> Stamps {
        Stamps { log: None, believe: false, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.loaded {
            state.loaded = true;
            if let (Some(log), true) = (&self.log, self.believe) {
                load(log, &mut state);
            }
        }
        state
    }

    /// Bytes that were hashed because no digest was known.
    pub fn hashed(&self) -> u64 {
        self.state().hashed
    }

    /// The digest of a file's content.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn digest(&self, path: &Path) -> std::io::Result<Hash> {
        self.digest_until(path, None)
    }

    /// As [`Stamps::digest`], which gives up at a time.
    pub(super) fn digest_until(
        &self,
        path: &Path,
        until: Option<Instant>,
    ) -> std::io::Result<Hash> {
        let stamp = Stamp::of(&std::fs::metadata(path)?);
        if let Some(digest) = self.known(&stamp, "") {
            return Ok(digest);
        }
        let mut file = files::open(path)?;
        // Of what was opened, whatever the name has come to mean since.
        let stamp = Stamp::of(&file.metadata()?);
        let started = now();
        let digest = hash_file(&mut file, stamp.size, until)?;
        if Stamp::of(&file.metadata()?) == stamp {
            self.note(stamp, "", digest, (stamp.size, started));
        }
        Ok(digest)
    }

    /// A digest that is known of a part of the file with this stamp.
    pub fn known(&self, stamp: &Stamp, part: &str) -> Option<Hash> {
        let state = self.state();
        let entry = state.entries.get(&(stamp.device, stamp.inode, part.to_owned()))?;
        (entry.stamp == *stamp).then_some(entry.digest)
    }

    /// Notes the digest of a part of `bytes` bytes whose reading began at `started`,
    /// see [`now`]. A racy one is not kept.
    pub fn note(&self, stamp: Stamp, part: &str, digest: Hash, (bytes, started): (u64, i64)) {
        let mut state = self.state();
        state.hashed += bytes;
        let place = (stamp.device, stamp.inode);
        let earlier = state.entries.get(&(place.0, place.1, part.to_owned()));
        if earlier.is_some_and(|earlier| earlier.digest == digest && earlier.stamp != stamp) {
            state.touched.insert(place);
        }
        if stamp.settled(started) {
            state.keep(stamp, part, digest);
        }
    }

    /// Whether a digest of the whole file with this stamp is kept for later runs.
    pub fn is_kept(&self, stamp: &Stamp) -> bool {
        let state = self.state();
        let entry = state.entries.get(&(stamp.device, stamp.inode, String::new()));
        entry.is_some_and(|entry| entry.stamp == *stamp && entry.trust == Trust::Full)
    }

    /// Whether the file had another stamp before, and the same content.
    pub fn touched(&self, stamp: &Stamp) -> bool {
        self.state().touched.contains(&(stamp.device, stamp.inode))
    }

    /// Notes the digest of a file that the runner itself has just put in its place.
    pub fn note_own(&self, path: &Path, digest: Hash) -> std::io::Result<()> {
        let stamp = Stamp::of(&std::fs::metadata(path)?);
        let mut state = self.state();
        let entry = Entry { stamp, digest, trust: Trust::ThisRun };
        state.entries.insert((stamp.device, stamp.inode, String::new()), entry);
        if stamp.size <= SMALL {
            state.unconfirmed.push(path.to_owned());
        }
        Ok(())
    }

    /// Confirms what is racy and appends what is new to the log.
    ///
    /// # Errors
    /// If the log cannot be written.
    pub fn save(&self) -> std::io::Result<()> {
        let Some(log) = &self.log else { return Ok(()) };
        let unconfirmed = std::mem::take(&mut self.state().unconfirmed);
        if !unconfirmed.is_empty() {
            // Past the grain of the youngest of them.
            std::thread::sleep(PAST_A_TICK);
            let confirmed: Vec<(Stamp, Hash)> =
                unconfirmed.par_iter().filter_map(|path| confirm(path)).collect();
            let mut state = self.state();
            for (stamp, digest) in confirmed {
                state.keep(stamp, "", digest);
            }
        }
        let mut state = self.state();
        if state.new.is_empty() {
            return Ok(());
        }
        state.lines += state.new.len();
        if let Some(folder) = log.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let text = state.new.concat();
        state.new.clear();
        if state.lines > 1000 && state.lines > WASTE * state.entries.len() {
            state.lines = state.entries.len();
            let all: String = state
                .entries
                .iter()
                .filter(|(_, entry)| entry.trust == Trust::Full)
                .map(|((_, _, part), entry)| line(&entry.stamp, part, &entry.digest))
                .collect();
            return super::write_whole(log, all.as_bytes()).map_err(std::io::Error::other);
        }
        let mut file = File::options().create(true).append(true).open(log)?;
        file.write_all(text.as_bytes())
    }
}

impl State {
    fn keep(&mut self, stamp: Stamp, part: &str, digest: Hash) {
        let entry = Entry { stamp, digest, trust: Trust::Full };
        self.entries.insert((stamp.device, stamp.inode, part.to_owned()), entry);
        self.new.push(line(&stamp, part, &digest));
    }
}

/// Longer than the ticks in which kernels count a file's times ([`Stamp::settled`]).
const PAST_A_TICK: std::time::Duration = std::time::Duration::from_millis(21);

/// Whether a file that `look` inspects was written since these were its facts, or is gone. Kernels
/// count a file's times in ticks: within one, who goes on writing leaves no trace, so a file that
/// was written a moment ago is looked at again after it.
pub fn is_written(look: impl Fn() -> std::io::Result<Metadata>, earlier: &Facts) -> bool {
    let written = |now: &Metadata| Facts::of(now).is_written_since(earlier);
    let Ok(facts) = look() else { return true };
    if written(&facts) || Stamp::of(&facts).settled(now()) {
        return written(&facts);
    }
    std::thread::sleep(PAST_A_TICK);
    look().map_or(true, |facts| written(&facts))
}

/// The time by the clock that stamps go by.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Hashes an opened file, a large one by all threads. It is read and not mapped: under a map
/// a file that somebody shortens would end the program.
fn hash_file(file: &mut File, size: u64, until: Option<Instant>) -> std::io::Result<Hash> {
    /// Files of the kernel's own say that they are empty; none is larger than this.
    const OF_THE_KERNEL: u64 = 64 << 20;
    let most = if size == 0 { OF_THE_KERNEL } else { size };
    let mut left = most;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BLOCK.min(most as usize)];
    while left > 0 {
        if interrupt::requested() {
            return Err(std::io::Error::other("stopped on request"));
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = match file.read(&mut buffer[..wanted]) {
            Ok(0) => break,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            count => count?,
        };
        if count < WORTH_THREADS {
            hasher.update(&buffer[..count]);
        } else {
            hasher.update_rayon(&buffer[..count]);
        }
        left -= count as u64;
    }
    if size > 0 && left > 0 {
        let problem = "it became shorter while it was read; try again when nobody writes it";
        return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, problem));
    }
    Ok(hasher.finalize())
}

/// Bytes that are read at once.
const BLOCK: usize = 8 << 20;
/// Fewer bytes are hashed faster by one thread.
const WORTH_THREADS: usize = 128 << 10;

/// Reads a file of this run's once more, now that a change would show.
fn confirm(path: &Path) -> Option<(Stamp, Hash)> {
    let mut file = files::open(path).ok()?;
    let stamp = Stamp::of(&file.metadata().ok()?);
    let settled = stamp.settled(now());
    let digest = hash_file(&mut file, stamp.size, None).ok()?;
    let unchanged = Stamp::of(&file.metadata().ok()?) == stamp;
    (settled && unchanged).then_some((stamp, digest))
}

fn line(stamp: &Stamp, part: &str, digest: &Hash) -> String {
    let Stamp { device, inode, size, modified, changed } = stamp;
    let text = format!("{device} {inode} {size} {modified} {changed} {digest} {part}");
    let check = check_of(text.as_bytes());
    format!("{text} {check}\n")
}

/// What stands at the end of lines and records, and would not fit if they were damaged.
pub(super) fn check_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

fn load(log: &Path, state: &mut State) {
    let bytes = match std::fs::read(log) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => {
            tracing::warn!("cannot read `{}`: {error}; files are hashed again", log.shown());
            return;
        }
    };
    let mut damaged = 0;
    for bytes in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        state.lines += 1;
        match std::str::from_utf8(bytes).ok().and_then(parse) {
            Some((part, entry)) => {
                let Stamp { device, inode, .. } = entry.stamp;
                state.entries.insert((device, inode, part), entry);
            }
            None => damaged += 1,
        }
    }
    if damaged > 0 {
        tracing::warn!(
            "{damaged} lines of `{}` are damaged and are not believed; their files are hashed again",
            log.shown()
        );
    }
}

fn parse(line: &str) -> Option<(Part, Entry)> {
    let (text, check) = line.rsplit_once(' ')?;
    if check_of(text.as_bytes()) != check {
        return None;
    }
    let mut fields = text.splitn(7, ' ');
    let mut number = || fields.next()?.parse::<i64>().ok();
    let (device, inode, size) = (number()?, number()?, number()?);
    let (modified, changed) = (number()?, number()?);
    let digest = Hash::from_hex(fields.next()?).ok()?;
    let part = fields.next()?.to_owned();
    let stamp =
        Stamp { device: device as u64, inode: inode as u64, size: size as u64, modified, changed };
    Some((part, Entry { stamp, digest, trust: Trust::Full }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that was last changed long enough ago.
    fn old_file(folder: &Path, name: &str, content: &[u8]) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, content).expect("written");
        std::thread::sleep(std::time::Duration::from_millis(30));
        path
    }

    #[test]
    fn an_unchanged_file_is_hashed_once_and_by_nobody_after() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = old_file(folder.path(), "a", b"content");
        let first = Stamps::new(folder.path(), false);
        assert_eq!(first.digest(&path).expect("read"), blake3::hash(b"content"));
        first.save().expect("saved");
        let second = Stamps::new(folder.path(), false);
        assert_eq!(second.digest(&path).expect("read"), blake3::hash(b"content"));
        assert_eq!((first.hashed(), second.hashed()), (7, 0));
    }

    #[test]
    fn rehash_believes_nothing_of_earlier_runs() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = old_file(folder.path(), "a", b"content");
        let first = Stamps::new(folder.path(), false);
        first.digest(&path).expect("read");
        first.save().expect("saved");
        let second = Stamps::new(folder.path(), true);
        second.digest(&path).expect("read");
        assert_eq!(second.hashed(), 7);
    }

    #[test]
    fn a_file_that_changed_just_now_is_not_believed_later() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        let stamps = Stamps::new(folder.path(), false);
        std::fs::write(&path, b"one").expect("written");
        let one = stamps.digest(&path).expect("read");
        // The same size within the same tick of the kernel's clock.
        std::fs::write(&path, b"two").expect("written");
        assert_ne!(stamps.digest(&path).expect("read"), one);
    }

    #[test]
    fn a_change_that_hides_its_time_is_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = old_file(folder.path(), "a", b"one");
        let time = std::fs::metadata(&path).and_then(|facts| facts.modified()).expect("a time");
        let stamps = Stamps::new(folder.path(), false);
        let one = stamps.digest(&path).expect("read");
        std::thread::sleep(std::time::Duration::from_millis(25));
        std::fs::write(&path, b"two").expect("written");
        let file = File::options().write(true).open(&path).expect("opened");
        file.set_modified(time).expect("set");
        assert_ne!(stamps.digest(&path).expect("read"), one);
    }

    #[test]
    fn the_runs_own_files_are_confirmed_before_they_are_written_down() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        std::fs::write(&path, b"made").expect("written");
        let stamps = Stamps::new(folder.path(), false);
        stamps.note_own(&path, blake3::hash(b"made")).expect("noted");
        std::fs::write(&path, b"edit").expect("written");
        stamps.save().expect("saved");
        let later = Stamps::new(folder.path(), false);
        assert_eq!(later.digest(&path).expect("read"), blake3::hash(b"edit"));
        assert_eq!(later.hashed(), 0, "what was confirmed is what is there");
    }

    #[test]
    fn a_flipped_bit_in_the_log_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = old_file(folder.path(), "a", b"content");
        let stamps = Stamps::new(folder.path(), false);
        stamps.digest(&path).expect("read");
        stamps.save().expect("saved");
        let log = folder.path().join("stamps.log");
        let whole = std::fs::read(&log).expect("read");
        for place in 0..whole.len() - 1 {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            std::fs::write(&log, &damaged).expect("written");
            let later = Stamps::new(folder.path(), false);
            assert_eq!(later.digest(&path).expect("read"), blake3::hash(b"content"));
            assert_eq!(later.hashed(), 7, "byte {place}");
        }
    }
}
