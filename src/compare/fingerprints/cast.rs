//! A cast to FP8 that makes NaN of what is too large where it must saturate.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::emulated::quantize::absmax;
use crate::dtype::Format;
use crate::tensor::Tensor;
use crate::text::number;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a cast to FP8 makes NaN of values beyond the largest, where it must saturate",
    causes: &["cast-without-saturation"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let finite = |x: &Tensor| x.data().iter().all(|value| value.is_finite());
    if case.recipe.gemm != Format::E4m3
        || !case.multiplies_fp8()
        || finite(case.subject)
        || !finite(case.clean)
    {
        return Ok(Vec::new());
    }
    let (rows, width) = (case.subject.rows(), case.subject.width());
    let at = |row: usize, column: usize| case.subject.row(row)[column];
    let lines = [
        // A value of the activation enters every output of its row, one of the weight every
        // output of its column.
        ("activation", rows, width, &at as &dyn Fn(usize, usize) -> f32),
        ("weight", width, rows, &|column, row| at(row, column)),
    ];
    let mut fits = Vec::new();
    for (whose, count, length, at) in lines {
        let Some(lost) = lost_lines(count, length, at) else { continue };
        let sizes: Vec<f32> = match whose {
            "activation" => gemm.x.data().chunks(gemm.x.width()).map(absmax).collect(),
            _ => gemm.weight.to_vec()?.chunks(gemm.weight.width()).map(absmax).collect(),
        };
        let of = |wanted: bool| {
            let lines = sizes.iter().zip(&lost).filter(move |(_, lost)| **lost == wanted);
            lines.map(|(size, _)| *size)
        };
        // The largest values of whole lines decide which of them are lost.
        let (kept, gone) = (of(false).fold(0.0, f32::max), of(true).fold(f32::INFINITY, f32::min));
        if !gone.is_finite() || gone <= kept {
            continue;
        }
        let mut predicted = case.clean.clone();
        for (line, _) in lost.iter().enumerate().filter(|(_, lost)| **lost) {
            for other in 0..length {
                let (row, column) = if whose == "weight" { (other, line) } else { (line, other) };
                predicted.row_mut(row)[column] = f32::NAN;
            }
        }
        let detail = format!(
            "every {} whose {whose} holds a magnitude of {} or more is NaN, and no other: the cast \
             to {} does not saturate",
            if whose == "weight" { "column" } else { "row" },
            number(f64::from(gone)),
            case.recipe.gemm
        );
        let fit = case.fit("cast-without-saturation", detail, 0, &predicted);
        // Which lines are NaN is what is seen; what is finite may have another scale.
        fits.push(Fit { explained: 1.0, significant: true, ..fit });
    }
    Ok(fits)
}

/// Which lines are NaN from end to end; nothing unless several are, some are not, and no line is
/// NaN in part. One line alone may well be the one with the largest value for another reason.
fn lost_lines(count: usize, length: usize, at: &dyn Fn(usize, usize) -> f32) -> Option<Vec<bool>> {
    let lost: Vec<bool> = (0..count).map(|line| at(line, 0).is_nan()).collect();
    let whole = |line: usize| (0..length).all(|other| at(line, other).is_nan() == lost[line]);
    let mixed = lost.iter().filter(|lost| **lost).count() > 1 && lost.contains(&false);
    (length > 1 && mixed && (0..count).all(whole)).then_some(lost)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::compute::departure::{Edit, Steps, unsaturated};

    #[test]
    fn a_cast_that_does_not_saturate_is_recognised_in_either_operand() {
        let bench = Bench::default();
        let mut x = bench.tensor(6, 256, 1);
        // Two tokens with a large value: the scale is made for the others.
        x.row_mut(4)[17] = 30.0;
        x.row_mut(1)[200] = -27.0;
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let cast: &Edit = &|operand| unsaturated(operand, 0.5);
        let of_x = bench.matmul(&x, weight, &Steps { x: cast, ..Steps::of(&bench.recipe) });
        assert!(of_x.row(4).iter().all(|y| y.is_nan()) && of_x.row(3)[0].is_finite());
        bench.expect("cast-without-saturation", &call, &of_x);
        let cast: &Edit = &|operand| unsaturated(operand, 0.9);
        let of_w = bench.matmul(&x, weight, &Steps { w: cast, ..Steps::of(&bench.recipe) });
        bench.expect("cast-without-saturation", &call, &of_w);
    }

    #[test]
    fn a_row_of_nan_with_small_values_is_no_such_cast() {
        let bench = Bench::default();
        let mut x = bench.tensor(6, 256, 1);
        x.row_mut(4)[17] = 30.0;
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let mut wrong = bench.clean(&call);
        wrong.row_mut(2).fill(f32::NAN);
        wrong.row_mut(5).fill(f32::NAN);
        assert!(bench.found(&call, &wrong, test).is_empty());
    }
}
