//! A GEMM whose operands come from a file as codes with their scales.
//!
//! No conversion stands between file and tensor core, so what an engine computed
//! from these codes is met in every bit or something else happened. Where its
//! outputs are known, the schedule is identified from them. It knows no model.

use super::ComputeError;
use super::emulated::chip::chip;
use super::emulated::gemm::{Operand, Scales, gemm};
use super::emulated::identify::identify;
use super::emulated::quantize::{CodeData, Codes};
use super::emulated::schedule::Schedule;
use super::reference::{Widened, dot_rows};
use crate::dtype::Format;
use crate::op::Recipe;
use crate::tensor::Tensor;
use crate::tensor_file::CodedTensor;

/// Bits of an f32 that bf16 drops.
const BELOW_BF16: u32 = 0xffff;

/// The product in f64 over what the codes stand for, rounded once to f32.
///
/// # Errors
/// If the operands have different K.
pub fn reference(x: &CodedTensor, w: &CodedTensor) -> Result<Tensor, ComputeError> {
    check_inner(x, w)?;
    let plain = |operand: &CodedTensor| CodedTensor { scales: Vec::new(), ..operand.clone() };
    let wide = |operand: &CodedTensor| Widened::of(plain(operand).values().data(), operand.width);
    let dots = dot_rows(&wide(x), &wide(w));
    let scale = |scales: &[f32], row: usize| match scales {
        [] => 1.0,
        [scale] => f64::from(*scale),
        scales => f64::from(scales[row]),
    };
    let value = |(index, dot): (usize, f64)| {
        let (row, column) = (index / w.rows, index % w.rows);
        (dot * scale(&x.scales, row) * scale(&w.scales, column)) as f32
    };
    Ok(Tensor::new(w.rows, dots.into_iter().enumerate().map(value).collect()))
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
) -> Result<(Tensor, String), ComputeError> {
    check_inner(x, w)?;
    let chip = chip(recipe.chip);
    let unit = chip.unit(x.format, w.format).ok_or_else(|| {
        ComputeError::Recipe(format!(
            "the chip `{}` does not multiply {} by {}; choose another `chip`",
            chip.name, x.format, w.format
        ))
    })?;
    let (x_codes, w_codes) = (codes(x)?, codes(w)?);
    let x = Operand { codes: &x_codes, scales: scales(x) };
    let w = Operand { codes: &w_codes, scales: scales(w) };
    let Some(observed) = observed else {
        let schedule = Schedule::of(&Recipe { gemm: x_codes.format(), ..*recipe });
        let y = gemm(unit, &schedule, &x, &w, recipe.output)?;
        let formats = in_words(x_codes.format(), w_codes.format());
        return Ok((y, format!("{} {formats}, {schedule}", chip.name)));
    };
    let output = output_of(observed, recipe)?;
    let found = identify(unit, &x, &w, output, &observed.values())?;
    let y = gemm(unit, &found.schedule, &x, &w, output)?;
    Ok((y, format!("{} {found}; of {} schedules tried", chip.name, found.tried)))
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

fn codes(operand: &CodedTensor) -> Result<Codes, ComputeError> {
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

fn scales(operand: &CodedTensor) -> Scales {
    match operand.scales.as_slice() {
        [] => Scales::Tensor(1.0),
        [scale] => Scales::Tensor(*scale),
        scales => Scales::Row(scales.to_vec()),
    }
}
