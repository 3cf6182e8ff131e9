//! Where something starts, and what it is: the first suspicious site of an arm,
//! and the fingerprints' answer to it.
//!
//! A site is suspicious by itself, whatever a contract allows: it lies outside
//! its predicted floor, or the device's bits are not the emulated arm's. It
//! gives no verdict.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::Measure;
use super::fingerprints::{Case, Fit, rank};
use crate::compute::ComputeError;
use crate::compute::arms::{Output, Task, is_gemm, on_recorded};
use crate::compute::call::Watched;
use crate::compute::emulated::arm::Emulated;
use crate::metric::Metric;
use crate::op::{Arm, LOGITS_IN_BATCH, Op, Recipe, Site, Stream, in_layer};
use crate::tensor::Tensor;
use crate::text::{grouped, number};

/// Deviations that no value exceeds: the union bound over 17 million values at a
/// risk of 2e-5, `sqrt(2 ln(2 n / risk))`.
pub const MOST_DEVIATIONS: f64 = 7.5;
/// A GEMM's root mean square of z; 1 is expected, and several hundred values
/// shift it by a few per cent.
pub const Z_RMS: (f64, f64) = (0.8, 1.25);

/// What was found at the first suspicious site of an arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Whose result is in question.
    pub subject: Stream,
    /// What it was held against.
    pub judge: Stream,
    /// The first suspicious site.
    pub site: Site,
    /// The op that makes it.
    pub op: String,
    /// What is suspicious about it, in words.
    pub evidence: String,
    /// The local error over its floor, where both are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Layers after it, which inherit the error.
    pub later_layers: usize,
    /// Other sites that are suspicious by themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<Site>,
    /// Whether the result is the prescribed one to the bit, so that the recipe
    /// itself leaves its floor on these operands.
    pub prescribed: bool,
    /// Hypotheses, the best first.
    pub fits: Vec<Fit>,
}

impl Diagnosis {
    /// The cause, where a hypothesis explains enough.
    pub fn cause(&self) -> Option<&Fit> {
        self.fits.first().filter(|fit| fit.names_the_bug())
    }

