//! FP8 in engines: how activations get scales and codes, and the products of them.
//!
//! It knows values, codes and scales; a chain's arithmetic is `compute/emulated`'s.
//!
//! | who | scale | code |
//! | --- | --- | --- |
//! | vLLM, per token | `absmax / 448` | `x / scale` |
//! | SGLang, per token and per output of a weight | `absmax * (1/448)` | `x / scale`, or times its inverse |
//! | torchao, per token and per output of a weight | `absmax / 448`, rounded to the type of the values | `x / scale` |
//! | per group of 128, for DeepGEMM | the power of two at or above `absmax / 448` | `x / scale` |
//! | vLLM, a weight with one scale | `absmax / 448` | times the inverse of the scale |
//! | vLLM, a weight in blocks | twice: `absmax / 448`, then a power of two of those values | times the inverse |
//!
//! | product | arithmetic |
//! | --- | --- |
//! | CUTLASS, per token and channel | chain with fast accumulation, `sx (sw acc)`, bias added in f32 |
//! | the same in vLLM | `fma(sx, sw acc, bias)`; of up to 64 tokens `fma(sw, sx acc, bias)` |
//! | DeepGEMM, blocks of 128 | per block a chain from zero, `acc = fma(partial, sx sw, acc)` |
//!
//! Evidence: every quantisation and product of FP8 in the captures of vLLM, SGLang
//! and torchao on an H200; whole passes of vLLM 0.26 on an H100 from bf16 weights.

use rayon::prelude::*;

use super::linear::finish;
use super::sfu;
use crate::compute::emulated::chip::Unit;
use crate::compute::emulated::gemm::{GemmError, Operand, Scales, check_scale_count, gemm};
use crate::compute::emulated::quantize::{Codes, CodesRowMut, absmax, quantize_row};
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
    /// The quotient, rounded to this format.
    DividedIn(Format),
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

    /// vLLM's `dynamic_scaled_fp8_quant`: one scale for a whole weight.
    pub const VLLM_TENSOR: Quantise =
        Quantise { code: CodeRule::TimesInverse, least_scale: 0.0, ..Quantise::VLLM };

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

    /// torchao's of rows of values in this format.
    pub const fn torchao(values: Format) -> Quantise {
        Quantise { scale: ScaleRule::DividedIn(values), least_scale: 0.0, ..Quantise::VLLM }
    }

    /// The scale of values that share one.
    pub fn scale_of(&self, values: &[f32]) -> f32 {
        let (absmax, most) = (absmax(values), self.format.max_finite());
        let scale = match self.scale {
            ScaleRule::Divided | ScaleRule::PowerOfTwo => absmax / most,
            ScaleRule::DividedIn(format) => format.round(absmax / most),
            ScaleRule::Multiplied => absmax * (1.0 / most),
        };
        let scale = if scale < self.least_scale { self.least_scale } else { scale };
        if self.scale == ScaleRule::PowerOfTwo { power_of_two_above(scale) } else { scale }
    }

    /// Codes of rows of which each has its scale.
    pub fn codes(&self, rows: &Tensor, scales: &[f32]) -> Codes {
        let mut codes = Codes::zeros(self.format, rows.rows(), rows.width());
        let written = codes.rows_mut().into_par_iter().enumerate();
        written.for_each(|(row, mut codes)| self.write(rows.row(row), scales[row], &mut codes));
        codes
    }

    /// Codes and scales of rows, one scale for each `group` values of a row. Where that would be
    /// no positive finite number it is 1, and the codes are NaN, or 0 where the kernel guards an
    /// inverse of 0.
    pub fn grouped(&self, x: &Tensor, group: usize) -> (Codes, Vec<f32>) {
        let blocks = x.width().div_ceil(group).max(1);
        let mut codes = Codes::zeros(self.format, x.rows(), x.width());
        let mut scales = vec![0.0; x.rows() * blocks];
        let written = codes.rows_mut().into_par_iter().zip(scales.par_chunks_mut(blocks));
        written.enumerate().for_each(|(row, (mut codes, scales))| {
            for (block, values) in x.row(row).chunks(group).enumerate() {
                let scale = self.scale_of(values);
                let mut part = codes.slice(block * group, values.len());
                if scale > 0.0 && scale < f32::INFINITY {
                    scales[block] = scale;
                    self.write(values, scale, &mut part);
                    continue;
                }
                // A NaN or an infinity, and 0 / 0 where no scale is the smallest: a NaN among the
                // codes, so that every sum that they enter is one, as recordings of torchao show. By
                // its source SGLang takes 0 for the inverse of 0; what it and vLLM make of NaN was
                // not recorded.
                scales[block] = 1.0;
                let guarded = scale == 0.0 && self.code == CodeRule::TimesInverse;
                let all = if guarded { 0.0 } else { f32::NAN };
                quantize_row(self.format, &vec![all; values.len()], 1.0, &mut part);
            }
        });
        (codes, scales)
    }

    /// Codes of values that share a scale.
    fn write(&self, values: &[f32], scale: f32, codes: &mut CodesRowMut<'_>) {
        match self.code {
            CodeRule::Divided => quantize_row(self.format, values, scale, codes),
            CodeRule::TimesInverse => {
                let inverse = 1.0 / scale;
                let scaled: Vec<f32> = values.iter().map(|x| x * inverse).collect();
                quantize_row(self.format, &scaled, 1.0, codes);
            }
        }
    }
}

