//! The definition of truth: every op in f64 over the dequantised weights.
//!
//! Sums run over a fixed number of lanes that are added in a fixed order, so
//! the result has the same bits for any number of threads and any instruction
//! set. A product of two f32 is exact in f64, hence a fused multiply-add gives
//! what a multiplication and an addition give, and may be used where it exists.
//! Transcendental functions come from `libm`, the same code on every machine.
//! It knows nothing of recipes: no quantised activations, no chip.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::call::Call;
use super::dots::dots;
use super::experts::{self, Products};
use super::exponential::exponentials;
use super::{
    AttentionShape, ComputeError, Ops, check_gain, check_interrupt, check_matmul, check_same_shape,
    check_tokens, gain_and_bias, rope,
};
use crate::model::{Activation, Rope, RouterScores, Routing, Weight};
use crate::tensor::Tensor;
use crate::vector::{Kernel, dispatch};

/// Number of partial sums of a dot product; element `k` goes to lane `k % LANES`.
const LANES: usize = 8;

/// The reference arm.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

impl Ops for Reference {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        match *call {
            Call::Embed { weight, tokens } => self.embed(weight, tokens),
            Call::RmsNorm { x, gain, eps } => self.rms_norm(x, gain, eps),
            Call::LayerNorm { x, gain, bias, eps } => self.layer_norm(x, gain, bias, eps),
            Call::Matmul { x, weight, bias } => self.matmul(x, weight, bias),
            Call::Rope { x, rope, head_dim, first_position } => {
                self.rope(x, rope, head_dim, first_position)
            }
            // The function knows no cache: what is kept of a value is the value.
            Call::Cached(cached) => Ok(cached.x.clone()),
            Call::Attention { q, k, v, shape } => self.attention(q, k, v, shape),
            Call::Gated { gate, up, activation } => self.gated(gate, up, activation),
            Call::Activated { x, activation } => self.activated(x, activation),
            Call::Route { scores, bias, routing } => self.route(scores, bias, routing),
            Call::Experts(products) => self.experts(&products),
            Call::Mix { x, routes, used } => self.mix(x, routes, used),
            Call::SigmoidGate { x, gate } => self.sigmoid_gate(x, gate),
            Call::Convolve(convolution) => convolution.exact(),
            Call::Gates(gates) => gates.made(),
            Call::Delta(rule) => Ok(rule.exact()?.0),
            Call::Add { a, b } => self.add(a, b),
            Call::Scale { x, factor, .. } => self.scale(x, factor),
            Call::SoftCap { x, cap } => self.soft_cap(x, cap),
        }
    }
}

impl Reference {
    pub(crate) fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError> {
        check_tokens(&weight, tokens)?;
        let mut rows = Tensor::zeros(tokens.len(), weight.width());
        for (index, &token) in tokens.iter().enumerate() {
            let token = token as usize;
            weight.decode_rows(token..token + 1, rows.row_mut(index))?;
        }
        Ok(rows)
    }

    pub(crate) fn rms_norm(
        &self,
        x: &Tensor,
        gain: Weight<'_>,
        eps: f32,
    ) -> Result<Tensor, ComputeError> {
        check_gain(x, &gain)?;
        let gain = gain.to_vec()?;
        let mut y = Tensor::zeros(x.rows(), x.width());
        let groups = x.data().chunks_exact(gain.len());
        for (x, y) in groups.zip(y.data_mut().chunks_exact_mut(gain.len())) {
            let scale = 1.0 / (mean_square(x) + f64::from(eps)).sqrt();
            for ((y, &x), &gain) in y.iter_mut().zip(x).zip(&gain) {
                *y = (f64::from(x) * scale * f64::from(gain)) as f32;
            }
        }
        Ok(y)
    }

