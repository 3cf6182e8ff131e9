//! Every op that is no GEMM, as an explicit sequence of IEEE f32 operations.
//!
//! This file is the definition that a CUDA kernel is held to, operation by
//! operation: each `+ - * /` and `sqrt` below rounds once to nearest even,
//! `mul_add` is one fused operation, nothing is contracted, and every reduction
//! has a fixed number of lanes (the threads of a block or of a warp) and a fixed
//! tree. It knows slices only: no tensors, no weights.

/// Lanes of RMSNorm's reduction: element `i` goes to lane `i % NORM_LANES`.
pub const NORM_LANES: usize = 256;
/// Lanes of attention's reductions, a warp: element `i` goes to lane `i % WARP_LANES`.
pub const WARP_LANES: usize = 32;

/// Knuth's exact sum: `a + b = sum + error`, without a condition on the magnitudes.
#[inline(always)]
fn two_sum(a: f32, b: f32) -> (f32, f32) {
    let sum = a + b;
    let shadow = sum - a;
    (sum, (a - (sum - shadow)) + (b - shadow))
}

/// `e^x`: `x = n ln 2 + r`, a polynomial in `r`, times `2^n`.
///
/// The reduction constants and coefficients are those of the Cephes library's
/// `expf` (S. Moshier), which is within 2 ULP. The factor `2^n` is applied in
/// two exact halves, so that results below the normal range round once.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Beyond these the result is infinite or zero; a NaN fails both and stays.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -105.0 { -105.0 } else { x };
    let n = (x * LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let square = r * r;
    let p = p.mul_add(square, r) + 1.0;
    let n = n as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    p * power(half) * power(n - half)
}

/// One group of RMSNorm: `y = x / sqrt(mean(x^2) + eps) * gain`.
///
/// Squares, their sum, the mean and the root are carried in two f32 each, so
/// that the result is within one ULP for any width:
/// * lane: `p = x x`, its error by fma; `(hi, e) = two_sum(hi, p)`, `lo += e + error`;
/// * tree: lanes `i` and `i + half`, `half` from 128 down to 1;
/// * `r = 1 / sqrt(hi)` and one Newton step for its low part;
/// * `y = (x gain) r`, the product's error and the root's low part by fma.
#[inline(always)]
pub fn rms_norm(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) {
    let mut high = [0.0f32; NORM_LANES];
    let mut low = [0.0f32; NORM_LANES];
    for chunk in x.chunks(NORM_LANES) {
        for (lane, &x) in chunk.iter().enumerate() {
            let product = x * x;
            let product_error = x.mul_add(x, -product);
            let (sum, error) = two_sum(high[lane], product);
            high[lane] = sum;
            low[lane] += error + product_error;
        }
    }
    let (mean, mean_low) = mean_of(&mut high, &mut low, x.len() as f32);
    let (root, root_low) = reciprocal_root(mean, mean_low, eps);

    for ((y, &x), &gain) in y.iter_mut().zip(x).zip(gain) {
        let product = x * gain;
        let product_error = x.mul_add(gain, -product);
        let correction = product_error.mul_add(root, product * root_low);
        *y = product.mul_add(root, correction);
    }
}

