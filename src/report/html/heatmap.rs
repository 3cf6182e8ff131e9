//! Heatmaps: layers across, sites down, one for each metric worth a look.
//!
//! A cell outside its bound carries a cross and one without a value a dot, so
//! that nothing is said by colour alone.

use maud::{Markup, html};
use rayon::prelude::*;

use super::Page;
use super::figure::shown;
use crate::metric::Metric;
use crate::op::{Arm, Stream};
use crate::record::StageRecord;
use crate::report::layers::Grid;
use crate::text::share;
use crate::verdict::Judgement;

/// The width of the column of names, shared with the charts.
pub(super) const GUTTER: usize = 118;
const CELL_HEIGHT: usize = 17;
const SHADES: usize = 8;
/// Shades on either side of 1.
const SIDES: usize = 4;

/// The width of a layer's column: few layers are easy to read, many still fit.
pub(super) fn column_width(layers: usize) -> usize {
    (900 / layers.max(1)).clamp(11, 48)
}

/// Every heatmap of one pair of streams, one shown at a time.
pub(super) fn heatmaps(
    page: &Page<'_>,
    stage: &StageRecord,
    place: usize,
    grid: &Grid<'_>,
    pair: usize,
) -> Markup {
    let judged: Vec<(usize, &Judgement)> = stage
        .judgements
        .iter()
        .enumerate()
        .filter(|(_, j)| j.compare == [grid.subject, grid.judge])
        .collect();
    let shares = if judged.is_empty() { None } else { Some(Shown::Shares) };
    let metrics = worth_a_look(grid).into_iter().map(Shown::Metric);
    // Against the reference few sites are bounded, and drift is what one looks for.
    let total = grid.judge == Stream::Arm(Arm::Reference) && grid.subject != grid.judge;
    let mut order: Vec<Shown> = match total {
        true => metrics.chain(shares).collect(),
        false => shares.into_iter().chain(metrics).collect(),
    };
    if page.brief {
        order.truncate(1);
    }
    let draw = |shown: Shown| match shown {
        Shown::Shares => {
            let meaning = "the largest share of a bound that any falsifier finds used at the site; \
                           beyond 100 % it is falsified";
            ("share of the bound", meaning, share_map(place, grid, &judged))
        }
        Shown::Metric(metric) => (metric.name(), metric.meaning(), metric_map(place, grid, metric)),
    };
    let maps: Vec<(&str, &str, Markup)> = order.into_par_iter().map(draw).collect();
    let group = format!("map-{place}-{pair}");
    html! {
        div class="tabs" {
            @for (number, (name, ..)) in maps.iter().enumerate() {
                input type="radio" name=(group) id=(format!("{group}-{number}")) checked[number == 0];
                label for=(format!("{group}-{number}")) { (name) }
            }
            @for (_, meaning, map) in &maps {
                div class="tab" {
                    p class="note" { (meaning) }
                    (map)
                    output class="readout" aria-live="polite" {
                        "Point at a cell, or focus the map and use the arrow keys."
                    }
                }
            }
        }
    }
}

/// What a map shows.
enum Shown {
    /// How much of its bounds a site uses.
    Shares,
    /// One metric's values.
    Metric(Metric),
}

/// The metrics that tell something between two streams.
fn worth_a_look(grid: &Grid<'_>) -> Vec<Metric> {
    let metrics: &[Metric] = match (grid.subject, grid.judge) {
        (a, b) if a == b => &[Metric::BitMismatches],
        (_, Stream::Anchored(_)) => &[Metric::ZRms, Metric::RowUlp, Metric::Nmse],
        (_, Stream::Arm(Arm::Reference)) => &[Metric::Nmse, Metric::MaxAbs],
        _ => &[Metric::BitMismatches, Metric::MaxUlp, Metric::Nmse],
    };
    metrics.iter().copied().filter(|metric| grid.has(*metric)).collect()
}

/// What one cell shows.
struct Cell {
    class: String,
    mark: Option<&'static str>,
    judgement: Option<usize>,
    title: String,
}

