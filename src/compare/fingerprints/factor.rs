//! A factor of the model that is left out, applied twice or the wrong way round, and a soft cap
//! that is left out.

use super::planted::{Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::call::Call;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a factor or soft cap of the model is left out, applied twice or inverted",
    causes: &["factor-missing", "factor-twice", "factor-inverted", "soft-cap-missing"],
    bugs: BUGS,
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

const BUGS: &[Bug] = &[
    bug("logits without their soft cap", &["soft-cap-missing"], &["logits"], &cap_missing),
    bug("a factor left out", &["factor-missing"], SCALED, &left_out),
    bug("a factor applied twice", &["factor-twice"], SCALED, &twice),
];

const SCALED: &[&str] = &["embed_scaled", "attn_scaled", "ffn_scaled", "logits_scaled", "logits"];

fn cap_missing(call: &Call<'_>, _: &Ground<'_>) -> Made {
    let Call::SoftCap { x, .. } = *call else { return Ok(None) };
    Ok(Some(x.clone()))
}

fn left_out(call: &Call<'_>, _: &Ground<'_>) -> Made {
    let Call::Scale { x, .. } = *call else { return Ok(None) };
    Ok(Some(x.clone()))
}

fn twice(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Scale { factor, .. } = *call else { return Ok(None) };
    Ok(Some(mapped(ground.clean, |y| y * factor as f32)))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
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
