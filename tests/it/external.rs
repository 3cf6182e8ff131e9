//! The external arm: a program that does what it is asked, and every way in which
//! one can fail; nothing of a failure is kept.

use crate::command::Project;
use crate::single::{project, short, tensors};

const STAGE: &str = r#"
id       = "X"
title    = "a program's logits"
contract = "logits"
[forward]
[external]
argv    = ["sh", "adapter.sh"]
inputs  = ["adapter.sh", "good.safetensors"]
version = "a test"
timeout = 5
"#;

const CONTRACT: &str = r#"
name    = "logits"
version = "1.0.0"
[[equation]]
id      = "same"
formula = "external = reference"
why     = "the same model"
[[falsifier]]
id         = "X-1"
equation   = "same"
prediction = "close"
compare    = ["device", "reference"]
metric     = "nmse"
max        = 1e-6
if_fails   = "structural"
why        = "f32 rounding; what stands for the device is the program"
"#;

/// A project whose reference logits lie in `good.safetensors`.
fn with_adapter(script: &str) -> Project {
    let plain = STAGE.split("[external]").next().expect("a part");
    let project = project()
        .file(
            "contracts/logits.toml",
            &CONTRACT.replace("device", "emulated").replace("1e-6", "0.5"),
        )
        .file("stages/x.toml", plain);
    project.run().expect(0, "run: pass");
    let out = project.path("good.safetensors").display().to_string();
    project.runner(&["export", "latest", "X", "reference", &out]).expect(0, "");
    project
        .file("contracts/logits.toml", CONTRACT)
        .file("stages/x.toml", short(STAGE))
        .file("adapter.sh", script)
}

#[test]
fn a_program_that_writes_what_it_is_asked_for_is_judged_and_kept() {
    let script = "grep -q '\"sites\"' request.json && cp good.safetensors tensors.safetensors\n";
    let project = with_adapter(script);
    project.run().expect(0, "run: pass");
    project.run().expect(0, "everything was reused");
    // Its text is part of the key.
    project.write("adapter.sh", &format!("{script}# changed\n"));
    project.runner(&["plan", "stages"]).expect(0, "input adapter.sh");
}

#[test]
fn a_program_that_fails_is_bounded_reported_and_not_kept() {
    let project = with_adapter("sleep 60\n");
    let fails = |script: &str, words: &str| {
        project.write("adapter.sh", script);
        project.run().expect(4, words);
    };
    fails("sleep 60\n", "it ran into its timeout of 5 s and was killed");
    fails("echo the GPU fell off >&2; exit 3\n", "status 3; it said: the GPU fell off");
    fails("true\n", "left no `tensors.safetensors`");
    fails("head -c 1000 good.safetensors > tensors.safetensors\n", "cannot be read");
    fails("head -c 100000000000 /dev/zero > tensors.safetensors\n", "wrote more than");
    fails("ln -s good.safetensors tensors.safetensors\n", "left no `tensors.safetensors`");
    tensors(&project, "good.safetensors", &[("logits", [4, 2048], vec![f32::NAN; 8192])]);
    fails("cp good.safetensors tensors.safetensors\n", "NaN or infinite");
    tensors(&project, "good.safetensors", &[("logits", [3, 2048], vec![0.5; 6144])]);
    fails("cp good.safetensors tensors.safetensors\n", "a prompt of 4 tokens");
    tensors(&project, "good.safetensors", &[("logits", [4, 1024], vec![0.5; 4096])]);
    fails("cp good.safetensors tensors.safetensors\n", "a vocabulary of 2048 tokens");
    tensors(&project, "good.safetensors", &[("other", [4, 1024], vec![0.5; 4096])]);
    fails("cp good.safetensors tensors.safetensors\n", "has no tensor `logits`");
}

#[test]
fn a_retry_that_goes_well_is_called_flaky() {
    let project = with_adapter("true\n");
    let mark = project.path("mark").display().to_string();
    project.write(
        "adapter.sh",
        &format!("test -e {mark} || {{ touch {mark}; exit 7; }}; cp good.safetensors tensors.safetensors\n"),
    );
    project.run().expect(4, "status 7");
    std::fs::remove_file(&mark).expect("removed");
    project.write("stages/x.toml", &format!("{STAGE}retries = 1\n"));
    let ran = project.runner(&["run", "stages", "--format", "json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.out);
    assert!(ran.out.contains("flaky: attempt 2 went well, the first failed"), "{}", ran.out);
}

#[test]
fn checking_a_strangers_manifest_starts_nothing() {
    let project = with_adapter("touch ran\n");
    let mark = project.path("ran").display().to_string();
    project.write("adapter.sh", &format!("touch {mark}\n"));
    project.runner(&["check", "stages"]).expect(0, "no problem found");
    project.runner(&["plan", "stages"]).expect(0, "X");
    assert!(!project.path("ran").exists());
}
