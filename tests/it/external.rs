//! The external arm: a program that does what it is asked, and every way in which
//! one can fail; nothing of a failure is kept.

use std::fs;

use runner::model::synthetic::Preset;

use crate::command::Project;
use crate::hugging_face::write_folder;
use crate::model::{open, synthetic_file};
use crate::single::{claim, project, stage, tensors};

const PROGRAM: &str = r#"
[external]
argv    = ["sh", "adapter.sh"]
inputs  = ["adapter.sh", "good.safetensors"]
version = "a test"
timeout = 5
"#;

/// A project of one stage whose reference tensors lie in `good.safetensors`, and a
/// program that is asked for them.
pub fn with_adapter(op: &str, script: &str) -> Project {
    let project = project()
        .file("contracts/claim.toml", &claim("emulated", "reference", "nmse", "0.5"))
        .file("stages/x.toml", &stage("X", "claim", op));
    project.run().expect(0, "run: pass");
    let out = project.path("good.safetensors").display().to_string();
    project.runner(&["export", "latest", "X", "reference", &out]).expect(0, "");
    project
        // What stands for the device is the program.
        .file("contracts/claim.toml", &claim("device", "reference", "nmse", "1e-6"))
        .file("stages/x.toml", &stage("X", "claim", &format!("{op}{PROGRAM}")))
        .file("adapter.sh", script)
}

const FORWARD: &str = "[forward]";
const COPY: &str = "cp good.safetensors tensors.safetensors\n";

#[test]
fn a_program_that_writes_what_it_is_asked_for_is_judged_and_kept() {
    let script = format!("grep -q '\"sites\"' request.json && {COPY}");
    let project = with_adapter(FORWARD, &script);
    project.run().expect(0, "run: pass");
    project.run().expect(0, "everything was reused");
    // Its text is part of the key.
    project.write("adapter.sh", &format!("{script}# changed\n"));
    project.runner(&["plan", "stages"]).expect(0, "input adapter.sh");
}

#[test]
fn a_program_is_asked_for_one_op_with_its_tensors_and_parameters() {
    let made = "{ generate = \"normal\", rows = 8 }";
    let ops = [
        ("[embed]".to_owned(), "token_embd.weight", "rms_norm_eps"),
        (
            format!("[rms_norm]\ninput = {made}\nweight = \"blk.1.attn_norm\""),
            "blk.1.attn_norm.weight",
            "rms_norm_eps",
        ),
        (
            format!("[matmul]\ninput = {made}\nweights = [\"blk.1.attn_q\"]"),
            "blk.1.attn_q.bias",
            "heads",
        ),
        (format!("[rope]\ninput = {made}\nsite = \"blk.1.q_rope\""), "input", "theta"),
        (
            format!("[attention]\nq = {made}\nk = {made}\nv = {made}\nsite = \"blk.1.attn\""),
            "\"k\"",
            "kv_heads",
        ),
        (
            format!("[swiglu]\ngate = {made}\nup = {made}\nsite = \"blk.1.ffn_swiglu\""),
            "gate",
            "sites",
        ),
    ];
    for (op, tensor, parameter) in ops {
        let script = format!(
            "grep -q '{parameter}' request.json && grep -q '\"inputs\": \"inputs.safetensors\"' \
             request.json && head -c 4000 inputs.safetensors | grep -aq '{tensor}' && {COPY}"
        );
        let project = with_adapter(&op, &script);
        project.run().expect(0, "run: pass");
        project.run().expect(0, "everything was reused");
    }
    // The rows are those of the input, which need not be the prompt's.
    let op = format!("[rope]\ninput = {made}\nsite = \"blk.1.q_rope\"");
    let project = with_adapter(&op, COPY);
    tensors(&project, "good.safetensors", &[("blk.1.q_rope", [4, 64], vec![0.5; 256])]);
    project.run().expect(4, "the 8 rows that were asked for");
}

#[test]
fn what_pipeline_toml_says_of_a_program_holds_for_every_stage_that_can_ask_it() {
    let project = with_adapter("[embed]", COPY);
    let defaults = project.read("stages/pipeline.toml").replace("arms", "# arms");
    project.write("stages/pipeline.toml", &format!("{defaults}{PROGRAM}"));
    project.write("stages/x.toml", &stage("X", "claim", "[embed]\n"));
    let compared = "[compare]\nreference = { file = \"../good.safetensors\", tensor = \"embed\" }\n\
                    recorded = { file = \"../good.safetensors\", tensor = \"embed\" }\n";
    project.write("stages/y.toml", &stage("Y", "comparison", compared));
    project.run().expect(0, "run: pass");
    // A table of its own has no use there.
    project.write("stages/y.toml", &stage("Y", "comparison", &format!("{compared}{PROGRAM}")));
    project
        .runner(&["check", "stages"])
        .expect(2, "`[external]` has no use beside this `[compare]`");
}

