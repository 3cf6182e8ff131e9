//! A run as an OpenMetrics text, for node_exporter's textfile collector.
//!
//! Format: OpenMetrics 1.0. Labels come from manifests, so they are escaped.

use std::fmt::Write;

use crate::record::RunRecord;
use crate::verdict::Verdict;

/// Every verdict, so that a dashboard sees zeros too.
const VERDICTS: [Verdict; 6] = [
    Verdict::Pass,
    Verdict::Drift,
    Verdict::Structural,
    Verdict::Unmeasured,
    Verdict::Blocked,
    Verdict::Error,
];

/// The text; `changes` since the baseline, where there is one. Ends with `# EOF`.
pub fn open_metrics(run: &RunRecord, finished: i64, changes: Option<usize>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |args: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{args}");
    };
    line(format_args!("# TYPE runner_stage_verdict gauge"));
    line(format_args!("# HELP runner_stage_verdict 1 for the verdict that a stage has."));
    for stage in &run.stages {
        for verdict in VERDICTS {
            let value = u8::from(stage.verdict == verdict);
            let id = escaped(&stage.id.0);
            line(format_args!(
                "runner_stage_verdict{{stage=\"{id}\",verdict=\"{verdict}\"}} {value}"
            ));
        }
    }
    line(format_args!("# TYPE runner_falsifier_used_ratio gauge"));
    line(format_args!(
        "# HELP runner_falsifier_used_ratio Share of its bound that a measure uses; above 1 it is falsified."
    ));
    for stage in &run.stages {
        for judgement in &stage.judgements {
            let Some(used) = judgement.used.filter(|used| used.is_finite()) else { continue };
            let (id, falsifier) = (escaped(&stage.id.0), escaped(&judgement.falsifier));
            line(format_args!(
                "runner_falsifier_used_ratio{{stage=\"{id}\",falsifier=\"{falsifier}\"}} {used}"
            ));
        }
    }
    line(format_args!("# TYPE runner_run_duration_seconds gauge"));
    line(format_args!("# UNIT runner_run_duration_seconds seconds"));
    line(format_args!("runner_run_duration_seconds {}", run.seconds));
    line(format_args!("# TYPE runner_run_exit_code gauge"));
    line(format_args!("runner_run_exit_code {}", run.exit_code));
    line(format_args!("# TYPE runner_run_finished_timestamp_seconds gauge"));
    line(format_args!("# UNIT runner_run_finished_timestamp_seconds seconds"));
    line(format_args!("runner_run_finished_timestamp_seconds {finished}"));
    if let Some(changes) = changes {
        line(format_args!("# TYPE runner_changes_since_baseline gauge"));
        line(format_args!("runner_changes_since_baseline {changes}"));
    }
    line(format_args!("# EOF"));
    text
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
