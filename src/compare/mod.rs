//! Measures two streams of tensors against each other, site by site.
//!
//! In this order: shape, NaN and infinity, bits, and only then the metrics that
//! need finite numbers. A metric that would mean nothing (a cosine of zeros, a
//! correlation of one element) is absent, never a number. It judges nothing.

mod account;
mod cost;
mod diagnosis;
pub mod fingerprints;
pub mod fit;
mod growth;
mod logits;
pub mod models;
mod numbers;
mod outcome;
mod stage;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use account::Account;
pub use cost::{Cost, Part};
pub use diagnosis::{Diagnosis, MOST_DEVIATIONS, Scene, Suspect, diagnose};
pub use growth::{Growth, Law, LayerGrowth};
pub use outcome::measure_outcome;
pub use stage::{Extent, SiteKernel, StageMeasures, measure_arms, measure_stage};

use crate::compute::floor::Deviations;
use crate::compute::forward::Greedy;
use crate::metric::Metric;
use crate::op::{Site, Stream};
use crate::tensor::Tensor;

/// Mismatching elements that are kept for the reader.
const SHOWN_MISMATCHES: usize = 5;

/// Everything measured between two streams at one site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// Whose numbers are in question.
    pub subject: Stream,
    /// What they are held against.
    pub judge: Stream,
    /// Where.
    pub site: Site,
    /// The subject's shape.
    pub shape: [usize; 2],
    /// The numbers; those that would mean nothing are absent.
    #[serde(with = "crate::metric::json")]
    pub metrics: BTreeMap<Metric, f64>,
    /// Why metrics are absent, where they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unmeasured: Option<String>,
    /// The element with the largest difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<Element>,
    /// The first elements whose bits differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_mismatches: Vec<Element>,
    /// How the errors over their floors are distributed, where there are enough of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub z_histogram: Option<ZHistogram>,
    /// For a statistic, the least and the largest value that a clean sample of this size has
    /// by chance, at a risk of [`RISK`]: whoever judges forgives what lies between.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub chance: BTreeMap<Metric, [f64; 2]>,
}

/// The risk at which chance alone leaves the interval that it is given, per site and claim.
pub const RISK: f64 = 2e-5;

/// Measures as JSON, some of them on each thread: they are most of what is read and
/// written where a stage is judged anew.
pub mod measures_json {
    use rayon::prelude::*;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::value::{RawValue, to_raw_value};

    use super::Measure;

    const ON_ONE_THREAD: usize = 32;

    /// Writes measures, as JSON alone.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(all: &[Measure], serializer: S) -> Result<S::Ok, S::Error> {
        let texts = all.par_iter().with_min_len(ON_ONE_THREAD).map(to_raw_value);
        let texts: Vec<Box<RawValue>> =
            texts.collect::<Result<_, _>>().map_err(serde::ser::Error::custom)?;
        texts.serialize(serializer)
    }

    /// Reads measures, from a text of JSON.
    ///
    /// # Errors
    /// If one of them is something else.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Measure>, D::Error> {
        let texts = Vec::<&RawValue>::deserialize(deserializer)?;
        let measures = texts.par_iter().with_min_len(ON_ONE_THREAD);
        let measures = measures.map(|text| serde_json::from_str(text.get()));
        measures.collect::<Result<_, _>>().map_err(serde::de::Error::custom)
    }
}

/// Counts of z: below -4, in 16 bins of half a deviation each from -4 to 4, and
/// from 4 on. A standard normal variable has 6 of 100,000 outside.
pub type ZHistogram = [u64; 18];

/// The least z of the first bin between the tails of a [`ZHistogram`].
pub const Z_FROM: f64 = -4.0;
/// The width of those bins.
pub const Z_STEP: f64 = 0.5;

/// One element on both sides. Values are text, so that NaN and infinity survive JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Element {
    /// Its row: the token.
    pub row: usize,
    /// Its place in the row.
    pub column: usize,
    /// The subject's value and bits.
    pub subject: String,
    /// The judge's value and bits.
    pub judge: String,
}

impl Element {
    fn of(index: usize, subject: &Tensor, judge: &Tensor) -> Element {
        let show = |value: f32| format!("{value:e} (0x{:08x})", value.to_bits());
        Element {
            row: index / subject.width(),
            column: index % subject.width(),
            subject: show(subject.data()[index]),
            judge: show(judge.data()[index]),
        }
    }
}

