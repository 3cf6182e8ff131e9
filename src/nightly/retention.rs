//! Old runs are removed: their folders, never the cache, and never a run that
//! somebody might still need.
//!
//! It removes only what has the name of a run and holds a finished one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::baseline;
use super::past::{Past, finished};
use crate::record::Series;
use crate::text::Shown;
use crate::verdict::Verdict;

/// The file that pins a run: its results stay in the cache, and it stays in its folder.
pub const PINNED: &str = "pinned";

/// Removes all but the youngest `keep` finished runs of a machine, for each series, and the youngest
/// `keep` that did not pass: the night on which it began is looked for long after. Runs of other
/// machines, runs that are pinned, and baselines stay. Gives the names of those that are gone.
///
/// # Errors
/// If the folder or a baseline cannot be read, and then nothing is removed; or if a run cannot be
/// removed, when the others are.
pub fn remove_old(runs: &Path, keep: usize, machine: &str) -> Result<Vec<String>, String> {
    let baselines: BTreeSet<String> = baseline::names(runs)?.into_iter().collect();
    clear_what_was_put_aside(runs);
    let past = finished(runs)?.into_iter().filter(|run| is_run(&run.id));
    let spared = |run: &Past| baselines.contains(&run.id) || run.folder.join(PINNED).exists();
    let past: Vec<Past> = past.filter(|run| !spared(run)).collect();
    // Nothing is old by any count.
    if past.len() <= keep {
        return Ok(Vec::new());
    }
    let mut counts: BTreeMap<Option<Series>, (usize, usize)> = BTreeMap::new();
    let (mut gone, mut problem) = (Vec::new(), None);
    for Past { id, folder, .. } in past.iter().rev().filter(|run| {
        // Of a run that cannot be read nobody knows whose it is.
        let Some(brief) = run.brief() else { return false };
        if brief.machine.is_some_and(|name| name != machine) {
            return false;
        }
        let (all, bad) = counts.entry(brief.series).or_default();
        let passed = brief.verdict == Verdict::Pass;
        *all += 1;
        *bad += usize::from(!passed);
        *all > keep && (passed || *bad > keep)
    }) {
        match removed(folder, runs) {
            Ok(()) => gone.push(id.clone()),
            Err(text) => problem = problem.or(Some(text)),
        }
    }
    problem.map_or(Ok(gone), Err)
}

/// What stands before the name of a run that is being removed.
const ASIDE: &str = ".removed-";