    fn layer_norm(
        &self,
        x: &Tensor,
        gain: Weight<'_>,
        bias: Option<Weight<'_>>,
        eps: f32,
    ) -> Result<Tensor, ComputeError> {
        let width = gain.width();
        let (gain, bias) = gain_and_bias(x, gain, bias)?;
        let mut y = Tensor::zeros(x.rows(), x.width());
        let groups = x.data().chunks_exact(width).zip(y.data_mut().chunks_exact_mut(width));
        let of_groups = gain.chunks_exact(width).zip(bias.chunks_exact(width)).cycle();
        for ((x, y), (gain, bias)) in groups.zip(of_groups) {
            let count = x.len() as f64;
            let mut lanes = [0.0f64; LANES];
            for (index, &x) in x.iter().enumerate() {
                lanes[index % LANES] += f64::from(x);
            }
            let mean = add_lanes(lanes) / count;
            let mut lanes = [0.0f64; LANES];
            for (index, &x) in x.iter().enumerate() {
                lanes[index % LANES] += (f64::from(x) - mean).powi(2);
            }
            let scale = 1.0 / (add_lanes(lanes) / count + f64::from(eps)).sqrt();
            for (((y, &x), &gain), &bias) in y.iter_mut().zip(x).zip(gain).zip(bias) {
                *y = ((f64::from(x) - mean) * scale * f64::from(gain) + f64::from(bias)) as f32;
            }
        }
        Ok(y)
    }

