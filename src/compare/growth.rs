//! How a drift grows from layer to layer, and whether that was to be expected.
//!
//! With `h` the residual stream and `ref_l` one layer of the reference,
//! `e_(l+1) = [arm_l(h_arm) - ref_l(h_arm)] + [ref_l(h_arm) - ref_l(h_ref)]`
//! splits exactly into local and inherited. If local errors are independent of
//! what is inherited, `|e_(l+1)|^2 = gain_l^2 |e_l|^2 + |local_l|^2` predicts the
//! total. It computes no op.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::compute::floor::Deviations;
use crate::op::{Site, Stream, in_layer};
use crate::tensor::Tensor;

/// One layer's part in the drift; errors are relative to the reference's norm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerGrowth {
    /// The layer.
    pub layer: u32,
    /// What the layer itself added.
    pub local: f64,
    /// The least of it that rounding must cost: the predicted deviation of the two
    /// products that enter the residual stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<f64>,
    /// What the layer made of the error that came in.
    pub inherited: f64,
    /// Norm of the inherited error over the norm of the error that came in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gain: Option<f64>,
    /// The error at the layer's end.
    pub total: f64,
    /// The total that gains and local errors predict.
    pub predicted: f64,
}

/// A law fitted to the drift over the layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Law {
    /// `linear`, `square-root` or `exponential`.
    pub name: String,
    /// The formula with its numbers; l counts layers from 1.
    pub formula: String,
    /// Root mean square of what it leaves, relative to the drift's own.
    pub residual: f64,
}

/// What a law that is worth showing leaves at most.
const MOST_LEFT: f64 = 0.1;

impl Law {
    /// Whether it explains at least nine tenths of the drift; others say nothing.
    pub fn holds(&self) -> bool {
        self.residual <= MOST_LEFT
    }
}

/// The growth of one arm's drift.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    /// The arm.
    pub subject: Stream,
    /// The layers, in order.
    pub layers: Vec<LayerGrowth>,
    /// Fitted laws, the best first.
    pub laws: Vec<Law>,
}

