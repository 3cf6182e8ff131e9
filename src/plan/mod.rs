//! What a run would do: models opened, prompts encoded, every action's key.
//!
//! It decides per (stage, arm): run, reuse or blocked, and says why. It
//! computes no op and writes nothing but generated models.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::cache::{Action, Key, KeyWalk, Stamp, Stamps, Store};
use crate::compare::Extent;
use crate::compute::GemmRecord;
use crate::compute::arms::{Workshop, input_width, reads_kernels, tensors_read, weight_of};
use crate::compute::checkpoint;
use crate::compute::forward::{Greedy, attention_of};
use crate::compute::kv_cache::{self, Which};
use crate::compute::parallel;
use crate::executor::command::{self, CommandRecord};
use crate::graph::Graph;
use crate::manifest::{Pipeline, Prompt, Stage};
use crate::model::synthetic::{Scaled, ensure_by};
use crate::model::{Chat, Model};
use crate::op::{self, Arm, Input, InputRef, Op, Recorded, Site, StageId, in_layer};
use crate::text::{Shown, shown};

mod sources;

pub use sources::{OpenModel, SourceError, Sources};

/// The sources of the arms, digested by the build script.
const ARMS_CODE: &str = env!("RUNNER_ARMS_CODE");
/// The sources of the measures.
const MEASURES_CODE: &str = env!("RUNNER_MEASURES_CODE");

/// Why an arm runs although its result is at hand: a profile's `fresh`, or `--fresh`.
const MEASURED_ANEW: &str = "it is measured anew (`fresh`)";

/// Tensors by the names of the fields that they are in: each layer's together, so that a
/// reason names the layer that changed; the others first, by themselves.
fn weights_by_layer(names: Vec<String>) -> Vec<(String, Vec<String>)> {
    let mut layers: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let mut fields = Vec::new();
    for name in names {
        match in_layer(&name) {
            Some((layer, _)) => layers.entry(layer).or_default().push(name),
            None => fields.push((format!("weights of {name}"), vec![name])),
        }
    }
    let layers = layers.into_iter();
    fields.extend(layers.map(|(layer, names)| (format!("weights of blk.{layer}"), names)));
    fields
}

/// A stage that is ready to run.
pub struct PreparedStage<'a> {
    /// As checked.
    pub stage: &'a Stage,
    /// Its model; a command has none.
    pub model: Option<Arc<OpenModel>>,
    /// Its prompt; a command has none.
    pub tokens: Vec<u32>,
    /// Whether it is judged, or only makes an input for one that is.
    pub judged: bool,
}

/// Why a plan cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A stage's model or prompt is not usable.
    #[error("stage `{stage}` (`{}`): {problem}", file.shown())]
    Stage {
        /// The stage.
        stage: StageId,
        /// Its manifest.
        file: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
}

/// Everything that a run needs to know before it starts.
pub struct Plan<'a> {
    /// The pipeline.
    pub pipeline: &'a Pipeline,
    /// The stages to run, in order; those that only make inputs among them.
    pub stages: Vec<PreparedStage<'a>>,
    /// Eight hexadecimal digits of the plan's hash.
    pub id: String,
    /// The project's folder, absolute: the one that holds the folder of stages.
    pub project: PathBuf,
    /// Digests of files.
    pub stamps: &'a Stamps,
    /// What is said before anything runs, of stages that run all the same.
    pub warnings: Vec<PlanError>,
    /// Whether no result of the selected stages may be reused.
    pub force: bool,
    /// Arms of which only what this run computed may be reused.
    pub fresh: BTreeSet<Arm>,
    /// The run whose results count as measured anew, where a job does a part of it.
    pub part_of: Option<String>,
    /// What was measured anew already, by the run that noted it with its result.
    measured: Mutex<BTreeMap<Key, String>>,
    /// The folder of stages, absolute.
    folder: PathBuf,
}

/// What becomes of one (stage, arm).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanLine {
    /// The stage.
    pub stage: StageId,
    /// The arm.
    pub arm: Arm,
    /// `run`, `reuse`, `blocked` or `unmeasured`.
    pub action: &'static str,
    /// The reason.
    pub why: String,
    /// What its key is made of, where that is known before it runs.
    pub fields: Vec<Field>,
}

