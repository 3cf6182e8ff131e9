//! run.json: what a run was, measured and decided.
//!
//! Plain data with a version; whoever reports reads only this. Fields may be
//! added within a version; none is removed or changes its meaning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::compare::{GreedyComparison, Measure};
use crate::compute::GemmRecord;
use crate::executor::command::CommandRecord;
use crate::op::{Arm, Op, Recipe, StageId};
use crate::plan::{GreedyRecord, SiteRecord};
use crate::verdict::{Judgement, Verdict};

/// The version of [`RunRecord`].
/// 1: the first format.
pub const SCHEMA: u32 = 1;

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The folder's name: UTC time and plan.
    pub id: String,
    /// The gravest verdict of the stages.
    pub verdict: Verdict,
    /// The process's exit code.
    pub exit_code: u8,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// RFC 3339, UTC.
    pub started: String,
    /// How long it took.
    pub seconds: f64,
    /// The stages' folder.
    pub folder: String,
    /// What it ran on.
    pub provenance: Provenance,
    /// The stages, in the order in which they ran.
    pub stages: Vec<StageRecord>,
}

/// What a run ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The runner's version.
    pub runner: String,
    /// The command line.
    pub command: Vec<String>,
    /// Operating system and processor architecture.
    pub platform: String,
    /// The CPU's name, where the system tells it.
    pub cpu: Option<String>,
    /// Threads that compute.
    pub threads: usize,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// The stage.
    pub id: StageId,
    /// Its question.
    pub title: String,
    /// Its manifest.
    pub file: String,
    /// The stages that it needs.
    pub needs: Vec<StageId>,
    /// What it computes.
    pub op: Op,
    /// The model as the manifest names it; empty for a command.
    pub model: String,
    /// The prompt; empty for a command.
    pub tokens: Vec<u32>,
    /// The arithmetic under test.
    pub recipe: Recipe,
    /// The contract's name and version.
    pub contract: [String; 2],
    /// The answer.
    pub verdict: Verdict,
    /// The reason, in one line.
    pub why: String,
    /// From its first action to its verdict.
    pub seconds: f64,
    /// Each arm.
    pub arms: BTreeMap<Arm, ArmRecord>,
    /// Every falsifier.
    pub judgements: Vec<Judgement>,
    /// Every measure.
    pub measures: Vec<Measure>,
    /// Decoded tokens, pair by pair.
    pub greedy: Vec<GreedyComparison>,
}

/// What became of an arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArmState {
    /// It was computed.
    Ran,
    /// Its result was there.
    Reused,
    /// It cannot run here.
    Unmeasured,
    /// It failed.
    Error,
    /// It was not reached.
    Blocked,
}

/// One arm of one stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmRecord {
    /// What became of it.
    pub state: ArmState,
    /// Why it ran, was reused, or did neither.
    pub why: String,
    /// The arithmetic, in words.
    pub arithmetic: Option<String>,
    /// The products, where a library computed them: shapes and algorithms.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gemms: Vec<GemmRecord>,
    /// How long the computation took, when it ran.
    pub seconds: Option<f64>,
    /// The action's key.
    pub key: Option<String>,
    /// The tensors' file in the cache.
    pub object: Option<String>,
    /// The tensors.
    pub sites: Vec<SiteRecord>,
    /// The greedily decoded tokens.
    pub greedy: Option<GreedyRecord>,
    /// What became of a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandRecord>,
}

impl ArmRecord {
    /// An arm without a result.
    pub fn without(state: ArmState, why: String) -> ArmRecord {
        ArmRecord {
            state,
            why,
            arithmetic: None,
            gemms: Vec::new(),
            seconds: None,
            key: None,
            object: None,
            sites: Vec::new(),
            greedy: None,
            command: None,
        }
    }
}
