//! The matrix cores of AMD's CDNA chips, plainly: one block of products and an accumulator.
//!
//! It knows the arithmetic of MMA-Sim's published models (arXiv 2511.10909); how blocks are chained
//! is `schedule.rs`. Nothing of it was seen on a card here.
//!
//! *Exact* (CDNA1): products and accumulator are added exactly, and the sum is rounded once, to nearest.
//!
//! *Pairwise* (CDNA2): subnormal operands and accumulators are zero; products are rounded to f32 and
//! added in pairs, pairs of pairs, and to the accumulator, each sum rounded to nearest, each subnormal
//! result zero of its sign.
//!
//! *Two stages* (CDNA3): products are cut toward zero at F bits below the largest one's exponent, as in a tensor core, but
//! without the accumulator, and added. Their sum is rounded down to F2 + 1 bits below the larger
//! exponent of it and the accumulator, the accumulator to F bits; both are added, rounded down to F2
//! bits below the sum's own exponent, and rounded to nearest.
//!
//! *Even and odd* (CDNA3's FP8): products at even places are cut and added at F bits below the largest of
//! them, those at odd places likewise; both sums are rounded down to F bits below the larger exponent of
//! the two and added. What follows is that of two stages, but an accumulator more than F + 1 places below takes no part.

use super::chip::MatrixCore;
use super::tensor_core::NAN;
use crate::dtype::{Format, Parts};

/// A stretch of a row of K, taken apart and as values.
#[derive(Clone, Copy, Debug)]
pub struct Stretch<'a> {
    /// Elements taken apart.
    pub parts: &'a [Parts],
    /// Their values.
    pub values: &'a [f32],
    /// Their format.
    pub format: Format,
}

/// Chains the blocks of a stretch of K from `c` on.
pub fn chain(core: &MatrixCore, x: Stretch<'_>, w: Stretch<'_>, c: f32) -> f32 {
    let width = x.values.len().min(w.values.len());
    (0..width).step_by(core.products()).fold(c, |c, first| {
        let inner = first..(first + core.products()).min(width);
        let of = |row: Stretch<'_>| (row.values[inner.clone()].to_vec(), row.format);
        match core {
            MatrixCore::Exact { .. } => exact(&x.values[inner.clone()], &w.values[inner], c),
            MatrixCore::Pairwise { .. } => pairwise(of(x), of(w), c),
            MatrixCore::TwoStages { alignment_bits, sum_bits, .. } => {
                let fraction_bits = x.format.fraction_bits() + w.format.fraction_bits();
                let (x, w) = (&x.parts[inner.clone()], &w.parts[inner]);
                two_stages((*alignment_bits, *sum_bits), fraction_bits, false, (x, w), c)
            }
            MatrixCore::EvenOdd { alignment_bits, sum_bits, .. } => {
                let fraction_bits = x.format.fraction_bits() + w.format.fraction_bits();
                let (x, w) = (&x.parts[inner.clone()], &w.parts[inner]);
                two_stages((*alignment_bits, *sum_bits), fraction_bits, true, (x, w), c)
            }
        }
    })
}

/// A sum of products of two values with at most 12 bits each, and of c, rounded once.
fn exact(x: &[f32], w: &[f32], c: f32) -> f32 {
    let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
    let addends: Vec<f64> = products.chain([f64::from(c)]).collect();
    let plain: f64 = addends.iter().sum();
    if !plain.is_finite() {
        return if plain.is_nan() { NAN } else { plain as f32 };
    }
    // Parts that do not overlap and whose sum is exact, the smallest first (Shewchuk).
    let mut parts: Vec<f64> = Vec::new();
    for addend in addends {
        let mut rest = addend;
        let mut kept = Vec::new();
        for part in parts {
            let (large, small) = if rest.abs() < part.abs() { (part, rest) } else { (rest, part) };
            let sum = large + small;
            let lost = small - (sum - large);
            if lost != 0.0 {
                kept.push(lost);
            }
            rest = sum;
        }
        kept.push(rest);
        parts = kept;
    }
    let mut sum = parts.pop().unwrap_or(0.0);
    let mut lost = 0.0;
    while let Some(part) = parts.pop() {
        let larger = sum + part;
        lost = part - (larger - sum);
        sum = larger;
        if lost != 0.0 {
            break;
        }
    }
    // Rounded to odd in f64, which has more than two bits to spare, it may be rounded again.
    if lost != 0.0 {
        let toward = (lost > 0.0) == (sum > 0.0);
        let cut = if toward { sum.to_bits() } else { sum.to_bits() - 1 };
        sum = f64::from_bits(cut | 1);
    }
    sum as f32
}

fn pairwise((x, x_format): (Vec<f32>, Format), (w, w_format): (Vec<f32>, Format), c: f32) -> f32 {
    let operand = |format: Format, value: f32| {
        let least = f32::from_bits(((format.min_exponent() + 127) as u32) << 23);
        if value.abs() < least { 0.0 } else { value }
    };
    let flushed = |value: f32| if value.abs() < f32::MIN_POSITIVE { 0.0 * value } else { value };
    let mut sums: Vec<f32> = x
        .iter()
        .zip(&w)
        .map(|(x, w)| flushed(operand(x_format, *x) * operand(w_format, *w)))
        .collect();
    // Blocks of four or two: a short one is filled up with zeros.
    sums.resize(sums.len().next_power_of_two().max(2), 0.0);
    while sums.len() > 1 {
        sums = sums.chunks(2).map(|pair| flushed(pair[0] + pair[1])).collect();
    }
    let sum = flushed(operand(Format::F32, c) + sums[0]);
    if sum.is_nan() { NAN } else { sum }
}

