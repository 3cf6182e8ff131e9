//! SARIF 2.1.0: every breach of a contract at the line of the stage's manifest.
//!
//! A rule is a falsifier; what fell, and what could not be measured or run, is a
//! result. What held is none.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::junit::measured;
use super::places::line;
use crate::record::{RunRecord, StageRecord};
use crate::verdict::{Judgement, Outcome, Verdict};

/// A run as SARIF has it.
pub fn sarif(run: &RunRecord) -> Value {
    let mut rules: BTreeMap<String, Value> = BTreeMap::new();
    let mut results = Vec::new();
    for stage in &run.stages {
        let place = place(stage);
        let fallen = stage.judgements.iter().filter(|j| j.outcome == Outcome::Falsified);
        for judgement in fallen {
            rules.entry(judgement.falsifier.clone()).or_insert_with(|| rule(judgement));
            let message = format!("stage {}: {}", stage.id, measured(judgement));
            results.push(result(&judgement.falsifier, level(stage.verdict), &message, &place));
        }
        if matches!(stage.verdict, Verdict::Unmeasured | Verdict::Blocked | Verdict::Error) {
            let name = stage.verdict.name();
            rules.entry(name.to_owned()).or_insert_with(|| {
                json!({ "id": name, "shortDescription": { "text": format!("a stage ended in {name}") } })
            });
            let message = format!("stage {}: {}", stage.id, stage.why);
            results.push(result(name, level(stage.verdict), &message, &place));
        }
    }
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "runner",
                "version": run.provenance.runner,
                "rules": rules.into_values().collect::<Vec<_>>(),
            } },
            "automationDetails": { "id": format!("runner/{}", run.id) },
            "results": results,
        }],
    })
}

fn level(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Drift | Verdict::Unmeasured => "warning",
        _ => "error",
    }
}

fn rule(judgement: &Judgement) -> Value {
    json!({
        "id": judgement.falsifier,
        "shortDescription": { "text": judgement.prediction },
        "fullDescription": { "text": judgement.why },
    })
}

fn result(rule: &str, level: &str, message: &str, place: &Value) -> Value {
    json!({
        "ruleId": rule,
        "level": level,
        "message": { "text": message },
        "locations": [{ "physicalLocation": place }],
    })
}

fn place(stage: &StageRecord) -> Value {
    json!({
        "artifactLocation": { "uri": uri(&stage.file) },
        "region": { "startLine": line(&stage.file) },
    })
}

/// A path as a relative reference, or as it is where it begins with a slash.
fn uri(path: &str) -> String {
    let mut text = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}