/// One field of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// What it is now.
    pub value: String,
    /// What it was when the stage last had a result, if that was something else.
    pub before: Option<String>,
}

/// What an arm's action says besides its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmPayload {
    /// The sites, in the order of the flow.
    pub sites: Vec<SiteRecord>,
    /// The greedily decoded tokens.
    pub greedy: Option<GreedyRecord>,
    /// For each site, elements whose bits a repeat changed.
    pub repeats: BTreeMap<Site, u64>,
    /// The arithmetic, in words.
    pub arithmetic: String,
    /// The products, where a library computed them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gemms: Vec<GemmRecord>,
    /// How long it took.
    pub seconds: f64,
    /// What became of a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandRecord>,
}

/// A site's tensor by shape and content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteRecord {
    /// The site.
    pub site: Site,
    /// Rows and width.
    pub shape: [usize; 2],
    /// The hash of the values' little-endian bytes.
    pub blake3: String,
}

/// Decoded tokens with their margins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GreedyRecord {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Each one's lead over the second.
    #[serde(deserialize_with = "numbers")]
    pub margins: Vec<f32>,
}

/// Numbers, of which JSON writes NaN and infinities as null.
fn numbers<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<f32>, D::Error> {
    let read = Vec::<Option<f32>>::deserialize(from)?;
    Ok(read.into_iter().map(|number| number.unwrap_or(f32::NAN)).collect())
}

impl From<Greedy> for GreedyRecord {
    fn from(greedy: Greedy) -> GreedyRecord {
        GreedyRecord { tokens: greedy.tokens, margins: greedy.margins }
    }
}

impl From<GreedyRecord> for Greedy {
    fn from(record: GreedyRecord) -> Greedy {
        Greedy { tokens: record.tokens, margins: record.margins }
    }
}

