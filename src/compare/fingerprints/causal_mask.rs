//! A causal mask that lets a row see too many or too few positions.

use super::planted::{Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::call::Call;
use crate::compute::emulated::arm::Emulated;
use crate::compute::{AttentionShape, ComputeError};
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the causal mask is missing or shifted, or its window is another one",
    causes: &["causal-mask"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Attention { q, k, v, shape } = *case.call else { return Ok(Vec::new()) };
    let positions = k.rows();
    let own = |row: usize| shape.first_position + row;
    let mut fits = Vec::new();
    let mut attempt = |detail: String, seen: &dyn Fn(usize) -> std::ops::Range<usize>| {
        let predicted = attend(case.arm, q, k, v, shape, seen)?;
        fits.extend(case.fit_if_any("causal-mask", detail, 0, &predicted));
        Ok::<(), ComputeError>(())
    };
    attempt("there is no mask: every row sees all positions".to_owned(), &|_| 0..positions)?;
    let first = |row: usize| shape.seen(row).start;
    attempt("a row sees one position too many".to_owned(), &|row| {
        first(row)..(own(row) + 2).min(positions)
    })?;
    attempt("a row does not see itself".to_owned(), &|row| {
        let end = own(row).max(1);
        first(row).min(end - 1)..end
    })?;
    attempt("a row does not see the first position".to_owned(), &|row| {
        (first(row) + 1).min(own(row))..own(row) + 1
    })?;
    let mut windows: Vec<usize> = (1..positions.min(8)).collect();
    if let Some(window) = shape.window {
        let ignored = "the window is ignored: a row sees all positions up to its own".to_owned();
        attempt(ignored, &|row| 0..own(row) + 1)?;
        windows.extend([window - 1, window + 1, window / 2, 2 * window]);
        windows.retain(|other| *other != window && (1..positions).contains(other));
        windows.sort_unstable();
        windows.dedup();
    }
    let instead = shape.window.map_or(String::new(), |window| format!(" instead of {window}"));
    for window in windows {
        attempt(format!("a row sees its last {window} positions only{instead}"), &|row| {
            (own(row) + 1).saturating_sub(window)..own(row) + 1
        })?;
    }
    Ok(fits)
}

/// Attention in which row `i` sees the positions `seen(i)`.
fn attend(
    arm: &Emulated,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: AttentionShape<'_>,
    seen: &dyn Fn(usize) -> std::ops::Range<usize>,
) -> Result<Tensor, ComputeError> {
    let mut data = Vec::with_capacity(q.data().len());
    for row in 0..q.rows() {
        let positions = seen(row);
        let some = |x: &Tensor| {
            let range = positions.start * x.width()..positions.end * x.width();
            Tensor::new(x.width(), x.data()[range].to_vec())
        };
        let query = Tensor::new(q.width(), q.row(row).to_vec());
        let first_position = positions.len() - 1;
        let shape = AttentionShape { first_position, window: None, ..shape };
        data.extend(arm.attention(&query, &some(k), &some(v), shape)?.into_data());
    }
    Ok(Tensor::new(shape.heads * shape.value_dim, data))
}

const BUGS: &[Bug] = &[
    bug("causal mask missing", &["causal-mask"], &["attn"], &missing),
    bug("a row does not see itself", &["causal-mask"], &["attn"], &strict),
    bug("a window of 2 positions", &["causal-mask"], &["attn"], &window_of_2),
    bug("window ignored", &["causal-mask"], &["attn"], &window_ignored),
    bug("window one position wider", &["causal-mask"], &["attn"], &window_wider),
];

fn missing(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    masked(call, ground, |_, positions| match positions {
        0 | 1 => None,
        _ => Some(Box::new(move |_| 0..positions)),
    })
}

fn strict(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    masked(call, ground, |shape, positions| {
        let first = move |own: usize| shape.seen(own - shape.first_position).start;
        let seen = move |own: usize| first(own).min(own.max(1) - 1)..own.max(1);
        if positions > 1 { Some(Box::new(seen)) } else { None }
    })
}

fn window_of_2(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    masked(call, ground, |shape, positions| match shape.window {
        Some(0..=2) => None,
        _ if positions > 2 => Some(Box::new(|own| (own + 1).saturating_sub(2)..own + 1)),
        _ => None,
    })
}

fn window_ignored(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    masked(call, ground, |shape, _| {
        shape.window?;
        Some(Box::new(|own| 0..own + 1))
    })
}

fn window_wider(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    masked(call, ground, |shape, positions| {
        let window = shape.window.filter(|&window| window < positions)?;
        Some(Box::new(move |own| (own + 1).saturating_sub(window + 1)..own + 1))
    })
}

/// Which positions a position sees.
type Seen<'a> = Box<dyn Fn(usize) -> std::ops::Range<usize> + 'a>;

/// Attention with another mask: what it is for that many positions, nothing where the bug does not
/// apply.
fn masked(
    call: &Call<'_>,
    ground: &Ground<'_>,
    mask: for<'s> fn(AttentionShape<'s>, usize) -> Option<Seen<'s>>,
) -> Made {
    let Call::Attention { q, k, v, shape } = *call else { return Ok(None) };
    let Some(seen) = mask(shape, k.rows()) else { return Ok(None) };
    let seen = |row: usize| seen(shape.first_position + row);
    attend(ground.arm, q, k, v, shape, &seen).map(Some)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::AttentionShape;
    use crate::compute::call::Call;
    use crate::tensor::Tensor;

    #[test]
    fn a_missing_mask_is_recognised() {
        let bench = Bench::default();
        let (q, k, v) = (bench.tensor(5, 256, 1), bench.tensor(5, 128, 2), bench.tensor(5, 128, 3));
        let shape = AttentionShape::causal(4, 2, 64, 0);
        let mut wrong = Vec::new();
        for row in 0..5 {
            let query = Tensor::new(256, q.row(row).to_vec());
            let all = AttentionShape { first_position: 4, ..shape };
            wrong.extend(bench.arm.attention(&query, &k, &v, all).expect("heads").into_data());
        }
        let call = Call::Attention { q: &q, k: &k, v: &v, shape };
        bench.expect("causal-mask", &call, &Tensor::new(256, wrong));
    }

    #[test]
    fn a_window_that_is_ignored_or_one_too_wide_is_recognised() {
        let bench = Bench::default();
        let of = |width, seed| bench.tensor(16, width, seed);
        let (q, k, v) = (of(256, 1), of(128, 2), of(128, 3));
        let windowed = |window| {
            let shape = AttentionShape { window, ..AttentionShape::causal(4, 2, 64, 0) };
            Call::Attention { q: &q, k: &k, v: &v, shape }
        };
        for (wrong, words) in [(None, "ignored"), (Some(10), "last 10 positions only instead of 9")]
        {
            let (call, wrong) = (windowed(Some(9)), bench.clean(&windowed(wrong)));
            bench.expect("causal-mask", &call, &wrong);
            let fits = bench.fits(&call, &wrong);
            assert!(fits[0].detail.contains(words), "{}", fits[0].detail);
        }
    }
}
