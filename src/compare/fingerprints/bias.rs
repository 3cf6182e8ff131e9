//! A bias that is missing, added twice, or another projection's.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the bias is missing, added twice, or another projection's",
    causes: &["bias-missing", "bias-twice", "bias-swapped"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let Some(bias) = gemm.bias else { return Ok(Vec::new()) };
    let (x, weight) = (gemm.x, gemm.weight);
    let mut fits = Vec::new();
    let without = Call::Matmul { x, weight, bias: None };
    let detail = format!("`{}` was not added", bias.name());
    fits.extend(case.fit_call("bias-missing", detail, &without)?);

    let values = bias.to_vec()?;
    let mut twice = case.clean.clone();
    for row in 0..twice.rows() {
        for (y, bias) in twice.row_mut(row).iter_mut().zip(&values) {
            *y += bias;
        }
    }
    let detail = format!("`{}` was added twice", bias.name());
    fits.extend(case.fit_if_any("bias-twice", detail, 0, &twice));

    let Some(model) = case.model else { return Ok(fits) };
    for name in model.names().filter(|name| name.ends_with(".bias") && *name != bias.name()) {
        let other = model.tensor(name)?;
        if other.width() == bias.width() {
            let call = Call::Matmul { x, weight, bias: Some(other) };
            let detail = format!("`{name}` was added instead of `{}`", bias.name());
            fits.extend(case.fit_call("bias-swapped", detail, &call)?);
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;

    #[test]
    fn a_missing_bias_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.model.tensor("blk.1.attn_q.weight").expect("a weight");
        let bias = bench.model.tensor("blk.1.attn_q.bias").expect("a bias");
        let wrong = Call::Matmul { x: &x, weight, bias: None };
        let wrong = wrong.on(&bench.arm).expect("a product");
        let call = Call::Matmul { x: &x, weight, bias: Some(bias) };
        bench.expect("bias-missing", &call, &wrong);
    }

    #[test]
    fn another_layers_bias_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.model.tensor("blk.1.attn_k.weight").expect("a weight");
        let bias = |layer| bench.model.tensor(layer).expect("a bias");
        let (right, other) = (bias("blk.1.attn_k.bias"), bias("blk.2.attn_k.bias"));
        let wrong = Call::Matmul { x: &x, weight, bias: Some(other) };
        let wrong = wrong.on(&bench.arm).expect("a product");
        let call = Call::Matmul { x: &x, weight, bias: Some(right) };
        bench.expect("bias-swapped", &call, &wrong);
    }
}
