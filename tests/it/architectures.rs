//! Architectures against passes of transformers 5.17: recorded on an H200 in bf16 and f16
//! (`examples/architectures`), and in f64, whose folders transformers saved too: tiny random
//! models, 20 tokens, logits and hidden states.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use runner::compute::arms::{self, Task};
use runner::compute::emulated::arm::Emulated;
use runner::compute::reference::Reference;
use runner::compute::{Pass, flow};
use runner::dtype::Format;
use runner::model::Model;
use runner::op::{Capture, Op, Recipe, Site};
use runner::tensor::Tensor;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::command::Project;
use crate::data::{large, own};
use crate::engines::{changed, judged, rewrite_file, stage};
use crate::single::project;

/// Folders that hold an architecture which is computed.
const COMPUTED: [&str; 19] = [
    "llama",
    "llama-linear",
    "llama3-rope",
    "qwen2-yarn",
    "mistral",
    "phi3",
    "gemma2",
    "gemma3",
    "olmo2",
    "granite",
    "smollm3",
    "glm4",
    "stablelm",
    "starcoder2",
    "mixtral",
    "qwen3-moe",
    "gpt-oss",
    "deepseek-v3",
    "qwen3-next",
];

const PASS: Op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None };
/// Of the largest magnitude.
const TOLERANCE: f64 = 2e-5;

/// The example beside the shipped contracts, of these kinds of model.
fn example(kinds: &[&str]) -> Project {
    let folder = own("examples/architectures");
    let mut project = project();
    for name in kinds.iter().chain(&["pipeline"]) {
        let text = std::fs::read_to_string(folder.join(format!("stages/{name}.toml")));
        let text = text.expect("a stage").replace("contracts = \"../../../contracts\"\n", "");
        project = project.file(&format!("stages/{name}.toml"), &text);
    }
    for kind in kinds {
        std::fs::create_dir_all(project.path(kind)).expect("a folder");
        for file in ["config.json", "model.safetensors", "capture.safetensors"] {
            let file = format!("{kind}/{file}");
            std::fs::copy(folder.join(&file), project.path(&file)).expect("copied");
        }
    }
    project
}

#[test]
fn every_bit_of_a_pass_of_each_architecture_follows_from_the_token_ids() {
    let kinds = [
        "llama-yarn",
        "llama3",
        "qwen2-linear",
        "mistral",
        "phi3",
        "gemma2",
        "gemma3",
        "olmo2",
        "granite",
        "smollm3",
        "glm4",
    ];
    let stages = judged(&example(&kinds));
    for kind in kinds {
        let stage = stage(&stages, kind);
        let why = stage["why"].as_str().expect("a reason");
        assert_eq!(stage["verdict"], "pass", "{kind}: {why}");
        assert!(why.contains("recorded = emulated, 0 of "), "{kind}: {why}");
        // And not by a kernel that happens to fit so narrow a row.
        assert!(why.contains("norm transformers"), "{kind}: {why}");
    }
}

#[test]
fn what_an_architecture_has_of_its_own_is_named_where_a_recording_lacks_it() {
    let project = example(&["gemma2"]);
    let told = |site: &str, cause: &str| {
        let stages = judged(&project);
        let stage = stage(&stages, "gemma2");
        let why = stage["why"].as_str().expect("a reason");
        assert_eq!(stage["verdict"], "structural", "{why}");
        assert_eq!(stage["first"]["site"], site, "{why}");
        assert!(why.contains(cause), "{why}");
    };
    // The logits as the output matrix gives them.
    rewrite_file(&project, "gemma2/capture.safetensors", |tensors| {
        let of = |name: &str| tensors.iter().position(|(known, ..)| known == name).expect("there");
        let (raw, logits) = (of("logits_raw"), of("logits"));
        tensors[logits].3 = tensors[raw].3.clone();
    });
    told("logits", "soft-cap-missing");
    // And the embedding before its factor, the root of 64.
    rewrite_file(&project, "gemma2/capture.safetensors", |tensors| {
        changed(tensors, "embed_scaled", &|rows| {
            rows.iter_mut().flatten().for_each(|value| *value /= 8.0);
        });
    });
    told("embed_scaled", "factor-missing");
}

/// What transformers recorded.
struct Golden {
    file: Vec<u8>,
}

impl Golden {
    fn of(folder: &Path) -> Golden {
        Golden { file: std::fs::read(folder.join("golden.safetensors")).expect("a recorded pass") }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.file).expect("a safetensors file")
    }

    fn ids(&self) -> Vec<u32> {
        let tensors = self.tensors();
        let ids = tensors.tensor("ids").expect("token ids").data().to_vec();
        ids.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes) as u32).collect()
    }

    fn values(&self, name: &str) -> Vec<f64> {
        let tensors = self.tensors();
        let bytes = tensors.tensor(name).expect("a recorded tensor").data().to_vec();
        bytes.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
    }
}

