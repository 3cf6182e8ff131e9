//! llama.cpp's kernels on CUDA beside its integer products: norm, rotation, softmax, gated
//! activation, and products of weights and caches in f32, f16 and bf16.
//!
//! It knows rows, heads and formats: no models. The stream is f32.
//!
//! ggml is compiled with `-use_fast_math`: exponentials, powers, sines, divisions and roots are
//! the special function unit's, and what lies below the normal range is zero.
//!
//! | product of | rows | kernel |
//! | --- | --- | --- |
//! | f32 | up to 3 | `mul_mat_vec_f`: a block adds pairs, lanes by butterflies |
//! | | up to 16 | `mul_mat_f`: warps share K, tensor cores in TF32, operands cut |
//! | f16, bf16 | 1 | `mul_mat_vec_f`; of f16 in f16, except queries by keys |
//! | | up to 16 | `mul_mat_f` |
//! | all | more | cuBLAS; of f16 in f16, except queries by keys |
//!
//! Evidence: every site of 110 recordings of llama.cpp b6301 on an H200; of 300 others, of other
//! shapes, all but nine, of which eight are met since (docs/engines.md). With sums in f16 an instruction keeps 25 fraction bits of each
//! addend and rounds once: 0 of 154,454 sums differ, and some with 24 or 26.
//!
//! Sources: ggml's `norm.cu`, `rope.cu`, `softmax.cu`, `unary.cu`, `mmvf.cu`, `mmf.cu` and
//! `ggml-cuda.cu` (MIT), of August 2025.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::attention::{Heads, head_of, transposed};
use super::linear::{by_lanes, codes};
use super::row_sum::warps;
use super::sfu;
use crate::compute::emulated::chip::{Unit, chip};
use crate::compute::emulated::gemm::{GemmError, Operand, Scales, gemm};
use crate::compute::emulated::quantize::Codes;
use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
use crate::engine::Order;
use crate::model::RopeLayout;
use crate::op::ChipName;
use crate::tensor::Tensor;

const WARP: usize = 32;

/// RMSNorm of each row with its gain.
pub fn rms_norm(x: &Tensor, gain: &[f32], eps: f32) -> Tensor {
    let width = gain.len().max(1);
    let threads = if width < 1024 { WARP } else { 1024 };
    let mut y = x.clone();
    y.data_mut().par_chunks_mut(width).for_each(|row| {
        let mut sums = vec![0.0f32; threads];
        for part in row.chunks(threads) {
            sums.iter_mut().zip(part).for_each(|(sum, x)| *sum = x.mul_add(*x, *sum));
        }
        let inverse = sfu::rcp_ftz(width as f32);
        let scale = sfu::rsqrt_ftz(warps(&sums).mul_add(inverse, eps));
        row.iter_mut().zip(gain).for_each(|(x, gain)| *x = scale * *x * gain);
    });
    y
}

/// `powf` of fast math.
fn pow(x: f32, y: f32) -> f32 {
    sfu::ex2_ftz(y * sfu::lg2_ftz(x))
}

/// `expf` of fast math.
fn exp(x: f32) -> f32 {
    sfu::ex2_ftz(x * std::f32::consts::LOG2_E)
}

/// Rotates the first `dimensions` of each head of `head_dim`; row `i` stands at `first + i`.
pub fn rope(
    x: &Tensor,
    layout: RopeLayout,
    (base, dimensions): (f32, usize),
    head_dim: usize,
    first: usize,
) -> Tensor {
    // The step is computed on the host, in the C library's `powf`.
    let step = (f64::from(base).powf(f64::from(-2.0f32 / dimensions as f32))) as f32;
    let mut y = x.clone();
    for row in 0..x.rows() {
        let position = (first + row) as f32;
        for pair in 0..dimensions / 2 {
            let angle = position * pow(step, pair as f32);
            let (cos, sin) = (sfu::cos_ftz(angle), sfu::sin_ftz(angle));
            for head in y.row_mut(row).chunks_exact_mut(head_dim.max(1)) {
                let (i, j) = match layout {
                    RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                    RopeLayout::Halves => (pair, pair + dimensions / 2),
                };
                let (a, b) = (head[i], head[j]);
                head[i] = a.mul_add(cos, -(b * sin));
                head[j] = a.mul_add(sin, b * cos);
            }
        }
    }
    y
}

