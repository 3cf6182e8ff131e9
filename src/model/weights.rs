//! One tensor of a model file: its bytes, and its values a few rows at a time.
//!
//! It knows block formats, not files: the readers hand it bytes whose length
//! they have checked against the shape. Of its model it only remembers which it is, for
//! whoever needs the weights beside it. The codecs of the block types are those of
//! `blocks.rs`; the plain float types are decoded here.

use std::fmt;
use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::Model;
use super::blocks;
use super::error::{ModelError, shown};
use super::gathered::Gathering;
use super::quantised::{Coding, HeldBlocks, HeldCodes};

/// How a tensor's values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightType {
    /// IEEE binary32.
    F32,
    /// IEEE binary64, in safetensors; its values are rounded to binary32.
    F64,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// 4 bits, blocks of 32 with a scale.
    Q4_0,
    /// 4 bits, blocks of 32 with a scale and a minimum.
    Q4_1,
    /// 5 bits, blocks of 32 with a scale.
    Q5_0,
    /// 5 bits, blocks of 32 with a scale and a minimum.
    Q5_1,
    /// 8 bits, blocks of 32 with a scale.
    Q8_0,
    /// 2 bits, blocks of 256 in 16 groups with 4-bit scales and minimums.
    Q2K,
    /// 3 bits, blocks of 256 in 16 groups with 6-bit scales.
    Q3K,
    /// 4 bits, blocks of 256 in 8 groups with 6-bit scales and minimums.
    Q4K,
    /// 5 bits, blocks of 256 in 8 groups with 6-bit scales and minimums.
    Q5K,
    /// 6 bits, blocks of 256 in 16 groups with 8-bit scales.
    Q6K,
    /// 8 bits, blocks of 256 with a binary32 scale.
    Q8K,
    /// 4 bits of a table, blocks of 32 with a scale.
    Iq4Nl,
    /// E2M1, blocks of 32 with a power of two (OCP Microscaling Formats 1.0).
    Mxfp4,
    /// E2M1, blocks of 64 in 4 groups with E4M3 scales.
    Nvfp4,
    /// 4 bits of a table, blocks of 256 in 8 groups with 6-bit scales.
    Iq4Xs,
    /// 2.06 bits: 8 values an entry of a table, blocks of 256.
    Iq2Xxs,
    /// 2.31 bits: as IQ2_XXS, with more entries and scales.
    Iq2Xs,
    /// 2.5 bits: as IQ2_XS, with all signs.
    Iq2S,
    /// 3.06 bits: 4 values an entry of a table, blocks of 256.
    Iq3Xxs,
    /// 3.44 bits: as IQ3_XXS, with more entries, scales and all signs.
    Iq3S,
    /// 1.56 bits: 8 values an entry of a table, moved by an eighth, blocks of 256.
    Iq1S,
    /// 1.75 bits: as IQ1_S, with more scales.
    Iq1M,
    /// Ternary, five digits a byte, blocks of 256 with a scale.
    Tq1_0,
    /// Ternary, four digits a byte, blocks of 256 with a scale.
    Tq2_0,
    /// OCP FP8 codes; their scales stand in a tensor of their own.
    E4m3,
    /// As [`WeightType::E4m3`], with a wider exponent.
    E5m2,
    /// Floats of 4 bits, two in a byte; their scales stand in a tensor of their own.
    E2m1,
    /// Signed 8-bit codes; their scales stand in a tensor of their own.
    I8,
    /// Integers of so many bits, 1 to 8, in words; their scales stand in a tensor of their own.
    Packed(u8),
    /// bitsandbytes' 4 bits of a table; their scales stand in a tensor of their own.
    Nf4,
    /// As [`WeightType::Nf4`], of another table.
    Fp4,
    /// Powers of two: scales of codes, no weights.
    E8m0,
}