    pub(crate) fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_matmul(x, &weight, bias.as_ref())?;
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let wide = Widened::of(x.data(), x.width());
        let made = by_chunk(weight, |first, chunk| {
            let bias = bias.as_ref().map(|bias| &bias[first..first + chunk.rows]);
            let dots = dot_rows(&wide, chunk);
            let mut y = Vec::with_capacity(dots.len());
            for dots in dots.chunks_exact(chunk.rows.max(1)) {
                match bias {
                    None => y.extend(dots.iter().map(|&dot| finished(dot, None))),
                    Some(bias) => {
                        let both = dots.iter().zip(bias);
                        y.extend(both.map(|(&dot, &bias)| finished(dot, Some(bias))));
                    }
                }
            }
            Tensor::new(chunk.rows, y)
        })?;
        let mut y = Tensor::zeros(x.rows(), weight.rows());
        made.into_iter().for_each(|(first, chunk)| y.set_columns(first, &chunk));
        Ok(y)
    }

    /// The columns of a product that some rows of the weight give.
    #[cfg(feature = "cuda")]
    pub(super) fn outputs_at(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
        rows: &[usize],
    ) -> Result<Tensor, ComputeError> {
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let wide = Widened::of(x.data(), x.width());
        let mut y = Tensor::zeros(x.rows(), rows.len());
        for (place, &row) in rows.iter().enumerate() {
            let mut decoded = vec![0.0; weight.width()];
            weight.decode_rows(row..row + 1, &mut decoded)?;
            let bias = bias.as_ref().map(|bias| bias[row]);
            let dots = dot_rows(&wide, &Widened::of(&decoded, weight.width()));
            for (token, dot) in dots.into_iter().enumerate() {
                y.row_mut(token)[place] = finished(dot, bias);
            }
        }
        Ok(y)
    }

    pub(crate) fn rope(
        &self,
        x: &Tensor,
        geometry: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        let mut y = x.clone();
        for row in 0..x.rows() {
            let angles = rope::angles(geometry, first_position + row);
            for head in y.row_mut(row).chunks_exact_mut(head_dim) {
                for (pair, &(sin, cos)) in angles.iter().enumerate() {
                    let (first, second) = rope::pair(geometry, head_dim, pair);
                    let (a, b) = (f64::from(head[first]), f64::from(head[second]));
                    head[first] = (a * cos - b * sin) as f32;
                    head[second] = (a * sin + b * cos) as f32;
                }
            }
        }
        Ok(y)
    }

    pub(crate) fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape<'_>,
    ) -> Result<Tensor, ComputeError> {
        let AttentionShape { heads, kv_heads, value_dim, .. } = shape;
        let blocks: Vec<(usize, Range<usize>)> = (0..kv_heads)
            .flat_map(|kv_head| (0..q.rows()).step_by(QUERY_ROWS).map(move |row| (kv_head, row)))
            .map(|(kv_head, row)| (kv_head, row..(row + QUERY_ROWS).min(q.rows())))
            .collect();
        let group = heads / kv_heads;
        let made: Vec<Tensor> = blocks
            .par_iter()
            .map(|(kv_head, rows)| {
                check_interrupt()?;
                Ok(attended(q, k, v, shape, *kv_head, rows.clone()))
            })
            .collect::<Result<_, ComputeError>>()?;
        let mut y = Tensor::zeros(q.rows(), heads * value_dim);
        for ((kv_head, rows), made) in blocks.into_iter().zip(made) {
            let first = kv_head * group * value_dim;
            for (at, row) in rows.enumerate() {
                y.row_mut(row)[first..first + made.width()].copy_from_slice(made.row(at));
            }
        }
        Ok(y)
    }

    pub(crate) fn gated(
        &self,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<Tensor, ComputeError> {
        check_same_shape("a gated activation", gate, up)?;
        let mut y = up.clone();
        let parts = y.data_mut().par_chunks_mut(STRETCH).zip(gate.data().par_chunks(STRETCH));
        parts.for_each(|(y, gate)| {
            let mut values = [0.0f64; STRETCH];
            let values = &mut values[..gate.len()];
            activate(activation, gate, values);
            for (y, value) in y.iter_mut().zip(values) {
                *y = (*value * beside_gate(activation, f64::from(*y))) as f32;
            }
        });
        Ok(y)
    }

    fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor, ComputeError> {
        let mut y = Tensor::zeros(x.rows(), x.width());
        let parts = y.data_mut().par_chunks_mut(STRETCH).zip(x.data().par_chunks(STRETCH));
        parts.for_each(|(y, x)| {
            let mut values = [0.0f64; STRETCH];
            let values = &mut values[..x.len()];
            activate(activation, x, values);
            y.iter_mut().zip(values).for_each(|(y, value)| *y = *value as f32);
        });
        Ok(y)
    }

    fn route(
        &self,
        scores: &Tensor,
        bias: Option<Weight<'_>>,
        routing: &Routing,
    ) -> Result<Tensor, ComputeError> {
        experts::check_route(scores, bias.as_ref(), routing)?;
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let mut y = Tensor::zeros(scores.rows(), scores.width());
        for row in 0..scores.rows() {
            let (_, weights) = routed(scores.row(row), bias.as_deref(), routing);
            for (y, weight) in y.row_mut(row).iter_mut().zip(weights) {
                *y = weight as f32;
            }
        }
        Ok(y)
    }

    fn experts(&self, products: &Products<'_>) -> Result<Tensor, ComputeError> {
        let made = products.by_expert(|x, weight, bias| Ok([self.matmul(x, weight, bias)?]));
        made.map(|[y]| y)
    }

    fn mix(&self, x: &Tensor, routes: &Tensor, used: usize) -> Result<Tensor, ComputeError> {
        let add = |sum: f64, weight, value| sum + f64::from(weight) * f64::from(value);
        experts::mixed(x, routes, used, add, |sum| sum as f32)
    }

    fn sigmoid_gate(&self, x: &Tensor, gate: &Tensor) -> Result<Tensor, ComputeError> {
        experts::check_gate(x, gate)?;
        let mut y = x.clone();
        for row in 0..x.rows() {
            let gates = gate.row(row).iter().cycle();
            for (y, gate) in y.row_mut(row).iter_mut().zip(gates) {
                *y = (f64::from(*y) / (1.0 + libm::exp(-f64::from(*gate)))) as f32;
            }
        }
        Ok(y)
    }

    pub(crate) fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError> {
        check_same_shape("a residual addition", a, b)?;
        let data = a.data().iter().zip(b.data());
        let data = data.map(|(&a, &b)| (f64::from(a) + f64::from(b)) as f32);
        Ok(Tensor::new(a.width(), data.collect()))
    }

    pub(crate) fn scale(&self, x: &Tensor, factor: f64) -> Result<Tensor, ComputeError> {
        let data = x.data().iter().map(|&x| (f64::from(x) * factor) as f32);
        Ok(Tensor::new(x.width(), data.collect()))
    }

    pub(crate) fn soft_cap(&self, x: &Tensor, cap: f64) -> Result<Tensor, ComputeError> {
        let data = x.data().iter().map(|&x| (cap * libm::tanh(f64::from(x) / cap)) as f32);
        Ok(Tensor::new(x.width(), data.collect()))
    }
}

