//! The heart: a plan becomes verdicts.
//!
//! Every (stage, arm) and every stage's measuring is a job with a `State`.
//! `Engine::settle` makes every transition; `Engine::run` is the loop. Jobs
//! run beside each other where nothing holds them back. It draws nothing: it
//! emits events.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::cache::{Action, CacheError, KeyWalk, NewAction, Store};
use crate::compare::{StageMeasures, fit, measure_arms, measure_outcome, measure_stage};
use crate::compute::arms::{
    Output, Task, Workshop, compute, input_width, site_names, tensors_read,
};
use crate::compute::eight_bit::{self, EightBit};
use crate::compute::generate::generate;
use crate::compute::recorded::{check_written, recorded};
use crate::compute::{ComputeError, Ops, product};
use crate::event::{Event, Sink};
use crate::executor::command::{self, CommandError, CommandRecord, Tools};
use crate::executor::external::{self, Asked, ExternalError};
use crate::executor::{Attempts, Held, Processes, SlotError, Slots};
use crate::interrupt;
use crate::model::Model;
use crate::op::{self, Arm, Input, InputRef, LAYER_SITES, Op, Site, StageId};
use crate::plan::{ArmPayload, Plan, PreparedStage, SiteRecord, SourceError, reused};
use crate::record::{ArmRecord, ArmState, StageRecord};
use crate::tensor::Tensor;
use crate::tensor_file;
use crate::verdict::{Verdict, judge, reason};

/// How a run is to be done.
pub struct Options<'a> {
    /// The run's name, noted with every result.
    pub run: String,
    /// The time of its start, noted with every result.
    pub created: String,
    /// Jobs that run beside each other.
    pub jobs: usize,
    /// Arms without which a stage is no success.
    pub require: BTreeSet<Arm>,
    /// Who makes the arms.
    pub workshop: &'a dyn Workshop,
    /// Whether nothing is started after the first stage that did not pass.
    pub fail_fast: bool,
    /// What jobs of this machine share.
    pub slots: &'a Slots,
    /// Where programs start.
    pub processes: &'a Processes,
    /// Where attempts have their folders.
    pub attempts: &'a Attempts,
}

/// What a run came to.
#[derive(Debug)]
pub struct Finished {
    /// The judged stages, in order.
    pub stages: Vec<StageRecord>,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// What a panic of ours said.
    pub bug: Option<String>,
}

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    /// Computes an arm, or finds its result.
    Arm(Arm),
    /// Measures the stage's arms.
    Measure,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// So many jobs must be done first; never 0.
    Waiting(usize),
    /// It may start.
    Ready,
    /// A thread is at it.
    Running,
    /// It has an end, good or bad.
    Done,
}

struct Job {
    stage: usize,
    work: Work,
    state: State,
    /// The jobs that wait for it.
    awaited_by: Vec<usize>,
}

/// An arm's result: its record in the cache, and the tensors while somebody here needs them.
#[derive(Clone)]
struct Stored {
    action: Action,
    payload: ArmPayload,
    output: Option<Arc<Output>>,
}

/// How far an arm is.
#[derive(Clone, Copy, Default)]
struct Made {
    sites: u64,
    /// Of the sites' tensors.
    bytes: u64,
}

/// What a job's thread reports.
enum Message {
    Progress { job: usize, made: Made },
    Done { job: usize, outcome: Result<Outcome, Failure>, seconds: f64 },
}

enum Outcome {
    Arm { stored: Box<Stored>, state: ArmState, why: String },
    Measures(Box<StageMeasures>),
}

/// Why a job has no result.
#[derive(Debug, thiserror::Error)]
enum Failure {
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
    #[error("what the program wrote is unusable: {0}; correct the program, nothing of it was kept")]
    Written(String),
    #[error("a bug of ours: {0}")]
    Bug(String),
}

impl Failure {
    /// Whether somebody else's tensors are missing or unusable: then there was
    /// nothing to measure, and nothing went wrong here.
    fn is_absence(&self) -> bool {
        matches!(
            self,
            Failure::Compute(ComputeError::TensorFile(_))
                | Failure::Source(SourceError::File { .. })
        )
    }
}

/// A stage while it runs.
#[derive(Default)]
struct Progress {
    started: Option<Instant>,
    arms: BTreeMap<Arm, ArmRecord>,
    results: BTreeMap<Arm, Stored>,
    measures: StageMeasures,
    failure: Option<String>,
    /// Why tensors that should have been read were not there.
    unread: Option<String>,
    blocked: Option<String>,
    record: Option<StageRecord>,
}

