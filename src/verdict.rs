//! Measures and a contract become one verdict.
//!
//! It computes nothing from tensors, so a changed contract is judged anew from
//! stored measures. A bound holds only if the value is there, is finite and
//! lies within it; nothing passes by being absent.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::compare::{Diagnosis, Measure, SiteKernel, StageMeasures};
use crate::compute::arms::is_gemm;
use crate::manifest::{Contract, Falsifier, IfFails, names_site};
use crate::metric::Metric;
use crate::op::{Arm, Site, Stream, flow};
use crate::text::{grouped, number, percent};

/// The answer to a stage's question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Everything was measured and nothing falsified.
    Pass,
    /// Explained by the recipe's arithmetic, but beyond the contract's budget.
    Drift,
    /// Unexplained: a bug.
    Structural,
    /// Nothing, or too little, was compared.
    Unmeasured,
    /// A stage that it needs has no result.
    Blocked,
    /// It could not run.
    Error,
}

impl Verdict {
    /// The word that reports print.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Drift => "drift",
            Verdict::Structural => "structural",
            Verdict::Unmeasured => "unmeasured",
            Verdict::Blocked => "blocked",
            Verdict::Error => "error",
        }
    }

    /// The run's verdict: the gravest of its stages'. A proven bug outweighs
    /// what could not be tried.
    pub fn of_run(stages: impl IntoIterator<Item = Verdict>) -> Verdict {
        let gravity = |verdict: &Verdict| match verdict {
            Verdict::Pass => 0,
            Verdict::Unmeasured => 1,
            Verdict::Blocked => 2,
            Verdict::Error => 3,
            Verdict::Drift => 4,
            Verdict::Structural => 5,
        };
        stages.into_iter().max_by_key(gravity).unwrap_or(Verdict::Unmeasured)
    }

    /// The process's exit code for a run with this verdict.
    pub fn exit_code(self) -> u8 {
        match self {
            Verdict::Pass => 0,
            Verdict::Drift | Verdict::Structural => 1,
            Verdict::Unmeasured => 3,
            Verdict::Blocked | Verdict::Error => 4,
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What became of one falsifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Every value lies within the bounds.
    Held,
    /// A value lies outside.
    Falsified,
    /// There was no value to judge.
    Unmeasured,
}

/// One falsifier's judgement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The falsifier.
    pub falsifier: String,
    /// The equation that it tests.
    pub equation: String,
    /// What must be seen, for people.
    pub prediction: String,
    /// Subject and judge.
    pub compare: [Stream; 2],
    /// What was measured.
    pub metric: Metric,
    /// Patterns of the sites that it judges; every site if null. A record that
    /// does not say is not read: every other site would seem judged.
    #[serde(deserialize_with = "Option::deserialize")]
    pub sites: Option<Vec<String>>,
    /// Whether sites are left out of which an engine's kernels make every bit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unless_exact: bool,
    /// The smallest value that passes.
    pub min: Option<f64>,
    /// The largest value that passes.
    pub max: Option<f64>,
    /// The bounds' derivation.
    pub why: String,
    /// What a failure means.
    pub if_fails: IfFails,
    /// What became of it.
    pub outcome: Outcome,
    /// Why there was no value, or why some sites had none.
    pub reason: Option<String>,
    /// The first site outside the bounds, else the one nearest to a bound.
    pub site: Option<Site>,
    /// The value there.
    pub value: Option<f64>,
    /// The share of the bound that the value uses; above 1 outside.
    pub used: Option<f64>,
    /// The least and the largest value that passes there, where chance widened a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<[Option<f64>; 2]>,
    /// The site furthest outside the bounds, where a value lies outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_site: Option<Site>,
    /// The value there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_value: Option<f64>,
    /// Sites that were judged.
    pub sites_judged: usize,
    /// Sites outside the bounds.
    pub sites_falsified: usize,
    /// Sites without a value.
    pub sites_unmeasured: usize,
    /// Sites that were left out because an engine's kernels make their every bit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sites_exact: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Judgement {
    /// Whether a measure is one of those that were judged here.
    pub fn judges(&self, measure: &Measure) -> bool {
        let [subject, judge] = self.compare;
        let streams = measure.subject == subject && measure.judge == judge;
        streams && names_site(self.sites.as_deref(), self.metric, &measure.site)
    }

    /// How much of the nearer bound a value uses: at the bound 1, beyond it more.
    pub fn share_of_bound(&self, measure: &Measure, value: f64) -> f64 {
        share_of_bound(self.metric, self.bounds_at(measure), value)
    }

    /// The bounds that were applied at its site.
    pub fn bounds(&self) -> (Option<f64>, Option<f64>) {
        self.applied.map_or((self.min, self.max), |[min, max]| (min, max))
    }

    /// What its bounds were before chance widened them, in brackets; empty where it did not.
    pub fn widened_from(&self) -> String {
        if self.applied.is_none() {
            return String::new();
        }
        let edges: Vec<String> = [self.min, self.max].into_iter().flatten().map(number).collect();
        format!(" ({}, widened for chance)", edges.join(" to "))
    }

    fn put_nearest(&mut self, measure: &Measure, value: f64, used: f64) {
        let (min, max) = self.bounds_at(measure);
        let applied = [min, max];
        self.applied = (applied != [self.min, self.max]).then_some(applied);
        self.site = Some(measure.site.clone());
        (self.value, self.used) = (Some(value), Some(used));
    }

    /// The sites that it falsifies, in the order of the measures.
    pub fn falsified_sites<'m>(&self, measures: &'m [Measure]) -> Vec<&'m Site> {
        let left_out = exact_sites(self.unless_exact, self.compare, measures);
        let of_claim = measures
            .iter()
            .filter(|measure| self.judges(measure) && !left_out.contains(&measure.site));
        let outside = of_claim.filter(|measure| {
            let value = measure.metrics.get(&self.metric).copied().filter(|v| v.is_finite());
            value.map_or(not_finite(measure).is_some(), |value| !self.within(measure, value))
        });
        outside.map(|measure| &measure.site).collect()
    }

    fn within(&self, measure: &Measure, value: f64) -> bool {
        let (min, max) = self.bounds_at(measure);
        min.is_none_or(|min| value >= min) && max.is_none_or(|max| value <= max)
    }

    /// The bounds at a site, widened to what chance allows where so many, or so few,
    /// values were measured.
    fn bounds_at(&self, measure: &Measure) -> (Option<f64>, Option<f64>) {
        let Some(&[least, most]) = measure.chance.get(&self.metric) else {
            return (self.min, self.max);
        };
        let min = self.min.map(|min| if least < min { least } else { min });
        let max = self.max.map(|max| if most > max { most } else { max });
        (min, max)
    }
}

