//! Unattended runs: a baseline, what changed since, messages, metrics, old runs.

use std::fs;

use crate::command::{Outcome, Project};
use crate::external::with_adapter;
use crate::single::{project, tensors};

const EMBED: &str =
    "id = \"E\"\ntitle = \"t\"\ncontract = \"embedding\"\ntags = [\"night\"]\n[embed]\n";
const ROPE: &str = "id = \"R\"\ntitle = \"t\"\ncontract = \"rope\"\n[rope]\n\
                    input = { generate = \"normal\", rows = 4 }\nsite = \"blk.0.q_rope\"\n";

fn night() -> Project {
    let defaults = "tokens = [791, 374]\n[profile.nightly]\nselect = \"tag:night\"\nkeep = 2\n";
    project()
        .file("stages/pipeline.toml", defaults)
        .file("stages/e.toml", EMBED)
        .file("stages/r.toml", ROPE)
}

/// What a message was told.
fn told(project: &Project) -> serde_json::Value {
    serde_json::from_str(&project.read("told.json")).expect("a summary")
}

fn finished_runs(project: &Project) -> Vec<std::path::PathBuf> {
    let runs = fs::read_dir(project.path("runs")).expect("runs").filter_map(Result::ok);
    let runs = runs.map(|entry| entry.path()).filter(|run| run.join("run.json").is_file());
    let mut runs: Vec<_> = runs.collect();
    runs.sort();
    runs
}

#[test]
fn a_profile_selects_and_only_its_last_runs_are_kept() {
    let project = night();
    for _ in 0..3 {
        let ran = project.runner(&["run", "stages", "--profile", "nightly"]);
        let ran = ran.expect(0, "no baseline for these stages");
        assert!(!ran.out.contains("R  rope"), "{}", ran.out);
    }
    let ran = project.runner(&["run", "stages", "--profile", "nightly"]);
    ran.expect(0, "nothing changed since 2");
    assert_eq!(finished_runs(&project).len(), 2);
    let missing = project.runner(&["run", "stages", "--profile", "weekly"]);
    missing.expect(2, "there is no profile `weekly`; pipeline.toml has nightly");
}

/// The blocks of that language in docs/nightly.md.
fn blocks_of_the_docs(language: &str) -> Vec<String> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/nightly.md");
    let text = fs::read_to_string(path).expect("the docs");
    let begin = format!("\n```{language}\n");
    let blocks = text.split(&begin).skip(1);
    blocks.map(|rest| rest.split("\n```").next().expect("an end").to_owned()).collect()
}

#[test]
fn the_profile_of_the_docs_runs_as_copied() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let project = Project::new();
    for folder in ["stages", "contracts"] {
        for entry in fs::read_dir(root.join(folder)).expect("shipped").flatten() {
            let name = entry.file_name().into_string().expect("text");
            let text = fs::read_to_string(entry.path()).expect("TOML");
            project.write(&format!("{folder}/{name}"), &text);
        }
    }
    let [profile] = &blocks_of_the_docs("toml")[..] else { panic!("one profile in the docs") };
    let defaults = project.read("stages/pipeline.toml");
    project.write("stages/pipeline.toml", &format!("{defaults}\n{profile}\n"));
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    let nightly = ["run", "stages", "--profile", "nightly", "--metrics", "runner.prom"];
    project.runner(&nightly).expect(0, "pass, 5 of 5 stages pass");
    // The summary in the docs has the keys of the one that was written.
    let last = finished_runs(&project).pop().expect("a run");
    let written = fs::read_to_string(last.join("summary.json")).expect("a summary");
    let keys = |text: &str| {
        let json: serde_json::Value = serde_json::from_str(text).expect("JSON");
        json.as_object().expect("an object").keys().cloned().collect::<Vec<_>>()
    };
    let [summary] = &blocks_of_the_docs("json")[..] else { panic!("one summary in the docs") };
    assert_eq!(keys(summary), keys(&written));
    // And so have the metrics their names.
    let names = |text: &str| {
        let lines = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        lines.map(|line| line.split(' ').next().expect("a name").to_owned()).collect::<Vec<_>>()
    };
    let docs = fs::read_to_string(root.join("docs/nightly.md")).expect("the docs");
    let told: Vec<String> = names(&docs);
    for name in names(&project.read("runner.prom")) {
        assert!(told.contains(&name), "docs/nightly.md lacks {name}");
    }
}

