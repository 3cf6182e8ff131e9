//! `kv_cache`: keys and values that attention keeps in a type of their own.

use std::fs;
use std::path::{Path, PathBuf};

use runner::compute::arms::{self, Output, Task};
use runner::compute::emulated::arm::Emulated;
use runner::compute::flow;
use runner::compute::reference::Reference;
use runner::dtype::Format;
use runner::model::Model;
use runner::model::synthetic::{Preset, ensure};
use runner::op::{Capture, ChipName, Codes, Op, Recipe, Site};
use runner::tensor::Tensor;

use crate::checkpoint::said_in;

const TOKENS: [u32; 6] = [3, 60, 17, 0, 42, 5];

fn root(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

const CHANNEL: &str = "examples/vllm-checkpoints/channel";

/// A folder of FP8 codes, of the one at that path, with these scales of caches in its first layer,
/// f32 values by name.
pub fn with_scales(source: &str, scales: &[(&str, &[f32])]) -> tempfile::TempDir {
    let source = root(source);
    let folder = tempfile::tempdir().unwrap();
    fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    let file = fs::read(source.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let mut data = file[8 + length..].to_vec();
    for (name, values) in scales {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let shape: &[usize] = if values.len() == 1 { &[] } else { &[values.len()] };
        header[format!("model.layers.0.self_attn.{name}")] = serde_json::json!(
            { "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
    }
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

fn pass(model: &Model, kv_cache: Option<Format>, of: &dyn runner::compute::Pass) -> Output {
    let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache };
    let task = Task { op: &op, model, tokens: &TOKENS, input: None, spill: None };
    arms::compute(&task, of, String::new(), &mut |_| {}).unwrap()
}

fn emulated(model: &Model, kv_cache: Option<Format>) -> Output {
    let recipe =
        Recipe { codes: Codes::Checkpoint, chip: ChipName::Hopper, kv_cache, ..Recipe::default() };
    pass(model, kv_cache, &Emulated::new(&recipe).unwrap())
}

fn site<'o>(output: &'o Output, name: &str) -> &'o Tensor {
    output.site(&Site(name.to_owned())).unwrap_or_else(|| panic!("no site {name}"))
}

/// E4M3 with that scale, counted in its steps: 3 bits of fraction down to 2^-6, the largest 448.
fn e4m3(x: f32, scale: f32) -> f32 {
    let y = f64::from(x / scale);
    let step = 2f64.powi((y.abs().log2().floor() as i32).max(-6) - 3);
    let rounded = (y / step).round_ties_even() * step;
    rounded.clamp(-448.0, 448.0) as f32 * scale
}

#[test]
fn keys_and_values_come_back_with_the_scales_that_the_file_holds() {
    // The scale of keys, and of values.
    type Case<'c> = (&'c [(&'c str, &'c [f32])], [f32; 2]);
    let cases: [Case<'_>; 5] = [
        (&[], [1.0; 2]),
        (&[("k_scale", &[0.02]), ("v_scale", &[0.5])], [0.02, 0.5]),
        (&[("k_proj.k_scale", &[0.03]), ("v_proj.v_scale", &[0.7])], [0.03, 0.7]),
        (&[("attn.k_scale", &[0.03])], [0.03, 0.03]),
        (&[("kv_scale", &[0.25])], [0.25, 0.25]),
    ];
    for (scales, [of_k, of_v]) in cases {
        let folder = with_scales(CHANNEL, scales);
        let model = Model::open(folder.path()).unwrap();
        let made = emulated(&model, Some(Format::E4m3));
        for (from, to, scale) in
            [("blk.0.k_rope", "blk.0.k_cache", of_k), ("blk.0.v", "blk.0.v_cache", of_v)]
        {
            let (from, to) = (site(&made, from), site(&made, to));
            for (x, y) in from.data().iter().zip(to.data()) {
                assert_eq!(*y, e4m3(*x, scale), "{scales:?}: {x}");
            }
        }
        assert_ne!(site(&made, "logits"), site(&emulated(&model, None), "logits"));
    }
}

#[test]
fn the_reference_keeps_keys_and_values_whole() {
    let folder = with_scales(CHANNEL, &[("k_scale", &[0.02])]);
    let model = Model::open(folder.path()).unwrap();
    let (plain, kept) =
        (pass(&model, None, &Reference), pass(&model, Some(Format::E5m2), &Reference));
    assert_eq!(site(&plain, "logits"), site(&kept, "logits"));
    assert_eq!(site(&kept, "blk.0.k_rope"), site(&kept, "blk.0.k_cache"));
}

#[test]
fn a_pass_makes_the_sites_that_are_foretold_of_every_kind_of_attention() {
    for preset in [Preset::Qwen2Tiny, Preset::DeepSeekV3Tiny, Preset::Qwen3NextTiny] {
        let store = tempfile::tempdir().unwrap();
        let path = ensure(preset, 1, store.path()).unwrap();
        let model = Model::open(&path).unwrap();
        for kv_cache in [None, Some(Format::F16)] {
            let made = pass(&model, kv_cache, &Reference);
            let made: Vec<&Site> = made.sites.iter().map(|(site, _)| site).collect();
            let foretold: Vec<Site> = flow::sites(&model, kv_cache).collect();
            assert_eq!(made, foretold.iter().collect::<Vec<_>>(), "{preset:?}");
        }
    }
}

/// Such a pass stands for an engine in campaigns with noise.
#[test]
fn a_cache_whose_values_are_rounded_once_more_lies_within_its_floor() {
    let folder = with_scales(CHANNEL, &[("k_scale", &[0.013]), ("v_scale", &[0.021])]);
    let model = Model::open(folder.path()).unwrap();
    for stream in [None, Some(Format::Bf16), Some(Format::F16)] {
        // The floor is the code's own error e. What is kept is of the stream's type: where e is less
        // than half a step of it, rounding gives the value back, and elsewhere adds less than e.
        let most = if stream.is_none() { 1.001 } else { 2.001 };
        let kv_cache = Some(Format::E4m3);
        let recipe = Recipe { chip: ChipName::Hopper, stream, kv_cache, ..Recipe::default() };
        let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache };
        let task = Task { op: &op, model: &model, tokens: &TOKENS, input: None, spill: None };
        let made = pass(&model, kv_cache, &Emulated::new(&recipe).unwrap());
        let mut seen = 0;
        for local in arms::local(&task, &recipe, &made).unwrap() {
            if !local.site.0.ends_with("_cache") {
                continue;
            }
            let sigma = local.sigma.expect("a floor").each;
            let pairs = site(&made, &local.site.0).data().iter().zip(local.truth.data());
            for ((y, truth), sigma) in pairs.zip(sigma.data()) {
                let z = f64::from(y - truth).abs() / f64::from(*sigma);
                assert!(z < most, "{stream:?} {}: z is {z}", local.site);
                seen += 1;
            }
        }
        assert!(seen > 500, "{seen}");
    }
}