fn two_stages(
    (alignment_bits, sum_bits): (u32, u32),
    fraction_bits: u32,
    even_odd: bool,
    (x, w): (&[Parts], &[Parts]),
    c: f32,
) -> f32 {
    let (alignment_bits, sum_bits) = (alignment_bits as i32, sum_bits as i32);
    // Those at even places and those at odd ones, where the unit tells them apart.
    let mut products = [Vec::with_capacity(x.len()), Vec::new()];
    let mut special = 0f64;
    for (place, (x, w)) in x.iter().zip(w).enumerate() {
        match (*x, *w) {
            (
                Parts::Finite { significand: x, exponent: x_exponent },
                Parts::Finite { significand: w, exponent: w_exponent },
            ) => {
                let (product, exponent) = (i64::from(x) * i64::from(w), x_exponent + w_exponent);
                let carries = i32::from(product.abs() >= 2 << fraction_bits);
                if product != 0 && exponent + carries >= 128 {
                    special += f64::INFINITY.copysign(product as f64);
                } else if product != 0 {
                    products[if even_odd { place % 2 } else { 0 }].push((product, exponent));
                }
            }
            (x, w) => special += as_f64(x) * as_f64(w),
        }
    }
    if special != 0.0 || special.is_nan() || !c.is_finite() {
        let sum = special + f64::from(c);
        return if sum.is_nan() { NAN } else { sum as f32 };
    }
    let Parts::Finite { significand, exponent: of_c } = Format::F32.parts(c.to_bits()) else {
        return NAN;
    };
    // In units of 2^(of_sum - alignment_bits), each cut toward zero.
    let sums = products.map(|products| {
        let of_sum = products.iter().map(|(_, exponent)| *exponent).max().unwrap_or(-999);
        let cut = |(product, exponent): &(i64, i32)| {
            let by = alignment_bits - fraction_bits as i32 + exponent - of_sum;
            shifted(product.abs(), by) * product.signum()
        };
        (products.iter().map(cut).sum::<i64>(), of_sum)
    });
    let of_dot = sums[0].1.max(sums[1].1);
    let dot: i64 = sums.iter().map(|(sum, of_sum)| shifted(*sum, of_sum - of_dot)).sum();
    let largest = of_dot.max(of_c);
    // In units of 2^(largest - sum_bits - 1), rounded down.
    let dot = shifted(dot, of_dot - alignment_bits - (largest - sum_bits - 1));
    let own = match even_odd && of_c < largest - alignment_bits - 1 {
        true => 0,
        false => shifted(significand.into(), of_c - 23 - (largest - alignment_bits)),
    };
    let total = dot + (own << (sum_bits + 1 - alignment_bits));
    if total == 0 {
        return 0.0;
    }
    let unit = largest - sum_bits - 1;
    let exponent = (unit + total.unsigned_abs().ilog2() as i32).max(-126);
    let down = exponent - sum_bits - unit;
    let rounded = if down > 0 { shifted(total, -down) << down } else { total };
    (rounded as f64 * f64::powi(2.0, unit)) as f32
}

/// `value * 2^by`, rounded down.
fn shifted(value: i64, by: i32) -> i64 {
    match by {
        0.. => value << by.min(40),
        _ => value >> (-by).min(63),
    }
}

fn as_f64(parts: Parts) -> f64 {
    match parts {
        Parts::Finite { significand, .. } => f64::from(significand),
        Parts::Infinite { negative } => {
            if negative {
                f64::NEG_INFINITY
            } else {
                f64::INFINITY
            }
        }
        Parts::Nan => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_sum_is_rounded_once_to_nearest_even() {
        // Ties and near ties of f32, which two roundings would get wrong.
        let one = 1.0f32;
        let half = f32::from_bits((127 - 24) << 23);
        let tiny = f32::from_bits((127 - 60) << 23);
        assert_eq!(exact(&[half], &[one], one), one);
        assert_eq!(exact(&[half, tiny], &[one, one], one), f32::from_bits(one.to_bits() + 1));
        assert_eq!(exact(&[half, -tiny], &[one, one], one), one);
        assert_eq!(exact(&[1e4, -1e4, tiny], &[1e4, 1e4, one], 0.0), tiny);
        assert!(exact(&[f32::INFINITY, f32::NEG_INFINITY], &[one, one], 0.0).is_nan());
    }

    #[test]
    fn subnormal_operands_and_results_of_pairs_are_zero() {
        let f16 = Format::F16;
        let least = f16.decode(1);
        assert_eq!(pairwise((vec![least, 1.0], f16), (vec![1024.0, 2.0], f16), 0.5), 2.5);
        assert_eq!(pairwise((vec![1.0, 1.0], f16), (vec![1.0, 1.0], f16), 1e-40), 2.0);
    }

    #[test]
    fn the_sum_of_two_stages_is_rounded_down_before_it_is_rounded_to_nearest() {
        let format = Format::F16;
        let parts = |values: &[f32]| -> Vec<Parts> {
            values.iter().map(|value| format.parts(format.encode(*value))).collect()
        };
        let sum = |x: &[f32], w: &[f32], c: f32| {
            two_stages((24, 31), 20, false, (&parts(x), &parts(w)), c)
        };
        assert_eq!(sum(&[1.0, 2.0], &[3.0, 0.5], 0.25), 4.25);
        assert_eq!(sum(&[], &[], 3.0), 3.0);
        // A negative accumulator far below the products takes a whole unit off.
        let far = -f32::from_bits((127 - 60) << 23);
        assert_eq!(sum(&[1.0], &[1.0], far), 1.0 - f32::EPSILON / 2.0);
        assert!(sum(&[f32::INFINITY], &[0.0], 0.0).is_nan());
    }
}
