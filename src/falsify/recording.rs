//! Bugs in the recording of somebody else's engine: the pass that the recipe's kernels make of the
//! tokens, with one op spoilt, written to a file and read as any recording is.
//!
//! Where the recording is to the bit, that pass is what the engine would have left with this bug.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use safetensors::tensor::{Dtype, TensorView};

use super::{
    Alarm, Clean, Effect, Planted, Plot, Secret, Setting, Trial, plan_of, run_quietly, trial_of,
    try_clean,
};
use crate::compute::ComputeError;
use crate::compute::arms::{Output, Task, Workshop, compute};
use crate::manifest::{IfFails, Pipeline, Stage};
use crate::op::{Arm, Capture, Op, Recorded};

/// The stages that hold a recording of every site to an engine's kernels, those of one recording
/// together: a pipeline for each recording, with its file's name. A stage whose contract only
/// knows budgets detects no bug.
pub fn recordings(pipeline: &Pipeline) -> Vec<(String, Pipeline)> {
    let holds = |stage: &&Stage| {
        let every_site = matches!(stage.op, Op::Forward { capture: Capture::EverySite, .. });
        let recorded = stage.arms.contains(&Arm::Recorded) && stage.recorded.is_some();
        let contract = pipeline.contracts.get(&stage.contract);
        let claims = contract.map_or(&[][..], |contract| &contract.falsifiers);
        let detects = claims.iter().any(|claim| claim.if_fails == IfFails::Structural);
        every_site && recorded && detects && stage.recipe.engine.is_some()
    };
    let mut all: Vec<(String, Pipeline)> = Vec::new();
    for stage in pipeline.stages.iter().filter(holds) {
        let mut stage = stage.clone();
        stage.needs.clear();
        let alike = |(_, group): &&mut (String, Pipeline)| {
            let first = &group.stages[0];
            let of = |stage: &Stage| (stage.model.clone(), stage.prompt.clone(), stage.recipe);
            first.recorded == stage.recorded && of(first) == of(&stage)
        };
        match all.iter_mut().find(alike) {
            Some((_, group)) => group.stages.push(stage),
            None => {
                let file = stage.recorded.as_ref().map(|recorded| recorded.file.as_path());
                let name = file.and_then(Path::file_stem).unwrap_or_default();
                let name = name.to_string_lossy().into_owned();
                all.push((name, Pipeline { stages: vec![stage], ..pipeline.clone() }));
            }
        }
    }
    all
}

/// Why bugs cannot be planted into the recording of a group of stages: only of one that these stages
/// pass is the pass of the recipe's kernels what the engine left.
///
/// # Errors
/// If the plan cannot be made.
pub fn not_clean(setting: &Setting<'_>) -> Result<Option<String>, String> {
    let alarms = try_clean(setting)?;
    Ok(alarms.first().map(|Alarm { stage, verdict, why, .. }| {
        format!(
            "stage {stage} must pass before bugs are planted into its recording, and it is \
             {verdict}: {why}"
        )
    }))
}

/// Plants a bug into the recording of a group of stages, and notes what they say of it; the
/// recording lies in `folder` meanwhile.
///
/// # Errors
/// If the pass cannot be computed or written, or the plan cannot be made.
pub fn try_recording(setting: &Setting<'_>, plot: Plot, folder: &Path) -> Result<Trial, String> {
    let plan = plan_of(setting)?;
    let prepared = plan.stages.first().ok_or("no stage holds a recording")?;
    let model = prepared.model.clone().ok_or("the stage has no model")?;
    let rows = prepared.tokens.len();
    let (stage, tokens) = (prepared.stage, prepared.tokens.clone());
    let effect = Mutex::default();
    let clean = Clean { gpu: false };
    let secret = Secret { plot, model: Arc::clone(&model), rows, clean, effect };
    let workshop = Planted(Arc::new(secret));
    let (ops, words) =
        workshop.ops(Arm::Recorded, &stage.recipe).map_err(|error| error.to_string())?;
    let task =
        Task { op: &stage.op, model: &model.model, tokens: &tokens, input: None, spill: None };
    let made = match compute(&task, &*ops, words, &mut |_| {}) {
        // The engine has no kernel for what the bug asks: nothing is planted.
        Err(error @ ComputeError::Recipe(_)) => {
            let trial = trial_of(setting, workshop.plot(), Effect::default(), &[]);
            return Ok(Trial { error: Some(error.to_string()), ..trial });
        }
        made => made.map_err(|error| error.to_string())?,
    };
    drop(ops);
    let file = folder.join("planted.safetensors");
    write(&made, &file)?;
    let mut spoilt = setting.pipeline.clone();
    for stage in &mut spoilt.stages {
        let file = file.clone();
        stage.recorded = Some(Recorded { file, names: BTreeMap::new(), format: None, shape: None });
    }
    let setting = Setting { name: setting.name.clone(), pipeline: &spoilt, ..*setting };
    let stages = run_quietly(&setting, &plan_of(&setting)?, &Clean { gpu: false });
    for stage in &stages {
        // Nobody asks for a planted recording again.
        let planted = stage.arms.get(&Arm::Recorded).and_then(|record| record.object.as_ref());
        if let Some(object) = planted {
            let _ = std::fs::remove_file(setting.store.object_path(object));
        }
    }
    Ok(trial_of(&setting, workshop.plot(), workshop.effect(), &stages))
}

fn write(made: &Output, file: &Path) -> Result<(), String> {
    let bytes: Vec<Vec<u8>> = made.sites.iter().map(|(_, tensor)| tensor.to_le_bytes()).collect();
    let views = made.sites.iter().zip(&bytes).map(|((site, tensor), bytes)| {
        let view = TensorView::new(Dtype::F32, vec![tensor.rows(), tensor.width()], bytes);
        view.map(|view| (site.0.as_str(), view)).map_err(|error| error.to_string())
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    safetensors::serialize_to_file(views, None, file).map_err(|error| error.to_string())
}
