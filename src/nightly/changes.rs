//! What is different between two runs, each in one line: causes first.
//!
//! A change is told, not a state: a stage that fails since weeks is in the table already. Values
//! are deterministic for one hardware and software, so what moves by more than a few per cent
//! moved for a reason. Where that reason is known (another model, recipe, hardware), what follows
//! from it is counted and not listed.

use std::collections::BTreeMap;

use super::baseline::hardware;
use crate::manifest::problem::plural;
use crate::op::StageId;
use crate::record::{ArmRecord, RunRecord, StageRecord};
use crate::report::{Change, of_definition, of_environment, other_sites};
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
        let mut known = of_definition(old, stage);
        // Another GPU is told with the hardware.
        known.extend(of_environment(old, stage).into_iter().filter(|c| c.what != "device gpu"));
        let explained = moved || known.iter().any(|cause| cause.topic.decides_numbers());
        for Change { what, before, after, .. } in known {
            let cause = format!("{what}: {before} -> {after}");
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
        let values = plural(followed.iter().map(|(_, count)| count).sum(), "value");
        let stages: Vec<&str> = followed.iter().map(|(id, _)| id.0.as_str()).collect();
        let stages = stages.join(", ");
        *last += &format!("; {values} of {stages} moved with it (`runner diff` lists them)");
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

/// Where an arm's tensors are others.
fn other_bits(old: &ArmRecord, new: &ArmRecord) -> Option<String> {
    let others = other_sites(old, new);
    let first = &others.first()?.site;
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
