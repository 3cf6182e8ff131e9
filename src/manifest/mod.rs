//! From TOML to checked stages and contracts, all problems of a folder at once.
//!
//! Each file is read twice: as written (`Raw*`, with the place of every value)
//! and as used (the public types here, which hold only what makes sense). It
//! opens no model and computes nothing: layer numbers, shapes and tokens are
//! checked against the model where it is loaded.

mod check;
mod command;
mod contract;
pub(crate) mod cycle;
mod executor;
mod external;
mod family;
mod fields;
mod inputs;
pub(crate) mod names;
pub(crate) mod problem;
mod profile;
mod settings;
mod shared_cache;
mod single;
mod sites;
mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

pub(crate) use command::{LONGEST_TIMEOUT, MOST_PATTERNS};
pub use executor::{Executor, Place};
pub use problem::Problems;
pub use profile::Profile;
pub(crate) use settings::MOST_THREADS;
pub use shared_cache::SharedCache;

use crate::chip::Evidence;
use crate::metric::Metric;
use crate::op::{Arm, External, Op, Recipe, Recorded, Site, StageId, Stream};
use crate::text::Shown;
use contract::RawContract;
use fields::Fields;
use problem::{At, Findings, Problem};
use serde::{Deserialize, Serialize};
use settings::RawSettings;
use stage::RawStage;
use toml::de::DeTable;

/// The contracts that ship: their names and their files. A stage may name one without a file of
/// it; a file of the same name in the folder of contracts goes before.
pub(crate) const SHIPPED_CONTRACTS: [(&str, &str); 22] = [
    ("attention", include_str!("../../contracts/attention.toml")),
    ("batch-invariance", include_str!("../../contracts/batch-invariance.toml")),
    ("coded-matmul", include_str!("../../contracts/coded-matmul.toml")),
    ("command", include_str!("../../contracts/command.toml")),
    ("comparison", include_str!("../../contracts/comparison.toml")),
    ("embedding", include_str!("../../contracts/embedding.toml")),
    ("engine", include_str!("../../contracts/engine.toml")),
    ("exact-engine", include_str!("../../contracts/exact-engine.toml")),
    ("exact-pass", include_str!("../../contracts/exact-pass.toml")),
    ("f32-engine", include_str!("../../contracts/f32-engine.toml")),
    ("f32-kernel", include_str!("../../contracts/f32-kernel.toml")),
    ("golden-output", include_str!("../../contracts/golden-output.toml")),
    ("kernel", include_str!("../../contracts/kernel.toml")),
    ("llama-cpp", include_str!("../../contracts/llama-cpp.toml")),
    ("llama-cpp-cuda", include_str!("../../contracts/llama-cpp-cuda.toml")),
    ("llama-cpp-sites", include_str!("../../contracts/llama-cpp-sites.toml")),
    ("per-layer", include_str!("../../contracts/per-layer.toml")),
    ("qkv-matmul", include_str!("../../contracts/qkv-matmul.toml")),
    ("reproducer", include_str!("../../contracts/reproducer.toml")),
    ("rms-norm", include_str!("../../contracts/rms-norm.toml")),
    ("rope", include_str!("../../contracts/rope.toml")),
    ("swiglu", include_str!("../../contracts/swiglu.toml")),
];

/// A folder of stages with the contracts that judge them.
#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    /// The folder as it was given.
    pub folder: PathBuf,
    /// The stages, sorted by id.
    pub stages: Vec<Stage>,
    /// All contracts, by name; every stage's is among them.
    pub contracts: BTreeMap<String, Contract>,
    /// Ways to run them, by name.
    pub profiles: BTreeMap<String, Profile>,
    /// The cache that they share with other machines.
    pub cache: Option<SharedCache>,
}

impl Pipeline {
    /// What to say of a stage whose contract cannot hold with its recipe, before it runs.
    pub fn unfit(&self, stage: &Stage) -> Option<String> {
        check::unfit(stage, self.contracts.get(&stage.contract)?)
    }

    /// The same of a contract that asks for the bits of a lookup, where the recipe rounds `value`,
    /// which was looked up.
    pub fn unfit_lookup(&self, stage: &Stage, value: f32) -> Option<String> {
        let (stream, contract) = (stage.recipe.stream?, self.contracts.get(&stage.contract)?);
        let of_bits = contract.falsifiers.iter().find(|falsifier| {
            check::is_of_own_kernels(falsifier)
                && falsifier.metric == Metric::BitMismatches
                && falsifier.max == Some(0.0)
        })?;
        let why = format!(
            "allows no other bit, and the {value} that is looked up is rounded to {stream}"
        );
        (stream.round(value) != value).then(|| check::unfit_words(contract, of_bits, &why))
    }

