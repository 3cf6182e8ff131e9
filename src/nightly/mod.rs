//! What unattended runs need: a baseline and the run before, what changed since, a summary for
//! whatever sends messages, metrics for a monitoring system, old runs removed.
//!
//! It reads records of runs. It knows neither tensors nor how a verdict is made.

pub mod baseline;
mod changes;
pub mod metrics;
pub mod past;
pub mod retention;

pub use changes::changes;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::manifest::problem::plural;
use crate::op::Arm;
use crate::record::{ArmState, RunRecord, Series};
use crate::text::one_line;
use crate::verdict::Verdict;

/// The version of [`Summary`].
/// 1: the first format.
const SCHEMA: u32 = 1;

/// The file's name, beside run.json.
pub const SUMMARY: &str = "summary.json";

/// What a message says of a run; [`SUMMARY`] beside its run.json. A run that came to no end has
/// none: then it says why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The format's version.
    pub schema: u32,
    /// The run; nothing where none began.
    pub run: Option<String>,
    /// The gravest verdict.
    pub verdict: Verdict,
    /// The process's exit code.
    pub exit_code: u8,
    /// Whether the user or the system stopped it.
    #[serde(default)]
    pub interrupted: bool,
    /// One line for people.
    pub line: String,
    /// The machine.
    #[serde(default)]
    pub machine: Option<String>,
    /// What the run is one of.
    #[serde(default)]
    pub series: Option<Series>,
    /// CPU and GPU, in words.
    #[serde(default)]
    pub hardware: Option<String>,
    /// Why it did not pass: the gravest stage's reason, or what came in between.
    #[serde(default)]
    pub reason: Option<String>,
    /// Where the gravest stage stops being what its contract claims.
    #[serde(default)]
    pub first: Option<Start>,
    /// The page, as an absolute path.
    #[serde(default)]
    pub page: Option<String>,
    /// For each arm what of it was computed here and now, and what was at hand.
    #[serde(default)]
    pub arms: BTreeMap<Arm, Counted>,
    /// The run before of the same stages and models on this machine.
    #[serde(default)]
    pub previous: Option<String>,
    /// What changed since that.
    #[serde(default)]
    pub changes_since_previous: Vec<String>,
    /// The baseline that it was held against, if there is one for its stages, models and hardware.
    pub baseline: Option<String>,
    /// What changed since the baseline.
    pub changes: Vec<String>,
    /// What of earlier runs could not be read, so that nothing is said of it, and what of this one
    /// could not be written.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// Where something starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The stage.
    pub stage: String,
    /// The first site.
    pub site: String,
    /// What it is, where that has a name.
    pub cause: Option<String>,
}

/// How many stages an arm was computed for, and for how many its result was there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Computed by this run.
    pub ran: usize,
    /// At hand.
    pub reused: usize,
    /// Neither.
    pub without: usize,
}

/// The runs that another one is held against.
#[derive(Clone, Debug, Default)]
pub struct Earlier {
    /// The baseline of its stages, models and hardware.
    pub baseline: Option<RunRecord>,
    /// The run before, on the same machine.
    pub previous: Option<RunRecord>,
    /// What of them could not be read.
    pub problems: Vec<String>,
}

/// Finds what a run is held against. The run before is looked for if `look_back` says so or there
/// is a baseline.
pub fn earlier(run: &RunRecord, runs: &Path, look_back: bool) -> Earlier {
    let mut problems = Vec::new();
    let baseline = baseline::of(run, runs).unwrap_or_else(|problem| {
        problems.push(problem);
        None
    });
    let previous = match look_back || baseline.is_some() {
        false => None,
        true => match past::before(run, runs) {
            Ok((previous, unread)) => {
                problems.extend(unread);
                previous
            }
            Err(problem) => {
                problems.push(problem);
                None
            }
        },
    };
    Earlier { baseline, previous, problems }
}

