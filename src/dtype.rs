//! Number formats of tensor-core operands and results, and their codecs.
//!
//! It knows bits and rounding only: no tensors, no scales, no chips.
//!
//! A *code* is the raw bit pattern of a value, right-aligned in a `u32`. A tf32
//! code is an f32 bit pattern whose low 13 bits are zero.

use serde::{Deserialize, Serialize};

/// A number format that a GEMM can read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// IEEE binary32.
    F32,
    /// 8-bit exponent, 10-bit fraction, kept in 32 bits.
    Tf32,
    /// 8-bit exponent, 7-bit fraction.
    Bf16,
    /// IEEE binary16.
    F16,
    /// OCP FP8 E4M3 (no infinities, NaN is 0x7f and 0xff, largest finite 448).
    E4m3,
    /// OCP FP8 E5M2 (IEEE-like, largest finite 57344).
    E5m2,
    /// FP8 E4M3 of the kind "finite, no infinity, unsigned zero": exponent bias 8, largest finite 240, NaN is
    /// 0x80 alone, where a negative zero would be (AMD's before MI350).
    E4m3fnuz,
    /// FP8 E5M2 of that kind: exponent bias 16, largest finite 57344.
    E5m2fnuz,
    /// 8-bit integers, two's complement: no fraction, no infinities, no NaN. Conversions saturate.
    Int8,
    /// OCP MX FP6 E2M3 (no infinities, no NaN, largest 7.5): an element of blocks with a scale.
    E2m3,
    /// OCP MX FP6 E3M2 (no infinities, no NaN, largest 28): likewise.
    E3m2,
    /// OCP MX FP4 E2M1 (no infinities, no NaN, largest 6): likewise.
    E2m1,
}

/// A code taken apart: what a tensor core sees of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// The value `significand * 2^(exponent - fraction_bits)`. A subnormal has
    /// the format's smallest exponent and a short significand; zero likewise.
    Finite {
        /// Signed integer significand, the hidden one included.
        significand: i32,
        /// Unbiased exponent of the significand's leading place.
        exponent: i32,
    },
    /// An infinity of the given sign.
    Infinite {
        /// Whether it is minus infinity.
        negative: bool,
    },
    /// Not a number.
    Nan,
}

/// The tf32 bits that are kept of an f32.
const TF32_MASK: u32 = 0xffff_e000;

impl Format {
    /// All formats of single values, widest first; [`Format::ELEMENTS`] are none.
    pub const ALL: [Format; 9] = [
        Format::F32,
        Format::Tf32,
        Format::Bf16,
        Format::F16,
        Format::E4m3,
        Format::E5m2,
        Format::E4m3fnuz,
        Format::E5m2fnuz,
        Format::Int8,
    ];

    /// Those of them that are floats of more than one maker's chips, widest first.
    pub const FLOATS: [Format; 6] =
        [Format::F32, Format::Tf32, Format::Bf16, Format::F16, Format::E4m3, Format::E5m2];

    /// The formats that mean nothing without the scale of their block, widest first.
    pub const ELEMENTS: [Format; 3] = [Format::E2m3, Format::E3m2, Format::E2m1];