    /// The stage of this id.
    pub fn stage(&self, id: &StageId) -> Option<&Stage> {
        let place = self.stages.binary_search_by(|stage| stage.id.cmp(id)).ok()?;
        self.stages.get(place)
    }
}

/// What the command line sets for every stage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrides {
    /// `--model`.
    pub model: Option<String>,
    /// `--tokens`.
    pub tokens: Option<Vec<u32>>,
    /// `--prompt`.
    pub prompt: Option<String>,
    /// `--chat`, or `--chat=false`.
    pub chat: Option<bool>,
    /// `--system`.
    pub system: Option<String>,
    /// `--arms`.
    pub arms: Option<Vec<Arm>>,
    /// `--on`.
    pub on: Option<Place>,
}

/// One question with one verdict.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Unique in the folder.
    pub id: StageId,
    /// The question, for people.
    pub title: String,
    /// The manifest.
    pub file: PathBuf,
    /// The stages that must have run, sorted; the input's stage is one of them.
    pub needs: Vec<StageId>,
    /// The contract's name.
    pub contract: String,
    /// For selections.
    pub tags: Vec<String>,
    /// `synthetic:<preset>` or the path of a GGUF file or safetensors folder; a
    /// command does not read it.
    pub model: String,
    /// What the model reads.
    pub prompt: Prompt,
    /// For whatever is drawn at random.
    pub seed: u64,
    /// Unique, in the order written, [`Arm::Reference`] among them; for a command
    /// [`Arm::Command`] alone.
    pub arms: Vec<Arm>,
    /// The arithmetic under test.
    pub recipe: Recipe,
    /// What it may use.
    pub resources: Resources,
    /// Where its work is done: no part of what it is.
    #[serde(skip)]
    pub executor: Executor,
    /// What it computes.
    pub op: Op,
    /// Where the `recorded` arm's tensors are, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recorded: Option<Recorded>,
    /// The program that the `external` arm asks, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub external: Option<External>,
    /// The manifest with a `[for]` of which it is a member.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<StageId>,
}

impl Stage {
    /// The engine whose arithmetic the emulated arm follows although no kernel of it is known
    /// to the bit: the recipe's, or the program's.
    pub fn emulates(&self) -> Option<crate::op::Engine> {
        let of_program = self.external.as_ref().and_then(|external| external.emulate);
        self.recipe.emulate.or(of_program)
    }

    /// Gives the stage another recipe; a forward pass makes sites of its own where keys and values
    /// are kept in a type of theirs.
    pub fn take_recipe(&mut self, recipe: Recipe) {
        if let Op::Forward { kv_cache, .. } = &mut self.op {
            *kv_cache = recipe.kv_cache;
        }
        self.recipe = recipe;
    }

    /// The files of tensors that it reads.
    pub fn files(&self) -> Vec<&Path> {
        let inputs = self.op.inputs();
        let mut files: Vec<&Path> =
            inputs.iter().filter_map(|(_, input)| Some(input.file()?.file.as_path())).collect();
        if let Op::Gemm { x, w } = &self.op {
            files.extend([x.file.as_path(), w.file.as_path()]);
        }
        files.extend(self.recorded.as_ref().map(|recorded| recorded.file.as_path()));
        files
    }
}

/// What the model reads; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompt {
    /// Numbers in the model's vocabulary.
    Tokens(Vec<u32>),
    /// A text for the model's tokenizer.
    Text(String),
    /// A message for the model's chat template.
    Chat {
        /// The user's message.
        text: String,
        /// The system's message, if there is one.
        #[serde(skip_serializing_if = "Option::is_none")]
        system: Option<String>,
    },
}

impl Prompt {
    /// A text, which is the message of a chat or the whole prompt.
    pub fn of_text(text: String, chat: bool, system: Option<String>) -> Prompt {
        if chat { Prompt::Chat { text, system } } else { Prompt::Text(text) }
    }
}

/// What a stage may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resources {
    /// CPU threads; all of them where nothing is written.
    pub threads: Option<NonZeroUsize>,
    /// Cores of the machine that it has to itself, beside other jobs and runners.
    pub cores: usize,
    /// GiB of memory, likewise.
    pub memory: usize,
    /// GPUs, likewise; of no use to arms on the CPU.
    pub gpus: usize,
    /// GiB of each of these GPUs' memory; all of it where nothing is written.
    pub gpu_memory: usize,
}

