//! SwiGLU with another function than SiLU, or with a factor left out.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "SwiGLU applies another function than SiLU, or leaves a factor out",
    causes: &["activation-function"],
    test,
};

type Function = fn(f64, f64) -> f64;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::SwiGlu { gate, up } = *case.call else { return Ok(Vec::new()) };
    let functions: [(&str, Function); 6] = [
        ("GELU (exact) instead of SiLU", |g, u| {
            0.5 * g * (1.0 + libm::erf(g / std::f64::consts::SQRT_2)) * u
        }),
        ("GELU (tanh) instead of SiLU", |g, u| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g * g * g);
            0.5 * g * (1.0 + libm::tanh(inner)) * u
        }),
        ("ReLU instead of SiLU", |g, u| if g > 0.0 { g * u } else { 0.0 }),
        ("the sigmoid instead of SiLU", |g, u| sigmoid(g) * u),
        ("the up projection is ignored", |g, _| g * sigmoid(g)),
        ("the gate is not activated", |g, u| g * u),
    ];
    let fits = functions.iter().filter_map(|(detail, function)| {
        let pairs = gate.data().iter().zip(up.data());
        let values = pairs.map(|(&g, &u)| function(f64::from(g), f64::from(u)) as f32);
        let predicted = Tensor::new(gate.width(), values.collect());
        case.fit_if_any("activation-function", (*detail).to_owned(), 0, &predicted)
    });
    Ok(fits.collect())
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;
    use crate::tensor::Tensor;

    #[test]
    fn relu_is_recognised() {
        let bench = Bench::default();
        let (gate, up) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        let pairs = gate.data().iter().zip(up.data());
        let wrong = pairs.map(|(&g, &u)| if g > 0.0 { g * u } else { 0.0 }).collect();
        let call = Call::SwiGlu { gate: &gate, up: &up };
        bench.expect("activation-function", &call, &Tensor::new(256, wrong));
    }
}