/// Rows of queries whose scores are computed together.
const QUERY_ROWS: usize = 16;

/// What the query heads of one key and value head make of some rows: `[rows, group value_dim]`.
fn attended(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: AttentionShape<'_>,
    kv_head: usize,
    rows: Range<usize>,
) -> Tensor {
    let AttentionShape { heads, kv_heads, head_dim, value_dim, .. } = shape;
    let group = heads / kv_heads;
    let scale = shape.exact_scale();
    let bent = |score: f64| shape.cap.map_or(score, |cap| cap * libm::tanh(score / cap));
    let positions = shape.seen(rows.start).start..shape.seen(rows.end - 1).end;
    let queries = parts_of(q, rows.clone(), kv_head * group * head_dim, group * head_dim);
    let queries = Widened::of(&queries, head_dim);
    let keys = parts_of(k, positions.clone(), kv_head * head_dim, head_dim);
    let keys = Widened::of(&keys, head_dim);
    let scores = dot_rows(&queries, &keys);
    let mut y = Tensor::zeros(rows.len(), group * value_dim);
    for (at, row) in rows.enumerate() {
        let seen = shape.seen(row);
        for member in 0..group {
            let scores = &scores[(at * group + member) * positions.len()..][..positions.len()];
            let scores = &scores[seen.start - positions.start..seen.end - positions.start];
            let mut weights: Vec<f64> = scores.iter().map(|score| bent(score * scale)).collect();
            let sink = shape.sink(kv_head * group + member).map(f64::from);
            let least = sink.unwrap_or(f64::NEG_INFINITY);
            let largest = weights.iter().copied().fold(least, f64::max);
            weights.iter_mut().for_each(|score| *score -= largest);
            exponentials(&mut weights);
            let of_sink = sink.map_or(0.0, |sink| libm::exp(sink - largest));
            let total: f64 = weights.iter().sum::<f64>() + of_sink;
            let mut sums = vec![0.0f64; value_dim];
            let first = kv_head * value_dim;
            dispatch(Weighted { weights: &weights, v, from: seen.start, first, sums: &mut sums });
            let out = &mut y.row_mut(at)[member * value_dim..][..value_dim];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = (sum / total) as f32;
            }
        }
    }
    y
}

/// Some columns of some rows of a tensor, one after the other.
fn parts_of(x: &Tensor, rows: Range<usize>, first: usize, width: usize) -> Vec<f32> {
    rows.flat_map(|row| x.row(row)[first..first + width].iter().copied()).collect()
}

/// Adds weighted rows of values to sums, one position after the other, each product rounded.
struct Weighted<'a> {
    weights: &'a [f64],
    v: &'a Tensor,
    from: usize,
    first: usize,
    sums: &'a mut [f64],
}

impl Kernel for Weighted<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (at, &weight) in self.weights.iter().enumerate() {
            let values = &self.v.row(self.from + at)[self.first..][..self.sums.len()];
            for (sum, &value) in self.sums.iter_mut().zip(values) {
                *sum += weight * f64::from(value);
            }
        }
    }
}