#[test]
fn a_profile_whose_selection_finds_nothing_is_a_problem_of_the_manifests() {
    let project = night();
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    let defaults = project.read("stages/pipeline.toml").replace("tag:night", "tag:nigth");
    project.write("stages/pipeline.toml", &defaults);
    let checked = project.runner(&["check", "stages"]);
    let checked = checked.expect(2, "`tag:nigth` fits no stage");
    assert!(checked.err.contains("`profile.nightly.select` of"), "{}", checked.err);
}

#[test]
fn a_baseline_tells_what_changed_and_nothing_else() {
    let project = night();
    project.run().expect(0, "run: pass");
    project.runner(&["baseline", "set", "latest"]).expect(0, "the baseline is now");
    project.run().expect(0, "nothing changed since");
    // A bound that nobody meets: a new failure.
    let contract = project.read("contracts/rope.toml");
    project.write("contracts/rope.toml", &contract.replace("max        = 8", "max        = 1e-9"));
    fs::remove_file(project.path("stages/e.toml")).expect("removed");
    let ran = project.run().expect(1, "3 changes since");
    assert!(ran.out.contains("R bound of ROPE-001: none to 8 -> none to 1.00e-9"), "{}", ran.out);
    assert!(ran.out.contains("E did not run"), "{}", ran.out);
    assert!(ran.out.contains("R pass -> structural: first site"), "{}", ran.out);
    assert!(ran.out.contains("ROPE-001 at blk.0.q_rope"), "{}", ran.out);
    // Since the night before nothing is new any more; the baseline still says three.
    let ran = project.run().expect(1, "nothing changed since");
    assert!(ran.out.contains("baseline: 3 changes since"), "{}", ran.out);
    let history = project.runner(&["history"]);
    history.expect(0, "R pass x 2, structural x 2 row_ulp of ROPE-001");
    project.runner(&["history", "R", "Q"]).expect(2, "no run has the stage Q; they have: E, R");
}

#[test]
fn a_baseline_is_shown_removed_and_spared_by_keep() {
    let project = night();
    project.runner(&["baseline", "show"]).expect(2, "`runs` is no folder of runs");
    let nightly = ["run", "stages", "--profile", "nightly", "-q"];
    project.runner(&nightly).expect(0, "pass");
    project.runner(&["baseline", "show"]).expect(0, "there is no baseline");
    project.runner(&["baseline", "set", "latest"]).expect(0, "stages ../stages");
    let first = finished_runs(&project).remove(0);
    let name = first.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
    for _ in 0..4 {
        project.runner(&nightly).expect(0, &format!("baseline: nothing changed since {name}"));
    }
    assert!(first.is_dir(), "the run that is the baseline stays");
    assert_eq!(finished_runs(&project).len(), 3);
    project.runner(&["diff", "baseline"]).expect(0, "nothing changed");
    let shown = project.runner(&["baseline", "show"]).expect(0, &name);
    assert!(shown.out.contains("models    synthetic:qwen2-tiny"), "{}", shown.out);
    project
        .runner(&["baseline", "remove", "nobody"])
        .expect(2, &format!("the baselines are: {name}"));
    project.runner(&["baseline", "remove", &name]).expect(0, "is no baseline any more");
    project.runner(&["baseline", "show"]).expect(0, "there is no baseline");
    project.runner(&["diff", "baseline"]).expect(2, "has no baseline for its stages");
}

#[test]
fn another_model_or_folder_of_stages_has_another_baseline() {
    let project = night();
    project.run().expect(0, "pass");
    project.runner(&["baseline", "set", "latest"]).expect(0, "the baseline is now");
    let other = ["run", "stages", "--model", "synthetic:llama-tiny", "--keep", "9"];
    let ran = project.runner(&other).expect(0, "no baseline for these stages, models and hardware");
    assert!(!ran.out.contains("grew"), "{}", ran.out);
    for file in ["pipeline.toml", "e.toml", "r.toml"] {
        project.write(&format!("more/{file}"), &project.read(&format!("stages/{file}")));
    }
    let more = ["run", "more", "--keep", "9"];
    project.runner(&more).expect(0, "no baseline for these stages, models and hardware");
    // A part of the stages is held against the part of the baseline, and lost nothing.
    let part = project.runner(&["run", "stages", "--select", "E"]);
    part.expect(0, "baseline: nothing changed since");
}

