//! Tensors of a GGUF file that hold several of a block's, one below the other.
//!
//! llama.cpp keeps all experts of a block in one tensor, their biases in another, the gate of a
//! GLM 4 and a Phi 3 above the other projection, and queries, keys and values of a Phi 3 below one
//! another. One table says which; the reader cuts by it, and the generator of synthetic models
//! joins by it. It also knows which tensors have another name than elsewhere. It knows names and
//! rows, no values.

use std::collections::BTreeMap;

use super::Place;
use super::architecture::{Architecture, Presence};
use super::config::Config;
use super::error::{FETCH_AGAIN, Fault};
use super::gguf::TensorInfo;

/// What stands in a fused tensor.
pub(super) struct Fused {
    /// Canonical names within the block, the topmost first, each with its rows.
    pub parts: Vec<(String, usize)>,
    /// Width of all of them.
    pub width: usize,
    /// Matrices that the file's shape tells apart: the experts; else 1.
    pub depth: usize,
}

/// The names that fused tensors have within a block.
pub(super) const NAMES: [&str; 8] = [
    "attn_qkv.weight",
    "ffn_gate_exps.weight",
    "ffn_up_exps.weight",
    "ffn_down_exps.weight",
    "ffn_gate_exps.bias",
    "ffn_up_exps.bias",
    "ffn_down_exps.bias",
    "ffn_up.weight",
];

/// What llama.cpp calls the norm before the feed-forward network in these architectures.
const OTHER_FFN_NORM: &str = "post_attention_norm.weight";

/// Gives tensors the names that a pass knows them by.
///
/// # Errors
/// If a tensor has such a name already, which llama.cpp has no use for.
pub(super) fn rename(
    tensors: &mut BTreeMap<String, Place>,
    architecture: Architecture,
) -> Result<(), Fault> {
    if !matches!(architecture, Architecture::GptOss | Architecture::Qwen3Next) {
        return Ok(());
    }
    let inner = |name: &String| crate::op::in_layer(name).map(|(_, inner)| inner.to_owned());
    if let Some(name) =
        tensors.keys().find(|name| inner(name).as_deref() == Some("ffn_norm.weight"))
    {
        return Err(Fault::unsupported(
            format!("llama.cpp calls it `{OTHER_FFN_NORM}` in this architecture"),
            "convert the model anew",
        )
        .in_tensor(name.clone()));
    }
    let named = |name: &&String| inner(name).as_deref() == Some(OTHER_FFN_NORM);
    let names: Vec<String> = tensors.keys().filter(named).cloned().collect();
    for name in names {
        if let Some(place) = tensors.remove(&name) {
            tensors.insert(name.replace(OTHER_FFN_NORM, "ffn_norm.weight"), place);
        }
    }
    Ok(())
}

/// What a tensor of this name holds, where it holds several.
pub(super) fn parts(inner: &str, config: &Config) -> Option<Fused> {
    let hidden = config.hidden;
    match (inner, &config.experts) {
        ("ffn_gate_exps.weight" | "ffn_up_exps.weight" | "ffn_down_exps.weight", Some(of)) => {
            let stem = inner.trim_end_matches(".weight");
            let (rows, width) = match stem {
                "ffn_down_exps" => (hidden, of.ffn),
                _ => (of.ffn, hidden),
            };
            let name = |expert: usize| (format!("{stem}.{expert}.weight"), rows);
            let parts = (0..of.count).map(name).collect();
            Some(Fused { parts, width, depth: of.count })
        }
        ("ffn_gate_exps.bias" | "ffn_up_exps.bias" | "ffn_down_exps.bias", Some(of))
            if config.biases.ffn != Presence::Never =>
        {
            let stem = inner.trim_end_matches(".bias");
            let width = if stem == "ffn_down_exps" { hidden } else { of.ffn };
            let parts = (0..of.count).map(|expert| (format!("{stem}.{expert}.bias"), 1)).collect();
            Some(Fused { parts, width, depth: 1 })
        }
        ("attn_qkv.weight", _) if config.architecture == Architecture::Phi3 => {
            let [queries, keys] = [config.heads, config.kv_heads].map(|n| n * config.head_dim);
            let parts = [("attn_q", queries), ("attn_k", keys), ("attn_v", keys)];
            let parts = parts.map(|(name, rows)| (format!("{name}.weight"), rows));
            Some(Fused { parts: parts.into(), width: hidden, depth: 1 })
        }
        ("ffn_up.weight", _)
            if matches!(config.architecture, Architecture::Glm4 | Architecture::Phi3) =>
        {
            let parts = ["ffn_gate.weight", "ffn_up.weight"].map(|n| (n.to_owned(), config.ffn));
            Some(Fused { parts: parts.into(), width: hidden, depth: 1 })
        }
        _ => None,
    }
}

/// Cuts fused tensors into their parts.
///
/// # Errors
/// If a shape is not that of the hyperparameters, or a part stands beside the whole.
pub(super) fn cut<'t>(
    tensors: &mut BTreeMap<String, Place>,
    infos: impl Iterator<Item = &'t TensorInfo>,
    config: &Config,
) -> Result<(), Fault> {
    for info in infos {
        let bad = |problem: String| {
            Err(Fault::malformed(problem, FETCH_AGAIN).in_tensor(info.name.clone()))
        };
        let Some((layer, inner)) = crate::op::in_layer(&info.name) else { continue };
        if config.experts.is_some() && inner.contains("_exps.") && inner.matches('.').count() > 1 {
            return bad("a GGUF file holds all experts of a block in one tensor".to_owned());
        }
        let Some(Fused { parts, width, depth }) = parts(inner, config) else { continue };
        let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
        if depth > 1 || inner.contains("_exps.") {
            let fits = (info.depth, info.rows, info.width) == (depth, rows, width);
            if !fits || layer as usize >= config.layers {
                let (given, each) = (info.depth, info.rows / info.depth.max(1));
                return bad(format!(
                    "it is [{given}, {each}, {}], but the hyperparameters make it [{depth}, {}, \
                     {width}]",
                    info.width,
                    rows / depth
                ));
            }
        }
        let Some(whole) = tensors.remove(&info.name) else { continue };
        if (whole.rows, whole.width) != (rows, width) {
            return bad(format!(
                "it is [{}, {}], but the hyperparameters make it [{rows}, {width}]",
                whole.rows, whole.width
            ));
        }
        let row_bytes = whole.bytes.len() / rows;
        let mut start = whole.bytes.start;
        for (name, rows) in parts {
            let bytes = start..start + rows * row_bytes;
            start = bytes.end;
            let place = Place { rows, bytes, ..whole.clone() };
            if tensors.insert(format!("blk.{layer}.{name}"), place).is_some() {
                return bad("what is fused in it stands beside it too".to_owned());
            }
        }
    }
    Ok(())
}
