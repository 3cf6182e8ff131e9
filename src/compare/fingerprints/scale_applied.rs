//! The scales of an FP8 operand that are not applied, or applied twice: of rows and blocks each
//! by its own factor.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, keep, scaled};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "an operand's scales are not applied, or applied twice",
    causes: &["scale-missing", "scale-twice"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    if !case.multiplies_codes() {
        return Ok(Vec::new());
    }
    let (missing, twice): (&Edit, &Edit) =
        (&|operand| scaled(operand, |_| 1.0), &|operand| scaled(operand, |scale| scale * scale));
    let none = &keep as &Edit;
    let mut fits = Vec::new();
    for (cause, x, w, detail) in [
        ("scale-missing", missing, none, "the activation's scales are not applied"),
        ("scale-missing", none, missing, "the weight's scales are not applied"),
        (
            "scale-missing",
            missing,
            missing,
            "neither the activation's nor the weight's scales are applied",
        ),
        ("scale-twice", twice, none, "the activation's scales are applied twice"),
        ("scale-twice", none, twice, "the weight's scales are applied twice"),
    ] {
        let steps = Steps { x, w, ..Steps::of(case.recipe) };
        fits.extend(case.fit_gemm(cause, detail.to_owned(), gemm, &steps)?);
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::op::{ActivationScale, WeightScale};

    #[test]
    fn scales_of_rows_that_are_missing_or_doubled_are_recognised() {
        let bench = Bench::with_scales(WeightScale::Channel, ActivationScale::Token);
        let x = bench.tensor(6, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let missing: &Edit = &|operand| scaled(operand, |_| 1.0);
        let twice: &Edit = &|operand| scaled(operand, |scale| scale * scale);
        for (cause, edit) in [("scale-missing", missing), ("scale-twice", twice)] {
            for of_x in [true, false] {
                let (x_edit, w) =
                    if of_x { (edit, &keep as &Edit) } else { (&keep as &Edit, edit) };
                let steps = Steps { x: x_edit, w, ..Steps::of(&bench.recipe) };
                let wrong = bench.matmul(&x, weight, &steps);
                bench.expect(cause, &call, &wrong);
                let whose = if of_x { "the activation's" } else { "the weight's" };
                assert!(bench.fits(&call, &wrong)[0].detail.starts_with(whose));
            }
        }
    }
}
