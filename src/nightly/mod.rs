//! What unattended runs need: a baseline and what changed since, a summary for
//! whatever sends messages, metrics for a monitoring system, old runs removed.
//!
//! It reads records of runs. It knows neither tensors nor how a verdict is made.

pub mod baseline;
pub mod metrics;
pub mod retention;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::record::RunRecord;
use crate::verdict::Verdict;

/// The version of [`Summary`].
/// 1: the first format.
const SCHEMA: u32 = 1;

/// What a message says of a run; `summary.json` beside its run.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The format's version.
    pub schema: u32,
    /// The run.
    pub run: String,
    /// The gravest verdict.
    pub verdict: Verdict,
    /// The process's exit code.
    pub exit_code: u8,
    /// One line for people.
    pub line: String,
    /// The baseline that it was held against, if there is one for this hardware.
    pub baseline: Option<String>,
    /// What changed since the baseline.
    pub changes: Vec<String>,
}

/// Sums a run up against the baseline of this hardware.
///
/// # Errors
/// If a baseline is there and cannot be read.
pub fn sum_up(run: &RunRecord, runs: &Path) -> Result<Summary, String> {
    let baseline = baseline::of(run, runs)?;
    let changes = baseline.as_ref().map_or(Vec::new(), |baseline| baseline::changes(baseline, run));
    let passed = run.stages.iter().filter(|stage| stage.verdict == Verdict::Pass).count();
    let since = match (&baseline, changes.len()) {
        (None, _) => "no baseline for this hardware".to_owned(),
        (Some(baseline), 0) => format!("nothing changed since {}", baseline.id),
        (Some(baseline), 1) => format!("1 change since {}", baseline.id),
        (Some(baseline), count) => format!("{count} changes since {}", baseline.id),
    };
    let line =
        format!("runner: {}, {passed} of {} stages pass; {since}", run.verdict, run.stages.len());
    Ok(Summary {
        schema: SCHEMA,
        run: run.id.clone(),
        verdict: run.verdict,
        exit_code: run.exit_code,
        line,
        baseline: baseline.map(|baseline| baseline.id),
        changes,
    })
}
