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

    let count = x.len() as f32;
    let mean = sum / count;
    let mean_low = ((-mean).mul_add(count, sum) + sum_low) / count;
    let (radicand, error) = two_sum(mean, eps);
    let radicand_low = mean_low + error;

    let root = 1.0 / radicand.sqrt();
    let square = root * root;
    let square_low = root.mul_add(root, -square);
    let residual = (-radicand).mul_add(square, 1.0);
    let residual = (-radicand).mul_add(square_low, residual);
    let residual = (-radicand_low).mul_add(square, residual);
    let root_low = 0.5 * root * residual;

    for ((y, &x), &gain) in y.iter_mut().zip(x).zip(gain) {
        let product = x * gain;
        let product_error = x.mul_add(gain, -product);
        let correction = product_error.mul_add(root, product * root_low);
        *y = product.mul_add(root, correction);
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

/// One query head over the keys and values it may see, rows of `stride` values
/// from which the head's `query.len()` values are taken at `offset`.
///
/// * score `j`: `dot(query, key_j) * scale`, by a warp, and [`soft_cap`] of it where `cap` is not 0;
/// * weight `j`: `exp(score_j - largest score)`;
/// * total: lane `j % 32` sums in order, then the tree;
/// * `out = (chain of fma over j of weight_j * value_j) / total`.
#[expect(clippy::too_many_arguments, reason = "the kernel's own parameters")]
#[inline(always)]
pub fn attend(
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    stride: usize,
    offset: usize,
    (scale, cap): (f32, f32),
    weights: &mut Vec<f32>,
    out: &mut [f32],
) {
    let head = offset..offset + query.len();
    weights.clear();
    weights
        .extend(keys.chunks_exact(stride).map(|key| warp_dot(query, &key[head.clone()]) * scale));
    if cap != 0.0 {
        weights.iter_mut().for_each(|score| *score = soft_cap(*score, cap));
    }
    // A NaN score must not be lost: it makes every weight NaN below.
    let largest = weights.iter().fold(f32::NEG_INFINITY, |most, &score| {
        if score > most || score.is_nan() { score } else { most }
    });
    let mut lanes = [0.0f32; WARP_LANES];
    for (index, weight) in weights.iter_mut().enumerate() {
        *weight = exp(*weight - largest);
        lanes[index % WARP_LANES] += *weight;
    }
    let total = warp_sum(lanes);
    out.fill(0.0);
    for (&weight, value) in weights.iter().zip(values.chunks_exact(stride)) {
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
