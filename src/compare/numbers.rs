//! Metrics of two finite tensors of one shape.
//!
//! All sums are f64 over rows in order. It knows nothing of sites or streams.

use super::{RISK, Z_FROM, Z_STEP, ZHistogram};
use crate::compute::floor::{Deviations, Shared};
use crate::metric::Metric;
use crate::tensor::Tensor;

/// Values below which a histogram of z says too little.
const LEAST_VALUES: usize = 512;

/// Pairs of elements as f64.
fn pairs<'a>(a: &'a Tensor, b: &'a Tensor) -> impl Iterator<Item = (f64, f64)> + 'a {
    a.data().iter().zip(b.data()).map(|(&a, &b)| (f64::from(a), f64::from(b)))
}

/// The larger of two numbers, neither of which is NaN here.
fn larger(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}

/// The element with the largest absolute difference, if any differs.
pub fn worst(a: &Tensor, b: &Tensor) -> Option<usize> {
    let mut worst = (0.0, None);
    for (index, (a, b)) in pairs(a, b).enumerate() {
        let difference = (a - b).abs();
        if difference > worst.0 {
            worst = (difference, Some(index));
        }
    }
    worst.1
}

/// Distances: absolute, relative, in units of the last place.
pub fn differences(a: &Tensor, b: &Tensor) -> Vec<(Metric, f64)> {
    let mut max_abs = 0.0;
    let mut max_rel: Option<f64> = None;
    let mut max_ulp = 0.0;
    for (a, b) in a.data().iter().zip(b.data()) {
        let difference = (f64::from(*a) - f64::from(*b)).abs();
        max_abs = larger(max_abs, difference);
        if *b != 0.0 {
            max_rel = Some(larger(max_rel.unwrap_or(0.0), difference / f64::from(*b).abs()));
        }
        max_ulp = larger(max_ulp, ulp_distance(*a, *b));
    }
    let mut row_ulp = 0.0;
    for row in 0..a.rows() {
        let (a, b) = (a.row(row), b.row(row));
        let size = b.iter().fold(0.0f64, |most, &b| larger(most, f64::from(b).abs()));
        for (a, b) in a.iter().zip(b) {
            let difference = (f64::from(*a) - f64::from(*b)).abs();
            row_ulp = larger(row_ulp, difference / ulp(size));
        }
    }
    let mut metrics =
        vec![(Metric::MaxAbs, max_abs), (Metric::MaxUlp, max_ulp), (Metric::RowUlp, row_ulp)];
    metrics.extend(max_rel.map(|max_rel| (Metric::MaxRel, max_rel)));
    metrics
}

/// The number of f32 values from `a` to `b`; both zeros are one value.
fn ulp_distance(a: f32, b: f32) -> f64 {
    let place = |value: f32| {
        let magnitude = i64::from(value.to_bits() & 0x7fff_ffff);
        if value.is_sign_negative() { -magnitude } else { magnitude }
    };
    (place(a) - place(b)).unsigned_abs() as f64
}

/// The unit of the last place of an f32 of this size.
fn ulp(size: f64) -> f64 {
    let exponent = if size > 0.0 { size.log2().floor() } else { f64::from(f32::MIN_EXP - 1) };
    let exponent = larger(exponent, f64::from(f32::MIN_EXP - 1));
    (exponent - 23.0).exp2()
}

