//! The top of the page: the verdict and where it comes from, every stage in a line,
//! families together, and the graph.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};

use super::{Page, commands, symbol, verdict};
use crate::op::{Arm, StageId};
use crate::record::{ArmState, FamilyRecord, RunRecord, StageRecord};
use crate::report::commands::of_run;
use crate::text::{duration, share};
use crate::verdict::{First, Verdict};

/// Stages from which a filter is worth its place.
const FILTER_FROM: usize = 15;
/// Arithmetics of one arm that the top of the page names.
const SHOWN_ARITHMETICS: usize = 3;

pub(super) fn header(page: &Page<'_>) -> Markup {
    let run = page.run;
    html! {
        header class=(format!("v-{}", run.verdict)) {
            h1 { (verdict(run.verdict)) " " span class="headline" { (headline(run)) } }
            p class="lead" { (lead(run)) }
            (first(run))
            @for missing in absent(run) { p class="absent-arm" { (missing) } }
            dl class="facts" {
                dt { "stages" } dd { bdi { (run.folder) } }
                dt { "started" } dd { (run.started) }
                dt { "took" } dd {
                    data value=(format!("{:?}", run.seconds)) data-at="/seconds" { (duration(run.seconds)) }
                }
                dt { "exit code" } dd {
                    data value=(run.exit_code) data-at="/exit_code" { (run.exit_code) }
                }
                dt { "run" } dd {
                    code { (run.id) } " " a href="run.json" { "run.json" } " "
                    a href="events.jsonl" { "events.jsonl" }
                }
                dt { "machine" } dd {
                    @if let Some(machine) = &run.provenance.machine { bdi { (machine) } ": " }
                    (run.provenance.cpu.as_deref().unwrap_or("CPU unknown")) ", "
                    (run.provenance.threads) " threads, " (run.provenance.platform)
                }
                dt { "runner" } dd { (run.provenance.runner) }
                @for (arm, arithmetic) in arithmetics(run) {
                    dt { (arm) " arm" } dd { (arithmetic) }
                }
            }
            (commands(&of_run(run, page.runs)))
        }
    }
}

/// The run in a sentence: where the gravest stage's finding is and what it is, or that
/// everything passes.
pub(super) fn headline(run: &RunRecord) -> String {
    let all = run.stages.len();
    let gravest = run.stages.iter().find(|stage| stage.verdict == run.verdict);
    match (run.verdict, gravest) {
        _ if run.interrupted => "stopped on request".to_owned(),
        (_, None) => "no stage was judged".to_owned(),
        (Verdict::Pass, Some(only)) if all == 1 => format!("stage {} holds every claim", only.id),
        (Verdict::Pass, Some(_)) => format!("all {all} stages hold every claim"),
        (_, Some(stage)) => format!("stage {}: {}", stage.id, sentence_of(stage)),
    }
}

/// What a stage came to, in a short sentence.
fn sentence_of(stage: &StageRecord) -> String {
    match &stage.first {
        Some(First { site, cause: Some(cause), .. }) => format!("{cause} at {site}"),
        Some(First { site, claim, cause: None, .. }) => format!("{claim} is falsified at {site}"),
        None => first_part(&stage.why),
    }
}

/// A reason up to its first semicolon, cut where a title ends.
fn first_part(why: &str) -> String {
    const LONGEST: usize = 110;
    clipped(why.split("; ").next().unwrap_or_default(), LONGEST)
}

/// Stages from which a list of contents is worth its place.
const CONTENTS_FROM: usize = 3;

/// A link to every part of a long page.
pub(super) fn contents(run: &RunRecord) -> Markup {
    html! {
        @if run.stages.len() >= CONTENTS_FROM {
            nav aria-label="Contents" class="contents" {
                span class="op" { "Contents: " }
                @for (place, stage) in run.stages.iter().enumerate() {
                    a href=(format!("#stage-{place}")) class=(format!("v-{}", stage.verdict)) {
                        span class="verdict" aria-hidden="true" { (symbol(stage.verdict)) } " "
                        bdi { (stage.id) }
                    }
                    " "
                }
            }
        }
    }
}

