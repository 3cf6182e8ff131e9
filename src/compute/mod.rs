//! One op on one arm.
//!
//! [`Ops`] is the list of what a transformer needs; each arm answers every
//! entry. [`forward`](forward::forward) is written once over it. Nothing here
//! knows of stages, contracts or caches.

pub mod arms;
pub mod call;
pub mod cuda;
pub mod departure;
pub mod drawn;
pub mod eight_bit;
pub mod emulated;
pub mod engine_kernels;
pub mod floor;
pub mod forward;
pub mod generate;
pub mod product;
pub mod recorded;
pub mod reference;
pub mod rope;
pub mod shares;
pub mod vector;

use serde::{Deserialize, Serialize};

use crate::interrupt;
use crate::model::{ModelError, Rope, Weight};
use crate::tensor::Tensor;
use crate::tensor_file::TensorFileError;

/// Why an op could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ComputeError {
    /// The model's file did not give what the op needs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The emulated GEMM refused its operands.
    #[error(transparent)]
    Gemm(#[from] emulated::gemm::GemmError),
    /// Two shapes that must agree do not.
    #[error("{what}: {left} on one side, {right} on the other")]
    Shape {
        /// What was to be combined.
        what: String,
        /// One side's shape.
        left: String,
        /// The other side's shape.
        right: String,
    },
    /// A token that the vocabulary does not have.
    #[error(
        "token {token} at position {position} is out of the vocabulary of {vocabulary} tokens; \
         give smaller ids with `tokens` or `--tokens`, or a text with `prompt`"
    )]
    Token {
        /// The token.
        token: u32,
        /// Its place in the prompt, from 0.
        position: usize,
        /// Number of tokens in the vocabulary.
        vocabulary: usize,
    },
    /// More positions than the model was made for.
    #[error(
        "{positions} positions are needed (prompt and decoded tokens), but the model's context \
         length is {context_length}; shorten the prompt or `decode`"
    )]
    Context {
        /// Positions asked for.
        positions: usize,
        /// Positions that the model has.
        context_length: usize,
    },
    /// A recipe that this arm or chip cannot compute.
    #[error("the recipe cannot be computed: {0}")]
    Recipe(String),
    /// A device that is not there, although nothing said so before it was asked.
    #[error("{0}")]
    Unavailable(String),
    /// A site that should have been recorded is missing.
    #[error("site `{0}` was not recorded, so nothing can be anchored on it")]
    NotRecorded(String),
    /// A device did not do its work.
    #[error("{gpu}, {what}: {problem}")]
    Device {
        /// Which GPU.
        gpu: String,
        /// What it was to do.
        what: String,
        /// What happened, and what to do.
        problem: String,
    },
    /// A tensor that should be in a file is not there, or not usable.
    #[error(transparent)]
    TensorFile(#[from] TensorFileError),
    /// The user asked to stop.
    #[error("stopped on request")]
    Interrupted,
}

/// Products that a library computed in the same way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GemmRecord {
    /// Tokens, outputs and inner width, as the library saw them: padded.
    pub shape: [usize; 3],
    /// The library's algorithm, in its own numbers.
    pub algorithm: String,
    /// The weights.
    pub weights: Vec<String>,
}

/// The shape of one attention call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Position of the first query row; keys and values start at position 0.
    pub first_position: usize,
}

/// The ops of a transformer. Each arm is one implementation.
///
/// Activations are f32 `[tokens, width]`; an op allocates its result.
pub trait Ops: Sync {
    /// Rows `tokens` of the embedding matrix, `[tokens, hidden]`.
    fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError>;

    /// `x / sqrt(mean(x^2) + eps) * gain`, on each group of `gain.width()`
    /// values of a row: the whole row, or each head of it (QK norm).
    fn rms_norm(&self, x: &Tensor, gain: Weight<'_>, eps: f32) -> Result<Tensor, ComputeError>;

    /// `x w^T + bias`: `[tokens, K]` by `[M, K]` gives `[tokens, M]`.
    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError>;

    /// Rotary position embedding of each head of each row; row `i` stands at
    /// position `first_position + i`.
    fn rope(
        &self,
        x: &Tensor,
        rope: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError>;

    /// Causal attention with grouped queries: `q` is `[tokens, heads * head_dim]`,
    /// `k` and `v` are `[positions, kv_heads * head_dim]`.
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
    ) -> Result<Tensor, ComputeError>;

    /// `silu(gate) * up`.
    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor, ComputeError>;

    /// `a + b`, the residual stream's addition.
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError>;

    /// The products so far, where a library computed them.
    fn gemms(&self) -> Vec<GemmRecord> {
        Vec::new()
    }
}

/// Refuses tokens that the embedding `weight` has no row for.
pub fn check_tokens(weight: &Weight<'_>, tokens: &[u32]) -> Result<(), ComputeError> {
    let vocabulary = weight.rows();
    match tokens.iter().position(|&token| token as usize >= vocabulary) {
        None => Ok(()),
        Some(position) => {
            Err(ComputeError::Token { token: tokens[position], position, vocabulary })
        }
    }
}

/// Refuses a matmul whose inner widths differ, or whose bias does not fit.
pub fn check_matmul(
    x: &Tensor,
    weight: &Weight<'_>,
    bias: Option<&Weight<'_>>,
) -> Result<(), ComputeError> {
    if x.width() != weight.width() {
        return Err(ComputeError::Shape {
            what: format!("the inner width of a matmul with `{}`", weight.name()),
            left: format!("input [{}, {}]", x.rows(), x.width()),
            right: format!("weight [{}, {}]", weight.rows(), weight.width()),
        });
    }
    match bias {
        Some(bias) if bias.width() != weight.rows() => Err(ComputeError::Shape {
            what: format!("the bias `{}` of `{}`", bias.name(), weight.name()),
            left: format!("bias [{}]", bias.width()),
            right: format!("weight [{}, {}]", weight.rows(), weight.width()),
        }),
        _ => Ok(()),
    }
}

/// Refuses a norm whose gain does not divide the row.
pub fn check_gain(x: &Tensor, gain: &Weight<'_>) -> Result<(), ComputeError> {
    if gain.width() > 0 && x.width().is_multiple_of(gain.width()) {
        return Ok(());
    }
    Err(ComputeError::Shape {
        what: format!("a norm with the gain `{}`", gain.name()),
        left: format!("input [{}, {}]", x.rows(), x.width()),
        right: format!("gain [{}]", gain.width()),
    })
}

/// Refuses two tensors of different shapes.
pub fn check_same_shape(what: &str, a: &Tensor, b: &Tensor) -> Result<(), ComputeError> {
    if (a.rows(), a.width()) == (b.rows(), b.width()) {
        return Ok(());
    }
    Err(ComputeError::Shape {
        what: what.to_owned(),
        left: format!("[{}, {}]", a.rows(), a.width()),
        right: format!("[{}, {}]", b.rows(), b.width()),
    })
}

/// Ends the work when the user has asked for it.
pub fn check_interrupt() -> Result<(), ComputeError> {
    if interrupt::requested() { Err(ComputeError::Interrupted) } else { Ok(()) }
}
