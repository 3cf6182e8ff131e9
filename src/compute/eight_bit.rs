//! What llama.cpp's CPU kernels compute: weights as the file has them, and every
//! GEMM's activation first rounded to 8 bits in blocks.
//!
//! ggml pairs each weight type with a type for the other operand (`vec_dot_type`
//! in ggml-cpu.c): blocks of 32 with an f16 scale (Q8_0, Q8_1) for the types of
//! blocks of 32, blocks of 256 with an f32 scale (Q8_K) for the K types, f16 for
//! f16 and bf16 for bf16. Sums are made in f64 here: what the rounding of the
//! operands costs is the point, not the order of additions. The other ops are the
//! reference's.

use std::borrow::Cow;

use super::call::Call;
use super::reference::Reference;
use super::{ComputeError, Ops};
use crate::dtype::Format;
use crate::model::{Weight, WeightType};
use crate::tensor::Tensor;

/// The arithmetic, in words.
pub const IN_WORDS: &str =
    "activations rounded to 8 bits in blocks of 32 or 256, as llama.cpp's CPU kernels do";

/// The reference over rounded activations.
pub struct EightBit;

/// Rounds one block to 127 steps of its largest magnitude, with an f16 scale.
fn round_q8_0(block: &mut [f32]) {
    let most =
        block.iter().fold(0f32, |most, value| if value.abs() > most { value.abs() } else { most });
    if most == 0.0 {
        return;
    }
    let inverse = 127.0 / most;
    let scale = Format::F16.round(most / 127.0);
    block.iter_mut().for_each(|value| *value = (*value * inverse).round_ties_even() * scale);
}

/// Rounds one block by the value of largest magnitude, which becomes -127.
fn round_q8_k(block: &mut [f32]) {
    let signed =
        block.iter().fold(0f32, |most, &value| if value.abs() > most.abs() { value } else { most });
    if signed == 0.0 {
        return;
    }
    let inverse = -127.0 / signed;
    for value in block.iter_mut() {
        let code = (*value * inverse).round_ties_even();
        let code = if code > 127.0 { 127.0 } else { code };
        *value = code / inverse;
    }
}

fn rounded<'x>(x: &'x Tensor, weight: &Weight<'_>) -> Cow<'x, Tensor> {
    let mut y = x.clone();
    match weight.kind() {
        WeightType::F32 => return Cow::Borrowed(x),
        WeightType::F16 => y.data_mut().iter_mut().for_each(|v| *v = Format::F16.round(*v)),
        WeightType::BF16 => y.data_mut().iter_mut().for_each(|v| *v = Format::Bf16.round(*v)),
        kind if kind.block_width() == 256 => {
            for row in 0..y.rows() {
                y.row_mut(row).chunks_mut(256).for_each(round_q8_k);
            }
        }
        _ => {
            for row in 0..y.rows() {
                y.row_mut(row).chunks_mut(32).for_each(round_q8_0);
            }
        }
    }
    Cow::Owned(y)
}

impl Ops for EightBit {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        match *call {
            Call::Matmul { weight, .. } if weight.is_scaled() => Err(ComputeError::Recipe(
                "llama.cpp has no products with the codes and scales of a quantised Hugging Face \
                 checkpoint; give the GGUF file that it ran"
                    .to_owned(),
            )),
            Call::Matmul { x, weight, bias } => {
                Reference.compute(&Call::Matmul { x: &rounded(x, &weight), weight, bias })
            }
            _ => Reference.compute(call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_keeps_its_largest_value_and_at_most_255_others() {
        let values: Vec<f32> = (0..256).map(|i| ((i * 37 % 256) as f32 - 130.0) * 0.37).collect();
        for round in [round_q8_0 as fn(&mut [f32]), round_q8_k] {
            let mut block = values.clone();
            round(&mut block);
            let step = 130.0 * 0.37 / 127.0;
            for (rounded, value) in block.iter().zip(&values) {
                // Half a step, and the f16 scale's own rounding.
                assert!(
                    (rounded - value).abs() <= step * 0.5 + value.abs() * 5e-4,
                    "{value} {rounded}"
                );
            }
            block.sort_by(f32::total_cmp);
            block.dedup();
            assert!(block.len() <= 255 && block.len() > 200, "{}", block.len());
        }
    }
}
