//! `config.json` of a Hugging Face folder, read as transformers reads it.
//!
//! Every key is used, known to change nothing in a pass, or refused with its value: a setting
//! that nobody reads may be a feature that nobody computes. Where two keys say the same thing,
//! they must agree. It knows no tensors.
//!
//! Source: the configuration classes and `modeling_rope_utils.py` of transformers 5.17.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::f64::consts::PI;

use serde_json::{Map, Value};

use super::architecture::{Activation, Architecture, Biases, Presence, RopeLayout};
use super::config::{
    Caps, Config, DeltaNet, Experts, Factors, LARGEST_HEAD, LARGEST_SIZE, Latent, Raw, RawRope,
    RouterScores, Routing, Scaling, exact_share, positive,
};
use super::error::{FETCH_AGAIN, Fault, OTHER_MODEL, shown};
use super::json;
use super::quantised::{self, Quantised};

/// Keys that change no value of a pass over given tokens: of how text is generated, of training, of
/// other programs, and some that models carry and transformers does not read.
const WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_model_name_or_path",
    "_name_or_path",
    "_sliding_window_pattern",
    "architectures",
    "assistant_early_exit",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "embedding_dropout",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "full_attn_mod",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "interpolate_factor",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_sequence_length",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "model_max_length",
    "model_type",
    "name_or_path",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "penalty_alpha",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "return_dict_in_generate",
    "sep_token_id",
    "stop_strings",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attn",
    "use_sdpa",
];

/// Keys that ask for a feature unless they are false or empty.
const OFF: &[&str] = &[
    "add_cross_attention",
    "is_decoder",
    "is_encoder_decoder",
    "lm_head_bias",
    "pruned_heads",
    "rope_interleaved",
    "use_bidirectional_attention",
    "use_mrope",
];

/// Whether a key is known to change no value of a pass: whatever it is set to, or as long as it is
/// off. Nobody looks at its value, so one of another type than the key's is no error either.
pub(super) fn changes_nothing(key: &str, value: &Value) -> bool {
    WITHOUT_EFFECT.contains(&key) || OFF.contains(&key) && is_off(value)
}

fn is_off(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_bool() == Some(false)
}

/// Where ModelOpt says how it quantised.
pub(super) const SIDECAR: &str = "hf_quant_config.json";

/// What ModelOpt's own file says, which must be what `config.json` says if that says anything.
fn beside_config(json: &[u8], other: Option<Quantised>) -> Result<Quantised, Fault> {
    let bad = |problem: String| Fault::malformed(format!("{SIDECAR}: {problem}"), FETCH_AGAIN);
    let Value::Object(map) = json::read(json).map_err(bad)? else {
        return Err(bad("it is no object".to_owned()));
    };
    let read = quantised::read_sidecar(&Keys::new(&map, String::new()))?;
    match other {
        Some(other) if other != read => Err(Fault::malformed(
            match (other.in_words(), read.in_words()) {
                (one, two) if one == two => {
                    format!(
                        "`quantization_config` and {SIDECAR} name the tensors of {one} in two ways"
                    )
                }
                (one, two) => format!(
                    "`quantization_config` in config.json says {one}, and {SIDECAR} says {two}"
                ),
            },
            "remove the one that is out of date",
        )),
        _ => Ok(read),
    }
}

fn missing_key(key: &str) -> Fault {
    Fault::malformed(format!("config.json: the key `{key}` is missing"), FETCH_AGAIN)
}

/// Reads the hyperparameters of a Hugging Face folder out of its `config.json`.
///
/// `beside` is ModelOpt's `hf_quant_config.json`, where the folder has one.
pub(super) fn from_hf(
    json: &[u8],
    beside: Option<&[u8]>,
) -> Result<(Config, Option<Quantised>), Fault> {
    let bad = |problem: String| Fault::malformed(format!("config.json: {problem}"), FETCH_AGAIN);
    let Value::Object(map) = json::read(json).map_err(bad)? else {
        return Err(bad("it is no object".to_owned()));
    };
    let keys = Keys::new(&map, String::new());
    let name = keys.text("model_type")?.ok_or_else(|| missing_key("model_type"))?;
    let architecture = Architecture::from_name(name)?;
    let quantised = keys.object("quantization_config")?;
    let quantised = quantised.as_ref().map(quantised::read).transpose()?;
    let quantised = match beside {
        None => quantised,
        Some(beside) => Some(beside_config(beside, quantised)?),
    };
    let raw = raw(&keys, architecture)?;
    keys.refuse_unread()?;
    Ok((raw.check()?, quantised))
}

fn raw(keys: &Keys<'_>, architecture: Architecture) -> Result<Raw, Fault> {
    let hidden = keys.required("hidden_size")?;
    let heads = keys.required("num_attention_heads")?;
    let layers = keys.required("num_hidden_layers")?;
    let latent = latent(keys, architecture)?;
    let head_dim = match (keys.whole("head_dim")?, architecture) {
        // The width that turns, whatever the file says; heads have more.
        (Some(width), Architecture::DeepSeekV3)
            if latent.is_some_and(|l| width == l.turned as u64) =>
        {
            width
        }
        (Some(width), Architecture::DeepSeekV3) => {
            let turned = latent.map_or(0, |latent| latent.turned);
            return Err(Fault::malformed(
                format!("its `head_dim` is {width} and its `qk_rope_head_dim` is {turned}"),
                "remove the one that is out of date",
            ));
        }
        (None, Architecture::DeepSeekV3) => latent.map_or(0, |latent| latent.turned as u64),
        // transformers reads none in this class.
        (Some(width), Architecture::StableLm) if width != exact_share(hidden, heads)? => {
            return Err(Fault::malformed(
                format!("its `head_dim` is {width}, and its heads share {hidden}"),
                FETCH_AGAIN,
            ));
        }
        (Some(width), _) => width,
        (None, Architecture::GptOss) => 64,
        // Defaults of the configuration classes, whatever the hidden width.
        (None, Architecture::Qwen3 | Architecture::Glm4) => 128,
        (None, Architecture::Gemma2 | Architecture::Gemma3 | Architecture::Qwen3Next) => 256,
        (None, _) => exact_share(hidden, heads)?,
    };
    let usual = Usual::of(architecture);
    // Early Llama files have the older name, or none.
    let context_length = match keys.whole("max_position_embeddings")? {
        Some(positions) => positions,
        None => keys.whole("max_sequence_length")?.unwrap_or(usual.context_length),
    };
    let (window, sliding) = windows(keys, architecture, layers, context_length)?;
    let Ropes { mut main, sliding: sliding_rope, longest } =
        ropes(keys, architecture, head_dim, context_length)?;
    main.at_end = latent.is_some();
    let of_gemma = matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3);
    let (mut factors, mut caps) = (Factors::default(), Caps::default());
    if of_gemma {
        let width = keys.number("query_pre_attn_scalar")?.unwrap_or(256.0);
        positive("query_pre_attn_scalar", width)?;
        factors.scores = Some(1.0 / width.sqrt());
        factors.embedding = Some((hidden as f64).sqrt());
        factors.embedding_is_held = true;
        caps.logits = keys.number("final_logit_softcapping")?;
        // In Gemma 3 transformers does not use it.
        if architecture == Architecture::Gemma2 {
            caps.scores = keys.number("attn_logit_softcapping")?;
            // Their defaults hold where the keys are absent, and null switches them off.
            let of = |key: &str, value, default| {
                if keys.map.contains_key(key) { value } else { Some(default) }
            };
            caps.scores = of("attn_logit_softcapping", caps.scores, 50.0);
            caps.logits = of("final_logit_softcapping", caps.logits, 30.0);
        }
    }
    if architecture == Architecture::Granite {
        let other_than_one = |key: &str| -> Result<Option<f64>, Fault> {
            Ok(keys.number(key)?.filter(|&factor| factor != 1.0))
        };
        factors.embedding = other_than_one("embedding_multiplier")?;
        factors.residual = other_than_one("residual_multiplier")?;
        factors.logits_divisor = other_than_one("logits_scaling")?;
        // Not `1 / sqrt(head_dim)` even where the key is absent.
        factors.scores = Some(keys.number("attention_multiplier")?.unwrap_or(1.0));
    }
    refuse_other_forms(keys, architecture)?;
    if latent.is_some() {
        factors.scores = latent_scale(keys, latent)?;
    }
    let of_stablelm = |key: &str| -> Result<bool, Fault> {
        Ok(architecture == Architecture::StableLm && keys.flag(key)?.unwrap_or(false))
    };
    // Attention and feed-forward network side by side read the same norm.
    let ffn_norm = Presence::of(!of_stablelm("use_parallel_residual")?);
    let head_norms = Presence::of(of_stablelm("qk_layernorm")?);
    Ok(Raw {
        architecture,
        layers,
        hidden,
        heads,
        // Null is all heads, as in Llama's first files.
        kv_heads: match (keys.whole("num_key_value_heads")?, usual.kv_heads) {
            (Some(heads), _) => heads,
            (None, Some(usual)) if !keys.map.contains_key("num_key_value_heads") => usual,
            (None, _) => heads,
        },
        head_dim: latent.map_or(head_dim, |latent| (latent.still + latent.turned) as u64),
        rope: main,
        ffn: keys.required("intermediate_size")?,
        vocabulary: keys.required("vocab_size")?,
        context_length: longest,
        rms_norm_eps: match architecture {
            Architecture::StableLm => keys.number("layer_norm_eps")?,
            Architecture::Starcoder2 => keys.number("norm_epsilon")?,
            // transformers gives the norms of latents their class's own, whatever is written.
            _ => keys.number("rms_norm_eps")?,
        }
        .unwrap_or(usual.rms_norm_eps),
        tied_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(
            of_gemma || matches!(architecture, Architecture::SmolLm3 | Architecture::Starcoder2),
        ),
        activation: activation(keys, architecture)?,
        biases: biases(keys, architecture)?,
        ffn_norm,
        head_norms,
        window,
        sliding,
        sliding_rope,
        turned: turned(keys, architecture, layers)?,
        factors,
        caps,
        experts: experts(keys, architecture, layers)?,
        latent,
        delta: delta(keys, architecture, layers)?,
    })
}