/// The smallest power of two that is not below a positive normal number.
fn power_of_two_above(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f_ffff == 0 { bits } else { (bits & 0x7f80_0000) + 0x80_0000 })
}

/// The codes and scales of a weight in blocks of 128 by 128, as vLLM makes them for DeepGEMM
/// of bf16 values: `per_block_cast_to_fp8`, and what [`blocks_by_powers`] makes of that. `rows`
/// begin with a whole block.
pub fn block_weight(rows: &Tensor) -> (Codes, Vec<f32>) {
    let (first, scales) = cast_blocks(rows, |most| div_full(most, Format::E4m3.max_finite()));
    let mut read = Tensor::zeros(rows.rows(), rows.width());
    let blocks = rows.width().div_ceil(GROUP).max(1);
    let width = rows.width().max(1);
    read.data_mut().par_chunks_mut(width).enumerate().for_each(|(row, read)| {
        let codes = first.decode_row(row);
        for (column, (read, code)) in read.iter_mut().zip(codes).enumerate() {
            *read = code * scales[row / GROUP * blocks + column / GROUP];
        }
    });
    blocks_by_powers(&read)
}

/// The codes and scales of blocks of 128 by 128 of values that were FP8 already, as vLLM makes them
/// for DeepGEMM of a checkpoint: `requant_weight_ue8m0_inplace`. `rows` begin with a whole block.
pub fn blocks_by_powers(rows: &Tensor) -> (Codes, Vec<f32>) {
    cast_blocks(rows, |most| {
        let scale = div_full(most, Format::E4m3.max_finite());
        f64::from(f64::from(scale).log2() as f32).ceil().exp2() as f32
    })
}

/// One cast of blocks of 128 by 128; `scale` of a block follows from its largest magnitude,
/// which is taken as at least 1e-4.
fn cast_blocks(rows: &Tensor, scale: impl Fn(f32) -> f32 + Sync) -> (Codes, Vec<f32>) {
    let blocks = rows.width().div_ceil(GROUP).max(1);
    let width = rows.width().max(1);
    let scales: Vec<f32> = rows
        .data()
        .par_chunks(width * GROUP)
        .flat_map_iter(|tall| {
            let most = |block: usize| {
                let parts = tall
                    .chunks(width)
                    .map(|row| absmax(&row[block * GROUP..((block + 1) * GROUP).min(row.len())]));
                parts.fold(1e-4, f32::max)
            };
            (0..blocks).map(|block| scale(most(block))).collect::<Vec<f32>>()
        })
        .collect();
    let mut codes = Codes::zeros(Format::E4m3, rows.rows(), rows.width());
    codes.rows_mut().into_par_iter().enumerate().for_each(|(row, mut codes)| {
        for (block, values) in rows.row(row).chunks(GROUP).enumerate() {
            let inverse = div_full(1.0, scales[row / GROUP * blocks + block]);
            let scaled: Vec<f32> = values.iter().map(|x| x * inverse).collect();
            let mut part = codes.slice(block * GROUP, scaled.len());
            quantize_row(Format::E4m3, &scaled, 1.0, &mut part);
        }
    });
    (codes, scales)
}