/// One group of LayerNorm: `y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * gain + bias`.
///
/// As [`rms_norm`], in two f32 each throughout:
/// * lane: `(hi, e) = two_sum(hi, x)`, `lo += e`, then the tree, and the mean `m = hi / n`;
/// * `d = x - m` and its error, `p = d d` with twice the product of both beside it, lane and tree;
/// * the root as in [`rms_norm`], of the sum over `n`;
/// * `(s, t) = two_sum((d gain) r, bias)`, and all that was left over.
#[inline(always)]
pub fn layer_norm(x: &[f32], gain: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let count = x.len() as f32;
    let mut high = [0.0f32; NORM_LANES];
    let mut low = [0.0f32; NORM_LANES];
    for chunk in x.chunks(NORM_LANES) {
        for (lane, &x) in chunk.iter().enumerate() {
            let (sum, error) = two_sum(high[lane], x);
            high[lane] = sum;
            low[lane] += error;
        }
    }
    let (mean, mean_low) = mean_of(&mut high, &mut low, count);

    let mut high = [0.0f32; NORM_LANES];
    let mut low = [0.0f32; NORM_LANES];
    for chunk in x.chunks(NORM_LANES) {
        for (lane, &x) in chunk.iter().enumerate() {
            let (centred, centred_low) = centre(x, mean, mean_low);
            let product = centred * centred;
            let product_error = centred.mul_add(centred, -product);
            let product_error = (centred + centred).mul_add(centred_low, product_error);
            let (sum, error) = two_sum(high[lane], product);
            high[lane] = sum;
            low[lane] += error + product_error;
        }
    }
    let (variance, variance_low) = mean_of(&mut high, &mut low, count);
    let (root, root_low) = reciprocal_root(variance, variance_low, eps);

    for (((y, &x), &gain), &bias) in y.iter_mut().zip(x).zip(gain).zip(bias) {
        let (centred, centred_low) = centre(x, mean, mean_low);
        let product = centred * gain;
        let product_error = centred_low.mul_add(gain, centred.mul_add(gain, -product));
        let scaled = product * root;
        let scaled_error = product.mul_add(root, -scaled);
        let correction = product_error.mul_add(root, product * root_low);
        let (sum, error) = two_sum(scaled, bias);
        *y = sum + (error + (scaled_error + correction));
    }
}

/// A value less the mean, in two f32.
#[inline(always)]
fn centre(x: f32, mean: f32, mean_low: f32) -> (f32, f32) {
    let (centred, error) = two_sum(x, -mean);
    (centred, error - mean_low)
}

/// The sum of all lanes over their count, in two f32.
#[inline(always)]
fn mean_of(high: &mut [f32; NORM_LANES], low: &mut [f32; NORM_LANES], count: f32) -> (f32, f32) {
    let mut half = NORM_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            let (sum, error) = two_sum(high[lane], high[lane + half]);
            high[lane] = sum;
            low[lane] = (low[lane] + low[lane + half]) + error;
        }
        half /= 2;
    }
    let (sum, sum_low) = two_sum(high[0], low[0]);
    let mean = sum / count;
    (mean, ((-mean).mul_add(count, sum) + sum_low) / count)
}

/// `1 / sqrt(mean + eps)` in two f32.
#[inline(always)]
fn reciprocal_root(mean: f32, mean_low: f32, eps: f32) -> (f32, f32) {
    let (radicand, error) = two_sum(mean, eps);
    let radicand_low = mean_low + error;
    let root = 1.0 / radicand.sqrt();
    let square = root * root;
    let square_low = root.mul_add(root, -square);
    let residual = (-radicand).mul_add(square, 1.0);
    let residual = (-radicand).mul_add(square_low, residual);
    let residual = (-radicand_low).mul_add(square, residual);
    (root, 0.5 * root * residual)
}

/// What a delta net's head reads at one token.
pub struct DeltaToken<'a> {
    /// The query.
    pub query: &'a [f32],
    /// The key, as wide.
    pub key: &'a [f32],
    /// The value.
    pub value: &'a [f32],
    /// How much of the state stays.
    pub decay: f32,
    /// How much of what the state says for the key is corrected.
    pub beta: f32,
}

