//! Another format than the recipe's, or none at all: the knob was not engaged.

use super::{Case, Fingerprint, Fit, same_bits};
use crate::compute::ComputeError;
use crate::compute::emulated::arm::Emulated;
use crate::dtype::Format;
use crate::op::Recipe;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the arm did not engage the recipe's format",
    causes: &["not-engaged", "other-format"],
    test,
};

/// Weights larger than this are not multiplied again in every format.
const LARGEST: usize = 1 << 23;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let mut fits = Vec::new();
    if same_bits(case.subject.data(), case.truth.data()) {
        let detail = format!(
            "the result is the reference's, bit for bit: {} was not engaged",
            case.recipe.gemm
        );
        fits.push(case.fit("not-engaged", detail, 0, case.truth));
    }
    if gemm.weight.rows() * gemm.weight.width() > LARGEST {
        return Ok(fits);
    }
    let formats =
        [Format::F32, Format::Tf32, Format::Bf16, Format::F16, Format::E4m3, Format::E5m2];
    for format in formats.into_iter().filter(|format| *format != case.recipe.gemm) {
        for output in [Format::F32, Format::Bf16, Format::F16] {
            let recipe = Recipe { gemm: format, output, engine: None, ..*case.recipe };
            let Ok(arm) = Emulated::new(&recipe) else { continue };
            let predicted = case.call.on(&arm)?;
            let detail = format!("{format} was computed instead of {}", case.recipe.gemm);
            fits.extend(case.fit_if_any("other-format", detail, 0, &predicted));
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::compute::reference::Reference;

    #[test]
    fn an_arm_that_computed_in_bf16_or_not_at_all_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        bench.expect("not-engaged", &call, &call.on(&Reference).expect("a product"));
        let bf16 = Emulated::new(&Recipe { gemm: Format::Bf16, ..bench.recipe });
        let wrong = call.on(&bf16.expect("a recipe")).expect("a product");
        bench.expect("other-format", &call, &wrong);
    }
}
