//! What conversion to codes takes off an operand's values, row by row.
//!
//! A weight meets it in stretches of rows which stay in the second-level cache with all that is
//! made of them. It knows values, codes and scales; what their errors do to a product is the
//! floor's.

use std::ops::Range;

use super::emulated::gemm::Scales;
use super::emulated::quantize::{Codes, CodesRow};
use crate::dtype::Format;
use crate::tensor::Tensor;
use crate::vector::{Kernel, dispatch};

/// Columns that are looked at together, all of one scale.
const SPAN: usize = 128;
/// Values of a stretch, about.
const STRETCH_VALUES: usize = 32 * 1024;

/// Some of an operand's rows, and what they became.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// The values of these rows alone, row-major.
    pub values: &'a [f32],
    /// The number of the first one among the operand's.
    pub first: usize,
    /// Rows of `codes` and `scales` before the operand's first.
    pub before: usize,
    /// The codes of the whole operand, and of what shares blocks of scales with it.
    pub codes: &'a Codes,
    /// Its scales.
    pub scales: &'a Scales,
}

impl<'a> Rows<'a> {
    /// All rows of an operand.
    pub fn all(values: &'a [f32], codes: &'a Codes, scales: &'a Scales) -> Rows<'a> {
        Rows { values, first: 0, before: 0, codes, scales }
    }

    /// The same with codes that begin so many rows earlier.
    pub fn after(self, before: usize) -> Rows<'a> {
        Rows { before, ..self }
    }

    /// These rows in stretches.
    pub fn stretches(self) -> impl Iterator<Item = Rows<'a>> {
        let width = self.codes.width().max(1);
        let step = (STRETCH_VALUES / width).clamp(4, 256).next_multiple_of(4);
        let parts = self.values.chunks(step * width).enumerate();
        parts.map(move |(part, values)| Rows { values, first: self.first + part * step, ..self })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.values.len() / self.codes.width().max(1)
    }
}

/// The rounding error of each value, row-major, in place of what `errors` holds.
pub(super) fn rounding_errors(rows: Rows<'_>, errors: &mut Vec<f32>) {
    errors.resize(rows.values.len(), 0.0);
    dispatch(RoundingErrors { rows, errors });
}

struct RoundingErrors<'a> {
    rows: Rows<'a>,
    errors: &'a mut [f32],
}

impl Kernel for RoundingErrors<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let RoundingErrors { rows, errors } = self;
        let width = rows.codes.width();
        let lines = rows.values.chunks_exact(width).zip(errors.chunks_exact_mut(width));
        for (row, (values, errors)) in lines.enumerate() {
            let spans = values.chunks(SPAN).zip(errors.chunks_mut(SPAN));
            for (span, (values, errors)) in spans.enumerate() {
                errors_of_span(&rows, rows.first + row, span, values, errors);
            }
        }
    }
}

/// `x~ - x` of the values of one span of a row.
#[inline(always)]
fn errors_of_span(rows: &Rows<'_>, row: usize, span: usize, values: &[f32], errors: &mut [f32]) {
    let (first, row) = (span * SPAN, rows.before + row);
    let range = first..first + values.len();
    decode(rows.codes.format(), rows.codes.row(row), range, errors);
    // Blocks of 16 or 32 have scales of their own within the span.
    let (width, shared) = (rows.codes.width(), rows.scales.shared_columns().min(SPAN));
    let parts = errors.chunks_mut(shared).zip(values.chunks(shared));
    for (part, (errors, values)) in parts.enumerate() {
        let scale = rows.scales.at(row, first + part * shared, width);
        for (error, &value) in errors.iter_mut().zip(values) {
            *error = *error * scale - value;
        }
    }
}

