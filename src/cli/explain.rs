//! `runner explain`: how a stage came to its verdict, for a reader who was not there.

use std::fmt::Write;
use std::path::Path;

use super::{print, record_of};
use crate::compare::{Cost, Diagnosis, Growth, Part};
use crate::compute::arms::is_gemm;
use crate::manifest::problem::plural;
use crate::op::{Op, Stream};
use crate::record::{ArmState, StageRecord};
use crate::text::{duration, grouped, number, one_line, percent};
use crate::verdict::{Judgement, Outcome};

/// Layers that are printed of a growth; of more, some are left out.
const SHOWN_LAYERS: usize = 12;

pub(super) fn explain(stage: &str, run: &str, runs: &Path, cost: bool) -> Result<u8, String> {
    let (_, record) = record_of(run, runs)?;
    let id = &record.id;
    let found = record.stages.iter().find(|record| record.id.0 == stage).ok_or_else(|| {
        let known: Vec<&str> = record.stages.iter().map(|stage| stage.id.0.as_str()).collect();
        format!("run `{id}` has no stage `{stage}`; it has: {}", known.join(", "))
    })?;
    print(&if cost { costs(found, id) } else { reasoning(found, id) })
}

/// What a stage's verdict took, and which of it each claim reads.
fn costs(stage: &StageRecord, run: &str) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", one_line(&words));
    };
    line(format!("Stage {} of run {run}: {}", stage.id, stage.title));
    line(format!("{} from its first action to its verdict", duration(stage.seconds)));
    line(String::new());
    line("Arms, when they were computed".to_owned());
    let mut arms = 0.0;
    for (arm, record) in &stage.arms {
        let seconds = record.seconds.filter(|_| record.key.is_some());
        arms += seconds.unwrap_or(0.0);
        let state = match record.state {
            ArmState::Ran => "in this run",
            ArmState::Reused => "reused",
            _ => "no result",
        };
        let seconds = seconds.map_or("-".to_owned(), duration);
        line(format!("  {seconds:>9}  {arm}, {state}"));
    }
    line(format!("  {:>9}  together", duration(arms)));
    line(String::new());
    if stage.costs.is_empty() {
        line("Measures: none were made, or an earlier version made them".to_owned());
        return text;
    }
    line("Measures, when they were made".to_owned());
    let mut measures = 0.0;
    for cost in &stage.costs {
        measures += cost.seconds;
        line(format!("  {:>9}  {}", duration(cost.seconds), part_in_words(cost)));
    }
    let ratio = if arms > 0.0 {
        format!(", {} of what the arms took", percent(measures / arms))
    } else {
        String::new()
    };
    line(format!("  {:>9}  together{ratio}", duration(measures)));
    line(String::new());
    line("What each claim reads besides the tensors of its arms".to_owned());
    let whole_pass = matches!(stage.op, Op::Forward { .. });
    let mut unread = stage.costs.clone();
    unread.retain(|cost| cost.part != Part::Comparisons);
    for judgement in &stage.judgements {
        let reads = |cost: &&Cost| {
            cost.part.is_read(cost.subject, judgement.compare, judgement.metric, whole_pass)
        };
        unread.retain(|cost| !reads(&cost));
        // Comparisons are every claim's, and next to nothing.
        let parts = stage.costs.iter().filter(reads).filter(|cost| cost.part != Part::Comparisons);
        let parts: Vec<String> = parts
            .map(|cost| format!("{} ({})", part_in_words(cost), duration(cost.seconds)))
            .collect();
        let [subject, judge] = judgement.compare;
        let parts = if parts.is_empty() { "nothing".to_owned() } else { parts.join("; ") };
        line(format!(
            "  {} ({} of {subject} against {judge}): {parts}",
            judgement.falsifier, judgement.metric
        ));
    }
    for cost in unread {
        line(format!(
            "  no claim, but reports: {} ({})",
            part_in_words(&cost),
            duration(cost.seconds)
        ));
    }
    text
}

fn part_in_words(cost: &Cost) -> String {
    let whose = cost.subject.map_or(String::new(), |subject| format!("{subject}: "));
    format!("{whose}{}", cost.part.in_words())
}

/// The whole reasoning.
fn reasoning(stage: &StageRecord, run: &str) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", one_line(&words));
    };
    line(format!("Stage {} of run {run}: {}", stage.id, stage.title));
    line(format!("Verdict: {}. {}", stage.verdict, stage.why));
    line(String::new());
    line("What ran".to_owned());
    line(format!("  {}", what_ran(stage)));
    for (arm, record) in &stage.arms {
        let how = record.arithmetic.as_deref().unwrap_or("no result");
        let on = record.machine.as_ref().map_or(String::new(), |name| format!(", on {name}"));
        line(format!("  {arm}: {how}{on}; {}", record.why));
        if let Some(basis) = &record.basis {
            line(format!("    {}: {}", basis.evidence, basis.source));
        }
    }
    for diagnosis in &stage.diagnoses {
        line(String::new());
        diagnosed(diagnosis).into_iter().for_each(&mut line);
    }
    line(String::new());
    line(format!("Contract {} {}", stage.contract[0], stage.contract[1]));
    for judgement in &stage.judgements {
        judged(judgement).into_iter().for_each(&mut line);
    }
    if !stage.accounts.is_empty() {
        line(String::new());
        accounts(stage).into_iter().for_each(&mut line);
    }
    for growth in &stage.growth {
        line(String::new());
        grown(growth).into_iter().for_each(&mut line);
    }
    for greedy in &stage.greedy {
        line(String::new());
        line(greedy.sentence());
    }
    text
}

