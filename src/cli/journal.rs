//! What a run that was killed left unfinished, read from its events.
//!
//! `events.jsonl` is the journal of a run: a line is there before the work that it
//! names begins, and after it has ended.

use crate::terminal::tell_line;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

/// Says on stderr what an earlier run was at when it was killed.
pub(super) fn tell_what_was_cut_off(runs: &Path, run: &str) {
    let open = unfinished(&runs.join(run).join("events.jsonl"));
    let what = match open.len() {
        0 => "between two stages".to_owned(),
        _ => format!("while it ran {}", open.into_iter().collect::<Vec<_>>().join(", ")),
    };
    tell_line(&format!(
        "run {run} was cut off {what}; this one carries on from what it had finished"
    ));
}

/// The arms that started and did not end. A last line that was cut off names nothing.
fn unfinished(journal: &Path) -> BTreeSet<String> {
    let text = std::fs::read(journal).unwrap_or_default();
    let mut open = BTreeSet::new();
    for line in text.split(|byte| *byte == b'\n') {
        let Ok(event) = serde_json::from_slice::<Value>(line) else { continue };
        let text = |key: &str| event.get(key).and_then(Value::as_str).unwrap_or_default();
        let item = format!("{} {}", text("stage"), text("arm"));
        match text("event") {
            "arm_started" => {
                open.insert(item);
            }
            "arm_finished" => {
                open.remove(&item);
            }
            _ => {}
        }
    }
    open
}

#[cfg(test)]
mod tests {
    use super::unfinished;

    #[test]
    fn what_started_and_did_not_end_is_unfinished() {
        let folder = tempfile::tempdir().expect("a folder");
        let journal = folder.path().join("events.jsonl");
        let text = r#"{"event":"arm_started","stage":"A","arm":"reference"}
{"event":"arm_started","stage":"B","arm":"command"}
{"event":"arm_finished","stage":"A","arm":"reference"}
{"event":"arm_finished","stage":"B","ar"#;
        std::fs::write(&journal, text).expect("written");
        assert_eq!(unfinished(&journal).into_iter().collect::<Vec<_>>(), ["B command"]);
    }
}
