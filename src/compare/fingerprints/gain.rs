//! Every output times one factor: a scale that is wrong, missing or applied twice.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::emulated::gemm::Scales;
use crate::tensor::Tensor;
use crate::text::number;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "every output carries one factor: a scale is wrong, missing or applied twice",
    causes: &["scale-wrong", "scale-missing", "scale-twice"],
    bugs: &[],
    test,
};

/// How near a factor must come to a scale to be that scale.
const NEAR: f64 = 2e-3;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let none = vec![0.0; case.subject.width()];
    let Some(bias) = case.gemm().and_then(|gemm| gemm.bias) else {
        return Ok(with_factor(case, &none, "")?.into_iter().collect());
    };
    // Before the bias is added, or after.
    let before = with_factor(case, &bias.to_vec()?, "")?;
    let after = with_factor(case, &none, ", its bias included,")?;
    Ok(before.into_iter().chain(after).collect())
}

/// The fit of one factor of all outputs less a bias.
fn with_factor(case: &Case<'_>, bias: &[f32], of: &str) -> Result<Option<Fit>, ComputeError> {
    let (mut sc, mut cc) = (0.0, 0.0);
    for row in 0..case.subject.rows() {
        let pairs = case.subject.row(row).iter().zip(case.clean.row(row));
        for (column, ((&s, &c), &bias)) in pairs.zip(bias).enumerate() {
            let (s, c) = (f64::from(s) - f64::from(bias), f64::from(c) - f64::from(bias));
            if s.is_finite() && c.is_finite() && case.trains(row, column) {
                sc += s * c;
                cc += c * c;
            }
        }
    }
    let factor = sc / cc;
    if !factor.is_finite() || factor == 0.0 {
        return Ok(None);
    }
    let mut data = Vec::with_capacity(case.clean.data().len());
    for row in 0..case.clean.rows() {
        for (&c, &bias) in case.clean.row(row).iter().zip(bias) {
            let c = f64::from(c) - f64::from(bias);
            data.push((c * factor + f64::from(bias)) as f32);
        }
    }
    let predicted = Tensor::new(case.clean.width(), data);
    let (cause, detail) = name(case, factor, of)?;
    Ok(case.fit_if_any(cause, detail, 1, &predicted))
}

/// A factor in words: small ones as what they add.
pub fn factor_of(factor: f64) -> String {
    let added = 100.0 * (factor - 1.0);
    match added.abs() < 0.5 {
        true if added < 0.0 => format!("{} % too small", number(-added)),
        true => format!("{} % too large", number(added)),
        false => format!("{} times what it must be", number(factor)),
    }
}

/// Whether the factor is one of the operands' scales.
fn name(case: &Case<'_>, factor: f64, of: &str) -> Result<(&'static str, String), ComputeError> {
    let near = |value: f64| (factor / value - 1.0).abs() < NEAR;
    let times = format!("every output{of} is {}", factor_of(factor));
    let Call::Matmul { x, weight, .. } = *case.call else {
        return Ok(("scale-wrong", times));
    };
    let mut scales = Vec::new();
    if let (_, Scales::Tensor(scale)) = case.arm.quantise_activation(x) {
        scales.push(("the activation's scale", f64::from(scale)));
    }
    let absmax = case.arm.absmax_of(weight)?;
    if let (_, Scales::Tensor(scale)) = case.arm.quantise_weight_rows(weight, 0, &[], absmax) {
        scales.push(("the weight's scale", f64::from(scale)));
    }
    if let [(_, x), (_, w)] = scales[..] {
        scales.push(("the product of both scales", x * w));
    }
    for (what, scale) in scales.into_iter().filter(|(_, scale)| *scale != 1.0) {
        if near(1.0 / scale) {
            return Ok(("scale-missing", format!("{what} is not applied: {times}")));
        }
        if near(scale) {
            return Ok(("scale-twice", format!("{what} is applied twice: {times}")));
        }
    }
    // Whole powers of two are what codes of another exponent bias make.
    let of_bias =
        [0.25, 0.5, 2.0, 4.0].into_iter().any(|power| (factor / power - 1.0).abs() < 1e-6);
    match case.multiplies_codes() && of_bias {
        true => {
            Ok(("scale-wrong", format!("{times}, as codes of the fnuz kind read as the other")))
        }
        false => Ok(("scale-wrong", times)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::departure::{Edit, Steps, scaled};

    #[test]
    fn wrong_missing_and_doubled_scales_are_told_apart() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let (wrong, missing): (&Edit, &Edit) =
            (&|operand| scaled(operand, |scale| scale * 1.02), &|operand| scaled(operand, |_| 1.0));
        let twice: &Edit = &|operand| scaled(operand, |scale| scale * scale);
        for (cause, x_edit) in
            [("scale-wrong", wrong), ("scale-missing", missing), ("scale-twice", twice)]
        {
            let steps = Steps { x: x_edit, ..Steps::of(&bench.recipe) };
            bench.expect(cause, &call, &bench.matmul(&x, weight, &steps));
        }
    }

    #[test]
    fn a_factor_that_stands_on_the_bias_too_is_one_factor() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let (weight, bias) =
            (bench.weight("blk.1.attn_q.weight"), bench.weight("blk.1.attn_q.bias"));
        let call = Call::Matmul { x: &x, weight, bias: Some(bias) };
        let clean = call.on(&bench.arm).expect("computed");
        for factor in [-1.0, 0.72] {
            let wrong = clean.data().iter().map(|y| y * factor).collect();
            bench.expect("scale-wrong", &call, &Tensor::new(clean.width(), wrong));
        }
    }
}
