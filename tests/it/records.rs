//! Runs that cannot be read are refused with the reason and the remedy, and what
//! can be read comes back as it was written.

use std::path::Path;
use std::process::Command;

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
    std::fs::write(&path, newer.replacen("\"runner\": \"0.1.0\"", "\"runner\": \"9.1.0\"", 1))
        .expect("a newer file");
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
    let (code, stdout, _) = runner(&["diff", &first, "latest", "--runs", place, "--html", out]);
    assert_eq!(code, Some(1));
    assert!(stdout.contains("tokens: [791,374,264,1296] -> [1,2]"), "{stdout}");
    assert!(stdout.contains("stage D\n  verdict      the stage: pass -> is gone"), "{stdout}");
    assert!(std::fs::read_to_string(&page).expect("a page").contains("[1,2]"));
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
