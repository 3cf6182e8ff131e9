//! A GEMM whose operands come from a file as codes with their scales.
//!
//! No conversion stands between file and tensor core, so what an engine computed
//! from these codes is met in every bit or something else happened. Where its
//! outputs are known, the schedule is identified from them. It knows no model.

use std::ops::Range;

use rayon::prelude::*;

use super::emulated::chip::{Unit, chip};
use super::emulated::gemm::{Operand, Scales, gemm};
use super::emulated::identify::identify;
use super::emulated::quantize::{BlockScales, CodeData, Codes};
use super::emulated::schedule::Schedule;
use super::floor::positive_dots;
use super::reference::{Widened, dot_rows};
use super::{ComputeError, check_interrupt};
use crate::block_format::BlockFormat;
use crate::dtype::Format;
use crate::op::Recipe;
use crate::tensor::Tensor;
use crate::tensor_file::CodedTensor;

/// Bits of an f32 that bf16 drops.
const BELOW_BF16: u32 = 0xffff;

/// Rows of w that are multiplied at a time: they stay in the second-level cache.
const CHUNK_ROWS: usize = 32;
/// Elements of K that share a block scale in the tensor core's promotion.
const PROMOTED_BLOCK: usize = 128;

/// The product in f64, and what its rounding errors are made of.
#[derive(Clone, Debug)]
pub struct Exact {
    /// Rows of w: the width of y.
    pub width: usize,
    /// `sum_k x w`, row-major.
    pub dots: Vec<f64>,
    /// `sum_k (x w)^2`, row-major.
    pub terms: Vec<f64>,
}

/// The product in f64 over what codes and scales stand for.
///
/// # Errors
/// If the operands have different K.
pub fn exact(x: &CodedTensor, w: &CodedTensor) -> Result<Exact, ComputeError> {
    check_inner(x, w)?;
    let inner = x.width;
    let x_values = wide_rows(x, 0..x.rows);
    let x_most = most(&x_values);
    let x_wide = Widened::of_f64(&x_values, inner);
    let x_squares = squares(&x_values, x_most);
    drop(x_values);
    let starts: Vec<usize> = (0..w.rows).step_by(CHUNK_ROWS).collect();
    let chunks: Vec<(usize, Vec<f64>, Vec<f64>)> = starts
        .into_par_iter()
        .map(|first| {
            check_interrupt()?;
            let rows = first..(first + CHUNK_ROWS).min(w.rows);
            let values = wide_rows(w, rows);
            let dots = dot_rows(&x_wide, &Widened::of_f64(&values, inner));
            let w_most = most(&values);
            let terms = positive_dots(&x_squares, &squares(&values, w_most), inner);
            // The squares were brought into f32's range.
            let back = (x_most * w_most).powi(2);
            Ok((first, dots, terms.into_iter().map(|sum| f64::from(sum) * back).collect()))
        })
        .collect::<Result<_, ComputeError>>()?;
    let width = w.rows;
    let (mut dots, mut terms) = (vec![0.0; x.rows * width], vec![0.0; x.rows * width]);
    for (first, some_dots, some_terms) in chunks {
        let count = some_dots.len() / x.rows.max(1);
        for row in 0..x.rows {
            let (from, to) = (row * count, row * width + first);
            dots[to..to + count].copy_from_slice(&some_dots[from..from + count]);
            terms[to..to + count].copy_from_slice(&some_terms[from..from + count]);
        }
    }
    Ok(Exact { width, dots, terms })
}

/// The products of x with signed sums of `count` rows of w each, and for each the sum of
/// the squared products of those rows: `[x rows, ceil(w rows / count)]`.
///
/// # Errors
/// If the operands have different K.
pub fn signed_sums(
    x: &CodedTensor,
    w: &CodedTensor,
    signs: &[f64],
    count: usize,
) -> Result<Exact, ComputeError> {
    check_inner(x, w)?;
    let inner = x.width;
    let starts: Vec<usize> = (0..w.rows).step_by(count).collect();
    let sums: Vec<(Vec<f64>, Vec<f64>)> = starts
        .par_iter()
        .map(|&first| {
            let rows = first..(first + count).min(w.rows);
            let (mut sum, mut squares) = (vec![0.0; inner], vec![0.0; inner]);
            for row in rows {
                let values = wide_rows(w, row..row + 1);
                for ((sum, square), value) in sum.iter_mut().zip(&mut squares).zip(values) {
                    *sum += signs[row] * value;
                    *square += value * value;
                }
            }
            (sum, squares)
        })
        .collect();
    let width = sums.len();
    let (sums, squares): (Vec<Vec<f64>>, Vec<Vec<f64>>) = sums.into_iter().unzip();
    let (sums, squares) = (sums.concat(), squares.concat());
    let x_values = wide_rows(x, 0..x.rows);
    let x_squares: Vec<f64> = x_values.iter().map(|value| value * value).collect();
    let blocks = |values: &[f64], against: &[f64]| {
        let against = Widened::of_f64(against, inner);
        let some: Vec<Vec<f64>> = values
            .par_chunks(inner * CHUNK_ROWS)
            .map(|values| dot_rows(&Widened::of_f64(values, inner), &against))
            .collect();
        some.concat()
    };
    let (dots, terms) = (blocks(&x_values, &sums), blocks(&x_squares, &squares));
    Ok(Exact { width, dots, terms })
}

