//! Outputs held against their exact values: errors in units of the predicted floor, in
//! steps of the output's type, and whether rounding explains them.
//!
//! It knows values, exact values and deviations; not which op made them.

use rayon::prelude::*;
use serde::Serialize;

use crate::compare::MOST_DEVIATIONS;
use crate::dtype::Format;
use crate::tensor::Tensor;

/// A root mean square of z that rounding explains; 1 is expected where the output's
/// rounding is most of the floor, less where the floor is a bound.
const MOST_RMS: f64 = 1.25;
/// Deviations of a line's mean square that chance explains, over all lines.
const LINE_DEVIATIONS: f64 = 6.0;
/// Deviations by which chance makes sums larger where truncation can only make them smaller.
const MOST_LARGER: f64 = 6.0;
/// The variance of a value below f32's normal range: kernels may flush it to zero.
pub const FLUSHED: f64 = f32::MIN_POSITIVE as f64 * f32::MIN_POSITIVE as f64;

/// What rounding costs, under one assumption about how a kernel computes.
pub struct Floor {
    /// The assumption, in words: `f32 additions in any order`.
    pub name: String,
    /// The deviation of each output, row-major.
    pub sigma: Vec<f32>,
    /// Whether it is that of sums that are cut and not rounded: they come out smaller.
    pub truncates: bool,
}

/// Outputs, their exact values, and the floors that are tried, the finest first.
pub struct Exam {
    /// What the kernel returned, `[rows, width]`.
    pub y: Tensor,
    /// The type in which it returned it.
    pub output: Format,
    /// The exact values, row-major.
    pub truth: Vec<f64>,
    /// What may explain the difference; at least one.
    pub floors: Vec<Floor>,
}

/// The errors in units of one floor.
#[derive(Clone, Debug, Serialize)]
pub struct Z {
    /// Whose floor it is, in words.
    pub floor: String,
    /// Whether a finer floor does not explain the errors: how they are added is coarser.
    pub coarser: bool,
    /// Root mean square over all values.
    pub rms: f64,
    /// The largest magnitude.
    pub max: f64,
    /// Where it is: row and column.
    pub max_at: [usize; 2],
    /// The row with the largest root mean square, and that.
    pub worst_row: (usize, f64),
    /// The column with the largest root mean square, and that.
    pub worst_column: (usize, f64),
    /// Whether rounding explains all of it.
    pub within: bool,
}

/// How far outputs lie from the exact values rounded to the output's type. A step is the
/// distance from one value of that type to the next, at the size of the exact value or of
/// its row's root mean square, whichever is larger: near zero the type's own steps are so
/// small that they say nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Steps {
    /// Values that are not the exact value rounded.
    pub differ: usize,
    /// Of them, those that are at most one step away.
    pub by_one: usize,
    /// The largest distance, rounded up.
    pub most: u64,
    /// Where that is: row and column.
    pub most_at: [usize; 2],
}

/// Values that are NaN or infinite.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NonFinite {
    /// Outputs that are NaN where neither the exact value nor an overflow of f32 makes them so.
    pub nan: usize,
    /// Outputs that are infinite where the exact value fits, is NaN, or has the other sign.
    pub infinite: usize,
    /// Outputs that are finite although the exact value is not or does not fit.
    pub lost: usize,
    /// Exact values that are not finite or do not fit, where the output agrees.
    pub expected: usize,
    /// The first value that is wrong so: row and column.
    pub first: Option<[usize; 2]>,
}

impl NonFinite {
    /// Values that are wrong so.
    pub fn wrong(&self) -> usize {
        self.nan + self.infinite + self.lost
    }
}

/// A floor of truncated sums that cannot be the answer: the values are larger than exact
/// ones, and truncation makes them smaller.
#[derive(Clone, Debug, Serialize)]
pub struct Larger {
    /// Whose floor it is, in words.
    pub floor: String,
    /// Their excess over all values or the worst row or column, in its own deviations.
    pub deviations: f64,
}

