//! A synthetic model as a Hugging Face folder, for the kinds that GGUF files hold not at all or
//! in another form.
//!
//! Its `config.json` is read as anybody's is, and the tensors are those that it demands, under the
//! names by which the reader knows them. It decides no values: `table` does.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::blocks::Columns;
use super::presets::Setting;
use super::table::Table;
use super::{ADDED, Planned, Rows, Shape, Values, vocabulary};
use crate::model::architecture::Architecture;
use crate::model::config::{Config, Expected};
use crate::model::mixture::Mixture;
use crate::model::weights::WeightType;
use crate::model::{hf_config, safetensors};

/// The file of the weights.
pub(super) const WEIGHTS: &str = "model.safetensors";

const GLOBALS: [&str; 3] = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"];
/// What tensors of a block may be called, `*` being an expert's number. Which of them a kind has,
/// the reader says; fused ones stand before their parts.
const OF_BLOCK: [&str; 50] = [
    "input_layernorm.weight",
    "self_attn.qkv_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.q_a_proj.weight",
    "self_attn.q_a_proj.bias",
    "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_proj_with_mqa.bias",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "self_attn.sinks",
    "linear_attn.in_proj_qkvz.weight",
    "linear_attn.in_proj_ba.weight",
    "linear_attn.conv1d.weight",
    "linear_attn.A_log",
    "linear_attn.dt_bias",
    "linear_attn.norm.weight",
    "linear_attn.out_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_up_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "mlp.router.weight",
    "mlp.router.bias",
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.experts.gate_up_proj",
    "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down_proj",
    "mlp.experts.down_proj_bias",
    "mlp.experts.*.gate_proj.weight",
    "mlp.experts.*.up_proj.weight",
    "mlp.experts.*.down_proj.weight",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert_gate.weight",
    "mlp.shared_experts.*.weight",
    "self_attn.rotary_emb.inv_freq",
];