/// What a reader must know in the first ten seconds.
fn lead(run: &RunRecord) -> Markup {
    let of = |verdict: Verdict| run.stages.iter().filter(move |stage| stage.verdict == verdict);
    let gravest = of(run.verdict).next();
    let passed = of(Verdict::Pass).count();
    html! {
        @if run.interrupted { strong { "Stopped on request. " } }
        @match (run.verdict, gravest) {
            (_, None) => "No stage was judged.",
            (Verdict::Pass, Some(_)) => {
                "All " (run.stages.len()) " stages pass: whatever was measured is explained by the "
                "arithmetic of the recipe, within every bound."
            }
            (_, Some(_)) => {
                @let meaning = match run.verdict {
                    Verdict::Structural => "A bug: a difference that the arithmetic does not explain.",
                    Verdict::Drift => "Explained by the arithmetic, but over the budget.",
                    Verdict::Unmeasured => "Too little was compared to say anything.",
                    Verdict::Blocked => "A stage could not start.",
                    _ => "A stage could not run.",
                };
                strong { (meaning) } " "
                (passed) " of " (run.stages.len()) " stages pass."
            }
        }
    }
}

/// Where to look first: the gravest stage's site and cause, or what is nearest to a bound.
fn first(run: &RunRecord) -> Markup {
    let link = |stage: &StageRecord| {
        let place = run.stages.iter().position(|other| other.id == stage.id).unwrap_or(0);
        html! { a href=(format!("#stage-{place}")) { "stage " bdi { (stage.id) } } }
    };
    let used = |stage: &StageRecord| stage.decisive().and_then(|j| j.used).unwrap_or(0.0);
    let gravest = run.stages.iter().find(|stage| stage.verdict == run.verdict);
    let tightest = run.stages.iter().max_by(|a, b| used(a).total_cmp(&used(b)));
    let diagnosis = gravest.and_then(|stage| stage.diagnoses.first());
    html! {
        dl class="first" {
            @match (run.verdict, gravest, tightest) {
                (Verdict::Pass, _, Some(stage)) => {
                    @if let Some(judgement) = stage.decisive() {
                        dt { "nearest to a bound" }
                        dd {
                            (link(stage)) ": " (judgement.metric)
                            @if let Some(site) = &judgement.site { " at " code { (site) } }
                            " uses " strong { (share(used(stage))) } " of it"
                        }
                    }
                }
                (Verdict::Structural, Some(stage), _) => {
                    @if let Some(diagnosis) = diagnosis {
                        dt { "where first" }
                        dd {
                            (link(stage)) " at " code { (diagnosis.site) } ", op " (diagnosis.op) ": "
                            (diagnosis.place())
                            @if let Some(aftermath) = diagnosis.aftermath() { "; " (aftermath) }
                        }
                        dt { "what it is" } dd { strong { (diagnosis.sentence()) } }
                    } @else {
                        dt { "why" } dd { (link(stage)) ": " (stage.why) }
                    }
                }
                (_, Some(stage), _) => { dt { "why" } dd { (link(stage)) ": " (stage.why) } }
                _ => {}
            }
        }
    }
}

/// What each arm computed with, the device's name and library among it.
fn arithmetics(run: &RunRecord) -> Vec<(Arm, String)> {
    let mut all: BTreeMap<Arm, BTreeSet<&str>> = BTreeMap::new();
    for (arm, record) in run.stages.iter().flat_map(|stage| &stage.arms) {
        if let Some(arithmetic) = &record.arithmetic {
            all.entry(*arm).or_default().insert(arithmetic);
        }
    }
    let words = |(arm, words): (Arm, BTreeSet<&str>)| {
        let shown: Vec<&str> = words.iter().copied().take(SHOWN_ARITHMETICS).collect();
        let more = words.len() - shown.len();
        let more = if more > 0 { format!(" | and {more} more") } else { String::new() };
        (arm, format!("{}{more}", shown.join(" | ")))
    };
    all.into_iter().map(words).collect()
}

