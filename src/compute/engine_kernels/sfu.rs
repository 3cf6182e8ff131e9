//! NVIDIA's special function unit (MUFU) of Hopper, to the bit: `ex2`, `lg2`,
//! `rcp`, `rsqrt`, `sqrt`, `sin` and `cos` as PTX's `.approx` instructions compute
//! them, with and without `.ftz`.
//!
//! It knows one number at a time: not which math function or kernel asks.
//!
//! The arithmetic is that of 2005's quadratic interpolator (Oberman and Siu,
//! ARITH-17), unchanged since the G80, whose tables the envytools project
//! published (`nvhw/sfu.c`): the top bits of the mantissa choose a row, and
//! `value + slope * x + curvature * square(x)` is evaluated in integers and cut
//! once. `square` is a multiplier whose low partial products were left out. The
//! rows here were fitted to captures of an H200 and an H100 alone, and each is the
//! only one that its interval allows; they turned out to be the G80's.
//!
//! Evidence: 0 of 2^23 mantissas (`ex2`, `rcp`) and 0 of 2^24 (`rsqrt`, `sqrt`)
//! differ from an H200; digests over 2^27 of all 2^32 inputs of each function, in 32
//! blocks, agree with an H100 (`tests/it/engine_kernels.rs`, `RUNNER_DIGEST_BLOCKS=32`).
//! Not here: `tanh.approx`.

use super::sfu_rows::{EX2, LG2, RCP, RSQRT, Row, SIN, SQRT};

const FRACTION: i64 = 0x7f_ffff;
const ONE: i64 = 0x80_0000;
/// The NaN that the unit writes.
const NAN: f32 = f32::from_bits(0x7fff_ffff);

/// A float taken apart.
#[derive(Clone, Copy)]
struct Parts {
    negative: bool,
    exponent: i64,
    fraction: i64,
}

#[inline(always)]
fn parts(x: f32) -> Parts {
    let bits = x.to_bits();
    Parts {
        negative: bits >> 31 != 0,
        exponent: i64::from(bits >> 23 & 0xff),
        fraction: i64::from(bits & 0x7f_ffff),
    }
}

#[inline(always)]
fn float(negative: bool, exponent: i64, fraction: i64) -> f32 {
    f32::from_bits(u32::from(negative) << 31 | (exponent as u32) << 23 | fraction as u32)
}

#[inline(always)]
fn signed(negative: bool, magnitude: f32) -> f32 {
    if negative { -magnitude } else { magnitude }
}

/// The square of a fraction of 17 bits, in units of 2^-19 of the full square: bit
/// `i` adds only what of `x << i` lies above the columns that were left out.
#[inline(always)]
fn square(x: i64) -> i64 {
    let mut sum = 0;
    let mut bit = 0;
    while bit < 17 {
        // All ones where the bit is set.
        let mask = -(x >> bit & 1);
        sum += (x >> (18 - bit)) & mask;
        bit += 1;
    }
    sum >> 1
}

/// `value << VALUE + slope * x + (curvature << CURVATURE) * square + BIAS`.
#[inline(always)]
fn interpolate<const VALUE: u32, const CURVATURE: u32, const BIAS: i64>(
    row: &Row,
    x: i64,
    square: i64,
) -> i64 {
    let [value, slope, curvature] = row.map(i64::from);
    (value << VALUE) + slope * x + ((curvature * square) << CURVATURE) + BIAS
}

/// `ex2.approx.ftz.f32`: 2^x; below 2^-126 the result is 0.
#[inline]
pub fn ex2_ftz(x: f32) -> f32 {
    let Parts { negative, exponent, fraction } = parts(x);
    if exponent == 255 && fraction != 0 {
        return NAN;
    }
    if exponent >= 127 + 7 {
        return if negative { 0.0 } else { f32::INFINITY };
    }
    // The argument in units of 2^-23, cut; what is no negative whole number is
    // complemented, not negated.
    let shift = exponent - 127;
    let magnitude = match shift {
        _ if exponent == 0 => 0,
        0.. => (fraction | ONE) << shift,
        _ => (fraction | ONE) >> (-shift).min(63),
    };
    let fixed = match negative {
        false => magnitude,
        true if magnitude & FRACTION == 0 => -magnitude,
        true => !magnitude,
    };
    let x = fixed & 0x1_ffff;
    let row = &EX2[(fixed >> 17 & 0x3f) as usize];
    let significand = interpolate::<13, 0, 0x77e2>(row, x, square(x)) >> 15;
    // A significand of 2.0 carries into the exponent.
    let bits = ((127 + (fixed >> 23)) << 23) + (significand - ONE);
    match bits >> 23 {
        ..=0 => 0.0,
        255.. => f32::INFINITY,
        _ => f32::from_bits(bits as u32),
    }
}

