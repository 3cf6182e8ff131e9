//! The runs of many machines, read into what a fleet's report needs of them.
//!
//! A run.json may be a stranger's, and large: only what is needed is kept, what many runs have in
//! common is kept once, and every name is made fit to be printed. A file that cannot be read is
//! named and left out.

use std::collections::{BTreeMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use super::{Night, Shift};
use crate::compute::GemmRecord;
use crate::files;
use crate::metric::Metric;
use crate::nightly::retention::is_run;
use crate::op::{Arm, Site, StageId};
use crate::plan::SiteRecord;
use crate::record::{ArmState, LARGEST_RUN, Provenance, RunRecord, SCHEMA, Series};
use crate::report::{CODE, IDENTITIES};
use crate::text::{Shown, one_line, shown};
use crate::verdict::{First, Verdict};

/// Facts by their names.
pub type Facts = BTreeMap<String, String>;

/// What an arm made: a digest for each site.
pub type Digests = Vec<(Site, String)>;

/// One run of one machine.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its name.
    pub id: String,
    /// The machine that started it.
    pub machine: Arc<str>,
    /// When it was started, in seconds since 1970.
    pub started: i64,
    /// The night that it is of.
    pub night: Night,
    /// The runner's version.
    pub runner: Arc<str>,
    /// Its stages.
    pub stages: Vec<Stage>,
}

/// One stage of one run.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Its folder of stages, and its name.
    pub name: (Arc<str>, Arc<str>),
    /// The machine whose answer it is: the one that computed what belongs to a machine, else the one
    /// that started the run.
    pub host: Arc<str>,
    /// What was asked: op, model, prompt and recipe.
    pub question: Arc<str>,
    /// The answer.
    pub verdict: Verdict,
    /// The reason, of what is no pass.
    pub why: Option<Arc<str>>,
    /// Where it starts, of what is falsified.
    pub first: Option<Arc<str>>,
    /// What may be the cause of anything: versions, hardware, recipe, algorithms.
    pub facts: Arc<Facts>,
    /// The GPUs that its device arm used.
    pub gpu: Option<Arc<str>>,
    /// Which cards they were.
    pub card: Option<Arc<str>>,
    /// What its arms made here.
    pub arms: Vec<Made>,
    /// For each of its arms why it has no result; nothing where it has one.
    pub without: BTreeMap<Arm, Option<Arc<str>>>,
    /// The values of its claims.
    pub values: Vec<Claim>,
}

/// What an arm made on a machine.
#[derive(Clone, Debug)]
pub struct Made {
    /// The arm.
    pub arm: Arm,
    /// Among whom equal bits are expected: those with the same question, and for what a chip
    /// decides the same chip.
    pub peers: Arc<str>,
    /// Its action's key.
    pub key: Arc<str>,
    /// The digests of its sites.
    pub digests: Arc<Digests>,
}

/// The value of a claim.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The falsifier.
    pub falsifier: Arc<str>,
    /// What was measured.
    pub metric: Metric,
    /// Its value at the site nearest to a bound.
    pub value: f64,
    /// The share of its bound that it uses.
    pub used: f64,
}

/// A file that was left out.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// Its path, or its run's.
    pub file: String,
    /// Why.
    pub why: String,
}

/// What was read.
#[derive(Clone, Debug, Default)]
pub struct Gathered {
    /// The runs, the oldest first.
    pub runs: Vec<Run>,
    /// What was left out, and why.
    pub left_out: Vec<LeftOut>,
    /// How many files were passed over because they are older than the window, or were read twice.
    pub passed_over: usize,
}

/// What is read, and until when.
#[derive(Clone, Debug)]
pub struct Window {
    /// The moment of the report, in seconds since 1970.
    pub at: i64,
    /// How many nights before it.
    pub nights: u32,
    /// When a day begins.
    pub shift: Shift,
    /// Machines that are left out.
    pub without: Vec<String>,
}

/// Deeper folders are not looked into.
const DEEPEST: usize = 12;

/// Files of runs, and folders that cannot be read.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The files.
    pub files: Vec<PathBuf>,
    /// The folders, and why.
    pub left_out: Vec<LeftOut>,
}