/// Where a stage stops being what its contract claims: the first site, in the order of
/// the flow, that a claim of the gravest kind falsifies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct First {
    /// The arm whose values are in question.
    pub arm: Arm,
    /// The site.
    pub site: Site,
    /// The falsifier that says so.
    pub claim: String,
    /// The name of what is wrong there, if it was recognised.
    pub cause: Option<String>,
}

impl First {
    /// The first falsified site; nothing where no claim is falsified.
    pub fn of(judgements: &[Judgement], measures: &[Measure]) -> Option<First> {
        let judgement = first_falsified(judgements, measures)?;
        Some(First {
            arm: judgement.compare[0].arm(),
            site: judgement.site.clone()?,
            claim: judgement.falsifier.clone(),
            cause: None,
        })
    }
}

/// The judgement that stands first: of the gravest that are falsified the one whose first
/// site comes first in the flow.
pub fn first_falsified<'j>(
    judgements: &'j [Judgement],
    measures: &[Measure],
) -> Option<&'j Judgement> {
    let fallen = judgements.iter().filter(|j| j.outcome == Outcome::Falsified);
    let place = |j: &&Judgement| {
        let site = j.site.as_ref();
        let listed = measures.iter().position(|m| Some(&m.site) == site).unwrap_or(usize::MAX);
        // What an arm does from its own input, or against itself, says more about a site
        // than a distance that it may have inherited.
        let inherited = j.compare[0] != j.compare[1] && j.compare[1] == Stream::Arm(Arm::Reference);
        (j.if_fails, site.map_or((u64::MAX, 0), flow), inherited, listed)
    };
    fallen.min_by_key(place)
}

