//! Drift by layer in one line of text.

use super::layers::Grid;
use crate::compare::Measure;
use crate::metric::Metric;
use crate::op::{Arm, Stream, in_layer};
use crate::record::RunRecord;
use crate::text::number;

const BLOCKS: [char; 8] = [
    '\u{2581}', '\u{2582}', '\u{2583}', '\u{2584}', '\u{2585}', '\u{2586}', '\u{2587}', '\u{2588}',
];
/// The site after which a layer is done.
const SITE: &str = "ffn_residual";

/// A line for each arm of each stage whose drift was measured layer by layer;
/// `drawn` says whether the terminal can show blocks. The numbers stand there in
/// any case: from the first layer to the last, and the largest.
pub fn drift(run: &RunRecord, drawn: bool, width: usize) -> String {
    let mut text = String::new();
    for stage in &run.stages {
        let measures: Vec<Measure> =
            stage.measures.iter().filter(|m| is_of_drift(m)).cloned().collect();
        for grid in Grid::of(&measures) {
            let row = grid.row(SITE);
            let values = row.iter().filter_map(|(.., m)| m.metrics.get(&Metric::Nmse).copied());
            let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
            let (Some(first), Some(last)) = (values.first(), values.last()) else { continue };
            if values.len() < 2 {
                continue;
            }
            let largest = values.iter().copied().max_by(f64::total_cmp).unwrap_or(*last);
            let words = format!(
                "{}: {} after layer {}, {} after {}, at most {} (nmse of {SITE})",
                grid.pair(),
                number(*first),
                grid.layers[0],
                number(*last),
                grid.layers[grid.layers.len() - 1],
                number(largest)
            );
            let head = format!("{}  error by layer  ", stage.id);
            let room = width.saturating_sub(head.chars().count());
            let line = if drawn && values.len() <= room { blocks(&values) } else { String::new() };
            let gap = if line.is_empty() { "" } else { "  " };
            if line.chars().count() + gap.len() + words.chars().count() <= room {
                text.push_str(&format!("{head}{line}{gap}{words}\n"));
            } else {
                let indent = " ".repeat(head.chars().count());
                let line =
                    if line.is_empty() { String::new() } else { format!("{line}\n{indent}") };
                text.push_str(&format!("{head}{line}{words}\n"));
            }
        }
    }
    text
}

/// Whether a measure is of the drift by layer.
pub fn is_of_drift(measure: &Measure) -> bool {
    let site = in_layer(&measure.site.0).map(|(_, site)| site);
    let reference = Stream::Arm(Arm::Reference);
    site == Some(SITE) && measure.judge == reference && measure.subject != reference
}

/// A block per value, on a logarithmic scale; what is 0 stands lowest.
fn blocks(values: &[f64]) -> String {
    let sizes = values.iter().copied().filter(|value| *value > 0.0);
    let (low, high) = sizes.fold((f64::INFINITY, 0.0_f64), |(low, high), size| {
        (if size < low { size } else { low }, if size > high { size } else { high })
    });
    let span = if high > low { (high / low).ln() } else { 0.0 };
    let block = |value: &f64| {
        let place = if *value > 0.0 && span > 0.0 { (value / low).ln() / span } else { 0.0 };
        BLOCKS[((place * BLOCKS.len() as f64) as usize).min(BLOCKS.len() - 1)]
    };
    values.iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::blocks;

    #[test]
    fn blocks_rise_with_the_logarithm() {
        assert_eq!(blocks(&[0.0, 1.0, 10.0, 100.0]), "\u{2581}\u{2581}\u{2585}\u{2588}");
        assert_eq!(blocks(&[2.0, 2.0]), "\u{2581}\u{2581}");
    }
}
