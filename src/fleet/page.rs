//! A fleet's report as one page, without network or server.
//!
//! All text passes through maud, which escapes it. A history is a line of letters, one for each
//! night, so that 90 nights of many machines stay a small page.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};

use super::causes::Cause;
use super::trends::{Kind, Trend};
use super::{Cell, Finding, Machine, Report, Row, words};
use crate::manifest::problem::plural;
use crate::report::{document, symbol, verdict};
use crate::text::{number, share};
use crate::verdict::Verdict;

/// So many causes of a finding, and files, are written out.
const MOST: usize = 40;
/// The size of a small curve.
const WIDTH: f64 = 150.0;
const HEIGHT: f64 = 26.0;

/// The page of a report.
pub fn page(report: &Report) -> String {
    let body = html! {
        (header(report))
        main {
            (findings(report))
            (parts(report))
            (matrix(report))
            (machines(report))
            (trends(report))
            (histories(report))
        }
        footer {
            p {
                "A cause is what the facts in the records separate: it is told with the machines on which it "
                "rests. " code { "runner fleet report --format json" } " has every figure of this page."
            }
        }
    };
    document(&report.line, &body)
}

fn header(report: &Report) -> Markup {
    let differing: BTreeSet<&str> = report
        .findings
        .iter()
        .flat_map(|finding| finding.machines.iter().map(|since| since.machine.as_str()))
        .collect();
    html! {
        header class=(format!("v-{}", report.verdict)) {
            h1 { (verdict(report.verdict)) " " span class="headline" {
                (plural(report.machines.len(), "machine")) ", " (plural(report.stages.len(), "stage")) ": "
                @match differing.len() {
                    0 => "no machine differs",
                    1 => "1 machine differs",
                    many => { (many) " machines differ" }
                }
            } }
            p class="lead" { (report.line) }
            dl class="facts" {
                dt { "at" } dd { (report.at) }
                dt { "nights" } dd {
                    @if let (Some(first), Some(last)) = (report.nights.first(), report.nights.last()) {
                        (first) " to " (last) " (" (report.nights.len()) ")"
                    } @else { "none" }
                }
                dt { "runs" } dd { (report.runs) }
                dt { "exit code" } dd { (report.exit_code) }
            }
        }
    }
}

fn findings(report: &Report) -> Markup {
    html! {
        @if !report.findings.is_empty() { h2 { "Who differs, in what, and what they have in common" } }
        @for finding in &report.findings { (one_finding(finding)) }
    }
}

fn one_finding(finding: &Finding) -> Markup {
    let whom: Vec<&str> = finding.machines.iter().map(|since| since.machine.as_str()).collect();
    let first = finding.verdicts.iter().find_map(|verdict| verdict.first.as_ref());
    html! {
        div class="diagnosis" {
            h3 {
                @if finding.new { "new: " }
                (whom.len()) " of " (whom.len() + finding.others) ": " bdi { (words::names(&whom)) }
            }
            @let others = [words::verdicts(finding), words::arms(finding), words::bits(finding)];
            @for (text, stages) in others.into_iter().flatten() {
                p class="finding" title=(stages.join(", ")) { (text) }
            }
            @if let Some(first) = first { p { "where it starts: " (first) } }
            @if finding.tie {
                p { "As many have the one as the other: nobody knows who is the odd one." }
            }
            p { "since " (words::began(finding)) }
            @match &finding.nearest {
                Some(nearest) => p { (words::near(nearest)) },
                None if finding.causes.is_empty() => p {
                    "No fact of the records, and no pair of them, separates them."
                },
                None => (causes(&finding.causes)),
            }
        }
    }
}

fn causes(causes: &[Cause]) -> Markup {
    html! {
        div class="scroll" { table class="separates" {
            thead { tr {
                th scope="col" { "what separates them" } th scope="col" { "they have" }
                th scope="col" { "the others have" } th scope="col" { "on what it rests" }
            } }
            tbody { @for cause in causes.iter().take(MOST) {
                tr {
                    th scope="row" {
                        @if cause.chosen { "chosen: " }
                        @for fact in &cause.facts { div { (fact.name) } }
                    }
                    td { @for fact in &cause.facts { div { (words::names(&fact.values)) } } }
                    td { @for fact in &cause.facts { div { (words::names(&fact.instead_of)) } } }
                    td { (words::ground(cause)) }
                }
            } }
        } }
        @if causes.len() > MOST { p class="note" { "and " (causes.len() - MOST) " more" } }
    }
}

