//! The emulated GEMM with some of its steps replaced: what a bug would return.
//!
//! It knows how conversion, schedule and epilogue follow on each other, not
//! which departure is a bug, nor what anybody measured.

use std::ops::Range;

use rayon::prelude::*;

use super::emulated::arm::Emulated;
use super::emulated::chip::chip;
use super::emulated::gemm::{Operand, Scales, gemm_prepared, prepare};
use super::emulated::quantize::{BlockScales, CodeData, Codes};
use super::emulated::ranks;
use super::emulated::schedule::Schedule;
pub use super::emulated::steps::{Converted, Edit, Steps, Whole, keep};
use super::{ComputeError, check_matmul, parallel};
use crate::dtype::Format;
use crate::model::Weight;
use crate::op::Recipe;
use crate::tensor::Tensor;

/// Rows of a weight that are multiplied at a time; whole blocks of scales.
const CHUNK_ROWS: usize = 256;
/// Elements of K that share a block scale.
pub const BLOCK: usize = 128;

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
    if let Some(engine) = arm.engine() {
        let prescribed = Schedule::of(recipe);
        let y = engine.fp8_rows((x, weight, bias), rows.clone(), steps, prescribed)?;
        if let Some(y) = y {
            return Ok(y);
        }
        if recipe.gemm.is_fp8() {
            // The engine multiplies by this weight as the stream holds it.
            let recipe = Recipe { gemm: recipe.stream.unwrap_or(recipe.output), ..*recipe };
            let schedule = match steps.schedule == prescribed {
                true => Schedule::of(&recipe),
                false => steps.schedule,
            };
            let steps = Steps { schedule, ..*steps };
            let arm = Emulated::new(&recipe)?;
            return matmul_rows(&arm, &recipe, (x, weight, bias), rows, &steps);
        }
    }
    if let Some(of_weight) = arm.of_weight(&weight)? {
        let (recipe_here, recipe) = (recipe, of_weight.recipe());
        // A schedule that is the recipe's own is that of the weight's.
        let schedule = match steps.schedule == Schedule::of(recipe_here) {
            true => Schedule::of(recipe),
            false => steps.schedule,
        };
        let steps = Steps { schedule, ..*steps };
        return matmul_rows(&of_weight, recipe, (x, weight, bias), rows, &steps);
    }
    let bias = bias.map(|bias| bias.to_vec()).transpose()?;
    let whole = arm.absmax_of(weight)?;
    let width = weight.width();
    // A product that one GPU computes alone is of one part.
    let dealt = parallel::parts(recipe, &weight)?;
    let parts = dealt.clone().unwrap_or_else(|| parallel::alone(width));
    let of_x: Vec<Tensor> = match &dealt {
        Some(parts) => parts.iter().map(|inner| x.columns(inner.clone())).collect(),
        None => vec![x.clone()],
    };
    let edited: Vec<Converted<'_>> = parts
        .iter()
        .zip(&of_x)
        .map(|(inner, x)| {
            let (codes, scales) = arm.quantise_activation(x);
            let (first_row, first_inner) = (0, inner.start);
            (steps.x)(Converted { values: x.data(), codes, scales, first_row, first_inner })
        })
        .collect();
    let starts: Vec<usize> = rows.clone().step_by(CHUNK_ROWS).collect();
    let chunks: Vec<(usize, Vec<Tensor>)> = starts
        .into_par_iter()
        .map(|start| {
            let range = start..(start + CHUNK_ROWS).min(rows.end);
            let mut values = vec![0.0; range.len() * width];
            weight.decode_rows(range, &mut values)?;
            let (codes, scales) = arm.quantise_weight_rows(weight, start, &values, whole);
            let (first_row, first_inner) = (start, 0);
            let w = Converted { values: &values, codes, scales, first_row, first_inner };
            let w = (steps.w)(w);
            let of_parts = edited.iter().zip(&parts).enumerate().map(|(part, (x, inner))| {
                let (x_format, w_format) = (x.codes.format(), w.codes.format());
                let chip = chip(recipe.chip);
                let unit = match &w.scales {
                    Scales::Blocks(scales) => chip.block_unit(scales.format).map(|row| &row.unit),
                    _ => chip.unit(x_format, w_format),
                };
                let unit = unit.ok_or_else(|| {
                    ComputeError::Recipe(format!("no unit multiplies {x_format} by {w_format}"))
                })?;
                let x = prepare(unit, &Operand { codes: &x.codes, scales: x.scales.clone() })?;
                let output = arm.before_bias(steps.output, part == 0 && bias.is_some());
                if dealt.is_none() {
                    let w = Operand { codes: &w.codes, scales: w.scales.clone() };
                    return Ok(gemm_prepared(&steps.schedule, &x, &w, output)?);
                }
                let codes = w.codes.some_columns(inner.clone());
                let scales = ranks::scales_of_part(&w.scales, inner, width);
                let w = Operand { codes: &codes, scales };
                Ok(gemm_prepared(&steps.schedule, &x, &w, output)?)
            });
            Ok((start, of_parts.collect::<Result<_, ComputeError>>()?))
        })
        .collect::<Result<_, ComputeError>>()?;
    let mut of_parts = vec![Tensor::zeros(x.rows(), rows.len()); parts.len()];
    for (start, chunks) in chunks {
        for (y, chunk) in of_parts.iter_mut().zip(&chunks) {
            y.set_columns(start - rows.start, chunk);
        }
    }
    if let (Some(bias), Some(y)) = (bias, of_parts.first_mut()) {
        y.add_to_rows(&bias[rows]);
    }
    let y = match of_parts.as_mut_slice() {
        [y] => std::mem::replace(y, Tensor::zeros(0, 1)),
        _ => ranks::sum_by_rank(of_parts, steps.output),
    };
    // Another output than the recipe's is rounded to the stream's type by the caller.
    Ok(if steps.output == recipe.output { arm.streamed(y) } else { y })
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
        let exact = operand.values[row * width + column] / operand.scales.at(row, column, width);
        match format.decode(code).abs() > exact.abs() {
            // Of two's complement the next code towards zero.
            true if format == Format::Int8 && code & 0x80 != 0 => (code + 1) & 0xff,
            // Of the kind without a negative zero.
            true if format.is_fnuz() && code == 0x81 => 0,
            true => code - 1,
            false => code,
        }
    });
    Converted { codes, ..operand }
}

