//! The bugs that are planted, in the order in which their seeds are counted.
//!
//! What the files of fingerprints hold has its place here by name; the others stand here whole, and
//! how each of them is planted is `plant.rs`. Those marked public stood in bug reports of inference
//! engines.

use super::plant::Defect;
use crate::compare::fingerprints::ALL;
use crate::compare::fingerprints::planted::{ADDS, Bug, GEMMS, NORMS, bug};
use crate::dtype::Format;

const LONG: &[&str] = &["ffn_down"];
const ANY_GEMM: &[&str] = &["q", "attn_out", "ffn_up", "ffn_down", "logits"];
const CACHES: &[&str] = &["k_cache", "v_cache", "kv_a_cache"];

/// Bugs that follow each other.
enum Place {
    /// These.
    Rows(&'static [Bug]),
    /// Those of fingerprints that have these names.
    Own(&'static [&'static str]),
}

/// All bugs: those that have a place, then what the files of fingerprints hold besides, so that a new
/// one changes the number of none that has a place.
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
        bug("activation scale 2 % too large", &["scale-wrong"], GEMMS, &Defect::XScale(1.02))
            .scaled(),
        bug("weight scale 10 % too small", &["scale-wrong"], GEMMS, &Defect::WScale(0.9)).scaled(),
        bug("output times 0.72", &["scale-wrong"], ANY_GEMM, &Defect::Times(0.72)).public(),
        bug("output with the wrong sign", &["scale-wrong"], ANY_GEMM, &Defect::Times(-1.0))
            .public(),
        bug("activation scale not applied", &["scale-missing"], GEMMS, &Defect::XScaleMissing)
            .scaled(),
        bug("weight scale not applied", &["scale-missing"], GEMMS, &Defect::WScaleMissing).scaled(),
        bug("activation scale applied twice", &["scale-twice"], GEMMS, &Defect::XScaleTwice)
            .scaled(),
        bug(
            "activation scale halved: codes saturate",
            &["saturated"],
            GEMMS,
            &Defect::XSaturated(0.5),
        )
        .scaled(),
        bug(
            "weight scale quartered: codes saturate",
            &["saturated"],
            GEMMS,
            &Defect::WSaturated(0.25),
        )
        .scaled(),
        bug(
            "activation scale 16 times too large",
            &["scale-too-large"],
            GEMMS,
            &Defect::XSaturated(16.0),
        )
        .scaled(),
        bug(
            "weight scaled per channel, declared per tensor",
            &["scale-granularity"],
            GEMMS,
            &Defect::PerChannel,
        )
        .scaled(),
        bug(
            "activation scaled per token, declared per tensor",
            &["scale-granularity"],
            GEMMS,
            &Defect::PerToken,
        )
        .scaled(),
        bug(
            "weight scale rounded up to a power of two, codes kept",
            &["scale-power-of-two", "scale-wrong"],
            GEMMS,
            &Defect::WPowerOfTwo,
        )
        .scaled()
        .public(),
        bug(
            "activation scale rounded up to a power of two, codes kept",
            &["scale-power-of-two", "scale-wrong"],
            GEMMS,
            &Defect::XPowerOfTwo,
        )
        .scaled()
        .public(),
        bug(
            "activation cast without saturation by a scale that is set beforehand",
            &["cast-without-saturation"],
            GEMMS,
            &Defect::XUnsaturated(0.5),
        )
        .fp8()
        .public(),
        bug(
            "the two 4-bit codes of each byte of a weight exchanged",
            &["nibble-order"],
            GEMMS,
            &Defect::NibblesExchanged,
        )
        .blocks(),
        bug(
            "weight blocks with the scale of the next block",
            &["scale-order"],
            GEMMS,
            &Defect::NextBlocksScale,
        )
        .blocks(),
        bug(
            "scale of the whole NVFP4 weight left out",
            &["scale-missing", "scale-wrong"],
            GEMMS,
            &Defect::WholeScaleMissing,
        )
        .blocks(),
        bug(
            "activation's powers of two rounded up",
            &["block-scale-rounding"],
            GEMMS,
            &Defect::PowersRoundedUp,
        )
        .blocks(),
        bug(
            "weight scales of blocks with another bias",
            &["scale-wrong"],
            GEMMS,
            &Defect::ExponentsOneLarger,
        )
        .blocks(),
        bug(
            "weight codes read as e4m3fnuz",
            &["fp8-fnuz", "scale-wrong"],
            GEMMS,
            &Defect::WReadAsFnuz,
        )
        .fp8(),
        bug(
            "activation codes clip at 240, as e4m3fnuz",
            &["fp8-fnuz"],
            GEMMS,
            &Defect::XClippedAsFnuz,
        )
        .fp8(),
        bug(
            "last block of K with the scale of the block before",
            &["scale-tail"],
            LONG,
            &Defect::ScaleTail,
        )
        .fp8(),
        bug(
            "scales of another part of the fused weight",
            &["scale-slice"],
            &["k", "v", "ffn_up"],
            &Defect::ScaleSlice,
        )
        .scaled(),
        bug(
            "product of the scales formed in f16",
            &["scale-product"],
            GEMMS,
            &Defect::ScaleProduct,
        )
        .scaled()
        .public(),
        bug(
            "zero point of groups of 128 off by one",
            &["zero-point"],
            GEMMS,
            &Defect::ZeroPoint(128),
        )
        .public(),
        bug(
            "keys interleaved for the number of query heads",
            &["head-permutation"],
            &["k"],
            &Defect::OtherHeads,
        )
        .public(),
        bug("one column times 1.2", &["column-scale"], GEMMS, &Defect::Column(1.2)),
        bug("one row times 0.5", &["row-scale"], GEMMS, &Defect::Row(0.5)),
        // Conversions.
        bug("activation cast truncates", &["truncating-cast"], GEMMS, &Defect::TruncateX),
        bug("weight cast truncates", &["truncating-cast"], GEMMS, &Defect::TruncateW),
        bug("both casts truncate", &["truncating-cast"], GEMMS, &Defect::TruncateBoth),
        bug("activation subnormals flushed", &["subnormals-flushed"], GEMMS, &Defect::FlushX)
            .fp8()
            .public(),
        bug("weight subnormals flushed", &["subnormals-flushed"], GEMMS, &Defect::FlushW).fp8(),
        // With a scale for each row its largest code is a NaN of the other format, and so is every sum.
        bug(
            "weight codes read as the other FP8 format",
            &["wrong-fp8-format", "non-finite-output"],
            GEMMS,
            &Defect::ReadW,
        )
        .fp8(),
        bug(
            "activation codes read as the other FP8 format",
            &["wrong-fp8-format", "non-finite-output"],
            GEMMS,
            &Defect::ReadX,
        )
        .fp8(),
        bug(
            "activations rounded to Q8 blocks of 32",
            &["quantised-activations"],
            GEMMS,
            &Defect::Q8(32),
        )
        .public(),
        bug(
            "activations rounded to Q8 blocks of 256",
            &["quantised-activations"],
            GEMMS,
            &Defect::Q8(256),
        )
        .public(),
        bug(
            "f16 computed instead of the recipe",
            &["other-format"],
            GEMMS,
            &Defect::Computed(Format::F16),
        )
        .public(),
        bug(
            "f32 computed instead of the recipe",
            &["other-format", "not-engaged"],
            GEMMS,
            &Defect::Computed(Format::F32),
        ),
        bug(
            "the knob is not engaged: the reference's result",
            &["not-engaged"],
            GEMMS,
            &Defect::NotEngaged,
        )
        .public(),
        // Accumulation and outputs.
        bug("the other accumulation", &["other-schedule"], LONG, &Defect::OtherAccumulation).fp8(),
        bug("split-K 3", &["other-schedule"], LONG, &Defect::SplitK(3)),
        bug("split-K 4, order undeclared", &["other-schedule"], LONG, &Defect::SplitK(4)),
        bug(
            "schedule changes from call to call",
            &["non-determinism", "other-schedule"],
            LONG,
            &Defect::Alternating,
        )
        .public(),
        bug("output truncated", &["output-truncated"], GEMMS, &Defect::OutputTruncated),
        bug("output in f16", &["output-rounded"], GEMMS, &Defect::Output(Format::F16)),
        bug("output in f32", &["output-rounded"], GEMMS, &Defect::Output(Format::F32)),
        bug(
            "f16 output overflows to infinity",
            &["f16-overflow", "f16-intermediate"],
            LONG,
            &Defect::F16Overflow(false),
        )
        .scaled()
        .public(),
        bug(
            "f16 output clips at 65504",
            &["f16-overflow", "f16-intermediate"],
            LONG,
            &Defect::F16Overflow(true),
        )
        .scaled()
        .public(),
        // Shapes and indices of GEMMs.
        bug("last 8 of K dropped", &["k-tail-dropped"], GEMMS, &Defect::Tail(8)),
        bug("last 32 of K dropped", &["k-tail-dropped"], GEMMS, &Defect::Tail(32)),
        bug(
            "one block of 64 of K lost",
            &["k-block-lost", "k-tail-dropped"],
            GEMMS,
            &Defect::BlockLost(64),
        ),
        bug(
            "one block of 32 of K counted twice",
            &["k-block-twice"],
            GEMMS,
            &Defect::BlockTwice(32),
        ),
        bug("two columns swapped", &["columns-permuted"], GEMMS, &Defect::ColumnsSwapped),
        bug("rows shifted by one", &["rows-shifted"], GEMMS, &Defect::RowsShifted),
        bug(
            "first and last row swapped",
            &["rows-permuted", "rows-shifted"],
            GEMMS,
            &Defect::RowsSwapped,
        ),
        bug("one row written, the rest stale", &["stale-rows"], GEMMS, &Defect::StaleRows)
            .after_layer_0()
            .public(),
        bug("a tile of 32 outputs not written", &["unwritten"], GEMMS, &Defect::TileUnwritten),
        bug(
            "one lane of every tile of 16 spoilt",
            &["tile-periodic"],
            GEMMS,
            &Defect::LaneSpoilt(16),
        ),
        bug("a tile of 64 outputs spoilt", &["one-tile"], GEMMS, &Defect::TileSpoilt(64)),
        bug("weight read along the wrong axis", &["transposed-weight"], GEMMS, &Defect::Transposed),
        bug(
            "halves of the inner index swapped",
            &["weight-permuted"],
            GEMMS,
            &Defect::HalvesSwapped,
        ),
        bug(
            "neighbours of the inner index swapped",
            &["weight-permuted"],
            GEMMS,
            &Defect::NeighboursSwapped,
        ),
        bug(
            "nibbles of blocks of 32 interleaved",
            &["weight-permuted"],
            GEMMS,
            &Defect::Interleaved,
        ),
        bug(
            "the previous layer's weight",
            &["swapped-weight"],
            GEMMS,
            &Defect::PreviousLayersWeight,
        )
        .after_layer_0(),
        bug(
            "k's weight for v, up's for gate",
            &["swapped-weight"],
            &["v", "ffn_gate"],
            &Defect::SistersWeight,
        ),
        // Stale buffers.
        bug(
            "layer 0's converted activation reused",
            &["stale-input"],
            GEMMS,
            &Defect::Layer0sInput,
        )
        .after_layer_0()
        .public(),
        bug(
            "the previous layer's activation reused",
            &["stale-input"],
            GEMMS,
            &Defect::PreviousLayersInput,
        )
        .after_layer_0()
        .public(),
        bug(
            "the previous layer's output returned",
            &["stale-output"],
            GEMMS,
            &Defect::PreviousLayersOutput,
        )
        .after_layer_0(),
        bug(
            "in a longer batch each token gets its neighbour's logits",
            &["batch-dependence"],
            &["logits"],
            &Defect::ShiftedInBatch,
        )
        .in_batch()
        .public(),
    ]),
    Place::Own(&[
        // Biases.
        "bias missing",
        "bias added twice",
        "the previous layer's bias",
        // Sums of what several GPUs made.
        "a GPU left out of the sum",
        "a GPU added twice",
        "the bias added on every GPU",
    ]),
    Place::Rows(&[
        // NaN and infinity.
        bug("one output is NaN", &["non-finite-output"], GEMMS, &Defect::Single(f32::NAN)),
        bug(
            "one value of the embedding is NaN",
            &["non-finite-output"],
            &["embed"],
            &Defect::Single(f32::NAN),
        ),
        bug(
            "one value of the first norm is NaN",
            &["non-finite-output"],
            &["blk.0.attn_norm"],
            &Defect::Single(f32::NAN),
        ),
        bug(
            "one value of the first query is NaN",
            &["non-finite-output"],
            &["blk.0.q"],
            &Defect::Single(f32::NAN),
        ),
        bug(
            "one value of the attention is NaN",
            &["non-finite-output"],
            &["attn"],
            &Defect::Single(f32::NAN),
        ),
        bug(
            "the largest logit exchanged with another",
            &["columns-permuted"],
            &["logits"],
            &Defect::TopSwapped,
        ),
        bug(
            "one value changes from call to call",
            &["non-determinism"],
            &["ffn_down"],
            &Defect::Flicker,
        )
        .of_repeats(),
        bug(
            "one output is infinite",
            &["non-finite-output"],
            GEMMS,
            &Defect::Single(f32::INFINITY),
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
        bug("norm rounded to bf16", &["output-rounded"], NORMS, &Defect::Rounded(Format::Bf16)),
        bug(
            "norm of the previous layer's stream",
            &["stale-input", "stale-output"],
            &["attn_norm", "ffn_norm"],
            &Defect::PreviousLayersOutput,
        )
        .after_layer_0(),
    ]),
    Place::Own(&[
        // RoPE.
        "RoPE in the other layout",
        "RoPE base 10000",
        "RoPE turns the other way",
        "RoPE one position late",
        "RoPE at the first position only",
        "RoPE left out",
        "RoPE positions, frequencies and angles in bf16",
        "RoPE factors ignored",
    ]),
    Place::Rows(&[
        // Attention.
        bug(
            "keys and values through e4m3 at a scale of 1",
            &["kv-cache-format"],
            &["attn"],
            &Defect::CacheKept(Format::E4m3, true),
        )
        .public(),
        bug(
            "keys and values through e5m2 at a scale for each tensor",
            &["kv-cache-format"],
            &["attn"],
            &Defect::CacheKept(Format::E5m2, false),
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
        "keys and values exchanged",
    ]),
    Place::Rows(&[bug(
        "attention rounded to bf16",
        &["output-rounded"],
        &["attn"],
        &Defect::Rounded(Format::Bf16),
    )]),
    Place::Own(&[
        // SwiGLU.
        "gate and up exchanged",
    ]),
    Place::Rows(&[
        bug("GELU for SiLU", &["activation-function"], &["ffn_swiglu"], &Defect::Gelu),
        bug("ReLU for SiLU", &["activation-function"], &["ffn_swiglu"], &Defect::Relu),
        bug("up projection ignored", &["activation-function"], &["ffn_swiglu"], &Defect::UpIgnored),
        bug(
            "SwiGLU rounded to f16",
            &["output-rounded"],
            &["ffn_swiglu"],
            &Defect::Rounded(Format::F16),
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
        bug("a cache in the other FP8 format", &["kv-cache-format"], CACHES, &Defect::CacheFormat),
        bug(
            "a cache truncated to its format",
            &["truncating-cast"],
            CACHES,
            &Defect::CacheTruncated,
        ),
        bug(
            "a cache scaled by its tensor",
            &["kv-cache-scale"],
            CACHES,
            &Defect::CacheScaleOfTensor,
        ),
        bug("a cache's scale left out", &["kv-cache-scale"], CACHES, &Defect::CacheScaleMissing),
    ]),
    Place::Own(&[
        "gain without its 1",
        "whole heads turned for a part",
        "a factor left out",
        "a factor applied twice",
        "sinks ignored",
        "mean not subtracted",
        "norm without its bias",
    ]),
    Place::Rows(&[
        bug("GELU (exact) without a gate", &["activation-function"], &["ffn_act"], &Defect::Gelu),
        bug("ReLU without a gate", &["activation-function"], &["ffn_act"], &Defect::Relu),
    ]),
    Place::Own(&[
        "a state that does not decay",
        "a state corrected whole",
        // Mixtures of experts.
        "a token's best expert passed over",
        "weights of experts (not) divided by their sum",
        "factor of routing left out",
        "experts chosen without the bias",
        "an expert's matrix for another's",
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
        bug("residual rounded to bf16", &["output-rounded"], ADDS, &Defect::Rounded(Format::Bf16)),
        // Embedding.
        bug("embedding row off by one", &["wrong-row"], &["embed"], &Defect::RowOffByOne),
        bug(
            "embedding halves of blocks interleaved",
            &["block-order"],
            &["embed"],
            &Defect::EmbedInterleaved,
        ),
        bug("embedding times sqrt(hidden)", &["scale-wrong"], &["embed"], &Defect::TimesRootHidden),
        bug(
            "embedding rounded to bf16",
            &["output-rounded"],
            &["embed"],
            &Defect::Rounded(Format::Bf16),
        ),
        // Integers.
        bug(
            "integers wrap by a scale that is set beforehand",
            &["int8-wrapped"],
            GEMMS,
            &Defect::XWrapped(0.5),
        )
        .int8()
        .public(),
        bug(
            "weight scaled to 128 steps: -128 is used",
            &["int8-range"],
            GEMMS,
            &Defect::WSaturated(127.0 / 128.0),
        )
        .int8(),
        bug(
            "zero point of the activation not taken away",
            &["zero-point-ignored"],
            GEMMS,
            &Defect::XZeroPointIgnored,
        )
        .int8()
        .public(),
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
