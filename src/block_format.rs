//! Block-scaled formats as data: elements of few bits, and a scale for each block of them along K.
//!
//! It knows which element, block and scale a format has, the scales' codecs, and how values become
//! codes of both; no tensors of models, no chips.
//!
//! Sources: OCP Microscaling Formats specification 1.0 (MXFP8, MXFP6, MXFP4: blocks of 32, scales that
//! are powers of two, the largest of which is chosen as its section 6.3 says); NVIDIA's PTX ISA and
//! ModelOpt for NVFP4 (blocks of 16, scales in E4M3 without a sign, and one f32 for the whole tensor).

use serde::{Deserialize, Serialize};

use crate::dtype::{
    Format, e2m1_from_f32, e2m3_from_f32, e3m2_from_f32, e4m3_from_f32, e5m2_from_f32,
};

/// A format whose elements share a scale block by block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum BlockFormat {
    /// E4M3 elements, 32 to a power of two.
    #[serde(rename = "mxfp8")]
    Mxfp8,
    /// E5M2 elements, 32 to a power of two.
    #[serde(rename = "mxfp8-e5m2")]
    Mxfp8E5m2,
    /// E2M3 elements, 32 to a power of two.
    #[serde(rename = "mxfp6-e2m3")]
    Mxfp6E2m3,
    /// E3M2 elements, 32 to a power of two.
    #[serde(rename = "mxfp6-e3m2")]
    Mxfp6E3m2,
    /// E2M1 elements, 32 to a power of two.
    #[serde(rename = "mxfp4")]
    Mxfp4,
    /// E2M1 elements, 16 to a scale in E4M3, and one f32 for all.
    #[serde(rename = "nvfp4")]
    Nvfp4,
}

/// The codec of a block's scale, a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleCodec {
    /// A power of two: 2^(code - 127); 0xff is NaN.
    Ue8m0,
    /// E4M3 whose sign is not read; 0x7f is NaN.
    Ue4m3,
}

impl BlockFormat {
    /// All formats, the widest elements first.
    pub const ALL: [BlockFormat; 6] = [
        BlockFormat::Mxfp8,
        BlockFormat::Mxfp8E5m2,
        BlockFormat::Mxfp6E2m3,
        BlockFormat::Mxfp6E3m2,
        BlockFormat::Mxfp4,
        BlockFormat::Nvfp4,
    ];

    /// The name that manifests, commands and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            BlockFormat::Mxfp8 => "mxfp8",
            BlockFormat::Mxfp8E5m2 => "mxfp8-e5m2",
            BlockFormat::Mxfp6E2m3 => "mxfp6-e2m3",
            BlockFormat::Mxfp6E3m2 => "mxfp6-e3m2",
            BlockFormat::Mxfp4 => "mxfp4",
            BlockFormat::Nvfp4 => "nvfp4",
        }
    }

    /// The format of one element.
    pub const fn element(self) -> Format {
        match self {
            BlockFormat::Mxfp8 => Format::E4m3,
            BlockFormat::Mxfp8E5m2 => Format::E5m2,
            BlockFormat::Mxfp6E2m3 => Format::E2m3,
            BlockFormat::Mxfp6E3m2 => Format::E3m2,
            BlockFormat::Mxfp4 | BlockFormat::Nvfp4 => Format::E2m1,
        }
    }

    /// Elements along K that share a scale.
    pub const fn block(self) -> usize {
        match self {
            BlockFormat::Nvfp4 => 16,
            _ => 32,
        }
    }

    /// The codec of the blocks' scales.
    pub const fn scales(self) -> ScaleCodec {
        match self {
            BlockFormat::Nvfp4 => ScaleCodec::Ue4m3,
            _ => ScaleCodec::Ue8m0,
        }
    }

    /// The exponent of an element's largest value: what a block's scale leaves room for.
    fn largest_exponent(self) -> i32 {
        (self.element().max_finite().to_bits() >> 23) as i32 - 127
    }

    /// The scale of a whole tensor with that absmax: 1 but for NVFP4, whose largest block scale and
    /// largest element it maps to the absmax. 1 too where the absmax is zero or no number.
    pub fn whole_scale(self, absmax: f32) -> f32 {
        let most = Format::E4m3.max_finite() * Format::E2m1.max_finite();
        let scale = absmax / most;
        if self == BlockFormat::Nvfp4 && scale.is_finite() && scale > 0.0 { scale } else { 1.0 }
    }

    /// The code of a block's scale, given the block's absmax. An absmax that is no finite number gives
    /// the code of NaN.
    ///
    /// MX: the power of two at or below the absmax, over that of the element's largest value, within what
    /// the codec holds. NVFP4: the E4M3 code nearest to `(absmax / 6) / whole`, each an f32 division.
    pub fn scale_code(self, absmax: f32, whole: f32) -> u8 {
        let codec = self.scales();
        if !absmax.is_finite() {
            return codec.nan();
        }
        match codec {
            ScaleCodec::Ue8m0 => {
                // Of a subnormal and of zero the exponent is below all that the codec holds.
                let exponent = (absmax.to_bits() >> 23 & 0xff) as i32 - 127;
                (exponent - self.largest_exponent() + 127).clamp(0, 254) as u8
            }
            ScaleCodec::Ue4m3 => e4m3_from_f32((absmax / self.element().max_finite()) / whole),
        }
    }

    /// The codes of a block whose scale has that code.
    ///
    /// MX: of `value / scale`, which is exact but for subnormals. NVFP4: of the f32 quotient
    /// `value / (scale * whole)`, and zeros where the scale is zero. Where the scale is NaN the elements
    /// are zeros: nothing but NaN comes of such a block.
    #[inline(always)]
    pub fn encode_block(self, values: &[f32], scale: u8, whole: f32, codes: &mut [u8]) {
        let scale = self.scales().decode(scale) * whole;
        if scale.is_nan() || scale <= 0.0 {
            codes.fill(0);
            return;
        }
        match self.element() {
            Format::E4m3 => encode(values, scale, codes, e4m3_from_f32),
            Format::E5m2 => encode(values, scale, codes, e5m2_from_f32),
            Format::E2m3 => encode(values, scale, codes, e2m3_from_f32),
            Format::E3m2 => encode(values, scale, codes, e3m2_from_f32),
            _ => encode(values, scale, codes, e2m1_from_f32),
        }
    }
}

