//! Old runs are removed: their folders, never the cache, and never a run that
//! somebody might still need.
//!
//! It removes only what has the name of a run and holds a finished one.

use crate::text::Shown;
use std::path::{Path, PathBuf};

/// Removes all but the youngest `keep` finished runs; gives the names of those that
/// are gone.
///
/// # Errors
/// If the folder cannot be read, or a run not removed.
pub fn remove_old(runs: &Path, keep: usize) -> Result<Vec<String>, String> {
    let entries = std::fs::read_dir(runs)
        .map_err(|error| format!("cannot read `{}`: {error}", runs.shown()))?;
    let mut finished: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            // A link's target is somebody else's.
            let folder = entry.file_type().ok()?.is_dir();
            let name = entry.file_name().into_string().ok()?;
            let run = folder && is_run(&name) && entry.path().join("run.json").is_file();
            run.then(|| (name, entry.path()))
        })
        .collect();
    // Names begin with the time.
    finished.sort();
    let old = finished.len().saturating_sub(keep);
    let mut gone = Vec::new();
    for (name, path) in finished.into_iter().take(old) {
        std::fs::remove_dir_all(&path)
            .map_err(|error| format!("cannot remove `{}`: {error}", path.shown()))?;
        gone.push(name);
    }
    Ok(gone)
}

/// `20261123T061700Z-12d6d1c1`, and with a number after it.
fn is_run(name: &str) -> bool {
    let Some((time, plan)) = name.split_once('-') else { return false };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let time_fits = time.len() == 16
        && time.ends_with('Z')
        && time.as_bytes().get(8) == Some(&b'T')
        && digits(&time[..8])
        && digits(&time[9..15]);
    let (hash, number) = plan.split_once('-').unwrap_or((plan, "1"));
    time_fits && hash.len() == 8 && hash.bytes().all(|b| b.is_ascii_hexdigit()) && digits(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_finished_runs_go() {
        let runs = tempfile::tempdir().expect("a folder");
        let make = |name: &str, finished: bool| {
            let folder = runs.path().join(name);
            std::fs::create_dir(&folder).expect("made");
            if finished {
                std::fs::write(folder.join("run.json"), "{}").expect("written");
            }
        };
        make("20261101T000000Z-0123abcd", true);
        make("20261102T000000Z-0123abcd", false);
        make("20261103T000000Z-0123abcd", true);
        make("20261104T000000Z-0123abcd-2", true);
        for other in ["cache", "receipts", "baselines", "20261101-notes"] {
            make(other, true);
        }
        assert_eq!(remove_old(runs.path(), 2).expect("removed"), ["20261101T000000Z-0123abcd"]);
        assert_eq!(remove_old(runs.path(), 2).expect("nothing left"), [""; 0]);
        assert!(runs.path().join("cache").is_dir() && runs.path().join("20261101-notes").is_dir());
    }
}
