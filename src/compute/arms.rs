//! Runs a stage's op on an arm: one function per question that a run asks.
//!
//! It knows ops and models; why somebody wants the result, and where it is
//! kept, is not its concern.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Mutex;

use super::call::{Call, Watched};
use super::drawn::Draws;
use super::emulated::arm::Emulated;
use super::emulated::chip::chip;
use super::emulated::engine::Chosen;
use super::floor::{Deviations, Floor};
use super::forward::{
    Discard, Greedy, KvCache, Sites, after_output, attention_of, bias_of, decode_greedily, forward,
    forward_to, norm_of, output_weight, sinks_of,
};
use super::reference::Reference;
use super::shares::{Energies, energies};
use super::{AttentionShape, ComputeError, GemmRecord, Pass, cuda, flow};
use crate::files::Spill;
use crate::interrupt;
use crate::model::Model;
use crate::op::{
    Arm, Capture, ChipName, LOGITS_IN_BATCH, Op, Recipe, Site, site_of_norm, site_of_projection,
};
use crate::tensor::Tensor;

/// Everything that a stage's op reads.
pub struct Task<'a> {
    /// What to compute.
    pub op: &'a Op,
    /// The weights.
    pub model: &'a Model,
    /// The prompt.
    pub tokens: &'a [u32],
    /// The tensors of [`Op::inputs`], in their order.
    pub input: Option<&'a [Tensor]>,
    /// Where tensors are put away that are kept for later; nothing if memory holds them.
    pub spill: Option<&'a Spill>,
}

impl Task<'_> {
    /// A tensor that is kept for later.
    fn put_away(&self, tensor: Tensor) -> Result<Tensor, ComputeError> {
        match self.spill {
            None => Ok(tensor),
            Some(spill) => spill.put(&tensor).map_err(ComputeError::Spill),
        }
    }
}

/// What an arm made of a stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// The sites' tensors, in the order of the flow.
    pub sites: Vec<(Site, Tensor)>,
    /// The greedily decoded tokens, where the op asks for them.
    pub greedy: Option<Greedy>,
    /// For each site, the elements whose bits any repeat changed; empty without repeats.
    pub repeats: BTreeMap<Site, u64>,
    /// The arithmetic that ran, in words.
    pub arithmetic: String,
    /// The products, where a library computed them.
    pub gemms: Vec<GemmRecord>,
}

impl Output {
    /// The tensor of a site.
    pub fn site(&self, site: &Site) -> Option<&Tensor> {
        self.sites.iter().find(|(name, _)| name == site).map(|(_, tensor)| tensor)
    }
}

/// Makes arms. The shipped one is [`Shipped`]; a test or a planted bug brings its own.
pub trait Workshop: Sync {
    /// What distinguishes an arm from the shipped one; part of its cache key.
    fn name(&self, arm: Arm) -> String;

    /// The ops of an arm under a recipe, and its arithmetic in words.
    ///
    /// # Errors
    /// If the arm cannot compute the recipe.
    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError>;

    /// Why an arm cannot compute a recipe on this machine; `None` if it can.
    fn unavailable(&self, arm: Arm, recipe: &Recipe) -> Option<String>;

    /// What else an arm's results depend on, by name and value: the chip, the
    /// driver, the versions of libraries. Part of that arm's cache keys, so an arm
    /// that does not depend on them must not name them.
    fn facts(&self, _arm: Arm, _recipe: &Recipe) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Whether an arm takes a GPU while it computes.
    fn takes_gpu(&self, arm: Arm) -> bool {
        !matches!(arm, Arm::Reference | Arm::Emulated)
    }
}

/// Why a command cannot be asked for tensors.
const NO_TENSORS: &str = "a command makes files, not tensors";

/// The arms as they ship.
#[derive(Clone, Debug, Default)]
pub struct Shipped {
    /// The folder where compiled GPU programs and what this machine has are kept, if they are.
    pub kept: Option<PathBuf>,
    /// Whether the reference's products are computed on a GPU; no bit depends on it.
    pub reference_on_gpu: bool,
    /// Whether the emulated arm's products are computed on a GPU; no bit depends on it.
    pub emulated_on_gpu: bool,
}

