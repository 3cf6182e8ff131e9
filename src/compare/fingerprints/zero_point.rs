//! A weight whose groups are each shifted by a constant: a zero point that is off.
//!
//! Weights of few bits stand for `(code - zero) * scale`. Two versions of one file format store
//! the zero and the zero less one; read as the other, every weight moves by its group's scale.

use super::{Case, Fingerprint, Fit, LARGEST_REARRANGED};
use crate::compute::ComputeError;
use crate::compute::emulated::quantize::absmax;
use crate::tensor::Tensor;
use crate::text::number;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "each group of a weight is shifted by a constant",
    causes: &["zero-point"],
    bugs: &[],
    test,
};

/// What one step of a group is a share of.
type Unit = fn(&[f32]) -> f32;

/// Lengths of groups along K that share a scale and a zero point.
const GROUPS: [usize; 3] = [32, 64, 128];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (rows, outputs, inner) = (case.subject.rows(), case.subject.width(), gemm.x.width());
    let fits_shapes = (gemm.x.rows(), gemm.weight.rows()) == (rows, outputs);
    if outputs * inner > LARGEST_REARRANGED || !fits_shapes {
        return Ok(Vec::new());
    }
    let weight = gemm.weight.to_vec()?;
    let mut fits = Vec::new();
    let groups = GROUPS.into_iter().filter(|group| *group < inner).chain([inner]);
    for group in groups {
        let sums: Vec<Vec<f64>> = (0..rows).map(|row| sums_of(gemm.x.row(row), group)).collect();
        let units: [(&str, Unit); 2] = [("largest magnitude", absmax), ("range", range)];
        for (unit, of) in units {
            let units: Vec<Vec<f64>> = weight
                .chunks(inner)
                .map(|row| row.chunks(group).map(|group| f64::from(of(group))).collect())
                .collect();
            // What a shift of one unit adds to each output.
            let added = |row: usize, column: usize| -> f64 {
                sums[row].iter().zip(&units[column]).map(|(sum, unit)| sum * unit).sum()
            };
            let (mut da, mut aa) = (0.0, 0.0);
            let mut all = Vec::with_capacity(rows * outputs);
            for row in 0..rows {
                for column in 0..outputs {
                    let added = added(row, column);
                    all.push(added);
                    let [s, c] = [case.subject, case.clean].map(|y| f64::from(y.row(row)[column]));
                    if case.trains(row, column) && (s - c).is_finite() {
                        da += (s - c) * added;
                        aa += added * added;
                    }
                }
            }
            let share = da / aa;
            if !share.is_finite() || share == 0.0 {
                continue;
            }
            let pairs = case.clean.data().iter().zip(&all);
            let predicted = pairs.map(|(&c, added)| (f64::from(c) + share * added) as f32);
            let predicted = Tensor::new(outputs, predicted.collect());
            let of = match group == inner {
                true => "each row of the weight".to_owned(),
                false => format!("each group of {group} of the weight's rows"),
            };
            let detail = format!(
                "{of} is shifted by {} of its {unit}, as a zero point that is off shifts it",
                number(share)
            );
            fits.extend(case.fit_if_any("zero-point", detail, 1, &predicted));
        }
    }
    fits.retain(Fit::names_the_bug);
    Ok(fits)
}

fn sums_of(row: &[f32], group: usize) -> Vec<f64> {
    row.chunks(group).map(|group| group.iter().map(|&x| f64::from(x)).sum()).collect()
}

/// The largest value less the smallest.
fn range(values: &[f32]) -> f32 {
    let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    most - values.iter().copied().fold(f32::INFINITY, f32::min)
}

/// The weight with each group of `group` along K less one step of 4 bits: its largest magnitude
/// over 7.5.
pub fn shifted(weight: &[f32], inner: usize, group: usize) -> Vec<f32> {
    let groups = weight.chunks(inner).flat_map(|row| row.chunks(group));
    groups
        .flat_map(|group| {
            let step = absmax(group) / 7.5;
            group.iter().map(move |w| w - step)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::{Call, MadeWeight};

    #[test]
    fn a_group_moves_by_a_step_of_its_own() {
        assert_eq!(shifted(&[7.5, 0.0, -15.0, 3.0], 4, 2), [6.5, -1.0, -17.0, 1.0]);
        assert_eq!(range(&[-2.0, 1.0, 0.5]), 3.0);
        assert_eq!(sums_of(&[1.0, 2.0, 4.0], 2), [3.0, 4.0]);
    }

    #[test]
    fn a_zero_point_that_is_off_is_recognised_with_its_group() {
        let bench = Bench::default();
        let x = bench.tensor(6, 256, 1);
        let weight = bench.weight("blk.1.ffn_up.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        for group in [64, 128] {
            let moved = shifted(&weight.to_vec().expect("values"), 256, group);
            let made = MadeWeight::new("shifted".to_owned(), weight.rows(), &moved);
            let wrong = Call::Matmul { x: &x, weight: made.weight().expect("one"), bias: None };
            let wrong = bench.clean(&wrong);
            bench.expect("zero-point", &call, &wrong);
            let detail = &bench.fits(&call, &wrong)[0].detail;
            assert!(detail.contains(&format!("group of {group}")), "{detail}");
        }
    }
}
