//! A residual addition with a term missing, doubled, or of the wrong sign.

use super::planted::{ADDS, Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::op::Site;
use crate::tensor::Tensor;
use crate::text::number;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a residual addition weighs its terms wrongly, or takes another tensor",
    causes: &[
        "residual-missing",
        "residual-weighted",
        "residual-swapped",
        "shared-expert-missing",
        "routed-experts-missing",
    ],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Add { a, b } = *case.call else { return Ok(Vec::new()) };
    let mut fits = Vec::new();
    // Where a mixture's experts meet the one that all tokens go through.
    let of_experts = case.site.0.ends_with(".ffn_out");
    let [without_a, without_b] = match of_experts {
        true => [
            ("routed-experts-missing", "the routed experts are not added"),
            ("shared-expert-missing", "the shared expert is not added"),
        ],
        false => [
            ("residual-missing", "the residual stream is not added"),
            ("residual-missing", "the block's output is not added"),
        ],
    };
    for ((cause, detail), left) in [(without_a, b), (without_b, a)] {
        fits.extend(case.fit_if_any(cause, detail.to_owned(), 0, left));
    }
    let [of_a_named, of_b_named] = match of_experts {
        true => ["the routed experts", "the shared expert"],
        false => ["the residual stream", "the block's output"],
    };
    let (mut aa, mut ab, mut bb, mut sa, mut sb) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for ((&a, &b), &s) in a.data().iter().zip(b.data()).zip(case.subject.data()) {
        let (a, b, s) = (f64::from(a), f64::from(b), f64::from(s));
        if s.is_finite() {
            aa += a * a;
            ab += a * b;
            bb += b * b;
            sa += s * a;
            sb += s * b;
        }
    }
    let determinant = aa * bb - ab * ab;
    if determinant > 0.0 {
        let of_a = (sa * bb - sb * ab) / determinant;
        let of_b = (sb * aa - sa * ab) / determinant;
        let values = a.data().iter().zip(b.data());
        let values = values.map(|(&a, &b)| (of_a * f64::from(a) + of_b * f64::from(b)) as f32);
        let detail = format!(
            "{} of {of_a_named} and {} of {of_b_named} are added",
            number(of_a),
            number(of_b)
        );
        let predicted = Tensor::new(a.width(), values.collect());
        fits.extend(case.fit_if_any("residual-weighted", detail, 2, &predicted));
    }
    for (site, other) in case.recorded {
        let same = (other.rows(), other.width()) == (a.rows(), a.width());
        if same && site != case.site && other != a && other != b {
            let detail = format!("`{site}` is added in the place of {of_a_named}");
            fits.extend(case.fit_call("residual-swapped", detail, &Call::Add { a: other, b })?);
            let detail = format!("`{site}` is added in the place of {of_b_named}");
            fits.extend(case.fit_call("residual-swapped", detail, &Call::Add { a, b: other })?);
        }
    }
    Ok(fits)
}

const BUGS: &[Bug] = &[
    bug("shared expert left out", &["shared-expert-missing"], &["ffn_out"], &block_missing),
    bug("routed experts left out", &["routed-experts-missing"], &["ffn_out"], &stream_missing),
    bug("residual stream not added", &["residual-missing", "stale-output"], ADDS, &stream_missing),
    bug("block's output not added", &["residual-missing", "stale-output"], ADDS, &block_missing),
    bug("block's output added twice", &["residual-weighted"], ADDS, &block_twice),
    bug("block's output subtracted", &["residual-weighted"], ADDS, &block_subtracted),
    bug("the embedding added for the stream", &["residual-swapped"], ADDS, &embedding_added)
        .after_layer_0(),
];

fn stream_missing(call: &Call<'_>, _: &Ground<'_>) -> Made {
    let Call::Add { b, .. } = *call else { return Ok(None) };
    Ok(Some(b.clone()))
}

fn block_missing(call: &Call<'_>, _: &Ground<'_>) -> Made {
    let Call::Add { a, .. } = *call else { return Ok(None) };
    Ok(Some(a.clone()))
}

fn block_twice(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Add { a, b } = *call else { return Ok(None) };
    Ok(Some(ground.arm.add(&ground.arm.add(a, b)?, b)?))
}

fn block_subtracted(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Add { a, b } = *call else { return Ok(None) };
    Ok(Some(ground.arm.add(a, &mapped(b, |b| -b))?))
}

fn embedding_added(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Add { b, .. } = *call else { return Ok(None) };
    match ground.made.get(&Site("embed".to_owned())) {
        Some(embedded) if embedded.rows() == b.rows() => Ok(Some(ground.arm.add(embedded, b)?)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn a_missing_and_a_doubled_term_are_recognised() {
        let bench = Bench::default();
        let (a, b) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        let call = Call::Add { a: &a, b: &b };
        bench.expect("residual-missing", &call, &a);
        let wrong = a.data().iter().zip(b.data()).map(|(a, b)| a + 2.0 * b).collect();
        bench.expect("residual-weighted", &call, &Tensor::new(256, wrong));
    }
}