/// What an exam shows.
pub struct Marks {
    /// NaN and infinity.
    pub non_finite: NonFinite,
    /// Under the floor that fits, else under the coarsest one.
    pub z: Z,
    /// Under the finest one, where another fits.
    pub finest: Option<Z>,
    /// The last floor that was passed over because values are too large for it.
    pub larger: Option<Larger>,
    /// Distances in the output's type.
    pub steps: Steps,
    /// Every error over its floor, signed; 0 where nothing finite can be compared.
    pub each: Vec<f32>,
}

impl Exam {
    /// Takes the exam.
    pub fn marks(&self) -> Marks {
        let non_finite = self.non_finite();
        let mut tried: Vec<(Z, Vec<f32>)> = Vec::new();
        let mut larger = None;
        for (number, floor) in self.floors.iter().enumerate() {
            let each = self.each(floor);
            let excess = if floor.truncates { self.excess(floor, &each) } else { 0.0 };
            if is_larger(excess) {
                larger = Some(Larger { floor: floor.name.clone(), deviations: excess });
                continue;
            }
            let z = Z { coarser: number > 0, ..z_of(&each, self.y.width(), &floor.name) };
            let within = z.within;
            tried.push((z, each));
            if within {
                break;
            }
        }
        let finest = (tried.len() > 1).then(|| tried[0].0.clone());
        let (z, each) = tried.pop().unwrap_or_else(|| {
            // There is always a floor; without one nothing is explained.
            let each = vec![f32::MAX; self.truth.len()];
            (z_of(&each, self.y.width(), "no floor"), each)
        });
        Marks { non_finite, z, finest, larger, steps: self.steps(), each }
    }

    fn each(&self, floor: &Floor) -> Vec<f32> {
        let values = self.y.data().par_iter().zip(&self.truth).zip(&floor.sigma);
        let z = |((&y, &truth), &sigma): ((&f32, &f64), &f32)| {
            let difference = f64::from(y) - truth;
            if difference == 0.0 || !difference.is_finite() {
                return 0.0;
            }
            (difference / f64::from(sigma)).clamp(-1e30, 1e30) as f32
        };
        values.map(z).collect()
    }

    fn excess(&self, floor: &Floor, each: &[f32]) -> f64 {
        let size = |(&truth, &sigma): (&f64, &f32)| {
            if truth.is_finite() { (truth / f64::from(sigma)) as f32 } else { 0.0 }
        };
        let sizes: Vec<f32> = self.truth.iter().zip(&floor.sigma).map(size).collect();
        excess(each, &sizes, self.y.width())
    }

    /// The exact value as the output's type has it.
    pub fn rounded(&self, index: usize) -> f32 {
        self.output.round(self.truth[index] as f32)
    }

    fn non_finite(&self) -> NonFinite {
        let mut found = NonFinite::default();
        for (index, &y) in self.y.data().iter().enumerate() {
            if !self.is_strange(index) {
                found.expected += usize::from(!self.rounded(index).is_finite());
                continue;
            }
            found.first.get_or_insert([index / self.y.width(), index % self.y.width()]);
            match (y.is_nan(), y.is_infinite()) {
                (true, _) => found.nan += 1,
                (_, true) => found.infinite += 1,
                _ => found.lost += 1,
            }
        }
        found
    }

    /// Whether an output is NaN or infinite where that is wrong, or is not where it must be.
    pub fn is_strange(&self, index: usize) -> bool {
        let (y, right) = (self.y.data()[index], self.rounded(index));
        if right.is_finite() || right.is_nan() {
            return y.is_finite() != right.is_finite() || right.is_nan() && !y.is_nan();
        }
        // The parts of a sum beyond f32 may be infinities of both signs.
        let beyond = self.truth[index].abs() > f64::from(f32::MAX);
        y != right && !(y.is_nan() && beyond)
    }

