//! Folders of attempts: one for each item while it is worked at, gone afterwards.
//! One that was left as it was found serves again: making and removing seven files
//! and folders costs more than many a program.
//!
//! ```text
//! attempts/<run>.<pid>/lock       held while the run lives
//!                     /<number>/work, tmp, stdout, stderr
//! ```
//! A run holds the lock of its own folder for as long as it lives; a folder whose
//! lock is free was left behind by a run that was killed.

use std::fs::{File, TryLockError};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The attempts of one run.
pub struct Attempts {
    folder: PathBuf,
    /// Locked while this run lives.
    lock: Option<File>,
    last: AtomicU64,
    /// Folders without anything of the attempts that they were for.
    spare: Mutex<Vec<Attempt>>,
}

/// The folder of one attempt; removed when it goes out of scope.
pub struct Attempt {
    folder: PathBuf,
    /// The rights that its folders have.
    mode: u32,
}

/// Where a program works.
const WORK: &str = "work";
/// Where it has its temporary files.
const TEMPORARY: &str = "tmp";
/// What it says.
const SAID: [&str; 2] = ["stdout", "stderr"];

/// The file that a run keeps locked.
const LOCK: &str = "lock";
/// How the name of a folder begins that is being made.
const DRAFT: &str = ".new-";
/// How the name of a folder begins that is being removed.
const DEAD: &str = ".dead-";

impl Attempts {
    /// Makes the folder of a run below `root`, and clears away what runs that were
    /// killed have left there. Their names are the second value.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn open(root: &Path, run: &str) -> std::io::Result<(Attempts, Vec<String>)> {
        std::fs::create_dir_all(root)?;
        let root = root.canonicalize()?;
        let left = clear_dead(&root)?;
        let name = format!("{run}.{}", std::process::id());
        let folder = root.join(&name);
        // Locked before it stands where others look.
        let draft = root.join(format!("{DRAFT}{name}"));
        std::fs::create_dir(&draft)?;
        let lock = File::create(draft.join(LOCK))?;
        lock.lock()?;
        std::fs::rename(&draft, &folder)?;
        let (last, spare) = (AtomicU64::new(0), Mutex::default());
        Ok((Attempts { folder, lock: Some(lock), last, spare }, left))
    }

    /// A folder with nothing in it but places to work.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn attempt(&self) -> std::io::Result<Attempt> {
        if let Some(spare) = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(spare);
        }
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let folder = self.folder.join(number.to_string());
        std::fs::create_dir(&folder)?;
        let mode = std::fs::symlink_metadata(&folder)?.permissions().mode();
        let attempt = Attempt { folder, mode };
        std::fs::create_dir(attempt.work())?;
        std::fs::create_dir(attempt.temporary())?;
        Ok(attempt)
    }

    /// Takes the folder of an attempt back of which every process is dead.
    pub fn take_back(&self, attempt: Attempt) {
        if attempt.clear().is_some() {
            self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(attempt);
        }
    }
}

impl Drop for Attempts {
    fn drop(&mut self) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).clear();
        remove_run(&self.folder, self.lock.take());
    }
}

impl Attempt {
    /// Where its program works, with an absolute path.
    pub fn work(&self) -> PathBuf {
        self.folder.join(WORK)
    }

    /// Where its program has its temporary files.
    pub fn temporary(&self) -> PathBuf {
        self.folder.join(TEMPORARY)
    }

    /// What its program says.
    pub fn stdout(&self) -> PathBuf {
        self.folder.join(SAID[0])
    }

    /// What its program says of itself.
    pub fn stderr(&self) -> PathBuf {
        self.folder.join(SAID[1])
    }

