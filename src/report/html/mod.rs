//! report.html: a run as one page, without network or server.
//!
//! It reads the run's record alone. All text passes through maud, which escapes
//! it; scripts carry a nonce that depends on the whole record, so that no name
//! in a manifest can know it. A very long page packs its figures; its script unfolds them.

mod causes;
mod chart;
mod diagnosis;
mod figure;
mod growth;
mod heatmap;
mod histogram;
mod overview;
mod packed;
mod stage;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use rayon::prelude::*;

use crate::record::RunRecord;
use crate::report::commands::Suggestion;
use crate::report::diff::{Change, diff_table};
use crate::verdict::{Outcome, Verdict};

/// What is drawn.
#[derive(Clone, Copy)]
struct Page<'a> {
    run: &'a RunRecord,
    runs: &'a str,
    /// Whether one map stands for all of a pair of streams.
    brief: bool,
}

/// A run's page; `runs` is the folder of runs, for the commands on it.
pub fn page(run: &RunRecord, runs: &str) -> String {
    let page = Page { run, runs, brief: false };
    let places = || (0..run.stages.len()).into_par_iter();
    let figures: Vec<Markup> = places().map(|place| stage::figures(&page, place)).collect();
    let sizes = || figures.iter().map(|figures| figures.0.len());
    let large = sizes().filter(|size| *size > LARGE).count();
    let long = large > 1 && sizes().sum::<usize>() > MOST_WRITTEN_OUT;
    let figures: Vec<Markup> = match long {
        false => figures,
        true => {
            let brief = Page { brief: true, ..page };
            places().map(|place| packed::packed(&stage::figures(&brief, place))).collect()
        }
    };
    let sections: Vec<Markup> = figures
        .into_par_iter()
        .enumerate()
        .map(|(place, figures)| stage::section(&page, place, &figures))
        .collect();
    let body = html! {
        (overview::header(&page))
        main {
            (overview::contents(run))
            (overview::stages(&page))
            (overview::families(&page))
            @if run.stages.iter().any(|stage| !stage.needs.is_empty()) { (overview::graph(run)) }
            @for section in sections { (section) }
        }
        footer {
            p {
                "Every figure stands in " a href="run.json" { "run.json" }
                " at the place that its attribute " code { "data-at" } " names. "
                "Headroom: the share of the nearer bound that the worst site uses; beyond 100 % "
                "the claim is falsified."
                @if long {
                    " A run of this size has its figures packed: one map for each pair, without "
                    "places. run.json and " code { "runner report --format csv" } " have all."
                }
            }
        }
    };
    document(&format!("{}: {}", run.verdict, overview::headline(run)), &body)
}

/// Bytes of figures up to which a page holds them as they are; a longer one, of several stages
/// with many, packs them.
const MOST_WRITTEN_OUT: usize = 2_500_000;
/// Bytes of a stage's figures that are many.
const LARGE: usize = 100_000;

/// What changed from one run to another, side by side.
pub fn diff_page(before: &RunRecord, after: &RunRecord, changes: &[Change]) -> String {
    let title = format!("{} -> {}", before.id, after.id);
    document(&title, &diff_table(before, after, changes))
}

/// A whole page around a body: without network or server, and with no script but ours.
pub fn document(title: &str, body: &Markup) -> String {
    let nonce = blake3::hash(body.0.as_bytes()).to_hex().to_string();
    let policy = format!(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; \
         base-uri 'none'; form-action 'none'"
    );
    let document = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(policy);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                // Browsers ask for an icon unless they are given an empty one.
                link rel="icon" href="data:,";
                title { (title) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                (body)
                script nonce=(nonce) { (PreEscaped(include_str!("page.js"))) }
            }
        }
    };
    document.into_string()
}

/// A verdict as a word with its mark: never by colour alone.
pub fn verdict(verdict: Verdict) -> Markup {
    html! {
        span class=(format!("verdict v-{verdict}")) {
            span aria-hidden="true" { (symbol(verdict)) } " " (verdict)
        }
    }
}

/// A verdict's mark.
pub fn symbol(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "\u{2713}",
        Verdict::Drift => "\u{2248}",
        Verdict::Structural => "\u{2715}",
        Verdict::Unmeasured => "\u{25cb}",
        Verdict::Blocked => "\u{2298}",
        Verdict::Error => "!",
    }
}

fn outcome(outcome: Outcome) -> Markup {
    let (class, mark, word) = match outcome {
        Outcome::Held => ("pass", "\u{2713}", "held"),
        Outcome::Falsified => ("structural", "\u{2715}", "falsified"),
        Outcome::Unmeasured => ("unmeasured", "\u{25cb}", "unmeasured"),
    };
    html! {
        span class=(format!("verdict v-{class}")) { span aria-hidden="true" { (mark) } " " (word) }
    }
}

/// A part of a stage that is folded until it is asked for; nothing where there is nothing.
fn fold(title: &str, body: &Markup) -> Markup {
    html! {
        @if !body.0.is_empty() {
            details class="fold" { summary { h3 { (title) } } (body) }
        }
    }
}

/// The command that shows more of what stands above it.
fn command(Suggestion { command, purpose }: &Suggestion) -> Markup {
    html! {
        p class="more" { code class="command" { (command) } " " small { (purpose) } }
    }
}

fn commands(all: &[Suggestion]) -> Markup {
    html! {
        ul class="commands" {
            @for Suggestion { command, purpose } in all {
                li { code class="command" { (command) } " " small { (purpose) } }
            }
        }
    }
}
