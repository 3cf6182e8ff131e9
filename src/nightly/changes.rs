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
use crate::text::{number, one_line};
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
        for cause in known.into_iter().chain(judged_otherwise(old, stage)) {
            match causes.iter_mut().find(|(earlier, _)| *earlier == cause) {
                Some((_, stages)) => stages.push(id),
                None => causes.push((cause, vec![id])),
            }
        }
        effects.extend(turned(id, old, stage));
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
    // A run.json may hold anything, and a line of it may become a message's head.
    lines.iter().map(|line| one_line(line)).collect()
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
    let mut leaves = Vec::new();
    differing("recipe", &json!(old.recipe), &json!(new.recipe), &mut leaves);
    differing("op", &json!(old.op), &json!(new.op), &mut leaves);
    let words = |leaf: Leaf| format!("{}: {} -> {}", leaf.path, leaf.before, leaf.after);
    causes.extend(leaves.into_iter().map(words));
    causes
}

/// What of a stage's judging is another one: no value follows from it, but a verdict may.
fn judged_otherwise(old: &StageRecord, new: &StageRecord) -> Vec<String> {
    let mut found = Vec::new();
    let arms = |stage: &StageRecord| names(stage.arms.keys().map(|arm| arm.name()));
    let mut text = |what: &str, old: &str, new: &str| {
        if old != new {
            found.push(format!("{what}: {old} -> {new}"));
        }
    };
    text("arms", &arms(old), &arms(new));
    text("contract", &old.contract.join(" "), &new.contract.join(" "));
    // A contract may be changed without a new version.
    let claims = |stage: &StageRecord| names(stage.judgements.iter().map(|j| j.falsifier.as_str()));
    text("claims", &claims(old), &claims(new));
    for (now, before) in both(old, new) {
        let bounds = |j: &Judgement| {
            let edge = |edge: Option<f64>| edge.map_or("none".to_owned(), number);
            format!("{} to {}", edge(j.min), edge(j.max))
        };
        text(&format!("bound of {}", now.falsifier), &bounds(before), &bounds(now));
    }
    found
}

/// A prompt in words: nobody compares hundreds of numbers.
fn tokens(tokens: &[u32]) -> String {
    let first: Vec<String> = tokens.iter().take(4).map(u32::to_string).collect();
    match tokens.len() {
        0..=4 => format!("[{}]", first.join(", ")),
        count => format!("{count} tokens [{}, ...]", first.join(", ")),
    }
}

/// Names in a row.
fn names<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() { "none".to_owned() } else { names.join(" ") }
}

/// The falsifiers that both runs have, the later one first.
fn both<'r>(
    old: &'r StageRecord,
    new: &'r StageRecord,
) -> impl Iterator<Item = (&'r Judgement, &'r Judgement)> {
    let known: BTreeMap<&str, &Judgement> =
        old.judgements.iter().map(|judgement| (judgement.falsifier.as_str(), judgement)).collect();
    new.judgements.iter().filter_map(move |j| Some((j, *known.get(j.falsifier.as_str())?)))
}

/// What is told whatever the cause: another verdict, an arm that has or lacks a result now, and
/// other bits under the same key.
fn turned(id: &StageId, old: &StageRecord, new: &StageRecord) -> Vec<String> {
    let mut lines = Vec::new();
    if old.verdict != new.verdict {
        let why =
            if new.verdict == Verdict::Pass { String::new() } else { format!(": {}", new.why) };
        lines.push(format!("{id} {} -> {}{why}", old.verdict, new.verdict));
    }
    for (arm, record) in &new.arms {
        let Some(before) = old.arms.get(arm) else { continue };
        match (before.key.is_some(), record.key.is_some()) {
            (true, false) => lines.push(format!("{id} {arm} has no result: {}", record.why)),
            (false, true) => lines.push(format!("{id} {arm} has a result again")),
            _ => {}
        }
        if before.key.is_some()
            && before.key == record.key
            && let Some(bits) = other_bits(before, record)
        {
            lines.push(format!(
                "{id} {arm}: {bits} of the same key: it is not deterministic, or the hardware fails"
            ));
        }
    }
    lines
}

/// What of a stage's arithmetic, tensors, outcomes and values is another one.
fn moved_in(id: &StageId, old: &StageRecord, new: &StageRecord) -> Vec<String> {
    let mut moved = Vec::new();
    for (arm, record) in &new.arms {
        let Some(before) = old.arms.get(arm) else { continue };
        if let (Some(before), Some(after)) = (&before.arithmetic, &record.arithmetic)
            && before != after
        {
            moved.push(format!("{id} {arm}: {before} -> {after}"));
        }
        if before.key != record.key
            && let Some(bits) = other_bits(before, record)
        {
            let than = match (&before.machine, &record.machine) {
                (Some(old), Some(new)) if old != new => format!(" than on {old}"),
                _ => String::new(),
            };
            moved.push(format!("{id} {arm}: {bits}{than}"));
        }
    }
    for (now, before) in both(old, new) {
        // With the verdict a fall is told already, with its reason.
        if now.outcome != before.outcome && old.verdict == new.verdict {
            let word = |j: &Judgement| format!("{:?}", j.outcome).to_lowercase();
            moved.push(format!("{id} {}: {} -> {}", now.falsifier, word(before), word(now)));
        }
        moved.extend(grown(id, before, now));
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
    Some(format!("other bits at {} of {} sites, first {first}", others.len(), new.sites.len()))
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
