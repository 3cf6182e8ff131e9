//! One op with its operands as a value.
//!
//! It is what every arm is handed, and what whoever looks over an arm's shoulder sees: a
//! planted bug that changes one call, a diagnosis that computes one call again under a
//! hypothesis. Nothing is computed here.

use super::delta::{Convolution, DeltaRule, Gates};
use super::experts::Products;
use super::kv_cache::Cached;
use super::{AttentionShape, ComputeError, Ops, Pass};
use crate::model::{Activation, Rope, Routing, Weight, WeightType};
use crate::op::Site;
use crate::tensor::Tensor;

/// One op with its operands. Activations are f32 `[tokens, width]`.
#[derive(Clone, Copy)]
pub enum Call<'a> {
    /// Rows `tokens` of the embedding matrix, `[tokens, hidden]`.
    Embed {
        /// The embedding.
        weight: Weight<'a>,
        /// The rows to look up.
        tokens: &'a [u32],
    },
    /// `x / sqrt(mean(x^2) + eps) * gain`, on each group of `gain.width()` values of a row:
    /// the whole row, or each head of it (QK norm).
    RmsNorm {
        /// What is normalised.
        x: &'a Tensor,
        /// The gain.
        gain: Weight<'a>,
        /// What stands under the root beside the mean square.
        eps: f32,
    },
    /// `(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * gain + bias`, on each group of
    /// `gain.width()` values of a row; each group of a row has a row of the gain, or all have one.
    LayerNorm {
        /// What is normalised.
        x: &'a Tensor,
        /// The gain.
        gain: Weight<'a>,
        /// What is added, of the gain's shape; nothing where there is none.
        bias: Option<Weight<'a>>,
        /// What stands under the root beside the variance.
        eps: f32,
    },
    /// `x w^T + bias`: `[tokens, K]` by `[M, K]` gives `[tokens, M]`.
    Matmul {
        /// The activation.
        x: &'a Tensor,
        /// The weight.
        weight: Weight<'a>,
        /// The bias, where there is one.
        bias: Option<Weight<'a>>,
    },
    /// Rotary position embedding of each head of each row; row `i` stands at position
    /// `first_position + i`. `rope.dimensions` values of a head turn, the others stay.
    Rope {
        /// What is rotated.
        x: &'a Tensor,
        /// The geometry.
        rope: &'a Rope,
        /// Width of a head.
        head_dim: usize,
        /// Position of the first row.
        first_position: usize,
    },
    /// What a cache of keys or values gives back: each value's code of that format, times the
    /// scale.
    Cached(Cached<'a>),
    /// Causal attention with grouped queries: `q` is `[tokens, heads * head_dim]`,
    /// `k` and `v` are `[positions, kv_heads * head_dim]`.
    Attention {
        /// Queries.
        q: &'a Tensor,
        /// Keys.
        k: &'a Tensor,
        /// Values.
        v: &'a Tensor,
        /// Heads and positions.
        shape: AttentionShape<'a>,
    },
    /// `activation(gate) * up`.
    Gated {
        /// What goes through the activation.
        gate: &'a Tensor,
        /// What it is multiplied with.
        up: &'a Tensor,
        /// The function.
        activation: Activation,
    },
    /// `activation(x)`.
    Activated {
        /// What goes through the activation.
        x: &'a Tensor,
        /// The function.
        activation: Activation,
    },
    /// The weights of the experts that each token goes to, `[tokens, experts]`; zero for others.
    Route {
        /// The router's scores, `[tokens, experts]`.
        scores: &'a Tensor,
        /// What is added to a score where experts are chosen, and nowhere else.
        bias: Option<Weight<'a>>,
        /// From scores to weights.
        routing: &'a Routing,
    },
    /// Each token's products with the experts that it goes to, side by side.
    Experts(Products<'a>),
    /// The sum of each token's experts, each times its weight, in the order of the experts.
    Mix {
        /// Their outputs, `[tokens, used * width]`.
        x: &'a Tensor,
        /// The router's weights, `[tokens, experts]`.
        routes: &'a Tensor,
        /// Experts that each token goes to.
        used: usize,
    },
    /// A convolution of each channel over the last positions, and SiLU of it.
    Convolve(Convolution<'a>),
    /// How much of a delta net's state stays, and how much of it is corrected, at each token.
    Gates(Gates<'a>),
    /// The gated delta rule.
    Delta(DeltaRule<'a>),
    /// `x / (1 + e^-gate)`.
    SigmoidGate {
        /// What is scaled.
        x: &'a Tensor,
        /// The gates: one for each row, or for each value.
        gate: &'a Tensor,
    },
    /// `a + b`, the residual stream's addition.
    Add {
        /// The residual stream.
        a: &'a Tensor,
        /// What is added to it.
        b: &'a Tensor,
    },
    /// `x * factor`.
    Scale {
        /// What is scaled.
        x: &'a Tensor,
        /// By what.
        factor: f64,
        /// How engines hold it.
        held: Held,
    },
    /// `cap * tanh(x / cap)`.
    SoftCap {
        /// What is bent.
        x: &'a Tensor,
        /// The limit.
        cap: f64,
    },
}

/// How an engine holds a factor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// As a number, in f32.
    Number,
    /// As a value of the stream's type.
    Stream,
    /// As a divisor, whose reciprocal it takes in f32.
    Divisor,
}

impl Call<'_> {
    /// Computes it on an arm.
    ///
    /// # Errors
    /// As the arm's op.
    pub fn on(&self, ops: &dyn Ops) -> Result<Tensor, ComputeError> {
        ops.compute(self)
    }

    /// The same call of other activations: `of` is asked for each, in their order.
    pub fn with_operands<'b>(&'b self, mut of: impl FnMut(&'b Tensor) -> &'b Tensor) -> Call<'b> {
        match *self {
            Call::Embed { .. } => *self,
            Call::RmsNorm { x, gain, eps } => Call::RmsNorm { x: of(x), gain, eps },
            Call::LayerNorm { x, gain, bias, eps } => Call::LayerNorm { x: of(x), gain, bias, eps },
            Call::Matmul { x, weight, bias } => Call::Matmul { x: of(x), weight, bias },
            Call::Rope { x, rope, head_dim, first_position } => {
                Call::Rope { x: of(x), rope, head_dim, first_position }
            }
            Call::Cached(cached) => Call::Cached(Cached { x: of(cached.x), ..cached }),
            Call::Attention { q, k, v, shape } => {
                Call::Attention { q: of(q), k: of(k), v: of(v), shape }
            }
            Call::Gated { gate, up, activation } => {
                Call::Gated { gate: of(gate), up: of(up), activation }
            }
            Call::Activated { x, activation } => Call::Activated { x: of(x), activation },
            Call::Route { scores, bias, routing } => {
                Call::Route { scores: of(scores), bias, routing }
            }
            Call::Experts(products) => {
                let (x, routes) = (of(products.x), of(products.routes));
                Call::Experts(Products { x, routes, ..products })
            }
            Call::Mix { x, routes, used } => Call::Mix { x: of(x), routes: of(routes), used },
            Call::SigmoidGate { x, gate } => Call::SigmoidGate { x: of(x), gate: of(gate) },
            Call::Convolve(convolution) => {
                Call::Convolve(Convolution { x: of(convolution.x), ..convolution })
            }
            Call::Gates(gates) => Call::Gates(Gates { x: of(gates.x), ..gates }),
            Call::Delta(rule) => {
                Call::Delta(DeltaRule { x: of(rule.x), gates: of(rule.gates), ..rule })
            }
            Call::Add { a, b } => Call::Add { a: of(a), b: of(b) },
            Call::Scale { x, factor, held } => Call::Scale { x: of(x), factor, held },
            Call::SoftCap { x, cap } => Call::SoftCap { x: of(x), cap },
        }
    }

    /// The op's name.
    pub fn op(&self) -> &'static str {
        match self {
            Call::Embed { .. } => "embed",
            Call::RmsNorm { .. } => "rms_norm",
            Call::LayerNorm { .. } => "layer_norm",
            Call::Matmul { .. } => "matmul",
            Call::Rope { .. } => "rope",
            Call::Cached(_) => "kv_cache",
            Call::Attention { .. } => "attention",
            Call::Gated { .. } => "swiglu",
            Call::Activated { .. } => "activation",
            Call::Route { .. } => "route",
            Call::Experts(_) => "experts",
            Call::Mix { .. } => "mix",
            Call::SigmoidGate { .. } => "sigmoid_gate",
            Call::Convolve(_) => "convolution",
            Call::Gates(_) => "gates",
            Call::Delta(_) => "delta_rule",
            Call::Add { .. } => "add",
            Call::Scale { .. } => "scale",
            Call::SoftCap { .. } => "soft_cap",
        }
    }

    /// What the op is called where it is refused because a recipe names an engine, of which no kernel
    /// for it is known; nothing of an op of which some are.
    pub fn without_engine_kernels(&self) -> Option<&'static str> {
        match self {
            Call::Embed { .. }
            | Call::RmsNorm { .. }
            | Call::Matmul { .. }
            | Call::Rope { .. }
            | Call::Attention { .. }
            | Call::Gated { .. }
            | Call::Add { .. }
            | Call::Scale { .. }
            | Call::SoftCap { .. } => None,
            Call::LayerNorm { .. } => Some("a LayerNorm"),
            Call::Cached(_) => Some("a cache of keys and values in a type of its own"),
            Call::Activated { .. } => Some("an activation without a gate"),
            Call::Route { .. } => Some("a router of experts"),
            Call::Experts(_) => Some("the products of a mixture of experts"),
            Call::Mix { .. } => Some("the sum of a mixture of experts"),
            Call::SigmoidGate { .. } => Some("the gate of a shared expert"),
            Call::Convolve(_) => Some("a convolution before a delta net"),
            Call::Gates(_) => Some("the gates of a delta net"),
            Call::Delta(_) => Some("the gated delta rule"),
        }
    }

    /// Rows and width of the result.
    pub fn shape(&self) -> [usize; 2] {
        match *self {
            Call::Embed { weight, tokens } => [tokens.len(), weight.width()],
            Call::RmsNorm { x, .. }
            | Call::LayerNorm { x, .. }
            | Call::Activated { x, .. }
            | Call::Route { scores: x, .. }
            | Call::SigmoidGate { x, .. }
            | Call::Rope { x, .. }
            | Call::Scale { x, .. }
            | Call::SoftCap { x, .. } => [x.rows(), x.width()],
            Call::Cached(Cached { x, .. }) => [x.rows(), x.width()],
            Call::Matmul { x, weight, .. } => [x.rows(), weight.rows()],
            Call::Attention { q, shape, .. } => [q.rows(), shape.heads * shape.value_dim],
            Call::Gated { gate, .. } => [gate.rows(), gate.width()],
            Call::Add { a, .. } => [a.rows(), a.width()],
            Call::Experts(products) => products.shape(),
            Call::Convolve(convolution) => convolution.shape(),
            Call::Gates(gates) => gates.shape(),
            Call::Delta(rule) => rule.shape(),
            Call::Mix { x, used, .. } => [x.rows(), x.width() / used.max(1)],
        }
    }
}

