//! Activations and gated products as engines compute them: in f32 from values of
//! bf16, f16 or f32, rounded where the engine rounds.
//!
//! It knows one number at a time: no tensors' names, no sites.
//!
//! Sources: PyTorch's `ActivationSiluKernel.cu` and `ActivationGeluKernel.cu`;
//! vLLM's and SGLang's `activation_kernels.cu`. Evidence: PyTorch's SiLU and both
//! GELUs in f32 agree with an H100 in the digests of 2^27 inputs each, in bf16 with
//! 98,304 values of an H200; vLLM's and SGLang's products in every one of the captures.

use super::cuda_math;
use crate::dtype::Format;
use crate::tensor::Tensor;

/// `x / (1 + e^-x)`.
#[inline]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + cuda_math::exp(-x))
}

/// GELU with the error function: `x/2 (1 + erf(x / sqrt 2))`.
#[inline]
pub fn gelu(x: f32) -> f32 {
    x * 0.5 * (1.0 + cuda_math::erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// GELU with the hyperbolic tangent.
#[inline]
pub fn gelu_tanh(x: f32) -> f32 {
    // sqrt(2) * (2 / sqrt(pi)) / 2, rounded once.
    const BETA: f32 = 0.797_884_6;
    let inner = BETA * 0.044_715f32.mul_add(x * x * x, x);
    0.5 * x * (1.0 + cuda_math::tanh(inner))
}

/// Which function stands before the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// See [`silu`].
    Silu,
    /// See [`gelu`].
    Gelu,
    /// See [`gelu_tanh`].
    GeluTanh,
}

impl Activation {
    /// Its value, in f32.
    #[inline]
    pub fn of(self, x: f32) -> f32 {
        match self {
            Activation::Silu => silu(x),
            Activation::Gelu => gelu(x),
            Activation::GeluTanh => gelu_tanh(x),
        }
    }
}

/// `activation(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gated {
    /// The function.
    pub activation: Activation,
    /// The format of the values that are read and written.
    pub format: Format,
    /// Whether the activation is rounded to the format before the product:
    /// transformers and vLLM do, SGLang does not.
    pub rounds_activation: bool,
}

impl Gated {
    /// One value.
    #[inline]
    pub fn value(&self, gate: f32, up: f32) -> f32 {
        let activated = self.activation.of(gate);
        let activated =
            if self.rounds_activation { self.format.round(activated) } else { activated };
        self.format.round(activated * up)
    }

    /// Gate and up in two tensors of one shape.
    pub fn apply(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        let values = gate.data().iter().zip(up.data()).map(|(&gate, &up)| self.value(gate, up));
        Tensor::new(gate.width(), values.collect())
    }

    /// Gate and up side by side in each row, as vLLM and SGLang keep them.
    pub fn apply_joined(&self, joined: &Tensor) -> Tensor {
        let half = (joined.width() / 2).max(1);
        let values = (0..joined.rows()).flat_map(|row| {
            let (gate, up) = joined.row(row).split_at(half);
            gate.iter().zip(up).map(|(&gate, &up)| self.value(gate, up))
        });
        Tensor::new(half, values.collect())
    }
}