/// The product in f64 over what the codes stand for, rounded once to f32.
///
/// # Errors
/// If the operands have different K.
pub fn reference(x: &CodedTensor, w: &CodedTensor) -> Result<Tensor, ComputeError> {
    let exact = exact(x, w)?;
    Ok(Tensor::new(exact.width, exact.dots.into_iter().map(|dot| dot as f32).collect()))
}

/// What some rows stand for; a code times its scale is exact in f64.
fn wide_rows(operand: &CodedTensor, rows: Range<usize>) -> Vec<f64> {
    let (format, width, size) = (operand.format, operand.width, operand.format.bytes());
    let decode = |code: &[u8]| {
        let mut word = [0; 4];
        word[..code.len()].copy_from_slice(code);
        f64::from(format.decode(u32::from_le_bytes(word)))
    };
    let bytes = &operand.bytes[rows.start * width * size..rows.end * width * size];
    let mut values: Vec<f64> = bytes.chunks_exact(size).map(decode).collect();
    if let Some(scales) = &operand.scales {
        for (row, values) in rows.zip(values.chunks_exact_mut(width)) {
            for (block, values) in values.chunks_mut(scales.width_per_block).enumerate() {
                let scale = f64::from(scales.at(row, block * scales.width_per_block));
                values.iter_mut().for_each(|value| *value *= scale);
            }
        }
    }
    values
}

/// The largest finite magnitude; 1 where there is none but zero.
fn most(values: &[f64]) -> f64 {
    let finite = values.iter().map(|value| value.abs()).filter(|size| size.is_finite());
    let most = finite.fold(0.0, |most, size| if size > most { size } else { most });
    if most > 0.0 { most } else { 1.0 }
}

fn squares(values: &[f64], most: f64) -> Vec<f32> {
    values.iter().map(|value| (value / most).powi(2) as f32).collect()
}

/// A product as a chip computes it.
pub struct Made {
    /// The outputs.
    pub y: Tensor,
    /// The arithmetic in words.
    pub words: String,
    /// Whether they are the observed outputs in every bit; true where none were observed.
    pub exact: bool,
}

/// The product as the recipe's chip computes it, and its arithmetic in words.
/// `observed` are an engine's outputs as its file stores them: then schedule and
/// output type are theirs, not the recipe's.
///
/// # Errors
/// If the chip does not multiply these formats, or the shapes do not fit.
pub fn emulated(
    x: &CodedTensor,
    w: &CodedTensor,
    observed: Option<&CodedTensor>,
    recipe: &Recipe,
) -> Result<Made, ComputeError> {
    check_inner(x, w)?;
    let chip = chip(recipe.chip);
    let unit = match (block_format(x), block_format(w)) {
        (Some(format), Some(other)) if format == other => {
            chip.block_unit(format).map(|row| &row.unit)
        }
        (None, None) => chip.unit(x.format, w.format),
        _ => None,
    };
    let unit = unit.ok_or_else(|| {
        ComputeError::Recipe(format!(
            "the chip `{}` does not multiply {} by {}; choose another `chip`",
            chip.name, x.format, w.format
        ))
    })?;
    let (x_codes, w_codes) = (codes(x)?, codes(w)?);
    let x = Operand { codes: &x_codes, scales: known_scales(x)? };
    let w = Operand { codes: &w_codes, scales: known_scales(w)? };
    let Some(observed) = observed else {
        let schedule = match unit {
            Unit::BlockScaled(_) => Schedule::FAST.with_split_k(recipe.pin.parts()),
            _ => Schedule::of(&Recipe { gemm: x_codes.format(), ..*recipe }),
        };
        let y = gemm(unit, &schedule, &x, &w, recipe.output)?;
        let formats = in_words(x_codes.format(), w_codes.format());
        let words = format!("{} {formats}, {schedule}", chip.name);
        return Ok(Made { y, words, exact: true });
    };
    let output = output_of(observed, recipe)?;
    let found = identify(unit, &x, &w, output, &observed.values())?;
    let y = gemm(unit, &found.schedule, &x, &w, output)?;
    let words = format!("{} {found}; of {} schedules tried", chip.name, found.tried);
    Ok(Made { y, words, exact: found.is_exact() })
}

