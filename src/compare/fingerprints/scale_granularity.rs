//! Scales of another granularity: per tensor for per channel, and the like.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::emulated::arm::Emulated;
use crate::op::{ActivationScale, Scale, WeightScale};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the scales have another granularity than the recipe's",
    causes: &["scale-granularity"],
    bugs: &[],
    test,
};

/// Larger weights are not multiplied again in every granularity.
const LARGEST: usize = 1 << 23;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    if !case.recipe.gemm.is_scaled() || gemm.weight.rows() * gemm.weight.width() > LARGEST {
        return Ok(Vec::new());
    }
    let mut fits = Vec::new();
    for weight in [WeightScale::Tensor, WeightScale::Channel, WeightScale::Block128] {
        for activation in
            [ActivationScale::Tensor, ActivationScale::Token, ActivationScale::Block128]
        {
            let scale = Scale { weight, activation };
            let blocks = weight == WeightScale::Block128 || activation == ActivationScale::Block128;
            if scale == case.recipe.scale || blocks && !case.recipe.gemm.is_fp8() {
                continue;
            }
            let Some(recipe) = case.recipe.with_scale(scale) else { continue };
            let Ok(arm) = Emulated::new(&recipe) else { continue };
            let predicted = match case.call.on(&arm) {
                // The engine gives this weight to a kernel that is not known.
                Err(ComputeError::Recipe(_)) => continue,
                predicted => predicted?,
            };
            let detail =
                format!("scales per {weight:?} (weight) and per {activation:?} (activation)");
            fits.extend(case.fit_if_any("scale-granularity", detail.to_lowercase(), 0, &predicted));
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::op::Recipe;

    #[test]
    fn scales_per_channel_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let scale = Scale { weight: WeightScale::Channel, ..bench.recipe.scale };
        let arm = Emulated::new(&Recipe { scale, ..bench.recipe }).expect("a recipe");
        bench.expect("scale-granularity", &call, &call.on(&arm).expect("a product"));
    }
}
