//! `runner export`: the tensors of an arm of a past run, as safetensors.

use std::path::Path;

use super::{print, record_of, store_of};
use crate::op::Arm;
use crate::text::Shown;

pub(super) fn export(
    run: &str,
    stage: &str,
    arm: Arm,
    out: &Path,
    runs: &Path,
) -> Result<u8, String> {
    let (_, record) = record_of(run, runs)?;
    let id = &record.id;
    let found = record.stages.iter().find(|record| record.id.0 == stage).ok_or_else(|| {
        let known: Vec<&str> = record.stages.iter().map(|stage| stage.id.0.as_str()).collect();
        format!("run `{id}` has no stage `{stage}`; it has: {}", known.join(", "))
    })?;
    let result = found.arms.get(&arm).ok_or_else(|| {
        let known: Vec<&str> = found.arms.keys().map(|arm| arm.name()).collect();
        format!("stage `{stage}` has no arm `{arm}`; it has: {}", known.join(", "))
    })?;
    let object = result.object.as_ref().ok_or_else(|| {
        format!("the {arm} arm of stage `{stage}` has no tensors: {}", result.why)
    })?;
    store_of(runs).export_object(object, out).map_err(|error| error.to_string())?;
    print(&format!(
        "{} sites of {stage} {arm} of run {id} in {}\n",
        result.sites.len(),
        out.shown()
    ))
}