/// Two arms' greedily decoded tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GreedyComparison {
    /// Whose tokens are in question.
    pub subject: Stream,
    /// What they are held against.
    pub judge: Stream,
    /// The first step whose tokens differ, from 0.
    pub first_difference: Option<usize>,
    /// The judge's top-1 margin at that step.
    pub margin: Option<f32>,
    /// The deviation of the difference of two logits' errors, over the prompt.
    #[serde(default)]
    pub sigma: Option<f64>,
}

impl GreedyComparison {
    /// Where the tokens part, and whether that was to be expected.
    pub fn sentence(&self) -> String {
        let pair = format!("{} and {}", self.subject, self.judge);
        let Some(step) = self.first_difference else {
            return format!("greedy: {pair} decode the same tokens");
        };
        match (self.margin.map(f64::from), self.sigma.filter(|sigma| *sigma > 0.0)) {
            (Some(margin), Some(sigma)) => {
                let deviations = margin / sigma;
                let verdict = if deviations <= logits::EXPLAINED_DEVIATIONS {
                    "explained by drift"
                } else {
                    "drift does not explain it"
                };
                format!(
                    "greedy: {pair} part at step {step}: flip at margin {deviations:.1} sigma: {verdict}"
                )
            }
            _ => format!("greedy: {pair} part at step {step}"),
        }
    }
}

/// Compares the greedy tokens of two arms; `sigma` is the deviation of the
/// difference of two logits' errors.
pub fn greedy(
    subject: (Stream, &Greedy),
    judge: (Stream, &Greedy),
    sigma: Option<f64>,
) -> GreedyComparison {
    let pairs = subject.1.tokens.iter().zip(&judge.1.tokens);
    let first_difference = pairs.into_iter().position(|(a, b)| a != b);
    let margin = first_difference.and_then(|step| judge.1.margins.get(step).copied());
    GreedyComparison { subject: subject.0, judge: judge.0, first_difference, margin, sigma }
}

/// What was predicted of a site, where something was.
#[derive(Clone, Copy, Debug, Default)]
pub struct Predicted<'a> {
    /// The deviation of each element.
    pub floor: Option<&'a Deviations>,
    /// The reference's logits with all roundings drawn anew, some times over.
    pub drawn: &'a [Tensor],
}