/// Equations, and the falsifiers that could prove them wrong.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contract {
    /// The name that stages use.
    pub name: String,
    /// `MAJOR.MINOR.PATCH`.
    pub version: String,
    /// Where it is written.
    pub file: PathBuf,
    /// Each with at least one falsifier.
    pub equations: Vec<Equation>,
    /// In the order written.
    pub falsifiers: Vec<Falsifier>,
    /// The least that the emulated arm's arithmetic must rest on; anything where nothing is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
}

/// What is claimed to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Equation {
    /// Unique in the contract.
    pub id: String,
    /// For people.
    pub formula: String,
    /// The reason why it holds.
    pub why: String,
}

/// A measurement that could prove an equation wrong.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Falsifier {
    /// Unique in the contract.
    pub id: String,
    /// The equation that falls with it.
    pub equation: String,
    /// What must be seen, for people.
    pub prediction: String,
    /// The subject, and what it is judged against. An arm with itself means
    /// its repeats, and [`Stream::OUTCOME`] twice a command's outcome.
    pub compare: [Stream; 2],
    /// What is measured.
    pub metric: Metric,
    /// Patterns of sites, see [`names_site`]; every site if absent.
    pub sites: Option<Vec<String>>,
    /// Whether it leaves out a site whose every bit is what the recipe's engine makes of the
    /// subject's own input.
    pub unless_exact: bool,
    /// The smallest value that passes.
    pub min: Option<f64>,
    /// The largest value that passes.
    pub max: Option<f64>,
    /// The derivation of the bounds.
    pub why: String,
    /// What a failure means.
    pub if_fails: IfFails,
}

/// What a falsifier's failure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IfFails {
    /// The difference is unexplained: a bug.
    Structural,
    /// The difference is the recipe's arithmetic, and beyond the budget.
    Drift,
}

impl Contract {
    /// The contract as a stage with these arms reads it: where the stage has no
    /// device, what it has recorded, or has from a program, stands for the device; and
    /// what is recorded of an engine stands for the program, or the program for it.
    pub fn read_by(&self, arms: &[Arm]) -> Contract {
        let foreign = [Arm::Recorded, Arm::External];
        let mut read = self.clone();
        for written in [Arm::Device, Arm::External, Arm::Recorded] {
            let stands_in = foreign.into_iter().find(|arm| arms.contains(arm));
            let Some(arm) = stands_in.filter(|_| !arms.contains(&written)) else { continue };
            for falsifier in &mut read.falsifiers {
                falsifier.compare = falsifier.compare.map(|stream| stream.with(written, arm));
            }
        }
        read
    }
}

impl Falsifier {
    /// Whether it judges a site, see [`names_site`].
    pub fn applies_to(&self, site: &Site) -> bool {
        names_site(self.sites.as_deref(), self.metric, site)
    }
}

/// Whether patterns name a site for a metric; every site where there are none. A
/// pattern names a site part by part between dots, where `*` is one whole part:
/// `blk.1.*` does not name `blk.10.q`. Metrics of logits judge `logits` alone.
pub fn names_site(patterns: Option<&[String]>, metric: Metric, site: &Site) -> bool {
    let named = match patterns {
        None => true,
        Some(patterns) => patterns.iter().any(|pattern| sites::names(pattern, &site.0)),
    };
    named && (!metric.of_logits_only() || site.0 == "logits")
}

/// The file of defaults.
const DEFAULTS: &str = "pipeline.toml";

