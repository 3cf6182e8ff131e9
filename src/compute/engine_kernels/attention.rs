//! Eager attention, as transformers composes it of tensor operations.
//!
//! It knows queries, keys and values with their heads side by side, `[tokens,
//! heads * head_dim]`: no caches, no models.
//!
//! The scores `q k^T` are rounded, multiplied by the scale and rounded, masked; the
//! softmax is f32 and rounded; `p v` is rounded. Products are cuBLAS's, see
//! `linear.rs`. Evidence: all five tensors of three attentions on an H200 (48, 200
//! and 300 tokens), 0 of 203,776 outputs differ; of 20 more shapes in bf16 and f16 on
//! an H100 none differ but 1 of 256 values of one query over 500 keys in f16, where
//! both products have schedules that are not worked out. Of 499 small transformers passes on
//! an H100 and an H200 the 16 attentions that were looked at, because these orders did not meet
//! them, are met by others of [`Order::family`] and by the softmax of f16 scores.

use rayon::prelude::*;

use super::cuda_math;
use super::linear::{Linear, codes};
use super::softmax::{softmax, softmax_of_f16};
use crate::compute::emulated::chip::Unit;
use crate::compute::emulated::gemm::GemmError;
use crate::dtype::Format;
use crate::engine::Order;
use crate::tensor::Tensor;

/// The heads of an attention and what may be seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether a query sees no later key; the last query stands at the last key.
    pub causal: bool,
    /// What scores are multiplied by, mostly `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Positions that a query sees, its own among them; all up to its own where nothing is said.
    pub window: Option<usize>,
    /// Where scores are bent towards a limit, after the scale.
    pub cap: Option<f32>,
}

/// `cap * tanh(x / cap)` as three operations of PyTorch on a GPU: it multiplies by the
/// reciprocal of a number that it divides by, and each result is rounded.
///
/// Source: `BinaryDivTrueKernel.cu`, `UnaryGeometricTanhKernel.cu`.
pub fn soft_cap(format: Format, x: f32, cap: f32) -> f32 {
    let share = format.round(x * (1.0 / cap));
    format.round(format.round(cuda_math::tanh(share)) * cap)
}

impl Heads {
    /// Causal heads with the usual scale.
    pub fn causal(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
        // As Python computes it: in f64, rounded once.
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        Heads { heads, kv_heads, head_dim, causal: true, scale, window: None, cap: None }
    }

    /// The key head that a query head reads.
    pub fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads.max(1)).max(1)
    }

    /// The keys that query `row` of `queries` sees, of `keys` in all.
    pub fn seen(&self, row: usize, queries: usize, keys: usize) -> usize {
        if self.causal { (row + 1 + keys).saturating_sub(queries).min(keys) } else { keys }
    }

    /// The keys before those that a query sees which is at the end of so many.
    pub fn hidden(&self, seen: usize) -> usize {
        self.window.map_or(0, |window| seen.saturating_sub(window))
    }
}

/// One head's columns.
pub fn head_of(x: &Tensor, head: usize, head_dim: usize) -> Tensor {
    let rows = (0..x.rows()).flat_map(|row| &x.row(row)[head * head_dim..(head + 1) * head_dim]);
    Tensor::new(head_dim, rows.copied().collect())
}

/// Rows become columns.
pub fn transposed(x: &Tensor) -> Tensor {
    let columns =
        (0..x.width()).flat_map(|column| (0..x.rows()).map(move |row| x.row(row)[column]));
    Tensor::new(x.rows().max(1), columns.collect())
}

/// The two products, as cuBLAS makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Products {
    /// `q k^T`.
    pub scores: Linear,
    /// `p v`.
    pub values: Linear,
}

impl Products {
    /// One chain each, in that format.
    pub fn new(unit: &Unit, format: Format, heads: &Heads, keys: usize) -> Products {
        Products {
            scores: Linear::new(unit, heads.head_dim, format),
            values: Linear::new(unit, keys, format),
        }
    }

    /// The same in other orders.
    pub fn in_order(self, scores: Order, values: Order) -> Products {
        Products { scores: self.scores.in_order(scores), values: self.values.in_order(values) }
    }
}

/// The output of eager attention, `[queries, heads * head_dim]`, in the format of
/// the scores.
///
/// # Errors
/// If shapes do not fit.
pub fn eager(
    products: &Products,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: &Heads,
) -> Result<Tensor, GemmError> {
    let rows: Vec<usize> = (0..q.rows()).collect();
    eager_of(products, (q, &rows, q.rows()), k, v, heads)
}

/// The same of some queries: `q` holds those at `rows`, of so many in all.
///
/// # Errors
/// If shapes do not fit.
pub fn eager_of(
    products: &Products,
    (q, rows, queries): (&Tensor, &[usize], usize),
    k: &Tensor,
    v: &Tensor,
    heads: &Heads,
) -> Result<Tensor, GemmError> {
    let format = products.scores.output;
    let width = heads.head_dim;
    let outputs = (0..heads.heads)
        .into_par_iter()
        .map(|head| {
            let kv = heads.kv_head(head);
            let q = codes(format, &head_of(q, head, width));
            let keys = codes(format, &head_of(k, kv, width));
            let v = codes(format, &transposed(&head_of(v, kv, width)));
            let mut p = products.scores.apply(&q, &keys, None)?;
            for (index, &row) in rows.iter().enumerate() {
                let seen = heads.seen(row, queries, k.rows());
                let row_of = p.row_mut(index);
                row_of.iter_mut().for_each(|score| *score = format.round(*score * heads.scale));
                if let Some(cap) = heads.cap {
                    row_of.iter_mut().for_each(|score| *score = soft_cap(format, *score, cap));
                }
                let (seen, masked) = row_of.split_at_mut(seen);
                // What a mask leaves is exp of it, 0, and 0 changes no sum.
                masked.fill(f32::NEG_INFINITY);
                let hidden = heads.hidden(seen.len());
                seen[..hidden].fill(f32::NEG_INFINITY);
                match (seen.is_empty(), format) {
                    (true, _) => {}
                    (_, Format::F16) => softmax_of_f16(row_of, head * queries + row),
                    _ => softmax(row_of),
                }
                row_of.iter_mut().for_each(|p| *p = format.round(*p));
            }
            products.values.apply(&codes(format, &p), &v, None)
        })
        .collect::<Result<Vec<Tensor>, GemmError>>()?;
    let mut y = Tensor::zeros(q.rows(), heads.heads * width);
    for (head, output) in outputs.iter().enumerate() {
        y.set_columns(head * width, output);
    }
    Ok(y)
}
