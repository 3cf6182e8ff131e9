//! Where something starts, what it is, and how well every hypothesis fits.

use maud::{Markup, html};

use super::figure::{figure, figure_share, shown_share};
use super::{Page, command};
use crate::compare::Diagnosis;
use crate::op::Stream;
use crate::record::StageRecord;
use crate::report::commands;

/// All diagnoses of stage number `place`; nothing where nothing is suspicious.
pub(super) fn diagnoses(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    html! {
        @if !stage.diagnoses.is_empty() {
            h3 { "Where it starts, and what it is" }
            @for (number, diagnosis) in stage.diagnoses.iter().enumerate() {
                (one(diagnosis, &format!("/stages/{place}/diagnoses/{number}")))
            }
            (command(&commands::explain(page.run, stage, page.runs)))
        }
    }
}

fn one(diagnosis: &Diagnosis, at: &str) -> Markup {
    html! {
        div class="diagnosis" {
            p class="finding" { strong { (diagnosis.sentence()) } }
            dl {
                dt { "where" } dd {
                    code { (diagnosis.site) } ", op " (diagnosis.op) ": " (diagnosis.place())
                }
                dt { "evidence" } dd {
                    (diagnosis.evidence) ", " (diagnosis.subject) " held against "
                    (held_against(diagnosis))
                }
                @if let Some(ratio) = diagnosis.ratio {
                    dt { "local error over its floor" } dd { (figure(ratio, &format!("{at}/ratio"))) }
                }
                @if let Some(aftermath) = diagnosis.aftermath() {
                    dt { "further on" } dd { (aftermath) }
                }
            }
            @if !diagnosis.fits.is_empty() { (fits(diagnosis, at)) }
        }
    }
}

fn held_against(diagnosis: &Diagnosis) -> String {
    match diagnosis.judge {
        judge if judge == diagnosis.subject => "its own repeats".to_owned(),
        Stream::Anchored(arm) => format!("the reference on {arm}'s own inputs"),
        judge => judge.to_string(),
    }
}

/// The hypotheses, the best first, each with what it explains.
fn fits(diagnosis: &Diagnosis, at: &str) -> Markup {
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
                        tr class=[fit.names_the_bug().then_some("named")] {
                            th scope="row" {
                                (fit.cause)
                                @if number == 0 && fit.names_the_bug() { " " small { "names the bug" } }
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
