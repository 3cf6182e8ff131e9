//! Which sites a model's forward pass makes, in their order, and what each op reads.
//!
//! The same decisions as [`forward`](super::forward::forward) makes, which a test holds it to.
//! It computes nothing.

use crate::dtype::Format;
use crate::model::{Architecture, Model};
use crate::op::{LAYER_SITES, Site, in_layer};

/// Whether a block's pass makes a site, by its name within the block.
fn is_made(model: &Model, kv_cache: Option<Format>, layer: usize, inner: &str) -> bool {
    let config = model.config();
    let has = |name: &str| model.has(&format!("blk.{layer}.{name}.weight"));
    match inner {
        "attn_norm" | "ffn_norm" => has(inner),
        "lin_qkvz" | "lin_ba" | "lin_conv" | "lin_gates" | "lin_delta" | "lin_norm"
        | "lin_gated" => config.delta_of(layer).is_some(),
        "q" | "k" | "v" | "q_rope" | "k_rope" | "k_cache" | "v_cache" | "kv_a_cache" | "attn"
        | "attn_gated"
            if config.delta_of(layer).is_some() =>
        {
            false
        }
        "attn_gated" => config.architecture.gates_attention(),
        "q_norm" => has("attn_q_norm"),
        "k_norm" => has("attn_k_norm"),
        "q_rope" | "k_rope" => config.rope_of(layer).is_some(),
        "q_a" | "q_a_norm" => config.latent.is_some_and(|latent| latent.queries.is_some()),
        "kv_a" | "kv_a_norm" | "kv" => config.latent.is_some(),
        "kv_a_cache" => kv_cache.is_some() && config.latent.is_some(),
        "k_cache" => kv_cache.is_some(),
        "v_cache" => kv_cache.is_some() && config.latent.is_none(),
        "k" | "v" => config.latent.is_none(),
        "ffn_router" | "ffn_route" | "ffn_mix" => config.experts_of(layer).is_some(),
        "ffn_gate" | "ffn_swiglu" => config.architecture.is_gated(),
        "ffn_act" => !config.architecture.is_gated(),
        "ffn_shared_gate" | "ffn_shared_up" | "ffn_shared_swiglu" | "ffn_shared_down"
        | "ffn_out" => config.experts_of(layer).is_some_and(|experts| experts.shared.is_some()),
        "ffn_shared_router" | "ffn_shared_gated" => {
            config.experts_of(layer).is_some_and(|experts| experts.gates_shared)
        }
        "attn_post_norm" => has("post_attention_norm"),
        "ffn_post_norm" => has("post_ffw_norm"),
        "attn_scaled" | "ffn_scaled" => config.factors.residual.is_some(),
        _ => LAYER_SITES.contains(&inner),
    }
}

/// Whether a block's feed-forward network reads what its attention reads, and is added beside it:
/// in a StableLM that gives it no norm of its own.
pub fn is_parallel(model: &Model, layer: usize) -> bool {
    let normed = || model.has(&format!("blk.{layer}.ffn_norm.weight"));
    model.config().architecture == Architecture::StableLm && !normed()
}

/// Whether the embedded tokens are scaled.
fn scales_embedding(model: &Model) -> bool {
    model.config().factors.embedding.is_some()
}

/// The sites from the output matrix's product to the logits, in their order.
pub fn after_output(model: &Model) -> &'static [&'static str] {
    let config = model.config();
    match (config.factors.logits_divisor.is_some(), config.caps.logits.is_some()) {
        (false, false) => &["logits"],
        (true, true) => &["logits_raw", "logits_scaled", "logits"],
        _ => &["logits_raw", "logits"],
    }
}

/// The sites of a forward pass whose attention keeps keys and values in a type of its own where one
/// is given, in the order of the flow.
pub fn sites(model: &Model, kv_cache: Option<Format>) -> impl Iterator<Item = Site> + '_ {
    let one = |name: &str| Site(name.to_owned());
    let scaled = scales_embedding(model).then(|| one("embed_scaled"));
    let first = [one("embed")].into_iter().chain(scaled);
    let layers = (0..model.config().layers).flat_map(move |layer| {
        let made = LAYER_SITES.iter().filter(move |inner| is_made(model, kv_cache, layer, inner));
        made.map(move |inner| Site(format!("blk.{layer}.{inner}")))
    });
    let last = after_output(model).iter().map(move |name| one(name));
    first.chain(layers).chain([one("output_norm")]).chain(last)
}

