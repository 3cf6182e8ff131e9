//! The heart: a plan becomes verdicts.
//!
//! Every (stage, arm) and every stage's measuring is a job with a `State`.
//! `Engine::settle` makes every transition; `Engine::run` is the loop. Jobs
//! run beside each other where nothing holds them back. It draws nothing: it
//! emits events.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::cache::{Key, Store};
use crate::chip::{Basis, Evidence};
use crate::compare::{StageMeasures, fit};
use crate::compute::ComputeError;
use crate::compute::arms::Workshop;
use crate::compute::emulated::arm::Emulated;
use crate::event::{Event, Sink};
use crate::executor::command::{self, CommandRecord};
use crate::executor::slurm::{self, Slurm};
use crate::executor::{Attempts, Processes, Slots};
use crate::files::Spill;
use crate::interrupt;
use crate::memory::Budget;
use crate::op::{self, Arm, ChipName, InputRef, Op, StageId, Stream};
use crate::plan::{ArmPayload, Plan, PreparedStage, SiteRecord};
use crate::record::{ArmRecord, ArmState, StageRecord};
use crate::text::no_threads;
use crate::verdict::{First, Verdict, judge, reason};

mod away;
mod bench;
mod missing;
mod need;

use away::{Answer, Kind, is_of, is_of_its_machine};
pub use away::{Errand, carry_out, is_on_gpu};
use bench::{Bench, Failure, Made, News, Order, Outcome, Stored, Supplies};
pub use need::{check_memory, for_jobs};

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
    /// The most memory that jobs take together, where there is a bound.
    pub memory: Option<&'a Bound>,
}

/// A bound of memory, and where tensors are put away so that it is kept.
#[derive(Debug)]
pub struct Bound {
    /// What is shared out.
    pub budget: Budget,
    /// The file of what is put away.
    pub spill: Spill,
}

/// What a run came to.
#[derive(Debug)]
pub struct Finished {
    /// The judged stages, in order.
    pub stages: Vec<StageRecord>,
    /// What the arms of each stage of the plan made, judged or not.
    pub made: Vec<BTreeMap<Arm, MadeByArm>>,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// What a panic of ours said.
    pub bug: Option<String>,
}

/// What an arm made.
#[derive(Debug)]
pub struct MadeByArm {
    /// Its action's key.
    pub key: Key,
    /// Its tensors.
    pub sites: Vec<SiteRecord>,
    /// What became of it, if it is a command.
    pub command: Option<CommandRecord>,
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
    /// Its program has ended; what it left is being put away.
    PuttingAway,
    /// A job elsewhere does it.
    Away,
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

/// What a job's thread reports.
enum Message {
    News { job: usize, news: News },
    Done { job: usize, outcome: Result<Outcome, Failure>, seconds: f64 },
}

/// A stage while it runs.
#[derive(Default)]
struct Progress {
    started: Option<Instant>,
    arms: BTreeMap<Arm, ArmRecord>,
    results: BTreeMap<Arm, Stored>,
    measures: StageMeasures,
    failure: Option<String>,
    blocked: Option<String>,
    record: Option<StageRecord>,
}

/// Runs a plan to its end on this machine.
pub fn run(plan: &Plan<'_>, store: &Store, options: &Options<'_>, sink: &mut dyn Sink) -> Finished {
    run_with(plan, store, options, None, sink)
}

/// Runs a plan to its end; stages that say so in jobs of Slurm, where it is given.
pub fn run_with(
    plan: &Plan<'_>,
    store: &Store,
    options: &Options<'_>,
    slurm: Option<&mut Slurm>,
    sink: &mut dyn Sink,
) -> Finished {
    let mut engine = Engine::new(plan, store, options);
    engine.slurm = slurm;
    engine.run(sink);
    let of_stage = |Progress { record, results, .. }: Progress| {
        let made = results.into_iter().map(|(arm, Stored { action, payload, .. })| {
            (arm, MadeByArm { key: action.key, sites: payload.sites, command: payload.command })
        });
        (record, made.collect())
    };
    let (records, made): (Vec<_>, _) = engine.progress.into_iter().map(of_stage).unzip();
    let stages = records.into_iter().flatten().collect();
    Finished { stages, made, interrupted: interrupt::requested(), bug: engine.bug }
}

struct Engine<'a> {
    plan: &'a Plan<'a>,
    store: &'a Store,
    options: &'a Options<'a>,
    jobs: Vec<Job>,
    /// Those that may start, first things first.
    ready: BTreeSet<usize>,
    /// How many are in [`State::Running`].
    running: usize,
    /// Places in the plan.
    places: BTreeMap<&'a StageId, usize>,
    progress: Vec<Progress>,
    bug: Option<String>,
    /// The stage after which nothing is started any more.
    failed_fast: Option<StageId>,
    /// Who does what is not done here.
    slurm: Option<&'a mut Slurm>,
    /// The jobs in [`State::Away`].
    away: BTreeSet<usize>,
    /// Those that came back: what they made is in the cache.
    returned: BTreeSet<usize>,
}