/// Arms that did not run, with the reason, once for all stages.
fn absent(run: &RunRecord) -> Vec<String> {
    let mut reasons: BTreeMap<(String, &str), usize> = BTreeMap::new();
    for stage in &run.stages {
        for (arm, record) in &stage.arms {
            if record.state == ArmState::Unmeasured {
                *reasons.entry((arm.to_string(), &record.why)).or_default() += 1;
            }
        }
    }
    let all = run.stages.len();
    reasons
        .into_iter()
        .map(|((arm, why), count)| {
            format!("The {arm} arm was not measured in {count} of {all} stages: {why}")
        })
        .collect()
}

pub(super) fn stages(page: &Page<'_>) -> Markup {
    let run = page.run;
    html! {
        section aria-label="Stages" {
            h2 { "Stages" }
            @if run.stages.len() >= FILTER_FROM {
                p class="filter" {
                    label for="filter" { "Show only stages with " }
                    input id="filter" type="search" placeholder="structural, blk.10, ...";
                    span id="filter-count" aria-live="polite" {}
                }
            }
            @let alone: Vec<(usize, &StageRecord)> =
                run.stages.iter().enumerate().filter(|(_, stage)| family_of(run, stage).is_none()).collect();
            @if !alone.is_empty() { (table(&alone)) }
        }
    }
}

fn table(stages: &[(usize, &StageRecord)]) -> Markup {
    html! {
        div class="scroll" {
            table class="stages" {
                thead { tr {
                    th scope="col" { "stage" } th scope="col" { "verdict" }
                    th scope="col" { "why" } th scope="col" { "first or tightest site" }
                    th scope="col" { "bound used" } th scope="col" { "time" }
                } }
                tbody {
                    @for (place, stage) in stages { (row(stage, *place)) }
                }
            }
        }
    }
}

fn family_of<'r>(run: &'r RunRecord, stage: &StageRecord) -> Option<&'r FamilyRecord> {
    run.families.iter().find(|family| stage.family.as_ref() == Some(&family.id))
}

/// Each `[for]` as one block: what its members came to together, and the members.
pub(super) fn families(page: &Page<'_>) -> Markup {
    let run = page.run;
    html! {
        @for family in &run.families {
            @let members: Vec<(usize, &StageRecord)> = run
                .stages
                .iter()
                .enumerate()
                .filter(|(_, stage)| stage.family.as_ref() == Some(&family.id))
                .collect();
            details class=(format!("family v-{}", family.verdict))
                open[family.verdict != Verdict::Pass || members.len() < FILTER_FROM] {
                summary {
                    h3 { bdi { (family.id) } " " span class="op" { "x " (members.len()) } }
                    (verdict(family.verdict))
                    span class="title" { (family.why) }
                }
                p class="marks" {
                    @for (place, stage) in &members {
                        a href=(format!("#stage-{place}")) class=(format!("verdict v-{}", stage.verdict))
                            title=(format!("{}: {}", stage.id, stage.verdict)) { (symbol(stage.verdict)) }
                    }
                }
                (table(&members))
            }
        }
    }
}

fn row(stage: &StageRecord, place: usize) -> Markup {
    let decisive = stage.decisive();
    html! {
        tr class=(format!("v-{}", stage.verdict)) data-stage=(place) {
            th scope="row" {
                a href=(format!("#stage-{place}")) { bdi { (stage.id) } } " "
                small { (stage.op.name()) }
            }
            td { (verdict(stage.verdict)) }
            td { (stage.why) br; small { bdi { (stage.title) } } }
            td {
                @if let Some(judgement) = decisive {
                    @if let Some(site) = &judgement.site { code { (site) } }
                }
            }
            td class="number" {
                @if let Some(used) = decisive.and_then(|judgement| judgement.used) { (share(used)) }
            }
            td class="number" {
                data value=(format!("{:?}", stage.seconds)) data-at=(format!("/stages/{place}/seconds")) {
                    (duration(stage.seconds))
                }
            }
        }
    }
}

