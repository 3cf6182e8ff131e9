//! RoPE whose positions or frequencies went through a narrow type before the cosine and sine.

use super::planted::{Bug, Ground, Made, ROPES, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::rope;
use crate::dtype::Format;
use crate::model::Rope;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "RoPE's frequencies, or its positions too, are rounded to a narrow type before the angle",
    causes: &["rope-precision"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Rope { x, rope, head_dim, first_position } = *case.call else {
        return Ok(Vec::new());
    };
    let mut fits = Vec::new();
    for format in [Format::Bf16, Format::F16] {
        for (positions, what) in
            [(false, "the frequencies are"), (true, "positions, frequencies and angles are")]
        {
            let predicted = turned(x, rope, head_dim, first_position, (format, positions));
            let detail = format!("{what} rounded to {format}");
            fits.extend(case.fit_if_any("rope-precision", detail, 0, &predicted));
        }
    }
    Ok(fits)
}

/// The rotation by angles of frequencies in that type, and where asked of positions and products
/// in it.
fn turned(
    x: &Tensor,
    geometry: &Rope,
    head_dim: usize,
    first_position: usize,
    (format, positions): (Format, bool),
) -> Tensor {
    let round = |value: f64| f64::from(format.round(value as f32));
    let mut y = x.clone();
    for row in 0..x.rows() {
        let position = (first_position + row) as f64;
        for pair in 0..geometry.dimensions / 2 {
            let frequency = round(rope::angle(geometry, pair, 1));
            let angle = match positions {
                true => round(round(position) * frequency),
                false => position * frequency,
            };
            let (sin, cos) = libm::sincos(angle);
            let (sin, cos) = (sin * geometry.magnitude, cos * geometry.magnitude);
            let (first, second) = rope::pair(geometry, head_dim, pair);
            for head in y.row_mut(row).chunks_exact_mut(head_dim) {
                let (a, b) = (f64::from(head[first]), f64::from(head[second]));
                head[first] = (a * cos - b * sin) as f32;
                head[second] = (a * sin + b * cos) as f32;
            }
        }
    }
    y
}

const BUGS: &[Bug] =
    &[bug("RoPE positions, frequencies and angles in bf16", &["rope-precision"], ROPES, &in_bf16)
        .public()];

fn in_bf16(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Rope { x, rope, head_dim, first_position } = *call else { return Ok(None) };
    let y = turned(x, rope, head_dim, first_position, (Format::Bf16, true));
    Ok(Some(ground.arm.streamed(y)))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn position_301_is_300_in_bf16() {
        let bench = Bench::default();
        let rope = bench.model.config().rope.clone();
        let mut x = Tensor::zeros(1, 64);
        x.row_mut(0)[0] = 1.0;
        // The first pair turns by the position itself.
        let y = turned(&x, &rope, 64, 301, (Format::Bf16, true));
        let (first, second) = rope::pair(&rope, 64, 0);
        let (sin, cos) = 300f64.sin_cos();
        assert_eq!((y.row(0)[first], y.row(0)[second]), (cos as f32, sin as f32));
    }

    #[test]
    fn positions_and_frequencies_in_bf16_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(5, 256, 1);
        let rope = bench.model.config().rope.clone();
        for (first_position, positions) in [(300, true), (4000, false)] {
            let call = Call::Rope { x: &x, rope: &rope, head_dim: 64, first_position };
            let wrong = turned(&x, &rope, 64, first_position, (Format::Bf16, positions));
            bench.expect("rope-precision", &call, &wrong);
        }
    }
}
