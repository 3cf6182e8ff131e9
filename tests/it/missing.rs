//! What is missing is said: files and names that `check` can see, and sites, rows and numbers
//! that only a run meets, which stand first in the reason.

use std::fs;

use runner::model::Model;

use crate::command::{Outcome, Project};
use crate::model::draft;
use crate::single::{claim, project, stage, tensors};

const EVERY: &str = "[forward]\ncapture = \"every-site\"\n";

/// A forward pass with a recording of it, made of the reference's own tensors.
pub fn recorded(lines: &str) -> Project {
    let project = project()
        .file("stages/r.toml", &stage("R", "claim", EVERY))
        .file("contracts/claim.toml", &claim("emulated", "reference", "nmse", "0.5"));
    project.run().expect(0, "run: pass");
    let out = project.path("dump.safetensors").display().to_string();
    project.runner(&["export", "latest", "R", "reference", &out]).expect(0, "");
    project.write("contracts/claim.toml", &claim("recorded", "reference", "nmse", "1e-6"));
    set(&project, "dump.safetensors", lines);
    project
}

pub fn set(project: &Project, file: &str, lines: &str) {
    let lines = format!("{EVERY}[recorded]\nfile = \"../{file}\"\n{lines}");
    project.write("stages/r.toml", &stage("R", "claim", &lines));
}

/// The recording with its tensors under other names.
pub fn renamed(project: &Project, file: &str, name: impl Fn(&str) -> String) {
    let bytes = fs::read(project.path("dump.safetensors")).expect("the dump");
    let dump = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensors = dump.iter().map(|(site, view)| (name(site), view));
    let file_bytes = safetensors::serialize(tensors, None).expect("a file");
    fs::write(project.path(file), file_bytes).expect("written");
}

#[test]
fn check_finds_files_that_are_not_there_and_says_which_one_was_meant() {
    let project = recorded("");
    project.runner(&["check", "stages"]).expect(0, "1 stage and ");
    set(&project, "dump.safetensor", "");
    project.runner(&["check", "stages"]).expect(2, "did you mean `dump.safetensors`?");
    project.run().expect(4, "the recorded arm failed: cannot read");
    let lines = "[matmul]\nx = { file = \"../x.bin\", dtype = \"bf16\", shape = [2, 4] }\n\
                 w = { file = \"../dump.safetensors\", tensor = \"blk.0.qq\" }\n";
    project.write("stages/r.toml", &stage("R", "coded-matmul", lines));
    let told = project.runner(&["check", "stages"]).expect(2, "x.bin` does not exist");
    assert!(told.err.contains("has no tensor `blk.0.qq`"), "{}", told.err);
    assert!(told.err.contains("did you mean `blk.0.q`?"), "{}", told.err);
    project.write("stages/r.toml", &stage("R", "claim", &format!("model = \"no.gguf\"\n{EVERY}")));
    project.runner(&["check", "stages"]).expect(2, "no.gguf` does not exist");
}

#[test]
fn check_waits_for_what_a_command_of_the_folder_makes() {
    let project = project()
        .file("stages/r.toml", &stage("R", "claim", EVERY))
        .file("contracts/claim.toml", &claim("recorded", "reference", "nmse", "1e-6"));
    set(&project, "dump.safetensors", "");
    let command = "[command]\nargv = [\"true\"]\noutputs = [\"dump.safetensors\"]\n";
    project.write("stages/c.toml", &stage("C", "command", command));
    project.runner(&["check", "stages"]).expect(0, "2 stages and ");
}

