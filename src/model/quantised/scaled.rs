//! Codes of a byte, or of half one, with a scale for each block.

use std::ops::Range;
use std::sync::OnceLock;

use crate::dtype::Format;
use crate::model::weights::WeightType;

/// Codes and their scales: row-major, a scale for each block; blocks at the edges may be cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scaled<'a> {
    pub codes: WeightType,
    pub bytes: &'a [u8],
    /// Bytes from one row of codes to the next, where these do not follow one another.
    pub step: Option<usize>,
    pub scales: Scales<'a>,
    /// Codes of zero, as signed bytes: one for each scale.
    pub zeros: Option<&'a [u8]>,
    pub width: usize,
}

/// The scales of a weight in their file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scales<'a> {
    pub kind: WeightType,
    pub bytes: &'a [u8],
    /// Rows and values of a block.
    pub block: [usize; 2],
    /// Bytes from one row of scales to the next, where these do not follow one another.
    pub step: Option<usize>,
    /// What the whole tensor has besides.
    pub whole: Whole,
}

/// A scale of the whole tensor, beside those of its blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Whole {
    None,
    /// It multiplies the scale of a block, in f32.
    Multiplies(f32),
    /// It divides the scale of a block, in f32.
    Divides(f32),
    /// It multiplies the value, in f32.
    Follows(f32),
}

impl Scales<'_> {
    /// The scale of a block by its row and column, of so many columns.
    pub fn at(&self, row: usize, column: usize, columns: usize) -> f32 {
        let size = size_of(self.kind);
        let bytes = &self.bytes[row * self.step.unwrap_or(columns * size) + column * size..];
        let scale = scale(self.kind, bytes);
        match self.whole {
            Whole::None | Whole::Follows(_) => scale,
            Whole::Multiplies(whole) => scale * whole,
            Whole::Divides(whole) => scale / whole,
        }
    }
}

/// Bytes of a scale.
pub(super) fn size_of(kind: WeightType) -> usize {
    match kind {
        WeightType::F16 | WeightType::BF16 => 2,
        WeightType::E8m0 | WeightType::E4m3 => 1,
        _ => 4,
    }
}

/// The scale that begins these bytes.
pub(super) fn scale(kind: WeightType, bytes: &[u8]) -> f32 {
    match kind {
        WeightType::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        WeightType::BF16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        WeightType::E8m0 => power_of_two(bytes[0]),
        WeightType::E4m3 => Format::E4m3.decode(bytes[0].into()),
        _ => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    }
}

impl Scaled<'_> {
    /// Decodes rows; 4-bit codes stand two in a byte, the lower half first.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let [tall, wide] = self.scales.block;
        let per_row = self.width.div_ceil(wide);
        let table = values_of(self.codes);
        let halves = self.codes == WeightType::E2m1;
        let length = if halves { self.width / 2 } else { self.width };
        for (row, out) in rows.zip(out.chunks_exact_mut(self.width)) {
            let codes = &self.bytes[row * self.step.unwrap_or(length)..][..length];
            for (column, out) in out.chunks_mut(wide).enumerate() {
                let scale = self.scales.at(row / tall, column, per_row);
                let codes = &codes[column * if halves { wide / 2 } else { wide }..];
                if halves {
                    for (pair, code) in out.chunks_exact_mut(2).zip(codes) {
                        pair[0] = table[usize::from(code & 15)] * scale;
                        pair[1] = table[usize::from(code >> 4)] * scale;
                    }
                } else if let Some(zeros) = self.zeros {
                    let zero = f32::from(zeros[row / tall * per_row + column] as i8);
                    for (value, code) in out.iter_mut().zip(codes) {
                        *value = (table[usize::from(*code)] - zero) * scale;
                    }
                } else {
                    for (value, code) in out.iter_mut().zip(codes) {
                        *value = table[usize::from(*code)] * scale;
                    }
                }
            }
            if let Whole::Follows(factor) = self.scales.whole {
                out.iter_mut().for_each(|value| *value *= factor);
            }
        }
    }

    /// The first scale that is no positive finite number: the first row and value of its block.
    /// Zero is one where all codes of the block stand for zero.
    pub fn first_bad(&self, rows: usize) -> Option<(usize, usize, f32)> {
        let [tall, wide] = self.scales.block;
        let per_row = self.width.div_ceil(wide);
        let places = 0..rows.div_ceil(tall) * per_row;
        let bad = |place: usize| {
            let (row, column) = (place / per_row, place % per_row);
            let scale = self.scales.at(row, column, per_row);
            let good = scale.is_finite() && scale > 0.0;
            let (row, column) = (row * tall, column * wide);
            let is_bad = !(good || scale == 0.0 && self.is_zero(row, column, rows));
            is_bad.then_some((row, column, scale))
        };
        places.into_iter().find_map(bad)
    }

    /// Whether all codes of the block that begins there are zero.
    fn is_zero(&self, row: usize, column: usize, rows: usize) -> bool {
        let [tall, wide] = self.scales.block;
        let halves = self.codes == WeightType::E2m1;
        let (length, share) = if halves { (self.width / 2, 2) } else { (self.width, 1) };
        let table = values_of(self.codes);
        let zero = |code: &u8| {
            let second = if halves { usize::from(code >> 4) } else { usize::from(*code) };
            let first = if halves { usize::from(code & 15) } else { usize::from(*code) };
            table[first] == 0.0 && table[second] == 0.0
        };
        let end = (column + wide).min(self.width);
        self.zeros.is_none()
            && (row..(row + tall).min(rows)).all(|row| {
                let codes = &self.bytes[row * self.step.unwrap_or(length)..][..length];
                codes[column / share..end / share].iter().all(zero)
            })
    }
}