/// Reads a folder of stages and its contracts.
///
/// Stages are the folder's `*.toml` files but `pipeline.toml`, which holds the
/// defaults. Contracts lie in `contracts/` beside the folder, or where
/// `contracts = "..."` of `pipeline.toml` says, seen from the folder.
///
/// # Errors
/// Every problem of every file.
pub fn load(folder: &Path, overrides: &Overrides) -> Result<Pipeline, Problems> {
    let mut findings = Findings::of(folder);
    let Some(files) = toml_files(folder, "stages", None, &mut findings) else {
        return findings.into_result(empty(folder));
    };

    let typed = check_overrides(overrides, &mut findings);
    let (defaults, (contracts_folder, named), Ways { profiles, cache }) =
        read_defaults(folder, &files, &mut findings);
    let (mut stages, unread_stages) = read_stages(folder, &files, &mut findings);
    family::expand_needs(&mut stages);
    let (contracts, unread_contracts) =
        read_contracts(&contracts_folder, named.as_ref(), &stages, &mut findings);
    command::add_implied_needs(&mut stages, &mut findings);
    command::check_places(&stages, &[folder, &contracts_folder], &mut findings);
    let all = check::Folder {
        stages: &stages,
        contracts: &contracts,
        unread_stages: &unread_stages,
        unread_contracts: &unread_contracts,
    };
    check::check(&all, &mut findings);

    let mut checked: Vec<Stage> = stages
        .into_iter()
        .filter_map(|stage| finish_stage(stage, &defaults, &typed, &mut findings))
        .collect();
    checked.sort_by(|a, b| a.id.cmp(&b.id));
    let pipeline = Pipeline {
        folder: folder.to_owned(),
        stages: checked,
        contracts: contracts
            .into_iter()
            .filter_map(|raw| raw.contract.map(|contract| (contract.name.clone(), contract)))
            .collect(),
        profiles,
        cache,
    };
    findings.into_result(pipeline)
}

fn empty(folder: &Path) -> Pipeline {
    Pipeline {
        folder: folder.to_owned(),
        stages: Vec::new(),
        contracts: BTreeMap::new(),
        profiles: BTreeMap::new(),
        cache: None,
    }
}

/// The settings from the command line, which stand above every file's.
fn check_overrides(overrides: &Overrides, findings: &mut Findings) -> RawSettings {
    if overrides.tokens.is_some() && overrides.prompt.is_some() {
        findings.push(Problem::new(
            "`--tokens` and `--prompt` are both given",
            "keep one of them: both say what the model reads",
        ));
        return RawSettings::default();
    }
    if overrides.chat == Some(false) && overrides.system.is_some() {
        findings.push(Problem::new(
            "`--system` is a message of a chat, and `--chat=false` lays none",
            "keep one of them",
        ));
    }
    RawSettings::from_overrides(overrides)
}

/// The names of a folder's `*.toml` files, sorted; hidden files are not manifests. `named` is
/// where a file names the folder.
fn toml_files(
    folder: &Path,
    holds: &str,
    named: Option<&At>,
    findings: &mut Findings,
) -> Option<Vec<PathBuf>> {
    let shown = folder.shown();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            let help = if folder.is_file() {
                "this is a file: give the folder that holds it".to_owned()
            } else {
                format!("give a folder that holds the {holds} as `*.toml`")
            };
            findings.push(
                Problem::new(format!("cannot read the folder `{shown}`: {error}"), help)
                    .at_if(named, "it is named here")
                    .in_path(folder),
            );
            return None;
        }
    };
    let unreadable = |path: &Path| {
        let title = format!("`{}` has a name that is not UTF-8", path.shown());
        Problem::new(title, "rename it: reports and keys hold names as text").in_path(path)
    };
    if folder.to_str().is_none() {
        findings.push(unreadable(folder));
        return None;
    }
    let mut files = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => {
                let path = entry.path();
                let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
                if !hidden && path.extension().is_some_and(|ending| ending == "toml") {
                    match path.to_str() {
                        Some(_) => files.push(path),
                        None => findings.push(unreadable(&path)),
                    }
                }
            }
            Err(error) => findings.push(
                Problem::new(
                    format!("cannot list the folder `{shown}`: {error}"),
                    "is its disk still there?",
                )
                .in_path(folder),
            ),
        }
    }
    files.sort();
    Some(files)
}

/// What a stage has unless it says otherwise.
#[derive(Default)]
struct Defaults {
    settings: RawSettings,
    recorded: Option<Recorded>,
    external: Option<External>,
}

/// How `pipeline.toml` lets a folder be run.
#[derive(Default)]
struct Ways {
    profiles: BTreeMap<String, Profile>,
    cache: Option<SharedCache>,
}

