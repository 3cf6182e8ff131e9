//! Hugging Face folders: they hold the model that a GGUF file of the same weights holds,
//! or are refused in words.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use proptest::prelude::*;
use runner::dtype::Format;
use runner::model::{Model, ModelError, RopeLayout};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::model::{TINY, draft, open, synthetic_file};

/// The Hugging Face name of a canonical one.
fn hf_name(name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        "output.weight" => return "lm_head.weight".to_owned(),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.").unwrap().split_once('.').unwrap();
    let (stem, suffix) = part.rsplit_once('.').unwrap();
    let stem = match stem {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        other => panic!("{other}"),
    };
    format!("model.layers.{layer}.{stem}.{suffix}")
}

/// Every tensor of a model as F32 under its Hugging Face name.
fn hf_tensors(model: &Model) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let tensor = |name: &str| {
        let weight = model.tensor(name).unwrap();
        let bytes = weight.to_vec().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
        let vector = name.contains("norm") || name.ends_with("bias");
        let shape = if vector { vec![weight.width()] } else { vec![weight.rows(), weight.width()] };
        (hf_name(name), (shape, bytes))
    };
    model.names().map(tensor).collect()
}

fn write_safetensors(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<u8>)>) {
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn hf_config(model: &Model) -> serde_json::Value {
    let config = model.config();
    json!({
        "model_type": config.architecture.name(),
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": f64::from(config.rms_norm_eps),
        "rope_theta": config.rope.theta,
        "rope_scaling": null,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    })
}

pub fn write_folder(model: &Model, folder: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut config = hf_config(model);
    change(&mut config);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    write_safetensors(&folder.join("model.safetensors"), &hf_tensors(model));
}

fn assert_same_tensors(one: &Model, other: &Model) {
    assert!(one.names().eq(other.names()));
    for name in one.names() {
        let (one, other) = (one.tensor(name).unwrap(), other.tensor(name).unwrap());
        assert_eq!((one.rows(), one.width()), (other.rows(), other.width()), "{name}");
        assert!(one.to_vec().unwrap() == other.to_vec().unwrap(), "{name}");
    }
}

#[test]
fn a_hugging_face_folder_equals_the_gguf_of_the_same_weights() {
    for preset in TINY {
        let gguf = open(&synthetic_file(preset)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write_folder(&gguf, folder.path(), |_| {});
        let hf = Model::open(folder.path()).unwrap();
        let mut config = gguf.config().clone();
        // Hugging Face keeps llama's heads unpermuted, and its factors in the config.
        config.rope.layout = RopeLayout::Halves;
        config.rope.factors = None;
        // A folder's config says which biases there are.
        config.biases = hf.config().biases;
        assert_eq!(hf.config(), &config, "{preset}");
        assert_same_tensors(&gguf, &hf);
    }
}

/// A folder whose tensors are spread over two files by layer.
fn write_shards(model: &Model, folder: &Path) -> BTreeMap<String, String> {
    fs::write(folder.join("config.json"), hf_config(model).to_string()).unwrap();
    let (odd, even): (BTreeMap<_, _>, BTreeMap<_, _>) =
        hf_tensors(model).into_iter().partition(|(name, _)| name.contains("mlp"));
    let mut index = BTreeMap::new();
    for (file, tensors) in [("a.safetensors", odd), ("b.safetensors", even)] {
        write_safetensors(&folder.join(file), &tensors);
        index.extend(tensors.into_keys().map(|name| (name, file.to_owned())));
    }
    write_index(folder, &index);
    index
}

fn write_index(folder: &Path, index: &BTreeMap<String, String>) {
    let json = json!({ "metadata": { "total_size": 1 }, "weight_map": index });
    fs::write(folder.join("model.safetensors.index.json"), json.to_string()).unwrap();
}

#[test]
fn shards_are_joined_and_may_not_leave_the_folder() {
    let gguf = open(&draft("llama").write()).unwrap();
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    fs::create_dir(&folder).unwrap();
    let index = write_shards(&gguf, &folder);
    assert_same_tensors(&gguf, &Model::open(&folder).unwrap());

    fs::copy(folder.join("a.safetensors"), outer.path().join("a.safetensors")).unwrap();
    let absolute = outer.path().join("a.safetensors").display().to_string();
    std::os::unix::fs::symlink("../a.safetensors", folder.join("link.safetensors")).unwrap();
    for path in ["../a.safetensors", &absolute, "link.safetensors", ".", "..", ""] {
        let moved = index.iter().map(|(name, file)| {
            (name.clone(), if file == "a.safetensors" { path.to_owned() } else { file.clone() })
        });
        write_index(&folder, &moved.collect());
        let error = Model::open(&folder).unwrap_err().to_string();
        assert!(error.contains("outside the folder"), "{path}: {error}");
    }

    let mut missing = index.clone();
    missing.insert("model.layers.0.self_attn.q_proj.bias".into(), "a.safetensors".into());
    write_index(&folder, &missing);
    let error = Model::open(&folder).unwrap_err().to_string();
    assert!(
        error.contains("`model.layers.0.self_attn.q_proj.bias`: the index places it"),
        "{error}"
    );
    let mut hidden = index.clone();
    hidden.remove("model.layers.0.mlp.up_proj.weight");
    write_index(&folder, &hidden);
    let error = Model::open(&folder).unwrap_err().to_string();
    assert!(
        error.contains("`model.layers.0.mlp.up_proj.weight`: the index does not place it"),
        "{error}"
    );
}

#[test]
fn the_cache_of_the_hub_is_read_through_its_links() {
    let gguf = open(&draft("llama").write()).unwrap();
    let hub = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (hub.path().join("blobs"), hub.path().join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    write_folder(&gguf, &snapshot, |_| {});
    fs::rename(snapshot.join("model.safetensors"), blobs.join("5f3a")).unwrap();
    std::os::unix::fs::symlink("../../blobs/5f3a", snapshot.join("model.safetensors")).unwrap();
    assert_same_tensors(&gguf, &Model::open(&snapshot).unwrap());
}

#[test]
fn a_folders_tensor_names_are_parsed_and_not_searched() {
    let gguf = open(&draft("llama").write()).unwrap();
    for (name, wrong) in [
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.00.self_attn.q_proj.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.10.self_attn.q_proj.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "x.model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight.x"),
        ("model.norm.weight", "model.norm.weight2"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        write_folder(&gguf, folder.path(), |_| {});
        let mut tensors = hf_tensors(&gguf);
        let tensor = tensors.remove(name).unwrap();
        tensors.insert(wrong.to_owned(), tensor);
        write_safetensors(&folder.path().join("model.safetensors"), &tensors);
        Model::open(folder.path()).expect_err(wrong);
    }
}

#[test]
fn half_precision_folders_decode_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = open(&draft("llama").write()).unwrap();
    write_folder(&gguf, folder.path(), |_| {});
    // The draft's values are small integers, which both formats hold exactly.
    let half: Vec<(String, Vec<usize>, Vec<u8>, Dtype)> = hf_tensors(&gguf)
        .into_iter()
        .enumerate()
        .map(|(n, (name, (shape, bytes)))| {
            let values = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            if n % 2 == 0 {
                let bytes = values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect();
                (name, shape, bytes, Dtype::BF16)
            } else {
                let bytes = values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect();
                (name, shape, bytes, Dtype::F16)
            }
        })
        .collect();
    let views = half.iter().map(|(name, shape, bytes, dtype)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let path = folder.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    assert_same_tensors(&gguf, &Model::open(folder.path()).unwrap());
}

fn folder_with(change: impl FnOnce(&mut serde_json::Value)) -> Result<Model, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    write_folder(&open(&draft("llama").write()).unwrap(), folder.path(), change);
    Model::open(folder.path())
}

#[test]
fn rope_scaling_follows_transformers() {
    let scaling = json!({
        "rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    });
    // Shapes that give heads of 128, as in Llama 3.1.
    let wide = draft("llama")
        .with("llama.attention.key_length", Value::U32(128))
        .tensor("blk.0.attn_q.weight", &[256, 8])
        .tensor("blk.0.attn_k.weight", &[128, 8])
        .tensor("blk.0.attn_v.weight", &[128, 8])
        .tensor("blk.0.attn_output.weight", &[8, 256]);
    let folder = tempfile::tempdir().unwrap();
    write_folder(&open(&wide.write()).unwrap(), folder.path(), |config| {
        config["rope_scaling"] = scaling;
        config["rope_theta"] = json!(500_000.0);
    });
    let model = Model::open(folder.path()).unwrap();
    let factors = model.config().rope.factors.clone().unwrap();
    assert_eq!(factors.len(), 64);
    // `_compute_llama3_parameters` of transformers, in double.
    let known = [(0, 1.0), (28, 1.0), (29, 1.207484), (31, 2.026313), (34, 5.257327), (35, 8.0)];
    for (pair, expected) in known {
        assert!((factors[pair] - expected).abs() < 2e-6, "{pair}: {}", factors[pair]);
    }

    let linear = folder_with(|c| c["rope_scaling"] = json!({ "type": "linear", "factor": 2.0 }));
    assert_eq!(linear.unwrap().config().rope.linear_scale, 2.0);
    let newer = folder_with(|c| {
        c["rope_theta"] = json!(null);
        c["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 7e4 });
    });
    assert_eq!(newer.unwrap().config().rope.theta, 7e4);
}

#[test]
fn a_folders_config_is_refused_where_it_would_be_computed_wrongly() {
    type Change = fn(&mut serde_json::Value);
    let cases: [(Change, &str); 28] = [
        (|c| c["model_type"] = json!("mamba2"), "`mamba2`"),
        (|c| c["rope_scaling"] = json!({ "rope_type": "ntk", "factor": 4.0 }), "`ntk`"),
        (|c| c["rope_scaling"] = json!({ "type": "linear" }), "rope_scaling.factor"),
        (
            |c| c["rope_parameters"] = json!({ "full_attention": {} }),
            "`rope_parameters.full_attention`",
        ),
        (|c| c["rope_parameters"] = json!({ "rope_theta": 5e5 }), "10000, and the one"),
        (
            |c| {
                c["rope_scaling"] = json!({ "type": "linear", "factor": 2.0 });
                c["rope_parameters"] = json!({ "rope_type": "linear", "factor": 4.0 });
            },
            "disagree",
        ),
        (|c| c["rope_scaling"] = json!({ "type": "linear", "factor": 2.0, "ramp": 1 }), "ramp"),
        (|c| c["rope_scaling"] = json!({ "rope_type": "linear", "type": "yarn" }), "`yarn`"),
        (|c| c["partial_rotary_factor"] = json!(0.5), "turns 0.5 of each head"),
        (|c| c["partial_rotary_factor"] = json!(1.5), "1.5"),
        (|c| c["rope_parameters"] = json!({ "partial_rotary_factor": 0.5 }), "turns 0.5"),
        (|c| c["hidden_act"] = json!("gelu"), "`gelu`"),
        (|c| c["layer_types"] = json!(["sliding_attention"]), "sliding_attention"),
        (|c| c["layer_types"] = json!(["chunked_attention"]), "chunked_attention"),
        (|c| c["layer_types"] = json!(["full_attention"]), ""),
        (|c| c["layer_types"] = json!(vec!["full_attention"; 3]), "`layer_types` names 3 blocks"),
        (|c| c["quantization_config"] = json!({ "quant_method": "hqq" }), "quantised by `hqq`"),
        (
            |c| c["attention_bias"] = json!(true),
            "`model.layers.0.self_attn.q_proj.bias`: it is missing",
        ),
        (|c| c["mlp_bias"] = json!("yes"), "true or false"),
        (|c| c["num_experts"] = json!(8), "`num_experts` = 8"),
        (|c| c["is_decoder"] = json!(true), "`is_decoder` = true"),
        (|c| c["rope_interleaved"] = json!(true), "`rope_interleaved` = true"),
        (|c| c["residual_multiplier"] = json!(0.22), "`residual_multiplier` = 0.22"),
        (|c| c["vocab_size"] = json!(null), "vocab_size"),
        (|c| c["num_attention_heads"] = json!(-1), "config.json"),
        (|c| c["hidden_size"] = json!("8"), "config.json"),
        (|c| c["rms_norm_eps"] = json!(0), "epsilon"),
        (
            |c| c["tie_word_embeddings"] = json!(false),
            "`lm_head.weight`: it is missing, and `tie_word_embeddings` is false",
        ),
    ];
    for (change, expected) in cases {
        let error = folder_with(change);
        if expected.is_empty() {
            error.expect("blocks that all see everything need no list");
            continue;
        }
        let error = error.unwrap_err().to_string();
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
    }
}

#[test]
fn hostile_safetensors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(&open(&draft("llama").write()).unwrap(), folder.path(), |_| {});
    let path = folder.path().join("model.safetensors");
    let refusal = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Model::open(folder.path()).unwrap_err().to_string()
    };
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    assert!(refusal(b"").contains("shorter"));
    assert!(refusal(&[0xff; 16]).contains("does not fit"));
    assert!(refusal(&file("[]", 0)).contains("header"));
    let one = r#""model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    assert!(refusal(&file(&format!("{{{one}}}"), 4)).contains("need 8 bytes, but 4"));
    assert!(refusal(&file(&format!("{{{one},{one}}}"), 8)).contains("occurs twice"));
    let int = one.replace("F32", "I32");
    assert!(refusal(&file(&format!("{{{int}}}"), 8)).contains("its type is I32"));
    // Eight tensors whose sizes add up to just below 2^64.
    let huge: Vec<String> = (0..8_u64)
        .map(|n| {
            let size = (1_u64 << 61) - 1;
            let place = [n * size, (n + 1) * size];
            format!(r#""t{n}":{{"dtype":"U8","shape":[{size}],"data_offsets":{place:?}}}"#)
        })
        .collect();
    assert!(refusal(&file(&format!("{{{}}}", huge.join(",")), 0)).contains("need"));
    let overflow = one.replace("[2]", "[9223372036854775807,9223372036854775807]");
    assert!(refusal(&file(&format!("{{{overflow}}}"), 8)).contains("header"));
}

/// A model with this `tokenizer.json`, which lies in the folder.
pub fn with_tokenizer(json: &serde_json::Value) -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    write_folder(&open(&draft("llama").write()).unwrap(), folder.path(), |_| {});
    fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let model = Model::open(folder.path()).unwrap();
    (folder, model)
}

#[test]
fn a_folders_tokenizer_is_its_tokenizer_json() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(&open(&draft("llama").write()).unwrap(), folder.path(), |_| {});
    let model = Model::open(folder.path()).unwrap();
    let error = model.encode("x").unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("`--tokens`"), "{error}");
    let write = |change: &dyn Fn(&mut serde_json::Value)| {
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        let mut json = json!({
            "version": "1.0",
            "truncation": { "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0 },
            "padding": null,
            "added_tokens": [{
                "id": 4, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }],
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": null,
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": false,
                "vocab": { "a": 0, "b": 1, "ab": 2, "\u{120}": 3, "<s>": 4 },
                "merges": [["a", "b"]],
            },
        });
        change(&mut json);
        fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        Model::open(folder.path()).unwrap()
    };
    assert_eq!(write(&|_| {}).encode("<s>aab b").unwrap(), [4, 0, 2, 3, 1]);
    assert_eq!(write(&|j| j["model"]["merges"] = json!(["a b"])).encode("ab").unwrap(), [2]);
    assert_eq!(write(&|_| {}).decode(&[4, 0, 2, 3, 1]).unwrap(), "<s>aab b");
    type Change = fn(&mut serde_json::Value);
    let refused: [Change; 6] = [
        |j| j["model"]["merges"] = json!([["a", "zzzzzz"]]),
        |j| j["model"]["merges"] = json!([["b", "a"]]),
        |j| j["model"]["continuing_subword_prefix"] = json!("##"),
        |j| j["model"]["vocab"]["b"] = json!(0),
        |j| j["model"]["type"] = json!("WordLevel"),
        |j| j["model"] = json!(3),
    ];
    // Malformed where only the library looks, which the library answers with a panic.
    let model = write(&|_| {});
    let path = folder.path().join("tokenizer.json");
    let json = fs::read_to_string(&path).unwrap();
    let decoder = json.find(r#""decoder":{"#).unwrap() + 11;
    fs::write(&path, format!(r#"{}"x":1e999,{}"#, &json[..decoder], &json[decoder..])).unwrap();
    assert!(model.encode("ab").unwrap_err().to_string().contains("`--tokens`"));
    for change in refused {
        let error = write(&change).encode("ab").unwrap_err().to_string();
        assert!(error.contains("`--tokens`"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// Whatever a few bytes of its safetensors header or its config become, a folder is
    /// refused or usable.
    #[test]
    fn a_damaged_folder_is_refused_or_harmless(
        changes in prop::collection::vec((0_usize..1 << 20, any::<u8>()), 1..6),
        in_config in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        write_folder(&open(&draft("llama").write()).unwrap(), folder.path(), |_| {});
        let name = if in_config { "config.json" } else { "model.safetensors" };
        let path = folder.path().join(name);
        let mut file = fs::read(&path).unwrap();
        let header = if in_config { file.len() } else { 1200 };
        for (at, byte) in changes {
            file[at % header] = byte;
        }
        fs::write(&path, file).unwrap();
        if let Ok(model) = Model::open(folder.path()) {
            for name in model.names() {
                model.tensor(name).unwrap().to_vec().unwrap();
            }
        }
    }
}

#[test]
fn settings_that_change_nothing_are_read_past() {
    for change in [
        (|c| c["use_cache"] = json!(true)) as fn(&mut serde_json::Value),
        |c| c["attention_bias"] = json!(false),
        |c| c["_name_or_path"] = json!("a/b"),
        |c| c["is_encoder_decoder"] = json!(false),
        |c| c["num_experts"] = json!(null),
        |c| c["hidden_act"] = json!("swish"),
        |c| c["partial_rotary_factor"] = json!(1.0),
        |c| c["rope_scaling"] = json!({ "type": "dynamic", "factor": 2.0 }),
        // As SmolLM2's and Phi 4's files have them.
        |c| {
            c["is_llama_config"] = json!(true);
            c["rope_interleaved"] = json!(false);
            c["full_attn_mod"] = json!(1);
            c["lm_head_bias"] = json!(false);
            c["max_sequence_length"] = json!(2048);
        },
        // Of early Llama files.
        |c| {
            c["max_position_embeddings"] = json!(null);
            c["rms_norm_eps"] = json!(null);
        },
    ] {
        folder_with(change).expect("it changes nothing");
    }
}

#[test]
fn a_window_is_used_where_transformers_uses_it() {
    type Change = fn(&mut serde_json::Value);
    let preset = TINY.into_iter().find(|preset| preset.name() == "qwen2-tiny").expect("a preset");
    let gguf = open(&synthetic_file(preset)).unwrap();
    let qwen2 = |change: Change| {
        let folder = tempfile::tempdir().unwrap();
        write_folder(&gguf, folder.path(), |config| {
            config["sliding_window"] = json!(4);
            change(config);
        });
        Model::open(folder.path()).expect("a model")
    };
    // Named, and not used.
    assert_eq!(qwen2(|_| {}).config().window_of(0), None);
    let used: Change = |c| c["use_sliding_window"] = json!(true);
    // By default from block 28 on.
    assert_eq!(qwen2(used).config().window_of(0), None);
    let from_1 = qwen2(|c| {
        c["use_sliding_window"] = json!(true);
        c["max_window_layers"] = json!(1);
    });
    assert_eq!([0, 1].map(|block| from_1.config().window_of(block)), [None, Some(4)]);
    let mistral = folder_with(|c| {
        c["model_type"] = json!("mistral");
        c["sliding_window"] = json!(4);
    });
    assert_eq!(mistral.unwrap().config().window_of(0), Some(4));
    // Where the key is absent, the class's own.
    let mistral = folder_with(|c| c["model_type"] = json!("mistral"));
    assert_eq!(mistral.unwrap().config().window_of(0), Some(4096));
    let mistral = folder_with(|c| {
        c["model_type"] = json!("mistral");
        c["sliding_window"] = json!(null);
    });
    assert_eq!(mistral.unwrap().config().window_of(0), None);
    // Llama's class reads none: a file that has one means something else.
    let llama = folder_with(|c| {
        c["sliding_window"] = json!(4);
    });
    assert!(llama.unwrap_err().to_string().contains("slides over 4"));
}

#[test]
fn a_key_that_is_written_twice_is_refused_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = open(&draft("llama").write()).unwrap();
    write_shards(&gguf, folder.path());
    let opened = |file: &str, from: &str, to: &str| {
        let path = folder.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = Model::open(folder.path()).unwrap_err().to_string();
        fs::write(&path, text).unwrap();
        error
    };
    let error = opened("config.json", "{", "{\"rope_theta\": 5e5, \"rope_theta\": 1e4, ");
    assert!(error.contains("config.json: the key `rope_theta` occurs twice"), "{error}");
    let error = opened("config.json", "{", "{\"rope_scaling\": {\"factor\": 2, \"factor\": 4}, ");
    assert!(error.contains("the key `factor` occurs twice"), "{error}");
    let (name, index) = ("model.norm.weight", "model.safetensors.index.json");
    let twice = format!("\"weight_map\":{{\"{name}\":\"a.safetensors\",");
    let error = opened(index, "\"weight_map\":{", &twice);
    assert!(error.contains(index) && error.contains(&format!("`{name}` occurs twice")), "{error}");
}

#[test]
fn a_file_or_a_key_that_is_missing_is_told_with_who_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let said = || Model::open(folder.path()).unwrap_err().to_string();
    assert!(said().contains("the folder has no config.json"), "{}", said());
    write_shards(&open(&draft("llama").write()).unwrap(), folder.path());
    fs::remove_file(folder.path().join("a.safetensors")).unwrap();
    let error = said();
    assert!(error.contains("model.safetensors.index.json` is not a sound model"), "{error}");
    assert!(
        error.contains("it places 3 tensors in `a.safetensors`, `model.layers.0.mlp"),
        "{error}"
    );
    let error = folder_with(|c| c["hidden_size"] = json!(null)).unwrap_err().to_string();
    assert!(error.contains("config.json: the key `hidden_size` is missing"), "{error}");
}

#[test]
fn a_bias_that_transformers_drops_is_refused_by_its_key() {
    let qwen = draft("qwen3").tensor("blk.0.attn_q_norm.weight", &[4]);
    let qwen = open(&qwen.tensor("blk.0.attn_k_norm.weight", &[4]).write()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_folder(&qwen, folder.path(), |config| config["mlp_bias"] = json!(true));
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("its `mlp_bias` is true") && error.contains("qwen3"), "{error}");
}

#[test]
fn two_models_in_one_folder_are_refused() {
    let gguf = open(&draft("llama").write()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_shards(&gguf, folder.path());
    write_safetensors(&folder.path().join("model.safetensors"), &hf_tensors(&gguf));
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("two models"), "{error}");
}

#[test]
fn an_embedding_models_names_are_read_and_other_prefixes_say_whose_they_are() {
    let gguf = open(&draft("llama").write()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_folder(&gguf, folder.path(), |_| {});
    let path = folder.path().join("model.safetensors");
    let renamed = |rename: &dyn Fn(&str) -> String| {
        let tensors = hf_tensors(&gguf).into_iter();
        let tensors = tensors.map(|(name, tensor)| (rename(&name), tensor)).collect();
        write_safetensors(&path, &tensors);
        Model::open(folder.path())
    };
    let bare = renamed(&|name| name.trim_start_matches("model.").to_owned());
    assert_same_tensors(&gguf, &bare.expect("transformers finds them"));
    let refused = |prefix: &str, expected: &str| {
        let error = renamed(&|name| format!("{prefix}{name}")).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(prefix), "{expected}: {error}");
    };
    refused("language_model.", "reads images or sound");
    refused("base_model.model.", "an adapter of peft");
    refused("model.", "`model.` twice");
    let mut tensors = hf_tensors(&gguf);
    tensors.insert("score.weight".to_owned(), (vec![2, 8], vec![0; 64]));
    write_safetensors(&path, &tensors);
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`score.weight`: it is the head of a classifier"), "{error}");
}

#[test]
fn an_output_matrix_that_is_not_the_tied_embedding_is_refused() {
    let gguf = open(&draft("llama").write()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_folder(&gguf, folder.path(), |c| c["tie_word_embeddings"] = json!(true));
    let mut tensors = hf_tensors(&gguf);
    let embedding = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".to_owned(), embedding.clone());
    let path = folder.path().join("model.safetensors");
    write_safetensors(&path, &tensors);
    assert!(!Model::open(folder.path()).expect("a saved copy").has("output.weight"));
    let (shape, mut bytes) = embedding;
    bytes[0] ^= 1;
    tensors.insert("lm_head.weight".to_owned(), (shape, bytes));
    write_safetensors(&path, &tensors);
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`lm_head.weight`: `tie_word_embeddings` is true"), "{error}");
    // The same matrix in another type.
    let halves = |bytes: &[u8]| {
        let values = bytes.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v));
        values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>()
    };
    let half = halves(&tensors["model.embed_tokens.weight"].1);
    let views = tensors.iter().map(|(name, (shape, bytes))| match name.as_str() {
        "lm_head.weight" => (name, TensorView::new(Dtype::F16, shape.clone(), &half).unwrap()),
        _ => (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()),
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
    assert!(!Model::open(folder.path()).expect("the same values").has("output.weight"));
}

/// What a quantised checkpoint holds of a matrix, and the matrix that it is.
struct Quantised {
    codes: (Dtype, Vec<u8>),
    scales: (Vec<usize>, Vec<u8>),
    values: Vec<f32>,
}

/// A block of the scales' grid: so many rows of so many values; nothing is all of the matrix.
type Grid = Option<[usize; 2]>;

/// Quantises a matrix as packages do: the largest value of a block becomes the largest code.
fn quantised(values: &[f32], width: usize, dtype: Dtype, grid: Grid) -> Quantised {
    let rows = values.len() / width;
    let [tall, wide] = grid.unwrap_or([rows, width]);
    let shape = vec![rows.div_ceil(tall), width.div_ceil(wide)];
    let largest = match dtype {
        Dtype::F8_E4M3 => 448.0,
        Dtype::F8_E5M2 => 57344.0,
        _ => 127.0,
    };
    let place = |at: usize| (at / width / tall) * shape[1] + at % width / wide;
    let mut most = vec![0f32; shape[0] * shape[1]];
    for (at, value) in values.iter().enumerate() {
        most[place(at)] = most[place(at)].max(value.abs());
    }
    let scales: Vec<f32> = most.iter().map(|most| (most / largest).max(1e-12)).collect();
    let mut codes = Vec::new();
    let mut decoded = Vec::new();
    for (at, value) in values.iter().enumerate() {
        let scale = scales[place(at)];
        let scaled = value / scale;
        let (code, back) = match dtype {
            Dtype::I8 => {
                let code = scaled.round().clamp(-127.0, 127.0) as i8;
                (code as u8, f32::from(code))
            }
            _ => {
                let format = if dtype == Dtype::F8_E4M3 { Format::E4m3 } else { Format::E5m2 };
                let code = format.encode(scaled) as u8;
                (code, format.decode(code.into()))
            }
        };
        codes.push(code);
        decoded.push(back * scale);
    }
    let scales = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    Quantised { codes: (dtype, codes), scales: (shape, scales), values: decoded }
}

type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn write_stored(folder: &Path, config: &serde_json::Value, tensors: &Stored) {
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// A checkpoint of codes and scales, and the same model with the values in F32.
fn two_forms(
    config: &serde_json::Value,
    scale: &str,
    dtype: Dtype,
    grid: Grid,
) -> [tempfile::TempDir; 2] {
    let model = open(&synthetic_file(TINY[0])).unwrap();
    let (mut plain, mut coded) = (Stored::new(), Stored::new());
    for (name, (shape, bytes)) in hf_tensors(&model) {
        let stored = (Dtype::F32, shape.clone(), bytes.clone());
        if !name.contains("proj.weight") {
            plain.insert(name.clone(), stored.clone());
            coded.insert(name, stored);
            continue;
        }
        let values: Vec<f32> =
            bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let Quantised { codes, scales, values } = quantised(&values, shape[1], dtype, grid);
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        plain.insert(name.clone(), (Dtype::F32, shape.clone(), bytes));
        coded.insert(format!("{name}{scale}"), (Dtype::F32, scales.0, scales.1));
        coded.insert(name, (codes.0, shape, codes.1));
    }
    let [one, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let mut whole = hf_config(&model);
    write_stored(one.path(), &whole, &plain);
    whole["quantization_config"] = config.clone();
    write_stored(other.path(), &whole, &coded);
    [one, other]
}

fn compressed(weights: serde_json::Value) -> serde_json::Value {
    json!({ "quant_method": "compressed-tensors", "format": "naive-quantized",
        "config_groups": { "group_0": { "targets": ["Linear"], "weights": weights } } })
}

/// Every form that is read: its config, the ending of its scales, its codes, its grid.
fn forms() -> Vec<(serde_json::Value, &'static str, Dtype, Grid)> {
    let (e4m3, e5m2, int) = (Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::I8);
    let fp8 = |more: serde_json::Value| {
        let mut config = json!({ "quant_method": "fp8", "activation_scheme": "dynamic" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let width = open(&synthetic_file(TINY[0])).unwrap().config().hidden;
    vec![
        (fp8(json!({ "weight_block_size": [128, 128] })), "_scale_inv", e4m3, Some([128, 128])),
        // Neither side divides the matrices.
        (fp8(json!({ "weight_block_size": [100, 96] })), "_scale_inv", e4m3, Some([100, 96])),
        (fp8(json!({ "fmt": "e5m2", "weight_block_size": null })), "_scale_inv", e5m2, None),
        (
            compressed(json!({ "num_bits": 8, "type": "float", "strategy": "tensor" })),
            "_scale",
            e4m3,
            None,
        ),
        (
            compressed(json!({ "num_bits": 8, "type": "float", "strategy": "block",
            "block_structure": "128x128" })),
            "_scale",
            e4m3,
            Some([128, 128]),
        ),
        (
            compressed(json!({ "num_bits": 8, "type": "int", "strategy": "group",
            "group_size": width / 2 })),
            "_scale",
            int,
            Some([1, width / 2]),
        ),
    ]
}

#[test]
fn a_quantised_checkpoint_is_the_model_of_its_decoded_weights() {
    for (config, scale, dtype, grid) in forms() {
        let [plain, coded] = two_forms(&config, scale, dtype, grid);
        let (plain, coded) =
            (Model::open(plain.path()).unwrap(), Model::open(coded.path()).unwrap());
        assert_eq!(plain.config(), coded.config(), "{config}");
        assert_same_tensors(&plain, &coded);
        let name = "blk.0.ffn_down.weight";
        let weight = coded.tensor(name).unwrap();
        assert!(weight.is_scaled() && weight.kind().name() != "F32", "{config}");
        assert_ne!(weight.digest(), plain.tensor(name).unwrap().digest());
        // Rows that do not begin at a block.
        let mut rows = vec![0.0; 3 * weight.width()];
        weight.decode_rows(5..8, &mut rows).unwrap();
        assert_eq!(rows, weight.to_vec().unwrap()[5 * weight.width()..8 * weight.width()]);
    }
}

#[test]
fn one_scale_for_each_row_is_told_from_blocks_by_the_config_alone() {
    // As many blocks as rows would have scales: only the config can tell.
    let config = compressed(json!({ "num_bits": 8, "type": "float", "strategy": "channel" }));
    let width = open(&synthetic_file(TINY[0])).unwrap().config().hidden;
    let refused = two_forms(&config, "_scale", Dtype::F8_E4M3, Some([2, width]));
    let said = Model::open(refused[1].path()).unwrap_err().to_string();
    assert!(said.contains("its scales are [") && said.contains("one for each 1 rows of"), "{said}");
}

#[test]
fn codes_and_scales_that_do_not_belong_together_are_named() {
    let fp8 = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
    type Change = fn(&mut Stored);
    let cases: [(&str, Change); 6] = [
        ("there are codes of it, and no scales", |all| {
            all.remove("model.layers.0.mlp.up_proj.weight_scale_inv").unwrap();
        }),
        ("there are scales of it, and it is F32, no codes", |all| {
            let scales = all["model.layers.0.mlp.up_proj.weight_scale_inv"].clone();
            all.insert("model.embed_tokens.weight_scale_inv".to_owned(), scales);
        }),
        ("that `quantization_config` does not name", |all| {
            let scales = all["model.layers.0.mlp.up_proj.weight_scale_inv"].clone();
            all.insert("model.layers.0.mlp.left_proj.weight_scale_inv".to_owned(), scales);
        }),
        ("the scale of its block at row 0, value 0 is NaN, no positive number", |all| {
            let scales = all.get_mut("model.layers.0.mlp.up_proj.weight_scale_inv").unwrap();
            scales.2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }),
        ("the scale of its block at row 0, value 128 is 0, no positive number", |all| {
            let scales = all.get_mut("model.layers.0.mlp.up_proj.weight_scale_inv").unwrap();
            scales.2[4..8].copy_from_slice(&0f32.to_le_bytes());
        }),
        ("`quantization_config` says nothing of such codes", |all| {
            all.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().0 = Dtype::I8;
        }),
    ];
    for (words, change) in cases {
        let [_, coded] = two_forms(&fp8, "_scale_inv", Dtype::F8_E4M3, Some([128, 128]));
        let file = fs::read(coded.path().join("model.safetensors")).unwrap();
        let held = safetensors::SafeTensors::deserialize(&file).unwrap();
        let stored = |(name, view): (String, TensorView<'_>)| {
            (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let mut tensors: Stored = held.tensors().into_iter().map(stored).collect();
        change(&mut tensors);
        let config = fs::read(coded.path().join("config.json")).unwrap();
        write_stored(coded.path(), &serde_json::from_slice(&config).unwrap(), &tensors);
        let said = Model::open(coded.path()).unwrap_err().to_string();
        assert!(said.contains(words), "{words}: {said}");
        assert!(
            said.contains("model.") || said.contains("blk.0") || said.contains("token_embd"),
            "{said}"
        );
    }
}

#[test]
fn a_quantised_checkpoint_runs_on_the_computed_arms_and_an_engine_says_that_it_is_not_known() {
    let fp8 = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
    let forms = two_forms(&fp8, "_scale_inv", Dtype::F8_E4M3, Some([128, 128]));
    let [plain, coded] = forms.each_ref().map(|folder| folder.path().display().to_string());
    let project = crate::single::project().file(
        "stages/s.toml",
        "id = \"S\"\ntitle = \"t\"\ncontract = \"qkv-matmul\"\n[matmul]\n\
         input = { generate = \"normal\", rows = 4 }\nweights = [\"blk.0.attn_q\"]\n",
    );
    let digests = |model: &str| {
        project.runner(&["run", "stages", "--model", model]).expect(0, "pass");
        let out = project.path("t.safetensors").display().to_string();
        ["reference", "emulated"].map(|arm| {
            project.runner(&["export", "latest", "S", arm, &out]).expect(0, "");
            fs::read(&out).unwrap()
        })
    };
    assert!(digests(&plain) == digests(&coded), "both forms give the same bits");
    let stage = project.read("stages/s.toml");
    project.write(
        "stages/s.toml",
        &stage.replace("[matmul]", "recipe = { engine = \"transformers\" }\n[matmul]"),
    );
    project.runner(&["run", "stages", "--model", &coded]).expect(4, "of a quantised checkpoint");
}