impl Workshop for Shipped {
    fn name(&self, _arm: Arm) -> String {
        "shipped".to_owned()
    }

    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
        match arm {
            Arm::Reference if self.reference_on_gpu => cuda::reference_ops(self.kept.as_deref()),
            Arm::Reference => {
                Ok((Box::new(Reference), "f64 over the dequantised weights".to_owned()))
            }
            Arm::Emulated => {
                let emulated = Emulated::new(&self.on_this_machine(recipe))?;
                if self.emulated_on_gpu {
                    return cuda::emulated_ops(emulated, self.kept.as_deref());
                }
                let arithmetic = emulated.describe();
                Ok((Box::new(emulated), arithmetic))
            }
            Arm::Recorded | Arm::External => {
                Err(ComputeError::Recipe(format!("the {arm} arm reads, it does not compute")))
            }
            Arm::Command => Err(ComputeError::Recipe(NO_TENSORS.to_owned())),
            Arm::Device => cuda::ops(recipe, self.kept.as_deref()),
        }
    }

    fn facts(&self, arm: Arm, recipe: &Recipe) -> Vec<(String, String)> {
        match arm {
            Arm::Emulated => {
                let chip = chip(self.on_this_machine(recipe).chip).name;
                vec![("chip".to_owned(), chip.to_string())]
            }
            Arm::Device => cuda::facts(recipe, self.kept.as_deref()),
            // Nobody else knows what of its machine a program's answer depends on.
            Arm::External => vec![("machine".to_owned(), crate::machine::name().to_owned())],
            _ => Vec::new(),
        }
    }

    fn unavailable(&self, arm: Arm, recipe: &Recipe) -> Option<String> {
        match arm {
            Arm::Reference | Arm::Emulated | Arm::Recorded | Arm::External | Arm::Command => None,
            Arm::Device if recipe.stream.is_some() => Some(
                "the device arm runs the project's own kernels, and `stream` describes a foreign \
                 engine: record that engine, or leave `stream` out"
                    .to_owned(),
            ),
            Arm::Device => cuda::why_unavailable(recipe, self.kept.as_deref()),
        }
    }

    fn takes_gpu(&self, arm: Arm) -> bool {
        match arm {
            Arm::Reference => self.reference_on_gpu,
            Arm::Emulated => self.emulated_on_gpu,
            _ => true,
        }
    }
}

impl Shipped {
    /// The recipe with its chip: `auto` is the device's, where there is one.
    fn on_this_machine(&self, recipe: &Recipe) -> Recipe {
        let auto = recipe.chip == ChipName::Auto;
        let chip = if auto { cuda::chip_here(self.kept.as_deref()) } else { None };
        Recipe { chip: chip.unwrap_or(recipe.chip), ..*recipe }
    }
}

/// Computes a stage on an arm, as often as the op says.
///
/// # Errors
/// If the model, the shapes or the recipe do not allow it.
pub fn compute(
    task: &Task<'_>,
    ops: &dyn Pass,
    arithmetic: String,
    progress: &mut dyn FnMut(&Tensor),
) -> Result<Output, ComputeError> {
    let mut output = once(task, ops, true, progress)?;
    output.arithmetic = arithmetic;
    for _ in 1..task.op.repeats() {
        // Decoded tokens follow from the logits, which are what repeats are held to.
        let repeat = once(task, ops, false, progress)?;
        for ((site, first), (_, again)) in output.sites.iter().zip(&repeat.sites) {
            let pairs = first.data().iter().zip(again.data());
            let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count() as u64;
            *output.repeats.entry(site.clone()).or_default() += differ;
        }
    }
    output.gemms = ops.products();
    Ok(output)
}

fn once(
    task: &Task<'_>,
    ops: &dyn Pass,
    decodes: bool,
    progress: &mut dyn FnMut(&Tensor),
) -> Result<Output, ComputeError> {
    match task.op {
        Op::Forward { capture, decode, .. } => {
            let mut cache = KvCache::new(task.model.config(), task.op.kv_cache());
            let mut recorder = Recorder { task, capture: *capture, sites: Vec::new(), progress };
            let kept = capture.with_logits(task.tokens.len());
            let logits = forward_to(task.model, ops, task.tokens, kept, &mut cache, &mut recorder)?;
            let sites = recorder.sites;
            let greedy = match *decode {
                0 => None,
                _ if !decodes => None,
                count => {
                    let count = count as usize;
                    Some(decode_greedily(task.model, ops, &logits, &mut cache, count)?)
                }
            };
            let mut output = Output { sites, greedy, ..Output::default() };
            if capture.is_of_logits() {
                output.sites.extend(in_batch(task, ops, *capture, &logits)?);
            }
            Ok(output)
        }
        op => {
            let mut sites = Vec::new();
            for unit in units(op, Some(task.model)) {
                let tensor = single(task, ops, &unit)?;
                progress(&tensor);
                sites.push((unit.site, task.put_away(tensor)?));
            }
            Ok(Output { sites, ..Output::default() })
        }
    }
}

