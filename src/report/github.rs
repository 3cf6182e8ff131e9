//! GitHub Actions: annotations at the manifests' lines, and the step's summary.

use std::fmt::Write;

use super::places::line;
use crate::record::RunRecord;
use crate::text::{cleaned, share};
use crate::verdict::Verdict;

/// A workflow command for each stage that did not pass.
pub fn annotations(run: &RunRecord) -> String {
    let mut text = String::new();
    for stage in run.stages.iter().filter(|stage| stage.verdict != Verdict::Pass) {
        let level = match stage.verdict {
            Verdict::Drift | Verdict::Unmeasured => "warning",
            _ => "error",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "::{level} file={},line={},title={}::{}",
            property(&stage.file),
            line(&stage.file),
            property(&format!("stage {}: {}", stage.id, stage.verdict)),
            message(&stage.why)
        );
    }
    text
}

/// The run as a table in Markdown.
pub fn markdown(run: &RunRecord) -> String {
    let mut text = format!("### runner: {} ({})\n\n", run.verdict, cell(&run.id));
    text.push_str("| stage | verdict | why | site | bound used |\n|---|---|---|---|---|\n");
    for stage in &run.stages {
        let decisive = stage.decisive();
        let site = decisive.and_then(|j| j.site.as_ref()).map_or(String::new(), |s| cell(&s.0));
        let used = decisive.and_then(|j| j.used).map_or(String::new(), share);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {site} | {used} |",
            cell(&stage.id.0),
            stage.verdict,
            cell(&stage.why)
        );
    }
    text
}

/// Text that is nothing but text within a table of Markdown.
fn cell(text: &str) -> String {
    let mut safe = String::new();
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '|' | '`' | '*' | '_' | '[' | ']' | '\\' | '!' | '#' | '~' => {
                safe.push('\\');
                safe.push(c);
            }
            c if c.is_control() => safe.push(' '),
            c => safe.push(cleaned(c)),
        }
    }
    safe
}

/// Text after the `::` of a workflow command.
fn message(text: &str) -> String {
    let text = text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    text.chars().map(cleaned).collect()
}

/// A property of a workflow command.
fn property(text: &str) -> String {
    message(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::{cell, property};

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(property("a,b:c\n::x"), "a%2Cb%3Ac%0A%3A%3Ax");
        assert_eq!(property("\x1b[2J\u{9b}\u{202e}"), "\u{fffd}[2J\u{fffd}\u{fffd}");
        assert_eq!(cell("a|b<img>\nc"), "a\\|b&lt;img&gt; c");
    }
}
