//! A LayerNorm that keeps the mean, lacks its gain or bias, or has another epsilon.

use super::planted::{Bug, Ground, Made, NORMS, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::call::{Call, MadeWeight};
use crate::compute::{ComputeError, gain_and_bias};
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "LayerNorm keeps the mean, lacks its gain or bias, or has another epsilon",
    causes: &["mean-kept", "norm-bias-missing", "gain-ignored", "epsilon"],
    bugs: BUGS,
    test,
};

/// Epsilons that models use.
const EPSILONS: [f32; 5] = [1e-3, 1e-5, 1e-6, 1e-12, 0.0];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::LayerNorm { x, gain, bias, eps } = *case.call else { return Ok(Vec::new()) };
    let mut fits = Vec::new();
    let detail = "the mean is not subtracted: an RMSNorm".to_owned();
    let kept = with_mean(case.arm, case.call)?;
    fits.extend(kept.and_then(|kept| case.fit_if_any("mean-kept", detail, 0, &kept)));
    if bias.is_some() {
        let without = Call::LayerNorm { x, gain, bias: None, eps };
        let detail = "the bias is not added".to_owned();
        fits.extend(case.fit_call("norm-bias-missing", detail, &without)?);
    }
    let values = vec![1.0; gain.rows() * gain.width()];
    let ones = MadeWeight::new("a gain of one".to_owned(), gain.rows(), &values);
    let plain = Call::LayerNorm { x, gain: ones.weight()?, bias, eps };
    fits.extend(case.fit_call("gain-ignored", "the gain is not applied".to_owned(), &plain)?);
    for other in EPSILONS.into_iter().filter(|other| *other != eps) {
        let detail = format!("epsilon is {other:e} instead of {eps:e}");
        let call = Call::LayerNorm { x, gain, bias, eps: other };
        fits.extend(case.fit_call("epsilon", detail, &call)?);
    }
    Ok(fits)
}

/// What an RMSNorm makes in a LayerNorm's place, its bias added; nothing where each head has a gain
/// of its own, which no RMSNorm has.
fn with_mean(
    arm: &crate::compute::emulated::arm::Emulated,
    call: &Call<'_>,
) -> Result<Option<Tensor>, ComputeError> {
    let Call::LayerNorm { x, gain, bias, eps } = *call else { return Ok(None) };
    if gain.rows() > 1 {
        return Ok(None);
    }
    let mut y = arm.rms_norm(x, gain, eps)?;
    let (_, shift) = gain_and_bias(x, gain, bias)?;
    for group in y.data_mut().chunks_exact_mut(shift.len()) {
        group.iter_mut().zip(&shift).for_each(|(y, bias)| *y += bias);
    }
    Ok(Some(y))
}

const BUGS: &[Bug] = &[
    bug("mean not subtracted", &["mean-kept"], NORMS, &kept),
    bug("norm without its bias", &["norm-bias-missing"], NORMS, &bias_missing),
];

fn kept(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    with_mean(ground.arm, call)
}

fn bias_missing(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::LayerNorm { x, gain, bias: Some(_), eps } => {
            Ok(Some(Call::LayerNorm { x, gain, bias: None, eps }.on(ground.arm)?))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn what_a_layer_norm_lacks_is_recognised() {
        let bench = Bench::default();
        let mut x = bench.tensor(4, 256, 1);
        x.data_mut().iter_mut().for_each(|x| *x += 0.5);
        let gain = bench.weight("blk.1.attn_norm.weight");
        let shift = bench.tensor(1, 256, 7);
        let bias = MadeWeight::new("blk.1.attn_norm.bias".to_owned(), 1, shift.data());
        let bias = Some(bias.weight().expect("a bias"));
        let call = Call::LayerNorm { x: &x, gain, bias, eps: 1e-5 };
        let wrong = with_mean(&bench.arm, &call).expect("a norm").expect("a LayerNorm");
        bench.expect("mean-kept", &call, &wrong);
        let wrong = bench.clean(&Call::LayerNorm { x: &x, gain, bias: None, eps: 1e-5 });
        bench.expect("norm-bias-missing", &call, &wrong);
        let wrong = bench.clean(&Call::LayerNorm { x: &x, gain, bias, eps: 1e-3 });
        bench.expect("epsilon", &call, &wrong);
    }

    #[test]
    fn what_norms_of_each_heads_own_lack_is_recognised() {
        let bench = Bench::default();
        let mut x = bench.tensor(4, 256, 1);
        x.data_mut().iter_mut().for_each(|x| *x += 0.5);
        let gains = MadeWeight::new("gains".to_owned(), 4, bench.tensor(1, 256, 7).data());
        let gain = gains.weight().expect("gains");
        let call = Call::LayerNorm { x: &x, gain, bias: None, eps: 1e-5 };
        let ones = MadeWeight::new("ones".to_owned(), 4, &[1.0; 256]);
        let plain =
            Call::LayerNorm { x: &x, gain: ones.weight().expect("ones"), bias: None, eps: 1e-5 };
        bench.expect("gain-ignored", &call, &bench.clean(&plain));
        let wrong = bench.clean(&Call::LayerNorm { x: &x, gain, bias: None, eps: 1e-3 });
        bench.expect("epsilon", &call, &wrong);
    }
}
