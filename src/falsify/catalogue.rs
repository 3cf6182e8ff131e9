//! The bugs that are planted, in the order in which their seeds are counted.
//!
//! What a fingerprint alone recognises stands in the fingerprint's file, the others here. Those marked
//! public stood in bug reports of inference engines. How each of these is planted is `plant.rs`.

use super::plant::Spoilt;
use crate::compare::fingerprints::ALL;
use crate::compare::fingerprints::planted::{ADDS, Bug, GEMMS, NORMS, ROPES, bug};
use crate::dtype::Format;

const LONG: &[&str] = &["ffn_down"];
const ANY_GEMM: &[&str] = &["q", "attn_out", "ffn_up", "ffn_down", "logits"];
const Q_ROPE: &[&str] = &["q_rope"];
const CACHES: &[&str] = &["k_cache", "v_cache", "kv_a_cache"];
const BIASED: &[&str] = &["q", "k", "v"];

/// Bugs that follow each other.
enum Place {
    /// These.
    Rows(&'static [Bug]),
    /// Those of fingerprints that have these names.
    Own(&'static [&'static str]),
}

/// All bugs: those that have a place, then what the files of fingerprints hold besides, so that a new
/// one changes no other's number.
pub fn catalogue() -> Vec<&'static Bug> {
    let own = || ALL.iter().flat_map(|fingerprint| fingerprint.bugs);
    let placed = PLACES.iter().flat_map(|place| match place {
        Place::Rows(rows) => rows.iter().collect::<Vec<&'static Bug>>(),
        Place::Own(names) => {
            names.iter().filter_map(|name| own().find(|bug| bug.name == *name)).collect()
        }
    });
    let mut all: Vec<&'static Bug> = placed.collect();
    all.extend(own());
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|bug| seen.insert(bug.name));
    all
}

