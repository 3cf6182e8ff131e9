//! One op on one arm.
//!
//! [`Call`] is the list of what a transformer needs; each arm is an [`Ops`], which computes
//! every one. [`forward`](forward::forward) is written once over it. Nothing here knows of
//! stages, contracts or caches.

pub mod arms;
pub mod block_departure;
pub mod call;
pub mod checkpoint;
mod conversion;
pub mod cuda;
pub mod delta;
pub mod departure;
mod dots;
pub mod drawn;
pub mod eight_bit;
pub mod emulated;
pub mod engine_kernels;
pub mod experts;
mod exponential;
pub mod floor;
pub mod flow;
pub mod forward;
pub mod generate;
pub mod kv_cache;
pub mod parallel;
pub mod product;
pub mod recorded;
pub mod reference;
pub mod rope;
pub mod shares;
pub mod sweep;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use self::call::Call;
use crate::interrupt;
use crate::model::{ModelError, Weight};
use crate::op::Site;
use crate::tensor::Tensor;
use crate::tensor_file::TensorFileError;

/// Why an op could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ComputeError {
    /// The model's file did not give what the op needs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A weight holds NaN or infinities where an op reads it, and so does what is made of it: no arm
    /// is at fault.
    #[error("{0}")]
    NotFinite(ModelError),
    /// A tensor could not be put away.
    #[error(
        "a tensor cannot be put away on disk, as `--memory` asks for: {0}; make room in the folder \
         of runs, or leave `--memory` out"
    )]
    Spill(std::io::Error),
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

/// The shape of one attention call, and what is done to its scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head of queries and keys.
    pub head_dim: usize,
    /// Width of a head of values.
    pub value_dim: usize,
    /// Position of the first query row; keys and values start at position 0.
    pub first_position: usize,
    /// What scores are multiplied by; `1 / sqrt(head_dim)` where nothing is said.
    pub scale: Option<f64>,
    /// Positions that a query sees, its own among them; all up to its own where nothing is said.
    pub window: Option<usize>,
    /// Where scores are bent towards a limit `c`: `c tanh(score / c)`, after the scale.
    pub cap: Option<f64>,
    /// For each query head a score that stands beside those of the keys and has no value.
    pub sinks: Option<&'a [f32]>,
}

impl AttentionShape<'_> {
    /// Causal attention over all keys, with the usual scale.
    pub fn causal(
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        first_position: usize,
    ) -> AttentionShape<'static> {
        let (value_dim, scale, window, cap, sinks) = (head_dim, None, None, None, None);
        AttentionShape {
            heads,
            kv_heads,
            head_dim,
            value_dim,
            first_position,
            scale,
            window,
            cap,
            sinks,
        }
    }

    /// The sink of a query head.
    pub fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.and_then(|sinks| sinks.get(head)).copied()
    }

    /// The scale as the reference multiplies with it.
    pub fn exact_scale(&self) -> f64 {
        self.scale.unwrap_or_else(|| 1.0 / (self.head_dim as f64).sqrt())
    }

    /// The scale as the project's kernels multiply with it.
    pub fn f32_scale(&self) -> f32 {
        self.scale.map_or_else(|| 1.0 / (self.head_dim as f32).sqrt(), |scale| scale as f32)
    }

    /// The positions that the query in `row` sees.
    pub fn seen(&self, row: usize) -> Range<usize> {
        let end = self.first_position + row + 1;
        end.saturating_sub(self.window.unwrap_or(end))..end
    }

    /// Whether every query sees all positions up to its own, and scores are only scaled as usual.
    pub fn is_plain(&self) -> bool {
        self.scale.is_none()
            && self.window.is_none()
            && self.cap.is_none()
            && self.sinks.is_none()
            && self.value_dim == self.head_dim
    }
}

/// The ops of a transformer. Each arm is one implementation, with one entry for all of them.
///
/// Activations are f32 `[tokens, width]`; an op allocates its result.
pub trait Ops: Sync {
    /// Computes one op.
    ///
    /// # Errors
    /// If shapes do not fit, a weight cannot be read, or the arm does not know the op.
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError>;

    /// The products so far, where a library computed them.
    fn gemms(&self) -> Vec<GemmRecord> {
        Vec::new()
    }
}

/// What answers the calls of a pass, each with the site that it makes: an arm, which does not
/// care where it is, or somebody who looks over its shoulder.
pub trait Pass: Sync {
    /// The tensor of a site.
    ///
    /// # Errors
    /// As the op.
    fn answer(&self, site: &Site, call: &Call<'_>) -> Result<Tensor, ComputeError>;

    /// The products so far, where a library computed them.
    fn products(&self) -> Vec<GemmRecord> {
        Vec::new()
    }
}

impl<T: Ops + ?Sized> Pass for T {
    fn answer(&self, _: &Site, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        self.compute(call)
    }

    fn products(&self) -> Vec<GemmRecord> {
        self.gemms()
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

/// Gain and bias of a LayerNorm, one after the other for each group of a row; zeros where there is
/// no bias.
///
/// # Errors
/// If the gain does not divide the row, or the bias has another shape.
pub fn gain_and_bias(
    x: &Tensor,
    gain: Weight<'_>,
    bias: Option<Weight<'_>>,
) -> Result<(Vec<f32>, Vec<f32>), ComputeError> {
    check_gain(x, &gain)?;
    let what = || format!("a norm with the gain `{}`", gain.name());
    if gain.rows() > 1 && x.width() != gain.rows() * gain.width() {
        return Err(ComputeError::Shape {
            what: what(),
            left: format!("input [{}, {}]", x.rows(), x.width()),
            right: format!("gain [{}, {}]", gain.rows(), gain.width()),
        });
    }
    let values = gain.to_vec()?;
    let Some(bias) = bias else {
        let none = vec![0.0; values.len()];
        return Ok((values, none));
    };
    if (gain.rows(), gain.width()) != (bias.rows(), bias.width()) {
        return Err(ComputeError::Shape {
            what: what(),
            left: format!("gain [{}, {}]", gain.rows(), gain.width()),
            right: format!("bias `{}` [{}, {}]", bias.name(), bias.rows(), bias.width()),
        });
    }
    Ok((values, bias.to_vec()?))
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
