//! Tensor-core chains that go on from given accumulators: `c[N, M] += x[N, K] w[M, K]^T`.
//!
//! Attention needs them: its output accumulates over blocks of keys and is
//! rescaled between them. It knows one chain along K, no schedules and no scales;
//! one instruction's arithmetic is `tensor_core.rs`. It runs on the caller's
//! thread.

use std::ops::Range;

use super::chip::Unit;
use super::matrix_core;
use super::quantize::{Codes, CodesRow};
use super::simd::{self, GROUP, Kernel, Layout, Words};
use super::tensor_core;
use crate::dtype::{Format, Parts};

/// A unit that multiplies two operands of one 16-bit or 8-bit format.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    unit: Unit,
    format: Format,
    kernel: Kernel,
    layout: Option<Layout>,
}

/// An operand of a chain: some elements of K of the rows of a matrix.
#[derive(Clone, Debug)]
pub struct Stretch<'a> {
    /// The matrix, `[rows, K]`.
    pub codes: &'a Codes,
    /// The rows that take part.
    pub rows: Range<usize>,
    /// The elements of K that take part.
    pub inner: Range<usize>,
}

/// The left operand decoded, to be multiplied many times.
#[derive(Clone, Debug)]
pub struct PreparedStretch<'a> {
    stretch: Stretch<'a>,
    words: Vec<Words>,
    special: Vec<bool>,
}

impl Chain {
    /// The chain of a unit over operands of that format.
    pub fn new(unit: &Unit, format: Format) -> Chain {
        Chain::with_kernel(Kernel::best(), unit, format)
    }

    /// [`Chain::new`] for a chosen instruction set; the bits are the same with each.
    pub fn with_kernel(kernel: Kernel, unit: &Unit, format: Format) -> Chain {
        Chain { unit: *unit, format, kernel, layout: Layout::of(unit, kernel, format) }
    }

