//! 8-bit integers: codes that wrap where they must saturate, that use -128 too, or that stand for
//! values beside a zero point which nobody took away.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, keep, requantised, wrapped, zero_point_ignored};
use crate::dtype::Format;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "integers wrap, use -128 too, or have a zero point that is ignored",
    causes: &["int8-wrapped", "int8-range", "zero-point-ignored"],
    bugs: &[],
    test,
};

/// Factors of the scale with which integers may leave their range. At 1 the largest value is 127.
const FACTORS: [f32; 5] = [0.5, 0.25, 0.75, 0.125, 0.9];
/// From a scale of the largest magnitude over 127 to one over 128.
pub const TO_128: f32 = 127.0 / 128.0;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    if case.recipe.gemm != Format::Int8 || !case.multiplies_codes() {
        return Ok(Vec::new());
    }
    let mut fits = Vec::new();
    let mut tried = |cause: &str, edit: &Edit<'_>, words: &dyn Fn(&str) -> String| {
        for (whose, x, w) in
            [("activation", edit, &keep as &Edit), ("weight", &keep as &Edit, edit)]
        {
            let steps = Steps { x, w, ..Steps::of(case.recipe) };
            fits.extend(case.fit_gemm(cause, words(whose), gemm, &steps)?);
        }
        Ok::<(), ComputeError>(())
    };
    for factor in FACTORS {
        tried("int8-wrapped", &|operand| wrapped(operand, factor), &|whose| {
            format!(
                "the {whose} is converted with {factor} times its scale, and what leaves -128 to 127 \
                 wraps around instead of being clipped"
            )
        })?;
    }
    tried("int8-range", &|operand| requantised(operand, TO_128), &|whose| {
        format!(
            "the {whose} is scaled by its largest magnitude over 128, so that -128 is a code too: the \
             scale is 127/128 of what it should be, and the largest positive value clips"
        )
    })?;
    tried("zero-point-ignored", &zero_point_ignored, &|whose| {
        format!("the {whose} is converted with a zero point, which is not taken away from the sums")
    })?;
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::compute::departure::{scaled, truncated};
    use crate::compute::emulated::arm::Emulated;
    use crate::op::{ActivationScale, Recipe, Scale, WeightScale};

    fn bench(weight: WeightScale, activation: ActivationScale) -> Bench {
        let bench = Bench::default();
        let scale = Scale { weight, activation };
        let recipe = Recipe { gemm: Format::Int8, scale, ..bench.recipe };
        Bench { recipe, arm: Emulated::new(&recipe).expect("a recipe"), ..bench }
    }

    #[test]
    fn what_is_wrong_with_integers_is_named_in_either_operand() {
        for (of_w, of_x) in [
            (WeightScale::Tensor, ActivationScale::Tensor),
            (WeightScale::Channel, ActivationScale::Token),
        ] {
            let bench = bench(of_w, of_x);
            let x = bench.tensor(8, 256, 1);
            let weight = bench.weight("blk.1.attn_q.weight");
            let call = Call::Matmul { x: &x, weight, bias: None };
            let wrap: &Edit = &|operand| wrapped(operand, 0.5);
            let range: &Edit = &|operand| requantised(operand, TO_128);
            let clip: &Edit = &|operand| requantised(operand, 0.5);
            let missing: &Edit = &|operand| scaled(operand, |_| 1.0);
            for (cause, edit) in [
                ("int8-wrapped", wrap),
                ("int8-range", range),
                ("zero-point-ignored", &zero_point_ignored),
                ("saturated", clip),
                ("scale-missing", missing),
                ("truncating-cast", &truncated),
            ] {
                for x_first in [true, false] {
                    let (x_edit, w) =
                        if x_first { (edit, &keep as &Edit) } else { (&keep as &Edit, edit) };
                    let steps = Steps { x: x_edit, w, ..Steps::of(&bench.recipe) };
                    bench.expect(cause, &call, &bench.matmul(&x, weight, &steps));
                }
            }
        }
    }

    #[test]
    fn scales_of_another_granularity_are_recognised() {
        let bench = bench(WeightScale::Channel, ActivationScale::Token);
        let x = bench.tensor(6, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        for scale in [
            Scale { weight: WeightScale::Tensor, ..bench.recipe.scale },
            Scale { activation: ActivationScale::Tensor, ..bench.recipe.scale },
        ] {
            let arm = Emulated::new(&Recipe { scale, ..bench.recipe }).expect("a recipe");
            bench.expect("scale-granularity", &call, &call.on(&arm).expect("a product"));
        }
    }
}
