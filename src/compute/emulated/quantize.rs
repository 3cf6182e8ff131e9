//! From f32 values to codes: absmax, scales, and the conversion of rows.
//!
//! It knows one scale at a time; which values share a scale is the caller's
//! business. The arithmetic is that of the GPU kernels: the scale is one IEEE
//! division, a code is the saturating nearest-even conversion of one IEEE
//! quotient.

use crate::block_format::BlockFormat;
use crate::dtype::{
    Format, bf16_from_f32, e4m3_from_f32, e4m3fnuz_from_f32, e5m2_from_f32, e5m2fnuz_from_f32,
    int8_from_f32,
};
use crate::vector::{Kernel, dispatch};

/// Codes of a matrix, row-major `[rows, width]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Codes {
    format: Format,
    rows: usize,
    width: usize,
    data: CodeData,
}

/// Raw codes in the format's own width.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CodeData {
    /// E4M3, E5M2, int8, and elements of blocks.
    Bits8(Vec<u8>),
    /// bf16 and f16.
    Bits16(Vec<u16>),
    /// tf32 and f32.
    Bits32(Vec<u32>),
}

/// One row of [`Codes`], to be read.
#[derive(Clone, Copy, Debug)]
pub enum CodesRow<'a> {
    /// E4M3, E5M2, int8, and elements of blocks.
    Bits8(&'a [u8]),
    /// bf16 and f16.
    Bits16(&'a [u16]),
    /// tf32 and f32.
    Bits32(&'a [u32]),
}

/// One row of [`Codes`], to be written.
#[derive(Debug)]
pub enum CodesRowMut<'a> {
    /// E4M3, E5M2, int8, and elements of blocks.
    Bits8(&'a mut [u8]),
    /// bf16 and f16.
    Bits16(&'a mut [u16]),
    /// tf32 and f32.
    Bits32(&'a mut [u32]),
}

/// Codes that do not have the shape they should have.
#[derive(Debug, thiserror::Error)]
pub enum CodesError {
    /// The number of codes is not `rows * width`.
    #[error("{given} codes do not fill a matrix of {rows} rows of {width}")]
    Shape {
        /// Codes that were given.
        given: usize,
        /// Rows asked for.
        rows: usize,
        /// Width asked for.
        width: usize,
    },
    /// The codes' width in bits is not the format's.
    #[error("{format} codes take {expected} bytes each, not {given}")]
    Width {
        /// The format.
        format: Format,
        /// Its bytes per code.
        expected: usize,
        /// Bytes per code that were given.
        given: usize,
    },
}

impl CodeData {
    fn zeros(format: Format, count: usize) -> CodeData {
        match format.bytes() {
            1 => CodeData::Bits8(vec![0; count]),
            2 => CodeData::Bits16(vec![0; count]),
            _ => CodeData::Bits32(vec![0; count]),
        }
    }

    fn len(&self) -> usize {
        match self {
            CodeData::Bits8(codes) => codes.len(),
            CodeData::Bits16(codes) => codes.len(),
            CodeData::Bits32(codes) => codes.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            CodeData::Bits8(_) => 1,
            CodeData::Bits16(_) => 2,
            CodeData::Bits32(_) => 4,
        }
    }
}

impl Codes {
    /// A matrix of zeros, `[rows, width]`.
    pub fn zeros(format: Format, rows: usize, width: usize) -> Codes {
        Codes { format, rows, width, data: CodeData::zeros(format, rows * width) }
    }

    /// Wraps raw codes, row-major `[rows, width]`.
    ///
    /// # Errors
    /// If their number or their width in bits does not fit.
    pub fn new(
        format: Format,
        rows: usize,
        width: usize,
        data: CodeData,
    ) -> Result<Codes, CodesError> {
        if data.bytes() != format.bytes() {
            let (expected, given) = (format.bytes(), data.bytes());
            return Err(CodesError::Width { format, expected, given });
        }
        if data.len() != rows * width {
            return Err(CodesError::Shape { given: data.len(), rows, width });
        }
        Ok(Codes { format, rows, width, data })
    }

    /// Converts `values`, row-major in rows of `width`, with one scale for all.
    ///
    /// # Errors
    /// If the values do not fill whole rows.
    pub fn quantize(
        format: Format,
        width: usize,
        values: &[f32],
        scale: f32,
    ) -> Result<Codes, CodesError> {
        let rows = values.len().checked_div(width).unwrap_or(0);
        if rows * width != values.len() {
            return Err(CodesError::Shape { given: values.len(), rows, width });
        }
        let mut codes = Codes::zeros(format, rows, width);
        for row in 0..rows {
            let values = &values[row * width..(row + 1) * width];
            quantize_row(format, values, scale, &mut codes.row_mut(row));
        }
        Ok(codes)
    }

    /// The format of every code.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Codes in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// All codes, row by row.
    pub fn data(&self) -> &CodeData {
        &self.data
    }

    /// One row.
    pub fn row(&self, row: usize) -> CodesRow<'_> {
        let range = row * self.width..(row + 1) * self.width;
        match &self.data {
            CodeData::Bits8(codes) => CodesRow::Bits8(&codes[range]),
            CodeData::Bits16(codes) => CodesRow::Bits16(&codes[range]),
            CodeData::Bits32(codes) => CodesRow::Bits32(&codes[range]),
        }
    }

    /// One row, to be written.
    pub fn row_mut(&mut self, row: usize) -> CodesRowMut<'_> {
        let range = row * self.width..(row + 1) * self.width;
        match &mut self.data {
            CodeData::Bits8(codes) => CodesRowMut::Bits8(&mut codes[range]),
            CodeData::Bits16(codes) => CodesRowMut::Bits16(&mut codes[range]),
            CodeData::Bits32(codes) => CodesRowMut::Bits32(&mut codes[range]),
        }
    }

    /// All rows, each to be written; for filling them in parallel.
    pub fn rows_mut(&mut self) -> Vec<CodesRowMut<'_>> {
        let width = self.width.max(1);
        match &mut self.data {
            CodeData::Bits8(codes) => codes.chunks_mut(width).map(CodesRowMut::Bits8).collect(),
            CodeData::Bits16(codes) => codes.chunks_mut(width).map(CodesRowMut::Bits16).collect(),
            CodeData::Bits32(codes) => codes.chunks_mut(width).map(CodesRowMut::Bits32).collect(),
        }
    }

    /// The rows of several matrices of one format and width as one; nothing of none, or where they
    /// do not fit.
    pub fn joined(parts: &[&Codes]) -> Option<Codes> {
        let first = parts.first()?;
        let rows = parts.iter().map(|part| part.rows).sum();
        let mut all = Codes::zeros(first.format, rows, first.width);
        let mut at = 0;
        for part in parts {
            if (part.format, part.width) != (first.format, first.width) {
                return None;
            }
            let places = at..at + part.data.len();
            match (&mut all.data, &part.data) {
                (CodeData::Bits8(all), CodeData::Bits8(codes)) => {
                    all[places].copy_from_slice(codes);
                }
                (CodeData::Bits16(all), CodeData::Bits16(codes)) => {
                    all[places].copy_from_slice(codes);
                }
                (CodeData::Bits32(all), CodeData::Bits32(codes)) => {
                    all[places].copy_from_slice(codes);
                }
                _ => return None,
            }
            at += part.data.len();
        }
        Some(all)
    }

    /// Some columns of every row.
    pub fn some_columns(&self, columns: std::ops::Range<usize>) -> Codes {
        let mut some = Codes::zeros(self.format, self.rows, columns.len());
        for row in 0..self.rows {
            some.row_mut(row).copy_from(self.row(row).slice(columns.clone()));
        }
        some
    }

    /// The values of one row before any scale.
    pub fn decode_row(&self, row: usize) -> Vec<f32> {
        self.row(row).iter().map(|code| self.format.decode(code)).collect()
    }
}

impl<'a> CodesRow<'a> {
    /// Some codes of the row.
    pub fn slice(self, inner: std::ops::Range<usize>) -> CodesRow<'a> {
        match self {
            CodesRow::Bits8(codes) => CodesRow::Bits8(&codes[inner]),
            CodesRow::Bits16(codes) => CodesRow::Bits16(&codes[inner]),
            CodesRow::Bits32(codes) => CodesRow::Bits32(&codes[inner]),
        }
    }

    /// Number of codes.
    pub fn len(&self) -> usize {
        match self {
            CodesRow::Bits8(codes) => codes.len(),
            CodesRow::Bits16(codes) => codes.len(),
            CodesRow::Bits32(codes) => codes.len(),
        }
    }

    /// Whether there is no code.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One code, right-aligned.
    pub fn get(&self, index: usize) -> u32 {
        match self {
            CodesRow::Bits8(codes) => u32::from(codes[index]),
            CodesRow::Bits16(codes) => u32::from(codes[index]),
            CodesRow::Bits32(codes) => codes[index],
        }
    }

    /// All codes, right-aligned.
    pub fn iter(self) -> impl Iterator<Item = u32> + 'a {
        (0..self.len()).map(move |index| self.get(index))
    }
}

