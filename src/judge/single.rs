//! Norm, RoPE, attention, SwiGLU and softmax from files: exact values in f64 and the
//! floors of the ways in which kernels round on the way.
//!
//! The deviations are those of `compute/floor.rs` for a kernel in f32 whose order of
//! additions is not known; beside them stand the coarser ways that are common, with
//! intermediate values in the output's type. It opens no file and knows no model.

use rayon::prelude::*;

use super::exam::{Exam, Floor, deviation, rounding};
use super::{Bits, Cause, Judgement, Place, causes, verdict};
use crate::compute::call::{Call, MadeWeight};
use crate::compute::emulated::arm::Emulated;
use crate::compute::{AttentionShape, ComputeError, rope};
use crate::dtype::Format;
use crate::model::{Activation, Rope};
use crate::op::{Accumulate, ActivationScale, ChipName, Pin, Recipe, Scale, WeightScale};
use crate::tensor::Tensor;

/// Half an ULP of f32, relative.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// The variance of one f32 addition in a running sum, relative to that sum's square.
const ADDITION: f64 = UNIT * UNIT / (8.0 * std::f64::consts::LN_2);

/// An op with its operands.
pub enum Single<'a> {
    /// `x / sqrt(mean(x^2) + eps) * gain`.
    RmsNorm {
        /// What is normalised.
        x: &'a Tensor,
        /// The gain, one row.
        gain: &'a Tensor,
        /// What stands under the root beside the mean square.
        eps: f32,
    },
    /// Rotary position embedding.
    Rope {
        /// What is rotated, `[tokens, heads * head_dim]`.
        x: &'a Tensor,
        /// The geometry.
        rope: &'a Rope,
        /// Width of a head.
        head_dim: usize,
        /// Each row's position.
        positions: &'a [usize],
    },
    /// Attention.
    Attention {
        /// Queries, `[tokens, heads * head_dim]`.
        q: &'a Tensor,
        /// Keys, `[positions, kv_heads * head_dim]`.
        k: &'a Tensor,
        /// Values, `[positions, kv_heads * v_dim]`.
        v: &'a Tensor,
        /// Its shape.
        shape: AttentionOf,
    },
    /// `silu(gate) * up`.
    Swiglu {
        /// What goes through the sigmoid.
        gate: &'a Tensor,
        /// What it is multiplied with.
        up: &'a Tensor,
    },
    /// `exp(x - max) / sum` of each row.
    Softmax {
        /// The rows.
        x: &'a Tensor,
    },
}

/// The shape of an attention kernel.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOf {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a query's and a key's head.
    pub head_dim: usize,
    /// What scores are multiplied with.
    pub scale: f64,
    /// Whether a query sees later keys not. The last query stands at the last key.
    pub causal: bool,
    /// Keys that a query sees at most, its own included.
    pub window: Option<usize>,
}

/// A value, and its variance under each way to round.
struct Value {
    truth: f64,
    variances: Vec<f64>,
}

