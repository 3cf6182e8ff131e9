//! All measures of one stage: which streams are held against which.
//!
//! It derives the streams that no arm computes (the anchored reference, the
//! predicted floor) and measures every pair that a contract may ask for.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::account::{Account, accounts};
use super::cost::{Cost, Ledger, Part};
use super::diagnosis::Diagnosis;
use super::growth::{Growth, growth};
use super::logits::{batch_ratio, flip_deviation, flips_unexplained};
use super::{GreedyComparison, Measure, Predicted, greedy, measure};
use crate::compute::ComputeError;
use crate::compute::arms::{
    EngineSite, Local, Output, Task, anchored_by_layer, by_engine, drawn, local,
};
use crate::compute::floor::Deviations;
use crate::compute::flow;
use crate::compute::shares::Shares;
use crate::engine::Product;
use crate::metric::Metric;
use crate::op::{Arm, Capture, LOGITS_IN_BATCH, Op, Recipe, Site, Stream};
use crate::tensor::Tensor;

/// Everything measured in one stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageMeasures {
    /// In the order of the flow, within each pair of streams.
    #[serde(with = "super::measures_json")]
    pub measures: Vec<Measure>,
    /// Of arms that decoded.
    pub greedy: Vec<GreedyComparison>,
    /// Each site's error beside its floor.
    #[serde(default)]
    pub accounts: Vec<Account>,
    /// The shares of each arm's error over all its GEMMs.
    #[serde(default)]
    pub shares: Vec<(Stream, Shares)>,
    /// How each arm's drift grows over the layers.
    #[serde(default)]
    pub growth: Vec<Growth>,
    /// What was found at the first site that the contract falsifies.
    #[serde(default)]
    pub diagnoses: Vec<Diagnosis>,
    /// Which kernel of an engine made each site.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<SiteKernel>,
    /// What the parts of the measures took when they were made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub costs: Vec<Cost>,
}

/// The kernel of an engine that comes nearest to what an arm holds at a site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteKernel {
    /// The arm.
    pub subject: Stream,
    /// The site.
    pub site: Site,
    /// The kernel.
    pub kernel: String,
    /// Values whose bits it does not give.
    pub mismatches: usize,
    /// All values.
    pub values: usize,
    /// Other kernels that fit as well: these values do not tell them apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    /// Of a product the shape of each call, and the order in which it is added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub products: Vec<Product>,
}

/// How much of a stage is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// Arms against each other and against an engine's kernels. What the reference makes of an
    /// arm's own inputs, and the floors there, cost three passes more and say nothing of an
    /// arm whose every bit is predicted.
    Bits,
    /// Everything.
    Whole,
}