/// Energies, angles and the least-squares line.
pub fn likeness(a: &Tensor, b: &Tensor) -> Vec<(Metric, f64)> {
    let count = a.data().len() as f64;
    let (mut aa, mut bb, mut ab, mut error, mut sum_a, mut sum_b) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
    for (a, b) in pairs(a, b) {
        aa += a * a;
        bb += b * b;
        ab += a * b;
        error += (a - b) * (a - b);
        sum_a += a;
        sum_b += b;
    }
    let mut metrics = Vec::new();
    if bb > 0.0 {
        metrics.push((Metric::Nmse, error / bb));
    }
    if aa > 0.0 && bb > 0.0 {
        metrics.push((Metric::Cosine, (ab / (aa.sqrt() * bb.sqrt())).clamp(-1.0, 1.0)));
    }
    let (mean_a, mean_b) = (sum_a / count, sum_b / count);
    let (mut var_a, mut var_b, mut cov) = (0.0, 0.0, 0.0);
    for (a, b) in pairs(a, b) {
        var_a += (a - mean_a) * (a - mean_a);
        var_b += (b - mean_b) * (b - mean_b);
        cov += (a - mean_a) * (b - mean_b);
    }
    if count > 1.0 && var_b > 0.0 {
        let slope = cov / var_b;
        metrics.push((Metric::Slope, slope));
        metrics.push((Metric::Intercept, mean_a - slope * mean_b));
        if var_a > 0.0 {
            let pearson = cov / (var_a.sqrt() * var_b.sqrt());
            metrics.push((Metric::Pearson, pearson.clamp(-1.0, 1.0)));
        }
    }
    metrics
}

/// What errors say beside their floors.
pub struct AgainstFloor {
    /// The metrics of z.
    pub metrics: Vec<(Metric, f64)>,
    /// What chance makes of them, see [`super::Measure::chance`].
    pub chance: Vec<(Metric, [f64; 2])>,
    /// How z is distributed, where there are values enough.
    pub histogram: Option<ZHistogram>,
}

/// `z = (a - b) / floor`: its metrics and its distribution. Where the floor is
/// zero, only equality is allowed. Nothing where the floor has another shape.
///
/// Each z is a sum of rounding errors of known sizes and unknown signs, so it is
/// sub-Gaussian: `P(|z| > t) <= 2 exp(-t^2 / 2)` whatever the sizes are (Hoeffding 1963).
pub fn against_floor(a: &Tensor, b: &Tensor, floor: &Deviations) -> Option<AgainstFloor> {
    let Deviations { each: floor, shared } = floor;
    if (floor.rows(), floor.width()) != (a.rows(), a.width()) {
        return None;
    }
    let each =
        pairs(a, b).zip(floor.data()).map(|((a, b), &floor)| match (a - b, f64::from(floor)) {
            (0.0, _) => 0.0,
            (difference, floor) if floor > 0.0 => difference / floor,
            _ => f64::MAX.sqrt().sqrt(),
        });
    let z: Vec<f64> = each.collect();
    let (rows, width) = (a.rows(), a.width());
    let count = z.len() as f64;
    let mean_square = z.iter().map(|z| z * z).sum::<f64>() / count;
    let most = z.iter().fold(0.0, |most, z| larger(most, z.abs()));
    let Shared { rows: in_rows, columns: in_columns, quiet } = match shared {
        Some(shared) => shared.clone(),
        // Of what is not known nothing is independent.
        None => Shared { rows: vec![1.0; rows], columns: vec![1.0; width], quiet: 0.0 },
    };
    let row = |row: usize| z[row * width..(row + 1) * width].iter().map(|z| z * z).sum::<f64>();
    let column = |column: usize| (0..rows).map(|row| z[row * width + column].powi(2)).sum::<f64>();
    let metrics = vec![
        (Metric::ZMax, most),
        (Metric::ZMean, z.iter().sum::<f64>() / count),
        (Metric::ZRow, worst_line(width, &in_rows, row)),
        (Metric::ZColumn, worst_line(rows, &in_columns, column)),
        (Metric::ZRms, mean_square.sqrt()),
    ];
    // A sum of squares is never negative, so no line lies lower than independent zeros.
    let of_line = |lines: usize, length: usize| {
        [-(length as f64 / 2.0).sqrt(), union_bound(lines as f64, 1.0)]
    };
    let chance = vec![
        (Metric::ZMax, [0.0, union_bound(count, 2.0)]),
        (Metric::ZRow, of_line(rows, width)),
        (Metric::ZColumn, of_line(width, rows)),
        (Metric::ZRms, whole((rows, width), quiet, mean(&in_rows), mean(&in_columns))),
    ];
    // Of few values, or where nothing differs, the counts say nothing.
    let told = z.len() >= LEAST_VALUES && most > 0.0;
    Some(AgainstFloor { metrics, chance, histogram: told.then(|| histogram(&z)) })
}