impl CodesRowMut<'_> {
    /// Overwrites the row with another one of the same length and width in bits.
    ///
    /// # Panics
    /// If the rows differ in either: a bug of the caller.
    pub fn copy_from(&mut self, source: CodesRow<'_>) {
        match (self, source) {
            (CodesRowMut::Bits8(to), CodesRow::Bits8(from)) => to.copy_from_slice(from),
            (CodesRowMut::Bits16(to), CodesRow::Bits16(from)) => to.copy_from_slice(from),
            (CodesRowMut::Bits32(to), CodesRow::Bits32(from)) => to.copy_from_slice(from),
            (to, from) => panic!("{from:?} does not fit into {to:?}"),
        }
    }

    /// `count` codes of the row from `first` on.
    pub fn slice(&mut self, first: usize, count: usize) -> CodesRowMut<'_> {
        let range = first..first + count;
        match self {
            CodesRowMut::Bits8(codes) => CodesRowMut::Bits8(&mut codes[range]),
            CodesRowMut::Bits16(codes) => CodesRowMut::Bits16(&mut codes[range]),
            CodesRowMut::Bits32(codes) => CodesRowMut::Bits32(&mut codes[range]),
        }
    }

    /// Number of codes.
    pub fn len(&self) -> usize {
        match self {
            CodesRowMut::Bits8(codes) => codes.len(),
            CodesRowMut::Bits16(codes) => codes.len(),
            CodesRowMut::Bits32(codes) => codes.len(),
        }
    }

    /// Whether there is no code.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The scales of a block-scaled operand.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockScales {
    /// The format, which says how many elements share a scale.
    pub format: BlockFormat,
    /// Codes of the blocks' scales, row-major `[rows, blocks]`.
    pub codes: Vec<u8>,
    /// Blocks of a row.
    pub blocks: usize,
    /// The scale of the whole operand; 1 but for NVFP4.
    pub whole: f32,
}