/// The largest difference, as a share of the largest magnitude.
fn worst(tensor: &Tensor, expected: &[f64]) -> f64 {
    assert_eq!(tensor.data().len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let pairs = tensor.data().iter().zip(expected);
    pairs.fold(0.0f64, |most, (&x, y)| most.max((f64::from(x) - y).abs())) / largest
}

/// The sites of transformers' hidden states: before the first block, after each but the last,
/// and after the last norm.
fn hidden_sites(model: &Model) -> Vec<Site> {
    let sites: Vec<Site> = flow::sites(model, None).collect();
    let embedded = if sites[1].0 == "embed_scaled" { 1 } else { 0 };
    let last = model.config().layers - 1;
    let ends = (0..last).map(|layer| Site(format!("blk.{layer}.ffn_residual")));
    let first = sites[embedded].clone();
    [first].into_iter().chain(ends).chain([Site("output_norm".to_owned())]).collect()
}

/// The folders of the data.
fn folders() -> Vec<(String, PathBuf)> {
    let folder = |name| large(&format!("golden/architectures/{name}"));
    COMPUTED.into_iter().map(|name| (name.to_owned(), folder(name))).collect()
}

/// Those that `scripts/golden_passes.py` wrote to the folder that RUNNER_GOLDEN_PASSES names.
fn others(folder: &OsStr) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(folder).expect("a folder of models");
    let folders = entries.map(|entry| entry.expect("an entry").path());
    let folders = folders.filter(|path| path.join("golden.safetensors").exists());
    let named: Vec<_> = folders.map(|path| (path.display().to_string(), path)).collect();
    assert!(!named.is_empty(), "RUNNER_GOLDEN_PASSES has no folder with golden.safetensors");
    named
}

#[test]
#[ignore = "needs RUNNER_DATA, a folder with golden/architectures"]
fn the_reference_is_transformers_in_f64() {
    let others = std::env::var_os("RUNNER_GOLDEN_PASSES").map(|folder| others(&folder));
    hold_to_transformers(others.unwrap_or_else(folders));
}

#[test]
fn the_reference_is_transformers_in_f64_for_very_small_models() {
    let small = others(own("tests/fixtures/small-models").as_os_str());
    assert_eq!(small.len(), 8);
    hold_to_transformers(small);
}

/// The sites and the bits of a reference pass.
fn reference_pass(folder: &Path, tokens: &[u32]) -> arms::Output {
    let model = Model::open(folder).expect("a model");
    let task = Task { op: &PASS, model: &model, tokens, input: None, spill: None };
    arms::compute(&task, &Reference, String::new(), &mut |_| {}).expect("a pass")
}

#[test]
fn experts_in_mxfp4_are_what_transformers_decodes_them_to() {
    let folder = own("tests/fixtures/mxfp4");
    let tokens = Golden::of(&folder).ids();
    let packed = reference_pass(&folder.join("packed"), &tokens);
    let plain = reference_pass(&folder.join("plain"), &tokens);
    assert_eq!(packed.sites.len(), plain.sites.len());
    for ((site, packed), (_, plain)) in packed.sites.iter().zip(&plain.sites) {
        let pairs = packed.data().iter().zip(plain.data());
        assert!(pairs.clone().all(|(a, b)| a.to_bits() == b.to_bits()), "{site}");
    }
    let logits = packed.site(&Site("logits".to_owned())).expect("logits");
    let worst = worst(logits, &Golden::of(&folder).values("logits"));
    assert!(worst < TOLERANCE, "{worst:e}");
}