/// Measures what the arms made of a stage. Where an engine's own arithmetic stands in
/// the recipe's place (`emulated_engine`), the recipe predicts no drift.
///
/// # Errors
/// If an anchored stream or a floor cannot be computed.
pub fn measure_stage(
    task: &Task<'_>,
    recipe: &Recipe,
    emulated_engine: bool,
    outputs: &BTreeMap<Arm, Output>,
    extent: Extent,
) -> Result<StageMeasures, ComputeError> {
    let mut all = StageMeasures::default();
    let mut ledger = Ledger::default();
    let reference = outputs.get(&Arm::Reference);
    let every_site = matches!(task.op, Op::Forward { capture: Capture::EverySite, .. });
    // Of a pass whose logits alone are known there is nothing to anchor on.
    let of_logits = !every_site && matches!(task.op, Op::Forward { .. });
    // Where every site is known, drift is predicted layer by layer instead.
    let drawn = match reference {
        Some(reference) if of_logits && outputs.len() > 1 && !emulated_engine => {
            let doubts = |drawn: &[Tensor]| in_doubt(reference, outputs, drawn);
            ledger.time(Part::DrawnPasses, None, || drawn(task, recipe, &doubts))?
        }
        _ => Vec::new(),
    };
    for (&arm, output) in outputs {
        all.measures.extend(repeats(arm, output));
        if of_logits {
            let subject = Some(Stream::Arm(arm));
            let of_batch = ledger.time(Part::Comparisons, subject, || batch(arm, output, &drawn));
            all.measures.extend(of_batch);
        }
    }
    let mut known: Option<(&Output, Rc<Own>)> = None;
    for (&arm, output) in outputs.iter().filter(|(arm, _)| **arm != Arm::Reference) {
        let subject = Stream::Arm(arm);
        // Growth needs every layer's end; the rest is measured where the arm holds it.
        let whole = reference.is_some_and(|reference| same_sites(output, reference));
        // Equal tensors have equal inputs: what was computed for one arm holds for the other.
        let own = match &known {
            Some((twin, own)) if same_bits(twin, output) => Rc::clone(own),
            _ if reference.is_some() && extent == Extent::Whole && !of_logits => {
                let own = || Own::of(task, recipe, output);
                Rc::new(ledger.time(Part::OwnInputs, Some(subject), own)?)
            }
            _ => Rc::new(Own::default()),
        };
        known = Some((output, Rc::clone(&own)));
        let (accounts, shares) = accounts(subject, &own.local, |site| output.site(site));
        all.accounts.extend(accounts);
        all.shares.extend(shares.map(|shares| (subject, shares)));
        if every_site && !own.local.is_empty() {
            // Local errors first: they tell where something starts.
            let local = || local_measures(task, (arm, output), &own, reference);
            all.measures.extend(ledger.time(Part::Comparisons, Some(subject), local));
        }
        if reference.is_some() && every_site {
            let by_engine = match arm {
                Arm::Recorded | Arm::External | Arm::Device if recipe.engine.is_some() => {
                    let kernels = || by_engine(task, recipe, output);
                    ledger.time(Part::Kernels, Some(subject), kernels)?
                }
                _ => Vec::new(),
            };
            // What follows from a guess is held to nothing, unless it is met.
            let finite = |tensor: &Tensor| tensor.data().iter().all(|value| value.is_finite());
            let is_held = |found: &&EngineSite| {
                let is_met = found.chosen.mismatches == 0;
                let is_finite = output.site(&found.site).is_none_or(finite);
                !found.guessed || is_met || !is_finite
            };
            let predicted: Vec<(Site, Tensor)> = by_engine
                .iter()
                .filter(is_held)
                .map(|found| (found.site.clone(), found.chosen.tensor.clone()))
                .collect();
            if !predicted.is_empty() {
                let judge = (Stream::Predicted(arm), &named(&predicted));
                let held = || pairs((subject, &output.sites), judge, &BTreeMap::new(), &[]);
                all.measures.extend(ledger.time(Part::Comparisons, Some(subject), held));
            }
            all.kernels.extend(by_engine.into_iter().map(|found| SiteKernel {
                subject,
                site: found.site,
                values: found.chosen.tensor.data().len(),
                kernel: found.chosen.kernel,
                mismatches: found.chosen.mismatches,
                also: found.chosen.also,
                products: found.chosen.products.clone(),
            }));
        }
        for judge in [Arm::Reference, Arm::Emulated].into_iter().filter(|judge| *judge < arm) {
            let Some(judged_by) = outputs.get(&judge) else { continue };
            // The floor of a forward pass is local; it says nothing of what was inherited.
            let local = judge == Arm::Reference && !every_site;
            let floors = if local { own.sigmas() } else { BTreeMap::new() };
            let drawn = if judge == Arm::Reference { drawn.as_slice() } else { &[] };
            let judge = (Stream::Arm(judge), &named(&judged_by.sites));
            let held = || pairs((subject, &output.sites), judge, &floors, drawn);
            all.measures.extend(ledger.time(Part::Comparisons, Some(subject), held));
            if let (Some(a), Some(b)) = (&output.greedy, &judged_by.greedy) {
                let logits = Site("logits".to_owned());
                let both = output.site(&logits).zip(judged_by.site(&logits));
                let sigma = both.and_then(|(a, b)| flip_deviation(a, b, drawn));
                all.greedy.push(greedy((subject, a), (judge.0, b), sigma));
            }
        }
        let grows = every_site && whole && extent == Extent::Whole;
        if let Some(reference) = reference.filter(|_| grows) {
            let by_layer = match own.by_layer.get() {
                Some(known) => known,
                None => {
                    let layers = || anchored_by_layer(task, output);
                    let anchored = ledger.time(Part::Layers, Some(subject), layers)?;
                    own.by_layer.get_or_init(|| anchored)
                }
            };
            let sites = (subject, output.sites.as_slice());
            all.growth.extend(growth(sites, &reference.sites, by_layer, &own.sigmas()));
        }
    }
    all.costs = ledger.costs();
    Ok(all)
}