    /// The name that manifests and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Tf32 => "tf32",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::E4m3 => "e4m3",
            Format::E5m2 => "e5m2",
            Format::E4m3fnuz => "e4m3fnuz",
            Format::E5m2fnuz => "e5m2fnuz",
            Format::Int8 => "int8",
            Format::E2m3 => "e2m3",
            Format::E3m2 => "e3m2",
            Format::E2m1 => "e2m1",
        }
    }

    /// The number by which kernels know it.
    pub const fn number(self) -> i32 {
        self as i32
    }

    /// Bytes that one code takes in memory; one of 4 or 6 bits has a byte of its own here.
    pub fn bytes(self) -> usize {
        match self {
            Format::F32 | Format::Tf32 => 4,
            Format::Bf16 | Format::F16 => 2,
            Format::E4m3
            | Format::E5m2
            | Format::E4m3fnuz
            | Format::E5m2fnuz
            | Format::Int8
            | Format::E2m3
            | Format::E3m2
            | Format::E2m1 => 1,
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> u32 {
        match self {
            Format::E2m3 | Format::E3m2 => 6,
            Format::E2m1 => 4,
            other => 8 * other.bytes() as u32,
        }
    }

    /// Whether it is one of the two 8-bit floats of the OCP, whose sums may be promoted.
    pub fn is_fp8(self) -> bool {
        matches!(self, Format::E4m3 | Format::E5m2)
    }

    /// Whether it is one of the two 8-bit floats without infinities and negative zero.
    pub fn is_fnuz(self) -> bool {
        matches!(self, Format::E4m3fnuz | Format::E5m2fnuz)
    }

    /// Whether it is one of the formats of 8 bits, the ones that carry a scale.
    pub fn is_scaled(self) -> bool {
        self.is_fp8() || self.is_fnuz() || self == Format::Int8
    }

    /// Stored bits of the fraction. Integers are numbers below the normal range of a format whose
    /// last place is 1: 7 bits at the exponent 7.
    pub fn fraction_bits(self) -> u32 {
        match self {
            Format::Int8 => 7,
            Format::F32 => 23,
            Format::Tf32 | Format::F16 => 10,
            Format::Bf16 => 7,
            Format::E4m3 | Format::E4m3fnuz | Format::E2m3 => 3,
            Format::E5m2 | Format::E5m2fnuz | Format::E3m2 => 2,
            Format::E2m1 => 1,
        }
    }

    /// The exponent of the smallest normal number, which subnormals share.
    pub fn min_exponent(self) -> i32 {
        match self {
            Format::F32 | Format::Tf32 | Format::Bf16 => -126,
            Format::F16 | Format::E5m2 => -14,
            Format::E4m3 => -6,
            Format::E4m3fnuz => -7,
            Format::E5m2fnuz => -15,
            Format::Int8 => 7,
            Format::E3m2 => -2,
            Format::E2m3 | Format::E2m1 => 0,
        }
    }

    /// The largest finite value; of integers the one whose negative is a code too.
    pub fn max_finite(self) -> f32 {
        match self {
            Format::F32 => f32::MAX,
            Format::Tf32 => f32::from_bits(0x7f7f_e000),
            Format::Bf16 => f32::from_bits(0x7f7f_0000),
            Format::F16 => 65504.0,
            Format::E4m3 => 448.0,
            Format::E5m2 | Format::E5m2fnuz => 57344.0,
            Format::E4m3fnuz => 240.0,
            Format::Int8 => 127.0,
            Format::E2m3 => 7.5,
            Format::E3m2 => 28.0,
            Format::E2m1 => 6.0,
        }
    }

    /// The value of a code, exactly. Bits above the format's width are ignored,
    /// as are the low 13 bits of a tf32 code.
    pub fn decode(self, code: u32) -> f32 {
        match self {
            Format::F32 => f32::from_bits(code),
            Format::Tf32 => f32::from_bits(code & TF32_MASK),
            Format::Bf16 => f32::from_bits(code << 16),
            Format::F16 => half::f16::from_bits(code as u16).to_f32(),
            Format::E4m3 => fp8_to_f32(code as u8, 3, 7, false),
            Format::E5m2 => fp8_to_f32(code as u8, 2, 15, true),
            Format::E4m3fnuz => fnuz_to_f32(code as u8, 3, 8),
            Format::E5m2fnuz => fnuz_to_f32(code as u8, 2, 16),
            Format::Int8 => f32::from(code as u8 as i8),
            Format::E2m3 => element_to_f32(code, 3, 1, 5),
            Format::E3m2 => element_to_f32(code, 2, 3, 5),
            Format::E2m1 => element_to_f32(code, 1, 1, 3),
        }
    }

    /// The code nearest to a value, as NVIDIA's conversions round it.
    ///
    /// FP8 is `cvt.rn.satfinite`: nearest, ties to even; whatever is too large,
    /// infinities included, becomes the largest finite value of its sign; NaN
    /// becomes 0x7f. FP6 and FP4 likewise, but for NaN, which becomes the largest value (PTX
    /// ISA, `cvt`), and fnuz, but NaN is 0x80 and what rounds to zero has no sign. Integers are `cvt.rni.sat.s8.f32`: nearest, ties to even, -128 to 127, NaN is 0.
    /// bf16 and f16 are `cvt.rn`: nearest, ties to even, overflow
    /// to infinity, NaN becomes 0x7fff. tf32 is `cvt.rn.tf32` of Hopper and
    /// later: nearest, ties to even, NaN becomes 0x7fffe000; see
    /// [`tf32_ties_away`] for older chips. f32 keeps its bits.
    pub fn encode(self, value: f32) -> u32 {
        match self {
            Format::F32 => value.to_bits(),
            Format::Tf32 => {
                let odd = value.to_bits() >> 13 & 1;
                tf32_from_f32(value, 0xfff + odd)
            }
            Format::Bf16 => u32::from(bf16_from_f32(value)),
            Format::F16 if value.is_nan() => 0x7fff,
            Format::F16 => u32::from(half::f16::from_f32(value).to_bits()),
            Format::E4m3 => u32::from(e4m3_from_f32(value)),
            Format::E5m2 => u32::from(e5m2_from_f32(value)),
            Format::E4m3fnuz => u32::from(e4m3fnuz_from_f32(value)),
            Format::E5m2fnuz => u32::from(e5m2fnuz_from_f32(value)),
            Format::Int8 => u32::from(int8_from_f32(value)),
            Format::E2m3 => u32::from(e2m3_from_f32(value)),
            Format::E3m2 => u32::from(e3m2_from_f32(value)),
            Format::E2m1 => u32::from(e2m1_from_f32(value)),
        }
    }

    /// The value after a trip through the format: `decode(encode(value))`.
    pub fn round(self, value: f32) -> f32 {
        self.decode(self.encode(value))
    }

    /// Takes a code apart into a signed integer significand and an exponent.
    pub fn parts(self, code: u32) -> Parts {
        let value = self.decode(code);
        if value.is_nan() {
            return Parts::Nan;
        }
        if value.is_infinite() {
            return Parts::Infinite { negative: value < 0.0 };
        }
        let bits = value.to_bits();
        let field = (bits >> 23 & 0xff) as i32;
        let fraction = bits & 0x7f_ffff;
        // The f32 of an 8- or 16-bit subnormal is normal: bring its
        // significand back to the format's own smallest exponent.
        let (magnitude, exponent) =
            if field == 0 { (fraction, -126) } else { (fraction | 0x80_0000, field - 127) };
        let raised = exponent.max(self.min_exponent());
        let drop = 23 - self.fraction_bits() as i32 + (raised - exponent);
        let magnitude = if drop > 23 { 0 } else { (magnitude >> drop) as i32 };
        let significand = if value.is_sign_negative() { -magnitude } else { magnitude };
        Parts::Finite { significand, exponent: raised }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no format's.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is no number format; known are f32, tf32, bf16, f16, e4m3, e5m2, e4m3fnuz, e5m2fnuz and int8"
)]
pub struct UnknownFormat(pub String);

impl std::str::FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Format, UnknownFormat> {
        Format::ALL
            .into_iter()
            .find(|format| format.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// The tf32 code nearest to a value, ties away from zero: `cvt.rna.tf32`, the
/// one conversion that Ampere and Ada have (PTX ISA, `cvt`). No hardware vector
/// or capture of this project has shown it at work.
pub fn tf32_ties_away(value: f32) -> u32 {
    tf32_from_f32(value, 0x1000)
}

fn tf32_from_f32(value: f32, increment: u32) -> u32 {
    if value.is_nan() {
        0x7fff_e000
    } else if value.is_infinite() {
        value.to_bits()
    } else {
        // The carry of the largest fraction runs into the exponent, up to infinity.
        (value.to_bits() + increment) & TF32_MASK
    }
}

/// The E4M3 code nearest to a value; see [`Format::encode`]. Free of branches,
/// so that loops over it vectorise.
#[inline(always)]
pub fn e4m3_from_f32(value: f32) -> u8 {
    fp8_from_f32::<3, -6>(value, 448.0, 0x7f, 24)
}

/// The E5M2 code nearest to a value; see [`Format::encode`]. Free of branches,
/// so that loops over it vectorise.
#[inline(always)]
pub fn e5m2_from_f32(value: f32) -> u8 {
    fp8_from_f32::<2, -14>(value, 57344.0, 0x7f, 24)
}

/// The E4M3 code of the kind without infinities and negative zero; see [`Format::encode`].
#[inline(always)]
pub fn e4m3fnuz_from_f32(value: f32) -> u8 {
    without_negative_zero(value, fp8_from_f32::<3, -7>(value, 240.0, 0x80, 24))
}

/// The E5M2 code of that kind; see [`Format::encode`].
#[inline(always)]
pub fn e5m2fnuz_from_f32(value: f32) -> u8 {
    without_negative_zero(value, fp8_from_f32::<2, -15>(value, 57344.0, 0x80, 24))
}

/// The code of negative zero is NaN's.
#[inline(always)]
fn without_negative_zero(value: f32, code: u8) -> u8 {
    if code == 0x80 && !value.is_nan() { 0 } else { code }
}

/// The 8-bit integer nearest to a value, as a byte; see [`Format::encode`]. Free of branches, so that
/// loops over it vectorise.
#[inline(always)]
pub fn int8_from_f32(value: f32) -> u8 {
    // The last place of 1.5 * 2^23 is 1, so the f32 adder rounds to nearest even. A NaN passes both
    // comparisons by, and is 0.
    const ANCHOR: f32 = 12_582_912.0;
    let value = if value > 127.0 { 127.0 } else { value };
    let value = if value < -128.0 { -128.0 } else { value };
    let value = if value.is_nan() { 0.0 } else { value };
    (value + ANCHOR).to_bits() as u8
}

/// The E2M3 code nearest to a value; see [`Format::encode`]. Free of branches.
#[inline(always)]
pub fn e2m3_from_f32(value: f32) -> u8 {
    fp8_from_f32::<3, 0>(value, 7.5, 0x1f, 26)
}

/// The E3M2 code nearest to a value; see [`Format::encode`]. Free of branches.
#[inline(always)]
pub fn e3m2_from_f32(value: f32) -> u8 {
    fp8_from_f32::<2, -2>(value, 28.0, 0x1f, 26)
}

/// The E2M1 code nearest to a value; see [`Format::encode`]. Free of branches.
#[inline(always)]
pub fn e2m1_from_f32(value: f32) -> u8 {
    fp8_from_f32::<1, 0>(value, 6.0, 0x7, 28)
}

/// The bf16 code nearest to a value; see [`Format::encode`]. Free of branches,
/// so that loops over it vectorise.
#[inline(always)]
pub fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    let odd = bits >> 16 & 1;
    let rounded = bits.wrapping_add(0x7fff + odd) >> 16;
    let code = if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { rounded };
    code as u16
}

#[inline(always)]
fn fp8_from_f32<const FRACTION_BITS: u32, const MIN_EXPONENT: i32>(
    value: f32,
    max_finite: f32,
    nan: u32,
    sign_shift: u32,
) -> u8 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let sign = bits >> 31 << (31 - sign_shift);
    // Positive floats order like their bits, and clamping cannot change what
    // rounding would give: all that lies above rounds to the largest value.
    let clamped = magnitude.min(max_finite.to_bits());
    // Normal: add just under half a unit (half if the last kept bit is odd), cut, and rebias.
    let cut = 23 - FRACTION_BITS;
    let odd = clamped >> cut & 1;
    let bias_change = ((MIN_EXPONENT + 126) as u32) << FRACTION_BITS;
    let normal = ((clamped + (1 << (cut - 1)) - 1 + odd) >> cut).wrapping_sub(bias_change);
    // Subnormal: adding a power of two whose last place is the smallest
    // subnormal lets the f32 adder round to nearest even.
    let last_place = MIN_EXPONENT - FRACTION_BITS as i32;
    let anchor = f32::from_bits(((last_place + 23 + 127) as u32) << 23);
    let subnormal = (f32::from_bits(clamped) + anchor).to_bits().wrapping_sub(anchor.to_bits());
    let smallest_normal = ((MIN_EXPONENT + 127) as u32) << 23;
    let finite = if clamped < smallest_normal { subnormal } else { normal };
    let code = if magnitude > 0x7f80_0000 { nan } else { finite | sign };
    code as u8
}

fn fp8_to_f32(code: u8, fraction_bits: u32, bias: i32, has_infinity: bool) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    let magnitude = u32::from(code & 0x7f);
    let top = 0x7f >> fraction_bits << fraction_bits;
    let bits = if has_infinity && magnitude >= top {
        if magnitude == top { 0x7f80_0000 } else { 0x7fff_ffff }
    } else if magnitude == 0x7f {
        0x7fff_ffff
    } else {
        // Both factors are exact and so is their product: subnormals need no case of their own.
        let shifted = f32::from_bits(magnitude << (23 - fraction_bits));
        (shifted * f32::from_bits(((127 - bias + 127) as u32) << 23)).to_bits()
    };
    f32::from_bits(bits | sign)
}

