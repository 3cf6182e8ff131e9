//! Workloads and traces of FlashInfer-Bench: JSON Lines that say where a kernel's inputs lie.
//!
//! A line names safetensors files beneath the folder of the whole set. Inputs that are drawn
//! when the benchmark runs are in no file. It knows where inputs are, not what a kernel does.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

#[derive(Deserialize)]
struct Line {
    workload: Workload,
}

#[derive(Deserialize)]
struct Workload {
    uuid: String,
    inputs: BTreeMap<String, Input>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Input {
    Random,
    Scalar,
    Safetensors { path: String, tensor_key: String },
}

/// Where an input of a workload is.
pub(super) enum Found {
    /// A tensor of a safetensors file.
    In(PathBuf, String),
    /// In no file, and why.
    Nowhere(String),
}

/// The inputs by their names; of several workloads each behind its number, `UUID.NAME`. A
/// workload that was run with several solutions has a line for each, and counts once.
pub(super) fn inputs(path: &Path, file: &[u8]) -> Result<Vec<(String, Found)>, String> {
    let text = std::str::from_utf8(file).map_err(|_| "it is no text".to_owned())?;
    let mut workloads: BTreeMap<String, BTreeMap<String, Input>> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(line).map_err(|error| {
            format!(
                "line {} is no workload or trace of FlashInfer-Bench: {error}; as operands give \
                 safetensors or `.npy` files",
                number + 1
            )
        })?;
        workloads.entry(line.workload.uuid).or_insert(line.workload.inputs);
    }
    let several = workloads.len() > 1;
    let mut found = Vec::new();
    for (uuid, inputs) in workloads {
        for (name, input) in inputs {
            let name = if several { format!("{uuid}.{name}") } else { name };
            found.push((name, place(path, input)?));
        }
    }
    match found.is_empty() {
        true => Err("it holds no workload with inputs".to_owned()),
        false => Ok(found),
    }
}

fn place(path: &Path, input: Input) -> Result<Found, String> {
    Ok(match input {
        Input::Random => Found::Nowhere(
            "is drawn by FlashInfer-Bench when it runs, and is in no file; save it there, where \
             the solution is called"
                .to_owned(),
        ),
        Input::Scalar => Found::Nowhere("is a number and no tensor".to_owned()),
        Input::Safetensors { path: inner, tensor_key } => {
            let shown = crate::text::shown(&inner);
            let plain =
                Path::new(&inner).components().all(|part| matches!(part, Component::Normal(_)));
            if !plain || !inner.ends_with(".safetensors") {
                return Err(format!("it names `{shown}`, which is no safetensors file of its set"));
            }
            let file = set_of(path).map(|set| set.join(&inner)).filter(|file| file.is_file());
            let file = file.ok_or_else(|| {
                format!(
                    "it names `{shown}`, which does not lie beside the folder `workloads` or \
                     `traces` that this file is in; copy the whole set of traces"
                )
            })?;
            Found::In(file, tensor_key)
        }
    })
}

/// The folder of the whole set: `workloads` and `traces` lie in it.
fn set_of(path: &Path) -> Option<&Path> {
    let within = path.ancestors().skip(1).find(|folder| {
        folder.file_name().is_some_and(|name| name == "workloads" || name == "traces")
    });
    within?.parent()
}
