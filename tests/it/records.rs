//! Runs that cannot be read are refused with the reason and the remedy, and what
//! can be read comes back as it was written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use runner::chip::Evidence;
use runner::compare::Part;
use runner::metric::Metric;
use runner::op::{Arm, Stream};
use runner::record::{ArmState, FamilyRecord, RunRecord, StageRecord};
use runner::verdict::{Outcome, Verdict};
use serde_json::Value;

use crate::command::Project;

fn runner(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_runner"))
        .args(arguments)
        .output()
        .expect("the binary starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A folder of runs with one run of two cheap stages.
fn one_run(runs: &Path) -> String {
    let runs = runs.to_str().expect("a path of text");
    let root = env!("CARGO_MANIFEST_DIR");
    let stages = format!("{root}/stages");
    let (code, stdout, stderr) =
        runner(&["run", &stages, "--select", "C,D", "--runs", runs, "--format", "json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let run: serde_json::Value = serde_json::from_str(&stdout).expect("stdout is run.json");
    run["id"].as_str().expect("a name").to_owned()
}

fn refusal(runs: &Path, id: &str) -> String {
    let (code, stdout, stderr) =
        runner(&["report", id, "--runs", runs.to_str().expect("a path of text")]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "{stderr}");
    stderr
}

#[test]
fn a_run_is_rendered_again_from_its_record_alone() {
    let runs = tempfile::tempdir().expect("a folder");
    let id = one_run(runs.path());
    let page = runs.path().join(&id).join("report.html");
    let first = std::fs::read_to_string(&page).expect("every run leaves its page");
    std::fs::remove_file(&page).expect("the page can go");
    let (code, stdout, stderr) =
        runner(&["report", "latest", "--runs", runs.path().to_str().expect("text")]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(stdout.trim(), page.to_str().expect("text"));
    assert_eq!(std::fs::read_to_string(&page).expect("it is back"), first);
}

#[test]
fn a_run_that_was_cut_off_says_after_what() {
    let runs = tempfile::tempdir().expect("a folder");
    let folder = runs.path().join("20261123T000000Z-00000000");
    std::fs::create_dir(&folder).expect("a folder");
    let events = "{\"event\":\"run_started\",\"run\":\"r\",\"stages\":[\"A\"]}\n\
                  {\"event\":\"stage_judged\",\"stage\":\"C\",\"verdict\":\"pass\"}\n{\"event\":\"arm_fin";
    std::fs::write(folder.join("events.jsonl"), events).expect("events");
    let text = refusal(runs.path(), "20261123T000000Z-00000000");
    assert!(text.contains("was cut off after `stage_judged` of stage C"), "{text}");
    assert!(text.contains("run the stages again"), "{text}");
}

#[test]
fn damaged_newer_and_unknown_runs_are_refused_with_the_reason() {
    let runs = tempfile::tempdir().expect("a folder");
    let id = one_run(runs.path());
    let path = runs.path().join(&id).join("run.json");
    let whole = std::fs::read_to_string(&path).expect("run.json");

    std::fs::write(&path, &whole[..whole.len() / 2]).expect("half a file");
    let text = refusal(runs.path(), &id);
    assert!(text.contains("is not a whole run.json"), "{text}");

    // Python's writer puts NaN where JSON has no such thing.
    std::fs::write(&path, whole.replacen("\"seconds\": ", "\"seconds\": NaN, \"x\": ", 1))
        .expect("NaN");
    assert!(refusal(runs.path(), &id).contains("is not a whole run.json"));

    let newer = whole.replacen("\"schema\": 1", "\"schema\": 2", 1);
    let own = format!("\"runner\": \"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(newer.contains(&own));
    std::fs::write(&path, newer.replacen(&own, "\"runner\": \"9.1.0\"", 1)).expect("a newer file");
    let text = refusal(runs.path(), &id);
    assert!(text.contains("written by runner 9.1.0 with schema 2"), "{text}");
    assert!(text.contains("read it with runner 9.1.0"), "{text}");

    // A metric that this version does not know: never shown as something else.
    std::fs::write(&path, whole.replace("\"max_ulp\"", "\"max_elephants\"")).expect("a file");
    let text = refusal(runs.path(), &id);
    assert!(text.contains("unknown variant `max_elephants`"), "{text}");

    let text = refusal(runs.path(), &format!("{id}x"));
    assert!(
        text.contains(&format!("holds no run `{id}x`; did you mean `{id}`?"))
            || text.contains("`latest` is the youngest"),
        "{text}"
    );
}

#[test]
fn the_reference_in_docs_is_what_the_code_says() {
    let (code, stdout, _) = runner(&["reference"]);
    assert_eq!(code, Some(0));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference.md");
    let written = std::fs::read_to_string(path).expect("docs/reference.md");
    assert!(written == stdout, "run `runner reference > docs/reference.md`");
}

#[test]
fn the_models_in_docs_are_what_the_code_says() {
    let (code, stdout, _) = runner(&["reference", "--models"]);
    assert_eq!(code, Some(0));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/models.md");
    let written = std::fs::read_to_string(path).expect("docs/models.md");
    assert!(written == stdout, "run `runner reference --models > docs/models.md`");
}

#[test]
fn every_command_on_the_page_can_be_typed() {
    let runs = tempfile::tempdir().expect("a folder");
    let id = one_run(runs.path());
    let page = std::fs::read_to_string(runs.path().join(&id).join("report.html")).expect("a page");
    let commands: Vec<&str> = page
        .split("<code class=\"command\">")
        .skip(1)
        .filter_map(|rest| rest.split("</code>").next())
        .filter(|command| command.starts_with("runner "))
        .collect();
    assert!(commands.len() >= 6, "{commands:?}");
    let commands: BTreeSet<&str> = commands.into_iter().collect();
    let place = tempfile::tempdir().expect("a folder");
    for command in commands {
        let status = Command::new(env!("CARGO_BIN_EXE_runner"))
            .args(command.split_whitespace().skip(1))
            .current_dir(place.path())
            .output()
            .expect("the binary starts");
        let stderr = String::from_utf8_lossy(&status.stderr);
        assert_eq!(status.status.code(), Some(0), "{command}: {stderr}");
    }
}

#[test]
fn a_run_differs_from_another_in_what_was_changed_and_not_from_itself() {
    let runs = tempfile::tempdir().expect("a folder");
    let place = runs.path().to_str().expect("a path of text");
    let first = one_run(runs.path());
    let (code, stdout, _) = runner(&["diff", &first, &first, "--runs", place]);
    assert_eq!(code, Some(0));
    assert!(stdout.contains("nothing changed"), "{stdout}");

    let stages = format!("{}/stages", env!("CARGO_MANIFEST_DIR"));
    let run = ["run", &stages, "--select", "C", "--tokens", "1,2", "--runs", place, "-q"];
    let (code, _, stderr) = runner(&run);
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "-q leaves stderr to errors");
    let page = runs.path().join("changes.html");
    let out = page.to_str().expect("text");
    let (code, stdout, _) = runner(&["diff", &first, "latest", "--runs", place]);
    assert_eq!(code, Some(1));
    // The cause first; what follows from it is counted.
    let cause = "causes\n  C  tokens: [791,374,264,1296] -> [1,2]\n";
    assert!(stdout.contains(cause), "{stdout}");
    assert!(stdout.contains("  D  the stage: pass -> is gone\n"), "{stdout}");
    assert!(stdout.contains(" moved with it\n`--all` lists every number\n"), "{stdout}");
    let (code, stdout, _) =
        runner(&["diff", &first, "latest", "--all", "--runs", place, "--html", out]);
    assert_eq!(code, Some(1));
    let html = std::fs::read_to_string(&page).expect("a page");
    // The page has a row for each line of the text, and none for times.
    let lines = stdout.lines().filter(|line| line.starts_with("  ")).count();
    let tables = html.split("<tbody>").skip(1);
    let rows: usize = tables.map(|table| table.matches("<tr>").count()).sum::<usize>()
        - html.matches("<thead><tr>").count()
        + 1;
    assert_eq!(rows, lines, "{stdout}");
    assert!(html.contains(&format!("{lines} differences.")), "{html}");
    assert!(html.contains("<td>[791,374,264,1296]</td><td>[1,2]</td>"), "{html}");
    assert!(html.contains("Content-Security-Policy") && !html.contains(" src="), "{html}");

    let args = ["diff", &first, &first, "--runs", place, "--html", out];
    assert_eq!(runner(&args).0, Some(0));
    let html = std::fs::read_to_string(&page).expect("a page");
    assert!(html.contains("Nothing: the same inputs"), "{html}");
}

#[test]
fn watching_runs_the_stages_with_what_it_was_given() {
    let runs = tempfile::tempdir().expect("a folder");
    let place = runs.path().to_str().expect("a path of text");
    let stages = format!("{}/stages", env!("CARGO_MANIFEST_DIR"));
    let (code, stdout, stderr) =
        runner(&["watch", &stages, "--times", "1", "--", "--select", "C", "--runs", place, "-q"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("C  embed"), "{stdout}");
    let (code, _, stderr) = runner(&["watch", "no/such/folder", "--times", "1"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("cannot read `no/such/folder`"), "{stderr}");
}

/// A run of stages that are measured in every way that the CPU allows.
fn measured(runs: &Path, arguments: &[&str]) -> (String, RunRecord) {
    let place = runs.to_str().expect("a path of text");
    let stages = format!("{}/stages", env!("CARGO_MANIFEST_DIR"));
    let mut all = vec!["run", &stages, "--runs", place];
    if !arguments.contains(&"--select") {
        all.extend(["--select", "B,C,D,E"]);
    }
    all.extend(arguments);
    let (code, stdout, stderr) = runner(&all);
    assert_eq!(code, Some(0), "{stderr}");
    let mut folders: Vec<_> = std::fs::read_dir(runs)
        .expect("a folder of runs")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("run.json").exists())
        .collect();
    folders.sort();
    let last = folders.last().expect("a run");
    (stdout, RunRecord::read(last).expect("it can be read"))
}

/// The texts of a table whose columns begin where their heads do; what is wrapped
/// is put together again.
fn columns(table: &str) -> Vec<BTreeMap<String, String>> {
    let heads = ["stage", "verdict", "time", "of bound", "why"];
    let mut lines = table.lines().skip_while(|line| !line.starts_with("stage "));
    let head = lines.next().expect("a head");
    // Figures are set to the right, below the ends of their heads.
    let end = |head_text: &str| head.find(head_text).expect(head_text) + head_text.len();
    let why = head.find("why").expect("why");
    let edges =
        [0, head.find("verdict").expect("verdict"), end("verdict") + 1, end("time") + 1, why];
    let mut rows: Vec<BTreeMap<String, String>> = Vec::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let cell = |column: usize| {
            let until = edges.get(column + 1).copied().unwrap_or(line.len()).min(line.len());
            line.get(edges[column].min(until)..until).expect("plain text").trim().to_owned()
        };
        if cell(0).is_empty() {
            let row = rows.last_mut().expect("a row goes on");
            row.get_mut("why").expect("its reason").push_str(&format!(" {}", cell(4)));
        } else {
            rows.push((0..5).map(|column| (heads[column].to_owned(), cell(column))).collect());
        }
    }
    rows
}

/// The number at the start of a text, and what follows it.
fn figure(text: &str) -> (f64, &str) {
    let end = text.find(|c: char| !"0123456789.,e-".contains(c)).unwrap_or(text.len());
    let digits = text[..end].trim_end_matches(',').replace(',', "");
    (
        digits.parse().unwrap_or_else(|_| panic!("`{text}` starts with no number")),
        text[end..].trim(),
    )
}

/// Whether digits are a value, rounded to as many as are shown.
fn assert_shown(shown: f64, value: f64, place: &str) {
    let tolerance = 6e-3 * value.abs();
    assert!((shown - value).abs() <= tolerance, "{place}: {shown} is not {value}");
}

fn metric_at(stage: &StageRecord, metric: Metric, site: &str, judge: Stream) -> f64 {
    let found = stage.measures.iter().find(|m| m.site.0 == site && m.judge == judge);
    found.expect(site).metrics[&metric]
}

#[test]
fn every_figure_of_the_terminal_is_the_records() {
    let runs = tempfile::tempdir().expect("a folder");
    let (text, run) = measured(runs.path(), &["--format", "plain"]);
    let rows = columns(&text);
    assert_eq!(rows.len(), run.stages.len(), "{text}");
    for (row, stage) in rows.iter().zip(&run.stages) {
        assert_eq!(row["stage"], format!("{}  {}", stage.id, stage.op.name()));
        assert_eq!(row["verdict"], stage.verdict.name());
        assert_eq!(row["why"], stage.why);
        let (time, unit) = figure(&row["time"]);
        assert_eq!(unit, "s");
        let step = if row["time"].contains('.') { 0.00501 } else { 0.501 };
        assert!((time - stage.seconds).abs() < step, "{}: {}", row["time"], stage.seconds);
        // The claim that decided: nothing fell, so it is the one that uses most.
        let used = stage.judgements.iter().filter(|j| j.outcome == Outcome::Held);
        let most = used.filter_map(|j| j.used).max_by(f64::total_cmp).expect("a claim held");
        let (used, unit) = figure(&row["of bound"]);
        assert_eq!(unit, "%");
        assert!((used - 100.0 * most).abs() < 0.51, "{}: {most}", row["of bound"]);
    }

    // The numbers within the reasons, and above the table.
    let anchored = Stream::Anchored(Arm::Emulated);
    let reference = Stream::Arm(Arm::Reference);
    for (id, judge) in [("B", anchored), ("E", reference)] {
        let stage = run.stages.iter().find(|stage| stage.id.0 == id).expect(id);
        let rest = stage.why.strip_prefix("floor ").expect("the floor comes first");
        let (floor, rest) = figure(rest);
        let (observed, rest) = figure(rest.strip_prefix("%, observed ").expect(rest));
        let (z, rest) = figure(rest.strip_prefix("%, z ").expect(rest));
        let site = rest.strip_prefix("at ").expect(rest).split(';').next().expect("a site");
        let account = stage.accounts.iter().find(|account| account.site.0 == site).expect(site);
        assert_shown(floor / 100.0, account.floor, "floor");
        assert_shown(observed / 100.0, account.observed, "observed");
        assert_shown(z, metric_at(stage, Metric::ZRms, site, judge), "z");
    }
    let b = run.stages.iter().find(|stage| stage.id.0 == "B").expect("B");
    let words = text.lines().next().expect("the drift").split("reference: ").nth(1).expect("words");
    let drift: Vec<f64> = (0..4)
        .map(|l| metric_at(b, Metric::Nmse, &format!("blk.{l}.ffn_residual"), reference))
        .collect();
    let (first, rest) = figure(words);
    let (last, rest) = figure(rest.strip_prefix("after layer 0, ").expect(rest));
    let (most, _) = figure(rest.strip_prefix("after 3, at most ").expect(rest));
    assert_shown(first, drift[0], "the first layer");
    assert_shown(last, drift[3], "the last layer");
    assert_shown(most, drift.iter().copied().max_by(f64::total_cmp).expect("layers"), "the most");

    let last = text.lines().find(|line| line.starts_with("run: ")).expect("a line for the run");
    let rest = last.strip_prefix(&format!("run: {} in ", run.verdict)).expect(last);
    let (seconds, rest) = figure(rest);
    assert!((seconds - run.seconds).abs() < if seconds < 9.95 { 0.00501 } else { 0.501 }, "{last}");
    assert!(rest.ends_with(&format!("{}/report.html", run.id)), "{last}");

    // What was reused says so instead of a time.
    let (text, again) = measured(runs.path(), &["--format", "plain"]);
    assert!(columns(&text).iter().all(|row| row["time"] == "reused"), "{text}");
    assert_ne!(again.id, run.id);
}

#[test]
fn what_a_verdict_took_is_said_part_by_part_and_claim_by_claim() {
    let runs = tempfile::tempdir().expect("a folder");
    let (_, run) = measured(runs.path(), &["--format", "plain"]);
    let b = run.stages.iter().find(|stage| stage.id.0 == "B").expect("B");
    let emulated = Some(Stream::Arm(Arm::Emulated));
    let parts: Vec<_> = b.costs.iter().map(|cost| (cost.part, cost.subject)).collect();
    for part in [Part::OwnInputs, Part::Layers, Part::Comparisons] {
        assert!(parts.contains(&(part, emulated)), "{part:?}: {parts:?}");
    }
    let measures: f64 = b.costs.iter().map(|cost| cost.seconds).sum();
    assert!(measures > 0.0 && measures < b.seconds, "{measures} of {} s", b.seconds);

    let explained = |stage: &str| {
        let place = runs.path().to_str().expect("a path of text");
        let (code, text, stderr) = runner(&["explain", stage, "--cost", "--runs", place]);
        assert_eq!(code, Some(0), "{stderr}");
        text
    };
    let text = explained("B");
    for words in ["emulated, in this run", "reference, in this run", "of what the arms took"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let own = "emulated: the reference and the floors on its own inputs (";
    let claims = text.split("What each claim reads").nth(1).expect("the claims");
    for judgement in &b.judgements {
        let head = format!("  {} (", judgement.falsifier);
        let line = claims.lines().find(|line| line.starts_with(&head)).expect(&head);
        let anchored = judgement.compare[1] == Stream::Anchored(Arm::Emulated);
        assert_eq!(line.contains(own), anchored, "{line}");
    }
    let growth = "no claim, but reports: emulated: the reference on its residual stream";
    assert!(claims.contains(growth), "{claims}");
    // A reused verdict says what it took when it was made.
    let (_, again) = measured(runs.path(), &["--format", "plain"]);
    let of_b = again.stages.iter().find(|stage| stage.id.0 == "B").expect("B");
    assert_eq!(of_b.costs, b.costs);
    assert!(explained("B").contains("emulated, reused"));

    // Of a pass of which the logits alone are known nothing is anchored.
    measured(runs.path(), &["--select", "A", "--format", "plain"]);
    let text = explained("A");
    assert!(text.contains("passes of the reference with drawn roundings ("), "{text}");
    assert!(!text.contains("on its own inputs"), "{text}");
}

fn schema() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/run.schema.json");
    let text = std::fs::read_to_string(path).expect("docs/run.schema.json");
    serde_json::from_str(&text).expect("JSON")
}

/// The words of an enumeration, as the reader itself lists them when it meets another.
fn words_of<T: serde::de::DeserializeOwned>() -> Vec<String> {
    let refused = serde_json::from_str::<T>("\"?\"").err().expect("no such word").to_string();
    let words = refused.split('`').skip(1).step_by(2).map(str::to_owned);
    words.filter(|word| word != "?").collect()
}

#[test]
fn the_schema_lists_every_name_that_a_record_can_hold() {
    let schema = schema();
    let defs = &schema["$defs"];
    let listed = |place: &Value| -> Vec<String> {
        let words = place["enum"].as_array().unwrap_or_else(|| panic!("no enum: {place}"));
        words.iter().map(|word| word.as_str().expect("text").to_owned()).collect()
    };
    let judgement = &defs["judgement"]["properties"];
    let arms = words_of::<Arm>();
    for (place, words) in [
        (&defs["verdict"], words_of::<Verdict>()),
        (&defs["metric"], words_of::<Metric>()),
        (&judgement["outcome"], words_of::<Outcome>()),
        (&judgement["if_fails"], words_of::<runner::manifest::IfFails>()),
        (&defs["arm"]["properties"]["state"], words_of::<ArmState>()),
        (&defs["arm"]["properties"]["basis"]["properties"]["evidence"], words_of::<Evidence>()),
        (&defs["stage"]["properties"]["costs"]["items"]["properties"]["part"], words_of::<Part>()),
        (&defs["stage"]["properties"]["arms"]["propertyNames"], arms.clone()),
    ] {
        assert!(words.len() >= 2, "{words:?}");
        let (mut listed, mut words) = (listed(place), words);
        listed.sort();
        words.sort();
        assert_eq!(listed, words);
    }
    // The lists in the code are whole too.
    assert_eq!(words_of::<Metric>(), Metric::ALL.map(|metric| metric.name().to_owned()));
    // No manifest names the arm of a command.
    let named = Arm::ALL.into_iter().chain([Arm::Command]).map(|arm| arm.name().to_owned());
    assert_eq!(arms, named.collect::<Vec<_>>());
    let streams = Stream::ALL.into_iter().chain([Stream::OUTCOME]).map(|stream| stream.to_string());
    let streams: BTreeSet<String> = streams.collect();
    assert_eq!(listed(&defs["stream"]).into_iter().collect::<BTreeSet<_>>(), streams);
}

/// The places of a record that its schema says nothing about.
pub(crate) fn unknown_places(record: &Value) -> BTreeSet<String> {
    let schema = schema();
    let mut unknown = BTreeSet::new();
    walk(&schema, &schema, record, "", &mut unknown);
    unknown
}

/// Collects the places of a value that a schema says nothing about.
pub(crate) fn walk(
    root: &Value,
    schema: &Value,
    value: &Value,
    at: &str,
    unknown: &mut BTreeSet<String>,
) {
    let mut schema = schema;
    if let Some(name) = schema["$ref"].as_str() {
        schema = root.pointer(name.trim_start_matches('#')).unwrap_or_else(|| panic!("no {name}"));
    }
    if let Some(choices) = schema["anyOf"].as_array() {
        let fits = |choice: &&Value| choice["type"].as_str() != Some("null") || value.is_null();
        if let Some(choice) = choices.iter().find(fits) {
            return walk(root, choice, value, at, unknown);
        }
    }
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let known = &schema["properties"][name];
                let other = &schema["additionalProperties"];
                match (known.is_object(), other.is_object()) {
                    (true, _) => walk(root, known, value, &format!("{at}/{name}"), unknown),
                    (false, true) => walk(root, other, value, &format!("{at}/*"), unknown),
                    // An operation is described by its name alone.
                    _ if at == "/stages/*/op" => {}
                    _ => {
                        unknown.insert(format!("{at}/{name}"));
                    }
                }
            }
        }
        Value::Array(items) => {
            for (place, item) in items.iter().enumerate() {
                let items = &schema["prefixItems"][place];
                let items = if items.is_object() { items } else { &schema["items"] };
                if items.is_object() {
                    walk(root, items, item, &format!("{at}/*"), unknown);
                } else {
                    unknown.insert(format!("{at}/*"));
                }
            }
        }
        _ => {}
    }
}

#[test]
fn the_schema_describes_every_field_of_a_run() {
    let runs = tempfile::tempdir().expect("a folder");
    let (_, mut run) = measured(runs.path(), &[]);
    for stage in &mut run.stages {
        stage.family = Some(stage.id.clone());
    }
    run.families = FamilyRecord::of(&run.stages);
    let mut json = serde_json::to_value(&run).expect("JSON");
    assert_eq!(unknown_places(&json), BTreeSet::new());
    // What only a GPU or a program leaves.
    for record in [receipt(), command()] {
        assert_eq!(unknown_places(&record), BTreeSet::new());
    }
    // The walk finds what is not described, at any depth.
    json["stages"][0]["measures"][0]["colour"] = "blue".into();
    json["families"][0]["colour"] = "blue".into();
    let unknown = ["/families/*/colour", "/stages/*/measures/*/colour"];
    assert_eq!(unknown_places(&json), unknown.map(str::to_owned).into());
}

/// The record of a run on a GPU.
fn receipt() -> Value {
    let path = "runs/receipts/h200-qwen2-tiny-bf16.json";
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path));
    let record: Value = serde_json::from_str(&text.expect(path)).expect("JSON");
    assert!(record.to_string().contains("\"algorithm\""), "{path} names the algorithms");
    record
}

/// The record of a run of a program.
fn command() -> Value {
    let lines = "shell = 'echo 1 > out; echo said'\noutputs = ['out']";
    let project = Project::new().stage("X", lines);
    let outcome = project.runner(&["run", "stages", "--format", "json"]).expect(0, "");
    serde_json::from_str(&outcome.out).expect("stdout is run.json")
}