impl Single<'_> {
    /// Judges what a kernel returned.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn judge(&self, y: Tensor, output: Format) -> Result<Judgement, ComputeError> {
        let exam = self.exam(y, output)?;
        let marks = exam.marks();
        let bits = self.bits(&exam)?;
        let search = |_: &Place| self.causes(&exam);
        verdict(&exam, marks, Some(bits), search)
    }

    fn exam(&self, y: Tensor, output: Format) -> Result<Exam, ComputeError> {
        let [rows, width] = self.shape()?;
        if (y.rows(), y.width()) != (rows, width) {
            return Err(ComputeError::Shape {
                what: format!("the output of {}", self.name()),
                left: format!("y [{}, {}]", y.rows(), y.width()),
                right: format!("the result [{rows}, {width}]"),
            });
        }
        let values: Vec<Value> = (0..rows)
            .into_par_iter()
            .flat_map_iter(|row| match self {
                Single::RmsNorm { x, gain, eps } => norm(x.row(row), gain.data(), *eps, output),
                Single::Rope { x, rope, head_dim, positions } => {
                    rotated(x.row(row), rope, *head_dim, positions[row], output)
                }
                Single::Attention { q, k, v, shape } => attention((q, k, v), *shape, row, output),
                Single::Swiglu { gate, up } => swiglu(gate.row(row), up.row(row), output),
                Single::Softmax { x } => softmax(x.row(row)),
            })
            .collect();
        let names = self.floor_names(output);
        let floors = names.into_iter().enumerate().map(|(number, name)| {
            let sigma = values.iter().map(|value| {
                let inner = value.variances[number];
                let size = value.truth.abs();
                let size = if size * size > inner { size } else { inner.sqrt() };
                deviation(inner + rounding(output, size) + rounding(Format::F32, size))
            });
            Floor { name, sigma: sigma.collect(), truncates: false }
        });
        let floors = floors.collect();
        Ok(Exam { y, output, truth: values.iter().map(|value| value.truth).collect(), floors })
    }

    fn name(&self) -> &'static str {
        match self {
            Single::RmsNorm { .. } => "norm",
            Single::Rope { .. } => "rope",
            Single::Attention { .. } => "attention",
            Single::Swiglu { .. } => "swiglu",
            Single::Softmax { .. } => "softmax",
        }
    }

    fn shape(&self) -> Result<[usize; 2], ComputeError> {
        let refuse = |what: &str, left: String, right: String| {
            Err(ComputeError::Shape { what: what.to_owned(), left, right })
        };
        let of = |name: &str, t: &Tensor| format!("{name} [{}, {}]", t.rows(), t.width());
        match self {
            Single::RmsNorm { x, gain, .. } => {
                if gain.data().is_empty() || !x.width().is_multiple_of(gain.data().len()) {
                    return refuse("a norm", of("x", x), format!("weight [{}]", gain.data().len()));
                }
                Ok([x.rows(), x.width()])
            }
            Single::Rope { x, head_dim, positions, .. } => {
                if *head_dim == 0 || head_dim % 2 == 1 || !x.width().is_multiple_of(*head_dim) {
                    return refuse("rope", of("x", x), format!("heads of {head_dim}"));
                }
                if positions.len() != x.rows() {
                    return refuse("rope", of("x", x), format!("{} positions", positions.len()));
                }
                Ok([x.rows(), x.width()])
            }
            Single::Attention { q, k, v, shape } => {
                let AttentionOf { heads, kv_heads, head_dim, causal, .. } = *shape;
                let whole = kv_heads > 0
                    && heads.is_multiple_of(kv_heads)
                    && q.width() == heads * head_dim
                    && k.width() == kv_heads * head_dim
                    && v.width().is_multiple_of(kv_heads)
                    && k.rows() == v.rows()
                    && (!causal || q.rows() <= k.rows());
                if !whole {
                    return refuse(
                        &format!("attention of {heads} heads of {head_dim} over {kv_heads}"),
                        of("q", q),
                        format!("{}, {}", of("k", k), of("v", v)),
                    );
                }
                Ok([q.rows(), heads * (v.width() / kv_heads)])
            }
            Single::Swiglu { gate, up } => {
                crate::compute::check_same_shape("swiglu", gate, up)?;
                Ok([gate.rows(), gate.width()])
            }
            Single::Softmax { x } => Ok([x.rows(), x.width()]),
        }
    }

    /// The ways to round, in the order of [`Value::variances`].
    fn floor_names(&self, output: Format) -> Vec<String> {
        let plain = "arithmetic in f32".to_owned();
        let narrow = output != Format::F32;
        let of = |text: &str| text.replace("OUT", output.name());
        let more: Vec<String> = match self {
            Single::RmsNorm { .. } if narrow => {
                vec![of("the normalised value rounded to OUT before the gain")]
            }
            Single::Rope { .. } => {
                let mut ways = vec!["angles computed in f32".to_owned()];
                if narrow {
                    ways.push(of("tables and products rounded to OUT"));
                }
                ways
            }
            Single::Attention { .. } => {
                let kind = if narrow { output } else { Format::Bf16 };
                let of = |text: &str| text.replace("OUT", kind.name());
                vec![
                    of("probabilities rounded to OUT before they meet the values"),
                    of("scores and probabilities rounded to OUT"),
                ]
            }
            Single::Swiglu { .. } if narrow => {
                vec![of("silu(gate) rounded to OUT before the product")]
            }
            _ => Vec::new(),
        };
        std::iter::once(plain).chain(more).collect()
    }

    /// The op as a call, where it is one of a model's.
    fn with_call<T>(
        &self,
        then: impl FnOnce(&Call<'_>) -> Result<T, ComputeError>,
    ) -> Result<Option<T>, ComputeError> {
        match self {
            Single::RmsNorm { x, gain, eps } => {
                let made = MadeWeight::new("blk.0.attn_norm.weight".to_owned(), 1, gain.data());
                then(&Call::RmsNorm { x, gain: made.weight()?, eps: *eps }).map(Some)
            }
            Single::Rope { x, rope, head_dim, positions } => {
                let first = positions[0];
                let in_order = positions.iter().enumerate().all(|(row, &p)| p == first + row);
                let call = Call::Rope { x, rope, head_dim: *head_dim, first_position: first };
                in_order.then(|| then(&call)).transpose()
            }
            Single::Attention { q, k, v, shape } => {
                let usual = 1.0 / (shape.head_dim as f64).sqrt();
                let is_usual = shape.causal && k.width() == v.width();
                let first = k.rows().saturating_sub(q.rows());
                let own_scale = (shape.scale / usual - 1.0).abs() >= 1e-6;
                let of_model = AttentionShape {
                    scale: own_scale.then_some(shape.scale),
                    window: shape.window,
                    ..AttentionShape::causal(shape.heads, shape.kv_heads, shape.head_dim, first)
                };
                let call = Call::Attention { q, k, v, shape: of_model };
                is_usual.then(|| then(&call)).transpose()
            }
            Single::Swiglu { gate, up } => {
                then(&Call::Gated { gate, up, activation: Activation::Silu }).map(Some)
            }
            Single::Softmax { .. } => Ok(None),
        }
    }

    fn bits(&self, exam: &Exam) -> Result<Bits, ComputeError> {
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a == 0.0 && b == 0.0;
        let values = exam.truth.len();
        let once = format!("the exact result, rounded once to {}", exam.output);
        let mut bits = Bits { count: 1, sampled: values, ..Bits::default() };
        let mut found = Vec::new();
        let pairs = exam.y.data().iter().enumerate();
        if pairs.clone().all(|(index, &y)| same(y, exam.rounded(index))) {
            found.push(once.clone());
        }
        bits.tried.push(once);
        let own = self.with_call(|call| {
            let arm = Emulated::new(&recipe(exam.output))?;
            let y = call.on(&arm)?;
            let mut pairs = pairs.clone().zip(y.data());
            Ok(pairs.all(|((_, &y), &own)| same(y, exam.output.round(own))))
        })?;
        if let Some(is_own) = own {
            let name = "the emulated arm's kernel in f32".to_owned();
            bits.count += 1;
            bits.tried.push(name.clone());
            found.extend(is_own.then_some(name));
        }
        if !found.is_empty() {
            bits.confirmed = values;
            bits.schedule = Some(found.remove(0));
            bits.also = found;
        }
        Ok(bits)
    }

    fn causes(&self, exam: &Exam) -> Result<Vec<Cause>, ComputeError> {
        let recipe = recipe(exam.output);
        Ok(self.with_call(|call| causes::of_call(call, exam, &recipe))?.unwrap_or_default())
    }
}

