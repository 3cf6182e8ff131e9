//! Past runs by what a person calls them: a name, `latest`, `previous`, `baseline`, a path.

use std::path::{Path, PathBuf};

use crate::machine;
use crate::manifest::problem::nearest;
use crate::nightly::past::{Past, finished};
use crate::nightly::retention::is_run;
use crate::nightly::{baseline, past};
use crate::record::RunRecord;
use crate::text::{Shown, shown};

/// What may stand for a run, for a hint.
const NAMES: &str = "`latest`, `previous`, `baseline`, a name, or a path";

/// The folder and the record of a past run. `previous` and `baseline` are those of the latest,
/// which is this machine's where it has one here.
pub(super) fn record_of(run: &str, runs: &Path) -> Result<(PathBuf, RunRecord), String> {
    match run {
        "previous" | "baseline" => {
            let latest = record_of("latest", runs)?;
            let record = relative(run, &latest)?;
            let folder = runs.join(&record.id);
            if !is_run(&record.id) || !folder.join("run.json").is_file() {
                return Err(format!(
                    "the run of the {run}, `{}`, is gone: only its numbers are kept, which `runner \
                     diff {run}` reads",
                    shown(&record.id)
                ));
            }
            Ok((folder, record))
        }
        "latest" => {
            let latest = latest(runs)?;
            let record = RunRecord::read(&latest.folder).map_err(|error| error.to_string())?;
            Ok((latest.folder, record))
        }
        run => {
            let folder = folder_of(run, runs)?;
            if !folder.is_file() {
                let record = RunRecord::read(&folder).map_err(|error| error.to_string())?;
                return Ok((folder, record));
            }
            let record = RunRecord::read_file(&folder).map_err(|error| error.to_string())?;
            Ok((folder.parent().unwrap_or(Path::new("")).to_owned(), record))
        }
    }
}

/// The youngest finished run of this machine; of any, where none is of this one.
fn latest(runs: &Path) -> Result<Past, String> {
    let mut past = finished(runs)?;
    let here = |run: &Past| {
        run.brief().and_then(|brief| brief.machine).is_some_and(|name| name == machine::name())
    };
    let place = past.iter().rposition(here).or_else(|| past.len().checked_sub(1));
    place.map(|place| past.swap_remove(place)).ok_or_else(|| {
        format!("`{}` holds no finished run; start one with `runner run`", runs.shown())
    })
}

/// The run that `previous` or `baseline` means, seen from another one in its folder.
pub(super) fn relative(
    word: &str,
    (folder, of): &(PathBuf, RunRecord),
) -> Result<RunRecord, String> {
    let id = shown(&of.id);
    if of.series.is_none() {
        return Err(format!(
            "`{id}` does not say what stages and models it was of: an earlier runner made it; give \
             a run's name instead of `{word}`"
        ));
    }
    let whole = folder.join("run.json").is_file().then(|| folder.canonicalize().ok()).flatten();
    let runs = whole.as_ref().and_then(|folder| folder.parent()).ok_or_else(|| {
        format!("`{id}` lies in no folder of runs, so it has no {word}; give two runs")
    })?;
    let (found, none) = match word {
        "previous" => (
            past::before(of, runs)?.0,
            "no earlier run of the same stages and models on this machine",
        ),
        _ => (
            baseline::of(of, runs)?,
            "no baseline for its stages, models and hardware; `runner baseline set RUN` makes one",
        ),
    };
    found.ok_or_else(|| format!("`{id}` has {none}"))
}

/// A run's folder, or its file: a name in the folder of runs, else a path.
fn folder_of(run: &str, runs: &Path) -> Result<PathBuf, String> {
    let is_one =
        |folder: &Path| folder.join("run.json").exists() || folder.join("events.jsonl").exists();
    let folder = runs.join(run);
    if !run.is_empty() && is_one(&folder) {
        return Ok(folder);
    }
    let path = Path::new(run);
    if path.is_file() || is_one(path) {
        return Ok(path.to_owned());
    }
    if path.exists() || run.contains('/') {
        return Err(format!("`{}` is no run: it holds no run.json", path.shown()));
    }
    Err(format!("`{}` holds no run `{}`{}", runs.shown(), shown(run), near(run, runs)))
}

/// The nearest name of a run, as a hint.
fn near(id: &str, runs: &Path) -> String {
    let names: Vec<String> = finished(runs).into_iter().flatten().map(|run| run.id).collect();
    match nearest(id, names.iter().map(String::as_str)) {
        Some(name) => format!("; did you mean `{name}`?"),
        None => format!("; give {NAMES}"),
    }
}