    /// Decodes the left operand.
    pub fn prepare<'a>(&self, x: Stretch<'a>) -> PreparedStretch<'a> {
        let row = |row: usize| x.codes.row(row).slice(x.inner.clone());
        let (words, special) = x
            .rows
            .clone()
            .map(|index| {
                let mut words = Words::default();
                if let Some(layout) = self.layout {
                    simd::pack_x(layout, self.format, row(index), &[], &mut words);
                }
                (words, is_special(self.format, row(index)))
            })
            .unzip();
        PreparedStretch { stretch: x, words, special }
    }

    /// Chains on: `c` is row-major, `[x.rows, w.rows]`.
    ///
    /// # Panics
    /// If `c` has not that size or the stretches have not one length: a bug of the
    /// caller.
    pub fn accumulate(&self, x: &PreparedStretch<'_>, w: &Stretch<'_>, c: &mut [f32]) {
        let (rows, width) = (x.stretch.rows.len(), w.rows.len());
        assert!(
            c.len() == rows * width && x.stretch.inner.len() == w.inner.len(),
            "accumulators and stretches fit the product"
        );
        let Some(layout) = self.layout else {
            for row in 0..rows {
                for column in 0..width {
                    self.plain(x, w, row, column, &mut c[row * width + column]);
                }
            }
            return;
        };
        let lanes = self.kernel.lanes();
        let mut words = Words::default();
        let mut sums = [0.0f32; GROUP * 16];
        for first in (0..width).step_by(lanes) {
            let count = lanes.min(width - first);
            let panel: Vec<CodesRow> =
                (first..first + count).map(|row| w.codes.row(w.rows.start + row)).collect();
            let special =
                panel.iter().any(|row| is_special(self.format, row.slice(w.inner.clone())));
            simd::pack_w(
                self.kernel,
                layout,
                self.format,
                &panel,
                &[],
                w.inner.clone(),
                &mut words,
            );
            for group in (0..rows).step_by(GROUP) {
                let at_once = GROUP.min(rows - group);
                let mut left: [&[u32]; GROUP] = [&[]; GROUP];
                for (left, own) in left.iter_mut().zip(&x.words[group..group + at_once]) {
                    *left = &own.as_slice()[..layout.words(w.inner.len())];
                }
                let sums = &mut sums[..at_once * lanes];
                sums.fill(0.0);
                for (row, sums) in sums.chunks_exact_mut(lanes).enumerate() {
                    let start = (group + row) * width + first;
                    sums[..count].copy_from_slice(&c[start..start + count]);
                }
                let usable =
                    simd::chain(self.kernel, layout, &left[..at_once], words.as_slice(), sums);
                for (row, sums) in sums.chunks_exact(lanes).enumerate() {
                    let start = (group + row) * width + first;
                    if usable[row] && !special && !x.special[group + row] {
                        c[start..start + count].copy_from_slice(&sums[..count]);
                    } else {
                        for column in 0..count {
                            let c = &mut c[start + column];
                            self.plain(x, w, group + row, first + column, c);
                        }
                    }
                }
            }
        }
    }

    /// One output by the definition.
    fn plain(
        &self,
        x: &PreparedStretch<'_>,
        w: &Stretch<'_>,
        row: usize,
        column: usize,
        c: &mut f32,
    ) {
        let x_row = x.stretch.codes.row(x.stretch.rows.start + row).slice(x.stretch.inner.clone());
        let w_row = w.codes.row(w.rows.start + column).slice(w.inner.clone());
        match self.unit {
            Unit::TensorCore(core) => {
                let parts = |row: CodesRow| -> Vec<Parts> {
                    row.iter().map(|code| self.format.parts(code)).collect()
                };
                let fraction_bits = 2 * self.format.fraction_bits();
                *c = tensor_core::chain(&core, fraction_bits, &parts(x_row), &parts(w_row), *c);
            }
            Unit::MatrixCore(core) => {
                let parts = |row: CodesRow| -> Vec<Parts> {
                    row.iter().map(|code| self.format.parts(code)).collect()
                };
                let values = |row: CodesRow| -> Vec<f32> {
                    row.iter().map(|code| self.format.decode(code)).collect()
                };
                let (x_parts, w_parts) = (parts(x_row), parts(w_row));
                let (x_values, w_values) = (values(x_row), values(w_row));
                let format = self.format;
                let x = matrix_core::Stretch { parts: &x_parts, values: &x_values, format };
                let w = matrix_core::Stretch { parts: &w_parts, values: &w_values, format };
                *c = matrix_core::chain(&core, x, w, *c);
            }
            // A chain's operands have no scales of blocks and are no integers, so no unit for those
            // makes one.
            Unit::BlockScaled(_) | Unit::Integers | Unit::SequentialFma => {
                *c = x_row
                    .iter()
                    .zip(w_row.iter())
                    .fold(*c, |c, (x, w)| self.format.decode(x).mul_add(self.format.decode(w), c));
            }
        }
    }
}

/// Whether a NaN or an infinity stands in the row: vectors do not handle those.
fn is_special(format: Format, row: CodesRow<'_>) -> bool {
    row.iter().any(|code| !format.decode(code).is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::emulated::chip::chip;
    use crate::compute::emulated::gemm::{Operand, Scales, gemm};
    use crate::compute::emulated::schedule::Schedule;
    use crate::op::ChipName;

    fn codes(rows: usize, width: usize, seed: u32) -> Codes {
        let mut state = seed;
        let values: Vec<f32> = (0..rows * width)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        Codes::quantize(Format::Bf16, width, &values, 1.0).expect("whole rows")
    }

    #[test]
    fn a_chain_in_two_stretches_is_the_chain_of_a_gemm_with_every_instruction_set() {
        let unit = chip(ChipName::Hopper).unit(Format::Bf16, Format::Bf16).expect("hopper bf16");
        let (x, w) = (codes(7, 104, 1), codes(37, 104, 2));
        let operand = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
        let whole = gemm(unit, &Schedule::FAST, &operand(&x), &operand(&w), Format::F32)
            .expect("a product");
        for kernel in Kernel::available() {
            let chain = Chain::with_kernel(kernel, unit, Format::Bf16);
            let mut c = vec![0.0; 7 * 37];
            for inner in [0..64, 64..104] {
                let x = chain.prepare(Stretch { codes: &x, rows: 0..7, inner: inner.clone() });
                chain.accumulate(&x, &Stretch { codes: &w, rows: 0..37, inner }, &mut c);
            }
            assert_eq!(c, whole.data(), "{}", kernel.name());
        }
    }
}
