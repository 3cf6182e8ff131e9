//! The emulated GEMM with some of its steps replaced: what a bug would return.
//!
//! It knows how conversion, schedule and epilogue follow on each other, not
//! which departure is a bug, nor what anybody measured.

use std::ops::Range;

use rayon::prelude::*;

use super::emulated::arm::Emulated;
use super::emulated::chip::chip;
use super::emulated::gemm::{Operand, Scales, gemm_prepared, prepare};
use super::emulated::quantize::{CodeData, Codes};
use super::emulated::schedule::Schedule;
use super::{ComputeError, check_matmul};
use crate::dtype::Format;
use crate::model::Weight;
use crate::op::Recipe;
use crate::tensor::Tensor;

/// Rows of a weight that are multiplied at a time; whole blocks of scales.
const CHUNK_ROWS: usize = 256;
/// Elements of K that share a block scale.
const BLOCK: usize = 128;

/// An operand after its conversion.
pub struct Converted<'v> {
    /// The values that were converted, row-major.
    pub values: &'v [f32],
    /// Their codes.
    pub codes: Codes,
    /// What the codes are multiplied with.
    pub scales: Scales,
}

/// What is done to an operand after its conversion.
pub type Edit<'e> = dyn Fn(Converted<'_>) -> Converted<'_> + Sync + 'e;

/// Leaves an operand as it is.
pub fn keep(operand: Converted<'_>) -> Converted<'_> {
    operand
}

/// A GEMM's steps. [`Steps::of`] is what the recipe prescribes.
pub struct Steps<'e> {
    /// After the activation's conversion.
    pub x: &'e Edit<'e>,
    /// After the conversion of some rows of the weight.
    pub w: &'e Edit<'e>,
    /// The order of additions.
    pub schedule: Schedule,
    /// The output's type.
    pub output: Format,
}

impl Steps<'_> {
    /// The steps of a recipe, none replaced.
    pub fn of(recipe: &Recipe) -> Steps<'static> {
        Steps { x: &keep, w: &keep, schedule: Schedule::of(recipe), output: recipe.output }
    }
}

/// `x w^T + bias` for some rows of the weight, by these steps: `[x rows, rows]`.
///
/// `rows` must begin at a multiple of 128.
///
/// # Errors
/// As the emulated arm's matmul.
pub fn matmul_rows(
    arm: &Emulated,
    recipe: &Recipe,
    (x, weight, bias): (&Tensor, Weight<'_>, Option<Weight<'_>>),
    rows: Range<usize>,
    steps: &Steps<'_>,
) -> Result<Tensor, ComputeError> {
    check_matmul(x, &weight, bias.as_ref())?;
    let bias = bias.map(|bias| bias.to_vec()).transpose()?;
    let whole = arm.absmax_of(weight)?;
    let (codes, scales) = arm.quantise_activation(x);
    let edited = (steps.x)(Converted { values: x.data(), codes, scales });
    let width = weight.width();
    let output = arm.before_bias(steps.output, bias.is_some());
    let starts: Vec<usize> = rows.clone().step_by(CHUNK_ROWS).collect();
    let chunks: Vec<(usize, Tensor)> = starts
        .into_par_iter()
        .map(|start| {
            let range = start..(start + CHUNK_ROWS).min(rows.end);
            let mut values = vec![0.0; range.len() * width];
            weight.decode_rows(range, &mut values)?;
            let (codes, scales) = arm.quantise_weight_rows(&values, width, whole);
            let w = (steps.w)(Converted { values: &values, codes, scales });
            let (x_format, w_format) = (edited.codes.format(), w.codes.format());
            let unit = chip(recipe.chip).unit(x_format, w_format).ok_or_else(|| {
                ComputeError::Recipe(format!("no unit multiplies {x_format} by {w_format}"))
            })?;
            let x =
                prepare(unit, &Operand { codes: &edited.codes, scales: edited.scales.clone() })?;
            let w = Operand { codes: &w.codes, scales: w.scales };
            Ok((start, gemm_prepared(&steps.schedule, &x, &w, output)?))
        })
        .collect::<Result<_, ComputeError>>()?;
    let mut y = Tensor::zeros(x.rows(), rows.len());
    for (start, chunk) in chunks {
        y.set_columns(start - rows.start, &chunk);
    }
    if let Some(bias) = bias {
        y.add_to_rows(&bias[rows]);
    }
    // Another output than the recipe's is rounded to the stream's type by the caller.
    Ok(if steps.output == recipe.output { arm.streamed(y) } else { y })
}

/// The scale of one element.
pub fn scale_at(scales: &Scales, width: usize, row: usize, column: usize) -> f32 {
    match scales {
        Scales::Tensor(scale) => *scale,
        Scales::Row(scales) => scales[row],
        Scales::Block128 { rows_per_block, scales, .. } => {
            scales[row / rows_per_block * width.div_ceil(BLOCK) + column / BLOCK]
        }
    }
}

/// Every code replaced by `change(row, column, code)`.
pub fn recoded(codes: &Codes, format: Format, change: impl Fn(usize, usize, u32) -> u32) -> Codes {
    let mut changed = Vec::with_capacity(codes.rows() * codes.width());
    for row in 0..codes.rows() {
        for (column, code) in codes.row(row).iter().enumerate() {
            changed.push(change(row, column, code));
        }
    }
    let data = match format.bytes() {
        1 => CodeData::Bits8(changed.into_iter().map(|code| code as u8).collect()),
        2 => CodeData::Bits16(changed.into_iter().map(|code| code as u16).collect()),
        _ => CodeData::Bits32(changed),
    };
    // The shape is the old one's and the width in bits is the format's.
    Codes::new(format, codes.rows(), codes.width(), data).unwrap_or_else(|_| codes.clone())
}

