//! What the ranks of a tensor-parallel product hold, and their sum.
//!
//! It knows parts of K and the order of additions, not which products are dealt out.

use std::ops::Range;

use super::gemm::Scales;
use super::quantize::BlockScales;
use crate::dtype::Format;
use crate::tensor::Tensor;

/// Elements of K that share a block scale.
const BLOCK: usize = 128;

/// The scales of some elements of K, of `width` in all; blocks must begin where they begin.
pub fn scales_of_part(scales: &Scales, inner: &Range<usize>, width: usize) -> Scales {
    match scales {
        Scales::Block128 { rows_per_block, first_row, scales } => {
            let blocks = inner.start / BLOCK..inner.end.div_ceil(BLOCK);
            let rows = scales.chunks_exact(width.div_ceil(BLOCK).max(1));
            Scales::Block128 {
                rows_per_block: *rows_per_block,
                first_row: *first_row,
                scales: rows.flat_map(|row| row[blocks.clone()].iter().copied()).collect(),
            }
        }
        Scales::Blocks(scales) => {
            let block = scales.format.block();
            let part = inner.start / block..inner.end.div_ceil(block);
            let rows = scales.codes.chunks_exact(scales.blocks.max(1));
            let codes = rows.flat_map(|row| row[part.clone()].iter().copied()).collect();
            Scales::Blocks(BlockScales { codes, blocks: part.len(), ..scales.clone() })
        }
        whole => whole.clone(),
    }
}

/// The ranks' results added one after the other, each sum rounded: what two GPUs make of two
/// addends is the same in either order. Each rank's result is given in the type of the sum.
pub fn sum_by_rank(parts: Vec<Tensor>, output: Format) -> Tensor {
    let mut parts = parts.into_iter().map(|mut part| {
        part.data_mut().iter_mut().for_each(|value| *value = output.round(*value));
        part
    });
    let Some(mut sum) = parts.next() else { return Tensor::zeros(0, 1) };
    for part in parts {
        let values = sum.data_mut().iter_mut().zip(part.data());
        values.for_each(|(sum, part)| *sum = output.round(*sum + part));
    }
    sum
}
