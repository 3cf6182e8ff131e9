//! Layouts of GGUF files that are not a folder's: a small model is written as llama.cpp's converter
//! writes it, in f32, and is the same function as the folder, to the bit where no value was rounded
//! on the way. What llama.cpp itself makes of such files `tests/adapters/gguf_architectures.py`
//! compares.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use runner::compute::arms::{self, Task};
use runner::compute::flow;
use runner::compute::reference::Reference;
use runner::model::Model;
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
                let tensor = QTensor::quantize(&tensor.expect("a tensor"), GgmlDType::F32);
                (name.as_str(), tensor.expect("f32"))
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
    let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0 };
    let tokens: Vec<u32> = (0..12).map(|place| (place * 29 + 5) % 64).collect();
    let task = Task { op: &op, model, tokens: &tokens, input: None };
    let pass = arms::compute(&task, &Reference, String::new(), &mut |_| {}).expect("a pass");
    let foretold: Vec<Site> = flow::sites(model).collect();
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