/// The deviations that one of `count` sub-Gaussian variables passes at [`RISK`]: the union
/// bound `count sides exp(-t^2 / 2) = RISK`.
fn union_bound(count: f64, sides: f64) -> f64 {
    (2.0 * (sides * count / RISK).ln()).sqrt()
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len() as f64
}

/// How often z falls into each bin; both tails are bins too.
fn histogram(z: &[f64]) -> ZHistogram {
    let mut counts = [0; 18];
    let last = counts.len() - 1;
    for z in z {
        // A cast of what is below zero saturates there: that is the lower tail.
        let bin = ((z - Z_FROM) / Z_STEP + 1.0).floor() as usize;
        counts[bin.min(last)] += 1;
    }
    counts
}

/// How a sum of squares of correlated variables of variance 1 spreads.
///
/// For sub-Gaussian variables with the correlation matrix S, and every x > 0,
/// `P(sum > tr S + 2 |S|_F sqrt(x) + 2 |S| x) <= exp(-x)` (Laurent and Massart 2000, lemma
/// 1; Hsu, Kakade and Zhang 2012, theorem 1). With `x = t^2 / 2` that is the tail of a
/// normal variable at t deviations.
struct SumOfSquares {
    /// `tr S`, the count of variables.
    trace: f64,
    /// `|S|_F`.
    frobenius: f64,
    /// `|S|`, or a bound on it.
    norm: f64,
}

impl SumOfSquares {
    /// Of `count` variables whose correlations outside of the diagonal have the squares'
    /// sum `others` and a norm of at most `norm`.
    fn of(count: f64, others: f64, norm: f64) -> SumOfSquares {
        let frobenius = (count + others).sqrt();
        let norm = 1.0 + norm;
        SumOfSquares {
            trace: count,
            frobenius,
            norm: if norm < frobenius { norm } else { frobenius },
        }
    }

    /// A line of `count` variables with a mean squared correlation of `r2`; a matrix's norm
    /// is at most that of Frobenius.
    fn of_line(count: usize, r2: f64) -> SumOfSquares {
        let count = count as f64;
        let others = count * (count - 1.0) * r2;
        SumOfSquares::of(count, others, others.sqrt())
    }

    /// How far a sum stands above its expectation: t of the bound above. Below it, in
    /// deviations.
    fn deviations(&self, sum: f64) -> f64 {
        let (excess, linear) = (sum - self.trace, std::f64::consts::SQRT_2 * self.frobenius);
        if excess <= 0.0 {
            return excess / linear;
        }
        2.0 * excess / (linear + (linear * linear + 4.0 * self.norm * excess).sqrt())
    }

    /// The least and the largest sum within t deviations.
    fn within(&self, t: f64) -> [f64; 2] {
        let linear = std::f64::consts::SQRT_2 * self.frobenius * t;
        [larger(self.trace - linear, 0.0), self.trace + linear + self.norm * t * t]
    }
}

/// How far the worst line's sum of squares stands above its expectation, in deviations of
/// a standard normal variable. `r2` is each line's mean squared correlation; the mean one
/// stands in where a line's own, from a few pairs, is smaller.
fn worst_line(length: usize, r2: &[f32], sum: impl Fn(usize) -> f64) -> f64 {
    let mean = mean(r2);
    let each = r2.iter().enumerate().map(|(line, &r2)| {
        let r2 = larger(f64::from(r2), mean);
        SumOfSquares::of_line(length, r2).deviations(sum(line))
    });
    each.fold(f64::NEG_INFINITY, larger)
}

