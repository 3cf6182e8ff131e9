//! The run that later ones are held against: one for each folder of stages, its models and the
//! kind of hardware.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::files;
use crate::op::Arm;
use crate::record::{ArmRecord, LARGEST_RUN, RunRecord, Series};
use crate::text::Shown;

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

/// What a baseline belongs to besides the hardware. What was selected does not matter: of two
/// selections the stages that both have are compared.
fn kin(series: &Series) -> (&str, &[String]) {
    (&series.folder, &series.models)
}

fn place(series: &Series, hardware: &str, runs: &Path) -> PathBuf {
    let text = serde_json::json!([kin(series), hardware]).to_string();
    let name = blake3::hash(text.as_bytes()).to_hex();
    runs.join(FOLDER).join(format!("{}.json", &name.as_str()[..16]))
}

fn parsed(path: &Path, text: &str) -> Result<RunRecord, String> {
    serde_json::from_str(text).map_err(|error| {
        format!(
            "the baseline `{}` is not of this version: {error}; remove that file, and set it anew \
             with `runner baseline set RUN`",
            path.shown()
        )
    })
}

fn read(path: &Path) -> Result<Option<RunRecord>, String> {
    match files::read_text(path, LARGEST_RUN) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read the baseline `{}`: {error}", path.shown())),
        Ok(text) => parsed(path, &text).map(Some),
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
    let here = |known: &RunRecord| {
        let of_kin = known.series.as_ref().is_some_and(|known| kin(known) == kin(series));
        let machine = &run.provenance.machine;
        of_kin && machine.is_some() && known.provenance.machine == *machine
    };
    Ok(all(runs)?.into_iter().map(|(_, known)| known).find(here))
}

fn expects_a_device(run: &RunRecord) -> bool {
    run.stages.iter().any(|stage| stage.arms.contains_key(&Arm::Device))
}

/// Makes a run the baseline of its stages, models and hardware.
///
/// # Errors
/// If an earlier runner made it, which did not say what it was one of, or if it cannot be written.
pub fn set(run: &RunRecord, runs: &Path) -> Result<(), String> {
    let series = run.series.as_ref().ok_or_else(|| {
        format!(
            "`{}` does not say what stages and models it was of: an earlier runner made it; run \
             the stages again, and set that run",
            run.id
        )
    })?;
    let json = serde_json::to_vec_pretty(run)
        .map_err(|error| format!("the baseline cannot be encoded: {error}"))?;
    crate::cache::write_whole(&place(series, &hardware(run), runs), &json)
        .map_err(|error| error.to_string())
}

/// Every baseline with its file.
///
/// # Errors
/// If one cannot be read.
pub fn all(runs: &Path) -> Result<Vec<(PathBuf, RunRecord)>, String> {
    files_of(runs)
        .into_iter()
        .filter_map(|path| Some((path.clone(), read(&path).transpose()?)))
        .map(|(path, run)| Ok((path, run?)))
        .collect()
}

fn files_of(runs: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(runs.join(FOLDER)).into_iter().flatten().flatten();
    let is_json = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "json");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_json).collect();
    paths.sort();
    paths
}

/// The names of the runs that are baselines, as far as their files can be read.
pub fn names(runs: &Path) -> Vec<String> {
    #[derive(Deserialize)]
    struct Name {
        id: String,
    }
    let name = |path: PathBuf| {
        let text = files::read_text(&path, LARGEST_RUN).ok()?;
        Some(serde_json::from_str::<Name>(&text).ok()?.id)
    };
    files_of(runs).into_iter().filter_map(name).collect()
}

/// Removes a run from the baselines; the run itself stays. Gives how many it was.
///
/// # Errors
/// If a file cannot be removed, or no baseline is that run.
pub fn remove(id: &str, runs: &Path) -> Result<usize, String> {
    let known = all(runs)?;
    let files: Vec<&PathBuf> =
        known.iter().filter(|(_, run)| run.id == id).map(|(path, _)| path).collect();
    if files.is_empty() {
        let names: Vec<&str> = known.iter().map(|(_, run)| run.id.as_str()).collect();
        let known = match names.as_slice() {
            [] => "there is none".to_owned(),
            names => format!("the baselines are: {}", names.join(", ")),
        };
        return Err(format!("no baseline is `{id}`; {known}"));
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
