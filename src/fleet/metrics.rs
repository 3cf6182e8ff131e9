//! A fleet's report as an OpenMetrics text, with the machine as a label.
//!
//! Format: OpenMetrics 1.0. Labels come from other machines' records, so they are escaped.

use std::fmt::Write;

use super::Report;
use super::trends::Kind;
use crate::nightly::metrics::{VERDICTS, escaped};

/// The text; it ends with `# EOF`.
pub fn open_metrics(report: &Report, moment: i64) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let mut line = |args: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{args}");
    };
    let mut family = |name: &str, help: &str, samples: Vec<(String, f64)>| {
        line(format_args!("# TYPE runner_fleet_{name} gauge"));
        line(format_args!("# HELP runner_fleet_{name} {help}"));
        for (labels, value) in samples {
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            line(format_args!("runner_fleet_{name}{labels} {value}"));
        }
    };
    let machine = |name: &str| format!("machine=\"{}\"", escaped(name));
    let mut info = Vec::new();
    let mut reported = Vec::new();
    for one in &report.machines {
        let fact = |name: &str| escaped(one.facts.get(name).map_or("", String::as_str));
        let labels = format!(
            "{},gpu=\"{}\",driver=\"{}\",cublaslt=\"{}\",runner=\"{}\"",
            machine(&one.name),
            escaped(one.gpu.as_deref().unwrap_or_default()),
            fact("driver"),
            fact("cuBLASLt"),
            fact("runner")
        );
        info.push((labels, 1.0));
        let missing = report.missing.iter().any(|missing| missing.machine == one.name);
        reported.push((machine(&one.name), if missing { 0.0 } else { 1.0 }));
    }
    let never = report.missing.iter().filter(|missing| missing.last.is_none());
    reported.extend(never.map(|missing| (machine(&missing.machine), 0.0)));
    family("machine_info", "1, with what the machine is.", info);
    family("machine_reported", "1 where a machine reported in time, else 0.", reported);
    let mut verdicts = Vec::new();
    let mut differs = Vec::new();
    for row in &report.stages {
        for cell in &row.cells {
            let labels = format!("{},stage=\"{}\"", machine(&cell.machine), escaped(&row.stage));
            for verdict in VERDICTS {
                let value = f64::from(u8::from(cell.verdict == verdict));
                verdicts.push((format!("{labels},verdict=\"{verdict}\""), value));
            }
            differs.push((labels, f64::from(u8::from(cell.differs))));
        }
    }
    family("stage_verdict", "1 for the verdict that a stage has on a machine.", verdicts);
    family("stage_differs", "1 where verdict or bits are others than on most machines.", differs);
    let new = report.findings.iter().filter(|finding| finding.new).count();
    let moved = report.trends.iter().filter(|trend| trend.kind != Kind::Flat).count();
    for (name, help, count) in [
        ("findings", "Groups of machines that differ from most.", report.findings.len()),
        ("new_findings", "Those that began on the last night.", new),
        ("unsteady_arms", "Arms that made other bits under the same key.", report.unsteady.len()),
        ("moving_values", "Claims whose value moves on a kind of chip.", moved),
        ("missing_machines", "Machines that did not report.", report.missing.len()),
        ("left_out_files", "Files that could not be read, or say nothing.", report.left_out.len()),
    ] {
        family(name, help, vec![(String::new(), count as f64)]);
    }
    family("exit_code", "As the command's.", vec![(String::new(), f64::from(report.exit_code))]);
    line(format_args!("# TYPE runner_fleet_report_timestamp_seconds gauge"));
    line(format_args!("# UNIT runner_fleet_report_timestamp_seconds seconds"));
    line(format_args!("runner_fleet_report_timestamp_seconds {moment}"));
    line(format_args!("# EOF"));
    text
}