/// The experts that a row of scores goes to, in ascending order, and all weights.
///
/// Source: the routers of transformers 5.17 (Mixtral, Qwen3-MoE, gpt-oss, DeepSeek-V3).
pub fn routed(scores: &[f32], bias: Option<&[f32]>, routing: &Routing) -> (Vec<usize>, Vec<f64>) {
    let mut weights = vec![0.0; scores.len()];
    if experts::by_sigmoid(routing) {
        let sigmoid = |score: &f32| 1.0 / (1.0 + libm::exp(-f64::from(*score)));
        let all: Vec<f64> = scores.iter().map(sigmoid).collect();
        let by = all.iter().enumerate();
        let by: Vec<f64> = by.map(|(at, s)| s + bias.map_or(0.0, |b| f64::from(b[at]))).collect();
        let taken = experts::chosen(&by, routing);
        let total: f64 = match routing.scores {
            RouterScores::SigmoidNormalised => taken.iter().map(|&e| all[e]).sum::<f64>() + 1e-20,
            _ => 1.0,
        };
        taken.iter().for_each(|&expert| weights[expert] = all[expert] / total * routing.factor);
        return (taken, weights);
    }
    let taken = experts::chosen(scores, routing);
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let power = |expert: usize| libm::exp(f64::from(scores[expert]) - f64::from(largest));
    let total: f64 = match routing.scores {
        RouterScores::SoftmaxOfTaken => taken.iter().map(|&expert| power(expert)).sum(),
        _ => (0..scores.len()).map(power).sum(),
    };
    taken.iter().for_each(|&expert| weights[expert] = power(expert) / total * routing.factor);
    (taken, weights)
}

/// The limit of gpt-oss's gated activation.
pub const CLAMP: f64 = 7.0;
/// What its gate's value is multiplied by before the sigmoid.
pub const ALPHA: f64 = 1.702;

/// A gate's activation times the other value. gpt-oss clamps both, and adds one to the other.
pub fn gated(activation: Activation, gate: f64, up: f64) -> f64 {
    activated(activation, of_gate(activation, gate)) * beside_gate(activation, up)
}

/// What of a gate goes through the activation.
fn of_gate(activation: Activation, gate: f64) -> f64 {
    if activation == Activation::ClampedSwiglu && gate > CLAMP { CLAMP } else { gate }
}

/// What an activated gate is multiplied with.
fn beside_gate(activation: Activation, up: f64) -> f64 {
    match activation {
        Activation::ClampedSwiglu => up.clamp(-CLAMP, CLAMP) + 1.0,
        _ => up,
    }
}

/// Values that are activated at a time.
const STRETCH: usize = 512;

/// [`activated`] of each value, of gates of what [`of_gate`] leaves.
fn activate(activation: Activation, gate: &[f32], values: &mut [f64]) {
    let given = |gate: &f32| of_gate(activation, f64::from(*gate));
    for (value, gate) in values.iter_mut().zip(gate) {
        *value = -sigmoid_argument(activation, given(gate));
    }
    exponentials(values);
    for (value, gate) in values.iter_mut().zip(gate) {
        *value = given(gate) / (1.0 + *value);
    }
}

/// SiLU, or GELU by the hyperbolic tangent (Hendrycks and Gimpel, arXiv 1606.08415).
///
/// Both are `x / (1 + e^-z)`: of SiLU z is x, of GELU `2 sqrt(2 / pi) (x + 0.044715 x^3)`, since
/// `(1 + tanh(z / 2)) / 2 = 1 / (1 + e^-z)`.
pub fn activated(activation: Activation, x: f64) -> f64 {
    x / (1.0 + libm::exp(-sigmoid_argument(activation, x)))
}

/// The number whose sigmoid an activation multiplies with.
pub(super) fn sigmoid_argument(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x,
        Activation::ClampedSwiglu => ALPHA * x,
        Activation::GeluTanh => {
            2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)
        }
    }
}

