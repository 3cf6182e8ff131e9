//! Two operands of one op exchanged: gate and up, keys and values.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "gate and up, or keys and values, are exchanged",
    causes: &["swapped-operands"],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let fit = match *case.call {
        Call::SwiGlu { gate, up } => {
            let call = Call::SwiGlu { gate: up, up: gate };
            case.fit_call("swapped-operands", "gate and up are exchanged".to_owned(), &call)?
        }
        Call::Attention { q, k, v, shape } => {
            let call = Call::Attention { q, k: v, v: k, shape };
            case.fit_call("swapped-operands", "keys and values are exchanged".to_owned(), &call)?
        }
        _ => None,
    };
    Ok(fit.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn gate_for_up_is_recognised() {
        let bench = Bench::default();
        let (gate, up) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        let wrong = bench.clean(&Call::SwiGlu { gate: &up, up: &gate });
        bench.expect("swapped-operands", &Call::SwiGlu { gate: &gate, up: &up }, &wrong);
    }
}
