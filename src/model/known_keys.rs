//! Every key that transformers and `gguf` know has an answer: it is used, known to change nothing,
//! or refused by its name.
//!
//! The lists are `tests/fixtures/config_keys.json`, which `scripts/config_keys.py` writes. It knows
//! no other keys than theirs.

use serde_json::{Map, Value, json};

use super::architecture::Architecture;
use super::config::{self, Config};
use super::error::Fault;
use super::gguf::Header;
use super::gguf_writer::HeaderWriter;
use super::hf_config;
use super::other_files;

fn lists() -> Value {
    let text = include_str!("../../tests/fixtures/config_keys.json");
    serde_json::from_str(text).expect("JSON")
}

fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().expect("an object")
}

fn names(value: &Value) -> Vec<&str> {
    value.as_array().expect("a list").iter().filter_map(Value::as_str).collect()
}

/// What a key may be set to: of every type, and another than what it is without a file.
fn values() -> [Value; 8] {
    let [list, map] = [json!(["nonsense"]), json!({ "nonsense": 1 })];
    [json!(7), json!(0.5), json!("nonsense"), json!(true), json!(false), list, map, json!([])]
}

/// Keys that are used where others ask for it, and with the values of the classes alone are not.
const BESIDE_OTHERS: [(&str, &str); 5] = [
    ("max_window_layers", "a window in later blocks, where `layer_types` names no blocks"),
    ("no_rope_layer_interval", "where `no_rope_layers` names no blocks"),
    ("original_max_position_embeddings", "a method that stretches RoPE"),
    ("sliding_window", "`use_sliding_window`"),
    ("use_sliding_window", "kinds of blocks that slide"),
];

/// What is silent: neither used, nor refused with its name or its value, nor known to change
/// nothing.
fn silent(
    key: &str,
    value: &str,
    read: Result<Config, Fault>,
    before: &Config,
    changes_nothing: bool,
) -> Option<String> {
    match read {
        Ok(config) if config != *before || changes_nothing => None,
        Ok(_) => Some(format!("`{key}` = {value} is let through")),
        Err(fault) => {
            let said = format!("{fault:?}");
            // By its name, by its value, or by what has to stand beside it.
            let value = if value.contains("nonsense") { "nonsense" } else { value };
            let told = [key, value, "is missing"].iter().any(|words| said.contains(words));
            (!told).then(|| format!("`{key}` = {value} is refused in words without it: {said}"))
        }
    }
}

#[test]
fn every_key_of_transformers_configs_has_an_answer() {
    let lists = lists();
    let (shared, generation) = (object(&lists["shared"]), names(&lists["generation"]));
    let mut found = Vec::new();
    for architecture in Architecture::ALL {
        let name = architecture.name();
        let own = object(&lists["configs"][name]);
        // What the class itself writes.
        let mut usual = own.clone();
        usual.retain(|_, value| !value.is_null());
        let read = |map: &Map<String, Value>| {
            let text = serde_json::to_vec(map).expect("JSON");
            hf_config::from_hf(&text, None).map(|(config, _)| config)
        };
        let before = read(&usual).unwrap_or_else(|fault| panic!("{name}: {fault:?}"));
        let keys = shared.keys().chain(own.keys()).map(String::as_str);
        for key in keys.chain(generation.iter().copied()) {
            let usual_value = usual.get(key).cloned();
            for value in values().into_iter().filter(|value| Some(value) != usual_value.as_ref()) {
                let mut changed = usual.clone();
                changed.insert(key.to_owned(), value.clone());
                let elsewhere = BESIDE_OTHERS.iter().any(|(other, _)| *other == key);
                let nothing = elsewhere || hf_config::changes_nothing(key, &value);
                let told = value.to_string();
                let silent = silent(key, &told, read(&changed), &before, nothing);
                found.extend(silent.map(|words| format!("{name}: {words}")));
            }
        }
    }
    assert!(found.is_empty(), "{} of them:\n{}", found.len(), found.join("\n"));
}

/// The `config.json` of a folder of the project.
macro_rules! of_folder {
    ($folder:literal) => {
        include_str!(concat!("../../tests/fixtures/", $folder, "/config.json"))
    };
}

