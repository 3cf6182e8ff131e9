//! Does every falsifier fire? Bugs are planted into an arm, the pipeline runs,
//! and what it says is held against what was planted.
//!
//! The arm is the emulated one, or the emulated arithmetic in the device's role
//! beside a clean emulated arm, so that both ways of detection are exercised:
//! against the predicted floor, and bit by bit. Clean runs under other prompts,
//! models and recipes show false alarms. It prints nothing.

mod catalogue;
mod clean;
mod noise;
mod plant;
mod recording;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde::Serialize;

use crate::cache::{Stamps, Store};
use crate::compare::Diagnosis;
use crate::compare::fingerprints::planted::Ground;
pub use crate::compare::fingerprints::planted::{Bug, chosen};
use crate::compute::arms::{Shipped, Workshop};
use crate::compute::call::{Call, Watched};
use crate::compute::emulated::arm::Emulated;
use crate::compute::floor::Floor;
use crate::compute::reference::Reference;
use crate::compute::{ComputeError, Pass, flow};
use crate::event::{Event, Sink};
use crate::executor::{Attempts, Processes, Slots};
use crate::graph::Graph;
use crate::manifest::{Overrides, Pipeline};
use crate::model::Model;
use crate::op::{Arm, LOGITS_IN_BATCH, Op, Recipe, Site, StageId, Stream, in_layer};
use crate::plan::{OpenModel, Plan, PreparedStage};
use crate::record::StageRecord;
use crate::run::{Options, run};
use crate::tensor::Tensor;
use crate::verdict::{Outcome, Verdict};
use catalogue::catalogue;
pub use clean::{CleanRuns, CleanTally, MODELS as CLEAN_MODELS, clean_runs};
pub use noise::Noise;
pub use recording::{not_clean, recordings, try_recording};

/// What is planted where.
pub struct Plot {
    /// The bug.
    pub bug: &'static Bug,
    /// The site whose op it spoils.
    pub site: Site,
    /// Decides columns, blocks and the like.
    pub seed: u64,
    /// The arm that it is planted into: emulated, or device.
    pub role: Arm,
    /// What every op of that arm does to its values besides.
    pub noise: Noise,
}

/// What a planted bug really did to its site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Effect {
    /// Whether the op was reached and the bug applies to it.
    pub planted: bool,
    /// Values whose bits changed.
    pub changed: usize,
    /// The largest change over its value's floor; infinite where a value is not finite.
    pub moved: f64,
}

/// What the runner said to one planted bug.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// The bug's name.
    pub bug: String,
    /// Causes that are right.
    pub expected: Vec<String>,
    /// Model and recipe.
    pub setting: String,
    /// The arm that carried it.
    pub role: Arm,
    /// What every op of that arm did to its values besides.
    pub noise: Noise,
    /// The site.
    pub site: Site,
    /// Whether only repeats or batches of whole passes can tell, so that no op is named.
    pub of_passes: bool,
    /// What it did.
    pub effect: Effect,
    /// Whether a stage became structural.
    pub detected: bool,
    /// The sites that were named, none twice.
    pub found: Vec<Site>,
    /// The cause that was named.
    pub named: Option<String>,
    /// The diagnosis' words on it.
    pub sentence: String,
    /// The stage's verdict in words.
    pub why: String,
    /// Falsifiers that fired.
    pub fired: BTreeSet<String>,
    /// A stage that could not run.
    pub error: Option<String>,
}

impl Trial {
    /// Whether some value left its floor.
    pub fn above_floor(&self) -> bool {
        self.effect.moved > crate::compare::MOST_DEVIATIONS
    }

    /// Whether the site is the planted one, and the only one.
    pub fn located(&self) -> bool {
        self.found.len() == 1 && self.found[0] == self.site
    }

    /// Whether the name is right.
    pub fn named_right(&self) -> bool {
        self.named.as_ref().is_some_and(|named| self.expected.contains(named))
    }
}

/// Everything that is the same for all trials of one model and recipe.
pub struct Setting<'a> {
    /// In words.
    pub name: String,
    /// The stages, with this model and recipe.
    pub pipeline: &'a Pipeline,
    /// Their order.
    pub graph: &'a Graph,
    /// Those that are run.
    pub stages: &'a BTreeSet<StageId>,
    /// Where results go.
    pub store: &'a Store,
    /// What the engine needs beside a store.
    pub beside: &'a Beside,
}

