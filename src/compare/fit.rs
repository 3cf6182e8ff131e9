//! Whether an engine's difference from the reference is what its known arithmetic
//! must cost, in words.
//!
//! It reads measures; it judges nothing by itself: a contract does.

use super::Measure;
use crate::metric::Metric;
use crate::op::{Arm, Stream};
use crate::text::number;

/// Observed over predicted error within which the sizes agree.
const SAME_SIZE: std::ops::RangeInclusive<f64> = 0.5..=2.0;

/// One sentence on `external` at the logits; `what` is the arithmetic. `None`
/// where a measure is missing.
pub fn in_words(measures: &[Measure], what: &str) -> Option<String> {
    let arm = Stream::Arm;
    let nmse = |subject: Arm, judge: Arm| {
        let pair = |m: &&Measure| {
            m.subject == arm(subject) && m.judge == arm(judge) && m.site.0 == "logits"
        };
        measures.iter().find(pair)?.metrics.get(&Metric::Nmse).copied()
    };
    let predicted = nmse(Arm::Emulated, Arm::Reference)?;
    let observed = nmse(Arm::External, Arm::Reference)?;
    let left = nmse(Arm::External, Arm::Emulated)?;
    let fits = predicted > 0.0 && SAME_SIZE.contains(&(observed / predicted)) && left < observed;
    let answer = if fits { "the difference fits" } else { "the difference does not fit" };
    Some(format!(
        "{what}: that must cost an NMSE of {} at the logits, {} is seen, and {} is left \
         when each value's own rounding is taken into account: {answer}",
        number(predicted),
        number(observed),
        number(left)
    ))
}
