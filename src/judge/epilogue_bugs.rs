//! Hypotheses about what follows a product's sum: alpha and bias left out, applied twice or
//! in the wrong order.
//!
//! It knows the sum, alpha and bias of each output; other causes are its siblings'.

use super::Cause;
use super::exam::Exam;
use super::looks::{Sample, ranked};
use super::place::Place;
use super::product::Product;
use crate::dtype::Format;

/// Rows and columns on which a hypothesis is tested.
const SAMPLE: (usize, usize) = (64, 128);

/// Tests them all; the best first.
pub(super) fn search(product: &Product<'_>, exam: &Exam, place: &Place) -> Vec<Cause> {
    let sample = Sample::of(exam, place, SAMPLE);
    let width = exam.y.width();
    let alpha = f64::from(product.epilogue.alpha);
    let bias = |column: usize| product.bias(column % width);
    let dot = |column: usize, truth: f64| (truth - bias(column)) / alpha;
    let mut found = Vec::new();
    let mut add = |cause: &str, detail: &str, value: &dyn Fn(usize, f64) -> f64| {
        found.extend(sample.guess_of(cause, detail, |_, column, truth| value(column, truth)));
    };
    if alpha != 1.0 {
        let detail = format!("alpha, {alpha}, is not applied");
        add("alpha-missing", &detail, &|c, t| dot(c, t) + bias(c));
        let detail = format!("alpha, {alpha}, is applied twice");
        add("alpha-twice", &detail, &|c, t| alpha * alpha * dot(c, t) + bias(c));
        let detail = format!("the product is divided by alpha, {alpha}, instead of multiplied");
        add("alpha-inverted", &detail, &|c, t| dot(c, t) / alpha + bias(c));
    }
    // What the accumulator holds before scales and alpha.
    let overflows = |scale: &f64| {
        scale * alpha != 1.0
            && sample
                .each()
                .any(|(_, column, _, truth)| (dot(column, truth) / scale).abs() > 65504.0)
    };
    if let Some(scale) = product.scale().filter(overflows) {
        let f16 =
            |column: usize, truth: f64| Format::F16.round((dot(column, truth) / scale) as f32);
        let before = "sums pass through f16 before scales and alpha are applied, and are";
        add("f16-overflow", &format!("{before} infinite beyond 65504"), &|c, t| {
            alpha * scale * f64::from(f16(c, t)) + bias(c)
        });
        add("f16-overflow", &format!("{before} clipped at 65504"), &|c, t| {
            alpha * scale * f64::from(f16(c, t).clamp(-65504.0, 65504.0)) + bias(c)
        });
    }
    if product.epilogue.bias.is_none() {
        return ranked(found);
    }
    add("bias-missing", "the bias is not added", &|c, t| t - bias(c));
    add("bias-twice", "the bias is added twice", &|c, t| t + bias(c));
    add("bias-sign", "the bias is subtracted, and must be added", &|c, t| t - 2.0 * bias(c));
    for (which, step) in [("next column", 1), ("column before", width - 1)] {
        let detail = format!("each column gets the bias of the {which}");
        add("bias-shifted", &detail, &|c, t| t - bias(c) + bias(c + step));
    }
    add("bias-order", "all columns get the bias of the first column", &|c, t| {
        t - bias(c) + bias(0)
    });
    if alpha != 1.0 {
        add(
            "bias-scaled",
            "the bias is added before alpha is applied, and scaled by it",
            &|c, t| t - bias(c) + alpha * bias(c),
        );
        add("alpha-missing", "neither alpha nor bias is applied", &|c, t| dot(c, t));
    }
    let mut formats = vec![exam.output, Format::Bf16, Format::F16];
    formats.dedup();
    for format in formats.into_iter().filter(|format| *format != Format::F32) {
        let detail =
            format!("the product is rounded to {format} before the bias, and the sum again");
        add("output-rounded", &detail, &|c, t| {
            f64::from(format.round((t - bias(c)) as f32)) + bias(c)
        });
    }
    ranked(found)
}