/// What `runner` says of one stage.
fn said(model: &str, recipe: &str, stage: &str, command: &[&str]) -> (Option<i32>, String) {
    said_in(command, model, recipe, |stages| {
        let manifest = format!("id = \"B\"\ntitle = \"t\"\n{stage}\n");
        fs::write(stages.join("b.toml"), manifest).unwrap();
    })
}

const EVERY_SITE: &str = "contract = \"per-layer\"\n[forward]\ncapture = \"every-site\"";
const LOGITS: &str =
    "contract = \"reproducer\"\n[forward]\ncapture = \"logits\"\nrepeats = 2\ndecode = 4";

#[test]
fn a_clean_pass_with_a_narrow_cache_passes_every_contract() {
    for (model, recipe) in [
        ("synthetic:qwen2-tiny", "kv_cache = \"e4m3\""),
        ("synthetic:deepseek-v3-tiny", "gemm = \"bf16\"\nkv_cache = \"e5m2\""),
        ("synthetic:qwen3-next-tiny", "gemm = \"f16\"\nkv_cache = \"f16\""),
    ] {
        for stage in [EVERY_SITE, LOGITS] {
            let run = ["run", "stages", "--format", "plain"];
            let (code, said) = said(model, recipe, stage, &run);
            assert_eq!(code, Some(0), "{model} {recipe}: {said}");
        }
    }
    let folder = with_scales(CHANNEL, &[("k_scale", &[0.02]), ("v_scale", &[0.5])]);
    let model = folder.path().to_str().unwrap();
    let recipe = "gemm = \"checkpoint\"\nkv_cache = \"e4m3\"";
    let (code, said) = said(model, recipe, EVERY_SITE, &["run", "stages", "--format", "plain"]);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_planted_bug_of_a_cache_is_found_and_named() {
    let folder = with_scales(CHANNEL, &[("k_scale", &[0.02]), ("v_scale", &[0.5])]);
    let scaled = folder.path().to_str().unwrap();
    for model in ["synthetic:qwen2-tiny", "synthetic:deepseek-v3-tiny", scaled] {
        let command =
            ["falsify", "stages", "--bugs", "cache", "--models", model, "--tokens", "3,60,17,0,42"];
        let recipe = "kv_cache = \"e4m3\"";
        let (code, said) = said(model, recipe, EVERY_SITE, &command);
        assert_eq!(code, Some(0), "{model}: {said}");
        let above = |line: &&str| line.contains("above the floor");
        for line in said.lines().filter(above) {
            assert_eq!(line.matches("(100.0 %)").count(), 3, "{model}: {said}");
        }
        assert_eq!(said.lines().filter(above).count(), 2, "{model}: {said}");
    }
}

#[test]
fn a_cache_that_cannot_be_is_refused_before_anything_runs() {
    let engine = "gemm = \"bf16\"\nstream = \"bf16\"\nkv_cache = \"e4m3\"";
    let attention = "contract = \"rms-norm\"\n[attention]\nsite = \"blk.0.attn\"\nq = { generate = \
                     \"normal\", rows = 3 }\nk = { generate = \"normal\", rows = 3 }\nv = { generate = \"normal\", rows = 3 }";
    let tiny = "synthetic:qwen2-tiny";
    let narrow = "kv_cache = \"e4m3\"";
    for (recipe, stage, words) in [
        ("kv_cache = \"int8\"", EVERY_SITE, "`e4m3`"),
        (engine, EVERY_SITE, "`kv_cache` is not known of engines"),
        (narrow, attention, "write `recipe = { kv_cache = \"none\" }` in this stage"),
    ] {
        let (code, said) = said(tiny, recipe, stage, &["plan", "stages"]);
        assert_ne!(code, Some(0), "{recipe}: {said}");
        assert!(said.contains(words), "{recipe}: {said}");
    }
    let of_heads: &[f32] = &[0.5, 0.25];
    for (scales, words) in [
        (
            &[f32::NAN][..],
            "the scale `model.layers.0.self_attn.k_scale` (here `blk.0.attn_k_cache.scale`) is NaN",
        ),
        (&[0.0], "(here `blk.0.attn_k_cache.scale`) is 0"),
        (of_heads, "(here `blk.0.attn_k_cache.scale`) holds 2 scales"),
    ] {
        let folder = with_scales(CHANNEL, &[("k_scale", scales)]);
        let model = folder.path().to_str().unwrap();
        let (code, told) = said(model, narrow, EVERY_SITE, &["plan", "stages"]);
        assert_ne!(code, Some(0), "{told}");
        assert!(told.contains(words), "{told}");
        // A pass without such a cache does not ask for them.
        let (code, told) = said(model, "kv_cache = \"none\"", EVERY_SITE, &["plan", "stages"]);
        assert_eq!(code, Some(0), "{told}");
    }
}

#[test]
fn the_type_of_the_cache_is_part_of_the_keys_of_every_arm() {
    let explained = |recipe| {
        let (code, said) =
            said("synthetic:qwen2-tiny", recipe, EVERY_SITE, &["plan", "stages", "--explain"]);
        assert_eq!(code, Some(0), "{said}");
        said
    };
    // Of the reference its op, of the emulated arm that and its recipe.
    let said = explained("kv_cache = \"e4m3\"");
    assert_eq!(said.matches("\"kv_cache\":\"e4m3\"").count(), 3, "{said}");
    assert_ne!(said, explained("kv_cache = \"e5m2\""));
    assert_eq!(explained("kv_cache = \"none\""), explained(""));
}
