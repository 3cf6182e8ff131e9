//! The shortest way through a run in which nothing has changed.
//!
//! After a run that went well, everything that it looked at is written down with
//! its stamp, and beside it what came of it. The same command line finds that list,
//! asks the file system for the stamps, and if all are the same there is nothing to
//! read, parse, open or compute: the outcome is the same. One stamp that differs,
//! and the run goes the long way, which alone decides what is reused and why.
//!
//! ```text
//! cache/v1/unchanged/<command line, folder, program>.list   paths, stamps, variables
//!                                                   .json   the stages, as in run.json
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::run::SEPARATOR;
use crate::cache::{KeyWalk, Stamp, Store, seal_of, sealed, unsealed, write_whole};
use crate::compute::arms::Workshop;
use crate::executor::command;
use crate::executor::command::sealed_value;
use crate::manifest::Prompt;
use crate::op::{Arm, InputRef, Op, Recipe, Site, StageId};
use crate::plan::Plan;
use crate::record::{ArmRecord, ArmState, FamilyRecord, RunRecord, Series, StageRecord};
use crate::report::is_of_drift;
use crate::run::MadeByArm;
use crate::tensor_file;
use crate::text::Shown;
use crate::verdict::Verdict;

/// Above so many stages only those that did not pass are shown one by one.
pub(super) const SHOWN_ONE_BY_ONE: usize = 200;

/// What was found, when all of it was found unchanged.
pub(super) struct Unchanged {
    /// The plan's eight digits.
    pub plan: String,
    /// The folder of stages.
    pub folder: String,
    /// How many stages there are.
    pub count: usize,
    /// The stages with what a table shows of them; where there are many, those worth it.
    pub shown: Vec<StageRecord>,
    /// The families, of all stages.
    pub families: Vec<FamilyRecord>,
    /// What the run is one of.
    pub series: Option<Series>,
    /// All of them, as they stand in run.json between the brackets.
    pub json: String,
    /// The gravest verdict.
    pub verdict: Verdict,
}

/// The list, as it is kept.
#[derive(Serialize, Deserialize)]
struct List {
    plan: String,
    folder: String,
    count: usize,
    verdict: Verdict,
    variables: BTreeMap<String, Option<String>>,
    arms: Vec<ArmFacts>,
    /// The check at the end of the file with the stages.
    json: String,
    shown: Vec<StageRecord>,
    families: Vec<FamilyRecord>,
    series: Option<Series>,
    /// Files that must be there, whatever they are.
    present: Vec<PathBuf>,
    /// Paths with their stamps.
    looked_at: Vec<(PathBuf, [u64; 5])>,
}

/// What an arm depends on besides files.
#[derive(PartialEq, Serialize, Deserialize)]
struct ArmFacts {
    arm: Arm,
    recipe: Recipe,
    unavailable: Option<String>,
    facts: Vec<(String, String)>,
}

impl ArmFacts {
    fn now(arm: Arm, recipe: Recipe, workshop: &dyn Workshop) -> ArmFacts {
        let unavailable = workshop.unavailable(arm, &recipe);
        let facts = match unavailable {
            None => workshop.facts(arm, &recipe),
            Some(_) => Vec::new(),
        };
        ArmFacts { arm, recipe, unavailable, facts }
    }
}

/// The outcome of the last run of this command line, if nothing has changed since.
pub(super) fn find(store: &Store, workshop: &dyn Workshop) -> Option<Unchanged> {
    let place = place(store)?;
    let list = std::fs::read(place.with_extension("list")).ok()?;
    let Some(text) = unsealed(&list) else {
        tracing::warn!("`{}.list` is damaged and is not believed", place.shown());
        return None;
    };
    let list: List = serde_json::from_slice(text).ok()?;
    let same = |(path, stamp): &(PathBuf, [u64; 5])| {
        std::fs::symlink_metadata(path)
            .and_then(|facts| if facts.is_symlink() { std::fs::metadata(path) } else { Ok(facts) })
            .is_ok_and(|facts| Stamp::of(&facts).to_words() == *stamp)
    };
    let unchanged = list.variables.iter().all(|(name, value)| variable(name) == *value)
        && list.looked_at.par_iter().with_min_len(256).all(same)
        && list.present.iter().all(|path| path.is_file())
        && list.arms.iter().all(|arm| *arm == ArmFacts::now(arm.arm, arm.recipe, workshop));
    if !unchanged {
        return None;
    }
    let json = std::fs::read(place.with_extension("json")).ok()?;
    let seal = seal_of(&json);
    let Some(json) = unsealed(&json) else {
        tracing::warn!("`{}.json` is damaged and is not believed", place.shown());
        return None;
    };
    // Else another runner is between its two files.
    if seal != list.json {
        return None;
    }
    let json = String::from_utf8(json.to_vec()).ok()?;
    let List { plan, folder, count, verdict, shown, families, series, .. } = list;
    Some(Unchanged { plan, folder, count, shown, families, series, json, verdict })
}