/// The prompt's logits once more, from a pass in which the prompt follows itself as
/// far as the context reaches. No token sees a later one, so they are the same
/// logits; what differs is the noise of the batch: its scales, its algorithms.
fn in_batch(
    task: &Task<'_>,
    ops: &dyn Pass,
    capture: Capture,
    logits: &Tensor,
) -> Result<Option<(Site, Tensor)>, ComputeError> {
    let config = task.model.config();
    let longer = (2 * task.tokens.len()).min(config.context_length);
    if longer == task.tokens.len() {
        return Ok(None);
    }
    let tokens: Vec<u32> = task.tokens.iter().copied().cycle().take(longer).collect();
    // Where all logits are kept, the output matrix meets the longer batch too; where the last token's
    // alone are, it meets one row in both passes.
    let kept = match capture {
        Capture::LastLogits => capture.with_logits(task.tokens.len()),
        _ => 0..longer,
    };
    let batch = forward_to(
        task.model,
        ops,
        &tokens,
        kept,
        &mut KvCache::new(config, task.op.kv_cache()),
        &mut Discard,
    )?;
    let mut same = batch.into_data();
    same.truncate(logits.data().len());
    Ok(Some((Site(LOGITS_IN_BATCH.to_owned()), Tensor::new(logits.width(), same))))
}

/// Passes whose roundings are drawn: enough to see whether a token's drift can be
/// told beforehand at all.
const DRAWS: u64 = 4;
/// Passes in all where these leave a doubt. A choice that rounding turns in a share p of all
/// passes is in none of n draws, but in the arm, with a probability of p (1 - p)^n: at most
/// 8 % for 4 and 2 % for 16.
const DRAWS_IN_DOUBT: u64 = 16;

/// The reference's logits with the recipe's roundings drawn anew, some times over,
/// where a forward pass keeps nothing but its logits; else none. More are drawn where
/// `in_doubt` finds something that the first ones do not explain.
///
/// # Errors
/// As [`Draws::new`] and the ops.
pub fn drawn(
    task: &Task<'_>,
    recipe: &Recipe,
    in_doubt: &dyn Fn(&[Tensor]) -> bool,
) -> Result<Vec<Tensor>, ComputeError> {
    let kept = match task.op {
        Op::Forward { capture, .. } if capture.is_of_logits() => {
            capture.with_logits(task.tokens.len())
        }
        _ => return Ok(Vec::new()),
    };
    let draw = |numbers| -> Result<Vec<Tensor>, ComputeError> {
        let draws = Draws::new(recipe, numbers)?;
        let mut cache = KvCache::new(task.model.config(), task.op.kv_cache());
        let kept = kept.clone();
        let logits = forward_to(task.model, &draws, task.tokens, kept, &mut cache, &mut Discard)?;
        draws.apart(&logits).into_iter().map(|logits| task.put_away(logits)).collect()
    };
    let mut all = draw(0..DRAWS)?;
    if in_doubt(&all) {
        for first in (DRAWS..DRAWS_IN_DOUBT).step_by(DRAWS as usize) {
            all.extend(draw(first..(first + DRAWS).min(DRAWS_IN_DOUBT))?);
        }
    }
    Ok(all)
}

/// The reference computed op by op on a subject's own inputs: the local truth
/// at each site, from which the subject's local error follows. Where the subject lacks a
/// site, the pass goes on with what it computed: the next truth then spans several ops.
///
/// # Errors
/// As the ops.
pub fn anchored(task: &Task<'_>, subject: &Output) -> Result<Vec<(Site, Tensor)>, ComputeError> {
    on_recorded(task, &Reference, subject)
}

/// The reference computed layer by layer on a subject's own residual stream: the
/// local truth at the end of each layer. For a pass that recorded every site.
///
/// # Errors
/// As [`anchored`].
pub fn anchored_by_layer(
    task: &Task<'_>,
    subject: &Output,
) -> Result<Vec<(Site, Tensor)>, ComputeError> {
    let recorded: BTreeMap<&Site, &Tensor> =
        subject.sites.iter().map(|(site, tensor)| (site, tensor)).collect();
    let mut anchor = LayerAnchor { task, recorded, ends: Vec::new() };
    let mut cache = KvCache::new(task.model.config(), task.op.kv_cache());
    forward(task.model, &Reference, task.tokens, &mut cache, &mut anchor)?;
    Ok(anchor.ends)
}

/// One site judged from the subject's own inputs.
#[derive(Clone, Debug)]
pub struct Local {
    /// The site.
    pub site: Site,
    /// The reference on the subject's inputs.
    pub truth: Tensor,
    /// The deviation that the recipe's rounding gives each value, where the subject holds
    /// all that the op read.
    pub sigma: Option<Deviations>,
    /// Where the subject's error comes from, at a GEMM.
    pub energies: Option<Energies>,
}