/// The mean of the squares, over fixed lanes.
fn mean_square(x: &[f32]) -> f64 {
    dot(x, x) / x.len() as f64
}

/// A dot product over fixed lanes; short vectors only, the GEMM has its own loop.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f64::from(a) * f64::from(b);
        }
    }
    add_lanes(lanes)
}

/// What a product's output is of its sum: no negative zero where no bias is added either.
#[inline(always)]
pub(super) fn finished(dot: f64, bias: Option<f32>) -> f32 {
    (dot + bias.map_or(0.0, f64::from)) as f32
}

/// The fixed order in which the lanes are added.
#[inline(always)]
fn add_lanes(lanes: [f64; LANES]) -> f64 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// How many rows of a weight are decoded at a time: about 32 Ki values, so that
/// a chunk stays in the second-level cache and never is a whole tensor.
fn chunk_rows(width: usize) -> usize {
    const CHUNK_VALUES: usize = 32 * 1024;
    (CHUNK_VALUES / width.max(1)).clamp(4, 256).next_multiple_of(4)
}

/// Decodes a weight in chunks of rows, in parallel, and applies `work` to each;
/// returns each chunk's first row with the result, in the order of the rows.
fn by_chunk<T: Send>(
    weight: Weight<'_>,
    work: impl Fn(usize, &Widened) -> T + Sync,
) -> Result<Vec<(usize, T)>, ComputeError> {
    let (rows, width) = (weight.rows(), weight.width());
    let step = chunk_rows(width);
    let starts: Vec<usize> = (0..rows).step_by(step).collect();
    starts
        .into_par_iter()
        .map(|start| {
            check_interrupt()?;
            let range = start..(start + step).min(rows);
            let (mut decoded, mut chunk) = SCRATCH.take();
            decoded.resize(range.len() * width, 0.0);
            weight.decode_rows(range, &mut decoded)?;
            chunk.refill(&decoded, width);
            let made = work(start, &chunk);
            SCRATCH.set((decoded, chunk));
            Ok((start, made))
        })
        .collect()
}

thread_local! {
    /// A chunk's values and the same as f64, whose memory serves the next chunk again.
    static SCRATCH: Cell<(Vec<f32>, Widened)> = Cell::default();
}

/// Rows of f64, each padded with zeros to whole lanes. A zero product leaves a
/// lane as it is, so the padding cannot be seen in the result.
#[derive(Default)]
pub(super) struct Widened {
    rows: usize,
    stride: usize,
    data: Vec<f64>,
}

impl Widened {
    /// Rows of `width` values each.
    pub fn of(values: &[f32], width: usize) -> Widened {
        let mut wide = Widened::default();
        wide.refill(values, width);
        wide
    }

    /// Rows of values that are f64 already.
    pub fn of_f64(values: &[f64], width: usize) -> Widened {
        let (rows, stride) = (values.len() / width, width.next_multiple_of(LANES));
        let mut wide = Widened { rows, stride, data: Vec::new() };
        wide.data.resize(wide.rows * wide.stride, 0.0);
        let rows = wide.data.chunks_exact_mut(wide.stride);
        for (wide, values) in rows.zip(values.chunks_exact(width)) {
            wide[..width].copy_from_slice(values);
        }
        wide
    }

    /// Rows of `width` values each, in place of what stood here.
    pub fn refill(&mut self, values: &[f32], width: usize) {
        self.rows = values.len() / width;
        self.stride = width.next_multiple_of(LANES);
        self.data.resize(self.rows * self.stride, 0.0);
        dispatch(Widen { values, width, stride: self.stride, data: &mut self.data });
    }
}

impl Widened {
    /// The sum of each row's squares, which are exact where the values are f32.
    pub fn energies(&self) -> Vec<f64> {
        let mut energies = vec![0.0; self.rows];
        dispatch(Energies { wide: self, energies: &mut energies });
        energies
    }
}