/// Writes down what a run looked at, and its stages, of which `encoded` is the JSON, unless
/// something of it is too young to be known again or no longer makes the keys that are in
/// `made`, or the run did not go well.
pub(super) fn note(
    store: &Store,
    plan: &Plan<'_>,
    record: &RunRecord,
    encoded: &[String],
    made: &[BTreeMap<Arm, MadeByArm>],
    workshop: &dyn Workshop,
    started: i64,
) -> Option<()> {
    let well = |stage: &StageRecord| !matches!(stage.verdict, Verdict::Error | Verdict::Blocked);
    if record.interrupted || !record.stages.iter().all(well) {
        return None;
    }
    // An external program's files are not in this list.
    if plan.stages.iter().any(|prepared| prepared.stage.external.is_some()) {
        return None;
    }
    if record.stages.iter().any(|stage| may_be_back(stage, workshop)) {
        return None;
    }
    let place = place(store)?;
    let looked_at = everything_looked_at(plan, made, workshop, started)?;
    let mut present = Vec::new();
    for arm in record.stages.iter().flat_map(|stage| stage.arms.values()) {
        present.extend(arm.object.as_ref().map(|object| store.object_path(object)));
    }
    let count = record.stages.len();
    let worth = |s: &&StageRecord| count <= SHOWN_ONE_BY_ONE || s.verdict != Verdict::Pass;
    let (json, shown) = rayon::join(
        || {
            let stages = record.stages.iter().zip(encoded);
            let stages = stages.map(|(stage, text)| encoded_as_reused(stage, text, record));
            Some(sealed(stages.collect::<Option<Vec<_>>>()?.join(SEPARATOR).into_bytes()))
        },
        || record.stages.par_iter().filter(worth).map(|s| as_shown(s, record)).collect(),
    );
    let json = json?;
    let mut arms: Vec<ArmFacts> = Vec::new();
    for stage in plan.stages.iter().map(|prepared| prepared.stage) {
        for &arm in stage.arms.iter().filter(|arm| **arm != Arm::Command) {
            if !arms.iter().any(|known| known.arm == arm && known.recipe == stage.recipe) {
                arms.push(ArmFacts::now(arm, stage.recipe, workshop));
            }
        }
    }
    let list = List {
        plan: plan.id.clone(),
        folder: record.folder.clone(),
        count,
        verdict: record.verdict,
        variables: variables(plan),
        arms,
        json: seal_of(&json),
        shown,
        families: record.families.clone(),
        series: record.series.clone(),
        present,
        looked_at,
    };
    let list = sealed(serde_json::to_vec(&list).ok()?);
    // The stages first: a list without its stages would only cost a look.
    write_whole(&place.with_extension("json"), &json).ok()?;
    write_whole(&place.with_extension("list"), &list).ok()
}

/// Forgets what was written down for this command line.
pub(super) fn forget(store: &Store) {
    if let Some(place) = place(store) {
        // Not there is as good as removed.
        let _ = std::fs::remove_file(place.with_extension("list"));
    }
}

/// Whether an arm could not run although nothing says that it cannot: a device that
/// failed for a moment.
fn may_be_back(stage: &StageRecord, workshop: &dyn Workshop) -> bool {
    stage.arms.iter().any(|(arm, record)| {
        record.state == ArmState::Unmeasured && workshop.unavailable(*arm, &stage.recipe).is_none()
    })
}

/// The name of what is kept: who asks, where, with which program.
fn place(store: &Store) -> Option<PathBuf> {
    let program = std::fs::metadata("/proc/self/exe").ok()?;
    let mut walk = KeyWalk::new("unchanged");
    for argument in std::env::args_os() {
        walk.field("argument", argument.to_string_lossy());
    }
    walk.field("folder", std::env::current_dir().ok()?.display());
    // A list of another machine's says nothing of what this one would measure.
    walk.field("machine", crate::machine::name());
    walk.field("program", format!("{:?}", Stamp::of(&program).to_words()));
    Some(store.root().join("unchanged").join(&walk.key().0[..32]))
}

/// A stage's arms as they will be when nothing has to be computed.
fn as_reused(stage: &StageRecord, run: &RunRecord) -> BTreeMap<Arm, ArmRecord> {
    let mut arms = stage.arms.clone();
    for arm in arms.values_mut() {
        match arm.state {
            ArmState::Ran => {
                arm.state = ArmState::Reused;
                arm.why = format!("reused from {} ({})", run.started, run.id);
            }
            // What was put back or touched then is no news now.
            ArmState::Reused => {
                arm.why = arm.why.split("; ").next().unwrap_or_default().to_owned();
            }
            ArmState::Unmeasured | ArmState::Error | ArmState::Blocked => {}
        }
    }
    arms
}

