//! The run that later ones are held against, one for each kind of hardware.
//!
//! A change is told, not a state: a stage that fails since weeks is in the table
//! already. Values are deterministic for one hardware and software, so what moves
//! by more than a few per cent moved for a reason.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::op::{Arm, StageId};
use crate::record::{RunRecord, StageRecord};
use crate::text::Shown;
use crate::text::number;
use crate::verdict::{Judgement, Verdict};

/// A value may move by this share of itself before it is told.
const NOISE: f64 = 0.05;

/// The hardware of a run, in words: baselines of different ones are never compared.
pub fn hardware(run: &RunRecord) -> String {
    let gpus = run.stages.iter().filter_map(|stage| {
        let device = stage.arms.get(&Arm::Device)?;
        let arithmetic = device.arithmetic.as_ref()?;
        arithmetic.split(',').next().map(str::trim)
    });
    let gpu = gpus.min().unwrap_or("no device");
    let cpu = run.provenance.cpu.as_deref().unwrap_or("an unknown CPU");
    format!("{}; {cpu}; {gpu}", run.provenance.platform)
}

fn place(run: &RunRecord, runs: &Path) -> PathBuf {
    let name = blake3::hash(hardware(run).as_bytes()).to_hex();
    runs.join("baselines").join(format!("{}.json", &name.as_str()[..16]))
}

/// The baseline for a run's hardware.
///
/// # Errors
/// If it is there and cannot be read.
pub fn of(run: &RunRecord, runs: &Path) -> Result<Option<RunRecord>, String> {
    let path = place(run, runs);
    match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read the baseline `{}`: {error}", path.shown())),
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            format!(
                "the baseline `{}` is not of this version: {error}; set it anew with `runner \
                 baseline set RUN`",
                path.shown()
            )
        }),
    }
}

/// Makes a run the baseline of its hardware; gives that hardware in words.
///
/// # Errors
/// If it cannot be written.
pub fn set(run: &RunRecord, runs: &Path) -> Result<String, String> {
    let json = serde_json::to_vec_pretty(run)
        .map_err(|error| format!("the baseline cannot be encoded: {error}"))?;
    crate::cache::write_whole(&place(run, runs), &json).map_err(|error| error.to_string())?;
    Ok(hardware(run))
}

/// What is different in `now`, stage by stage, each in one line.
pub fn changes(baseline: &RunRecord, now: &RunRecord) -> Vec<String> {
    let of = |run: &RunRecord| -> BTreeMap<StageId, StageRecord> {
        run.stages.iter().map(|stage| (stage.id.clone(), stage.clone())).collect()
    };
    let (before, after) = (of(baseline), of(now));
    let mut changes = Vec::new();
    if baseline.provenance.runner != now.provenance.runner {
        changes.push(format!("runner {} -> {}", baseline.provenance.runner, now.provenance.runner));
    }
    for (id, stage) in &after {
        match before.get(id) {
            None => changes.push(format!("{id} is new: {}", stage.verdict)),
            Some(old) => of_stage(id, old, stage, &mut changes),
        }
    }
    let gone = before.keys().filter(|id| !after.contains_key(id));
    changes.extend(gone.map(|id| format!("{id} did not run")));
    changes
}

fn of_stage(id: &StageId, old: &StageRecord, new: &StageRecord, changes: &mut Vec<String>) {
    if old.verdict != new.verdict {
        let why =
            if new.verdict == Verdict::Pass { String::new() } else { format!(": {}", new.why) };
        changes.push(format!("{id} {} -> {}{why}", old.verdict, new.verdict));
    }
    for (arm, record) in &new.arms {
        let before = old.arms.get(arm).and_then(|old| old.arithmetic.as_ref());
        if let (Some(before), Some(after)) = (before, &record.arithmetic)
            && before != after
        {
            changes.push(format!("{id} {arm}: {before} -> {after}"));
        }
    }
    let known: BTreeMap<&str, &Judgement> =
        old.judgements.iter().map(|judgement| (judgement.falsifier.as_str(), judgement)).collect();
    for judgement in &new.judgements {
        let Some(before) = known.get(judgement.falsifier.as_str()) else { continue };
        let (Some(a), Some(b)) = (before.value, judgement.value) else { continue };
        let moved = (b - a).abs() > NOISE * a.abs().max(b.abs());
        if moved && judgement.used > before.used {
            let site = judgement.site.as_ref().map_or(String::new(), |site| format!(" at {site}"));
            changes.push(format!(
                "{id} {}{site}: {} grew {} -> {}",
                judgement.falsifier,
                judgement.metric,
                number(a),
                number(b)
            ));
        }
        if before.site != judgement.site
            && before.sites_falsified > 0
            && judgement.sites_falsified > 0
            && let (Some(from), Some(to)) = (&before.site, &judgement.site)
        {
            changes.push(format!("{id} {}: first site {from} -> {to}", judgement.falsifier));
        }
    }
}
