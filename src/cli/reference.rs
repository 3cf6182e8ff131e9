//! `runner reference`: verdicts, exit codes, metrics, the keys of manifests and
//! contracts, and commands, as the code has them.
//!
//! `docs/reference.md` is its output; a test holds it to that.

use std::fmt::Write;

use clap::CommandFactory;

use serde_json::Value;

use super::{Cli, print};
use crate::metric::Metric;
use crate::schema;
use crate::verdict::Verdict;

pub(super) fn reference() -> Result<u8, String> {
    print(&text())
}

fn text() -> String {
    let mut text = String::from("# Reference\nMade by `runner reference`; do not edit.\n\n");
    verdicts(&mut text);
    exit_codes(&mut text);
    metrics(&mut text);
    keys(&mut text);
    text.push_str("## Commands\n");
    let mut cli = Cli::command().term_width(96);
    cli.build();
    for command in cli.get_subcommands_mut().filter(|command| !command.is_hide_set()) {
        if command.get_name() == "help" {
            continue;
        }
        let help = command.clone().term_width(96).render_long_help().to_string();
        let help: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        // Writing to a string cannot fail.
        let _ = write!(text, "\n### {}\n```text\n{}\n```\n", command.get_name(), help.join("\n"));
    }
    text
}

fn verdicts(text: &mut String) {
    text.push_str("## Verdicts\n| verdict | meaning | exit code |\n|---|---|---|\n");
    let meaning = |verdict: Verdict| match verdict {
        Verdict::Pass => "everything was measured and nothing falsified",
        Verdict::Drift => "explained by the recipe's arithmetic, but beyond the contract's budget",
        Verdict::Structural => "unexplained: a bug",
        Verdict::Unmeasured => "nothing, or too little, was compared",
        Verdict::Blocked => "a stage that it needs has no result",
        Verdict::Error => "it could not run",
    };
    for verdict in [
        Verdict::Pass,
        Verdict::Drift,
        Verdict::Structural,
        Verdict::Unmeasured,
        Verdict::Blocked,
        Verdict::Error,
    ] {
        let (meaning, code) = (meaning(verdict), verdict.exit_code());
        let _ = writeln!(text, "| `{verdict}` | {meaning} | {code} |");
    }
    text.push_str(
        "\nA run has the gravest of its stages' verdicts: structural, drift, error, blocked, \
         unmeasured, pass.\n\n",
    );
}

fn exit_codes(text: &mut String) {
    text.push_str(
        "## Exit codes\n| code | meaning |\n|---|---|\n| 0 | pass |\n| 1 | falsified; of `diff`: \
         something changed |\n| 2 | bad manifest or usage |\n| 3 | nothing was measured |\n\
         | 4 | a required arm could not run |\n| 70 | a bug of ours |\n\
         | 74 | the disk is full or a limit of the system was met |\n| 130 | stopped on request \
         |\n\n",
    );
}

fn metrics(text: &mut String) {
    text.push_str(
        "## Metrics\nBetween a subject `a` and a judge `b`, at one site.\n\n\
         | metric | meaning | from | to |\n|---|---|---|---|\n",
    );
    for metric in Metric::ALL {
        let (low, high) = metric.range();
        let meaning = metric.meaning().replace('|', "\\|");
        let _ = writeln!(text, "| `{metric}` | {meaning} | {low} | {high} |");
    }
    text.push('\n');
}

