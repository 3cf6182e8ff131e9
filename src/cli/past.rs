//! Past runs by what a person calls them: a name, `latest`, `previous`, `baseline`, a path.

use std::path::{Path, PathBuf};

use crate::manifest::problem::nearest;
use crate::nightly::past::finished;
use crate::nightly::{baseline, past};
use crate::record::RunRecord;
use crate::text::Shown;

/// What may stand for a run, for help texts.
pub(super) const NAMES: &str = "`latest`, `previous`, `baseline`, a name, or a path";

/// The folder and the record of a past run. `previous` and `baseline` are those of the latest.
pub(super) fn record_of(run: &str, runs: &Path) -> Result<(PathBuf, RunRecord), String> {
    match run {
        "previous" | "baseline" => {
            let (_, latest) = record_of("latest", runs)?;
            let record = relative(run, &latest, runs)?;
            Ok((runs.join(&record.id), record))
        }
        "latest" => {
            let latest = finished(runs)?.pop().ok_or_else(|| {
                format!("`{}` holds no finished run; start one with `runner run`", runs.shown())
            })?;
            let record = RunRecord::read(&latest.folder).map_err(|error| error.to_string())?;
            Ok((latest.folder, record))
        }
        run => {
            let folder = folder_of(run, runs)?;
            let record = match folder.is_file() {
                true => RunRecord::read_file(&folder),
                false => RunRecord::read(&folder),
            };
            let record = record.map_err(|error| error.to_string())?;
            match folder.is_file() {
                true => Ok((folder.parent().unwrap_or(Path::new("")).to_owned(), record)),
                false => Ok((folder, record)),
            }
        }
    }
}

/// The run that `previous` or `baseline` means, seen from another one.
pub(super) fn relative(word: &str, of: &RunRecord, runs: &Path) -> Result<RunRecord, String> {
    if of.series.is_none() {
        return Err(format!(
            "`{}` does not say what stages and models it was of: an earlier runner made it; give \
             a run's name instead of `{word}`",
            of.id
        ));
    }
    let (found, none) = match word {
        "previous" => (
            past::before(of, runs)?,
            "no earlier run of the same stages and models on this machine",
        ),
        _ => (
            baseline::of(of, runs)?,
            "no baseline for its stages, models and hardware; `runner baseline set RUN` makes one",
        ),
    };
    found.ok_or_else(|| format!("`{}` has {none}", of.id))
}

/// A run's folder, or its file: a name in the folder of runs, else a path.
fn folder_of(run: &str, runs: &Path) -> Result<PathBuf, String> {
    let folder = runs.join(run);
    if folder.is_dir() {
        return Ok(folder);
    }
    let path = Path::new(run);
    if run.contains('/') || path.is_file() {
        return match path.exists() {
            true => Ok(path.to_owned()),
            false => Err(format!("`{}` is no run: nothing is there", path.shown())),
        };
    }
    Err(format!("`{}` holds no run `{}`{}", runs.shown(), crate::text::shown(run), near(run, runs)))
}

/// The nearest name of a run, as a hint.
fn near(id: &str, runs: &Path) -> String {
    let names: Vec<String> = finished(runs).into_iter().flatten().map(|run| run.id).collect();
    match nearest(id, names.iter().map(String::as_str)) {
        Some(name) => format!("; did you mean `{name}`?"),
        None => format!("; give {NAMES}"),
    }
}
