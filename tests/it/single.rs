//! One kernel as one stage: every op from a site, from a file and from a seed, in
//! at most fifteen lines of TOML, run by the real program.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::command::Project;

/// A project with the shipped contracts and a small model.
pub fn project() -> Project {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("contracts");
    let mut project = Project::new();
    for entry in fs::read_dir(shipped).expect("contracts") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let text = fs::read_to_string(&path).expect("a contract");
        project = project.file(&format!("contracts/{name}"), &text);
    }
    project.file(
        "stages/pipeline.toml",
        "tokens = [791, 374, 264, 1296]\narms = [\"reference\", \"emulated\"]\n",
    )
}

/// A whole manifest; more than fifteen lines is no short stage.
#[track_caller]
pub fn short(text: &str) -> &str {
    let lines = text.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(lines <= 15, "{lines} lines:\n{text}");
    text
}

/// A manifest with these lines after its head.
#[track_caller]
pub fn stage(id: &str, contract: &str, lines: &str) -> String {
    let head = format!("id = \"{id}\"\ntitle = \"a question\"\ncontract = \"{contract}\"\n");
    short(&(head + lines)).to_owned()
}

/// A contract `claim` of one claim, over every site.
pub fn claim(subject: &str, judge: &str, metric: &str, max: &str) -> String {
    format!(
        r#"
name    = "claim"
version = "1.0.0"
[[equation]]
id      = "same"
formula = "{subject} = {judge}"
why     = "the same model"
[[falsifier]]
id         = "C-1"
equation   = "same"
prediction = "close"
compare    = ["{subject}", "{judge}"]
metric     = "{metric}"
max        = {max}
if_fails   = "structural"
why        = "of this test"
"#
    )
}

/// The shipped contracts ask for a device too: it may be absent, and must be asked for.
fn with_device(stage: &str) -> String {
    stage.replacen("contract", "arms = [\"reference\", \"emulated\", \"device\"]\ncontract", 1)
}

#[test]
fn every_op_of_any_layer_is_a_short_stage_on_another_stages_sites() {
    let site = |site: &str| format!("{{ stage = \"B\", site = \"{site}\" }}");
    let ops = [
        (
            "rms",
            "rms-norm",
            format!(
                "[rms_norm]\ninput = {}\nweight = \"blk.2.ffn_norm\"\n",
                site("blk.2.attn_residual")
            ),
        ),
        (
            "mm",
            "qkv-matmul",
            format!(
                "[matmul]\ninput = {}\nweights = [\"blk.3.ffn_down\"]\n",
                site("blk.3.ffn_swiglu")
            ),
        ),
        ("rope", "rope", format!("[rope]\ninput = {}\nsite = \"blk.1.k_rope\"\n", site("blk.1.k"))),
        (
            "att",
            "attention",
            format!(
                "[attention]\nq = {}\nk = {}\nv = {}\nsite = \"blk.3.attn\"\n",
                site("blk.3.q_rope"),
                site("blk.3.k_rope"),
                site("blk.3.v")
            ),
        ),
        (
            "swi",
            "swiglu",
            format!(
                "[swiglu]\ngate = {}\nup = {}\nsite = \"blk.0.ffn_swiglu\"\n",
                site("blk.0.ffn_gate"),
                site("blk.0.ffn_up")
            ),
        ),
        ("emb", "embedding", "[embed]\n".to_owned()),
    ];
    let every_site = "[forward]\ncapture = \"every-site\"\n";
    let mut project = project()
        .file("stages/b.toml", &stage("B", "claim", every_site))
        .file("contracts/claim.toml", &claim("emulated", "reference", "non_finite", "0"));
    for (id, contract, lines) in &ops {
        let text = with_device(&stage(id, contract, lines));
        project = project.file(&format!("stages/{id}.toml"), &text);
    }
    let ran = project.run().expect(0, "run: pass");
    for (id, ..) in &ops {
        let line = ran.out.lines().find(|line| line.starts_with(id)).unwrap_or_default();
        assert!(line.contains(" pass "), "{id}: {}", ran.out);
    }
    project.run().expect(0, "everything was reused");
}