/// Whether a few drawn passes leave open what an arm's logits are.
fn in_doubt(reference: &Output, outputs: &BTreeMap<Arm, Output>, drawn: &[Tensor]) -> bool {
    let logits = Site("logits".to_owned());
    let judge = reference.site(&logits);
    let mut subjects = outputs.values().filter_map(|output| output.site(&logits));
    let flips = judge.is_some_and(|judge| subjects.any(|s| flips_unexplained(s, judge, drawn)));
    // A choice of experts that hangs on a rounding may fall otherwise in the batch, and
    // in none of a few draws.
    let leaves = |output: &Output| {
        let in_batch = output.site(&Site(LOGITS_IN_BATCH.to_owned()));
        let pair = in_batch.zip(output.site(&logits));
        let ratio = pair.and_then(|(batch, alone)| batch_ratio(batch, alone, drawn));
        ratio.is_some_and(|ratio| ratio > 1.0)
    };
    flips || outputs.values().any(leaves)
}

/// An arm's sites against what the reference makes of its own inputs.
fn local_measures(
    task: &Task<'_>,
    (arm, output): (Arm, &Output),
    own: &Own,
    reference: Option<&Output>,
) -> Vec<Measure> {
    let (subject, anchor) = (Stream::Arm(arm), Stream::Anchored(arm));
    let mut local = pairs((subject, &output.sites), (anchor, &own.truths()), &own.sigmas(), &[]);
    // What has another shape than the model's has no truth; the shapes say why.
    for measure in local.iter_mut().filter(|measure| measure.metrics.is_empty()) {
        let expected = reference.and_then(|reference| reference.site(&measure.site));
        if let (Some(expected), Some(found)) = (expected, output.site(&measure.site)) {
            let (found, judge) = ((subject, found), (anchor, expected));
            let found = super::measure(&measure.site, found, judge, Predicted::default());
            measure.unmeasured = found.unmeasured;
        }
    }
    if matches!(arm, Arm::Recorded | Arm::External) {
        drop_places_over_gaps(task, output, &mut local);
    }
    local
}

/// Tensors by their sites.
fn named(tensors: &[(Site, Tensor)]) -> BTreeMap<&Site, &Tensor> {
    tensors.iter().map(|(site, tensor)| (site, tensor)).collect()
}

/// Whether two arms made the same sites, bit for bit.
fn same_bits(a: &Output, b: &Output) -> bool {
    let same = |(a, b): (&(Site, Tensor), &(Site, Tensor))| {
        let values = a.1.data().iter().zip(b.1.data());
        a.0 == b.0
            && a.1.rows() == b.1.rows()
            && a.1.width() == b.1.width()
            && values.into_iter().all(|(a, b)| a.to_bits() == b.to_bits())
    };
    a.sites.len() == b.sites.len() && a.sites.iter().zip(&b.sites).all(same)
}

/// What an arm's own inputs say about its sites.
#[derive(Default)]
struct Own {
    local: Vec<Local>,
    /// The reference layer by layer on the arm's own residual stream, once it was asked for.
    by_layer: OnceCell<Vec<(Site, Tensor)>>,
}

impl Own {
    fn of(task: &Task<'_>, recipe: &Recipe, output: &Output) -> Result<Own, ComputeError> {
        Ok(Own { local: local(task, recipe, output)?, by_layer: OnceCell::new() })
    }

    fn truths(&self) -> BTreeMap<&Site, &Tensor> {
        self.local.iter().map(|local| (&local.site, &local.truth)).collect()
    }

    fn sigmas(&self) -> BTreeMap<&Site, &Deviations> {
        self.local.iter().filter_map(|local| Some((&local.site, local.sigma.as_ref()?))).collect()
    }
}

/// Measures arms against each other where no model is known: no local truth, and of
/// floors those of a recording, where somebody predicted them.
pub fn measure_arms(outputs: &BTreeMap<Arm, Output>, floors: &[(Site, Tensor)]) -> StageMeasures {
    let deviations = |each: &Tensor| Deviations { each: each.clone(), shared: None };
    let floors: Vec<(Site, Deviations)> =
        floors.iter().map(|(site, each)| (site.clone(), deviations(each))).collect();
    let floors = floors.iter().map(|(site, floor)| (site, floor)).collect();
    let none = BTreeMap::new();
    let mut all = StageMeasures::default();
    let mut ledger = Ledger::default();
    for (&arm, output) in outputs.iter().filter(|(arm, _)| **arm != Arm::Reference) {
        for judge in [Arm::Reference, Arm::Emulated].into_iter().filter(|judge| *judge < arm) {
            let Some(judged_by) = outputs.get(&judge) else { continue };
            let of_recording = arm == Arm::Recorded && judge == Arm::Reference;
            let floors = if of_recording { &floors } else { &none };
            let judge = (Stream::Arm(judge), &named(&judged_by.sites));
            let subject = Stream::Arm(arm);
            let held = || pairs((subject, &output.sites), judge, floors, &[]);
            all.measures.extend(ledger.time(Part::Comparisons, Some(subject), held));
        }
    }
    all.costs = ledger.costs();
    all
}