/// The keys of everything that people write, from the schemas that editors read.
fn keys(text: &mut String) {
    text.push_str(
        "## Keys\n`runner check` names every key that it does not know, with the nearest that it \
         does; `runner schema` prints these tables for editors.\n",
    );
    let stage = keys_of(&schema::stage()["anyOf"][0], "");
    let mut pipeline = keys_of(&schema::pipeline(), "");
    pipeline.retain(|key| !stage.iter().any(|known| known.path == key.path));
    let tables = [
        ("A stage's manifest", stage),
        ("An input of an op", keys_of(&schema::input(), "")),
        ("`pipeline.toml`, besides `model` to `executor`, which its stages inherit", pipeline),
        ("A contract", keys_of(&schema::contract(), "")),
    ];
    for (title, keys) in tables {
        let _ = write!(text, "\n### {title}\n| key | value | meaning |\n|---|---|---|\n");
        for Key { path, value, meaning, needed } in keys {
            let needed = if needed { "; needed" } else { "" };
            let _ = writeln!(text, "| `{path}` | {value} | {meaning}{needed} |");
        }
    }
    text.push('\n');
}

/// One key of a table.
struct Key {
    path: String,
    value: String,
    meaning: String,
    needed: bool,
}

/// All keys below a schema, tables within tables included; each once.
fn keys_of(schema: &Value, path: &str) -> Vec<Key> {
    let mut all: Vec<Key> = Vec::new();
    let here =
        |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let empty = serde_json::Map::new();
    for (name, value) in schema["properties"].as_object().unwrap_or(&empty) {
        let required = schema["required"].as_array();
        all.push(Key {
            path: here(name),
            value: value_of(value).replace('|', "\\|"),
            meaning: value["description"].as_str().unwrap_or_default().to_owned(),
            needed: required.is_some_and(|all| all.contains(&name.as_str().into())),
        });
        // What an op reads has a table of its own.
        if value["title"].is_null() {
            all.extend(keys_of(value, &here(name)));
        }
    }
    for choice in schema["oneOf"].as_array().unwrap_or(&Vec::new()) {
        for key in keys_of(choice, path) {
            // Of alternatives none is needed by itself.
            if !all.iter().any(|known| known.path == key.path) {
                all.push(Key { needed: false, ..key });
            }
        }
    }
    all.extend(keys_of_items(&schema["items"], &format!("{path}[]")));
    all.extend(keys_of_items(&schema["additionalProperties"], &format!("{path}.NAME")));
    all
}

fn keys_of_items(schema: &Value, path: &str) -> Vec<Key> {
    if schema.is_object() { keys_of(schema, path) } else { Vec::new() }
}

/// What can be written for a key, in words.
fn value_of(schema: &Value) -> String {
    if let Some(title) = schema["title"].as_str() {
        return title.to_owned();
    }
    if let Some(known) = schema["enum"].as_array() {
        let words: Vec<String> =
            known.iter().filter_map(|word| Some(format!("`{}`", word.as_str()?))).collect();
        return words.join(", ");
    }
    if let Some(choices) = schema["oneOf"].as_array().filter(|_| schema["type"].is_null()) {
        let mut words: Vec<String> = choices.iter().map(value_of).collect();
        words.dedup();
        return words.join(" or ");
    }
    let kind = schema["type"].as_str().unwrap_or("anything");
    match kind {
        "string" => "text".to_owned(),
        "array" => match value_of(&schema["items"]) {
            items if items == "anything" => "list".to_owned(),
            items => format!("list of {items}"),
        },
        "object" => "table".to_owned(),
        "integer" => match (schema["minimum"].as_u64(), schema["maximum"].as_u64()) {
            (Some(least), Some(most)) => format!("integer from {least} to {most}"),
            (Some(least), None) => format!("integer from {least} on"),
            _ => "integer".to_owned(),
        },
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_value_and_a_meaning() {
        let schemas = [
            schema::stage()["anyOf"][0].clone(),
            schema::input(),
            schema::pipeline(),
            schema::contract(),
        ];
        let keys: Vec<Key> = schemas.iter().flat_map(|schema| keys_of(schema, "")).collect();
        assert!(keys.len() > 100, "{} keys", keys.len());
        for Key { path, value, meaning, .. } in keys {
            assert!(!meaning.is_empty(), "`{path}` has no meaning");
            assert!(!value.contains("anything"), "`{path}` has no value: {value}");
        }
    }
}