/// A stage's verdict with all that led to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageVerdict {
    /// The answer.
    pub verdict: Verdict,
    /// The reason, in one line.
    pub why: String,
    /// Every falsifier of the contract.
    pub judgements: Vec<Judgement>,
}

/// Judges measures by a contract; `asked` are the stage's arms, and `absent` says which of
/// them did not run, and why.
///
/// A claim on an arm that was not asked for is not judged and hinders no pass. Only arms that
/// the runner computes can be left out so: one that reads what others made is there or missing.
pub fn judge(
    contract: &Contract,
    measures: &[Measure],
    asked: &[Arm],
    absent: &BTreeMap<Arm, String>,
) -> StageVerdict {
    let left_out = [Arm::Emulated, Arm::Device].into_iter().filter(|arm| !asked.contains(arm));
    let mut without: BTreeMap<Arm, String> =
        left_out.map(|arm| (arm, "it was not asked for".to_owned())).collect();
    without.extend(absent.clone());
    let judgements: Vec<Judgement> =
        contract.falsifiers.iter().map(|f| judge_one(f, measures, &without)).collect();
    let verdict = verdict_of(&judgements, &without);
    let mut why = vec![why(verdict, &judgements, measures, &without)];
    why.extend(absent.iter().map(|(arm, reason)| format!("{arm} unmeasured: {reason}")));
    why.retain(|part| !part.is_empty());
    StageVerdict { verdict, why: why.join("; "), judgements }
}

/// Adds to a verdict's reason what is known beyond its contract: of a bug where
/// it starts and what it is, of a clean GEMM its floor.
pub fn reason(judged: &mut StageVerdict, measures: &StageMeasures, diagnosis: Option<&Diagnosis>) {
    match (judged.verdict, diagnosis) {
        (Verdict::Structural | Verdict::Drift, Some(diagnosis)) => {
            let mut parts = vec![diagnosis.place(), diagnosis.sentence()];
            parts.extend(diagnosis.aftermath());
            parts.push(std::mem::take(&mut judged.why));
            parts.extend(bits_before(&measures.measures, diagnosis));
            judged.why = parts.join("; ");
        }
        (Verdict::Pass | Verdict::Drift, None) => {
            if let Some(line) = kernels_in_words(&measures.kernels) {
                judged.why = format!("{line}; {}", judged.why);
                return;
            }
            if let Some(line) = floor_line(measures) {
                judged.why = format!("{line}; {}", judged.why);
            }
        }
        _ => {}
    }
}

/// `33 of 33 sites to the bit: cuBLAS in one chain, attention eager`: which kernels of an
/// engine made the sites, and on how few values that rests where they are few.
pub fn kernels_in_words(kernels: &[SiteKernel]) -> Option<String> {
    /// Fewer values leave room for another kernel.
    const FEW: usize = 1000;
    if kernels.is_empty() {
        return None;
    }
    let exact: Vec<&SiteKernel> = kernels.iter().filter(|k| k.mismatches == 0).collect();
    let mut named: Vec<(String, usize)> = Vec::new();
    for kernel in &exact {
        let mut name = kernel.kernel.clone();
        if !kernel.also.is_empty() {
            name += &format!(" (or {})", kernel.also.join(", "));
        }
        match named.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => *values += kernel.values,
            None => named.push((name, kernel.values)),
        }
    }
    let one = |(name, values): &(String, usize)| match *values < FEW {
        true => format!("{name} (on {values} values only)"),
        false => name.clone(),
    };
    let listed: Vec<String> = named.iter().map(one).collect();
    let listed = if listed.is_empty() { String::new() } else { format!(": {}", listed.join("; ")) };
    Some(format!("{} of {} sites to the bit{listed}", exact.len(), kernels.len()))
}

