//! Subnormal codes that are taken for zero.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, flushed, keep};
use crate::dtype::Format;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "subnormal codes are flushed to zero",
    causes: &["subnormals-flushed"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm().filter(|_| case.recipe.gemm != Format::Int8) else {
        return Ok(Vec::new());
    };
    let flush = &flushed as &Edit;
    let mut fits = Vec::new();
    for (whose, x, w) in [
        ("the activation's", flush, &keep as &Edit),
        ("the weight's", &keep as &Edit, flush),
        ("both operands'", flush, flush),
    ] {
        let steps = Steps { x, w, ..Steps::of(case.recipe) };
        let detail = format!("{whose} subnormal codes are flushed to zero");
        fits.extend(case.fit_gemm("subnormals-flushed", detail, gemm, &steps)?);
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn flushed_activations_are_recognised() {
        let bench = Bench::default();
        let mut x = bench.tensor(4, 256, 1);
        x.row_mut(0)[3] = 800.0;
        let weight = bench.weight("blk.1.attn_q.weight");
        let steps = Steps { x: &flushed, ..Steps::of(&bench.recipe) };
        let call = Call::Matmul { x: &x, weight, bias: None };
        bench.expect("subnormals-flushed", &call, &bench.matmul(&x, weight, &steps));
    }
}
