//! CUDA 13's math functions in f32, to the bit, as the compiler inlines them
//! without fast math; those with the suffix `_fast` are the intrinsics (`__expf`).
//!
//! It knows one number at a time. Each is a sequence of IEEE operations, where
//! `mul_add` is one fused operation, and of the special function unit's.
//!
//! Source: the PTX that NVRTC 13.0 makes of one call for compute_90; the constants
//! are those of NVIDIA's libdevice. Evidence: digests of PyTorch's
//! functions over 2^27 of all 2^32 inputs (of pairs drawn from a hash for `pow`), in 32
//! blocks, agree with an H100 (`tests/it/engine_kernels.rs`, `RUNNER_DIGEST_BLOCKS=32`);
//! the intrinsics agree with samples.

use super::sfu;

/// An f32 by its bits, as PTX writes constants.
const fn bits(bits: u32) -> f32 {
    f32::from_bits(bits)
}

/// Horner's rule with fused operations, from the highest coefficient down.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [u32; N]) -> f32 {
    let mut value = bits(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        value = value.mul_add(x, bits(coefficient));
    }
    value
}

/// `expf`.
#[inline]
pub fn exp(x: f32) -> f32 {
    let saturated = x.mul_add(bits(0x3bbb_989d), 0.5);
    // A NaN saturates to 0.
    let saturated = if saturated > 0.0 { saturated.min(1.0) } else { 0.0 };
    // Rounded down at unit spacing; exact in f64 before that.
    let shifted = (f64::from(saturated) * 252.0 + 12_582_913.0).floor() as f32;
    let whole = shifted - 12_583_039.0;
    let rest = x.mul_add(bits(0x3fb8_aa3b), -whole);
    let rest = x.mul_add(bits(0x32a5_7060), rest);
    sfu::ex2_ftz(rest) * f32::from_bits(shifted.to_bits() << 23)
}

/// `__expf`: `ex2(x * log2 e)`.
#[inline]
pub fn exp_fast(x: f32) -> f32 {
    sfu::ex2(x * bits(0x3fb8_aa3b))
}

/// `exp2f`, with and without fast math but for the range below normal numbers.
#[inline]
pub fn exp2(x: f32) -> f32 {
    sfu::ex2(x)
}

/// `__logf`: `lg2(x) * ln 2`.
#[inline]
pub fn log_fast(x: f32) -> f32 {
    sfu::lg2(x) * bits(0x3f31_7218)
}

/// Mantissa minus one, and exponent: `x = (1 + m) 2^e` with the mantissa around
/// one as `pivot` cuts it.
#[inline(always)]
fn logarithm_parts(x: f32, scale: f32, offset: f32, pivot: u32) -> (f32, f32, f32) {
    let small = x < f32::MIN_POSITIVE;
    let scaled = if small { x * scale } else { x };
    let exponent = scaled.to_bits().wrapping_sub(pivot) & 0xff80_0000;
    let mantissa = f32::from_bits(scaled.to_bits().wrapping_sub(exponent));
    let offset = if small { offset } else { 0.0 };
    (scaled, mantissa, (exponent as i32 as f32).mul_add(bits(0x3400_0000), offset))
}

/// What logarithms are of zeros, negative numbers, infinities and NaNs.
#[inline(always)]
fn logarithm_ends(scaled: f32, value: f32) -> f32 {
    if scaled == 0.0 {
        f32::NEG_INFINITY
    } else if scaled.to_bits() < 0x7f80_0000 {
        value
    } else {
        scaled.mul_add(f32::INFINITY, f32::INFINITY)
    }
}

/// `logf`.
#[inline]
pub fn log(x: f32) -> f32 {
    let (scaled, mantissa, exponent) = logarithm_parts(x, 8_388_608.0, -23.0, 0x3f2a_aaab);
    let f = mantissa - 1.0;
    let p = polynomial(
        f,
        [
            0xbe05_5027,
            0x3e10_39f6,
            0xbdf8_cdcc,
            0x3e0f_2955,
            0xbe2a_d8b9,
            0x3e4c_ed0b,
            0xbe7f_ff22,
            0x3eaa_aa78,
            0xbf00_0000,
        ],
    );
    let value = exponent.mul_add(bits(0x3f31_7218), (f * p).mul_add(f, f));
    logarithm_ends(scaled, value)
}

