//! Products of cuBLAS and cuBLASLt in bf16 and f16, with the bias in the epilogue.
//!
//! It knows codes and a schedule; one chain's arithmetic is `compute/emulated`'s.
//!
//! Two things stand beside the schedule. The bias is added in f32, before the one
//! rounding. And where a row of K is not a multiple of 16 bytes, cuBLAS takes a
//! CUTLASS kernel, which begins with what its tiles leave over: the first `K mod 128`
//! elements (in bf16 `K mod 32` of an odd K) are chained first, filled up with zeros, then
//! whole tiles follow.
//!
//! Evidence: every `Linear` of three transformers models on an H200; `p v` of eager
//! attention at 300 keys, 0 of 76,800 differ with the rest first and 3 without. Of
//! 44 shapes on an H100 all without split-K fit; those with it fit the number of
//! parts that `identify` finds.

use crate::compute::emulated::chip::Unit;
use crate::compute::emulated::gemm::{GemmError, Operand, Scales, gemm};
use crate::compute::emulated::quantize::{Codes, quantize_row};
use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
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

impl Linear {
    /// One chain along K of operands in the output's format, with the rest first where
    /// K is unaligned.
    pub fn new(unit: &Unit, inner: usize, output: Format) -> Linear {
        Linear {
            unit: *unit,
            schedule: Schedule::FAST,
            residue_tile: residue_tile(output, inner),
            output,
        }
    }

    /// `x[N, K] w[M, K]^T + bias[M]`.
    ///
    /// # Errors
    /// If shapes, formats or the schedule do not fit.
    pub fn apply(&self, x: &Codes, w: &Codes, bias: Option<&[f32]>) -> Result<Tensor, GemmError> {
        let operand = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
        let mut y = match self.residue_tile {
            Some(tile) => {
                let (x, w) = (residue_first(x, tile), residue_first(w, tile));
                gemm(&self.unit, &self.schedule, &operand(&x), &operand(&w), Format::F32)?
            }
            None => gemm(&self.unit, &self.schedule, &operand(x), &operand(w), Format::F32)?,
        };
        finish(&mut y, bias, self.output);
        Ok(y)
    }
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
fn residue_first(codes: &Codes, tile: usize) -> Codes {
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