#[test]
fn a_changed_prompt_is_named_and_what_follows_is_counted() {
    let project = night();
    project.run().expect(0, "pass");
    project.runner(&["baseline", "set", "latest"]).expect(0, "the baseline is now");
    let ran = project.runner(&["run", "stages", "--tokens", "5,6,7"]);
    let ran = ran.expect(0, "E, R tokens: [791,374] -> [5,6,7]");
    assert!(ran.out.contains("2 values of E moved with it"), "{}", ran.out);
}

#[test]
fn a_bound_that_is_loosened_and_an_arm_that_is_gone_are_told() {
    let project = night();
    project.run().expect(0, "pass");
    project.runner(&["baseline", "set", "latest"]).expect(0, "the baseline is now");
    let contract = project.read("contracts/rope.toml");
    project.write("contracts/rope.toml", &contract.replace("max        = 8", "max        = 1e6"));
    let ran = project.run().expect(0, "1 change since");
    assert!(ran.out.contains("R bound of ROPE-001: none to 8 -> none to 1"), "{}", ran.out);
    project.write("contracts/rope.toml", &contract);
    let arms = ["run", "stages", "--arms", "reference,emulated"];
    let ran = project.runner(&arms).expect(0, "baseline: 1 change since");
    let gone = "E, R arms: reference, emulated, device -> reference, emulated";
    assert!(ran.out.contains(gone), "{}", ran.out);
}

#[test]
fn what_a_run_says_of_itself_leads_nowhere_and_forges_no_line() {
    let project = night();
    for _ in 0..2 {
        project.runner(&["run", "stages", "--keep", "9"]).expect(0, "pass");
    }
    project.runner(&["baseline", "set", "latest"]).expect(0, "the baseline is now");
    let outside = project.path("victim").display().to_string();
    let change = |path: &std::path::Path| {
        let text = fs::read_to_string(path).expect("JSON");
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        json["id"] = format!("{outside}\n::error::forged").into();
        json["provenance"]["machine"] = "node\n::error::forged".into();
        // Its time is that of before: runs are told apart by it.
        let finished = fs::metadata(path).and_then(|facts| facts.modified()).expect("a time");
        fs::write(path, json.to_string()).expect("written");
        let file = fs::File::options().append(true).open(path).expect("opened");
        file.set_modified(finished).expect("set");
    };
    change(&finished_runs(&project).remove(0).join("run.json"));
    for entry in fs::read_dir(project.path("runs/baselines")).expect("baselines").flatten() {
        change(&entry.path());
    }
    for command in [
        &["report", "previous"][..],
        &["report", "baseline"],
        &["cache", "pin", "previous"],
        &["cache", "pin", "baseline"],
        &["explain", "E", "baseline"],
    ] {
        let outcome = project.runner(command);
        assert_eq!(outcome.code, Some(2), "{command:?}: {}", outcome.out);
    }
    assert!(!project.path("victim").exists());
    for command in [
        &["history", "--all"][..],
        &["baseline", "show"],
        &["diff", "baseline"],
        &["run", "stages", "--keep", "9"],
    ] {
        let outcome = project.runner(command);
        let said = outcome.out + &outcome.err;
        assert!(said.contains("forged") || command[0] == "run", "{command:?}: {said}");
        assert!(!said.lines().any(|line| line.starts_with("::error::")), "{command:?}: {said}");
    }
}