/// `floor 3.71 %, observed 3.69 %, z 0.995 at blk.0.q`: of the GEMM furthest off.
fn floor_line(measures: &StageMeasures) -> Option<String> {
    let scaled = measures.measures.iter().any(|m| m.site.0 == "logits_raw");
    let is_gemm = |site: &Site| is_gemm(site) && !(scaled && site.0 == "logits");
    let rms = measures.measures.iter().filter(|m| is_gemm(&m.site));
    let rms = rms.filter_map(|m| Some((m, *m.metrics.get(&Metric::ZRms)?)));
    let further = |a: f64, b: f64| a.ln().abs().total_cmp(&b.ln().abs());
    let (measure, z) = rms.filter(|(_, z)| *z > 0.0).max_by(|a, b| further(a.1, b.1))?;
    let account = measures
        .accounts
        .iter()
        .find(|account| account.subject == measure.subject && account.site == measure.site)?;
    Some(format!(
        "floor {}, observed {}, z {z:.3} at {}",
        percent(account.floor),
        percent(account.observed),
        measure.site
    ))
}

/// A line on bits that differ from the prediction before the first falsified site: they
/// are no part of the headline, since no claim is falsified by them.
fn bits_before(measures: &[Measure], diagnosis: &Diagnosis) -> Option<String> {
    let emulated = Stream::Arm(Arm::Emulated);
    let differing = |measure: &&Measure| {
        measure.subject == diagnosis.subject
            && measure.judge == emulated
            && flow(&measure.site) < flow(&diagnosis.site)
            && measure.metrics.get(&Metric::BitMismatches).is_some_and(|count| *count > 0.0)
    };
    let first = measures.iter().filter(differing).min_by_key(|measure| flow(&measure.site))?;
    let count = first.metrics.get(&Metric::BitMismatches).copied().unwrap_or(0.0);
    Some(format!(
        "before it, {} of {} values at {} differ from the prediction in their bits, within what \
         the contract allows",
        grouped(count as usize),
        grouped(first.shape[0] * first.shape[1]),
        first.site
    ))
}

/// Why a falsifier's streams are not there, if an arm did not run.
fn missing_arm(compare: [Stream; 2], absent: &BTreeMap<Arm, String>) -> Option<String> {
    compare.into_iter().map(Stream::arm).find_map(|arm| {
        absent.get(&arm).map(|reason| format!("the {arm} arm did not run: {reason}"))
    })
}

/// The sites of a subject that a claim leaves out: those of which an engine's kernels make every
/// bit from its own input. A claim on the whole pass leaves out all or none: where every site is
/// such, the pass is what these kernels make of the tokens.
fn exact_sites(
    unless_exact: bool,
    [subject, judge]: [Stream; 2],
    measures: &[Measure],
) -> BTreeSet<&Site> {
    let exact = |measure: &&Measure| {
        measure.metrics.get(&Metric::BitMismatches) == Some(&0.0)
            && measure.metrics.get(&Metric::NonFinite).is_none_or(|count| *count == 0.0)
    };
    let of_kernels = |measure: &&Measure| {
        measure.subject == subject && measure.judge == Stream::Predicted(subject.arm())
    };
    let predicted = measures.iter().filter(|_| unless_exact).filter(of_kernels);
    let of_an_op = matches!(judge, Stream::Anchored(_));
    if !of_an_op && !predicted.clone().all(|measure| exact(&measure)) {
        return BTreeSet::new();
    }
    predicted.filter(exact).map(|measure| &measure.site).collect()
}