/// Gated delta nets, and which blocks have them.
fn delta(
    keys: &Keys<'_>,
    architecture: Architecture,
    layers: u64,
) -> Result<Option<DeltaNet>, Fault> {
    if architecture != Architecture::Qwen3Next {
        return Ok(None);
    }
    let width = |key: &str, usual: u64| -> Result<usize, Fault> {
        Ok(keys.whole(key)?.unwrap_or(usual).min(LARGEST_SIZE + 1) as usize)
    };
    let interval = keys.whole("full_attention_interval")?.unwrap_or(4).max(1);
    let blocks = match layer_types(keys, layers)? {
        None => {
            let blocks = 0..layers.min(LARGEST_SIZE);
            blocks.map(|block| (block + 1) % interval != 0).collect()
        }
        Some(types) => {
            let has = |kind: &&str| match *kind {
                // The older name, which transformers maps.
                "full_attention" | "attention" => Ok(false),
                "linear_attention" => Ok(true),
                other => Err(Fault::unsupported(
                    format!("it has layers of type `{}`", shown(other)),
                    OTHER_MODEL,
                )),
            };
            types.iter().map(has).collect::<Result<Vec<bool>, _>>()?
        }
    };
    Ok(Some(DeltaNet {
        key_heads: width("linear_num_key_heads", 16)?,
        value_heads: width("linear_num_value_heads", 32)?,
        key_dim: width("linear_key_head_dim", 128)?,
        value_dim: width("linear_value_head_dim", 128)?,
        taps: width("linear_conv_kernel_dim", 4)?,
        rates_are_logs: true,
        blocks,
    }))
}

