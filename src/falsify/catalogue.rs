//! The bugs that are planted, as data: what it is, where it lives, and the cause
//! that a reader must be told.
//!
//! Those marked public stood in bug reports of inference engines. How each is
//! planted is `plant.rs`.

use super::plant::Plant;
use crate::dtype::Format;
use crate::op::Recipe;

/// One bug.
#[derive(Clone, Copy, Debug)]
pub struct Bug {
    /// Its name.
    pub name: &'static str,
    /// The causes that name it rightly, the best first.
    pub causes: &'static [&'static str],
    /// The sites whose op it spoils, by their names within a layer.
    pub at: &'static [&'static str],
    /// How it is planted.
    pub plant: Plant,
    /// Whether it exists with FP8 operands only.
    pub fp8: bool,
    /// Whether it exists with operands of 8 bits only, FP8 or integers, whose scales are values beside
    /// the codes.
    pub scaled: bool,
    /// Whether it exists with integers only.
    pub int8: bool,
    /// Whether it exists with block-scaled operands only.
    pub blocks: bool,
    /// Whether it needs an earlier layer.
    pub after_layer_0: bool,
    /// Whether it shows only where the prompt stands in a longer batch.
    pub in_batch: bool,
    /// Whether it was reported in public.
    pub public: bool,
}

const fn bug(
    name: &'static str,
    causes: &'static [&'static str],
    at: &'static [&'static str],
    plant: Plant,
) -> Bug {
    Bug {
        name,
        causes,
        at,
        plant,
        fp8: false,
        scaled: false,
        int8: false,
        blocks: false,
        after_layer_0: false,
        in_batch: false,
        public: false,
    }
}

impl Bug {
    const fn fp8(self) -> Bug {
        Bug { fp8: true, ..self }
    }

    const fn scaled(self) -> Bug {
        Bug { scaled: true, ..self }
    }

    const fn int8(self) -> Bug {
        Bug { int8: true, ..self }
    }

    const fn blocks(self) -> Bug {
        Bug { blocks: true, ..self }
    }

    /// Whether operands of this recipe can have it.
    pub fn may_be_in(&self, recipe: &Recipe) -> bool {
        let of_blocks = recipe.blocks().is_some();
        (!self.fp8 || recipe.gemm.is_fp8() && !of_blocks)
            && (!self.scaled || recipe.gemm.is_scaled() && !of_blocks)
            && (!self.int8 || recipe.gemm == Format::Int8)
            && (!self.blocks || of_blocks)
    }

    const fn after_layer_0(self) -> Bug {
        Bug { after_layer_0: true, ..self }
    }

    const fn in_batch(self) -> Bug {
        Bug { in_batch: true, ..self }
    }

    const fn public(self) -> Bug {
        Bug { public: true, ..self }
    }
}

const GEMMS: &[&str] = &["q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_down"];
const LONG: &[&str] = &["ffn_down"];
const ANY_GEMM: &[&str] = &["q", "attn_out", "ffn_up", "ffn_down", "logits"];
const NORMS: &[&str] = &["attn_norm", "ffn_norm", "output_norm"];
const ROPES: &[&str] = &["q_rope", "k_rope"];
const Q_ROPE: &[&str] = &["q_rope"];
const ADDS: &[&str] = &["attn_residual", "ffn_residual"];
const GAINS: &[&str] = &[
    "attn_norm",
    "ffn_norm",
    "attn_post_norm",
    "ffn_post_norm",
    "q_norm",
    "k_norm",
    "output_norm",
];
const SCALED: &[&str] = &["embed_scaled", "attn_scaled", "ffn_scaled", "logits_scaled", "logits"];
const CACHES: &[&str] = &["k_cache", "v_cache", "kv_a_cache"];
const BIASED: &[&str] = &["q", "k", "v"];
const DEALT_OUT: &[&str] = &["attn_out", "ffn_down"];