/// The local truth and the predicted floor of every site, from the subject's own inputs.
///
/// # Errors
/// As [`anchored`], and if the recipe cannot be computed.
pub fn local(
    task: &Task<'_>,
    recipe: &Recipe,
    subject: &Output,
) -> Result<Vec<Local>, ComputeError> {
    let floor = Floor::new(recipe)?;
    let followed = Mutex::new(Vec::new());
    let watched = Watched::new(|site, call| {
        let [rows, width] = call.shape();
        let fits = |tensor: &&Tensor| (tensor.rows(), tensor.width()) == (rows, width);
        let energies = match subject.site(site).filter(fits) {
            Some(tensor) => energies(floor.emulated(), recipe, call, tensor)?,
            None => None,
        };
        followed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(energies);
        let truth = call.on(&floor)?;
        if let Some(last) = floor.take_deviations() {
            floor.put(Deviations { each: task.put_away(last.each)?, shared: last.shared });
        }
        Ok(truth)
    });
    let visited = visit_recorded(task, &watched, subject)?;
    drop(watched);
    let followed = followed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let held: BTreeSet<Site> =
        visited.iter().filter(|visit| visit.held).map(|visit| visit.site.clone()).collect();
    let forward = matches!(task.op, Op::Forward { .. });
    let whole = |site: &Site| {
        !forward
            || flow::read_by(task.model, task.op.kv_cache(), site)
                .iter()
                .all(|read| held.contains(read))
    };
    let all = visited.into_iter().zip(floor.into_sigmas()).zip(followed);
    let locals = all.filter(|((visit, _), _)| visit.held).map(|((visit, sigma), energies)| {
        let whole = whole(&visit.site);
        let (sigma, energies) = (Some(sigma).filter(|_| whole), energies.filter(|_| whole));
        Local { site: visit.site, truth: visit.truth, sigma, energies }
    });
    Ok(locals.collect())
}

/// One site as an engine's kernels give it from the subject's own inputs.
#[derive(Clone, Debug)]
pub struct EngineSite {
    /// The site.
    pub site: Site,
    /// What the best of the kernels returned, and which one that is.
    pub chosen: Chosen,
    /// Whether the op read what the subject lacks and another kernel than the engine's first may
    /// have made.
    pub guessed: bool,
}

/// Each site of a subject as the kernels of the recipe's engine give it from the subject's
/// own inputs; of each op the kernel that comes nearest. Nothing where the recipe names no
/// engine.
///
/// Where the subject lacks a site, the pass goes on with what the first kernel makes. If another
/// one may have run there, what differs after it is no evidence.
///
/// # Errors
/// As the ops.
pub fn by_engine(
    task: &Task<'_>,
    recipe: &Recipe,
    subject: &Output,
) -> Result<Vec<EngineSite>, ComputeError> {
    let arm = Emulated::new(recipe)?;
    let (Some(engine), Op::Forward { .. }) = (arm.engine(), task.op) else {
        return Ok(Vec::new());
    };
    let chosen: Mutex<BTreeMap<Site, (Chosen, bool)>> = Mutex::default();
    let guessed: Mutex<BTreeSet<Site>> = Mutex::default();
    let watched = Watched::new(|site, call| {
        let [rows, width] = call.shape();
        let fits = |tensor: &&Tensor| (tensor.rows(), tensor.width()) == (rows, width);
        let mut guessed = guessed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let reads_guess = flow::read_by(task.model, task.op.kv_cache(), site)
            .iter()
            .any(|read| guessed.contains(read));
        let Some(observed) = subject.site(site).filter(fits) else {
            if reads_guess || !engine.settles(call) {
                guessed.insert(site.clone());
            }
            drop(guessed);
            return call.on(&arm);
        };
        drop(guessed);
        let best = engine.choose(call, observed)?;
        let tensor = best.tensor.clone();
        let mut chosen = chosen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        chosen.insert(site.clone(), (best, reads_guess));
        Ok(tensor)
    });
    let visited = visit_recorded(task, &watched, subject)?;
    drop(watched);
    let mut chosen = chosen.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let sites = visited.into_iter().filter_map(|visit| {
        let (chosen, guessed) = chosen.remove(&visit.site)?;
        Some(EngineSite { site: visit.site, chosen, guessed })
    });
    Ok(sites.collect())
}

/// Layers of a recording that tell which kernels ran.
const TELLING: u32 = 2;

