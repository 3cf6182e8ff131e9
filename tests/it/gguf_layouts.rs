//! Layouts of GGUF files that are not a folder's: a small model is written as llama.cpp's converter
//! writes it, in f32, and is the same function as the folder, to the bit where no value was rounded
//! on the way. What llama.cpp itself makes of such files `tests/adapters/gguf_architectures.py`
//! compares.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;
use runner::compute::arms::{self, Task};
use runner::compute::flow;
use runner::compute::reference::Reference;
use runner::model::synthetic::{self, Preset};
use runner::model::{Model, WeightType};
use runner::op::{Capture, Op, Site};

use crate::data::own;
use crate::model::open;

/// A tensor in the making: its shape, the innermost dimension last, and its values.
type Made = (Vec<usize>, Vec<f32>);

/// A GGUF file in the making.
#[derive(Clone, Default)]
struct File {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Made>,
    /// Tensors whose values are written in half as many bits.
    half: Vec<String>,
}

impl File {
    /// The tensors of a folder by the names that a pass knows, experts of a block in one, and the
    /// keys that all architectures have.
    fn of(model: &Model, architecture: &str) -> File {
        let mut file = File::default();
        for name in model.names() {
            let weight = model.tensor(name).expect("a tensor");
            let values = weight.to_vec().expect("values");
            let shape = match weight.rows() {
                1 => vec![weight.width()],
                rows => vec![rows, weight.width()],
            };
            file.tensors.insert(name.to_owned(), (shape, values));
        }
        let config = model.config();
        file.text("general.architecture", architecture);
        for (key, value) in [
            ("block_count", config.layers),
            ("context_length", 4096),
            ("embedding_length", config.hidden),
            ("feed_forward_length", config.ffn),
            ("attention.head_count", config.heads),
            ("attention.head_count_kv", config.kv_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
            ("rope.dimension_count", config.rope.dimensions),
        ] {
            file.number(key, value);
        }
        file.float("rope.freq_base", config.rope.theta as f32);
        file.float("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
        if let Some(experts) = &config.experts {
            file.number("expert_count", experts.count);
            file.number("expert_used_count", experts.routing.used);
            file.number("expert_feed_forward_length", experts.ffn);
            for layer in 0..config.layers {
                for part in ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"] {
                    for ending in ["weight", "bias"] {
                        file.stack(&format!("blk.{layer}.{part}"), ending, experts.count);
                    }
                }
            }
        }
        file
    }

    fn key(&self, key: &str) -> String {
        match (&self.metadata.get("general.architecture"), key.starts_with("general.")) {
            (Some(Value::String(name)), false) => format!("{name}.{key}"),
            _ => key.to_owned(),
        }
    }

    fn text(&mut self, key: &str, value: &str) {
        self.metadata.insert(self.key(key), Value::String(value.to_owned()));
    }

    fn number(&mut self, key: &str, value: usize) {
        self.metadata.insert(self.key(key), Value::U32(value as u32));
    }

    fn float(&mut self, key: &str, value: f32) {
        self.metadata.insert(self.key(key), Value::F32(value));
    }

    fn without(mut self, key: &str) -> File {
        assert!(self.metadata.remove(&self.key(key)).is_some(), "{key}");
        self
    }

    fn with(mut self, key: &str, value: Value) -> File {
        self.metadata.insert(self.key(key), value);
        self
    }

    /// Puts the tensors of all experts into one, where there are such.
    fn stack(&mut self, stem: &str, ending: &str, count: usize) {
        let mut values = Vec::new();
        let mut each = Vec::new();
        for expert in 0..count {
            let held = self.tensors.remove(&format!("{stem}.{expert}.{ending}"));
            let Some((shape, part)) = held else { return };
            values.extend(part);
            each = shape;
        }
        each.insert(0, count);
        self.tensors.insert(format!("{stem}.{ending}"), (each, values));
    }

    fn take(&mut self, name: &str) -> Made {
        self.tensors.remove(name).unwrap_or_else(|| panic!("{name}"))
    }

    fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.take(from);
        self.tensors.insert(to.to_owned(), tensor);
    }

    fn write(&self) -> Vec<u8> {
        let tensors: Vec<(&str, QTensor)> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| {
                let tensor = Tensor::from_vec(values.clone(), shape.as_slice(), &Device::Cpu);
                let kind = match self.half.contains(name) {
                    true => GgmlDType::F16,
                    false => GgmlDType::F32,
                };
                let tensor = QTensor::quantize(&tensor.expect("a tensor"), kind);
                (name.as_str(), tensor.expect("values"))
            })
            .collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(k, value)| (k.as_str(), value)).collect();
        let mut file = Cursor::new(Vec::new());
        gguf_file::write(&mut file, &metadata, &tensors).expect("written");
        file.into_inner()
    }

    fn open(&self) -> Model {
        open(&self.write()).expect("a model that is read")
    }

    fn refusal(&self) -> String {
        open(&self.write()).expect_err("the model must be refused").to_string()
    }
}

