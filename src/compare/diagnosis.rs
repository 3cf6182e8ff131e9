//! Where something starts, and what it is: the first site that a claim falsifies, and the
//! fingerprints' answer to it.
//!
//! The op of that site is computed again from the arm's own input, under every hypothesis.
//! It knows no contract and gives no verdict: which site comes first is handed to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::fingerprints::{Case, Fit, Null, describe, rank};
use super::{Growth, Measure, SiteKernel, StageMeasures};
use crate::compute::arms::{Output, Task, is_gemm, on_recorded};
use crate::compute::call::{Call, Watched};
use crate::compute::emulated::arm::Emulated;
use crate::compute::{ComputeError, flow};
use crate::engine::LinearKernel;
use crate::metric::Metric;
use crate::op::{self, Arm, LOGITS_IN_BATCH, Op, Recipe, Site, Stream, in_layer};
use crate::tensor::Tensor;
use crate::text::{grouped, number};

/// Deviations that no value exceeds: the union bound over 17 million values at a
/// risk of 2e-5, `sqrt(2 ln(2 n / risk))`.
pub const MOST_DEVIATIONS: f64 = 7.5;

/// What was found at the first site that a claim falsifies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Whose result is in question.
    pub subject: Stream,
    /// What it was held against.
    pub judge: Stream,
    /// The first falsified site.
    pub site: Site,
    /// The op that makes it.
    pub op: String,
    /// What the claim saw there, in words.
    pub evidence: String,
    /// The local error over its floor, where both are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Later layers that add nothing of their own and carry the error on, as computing them
    /// from the arm's own input shows.
    pub later_layers: usize,
    /// Later sites that claims falsify by themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<Site>,
    /// Whether the result is the prescribed one to the bit.
    pub prescribed: bool,
    /// Whether the op is right but for rounding, from the arm's own input.
    #[serde(default)]
    pub within_rounding: bool,
    /// Whether the op read what the judge's op read, to the bit.
    #[serde(default)]
    pub same_input: bool,
    /// The kernel of the engine that gives every bit of the site from the arm's own input, where
    /// the pass took another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_kernel: Option<String>,
    /// What is known of the difference where nothing names it: how many values, where, how
    /// large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<String>,
    /// Hypotheses, the best first.
    pub fits: Vec<Fit>,
}

impl Diagnosis {
    /// What is left to say where looking closely failed: the claim fell by what was measured,
    /// and that stands.
    pub fn unseen(suspect: &Suspect, problem: &str) -> Diagnosis {
        Diagnosis {
            op: suspect.site.0.clone(),
            known: Some(format!("a closer look at it failed: {problem}")),
            ..plain(suspect)
        }
    }

    /// The cause, where a hypothesis explains enough.
    pub fn cause(&self) -> Option<&Fit> {
        self.fits.first().filter(|fit| fit.names_the_bug())
    }

    /// What is wrong, in a sentence.
    pub fn sentence(&self) -> String {
        match (self.cause(), self.fits.first()) {
            _ if self.prescribed => match &self.known {
                Some(known) => format!("what these kernels make of its input, to the bit: {known}"),
                None => "identical to the prediction from the same input: these inputs exceed the \
                         estimated rounding error"
                    .to_owned(),
            },
            _ if self.other_kernel.is_some() => {
                let kernel = self.other_kernel.as_deref().unwrap_or_default();
                // An order of additions stands in words behind the kernel's name.
                let of_order = kernel.starts_with("cuBLAS") || kernel.contains(", ");
                let but = match of_order {
                    true => {
                        "the pass adds as the engine's file lists it: save what `runner identify` prints of \
                         this recording, and name that file as `engine`"
                    }
                    false => {
                        "the pass takes one kernel for each op: the one that most sites of the first two \
                         layers show, else the first that the engine's file lists"
                    }
                };
                format!("{kernel} gives these bits, and {but}")
            }
            (Some(fit), _) if fit.is_exact() => {
                format!(
                    "{}: {} (explains all {} values to the bit)",
                    fit.cause,
                    fit.detail,
                    grouped(fit.elements)
                )
            }
            (Some(fit), _) => format!(
                "{}: {} (explains {:.2} % of the difference)",
                fit.cause,
                fit.detail,
                100.0 * fit.explained
            ),
            _ if self.within_rounding && matches!(self.judge, Stream::Predicted(_)) => {
                "no kernel that the engine lists gives these bits, but all lie within rounding: \
                 another kernel, or another order of additions"
                    .to_owned()
            }
            // The claim's floor is for this very input, so nothing came in with it.
            _ if self.within_rounding && matches!(self.judge, Stream::Anchored(_)) => {
                "the op itself is right within rounding and another order of additions, from the \
                 arm's own input: its error is more than the claim allows, and too small to name"
                    .to_owned()
            }
            _ if self.within_rounding && self.same_input => {
                "from the same input the op is right within rounding: another kernel, or another \
                 order of additions"
                    .to_owned()
            }
            _ if self.within_rounding => {
                "the op itself is right within rounding, from the arm's own input: what is off \
                 came in with that input"
                    .to_owned()
            }
            (None, nearest) => {
                let mut text = "not recognised".to_owned();
                if let Some(known) = &self.known {
                    text += &format!(": {known}");
                }
                if let Some(fit) = nearest.filter(|fit| fit.explained >= MENTIONED) {
                    text += &format!(
                        "; nearest is {} with {:.0} %",
                        fit.cause,
                        100.0 * fit.explained.clamp(0.0, 1.0)
                    );
                }
                text
            }
        }
    }