fn in_words(x: Format, w: Format) -> String {
    if x == w { x.to_string() } else { format!("{x} x {w}") }
}

/// The type that the engine's epilogue wrote: the stored one, unless a program
/// widened it to f32 on the way into the file and every value is the recipe's still.
fn output_of(observed: &CodedTensor, recipe: &Recipe) -> Result<Format, ComputeError> {
    match observed.format {
        Format::Bf16 | Format::F16 => Ok(observed.format),
        Format::F32 if recipe.output == Format::Bf16 => {
            let narrow = |value: &f32| value.to_bits() & BELOW_BF16 == 0;
            let all = observed.values().data().iter().all(narrow);
            Ok(if all { Format::Bf16 } else { Format::F32 })
        }
        Format::F32 => Ok(Format::F32),
        other => Err(ComputeError::Recipe(format!(
            "a GEMM's outputs are f32, bf16 or f16, and the recorded ones are {other}"
        ))),
    }
}

fn check_inner(x: &CodedTensor, w: &CodedTensor) -> Result<(), ComputeError> {
    if x.width == w.width {
        return Ok(());
    }
    Err(ComputeError::Shape {
        what: "the inner width of a product".to_owned(),
        left: format!("x [{}, {}]", x.rows, x.width),
        right: format!("w [{}, {}]", w.rows, w.width),
    })
}

/// The operand's codes, for a chip.
///
/// # Errors
/// If they do not fill the operand's shape.
pub fn codes(operand: &CodedTensor) -> Result<Codes, ComputeError> {
    let bytes = &operand.bytes;
    let data = match operand.format.bytes() {
        1 => CodeData::Bits8(bytes.clone()),
        2 => CodeData::Bits16(
            bytes.as_chunks().0.iter().map(|&word| u16::from_le_bytes(word)).collect(),
        ),
        _ => CodeData::Bits32(
            bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect(),
        ),
    };
    Codes::new(operand.format, operand.rows, operand.width, data)
        .map_err(|error| ComputeError::Recipe(error.to_string()))
}

/// The block-scaled format that an operand's codes and scales make, where a tensor core multiplies such.
pub fn block_format(operand: &CodedTensor) -> Option<BlockFormat> {
    let scales = operand.scales.as_ref().filter(|scales| scales.rows_per_block == 1)?;
    let fits = |format: &BlockFormat| {
        let codec = format.scales();
        format.element() == operand.format
            && format.block() == scales.width_per_block
            && operand.width.is_multiple_of(format.block())
            && scales.values.iter().all(|value| codec.code_of(*value).is_some())
    };
    BlockFormat::ALL.into_iter().find(fits)
}

/// The operand's scales as a chip's epilogue applies them; none where no known
/// schedule has such blocks.
pub fn scales(operand: &CodedTensor) -> Option<Scales> {
    let Some(scales) = &operand.scales else { return Some(Scales::Tensor(1.0)) };
    if scales.values.len() == 1 {
        return Some(Scales::Tensor(scales.values[0]));
    }
    if scales.is_by_row() {
        return Some(Scales::Row((0..operand.rows).map(|row| scales.at(row, 0)).collect()));
    }
    if let Some(format) = block_format(operand) {
        let codec = format.scales();
        return Some(Scales::Blocks(BlockScales {
            format,
            codes: scales.values.iter().filter_map(|value| codec.code_of(*value)).collect(),
            blocks: scales.blocks_per_row,
            whole: 1.0,
        }));
    }
    (scales.width_per_block == PROMOTED_BLOCK).then(|| Scales::Block128 {
        rows_per_block: scales.rows_per_block,
        first_row: 0,
        scales: scales.values.clone(),
    })
}

fn known_scales(operand: &CodedTensor) -> Result<Scales, ComputeError> {
    scales(operand).ok_or_else(|| {
        let words = operand.scales.as_ref().map(|s| s.in_words(operand.rows, operand.width));
        ComputeError::Recipe(format!(
            "no schedule is known that applies {}; `runner judge` holds such a product to its \
             rounding",
            words.unwrap_or_default()
        ))
    })
}
