//! What a stage lacks, or holds that is no number, in its reason: such things come before
//! every measure, which they make meaningless.
//!
//! It knows measures and what a file holds; bounds are not its concern.

use crate::compare::{Measure, StageMeasures};
use crate::compute::recorded;
use crate::metric::Metric;
use crate::op::{Arm, Op, Site, Stream};
use crate::plan::PreparedStage;
use crate::text::{grouped, number};
use crate::verdict::{Judgement, Outcome, StageVerdict, Verdict};

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
    let unjudged = held_to_nothing(&measures.measures);
    let unjudged = unjudged.or_else(|| no_product(&prepared.stage.op, &measures.measures));
    match (unjudged, judged.verdict) {
        (None, _) | (_, Verdict::Unmeasured) => {}
        // What was handed in and held to nothing is no ground for a pass.
        (Some(unjudged), Verdict::Pass) => {
            judged.verdict = Verdict::Unmeasured;
            judged.why = format!("{unjudged}; {}", judged.why);
        }
        (Some(unjudged), _) => judged.why = format!("{}; {unjudged}", judged.why),
    }
    if matches!(judged.verdict, Verdict::Pass | Verdict::Drift) {
        let left = judged_by_none(&judged.judgements, &measures.measures);
        judged.why += &left.map_or(String::new(), |left| format!("; {left}"));
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

/// `not judged: blk.0.q of recorded, [32, 256]: the shapes differ, ...`: sites of an arm under
/// test that could be measured against nothing at all.
fn held_to_nothing(measures: &[Measure]) -> Option<String> {
    let mut sites: Vec<(&Measure, bool)> = Vec::new();
    for measure in measures.iter().filter(|measure| is_under_test(measure)) {
        let empty = measure.metrics.is_empty();
        let same = |known: &&mut (&Measure, bool)| {
            (known.0.subject, &known.0.site) == (measure.subject, &measure.site)
        };
        match sites.iter_mut().find(same) {
            Some((_, nothing)) => *nothing &= empty,
            None => sites.push((measure, empty)),
        }
    }
    let nothing: Vec<&Measure> =
        sites.into_iter().filter(|(_, nothing)| *nothing).map(|(measure, _)| measure).collect();
    let [rows, width] = nothing.first()?.shape;
    let (first, more) = (nothing[0], nothing.len() - 1);
    let more = match more {
        0 => String::new(),
        1 => ", and 1 more site".to_owned(),
        more => format!(", and {} more sites", grouped(more)),
    };
    let why = first.unmeasured.as_deref().unwrap_or("nothing could be compared");
    let (subject, site) = (first.subject, &first.site);
    Some(format!("not judged: `{site}` of {subject}, [{rows}, {width}]: {why}{more}"))
}

/// `held to no claim of its own: `blk.*.ffn_norm``: sites of an arm under test that no claim
/// on what an op makes of its own input had a value for.
fn judged_by_none(judgements: &[Judgement], measures: &[Measure]) -> Option<String> {
    let is_local = |stream: Stream| matches!(stream, Stream::Anchored(_) | Stream::Predicted(_));
    let local: Vec<&Judgement> = judgements
        .iter()
        .filter(|j| is_local(j.compare[1]) && j.metric != Metric::NonFinite)
        .filter(|j| j.outcome != Outcome::Unmeasured)
        .collect();
    if local.is_empty() {
        return None;
    }
    let is_judged = |site: &Site| {
        let of_site = measures.iter().filter(|measure| measure.site == *site);
        of_site.into_iter().any(|measure| {
            local.iter().any(|j| j.judges(measure) && measure.metrics.contains_key(&j.metric))
        })
    };
    let mut left: Vec<&Site> = Vec::new();
    for measure in measures.iter().filter(|m| is_under_test(m) && is_local(m.judge)) {
        if !left.contains(&&measure.site) && !is_judged(&measure.site) {
            left.push(&measure.site);
        }
    }
    let named = recorded::by_layer(&left).into_iter().map(|(shown, _)| format!("`{shown}`"));
    let named: Vec<String> = named.collect();
    (!named.is_empty()).then(|| format!("held to no claim of its own: {}", named.join(", ")))
}

/// What a recording lacks of which nothing follows a product: a lookup and a norm say nothing of
/// a pass.
fn no_product(op: &Op, measures: &[Measure]) -> Option<String> {
    let Op::Forward { .. } = op else { return None };
    let before = ["embed", "blk.0.attn_norm"];
    let mut sites = measures.iter().filter(|measure| is_under_test(measure)).peekable();
    sites.peek()?;
    let nothing = sites.all(|measure| before.contains(&measure.site.0.as_str()));
    nothing.then(|| "not judged: no site that follows a product was recorded".to_owned())
}

fn is_under_test(measure: &Measure) -> bool {
    let Stream::Arm(subject) = measure.subject else { return false };
    matches!(subject, Arm::Device | Arm::Recorded | Arm::External)
}

/// `recorded holds 2 values that are NaN or infinite at `y`, ...`: the first site in the flow
/// where an arm under test has such values and its prediction has numbers.
fn not_finite(measures: &[Measure]) -> Option<String> {
    let strange =
        |text: &str| text.starts_with("NaN") || text.trim_start_matches('-').starts_with("inf");
    measures.iter().filter(|measure| is_under_test(measure)).find_map(|measure| {
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
