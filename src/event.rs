//! What happens during a run, as it happens. The engine emits, sinks draw.

use serde::Serialize;

use crate::op::{Arm, StageId};
use crate::record::ArmState;
use crate::verdict::Verdict;

/// Something that happened.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The run began.
    RunStarted {
        /// Its name.
        run: String,
        /// The stages that will be judged.
        stages: Vec<StageId>,
    },
    /// An arm began.
    ArmStarted {
        /// The stage.
        stage: StageId,
        /// The arm.
        arm: Arm,
    },
    /// An arm made a site; for bars, not for the log.
    #[serde(skip)]
    Progress {
        /// The stage.
        stage: StageId,
        /// The arm.
        arm: Arm,
        /// Sites made so far, repeats counted.
        done: u64,
        /// Sites that will be made.
        total: u64,
        /// Bytes of the tensors made so far.
        bytes: u64,
    },
    /// An arm ended.
    ArmFinished {
        /// The stage.
        stage: StageId,
        /// The arm.
        arm: Arm,
        /// What became of it.
        state: ArmState,
        /// Why.
        why: String,
        /// How long it took.
        seconds: f64,
    },
    /// How a job of a scheduler stands that does some of the work.
    Job {
        /// Its number, with that of its task; nothing where it is of all of them.
        job: String,
        /// In a word.
        state: String,
        /// Where it is, if it has a node.
        #[serde(skip_serializing_if = "Option::is_none")]
        node: Option<String>,
        /// More words.
        why: String,
    },
    /// How much of the work stands where; for people who watch, not for the log.
    #[serde(skip)]
    Queue {
        /// In the queue, or to be submitted.
        waiting: usize,
        /// At work.
        running: usize,
        /// Done.
        done: usize,
        /// What most of the waiting wait for.
        why: String,
    },
    /// A stage's measures are being taken.
    Measuring {
        /// The stage.
        stage: StageId,
    },
    /// A stage has its verdict.
    StageJudged {
        /// The stage.
        stage: StageId,
        /// The answer.
        verdict: Verdict,
        /// The reason.
        why: String,
        /// How long the stage took.
        seconds: f64,
    },
    /// The run ended.
    RunFinished {
        /// The gravest verdict.
        verdict: Verdict,
        /// How long it took.
        seconds: f64,
    },
}

/// Receives every event, in order.
pub trait Sink {
    /// Takes one event.
    fn event(&mut self, event: &Event);
}