/// Codes below the normal range replaced by zero; integers have none.
pub fn flushed(operand: Converted<'_>) -> Converted<'_> {
    let format = operand.codes.format();
    if format == Format::Int8 {
        return operand;
    }
    let magnitude = u32::MAX >> (33 - format.bits());
    let codes = recoded(&operand.codes, format, |_, _, code| {
        let zero = if format.is_fnuz() { 0 } else { code & !magnitude };
        let is_small = code != zero && code & magnitude < 1 << format.fraction_bits();
        if is_small && !(format.is_fnuz() && code == 0x80) { zero } else { code }
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
    let first = operand.first_inner;
    let codes = recoded(
        &operand.codes,
        format,
        |_, column, code| {
            if kept(first + column) { code } else { 0 }
        },
    );
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

/// Where scales are powers of two by prescription: codes of the scales before they were rounded up,
/// the rounded ones beside them. Elsewhere the scales rounded up, the codes as they are.
pub fn rounded_up_beside_codes(operand: Converted<'_>) -> Converted<'_> {
    let are_powers = |scales: &[f32]| scales.iter().all(|scale| scale.to_bits() & 0x7f_ffff == 0);
    let (rows_per_block, scales) = match &operand.scales {
        Scales::Row(scales) if are_powers(scales) => (1, scales),
        Scales::Block128 { rows_per_block, scales, .. } if are_powers(scales) => {
            (*rows_per_block, scales)
        }
        _ => return scaled(operand, up_to_power_of_two),
    };
    let (format, width) = (operand.codes.format(), operand.codes.width());
    let by_row = matches!(operand.scales, Scales::Row(_));
    let length = if by_row { width } else { BLOCK };
    let blocks = width.div_ceil(length);
    let mut most = vec![0f32; scales.len()];
    for (index, value) in operand.values.iter().enumerate() {
        let (row, column) = (index / width, index % width);
        let most = &mut most[row / rows_per_block * blocks + column / length];
        *most = most.max(value.abs());
    }
    let codes = recoded(&operand.codes, format, |row, column, code| {
        let most = most[row / rows_per_block * blocks + column / length];
        let value = operand.values[row * width + column];
        if most > 0.0 { format.encode(value / (most / format.max_finite())) } else { code }
    });
    Converted { codes, ..operand }
}

/// Converted again with scales times `factor`: below 1 large values saturate.
pub fn requantised(operand: Converted<'_>, factor: f32) -> Converted<'_> {
    let (format, width) = (operand.codes.format(), operand.codes.width());
    let scales = changed_scales(&operand.scales, |scale| scale * factor);
    let codes = recoded(&operand.codes, format, |row, column, _| {
        format.encode(operand.values[row * width + column] / scales.at(row, column, width))
    });
    Converted { codes, scales, ..operand }
}

/// Integers converted again with scales times `factor`, by a cast that keeps the low eight bits: below 1
/// large values change their sign where they must saturate.
pub fn wrapped(operand: Converted<'_>, factor: f32) -> Converted<'_> {
    let width = operand.codes.width();
    let scales = changed_scales(&operand.scales, |scale| scale * factor);
    let codes = recoded(&operand.codes, Format::Int8, |row, column, _| {
        let value = operand.values[row * width + column] / scales.at(row, column, width);
        u32::from(value.round_ties_even() as i32 as u8)
    });
    Converted { codes, scales, ..operand }
}

/// Values on a grid of 256 steps from the smallest to the largest of those that share a scale, with the
/// zero point that such a grid has, and sums from which the zero point was not taken away.
pub fn zero_point_ignored(operand: Converted<'_>) -> Converted<'_> {
    let width = operand.codes.width().max(1);
    let together = match &operand.scales {
        Scales::Tensor(_) => operand.values.len().max(1),
        Scales::Row(_) => width,
        Scales::Block128 { .. } | Scales::Blocks(_) => return operand,
    };
    let grids: Vec<(f32, f32)> = operand.values.chunks(together).map(grid).collect();
    let codes = recoded(&operand.codes, Format::Int8, |row, column, _| {
        let place = row * width + column;
        let (scale, zero) = grids[place / together];
        Format::Int8.encode((operand.values[place] / scale).round_ties_even() + zero)
    });
    let scales = match &operand.scales {
        Scales::Row(_) => Scales::Row(grids.iter().map(|(scale, _)| *scale).collect()),
        _ => Scales::Tensor(grids.first().map_or(1.0, |(scale, _)| *scale)),
    };
    Converted { codes, scales, ..operand }
}

/// The step of a grid of 256 values that holds zero, and the code of zero: as vLLM's
/// `dynamic_scaled_int8_azp_quant` has them.
fn grid(values: &[f32]) -> (f32, f32) {
    let least = values.iter().fold(0.0f32, |least, &x| if x < least { x } else { least });
    let most = values.iter().fold(0.0f32, |most, &x| if x > most { x } else { most });
    let step = (most - least) / 255.0;
    if !(step > 0.0 && step.is_finite()) {
        return (1.0, 0.0);
    }
    (step, -128.0 - (least / step).round_ties_even())
}

/// The scales of other rows, or of another weight, in place of an operand's own.
pub fn with_scales_of<'v>(operand: Converted<'v>, whole: &Scales) -> Converted<'v> {
    let (first_row, rows) = (operand.first_row, operand.codes.rows());
    let scales = match whole {
        Scales::Tensor(scale) => Scales::Tensor(*scale),
        Scales::Row(scales) => match scales.get(first_row..first_row + rows) {
            Some(scales) => Scales::Row(scales.to_vec()),
            None => return operand,
        },
        Scales::Block128 { rows_per_block, scales, .. } => {
            let blocks = operand.codes.width().div_ceil(BLOCK);
            if (first_row + rows).div_ceil(*rows_per_block) * blocks > scales.len() {
                return operand;
            }
            let (rows_per_block, scales) = (*rows_per_block, scales.clone());
            Scales::Block128 { rows_per_block, first_row, scales }
        }
        Scales::Blocks(whole) => {
            let of_rows = first_row * whole.blocks..(first_row + rows) * whole.blocks;
            match whole.codes.get(of_rows) {
                Some(codes) => {
                    Scales::Blocks(BlockScales { codes: codes.to_vec(), ..whole.clone() })
                }
                None => return operand,
            }
        }
    };
    Converted { scales, ..operand }
}

/// Converted again with one scale for all of these rows, `factor` times their largest, by a cast that
/// makes NaN of what is too large, as E4M3's does: a scale that was set beforehand, and too small.
pub fn unsaturated(operand: Converted<'_>, factor: f32) -> Converted<'_> {
    let format = operand.codes.format();
    // Half a step beyond the largest value; E4M3's largest has an even code, to which ties go.
    let most = format.max_finite();
    let step = most - format.decode(format.encode(most) - 1);
    let largest = match &operand.scales {
        Scales::Tensor(scale) => *scale,
        // Nothing of a block-scaled format is set beforehand but its scale of the whole.
        Scales::Blocks(_) => return operand,
        Scales::Row(scales) | Scales::Block128 { scales, .. } => {
            scales.iter().copied().fold(0.0, f32::max)
        }
    };
    let set = scaled(operand, |_| factor * largest);
    let cut = requantised(set, 1.0);
    let (width, nan) = (cut.codes.width(), format.encode(f32::NAN));
    let codes = recoded(&cut.codes, format, |row, column, code| {
        let value = cut.values[row * width + column] / cut.scales.at(row, column, width);
        if value.abs() > most + 0.5 * step { nan } else { code }
    });
    Converted { codes, ..cut }
}

/// Codes read as the format of the same width whose exponent bias is one larger and whose
/// negative zero is its only NaN (`e4m3fnuz`, `e5m2fnuz`).
pub fn read_as_fnuz(operand: Converted<'_>) -> Converted<'_> {
    let format = operand.codes.format();
    let nan = format.encode(f32::NAN);
    let codes = recoded(&operand.codes, format, |_, _, code| if code == 0x80 { nan } else { code });
    scaled(Converted { codes, ..operand }, |scale| 0.5 * scale)
}

/// The largest value of `e4m3fnuz`.
pub const MOST_E4M3FNUZ: f32 = 240.0;

/// Codes of at most that magnitude.
pub fn clipped(operand: Converted<'_>, most: f32) -> Converted<'_> {
    let format = operand.codes.format();
    let codes = recoded(&operand.codes, format, |_, _, code| {
        let value = format.decode(code);
        if value.abs() > most { format.encode(most.copysign(value)) } else { code }
    });
    Converted { codes, ..operand }
}

/// Both operands of a GEMM after their conversion.
///
/// # Errors
/// If the weight cannot be read.
pub fn operands(
    arm: &Emulated,
    x: &Tensor,
    weight: Weight<'_>,
) -> Result<[Whole; 2], ComputeError> {
    if let Some(engine) = arm.engine()
        && let Some(operands) = engine.fp8_operands(x, weight)?
    {
        return Ok(operands);
    }
    if let Some(arm) = arm.of_weight(&weight)? {
        return operands(&arm, x, weight);
    }
    let whole = arm.absmax_of(weight)?;
    let (w_codes, w_scales) = arm.quantise_weight_rows(weight, 0, &weight.to_vec()?, whole);
    let (x_codes, x_scales) = arm.quantise_activation(x);
    Ok([(x_codes, x_scales, 0), (w_codes, w_scales, 0)])
}

/// `x w^T + bias` where both operands' scales make one factor, `factor` of their product: it is
/// applied to the sum of each block of 128 where there are blocks, and to the whole sum elsewhere.
///
/// # Errors
/// If the weight cannot be read, or the operands do not fit.
pub fn matmul_by_factor(
    arm: &Emulated,
    recipe: &Recipe,
    (x, weight, bias): (&Tensor, Weight<'_>, Option<Weight<'_>>),
    factor: impl Fn(f32) -> f32 + Sync,
) -> Result<Tensor, ComputeError> {
    check_matmul(x, &weight, bias.as_ref())?;
    let [(x, x_scales, _), (w, w_scales, before)] = operands(arm, x, weight)?;
    let (width, outputs) = (x.width(), weight.rows());
    if matches!(w_scales, Scales::Blocks(_)) {
        return Err(ComputeError::Recipe(
            "the unit applies the scales of blocks itself".to_owned(),
        ));
    }
    let by_block = [&x_scales, &w_scales].iter().any(|s| matches!(s, Scales::Block128 { .. }));
    let schedule = if by_block { Schedule::FAST } else { Schedule::of(recipe) };
    let length = if by_block { BLOCK } else { width };
    let unit = chip(recipe.chip).unit(x.format(), w.format()).ok_or_else(|| {
        ComputeError::Recipe(format!("no unit multiplies {} by {}", x.format(), w.format()))
    })?;
    let mut y = Tensor::zeros(x.rows(), outputs);
    for (block, start) in (0..width).step_by(length).enumerate() {
        let inner = start..(start + length).min(width);
        let bare = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
        let (x_part, w_part) = (x.some_columns(inner.clone()), w.some_columns(inner));
        let x_part = prepare(unit, &bare(&x_part))?;
        let sums = gemm_prepared(&schedule, &x_part, &bare(&w_part), Format::F32)?;
        for row in 0..y.rows() {
            let of_x = x_scales.at(row, block * BLOCK, width);
            for (column, y) in y.row_mut(row).iter_mut().enumerate() {
                let own = before + column;
                *y += sums.row(row)[own] * factor(of_x * w_scales.at(own, block * BLOCK, width));
            }
        }
    }
    let output = arm.before_bias(recipe.output, bias.is_some());
    y.data_mut().iter_mut().for_each(|y| *y = output.round(*y));
    if let Some(bias) = bias {
        y.add_to_rows(&bias.to_vec()?);
    }
    Ok(arm.streamed(y))
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
        // The scales of blocks are codes: what is changed is the scale of the whole.
        Scales::Blocks(scales) => {
            let whole = change(scales.whole);
            Scales::Blocks(BlockScales { whole, ..scales.clone() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        emulate: None,
        codes: crate::op::Codes::Made,
        pin: Pin::NONE,
        kv_cache: None,
        tensor_parallel: None,
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
    fn some_columns_of_an_engines_product_are_those_of_the_whole() {
        use crate::engine::EngineFile;
        use crate::model::Model;
        use crate::model::synthetic::{Preset, write};
        use std::path::Path;

        let mut file = Vec::new();
        write(Preset::Qwen2Tiny, 1, &mut file).expect("a synthetic model");
        let model = Model::from_bytes(Path::new("qwen2-tiny"), &file).expect("a model");
        let x = Tensor::new(256, values(7 * 256, 1));
        for engine in ["vllm-fp8", "vllm-fp8-channel", "vllm-fp8-block", "sglang-fp8", "torchao"] {
            let found = EngineFile::find(engine, Path::new(".")).expect("ships");
            let (mut kernels, stream) = found.known().expect("known");
            // The prompt's rows and three decoded ones: calls of their own.
            kernels.decoded = 3;
            let recipe = Recipe::of_engine(kernels, stream);
            let arm = Emulated::new(&recipe).expect("a recipe");
            for name in ["attn_q", "attn_k", "ffn_up"] {
                let weight = model.tensor(&format!("blk.1.{name}.weight")).expect("a weight");
                let bias = model.tensor(&format!("blk.1.{name}.bias")).ok();
                let whole = arm.matmul(&x, weight, bias).expect("a product");
                let (operands, steps) = ((&x, weight, bias), Steps::of(&recipe));
                for rows in [0..weight.rows(), 0..weight.rows().min(128), 128..weight.rows()] {
                    if rows.is_empty() {
                        continue;
                    }
                    let some = matmul_rows(&arm, &recipe, operands, rows.clone(), &steps);
                    let some = some.expect("a product");
                    assert_eq!(some, whole.columns(rows.clone()), "{engine}, {name}, {rows:?}");
                }
            }
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
                first_row: 0,
                first_inner: 0,
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
