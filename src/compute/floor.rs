//! The predicted floor: the deviation that rounding alone gives each output.
//!
//! For a GEMM whose operands are rounded to `x~ = x + dx` and `w~ = w + dw`
//! (both known exactly), output (i, j) has
//! `sigma^2 = sum_k (x^2 dw^2 + dx^2 w^2 + dx^2 dw^2) + accumulation + output rounding`.
//! It predicts sizes only; what was computed, and how it compares, is not known here.

use super::emulated::arm::Emulated;
use super::emulated::chip::{Unit, chip};
use super::emulated::gemm::Scales;
use super::emulated::quantize::Codes;
use super::reference::{Widened, dot_rows};
use super::{
    AttentionShape, ComputeError, Ops, check_gain, check_matmul, check_same_shape, check_tokens,
};
use crate::dtype::Format;
use crate::model::{Rope, Weight};
use crate::op::{Accumulate, Recipe};
use crate::tensor::Tensor;

/// Half an ULP of f32, relative.
const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Elements of K after which the promoted accumulator restarts.
const PROMOTION_INTERVAL: f64 = 128.0;

/// An arm whose GEMMs return the deviation of each output instead of the output.
///
/// The other ops have no floor of this kind (their contracts count roundings);
/// they return zeros of the right shape.
pub struct Floor {
    recipe: Recipe,
    emulated: Emulated,
}

impl Floor {
    /// The floor of a recipe.
    ///
    /// # Errors
    /// As [`Emulated::new`].
    pub fn new(recipe: &Recipe) -> Result<Floor, ComputeError> {
        Ok(Floor { recipe: *recipe, emulated: Emulated::new(recipe)? })
    }

    /// The variance of the accumulation's truncations, relative to
    /// `sum_k (x w)^2` and to `y^2`.
    ///
    /// Each of `steps` block sums is cut to R bits below its largest term: the
    /// cuts of terms of either sign add as a random walk, `steps 2^-2R` of the
    /// terms' squares; the running sum loses up to half a unit each time, in
    /// the same direction, `(steps 2^-(R+1))^2` of its square.
    fn accumulation(&self, inner: usize) -> (f64, f64) {
        let inner = inner as f64;
        match chip(self.recipe.chip).unit(self.recipe.gemm, self.recipe.gemm) {
            Some(Unit::TensorCore(core)) => {
                let promoted =
                    self.recipe.gemm.is_fp8() && self.recipe.accumulate == Accumulate::Promoted;
                let chain = if promoted { inner.min(PROMOTION_INTERVAL) } else { inner };
                let steps = (chain / core.products as f64).ceil();
                let bits = core.alignment_bits.min(core.result_bits);
                let unit = 0.5f64.powi(bits as i32);
                (steps * unit * unit, (steps * unit / 2.0).powi(2))
            }
            // A chain of K fused multiply-adds, each rounding the running sum:
            // ulp^2 / 12 of s is s^2 u^2 / (8 ln 2) on average over its binade,
            // and a random walk that ends at y has, over its K steps,
            // sum s^2 = K / 6 * sum (x w)^2 + K / 3 * y^2.
            _ => {
                let step = F32_UNIT.powi(2) / (8.0 * std::f64::consts::LN_2);
                (inner / 6.0 * step, inner / 3.0 * step)
            }
        }
    }

    /// The variance of rounding a value of about `size` to the output type, and
    /// of one more rounding to f32: the reference's own, or the scale's.
    fn output(&self, size: f64) -> f64 {
        rounding(self.recipe.output, size) + rounding(Format::F32, size)
    }
}

/// The variance of rounding a value of about `size`: `ulp^2 / 12`.
fn rounding(format: Format, size: f64) -> f64 {
    let exponent = if size > 0.0 { size.log2().floor() as i32 } else { format.min_exponent() };
    let exponent = exponent.max(format.min_exponent()) - format.fraction_bits() as i32;
    2f64.powi(exponent).powi(2) / 12.0
}