/// The run.json files of some places: a file, a run's folder, or a folder with such folders
/// anywhere below it. Links are not followed, nor is a cache looked into.
///
/// # Errors
/// If a place is not there, or holds no run.
pub fn find(places: &[PathBuf]) -> Result<Found, String> {
    let mut found = Found::default();
    for place in places {
        let before = found.files.len();
        let facts = std::fs::metadata(place).map_err(|error| {
            format!(
                "cannot read `{}`: {error}; give a folder of runs, or a run.json",
                place.shown()
            )
        })?;
        match facts.is_dir() {
            false => found.files.push(place.clone()),
            true => found.add_below(place, DEEPEST),
        }
        if found.files.len() == before {
            let why = found.left_out.first().map(|left_out| format!("; {}", left_out.why));
            return Err(format!(
                "`{}` holds no run: no run.json lies in it or in a folder below{}",
                place.shown(),
                why.unwrap_or_default()
            ));
        }
    }
    Ok(found)
}

impl Found {
    fn add_below(&mut self, folder: &Path, deepest: usize) {
        let own = folder.join("run.json");
        // A run's folder holds no other run.
        if own.symlink_metadata().is_ok_and(|facts| facts.is_file()) {
            return self.files.push(own);
        }
        let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) => {
                let file = folder.shown().to_string();
                let why = format!("`{file}` cannot be read: {error}");
                return self.left_out.push(LeftOut { file, why });
            }
        };
        let is_place = |entry: &std::fs::DirEntry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            is_folder && !name.starts_with('.') && name != "cache"
        };
        let folders = entries.iter().filter(|entry| is_place(entry));
        let mut folders: Vec<PathBuf> = folders.map(std::fs::DirEntry::path).collect();
        folders.sort();
        for folder in folders {
            match deepest {
                0 => {
                    let file = folder.shown().to_string();
                    let why = format!("`{file}` lies deeper than {DEEPEST} folders");
                    self.left_out.push(LeftOut { file, why });
                }
                _ => self.add_below(&folder, deepest - 1),
            }
        }
    }
}

/// Reads the files, several at a time.
pub fn gather(found: &Found, window: &Window) -> Gathered {
    let oldest = window.oldest();
    let kept = Mutex::new(Kept::default());
    let read = |path: &PathBuf| {
        // A run's name tells its day, so that an old one need not be read.
        if named_night(path).is_some_and(|night| night.0 + 1 < oldest.0) {
            return Ok(None);
        }
        read_one(path, window, &kept)
            .map_err(|why| LeftOut { file: path.shown().to_string(), why: one_line(&why) })
    };
    let all: Vec<Result<Option<Run>, LeftOut>> = found.files.par_iter().map(read).collect();
    let left_out = found.left_out.clone();
    let mut gathered = Gathered { left_out, ..Gathered::default() };
    for result in all {
        match result {
            Ok(Some(run)) => gathered.runs.push(run),
            Ok(None) => gathered.passed_over += 1,
            Err(left_out) => gathered.left_out.push(left_out),
        }
    }
    gathered
        .runs
        .sort_by(|a, b| (a.started, &a.id, &a.machine).cmp(&(b.started, &b.id, &b.machine)));
    let before = gathered.runs.len();
    gathered.runs.dedup_by(|a, b| (a.started, &a.id, &a.machine) == (b.started, &b.id, &b.machine));
    gathered.passed_over += before - gathered.runs.len();
    gathered
}

impl Window {
    /// The first night that counts.
    pub fn oldest(&self) -> Night {
        let last = self.shift.night(self.at);
        Night(last.0 - i64::from(self.nights) + 1)
    }
}

impl Window {
    /// Whether a run of this name may be one of these nights; of what is named otherwise, no.
    pub fn may_hold(&self, run: &str) -> bool {
        night_in(run).is_some_and(|night| night.0 + 1 >= self.oldest().0)
    }
}

/// The day in the name of a run's folder.
fn named_night(path: &Path) -> Option<Night> {
    night_in(path.parent()?.file_name()?.to_str()?)
}

/// The day in the name of a run.
fn night_in(name: &str) -> Option<Night> {
    let day = is_run(name).then(|| name.get(..8))??;
    let date = format!("{}-{}-{}", &day[..4], &day[4..6], &day[6..8]);
    Night::of_date(&date)
}

/// The part of run.json that is read; the rest is passed over.
#[derive(Deserialize)]
struct Lean {
    schema: u32,
    id: String,
    interrupted: bool,
    started: String,
    folder: String,
    provenance: Provenance,
    #[serde(default)]
    series: Option<Series>,
    stages: Vec<LeanStage>,
}