/// The values of some codes.
#[inline(always)]
fn decode(format: Format, codes: CodesRow<'_>, range: Range<usize>, values: &mut [f32]) {
    match (codes, format) {
        (CodesRow::Bits8(codes), Format::E4m3) => {
            for (value, &code) in values.iter_mut().zip(&codes[range]) {
                *value = e4m3(code);
            }
        }
        (CodesRow::Bits8(codes), Format::Int8) => {
            for (value, &code) in values.iter_mut().zip(&codes[range]) {
                *value = f32::from(code as i8);
            }
        }
        (CodesRow::Bits8(codes), Format::E5m2) => {
            for (value, &code) in values.iter_mut().zip(&codes[range]) {
                *value = ieee::<2, 15>(u32::from(code) & 0x7f, u32::from(code) >> 7);
            }
        }
        (CodesRow::Bits8(codes), _) => {
            for (value, &code) in values.iter_mut().zip(&codes[range]) {
                *value = format.decode(u32::from(code));
            }
        }
        (CodesRow::Bits16(codes), Format::Bf16) => {
            for (value, &code) in values.iter_mut().zip(&codes[range]) {
                *value = f32::from_bits(u32::from(code) << 16);
            }
        }
        (CodesRow::Bits16(codes), _) => {
            for (value, &code) in values.iter_mut().zip(&codes[range]) {
                *value = ieee::<10, 15>(u32::from(code) & 0x7fff, u32::from(code) >> 15);
            }
        }
        (CodesRow::Bits32(codes), _) => {
            for (value, &code) in values.iter_mut().zip(&codes[range]) {
                *value = format.decode(code);
            }
        }
    }
}

/// The value of a code of E4M3, whose largest magnitude is NaN.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    let magnitude = u32::from(code) & 0x7f;
    let value = finite::<3, 7>(magnitude);
    let bits = if magnitude == 0x7f { f32::NAN.to_bits() } else { value.to_bits() };
    f32::from_bits(bits | u32::from(code) >> 7 << 31)
}

/// The value of a code of a format with infinities, of its magnitude and its sign.
#[inline(always)]
fn ieee<const FRACTION: u32, const BIAS: u32>(magnitude: u32, sign: u32) -> f32 {
    let value = finite::<FRACTION, BIAS>(magnitude);
    let special = 0x7f80_0000 | magnitude << (23 - FRACTION);
    let is_special = magnitude >= (2 * BIAS + 1) << FRACTION;
    let bits = if is_special { special } else { value.to_bits() };
    f32::from_bits(bits | sign << 31)
}

/// The value of a magnitude that is no infinity and no NaN.
#[inline(always)]
fn finite<const FRACTION: u32, const BIAS: u32>(magnitude: u32) -> f32 {
    let normal = f32::from_bits((magnitude << (23 - FRACTION)) + ((127 - BIAS) << 23));
    // 2^(1 - BIAS - FRACTION)
    let unit = f32::from_bits((128 - BIAS - FRACTION) << 23);
    if magnitude < 1 << FRACTION { magnitude as i32 as f32 * unit } else { normal }
}

/// The rounding errors of an activation whose parts of K are converted each on its own.
pub(super) fn errors_by_part(
    x: &Tensor,
    parts: &[Range<usize>],
    convert: impl Fn(&Tensor) -> (Codes, Scales),
) -> Vec<f32> {
    let mut whole = Tensor::zeros(x.rows(), x.width());
    for inner in parts {
        let part = x.columns(inner.clone());
        let (codes, scales) = convert(&part);
        let mut errors = Vec::new();
        rounding_errors(Rows::all(part.data(), &codes, &scales), &mut errors);
        whole.set_columns(inner.start, &Tensor::new(inner.len(), errors));
    }
    whole.into_data()
}

/// An operand's rows, each divided by a power of two so that its largest magnitude lies between 1
/// and 2: the square of a value near 2^-70 is no f32.
///
/// f32 is enough else: a floor of seven digits is far better than its own model.
pub(super) struct Lifted {
    /// Row-major.
    pub values: Vec<f32>,
    /// Of the values.
    pub squares: Vec<f32>,
    /// Of the rounding errors.
    pub error_squares: Vec<f32>,
    /// What each row was divided by.
    pub powers: Vec<f64>,
}

impl Lifted {
    /// The rows of an activation.
    pub fn of(rows: Rows<'_>) -> Lifted {
        let zeros = || vec![0.0; rows.values.len()];
        let mut lifted = Lifted {
            values: zeros(),
            squares: zeros(),
            error_squares: zeros(),
            powers: vec![0.0; rows.count()],
        };
        dispatch(Lift { rows, lifted: &mut lifted });
        lifted
    }

