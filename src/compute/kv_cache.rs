//! What attention reads back of keys and values that it keeps in a type of their own.
//!
//! A cache holds a code of `x / scale` for each value, rounded to nearest even and clipped to the
//! largest finite value of an FP8 format, and attention reads `scale` times what the code stands
//! for; both operations are f32. FP8 caches of vLLM, SGLang and TensorRT-LLM do so with scales
//! that the checkpoint holds for a layer, and with 1 where it holds none; 16-bit caches have no
//! scale. The reference keeps values whole: a cache's type is arithmetic, not the model's function.

use super::ComputeError;
use crate::dtype::Format;
use crate::model::Model;
use crate::tensor::Tensor;

/// One tensor on its way through a cache.
#[derive(Clone, Copy)]
pub struct Cached<'a> {
    /// Keys or values, `[tokens, width]`.
    pub x: &'a Tensor,
    /// The type of the codes.
    pub format: Format,
    /// What a code's value is multiplied with.
    pub scale: f32,
}

impl Cached<'_> {
    /// What the cache gives back, `[tokens, width]`.
    pub fn read_back(&self) -> Tensor {
        let Cached { x, format, scale } = *self;
        let data = x.data().iter().map(|x| format.round(x / scale) * scale);
        Tensor::new(x.width(), data.collect())
    }
}

/// Of keys or of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Keys; of latent attention all that is kept.
    Keys,
    /// Values.
    Values,
}

/// The scale of a layer's keys or values in a cache of that format: the checkpoint's, or 1. Where
/// the file holds one of both alone it stands for both, as in vLLM.
///
/// # Errors
/// If the file holds no single scale, or one that is not above zero and finite.
pub fn scale_of(
    model: &Model,
    layer: usize,
    which: Which,
    format: Format,
) -> Result<f32, ComputeError> {
    if !format.is_fp8() {
        return Ok(1.0);
    }
    let (own, other) = match which {
        Which::Keys => ("attn_k_cache", "attn_v_cache"),
        Which::Values => ("attn_v_cache", "attn_k_cache"),
    };
    for name in [own, "attn_kv_cache", other] {
        let name = format!("blk.{layer}.{name}.scale");
        if !model.has(&name) {
            continue;
        }
        let refuse = |what: String| {
            Err(ComputeError::Recipe(format!(
                "`kv_cache = \"{format}\"`: {what}; write `kv_cache = \"none\"`, or fetch a \
                 checkpoint that holds one scale above zero"
            )))
        };
        let held = model.tensor(&name)?;
        let scales = held.to_vec()?;
        return match scales[..] {
            [scale] if scale.is_finite() && scale > 0.0 => Ok(scale),
            [scale] => refuse(format!("the scale {} is {scale}", held.in_words())),
            _ => refuse(format!(
                "{} holds {} scales, and the kernels take one for a layer",
                held.in_words(),
                scales.len()
            )),
        };
    }
    Ok(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_as_their_codes_hold_them() {
        let x = Tensor::new(4, vec![0.3, -600.0, 17.0, 2e-4]);
        let read = |format, scale| Cached { x: &x, format, scale }.read_back().data().to_vec();
        assert_eq!(read(Format::E4m3, 1.0), [0.3125, -448.0, 16.0, 0.0]);
        assert_eq!(read(Format::E4m3, 2.0), [0.3125, -576.0, 16.0, 0.0]);
        assert_eq!(read(Format::E5m2, 1.0), [0.3125, -640.0, 16.0, 1.75 / 8192.0]);
        assert_eq!(read(Format::Bf16, 1.0)[2], 17.0);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let x = Tensor::new(2, vec![f32::NAN, f32::INFINITY]);
        let read = Cached { x: &x, format: Format::E4m3, scale: 0.5 }.read_back();
        assert!(read.data()[0].is_nan());
        assert_eq!(read.data()[1], 224.0);
    }
}