/// What is wrong besides differences.
fn parts(report: &Report) -> Markup {
    let list = |title: &str, lines: Vec<String>| {
        html! {
            @if !lines.is_empty() {
                h2 { (title) }
                ul { @for line in lines.iter().take(MOST) { li { (line) } } }
                @if lines.len() > MOST { p class="note" { "and " (lines.len() - MOST) " more" } }
            }
        }
    };
    let failing = report.failing.iter().map(|failing| {
        let super::Failing { stage, verdict, machines, of, why } = failing;
        format!("{stage}: {verdict} on {machines} of {of}: {why}")
    });
    let missing = report
        .missing
        .iter()
        .map(|missing| format!("{}: {}", missing.machine, words::missed(missing)));
    html! {
        (list("No report", missing.collect()))
        (list("No pass on most machines", failing.collect()))
        (list("Not steady", report.unsteady.iter().map(words::unsteady).collect()))
        (list("Files that were left out", report.left_out.iter().map(|l| l.why.clone()).collect()))
    }
}

/// Stages and machines.
fn matrix(report: &Report) -> Markup {
    html! {
        h2 { "Stages and machines" }
        p class="legend" {
            @for known in crate::nightly::metrics::VERDICTS { (verdict(known)) " \u{a0} " }
            "\u{2260} verdict or bits are others than on most machines; empty: no report, or no such stage"
        }
        div class="scroll" { table class="fleet" {
            thead { tr {
                th scope="col" { "stage" }
                @for machine in &report.machines { th scope="col" class="upright" { span { (machine.name) } } }
            } }
            tbody { @for row in &report.stages { (matrix_row(row, &report.machines)) } }
        } }
    }
}

fn matrix_row(row: &Row, machines: &[Machine]) -> Markup {
    let cells: BTreeMap<&str, &Cell> =
        row.cells.iter().map(|cell| (cell.machine.as_str(), cell)).collect();
    html! {
        tr {
            th scope="row" { bdi { (row.stage) } }
            @for machine in machines {
                @match cells.get(machine.name.as_str()) {
                    None => td {},
                    Some(cell) => (matrix_cell(cell)),
                }
            }
        }
    }
}

fn matrix_cell(cell: &Cell) -> Markup {
    let odd = if cell.differs { "\u{2260}" } else { "" };
    // Most cells are a pass that says no more than its mark.
    html! {
        @match (&cell.why, cell.verdict) {
            (None, Verdict::Pass) if !cell.differs => td class="v-pass" { (symbol(cell.verdict)) },
            (why, verdict) => td class=(format!("v-{verdict}"))
                title=(format!("{}: {verdict} {}", cell.machine, why.as_deref().unwrap_or_default())) {
                (symbol(verdict)) (odd)
            },
        }
    }
}

fn machines(report: &Report) -> Markup {
    let names = report.machines.iter().flat_map(|machine| machine.facts.keys());
    // The GPU has a column of its own.
    let names: BTreeSet<&String> = names.filter(|name| *name != "gpu").collect();
    html! {
        h2 { "Machines" }
        div class="scroll" { table {
            thead { tr {
                th scope="col" { "machine" } th scope="col" { "verdict" } th scope="col" { "GPU" }
                @for name in &names { th scope="col" { (name) } }
                th scope="col" { "card" } th scope="col" { "nights" } th scope="col" { "last run" }
            } }
            tbody { @for machine in &report.machines {
                tr {
                    th scope="row" { bdi { (machine.name) } }
                    td { @match machine.verdict { Some(known) => (verdict(known)), None => "no report" } }
                    td { (machine.gpu.as_deref().unwrap_or("no GPU")) }
                    @for name in &names {
                        td { (machine.facts.get(*name).map_or("", String::as_str)) }
                    }
                    td { code { (machine.card.as_deref().unwrap_or_default()) } }
                    td class="number" { (machine.nights) }
                    td { (machine.last) }
                }
            } }
        } }
    }
}

