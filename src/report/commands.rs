//! The commands that show more, as a reader would type them.

use crate::op::Arm;
use crate::record::{RunRecord, StageRecord};

/// A command and what it is for.
pub struct Suggestion {
    /// As typed.
    pub command: String,
    /// What it shows.
    pub purpose: &'static str,
}

/// What shows more about a whole run; `runs` is the folder of runs.
pub fn of_run(run: &RunRecord, runs: &str) -> Vec<Suggestion> {
    let Place { id, runs } = Place::of(run, runs);
    let again = run.provenance.command.iter().map(|argument| word(argument));
    vec![
        Suggestion {
            command: again.collect::<Vec<_>>().join(" "),
            purpose: "the same run again; what is unchanged is reused",
        },
        Suggestion {
            command: format!("runner report {id}{runs}"),
            purpose: "this page anew, from run.json",
        },
        Suggestion {
            command: format!("runner diff {id} latest{runs}"),
            purpose: "what has changed since",
        },
    ]
}

/// What shows more about a stage.
pub fn of_stage(run: &RunRecord, stage: &StageRecord, runs: &str) -> Vec<Suggestion> {
    let arms = stage.arms.iter().filter(|(_, arm)| arm.object.is_some());
    let mut all = vec![explain(run, stage, runs)];
    all.extend(arms.map(|(arm, _)| export(run, stage, *arm, runs)));
    let Place { runs, .. } = Place::of(run, runs);
    all.push(Suggestion {
        command: format!("runner plan {} --select {}{runs}", word(&run.folder), word(&stage.id.0)),
        purpose: "what would run again, and why",
    });
    all
}

/// How a stage came to its verdict, in words.
pub fn explain(run: &RunRecord, stage: &StageRecord, runs: &str) -> Suggestion {
    let Place { id, runs } = Place::of(run, runs);
    Suggestion {
        command: format!("runner explain {} {id}{runs}", word(&stage.id.0)),
        purpose: "the whole reasoning, in words",
    }
}

/// The tensors behind a stage's numbers.
pub fn export(run: &RunRecord, stage: &StageRecord, arm: Arm, runs: &str) -> Suggestion {
    let Place { id, runs } = Place::of(run, runs);
    let name = word(&stage.id.0);
    Suggestion {
        command: format!("runner export {id} {name} {arm} {arm}.safetensors{runs}"),
        purpose: "every tensor of the arm, for a look with NumPy",
    }
}

/// All measures as a table.
pub fn measures(run: &RunRecord, runs: &str) -> Suggestion {
    let Place { id, runs } = Place::of(run, runs);
    Suggestion {
        command: format!("runner report {id} --format csv --out measures.csv{runs}"),
        purpose: "every measure of every stage, for pandas",
    }
}

struct Place {
    id: String,
    runs: String,
}

impl Place {
    fn of(run: &RunRecord, runs: &str) -> Place {
        let runs = if runs == "runs" { String::new() } else { format!(" --runs {}", word(runs)) };
        Place { id: word(&run.id), runs }
    }
}

/// One word for a shell, quoted where it needs to be.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::word;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(word("a-b.toml"), "a-b.toml");
        assert_eq!(word("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(word(""), "''");
    }
}
