//! One stage's section: verdict and diagnosis first, then claims, causes, drift and
//! maps, then what stands behind them.

use std::collections::BTreeSet;

use maud::{Markup, html};
use rayon::prelude::*;

use super::causes::causes;
use super::chart::{Chart, Line, Point, chart};
use super::diagnosis::diagnoses;
use super::figure::{figure, shown};
use super::growth::growth;
use super::heatmap::heatmaps;
use super::histogram::histograms;
use super::{Page, command, commands, fold, outcome, verdict};
use crate::compare::Measure;
use crate::metric::Metric;
use crate::op::{Arm, Stream, projection_sites};
use crate::record::{ArmState, StageRecord};
use crate::report::commands::{explain, export, measures, of_stage};
use crate::report::layers::Grid;
use crate::text::{duration, number, share};
use crate::verdict::{Judgement, Outcome, Verdict};

/// Stages of a run up to which all are unfolded.
const ALL_OPEN: usize = 12;
/// Claims that are shown before the rest is unfolded, and the most if so many fell.
const CLAIMS_IN_SIGHT: usize = 3;
const MOST_IN_SIGHT: usize = 5;
/// Layers from which a map says more than a table.
const MAP_FROM: usize = 2;
/// Worst elements that are shown.
const SHOWN_ELEMENTS: usize = 10;
/// Rows of a table of all measures; beyond, the CSV has them.
const SHOWN_MEASURES: usize = 60;

/// The section of stage number `place`: the reason, the finding and the tightest claims in
/// sight, the rest folded, so that a stage fits a screen.
pub(super) fn section(page: &Page<'_>, place: usize, figures: &Markup) -> Markup {
    let stage = &page.run.stages[place];
    let open = page.run.stages.len() <= ALL_OPEN || stage.verdict != Verdict::Pass;
    let (first, rest) = ranked(stage);
    html! {
        details class=(format!("stage v-{}", stage.verdict)) id=(format!("stage-{place}")) open[open] {
            summary {
                h2 { bdi { (stage.id) } " " span class="op" { (stage.op.name()) } }
                (verdict(stage.verdict))
                span class="title" { bdi { (stage.title) } }
            }
            p class="why" { (stage.why) }
            (diagnoses(page, stage, place))
            h3 {
                "Claims of " (stage.contract[0]) " " (stage.contract[1])
                @if rest > 0 { ": the tightest " (first.len()) " of " (first.len() + rest) }
            }
            (claims_table(&first, place))
            (figures)
        }
    }
}