/// The value of each code.
fn values_of(codes: WeightType) -> &'static [f32; 256] {
    static TABLES: OnceLock<[[f32; 256]; 4]> = OnceLock::new();
    let tables = TABLES.get_or_init(|| {
        let all = |value: fn(u8) -> f32| std::array::from_fn(|code| value(code as u8));
        [
            all(|code| Format::E4m3.decode(code.into())),
            all(|code| Format::E5m2.decode(code.into())),
            all(|code| f32::from(code as i8)),
            all(|code| E2M1[usize::from(code & 15)]),
        ]
    });
    match codes {
        WeightType::E5m2 => &tables[1],
        WeightType::I8 => &tables[2],
        WeightType::E2m1 => &tables[3],
        _ => &tables[0],
    }
}

/// The values of E2M1, a float of 4 bits (OCP Microscaling Formats 1.0).
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of an E8M0 code: 2^(code - 127), and NaN for 255 (OCP Microscaling Formats 1.0).
fn power_of_two(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        0 => f32::from_bits(1 << 22),
        code => f32::from_bits(u32::from(code) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_of_two_is_what_its_code_says() {
        assert_eq!(power_of_two(127), 1.0);
        assert_eq!(power_of_two(130), 8.0);
        assert_eq!(f64::from(power_of_two(0)), 2f64.powi(-127));
        assert_eq!(f64::from(power_of_two(254)), 2f64.powi(127));
        assert!(power_of_two(255).is_nan());
    }

    fn scaled<'a>(bytes: &'a [u8], scales: &'a [u8]) -> Scaled<'a> {
        let (kind, block, whole) = (WeightType::F32, [2, 2], Whole::None);
        let scales = Scales { kind, bytes: scales, block, step: None, whole };
        Scaled { codes: WeightType::E4m3, bytes, step: None, scales, zeros: None, width: 3 }
    }

    #[test]
    fn each_block_has_its_scale_and_blocks_at_the_edges_are_cut() {
        let scales: Vec<u8> = [1f32, 2.0, 4.0, 8.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        // 1.0 in E4M3.
        let codes = [0x38; 9];
        let mut out = [0.0; 9];
        scaled(&codes, &scales).decode(0..3, &mut out);
        assert_eq!(out, [1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 4.0, 4.0, 8.0]);
        let mut last = [0.0; 3];
        scaled(&codes, &scales).decode(2..3, &mut last);
        assert_eq!(last, [4.0, 4.0, 8.0]);
    }

    #[test]
    fn a_scale_of_zero_is_sound_where_its_block_is_zero() {
        let scales: Vec<u8> = [1f32, 2.0, 4.0, 0.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        // The last block is the last value; both zeros of E4M3 are zero.
        let mut codes = [0x38; 9];
        assert_eq!(scaled(&codes, &scales).first_bad(3), Some((2, 2, 0.0)));
        for zero in [0x00, 0x80] {
            codes[8] = zero;
            assert_eq!(scaled(&codes, &scales).first_bad(3), None);
        }
    }
}
