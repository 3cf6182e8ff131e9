//! The predicted floor: the deviation that rounding alone gives each output.
//!
//! For a GEMM whose operands are rounded to `x~ = x + dx` and `w~ = w + dw`
//! (both known exactly), output (i, j) has
//! `sigma^2 = sum_k (x^2 dw^2 + dx^2 w^2 + dx^2 dw^2) + accumulation + output rounding`.
//! The other ops round in f32 a counted number of times; each rounding of a value
//! s counts as an independent error of variance `(u s)^2 / 3`, u = 2^-24, and is
//! carried to the output by the op's derivative. It predicts sizes and computes the
//! truth beside them; what an arm made is not known here.

use std::sync::Mutex;

use rayon::prelude::*;

use super::departure::scale_at;
use super::emulated::arm::Emulated;
use super::emulated::chip::{Unit, chip};
use super::emulated::gemm::Scales;
use super::emulated::quantize::{Codes, CodesRow};
use super::reference::{Reference, Widened, dot_rows};
use super::rope;
use super::vector::{Kernel, dispatch};
use super::{
    AttentionShape, ComputeError, Ops, check_gain, check_interrupt, check_matmul, check_tokens,
};
use crate::dtype::Format;
use crate::model::{Rope, Weight};
use crate::op::{Accumulate, Recipe};
use crate::tensor::Tensor;

/// Half an ULP of f32, relative.
const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Elements of K after which the promoted accumulator restarts.
const PROMOTION_INTERVAL: f64 = 128.0;

/// The reference arm, which notes beside each result the deviation that the
/// recipe's rounding gives it.
pub struct Floor {
    recipe: Recipe,
    emulated: Emulated,
    /// The deviations of the calls so far, in their order.
    sigmas: Mutex<Vec<Tensor>>,
}

impl Floor {
    /// The floor of a recipe.
    ///
    /// # Errors
    /// As [`Emulated::new`].
    pub fn new(recipe: &Recipe) -> Result<Floor, ComputeError> {
        let emulated = Emulated::new(recipe)?;
        Ok(Floor { recipe: *recipe, emulated, sigmas: Mutex::default() })
    }

    /// The prescribed arithmetic, whose rounding this is.
    pub fn emulated(&self) -> &Emulated {
        &self.emulated
    }