#[test]
fn machines_keep_and_compare_their_own_runs() {
    let project = night();
    let on = |machine: &str, arguments: &[&str]| {
        let output = project.command(arguments).env("RUNNER_MACHINE", machine).output();
        Outcome::of(output.expect("it starts"))
    };
    let nightly = ["run", "stages", "--profile", "nightly", "-q"];
    for machine in ["node08", "node08", "node08", "node07"] {
        on(machine, &nightly).expect(0, "pass");
        std::thread::sleep(std::time::Duration::from_millis(1100));
    }
    // Two of node08 and one of node07: nobody removes what is another's.
    assert_eq!(finished_runs(&project).len(), 3);
    on("node07", &["run", "stages", "--profile", "nightly", "--keep", "1"]).expect(0, "pass");
    assert_eq!(finished_runs(&project).len(), 3);
    let history = on("node07", &["history", "--machine", "node08"]).expect(0, "node08");
    assert!(!history.out.contains("node07"), "{}", history.out);
    on("node07", &["history", "--machine", "node99"]).expect(2, "no finished run of node99");
    // The same numbers on two machines are no change.
    let names: Vec<String> =
        finished_runs(&project).iter().map(|run| run.display().to_string()).collect();
    let diff = on("node07", &["diff", &names[0], &names[2]]).expect(0, "nothing changed");
    assert!(diff.out.contains(" on node08 -> "), "{}", diff.out);
    // The latest is this machine's.
    let of_08 = on("node08", &["diff"]).expect(0, "on node08 -> ");
    assert!(!of_08.out.contains("node07"), "{}", of_08.out);
}

#[test]
fn a_run_whose_table_finds_no_room_is_told_with_its_verdict() {
    let project = night();
    let notify = format!("cat > {}", project.path("told.json").display());
    let full = fs::File::options().write(true).open("/dev/full").expect("a full device");
    let mut run = project.command(&["run", "stages", "--notify", &notify]);
    let output = run.stdout(full).output().expect("it starts");
    assert_eq!(output.status.code(), Some(74), "{}", String::from_utf8_lossy(&output.stderr));
    let summary = told(&project);
    assert_eq!(summary["verdict"], "pass");
    assert_eq!(summary["exit_code"], 74);
    assert!(summary["run"].is_string(), "{summary}");
    let line = summary["line"].as_str().expect("text");
    assert!(line.contains("2 of 2 stages pass"), "{line}");
    assert_eq!(line.matches("cannot write to stdout").count(), 1, "{line}");
    assert!(!line.contains("earlier run"), "{line}");
}

#[test]
fn what_is_only_shown_tells_nobody() {
    let project = night();
    let notify = format!("cat > {}", project.path("told.json").display());
    for arguments in [
        &["run", "stages", "--profile", "nightly", "--dry-run", "--notify", &notify][..],
        &["run", "nowhere", "--dry-run", "--notify", &notify],
    ] {
        project.runner(arguments);
        assert!(!project.path("told.json").exists(), "{arguments:?}");
    }
    project.runner(&["run", "stages", "--notify", ""]).expect(2, "--notify");
}

