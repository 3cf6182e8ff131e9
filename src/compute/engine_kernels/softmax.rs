//! PyTorch's softmax over the last dimension, in f32.
//!
//! It knows one row at a time; a masked score is minus infinity, or the format's
//! lowest finite value, as the caller's engine has it.
//!
//! `exp(x - max) / sum` with CUDA's `expf` and IEEE division. Rows of up to 2,048
//! values: one warp, lane `i` adds the values `i`, `i + 32`, ... in order, and the
//! lanes meet by shuffles across 16, 8, 4, 2, 1 (`PersistentSoftmax.cuh`). Longer
//! rows: a block of 1,024 threads likewise, its warps' sums by another shuffle
//! (`SoftMax.cu`). Where between 2,048 and 4,096 the one gives way to the other is
//! not known. Evidence, none differing: 264,608 f32 values of eager attention on an
//! H200; 466,928 of 28 rows by 17 widths from 1 to 5,000 on an H100.
//!
//! transformers casts f16 scores to f32 within the softmax, and that is another kernel: one
//! warp up to 1,024 values, then a block that reads vectors of 8 where the width is a multiple
//! of them, else value by value from the last 16-byte address before the row. Rows of 8,192 f16
//! values and more that are no multiple of 8 wide are read otherwise; they were in no recording.
//! Evidence: attention over 1,222 to 1,483 keys in f16 on an H100, none of 2,691,712 differs.

use super::cuda_math;
use super::row_sum::RowSum;

/// The longest row of f32 that one warp takes.
const WARP_ROW: usize = 2048;
/// The same of f16.
const WARP_ROW_OF_F16: usize = 1024;
/// f16 values of 16 bytes.
const VECTOR: usize = 8;

/// Overwrites a row of scores with their softmax.
pub fn softmax(row: &mut [f32]) {
    let threads = if row.len() <= WARP_ROW { 32 } else { 1024 };
    softmax_by(row, RowSum::Block { threads, vector: 1 }, 0);
}

/// The same of scores in f16, whose softmax is computed in f32: PyTorch reads them as they are
/// and has another kernel for them. `place` counts the rows before, from an aligned address.
pub fn softmax_of_f16(row: &mut [f32], place: usize) {
    let (order, shift) = match row.len() {
        ..=WARP_ROW_OF_F16 => (RowSum::Block { threads: 32, vector: 1 }, 0),
        width if width.is_multiple_of(VECTOR) => {
            (RowSum::Block { threads: 1024, vector: VECTOR }, 0)
        }
        width => (RowSum::Block { threads: 1024, vector: 1 }, place * width % VECTOR),
    };
    softmax_by(row, order, shift);
}

/// The threads count from the last aligned address before the row: the first `shift` have
/// nothing to add there.
fn softmax_by(row: &mut [f32], order: RowSum, shift: usize) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    for x in row.iter_mut() {
        *x = cuda_math::exp(*x - largest);
    }
    let sum = match shift {
        0 => order.sum(row),
        _ => {
            let mut shifted = vec![0.0; shift];
            shifted.extend_from_slice(row);
            order.sum(&shifted)
        }
    };
    for x in row.iter_mut() {
        *x /= sum;
    }
}
