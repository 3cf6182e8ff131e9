//! Synthetic models of the newer kinds: what a kind is tried with where no weights are at hand.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use runner::compute::arms::{self, Task};
use runner::compute::reference::Reference;
use runner::model::Model;
use runner::model::synthetic::{self, LARGEST_SCALE, Preset, Scaled};
use runner::op::{Capture, Op, Site};

use crate::model::{open, synthetic_file};
use crate::single::project;

/// A preset's model, whose file or folder is gone when it is closed.
fn opened(preset: Preset) -> Model {
    let cache = tempfile::tempdir().expect("a folder");
    let path = synthetic::ensure(preset, 1, cache.path()).expect("a model");
    Model::open(&path).expect("a model that is read")
}

/// The presets that come of the reader's own table.
const NEWER: [Preset; 16] = [
    Preset::Gemma2Tiny,
    Preset::Gemma3Tiny,
    Preset::Olmo2Tiny,
    Preset::GraniteTiny,
    Preset::SmolLm3Tiny,
    Preset::Glm4Tiny,
    Preset::StableLmTiny,
    Preset::Starcoder2Tiny,
    Preset::MixtralTiny,
    Preset::Qwen2MoeTiny,
    Preset::Qwen3MoeTiny,
    Preset::MistralTiny,
    Preset::Phi3Tiny,
    Preset::GptOssTiny,
    Preset::DeepSeekV3Tiny,
    Preset::Qwen3NextTiny,
];

/// Few dozen tokens of all parts of the vocabulary.
fn tokens() -> Vec<u32> {
    (0..40).map(|place| (place * 397 + 11) % 2000).collect()
}

#[test]
fn newer_presets_have_the_same_bytes_everywhere() {
    let digests: Vec<String> = NEWER
        .iter()
        .map(|&preset| {
            let digest = blake3::hash(&synthetic_file(preset)).to_hex();
            format!("{} {preset}", &digest[..16])
        })
        .collect();
    insta::assert_snapshot!(digests.join("\n"), @"
    98c357141eb7c993 gemma2-tiny
    7a8ec0af5f414aeb gemma3-tiny
    cb0c8bdcb7a47f4d olmo2-tiny
    b19a456758237f0a granite-tiny
    df3f84a7de955da2 smollm3-tiny
    3ce9f646e9aeef07 glm4-tiny
    fd4793073acfa93e stablelm-tiny
    69c449a537a691bf starcoder2-tiny
    d03ab631072e6a20 mixtral-tiny
    7efd9adf7e6eceb0 qwen2-moe-tiny
    901f755b7bb82dca qwen3-moe-tiny
    a99855f47c3b74b8 mistral-tiny
    3357cbbceded4881 phi3-tiny
    de70b6d04dfef0ea gpt-oss-tiny
    d5bf595d27b67003 deepseek-v3-tiny
    5735491057c4feb1 qwen3-next-tiny
    ");
}

#[test]
fn newer_presets_carry_outlier_channels_from_the_embedding_on() {
    for preset in NEWER {
        let model = opened(preset);
        let embedding = model.tensor("token_embd.weight").unwrap();
        let (rows, width) = (embedding.rows(), embedding.width());
        let values = embedding.to_vec().unwrap();
        let rms = |channel: usize| {
            let column = values.iter().skip(channel).step_by(width);
            (column.map(|v| v * v).sum::<f32>() / rows as f32).sqrt()
        };
        let large = (0..width).filter(|&channel| rms(channel) > 0.1).count();
        assert_eq!(large, 2, "{preset}");
    }
}

#[test]
fn tokens_of_a_synthetic_mixture_go_to_all_experts_and_seldom_by_a_hair() {
    let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None };
    let mixtures = NEWER.map(|preset| (preset, opened(preset)));
    let mixtures = mixtures.into_iter().filter(|(_, model)| model.config().experts.is_some());
    let mut seen = 0;
    for (preset, model) in mixtures {
        let experts = model.config().experts.clone().expect("a mixture");
        let task = Task { op: &op, model: &model, tokens: &tokens(), input: None, spill: None };
        let pass = arms::compute(&task, &Reference, String::new(), &mut |_| {}).expect("a pass");
        for layer in (0..model.config().layers).filter(|&l| model.config().experts_of(l).is_some())
        {
            let site = |name: &str| {
                pass.site(&Site(format!("blk.{layer}.{name}"))).expect("a site").data()
            };
            let (mut taken, mut close) = (BTreeSet::new(), 0);
            for row in site("ffn_route").chunks(experts.count) {
                taken.extend((0..experts.count).filter(|&expert| row[expert] != 0.0));
            }
            for row in site("ffn_router").chunks(experts.count) {
                let mut row = row.to_vec();
                row.sort_by(|a, b| b.total_cmp(a));
                let used = experts.routing.used;
                close += usize::from(row[used - 1] - row[used] < 0.02);
            }
            assert_eq!(taken.len(), experts.count, "{preset}, block {layer}: {taken:?}");
            assert!(close <= 8, "{preset}, block {layer}: {close} of 40 tokens are near ties");
            seen += 1;
        }
    }
    assert_eq!(seen, 3 * 4 + 4 + 3 + 4, "blocks of experts");
}

