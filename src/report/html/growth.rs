//! How an arm's drift grows from layer to layer: its parts, the gain of each
//! layer, and the laws that fit.

use maud::{Markup, html};

use super::chart::{Chart, Line, Point, chart};
use super::figure::figure_share;
use super::{Page, command};
use crate::compare::{Growth, Law, LayerGrowth};
use crate::record::StageRecord;
use crate::report::commands;

/// A part of the drift: its name in run.json and for people, and how it is read.
type Part = (&'static str, &'static str, fn(&LayerGrowth) -> Option<f64>);

const PARTS: [Part; 5] = [
    ("total", "total", |layer| Some(layer.total)),
    // Where nothing comes in there is nothing to inherit.
    ("inherited", "inherited", |layer| layer.gain.map(|_| layer.inherited)),
    ("local", "local", |layer| Some(layer.local)),
    ("floor", "floor", |layer| layer.floor),
    ("predicted", "predicted", |layer| Some(layer.predicted)),
];
const GAIN: [Part; 1] = [("gain", "gain", |layer| layer.gain)];

pub(super) fn growth(page: &Page<'_>, stage: &StageRecord, place: usize) -> Markup {
    html! {
        @for (number, growth) in stage.growth.iter().enumerate() {
            (one(growth, &format!("/stages/{place}/growth/{number}")))
        }
        @if !stage.growth.is_empty() {
            p class="note" {
                "Local is what a layer itself adds, inherited what it makes of the error that comes in; the \
                 floor is what rounding of the two products that enter the stream must cost; predicted \
                 takes local errors as independent of what is inherited."
            }
            (command(&commands::explain(page.run, stage, page.runs)))
        }
    }
}

fn one(growth: &Growth, at: &str) -> Markup {
    let layers: Vec<u32> = growth.layers.iter().map(|layer| layer.layer).collect();
    let lines = |parts: &[Part]| -> Vec<Line> {
        let drawn = parts.iter().map(|(field, name, read)| Line {
            name: (*name).to_owned(),
            unit: "",
            points: points(growth, field, name, *read, at),
        });
        drawn.filter(|line| !line.points.is_empty()).collect()
    };
    let subject = growth.subject;
    let gain = chart(&Chart {
        title: &format!(
            "Gain of each layer for {subject}'s error: above 1 it amplifies what comes in"
        ),
        layers: &layers,
        lines: &lines(&GAIN),
        band: (None, None),
        rule: Some(1.0),
    });
    let title = format!("Drift of {subject} by layer, relative to the reference's residual stream");
    let drift = chart(&Chart {
        title: &title,
        layers: &layers,
        lines: &lines(&PARTS),
        band: (None, None),
        rule: None,
    });
    html! {
        div class="charts" { (drift) (gain) }
        @if growth.laws.iter().any(Law::holds) { (laws(growth, at)) }
    }
}

fn points(
    growth: &Growth,
    field: &str,
    name: &str,
    read: fn(&LayerGrowth) -> Option<f64>,
    at: &str,
) -> Vec<Point> {
    let of_layer = |(column, layer): (usize, &LayerGrowth)| {
        Some(Point {
            column,
            value: read(layer)?,
            label: format!("layer {}: {name}", layer.layer),
            at: format!("{at}/layers/{column}/{field}"),
        })
    };
    growth.layers.iter().enumerate().filter_map(of_layer).collect()
}

fn laws(growth: &Growth, at: &str) -> Markup {
    html! {
        div class="scroll" {
            table class="numbers" {
                thead { tr {
                    th scope="col" { "law of " (growth.subject) "'s total" }
                    th scope="col" { "l counts layers from 1" }
                    th scope="col" { "leaves" }
                } }
                tbody {
                    @for (number, law) in growth.laws.iter().enumerate().filter(|(_, law)| law.holds()) {
                        tr {
                            th scope="row" {
                                (law.name) @if number == 0 { " " small { "fits best" } }
                            }
                            td { code { (law.formula) } }
                            td { (figure_share(law.residual, &format!("{at}/laws/{number}/residual"))) }
                        }
                    }
                }
            }
        }
    }
}
