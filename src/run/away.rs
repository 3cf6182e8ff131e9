//! Items of a run that are done elsewhere: what a job is told, and what it answers.
//!
//! A job does one item with the very code that would do it here, into the same cache. What
//! comes back is the record of what it kept; verdicts are made here, from it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::bench::{Bench, Failure, Order, Outcome, Stored, Supplies};
use super::{Options, Work, attempt};
use crate::cache::{Action, KeyWalk, Store};
use crate::compute::arms::Workshop;
use crate::compute::{ComputeError, Pass};
use crate::executor::SlotError;
use crate::executor::slurm::Item;
use crate::interrupt;
use crate::op::{Arm, ChipName, InputRef, Op, Recipe, StageId};
use crate::plan::{ArmPayload, Plan, PreparedStage};
use crate::record::ArmState;

/// What a job is told of one item.
#[derive(Serialize, Deserialize)]
pub struct Errand {
    /// The stage.
    pub stage: StageId,
    /// Whether it is judged, or only makes an input.
    pub judged: bool,
    /// The arm; none where the stage's arms are measured.
    arm: Option<Arm>,
    /// The hash of the stage and its contract as the plan knew them.
    definition: String,
    /// What it reads of other stages.
    inputs: Vec<(InputRef, Action)>,
    /// What its arms made, where they are measured.
    results: Vec<(Arm, Action)>,
}

/// What a job answers.
#[derive(Serialize, Deserialize)]
pub enum Answer {
    /// The arm's record.
    Arm {
        /// What was kept; of a command that ended badly, what was not.
        action: Box<Action>,
        /// Whether it ran.
        state: ArmState,
        /// Why.
        why: String,
    },
    /// The measures are in the cache.
    Measured,
    /// The item has no result.
    Failed {
        /// What kind of failure.
        kind: Kind,
        /// The reason.
        why: String,
    },
}

/// What kind of failure an item met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The arm cannot run there.
    Unavailable,
    /// The model holds NaN or infinities.
    NotFinite,
    /// A bug of ours.
    Bug,
    /// Anything else that is the stage's own.
    Own,
}

/// The hash of a stage and its contract: a job works on what the plan knew, or not at all.
fn definition(plan: &Plan<'_>, prepared: &PreparedStage<'_>) -> String {
    let mut walk = KeyWalk::new("definition");
    walk.field("stage", serde_json::json!(prepared.stage));
    walk.field("tokens", serde_json::json!(prepared.tokens));
    let contract = plan.pipeline.contracts.get(&prepared.stage.contract);
    walk.field("contract", serde_json::json!(contract));
    walk.key().0
}

/// A workshop that says nothing of the machine: what is known of a key before a job has one.
struct Anywhere<'a>(&'a dyn Workshop);

impl Workshop for Anywhere<'_> {
    fn name(&self, arm: Arm) -> String {
        self.0.name(arm)
    }

    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
        self.0.ops(arm, recipe)
    }

    fn unavailable(&self, arm: Arm, recipe: &Recipe) -> Option<String> {
        self.0.unavailable(arm, recipe)
    }
}

/// Whether an arm's result depends on the machine that computes it: then only that machine
/// knows its key, and the GPUs of the stage are its.
pub(super) fn is_of_its_machine(prepared: &PreparedStage<'_>, arm: Arm) -> bool {
    let stage = prepared.stage;
    match arm {
        Arm::Device | Arm::External => true,
        // The chip that it follows is that of the GPU there.
        Arm::Emulated => stage.recipe.chip == ChipName::Auto && stage.arms.contains(&Arm::Device),
        Arm::Reference | Arm::Recorded | Arm::Command => false,
    }
}

/// Whether work may use a stage's GPUs.
pub fn is_on_gpu(prepared: &PreparedStage<'_>, arm: Option<Arm>) -> bool {
    arm.is_some_and(|arm| arm == Arm::Command || is_of_its_machine(prepared, arm))
}

