//! An RMSNorm whose gain is offset by one, ignored, or another norm's.

use super::planted::{Bug, Ground, Made, NORMS, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::{Call, MadeWeight};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "RMSNorm's gain is offset by one, ignored, or another norm's",
    causes: &["weight-offset", "gain-ignored", "gain-swapped"],
    bugs: BUGS,
    test,
};

/// What happens to each value of the gain.
type Change = fn(f32) -> f32;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::RmsNorm { x, gain, eps } = *case.call else { return Ok(Vec::new()) };
    let values = gain.to_vec()?;
    let mut fits = Vec::new();
    let variants: [(&str, &str, Change); 3] = [
        (
            "weight-offset",
            "the gain is 1 + g: the weight's offset is added where there is none",
            |g| 1.0 + g,
        ),
        ("weight-offset", "the gain is g - 1: the weight's offset is taken away", |g| g - 1.0),
        ("gain-ignored", "the gain is not applied", |_| 1.0),
    ];
    for (cause, detail, change) in variants {
        let changed: Vec<f32> = values.iter().map(|&g| change(g)).collect();
        let made = MadeWeight::new(format!("{} changed", gain.name()), 1, &changed);
        let call = Call::RmsNorm { x, gain: made.weight()?, eps };
        fits.extend(case.fit_call(cause, detail.to_owned(), &call)?);
    }
    let Some(model) = case.model else { return Ok(fits) };
    for name in model.names().filter(|name| name.ends_with("norm.weight") && *name != gain.name()) {
        let other = model.tensor(name)?;
        if other.width() == gain.width() {
            let detail = format!("the gain is `{name}` instead of `{}`", gain.name());
            fits.extend(case.fit_call(
                "gain-swapped",
                detail,
                &Call::RmsNorm { x, gain: other, eps },
            )?);
        }
    }
    Ok(fits)
}

const BUGS: &[Bug] = &[
    bug("gain offset by one", &["weight-offset"], NORMS, &offset),
    bug("gain not applied", &["gain-ignored"], NORMS, &ignored),
    bug("the other norm's gain", &["gain-swapped"], &["attn_norm", "ffn_norm"], &swapped),
    bug("gain without its 1", &["weight-offset"], GAINS, &offset_missing),
];

const GAINS: &[&str] = &[
    "attn_norm",
    "ffn_norm",
    "attn_post_norm",
    "ffn_post_norm",
    "q_norm",
    "k_norm",
    "output_norm",
];

fn offset(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    with_gain(call, ground, |g| 1.0 + g)
}

fn ignored(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    with_gain(call, ground, |_| 1.0)
}

fn offset_missing(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::RmsNorm { gain, .. } if gain.is_less_one() => with_gain(call, ground, |g| g - 1.0),
        _ => Ok(None),
    }
}

fn with_gain(call: &Call<'_>, ground: &Ground<'_>, change: Change) -> Made {
    let Call::RmsNorm { x, gain, eps } = *call else { return Ok(None) };
    let changed: Vec<f32> = gain.to_vec()?.iter().map(|&g| change(g)).collect();
    let made = MadeWeight::new(format!("{} changed", gain.name()), 1, &changed);
    Ok(Some(ground.arm.rms_norm(x, made.weight()?, eps)?))
}

fn swapped(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::RmsNorm { x, gain, eps } = *call else { return Ok(None) };
    let name = gain.name();
    let other = if name.contains("attn_norm") {
        name.replace("attn_norm", "ffn_norm")
    } else {
        name.replace("ffn_norm", "attn_norm")
    };
    if !ground.model.has(&other) {
        return Ok(None);
    }
    Ok(Some(ground.arm.rms_norm(x, ground.model.tensor(&other)?, eps)?))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn offset_and_swapped_gains_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let gain = bench.weight("blk.1.attn_norm.weight");
        let call = Call::RmsNorm { x: &x, gain, eps: 1e-6 };
        let offset: Vec<f32> = gain.to_vec().expect("a gain").iter().map(|g| 1.0 + g).collect();
        let made = MadeWeight::new("offset".to_owned(), 1, &offset);
        let wrong = Call::RmsNorm { x: &x, gain: made.weight().expect("a gain"), eps: 1e-6 };
        bench.expect("weight-offset", &call, &bench.clean(&wrong));
        let other = bench.weight("blk.1.ffn_norm.weight");
        let wrong = bench.clean(&Call::RmsNorm { x: &x, gain: other, eps: 1e-6 });
        bench.expect("gain-swapped", &call, &wrong);
    }
}