/// `ex2.approx.f32`: below -126 the compiler halves the argument and squares the
/// result, so that results below the normal range survive.
#[inline]
pub fn ex2(x: f32) -> f32 {
    if x < -126.0 {
        let root = ex2_ftz(x * 0.5);
        root * root
    } else {
        ex2_ftz(x)
    }
}

/// `rcp.approx.ftz.f32`: 1/x; inputs and results below the normal range count as 0.
#[inline]
pub fn rcp_ftz(x: f32) -> f32 {
    let Parts { negative, exponent, fraction } = parts(x);
    match exponent {
        0 => return signed(negative, f32::INFINITY),
        255 if fraction != 0 => return NAN,
        255 => return signed(negative, 0.0),
        _ => {}
    }
    let x = fraction & 0xffff;
    let row = &RCP[(fraction >> 16) as usize];
    let significand = interpolate::<13, 0, 0x47e7>(row, x, square(x << 1)) >> 15;
    let bits = ((253 - exponent) << 23) + (significand - ONE);
    if bits >> 23 <= 0 {
        signed(negative, 0.0)
    } else {
        signed(negative, f32::from_bits(bits as u32))
    }
}

/// `rcp.approx.f32`: the compiler scales inputs and results below the normal range.
#[inline]
pub fn rcp(x: f32) -> f32 {
    let magnitude = x.abs();
    if magnitude < f32::MIN_POSITIVE {
        rcp_ftz(x * 16_777_216.0) * 16_777_216.0
    } else if magnitude > f32::from_bits(0x7e80_0000) {
        rcp_ftz(x * 0.25) * 0.25
    } else {
        rcp_ftz(x)
    }
}

/// The mantissa of a number with its exponent's lowest bit above it, and half the
/// exponent: the argument of a root in [1, 4).
#[inline(always)]
fn root_argument(exponent: i64, fraction: i64) -> (usize, i64, i64) {
    let exponent = exponent - 127;
    let argument = fraction | (exponent & 1) << 23;
    ((argument >> 17) as usize, argument & 0x1_ffff, exponent >> 1)
}

/// `rsqrt.approx.ftz.f32`: 1/sqrt(x).
#[inline]
pub fn rsqrt_ftz(x: f32) -> f32 {
    let Parts { negative, exponent, fraction } = parts(x);
    match (exponent, negative) {
        (0, _) => return signed(negative, f32::INFINITY),
        (255, _) if fraction != 0 => return NAN,
        (_, true) => return NAN,
        (255, _) => return 0.0,
        _ => {}
    }
    let (row, x, half) = root_argument(exponent, fraction);
    if row == 0 && x == 0 {
        return float(false, 127 - half, 0);
    }
    let significand = interpolate::<14, 2, 0x7fff>(&RSQRT[row], x, square(x)) >> 16;
    f32::from_bits((((126 - half) << 23) + (significand - ONE)) as u32)
}

/// `rsqrt.approx.f32`: the compiler scales inputs below the normal range.
#[inline]
pub fn rsqrt(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { rsqrt_ftz(x * 16_777_216.0) * 4096.0 } else { rsqrt_ftz(x) }
}

/// `sqrt.approx.ftz.f32`: the square root, within an ULP.
#[inline]
pub fn sqrt_ftz(x: f32) -> f32 {
    let Parts { negative, exponent, fraction } = parts(x);
    match (exponent, negative) {
        (0, _) => return signed(negative, 0.0),
        (255, _) if fraction != 0 => return NAN,
        (_, true) => return NAN,
        (255, _) => return f32::INFINITY,
        _ => {}
    }
    let (row, x, half) = root_argument(exponent, fraction);
    let significand = interpolate::<15, 1, 0x7fff>(&SQRT[row], x, square(x)) >> 17;
    f32::from_bits((((127 + half) << 23) + (significand - ONE)) as u32)
}