#[inline(always)]
fn encode(values: &[f32], scale: f32, codes: &mut [u8], code_of: impl Fn(f32) -> u8) {
    for (code, value) in codes.iter_mut().zip(values) {
        *code = code_of(value / scale);
    }
}

impl std::fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no block-scaled format's.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no block-scaled format; known are {known}", known = names())]
pub struct UnknownBlockFormat(pub String);

fn names() -> String {
    let names: Vec<&str> = BlockFormat::ALL.iter().map(|format| format.name()).collect();
    names.join(", ")
}

impl std::str::FromStr for BlockFormat {
    type Err = UnknownBlockFormat;

    fn from_str(name: &str) -> Result<BlockFormat, UnknownBlockFormat> {
        let known = BlockFormat::ALL.into_iter();
        let mut known = known.filter(|format| format.name().eq_ignore_ascii_case(name));
        known.next().ok_or_else(|| UnknownBlockFormat(name.to_owned()))
    }
}

/// What an operand is made of: single values, or blocks of elements with a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandFormat {
    /// Each code is a value.
    Single(Format),
    /// Each block has a scale.
    Blocks(BlockFormat),
}

/// A name that is neither a format's nor a block-scaled format's.
#[derive(Debug, thiserror::Error)]
#[error("`{name}` is no number format; known are {single}, and with a scale for each block {blocks}",
    single = single_names(), blocks = names())]
pub struct UnknownOperandFormat {
    name: String,
}

fn single_names() -> String {
    let names: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
    names.join(", ")
}

impl std::str::FromStr for OperandFormat {
    type Err = UnknownOperandFormat;

    fn from_str(name: &str) -> Result<OperandFormat, UnknownOperandFormat> {
        let single = name.parse().map(OperandFormat::Single);
        let any = single.or_else(|_| name.parse().map(OperandFormat::Blocks));
        any.map_err(|_: UnknownBlockFormat| UnknownOperandFormat { name: name.to_owned() })
    }
}

impl ScaleCodec {
    /// The value of a scale's code; NaN where the code is no number.
    #[inline(always)]
    pub fn decode(self, code: u8) -> f32 {
        match self {
            ScaleCodec::Ue8m0 => match code {
                0xff => f32::NAN,
                // 2^-127 is subnormal.
                0 => f32::from_bits(0x0040_0000),
                _ => f32::from_bits(u32::from(code) << 23),
            },
            ScaleCodec::Ue4m3 => Format::E4m3.decode(u32::from(code & 0x7f)),
        }
    }

    /// The code of a value that is exactly one; nothing where none is.
    pub fn code_of(self, value: f32) -> Option<u8> {
        let code = match self {
            ScaleCodec::Ue8m0 if value == self.decode(0) => 0,
            ScaleCodec::Ue8m0 => (value.to_bits() >> 23) as u8,
            ScaleCodec::Ue4m3 => e4m3_from_f32(value),
        };
        (self.decode(code) == value).then_some(code)
    }

    /// The code that is no number.
    pub fn nan(self) -> u8 {
        match self {
            ScaleCodec::Ue8m0 => 0xff,
            ScaleCodec::Ue4m3 => 0x7f,
        }
    }

