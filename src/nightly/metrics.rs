//! A run as an OpenMetrics text, for node_exporter's textfile collector.
//!
//! Format: OpenMetrics 1.0. Labels come from manifests, so they are escaped.

use std::fmt::Write;

use super::Summary;
use crate::record::RunRecord;
use crate::verdict::Verdict;

/// Every verdict, so that a dashboard sees zeros too.
pub const VERDICTS: [Verdict; 6] = [
    Verdict::Pass,
    Verdict::Drift,
    Verdict::Structural,
    Verdict::Unmeasured,
    Verdict::Blocked,
    Verdict::Error,
];

/// The text for what a summary says, and for the stages of its run where there is one. Ends with
/// `# EOF`.
pub fn open_metrics(summary: &Summary, run: Option<&RunRecord>, finished: i64) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |args: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{args}");
    };
    let stages = run.map_or(&[][..], |run| run.stages.as_slice());
    line(format_args!("# TYPE runner_run_info gauge"));
    line(format_args!("# HELP runner_run_info 1, with the run that the other values are of."));
    let word = |text: &Option<String>| escaped(text.as_deref().unwrap_or_default());
    line(format_args!(
        "runner_run_info{{run=\"{}\",machine=\"{}\",verdict=\"{}\",runner=\"{}\"}} 1",
        word(&summary.run),
        word(&summary.machine),
        summary.verdict,
        env!("CARGO_PKG_VERSION")
    ));
    line(format_args!("# TYPE runner_stage_verdict gauge"));
    line(format_args!("# HELP runner_stage_verdict 1 for the verdict that a stage has."));
    for stage in stages {
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
    for stage in stages {
        for judgement in &stage.judgements {
            let Some(used) = judgement.used.filter(|used| used.is_finite()) else { continue };
            let (id, falsifier) = (escaped(&stage.id.0), escaped(&judgement.falsifier));
            line(format_args!(
                "runner_falsifier_used_ratio{{stage=\"{id}\",falsifier=\"{falsifier}\"}} {used}"
            ));
        }
    }
    line(format_args!("# TYPE runner_arms gauge"));
    line(format_args!(
        "# HELP runner_arms Stages whose arm was computed by this run, was at hand, or is missing."
    ));
    for (arm, counted) in &summary.arms {
        let states =
            [("ran", counted.ran), ("reused", counted.reused), ("without", counted.without)];
        for (state, count) in states {
            line(format_args!("runner_arms{{arm=\"{arm}\",state=\"{state}\"}} {count}"));
        }
    }
    if let Some(run) = run {
        line(format_args!("# TYPE runner_run_duration_seconds gauge"));
        line(format_args!("# UNIT runner_run_duration_seconds seconds"));
        line(format_args!("runner_run_duration_seconds {}", run.seconds));
    }
    line(format_args!("# TYPE runner_run_exit_code gauge"));
    line(format_args!("runner_run_exit_code {}", summary.exit_code));
    line(format_args!("# TYPE runner_run_finished_timestamp_seconds gauge"));
    line(format_args!("# UNIT runner_run_finished_timestamp_seconds seconds"));
    line(format_args!("runner_run_finished_timestamp_seconds {finished}"));
    let lists = [
        ("previous", &summary.previous, &summary.changes_since_previous),
        ("baseline", &summary.baseline, &summary.changes),
    ];
    for (name, since, changes) in lists {
        if since.is_some() {
            line(format_args!("# TYPE runner_changes_since_{name} gauge"));
            line(format_args!("runner_changes_since_{name} {}", changes.len()));
        }
    }
    line(format_args!("# EOF"));
    text
}

/// A label's value as the format has it.
pub fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
