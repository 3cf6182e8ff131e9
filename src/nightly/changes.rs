//! What is different between two runs, each in one line: causes first.
//!
//! A change is told, not a state: a stage that fails since weeks is in the table already. Values
//! are deterministic for one hardware and software, so what moves by more than a few per cent
//! moved for a reason. Where that reason is known (another model, recipe, hardware), what follows
//! from it is counted and not listed.

use std::collections::BTreeMap;

use serde_json::json;

use super::baseline::hardware;
use crate::op::{Site, StageId};
use crate::record::{ArmRecord, RunRecord, StageRecord};
use crate::report::{Leaf, differing};
use crate::text::number;
use crate::verdict::{Judgement, Verdict};

/// A value may move by this share of itself before it is told.
const NOISE: f64 = 0.05;

/// What is different in `now`.
pub fn changes(before: &RunRecord, now: &RunRecord) -> Vec<String> {
    let (old, new) = (hardware(before), hardware(now));
    let moved = old != new;
    let mut lines = Vec::new();
    if before.provenance.runner != now.provenance.runner {
        lines.push(format!("runner {} -> {}", before.provenance.runner, now.provenance.runner));
    }
    if moved {
        lines.push(format!("hardware {old} -> {new}"));
    }
    let of = |run: &'_ RunRecord| -> BTreeMap<StageId, usize> {
        run.stages.iter().enumerate().map(|(at, stage)| (stage.id.clone(), at)).collect()
    };
    let (earlier, later) = (of(before), of(now));
    let mut causes: Vec<(String, Vec<&StageId>)> = Vec::new();
    let mut effects = Vec::new();
    let mut followed: Vec<(&StageId, usize)> = Vec::new();
    for (id, at) in &later {
        let stage = &now.stages[*at];
        let Some(old) = earlier.get(id).map(|at| &before.stages[*at]) else {
            effects.push(format!("{id} is new: {}", stage.verdict));
            continue;
        };
        let known = causes_of(old, stage);
        let explained = moved || !known.is_empty();
        for cause in known {
            match causes.iter_mut().find(|(earlier, _)| *earlier == cause) {
                Some((_, stages)) => stages.push(id),
                None => causes.push((cause, vec![id])),
            }
        }
        if old.verdict != stage.verdict {
            effects.push(turned(id, old, stage));
        }
        let mut moved = moved_in(id, old, stage);
        match explained {
            true if !moved.is_empty() => followed.push((id, moved.len())),
            true => {}
            false => effects.append(&mut moved),
        }
    }
    for (cause, stages) in causes {
        let stages: Vec<&str> = stages.iter().map(|id| id.0.as_str()).collect();
        lines.push(format!("{} {cause}", stages.join(", ")));
    }
    // On the line of the last cause: it is no change of its own.
    if let Some(last) = lines.last_mut().filter(|_| !followed.is_empty()) {
        let count: usize = followed.iter().map(|(_, count)| count).sum();
        let noun = if count == 1 { "value" } else { "values" };
        let stages: Vec<&str> = followed.iter().map(|(id, _)| id.0.as_str()).collect();
        let stages = stages.join(", ");
        *last += &format!("; {count} {noun} of {stages} moved with it (`runner diff` lists them)");
    }
    lines.append(&mut effects);
    // Who selects less today has lost nothing.
    let selected = |run: &RunRecord| run.series.as_ref().map(|series| series.selection.clone());
    if selected(before) == selected(now) || selected(before).is_none() {
        let gone = earlier.keys().filter(|id| !later.contains_key(id));
        lines.extend(gone.map(|id| format!("{id} did not run")));
    }
    lines
}

