//! Another tensor of the model in the weight's place.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "another tensor of the model stands in the weight's place",
    causes: &["swapped-weight"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let (Some(gemm), Some(model)) = (case.gemm(), case.model) else { return Ok(Vec::new()) };
    let (weight, x, bias) = (gemm.weight, gemm.x, gemm.bias);
    let mut fits = Vec::new();
    for name in model.names().filter(|name| name.ends_with(".weight") && *name != weight.name()) {
        let other = model.tensor(name)?;
        if (other.rows(), other.width()) != (weight.rows(), weight.width()) {
            continue;
        }
        let detail = format!("`{name}` was multiplied instead of `{}`", weight.name());
        fits.extend(case.fit_call(
            "swapped-weight",
            detail,
            &Call::Matmul { x, weight: other, bias },
        )?);
    }
    fits.retain(|fit| fit.names_the_bug());
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn the_next_layers_weight_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let of = |weight| Call::Matmul { x: &x, weight, bias: None };
        let wrong = bench.clean(&of(bench.weight("blk.2.ffn_up.weight")));
        bench.expect("swapped-weight", &of(bench.weight("blk.1.ffn_up.weight")), &wrong);
    }
}