/// Whether a whole pass takes the engine's kernels in the order that a recording shows: it has
/// every site, and the engine lists several for some op.
pub fn reads_kernels(op: &Op, recipe: &Recipe) -> bool {
    let open = recipe.engine.is_some_and(|engine| engine.is_open());
    open && matches!(op, Op::Forward { capture: Capture::EverySite, .. })
}

/// The recipe of a whole pass: beside a recording of every site, the engine's kernels in the order
/// that it shows. What is wrong with the recording is the recorded arm's to say.
///
/// # Errors
/// As the ops.
pub fn recipe_of_pass(
    task: &Task<'_>,
    recipe: &Recipe,
    recorded: Option<&crate::op::Recorded>,
) -> Result<Recipe, ComputeError> {
    if let (Some(from), Some(kernels), Op::Forward { .. }) = (recorded, recipe.engine, task.op)
        && from.file.exists()
    {
        super::recorded::check_steps(from, kernels.decoded)?;
    }
    let Some(from) = recorded.filter(|_| reads_kernels(task.op, recipe)) else {
        return Ok(*recipe);
    };
    match super::recorded::recorded(task.op, from, Some(task.model), Some(task.tokens)) {
        Ok(seen) => led_by_recording(task, recipe, &seen),
        Err(_) => Ok(*recipe),
    }
}

/// The recipe with those of its engine's kernels first that a recording shows: of each op but
/// the products the one that gives every bit at most sites of the first layers. Orders of
/// products stay as the engine's file lists them: they follow from shapes, not from an engine.
///
/// # Errors
/// As the ops.
fn led_by_recording(
    task: &Task<'_>,
    recipe: &Recipe,
    recorded: &Output,
) -> Result<Recipe, ComputeError> {
    let arm = Emulated::new(recipe)?;
    let (Some(engine), Some(kernels), Op::Forward { .. }) = (arm.engine(), recipe.engine, task.op)
    else {
        return Ok(*recipe);
    };
    let shown: Mutex<BTreeMap<String, usize>> = Mutex::default();
    let watched = Watched::new(|site, call| {
        let [rows, width] = call.shape();
        let fits = |tensor: &&Tensor| (tensor.rows(), tensor.width()) == (rows, width);
        let Some(observed) = recorded.site(site).filter(fits) else { return call.on(&arm) };
        if crate::op::in_layer(&site.0).is_some_and(|(layer, _)| layer < TELLING) {
            let exact = engine.exact_kernels(call, observed)?;
            let mut shown = shown.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            exact.into_iter().for_each(|name| *shown.entry(name).or_default() += 1);
        }
        Ok(observed.clone())
    });
    visit_recorded(task, &watched, recorded)?;
    drop(watched);
    let shown = shown.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let led = kernels.led_by(|name| shown.get(name).copied().unwrap_or(0));
    Ok(Recipe { engine: Some(led), ..*recipe })
}

/// Whether a GEMM makes this site; of logits that are scaled or capped, the product is
/// `logits_raw`.
pub fn is_gemm(site: &Site) -> bool {
    let projections = crate::op::LAYER_PROJECTIONS;
    match crate::op::in_layer(&site.0) {
        Some((_, name)) => projections.iter().any(|(_, projected)| *projected == name),
        None => matches!(site.0.as_str(), "logits" | "logits_raw"),
    }
}

/// Runs the ops of a task on the subject's recorded tensors: each op of `ops`
/// sees what the subject's op saw, and computes the sites that the subject holds.
/// Nothing is computed where only logits are known.
///
/// # Errors
/// As the ops.
pub fn on_recorded(
    task: &Task<'_>,
    ops: &dyn Pass,
    subject: &Output,
) -> Result<Vec<(Site, Tensor)>, ComputeError> {
    let held = visit_recorded(task, ops, subject)?.into_iter().filter(|visit| visit.held);
    Ok(held.map(|visit| (visit.site, visit.truth)).collect())
}

/// One site of a pass that goes on with what a subject recorded.
struct Visit {
    site: Site,
    /// What the ops computed there.
    truth: Tensor,
    /// Whether the subject holds this site, in this shape.
    held: bool,
}

fn visit_recorded(
    task: &Task<'_>,
    ops: &dyn Pass,
    subject: &Output,
) -> Result<Vec<Visit>, ComputeError> {
    match task.op {
        Op::Forward { capture: Capture::EverySite, .. } => {
            let recorded = subject.sites.iter().map(|(site, tensor)| (site, tensor)).collect();
            let mut anchor = Anchor { task, recorded, visits: Vec::new() };
            let mut cache = KvCache::new(task.model.config(), task.op.kv_cache());
            forward(task.model, ops, task.tokens, &mut cache, &mut anchor)?;
            Ok(anchor.visits)
        }
        // Only the logits are known: there is nothing to anchor on.
        Op::Forward { .. } => Ok(Vec::new()),
        op => units(op, Some(task.model))
            .into_iter()
            .map(|unit| {
                let truth = single(task, ops, &unit)?;
                Ok(Visit { site: unit.site, truth, held: true })
            })
            .collect(),
    }
}

