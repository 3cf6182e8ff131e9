//! One tensor-core instruction, plainly: the definition that all faster code is
//! held to.
//!
//! It knows a block of products and one accumulator; not how blocks are chained
//! (that is `schedule.rs`) nor how to be fast (that is `simd.rs`).
//!
//! `d = sum_k x[k] * w[k] + c` over one block (arXiv 2511.10909, 2512.07004):
//!
//! 1. Products are exact and not normalised: the exponent of a product is the
//!    sum of its operands' exponents. A zero takes no part.
//! 2. `M` is the largest exponent among the products and `c`.
//! 3. Every addend is shifted to `M` and its magnitude cut to `F` fraction bits.
//! 4. The cut addends are added exactly.
//! 5. The sum's magnitude is cut to `R` fraction bits.
//!
//! Block-scaled operands (MMA-Sim) differ in what an addend is. In groups of one product, a product's
//! exponent is raised by those of the scales of its block, which are powers of two. In larger groups, the products of a
//! group are added exactly, and the sum times the two significands of the scales is one addend, whose
//! exponent is that of the scales alone: it is not normalised, however large or small the sum. A group takes
//! no part where each of its products is zero, or a scale is; a sum that cancels does.
//!
//! Known from the papers and not seen in hardware vectors: NaN comes out as
//! 0x7fffffff; an infinity wins over all finite addends, and opposite
//! infinities, or an infinity times zero, give NaN; `M` is never below -133.
//! Assumed by this project: a sum too large for f32 is an infinity, and an
//! exact zero is +0.

use super::chip::{BlockScaled, TensorCore};
use crate::block_format::ScaleCodec;
use crate::dtype::{Format, Parts};

/// The NaN that a tensor core writes.
pub const NAN: f32 = f32::from_bits(0x7fff_ffff);

/// Adds one block of products to `c`. `fraction_bits` is the fraction of a
/// product: the sum of the operand formats' fraction bits. Blocks shorter than
/// the unit's are as if filled up with zeros.
pub fn multiply_add(
    core: &TensorCore,
    fraction_bits: u32,
    x: &[Parts],
    w: &[Parts],
    c: f32,
) -> f32 {
    let accumulator = Format::F32.parts(c.to_bits());
    let products = x.iter().zip(w).map(|(&x, &w)| product(x, w));
    let addends = || {
        products
            .clone()
            .map(|product| (product, fraction_bits))
            .chain([(accumulator, Format::F32.fraction_bits())])
    };

    let mut largest_exponent = core.exponent_floor;
    let mut positive_infinity = false;
    let mut negative_infinity = false;
    for (addend, _) in addends() {
        match addend {
            Parts::Finite { significand: 0, .. } => {}
            Parts::Finite { exponent, .. } => largest_exponent = largest_exponent.max(exponent),
            Parts::Infinite { negative: true } => negative_infinity = true,
            Parts::Infinite { negative: false } => positive_infinity = true,
            Parts::Nan => return NAN,
        }
    }
    match (positive_infinity, negative_infinity) {
        (true, true) => return NAN,
        (true, false) => return f32::INFINITY,
        (false, true) => return f32::NEG_INFINITY,
        (false, false) => {}
    }

    let sum = addends()
        .map(|(addend, fraction_bits)| {
            aligned(addend, fraction_bits, largest_exponent, core.alignment_bits)
        })
        .sum();
    normalise(sum, largest_exponent - core.alignment_bits as i32, core.result_bits)
}

/// Chains the blocks of a whole stretch of K: the result of one is the
/// accumulator of the next.
pub fn chain(core: &TensorCore, fraction_bits: u32, x: &[Parts], w: &[Parts], c: f32) -> f32 {
    x.chunks(core.products)
        .zip(w.chunks(core.products))
        .fold(c, |c, (x, w)| multiply_add(core, fraction_bits, x, w, c))
}

/// A row of a block-scaled operand, taken apart.
#[derive(Clone, Copy, Debug)]
pub struct ScaledRow<'a> {
    /// Elements along K.
    pub elements: &'a [Parts],
    /// Fraction bits of an element.
    pub fraction_bits: u32,
    /// The codes of the blocks' scales.
    pub scales: &'a [u8],
    /// Their codec.
    pub codec: ScaleCodec,
    /// Elements of a block.
    pub block: usize,
}

impl ScaledRow<'_> {
    /// Whether the scale of an element is a number.
    fn has_scale(&self, index: usize) -> bool {
        self.codec.is_number(self.scales[index / self.block])
    }

    /// The scale of an element taken apart.
    fn scale(&self, index: usize) -> (i32, i32) {
        let code = self.scales[index / self.block];
        self.codec.parts(if self.codec == ScaleCodec::Ue4m3 { code & 0x7f } else { code })
    }
}