/// What draws a part of a stage, whose place is given.
type Part = fn(&Page<'_>, &StageRecord, usize) -> Markup;

/// What stands folded in the section of stage number `place`.
pub(super) fn figures(page: &Page<'_>, place: usize) -> Markup {
    let stage = &page.run.stages[place];
    let figures: [(&str, Part); 5] = [
        ("Where the error comes from", causes),
        ("Layer by layer", drift),
        ("Is the error distributed as rounding must be?", histograms),
        ("Measures", tables),
        ("Worst elements", |page, stage, _| worst(page, stage)),
    ];
    let figures: Vec<Markup> = figures
        .into_par_iter()
        .map(|(title, part)| fold(title, &part(page, stage, place)))
        .collect();
    html! {
        (other_claims(page, stage, place))
        @for figure in figures { (figure) }
        (fold("Greedy tokens", &greedy(stage, place)))
        (fold("Arms", &arms(stage, place)))
        (schedules(stage))
        (fold("Program", &programs(stage)))
        (fold("Recipe, model and prompt", &arithmetic(stage)))
        (fold("Commands", &commands(&of_stage(page.run, stage, page.runs))))
    }
}

/// The claims in the order in which they matter: what fell, then what uses most of its bound.
fn in_order(stage: &StageRecord) -> Vec<(usize, &Judgement)> {
    let mut claims: Vec<(usize, &Judgement)> = stage.judgements.iter().enumerate().collect();
    let fallen = |judgement: &Judgement| judgement.outcome == Outcome::Falsified;
    let most_used = |judgement: &Judgement| judgement.used.unwrap_or(0.0);
    claims.sort_by(|(_, a), (_, b)| {
        fallen(b).cmp(&fallen(a)).then(most_used(b).total_cmp(&most_used(a)))
    });
    claims
}

/// The claims that stand in sight, and how many do not.
fn ranked(stage: &StageRecord) -> (Vec<(usize, &Judgement)>, usize) {
    let mut claims = in_order(stage);
    let fallen = claims.iter().filter(|(_, j)| j.outcome == Outcome::Falsified).count();
    let rest = claims.split_off(claims.len().min(fallen.clamp(CLAIMS_IN_SIGHT, MOST_IN_SIGHT)));
    (claims, rest.len())
}

fn other_claims(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    let (first, rest) = ranked(stage);
    let claims = in_order(stage);
    let title = match rest {
        1 => "The other claim".to_owned(),
        rest => format!("The other {rest} claims"),
    };
    html! {
        @if rest > 0 {
            (fold(&title, &html! {
                (claims_table(&claims[first.len()..], place))
                (command(&explain(page.run, stage, page.runs)))
            }))
        }
    }
}

fn claims_table(claims: &[(usize, &Judgement)], place: usize) -> Markup {
    html! {
        div class="scroll" {
            table class="claims" {
                thead { tr {
                    th scope="col" { "claim" }
                    th scope="col" { "prediction" }
                    th scope="col" { "measured" }
                    th scope="col" { "bound" }
                    th scope="col" { "headroom" }
                    th scope="col" { "outcome" }
                } }
                tbody {
                    @for (number, judgement) in claims {
                        (claim(judgement, &format!("/stages/{place}/judgements/{number}")))
                    }
                }
            }
        }
    }
}

fn claim(judgement: &Judgement, at: &str) -> Markup {
    let Judgement { metric, value, used, .. } = judgement;
    html! {
        tr class=(format!("o-{}", outcome_name(judgement.outcome))) {
            th scope="row" { code { (judgement.falsifier) } br; small { (judgement.equation) } }
            td class="prediction" {
                (judgement.prediction)
                details {
                    summary { "derivation of the bound" }
                    p { (judgement.why) }
                    p {
                        "If it fails: " (format!("{:?}", judgement.if_fails).to_lowercase()) ". "
                        (figure(judgement.sites_judged as f64, &format!("{at}/sites_judged")))
                        " sites judged, "
                        (figure(judgement.sites_falsified as f64, &format!("{at}/sites_falsified")))
                        " outside, "
                        (figure(judgement.sites_unmeasured as f64, &format!("{at}/sites_unmeasured")))
                        " without a value"
                        @if judgement.sites_exact > 0 {
                            ", "
                            (figure(judgement.sites_exact as f64, &format!("{at}/sites_exact")))
                            " left out because an engine's kernels make their every bit"
                        }
                        ". Sites: "
                        @match &judgement.sites {
                            Some(patterns) => { @for pattern in patterns { code { (pattern) } " " } }
                            None => "all"
                        }
                    }
                }
            }
            td {
                @if let Some(value) = value {
                    strong { (figure(*value, &format!("{at}/value"))) } " "
                    @if let Some(site) = &judgement.site { "at " code { (site) } }
                } @else {
                    span class="absent" { (judgement.reason.as_deref().unwrap_or("no value")) }
                }
                br;
                small {
                    abbr title=(metric.meaning()) { (metric) } " of " (pair(judgement.compare))
                }
            }
            td class="bound" { (bound(judgement, at)) }
            td class="headroom" {
                @if let Some(used) = used { (bar(*used)) }
            }
            td { (outcome(judgement.outcome)) }
        }
    }
}

fn pair([subject, judge]: [Stream; 2]) -> String {
    if subject == judge {
        format!("{subject}'s repeats")
    } else {
        format!("{subject} against {judge}")
    }
}

fn bound(judgement: &Judgement, at: &str) -> Markup {
    let edge = |value: f64, name: &str| figure(value, &format!("{at}/{name}"));
    html! {
        @match (judgement.min, judgement.max) {
            (Some(min), Some(max)) => { (edge(min, "min")) " to " (edge(max, "max")) }
            (Some(min), None) => { "at least " (edge(min, "min")) }
            (None, Some(max)) => { "at most " (edge(max, "max")) }
            (None, None) => "none"
        }
        @if let Some(applied) = judgement.applied {
            @let [least, most] = applied.map(|edge| edge.map(number));
            ", widened for chance: "
            (least.into_iter().chain(most).collect::<Vec<_>>().join(" to "))
        }
    }
}

/// How much of its bound a value uses: the line stands where the bound is.
fn bar(used: f64) -> Markup {
    let filled = if used > 1.5 { 100.0 } else { used / 1.5 * 100.0 };
    let class = if used > 1.0 { "bar over" } else { "bar" };
    html! {
        span class=(class) aria-hidden="true" { span style=(format!("width:{filled:.1}%")) {} }
        span class="used" { (share(used)) " used" }
    }
}

fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Held => "held",
        Outcome::Falsified => "falsified",
        Outcome::Unmeasured => "unmeasured",
    }
}