/// The op, with the model and the prompt where it has them.
fn what_ran(stage: &StageRecord) -> String {
    let mut words = stage.op.name().to_owned();
    if stage.op.reads_model() && !stage.model.is_empty() {
        words += &format!(" on {}", stage.model);
    }
    if !stage.tokens.is_empty() {
        words += &format!(", {}", plural(stage.tokens.len(), "token"));
    }
    words
}

fn diagnosed(diagnosis: &Diagnosis) -> Vec<String> {
    let held = match diagnosis.judge {
        judge if judge == diagnosis.subject => "its own repeats".to_owned(),
        Stream::Anchored(arm) => format!("the reference on {arm}'s own inputs"),
        Stream::Predicted(arm) => format!("the engine's kernels on {arm}'s own inputs"),
        judge => judge.to_string(),
    };
    let mut lines = vec![
        format!("Where it starts: {} held against {held}", diagnosis.subject),
        format!("  {} (op {}): {}", diagnosis.place(), diagnosis.op, diagnosis.evidence),
    ];
    lines.extend(diagnosis.aftermath().map(|aftermath| format!("  {aftermath}")));
    lines.push(format!("What it is: {}", diagnosis.sentence()));
    for fit in &diagnosis.fits {
        lines.push(format!(
            "  {:>8.3} %  {}: {}; {} of {} values differ in bits, {} numbers fitted",
            100.0 * fit.explained,
            fit.cause,
            fit.detail,
            grouped(fit.mismatches),
            grouped(fit.elements),
            fit.parameters
        ));
    }
    lines
}

fn judged(judgement: &Judgement) -> Vec<String> {
    let outcome = match judgement.outcome {
        Outcome::Held => "held",
        Outcome::Falsified => "FALSIFIED",
        Outcome::Unmeasured => "unmeasured",
    };
    let [subject, judge] = judgement.compare;
    let bounds = match judgement.bounds() {
        (Some(min), Some(max)) => format!("{} to {}", number(min), number(max)),
        (Some(min), None) => format!("at least {}", number(min)),
        (None, Some(max)) => format!("at most {}", number(max)),
        (None, None) => "unbounded".to_owned(),
    };
    let mut lines = vec![format!("  {} {outcome}: {}", judgement.falsifier, judgement.prediction)];
    let value = match (judgement.value, &judgement.site) {
        (Some(value), Some(site)) => format!("{} at {site}", number(value)),
        _ => judgement.reason.clone().unwrap_or_else(|| "no value".to_owned()),
    };
    lines.push(format!(
        "      {} of {subject} against {judge}: {value}; must be {bounds}{}",
        judgement.metric,
        judgement.widened_from()
    ));
    if judgement.outcome == Outcome::Falsified {
        lines.push(format!(
            "      {} of {} sites lie outside. Why this bound: {}",
            judgement.sites_falsified,
            judgement.sites_judged,
            judgement.why.trim()
        ));
    }
    lines
}

/// The GEMMs furthest from their floors, and the causes' shares of all.
fn accounts(stage: &StageRecord) -> Vec<String> {
    let mut lines = vec!["Errors beside their floors (rms, relative to the truth)".to_owned()];
    let mut gemms: Vec<_> = stage.accounts.iter().filter(|a| is_gemm(&a.site)).collect();
    let off = |observed: f64, floor: f64| (observed / floor).ln().abs();
    gemms.sort_by(|a, b| off(b.observed, b.floor).total_cmp(&off(a.observed, a.floor)));
    for account in gemms.iter().take(5) {
        lines.push(format!(
            "  {} {}: floor {}, observed {}, ratio {:.3}",
            account.subject,
            account.site,
            percent(account.floor),
            percent(account.observed),
            account.observed / account.floor
        ));
    }
    if gemms.len() > 5 {
        lines.push(format!("  and {} GEMMs nearer to their floors", gemms.len() - 5));
    }
    for (subject, shares) in &stage.shares {
        let named = shares.named().map(|(name, share)| format!("{name} {:.2} %", 100.0 * share));
        lines.push(format!("  {subject}, all GEMMs together: {}", named.join(", ")));
    }
    lines
}

fn grown(growth: &Growth) -> Vec<String> {
    let mut lines = vec![
        format!(
            "How {}'s drift grows (relative to the reference's residual stream)",
            growth.subject
        ),
        "   layer     local     floor  inherited      gain     total  predicted".to_owned(),
    ];
    let step = growth.layers.len().div_ceil(SHOWN_LAYERS).max(1);
    let last = growth.layers.len().saturating_sub(1);
    for (index, layer) in growth.layers.iter().enumerate() {
        if index % step == 0 || index == last {
            let gain = layer.gain.map_or("-".to_owned(), |gain| format!("{gain:.3}"));
            let floor = layer.floor.map_or("-".to_owned(), percent);
            lines.push(format!(
                "  {:>6} {:>9} {floor:>9} {:>10} {:>9} {:>9} {:>10}",
                layer.layer,
                percent(layer.local),
                percent(layer.inherited),
                gain,
                percent(layer.total),
                percent(layer.predicted)
            ));
        }
    }
    for law in growth.laws.iter().filter(|law| law.holds()) {
        lines.push(format!("  {}: {}, leaves {}", law.name, law.formula, percent(law.residual)));
    }
    lines
}
