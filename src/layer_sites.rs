//! The sites of a transformer block, one row each, in the order in which a forward pass makes them:
//! the name, what a block must have for it, and which sites its op reads.
//!
//! What a model has, `compute/flow.rs` knows, and what an op computes, `compute/forward.rs`.

use Has::{
    Attention, DeltaNet, Experts, Gate, GatesAttention, GatesShared, Latent, NarrowCache, NoGate,
    NoLatent, OneBranch, Parallel, QueryLatent, ScalesResidual, Shared, Turns, Weight,
};
use Read::{Last, When};

/// What the block before left, or the embedding.
pub const STREAM: &str = "the stream";

/// A site of a block.
pub struct LayerSite {
    /// Its name within the block.
    pub name: &'static str,
    /// What a block must have so that its pass makes it.
    pub made: &'static [Has],
    /// What its op reads.
    pub reads: &'static [Read],
}

/// What a block may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Has {
    /// A weight of that name.
    Weight(&'static str),
    /// Attention, and no gated delta net.
    Attention,
    /// A gated delta net.
    DeltaNet,
    /// Latent attention.
    Latent,
    /// No latent attention.
    NoLatent,
    /// Latent attention whose queries come out of a narrow vector too.
    QueryLatent,
    /// Queries and keys that RoPE turns.
    Turns,
    /// A gate for each value of attention.
    GatesAttention,
    /// A cache of keys and values in a type of its own.
    NarrowCache,
    /// A factor of what is added to the residual stream.
    ScalesResidual,
    /// Attention and feed-forward network side by side.
    Parallel,
    /// One after the other.
    OneBranch,
    /// A feed-forward network with a gate.
    Gate,
    /// One without.
    NoGate,
    /// A mixture of experts.
    Experts,
    /// An expert that all tokens go through.
    Shared,
    /// A gate of that expert.
    GatesShared,
}

/// One of the sites that an op reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// The last one of these that the block makes; the first one stands always.
    Last(&'static [&'static str]),
    /// The same, in a block that has this.
    When(Has, &'static [&'static str]),
}

const fn site(name: &'static str, made: &'static [Has], reads: &'static [Read]) -> LayerSite {
    LayerSite { name, made, reads }
}