/// `log2f`.
#[inline]
pub fn log2(x: f32) -> f32 {
    let (scaled, mantissa, exponent) = logarithm_parts(x, 8_388_608.0, -23.0, 0x3f35_04f3);
    let f = mantissa - 1.0;
    let p = polynomial(
        f,
        [
            0x3dc6_b27f,
            0xbe2c_7f30,
            0x3e2f_cf2a,
            0xbe37_4e43,
            0x3e52_0bf4,
            0xbe76_3c8b,
            0x3e93_bf99,
            0xbeb8_aa49,
            0x3ef6_384a,
            0xbf38_aa3b,
        ],
    );
    let value = exponent + f.mul_add(bits(0x3fb8_aa3b), f * (f * p));
    logarithm_ends(scaled, value)
}

/// The digits of 2/pi, the lowest first.
const TWO_OVER_PI: [u32; 6] =
    [0x3c43_9041, 0xdb62_9599, 0xf534_ddc0, 0xfc27_57d1, 0x4e44_1529, 0xa2f9_836e];

/// Quarter turns, and the rest of the angle in radians: Cody and Waite's
/// subtraction in three parts, and from 105615 on Payne and Hanek's product with
/// the digits of 2/pi.
#[inline]
fn quarter_turns(x: f32) -> (i32, f32) {
    let magnitude = x.abs();
    if magnitude < 105_615.0 {
        // An integer in between: of -0 it is 0.
        let quarters = (x * bits(0x3f22_f983)).round_ties_even() as i32 as f32;
        let rest = quarters.mul_add(bits(0xbfc9_0fda), x);
        let rest = quarters.mul_add(bits(0xb3a2_2168), rest);
        return (quarters as i32, quarters.mul_add(bits(0xa7c2_34c5), rest));
    }
    if !magnitude.is_finite() {
        return (0, x * 0.0);
    }
    let word = x.to_bits();
    let exponent = (word >> 23 & 0xff) - 128;
    let significand = u64::from(word << 8 | 0x8000_0000);
    let mut product = [0u32; 7];
    let mut carry = 0;
    for (digit, place) in TWO_OVER_PI.iter().zip(&mut product) {
        let sum = u64::from(*digit) * significand + carry;
        *place = sum as u32;
        carry = sum >> 32;
    }
    product[6] = carry as u32;
    let top = 6 - (exponent >> 5) as usize;
    let (mut high, mut low) = (product[top], product[top - 1]);
    let shift = exponent & 31;
    if shift != 0 {
        high = high << shift | low >> (32 - shift);
        low = low << shift | product[top - 2] >> (32 - shift);
    }
    let fraction = high << 2 | low >> 30;
    let up = fraction >> 31;
    let quarters = ((high >> 30) + up) as i32;
    let negative = x.is_sign_negative();
    let flip = if up != 0 { u32::MAX } else { 0 };
    let fixed = u64::from(fraction ^ flip) << 32 | u64::from((low << 2) ^ flip);
    // pi/2 times 2^-64.
    let rest = (fixed as i64 as f64 * f64::from_bits(0x3bf9_21fb_5444_2d19)) as f32;
    let rest = if negative != (up != 0) { -rest } else { rest };
    (if negative { -quarters } else { quarters }, rest)
}

#[inline(always)]
fn sine_or_cosine(quarters: i32, rest: f32) -> f32 {
    let square = rest * rest;
    let (p, first) = if quarters & 1 != 0 {
        (polynomial(square, [0x37cb_ac00, 0xbab6_07ed, 0x3d2a_aabb, 0xbeff_ffff]), 1.0)
    } else {
        (polynomial(square, [0xb94d_4153, 0x3c08_85e4, 0xbe2a_aaa8]), rest)
    };
    let value = p.mul_add(square.mul_add(first, 0.0), first);
    if quarters & 2 != 0 { value.mul_add(-1.0, 0.0) } else { value }
}

/// `sinf`.
#[inline]
pub fn sin(x: f32) -> f32 {
    let (quarters, rest) = quarter_turns(x);
    sine_or_cosine(quarters, rest)
}

/// `cosf`.
#[inline]
pub fn cos(x: f32) -> f32 {
    let (quarters, rest) = quarter_turns(x);
    sine_or_cosine(quarters.wrapping_add(1), rest)
}

