//! Scales of FP8 operands that somebody else's rule made: powers of two beside codes of other
//! scales, or the scale of the largest of several weights.

use super::scale_order::sisters_of;
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, keep, requantised, rounded_up_beside_codes};
use crate::compute::emulated::quantize::absmax;
use crate::op::WeightScale;
use crate::text::number;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "scales are rounded to powers of two with the codes left as they were, or are those of a group of weights",
    causes: &["scale-power-of-two", "scale-of-the-group"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    if !case.multiplies_codes() {
        return Ok(Vec::new());
    }
    let up: &Edit = &rounded_up_beside_codes;
    let mut fits = Vec::new();
    for (what, x, w) in [
        ("the weight's scales are", &keep as &Edit, up),
        ("the activation's scales are", up, &keep as &Edit),
        ("all scales are", up, up),
    ] {
        let detail = format!("{what} rounded up to powers of two, and the codes left as they were");
        let steps = Steps { x, w, ..Steps::of(case.recipe) };
        fits.extend(case.fit_gemm("scale-power-of-two", detail, gemm, &steps)?);
    }
    if let Some((ratio, name)) = ratio_to_group(case)? {
        let w: &Edit = &|operand| requantised(operand, ratio);
        let steps = Steps { w, ..Steps::of(case.recipe) };
        let detail = format!(
            "the weight has the scale of `{name}`, which is {} times its own",
            number(f64::from(ratio))
        );
        fits.extend(case.fit_gemm("scale-of-the-group", detail, gemm, &steps)?);
    }
    Ok(fits)
}

/// How much larger the scale of the largest weight of the group is, and whose that is.
fn ratio_to_group(case: &Case<'_>) -> Result<Option<(f32, String)>, ComputeError> {
    let (Some(gemm), Some(model)) = (case.gemm(), case.model) else { return Ok(None) };
    // An engine that gives fused weights one scale does what its kernel does.
    let of_engine = case.arm.engine().is_some_and(|e| e.quantises(gemm.weight.name()));
    if case.recipe.scale.weight != WeightScale::Tensor || of_engine {
        return Ok(None);
    }
    let mine = absmax(&gemm.weight.to_vec()?);
    let mut largest = (mine, String::new());
    for name in sisters_of(gemm.weight.name(), model) {
        let most = absmax(&model.tensor(&name)?.to_vec()?);
        if most > largest.0 {
            largest = (most, name);
        }
    }
    Ok((largest.0 > mine && mine > 0.0).then(|| (largest.0 / mine, largest.1)))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn powers_of_two_beside_codes_of_other_scales_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let up: &Edit = &rounded_up_beside_codes;
        let steps = Steps { x: up, w: up, ..Steps::of(&bench.recipe) };
        bench.expect("scale-power-of-two", &call, &bench.matmul(&x, weight, &steps));
    }
    #[test]
    fn the_scale_of_the_largest_of_fused_weights_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let all = ["attn_q", "attn_k", "attn_v"].map(|part| format!("blk.1.{part}.weight"));
        let most = |name: &String| absmax(&bench.weight(name).to_vec().expect("a weight's values"));
        let largest = all.iter().map(most).fold(0.0, f32::max);
        let mut seen = 0;
        for name in all.iter().filter(|name| most(name) < largest) {
            let weight = bench.weight(name);
            let ratio = largest / most(name);
            let w: &Edit = &|operand| requantised(operand, ratio);
            let steps = Steps { w, ..Steps::of(&bench.recipe) };
            let call = Call::Matmul { x: &x, weight, bias: None };
            bench.expect("scale-of-the-group", &call, &bench.matmul(&x, weight, &steps));
            seen += 1;
        }
        assert!(seen > 0, "all weights have one largest value");
    }
}