fn norm(x: &Tensor) -> f64 {
    x.data().iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let pairs = a.data().iter().zip(b.data());
    pairs.map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

/// The growth over the layers' ends; `local` holds the reference computed layer
/// by layer on the subject's stream, `floors` each site's predicted deviation.
/// Nothing where a value is not finite.
pub fn growth(
    subject: (Stream, &[(Site, Tensor)]),
    reference: &[(Site, Tensor)],
    local: &[(Site, Tensor)],
    floors: &BTreeMap<&Site, &Deviations>,
) -> Option<Growth> {
    let find =
        |sites: &[(Site, Tensor)], site: &Site| sites.iter().position(|(name, _)| name == site);
    let mut layers: Vec<LayerGrowth> = Vec::new();
    // Absolute norms of the error that comes in, measured and predicted.
    let (mut before, mut predicted) = (0.0, 0.0);
    for (site, from_subject) in local {
        let arm = &subject.1[find(subject.1, site)?].1;
        let truth = &reference[find(reference, site)?].1;
        let size = norm(truth);
        let total = distance(arm, truth);
        let Some((layer, _)) = in_layer(&site.0) else {
            (before, predicted) = (total, total);
            continue;
        };
        let own = distance(arm, from_subject);
        let inherited = distance(from_subject, truth);
        let gain = (before > 0.0).then(|| inherited / before);
        predicted = (gain.unwrap_or(0.0) * predicted).hypot(own);
        if !(size > 0.0 && total.is_finite() && predicted.is_finite()) {
            return None;
        }
        layers.push(LayerGrowth {
            layer,
            local: own / size,
            floor: floor_of(layer, floors).map(|floor| floor / size),
            inherited: inherited / size,
            gain,
            total: total / size,
            predicted: predicted / size,
        });
        before = total;
    }
    let laws = laws(&layers.iter().map(|layer| layer.total).collect::<Vec<f64>>());
    (!layers.is_empty()).then_some(Growth { subject: subject.0, layers, laws })
}

/// The norm of what rounding must leave of the products that enter the residual
/// stream in one layer, as far as both are predicted.
fn floor_of(layer: u32, floors: &BTreeMap<&Site, &Deviations>) -> Option<f64> {
    // A mixture's products enter the stream times their weights, and beside a shared one.
    let site = |name: &str| Site(format!("blk.{layer}.{name}"));
    if floors.contains_key(&site("ffn_route")) {
        return None;
    }
    let of = |name: &str| floors.get(&site(name)).map(|floor| norm(&floor.each));
    Some(of("attn_out")?.hypot(of("ffn_down")?)).filter(|floor| floor.is_finite())
}

/// The three laws, the one that leaves least first.
fn laws(drift: &[f64]) -> Vec<Law> {
    const LEAST_LAYERS: usize = 3;
    if drift.len() < LEAST_LAYERS || drift.iter().any(|&drift| drift <= 0.0) {
        return Vec::new();
    }
    let number: Vec<f64> = (1..=drift.len()).map(|layer| layer as f64).collect();
    let root: Vec<f64> = number.iter().map(|layer| layer.sqrt()).collect();
    let logs: Vec<f64> = drift.iter().map(|drift| drift.ln()).collect();
    let (a, b) = line(&number, drift);
    let (c, d) = line(&root, drift);
    let (e, f) = line(&number, &logs);
    let residual = |law: &dyn Fn(usize) -> f64| {
        let left: f64 = (0..drift.len()).map(|i| (law(i) - drift[i]).powi(2)).sum();
        (left / drift.iter().map(|drift| drift * drift).sum::<f64>()).sqrt()
    };
    let mut laws = vec![
        Law {
            name: "linear".to_owned(),
            formula: format!("{a:.4} + {b:.4} l"),
            residual: residual(&|i| a + b * number[i]),
        },
        Law {
            name: "square-root".to_owned(),
            formula: format!("{c:.4} + {d:.4} sqrt(l)"),
            residual: residual(&|i| c + d * root[i]),
        },
        Law {
            name: "exponential".to_owned(),
            formula: format!("{:.4} exp({f:.4} l)", e.exp()),
            residual: residual(&|i| (e + f * number[i]).exp()),
        },
    ];
    laws.sort_by(|a, b| a.residual.total_cmp(&b.residual));
    laws
}

/// Intercept and slope of the least-squares line.
fn line(x: &[f64], y: &[f64]) -> (f64, f64) {
    let count = x.len() as f64;
    let (mean_x, mean_y) = (x.iter().sum::<f64>() / count, y.iter().sum::<f64>() / count);
    let covariance: f64 = x.iter().zip(y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = x.iter().map(|x| (x - mean_x).powi(2)).sum();
    let slope = covariance / variance;
    (mean_y - slope * mean_x, slope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Arm;

    #[test]
    fn each_law_is_found_again() {
        let over =
            |law: fn(f64) -> f64| laws(&(1..=24).map(|l| law(f64::from(l))).collect::<Vec<_>>());
        assert_eq!(over(|l| 0.01 + 0.004 * l)[0].name, "linear");
        assert_eq!(over(|l| 0.03 * l.sqrt())[0].name, "square-root");
        let exponential = &over(|l| 0.01 * (0.1 * l).exp())[0];
        assert_eq!(exponential.name, "exponential");
        assert!(exponential.residual < 1e-9);
    }

    #[test]
    fn local_and_inherited_errors_add_up() {
        let site = |layer: u32| Site(format!("blk.{layer}.ffn_residual"));
        let end = |layer, value| (site(layer), Tensor::new(2, vec![value, 1.0]));
        let into = |name, value| (Site(format!("blk.1.{name}")), Tensor::new(2, vec![value, 0.0]));
        let subject = Stream::Arm(Arm::Emulated);
        let floors = [into("attn_out", 0.03), into("ffn_down", 0.04)]
            .map(|(site, each)| (site, Deviations { each, shared: None }));
        let found = growth(
            (subject, &[end(0, 1.1), end(1, 1.4)]),
            &[end(0, 1.0), end(1, 1.0)],
            &[end(0, 1.0), end(1, 1.2)],
            &floors.iter().map(|(site, floor)| (site, floor)).collect(),
        );
        let found = found.expect("two layers");
        let size = 2f64.sqrt();
        let second = &found.layers[1];
        assert!((second.inherited - 0.2 / size).abs() < 1e-6);
        assert!((second.local - 0.2 / size).abs() < 1e-6);
        assert!((second.gain.expect("an error came in") - 2.0).abs() < 1e-5);
        assert!((second.total - 0.4 / size).abs() < 1e-6);
        assert!((second.floor.expect("both are predicted") - 0.05 / size).abs() < 1e-6);
        assert_eq!(found.layers[0].floor, None);
        assert!((second.predicted - 0.2f64.hypot(0.2) / size).abs() < 1e-6);
    }
}