    fn steps(&self) -> Steps {
        let width = self.y.width();
        let mut steps = Steps::default();
        for (row, truth) in self.truth.chunks_exact(width).enumerate() {
            let finite = truth.iter().filter(|truth| truth.is_finite());
            let squares: f64 = finite.map(|truth| truth * truth).sum();
            let typical = (squares / width as f64).sqrt();
            for (column, &y) in self.y.row(row).iter().enumerate() {
                let right = self.rounded(row * width + column);
                if y == right || !y.is_finite() || !right.is_finite() {
                    continue;
                }
                let size = truth[column].abs();
                let step = last_place(self.output, if size > typical { size } else { typical });
                let distance = ((f64::from(y) - f64::from(right)).abs() / step).ceil() as u64;
                steps.differ += 1;
                steps.by_one += usize::from(distance <= 1);
                if distance > steps.most {
                    (steps.most, steps.most_at) = (distance, [row, column]);
                }
            }
        }
        steps
    }
}

/// The last place of a value of about `size` in a format.
pub fn last_place(format: Format, size: f64) -> f64 {
    (rounding(format, size) * 12.0).sqrt()
}

/// The variance of rounding a value of about `size` to a format: `ulp^2 / 12`.
pub fn rounding(format: Format, size: f64) -> f64 {
    // The exponent's field; a size below f64's normal range is below every format's too.
    let exponent = (size.abs().to_bits() >> 52) as i32 - 1023;
    let exponent = exponent.clamp(format.min_exponent(), 127) - format.fraction_bits() as i32;
    f64::from_bits(((2 * exponent + 1023) as u64) << 52) / 12.0
}

/// The deviation of an output, of its variance.
pub fn deviation(variance: f64) -> f32 {
    (variance + FLUSHED).sqrt() as f32
}

/// By how many deviations values are larger in magnitude than exact ones, over all of them
/// or in the worst row or column. Errors and exact values are in units of the floor.
pub fn excess(errors: &[f32], sizes: &[f32], width: usize) -> f64 {
    let rows = errors.len() / width;
    let (mut by_row, mut by_column) = (vec![(0.0, 0.0); rows], vec![(0.0, 0.0); width]);
    for (index, (&error, &size)) in errors.iter().zip(sizes).enumerate() {
        let (error, size) = (f64::from(error), f64::from(size));
        for (sum, squares) in [&mut by_row[index / width], &mut by_column[index % width]] {
            *sum += error * size;
            *squares += size * size;
        }
    }
    let all = by_row.iter().fold((0.0, 0.0), |all, row| (all.0 + row.0, all.1 + row.1));
    let each = by_row.into_iter().chain(by_column).chain([all]);
    let ratios = each.map(|(sum, squares)| if squares > 0.0 { sum / squares.sqrt() } else { 0.0 });
    ratios.fold(0.0, |most, ratio| if ratio > most { ratio } else { most })
}

/// Whether an excess is more than chance explains.
pub fn is_larger(excess: f64) -> bool {
    excess > MOST_LARGER
}

/// The largest root mean square of `count` values of z that chance explains.
pub fn most_rms(count: usize) -> f64 {
    let chance = LINE_DEVIATIONS * (2.0 / count.max(1) as f64).sqrt();
    (MOST_RMS * MOST_RMS * (1.0 + chance)).sqrt()
}