/// The folder of a small model, with other settings.
fn folder(path: &Path, changed: &[(&str, serde_json::Value)]) -> (tempfile::TempDir, Model) {
    let text = std::fs::read(path.join("config.json")).expect("a config");
    let mut config: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    for (pointer, value) in changed {
        let (within, key) = pointer.rsplit_once('/').expect("a path");
        let within = config.pointer_mut(within).expect("a setting");
        within[key] = value.clone();
    }
    let copy = tempfile::tempdir().expect("a folder");
    std::fs::write(copy.path().join("config.json"), config.to_string()).expect("written");
    let weights = "model.safetensors";
    std::fs::copy(path.join(weights), copy.path().join(weights)).expect("copied");
    let model = Model::open(copy.path()).expect("a folder that is read");
    (copy, model)
}

/// Every site of a reference pass, as its bits.
fn sites(model: &Model) -> Vec<(Site, Vec<u32>)> {
    let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None };
    let tokens: Vec<u32> = (0..12).map(|place| (place * 29 + 5) % 64).collect();
    let task = Task { op: &op, model, tokens: &tokens, input: None, spill: None };
    let pass = arms::compute(&task, &Reference, String::new(), &mut |_| {}).expect("a pass");
    let foretold: Vec<Site> = flow::sites(model, None).collect();
    assert_eq!(pass.sites.iter().map(|(site, _)| site.clone()).collect::<Vec<_>>(), foretold);
    let bits = |(site, tensor): &(Site, runner::tensor::Tensor)| {
        (site.clone(), tensor.data().iter().map(|value| value.to_bits()).collect())
    };
    pass.sites.iter().map(bits).collect()
}

/// The first site whose bits differ.
fn first_other(one: &Model, other: &Model) -> Option<Site> {
    let (one, other) = (sites(one), sites(other));
    let names =
        |sites: &[(Site, Vec<u32>)]| sites.iter().map(|(site, _)| site.clone()).collect::<Vec<_>>();
    assert_eq!(names(&one), names(&other));
    one.into_iter().zip(other).find(|(one, other)| one != other).map(|((site, _), _)| site)
}

fn gpt_oss(model: &Model) -> File {
    let mut file = File::of(model, "gpt-oss");
    file.number("attention.sliding_window", model.config().sliding.window.expect("a window"));
    file.text("rope.scaling.type", "yarn");
    file.float("rope.scaling.factor", 32.0);
    file.number("rope.scaling.original_context_length", 4096);
    for layer in 0..model.config().layers {
        let norm = format!("blk.{layer}.post_attention_norm.weight");
        file.rename(&format!("blk.{layer}.ffn_norm.weight"), &norm);
    }
    file
}

#[test]
fn a_gpt_oss_is_the_same_function_as_a_gguf_file_and_as_a_folder() {
    let path = own("tests/fixtures/mxfp4/plain");
    // llama.cpp's bounds of YaRN are whole pairs, whatever the folder says.
    let whole = ("/rope_parameters/truncate", true.into());
    let (_kept, model) = folder(&path, &[whole]);
    let file = gpt_oss(&model);
    assert_eq!(first_other(&file.open(), &model), None);
    let (_kept, parts) = folder(&path, &[]);
    assert_eq!(first_other(&file.open(), &parts), Some(Site("blk.0.q_rope".to_owned())));
    // What newer converters write.
    let more = file.clone().with("rope.scaling.yarn_beta_fast", Value::F32(32.0));
    let more = more.with("rope.scaling.yarn_beta_slow", Value::F32(1.0));
    let more = more.with("attention.sliding_window_pattern", Value::U32(2));
    assert_eq!(first_other(&more.open(), &model), None);
    let other = file.clone().with("rope.scaling.yarn_beta_fast", Value::F32(2.0));
    assert_eq!(first_other(&other.open(), &model), Some(Site("blk.0.q_rope".to_owned())));
}