/// Settings that files of some architectures have and transformers does not read: they must say
/// what it computes.
fn refuse_other_forms(keys: &Keys<'_>, architecture: Architecture) -> Result<(), Fault> {
    match architecture {
        Architecture::Starcoder2 => {
            for key in [
                "activation_function",
                "attention_softmax_in_fp32",
                "scale_attention_softmax_in_fp32",
                "scale_attn_weights",
            ] {
                keys.get(key);
            }
            for (key, known) in [("norm_type", "layer_norm"), ("mlp_type", "default")] {
                if let Some(other) = keys.text(key)?.filter(|value| *value != known) {
                    return Err(Fault::unsupported(
                        format!("its `{key}` is `{}`, not `{known}`", shown(other)),
                        OTHER_MODEL,
                    ));
                }
            }
            let (used, older) = (keys.number("norm_epsilon")?, keys.number("layer_norm_epsilon")?);
            match older.filter(|older| *older != used.unwrap_or(1e-5)) {
                Some(older) => Err(disagree_of("norm_epsilon", used, "layer_norm_epsilon", older)),
                None => Ok(()),
            }
        }
        Architecture::StableLm => {
            let (used, older) = (keys.number("layer_norm_eps")?, keys.number("norm_eps")?);
            match older.filter(|older| *older != used.unwrap_or(1e-5)) {
                Some(older) => Err(disagree_of("layer_norm_eps", used, "norm_eps", older)),
                None => Ok(()),
            }
        }
        Architecture::GptOss => {
            let Some(first) = keys.number("initial_context_length")? else { return Ok(()) };
            let of = |object: Option<Keys<'_>>| -> Result<Option<f64>, Fault> {
                let number = object.map(|rope| rope.number("original_max_position_embeddings"));
                number.transpose().map(Option::flatten)
            };
            let newer = of(keys.object("rope_parameters")?)?;
            let older = of(keys.object("rope_scaling")?)?;
            let key = "original_max_position_embeddings";
            match newer.or(older).filter(|used| *used != first) {
                Some(used) => Err(disagree_of(key, Some(used), "initial_context_length", first)),
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

/// Two keys of the same meaning, of which transformers reads the first.
fn disagree_of(key: &str, used: Option<f64>, other: &str, value: f64) -> Fault {
    let used = used.map_or("not there".to_owned(), |used| used.to_string());
    Fault::malformed(
        format!("its `{key}` is {used} and its `{other}` is {value}"),
        "remove the one that is out of date",
    )
}

/// Latent attention.
fn latent(keys: &Keys<'_>, architecture: Architecture) -> Result<Option<Latent>, Fault> {
    if architecture != Architecture::DeepSeekV3 {
        return Ok(None);
    }
    let width = |key: &str, usual: u64| -> Result<usize, Fault> {
        Ok(keys.whole(key)?.unwrap_or(usual).min(LARGEST_SIZE + 1) as usize)
    };
    let latent = Latent {
        // Null is none; where nothing is said the class's own value holds.
        queries: match keys.map.contains_key("q_lora_rank") {
            true => keys.whole("q_lora_rank")?.map(|width| width.min(LARGEST_SIZE + 1) as usize),
            false => Some(1536),
        },
        keys: width("kv_lora_rank", 512)?,
        still: width("qk_nope_head_dim", 128)?,
        turned: width("qk_rope_head_dim", 64)?,
        values: width("v_head_dim", 128)?,
        // transformers' class gives them its own, whatever the config says.
        eps: 1e-6,
    };
    let whole = (latent.still + latent.turned) as u64;
    match keys.whole("qk_head_dim")? {
        Some(width) if width != whole => Err(Fault::malformed(
            format!(
                "its `qk_head_dim` is {width}, and its `qk_nope_head_dim` and `qk_rope_head_dim` add \
                 up to {whole}"
            ),
            FETCH_AGAIN,
        )),
        _ => Ok(Some(latent)),
    }
}

/// What latent attention multiplies scores with where YaRN stretches its context: the usual
/// scale times the square of YaRN's `mscale_all_dim` (`yarn_apply_mscale` of transformers).
fn latent_scale(keys: &Keys<'_>, latent: Option<Latent>) -> Result<Option<f64>, Fault> {
    let rope = match keys.object("rope_parameters")? {
        Some(rope) => Some(rope),
        None => keys.object("rope_scaling")?,
    };
    let (Some(rope), Some(latent)) = (rope, latent) else { return Ok(None) };
    let kind = match rope.text("rope_type")? {
        Some(kind) => Some(kind),
        None => rope.text("type")?,
    };
    let all = rope.number("mscale_all_dim")?.unwrap_or(0.0);
    if matches!(kind, None | Some("default")) || all == 0.0 {
        return Ok(None);
    }
    let factor = rope.number("factor")?.ok_or_else(|| missing_key("rope_scaling.factor"))?;
    let usual = 1.0 / ((latent.still + latent.turned) as f64).sqrt();
    let magnitude = if factor <= 1.0 { 1.0 } else { 0.1 * all * factor.ln() + 1.0 };
    Ok(Some(usual * magnitude * magnitude))
}

/// The mixture of experts. Two names of their number must agree.
fn experts(
    keys: &Keys<'_>,
    architecture: Architecture,
    layers: u64,
) -> Result<Option<Experts>, Fault> {
    let width = |key: &str, usual: u64| -> Result<usize, Fault> {
        Ok(keys.whole(key)?.unwrap_or(usual).min(LARGEST_SIZE + 1) as usize)
    };
    let count = |names: &[&str], usual: u64| -> Result<usize, Fault> {
        let mut found: Option<(&str, u64)> = None;
        for name in names {
            let Some(count) = keys.whole(name)? else { continue };
            if let Some((other, before)) = found.filter(|(_, before)| *before != count) {
                return Err(Fault::malformed(
                    format!("its `{other}` is {before} and its `{name}` is {count}"),
                    "remove the one that is out of date",
                ));
            }
            found = Some((name, count));
        }
        Ok(found.map_or(usual, |(_, count)| count).min(LARGEST_SIZE) as usize)
    };
    let one_group = |used, scores| Routing { used, scores, factor: 1.0, groups: 1, used_groups: 1 };
    let of_share = |normalised: Option<bool>, usual: bool| match normalised.unwrap_or(usual) {
        true => RouterScores::SoftmaxOfTaken,
        false => RouterScores::Softmax,
    };
    let blocks = 0..layers.min(LARGEST_SIZE);
    let experts = match architecture {
        Architecture::Mixtral | Architecture::GptOss => {
            let (usual, used) =
                if architecture == Architecture::Mixtral { (8, 2) } else { (128, 4) };
            let given = keys.whole("num_experts_per_tok")?.unwrap_or(used);
            // gpt-oss's own files name it twice; transformers reads the first.
            if let Some(older) = keys.whole("experts_per_token")?.filter(|older| *older != given) {
                let key = "num_experts_per_tok";
                return Err(disagree_of(
                    key,
                    Some(given as f64),
                    "experts_per_token",
                    older as f64,
                ));
            }
            let used = given.min(LARGEST_SIZE) as usize;
            Experts {
                count: count(&["num_local_experts", "num_experts"], usual)?,
                ffn: keys.required("intermediate_size")?.min(LARGEST_SIZE + 1) as usize,
                routing: one_group(used, RouterScores::SoftmaxOfTaken),
                shared: None,
                gates_shared: false,
                blocks: Vec::new(),
            }
        }
        Architecture::Qwen2Moe | Architecture::Qwen3Moe | Architecture::Qwen3Next => {
            let shares = architecture != Architecture::Qwen3Moe;
            let step = keys.whole("decoder_sparse_step")?.unwrap_or(1);
            if step == 0 {
                return Err(Fault::malformed("its `decoder_sparse_step` is 0", FETCH_AGAIN));
            }
            let dense: BTreeSet<u64> = match keys.list("mlp_only_layers")? {
                None => BTreeSet::new(),
                Some(list) => {
                    let of = |value: &Value| {
                        let layer = value.as_u64();
                        layer
                            .ok_or_else(|| keys.wrong("mlp_only_layers", value, "a list of blocks"))
                    };
                    list.iter().map(of).collect::<Result<_, _>>()?
                }
            };
            let (count_usual, used, ffn, shared) = match architecture {
                Architecture::Qwen2Moe => (60, 4, 1408, 5632),
                Architecture::Qwen3Next => (512, 10, 512, 512),
                _ => (128, 8, 768, 0),
            };
            let normalises = architecture == Architecture::Qwen3Next;
            let has = |block: u64| (block + 1).is_multiple_of(step) && !dense.contains(&block);
            let blocks: Vec<bool> = blocks.map(has).collect();
            // The older class knows one name of their number.
            let names: &[&str] = match architecture {
                Architecture::Qwen3Moe => &["num_local_experts", "num_experts"],
                _ => &["num_experts"],
            };
            let experts = Experts {
                count: count(names, count_usual)?,
                ffn: width("moe_intermediate_size", ffn)?,
                routing: one_group(
                    width("num_experts_per_tok", used)?,
                    of_share(keys.flag("norm_topk_prob")?, normalises),
                ),
                shared: match shares {
                    true => Some(width("shared_expert_intermediate_size", shared)?),
                    false => None,
                },
                gates_shared: shares,
                blocks,
            };
            if experts.count == 0 || !experts.blocks.contains(&true) {
                return Ok(None);
            }
            experts
        }
        Architecture::DeepSeekV3 => {
            let first = keys.whole("first_k_dense_replace")?.unwrap_or(3);
            match keys.whole("moe_layer_freq")? {
                None | Some(1) => {}
                Some(step) => {
                    return Err(Fault::unsupported(
                        format!("its `moe_layer_freq` is {step}, which transformers does not read"),
                        OTHER_MODEL,
                    ));
                }
            }
            for (key, known) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
                if let Some(other) = keys.text(key)?.filter(|value| *value != known) {
                    return Err(Fault::unsupported(
                        format!("its `{key}` is `{}`, not `{known}`", shown(other)),
                        OTHER_MODEL,
                    ));
                }
            }
            for key in ["ep_size", "aux_loss_alpha", "seq_aux"] {
                keys.get(key);
            }
            let ffn = width("moe_intermediate_size", 2048)?;
            let factor = keys.number("routed_scaling_factor")?.unwrap_or(2.5);
            let experts = Experts {
                count: count(&["n_routed_experts", "num_local_experts"], 256)?,
                ffn,
                routing: Routing {
                    used: width("num_experts_per_tok", 8)?,
                    scores: match keys.flag_or("norm_topk_prob", true)? {
                        true => RouterScores::SigmoidNormalised,
                        false => RouterScores::Sigmoid,
                    },
                    factor,
                    groups: width("n_group", 8)?,
                    used_groups: width("topk_group", 4)?,
                },
                shared: Some(ffn.saturating_mul(width("n_shared_experts", 1)?)),
                gates_shared: false,
                blocks: blocks.map(|block| block >= first).collect(),
            };
            if !experts.blocks.contains(&true) {
                return Ok(None);
            }
            experts
        }
        _ => return Ok(None),
    };
    Ok(Some(experts))
}

fn activation(keys: &Keys<'_>, architecture: Architecture) -> Result<Activation, Fault> {
    let of_gemma = matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3);
    if architecture == Architecture::Qwen3Next
        && let Some(other) =
            keys.text("hidden_act")?.filter(|name| !["silu", "swish"].contains(name))
    {
        // The convolution of its delta nets has that function too.
        return Err(Fault::unsupported(
            format!("its activation is `{}`, not `silu`", shown(other)),
            OTHER_MODEL,
        ));
    }
    let (key, usual) = match architecture {
        _ if of_gemma => ("hidden_activation", Activation::GeluTanh),
        Architecture::Starcoder2 => ("hidden_act", Activation::GeluTanh),
        Architecture::GptOss => {
            // transformers computes the same whatever is written; other programs read it.
            if let Some(other) = keys.text("hidden_act")?.filter(|name| *name != "silu") {
                return Err(Fault::unsupported(
                    format!("its activation is `{}`, not `silu`", shown(other)),
                    OTHER_MODEL,
                ));
            }
            if let Some(limit) = keys.number("swiglu_limit")?.filter(|limit| *limit != 7.0) {
                return Err(Fault::unsupported(
                    format!("its `swiglu_limit` is {limit}, not 7"),
                    OTHER_MODEL,
                ));
            }
            return Ok(Activation::ClampedSwiglu);
        }
        _ => ("hidden_act", Activation::Silu),
    };
    if of_gemma && let Some(older) = keys.text("hidden_act")? {
        // transformers does not read the older key in these models.
        let used = keys.text(key)?.unwrap_or("gelu_pytorch_tanh");
        if older != used {
            return Err(Fault::malformed(
                format!(
                    "its `hidden_act` is `{}` and its `{key}` is `{}`",
                    shown(older),
                    shown(used)
                ),
                "remove the one that is out of date",
            ));
        }
    }
    match keys.text(key)? {
        None => Ok(usual),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => Err(Fault::unsupported(
            format!("its activation is `{}`, not `silu` or `gelu_pytorch_tanh`", shown(other)),
            OTHER_MODEL,
        )),
    }
}

fn biases(keys: &Keys<'_>, architecture: Architecture) -> Result<Biases, Fault> {
    let of_attention = keys.flag("attention_bias")?;
    let of_ffn = keys.flag("mlp_bias")?.unwrap_or(false);
    let reads =
        matches!(architecture, Architecture::Llama | Architecture::Granite | Architecture::SmolLm3);
    // Other classes have no such biases, and transformers drops them.
    if of_ffn && !reads {
        return Err(Fault::unsupported(
            format!(
                "its `mlp_bias` is true, and transformers' class of {} has no biases in the \
                 feed-forward network, or reads another key for them",
                architecture.name()
            ),
            "remove the key, and the biases if it has some, to compute what transformers does",
        ));
    }
    let of_ffn = Presence::of(of_ffn);
    // Classes that do not read `attention_bias` compute the same whatever it says: in these it is known
    // to change nothing, and biases beyond those of the class are refused by their names.
    let (qkv, output) = match architecture {
        Architecture::Qwen2 => (true, false),
        Architecture::Glm4 => (of_attention.unwrap_or(true), false),
        Architecture::Mistral | Architecture::Phi3 | Architecture::Mixtral => (false, false),
        Architecture::Qwen2Moe => (keys.flag("qkv_bias")?.unwrap_or(true), false),
        Architecture::StableLm => (keys.flag("use_qkv_bias")?.unwrap_or(false), false),
        Architecture::Starcoder2 => {
            let all = keys.flag("use_bias")?.unwrap_or(true);
            let all = Presence::of(all);
            return Ok(Biases { qkv: all, output: all, ffn: all });
        }
        Architecture::GptOss => {
            // Experts and router have biases whatever the file says of attention's.
            let of_attention = Presence::of(of_attention.unwrap_or(true));
            let ffn = Presence::Always;
            return Ok(Biases { qkv: of_attention, output: of_attention, ffn });
        }
        _ => (of_attention.unwrap_or(false), of_attention.unwrap_or(false)),
    };
    Ok(Biases { qkv: Presence::of(qkv), output: Presence::of(output), ffn: of_ffn })
}

/// The kinds of the blocks, one for each.
fn layer_types<'a>(keys: &Keys<'a>, layers: u64) -> Result<Option<Vec<&'a str>>, Fault> {
    match keys.texts("layer_types")? {
        Some(types) if types.len() as u64 != layers => Err(Fault::malformed(
            format!(
                "its `layer_types` names {} blocks, and its `num_hidden_layers` is {layers}",
                types.len()
            ),
            "remove the one that is out of date",
        )),
        types => Ok(types),
    }
}

