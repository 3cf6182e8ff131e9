//! What a stage lacks, or holds that is no number, in its reason: such things come before
//! every measure, which they make meaningless.
//!
//! It knows measures and what a file holds; bounds are not its concern.

use crate::compare::{Measure, StageMeasures};
use crate::compute::recorded;
use crate::metric::Metric;
use crate::op::{Arm, Stream};
use crate::plan::PreparedStage;
use crate::text::{grouped, number};
use crate::verdict::{StageVerdict, Verdict};

/// Adds to a verdict's reason what is missing: first where nothing else is said of a bug.
/// Values that are no numbers where the prediction has numbers are a bug, whatever the contract
/// judges.
pub(super) fn say(
    judged: &mut StageVerdict,
    prepared: &PreparedStage<'_>,
    measures: &StageMeasures,
) {
    let absent = absent(prepared).map(|absent| match judged.verdict {
        // A site that is not there is no ground for an answer, and the reason where there is none.
        Verdict::Unmeasured => (absent, true),
        _ => (format!("not judged: {absent}"), false),
    });
    match absent {
        Some((absent, true)) => judged.why = format!("{absent}; {}", judged.why),
        Some((absent, false)) => judged.why = format!("{}; {absent}", judged.why),
        None => {}
    }
    if let Some(strange) = not_finite(&measures.measures) {
        judged.verdict = Verdict::Structural;
        judged.why = format!("{strange}; {}", judged.why);
    }
}

/// The sites for which the stage's recorded file holds no tensor.
fn absent(prepared: &PreparedStage<'_>) -> Option<String> {
    let stage = prepared.stage;
    let from = stage.recorded.as_ref().filter(|_| stage.arms.contains(&Arm::Recorded))?;
    let model = prepared.model.as_ref().map(|open| &open.model);
    // A file that cannot be read is the arm's error, and told there.
    recorded::absent(&stage.op, from, model).ok().flatten()
}

/// `recorded holds 2 values that are NaN or infinite at `y`, ...`: the first site in the flow
/// where an arm under test has such values and its prediction has numbers.
fn not_finite(measures: &[Measure]) -> Option<String> {
    let under_test = |measure: &Measure| {
        let Stream::Arm(subject) = measure.subject else { return false };
        matches!(subject, Arm::Device | Arm::Recorded | Arm::External)
    };
    let strange =
        |text: &str| text.starts_with("NaN") || text.trim_start_matches('-').starts_with("inf");
    measures.iter().filter(|measure| under_test(measure)).find_map(|measure| {
        let count = *measure.metrics.get(&Metric::NonFinite).filter(|count| **count > 0.0)?;
        let first = measure.worst.as_ref()?;
        // What the emulated arm predicts to overflow is the recipe's arithmetic.
        let predicted = measures.iter().any(|other| {
            let same = other.subject == measure.subject && other.site == measure.site;
            let emulated = other.judge == Stream::Arm(Arm::Emulated);
            same && emulated && other.worst.as_ref().is_some_and(|worst| strange(&worst.judge))
        });
        if predicted || !strange(&first.subject) || strange(&first.judge) {
            return None;
        }
        let [rows, width] = measure.shape;
        let plain = |text: &str| {
            let value = text.split(' ').next().unwrap_or_default();
            value.parse().ok().filter(|v: &f64| v.is_finite()).map_or(value.to_owned(), number)
        };
        Some(format!(
            "NaN or infinity: {} of {} values of {} at {}, first {} at row {}, column {}, where \
             {} has {}",
            grouped(count as usize),
            grouped(rows * width),
            measure.subject,
            measure.site,
            plain(&first.subject),
            first.row,
            first.column,
            measure.judge,
            plain(&first.judge)
        ))
    })
}