fn trends(report: &Report) -> Markup {
    let moving: Vec<&Trend> = report.trends.iter().filter(|t| t.kind != Kind::Flat).collect();
    let chips: BTreeSet<&str> = report.trends.iter().map(|trend| trend.chip.as_str()).collect();
    let tightest: BTreeMap<(&str, &str), &Trend> = report
        .trends
        .iter()
        .filter(|trend| trend.tightest)
        .map(|trend| ((trend.stage.as_str(), trend.chip.as_str()), trend))
        .collect();
    let stages: Vec<&str> = report
        .stages
        .iter()
        .map(|row| row.stage.as_str())
        .filter(|stage| chips.iter().any(|chip| tightest.contains_key(&(*stage, *chip))))
        .collect();
    html! {
        @if !stages.is_empty() {
            h2 { "How values move on each chip" }
            @if moving.is_empty() { p { "None moves by more than one in twenty." } }
            @else {
                ul { @for trend in moving.iter().take(MOST) { li { (words::trend(trend)) } } }
                @if moving.len() > MOST { p class="note" { "and " (moving.len() - MOST) " more" } }
            }
            details class="fold" {
                summary { h3 { "Every stage, by the claim that uses most of its bound" } }
                div class="scroll" { table class="trends" {
                    thead { tr { th scope="col" { "stage" } @for chip in &chips { th scope="col" { (chip) } } } }
                    tbody { @for stage in &stages { tr {
                        th scope="row" { bdi { (stage) } }
                        @for chip in &chips { td {
                            @if let Some(trend) = tightest.get(&(*stage, *chip)) { (curve(trend)) }
                        } }
                    } } }
                } }
            }
        }
    }
}

/// A small curve, with its figures in words.
fn curve(trend: &Trend) -> Markup {
    let values = || trend.values.iter().map(|(_, value)| *value);
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(f64::NEG_INFINITY, f64::max);
    let step = WIDTH / trend.values.len().saturating_sub(1).max(1) as f64;
    let height = |value: f64| {
        let part = if high > low { (value - low) / (high - low) } else { 0.5 };
        (1.0 - part) * (HEIGHT - 4.0) + 2.0
    };
    let point =
        |(place, value): (usize, f64)| format!("{:.0},{:.1}", place as f64 * step, height(value));
    let points: Vec<String> = values().enumerate().map(point).collect();
    html! {
        svg class="curve" width=(WIDTH) height=(HEIGHT) role="img" aria-label=(words::trend(trend)) {
            polyline class="line l0" points=(points.join(" ")) {}
        }
        small {
            (trend.metric) " " (number(trend.last)) ", " (share(trend.used))
            @if trend.kind != Kind::Flat { ", " (trend.kind.name()) " since " (trend.since) }
        }
    }
}

fn histories(report: &Report) -> Markup {
    let wide =
        report.machines.iter().map(|machine| machine.name.chars().count()).max().unwrap_or(0);
    let lines = |of: &[(&str, &str)]| {
        let line = |(name, history): &(&str, &str)| format!("{name:wide$}  {history}");
        of.iter().map(line).collect::<Vec<_>>().join("\n")
    };
    let gravest: Vec<(&str, &str)> = report
        .machines
        .iter()
        .map(|machine| (machine.name.as_str(), machine.history.as_str()))
        .collect();
    html! {
        h2 { "Night by night" }
        p class="legend" {
            "A letter for each night"
            @if let (Some(first), Some(last)) = (report.nights.first(), report.nights.last()) {
                " from " (first) " to " (last)
            }
            ": . pass, d drift, S structural, u unmeasured, b blocked, E error; a blank: no report."
        }
        div class="scroll" { pre { (lines(&gravest)) } }
        @for row in &report.stages {
            @let of_row: Vec<(&str, &str)> =
                row.cells.iter().map(|cell| (cell.machine.as_str(), cell.history.as_str())).collect();
            details class="fold" {
                summary { h3 { bdi { (row.stage) } } }
                div class="scroll" { pre { (lines(&of_row)) } }
            }
        }
    }
}
