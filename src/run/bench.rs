//! The bench: what one job does with its stage, from its key to a result in the cache.
//!
//! It knows nothing of other jobs. What it needs of other stages is handed to it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;

use super::Options;
use super::need::{Item, need};
use crate::cache::{Action, ActionLock, CacheError, KeyWalk, NewAction, Store};
use crate::compare::{
    Cost, Diagnosis, Extent, Part, Scene, StageMeasures, Suspect, diagnose, measure_arms,
    measure_outcome, measure_stage,
};
use crate::compute::arms::{
    Output, Task, Workshop, check_weights, compute, input_width, recipe_of_pass, site_names,
    tensors_read,
};
use crate::compute::eight_bit::{self, EightBit};
use crate::compute::generate::generate;
use crate::compute::recorded::{check_written, keep_last, recorded};
use crate::compute::{ComputeError, Pass, product};
use crate::executor::command::{self, CommandError, Tools};
use crate::executor::external::{self, Asked, ExternalError};
use crate::executor::{Held, SlotError};
use crate::files::{self, Mapped, Spill};
use crate::judge::stage::Recording;
use crate::manifest::{Falsifier, IfFails};
use crate::memory::Share;
use crate::metric::Metric;
use crate::model::Model;
use crate::op::{self, Arm, Capture, Input, InputRef, Op, Site, Stream};
use crate::plan::{ArmPayload, Plan, PreparedStage, SiteRecord, SourceError, Sources, reused};
use crate::record::ArmState;
use crate::tensor::Tensor;
use crate::tensor_file::{self, CodedTensor};
use crate::text::Shown;
use crate::verdict::{self, Judgement, StageVerdict, Verdict, first_falsified, judge};

/// What a thread is to do.
pub(super) enum Order {
    Arm { arm: Arm, inputs: Supplies },
    Measure { inputs: Supplies, results: BTreeMap<Arm, Stored> },
}

impl Order {
    /// The results that it reads.
    pub fn reads(&self) -> Vec<&Action> {
        let (Order::Arm { inputs, .. } | Order::Measure { inputs, .. }) = self;
        let of_arms = match self {
            Order::Arm { .. } => None,
            Order::Measure { results, .. } => Some(results.values()),
        };
        let stored = inputs.iter().map(|(_, stored)| stored).chain(of_arms.into_iter().flatten());
        stored.map(|stored| &stored.action).collect()
    }
}

/// The sites of other stages that an op reads, in the order in which it names them.
pub(super) type Supplies = Vec<(InputRef, Stored)>;

/// An arm's result: its record in the cache, and the tensors while somebody here needs them.
#[derive(Clone)]
pub(super) struct Stored {
    pub action: Action,
    pub payload: ArmPayload,
    pub output: Option<Arc<Output>>,
}

/// How far an arm is.
#[derive(Clone, Copy, Default)]
pub(super) struct Made {
    pub sites: u64,
    /// Of the sites' tensors.
    pub bytes: u64,
}

/// What is told of a job while it is at work.
pub(super) enum News {
    /// How far an arm is.
    Made(Made),
    /// The command's program has ended, and only its files are to be put away.
    ProgramEnded,
}

/// What a job came to.
pub(super) enum Outcome {
    Arm { stored: Box<Stored>, state: ArmState, why: String },
    Measures(Box<StageMeasures>),
}

/// Why a job has no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Compute(#[from] ComputeError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("stage {} has no site `{}`; it has: {known}", input.stage, input.site)]
    NoSuchSite { input: InputRef, known: String },
    #[error("`{0}` is not a record of this version: {1}")]
    Record(String, String),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Slots(#[from] SlotError),
    #[error(transparent)]
    External(#[from] ExternalError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("`{0}` changed while it was used; run again when nobody writes it")]
    Changed(String),
    #[error("what the program wrote is unusable: {0}; correct the program, nothing of it was kept")]
    Written(String),
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    NotFinite(String),
    /// It is not at hand, and nothing is computed here.
    #[error("it is not at hand")]
    NotAtHand,
    #[error("a bug of ours: {0}")]
    Bug(String),
}

/// Everything that one job needs.
pub(super) struct Bench<'a> {
    pub plan: &'a Plan<'a>,
    pub store: &'a Store,
    pub options: &'a Options<'a>,
    pub prepared: &'a PreparedStage<'a>,
    /// Whether it may compute what is not at hand: else somebody elsewhere does.
    pub computes: bool,
    /// Whether somebody elsewhere has done it, and it is only read here.
    pub returned: bool,
}

