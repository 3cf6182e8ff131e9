//! A factor of the model that is left out, applied twice or the wrong way round, and a soft cap
//! that is left out.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a factor or soft cap of the model is left out, applied twice or inverted",
    causes: &["factor-missing", "factor-twice", "factor-inverted", "soft-cap-missing"],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let mut fits = Vec::new();
    match *case.call {
        Call::Scale { x, factor, held } => {
            let detail = format!("the factor {factor} is left out");
            fits.extend(case.fit_if_any("factor-missing", detail, 0, x));
            let others = [
                ("factor-twice", format!("the factor {factor} is applied twice"), factor * factor),
                ("factor-inverted", format!("values are divided by {factor}"), 1.0 / factor),
            ];
            for (cause, detail, factor) in others {
                fits.extend(case.fit_call(cause, detail, &Call::Scale { x, factor, held })?);
            }
        }
        Call::SoftCap { x, cap } => {
            let detail = format!("values are not bent towards the soft cap {cap}");
            fits.extend(case.fit_if_any("soft-cap-missing", detail, 0, x));
        }
        _ => {}
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::super::mapped;
    use super::*;
    use crate::compute::call::Held;

    #[test]
    fn a_factor_left_out_or_applied_twice_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::Scale { x: &x, factor: 0.22, held: Held::Number };
        bench.expect("factor-missing", &call, &x);
        bench.expect("factor-twice", &call, &mapped(&x, |x| x * 0.22 * 0.22));
        bench.expect("factor-inverted", &call, &mapped(&x, |x| x / 0.22));
    }

    #[test]
    fn a_soft_cap_left_out_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        bench.expect("soft-cap-missing", &Call::SoftCap { x: &x, cap: 3.0 }, &x);
    }
}
