//! Folders of attempts: one for each item while it is worked at, gone afterwards.
//!
//! ```text
//! attempts/<run>.<pid>/lock                                held while the run lives
//!                     /<number>.work, .tmp, .stdout, .stderr
//! ```
//! A run holds the lock of its own folder for as long as it lives; a folder whose
//! lock is free was left behind by a run that was killed.

use crate::text::Shown;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The attempts of one run.
pub struct Attempts {
    folder: PathBuf,
    /// Locked while this run lives.
    lock: Option<File>,
    last: AtomicU64,
}

/// The places of one attempt, side by side: a folder around them would be one more to make
/// and to remove (what that costs: benches/README.md). They go when this goes out of scope.
pub struct Attempt {
    /// What stands before the dot of their names.
    stem: PathBuf,
}

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
        Ok((Attempts { folder, lock: Some(lock), last: AtomicU64::new(0) }, left))
    }

    /// New places to work, with nothing in them.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn attempt(&self) -> std::io::Result<Attempt> {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let attempt = Attempt { stem: self.folder.join(number.to_string()) };
        std::fs::create_dir(attempt.work())?;
        std::fs::create_dir(attempt.temporary())?;
        Ok(attempt)
    }
}

impl Drop for Attempts {
    fn drop(&mut self) {
        remove_run(&self.folder, self.lock.take());
    }
}

impl Attempt {
    /// Where its program works, with an absolute path.
    pub fn work(&self) -> PathBuf {
        self.stem.with_extension("work")
    }

    /// Where its program has its temporary files.
    pub fn temporary(&self) -> PathBuf {
        self.stem.with_extension("tmp")
    }

    /// What its program says.
    pub fn stdout(&self) -> PathBuf {
        self.stem.with_extension("stdout")
    }

    /// What its program says of itself.
    pub fn stderr(&self) -> PathBuf {
        self.stem.with_extension("stderr")
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        for file in [self.stdout(), self.stderr()] {
            // The store may have taken it, or no program have been started.
            let _ = std::fs::remove_file(file);
        }
        for folder in [self.work(), self.temporary()] {
            // What is not empty is cleared first.
            if std::fs::remove_dir(&folder).is_err() {
                remove(&folder);
            }
        }
    }
}

/// Removes a folder, or most of it: the next run does the rest.
fn remove(folder: &Path) {
    const TRIES: usize = 5;
    for tried in 1.. {
        match std::fs::remove_dir_all(folder) {
            // Another run may be at it too.
            Err(error) if error.kind() != ErrorKind::NotFound => {
                // A process that is being killed may have made a file in this moment.
                if tried < TRIES {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                tracing::warn!("cannot remove `{}`: {error}", folder.shown());
            }
            _ => {}
        }
        return;
    }
}

/// Removes the folder of a whole run; whether it was there. It goes out of the way first,
/// so that no run sees it without its lock. Then the lock is closed: a shared file system
/// keeps a file that somebody has open under another name, and no folder with a file is
/// removed.
fn remove_run(folder: &Path, lock: Option<File>) -> bool {
    let name = entry_name(folder);
    let dead = folder.with_file_name(format!("{DEAD}{name}"));
    let moved = std::fs::rename(folder, &dead).is_ok();
    drop(lock);
    remove(if moved { &dead } else { folder });
    moved
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
                // Between its making and its locking it is nobody's for a moment.
                Ok(()) => (!name.starts_with(DRAFT) || is_old(&folder), Some(lock)),
                Err(TryLockError::WouldBlock) => (false, None),
                Err(TryLockError::Error(error)) if is_stale(&error) => (false, None),
                Err(TryLockError::Error(error)) => return Err(error),
            },
            // Another run makes it in this moment, or died while it did.
            Err(error) if error.kind() == ErrorKind::NotFound => (is_old(&folder), None),
            // Somebody else's, or out of reach for now.
            Err(_) => (false, None),
        };
        // A run that ended meanwhile has taken it away itself.
        if dead && remove_run(&folder, lock) {
            let name = name.strip_prefix(DRAFT).unwrap_or(&name);
            cleared.extend(name.split('.').next().map(str::to_owned));
        }
    }
    Ok(cleared)
}

/// Whether another machine removed the file after it was opened here.
fn is_stale(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::StaleNetworkFileHandle
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
    fn runs_that_begin_at_once_do_not_take_each_other_for_dead() {
        let root = tempfile::tempdir().expect("a folder");
        let root = root.path();
        std::thread::scope(|scope| {
            for runner in 0..4 {
                scope.spawn(move || {
                    for run in 0..100 {
                        let opened = Attempts::open(root, &format!("{runner}-{run}"));
                        let (attempts, left) = opened.expect("a folder");
                        assert_eq!(left, Vec::<String>::new());
                        attempts.attempt().expect("a folder");
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(root).expect("a folder").count(), 0);
    }

    #[test]
    fn what_a_killed_run_left_is_cleared_away_and_named() {
        let root = tempfile::tempdir().expect("a folder");
        for name in ["a.1", ".new-b.2", ".dead-c.3"] {
            std::fs::create_dir(root.path().join(name)).expect("made");
            let lock = root.path().join(name).join(LOCK);
            File::create(lock).expect("made");
            let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
            let folder = File::open(root.path().join(name)).expect("opened");
            folder.set_modified(hour_ago).expect("set");
        }
        let (_attempts, mut left) = Attempts::open(root.path(), "d").expect("a folder");
        left.sort();
        assert_eq!(left, ["a", "b"]);
        assert_eq!(std::fs::read_dir(root.path()).expect("a folder").count(), 1);
    }
}