impl Bench<'_> {
    fn task<'t>(&'t self, inputs: &'t [Tensor]) -> Result<Task<'t>, Failure> {
        let PreparedStage { stage, model, tokens, .. } = self.prepared;
        let model = model.as_ref().ok_or_else(|| Failure::Bug("a stage without a model".into()))?;
        let spill = self.spill();
        Ok(Task { op: &stage.op, model: &model.model, tokens, input: Some(inputs), spill })
    }

    /// Where tensors are put away, where memory has a bound.
    fn spill(&self) -> Option<&Spill> {
        self.options.memory.map(|bound| &bound.spill)
    }

    /// Puts the tensors away that somebody else made, where memory has a bound.
    fn put_away(&self, output: &mut Output) -> Result<(), ComputeError> {
        let Some(spill) = self.spill() else { return Ok(()) };
        for (_, tensor) in &mut output.sites {
            *tensor = spill.put(tensor).map_err(ComputeError::Spill)?;
        }
        Ok(())
    }

    /// Waits for the memory that a job of this stage takes, where it has a bound.
    fn take_memory(&self, of: Item) -> Result<Option<Share<'_>>, ComputeError> {
        let Some(bound) = self.options.memory else { return Ok(None) };
        let bytes = need(self.prepared, of);
        bound.budget.take(bytes).map(Some).ok_or(ComputeError::Interrupted)
    }

    /// Finds an arm's result, or computes it.
    pub fn arm(
        &self,
        arm: Arm,
        inputs: &Supplies,
        tell: &mut (dyn FnMut(News) + Send),
    ) -> Result<Outcome, Failure> {
        if let Op::Command(op) = &self.prepared.stage.op {
            return self.command(op, tell);
        }
        let Options { workshop, .. } = self.options;
        for (input, stored) in inputs {
            site_hash(input, stored)?;
        }
        let stage = self.prepared.stage;
        let sources = self.sources(arm, inputs)?;
        let walk = self.plan.arm_walk(self.prepared, arm, &sources, *workshop);
        let reuse = |action: Action| {
            let payload: ArmPayload = said_by(&action)?;
            let why = reused(&action, &self.plan.touched_files(self.prepared));
            let stored = Box::new(Stored { action, payload, output: None });
            Ok(Outcome::Arm { stored, state: ArmState::Reused, why })
        };
        if let Some(action) = self.reusable(arm, &walk) {
            return reuse(action);
        }
        if !self.computes {
            return Err(Failure::NotAtHand);
        }
        let why = self.plan.why_run(self.store, self.prepared.stage, arm, &walk);
        let _lock = self.store.lock(&walk.key())?.ok_or(ComputeError::Interrupted)?;
        // Another runner may just have computed it.
        if let Some(action) = self.reusable(arm, &walk) {
            return reuse(action);
        }
        let slots = self.take_slots(arm)?;
        let _memory = self.take_memory(Item::Arm(arm))?;
        // Now rather than after all the work, if that waited long.
        self.check_unchanged(arm, inputs, walk.fields(), &sources)?;
        let started = Instant::now();
        let output = match self.output_at_hand(arm, inputs, &slots)? {
            Some(output) => output,
            None => {
                let inputs = self.input_tensors(inputs)?;
                let task = self.task(&inputs)?;
                let (ops, arithmetic) = match (arm, stage.emulates()) {
                    (Arm::Emulated, Some(op::Engine::LlamaCpp)) => {
                        let ops: Box<dyn Pass> = Box::new(EightBit);
                        (ops, eight_bit::IN_WORDS.to_owned())
                    }
                    (Arm::Emulated, _) => workshop.ops(
                        arm,
                        &recipe_of_pass(&task, &stage.recipe, stage.recorded.as_ref())?,
                    )?,
                    _ => workshop.ops(arm, &stage.recipe)?,
                };
                let mut made = Made::default();
                let output = compute(&task, ops.as_ref(), arithmetic, &mut |tensor| {
                    made.sites += 1;
                    made.bytes += size_of_val(tensor.data()) as u64;
                    tell(News::Made(made));
                })?;
                check_weights(&task, &output)?;
                output
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        self.check_unchanged(arm, inputs, walk.fields(), &sources)?;
        let earlier = self.store.record(&walk.key());
        let stored = self.keep(&walk, output, seconds)?;
        self.plan.note_measured(&stored.action);
        let mut why = why;
        if earlier.is_some_and(|earlier| earlier.object != stored.action.object) {
            why += "; the same key gave another result before: the arm is not deterministic";
        }
        Ok(Outcome::Arm { stored: Box::new(stored), state: ArmState::Ran, why })
    }

    /// The fields of an arm's key with what `workshop` says of them.
    pub fn known_fields(
        &self,
        arm: Arm,
        inputs: &Supplies,
        workshop: &dyn Workshop,
    ) -> Result<KeyWalk, Failure> {
        if let Op::Command(op) = &self.prepared.stage.op {
            let tools = self.tools();
            let seen = command::look(op, tools.project, tools.stamps)?;
            return Ok(self.plan.command_walk(op, &seen));
        }
        let sources = self.sources(arm, inputs)?;
        Ok(self.plan.arm_walk(self.prepared, arm, &sources, workshop))
    }

    /// What the measures of these results are known by.
    pub fn measures_key(&self, results: &BTreeMap<Arm, Stored>) -> KeyWalk {
        let mut walk = self.measure_walk(results, self.extent());
        // The contract decides how much of it is looked at.
        let contract = self.plan.pipeline.contracts.get(&self.prepared.stage.contract);
        walk.field("contract", serde_json::json!(contract));
        walk
    }

    fn sources(&self, arm: Arm, inputs: &Supplies) -> Result<Sources, SourceError> {
        let site = |input: &InputRef| {
            let (_, stored) = inputs.iter().find(|(supplied, _)| supplied == input)?;
            site_hash(input, stored).ok()
        };
        self.plan.sources(self.prepared, arm, &site)
    }

    /// Refuses what an arm, or a measure of it, is made of if that is not what the fields
    /// of its key say, or was written since `sources` were looked at: files are read later
    /// than that.
    fn check_unchanged(
        &self,
        arm: Arm,
        inputs: &Supplies,
        fields: &[(String, String)],
        sources: &Sources,
    ) -> Result<(), Failure> {
        // A program opens the model's files itself.
        let by_name = arm == Arm::External;
        let written = self.prepared.model.as_ref().and_then(|model| model.written(by_name));
        let written = written.or_else(|| sources.written().map(|path| path.shown().to_string()));
        if let Some(file) = written {
            return Err(Failure::Changed(file));
        }
        let now = match self.sources(arm, inputs) {
            // It was there before.
            Err(SourceError::File { path, .. }) => {
                return Err(Failure::Changed(path.shown().to_string()));
            }
            now => now?.fields,
        };
        match now.into_iter().find(|source| !fields.contains(source)) {
            Some((name, _)) => Err(Failure::Changed(name)),
            None => Ok(()),
        }
    }

    /// What the results that were computed from the model and the op's inputs were made of:
    /// their keys' fields, and the files as they are now. Of what others made, measuring reads
    /// neither.
    fn keyed(
        &self,
        inputs: &Supplies,
        results: &BTreeMap<Arm, Stored>,
    ) -> Result<Vec<Keyed>, Failure> {
        let reads_model = self.prepared.stage.op.reads_model();
        let own = |arm: Arm| reads_model && !matches!(arm, Arm::External | Arm::Recorded);
        let results = results.iter().filter(|(arm, _)| own(**arm));
        results
            .map(|(&arm, stored)| {
                let sources = self.sources(arm, inputs)?;
                Ok(Keyed { arm, fields: stored.action.fields.clone(), sources })
            })
            .collect()
    }

    /// Refuses what was read of the model and the inputs beside results if that changed.
    fn check_all_unchanged(&self, inputs: &Supplies, keyed: &[Keyed]) -> Result<(), Failure> {
        let mut keyed = keyed.iter();
        keyed.try_for_each(|Keyed { arm, fields, sources }| {
            self.check_unchanged(*arm, inputs, fields, sources)
        })
    }

    /// What an arm makes without a model: tensors that are read, and products of
    /// coded operands. `None` where the arm has to compute the op.
    fn output_at_hand(
        &self,
        arm: Arm,
        inputs: &Supplies,
        slots: &Held,
    ) -> Result<Option<Output>, Failure> {
        let stage = self.prepared.stage;
        let one = |site: &Site, tensor: Tensor, arithmetic: String| {
            let sites = vec![(site.clone(), tensor)];
            Ok(Some(Output { sites, arithmetic, ..Output::default() }))
        };
        let model = self.prepared.model.as_ref().map(|open| &open.model);
        match (&stage.op, arm, &stage.recorded) {
            (Op::Compare { site, sides }, arm, _) => {
                let side = sides.get(&arm);
                let side = side.ok_or_else(|| Failure::Bug(format!("no side for {arm}")))?;
                one(site, self.input_tensor_of(side, 0, inputs)?, "as it was read".to_owned())
            }
            (op, Arm::Recorded, Some(from)) => {
                let mut output = recorded(op, from, model, Some(&self.prepared.tokens))?;
                self.put_away(&mut output)?;
                Ok(Some(output))
            }
            (_, Arm::External, _) => self.asked(inputs, slots).map(Some),
            (Op::Gemm { x, w }, arm, from) => {
                let site = Site("y".to_owned());
                let read = |tensor| tensor_file::read(tensor).map_err(ComputeError::from);
                let (x, w) = (read(x)?, read(w)?);
                // What was assumed of scales' shapes.
                let remark = |(name, operand): (&str, &CodedTensor)| {
                    let remark = operand.scales.as_ref().and_then(|scales| scales.remark.clone());
                    remark.map_or(String::new(), |remark| format!("; {name}: {remark}"))
                };
                let remarks: String = [("x", &x), ("w", &w)].into_iter().map(remark).collect();
                if arm == Arm::Reference {
                    let arithmetic = format!("f64 over the operands' codes{remarks}");
                    return one(&site, product::reference(&x, &w)?, arithmetic);
                }
                let observed =
                    from.as_ref().map(|from| crate::compute::recorded::product(from, &site));
                let observed = observed.transpose()?;
                let recipe = &stage.recipe;
                let made = product::emulated(&x, &w, observed.as_ref(), recipe)?;
                let words = match observed.as_ref().filter(|_| !made.exact) {
                    None => made.words,
                    // Not a known schedule's bits: what are they then?
                    Some(observed) => {
                        let recording = Recording { x: &x, w: &w, observed, recipe };
                        format!("{}; {}", recording.judgement()?.sentence, made.words)
                    }
                };
                one(&site, made.y, words + &remarks)
            }
            _ => Ok(None),
        }
    }

    /// What the stage's program writes when it is asked.
    fn asked(&self, inputs: &Supplies, slots: &Held) -> Result<Output, Failure> {
        let PreparedStage { stage, model, tokens, .. } = self.prepared;
        let bug = || Failure::Bug("an external arm without its program or model".into());
        let external = stage.external.as_ref().ok_or_else(bug)?;
        let model = &model.as_ref().ok_or_else(bug)?.model;
        let config = model.config();
        let tools = self.tools();
        let seen = command::look(&external.program, tools.project, tools.stamps)?;
        let sites = site_names(&stage.op, Some(model));
        let read = self.input_tensors(inputs)?;
        let rows = read.first().map_or(tokens.len(), Tensor::rows);
        let handed = self.handed_over(&read, model)?;
        let request = serde_json::json!({
            "schema": 1,
            "stage": stage.id,
            "op": stage.op,
            "model": std::path::absolute(model.path()).unwrap_or_default(),
            "tokens": tokens,
            "inputs": handed.as_ref().map(|_| op::External::INPUTS),
            "sites": sites,
            "parameters": config.parameters(),
            "recipe": stage.recipe,
            "output": op::External::TENSORS,
        });
        // Twice what f32 needs, and room for names and logs.
        let widest = config.vocabulary.max(8 * config.hidden);
        let logits = sites.iter().any(|site| site.0 == "logits");
        let widths = sites.len() * 8 * config.hidden + usize::from(logits) * widest;
        let asked = Asked {
            request: &request,
            inputs: handed.as_deref(),
            gpus: &slots.gpus,
            largest: (64 << 20) + 8 * (rows * widths) as u64,
        };
        let left = external::ask(external, &seen, &asked, &tools)?;
        if let Some(changed) = seen.changed(&tools) {
            return Err(Failure::Changed(changed));
        }
        let from = op::Recorded {
            file: left.tensors.clone(),
            names: external.names.clone(),
            format: None,
            shape: None,
        };
        let unusable = |error: ComputeError| Failure::Written(error.to_string());
        let mut output = recorded(&stage.op, &from, Some(model), None).map_err(unusable)?;
        check_written(&stage.op, &output, rows, config.vocabulary).map_err(unusable)?;
        keep_last(&stage.op, &mut output);
        self.put_away(&mut output)?;
        output.arithmetic = match left.flaky {
            Some(flaky) => format!("{}; {flaky}", external.version),
            None => external.version.clone(),
        };
        Ok(output)
    }

    /// Everything that a single op reads, as a file of f32 tensors: its inputs by their
    /// keys and the model's weights by their names. A forward pass reads the model.
    fn handed_over(&self, read: &[Tensor], model: &Model) -> Result<Option<Vec<u8>>, Failure> {
        let op = &self.prepared.stage.op;
        if matches!(op, Op::Forward { .. }) {
            return Ok(None);
        }
        let keys = op.inputs().into_iter().map(|(key, _)| key.to_owned());
        let mut tensors: Vec<(String, Tensor)> = keys.zip(read.iter().cloned()).collect();
        for name in tensors_read(op, model) {
            let weight = model.tensor(&name).map_err(ComputeError::from)?;
            let values = weight.to_vec().map_err(ComputeError::from)?;
            tensors.push((name, Tensor::new(weight.width(), values)));
        }
        encoded(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))).map(Some)
    }

    fn tools(&self) -> Tools<'_> {
        Tools {
            processes: self.options.processes,
            attempts: self.options.attempts,
            store: self.store,
            stamps: self.plan.stamps,
            project: &self.plan.project,
        }
    }

    /// Waits for the resources that an arm of this stage needs. One on the CPU needs
    /// no GPU.
    fn take_slots(&self, arm: Arm) -> Result<Held, SlotError> {
        let mut asked = self.prepared.stage.resources.clone();
        if !self.options.workshop.takes_gpu(arm) {
            (asked.gpus, asked.gpu_memory) = (0, 0);
        }
        self.options.slots.take(&asked)
    }

    fn reusable(&self, arm: Arm, walk: &KeyWalk) -> Option<Action> {
        self.plan.reusable(self.store, self.prepared.judged, arm, walk)
    }

    /// A command's earlier result with its outputs in their places, if it is whole. Who
    /// does not hold the action's lock leaves the places alone: another runner may be
    /// putting the outputs there.
    fn reuse_command(
        &self,
        lock: Option<&ActionLock>,
        walk: &KeyWalk,
        seen: &command::Seen,
        tools: &Tools<'_>,
    ) -> Result<Option<Outcome>, Failure> {
        let Some(action) = self.reusable(Arm::Command, walk) else { return Ok(None) };
        let payload: ArmPayload = said_by(&action)?;
        let Some(record) = &payload.command else { return Ok(None) };
        if lock.is_none() && !command::is_in_place(record, tools.project, tools.stamps) {
            return Ok(None);
        }
        let Some(restored) = command::restore(record, tools)? else { return Ok(None) };
        let mut why = reused(&action, &seen.touched(self.plan.stamps));
        if !restored.is_empty() {
            why += &format!("; put back: {}", restored.join(", "));
        }
        let stored = Box::new(Stored { action, payload, output: None });
        Ok(Some(Outcome::Arm { stored, state: ArmState::Reused, why }))
    }

    /// Runs a command, or finds what it did and puts its outputs in their places.
    fn command(
        &self,
        op: &op::Command,
        tell: &mut (dyn FnMut(News) + Send),
    ) -> Result<Outcome, Failure> {
        // What changed although nothing was waited for is written all the time, and would
        // never let it start.
        const LOOKS: usize = 3;
        const NO_WAIT: Duration = Duration::from_secs(1);
        let mut without_wait = 0;
        loop {
            let (changed, waited) = match self.command_as_seen(op, tell)? {
                Ok(outcome) => return Ok(outcome),
                Err(changed) => changed,
            };
            without_wait += usize::from(waited < NO_WAIT);
            if without_wait == LOOKS {
                return Err(CommandError::Changed(changed).into());
            }
        }
    }

    /// The same, or what of that which it would see changed while it waited for its turn,
    /// and for how long it did.
    fn command_as_seen(
        &self,
        op: &op::Command,
        tell: &mut (dyn FnMut(News) + Send),
    ) -> Result<Result<Outcome, (String, Duration)>, Failure> {
        let tools = self.tools();
        let seen = command::look(op, tools.project, tools.stamps)?;
        let walk = self.plan.command_walk(op, &seen);
        if let Some(outcome) = self.reuse_command(None, &walk, &seen, &tools)? {
            return Ok(Ok(outcome));
        }
        // What is at hand may still have to be put in its place.
        if !self.computes && self.reusable(Arm::Command, &walk).is_none() {
            return Err(Failure::NotAtHand);
        }
        let why = self.plan.why_run(self.store, self.prepared.stage, Arm::Command, &walk);
        let mut waits = Instant::now();
        let lock = self.store.lock(&walk.key())?.ok_or(CommandError::Stopped)?;
        let mut waited = waits.elapsed();
        // Another runner may just have run it.
        if let Some(outcome) = self.reuse_command(Some(&lock), &walk, &seen, &tools)? {
            return Ok(Ok(outcome));
        }
        if !self.computes {
            return Err(Failure::NotAtHand);
        }
        // Held until its outputs are in their places: all of this is its work.
        waits = Instant::now();
        let slots = self.take_slots(Arm::Command)?;
        waited += waits.elapsed();
        if let Some(changed) = seen.changed(&tools) {
            return Ok(Err((changed, waited)));
        }
        let mut ended = || tell(News::ProgramEnded);
        let (record, seconds) = command::carry_out(op, &seen, &slots.gpus, &tools, &mut ended)?;
        let kept = record.accepted;
        let payload = ArmPayload {
            sites: Vec::new(),
            greedy: None,
            repeats: BTreeMap::new(),
            arithmetic: String::new(),
            gemms: Vec::new(),
            seconds,
            command: Some(record),
        };
        let json = to_raw_value(&payload)
            .map_err(|error| Failure::Bug(format!("a record cannot be encoded: {error}")))?;
        let Options { run, created, .. } = self.options;
        let new = NewAction { walk: &walk, run, created, object: None, payload: json, seconds };
        let action = match kept {
            true => self.store.save(new)?,
            false => Action::unsaved(&walk, run, created, new.payload),
        };
        if kept {
            self.plan.note_measured(&action);
        }
        // Kept first: where a place cannot be written now, the next run only puts them there.
        if let Some(record) = &payload.command {
            command::put_in_place(record, &tools)?;
        }
        let stored = Box::new(Stored { action, payload, output: None });
        Ok(Ok(Outcome::Arm { stored, state: ArmState::Ran, why }))
    }

    fn keep(&self, walk: &KeyWalk, output: Output, seconds: f64) -> Result<Stored, Failure> {
        let records = output.sites.iter().map(|(site, tensor)| SiteRecord {
            site: site.clone(),
            shape: [tensor.rows(), tensor.width()],
            blake3: blake3::hash(&tensor.to_le_bytes()).to_hex().to_string(),
        });
        let payload = ArmPayload {
            sites: records.collect(),
            greedy: output.greedy.clone().map(Into::into),
            repeats: output.repeats.clone(),
            arithmetic: output.arithmetic.clone(),
            gemms: output.gemms.clone(),
            seconds,
            command: None,
        };
        let sites = output.sites.iter().map(|(site, tensor)| (site.0.as_str(), tensor));
        let encoded = self.encoded(sites)?;
        let json = to_raw_value(&payload)
            .map_err(|error| Failure::Bug(format!("a record cannot be encoded: {error}")))?;
        let Options { run, created, .. } = self.options;
        let object = Some(&*encoded);
        let action =
            self.store.save(NewAction { walk, run, created, object, payload: json, seconds })?;
        Ok(Stored { action, payload, output: Some(Arc::new(output)) })
    }

    /// The same as [`encoded`]; where memory has a bound, in a file.
    fn encoded<'t>(
        &self,
        tensors: impl Iterator<Item = (&'t str, &'t Tensor)>,
    ) -> Result<Encoded, Failure> {
        if self.options.memory.is_none() {
            return encoded(tensors).map(Encoded::Bytes);
        }
        let failed = |error| Failure::Compute(ComputeError::Spill(error));
        let file = tempfile::NamedTempFile::new_in(self.store.root()).map_err(failed)?;
        let views = tensors.map(|(name, tensor)| (name, AsBytes::of(tensor)));
        match safetensors::serialize_to_file(views, None, file.path()) {
            Err(safetensors::SafeTensorError::IoError(error)) => return Err(failed(error)),
            written => written.map_err(cannot_encode)?,
        }
        let map = || Ok(Mapped::of(&files::open(file.path())?, file.path())?.0);
        map().map(Encoded::File).map_err(failed)
    }

    /// Measures a command's outcome; nothing of it is worth keeping.
    fn measure_command(
        &self,
        op: &op::Command,
        results: &BTreeMap<Arm, Stored>,
    ) -> Result<Outcome, Failure> {
        let record = results.get(&Arm::Command).and_then(|s| s.payload.command.as_ref());
        let record = record.ok_or_else(|| Failure::Bug("a command without a record".into()))?;
        let read = |digest: &str| self.store.read_blob(digest).map_err(|e| e.to_string());
        Ok(Outcome::Measures(Box::new(measure_outcome(op, record, &read))))
    }

    /// Measures the arms of the stage, or finds their measures.
    pub fn measure(
        &self,
        inputs: &Supplies,
        results: BTreeMap<Arm, Stored>,
    ) -> Result<Outcome, Failure> {
        if let Op::Command(op) = &self.prepared.stage.op {
            return self.measure_command(op, &results);
        }
        let extent = self.extent();
        let (mut walk, mut measures) = self.measured(inputs, &results, extent)?;
        if extent == Extent::Bits && self.judged(&measures).verdict != Verdict::Pass {
            // Something is left to explain, and for that everything may matter.
            (walk, measures) = self.measured(inputs, &results, Extent::Whole)?;
        }
        if let Some(seen) = self.diagnosis(inputs, &results, &walk, &measures)? {
            measures.diagnoses = seen.diagnoses;
            measures.costs.extend(seen.cost);
        }
        Ok(Outcome::Measures(Box::new(measures)))
    }

    /// What the stage's contract asks for, where an engine's kernels are known.
    fn extent(&self) -> Extent {
        let stage = self.prepared.stage;
        let every_site = matches!(stage.op, Op::Forward { capture: Capture::EverySite, .. });
        let bits = |falsifier: &Falsifier| {
            let [_, judge] = falsifier.compare;
            matches!(judge, Stream::Arm(Arm::Emulated) | Stream::Predicted(_))
        };
        let contract = &self.plan.pipeline.contracts[&stage.contract];
        let known = stage.recipe.engine.is_some() && every_site;
        if known && contract.falsifiers.iter().all(bits) { Extent::Bits } else { Extent::Whole }
    }

    /// The measures by the stage's contract.
    fn judged(&self, measures: &StageMeasures) -> StageVerdict {
        let stage = self.prepared.stage;
        let contract = self.plan.pipeline.contracts[&stage.contract].read_by(&stage.arms);
        judge(&contract, &measures.measures, &stage.arms, &BTreeMap::new())
    }

    fn measure_walk(&self, results: &BTreeMap<Arm, Stored>, extent: Extent) -> KeyWalk {
        let keys = results.iter().map(|(arm, stored)| (*arm, stored.action.key.0.clone()));
        self.plan.measure_walk(self.prepared, &keys.collect(), extent)
    }

    /// The measures and what they are kept by: those at hand, else made anew.
    fn measured(
        &self,
        inputs: &Supplies,
        results: &BTreeMap<Arm, Stored>,
        extent: Extent,
    ) -> Result<(KeyWalk, StageMeasures), Failure> {
        let walk = self.measure_walk(results, extent);
        let measures = match self.said(&walk) {
            Some(measures) => measures,
            None if !self.computes => return Err(Failure::NotAtHand),
            None => self.measure_anew(inputs, results, &walk, extent)?,
        };
        Ok((walk, measures))
    }

    /// What was said of this key before. A record that says something else than it should is none.
    fn said<T: DeserializeOwned>(&self, walk: &KeyWalk) -> Option<T> {
        let action = self.store.find(&walk.key())?;
        if self.returned {
            self.store.share(&action.key);
        }
        let said = action.read();
        said.map_err(|error| self.store.set_aside(&action.key, &error.to_string())).ok()
    }

    /// Looks at the first site that the stage's contract falsifies, or finds what was seen
    /// there before. A stage that passes has nothing to look at, nor has one that is beyond a
    /// budget only, unless that is of bits: the first that differs has a place and a cause.
    fn diagnosis(
        &self,
        inputs: &Supplies,
        results: &BTreeMap<Arm, Stored>,
        measured: &KeyWalk,
        measures: &StageMeasures,
    ) -> Result<Option<Seen>, Failure> {
        let stage = self.prepared.stage;
        let whole_pass_only =
            matches!(stage.op, Op::Forward { capture, .. } if capture.is_of_logits());
        let judgements = self.judged(measures).judgements;
        let Some(first) = first_falsified(&judgements, &measures.measures) else {
            return Ok(None);
        };
        // Of a whole pass an arm against itself says what it is, of the same site.
        let own = |j: &&Judgement| {
            let fell = j.outcome == verdict::Outcome::Falsified && j.site == first.site;
            fell && j.compare[0] == j.compare[1]
        };
        let apart = first.compare[0] != first.compare[1];
        let of_itself = judgements.iter().find(own).filter(|_| whole_pass_only && apart);
        let first = of_itself.unwrap_or(first);
        let of_bits = first.metric == Metric::BitMismatches
            && matches!(first.compare[1], Stream::Arm(Arm::Emulated) | Stream::Predicted(_));
        let looked_at = of_bits || first.if_fails == IfFails::Structural;
        let Some(site) = first.site.clone().filter(|_| looked_at) else {
            return Ok(None);
        };
        let [subject, judge] = first.compare;
        // Of a whole pass nothing is known but its logits: only an arm against itself says more.
        let of_product = subject == Stream::Arm(Arm::Recorded);
        let product = self.recording()?.filter(|_| of_product);
        let known = stage.op.reads_model() || product.is_some();
        if !known || (whole_pass_only && subject != judge) {
            return Ok(None);
        }
        let evidence = verdict::in_words(first, &measures.measures);
        let falsified = verdict::falsified_locally(&judgements, &measures.measures, subject.arm());
        let suspect = Suspect { subject, judge, site, evidence, falsified };
        let mut walk = KeyWalk::new("diagnosis");
        walk.field("measures", &measured.key().0);
        walk.field("suspect", serde_json::json!(suspect));
        if let Some(seen) = self.said(&walk) {
            return Ok(Some(seen));
        }
        if !self.computes {
            return Err(Failure::NotAtHand);
        }
        let started = Instant::now();
        let diagnoses = match self.look_closely(inputs, results, measures, &suspect, product) {
            Ok(diagnosis) => vec![diagnosis],
            Err(Failure::Compute(error)) if !matches!(error, ComputeError::Interrupted) => {
                let diagnoses = vec![Diagnosis::unseen(&suspect, &error.to_string())];
                return Ok(Some(Seen { diagnoses, cost: None }));
            }
            Err(failure) => return Err(failure),
        };
        let seconds = started.elapsed().as_secs_f64();
        let cost = Some(Cost { part: Part::Diagnosis, subject: Some(subject), seconds });
        let seen = Seen { diagnoses, cost };
        let json = to_raw_value(&seen)
            .map_err(|error| Failure::Bug(format!("a diagnosis cannot be encoded: {error}")))?;
        let Options { run, created, .. } = self.options;
        let (walk, object) = (&walk, None);
        self.store.save(NewAction { walk, run, created, object, payload: json, seconds })?;
        Ok(Some(seen))
    }

    fn look_closely(
        &self,
        inputs: &Supplies,
        results: &BTreeMap<Arm, Stored>,
        measures: &StageMeasures,
        suspect: &Suspect,
        product: Option<[CodedTensor; 3]>,
    ) -> Result<Diagnosis, Failure> {
        let recipe = &self.prepared.stage.recipe;
        let _memory = self.take_memory(Item::Measures)?;
        if let Some([x, w, observed]) = &product {
            return Ok(Recording { x, w, observed, recipe }.diagnosis(suspect)?);
        }
        let keyed = self.keyed(inputs, results)?;
        let outputs = self.outputs_of(results)?;
        let read = self.input_tensors(inputs)?;
        let task = self.task(&read)?;
        let from = self.prepared.stage.recorded.as_ref();
        let led = match suspect.judge {
            Stream::Arm(Arm::Emulated) => recipe_of_pass(&task, recipe, from)?,
            _ => *recipe,
        };
        let recipe = &led;
        let scene = Scene { task: &task, recipe, outputs: &outputs, measures };
        let diagnosis = diagnose(&scene, suspect)?;
        self.check_all_unchanged(inputs, &keyed)?;
        Ok(diagnosis)
    }

    /// The operands of a product of codes and what was recorded of it, where the stage is
    /// one and its recording has the product's shape.
    fn recording(&self) -> Result<Option<[CodedTensor; 3]>, Failure> {
        let stage = self.prepared.stage;
        let (Op::Gemm { x, w }, Some(from)) = (&stage.op, &stage.recorded) else {
            return Ok(None);
        };
        let read = |tensor| tensor_file::read(tensor).map_err(ComputeError::from);
        let (x, w) = (read(x)?, read(w)?);
        let observed = crate::compute::recorded::product(from, &Site("y".to_owned()))?;
        let fits = x.width == w.width && (observed.rows, observed.width) == (x.rows, w.rows);
        Ok(fits.then_some([x, w, observed]))
    }

    fn measure_anew(
        &self,
        inputs: &Supplies,
        results: &BTreeMap<Arm, Stored>,
        walk: &KeyWalk,
        extent: Extent,
    ) -> Result<StageMeasures, Failure> {
        let _memory = self.take_memory(Item::Measures)?;
        let started = Instant::now();
        let stage = self.prepared.stage;
        let keyed = self.keyed(inputs, results)?;
        let outputs = self.outputs_of(results)?;
        let measures = if stage.op.reads_model() {
            let read = self.input_tensors(inputs)?;
            let engine = stage.emulates().is_some();
            let task = self.task(&read)?;
            let measures = measure_stage(&task, &stage.recipe, engine, &outputs, extent)?;
            self.check_all_unchanged(inputs, &keyed)?;
            measures
        } else {
            let floors = match self.recording()? {
                Some([x, w, observed]) if outputs.contains_key(&Arm::Recorded) => {
                    let (x, w, observed) = (&x, &w, &observed);
                    let recording = Recording { x, w, observed, recipe: &stage.recipe };
                    vec![(Site("y".to_owned()), recording.floor()?)]
                }
                _ => Vec::new(),
            };
            measure_arms(&outputs, &floors)
        };
        let json = to_raw_value(&measures)
            .map_err(|error| Failure::Bug(format!("measures cannot be encoded: {error}")))?;
        let Options { run, created, .. } = self.options;
        let seconds = started.elapsed().as_secs_f64();
        let object = None;
        self.store.save(NewAction { walk, run, created, object, payload: json, seconds })?;
        Ok(measures)
    }
}

