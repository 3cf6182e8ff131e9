//! Products of cuBLAS and cuBLASLt in bf16 and f16, with the bias in the epilogue.
//!
//! It knows codes and a schedule; one chain's arithmetic is `compute/emulated`'s.
//!
//! Three things stand beside the schedule. The bias is added in f32, before the one
//! rounding. Where a row of K is not a multiple of 16 bytes, cuBLAS takes a
//! CUTLASS kernel, which begins with what its tiles leave over: the first `K mod 128`
//! elements (in bf16 `K mod 32` of an odd K) are chained first, filled up with zeros, then
//! whole tiles follow. And where it cuts K into parts, PyTorch lets it keep their sums in the
//! stream's type (`allow_bf16_reduced_precision_reduction` and its f16 twin, on unless a user
//! turns them off).
//!
//! Where a row of an operand or of the result is not a multiple of 16 bytes it may also take
//! a kernel of `mma.m16n8k8`, which adds 8 products at a time.
//!
//! Evidence: every `Linear` of three transformers models on an H200; `p v` of eager
//! attention at 300 keys, 0 of 76,800 differ with the rest first and 3 without. Of
//! 44 shapes on an H100 all without split-K fit; those with it fit the number of
//! parts that `identify` finds. Of 499 small transformers passes on an H100 and an H200 (PyTorch
//! 2.11) the products that one chain did not meet were looked at, up to four of each kind: the
//! orders of [`Order::family`] give every bit of 15 of them, and of three logits of 1 token in
//! f16 they do not. 1001 outputs were added 8 products at a time, in up to 14 parts; 500 outputs
//! of 8 to 34 tokens in 4 to 8 rounded parts. Parts of 136 elements, of K dealt in tiles of 8, begin
//! with their rest: 0 of 69,500 values differ on an H200, and 1 with the rest last. 16 lanes without a
//! tensor core give every bit of 5,500 logits of llama.cpp in f32 (11 rows, 500 outputs, K of 448) and
//! of 9,009 of transformers in f16 (9 rows, 1001 outputs, K of 384), which a tensor core's orders do not.

use rayon::prelude::*;

use super::attention::transposed;
use crate::compute::emulated::chip::{TensorCore, Unit};
use crate::compute::emulated::gemm::{GemmError, Operand, Scales, gemm};
use crate::compute::emulated::quantize::{Codes, quantize_row};
use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
use crate::engine::Order;
use crate::tensor::Tensor;

/// How a library multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// The tensor core.
    pub unit: Unit,
    /// The order of additions.
    pub schedule: Schedule,
    /// Where the library begins with what tiles of so many elements of K leave
    /// over; see [`residue_tile`].
    pub residue_tile: Option<usize>,
    /// Whether the sum of each part of K is rounded to the result's format.
    pub rounded_parts: bool,
    /// Whether no tensor core multiplies: see [`by_lanes`].
    pub lanes: bool,
    /// The format of the result.
    pub output: Format,
}

/// The tile whose rest is chained first where a K of so many 16-bit elements is not
/// a multiple of 16 bytes. It is what fits the captures at hand: cuBLAS has kernels
/// of other tiles, and no rule of its choice is known.
pub fn residue_tile(format: Format, inner: usize) -> Option<usize> {
    match (format, inner) {
        _ if inner.is_multiple_of(8) => None,
        (Format::Bf16, _) if !inner.is_multiple_of(2) => Some(32),
        _ => Some(128),
    }
}

/// The tile whose rest is chained first within a part of unaligned K, or of one dealt in tiles of 8.
const PART_TILE: usize = 32;

impl Linear {
    /// One chain along K of operands in the output's format, with the rest first where
    /// K is unaligned.
    pub fn new(unit: &Unit, inner: usize, output: Format) -> Linear {
        Linear {
            unit: *unit,
            schedule: Schedule::FAST,
            residue_tile: residue_tile(output, inner),
            rounded_parts: false,
            lanes: false,
            output,
        }
    }

    /// The same in another order.
    pub fn in_order(self, order: Order) -> Linear {
        let unit = match self.unit {
            Unit::TensorCore(core) => {
                // An instruction of half the products: on chips whose blocks are smaller they
                // are what is added at once anyway.
                let products = match order.instruction as usize {
                    1 => core.products,
                    products => core.products.min(products),
                };
                Unit::TensorCore(TensorCore { products, ..core })
            }
            unit => unit,
        };
        let split_tile_bytes = order.tile * self.output.bytes() as u32;
        let schedule = Schedule { split_k: order.parts, split_tile_bytes, ..self.schedule };
        let rest = order.rest.map(|tile| tile as usize);
        let residue_tile = self.residue_tile.map(|tile| rest.unwrap_or(tile));
        let (rounded_parts, lanes) = (order.rounded, order.is_by_lanes());
        Linear { unit, schedule, residue_tile, rounded_parts, lanes, ..self }
    }

    /// `x[N, K] w[M, K]^T + bias[M]`.
    ///
    /// # Errors
    /// If shapes, formats or the schedule do not fit.
    pub fn apply(&self, x: &Codes, w: &Codes, bias: Option<&[f32]>) -> Result<Tensor, GemmError> {
        let mut y = self.sums(x, w)?;
        finish(&mut y, bias, self.output);
        Ok(y)
    }

