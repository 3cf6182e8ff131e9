//! An op that read another site's tensor than its own input.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the op read a stale or another site's tensor",
    causes: &["stale-input", "stale-output"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let mut fits = Vec::new();
    for (site, other) in case.recorded.iter().filter(|(site, _)| site != case.site) {
        let shape = (other.rows(), other.width());
        if shape == (case.subject.rows(), case.subject.width()) && other != case.clean {
            let detail = format!("the result is `{site}`: it was not computed here");
            fits.push(case.fit("stale-output", detail, 0, other));
        }
        let same =
            |x: &Tensor| (other.rows(), other.width()) == (x.rows(), x.width()) && other != x;
        let detail = |what: &str| format!("{what} is `{site}`");
        let mut attempt = |what: &str, call: &Call<'_>| {
            fits.extend(case.fit_call("stale-input", detail(what), call)?);
            Ok::<(), ComputeError>(())
        };
        match *case.call {
            Call::Matmul { x, weight, bias } if same(x) => {
                attempt(
                    "the activation that was multiplied",
                    &Call::Matmul { x: other, weight, bias },
                )?;
            }
            Call::RmsNorm { x, gain, eps } if same(x) => {
                attempt("what was normalised", &Call::RmsNorm { x: other, gain, eps })?;
            }
            Call::Rope { x, rope, head_dim, first_position } if same(x) => {
                attempt(
                    "what was rotated",
                    &Call::Rope { x: other, rope, head_dim, first_position },
                )?;
            }
            Call::Gated { gate, up, activation } if same(gate) && other != up => {
                attempt("the gate", &Call::Gated { gate: other, up, activation })?;
                attempt("the up projection", &Call::Gated { gate, up: other, activation })?;
            }
            Call::Attention { q, k, v, shape } => {
                if same(q) {
                    attempt("the query", &Call::Attention { q: other, k, v, shape })?;
                }
                if same(k) && other != v {
                    attempt("the keys' tensor", &Call::Attention { q, k: other, v, shape })?;
                }
                if same(v) && other != k {
                    attempt("the values' tensor", &Call::Attention { q, k, v: other, shape })?;
                }
            }
            _ => {}
        }
    }
    fits.retain(|fit| fit.names_the_bug());
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::op::Site;

    #[test]
    fn layer_0s_activation_is_recognised() {
        let mut bench = Bench::default();
        let (x, stale) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        bench.recorded = vec![(Site("blk.0.attn_norm".to_owned()), stale.clone())];
        let weight = bench.weight("blk.1.attn_q.weight");
        let wrong = bench.clean(&Call::Matmul { x: &stale, weight, bias: None });
        bench.expect("stale-input", &Call::Matmul { x: &x, weight, bias: None }, &wrong);
    }
}
