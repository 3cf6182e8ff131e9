//! Two operands of one op exchanged: gate and up, keys and values.

use super::planted::{Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "gate and up, or keys and values, are exchanged",
    causes: &["swapped-operands"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let fit = match *case.call {
        Call::Gated { gate, up, activation } => {
            let call = Call::Gated { gate: up, up: gate, activation };
            case.fit_call("swapped-operands", "gate and up are exchanged".to_owned(), &call)?
        }
        Call::Attention { q, k, v, shape } if k.width() == v.width() => {
            let call = Call::Attention { q, k: v, v: k, shape };
            case.fit_call("swapped-operands", "keys and values are exchanged".to_owned(), &call)?
        }
        _ => None,
    };
    Ok(fit.into_iter().collect())
}

const BUGS: &[Bug] = &[
    bug("keys and values exchanged", &["swapped-operands"], &["attn"], &exchanged),
    bug("gate and up exchanged", &["swapped-operands"], &["ffn_swiglu"], &exchanged),
];

fn exchanged(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let spoilt = match *call {
        Call::Gated { gate, up, activation } => Call::Gated { gate: up, up: gate, activation },
        Call::Attention { q, k, v, shape } if k.width() == v.width() => {
            Call::Attention { q, k: v, v: k, shape }
        }
        _ => return Ok(None),
    };
    Ok(Some(spoilt.on(ground.arm)?))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::model::Activation;

    #[test]
    fn gate_for_up_is_recognised() {
        let bench = Bench::default();
        let (gate, up) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        let activation = Activation::Silu;
        let wrong = bench.clean(&Call::Gated { gate: &up, up: &gate, activation });
        let call = Call::Gated { gate: &gate, up: &up, activation };
        bench.expect("swapped-operands", &call, &wrong);
    }
}