/// A recipe for ops that no recipe changes.
pub(super) fn recipe(output: Format) -> Recipe {
    Recipe {
        gemm: Format::F32,
        scale: Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor },
        accumulate: Accumulate::Fast,
        output,
        chip: ChipName::Auto,
        stream: None,
        engine: None,
        emulate: None,
        codes: crate::op::Codes::Made,
        pin: Pin::NONE,
        kv_cache: None,
        tensor_parallel: None,
    }
}

/// The variance of one f32 rounding of a value.
fn once(value: f64) -> f64 {
    (value * UNIT).powi(2) / 3.0
}

fn norm(x: &[f32], gain: &[f32], eps: f32, output: Format) -> Vec<Value> {
    let mut values = Vec::with_capacity(x.len());
    for x in x.chunks_exact(gain.len()) {
        let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = 1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt();
        // The sum of squares in any order, halved by the root; the root within two
        // places; two products.
        let relative = x.len() as f64 / 12.0 * ADDITION + 4.0 * UNIT * UNIT + UNIT * UNIT;
        for (&x, &gain) in x.iter().zip(gain) {
            let (normal, gain) = (f64::from(x) * scale, f64::from(gain));
            let truth = normal * gain;
            let plain = truth * truth * relative;
            let early = plain + rounding(output, normal.abs()) * gain * gain;
            values.push(Value { truth, variances: vec![plain, early] });
        }
    }
    values
}

