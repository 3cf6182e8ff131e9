//! Synthetic models of the newer kinds: what a kind is tried with where no weights are at hand.

use std::collections::BTreeSet;

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
    let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0 };
    let mixtures = NEWER.map(|preset| (preset, opened(preset)));
    let mixtures = mixtures.into_iter().filter(|(_, model)| model.config().experts.is_some());
    let mut seen = 0;
    for (preset, model) in mixtures {
        let experts = model.config().experts.clone().expect("a mixture");
        let task = Task { op: &op, model: &model, tokens: &tokens(), input: None };
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
}