#[test]
fn a_program_that_fails_is_bounded_reported_and_not_kept() {
    let project = with_adapter(FORWARD, "true\n");
    let fails = |script: &str, words: &str| {
        project.write("adapter.sh", script);
        project.run().expect(4, words).expect(4, "the external arm failed");
    };
    fails("sleep 60\n", "it ran into its timeout of 5 s and was killed; if it needs longer");
    fails("sleep 60 & sleep 60\n", "it ran into its timeout of 5 s and was killed");
    fails("echo the GPU fell off >&2; exit 3\n", "status 3; it said: the GPU fell off; correct");
    fails("kill -9 $$\n", "killed by signal 9");
    fails("kill -11 $$\n", "killed by signal 11");
    fails("true\n", "left no `tensors.safetensors`; it must be a file");
    fails("head -c 1000 good.safetensors > tensors.safetensors\n", "cannot be read");
    fails(": > tensors.safetensors\n", "cannot be read");
    fails("ln -s good.safetensors tensors.safetensors\n", "left no `tensors.safetensors`");
    fails("mkdir tensors.safetensors\n", "left no `tensors.safetensors`");
    fails("mkfifo tensors.safetensors\n", "left no `tensors.safetensors`");
    let rewrites = format!("{COPY}echo >> adapter.sh\n");
    fails(&rewrites, "adapter.sh` changed while it was used");
    tensors(&project, "good.safetensors", &[("logits", [4, 2048], vec![f32::NAN; 8192])]);
    fails(COPY, "NaN or infinite; correct the program, nothing of it was kept");
    tensors(&project, "good.safetensors", &[("logits", [3, 2048], vec![0.5; 6144])]);
    fails(COPY, "the 4 rows that were asked for");
    tensors(&project, "good.safetensors", &[("logits", [4, 1024], vec![0.5; 4096])]);
    fails(COPY, "a vocabulary of 2048 tokens");
    tensors(&project, "good.safetensors", &[("other", [4, 1024], vec![0.5; 4096])]);
    fails(COPY, "has no tensor `logits`; it has `other` f32 [4, 1024]");
    project.runner(&["plan", "stages"]).expect(0, "X external run not in the cache");
}

#[test]
fn what_was_written_back_before_a_program_ended_is_no_input_of_its() {
    let script = format!("cat data > saved; echo 2 > data; cat saved > data; {COPY}");
    let project = with_adapter(FORWARD, &script).file("data", "1");
    let text = project.read("stages/x.toml").replace("\"good", "\"data\", \"good");
    project.write("stages/x.toml", &text);
    project.run().expect(4, "data` changed while it was used");
    assert_eq!(project.read("data"), "1");
}

#[test]
fn what_lies_beside_a_models_weights_is_in_the_key_of_a_program_that_opens_the_model() {
    let project = with_adapter(FORWARD, COPY);
    let folder = project.path("folder");
    fs::create_dir(&folder).expect("made");
    write_folder(&open(&synthetic_file(Preset::Qwen2Tiny)).expect("a model"), &folder, |_| {});
    let run = |arguments: &[&str]| {
        project.runner(&[arguments, &["stages", "--model", "folder"]].concat())
    };
    run(&["run"]).expect(0, "run: pass");
    run(&["run"]).expect(0, "everything was reused");
    let config = fs::read_to_string(folder.join("config.json")).expect("read");
    let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    config["torch_dtype"] = "bfloat16".into();
    fs::write(folder.join("config.json"), config.to_string()).expect("written");
    let plan = run(&["plan"]).expect(0, "X external run model file config.json");
    plan.expect(0, "X emulated reuse");
}

#[test]
fn a_hundred_gigabytes_are_not_written_mapped_or_believed() {
    let project = with_adapter(FORWARD, "true\n");
    let fails = |script: &str, words: &str| {
        project.write("adapter.sh", script);
        project.run().expect(4, words);
    };
    let more = "beyond what the tensors can need, and was stopped; write the sites of";
    fails("head -c 100000000000 /dev/zero > tensors.safetensors\n", more);
    // A file with a hole takes no space, and is as large.
    fails("truncate -s 100G tensors.safetensors\n", more);
    fails("exec dd if=/dev/zero of=tensors.safetensors bs=1 count=1 seek=100G\n", more);
    // A program may log much; what it logs is bounded as what it writes is.
    fails("yes >&2\n", more);
    let claims = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        fs::write(project.path("good.safetensors"), bytes).expect("written");
    };
    claims(r#"{"logits":{"dtype":"F32","shape":[4,6250000000],"data_offsets":[0,100000000000]}}"#);
    fails(COPY, "cannot be read");
    claims(r#"{"logits":{"dtype":"F32","shape":[4,2048],"data_offsets":[0,100000000000]}}"#);
    fails(COPY, "cannot be read");
    // A header that says of itself that it has 100 GB.
    let mut bytes = 100_000_000_000u64.to_le_bytes().to_vec();
    bytes.extend(b"{}");
    fs::write(project.path("good.safetensors"), bytes).expect("written");
    fails(COPY, "cannot be read");
}

#[test]
fn an_input_cannot_have_the_name_of_a_file_of_the_runners() {
    let project = with_adapter(FORWARD, COPY);
    project.write("request.json", "mine");
    let text =
        project.read("stages/x.toml").replace("\"adapter.sh\", \"good", "\"request.json\", \"good");
    project.write("stages/x.toml", &text);
    project.run().expect(2, "the input `request.json` has a name of the runner's own");
    assert_eq!(project.read("request.json"), "mine");
}

#[test]
fn a_retry_that_goes_well_is_called_flaky() {
    let project = with_adapter(FORWARD, "true\n");
    let mark = project.path("mark").display().to_string();
    let script = format!("test -e {mark} || {{ touch {mark}; exit 7; }}; {COPY}");
    project.write("adapter.sh", &script);
    project.run().expect(4, "status 7");
    fs::remove_file(&mark).expect("removed");
    let text = project.read("stages/x.toml");
    project.write("stages/x.toml", &format!("{text}retries = 1\n"));
    let ran = project.runner(&["run", "stages", "--format", "json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.out);
    assert!(ran.out.contains("flaky: attempt 2 went well, the first failed"), "{}", ran.out);
}

#[test]
fn checking_a_strangers_manifest_starts_nothing() {
    let project = with_adapter(FORWARD, "true\n");
    let mark = project.path("mark").display().to_string();
    project.write("adapter.sh", &format!("touch {mark}\n"));
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    project.runner(&["plan", "stages"]).expect(0, "X");
    assert!(!project.path("mark").exists());
}
