//! A bias that is missing, added twice, or another projection's.

use super::planted::{Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::op::in_layer;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the bias is missing, added twice, or another projection's",
    causes: &["bias-missing", "bias-twice", "bias-swapped"],
    bugs: BUGS,
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

const BUGS: &[Bug] = &[
    bug("bias missing", &["bias-missing"], BIASED, &missing),
    bug("bias added twice", &["bias-twice"], BIASED, &twice),
    bug("the previous layer's bias", &["bias-swapped"], BIASED, &previous_layers).after_layer_0(),
];

const BIASED: &[&str] = &["q", "k", "v"];

fn missing(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::Matmul { x, weight, bias: Some(_) } => {
            Ok(Some(Call::Matmul { x, weight, bias: None }.on(ground.arm)?))
        }
        _ => Ok(None),
    }
}

fn twice(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Matmul { bias: Some(bias), .. } = *call else { return Ok(None) };
    let mut y = ground.clean.clone();
    y.add_to_rows(&bias.to_vec()?);
    Ok(Some(y))
}

fn previous_layers(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Matmul { x, weight, bias: Some(bias) } = *call else { return Ok(None) };
    let Some((layer, inner)) = in_layer(bias.name()) else { return Ok(None) };
    let Some(before) = layer.checked_sub(1) else { return Ok(None) };
    let name = format!("blk.{before}.{inner}");
    if !ground.model.has(&name) {
        return Ok(None);
    }
    let bias = Some(ground.model.tensor(&name)?);
    Ok(Some(Call::Matmul { x, weight, bias }.on(ground.arm)?))
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