/// The sites that the op of a model's forward pass reads to make a site; none for the embedding and
/// for sites that no forward pass makes. Nor for the last norm: who asks looks within a block.
pub fn read_by(model: &Model, kv_cache: Option<Format>, site: &Site) -> Vec<Site> {
    let is_made = |model: &Model, layer, inner: &str| is_made(model, kv_cache, layer, inner);
    let named = |name: &str| vec![Site(name.to_owned())];
    let Some((layer, inner)) = in_layer(&site.0) else {
        let last = after_output(model);
        return match last.iter().position(|name| *name == site.0) {
            Some(0) => named("output_norm"),
            Some(place) => named(last[place - 1]),
            None if site.0 == "embed_scaled" => named("embed"),
            None => Vec::new(),
        };
    };
    let block = layer as usize;
    let here = |name: &str| Site(format!("blk.{layer}.{name}"));
    // The last one of several that the block makes; the first one stands always.
    let last = |names: &[&str]| {
        let made = names.iter().rev().find(|name| is_made(model, block, name));
        here(made.unwrap_or(&names[0]))
    };
    let stream = match layer.checked_sub(1) {
        Some(before) => Site(format!("blk.{before}.ffn_residual")),
        None if scales_embedding(model) => Site("embed_scaled".to_owned()),
        None => Site("embed".to_owned()),
    };
    let normed = |name: &str, stream: Site| {
        vec![if is_made(model, block, name) { here(name) } else { stream }]
    };
    let routes = || Some(here("ffn_route")).filter(|_| is_made(model, block, "ffn_route"));
    match inner {
        "attn_norm" => vec![stream],
        "q_a" | "kv_a" => normed("attn_norm", stream),
        "q_a_norm" => vec![here("q_a")],
        "kv_a_norm" => vec![here("kv_a")],
        "kv_a_cache" => vec![here("kv_a_norm")],
        "kv" => vec![last(&["kv_a_norm", "kv_a_cache"])],
        "q" if is_made(model, block, "q_a_norm") => vec![here("q_a_norm")],
        "q" | "k" | "v" => normed("attn_norm", stream),
        "q_norm" => vec![here("q")],
        "k_norm" => vec![here("k")],
        "q_rope" => vec![last(&["q", "q_norm"])],
        "k_rope" if is_made(model, block, "kv_a") => vec![here("kv_a")],
        "k_rope" => vec![last(&["k", "k_norm"])],
        "k_cache" if is_made(model, block, "kv") => vec![last(&["kv_a", "k_rope"])],
        "k_cache" => vec![last(&["k", "k_norm", "k_rope"])],
        "v_cache" => vec![here("v")],
        "attn" if is_made(model, block, "kv") => {
            vec![last(&["q", "q_rope"]), here("kv"), last(&["kv_a", "k_rope", "k_cache"])]
        }
        "attn" => vec![
            last(&["q", "q_norm", "q_rope"]),
            last(&["k", "k_norm", "k_rope", "k_cache"]),
            last(&["v", "v_cache"]),
        ],
        "attn_gated" => vec![here("attn"), here("q")],
        "attn_out" if is_made(model, block, "lin_gated") => vec![here("lin_gated")],
        "attn_out" => vec![last(&["attn", "attn_gated"])],
        "lin_qkvz" | "lin_ba" => normed("attn_norm", stream),
        "lin_conv" => vec![here("lin_qkvz")],
        "lin_gates" => vec![here("lin_ba")],
        "lin_delta" => vec![here("lin_conv"), here("lin_gates")],
        "lin_norm" => vec![here("lin_delta")],
        "lin_gated" => vec![here("lin_qkvz"), here("lin_norm")],
        "attn_post_norm" => vec![here("attn_out")],
        "attn_scaled" => vec![last(&["attn_out", "attn_post_norm"])],
        "attn_residual" => vec![stream, last(&["attn_out", "attn_post_norm", "attn_scaled"])],
        "ffn_norm" => vec![here("attn_residual")],
        "ffn_gate" | "ffn_up" if is_parallel(model, block) => vec![here("attn_norm")],
        "ffn_router" | "ffn_shared_router" | "ffn_shared_gate" | "ffn_shared_up" => {
            normed("ffn_norm", here("attn_residual"))
        }
        "ffn_route" => vec![here("ffn_router")],
        "ffn_gate" | "ffn_up" => {
            let mut read = normed("ffn_norm", here("attn_residual"));
            read.extend(routes());
            read
        }
        "ffn_swiglu" => vec![here("ffn_gate"), here("ffn_up")],
        "ffn_act" => vec![here("ffn_up")],
        "ffn_down" => {
            let mut read = vec![last(&["ffn_swiglu", "ffn_act"])];
            read.extend(routes());
            read
        }
        "ffn_mix" => vec![here("ffn_down"), here("ffn_route")],
        "ffn_shared_swiglu" => vec![here("ffn_shared_gate"), here("ffn_shared_up")],
        "ffn_shared_down" => vec![here("ffn_shared_swiglu")],
        "ffn_shared_gated" => vec![here("ffn_shared_down"), here("ffn_shared_router")],
        "ffn_out" => vec![here("ffn_mix"), last(&["ffn_shared_down", "ffn_shared_gated"])],
        "ffn_post_norm" => vec![last(&["ffn_down", "ffn_mix", "ffn_out"])],
        "ffn_scaled" => vec![last(&["ffn_down", "ffn_mix", "ffn_out", "ffn_post_norm"])],
        "ffn_residual" => {
            let branch = ["ffn_down", "ffn_mix", "ffn_out", "ffn_post_norm", "ffn_scaled"];
            vec![here("attn_residual"), last(&branch)]
        }
        _ => Vec::new(),
    }
}
