//! The run that later ones are held against: one for each folder of stages, its models and the
//! kind of hardware.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::files;
use crate::op::Arm;
use crate::record::{ArmRecord, LARGEST_RUN, RunRecord, Series};
use crate::text::{Shown, shown};

/// The folder of baselines, in the folder of runs.
const FOLDER: &str = "baselines";

/// The hardware of a run, in words: baselines of different ones are never compared.
pub fn hardware(run: &RunRecord) -> String {
    let devices = run.stages.iter().filter_map(|stage| stage.arms.get(&Arm::Device));
    let gpu = devices.filter_map(gpu_of).min();
    let gpu = gpu.unwrap_or(NO_DEVICE);
    let cpu = run.provenance.cpu.as_deref().unwrap_or("an unknown CPU");
    format!("{}; {cpu}; {gpu}", run.provenance.platform)
}

/// What stands for the GPU of a run whose device arm has no result.
const NO_DEVICE: &str = "no device";

/// The GPU's model. Records of earlier runners have it in the arithmetic only: its numbers, then
/// after a semicolon the GPU, its place and the library.
fn gpu_of(device: &ArmRecord) -> Option<&str> {
    device.gpu.as_deref().or_else(|| {
        let (_, card) = device.arithmetic.as_ref()?.split_once(';')?;
        card.split(',').next().map(str::trim)
    })
}

/// Sixteen digits that stand for a value.
fn digits(value: &serde_json::Value) -> String {
    blake3::hash(value.to_string().as_bytes()).to_hex()[..16].to_owned()
}

/// Baselines of the same stages and models begin alike.
fn prefix(series: &Series) -> String {
    format!("{}-", digits(&serde_json::json!(series.kin())))
}

fn place(series: &Series, hardware: &str, runs: &Path) -> PathBuf {
    let name = prefix(series) + &digits(&serde_json::json!(hardware));
    runs.join(FOLDER).join(name + ".json")
}

/// Why a baseline's file is of no use, and what to do.
fn unusable(path: &Path, problem: &dyn std::fmt::Display) -> String {
    format!(
        "the baseline `{}` is damaged or of another version: {problem}; remove that file, and set \
         it anew with `runner baseline set RUN`",
        path.shown()
    )
}

fn read(path: &Path) -> Result<Option<RunRecord>, String> {
    match files::read_text(path, LARGEST_RUN) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read the baseline `{}`: {error}", path.shown())),
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|error| unusable(path, &error)),
    }
}

/// The baseline for a run: of its stages, models and hardware. Of a run without a device also
/// that of the same machine, so that a device that is gone is told and not passed over.
///
/// # Errors
/// If it is there and cannot be read.
pub fn of(run: &RunRecord, runs: &Path) -> Result<Option<RunRecord>, String> {
    let Some(series) = &run.series else { return Ok(None) };
    let hardware = hardware(run);
    if let Some(found) = read(&place(series, &hardware, runs))? {
        return Ok(Some(found));
    }
    if !hardware.ends_with(&format!("; {NO_DEVICE}")) || !expects_a_device(run) {
        return Ok(None);
    }
    let machine = &run.provenance.machine;
    for path in files_of(runs, &prefix(series))? {
        let known = read(&path)?;
        let here = |known: &RunRecord| machine.is_some() && known.provenance.machine == *machine;
        if let Some(known) = known.filter(here) {
            return Ok(Some(known));
        }
    }
    Ok(None)
}

fn expects_a_device(run: &RunRecord) -> bool {
    run.stages.iter().any(|stage| stage.arms.contains_key(&Arm::Device))
}

/// Makes a run the baseline of its stages, models and hardware; gives the name of the one in
/// whose place it is, if that could be read.
///
/// # Errors
/// If an earlier runner made it, which did not say what it was one of, or if it cannot be written.
pub fn set(run: &RunRecord, runs: &Path) -> Result<Option<String>, String> {
    let series = run.series.as_ref().ok_or_else(|| {
        format!(
            "`{}` does not say what stages and models it was of: an earlier runner made it; run \
             the stages again, and set that run",
            run.id
        )
    })?;
    let json = serde_json::to_vec_pretty(run)
        .map_err(|error| format!("the baseline cannot be encoded: {error}"))?;
    let place = place(series, &hardware(run), runs);
    let before = read(&place).ok().flatten().map(|before| before.id);
    crate::cache::write_whole(&place, &json).map_err(|error| error.to_string())?;
    Ok(before)
}

/// Whether there is any baseline: cheaper than to look for one.
pub fn is_any(runs: &Path) -> bool {
    let entries = std::fs::read_dir(runs.join(FOLDER));
    entries.is_ok_and(|mut entries| entries.next().is_some())
}

