//! Unattended runs: a baseline, what changed since, messages, metrics, old runs.

use std::fs;

use crate::command::Project;
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

#[test]
fn a_profile_selects_and_only_its_last_runs_are_kept() {
    let project = night();
    for _ in 0..3 {
        let ran = project.runner(&["run", "stages", "--profile", "nightly"]);
        let ran = ran.expect(0, "runner: pass, 1 of 1 stages pass; no baseline for this hardware");
        assert!(!ran.out.contains("R  rope"), "{}", ran.out);
    }
    let runs = fs::read_dir(project.path("runs")).expect("runs").filter_map(Result::ok);
    let kept = runs.filter(|entry| entry.path().join("run.json").is_file()).count();
    assert_eq!(kept, 2);
    let missing = project.runner(&["run", "stages", "--profile", "weekly"]);
    missing.expect(2, "there is no profile `weekly`; pipeline.toml has nightly");
}

#[test]
fn a_baseline_tells_what_changed_and_nothing_else() {
    let project = night();
    project.run().expect(0, "run: pass");
    project.runner(&["baseline", "set", "latest"]).expect(0, "is the baseline of");
    project.run().expect(0, "nothing changed since");
    // A bound that nobody meets: a new failure.
    let contract = project.read("contracts/rope.toml");
    project.write("contracts/rope.toml", &contract.replace("max        = 8", "max        = 1e-9"));
    fs::remove_file(project.path("stages/e.toml")).expect("removed");
    let ran = project.run().expect(1, "2 changes since");
    assert!(ran.out.contains("E did not run"), "{}", ran.out);
    assert!(ran.out.contains("R pass -> structural: first site"), "{}", ran.out);
    assert!(ran.out.contains("ROPE-001 at blk.0.q_rope"), "{}", ran.out);
    project.runner(&["history"]).expect(0, "R pass x 2, structural row_ulp of ROPE-001");
    project.runner(&["history", "Q"]).expect(2, "no run has the stage Q");
}

#[test]
fn a_message_gets_the_summary_and_node_exporter_its_file() {
    let project = night();
    let told = project.path("told.json").display().to_string();
    let metrics = project.path("runner.prom").display().to_string();
    let notify = format!("cat > {told}; test \"$RUNNER_VERDICT\" = pass");
    let ran = project.runner(&["run", "stages", "--notify", &notify, "--metrics", &metrics]);
    let ran = ran.expect(0, "2 of 2 stages pass");
    assert!(!ran.err.contains("warning"), "{}", ran.err);
    let summary: serde_json::Value =
        serde_json::from_str(&project.read("told.json")).expect("a summary");
    assert_eq!(summary["verdict"], "pass");
    let text = project.read("runner.prom");
    assert!(text.contains("runner_stage_verdict{stage=\"E\",verdict=\"pass\"} 1\n"), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    // A hook that fails is told, and the verdict stays.
    project.runner(&["run", "stages", "--notify", "exit 9"]).expect(0, "exit status: 9");
}

#[test]
fn two_runs_of_a_profile_do_not_meet() {
    let project = night();
    let slow = "sleep 2; true";
    let arguments = ["run", "stages", "--profile", "nightly", "--notify", slow];
    let mut first = project.command(&arguments).spawn().expect("starts");
    let lock = project.path("runs/.lock");
    for _ in 0..200 {
        if lock.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let second = project.runner(&["run", "stages", "--profile", "nightly"]);
    second.expect(0, "another run holds");
    assert!(first.wait().expect("ends").success());
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
