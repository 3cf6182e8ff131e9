//! The exponential of many f64 at once, with the bits of `libm::exp`.
//!
//! The reference is defined by `libm::exp`, whose branches keep a loop over it from being
//! vectorised. The same operations stand here in the same order, each result chosen instead of
//! branched to. Formula: FreeBSD's `e_exp.c`, which `libm` follows: `x = k ln 2 + r`, and a rational
//! function of `r` times `2^k`.

use crate::vector::{Kernel, dispatch};

const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
const INVERSE_LN2: f64 = f64::from_bits(0x3ff7_1547_652b_82fe);
const P: [f64; 5] = [
    f64::from_bits(0x3fc5_5555_5555_553e),
    f64::from_bits(0xbf66_c16c_16be_bd93),
    f64::from_bits(0x3f11_566a_af25_de2c),
    f64::from_bits(0xbebb_bd41_c5d2_6bf1),
    f64::from_bits(0x3e66_3769_72be_a4d0),
];
/// Where `libm` compares high words of `|x|`: beyond the first, `k` is not 0; from the second on it
/// is rounded; up to the third `1 + x` is the result.
const HALF_LN2: u32 = 0x3fd6_2e42;
const THREE_HALVES_LN2: u32 = 0x3ff0_a2b2;
const TINY: u32 = 0x3e30_0000;
/// From here on results are subnormal, infinite or zero, and `libm` itself is asked.
const LARGE: u32 = 0x4086_2000;

/// Puts `e^x` in the place of each `x`.
pub fn exponentials(values: &mut [f64]) {
    dispatch(Exponentials(values));
}

struct Exponentials<'a>(&'a mut [f64]);

impl Kernel for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for stretch in self.0.chunks_mut(64) {
            let mut given = [0.0f64; 64];
            given[..stretch.len()].copy_from_slice(stretch);
            let mut large = 0u64;
            for x in stretch.iter_mut() {
                let high = (x.to_bits() >> 32) as u32 & 0x7fff_ffff;
                large |= u64::from(high >= LARGE);
                *x = moderate(*x, high);
            }
            if large != 0 {
                for (y, x) in stretch.iter_mut().zip(given) {
                    if (x.to_bits() >> 32) as u32 & 0x7fff_ffff >= LARGE {
                        *y = libm::exp(x);
                    }
                }
            }
        }
    }
}

/// `e^x` of an `x` with that high word of `|x|`, below [`LARGE`].
#[inline(always)]
fn moderate(x: f64, high: u32) -> f64 {
    let half = 0.5f64.copysign(x);
    let rounded = (INVERSE_LN2 * x + half).trunc();
    let one = 1.0f64.copysign(x);
    let k = if high >= THREE_HALVES_LN2 { rounded } else { one };
    let k = if high > HALF_LN2 { k } else { 0.0 };
    let (upper, lower) = (x - k * LN2_HIGH, k * LN2_LOW);
    let r = upper - lower;
    let square = r * r;
    let c =
        r - square * (P[0] + square * (P[1] + square * (P[2] + square * (P[3] + square * P[4]))));
    let y = 1.0 + (r * c / (2.0 - c) - lower + upper);
    // 2^k: its exponent is counted in the low bits of a number near 2^52.
    const COUNTED: f64 = 6_755_399_441_055_744.0;
    let power = (k + COUNTED + 1023.0).to_bits() << 52;
    let scaled = y * f64::from_bits(power);
    if high <= TINY { 1.0 + x } else { scaled }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn check(values: &[f64]) {
        let mut made = values.to_vec();
        exponentials(&mut made);
        for (x, y) in values.iter().zip(made) {
            let expected = libm::exp(*x);
            let same = y.to_bits() == expected.to_bits() || y.is_nan() && expected.is_nan();
            assert!(same, "e^{x:e} is {y:e}, and libm gives {expected:e}");
        }
    }

    #[test]
    fn exponentials_have_the_bits_of_libm() {
        let mut random = Random::at(20_261_129);
        // Any bits, and the ranges that scores and gates have.
        let any: Vec<f64> = (0..200_000).map(|_| f64::from_bits(random.bits())).collect();
        check(&any);
        for width in [1e-9, 1e-8, 1e-3, 0.5, 2.0, 40.0, 720.0, 760.0] {
            let of =
                |random: &mut Random| (random.bits() as f64 / u64::MAX as f64 - 0.5) * 2.0 * width;
            let values: Vec<f64> = (0..200_000).map(|_| of(&mut random)).collect();
            check(&values);
        }
    }

    #[test]
    fn the_edges_of_the_reduction_have_the_bits_of_libm() {
        let mut values =
            vec![0.0, -0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE];
        for word in [TINY, HALF_LN2, THREE_HALVES_LN2, LARGE, 0x4086_232b, 0x4086_2e42, 0x4087_4910]
        {
            for high in word - 2..=word + 2 {
                for low in [0, 1, 0x7fff_ffff, u32::MAX] {
                    let x = f64::from_bits(u64::from(high) << 32 | u64::from(low));
                    values.extend([x, -x]);
                }
            }
        }
        for k in -1100..1100 {
            let edge = f64::from(k) * 0.5 * std::f64::consts::LN_2;
            values.extend([
                edge,
                f64::from_bits(edge.to_bits() + 1),
                f64::from_bits(edge.to_bits().wrapping_sub(1)),
            ]);
        }
        check(&values);
    }
}
