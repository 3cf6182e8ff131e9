//! The names of everything that is measured between two streams of tensors.
//!
//! It knows what a metric means and which values it can take, not how it is
//! computed.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number measured at one site between a subject `a` and a reference `b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Elements whose f32 bits differ.
    BitMismatches,
    /// Elements that are NaN or infinite in `a` or in `b`.
    NonFinite,
    /// Largest `|a - b|`.
    MaxAbs,
    /// Largest `|a - b| / |b|` where `b` is not zero.
    MaxRel,
    /// Largest distance in units of the last place of f32.
    MaxUlp,
    /// Largest `|a - b|` in units of the last place of the row's largest `|b|`.
    RowUlp,
    /// `sum (a - b)^2 / sum b^2`.
    Nmse,
    /// Cosine of the angle between `a` and `b`.
    Cosine,
    /// Pearson's correlation coefficient.
    Pearson,
    /// Slope of the least-squares line `a = slope * b + intercept`.
    Slope,
    /// Intercept of that line.
    Intercept,
    /// Root mean square of `z = (a - b) / floor`.
    ZRms,
    /// Largest `|z|`.
    ZMax,
    /// Mean of `z`: a bias.
    ZMean,
    /// Largest over rows of how far the row's squares of `z` stand from their
    /// expectation, in deviations of a standard normal variable.
    ZRow,
    /// The same over columns.
    ZColumn,
    /// Mean over tokens of `KL(softmax b || softmax a)`, in nats.
    Kl,
    /// KL over half the variance of the logits' difference, of the token where it is
    /// furthest from 1; both with the noise of rounding, 1e-8 nats, added.
    KlRatio,
    /// A token's deviation of `a - b` over the largest of reference passes whose
    /// roundings were drawn anew, or over the smallest where it lies below all, else 1;
    /// of the median token.
    DriftRatio,
    /// Share of tokens whose largest logit is the same one.
    Top1Agreement,
    /// Mean share of the five largest logits that both have.
    TopKAgreement,
    /// Tokens whose top-1 changes although its margin exceeds what drift explains: the
    /// largest predicted one, or the seen one where there is no prediction.
    UnexplainedFlips,
    /// Elements of `logits_in_batch` whose bits are not those of `logits`: the same
    /// tokens alone and among others.
    BatchMismatches,
    /// NMSE of `logits_in_batch` against `logits`.
    BatchNmse,
    /// A token's deviation of `logits_in_batch - logits` over the largest that two passes
    /// with drawn roundings have; of the median token.
    BatchRatio,
    /// A command's exit status, at `exit`.
    ExitStatus,
    /// Matches of a pattern in a command's output, at `match.<name>`.
    Matches,
    /// 1 where an output's blake3 hash is not the declared one, else 0; at `output.<path>`.
    DigestMismatch,
}

impl Metric {
    /// All metrics, in the order in which they are reported.
    pub const ALL: [Metric; 28] = [
        Metric::BitMismatches,
        Metric::NonFinite,
        Metric::MaxAbs,
        Metric::MaxRel,
        Metric::MaxUlp,
        Metric::RowUlp,
        Metric::Nmse,
        Metric::Cosine,
        Metric::Pearson,
        Metric::Slope,
        Metric::Intercept,
        Metric::ZRms,
        Metric::ZMax,
        Metric::ZMean,
        Metric::ZRow,
        Metric::ZColumn,
        Metric::Kl,
        Metric::KlRatio,
        Metric::DriftRatio,
        Metric::Top1Agreement,
        Metric::TopKAgreement,
        Metric::UnexplainedFlips,
        Metric::BatchMismatches,
        Metric::BatchNmse,
        Metric::BatchRatio,
        Metric::ExitStatus,
        Metric::Matches,
        Metric::DigestMismatch,
    ];