impl BlockScales {
    /// The codes of a row's scales.
    pub fn of_row(&self, row: usize) -> &[u8] {
        &self.codes[row * self.blocks..][..self.blocks]
    }

    /// The scales of some rows, in the given order.
    pub fn select_rows(&self, rows: &[usize]) -> BlockScales {
        let codes = rows.iter().flat_map(|&row| self.of_row(row)).copied().collect();
        BlockScales { codes, ..*self }
    }

    /// What an element of a row is multiplied with.
    pub fn at(&self, row: usize, column: usize) -> f32 {
        let code = self.of_row(row)[column / self.format.block()];
        self.format.scales().decode(code) * self.whole
    }
}

/// Converts `values`, row-major in rows of `width`, to a block-scaled format: codes and scales. `whole`
/// is the scale of the whole operand, [`BlockFormat::whole_scale`] of its absmax. A row's last block may be
/// shorter.
///
/// # Errors
/// If the values do not fill whole rows.
pub fn quantize_blocks(
    format: BlockFormat,
    width: usize,
    values: &[f32],
    whole: f32,
) -> Result<(Codes, BlockScales), CodesError> {
    let rows = values.len().checked_div(width).unwrap_or(0);
    if rows * width != values.len() {
        return Err(CodesError::Shape { given: values.len(), rows, width });
    }
    let blocks = width.div_ceil(format.block());
    let mut codes = vec![0; values.len()];
    let mut scales = vec![0; rows * blocks];
    dispatch(QuantiseBlocks {
        format,
        whole,
        width,
        values,
        codes: &mut codes,
        scales: &mut scales,
    });
    let codes = Codes { format: format.element(), rows, width, data: CodeData::Bits8(codes) };
    Ok((codes, BlockScales { format, codes: scales, blocks, whole }))
}

struct QuantiseBlocks<'a> {
    format: BlockFormat,
    whole: f32,
    width: usize,
    values: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl Kernel for QuantiseBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let QuantiseBlocks { format, whole, width, values, codes, scales } = self;
        let block = format.block();
        let rows = values.chunks_exact(width.max(1)).zip(codes.chunks_exact_mut(width.max(1)));
        for ((values, codes), scales) in rows.zip(scales.chunks_mut(width.div_ceil(block).max(1))) {
            let blocks = values.chunks(block).zip(codes.chunks_mut(block));
            for ((values, codes), scale) in blocks.zip(scales) {
                let mut most = 0;
                for value in values {
                    most = most.max(value.to_bits() & 0x7fff_ffff);
                }
                *scale = format.scale_code(f32::from_bits(most), whole);
                format.encode_block(values, *scale, whole, codes);
            }
        }
    }
}

