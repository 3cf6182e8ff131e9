//! Rotary position embedding as engines compute it: the table of cosines and
//! sines, and the rotation.
//!
//! It knows angles and heads: no models. The halves of a head are rotated against
//! each other, pair `i` being values `i` and `i + width / 2`.
//!
//! | who | table | rotation |
//! | --- | --- | --- |
//! | transformers | rounded to the format | both products and their sum rounded |
//! | vLLM | rounded to the format | f32, rounded once |
//! | SGLang | f32 | f32, rounded once |
//! | transformers' OLMo 2 | f32 | products and sum in f32, and the result rounded |
//!
//! A model that is cast to bf16 as a whole has its inverse frequencies cast too:
//! give them rounded.
//!
//! In f32 one of the products is fused with the sum. Evidence: every rotation in
//! the captures of transformers, vLLM and SGLang on an H200.

use super::cuda_math;
use crate::dtype::Format;
use crate::model::{Rope, Scaling};
use crate::tensor::Tensor;

/// Cosines and sines, `[positions, pairs]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
}

impl Table {
    /// CUDA's `cosf` and `sinf` of `position * frequency`, times `scaling`, rounded
    /// to `format`.
    pub fn new(positions: &[u32], frequencies: &[f32], scaling: f32, format: Format) -> Table {
        let table = |function: fn(f32) -> f32| {
            let values = positions.iter().flat_map(|&position| {
                frequencies.iter().map(move |&frequency| {
                    format.round(function(frequency * position as f32) * scaling)
                })
            });
            Tensor::new(frequencies.len().max(1), values.collect())
        };
        Table { cos: table(cuda_math::cos), sin: table(cuda_math::sin) }
    }
}

/// How a pair is rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// Each product and the sum are rounded: tensor operations, as in transformers.
    RoundsProducts,
    /// One product and one fused multiply-add in f32, rounded once.
    Fused,
    /// Tensor operations in f32, and a cast.
    InF32,
}

/// The frequencies of a model that stretches them, from the plain ones, in the f32 steps of
/// transformers, which makes them on the CPU. A number that is divided by a tensor is multiplied
/// with the reciprocals.
///
/// Source: `modeling_rope_utils.py` of transformers 5.17; `Tensor.__rtruediv__` of PyTorch.
pub fn scaled(mut plain: Vec<f32>, geometry: &Rope) -> Vec<f32> {
    let Some(scaling) = geometry.scaling else { return plain };
    for (pair, frequency) in plain.iter_mut().enumerate() {
        let own = *frequency;
        *frequency = match scaling {
            Scaling::Linear(factor) => own / factor as f32,
            Scaling::Llama3 { factor, low, high, context } => {
                let wave = (1.0 / own) * (2.0 * std::f64::consts::PI) as f32;
                let long = wave > (context / low) as f32;
                let short = wave < (context / high) as f32;
                if long {
                    own / factor as f32
                } else if short {
                    own
                } else {
                    let turns = (1.0 / wave) * context as f32;
                    let smooth = (turns - low as f32) / (high - low) as f32;
                    (1.0 - smooth) * own / factor as f32 + smooth * own
                }
            }
            Scaling::Yarn { factor, low, high } => {
                // The power itself, whose reciprocal the plain frequency is.
                let power = super::cpu_math::pow(
                    geometry.theta as f32,
                    (2 * pair) as f32 / geometry.dimensions as f32,
                );
                let stretched = 1.0 / (factor as f32 * power);
                let ramp = (pair as f32 - low as f32) / (high - low) as f32;
                let kept = 1.0 - ramp.clamp(0.0, 1.0);
                stretched * (1.0 - kept) + own * kept
            }
            Scaling::Long => {
                let power = super::cpu_math::pow(
                    geometry.theta as f32,
                    (2 * pair) as f32 / geometry.dimensions as f32,
                );
                let factor = geometry.factors.as_ref().map_or(1.0, |factors| factors[pair]);
                1.0 / (factor * power)
            }
        };
    }
    plain
}

/// A pair after the rotation, rounded to the format.
#[inline]
pub fn rotate(
    rotation: Rotation,
    format: Format,
    a: f32,
    b: f32,
    cos: f32,
    sin: f32,
) -> (f32, f32) {
    match rotation {
        Rotation::RoundsProducts => {
            let product = |x: f32, y: f32| format.round(x * y);
            (
                format.round(product(a, cos) + product(-b, sin)),
                format.round(product(b, cos) + product(a, sin)),
            )
        }
        Rotation::InF32 => (format.round(a * cos + -b * sin), format.round(b * cos + a * sin)),
        Rotation::Fused => {
            (format.round(a.mul_add(cos, -(b * sin))), format.round(b.mul_add(cos, a * sin)))
        }
    }
}

/// Rotates every head of `head_dim` values of every row; row `i` takes row `i` of
/// the table. Values beyond twice the table's width stay as they are.
pub fn apply(
    rotation: Rotation,
    format: Format,
    x: &Tensor,
    head_dim: usize,
    table: &Table,
) -> Tensor {
    let mut y = x.clone();
    let pairs = table.cos.width().min(head_dim / 2);
    for row in 0..x.rows() {
        let (cos, sin) = (table.cos.row(row), table.sin.row(row));
        for head in y.row_mut(row).chunks_exact_mut(head_dim.max(1)) {
            for pair in 0..pairs {
                let (a, b) = (head[pair], head[pair + pairs]);
                (head[pair], head[pair + pairs]) =
                    rotate(rotation, format, a, b, cos[pair], sin[pair]);
            }
        }
    }
    y
}