/// The bugs whose place was taken before.
const PLACES: &[Place] = &[
    Place::Rows(&[
        // Scales.
        bug("activation scale 2 % too large", &["scale-wrong"], GEMMS, &Spoilt::XScale(1.02)).fp8(),
        bug("weight scale 10 % too small", &["scale-wrong"], GEMMS, &Spoilt::WScale(0.9)).fp8(),
        bug("output times 0.72", &["scale-wrong"], ANY_GEMM, &Spoilt::Times(0.72)).public(),
        bug("output with the wrong sign", &["scale-wrong"], ANY_GEMM, &Spoilt::Times(-1.0))
            .public(),
        bug("activation scale not applied", &["scale-missing"], GEMMS, &Spoilt::XScaleMissing)
            .fp8(),
        bug("weight scale not applied", &["scale-missing"], GEMMS, &Spoilt::WScaleMissing).fp8(),
        bug("activation scale applied twice", &["scale-twice"], GEMMS, &Spoilt::XScaleTwice).fp8(),
        bug(
            "activation scale halved: codes saturate",
            &["saturated"],
            GEMMS,
            &Spoilt::XSaturated(0.5),
        )
        .fp8(),
        bug(
            "weight scale quartered: codes saturate",
            &["saturated"],
            GEMMS,
            &Spoilt::WSaturated(0.25),
        )
        .fp8(),
        bug(
            "activation scale 16 times too large",
            &["scale-too-large"],
            GEMMS,
            &Spoilt::XSaturated(16.0),
        )
        .fp8(),
        bug(
            "weight scaled per channel, declared per tensor",
            &["scale-granularity"],
            GEMMS,
            &Spoilt::PerChannel,
        )
        .fp8(),
        bug(
            "activation scaled per token, declared per tensor",
            &["scale-granularity"],
            GEMMS,
            &Spoilt::PerToken,
        )
        .fp8(),
        bug(
            "weight scale rounded up to a power of two, codes kept",
            &["scale-power-of-two", "scale-wrong"],
            GEMMS,
            &Spoilt::WPowerOfTwo,
        )
        .fp8()
        .public(),
        bug(
            "activation scale rounded up to a power of two, codes kept",
            &["scale-power-of-two", "scale-wrong"],
            GEMMS,
            &Spoilt::XPowerOfTwo,
        )
        .fp8()
        .public(),
        bug(
            "activation cast without saturation by a scale that is set beforehand",
            &["cast-without-saturation"],
            GEMMS,
            &Spoilt::XUnsaturated(0.5),
        )
        .fp8()
        .public(),
        bug(
            "the two 4-bit codes of each byte of a weight exchanged",
            &["nibble-order"],
            GEMMS,
            &Spoilt::NibblesExchanged,
        )
        .blocks(),
        bug(
            "weight blocks with the scale of the next block",
            &["scale-order"],
            GEMMS,
            &Spoilt::NextBlocksScale,
        )
        .blocks(),
        bug(
            "scale of the whole NVFP4 weight left out",
            &["scale-missing", "scale-wrong"],
            GEMMS,
            &Spoilt::WholeScaleMissing,
        )
        .blocks(),
        bug(
            "activation's powers of two rounded up",
            &["block-scale-rounding"],
            GEMMS,
            &Spoilt::PowersRoundedUp,
        )
        .blocks(),
        bug(
            "weight scales of blocks with another bias",
            &["scale-wrong"],
            GEMMS,
            &Spoilt::ExponentsOneLarger,
        )
        .blocks(),
        bug(
            "weight codes read as e4m3fnuz",
            &["fp8-fnuz", "scale-wrong"],
            GEMMS,
            &Spoilt::WReadAsFnuz,
        )
        .fp8(),
        bug(
            "activation codes clip at 240, as e4m3fnuz",
            &["fp8-fnuz"],
            GEMMS,
            &Spoilt::XClippedAsFnuz,
        )
        .fp8(),
        bug(
            "last block of K with the scale of the block before",
            &["scale-tail"],
            LONG,
            &Spoilt::ScaleTail,
        )
        .fp8(),
        bug(
            "scales of another part of the fused weight",
            &["scale-slice"],
            &["k", "v", "ffn_up"],
            &Spoilt::ScaleSlice,
        )
        .fp8(),
        bug(
            "product of the scales formed in f16",
            &["scale-product"],
            GEMMS,
            &Spoilt::ScaleProduct,
        )
        .fp8()
        .public(),
        bug(
            "zero point of groups of 128 off by one",
            &["zero-point"],
            GEMMS,
            &Spoilt::ZeroPoint(128),
        )
        .public(),
        bug(
            "keys interleaved for the number of query heads",
            &["head-permutation"],
            &["k"],
            &Spoilt::OtherHeads,
        )
        .public(),
        bug("one column times 1.2", &["column-scale"], GEMMS, &Spoilt::Column(1.2)),
        bug("one row times 0.5", &["row-scale"], GEMMS, &Spoilt::Row(0.5)),
        // Conversions.
        bug("activation cast truncates", &["truncating-cast"], GEMMS, &Spoilt::TruncateX),
        bug("weight cast truncates", &["truncating-cast"], GEMMS, &Spoilt::TruncateW),
        bug("both casts truncate", &["truncating-cast"], GEMMS, &Spoilt::TruncateBoth),
        bug("activation subnormals flushed", &["subnormals-flushed"], GEMMS, &Spoilt::FlushX)
            .fp8()
            .public(),
        bug("weight subnormals flushed", &["subnormals-flushed"], GEMMS, &Spoilt::FlushW).fp8(),
        // With a scale for each row its largest code is a NaN of the other format, and so is every sum.
        bug(
            "weight codes read as the other FP8 format",
            &["wrong-fp8-format", "non-finite-output"],
            GEMMS,
            &Spoilt::ReadW,
        )
        .fp8(),
        bug(
            "activation codes read as the other FP8 format",
            &["wrong-fp8-format", "non-finite-output"],
            GEMMS,
            &Spoilt::ReadX,
        )
        .fp8(),
        bug(
            "activations rounded to Q8 blocks of 32",
            &["quantised-activations"],
            GEMMS,
            &Spoilt::Q8(32),
        )
        .public(),
        bug(
            "activations rounded to Q8 blocks of 256",
            &["quantised-activations"],
            GEMMS,
            &Spoilt::Q8(256),
        )
        .public(),
        bug(
            "f16 computed instead of the recipe",
            &["other-format"],
            GEMMS,
            &Spoilt::Computed(Format::F16),
        )
        .public(),
        bug(
            "f32 computed instead of the recipe",
            &["other-format", "not-engaged"],
            GEMMS,
            &Spoilt::Computed(Format::F32),
        ),
        bug(
            "the knob is not engaged: the reference's result",
            &["not-engaged"],
            GEMMS,
            &Spoilt::NotEngaged,
        )
        .public(),
        // Accumulation and outputs.
        bug("the other accumulation", &["other-schedule"], LONG, &Spoilt::OtherAccumulation).fp8(),
        bug("split-K 3", &["other-schedule"], LONG, &Spoilt::SplitK(3)),
        bug("split-K 4, order undeclared", &["other-schedule"], LONG, &Spoilt::SplitK(4)),
        bug(
            "schedule changes from call to call",
            &["non-determinism", "other-schedule"],
            LONG,
            &Spoilt::Alternating,
        )
        .public(),
        bug("output truncated", &["output-truncated"], GEMMS, &Spoilt::OutputTruncated),
        bug("output in f16", &["output-rounded"], GEMMS, &Spoilt::Output(Format::F16)),
        bug("output in f32", &["output-rounded"], GEMMS, &Spoilt::Output(Format::F32)),
        bug(
            "f16 output overflows to infinity",
            &["f16-overflow", "f16-intermediate"],
            LONG,
            &Spoilt::F16Overflow(false),
        )
        .fp8()
        .public(),
        bug(
            "f16 output clips at 65504",
            &["f16-overflow", "f16-intermediate"],
            LONG,
            &Spoilt::F16Overflow(true),
        )
        .fp8()
        .public(),
        // Shapes and indices of GEMMs.
        bug("last 8 of K dropped", &["k-tail-dropped"], GEMMS, &Spoilt::Tail(8)),
        bug("last 32 of K dropped", &["k-tail-dropped"], GEMMS, &Spoilt::Tail(32)),
        bug(
            "one block of 64 of K lost",
            &["k-block-lost", "k-tail-dropped"],
            GEMMS,
            &Spoilt::BlockLost(64),
        ),
        bug(
            "one block of 32 of K counted twice",
            &["k-block-twice"],
            GEMMS,
            &Spoilt::BlockTwice(32),
        ),
        bug("two columns swapped", &["columns-permuted"], GEMMS, &Spoilt::ColumnsSwapped),
        bug("rows shifted by one", &["rows-shifted"], GEMMS, &Spoilt::RowsShifted),
        bug(
            "first and last row swapped",
            &["rows-permuted", "rows-shifted"],
            GEMMS,
            &Spoilt::RowsSwapped,
        ),
        bug("one row written, the rest stale", &["stale-rows"], GEMMS, &Spoilt::StaleRows)
            .after_layer_0()
            .public(),
        bug("a tile of 32 outputs not written", &["unwritten"], GEMMS, &Spoilt::TileUnwritten),
        bug(
            "one lane of every tile of 16 spoilt",
            &["tile-periodic"],
            GEMMS,
            &Spoilt::LaneSpoilt(16),
        ),
        bug("a tile of 64 outputs spoilt", &["one-tile"], GEMMS, &Spoilt::TileSpoilt(64)),
        bug("weight read along the wrong axis", &["transposed-weight"], GEMMS, &Spoilt::Transposed),
        bug(
            "halves of the inner index swapped",
            &["weight-permuted"],
            GEMMS,
            &Spoilt::HalvesSwapped,
        ),
        bug(
            "neighbours of the inner index swapped",
            &["weight-permuted"],
            GEMMS,
            &Spoilt::NeighboursSwapped,
        ),
        bug(
            "nibbles of blocks of 32 interleaved",
            &["weight-permuted"],
            GEMMS,
            &Spoilt::Interleaved,
        ),
        bug(
            "the previous layer's weight",
            &["swapped-weight"],
            GEMMS,
            &Spoilt::PreviousLayersWeight,
        )
        .after_layer_0(),
        bug(
            "k's weight for v, up's for gate",
            &["swapped-weight"],
            &["v", "ffn_gate"],
            &Spoilt::SistersWeight,
        ),
        // Stale buffers.
        bug(
            "layer 0's converted activation reused",
            &["stale-input"],
            GEMMS,
            &Spoilt::Layer0sInput,
        )
        .after_layer_0()
        .public(),
        bug(
            "the previous layer's activation reused",
            &["stale-input"],
            GEMMS,
            &Spoilt::PreviousLayersInput,
        )
        .after_layer_0()
        .public(),
        bug(
            "the previous layer's output returned",
            &["stale-output"],
            GEMMS,
            &Spoilt::PreviousLayersOutput,
        )
        .after_layer_0(),
        bug(
            "in a longer batch each token gets its neighbour's logits",
            &["batch-dependence"],
            &["logits"],
            &Spoilt::ShiftedInBatch,
        )
        .in_batch()
        .public(),
        // Biases.
        bug("bias missing", &["bias-missing"], BIASED, &Spoilt::BiasMissing),
        bug("bias added twice", &["bias-twice"], BIASED, &Spoilt::BiasTwice),
        bug("the previous layer's bias", &["bias-swapped"], BIASED, &Spoilt::PreviousLayersBias)
            .after_layer_0(),
    ]),
    Place::Own(&[
        // Sums of what several GPUs made.
        "a GPU left out of the sum",
        "a GPU added twice",
        "the bias added on every GPU",
    ]),
    Place::Rows(&[
        // NaN and infinity.
        bug("one output is NaN", &["non-finite-output"], GEMMS, &Spoilt::Single(f32::NAN)),
        bug(
            "one value of the embedding is NaN",
            &["non-finite-output"],
            &["embed"],
            &Spoilt::Single(f32::NAN),
        ),
        bug(
            "one value of the first norm is NaN",
            &["non-finite-output"],
            &["blk.0.attn_norm"],
            &Spoilt::Single(f32::NAN),
        ),
        bug(
            "one value of the first query is NaN",
            &["non-finite-output"],
            &["blk.0.q"],
            &Spoilt::Single(f32::NAN),
        ),
        bug(
            "one value of the attention is NaN",
            &["non-finite-output"],
            &["attn"],
            &Spoilt::Single(f32::NAN),
        ),
        bug(
            "the largest logit exchanged with another",
            &["columns-permuted"],
            &["logits"],
            &Spoilt::TopSwapped,
        ),
        bug(
            "one value changes from call to call",
            &["non-determinism"],
            &["ffn_down"],
            &Spoilt::Flicker,
        )
        .of_repeats(),
        bug(
            "one output is infinite",
            &["non-finite-output"],
            GEMMS,
            &Spoilt::Single(f32::INFINITY),
        ),
    ]),
    Place::Own(&[
        // RMSNorm.
        "epsilon 1e-5 for 1e-6 and back",
        "epsilon 1e-3",
        "epsilon 1e-3 in the first norm",
        "epsilon left out",
        "gain offset by one",
        "gain not applied",
        "the other norm's gain",
        "mean subtracted",
        "sum for mean",
    ]),
    Place::Rows(&[
        bug("norm rounded to bf16", &["output-rounded"], NORMS, &Spoilt::Rounded(Format::Bf16)),
        bug(
            "norm of the previous layer's stream",
            &["stale-input", "stale-output"],
            &["attn_norm", "ffn_norm"],
            &Spoilt::PreviousLayersOutput,
        )
        .after_layer_0(),
        // RoPE.
        bug("RoPE in the other layout", &["rope-layout"], ROPES, &Spoilt::RopeLayout),
        bug("RoPE base 10000", &["rope-base"], ROPES, &Spoilt::RopeBase(1e4)),
        bug("RoPE turns the other way", &["rope-direction"], ROPES, &Spoilt::RopeBack),
        bug("RoPE one position late", &["rope-position"], ROPES, &Spoilt::RopeOffset(1)),
        bug(
            "RoPE at the first position only",
            &["rope-position", "rope-missing"],
            Q_ROPE,
            &Spoilt::RopeFirst,
        ),
        bug("RoPE left out", &["rope-missing", "stale-output"], ROPES, &Spoilt::RopeMissing),
        bug(
            "RoPE positions, frequencies and angles in bf16",
            &["rope-precision"],
            ROPES,
            &Spoilt::RopeAngles(Format::Bf16),
        )
        .public(),
        bug("RoPE factors ignored", &["rope-factors"], ROPES, &Spoilt::RopeFactorsIgnored),
        // Attention.
        bug(
            "keys and values through e4m3 at a scale of 1",
            &["kv-cache-format"],
            &["attn"],
            &Spoilt::CacheKept(Format::E4m3, true),
        )
        .public(),
        bug(
            "keys and values through e5m2 at a scale for each tensor",
            &["kv-cache-format"],
            &["attn"],
            &Spoilt::CacheKept(Format::E5m2, false),
        )
        .public(),
    ]),
    Place::Own(&[
        "softmax scale not applied",
        "softmax scale applied twice",
        "softmax with base 2",
        "causal mask missing",
        "a row does not see itself",
        "a window of 2 positions",
        "GQA heads taken modulo",
        "GQA: every head reads the first",
    ]),
    Place::Rows(&[
        bug("keys and values exchanged", &["swapped-operands"], &["attn"], &Spoilt::KeysForValues),
        bug(
            "attention rounded to bf16",
            &["output-rounded"],
            &["attn"],
            &Spoilt::Rounded(Format::Bf16),
        ),
        // SwiGLU.
        bug("gate and up exchanged", &["swapped-operands"], &["ffn_swiglu"], &Spoilt::GateForUp),
        bug("GELU for SiLU", &["activation-function"], &["ffn_swiglu"], &Spoilt::Gelu),
        bug("ReLU for SiLU", &["activation-function"], &["ffn_swiglu"], &Spoilt::Relu),
        bug("up projection ignored", &["activation-function"], &["ffn_swiglu"], &Spoilt::UpIgnored),
        bug(
            "SwiGLU rounded to f16",
            &["output-rounded"],
            &["ffn_swiglu"],
            &Spoilt::Rounded(Format::F16),
        ),
    ]),
    Place::Own(&[
        // What other architectures have.
        "window ignored",
        "window one position wider",
        "scores without their soft cap",
        "logits without their soft cap",
    ]),
    Place::Rows(&[
        bug("a cache in the other FP8 format", &["kv-cache-format"], CACHES, &Spoilt::CacheFormat),
        bug(
            "a cache truncated to its format",
            &["truncating-cast"],
            CACHES,
            &Spoilt::CacheTruncated,
        ),
        bug(
            "a cache scaled by its tensor",
            &["kv-cache-scale"],
            CACHES,
            &Spoilt::CacheScaleOfTensor,
        ),
        bug("a cache's scale left out", &["kv-cache-scale"], CACHES, &Spoilt::CacheScaleMissing),
    ]),
    Place::Own(&["gain without its 1"]),
    Place::Rows(&[bug(
        "whole heads turned for a part",
        &["rope-width"],
        ROPES,
        &Spoilt::RopeWhole,
    )]),
    Place::Own(&[
        "a factor left out",
        "a factor applied twice",
        "sinks ignored",
        "mean not subtracted",
        "norm without its bias",
    ]),
    Place::Rows(&[
        bug("GELU (exact) without a gate", &["activation-function"], &["ffn_act"], &Spoilt::Gelu),
        bug("ReLU without a gate", &["activation-function"], &["ffn_act"], &Spoilt::Relu),
    ]),
    Place::Own(&["a state that does not decay", "a state corrected whole"]),
    Place::Rows(&[
        // Mixtures of experts.
        bug(
            "a token's best expert passed over",
            &["expert-choice"],
            &["ffn_route"],
            &Spoilt::NextExpert,
        ),
        bug(
            "weights of experts (not) divided by their sum",
            &["routing-normalisation"],
            &["ffn_route"],
            &Spoilt::RoutingScores,
        ),
        bug(
            "factor of routing left out",
            &["routing-factor"],
            &["ffn_route"],
            &Spoilt::RoutingFactor,
        ),
        bug(
            "experts chosen without the bias",
            &["routing-bias", "expert-choice"],
            &["ffn_route"],
            &Spoilt::RoutingBias,
        ),
        bug(
            "an expert's matrix for another's",
            &["expert-swapped", "swapped-weight"],
            &["ffn_gate", "ffn_down"],
            &Spoilt::OtherExpert,
        ),
    ]),
    Place::Own(&[
        "shared expert left out",
        "routed experts left out",
        // Residuals.
        "residual stream not added",
        "block's output not added",
        "block's output added twice",
        "block's output subtracted",
        "the embedding added for the stream",
    ]),
    Place::Rows(&[
        bug("residual rounded to bf16", &["output-rounded"], ADDS, &Spoilt::Rounded(Format::Bf16)),
        // Embedding.
        bug("embedding row off by one", &["wrong-row"], &["embed"], &Spoilt::RowOffByOne),
        bug(
            "embedding halves of blocks interleaved",
            &["block-order"],
            &["embed"],
            &Spoilt::EmbedInterleaved,
        ),
        bug("embedding times sqrt(hidden)", &["scale-wrong"], &["embed"], &Spoilt::TimesRootHidden),
        bug(
            "embedding rounded to bf16",
            &["output-rounded"],
            &["embed"],
            &Spoilt::Rounded(Format::Bf16),
        ),
    ]),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_every_cause_has_a_fingerprint() {
        let mut names: Vec<&str> = Vec::new();
        for place in PLACES {
            match place {
                Place::Rows(rows) => names.extend(rows.iter().map(|bug| bug.name)),
                Place::Own(own) => names.extend(*own),
            }
        }
        let all = catalogue();
        assert!(all.len() >= 60, "{}", all.len());
        // Each name with a place is a bug, and stands where its place is.
        let in_order: Vec<&str> = all.iter().map(|bug| bug.name).collect();
        assert_eq!(in_order[..names.len()], names);
        let of_files = ALL.iter().flat_map(|fingerprint| fingerprint.bugs).map(|bug| bug.name);
        let of_rows = PLACES.iter().flat_map(|place| match place {
            Place::Rows(rows) => rows.iter().map(|bug| bug.name).collect::<Vec<_>>(),
            Place::Own(_) => Vec::new(),
        });
        let whole: Vec<&str> = of_files.chain(of_rows).collect();
        let unique: BTreeSet<&str> = whole.iter().copied().collect();
        assert_eq!((unique.len(), all.len()), (whole.len(), whole.len()));
        let mut causes: BTreeSet<&str> = ALL.iter().flat_map(|f| f.causes).copied().collect();
        causes.extend(["non-determinism", "batch-dependence"]);
        for bug in all {
            for cause in bug.causes {
                assert!(causes.contains(cause), "{}: {cause}", bug.name);
            }
        }
    }

    #[test]
    fn a_fingerprint_names_the_bugs_of_its_own_file() {
        for fingerprint in ALL {
            for bug in fingerprint.bugs {
                assert!(fingerprint.causes.contains(&bug.causes[0]), "{}", bug.name);
            }
        }
    }
}