#[derive(Deserialize)]
struct LeanStage {
    id: StageId,
    op: Value,
    model: String,
    tokens: Vec<u32>,
    recipe: Value,
    contract: [String; 2],
    verdict: Verdict,
    why: String,
    #[serde(default)]
    first: Option<First>,
    arms: BTreeMap<Arm, LeanArm>,
    judgements: Vec<LeanJudgement>,
}

#[derive(Deserialize)]
struct LeanArm {
    state: ArmState,
    why: String,
    arithmetic: Option<String>,
    #[serde(default)]
    gemms: Vec<GemmRecord>,
    key: Option<String>,
    #[serde(default)]
    machine: Option<String>,
    #[serde(default)]
    gpu: Option<String>,
    #[serde(default)]
    facts: BTreeMap<String, String>,
    sites: Vec<SiteRecord>,
}

#[derive(Deserialize)]
struct LeanJudgement {
    falsifier: String,
    metric: Metric,
    value: Option<f64>,
    used: Option<f64>,
}

/// A run may start so many seconds after the report and be believed.
const AHEAD: i64 = 24 * 3600;

/// Nothing where the run is older than the window, or its machine is left out.
fn read_one(path: &Path, window: &Window, kept: &Mutex<Kept>) -> Result<Option<Run>, String> {
    let text = files::read_text(path, LARGEST_RUN)
        .map_err(|error| format!("`{}` cannot be read: {error}", path.shown()))?;
    let lean: Lean = match serde_json::from_str(&text) {
        Ok(lean @ Lean { schema: SCHEMA, .. }) => lean,
        // What reads whole runs has the words for what is wrong with this one.
        _ => {
            return Err(match RunRecord::read_file(path) {
                Err(problem) => problem.to_string(),
                Ok(_) => format!("`{}` was written while it was read", path.shown()),
            });
        }
    };
    let named = |what: &str| format!("`{}`: {what}", path.shown());
    if lean.interrupted {
        return Err(named("the run was stopped"));
    }
    let machine = lean.provenance.machine.as_deref().map(str::trim).filter(|name| !name.is_empty());
    let machine = shown(machine.ok_or_else(|| {
        named("the run does not name its machine: an earlier runner made it; run the stages again")
    })?);
    let started = lean.started.parse::<Timestamp>().map_err(|_| {
        named(&format!("`{}` is no time at which a run started", shown(&lean.started)))
    })?;
    let started = started.as_second();
    if started > window.at + AHEAD {
        return Err(named(&format!(
            "the run says that it started on {}, after this report: is the clock of {machine} \
             right?",
            shown(&lean.started)
        )));
    }
    let night = window.shift.night(started);
    if night < window.oldest() || window.without.contains(&machine) {
        return Ok(None);
    }
    let folder = lean.series.as_ref().map_or(&lean.folder, |series| &series.folder);
    let folder = shown(folder);
    let head = Head { machine: &machine, provenance: &lean.provenance, folder: &folder };
    let stages: Vec<Reduced> = lean.stages.into_iter().map(|stage| head.reduced(stage)).collect();
    let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(Some(Run {
        id: shown(&lean.id),
        machine: kept.text(&machine),
        started,
        night,
        runner: kept.text(&shown(&lean.provenance.runner)),
        stages: stages.into_iter().map(|stage| kept.stage(stage)).collect(),
    }))
}

/// What the stages of a run have in common.
struct Head<'a> {
    machine: &'a str,
    provenance: &'a Provenance,
    folder: &'a str,
}

/// A stage before what it has in common with others is kept once.
struct Reduced {
    name: [String; 2],
    host: String,
    question: String,
    verdict: Verdict,
    why: Option<String>,
    first: Option<String>,
    facts: Facts,
    gpu: Option<String>,
    card: Option<String>,
    arms: Vec<(Arm, String, String, Digests)>,
    without: BTreeMap<Arm, Option<String>>,
    values: Vec<(String, Metric, f64, f64)>,
}

/// Sixteen digits that stand for a text.
fn digits(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..16].to_owned()
}

/// The arms whose result belongs to a machine.
const OF_A_MACHINE: [Arm; 3] = [Arm::Device, Arm::External, Arm::Command];