fn rotated(
    x: &[f32],
    geometry: &Rope,
    head_dim: usize,
    position: usize,
    output: Format,
) -> Vec<Value> {
    let angles = rope::angles(geometry, position);
    let mut values: Vec<Value> =
        x.iter().map(|&x| Value { truth: f64::from(x), variances: vec![0.0; 3] }).collect();
    for (head, x) in x.chunks_exact(head_dim).enumerate() {
        for (pair, &(sin, cos)) in angles.iter().enumerate() {
            let (first, second) = rope::pair(geometry, head_dim, pair);
            let (a, b) = (f64::from(x[first]), f64::from(x[second]));
            let frequency = position as f64
                * libm::pow(geometry.theta, -2.0 * pair as f64 / geometry.dimensions as f64)
                / geometry.linear_scale;
            let turned = [a * cos - b * sin, a * sin + b * cos];
            let parts = [(a * cos, b * sin), (a * sin, b * cos)];
            for (which, place) in [first, second].into_iter().enumerate() {
                let truth = turned[which];
                let (left, right) = parts[which];
                let tables = 2.0 * once(left) + 2.0 * once(right) + 2.0 * once(truth);
                // A turn by another angle moves this half by the other one. The frequency,
                // its product with the position and the reduction round.
                let angle = tables + turned[1 - which].powi(2) * 4.0 * once(frequency);
                let (a, b) = ([a, b], [sin, cos]);
                let of_tables =
                    (a[0] * a[0] + a[1] * a[1]) * rounding(output, b[0].abs().max(b[1].abs()));
                let narrow = angle
                    + of_tables
                    + rounding(output, left.abs())
                    + rounding(output, right.abs());
                values[head * head_dim + place] =
                    Value { truth, variances: vec![tables, angle, narrow] };
            }
        }
    }
    values
}

fn swiglu(gate: &[f32], up: &[f32], output: Format) -> Vec<Value> {
    let value = |(&gate, &up): (&f32, &f32)| {
        let (gate, up) = (f64::from(gate), f64::from(up));
        let power = libm::exp(-gate);
        let silu = gate / (1.0 + power);
        let truth = silu * up;
        let share = if power.is_finite() { power / (1.0 + power) } else { 1.0 };
        // The exponential is within two places, and its argument rounds once.
        let exponential = (2.0 * UNIT * share).powi(2) + (gate * UNIT * share).powi(2) / 3.0;
        let plain = truth * truth * exponential + 5.0 * once(truth);
        let early = plain + rounding(output, silu.abs()) * up * up;
        Value { truth, variances: vec![plain, early] }
    };
    gate.iter().zip(up).map(value).collect()
}

fn softmax(x: &[f32]) -> Vec<Value> {
    let wide = || x.iter().map(|&x| f64::from(x));
    let most = wide().fold(f64::NEG_INFINITY, |most, x| if x > most { x } else { most });
    let powers: Vec<f64> = wide().map(|x| libm::exp(x - most)).collect();
    let total: f64 = powers.iter().sum();
    let value = |(x, power): (f64, &f64)| {
        let truth = power / total;
        // The difference and its product with log2 e round, the exponential is within two
        // places, the sum is made in any order, the quotient rounds.
        let relative = 2.0 * once(if x.is_finite() { x - most } else { 0.0 })
            + 4.0 * UNIT * UNIT
            + powers.len() as f64 / 3.0 * ADDITION
            + UNIT * UNIT;
        Value { truth, variances: vec![truth * truth * relative] }
    };
    wide().zip(&powers).map(value).collect()
}

