//! All dot products of the rows of two operands, over a fixed number of lanes.
//!
//! Element `k` of a row goes to lane `k % N`, in ascending order, and the lanes are added in an
//! order that the caller gives. So the sums do not depend on threads, and of exact products not
//! on the instruction set. It knows rows of numbers, no tensors.
//!
//! A tile of rows of both operands is held in registers: each vector that is loaded meets several
//! others. How large a tile is depends on the registers of the instruction set.

use std::ops::Range;

use pulp::{Arch, NullaryFnOnce};
#[cfg(target_arch = "x86_64")]
use pulp::{
    cast, f32x8, f32x16, f64x4, f64x8,
    x86::{V3, V4},
};

/// Vectors of a row that are multiplied before the next stretch of them: six rows of x and four
/// of w take 40 KiB of the caches that are nearest.
const STRETCH: usize = 64;

/// Vectors of `N` values side by side, as an instruction set holds them.
trait Lanes<T, const N: usize>: Copy {
    /// The registers of one vector.
    type Vector: Copy;
    /// Whether 24 sums and what is added to them fit into the registers.
    const IS_WIDE: bool;
    /// The values, loaded.
    fn load(self, values: &[T; N]) -> Self::Vector;
    /// `a b + sum`; fused where the instruction set can, which an exact product does not show.
    fn add_product(self, a: Self::Vector, b: Self::Vector, sum: Self::Vector) -> Self::Vector;
    /// The values, stored.
    fn store(self, vector: Self::Vector) -> [T; N];
}

/// No vectors but those that the compiler makes.
#[derive(Clone, Copy)]
struct Plain;

macro_rules! plain_lanes {
    ($value:ty, $count:literal) => {
        impl Lanes<$value, $count> for Plain {
            type Vector = [$value; $count];
            const IS_WIDE: bool = false;

            #[inline(always)]
            fn load(self, values: &[$value; $count]) -> Self::Vector {
                *values
            }

            #[inline(always)]
            fn add_product(
                self,
                a: Self::Vector,
                b: Self::Vector,
                sum: Self::Vector,
            ) -> Self::Vector {
                std::array::from_fn(|lane| a[lane] * b[lane] + sum[lane])
            }

            #[inline(always)]
            fn store(self, vector: Self::Vector) -> [$value; $count] {
                vector
            }
        }
    };
}

plain_lanes!(f64, 8);
plain_lanes!(f32, 16);

