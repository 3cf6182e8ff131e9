//! Outputs that are zero where something else belongs: never written, or cleared.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::tensor::Tensor;
use crate::text::values_are;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a part of the result is zero: it was never written",
    causes: &["unwritten"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let pairs = case.subject.data().iter().zip(case.clean.data());
    let zeroed = |s: f32, c: f32| s == 0.0 && c != 0.0;
    let count = pairs.clone().filter(|&(&s, &c)| zeroed(s, c)).count();
    if count == 0 {
        return Ok(Vec::new());
    }
    let first = pairs.clone().position(|(&s, &c)| zeroed(s, c)).unwrap_or(0);
    let predicted = pairs.map(|(&s, &c)| if zeroed(s, c) { s } else { c }).collect();
    let (row, column) = (first / case.subject.width(), first % case.subject.width());
    let detail = format!("{} zero, the first at [{row}, {column}]", values_are(count));
    let predicted = Tensor::new(case.subject.width(), predicted);
    let fit = case.fit("unwritten", detail, 0, &predicted);
    // Flushing makes single zeros too; only a result that is right elsewhere is unwritten.
    let within = fit.is_exact() || case.null.explains(case.subject, &predicted);
    Ok(within.then_some(fit).into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;

    #[test]
    fn a_tile_of_zeros_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let mut wrong = bench.clean(&call);
        (0..4).for_each(|row| wrong.row_mut(row)[64..128].fill(0.0));
        bench.expect("unwritten", &call, &wrong);
    }
}