    /// Where it starts, in words.
    pub fn place(&self) -> String {
        let ratio = match self.ratio {
            Some(ratio) => format!(" (local/floor {ratio:.2})"),
            None => String::new(),
        };
        let what = match self.judge {
            judge if judge == self.subject && self.site.0 == LOGITS_IN_BATCH => {
                "first site that depends on its batch".to_owned()
            }
            judge if judge == self.subject => "first site that does not repeat itself".to_owned(),
            Stream::Arm(Arm::Emulated) => {
                format!("first site where {} differs from the prediction", self.subject)
            }
            Stream::Arm(judge) => format!("first site too far from {judge}"),
            Stream::Anchored(_) => "first site outside its floor".to_owned(),
            Stream::Predicted(_) if self.prescribed => {
                "first site that is wrong although a kernel of the engine gives it".to_owned()
            }
            Stream::Predicted(_) => "first site that no kernel of the engine gives".to_owned(),
        };
        match in_layer(&self.site.0) {
            Some((layer, name)) => format!("{what}: layer {layer}, {name}{ratio}"),
            None => format!("{what}: {}{ratio}", self.site),
        }
    }

    /// What became of it further on, in words.
    pub fn aftermath(&self) -> Option<String> {
        let mut parts = Vec::new();
        match self.later_layers {
            0 => {}
            1 => parts.push("1 later layer inherits it and adds nothing of its own".to_owned()),
            many => {
                parts.push(format!("{many} later layers inherit it and add nothing of their own"))
            }
        }
        if !self.also.is_empty() {
            let shown: Vec<&str> = self.also.iter().take(3).map(|site| site.0.as_str()).collect();
            let more = if self.also.len() > 3 { ", ..." } else { "" };
            let sites = match self.also.len() {
                1 => "site is falsified from its",
                _ => "sites are falsified from their",
            };
            parts.push(format!(
                "{} more {sites} own input ({}{more})",
                self.also.len(),
                shown.join(", ")
            ));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// The share from which a hypothesis is worth a mention beside "not recognised".
const MENTIONED: f64 = 0.3;

/// The site to look at, as a contract found it.
#[derive(Clone, Debug, Serialize)]
pub struct Suspect {
    /// Whose result is in question.
    pub subject: Stream,
    /// What it was held against.
    pub judge: Stream,
    /// The site.
    pub site: Site,
    /// What the claim saw there, in words.
    pub evidence: String,
    /// All sites that claims on the arm's own input falsify.
    pub falsified: BTreeSet<Site>,
}

/// What a diagnosis reads.
pub struct Scene<'a> {
    /// The stage's op, model and prompt.
    pub task: &'a Task<'a>,
    /// The recipe.
    pub recipe: &'a Recipe,
    /// The arms' results.
    pub outputs: &'a BTreeMap<Arm, Output>,
    /// What was measured between them.
    pub measures: &'a StageMeasures,
}

/// Looks at the first falsified site of an arm.
///
/// # Errors
/// If its op cannot be computed again.
pub fn diagnose(scene: &Scene<'_>, suspect: &Suspect) -> Result<Diagnosis, ComputeError> {
    let Suspect { subject, judge, site, .. } = suspect;
    let of_suspect = |m: &&Measure| m.subject == *subject && m.judge == *judge && m.site == *site;
    if subject == judge {
        // The logits within a batch are held to their repeats, and to the logits alone.
        let mut own = scene.measures.measures.iter().filter(of_suspect);
        let of_passes = own.find_map(|m| not_deterministic(m).or_else(|| batch_dependent(m)));
        return Ok(of_passes.unwrap_or_else(|| plain(suspect)));
    }
    let measure = scene.measures.measures.iter().find(of_suspect);
    let Some(output) = scene.outputs.get(&subject.arm()) else { return Ok(plain(suspect)) };
    let exact = matches!(judge, Stream::Arm(Arm::Emulated) | Stream::Predicted(_));
    let local = !exact && is_gemm(site);
    let ratio = measure.and_then(|m| m.metrics.get(&Metric::ZRms).copied()).filter(|_| local);
    let mut diagnosis = Diagnosis { ratio, ..plain(suspect) };
    diagnosis.also =
        suspect.falsified.iter().filter(|s| op::flow(s) > op::flow(site)).cloned().collect();
    diagnosis.also.sort_by_key(op::flow);
    diagnosis.later_layers = inheriting(scene, suspect);
    diagnosis.same_input = same_input(scene, output, suspect);
    if let Some(examined) = examine(scene, (subject.arm(), output), site)? {
        diagnosis.op = examined.op;
        diagnosis.prescribed = examined.prescribed;
        diagnosis.within_rounding = examined.within_rounding;
        diagnosis.known = examined.known;
        diagnosis.fits = examined.fits;
    }
    if *judge == Stream::Arm(Arm::Emulated) && diagnosis.same_input && !diagnosis.prescribed {
        let own = |found: &&SiteKernel| found.subject.arm() == subject.arm() && found.site == *site;
        let found = scene.measures.kernels.iter().find(own);
        diagnosis.other_kernel =
            found.filter(|found| found.mismatches == 0).map(|found| found.kernel.clone());
    }
    Ok(diagnosis)
}

/// Whether a suspect's op read what the op of the arm read that it is held against. The ops of
/// other stages than a forward pass read the stage's own inputs.
fn same_input(scene: &Scene<'_>, output: &Output, suspect: &Suspect) -> bool {
    let (Op::Forward { .. }, Stream::Arm(judge)) = (scene.task.op, suspect.judge) else {
        return true;
    };
    let Some(judge) = scene.outputs.get(&judge) else { return false };
    let read = flow::read_by(scene.task.model, scene.task.op.kv_cache(), &suspect.site);
    let same = |site: &Site| match (output.site(site), judge.site(site)) {
        (Some(a), Some(b)) => {
            let pairs = || a.data().iter().zip(b.data());
            a.data().len() == b.data().len() && pairs().all(|(a, b)| a.to_bits() == b.to_bits())
        }
        _ => false,
    };
    !read.is_empty() && read.iter().all(same)
}

/// A diagnosis that knows no more than the claim.
fn plain(suspect: &Suspect) -> Diagnosis {
    Diagnosis {
        subject: suspect.subject,
        judge: suspect.judge,
        site: suspect.site.clone(),
        op: "logits of a whole pass".to_owned(),
        evidence: suspect.evidence.clone(),
        ratio: None,
        later_layers: 0,
        also: Vec::new(),
        prescribed: false,
        within_rounding: false,
        same_input: false,
        other_kernel: None,
        known: None,
        fits: Vec::new(),
    }
}

/// The layers after the suspect that only carry its error on: no claim falsifies them from
/// their own input, what reads the suspect read its result, and most of their drift was
/// there when they began.
fn inheriting(scene: &Scene<'_>, suspect: &Suspect) -> usize {
    /// The share of a layer's drift that must have come in.
    const MOST: f64 = 0.5;
    let Op::Forward { .. } = scene.task.op else { return 0 };
    let of_arm = |growth: &&Growth| growth.subject == suspect.subject;
    let Some(growth) = scene.measures.growth.iter().find(of_arm) else { return 0 };
    let dropped = suspect.falsified.iter().any(|later| {
        flow::read_by(scene.task.model, scene.task.op.kv_cache(), later).contains(&suspect.site)
    });
    let first = match in_layer(&suspect.site.0) {
        Some((layer, _)) => layer + 1,
        None if suspect.site.0.starts_with("embed") => 0,
        None => return 0,
    };
    let falsified: BTreeSet<u32> =
        suspect.falsified.iter().filter_map(|site| Some(in_layer(&site.0)?.0)).collect();
    let carried = growth.layers.iter().filter(|layer| {
        layer.layer >= first
            && !falsified.contains(&layer.layer)
            && layer.inherited >= MOST * layer.total
    });
    if dropped { 0 } else { carried.count() }
}

/// What computing one site's op again says.
struct Examined {
    op: String,
    prescribed: bool,
    within_rounding: bool,
    known: Option<String>,
    fits: Vec<Fit>,
}

/// Computes one site's op again from the arm's own input, under every hypothesis.
fn examine(
    scene: &Scene<'_>,
    (arm_of, output): (Arm, &Output),
    wanted: &Site,
) -> Result<Option<Examined>, ComputeError> {
    let Some(subject) = output.site(wanted) else { return Ok(None) };
    // Of a forward pass the op's input must be the arm's own, or nothing is said of it; but an
    // engine's kernels give what a recording lacks.
    if matches!(scene.task.op, Op::Forward { .. }) && scene.recipe.engine.is_none() {
        let read = flow::read_by(scene.task.model, scene.task.op.kv_cache(), wanted);
        if read.iter().any(|site| output.site(site).is_none()) {
            return Ok(None);
        }
    }
    // Of several kernels the one that comes nearest is what the hypotheses change.
    let own = |found: &&SiteKernel| found.site == *wanted && found.subject.arm() == arm_of;
    let nearest = scene.measures.kernels.iter().find(own).map(|found| found.kernel.as_str());
    let engine = scene.recipe.engine.map(|engine| engine.with_only(nearest.unwrap_or_default()));
    let recipe = &Recipe { engine, ..*scene.recipe };
    let arm = Emulated::new(recipe)?;
    let found: Mutex<Option<Examined>> = Mutex::new(None);
    let units = Mutex::new(0usize);
    let position = output.sites.iter().position(|(site, _)| site == wanted);
    let single = !matches!(scene.task.op, Op::Forward { .. });
    let watched = Watched::new(|site, call| {
        let [rows, width] = call.shape();
        let number = {
            let mut units = units.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *units += 1;
            *units - 1
        };
        // The sites of single ops have the stage's own names, in the stage's order.
        let here = if single { Some(number) == position } else { site == wanted };
        if !here || (rows, width) != (subject.rows(), subject.width()) {
            // What the arm holds stands in its place anyway.
            let needed = !single && output.site(site).is_none();
            return match needed && scene.recipe.engine.is_some() {
                true => call.on(&arm),
                false => Ok(Tensor::zeros(rows, width)),
            };
        }
        let clean = call.on(&arm)?;
        let truth = call.on(&crate::compute::reference::Reference)?;
        let same = subject.data().iter().zip(clean.data());
        let prescribed = same.into_iter().all(|(a, b)| a.to_bits() == b.to_bits());
        let null = Null::of(call, &clean, &arm, recipe)?;
        let of_weight = match call {
            Call::Matmul { weight, .. } => arm.of_weight(weight)?,
            _ => None,
        };
        let (arm, recipe) = match &of_weight {
            Some(arm) => (arm, arm.recipe()),
            None => (&arm, recipe),
        };
        let case = Case {
            site: wanted,
            call,
            subject,
            clean: &clean,
            truth: &truth,
            null: &null,
            arm,
            recipe,
            model: Some(scene.task.model),
            recorded: &output.sites,
        };
        let fits = if prescribed { Vec::new() } else { rank(&case)? };
        let examined = Examined {
            op: call.op().to_owned(),
            prescribed,
            within_rounding: !prescribed && null.explains(subject, &clean),
            known: match prescribed {
                true => not_finite(call, subject, scene.recipe),
                false => describe(&case),
            },
            fits,
        };
        let mut found = found.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *found = Some(examined);
        Ok(clean)
    });
    on_recorded(scene.task, &watched, output)?;
    drop(watched);
    Ok(found.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// What NaN and infinities come of that the op must give, and where they begin; nothing where
/// there are none.
fn not_finite(call: &Call<'_>, subject: &Tensor, recipe: &Recipe) -> Option<String> {
    // Of the engines only torchao was seen to divide by the scale of a row of zeros.
    let divides = |weight: &str| {
        let kernel = recipe.engine.and_then(|engine| engine.linear_of(weight).first());
        kernel == Some(LinearKernel::TorchaoFp8Row)
    };
    let spoilt = |x: &Tensor, row: usize| x.row(row).iter().any(|value| !value.is_finite());
    let row = (0..subject.rows()).find(|&row| spoilt(subject, row))?;
    Some(match call {
        Call::Matmul { x, .. } if spoilt(x, row) => {
            format!("row {row} came in with NaN or infinities")
        }
        Call::Matmul { x, weight, .. }
            if divides(weight.name()) && x.row(row).iter().all(|&value| value == 0.0) =>
        {
            format!("row {row} came in as zeros alone, whose scale is 0, and 0 / 0 is NaN")
        }
        _ => format!("row {row} is the first with NaN or infinities"),
    })
}

/// An arm that does not repeat itself.
fn not_deterministic(measure: &Measure) -> Option<Diagnosis> {
    let differing = measure.metrics.get(&Metric::BitMismatches).copied().filter(|n| *n > 0.0)?;
    let elements = measure.shape[0] * measure.shape[1];
    let detail = format!(
        "{} of {} values change from one repeat to the next",
        grouped(differing as usize),
        grouped(elements)
    );
    Some(of_passes(measure, "the repeats of a whole pass", "non-determinism", detail))
}

/// How far a batch may move the logits, over what drawn roundings predict: as the
/// contract reproducer.
const MOST_OF_BATCH: f64 = 1.5;

/// An arm whose logits depend on what stands beside the prompt.
fn batch_dependent(measure: &Measure) -> Option<Diagnosis> {
    let ratio = *measure.metrics.get(&Metric::BatchRatio)?;
    let detail = format!(
        "when other tokens follow the prompt in the batch, its logits move {} times as far as \
         rounding carries them",
        number(ratio)
    );
    let within = ratio <= MOST_OF_BATCH;
    (!within).then(|| of_passes(measure, "a whole pass over a batch", "batch-dependence", detail))
}

/// What whole passes alone tell: the cause, not the op.
fn of_passes(measure: &Measure, op: &str, cause: &str, detail: String) -> Diagnosis {
    let fit = Fit {
        cause: cause.to_owned(),
        detail: detail.clone(),
        explained: 1.0,
        mismatches: 0,
        elements: measure.shape[0] * measure.shape[1],
        parameters: 0,
        significant: true,
        gain: 0.0,
    };
    Diagnosis {
        subject: measure.subject,
        judge: measure.judge,
        site: measure.site.clone(),
        op: op.to_owned(),
        evidence: detail,
        ratio: None,
        later_layers: 0,
        also: Vec::new(),
        prescribed: false,
        within_rounding: false,
        same_input: true,
        other_kernel: None,
        known: None,
        fits: vec![fit],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_the_pass_did_not_take_is_told_from_an_order() {
        let suspect = Suspect {
            subject: Stream::Arm(Arm::Recorded),
            judge: Stream::Arm(Arm::Emulated),
            site: Site("blk.2.attn".to_owned()),
            evidence: String::new(),
            falsified: BTreeSet::new(),
        };
        let said = |kernel: &str| {
            let other_kernel = Some(kernel.to_owned());
            Diagnosis { other_kernel, ..plain(&suspect) }.sentence()
        };
        assert!(said("attention flash-2").contains("takes one kernel for each op"));
        for order in ["cuBLAS in 3 parts of K", "attention eager, scores in one chain"] {
            assert!(said(order).contains("`runner identify`"), "{}", said(order));
        }
    }

    #[test]
    fn a_closer_look_that_failed_leaves_what_the_claim_saw() {
        let suspect = Suspect {
            subject: Stream::Arm(Arm::Recorded),
            judge: Stream::Anchored(Arm::Recorded),
            site: Site("blk.0.q".to_owned()),
            evidence: "z_rms is 9, and ENG-003 allows at most 1.25".to_owned(),
            falsified: BTreeSet::new(),
        };
        let diagnosis = Diagnosis::unseen(&suspect, "the shapes differ");
        let said = "not recognised: a closer look at it failed: the shapes differ";
        assert_eq!(diagnosis.sentence(), said);
        assert_eq!(diagnosis.place(), "first site outside its floor: layer 0, q");
        assert_eq!(diagnosis.evidence, suspect.evidence);
    }
}