/// One token of one head of the gated delta rule; `state` is `[query.len(), value.len()]`.
///
/// * `r = 1 / sqrt(q . q + 1e-6)` by a warp, `q = (q r) / sqrt(width)`, and `k = k r` likewise;
/// * `S = S decay`, and of each column `m = sum S k`, a chain of fma over the rows;
/// * `d = (v - m) beta`, `S = fma(k, d, S)`, and `out = sum S q`, a chain of fma.
#[inline(always)]
pub fn delta_step(token: &DeltaToken<'_>, state: &mut [f32], out: &mut [f32]) {
    let DeltaToken { query, key, value, decay, beta } = *token;
    let width = value.len();
    let inverse = |x: &[f32]| 1.0 / (warp_dot(x, x) + 1e-6).sqrt();
    let (of_query, of_key) = (inverse(query), inverse(key));
    let scale = 1.0 / (query.len() as f32).sqrt();
    let mut kept = vec![0.0f32; width];
    for (row, &key) in state.chunks_exact_mut(width).zip(key) {
        let key = key * of_key;
        for (state, kept) in row.iter_mut().zip(&mut kept) {
            *state *= decay;
            *kept = state.mul_add(key, *kept);
        }
    }
    for (kept, &value) in kept.iter_mut().zip(value) {
        *kept = (value - *kept) * beta;
    }
    out.fill(0.0);
    for ((row, &key), &query) in state.chunks_exact_mut(width).zip(key).zip(query) {
        let (key, query) = (key * of_key, query * of_query * scale);
        for ((state, &change), out) in row.iter_mut().zip(&kept).zip(out.iter_mut()) {
            *state = key.mul_add(change, *state);
            *out = state.mul_add(query, *out);
        }
    }
}

/// One rotated pair: `(a cos - b sin, a sin + b cos)`, each a product and an fma.
#[inline(always)]
pub fn rotate(a: f32, b: f32, sin: f32, cos: f32) -> (f32, f32) {
    (a.mul_add(cos, -(b * sin)), a.mul_add(sin, b * cos))
}

/// `silu(gate) * up = gate / (1 + e^-gate) * up`.
#[inline(always)]
pub fn swiglu(gate: f32, up: f32) -> f32 {
    gate / (1.0 + exp(-gate)) * up
}

/// `gelu(gate) * up`, GELU by the hyperbolic tangent: `gate / (1 + e^-z) * up` with
/// `z = gate (2 sqrt(2 / pi) + 2 sqrt(2 / pi) 0.044715 gate^2)`.
#[inline(always)]
pub fn geglu(gate: f32, up: f32) -> f32 {
    const LINEAR: f32 = 1.595_769;
    const CUBIC: f32 = 0.071_354_814;
    let z = (gate * gate).mul_add(CUBIC, LINEAR) * gate;
    gate / (1.0 + exp(-z)) * up
}

/// `gate / (1 + e^(-1.702 gate)) * (up + 1)` of a gate of at most 7 and an `up` within 7 of 0
/// (gpt-oss).
#[inline(always)]
pub fn clamped_swiglu(gate: f32, up: f32) -> f32 {
    let gate = if gate > 7.0 { 7.0 } else { gate };
    let up = if up > 7.0 { 7.0 } else { up };
    let up = if up < -7.0 { -7.0 } else { up };
    gate / (1.0 + exp(-(1.702 * gate))) * (up + 1.0)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent, within two places: a polynomial below 0.625, else
/// `1 - 2 / (1 + e^2x)`. The coefficients are those of the Cephes library's `tanhf`
/// (S. Moshier).
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let size = x.abs();
    if size >= 0.625 {
        let large = 1.0 - 2.0 / (1.0 + exp(size + size));
        return large.copysign(x);
    }
    let square = x * x;
    let p = -5.704_988_7e-3f32;
    let p = p.mul_add(square, 2.063_909e-2);
    let p = p.mul_add(square, -5.373_971_6e-2);
    let p = p.mul_add(square, 1.333_144_2e-1);
    let p = p.mul_add(square, -3.333_328e-1);
    (p * square).mul_add(x, x)
}

/// `cap tanh(x / cap)`.
#[inline(always)]
pub fn soft_cap(x: f32, cap: f32) -> f32 {
    tanh(x / cap) * cap
}

/// The sum of a warp's lanes: lanes `i` and `i + half`, `half` from 16 down to 1.
#[inline(always)]
fn warp_sum(mut lanes: [f32; WARP_LANES]) -> f32 {
    let mut half = WARP_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// A dot product by a warp: each lane a chain of fma, then the tree.
#[inline(always)]
fn warp_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; WARP_LANES];
    for (a, b) in a.chunks(WARP_LANES).zip(b.chunks(WARP_LANES)) {
        for (lane, (&a, &b)) in a.iter().zip(b).enumerate() {
            lanes[lane] = a.mul_add(b, lanes[lane]);
        }
    }
    warp_sum(lanes)
}