    /// The deviations of all calls so far, in their order.
    pub fn into_sigmas(self) -> Vec<Tensor> {
        self.sigmas.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The deviations of the last call, which are then forgotten.
    pub fn take_sigma(&self) -> Option<Tensor> {
        self.sigmas.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop()
    }

    /// The variance of what a GEMM's result meets after its operands' conversion:
    /// accumulation and output rounding. `terms` is `sum_k (x w)^2`.
    pub fn after_operands(&self, inner: usize, dot: f64, terms: f64) -> f64 {
        let (of_terms, of_sum) = self.accumulation(inner);
        of_terms * terms + of_sum * dot * dot + self.output(dot.abs())
    }

    fn note(&self, sigma: Tensor) {
        self.sigmas.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(sigma);
    }

    /// Notes a deviation for each value of a result.
    fn note_each(&self, y: &Tensor, sigma: impl Fn(usize, f32) -> f64) {
        let values = y.data().iter().enumerate();
        let sigmas = values.map(|(index, &y)| sigma(index, y) as f32).collect();
        self.note(Tensor::new(y.width(), sigmas));
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

    /// The variance of rounding a value of about `size` to the stream's type; nothing
    /// where the project's own kernels pass f32.
    fn passed(&self, size: f64) -> f64 {
        match self.recipe.stream {
            Some(stream) => rounding(stream, size.abs()),
            None => 0.0,
        }
    }

    /// What a foreign engine may add to a value of about `size` that `roundings` f32
    /// operations of unknown order made.
    fn foreign(&self, roundings: f64, size: f64) -> f64 {
        if self.recipe.stream.is_some() { roundings * rounded(size) } else { 0.0 }
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

/// A quarter of the last place of an f32: where a result must be the correctly
/// rounded one or its neighbour, one place is 4 deviations and two are 8.
fn quarter_place(value: f32) -> f64 {
    let size = value.abs();
    let next = f32::from_bits(size.to_bits().saturating_add(1));
    (f64::from(next) - f64::from(size)) / 4.0 + f64::from(f32::MIN_POSITIVE)
}

/// The variance of one f32 rounding of a value.
fn rounded(value: f64) -> f64 {
    (value * F32_UNIT).powi(2) / 3.0
}

/// The rounding error of each value of an operand, row-major.
pub(super) fn rounding_errors(values: &[f32], codes: &Codes, scales: &Scales) -> Vec<f32> {
    /// Columns that share a scale, at least.
    const SPAN: usize = 128;
    let (format, width) = (codes.format(), codes.width());
    let table: Vec<f32> = match format.bytes() {
        1 => (0..256).map(|code| format.decode(code)).collect(),
        _ => Vec::new(),
    };
    let mut errors = vec![0.0; values.len()];
    let rows = values.chunks_exact(width).zip(errors.chunks_exact_mut(width));
    for (row, (values, errors)) in rows.enumerate() {
        let spans = values.chunks(SPAN).zip(errors.chunks_mut(SPAN));
        for (span, (values, errors)) in spans.enumerate() {
            let first = span * SPAN;
            let scale = scale_at(scales, width, row, first);
            let pairs = errors.iter_mut().zip(values);
            let range = first..first + values.len();
            match codes.row(row) {
                CodesRow::Bits8(codes) => pairs
                    .zip(&codes[range])
                    .for_each(|((e, &x), &code)| *e = table[usize::from(code)] * scale - x),
                CodesRow::Bits16(codes) => pairs
                    .zip(&codes[range])
                    .for_each(|((e, &x), &code)| *e = format.decode(u32::from(code)) * scale - x),
                CodesRow::Bits32(codes) => pairs
                    .zip(&codes[range])
                    .for_each(|((e, &x), &code)| *e = format.decode(code) * scale - x),
            }
        }
    }
    errors
}

/// An operand's squares, and its rounding errors' squares, row-major.
///
/// f32 is enough: a floor of seven digits is far better than its own model.
fn squares(values: &[f32], codes: &Codes, scales: &Scales) -> (Vec<f32>, Vec<f32>) {
    let mut errors = rounding_errors(values, codes, scales);
    errors.iter_mut().for_each(|error| *error *= *error);
    (values.iter().map(|value| value * value).collect(), errors)
}

/// All dot products of rows of positive values, `[x rows, w rows]`.
///
/// Nothing cancels, so f32 sums are right to some 1e-6 whatever their order.
struct PositiveDots<'a> {
    x: &'a [f32],
    w: &'a [f32],
    width: usize,
}

/// All dot products of the rows of two operands of positive values: `[x rows, w rows]`.
pub(super) fn positive_dots(x: &[f32], w: &[f32], width: usize) -> Vec<f32> {
    dispatch(PositiveDots { x, w, width })
}

/// Partial sums of a positive dot product.
const LANES: usize = 16;

impl Kernel for PositiveDots<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Vec<f32> {
        let PositiveDots { x, w, width } = self;
        let mut dots = Vec::with_capacity(x.len() / width * (w.len() / width));
        for x in x.chunks_exact(width) {
            for w in w.chunks_exact(width) {
                let mut lanes = [0.0f32; LANES];
                let (x_blocks, x_rest) = x.as_chunks::<LANES>();
                let (w_blocks, w_rest) = w.as_chunks::<LANES>();
                for (x, w) in x_blocks.iter().zip(w_blocks) {
                    for lane in 0..LANES {
                        lanes[lane] = if FMA {
                            x[lane].mul_add(w[lane], lanes[lane])
                        } else {
                            x[lane] * w[lane] + lanes[lane]
                        };
                    }
                }
                let rest: f32 = x_rest.iter().zip(w_rest).map(|(x, w)| x * w).sum();
                dots.push(lanes.iter().sum::<f32>() + rest);
            }
        }
        dots
    }
}

impl Ops for Floor {
    fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError> {
        check_tokens(&weight, tokens)?;
        let y = Reference.embed(weight, tokens)?;
        // A copy rounds nothing but to the stream's type.
        self.note_each(&y, |_, y| self.passed(f64::from(y)).sqrt());
        Ok(y)
    }

    fn rms_norm(&self, x: &Tensor, gain: Weight<'_>, eps: f32) -> Result<Tensor, ComputeError> {
        check_gain(x, &gain)?;
        let y = Reference.rms_norm(x, gain, eps)?;
        // The kernel carries two f32 throughout and is within one place. A foreign one sums
        // the squares in f32, in the worst case in order: a random walk of K roundings of
        // partial sums, halved by the root, and some eight roundings beside. It may round
        // to the stream's type before the gain and after it.
        let sum = gain.width() as f64 / 36.0 + 8.0;
        self.note_each(&y, |_, y| {
            let size = f64::from(y);
            let variance = self.foreign(sum, size) + 2.0 * self.passed(size);
            variance.sqrt() + quarter_place(y)
        });
        Ok(y)
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
        let (x_square, dx_square) = squares(x.data(), &codes, &scales);
        let x_wide = Widened::of(x.data(), width);
        let (of_terms, of_sum) = self.accumulation(width);
        let chunks = self.emulated.by_quantised_chunk(weight, |first, rows, codes, scales| {
            let (mut with_x, mut with_dx) = squares(rows, codes, &scales);
            for (w, dw) in with_x.iter_mut().zip(&mut with_dx) {
                let (w_square, dw_square) = (*w, *dw);
                // x^2 meets dw^2 and the accumulation's share of w^2; dx^2 meets both.
                *w = dw_square + of_terms as f32 * w_square;
                *dw = w_square + dw_square;
            }
            let dots = dot_rows(&x_wide, &Widened::of(rows, width));
            let from_x = dispatch(PositiveDots { x: &x_square, w: &with_x, width });
            let from_dx = dispatch(PositiveDots { x: &dx_square, w: &with_dx, width });
            let count = codes.rows();
            let mut truth = Vec::with_capacity(dots.len());
            let mut sigma = Vec::with_capacity(dots.len());
            for (index, dot) in dots.into_iter().enumerate() {
                let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[first + index % count]));
                let inner =
                    f64::from(from_x[index]) + f64::from(from_dx[index]) + of_sum * dot * dot;
                let size = if dot.abs() > inner.sqrt() { dot.abs() } else { inner.sqrt() };
                let mut variance = inner + self.output(size) + (bias * F32_UNIT).powi(2);
                // The product may be rounded to the stream's type before its bias is added.
                variance += self.passed(dot + bias);
                if bias != 0.0 {
                    variance += self.passed(dot);
                }
                truth.push((dot + bias) as f32);
                sigma.push(variance.sqrt() as f32);
            }
            Ok((first, Tensor::new(count, truth), Tensor::new(count, sigma)))
        })?;
        let mut truth = Tensor::zeros(x.rows(), weight.rows());
        let mut sigma = Tensor::zeros(x.rows(), weight.rows());
        for (first, truths, sigmas) in chunks {
            truth.set_columns(first, &truths);
            sigma.set_columns(first, &sigmas);
        }
        self.note(sigma);
        Ok(truth)
    }