/// A file of tensors, in memory or not.
enum Encoded {
    Bytes(Vec<u8>),
    File(Mapped),
}

impl std::ops::Deref for Encoded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Encoded::Bytes(bytes) => bytes,
            Encoded::File(map) => map,
        }
    }
}

/// What was seen at the first site that the contract falsifies, and what looking took.
#[derive(Serialize, Deserialize)]
struct Seen {
    diagnoses: Vec<Diagnosis>,
    cost: Option<Cost>,
}

/// What a result at hand was made of.
struct Keyed {
    arm: Arm,
    fields: Vec<(String, String)>,
    sources: Sources,
}

impl Bench<'_> {
    /// The tensors of a result: those at hand, else the cache's.
    fn output_of(&self, stored: &Stored) -> Result<Output, Failure> {
        if let Some(output) = &stored.output {
            return Ok(Output::clone(output));
        }
        let payload = &stored.payload;
        let sites = payload.sites.iter().map(|record| record.site.clone());
        Ok(Output {
            sites: self.tensors(stored, sites.collect())?,
            greedy: payload.greedy.clone().map(Into::into),
            repeats: payload.repeats.clone(),
            arithmetic: payload.arithmetic.clone(),
            gemms: payload.gemms.clone(),
        })
    }

    fn outputs_of(
        &self,
        results: &BTreeMap<Arm, Stored>,
    ) -> Result<BTreeMap<Arm, Output>, Failure> {
        results.iter().map(|(&arm, stored)| Ok((arm, self.output_of(stored)?))).collect()
    }

    /// The tensors that the op reads, in its order.
    fn input_tensors(&self, supplies: &Supplies) -> Result<Vec<Tensor>, Failure> {
        let inputs = self.prepared.stage.op.inputs().into_iter().enumerate();
        inputs.map(|(place, (_, input))| self.input_tensor_of(input, place, supplies)).collect()
    }

    fn input_tensor_of(
        &self,
        input: &Input,
        place: usize,
        supplies: &Supplies,
    ) -> Result<Tensor, Failure> {
        match input {
            Input::Site(wanted) => {
                let supplied = supplies.iter().find(|(supplied, _)| supplied == wanted);
                let (wanted, stored) =
                    supplied.ok_or_else(|| SourceError::NotYet(wanted.clone()))?;
                self.input_tensor(wanted, stored)
            }
            Input::File(tensor) => {
                Ok(tensor_file::read(tensor).map_err(ComputeError::from)?.values())
            }
            Input::Generated(made) => {
                let model = self.prepared.model.as_ref();
                let model = model.ok_or_else(|| Failure::Bug("no model gives a width".into()))?;
                let width = input_width(&self.prepared.stage.op, place, &model.model)?;
                // The values and, beside them, their exact form and what is made of them.
                let bytes = (made.rows as u64).saturating_mul(width as u64).saturating_mul(16);
                crate::memory::ask(bytes).map_err(|problem| {
                    Failure::Refused(format!(
                        "an input of `rows = {}` and width {width}: {problem}",
                        made.rows
                    ))
                })?;
                Ok(generate(made, place, width))
            }
        }
    }

    fn input_tensor(&self, input: &InputRef, stored: &Stored) -> Result<Tensor, Failure> {
        site_hash(input, stored)?;
        if let Some(tensor) = stored.output.as_ref().and_then(|output| output.site(&input.site)) {
            return Ok(tensor.clone());
        }
        let mut tensors = self.tensors(stored, vec![input.site.clone()])?;
        let tensor = tensors.pop().map(|(_, tensor)| tensor);
        tensor.ok_or_else(|| no_such_site(input, stored))
    }

    /// Some sites of a stored result, verified.
    fn tensors(&self, stored: &Stored, sites: Vec<Site>) -> Result<Vec<(Site, Tensor)>, Failure> {
        let key = &stored.action.key.0;
        let wrong =
            |problem: &dyn std::fmt::Display| Failure::Record(key.clone(), problem.to_string());
        let object = stored.action.object.as_ref().ok_or_else(|| wrong(&"it has no tensors"))?;
        let bytes = match self.spill() {
            None => {
                Arc::new(Mapped::copy(&self.store.read_object(object)?).map_err(|e| wrong(&e))?)
            }
            Some(_) => Arc::new(self.store.map_object(object)?),
        };
        let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(&error))?;
        let start = bytes.as_ptr() as usize;
        let read = |site: Site| {
            let view = file.tensor(&site.0).map_err(|error| wrong(&error))?;
            let width = view.shape().last().copied().unwrap_or(0);
            if view.dtype() != Dtype::F32 || width == 0 {
                return Err(wrong(&format!("`{site}` is not a matrix of f32")));
            }
            let from = view.data().as_ptr() as usize - start;
            Ok((site, files::tensor_within(&bytes, from, from + view.data().len(), width)))
        };
        sites.into_iter().map(read).collect()
    }
}

