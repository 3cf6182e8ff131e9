//! FP8 in engines: how activations get scales and codes, and the products of them.
//!
//! It knows values, codes and scales; a chain's arithmetic is `compute/emulated`'s.
//!
//! | who | scale | code |
//! | --- | --- | --- |
//! | vLLM, per token | `absmax / 448` | `x / scale` |
//! | SGLang, per token | `absmax * (1/448)` | `x / scale`, or times its inverse |
//! | per group of 128, for DeepGEMM | the power of two at or above `absmax / 448` | `x / scale` |
//!
//! | product | arithmetic |
//! | --- | --- |
//! | CUTLASS, per token and channel | chain with fast accumulation, `sx (sw acc)`, bias added in f32 |
//! | DeepGEMM, blocks of 128 | per block a chain from zero, `acc = fma(partial, sx sw, acc)` |
//!
//! Evidence: every quantisation and product of FP8 in the captures of vLLM, SGLang
//! and torchao on an H200.

use super::linear::finish;
use crate::compute::emulated::chip::Unit;
use crate::compute::emulated::gemm::{GemmError, Operand, Scales, gemm};
use crate::compute::emulated::quantize::{Codes, absmax};
use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
use crate::tensor::Tensor;

/// Elements of K that share a scale in DeepGEMM.
pub const GROUP: usize = 128;

/// How a scale follows from the largest magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScaleRule {
    /// One IEEE division by the format's largest value.
    Divided,
    /// A product with the rounded reciprocal of the format's largest value.
    Multiplied,
    /// The power of two at or above the quotient.
    PowerOfTwo,
}

/// How a code follows from a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeRule {
    /// `x / scale`.
    Divided,
    /// `x * (1 / scale)`.
    TimesInverse,
}

/// What a kernel that quantises activations decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantise {
    /// E4M3 or E5M2.
    pub format: Format,
    /// The scale.
    pub scale: ScaleRule,
    /// The codes.
    pub code: CodeRule,
    /// The smallest scale.
    pub least_scale: f32,
}

impl Quantise {
    /// vLLM's `dynamic_per_token_scaled_fp8_quant`.
    pub const VLLM: Quantise = Quantise {
        format: Format::E4m3,
        scale: ScaleRule::Divided,
        code: CodeRule::Divided,
        least_scale: 1.0 / (448.0 * 512.0),
    };

    /// vLLM's `per_token_group_fp8_quant` for DeepGEMM: scales are powers of two of
    /// at least `1e-10 / 448`.
    pub const VLLM_GROUP: Quantise =
        Quantise { scale: ScaleRule::PowerOfTwo, least_scale: 1e-10 / 448.0, ..Quantise::VLLM };

    /// SGLang's `sgl_per_token_quant_fp8`.
    pub const SGLANG: Quantise = Quantise {
        format: Format::E4m3,
        scale: ScaleRule::Multiplied,
        code: CodeRule::TimesInverse,
        least_scale: 0.0,
    };

    /// The scale of values that share one.
    pub fn scale_of(&self, values: &[f32]) -> f32 {
        let (absmax, most) = (absmax(values), self.format.max_finite());
        let scale = match self.scale {
            ScaleRule::Divided | ScaleRule::PowerOfTwo => absmax / most,
            ScaleRule::Multiplied => absmax * (1.0 / most),
        };
        let scale = if scale < self.least_scale { self.least_scale } else { scale };
        if self.scale == ScaleRule::PowerOfTwo { power_of_two_above(scale) } else { scale }
    }

    /// The code of a value.
    #[inline]
    pub fn code_of(&self, x: f32, scale: f32) -> u32 {
        self.format.encode(match self.code {
            CodeRule::Divided => x / scale,
            CodeRule::TimesInverse => x * (1.0 / scale),
        })
    }

    /// Codes and scales of rows, one scale for each `group` values of a row; the
    /// whole row shares one where `group` is its width.
    pub fn apply(&self, x: &Tensor, group: usize) -> (Tensor, Vec<f32>) {
        let mut scales = Vec::new();
        let mut values = Vec::with_capacity(x.data().len());
        for row in 0..x.rows() {
            for group in x.row(row).chunks(group.max(1)) {
                let scale = self.scale_of(group);
                scales.push(scale);
                values.extend(group.iter().map(|&x| self.format.decode(self.code_of(x, scale))));
            }
        }
        (Tensor::new(x.width(), values), scales)
    }
}

/// The smallest power of two that is not below a positive normal number.
fn power_of_two_above(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f_ffff == 0 { bits } else { (bits & 0x7f80_0000) + 0x80_0000 })
}

/// A product of FP8 operands with scales for tokens and for channels, as CUTLASS
/// kernels of vLLM and SGLang and cuBLASLt's row-wise mode make it.
///
/// # Errors
/// If shapes, formats or scales do not fit.
pub fn scaled_mm(
    unit: &Unit,
    schedule: &Schedule,
    x: &Operand<'_>,
    w: &Operand<'_>,
    bias: Option<&[f32]>,
    output: Format,
) -> Result<Tensor, GemmError> {
    let mut y = gemm(unit, schedule, x, w, Format::F32)?;
    finish(&mut y, bias, output);
    Ok(y)
}

/// A product of DeepGEMM: x with a scale per token and 128 of K, w with one per 128
/// channels and 128 of K.
///
/// # Errors
/// If shapes, formats or scales do not fit.
pub fn block_scaled_mm(
    unit: &Unit,
    x: &Codes,
    x_scales: &[f32],
    w: &Codes,
    w_scales: &[f32],
    output: Format,
) -> Result<Tensor, GemmError> {
    let blocks = x.width().div_ceil(GROUP);
    let expect = |operand, expected, given| {
        if expected == given {
            Ok(())
        } else {
            Err(GemmError::ScaleCount { operand, expected, given })
        }
    };
    expect("x", x.rows() * blocks, x_scales.len())?;
    expect("w", w.rows().div_ceil(GROUP) * blocks, w_scales.len())?;
    if x.width() != w.width() {
        return Err(GemmError::Inner { x: x.width(), w: w.width() });
    }
    let mut y = Tensor::zeros(x.rows(), w.rows().max(1));
    for block in 0..blocks {
        let inner = block * GROUP..((block + 1) * GROUP).min(x.width());
        let (x_part, w_part) = (columns(x, inner.clone()), columns(w, inner));
        let operand = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
        let partial =
            gemm(unit, &Schedule::FAST, &operand(&x_part), &operand(&w_part), Format::F32)?;
        for row in 0..y.rows() {
            let x_scale = x_scales[row * blocks + block];
            let sums = y.row_mut(row).iter_mut().zip(partial.row(row));
            for (column, (sum, &partial)) in sums.enumerate() {
                let scale = x_scale * w_scales[column / GROUP * blocks + block];
                *sum = partial.mul_add(scale, *sum);
            }
        }
    }
    finish(&mut y, None, output);
    Ok(y)
}

/// Some elements of K of every row.
fn columns(codes: &Codes, inner: std::ops::Range<usize>) -> Codes {
    let mut part = Codes::zeros(codes.format(), codes.rows(), inner.len());
    for row in 0..codes.rows() {
        part.row_mut(row).copy_from(codes.row(row).slice(inner.clone()));
    }
    part
}
