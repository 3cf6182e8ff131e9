//! Attention whose scores, mask or running maximum have too narrow a range.

use rayon::prelude::*;

use super::{Case, Fingerprint, Fit};
use crate::compute::call::Call;
use crate::compute::{AttentionShape, ComputeError};
use crate::dtype::Format;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "attention's scores are kept in f16, or its mask is a finite number",
    causes: &["f16-scores", "finite-mask"],
    bugs: &[],
    test,
};

/// Numbers that stood for minus infinity in public reports.
const MASKS: [f64; 4] = [-1e4, -3e4, -5e4, -65504.0];

/// Scores below are kept well by f16: a step of 2 is an eighth in heads of 256 values.
const COARSE: f64 = 2048.0;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Attention { q, k, v, shape } = *case.call else { return Ok(Vec::new()) };
    // What a soft cap makes of such scores is not among the hypotheses.
    if shape.cap.is_some() {
        return Ok(Vec::new());
    }
    let scale = shape.exact_scale();
    let infinite = f64::NEG_INFINITY;
    let half = |score: f64| f64::from(Format::F16.round(score as f32));
    let mut fits = Vec::new();
    let largest = largest_score(q, k, shape);
    if largest < COARSE {
        return Ok(fits);
    }
    let in_half = |seen: bool, raw: f64| if seen { half(raw) * scale } else { infinite };
    let predicted = attended((q, k, v), shape, &in_half, infinite);
    let detail = "scores are kept in f16 before they are scaled: infinite beyond 65504".to_owned();
    fits.extend(case.fit_if_any("f16-scores", detail, 0, &predicted));
    for mask in MASKS.into_iter().filter(|mask| largest * scale > -mask) {
        let leaks = |seen: bool, raw: f64| if seen { raw * scale } else { mask };
        let predicted = attended((q, k, v), shape, &leaks, infinite);
        let detail = format!("masked scores are {mask}, and true ones lie below it");
        fits.extend(case.fit_if_any("finite-mask", detail, 0, &predicted));
        let plain = |seen: bool, raw: f64| if seen { raw * scale } else { infinite };
        let predicted = attended((q, k, v), shape, &plain, mask);
        let detail = format!("the running maximum begins at {mask}, and true scores lie below it");
        fits.extend(case.fit_if_any("finite-mask", detail, 0, &predicted));
    }
    Ok(fits)
}

/// No score is larger, by the lengths of queries and keys.
fn largest_score(q: &Tensor, k: &Tensor, shape: AttentionShape<'_>) -> f64 {
    let longest = |x: &Tensor| {
        let length = |head: &[f32]| head.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        x.data().chunks(shape.head_dim.max(1)).map(length).fold(0.0, f64::max).sqrt()
    };
    longest(q) * longest(k)
}

/// Attention in f64 over scores that `score` makes of a raw one and of whether the query sees the
/// key; the maximum is at least `start`. Where no weight is left the output is zero, and NaN where
/// every score is minus infinity.
fn attended(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    shape: AttentionShape<'_>,
    score: &(dyn Fn(bool, f64) -> f64 + Sync),
    start: f64,
) -> Tensor {
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let mut y = Tensor::zeros(q.rows(), heads * head_dim);
    let rows = y.data_mut().par_chunks_exact_mut((heads * head_dim).max(1));
    rows.enumerate().for_each(|(row, y)| {
        for (head, output) in y.chunks_exact_mut(head_dim.max(1)).enumerate() {
            let own = head / (heads / kv_heads) * head_dim;
            let query = &q.row(row)[head * head_dim..(head + 1) * head_dim];
            let scores: Vec<f64> = (0..k.rows())
                .map(|key| {
                    let pairs = query.iter().zip(&k.row(key)[own..own + head_dim]);
                    let raw = pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                    score(shape.seen(row).contains(&key), raw)
                })
                .collect();
            let most = scores.iter().copied().fold(start, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (column, output) in output.iter_mut().enumerate() {
                let values = (0..k.rows()).map(|key| f64::from(v.row(key)[own + column]));
                let total: f64 = values.zip(&weights).map(|(value, weight)| value * weight).sum();
                *output = if sum == 0.0 { 0.0 } else { (total / sum) as f32 };
            }
        }
    });
    y
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::super::mapped;
    use super::*;

    /// The smallest form of a public report: one head of width 1, and a row that sees the first
    /// key alone, whose score of -20,000 lies below a mask of -10,000.
    #[test]
    fn the_masked_key_of_a_public_report_wins() {
        let column = |values: [f32; 2]| Tensor::new(1, values.to_vec());
        let (q, k, v) = (column([-20000.0, 0.0]), column([1.0, 0.0]), column([1.0, 100.0]));
        let shape = AttentionShape::causal(1, 1, 1, 0);
        let row_0 = |mask: f64, start: f64| {
            let score = |seen: bool, raw: f64| if seen { raw } else { mask };
            attended((&q, &k, &v), shape, &score, start).row(0)[0]
        };
        assert_eq!(row_0(f64::NEG_INFINITY, f64::NEG_INFINITY), 1.0);
        assert_eq!(row_0(-1e4, f64::NEG_INFINITY), 100.0);
        assert_eq!(row_0(f64::NEG_INFINITY, -1e4), 0.0);
    }

    #[test]
    fn a_finite_mask_below_which_true_scores_lie_is_recognised() {
        let bench = Bench::default();
        let shape = AttentionShape::causal(4, 2, 64, 0);
        // Queries and keys that point away from each other: every true score is far below zero.
        let k = mapped(&bench.tensor(6, 128, 2), |x| 40.0 + x);
        let q = mapped(&bench.tensor(6, 256, 1), |x| -300.0 + x);
        let v = bench.tensor(6, 128, 3);
        let call = Call::Attention { q: &q, k: &k, v: &v, shape };
        let scale = 1.0 / 8.0;
        let leaks = |seen: bool, raw: f64| if seen { raw * scale } else { -1e4 };
        bench.expect("finite-mask", &call, &attended((&q, &k, &v), shape, &leaks, f64::MIN));
        let plain = |seen: bool, raw: f64| if seen { raw * scale } else { f64::NEG_INFINITY };
        bench.expect("finite-mask", &call, &attended((&q, &k, &v), shape, &plain, -5e4));
    }

    #[test]
    fn scores_kept_in_f16_are_recognised() {
        let bench = Bench::default();
        let shape = AttentionShape::causal(4, 2, 64, 0);
        let (q, k) = (bench.tensor(9, 256, 1), bench.tensor(9, 128, 2));
        let (q, k) = (mapped(&q, |x| 10.0 + 0.05 * x), mapped(&k, |x| 6.0 + 0.05 * x));
        let v = bench.tensor(9, 128, 3);
        let call = Call::Attention { q: &q, k: &k, v: &v, shape };
        let half = |seen: bool, raw: f64| match seen {
            true => f64::from(Format::F16.round(raw as f32)) / 8.0,
            false => f64::NEG_INFINITY,
        };
        let wrong = attended((&q, &k, &v), shape, &half, f64::NEG_INFINITY);
        bench.expect("f16-scores", &call, &wrong);
    }
}