/// Errors in units of a floor, row by row.
pub fn z_of(each: &[f32], width: usize, floor: &str) -> Z {
    let rows = each.len() / width;
    let of_row = |row: &[f32]| -> f64 { row.iter().map(|&z| f64::from(z) * f64::from(z)).sum() };
    let by_row: Vec<f64> = each.par_chunks_exact(width).map(of_row).collect();
    let mut by_column = vec![0.0f64; width];
    for row in each.chunks_exact(width) {
        for (sum, &z) in by_column.iter_mut().zip(row) {
            *sum += f64::from(z) * f64::from(z);
        }
    }
    let (max_index, max) = largest(each.iter().map(|z| f64::from(z.abs())));
    let rms = |sum: f64, count: usize| (sum / count as f64).sqrt();
    let (row, row_sum) = largest(by_row.iter().copied());
    let (column, column_sum) = largest(by_column.iter().copied());
    let all = rms(by_row.iter().sum(), each.len());
    let (of_row, of_column) = (rms(row_sum, width), rms(column_sum, rows));
    let within = all <= most_rms(each.len())
        && max <= MOST_DEVIATIONS
        && of_row <= most_rms(width)
        && of_column <= most_rms(rows);
    Z {
        floor: floor.to_owned(),
        coarser: false,
        rms: all,
        max,
        max_at: [max_index / width, max_index % width],
        worst_row: (row, of_row),
        worst_column: (column, of_column),
        within,
    }
}

fn largest(values: impl Iterator<Item = f64>) -> (usize, f64) {
    values.enumerate().fold(
        (0, 0.0),
        |best, (index, value)| {
            if value > best.1 { (index, value) } else { best }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_a_twelfth_of_the_squared_last_place() {
        for (format, size) in
            [(Format::Bf16, 1.5), (Format::F16, 1e-6), (Format::F32, 3e38), (Format::Bf16, 0.0)]
        {
            let next = format.decode(format.encode(format.round(size as f32)) + 1);
            let place = f64::from(next) - f64::from(format.round(size as f32));
            let place = if place.is_finite() { place } else { 2f64.powi(127 - 23) };
            assert!((rounding(format, size) / (place * place / 12.0) - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn steps_are_counted_in_the_outputs_own_type_at_the_rows_size() {
        let exam = |y: Vec<f32>, output| Exam {
            y: Tensor::new(4, y),
            output,
            truth: vec![1.0, 1.0, 1.0, 1e-6],
            floors: Vec::new(),
        };
        // One place of bf16, and near zero a value that is 40 % off, which is nothing here.
        let steps = exam(vec![1.0078125, 1.0, 1.0, 1.4e-6], Format::Bf16).steps();
        assert_eq!((steps.differ, steps.by_one, steps.most), (2, 2, 1));
        let steps = exam(vec![1.0078125, 1.0, 1.0, 1e-6], Format::F16).steps();
        assert_eq!((steps.most, steps.most_at), (8, [0, 0]));
    }

    fn exam_of(y: Vec<f32>, truth: Vec<f64>, output: Format) -> Exam {
        let sigma = vec![1.0; truth.len()];
        let floors = vec![Floor { name: "a floor".to_owned(), sigma, truncates: false }];
        Exam { y: Tensor::new(truth.len(), y), output, truth, floors }
    }

    #[test]
    fn an_overflow_is_the_infinity_of_its_sign() {
        let wrong = |y: f32, truth: f64, output| {
            exam_of(vec![y, 1.0], vec![truth, 1.0], output).marks().non_finite.wrong()
        };
        assert_eq!(wrong(f32::INFINITY, 1e5, Format::F16), 0);
        assert_eq!(wrong(f32::NEG_INFINITY, 1e5, Format::F16), 1);
        assert_eq!(wrong(f32::NEG_INFINITY, -1e5, Format::F16), 0);
        assert_eq!(wrong(f32::NAN, 1e5, Format::F16), 1);
        assert_eq!(wrong(65504.0, 1e5, Format::F16), 1);
        // Where the sum itself leaves f32, its parts may be infinities of both signs.
        assert_eq!(wrong(f32::NAN, 1e39, Format::Bf16), 0);
        assert_eq!(wrong(f32::NEG_INFINITY, 1e39, Format::Bf16), 1);
        assert_eq!(wrong(f32::NAN, f64::NAN, Format::Bf16), 0);
        assert_eq!(wrong(f32::INFINITY, f64::NAN, Format::Bf16), 1);
    }
}
