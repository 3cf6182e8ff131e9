//! Metrics of two sets of logits: distributions and top tokens.
//!
//! Each row is one token's logits. It knows nothing of sites or streams.

use crate::compute::forward::top_1;
use crate::metric::Metric;
use crate::tensor::Tensor;

/// Tokens that top-k agreement looks at.
const TOP: usize = 5;
/// What rounding of the logits themselves costs, in nats: added to KL and to half
/// the variance before their ratio is taken, which is 1 where both are noise.
const NOISE: f64 = 1e-8;
/// Deviations of the logits' difference within which a top-1 flip is explained:
/// the union bound over a vocabulary of 150,000 at a risk of 1e-3 is 6.1.
pub const EXPLAINED_DEVIATIONS: f64 = 6.1;

/// KL, its ratio to half the variance, agreement and flips; and the drift over the
/// predicted one, where the judge's logits were drawn with other roundings.
pub fn distributions(subject: &Tensor, judge: &Tensor, drawn: &[Tensor]) -> Vec<(Metric, f64)> {
    let rows = subject.rows();
    let drawn = of_shape(judge, drawn);
    let mut kl_sum = 0.0;
    let mut kl_ratio: Option<f64> = None;
    let mut drift_ratios = Vec::new();
    let (mut same_top, mut shared_top, mut unexplained) = (0usize, 0.0, 0usize);
    let drift = |drawn: &&Tensor, row| Token::compare(drawn.row(row), judge.row(row)).deviation;
    let predicted: Vec<Vec<f64>> =
        (0..rows).map(|row| drawn.iter().map(|drawn| drift(drawn, row)).collect()).collect();
    let jump = predicted.iter().filter_map(|drifts| jump(drifts)).reduce(larger).unwrap_or(1.0);
    for (row, drifts) in predicted.iter().enumerate() {
        let (a, b) = (subject.row(row), judge.row(row));
        let token = Token::compare(a, b);
        kl_sum += token.kl;
        let this = (token.kl + NOISE) / (token.half_variance + NOISE);
        // The one furthest from 1, on a scale of ratios.
        let further = kl_ratio.is_none_or(|ratio| this.ln().abs() > ratio.ln().abs());
        kl_ratio = if further { Some(this) } else { kl_ratio };
        drift_ratios.extend(beyond(token.deviation, drifts));
        let ((top_a, _), (top_b, _)) = (top_1(a), top_1(b));
        if top_a == top_b {
            same_top += 1;
        } else {
            let margin = f64::from(b[top_b as usize]) - f64::from(b[top_a as usize]);
            // Where rounding decides a choice a token drifts little or much. A token that
            // drifts as far as tokens of this prompt jump is held against its own drift.
            let deviation = match largest(drifts) {
                Some(largest) if token.deviation <= largest * jump => {
                    larger(largest, token.deviation)
                }
                Some(largest) => largest,
                None => token.deviation,
            };
            let explained = EXPLAINED_DEVIATIONS * std::f64::consts::SQRT_2 * deviation;
            unexplained += usize::from(margin > explained);
        }
        shared_top += shared_top_k(a, b);
    }
    let count = rows as f64;
    let mut metrics = vec![
        (Metric::Kl, kl_sum / count),
        (Metric::Top1Agreement, same_top as f64 / count),
        (Metric::TopKAgreement, shared_top / count),
        (Metric::UnexplainedFlips, unexplained as f64),
    ];
    metrics.extend(kl_ratio.map(|ratio| (Metric::KlRatio, ratio)));
    let distance = |ratio: f64| ratio.ln().abs();
    metrics.extend(median(drift_ratios, distance).map(|ratio| (Metric::DriftRatio, ratio)));
    metrics
}

/// Whether a top-1 token flips at a margin that the drawn drift does not explain.
pub fn flips_unexplained(subject: &Tensor, judge: &Tensor, drawn: &[Tensor]) -> bool {
    let comparable = !of_shape(judge, std::slice::from_ref(subject)).is_empty();
    let flips = |(metric, value): (Metric, f64)| metric == Metric::UnexplainedFlips && value > 0.0;
    comparable && distributions(subject, judge, drawn).into_iter().any(flips)
}

