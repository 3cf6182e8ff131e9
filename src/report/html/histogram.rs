//! How the errors over their floors are distributed, beside the normal curve
//! that rounding must give: a panel for each GEMM, a line for each layer.

use std::sync::LazyLock;

use maud::{Markup, html};

use super::figure::{figure, shown_share};
use super::{Page, command};
use crate::compare::{Measure, Z_FROM, Z_STEP, ZHistogram};
use crate::compute::arms::is_gemm;
use crate::op::{Arm, Stream, in_layer};
use crate::record::StageRecord;
use crate::report::commands;
use crate::report::layers::Grid;

const BIN: usize = 11;
const WIDTH: usize = 18 * BIN;
const HEIGHT: f64 = 84.0;
/// The share of all values at the upper edge; a normal variable's fullest bin has 0.19.
const MOST: f64 = 0.26;

/// Place among the stage's measures, measure, counts.
type Line<'a> = (usize, &'a Measure, &'a ZHistogram);

/// One site with its layers.
struct Panel<'a> {
    site: &'a str,
    lines: Vec<Line<'a>>,
    /// The layer whose distribution is furthest from the normal one.
    furthest: Line<'a>,
}

impl<'a> Panel<'a> {
    /// None where nothing was counted.
    fn new(site: &'a str, lines: Vec<Line<'a>>) -> Option<Panel<'a>> {
        let apart = lines.iter().map(|line| (distance(line.2), *line));
        let (_, furthest) = apart.max_by(|a, b| a.0.total_cmp(&b.0))?;
        Some(Panel { site, lines, furthest })
    }
}

pub(super) fn histograms(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    let grids = Grid::of(&stage.measures);
    let drawn = grids.iter().map(|grid| (grid, panels(stage, grid)));
    let drawn: Vec<_> = drawn.filter(|(_, panels)| !panels.is_empty()).collect();
    html! {
        @if !drawn.is_empty() {
            p class="note" {
                "z is the error over its predicted deviation, so that the dashed curve of a normal \
                 variable is what must be seen. Bins are half a deviation wide; what lies beyond 4 \
                 stands in the outermost ones. The thick line is the layer that is furthest from it."
            }
        }
        @for (grid, panels) in &drawn {
            figure {
                figcaption { "z of " (grid.pair()) }
                div class="panels" { @for panel in panels { (drawing(panel, place)) } }
                details {
                    summary { "The numbers" }
                    (numbers(panels, place))
                }
            }
            @if let Stream::Arm(arm) = grid.subject {
                (of_tensors(page, stage, arm))
            }
        }
    }
}

fn of_tensors(page: &Page<'_>, stage: &StageRecord, arm: Arm) -> Markup {
    html! {
        @if stage.arms.get(&arm).is_some_and(|record| record.object.is_some()) {
            (command(&commands::export(page.run, stage, arm, page.runs)))
        }
    }
}

/// A panel for each GEMM, and for what a diagnosis names: elsewhere an error is the
/// rounding of one operation, which no normal curve describes.
fn panels<'a>(stage: &'a StageRecord, grid: &Grid<'a>) -> Vec<Panel<'a>> {
    let suspected = |measure: &Measure| stage.diagnoses.iter().any(|d| d.site == measure.site);
    let of_site = |site: &&'a str| {
        let row = grid.row(site).into_iter();
        let shown = row.filter(|(.., measure)| is_gemm(&measure.site) || suspected(measure));
        let lines = shown.filter_map(|(_, number, measure)| {
            Some((number, measure, measure.z_histogram.as_ref()?))
        });
        Panel::new(site, lines.collect())
    };
    grid.sites.iter().filter_map(of_site).collect()
}