    /// The name that manifests, contracts and reports use.
    pub fn name(self) -> &'static str {
        match self {
            Metric::BitMismatches => "bit_mismatches",
            Metric::NonFinite => "non_finite",
            Metric::MaxAbs => "max_abs",
            Metric::MaxRel => "max_rel",
            Metric::MaxUlp => "max_ulp",
            Metric::RowUlp => "row_ulp",
            Metric::Nmse => "nmse",
            Metric::Cosine => "cosine",
            Metric::Pearson => "pearson",
            Metric::Slope => "slope",
            Metric::Intercept => "intercept",
            Metric::ZRms => "z_rms",
            Metric::ZMax => "z_max",
            Metric::ZMean => "z_mean",
            Metric::ZRow => "z_row",
            Metric::ZColumn => "z_column",
            Metric::Kl => "kl",
            Metric::KlRatio => "kl_ratio",
            Metric::DriftRatio => "drift_ratio",
            Metric::Top1Agreement => "top1_agreement",
            Metric::TopKAgreement => "top_k_agreement",
            Metric::UnexplainedFlips => "unexplained_flips",
            Metric::BatchMismatches => "batch_mismatches",
            Metric::BatchNmse => "batch_nmse",
            Metric::BatchRatio => "batch_ratio",
            Metric::ExitStatus => "exit_status",
            Metric::Matches => "matches",
            Metric::DigestMismatch => "digest_mismatch",
        }
    }

    /// What it says, in one line, `a` being the subject and `b` the judge.
    pub fn meaning(self) -> &'static str {
        match self {
            Metric::BitMismatches => "elements whose f32 bits differ",
            Metric::NonFinite => "elements that are NaN or infinite on either side",
            Metric::MaxAbs => "largest |a - b|",
            Metric::MaxRel => "largest |a - b| / |b| where b is not zero",
            Metric::MaxUlp => "largest distance in units of the last place of f32",
            Metric::RowUlp => "largest |a - b| in units of the last place of the row's largest |b|",
            Metric::Nmse => "sum (a - b)^2 / sum b^2; its root is the relative rms error",
            Metric::Cosine => "cosine of the angle between a and b",
            Metric::Pearson => "Pearson's correlation of a and b",
            Metric::Slope => "slope of the least-squares line a = slope * b + intercept",
            Metric::Intercept => "intercept of that line",
            Metric::ZRms => {
                "root mean square of z = (a - b) / floor: 1 where the error is the predicted one"
            }
            Metric::ZMax => "largest |z|: the error in predicted deviations",
            Metric::ZMean => "mean of z: a bias",
            Metric::ZRow => "how far the worst row's mean of z^2 lies above 1, in deviations",
            Metric::ZColumn => "how far the worst column's mean of z^2 lies above 1, in deviations",
            Metric::Kl => "mean over tokens of KL(softmax b || softmax a), in nats",
            Metric::KlRatio => {
                "KL over half the variance of a - b, where it is furthest from 1; both plus 1e-8 nats"
            }
            Metric::DriftRatio => {
                "the median token's drift over those of passes with drawn roundings; 1 among them"
            }
            Metric::Top1Agreement => "share of tokens with the same largest logit",
            Metric::TopKAgreement => "mean share of the five largest logits that both have",
            Metric::UnexplainedFlips => {
                "tokens whose top-1 flips at a margin that the predicted drift does not explain"
            }
            Metric::BatchMismatches => {
                "elements of `logits_in_batch` whose bits are not those of `logits`"
            }
            Metric::BatchNmse => "NMSE of `logits_in_batch` against `logits`",
            Metric::BatchRatio => {
                "`logits_in_batch - logits` over what drawn roundings predict, of the median token"
            }
            Metric::ExitStatus => "a command's exit status, at `exit`",
            Metric::Matches => "matches of a pattern in a command's output, at `match.<name>`",
            Metric::DigestMismatch => {
                "1 where an output's hash is not the declared one, else 0, at `output.<path>`"
            }
        }
    }

    /// The values that the metric can take, smallest and largest.
    pub fn range(self) -> (f64, f64) {
        match self {
            Metric::Cosine | Metric::Pearson => (-1.0, 1.0),
            Metric::Slope | Metric::Intercept | Metric::ZMean | Metric::ZRow | Metric::ZColumn => {
                (f64::NEG_INFINITY, f64::INFINITY)
            }
            Metric::Top1Agreement | Metric::TopKAgreement => (0.0, 1.0),
            Metric::ExitStatus => (0.0, 255.0),
            Metric::DigestMismatch => (0.0, 1.0),
            _ => (0.0, f64::INFINITY),
        }
    }

    /// Whether the metric is one of a command's outcome, not of tensors.
    pub fn of_commands_only(self) -> bool {
        matches!(self, Metric::ExitStatus | Metric::Matches | Metric::DigestMismatch)
    }

    /// Whether the metric compares an arm with itself, alone and in a batch.
    pub fn of_batches_only(self) -> bool {
        matches!(self, Metric::BatchMismatches | Metric::BatchNmse | Metric::BatchRatio)
    }

    /// Whether the metric is held to a site's predicted deviations.
    pub fn reads_floor(self) -> bool {
        use Metric::{ZColumn, ZMax, ZMean, ZRms, ZRow};
        matches!(self, ZRms | ZMax | ZMean | ZRow | ZColumn)
    }

    /// Whether the metric is held to passes whose roundings are drawn anew.
    pub fn reads_drawn(self) -> bool {
        matches!(self, Metric::DriftRatio | Metric::UnexplainedFlips | Metric::BatchRatio)
    }

    /// Whether the metric only makes sense at the `logits`.
    pub fn of_logits_only(self) -> bool {
        matches!(
            self,
            Metric::Kl
                | Metric::KlRatio
                | Metric::DriftRatio
                | Metric::Top1Agreement
                | Metric::TopKAgreement
                | Metric::UnexplainedFlips
        )
    }
}