fn judge_one(
    falsifier: &Falsifier,
    measures: &[Measure],
    absent: &BTreeMap<Arm, String>,
) -> Judgement {
    let mut judgement = Judgement {
        falsifier: falsifier.id.clone(),
        equation: falsifier.equation.clone(),
        prediction: falsifier.prediction.clone(),
        compare: falsifier.compare,
        metric: falsifier.metric,
        sites: falsifier.sites.clone(),
        unless_exact: falsifier.unless_exact,
        min: falsifier.min,
        max: falsifier.max,
        why: falsifier.why.clone(),
        if_fails: falsifier.if_fails,
        outcome: Outcome::Unmeasured,
        reason: missing_arm(falsifier.compare, absent),
        site: None,
        value: None,
        used: None,
        applied: None,
        worst_site: None,
        worst_value: None,
        sites_judged: 0,
        sites_falsified: 0,
        sites_unmeasured: 0,
        sites_exact: 0,
    };
    let [subject, judge] = falsifier.compare;
    let left_out = exact_sites(falsifier.unless_exact, falsifier.compare, measures);
    let mut worst: Option<f64> = None;
    let relevant = measures.iter().filter(|measure| {
        measure.subject == subject && measure.judge == judge && falsifier.applies_to(&measure.site)
    });
    for measure in relevant {
        if left_out.contains(&measure.site) {
            judgement.sites_exact += 1;
            continue;
        }
        let value = measure.metrics.get(&falsifier.metric).copied().filter(|v| v.is_finite());
        // NaN passes no bound: a claim about such a site is falsified, whatever it measures.
        if let (None, Some(count)) = (value, not_finite(measure)) {
            judgement.sites_judged += 1;
            judgement.sites_falsified += 1;
            if judgement.sites_falsified == 1 {
                (judgement.site, judgement.applied) = (Some(measure.site.clone()), None);
                (judgement.value, judgement.used) = (None, Some(f64::MAX));
                judgement.reason = Some(format!("at `{}`: {count}", measure.site));
            }
            continue;
        }
        let Some(value) = value else {
            judgement.sites_unmeasured += 1;
            if judgement.reason.is_none() {
                let reason = measure.unmeasured.as_deref().unwrap_or("too little was compared");
                judgement.reason = Some(format!("at `{}`: {reason}", measure.site));
            }
            continue;
        };
        judgement.sites_judged += 1;
        let used = judgement.share_of_bound(measure, value);
        let within = judgement.within(measure, value);
        let first_outside = !within && judgement.sites_falsified == 0;
        let nearest = judgement.sites_falsified == 0 && judgement.used.is_none_or(|u| used > u);
        judgement.sites_falsified += usize::from(!within);
        if !within && worst.is_none_or(|worst| used > worst) {
            worst = Some(used);
            judgement.worst_site = Some(measure.site.clone());
            judgement.worst_value = Some(value);
        }
        if first_outside || nearest {
            judgement.put_nearest(measure, value, used);
        }
    }
    let settled = judgement.sites_judged + judgement.sites_exact;
    judgement.outcome = match (judgement.sites_falsified, settled) {
        (0, 0) => Outcome::Unmeasured,
        (0, _) => Outcome::Held,
        _ => Outcome::Falsified,
    };
    if (judgement.sites_judged, judgement.sites_unmeasured) == (0, 0) && judgement.sites_exact > 0 {
        let sites = judgement.sites_exact;
        judgement.reason =
            Some(format!("the engine's kernels make every bit of all {sites} sites"));
    }
    if judgement.outcome == Outcome::Unmeasured && judgement.reason.is_none() {
        let [subject, judge] = falsifier.compare;
        let hint = match judge {
            Stream::Predicted(_) => {
                "; the recipe must name an `engine` whose kernels are known, as docs/engines.md says"
            }
            _ => "",
        };
        let metric = falsifier.metric;
        judgement.reason = Some(format!("no site has {metric} of {subject} against {judge}{hint}"));
    }
    judgement
}

