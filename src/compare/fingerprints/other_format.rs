//! Another format than the recipe's, or none at all: the knob was not engaged.

use super::{Case, Fingerprint, Fit, same_bits};
use crate::compute::ComputeError;
use crate::compute::emulated::arm::Emulated;
use crate::dtype::Format;
use crate::op::Recipe;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the arm did not engage the recipe's format",
    causes: &["not-engaged", "other-format"],
    bugs: &[],
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
    for format in Format::ALL.into_iter().filter(|format| *format != case.recipe.gemm) {
        for output in [Format::F32, Format::Bf16, Format::F16] {
            let recipe = Recipe { gemm: format, output, engine: None, ..*case.recipe };
            let Ok(arm) = Emulated::new(&recipe) else { continue };
            let predicted = case.call.on(&arm)?;
            let detail = format!("{format} was computed instead of {}", case.recipe.gemm);
            let Some(fit) = case.fit_if_any("other-format", detail, 0, &predicted) else {
                continue;
            };
            // Operands that both formats hold give the same bits: that tells nothing of a format.
            let own = Emulated::new(&Recipe { gemm: case.recipe.gemm, ..recipe })
                .and_then(|arm| case.call.on(&arm));
            if !own.is_ok_and(|own| same_bits(own.data(), predicted.data())) {
                fits.push(fit);
            }
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::{Call, MadeWeight};
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

    #[test]
    fn a_format_that_gives_the_recipes_own_bits_is_not_named() {
        let bench = Bench::default();
        // f16 holds these bf16 values, so its products are the same.
        let x = super::super::mapped(&bench.tensor(4, 256, 1), |x| Format::Bf16.round(x));
        let weight = bench.weight("blk.1.attn_q.weight");
        let mut rows = vec![0.0; weight.rows() * weight.width()];
        weight.decode_rows(0..weight.rows(), &mut rows).expect("rows");
        let rows = rows.into_iter().map(|w| Format::F16.round(Format::Bf16.round(w)));
        let rows: Vec<f32> = rows.map(|w| Format::Bf16.round(w)).collect();
        let made = MadeWeight::new("blk.1.attn_q.weight".to_owned(), weight.rows(), &rows);
        let call = Call::Matmul { x: &x, weight: made.weight().expect("a weight"), bias: None };
        let recipe = Recipe { gemm: Format::Bf16, output: Format::Bf16, ..bench.recipe };
        let arm = Emulated::new(&recipe).expect("an arm");
        let in_bf16 = Bench { recipe, arm, ..Bench::default() };
        // A product in the recipe's format that was not rounded to its output.
        let unrounded = Emulated::new(&Recipe { output: Format::F32, ..recipe });
        let subject = call.on(&unrounded.expect("an arm")).expect("a product");
        let fits = in_bf16.found(&call, &subject, test);
        assert!(fits.iter().all(|fit| !fit.detail.starts_with("f16")), "{fits:?}");
    }
}
