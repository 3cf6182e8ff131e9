//! Attention over a cache in which one position was not written, or holds its neighbour's keys and
//! values: a slot mapping or a block table that is off by one.

use super::planted::{Bug, Ground, Made, bug, chosen};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "one position of the KV cache was not written, or holds its neighbour's keys and values",
    causes: &["kv-cache-position"],
    bugs: BUGS,
    test,
};

/// A single query sees any position; of a longer cache its last ones are tried.
const MOST_TRIED: usize = 64;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Attention { q, k, v, shape } = *case.call else { return Ok(Vec::new()) };
    let Some(&row) = case.rows_beyond_noise().first() else { return Ok(Vec::new()) };
    // Each row before sees less than the first wrong one, so that this one's own position it is.
    let own = shape.first_position + row;
    let tried = if row > 0 { own..own + 1 } else { shape.seen(0) };
    let tried = tried.start.max(tried.end.saturating_sub(MOST_TRIED))..tried.end;
    let mut fits = Vec::new();
    for position in tried {
        let mut variants = vec![(
            format!("position {position} of the KV cache is zero: it was not written"),
            None,
        )];
        let neighbours = [position.checked_sub(1), Some(position + 1)];
        for other in neighbours.into_iter().flatten().filter(|&other| other < k.rows()) {
            let detail = format!(
                "position {position} of the KV cache holds the keys and values of position {other}"
            );
            variants.push((detail, Some(other)));
        }
        for (detail, held) in variants {
            let (k, v) = (with_position(k, position, held), with_position(v, position, held));
            let call = Call::Attention { q, k: &k, v: &v, shape };
            fits.extend(case.fit_call("kv-cache-position", detail, &call)?);
        }
    }
    Ok(fits)
}

/// Keys or values with one position of another's, or of zeros.
fn with_position(x: &Tensor, position: usize, held: Option<usize>) -> Tensor {
    let mut spoilt = x.clone();
    match held {
        Some(other) => spoilt.row_mut(position).copy_from_slice(x.row(other)),
        None => spoilt.row_mut(position).fill(0.0),
    }
    spoilt
}

const BUGS: &[Bug] = &[
    bug("a position of the KV cache not written", &["kv-cache-position"], &["attn"], &unwritten),
    bug(
        "a position of the KV cache that holds the one before",
        &["kv-cache-position"],
        &["attn"],
        &one_before,
    ),
];

/// Positions from which the spoilt one is drawn: the first ones, which a longer pass has too.
const DRAWN: usize = 4;

fn unwritten(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Attention { k, .. } = *call else { return Ok(None) };
    spoilt(call, ground, chosen(ground.seed, DRAWN.min(k.rows())), None)
}

fn one_before(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Attention { k, .. } = *call else { return Ok(None) };
    if k.rows() < 2 {
        return Ok(None);
    }
    let before = chosen(ground.seed, DRAWN.min(k.rows() - 1));
    spoilt(call, ground, before + 1, Some(before))
}

fn spoilt(call: &Call<'_>, ground: &Ground<'_>, position: usize, held: Option<usize>) -> Made {
    let Call::Attention { q, k, v, shape } = *call else { return Ok(None) };
    let (k, v) = (with_position(k, position, held), with_position(v, position, held));
    Ok(Some(ground.arm.attention(q, &k, &v, shape)?))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::AttentionShape;

    #[test]
    fn a_position_that_is_lost_or_its_neighbours_is_recognised() {
        let bench = Bench::default();
        // A prompt, and a token that is decoded after it.
        for (rows, first) in [(6, 0), (1, 5)] {
            let of = |rows, width, seed| bench.tensor(rows, width, seed);
            let (q, k, v) = (of(rows, 256, 1), of(6, 128, 2), of(6, 128, 3));
            let shape = AttentionShape::causal(4, 2, 64, first);
            let call = Call::Attention { q: &q, k: &k, v: &v, shape };
            for (position, held, words) in [
                (3, None, "position 3 of the KV cache is zero"),
                (2, Some(1), "position 2 of the KV cache holds the keys and values of position 1"),
                (4, Some(5), "position 4 of the KV cache holds the keys and values of position 5"),
            ] {
                let (k, v) = (with_position(&k, position, held), with_position(&v, position, held));
                let wrong = bench.clean(&Call::Attention { q: &q, k: &k, v: &v, shape });
                bench.expect("kv-cache-position", &call, &wrong);
                let fits = bench.fits(&call, &wrong);
                assert!(fits[0].detail.contains(words), "{}", fits[0].detail);
            }
        }
    }
}
