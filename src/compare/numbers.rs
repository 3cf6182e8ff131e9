//! Metrics of two finite tensors of one shape.
//!
//! All sums are f64 over rows in order. It knows nothing of sites or streams.

use super::{Z_FROM, Z_STEP, ZHistogram};
use crate::metric::Metric;
use crate::tensor::Tensor;

/// Outputs below which a root mean square of z says too little: with n of them
/// it deviates by `1 / sqrt(2 n)`, 3 % here.
const LEAST_OUTPUTS: usize = 512;

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

/// `z = (a - b) / floor`: its metrics and its distribution. Where the floor is
/// zero, only equality is allowed.
pub fn against_floor(
    a: &Tensor,
    b: &Tensor,
    floor: &Tensor,
) -> (Vec<(Metric, f64)>, Option<ZHistogram>) {
    if (floor.rows(), floor.width()) != (a.rows(), a.width()) {
        return (Vec::new(), None);
    }
    let each =
        pairs(a, b).zip(floor.data()).map(|((a, b), &floor)| match (a - b, f64::from(floor)) {
            (0.0, _) => 0.0,
            (difference, floor) if floor > 0.0 => difference / floor,
            _ => f64::MAX.sqrt().sqrt(),
        });
    let z: Vec<f64> = each.collect();
    let (rows, width) = (a.rows(), a.width());
    let squares: f64 = z.iter().map(|z| z * z).sum();
    let most = z.iter().fold(0.0, |most, z| larger(most, z.abs()));
    let mut metrics = vec![
        (Metric::ZMax, most),
        (Metric::ZMean, z.iter().sum::<f64>() / z.len() as f64),
        (Metric::ZRow, worst_line(rows, width, |row, column| z[row * width + column])),
        (Metric::ZColumn, worst_line(width, rows, |column, row| z[row * width + column])),
    ];
    if z.len() >= LEAST_OUTPUTS {
        metrics.push((Metric::ZRms, (squares / z.len() as f64).sqrt()));
    }
    // Of few values, or where nothing differs, the counts say nothing.
    let told = z.len() >= LEAST_OUTPUTS && most > 0.0;
    (metrics, told.then(|| histogram(&z)))
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

/// Lines from which the correlation within a line can be told.
const LEAST_LINES: usize = 64;
/// Entries of a line whose correlations are looked at.
const SAMPLED: usize = 32;

/// How far the worst line's sum of squares stands above its expectation, in
/// deviations of a standard normal variable.
///
/// A sum of n independent squares becomes nearly normal as the cube root of its
/// mean (Wilson and Hilferty 1931). Outputs of one line share an operand's
/// rounding: with a mean squared correlation r2 between them the sum spreads
/// like one of `n / (1 + (n - 1) r2)` independent squares. With too few lines to
/// measure r2, a line counts as a single square.
fn worst_line(lines: usize, length: usize, z: impl Fn(usize, usize) -> f64) -> f64 {
    let mean_square =
        |line: usize| (0..length).map(|entry| z(line, entry).powi(2)).sum::<f64>() / length as f64;
    let most = (0..lines).map(mean_square).fold(0.0, larger);
    let freedom = if lines < LEAST_LINES {
        1.0
    } else {
        let step = length.div_ceil(SAMPLED);
        let sample: Vec<usize> = (0..length).step_by(step).collect();
        let product = |a: usize, b: usize| (0..lines).map(|l| z(l, a) * z(l, b)).sum::<f64>();
        let sizes: Vec<f64> = sample.iter().map(|&entry| product(entry, entry)).collect();
        let (mut squared, mut count) = (0.0, 0);
        for (i, &a) in sample.iter().enumerate() {
            for (j, &b) in sample.iter().enumerate().take(i) {
                let sizes = sizes[i] * sizes[j];
                if sizes > 0.0 {
                    squared += product(a, b).powi(2) / sizes;
                    count += 1;
                }
            }
        }
        // Independent entries correlate by chance: 1 / lines on average.
        let chance = 1.0 / lines as f64;
        let r2 = if count > 0 { larger(squared / f64::from(count) - chance, 0.0) } else { 1.0 };
        length as f64 / (1.0 + (length as f64 - 1.0) * r2)
    };
    let spread = 2.0 / (9.0 * freedom);
    (most.cbrt() - (1.0 - spread)) / spread.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_z_falls_into_one_bin() {
        let counts = histogram(&[-1e30, -4.1, -4.0, -3.51, -0.1, 0.0, 0.49, 3.99, 4.0, 1e77]);
        assert_eq!(counts, [2, 2, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 2]);
    }

    #[test]
    fn a_histogram_counts_every_element_or_is_not_there() {
        let wave = |n: usize| (0..n).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
        let (zeros, floor) = (Tensor::zeros(64, 16), Tensor::new(16, vec![0.5; 1024]));
        let (_, counts) = against_floor(&Tensor::new(16, wave(1024)), &zeros, &floor);
        assert_eq!(counts.expect("enough values").iter().sum::<u64>(), 1024);
        let (_, counts) = against_floor(&zeros, &zeros, &floor);
        assert_eq!(counts, None);
        let few = Tensor::new(16, wave(256));
        let floor = Tensor::new(16, vec![0.5; 256]);
        assert_eq!(against_floor(&few, &Tensor::zeros(16, 16), &floor).1, None);
    }
}
