//! RMSNorm as engines compute it, on rows of bf16, f16 or f32 values.
//!
//! It knows rows and a gain: no weights, no sites.
//!
//! All square and add in f32, take `rsqrt.approx` of the mean plus epsilon and
//! multiply by that. What differs: where it rounds, and the order of the sum.
//!
//! | who | rounds before the gain | order |
//! | --- | --- | --- |
//! | transformers' `LlamaRMSNorm` and its kin | yes | PyTorch's mean |
//! | `torch.nn.functional.rms_norm` (fused) | no | a block of 128, vectors of 4 |
//! | vLLM's `rms_norm`, `fused_add_rms_norm` | no | CUB's, vectors of 8 |
//!
//! Evidence: 0 of 133,632 values of each PyTorch norm on an H200, every norm of three
//! transformers models, and every norm of vLLM's captures; gains other than 1 show that vLLM
//! does not round before them (26 % of the values differ if it is computed so). That a
//! block has 256 threads from 256 rows on shows in a pass of 300 tokens, 3,584 wide
//! (`runs/receipts/engines`). That the fused norm adds pairs stands in vLLM's source: no recording
//! at hand shows it alone.

use rayon::prelude::*;

use super::row_sum::RowSum;
use super::sfu;
use crate::dtype::Format;
use crate::tensor::Tensor;

/// What a kernel of RMSNorm decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// The format of the values that are read and written.
    pub format: Format,
    /// What stands under the root beside the mean square.
    pub eps: f32,
    /// Whether `x * r` is rounded to the format before it meets the gain.
    pub rounds_before_gain: bool,
    /// The order of the sum of squares.
    pub sum: RowSum,
}

impl RmsNorm {
    /// The composed norm of transformers' models, for a tensor of so many rows.
    pub fn transformers(format: Format, eps: f32, rows: usize) -> RmsNorm {
        RmsNorm { format, eps, rounds_before_gain: true, sum: RowSum::Torch { rows } }
    }

    /// `torch.nn.functional.rms_norm`.
    pub fn torch_fused(format: Format, eps: f32) -> RmsNorm {
        let sum = RowSum::Block { threads: 128, vector: 4 };
        RmsNorm { format, eps, rounds_before_gain: false, sum }
    }

    /// vLLM's `rms_norm` (not `fused`) or `fused_add_rms_norm`, for that many rows of that
    /// width. Many rows get smaller blocks.
    pub fn vllm(format: Format, eps: f32, width: usize, rows: usize, fused: bool) -> RmsNorm {
        let most = if rows < 256 { 1024 } else { 256 };
        let sum = RowSum::Cub { threads: width.div_ceil(8).clamp(1, most), pairs: fused };
        RmsNorm { format, eps, rounds_before_gain: false, sum }
    }

    /// `1 / sqrt(mean(x^2) + eps)` of one row, as `rsqrt.approx` gives it.
    pub fn inverse_root(&self, row: &[f32]) -> f32 {
        let squares: Vec<f32> = row.iter().map(|x| x * x).collect();
        let sum = self.sum.sum(&squares);
        let mean = match self.sum {
            // PyTorch's mean multiplies by the reciprocal of the width.
            RowSum::Torch { .. } => sum * (1.0 / row.len() as f32),
            RowSum::Block { .. } | RowSum::Cub { .. } => sum / row.len() as f32,
        };
        sfu::rsqrt(mean + self.eps)
    }

    /// One row; `gain` is as wide.
    pub fn row(&self, row: &[f32], gain: &[f32], out: &mut [f32]) {
        let root = self.inverse_root(row);
        for ((out, &x), &gain) in out.iter_mut().zip(row).zip(gain) {
            let scaled = x * root;
            let scaled = if self.rounds_before_gain { self.format.round(scaled) } else { scaled };
            *out = self.format.round(scaled * gain);
        }
    }

    /// Every group of `gain.len()` values: whole rows, or the heads of each (QK norm).
    pub fn apply(&self, x: &Tensor, gain: &[f32]) -> Tensor {
        let mut y = Tensor::zeros(x.rows(), x.width());
        y.data_mut()
            .par_chunks_mut(gain.len().max(1))
            .zip(x.data().par_chunks(gain.len().max(1)))
            .for_each(|(y, x)| self.row(x, gain, y));
        y
    }

    /// vLLM's `fused_add_rms_norm`: the sum of input and residual, rounded to the
    /// format, and the norm of that. Returns the norm and the sum.
    pub fn add_and_apply(&self, x: &Tensor, residual: &Tensor, gain: &[f32]) -> (Tensor, Tensor) {
        let sum = add(self.format, x, residual);
        (self.apply(&sum, gain), sum)
    }
}

/// `a + b` in f32, rounded to the format: every engine's residual addition.
pub fn add(format: Format, a: &Tensor, b: &Tensor) -> Tensor {
    let sums = a.data().iter().zip(b.data()).map(|(a, b)| format.round(a + b));
    Tensor::new(a.width(), sums.collect())
}