#[test]
fn a_synthetic_folder_speaks_its_own_tokens_and_is_mended() {
    let cache = tempfile::tempdir().expect("a folder");
    let make = || synthetic::ensure(Preset::MistralTiny, 1, cache.path()).expect("a model");
    let folder = make();
    let model = Model::open(&folder).expect("a folder that is read");
    let tokens = model.encode("The capital of France is").expect("tokens");
    assert_eq!(tokens.len(), 5);
    assert_eq!(model.decode(&tokens).expect("text"), "The capital of France is");
    let weights = std::fs::read(folder.join("model.safetensors")).expect("weights");
    let config = std::fs::read(folder.join("config.json")).expect("a config");
    std::fs::write(folder.join("config.json"), "{}").expect("written");
    std::fs::write(folder.join("model.safetensors"), &weights[..1000]).expect("written");
    assert_eq!(make(), folder);
    assert!(std::fs::read(folder.join("model.safetensors")).expect("weights") == weights);
    assert!(std::fs::read(folder.join("config.json")).expect("a config") == config);
    let left = std::fs::read_dir(&folder).expect("a folder").count();
    assert_eq!(left, 4, "config, tokenizer, weights and their note, and no temporary file");
}

/// Changes a file before it is written.
type Change<'a> = dyn Fn(&mut BTreeMap<String, Value>, &mut BTreeMap<String, QTensor>) + 'a;

/// The folder of `phi3-tiny` as llama.cpp's converter writes it, in f32, with what else it says.
fn phi3_gguf(changed: &Change<'_>) -> Vec<u8> {
    let model = opened(Preset::Phi3Tiny);
    let config = model.config();
    let tensor = |values: Vec<f32>, shape: &[usize]| {
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor");
        QTensor::quantize(&tensor, GgmlDType::F32).expect("f32")
    };
    let mut metadata = BTreeMap::from([
        ("general.architecture".to_owned(), Value::String("phi3".to_owned())),
        ("phi3.rope.freq_base".to_owned(), Value::F32(config.rope.theta as f32)),
        ("phi3.attention.layer_norm_rms_epsilon".to_owned(), Value::F32(config.rms_norm_eps)),
    ]);
    for (key, value) in [
        ("block_count", config.layers),
        ("context_length", 131_072),
        ("rope.scaling.original_context_length", 4096),
        ("embedding_length", config.hidden),
        ("feed_forward_length", config.ffn),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("rope.dimension_count", config.rope.dimensions),
    ] {
        metadata.insert(format!("phi3.{key}"), Value::U32(value as u32));
    }
    let mut tensors = BTreeMap::new();
    for name in model.names() {
        let weight = model.tensor(name).expect("a tensor");
        let mut values = weight.to_vec().expect("values");
        let mut rows = weight.rows();
        let mut join = |other: &str| {
            let other = model.tensor(&name.replace("attn_q", other).replace("ffn_gate", other));
            let other = other.expect("a tensor");
            rows += other.rows();
            values.extend(other.to_vec().expect("values"));
        };
        let name = match name.rsplit_once('.').map_or("", |(stem, _)| stem) {
            stem if stem.ends_with("attn_q") => {
                join("attn_k");
                join("attn_v");
                stem.replace("attn_q", "attn_qkv.weight")
            }
            stem if stem.ends_with("ffn_gate") => {
                join("ffn_up");
                stem.replace("ffn_gate", "ffn_up.weight")
            }
            stem if ["attn_k", "attn_v", "ffn_up"].iter().any(|part| stem.ends_with(part)) => {
                continue;
            }
            _ => name.to_owned(),
        };
        let shape = [rows, weight.width()];
        let shape = if rows == 1 { &shape[1..] } else { &shape[..] };
        tensors.insert(name, tensor(values, shape));
    }
    changed(&mut metadata, &mut tensors);
    let mut file = Cursor::new(Vec::new());
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut file, &metadata, &tensors).expect("written");
    file.into_inner()
}