/// What the engine needs beside a store: digests of files, programs, attempts.
pub struct Beside {
    /// Whether a GPU of this machine computes the device arm where no bug takes its place.
    pub gpu: bool,
    /// Digests of files.
    pub stamps: Stamps,
    /// What jobs of this machine share.
    pub slots: Slots,
    /// Where programs start.
    pub processes: Processes,
    /// Where attempts have their folders.
    pub attempts: Attempts,
}

impl Beside {
    /// What runs in a store's folder need.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn new(store: &Store, gpu: bool) -> Result<Beside, String> {
        let (attempts, _) = Attempts::open(&store.attempts(), "falsify")
            .map_err(|error| format!("cannot make a folder for attempts: {error}"))?;
        let (stamps, processes) = (Stamps::forgetful(), Processes::of_this_program());
        Ok(Beside { gpu, stamps, slots: Slots::here(), processes, attempts })
    }
}

/// The pipeline with another recipe and all arms.
pub fn with_recipe(pipeline: &Pipeline, recipe: Recipe) -> Pipeline {
    let mut pipeline = pipeline.clone();
    for stage in &mut pipeline.stages {
        if matches!(stage.op, Op::Command(_)) {
            continue;
        }
        stage.take_recipe(recipe);
        stage.arms = vec![Arm::Reference, Arm::Emulated, Arm::Device];
    }
    pipeline
}

/// The pipeline as it judges a foreign engine with this noise: its stages that capture
/// every site, by the contract `engine`.
///
/// # Errors
/// If the folder has no such stage, or its contracts no `engine`.
pub fn with_noise(pipeline: &Pipeline, noise: Noise) -> Result<Pipeline, String> {
    const CONTRACT: &str = "engine";
    let mut pipeline = pipeline.clone();
    if noise == Noise::None {
        return Ok(pipeline);
    }
    if !pipeline.contracts.contains_key(CONTRACT) {
        return Err(format!(
            "`--noise` judges by the contract `{CONTRACT}`, and the folder of contracts has none; \
             copy `contracts/{CONTRACT}.toml` there"
        ));
    }
    let every_site = |stage: &crate::manifest::Stage| {
        matches!(stage.op, Op::Forward { capture: crate::op::Capture::EverySite, .. })
    };
    pipeline.stages.retain(every_site);
    if pipeline.stages.is_empty() {
        return Err("`--noise` needs a stage of `[forward]` with `capture = \"every-site\"`; the \
                    folder has none"
            .to_owned());
    }
    for stage in &mut pipeline.stages {
        stage.contract = CONTRACT.to_owned();
        stage.needs.clear();
        stage.recipe.stream = noise.stream();
    }
    Ok(pipeline)
}

/// Loads a folder for one model; `tokens` as the command line gives them.
///
/// # Errors
/// The folder's problems, rendered.
pub fn load(folder: &Path, model: &str, tokens: Option<Vec<u32>>) -> Result<Pipeline, String> {
    let overrides = Overrides { model: Some(model.to_owned()), tokens, ..Overrides::default() };
    crate::manifest::load(folder, &overrides).map_err(|problems| problems.render(false))
}

/// The sites at which a bug can be planted in a model under a recipe, in the order of the flow.
pub fn sites_of(bug: &Bug, model: &Model, recipe: &Recipe) -> Vec<Site> {
    if bug.of_ranks && recipe.ranks() < 2 {
        return Vec::new();
    }
    let first = u32::from(bug.after_layer_0);
    let made: Vec<Site> = flow::sites(model, recipe.kv_cache).collect();
    let of = |kind: &&'static str| {
        let kind = *kind;
        let is = move |site: &&Site| match in_layer(&site.0) {
            Some((layer, inner)) => inner == kind && layer >= first,
            None => site.0 == kind,
        };
        made.iter().filter(is).cloned().collect::<Vec<_>>()
    };
    bug.at.iter().flat_map(of).collect()
}

