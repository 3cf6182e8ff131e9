//! Lines from layer to layer, in the same columns as the heatmaps.
//!
//! Each line has its own dashes, marks and name at its end; the numbers stand in
//! a table below, so the picture is never the only place of a number.

use maud::{Markup, html};

use super::figure::{figure, shown};
use super::heatmap::{GUTTER, axis, column_width};

const HEIGHT: usize = 190;
const TOP: f64 = 10.0;

/// One line.
pub(super) struct Line {
    /// What it shows.
    pub name: String,
    /// What its values are, in a word; empty where the name says it.
    pub unit: &'static str,
    /// From layer to layer.
    pub points: Vec<Point>,
}

/// One value of run.json.
pub(super) struct Point {
    /// The layer's column.
    pub column: usize,
    /// The value.
    pub value: f64,
    /// What the mark says, before the value.
    pub label: String,
    /// Where it stands, as a JSON pointer.
    pub at: String,
}

/// What a chart shows.
pub(super) struct Chart<'a> {
    /// Its caption.
    pub title: &'a str,
    /// The layers of its columns.
    pub layers: &'a [u32],
    /// Its lines.
    pub lines: &'a [Line],
    /// The bounds that a contract sets to all values.
    pub band: (Option<f64>, Option<f64>),
    /// A value that all others are seen against.
    pub rule: Option<f64>,
}

/// A chart on a logarithmic scale; zeros have no place on it and lie on the floor.
pub(super) fn chart(chart: &Chart<'_>) -> Markup {
    let &Chart { title, layers, lines, band, rule } = chart;
    let finite = |line: &'_ Line| -> Vec<f64> {
        line.points.iter().map(|point| point.value).filter(|value| value.is_finite()).collect()
    };
    let all: Vec<f64> = lines.iter().flat_map(finite).collect();
    let bounds = [band.0, band.1, rule].into_iter().flatten();
    let sizes = all.iter().copied().chain(bounds).filter(|size| *size > 0.0);
    let (low, high) = sizes.fold((f64::INFINITY, 0.0_f64), |(low, high), size| {
        (if size < low { size } else { low }, if size > high { size } else { high })
    });
    if high == 0.0 || all.is_empty() {
        return html! {
            p { (title) ": " @if all.is_empty() { "no value." } @else { "0 at every layer." } }
        };
    }
    let (low, high) = (low / 1.15, high * 1.15);
    let usable = HEIGHT as f64 - 24.0 - TOP;
    let y = |size: f64| match size {
        size if size > 0.0 => TOP + usable * (1.0 - (size / low).ln() / (high / low).ln()),
        _ => TOP + usable,
    };
    let step = column_width(layers.len());
    let x = |column: usize| GUTTER + column * step + step / 2;
    let plot = step * layers.len();
    let width = GUTTER + plot + 96;
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
                    @if let Some(rule) = rule {
                        line class="rule" x1=(GUTTER) x2=(GUTTER + plot) y1=(round(y(rule)))
                            y2=(round(y(rule))) {}
                    }
                    @for (number, line) in lines.iter().enumerate() {
                        @let drawn = || line.points.iter().filter(|point| point.value.is_finite());
                        @let path = path(drawn().map(|point| (x(point.column), y(point.value))));
                        path class=(format!("line l{}", number % 8)) d=(path) {}
                        @for point in drawn() {
                            circle class=(format!("point l{}", number % 8)) cx=(x(point.column))
                                cy=(round(y(point.value))) r="2.4" {
                                title { (point.label) " " (shown(point.value)) }
                            }
                        }
                    }
                    @for (name, class, at) in ends(lines, &y) {
                        text class=(class) x=(GUTTER + plot + 6) y=(round(at + 4.0)) { (name) }
                    }
                    (axis(layers, HEIGHT - 6))
                }
            }
            details {
                summary { "The numbers" }
                (numbers(layers, lines))
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
fn ends<'l>(lines: &'l [Line], y: &dyn Fn(f64) -> f64) -> Vec<(&'l str, String, f64)> {
    let mut names: Vec<(&str, String, f64)> = lines
        .iter()
        .enumerate()
        .filter_map(|(number, line)| {
            let last = line.points.iter().rev().find(|point| point.value.is_finite())?;
            Some((line.name.as_str(), format!("end l{}", number % 8), y(last.value)))
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

fn numbers(layers: &[u32], lines: &[Line]) -> Markup {
    html! {
        div class="scroll" {
            table class="numbers" {
                thead { tr {
                    th scope="col" { "layer" }
                    @for line in lines { th scope="col" { (line.name) " " small { (line.unit) } } }
                } }
                tbody {
                    @for (column, layer) in layers.iter().enumerate() {
                        tr {
                            th scope="row" { (layer) }
                            @for line in lines {
                                td {
                                    @if let Some(point) = line.points.iter().find(|p| p.column == column) {
                                        (figure(point.value, &point.at))
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
