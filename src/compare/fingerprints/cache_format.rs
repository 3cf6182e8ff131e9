//! Keys and values that went through another type, or with another scale, on their way to attention.

use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::emulated::quantize::absmax;
use crate::compute::kv_cache::{Cached, Which, scale_of};
use crate::dtype::Format;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "keys and values are kept in another type before attention, or with another scale",
    causes: &["kv-cache-format", "kv-cache-scale", "truncating-cast"],
    bugs: &[],
    test,
};

/// Types of a cache.
const FORMATS: [Format; 4] = [Format::E4m3, Format::E5m2, Format::Bf16, Format::F16];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    match *case.call {
        Call::Attention { q, k, v, shape } => {
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
        Call::Cached(cached) => of_cached(case, cached),
        _ => Ok(Vec::new()),
    }
}

/// Where the recipe keeps keys and values in a type of its own.
fn of_cached(case: &Case<'_>, cached: Cached<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Cached { x, format, scale } = cached;
    let mut fits = Vec::new();
    let whole = "they are kept as they are".to_owned();
    fits.extend(case.fit_if_any("kv-cache-format", whole, 0, x));
    for other in FORMATS.into_iter().filter(|other| *other != format) {
        let scale = if other.is_fp8() { scale } else { 1.0 };
        let call = Call::Cached(Cached { x, format: other, scale });
        let detail = format!("they are kept in {other} and not in {format}");
        fits.extend(case.fit_call("kv-cache-format", detail, &call)?);
    }
    if !format.is_fp8() {
        return Ok(fits);
    }
    let read = cached.read_back();
    let cut = mapped(x, |x| towards_zero(format, x / scale) * scale);
    let detail = format!("they are truncated to {format} instead of rounded");
    fits.extend(case.fit_if_any("truncating-cast", detail, 0, &cut));
    let own = kept(x, format, false);
    let detail = "the scale is made of the tensor's largest value".to_owned();
    fits.extend(case.fit_if_any("kv-cache-scale", detail, 0, &own));
    if scale != 1.0 {
        let others = [
            (format!("a scale of 1 is taken and not {scale}"), kept(x, format, true)),
            (format!("the scale {scale} is not multiplied back"), mapped(&read, |x| x / scale)),
            (
                format!("values are not divided by the scale {scale}"),
                mapped(x, |x| format.round(x) * scale),
            ),
            (
                format!("values are multiplied by the scale {scale} first, and divided after it"),
                mapped(x, |x| format.round(x * scale) / scale),
            ),
        ];
        for (detail, y) in others {
            fits.extend(case.fit_if_any("kv-cache-scale", detail, 0, &y));
        }
    }
    // Another layer's scale, or that of values for keys.
    let layers = case.model.map_or(0, |model| model.config().layers);
    let mut tried = vec![scale];
    for (layer, (which, whose)) in (0..layers)
        .flat_map(|layer| [(Which::Keys, "keys"), (Which::Values, "values")].map(|of| (layer, of)))
    {
        let Some(model) = case.model else { break };
        let other = scale_of(model, layer, which, format)?;
        if tried.contains(&other) {
            continue;
        }
        tried.push(other);
        let y = Cached { x, format, scale: other }.read_back();
        let detail =
            format!("the scale of layer {layer}'s {whose} is taken, {other} and not {scale}");
        fits.extend(case.fit_if_any("kv-cache-scale", detail, 0, &y));
    }
    Ok(fits)
}

/// The value of a format next to `x` on the side of zero.
pub fn towards_zero(format: Format, x: f32) -> f32 {
    let near = format.round(x);
    if near.abs() <= x.abs() || near.is_nan() {
        return near;
    }
    format.decode(format.encode(near) - 1)
}

/// Values as a cache of that format gives them back.
pub fn kept(x: &Tensor, format: Format, unscaled: bool) -> Tensor {
    let most = absmax(x.data());
    let scale = if unscaled || most == 0.0 { 1.0 } else { most / format.max_finite() };
    Cached { x, format, scale }.read_back()
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
    fn a_cut_value_lies_on_the_side_of_zero() {
        for (x, cut) in [(0.3, 0.28125), (-0.3, -0.28125), (0.3125, 0.3125), (500.0, 448.0)] {
            assert_eq!(towards_zero(Format::E4m3, x), cut);
        }
    }

    #[test]
    fn what_is_wrong_with_a_cache_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(5, 128, 2);
        let call = |format, scale| Call::Cached(Cached { x: &x, format, scale });
        let clean = call(Format::E4m3, 0.02);
        let expect = |cause: &str, y: &Tensor| bench.expect(cause, &clean, y);
        expect("kv-cache-format", &x);
        expect("kv-cache-format", &bench.clean(&call(Format::E5m2, 0.02)));
        expect("kv-cache-format", &bench.clean(&call(Format::F16, 1.0)));
        expect("kv-cache-scale", &bench.clean(&call(Format::E4m3, 1.0)));
        expect("kv-cache-scale", &kept(&x, Format::E4m3, false));
        expect("kv-cache-scale", &mapped(&bench.clean(&clean), |x| x / 0.02));
        expect("truncating-cast", &mapped(&x, |x| towards_zero(Format::E4m3, x / 0.02) * 0.02));
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