/// `silu(gate) * up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    let silu = |x: f32| x * sfu::rcp_ftz(1.0 + exp(-x));
    let pairs = gate.data().iter().zip(up.data());
    Tensor::new(gate.width(), pairs.map(|(gate, up)| silu(*gate) * up).collect())
}

/// Softmax of a row of scores, of which only the first `seen` are not masked.
pub fn softmax(row: &mut [f32], scale: f32, seen: usize) {
    let mut threads = WARP;
    while threads < row.len() && threads < 1024 {
        threads *= 2;
    }
    let (shown, masked) = row.split_at_mut(seen.min(row.len()));
    masked.fill(0.0);
    let mut most = f32::NEG_INFINITY;
    for x in shown.iter_mut() {
        *x *= scale;
        most = most.max(*x);
    }
    let mut sums = vec![0.0f32; threads];
    for part in shown.chunks_mut(threads) {
        for (sum, x) in sums.iter_mut().zip(part) {
            *x = exp(*x - most);
            *sum += *x;
        }
    }
    let inverse = sfu::rcp_ftz(warps(&sums));
    shown.iter_mut().for_each(|x| *x *= inverse);
}

/// Which product this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// An activation and a weight.
    Weight,
    /// Queries and keys of so many heads of keys, whose sums are asked for in f32.
    Scores {
        /// Heads of keys.
        key_heads: usize,
    },
    /// Attention's weights and values.
    Values,
}

/// Which kernel multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// `mul_mat_vec_f`.
    Vectors,
    /// `mul_mat_f`.
    Warps,
    /// cuBLAS.
    Blas,
}

/// The kernel that multiplies `rows` rows of `inner` values by `outputs` rows of that format.
pub fn kernel(format: Format, part: Part, [rows, outputs, inner]: [usize; 3]) -> Kernel {
    let few = if format == Format::F32 { 3 } else { 1 };
    // A weight, and the keys of a single head, are one matrix.
    let one = matches!(part, Part::Weight | Part::Scores { key_heads: 1 });
    let thin = outputs <= 512 || one || format == Format::F32;
    if rows <= few && inner.is_multiple_of(2) && thin {
        return Kernel::Vectors;
    }
    let whole = inner.is_multiple_of(WARP * words(format)) && outputs.is_multiple_of(WARP);
    if rows <= 16 && whole { Kernel::Warps } else { Kernel::Blas }
}

/// Whether sums are kept in f16.
fn in_half(format: Format, part: Part) -> bool {
    format == Format::F16 && !matches!(part, Part::Scores { .. })
}

/// Values in 32 bits.
fn words(format: Format) -> usize {
    if format == Format::F32 { 1 } else { 2 }
}

/// `x[N, K] w[M, K]^T`, the values of `w` being exactly those of `format`. cuBLAS adds in one
/// chain; [`by_blas`] takes other orders.
///
/// # Errors
/// If shapes do not fit.
pub fn product(x: &Tensor, w: &Tensor, format: Format, part: Part) -> Result<Tensor, GemmError> {
    match kernel(format, part, [x.rows(), w.rows(), x.width()]) {
        Kernel::Vectors => Ok(by_vectors(x, w, in_half(format, part))),
        Kernel::Warps => by_warps(x, w, format),
        Kernel::Blas => by_blas(x, w, format, part, Order::CHAIN),
    }
}

/// The format in which cuBLAS multiplies: of f32 its upper bits, rounded.
pub fn blas_format(format: Format) -> Format {
    if format == Format::F32 { Format::Tf32 } else { format }
}