    /// What is wrong, in a sentence.
    pub fn sentence(&self) -> String {
        match (self.cause(), self.fits.first()) {
            _ if self.prescribed => {
                "it is what the recipe prescribes, bit for bit: these operands leave its floor"
                    .to_owned()
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
            (None, Some(fit)) => format!(
                "no fingerprint fits; nearest is {} with {:.0} %",
                fit.cause,
                100.0 * fit.explained.clamp(0.0, 1.0)
            ),
            (None, None) => "no fingerprint applies".to_owned(),
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
            Stream::Arm(_) => format!("first site where {} is not {}", self.subject, self.judge),
            Stream::Anchored(_) => "first site outside its floor".to_owned(),
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
            1 => parts.push("1 later layer inherits it".to_owned()),
            many => parts.push(format!("{many} later layers inherit it")),
        }
        if !self.also.is_empty() {
            let shown: Vec<&str> = self.also.iter().take(3).map(|site| site.0.as_str()).collect();
            let more = if self.also.len() > 3 { ", ..." } else { "" };
            parts.push(format!(
                "{} more sites are suspicious by themselves ({}{more})",
                self.also.len(),
                shown.join(", ")
            ));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// The diagnosis that says most about a stage: bits are sharper than floors.
pub fn sharpest(all: &[Diagnosis]) -> Option<&Diagnosis> {
    let exact = all.iter().find(|diagnosis| diagnosis.judge == Stream::Arm(Arm::Emulated));
    exact.or(all.first())
}

/// What is suspicious about a site, measured against the reference on its own inputs.
pub fn outside_floor(measure: &Measure) -> Option<String> {
    let value = |metric| measure.metrics.get(&metric).copied();
    if let Some(count) = value(Metric::NonFinite)
        && count > 0.0
    {
        return Some(format!("{} values are NaN or infinite", number(count)));
    }
    for (metric, what) in
        [(Metric::ZMax, "a value"), (Metric::ZRow, "a row"), (Metric::ZColumn, "a column")]
    {
        if let Some(z) = value(metric)
            && z > MOST_DEVIATIONS
        {
            return Some(format!("{what} lies {} deviations off", number(z)));
        }
    }
    let rms = value(Metric::ZRms).filter(|_| is_gemm(&measure.site))?;
    let within = rms >= Z_RMS.0 && rms <= Z_RMS.1;
    (!within).then(|| format!("the local error is {} times its floor", number(rms)))
}

/// The measures of one pair of streams whose site is suspicious.
pub fn suspicious(measures: &[Measure], subject: Stream, judge: Stream) -> Vec<(&Measure, String)> {
    let of_pair = measures.iter().filter(|m| m.subject == subject && m.judge == judge);
    of_pair
        .filter_map(|measure| {
            let differing = measure.metrics.get(&Metric::BitMismatches).copied().unwrap_or(0.0);
            let evidence = match judge {
                Stream::Arm(Arm::Emulated) => (differing > 0.0).then(|| {
                    format!("{} values differ in their bits", grouped(differing as usize))
                }),
                _ => outside_floor(measure),
            };
            Some((measure, evidence?))
        })
        .collect()
}

/// What a diagnosis reads.
pub struct Scene<'a> {
    /// The stage's op, model and prompt.
    pub task: &'a Task<'a>,
    /// The recipe.
    pub recipe: &'a Recipe,
    /// The arms' results.
    pub outputs: &'a BTreeMap<Arm, Output>,
}

/// Diagnoses the first suspicious site of an arm.
///
/// # Errors
/// If its op cannot be computed again.
pub fn diagnose(
    scene: &Scene<'_>,
    arm: Arm,
    judge: Stream,
    found: &[(&Measure, String)],
) -> Result<Option<Diagnosis>, ComputeError> {
    let (Some((measure, evidence)), Some(output)) = (found.first(), scene.outputs.get(&arm)) else {
        return Ok(None);
    };
    let site = &measure.site;
    let exact = matches!(judge, Stream::Arm(_));
    let layers = scene.task.model.config().layers;
    let later_layers = match (in_layer(&site.0), scene.task.op) {
        (Some((layer, _)), Op::Forward { .. }) => layers.saturating_sub(layer as usize + 1),
        (None, Op::Forward { .. }) if site.0 == "embed" => layers,
        _ => 0,
    };
    // What follows a differing bit differs because of it; a floor is local.
    let also = if exact { &[] } else { &found[1..] };
    let mut diagnosis = Diagnosis {
        subject: Stream::Arm(arm),
        judge,
        site: site.clone(),
        op: "logits of a whole pass".to_owned(),
        evidence: evidence.clone(),
        ratio: measure.metrics.get(&Metric::ZRms).copied().filter(|_| !exact && is_gemm(site)),
        later_layers,
        also: also.iter().map(|(measure, _)| measure.site.clone()).collect(),
        prescribed: false,
        fits: Vec::new(),
    };
    let examined = examine(scene, output, site)?;
    if let Some((op, prescribed, fits)) = examined {
        (diagnosis.op, diagnosis.prescribed, diagnosis.fits) = (op, prescribed, fits);
    }
    Ok(Some(diagnosis))
}

type Examined = (String, bool, Vec<Fit>);

/// Computes one site's op again, under every hypothesis.
fn examine(
    scene: &Scene<'_>,
    output: &Output,
    wanted: &Site,
) -> Result<Option<Examined>, ComputeError> {
    let Some(subject) = output.site(wanted) else { return Ok(None) };
    let arm = Emulated::new(scene.recipe)?;
    let found: Mutex<Option<Examined>> = Mutex::new(None);
    let watched = Watched::new(|site, call| {
        let [rows, width] = call.shape();
        if site != wanted || (rows, width) != (subject.rows(), subject.width()) {
            return Ok(Tensor::zeros(rows, width));
        }
        let clean = call.on(&arm)?;
        let truth = call.on(&crate::compute::reference::Reference)?;
        let case = Case {
            site,
            call,
            subject,
            clean: &clean,
            truth: &truth,
            arm: &arm,
            recipe: scene.recipe,
            model: scene.task.model,
            recorded: &output.sites,
        };
        let same = subject.data().iter().zip(clean.data());
        let prescribed = same.into_iter().all(|(a, b)| a.to_bits() == b.to_bits());
        let fits = if prescribed { Vec::new() } else { rank(&case)? };
        let mut found = found.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *found = Some((call.op().to_owned(), prescribed, fits));
        Ok(clean)
    });
    on_recorded(scene.task, &watched, output)?;
    drop(watched);
    Ok(found.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// An arm that does not repeat itself.
pub fn not_deterministic(measure: &Measure) -> Option<Diagnosis> {
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
pub fn batch_dependent(measure: &Measure) -> Option<Diagnosis> {
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
        fits: vec![fit],
    }
}
