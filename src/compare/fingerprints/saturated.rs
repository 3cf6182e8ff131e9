//! Operands converted with too small a scale (they clip) or too large a one.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, keep, requantised};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "an operand is converted with another scale: large values clip, or small ones vanish",
    causes: &["saturated", "scale-too-large"],
    bugs: &[],
    test,
};

/// Factors of the scale that are tried.
const FACTORS: [f32; 8] = [0.5, 0.25, 0.125, 0.75, 0.0625, 2.0, 4.0, 16.0];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    if !case.multiplies_codes() {
        return Ok(Vec::new());
    }
    let mut fits = Vec::new();
    for factor in FACTORS {
        let change: &Edit = &|operand| requantised(operand, factor);
        for (whose, x, w) in
            [("activation", change, &keep as &Edit), ("weight", &keep as &Edit, change)]
        {
            let (cause, what) = if factor < 1.0 {
                ("saturated", format!("values clip at {}", case.recipe.gemm.max_finite()))
            } else {
                ("scale-too-large", "small values lose their bits".to_owned())
            };
            let detail = format!("the {whose} is converted with {factor} times its scale: {what}");
            let steps = Steps { x, w, ..Steps::of(case.recipe) };
            fits.extend(case.fit_gemm(cause, detail, gemm, &steps)?);
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn a_halved_scale_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let half: &Edit = &|operand| requantised(operand, 0.5);
        let steps = Steps { x: half, ..Steps::of(&bench.recipe) };
        let call = Call::Matmul { x: &x, weight, bias: None };
        bench.expect("saturated", &call, &bench.matmul(&x, weight, &steps));
    }
}