impl std::fmt::Display for Metric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Metrics with their values as JSON has them. JSON has no NaN and no infinity:
/// these are the texts `NaN`, `inf` and `-inf`. A `null`, which other writers
/// put in their place, is read as NaN, so that nothing of the kind gets lost.
pub mod json {
    use serde::de::{Error, MapAccess, Visitor};

    use super::{BTreeMap, Deserialize, Deserializer, Metric, Serialize, Serializer};

    /// One value.
    struct Value(f64);

    impl Serialize for Value {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            if self.0.is_finite() {
                serializer.serialize_f64(self.0)
            } else {
                serializer.collect_str(&self.0)
            }
        }
    }

    impl<'de> Deserialize<'de> for Value {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
            deserializer.deserialize_any(ValueVisitor).map(Value)
        }
    }

    struct ValueVisitor;

    impl Visitor<'_> for ValueVisitor {
        type Value = f64;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a number, `NaN`, `inf` or `-inf`")
        }

        fn visit_f64<E: Error>(self, value: f64) -> Result<f64, E> {
            Ok(value)
        }

        fn visit_u64<E: Error>(self, value: u64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_i64<E: Error>(self, value: i64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<f64, E> {
            match text {
                "NaN" => Ok(f64::NAN),
                "inf" => Ok(f64::INFINITY),
                "-inf" => Ok(f64::NEG_INFINITY),
                _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
            }
        }

        fn visit_unit<E: Error>(self) -> Result<f64, E> {
            Ok(f64::NAN)
        }
    }

    struct MetricsVisitor;

    impl<'de> Visitor<'de> for MetricsVisitor {
        type Value = BTreeMap<Metric, f64>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("metrics with their values")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut metrics = BTreeMap::new();
            while let Some((metric, Value(value))) = map.next_entry()? {
                metrics.insert(metric, value);
            }
            Ok(metrics)
        }
    }

    /// Writes a map of metrics.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(
        metrics: &BTreeMap<Metric, f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(metrics.iter().map(|(metric, &value)| (metric, Value(value))))
    }

    /// Reads a map of metrics.
    ///
    /// # Errors
    /// If a value is neither a number nor one of the texts.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<Metric, f64>, D::Error> {
        deserializer.deserialize_map(MetricsVisitor)
    }
}