/// Sums a run up.
pub fn sum_up(run: &RunRecord, runs: &Path, earlier: &Earlier) -> Summary {
    let Earlier { baseline, previous, problems } = earlier;
    let since = |earlier: &Option<RunRecord>| {
        earlier.as_ref().map_or(Vec::new(), |earlier| changes(earlier, run))
    };
    let (changes, changes_since_previous) = (since(baseline), since(previous));
    let gravest = run.stages.iter().find(|stage| stage.verdict == run.verdict);
    let gravest = gravest.filter(|stage| stage.verdict != Verdict::Pass);
    let first = gravest.and_then(|stage| {
        let first = stage.first.as_ref()?;
        let (stage, site) = (stage.id.to_string(), first.site.to_string());
        Some(Start { stage, site, cause: first.cause.clone() })
    });
    let reason = match run.interrupted {
        true => Some("stopped on request".to_owned()),
        false => gravest.map(|stage| format!("{}: {}", stage.id, one_line(&stage.why))),
    };
    let page = runs.join(&run.id).join("report.html");
    let page = page.is_file().then(|| std::path::absolute(page).ok()).flatten();
    let mut summary = Summary {
        schema: SCHEMA,
        run: Some(run.id.clone()),
        verdict: run.verdict,
        exit_code: run.exit_code,
        interrupted: run.interrupted,
        line: String::new(),
        machine: run.provenance.machine.clone(),
        series: run.series.clone(),
        hardware: Some(baseline::hardware(run)),
        reason,
        first,
        page: page.map(|page| page.display().to_string()),
        arms: counted(run),
        previous: previous.as_ref().map(|previous| previous.id.clone()),
        changes_since_previous,
        baseline: baseline.as_ref().map(|baseline| baseline.id.clone()),
        changes,
        problems: problems.clone(),
    };
    summary.line = one_line(&line(&summary, run));
    summary
}

/// What is said where a run could not be made, or came to no end.
pub fn failed(text: &str, exit_code: u8, interrupted: bool, machine: &str) -> Summary {
    let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason was given");
    let reason = first.strip_prefix("error: ").unwrap_or(first);
    Summary {
        schema: SCHEMA,
        run: None,
        verdict: Verdict::Error,
        exit_code,
        interrupted,
        line: format!("runner on {machine}: error, no stage was judged; {}", one_line(reason)),
        machine: Some(machine.to_owned()),
        series: None,
        hardware: None,
        reason: Some(text.trim_end().to_owned()),
        first: None,
        page: None,
        arms: BTreeMap::new(),
        previous: None,
        changes_since_previous: Vec::new(),
        baseline: None,
        changes: Vec::new(),
        problems: Vec::new(),
    }
}

/// What became of each arm, by stages.
fn counted(run: &RunRecord) -> BTreeMap<Arm, Counted> {
    let mut arms: BTreeMap<Arm, Counted> = BTreeMap::new();
    for (arm, record) in run.stages.iter().flat_map(|stage| &stage.arms) {
        let counted = arms.entry(*arm).or_default();
        match record.state {
            ArmState::Ran => counted.ran += 1,
            ArmState::Reused => counted.reused += 1,
            ArmState::Unmeasured | ArmState::Error | ArmState::Blocked => counted.without += 1,
        }
    }
    arms
}

/// Machine, verdict, where and what, and what is new.
fn line(summary: &Summary, run: &RunRecord) -> String {
    let machine = summary.machine.as_ref().map_or(String::new(), |name| format!(" on {name}"));
    let passed = run.stages.iter().filter(|stage| stage.verdict == Verdict::Pass).count();
    let stopped = if summary.interrupted { ", stopped" } else { "" };
    let count = run.stages.len();
    let mut parts =
        vec![format!("runner{machine}: {}{stopped}, {passed} of {count} stages pass", run.verdict)];
    match &summary.first {
        Some(Start { stage, site, cause: Some(cause) }) => {
            parts.push(format!("{stage} at {site}: {cause}"));
        }
        Some(Start { stage, site, cause: None }) => parts.push(format!("{stage} at {site}")),
        None if summary.interrupted => {}
        None => parts.extend(summary.reason.clone()),
    }
    let unseen = |counted: &Counted| counted.ran + counted.reused == 0;
    let unseen = summary.arms.iter().filter(|(_, counted)| unseen(counted));
    let unseen: Vec<&str> = unseen.map(|(arm, _)| arm.name()).collect();
    if !unseen.is_empty() {
        parts.push(format!("{} not measured", unseen.join(" and ")));
    }
    let since = |changes: &[String], whom: &str| match changes.len() {
        0 => format!("nothing changed since {whom}"),
        count => format!("{} since {whom}", plural(count, "change")),
    };
    if let Some(previous) =
        summary.previous.as_ref().filter(|_| summary.previous != summary.baseline)
    {
        parts.push(since(&summary.changes_since_previous, previous));
    }
    parts.push(match &summary.baseline {
        Some(baseline) => format!("baseline: {}", since(&summary.changes, baseline)),
        None if !summary.problems.is_empty() => {
            format!("an earlier run cannot be read: {}", summary.problems[0])
        }
        None => "no baseline for these stages, models and hardware".to_owned(),
    });
    parts.join("; ")
}