/// The largest magnitude; 0 of nothing. A NaN anywhere gives NaN.
pub fn absmax(values: &[f32]) -> f32 {
    dispatch(Absmax(values))
}

struct Absmax<'a>(&'a [f32]);

impl Kernel for Absmax<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        // Magnitudes order like their bits, and every NaN lies above infinity.
        let mut most = 0;
        for value in self.0 {
            most = most.max(value.to_bits() & 0x7fff_ffff);
        }
        f32::from_bits(most)
    }
}

/// The scale that maps `absmax` to the format's largest value: for FP8 and int8
/// `absmax / max_finite` as one f32 division, and 1 if `absmax` is 0. The other
/// formats need no scale: 1.
pub fn scale_for(format: Format, absmax: f32) -> f32 {
    if format.is_scaled() && absmax != 0.0 { absmax / format.max_finite() } else { 1.0 }
}

/// Converts one row: each code is [`Format::encode`] of the f32 quotient
/// `value / scale`.
///
/// # Panics
/// If `codes` has another length or another width in bits than the format: a
/// bug of the caller.
pub fn quantize_row(format: Format, values: &[f32], scale: f32, codes: &mut CodesRowMut) {
    assert_eq!(values.len(), codes.len(), "one code per value");
    dispatch(Quantise { format, values, scale, codes });
}

struct Quantise<'a, 'c> {
    format: Format,
    values: &'a [f32],
    scale: f32,
    codes: &'a mut CodesRowMut<'c>,
}

impl Kernel for Quantise<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Quantise { format, values, scale, codes } = self;
        match (format, codes) {
            (Format::E4m3, CodesRowMut::Bits8(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = e4m3_from_f32(value / scale);
                }
            }
            (Format::E5m2, CodesRowMut::Bits8(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = e5m2_from_f32(value / scale);
                }
            }
            (Format::E4m3fnuz, CodesRowMut::Bits8(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = e4m3fnuz_from_f32(value / scale);
                }
            }
            (Format::E5m2fnuz, CodesRowMut::Bits8(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = e5m2fnuz_from_f32(value / scale);
                }
            }
            (Format::Int8, CodesRowMut::Bits8(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = int8_from_f32(value / scale);
                }
            }
            (Format::E2m3 | Format::E3m2 | Format::E2m1, CodesRowMut::Bits8(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = format.encode(value / scale) as u8;
                }
            }
            (Format::Bf16, CodesRowMut::Bits16(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = bf16_from_f32(value / scale);
                }
            }
            (Format::F16, CodesRowMut::Bits16(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = format.encode(value / scale) as u16;
                }
            }
            (Format::Tf32 | Format::F32, CodesRowMut::Bits32(codes)) => {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = format.encode(value / scale);
                }
            }
            (format, codes) => panic!("{format} codes do not fit into {codes:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absmax_passes_nan_on_and_ignores_signs() {
        assert_eq!(absmax(&[]), 0.0);
        assert_eq!(absmax(&[1.0, -3.0, 2.0]), 3.0);
        assert!(absmax(&[1.0, -f32::NAN, f32::INFINITY]).is_nan());
    }

    #[test]
    fn scales_are_one_division_and_one_where_nothing_is_scaled() {
        assert_eq!(scale_for(Format::E4m3, 3.0), 3.0 / 448.0);
        assert_eq!(scale_for(Format::E5m2, 3.0), 3.0 / 57344.0);
        assert_eq!(scale_for(Format::Int8, 3.0), 3.0 / 127.0);
        assert_eq!(scale_for(Format::E4m3, 0.0), 1.0);
        assert_eq!(scale_for(Format::Bf16, 3.0), 1.0);
        assert!(scale_for(Format::E4m3, f32::NAN).is_nan());
    }

    #[test]
    fn every_format_quantises_as_its_codec_encodes() {
        let values: Vec<f32> = (-40..40).map(|i| 0.37 * i as f32 * 1.5f32.powi(i / 3)).collect();
        for format in Format::ALL {
            let codes = Codes::quantize(format, 8, &values, 0.75).expect("whole rows");
            assert_eq!(codes.rows(), 10);
            for (index, value) in values.iter().enumerate() {
                assert_eq!(codes.row(index / 8).get(index % 8), format.encode(value / 0.75));
            }
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        assert!(Codes::new(Format::E4m3, 2, 3, CodeData::Bits8(vec![0; 5])).is_err());
        assert!(Codes::new(Format::E4m3, 1, 5, CodeData::Bits16(vec![0; 5])).is_err());
        assert!(Codes::quantize(Format::E4m3, 3, &[0.0; 5], 1.0).is_err());
    }
}