/// How much of the nearer bound a value uses: at the bound 1, beyond it more.
fn share_of_bound(metric: Metric, (min, max): (Option<f64>, Option<f64>), value: f64) -> f64 {
    // Outside a bound of 0 there is no share; the largest number stands for it.
    let ratio = |part: f64, whole: f64| match (part, whole) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::MAX,
        (part, whole) => (part / whole).abs(),
    };
    // What lies below zero uses nothing of a bound above it.
    let of_max = max.map(|max| if value < 0.0 && max > 0.0 { 0.0 } else { ratio(value, max) });
    let best = metric.range().1;
    let of_min =
        min.map(
            |min| {
                if best.is_finite() { ratio(best - value, best - min) } else { ratio(min, value) }
            },
        );
    match (of_min, of_max) {
        (Some(a), Some(b)) if a > b => a,
        (_, Some(b)) => b,
        (Some(a), None) => a,
        (None, None) => 0.0,
    }
}

fn verdict_of(judgements: &[Judgement], absent: &BTreeMap<Arm, String>) -> Verdict {
    let falsified = |if_fails| {
        judgements.iter().any(|j| j.outcome == Outcome::Falsified && j.if_fails == if_fails)
    };
    if falsified(IfFails::Structural) {
        return Verdict::Structural;
    }
    if falsified(IfFails::Drift) {
        return Verdict::Drift;
    }
    // A falsifier without a value is forgiven only where its arm could not run or was
    // not asked for.
    let forgiven = |j: &Judgement| missing_arm(j.compare, absent).is_some();
    let open = judgements.iter().any(|j| j.outcome == Outcome::Unmeasured && !forgiven(j));
    let held = judgements.iter().any(|j| j.outcome == Outcome::Held);
    if held && !open { Verdict::Pass } else { Verdict::Unmeasured }
}

fn why(
    verdict: Verdict,
    judgements: &[Judgement],
    measures: &[Measure],
    absent: &BTreeMap<Arm, String>,
) -> String {
    let mut parts = Vec::new();
    match verdict {
        Verdict::Structural | Verdict::Drift => {
            parts.extend(
                first_falsified(judgements, measures).map(|first| describe_fall(first, measures)),
            );
        }
        Verdict::Unmeasured => {
            // What an absent arm could not give is told below, and comes last here.
            let open = judgements
                .iter()
                .filter(|j| j.outcome == Outcome::Unmeasured)
                .min_by_key(|j| missing_arm(j.compare, absent).is_some());
            parts.extend(open.map(|j| {
                format!("{}: {}", j.falsifier, j.reason.as_deref().unwrap_or("no value"))
            }));
        }
        _ => {
            parts.extend(exactness(judgements, measures));
            let tightest = judgements
                .iter()
                .filter(|j| j.outcome == Outcome::Held && j.used.is_some_and(|used| used > 0.0))
                .max_by(|a, b| a.used.unwrap_or(0.0).total_cmp(&b.used.unwrap_or(0.0)));
            parts.extend(tightest.map(describe_headroom));
            // Where nothing used any of its bound, the first that held still says what was seen.
            if parts.is_empty() {
                let first = judgements.iter().find(|j| j.outcome == Outcome::Held);
                parts.extend(first.map(describe_headroom));
            }
        }
    }
    parts.join("; ")
}

/// `emulated = reference, 0 of 1,024 bits differ`, where bits were judged and held.
fn exactness(judgements: &[Judgement], measures: &[Measure]) -> Option<String> {
    let exact = judgements
        .iter()
        .filter(|j| j.metric == Metric::BitMismatches && j.outcome == Outcome::Held)
        .filter(|j| j.max == Some(0.0) && matches!(j.compare[1], Stream::Arm(_)))
        .max_by_key(|j| j.compare[0])?;
    let [subject, judge] = exact.compare;
    // Of a stage with many sites a claim may judge one.
    let elements: usize =
        measures.iter().filter(|m| exact.judges(m)).map(|m| m.shape[0] * m.shape[1]).sum();
    let what = if subject == judge {
        format!("{subject} repeats itself")
    } else {
        format!("{subject} = {judge}")
    };
    Some(format!("{what}, 0 of {} values differ", grouped(elements)))
}