/// Plants a bug, runs the stages and notes what they said.
///
/// # Errors
/// If the plan cannot be made.
pub fn try_bug(setting: &Setting<'_>, plot: Plot) -> Result<Trial, String> {
    let plan = plan_of(setting)?;
    let model = plan.stages.iter().find_map(|prepared| prepared.model.clone());
    let model = model.ok_or("no selected stage has a model")?;
    let past_layers = in_layer(&plot.site.0).is_none() && !plot.site.0.starts_with("embed");
    let rows_of = |prepared: &PreparedStage<'_>| match prepared.stage.op {
        Op::Forward { capture, .. } if past_layers => {
            capture.with_logits(prepared.tokens.len()).len()
        }
        _ => prepared.tokens.len(),
    };
    let rows = plan.stages.iter().map(rows_of).max().unwrap_or(0);
    let clean = Clean { gpu: setting.beside.gpu };
    let effect = Mutex::default();
    let workshop = Planted(Arc::new(Secret { plot, model, rows, clean, effect }));
    let stages = run_quietly(setting, &plan, &workshop);
    for stage in &stages {
        // Nobody asks for a planted result again.
        let planted = stage.arms.get(&workshop.plot().role);
        let object = planted.and_then(|record| record.object.as_ref());
        if let Some(object) = object {
            let _ = std::fs::remove_file(setting.store.object_path(object));
        }
    }
    Ok(trial_of(setting, workshop.plot(), workshop.effect(), &stages))
}

/// What stages said to what was planted.
fn trial_of(setting: &Setting<'_>, plot: &Plot, effect: Effect, stages: &[StageRecord]) -> Trial {
    let Plot { bug, site, role, noise, .. } = plot;
    let fallen = |stage: &StageRecord| stage.verdict == Verdict::Structural;
    let mut trial = Trial {
        bug: bug.name.to_owned(),
        expected: bug.causes.iter().map(|&cause| cause.to_owned()).collect(),
        setting: setting.name.clone(),
        role: *role,
        noise: *noise,
        site: site.clone(),
        of_passes: *role == Arm::Reference || bug.in_batch,
        effect,
        detected: stages.iter().any(fallen),
        found: Vec::new(),
        named: None,
        sentence: String::new(),
        why: String::new(),
        fired: fired(stages),
        error: stages
            .iter()
            .find(|stage| stage.verdict == Verdict::Error)
            .map(|stage| format!("stage {}: {}", stage.id, stage.why)),
    };
    if let Some(diagnosis) = note_places(stages, &mut trial) {
        trial.named = diagnosis.cause().map(|fit| fit.cause.clone());
        trial.sentence = diagnosis.sentence();
        let stage = stages.iter().find(|stage| stage.diagnoses.contains(diagnosis));
        trial.why = stage.map(|stage| format!("{}: {}", stage.id, stage.why)).unwrap_or_default();
    }
    trial
}

/// The places that the stages name, and the diagnosis that says most.
fn note_places<'s>(stages: &'s [StageRecord], trial: &mut Trial) -> Option<&'s Diagnosis> {
    let subject = Stream::Arm(trial.role);
    let of_role: Vec<&Diagnosis> = stages
        .iter()
        .filter(|stage| stage.verdict == Verdict::Structural)
        .flat_map(|stage| &stage.diagnoses)
        .filter(|diagnosis| diagnosis.subject == subject)
        .collect();
    // Repeats and batches that differ say what, but of a whole pass; a site says where.
    let placed = of_role.iter().filter(|diagnosis| diagnosis.judge != diagnosis.subject);
    let places: BTreeSet<Site> = placed.map(|diagnosis| diagnosis.site.clone()).collect();
    trial.found = places.into_iter().collect();
    let says_most = |diagnosis: &&&Diagnosis| {
        let of_passes = diagnosis.judge == diagnosis.subject;
        // What does not repeat itself explains all else; a batch differs for any reason.
        let rank = match diagnosis.site.0 == LOGITS_IN_BATCH {
            false if of_passes => 2,
            false => 1,
            true => 0,
        };
        let explained = diagnosis.cause().map_or(0.0, |fit| fit.explained);
        (rank, explained > 0.0, (explained * 1e6) as u64)
    };
    of_role.iter().max_by_key(says_most).copied()
}

fn fired(stages: &[StageRecord]) -> BTreeSet<String> {
    let judgements = stages.iter().flat_map(|stage| &stage.judgements);
    let fallen = judgements.filter(|judgement| judgement.outcome == Outcome::Falsified);
    fallen.map(|judgement| judgement.falsifier.clone()).collect()
}