    /// Makes the folder what it was before its program worked in it, unless that left
    /// something that was not meant to be there.
    fn clear(&self) -> Option<()> {
        for name in ["", WORK, TEMPORARY] {
            let facts = std::fs::symlink_metadata(self.folder.join(name)).ok()?;
            (facts.is_dir() && facts.permissions().mode() == self.mode).then_some(())?;
        }
        for entry in std::fs::read_dir(&self.folder).ok()? {
            let name = entry.ok()?.file_name();
            if SAID.iter().any(|said| name == *said) {
                let facts = std::fs::symlink_metadata(self.folder.join(&name)).ok()?;
                let ours = facts.is_file() && facts.nlink() == 1 && facts.mode() & 0o600 == 0o600;
                (ours && facts.len() == 0).then_some(())?;
            } else if name != WORK && name != TEMPORARY {
                return None;
            }
        }
        for folder in [self.work(), self.temporary()] {
            for entry in std::fs::read_dir(folder).ok()? {
                let entry = entry.ok()?;
                match entry.file_type().ok()?.is_dir() {
                    true => std::fs::remove_dir_all(entry.path()).ok()?,
                    false => std::fs::remove_file(entry.path()).ok()?,
                }
            }
        }
        Some(())
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// Removes a folder, or most of it: the next run does the rest.
fn remove(folder: &Path) {
    const TRIES: usize = 5;
    for tried in 1.. {
        match std::fs::remove_dir_all(folder) {
            // Another run may be at it too.
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                // A process that is being killed may have made a file in this moment.
                if tried < TRIES {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                tracing::warn!("cannot remove `{}`: {error}", folder.display());
            }
            _ => {}
        }
        return;
    }
}

/// Removes the folder of a whole run. It goes out of the way first, so that no run
/// sees it without its lock. Then the lock is closed: a shared file system keeps a file
/// that somebody has open under another name, and no folder with a file is removed.
fn remove_run(folder: &Path, lock: Option<File>) {
    let name = entry_name(folder);
    let dead = folder.with_file_name(format!("{DEAD}{name}"));
    let moved = std::fs::rename(folder, &dead).is_ok();
    drop(lock);
    remove(if moved { &dead } else { folder });
}

/// Removes the folders of runs that live no more, and gives their names.
fn clear_dead(root: &Path) -> std::io::Result<Vec<String>> {
    let mut cleared = Vec::new();
    for entry in std::fs::read_dir(root)? {
        let folder = entry?.path();
        if !folder.is_dir() {
            continue;
        }
        let name = entry_name(&folder);
        if name.starts_with(DEAD) {
            remove(&folder);
            continue;
        }
        let (dead, lock) = match File::options().write(true).open(folder.join(LOCK)) {
            Ok(lock) => match lock.try_lock() {
                Ok(()) => (true, Some(lock)),
                Err(TryLockError::WouldBlock) => (false, None),
                Err(TryLockError::Error(error)) if is_stale(&error) => (false, None),
                Err(TryLockError::Error(error)) => return Err(error),
            },
            // Another run makes it in this moment, or died while it did.
            Err(_) => (is_old(&folder), None),
        };
        if dead {
            remove_run(&folder, lock);
            let name = name.strip_prefix(DRAFT).unwrap_or(&name);
            cleared.extend(name.split('.').next().map(str::to_owned));
        }
    }
    Ok(cleared)
}

/// Whether another machine removed the file after it was opened here.
fn is_stale(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::StaleNetworkFileHandle
}

fn entry_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_old(folder: &Path) -> bool {
    let changed = std::fs::metadata(folder).and_then(|facts| facts.modified());
    let age = changed.ok().and_then(|changed| changed.elapsed().ok());
    age.is_some_and(|age| age.as_secs() > 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_serves_again_only_if_nothing_of_the_last_attempt_is_left_in_it() {
        let root = tempfile::tempdir().expect("a folder");
        let (attempts, _) = Attempts::open(root.path(), "run").expect("a folder");
        type Program = fn(&Attempt);
        let programs: [(&str, bool, Program); 7] = [
            ("nothing", true, |_| {}),
            ("files in their places", true, |attempt| {
                std::fs::create_dir_all(attempt.work().join("a/b")).expect("made");
                std::fs::write(attempt.work().join("a/b/c"), "x").expect("written");
                std::fs::write(attempt.temporary().join("t"), "x").expect("written");
                std::os::unix::fs::symlink("/", attempt.work().join("link")).expect("linked");
                File::create(attempt.stdout()).expect("made");
            }),
            ("a file beside them", false, |attempt| {
                std::fs::write(attempt.work().join("../left"), "x").expect("written");
            }),
            ("words that nobody took", false, |attempt| {
                std::fs::write(attempt.stderr(), "x").expect("written");
            }),
            ("another name of what it says", false, |attempt| {
                File::create(attempt.stdout()).expect("made");
                std::fs::hard_link(attempt.stdout(), attempt.work().join("x")).expect("linked");
            }),
            ("other rights", false, |attempt| {
                let mode = std::fs::Permissions::from_mode(0o700);
                std::fs::set_permissions(attempt.work(), mode).expect("set");
            }),
            ("a link in place of a folder", false, |attempt| {
                std::fs::remove_dir(attempt.temporary()).expect("removed");
                std::os::unix::fs::symlink("/", attempt.temporary()).expect("linked");
            }),
        ];
        for (what, again, program) in programs {
            let attempt = attempts.attempt().expect("a folder");
            let folder = attempt.folder.clone();
            program(&attempt);
            attempts.take_back(attempt);
            let next = attempts.attempt().expect("a folder");
            assert_eq!(next.folder == folder, again, "{what}");
            assert_eq!(folder.exists(), again, "{what}");
            for place in [next.work(), next.temporary()] {
                assert!(place.is_dir() && !place.is_symlink(), "{what}");
                assert_eq!(std::fs::read_dir(place).expect("a folder").count(), 0, "{what}");
            }
        }
        drop(attempts);
        assert_eq!(std::fs::read_dir(root.path()).expect("a folder").count(), 0);
    }
}