/// `sqrt.approx.f32`: the compiler scales inputs below the normal range.
#[inline]
pub fn sqrt(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE {
        sqrt_ftz(x * 16_777_216.0) * f32::from_bits(0x3980_0000)
    } else {
        sqrt_ftz(x)
    }
}

/// A fixed-point magnitude in units of `2^-point` as a float, cut toward zero.
#[inline(always)]
fn cut_to_float(negative: bool, magnitude: i64, point: i64) -> f32 {
    if magnitude == 0 {
        return signed(negative, 0.0);
    }
    let top = i64::from(magnitude.ilog2());
    let significand = if top > 23 { magnitude >> (top - 23) } else { magnitude << (23 - top) };
    float(negative, top - point + 127, significand - ONE)
}

/// `lg2.approx.ftz.f32`: the logarithm to base 2.
#[inline]
pub fn lg2_ftz(x: f32) -> f32 {
    let Parts { negative, exponent, fraction } = parts(x);
    match (exponent, negative) {
        (0, _) => return f32::NEG_INFINITY,
        (255, _) if fraction != 0 => return NAN,
        (_, true) => return NAN,
        (255, _) => return f32::INFINITY,
        _ => {}
    }
    let (row, x) = ((fraction >> 17) as usize, fraction & 0x1_ffff);
    let fixed = if fraction == 0 && exponent == 127 {
        0
    } else {
        interpolate::<12, 1, 0x3345>(&LG2[row], x, square(x)) >> 2
    };
    let sum = fixed + ((exponent - 127) << 36);
    if sum < 0 { cut_to_float(true, !sum, 36) } else { cut_to_float(false, sum, 36) }
}

/// `lg2.approx.f32`: the compiler scales inputs below the normal range.
#[inline]
pub fn lg2(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { lg2_ftz(x * 16_777_216.0) - 24.0 } else { lg2_ftz(x) }
}

/// `x / (2 pi)` rounded toward zero: what the compiler puts before sine and cosine.
#[inline(always)]
fn turns(x: f32) -> f32 {
    // Exact: two significands of 24 bits.
    let exact = f64::from(x) * f64::from(f32::from_bits(0x3e22_f983));
    let nearest = exact as f32;
    if f64::from(nearest).abs() > exact.abs() {
        f32::from_bits(nearest.to_bits() - 1)
    } else {
        nearest
    }
}

/// Sine, or with `quarters` 1 cosine, of an angle in turns.
#[inline(always)]
fn wave(turns: f32, quarters: i64) -> f32 {
    let Parts { negative, exponent, fraction } = parts(turns);
    if exponent == 255 {
        return NAN;
    }
    // The angle in units of 2^-25 turns, cut; whole turns fall away.
    let significand = if exponent == 0 { 0 } else { fraction | ONE };
    let shift = exponent - 127 + 2;
    let fixed = match shift {
        25.. => 0,
        0..25 => significand << shift,
        _ => significand >> (-shift).min(63),
    };
    let quarter = (fixed >> 23) + quarters;
    let within = if quarter & 1 == 1 { !fixed & FRACTION } else { fixed & FRACTION };
    let x = within & 0x1_ffff;
    let value = interpolate::<11, 0, 0>(&SIN[(within >> 17) as usize], x, square(x));
    let flip = quarter & 2 != 0;
    let negative = if quarters == 0 { negative != flip } else { flip };
    cut_to_float(negative, value, 37)
}

/// `sin.approx.ftz.f32`.
#[inline]
pub fn sin_ftz(x: f32) -> f32 {
    wave(turns(flush(x)), 0)
}

/// `cos.approx.ftz.f32`.
#[inline]
pub fn cos_ftz(x: f32) -> f32 {
    wave(turns(flush(x)), 1)
}

/// Zero with the sign of what is below the normal range.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { signed(x.is_sign_negative(), 0.0) } else { x }
}