const BOX_WIDTH: usize = 132;
const BOX_HEIGHT: usize = 44;
const GAP: usize = 12;
const BETWEEN: usize = 64;
/// Boxes of a level that stand in one column.
const PER_COLUMN: usize = 12;

/// The stages as a graph, what is needed to the left.
pub(super) fn graph(run: &RunRecord) -> Markup {
    let places = places(run);
    let right = places.iter().map(|(x, _)| x + BOX_WIDTH).max().unwrap_or(0) + 4;
    let bottom = places.iter().map(|(_, y)| y + BOX_HEIGHT).max().unwrap_or(0) + 4;
    let number: BTreeMap<&StageId, usize> =
        run.stages.iter().enumerate().map(|(number, stage)| (&stage.id, number)).collect();
    html! {
        section aria-label="Graph" {
            h2 { "What needs what" }
            div class="scroll graph" {
                svg width=(right) height=(bottom) viewBox=(format!("0 0 {right} {bottom}"))
                    role="group" aria-label="Stages, each to the right of those that it needs" {
                    @for (to, stage) in run.stages.iter().enumerate() {
                        @for from in stage.needs.iter().filter_map(|need| number.get(need)) {
                            path class="edge" d=(edge(places[*from], places[to])) {}
                        }
                    }
                    @for ((x, y), (place, stage)) in places.iter().zip(run.stages.iter().enumerate()) {
                        a href=(format!("#stage-{place}")) class=(format!("node v-{}", stage.verdict))
                            aria-label=(format!("{}, {}", stage.id, stage.verdict)) {
                            title { (stage.id) ": " (stage.verdict) ". " (stage.why) }
                            rect x=(x + 1) y=(y + 1) width=(BOX_WIDTH) height=(BOX_HEIGHT) rx="6" {}
                            text class="id" x=(x + 10) y=(y + 19) { (clipped(&stage.id.0, 15)) }
                            text class="word" x=(x + 10) y=(y + 36) {
                                (symbol(stage.verdict)) " " (stage.verdict)
                            }
                        }
                    }
                }
            }
        }
    }
}

fn clipped(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['\u{2026}']).collect()
}

/// The upper left corner of each stage's box. A run's stages stand in order, so
/// what one needs has its level already.
fn places(run: &RunRecord) -> Vec<(usize, usize)> {
    let mut level_of: BTreeMap<&StageId, usize> = BTreeMap::new();
    let mut levels: Vec<Vec<usize>> = Vec::new();
    for (number, stage) in run.stages.iter().enumerate() {
        let needs = stage.needs.iter().filter_map(|need| level_of.get(need));
        let level = needs.max().map_or(0, |level| level + 1);
        level_of.insert(&stage.id, level);
        if levels.len() <= level {
            levels.resize(level + 1, Vec::new());
        }
        levels[level].push(number);
    }
    let mut places = vec![(0, 0); run.stages.len()];
    let mut x = 0;
    for level in levels {
        for (row, number) in level.iter().enumerate() {
            let column = row / PER_COLUMN;
            places[*number] =
                (x + column * (BOX_WIDTH + GAP), (row % PER_COLUMN) * (BOX_HEIGHT + GAP));
        }
        let columns = level.len().div_ceil(PER_COLUMN);
        x += columns * (BOX_WIDTH + GAP) - GAP + BETWEEN;
    }
    places
}

fn edge((from_x, from_y): (usize, usize), (to_x, to_y): (usize, usize)) -> String {
    let (x1, y1) = (from_x + BOX_WIDTH + 1, from_y + BOX_HEIGHT / 2);
    let (x2, y2) = (to_x + 1, to_y + BOX_HEIGHT / 2);
    let middle = (x1 + x2) / 2;
    format!("M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}")
}