    /// Whether a code is a number.
    pub fn is_number(self, code: u8) -> bool {
        match self {
            ScaleCodec::Ue8m0 => code != 0xff,
            ScaleCodec::Ue4m3 => code & 0x7f != 0x7f,
        }
    }

    /// A scale taken apart: the value is `significand * 2^(exponent - fraction_bits)`. A subnormal
    /// has the smallest exponent and a short significand, as in [`Format::parts`].
    pub fn parts(self, code: u8) -> (i32, i32) {
        match self {
            ScaleCodec::Ue8m0 => (1, i32::from(code) - 127),
            ScaleCodec::Ue4m3 => {
                let (field, fraction) = (i32::from(code >> 3 & 0xf), i32::from(code & 7));
                let hidden = if field == 0 { 0 } else { 8 };
                (hidden + fraction, field.max(1) - 7)
            }
        }
    }

    /// Fraction bits of a scale's significand.
    pub const fn fraction_bits(self) -> u32 {
        match self {
            ScaleCodec::Ue8m0 => 0,
            ScaleCodec::Ue4m3 => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_its_parts_and_nan_is_no_number() {
        for codec in [ScaleCodec::Ue8m0, ScaleCodec::Ue4m3] {
            for code in 0..=255u8 {
                let value = codec.decode(code);
                assert_eq!(codec.is_number(code), !value.is_nan());
                if codec.is_number(code) {
                    let (significand, exponent) =
                        codec.parts(code & if codec == ScaleCodec::Ue4m3 { 0x7f } else { 0xff });
                    let unit = f64::powi(2.0, exponent - codec.fraction_bits() as i32);
                    assert_eq!(
                        f64::from(significand) * unit,
                        f64::from(value),
                        "{codec:?} {code:#x}"
                    );
                }
            }
            assert!(!codec.is_number(codec.nan()));
            for code in (0..0x7f).filter(|code| codec.is_number(*code)) {
                assert_eq!(codec.code_of(codec.decode(code)), Some(code));
            }
            assert_eq!((codec.code_of(0.3), codec.code_of(-1.0)), (None, None));
            assert_eq!((codec.code_of(f32::NAN), codec.code_of(f32::INFINITY)), (None, None));
        }
    }

    #[test]
    fn a_block_keeps_its_largest_value_within_the_element() {
        for format in BlockFormat::ALL {
            for absmax in [1.0f32, 0.75, 448.0, 3.0e-3, 1.9999, 6.0] {
                let whole = format.whole_scale(absmax);
                let code = format.scale_code(absmax, whole);
                let mut codes = vec![0; 2];
                format.encode_block(&[absmax, -absmax / 3.0], code, whole, &mut codes);
                let scale = format.scales().decode(code) * whole;
                let back = format.element().decode(codes[0].into()) * scale;
                let off = (back - absmax).abs() / absmax;
                // MX takes the power of two below: the largest values saturate.
                assert!(off <= 0.251, "{format} {absmax}: {back}");
                assert!(format.element().decode(codes[1].into()) < 0.0);
            }
        }
        assert_eq!(BlockFormat::Mxfp4.scale_code(4.0, 1.0), 127);
        assert_eq!(BlockFormat::Mxfp4.scale_code(7.99, 1.0), 127);
        assert_eq!(BlockFormat::Mxfp4.scale_code(8.0, 1.0), 128);
        assert_eq!(BlockFormat::Mxfp8.scale_code(0.0, 1.0), 0);
        assert_eq!(BlockFormat::Mxfp8.scale_code(f32::INFINITY, 1.0), 0xff);
        assert_eq!(BlockFormat::Nvfp4.scale_code(f32::NAN, 1.0), 0x7f);
        assert_eq!(BlockFormat::Nvfp4.whole_scale(2688.0), 1.0);
        assert_eq!(BlockFormat::Nvfp4.scale_code(6.0, 1.0), 0x38);
    }

    #[test]
    fn names_parse_back_and_a_stranger_is_told_the_names() {
        for format in BlockFormat::ALL {
            assert_eq!(format.name().parse::<BlockFormat>().expect("its own name"), format);
            let json = serde_json::to_string(&format).expect("a name");
            assert_eq!(json, format!("\"{format}\""));
        }
        let parsed = "E4M3".parse::<OperandFormat>().expect("a format");
        assert_eq!(parsed, OperandFormat::Single(Format::E4m3));
        let parsed = "mxfp4".parse::<OperandFormat>().expect("a format");
        assert_eq!(parsed, OperandFormat::Blocks(BlockFormat::Mxfp4));
        let error = "fp4".parse::<OperandFormat>().expect_err("no format").to_string();
        assert!(error.contains("int8, and with a scale for each block mxfp8"), "{error}");
        let error = "nvfp5".parse::<BlockFormat>().expect_err("no such format");
        assert!(error.to_string().contains("mxfp8, mxfp8-e5m2"), "{error}");
    }
}