impl<'a> Plan<'a> {
    /// Opens the models and encodes the prompts of the selected stages, and of
    /// those whose tensors they read.
    ///
    /// # Errors
    /// Every stage's problem, not only the first.
    pub fn new(
        pipeline: &'a Pipeline,
        graph: &Graph,
        selected: &BTreeSet<StageId>,
        store: &Store,
        stamps: &'a Stamps,
    ) -> Result<Plan<'a>, Vec<PlanError>> {
        let mut wanted = selected.clone();
        let mut open: Vec<StageId> = selected.iter().cloned().collect();
        while let Some(id) = open.pop() {
            let inputs = pipeline.stage(&id).map_or(Vec::new(), |stage| stage.op.input_refs());
            for input in inputs {
                if wanted.insert(input.stage.clone()) {
                    open.push(input.stage.clone());
                }
            }
        }
        let mut models: BTreeMap<(String, u64), Result<Arc<OpenModel>, String>> = BTreeMap::new();
        let mut stages = Vec::new();
        let mut problems = Vec::new();
        let mut warnings = Vec::new();
        for id in graph.order().into_iter().filter(|id| wanted.contains(id)) {
            let Some(stage) = pipeline.stage(&id) else { continue };
            if !stage.op.reads_model() {
                let judged = selected.contains(&stage.id);
                stages.push(PreparedStage { stage, model: None, tokens: Vec::new(), judged });
                continue;
            }
            let model = models
                .entry((stage.model.clone(), stage.seed))
                .or_insert_with(|| {
                    open_model(&stage.model, stage.seed, store, stamps).map(Arc::new)
                })
                .clone();
            let prepared = model.and_then(|model| {
                let tokens = tokens_of(stage, &model.model)?;
                check_against_model(stage, &model.model)?;
                let judged = selected.contains(&stage.id);
                Ok(PreparedStage { stage, model: Some(model), tokens, judged })
            });
            match prepared {
                Ok(prepared) => {
                    let unfit = pipeline.unfit(stage).or_else(|| unfit_lookup(pipeline, &prepared));
                    warnings.extend(unfit.filter(|_| prepared.judged).map(|problem| {
                        let (stage, file) = (stage.id.clone(), stage.file.clone());
                        PlanError::Stage { stage, file, problem }
                    }));
                    stages.push(prepared);
                }
                Err(problem) => problems.push(PlanError::Stage {
                    stage: stage.id.clone(),
                    file: stage.file.clone(),
                    problem,
                }),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let mut walk = KeyWalk::new("plan");
        for prepared in &stages {
            walk.field("stage", serde_json::json!(prepared.stage));
            walk.field(
                "contract",
                serde_json::json!(pipeline.contracts.get(&prepared.stage.contract)),
            );
        }
        let id = walk.key().0[..8].to_owned();
        let folder = pipeline.folder.canonicalize().unwrap_or_else(|_| pipeline.folder.clone());
        let project = folder.parent().unwrap_or(&folder).to_owned();
        Ok(Plan {
            pipeline,
            stages,
            id,
            project,
            stamps,
            warnings,
            force: false,
            fresh: BTreeSet::new(),
            part_of: None,
            measured: Mutex::default(),
            folder,
        })
    }

    /// What an arm reads besides its model's weights: sites by their hash, which `site`
    /// knows, files by their digest, generated tensors by their seed.
    ///
    /// # Errors
    /// What cannot be had: a site that is not made yet, or a file that is not there.
    pub fn sources(
        &self,
        prepared: &PreparedStage<'_>,
        arm: Arm,
        site: &dyn Fn(&InputRef) -> Option<String>,
    ) -> Result<Sources, SourceError> {
        let (stage, stamps) = (prepared.stage, self.stamps);
        let mut sources = Sources::default();
        if let Op::Gemm { x, w } = &stage.op {
            sources.tensor("x", x, stamps)?;
            sources.tensor("w", w, stamps)?;
        }
        for (name, input) in stage.op.inputs() {
            if matches!(stage.op, Op::Compare { .. }) && name != arm.name() {
                continue;
            }
            match input {
                Input::File(tensor) => sources.tensor(name, tensor, stamps)?,
                Input::Generated(made) => sources.field(name, serde_json::json!(made)),
                Input::Site(input) => {
                    let hash = site(input).ok_or_else(|| SourceError::NotYet(input.clone()))?;
                    sources.field(name, hash);
                }
            }
        }
        if let Some(external) = &stage.external
            && arm == Arm::External
        {
            let seen = command::look(&external.program, &self.project, stamps);
            let seen = seen.map_err(|error| SourceError::Program(error.to_string()))?;
            let mut walk = KeyWalk::new("external");
            seen.describe(&external.program, &mut walk);
            sources.fields.extend(walk.fields().iter().skip(2).cloned());
            // It opens the model itself, and reads there what it likes.
            let model = prepared.model.as_ref();
            for file in model.map_or(Ok(Vec::new()), |model| model.files_beside())? {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                sources.file(&format!("model file {name}"), &file, stamps)?;
            }
            // It is told both whatever it is asked for.
            sources.field("prompt", serde_json::json!(prepared.tokens));
            if let Some(model) = model {
                sources.field("parameters", model.model.config().parameters());
            }
            sources.field("version", &external.version);
            sources.field("names", serde_json::json!(external.names));
        }
        if arm == Arm::Emulated
            && let Some(engine) = stage.emulates()
        {
            sources.field("engine", serde_json::json!(engine));
        }
        // A product's emulated arm takes its schedule from what was recorded, and a pass's its
        // kernels, where the engine may be one of several.
        let identifies = arm == Arm::Emulated
            && (matches!(stage.op, Op::Gemm { .. }) || reads_kernels(&stage.op, &stage.recipe));
        if let Some(recorded) = &stage.recorded
            && (arm == Arm::Recorded || identifies)
        {
            sources.file("recorded", &recorded.file, stamps)?;
            let Recorded { names, format, shape, .. } = recorded;
            sources.field("recorded tensors", serde_json::json!([names, format, shape]));
        }
        Ok(sources)
    }

    /// The fields of an arm's action; `sources` are those of [`Plan::sources`].
    pub fn arm_walk(
        &self,
        prepared: &PreparedStage<'_>,
        arm: Arm,
        sources: &Sources,
        workshop: &dyn Workshop,
    ) -> KeyWalk {
        let PreparedStage { stage, model, tokens, .. } = prepared;
        let mut walk = KeyWalk::new("arm");
        walk.field("arm", arm);
        walk.field("arms", workshop.name(arm));
        walk.field("code", ARMS_CODE);
        for (name, value) in workshop.facts(arm, &stage.recipe) {
            walk.field(&name, value);
        }
        walk.field("op", op_without_inputs(&stage.op));
        for (name, value) in &sources.fields {
            walk.field(name, value);
        }
        if matches!(stage.op, Op::Forward { .. } | Op::Embed { .. }) {
            walk.field("tokens", serde_json::json!(tokens));
        }
        if arm != Arm::Reference {
            walk.field("recipe", serde_json::json!(stage.recipe));
        }
        let Some(model) = model else { return walk };
        let config = model.model.config();
        for (place, (name, input)) in stage.op.inputs().into_iter().enumerate() {
            if matches!(input, Input::Generated(_)) {
                // How wide it is made follows from the model.
                let width = input_width(&stage.op, place, &model.model).unwrap_or(0);
                walk.field(&format!("width of {name}"), width);
            }
        }
        match &stage.op {
            Op::Forward { .. } => walk.field("config", format!("{config:?}")),
            Op::RmsNorm { .. } => {
                walk.field("eps", config.rms_norm_eps);
                walk.field("architecture", config.architecture.name());
            }
            Op::Rope { site, .. } => {
                let rope = config.rope_of(layer_of(site));
                walk.field("rope", format!("{rope:?} {}", config.head_dim));
            }
            Op::Attention { site, .. } => {
                walk.field("heads", format!("{:?}", attention_of(config, layer_of(site), 0)));
            }
            Op::Swiglu { .. } => walk.field("activation", config.activation.name()),
            Op::Embed { .. }
            | Op::Matmul { .. }
            | Op::Gemm { .. }
            | Op::Compare { .. }
            | Op::Command(_) => {}
        }
        for (name, tensors) in weights_by_layer(tensors_read(&stage.op, &model.model)) {
            walk.field(&name, model.digest(&tensors, self.stamps).to_hex());
        }
        walk
    }

    /// The fields of a command's action.
    pub fn command_walk(&self, op: &op::Command, seen: &command::Seen) -> KeyWalk {
        let mut walk = KeyWalk::new("command");
        seen.describe(op, &mut walk);
        walk
    }

    /// The fields of a stage's measures; `arms` are the keys of the arms' actions.
    pub fn measure_walk(
        &self,
        prepared: &PreparedStage<'_>,
        arms: &BTreeMap<Arm, String>,
        extent: Extent,
    ) -> KeyWalk {
        let mut walk = KeyWalk::new("measures");
        walk.field("code", MEASURES_CODE);
        walk.field("arms code", ARMS_CODE);
        walk.field("recipe", serde_json::json!(prepared.stage.recipe));
        walk.field("extent", serde_json::json!(extent));
        for (arm, key) in arms {
            walk.field(arm.name(), key);
        }
        walk
    }

    /// Who remembers the last action of a stage's arm.
    pub fn who(&self, stage: &Stage, arm: Arm) -> String {
        format!("{}\u{0}{}\u{0}{arm}", self.folder.shown(), stage.id)
    }

    /// Why an action runs although its stage ran before, or that it never did.
    pub fn why_run(&self, store: &Store, stage: &Stage, arm: Arm, walk: &KeyWalk) -> String {
        let Some(key) = store.latest(&self.who(stage, arm)) else {
            return "not in the cache".to_owned();
        };
        match store.record(&key) {
            None => "its last result was cleared from the cache".to_owned(),
            Some(earlier) => match walk.difference(&earlier.fields) {
                Some(difference) => format!("{difference} (since {})", earlier.run),
                None if self.force => "it is forced".to_owned(),
                None if self.fresh.contains(&arm) => MEASURED_ANEW.to_owned(),
                None => "a file of its result is gone from the cache".to_owned(),
            },
        }
    }

    /// The fields of a key, each with what it was before.
    fn fields(&self, store: &Store, stage: &Stage, arm: Arm, walk: &KeyWalk) -> Vec<Field> {
        let earlier = store.latest(&self.who(stage, arm)).and_then(|key| store.record(&key));
        let fields = walk.fields().iter().map(|(name, value)| {
            let before = earlier.as_ref().and_then(|earlier| {
                let known = earlier.fields.iter().find(|(known, _)| known == name);
                Some(known?.1.clone()).filter(|before| before != value)
            });
            Field { name: name.clone(), value: value.clone(), before }
        });
        fields.collect()
    }

    /// A result that a stage may reuse. Stages that only make inputs are not forced.
    pub fn reusable(
        &self,
        store: &Store,
        judged: bool,
        arm: Arm,
        walk: &KeyWalk,
    ) -> Option<Action> {
        let key = walk.key();
        let anew = (self.force && judged) || self.fresh.contains(&arm);
        if let Some(run) = self.part_of.as_ref().filter(|_| anew) {
            // Another job of the run, or an earlier start of this one, may have computed it.
            return readable(store, store.find(&key).filter(|found| found.run == *run)?);
        }
        if self.force && judged {
            return None;
        }
        if !self.fresh.contains(&arm) {
            return readable(store, store.find(&key)?);
        }
        // Several stages may share an arm: measured once in a run is measured anew. Another
        // machine's result, kept under the same key since, is none of this run's.
        let by = self.measured().get(&key).cloned()?;
        readable(store, store.find(&key).filter(|found| found.run == by)?)
    }

    /// Notes what was measured, for stages that share an arm.
    pub fn note_measured(&self, action: &Action) {
        self.measured().insert(action.key.clone(), action.run.clone());
    }

    fn measured(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, String>> {
        self.measured.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What was touched and has the same content, for the reason of a reuse.
    pub fn touched_files(&self, prepared: &PreparedStage<'_>) -> Vec<String> {
        let model = prepared.model.iter().flat_map(|model| model.model.opened_files());
        let touched = model.filter(|(_, _, facts)| self.stamps.touched(&Stamp::of(facts)));
        touched.map(|(path, ..)| path.shown().to_string()).collect()
    }

    /// What a run would do, item by item.
    pub fn preview(&self, store: &Store, workshop: &dyn Workshop) -> Vec<PlanLine> {
        let mut lines = Vec::new();
        // Commands that will run, whose outputs are not known before.
        let mut running: BTreeSet<&StageId> = BTreeSet::new();
        let mut known: BTreeMap<&StageId, Option<ArmPayload>> = BTreeMap::new();
        for prepared in &self.stages {
            let stage = prepared.stage;
            if let Op::Command(op) = &stage.op {
                let first = stage.needs.iter().find(|need| running.contains(need));
                let (action, why, fields) = match first {
                    Some(need) => {
                        ("run", format!("stage {need}, which it needs, runs first"), Vec::new())
                    }
                    None => self.preview_command(prepared, op, store),
                };
                if action != "reuse" {
                    running.insert(&stage.id);
                }
                let (stage, arm) = (stage.id.clone(), Arm::Command);
                lines.push(PlanLine { stage, arm, action, why, fields });
                continue;
            }
            let site = |input: &InputRef| {
                let payload = known.get(&input.stage).and_then(|payload| payload.as_ref());
                let sites = payload.map(|payload| payload.sites.as_slice()).unwrap_or_default();
                let record = sites.iter().find(|record| record.site == input.site);
                record.map(|record| record.blake3.clone())
            };
            let mut made: Option<ArmPayload> = None;
            let arms = stage.arms.iter().filter(|arm| prepared.judged || **arm == Arm::Reference);
            for &arm in arms {
                let mut line = |action: &'static str, why: String, fields: Vec<Field>| {
                    lines.push(PlanLine { stage: stage.id.clone(), arm, action, why, fields });
                };
                if let Some(reason) = workshop.unavailable(arm, &stage.recipe) {
                    line("unmeasured", reason, Vec::new());
                    continue;
                }
                let sources = match self.sources(prepared, arm, &site) {
                    Ok(sources) => sources,
                    Err(error @ SourceError::NotYet(_)) => {
                        line("run", error.to_string(), Vec::new());
                        continue;
                    }
                    Err(error @ (SourceError::File { .. } | SourceError::Program(_))) => {
                        line("unmeasured", error.to_string(), Vec::new());
                        continue;
                    }
                };
                let walk = self.arm_walk(prepared, arm, &sources, workshop);
                let fields = self.fields(store, stage, arm, &walk);
                match self.reusable(store, prepared.judged, arm, &walk) {
                    Some(action) => {
                        line("reuse", reused(&action, &self.touched_files(prepared)), fields);
                        if arm == Arm::Reference {
                            made = action.read().ok();
                        }
                    }
                    None => {
                        let mut why = self.why_run(store, stage, arm, &walk);
                        if arm == Arm::Reference && workshop.takes_gpu(arm) {
                            why += "; its products on the GPU";
                        }
                        line("run", why, fields);
                    }
                }
            }
            known.insert(&stage.id, made);
        }
        lines
    }

    fn preview_command(
        &self,
        prepared: &PreparedStage<'_>,
        op: &op::Command,
        store: &Store,
    ) -> (&'static str, String, Vec<Field>) {
        match command::look(op, &self.project, self.stamps) {
            Err(error) => ("blocked", error.to_string(), Vec::new()),
            Ok(seen) => {
                let walk = self.command_walk(op, &seen);
                let fields = self.fields(store, prepared.stage, Arm::Command, &walk);
                match self.reusable(store, prepared.judged, Arm::Command, &walk) {
                    Some(action) => ("reuse", reused(&action, &seen.touched(self.stamps)), fields),
                    None => {
                        let why = self.why_run(store, prepared.stage, Arm::Command, &walk);
                        ("run", why, fields)
                    }
                }
            }
        }
    }
}

/// A result whose record and tensors have the form that this runner reads. Any other counts as
/// absent, is told in a warning and set aside.
fn readable(store: &Store, action: Action) -> Option<Action> {
    let payload: ArmPayload = match action.read() {
        Ok(payload) => payload,
        Err(error) => {
            store.set_aside(&action.key, &error.to_string());
            return None;
        }
    };
    let Some(object) = &action.object else {
        if payload.sites.is_empty() {
            return Some(action);
        }
        store.set_aside(&action.key, "it has no tensors");
        return None;
    };
    let problem = match store.tensors_of(object) {
        Err(problem) => problem,
        Ok(tensors) => {
            let held = |record: &&SiteRecord| tensors.get(&record.site.0) == Some(&record.shape);
            match payload.sites.iter().find(|record| !held(record)) {
                None => return Some(action),
                Some(record) => format!("its tensors lack `{}`", record.site),
            }
        }
    };
    // Damaged tensors are moved aside themselves, and are told so.
    if store.read_object(object).is_ok() {
        store.set_aside(&action.key, &problem);
    }
    None
}

/// Where a reused result comes from, in words, and what was only touched since.
pub fn reused(action: &Action, touched: &[String]) -> String {
    let here = crate::machine::name();
    let other = action.machine.as_deref().filter(|machine| *machine != here);
    let other = other.map_or(String::new(), |machine| format!(" on {}", shown(machine)));
    let from = format!("reused from {} ({}{other})", action.created, action.run);
    match touched {
        [] => from,
        files => format!("{from}; touched, content same: {}", files.join(", ")),
    }
}

/// The block that a site is in; the first one of a site outside of blocks.
fn layer_of(site: &Site) -> usize {
    in_layer(&site.0).map_or(0, |(layer, _)| layer as usize)
}

/// The op as the key sees it: what it reads is known by content, not by stage.
fn op_without_inputs(op: &Op) -> serde_json::Value {
    let mut json = serde_json::json!(op);
    let variant = json.as_object_mut().and_then(|op| op.values_mut().next());
    if let Some(table) = variant.and_then(|variant| variant.as_object_mut()) {
        for (name, _) in op.inputs() {
            table.remove(name);
        }
        for name in ["x", "w", "sides"] {
            table.remove(name);
        }
    }
    json
}

/// Opens `synthetic:<preset>` or `synthetic:<preset>@<scale>`, or the model at a path.
///
/// # Errors
/// In words, with the remedy.
pub fn open_model(
    source: &str,
    seed: u64,
    store: &Store,
    stamps: &Stamps,
) -> Result<OpenModel, String> {
    // `gc` waits while a model is made. A cache that cannot be written is none of its cares.
    let _in_use = source.starts_with("synthetic:").then(|| store.in_use());
    let path = match source.strip_prefix("synthetic:") {
        Some(name) => {
            ensure_by(Scaled::from_name(name)?, seed, &store.models(), &|path| stamps.digest(path))
                .map_err(|error| error.to_string())?
        }
        None => Path::new(source).to_owned(),
    };
    let model = Model::open(&path).map_err(|error| error.to_string())?;
    Ok(OpenModel { source: source.to_owned(), model, digests: Mutex::default() })
}

fn tokens_of(stage: &Stage, model: &Model) -> Result<Vec<u32>, String> {
    let decode = match stage.op {
        Op::Forward { decode, .. } => decode as usize,
        _ => 0,
    };
    let tokens = encoded(&stage.prompt, decode, model)?;
    let steps = stage.recipe.engine.map_or(0, |engine| engine.decoded);
    if steps >= tokens.len() && steps > 0 {
        return Err(format!(
            "`decoded = {steps}` leaves no token for the prompt: `tokens` has {} in all; list the \
             prompt's tokens and the decoded ones in `tokens`, or write a smaller `decoded`",
            tokens.len()
        ));
    }
    Ok(tokens)
}

/// The tokens of a prompt that goes on for `decode` positions.
///
/// # Errors
/// In words, if there are none, if the vocabulary lacks one, or if the context is too short.
pub fn encoded(prompt: &Prompt, decode: usize, model: &Model) -> Result<Vec<u32>, String> {
    let tokens = match prompt {
        Prompt::Tokens(tokens) => tokens.clone(),
        Prompt::Text(text) => model.encode(text).map_err(|error| error.to_string())?,
        Prompt::Chat { text, system } => {
            let chat = Chat::now(text, system.as_deref());
            model.encode_chat(&chat).map_err(|error| error.to_string())?
        }
    };
    if tokens.is_empty() {
        return Err("the prompt has no tokens; give a text or token ids".to_owned());
    }
    let vocabulary = model.config().vocabulary;
    if let Some(place) = tokens.iter().position(|&token| token as usize >= vocabulary) {
        return Err(format!(
            "token {} at position {place} is out of the model's vocabulary of {vocabulary} \
             tokens, 0 to {}; give smaller ids with `tokens` or `--tokens`, as `--tokens 1,2,3`",
            tokens[place],
            vocabulary.saturating_sub(1)
        ));
    }
    let positions = tokens.len().saturating_add(decode);
    let context = model.config().context_length;
    if positions > context {
        return Err(format!(
            "{positions} positions are needed (prompt and decoded tokens), but the model's \
             context length is {context}; shorten the prompt or `decode`"
        ));
    }
    Ok(tokens)
}

/// Refuses weights that the model does not have.
fn check_against_model(stage: &Stage, model: &Model) -> Result<(), String> {
    let weights: Vec<&String> = match &stage.op {
        Op::Embed { weight } | Op::RmsNorm { weight, .. } => vec![weight],
        Op::Matmul { weights, .. } => weights.iter().collect(),
        Op::Rope { site, .. } | Op::Attention { site, .. } | Op::Swiglu { site, .. } => {
            let layers = model.config().layers;
            let layer = in_layer(&site.0).map_or(0, |(layer, _)| layer as usize);
            if layer >= layers {
                return Err(format!(
                    "`{site}` is beyond the model's {layers} layers, 0 to {}",
                    layers - 1
                ));
            }
            Vec::new()
        }
        _ => Vec::new(),
    };
    for weight in weights.into_iter().filter(|weight| *weight != "output") {
        let weight = weight_of(weight, model);
        model.tensor(&format!("{weight}.weight")).map_err(|error| error.to_string())?;
    }
    check_kv_cache(stage, model)?;
    if matches!(stage.op, Op::Forward { .. } | Op::Matmul { .. }) {
        parallel::check(&stage.recipe, model)?;
    }
    check_codes(stage, model)
}

/// Refuses a cache whose scales are none, before anything runs, and one beside an op that has no
/// cache of its own.
fn check_kv_cache(stage: &Stage, model: &Model) -> Result<(), String> {
    let Some(format) = stage.recipe.kv_cache else { return Ok(()) };
    if matches!(stage.op, Op::Attention { .. }) {
        return Err(format!(
            "`kv_cache = \"{format}\"` is part of a whole pass, and this stage's `k` and `v` are \
             what attention reads: write `recipe = {{ kv_cache = \"none\" }}` in this stage, or \
             `[forward]`"
        ));
    }
    if matches!(stage.op, Op::Forward { .. }) {
        for layer in 0..model.config().layers {
            for which in [Which::Keys, Which::Values] {
                kv_cache::scale_of(model, layer, which, format)
                    .map_err(|error| error.to_string())?;
            }
        }
    }
    Ok(())
}

/// What to say of a lookup whose values the recipe rounds, and whose contract asks for their bits.
fn unfit_lookup(pipeline: &Pipeline, prepared: &PreparedStage<'_>) -> Option<String> {
    let PreparedStage { stage, model, tokens, .. } = prepared;
    let (Op::Embed { weight }, Some(stream), Some(model)) =
        (&stage.op, stage.recipe.stream, model.as_ref())
    else {
        return None;
    };
    let weight = format!("{}.weight", weight_of(weight, &model.model));
    let weight =
        model.model.tensor(&weight).ok().filter(|_| stage.arms.contains(&Arm::Emulated))?;
    let mut row = vec![0.0; weight.width()];
    tokens.iter().find_map(|&token| {
        let token = token as usize;
        weight.decode_rows(token..token + 1, &mut row).ok()?;
        let rounded = row.iter().find(|value| stream.round(**value) != **value)?;
        pipeline.unfit_lookup(stage, *rounded)
    })
}

/// Refuses weights that a recipe of the checkpoint's codes does not multiply, before anything runs.
fn check_codes(stage: &Stage, model: &Model) -> Result<(), String> {
    if stage.recipe.codes.are_made()
        || ![Arm::Emulated, Arm::Device].iter().any(|arm| stage.arms.contains(arm))
    {
        return Ok(());
    }
    let names: Vec<String> = match &stage.op {
        Op::Matmul { weights, .. } => {
            let name = |weight: &String| format!("{}.weight", weight_of(weight, model));
            weights.iter().map(name).collect()
        }
        Op::Forward { .. } => {
            let looked_up =
                |name: &&str| *name == "token_embd.weight" && model.has("output.weight");
            let all = model.names().filter(|name| name.ends_with(".weight") && !looked_up(name));
            all.map(str::to_owned).collect()
        }
        _ => Vec::new(),
    };
    for name in names {
        let weight = model.tensor(&name).map_err(|error| error.to_string())?;
        if weight.rows() > 1 {
            let of_weight = checkpoint::of_weight(&stage.recipe, &weight);
            of_weight.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_that_are_no_numbers_are_read_back_as_such() {
        let record =
            GreedyRecord { tokens: vec![3, 5, 7], margins: vec![0.5, f32::NAN, f32::INFINITY] };
        let json = serde_json::to_string(&record).expect("JSON");
        let read: GreedyRecord = serde_json::from_str(&json).expect("a record");
        assert_eq!(read.tokens, record.tokens);
        assert_eq!(read.margins[0], 0.5);
        assert!(read.margins[1..].iter().all(|margin| margin.is_nan()));
    }
}