/// All bugs.
pub const CATALOGUE: &[Bug] = &[
    // Scales.
    bug("activation scale 2 % too large", &["scale-wrong"], GEMMS, Plant::XScale(1.02)).scaled(),
    bug("weight scale 10 % too small", &["scale-wrong"], GEMMS, Plant::WScale(0.9)).scaled(),
    bug("output times 0.72", &["scale-wrong"], ANY_GEMM, Plant::Times(0.72)).public(),
    bug("output with the wrong sign", &["scale-wrong"], ANY_GEMM, Plant::Times(-1.0)).public(),
    bug("activation scale not applied", &["scale-missing"], GEMMS, Plant::XScaleMissing).scaled(),
    bug("weight scale not applied", &["scale-missing"], GEMMS, Plant::WScaleMissing).scaled(),
    bug("activation scale applied twice", &["scale-twice"], GEMMS, Plant::XScaleTwice).scaled(),
    bug("activation scale halved: codes saturate", &["saturated"], GEMMS, Plant::XSaturated(0.5))
        .scaled(),
    bug("weight scale quartered: codes saturate", &["saturated"], GEMMS, Plant::WSaturated(0.25))
        .scaled(),
    bug(
        "activation scale 16 times too large",
        &["scale-too-large"],
        GEMMS,
        Plant::XSaturated(16.0),
    )
    .scaled(),
    bug(
        "weight scaled per channel, declared per tensor",
        &["scale-granularity"],
        GEMMS,
        Plant::PerChannel,
    )
    .scaled(),
    bug(
        "activation scaled per token, declared per tensor",
        &["scale-granularity"],
        GEMMS,
        Plant::PerToken,
    )
    .scaled(),
    bug(
        "weight scale rounded up to a power of two, codes kept",
        &["scale-power-of-two", "scale-wrong"],
        GEMMS,
        Plant::WPowerOfTwo,
    )
    .scaled()
    .public(),
    bug(
        "activation scale rounded up to a power of two, codes kept",
        &["scale-power-of-two", "scale-wrong"],
        GEMMS,
        Plant::XPowerOfTwo,
    )
    .scaled()
    .public(),
    bug(
        "activation cast without saturation by a scale that is set beforehand",
        &["cast-without-saturation"],
        GEMMS,
        Plant::XUnsaturated(0.5),
    )
    .fp8()
    .public(),
    bug(
        "integers wrap by a scale that is set beforehand",
        &["int8-wrapped"],
        GEMMS,
        Plant::XWrapped(0.5),
    )
    .int8()
    .public(),
    bug(
        "weight scaled to 128 steps: -128 is used",
        &["int8-range"],
        GEMMS,
        Plant::WSaturated(127.0 / 128.0),
    )
    .int8(),
    bug(
        "zero point of the activation not taken away",
        &["zero-point-ignored"],
        GEMMS,
        Plant::XZeroPointIgnored,
    )
    .int8()
    .public(),
    bug(
        "the two 4-bit codes of each byte of a weight exchanged",
        &["nibble-order"],
        GEMMS,
        Plant::NibblesExchanged,
    )
    .blocks(),
    bug(
        "weight blocks with the scale of the next block",
        &["scale-order"],
        GEMMS,
        Plant::NextBlocksScale,
    )
    .blocks(),
    bug(
        "scale of the whole NVFP4 weight left out",
        &["scale-missing", "scale-wrong"],
        GEMMS,
        Plant::WholeScaleMissing,
    )
    .blocks(),
    bug(
        "activation's powers of two rounded up",
        &["block-scale-rounding"],
        GEMMS,
        Plant::PowersRoundedUp,
    )
    .blocks(),
    bug(
        "weight scales of blocks with another bias",
        &["scale-wrong"],
        GEMMS,
        Plant::ExponentsOneLarger,
    )
    .blocks(),
    bug("weight codes read as e4m3fnuz", &["fp8-fnuz", "scale-wrong"], GEMMS, Plant::WReadAsFnuz)
        .fp8(),
    bug("activation codes clip at 240, as e4m3fnuz", &["fp8-fnuz"], GEMMS, Plant::XClippedAsFnuz)
        .fp8(),
    bug(
        "last block of K with the scale of the block before",
        &["scale-tail"],
        LONG,
        Plant::ScaleTail,
    )
    .fp8(),
    bug(
        "scales of another part of the fused weight",
        &["scale-slice"],
        &["k", "v", "ffn_up"],
        Plant::ScaleSlice,
    )
    .scaled(),
    bug("product of the scales formed in f16", &["scale-product"], GEMMS, Plant::ScaleProduct)
        .scaled()
        .public(),
    bug("zero point of groups of 128 off by one", &["zero-point"], GEMMS, Plant::ZeroPoint(128))
        .public(),
    bug(
        "keys interleaved for the number of query heads",
        &["head-permutation"],
        &["k"],
        Plant::OtherHeads,
    )
    .public(),
    bug("one column times 1.2", &["column-scale"], GEMMS, Plant::Column(1.2)),
    bug("one row times 0.5", &["row-scale"], GEMMS, Plant::Row(0.5)),
    // Conversions.
    bug("activation cast truncates", &["truncating-cast"], GEMMS, Plant::TruncateX),
    bug("weight cast truncates", &["truncating-cast"], GEMMS, Plant::TruncateW),
    bug("both casts truncate", &["truncating-cast"], GEMMS, Plant::TruncateBoth),
    bug("activation subnormals flushed", &["subnormals-flushed"], GEMMS, Plant::FlushX)
        .fp8()
        .public(),
    bug("weight subnormals flushed", &["subnormals-flushed"], GEMMS, Plant::FlushW).fp8(),
    // With a scale for each row its largest code is a NaN of the other format, and so is every sum.
    bug(
        "weight codes read as the other FP8 format",
        &["wrong-fp8-format", "non-finite-output"],
        GEMMS,
        Plant::ReadW,
    )
    .fp8(),
    bug(
        "activation codes read as the other FP8 format",
        &["wrong-fp8-format", "non-finite-output"],
        GEMMS,
        Plant::ReadX,
    )
    .fp8(),
    bug("activations rounded to Q8 blocks of 32", &["quantised-activations"], GEMMS, Plant::Q8(32))
        .public(),
    bug(
        "activations rounded to Q8 blocks of 256",
        &["quantised-activations"],
        GEMMS,
        Plant::Q8(256),
    )
    .public(),
    bug(
        "f16 computed instead of the recipe",
        &["other-format"],
        GEMMS,
        Plant::Computed(Format::F16),
    )
    .public(),
    bug(
        "f32 computed instead of the recipe",
        &["other-format", "not-engaged"],
        GEMMS,
        Plant::Computed(Format::F32),
    ),
    bug(
        "the knob is not engaged: the reference's result",
        &["not-engaged"],
        GEMMS,
        Plant::NotEngaged,
    )
    .public(),
    // Accumulation and outputs.
    bug("the other accumulation", &["other-schedule"], LONG, Plant::OtherAccumulation).fp8(),
    bug("split-K 3", &["other-schedule"], LONG, Plant::SplitK(3)),
    bug("split-K 4, order undeclared", &["other-schedule"], LONG, Plant::SplitK(4)),
    bug(
        "schedule changes from call to call",
        &["non-determinism", "other-schedule"],
        LONG,
        Plant::Alternating,
    )
    .public(),
    bug("output truncated", &["output-truncated"], GEMMS, Plant::OutputTruncated),
    bug("output in f16", &["output-rounded"], GEMMS, Plant::Output(Format::F16)),
    bug("output in f32", &["output-rounded"], GEMMS, Plant::Output(Format::F32)),
    bug(
        "f16 output overflows to infinity",
        &["f16-overflow", "f16-intermediate"],
        LONG,
        Plant::F16Overflow(false),
    )
    .scaled()
    .public(),
    bug(
        "f16 output clips at 65504",
        &["f16-overflow", "f16-intermediate"],
        LONG,
        Plant::F16Overflow(true),
    )
    .scaled()
    .public(),
    // Shapes and indices of GEMMs.
    bug("last 8 of K dropped", &["k-tail-dropped"], GEMMS, Plant::Tail(8)),
    bug("last 32 of K dropped", &["k-tail-dropped"], GEMMS, Plant::Tail(32)),
    bug(
        "one block of 64 of K lost",
        &["k-block-lost", "k-tail-dropped"],
        GEMMS,
        Plant::BlockLost(64),
    ),
    bug("one block of 32 of K counted twice", &["k-block-twice"], GEMMS, Plant::BlockTwice(32)),
    bug("two columns swapped", &["columns-permuted"], GEMMS, Plant::ColumnsSwapped),
    bug("rows shifted by one", &["rows-shifted"], GEMMS, Plant::RowsShifted),
    bug(
        "first and last row swapped",
        &["rows-permuted", "rows-shifted"],
        GEMMS,
        Plant::RowsSwapped,
    ),
    bug("one row written, the rest stale", &["stale-rows"], GEMMS, Plant::StaleRows)
        .after_layer_0()
        .public(),
    bug("a tile of 32 outputs not written", &["unwritten"], GEMMS, Plant::TileUnwritten),
    bug("one lane of every tile of 16 spoilt", &["tile-periodic"], GEMMS, Plant::LaneSpoilt(16)),
    bug("a tile of 64 outputs spoilt", &["one-tile"], GEMMS, Plant::TileSpoilt(64)),
    bug("weight read along the wrong axis", &["transposed-weight"], GEMMS, Plant::Transposed),
    bug("halves of the inner index swapped", &["weight-permuted"], GEMMS, Plant::HalvesSwapped),
    bug(
        "neighbours of the inner index swapped",
        &["weight-permuted"],
        GEMMS,
        Plant::NeighboursSwapped,
    ),
    bug("nibbles of blocks of 32 interleaved", &["weight-permuted"], GEMMS, Plant::Interleaved),
    bug("the previous layer's weight", &["swapped-weight"], GEMMS, Plant::PreviousLayersWeight)
        .after_layer_0(),
    bug(
        "k's weight for v, up's for gate",
        &["swapped-weight"],
        &["v", "ffn_gate"],
        Plant::SistersWeight,
    ),
    // Stale buffers.
    bug("layer 0's converted activation reused", &["stale-input"], GEMMS, Plant::Layer0sInput)
        .after_layer_0()
        .public(),
    bug(
        "the previous layer's activation reused",
        &["stale-input"],
        GEMMS,
        Plant::PreviousLayersInput,
    )
    .after_layer_0()
    .public(),
    bug(
        "the previous layer's output returned",
        &["stale-output"],
        GEMMS,
        Plant::PreviousLayersOutput,
    )
    .after_layer_0(),
    bug(
        "in a longer batch each token gets its neighbour's logits",
        &["batch-dependence"],
        &["logits"],
        Plant::ShiftedInBatch,
    )
    .in_batch()
    .public(),
    // Biases.
    bug("bias missing", &["bias-missing"], BIASED, Plant::BiasMissing),
    bug("bias added twice", &["bias-twice"], BIASED, Plant::BiasTwice),
    bug("the previous layer's bias", &["bias-swapped"], BIASED, Plant::PreviousLayersBias)
        .after_layer_0(),
    // Sums of what several GPUs made.
    bug("a GPU left out of the sum", &["rank-missing"], DEALT_OUT, Plant::RankMissing),
    bug("a GPU added twice", &["rank-twice"], DEALT_OUT, Plant::RankTwice),
    bug(
        "the bias added on every GPU",
        &["bias-on-every-rank", "bias-twice"],
        DEALT_OUT,
        Plant::BiasOnEveryRank,
    ),
    // NaN and infinity.
    bug("one output is NaN", &["non-finite-output"], GEMMS, Plant::Single(f32::NAN)),
    bug(
        "one value of the embedding is NaN",
        &["non-finite-output"],
        &["embed"],
        Plant::Single(f32::NAN),
    ),
    bug(
        "one value of the first norm is NaN",
        &["non-finite-output"],
        &["blk.0.attn_norm"],
        Plant::Single(f32::NAN),
    ),
    bug(
        "one value of the first query is NaN",
        &["non-finite-output"],
        &["blk.0.q"],
        Plant::Single(f32::NAN),
    ),
    bug(
        "one value of the attention is NaN",
        &["non-finite-output"],
        &["attn"],
        Plant::Single(f32::NAN),
    ),
    bug(
        "the largest logit exchanged with another",
        &["columns-permuted"],
        &["logits"],
        Plant::TopSwapped,
    ),
    bug("one value changes from call to call", &["non-determinism"], &["ffn_down"], Plant::Flicker),
    bug("one output is infinite", &["non-finite-output"], GEMMS, Plant::Single(f32::INFINITY)),
    // RMSNorm.
    bug("epsilon 1e-5 for 1e-6 and back", &["epsilon"], NORMS, Plant::OtherEpsilon).public(),
    bug("epsilon 1e-3", &["epsilon"], NORMS, Plant::Epsilon(1e-3)),
    bug("epsilon 1e-3 in the first norm", &["epsilon"], &["blk.0.attn_norm"], Plant::Epsilon(1e-3)),
    bug("epsilon left out", &["epsilon"], NORMS, Plant::Epsilon(0.0)),
    bug("gain offset by one", &["weight-offset"], NORMS, Plant::GainOffset),
    bug("gain not applied", &["gain-ignored"], NORMS, Plant::GainIgnored),
    bug("the other norm's gain", &["gain-swapped"], &["attn_norm", "ffn_norm"], Plant::OtherGain),
    bug("mean subtracted", &["mean-subtracted"], NORMS, Plant::MeanSubtracted),
    bug("sum for mean", &["sum-for-mean", "scale-wrong"], NORMS, Plant::SumForMean),
    bug("norm rounded to bf16", &["output-rounded"], NORMS, Plant::Rounded(Format::Bf16)),
    bug(
        "norm of the previous layer's stream",
        &["stale-input", "stale-output"],
        &["attn_norm", "ffn_norm"],
        Plant::PreviousLayersOutput,
    )
    .after_layer_0(),
    // RoPE.
    bug("RoPE in the other layout", &["rope-layout"], ROPES, Plant::RopeLayout),
    bug("RoPE base 10000", &["rope-base"], ROPES, Plant::RopeBase(1e4)),
    bug("RoPE turns the other way", &["rope-direction"], ROPES, Plant::RopeBack),
    bug("RoPE one position late", &["rope-position"], ROPES, Plant::RopeOffset(1)),
    bug(
        "RoPE at the first position only",
        &["rope-position", "rope-missing"],
        Q_ROPE,
        Plant::RopeFirst,
    ),
    bug("RoPE left out", &["rope-missing", "stale-output"], ROPES, Plant::RopeMissing),
    bug(
        "RoPE positions, frequencies and angles in bf16",
        &["rope-precision"],
        ROPES,
        Plant::RopeAngles(Format::Bf16),
    )
    .public(),
    bug("RoPE factors ignored", &["rope-factors"], ROPES, Plant::RopeFactorsIgnored),
    // Attention.
    bug(
        "keys and values through e4m3 at a scale of 1",
        &["kv-cache-format"],
        &["attn"],
        Plant::CacheKept(Format::E4m3, true),
    )
    .public(),
    bug(
        "keys and values through e5m2 at a scale for each tensor",
        &["kv-cache-format"],
        &["attn"],
        Plant::CacheKept(Format::E5m2, false),
    )
    .public(),
    bug("softmax scale not applied", &["softmax-scale"], &["attn"], Plant::SoftmaxScale(0)),
    bug("softmax scale applied twice", &["softmax-scale"], &["attn"], Plant::SoftmaxScale(1)),
    bug("softmax with base 2", &["softmax-scale"], &["attn"], Plant::SoftmaxScale(2)),
    bug("causal mask missing", &["causal-mask"], &["attn"], Plant::MaskMissing),
    bug("a row does not see itself", &["causal-mask"], &["attn"], Plant::MaskStrict),
    bug("a window of 2 positions", &["causal-mask"], &["attn"], Plant::Window(2)),
    bug("GQA heads taken modulo", &["gqa-head-map"], &["attn"], Plant::HeadsModulo),
    bug("GQA: every head reads the first", &["gqa-head-map"], &["attn"], Plant::HeadsFirst),
    bug("keys and values exchanged", &["swapped-operands"], &["attn"], Plant::KeysForValues),
    bug("attention rounded to bf16", &["output-rounded"], &["attn"], Plant::Rounded(Format::Bf16)),
    // SwiGLU.
    bug("gate and up exchanged", &["swapped-operands"], &["ffn_swiglu"], Plant::GateForUp),
    bug("GELU for SiLU", &["activation-function"], &["ffn_swiglu"], Plant::Gelu),
    bug("ReLU for SiLU", &["activation-function"], &["ffn_swiglu"], Plant::Relu),
    bug("up projection ignored", &["activation-function"], &["ffn_swiglu"], Plant::UpIgnored),
    bug("SwiGLU rounded to f16", &["output-rounded"], &["ffn_swiglu"], Plant::Rounded(Format::F16)),
    // What other architectures have.
    bug("window ignored", &["causal-mask"], &["attn"], Plant::WindowIgnored),
    bug("window one position wider", &["causal-mask"], &["attn"], Plant::WindowWider),
    bug("scores without their soft cap", &["soft-cap-missing"], &["attn"], Plant::SoftCapMissing),
    bug("logits without their soft cap", &["soft-cap-missing"], &["logits"], Plant::SoftCapMissing),
    bug("a cache in the other FP8 format", &["kv-cache-format"], CACHES, Plant::CacheFormat),
    bug("a cache truncated to its format", &["truncating-cast"], CACHES, Plant::CacheTruncated),
    bug("a cache scaled by its tensor", &["kv-cache-scale"], CACHES, Plant::CacheScaleOfTensor),
    bug("a cache's scale left out", &["kv-cache-scale"], CACHES, Plant::CacheScaleMissing),
    bug("gain without its 1", &["weight-offset"], GAINS, Plant::OffsetMissing),
    bug("whole heads turned for a part", &["rope-width"], ROPES, Plant::RopeWhole),
    bug("a factor left out", &["factor-missing"], SCALED, Plant::FactorMissing),
    bug("a factor applied twice", &["factor-twice"], SCALED, Plant::FactorTwice),
    bug("sinks ignored", &["sinks-ignored"], &["attn"], Plant::SinksIgnored),
    bug("mean not subtracted", &["mean-kept"], NORMS, Plant::MeanKept),
    bug("norm without its bias", &["norm-bias-missing"], NORMS, Plant::NormBiasMissing),
    bug("GELU (exact) without a gate", &["activation-function"], &["ffn_act"], Plant::Gelu),
    bug("ReLU without a gate", &["activation-function"], &["ffn_act"], Plant::Relu),
    bug("a state that does not decay", &["delta-gate"], &["lin_delta"], Plant::StateKept),
    bug("a state corrected whole", &["delta-gate"], &["lin_delta"], Plant::StateUncorrected),
    // Mixtures of experts.
    bug("a token's best expert passed over", &["expert-choice"], &["ffn_route"], Plant::NextExpert),
    bug(
        "weights of experts (not) divided by their sum",
        &["routing-normalisation"],
        &["ffn_route"],
        Plant::RoutingScores,
    ),
    bug("factor of routing left out", &["routing-factor"], &["ffn_route"], Plant::RoutingFactor),
    bug(
        "experts chosen without the bias",
        &["routing-bias", "expert-choice"],
        &["ffn_route"],
        Plant::RoutingBias,
    ),
    bug(
        "an expert's matrix for another's",
        &["expert-swapped", "swapped-weight"],
        &["ffn_gate", "ffn_down"],
        Plant::OtherExpert,
    ),
    bug("shared expert left out", &["shared-expert-missing"], &["ffn_out"], Plant::BlockMissing),
    bug("routed experts left out", &["routed-experts-missing"], &["ffn_out"], Plant::StreamMissing),
    // Residuals.
    bug(
        "residual stream not added",
        &["residual-missing", "stale-output"],
        ADDS,
        Plant::StreamMissing,
    ),
    bug(
        "block's output not added",
        &["residual-missing", "stale-output"],
        ADDS,
        Plant::BlockMissing,
    ),
    bug("block's output added twice", &["residual-weighted"], ADDS, Plant::BlockTwiceAdded),
    bug("block's output subtracted", &["residual-weighted"], ADDS, Plant::BlockSubtracted),
    bug("the embedding added for the stream", &["residual-swapped"], ADDS, Plant::EmbeddingAdded)
        .after_layer_0(),
    bug("residual rounded to bf16", &["output-rounded"], ADDS, Plant::Rounded(Format::Bf16)),
    // Embedding.
    bug("embedding row off by one", &["wrong-row"], &["embed"], Plant::RowOffByOne),
    bug(
        "embedding halves of blocks interleaved",
        &["block-order"],
        &["embed"],
        Plant::EmbedInterleaved,
    ),
    bug("embedding times sqrt(hidden)", &["scale-wrong"], &["embed"], Plant::TimesRootHidden),
    bug("embedding rounded to bf16", &["output-rounded"], &["embed"], Plant::Rounded(Format::Bf16)),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::compare::fingerprints::ALL;

    #[test]
    fn names_are_unique_and_every_cause_has_a_fingerprint() {
        assert!(CATALOGUE.len() >= 60, "{}", CATALOGUE.len());
        let names: BTreeSet<&str> = CATALOGUE.iter().map(|bug| bug.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        let mut causes: BTreeSet<&str> = ALL.iter().flat_map(|f| f.causes).copied().collect();
        causes.extend(["non-determinism", "batch-dependence"]);
        for bug in CATALOGUE {
            for cause in bug.causes {
                assert!(causes.contains(cause), "{}: {cause}", bug.name);
            }
        }
    }
}