impl<'a> Engine<'a> {
    fn new(plan: &'a Plan<'a>, store: &'a Store, options: &'a Options<'a>) -> Engine<'a> {
        let mut engine = Engine {
            plan,
            store,
            options,
            jobs: Vec::new(),
            ready: BTreeSet::new(),
            running: 0,
            places: plan.stages.iter().enumerate().map(|(at, p)| (&p.stage.id, at)).collect(),
            progress: plan.stages.iter().map(|_| Progress::default()).collect(),
            bug: None,
            failed_fast: None,
            slurm: None,
            away: BTreeSet::new(),
            returned: BTreeSet::new(),
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
        let (give, orders) = channel();
        let orders = Mutex::new(orders);
        std::thread::scope(|scope| {
            let (sender, receiver): (Sender<Message>, Receiver<Message>) = channel();
            // Dropped at the end, which ends the threads.
            let give: Sender<Handed<'_>> = give;
            let (mut at_hand, mut threads) = (0, 0);
            loop {
                while self.may_start(at_hand) {
                    let Some(job) = self.ready.pop_first() else { break };
                    let Some(order) = self.begin(job, sink) else { continue };
                    let bench = self.bench(job);
                    // Nobody listens only if every thread is gone, and none goes before the end.
                    let _ = give.send(Handed { bench, job, order });
                    at_hand += 1;
                    if threads < at_hand {
                        let (orders, sender) = (&orders, sender.clone());
                        let serving = sender.clone();
                        let started = std::thread::Builder::new()
                            .spawn_scoped(scope, move || serve(orders, &serving));
                        match started {
                            Ok(_) => threads += 1,
                            // Those that there are go on; where there is none, this one works.
                            Err(_) if threads > 0 => {}
                            Err(_) => serve_one(orders, &sender),
                        }
                    }
                }
                if at_hand == 0 && self.away.is_empty() {
                    break;
                }
                let message = match (&self.slurm, self.away.is_empty()) {
                    (Some(slurm), false) => receiver.recv_timeout(slurm.pause()),
                    _ => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                };
                match message {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(Message::News { job, news: News::Made(made) }) => {
                        self.show_progress(job, made, sink);
                    }
                    Ok(Message::News { job, news: News::ProgramEnded }) => {
                        self.stop_running(job, State::PuttingAway);
                    }
                    Ok(Message::Done { job, outcome, seconds }) => {
                        at_hand -= 1;
                        match outcome {
                            Err(Failure::NotAtHand) => self.send_away(job, sink),
                            outcome => self.settle(job, outcome, seconds, sink),
                        }
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                self.hear_of_those_away(at_hand > 0 || !self.ready.is_empty(), sink);
            }
        });
        if interrupt::requested() {
            self.close_open_stages(sink);
        }
    }

    /// Whether another job may start beside those at hand. While a command's files are
    /// put away another one may run, but not where jobs are to follow each other, or to be
    /// judged before the next one starts.
    fn may_start(&self, at_hand: usize) -> bool {
        let jobs = self.options.jobs;
        let beside = jobs > 1 && !self.options.fail_fast;
        let most_at_hand = if beside { jobs.saturating_mul(2) } else { jobs };
        !interrupt::requested() && self.running < jobs && at_hand < most_at_hand
    }

    fn stop_running(&mut self, job: usize, next: State) {
        if self.jobs[job].state == State::Running {
            self.running -= 1;
        }
        self.jobs[job].state = next;
    }

    /// Starts a job: gives the order for a thread, or settles it at once where
    /// there is nothing to compute.
    fn begin(&mut self, job: usize, sink: &mut dyn Sink) -> Option<Order> {
        let (stage, work) = (self.jobs[job].stage, self.jobs[job].work);
        let prepared = &self.plan.stages[stage];
        self.jobs[job].state = State::Running;
        self.running += 1;
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
                let elsewhere = self.is_elsewhere(stage, work);
                if elsewhere && is_of_its_machine(prepared, arm) {
                    self.send_away(job, sink);
                    return None;
                }
                let recipe = &prepared.stage.recipe;
                let computes = !matches!(prepared.stage.op, Op::Compare { .. });
                let unavailable = self.options.workshop.unavailable(arm, recipe);
                if let Some(reason) = unavailable.filter(|_| computes && !elsewhere) {
                    self.arm_finished(stage, arm, ArmState::Unmeasured, reason, 0.0, sink);
                    self.finish(job);
                    return None;
                }
                if !elsewhere {
                    sink.event(&Event::ArmStarted { stage: prepared.stage.id.clone(), arm });
                }
                Some(self.order(job))
            }
            Work::Measure => {
                let progress = &self.progress[stage];
                let nothing = progress.results.is_empty();
                if progress.blocked.is_some() || progress.failure.is_some() || nothing {
                    self.close(stage, sink);
                    self.finish(job);
                    return None;
                }
                if !self.is_elsewhere(stage, work) {
                    sink.event(&Event::Measuring { stage: prepared.stage.id.clone() });
                }
                Some(self.order(job))
            }
        }
    }

    /// What a job is to do, with what it needs of others.
    fn order(&self, job: usize) -> Order {
        let Job { stage, work, .. } = self.jobs[job];
        let inputs = self.inputs_of(&self.plan.stages[stage]);
        match work {
            Work::Arm(arm) => Order::Arm { arm, inputs },
            Work::Measure => {
                Order::Measure { inputs, results: self.progress[stage].results.clone() }
            }
        }
    }

    fn bench(&self, job: usize) -> Bench<'a> {
        let Job { stage, work, .. } = self.jobs[job];
        let computes = !self.is_elsewhere(stage, work);
        let (plan, store, options) = (self.plan, self.store, self.options);
        let returned = self.returned.contains(&job);
        Bench { plan, store, options, prepared: &plan.stages[stage], computes, returned }
    }

    /// Whether work is done elsewhere, unless its result is at hand. What is measured of a
    /// command is read from its record.
    fn is_elsewhere(&self, stage: usize, work: Work) -> bool {
        let stage = self.plan.stages[stage].stage;
        let little = work == Work::Measure && stage.op.command().is_some();
        self.slurm.is_some() && stage.executor.slurm && !little
    }

    /// Hands a job over to Slurm.
    fn send_away(&mut self, job: usize, sink: &mut dyn Sink) {
        self.stop_running(job, State::Away);
        if self.returned.contains(&job) {
            let lost = Failure::Refused(
                "its job says that it is done, and the cache does not hold the result; is the \
                 folder of runs the same on every node?"
                    .to_owned(),
            );
            self.settle(job, Err(lost), 0.0, sink);
            return;
        }
        let order = self.order(job);
        let item =
            away::item(&self.bench(job), job, self.jobs[job].work, &order).and_then(|item| {
                // Nodes that see no folder of this machine read there what they need.
                match item.executor.without_folder {
                    true => away::bring_along(self.store, &order).map(|()| item),
                    false => Ok(item),
                }
            });
        match item {
            Err(failure) => self.settle(job, Err(failure), 0.0, sink),
            Ok(item) => {
                if let Some(slurm) = &mut self.slurm {
                    slurm.hand_over(item);
                    self.away.insert(job);
                }
            }
        }
    }

    /// Looks after the jobs of Slurm; `more` says whether others may soon join them.
    fn hear_of_those_away(&mut self, more: bool, sink: &mut dyn Sink) {
        let Some(slurm) = self.slurm.as_mut().filter(|_| !self.away.is_empty()) else { return };
        if interrupt::requested() {
            slurm.cancel();
            self.away.clear();
            return;
        }
        for news in slurm.step(more) {
            self.hear(news, sink);
        }
    }

    fn hear(&mut self, news: slurm::News, sink: &mut dyn Sink) {
        match news {
            slurm::News::Began { ticket } => {
                let Job { stage, work, .. } = self.jobs[ticket];
                let stage = self.plan.stages[stage].stage.id.clone();
                sink.event(&match work {
                    Work::Arm(arm) => Event::ArmStarted { stage, arm },
                    Work::Measure => Event::Measuring { stage },
                });
            }
            slurm::News::Done { ticket, answer, seconds, shared } => {
                self.away.remove(&ticket);
                let stage = self.plan.stages[self.jobs[ticket].stage].stage;
                if stage.executor.without_folder {
                    self.store.ask_again();
                }
                match self.answered(ticket, answer.get(), shared) {
                    Some(outcome) => self.settle(ticket, outcome, seconds, sink),
                    // Its measures are in the cache, where this machine finds them.
                    None => {
                        self.returned.insert(ticket);
                        self.jobs[ticket].state = State::Ready;
                        self.ready.insert(ticket);
                    }
                }
            }
            slurm::News::Lost { ticket, problem } => {
                self.away.remove(&ticket);
                self.settle(ticket, Err(Failure::Refused(problem)), 0.0, sink);
            }
            slurm::News::Job { job, state, node, why } => {
                sink.event(&Event::Job { job, state: state.to_owned(), node, why });
            }
            slurm::News::Count { waiting, running, done, why } => {
                sink.event(&Event::Queue { waiting, running, done, why });
            }
        }
    }

    /// What a job's answer says of an arm; nothing where it is of measures.
    fn answered(&self, job: usize, answer: &str, shared: bool) -> Option<Result<Outcome, Failure>> {
        let wrong = |text: String| Some(Err(Failure::Refused(text)));
        let answer = match serde_json::from_str(answer) {
            Ok(answer) => answer,
            Err(error) => return wrong(format!("its job's answer cannot be read: {error}")),
        };
        let (action, mut state, mut why) = match answer {
            Answer::Measured => return None,
            Answer::Arm { action, state, why } => (action, state, why),
            Answer::Failed { kind, why } => {
                return Some(Err(match kind {
                    Kind::Unavailable => ComputeError::Unavailable(why).into(),
                    Kind::NotFinite => Failure::NotFinite(why),
                    Kind::Bug => Failure::Bug(why),
                    Kind::Own => Failure::Refused(why),
                }));
            }
        };
        if let Err(problem) = is_of(&self.bench(job), &self.order(job), &action) {
            return wrong(problem);
        }
        let payload: ArmPayload = match action.read() {
            Ok(payload) => payload,
            Err(error) => return wrong(format!("its job's record cannot be read: {error}")),
        };
        let kept = payload.command.as_ref().is_none_or(|command| command.accepted);
        let here =
            || self.store.find(&action.key).is_some_and(|found| found.object == action.object);
        if kept && !here() {
            return wrong(
                "its job says that it is done, and the cache does not hold the result; is the \
                 folder of runs the same on every node?"
                    .to_owned(),
            );
        }
        if kept {
            self.plan.note_measured(&action);
            self.store.share(&action.key);
        }
        if shared {
            state = ArmState::Reused;
            why = "another stage of this run computed it".to_owned();
        }
        let stored = Box::new(Stored { action: *action, payload, output: None });
        Some(Ok(Outcome::Arm { stored, state, why }))
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
            (Work::Arm(arm), Err(Failure::Compute(ComputeError::Unavailable(why)))) => {
                self.arm_finished(stage, arm, ArmState::Unmeasured, why, seconds, sink);
            }
            (Work::Arm(arm), Err(Failure::Compute(ComputeError::NotFinite(model)))) => {
                let why = model.to_string();
                self.progress[stage].failure = Some(format!("no arm is at fault: {why}"));
                self.arm_finished(stage, arm, ArmState::Error, why, seconds, sink);
            }
            (Work::Arm(arm), Err(Failure::NotFinite(why))) => {
                self.progress[stage].failure = Some(format!("no arm is at fault: {why}"));
                self.arm_finished(stage, arm, ArmState::Error, why, seconds, sink);
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
        self.stop_running(done, State::Done);
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
        let definition = self.plan.stages[stage].stage;
        if let Some(stored) = self.progress[stage].results.get(&arm) {
            record.arithmetic = Some(stored.payload.arithmetic.clone());
            record.gemms = stored.payload.gemms.clone();
            record.seconds = Some(stored.payload.seconds);
            record.key = Some(stored.action.key.0.clone());
            record.object = stored.action.object.clone();
            record.machine = stored.action.machine.clone();
            let mut fields = stored.action.fields.iter();
            record.gpu = fields.find(|(name, _)| name == "gpu").map(|(_, gpu)| gpu.clone());
            let multiplies = matches!(definition.op, Op::Forward { .. } | Op::Matmul { .. });
            if arm == Arm::Emulated && multiplies && definition.emulates().is_none() {
                let mut fields = stored.action.fields.iter();
                let chip = fields.find(|(name, _)| name == "chip").and_then(|(_, name)| {
                    ChipName::ALL.into_iter().find(|chip| chip.name() == name.trim_matches('"'))
                });
                let chip = chip.unwrap_or(definition.recipe.chip);
                record.basis = Emulated::basis(&definition.recipe, chip);
            }
            record.facts = facts_of(&stored.action.fields);
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
        let mut absent: BTreeMap<Arm, String> = progress
            .arms
            .iter()
            .filter(|(_, record)| record.state == ArmState::Unmeasured)
            .map(|(arm, record)| (*arm, record.why.clone()))
            .collect();
        let basis = progress.arms.get(&Arm::Emulated).and_then(|arm| arm.basis.clone());
        let too_weak = basis
            .as_ref()
            .filter(|basis| contract.evidence.is_some_and(|least| basis.evidence > least));
        if let (Some(Basis { evidence, source }), Some(least)) = (too_weak, contract.evidence) {
            let reason = format!(
                "its arithmetic is {evidence} ({source}), and the contract asks for `evidence = \
                 \"{least}\"`"
            );
            absent.insert(Arm::Emulated, reason);
            let of_emulated = |stream: Stream| stream.arm() == Arm::Emulated;
            let measures = &mut progress.measures.measures;
            measures
                .retain(|measure| ![measure.subject, measure.judge].into_iter().any(of_emulated));
        }
        let too_weak_is_none = too_weak.is_none();
        let required = absent.iter().find(|(arm, _)| self.options.require.contains(arm));
        let mut judged = judge(&contract, &progress.measures.measures, &definition.arms, &absent);
        let diagnosis = progress.measures.diagnoses.first();
        let first = First::of(&judged.judgements, &progress.measures.measures).map(|first| {
            let cause = diagnosis.and_then(|d| d.cause()).map(|fit| fit.cause.clone());
            First { cause, ..first }
        });
        reason(&mut judged, &progress.measures, diagnosis);
        missing::say(&mut judged, prepared, &progress.measures);
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
        let fit = match definition.emulates() {
            Some(op::Engine::LlamaCpp) => fit::in_words(
                &progress.measures.measures,
                "the engine's activations are quantised to 8 bits",
            ),
            None => None,
        };
        if let Some(fit) = fit {
            judged.why = format!("{fit}; {}", judged.why);
        }
        // What a verdict rests on is said where no chip of the kind was seen to do it.
        let unseen = basis.filter(|basis| basis.evidence > Evidence::Vectors && too_weak_is_none);
        if let Some(Basis { evidence, source }) = unseen {
            judged.why += &format!("; what this chip computes is {evidence}: {source}");
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
            first: first.filter(|_| matches!(judged.verdict, Verdict::Structural | Verdict::Drift)),
            seconds,
            arms: progress.arms.clone(),
            judgements: judged.judgements,
            measures: std::mem::take(&mut progress.measures.measures),
            greedy: std::mem::take(&mut progress.measures.greedy),
            accounts: std::mem::take(&mut progress.measures.accounts),
            shares: std::mem::take(&mut progress.measures.shares),
            growth: std::mem::take(&mut progress.measures.growth),
            diagnoses: std::mem::take(&mut progress.measures.diagnoses),
            kernels: std::mem::take(&mut progress.measures.kernels),
            costs: std::mem::take(&mut progress.measures.costs),
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
/// What of the machine and of the runner's own sources a result depends on: the fields that the
/// plan writes from `code` on, before the op.
fn facts_of(fields: &[(String, String)]) -> BTreeMap<String, String> {
    let facts = fields.iter().skip_while(|(name, _)| name != "code");
    facts.take_while(|(name, _)| name != "op").cloned().collect()
}

fn outcome_in_words(record: &CommandRecord, why: &str, store: &Store) -> String {
    let mut parts = vec![format!("status {}", record.status)];
    if !record.outputs.is_empty() {
        parts.push(match record.outputs.as_slice() {
            [one] => format!("wrote {}", one.path),
            many => format!("wrote {} files", many.len()),
        });
    }
    parts.extend(record.flaky.as_ref().map(ToString::to_string));
    parts.extend(Some(why.to_owned()).filter(|why| !why.is_empty()));
    if !record.accepted {
        let said = command::last_words(record, store);
        parts.extend(said.map(|said| format!("it said: {said}")));
    }
    parts.join("; ")
}

/// Sites that an arm will make, for a progress bar.
fn expected_sites(prepared: &PreparedStage<'_>) -> u64 {
    match &prepared.stage.op {
        Op::Forward { repeats, kv_cache, .. } => {
            let Some(model) = &prepared.model else { return 0 };
            let sites = crate::compute::flow::sites(&model.model, *kv_cache).count();
            sites as u64 * u64::from(*repeats)
        }
        Op::Matmul { weights, .. } => weights.len() as u64,
        _ => 1,
    }
}

/// What a thread is handed.
struct Handed<'a> {
    bench: Bench<'a>,
    job: usize,
    order: Order,
}

/// A thread: one job after the other, until there are none.
fn serve(orders: &Mutex<Receiver<Handed<'_>>>, sender: &Sender<Message>) {
    loop {
        let handed = orders.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Handed { bench, job, order }) = handed else { return };
        work(&bench, job, order, sender);
    }
}

/// One job, which has been handed out already.
fn serve_one(orders: &Mutex<Receiver<Handed<'_>>>, sender: &Sender<Message>) {
    let handed = orders.lock().unwrap_or_else(PoisonError::into_inner).try_recv();
    if let Ok(Handed { bench, job, order }) = handed {
        work(&bench, job, order, sender);
    }
}

fn work(bench: &Bench<'_>, job: usize, order: Order, sender: &Sender<Message>) {
    let started = Instant::now();
    let outcome = attempt(bench, order, &mut |news| {
        // Nobody listens any more only when the run is over.
        let _ = sender.send(Message::News { job, news });
    });
    let seconds = started.elapsed().as_secs_f64();
    let _ = sender.send(Message::Done { job, outcome, seconds });
}

/// Carries out an order with the threads that its stage may have. A panic is a bug of ours.
fn attempt(
    bench: &Bench<'_>,
    order: Order,
    tell: &mut (dyn FnMut(News) + Send),
) -> Result<Outcome, Failure> {
    let attempt = AssertUnwindSafe(|| {
        let attempt = || match order {
            Order::Arm { arm, inputs } => bench.arm(arm, &inputs, tell),
            Order::Measure { inputs, results } => bench.measure(&inputs, results),
        };
        // A command computes nothing here, and more threads than cores gain nothing.
        let stage = bench.prepared.stage;
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = stage.resources.threads.map(|threads| threads.get().min(cores));
        // Nor is anything computed of what is only looked for.
        match threads.filter(|_| stage.op.command().is_none() && bench.computes) {
            None => attempt(),
            Some(threads) => match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
                Ok(pool) => pool.install(attempt),
                Err(error) => Err(Failure::Refused(no_threads(threads, &error))),
            },
        }
    });
    catch_unwind(attempt).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(Failure::Bug(text.unwrap_or_else(|| "a panic without a message".to_owned())))
    })
}