/// Divisors for both contexts, all of these values.
fn long_rope(tensors: &mut BTreeMap<String, QTensor>, short: f32, long: f32) {
    for (name, value) in [("short", short), ("long", long)] {
        let values = Tensor::from_vec(vec![value; 24], 24, &Device::Cpu).expect("a tensor");
        let tensor = QTensor::quantize(&values, GgmlDType::F32).expect("f32");
        tensors.insert(format!("rope_factors_{name}.weight"), tensor);
    }
}

#[test]
fn a_phi3_is_the_same_function_as_a_gguf_file_and_as_a_folder() {
    let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None };
    let logits = |model: &Model| {
        let task = Task { op: &op, model, tokens: &tokens(), input: None, spill: None };
        let pass = arms::compute(&task, &Reference, String::new(), &mut |_| {}).expect("a pass");
        let logits = pass.site(&Site("logits".to_owned())).expect("logits");
        logits.data().iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    let folder = opened(Preset::Phi3Tiny);
    let file = open(&phi3_gguf(&|_, _| {})).expect("a phi3");
    assert_eq!(file.names().collect::<Vec<_>>(), folder.names().collect::<Vec<_>>());
    assert_eq!(file.config().context_length, 131_072);
    assert!(logits(&file) == logits(&folder), "other logits");
    // Divisors of 1 turn as none do, and others do not.
    let with = |short, long| {
        open(&phi3_gguf(&|_, tensors| long_rope(tensors, short, long))).expect("a phi3")
    };
    let (ones, others) = (with(1.0, 1.0), with(1.5, 4.0));
    assert!(logits(&ones) == logits(&folder) && logits(&others) != logits(&folder));
    // Beyond the original context the others would hold.
    assert_eq!(ones.config().context_length, 131_072);
    assert_eq!(others.config().context_length, 4096);
    let scaled = open(&phi3_gguf(&|metadata, tensors| {
        long_rope(tensors, 1.0, 1.0);
        metadata.insert("phi3.rope.scaling.attn_factor".to_owned(), Value::F32(1.25));
        metadata.insert("phi3.attention.sliding_window".to_owned(), Value::U32(2047));
    }));
    let scaled = scaled.expect("a phi3");
    assert_eq!((scaled.config().rope.magnitude, scaled.config().context_length), (1.25, 2047));
    assert!(logits(&scaled) != logits(&folder), "the magnitude is ignored");
    let half = open(&phi3_gguf(&|_, tensors| {
        long_rope(tensors, 1.0, 1.0);
        tensors.remove("rope_factors_long.weight");
    }));
    let said = half.expect_err("a file without one of them").to_string();
    assert!(said.contains("`rope_factors_long.weight`: it is missing"), "{said}");
}

#[test]
fn a_clean_run_over_each_newer_preset_passes() {
    for gemm in ["e4m3", "bf16"] {
        let mut project = project();
        let stages = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("stages");
        for file in std::fs::read_dir(stages).expect("shipped").flatten() {
            let text = std::fs::read_to_string(file.path()).expect("a stage");
            let name = format!("stages/{}", file.file_name().display());
            project = project.file(&name, &text);
        }
        let listed: Vec<String> = tokens()[..20].iter().map(u32::to_string).collect();
        let pipeline = format!(
            "tokens = [{}]\narms = [\"reference\", \"emulated\"]\n[recipe]\ngemm = \"{gemm}\"\n\
             output = \"bf16\"\n",
            listed.join(", ")
        );
        project.write("stages/pipeline.toml", &pipeline);
        for preset in NEWER {
            let model = format!("synthetic:{preset}");
            let arguments = ["run", "stages", "--model", &model, "--select", "B,C,D,E"];
            let outcome = project.runner(&arguments);
            assert_eq!(outcome.code, Some(0), "{preset} {gemm}:\n{}{}", outcome.out, outcome.err);
        }
    }
}