struct Energies<'a> {
    wide: &'a Widened,
    energies: &'a mut [f64],
}

impl Kernel for Energies<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let rows = self.wide.data.chunks_exact(self.wide.stride.max(1));
        for (row, energy) in rows.zip(self.energies) {
            let mut lanes = [0.0f64; LANES];
            for values in row.as_chunks::<LANES>().0 {
                for (lane, value) in lanes.iter_mut().zip(values) {
                    *lane += value * value;
                }
            }
            *energy = add_lanes(lanes);
        }
    }
}

/// Converts rows of f32 to padded rows of f64.
struct Widen<'a> {
    values: &'a [f32],
    width: usize,
    stride: usize,
    data: &'a mut [f64],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let rows = self.values.chunks_exact(self.width);
        for (values, wide) in rows.zip(self.data.chunks_exact_mut(self.stride)) {
            let (wide, padding) = wide.split_at_mut(self.width);
            for (wide, &value) in wide.iter_mut().zip(values) {
                *wide = f64::from(value);
            }
            // The memory may have held another tensor.
            padding.fill(0.0);
        }
    }
}

/// All dot products of the rows of `x` with the rows of `w`, `[x rows, w rows]`.
pub(super) fn dot_rows(x: &Widened, w: &Widened) -> Vec<f64> {
    dots(&x.data[..x.rows * x.stride], &w.data[..w.rows * w.stride], w.stride)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The product as `kernels/reference.cu` computes it: tiles of 32 values padded with zeros, a
    /// lane a thread, and lanes that are added across the threads.
    fn as_the_kernel(x: &[f32], w: &[f32], bias: Option<f32>) -> f32 {
        let mut lanes = [0.0f64; LANES];
        for start in (0..x.len()).step_by(32) {
            for k in (0..32).step_by(LANES) {
                for (lane, sum) in lanes.iter_mut().enumerate() {
                    let at = start + k + lane;
                    let value = |values: &[f32]| values.get(at).map_or(0.0, |v| f64::from(*v));
                    *sum = value(x).mul_add(value(w), *sum);
                }
            }
        }
        for half in [4, 2, 1] {
            lanes = std::array::from_fn(|lane| lanes[lane] + lanes[lane ^ half]);
        }
        (lanes[0] + bias.map_or(0.0, f64::from)) as f32
    }

    #[test]
    fn the_order_of_the_kernel_is_the_order_of_the_lanes() {
        let mut state = 7u64;
        let mut value = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bits = (state >> 32) as u32;
            f32::from_bits((bits & 0x807f_ffff) | (120 + (bits >> 23 & 7)) << 23)
        };
        for width in [1, 2, 7, 8, 9, 31, 32, 33, 63, 100, 1000, 3587] {
            for outputs in [1, 3, 37] {
                let x: Vec<f32> = (0..3 * width).map(|_| value()).collect();
                let w: Vec<f32> = (0..outputs * width).map(|_| value()).collect();
                let dots = dot_rows(&Widened::of(&x, width), &Widened::of(&w, width));
                for bias in [None, Some(value())] {
                    let rows = x.chunks(width).flat_map(|x| w.chunks(width).map(move |w| (x, w)));
                    for ((x, w), dot) in rows.zip(&dots) {
                        let kernel = as_the_kernel(x, w, bias);
                        assert_eq!(kernel.to_bits(), finished(*dot, bias).to_bits(), "{width}");
                    }
                }
            }
        }
    }

    #[test]
    fn memory_that_serves_again_leaves_nothing_in_the_padding() {
        let full = vec![7.0f32; 64];
        let mut wide = Widened::of(&full, 16);
        wide.refill(&full[..36], 12);
        for row in wide.data.chunks_exact(16) {
            assert_eq!(row[..12], [7.0; 12]);
            assert_eq!(row[12..], [0.0; 4]);
        }
    }
}
