//! Operands that are cut to their format instead of rounded.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, keep, truncated};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "operands are truncated to their format instead of rounded",
    causes: &["truncating-cast"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let cut = &truncated as &Edit;
    let mut fits = Vec::new();
    for (whose, x, w) in [
        ("the activation is", cut, &keep as &Edit),
        ("the weight is", &keep as &Edit, cut),
        ("both operands are", cut, cut),
    ] {
        let steps = Steps { x, w, ..Steps::of(case.recipe) };
        let detail = format!("{whose} truncated to {} instead of rounded", case.recipe.gemm);
        fits.extend(case.fit_gemm("truncating-cast", detail, gemm, &steps)?);
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn a_truncated_activation_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let steps = Steps { x: &truncated, ..Steps::of(&bench.recipe) };
        let call = Call::Matmul { x: &x, weight, bias: None };
        bench.expect("truncating-cast", &call, &bench.matmul(&x, weight, &steps));
    }
}
