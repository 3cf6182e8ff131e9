//! Attention scores with another scale than the model's, or without its soft cap or its sinks.

use super::planted::{Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::call::Call;
use crate::compute::{AttentionShape, ComputeError};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "attention scores carry another scale, no soft cap or no sinks",
    causes: &["softmax-scale", "soft-cap-missing", "sinks-ignored"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Attention { q, k, v, shape } = *case.call else { return Ok(Vec::new()) };
    let root = 1.0 / shape.f32_scale();
    let hidden = ((shape.heads * shape.head_dim) as f32).sqrt();
    let factors = [
        ("the scale is not applied", root),
        ("the scale is applied twice", 1.0 / root),
        ("scores are divided by sqrt(hidden)", root / hidden),
        ("the scale is half of what it must be", 0.5),
        ("the scale is twice what it must be", 2.0),
        ("the exponential has base 2", std::f32::consts::LN_2),
        ("scores are multiplied by log2(e) once too often", std::f32::consts::LOG2_E),
        ("scores are zero: a plain mean", 0.0),
    ];
    let mut fits = Vec::new();
    for (detail, factor) in factors {
        let q = mapped(q, |q| q * factor);
        let call = Call::Attention { q: &q, k, v, shape };
        fits.extend(case.fit_call("softmax-scale", detail.to_owned(), &call)?);
    }
    if shape.scale.is_some() {
        let usual = AttentionShape { scale: None, ..shape };
        let detail = "scores are scaled by 1 / sqrt(head width) and not by the model's factor";
        let call = Call::Attention { q, k, v, shape: usual };
        fits.extend(case.fit_call("softmax-scale", detail.to_owned(), &call)?);
    }
    if shape.cap.is_some() {
        let plain = AttentionShape { cap: None, ..shape };
        let detail = "scores are not bent towards the model's soft cap".to_owned();
        let call = Call::Attention { q, k, v, shape: plain };
        fits.extend(case.fit_call("soft-cap-missing", detail, &call)?);
    }
    if let Some(sinks) = shape.sinks {
        let plain = AttentionShape { sinks: None, ..shape };
        let call = Call::Attention { q, k, v, shape: plain };
        fits.extend(case.fit_call("sinks-ignored", "the sinks take no share".to_owned(), &call)?);
        let next: Vec<f32> = sinks.iter().cycle().skip(1).take(sinks.len()).copied().collect();
        let turned = AttentionShape { sinks: Some(&next), ..shape };
        let call = Call::Attention { q, k, v, shape: turned };
        let detail = "each head has the next one's sink".to_owned();
        fits.extend(case.fit_call("sinks-ignored", detail, &call)?);
    }
    Ok(fits)
}

const BUGS: &[Bug] = &[
    bug("softmax scale not applied", &["softmax-scale"], &["attn"], &unscaled),
    bug("softmax scale applied twice", &["softmax-scale"], &["attn"], &scaled_twice),
    bug("softmax with base 2", &["softmax-scale"], &["attn"], &with_base_2),
    bug("scores without their soft cap", &["soft-cap-missing"], &["attn"], &cap_missing),
    bug("sinks ignored", &["sinks-ignored"], &["attn"], &sinks_ignored),
];

fn unscaled(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    by_factor(call, ground, |root| root)
}

fn scaled_twice(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    by_factor(call, ground, |root| 1.0 / root)
}

fn with_base_2(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    by_factor(call, ground, |_| std::f32::consts::LN_2)
}

/// Attention with scores times a factor, which may depend on what undoes the scale.
fn by_factor(call: &Call<'_>, ground: &Ground<'_>, factor: fn(f32) -> f32) -> Made {
    let Call::Attention { q, k, v, shape } = *call else { return Ok(None) };
    let factor = factor(1.0 / shape.f32_scale());
    Ok(Some(ground.arm.attention(&mapped(q, |q| q * factor), k, v, shape)?))
}

fn cap_missing(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::Attention { q, k, v, shape } if shape.cap.is_some() => {
            Ok(Some(ground.arm.attention(q, k, v, AttentionShape { cap: None, ..shape })?))
        }
        _ => Ok(None),
    }
}

fn sinks_ignored(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::Attention { q, k, v, shape } if shape.sinks.is_some() => {
            Ok(Some(ground.arm.attention(q, k, v, AttentionShape { sinks: None, ..shape })?))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn a_missing_scale_is_recognised() {
        let bench = Bench::default();
        let (q, k, v) = (bench.tensor(5, 256, 1), bench.tensor(5, 128, 2), bench.tensor(5, 128, 3));
        let shape = AttentionShape::causal(4, 2, 64, 0);
        let large = mapped(&q, |q| q * 8.0);
        let wrong = bench.clean(&Call::Attention { q: &large, k: &k, v: &v, shape });
        bench.expect("softmax-scale", &Call::Attention { q: &q, k: &k, v: &v, shape }, &wrong);
    }

    #[test]
    fn a_soft_cap_or_a_scale_of_the_models_own_left_out_is_recognised() {
        let bench = Bench::default();
        let of = |width, seed| bench.tensor(9, width, seed);
        let (q, k, v) = (of(256, 1), of(128, 2), of(128, 3));
        let plain = AttentionShape::causal(4, 2, 64, 0);
        let call = |shape| Call::Attention { q: &q, k: &k, v: &v, shape };
        let wrong = bench.clean(&call(plain));
        let capped = AttentionShape { cap: Some(0.5), ..plain };
        bench.expect("soft-cap-missing", &call(capped), &wrong);
        let sunk = AttentionShape { sinks: Some(&[0.5, 1.5, -0.5, 1.0]), ..plain };
        bench.expect("sinks-ignored", &call(sunk), &wrong);
        let scaled = AttentionShape { scale: Some(0.04), ..plain };
        bench.expect("softmax-scale", &call(scaled), &wrong);
    }
}
