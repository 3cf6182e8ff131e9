//! bitsandbytes' 4 bits: codes of a table of 16 values, two in a byte, the upper half first, and
//! the largest magnitude of each block, along all rows; these may be codes of a table themselves.

use std::ops::Range;

/// The values of NF4 (QLoRA, appendix E; bitsandbytes' `get_4bit_type`).
pub(super) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
/// The values of bitsandbytes' FP4: 0, 0.0625, 8, 12, 4, 6, 2 and 3 twelfths, and their negatives.
pub(super) const FP4: [f32; 16] = [
    0.0,
    0.062_5 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    0.5,
    2.0 / 12.0,
    0.25,
    0.0,
    -0.062_5 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -0.5,
    -2.0 / 12.0,
    -0.25,
];

/// What a weight's state says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub table: &'static [f32; 16],
    pub width: usize,
    /// Values that share a magnitude.
    pub block: usize,
    /// Of magnitudes that are codes: how many share a scale, and what is added to each.
    pub nested: Option<(usize, f32)>,
}

/// A weight in its file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'a> {
    pub blocks: &'a Blocks,
    pub codes: &'a [u8],
    pub magnitudes: &'a [u8],
    /// The values of the magnitudes' codes, and their scales.
    pub nested: [&'a [u8]; 2],
}

fn float(bytes: &[u8], number: usize) -> f32 {
    f32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[4 * number + byte]))
}

impl Table<'_> {
    /// The largest magnitude of a block.
    pub fn magnitude(&self, block: usize) -> f32 {
        let Some((together, offset)) = self.blocks.nested else {
            return float(self.magnitudes, block);
        };
        let [values, scales] = self.nested;
        let value = float(values, self.magnitudes[block].into());
        value * float(scales, block / together) + offset
    }

    /// Decodes rows.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let Blocks { table, width, block, .. } = *self.blocks;
        let (mut place, end) = (rows.start * width, rows.end * width);
        let mut rest = out;
        while place < end {
            let stop = end.min((place / block + 1) * block);
            let (part, others) = rest.split_at_mut(stop - place);
            let magnitude = self.magnitude(place / block);
            for (place, value) in (place..stop).zip(part) {
                let pair = self.codes[place / 2];
                let code = if place % 2 == 0 { pair >> 4 } else { pair & 15 };
                *value = table[usize::from(code)] * magnitude;
            }
            (place, rest) = (stop, others);
        }
    }
}
