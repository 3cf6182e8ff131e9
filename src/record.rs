//! run.json: what a run was, measured and decided.
//!
//! Plain data with a version; whoever reports reads only this. Fields may be
//! added within a version; none is removed or changes its meaning.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::RemoteReport;
use crate::chip::Basis;
use crate::compare::{Account, Cost, Diagnosis, GreedyComparison, Growth, Measure, SiteKernel};
use crate::compute::GemmRecord;
use crate::compute::shares::Shares;
use crate::executor::command::CommandRecord;
use crate::files;
use crate::op::{Arm, Op, Recipe, StageId, Stream};
use crate::plan::{GreedyRecord, SiteRecord};
use crate::text::{Shown, shown};
use crate::verdict::{First, Judgement, Outcome, Verdict, first_falsified};

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
    /// What it is one of: the runs that it is compared with are of the same series.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub series: Option<Series>,
    /// What it had of a cache of many machines, where it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<RemoteReport>,
    /// The stages, in the order in which they ran.
    pub stages: Vec<StageRecord>,
    /// What the members of each `[for]` came to together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub families: Vec<FamilyRecord>,
}

/// The members of one `[for]`, taken together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FamilyRecord {
    /// The manifest's id.
    pub id: StageId,
    /// The members that were judged.
    pub stages: Vec<StageId>,
    /// The gravest of their verdicts.
    pub verdict: Verdict,
    /// How many ended how, and the first that did not pass.
    pub why: String,
}

impl FamilyRecord {
    /// The families among some stages, in their order.
    pub fn of(stages: &[StageRecord]) -> Vec<FamilyRecord> {
        let mut families: Vec<FamilyRecord> = Vec::new();
        for stage in stages {
            let Some(id) = &stage.family else { continue };
            if families.iter().any(|family| family.id == *id) {
                continue;
            }
            let members: Vec<&StageRecord> =
                stages.iter().filter(|member| member.family.as_ref() == Some(id)).collect();
            let verdict = Verdict::of_run(members.iter().map(|member| member.verdict));
            let good = members.iter().filter(|member| member.verdict == Verdict::Pass).count();
            let why = match members.iter().find(|member| member.verdict == verdict) {
                Some(first) if verdict != Verdict::Pass => {
                    format!("{good} of {} pass; {}: {}", members.len(), first.id, first.why)
                }
                _ => format!("all {good} pass"),
            };
            let stages = members.iter().map(|member| member.id.clone()).collect();
            families.push(FamilyRecord { id: id.clone(), stages, verdict, why });
        }
        families
    }
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
    /// The machine's name; runs of earlier runners have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
}

/// What a run has in common with those that may be compared with it; a baseline belongs to
/// it, and to the hardware.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Series {
    /// The stages' folder as seen from the folder of runs, so that both may be moved.
    pub folder: String,
    /// The models of all stages of that folder, those that were not selected too.
    pub models: Vec<String>,
    /// What of it was selected: `--select`'s words, or the profile's; nothing means all.
    pub selection: Option<String>,
}

impl Series {
    /// What a baseline belongs to besides the hardware. What was selected does not matter: of two
    /// selections the stages that both have are compared.
    pub fn kin(&self) -> (&str, &[String]) {
        (&self.folder, &self.models)
    }
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
    /// The manifest with a `[for]` of which it is a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<StageId>,
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
    /// Where it stops being what the contract claims; absent where nothing is falsified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<First>,
    /// From its first action to its verdict.
    pub seconds: f64,
    /// Each arm.
    pub arms: BTreeMap<Arm, ArmRecord>,
    /// Every falsifier.
    pub judgements: Vec<Judgement>,
    /// Every measure.
    #[serde(serialize_with = "crate::compare::measures_json::serialize")]
    pub measures: Vec<Measure>,
    /// Decoded tokens, pair by pair.
    pub greedy: Vec<GreedyComparison>,
    /// Each site's error beside its floor.
    #[serde(default)]
    pub accounts: Vec<Account>,
    /// The shares of each arm's error over all its GEMMs.
    #[serde(default)]
    pub shares: Vec<(Stream, Shares)>,
    /// How each arm's drift grows over the layers.
    #[serde(default)]
    pub growth: Vec<Growth>,
    /// What was found at the first site that the contract falsifies.
    #[serde(default)]
    pub diagnoses: Vec<Diagnosis>,
    /// Which kernel of an engine made each site.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<SiteKernel>,
    /// What the parts of the measures took when they were made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub costs: Vec<Cost>,
}