/// Whether two outputs have the same sites in the same shapes.
fn same_sites(a: &Output, b: &Output) -> bool {
    let shape = |tensor: &Tensor| (tensor.rows(), tensor.width());
    a.sites.len() == b.sites.len()
        && a.sites.iter().zip(&b.sites).all(|((a, x), (b, y))| a == b && shape(x) == shape(y))
}

/// A subject's sites against the judge's, in the subject's order, with the floors of
/// the sites and the drawn logits where there are any. A site that
/// the judge lacks is measured as missing, never left out.
fn pairs(
    (subject_stream, subject): (Stream, &[(Site, Tensor)]),
    (judge_stream, judge): (Stream, &BTreeMap<&Site, &Tensor>),
    floors: &BTreeMap<&Site, &Deviations>,
    drawn: &[Tensor],
) -> Vec<Measure> {
    subject
        .par_iter()
        .map(|(site, tensor)| match judge.get(site) {
            Some(judged) => {
                let predicted = Predicted { floor: floors.get(site).copied(), drawn };
                measure(site, (subject_stream, tensor), (judge_stream, judged), predicted)
            }
            None => Measure {
                subject: subject_stream,
                judge: judge_stream,
                site: site.clone(),
                shape: [tensor.rows(), tensor.width()],
                metrics: BTreeMap::new(),
                unmeasured: Some(format!("{judge_stream} has no such site")),
                worst: None,
                first_mismatches: Vec::new(),
                z_histogram: None,
                chance: BTreeMap::new(),
            },
        })
        .collect()
}

/// Takes last places out of the measures of sites whose op read what an engine did not hand over: the
/// truth there spans several ops, each with roundings of its own, and no claim of one rounding fits it.
fn drop_places_over_gaps(task: &Task<'_>, output: &Output, local: &mut [Measure]) {
    for measure in local {
        let read = flow::read_by(task.model, task.op.kv_cache(), &measure.site);
        if read.iter().any(|read| output.site(read).is_none()) {
            for metric in [Metric::MaxUlp, Metric::RowUlp] {
                measure.metrics.remove(&metric);
            }
        }
    }
}

/// An arm against itself: the same tokens alone and within a batch.
fn batch(arm: Arm, output: &Output, drawn: &[Tensor]) -> Option<Measure> {
    let site = Site(LOGITS_IN_BATCH.to_owned());
    let (batch, alone) = (output.site(&site)?, output.site(&Site("logits".to_owned()))?);
    let stream = Stream::Arm(arm);
    let whole = measure(&site, (stream, batch), (stream, alone), Predicted::default());
    let renamed =
        [(Metric::BitMismatches, Metric::BatchMismatches), (Metric::Nmse, Metric::BatchNmse)];
    let metrics = renamed
        .into_iter()
        .filter_map(|(plain, of_batch)| whole.metrics.get(&plain).map(|value| (of_batch, *value)));
    let mut metrics: BTreeMap<Metric, f64> = metrics.collect();
    let finite = whole.unmeasured.is_none();
    let ratio = batch_ratio(batch, alone, drawn).filter(|_| finite);
    metrics.extend(ratio.map(|ratio| (Metric::BatchRatio, ratio)));
    Some(Measure { metrics, ..whole.clone() })
}

/// An arm against its own repeats.
fn repeats(arm: Arm, output: &Output) -> Vec<Measure> {
    let stream = Stream::Arm(arm);
    let repeated = output.sites.iter().filter_map(|(site, tensor)| {
        let mismatches = *output.repeats.get(site)? as f64;
        Some(Measure {
            subject: stream,
            judge: stream,
            site: site.clone(),
            shape: [tensor.rows(), tensor.width()],
            metrics: BTreeMap::from([(Metric::BitMismatches, mismatches)]),
            unmeasured: None,
            worst: None,
            first_mismatches: Vec::new(),
            z_histogram: None,
            chance: BTreeMap::new(),
        })
    });
    repeated.collect()
}
