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
//!
//! A model that is cast to bf16 as a whole has its inverse frequencies cast too:
//! give them rounded.
//!
//! In f32 one of the products is fused with the sum. Evidence: every rotation in
//! the captures of transformers, vLLM and SGLang on an H200.

use super::cuda_math;
use crate::dtype::Format;
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