#[test]
fn a_message_gets_the_summary_and_node_exporter_its_file() {
    let project = night();
    let told_to = project.path("told.json").display().to_string();
    let metrics = project.path("runner.prom").display().to_string();
    let notify = format!("cat > {told_to}; test \"$RUNNER_VERDICT\" = pass");
    let arguments = ["run", "stages", "--notify", &notify, "--metrics", &metrics];
    let output = project.command(&arguments).env("RUNNER_MACHINE", "node07").output();
    let ran = Outcome::of(output.expect("it starts")).expect(0, "2 of 2 stages pass");
    assert!(!ran.err.contains("warning"), "{}", ran.err);
    let summary = told(&project);
    assert_eq!(summary["verdict"], "pass");
    assert_eq!(summary["machine"], "node07");
    assert_eq!(summary["arms"]["reference"]["ran"], 2);
    let page = summary["page"].as_str().expect("a page");
    assert!(page.starts_with('/') && fs::metadata(page).is_ok(), "{page}");
    let text = project.read("runner.prom");
    assert!(text.contains("runner_stage_verdict{stage=\"E\",verdict=\"pass\"} 1\n"), "{text}");
    assert!(text.contains(",machine=\"node07\",verdict=\"pass\","), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    // A hook that fails is told, and the verdict stays.
    project.runner(&["run", "stages", "--notify", "exit 9"]).expect(0, "exit status: 9");
    // A folder that is not there is a slip of the pen, and is not made.
    let ran = project.runner(&["run", "stages", "--metrics", "no/where/m.prom"]);
    ran.expect(0, "`no/where` is no folder");
    assert!(!project.path("no").exists());
}

#[test]
fn every_end_is_told_with_its_reason() {
    let project = night();
    let notify = format!("cat > {}", project.path("told.json").display());
    let metrics = project.path("m.prom").display().to_string();
    let end = |arguments: &[&str], code: i32| {
        for left in ["told.json", "m.prom"] {
            // Not there before the first end.
            let _ = fs::remove_file(project.path(left));
        }
        let watched = ["--notify", &notify, "--metrics", &metrics, "--format", "json"];
        let ran = project.runner(&[arguments, &watched].concat());
        assert_eq!(ran.code, Some(code), "{}", ran.err);
        let summary = told(&project);
        assert_eq!(summary["exit_code"], code);
        let text = project.read("m.prom");
        assert!(text.contains(&format!("runner_run_exit_code {code}\n")), "{text}");
        summary
    };
    let summary = end(&["run", "stages", "--profile", "weekly"], 2);
    assert_eq!(summary["verdict"], "error");
    let line = summary["line"].as_str().expect("text");
    assert!(line.contains("no stage was judged; there is no profile `weekly`"), "{line}");
    let summary = end(&["run", "stages", "--select", "Q"], 2);
    assert!(summary["reason"].as_str().expect("text").contains("fits no stage"), "{summary}");
    let summary = end(&["run", "nowhere"], 2);
    assert!(summary["reason"].as_str().expect("text").contains("nowhere"), "{summary}");
    // Falsified: the stage, the site and the reason.
    let contract = project.read("contracts/rope.toml");
    project.write("contracts/rope.toml", &contract.replace("max        = 8", "max        = 1e-9"));
    let summary = end(&["run", "stages"], 1);
    assert_eq!(summary["first"]["stage"], "R");
    assert_eq!(summary["first"]["site"], "blk.0.q_rope");
    assert!(summary["reason"].as_str().expect("text").starts_with("R: "), "{summary}");
    project.write("stages/e.toml", "oops");
    let summary = end(&["run", "stages"], 2);
    assert!(summary["reason"].as_str().expect("text").contains("e.toml"), "{summary}");
}

#[test]
fn a_run_that_is_stopped_is_told_as_stopped() {
    let project = Project::new()
        .stage("slow", "shell = \"echo > begun; sleep 60; echo > o\"\noutputs = [\"o\"]");
    let notify = format!("cat > {}", project.path("told.json").display());
    let mut run = project.command(&["run", "stages", "--notify", &notify]).spawn().expect("starts");
    let attempts = project.path("runs/cache/v1/attempts");
    wait_until(|| {
        let all = fs::read_dir(&attempts).into_iter().flatten().flatten();
        let mut below =
            all.flat_map(|run| fs::read_dir(run.path()).into_iter().flatten().flatten());
        below.any(|attempt| attempt.path().join("begun").exists())
    });
    stop(&run);
    assert_eq!(run.wait().expect("ends").code(), Some(130));
    let summary = told(&project);
    assert_eq!(
        (summary["interrupted"].clone(), summary["exit_code"].clone()),
        (true.into(), 130.into())
    );
    let line = summary["line"].as_str().expect("text");
    assert!(line.contains(": error, stopped, 0 of 1 stages pass"), "{line}");
}

/// Waits for what must come; if it does not, the test fails here.
#[track_caller]
fn wait_until(come: impl Fn() -> bool) {
    for _ in 0..1500 {
        if come() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("what was waited for did not come within 30 s");
}

fn stop(child: &std::process::Child) {
    let stopped = std::process::Command::new("kill").arg(child.id().to_string()).status();
    assert!(stopped.expect("kill starts").success());
}

#[test]
fn a_message_that_takes_too_long_is_ended_and_holds_nobody_up() {
    let project = night();
    let began = std::time::Instant::now();
    let arguments =
        ["run", "stages", "--profile", "nightly", "--notify", "sleep 400", "--notify-timeout", "1"];
    let ran = project.runner(&arguments);
    ran.expect(0, "`sleep 400`: not ended after 1 s, and was killed");
    assert!(began.elapsed() < std::time::Duration::from_secs(60));
    // While a message is under way the next run of the profile may start.
    let slow = ["run", "stages", "--profile", "nightly", "--notify", "echo > told; sleep 30"];
    let mut first = project.command(&slow).spawn().expect("starts");
    wait_until(|| project.path("told").exists());
    let second = project.runner(&["run", "stages", "--profile", "nightly"]).expect(0, "pass");
    assert!(!second.err.contains("another run holds"), "{}", second.err);
    first.kill().expect("killed");
    first.wait().expect("ends");
}

/// A stage that takes some time, in a folder with a profile.
fn slow() -> Project {
    Project::new()
        .file("stages/pipeline.toml", "[profile.nightly]\nfresh = [\"command\"]\n")
        .stage("slow", "shell = \"sleep 2; date +%N > o\"\noutputs = [\"o\"]")
}

#[test]
fn two_runs_of_a_profile_on_a_machine_do_not_meet_and_two_machines_do_not_wait() {
    let project = slow();
    let nightly = ["run", "stages", "--profile", "nightly"];
    let on = |machine: &str| {
        let mut command = project.command(&nightly);
        command.env("RUNNER_MACHINE", machine);
        command
    };
    let mut first = on("node07").spawn().expect("starts");
    wait_until(|| {
        let entries = fs::read_dir(project.path("runs")).into_iter().flatten().flatten();
        let locks = entries.filter(|e| e.file_name().to_string_lossy().starts_with(".lock-"));
        locks.count() > 0
    });
    let mut other = on("node08").stderr(std::process::Stdio::piped()).spawn().expect("starts");
    let second = Outcome::of(on("node07").output().expect("starts"));
    second.expect(0, "another run holds");
    assert!(first.wait().expect("ends").success());
    let mut said = String::new();
    let stderr = other.stderr.as_mut().expect("piped");
    std::io::Read::read_to_string(stderr, &mut said).expect("text");
    assert!(other.wait().expect("ends").success());
    assert!(!said.contains("another run holds"), "{said}");
    // Who waits can be stopped, and says so.
    let mut first = on("node07").spawn().expect("starts");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let waiting = on("node07").stderr(std::process::Stdio::piped()).spawn().expect("starts");
    std::thread::sleep(std::time::Duration::from_millis(500));
    stop(&waiting);
    let waited = Outcome::of(waiting.wait_with_output().expect("ends"));
    waited.expect(130, "stopped while it waited for another run to end");
    assert!(first.wait().expect("ends").success());
}

#[test]
fn what_a_night_is_to_test_is_measured_anew_and_all_else_is_reused() {
    let project = slow();
    let nightly = ["run", "stages", "--profile", "nightly"];
    project.runner(&nightly).expect(0, "pass");
    let first = project.read("o");
    project.run().expect(0, "everything was reused");
    let ran = project.runner(&nightly).expect(0, "pass");
    assert!(!ran.out.contains("everything was reused"), "{}", ran.out);
    assert_ne!(project.read("o"), first, "it ran");
    let dry = [&nightly[..], &["--dry-run"]].concat();
    project.runner(&dry).expect(0, "it is measured anew (`fresh`)");
    // The same without a profile; an arm that there is not is refused.
    let before = project.read("o");
    project.runner(&["run", "stages", "--fresh", "command"]).expect(0, "pass");
    assert_ne!(project.read("o"), before);
    project.runner(&["run", "stages", "--fresh", "gpu"]).expect(2, "gpu");
}

/// A stage whose program copies an answer that the runner knows nothing of, as a device may
/// answer otherwise one night; the profile asks for it anew.
fn asked_anew() -> Project {
    let project = with_adapter("[embed]", "");
    let answer = project.path("answer.safetensors");
    fs::copy(project.path("good.safetensors"), &answer).expect("copied");
    project.write("adapter.sh", &format!("cp {} tensors.safetensors\n", answer.display()));
    let defaults = project.read("stages/pipeline.toml");
    let profile = "[profile.nightly]\nfresh = [\"device\", \"external\"]\n";
    project.write("stages/pipeline.toml", &format!("{defaults}{profile}"));
    fs::remove_dir_all(project.path("runs")).expect("removed");
    project
}

/// Another last bit of the answer's last value.
fn flip_the_answer(project: &Project) {
    let path = project.path("answer.safetensors");
    let mut bytes = fs::read(&path).expect("an answer");
    let at = bytes.len() - 4;
    bytes[at] ^= 1;
    fs::write(&path, bytes).expect("written");
}

#[test]
fn an_arm_that_answers_otherwise_under_the_same_key_is_told() {
    let project = asked_anew();
    let nightly = ["run", "stages", "--profile", "nightly", "-q"];
    project.runner(&nightly).expect(0, "pass");
    project.runner(&nightly).expect(0, "nothing changed since");
    flip_the_answer(&project);
    let ran = project.runner(&nightly).expect(0, "1 change since");
    assert!(ran.out.contains("X external: other bits at 1 of 1 sites, first embed"), "{}", ran.out);
    assert!(ran.out.contains("of the same key: it is not deterministic"), "{}", ran.out);
}

#[test]
fn three_machines_on_one_folder_each_measure_and_the_one_that_differs_is_named() {
    let project = asked_anew();
    let night = |machine: &str| {
        let mut command = project.command(&["run", "stages", "--profile", "nightly", "-q"]);
        let output = command.env("RUNNER_MACHINE", machine).output().expect("it starts");
        Outcome::of(output).expect(0, &format!("runner on {machine}: pass"))
    };
    let counted = |text: &str| {
        let summary: serde_json::Value = serde_json::from_str(text).expect("a summary");
        let arm = |name: &str| {
            let arm = &summary["arms"][name];
            (arm["ran"].as_u64().expect("a count"), arm["reused"].as_u64().expect("a count"))
        };
        (summary["machine"].as_str().expect("a name").to_owned(), arm("external"), arm("reference"))
    };
    let mut seen = Vec::new();
    for round in 0..2 {
        for machine in ["node07", "node08", "node09"] {
            if (round, machine) == (1, "node09") {
                flip_the_answer(&project);
            }
            night(machine);
            // Each night in its own second: names are ordered by it.
            std::thread::sleep(std::time::Duration::from_millis(1100));
            let last = finished_runs(&project).pop().expect("a run");
            let summary = fs::read_to_string(last.join("summary.json")).expect("a summary");
            seen.push(counted(&summary));
        }
    }
    // The program is asked on each machine each night; what a CPU computes is known after one.
    assert_eq!(seen[0], ("node07".to_owned(), (1, 0), (1, 0)));
    for (at, machine) in [(1, "node08"), (2, "node09"), (3, "node07"), (4, "node08"), (5, "node09")]
    {
        assert_eq!(seen[at], (machine.to_owned(), (1, 0), (0, 1)), "night {at}");
    }
    let history = project.runner(&["history"]).expect(0, "node08");
    assert!(history.out.contains("node07") && history.out.contains("node09"), "{}", history.out);
    let held = project.runner(&["history", "--machines"]);
    let held = held.expect(0, "X external: node09 differs from node07, node08, first embed");
    assert!(held.out.contains("0 of 1 arm that several machines computed"), "{}", held.out);
}

#[test]
fn a_new_stage_of_every_op_is_sound() {
    let ops = [
        "forward",
        "embed",
        "rms_norm",
        "matmul",
        "rope",
        "attention",
        "swiglu",
        "compare",
        "command",
    ];
    let project = Project::new();
    for op in ops {
        project.runner(&["new", op, &format!("n-{op}")]).expect(0, "wrote `stages/n-");
    }
    // What two of them read is the user's to put there.
    project.runner(&["check", "stages"]).expect(2, "`in.txt` does not exist");
    project.write("in.txt", "b\na\n");
    for name in ["reference.safetensors", "capture.safetensors"] {
        tensors(&project, name, &[("logits", [1, 2], vec![1.0, 2.0])]);
    }
    project
        .runner(&["check", "stages"])
        .expect(0, "9 stages and 9 contracts checked, no problems found");
    project.runner(&["new", "rope", "n-rope"]).expect(2, "choose another id, or edit that file");
    project.runner(&["new", "rope", "../x"]).expect(2, "the id cannot be");
}
