//! A gated feed-forward network with another function than the model's, or with a factor left out.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::reference::{ALPHA, CLAMP, gated};
use crate::model::Activation;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the gated activation applies another function than the model's, or leaves a factor out",
    causes: &["activation-function"],
    bugs: &[],
    test,
};

type Function = fn(f64) -> f64;
/// What is made of a gate's value and the one that it is multiplied with.
type Gate = Box<dyn Fn(f64, f64) -> f64>;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let ones;
    let (gate, up, activation) = match *case.call {
        Call::Gated { gate, up, activation } => (gate, up, activation),
        Call::Activated { x, activation } => {
            ones = Tensor::new(x.width(), vec![1.0; x.data().len()]);
            (x, &ones, activation)
        }
        _ => return Ok(Vec::new()),
    };
    let own = match activation {
        Activation::Silu => "SiLU",
        Activation::GeluTanh => "GELU (tanh)",
        Activation::ClampedSwiglu => "the clamped SwiGLU",
    };
    let functions: [(&str, Function); 5] = [
        ("GELU (exact)", |g| 0.5 * g * (1.0 + libm::erf(g / std::f64::consts::SQRT_2))),
        ("GELU (tanh)", |g| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g * g * g);
            0.5 * g * (1.0 + libm::tanh(inner))
        }),
        ("ReLU", |g| if g > 0.0 { g } else { 0.0 }),
        ("the sigmoid", sigmoid),
        ("SiLU", |g| g * sigmoid(g)),
    ];
    let others = functions.iter().filter(|(name, _)| *name != own);
    let mut all: Vec<(String, Gate)> = Vec::new();
    for &(name, function) in others {
        let detail = format!("{name} instead of {own}");
        all.push((detail, Box::new(move |g, u| function(g) * u)));
    }
    if activation == Activation::ClampedSwiglu {
        let ignored: Gate = Box::new(|g, _| gated(Activation::ClampedSwiglu, g, 0.0));
        all.push(("the up projection is ignored".to_owned(), ignored));
        let inner = |g: f64| g * sigmoid(ALPHA * g);
        let unclamped: Gate = Box::new(move |g, u| inner(g) * (u + 1.0));
        all.push(("neither value is clamped".to_owned(), unclamped));
        let unmoved: Gate = Box::new(|g, u| gated(Activation::ClampedSwiglu, g, u.min(7.0) - 1.0));
        all.push(("one is not added to the up projection".to_owned(), unmoved));
        let usual: Gate = Box::new(|g, u| {
            let (g, u) = (g.min(CLAMP), u.clamp(-CLAMP, CLAMP));
            g * sigmoid(g) * (u + 1.0)
        });
        all.push(("the gate is not multiplied by 1.702".to_owned(), usual));
    }
    let activated = functions.iter().find(|(name, _)| *name == own).map(|(_, function)| *function);
    if let Some(activated) = activated {
        let detail = "the up projection is ignored".to_owned();
        all.push((detail, Box::new(move |g, _| activated(g))));
    }
    all.push(("the gate is not activated".to_owned(), Box::new(|g, u| g * u)));
    let fits = all.into_iter().filter_map(|(detail, function)| {
        let pairs = gate.data().iter().zip(up.data());
        let values = pairs.map(|(&g, &u)| function(f64::from(g), f64::from(u)) as f32);
        let predicted = Tensor::new(gate.width(), values.collect());
        case.fit_if_any("activation-function", detail, 0, &predicted)
    });
    Ok(fits.collect())
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;
    use crate::model::Activation;
    use crate::tensor::Tensor;

    #[test]
    fn relu_is_recognised() {
        let bench = Bench::default();
        let (gate, up) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        let pairs = gate.data().iter().zip(up.data());
        let wrong = pairs.map(|(&g, &u)| if g > 0.0 { g * u } else { 0.0 }).collect();
        let call = Call::Gated { gate: &gate, up: &up, activation: Activation::Silu };
        bench.expect("activation-function", &call, &Tensor::new(256, wrong));
    }
}
