//! The finished runs of a folder, and the one before a run.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Deserialize;

use super::SUMMARY;
use crate::files;
use crate::record::{LARGEST_RUN, RunRecord, Series};
use crate::text::Shown;
use crate::verdict::Verdict;

/// A summary is a few kilobytes, and some lines for each change.
const LARGEST_SUMMARY: u64 = 64 << 20;

/// A finished run.
#[derive(Clone, Debug)]
pub struct Past {
    /// Its name.
    pub id: String,
    /// Its folder.
    pub folder: PathBuf,
    /// When its run.json was written.
    finished: SystemTime,
}

/// What is asked of many runs: run.json may be large, so summary.json is read where there is one.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Brief {
    /// The gravest verdict.
    pub verdict: Verdict,
    /// Whether the user stopped it.
    #[serde(default)]
    pub interrupted: bool,
    /// The machine, where the run names it.
    #[serde(default)]
    pub machine: Option<String>,
    /// What it is one of.
    #[serde(default)]
    pub series: Option<Series>,
}

/// The finished runs, the oldest first.
///
/// # Errors
/// If the folder cannot be read.
pub fn finished(runs: &Path) -> Result<Vec<Past>, String> {
    let entries = std::fs::read_dir(runs)
        .map_err(|error| format!("cannot read `{}`: {error}", runs.shown()))?;
    let mut finished: Vec<Past> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            // A link's target is somebody else's.
            let folder = entry.file_type().ok()?.is_dir().then(|| entry.path())?;
            let id = entry.file_name().into_string().ok()?;
            // What is being removed is hidden.
            if id.starts_with('.') {
                return None;
            }
            let json =
                folder.join("run.json").metadata().ok().filter(std::fs::Metadata::is_file)?;
            Some(Past { id, folder, finished: json.modified().ok()? })
        })
        .collect();
    // Several runs of one second differ in nothing but their time.
    finished.sort_by(|a, b| (a.finished, &a.id).cmp(&(b.finished, &b.id)));
    Ok(finished)
}

/// The finished runs of several folders, and of folders below those that hold no run themselves, as
/// where each machine has a folder of its own: the oldest first. Copies lose the time at which
/// they were written, so that names, which begin with the time, go before it.
///
/// # Errors
/// If a folder cannot be read.
pub fn finished_in(folders: &[PathBuf]) -> Result<Vec<Past>, String> {
    let mut past = Vec::new();
    for folder in folders {
        add_below(folder, DEEPEST, &mut past)?;
    }
    if let [_] = folders
        && past.windows(2).all(|pair: &[Past]| pair[0].folder.parent() == pair[1].folder.parent())
    {
        return Ok(past);
    }
    past.sort_by(|a, b| (&a.id, a.finished).cmp(&(&b.id, b.finished)));
    Ok(past)
}

/// Deeper folders are not looked into.
const DEEPEST: usize = 6;

fn add_below(folder: &Path, deepest: usize, past: &mut Vec<Past>) -> Result<(), String> {
    let own = finished(folder)?;
    if !own.is_empty() || deepest == 0 {
        past.extend(own);
        return Ok(());
    }
    let entries = std::fs::read_dir(folder)
        .map_err(|error| format!("cannot read `{}`: {error}", folder.shown()))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && !name.starts_with('.') && name != "cache" {
            add_below(&entry.path(), deepest - 1, past)?;
        }
    }
    Ok(())
}

/// The part of run.json that says what a run was; the rest is passed over.
#[derive(Deserialize)]
struct Head {
    verdict: Verdict,
    interrupted: bool,
    provenance: Machine,
    #[serde(default)]
    series: Option<Series>,
}

#[derive(Deserialize)]
struct Machine {
    #[serde(default)]
    machine: Option<String>,
}

impl Past {
    /// What it was, in brief; nothing if neither of its files can be read.
    pub fn brief(&self) -> Option<Brief> {
        let summary = files::read_text(&self.folder.join(SUMMARY), LARGEST_SUMMARY).ok();
        let brief = summary.and_then(|text| serde_json::from_str::<Brief>(&text).ok());
        brief.filter(|brief| brief.series.is_some()).or_else(|| {
            let text = files::read_text(&self.folder.join("run.json"), LARGEST_RUN).ok()?;
            let Head { verdict, interrupted, provenance, series } =
                serde_json::from_str(&text).ok()?;
            Some(Brief { verdict, interrupted, machine: provenance.machine, series })
        })
    }
}

/// The last whole run before `now`, of the same series and on the same machine, and what of others
/// could not be read.
///
/// # Errors
/// If the folder cannot be read.
pub fn before(now: &RunRecord, runs: &Path) -> Result<(Option<RunRecord>, Vec<String>), String> {
    let mut past = finished(runs)?;
    // What ended later is not before it.
    if let Some(place) = past.iter().position(|run| run.id == now.id) {
        past.truncate(place);
    }
    let mut problems = Vec::new();
    for run in past.iter().rev() {
        let same = run.brief().is_some_and(|brief| {
            let of_series = brief.series.is_some() && brief.series == now.series;
            of_series && brief.machine == now.provenance.machine && !brief.interrupted
        });
        if !same {
            continue;
        }
        match RunRecord::read(&run.folder) {
            // What it says of itself is believed as far as its folder bears it out.
            Ok(record) if record.id == run.id => return Ok((Some(record), problems)),
            Ok(_) => {
                problems.push(format!("`{}` holds a run of another name", run.folder.shown()));
            }
            Err(error) => problems.push(error.to_string()),
        }
    }
    Ok((None, problems))
}