/// Runs a plan to its end.
pub fn run(plan: &Plan<'_>, store: &Store, options: &Options<'_>, sink: &mut dyn Sink) -> Finished {
    let mut engine = Engine::new(plan, store, options);
    engine.run(sink);
    let stages = engine.progress.into_iter().filter_map(|progress| progress.record).collect();
    Finished { stages, interrupted: interrupt::requested(), bug: engine.bug }
}

struct Engine<'a> {
    plan: &'a Plan<'a>,
    store: &'a Store,
    options: &'a Options<'a>,
    jobs: Vec<Job>,
    /// Those that may start, first things first.
    ready: BTreeSet<usize>,
    /// Places in the plan.
    places: BTreeMap<&'a StageId, usize>,
    progress: Vec<Progress>,
    bug: Option<String>,
    /// The stage after which nothing is started any more.
    failed_fast: Option<StageId>,
}

impl<'a> Engine<'a> {
    fn new(plan: &'a Plan<'a>, store: &'a Store, options: &'a Options<'a>) -> Engine<'a> {
        let mut engine = Engine {
            plan,
            store,
            options,
            jobs: Vec::new(),
            ready: BTreeSet::new(),
            places: plan.stages.iter().enumerate().map(|(at, p)| (&p.stage.id, at)).collect(),
            progress: plan.stages.iter().map(|_| Progress::default()).collect(),
            bug: None,
            failed_fast: None,
        };
        // The plan's stages are in order, so what a job waits for has its number already.
        let mut ends: BTreeMap<&StageId, usize> = BTreeMap::new();
        for (stage, prepared) in plan.stages.iter().enumerate() {
            let needs = prepared.stage.needs.iter().filter_map(|id| ends.get(id).copied());
            let needs: BTreeSet<usize> = needs.collect();
            let arms = prepared.stage.arms.iter().copied();
            let arms: Vec<Arm> =
                arms.filter(|arm| prepared.judged || *arm == Arm::Reference).collect();
            let first = engine.jobs.len();
            for arm in arms {
                engine.add(stage, Work::Arm(arm), needs.clone());
            }
            if prepared.judged {
                let arms = (first..engine.jobs.len()).collect();
                engine.add(stage, Work::Measure, arms);
            }
            ends.insert(&prepared.stage.id, engine.jobs.len() - 1);
        }
        engine
    }

    fn add(&mut self, stage: usize, work: Work, waits_for: BTreeSet<usize>) {
        let job = self.jobs.len();
        for awaited in &waits_for {
            self.jobs[*awaited].awaited_by.push(job);
        }
        let state = match waits_for.len() {
            0 => State::Ready,
            count => State::Waiting(count),
        };
        if state == State::Ready {
            self.ready.insert(job);
        }
        self.jobs.push(Job { stage, work, state, awaited_by: Vec::new() });
    }

    fn run(&mut self, sink: &mut dyn Sink) {
        let judged = self.plan.stages.iter().filter(|prepared| prepared.judged);
        let stages = judged.map(|prepared| prepared.stage.id.clone()).collect();
        sink.event(&Event::RunStarted { run: self.options.run.clone(), stages });
        let (plan, store, options) = (self.plan, self.store, self.options);
        std::thread::scope(|scope| {
            let (sender, receiver): (Sender<Message>, Receiver<Message>) = channel();
            let mut running = 0;
            loop {
                while running < options.jobs && !interrupt::requested() {
                    let Some(job) = self.ready.pop_first() else { break };
                    if let Some(order) = self.begin(job, sink) {
                        let prepared = &plan.stages[self.jobs[job].stage];
                        let bench = Bench { plan, store, options, prepared };
                        let sender = sender.clone();
                        scope.spawn(move || work(&bench, job, order, &sender));
                        running += 1;
                    }
                }
                if running == 0 {
                    break;
                }
                match receiver.recv() {
                    Ok(Message::Progress { job, made }) => self.show_progress(job, made, sink),
                    Ok(Message::Done { job, outcome, seconds }) => {
                        running -= 1;
                        self.settle(job, outcome, seconds, sink);
                    }
                    Err(_) => break,
                }
            }
        });
        if interrupt::requested() {
            self.close_open_stages(sink);
        }
    }

    /// Starts a job: gives the order for a thread, or settles it at once where
    /// there is nothing to compute.
    fn begin(&mut self, job: usize, sink: &mut dyn Sink) -> Option<Order> {
        let (stage, work) = (self.jobs[job].stage, self.jobs[job].work);
        let prepared = &self.plan.stages[stage];
        self.jobs[job].state = State::Running;
        self.progress[stage].started.get_or_insert_with(Instant::now);
        match work {
            Work::Arm(arm) => {
                if let Some(reason) = self.blocked_by(prepared) {
                    let record = ArmRecord::without(ArmState::Blocked, reason.clone());
                    self.progress[stage].arms.insert(arm, record);
                    self.progress[stage].blocked = Some(reason);
                    self.finish(job);
                    return None;
                }
                let recipe = &prepared.stage.recipe;
                let computes = !matches!(prepared.stage.op, Op::Compare { .. });
                let unavailable = self.options.workshop.unavailable(arm, recipe);
                if let Some(reason) = unavailable.filter(|_| computes) {
                    self.arm_finished(stage, arm, ArmState::Unmeasured, reason, 0.0, sink);
                    self.finish(job);
                    return None;
                }
                let inputs = self.inputs_of(prepared);
                sink.event(&Event::ArmStarted { stage: prepared.stage.id.clone(), arm });
                Some(Order::Arm { arm, inputs })
            }
            Work::Measure => {
                let progress = &self.progress[stage];
                let nothing = progress.results.is_empty();
                if progress.blocked.is_some() || progress.failure.is_some() || nothing {
                    self.close(stage, sink);
                    self.finish(job);
                    return None;
                }
                sink.event(&Event::Measuring { stage: prepared.stage.id.clone() });
                let results = progress.results.clone();
                let inputs = self.inputs_of(prepared);
                Some(Order::Measure { inputs, results })
            }
        }
    }

    /// Why a stage cannot start: a stage that it needs has no result. One that
    /// was falsified has one, and to find out where it starts is what the
    /// stages after it are for.
    fn blocked_by(&self, prepared: &PreparedStage<'_>) -> Option<String> {
        if let Some(failed) = &self.failed_fast {
            return Some(format!(
                "not started: stage {failed} did not pass, and --fail-fast is set"
            ));
        }
        for need in &prepared.stage.needs {
            let Some(&at) = self.places.get(need) else { continue };
            let progress = &self.progress[at];
            let verdict = progress.record.as_ref().map(|record| record.verdict);
            if let Some(verdict @ (Verdict::Error | Verdict::Blocked)) = verdict {
                return Some(format!("stage {need}, which it needs, ended in {verdict}"));
            }
            let inputs = prepared.stage.op.input_refs();
            let is_input = inputs.iter().any(|input| input.stage == *need);
            if is_input && !progress.results.contains_key(&Arm::Reference) {
                return Some(format!("stage {need} made no input for it"));
            }
            let command = progress.results.get(&Arm::Command);
            let command = command.and_then(|stored| stored.payload.command.as_ref());
            if let Some(CommandRecord { accepted: false, status, .. }) = command {
                return Some(format!("the command of stage {need} ended with status {status}"));
            }
        }
        None
    }

    /// The results of other stages that a stage reads.
    fn inputs_of(&self, prepared: &PreparedStage<'_>) -> Supplies {
        let supply = |input: &InputRef| {
            let at = *self.places.get(&input.stage)?;
            let stored = self.progress[at].results.get(&Arm::Reference)?;
            Some((input.clone(), stored.clone()))
        };
        prepared.stage.op.input_refs().into_iter().filter_map(supply).collect()
    }

    /// The one place where a job ends and others become ready.
    fn settle(
        &mut self,
        job: usize,
        outcome: Result<Outcome, Failure>,
        seconds: f64,
        sink: &mut dyn Sink,
    ) {
        let (stage, work) = (self.jobs[job].stage, self.jobs[job].work);
        match (work, outcome) {
            (Work::Arm(arm), Ok(Outcome::Arm { stored, state, why })) => {
                let who = self.plan.who(self.plan.stages[stage].stage, arm);
                let kept = stored.payload.command.as_ref().is_none_or(|command| command.accepted);
                if kept && let Err(error) = self.store.remember(&who, &stored.action.key) {
                    tracing::warn!("{error}");
                }
                self.progress[stage].results.insert(arm, *stored);
                self.arm_finished(stage, arm, state, why, seconds, sink);
            }
            (Work::Arm(arm), Err(failure)) if failure.is_absence() => {
                let why = failure.to_string();
                self.progress[stage].unread = Some(format!("the {arm} arm has no tensors: {why}"));
                self.arm_finished(stage, arm, ArmState::Unmeasured, why, seconds, sink);
            }
            (Work::Arm(arm), Err(failure)) => {
                self.note_bug(&failure);
                let why = failure.to_string();
                self.progress[stage].failure = Some(format!("the {arm} arm failed: {why}"));
                self.arm_finished(stage, arm, ArmState::Error, why, seconds, sink);
            }
            (_, Ok(Outcome::Measures(measures))) => {
                self.progress[stage].measures = *measures;
                self.close(stage, sink);
            }
            (_, Err(failure)) => {
                self.note_bug(&failure);
                self.progress[stage].failure = Some(format!("measuring failed: {failure}"));
                self.close(stage, sink);
            }
            (Work::Measure, Ok(Outcome::Arm { .. })) => {}
        }
        self.finish(job);
    }

    fn note_bug(&mut self, failure: &Failure) {
        if let Failure::Bug(text) = failure {
            self.bug.get_or_insert_with(|| text.clone());
        }
    }

    fn finish(&mut self, done: usize) {
        self.jobs[done].state = State::Done;
        for job in std::mem::take(&mut self.jobs[done].awaited_by) {
            match &mut self.jobs[job].state {
                State::Waiting(count) if *count > 1 => *count -= 1,
                state => {
                    *state = State::Ready;
                    self.ready.insert(job);
                }
            }
        }
    }

    fn arm_finished(
        &mut self,
        stage: usize,
        arm: Arm,
        state: ArmState,
        why: String,
        seconds: f64,
        sink: &mut dyn Sink,
    ) {
        let mut record = ArmRecord::without(state, why.clone());
        if let Some(stored) = self.progress[stage].results.get(&arm) {
            record.arithmetic = Some(stored.payload.arithmetic.clone());
            record.gemms = stored.payload.gemms.clone();
            record.seconds = Some(stored.payload.seconds);
            record.key = Some(stored.action.key.0.clone());
            record.object = stored.action.object.clone();
            record.sites = stored.payload.sites.clone();
            record.greedy = stored.payload.greedy.clone();
            record.command = stored.payload.command.clone();
        }
        self.progress[stage].arms.insert(arm, record);
        let stage = self.plan.stages[stage].stage.id.clone();
        sink.event(&Event::ArmFinished { stage, arm, state, why, seconds });
    }

    /// Judges a stage and writes its record.
    fn close(&mut self, stage: usize, sink: &mut dyn Sink) {
        let prepared = &self.plan.stages[stage];
        let progress = &mut self.progress[stage];
        let definition = prepared.stage;
        let contract = self.plan.pipeline.contracts[&definition.contract].read_by(&definition.arms);
        let absent: BTreeMap<Arm, String> = progress
            .arms
            .iter()
            .filter(|(_, record)| record.state == ArmState::Unmeasured)
            .map(|(arm, record)| (*arm, record.why.clone()))
            .collect();
        let required = absent.iter().find(|(arm, _)| self.options.require.contains(arm));
        let mut judged = judge(&contract, &progress.measures.measures, &absent);
        reason(&mut judged, &progress.measures);
        if let Some(unread) = &progress.unread
            && judged.verdict == Verdict::Pass
        {
            (judged.verdict, judged.why) = (Verdict::Unmeasured, unread.clone());
        }
        if let Some(reason) = &progress.blocked {
            (judged.verdict, judged.why) = (Verdict::Blocked, reason.clone());
        } else if let Some(reason) = &progress.failure {
            (judged.verdict, judged.why) = (Verdict::Error, reason.clone());
        } else if let Some((arm, reason)) = required
            && !matches!(judged.verdict, Verdict::Structural | Verdict::Drift)
        {
            judged.verdict = Verdict::Error;
            judged.why = format!("the {arm} arm is required and did not run: {reason}");
        }
        if let Some(stored) = progress.results.get(&Arm::Command)
            && let Some(command) = &stored.payload.command
        {
            let why = if judged.verdict == Verdict::Pass { "" } else { &judged.why };
            judged.why = outcome_in_words(command, why, self.store);
        }
        let engine = definition.external.as_ref().and_then(|external| external.emulate);
        let fit = match engine {
            Some(op::Engine::LlamaCpp) => fit::in_words(
                &progress.measures.measures,
                "the engine's activations are quantised to 8 bits",
            ),
            None => None,
        };
        if let Some(fit) = fit {
            judged.why = format!("{fit}; {}", judged.why);
        }
        // What was identified is the answer, whatever became of it.
        let emulated = progress.arms.get(&Arm::Emulated).and_then(|arm| arm.arithmetic.as_ref());
        if let (Op::Gemm { .. }, Some(_), Some(found)) =
            (&definition.op, &definition.recorded, emulated)
        {
            judged.why = format!("{}; {found}", judged.why);
        }
        let seconds = progress.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
        let bad = !matches!(judged.verdict, Verdict::Pass | Verdict::Unmeasured);
        if bad && self.options.fail_fast {
            self.failed_fast.get_or_insert_with(|| definition.id.clone());
        }
        // The tensors have done their service; whoever needs them later reads the cache.
        for stored in progress.results.values_mut() {
            stored.output = None;
        }
        sink.event(&Event::StageJudged {
            stage: definition.id.clone(),
            verdict: judged.verdict,
            why: judged.why.clone(),
            seconds,
        });
        progress.record = Some(StageRecord {
            id: definition.id.clone(),
            title: definition.title.clone(),
            file: definition.file.display().to_string(),
            needs: definition.needs.clone(),
            family: definition.family.clone(),
            op: definition.op.clone(),
            model: prepared.model.as_ref().map_or(String::new(), |model| model.source.clone()),
            tokens: prepared.tokens.clone(),
            recipe: definition.recipe,
            contract: [contract.name.clone(), contract.version.clone()],
            verdict: judged.verdict,
            why: judged.why,
            seconds,
            arms: progress.arms.clone(),
            judgements: judged.judgements,
            measures: std::mem::take(&mut progress.measures.measures),
            greedy: std::mem::take(&mut progress.measures.greedy),
            accounts: std::mem::take(&mut progress.measures.accounts),
            shares: std::mem::take(&mut progress.measures.shares),
            growth: std::mem::take(&mut progress.measures.growth),
            diagnoses: std::mem::take(&mut progress.measures.diagnoses),
        });
    }

    /// After a stop: what was not judged ends in an error that says so.
    fn close_open_stages(&mut self, sink: &mut dyn Sink) {
        for stage in 0..self.progress.len() {
            if self.progress[stage].record.is_none() && self.plan.stages[stage].judged {
                self.progress[stage].failure = Some("stopped on request".to_owned());
                self.progress[stage].blocked = None;
                self.close(stage, sink);
            }
        }
    }

    fn show_progress(&self, job: usize, made: Made, sink: &mut dyn Sink) {
        let Job { stage, work, .. } = self.jobs[job];
        let prepared = &self.plan.stages[stage];
        if let Work::Arm(arm) = work {
            let total = expected_sites(prepared);
            let stage = prepared.stage.id.clone();
            let Made { sites: done, bytes } = made;
            sink.event(&Event::Progress { stage, arm, done, total, bytes });
        }
    }
}

/// A command's verdict in one line: its status, and what it said last if that was bad.
fn outcome_in_words(record: &CommandRecord, why: &str, store: &Store) -> String {
    let mut parts = vec![format!("status {}", record.status)];
    if !record.outputs.is_empty() {
        parts.push(match record.outputs.as_slice() {
            [one] => format!("wrote {}", one.path),
            many => format!("wrote {} files", many.len()),
        });
    }
    parts.extend(Some(why.to_owned()).filter(|why| !why.is_empty()));
    if !record.accepted {
        let said = command::last_words(record, store);
        parts.extend(said.map(|said| format!("it said: {said}")));
    }
    parts.join("; ")
}

/// What a thread is to do.
enum Order {
    Arm { arm: Arm, inputs: Supplies },
    Measure { inputs: Supplies, results: BTreeMap<Arm, Stored> },
}

/// The sites of other stages that an op reads, in the order in which it names them.
type Supplies = Vec<(InputRef, Stored)>;

/// Sites that an arm will make, for a progress bar.
fn expected_sites(prepared: &PreparedStage<'_>) -> u64 {
    match &prepared.stage.op {
        Op::Forward { repeats, .. } => {
            let Some(model) = &prepared.model else { return 0 };
            let config = model.model.config();
            let norms = if model.model.has("blk.0.attn_q_norm.weight") { 0 } else { 2 };
            let sites = config.layers * (LAYER_SITES.len() - norms) + 3;
            sites as u64 * u64::from(*repeats)
        }
        Op::Matmul { weights, .. } => weights.len() as u64,
        _ => 1,
    }
}

/// A safetensors file of f32 tensors with their little-endian bytes.
fn encoded<'t>(
    tensors: impl Iterator<Item = (&'t str, &'t Tensor, &'t Vec<u8>)>,
) -> Result<Vec<u8>, Failure> {
    let views = tensors.map(|(name, tensor, bytes)| {
        let shape = vec![tensor.rows(), tensor.width()];
        TensorView::new(Dtype::F32, shape, bytes).map(|view| (name, view))
    });
    views
        .collect::<Result<Vec<_>, _>>()
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|error| Failure::Bug(format!("tensors cannot be encoded: {error}")))
}

