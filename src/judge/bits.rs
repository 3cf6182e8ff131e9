//! Whether a product's outputs are the bits of a known schedule.
//!
//! Every schedule of every chip is tried on a sample that holds the telling values, those
//! that are not simply the exact sum rounded; what survives is confirmed on as many
//! values as there is time for, and how many that were is said.

use serde::Serialize;

use super::exam::Exam;
use crate::compute::ComputeError;
use crate::compute::emulated::chip::{CHIPS, Unit};
use crate::compute::emulated::gemm::{Operand, Scales, gemm_prepared, prepare};
use crate::compute::emulated::identify::{family, spread};
use crate::compute::emulated::schedule::Schedule;
use crate::compute::product::{block_format, codes, scales};
use crate::dtype::Format;
use crate::op::ChipName;
use crate::tensor::Tensor;
use crate::tensor_file::CodedTensor;

/// Rows of x and of w in the sample, beside the telling ones.
const SAMPLE: (usize, usize) = (4, 16);
/// Telling values whose rows and columns the sample holds.
const TELLING: usize = 16;
/// Rows of x and of w on which a schedule is confirmed where all would take too long.
const CONFIRMED: (usize, usize) = (64, 128);
/// Products that are computed to confirm a schedule on all values.
const AFFORDABLE: usize = 1 << 29;
/// Schedules that are confirmed.
const MOST_CONFIRMED: usize = 8;