/// The JSON of a stage as it will be when nothing of it has to be computed. Its time and
/// its arms are other ones; all the rest, which is nearly all, is taken over as text.
fn encoded_as_reused(stage: &StageRecord, text: &str, run: &RunRecord) -> Option<String> {
    let part = |seconds: f64, arms: &BTreeMap<Arm, ArmRecord>| {
        let [seconds, arms] = [serde_json::to_string(&seconds), serde_json::to_string(arms)];
        Some(format!("\"seconds\":{},\"arms\":{}", seconds.ok()?, arms.ok()?))
    };
    let (before, after) = text.split_once(&part(stage.seconds, &stage.arms)?)?;
    Some([before, &part(0.0, &as_reused(stage, run))?, after].concat())
}

/// What a table shows of a stage in which nothing has to be computed: little of its measures.
fn as_shown(stage: &StageRecord, run: &RunRecord) -> StageRecord {
    let mut stage = StageRecord { seconds: 0.0, arms: as_reused(stage, run), ..stage.clone() };
    // The sites of what fell say which of it stands first.
    let fallen: BTreeSet<Site> =
        stage.judgements.iter().filter_map(|judgement| judgement.site.clone()).collect();
    stage.measures.retain(|measure| is_of_drift(measure) || fallen.contains(&measure.site));
    for measure in &mut stage.measures {
        measure.z_histogram = None;
    }
    for arm in stage.arms.values_mut() {
        arm.sites = Vec::new();
    }
    StageRecord { accounts: Vec::new(), ..stage }
}

fn variables(plan: &Plan<'_>) -> BTreeMap<String, Option<String>> {
    let commands = plan.stages.iter().filter_map(|prepared| prepared.stage.op.command());
    let names = commands.flat_map(|op| op.env.iter().map(String::as_str).chain(["PATH"]));
    names.map(|name| (name.to_owned(), variable(name))).collect()
}

/// What stands for a variable's value: the list is no place for secrets.
fn variable(name: &str) -> Option<String> {
    sealed_value(name, &std::env::var(name).ok())
}