#[test]
fn what_a_gpt_oss_does_not_say_or_says_otherwise_is_refused_by_name() {
    let (_kept, model) = folder(&own("tests/fixtures/mxfp4/plain"), &[]);
    let file = gpt_oss(&model);
    for (file, words) in [
        (file.clone().without("expert_count"), "`gpt-oss.expert_count` is missing"),
        (file.clone().without("attention.sliding_window"), "sliding_window` is missing"),
        (file.clone().with("attention.sliding_window", Value::U32(0)), "sliding_window` is 0"),
        (
            file.clone().with("attention.sliding_window_pattern", Value::U32(3)),
            "`gpt-oss.attention.sliding_window_pattern` is 3",
        ),
        (file.clone().with("rope.scaling.factor", Value::F32(0.5)), "is 0.5, and YaRN stretches"),
        (
            file.clone().with("rope.scaling.yarn_ext_factor", Value::F32(0.5)),
            "`gpt-oss.rope.scaling.yarn_ext_factor` is 0.5",
        ),
        (
            file.clone().with("rope.scaling.yarn_attn_factor", Value::F32(2.0)),
            "`gpt-oss.rope.scaling.yarn_attn_factor` is 2",
        ),
        (
            file.clone().with("rope.scaling.original_context_length", Value::U32(0)),
            "original_context_length is 0",
        ),
        (file.clone().with("rope.scaling.yarn_beta_slow", Value::F32(-1.0)), "beta_slow is -1"),
        (
            file.clone()
                .without("rope.scaling.type")
                .with("rope.scaling.yarn_beta_fast", Value::F32(32.0)),
            "it has `gpt-oss.rope.scaling.yarn_beta_fast`",
        ),
        (file.clone().with("rope.freq_base", Value::F32(1.0)), "RoPE factor"),
        (file.clone().with("rope.freq_base_swa", Value::F32(1.0)), "`gpt-oss.rope.freq_base_swa`"),
    ] {
        let said = file.refusal();
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
    let mut other = file.clone();
    other.rename("blk.0.post_attention_norm.weight", "blk.0.ffn_norm.weight");
    let said = other.refusal();
    assert!(said.contains("llama.cpp calls it `post_attention_norm.weight`"), "{said}");
    let mut other = file.clone();
    let (shape, mut values) = other.take("blk.1.ffn_down_exps.bias");
    values.truncate(2 * shape[1]);
    other.tensors.insert("blk.1.ffn_down_exps.bias".to_owned(), (vec![2, shape[1]], values));
    let said = other.refusal();
    assert!(said.contains("`blk.1.ffn_down_exps.bias`") && said.contains("[1, 3, "), "{said}");
    for missing in ["blk.0.attn_sinks.weight", "blk.1.ffn_gate_inp.bias", "output.weight"] {
        let mut other = file.clone();
        other.take(missing);
        let said = other.refusal();
        assert!(said.contains(missing) && said.contains("missing"), "{said}");
    }
}

/// A deepseek2 with the product of keys and values in one.
fn deepseek(model: &Model) -> File {
    let config = model.config();
    let (latent, experts) = (config.latent.expect("latent"), config.experts.as_ref());
    let experts = experts.expect("experts");
    let mut file = File::of(model, "deepseek2");
    file.number("attention.value_length", latent.values);
    file.number("attention.kv_lora_rank", latent.keys);
    file.number("attention.q_lora_rank", latent.queries.expect("a width"));
    file.number("leading_dense_block_count", 1);
    file.number("expert_shared_count", 1);
    file.number("expert_gating_func", 2);
    file.number("expert_group_count", experts.routing.groups);
    file.number("expert_group_used_count", experts.routing.used_groups);
    file.float("expert_weights_scale", experts.routing.factor as f32);
    file.metadata.insert("deepseek2.expert_weights_norm".to_owned(), Value::Bool(true));
    file.text("rope.scaling.type", "yarn");
    file.float("rope.scaling.factor", 4.0);
    file.number("rope.scaling.original_context_length", 64);
    file.float("rope.scaling.yarn_log_multiplier", 0.125);
    file
}

/// The same with the product in two, as llama.cpp multiplies them.
fn split(model: &Model) -> File {
    let latent = model.config().latent.expect("latent");
    let (heads, width) = (model.config().heads, latent.keys);
    let mut file = deepseek(model);
    file.number("attention.head_count_kv", 1);
    file.number("attention.key_length", latent.keys + latent.turned);
    file.number("attention.value_length", latent.keys);
    file.number("attention.key_length_mla", latent.still + latent.turned);
    file.number("attention.value_length_mla", latent.values);
    for layer in 0..model.config().layers {
        let (_, both) = file.take(&format!("blk.{layer}.attn_kv_b.weight"));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in both.chunks_exact((latent.still + latent.values) * width) {
            let (still, own) = head.split_at(latent.still * width);
            let column = |column| still.iter().skip(column).step_by(width).copied();
            keys.extend((0..width).flat_map(column));
            values.extend_from_slice(own);
        }
        let keys = (vec![heads, width, latent.still], keys);
        let values = (vec![heads, latent.values, width], values);
        file.tensors.insert(format!("blk.{layer}.attn_k_b.weight"), keys);
        file.tensors.insert(format!("blk.{layer}.attn_v_b.weight"), values);
    }
    file
}

/// The folder of a small DeepSeek, with a scale of YaRN that an f32 holds.
fn deepseek_folder() -> (tempfile::TempDir, Model) {
    let scale = |key| (key, 1.25.into());
    folder(
        &own("tests/fixtures/small-models/deepseek-v3"),
        &[scale("/rope_parameters/mscale"), scale("/rope_parameters/mscale_all_dim")],
    )
}

#[test]
fn a_deepseek_is_the_same_function_in_both_layouts_and_as_a_folder() {
    let (_kept, model) = deepseek_folder();
    assert_eq!(first_other(&deepseek(&model).open(), &model), None);
    let file = split(&model);
    let read = file.open();
    assert_eq!(first_other(&read, &model), None);
    // A part of the rows, and the key of a weight that is put together.
    let name = "blk.1.attn_kv_b.weight";
    let (whole, parts) = (model.tensor(name).unwrap(), read.tensor(name).unwrap());
    assert!(whole.to_vec().unwrap() == parts.to_vec().unwrap() && !parts.is_plain());
    let mut rows = [vec![0.0; 30 * 16], vec![0.0; 30 * 16]];
    whole.decode_rows(9..39, &mut rows[0]).unwrap();
    parts.decode_rows(9..39, &mut rows[1]).unwrap();
    assert!(rows[0] == rows[1]);
    let mut other = file.clone();
    other.tensors.get_mut("blk.1.attn_v_b.weight").expect("values").1[7] += 1.0;
    let other = other.open();
    assert!(other.tensor(name).unwrap().digest() != parts.digest());
    assert_eq!(first_other(&other, &model), Some(Site("blk.1.kv".to_owned())));
    // Parts of two types, and of one that is not f32.
    let mut half = file.clone();
    half.half.push("blk.1.attn_k_b.weight".to_owned());
    let mixed = half.open();
    half.half.push("blk.1.attn_v_b.weight".to_owned());
    let narrow = half.open();
    let rounded = |values: Vec<f32>| values.into_iter().map(|v| half::f16::from_f32(v).to_f32());
    let all: Vec<f32> = rounded(whole.to_vec().unwrap()).collect();
    let (mixed, narrow) = (mixed.tensor(name).unwrap(), narrow.tensor(name).unwrap());
    assert_eq!([mixed.kind(), narrow.kind()], [WeightType::F32, WeightType::F16]);
    assert!(narrow.to_vec().unwrap() == all);
    let (of_head, still) = (28 * 16, 16 * 16);
    for (head, (mixed, all)) in
        mixed.to_vec().unwrap().chunks(of_head).zip(all.chunks(of_head)).enumerate()
    {
        assert!(mixed[..still] == all[..still], "keys of head {head}");
        assert!(
            mixed[still..] == whole.to_vec().unwrap()[head * of_head + still..(head + 1) * of_head]
        );
    }
    // Without groups a token may go to any experts, and another epsilon is that of all norms.
    let any = file.clone().without("expert_group_count").without("expert_group_used_count");
    assert_eq!(any.open().config().experts.as_ref().map(|of| of.routing.groups), Some(1));
    let other = file.with("attention.layer_norm_rms_epsilon", Value::F32(1e-2));
    assert_eq!(other.open().config().latent.map(|latent| latent.eps), Some(1e-2));
}

#[test]
fn a_deepseek_of_the_first_files_has_a_softmax_and_may_lack_the_narrow_queries() {
    let (_kept, model) = deepseek_folder();
    let mut file = deepseek(&model).without("expert_gating_func").without("expert_weights_norm");
    file = file.without("expert_group_count").without("expert_group_used_count");
    file = file.without("attention.q_lora_rank");
    file.take("blk.1.exp_probs_b.bias");
    for layer in 0..2 {
        let block = |name: &str| format!("blk.{layer}.{name}.weight");
        file.take(&block("attn_q_a"));
        file.take(&block("attn_q_a_norm"));
        let (_, values) = file.take(&block("attn_q_b"));
        let values = values.iter().chain(&values).copied().take(48 * 32).collect();
        file.tensors.insert(block("attn_q"), (vec![48, 32], values));
    }
    let read = file.open();
    let routing = read.config().experts.as_ref().expect("experts").routing;
    assert_eq!(routing.scores, runner::model::RouterScores::Softmax);
    assert_eq!(read.config().latent.expect("latent").queries, None);
    assert!(sites(&read).iter().all(|(site, _)| !site.0.ends_with("q_a")));
    let normed = file.clone().with("expert_weights_norm", Value::Bool(true)).open();
    let routing = normed.config().experts.as_ref().expect("experts").routing;
    assert_eq!(routing.scores, runner::model::RouterScores::SoftmaxOfTaken);
    let mut biased = file.clone();
    biased.tensors.insert("blk.1.exp_probs_b.bias".to_owned(), (vec![6], vec![0.5; 6]));
    let said = biased.refusal();
    assert!(said.contains("`blk.1.exp_probs_b.bias`") && said.contains("no use for it"), "{said}");
    let said = file.clone().with("expert_group_count", Value::U32(2));
    let said = said.with("expert_group_used_count", Value::U32(1)).refusal();
    assert!(said.contains("`deepseek2.expert_group_count` is 2"), "{said}");
}

#[test]
fn what_a_deepseek_does_not_say_or_says_otherwise_is_refused_by_name() {
    let (_kept, model) = deepseek_folder();
    let (file, parts) = (deepseek(&model), split(&model));
    let number = |file: &File, key: &str, value: u32| file.clone().with(key, Value::U32(value));
    let float = |file: &File, key: &str, value: f32| file.clone().with(key, Value::F32(value));
    for (file, words) in [
        (file.clone().without("attention.kv_lora_rank"), "kv_lora_rank` is missing"),
        (file.clone().without("rope.dimension_count"), "dimension_count` is missing"),
        (file.clone().without("expert_shared_count"), "expert_shared_count` is missing"),
        (number(&file, "rope.dimension_count", 25), "RoPE turns 25 of them"),
        (number(&file, "attention.head_count_kv", 1), "head_count_kv` is 1, not 2"),
        (number(&parts, "attention.head_count_kv", 2), "head_count_kv` is 2, not 1"),
        (number(&parts, "attention.key_length", 23), "key_length` is 23, not 24"),
        (number(&parts, "attention.value_length", 12), "value_length` is 12, not 16"),
        (number(&file, "attention.key_length_mla", 24), "value_length_mla` is missing"),
        (number(&file, "attention.value_length_mla", 12), "key_length_mla` is missing"),
        (number(&file, "expert_gating_func", 3), "expert_gating_func` is 3"),
        (number(&file, "expert_group_count", 4), "its 6 experts do not fill 4 groups"),
        (file.clone().without("expert_group_used_count"), "group_used_count` is missing"),
        (
            file.clone()
                .without("expert_group_count")
                .with("expert_group_used_count", Value::U32(3)),
            "in 3 of 1 groups",
        ),
        (float(&file, "expert_weights_scale", 0.0), "factor of the experts' weights is 0"),
        (file.clone().without("rope.scaling.yarn_log_multiplier"), "log_multiplier` is missing"),
        (float(&file, "rope.scaling.yarn_log_multiplier", 0.0), "log_multiplier` is 0"),
        (
            file.clone()
                .without("rope.scaling.yarn_log_multiplier")
                .with("rope.scaling.type", Value::String("linear".into())),
            "by YaRN alone",
        ),
        (number(&file, "nextn_predict_layers", 1), "`deepseek2.nextn_predict_layers`"),
        (float(&file, "attention.temperature_scale", 0.1), "attention.temperature_scale`"),
    ] {
        let said = file.refusal();
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
    let changed = |change: &dyn Fn(&mut File)| {
        let mut file = parts.clone();
        change(&mut file);
        file.refusal()
    };
    for (said, words) in [
        (
            changed(&|file| drop(file.take("blk.1.attn_v_b.weight"))),
            "`blk.1.attn_v_b.weight`: it is missing",
        ),
        (
            changed(&|file| drop(file.take("blk.0.attn_k_b.weight"))),
            "`blk.0.attn_k_b.weight`: it is missing",
        ),
        (
            changed(&|file| {
                let held = file.tensors.get_mut("blk.1.attn_k_b.weight").expect("keys");
                held.0 = vec![2, 8, 32];
            }),
            "it is [2, 8, 32], but the hyperparameters make it [2, 16, 16]",
        ),
        (
            changed(&|file| {
                let (shape, values) = (vec![56, 16], vec![0.5; 56 * 16]);
                file.tensors.insert("blk.1.attn_kv_b.weight".to_owned(), (shape, values));
            }),
            "`attn_k_b.weight` and `attn_v_b.weight` of the same block hold its values too",
        ),
        (
            changed(&|file| {
                let (shape, values) = (vec![2, 16, 16], vec![0.5; 512]);
                file.tensors.insert("blk.7.attn_k_b.weight".to_owned(), (shape, values));
            }),
            "`blk.7.attn_k_b.weight`: the forward pass of deepseek_v3 with 2 blocks has no use",
        ),
        (
            changed(&|file| {
                file.tensors.insert("blk.0.attn_q_a.bias".to_owned(), (vec![24], vec![0.5; 24]));
            }),
            "`blk.0.attn_q_a.bias`",
        ),
    ] {
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
}

/// A stablelm, whose norms have an epsilon of another name.
fn stablelm(model: &Model) -> File {
    let mut file = File::of(model, "stablelm").without("attention.layer_norm_rms_epsilon");
    file.float("attention.layer_norm_epsilon", model.config().rms_norm_eps);
    file
}

#[test]
fn a_parallel_stablelm_is_the_same_function_as_a_gguf_file_and_as_a_folder() {
    let (_kept, model) = folder(&own("tests/fixtures/small-models/stablelm-parallel"), &[]);
    let gains = model.tensor("blk.1.attn_q_norm.weight").expect("gains of heads");
    assert_eq!((gains.rows(), gains.width(), gains.kind()), (2, 16, WeightType::F32));
    let file = stablelm(&model);
    // Whatever its key says: llama.cpp goes by the tensors.
    for says in [true, false] {
        let file = file.clone().with("use_parallel_residual", Value::Bool(says));
        assert_eq!(first_other(&file.open(), &model), None);
    }
    let read = sites(&file.open());
    assert!(read.iter().any(|(site, _)| site.0 == "blk.1.k_norm"));
    assert!(read.iter().all(|(site, _)| !site.0.ends_with("ffn_norm")));
    // The second head's own gain counts.
    let mut other = file.clone();
    other.tensors.get_mut("blk.0.attn_q_norm.weight").expect("gains").1[20] += 0.5;
    assert_eq!(first_other(&other.open(), &model), Some(Site("blk.0.q_norm".to_owned())));
}

#[test]
fn a_stablelm_has_the_norms_that_its_file_holds() {
    let (_kept, model) = folder(&own("tests/fixtures/small-models/stablelm-parallel"), &[]);
    let mut file = stablelm(&model);
    file.take("blk.0.attn_k_norm.weight");
    file.tensors.insert("blk.1.ffn_norm.weight".to_owned(), (vec![32], vec![1.5; 32]));
    let made: Vec<String> = sites(&file.open()).into_iter().map(|(site, _)| site.0).collect();
    let has = |site: &str| made.iter().any(|made| made == site);
    assert!(has("blk.0.q_norm") && !has("blk.0.k_norm") && has("blk.1.k_norm"));
    assert!(!has("blk.0.ffn_norm") && has("blk.1.ffn_norm"));
    // A bias of nothing would be passed over.
    let mut bias = stablelm(&model);
    bias.tensors.insert("blk.1.ffn_norm.bias".to_owned(), (vec![32], vec![1.5; 32]));
    let said = bias.refusal();
    assert!(said.contains("`blk.1.ffn_norm.bias`") && said.contains("no use for it"), "{said}");
    let mut wrong = stablelm(&model);
    let (_, values) = wrong.take("blk.0.attn_q_norm.weight");
    wrong.tensors.insert("blk.0.attn_q_norm.weight".to_owned(), (vec![32], values));
    let said = wrong.refusal();
    assert!(said.contains("it is [1, 32], but the hyperparameters make it [2, 16]"), "{said}");
}

#[test]
fn a_folder_whose_heads_lack_a_norm_or_have_one_too_many_is_refused_by_name() {
    let path = own("tests/fixtures/small-models/stablelm-parallel");
    let refused = |change: &dyn Fn(&str) -> String| {
        let copy = tempfile::tempdir().expect("a folder");
        std::fs::copy(path.join("config.json"), copy.path().join("config.json")).expect("copied");
        let held = std::fs::read(path.join("model.safetensors")).expect("a model");
        let held = safetensors::SafeTensors::deserialize(&held).expect("tensors");
        let renamed = held.tensors().into_iter().map(|(name, view)| (change(&name), view));
        let out = copy.path().join("model.safetensors");
        safetensors::serialize_to_file(renamed, None, &out).expect("written");
        Model::open(copy.path()).expect_err("the folder must be refused").to_string()
    };
    let said = refused(&|name| name.replace("q_layernorm.norms.1", "q_layernorm.norms.2"));
    assert!(said.contains("q_layernorm.norms.2.weight") && said.contains("no use"), "{said}");
    let gone =
        |name: &str| name.replace("1.self_attn.q_layernorm.norms.1.weight", "0.mlp.up_proj.bias");
    let said = refused(&gone);
    assert!(said.contains("`blk.1.attn_q_norm.1.weight`") && said.contains("missing"), "{said}");
}

/// A qwen3next whose delta nets have their projection head by head.
fn qwen3next(model: &Model) -> File {
    let mut file = File::of(model, "qwen3next");
    let (config, experts) = (model.config(), model.config().experts.as_ref().expect("experts"));
    let net = config.delta.as_ref().expect("delta nets");
    file.number("expert_shared_feed_forward_length", experts.shared.expect("a shared one"));
    file.number("ssm.conv_kernel", net.taps);
    file.number("ssm.group_count", net.key_heads);
    file.number("ssm.time_step_rank", net.value_heads);
    file.number("ssm.state_size", net.key_dim);
    file.number("ssm.inner_size", net.value_heads * net.value_dim);
    for layer in 0..config.layers {
        let block = |name: &str| format!("blk.{layer}.{name}");
        file.rename(&block("ffn_norm.weight"), &block("post_attention_norm.weight"));
        if config.delta_of(layer).is_some() {
            let (shape, logs) = file.take(&block("ssm_a_log.weight"));
            let rates = logs.into_iter().map(|log| -f64::from(log).exp() as f32).collect();
            file.tensors.insert(block("ssm_a"), (shape, rates));
        }
    }
    file
}

/// The same with queries, keys and values of all heads one after the other, and gates apart.
fn qwen3next_split(model: &Model) -> File {
    let mut file = qwen3next(model);
    let net = model.config().delta.as_ref().expect("delta nets");
    let hidden = model.config().hidden;
    let values = net.value_heads / net.key_heads * net.value_dim;
    for layer in
        (0..model.config().layers).filter(|&layer| model.config().delta_of(layer).is_some())
    {
        let (_, all) = file.take(&format!("blk.{layer}.ssm_in.weight"));
        let part = |first: usize, rows: usize| -> Vec<f32> {
            let heads = all.chunks_exact((2 * net.key_dim + 2 * values) * hidden);
            heads.flat_map(|head| &head[first * hidden..(first + rows) * hidden]).copied().collect()
        };
        let keys = net.key_dim;
        let parts = [part(0, keys), part(keys, keys), part(2 * keys, values)].concat();
        let shape = |values: &Vec<f32>| vec![values.len() / hidden, hidden];
        let gates = part(2 * keys + values, values);
        let tensors = &mut file.tensors;
        tensors.insert(format!("blk.{layer}.attn_qkv.weight"), (shape(&parts), parts));
        tensors.insert(format!("blk.{layer}.attn_gate.weight"), (shape(&gates), gates));
    }
    file
}

/// The folder of a small Qwen3-Next, and the same with rates of one, which the converter does not
/// round.
fn qwen3next_folders() -> (tempfile::TempDir, Model, Model) {
    let kept = tempfile::tempdir().expect("a folder");
    let path = synthetic::ensure(Preset::Qwen3NextTiny, 1, kept.path()).expect("a model");
    let model = Model::open(&path).expect("a folder that is read");
    let other = kept.path().join("ones");
    std::fs::create_dir(&other).expect("a folder");
    std::fs::copy(path.join("config.json"), other.join("config.json")).expect("copied");
    let held = std::fs::read(path.join("model.safetensors")).expect("weights");
    let held = safetensors::SafeTensors::deserialize(&held).expect("tensors");
    let zeros = vec![0u8; 1 << 10];
    let tensors = held.tensors().into_iter().map(|(name, view)| {
        let bytes = match name.ends_with("A_log") {
            true => &zeros[..view.data().len()],
            false => view.data(),
        };
        let view = safetensors::tensor::TensorView::new(view.dtype(), view.shape().to_vec(), bytes);
        (name, view.expect("a tensor"))
    });
    let out = other.join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &out).expect("written");
    let ones = Model::open(&other).expect("a folder that is read");
    (kept, model, ones)
}

#[test]
fn a_qwen3next_is_the_same_function_in_both_layouts_and_as_a_folder() {
    let (_kept, model, ones) = qwen3next_folders();
    let read = qwen3next_split(&ones).open();
    assert_eq!(first_other(&qwen3next(&ones).open(), &ones), None);
    assert_eq!(first_other(&read, &ones), None);
    let name = "blk.2.ssm_in.weight";
    let (whole, parts) = (ones.tensor(name).unwrap(), read.tensor(name).unwrap());
    assert!(whole.to_vec().unwrap() == parts.to_vec().unwrap() && !parts.is_plain());
    // Rates that the converter rounds.
    let file = qwen3next(&model).open();
    assert_eq!(first_other(&file, &model), Some(Site("blk.0.lin_gates".to_owned())));
    let logits = |model: &Model| {
        let (site, bits) = sites(model).pop().expect("sites");
        assert_eq!(site.0, "logits");
        bits.into_iter().map(f32::from_bits).collect::<Vec<_>>()
    };
    let (own, folder) = (logits(&file), logits(&model));
    let largest = folder.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let off = own.iter().zip(&folder).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(off < 1e-6 * largest, "{off:e} of {largest:e}");
}

#[test]
fn what_a_qwen3next_does_not_say_or_says_otherwise_is_refused_by_name() {
    let (_kept, model, _) = qwen3next_folders();
    let (file, parts) = (qwen3next(&model), qwen3next_split(&model));
    let number = |key: &str, value: u32| file.clone().with(key, Value::U32(value));
    for (file, words) in [
        (file.clone().without("ssm.state_size"), "`qwen3next.ssm.state_size` is missing"),
        (file.clone().without("ssm.conv_kernel"), "`qwen3next.ssm.conv_kernel` is missing"),
        (file.clone().without("expert_count"), "`qwen3next.expert_count` is missing"),
        (number("ssm.inner_size", 250), "inner_size` is 250, and its 8 heads have 32 values"),
        (number("full_attention_interval", 0), "full_attention_interval` is 0"),
        (number("full_attention_interval", 2), "`blk.1.attn_q.weight`: it is missing"),
        (number("ssm.group_count", 3), "its delta nets have 3 heads"),
        (number("attention.sliding_window", 8), "slides over 8"),
    ] {
        let said = file.refusal();
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
    let changed = |file: &File, change: &dyn Fn(&mut File)| {
        let mut file = file.clone();
        change(&mut file);
        file.refusal()
    };
    for (said, words) in [
        (
            changed(&parts, &|file| drop(file.take("blk.1.attn_gate.weight"))),
            "`blk.1.attn_gate.weight`: it is missing",
        ),
        (
            changed(&parts, &|file| {
                file.rename("blk.1.attn_gate.weight", "blk.3.attn_gate.weight")
            }),
            "`blk.1.attn_gate.weight`: it is missing",
        ),
        (
            changed(&file, &|file| {
                file.tensors
                    .insert("blk.3.attn_qkv.weight".to_owned(), (vec![1, 256], vec![0.5; 256]));
            }),
            "`blk.3.attn_qkv.weight`: the forward pass of qwen3_next with 4 blocks has no use",
        ),
        (
            changed(&file, &|file| {
                let gate = parts.tensors["blk.0.attn_gate.weight"].clone();
                file.tensors.insert("blk.0.attn_gate.weight".to_owned(), gate);
            }),
            "`blk.0.attn_qkv.weight`: it is missing",
        ),
        (
            changed(&parts, &|file| {
                let whole = qwen3next(&model).take("blk.0.ssm_in.weight");
                file.tensors.insert("blk.0.ssm_in.weight".to_owned(), whole);
            }),
            "`attn_qkv.weight` and `attn_gate.weight` of the same block hold its values too",
        ),
        (
            changed(&file, &|file| file.rename("blk.0.ssm_a", "blk.0.ssm_a_log.weight")),
            "`blk.0.ssm_a`: it is missing",
        ),
        (
            changed(&file, &|file| {
                let norm = file.take("blk.0.post_attention_norm.weight");
                file.tensors.insert("blk.0.ffn_norm.weight".to_owned(), norm);
            }),
            "llama.cpp calls it `post_attention_norm.weight`",
        ),
    ] {
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
}

#[test]
fn a_file_of_each_layout_is_compared_with_its_folder_as_the_same_function() {
    let told = |file: &File, folder: &Model| {
        let found = runner::compare::models::compare(&file.open(), folder).expect("compared");
        assert!(found.are_same(), "{:?} {:?} {:?}", found.settings, found.alone, found.tensors);
        found
    };
    let (_one, latent) = deepseek_folder();
    told(&deepseek(&latent), &latent);
    told(&split(&latent), &latent);
    let (_two, stable) = folder(&own("tests/fixtures/small-models/stablelm-parallel"), &[]);
    told(&stablelm(&stable), &stable);
    let (_three, next, _) = qwen3next_folders();
    told(&qwen3next(&next), &next);
    let found = told(&qwen3next_split(&next), &next);
    assert!(found.tensors.iter().any(|pair| pair.name == "blk.0.ssm_a"));
    let mut other = qwen3next(&next);
    other.tensors.get_mut("blk.0.ssm_a").expect("rates").1[3] *= 1.01;
    let found = runner::compare::models::compare(&other.open(), &next).expect("compared");
    let differs = |pair: &&runner::compare::models::Pair| {
        matches!(pair.found, runner::compare::models::Found::Differs(_))
    };
    let names: Vec<&str> = found.tensors.iter().filter(differs).map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["blk.0.ssm_a"]);
}

/// Files of these layouts, each with the number of its bytes before the tensors.
fn small_files() -> &'static [(Vec<u8>, usize)] {
    static FILES: OnceLock<Vec<(Vec<u8>, usize)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let (_one, latent) = deepseek_folder();
        let (_two, oss) = folder(&own("tests/fixtures/mxfp4/plain"), &[]);
        let (_three, stable) = folder(&own("tests/fixtures/small-models/stablelm-parallel"), &[]);
        let files = [deepseek(&latent), split(&latent), gpt_oss(&oss), stablelm(&stable)];
        let written = files.iter().map(|file| {
            let sizes =
                file.tensors.values().map(|(_, held)| (4 * held.len()).next_multiple_of(32));
            let bytes = file.write();
            let header = bytes.len().saturating_sub(sizes.sum());
            (bytes, header)
        });
        written.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// Whatever a few bytes of the header become, the model is refused or usable.
    #[test]
    fn a_damaged_header_of_a_layout_is_refused_or_harmless(
        which in 0_usize..4,
        changes in prop::collection::vec((0_usize..1 << 20, any::<u8>()), 1..6),
        smash in prop::option::of((0_usize..1 << 20, prop::sample::select(vec![
            u64::MAX, 1 << 63, 1 << 32, i64::MAX as u64, 1, 0,
        ]))),
    ) {
        let (bytes, header) = &small_files()[which];
        let mut file = bytes.clone();
        for (at, byte) in changes {
            file[at % header] = byte;
        }
        if let Some((at, value)) = smash {
            let at = at % header;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(model) = open(&file) {
            for name in model.names() {
                model.tensor(name).unwrap().to_vec().unwrap();
            }
        }
    }
}
