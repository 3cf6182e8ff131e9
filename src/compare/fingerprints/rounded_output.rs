//! A result rounded once more, or its last rounding cut off.

use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::departure::{Steps, matmul_rows};
use crate::dtype::Format;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the result is rounded to another type, or truncated to its own",
    causes: &["output-rounded", "output-truncated"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let mut fits = Vec::new();
    for format in [Format::Bf16, Format::F16, Format::E4m3] {
        // The product that a bias is added to is rounded already.
        let with_bias = case.gemm().is_some_and(|gemm| gemm.bias.is_some());
        let detail = match with_bias && format == case.recipe.output {
            true => {
                format!("the product is rounded to {format} before the bias, and the sum again")
            }
            false => format!("the result is rounded to {format}"),
        };
        let predicted = mapped(case.clean, |y| format.round(y));
        fits.extend(case.fit_if_any("output-rounded", detail, 0, &predicted));
        let detail = format!("the result is truncated to {format}");
        let predicted = mapped(case.clean, |y| truncated(format, y));
        fits.extend(case.fit_if_any("output-truncated", detail, 0, &predicted));
    }
    if let Some(gemm) = case.gemm() {
        let steps = Steps { output: Format::F32, ..Steps::of(case.recipe) };
        let operands = (gemm.x, gemm.weight, None);
        let exact = matmul_rows(case.arm, case.recipe, operands, 0..gemm.weight.rows(), &steps)?;
        let bias = gemm.bias.map(|bias| bias.to_vec()).transpose()?;
        let output = case.recipe.output;
        let finish = |change: &dyn Fn(f32) -> f32| {
            let mut y = mapped(&exact, change);
            if let Some(bias) = &bias {
                y.add_to_rows(bias);
            }
            y
        };
        for format in [Format::F32, Format::Bf16, Format::F16].into_iter().filter(|f| *f != output)
        {
            let detail = format!("the output is {format} instead of {output}");
            let predicted: Tensor = finish(&|y| format.round(y));
            fits.extend(case.fit_if_any("output-rounded", detail, 0, &predicted));
        }
        let detail = format!("the output is truncated to {output} instead of rounded");
        let predicted = finish(&|y| truncated(output, y));
        fits.extend(case.fit_if_any("output-truncated", detail, 0, &predicted));
    }
    // These differ in the last places only; what is merely near is something else.
    fits.retain(|fit| fit.names_the_bug());
    Ok(fits)
}

/// A value cut to the format's fraction, toward zero.
fn truncated(format: Format, value: f32) -> f32 {
    let rounded = format.round(value);
    if rounded.abs() <= value.abs() || !rounded.is_finite() {
        return rounded;
    }
    format.decode(format.encode(value) - 1)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn a_norm_rounded_to_bf16_and_a_truncated_product_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::RmsNorm { x: &x, gain: bench.weight("blk.1.attn_norm.weight"), eps: 1e-6 };
        let wrong = mapped(&bench.clean(&call), |y| Format::Bf16.round(y));
        bench.expect("output-rounded", &call, &wrong);
        let weight = bench.weight("blk.1.attn_q.weight");
        let steps = Steps { output: Format::F32, ..Steps::of(&bench.recipe) };
        let wrong = mapped(&bench.matmul(&x, weight, &steps), |y| truncated(Format::Bf16, y));
        bench.expect("output-truncated", &Call::Matmul { x: &x, weight, bias: None }, &wrong);
    }
}
