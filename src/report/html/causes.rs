//! Where the errors come from: stacked bars of their causes, of all GEMMs
//! together and site by site.
//!
//! Shares are projections on the whole error and add up to one; one below zero
//! (a step that takes some of another back) has no length in a bar, and keeps
//! its digits.

use maud::{Markup, html};

use super::figure::{figure_share, shown_share};
use super::heatmap::{GUTTER, axis, column_width};
use super::{Page, command};
use crate::compare::Account;
use crate::compute::shares::Shares;
use crate::op::{Stream, in_layer, projection_sites};
use crate::record::StageRecord;
use crate::report::commands;

/// The height of a bar, and of what is between two of them.
const BAR: usize = 26;
const GAP: usize = 6;

/// The causes' names as [`Shares`] calls them in run.json, in the order of the steps.
const FIELDS: [&str; 5] = ["weight", "activation", "accumulation", "output", "unexplained"];

pub(super) fn causes(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    let accounts: Vec<(usize, &Account)> =
        stage.accounts.iter().enumerate().filter(|(_, account)| account.shares.is_some()).collect();
    html! {
        @if !stage.shares.is_empty() {
            div class="scroll" {
                table class="numbers causes" {
                    thead { tr {
                        th scope="col" { "all GEMMs of" }
                        th scope="col" { "shares" }
                        @for (cause, (name, _)) in stage.shares[0].1.named().iter().enumerate() {
                            th scope="col" { span class=(format!("swatch c{cause}")) {} " " (name) }
                        }
                    } }
                    tbody {
                        @for (number, (subject, shares)) in stage.shares.iter().enumerate() {
                            tr {
                                th scope="row" { (subject) }
                                td { (bar(shares)) }
                                (columns(shares, &format!("/stages/{place}/shares/{number}/1")))
                            }
                        }
                    }
                }
            }
            @for subject in subjects(&accounts) {
                @let own: Vec<(usize, &Account)> =
                    accounts.iter().copied().filter(|(_, a)| a.subject == subject).collect();
                @if layers(&own).len() > 1 {
                    (by_layer(stage, place, subject, &own))
                } @else {
                    (by_site(place, subject, &own))
                }
            }
            (command(&commands::explain(page.run, stage, page.runs)))
        }
    }
}

fn subjects(accounts: &[(usize, &Account)]) -> Vec<Stream> {
    let mut subjects: Vec<Stream> = accounts.iter().map(|(_, account)| account.subject).collect();
    subjects.dedup();
    subjects
}

fn layers(accounts: &[(usize, &Account)]) -> Vec<u32> {
    let mut layers: Vec<u32> =
        accounts.iter().filter_map(|(_, a)| Some(in_layer(&a.site.0)?.0)).collect();
    layers.sort_unstable();
    layers.dedup();
    layers
}

/// A cell for each of the five shares.
fn columns(shares: &Shares, at: &str) -> Markup {
    html! {
        @for ((_, share), field) in shares.named().iter().zip(FIELDS) {
            td { (figure_share(*share, &format!("{at}/{field}"))) }
        }
    }
}

/// The five shares side by side.
fn bar(shares: &Shares) -> Markup {
    let parts = parts(shares);
    let left = |cause: usize| 100.0 * parts[..cause].iter().sum::<f64>();
    html! {
        svg class="stack" width="200" height="14" viewBox="0 0 100 14" preserveAspectRatio="none"
            aria-hidden="true" {
            @for (cause, part) in parts.iter().enumerate() {
                @if *part > 0.0 {
                    rect class=(format!("c{cause}")) x=(format!("{:.2}", left(cause))) y="0"
                        width=(format!("{:.2}", 100.0 * part)) height="14" {}
                }
            }
        }
    }
}

/// The lengths of the parts of a bar.
fn parts(shares: &Shares) -> [f64; 5] {
    let lengths = shares.named().map(|(_, share)| if share > 0.0 { share } else { 0.0 });
    let whole: f64 = lengths.iter().sum();
    lengths.map(|length| if whole > 0.0 { length / whole } else { 0.0 })
}

/// The words of one site: its shares, and its error beside the floor.
fn words(account: &Account, shares: &Shares) -> String {
    let named = shares.named().map(|(name, share)| format!("{name} {}", shown_share(share)));
    format!(
        "{}: {}; floor {}, observed {}",
        account.site,
        named.join(", "),
        shown_share(account.floor),
        shown_share(account.observed)
    )
}

