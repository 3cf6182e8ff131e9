//! `gemm = "checkpoint"`: products of the codes that a checkpoint holds.
//!
//! The folders are those that vLLM computed (`examples/vllm-checkpoints`) and that packages wrote
//! (`tests/fixtures/quantised`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use runner::compute::Ops;
use runner::compute::arms::{self, Task};
use runner::compute::call::Call;
use runner::compute::emulated::arm::Emulated;
use runner::compute::floor::Floor;
use runner::compute::reference::Reference;
use runner::dtype::Format;
use runner::model::Model;
use runner::op::{Accumulate, Capture, ChipName, Codes, Op, Recipe};
use runner::tensor::Tensor;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn recipe() -> Recipe {
    Recipe { codes: Codes::Checkpoint, chip: ChipName::Hopper, ..Recipe::default() }
}

/// Folders of FP8 codes (by channel, by block, one scale with one for activations, fused) and of integers.
const CODES: [&str; 6] = [
    "examples/vllm-checkpoints/channel",
    "examples/vllm-checkpoints/block",
    "examples/vllm-checkpoints/static",
    "tests/fixtures/quantised/modelopt-fp8",
    "tests/fixtures/quantised/phi3-fp8",
    "examples/vllm-checkpoints/int8",
];

/// One row for each of the first columns, which has one value there.
fn one_hot(columns: usize, width: usize, value: f32) -> Tensor {
    let mut x = Tensor::zeros(columns, width);
    (0..columns).for_each(|column| x.row_mut(column)[column] = value);
    x
}

#[test]
fn a_weight_is_multiplied_as_its_file_holds_it() {
    for name in CODES {
        let model = Model::open(&folder(name)).unwrap();
        let arm = Emulated::new(&Recipe { output: Format::F32, ..recipe() }).unwrap();
        let made = Recipe { codes: Codes::Made, output: Format::F32, ..recipe() };
        let made = Emulated::new(&made).unwrap();
        let mut farthest = 0.0f32;
        for weight in ["blk.0.attn_q", "blk.0.attn_v", "blk.0.ffn_up", "blk.0.ffn_down"] {
            let weight = model.tensor(&format!("{weight}.weight")).unwrap();
            let columns = weight.width().min(160);
            let values = weight.to_vec().unwrap();
            // The largest code, with the scale that the file has for it or its own, 1.
            let of_weight = arm.of_weight(&weight).unwrap().unwrap();
            let most = of_weight.recipe().gemm.max_finite();
            let (_, scales) = of_weight.quantise_activation(&one_hot(1, weight.width(), most));
            let x = one_hot(columns, weight.width(), scales_first(&scales) * most);
            let call = Call::Matmul { x: &x, weight, bias: None };
            let (y, anew) = (arm.compute(&call).unwrap(), made.compute(&call).unwrap());
            for column in 0..columns {
                for row in 0..weight.rows() {
                    let true_y = x.row(column)[column] * values[row * weight.width() + column];
                    let of =
                        |y: &Tensor| (y.row(column)[row] - true_y).abs() / true_y.abs().max(1e-20);
                    assert!(of(&y) < 4e-7, "{name} {} {row} {column}", weight.name());
                    farthest = farthest.max(of(&anew));
                }
            }
        }
        // Converting the values anew, with one scale for all of them, rounds them once more.
        let finer = name.ends_with("channel") || name.ends_with("block");
        assert!(farthest > 0.01 || !finer, "{name}: {farthest}");
    }
}

fn scales_first(scales: &runner::compute::emulated::gemm::Scales) -> f32 {
    use runner::compute::emulated::gemm::Scales;
    match scales {
        Scales::Tensor(scale) => *scale,
        Scales::Row(scales) | Scales::Block128 { scales, .. } => scales[0],
        Scales::Blocks(scales) => scales.at(0, 0),
    }
}

#[test]
fn a_pass_over_held_codes_lies_within_its_floor() {
    for name in CODES {
        let model = Model::open(&folder(name)).unwrap();
        let arm = Emulated::new(&recipe()).unwrap();
        let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None };
        let tokens = [3, 60, 17, 0, 42, 5];
        let task = Task { op: &op, model: &model, tokens: &tokens, input: None, spill: None };
        let pass = arms::compute(&task, &arm, String::new(), &mut |_| {}).unwrap();
        for local in arms::local(&task, &recipe(), &pass).unwrap() {
            let Some(sigma) = &local.sigma else { continue };
            let (truth, sigma) = (&local.truth, &sigma.each);
            let subject = pass.site(&local.site).unwrap();
            let z: Vec<f64> = subject
                .data()
                .iter()
                .zip(truth.data())
                .zip(sigma.data())
                .map(|((y, truth), sigma)| f64::from(y - truth) / f64::from(*sigma).max(1e-30))
                .collect();
            let rms = (z.iter().map(|z| z * z).sum::<f64>() / z.len() as f64).sqrt();
            // The bounds of the contract `per-layer`, which derives them.
            let of_product = local.energies.is_some();
            let within = rms < 1.25 && (rms > 0.8 || !of_product);
            assert!(within, "{name} {}: {rms}", local.site);
        }
    }
}