/// `pipeline.toml`'s settings, the folder of contracts with where it is named, and profiles.
fn read_defaults(
    folder: &Path,
    files: &[PathBuf],
    findings: &mut Findings,
) -> (Defaults, (PathBuf, Option<At>), Ways) {
    let beside = match (folder.file_name(), folder.parent()) {
        (Some(_), Some(parent)) => parent.join("contracts"),
        _ => folder.join("..").join("contracts"),
    };
    let path = folder.join(DEFAULTS);
    if !files.contains(&path) {
        return (Defaults::default(), (beside, None), Ways::default());
    }
    let Some(text) = fields::read_text(&path, findings) else {
        return (Defaults::default(), (beside, None), Ways::default());
    };
    let source = findings.add_source(path, text.clone());
    let (table, sound) = fields::parse(&text, source, findings);
    if !sound {
        return (Defaults::default(), (beside, None), Ways::default());
    }
    let mut table = Fields::of_file(table, source, "`pipeline.toml`");
    let settings = RawSettings::read(&mut table, folder, findings);
    let recorded = table.table("recorded", findings);
    let recorded = recorded.and_then(|table| inputs::read_recorded(table, folder, None, findings));
    let external = external::read(&mut table, findings);
    let defaults = Defaults { settings, recorded, external };
    let contracts = table.take::<String>("contracts", findings);
    let profiles = profile::read(&mut table, findings);
    let cache = shared_cache::read(&mut table, findings);
    table.finish(findings);
    let contracts = match contracts {
        Some(written) => (folder.join(written.value), written.at),
        None => (beside, None),
    };
    (defaults, contracts, Ways { profiles, cache })
}

/// The stages, and what files that could not be parsed may be called.
fn read_stages(
    folder: &Path,
    files: &[PathBuf],
    findings: &mut Findings,
) -> (Vec<RawStage>, Unread) {
    let (mut stages, mut unread) = (Vec::new(), Unread::default());
    for path in files.iter().filter(|path| !path.ends_with(DEFAULTS)) {
        let read = read_file(path, "id", &mut unread, findings, |table, source, findings| {
            let members = family::expand(table, source, findings);
            let stage = |family::Member { table, family }| {
                let fields = Fields::of_file(table, source, "the stage");
                RawStage::read(fields, source, family, findings)
            };
            members.into_iter().map(stage).collect::<Vec<_>>()
        });
        stages.extend(read.into_iter().flatten());
    }
    unread.some |= stages.iter().any(|stage| stage.id.is_none());
    if files.iter().all(|path| path.ends_with(DEFAULTS)) {
        findings.push(
            Problem::new(
                format!("`{}` holds no stage", folder.shown()),
                "add a manifest, as `a.toml` with `id`, `title`, `contract` and an op",
            )
            .in_path(folder),
        );
    }
    (stages, unread)
}

/// The contracts, and what files that could not be parsed may be called. A contract that a stage
/// names and that no file holds may be one that ships.
fn read_contracts(
    folder: &Path,
    named: Option<&At>,
    stages: &[RawStage],
    findings: &mut Findings,
) -> (Vec<RawContract>, Unread) {
    let (mut contracts, mut unread) = (Vec::new(), Unread::default());
    let wanted = stages.iter().filter_map(|stage| stage.contract.as_ref());
    let wanted: BTreeSet<&str> = wanted.map(|contract| contract.value.as_str()).collect();
    // Stages that name no contract are reported for that.
    let needless = named.is_none() && wanted.iter().all(|name| shipped_contract(name).is_some());
    if !needless || folder.exists() {
        let Some(files) = toml_files(folder, "contracts", named, findings) else {
            unread.some = true;
            return (contracts, unread);
        };
        for path in &files {
            contracts.extend(read_file(path, "name", &mut unread, findings, read_contract));
        }
    }
    unread.some |= contracts.iter().any(|contract| contract.name.is_none());
    for name in wanted {
        let held = |raw: &RawContract| raw.name.as_ref().is_some_and(|held| held.value == name);
        let Some(text) = shipped_contract(name) else { continue };
        if contracts.iter().any(held) || unread.may_hold(name) {
            continue;
        }
        let path = PathBuf::from(format!("contracts/{name}.toml, which ships with the runner"));
        let source = findings.add_source(path, text.to_owned());
        let (table, _) = fields::parse(text, source, findings);
        contracts.push(read_contract(table, source, findings));
    }
    (contracts, unread)
}

fn read_contract(table: DeTable<'_>, source: usize, findings: &mut Findings) -> RawContract {
    RawContract::read(Fields::of_file(table, source, "the contract"), source, findings)
}

/// The text of a contract that ships.
fn shipped_contract(name: &str) -> Option<&'static str> {
    SHIPPED_CONTRACTS.iter().find(|(shipped, _)| *shipped == name).map(|(_, text)| *text)
}