/// The product as cuBLAS makes it, in f32 or, of f16 that is no score, in f16; of bf16 weights
/// the result is rounded to bf16. The values of `w` are exactly those of `format`.
///
/// # Errors
/// If shapes do not fit.
pub fn by_blas(
    x: &Tensor,
    w: &Tensor,
    format: Format,
    part: Part,
    order: Order,
) -> Result<Tensor, GemmError> {
    let in_half = in_half(format, part);
    let held = blas_format(format);
    let mut y = if order.is_by_lanes() && !in_half {
        // No tensor core: f32 stays whole.
        by_lanes(&codes(format, x), &codes(format, w))?
    } else {
        let (x, w) = (codes(held, x), codes(held, w));
        if x.width() != w.width() {
            // Refused in words where it is multiplied.
            return chain(held, &x, &w);
        }
        let tile = order.tile * held.bytes() as u32;
        let cut = Schedule { split_k: order.parts, split_tile_bytes: tile, ..Schedule::FAST };
        let mut y = Tensor::zeros(x.rows(), w.rows());
        for step in cut.steps(x.width(), held) {
            let columns = |codes: &Codes| codes.some_columns(step.inner.clone());
            let (x, w) = (columns(&x), columns(&w));
            let sums = if in_half { in_halves(&x, &w) } else { chain(held, &x, &w)? };
            for (y, sum) in y.data_mut().iter_mut().zip(sums.data()) {
                let sum = if order.rounded { held.round(*sum) } else { *sum };
                *y = if in_half { Format::F16.round(*y + sum) } else { *y + sum };
            }
        }
        y
    };
    if format == Format::Bf16 && part == Part::Weight {
        y.data_mut().iter_mut().for_each(|y| *y = format.round(*y));
    }
    Ok(y)
}

fn unit(format: Format) -> Unit {
    chip(ChipName::Hopper).unit(format, format).copied().unwrap_or(Unit::SequentialFma)
}

/// One chain along K in f32.
fn chain(format: Format, x: &Codes, w: &Codes) -> Result<Tensor, GemmError> {
    let operand = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
    gemm(&unit(format), &Schedule::FAST, &operand(x), &operand(w), Format::F32)
}

/// `mul_mat_vec_f`: each thread of a block adds pairs.
fn by_vectors(x: &Tensor, w: &Tensor, in_half: bool) -> Tensor {
    let pairs = x.width() / 2;
    let (mut threads, mut fewest) = (WARP, pairs.div_ceil(WARP));
    for more in (2 * WARP..=256).step_by(WARP) {
        if pairs.div_ceil(more) < fewest {
            (threads, fewest) = (more, pairs.div_ceil(more));
        }
    }
    let one = |x: &[f32], w: &[f32]| {
        let mut sums = vec![[0.0f32; 2]; threads];
        for (pair, (x, w)) in x.chunks_exact(2).zip(w.chunks_exact(2)).enumerate() {
            let sum = &mut sums[pair % threads];
            if in_half {
                for half in 0..2 {
                    let x = Format::F16.round(x[half]);
                    sum[half] = fma_in_half(w[half], x, sum[half]);
                }
            } else {
                sum[0] = w[0].mul_add(x[0], sum[0]);
                sum[0] = w[1].mul_add(x[1], sum[0]);
            }
        }
        let sums: Vec<f32> = sums.iter().map(|sum| sum[0] + sum[1]).collect();
        warps(&sums)
    };
    let data: Vec<f32> = (0..x.rows())
        .flat_map(|row| (0..w.rows()).map(move |output| (row, output)))
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|(row, output)| one(x.row(row), w.row(output)))
        .collect();
    Tensor::new(w.rows().max(1), data)
}

/// The nearest f16, in one rounding.
fn to_half(x: f64) -> f32 {
    // What an f32 leaves over is kept in its last place, where it breaks a tie.
    let nearest = x as f32;
    let odd = match f64::from(nearest).abs().total_cmp(&x.abs()) {
        Ordering::Equal => nearest,
        Ordering::Less => f32::from_bits(nearest.to_bits() | 1),
        Ordering::Greater => f32::from_bits((nearest.to_bits() - 1) | 1),
    };
    Format::F16.round(odd)
}

