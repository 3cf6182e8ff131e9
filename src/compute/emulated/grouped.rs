//! The chain of a block-scaled unit whose addends are exact sums of a group of products, in vectors,
//! bit for bit what `tensor_core.rs` defines.
//!
//! It knows rows of x and panels of rows of w in vector order; schedules and the scale of a whole operand
//! are `gemm.rs`'s business. Lanes are outputs: 16 rows of w meet one row of x.
//!
//! Elements of FP4 are multiples of 1/2 up to 6, so the sum of 16 products is exact in f32, in any
//! order. Times the two scales it is exact in f64, and so is everything up to the result: an addend has
//! at most 46 bits at its place, and five of them are added. The plain code computes what leaves f32's
//! normal range.

use std::ops::Range;

use super::chip::BlockScaled;
use super::quantize::{BlockScales, CodesRow};
use crate::dtype::Format;
use crate::vector::{Kernel, dispatch};

/// Outputs that are computed side by side.
pub(super) const LANES: usize = 16;
/// Groups that one instruction adds: 64 products in groups of 16.
const GROUPS: usize = 4;
/// Products of a group.
const GROUP: usize = 16;
/// An exponent below all others.
const NONE: i32 = -4096;

/// Whether this file computes what the unit does.
pub(super) fn computes(unit: &BlockScaled) -> bool {
    unit.group == GROUP && unit.core.products == GROUP * GROUPS && unit.core.result_bits == 23
}

/// Rows in vector order: `lanes` of them side by side, filled up with zeros to whole instructions.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// For each element of K the values of all lanes.
    values: Vec<f32>,
    /// For each group of K the scales of all lanes.
    factors: Vec<f64>,
    /// The scales' exponents; of a scale of zero [`NONE`].
    exponents: Vec<i32>,
    /// Bits of the elements that are not zero.
    nonzero: Vec<u32>,
}

impl Rows {
    /// Some rows' stretch of K, which begins at a whole block.
    pub fn pack(
        lanes: usize,
        format: Format,
        rows: &[(CodesRow<'_>, usize)],
        scales: &BlockScales,
        inner: Range<usize>,
    ) -> Rows {
        let groups = inner.len().div_ceil(GROUP * GROUPS) * GROUPS;
        let mut packed = Rows {
            values: vec![0.0; groups * GROUP * lanes],
            factors: vec![0.0; groups * lanes],
            exponents: vec![NONE; groups * lanes],
            nonzero: vec![0; groups * lanes],
        };
        let table: [f32; 16] = std::array::from_fn(|code| format.decode(code as u32));
        let (codec, block) = (scales.format.scales(), scales.format.block());
        for (lane, (codes, row)) in rows.iter().enumerate() {
            let CodesRow::Bits8(codes) = codes.slice(inner.clone()) else { continue };
            for (value, &code) in packed.values[lane..].iter_mut().step_by(lanes).zip(codes) {
                *value = table[usize::from(code & 0xf)];
            }
            let of_row = scales.of_row(*row);
            for group in 0..inner.len().div_ceil(GROUP) {
                let code = of_row[(inner.start + group * GROUP) / block];
                let (significand, exponent) = codec.parts(code);
                packed.factors[group * lanes + lane] = f64::from(codec.decode(code));
                if significand != 0 {
                    packed.exponents[group * lanes + lane] = exponent;
                }
            }
            for (at, code) in codes.iter().enumerate() {
                let is_number = u32::from(code & 0x7 != 0);
                packed.nonzero[at / GROUP * lanes + lane] |= is_number << (at % GROUP);
            }
        }
        packed
    }
}

/// Chains a stretch of K of one row of x and [`LANES`] rows of w from the accumulators `c` on; false where
/// an accumulator left the normal range of f32: then `c` is of no use.
pub(super) fn chain(unit: &BlockScaled, x: &Rows, w: &Rows, c: &mut [f32; LANES]) -> bool {
    dispatch(Chain {
        bits: unit.core.alignment_bits as i32,
        floor: unit.core.exponent_floor,
        x,
        w,
        c,
    })
}

struct Chain<'a> {
    bits: i32,
    floor: i32,
    x: &'a Rows,
    w: &'a Rows,
    c: &'a mut [f32; LANES],
}

impl Kernel for Chain<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> bool {
        let Chain { bits, floor, x, w, c } = self;
        let mut usable = true;
        let steps = x.factors.len() / GROUPS;
        for step in 0..steps {
            let groups = step * GROUPS..(step + 1) * GROUPS;
            let mut sums = [[0.0f32; LANES]; GROUPS];
            for (sum, group) in sums.iter_mut().zip(groups.clone()) {
                let x = &x.values[group * GROUP..][..GROUP];
                let w = &w.values[group * GROUP * LANES..][..GROUP * LANES];
                for (x, w) in x.iter().zip(w.as_chunks::<LANES>().0) {
                    for (sum, w) in sum.iter_mut().zip(w) {
                        // Exact either way.
                        *sum = if FMA { x.mul_add(*w, *sum) } else { *sum + x * w };
                    }
                }
            }
            let mut largest = [floor; LANES];
            for (largest, c) in largest.iter_mut().zip(c.iter()) {
                let field = (c.to_bits() >> 23 & 0xff) as i32;
                let own = if *c == 0.0 { NONE } else { field.max(1) - 127 };
                *largest = (*largest).max(own);
            }
            for group in groups.clone() {
                let (of_x, bits_of_x) = (x.exponents[group], x.nonzero[group]);
                let of_w = &w.exponents[group * LANES..][..LANES];
                let bits_of_w = &w.nonzero[group * LANES..][..LANES];
                for lane in 0..LANES {
                    let is_zero = bits_of_x & bits_of_w[lane] == 0;
                    let own = if is_zero { NONE } else { of_x + of_w[lane] };
                    largest[lane] = largest[lane].max(own);
                }
            }
            let mut up = [0.0f64; LANES];
            let mut down = [0.0f64; LANES];
            for lane in 0..LANES {
                up[lane] = f64::from_bits(((1023 + bits - largest[lane]) as u64) << 52);
                down[lane] = f64::from_bits(((1023 - bits + largest[lane]) as u64) << 52);
            }
            let mut total = [0.0f64; LANES];
            for lane in 0..LANES {
                total[lane] = (f64::from(c[lane]) * up[lane]).trunc();
            }
            for (sum, group) in sums.iter().zip(groups) {
                let of_x = x.factors[group];
                let of_w = &w.factors[group * LANES..][..LANES];
                for lane in 0..LANES {
                    let addend = f64::from(sum[lane]) * (of_x * of_w[lane]);
                    total[lane] += (addend * up[lane]).trunc();
                }
            }
            for lane in 0..LANES {
                let exact = total[lane] * down[lane];
                // 24 bits of its magnitude: what f32 holds within its normal range.
                let cut = f64::from_bits(exact.to_bits() & !((1 << 29) - 1));
                let magnitude = cut.abs();
                let normal =
                    magnitude >= f64::from(f32::MIN_POSITIVE) && magnitude < f64::powi(2.0, 128);
                usable &= normal | (total[lane] == 0.0);
                // A sum of zero is +0.
                c[lane] = cut as f32 + 0.0;
            }
        }
        usable
    }
}