/// Runs that somebody put out of the way and, killed, did not come to remove.
fn clear_what_was_put_aside(runs: &Path) {
    for entry in std::fs::read_dir(runs).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.strip_prefix(ASIDE).is_some_and(is_run) {
            // Somebody else may be at it just now.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Removes a run's folder: out of the way first, so that nobody reads half of it.
fn removed(folder: &Path, runs: &Path) -> Result<(), String> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let aside = runs.join(format!("{ASIDE}{name}"));
    let cannot = |error| format!("cannot remove `{}`: {error}", folder.shown());
    match std::fs::rename(folder, &aside) {
        // Somebody else cleared it away at the same time.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed.map_err(cannot)?,
    }
    std::fs::remove_dir_all(&aside).map_err(cannot)
}

/// `20261123T061700Z-12d6d1c1`, and with a number after it.
pub fn is_run(name: &str) -> bool {
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
        for other in ["cache", "receipts", "20261101-notes"] {
            make(other, true);
        }
        // Nobody can say whose the other runs are: they have no summary, and no run.json that says.
        make(".removed-20261031T000000Z-0123abcd", true);
        for name in [
            "20261101T000000Z-0123abcd",
            "20261103T000000Z-0123abcd",
            "20261104T000000Z-0123abcd-2",
        ] {
            let summary =
                r#"{"verdict":"pass","series":{"folder":"s","models":[],"selection":null}}"#;
            std::fs::write(runs.path().join(name).join("summary.json"), summary).expect("written");
        }
        make("20261030T000000Z-0123abcd", true);
        assert_eq!(
            remove_old(runs.path(), 2, "node07").expect("removed"),
            ["20261101T000000Z-0123abcd"]
        );
        assert_eq!(remove_old(runs.path(), 2, "node07").expect("nothing left"), [""; 0]);
        assert!(runs.path().join("cache").is_dir() && runs.path().join("20261101-notes").is_dir());
        assert!(runs.path().join("20261102T000000Z-0123abcd").is_dir(), "it never ended");
        assert!(runs.path().join("20261030T000000Z-0123abcd").is_dir(), "it cannot be read");
        assert!(!runs.path().join(".removed-20261031T000000Z-0123abcd").exists());
    }

    /// A folder with a run on each of these days: its machine, and how it ended.
    fn nights(of: &[(u8, &str, &str)]) -> tempfile::TempDir {
        let runs = tempfile::tempdir().expect("a folder");
        for (day, machine, verdict) in of {
            let folder = runs.path().join(format!("202611{day:02}T000000Z-0123abcd"));
            std::fs::create_dir(&folder).expect("made");
            let series =
                serde_json::json!({ "folder": "../stages", "models": [], "selection": null });
            let summary =
                serde_json::json!({ "verdict": verdict, "machine": machine, "series": series });
            std::fs::write(folder.join("summary.json"), summary.to_string()).expect("written");
            let json = std::fs::File::create(folder.join("run.json")).expect("written");
            let since = std::time::Duration::from_secs(1_000_000 + u64::from(*day));
            json.set_modified(std::time::SystemTime::UNIX_EPOCH + since).expect("set");
        }
        runs
    }

    fn days(gone: &[String]) -> Vec<&str> {
        gone.iter().map(|name| &name[6..8]).collect()
    }

    #[test]
    fn a_machine_removes_its_own_runs_and_no_others() {
        let (a, b) = ("node07", "node08");
        let runs = nights(&[(1, a, "pass"), (2, b, "pass"), (3, b, "pass"), (4, a, "pass")]);
        assert_eq!(days(&remove_old(runs.path(), 1, a).expect("removed")), ["01"]);
        assert_eq!(days(&remove_old(runs.path(), 1, b).expect("removed")), ["02"]);
    }

    #[test]
    fn where_a_baseline_cannot_be_read_nothing_is_removed() {
        let runs = nights(&[(1, "node07", "pass"), (2, "node07", "pass")]);
        std::fs::create_dir(runs.path().join("baselines")).expect("made");
        std::fs::write(runs.path().join("baselines/a.json"), "{\"id\": \"2026").expect("written");
        assert!(remove_old(runs.path(), 1, "node07").is_err());
        assert!(runs.path().join("20261101T000000Z-0123abcd").is_dir());
    }

    #[test]
    fn the_last_bad_nights_outlive_the_good_ones_after_them() {
        let (a, bad, good) = ("node07", "structural", "pass");
        let runs = nights(&[(1, a, bad), (2, a, bad), (3, a, good), (4, a, good), (5, a, good)]);
        assert_eq!(
            days(&remove_old(runs.path(), 1, "node07").expect("removed")),
            ["04", "03", "01"]
        );
    }

    #[test]
    fn a_pinned_run_and_a_baseline_stay() {
        let (a, good) = ("node07", "pass");
        let runs = nights(&[(1, a, good), (2, a, good), (3, a, good), (4, a, good)]);
        std::fs::write(runs.path().join("20261101T000000Z-0123abcd/pinned"), "").expect("written");
        std::fs::create_dir(runs.path().join("baselines")).expect("made");
        let baseline = serde_json::json!({ "id": "20261102T000000Z-0123abcd" }).to_string();
        std::fs::write(runs.path().join("baselines/a.json"), baseline).expect("written");
        assert_eq!(days(&remove_old(runs.path(), 1, "node07").expect("removed")), ["03"]);
    }
}