#[test]
fn a_scale_multiplies_widths_and_a_bad_one_is_refused_in_words() {
    let name = |name: &str| Scaled::from_name(name).map(|model| model.to_string());
    assert_eq!(name("glm4-tiny").as_deref(), Ok("glm4-tiny"));
    assert_eq!(name("glm4-tiny@2").as_deref(), Ok("glm4-tiny@2"));
    let mut file = Vec::new();
    let scaled = Scaled::from_name("glm4-tiny@2").unwrap();
    runner::model::synthetic::write(scaled, 1, &mut file).unwrap();
    let model = open(&file).unwrap();
    let config = model.config();
    assert_eq!((config.hidden, config.ffn, config.vocabulary), (512, 1536, 4096));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.layers), (8, 4, 64, 8));
    for scale in ["0", "33", "-1", "1.5", "two", "", "02", "99999999999999999999"] {
        let said = name(&format!("glm4-tiny@{scale}")).unwrap_err();
        let range = format!("from 1 to {LARGEST_SCALE}");
        assert!(
            said.contains(&format!("`{scale}` is no scale")) && said.contains(&range),
            "{said}"
        );
    }
    let said = name("qwen2.5-7b@2").unwrap_err();
    assert!(said.contains("`synthetic:qwen2.5-7b` has no scales"), "{said}");
    let said = name("bert-tiny@2").unwrap_err();
    assert!(said.contains("no synthetic model is called `bert-tiny`"), "{said}");
    // And as a user meets it.
    let outcome = project().file(
        "stages/e.toml",
        "id = \"e\"\ntitle = \"a pass\"\ncontract = \"per-layer\"\n[forward]\ncapture = \"every-site\"\n",
    );
    outcome.runner(&["run", "stages", "--model", "synthetic:glm4-tiny@0"]).expect(2, "is no scale");
    let scaled = |model: &str, scale: &str| {
        outcome.runner(&["run", "stages", "--model", model, "--scale", scale])
    };
    scaled("synthetic:glm4-tiny", "many").expect(2, "`many` is no scale of `synthetic:glm4-tiny`");
    scaled("model.gguf", "2").expect(2, "`--scale` is of synthetic models");
    scaled("synthetic:glm4-tiny", "2").expect(0, "pass");
    scaled("synthetic:glm4-tiny@2", "3")
        .expect(2, "`synthetic:glm4-tiny@2` has the scale 2 already");
    // Of the models that the manifests name.
    let alone = |scale: &str| outcome.runner(&["plan", "stages", "--scale", scale, "--explain"]);
    alone("many").expect(2, "`many` is no scale of `synthetic:qwen2-tiny`");
    let twice =
        outcome.runner(&["plan", "stages", "--model", "synthetic:qwen2-tiny@2", "--explain"]);
    let [alone, twice] = [alone("2"), twice].map(|said| said.out);
    assert_eq!(alone, twice);
    assert!(alone.contains("hidden: 512"), "{alone}");
    for (model, part) in [
        ("synthetic:qwen2-tiny@4", "the model of the stage `f` (`stages/f.toml`), has the scale 4"),
        ("m.gguf", "the model of the stage `f` (`stages/f.toml`), is none"),
    ] {
        let stage = outcome.read("stages/e.toml").replace("\"e\"", "\"f\"");
        outcome.write("stages/f.toml", &format!("model = \"{model}\"\n{stage}"));
        outcome.runner(&["plan", "stages", "--scale", "2"]).expect(2, part);
        // Who is not selected may have another model.
        outcome.runner(&["plan", "stages", "--scale", "2", "--select", "e"]).expect(0, "emulated");
    }
}

#[test]
fn tokens_beyond_a_small_vocabulary_are_refused_with_its_size_before_anything_runs() {
    let outcome = project().file(
        "stages/e.toml",
        "id = \"e\"\ntitle = \"a pass\"\ncontract = \"per-layer\"\n[forward]\ncapture = \"every-site\"\n",
    );
    for command in ["plan", "run"] {
        let said = outcome.runner(&[command, "stages", "--model", "synthetic:random"]);
        assert!(!said.err.contains("ran in"), "{}", said.err);
        let text = said.err.clone();
        said.expect(2, "is out of the model's vocabulary of ");
        assert!(text.contains("as `--tokens 1,2,3`"), "{text}");
    }
    let small = ["plan", "stages", "--model", "synthetic:random", "--tokens", "1,2,3"];
    outcome.runner(&small).expect(0, "emulated");
}