/// Codes of the next smaller magnitude where the conversion rounded up: a cast
/// that truncates.
pub fn truncated(operand: Converted<'_>) -> Converted<'_> {
    let (format, width) = (operand.codes.format(), operand.codes.width());
    let codes = recoded(&operand.codes, format, |row, column, code| {
        let exact =
            operand.values[row * width + column] / scale_at(&operand.scales, width, row, column);
        if format.decode(code).abs() > exact.abs() { code - 1 } else { code }
    });
    Converted { codes, ..operand }
}

/// Codes below the normal range replaced by zero.
pub fn flushed(operand: Converted<'_>) -> Converted<'_> {
    let format = operand.codes.format();
    let magnitude = u32::MAX >> (33 - 8 * format.bytes() as u32);
    let codes = recoded(&operand.codes, format, |_, _, code| {
        if code & magnitude < 1 << format.fraction_bits() { code & !magnitude } else { code }
    });
    Converted { codes, ..operand }
}

/// The same bits taken for another format of the same width.
pub fn read_as(operand: Converted<'_>, format: Format) -> Converted<'_> {
    let codes = recoded(&operand.codes, format, |_, _, code| code);
    Converted { codes, ..operand }
}

/// Codes outside `kept` (elements of K) replaced by zero.
pub fn only_inner<'v>(operand: Converted<'v>, kept: impl Fn(usize) -> bool) -> Converted<'v> {
    let format = operand.codes.format();
    let codes =
        recoded(&operand.codes, format, |_, column, code| if kept(column) { code } else { 0 });
    Converted { codes, ..operand }
}

/// Scales changed by `change`, codes left as they are: a wrong epilogue.
pub fn scaled<'v>(operand: Converted<'v>, change: impl Fn(f32) -> f32) -> Converted<'v> {
    let scales = changed_scales(&operand.scales, change);
    Converted { scales, ..operand }
}

/// The power of two at or above a scale.
pub fn up_to_power_of_two(scale: f32) -> f32 {
    2f32.powf(scale.log2().ceil())
}

/// Converted again with scales times `factor`: below 1 large values saturate.
pub fn requantised(operand: Converted<'_>, factor: f32) -> Converted<'_> {
    let (format, width) = (operand.codes.format(), operand.codes.width());
    let scales = changed_scales(&operand.scales, |scale| scale * factor);
    let codes = recoded(&operand.codes, format, |row, column, _| {
        format.encode(operand.values[row * width + column] / scale_at(&scales, width, row, column))
    });
    Converted { values: operand.values, codes, scales }
}

fn changed_scales(scales: &Scales, change: impl Fn(f32) -> f32) -> Scales {
    match scales {
        Scales::Tensor(scale) => Scales::Tensor(change(*scale)),
        Scales::Row(scales) => Scales::Row(scales.iter().map(|&scale| change(scale)).collect()),
        Scales::Block128 { rows_per_block, first_row, scales } => Scales::Block128 {
            rows_per_block: *rows_per_block,
            first_row: *first_row,
            scales: scales.iter().map(|&scale| change(scale)).collect(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::Ops;
    use crate::compute::call::MadeWeight;
    use crate::op::{Accumulate, ActivationScale, ChipName, Pin, Scale, WeightScale};

    const RECIPE: Recipe = Recipe {
        gemm: Format::E4m3,
        scale: Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor },
        accumulate: Accumulate::Promoted,
        output: Format::Bf16,
        chip: ChipName::Hopper,
        stream: None,
        engine: None,
        pin: Pin::NONE,
    };

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| draw() * draw()).collect()
    }

    #[test]
    fn without_a_departure_it_is_the_arm_itself() {
        let x = Tensor::new(160, values(480, 1));
        let made = MadeWeight::new("w".to_owned(), 300, &values(300 * 160, 2));
        let weight = made.weight().expect("a weight");
        for gemm in [Format::E4m3, Format::Bf16, Format::Tf32] {
            let recipe = Recipe { gemm, ..RECIPE };
            let arm = Emulated::new(&recipe).expect("a recipe");
            let whole = arm.matmul(&x, weight, None).expect("a product");
            let operands = (&x, weight, None);
            let steps = Steps::of(&recipe);
            let again = matmul_rows(&arm, &recipe, operands, 0..300, &steps).expect("a product");
            assert_eq!(whole, again, "{gemm}");
            let some = matmul_rows(&arm, &recipe, operands, 128..160, &steps).expect("a product");
            assert_eq!(some.row(1), &whole.row(1)[128..160], "{gemm}");
        }
    }

    #[test]
    fn a_truncating_cast_never_grows_and_flushing_leaves_no_subnormal() {
        let values = values(4096, 3);
        for format in [Format::E4m3, Format::E5m2, Format::Bf16] {
            let scale = if format.is_fp8() { 1.0 / 448.0 } else { 1.0 };
            let codes = Codes::quantize(format, 64, &values, scale).expect("whole rows");
            let of = |codes: &Codes| Converted {
                values: &values,
                codes: codes.clone(),
                scales: Scales::Tensor(scale),
            };
            let cut = truncated(of(&codes));
            let all = |codes: &Codes| -> Vec<f32> {
                (0..codes.rows()).flat_map(|row| codes.decode_row(row)).collect()
            };
            assert_ne!(cut.codes, codes, "{format}");
            for (cut, value) in all(&cut.codes).iter().zip(&values) {
                assert!(cut.abs() <= (value / scale).abs(), "{format}: {cut} {value}");
            }
            for value in all(&flushed(of(&codes)).codes) {
                assert!(value == 0.0 || value.abs() >= 2f32.powi(format.min_exponent()));
            }
        }
    }
}
