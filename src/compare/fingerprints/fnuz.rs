//! FP8 of the kind "finite, no infinity, unsigned zero" (`e4m3fnuz`, AMD's before MI350): its
//! exponent bias is one larger, its largest value 240, and the code of negative zero its NaN.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, MOST_E4M3FNUZ, Steps, clipped, keep, read_as_fnuz};
use crate::dtype::Format;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "FP8 codes are read, or clipped, as those of the fnuz kind",
    causes: &["fp8-fnuz"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let format = case.recipe.gemm;
    if !case.multiplies_fp8() {
        return Ok(Vec::new());
    }
    let mut fits = Vec::new();
    let mut tried = |edit: &Edit<'_>, words: &dyn Fn(&str) -> String| {
        for (whose, x, w) in
            [("activation's", edit, &keep as &Edit), ("weight's", &keep as &Edit, edit)]
        {
            let steps = Steps { x, w, ..Steps::of(case.recipe) };
            fits.extend(case.fit_gemm("fp8-fnuz", words(whose), gemm, &steps)?);
        }
        Ok::<(), ComputeError>(())
    };
    // Without a NaN it is a factor of one half, which other faults make too: `scale-wrong` says so.
    if case.subject.data().iter().any(|value| value.is_nan()) {
        tried(&read_as_fnuz, &|whose| {
            format!(
                "the {whose} {format} codes are read as {format}fnuz: every product is half, and \
                 negative zero is NaN"
            )
        })?;
    }
    if format == Format::E4m3 {
        tried(&|operand| clipped(operand, MOST_E4M3FNUZ), &|whose| {
            format!("the {whose} codes clip at {MOST_E4M3FNUZ}, the largest value of e4m3fnuz")
        })?;
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::{Call, MadeWeight};
    use crate::compute::departure::scaled;

    #[test]
    fn codes_of_the_fnuz_kind_are_recognised_by_their_nan_or_their_largest_value() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let mut values = weight.to_vec().expect("values");
        // Rounds to negative zero.
        values[5 * 256 + 9] = -1e-9;
        let made = MadeWeight::new("w".to_owned(), 256, &values);
        let weight = made.weight().expect("a weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let of_w =
            |w: &Edit<'_>| bench.matmul(&x, weight, &Steps { w, ..Steps::of(&bench.recipe) });
        let wrong = of_w(&read_as_fnuz);
        assert!(wrong.row(0)[5].is_nan() && !wrong.row(0)[4].is_nan());
        bench.expect("fp8-fnuz", &call, &wrong);
        bench.expect("fp8-fnuz", &call, &of_w(&|operand| clipped(operand, MOST_E4M3FNUZ)));
        // Half a scale leaves no NaN: a factor, and the words that it may be this.
        let half = of_w(&|operand| scaled(operand, |scale| 0.5 * scale));
        bench.expect("scale-wrong", &call, &half);
        assert!(bench.fits(&call, &half)[0].detail.contains("fnuz"));
    }
}