/// All paths that decided what the run did, or nothing if one of them changed while
/// it ran or so shortly before that it may have changed unseen. What the run read must
/// still make the keys that it had: a link, or a folder above it, may lead elsewhere now.
fn everything_looked_at(
    plan: &Plan<'_>,
    made: &[BTreeMap<Arm, MadeByArm>],
    workshop: &dyn Workshop,
    started: i64,
) -> Option<Vec<(PathBuf, [u64; 5])>> {
    // An engine may stand in a file of its own, and the plan no longer knows which: then the plan
    // decides anew, by what the file says.
    if plan.pipeline.stages.iter().any(|stage| stage.recipe.engine.is_some()) {
        return None;
    }
    let mut seen: BTreeMap<PathBuf, Stamp> = BTreeMap::new();
    let mut look = |path: &Path, known: &dyn Fn(&Stamp) -> bool| -> Option<()> {
        let path = std::path::absolute(path).ok()?;
        if seen.contains_key(&path) {
            return Some(());
        }
        let stamp = Stamp::of(&std::fs::metadata(&path).ok()?);
        (stamp.settled(started) || known(&stamp)).then_some(())?;
        seen.insert(path, stamp);
        Some(())
    };
    let young = |_: &Stamp| false;
    let manifests = &plan.pipeline.folder;
    look(manifests, &young)?;
    for stage in &plan.pipeline.stages {
        look(&stage.file, &young)?;
    }
    let defaults = manifests.join("pipeline.toml");
    if defaults.exists() {
        look(&defaults, &young)?;
    }
    for contract in plan.pipeline.contracts.values() {
        look(contract.file.parent()?, &young)?;
        look(&contract.file, &young)?;
    }
    // Outputs first: those that this run wrote are young, and known all the same.
    for op in plan.stages.iter().filter_map(|prepared| prepared.stage.op.command()) {
        for output in &op.outputs {
            let kept = |stamp: &Stamp| plan.stamps.is_kept(stamp);
            look(&plan.project.join(output), &kept)?;
        }
    }
    let mut by_stage: BTreeMap<&StageId, &BTreeMap<Arm, MadeByArm>> = BTreeMap::new();
    for (prepared, made) in plan.stages.iter().zip(made) {
        if let Op::Command(op) = &prepared.stage.op {
            let seen = command::look(op, &plan.project, plan.stamps).ok()?;
            let made = made.get(&Arm::Command)?;
            (made.key == plan.command_walk(op, &seen).key()).then_some(())?;
            // What is no result runs again, and an output that is another one is put back.
            let record = made.command.as_ref()?;
            let stand = record.accepted && command::is_in_place(record, &plan.project, plan.stamps);
            stand.then_some(())?;
            for path in seen.looked_at() {
                look(path, &young)?;
            }
            continue;
        }
        let site = |input: &InputRef| {
            let sites = &by_stage.get(&input.stage)?.get(&Arm::Reference)?.sites;
            let record = sites.iter().find(|record| record.site == input.site)?;
            Some(record.blake3.clone())
        };
        for (arm, made) in made {
            let sources = plan.sources(prepared, *arm, &site).ok()?;
            let walk = plan.arm_walk(prepared, *arm, &sources, workshop);
            (made.key == walk.key()).then_some(())?;
        }
        by_stage.insert(&prepared.stage.id, made);
        for file in prepared.stage.files() {
            look(file, &young)?;
            tensor_file::members(file).iter().try_for_each(|file| look(file, &young))?;
        }
        let Some(model) = &prepared.model else { continue };
        // A template may ask for the date, which no file holds.
        (!matches!(prepared.stage.prompt, Prompt::Chat { .. })).then_some(())?;
        model.written(true).is_none().then_some(())?;
        let folder = model.model.path();
        look(folder, &young)?;
        for file in model.model.files() {
            look(file, &young)?;
        }
        // The small files beside the weights: configuration and tokenizer.
        if folder.is_dir() {
            for entry in std::fs::read_dir(folder).ok()? {
                look(&entry.ok()?.path(), &young)?;
            }
        }
    }
    Some(seen.into_iter().map(|(path, stamp)| (path, stamp.to_words())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::{ComputeError, Pass};
    use crate::verdict::Outcome;

    struct Able(bool);

    impl Workshop for Able {
        fn name(&self, _: Arm) -> String {
            "a test".to_owned()
        }

        fn ops(&self, _: Arm, _: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
            Err(ComputeError::Unavailable("it computes nothing".to_owned()))
        }

        fn unavailable(&self, arm: Arm, _: &Recipe) -> Option<String> {
            (arm == Arm::Device && !self.0).then(|| "no device".to_owned())
        }
    }

    /// A run on an H200.
    fn run() -> RunRecord {
        let text = include_str!("../../runs/receipts/h200-qwen2-tiny-e4m3-fast.json");
        serde_json::from_str(text).expect("a receipt")
    }

    /// Its stage B.
    fn stage() -> StageRecord {
        run().stages.into_iter().find(|stage| stage.id.0 == "B").expect("stage B")
    }

    #[test]
    fn a_stage_that_is_reused_keeps_everything_but_its_time_and_its_arms() {
        let run = run();
        for stage in &run.stages {
            let text = serde_json::to_string(stage).expect("JSON");
            let reused = encoded_as_reused(stage, &text, &run).expect("a stage");
            let reused: StageRecord = serde_json::from_str(&reused).expect("JSON");
            let states = reused.arms.values().map(|arm| arm.state);
            assert!(states.into_iter().all(|state| state == ArmState::Reused), "{}", stage.id);
            let StageRecord { seconds, arms, .. } = stage.clone();
            assert_eq!(*stage, StageRecord { seconds, arms, ..reused });
        }
    }

    #[test]
    fn an_arm_that_failed_for_a_moment_is_asked_again_and_one_that_is_not_there_is_not() {
        let mut stage = stage();
        assert!(!may_be_back(&stage, &Able(true)));
        stage.arms.get_mut(&Arm::Device).expect("a device").state = ArmState::Unmeasured;
        assert!(may_be_back(&stage, &Able(true)));
        assert!(!may_be_back(&stage, &Able(false)));
    }

    #[test]
    fn what_is_shown_of_a_stage_names_the_same_fall_as_the_whole_of_it() {
        let mut stage = stage();
        let sites: Vec<Site> = ["blk.1.q", "blk.2.ffn_up"].map(|site| Site(site.to_owned())).into();
        for judgement in &mut stage.judgements {
            judgement.outcome = Outcome::Held;
        }
        // In the contract the later site stands first.
        for (judgement, site) in stage.judgements.iter_mut().zip(sites.iter().rev()) {
            judgement.outcome = Outcome::Falsified;
            judgement.if_fails = crate::manifest::IfFails::Structural;
            judgement.site = Some(site.clone());
        }
        let decisive = |stage: &StageRecord| stage.decisive().expect("a fall").site.clone();
        assert_eq!(decisive(&stage), Some(sites[0].clone()));
        assert_eq!(decisive(&as_shown(&stage, &run())), Some(sites[0].clone()));
    }
}