/// `div.full.f32`, which Triton takes for `a / b`, where neither is huge or tiny.
fn div_full(a: f32, b: f32) -> f32 {
    a * sfu::rcp(b)
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

/// Most rows of an activation for which vLLM's CUTLASS kernels take the weight as the first
/// operand.
const SWAPPED: usize = 64;

/// vLLM's `cutlass_scaled_mm` for FP8 on Hopper: x with a scale per token, w with one, or one
/// per channel. `tokens` is how many rows the call had in which a row of `x` came.
///
/// The scale of the second operand is applied first; the bias is added in the same
/// instruction as the other scale, and rounded once with it.
///
/// # Errors
/// If shapes, formats or scales do not fit.
pub fn cutlass_scaled_mm(
    unit: &Unit,
    schedule: &Schedule,
    x: &Operand<'_>,
    w: &Operand<'_>,
    bias: Option<&[f32]>,
    tokens: impl Fn(usize) -> usize + Sync,
    output: Format,
) -> Result<Tensor, GemmError> {
    check_scale_count("x", x.codes, &x.scales)?;
    check_scale_count("w", w.codes, &w.scales)?;
    let mut y = gemm(unit, schedule, &bare(x.codes), &bare(w.codes), Format::F32)?;
    let width = y.width().max(1);
    y.data_mut().par_chunks_mut(width).enumerate().for_each(|(row, sums)| {
        let swapped = tokens(row) <= SWAPPED;
        let of_x = x.scales.at(row, 0, x.codes.width());
        for (column, sum) in sums.iter_mut().enumerate() {
            let of_weight = w.scales.at(column, 0, w.codes.width());
            let (last, first) = if swapped { (of_weight, of_x) } else { (of_x, of_weight) };
            let scaled = first * *sum;
            let scaled = match bias {
                Some(bias) => last.mul_add(scaled, bias[column]),
                None => last * scaled,
            };
            *sum = output.round(scaled);
        }
    });
    Ok(y)
}

/// An operand whose scales the caller applies.
fn bare(codes: &Codes) -> Operand<'_> {
    Operand { codes, scales: Scales::Tensor(1.0) }
}

/// A product of DeepGEMM: x with a scale per token and 128 of K, w with one per 128
/// channels and 128 of K.
///
/// # Errors
/// If shapes, formats or scales do not fit.
pub fn block_scaled_mm(
    unit: &Unit,
    schedule: &Schedule,
    x: &Operand<'_>,
    w: &Operand<'_>,
    output: Format,
) -> Result<Tensor, GemmError> {
    check_scale_count("x", x.codes, &x.scales)?;
    check_scale_count("w", w.codes, &w.scales)?;
    let width = x.codes.width();
    if width != w.codes.width() {
        return Err(GemmError::Inner { x: width, w: w.codes.width() });
    }
    let mut y = Tensor::zeros(x.codes.rows(), w.codes.rows().max(1));
    for block in 0..width.div_ceil(GROUP) {
        let inner = block * GROUP..((block + 1) * GROUP).min(width);
        let (x_part, w_part) = (x.codes.some_columns(inner.clone()), w.codes.some_columns(inner));
        let partial = gemm(unit, schedule, &bare(&x_part), &bare(&w_part), Format::F32)?;
        let of_w: Vec<f32> =
            (0..w.codes.rows()).map(|row| w.scales.at(row, block * GROUP, width)).collect();
        let outputs = y.width().max(1);
        y.data_mut().par_chunks_mut(outputs).enumerate().for_each(|(row, sums)| {
            let of_x = x.scales.at(row, block * GROUP, width);
            for ((sum, &partial), of_w) in sums.iter_mut().zip(partial.row(row)).zip(&of_w) {
                *sum = partial.mul_add(of_x * of_w, *sum);
            }
        });
    }
    finish(&mut y, None, output);
    Ok(y)
}