/// `a * b + c` of f16 values, rounded once to f16.
fn fma_in_half(a: f32, b: f32, c: f32) -> f32 {
    to_half(f64::from(a) * f64::from(b) + f64::from(c))
}

/// `mul_mat_f`: warps share K in turns of 32 words, and their sums are added in order.
fn by_warps(x: &Tensor, w: &Tensor, format: Format) -> Result<Tensor, GemmError> {
    let words = words(format);
    let turns = x.width() / words;
    let (mut warps, mut fewest) = (1, turns.div_ceil(2 * WARP));
    for more in 2..=8 {
        if turns.div_ceil(2 * WARP * more) < fewest {
            (warps, fewest) = (more, turns.div_ceil(2 * WARP * more));
        }
    }
    let format = blas_format(format);
    let held = |values: &Tensor| match format {
        // The tensor core reads the upper bits.
        Format::Tf32 => {
            let cut = values.data().iter().map(|x| f32::from_bits(x.to_bits() & !0x1fff));
            codes(format, &Tensor::new(values.width(), cut.collect()))
        }
        _ => codes(format, values),
    };
    let mut y = Tensor::zeros(x.rows(), w.rows());
    for warp in 0..warps {
        let own = |values: &Tensor| {
            let turn = WARP * words;
            let chunks = (0..values.width()).step_by(turn).skip(warp).step_by(warps);
            let columns: Vec<usize> = chunks.flat_map(|at| at..at + turn).collect();
            let rows = (0..values.rows()).flat_map(|row| {
                let row = values.row(row);
                columns.iter().map(|&column| row[column]).collect::<Vec<f32>>()
            });
            Tensor::new(columns.len().max(1), rows.collect())
        };
        let (x, w) = (own(x), own(w));
        if x.data().is_empty() {
            continue;
        }
        let part = chain(format, &held(&x), &held(&w))?;
        y.data_mut().iter_mut().zip(part.data()).for_each(|(y, part)| *y += part);
    }
    Ok(y)
}

/// cuBLAS with sums in f16: an instruction cuts 16 products and the sum as one with sums in f32
/// does, adds them exactly, and rounds to f16 once.
fn in_halves(x: &Codes, w: &Codes) -> Tensor {
    const PRODUCTS: usize = 16;
    let values = |codes: &Codes| -> Vec<Vec<Half>> {
        let row = |row| codes.decode_row(row).iter().map(|&x| Half::of(x)).collect();
        (0..codes.rows()).map(row).collect()
    };
    let (x, w) = (values(x), values(w));
    let data: Vec<f32> = (0..x.len() * w.len())
        .into_par_iter()
        .map(|at| {
            let (x, w) = (&x[at / w.len()], &w[at % w.len()]);
            let blocks = x.chunks(PRODUCTS).zip(w.chunks(PRODUCTS));
            blocks.fold(0.0, |sum: f32, (x, w)| match (x, w) {
                // A sum that overflowed stays so; operands that did are told as NaN.
                _ if !sum.is_finite() => sum,
                _ if x.iter().zip(w).any(|(x, w)| x.is_special() || w.is_special()) => f32::NAN,
                _ => add_in_half(x, w, Half::of(sum)),
            })
        })
        .collect();
    Tensor::new(w.len().max(1), data)
}

/// An f16 value: a signed significand of 11 bits, and the exponent of its first one.
#[derive(Clone, Copy)]
struct Half {
    significand: i64,
    exponent: i32,
}

impl Half {
    fn of(x: f32) -> Half {
        let bits = half::f16::from_f32(x).to_bits();
        let (exponent, fraction) = (i32::from(bits >> 10 & 31), i64::from(bits & 1023));
        let significand = if exponent == 0 { fraction } else { fraction | 1024 };
        let significand = if bits >> 15 == 0 { significand } else { -significand };
        Half { significand, exponent: exponent.max(1) - 15 }
    }

    /// Whether it is an infinity or NaN.
    fn is_special(self) -> bool {
        self.exponent == 16
    }
}

