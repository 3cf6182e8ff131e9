//! An f16 output that is written before the scales are applied.

use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, keep, matmul_rows, scaled};
use crate::compute::emulated::gemm::Scales;
use crate::dtype::Format;
use crate::text::number;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "outputs pass through f16 before a scale is applied, and overflow",
    causes: &["f16-overflow", "f16-intermediate"],
    bugs: &[],
    test,
};

/// The largest finite f16.
const LARGEST: f32 = 65_504.0;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (_, Scales::Tensor(x_scale)) = case.arm.quantise_activation(gemm.x) else {
        return Ok(Vec::new());
    };
    let whole = case.arm.absmax_of(gemm.weight)?;
    let (_, w_scales) = case.arm.quantise_weight_rows(gemm.weight, 0, &[], whole);
    let one: &Edit = &|operand| scaled(operand, |_| 1.0);
    let mut cases = vec![("the activation's scale", x_scale, &keep as &Edit)];
    if let Scales::Tensor(w_scale) = w_scales {
        cases.push(("both scales", x_scale * w_scale, one));
    }
    let mut fits = Vec::new();
    for (before, scale, w) in cases {
        let steps = Steps { x: one, w, output: Format::F32, ..Steps::of(case.recipe) };
        let rows = 0..gemm.weight.rows();
        let operands = (gemm.x, gemm.weight, None);
        let raw = matmul_rows(case.arm, case.recipe, operands, rows, &steps)?;
        let most = raw.data().iter().fold(0.0f32, |most, y| most.max(y.abs()));
        for (what, clipped) in [("infinite beyond", false), ("clipped at", true)] {
            let mut predicted = mapped(&raw, |y| {
                let y = if clipped { y.clamp(-LARGEST, LARGEST) } else { y };
                case.recipe.output.round(Format::F16.round(y) * scale)
            });
            if let Some(bias) = gemm.bias {
                predicted.add_to_rows(&bias.to_vec()?);
            }
            let reaches = number(f64::from(most));
            let cause = if most > LARGEST { "f16-overflow" } else { "f16-intermediate" };
            let detail =
                format!("the output is f16 before {before}, {what} 65504; it reaches {reaches}");
            fits.extend(case.fit_if_any(cause, detail, 0, &predicted));
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::super::mapped;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn clipped_and_infinite_outputs_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.ffn_up.weight");
        let one: &Edit = &|operand| scaled(operand, |_| 1.0);
        let steps = Steps { x: one, w: one, output: Format::F32, ..Steps::of(&bench.recipe) };
        let raw = bench.matmul(&x, weight, &steps);
        let scale_of = |absmax| crate::compute::emulated::quantize::scale_for(Format::E4m3, absmax);
        let x_scale = scale_of(crate::compute::emulated::quantize::absmax(x.data()));
        let scale = x_scale * scale_of(bench.arm.absmax_of(weight).expect("a weight"));
        let call = Call::Matmul { x: &x, weight, bias: None };
        for limit in [LARGEST, f32::INFINITY] {
            let wrong = mapped(&raw, |y| {
                Format::Bf16.round(Format::F16.round(y.clamp(-limit, limit)) * scale)
            });
            bench.expect("f16-overflow", &call, &wrong);
        }
    }
}