/// `tanhf`.
#[inline]
pub fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    if magnitude >= bits(0x3f19_999a) {
        let power = sfu::ex2_ftz(magnitude * bits(0x4038_aa3b)) + 1.0;
        let value = sfu::rcp_ftz(power).mul_add(-2.0, 1.0);
        let value = if magnitude >= bits(0x4110_2cb4) { 1.0 } else { value };
        value.copysign(x)
    } else {
        let square = x * x;
        let p = polynomial(square, [0x3c80_f082, 0xbd56_3cae, 0x3e08_5941, 0xbeaa_a9ed, 0]);
        p.mul_add(x, x)
    }
}

/// `erff`.
#[inline]
pub fn erf(x: f32) -> f32 {
    let magnitude = x.abs();
    if magnitude >= bits(0x3f80_60fe) {
        let p = polynomial(
            magnitude,
            [
                0x38eb_4c3a,
                0xbaae_005b,
                0x3c09_919f,
                0xbd24_d99a,
                0x3e23_5519,
                0x3f69_b4f9,
                0x3f21_0a14,
            ],
        );
        (1.0 - sfu::ex2_ftz(p.mul_add(-magnitude, -magnitude))).copysign(x)
    } else {
        let p = polynomial(
            x * x,
            [
                0x38b1_e96a,
                0xba57_4d20,
                0x3baa_d5ea,
                0xbcdc_1be7,
                0x3de7_18af,
                0xbec0_93ac,
                0x3e03_75d3,
            ],
        );
        p.mul_add(x, x)
    }
}

/// `powf`.
#[inline]
pub fn pow(x: f32, y: f32) -> f32 {
    if x == 1.0 || y == 0.0 {
        return 1.0;
    }
    if x.is_nan() || y.is_nan() {
        return x + y;
    }
    let odd = (y - 2.0 * (y * 0.5).trunc()).abs() == 1.0;
    if x == 0.0 || x.is_infinite() {
        let doubled = (x + x).to_bits();
        let value = if y < 0.0 { doubled ^ 0x7f80_0000 } else { doubled };
        return f32::from_bits(if odd { value } else { value & 0x7fff_ffff });
    }
    if x == -1.0 && y.is_infinite() {
        return 1.0;
    }
    let value = positive_power(x.abs(), y);
    if x >= 0.0 {
        value
    } else if y.floor() != y {
        bits(0x7fff_ffff)
    } else if odd {
        -value
    } else {
        value
    }
}

/// `x^y` for positive finite x: the logarithm to base 2 in two floats, times y,
/// to the power of 2.
#[inline(always)]
fn positive_power(x: f32, y: f32) -> f32 {
    let (_, mantissa, exponent) = logarithm_parts(x, 16_777_216.0, -24.0, 0x3f35_04f3);
    let (minus, plus) = (mantissa - 1.0, mantissa + 1.0);
    let inverse = sfu::rcp_ftz(plus);
    let u = (minus + minus) * inverse;
    let square = u * u;
    let error = minus - u;
    let error = inverse * (-u).mul_add(minus, error + error);
    let p = polynomial(square, [0x3a2c_32e4, 0x3b52_e7db, 0x3c93_bb73, 0x3df6_384f]) * square;
    let log2_e = bits(0x3fb8_aa3b);
    let high = u.mul_add(log2_e, exponent);
    let low = u.mul_add(log2_e, exponent - high);
    let low = error.mul_add(log2_e, low);
    let low = u.mul_add(bits(0x32a5_5e34), low);
    let low = (p * 3.0).mul_add(error, low);
    let low = p.mul_add(u, low);
    let sum = high + low;
    let low = low - (sum - high);

    let product = sum * y;
    let product_low = low.mul_add(y, sum.mul_add(y, -product));
    let whole = product.round_ties_even();
    let rest = product_low + (product - whole);
    let p = polynomial(
        rest,
        [0x391f_cb8e, 0x3aaf_85ed, 0x3c1d_9856, 0x3d63_57bb, 0x3e75_fdec, 0x3f31_7218, 0x3f80_0000],
    );
    if product.abs() > 152.0 {
        return if product < 0.0 { 0.0 } else { f32::INFINITY };
    }
    // 2^whole in two factors, one of them 2^127 or 2^-127.
    let shift: u32 = if whole > 0.0 { 0 } else { 0x8300_0000 };
    let first = f32::from_bits(shift.wrapping_add(0x7f00_0000));
    let second = f32::from_bits(((whole as i32) << 23).wrapping_sub(shift as i32) as u32);
    p * first * second
}

/// `1 / (1 + expf(-x))`, a sigmoid with IEEE division.
#[inline]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