/// One instruction with an accumulator in f16.
fn add_in_half(x: &[Half], w: &[Half], sum: Half) -> f32 {
    /// Fraction bits that an addend keeps, as where sums are f32.
    const KEPT: i32 = 25;
    // Products have 20 fraction bits, the accumulator 10.
    let products =
        x.iter().zip(w).map(|(x, w)| (x.significand * w.significand, x.exponent + w.exponent, 20));
    let addends = || products.clone().chain([(sum.significand, sum.exponent, 10)]);
    let present = addends().filter(|addend| addend.0 != 0);
    let Some(most) = present.clone().map(|(_, exponent, _)| exponent).max() else { return 0.0 };
    let cut = |(significand, exponent, fraction): (i64, i32, i32)| {
        let shift = KEPT - fraction - (most - exponent);
        let magnitude = significand.abs();
        let kept = if shift >= 0 { magnitude << shift } else { magnitude >> (-shift).min(63) };
        if significand < 0 { -kept } else { kept }
    };
    let total: i64 = present.map(cut).sum();
    // Exact: 26 bits, and 4 for the number of addends.
    to_half(total as f64 * 2f64.powi(most - KEPT))
}

/// What scores are multiplied by: a root and a division in f32, on the host.
pub fn score_scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// Attention over a cache of that format, without FlashAttention: `[queries, heads * head_dim]`.
///
/// # Errors
/// If shapes do not fit.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: &Heads,
    cache: Format,
) -> Result<Tensor, GemmError> {
    let padded = k.rows().next_multiple_of(WARP);
    let width = heads.head_dim;
    // What the cache holds beyond the keys is masked.
    let held = |x: &Tensor, kv: usize| {
        let mut own = head_of(x, kv, width).into_data();
        own.iter_mut().for_each(|x| *x = cache.round(*x));
        own.resize(padded * width, 0.0);
        Tensor::new(width, own)
    };
    let outputs = (0..heads.heads)
        .into_par_iter()
        .map(|head| {
            let kv = heads.kv_head(head);
            let scores = Part::Scores { key_heads: heads.kv_heads };
            let mut p = product(&head_of(q, head, width), &held(k, kv), cache, scores)?;
            for row in 0..p.rows() {
                softmax(p.row_mut(row), heads.scale, heads.seen(row, q.rows(), k.rows()));
            }
            product(&p, &transposed(&held(v, kv)), cache, Part::Values)
        })
        .collect::<Result<Vec<Tensor>, GemmError>>()?;
    let mut y = Tensor::zeros(q.rows(), heads.heads * width);
    for (head, output) in outputs.iter().enumerate() {
        y.set_columns(head * width, output);
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(values: &[f32]) -> Codes {
        codes(Format::F16, &Tensor::new(values.len(), values.to_vec()))
    }

    #[test]
    fn a_sum_in_f16_is_rounded_once_overflows_and_keeps_nan() {
        // An f32 would round this to a tie.
        let almost = 1606.5 + 1.0 / f64::from(1 << 14);
        assert_eq!(to_half(almost / 4096.0), 1607.0 / 4096.0);
        assert_eq!(to_half(-almost / 4096.0), -1607.0 / 4096.0);
        let one = |x: &[f32], w: &[f32]| in_halves(&halves(x), &halves(w)).data()[0];
        assert_eq!(one(&[3.0; 20], &[0.5; 20]), 30.0);
        assert_eq!(one(&[60000.0; 20], &[2.0; 20]), f32::INFINITY);
        assert!(one(&[f32::NAN; 20], &[0.5; 20]).is_nan());
    }

    #[test]
    fn operands_of_other_widths_are_refused_in_words() {
        let (x, w) = (Tensor::new(32, vec![1.0; 32]), Tensor::new(16, vec![1.0; 16]));
        for order in [Order::CHAIN, Order { instruction: 1, ..Order::CHAIN }] {
            assert!(by_blas(&x, &w, Format::F32, Part::Weight, order).is_err());
        }
    }
}