/// All of them.
pub const ROWS: [LayerSite; 48] = [
    site("attn_norm", &[Weight("attn_norm")], &[Last(&[STREAM])]),
    site("lin_qkvz", &[DeltaNet], &[Last(&[STREAM, "attn_norm"])]),
    site("lin_ba", &[DeltaNet], &[Last(&[STREAM, "attn_norm"])]),
    site("lin_conv", &[DeltaNet], &[Last(&["lin_qkvz"])]),
    site("lin_gates", &[DeltaNet], &[Last(&["lin_ba"])]),
    site("lin_delta", &[DeltaNet], &[Last(&["lin_conv"]), Last(&["lin_gates"])]),
    site("lin_norm", &[DeltaNet], &[Last(&["lin_delta"])]),
    site("lin_gated", &[DeltaNet], &[Last(&["lin_qkvz"]), Last(&["lin_norm"])]),
    site("q_a", &[QueryLatent], &[Last(&[STREAM, "attn_norm"])]),
    site("q_a_norm", &[QueryLatent], &[Last(&["q_a"])]),
    site("q", &[Attention], &[Last(&[STREAM, "attn_norm", "q_a_norm"])]),
    site("kv_a", &[Latent], &[Last(&[STREAM, "attn_norm"])]),
    site("kv_a_norm", &[Latent], &[Last(&["kv_a"])]),
    site("kv_a_cache", &[Attention, NarrowCache, Latent], &[Last(&["kv_a_norm"])]),
    site("kv", &[Latent], &[Last(&["kv_a_norm", "kv_a_cache"])]),
    site("k", &[Attention, NoLatent], &[Last(&[STREAM, "attn_norm"])]),
    site("v", &[Attention, NoLatent], &[Last(&[STREAM, "attn_norm"])]),
    site("q_norm", &[Weight("attn_q_norm")], &[Last(&["q"])]),
    site("k_norm", &[Weight("attn_k_norm")], &[Last(&["k"])]),
    site("q_rope", &[Attention, Turns], &[Last(&["q", "q_norm"])]),
    site("k_rope", &[Attention, Turns], &[Last(&["k", "k_norm", "kv_a"])]),
    site("k_cache", &[Attention, NarrowCache], &[Last(&["k", "k_norm", "kv_a", "k_rope"])]),
    site("v_cache", &[Attention, NarrowCache, NoLatent], &[Last(&["v"])]),
    site(
        "attn",
        &[Attention],
        &[
            Last(&["q", "q_norm", "q_rope"]),
            When(NoLatent, &["k", "k_norm", "k_rope", "k_cache"]),
            When(NoLatent, &["v", "v_cache"]),
            When(Latent, &["kv"]),
            When(Latent, &["kv_a", "k_rope", "k_cache"]),
        ],
    ),
    site("attn_gated", &[Attention, GatesAttention], &[Last(&["attn"]), Last(&["q"])]),
    site("attn_out", &[], &[Last(&["attn", "attn_gated", "lin_gated"])]),
    site("attn_post_norm", &[Weight("post_attention_norm")], &[Last(&["attn_out"])]),
    site("attn_scaled", &[ScalesResidual], &[Last(&["attn_out", "attn_post_norm"])]),
    site(
        "attn_residual",
        &[],
        &[Last(&[STREAM]), Last(&["attn_out", "attn_post_norm", "attn_scaled"])],
    ),
    site("ffn_norm", &[Weight("ffn_norm")], &[Last(&["attn_residual"])]),
    site("ffn_router", &[Experts], &[Last(&["attn_residual", "ffn_norm"])]),
    site("ffn_route", &[Experts], &[Last(&["ffn_router"])]),
    site("ffn_gate", &[Gate], OF_FFN),
    site("ffn_up", &[], OF_FFN),
    site("ffn_swiglu", &[Gate], &[Last(&["ffn_gate"]), Last(&["ffn_up"])]),
    site("ffn_act", &[NoGate], &[Last(&["ffn_up"])]),
    site("ffn_down", &[], &[Last(&["ffn_swiglu", "ffn_act"]), When(Experts, &["ffn_route"])]),
    site("ffn_mix", &[Experts], &[Last(&["ffn_down"]), Last(&["ffn_route"])]),
    site("ffn_shared_gate", &[Shared], &[Last(&["attn_residual", "ffn_norm"])]),
    site("ffn_shared_up", &[Shared], &[Last(&["attn_residual", "ffn_norm"])]),
    site("ffn_shared_swiglu", &[Shared], &[Last(&["ffn_shared_gate"]), Last(&["ffn_shared_up"])]),
    site("ffn_shared_down", &[Shared], &[Last(&["ffn_shared_swiglu"])]),
    site("ffn_shared_router", &[GatesShared], &[Last(&["attn_residual", "ffn_norm"])]),
    site(
        "ffn_shared_gated",
        &[GatesShared],
        &[Last(&["ffn_shared_down"]), Last(&["ffn_shared_router"])],
    ),
    site(
        "ffn_out",
        &[Shared],
        &[Last(&["ffn_mix"]), Last(&["ffn_shared_down", "ffn_shared_gated"])],
    ),
    site("ffn_post_norm", &[Weight("post_ffw_norm")], &[Last(&["ffn_down", "ffn_mix", "ffn_out"])]),
    site(
        "ffn_scaled",
        &[ScalesResidual],
        &[Last(&["ffn_down", "ffn_mix", "ffn_out", "ffn_post_norm"])],
    ),
    site(
        "ffn_residual",
        &[],
        &[
            Last(&["attn_residual"]),
            Last(&["ffn_down", "ffn_mix", "ffn_out", "ffn_post_norm", "ffn_scaled"]),
        ],
    ),
];

/// What the products of the feed-forward network read.
const OF_FFN: &[Read] = &[
    When(Parallel, &["attn_norm"]),
    When(OneBranch, &["attn_residual", "ffn_norm"]),
    When(Experts, &["ffn_route"]),
];

/// Their names.
pub const LAYER_SITES: [&str; ROWS.len()] = {
    let mut names = [""; ROWS.len()];
    let mut place = 0;
    while place < names.len() {
        names[place] = ROWS[place].name;
        place += 1;
    }
    names
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_reads_what_stands_before_it() {
        for (place, row) in ROWS.iter().enumerate() {
            for read in row.reads {
                let (Last(names) | When(_, names)) = read;
                let stands = |name: &&str| *name == STREAM || LAYER_SITES[..place].contains(name);
                assert!(!names.is_empty() && names.iter().all(stands), "{}: {names:?}", row.name);
            }
        }
    }
}
