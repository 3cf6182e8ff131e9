//! An operand that went through f16, whose range is short: large values become infinite, and the
//! squares of a norm overflow.

use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::dtype::Format;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a value above 65504 went through f16: a product's activation, or a norm's sum of squares",
    causes: &["f16-operand", "f16-squares"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let limit = f64::from(Format::F16.max_finite());
    match *case.call {
        Call::Matmul { x, weight, bias } => {
            let reaches = x.data().iter().fold(0.0f32, |most, x| most.max(x.abs()));
            if f64::from(reaches) <= limit {
                return Ok(Vec::new());
            }
            let cast = mapped(x, |x| Format::F16.round(x));
            let call = Call::Matmul { x: &cast, weight, bias };
            let detail = format!(
                "the activation is cast to f16 and is infinite beyond {limit}; it reaches {reaches}"
            );
            Ok(case.fit_call("f16-operand", detail, &call)?.into_iter().collect())
        }
        Call::RmsNorm { x, gain, .. } => {
            let width = gain.width().max(1);
            let mut fits = Vec::new();
            for (what, count) in [("sum", 1.0), ("mean", width as f64)] {
                let predicted = with_rows_of_zeros(x, case.clean, width, limit * count);
                let detail =
                    format!("the {what} of a row's squares overflowed in f16, and the row is zero");
                fits.extend(case.fit_if_any("f16-squares", detail, 0, &predicted));
            }
            Ok(fits)
        }
        _ => Ok(Vec::new()),
    }
}

/// The norm, but zeros where a group's squares add up to more than that.
fn with_rows_of_zeros(x: &Tensor, clean: &Tensor, width: usize, most: f64) -> Tensor {
    let groups = x.data().chunks(width).zip(clean.data().chunks(width));
    let data = groups.flat_map(|(x, clean)| {
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let factor = if squares > most { 0.0 } else { 1.0 };
        clean.iter().map(move |&y| y * factor)
    });
    Tensor::new(clean.width(), data.collect())
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn a_row_whose_squares_overflow_in_f16_is_recognised() {
        let bench = Bench::default();
        let mut x = bench.tensor(8, 256, 1);
        x.row_mut(3).iter_mut().for_each(|x| *x += 300.0);
        let gain = bench.weight("blk.1.attn_norm.weight");
        let call = Call::RmsNorm { x: &x, gain, eps: 1e-6 };
        let mut wrong = bench.clean(&call);
        wrong.row_mut(3).fill(0.0);
        bench.expect("f16-squares", &call, &wrong);
    }

    #[test]
    fn an_activation_that_overflows_on_its_cast_to_f16_is_recognised() {
        let bench = Bench::default();
        let mut x = bench.tensor(6, 256, 1);
        x.row_mut(2)[17] = 8e4;
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let cast = mapped(&x, |x| Format::F16.round(x));
        let wrong = bench.clean(&Call::Matmul { x: &cast, weight, bias: None });
        bench.expect("f16-operand", &call, &wrong);
    }
}