/// Arguments of transformers' ways to quantise that change no weight: of how codes were found, of the
/// kernels that read them, of activations, and names of layers and forms of codes, which the
/// tensors tell.
const OF_NO_WEIGHT: &[&str] = &[
    "act_group_aware",
    "activation_scheme",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "cache_block_outputs",
    "damp_percent",
    "dataset",
    "desc_act",
    "global_compression_ratio",
    "ignore",
    "kv_cache_scheme",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "max_input_length",
    "meta",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
    "pad_token_id",
    "quantization_status",
    "sym",
    "tokenizer",
    "true_sequential",
];

#[test]
fn every_argument_of_a_way_to_quantise_has_an_answer() {
    let lists = lists();
    let mut found = Vec::new();
    for (way, text) in [
        ("fp8", of_folder!("fp8-folder")),
        ("compressed-tensors", of_folder!("quantised/packed-4-zeros")),
        ("gptq", of_folder!("quantised/gptq-3")),
        ("awq", of_folder!("quantised/awq")),
        ("bitsandbytes_4bit", of_folder!("quantised/nf4-nested")),
        ("bitsandbytes_8bit", of_folder!("quantised/int8-rows")),
        ("mxfp4", of_folder!("mxfp4/packed")),
    ] {
        let usual: Value = serde_json::from_str(text).expect("JSON");
        let read = |config: &Value| hf_config::from_hf(config.to_string().as_bytes(), None);
        let (_, before) = read(&usual).unwrap_or_else(|fault| panic!("{way}: {fault:?}"));
        let arguments = names(&lists["quantization"][way]);
        assert!(before.is_some() && !arguments.is_empty(), "{way}");
        for key in arguments {
            for value in values() {
                let mut changed = usual.clone();
                changed["quantization_config"][key] = value.clone();
                if changed == usual {
                    continue;
                }
                match read(&changed) {
                    Err(fault) => {
                        let said = format!("{fault:?}");
                        if !said.contains(key) && !said.contains("`nonsense`") {
                            found.push(format!("{way}: `{key}` = {value} is refused: {said}"));
                        }
                    }
                    Ok((_, after)) if after != before || OF_NO_WEIGHT.contains(&key) => {}
                    // What is off, and a form of the whole where each group names its own.
                    Ok(_) if key == "dequantize" && value == false => {}
                    Ok(_) if key == "format" && way == "compressed-tensors" => {}
                    Ok(_) => found.push(format!("{way}: `{key}` = {value} is let through")),
                }
            }
        }
    }
    assert!(found.is_empty(), "{} of them:\n{}", found.len(), found.join("\n"));
}