/// The root mean square of all z that chance allows: entries of one row correlate as
/// `in_rows` says, those of one column as `in_columns` does, others not at all. The share of them
/// that is quiet may be nothing.
fn whole((rows, width): (usize, usize), quiet: f64, in_rows: f64, in_columns: f64) -> [f64; 2] {
    let (rows, width) = (rows as f64, width as f64);
    let count = rows * width;
    let within_row = width * (width - 1.0) * in_rows;
    let within_column = rows * (rows - 1.0) * in_columns;
    let others = rows * within_row + width * within_column;
    let sum = SumOfSquares::of(count, others, within_row.sqrt() + within_column.sqrt());
    let [least, most] = sum.within(union_bound(1.0, 2.0));
    let least = larger(least - quiet * count, 0.0);
    [least, most].map(|sum| (sum / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_z_falls_into_one_bin() {
        let counts = histogram(&[-1e30, -4.1, -4.0, -3.51, -0.1, 0.0, 0.49, 3.99, 4.0, 1e77]);
        assert_eq!(counts, [2, 2, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 2]);
    }

    /// z itself, as a floor of ones over nothing known or over independent errors.
    fn floor_of(each: Tensor, independent: bool) -> Deviations {
        let (rows, width) = (each.rows(), each.width());
        let shared = Shared { rows: vec![0.0; rows], columns: vec![0.0; width], quiet: 0.0 };
        Deviations { each, shared: independent.then_some(shared) }
    }

    fn of(found: &AgainstFloor, metric: Metric) -> (f64, [f64; 2]) {
        let value = found.metrics.iter().find(|(name, _)| *name == metric).expect("measured").1;
        (value, found.chance.iter().find(|(name, _)| *name == metric).expect("a statistic").1)
    }

    #[test]
    fn chance_widens_as_the_values_become_fewer_and_a_maximum_grows_with_their_number() {
        let found = |rows: usize, width: usize| {
            let ones = floor_of(Tensor::new(width, vec![1.0; rows * width]), true);
            let zeros = Tensor::zeros(rows, width);
            against_floor(&zeros, &zeros, &ones).expect("one shape")
        };
        let ([least, most], [few_least, few_most]) =
            (of(&found(64, 100), Metric::ZRms).1, of(&found(1, 8), Metric::ZRms).1);
        assert!((0.94..1.0).contains(&least) && (1.0..1.06).contains(&most), "{least} {most}");
        assert!(few_least == 0.0 && (2.0..3.0).contains(&few_most), "{few_least} {few_most}");
        // The contracts' 7.5 is the bound on 16.8 million values.
        assert!((union_bound(16.8e6, 2.0) - 7.5).abs() < 0.01);
        assert!(of(&found(2, 50), Metric::ZMax).1[1] < of(&found(64, 100), Metric::ZMax).1[1]);
    }

    #[test]
    fn a_line_is_held_against_what_its_entries_have_in_common() {
        let mut z = vec![1.0f32; 64 * 40];
        for row in 0..64 {
            z[row * 40 + 7] = 3.0;
        }
        let z = Tensor::new(40, z);
        let (zeros, ones) = (Tensor::zeros(64, 40), Tensor::new(40, vec![1.0; 64 * 40]));
        let found = |independent| {
            let floor = floor_of(ones.clone(), independent);
            of(&against_floor(&z, &zeros, &floor).expect("one shape"), Metric::ZColumn).0
        };
        // A mean square of 9 over 64 independent values, and over one value seen 64 times.
        assert!((found(true) - 17.7).abs() < 0.2, "{}", found(true));
        assert!((found(false) - 2.2).abs() < 0.1, "{}", found(false));
    }

    #[test]
    fn a_histogram_counts_every_element_or_is_not_there() {
        let wave = |n: usize| (0..n).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
        let zeros = Tensor::zeros(64, 16);
        let floor = floor_of(Tensor::new(16, vec![0.5; 1024]), true);
        let counts = |a: &Tensor, b: &Tensor, floor: &Deviations| {
            against_floor(a, b, floor).expect("one shape").histogram
        };
        let all = counts(&Tensor::new(16, wave(1024)), &zeros, &floor);
        assert_eq!(all.expect("enough values").iter().sum::<u64>(), 1024);
        assert_eq!(counts(&zeros, &zeros, &floor), None);
        let few = Tensor::new(16, wave(256));
        let floor = floor_of(Tensor::new(16, vec![0.5; 256]), true);
        assert_eq!(counts(&few, &Tensor::zeros(16, 16), &floor), None);
    }
}