#[cfg(target_arch = "x86_64")]
macro_rules! avx512_lanes {
    ($value:ty, $count:literal, $vector:ty, $fused:ident) => {
        impl Lanes<$value, $count> for V4 {
            type Vector = $vector;
            const IS_WIDE: bool = true;

            #[inline(always)]
            fn load(self, values: &[$value; $count]) -> $vector {
                cast(*values)
            }

            #[inline(always)]
            fn add_product(self, a: $vector, b: $vector, sum: $vector) -> $vector {
                self.$fused(a, b, sum)
            }

            #[inline(always)]
            fn store(self, vector: $vector) -> [$value; $count] {
                cast(vector)
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
avx512_lanes!(f64, 8, f64x8, mul_add_f64x8);
#[cfg(target_arch = "x86_64")]
avx512_lanes!(f32, 16, f32x16, mul_add_f32x16);

#[cfg(target_arch = "x86_64")]
macro_rules! avx2_lanes {
    ($value:ty, $count:literal, $half:ty, $fused:ident) => {
        impl Lanes<$value, $count> for V3 {
            type Vector = [$half; 2];
            const IS_WIDE: bool = false;

            #[inline(always)]
            fn load(self, values: &[$value; $count]) -> Self::Vector {
                cast(*values)
            }

            #[inline(always)]
            fn add_product(
                self,
                a: Self::Vector,
                b: Self::Vector,
                sum: Self::Vector,
            ) -> Self::Vector {
                [self.$fused(a[0], b[0], sum[0]), self.$fused(a[1], b[1], sum[1])]
            }

            #[inline(always)]
            fn store(self, vector: Self::Vector) -> [$value; $count] {
                cast(vector)
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
avx2_lanes!(f64, 8, f64x4, mul_add_f64x4);
#[cfg(target_arch = "x86_64")]
avx2_lanes!(f32, 16, f32x8, mul_add_f32x8);

/// A number whose rows can be multiplied here.
pub(super) trait Number<const N: usize>: Copy + Default {
    /// The lanes' sum, in the order that belongs to the number.
    fn folded(lanes: [Self; N]) -> Self;
    /// A sum and the products of what fills no whole vector.
    fn with_rest(sum: Self, x: &[Self], w: &[Self]) -> Self;
    /// Does the work with the widest vectors of this machine.
    fn dispatch(work: Dots<'_, Self>);
}

macro_rules! dispatched {
    () => {
        fn dispatch(work: Dots<'_, Self>) {
            match Arch::new() {
                #[cfg(target_arch = "x86_64")]
                Arch::V4(arch) => arch.vectorize(With { lanes: arch, work }),
                #[cfg(target_arch = "x86_64")]
                Arch::V3(arch) => arch.vectorize(With { lanes: arch, work }),
                _ => work.fill(Plain),
            }
        }
    };
}

/// Dot products in f64 of rows that are padded to whole vectors.
impl Number<8> for f64 {
    #[inline(always)]
    fn folded(lanes: [f64; 8]) -> f64 {
        let halves: [f64; 4] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 4]);
        (halves[0] + halves[2]) + (halves[1] + halves[3])
    }

    #[inline(always)]
    fn with_rest(sum: f64, x: &[f64], w: &[f64]) -> f64 {
        debug_assert!(x.is_empty() && w.is_empty(), "padded rows have no rest");
        sum
    }

    dispatched!();
}

/// Dot products in f32 of positive values: nothing cancels, so they are right to some 1e-6
/// whatever the order.
impl Number<16> for f32 {
    #[inline(always)]
    fn folded(lanes: [f32; 16]) -> f32 {
        lanes.iter().sum::<f32>()
    }

    #[inline(always)]
    fn with_rest(sum: f32, x: &[f32], w: &[f32]) -> f32 {
        let rest: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
        sum + rest
    }

    dispatched!();
}

/// Both operands, rows of `width` values, and where the products go: `[x rows, w rows]`.
pub(super) struct Dots<'a, T> {
    x: &'a [T],
    w: &'a [T],
    width: usize,
    dots: &'a mut [T],
}

/// All dot products of the rows of two operands of `width` values a row: `[x rows, w rows]`.
pub(super) fn dots<T: Number<N>, const N: usize>(x: &[T], w: &[T], width: usize) -> Vec<T> {
    if width == 0 {
        return Vec::new();
    }
    let mut dots = vec![T::default(); (x.len() / width) * (w.len() / width)];
    T::dispatch(Dots { x, w, width, dots: &mut dots });
    dots
}

/// The work with its instruction set, to be compiled for it.
struct With<'a, T, L, const N: usize> {
    lanes: L,
    work: Dots<'a, T>,
}

impl<T: Number<N>, L: Lanes<T, N>, const N: usize> NullaryFnOnce for With<'_, T, L, N> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.work.fill(self.lanes);
    }
}

impl<T> Dots<'_, T> {
    #[inline(always)]
    fn fill<const N: usize, L: Lanes<T, N>>(mut self, lanes: L)
    where
        T: Number<N>,
    {
        let rows = self.x.len() / self.width;
        let mut kept = Vec::new();
        let mut first = 0;
        while first < rows {
            first += match (rows - first, L::IS_WIDE) {
                (6.., true) => self.sweep::<6, N, L>(lanes, first, &mut kept),
                (4.., true) => self.sweep::<4, N, L>(lanes, first, &mut kept),
                (3.., false) => self.sweep::<3, N, L>(lanes, first, &mut kept),
                (2.., _) => self.sweep::<2, N, L>(lanes, first, &mut kept),
                _ => self.sweep::<1, N, L>(lanes, first, &mut kept),
            };
        }
    }

    /// `X` rows of x meet all of w, a stretch of their vectors after the other: as many of x as
    /// stay in the first-level cache while all rows of w pass by. Between two stretches the lanes'
    /// sums stand in `kept`.
    #[inline(always)]
    fn sweep<const X: usize, const N: usize, L: Lanes<T, N>>(
        &mut self,
        lanes: L,
        first: usize,
        kept: &mut Vec<[T; N]>,
    ) -> usize
    where
        T: Number<N>,
    {
        let rows = self.w.len() / self.width;
        let vectors = self.width / N;
        // One row of x is read once, whatever stays where.
        let stretches = if X == 1 { 1 } else { vectors.div_ceil(STRETCH).max(1) };
        let step = vectors.div_ceil(stretches).max(1);
        kept.clear();
        kept.resize(rows * X, [T::default(); N]);
        for stretch in 0..stretches {
            let span = (stretch * step).min(vectors)..((stretch + 1) * step).min(vectors);
            let mut row = 0;
            while row < rows {
                let kept = &mut kept[row * X..];
                row += match (rows - row, L::IS_WIDE) {
                    (4.., true) => self.tile::<X, 4, N, L>(lanes, (first, row), &span, kept),
                    (2.., _) => self.tile::<X, 2, N, L>(lanes, (first, row), &span, kept),
                    _ => self.tile::<X, 1, N, L>(lanes, (first, row), &span, kept),
                };
            }
        }
        let (width, whole) = (self.width, vectors * N);
        for (row, kept) in kept.chunks_exact(X).enumerate() {
            let w = &self.w[row * width + whole..(row + 1) * width];
            for (place, lanes) in kept.iter().enumerate() {
                let x = &self.x[(first + place) * width + whole..(first + place + 1) * width];
                let dot = T::with_rest(T::folded(*lanes), x, w);
                self.dots[(first + place) * rows + row] = dot;
            }
        }
        X
    }

    /// Adds to what is kept of `X` rows of x by `W` rows of w the products of a span of vectors.
    #[inline(always)]
    fn tile<const X: usize, const W: usize, const N: usize, L: Lanes<T, N>>(
        &self,
        lanes: L,
        (first, row): (usize, usize),
        span: &Range<usize>,
        kept: &mut [[T; N]],
    ) -> usize
    where
        T: Number<N>,
    {
        let width = self.width;
        // Loops: what a closure does here is not compiled into the tile.
        let mut x: [&[[T; N]]; X] = [&[]; X];
        let mut w: [&[[T; N]]; W] = [&[]; W];
        for (at, x) in x.iter_mut().enumerate() {
            *x = span_of(self.x, width, first + at, span);
        }
        for (at, w) in w.iter_mut().enumerate() {
            *w = span_of(self.w, width, row + at, span);
        }
        let mut sums: [[L::Vector; X]; W] = std::array::from_fn(|row| {
            std::array::from_fn(|place| lanes.load(&kept[row * X + place]))
        });
        for at in 0..span.len() {
            let x: [L::Vector; X] = std::array::from_fn(|row| lanes.load(&x[row][at]));
            for (w, sums) in w.iter().zip(&mut sums) {
                let w = lanes.load(&w[at]);
                for (x, sum) in x.iter().zip(sums) {
                    *sum = lanes.add_product(*x, w, *sum);
                }
            }
        }
        for (sums, kept) in sums.into_iter().zip(kept.chunks_exact_mut(X)) {
            for (sum, kept) in sums.into_iter().zip(kept) {
                *kept = lanes.store(sum);
            }
        }
        W
    }
}

/// A span of a row's vectors, whose length is the span's.
#[inline(always)]
fn span_of<'a, T, const N: usize>(
    data: &'a [T],
    width: usize,
    row: usize,
    span: &Range<usize>,
) -> &'a [[T; N]] {
    let row = data[row * width..][..width].as_chunks::<N>().0;
    &row[span.start..][..span.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, without tiles.
    fn plainly(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
        let row = |x: &[f64], w: &[f64]| {
            let mut lanes = [0.0f64; 8];
            x.iter().zip(w).enumerate().for_each(|(k, (x, w))| lanes[k % 8] += x * w);
            let [a, b, c, d, e, f, g, h] = lanes;
            ((a + e) + (c + g)) + ((b + f) + (d + h))
        };
        x.chunks(width).flat_map(|x| w.chunks(width).map(move |w| row(x, w))).collect()
    }

    proptest! {
        #[test]
        fn tiles_of_any_size_sum_in_the_fixed_order(
            x_rows in 1usize..15, w_rows in 1usize..11, vectors in 1usize..130, seed: u64,
        ) {
            let width = 8 * vectors;
            let mut state = seed;
            let mut value = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // A product of two is exact in f64.
                f64::from(f32::from_bits((state >> 40) as u32 | 0x3f00_0000) - 0.7)
            };
            let x: Vec<f64> = (0..x_rows * width).map(|_| value()).collect();
            let w: Vec<f64> = (0..w_rows * width).map(|_| value()).collect();
            let bits = |dots: Vec<f64>| dots.into_iter().map(f64::to_bits).collect::<Vec<_>>();
            prop_assert_eq!(bits(dots(&x, &w, width)), bits(plainly(&x, &w, width)));
            #[cfg(target_arch = "x86_64")]
            if let Some(arch) = V3::try_new() {
                let mut some = vec![0.0; x_rows * w_rows];
                let work = Dots { x: &x, w: &w, width, dots: &mut some };
                arch.vectorize(With { lanes: arch, work });
                prop_assert_eq!(bits(some), bits(plainly(&x, &w, width)));
            }
            let mut some = vec![0.0; x_rows * w_rows];
            Dots { x: &x, w: &w, width, dots: &mut some }.fill(Plain);
            prop_assert_eq!(bits(some), bits(plainly(&x, &w, width)));
        }
    }
}