/// The window and which blocks have it; all where the list is empty.
fn windows(
    keys: &Keys<'_>,
    architecture: Architecture,
    layers: u64,
    context_length: u64,
) -> Result<(Option<u64>, Vec<bool>), Fault> {
    let written = keys.whole("sliding_window")?;
    let used = keys.flag("use_sliding_window")?.unwrap_or(false);
    // Its kinds of layers are read elsewhere, and transformers reads no window in it.
    if architecture == Architecture::Qwen3Next {
        keys.get("max_window_layers");
        return Ok((None, Vec::new()));
    }
    let first = keys.whole("max_window_layers")?;
    let pattern = keys.whole("sliding_window_pattern")?;
    let types = layer_types(keys, layers)?;
    // The class's own value holds where the key is absent; null is none.
    let or_usual = |usual| match keys.map.contains_key("sliding_window") {
        true => written,
        false => Some(usual),
    };
    let window = match architecture {
        // Qwen's and SmolLM3's files name a window that they do not use.
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen3Moe if used => {
            or_usual(4096)
        }
        Architecture::SmolLm3 if used => written,
        Architecture::Qwen2Moe if used => or_usual(4096),
        Architecture::Qwen2
        | Architecture::Qwen3
        | Architecture::Qwen2Moe
        | Architecture::Qwen3Moe
        | Architecture::SmolLm3 => None,
        Architecture::GptOss => or_usual(128),
        Architecture::Mixtral | Architecture::Starcoder2 => written,
        Architecture::Gemma2 | Architecture::Gemma3 => {
            let window = or_usual(4096);
            if window.is_none() {
                return Err(Fault::malformed("its sliding_window is null", FETCH_AGAIN));
            }
            window
        }
        Architecture::Mistral => or_usual(4096),
        Architecture::Phi3 => written,
        // transformers reads no window in these.
        Architecture::Llama
        | Architecture::Olmo2
        | Architecture::Granite
        | Architecture::Glm4
        | Architecture::StableLm
        | Architecture::DeepSeekV3
        | Architecture::Qwen3Next => match written {
            Some(window) if window != 0 && window < context_length => {
                return Err(Fault::unsupported(
                    format!("its attention slides over {window} of {context_length} positions"),
                    OTHER_MODEL,
                ));
            }
            _ => None,
        },
    };
    let slides = |kind: &&str| match *kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(Fault::unsupported(
            format!("it has layers of type `{}`", shown(other)),
            OTHER_MODEL,
        )),
    };
    let types = types.map(|types| types.iter().map(slides).collect::<Result<Vec<bool>, _>>());
    let types = types.transpose()?;
    if let Some(types) = &types {
        if window.is_none() && types.contains(&true) {
            return Err(Fault::malformed(
                "its `layer_types` hold `sliding_attention`, but no `sliding_window` is used",
                FETCH_AGAIN,
            ));
        }
        // transformers gives every block of these the window.
        let of_all = matches!(
            architecture,
            Architecture::Phi3
                | Architecture::Mistral
                | Architecture::Mixtral
                | Architecture::Starcoder2
                | Architecture::Qwen3Moe
        );
        if of_all && window.is_some() && types.contains(&false) {
            return Err(Fault::malformed(
                "its `layer_types` hold `full_attention`, and its `sliding_window` is that of all",
                FETCH_AGAIN,
            ));
        }
    }
    let blocks = 0..layers.min(LARGEST_SIZE);
    let sliding: Vec<bool> = match (types, window) {
        (_, None) => return Ok((None, Vec::new())),
        (Some(types), _) => types,
        (None, Some(_)) => match architecture {
            Architecture::Qwen2 | Architecture::Qwen3 => {
                let first = first.unwrap_or(28);
                blocks.map(|block| block >= first).collect()
            }
            Architecture::Gemma2 | Architecture::GptOss => {
                blocks.map(|block| block % 2 == 0).collect()
            }
            Architecture::Qwen2Moe => {
                let first = first.unwrap_or(28);
                blocks.map(|block| block % 2 == 0 && block < first).collect()
            }
            Architecture::Gemma3 => {
                let pattern = pattern.unwrap_or(6).max(1);
                blocks.map(|block| (block + 1) % pattern != 0).collect()
            }
            Architecture::SmolLm3 => {
                return Err(Fault::unsupported(
                    "it uses a window, and no `layer_types` say in which blocks",
                    OTHER_MODEL,
                ));
            }
            _ => Vec::new(),
        },
    };
    let none = !sliding.is_empty() && !sliding.contains(&true);
    Ok(if none { (None, Vec::new()) } else { (window, sliding) })
}

