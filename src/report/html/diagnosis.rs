//! Where something starts, what it is, and how well every hypothesis fits.

use maud::{Markup, html};

use super::figure::{figure, figure_share, shown_share};
use super::{Page, command, fold};
use crate::compare::Diagnosis;
use crate::op::{Site, Stream};
use crate::record::StageRecord;
use crate::report::commands;
use crate::verdict::Verdict;

/// What was found in stage number `place`: the finding in sight, the hypotheses folded. Nothing
/// where nothing is suspicious; of a stage that passes nothing is called a bug.
pub(super) fn diagnoses(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    let passes = stage.verdict == Verdict::Pass;
    let mut all: Vec<(usize, &Diagnosis)> = stage.diagnoses.iter().enumerate().collect();
    // Held against another judge, the same finding is no second one.
    let mut told: Vec<(&Site, String)> = Vec::new();
    all.retain(|(_, diagnosis)| {
        let finding = (&diagnosis.site, diagnosis.sentence());
        let new = !told.contains(&finding);
        if new {
            told.push(finding);
        }
        new
    });
    let at = |number: usize| format!("/stages/{place}/diagnoses/{number}");
    let title = match passes {
        true => "Differences in bits, within every bound",
        false => "Where it starts, and what it is",
    };
    let all_told = html! {
        @for (number, diagnosis) in &all { (one(diagnosis, &at(*number), passes)) }
        (command(&commands::explain(page.run, stage, page.runs)))
    };
    html! {
        @if let Some(((number, first), rest)) = all.split_first().filter(|_| !passes) {
            h3 { (title) }
            (one(first, &at(*number), passes))
            @if !rest.is_empty() {
                details class="fold" {
                    summary { h3 { "Other findings: " (rest.len()) } }
                    @for (number, diagnosis) in rest { (one(diagnosis, &at(*number), passes)) }
                }
            }
        } @else if !all.is_empty() {
            (fold(title, &all_told))
        }
    }
}

fn one(diagnosis: &Diagnosis, at: &str, passes: bool) -> Markup {
    html! {
        div class="diagnosis" {
            p class="finding" {
                @if passes { (diagnosis.place()) } @else { strong { (diagnosis.sentence()) } }
            }
            dl {
                dt { "where" } dd {
                    code { (diagnosis.site) } ", op " (diagnosis.op)
                    @if !passes { ": " (diagnosis.place()) }
                }
                dt { "evidence" } dd {
                    (diagnosis.evidence) ", " (diagnosis.subject) " held against "
                    (held_against(diagnosis))
                }
                @if let Some(aftermath) = diagnosis.aftermath().filter(|_| !passes) {
                    dt { "further on" } dd { (aftermath) }
                }
            }
            @if !diagnosis.fits.is_empty() {
                details {
                    summary { "Hypotheses: " (diagnosis.fits.len()) }
                    @if let Some(ratio) = diagnosis.ratio {
                        p {
                            "Local error over its floor: " (figure(ratio, &format!("{at}/ratio")))
                        }
                    }
                    (fits(diagnosis, at, passes))
                }
            }
        }
    }
}

fn held_against(diagnosis: &Diagnosis) -> String {
    match diagnosis.judge {
        judge if judge == diagnosis.subject => "its own repeats".to_owned(),
        Stream::Anchored(arm) => format!("the reference on {arm}'s own inputs"),
        Stream::Predicted(arm) => format!("the engine's kernels on {arm}'s own inputs"),
        judge => judge.to_string(),
    }
}

/// The hypotheses, the best first, each with what it explains.
fn fits(diagnosis: &Diagnosis, at: &str, passes: bool) -> Markup {
    html! {
        div class="scroll" {
            table class="fits" {
                thead { tr {
                    th scope="col" { "hypothesis" }
                    th scope="col" { "what it says" }
                    th scope="col" { "explains" }
                    th scope="col" { "bits that differ from it" }
                    th scope="col" { "numbers fitted" }
                } }
                tbody {
                    @for (number, fit) in diagnosis.fits.iter().enumerate() {
                        @let at = format!("{at}/fits/{number}");
                        tr class=[(fit.names_the_bug() && !passes).then_some("named")] {
                            th scope="row" {
                                (fit.cause)
                                @if number == 0 && fit.names_the_bug() && !passes { " " small { "names the bug" } }
                            }
                            td class="detail" { (fit.detail) }
                            td class="headroom" { (explained(fit.explained, &format!("{at}/explained"))) }
                            td class="number" {
                                (figure(fit.mismatches as f64, &format!("{at}/mismatches"))) " of "
                                (figure(fit.elements as f64, &format!("{at}/elements")))
                            }
                            td class="number" {
                                (figure(fit.parameters as f64, &format!("{at}/parameters")))
                            }
                        }
                    }
                }
            }
        }
        p class="note" {
            "Each hypothesis computes the op again from the same inputs, with one thing wrong. What it \
             explains is its part of the difference that the recipe leaves."
        }
    }
}

/// A share of the difference as a bar; what is worse than nothing has no length.
fn explained(share: f64, at: &str) -> Markup {
    let filled = 100.0 * share.clamp(0.0, 1.0);
    html! {
        span class="bar whole" aria-hidden="true" { span style=(format!("width:{filled:.1}%")) {} }
        span class="used" title=(shown_share(share)) { (figure_share(share, at)) }
    }
}