fn share_map(place: usize, grid: &Grid<'_>, judged: &[(usize, &Judgement)]) -> Markup {
    let cell = |at: (&str, usize)| {
        let (_, measure) = grid.cells.get(&at)?;
        let mut judging = judged.iter().filter(|(_, j)| j.judges(measure)).peekable();
        judging.peek()?;
        let mut most: Option<(usize, &Judgement, f64, f64)> = None;
        let mut missing = None;
        for &(number, judgement) in judging {
            let value = measure.metrics.get(&judgement.metric).copied();
            match value.filter(|value| value.is_finite()) {
                None => missing = Some((number, judgement)),
                Some(value) => {
                    let used = judgement.share_of_bound(measure, value);
                    if most.is_none_or(|(.., before)| used > before) {
                        most = Some((number, judgement, value, used));
                    }
                }
            }
        }
        let site = &measure.site;
        Some(match (most, missing) {
            (Some((number, judgement, value, used)), None) => Cell {
                class: if used > 1.0 { "out".to_owned() } else { shade(used) },
                mark: (used > 1.0).then_some("x"),
                judgement: Some(number),
                title: format!(
                    "{site}: {} of the bound of {} ({} {})",
                    share(used),
                    judgement.falsifier,
                    judgement.metric,
                    shown(value)
                ),
            },
            (Some((number, judgement, value, used)), Some(_)) if used > 1.0 => Cell {
                class: "out".to_owned(),
                mark: Some("x"),
                judgement: Some(number),
                title: format!(
                    "{site}: {} ({} {})",
                    judgement.falsifier,
                    judgement.metric,
                    shown(value)
                ),
            },
            (_, Some((number, judgement))) => Cell {
                class: "none".to_owned(),
                mark: Some("dot"),
                judgement: Some(number),
                title: format!(
                    "{site}: {} has no {}: {}",
                    judgement.falsifier,
                    judgement.metric,
                    measure.unmeasured.as_deref().unwrap_or("too little was compared")
                ),
            },
            (None, None) => return None,
        })
    };
    let legend = html! {
        span class="swatch s0" {} "0 "
        @for step in 1..=SHADES { span class=(format!("swatch s{step}")) {} }
        " 100 % of the bound "
        span class="swatch out" {} "x outside "
        span class="swatch none" {} "dot: no value "
        span class="swatch nothing" {} "not judged"
    };
    map(place, grid, "share of the bound", None, &cell, &legend)
}

fn metric_map(place: usize, grid: &Grid<'_>, metric: Metric) -> Markup {
    let values = grid.cells.values().filter_map(|(_, m)| m.metrics.get(&metric).copied());
    let sizes = values.filter(|v| v.is_finite() && *v != 0.0).map(f64::abs);
    let (low, high) = sizes.fold((f64::INFINITY, 0.0_f64), |(low, high), size| {
        (if size < low { size } else { low }, if size > high { size } else { high })
    });
    let span = if high > low { (high / low).ln() } else { 0.0 };
    // What is a ratio to its floor is right at 1, and lies to either side of it.
    let around = (metric == Metric::ZRms).then(|| reach(low, high));
    let cell = |at: (&str, usize)| {
        let (_, measure) = grid.cells.get(&at)?;
        let site = &measure.site;
        Some(match measure.metrics.get(&metric) {
            Some(value) if value.is_finite() => {
                let place = if span > 0.0 { (value.abs() / low).ln() / span } else { 1.0 };
                let class = match around {
                    Some(reach) => side(*value, reach),
                    None if *value == 0.0 => "s0".to_owned(),
                    None => shade(place.max(1e-9)),
                };
                Cell {
                    class,
                    mark: None,
                    judgement: None,
                    title: format!("{site}: {metric} {}", shown(*value)),
                }
            }
            Some(_) => Cell {
                class: "none".to_owned(),
                mark: Some("x"),
                judgement: None,
                title: format!("{site}: {metric} not finite"),
            },
            None => {
                let reason = measure.unmeasured.as_deref()?;
                Cell {
                    class: "none".to_owned(),
                    mark: Some("dot"),
                    judgement: None,
                    title: format!("{site}: no {metric}: {reason}"),
                }
            }
        })
    };
    let legend = html! {
        @if let Some(reach) = around {
            (shown(1.0 / reach)) " "
            @for step in (1..=SIDES).rev() { span class=(format!("swatch b{step}")) {} }
            span class="swatch m0" {}
            @for step in 1..=SIDES { span class=(format!("swatch a{step}")) {} }
            " " (shown(reach)) ", in equal ratios; 1 in the middle is what rounding must cost "
        } @else {
            span class="swatch s0" {} "0 "
        }
        @if high > 0.0 && around.is_none() {
            (shown(low)) " "
            @for step in 1..=SHADES { span class=(format!("swatch s{step}")) {} }
            " " (shown(high)) ", in equal ratios "
        }
        span class="swatch none" {} "dot: no value"
    };
    map(place, grid, metric.name(), Some(metric), &cell, &legend)
}

