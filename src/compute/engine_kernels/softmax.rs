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

use super::cuda_math;
use super::row_sum::RowSum;

/// The longest row that one warp takes.
const WARP_ROW: usize = 2048;

/// Overwrites a row of scores with their softmax.
pub fn softmax(row: &mut [f32]) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    for x in row.iter_mut() {
        *x = cuda_math::exp(*x - largest);
    }
    let order = if row.len() <= WARP_ROW {
        RowSum::Block { threads: 32, vector: 1 }
    } else {
        RowSum::Block { threads: 1024, vector: 1 }
    };
    let sum = order.sum(row);
    for x in row.iter_mut() {
        *x /= sum;
    }
}