fn drawing(panel: &Panel<'_>, place: usize) -> Markup {
    let (furthest, measure, counts) = panel.furthest;
    let layer = match (in_layer(&measure.site.0), panel.lines.len()) {
        (Some((layer, _)), 2..) => format!("layer {layer}: "),
        _ => String::new(),
    };
    let words = format!("{layer}{} beyond 4", shown_share(tails(counts)));
    html! {
        div class="panel" {
            p { code { (panel.site) } " " small { (words) } }
            svg class="z" width=(WIDTH) height="100" viewBox=(format!("0 0 {WIDTH} 100"))
                role="img" aria-label=(format!("z of {}", panel.site)) data-stage=(place) {
                line class="grid" x1="0" x2=(WIDTH) y1=(HEIGHT) y2=(HEIGHT) {}
                line class="grid" x1=(WIDTH / 2) x2=(WIDTH / 2) y1="0" y2=(HEIGHT) {}
                @for (number, _, counts) in &panel.lines {
                    @if *number != furthest {
                        path class="layer" data-m=(number) d=(steps(&shares(counts))) {}
                    }
                }
                path class="layer most" data-m=(furthest) d=(steps(&shares(counts))) {
                    title { (measure.site) }
                }
                path class="normal" d=(steps(&NORMAL)) {}
                @for (bin, name) in [(1, "-4"), (5, "-2"), (9, "0"), (13, "2"), (17, "4")] {
                    text class="tick" x=(bin * BIN) y="97" { (name) }
                }
            }
        }
    }
}

fn shares(counts: &ZHistogram) -> [f64; 18] {
    let whole: u64 = counts.iter().sum();
    counts.map(|count| if whole > 0 { count as f64 / whole as f64 } else { 0.0 })
}

fn tails(counts: &ZHistogram) -> f64 {
    let shares = shares(counts);
    shares[0] + shares[17]
}

/// The outline of bars of these shares.
fn steps(shares: &[f64; 18]) -> String {
    let mut path = String::from("M0");
    for (bin, share) in shares.iter().enumerate() {
        let share = if *share > MOST { MOST } else { *share };
        let y = HEIGHT * (1.0 - share / MOST);
        path.push_str(&format!(" {y:.1}{}{}", 'H', (bin + 1) * BIN));
        if bin + 1 < shares.len() {
            path.push('V');
        }
    }
    path
}

/// Half the sum of the differences of all bins: 0 if equal, 1 if apart.
fn distance(counts: &ZHistogram) -> f64 {
    let apart =
        shares(counts).into_iter().zip(*NORMAL).map(|(share, normal)| (share - normal).abs());
    apart.sum::<f64>() / 2.0
}

/// What a standard normal variable has in each bin.
static NORMAL: LazyLock<[f64; 18]> = LazyLock::new(|| std::array::from_fn(normal_share));

/// The probability that a standard normal variable falls into a bin.
fn normal_share(bin: usize) -> f64 {
    let below = |z: f64| 0.5 * libm::erfc(-z / std::f64::consts::SQRT_2);
    let edge = |edge: usize| Z_FROM + Z_STEP * edge as f64;
    match bin {
        0 => below(Z_FROM),
        17 => 1.0 - below(edge(16)),
        bin => below(edge(bin)) - below(edge(bin - 1)),
    }
}

/// The counts of the layers that are furthest off, and what a normal variable has.
fn numbers(panels: &[Panel<'_>], place: usize) -> Markup {
    html! {
        div class="scroll" {
            table class="numbers" {
                thead { tr {
                    th scope="col" { "z from" }
                    th scope="col" { "normal" }
                    @for panel in panels {
                        th scope="col" { code { (panel.furthest.1.site) } }
                    }
                } }
                tbody {
                    @for bin in 0..18 {
                        tr {
                            th scope="row" {
                                @if bin == 0 { "below" } @else { (Z_FROM + Z_STEP * (bin as f64 - 1.0)) }
                            }
                            td { (shown_share(NORMAL[bin])) }
                            @for &Panel { furthest: (number, _, counts), .. } in panels {
                                td {
                                    (figure(counts[bin] as f64, &format!(
                                        "/stages/{place}/measures/{number}/z_histogram/{bin}"
                                    )))
                                }
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
    fn the_normal_curve_fills_all_bins_and_is_symmetric() {
        let all: [f64; 18] = std::array::from_fn(normal_share);
        assert!((all.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((all[0] - 3.167e-5).abs() < 1e-8, "{}", all[0]);
        for bin in 0..9 {
            assert!((all[bin] - all[17 - bin]).abs() < 1e-12);
        }
    }

    #[test]
    fn a_shifted_distribution_is_further_from_the_curve() {
        let normal: ZHistogram = std::array::from_fn(|bin| (1e6 * normal_share(bin)) as u64);
        let mut shifted = normal;
        shifted.rotate_right(1);
        assert!(distance(&normal) < 1e-4);
        assert!(distance(&shifted) > 0.15);
        let path = steps(&shares(&normal));
        assert!(path.starts_with("M0 84.0H11V") && path.ends_with("H198"), "{path}");
    }
}