/// A clean run that did not pass.
#[derive(Clone, Debug, Serialize)]
pub struct Alarm {
    /// Model, recipe and prompt.
    pub setting: String,
    /// The stage.
    pub stage: StageId,
    /// What it said.
    pub verdict: Verdict,
    /// Why.
    pub why: String,
}

/// Runs the clean pipeline: stages that did not pass.
///
/// # Errors
/// If the plan cannot be made.
pub fn try_clean(setting: &Setting<'_>) -> Result<Vec<Alarm>, String> {
    let plan = plan_of(setting)?;
    let stages = run_quietly(setting, &plan, &Clean { gpu: setting.beside.gpu });
    for object in
        stages.iter().flat_map(|stage| stage.arms.values()).filter_map(|a| a.object.as_ref())
    {
        let _ = std::fs::remove_file(setting.store.object_path(object));
    }
    let alarms = stages.into_iter().filter(|stage| stage.verdict != Verdict::Pass);
    let alarms = alarms.map(|stage| Alarm {
        setting: setting.name.clone(),
        stage: stage.id,
        verdict: stage.verdict,
        why: stage.why,
    });
    Ok(alarms.collect())
}

/// The falsifiers of the selected stages' contracts that no trial made fire.
pub fn vacuous(pipeline: &Pipeline, stages: &BTreeSet<StageId>, trials: &[Trial]) -> Vec<String> {
    let fired: BTreeSet<&String> = trials.iter().flat_map(|trial| &trial.fired).collect();
    let used = pipeline.stages.iter().filter(|stage| stages.contains(&stage.id));
    let contracts: BTreeSet<&String> = used.map(|stage| &stage.contract).collect();
    let falsifiers = contracts
        .into_iter()
        .filter_map(|name| pipeline.contracts.get(name))
        .flat_map(|contract| &contract.falsifiers);
    let mut silent: Vec<String> =
        falsifiers.map(|f| f.id.clone()).filter(|id| !fired.contains(id)).collect();
    silent.sort();
    silent.dedup();
    silent
}

fn plan_of<'a>(setting: &Setting<'a>) -> Result<Plan<'a>, String> {
    let Setting { pipeline, graph, stages, store, beside, .. } = setting;
    let plan = Plan::new(pipeline, graph, stages, store, &beside.stamps);
    plan.map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        problems.join("\n")
    })
}

/// Sees everything and says nothing.
struct Quiet;

impl Sink for Quiet {
    fn event(&mut self, _: &Event) {}
}

fn run_quietly(
    setting: &Setting<'_>,
    plan: &Plan<'_>,
    workshop: &dyn Workshop,
) -> Vec<StageRecord> {
    let options = Options {
        run: "falsify".to_owned(),
        created: String::new(),
        jobs: 2,
        require: BTreeSet::new(),
        workshop,
        fail_fast: false,
        slots: &setting.beside.slots,
        processes: &setting.beside.processes,
        attempts: &setting.beside.attempts,
        memory: None,
    };
    run(plan, setting.store, &options, &mut Quiet).stages
}

/// The shipped arms; a GPU only where it was asked for, since the outcome then depends
/// on the machine.
struct Clean {
    gpu: bool,
}

impl Workshop for Clean {
    fn name(&self, arm: Arm) -> String {
        Shipped::default().name(arm)
    }

    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
        Shipped::default().ops(arm, recipe)
    }

    fn unavailable(&self, arm: Arm, recipe: &Recipe) -> Option<String> {
        match arm {
            Arm::Device if !self.gpu => Some("falsify runs without one".to_owned()),
            _ => Shipped::default().unavailable(arm, recipe),
        }
    }
}

/// The shipped arms, but one of them carries a bug.
struct Planted(Arc<Secret>);

struct Secret {
    plot: Plot,
    model: Arc<OpenModel>,
    /// Rows of the site in a pass over the prompt: calls with fewer are decoding, and not measured.
    rows: usize,
    clean: Clean,
    effect: Mutex<Effect>,
}

impl Planted {
    fn plot(&self) -> &Plot {
        &self.0.plot
    }