#[test]
fn every_kernel_runs_on_generated_values_of_every_distribution() {
    const MADE: &str = "{ generate = \"{values}\", rows = 16 }";
    let usual = ["normal", "heavy-tailed", "outlier-channels", "sparse"];
    let all = ["normal", "heavy-tailed", "outlier-channels", "sparse", "subnormal"];
    let project = project();
    // Each member has a line, and so has each family.
    let add = |id: &str, contract: &str, values: &[&str], inputs: &[&str], op: &str| {
        let inputs: String = inputs.iter().map(|key| format!("{key} = {MADE}\n")).collect();
        let lines = format!("seed = 3\n[for]\nvalues = {values:?}\n{op}{inputs}");
        let text = with_device(&stage(id, contract, &lines));
        project.write(&format!("stages/{id}.toml"), &text);
        values.len() + 1
    };
    // What subnormals lose in a norm or a product is not what these contracts bound.
    let norm = "[rms_norm]\nweight = \"blk.1.attn_norm\"\n";
    let lines = add("norm", "rms-norm", &usual, &["input"], norm)
        + add("rope", "rope", &all, &["input"], "[rope]\nsite = \"blk.1.q_rope\"\n")
        + add("att", "attention", &all, &["q", "k", "v"], "[attention]\nsite = \"blk.1.attn\"\n")
        + add("swi", "swiglu", &all, &["gate", "up"], "[swiglu]\nsite = \"blk.1.ffn_swiglu\"\n")
        + add("mm", "qkv-matmul", &usual, &["input"], "[matmul]\nweights = [\"blk.1.attn_q\"]\n");
    let ran = project.run().expect(0, "run: pass");
    let rows = ran.out.lines().filter(|line| line.contains(" pass ")).count();
    assert_eq!(rows, lines + 1, "the run has a line too: {}", ran.out);
}

#[test]
fn a_generated_input_is_as_wide_as_the_model_asks_and_another_models_is_not_reused() {
    let made = "{ generate = \"normal\", rows = 4 }";
    let lines = format!("[swiglu]\ngate = {made}\nup = {made}\nsite = \"blk.1.ffn_swiglu\"\n");
    let project = project().file("stages/s.toml", &stage("S", "swiglu", &lines));
    // The gates of a feed-forward network, of two experts side by side, and of other two.
    for (model, width) in [("stablelm", 48), ("mixtral", 96), ("qwen3-moe", 32)] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/small-models");
        let folder = folder.join(model);
        let folder = folder.to_str().expect("a path");
        let ran = project.runner(&["run", "stages", "--model", folder, "--tokens", "1,2,3"]);
        ran.expect(0, "reference  ran in").expect(0, "run: pass");
        let out = project.path("out.safetensors");
        let out = out.to_str().expect("a path");
        let _ = fs::remove_file(out);
        project.runner(&["export", "latest", "S", "reference", out]).expect(0, "");
        let bytes = fs::read(out).expect("exported");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        assert_eq!(file.tensor("blk.1.ffn_swiglu").expect("the site").shape(), [4, width]);
    }
}

#[test]
fn a_claim_of_equal_bits_at_one_site_is_told_of_that_site_alone() {
    let claim = claim("emulated", "reference", "bit_mismatches", "0");
    let claim = claim.replace("max  ", "sites = [\"embed\"]\nmax  ");
    let every_site = "[forward]\ncapture = \"every-site\"\n";
    let project = project()
        .file("stages/b.toml", &stage("B", "claim", every_site))
        .file("contracts/claim.toml", &claim);
    // Four tokens, 256 wide.
    project.run().expect(0, "emulated = reference, 0 of 1,024 values differ");
}

#[test]
fn stages_of_one_run_that_share_an_arm_speak_of_no_other_runner() {
    let project =
        project().file("contracts/claim.toml", &claim("emulated", "reference", "nmse", "0.5"));
    for id in ["A", "B", "C"] {
        let manifest = stage(id, "claim", "[forward]\ncapture = \"every-site\"\n");
        project.write(&format!("stages/{}.toml", id.to_lowercase()), &manifest);
    }
    let ran = project.runner(&["run", "stages", "--quiet", "--jobs", "3"]).expect(0, "run: pass");
    assert_eq!(ran.err, "");
}