/// What transformers' configuration classes say where a file says nothing.
struct Usual {
    /// Positions.
    context_length: u64,
    /// Key and value heads, where not all heads.
    kv_heads: Option<u64>,
    rms_norm_eps: f64,
}

impl Usual {
    fn of(architecture: Architecture) -> Usual {
        let (context_length, kv_heads, rms_norm_eps) = match architecture {
            Architecture::Llama | Architecture::Granite => (2048, None, 1e-6),
            Architecture::Olmo2 => (2048, None, 1e-5),
            Architecture::Qwen2 | Architecture::Qwen3 => (32_768, Some(32), 1e-6),
            Architecture::SmolLm3 => (32_768, Some(4), 1e-6),
            Architecture::Mistral => (131_072, Some(8), 1e-6),
            Architecture::Phi3 => (4096, None, 1e-5),
            Architecture::Gemma2 => (8192, Some(4), 1e-6),
            Architecture::Gemma3 => (131_072, Some(4), 1e-6),
            Architecture::Glm4 => (131_072, Some(2), 1.5625e-7),
            Architecture::StableLm => (4096, Some(32), 1e-5),
            Architecture::Starcoder2 => (4096, Some(2), 1e-5),
            Architecture::Mixtral => (131_072, Some(8), 1e-5),
            Architecture::Qwen2Moe => (32_768, Some(16), 1e-6),
            Architecture::Qwen3Moe => (32_768, Some(4), 1e-6),
            Architecture::GptOss => (131_072, Some(8), 1e-5),
            Architecture::DeepSeekV3 => (4096, Some(128), 1e-6),
            Architecture::Qwen3Next => (32_768, Some(2), 1e-6),
        };
        Usual { context_length, kv_heads, rms_norm_eps }
    }
}

/// Which blocks turn queries and keys; all where the list is empty.
fn turned(keys: &Keys<'_>, architecture: Architecture, layers: u64) -> Result<Vec<bool>, Fault> {
    if architecture != Architecture::SmolLm3 {
        return Ok(Vec::new());
    }
    let interval = keys.whole("no_rope_layer_interval")?.unwrap_or(4).max(1);
    let Some(listed) = keys.list("no_rope_layers")? else {
        let blocks = 0..layers.min(LARGEST_SIZE);
        return Ok(blocks.map(|block| (block + 1) % interval != 0).collect());
    };
    let of = |value: &Value| match value.as_u64() {
        // The list names the blocks that have RoPE, whatever its name says.
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(keys.wrong("no_rope_layers", value, "a list of 0 and 1")),
    };
    listed.iter().map(of).collect()
}

/// What a model's RoPEs are.
struct Ropes {
    main: RawRope,
    /// Of sliding blocks.
    sliding: Option<RawRope>,
    /// Positions for which these hold.
    longest: u64,
}

fn ropes(
    keys: &Keys<'_>,
    architecture: Architecture,
    head_dim: u64,
    context_length: u64,
) -> Result<Ropes, Fault> {
    // Newer files keep everything of RoPE in `rope_parameters`.
    // transformers takes an empty older object for none.
    let older = keys.object("rope_scaling")?.filter(|older| !older.map.is_empty());
    let newer = keys.object("rope_parameters")?;
    if let (Some(older), Some(newer)) = (&older, &newer)
        && older.map != newer.map
    {
        return Err(Fault::malformed(
            format!(
                "its `rope_scaling` {} and its `rope_parameters` {} disagree",
                written(&Value::Object(older.map.clone())),
                written(&Value::Object(newer.map.clone()))
            ),
            "remove the one that is out of date",
        ));
    }
    let reader = RopeReader {
        keys,
        head_dim,
        context_length,
        original: match (keys.number("original_max_position_embeddings")?, architecture) {
            // The class's own value, which stands above what stands among RoPE's settings.
            (None, Architecture::Phi3) => Some(4096.0),
            (_, Architecture::Gemma3) => None,
            (original, _) => original,
        },
        layout: match architecture {
            Architecture::Glm4 => RopeLayout::Interleaved,
            // What is false is halves.
            Architecture::DeepSeekV3 if keys.flag_or("rope_interleave", true)? => {
                RopeLayout::Interleaved
            }
            _ => RopeLayout::Halves,
        },
        share: match architecture {
            Architecture::Glm4 => 0.5,
            Architecture::StableLm | Architecture::Qwen3Next => 0.25,
            _ => 1.0,
        },
        turns_parts: matches!(
            architecture,
            Architecture::Phi3
                | Architecture::Glm4
                | Architecture::StableLm
                | Architecture::Qwen3Next
        ),
        in_f32: architecture == Architecture::Olmo2,
        yarn_is_longrope: architecture == Architecture::Phi3,
    };
    if architecture == Architecture::Gemma3 {
        let nested = newer.as_ref().filter(|keys| {
            ["full_attention", "sliding_attention"].iter().any(|kind| keys.map.contains_key(*kind))
        });
        let part = |kind| nested.map_or(Ok(None), |keys| keys.object(kind));
        let (full, sliding) = (part("full_attention")?, part("sliding_attention")?);
        // Of a `rope_parameters` without kinds of attention transformers takes nothing.
        if let Some(flat) = newer.as_ref().filter(|keys| nested.is_none() && !keys.map.is_empty()) {
            return Err(Fault::malformed(
                format!(
                    "its `rope_parameters` {} name no kind of attention",
                    written(&Value::Object(flat.map.clone()))
                ),
                FETCH_AGAIN,
            ));
        }
        let plain = older.as_ref();
        let local = keys.number("rope_local_base_freq")?;
        let (main, longest) = reader.read(full.as_ref().or(plain), 1_000_000.0)?;
        let (nothing, none) = (Map::new(), RefCell::default());
        let keys = Keys { map: &nothing, within: String::new(), read: none };
        let outer = RopeReader { keys: &keys, ..reader };
        let (rope, _) = outer.read(sliding.as_ref(), local.unwrap_or(10_000.0))?;
        if let Some(local) = local.filter(|local| *local != rope.theta) {
            return Err(disagree("rope_local_base_freq", local, rope.theta));
        }
        nested.map_or(Ok(()), Keys::refuse_unread)?;
        return Ok(Ropes { main, sliding: Some(rope), longest });
    }
    // The default of transformers' classes, and what the first Llama files mean.
    let usual = match architecture {
        Architecture::SmolLm3 => 2_000_000.0,
        Architecture::Mixtral => 1_000_000.0,
        Architecture::GptOss => 150_000.0,
        _ => 10_000.0,
    };
    let given = newer.as_ref().or(older.as_ref());
    if architecture == Architecture::GptOss && given.is_none() {
        return Err(Fault::malformed(
            "neither `rope_scaling` nor `rope_parameters` is there, and transformers would stretch \
             the context by YaRN all the same",
            "write `rope_scaling` with the settings that the model was trained with",
        ));
    }
    let (main, longest) = reader.read(given, usual)?;
    Ok(Ropes { main, sliding: None, longest })
}