/// The shade of a share between 0 and 1.
fn shade(share: f64) -> String {
    let step = if share <= 0.0 { 0 } else { (share * SHADES as f64).ceil() as usize };
    format!("s{}", step.min(SHADES))
}

/// The furthest ratio from 1 that a map around 1 tells apart: no less than a quarter.
fn reach(low: f64, high: f64) -> f64 {
    let furthest = high.max(1.0 / low.max(f64::MIN_POSITIVE));
    if furthest.is_finite() { furthest.clamp(1.25, 10.0) } else { 1.25 }
}

/// The shade of a ratio: below 1 in one colour, above 1 in another, at 1 in neither.
fn side(ratio: f64, reach: f64) -> String {
    let share = ratio.max(f64::MIN_POSITIVE).ln() / reach.ln();
    let step = (share.abs() * SIDES as f64 + 0.5).floor().min(SIDES as f64);
    match (step as usize, share > 0.0) {
        (0, _) => "m0".to_owned(),
        (step, true) => format!("a{step}"),
        (step, false) => format!("b{step}"),
    }
}

fn map<'g>(
    place: usize,
    grid: &'g Grid<'_>,
    name: &str,
    metric: Option<Metric>,
    cell: &dyn Fn((&'g str, usize)) -> Option<Cell>,
    legend: &Markup,
) -> Markup {
    let step = column_width(grid.layers.len());
    let width = GUTTER + step * grid.layers.len().max(1) + 12;
    let height = CELL_HEIGHT * grid.sites.len() + 24;
    let label = format!("{}: {name}, layers across, sites down", grid.pair());
    html! {
        div class="scroll" {
            svg class="heat" width=(width) height=(height) viewBox=(format!("0 0 {width} {height}"))
                role="group" aria-label=(label) tabindex="0" data-stage=(place)
                data-metric=[metric.map(Metric::name)] style=(format!("--cell:{}px", step - 1)) {
                @for (row, site) in grid.sites.iter().enumerate() {
                    @let y = row * CELL_HEIGHT;
                    text class="name" x=(GUTTER - 8) y=(y + 12) { (site) }
                    @for column in 0..grid.layers.len().max(1) {
                        @if let Some(cell) = cell((site, column)) {
                            @let x = GUTTER + column * step;
                            @let number = grid.cells.get(&(*site, column)).map(|(number, _)| number);
                            rect x=(x) y=(y) class=(cell.class) data-m=[number]
                                data-j=[cell.judgement] { title { (cell.title) } }
                            @match cell.mark {
                                Some("x") => path class="cross" d=(cross(x, y, step)) {},
                                Some(_) => circle class="dot" cx=(x + step / 2) cy=(y + 8) r="1.6" {},
                                None => {},
                            }
                        }
                    }
                }
                (axis(&grid.layers, CELL_HEIGHT * grid.sites.len() + 14))
            }
        }
        p class="legend" { (legend) }
    }
}

fn cross(x: usize, y: usize, step: usize) -> String {
    let (left, right) = (x + step / 2 - 3, x + step / 2 + 3);
    format!("M{left} {}L{right} {}M{left} {}L{right} {}", y + 5, y + 11, y + 11, y + 5)
}

/// The layers' numbers below a map or a chart, as many as there is room for.
pub(super) fn axis(layers: &[u32], y: usize) -> Markup {
    let step = column_width(layers.len());
    let every = (26 / step).max(1);
    html! {
        @if !layers.is_empty() {
            text class="name" x=(GUTTER - 8) y=(y) { "layer" }
            @for (column, layer) in layers.iter().enumerate() {
                @if column % every == 0 {
                    text class="tick" x=(GUTTER + column * step + step / 2) y=(y) { (layer) }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_of_one_has_no_colour_and_both_sides_have_their_own() {
        let reach = reach(0.5, 1.6);
        assert_eq!(reach, 2.0);
        assert_eq!((side(1.0, reach), side(1.05, reach)), ("m0".to_owned(), "m0".to_owned()));
        assert_eq!((side(2.0, reach), side(0.5, reach)), ("a4".to_owned(), "b4".to_owned()));
        assert_eq!((side(1.2, reach), side(0.0, reach)), ("a1".to_owned(), "b4".to_owned()));
    }
}