#[test]
fn a_form_that_no_tensor_core_takes_is_refused_by_name() {
    let said = |name: &str, recipe: &Recipe| {
        let model = Model::open(&folder(name)).unwrap();
        let weight = model.tensor("blk.0.attn_q.weight").unwrap();
        Emulated::new(recipe).unwrap().of_weight(&weight).err().unwrap().to_string()
    };
    let zeros = said("tests/fixtures/quantised/int-8-zeros", &recipe());
    let named = "the weight `model.layers.0.self_attn.q_proj.weight` (here `blk.0.attn_q.weight`) \
                 holds I8 codes";
    assert!(zeros.contains(named) && zeros.contains("without zero points"), "{zeros}");
    let nvfp4 = said("tests/fixtures/quantised/modelopt-nvfp4", &recipe());
    assert!(nvfp4.contains("q_proj.weight` (here `blk.0.attn_q.weight`) is nvfp4"), "{nvfp4}");
    assert!(nvfp4.contains("the chip `hopper` does not multiply"), "{nvfp4}");
    let fast = Recipe { accumulate: Accumulate::Fast, ..recipe() };
    let blocks = said("examples/vllm-checkpoints/block", &fast);
    assert!(blocks.contains("`accumulate = \"fast\"` cannot apply"), "{blocks}");
}

#[test]
fn a_weight_without_codes_is_multiplied_in_its_own_type() {
    let model = Model::open(&folder("examples/vllm-checkpoints/channel")).unwrap();
    let weight = model.tensor("output.weight").unwrap();
    let x = one_hot(3, weight.width(), 1.0);
    let call = Call::Matmul { x: &x, weight, bias: None };
    let y = Emulated::new(&recipe()).unwrap().compute(&call).unwrap();
    let exact = Reference.compute(&call).unwrap();
    assert_eq!(y.data(), exact.data(), "one product of a bf16 value and 1");
    let floor = Floor::new(&recipe()).unwrap();
    floor.compute(&call).unwrap();
    assert_eq!(floor.into_sigmas().len(), 1);
}

/// The standard stages over a model with this recipe, and what the command says of them.
fn said_of(command: &[&str], model: &Path, accumulate: &str) -> (Option<i32>, String) {
    let recipe = format!("gemm = \"checkpoint\"\naccumulate = \"{accumulate}\"");
    said_in(command, model.to_str().unwrap(), &recipe, |stages| {
        for entry in fs::read_dir(folder("stages")).unwrap() {
            let file = entry.unwrap().path();
            fs::copy(&file, stages.join(file.file_name().unwrap())).unwrap();
        }
    })
}