/// Two keys that say the same thing, and do not.
fn disagree(key: &str, outer: f64, inner: f64) -> Fault {
    Fault::malformed(
        format!("its `{key}` is {outer}, and the one among RoPE's own settings is {inner}"),
        "remove the one that is out of date",
    )
}

/// What RoPE's settings are read with.
#[derive(Clone, Copy)]
struct RopeReader<'a> {
    /// The keys beside RoPE's own.
    keys: &'a Keys<'a>,
    head_dim: u64,
    context_length: u64,
    /// Positions that the model was first made for, where they stand beside RoPE's settings.
    original: Option<f64>,
    layout: RopeLayout,
    /// The share of a head that turns where nothing is said.
    share: f64,
    /// Whether a part of each head may turn.
    turns_parts: bool,
    /// Whether transformers turns in f32.
    in_f32: bool,
    /// Whether `yarn` is an older name of LongRoPE, as in Phi 3's files.
    yarn_is_longrope: bool,
}

impl RopeReader<'_> {
    /// RoPE, and how many positions it holds for.
    fn read(&self, rope: Option<&Keys<'_>>, usual_theta: f64) -> Result<(RawRope, u64), Fault> {
        let empty = Map::new();
        let none = Keys::new(&empty, String::new());
        let rope = rope.unwrap_or(&none);
        // What transformers' class writes by itself says nothing against what stands inside.
        let agreed = |key: &str, usual: f64| -> Result<Option<f64>, Fault> {
            match (self.keys.number(key)?, rope.number(key)?) {
                (Some(outer), Some(inner)) if outer != inner && outer != usual => {
                    Err(disagree(key, outer, inner))
                }
                (outer, inner) => Ok(inner.or(outer)),
            }
        };
        let theta = agreed("rope_theta", f64::NAN)?.unwrap_or(usual_theta);
        positive("RoPE base", theta)?;
        let share = agreed("partial_rotary_factor", self.share)?.unwrap_or(self.share);
        if share != 1.0 && !self.turns_parts {
            return Err(Fault::unsupported(
                format!("RoPE turns {share} of each head, which is not done in this architecture"),
                OTHER_MODEL,
            ));
        }
        if !(share > 0.0 && share <= 1.0) {
            return Err(Fault::malformed(
                format!("its partial_rotary_factor is {share}, not above 0 and up to 1"),
                FETCH_AGAIN,
            ));
        }
        if self.head_dim > LARGEST_HEAD {
            let head_dim = self.head_dim;
            return Err(Fault::malformed(format!("its head width is {head_dim}"), FETCH_AGAIN));
        }
        let dimensions = (self.head_dim as f64 * share) as u64;
        let mut read = RawRope {
            dimensions,
            at_end: false,
            theta,
            layout: self.layout,
            factors: None,
            linear_scale: 1.0,
            magnitude: 1.0,
            scaling: None,
            in_f32: self.in_f32,
        };
        let mut longest = self.context_length;
        let (kind, older) = (rope.text("rope_type")?, rope.text("type")?);
        if let (Some(kind), Some(older)) = (kind, older)
            && kind != older
        {
            return Err(Fault::malformed(
                format!(
                    "RoPE's `rope_type` is `{}` and its `type` is `{}`",
                    shown(kind),
                    shown(older)
                ),
                "remove the one that is out of date",
            ));
        }
        let required = |key: &str| -> Result<f64, Fault> {
            rope.number(key)?.ok_or_else(|| missing_key(&format!("rope_scaling.{key}")))
        };
        let original = || -> Result<f64, Fault> {
            let own = rope.number("original_max_position_embeddings")?;
            if let (Some(outer), Some(own)) = (self.original, own)
                && outer != own
            {
                return Err(disagree("original_max_position_embeddings", outer, own));
            }
            let original = self.original.or(own).unwrap_or(self.context_length as f64);
            positive("original_max_position_embeddings", original)?;
            Ok(original)
        };
        let kind = match kind.or(older) {
            Some("yarn") if self.yarn_is_longrope => Some("longrope"),
            kind => kind,
        };
        match kind {
            None | Some("default") => {}
            Some("linear") => {
                read.linear_scale = required("factor")?;
                read.scaling = Some(Scaling::Linear(read.linear_scale));
            }
            // The base grows with the positions beyond the context alone, which a pass refuses.
            Some("dynamic") => {
                required("factor")?;
            }
            Some("llama3") => {
                let scaling = Llama3 {
                    factor: required("factor")?,
                    low: required("low_freq_factor")?,
                    high: required("high_freq_factor")?,
                    context: original()?,
                };
                let Llama3 { factor, low, high, context } = scaling;
                read.scaling = Some(Scaling::Llama3 { factor, low, high, context });
                read.factors = Some(scaling.factors(theta, dimensions)?);
            }
            Some("yarn") => {
                let original = original()?;
                let factor = match rope.number("factor")? {
                    Some(factor) => factor,
                    None => self.context_length as f64 / original,
                };
                let yarn = Yarn {
                    factor,
                    original,
                    fast: rope.number("beta_fast")?.filter(|&beta| beta != 0.0).unwrap_or(32.0),
                    slow: rope.number("beta_slow")?.filter(|&beta| beta != 0.0).unwrap_or(1.0),
                    truncate: rope.flag("truncate")?.unwrap_or(true),
                };
                let (low, high) = yarn.bounds(theta, dimensions)?;
                read.factors = Some(yarn.factors(dimensions, low, high));
                read.scaling = Some(Scaling::Yarn { factor, low, high });
                let scales = [rope.number("mscale")?, rope.number("mscale_all_dim")?];
                read.magnitude = match (rope.number("attention_factor")?, scales) {
                    (Some(factor), _) => factor,
                    (None, [Some(scale), Some(all)]) if scale != 0.0 && all != 0.0 => {
                        yarn.magnitude(scale) / yarn.magnitude(all)
                    }
                    (None, _) => yarn.magnitude(1.0),
                };
            }
            Some("longrope" | "su") => {
                let original = original()?;
                let factor = match rope.number("factor")? {
                    Some(factor) => factor,
                    None => self.context_length as f64 / original,
                };
                let numbers = |key: &str| -> Result<Vec<f32>, Fault> {
                    let list = rope.list(key)?;
                    let list = list.ok_or_else(|| missing_key(&format!("rope_scaling.{key}")))?;
                    let number = |value: &Value| {
                        let number = value.as_f64().map(|number| number as f32);
                        number.ok_or_else(|| rope.wrong(key, value, "a list of numbers"))
                    };
                    list.iter().map(number).collect()
                };
                read.factors = Some(numbers("short_factor")?);
                read.scaling = Some(Scaling::Long);
                read.magnitude = match rope.number("attention_factor")? {
                    Some(magnitude) => magnitude,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original.ln()).sqrt(),
                };
                // Passes beyond these positions turn all their keys by other factors.
                if numbers("long_factor")? != numbers("short_factor")? {
                    longest = longest.min(original as u64);
                }
            }
            Some(other) => {
                return Err(Fault::unsupported(
                    format!("RoPE is scaled by the method `{}`", shown(other)),
                    OTHER_MODEL,
                ));
            }
        }
        rope.refuse_unread()?;
        Ok((read, longest))
    }
}

/// Llama 3.1's scaling: long waves are stretched by `factor`, short ones kept,
/// those between blended (`_compute_llama3_parameters` of transformers).
pub(super) struct Llama3 {
    pub factor: f64,
    pub low: f64,
    pub high: f64,
    pub context: f64,
}

impl Llama3 {
    /// The divisor of each pair's frequency.
    pub fn factors(&self, theta: f64, head_dim: u64) -> Result<Vec<f32>, Fault> {
        positive("RoPE base", theta)?;
        positive("RoPE scaling factor", self.factor)?;
        positive("low_freq_factor", self.low)?;
        positive("high_freq_factor - low_freq_factor", self.high - self.low)?;
        positive("original_max_position_embeddings", self.context)?;
        if head_dim > LARGEST_HEAD {
            return Err(Fault::malformed(format!("its head width is {head_dim}"), FETCH_AGAIN));
        }
        let pairs = head_dim / 2;
        Ok((0..pairs).map(|pair| self.factor_of(theta, pair as f64 / pairs as f64)).collect())
    }