    fn effect(&self) -> Effect {
        *self.0.effect.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Workshop for Planted {
    fn name(&self, arm: Arm) -> String {
        let Plot { bug, site, seed, role, noise } = &self.0.plot;
        if arm == *role {
            format!("planted: {} at {site}, seed {seed}, noise {noise:?}", bug.name)
        } else {
            self.0.clean.name(arm)
        }
    }

    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
        if arm != self.0.plot.role {
            return self.0.clean.ops(arm, recipe);
        }
        let emulated = Emulated::new(&self.0.plot.noise.order(recipe))?;
        let reference = arm == Arm::Reference;
        let arithmetic = format!("{}, with a planted bug", emulated.describe());
        let (secret, recipe) = (Arc::clone(&self.0), *recipe);
        let made: Mutex<BTreeMap<Site, Tensor>> = Mutex::default();
        let inputs: Mutex<BTreeMap<Site, Tensor>> = Mutex::default();
        let calls = Mutex::new(0u64);
        let ops = Watched::new(move |site, call| {
            let clean = if reference { call.on(&Reference)? } else { call.on(&emulated)? };
            let lock = |map: &Mutex<BTreeMap<Site, Tensor>>, tensor: &Tensor| {
                let mut map = map.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                map.insert(site.clone(), tensor.clone());
            };
            let spoilt = if *site == secret.plot.site {
                let number = {
                    let mut calls = calls.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    *calls += 1;
                    *calls
                };
                let made = made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let inputs = inputs.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let of_weight = match call {
                    Call::Matmul { weight, .. } => emulated.of_weight(weight)?,
                    _ => None,
                };
                let of_weight = of_weight.as_ref().map(|arm| (arm, arm.recipe()));
                let (arm, recipe) = of_weight.unwrap_or((&emulated, &recipe));
                let ground = Ground {
                    site,
                    clean: &clean,
                    arm,
                    recipe,
                    model: &secret.model.model,
                    seed: secret.plot.seed,
                    in_batch: call.shape()[0] > secret.rows,
                    call_number: number,
                    made: &made,
                    inputs: &inputs,
                };
                let spoilt = secret.plot.bug.plant.planted(call, &ground)?;
                // An engine passes on what its stream holds.
                let held = |y| if emulated.engine().is_some() { emulated.streamed(y) } else { y };
                spoilt.map(held)
            } else {
                None
            };
            if let Call::Matmul { x, .. } = call {
                lock(&inputs, x);
            }
            if let Some(spoilt) = &spoilt {
                secret.note(call, &recipe, &clean, spoilt)?;
            }
            let result = spoilt.unwrap_or(clean);
            let Plot { noise, seed, .. } = secret.plot;
            let result = noise.applied(result, site, seed);
            lock(&made, &result);
            Ok(result)
        });
        Ok((Box::new(ops), arithmetic))
    }

    fn unavailable(&self, arm: Arm, recipe: &Recipe) -> Option<String> {
        if arm == self.0.plot.role { None } else { self.0.clean.unavailable(arm, recipe) }
    }
}

impl Secret {
    /// Notes how far the bug moved the values of the prompt's pass, or of the longer
    /// one where it shows only there.
    fn note(
        &self,
        call: &Call<'_>,
        recipe: &Recipe,
        clean: &Tensor,
        spoilt: &Tensor,
    ) -> Result<(), ComputeError> {
        let rows = call.shape()[0];
        let measured = if self.plot.bug.in_batch { rows > self.rows } else { rows == self.rows };
        if !measured {
            return Ok(());
        }
        let floor = Floor::new(recipe)?;
        call.on(&floor)?;
        let sigmas = floor.into_sigmas();
        let Some(sigma) = sigmas.first() else { return Ok(()) };
        let mut effect = self.effect.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        effect.planted = true;
        let values = clean.data().iter().zip(spoilt.data()).zip(sigma.each.data());
        let (mut changed, mut moved) = (0, 0.0);
        for ((&clean, &spoilt), &sigma) in values {
            if clean.to_bits() == spoilt.to_bits() {
                continue;
            }
            changed += 1;
            let z = (f64::from(spoilt) - f64::from(clean)).abs() / f64::from(sigma);
            let z = if z.is_nan() { f64::INFINITY } else { z };
            moved = if z > moved { z } else { moved };
        }
        effect.changed = effect.changed.max(changed);
        effect.moved = if moved > effect.moved { moved } else { effect.moved };
        Ok(())
    }
}

/// The bugs whose names contain a text; all for none.
pub fn bugs(filter: Option<&str>) -> Vec<&'static Bug> {
    let wanted = |bug: &&Bug| filter.is_none_or(|text| bug.name.contains(text));
    catalogue().into_iter().filter(wanted).collect()
}