/// What the command says of a folder of the stages that `put` writes, over a model with this recipe
/// and without a device.
pub fn said_in(
    command: &[&str],
    model: &str,
    recipe: &str,
    put: impl FnOnce(&Path),
) -> (Option<i32>, String) {
    let place = tempfile::tempdir().unwrap();
    let stages = place.path().join("stages");
    fs::create_dir(&stages).unwrap();
    std::os::unix::fs::symlink(folder("contracts"), place.path().join("contracts")).unwrap();
    put(&stages);
    let pipeline = format!(
        "model = {model:?}\ntokens = [3, 9, 44, 7, 1]\narms = [\"reference\", \
         \"emulated\"]\n[recipe]\n{recipe}\n"
    );
    fs::write(stages.join("pipeline.toml"), pipeline).unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_runner"))
        .current_dir(place.path())
        .args(command)
        .output()
        .unwrap();
    let text = [done.stdout, done.stderr].concat();
    (done.status.code(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn what_cannot_be_multiplied_is_said_before_anything_runs() {
    let run = ["run", "stages", "--format", "plain"];
    let plan = ["plan", "stages"];
    for command in [&run[..], &plan[..]] {
        let zeros = folder("tests/fixtures/quantised/int-8-zeros");
        let (code, said) = said_of(command, &zeros, "promoted");
        assert_ne!(code, Some(0), "{said}");
        assert!(said.contains("I8 codes") && !said.contains("ran in"), "{said}");
        let block = folder("examples/vllm-checkpoints/block");
        let (code, said) = said_of(command, &block, "fast");
        assert_ne!(code, Some(0), "{said}");
        assert!(said.contains("write `accumulate = \"promoted\"`"), "{said}");
    }
}

/// A weight with one NaN among its codes.
#[test]
fn a_nan_among_the_files_codes_is_the_files_fault_in_every_run() {
    let source = folder("examples/vllm-checkpoints/channel");
    let model = tempfile::tempdir().unwrap();
    fs::copy(source.join("config.json"), model.path().join("config.json")).unwrap();
    let mut file = fs::read(source.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let tensor = &header["model.layers.0.mlp.down_proj.weight"]["data_offsets"][0];
    file[8 + length + tensor.as_u64().unwrap() as usize] = 0x7f;
    fs::write(model.path().join("model.safetensors"), file).unwrap();
    let place = tempfile::tempdir().unwrap();
    let run = |_| {
        let done = Command::new(env!("CARGO_BIN_EXE_runner"))
            .current_dir(place.path())
            .args(["run"])
            .arg(folder("stages"))
            .args(["--select", "A", "--tokens", "1,2,3", "--arms", "reference,emulated"])
            .args(["--format", "plain", "--model"])
            .arg(model.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let line = said.lines().find(|line| line.starts_with("A  forward")).unwrap_or_default();
        (done.status.code(), line.split("  ").nth(2).unwrap_or_default().to_owned())
    };
    let [first, second] = [0, 1].map(run);
    assert_eq!(first, second, "nothing of it is kept");
    assert_eq!((first.0, first.1.trim()), (Some(4), "error"));
}

#[test]
fn a_chip_without_fp8_is_refused_for_a_checkpoint_s_codes_before_anything_runs() {
    let place = tempfile::tempdir().unwrap();
    let stages = place.path().join("stages");
    fs::create_dir(&stages).unwrap();
    std::os::unix::fs::symlink(folder("contracts"), place.path().join("contracts")).unwrap();
    let stage = "id = \"b\"\ntitle = \"a pass\"\ncontract = \"per-layer\"\nrecipe = { gemm = \
                 \"checkpoint\", chip = \"ampere\" }\n[forward]\ncapture = \"every-site\"\n";
    fs::write(stages.join("b.toml"), stage).unwrap();
    for command in ["check", "plan", "run"] {
        let done = Command::new(env!("CARGO_BIN_EXE_runner"))
            .current_dir(place.path())
            .args([command, "stages"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(2), "{said}");
        for part in [
            "the chip `ampere` has no FP8, and `gemm = \"checkpoint\"` multiplies the FP8 codes",
            "`ada`, `hopper`, `blackwell` and `rtx-blackwell`",
            "`f32`, `tf32`, `bf16`, `f16` and `int8`",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
}

#[test]
fn a_record_of_a_checkpoint_s_recipe_says_no_scale_and_others_say_theirs() {
    let json = |recipe: &Recipe| serde_json::to_value(recipe).unwrap();
    let made = Recipe { chip: ChipName::Hopper, ..Recipe::default() };
    // As keys of results have held it all along.
    let known = "{\"gemm\":\"e4m3\",\"scale\":{\"weight\":\"tensor\",\"activation\":\"tensor\"},\
                 \"accumulate\":\"promoted\",\"output\":\"bf16\",\"chip\":\"hopper\"}";
    assert_eq!(json(&made).to_string(), known);
    assert_eq!(serde_json::to_string(&made).unwrap(), known);
    let held = json(&recipe());
    assert!(held.get("scale").is_none() && held["codes"] == "checkpoint", "{held}");
    for recipe in [made, recipe()] {
        assert_eq!(serde_json::from_value::<Recipe>(json(&recipe)).unwrap(), recipe);
        assert_eq!(serde_json::from_str::<Recipe>(&json(&recipe).to_string()).unwrap(), recipe);
    }
    let mut lacking = json(&made);
    lacking.as_object_mut().unwrap().remove("scale");
    let refused = serde_json::from_value::<Recipe>(lacking).unwrap_err().to_string();
    assert!(refused.contains("missing field `scale`"), "{refused}");
    // Receipts of before say it.
    let mut older = held;
    older["scale"] = json(&made)["scale"].clone();
    assert_eq!(serde_json::from_value::<Recipe>(older).unwrap(), recipe());
}