/// The sites that an op makes, in the order of the flow.
pub fn site_names(op: &Op, model: Option<&Model>) -> Vec<Site> {
    match op {
        Op::Forward { capture, .. } if capture.is_of_logits() => vec![Site("logits".to_owned())],
        Op::Forward { .. } => {
            model.map_or_else(Vec::new, |model| flow::sites(model, op.kv_cache()).collect())
        }
        Op::Gemm { .. } => vec![Site("y".to_owned())],
        Op::Compare { site, .. } => vec![site.clone()],
        op => units(op, model).into_iter().map(|unit| unit.site).collect(),
    }
}

/// One op of a stage that is not a forward pass.
struct UnitOp {
    site: Site,
    weight: String,
}

/// The weight that a model has in the place of one that a manifest names (both without
/// `.weight`): of latent attention and of delta nets the projections of the same input, and where
/// no norm stands before attention or feed-forward network, the one behind it.
pub fn weight_of(weight: &str, model: &Model) -> String {
    let has = |name: &str| model.has(&format!("{name}.weight"));
    let others: &[&str] = match crate::op::in_layer(weight) {
        _ if has(weight) => return weight.to_owned(),
        Some((_, "attn_q")) => &["attn_q_a", "ssm_in"],
        Some((_, "attn_k" | "attn_v")) => &["attn_kv_a_mqa", "ssm_ba"],
        Some((_, "attn_norm")) => &["post_attention_norm"],
        Some((_, "ffn_norm")) => &["post_ffw_norm"],
        _ => &[],
    };
    let layer = crate::op::in_layer(weight).map_or(0, |(layer, _)| layer);
    let mut others = others.iter().map(|other| format!("blk.{layer}.{other}"));
    others.find(|other| has(other)).unwrap_or_else(|| weight.to_owned())
}

