//! One kernel as one stage: every op from a site, from a file and from a seed, in
//! at most fifteen lines of TOML, run by the real program.

use std::fs;
use std::path::Path;

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

const EVERY_SITE: &str = r#"
id       = "B"
title    = "all sites"
contract = "local"
[forward]
capture = "every-site"
"#;

/// The device's falsifiers cannot be measured where no device is asked for.
const LOCAL: &str = r#"
name    = "local"
version = "1.0.0"
[[equation]]
id      = "finite"
formula = "finite"
why     = "finite weights"
[[falsifier]]
id         = "L-1"
equation   = "finite"
prediction = "finite"
compare    = ["emulated", "reference"]
metric     = "non_finite"
max        = 0
if_fails   = "structural"
why        = "0"
"#;

/// The shipped contracts ask for a device too: it may be absent, and must be asked for.
fn with_device(stage: &str) -> String {
    stage.replacen("contract", "arms = [\"reference\", \"emulated\", \"device\"]\ncontract", 1)
}

#[test]
fn every_op_of_any_layer_is_a_short_stage_on_another_stages_sites() {
    let stages = [
        r#"
id       = "rms"
title    = "the FFN norm of layer 2"
contract = "rms-norm"
[rms_norm]
input  = { stage = "B", site = "blk.2.attn_residual" }
weight = "blk.2.ffn_norm"
"#,
        r#"
id       = "mm"
title    = "the down projection of layer 3"
contract = "qkv-matmul"
[matmul]
input   = { stage = "B", site = "blk.3.ffn_swiglu" }
weights = ["blk.3.ffn_down"]
"#,
        r#"
id       = "rope"
title    = "the rotated keys of layer 1"
contract = "rope"
[rope]
input = { stage = "B", site = "blk.1.k" }
site  = "blk.1.k_rope"
"#,
        r#"
id       = "att"
title    = "the attention of layer 3"
contract = "attention"
[attention]
q    = { stage = "B", site = "blk.3.q_rope" }
k    = { stage = "B", site = "blk.3.k_rope" }
v    = { stage = "B", site = "blk.3.v" }
site = "blk.3.attn"
"#,
        r#"
id       = "swi"
title    = "the SwiGLU of layer 0"
contract = "swiglu"
[swiglu]
gate = { stage = "B", site = "blk.0.ffn_gate" }
up   = { stage = "B", site = "blk.0.ffn_up" }
site = "blk.0.ffn_swiglu"
"#,
        r#"
id       = "emb"
title    = "the embedding"
contract = "embedding"
[embed]
"#,
    ];
    let mut project =
        project().file("stages/b.toml", EVERY_SITE).file("contracts/local.toml", LOCAL);
    for (number, stage) in stages.iter().enumerate() {
        project = project.file(&format!("stages/s{number}.toml"), &with_device(short(stage)));
    }
    let ran = project.run().expect(0, "run: pass");
    for name in ["rms", "mm", "rope", "att", "swi", "emb"] {
        let line = ran.out.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        assert!(line.contains(" pass "), "{name}: {}", ran.out);
    }
    project.run().expect(0, "everything was reused");
}

#[test]
fn every_kernel_runs_on_generated_values_of_every_distribution() {
    let of = |id: &str, contract: &str, op: &str| {
        format!(
            "id = \"{id}\"\ntitle = \"generated\"\ncontract = \"{contract}\"\n\
             arms = [\"reference\", \"emulated\", \"device\"]\nseed = 3\n\
             [for]\nvalues = [\"normal\", \"heavy-tailed\", \"outlier-channels\", \"sparse\", \
             \"subnormal\"]\n{op}"
        )
    };
    let made = "{ generate = \"{values}\", rows = 16 }";
    let project = project()
        .file(
            "stages/n.toml",
            &of(
                "norm",
                "rms-norm",
                &format!("[rms_norm]\ninput = {made}\nweight = \"blk.1.attn_norm\"\n"),
            )
            .replace(", \"subnormal\"", ""),
        )
        .file(
            "stages/r.toml",
            &of("rope", "rope", &format!("[rope]\ninput = {made}\nsite = \"blk.1.q_rope\"\n")),
        )
        .file(
            "stages/a.toml",
            &of(
                "att",
                "attention",
                &format!(
                    "[attention]\nq = {made}\nk = {made}\nv = {made}\nsite = \"blk.1.attn\"\n"
                ),
            ),
        )
        .file(
            "stages/s.toml",
            &of(
                "swi",
                "swiglu",
                &format!("[swiglu]\ngate = {made}\nup = {made}\nsite = \"blk.1.ffn_swiglu\"\n"),
            ),
        )
        .file(
            "stages/m.toml",
            &of(
                "mm",
                "qkv-matmul",
                &format!("[matmul]\ninput = {made}\nweights = [\"blk.1.attn_q\"]\n"),
            )
            .replace(", \"subnormal\"", ""),
        );
    let ran = project.run().expect(0, "run: pass");
    let rows = ran.out.lines().filter(|line| line.contains(" pass ")).count();
    assert!(rows >= 28, "{}", ran.out);
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
    let stage = short(
        r#"
id       = "F"
title    = "from a file"
contract = "rope"
arms     = ["reference", "emulated", "device"]
[rope]
input = { file = "../x.safetensors", tensor = "x" }
site  = "blk.0.k_rope"
"#,
    )
    .to_owned();
    let project = project().file("stages/f.toml", &stage);
    let missing = project.run().expect(3, "cannot read");
    assert!(missing.out.contains("unmeasured"), "{}", missing.out);
    tensors(&project, "x.safetensors", &[("x", [2, 64], wave(128))]);
    project.run().expect(0, "run: pass");
    project.run().expect(0, "everything was reused");
    tensors(&project, "x.safetensors", &[("x", [2, 64], wave(129)[1..].to_vec())]);
    project.runner(&["plan", "stages"]).expect(0, "input:");
    tensors(&project, "x.safetensors", &[("y", [2, 64], wave(128))]);
    project.run().expect(3, "has no tensor `x`; it has `y` f32 [2, 64]");
}

#[test]
fn two_files_are_compared_without_a_model() {
    let stage = short(
        r#"
id       = "C"
title    = "the same logits?"
contract = "comparison"
model    = "no such model"
[compare]
reference = { file = "../a.safetensors", tensor = "t" }
recorded  = { file = "../b.bin", dtype = "f32", shape = [2, 8] }
"#,
    )
    .to_owned();
    let project = project().file("stages/c.toml", &stage);
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
    project.run().expect(3, "has 36 bytes, and 16 elements of 4 were expected");
    other[5] = f32::NAN;
    fs::write(project.path("b.bin"), raw(&other)).expect("written");
    project.run().expect(1, "non_finite");
}

#[test]
fn manifests_of_single_ops_are_refused_with_the_remedy() {
    let check = |op: &str, words: &str| {
        let text = format!("id = \"X\"\ntitle = \"t\"\ncontract = \"rope\"\n{op}");
        let project = project().file("stages/x.toml", &text);
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
    let beyond = format!(
        "id = \"X\"\ntitle = \"t\"\ncontract = \"rope\"\n[rope]\n{input}\nsite = \"blk.9.q_rope\"\n"
    );
    project().file("stages/x.toml", &beyond).run().expect(2, "beyond the model's 4 layers");
}