impl WeightType {
    /// All types that GGUF files hold.
    pub const ALL: [WeightType; 27] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::BF16,
        WeightType::Q4_0,
        WeightType::Q4_1,
        WeightType::Q5_0,
        WeightType::Q5_1,
        WeightType::Q8_0,
        WeightType::Q2K,
        WeightType::Q3K,
        WeightType::Q4K,
        WeightType::Q5K,
        WeightType::Q6K,
        WeightType::Q8K,
        WeightType::Iq4Nl,
        WeightType::Mxfp4,
        WeightType::Nvfp4,
        WeightType::Iq4Xs,
        WeightType::Iq2Xxs,
        WeightType::Iq2Xs,
        WeightType::Iq2S,
        WeightType::Iq3Xxs,
        WeightType::Iq3S,
        WeightType::Iq1S,
        WeightType::Iq1M,
        WeightType::Tq1_0,
        WeightType::Tq2_0,
    ];

    /// The name that ggml gives the type, such as `Q4_K`, or safetensors.
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "F32",
            WeightType::F64 => "F64",
            WeightType::F16 => "F16",
            WeightType::BF16 => "BF16",
            WeightType::Q4_0 => "Q4_0",
            WeightType::Q4_1 => "Q4_1",
            WeightType::Q5_0 => "Q5_0",
            WeightType::Q5_1 => "Q5_1",
            WeightType::Q8_0 => "Q8_0",
            WeightType::Q2K => "Q2_K",
            WeightType::Q3K => "Q3_K",
            WeightType::Q4K => "Q4_K",
            WeightType::Q5K => "Q5_K",
            WeightType::Q6K => "Q6_K",
            WeightType::Q8K => "Q8_K",
            WeightType::Iq4Nl => "IQ4_NL",
            WeightType::Mxfp4 => "MXFP4",
            WeightType::Nvfp4 => "NVFP4",
            WeightType::Iq4Xs => "IQ4_XS",
            WeightType::Iq2Xxs => "IQ2_XXS",
            WeightType::Iq2Xs => "IQ2_XS",
            WeightType::Iq2S => "IQ2_S",
            WeightType::Iq3Xxs => "IQ3_XXS",
            WeightType::Iq3S => "IQ3_S",
            WeightType::Iq1S => "IQ1_S",
            WeightType::Iq1M => "IQ1_M",
            WeightType::Tq1_0 => "TQ1_0",
            WeightType::Tq2_0 => "TQ2_0",
            WeightType::E4m3 => "F8_E4M3",
            WeightType::E5m2 => "F8_E5M2",
            WeightType::E2m1 => "F4_E2M1",
            WeightType::I8 => "I8",
            WeightType::E8m0 => "F8_E8M0",
            WeightType::Packed(1) => "INT1",
            WeightType::Packed(2) => "INT2",
            WeightType::Packed(3) => "INT3",
            WeightType::Packed(4) => "INT4",
            WeightType::Packed(5) => "INT5",
            WeightType::Packed(6) => "INT6",
            WeightType::Packed(7) => "INT7",
            WeightType::Packed(_) => "INT8",
            WeightType::Nf4 => "NF4",
            WeightType::Fp4 => "FP4",
        }
    }

    /// Values in a block.
    pub fn block_width(self) -> usize {
        match self {
            WeightType::E2m1 => 2,
            _ => blocks::size(self).map_or(1, |(width, _)| width),
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            WeightType::F64 => 8,
            WeightType::F32 => 4,
            WeightType::F16 | WeightType::BF16 => 2,
            _ => blocks::size(self).map_or(1, |(_, bytes)| bytes),
        }
    }

    /// Whether the arms' own kernels decode the type; others are decoded before they compute.
    pub fn is_of_kernels(self) -> bool {
        matches!(
            self,
            WeightType::F32
                | WeightType::F16
                | WeightType::BF16
                | WeightType::Q4_0
                | WeightType::Q4_1
                | WeightType::Q5_0
                | WeightType::Q5_1
                | WeightType::Q8_0
                | WeightType::Q2K
                | WeightType::Q3K
                | WeightType::Q4K
                | WeightType::Q5K
                | WeightType::Q6K
                | WeightType::Q8K
        )
    }

    /// Whether the values are codes, which mean nothing without the scales beside them.
    pub fn is_scaled(self) -> bool {
        matches!(
            self,
            WeightType::E4m3
                | WeightType::E5m2
                | WeightType::E2m1
                | WeightType::I8
                | WeightType::Packed(_)
                | WeightType::Nf4
                | WeightType::Fp4
        )
    }

    /// Bytes of a row of `width` values; `width` must fill whole blocks.
    pub fn row_bytes(self, width: usize) -> usize {
        width / self.block_width() * self.block_bytes()
    }

    /// ggml's number of the type, as GGUF files hold it; one beyond all of them where they do not.
    pub(crate) fn ggml(self) -> u32 {
        match self {
            WeightType::F32 => 0,
            WeightType::F16 => 1,
            WeightType::Q4_0 => 2,
            WeightType::Q4_1 => 3,
            WeightType::Q5_0 => 6,
            WeightType::Q5_1 => 7,
            WeightType::Q8_0 => 8,
            WeightType::Q2K => 10,
            WeightType::Q3K => 11,
            WeightType::Q4K => 12,
            WeightType::Q5K => 13,
            WeightType::Q6K => 14,
            WeightType::Q8K => 15,
            WeightType::BF16 => 30,
            WeightType::Iq4Nl => 20,
            WeightType::Mxfp4 => 39,
            WeightType::Nvfp4 => 40,
            WeightType::Iq4Xs => 23,
            WeightType::Iq2Xxs => 16,
            WeightType::Iq2Xs => 17,
            WeightType::Iq2S => 22,
            WeightType::Iq3Xxs => 18,
            WeightType::Iq3S => 21,
            WeightType::Iq1S => 19,
            WeightType::Iq1M => 29,
            WeightType::Tq1_0 => 34,
            WeightType::Tq2_0 => 35,
            WeightType::F64 => 999,
            WeightType::E4m3 => 1000,
            WeightType::E5m2 => 1001,
            WeightType::I8 => 1002,
            WeightType::E8m0 => 1003,
            WeightType::E2m1 => 1004,
            WeightType::Nf4 => 1005,
            WeightType::Fp4 => 1006,
            WeightType::Packed(bits) => 1100 + u32::from(bits),
        }
    }

    /// The type of ggml's number, else the name of the type that it would be.
    pub(super) fn from_ggml(id: u32) -> Result<WeightType, String> {
        let known = WeightType::ALL.into_iter().find(|kind| kind.ggml() == id);
        known.ok_or_else(|| {
            let name = match id {
                9 => "Q8_1",
                24 => "I8",
                25 => "I16",
                26 => "I32",
                27 => "I64",
                28 => "F64",
                other => return format!("number {other}"),
            };
            name.to_owned()
        })
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the values of a matrix lie among its bytes where rows do not follow one another: bytes
/// from one row to the next, and from one value of a row to the next. Values that are packed
/// follow one another within a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Steps {
    pub row: usize,
    pub value: usize,
}

