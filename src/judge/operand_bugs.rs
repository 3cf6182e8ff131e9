//! Hypotheses about how a kernel read or converted its operands: bytes in the other order,
//! another type's codes, values rounded to a narrower type.
//!
//! Each is the exact product of changed operands, on some of the wrong rows and columns.

use super::Cause;
use super::exam::Exam;
use super::looks::{Sample, ranked, towards_zero};
use super::place::Place;
use super::product::{Part, Product};
use crate::compute::ComputeError;
use crate::compute::product::exact;
use crate::dtype::Format;
use crate::tensor_file::CodedTensor;

/// Rows and columns on which a hypothesis is tried first, and then.
const SCREEN: (usize, usize) = (8, 24);
const SAMPLE: (usize, usize) = (32, 64);
/// The share of the difference that it must explain at first.
const PROMISING: f64 = 0.4;
/// The share that it must explain to be named: codes at a tie may go either way.
const EXPLAINED: f64 = 0.9;

/// A change of an operand, in words that follow its name.
struct Change {
    cause: &'static str,
    detail: String,
    make: Box<dyn Fn(&CodedTensor) -> CodedTensor>,
}

/// Tests them all; the best first.
pub(super) fn search(
    product: &Product<'_>,
    exam: &Exam,
    place: &Place,
) -> Result<Vec<Cause>, ComputeError> {
    let mut found = Vec::new();
    let samples = [SCREEN, SAMPLE].map(|most| Sample::of(exam, place, most));
    let parts = samples.each_ref().map(|sample| product.part(&sample.rows, &sample.columns));
    let [of_x, of_w] = [changes(product.x), changes(product.w)];
    let mut attempt = |cause: &str,
                       detail: String,
                       x: Option<&Change>,
                       w: Option<&Change>|
     -> Result<(), ComputeError> {
        let made = |change: Option<&Change>, operand: &CodedTensor| {
            change.map_or_else(|| operand.clone(), |change| (change.make)(operand))
        };
        for (place, (sample, part)) in samples.iter().zip(&parts).enumerate() {
            let predicted = outputs(part, &made(x, &part.x), &made(w, &part.w))?;
            let weight = sample.weigh(&predicted);
            if weight.share < PROMISING {
                return Ok(());
            }
            if place == 1 && (weight.named || weight.share >= EXPLAINED) {
                let (cause, detail) = (cause.to_owned(), detail.clone());
                found.push(Cause { cause, detail, explained: weight.share, named: true });
            }
        }
        Ok(())
    };
    for change in &of_x {
        attempt(change.cause, format!("x {}", change.detail), Some(change), None)?;
    }
    for change in &of_w {
        attempt(change.cause, format!("w {}", change.detail), None, Some(change))?;
    }
    for x in &of_x {
        if let Some(w) = of_w.iter().find(|w| (w.cause, &w.detail) == (x.cause, &x.detail)) {
            let detail = format!("x {0}, and w {0}", x.detail);
            attempt(x.cause, detail, Some(x), Some(w))?;
        }
    }
    Ok(ranked(found))
}

/// What a tensor that should be another one was converted to, without an operation.
pub(super) fn conversions(from: &CodedTensor, exam: &Exam, place: &Place) -> Vec<Cause> {
    let sample = Sample::of(exam, place, SAMPLE);
    let rows = from.select_rows(&sample.rows);
    let mut found = Vec::new();
    for change in changes(from) {
        let values = (change.make)(&rows).values();
        let each = (0..values.rows()).flat_map(|row| sample.columns.iter().map(move |&c| (row, c)));
        let predicted: Vec<f64> =
            each.map(|(row, column)| f64::from(values.row(row)[column])).collect();
        let weight = sample.weigh(&predicted);
        if weight.named || weight.share >= EXPLAINED {
            let (cause, detail) = (change.cause.to_owned(), format!("a {}", change.detail));
            found.push(Cause { cause, detail, explained: weight.share, named: true });
        }
    }
    ranked(found)
}

/// The outputs of a part with other operands.
fn outputs(part: &Part, x: &CodedTensor, w: &CodedTensor) -> Result<Vec<f64>, ComputeError> {
    let exact = exact(x, w)?;
    let alpha = f64::from(part.epilogue.alpha);
    let bias =
        |column: usize| part.epilogue.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
    let each = exact.dots.iter().enumerate();
    Ok(each.map(|(index, dot)| alpha * dot + bias(index % exact.width)).collect())
}