/// The value of a code of the kind without infinities and negative zero.
fn fnuz_to_f32(code: u8, fraction_bits: u32, bias: i32) -> f32 {
    if code == 0x80 { f32::NAN } else { element_to_f32(code.into(), fraction_bits, bias, 7) }
}

/// The value of a code without NaN and infinities, whose sign is bit `sign`.
fn element_to_f32(code: u32, fraction_bits: u32, bias: i32, sign: u32) -> f32 {
    let magnitude = code & ((1 << sign) - 1);
    // As in `fp8_to_f32`.
    let shifted = f32::from_bits(magnitude << (23 - fraction_bits));
    let value = shifted * f32::from_bits(((127 - bias + 127) as u32) << 23);
    f32::from_bits(value.to_bits() | (code >> sign & 1) << 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fp8_code_survives_a_round_trip() {
        for format in [Format::E4m3, Format::E5m2] {
            for code in 0..256 {
                let value = format.decode(code);
                if value.is_nan() {
                    assert_eq!(format.encode(value), 0x7f);
                } else if value.is_finite() {
                    assert_eq!(format.encode(value), code, "{format} {code:#x} {value}");
                }
            }
        }
    }

    #[test]
    fn every_16_bit_code_survives_a_round_trip() {
        for format in [Format::Bf16, Format::F16] {
            for code in 0..=0xffff {
                let value = format.decode(code);
                if !value.is_nan() {
                    assert_eq!(format.encode(value), code, "{format} {code:#x} {value}");
                }
            }
        }
    }

    #[test]
    fn parts_give_back_the_value_exactly() {
        for format in [Format::Bf16, Format::F16, Format::E4m3, Format::E5m2] {
            for code in 0..1u32 << (8 * format.bytes()) {
                let value = f64::from(format.decode(code));
                match format.parts(code) {
                    Parts::Finite { significand, exponent } => {
                        let unit = f64::powi(2.0, exponent - format.fraction_bits() as i32);
                        assert_eq!(f64::from(significand) * unit, value, "{format} {code:#x}");
                        assert!(exponent >= format.min_exponent());
                    }
                    Parts::Infinite { negative } => {
                        assert!(value.is_infinite() && (value < 0.0) == negative);
                    }
                    Parts::Nan => assert!(value.is_nan()),
                }
            }
        }
    }

    #[test]
    fn fp8_rounds_to_nearest_even_for_every_pair_of_neighbours() {
        for format in [Format::E4m3, Format::E5m2] {
            for code in 0..0x7f {
                let (low, high) = (format.decode(code), format.decode(code + 1));
                if !high.is_finite() {
                    break;
                }
                let middle = (low + high) / 2.0;
                let even = code + (code & 1);
                assert_eq!(format.encode(middle), even, "{format} {middle}");
                assert_eq!(format.encode(-middle), even | 0x80);
                assert_eq!(format.encode(f32::from_bits(middle.to_bits() - 1)), code);
                assert_eq!(format.encode(f32::from_bits(middle.to_bits() + 1)), code + 1);
            }
        }
    }

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for high in 0..=0xffffu32 {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(high << 16 | low);
                if !value.is_nan() {
                    assert_eq!(bf16_from_f32(value), half::bf16::from_f32(value).to_bits());
                }
            }
        }
    }

    #[test]
    fn fp8_saturates_and_16_bit_formats_overflow() {
        assert_eq!(Format::E4m3.encode(465.0), 0x7e);
        assert_eq!(Format::E4m3.encode(f32::NEG_INFINITY), 0xfe);
        assert_eq!(Format::E5m2.encode(1e9), 0x7b);
        assert_eq!(Format::E5m2.encode(f32::INFINITY), 0x7b);
        assert_eq!(Format::F16.encode(65520.0), 0x7c00);
        assert_eq!(Format::Bf16.encode(f32::MAX), 0x7f80);
        assert_eq!(Format::E4m3.encode(-0.0), 0x80);
        assert_eq!(Format::E4m3.encode(-f32::NAN), 0x7f);
    }

    #[test]
    fn tf32_rounds_ties_to_even_and_away_on_older_chips() {
        let cases = [
            (0x3f80_1000, 0x3f80_0000, 0x3f80_2000),
            (0xbf80_1000, 0xbf80_0000, 0xbf80_2000),
            (0x3f80_3000, 0x3f80_4000, 0x3f80_4000),
            (0x3f80_0fff, 0x3f80_0000, 0x3f80_0000),
            (0x3f80_1001, 0x3f80_2000, 0x3f80_2000),
            (0x7f7f_ffff, 0x7f80_0000, 0x7f80_0000),
            (0x7f80_0000, 0x7f80_0000, 0x7f80_0000),
        ];
        for (bits, even, away) in cases {
            assert_eq!(Format::Tf32.encode(f32::from_bits(bits)), even, "{bits:#x}");
            assert_eq!(tf32_ties_away(f32::from_bits(bits)), away, "{bits:#x}");
        }
    }

    #[test]
    fn elements_of_blocks_have_the_values_of_the_mx_specification_and_round_to_the_nearest() {
        let of_e2m1: Vec<f32> = (0..8).map(|code| Format::E2m1.decode(code)).collect();
        assert_eq!(of_e2m1, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!((Format::E2m3.decode(1), Format::E2m3.decode(0x1f)), (0.125, 7.5));
        assert_eq!((Format::E3m2.decode(1), Format::E3m2.decode(0x1f)), (0.0625, 28.0));
        for (format, codes) in [(Format::E2m3, 64), (Format::E3m2, 64), (Format::E2m1, 16u32)] {
            let sign = codes / 2;
            for code in 0..sign {
                let value = format.decode(code);
                assert_eq!((format.encode(value), format.encode(-value)), (code, code | sign));
                assert_eq!(format.decode(code | sign), -value);
                let Parts::Finite { significand, exponent } = format.parts(code) else {
                    panic!("{format} {code:#x} is no number");
                };
                let unit = f64::powi(2.0, exponent - format.fraction_bits() as i32);
                assert_eq!(f64::from(significand) * unit, f64::from(value));
                if code + 1 < sign {
                    let middle = (value + format.decode(code + 1)) / 2.0;
                    let even = code + (code & 1);
                    assert_eq!(format.encode(middle), even, "{format} {middle}");
                    assert_eq!(format.encode(f32::from_bits(middle.to_bits() - 1)), code);
                    assert_eq!(format.encode(f32::from_bits(middle.to_bits() + 1)), code + 1);
                }
            }
            assert_eq!(format.encode(f32::INFINITY), sign - 1);
            assert_eq!(format.encode(-1e9), codes - 1);
            assert_eq!(format.encode(f32::NAN), sign - 1);
        }
    }

    #[test]
    fn names_parse_back() {
        for format in Format::ALL {
            assert_eq!(format.name().parse::<Format>().expect("a format's own name"), format);
        }
        assert!("fp7".parse::<Format>().is_err());
    }
}