    /// The sums along K, in f32.
    fn sums(&self, x: &Codes, w: &Codes) -> Result<Tensor, GemmError> {
        if self.lanes {
            return by_lanes(x, w);
        }
        let multiply = |schedule: &Schedule, x: &Codes, w: &Codes| {
            let operand = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
            gemm(&self.unit, schedule, &operand(x), &operand(w), Format::F32)
        };
        let whole = self.schedule.with_split_k(1);
        let chain = |tile: Option<usize>, x: &Codes, w: &Codes| match tile {
            Some(tile) => multiply(&whole, &residue_first(x, tile), &residue_first(w, tile)),
            None => multiply(&whole, x, w),
        };
        if self.schedule.split_k <= 1 {
            return chain(self.residue_tile, x, w);
        }
        // Operands that do not fit are refused where they are multiplied.
        let fits = x.width() == w.width();
        let tile = self.schedule.split_tile_bytes as usize / self.output.bytes();
        let whole_blocks = tile.is_multiple_of(self.unit.products());
        if !fits || (whole_blocks && !self.rounded_parts && self.residue_tile.is_none()) {
            return multiply(&self.schedule, x, w);
        }
        // A kernel whose rows are unaligned deals K first; the rest is that of the last part. So
        // does one that deals tiles of 8, and the rest is that of each.
        let rests = self.residue_tile.is_some() || tile < self.unit.products();
        let tile = rests.then_some(PART_TILE);
        let mut sums = Tensor::zeros(x.rows(), w.rows());
        for step in self.schedule.steps(x.width(), x.format()) {
            let columns = |codes: &Codes| codes.some_columns(step.inner.clone());
            let part = chain(tile, &columns(x), &columns(w))?;
            for (sum, part) in sums.data_mut().iter_mut().zip(part.data()) {
                *sum += if self.rounded_parts { self.output.round(*part) } else { *part };
            }
        }
        Ok(sums)
    }
}

/// A kernel of cuBLAS for few rows without a tensor core: `x[N, K] w[M, K]^T` in f32. Each of 16
/// lanes adds every sixteenth product with one rounding each, 256 elements of K at a time; what a
/// lane has of these 256 is added to what it had, and the lanes follow each other in one sum.
///
/// # Errors
/// If the operands' K differ.
pub fn by_lanes(x: &Codes, w: &Codes) -> Result<Tensor, GemmError> {
    by_lanes_in_turns(x, w, 256)
}

/// [`by_lanes`] with another number of elements of K in a turn.
///
/// # Errors
/// As [`by_lanes`].
pub fn by_lanes_in_turns(x: &Codes, w: &Codes, turn: usize) -> Result<Tensor, GemmError> {
    const LANES: usize = 16;
    if x.width() != w.width() {
        return Err(GemmError::Inner { x: x.width(), w: w.width() });
    }
    if x.rows() == 0 || w.rows() == 0 {
        return Err(GemmError::Empty { n: x.rows(), m: w.rows(), k: x.width() });
    }
    let one = |x: &[f32], w: &[f32]| {
        let mut lanes = [0.0f32; LANES];
        for (x, w) in x.chunks(turn).zip(w.chunks(turn)) {
            let mut sums = [0.0f32; LANES];
            for (x, w) in x.chunks(LANES).zip(w.chunks(LANES)) {
                for ((sum, x), w) in sums.iter_mut().zip(x).zip(w) {
                    *sum = x.mul_add(*w, *sum);
                }
            }
            lanes.iter_mut().zip(sums).for_each(|(lane, sum)| *lane += sum);
        }
        lanes.iter().fold(0.0, |sum, lane| sum + lane)
    };
    let rows: Vec<Vec<f32>> = (0..x.rows()).map(|row| x.decode_row(row)).collect();
    let mut y = Tensor::zeros(w.rows(), x.rows());
    y.data_mut().par_chunks_exact_mut(x.rows()).enumerate().for_each(|(output, y)| {
        let w = w.decode_row(output);
        y.iter_mut().zip(&rows).for_each(|(y, x)| *y = one(x, &w));
    });
    Ok(transposed(&y))
}

/// The epilogue of f32 sums: the bias, and one rounding.
pub fn finish(y: &mut Tensor, bias: Option<&[f32]>, output: Format) {
    for row in 0..y.rows() {
        let row = y.row_mut(row);
        match bias {
            Some(bias) => {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y = output.round(*y + bias));
            }
            None => row.iter_mut().for_each(|y| *y = output.round(*y)),
        }
    }
}

/// Values that are exactly those of a 16-bit format, as its codes.
pub fn codes(format: Format, values: &Tensor) -> Codes {
    let mut codes = Codes::zeros(format, values.rows(), values.width());
    for row in 0..values.rows() {
        quantize_row(format, values.row(row), 1.0, &mut codes.row_mut(row));
    }
    codes
}

/// The rows with what tiles of K leave over first, filled up with zeros to whole
/// instructions.
pub fn residue_first(codes: &Codes, tile: usize) -> Codes {
    let rest = codes.width() % tile.max(1);
    let padding = rest.next_multiple_of(16) - rest;
    let mut padded = Codes::zeros(codes.format(), codes.rows(), codes.width() + padding);
    for row in 0..codes.rows() {
        let mut values = codes.decode_row(row);
        values.splice(rest..rest, std::iter::repeat_n(0.0, padding));
        quantize_row(codes.format(), &values, 1.0, &mut padded.row_mut(row));
    }
    padded
}