fn changes(operand: &CodedTensor) -> Vec<Change> {
    let mut all: Vec<Change> = Vec::new();
    let own = operand.format;
    let size = own.bytes();
    let mut add = |cause, detail: String, make: Box<dyn Fn(&CodedTensor) -> CodedTensor>| {
        all.push(Change { cause, detail, make });
    };
    if size > 1 {
        let detail = "is read with its bytes in the other order".to_owned();
        add("byte-order", detail, Box::new(|operand| by_codes(operand, swapped)));
    }
    for format in Format::FLOATS.into_iter().filter(|f| f.bytes() == size && *f != own && size < 4)
    {
        let detail = format!("({own}) is read as {format}");
        let read = move |operand: &CodedTensor| CodedTensor { format, ..operand.clone() };
        add("wrong-format", detail, Box::new(read));
    }
    if own.is_fp8() {
        let detail = "is read with the two halves of each byte exchanged".to_owned();
        add("nibble-order", detail, Box::new(|operand| by_codes(operand, nibbles)));
        let detail = format!("({own}) is read as the fnuz kind of {own}, half as large");
        add("wrong-format", detail, Box::new(|operand| mapped(operand, &|value| value / 2.0)));
        let detail = format!("({own}) is read as 8-bit integers");
        let read = |operand: &CodedTensor| {
            let mut bytes = Vec::with_capacity(4 * operand.bytes.len());
            operand.bytes.iter().for_each(|&b| bytes.extend(f32::from(b as i8).to_le_bytes()));
            scaled_values(CodedTensor { format: Format::F32, bytes, ..operand.clone() })
        };
        add("wrong-format", detail, Box::new(read));
    }
    let narrower = |format: &Format| format.fraction_bits() < own.fraction_bits();
    for format in Format::FLOATS.into_iter().filter(narrower) {
        let detail = format!("is rounded to {format}");
        let round = move |operand: &CodedTensor| mapped(operand, &|value| format.round(value));
        add("other-format", detail, Box::new(round));
        if !format.is_fp8() {
            let detail = format!("is truncated to {format}");
            let cut = move |value: f32| towards_zero(format, f64::from(value));
            add("truncating-cast", detail, Box::new(move |operand| mapped(operand, &cut)));
        }
    }
    if own.is_scaled() {
        return all;
    }
    let whole = largest(operand.values().data());
    type Round = fn(f32) -> f32;
    let codes: [(&str, f32, Round); 2] = [
        ("8-bit integers", 127.0, |value| value.round_ties_even().clamp(-127.0, 127.0)),
        ("e4m3", 448.0, |value| Format::E4m3.round(value)),
    ];
    for (name, most, round) in codes {
        for group in [Some(32), Some(64), Some(128), None] {
            let of = match group {
                Some(group) => format!("each {group} values along K"),
                None => "each row".to_owned(),
            };
            let detail = format!("is rounded to {name} with one scale for {of}");
            let make = move |operand: &CodedTensor| {
                quantised(operand, group.unwrap_or(operand.width), None, most, round)
            };
            add("other-format", detail, Box::new(make));
        }
        let detail = format!("is rounded to {name} with one scale");
        let make = move |operand: &CodedTensor| {
            quantised(operand, operand.width, Some(whole), most, round)
        };
        add("other-format", detail, Box::new(make));
    }
    all
}

fn largest(values: &[f32]) -> f32 {
    let finite = values.iter().map(|value| value.abs()).filter(|size| size.is_finite());
    finite.fold(0.0, |most, size| if size > most { size } else { most })
}

/// Values on the grid of codes with a scale for each group, absmax over the largest code.
fn quantised(
    operand: &CodedTensor,
    group: usize,
    size: Option<f32>,
    most: f32,
    round: fn(f32) -> f32,
) -> CodedTensor {
    let mut values = operand.values();
    for row in 0..values.rows() {
        for group in values.row_mut(row).chunks_mut(group) {
            let scale = size.unwrap_or_else(|| largest(group)) / most;
            if scale > 0.0 {
                group.iter_mut().for_each(|value| *value = round(*value / scale) * scale);
            }
        }
    }
    of_values(operand, values.to_le_bytes())
}

fn of_values(operand: &CodedTensor, bytes: Vec<u8>) -> CodedTensor {
    CodedTensor { format: Format::F32, bytes, scales: None, ..*operand }
}

/// What codes that were made f32 stand for, their scales applied.
fn scaled_values(operand: CodedTensor) -> CodedTensor {
    let bytes = operand.values().to_le_bytes();
    of_values(&operand, bytes)
}

fn mapped(operand: &CodedTensor, change: &dyn Fn(f32) -> f32) -> CodedTensor {
    let mut values = operand.values();
    values.data_mut().iter_mut().for_each(|value| *value = change(*value));
    of_values(operand, values.to_le_bytes())
}

/// Other bytes, code by code.
fn by_codes(operand: &CodedTensor, change: fn(&mut [u8])) -> CodedTensor {
    let mut bytes = operand.bytes.clone();
    bytes.chunks_exact_mut(operand.format.bytes()).for_each(change);
    CodedTensor { bytes, ..operand.clone() }
}

fn swapped(code: &mut [u8]) {
    code.reverse();
}

fn nibbles(code: &mut [u8]) {
    code.iter_mut().for_each(|byte| *byte = byte.rotate_left(4));
}