/// A job's thread.
fn work(bench: &Bench<'_>, job: usize, order: Order, sender: &Sender<Message>) {
    let started = Instant::now();
    let attempt = AssertUnwindSafe(|| {
        let attempt = || match order {
            Order::Arm { arm, inputs } => bench.arm(arm, &inputs, &mut |made| {
                // Nobody listens any more only when the run is over.
                let _ = sender.send(Message::Progress { job, made });
            }),
            Order::Measure { inputs, results } => bench.measure(&inputs, results),
        };
        match bench.prepared.stage.resources.threads {
            None => attempt(),
            Some(threads) => {
                match rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build() {
                    Ok(pool) => pool.install(attempt),
                    Err(error) => Err(Failure::Bug(error.to_string())),
                }
            }
        }
    });
    let outcome = catch_unwind(attempt).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(Failure::Bug(text.unwrap_or_else(|| "a panic without a message".to_owned())))
    });
    let seconds = started.elapsed().as_secs_f64();
    let _ = sender.send(Message::Done { job, outcome, seconds });
}

/// Everything that one job needs.
struct Bench<'a> {
    plan: &'a Plan<'a>,
    store: &'a Store,
    options: &'a Options<'a>,
    prepared: &'a PreparedStage<'a>,
}

impl Bench<'_> {
    fn task<'t>(&'t self, inputs: &'t [Tensor]) -> Result<Task<'t>, Failure> {
        let PreparedStage { stage, model, tokens, .. } = self.prepared;
        let model = model.as_ref().ok_or_else(|| Failure::Bug("a stage without a model".into()))?;
        Ok(Task { op: &stage.op, model: &model.model, tokens, input: Some(inputs) })
    }

    fn arm(
        &self,
        arm: Arm,
        inputs: &Supplies,
        progress: &mut (dyn FnMut(Made) + Send),
    ) -> Result<Outcome, Failure> {
        if let Op::Command(op) = &self.prepared.stage.op {
            return self.command(op);
        }
        let Options { workshop, .. } = self.options;
        for (input, stored) in inputs {
            site_hash(input, stored)?;
        }
        let site = |input: &InputRef| {
            let (_, stored) = inputs.iter().find(|(supplied, _)| supplied == input)?;
            site_hash(input, stored).ok()
        };
        let stage = self.prepared.stage;
        let sources = self.plan.sources(stage, arm, &site)?;
        let walk = self.plan.arm_walk(self.prepared, arm, &sources, *workshop);
        let reuse = |action: Action| {
            let payload = payload_of(&action)?;
            let why = reused(&action, &self.plan.touched_files(self.prepared));
            let stored = Box::new(Stored { action, payload, output: None });
            Ok(Outcome::Arm { stored, state: ArmState::Reused, why })
        };
        if let Some(action) = self.reusable(&walk) {
            return reuse(action);
        }
        let why = self.plan.why_run(self.store, self.prepared.stage, arm, &walk);
        let _lock = self.store.lock(&walk.key())?.ok_or(ComputeError::Interrupted)?;
        // Another runner may just have computed it.
        if let Some(action) = self.reusable(&walk) {
            return reuse(action);
        }
        let slots = self.take_slots(arm)?;
        let started = Instant::now();
        let output = match self.output_at_hand(arm, inputs, &slots)? {
            Some(output) => output,
            None => {
                let inputs = self.input_tensors(inputs)?;
                let engine = stage.external.as_ref().and_then(|external| external.emulate);
                let (ops, arithmetic) = match (arm, engine) {
                    (Arm::Emulated, Some(op::Engine::LlamaCpp)) => {
                        let ops: Box<dyn Ops> = Box::new(EightBit);
                        (ops, eight_bit::IN_WORDS.to_owned())
                    }
                    _ => workshop.ops(arm, &stage.recipe)?,
                };
                let mut made = Made::default();
                compute(&self.task(&inputs)?, ops.as_ref(), arithmetic, &mut |tensor| {
                    made.sites += 1;
                    made.bytes += size_of_val(tensor.data()) as u64;
                    progress(made);
                })?
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        let earlier = self.store.record(&walk.key());
        let stored = self.keep(&walk, output, seconds)?;
        let mut why = why;
        if earlier.is_some_and(|earlier| earlier.object != stored.action.object) {
            why += "; the same key gave another result before: the arm is not deterministic";
        }
        Ok(Outcome::Arm { stored: Box::new(stored), state: ArmState::Ran, why })
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
            (op, Arm::Recorded, Some(from)) => Ok(Some(recorded(op, from, model)?)),
            (_, Arm::External, _) => self.asked(inputs, slots).map(Some),
            (Op::Gemm { x, w }, arm, from) => {
                let site = Site("y".to_owned());
                let read = |tensor| tensor_file::read(tensor).map_err(ComputeError::from);
                let (x, w) = (read(x)?, read(w)?);
                if arm == Arm::Reference {
                    let arithmetic = "f64 over the operands' codes".to_owned();
                    return one(&site, product::reference(&x, &w)?, arithmetic);
                }
                let observed =
                    from.as_ref().map(|from| crate::compute::recorded::product(from, &site));
                let observed = observed.transpose()?;
                let (y, words) = product::emulated(&x, &w, observed.as_ref(), &stage.recipe)?;
                one(&site, y, words)
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
        let from = op::Recorded {
            file: left.tensors.clone(),
            names: external.names.clone(),
            format: None,
            shape: None,
        };
        let unusable = |error: ComputeError| Failure::Written(error.to_string());
        let mut output = recorded(&stage.op, &from, Some(model)).map_err(unusable)?;
        check_written(&output, rows, config.vocabulary).map_err(unusable)?;
        output.arithmetic = match (left.tries, left.earlier) {
            (tries, Some(earlier)) => {
                format!(
                    "{}; flaky: attempt {tries} went well, the first failed: {earlier}",
                    external.version
                )
            }
            _ => external.version.clone(),
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
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, tensor)| tensor.to_le_bytes()).collect();
        let tensors = tensors.iter().zip(&bytes);
        encoded(tensors.map(|((name, tensor), bytes)| (name.as_str(), tensor, bytes))).map(Some)
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
        if matches!(arm, Arm::Reference | Arm::Emulated) {
            (asked.gpus, asked.gpu_memory) = (0, 0);
        }
        self.options.slots.take(&asked)
    }

    fn reusable(&self, walk: &KeyWalk) -> Option<Action> {
        self.plan.reusable(self.store, self.prepared.judged, walk)
    }

    /// A command's earlier result with its outputs in their places, if it is whole.
    fn reuse_command(
        &self,
        walk: &KeyWalk,
        seen: &command::Seen,
        tools: &Tools<'_>,
    ) -> Result<Option<Outcome>, Failure> {
        let Some(action) = self.reusable(walk) else { return Ok(None) };
        let payload = payload_of(&action)?;
        let Some(record) = &payload.command else { return Ok(None) };
        let Some(restored) = command::restore(record, tools)? else { return Ok(None) };
        let mut why = reused(&action, &seen.touched(self.plan.stamps));
        if !restored.is_empty() {
            why += &format!("; put back: {}", restored.join(", "));
        }
        let stored = Box::new(Stored { action, payload, output: None });
        Ok(Some(Outcome::Arm { stored, state: ArmState::Reused, why }))
    }

    /// Runs a command, or finds what it did and puts its outputs in their places.
    fn command(&self, op: &op::Command) -> Result<Outcome, Failure> {
        let tools = self.tools();
        let seen = command::look(op, tools.project, tools.stamps)?;
        let walk = self.plan.command_walk(op, &seen);
        if let Some(outcome) = self.reuse_command(&walk, &seen, &tools)? {
            return Ok(outcome);
        }
        let why = self.plan.why_run(self.store, self.prepared.stage, Arm::Command, &walk);
        let _lock = self.store.lock(&walk.key())?.ok_or(CommandError::Stopped)?;
        // Another runner may just have run it.
        if let Some(outcome) = self.reuse_command(&walk, &seen, &tools)? {
            return Ok(outcome);
        }
        let slots = self.take_slots(Arm::Command)?;
        let (record, seconds) = command::carry_out(op, &seen, &slots.gpus, &tools)?;
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
        let json = serde_json::to_value(&payload)
            .map_err(|error| Failure::Bug(format!("a record cannot be encoded: {error}")))?;
        let Options { run, created, .. } = self.options;
        let new = NewAction { walk: &walk, run, created, object: None, payload: json, seconds };
        let action = match kept {
            true => self.store.save(new)?,
            false => Action::unsaved(&walk, run, created, new.payload),
        };
        let stored = Box::new(Stored { action, payload, output: None });
        Ok(Outcome::Arm { stored, state: ArmState::Ran, why })
    }

    fn keep(&self, walk: &KeyWalk, output: Output, seconds: f64) -> Result<Stored, Failure> {
        let bytes: Vec<(&Site, &Tensor, Vec<u8>)> = output
            .sites
            .iter()
            .map(|(site, tensor)| (site, tensor, tensor.to_le_bytes()))
            .collect();
        let records = bytes.iter().map(|(site, tensor, bytes)| SiteRecord {
            site: (*site).clone(),
            shape: [tensor.rows(), tensor.width()],
            blake3: blake3::hash(bytes).to_hex().to_string(),
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
        let sites = bytes.iter().map(|(site, tensor, bytes)| (site.0.as_str(), *tensor, bytes));
        let encoded = encoded(sites)?;
        let json = serde_json::to_value(&payload)
            .map_err(|error| Failure::Bug(format!("a record cannot be encoded: {error}")))?;
        let Options { run, created, .. } = self.options;
        let object = Some(encoded.as_slice());
        let action =
            self.store.save(NewAction { walk, run, created, object, payload: json, seconds })?;
        Ok(Stored { action, payload, output: Some(Arc::new(output)) })
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

    fn measure(
        &self,
        inputs: &Supplies,
        results: BTreeMap<Arm, Stored>,
    ) -> Result<Outcome, Failure> {
        if let Op::Command(op) = &self.prepared.stage.op {
            return self.measure_command(op, &results);
        }
        let keys = results.iter().map(|(arm, stored)| (*arm, stored.action.key.0.clone()));
        let walk = self.plan.measure_walk(self.prepared, &keys.collect());
        if let Some(action) = self.store.find(&walk.key()) {
            let measures = serde_json::from_value(action.payload)
                .map_err(|error| Failure::Record(action.key.0, error.to_string()))?;
            return Ok(Outcome::Measures(Box::new(measures)));
        }
        let started = Instant::now();
        let mut outputs = BTreeMap::new();
        for (arm, stored) in results {
            outputs.insert(arm, self.output_of(&stored)?);
        }
        let stage = self.prepared.stage;
        let measures = if stage.op.reads_model() {
            let inputs = self.input_tensors(inputs)?;
            let engine = stage.external.as_ref().is_some_and(|e| e.emulate.is_some());
            measure_stage(&self.task(&inputs)?, &stage.recipe, engine, &outputs)?
        } else {
            measure_arms(&outputs)
        };
        let json = serde_json::to_value(&measures)
            .map_err(|error| Failure::Bug(format!("measures cannot be encoded: {error}")))?;
        let Options { run, created, .. } = self.options;
        let seconds = started.elapsed().as_secs_f64();
        let (walk, object) = (&walk, None);
        self.store.save(NewAction { walk, run, created, object, payload: json, seconds })?;
        Ok(Outcome::Measures(Box::new(measures)))
    }
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
        let bytes = self.store.read_object(object)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(&error))?;
        let read = |site: Site| {
            let view = file.tensor(&site.0).map_err(|error| wrong(&error))?;
            let width = view.shape().last().copied().unwrap_or(0);
            if view.dtype() != Dtype::F32 || width == 0 {
                return Err(wrong(&format!("`{site}` is not a matrix of f32")));
            }
            let values = view.data().chunks_exact(4);
            let values = values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            Ok((site, Tensor::new(width, values.collect())))
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

fn payload_of(action: &Action) -> Result<ArmPayload, Failure> {
    serde_json::from_value(action.payload.clone())
        .map_err(|error| Failure::Record(action.key.0.clone(), error.to_string()))
}