/// A bar for every layer and site. One path holds all parts of a row that have
/// one cause, for a page of many layers would be large otherwise.
fn by_layer(
    stage: &StageRecord,
    place: usize,
    subject: Stream,
    accounts: &[(usize, &Account)],
) -> Markup {
    let layers = layers(accounts);
    let step = column_width(layers.len());
    let column = |site: &str| match in_layer(site) {
        Some((layer, _)) => layers.binary_search(&layer).unwrap_or(0),
        None => layers.len() - 1,
    };
    let mut rows = projection_sites();
    for (_, account) in accounts {
        let name = in_layer(&account.site.0).map_or(account.site.0.as_str(), |(_, name)| name);
        if !rows.contains(&name) {
            rows.push(name);
        }
    }
    rows.retain(|row| accounts.iter().any(|(_, a)| is_row(&a.site.0, row)));
    let (width, height) = (GUTTER + step * layers.len() + 12, (BAR + GAP) * rows.len() + 20);
    let title = format!("Causes of {subject}'s error, layers across, GEMMs down");
    html! {
        figure class="mapped" {
            figcaption { (title) }
            div class="scroll" {
                svg class="heat stacks" width=(width) height=(height)
                    viewBox=(format!("0 0 {width} {height}")) role="group" aria-label=(title)
                    tabindex="0" data-stage=(place) style=(format!("--cell:{}px", step - 1)) {
                    @for (number, row) in rows.iter().enumerate() {
                        @let top = number * (BAR + GAP);
                        @let cells: Vec<(usize, &Account, &Shares)> = accounts
                            .iter()
                            .filter(|(_, a)| is_row(&a.site.0, row))
                            .filter_map(|(number, a)| Some((*number, *a, a.shares.as_ref()?)))
                            .collect();
                        text class="name" x=(GUTTER - 8) y=(top + 17) { (row) }
                        @for cause in 0..FIELDS.len() {
                            @let path: String = cells.iter().map(|(_, account, shares)| {
                                let x = GUTTER + column(&account.site.0) * step;
                                segment((x, top, step - 1), &parts(shares), cause)
                            }).collect();
                            @if !path.is_empty() { path class=(format!("c{cause}")) d=(path) {} }
                        }
                        @for (number, account, shares) in &cells {
                            rect class="hit" x=(GUTTER + column(&account.site.0) * step) y=(top)
                                data-a=(number) { title { (words(account, shares)) } }
                        }
                    }
                    (axis(&layers, height - 6))
                }
            }
            p class="legend" {
                "from the bottom up: "
                @for (cause, (name, _)) in stage.shares[0].1.named().iter().enumerate() {
                    span class=(format!("swatch c{cause}")) {} " " (name) " "
                }
            }
            output class="readout" aria-live="polite" {
                "Point at a bar, or focus the picture and use the arrow keys."
            }
        }
    }
}

fn is_row(site: &str, row: &str) -> bool {
    in_layer(site).map_or(site, |(_, name)| name) == row
}

/// The part of one cause in one bar, as a closed path; nothing if it has no height.
fn segment((x, top, width): (usize, usize, usize), parts: &[f64; 5], cause: usize) -> String {
    let height = BAR as f64 * parts[cause];
    if height < 0.05 {
        return String::new();
    }
    let below: f64 = parts[..=cause].iter().sum();
    let y = top as f64 + BAR as f64 * (1.0 - below);
    format!("M{x} {y:.1}h{width}v{height:.1}h-{width}z")
}

/// A row for each site of a stage without layers.
fn by_site(place: usize, subject: Stream, accounts: &[(usize, &Account)]) -> Markup {
    html! {
        div class="scroll" {
            table class="numbers causes" {
                thead { tr {
                    th scope="col" { "site of " (subject) } th scope="col" { "shares" }
                    @for name in FIELDS { th scope="col" { (name) } }
                    th scope="col" { "floor" } th scope="col" { "observed" }
                } }
                tbody {
                    @for (number, account) in accounts {
                        @if let Some(shares) = &account.shares {
                            @let at = format!("/stages/{place}/accounts/{number}");
                            tr {
                                th scope="row" { code { (account.site) } }
                                td { (bar(shares)) }
                                (columns(shares, &format!("{at}/shares")))
                                td { (figure_share(account.floor, &format!("{at}/floor"))) }
                                td { (figure_share(account.observed, &format!("{at}/observed"))) }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_zero_has_no_length_and_the_rest_fills_the_bar() {
        let shares = Shares {
            weight: 0.6,
            activation: 0.5,
            accumulation: -0.1,
            output: 0.0,
            unexplained: 0.0,
        };
        let parts = parts(&shares);
        assert_eq!((parts[2], parts[3]), (0.0, 0.0));
        assert!((parts.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!(segment((0, 0, 10), &parts, 2), "");
        assert_eq!(segment((0, 0, 10), &parts, 0), "M0 11.8h10v14.2h-10z");
    }
}
