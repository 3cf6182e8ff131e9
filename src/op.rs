//! What a stage computes and with which arithmetic: ops, arms, recipes, sites.
//!
//! Plain data, shared by every module. It knows neither how an op is computed
//! nor how a manifest is read.

use serde::{Deserialize, Serialize};

use crate::dtype::Format;

/// One way to compute a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// CPU, f64 accumulation over dequantised weights: the definition of truth.
    Reference,
    /// CPU, bit for bit what the chip's arithmetic prescribes.
    Emulated,
    /// The real GPU.
    Device,
}

/// The granularity of a GEMM operand's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightScale {
    /// One scale for the whole weight.
    Tensor,
    /// One scale per output channel (row of the weight).
    Channel,
    /// One scale per 128 x 128 block.
    Block128,
}

/// The granularity of an activation's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationScale {
    /// One scale for the whole batch.
    Tensor,
    /// One scale per token (row of the activation).
    Token,
    /// One scale per 1 x 128 block of a row.
    Block128,
}

/// Scales of both GEMM operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// Granularity of the weight's scale.
    pub weight: WeightScale,
    /// Granularity of the activation's scale.
    pub activation: ActivationScale,
}

/// How FP8 products are accumulated along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accumulate {
    /// The tensor core's accumulator carries all along K.
    Fast,
    /// Every 128 elements it is added to an f32 accumulator and restarts.
    Promoted,
}

/// The chip whose arithmetic is prescribed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChipName {
    /// The device's own chip where a device takes part, else Hopper.
    Auto,
    /// V100.
    Volta,
    /// A100, A2.
    Ampere,
    /// RTX 4090, L40S.
    Ada,
    /// H100, H200.
    Hopper,
    /// B200.
    Blackwell,
}

/// The arithmetic under test. Emulated and device arms always share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Operand format of every GEMM.
    pub gemm: Format,
    /// Granularity of the operands' scales; FP8 only.
    pub scale: Scale,
    /// Accumulation along K; FP8 only.
    pub accumulate: Accumulate,
    /// Type of a GEMM's result: f32, bf16 or f16.
    pub output: Format,
    /// The chip.
    pub chip: ChipName,
}

/// A named tensor inside the model, such as `blk.7.attn_norm`; f32 `[tokens, width]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Site(pub String);

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A stage's name, as its manifest's `id` gives it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StageId(pub String);

impl std::fmt::Display for StageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The tensor that an op reads: a site of another stage's reference arm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputRef {
    /// The stage that made it.
    pub stage: StageId,
    /// The site within that stage.
    pub site: Site,
}

/// Which sites a forward pass keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capture {
    /// The logits of every token.
    #[default]
    Logits,
    /// Every site of every layer.
    EverySite,
}

/// What a stage computes, with its parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// The whole transformer over the prompt.
    Forward {
        /// Sites to keep.
        capture: Capture,
        /// How often each arm computes it; above one, the repeats must be bit-identical.
        repeats: u32,
        /// Tokens to decode greedily after the prompt, with a KV cache.
        decode: u32,
    },
    /// Token rows looked up in an embedding matrix; site `embed`.
    Embed {
        /// The embedding tensor, without `.weight`.
        weight: String,
    },
    /// Root mean square normalisation; the site is the weight's name.
    RmsNorm {
        /// The tensor to normalise.
        input: InputRef,
        /// The gain, without `.weight`.
        weight: String,
    },
    /// `y = x w^T + b` for each weight; the sites are the projections' own.
    Matmul {
        /// The activation, `[tokens, K]`.
        input: InputRef,
        /// The weights, without `.weight`, each `[M, K]`.
        weights: Vec<String>,
    },
}