/// Measures `subject` against `judge` at `site`, and both against what was predicted.
pub fn measure(
    site: &Site,
    (subject_stream, subject): (Stream, &Tensor),
    (judge_stream, judge): (Stream, &Tensor),
    predicted: Predicted<'_>,
) -> Measure {
    let mut measure = Measure {
        subject: subject_stream,
        judge: judge_stream,
        site: site.clone(),
        shape: [subject.rows(), subject.width()],
        metrics: BTreeMap::new(),
        unmeasured: None,
        worst: None,
        first_mismatches: Vec::new(),
        z_histogram: None,
        chance: BTreeMap::new(),
    };
    if (subject.rows(), subject.width()) != (judge.rows(), judge.width()) {
        measure.unmeasured = Some(format!(
            "the shapes differ: [{}, {}] and [{}, {}]",
            subject.rows(),
            subject.width(),
            judge.rows(),
            judge.width()
        ));
        return measure;
    }
    if subject.data().is_empty() {
        measure.unmeasured = Some("there is no element to compare".to_owned());
        return measure;
    }

    let pairs = || subject.data().iter().copied().zip(judge.data().iter().copied());
    let differing =
        || pairs().enumerate().filter(|(_, (a, b))| a.to_bits() != b.to_bits()).map(|(i, _)| i);
    measure.metrics.insert(Metric::BitMismatches, differing().count() as f64);
    measure.first_mismatches =
        differing().take(SHOWN_MISMATCHES).map(|i| Element::of(i, subject, judge)).collect();
    let non_finite = pairs().filter(|(a, b)| !a.is_finite() || !b.is_finite()).count();
    measure.metrics.insert(Metric::NonFinite, non_finite as f64);
    if non_finite > 0 {
        measure.unmeasured =
            Some(format!("{non_finite} elements are NaN or infinite, so nothing else has meaning"));
        measure.worst = pairs()
            .position(|(a, b)| !a.is_finite() || !b.is_finite())
            .map(|index| Element::of(index, subject, judge));
        return measure;
    }

    measure.worst = numbers::worst(subject, judge).map(|i| Element::of(i, subject, judge));
    measure.metrics.extend(numbers::differences(subject, judge));
    measure.metrics.extend(numbers::likeness(subject, judge));
    if let Some(floor) = predicted.floor
        && let Some(found) = numbers::against_floor(subject, judge, floor)
    {
        measure.metrics.extend(found.metrics);
        measure.chance.extend(found.chance);
        measure.z_histogram = found.histogram;
    }
    if site.0 == "logits" {
        measure.metrics.extend(logits::distributions(subject, judge, predicted.drawn));
    }
    measure
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Arm;

    fn compare(a: Vec<f32>, b: Vec<f32>, width: usize) -> Measure {
        measure(
            &Site("embed".to_owned()),
            (Stream::Arm(Arm::Emulated), &Tensor::new(width, a)),
            (Stream::Arm(Arm::Reference), &Tensor::new(width, b)),
            Predicted::default(),
        )
    }

    #[test]
    fn equal_tensors_have_no_difference_and_perfect_likeness() {
        let m = compare(vec![1.0, -2.0, 3.0], vec![1.0, -2.0, 3.0], 3);
        assert_eq!(m.metrics[&Metric::BitMismatches], 0.0);
        assert_eq!(m.metrics[&Metric::Nmse], 0.0);
        assert_eq!(m.metrics[&Metric::MaxUlp], 0.0);
        assert!((m.metrics[&Metric::Cosine] - 1.0).abs() < 1e-12);
        assert!((m.metrics[&Metric::Slope] - 1.0).abs() < 1e-12);
        assert!(m.first_mismatches.is_empty());
    }

    #[test]
    fn nan_on_both_sides_is_counted_and_never_compared() {
        let m = compare(vec![f32::NAN, 1.0], vec![f32::NAN, 1.0], 2);
        assert_eq!(m.metrics[&Metric::NonFinite], 1.0);
        assert!(!m.metrics.contains_key(&Metric::Nmse));
        assert!(m.unmeasured.is_some());
    }

    #[test]
    fn infinities_of_both_signs_are_not_close_to_anything() {
        let m = compare(vec![f32::INFINITY, 1.0], vec![f32::NEG_INFINITY, 1.0], 2);
        assert_eq!(m.metrics[&Metric::NonFinite], 1.0);
        assert_eq!(m.metrics[&Metric::BitMismatches], 1.0);
        assert!(!m.metrics.contains_key(&Metric::MaxRel));
    }

    #[test]
    fn zeros_have_no_cosine_and_no_relative_error() {
        let m = compare(vec![0.0; 4], vec![0.0; 4], 4);
        for metric in [Metric::Cosine, Metric::Nmse, Metric::Pearson, Metric::MaxRel] {
            assert!(!m.metrics.contains_key(&metric), "{metric}");
        }
        assert_eq!(m.metrics[&Metric::MaxAbs], 0.0);
    }

    #[test]
    fn one_element_has_no_correlation() {
        let m = compare(vec![2.0], vec![1.0], 1);
        assert!(!m.metrics.contains_key(&Metric::Pearson));
        assert_eq!(m.metrics[&Metric::MaxAbs], 1.0);
    }

    #[test]
    fn different_shapes_are_unmeasured() {
        let m = compare(vec![1.0; 4], vec![1.0; 6], 2);
        assert!(m.metrics.is_empty());
        assert!(m.unmeasured.expect("a reason").contains("shapes differ"));
    }

    #[test]
    fn signed_zeros_differ_in_bits_alone() {
        let m = compare(vec![-0.0, 1.0], vec![0.0, 1.0], 2);
        assert_eq!(m.metrics[&Metric::BitMismatches], 1.0);
        assert_eq!(m.metrics[&Metric::MaxAbs], 0.0);
        assert_eq!(m.metrics[&Metric::MaxUlp], 0.0);
    }

    #[test]
    fn a_gain_shows_in_the_slope() {
        let b: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let a: Vec<f32> = b.iter().map(|b| 0.96 * b + 0.12).collect();
        let m = compare(a, b, 10);
        assert!((m.metrics[&Metric::Slope] - 0.96).abs() < 1e-6);
        assert!((m.metrics[&Metric::Intercept] - 0.12).abs() < 1e-6);
    }

    #[test]
    fn greedy_tokens_report_the_first_difference_with_its_margin() {
        let of = |tokens: &[u32]| Greedy { tokens: tokens.to_vec(), margins: vec![0.5, 0.25, 0.1] };
        let emulated = (Stream::Arm(Arm::Emulated), &of(&[1, 2, 3]));
        let judge = of(&[1, 9, 3]);
        let compared = greedy(emulated, (Stream::Arm(Arm::Reference), &judge), Some(0.5));
        assert_eq!((compared.first_difference, compared.margin), (Some(1), Some(0.25)));
        let sentence = compared.sentence();
        assert!(sentence.ends_with("flip at margin 0.5 sigma: explained by drift"), "{sentence}");
    }
}