    fn rope(
        &self,
        x: &Tensor,
        geometry: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        let y = Reference.rope(x, geometry, head_dim, first_position)?;
        let mut sigma = Tensor::zeros(x.rows(), x.width());
        for row in 0..x.rows() {
            let angles = rope::angles(geometry, first_position + row);
            let heads = sigma.row_mut(row).chunks_exact_mut(head_dim);
            let heads = heads.zip(x.row(row).chunks_exact(head_dim));
            for ((sigma, x), y) in heads.zip(y.row(row).chunks_exact(head_dim)) {
                for (pair, &(sin, cos)) in angles.iter().enumerate() {
                    let (first, second) = rope::pair(geometry, pair);
                    let (a, b) = (f64::from(x[first]), f64::from(x[second]));
                    // A foreign engine computes the angle in f32, a frequency times a
                    // position, and may round table, products and sum to the stream's type.
                    let angle = rope::angle(geometry, pair, first_position + row);
                    let of_engine = |fused: f64, product: f64, y: f64| {
                        let turned = self.foreign(4.0, angle * a.hypot(b));
                        turned + 2.0 * (self.passed(fused) + self.passed(product)) + self.passed(y)
                    };
                    // The table's entries round, the second product does, the sum does,
                    // and so does the reference.
                    let of = |fused: f64, product: f64, y: f32| {
                        let y = f64::from(y);
                        let variance = rounded(fused) + 2.0 * rounded(product) + 2.0 * rounded(y);
                        let variance = variance + of_engine(fused, product, y);
                        (variance.sqrt() + f64::from(f32::MIN_POSITIVE)) as f32
                    };
                    sigma[first] = of(a * cos, b * sin, y[first]);
                    sigma[second] = of(a * sin, b * cos, y[second]);
                }
            }
        }
        self.note(sigma);
        Ok(y)
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
    ) -> Result<Tensor, ComputeError> {
        let y = Reference.attention(q, k, v, shape)?;
        let AttentionShape { heads, kv_heads, head_dim, first_position } = shape;
        let mut sigma = Tensor::zeros(y.rows(), y.width());
        sigma.data_mut().par_chunks_exact_mut(head_dim).enumerate().try_for_each(
            |(index, sigma)| {
                check_interrupt()?;
                let (row, head) = (index / heads, index % heads);
                let group = head / (heads / kv_heads) * head_dim;
                let group = group..group + head_dim;
                let query = &q.row(row)[head * head_dim..(head + 1) * head_dim];
                let out = &y.row(row)[head * head_dim..(head + 1) * head_dim];
                let seen = first_position + row + 1;
                let keys = (0..seen).map(|position| &k.row(position)[group.clone()]);
                let values: Vec<&[f32]> =
                    (0..seen).map(|position| &v.row(position)[group.clone()]).collect();
                let spread = attention_spread(query, keys, &values, out, self.recipe.stream);
                for (sigma, spread) in sigma.iter_mut().zip(spread) {
                    *sigma = (spread.sqrt() + f64::from(f32::MIN_POSITIVE)) as f32;
                }
                Ok::<(), ComputeError>(())
            },
        )?;
        self.note(sigma);
        Ok(y)
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor, ComputeError> {
        let y = Reference.swiglu(gate, up)?;
        self.note_each(&y, |index, y| {
            let power = libm::exp(-f64::from(gate.data()[index]));
            // The exponential is within two places, and weighs as its share of 1 + e^-g;
            // then a sum, a quotient and two products round, and so does the reference.
            let share = if power.is_finite() { power / (1.0 + power) } else { 1.0 };
            let exponential = (2.0 * F32_UNIT * share).powi(2);
            let size = f64::from(y);
            // A foreign engine may round SiLU and the product to the stream's type.
            let engine = self.foreign(8.0, size) + 2.0 * self.passed(size);
            (size * size * exponential + 5.0 * rounded(size) + engine).sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError> {
        let y = Reference.add(a, b)?;
        // One correctly rounded sum, the same as the reference's or its neighbour.
        self.note_each(&y, |_, y| self.passed(f64::from(y)).sqrt() + quarter_place(y));
        Ok(y)
    }
}

/// The variance of each value of one attention head's output.
///
/// A score is a tree of sums and one product: `(2 A^2 + s^2) u^2 / 3` with
/// `A = sum |q k|`. The exponential adds two places, and the difference that it
/// is taken of one rounding. A relative error of weight j moves the output by
/// `p_j (v_j - out)`. The chain over the values rounds each partial sum, the
/// total, the quotient and the reference once each. `stream` is the type to which a
/// foreign engine may round between its steps.
fn attention_spread<'k>(
    query: &[f32],
    keys: impl Iterator<Item = &'k [f32]>,
    values: &[&[f32]],
    out: &[f32],
    stream: Option<Format>,
) -> Vec<f64> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let scores: Vec<(f64, f64)> = keys
        .map(|key| {
            let products = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k));
            let (sum, size) = products.fold((0.0, 0.0), |(s, a), p| (s + p, a + p.abs()));
            (sum * scale, size * scale)
        })
        .collect();
    let largest =
        scores.iter().fold(f64::NEG_INFINITY, |most, &(s, _)| if s > most { s } else { most });
    let weights: Vec<f64> = scores.iter().map(|&(s, _)| libm::exp(s - largest)).collect();
    let total: f64 = weights.iter().sum();
    let mut spread = vec![0.0; out.len()];
    let mut partial = vec![0.0; out.len()];
    for ((&(score, size), weight), value) in scores.iter().zip(&weights).zip(values) {
        let share = weight / total;
        let of_score = 2.0 * rounded(size) + rounded(score) + rounded(score - largest);
        let relative = of_score + (2.0 * F32_UNIT).powi(2);
        // A foreign engine may round a score before and after its scale, and the weight.
        let relative = match stream {
            Some(stream) => {
                let of_score = 2.0 * rounding(stream, score.abs()) + rounding(stream, 1.0);
                relative + of_score + (8.0 * F32_UNIT).powi(2)
            }
            None => relative,
        };
        for (index, &value) in value.iter().enumerate() {
            let value = f64::from(value);
            partial[index] += share * value;
            let moved = share * (value - f64::from(out[index]));
            spread[index] += moved * moved * relative + rounded(partial[index]);
        }
    }
    let chain = (values.len() as f64 / 32.0).ceil() + 7.0;
    for (spread, &out) in spread.iter_mut().zip(out) {
        *spread += chain * rounded(f64::from(out));
        if let Some(stream) = stream {
            *spread += rounding(stream, f64::from(out).abs());
        }
    }
    spread
}