/// A safetensors file of f32 matrices.
pub fn tensors(project: &Project, name: &str, tensors: &[(&str, [usize; 2], Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a view"))
    });
    let file = safetensors::serialize(views, None).expect("a file");
    fs::write(project.path(name), file).expect("written");
}

fn wave(count: usize) -> Vec<f32> {
    (0..count).map(|index| (index as f32 * 0.7).sin()).collect()
}

#[test]
fn an_input_may_lie_in_a_file_and_its_content_decides_what_is_reused() {
    let input = "{ file = \"../x.safetensors\", tensor = \"x\" }";
    let lines = format!("[rope]\ninput = {input}\nsite = \"blk.0.k_rope\"\n");
    let project = project().file("stages/f.toml", &with_device(&stage("F", "rope", &lines)));
    project.run().expect(4, "cannot read");
    tensors(&project, "x.safetensors", &[("x", [2, 64], wave(128))]);
    project.run().expect(0, "run: pass");
    project.run().expect(0, "everything was reused");
    tensors(&project, "x.safetensors", &[("x", [2, 64], wave(129)[1..].to_vec())]);
    project.runner(&["plan", "stages"]).expect(0, "input:");
    tensors(&project, "x.safetensors", &[("y", [2, 64], wave(128))]);
    project.run().expect(4, "has no tensor `x`; it has `y` f32 [2, 64]");
}

#[test]
fn two_files_are_compared_without_a_model() {
    let lines = "model = \"no such model\"\n[compare]\n\
                 reference = { file = \"../a.safetensors\", tensor = \"t\" }\n\
                 recorded = { file = \"../b.bin\", dtype = \"f32\", shape = [2, 8] }\n";
    let project = project().file("stages/c.toml", &stage("C", "comparison", lines));
    tensors(&project, "a.safetensors", &[("t", [2, 8], wave(16))]);
    let raw = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut other = wave(16);
    other[3] += 1e-7;
    fs::write(project.path("b.bin"), raw(&other)).expect("written");
    project.run().expect(0, "run: pass");
    other[3] += 0.1;
    fs::write(project.path("b.bin"), raw(&other)).expect("written");
    project.run().expect(1, "CMP-001 at compared: nmse of recorded against reference");
    fs::write(project.path("b.bin"), raw(&other[..9])).expect("written");
    project.run().expect(4, "has 36 bytes, and 16 elements of 4 were expected");
    other[5] = f32::NAN;
    fs::write(project.path("b.bin"), raw(&other)).expect("written");
    project.run().expect(1, "NaN or infinity: 1 of 16 values of recorded at compared, first NaN");
}

#[test]
fn manifests_of_single_ops_are_refused_with_the_remedy() {
    let check = |op: &str, words: &str| {
        let project = project().file("stages/x.toml", &stage("X", "rope", op));
        project.runner(&["check", "stages"]).expect(2, words);
    };
    let input = "input = { generate = \"normal\", rows = 4 }";
    check(&format!("[rope]\n{input}\nsite = \"blk.0.q\"\n"), "it makes `blk.N.q_rope`");
    check(
        "[rope]\ninput = { generate = \"gaussian\", rows = 4 }\nsite = \"blk.0.q_rope\"\n",
        "`generate` is one of",
    );
    check(
        "[rope]\ninput = { generate = \"normal\", rows = 0 }\nsite = \"blk.0.q_rope\"\n",
        "the number of tokens",
    );
    check(
        "[rope]\ninput = { file = \"a\", stage = \"B\" }\nsite = \"blk.0.q_rope\"\n",
        "several sources",
    );
    check(
        "[compare]\nrecorded = { file = \"a\" }\n",
        "needs `reference` and at least one other arm",
    );
    check(
        &format!("[for]\nlayer = [0, 1]\n[rope]\n{input}\nsite = \"blk.0.q_rope\"\n"),
        "`layer` of `[for]` is used nowhere",
    );
    check(
        &format!("[for]\nlayer = []\n[rope]\n{input}\nsite = \"blk.{{layer}}.q_rope\"\n"),
        "has no value",
    );
    let beyond = stage("X", "rope", &format!("[rope]\n{input}\nsite = \"blk.9.q_rope\"\n"));
    project().file("stages/x.toml", &beyond).run().expect(2, "beyond the model's 4 layers");
}