/// Chains the blocks of a whole row of K of block-scaled operands, from `c` on.
pub fn chain_scaled(unit: &BlockScaled, x: &ScaledRow<'_>, w: &ScaledRow<'_>, c: f32) -> f32 {
    let width = x.elements.len().min(w.elements.len());
    (0..width).step_by(unit.core.products).fold(c, |c, first| {
        let inner = first..(first + unit.core.products).min(width);
        if inner.clone().any(|index| !x.has_scale(index) || !w.has_scale(index)) {
            return NAN;
        }
        if unit.group == 1 { raised(unit, x, w, inner, c) } else { grouped(unit, x, w, inner, c) }
    })
}

/// One instruction whose addends are products with raised exponents.
fn raised(
    unit: &BlockScaled,
    x: &ScaledRow<'_>,
    w: &ScaledRow<'_>,
    inner: std::ops::Range<usize>,
    c: f32,
) -> f32 {
    let raise = |row: &ScaledRow<'_>, index: usize| match row.elements[index] {
        Parts::Finite { significand, exponent } => {
            Parts::Finite { significand, exponent: exponent + row.scale(index).1 }
        }
        other => other,
    };
    let of_x: Vec<Parts> = inner.clone().map(|index| raise(x, index)).collect();
    let of_w: Vec<Parts> = inner.map(|index| raise(w, index)).collect();
    multiply_add(&unit.core, x.fraction_bits + w.fraction_bits, &of_x, &of_w, c)
}

/// One instruction whose addends are exact sums of a group of products, times their scales.
fn grouped(
    unit: &BlockScaled,
    x: &ScaledRow<'_>,
    w: &ScaledRow<'_>,
    inner: std::ops::Range<usize>,
    c: f32,
) -> f32 {
    let significand = |parts: Parts| match parts {
        // A subnormal has the exponent of the smallest normal number.
        Parts::Finite { significand, exponent } => i64::from(significand) << exponent,
        // These elements have no other codes.
        _ => 0,
    };
    let fraction_bits =
        x.fraction_bits + w.fraction_bits + x.codec.fraction_bits() + w.codec.fraction_bits();
    let mut addends = Vec::new();
    let mut start = inner.start;
    while start < inner.end {
        let group = start..(start + unit.group).min(inner.end);
        let products: Vec<i64> =
            group.map(|at| significand(x.elements[at]) * significand(w.elements[at])).collect();
        let ((x_significand, x_exponent), (w_significand, w_exponent)) =
            (x.scale(start), w.scale(start));
        let scale = i64::from(x_significand) * i64::from(w_significand);
        if scale != 0 && products.iter().any(|product| *product != 0) {
            let sum = products.iter().sum::<i64>() * scale;
            addends.push((sum, x_exponent + w_exponent, fraction_bits));
        }
        start += unit.group;
    }
    match Format::F32.parts(c.to_bits()) {
        Parts::Finite { significand: 0, .. } => {}
        Parts::Finite { significand, exponent } => {
            addends.push((i64::from(significand), exponent, Format::F32.fraction_bits()));
        }
        Parts::Infinite { negative: true } => return f32::NEG_INFINITY,
        Parts::Infinite { negative: false } => return f32::INFINITY,
        Parts::Nan => return NAN,
    }
    let exponents = addends.iter().map(|(_, exponent, _)| *exponent);
    let largest = exponents.fold(unit.core.exponent_floor, i32::max);
    let bits = unit.core.alignment_bits;
    let sum = addends.iter().map(|&(significand, exponent, fraction_bits)| {
        cut_at(significand, exponent, fraction_bits, largest, bits)
    });
    normalise(sum.sum(), largest - bits as i32, unit.core.result_bits)
}

fn product(x: Parts, w: Parts) -> Parts {
    let negative = |parts: Parts| match parts {
        Parts::Finite { significand, .. } => significand < 0,
        Parts::Infinite { negative } => negative,
        Parts::Nan => false,
    };
    let zero = |parts: Parts| matches!(parts, Parts::Finite { significand: 0, .. });
    match (x, w) {
        (
            Parts::Finite { significand: x, exponent: x_exponent },
            Parts::Finite { significand: w, exponent: w_exponent },
        ) => Parts::Finite { significand: x * w, exponent: x_exponent + w_exponent },
        (Parts::Nan, _) | (_, Parts::Nan) => Parts::Nan,
        _ if zero(x) || zero(w) => Parts::Nan,
        _ => Parts::Infinite { negative: negative(x) != negative(w) },
    }
}

/// The addend in units of `2^(largest_exponent - alignment_bits)`, cut toward zero.
fn aligned(addend: Parts, fraction_bits: u32, largest_exponent: i32, alignment_bits: u32) -> i64 {
    let Parts::Finite { significand, exponent } = addend else { return 0 };
    cut_at(significand.into(), exponent, fraction_bits, largest_exponent, alignment_bits)
}