    fn factor_of(&self, theta: f64, exponent: f64) -> f32 {
        let wavelength = 2.0 * PI * theta.powf(exponent);
        if wavelength < self.context / self.high {
            return 1.0;
        }
        if wavelength > self.context / self.low {
            return self.factor as f32;
        }
        let kept = (self.context / wavelength - self.low) / (self.high - self.low);
        (1.0 / ((1.0 - kept) / self.factor + kept)) as f32
    }
}

/// YaRN (Peng et al., arXiv 2309.00071): pairs that turn often within the first context keep
/// their frequency, those that turn seldom are stretched by `factor`, those between blended
/// (`_compute_yarn_parameters` of transformers).
pub(super) struct Yarn {
    pub factor: f64,
    /// Positions of the first context.
    pub original: f64,
    /// Turns within it from which on a frequency is kept.
    pub fast: f64,
    /// Turns up to which it is stretched whole.
    pub slow: f64,
    /// Whether the bounds are whole pairs.
    pub truncate: bool,
}

impl Yarn {
    /// The last pair that is kept, and the first one that is stretched whole.
    pub fn bounds(&self, theta: f64, dimensions: u64) -> Result<(f64, f64), Fault> {
        for (what, value) in [
            ("RoPE scaling factor", self.factor),
            ("beta_fast", self.fast),
            ("beta_slow", self.slow),
        ] {
            positive(what, value)?;
        }
        let width = dimensions as f64;
        let bound =
            |turns: f64| width * (self.original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (bound(self.fast), bound(self.slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = if low > 0.0 { low } else { 0.0 };
        let mut high = if high < width - 1.0 { high } else { width - 1.0 };
        if low == high {
            high += 0.001;
        }
        Ok((low, high))
    }

    pub fn factors(&self, dimensions: u64, low: f64, high: f64) -> Vec<f32> {
        let factor = |pair: u64| {
            let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / (stretched / self.factor + (1.0 - stretched))) as f32
        };
        (0..dimensions / 2).map(factor).collect()
    }

    /// What sine and cosine are multiplied by, so that attention stays as sharp.
    pub fn magnitude(&self, scale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * scale * self.factor.ln() + 1.0 }
    }
}

/// A value as its file has it, cut short.
fn written(value: &Value) -> String {
    shown(&value.to_string()).to_string()
}

/// An object of the file, and which of its keys were read.
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// Where it stands, with a dot at its end.
    within: String,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, within: String) -> Keys<'a> {
        Keys { map, within, read: RefCell::default() }
    }

    /// The names of its keys.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        let map = self.map;
        map.keys().map(String::as_str)
    }

    /// The value of a key; null is none.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, value: &Value, what: &str) -> Fault {
        let within = &self.within;
        Fault::malformed(
            format!("config.json: `{within}{key}` is {}, not {what}", written(value)),
            FETCH_AGAIN,
        )
    }

    pub(super) fn whole(&self, key: &str) -> Result<Option<u64>, Fault> {
        let whole = |value: &Value| {
            let whole = value.as_f64().filter(|number| number.fract() == 0.0 && *number >= 0.0);
            value.as_u64().or(whole.map(|number| number as u64))
        };
        self.as_type(key, "a whole number", whole)
    }

    pub(super) fn required(&self, key: &str) -> Result<u64, Fault> {
        self.whole(key)?.ok_or_else(|| missing_key(key))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Fault> {
        self.as_type(key, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, Fault> {
        self.as_type(key, "true or false", Value::as_bool)
    }

    /// A flag whose null is false, and which is `usual` where the key is absent.
    fn flag_or(&self, key: &str, usual: bool) -> Result<bool, Fault> {
        match self.map.contains_key(key) {
            true => Ok(self.flag(key)?.unwrap_or(false)),
            false => Ok(usual),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, Fault> {
        self.as_type(key, "a text", Value::as_str)
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>, Fault> {
        self.as_type(key, "a list", Value::as_array)
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, Fault> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        let text = |value: &'a Value| {
            value.as_str().ok_or_else(|| self.wrong(key, value, "a list of texts"))
        };
        list.iter().map(text).collect::<Result<_, _>>().map(Some)
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, Fault> {
        let map = self.as_type(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Keys::new(map, format!("{}{key}.", self.within))))
    }

    fn as_type<T>(
        &self,
        key: &str,
        what: &str,
        of: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => of(value).map(Some).ok_or_else(|| self.wrong(key, value, what)),
        }
    }

    /// Refuses what nobody has read and what may change a pass.
    pub(super) fn refuse_unread(&self) -> Result<(), Fault> {
        let read = self.read.borrow();
        let unread = self.map.iter().find(|(key, value)| {
            !read.contains(*key) && !value.is_null() && !changes_nothing(key, value)
        });
        match unread {
            None => Ok(()),
            Some((key, value)) => Err(Fault::unsupported(
                format!(
                    "what `{}{}` = {} asks for in config.json is not known",
                    self.within,
                    shown(key),
                    written(value)
                ),
                "remove the key if it changes no result, or choose another model",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What all of these say in the same way.
    fn with(name: &str, own: Value) -> Vec<u8> {
        let mut all = serde_json::json!({
            "model_type": name, "architectures": ["X"], "attention_dropout": 0.0, "bos_token_id": 1,
            "unk_token_id": 0, "_model_name_or_path": "of the GGUF file that it was read from",
            "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
            "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
            "use_cache": true, "rms_norm_eps": 1e-6
        });
        let (Some(all), Value::Object(own)) = (all.as_object_mut(), own) else { panic!("objects") };
        all.extend(own);
        all.retain(|_, value| *value != Value::String("absent".to_owned()));
        serde_json::to_vec(all).expect("JSON")
    }

    fn read(name: &str, own: Value) -> Config {
        from_hf(&with(name, own), None).expect("a config that is published so").0
    }

    fn refused(name: &str, own: Value) -> String {
        format!("{:?}", from_hf(&with(name, own), None).expect_err("refused"))
    }

    #[test]
    fn published_configs_of_mixtures_are_read() {
        let mixtral = read(
            "mixtral",
            serde_json::json!({
                "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
                "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
                "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
                "rope_theta": 1e6, "router_aux_loss_coef": 0.02, "sliding_window": null,
                "vocab_size": 32000
            }),
        );
        let experts = mixtral.experts.expect("experts");
        assert_eq!((experts.count, experts.ffn, experts.routing.used), (8, 14336, 2));
        // Every block has the window, whatever the types of its layers say.
        for name in ["mixtral", "starcoder2", "qwen3_moe", "mistral"] {
            let own = serde_json::json!({
                "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": 9, "num_hidden_layers": 2,
                "sliding_window": 4, "use_sliding_window": true, "norm_epsilon": 1e-5,
                "layer_types": ["full_attention", "sliding_attention"],
            });
            assert!(refused(name, own).contains("full_attention"), "{name}");
        }
        // As many blocks as a file may claim, and a long list of them.
        let own = serde_json::json!({
            "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 9,
            "num_key_value_heads": 2, "num_hidden_layers": 1 << 24,
            "mlp_only_layers": (0..20_000).collect::<Vec<u32>>()
        });
        assert_eq!(read("qwen3_moe", own).layers, 1 << 24);
        let qwen = read(
            "qwen3_moe",
            serde_json::json!({
                "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
                "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
                "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true,
                "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
                "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
                "rope_scaling": null, "rope_theta": 1e6, "router_aux_loss_coef": 0.001,
                "sliding_window": null, "use_sliding_window": false, "vocab_size": 151936
            }),
        );
        let experts = qwen.experts.expect("experts");
        assert_eq!(experts.routing.scores, RouterScores::SoftmaxOfTaken);
        assert_eq!((experts.count, experts.routing.used, experts.shared), (128, 8, None));
        let older = read(
            "qwen2_moe",
            serde_json::json!({
                "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
                "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
                "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 60,
                "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
                "output_router_logits": false, "rope_theta": 1e6, "router_aux_loss_coef": 0.001,
                "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
                "use_sliding_window": false, "vocab_size": 151936
            }),
        );
        let experts = older.experts.expect("experts");
        assert_eq!(experts.routing.scores, RouterScores::Softmax);
        assert_eq!((experts.shared, experts.gates_shared), (Some(5632), true));
    }

    fn gpt_oss() -> Value {
        serde_json::json!({
            "attention_bias": true, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880,
            "initial_context_length": 4096, "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 131072,
            "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": false,
            "quantization_config": { "modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4" },
            "rms_norm_eps": 1e-5, "rope_scaling": { "beta_fast": 32.0, "beta_slow": 1.0,
                "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
                "truncate": false }, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
            "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088
        })
    }

    #[test]
    fn gpt_oss_is_read_and_what_contradicts_is_named() {
        let config = read("gpt_oss", gpt_oss());
        assert_eq!(config.sliding.window, Some(128));
        assert_eq!(config.sliding.blocks, [true, false]);
        assert_eq!(config.experts.expect("experts").routing.used, 4);
        assert_eq!(config.activation, Activation::ClampedSwiglu);
        for (key, value, words) in [
            ("experts_per_token", 8.0, "experts_per_token` is 8"),
            ("initial_context_length", 2048.0, "initial_context_length` is 2048"),
            ("swiglu_limit", 9.0, "swiglu_limit` is 9"),
            ("num_local_experts", 0.0, "it has 0 experts of width 2880"),
        ] {
            let mut own = gpt_oss();
            own[key] = serde_json::json!(value);
            let said = refused("gpt_oss", own);
            assert!(said.contains(words), "{said}");
        }
        for nothing in [Value::Null, serde_json::json!({})] {
            let mut own = gpt_oss();
            own["rope_scaling"] = nothing;
            assert!(refused("gpt_oss", own).contains("rope_scaling"));
        }
        // transformers takes its own value where only the older key is there.
        let mut own = gpt_oss();
        own.as_object_mut().expect("an object").remove("num_experts_per_tok");
        own["experts_per_token"] = serde_json::json!(2);
        assert!(refused("gpt_oss", own).contains("experts_per_token` is 2"));
    }

    #[test]
    fn deepseek_v3_is_read_with_the_scale_that_yarn_gives_its_scores() {
        let own = serde_json::json!({
            "attention_bias": false, "auto_map": { "AutoConfig": "x" }, "ep_size": 1,
            "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
            "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
            "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
            "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "quantization_config": { "activation_scheme": "dynamic", "fmt": "e4m3",
                "quant_method": "fp8", "weight_block_size": [128, 128] },
            "rope_scaling": { "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn" },
            "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
            "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280
        });
        let config = read("deepseek_v3", own.clone());
        assert_eq!((config.head_dim, config.value_dim()), (192, 128));
        let scale = config.factors.scores.expect("a scale");
        let expected = (0.1 * 40f64.ln() + 1.0).powi(2) / 192f64.sqrt();
        assert!((scale - expected).abs() < 1e-12, "{scale} for {expected}");
        assert!(config.experts_of(2).is_none() && config.experts_of(3).is_some());
        let experts = config.experts.expect("experts");
        assert_eq!(experts.routing.scores, RouterScores::SigmoidNormalised);
        let mut other = own.clone();
        other["topk_method"] = serde_json::json!("greedy");
        assert!(refused("deepseek_v3", other).contains("`greedy`"));
        // Null is false, which is not what holds where the key is absent.
        let mut other = own.clone();
        other["norm_topk_prob"] = Value::Null;
        other["rope_interleave"] = Value::Null;
        other["num_mtp_layers"] = serde_json::json!(1);
        let config = read("deepseek_v3", other);
        assert_eq!(config.rope.layout, RopeLayout::Halves);
        let routing = config.experts.as_ref().expect("experts").routing;
        assert_eq!(routing.scores, RouterScores::Sigmoid);
        // What predicts further tokens is left aside, its scales too.
        for name in ["mlp.gate.weight", "self_attn.o_proj.weight_scale_inv"] {
            let name = format!("model.layers.61.{name}");
            assert!(!super::super::safetensors::counts(&name, &config, false));
        }
        let mut other = own;
        other["n_group"] = serde_json::json!(7);
        assert!(refused("deepseek_v3", other).contains("7 groups"));
    }

    #[test]
    fn qwen3_next_stablelm_and_starcoder2_are_read_as_published() {
        let next = read(
            "qwen3_next",
            serde_json::json!({
                "attention_bias": false, "decoder_sparse_step": 1, "full_attention_interval": 4,
                "head_dim": 256, "hidden_size": 2048, "intermediate_size": 5120,
                "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
                "linear_num_value_heads": 32, "linear_value_head_dim": 128,
                "max_position_embeddings": 262144, "mlp_only_layers": [], "moe_intermediate_size": 512,
                "norm_topk_prob": true, "num_attention_heads": 16, "num_experts": 512,
                "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
                "output_router_logits": false, "partial_rotary_factor": 0.25, "rope_scaling": null,
                "rope_theta": 1e7, "router_aux_loss_coef": 0.001,
                "shared_expert_intermediate_size": 512, "use_sliding_window": false,
                "vocab_size": 151936
            }),
        );
        assert!(next.delta_of(2).is_some() && next.delta_of(3).is_none());
        assert_eq!(next.rope.dimensions, 64);
        let other = serde_json::json!({
            "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 9,
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "attention"],
            "sliding_window": 4096, "hidden_act": "gelu_pytorch_tanh"
        });
        assert!(refused("qwen3_next", other.clone()).contains("gelu_pytorch_tanh"));
        let mut silu = other;
        silu["hidden_act"] = serde_json::json!("silu");
        assert!(read("qwen3_next", silu).delta_of(1).is_none());
        let stable = serde_json::json!({
            "hidden_size": 2048, "intermediate_size": 5632, "layer_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 24,
            "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000,
            "rms_norm_eps": "absent", "use_qkv_bias": true, "vocab_size": 100352
        });
        assert_eq!(read("stablelm", stable.clone()).rope.dimensions, 16);
        let of = |config: Config| (config.ffn_norm, config.head_norms);
        let usual = of(read("stablelm", stable.clone()));
        assert_eq!(usual, (Presence::Always, Presence::Never));
        let mut parallel = stable;
        parallel["use_parallel_residual"] = Value::Bool(true);
        parallel["qk_layernorm"] = Value::Bool(true);
        let other = of(read("stablelm", parallel));
        assert_eq!(other, (Presence::Never, Presence::Always));
        let star = serde_json::json!({
            "activation_function": "gelu", "attention_softmax_in_fp32": true,
            "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072,
            "intermediate_size": 12288, "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-5,
            "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30,
            "num_key_value_heads": 2, "residual_dropout": 0.1, "rope_theta": 999_999.44,
            "rms_norm_eps": "absent", "scale_attention_softmax_in_fp32": true,
            "scale_attn_weights": true, "sliding_window": 4096, "tie_word_embeddings": true,
            "use_bias": true, "vocab_size": 49152
        });
        let config = read("starcoder2", star.clone());
        assert_eq!((config.activation, config.sliding.window), (Activation::GeluTanh, Some(4096)));
        let mut other = star;
        other["layer_norm_epsilon"] = serde_json::json!(1e-6);
        assert!(refused("starcoder2", other).contains("layer_norm_epsilon"));
    }
}