/// How far the same tokens' logits move in a batch, over the largest difference that
/// two passes with drawn roundings have; of the median token.
pub fn batch_ratio(batch: &Tensor, alone: &Tensor, drawn: &[Tensor]) -> Option<f64> {
    let drawn = of_shape(alone, drawn);
    of_shape(alone, std::slice::from_ref(batch)).first()?;
    let ratio = |row: usize| {
        let moved = Token::compare(batch.row(row), alone.row(row)).deviation;
        let between = |i: usize, j: usize| Token::compare(drawn[i].row(row), drawn[j].row(row));
        let pairs = (0..drawn.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        let drifts: Vec<f64> = pairs.map(|(i, j)| between(i, j).deviation).collect();
        let largest = largest(&drifts).filter(|largest| *largest > 0.0)?;
        Some(moved / largest)
    };
    median((0..alone.rows()).filter_map(ratio).collect(), |ratio| ratio)
}

/// The median in the order of what `by` makes of the values; of two the smaller one.
fn median(mut values: Vec<f64>, by: fn(f64) -> f64) -> Option<f64> {
    values.sort_by(|&a, &b| by(a).total_cmp(&by(b)));
    values.get(values.len().checked_sub(1)? / 2).copied()
}

/// How much further one drawn pass carries a token than another does.
fn jump(drifts: &[f64]) -> Option<f64> {
    let smallest = smallest(drifts).filter(|smallest| *smallest > 0.0)?;
    Some(largest(drifts)? / smallest)
}

fn larger(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}

fn largest(values: &[f64]) -> Option<f64> {
    values.iter().copied().reduce(|a, b| if b > a { b } else { a })
}

fn smallest(values: &[f64]) -> Option<f64> {
    values.iter().copied().reduce(|a, b| if b < a { b } else { a })
}

/// How far a drift lies beyond all predicted ones: its ratio to the largest or to the
/// smallest, and 1 between them. Nothing where none is predicted.
fn beyond(drift: f64, predicted: &[f64]) -> Option<f64> {
    let largest = largest(predicted).filter(|largest| *largest > 0.0)?;
    let smallest = smallest(predicted)?;
    Some(match drift {
        drift if drift > largest => drift / largest,
        drift if drift < smallest => drift / smallest,
        _ => 1.0,
    })
}

fn root_mean_square(values: &[f64]) -> Option<f64> {
    let square = values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64;
    (!values.is_empty()).then(|| square.sqrt())
}

fn of_shape<'a>(shape: &Tensor, tensors: &'a [Tensor]) -> Vec<&'a Tensor> {
    let same = |t: &&Tensor| (t.rows(), t.width()) == (shape.rows(), shape.width());
    tensors.iter().filter(same).collect()
}

/// The deviation of the difference of two logits' errors, over all tokens: the drawn
/// one, or the seen one where none was drawn.
pub fn flip_deviation(subject: &Tensor, judge: &Tensor, drawn: &[Tensor]) -> Option<f64> {
    let drawn = of_shape(judge, drawn);
    let seen = of_shape(judge, std::slice::from_ref(subject));
    let from = if drawn.is_empty() { seen } else { drawn };
    let rows = from.iter().flat_map(|from| (0..judge.rows()).map(move |row| (from.row(row), row)));
    let each = rows.map(|(row_of, row)| {
        std::f64::consts::SQRT_2 * Token::compare(row_of, judge.row(row)).deviation
    });
    root_mean_square(&each.collect::<Vec<f64>>()).filter(|sigma| sigma.is_finite())
}

/// One token's two distributions.
struct Token {
    /// `KL(softmax b || softmax a)`.
    kl: f64,
    /// Half the variance of `a - b` under `softmax b`.
    half_variance: f64,
    /// The plain deviation of `a - b` over the vocabulary.
    deviation: f64,
}

impl Token {
    fn compare(a: &[f32], b: &[f32]) -> Token {
        let (normal_a, normal_b) = (log_sum_exp(a), log_sum_exp(b));
        let (mut kl, mut mean, mut square) = (0.0, 0.0, 0.0);
        let (mut plain_mean, mut plain_square) = (0.0, 0.0);
        for (&a, &b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a), f64::from(b));
            let delta = a - b;
            let p = (b - normal_b).exp();
            kl += p * ((b - normal_b) - (a - normal_a));
            mean += p * delta;
            square += p * delta * delta;
            plain_mean += delta;
            plain_square += delta * delta;
        }
        let count = a.len() as f64;
        let plain_mean = plain_mean / count;
        Token {
            // Rounding can leave a KL of equal distributions just below zero.
            kl: if kl > 0.0 { kl } else { 0.0 },
            half_variance: (square - mean * mean) / 2.0,
            deviation: (plain_square / count - plain_mean * plain_mean).abs().sqrt(),
        }
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().fold(f64::NEG_INFINITY, |most, &logit| {
        let logit = f64::from(logit);
        if logit > most { logit } else { most }
    });
    most + logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum::<f64>().ln()
}

/// The share of the `TOP` largest logits that both have.
fn shared_top_k(a: &[f32], b: &[f32]) -> f64 {
    let (a, b) = (top_k(a), top_k(b));
    a.iter().filter(|token| b.contains(token)).count() as f64 / a.len() as f64
}

