//! A gated delta rule whose state does not decay, or is corrected whole or not at all.

use super::planted::{Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::delta::DeltaRule;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a delta net's state does not decay, or is corrected by another share",
    causes: &["delta-gate"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Delta(rule) = *case.call else { return Ok(Vec::new()) };
    let heads = rule.net.value_heads;
    let filled = |range: std::ops::Range<usize>, value: f32| {
        let mut gates = rule.gates.clone();
        for row in 0..gates.rows() {
            gates.row_mut(row)[range.clone()].fill(value);
        }
        gates
    };
    let exchanged = {
        let mut gates = Tensor::zeros(rule.gates.rows(), rule.gates.width());
        gates.set_columns(0, &rule.gates.columns(heads..2 * heads));
        gates.set_columns(heads, &rule.gates.columns(0..heads));
        gates
    };
    let others = [
        ("the state does not decay", filled(0..heads, 1.0)),
        ("the state is corrected whole at every token", filled(heads..2 * heads, 1.0)),
        ("the state is forgotten at every token", filled(0..heads, 0.0)),
        ("what stays and what is corrected are exchanged", exchanged),
    ];
    let mut fits = Vec::new();
    for (detail, gates) in &others {
        let call = Call::Delta(DeltaRule { gates, ..rule });
        fits.extend(case.fit_call("delta-gate", (*detail).to_owned(), &call)?);
    }
    Ok(fits)
}

const BUGS: &[Bug] = &[
    bug("a state that does not decay", &["delta-gate"], &["lin_delta"], &kept),
    bug("a state corrected whole", &["delta-gate"], &["lin_delta"], &uncorrected),
];

fn kept(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Delta(rule) = *call else { return Ok(None) };
    with_ones(rule, 0..rule.net.value_heads, ground)
}

fn uncorrected(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Delta(rule) = *call else { return Ok(None) };
    let heads = rule.net.value_heads;
    with_ones(rule, heads..2 * heads, ground)
}

fn with_ones(rule: DeltaRule<'_>, range: std::ops::Range<usize>, ground: &Ground<'_>) -> Made {
    let mut gates = rule.gates.clone();
    for row in 0..gates.rows() {
        gates.row_mut(row)[range.clone()].fill(1.0);
    }
    Ok(Some(Call::Delta(DeltaRule { gates: &gates, ..rule }).on(ground.arm)?))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::model::DeltaNet;

    #[test]
    fn a_state_that_keeps_all_is_recognised() {
        let bench = Bench::default();
        let net = DeltaNet {
            key_heads: 1,
            value_heads: 2,
            key_dim: 32,
            value_dim: 16,
            taps: 4,
            rates_are_logs: true,
            blocks: Vec::new(),
        };
        let x = bench.tensor(9, net.channels(), 1);
        let raw = bench.tensor(9, 4, 2);
        let gates = Tensor::new(4, raw.data().iter().map(|x| 1.0 / (1.0 + x.exp())).collect());
        let rule = DeltaRule { x: &x, gates: &gates, first: 0, net: &net };
        let mut kept = gates.clone();
        (0..9).for_each(|row| kept.row_mut(row)[..2].fill(1.0));
        let wrong = bench.clean(&Call::Delta(DeltaRule { gates: &kept, ..rule }));
        bench.expect("delta-gate", &Call::Delta(rule), &wrong);
    }
}