/// One query row of all heads: `[heads * v_dim]` values.
fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    shape: AttentionOf,
    row: usize,
    output: Format,
) -> Vec<Value> {
    let AttentionOf { heads, kv_heads, head_dim, scale, causal, window } = shape;
    let narrow = if output == Format::F32 { Format::Bf16 } else { output };
    let v_dim = v.width() / kv_heads;
    // The last query stands at the last key.
    let place = row + k.rows().saturating_sub(q.rows());
    let end = if causal { place + 1 } else { k.rows() };
    let start = window.map_or(0, |window| (place + 1).saturating_sub(window));
    let mut values = Vec::with_capacity(heads * v_dim);
    for head in 0..heads {
        let group = head / (heads / kv_heads);
        let query = &q.row(row)[head * head_dim..(head + 1) * head_dim];
        let scores: Vec<(f64, f64)> = (start..end)
            .map(|key| {
                let key = &k.row(key)[group * head_dim..(group + 1) * head_dim];
                let products = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k));
                let (sum, squares) =
                    products.fold((0.0, 0.0), |(sum, squares), p| (sum + p, squares + p * p));
                (sum * scale, squares * scale * scale)
            })
            .collect();
        let most =
            scores.iter().fold(f64::NEG_INFINITY, |most, &(s, _)| if s > most { s } else { most });
        let powers: Vec<f64> = scores.iter().map(|&(s, _)| libm::exp(s - most)).collect();
        let total: f64 = powers.iter().sum();
        let value =
            |key: usize, column: usize| f64::from(v.row(start + key)[group * v_dim + column]);
        let length = head_dim as f64;
        let keys = scores.len() as f64;
        for column in 0..v_dim {
            let share = |key: usize| powers[key] / total;
            let truth: f64 = (0..scores.len()).map(|key| share(key) * value(key, column)).sum();
            let (mut plain, mut early, mut narrow_scores, mut squares) = (0.0, 0.0, 0.0, 0.0);
            for (key, &(score, terms)) in scores.iter().enumerate() {
                let (share, value) = (share(key), value(key, column));
                // A score's sum in any order, its scaling, the difference that the
                // exponential is taken of, and the exponential within two places.
                let relative = length / 6.0 * ADDITION * terms
                    + length / 3.0 * ADDITION * score * score
                    + once(score)
                    + 2.0 * once(score - most)
                    + 4.0 * UNIT * UNIT;
                let moved = share * (value - truth);
                plain += moved * moved * relative;
                squares += (share * value).powi(2);
                let power = powers[key];
                let of_power =
                    if power > 0.0 { rounding(narrow, power) / (power * power) } else { 0.0 };
                early += (share * value).powi(2) * of_power.min(1.0);
                narrow_scores += moved * moved * rounding(narrow, score.abs()).min(1.0);
            }
            let chain = keys / 6.0 * ADDITION * squares + keys / 3.0 * ADDITION * truth * truth;
            let plain = plain + chain + keys / 3.0 * ADDITION * truth * truth + 3.0 * once(truth);
            values.push(Value {
                truth,
                // Softmax may be rounded before or after its division.
                variances: vec![plain, plain + early, plain + 2.0 * early + 2.0 * narrow_scores],
            });
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn a_softmax_of_tiny_probabilities_is_within_rounding() {
        let mut random = Random::at(5);
        let x = Tensor::new(64, (0..640).map(|_| (random.normal() * 30.0) as f32).collect());
        let y: Vec<Value> = (0..10).flat_map(|row| softmax(x.row(row))).collect();
        for flushed in [false, true] {
            let y = y.iter().map(|value| value.truth as f32);
            let y = y.map(|y| if flushed && y < f32::MIN_POSITIVE { 0.0 } else { y });
            let y = Tensor::new(64, y.collect());
            let judged = Single::Softmax { x: &x }.judge(y, Format::F32).expect("a judgement");
            assert!(judged.z.within && judged.z.rms < 1.1, "{:?}", judged.z);
        }
    }
}