    /// The rows of an activation whose errors are known.
    pub fn with_errors(values: &[f32], errors: &[f32], width: usize) -> Lifted {
        let powers: Vec<f64> = values.chunks_exact(width).map(power_below).collect();
        let lift = |values: &[f32]| -> Vec<f32> {
            let rows = values.chunks_exact(width).zip(&powers);
            let lifted = rows.flat_map(|(row, power)| {
                row.iter().map(move |&value| (f64::from(value) * (1.0 / power)) as f32)
            });
            lifted.collect()
        };
        let squared = |values: &[f32]| values.iter().map(|value| value * value).collect();
        let lifted = lift(values);
        let (squares, error_squares) = (squared(&lifted), squared(&lift(errors)));
        Lifted { values: lifted, squares, error_squares, powers }
    }
}

struct Lift<'a> {
    rows: Rows<'a>,
    lifted: &'a mut Lifted,
}

impl Kernel for Lift<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Lift { rows, lifted } = self;
        let width = rows.codes.width();
        for (row, values) in rows.values.chunks_exact(width).enumerate() {
            let power = power_below(values);
            lifted.powers[row] = power;
            for (span, values) in values.chunks(SPAN).enumerate() {
                let first = row * width + span * SPAN;
                let place = first..first + values.len();
                let (value, error) = lifted_span(&rows, row, span, values, 1.0 / power);
                lifted.values[place.clone()].copy_from_slice(&value[..values.len()]);
                let squares = lifted.squares[place.clone()].iter_mut().zip(&value);
                squares.for_each(|(square, value)| *square = value * value);
                let squares = lifted.error_squares[place].iter_mut().zip(&error);
                squares.for_each(|(square, error)| *square = error * error);
            }
        }
    }
}

/// The values of one span and their errors, both times the inverse of the row's power.
#[inline(always)]
fn lifted_span(
    rows: &Rows<'_>,
    row: usize,
    span: usize,
    values: &[f32],
    inverse: f64,
) -> ([f32; SPAN], [f32; SPAN]) {
    let (mut lifted, mut errors) = ([0.0f32; SPAN], [0.0f32; SPAN]);
    errors_of_span(rows, rows.first + row, span, values, &mut errors[..values.len()]);
    // Of powers of two of f64 the products are exact, and end within f32.
    for (lifted, &value) in lifted.iter_mut().zip(values) {
        *lifted = (f64::from(value) * inverse) as f32;
    }
    for error in &mut errors {
        *error = (f64::from(*error) * inverse) as f32;
    }
    (lifted, errors)
}

/// What the squares of a weight's rows meet in a floor, the rows lifted as [`Lifted`]'s are.
#[derive(Default)]
pub(super) struct WeightSquares {
    /// `dw^2 + of_terms w^2`, what the activation's squares meet.
    pub with_x: Vec<f32>,
    /// `w^2 + dw^2`, what the squares of the activation's errors meet.
    pub with_dx: Vec<f32>,
    /// What each row was divided by.
    pub powers: Vec<f64>,
}

impl WeightSquares {
    /// Those of some rows, in place of what stood here.
    pub fn refill(&mut self, rows: Rows<'_>, of_terms: f32) {
        self.with_x.resize(rows.values.len(), 0.0);
        self.with_dx.resize(rows.values.len(), 0.0);
        self.powers.resize(rows.count(), 0.0);
        dispatch(FillSquares { rows, of_terms, squares: self });
    }
}

struct FillSquares<'a> {
    rows: Rows<'a>,
    of_terms: f32,
    squares: &'a mut WeightSquares,
}

impl Kernel for FillSquares<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let FillSquares { rows, of_terms, squares } = self;
        let width = rows.codes.width();
        let lines = rows.values.chunks_exact(width);
        let with = squares.with_x.chunks_exact_mut(width);
        let with = with.zip(squares.with_dx.chunks_exact_mut(width));
        let places = squares.powers.iter_mut().zip(with);
        for (row, (values, (place, (with_x, with_dx)))) in lines.zip(places).enumerate() {
            let power = power_below(values);
            *place = power;
            let with = with_x.chunks_mut(SPAN).zip(with_dx.chunks_mut(SPAN));
            for (span, (values, (with_x, with_dx))) in values.chunks(SPAN).zip(with).enumerate() {
                let (value, error) = lifted_span(&rows, row, span, values, 1.0 / power);
                let made = with_x.iter_mut().zip(with_dx.iter_mut());
                for ((with_x, with_dx), (w, dw)) in made.zip(value.iter().zip(&error)) {
                    let (w_square, dw_square) = (w * w, dw * dw);
                    *with_x = dw_square + of_terms * w_square;
                    *with_dx = w_square + dw_square;
                }
            }
        }
    }
}