/// What is known of files that could not be parsed: others may rightly name them.
#[derive(Default)]
struct Unread {
    names: BTreeSet<String>,
    /// Some file did not even give its name.
    some: bool,
}

impl Unread {
    fn may_hold(&self, name: &str) -> bool {
        self.some || self.names.contains(name)
    }
}

/// Reads one file by `read`, which is given its top-level table and its number.
fn read_file<T>(
    path: &Path,
    name_key: &str,
    unread: &mut Unread,
    findings: &mut Findings,
    read: impl FnOnce(DeTable<'_>, usize, &mut Findings) -> T,
) -> Option<T> {
    let Some(text) = fields::read_text(path, findings) else {
        unread.some = true;
        return None;
    };
    let source = findings.add_source(path.to_owned(), text.clone());
    let (table, sound) = fields::parse(&text, source, findings);
    if sound {
        return Some(read(table, source, findings));
    }
    // An empty name may be what the parser made of a broken one.
    match table.get(name_key).and_then(|name| name.get_ref().as_str()) {
        Some(name) if !name.is_empty() => {
            unread.names.insert(name.to_owned());
        }
        _ => unread.some = true,
    }
    None
}

/// The stage as it is used, from its own settings, the folder's and the command line's.
fn finish_stage(
    raw: RawStage,
    defaults: &Defaults,
    typed: &RawSettings,
    findings: &mut Findings,
) -> Option<Stage> {
    let named = raw.settings.names_arms() || typed.names_arms();
    let settings = typed.clone().over(&raw.settings.or(&defaults.settings)).check(findings);
    let mut op = raw.op?.op;
    let mut needs: BTreeSet<StageId> = raw.needs.into_iter().map(|need| need.value).collect();
    needs.extend(op.input_refs().into_iter().map(|input| input.stage.clone()));
    let settings = settings?;
    op.seed_with(settings.seed);
    let computes = !matches!(op, Op::Compare { .. } | Op::Command(_));
    let askable = external::can_make(&op);
    if raw.external.is_some() && !askable {
        let problem = Problem::new(
            format!("`[external]` has no use beside this `[{}]`", op.name()),
            "a program is asked for what a model's tensors make; record what else it makes",
        );
        let problem = problem.in_path(findings.path(raw.source));
        findings.push(problem);
    }
    // A stage's own table stands in place of the folder's, as a whole.
    let recorded = raw.recorded.or_else(|| defaults.recorded.clone().filter(|_| computes));
    let external = raw.external.or_else(|| defaults.external.clone().filter(|_| askable));
    let foreign =
        [recorded.is_some().then_some(Arm::Recorded), external.is_some().then_some(Arm::External)];
    let arms = arms_of(&op, settings.arms, named, &foreign);
    for (arm, table) in [(Arm::Recorded, "recorded"), (Arm::External, "external")] {
        if computes && arms.contains(&arm) && !foreign.contains(&Some(arm)) {
            let problem = Problem::new(
                format!("the arm `{arm}` has no source"),
                format!("add a table `[{table}]`, or leave the arm out"),
            );
            let problem = problem.in_path(findings.path(raw.source));
            findings.push(problem);
        }
    }
    let mut stage = Stage {
        id: raw.id?.value,
        title: raw.title?.value,
        file: findings.path(raw.source).to_owned(),
        needs: needs.into_iter().collect(),
        contract: raw.contract?.value,
        tags: raw.tags?,
        model: settings.model,
        prompt: settings.prompt,
        seed: settings.seed,
        arms,
        recipe: settings.recipe,
        resources: settings.resources,
        executor: settings.executor,
        op,
        recorded,
        external,
        family: raw.family,
    };
    stage.take_recipe(settings.recipe);
    Some(stage)
}

/// The arms of a stage. Where its own manifest names none, a recording or a
/// program stands for the device, and coded operands are multiplied on the CPU alone.
fn arms_of(op: &Op, arms: Vec<Arm>, named: bool, foreign: &[Option<Arm>]) -> Vec<Arm> {
    match op {
        Op::Command(_) => return vec![Arm::Command],
        Op::Compare { sides, .. } => return sides.keys().copied().collect(),
        _ if named => return arms,
        _ => {}
    }
    let foreign: Vec<Arm> = foreign.iter().copied().flatten().collect();
    let replaced = !foreign.is_empty() || matches!(op, Op::Gemm { .. });
    let kept = arms.into_iter().filter(|arm| !replaced || *arm != Arm::Device);
    kept.chain(foreign).collect()
}