/// The projections of a matmul, each once, as the model has them.
fn projections(weights: &[String], model: Option<&Model>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for weight in weights {
        let name = model.map_or_else(|| weight.clone(), |model| weight_of(weight, model));
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

fn units(op: &Op, model: Option<&Model>) -> Vec<UnitOp> {
    let unit = |weight: &String, site: Option<Site>| UnitOp {
        site: site.unwrap_or_else(|| Site(weight.clone())),
        weight: weight.clone(),
    };
    match op {
        Op::Forward { .. } | Op::Command(_) | Op::Gemm { .. } | Op::Compare { .. } => Vec::new(),
        Op::Rope { site, .. } | Op::Attention { site, .. } | Op::Swiglu { site, .. } => {
            vec![unit(&String::new(), Some(site.clone()))]
        }
        Op::Embed { weight } => vec![unit(weight, Some(Site("embed".to_owned())))],
        Op::RmsNorm { weight, .. } => vec![unit(weight, site_of_norm(weight))],
        Op::Matmul { weights, .. } => {
            let weights = projections(weights, model);
            weights.iter().map(|weight| unit(weight, site_of_projection(weight))).collect()
        }
    }
}

fn single(task: &Task<'_>, ops: &dyn Pass, unit: &UnitOp) -> Result<Tensor, ComputeError> {
    let model = task.model;
    let config = model.config();
    let weight = || {
        let name = match unit.weight.as_str() {
            "output" => output_weight(model).to_owned(),
            weight => format!("{weight}.weight"),
        };
        model.tensor(&name)
    };
    let input = |place: usize| {
        let inputs = task.input.unwrap_or_default();
        inputs.get(place).ok_or_else(|| ComputeError::NotRecorded(unit.site.0.clone()))
    };
    let layer = crate::op::in_layer(&unit.site.0).map_or(0, |(layer, _)| layer as usize);
    let sinks;
    let call = match task.op {
        Op::Embed { .. } => Call::Embed { weight: weight()?, tokens: task.tokens },
        Op::RmsNorm { .. } => {
            norm_of(model, &weight_of(&unit.weight, model), input(0)?, config.rms_norm_eps)?
        }
        Op::Matmul { .. } => {
            if unit.weight == "output" && after_output(model).len() > 1 {
                return Err(ComputeError::Recipe(
                    "this model scales or caps its logits, so that a product with the output \
                     matrix is not yet `logits`; look at `logits_raw` of a `[forward]` stage"
                        .to_owned(),
                ));
            }
            let bias = bias_of(model, &unit.weight)?;
            Call::Matmul { x: input(0)?, weight: weight()?, bias }
        }
        Op::Rope { .. } => {
            let x = input(0)?;
            // The part of latent keys that turns is the same for all heads.
            let of_keys = unit.site.0.ends_with(".k_rope");
            let latent = config.latent.filter(|_| of_keys);
            let head_dim = latent.map_or(config.head_dim, |latent| latent.turned);
            check_heads("rope", x, head_dim)?;
            let rope = config.rope_of(layer).ok_or_else(|| {
                ComputeError::Recipe(format!("block {layer} of this model has no RoPE"))
            })?;
            Call::Rope { x, rope, head_dim, first_position: 0 }
        }
        Op::Attention { .. } => {
            sinks = sinks_of(model, layer)?;
            let shape = attention_of(config, layer, 0);
            let shape = AttentionShape { sinks: sinks.as_deref(), ..shape };
            let (heads, kv_heads, head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
            let (q, k, v) = (input(0)?, input(1)?, input(2)?);
            let of_values = kv_heads * shape.value_dim;
            let (expected, given) = (
                [heads * head_dim, kv_heads * head_dim, of_values, k.rows(), k.rows()],
                [q.width(), k.width(), v.width(), v.rows(), q.rows()],
            );
            if expected != given {
                return Err(ComputeError::Shape {
                    what: format!("attention of {heads} heads over {kv_heads} of keys"),
                    left: format!("q [{}, {}]", q.rows(), q.width()),
                    right: format!(
                        "k [{}, {}] and v [{}, {}]",
                        k.rows(),
                        k.width(),
                        v.rows(),
                        v.width()
                    ),
                });
            }
            Call::Attention { q, k, v, shape }
        }
        Op::Swiglu { .. } => {
            Call::Gated { gate: input(0)?, up: input(1)?, activation: config.activation }
        }
        Op::Forward { .. } | Op::Gemm { .. } | Op::Compare { .. } | Op::Command(_) => {
            return Err(ComputeError::NotRecorded(unit.site.0.clone()));
        }
    };
    ops.answer(&unit.site, &call)
}

/// Refuses rows that are no whole heads.
fn check_heads(what: &str, x: &Tensor, head_dim: usize) -> Result<(), ComputeError> {
    if x.width().is_multiple_of(head_dim) {
        return Ok(());
    }
    Err(ComputeError::Shape {
        what: what.to_owned(),
        left: format!("input [{}, {}]", x.rows(), x.width()),
        right: format!("heads of {head_dim}"),
    })
}

/// How wide an op's input must be, by the model that it is for; of inputs in the
/// order of [`Op::inputs`]. For generating one.
///
/// # Errors
/// If the model lacks the op's weight.
pub fn input_width(op: &Op, place: usize, model: &Model) -> Result<usize, ComputeError> {
    let config = model.config();
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let width = match op {
        Op::RmsNorm { .. } => config.hidden,
        Op::Matmul { weights, .. } => match weights.first().map(String::as_str) {
            Some("output") | None => config.hidden,
            Some(weight) => model.tensor(&format!("{}.weight", weight_of(weight, model)))?.width(),
        },
        Op::Rope { site, .. } if site.0.ends_with(".q_rope") => q,
        Op::Attention { .. } if place == 0 => q,
        Op::Attention { .. } if place == 2 => config.kv_heads * config.value_dim(),
        Op::Rope { .. } if config.latent.is_some() => {
            config.latent.map_or(kv, |latent| latent.turned)
        }
        Op::Rope { .. } | Op::Attention { .. } => kv,
        Op::Swiglu { site, .. } => {
            let layer = crate::op::in_layer(&site.0).map_or(0, |(layer, _)| layer);
            match config.experts_of(layer as usize) {
                Some(experts) => experts.routing.used * experts.ffn,
                None => model.tensor(&format!("blk.{layer}.ffn_up.weight"))?.rows(),
            }
        }
        Op::Forward { .. }
        | Op::Embed { .. }
        | Op::Gemm { .. }
        | Op::Compare { .. }
        | Op::Command(_) => config.hidden,
    };
    Ok(width)
}

/// Keeps the sites that were asked for.
struct Recorder<'a> {
    task: &'a Task<'a>,
    capture: Capture,
    sites: Vec<(Site, Tensor)>,
    progress: &'a mut dyn FnMut(&Tensor),
}

impl Sites for Recorder<'_> {
    fn visit(&mut self, site: Site, tensor: Tensor) -> Result<Tensor, ComputeError> {
        (self.progress)(&tensor);
        if self.capture == Capture::EverySite || site.0 == "logits" {
            self.sites.push((site, self.task.put_away(tensor.clone())?));
        }
        Ok(tensor)
    }
}

/// Keeps what was computed at the layers' ends, and lets the pass go on there
/// with what was recorded.
struct LayerAnchor<'a> {
    task: &'a Task<'a>,
    recorded: BTreeMap<&'a Site, &'a Tensor>,
    ends: Vec<(Site, Tensor)>,
}