/// The hash of the tensor that an input names.
fn site_hash(input: &InputRef, stored: &Stored) -> Result<String, Failure> {
    let record = stored.payload.sites.iter().find(|record| record.site == input.site);
    record.map(|record| record.blake3.clone()).ok_or_else(|| no_such_site(input, stored))
}

fn no_such_site(input: &InputRef, stored: &Stored) -> Failure {
    let known: Vec<&str> = stored.payload.sites.iter().map(|r| r.site.0.as_str()).collect();
    const SHOWN: usize = 20;
    let more = if known.len() > SHOWN { ", ..." } else { "" };
    let known = known[..known.len().min(SHOWN)].join(", ") + more;
    Failure::NoSuchSite { input: input.clone(), known }
}

/// What an action says besides tensors.
fn said_by<T: DeserializeOwned>(action: &Action) -> Result<T, Failure> {
    action.read().map_err(|error| Failure::Record(action.key.0.clone(), error.to_string()))
}

/// A tensor as safetensors holds it; its bytes are made when they are asked for.
struct AsBytes<'t> {
    tensor: &'t Tensor,
    shape: [usize; 2],
}

impl<'t> AsBytes<'t> {
    fn of(tensor: &'t Tensor) -> AsBytes<'t> {
        AsBytes { tensor, shape: [tensor.rows(), tensor.width()] }
    }
}

impl View for AsBytes<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.tensor.to_le_bytes())
    }

    fn data_len(&self) -> usize {
        size_of_val(self.tensor.data())
    }
}

/// A safetensors file of f32 tensors with their little-endian bytes.
fn encoded<'t>(tensors: impl Iterator<Item = (&'t str, &'t Tensor)>) -> Result<Vec<u8>, Failure> {
    let views = tensors.map(|(name, tensor)| (name, AsBytes::of(tensor)));
    safetensors::serialize(views, None).map_err(cannot_encode)
}

fn cannot_encode(error: safetensors::SafeTensorError) -> Failure {
    Failure::Bug(format!("tensors cannot be encoded: {error}"))
}