/// The item that a job is to do for an order.
pub(super) fn item(
    bench: &Bench<'_>,
    ticket: usize,
    work: Work,
    order: &Order,
) -> Result<Item, Failure> {
    let Bench { plan, prepared, .. } = bench;
    let stage = prepared.stage;
    let actions = |supplies: &Supplies| {
        supplies.iter().map(|(input, stored)| (input.clone(), stored.action.clone())).collect()
    };
    let (arm, inputs, results) = match order {
        Order::Arm { arm, inputs } => (Some(*arm), actions(inputs), Vec::new()),
        Order::Measure { inputs, results } => {
            let results = results.iter().map(|(arm, stored)| (*arm, stored.action.clone()));
            (None, actions(inputs), results.collect())
        }
    };
    let mut key = KeyWalk::new("item");
    key.field("key", known(bench, order)?.key().0);
    key.field("force", plan.force && prepared.judged);
    key.field("fresh", arm.is_some_and(|arm| plan.fresh.contains(&arm)));
    let executor = &stage.executor;
    if arm.is_some_and(|arm| is_of_its_machine(prepared, arm)) {
        let kind = [&executor.partition, &executor.constraint, &executor.gpu];
        key.field("machine", serde_json::json!(kind));
    }
    let errand = Errand {
        stage: stage.id.clone(),
        judged: prepared.judged,
        arm,
        definition: definition(plan, prepared),
        inputs,
        results,
    };
    let what = match work {
        Work::Arm(arm) => arm.to_string(),
        Work::Measure => "measures".to_owned(),
    };
    Ok(Item {
        ticket,
        key: key.key().0,
        name: format!("{} {what}", stage.id),
        resources: stage.resources.clone(),
        on_gpu: is_on_gpu(prepared, arm),
        executor: executor.clone(),
        order: encoded(&errand)?,
    })
}

/// Makes sure that what an order reads is in the shared cache.
pub(super) fn bring_along(store: &Store, order: &Order) -> Result<(), Failure> {
    let actions = order.reads();
    for action in actions {
        store.send_now(&action.key).map_err(|problem| {
            Failure::Refused(format!(
                "its nodes see no folder of this machine, and what it reads cannot be brought to \
                 them: {problem}"
            ))
        })?;
    }
    Ok(())
}

/// The fields of what an order makes, as far as they are known on any machine.
fn known(bench: &Bench<'_>, order: &Order) -> Result<KeyWalk, Failure> {
    match order {
        Order::Arm { arm, inputs } => {
            bench.known_fields(*arm, inputs, &Anywhere(bench.options.workshop))
        }
        Order::Measure { results, .. } => Ok(bench.measures_key(results)),
    }
}

/// Whether a job's record is of what was asked for: every field that was known says the same.
pub(super) fn is_of(bench: &Bench<'_>, order: &Order, action: &Action) -> Result<(), String> {
    let Order::Arm { arm, .. } = order else { return Ok(()) };
    // What a command sees is its node's: the program that a name leads to, for one.
    if *arm == Arm::Command {
        return Ok(());
    }
    let known = known(bench, order).map_err(|error| error.to_string())?;
    match known.fields().iter().find(|field| !action.fields.contains(field)) {
        None => Ok(()),
        Some((name, _)) => Err(format!(
            "its job computed with another `{name}` than this runner plans with; is it the same \
             file on every node? Nothing of it is used"
        )),
    }
}

fn encoded<T: Serialize>(value: &T) -> Result<Box<RawValue>, Failure> {
    to_raw_value(value).map_err(|error| Failure::Bug(format!("an item cannot be encoded: {error}")))
}

