//! The table at the end of a run: one line per stage, one for the run.

use std::fmt::Write;

use crate::record::{ArmState, RunRecord, StageRecord};
use crate::text::{one_line, share};

/// The table, as wide as it needs or wrapped to `width` columns.
pub fn table(run: &RunRecord, place: &str, width: usize) -> String {
    let names: Vec<String> =
        run.stages.iter().map(|stage| format!("{}  {}", stage.id, stage.op.name())).collect();
    let name_width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(5);
    const VERDICT_WIDTH: usize = 10;
    const TIME_WIDTH: usize = 9;
    const USED_WIDTH: usize = 8;
    let fixed = name_width + 2 + VERDICT_WIDTH + 2 + TIME_WIDTH + 2 + USED_WIDTH + 2;
    let why_width = width.saturating_sub(fixed).max(30);
    let mut text = String::new();
    let mut line = |name: &str, verdict: &str, time: &str, used: &str, why: &str| {
        let row = format!(
            "{name:name_width$}  {verdict:VERDICT_WIDTH$}  {time:>TIME_WIDTH$}  \
             {used:>USED_WIDTH$}  {why}"
        );
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", row.trim_end());
    };
    line("stage", "verdict", "time", "of bound", "why");
    for (stage, name) in run.stages.iter().zip(&names) {
        let time = if all_reused(stage) { "reused".to_owned() } else { seconds(stage.seconds) };
        let used = stage.decisive().and_then(|judgement| judgement.used);
        let used = used.map_or(String::new(), share);
        for (index, why) in wrapped(&stage.why, why_width).iter().enumerate() {
            if index == 0 {
                line(name, stage.verdict.name(), &time, &used, why);
            } else {
                line("", "", "", "", why);
            }
        }
    }
    for family in &run.families {
        let name = format!("{}  x {}", family.id, family.stages.len());
        for (index, why) in wrapped(&family.why, why_width).iter().enumerate() {
            let (name, verdict) =
                if index == 0 { (&*name, family.verdict.name()) } else { ("", "") };
            line(name, verdict, "", "", why);
        }
    }
    let reused = run.stages.iter().all(all_reused) && !run.stages.is_empty();
    let note = if run.interrupted {
        "stopped on request"
    } else if reused {
        "everything was reused; nothing had to be computed"
    } else {
        ""
    };
    let _ = writeln!(text);
    let _ = write!(text, "run: {} in {}    {place}", run.verdict, seconds(run.seconds));
    if !note.is_empty() {
        let _ = write!(text, "\n{note}");
    }
    text.push('\n');
    text
}

fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 9.95 => format!("{s:.2} s"),
        s if s < 600.0 => format!("{s:.0} s"),
        s => format!("{:.0} min", s / 60.0),
    }
}

/// Whether no arm had to be computed, and at least one result was reused.
fn all_reused(stage: &StageRecord) -> bool {
    let mut states = stage.arms.values().map(|arm| arm.state);
    let computed = |state: &ArmState| *state == ArmState::Ran || *state == ArmState::Error;
    stage.arms.values().any(|arm| arm.state == ArmState::Reused) && !states.any(|s| computed(&s))
}

/// Words in lines of at most `width` columns.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    // What moves a terminal's cursor is no part of a reason.
    let text = one_line(text);
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().map(|line| line.chars().count()).unwrap_or(0);
        if last > 0 && last + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::wrapped;

    #[test]
    fn words_are_kept_whole_and_lines_short() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("incomprehensibilities a", 5), ["incomprehensibilities", "a"]);
        assert_eq!(wrapped("", 5), [""]);
    }
}