/// What is done with each call: it returns the tensor that the pass goes on with.
pub type Hook<'h> = dyn Fn(&Site, &Call<'_>) -> Result<Tensor, ComputeError> + Sync + 'h;

/// Hands every call of a pass to a hook, with the site that it makes.
pub struct Watched<'h> {
    hook: Box<Hook<'h>>,
}

impl<'h> Watched<'h> {
    /// A pass whose ops give what `hook` returns.
    pub fn new(
        hook: impl Fn(&Site, &Call<'_>) -> Result<Tensor, ComputeError> + Sync + 'h,
    ) -> Watched<'h> {
        Watched { hook: Box::new(hook) }
    }
}

impl Pass for Watched<'_> {
    fn answer(&self, site: &Site, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        (self.hook)(site, call)
    }
}

/// A weight made of f32 values: what a call looks like under another weight.
pub struct MadeWeight {
    name: String,
    rows: usize,
    width: usize,
    bytes: Vec<u8>,
}

impl MadeWeight {
    /// `rows` rows of `values`; arms remember weights by name, so it must be new.
    pub fn new(name: String, rows: usize, values: &[f32]) -> MadeWeight {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        MadeWeight { name, rows, width: values.len() / rows.max(1), bytes }
    }

    /// The weight.
    ///
    /// # Errors
    /// If it has no element.
    pub fn weight(&self) -> Result<Weight<'_>, ComputeError> {
        Ok(Weight::new(&self.name, WeightType::F32, self.rows, self.width, &self.bytes)?)
    }
}