/// What of a stage's definition is another one.
fn causes_of(old: &StageRecord, new: &StageRecord) -> Vec<String> {
    let mut causes = Vec::new();
    let mut text = |what: &str, old: &str, new: &str| {
        if old != new {
            causes.push(format!("{what}: {old} -> {new}"));
        }
    };
    text("model", &old.model, &new.model);
    if old.tokens != new.tokens {
        text("prompt", &tokens(&old.tokens), &tokens(&new.tokens));
    }
    text("contract", &old.contract.join(" "), &new.contract.join(" "));
    let mut leaves = Vec::new();
    differing("recipe", &json!(old.recipe), &json!(new.recipe), &mut leaves);
    differing("op", &json!(old.op), &json!(new.op), &mut leaves);
    let words = |leaf: Leaf| format!("{}: {} -> {}", leaf.path, leaf.before, leaf.after);
    causes.extend(leaves.into_iter().map(words));
    causes
}

/// A prompt in words: nobody compares hundreds of numbers.
fn tokens(tokens: &[u32]) -> String {
    let first: Vec<String> = tokens.iter().take(4).map(u32::to_string).collect();
    match tokens.len() {
        0..=4 => format!("[{}]", first.join(", ")),
        count => format!("{count} tokens [{}, ...]", first.join(", ")),
    }
}

fn turned(id: &StageId, old: &StageRecord, new: &StageRecord) -> String {
    let why = if new.verdict == Verdict::Pass { String::new() } else { format!(": {}", new.why) };
    format!("{id} {} -> {}{why}", old.verdict, new.verdict)
}

/// What of a stage's arithmetic, tensors and values is another one.
fn moved_in(id: &StageId, old: &StageRecord, new: &StageRecord) -> Vec<String> {
    let mut moved = Vec::new();
    for (arm, record) in &new.arms {
        let Some(before) = old.arms.get(arm) else { continue };
        if let (Some(before), Some(after)) = (&before.arithmetic, &record.arithmetic)
            && before != after
        {
            moved.push(format!("{id} {arm}: {before} -> {after}"));
        }
        if let Some(bits) = other_bits(before, record) {
            moved.push(format!("{id} {arm}: {bits}"));
        }
    }
    let known: BTreeMap<&str, &Judgement> =
        old.judgements.iter().map(|judgement| (judgement.falsifier.as_str(), judgement)).collect();
    for judgement in &new.judgements {
        if let Some(before) = known.get(judgement.falsifier.as_str()) {
            moved.extend(grown(id, before, judgement));
        }
    }
    moved
}

/// Where an arm's tensors are others, although nothing that decides them is.
fn other_bits(old: &ArmRecord, new: &ArmRecord) -> Option<String> {
    let digests: BTreeMap<&Site, &String> =
        old.sites.iter().map(|record| (&record.site, &record.blake3)).collect();
    let other = |site: &Site, blake3: &String| digests.get(site).is_some_and(|old| *old != blake3);
    let others = new.sites.iter().filter(|record| other(&record.site, &record.blake3));
    let others: Vec<&Site> = others.map(|record| &record.site).collect();
    let first = others.first()?;
    let told = match (&old.machine, &new.machine) {
        _ if old.key.is_some() && old.key == new.key => {
            " of the same key: it is not deterministic, or the hardware fails".to_owned()
        }
        (Some(old), Some(new)) if old != new => format!(" than on {old}"),
        _ => String::new(),
    };
    Some(format!(
        "other bits at {} of {} sites, first {first}{told}",
        others.len(),
        new.sites.len()
    ))
}

fn grown(id: &StageId, before: &Judgement, now: &Judgement) -> Vec<String> {
    let mut lines = Vec::new();
    let (Some(a), Some(b)) = (before.value, now.value) else { return lines };
    let moved = (b - a).abs() > NOISE * a.abs().max(b.abs());
    if moved && now.used > before.used {
        let site = now.site.as_ref().map_or(String::new(), |site| format!(" at {site}"));
        let (falsifier, metric) = (&now.falsifier, now.metric);
        lines.push(format!("{id} {falsifier}{site}: {metric} grew {} -> {}", number(a), number(b)));
    }
    if before.site != now.site
        && before.sites_falsified > 0
        && now.sites_falsified > 0
        && let (Some(from), Some(to)) = (&before.site, &now.site)
    {
        lines.push(format!("{id} {}: first site {from} -> {to}", now.falsifier));
    }
    lines
}
