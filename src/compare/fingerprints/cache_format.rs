//! Keys and values that went through a narrow type on their way to attention.

use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::emulated::quantize::absmax;
use crate::dtype::Format;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "keys and values are kept in FP8 before attention",
    causes: &["kv-cache-format"],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Attention { q, k, v, shape } = *case.call else { return Ok(Vec::new()) };
    let mut fits = Vec::new();
    for format in [Format::E4m3, Format::E5m2] {
        for unscaled in [true, false] {
            let (k, v) = (kept(k, format, unscaled), kept(v, format, unscaled));
            let limit = format.max_finite();
            let scale = if unscaled {
                format!("with a scale of 1, clipped at {limit}")
            } else {
                "with a scale for each tensor".to_owned()
            };
            let call = Call::Attention { q, k: &k, v: &v, shape };
            let detail = format!("keys and values are kept in {format} {scale}");
            fits.extend(case.fit_call("kv-cache-format", detail, &call)?);
        }
    }
    Ok(fits)
}

/// Values as a cache of that format gives them back.
pub fn kept(x: &Tensor, format: Format, unscaled: bool) -> Tensor {
    let limit = format.max_finite();
    let most = absmax(x.data());
    let scale = if unscaled || most == 0.0 { 1.0 } else { most / limit };
    mapped(x, |x| format.round((x / scale).clamp(-limit, limit)) * scale)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::AttentionShape;

    #[test]
    fn values_come_back_as_e4m3_holds_them() {
        // Three bits of fraction: 0.3 lies between 0.28125 and 0.3125, 600 beyond the largest.
        let x = Tensor::new(4, vec![0.3, -600.0, 17.0, 2e-4]);
        assert_eq!(kept(&x, Format::E4m3, true).data(), [0.3125, -448.0, 16.0, 0.0]);
        // With a scale of its own the largest is exact.
        assert_eq!(kept(&x, Format::E4m3, false).data()[1], -600.0);
    }

    #[test]
    fn a_cache_in_fp8_is_recognised_with_its_scale() {
        let bench = Bench::default();
        let (q, k, v) = (bench.tensor(5, 256, 1), bench.tensor(5, 128, 2), bench.tensor(5, 128, 3));
        let shape = AttentionShape::causal(4, 2, 64, 0);
        for (format, unscaled) in [(Format::E4m3, true), (Format::E5m2, false)] {
            let (narrow_k, narrow_v) = (kept(&k, format, unscaled), kept(&v, format, unscaled));
            let narrow = Call::Attention { q: &q, k: &narrow_k, v: &narrow_v, shape };
            let call = Call::Attention { q: &q, k: &k, v: &v, shape };
            bench.expect("kv-cache-format", &call, &bench.clean(&narrow));
        }
    }
}