#[test]
fn check_finds_names_that_fit_no_site_or_no_tensor() {
    let project = recorded("[recorded.names]\n\"blk.*.ffn_upp\" = \"blk.*.ffn_up\"\n");
    project.runner(&["check", "stages"]).expect(2, "did you mean `blk.*.ffn_up`?");
    set(&project, "dump.safetensors", "[recorded.names]\n\"blk.*.attn\" = \"blk.*.atn\"\n");
    let words = "no tensor of `stages/../dump.safetensors` is called `blk.*.atn`, as `blk.*.attn`";
    let told = project.runner(&["check", "stages"]).expect(2, words);
    assert!(told.err.contains("did you mean `blk.*.attn`?"), "{}", told.err);
    let names = "[recorded.names]\n\"blk.*.q\" = \"q.{*+x}.{*}\"\n";
    set(&project, "dump.safetensors", names);
    project.runner(&["check", "stages"]).expect(2, "one `*` on each side");
    set(&project, "dump.safetensors", "names = \"transformer\"\n");
    project.runner(&["check", "stages"]).expect(2, "did you mean `transformers`?");
    set(&project, "dump.safetensors", "");
    let defaults = project.read("stages/pipeline.toml").replace("264, 1296", "264");
    project.write("stages/pipeline.toml", &defaults);
    project.runner(&["check", "stages"]).expect(2, "has 4 rows, and the prompt has 3 tokens");
    project.run().expect(4, "has 4 rows, and the prompt has 3 tokens: record the pass of this");
}

#[test]
fn sites_without_a_tensor_stand_first_in_the_reason_with_what_no_site_uses() {
    let project = recorded("");
    renamed(&project, "other.safetensors", |site| site.replace(".ffn_up", ".up"));
    set(&project, "other.safetensors", "");
    let absent = "`stages/../other.safetensors` has no tensor for 4 of 63 sites: `blk.*.ffn_up`; \
                  no site uses `blk.0.up`, `blk.1.up`, `blk.2.up`, `blk.3.up`";
    assert!(why(&project, 0).contains(&format!("; not judged: {absent}")), "{}", why(&project, 0));
    let judged = claim("recorded", "reference", "nmse", "1e-6");
    let judged = judged.replace("max  ", "sites = [\"blk.*.ffn_up\"]\nmax  ");
    project.write("contracts/claim.toml", &judged);
    assert!(why(&project, 3).starts_with(absent), "{}", why(&project, 3));
}

/// The reason of the only stage.
pub fn why(project: &Project, code: i32) -> String {
    let ran = project.runner(&["run", "stages", "--format", "json"]);
    assert_eq!(ran.code, Some(code), "{}\n{}", ran.out, ran.err);
    let run: serde_json::Value = serde_json::from_str(&ran.out).expect("run.json");
    run["stages"][0]["why"].as_str().expect("a reason").to_owned()
}

