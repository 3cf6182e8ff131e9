//! The recorded arm: what PyTorch left of an H200, dropped in as manifests, and
//! recordings that are wrong in every way that a file can be.

use std::fs;
use std::path::{Path, PathBuf};

use crate::command::Project;
use crate::data::{large, own};
use crate::single::{claim, project, short, stage, tensors};

/// The example as it ships, with these captures beside its stages.
fn captures(data: &Path) -> Project {
    let mut project = project();
    for entry in fs::read_dir(own("examples/h200-captures/stages")).expect("the example") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        if name == "pipeline.toml" {
            continue;
        }
        let text = fs::read_to_string(&path).expect("a manifest");
        project = project.file(&format!("stages/{name}"), short(&text));
    }
    fs::remove_file(project.path("stages/pipeline.toml")).expect("removed");
    std::os::unix::fs::symlink(data, project.path("captures.safetensors")).expect("a link");
    project
}

fn shipped() -> PathBuf {
    own("examples/h200-captures/captures.safetensors")
}

#[test]
fn every_fp8_bf16_and_f16_capture_that_ships_is_met_in_every_bit() {
    let project = captures(&shipped());
    let first = every_capture_is_met(&project);
    // No model and no prompt take part, and none is spoken of.
    project.runner(&["explain", &first]).expect(0, "What ran\n  matmul\n");
}

#[test]
#[ignore = "needs RUNNER_DATA, see tests/it/data.rs"]
fn every_fp8_bf16_and_f16_capture_of_an_h200_is_met_in_every_bit() {
    every_capture_is_met(&captures(&large("h200/gemm-captures.safetensors")));
}

/// The first stage's id.
fn every_capture_is_met(project: &Project) -> String {
    let ran = project.runner(&["run", "stages", "--format", "json"]);
    assert_eq!(ran.code, Some(0), "{}\n{}", ran.out, ran.err);
    let run: serde_json::Value = serde_json::from_str(&ran.out).expect("run.json");
    let stages = run["stages"].as_array().expect("stages");
    assert_eq!(stages.len(), 16 + 8 + 4 + 2 + 4);
    for stage in stages {
        let why = stage["why"].as_str().unwrap_or_default();
        assert_eq!(stage["verdict"], "pass", "{why}");
        assert!(why.contains("recorded = emulated, 0 of "), "{why}");
        assert!(why.contains("split-K") && why.contains(" schedules tried"), "{why}");
    }
    let families = run["families"].as_array().expect("families");
    assert_eq!(families.len(), 5);
    assert!(families.iter().all(|family| family["verdict"] == "pass"), "{families:?}");
    stages[0]["id"].as_str().expect("an id").to_owned()
}

#[test]
fn a_wrong_scale_or_operand_of_a_capture_is_structural() {
    let project = captures(&shipped());
    let text = project.read("stages/fp8.toml").replace("[0, 1, 2, 7]", "[0]");
    let one = text.replace(
        "\"fast0.f32.absmax\", \"fast1.f32.absmax\", \"fast0.bf16.absmax\", \"fast1.bf16.absmax\"",
        "\"fast1.f32.absmax\"",
    );
    for name in ["fp8-unit", "mixed", "mixed-unit", "half"] {
        fs::remove_file(project.path(&format!("stages/{name}.toml"))).expect("removed");
    }
    for (from, to) in [("c{case}.x_scale", "c{case}.w_scale"), ("\"c{case}.x\"", "\"c3.x\"")] {
        project.write("stages/fp8.toml", &one.replace(from, to));
        let ran = project.run();
        assert_ne!(ran.code, Some(0), "{}", ran.out);
    }
    project.write("stages/fp8.toml", &one.replace("c{case}.x_scale", "c{case}.w_scale"));
    project.run().expect(1, "no schedule of");
}

/// A forward pass over one model, recorded elsewhere.
fn with_recording(lines: &str) -> Project {
    project()
        .file("stages/r.toml", &stage("R", "claim", lines))
        .file("contracts/claim.toml", &claim("recorded", "reference", "nmse", "1e-6"))
}

#[test]
fn recordings_that_are_wrong_are_errors_and_say_what_is_there() {
    let project = with_recording(
        "[forward]\n[recorded]\nfile = \"../r.safetensors\"\nnames = { \"logits\" = \"lm_head\" }\n",
    );
    project.run().expect(4, "cannot read");
    fs::write(project.path("r.safetensors"), b"half a file").expect("written");
    project.run().expect(4, "r.safetensors` cannot be read");
    tensors(&project, "r.safetensors", &[("lm_head.10", [4, 1024], vec![0.5; 4096])]);
    project.run().expect(4, "has no tensor `lm_head`; it has `lm_head.10` f32 [4, 1024]");
    tensors(&project, "r.safetensors", &[("lm_head", [2, 1024], vec![0.5; 2048])]);
    project.run().expect(4, "has 2 rows, and the prompt has 4 tokens");
    tensors(&project, "r.safetensors", &[("lm_head", [4, 2048], vec![f32::NAN; 8192])]);
    project.run().expect(1, "NaN or infinity: 8,192 of 8,192 values of recorded at logits");
    tensors(&project, "r.safetensors", &[("lm_head", [4, 2048], vec![0.5; 8192])]);
    project.run().expect(1, "C-1 at logits: nmse of recorded against reference");
}

#[test]
fn exported_tensors_come_back_as_a_recording_by_pattern() {
    let every = "[forward]\ncapture = \"every-site\"\n";
    let project = with_recording(every)
        .file("contracts/claim.toml", &claim("emulated", "reference", "nmse", "0.5"));
    project.run().expect(0, "run: pass");
    let out = project.path("r.safetensors").display().to_string();
    project.runner(&["export", "latest", "R", "reference", &out]).expect(0, "");
    let recorded = "[recorded]\nfile = \"../r.safetensors\"\n[recorded.names]\n\
                    \"blk.*.q\" = \"blk.*.q\"\n";
    project.write("stages/r.toml", &stage("R", "claim", &format!("{every}{recorded}")));
    project.write("contracts/claim.toml", &claim("recorded", "reference", "nmse", "1e-6"));
    project.run().expect(0, "run: pass");
}

#[test]
fn what_pipeline_toml_says_of_recordings_holds_for_every_stage_without_its_own() {
    let project = with_recording("[embed]\n")
        .file("contracts/claim.toml", &claim("emulated", "reference", "nmse", "0.5"));
    project.run().expect(0, "run: pass");
    let out = project.path("r.safetensors").display().to_string();
    project.runner(&["export", "latest", "R", "reference", &out]).expect(0, "");
    let defaults = project.read("stages/pipeline.toml");
    let recorded = "[recorded]\nfile = \"../r.safetensors\"\n";
    // The arms that a folder names are all that its stages have.
    let defaults = defaults.replace("arms", "# arms") + recorded;
    project.write("stages/pipeline.toml", &defaults);
    project.write("contracts/claim.toml", &claim("recorded", "reference", "bit_mismatches", "0"));
    project.run().expect(0, "run: pass");
    let own = "[embed]\n[recorded]\nfile = \"../other.safetensors\"\n";
    project.write("stages/r.toml", &stage("R", "claim", own));
    project.run().expect(4, "other.safetensors");
    let ambiguous = defaults + "tensor = \"x\"\n";
    project.write("stages/pipeline.toml", &ambiguous);
    project.runner(&["check", "stages"]).expect(2, "`tensor` names one tensor");
}