/// What a falsified claim saw at its first site, in words.
pub fn in_words(judgement: &Judgement, measures: &[Measure]) -> String {
    let at = |m: &&Measure| judgement.judges(m) && Some(&m.site) == judgement.site.as_ref();
    let measure = measures.iter().find(at);
    if let Some(count) = measure.and_then(not_finite) {
        return count;
    }
    let (min, max) = judgement.bounds();
    let bound = match (min, max, judgement.value) {
        (Some(min), _, Some(value)) if value < min => format!("at least {}", number(min)),
        (_, Some(max), _) => format!("at most {}", number(max)),
        (Some(min), None, _) => format!("at least {}", number(min)),
        (None, None, _) => "no bound".to_owned(),
    };
    let value = judgement.value.map_or("no value".to_owned(), number);
    let from = judgement.widened_from();
    format!("{} is {value}, and {} allows {bound}{from}", judgement.metric, judgement.falsifier)
}

/// Values that are NaN or infinite, in words: nothing else about such a site has meaning.
fn not_finite(measure: &Measure) -> Option<String> {
    let count = measure.metrics.get(&Metric::NonFinite).copied().filter(|count| *count > 0.0)?;
    let all = measure.shape[0] * measure.shape[1];
    Some(format!("{} of {} values are NaN or infinite", grouped(count as usize), grouped(all)))
}

/// The sites of an arm that claims on its own input falsify.
pub fn falsified_locally(
    judgements: &[Judgement],
    measures: &[Measure],
    arm: Arm,
) -> BTreeSet<Site> {
    let local = judgements.iter().filter(|j| {
        j.outcome == Outcome::Falsified
            && j.if_fails == IfFails::Structural
            && j.compare[0] == Stream::Arm(arm)
            && matches!(j.compare[1], Stream::Anchored(own) | Stream::Predicted(own) if own == arm)
    });
    local.flat_map(|j| j.falsified_sites(measures)).cloned().collect()
}

fn describe_fall(j: &Judgement, measures: &[Measure]) -> String {
    let at = |m: &&Measure| j.judges(m) && Some(&m.site) == j.site.as_ref();
    let not_finite = measures.iter().find(at).and_then(not_finite);
    let site = j.site.as_ref().map_or(String::new(), |site| format!(" at {site}"));
    let value = j.value.map_or("no value".to_owned(), number);
    let (min, max) = j.bounds();
    let bound = match (min, max, j.value) {
        (Some(min), _, Some(value)) if value < min => format!("below {}", number(min)),
        (_, Some(max), _) => format!("above {}", number(max)),
        _ => "outside its bound".to_owned(),
    };
    let bound = bound + &j.widened_from();
    let worst = match (&j.worst_site, j.worst_value) {
        (Some(worst), Some(value)) if j.site.as_ref() != Some(worst) => {
            format!(", the worst {} at {worst}", number(value))
        }
        _ => String::new(),
    };
    let more = match j.sites_falsified {
        0 | 1 => String::new(),
        many => format!(", and at {} more of {} sites{worst}", many - 1, j.sites_judged),
    };
    let [subject, judge] = j.compare;
    let pair = if subject == Stream::OUTCOME {
        "the command".to_owned()
    } else if subject == judge {
        format!("{subject}'s repeats")
    } else {
        format!("{subject} against {judge}")
    };
    match not_finite {
        Some(count) => format!("{}{site}: {count}{more}", j.falsifier),
        None => format!("{}{site}: {} of {pair} is {value}, {bound}{more}", j.falsifier, j.metric),
    }
}

fn describe_headroom(j: &Judgement) -> String {
    let site = j.site.as_ref().map_or(String::new(), |site| format!(" at {site}"));
    let value = j.value.map_or("no value".to_owned(), number);
    let bounds = match j.bounds() {
        (Some(min), Some(max)) => format!("within {} to {}", number(min), number(max)),
        (Some(min), None) => format!("at least {}", number(min)),
        (None, Some(max)) => format!("at most {}", number(max)),
        (None, None) => "unbounded".to_owned(),
    };
    format!("tightest: {} {value}{site}, {bounds}{}", j.metric, j.widened_from())
}