/// The values that codes and scales stand for, in f64.
fn dequantised(codes: &Codes, scales: &Scales) -> Vec<f64> {
    const BLOCK: usize = 128;
    let width = codes.width();
    let mut values = Vec::with_capacity(codes.rows() * width);
    for row in 0..codes.rows() {
        for (column, value) in codes.decode_row(row).into_iter().enumerate() {
            let scale = match scales {
                Scales::Tensor(scale) => *scale,
                Scales::Row(scales) => scales[row],
                Scales::Block128 { rows_per_block, scales, .. } => {
                    scales[row / rows_per_block * width.div_ceil(BLOCK) + column / BLOCK]
                }
            };
            values.push(f64::from(value) * f64::from(scale));
        }
    }
    values
}

/// An operand's squares, and its rounding errors' squares, as f32 rows.
///
/// f32 is enough: a floor of seven digits is far better than its own model.
fn squares(values: &[f32], rounded: &[f64]) -> (Vec<f32>, Vec<f32>) {
    values
        .iter()
        .zip(rounded)
        .map(|(&value, &rounded)| {
            let value = f64::from(value);
            ((value * value) as f32, ((rounded - value) * (rounded - value)) as f32)
        })
        .unzip()
}

impl Ops for Floor {
    fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError> {
        check_tokens(&weight, tokens)?;
        Ok(Tensor::zeros(tokens.len(), weight.width()))
    }

    fn rms_norm(&self, x: &Tensor, gain: Weight<'_>, _eps: f32) -> Result<Tensor, ComputeError> {
        check_gain(x, &gain)?;
        Ok(Tensor::zeros(x.rows(), x.width()))
    }

    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_matmul(x, &weight, bias.as_ref())?;
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let width = x.width();
        let (codes, scales) = self.emulated.quantise_activation(x);
        let (x_square, dx_square) = squares(x.data(), &dequantised(&codes, &scales));
        let x_wide = Widened::of(x.data(), width);
        let x_square = Widened::of(&x_square, width);
        let dx_square = Widened::of(&dx_square, width);
        let (of_terms, of_sum) = self.accumulation(width);
        let chunks = self.emulated.by_quantised_chunk(weight, |first, rows, codes, scales| {
            let (w_square, dw_square) = squares(rows, &dequantised(codes, &scales));
            let both: Vec<f32> = w_square.iter().zip(&dw_square).map(|(w, dw)| w + dw).collect();
            let y = dot_rows(&x_wide, &Widened::of(rows, width));
            let from_w = dot_rows(&x_square, &Widened::of(&dw_square, width));
            let from_x = dot_rows(&dx_square, &Widened::of(&both, width));
            let terms = dot_rows(&x_square, &Widened::of(&w_square, width));
            let count = codes.rows();
            let variance = |index: usize| {
                let rounding = from_w[index] + from_x[index];
                let inner = rounding + of_terms * terms[index] + of_sum * y[index] * y[index];
                let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[first + index % count]));
                let size = (y[index].abs()).max(inner.sqrt());
                inner + self.output(size) + (bias * F32_UNIT).powi(2)
            };
            let sigmas: Vec<f32> =
                (0..y.len()).map(|index| variance(index).sqrt() as f32).collect();
            Ok((first, Tensor::new(count, sigmas)))
        })?;
        let mut sigma = Tensor::zeros(x.rows(), weight.rows());
        for (first, chunk) in chunks {
            for row in 0..x.rows() {
                let columns = first..first + chunk.width();
                sigma.row_mut(row)[columns].copy_from_slice(chunk.row(row));
            }
        }
        Ok(sigma)
    }

    fn rope(
        &self,
        x: &Tensor,
        _geometry: &Rope,
        _head_dim: usize,
        _first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        Ok(Tensor::zeros(x.rows(), x.width()))
    }

    fn attention(
        &self,
        q: &Tensor,
        _k: &Tensor,
        _v: &Tensor,
        _shape: AttentionShape,
    ) -> Result<Tensor, ComputeError> {
        Ok(Tensor::zeros(q.rows(), q.width()))
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor, ComputeError> {
        check_same_shape("swiglu", gate, up)?;
        Ok(Tensor::zeros(gate.rows(), gate.width()))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError> {
        check_same_shape("a residual addition", a, b)?;
        Ok(Tensor::zeros(a.rows(), a.width()))
    }
}
