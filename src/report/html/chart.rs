//! Lines from layer to layer, in the same columns as the heatmaps.
//!
//! Each line has its own dashes, marks and name at its end; the numbers stand in
//! a table below, so the picture is never the only place of a number.

use maud::{Markup, html};

use super::figure::{figure, shown};
use super::heatmap::{GUTTER, axis, column_width};
use crate::compare::Measure;
use crate::metric::Metric;
use crate::report::layers::Grid;

const HEIGHT: usize = 190;
const TOP: f64 = 10.0;

/// One line.
pub(super) struct Line<'a> {
    /// What it shows.
    pub name: String,
    /// The metric of its values.
    pub metric: Metric,
    /// Column, place among the stage's measures, measure.
    pub points: Vec<(usize, usize, &'a Measure)>,
}

/// A chart on a logarithmic scale; zeros have no place on it and lie on the floor.
pub(super) fn chart(
    stage: usize,
    grid: &Grid<'_>,
    title: &str,
    lines: &[Line<'_>],
    band: (Option<f64>, Option<f64>),
) -> Markup {
    let value = |line: &Line<'_>, measure: &Measure| {
        measure.metrics.get(&line.metric).copied().filter(|value| value.is_finite())
    };
    let all =
        || lines.iter().flat_map(|line| line.points.iter().filter_map(|(.., m)| value(line, m)));
    let bounds = [band.0, band.1].into_iter().flatten();
    let sizes = all().chain(bounds).filter(|size| *size > 0.0);
    let (low, high) = sizes.fold((f64::INFINITY, 0.0_f64), |(low, high), size| {
        (if size < low { size } else { low }, if size > high { size } else { high })
    });
    if high == 0.0 {
        return html! {
            p { (title) ": " @if all().next().is_some() { "0 at every layer." } @else { "no value." } }
        };
    }
    let (low, high) = (low / 1.15, high * 1.15);
    let usable = HEIGHT as f64 - 24.0 - TOP;
    let y = |size: f64| match size {
        size if size > 0.0 => TOP + usable * (1.0 - (size / low).ln() / (high / low).ln()),
        _ => TOP + usable,
    };
    let step = column_width(grid.layers.len());
    let x = |column: usize| GUTTER + column * step + step / 2;
    let plot = step * grid.layers.len();
    let width = GUTTER + plot + 140;
    html! {
        figure {
            figcaption { (title) }
            div class="scroll" {
                svg class="chart" width=(width) height=(HEIGHT)
                    viewBox=(format!("0 0 {width} {HEIGHT}")) role="img" aria-label=(title) {
                    @if band.0.is_some() || band.1.is_some() {
                        @let top = band.1.map_or(TOP, y);
                        @let bottom = band.0.map_or(TOP + usable, y);
                        rect class="band" x=(GUTTER) y=(round(top)) width=(plot)
                            height=(round(bottom - top)) { title { "within the contract's bounds" } }
                    }
                    @for tick in ticks(low, high) {
                        line class="grid" x1=(GUTTER) x2=(GUTTER + plot) y1=(round(y(tick)))
                            y2=(round(y(tick))) {}
                        text class="name" x=(GUTTER - 8) y=(round(y(tick) + 4.0)) { (shown(tick)) }
                    }
                    @for (number, line) in lines.iter().enumerate() {
                        @let path = path(line.points.iter().filter_map(|(column, _, measure)| {
                            Some((x(*column), y(value(line, measure)?)))
                        }));
                        path class=(format!("line l{}", number % 8)) d=(path) {}
                        @for (column, _, measure) in &line.points {
                            @if let Some(size) = value(line, measure) {
                                circle class=(format!("point l{}", number % 8)) cx=(x(*column))
                                    cy=(round(y(size))) r="2.4" {
                                    title { (measure.site) ": " (line.metric) " " (shown(size)) }
                                }
                            }
                        }
                    }
                    @for (name, class, at) in ends(lines, &|line, measure| value(line, measure).map(&y)) {
                        text class=(class) x=(GUTTER + plot + 6) y=(round(at + 4.0)) { (name) }
                    }
                    (axis(grid, HEIGHT - 6))
                }
            }
            details {
                summary { "The numbers" }
                (numbers(stage, grid, lines))
            }
        }
    }
}

fn round(value: f64) -> String {
    format!("{value:.1}")
}

fn path(points: impl Iterator<Item = (usize, f64)>) -> String {
    let mut text = String::new();
    for (x, y) in points {
        text.push(if text.is_empty() { 'M' } else { 'L' });
        text.push_str(&format!("{x} {}", round(y)));
    }
    text
}

/// Powers of ten within the scale, with halves and doubles where that is too few.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let candidates = |steps: &[f64]| {
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let decades = (first..=last).map(|exponent| 10_f64.powi(exponent));
        let all = decades.flat_map(|decade| steps.iter().map(move |step| step * decade));
        all.filter(|tick| (low..=high).contains(tick)).collect::<Vec<f64>>()
    };
    let tens = candidates(&[1.0]);
    if tens.len() >= 3 {
        let every = tens.len().div_ceil(7);
        return tens.into_iter().step_by(every).collect();
    }
    let more = candidates(&[1.0, 2.0, 5.0]);
    if more.len() >= 2 {
        more
    } else {
        candidates(&[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0])
    }
}

/// The lines' names at their ends, kept apart.
fn ends<'l>(
    lines: &'l [Line<'_>],
    y: &dyn Fn(&Line<'_>, &Measure) -> Option<f64>,
) -> Vec<(&'l str, String, f64)> {
    let mut names: Vec<(&str, String, f64)> = lines
        .iter()
        .enumerate()
        .filter_map(|(number, line)| {
            let last = line.points.iter().rev().find_map(|(.., measure)| y(line, measure))?;
            Some((line.name.as_str(), format!("end l{}", number % 8), last))
        })
        .collect();
    names.sort_by(|a, b| a.2.total_cmp(&b.2));
    for index in 1..names.len() {
        let least = names[index - 1].2 + 13.0;
        if names[index].2 < least {
            names[index].2 = least;
        }
    }
    // What was pushed below the chart goes back up, still apart.
    let mut most = HEIGHT as f64 - 26.0;
    for name in names.iter_mut().rev() {
        if name.2 > most {
            name.2 = most;
        }
        most = name.2 - 13.0;
    }
    names
}

fn numbers(stage: usize, grid: &Grid<'_>, lines: &[Line<'_>]) -> Markup {
    html! {
        div class="scroll" {
            table class="numbers" {
                thead { tr {
                    th scope="col" { "layer" }
                    @for line in lines { th scope="col" { (line.name) " " small { (line.metric) } } }
                } }
                tbody {
                    @for (column, layer) in grid.layers.iter().enumerate() {
                        tr {
                            th scope="row" { (layer) }
                            @for line in lines {
                                td {
                                    @let found = line.points.iter().find(|(at, ..)| *at == column);
                                    @if let Some((_, place, measure)) = found {
                                        @if let Some(value) = measure.metrics.get(&line.metric) {
                                            (figure(*value, &format!(
                                                "/stages/{stage}/measures/{place}/metrics/{}", line.metric
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
    }
}