/// Does an errand in a job; nothing where somebody asked it to stop.
pub fn carry_out(
    plan: &Plan<'_>,
    store: &Store,
    options: &Options<'_>,
    errand: Errand,
) -> Option<(Box<RawValue>, f64)> {
    let started = Instant::now();
    let answer = match answer(plan, store, options, errand) {
        Ok(answer) => answer,
        Err(failure) if is_of_a_stop(&failure) => return None,
        Err(failure) => {
            let kind = match &failure {
                Failure::Compute(ComputeError::Unavailable(_)) => Kind::Unavailable,
                Failure::Compute(ComputeError::NotFinite(_)) => Kind::NotFinite,
                Failure::Bug(_) => Kind::Bug,
                _ => Kind::Own,
            };
            let why = match failure {
                Failure::Bug(text) => text,
                failure => failure.to_string(),
            };
            Answer::Failed { kind, why }
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    let encoded = to_raw_value(&answer).or_else(|error| {
        let why = format!("an answer cannot be encoded: {error}");
        to_raw_value(&Answer::Failed { kind: Kind::Bug, why })
    });
    encoded.ok().map(|answer| (answer, seconds))
}

/// Whether a failure is no failure of the item: its job is told to end. The signal goes to all
/// processes of the job, and a program's end may be seen first.
fn is_of_a_stop(failure: &Failure) -> bool {
    const SOON: Duration = Duration::from_millis(500);
    match failure {
        Failure::Compute(ComputeError::Interrupted) | Failure::Slots(SlotError::Stopped) => true,
        Failure::Command(_) | Failure::External(_) => {
            if !interrupt::requested() {
                std::thread::sleep(SOON);
            }
            interrupt::requested()
        }
        _ => interrupt::requested(),
    }
}

fn answer(
    plan: &Plan<'_>,
    store: &Store,
    options: &Options<'_>,
    errand: Errand,
) -> Result<Answer, Failure> {
    let Errand { stage, arm, inputs, results, .. } = errand;
    let prepared = plan.stages.iter().find(|prepared| prepared.stage.id == stage);
    let Some(prepared) = prepared.filter(|p| definition(plan, p) == errand.definition) else {
        return Err(Failure::Refused(format!(
            "stage {stage} or its contract is not what it was when its job was submitted: \
             somebody changed the manifest, or this node sees another one; run again"
        )));
    };
    let stored = |action: Action| {
        let payload: ArmPayload = action
            .read()
            .map_err(|error| Failure::Record(action.key.0.clone(), error.to_string()))?;
        Ok::<Stored, Failure>(Stored { action, payload, output: None })
    };
    let inputs = inputs.into_iter().map(|(input, action)| Ok((input, stored(action)?)));
    let inputs: Supplies = inputs.collect::<Result<_, Failure>>()?;
    let order = match arm {
        Some(arm) => {
            let recipe = &prepared.stage.recipe;
            let computes = !matches!(prepared.stage.op, Op::Compare { .. });
            let unavailable = options.workshop.unavailable(arm, recipe);
            if let Some(why) = unavailable.filter(|_| computes) {
                return Err(ComputeError::Unavailable(why).into());
            }
            Order::Arm { arm, inputs }
        }
        None => {
            let results = results.into_iter().map(|(arm, action)| Ok((arm, stored(action)?)));
            let results: BTreeMap<Arm, Stored> = results.collect::<Result<_, Failure>>()?;
            Order::Measure { inputs, results }
        }
    };
    // Where this node sees no folder of the runner's, it has nothing of it yet.
    let alone = store.remote().is_some();
    if alone {
        for action in order.reads() {
            if store.find(&action.key).is_none() {
                return Err(Failure::Refused(format!(
                    "the shared cache does not hold what it reads, the result under {}; was it \
                     cleared meanwhile? Run again",
                    action.key.0
                )));
            }
        }
    }
    // What this node's cache has, and the shared one not, is sent too.
    let bench = Bench { plan, store, options, prepared, computes: true, returned: alone };
    let outcome = attempt(&bench, order, &mut |_| {})?;
    if alone {
        // Its runner can read it nowhere else.
        let sent = store.settled();
        if let Outcome::Arm { stored, .. } = &outcome {
            store.send_now(&stored.action.key).map_err(Failure::Refused)?;
        }
        if let Some(sent) = sent.filter(|sent| sent.unsent > 0) {
            return Err(Failure::Refused(sent.problems.join("; ")));
        }
    }
    Ok(match outcome {
        Outcome::Arm { stored, mut state, mut why } => {
            let action = Box::new(stored.action);
            if state == ArmState::Reused && action.run == options.run {
                // An earlier start of this job kept it, and was ended before it could say so.
                state = ArmState::Ran;
                why = "not in the cache; its job was started again after it".to_owned();
            }
            Answer::Arm { action, state, why }
        }
        Outcome::Measures(_) => Answer::Measured,
    })
}