/// `significand * 2^(exponent - fraction_bits)` in units of `2^(largest_exponent - alignment_bits)`.
fn cut_at(
    significand: i64,
    exponent: i32,
    fraction_bits: u32,
    largest_exponent: i32,
    alignment_bits: u32,
) -> i64 {
    let magnitude = significand.abs();
    let shift = alignment_bits as i32 - fraction_bits as i32 - (largest_exponent - exponent);
    let cut = match shift {
        0.. => magnitude << shift.min(40),
        -63..0 => magnitude >> -shift,
        _ => 0,
    };
    if significand < 0 { -cut } else { cut }
}

/// `sum * 2^unit`, its magnitude cut to `result_bits` fraction bits, as f32.
fn normalise(sum: i64, unit: i32, result_bits: u32) -> f32 {
    if sum == 0 {
        return 0.0;
    }
    let magnitude = sum.unsigned_abs();
    let top = magnitude.ilog2() as i32;
    let exponent = unit + top;
    let cut = if exponent > 127 {
        f32::INFINITY
    } else {
        // Below f32's normal range the fraction loses a bit per exponent.
        let f32_bits = 23 - (Format::F32.min_exponent() - exponent).max(0);
        let kept = (result_bits as i32).min(f32_bits);
        if kept < 0 {
            0.0
        } else {
            let drop = (top - kept).max(0);
            // Exact: at most 24 significant bits, above f32's smallest subnormal.
            ((magnitude >> drop << drop) as f64 * f64::powi(2.0, unit)) as f32
        }
    };
    if sum < 0 { -cut } else { cut }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER_FP8: TensorCore = TensorCore {
        products: 32,
        blocks: 1,
        alignment_bits: 13,
        result_bits: 13,
        exponent_floor: -133,
    };
    const HOPPER_HALF: TensorCore = TensorCore {
        products: 16,
        blocks: 1,
        alignment_bits: 25,
        result_bits: 23,
        exponent_floor: -133,
    };

    fn run(core: &TensorCore, format: Format, x: &[f32], w: &[f32], c: f32) -> f32 {
        let parts = |values: &[f32]| -> Vec<Parts> {
            values.iter().map(|&value| format.parts(format.encode(value))).collect()
        };
        chain(core, 2 * format.fraction_bits(), &parts(x), &parts(w), c)
    }

    #[test]
    fn exact_sums_are_exact() {
        assert_eq!(run(&HOPPER_FP8, Format::E4m3, &[1.0, -2.0], &[3.0, 0.5], 0.25), 2.25);
        assert_eq!(run(&HOPPER_HALF, Format::Bf16, &[1.5; 16], &[1.5; 16], -36.0), 0.0);
    }

    #[test]
    fn addends_are_cut_toward_zero_below_f_bits() {
        // 2^-14 is lost beside 1 with F = 13, whatever its sign; 2^-13 is kept.
        let small = 2f32.powi(-7);
        assert_eq!(run(&HOPPER_FP8, Format::E4m3, &[1.0, small], &[1.0, small], 0.0), 1.0);
        assert_eq!(run(&HOPPER_FP8, Format::E4m3, &[1.0, -small], &[1.0, small], 0.0), 1.0);
        assert_eq!(
            run(&HOPPER_FP8, Format::E4m3, &[1.0, -small], &[1.0, 2.0 * small], 0.0),
            1.0 - 2f32.powi(-13)
        );
    }

    #[test]
    fn nan_and_infinity_follow_ieee_and_nan_has_one_pattern() {
        let infinity = f32::INFINITY;
        let bf16 = |x: &[f32], w: &[f32], c| run(&HOPPER_HALF, Format::Bf16, x, w, c);
        assert_eq!(bf16(&[infinity, 1.0], &[-1.0, 5.0], 3.0), f32::NEG_INFINITY);
        assert_eq!(bf16(&[infinity], &[0.0], 3.0).to_bits(), NAN.to_bits());
        assert_eq!(bf16(&[infinity], &[1.0], -infinity).to_bits(), NAN.to_bits());
        assert_eq!(bf16(&[f32::NAN], &[0.0], 0.0).to_bits(), NAN.to_bits());
        assert_eq!(bf16(&[1e38; 16], &[1e3; 16], 0.0), infinity);
    }

    #[test]
    fn the_floor_cuts_what_lies_far_below_f32() {
        // 2^-140 * 2^-19 is 2^-159: with M held at -133 and F = 25 it is cut to nothing.
        let tiny = f32::from_bits(1 << 21);
        assert!(tiny > 0.0);
        assert_eq!(run(&HOPPER_HALF, Format::Bf16, &[tiny], &[2f32.powi(-40)], 0.0), 0.0);
        // A subnormal result is cut toward zero to f32's grid.
        let x = 1.5 * 2f32.powi(-100);
        let w = 1.5 * 2f32.powi(-48);
        assert_eq!(run(&HOPPER_HALF, Format::Bf16, &[x], &[w], 0.0), f32::from_bits(4));
    }
}