/// What became of an arm, in one word.
pub(super) fn arm_state(state: ArmState) -> &'static str {
    match state {
        ArmState::Ran => "ran",
        ArmState::Reused => "reused",
        ArmState::Unmeasured => "unmeasured",
        ArmState::Error => "error",
        ArmState::Blocked => "blocked",
    }
}

fn arms(stage: &StageRecord, place: usize) -> Markup {
    html! {
        div class="scroll" {
            table class="arms" {
                thead { tr {
                    th scope="col" { "arm" } th scope="col" { "state" }
                    th scope="col" { "arithmetic" } th scope="col" { "time" }
                    th scope="col" { "sites" } th scope="col" { "why, and what it is kept under" }
                } }
                tbody {
                    @for (arm, record) in &stage.arms {
                        tr {
                            th scope="row" { (arm) }
                            td { (arm_state(record.state)) }
                            td { (record.arithmetic.as_deref().unwrap_or("")) }
                            td {
                                @if let Some(time) = record.seconds {
                                    data value=(format!("{time:?}"))
                                        data-at=(format!("/stages/{place}/arms/{arm}/seconds")) {
                                        (duration(time))
                                    }
                                }
                            }
                            td { (record.sites.len()) }
                            td {
                                (record.why)
                                @if let Some(key) = &record.key {
                                    br; small { "key " code title=(key) { (key.get(..12).unwrap_or(key)) } }
                                }
                                @if let [only] = record.sites.as_slice() {
                                    br;
                                    small {
                                        (only.site) " blake3 "
                                        code title=(only.blake3) {
                                            (only.blake3.get(..12).unwrap_or(&only.blake3))
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Which algorithm of the library computed which products.
fn schedules(stage: &StageRecord) -> Markup {
    html! {
        @for (arm, record) in stage.arms.iter().filter(|(_, record)| !record.gemms.is_empty()) {
            details class="fold" {
                summary { h3 { "Algorithms of the " (arm) " arm" } }
                div class="scroll" {
                    table {
                        thead { tr {
                            th scope="col" { "tokens x outputs x inner" } th scope="col" { "algorithm" }
                            th scope="col" { "weights" }
                        } }
                        tbody {
                            @for gemm in &record.gemms {
                                tr {
                                    td { (gemm.shape[0]) " x " (gemm.shape[1]) " x " (gemm.shape[2]) }
                                    td { (gemm.algorithm) }
                                    td { @for weight in &gemm.weights { code { (weight) } " " } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What became of a stage's program.
fn programs(stage: &StageRecord) -> Markup {
    let ran = stage.arms.values().filter_map(|record| record.command.as_ref());
    html! {
        @for command in ran {
            p {
                "Exit status " (command.status) ", "
                @if command.accepted { "which counts as a result." } @else { "which counts as a failure." }
            }
            @if !command.outputs.is_empty() {
                table class="numbers" {
                    thead { tr {
                        th scope="col" { "output" } th scope="col" { "bytes" } th scope="col" { "blake3" }
                    } }
                    tbody {
                        @for file in &command.outputs {
                            tr {
                                th scope="row" { code { (file.path) } }
                                td { (shown(file.size as f64)) }
                                td { code title=(file.blake3) { (file.blake3.get(..12).unwrap_or(&file.blake3)) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Charts and maps, where there are layers.
fn drift(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    let grids = Grid::of(&stage.measures);
    let deep: Vec<(usize, &Grid<'_>)> =
        grids.iter().enumerate().filter(|(_, grid)| grid.layers.len() >= MAP_FROM).collect();
    // The largest part of a page: each pair's map is drawn beside the others.
    let maps: Vec<Markup> =
        deep.par_iter().map(|(pair, grid)| heatmaps(page, stage, place, grid, *pair)).collect();
    html! {
        @if !deep.is_empty() {
            (growth(page, stage, place))
            div class="charts" { @for (_, grid) in &deep { (charts(stage, place, grid)) } }
            @for ((_, grid), maps) in deep.iter().zip(maps) {
                h4 { "Layers and sites: " (grid.pair()) }
                (maps)
            }
            (command(&measures(page.run, page.runs)))
        }
    }
}

fn charts(stage: &StageRecord, place: usize, grid: &Grid<'_>) -> Markup {
    let point = |(column, number, measure): (usize, usize, &Measure), metric: Metric| {
        Some(Point {
            column,
            value: *measure.metrics.get(&metric)?,
            label: format!("{}: {metric}", measure.site),
            at: format!("/stages/{place}/measures/{number}/metrics/{metric}"),
        })
    };
    let lines = |sites: &[&str], metric: Metric| -> Vec<Line> {
        let there = sites.iter().filter(|site| grid.sites.contains(site));
        there
            .map(|site| Line {
                name: (*site).to_owned(),
                unit: metric.name(),
                points: grid.row(site).into_iter().filter_map(|at| point(at, metric)).collect(),
            })
            .collect()
    };
    let projections = projection_sites();
    html! {
        @match grid.judge {
            Stream::Anchored(_) if grid.has(Metric::ZRms) => {
                (chart(&Chart {
                    title: &format!(
                        "Local error over its floor, {}: 1 is what rounding must cost",
                        grid.pair()
                    ),
                    layers: &grid.layers,
                    lines: &lines(&projections, Metric::ZRms),
                    band: band(stage, grid, Metric::ZRms),
                    rule: Some(1.0),
                }))
            }
            Stream::Arm(_) if grid.subject != grid.judge && grid.has(Metric::Nmse) => {
                (chart(&Chart {
                    title: &format!(
                        "Total drift (nmse) of {}, all that came before included",
                        grid.pair()
                    ),
                    layers: &grid.layers,
                    lines: &lines(&["attn_out", "ffn_down", "ffn_residual"], Metric::Nmse),
                    band: (None, None),
                    rule: None,
                }))
            }
            _ => {}
        }
    }
}

/// The bounds of the falsifier that judges a metric of this pair.
fn band(stage: &StageRecord, grid: &Grid<'_>, metric: Metric) -> (Option<f64>, Option<f64>) {
    let compare = [grid.subject, grid.judge];
    let judging = stage.judgements.iter().find(|j| j.compare == compare && j.metric == metric);
    judging.map_or((None, None), |judgement| (judgement.min, judgement.max))
}

/// All measures of the pairs that have no map.
fn tables(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    let grids = Grid::of(&stage.measures);
    let shallow = grids.iter().filter(|grid| grid.layers.len() < MAP_FROM);
    let shown: Vec<&Grid<'_>> = shallow.filter(|grid| grid.cells.len() <= SHOWN_MEASURES).collect();
    html! {
        @for grid in &shown {
            @let metrics: Vec<Metric> =
                Metric::ALL.into_iter().filter(|metric| grid.has(*metric)).collect();
            h4 { "Measures: " (grid.pair()) }
            div class="scroll" {
                table class="numbers" {
                    thead { tr {
                        th scope="col" { "site" } th scope="col" { "shape" }
                        @for metric in &metrics {
                            th scope="col" { abbr title=(metric.meaning()) { (metric) } }
                        }
                    } }
                    tbody {
                        @for (number, measure) in grid.cells.values() {
                            tr {
                                th scope="row" { (measure.site) }
                                td { (measure.shape[0]) " x " (measure.shape[1]) }
                                @for metric in &metrics {
                                    td {
                                        @if let Some(value) = measure.metrics.get(metric) {
                                            (figure(*value, &format!(
                                                "/stages/{place}/measures/{number}/metrics/{metric}"
                                            )))
                                        } @else {
                                            span class="absent" title=[measure.unmeasured.as_deref()] { "none" }
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        @if !shown.is_empty() { (command(&measures(page.run, page.runs))) }
    }
}

/// The elements that are furthest off, of the sites that use most of a bound.
fn worst(page: &Page<'_>, stage: &StageRecord) -> Markup {
    let mut ranked: Vec<(f64, usize)> = Vec::new();
    for (number, measure) in stage.measures.iter().enumerate() {
        let judging = stage.judgements.iter().filter(|judgement| judgement.judges(measure));
        let used = judging.filter_map(|judgement| {
            let value = measure.metrics.get(&judgement.metric)?;
            Some(if value.is_finite() {
                judgement.share_of_bound(measure, *value)
            } else {
                f64::MAX
            })
        });
        let Some(most) = used.max_by(f64::total_cmp) else { continue };
        if measure.worst.is_some() || !measure.first_mismatches.is_empty() {
            ranked.push((most, number));
        }
    }
    // Of equals the first in the flow comes first.
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranked.truncate(SHOWN_ELEMENTS);
    html! {
        @if !ranked.is_empty() {
            p class="note" {
                "Of the sites that use most of a bound, the element with the largest difference."
            }
            div class="scroll" {
                table class="numbers" {
                    thead { tr {
                        th scope="col" { "site" } th scope="col" { "pair" } th scope="col" { "bound used" }
                        th scope="col" { "token" } th scope="col" { "column" }
                        th scope="col" { "subject" } th scope="col" { "judge" }
                    } }
                    tbody {
                        @for (used, number) in &ranked {
                            @let measure = &stage.measures[*number];
                            @let element = measure.worst.as_ref().or(measure.first_mismatches.first());
                            @if let Some(element) = element {
                                tr {
                                    th scope="row" { code { (measure.site) } }
                                    td { (pair([measure.subject, measure.judge])) }
                                    td { (share(*used)) }
                                    td { (element.row) } td { (element.column) }
                                    td { code { (element.subject) } } td { code { (element.judge) } }
                                }
                            }
                        }
                    }
                }
            }
            @for arm in arms_behind(stage, &ranked) { (command(&export(page.run, stage, arm, page.runs))) }
        }
    }
}

/// The arms whose own tensors hold these elements, where they are still kept.
fn arms_behind(stage: &StageRecord, ranked: &[(f64, usize)]) -> BTreeSet<Arm> {
    let subjects = ranked.iter().filter_map(|(_, number)| match stage.measures[*number].subject {
        Stream::Arm(arm) => Some(arm),
        Stream::Anchored(_) | Stream::Predicted(_) => None,
    });
    subjects.filter(|arm| stage.arms.get(arm).is_some_and(|arm| arm.object.is_some())).collect()
}

fn greedy(stage: &StageRecord, place: usize) -> Markup {
    let decoded =
        || stage.arms.iter().filter_map(|(arm, record)| Some((arm, record.greedy.as_ref()?)));
    html! {
        @if decoded().next().is_some() {
            div class="scroll" {
                table class="numbers" {
                    tbody {
                        @for (arm, greedy) in decoded() {
                            tr {
                                th scope="row" { (arm) }
                                @for (step, token) in greedy.tokens.iter().enumerate() {
                                    td title=[greedy.margins.get(step).map(|margin| {
                                        format!("leads by {}", shown(f64::from(*margin)))
                                    })] { (token) }
                                }
                            }
                        }
                    }
                }
            }
            @for (number, compared) in stage.greedy.iter().enumerate() {
                @let at = format!("/stages/{place}/greedy/{number}");
                p {
                    (compared.sentence()) "."
                    @if let Some(step) = compared.first_difference {
                        " " small {
                            "Step " (figure(step as f64, &format!("{at}/first_difference")))
                            @if let Some(margin) = compared.margin {
                                ", the judge leads by "
                                // An f32: run.json has its digits, not those of an f64.
                                data value=(format!("{margin:?}")) data-at=(format!("{at}/margin")) {
                                    (shown(f64::from(margin)))
                                }
                            }
                            @if let Some(sigma) = compared.sigma {
                                ", sigma " (figure(sigma, &format!("{at}/sigma")))
                            }
                        }
                    }
                }
            }
        }
    }
}

fn arithmetic(stage: &StageRecord) -> Markup {
    let recipe = &stage.recipe;
    let tokens: Vec<String> = stage.tokens.iter().take(40).map(u32::to_string).collect();
    let more = if stage.tokens.len() > 40 { ", ..." } else { "" };
    let word = |value: serde_json::Result<serde_json::Value>| {
        value.ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    };
    html! {
            dl {
                @if recipe.codes.are_made() {
                    dt { "GEMM" } dd { (word(serde_json::to_value(recipe.gemm))) }
                    dt { "scales" } dd {
                        "weight per " (word(serde_json::to_value(recipe.scale.weight)))
                        ", activation per " (word(serde_json::to_value(recipe.scale.activation)))
                    }
                } @else {
                    dt { "GEMM" } dd { "the checkpoint's codes and scales; other weights in their own type" }
                }
                dt { "accumulation" } dd { (word(serde_json::to_value(recipe.accumulate))) }
                dt { "output" } dd { (word(serde_json::to_value(recipe.output))) }
                dt { "chip" } dd { (recipe.chip) }
                dt { "model" } dd { (stage.model) }
                dt { "prompt" } dd { (stage.tokens.len()) " tokens: " (tokens.join(", ")) (more) }
                dt { "operation" } dd { code { (serde_json::to_string(&stage.op).unwrap_or_default()) } }
                dt { "manifest" } dd { code { (stage.file) } }
                dt { "needs" } dd {
                    @if stage.needs.is_empty() { "nothing" }
                    @for need in &stage.needs { bdi { (need) } " " }
                }
            }
    }
}