impl StageRecord {
    /// The judgement that decided the verdict: the first that fell, else the
    /// one that uses most of its bound.
    pub fn decisive(&self) -> Option<&Judgement> {
        first_falsified(&self.judgements, &self.measures).or_else(|| {
            let held = self.judgements.iter().filter(|j| j.outcome == Outcome::Held);
            held.max_by(|a, b| a.used.unwrap_or(0.0).total_cmp(&b.used.unwrap_or(0.0)))
        })
    }
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
    /// What the products of the emulated arm rest on: how well the chip's arithmetic is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub basis: Option<Basis>,
    /// The products, where a library computed them: shapes and algorithms.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gemms: Vec<GemmRecord>,
    /// How long the computation took, when it ran.
    pub seconds: Option<f64>,
    /// The action's key.
    pub key: Option<String>,
    /// The machine that computed it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The GPUs that its result depends on, by model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// What of the machine and of the runner's own sources its result depends on: GPUs, driver,
    /// libraries, chip; runs of earlier runners have none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, String>,
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

/// Why a run cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// There is no file.
    #[error(
        "`{}` has no run.json: the run was cut off{last}; run the stages again, what it finished \
         is in the cache",
        folder.shown()
    )]
    CutOff {
        /// The run's folder.
        folder: PathBuf,
        /// What it did last, as far as events.jsonl tells.
        last: String,
    },
    /// The file or its folder cannot be read.
    #[error(
        "cannot read `{}`: {error}; give another run, or run the stages again",
        path.shown()
    )]
    Unreadable {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It is some other JSON.
    #[error("`{}` is no run.json: it has no stages; give a run's folder or its run.json, or run the stages again", path.shown())]
    NoRun {
        /// Its path.
        path: PathBuf,
    },
    /// It is not a run.
    #[error("`{}` is not a whole run.json: {error}; run the stages again", path.shown())]
    Damaged {
        /// Its path.
        path: PathBuf,
        /// Where reading ended.
        error: serde_json::Error,
    },
    /// It says that this version wrote it, and has something else in it.
    #[error("`{}` is not what this runner writes: {}; run the stages again", path.shown(), shown(problem))]
    Foreign {
        /// Its path.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// Another version of the runner wrote it.
    #[error(
        "`{}` was written by runner {} with schema {}, and this is runner {} with schema \
         {SCHEMA}: {problem}; read it with runner {}",
        path.shown(),
        shown(writer),
        shown(schema),
        env!("CARGO_PKG_VERSION"),
        shown(writer)
    )]
    OtherVersion {
        /// Its path.
        path: PathBuf,
        /// The version that wrote it.
        writer: String,
        /// Its schema.
        schema: String,
        /// What does not fit.
        problem: String,
    },
}

/// The largest run.json that is read: some hundred thousand stages.
pub const LARGEST_RUN: u64 = 4 << 30;

impl RunRecord {
    /// Reads the run in a folder.
    ///
    /// # Errors
    /// If it was cut off, is damaged, or comes from a version that wrote otherwise.
    pub fn read(folder: &Path) -> Result<RunRecord, ReadError> {
        RunRecord::at(folder.join("run.json"), folder)
    }

    /// Reads the run in a file: a run.json, or a receipt.
    ///
    /// # Errors
    /// As [`RunRecord::read`].
    pub fn read_file(file: &Path) -> Result<RunRecord, ReadError> {
        RunRecord::at(file.to_owned(), file)
    }

    fn at(path: PathBuf, folder: &Path) -> Result<RunRecord, ReadError> {
        let text = match files::read_text(&path, LARGEST_RUN) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && folder.is_dir() => {
                let last = last_event(folder);
                return Err(ReadError::CutOff { folder: folder.to_owned(), last });
            }
            Err(error) => return Err(ReadError::Unreadable { path, error }),
        };
        let json: serde_json::Value = match serde_json::from_str(&text) {
            Ok(json) => json,
            Err(error) => return Err(ReadError::Damaged { path, error }),
        };
        if !json["stages"].is_array() {
            return Err(ReadError::NoRun { path });
        }
        let schema = json["schema"].clone();
        let writer = json["provenance"]["runner"].as_str().unwrap_or("unknown").to_owned();
        let other = |problem: String| {
            let schema = schema.to_string();
            ReadError::OtherVersion { path: path.clone(), writer: writer.clone(), schema, problem }
        };
        if schema != SCHEMA {
            return Err(other("the formats differ".to_owned()));
        }
        serde_json::from_value(json).map_err(|error| match writer.as_str() {
            env!("CARGO_PKG_VERSION") => {
                let (path, problem) = (path.clone(), error.to_string());
                ReadError::Foreign { path, problem }
            }
            _ => other(error.to_string()),
        })
    }
}

/// The last line of a run's events, in words.
fn last_event(folder: &Path) -> String {
    let text = files::read_text(&folder.join("events.jsonl"), LARGEST_RUN).unwrap_or_default();
    let mut events = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    let Some(last) = events.next_back() else { return String::new() };
    let last: serde_json::Value = last;
    let word = |key: &str| last[key].as_str().unwrap_or("").to_owned();
    let stage = match word("stage") {
        stage if stage.is_empty() => stage,
        stage => format!(" of stage {stage}"),
    };
    format!(" after `{}`{stage}", word("event"))
}

impl ArmRecord {
    /// An arm without a result.
    pub fn without(state: ArmState, why: String) -> ArmRecord {
        ArmRecord {
            state,
            why,
            arithmetic: None,
            basis: None,
            gemms: Vec::new(),
            seconds: None,
            key: None,
            machine: None,
            gpu: None,
            facts: BTreeMap::new(),
            object: None,
            sites: Vec::new(),
            greedy: None,
            command: None,
        }
    }
}