#[test]
fn a_value_that_is_no_number_outranks_every_metric() {
    let project = recorded("");
    let bytes = fs::read(project.path("dump.safetensors")).expect("the dump");
    let (length, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
    let start = 8 + length + header.info("blk.2.v").expect("a site").data_offsets.0;
    let mut changed = bytes.clone();
    changed[start + 20..start + 24].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(project.path("dump.safetensors"), &changed).expect("written");
    for judged in ["1e-6", "1e6"] {
        project.write("contracts/claim.toml", &claim("recorded", "reference", "nmse", judged));
        let why = why(&project, 1);
        let said = "of recorded at blk.2.v, first NaN at row 0, column 5, where reference";
        assert!(why.starts_with("NaN or infinity: 1 of "), "{why}");
        assert!(why.contains(said), "{why}");
    }
}

#[test]
fn a_folder_of_one_npy_for_each_tensor_is_a_recording() {
    let project = recorded("");
    let bytes = fs::read(project.path("dump.safetensors")).expect("the dump");
    let dump = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    fs::create_dir(project.path("dump")).expect("a folder");
    let npy = |shape: &[usize], data: &[u8]| {
        let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
        // A leading dimension of one is how engines hand their batch over.
        let mut header = format!(
            "{{'descr': '<f4', 'fortran_order': False, 'shape': (1, {}), }}",
            shape.join(", ")
        );
        header.push_str(&" ".repeat((64 - (10 + header.len() + 1) % 64) % 64));
        header.push('\n');
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    };
    for (site, view) in dump.iter() {
        let path = project.path(&format!("dump/{site}.npy"));
        fs::write(path, npy(view.shape(), view.data())).expect("written");
    }
    set(&project, "dump", "");
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    project.run().expect(0, "run: pass");
    project.run().expect(0, "everything was reused");
    // One file of the folder is another one: what was kept does not stand for it.
    let path = project.path("dump/blk.1.v.npy");
    let mut changed = fs::read(&path).expect("a tensor");
    let end = changed.len();
    changed[end - 4..].copy_from_slice(&9.0f32.to_le_bytes());
    fs::write(&path, changed).expect("written");
    project.run().expect(1, "C-1 at blk.1.v");
    // A single file of one tensor is no forward pass.
    fs::copy(&path, project.path("one.npy")).expect("copied");
    set(&project, "one.npy", "");
    project.run().expect(4, "holds one tensor without a name, and the stage makes 63 sites");
}

/// The module of transformers that makes a site; the site itself where none does.
pub fn module_of(site: &str) -> String {
    let Some((layer, inner)) = site.strip_prefix("blk.").and_then(|rest| rest.split_once('.'))
    else {
        return match site {
            "embed" => "model.embed_tokens".to_owned(),
            "output_norm" => "model.norm".to_owned(),
            "logits" => "lm_head".to_owned(),
            other => other.to_owned(),
        };
    };
    let module = match inner {
        "attn_norm" => ".input_layernorm",
        "q" => ".self_attn.q_proj",
        "k" => ".self_attn.k_proj",
        "v" => ".self_attn.v_proj",
        "attn_out" => ".self_attn.o_proj",
        "ffn_norm" => ".post_attention_layernorm",
        "ffn_gate" => ".mlp.gate_proj",
        "ffn_up" => ".mlp.up_proj",
        "ffn_down" => ".mlp.down_proj",
        "ffn_residual" => "",
        _ => return site.to_owned(),
    };
    format!("model.layers.{layer}{module}")
}

#[test]
fn names_come_from_a_preset_with_exceptions_and_layers_may_count_from_one() {
    let project = recorded("");
    let module = |site: &str| match site.strip_suffix(".ffn_residual") {
        Some(block) => {
            let layer: usize = block["blk.".len()..].parse().expect("a layer");
            format!("hidden_states.{}", layer + 1)
        }
        None => module_of(site),
    };
    renamed(&project, "modules.safetensors", module);
    let names = "[recorded.names]\npreset = \"transformers\"\n\
                 \"blk.*.ffn_residual\" = \"hidden_states.{*+1}\"\n";
    set(&project, "modules.safetensors", names);
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    let why = why(&project, 0);
    assert!(!why.contains("no tensor for"), "{why}");
    set(&project, "modules.safetensors", "names = \"transformers\"\n");
    let partly = self::why(&project, 0);
    assert!(
        partly.contains("for 4 of 63 sites: `blk.*.ffn_residual` (as `model.layers.*`)"),
        "{partly}"
    );
}

#[test]
fn a_part_of_a_fused_product_is_taken_by_its_name_or_its_columns() {
    let project = recorded("");
    let bytes = fs::read(project.path("dump.safetensors")).expect("the dump");
    let dump = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let values = |site: &str| -> (usize, Vec<f32>) {
        let view = dump.tensor(site).expect("a site");
        let values = view.data().as_chunks().0.iter().map(|&word| f32::from_le_bytes(word));
        (view.shape()[1], values.collect())
    };
    let mut all: Vec<(String, [usize; 2], Vec<f32>)> = Vec::new();
    let mut width = 0;
    for site in dump.names() {
        let part = site.rsplit('.').next().unwrap_or_default();
        if matches!(part, "k" | "v") {
            continue;
        }
        let (mut columns, mut data) = values(site);
        let mut name = site.to_owned();
        if part == "q" {
            (width, name) = (columns, site.replace(".q", ".qkv"));
            let others = ["k", "v"].map(|other| values(&site.replace(".q", &format!(".{other}"))));
            let rows = data.len() / columns;
            let mut fused = Vec::new();
            for row in 0..rows {
                fused.extend(&data[row * columns..][..columns]);
                for (width, data) in &others {
                    fused.extend(&data[row * width..][..*width]);
                }
            }
            columns = fused.len() / rows;
            data = fused;
        }
        all.push((name, [data.len() / columns, columns], data));
    }
    let all: Vec<(&str, [usize; 2], Vec<f32>)> =
        all.iter().map(|(name, shape, data)| (name.as_str(), *shape, data.clone())).collect();
    tensors(&project, "fused.safetensors", &all);
    let names = format!(
        "[recorded.names]\n\"blk.*.q\" = \"blk.*.qkv[0:{width}]\"\n\
         \"blk.*.k\" = \"blk.*.qkv[k]\"\n\"blk.*.v\" = \"blk.*.qkv[v]\"\n"
    );
    set(&project, "fused.safetensors", &names);
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    let why = why(&project, 0);
    assert!(!why.contains("no tensor for"), "{why}");
    set(&project, "fused.safetensors", &names.replace("[k]", "[v]"));
    project.run().expect(1, "C-1 at blk.0.k");
    set(&project, "fused.safetensors", &names.replace("[k]", "[0:99999]"));
    project.run().expect(4, "wide, and its columns 0 to 99999 are asked for");
}

#[test]
fn what_is_recorded_of_an_engine_stands_for_the_program_of_its_contract() {
    let project = recorded("");
    project.write("contracts/claim.toml", &claim("external", "reference", "nmse", "1e-6"));
    project.run().expect(0, "run: pass");
}

#[test]
fn a_contract_of_the_project_s_own_kernels_beside_an_engine_s_recipe_is_said_before_it_runs() {
    let norm =
        "[rms_norm]\ninput = { generate = \"normal\", rows = 4 }\nweight = \"blk.0.attn_norm\"\n";
    let matmul =
        "[matmul]\ninput = { generate = \"normal\", rows = 4 }\nweights = [\"blk.0.attn_q\"]\n";
    let with = |recipe: &str, contract: &str, op: &str| {
        let project = project().file("stages/r.toml", &stage("R", contract, op));
        let defaults = project.read("stages/pipeline.toml");
        project.write("stages/pipeline.toml", &format!("{defaults}recipe = {recipe}\n"));
        project
    };
    let bf16 = "{ gemm = \"bf16\", output = \"bf16\", stream = \"bf16\" }";
    let f32 = "{ gemm = \"f32\", output = \"f32\", stream = \"f32\" }";
    let said = |outcome: &Outcome| format!("{}{}", outcome.out, outcome.err);
    for (recipe, contract, op, falsifier) in [
        (bf16, "rms-norm", norm, "RMS-001"),
        (bf16, "per-layer", EVERY, "LAY-005"),
        ("{ engine = \"transformers\" }", "rms-norm", norm, "RMS-001"),
        ("{ engine = \"transformers\", stream = \"f16\" }", "per-layer", EVERY, "LAY-005"),
        (bf16, "embedding", "[embed]\n", "EMB-001"),
    ] {
        let project = with(recipe, contract, op);
        for (command, code) in [("check", 0), ("plan", 0), ("run", 1)] {
            // Whether a lookup is rounded its values say, and these the model has.
            if command == "check" && contract == "embedding" {
                continue;
            }
            let told = project.runner(&[command, "stages"]);
            assert_eq!(told.code, Some(code), "{}", said(&told));
            for part in [
                format!("warning: the contract `{contract}` is of the project's own kernels"),
                format!("its falsifier `{falsifier}` allows "),
                "so the verdict will be `structural`; write a contract that judges an engine"
                    .to_owned(),
                "in stage `R` (`stages/r.toml`)".to_owned(),
            ] {
                assert!(said(&told).contains(&part), "{part}: {}", said(&told));
            }
        }
        // The verdict is what was said.
        assert!(project.runner(&["explain", "R"]).out.contains("Verdict: structural"));
    }
    // Of contracts of engines, of types that are not narrow, and of what rounds as far nothing is said.
    for (recipe, contract, op) in [
        (f32, "rms-norm", norm),
        (f32, "embedding", "[embed]\n"),
        (bf16, "engine", EVERY),
        (bf16, "qkv-matmul", matmul),
    ] {
        let project = with(recipe, contract, op);
        for command in ["check", "plan"] {
            let told = project.runner(&[command, "stages"]).expect(0, "");
            assert!(!said(&told).contains("warning"), "{contract}: {}", said(&told));
        }
    }
    let lone = with(bf16, "rms-norm", norm);
    let defaults = lone.read("stages/pipeline.toml").replace(", \"emulated\"", "");
    lone.write("stages/pipeline.toml", &defaults);
    let told = lone.runner(&["plan", "stages"]).expect(0, "");
    assert!(!said(&told).contains("warning"), "the reference alone keeps every bound");
}

#[test]
fn a_weight_that_is_no_number_is_the_files_fault_and_no_arms() {
    let (embedding, width) = ("token_embd.weight", 8);
    let run = |tied: bool, spoilt: &str, value: usize, number: f32, op: &str| {
        let project = project();
        let model = draft("llama");
        let model = if tied { model } else { model.tensor("output.weight", &[300, 8]) };
        let path = project.path("model.gguf");
        let mut file = model.write();
        fs::write(&path, &file).expect("written");
        let opened = Model::open(&path).expect("a model");
        let start = opened.origin(spoilt).expect("of a file").offset + 4 * value;
        file[start..start + 4].copy_from_slice(&number.to_le_bytes());
        fs::write(&path, &file).expect("written");
        let lines = format!("model = \"../model.gguf\"\ntokens = [1, 2, 3]\n{op}");
        project.write("stages/r.toml", &stage("R", "claim", &lines));
        project.write("contracts/claim.toml", &claim("emulated", "reference", "nmse", "0.5"));
        let ran = project.runner(&["run", "stages", "--format", "json"]);
        let record: serde_json::Value = serde_json::from_str(&ran.out).expect(&ran.err);
        let said = |key: &str| record["stages"][0][key].as_str().unwrap_or_default().to_owned();
        (said("verdict"), said("why"))
    };
    let forward = "[forward]\n";
    let place = |row: usize, column: usize| row * width + column;
    for (tied, spoilt, value, number, words) in [
        (true, embedding, place(50, 3), f32::NAN, "value 3 of row 50 is NaN"),
        (true, embedding, place(50, 3), f32::INFINITY, "value 3 of row 50 is inf"),
        (false, "output.weight", place(50, 3), f32::NAN, "value 3 of row 50 is NaN"),
        (false, embedding, place(2, 1), f32::NAN, "value 1 of row 2 is NaN"),
        (true, "blk.0.ffn_norm.weight", 7, f32::NAN, "value 7 of row 0 is NaN"),
        (true, "blk.0.attn_q.weight", place(5, 6), f32::NAN, "value 6 of row 5 is NaN"),
    ] {
        let (verdict, why) = run(tied, spoilt, value, number, forward);
        assert_eq!(verdict, "error", "{spoilt}: {why}");
        assert!(why.starts_with("no arm is at fault: "), "{why}");
        assert!(why.contains(&format!("`{spoilt}`: {words}")), "{words}: {why}");
    }
    // No token is looked up there, and nothing else reads it.
    let (verdict, why) = run(false, embedding, place(50, 3), f32::NAN, forward);
    assert_eq!(verdict, "pass", "{why}");
    let (verdict, why) =
        run(true, embedding, place(50, 3), f32::NAN, "[embed]\nweight = \"token_embd\"\n");
    assert_eq!(verdict, "pass", "{why}");
}