/// So many shapes of products are told apart.
const MOST_SHAPES: usize = 64;
/// So many facts of an arm are taken: a record has about ten.
const MOST_FACTS: usize = 64;

impl Head<'_> {
    fn reduced(&self, stage: LeanStage) -> Reduced {
        let tokens = serde_json::json!(stage.tokens).to_string();
        let asked = serde_json::json!([stage.op, stage.model, tokens, stage.recipe]);
        let question = digits(&asked.to_string());
        let elsewhere = OF_A_MACHINE.iter().find_map(|arm| {
            let arm = stage.arms.get(arm).filter(|arm| arm.state == ArmState::Ran)?;
            arm.machine.as_deref().filter(|machine| !machine.trim().is_empty())
        });
        let host = elsewhere.map_or(self.machine.to_owned(), shown);
        let mut facts = self.facts(&stage, &tokens);
        facts.retain(|_, value| !value.is_empty());
        let device = stage.arms.get(&Arm::Device);
        let gpu = device.and_then(gpu_of).map(shown);
        let card = device.and_then(|arm| arm.facts.get("which gpu")).map(|card| shown(card));
        let made = |(arm, record): (&Arm, &LeanArm)| {
            // What another machine computed says nothing of this one.
            let here = record.machine.as_deref().is_some_and(|machine| shown(machine) == host);
            if !here || record.sites.is_empty() {
                return None;
            }
            let digest = |site: &SiteRecord| (Site(shown(&site.site.0)), shown(&site.blake3));
            let digests: Digests = record.sites.iter().map(digest).collect();
            let chip = match arm {
                Arm::Device | Arm::External => gpu_of(record).or(gpu.as_deref()),
                Arm::Emulated => {
                    record.facts.get("chip").or(record.arithmetic.as_ref()).map(|a| &**a)
                }
                _ => None,
            };
            let peers = digits(&format!("{question} {arm} {}", chip.unwrap_or_default()));
            Some((*arm, peers, record.key.clone().unwrap_or_default(), digests))
        };
        let arms = stage.arms.iter().filter_map(made).collect();
        let why = |record: &LeanArm| record.key.is_none().then(|| shown(&record.why));
        let without = stage.arms.iter().map(|(arm, record)| (*arm, why(record))).collect();
        let falsified = stage.verdict != Verdict::Pass;
        let first = stage.first.as_ref().filter(|_| falsified).map(|first| match &first.cause {
            Some(cause) => format!("{} of {}: {cause}", first.site, first.arm),
            None => format!("{} of {}", first.site, first.arm),
        });
        let value = |j: &LeanJudgement| {
            let value = j.value.filter(|value| value.is_finite())?;
            let used = j.used.filter(|used| used.is_finite())?;
            Some((shown(&j.falsifier), j.metric, value, used))
        };
        Reduced {
            name: [self.folder.to_owned(), shown(&stage.id.0)],
            host,
            question,
            verdict: stage.verdict,
            why: falsified.then(|| shown_long(&stage.why)),
            first: first.map(|first| shown(&first)),
            facts,
            gpu,
            card,
            arms,
            without,
            values: stage.judgements.iter().filter_map(value).collect(),
        }
    }

    /// What may be the cause of a difference, by name. The names begin as [`super::causes`] ranks
    /// them.
    fn facts(&self, stage: &LeanStage, tokens: &str) -> Facts {
        let mut facts = Facts::new();
        let mut put = |name: &str, value: &str| {
            facts.insert(shown(name), shown(value));
        };
        put("model", &stage.model);
        put("prompt", &digits(tokens)[..8]);
        put("contract", &stage.contract.join(" "));
        put("op", &stage.op.to_string());
        let mut leaves = Vec::new();
        flatten("recipe", &stage.recipe, &mut leaves);
        for (name, value) in &leaves {
            put(name, value);
        }
        put("runner", &self.provenance.runner);
        put("platform", &self.provenance.platform);
        put("CPU", self.provenance.cpu.as_deref().unwrap_or("unknown"));
        put("threads", &self.provenance.threads.to_string());
        for (arm, record) in &stage.arms {
            let has_result = record.key.is_some();
            let state = if has_result { "has a result" } else { record.why.as_str() };
            put(&format!("{arm} arm"), state);
            if *arm == Arm::Reference && has_result {
                // The key of what a CPU must compute holds all that it is computed from.
                put("inputs", record.key.as_deref().and_then(|key| key.get(..12)).unwrap_or(""));
            }
            let numbers = record.arithmetic.as_deref().and_then(|words| words.split(';').next());
            put(&format!("{arm} arithmetic"), numbers.unwrap_or_default());
            if *arm == Arm::Device {
                put("gpu", gpu_of(record).unwrap_or_default());
                put("cuBLASLt", library_of(record).unwrap_or_default());
            }
            for (name, value) in record.facts.iter().take(MOST_FACTS) {
                match name.as_str() {
                    name if IDENTITIES.contains(&name) => {}
                    CODE => put("the runner's own arithmetic", value.get(..12).unwrap_or(value)),
                    "chip" => put(&format!("{arm} chip"), value),
                    name => put(name, value),
                }
            }
            for gemm in record.gemms.iter().take(MOST_SHAPES) {
                let [tokens, outputs, inner] = gemm.shape;
                let shape = format!("{tokens}x{outputs}x{inner}");
                put(&format!("algorithm of {shape}"), &gemm.algorithm);
                let mut words = gemm.algorithm.split_whitespace();
                if words.any(|word| word == "split-K") {
                    put(&format!("split-K of {shape}"), words.next().unwrap_or_default());
                }
            }
        }
        facts
    }
}