/// A tensor in its file, row-major `[rows, width]`; a vector has one row.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    name: &'a str,
    kind: WeightType,
    rows: usize,
    width: usize,
    bytes: &'a [u8],
    model: Option<&'a Model>,
    /// Whether the bytes hold the values less one.
    less_one: bool,
    /// What makes values of codes.
    coding: Option<Coding<'a>>,
    /// How values lie among the bytes, where rows do not follow one another.
    steps: Option<Steps>,
    /// Whether the highest byte of a number comes first.
    big_endian: bool,
    /// What the values of the blocks are multiplied by, where a scale stands beside them.
    second_scale: Option<f32>,
    /// The tensors that its rows stand in, where these are two.
    gathering: Option<Gathering<'a>>,
}

impl fmt::Debug for Weight<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weight({} {} [{}, {}])", self.name, self.kind, self.rows, self.width)
    }
}

impl<'a> Weight<'a> {
    /// A tensor whose rows stand one after the other in `bytes`, which nobody has looked at yet.
    fn plain(
        name: &'a str,
        kind: WeightType,
        [rows, width]: [usize; 2],
        bytes: &'a [u8],
    ) -> Weight<'a> {
        Weight {
            name,
            kind,
            rows,
            width,
            bytes,
            model: None,
            less_one: false,
            coding: None,
            steps: None,
            big_endian: false,
            second_scale: None,
            gathering: None,
        }
    }

    /// A tensor over `bytes`, which must hold exactly `rows` rows of whole blocks.
    pub fn new(
        name: &'a str,
        kind: WeightType,
        rows: usize,
        width: usize,
        bytes: &'a [u8],
    ) -> Result<Weight<'a>, ModelError> {
        let weight = Weight::plain(name, kind, [rows, width], bytes);
        let whole_blocks = width > 0 && width.is_multiple_of(kind.block_width());
        let size = (width / kind.block_width())
            .checked_mul(kind.block_bytes())
            .and_then(|row| row.checked_mul(rows));
        if rows == 0 || !whole_blocks || size != Some(bytes.len()) {
            return Err(weight.refuse(format!(
                "{} bytes are not {rows} rows of {width} {kind} values",
                bytes.len()
            )));
        }
        Ok(weight)
    }

    /// A tensor whose values lie among `bytes` by steps, which its first value begins.
    pub(super) fn stepped(
        name: &'a str,
        kind: WeightType,
        [rows, width]: [usize; 2],
        bytes: &'a [u8],
        steps: Steps,
    ) -> Result<Weight<'a>, ModelError> {
        let weight = Weight {
            name,
            kind,
            rows,
            width,
            bytes,
            model: None,
            less_one: false,
            coding: None,
            steps: Some(steps),
            big_endian: false,
            second_scale: None,
            gathering: None,
        };
        let row = match kind {
            WeightType::F32 => Some((width.saturating_sub(1)) * steps.value + 4),
            WeightType::F16 | WeightType::BF16 => Some((width.saturating_sub(1)) * steps.value + 2),
            _ => None,
        };
        let end = row.map(|row| rows.saturating_sub(1) * steps.row + row);
        if rows == 0 || width == 0 || end.is_none_or(|end| end > bytes.len()) {
            return Err(weight.refuse(format!(
                "{} bytes do not hold {rows} rows of {width} {kind} values",
                bytes.len()
            )));
        }
        Ok(weight)
    }

    /// A tensor of codes, which were checked when they were put together.
    pub(super) fn coded(
        name: &'a str,
        kind: WeightType,
        [rows, width]: [usize; 2],
        coding: Coding<'a>,
    ) -> Weight<'a> {
        let (bytes, model, less_one) = (coding.codes(), None, false);
        Weight {
            name,
            kind,
            rows,
            width,
            bytes,
            model,
            less_one,
            coding: Some(coding),
            steps: None,
            big_endian: false,
            second_scale: None,
            gathering: None,
        }
    }

    /// A tensor whose rows stand in two others, whose shapes were checked; `bytes` are the first's.
    pub(super) fn gathered(
        name: &'a str,
        kind: WeightType,
        [rows, width]: [usize; 2],
        bytes: &'a [u8],
        gathering: Gathering<'a>,
    ) -> Weight<'a> {
        Weight { gathering: Some(gathering), ..Weight::plain(name, kind, [rows, width], bytes) }
    }

    /// The same tensor, as one of a model's.
    pub(super) fn of(self, model: &'a Model) -> Weight<'a> {
        Weight { model: Some(model), ..self }
    }

    /// The same tensor, whose bytes hold the values less one: gains of Gemma's norms.
    pub(super) fn plus_one(self) -> Weight<'a> {
        Weight { less_one: true, ..self }
    }

    /// The same tensor, the numbers among whose bytes begin with their highest byte.
    pub(super) fn big_endian(self) -> Weight<'a> {
        Weight { big_endian: true, ..self }
    }

    /// The same tensor, whose values are those of its blocks times a scale.
    pub(super) fn scaled(self, scale: f32) -> Weight<'a> {
        Weight { second_scale: Some(scale), ..self }
    }

    /// Its name in a sentence: what its file calls it, and the canonical name where that is another.
    pub(crate) fn in_words(&self) -> String {
        match self.model.and_then(|model| model.name_in_file(self.name)) {
            Some(own) if own != self.name => {
                format!("`{}` (here `{}`)", shown(&own), shown(self.name))
            }
            _ => format!("`{}`", shown(self.name)),
        }
    }

    /// Whether the bytes are codes, whose scales stand elsewhere.
    pub fn is_scaled(&self) -> bool {
        self.coding.is_some()
    }

    /// The codes and scales of its file, where the file holds such codes.
    pub(crate) fn held_codes(&self, codes: WeightType) -> Option<HeldCodes<'a>> {
        self.coding?.held_codes(codes)
    }

    /// The elements and scales of its file, where they make a block-scaled format.
    pub(crate) fn held_blocks(&self) -> Option<HeldBlocks<'a>> {
        self.coding?.held_blocks()
    }

    /// The scale of the activations that it is multiplied with, where the file has one.
    pub fn input_scale(&self) -> Option<f32> {
        self.coding?.input_scale()
    }

    /// Whether its rows stand among others in a tensor of codes.
    pub(crate) fn is_fused(&self) -> bool {
        self.coding.is_some_and(|coding| coding.is_fused(self.rows))
    }

    /// Whether the bytes are its rows, one after the other, in a type that the arms' own kernels
    /// decode, and say all of its values but that they may hold them less one.
    pub fn is_plain(&self) -> bool {
        let apart = self.coding.is_some() || self.gathering.is_some();
        let as_they_come = !apart && self.steps.is_none() && !self.big_endian;
        as_they_come && self.second_scale.is_none() && self.kind.is_of_kernels()
    }

    /// Whether all that makes its values stands in one file.
    pub(crate) fn is_in_one_file(&self) -> bool {
        self.coding.is_none_or(|coding| coding.is_in_one_file())
            && self.gathering.is_none_or(|gathering| gathering.is_in_one_file())
    }

    /// How values lie among the bytes, where rows do not follow one another, and how codes are
    /// decoded; else nothing.
    pub(crate) fn layout(&self) -> String {
        if let Some(coding) = &self.coding {
            return coding.layout();
        }
        if let Some(gathering) = &self.gathering {
            return gathering.layout();
        }
        if self.big_endian || self.second_scale.is_some() {
            let order = if self.big_endian { " big-endian" } else { "" };
            let scale = self.second_scale.map(|scale| format!(" times {scale:e}"));
            return format!("{order}{}", scale.unwrap_or_default());
        }
        self.steps.map_or_else(String::new, |Steps { row, value }| format!(" by {row} and {value}"))
    }

    /// The values as the bytes hold them.
    pub fn as_held(self) -> Weight<'a> {
        Weight { less_one: false, ..self }
    }

    /// Whether the bytes hold the values less one.
    pub fn is_less_one(&self) -> bool {
        self.less_one
    }

    /// The model that it is one of; a weight that was made alone is of none.
    pub fn model(&self) -> Option<&'a Model> {
        self.model
    }

    /// The canonical name, such as `blk.0.attn_q.weight`.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Number of rows; outputs, where the tensor is a GEMM's weight.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of values in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// How the values are stored.
    pub fn kind(&self) -> WeightType {
        self.kind
    }

    /// The tensor as it stands in the file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The rows as they stand in the file.
    ///
    /// # Panics
    /// If the rows are not all there, as slicing does.
    pub fn row_bytes(&self, rows: Range<usize>) -> &'a [u8] {
        let row = self.kind.row_bytes(self.width);
        &self.bytes[rows.start * row..rows.end * row]
    }

    /// Decodes rows into `out`, which must hold `rows.len() * width` values.
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ModelError> {
        if rows.start > rows.end || rows.end > self.rows {
            return Err(self.refuse(format!(
                "rows {}..{} of {} were asked for",
                rows.start, rows.end, self.rows
            )));
        }
        if out.len() != rows.len() * self.width {
            return Err(self.refuse(format!(
                "{} rows of {} do not fit a buffer of {} values",
                rows.len(),
                self.width,
                out.len()
            )));
        }
        if let Some(coding) = &self.coding {
            coding.decode(rows, out);
            return Ok(());
        }
        if let Some(gathering) = &self.gathering {
            return gathering.decode(rows, self.width, out);
        }
        if let Some(steps) = self.steps {
            return self.decode_steps(steps, rows, out);
        }
        let bytes = self.row_bytes(rows);
        let turned = self.big_endian.then(|| blocks::swapped(self.kind, bytes));
        let bytes = turned.as_deref().unwrap_or(bytes);
        match self.kind {
            WeightType::F32 => decode_f32(bytes, out),
            WeightType::F64 => decode_f64(bytes, out),
            WeightType::F16 => decode_f16(bytes, out),
            WeightType::BF16 => decode_bf16(bytes, out),
            _ => self.decode_blocks(bytes, out)?,
        }
        if let Some(scale) = self.second_scale {
            out.iter_mut().for_each(|value| *value *= scale);
        }
        if self.less_one {
            out.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(())
    }

    /// All values.
    pub fn to_vec(&self) -> Result<Vec<f32>, ModelError> {
        let mut values = vec![0.0; self.rows * self.width];
        self.decode_rows(0..self.rows, &mut values)?;
        Ok(values)
    }

    /// The first value of these rows, in their order, that is NaN or infinite: its row, its place
    /// there and itself.
    pub fn first_not_finite(
        &self,
        rows: &[usize],
    ) -> Result<Option<(usize, usize, f32)>, ModelError> {
        let found = rows.par_iter().filter(|row| **row < self.rows).find_map_first(|&row| {
            let mut values = vec![0.0; self.width];
            if let Err(error) = self.decode_rows(row..row + 1, &mut values) {
                return Some(Err(error));
            }
            let column = values.iter().position(|value| !value.is_finite())?;
            Some(Ok((row, column, values[column])))
        });
        found.transpose()
    }

    /// A digest of the type, the shape and the bytes, whatever file holds them.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key("runner 2026 weight digest v1");
        let kind = self.kind.name().as_bytes();
        for field in [kind.len(), self.rows, self.width, self.bytes.len()] {
            hasher.update(&(field as u64).to_le_bytes());
        }
        hasher.update(kind);
        if self.less_one {
            hasher.update(b"less one");
        }
        if self.big_endian {
            hasher.update(b"big-endian");
        }
        if let Some(scale) = self.second_scale {
            hasher.update(b"times");
            hasher.update(&scale.to_le_bytes());
        }
        if let Some(coding) = &self.coding {
            coding.digest(&mut hasher);
            return hasher.finalize();
        }
        if let Some(gathering) = &self.gathering {
            gathering.digest(&mut hasher);
            return hasher.finalize();
        }
        if let Some(Steps { row, value }) = self.steps {
            hasher.update(format!("a row each {row} bytes, a value each {value}").as_bytes());
        }
        hasher.update_rayon(self.bytes);
        hasher.finalize()
    }

    /// Decodes rows whose values lie by steps.
    fn decode_steps(
        &self,
        steps: Steps,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        // Along the outer of both steps last: the inner one stays within a line of the cache.
        for column in 0..self.width {
            for (place, row) in rows.clone().enumerate() {
                let bytes = &self.bytes[row * steps.row + column * steps.value..];
                let value = &mut out[place * self.width + column..][..1];
                match self.kind {
                    WeightType::F32 => decode_f32(&bytes[..4], value),
                    WeightType::F16 => decode_f16(&bytes[..2], value),
                    WeightType::BF16 => decode_bf16(&bytes[..2], value),
                    _ => return Err(self.refuse("its codes have no scales".to_owned())),
                }
            }
        }
        Ok(())
    }

    fn decode_blocks(&self, bytes: &[u8], out: &mut [f32]) -> Result<(), ModelError> {
        if blocks::decode(self.kind, bytes, out).is_some() {
            return Ok(());
        }
        Err(self.refuse("its codes have no scales".to_owned()))
    }

    fn refuse(&self, problem: String) -> ModelError {
        ModelError::Request { tensor: self.name.to_owned(), problem }
    }
}

fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}

fn decode_f64(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *value = f64::from_le_bytes(*bytes) as f32;
    }
}

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    // In runs, so that the instruction set is looked up once a run.
    let mut run = [f16::ZERO; 64];
    for (out, bytes) in out.chunks_mut(run.len()).zip(bytes.chunks(2 * run.len())) {
        let run = &mut run[..out.len()];
        for (value, bytes) in run.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = f16::from_le_bytes(*bytes);
        }
        run.convert_to_f32_slice(out);
    }
}

fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}