/// A baseline's file, and the run that it holds, or why it cannot be read.
pub type Known = (PathBuf, Result<RunRecord, String>);

/// Every baseline.
///
/// # Errors
/// If the folder cannot be read.
pub fn all(runs: &Path) -> Result<Vec<Known>, String> {
    let known = |path: PathBuf| Some((path.clone(), read(&path).transpose()?));
    Ok(files_of(runs, "")?.into_iter().filter_map(known).collect())
}

/// The files whose names begin so.
fn files_of(runs: &Path, prefix: &str) -> Result<Vec<PathBuf>, String> {
    let folder = runs.join(FOLDER);
    let cannot = |error| format!("cannot read `{}`: {error}", folder.shown());
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(cannot)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(cannot)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) && name.ends_with(".json") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// The names of the runs that are baselines.
///
/// # Errors
/// If one cannot be read: then nobody knows which run it is.
pub fn names(runs: &Path) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Name {
        id: String,
    }
    let mut names = Vec::new();
    for path in files_of(runs, "")? {
        let text = files::read_text(&path, LARGEST_RUN);
        let name: Result<Name, String> = match text {
            Ok(text) => serde_json::from_str(&text).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let name = name.map_err(|error| {
            format!("{}; until then no run is removed", unusable(&path, &error))
        })?;
        names.push(name.id);
    }
    Ok(names)
}

/// Removes a run from the baselines; the run itself stays. Gives how many it was.
///
/// # Errors
/// If a file cannot be removed, or no baseline is that run.
pub fn remove(id: &str, runs: &Path) -> Result<usize, String> {
    let known = all(runs)?;
    let read = |(path, run): &'_ Known| Some((path.clone(), run.as_ref().ok()?.id.clone()));
    let known: Vec<(PathBuf, String)> = known.iter().filter_map(read).collect();
    let files: Vec<&PathBuf> =
        known.iter().filter(|(_, name)| name == id).map(|(path, _)| path).collect();
    if files.is_empty() {
        let names: Vec<String> = known.iter().map(|(_, name)| shown(name)).collect();
        let known = match names.as_slice() {
            [] => "there is none".to_owned(),
            names => format!("the baselines are: {}", names.join(", ")),
        };
        return Err(format!("no baseline is `{}`; {known}", shown(id)));
    }
    for path in &files {
        std::fs::remove_file(path)
            .map_err(|error| format!("cannot remove `{}`: {error}", path.shown()))?;
    }
    Ok(files.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run on an H200, of an earlier runner.
    fn run() -> RunRecord {
        let text = include_str!("../../runs/receipts/h200-qwen2-tiny-e4m3-fast.json");
        serde_json::from_str(text).expect("a receipt")
    }

    fn on(gpu: Option<&str>, machine: &str) -> RunRecord {
        let mut run = run();
        run.provenance.machine = Some(machine.to_owned());
        run.series = Some(Series {
            folder: "../stages".to_owned(),
            models: vec!["a".to_owned()],
            selection: None,
        });
        for device in run.stages.iter_mut().filter_map(|s| s.arms.get_mut(&Arm::Device)) {
            device.gpu = gpu.map(str::to_owned);
            device.arithmetic = gpu.map(|gpu| format!("hopper e4m3, fast; {gpu}, GPU 0"));
        }
        run
    }

    #[test]
    fn the_hardware_is_the_gpus_model_and_not_its_arithmetic() {
        assert!(hardware(&run()).ends_with("; NVIDIA H200"), "{}", hardware(&run()));
        assert!(hardware(&on(Some("NVIDIA H100"), "a")).ends_with("; NVIDIA H100"));
        assert!(hardware(&on(None, "a")).ends_with("; no device"));
    }

    #[test]
    fn two_gpu_models_have_two_baselines_and_one_that_is_gone_is_told() {
        let runs = tempfile::tempdir().expect("a folder");
        let id =
            |run: &RunRecord| of(run, runs.path()).expect("readable").map(|found| hardware(&found));
        let (old, new) = (on(Some("NVIDIA H100"), "node07"), on(Some("NVIDIA H200"), "node08"));
        set(&old, runs.path()).expect("set");
        assert_eq!(id(&new), None);
        set(&new, runs.path()).expect("set");
        assert_eq!((id(&old), id(&new)), (Some(hardware(&old)), Some(hardware(&new))));
        let gone = on(None, "node08");
        assert_eq!(id(&gone), Some(hardware(&new)));
        let changes = crate::nightly::changes(&new, &gone);
        assert!(changes[0].starts_with("hardware "), "{changes:?}");
        assert_eq!(id(&on(None, "node09")), None);
    }
}