/// A value of a GGUF file's metadata.
#[derive(Clone, Copy, Debug)]
enum Written {
    Unsigned(u32),
    Float(f32),
    Bool(bool),
    Text(&'static str),
}

#[test]
fn every_key_of_gguf_has_an_answer() {
    let lists = lists();
    let mut found = Vec::new();
    for (gguf, _) in Architecture::of_gguf() {
        let name = gguf.name;
        // Of latent attention all heads have keys.
        let heads = if name == "deepseek2" { 2 } else { 1 };
        let read = |extra: Option<(&str, Written)>| -> Result<Config, Fault> {
            let mut writer = HeaderWriter::default();
            let mut put = |key: &str, value: Written| {
                if extra.is_some_and(|(other, _)| other == key) {
                    return;
                }
                write(&mut writer, key, value);
            };
            put("general.architecture", Written::Text(name));
            for (key, value) in [
                ("block_count", Written::Unsigned(2)),
                ("context_length", Written::Unsigned(64)),
                ("embedding_length", Written::Unsigned(8)),
                ("feed_forward_length", Written::Unsigned(12)),
                ("attention.head_count", Written::Unsigned(2)),
                ("attention.head_count_kv", Written::Unsigned(heads)),
                ("attention.layer_norm_rms_epsilon", Written::Float(1e-5)),
                ("attention.layer_norm_epsilon", Written::Float(1e-5)),
                ("logit_scale", Written::Float(2.0)),
                ("expert_count", Written::Unsigned(4)),
                ("expert_used_count", Written::Unsigned(2)),
                ("expert_feed_forward_length", Written::Unsigned(6)),
                ("expert_shared_feed_forward_length", Written::Unsigned(6)),
                ("expert_shared_count", Written::Unsigned(1)),
                ("attention.sliding_window", Written::Unsigned(8)),
                ("attention.kv_lora_rank", Written::Unsigned(6)),
                ("full_attention_interval", Written::Unsigned(2)),
                ("ssm.conv_kernel", Written::Unsigned(4)),
                ("ssm.group_count", Written::Unsigned(1)),
                ("ssm.inner_size", Written::Unsigned(8)),
                ("ssm.state_size", Written::Unsigned(4)),
                ("ssm.time_step_rank", Written::Unsigned(2)),
                ("attention.key_length", Written::Unsigned(4)),
                ("attention.value_length", Written::Unsigned(4)),
                ("rope.dimension_count", Written::Unsigned(2)),
            ] {
                let is_of = match key {
                    "expert_shared_feed_forward_length" => &["qwen2moe", "qwen3next"][..],
                    "full_attention_interval" => &["qwen3next"],
                    _ if key.starts_with("ssm.") => &["qwen3next"],
                    "expert_shared_count" => &["deepseek2"],
                    _ if key.starts_with("expert_") => {
                        &["qwen2moe", "qwen3moe", "gpt-oss", "deepseek2", "qwen3next"]
                    }
                    "attention.sliding_window" => &["gpt-oss"],
                    "attention.kv_lora_rank"
                    | "attention.key_length"
                    | "attention.value_length"
                    | "rope.dimension_count" => &["deepseek2"],
                    _ => &[],
                };
                if !is_of.is_empty() && !is_of.contains(&name) {
                    continue;
                }
                let of_norms = key.ends_with("epsilon");
                let takes_means = ["stablelm", "starcoder2"].contains(&name);
                let other_norm = of_norms && takes_means != key.ends_with("norm_epsilon");
                if !other_norm && (key != "logit_scale" || name == "granite") {
                    put(&format!("{name}.{key}"), value);
                }
            }
            if let Some((key, value)) = extra {
                write(&mut writer, key, value);
            }
            let file = writer.finish();
            let header = Header::parse(&file)?;
            other_files::refuse(&header, &file, ["token_embd.weight"].into_iter())?;
            let needs_output = ["olmo2", "stablelm", "qwen2moe", "gpt-oss"].contains(&name);
            config::from_gguf(&header, &file, 100, !needs_output, None)
        };
        let before = read(None).unwrap_or_else(|fault| panic!("{name}: {fault:?}"));
        for key in names(&lists["gguf"]) {
            let key = key.replace("{arch}", name).replace("{id}", "0");
            // `gguf_parts` reads them, before.
            if key.starts_with("split.") {
                continue;
            }
            let key = key.replace("{dense}", "dense_2").replace("{name}", "tool_use");
            for value in [
                Written::Unsigned(7),
                Written::Float(0.5),
                Written::Bool(true),
                Written::Bool(false),
                Written::Text("nonsense"),
            ] {
                // What is computed anyway.
                let usual = match value {
                    Written::Bool(true) => key.ends_with(".causal"),
                    Written::Bool(false) => key == "deepseek2.expert_weights_norm",
                    _ => false,
                };
                let nothing = usual || config::changes_nothing(&key);
                let told = match value {
                    Written::Unsigned(value) => value.to_string(),
                    Written::Float(value) => value.to_string(),
                    Written::Bool(value) => value.to_string(),
                    Written::Text(value) => value.to_owned(),
                };
                let silent = silent(&key, &told, read(Some((&key, value))), &before, nothing);
                found.extend(silent.map(|words| format!("{name}: {words}")));
            }
        }
    }
    assert!(found.is_empty(), "{} of them:\n{}", found.len(), found.join("\n"));
}

fn write(writer: &mut HeaderWriter, key: &str, value: Written) {
    match value {
        Written::Unsigned(value) => writer.unsigned(key, value),
        Written::Float(value) => writer.float(key, value),
        Written::Bool(value) => writer.bool(key, value),
        Written::Text(value) => writer.text(key, value),
    }
}