/// The largest power of two that is not above a row's largest magnitude; 1 for zero, infinities
/// and NaN.
#[inline(always)]
pub(super) fn power_below(row: &[f32]) -> f64 {
    // Magnitudes order like their bits, and every NaN lies above infinity.
    let mut most = 0;
    for value in row {
        let bits = value.to_bits() & 0x7fff_ffff;
        most = if bits > most { bits } else { most };
    }
    let usual = most > 0 && most < f32::INFINITY.to_bits();
    let bits = f64::from(if usual { f32::from_bits(most) } else { 1.0 }).to_bits();
    f64::from_bits(bits & 0x7ff0_0000_0000_0000)
}

#[cfg(test)]
mod tests {
    use super::super::emulated::quantize::CodeData;
    use super::*;

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    #[test]
    fn every_code_is_decoded_as_its_format_does() {
        for code in 0..=u8::MAX {
            let ieee = ieee::<2, 15>(u32::from(code) & 0x7f, u32::from(code) >> 7);
            assert!(same(e4m3(code), Format::E4m3.decode(u32::from(code))), "E4M3 {code:#x}");
            assert!(same(ieee, Format::E5m2.decode(u32::from(code))), "E5M2 {code:#x}");
        }
        for code in 0..=u16::MAX {
            let value = ieee::<10, 15>(u32::from(code) & 0x7fff, u32::from(code) >> 15);
            assert!(same(value, Format::F16.decode(u32::from(code))), "f16 {code:#x}");
        }
    }

    #[test]
    fn a_stretch_gives_what_the_whole_operand_gives() {
        let (rows, width) = (11, 300);
        let bytes: Vec<u8> = (0..rows * width).map(|at| (at * 37 % 251) as u8 % 0x7f).collect();
        let values: Vec<f32> =
            bytes.iter().map(|&code| Format::E4m3.decode(code.into()) * 1.03e-20).collect();
        let codes = Codes::new(Format::E4m3, rows, width, CodeData::Bits8(bytes)).unwrap();
        let scales = Scales::Row((0..rows).map(|row| 1e-20 + row as f32 * 1e-22).collect());
        let whole = Lifted::of(Rows::all(&values, &codes, &scales));
        for (row, power) in whole.powers.iter().enumerate() {
            let of_row = &whole.values[row * width..(row + 1) * width];
            let most = of_row.iter().fold(0.0f32, |most, &x| if x > most { x } else { most });
            assert!((1.0..2.0).contains(&most));
            let back = f64::from(of_row[7]) * power;
            assert_eq!(back as f32, values[row * width + 7]);
        }
        let (first, part) = (3, &values[3 * width..7 * width]);
        let mut squares = WeightSquares::default();
        squares
            .refill(Rows { values: part, first, before: 0, codes: &codes, scales: &scales }, 0.25);
        for (at, (with_x, with_dx)) in squares.with_x.iter().zip(&squares.with_dx).enumerate() {
            let place = first * width + at;
            let (w, dw) = (whole.squares[place], whole.error_squares[place]);
            assert_eq!((*with_x, *with_dx), (dw + 0.25 * w, w + dw));
        }
        let mut errors = vec![f32::NAN; 3];
        rounding_errors(
            Rows { values: part, first, before: 0, codes: &codes, scales: &scales },
            &mut errors,
        );
        let plainly = |at: usize| {
            let (row, column) = (first + at / width, at % width);
            let code = codes.decode_row(row)[column];
            code * scales.at(row, column, width) - values[first * width + at]
        };
        assert!((0..part.len()).all(|at| errors[at] == plainly(at)));
    }
}
