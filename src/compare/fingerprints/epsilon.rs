//! An RMSNorm with another epsilon.

use super::planted::{Bug, Ground, Made, NORMS, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::text::number;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "RMSNorm adds another epsilon, or adds it elsewhere",
    causes: &["epsilon"],
    bugs: BUGS,
    test,
};

/// More than any model adds: a larger one that fits stands for something else, as a factor on
/// rows of one size does.
const MOST: f32 = 0.01;
/// What libraries have as defaults.
const USUAL: [f32; 8] = [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::RmsNorm { x, gain, eps } = *case.call else { return Ok(Vec::new()) };
    let mut fits = Vec::new();
    for other in USUAL.into_iter().filter(|other| *other != eps) {
        let detail = format!("epsilon is {other:e} instead of {eps:e}");
        fits.extend(case.fit_call("epsilon", detail, &Call::RmsNorm { x, gain, eps: other })?);
    }
    if let Some(found) = fitted(case, gain.width()) {
        let call = Call::RmsNorm { x, gain, eps: found };
        let detail = format!("epsilon is near {} instead of {eps:e}", number(f64::from(found)));
        fits.extend(
            case.fit_call("epsilon", detail, &call)?.map(|fit| Fit { parameters: 1, ..fit }),
        );
    }
    Ok(fits)
}

/// The epsilon that the group with the smallest mean square shows best: the
/// ratio of subject to truth is `sqrt((m + eps) / (m + found))`.
fn fitted(case: &Case<'_>, width: usize) -> Option<f32> {
    let Call::RmsNorm { x, eps, .. } = *case.call else { return None };
    let mean = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
    let groups = x.data().chunks_exact(width).enumerate();
    let (group, mean) =
        groups.map(|(group, x)| (group, mean(x))).min_by(|a, b| a.1.total_cmp(&b.1))?;
    let range = group * width..(group + 1) * width;
    let pairs = case.subject.data()[range.clone()].iter().zip(&case.truth.data()[range]);
    let (mut st, mut tt) = (0.0, 0.0);
    for (&s, &t) in pairs {
        st += f64::from(s) * f64::from(t);
        tt += f64::from(t) * f64::from(t);
    }
    let ratio = st / tt;
    let found = (mean + f64::from(eps)) / (ratio * ratio) - mean;
    let found = found as f32;
    (found > 0.0 && found <= MOST).then_some(found)
}

const BUGS: &[Bug] = &[
    bug("epsilon 1e-5 for 1e-6 and back", &["epsilon"], NORMS, &other).public(),
    bug("epsilon 1e-3", &["epsilon"], NORMS, &large),
    bug("epsilon 1e-3 in the first norm", &["epsilon"], &["blk.0.attn_norm"], &large),
    bug("epsilon left out", &["epsilon"], NORMS, &left_out),
];

fn other(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::RmsNorm { eps, .. } = *call else { return Ok(None) };
    with_epsilon(call, ground, if eps == 1e-6 { 1e-5 } else { 1e-6 })
}

fn large(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    with_epsilon(call, ground, 1e-3)
}

fn left_out(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    with_epsilon(call, ground, 0.0)
}

fn with_epsilon(call: &Call<'_>, ground: &Ground<'_>, other: f32) -> Made {
    let spoilt = match *call {
        Call::RmsNorm { x, gain, eps } if other != eps => Call::RmsNorm { x, gain, eps: other },
        Call::LayerNorm { x, gain, bias, eps } if other != eps => {
            Call::LayerNorm { x, gain, bias, eps: other }
        }
        _ => return Ok(None),
    };
    Ok(Some(spoilt.on(ground.arm)?))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;

    #[test]
    fn usual_and_unusual_epsilons_are_recognised() {
        let bench = Bench::default();
        let x = super::super::mapped(&bench.tensor(4, 256, 1), |x| x / 16.0);
        let gain = bench.model.tensor("blk.1.attn_norm.weight").expect("a gain");
        for eps in [1e-5, 3.7e-4] {
            let wrong = Call::RmsNorm { x: &x, gain, eps }.on(&bench.arm).expect("a norm");
            bench.expect("epsilon", &Call::RmsNorm { x: &x, gain, eps: 1e-6 }, &wrong);
        }
    }
}