fn hold_to_transformers(folders: Vec<(String, PathBuf)>) {
    let mut wrong = Vec::new();
    for (name, folder) in folders {
        let model = match Model::open(&folder) {
            Ok(model) => model,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        let golden = Golden::of(&folder);
        let tokens = golden.ids();
        let task = Task { op: &PASS, model: &model, tokens: &tokens, input: None, spill: None };
        let output = arms::compute(&task, &Reference, String::new(), &mut |_| {}).expect("a pass");
        let visited: Vec<&Site> = output.sites.iter().map(|(site, _)| site).collect();
        let foretold: Vec<Site> = flow::sites(&model, None).collect();
        assert_eq!(visited, foretold.iter().collect::<Vec<_>>(), "{name}");
        let site = |site: &Site| output.site(site).expect("a site of the pass");
        let logits = (Site("logits".to_owned()), "logits".to_owned());
        let hidden = hidden_sites(&model).into_iter().enumerate();
        let hidden = hidden.map(|(number, site)| (site, format!("hidden.{number}")));
        for (own, recorded) in hidden.chain([logits]) {
            let off = worst(site(&own), &golden.values(&recorded));
            if off > TOLERANCE {
                wrong.push(format!("{name}: {recorded} is off by {off:e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every site of the emulated arm in f32 lies within the floor of the reference computed on the
/// arm's own inputs: ops, their floors and what they read fit together.
#[test]
#[ignore = "needs RUNNER_DATA, a folder with golden/architectures"]
fn every_site_of_the_emulated_arm_lies_within_its_floor() {
    let others = std::env::var_os("RUNNER_GOLDEN_PASSES").map(|folder| others(&folder));
    hold_to_floors(others.unwrap_or_else(folders));
}

#[test]
fn every_site_of_very_small_models_lies_within_its_floor() {
    hold_to_floors(others(own("tests/fixtures/small-models").as_os_str()));
}

/// Blocks that a training inserts begin with weights of zeros; and the square of a weight near
/// 2^-70 is no f32. Either is rounded as prescribed, and no arm is to blame.
#[test]
fn weights_of_zeros_and_very_small_ones_are_clean() {
    let folder = own("tests/fixtures/small-models/stablelm");
    let file = std::fs::read(folder.join("model.safetensors")).expect("a model");
    let held = SafeTensors::deserialize(&file).expect("tensors");
    for power in [f32::NEG_INFINITY, -30.0, -70.0] {
        let smaller = |bytes: &[u8]| -> Vec<u8> {
            let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            values.flat_map(|value| (value * power.exp2()).to_le_bytes()).collect()
        };
        let changed: Vec<(String, Vec<usize>, Vec<u8>)> = held
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let small = ["q_proj.weight", "o_proj.weight", "down_proj.weight"];
                let bytes = match small.iter().any(|ending| name.ends_with(ending)) {
                    true => smaller(view.data()),
                    false => view.data().to_vec(),
                };
                (name, view.shape().to_vec(), bytes)
            })
            .collect();
        for gemm in ["e4m3", "bf16", "f32"] {
            let stage = format!(
                "id = \"B\"\ntitle = \"t\"\ncontract = \"per-layer\"\nmodel = \"../model\"\n\
                 tokens = [5, 17, 60, 45, 30, 7, 58, 23]\nrecipe = {{ gemm = \"{gemm}\" }}\n\
                 [forward]\ncapture = \"every-site\"\n"
            );
            let project = project().file("stages/b.toml", &stage);
            std::fs::create_dir_all(project.path("model")).expect("a folder");
            std::fs::copy(folder.join("config.json"), project.path("model/config.json"))
                .expect("copied");
            let views = changed.iter().map(|(name, shape, bytes)| {
                let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a tensor");
                (name.clone(), view)
            });
            let path = project.path("model/model.safetensors");
            safetensors::serialize_to_file(views, None, &path).expect("written");
            project.runner(&["run", "stages"]).expect(0, "pass");
        }
    }
}

fn hold_to_floors(folders: Vec<(String, PathBuf)>) {
    for (name, folder) in folders {
        let model = Model::open(&folder).expect("a model");
        let tokens = Golden::of(&folder).ids();
        let task = Task { op: &PASS, model: &model, tokens: &tokens, input: None, spill: None };
        for recipe in [
            Recipe { gemm: Format::F32, output: Format::F32, ..Recipe::default() },
            Recipe::default(),
        ] {
            let arm = Emulated::new(&recipe).expect("a recipe");
            let pass: &dyn Pass = &arm;
            let output = arms::compute(&task, pass, String::new(), &mut |_| {}).expect("a pass");
            let locals = arms::local(&task, &recipe, &output).expect("floors");
            assert_eq!(locals.len(), output.sites.len(), "{name}");
            for local in locals {
                let made = output.site(&local.site).expect("a site");
                let sigma =
                    local.sigma.unwrap_or_else(|| panic!("{name} {}: no floor", local.site));
                let pairs = made.data().iter().zip(local.truth.data());
                let worst = pairs.zip(sigma.each.data()).map(|((made, truth), sigma)| {
                    let off = (f64::from(*made) - f64::from(*truth)).abs();
                    if off == 0.0 { 0.0 } else { off / f64::from(*sigma) }
                });
                let worst = worst.fold(0.0f64, f64::max);
                assert!(worst < 8.0, "{name} {} {}: {worst} deviations", recipe.gemm, local.site);
            }
        }
    }
}