/// Keys or values of one head: rows of `stride` values, from which the head's are taken at
/// `offset`.
pub struct Rows<'a> {
    /// The rows that the query may see.
    pub data: &'a [f32],
    /// Values of a row.
    pub stride: usize,
    /// The head's first one.
    pub offset: usize,
}

/// What is done to a head's scores.
#[derive(Clone, Copy)]
pub struct OfScores {
    /// What they are multiplied by.
    pub scale: f32,
    /// Towards what they are bent; 0 for not at all.
    pub cap: f32,
    /// A score that has no value.
    pub sink: Option<f32>,
}

/// One query head over the keys and values it may see.
///
/// * score `j`: `dot(query, key_j) * scale`, by a warp, and [`soft_cap`] of it where `cap` is not 0;
/// * weight `j`: `exp(score_j - largest score)`, the sink among them;
/// * total: lane `j % 32` sums in order, then the tree, then the sink's weight;
/// * `out = (chain of fma over j of weight_j * value_j) / total`.
#[inline(always)]
pub fn attend(
    query: &[f32],
    keys: &Rows<'_>,
    values: &Rows<'_>,
    OfScores { scale, cap, sink }: OfScores,
    weights: &mut Vec<f32>,
    out: &mut [f32],
) {
    let head = keys.offset..keys.offset + query.len();
    let rows = keys.data.chunks_exact(keys.stride);
    // A loop of its own: what `extend` calls is compiled without this instruction set.
    weights.resize(rows.len(), 0.0);
    for (weight, key) in weights.iter_mut().zip(rows) {
        *weight = warp_dot(query, &key[head.clone()]) * scale;
    }
    if cap != 0.0 {
        weights.iter_mut().for_each(|score| *score = soft_cap(*score, cap));
    }
    // A NaN score must not be lost: it makes every weight NaN below.
    let least = sink.unwrap_or(f32::NEG_INFINITY);
    let largest = weights
        .iter()
        .fold(least, |most, &score| if score > most || score.is_nan() { score } else { most });
    let mut lanes = [0.0f32; WARP_LANES];
    for (index, weight) in weights.iter_mut().enumerate() {
        *weight = exp(*weight - largest);
        lanes[index % WARP_LANES] += *weight;
    }
    let mut total = warp_sum(lanes);
    if let Some(sink) = sink {
        total += exp(sink - largest);
    }
    out.fill(0.0);
    let head = values.offset..values.offset + out.len();
    for (&weight, value) in weights.iter().zip(values.data.chunks_exact(values.stride)) {
        for (out, &value) in out.iter_mut().zip(&value[head.clone()]) {
            *out = weight.mul_add(value, *out);
        }
    }
    for out in out {
        *out /= total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ulps(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
    }

    #[test]
    fn exp_is_within_two_ulp_of_the_exact_value() {
        let mut x = -103.0f32;
        while x < 88.7 {
            let exact = libm::exp(f64::from(x)) as f32;
            assert!(ulps(exp(x), exact) <= 2, "exp({x}) = {:e}, exact {exact:e}", exp(x));
            x += 0.003_7;
        }
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn tanh_is_within_two_ulp_of_the_exact_value() {
        let mut x = -12.0f32;
        while x < 12.0 {
            let exact = libm::tanh(f64::from(x)) as f32;
            assert!(ulps(tanh(x), exact) <= 2, "tanh({x}) = {:e}, exact {exact:e}", tanh(x));
            x += 0.000_37;
        }
        assert_eq!((tanh(0.0), tanh(f32::INFINITY), tanh(-100.0)), (0.0, 1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn geglu_is_gelu_by_the_hyperbolic_tangent_times_up() {
        let mut x = -9.0f32;
        while x < 9.0 {
            let wide = f64::from(x);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            // Of large negative arguments `1 + tanh` keeps no digit.
            let exact = match x > -2.0 {
                true => 0.5 * wide * (1.0 + libm::tanh(inner)) * 3.0,
                false => wide / (1.0 + libm::exp(-2.0 * inner)) * 3.0,
            };
            let error = (f64::from(geglu(x, 3.0)) - exact).abs();
            // The exponential's argument rounds, and it may be large.
            let allowed = 4e-7 * (1.0 + inner.abs()) * exact.abs() + 1e-37;
            assert!(error <= allowed, "geglu({x}): off by {error:e}, allowed {allowed:e}");
            x += 0.003_1;
        }
    }

    #[test]
    fn layer_norm_is_within_one_ulp_on_all_widths() {
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        for width in [2, 3, 31, 64, 255, 256, 257, 576, 896, 3584, 18944] {
            for round in 0..5 {
                // The last round: a mean that is far larger than the spread.
                let size = 10f32.powi(round - 2);
                let mean = if round == 4 { 300.0 } else { size * draw() };
                let x: Vec<f32> = (0..width).map(|_| mean + draw() * draw() * size).collect();
                let gain: Vec<f32> = (0..width).map(|_| 1.0 + draw()).collect();
                let bias: Vec<f32> = (0..width).map(|_| draw()).collect();
                let mut y = vec![0.0; width];
                layer_norm(&x, &gain, &bias, 1e-5, &mut y);
                let wide = |x: &f32| f64::from(*x);
                let mean = x.iter().map(wide).sum::<f64>() / width as f64;
                let squares: f64 = x.iter().map(|x| (wide(x) - mean).powi(2)).sum();
                let root = 1.0 / (squares / width as f64 + f64::from(1e-5f32)).sqrt();
                for (at, &y) in y.iter().enumerate() {
                    let normed = (wide(&x[at]) - mean) * root * wide(&gain[at]);
                    let exact = (normed + wide(&bias[at])) as f32;
                    // Where both cancel, what is left has fewer digits than an f32.
                    let few = 1e-13 * normed.abs();
                    let close = (f64::from(y) - f64::from(exact)).abs() <= few;
                    assert!(ulps(y, exact) <= 1 || close, "width {width}: {y:e}, exact {exact:e}");
                }
            }
        }
    }

    #[test]
    fn a_sink_takes_its_share_and_has_no_value() {
        let query = [1.0, 0.0];
        let keys = Rows { data: &[0.0, 0.0, 0.0, 0.0], stride: 2, offset: 0 };
        // Wider rows, of which the head's values are the last two.
        let values = Rows { data: &[9.0, 3.0, 6.0, 9.0, 3.0, 12.0], stride: 3, offset: 1 };
        let of = |sink| {
            let mut out = [0.0; 2];
            let scores = OfScores { scale: 1.0, cap: 0.0, sink };
            attend(&query, &keys, &values, scores, &mut Vec::new(), &mut out);
            out
        };
        assert_eq!(of(None), [3.0, 9.0]);
        assert_eq!(of(Some(0.0)), [2.0, 6.0]);
        assert_eq!(of(Some(200.0)), [0.0, 0.0]);
    }

    #[test]
    fn exp_of_special_values() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn rms_norm_is_within_one_ulp_on_all_widths() {
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        for width in [1, 2, 3, 31, 64, 255, 256, 257, 576, 896, 3584, 18944] {
            for round in 0..4 {
                let size = 10f32.powi(round - 2);
                let x: Vec<f32> = (0..width).map(|_| draw() * draw() * size).collect();
                let gain: Vec<f32> = (0..width).map(|_| 1.0 + draw()).collect();
                let mut y = vec![0.0; width];
                rms_norm(&x, &gain, 1e-6, &mut y);
                let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
                let root = 1.0 / (squares / width as f64 + f64::from(1e-6f32)).sqrt();
                for ((&y, &x), &gain) in y.iter().zip(&x).zip(&gain) {
                    let exact = (f64::from(x) * root * f64::from(gain)) as f32;
                    assert!(ulps(y, exact) <= 1, "width {width}: {y:e}, exact {exact:e}");
                }
            }
        }
    }
}