/// A product's epilogue.
#[derive(Clone, Debug)]
pub struct Epilogue {
    /// What the sum is multiplied with.
    pub alpha: f32,
    /// What is added, one value per column.
    pub bias: Option<Vec<f32>>,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Bits {
    /// The schedule whose bits these are.
    pub schedule: Option<String>,
    /// Others that are equally exact.
    pub also: Vec<String>,
    /// What was tried, in words.
    pub tried: Vec<String>,
    /// Schedules that were tried; those with equal steps count once.
    pub count: usize,
    /// Values on which each was tried.
    pub sampled: usize,
    /// Values on which the schedule was confirmed.
    pub confirmed: usize,
    /// The nearest schedule, where none fits, with the values of the sample that differ.
    pub nearest: Option<(String, usize)>,
}

/// One schedule of one unit.
struct Candidate {
    name: String,
    unit: Unit,
    schedule: Schedule,
    /// Whether it multiplies the operands' values as f32, on the CUDA cores.
    widened: bool,
}

/// Looks for the schedule.
///
/// # Errors
/// If the operands cannot be multiplied at all.
pub fn look(
    x: &CodedTensor,
    w: &CodedTensor,
    exam: &Exam,
    epilogue: &Epilogue,
    chips: &[ChipName],
    all: bool,
) -> Result<Bits, ComputeError> {
    let (rows, width) = (exam.y.rows(), exam.y.width());
    let mut bits = Bits::default();
    let exact = (0..rows * width).all(|index| same(exam.y.data()[index], exam.rounded(index)));
    let once = format!("the exact result, rounded once to {}", exam.output);
    bits.tried.push(once.clone());
    bits.count += 1;
    let candidates = candidates(x, w, chips, &mut bits)?;
    let (some_rows, some_columns) = sample(exam);
    bits.sampled = some_rows.len() * some_columns.len();
    let (x_some, w_some) = (x.select_rows(&some_rows), w.select_rows(&some_columns));
    let observed = |row: usize, column: usize| exam.y.row(some_rows[row])[some_columns[column]];
    let operands = (&x_some, &w_some);
    let tried = differing(&candidates, operands, &some_columns, epilogue, exam.output, &observed)?;
    let mut surviving: Vec<&Candidate> = Vec::new();
    for (candidate, differ) in candidates.iter().zip(&tried) {
        if *differ == 0 {
            surviving.push(candidate);
        } else if bits.nearest.as_ref().is_none_or(|(_, least)| differ < least) {
            bits.nearest = Some((candidate.name.clone(), *differ));
        }
    }
    surviving.truncate(MOST_CONFIRMED);
    let mut found: Vec<String> = Vec::new();
    if exact {
        found.push(once);
        bits.confirmed = rows * width;
    }
    let afford = all || rows * width * x.width * surviving.len().max(1) <= AFFORDABLE;
    let (x_rows, w_rows) = match afford {
        true => ((0..rows).collect(), (0..width).collect()),
        false => (spread(rows, CONFIRMED.0), spread(width, CONFIRMED.1)),
    };
    if !surviving.is_empty() {
        let (x_some, w_some) = (x.select_rows(&x_rows), w.select_rows(&w_rows));
        let operands = (&x_some, &w_some);
        let observed = |row: usize, column: usize| exam.y.row(x_rows[row])[w_rows[column]];
        for candidate in surviving {
            let one = std::slice::from_ref(candidate);
            let differ = differing(one, operands, &w_rows, epilogue, exam.output, &observed)?;
            if differ == [0] {
                found.push(candidate.name.clone());
                bits.confirmed = bits.confirmed.max(x_rows.len() * w_rows.len());
            } else if bits.nearest.is_none() {
                bits.nearest = Some((candidate.name.clone(), 0));
            }
        }
    }
    let mut found = found.into_iter();
    bits.schedule = found.next();
    bits.also = found.collect();
    Ok(bits)
}

fn candidates(
    x: &CodedTensor,
    w: &CodedTensor,
    chips: &[ChipName],
    bits: &mut Bits,
) -> Result<Vec<Candidate>, ComputeError> {
    let mut units: Vec<(Unit, Vec<&str>)> = Vec::new();
    let blocks = block_format(x);
    for chip in CHIPS.iter().filter(|chip| chips.contains(&chip.name)) {
        let unit = match blocks {
            Some(format) if block_format(w) == Some(format) => {
                chip.block_unit(format).map(|row| &row.unit)
            }
            Some(_) => None,
            None => chip.unit(x.format, w.format),
        };
        let Some(unit) = unit else { continue };
        match units.iter_mut().find(|(known, _)| same_sums(known, unit)) {
            Some((_, names)) => names.push(chip.name.name()),
            None => units.push((*unit, vec![chip.name.name()])),
        }
    }
    let mut candidates = Vec::new();
    if let (Some(x_scales), Some(w_scales)) = (scales(x), scales(w)) {
        let (x_one, w_one) = (codes(&x.select_rows(&[0]))?, codes(&w.select_rows(&[0]))?);
        let by_block = [&x_scales, &w_scales].iter().any(|s| matches!(s, Scales::Block128 { .. }));
        let (x, w) = (
            Operand { codes: &x_one, scales: x_scales },
            Operand { codes: &w_one, scales: w_scales },
        );
        for (unit, names) in units.iter().filter(|(unit, _)| *unit != Unit::SequentialFma) {
            // Block scales fix the order of additions.
            let schedules = match (by_block, unit) {
                (true, _) => vec![Schedule::PROMOTED],
                (_, Unit::BlockScaled(_)) => vec![Schedule::FAST],
                _ => family(&x, &w),
            };
            let names = names.join(", ");
            bits.tried.push(format!("{} of the tensor cores of {names}", schedules.len()));
            candidates.extend(schedules.into_iter().map(|schedule| Candidate {
                name: format!("tensor core ({names}), {schedule}"),
                unit: *unit,
                schedule,
                widened: false,
            }));
        }
    } else {
        bits.tried.push("no tensor core's: no known schedule applies such block scales".into());
    }
    // On the CUDA cores any format is multiplied as f32.
    let f32_row = CodedTensor { format: Format::F32, scales: None, bytes: Vec::new(), ..*x };
    let (rows, width) = (0, f32_row.width);
    let empty = crate::compute::emulated::quantize::Codes::zeros(Format::F32, rows, width);
    let operand = Operand { codes: &empty, scales: Scales::Tensor(1.0) };
    let schedules = family(&operand, &operand);
    bits.tried.push(format!("{} of fused multiply-adds in f32", schedules.len()));
    candidates.extend(schedules.into_iter().map(|schedule| Candidate {
        name: format!("fused multiply-adds in f32, split-K {}", schedule.split_k),
        unit: Unit::SequentialFma,
        schedule,
        widened: true,
    }));
    bits.count += candidates.len();
    Ok(candidates)
}

/// Whether two units make the same sums: how many blocks one instruction takes changes
/// no bit of a chain.
fn same_sums(a: &Unit, b: &Unit) -> bool {
    match (a, b) {
        (Unit::TensorCore(a), Unit::TensorCore(b)) => {
            (a.products, a.alignment_bits, a.result_bits)
                == (b.products, b.alignment_bits, b.result_bits)
        }
        (a, b) => a == b,
    }
}

/// Rows and columns that hold the most telling values, and some that are spread evenly.
fn sample(exam: &Exam) -> (Vec<usize>, Vec<usize>) {
    let width = exam.y.width();
    let telling: Vec<usize> = (0..exam.truth.len())
        .filter(|&index| !same(exam.y.data()[index], exam.rounded(index)))
        .collect();
    let chosen: Vec<usize> =
        spread(telling.len(), TELLING).into_iter().map(|place| telling[place]).collect();
    let with = |mut lines: Vec<usize>, more: &dyn Fn(usize) -> usize| {
        lines.extend(chosen.iter().map(|&index| more(index)));
        lines.sort_unstable();
        lines.dedup();
        lines
    };
    (
        with(spread(exam.y.rows(), SAMPLE.0), &|index| index / width),
        with(spread(width, SAMPLE.1), &|index| index % width),
    )
}

/// How many values each candidate does not meet.
fn differing(
    candidates: &[Candidate],
    (x, w): (&CodedTensor, &CodedTensor),
    columns: &[usize],
    epilogue: &Epilogue,
    output: Format,
    observed: &dyn Fn(usize, usize) -> f32,
) -> Result<Vec<usize>, ComputeError> {
    let mut counts = Vec::new();
    let mut prepared = None;
    let mut of_unit = None;
    let known = scales(x).zip(scales(w));
    let (mut x_codes, mut w_codes) = (codes(x)?, codes(w)?);
    let mut is_widened = false;
    let plain = (Scales::Tensor(1.0), Scales::Tensor(1.0));
    for candidate in candidates {
        if candidate.widened && !is_widened {
            (x_codes, w_codes) = (codes(&widened(x))?, codes(&widened(w))?);
            (is_widened, of_unit) = (true, None);
        }
        let (x_scales, w_scales) = match (candidate.widened, &known) {
            (false, Some(known)) => known.clone(),
            _ => plain.clone(),
        };
        let w_operand = Operand { codes: &w_codes, scales: w_scales };
        if of_unit != Some(candidate.unit) {
            let x_operand = Operand { codes: &x_codes, scales: x_scales };
            prepared = Some(prepare(&candidate.unit, &x_operand)?);
            of_unit = Some(candidate.unit);
        }
        let Some(prepared) = &prepared else { continue };
        let y = gemm_prepared(&candidate.schedule, prepared, &w_operand, Format::F32)?;
        let y = finished(y, epilogue, columns, output);
        let all = (0..y.rows()).flat_map(|row| (0..y.width()).map(move |column| (row, column)));
        counts.push(
            all.filter(|&(row, column)| !same(y.row(row)[column], observed(row, column))).count(),
        );
    }
    Ok(counts)
}

/// The operand's values as f32.
fn widened(operand: &CodedTensor) -> CodedTensor {
    let bytes = operand.values().to_le_bytes();
    CodedTensor { format: Format::F32, bytes, scales: None, ..*operand }
}

fn finished(mut y: Tensor, epilogue: &Epilogue, columns: &[usize], output: Format) -> Tensor {
    let width = y.width();
    for (index, value) in y.data_mut().iter_mut().enumerate() {
        let bias = epilogue.bias.as_ref().map(|bias| bias[columns[index % width]]);
        let scaled = if epilogue.alpha == 1.0 { *value } else { epilogue.alpha * *value };
        *value = output.round(bias.map_or(scaled, |bias| scaled + bias));
    }
    y
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()) || (a == 0.0 && b == 0.0)
}