/// The files beside the weights.
pub(super) fn beside(shape: &Shape) -> [(&'static str, Vec<u8>); 2] {
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    [
        ("config.json", text(&config_json(shape))),
        ("tokenizer.json", text(&vocabulary::tokenizer_json(shape.vocabulary))),
    ]
}

/// The hyperparameters, as the folder's `config.json` says them.
pub(super) fn config(shape: &Shape) -> Config {
    let json = config_json(shape).to_string();
    let (config, _) = hf_config::from_hf(json.as_bytes(), None)
        .expect("a preset's config.json is that of a model that is read");
    config
}

fn config_json(shape: &Shape) -> Value {
    let mut map = Map::new();
    let mut add = |key: &str, value: Value| map.insert(key.to_owned(), value);
    let Shape { architecture, layers, head_dim, turned, .. } = *shape;
    add("model_type", json!(architecture.name()));
    add("dtype", json!("bfloat16"));
    add("hidden_act", json!("silu"));
    add("max_position_embeddings", json!(32_768));
    add("num_hidden_layers", json!(layers));
    add("hidden_size", json!(shape.hidden));
    add("num_attention_heads", json!(shape.heads));
    add("num_key_value_heads", json!(shape.kv_heads));
    add("intermediate_size", json!(shape.ffn));
    add("vocab_size", json!(shape.vocabulary));
    // The first of the vocabulary's marks; transformers' own defaults lie beyond so small a one.
    let end = shape.vocabulary - vocabulary::MARKS;
    add("bos_token_id", Value::Null);
    add("eos_token_id", json!(end));
    add("pad_token_id", json!(end));
    // Shortest decimal numbers, which name the same f32.
    let number = |value: f32| json!(value.to_string().parse::<f64>().unwrap_or_default());
    add("rms_norm_eps", number(shape.rms_norm_eps));
    add("tie_word_embeddings", json!(shape.tied));
    let mut rope = json!({ "rope_type": "default", "rope_theta": number(shape.theta) });
    match architecture {
        // Their heads have the width that is left, or two.
        Architecture::Phi3 => {}
        Architecture::DeepSeekV3 => {
            add("head_dim", json!(turned));
        }
        _ => {
            add("head_dim", json!(head_dim));
        }
    }
    match architecture {
        Architecture::Phi3 | Architecture::Qwen3Next => {
            let share = json!(turned as f64 / head_dim as f64);
            add("partial_rotary_factor", share.clone());
            rope["partial_rotary_factor"] = share;
        }
        Architecture::GptOss => {
            add("max_position_embeddings", json!(131_072));
            rope = json!({
                "rope_type": "yarn",
                "rope_theta": number(shape.theta),
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4096,
                "truncate": false,
            });
        }
        _ => {}
    }
    add("rope_parameters", rope);
    let types = |kind: fn(usize) -> &'static str| (0..layers).map(kind).collect::<Vec<_>>();
    match architecture {
        Architecture::GptOss => {
            let kind = |block: usize| match block % 2 {
                0 => "sliding_attention",
                _ => "full_attention",
            };
            add("layer_types", json!(types(kind)));
        }
        Architecture::Qwen3Next => {
            let kind = |block: usize| match block % 4 {
                3 => "full_attention",
                _ => "linear_attention",
            };
            add("layer_types", json!(types(kind)));
        }
        _ => {}
    }
    for (key, setting) in shape.settings {
        add(
            key,
            match *setting {
                Setting::Count(value) => json!(value),
                Setting::Width(value) => json!(value * shape.scale),
                Setting::Number(value) => number(value),
                Setting::Flag(value) => json!(value),
            },
        );
    }
    Value::Object(map)
}

/// All tensors, in the order of the file.
pub(super) fn tensors(shape: &Shape) -> Vec<Planned> {
    let config = config(shape);
    let blocks = (0..config.layers).flat_map(|layer| config.expected_in_block(layer));
    let expected = config.expected_globals().into_iter().chain(blocks);
    let expected = expected.filter(|tensor| tensor.required);
    let mut left: BTreeMap<String, [usize; 2]> =
        expected.map(|Expected { name, rows, width, .. }| (name, [rows, width])).collect();
    let table = Table::new(shape, config);
    let mut all = Vec::new();
    for name in names(&table.config) {
        let mixture = Mixture::of(&name, &table.config);
        let held = match &mixture {
            Some(mixture) => mixture.held(),
            None => safetensors::held(&name, &table.config),
        };
        if held.is_empty() || !held.iter().all(|part| left.contains_key(part)) {
            continue;
        }
        let sizes: Vec<[usize; 2]> = held.iter().filter_map(|part| left.remove(part)).collect();
        all.push(match mixture {
            Some(_) => of_all_experts(&table, name),
            None => {
                let rows = sizes.iter().map(|[rows, _]| rows).sum();
                let [_, width] = sizes[0];
                let (kind, depth) = (WeightType::BF16, 1);
                let (values, less_one) = table.values_of(&held[0], width);
                Planned { name, kind, depth, rows, width, values, less_one }
            }
        });
    }
    assert!(left.is_empty(), "no name holds {:?}", left.keys().next());
    all
}

/// What the tensors of such a model may be called.
fn names(config: &Config) -> Vec<String> {
    let mut names: Vec<String> = GLOBALS.map(str::to_owned).into();
    let experts = config.experts.as_ref().map_or(0, |experts| experts.count);
    for layer in 0..config.layers {
        for part in OF_BLOCK {
            let name = format!("model.layers.{layer}.{part}");
            if !part.contains('*') {
                names.push(name);
            } else if part.contains("shared_experts") {
                let projections = ["gate_proj", "up_proj", "down_proj"];
                names.extend(projections.map(|projection| name.replace('*', projection)));
            } else {
                names.extend((0..experts).map(|expert| name.replace('*', &expert.to_string())));
            }
        }
    }
    names
}

/// gpt-oss keeps all experts of a block in one tensor, its matrices transposed.
fn of_all_experts(table: &Table<'_>, name: String) -> Planned {
    let Config { hidden, experts, .. } = &table.config;
    let (count, ffn) = experts.as_ref().map_or((0, 0), |experts| (experts.count, experts.ffn));
    let of_rows =
        |deviation: f32, rows: Rows| Values::Matrix { deviation, columns: Columns::Even, rows };
    let unit = 1.0 / (*hidden as f32).sqrt();
    let (kind, less_one) = (WeightType::BF16, false);
    let (depth, rows, width, values) = match name.rsplit('.').next() {
        // Its rows are the channels that it reads.
        Some("gate_up_proj") => {
            (count, count * hidden, 2 * ffn, of_rows(1.25 * unit, Rows::Damped))
        }
        Some("down_proj") => {
            let deviation = ADDED / (1.5 * (ffn as f32).sqrt());
            (count, count * ffn, *hidden, of_rows(deviation, Rows::Even))
        }
        Some("gate_up_proj_bias") => (1, count, 2 * ffn, of_rows(0.1, Rows::Even)),
        _ => (1, count, *hidden, of_rows(0.2 * ADDED, Rows::Even)),
    };
    Planned { name, kind, depth, rows, width, values, less_one }
}

/// The header of the weights' file.
pub(super) fn header(tensors: &[Planned]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for Planned { name, kind, depth, rows, width, .. } in tensors {
        let end = start + rows * kind.row_bytes(*width);
        let shape = match (*depth, *rows) {
            _ if name.ends_with("conv1d.weight") => vec![*rows, 1, *width],
            _ if name.ends_with("shared_expert_gate.weight") => vec![1, *width],
            (1, 1) => vec![*width],
            (1, rows) => vec![rows, *width],
            (depth, rows) => vec![depth, rows / depth, *width],
        };
        let entry = json!({ "dtype": kind.name(), "shape": shape, "data_offsets": [start, end] });
        map.insert(name.clone(), entry);
        start = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    header
}