/// A reason as it may be printed: longer than a name may be.
fn shown_long(text: &str) -> String {
    const LONGEST: usize = 400;
    let line = one_line(text);
    match line.chars().count() {
        0..=LONGEST => line,
        _ => line.chars().take(LONGEST).chain(['\u{2026}']).collect(),
    }
}

/// The GPU's model; earlier runners have it in the arithmetic alone, after a semicolon.
fn gpu_of(device: &LeanArm) -> Option<&str> {
    device.gpu.as_deref().or_else(|| {
        let (_, card) = device.arithmetic.as_ref()?.split_once(';')?;
        card.split(',').next().map(str::trim)
    })
}

/// The version of cuBLASLt, as the arithmetic has it.
fn library_of(device: &LeanArm) -> Option<&str> {
    let (_, version) = device.arithmetic.as_ref()?.split_once("cuBLASLt ")?;
    version.split([',', ' ']).next()
}

/// Every leaf of a value, by its path.
fn flatten(path: &str, value: &Value, leaves: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                flatten(&format!("{path}.{name}"), value, leaves);
            }
        }
        Value::String(text) => leaves.push((path.to_owned(), text.clone())),
        value => leaves.push((path.to_owned(), value.to_string())),
    }
}

/// What several runs have in common, kept once.
#[derive(Default)]
struct Kept {
    texts: HashSet<Arc<str>>,
    facts: HashSet<Arc<Facts>>,
    digests: HashSet<Arc<Digests>>,
}

/// The one that is equal, or this one from now on.
fn once<T: Eq + Hash>(known: &mut HashSet<Arc<T>>, value: T) -> Arc<T> {
    if let Some(known) = known.get(&value) {
        return known.clone();
    }
    let value = Arc::new(value);
    known.insert(value.clone());
    value
}

impl Kept {
    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        let text: Arc<str> = text.into();
        self.texts.insert(text.clone());
        text
    }

    fn stage(&mut self, stage: Reduced) -> Stage {
        let [folder, id] = &stage.name;
        let arms = stage.arms.into_iter().map(|(arm, peers, key, digests)| Made {
            arm,
            peers: self.text(&peers),
            key: self.text(&key),
            digests: once(&mut self.digests, digests),
        });
        let arms = arms.collect();
        let without = stage.without.into_iter();
        let without = without.map(|(arm, why)| (arm, why.map(|why| self.text(&why)))).collect();
        let values = stage.values.into_iter().map(|(falsifier, metric, value, used)| Claim {
            falsifier: self.text(&falsifier),
            metric,
            value,
            used,
        });
        let values = values.collect();
        Stage {
            name: (self.text(folder), self.text(id)),
            host: self.text(&stage.host),
            question: self.text(&stage.question),
            verdict: stage.verdict,
            why: stage.why.map(|why| self.text(&why)),
            first: stage.first.map(|first| self.text(&first)),
            facts: once(&mut self.facts, stage.facts),
            gpu: stage.gpu.map(|gpu| self.text(&gpu)),
            card: stage.card.map(|card| self.text(&card)),
            arms,
            without,
            values,
        }
    }
}