impl Sites for LayerAnchor<'_> {
    fn visit(&mut self, site: Site, tensor: Tensor) -> Result<Tensor, ComputeError> {
        if site.0 != "embed" && !site.0.ends_with(".ffn_residual") {
            return Ok(tensor);
        }
        let recorded = self.recorded.get(&site);
        let recorded = recorded.ok_or_else(|| ComputeError::NotRecorded(site.0.clone()))?;
        let next = Tensor::clone(recorded);
        self.ends.push((site, self.task.put_away(tensor)?));
        Ok(next)
    }
}

/// Keeps what was computed, and lets the pass go on with what was recorded.
struct Anchor<'a> {
    task: &'a Task<'a>,
    recorded: BTreeMap<&'a Site, &'a Tensor>,
    visits: Vec<Visit>,
}

impl Sites for Anchor<'_> {
    fn visit(&mut self, site: Site, tensor: Tensor) -> Result<Tensor, ComputeError> {
        let fits = |recorded: &&&Tensor| {
            (recorded.rows(), recorded.width()) == (tensor.rows(), tensor.width())
        };
        let recorded = self.recorded.get(&site).filter(fits);
        let held = recorded.is_some();
        let next = recorded.map_or_else(|| tensor.clone(), |recorded| Tensor::clone(recorded));
        self.visits.push(Visit { site, truth: self.task.put_away(tensor)?, held });
        Ok(next)
    }
}

/// The names of the tensors that an op reads, for hashing; of those that exist.
pub fn tensors_read(op: &Op, model: &Model) -> Vec<String> {
    let with_bias = |name: &str| {
        let weight = match name {
            "output" => output_weight(model).to_owned(),
            name => format!("{name}.weight"),
        };
        [weight, format!("{name}.bias")]
    };
    let names: Vec<String> = match op {
        Op::Forward { .. } => model.names().map(str::to_owned).collect(),
        Op::Embed { weight } => with_bias(weight).to_vec(),
        Op::RmsNorm { weight, .. } => with_bias(&weight_of(weight, model)).to_vec(),
        Op::Matmul { weights, .. } => {
            projections(weights, Some(model)).iter().flat_map(|name| with_bias(name)).collect()
        }
        Op::Attention { site, .. } => {
            let layer = crate::op::in_layer(&site.0).map_or(0, |(layer, _)| layer);
            vec![format!("blk.{layer}.attn_sinks.weight")]
        }
        Op::Rope { .. }
        | Op::Swiglu { .. }
        | Op::Gemm { .. }
        | Op::Compare { .. }
        | Op::Command(_) => Vec::new(),
    };
    names.into_iter().filter(|name| model.has(name)).collect()
}

/// Refuses weights that hold NaN or infinities where the op reads them, if what an arm made of them
/// holds some: every arm must give these. Weights are looked at only then.
///
/// # Errors
/// If there is such a weight, with the place of its first such value.
pub fn check_weights(task: &Task<'_>, output: &Output) -> Result<(), ComputeError> {
    let is_finite = |(_, x): &(Site, Tensor)| x.data().iter().all(|value| value.is_finite());
    if output.sites.iter().all(is_finite) {
        return Ok(());
    }
    let model = task.model;
    let decoded = output.greedy.iter().flat_map(|greedy| &greedy.tokens);
    let tokens: Vec<usize> = task.tokens.iter().chain(decoded).map(|t| *t as usize).collect();
    // Rows of other tokens are read where the matrix gives logits too.
    let embedding = "token_embd.weight";
    let looks_up = match task.op {
        Op::Embed { .. } => true,
        Op::Forward { .. } => output_weight(model) != embedding,
        _ => false,
    };
    // A cache's scales were looked at before anything ran.
    let read = tensors_read(task.op, model);
    for name in read.into_iter().filter(|name| !name.ends_with("_cache.scale")) {
        if interrupt::requested() {
            return Err(ComputeError::Interrupted);
        }
        let rows = match looks_up && name == embedding {
            true => tokens.clone(),
            false => (0..model.tensor(&name)?.rows()).collect(),
        };
        model.check_finite(&name, &rows).map_err(ComputeError::NotFinite)?;
    }
    Ok(())
}