/// The tokens of the largest logits; of equal ones the smaller ids.
fn top_k(logits: &[f32]) -> Vec<usize> {
    let count = TOP.min(logits.len());
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    let order = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    tokens.select_nth_unstable_by(count - 1, order);
    tokens.truncate(count);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(metrics: &[(Metric, f64)], name: Metric) -> f64 {
        metrics.iter().find(|(metric, _)| *metric == name).expect("measured").1
    }

    #[test]
    fn small_differences_give_a_kl_of_half_the_variance() {
        let b: Vec<f32> = (0..1000).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
        let a: Vec<f32> =
            b.iter().enumerate().map(|(i, b)| b + 0.01 * (i as f32 * 0.9).cos()).collect();
        let measured = distributions(&Tensor::new(1000, a), &Tensor::new(1000, b), &[]);
        assert!((metric(&measured, Metric::KlRatio) - 1.0).abs() < 0.01);
        assert_eq!(metric(&measured, Metric::UnexplainedFlips), 0.0);
    }

    #[test]
    fn equal_logits_have_a_kl_ratio_of_one() {
        let b: Vec<f32> = (0..1000).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
        let (a, b) = (Tensor::new(1000, b.clone()), Tensor::new(1000, b));
        assert!((metric(&distributions(&a, &b, &[]), Metric::KlRatio) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_drift_is_held_against_drawn_ones_token_by_token() {
        let logits = |size: f32, phase: f32| {
            let wave = (0..3000).map(|i| size * (i as f32 * 0.7 + phase).sin());
            Tensor::new(1000, wave.collect())
        };
        let judge = logits(0.0, 0.0);
        let drawn = [logits(0.1, 1.0), logits(0.2, 2.0)];
        let ratio =
            |subject: &Tensor| metric(&distributions(subject, &judge, &drawn), Metric::DriftRatio);
        assert_eq!(ratio(&logits(0.15, 0.0)), 1.0);
        assert!((ratio(&logits(0.8, 0.0)) - 4.0).abs() < 0.05);
        assert!((ratio(&logits(0.02, 0.0)) - 0.2).abs() < 0.01);
        // One token of three that jumps is not the median.
        let mut jumped = logits(0.15, 0.0);
        jumped.row_mut(1).iter_mut().for_each(|value| *value *= 100.0);
        assert_eq!(ratio(&jumped), 1.0);
        assert_eq!(batch_ratio(&judge, &judge, &drawn), Some(0.0));
        let moved = batch_ratio(&logits(1.0, 0.0), &judge, &drawn).expect("drawn passes");
        assert!(moved > 3.0, "{moved}");
        assert_eq!(batch_ratio(&judge, &judge, &[]), None);
    }

    #[test]
    fn a_flip_is_explained_where_one_drawn_pass_drifts_as_far() {
        let (mut judge, mut subject) = (vec![0.0f32; 1000], vec![0.0f32; 1000]);
        let wave = |size: f32| -> Vec<f32> { (0..1000).map(|i| size * (i as f32).sin()).collect() };
        (judge[7], judge[9]) = (5.0, 1.0);
        (subject[7], subject[9]) = (4.0, 6.0);
        let with = |size: f32| {
            let drift = judge.iter().zip(wave(size)).map(|(judge, drift)| judge + drift);
            Tensor::new(1000, drift.collect())
        };
        let (judge_row, subject) = (Tensor::new(1000, judge.clone()), Tensor::new(1000, subject));
        let unexplained = |drawn: &[Tensor]| flips_unexplained(&subject, &judge_row, drawn);
        assert!(unexplained(&[with(0.1), with(0.1), with(0.1), with(0.1)]));
        assert!(!unexplained(&[with(0.1), with(0.1), with(0.1), with(1.0)]));
    }

    #[test]
    fn a_shift_of_all_logits_changes_no_distribution() {
        let b: Vec<f32> = (0..64).map(|i| i as f32 * 0.125).collect();
        let a: Vec<f32> = b.iter().map(|b| b + 2.0).collect();
        let measured = distributions(&Tensor::new(64, a), &Tensor::new(64, b), &[]);
        assert!(metric(&measured, Metric::Kl) < 1e-12);
        assert_eq!(metric(&measured, Metric::Top1Agreement), 1.0);
    }

    #[test]
    fn a_flip_against_a_wide_margin_is_unexplained() {
        let mut b = vec![0.0f32; 10_000];
        (b[7], b[9]) = (5.0, 1.0);
        let mut a = b.clone();
        a[9] = 6.0;
        let measured = distributions(&Tensor::new(10_000, a), &Tensor::new(10_000, b), &[]);
        assert_eq!(metric(&measured, Metric::UnexplainedFlips), 1.0);
        assert_eq!(metric(&measured, Metric::Top1Agreement), 0.0);
    }
}
