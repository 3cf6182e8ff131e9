//! The tensor core's chain on AVX2 and AVX-512, bit for bit what
//! `tensor_core.rs` defines, and the f32 chain likewise.
//!
//! It knows decoded operands in vector order and one stretch of K; schedules,
//! scales and special values are `gemm.rs`'s business. This is the one file of
//! this room that may hold `unsafe`: calls that a run-time check of the
//! processor allows, and vector loads from slices whose length is checked.
//!
//! Lanes are outputs: 16 rows of w (AVX-512) or 8 (AVX2) meet one row of x, so
//! nothing is ever added across lanes. A block takes two passes: find the
//! largest exponent; then align, cut and add.
//!
//! *Narrow* (FP8 with F = R = 13). A product's magnitude, shifted to 14 fraction
//! bits, fills an unsigned 16-bit lane, and cutting it is a logical shift by
//! `s + 1`, where `s` is the product's distance to the largest exponent. On
//! AVX-512 that is a funnel shift left by `15 - s` with zeros above: a saturating
//! byte subtraction yields this count, clamped, for 64 products at once. On AVX2
//! it is the high half of a multiplication with `2^(15 - s)`, which two byte
//! shuffles look up. The sign is the other factor of the multiply-add that
//! widens to 32 bits.
//!
//! *Wide* (all else, R = 23). One 32-bit lane per product. `vpmaddwd` of
//! `(significand, sign)` pairs makes `2 P + 1` or `-(2 P + 1)`, which is the
//! complement of `2 P`: so an arithmetic shift right cuts the *magnitude* of
//! either and leaves `cut` or `-cut - 1`. Counting the sign bits that differ
//! gives the ones back. Sums of 16 products fit in 32 bits; a block of 32 keeps
//! two sums. The accumulator joins in f64, where all of this is exact.
//!
//! *Integers* (int8). AVX-512 multiplies four bytes of w, made unsigned by adding 128, by four of x and
//! adds all to 32 bits (`vpdpbusd`); what the 128 adds is taken away row by row of x. AVX2 multiplies
//! pairs that were widened to 16 bits (`vpmaddwd`). All sums are exact modulo 2^32.

#![cfg_attr(
    not(target_arch = "x86_64"),
    expect(
        dead_code,
        unused_assignments,
        unused_mut,
        unused_variables,
        reason = "other processors have the plain kernel only"
    )
)]

use super::chip::{BlockScaled, TensorCore, Unit};
use super::quantize::CodesRow;
use crate::dtype::Format;

/// An instruction set of this processor. Values exist only for what was
/// detected, which is what makes the calls below sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// The definition itself, without vectors.
    pub const PLAIN: Kernel = Kernel(Level::Plain);

    /// All that this processor can run, the plain one first.
    pub fn available() -> Vec<Kernel> {
        let mut kernels = vec![Kernel::PLAIN];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 {
                kernels.push(Kernel(Level::Avx2));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vbmi2")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512vpopcntdq")
            {
                kernels.push(Kernel(Level::Avx512));
            }
        }
        kernels
    }

    /// The fastest that this processor can run.
    pub fn best() -> Kernel {
        static BEST: std::sync::OnceLock<Kernel> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Kernel::available().pop().unwrap_or(Kernel::PLAIN))
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Plain => "plain",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// Outputs that share a vector; one where there are no vectors.
    pub(super) fn lanes(self) -> usize {
        match self.0 {
            Level::Plain => 1,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => 8,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => 16,
        }
    }
}

/// How operands are laid out for the vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// 16-bit lanes; per four products five words: exponents, two of
    /// magnitudes, two of signs.
    Narrow {
        /// Products per block, 16 or 32.
        products: usize,
    },
    /// 32-bit lanes; per two products three words (exponents, two of
    /// significands with signs), and per block one of sign bits.
    Wide {
        /// The unit.
        core: TensorCore,
    },
    /// f32 values.
    Fma,
}

impl Layout {
    /// The layout for a unit; none if only plain code computes it.
    pub(super) fn of(unit: &Unit, kernel: Kernel, format: Format) -> Option<Layout> {
        if kernel == Kernel::PLAIN {
            return None;
        }
        match unit {
            Unit::SequentialFma => Some(Layout::Fma),
            Unit::BlockScaled(BlockScaled { core, group: 1 }) => Some(Layout::Wide { core: *core }),
            // `grouped.rs` has vectors of its own.
            Unit::BlockScaled(_) | Unit::MatrixCore(_) => None,
            // Sums of integers are no f32 ones: `integer_sums`.
            Unit::Integers => None,
            Unit::TensorCore(TensorCore {
                products: products @ (16 | 32),
                alignment_bits: 13,
                result_bits: 13,
                ..
            }) if format.is_fp8() => Some(Layout::Narrow { products: *products }),
            Unit::TensorCore(
                core @ TensorCore {
                    products: 4 | 8 | 16 | 32,
                    alignment_bits: 22..=25,
                    result_bits: 23,
                    ..
                },
            ) => Some(Layout::Wide { core: *core }),
            Unit::TensorCore(_) => None,
        }
    }

    /// Products that are added at once.
    fn products(self) -> usize {
        match self {
            Layout::Narrow { products } => products,
            Layout::Wide { core } => core.products,
            Layout::Fma => 1,
        }
    }

    /// Words of one lane for one block.
    fn block_words(self) -> usize {
        match self {
            Layout::Narrow { products } => products / 4 * 5,
            Layout::Wide { core } => core.products / 2 * 3 + 1,
            Layout::Fma => 1,
        }
    }

    /// Rows of x that are chained in one loop.
    fn rows_at_once(self) -> usize {
        match self {
            Layout::Narrow { .. } => 2,
            Layout::Wide { .. } => 2,
            Layout::Fma => GROUP,
        }
    }

    /// Words of one lane for `inner` elements of K.
    pub(super) fn words(self, inner: usize) -> usize {
        inner.div_ceil(self.products()) * self.block_words()
    }
}

/// Words on cache-line boundaries.
#[derive(Clone, Debug, Default)]
pub(super) struct Words {
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u32; 16]);

impl Words {
    /// At least `count` words, of any content.
    pub(super) fn resize(&mut self, count: usize) {
        self.lines.resize(count.div_ceil(16), Line([0; 16]));
    }

    pub(super) fn as_slice(&self) -> &[u32] {
        // SAFETY: a `Line` is 16 `u32`s without padding, and the lines are contiguous.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 16) }
    }

    fn as_mut_slice(&mut self) -> &mut [u32] {
        let words = self.lines.len() * 16;
        // SAFETY: as in `as_slice`; the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), words) }
    }
}

/// What the scales of a row's blocks add to the exponents of its elements, one for each block of the
/// unit, from the row's first on; empty where there are none.
pub(super) type Raised<'a> = &'a [i16];

/// A row of x in vector order: what is broadcast to all lanes.
pub(super) fn pack_x(
    layout: Layout,
    format: Format,
    row: CodesRow,
    raised: Raised<'_>,
    words: &mut Words,
) {
    words.resize(layout.words(row.len()));
    match layout {
        Layout::Narrow { products } => {
            pack_narrow::<1>(format, &[row], 0..row.len(), products, words.as_mut_slice());
            // x's signs flip those of w: `1 ^ 0xfffe` is -1 and the reverse.
            for quad in words.as_mut_slice().chunks_exact_mut(5) {
                for sign in &mut quad[3..] {
                    *sign &= 0xfffe_fffe;
                }
            }
        }
        Layout::Wide { core } => {
            let words = words.as_mut_slice();
            pack_wide::<1>(format, &[row], &[raised], 0..row.len(), &core, Side::X, words);
        }
        Layout::Fma => {
            for (word, code) in words.as_mut_slice().iter_mut().zip(row.iter()) {
                *word = code;
            }
        }
    }
}

/// A stretch of K of up to `kernel.lanes()` rows of w in vector order.
pub(super) fn pack_w(
    kernel: Kernel,
    layout: Layout,
    format: Format,
    rows: &[CodesRow],
    raised: &[Raised<'_>],
    inner: std::ops::Range<usize>,
    words: &mut Words,
) {
    words.resize(layout.words(inner.len()) * kernel.lanes());
    match kernel.0 {
        Level::Plain => {}
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a kernel of this level exists only where the features were detected.
        Level::Avx2 => unsafe { x86::pack_w_avx2(layout, format, rows, raised, inner, words) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx512 => unsafe { x86::pack_w_avx512(layout, format, rows, raised, inner, words) },
    }
}

#[inline(always)]
fn pack_w_lanes<const LANES: usize>(
    layout: Layout,
    format: Format,
    rows: &[CodesRow],
    raised: &[Raised<'_>],
    inner: std::ops::Range<usize>,
    words: &mut Words,
) {
    let words = words.as_mut_slice();
    match layout {
        Layout::Narrow { products } => {
            pack_narrow::<LANES>(format, rows, inner, products, words);
        }
        Layout::Wide { core } => {
            pack_wide::<LANES>(format, rows, raised, inner, &core, Side::W, words);
        }
        Layout::Fma => {
            for (words, k) in words.as_chunks_mut::<LANES>().0.iter_mut().zip(inner) {
                *words = column::<LANES>(rows, |row| row.get(k));
            }
        }
    }
}

/// One word of every row; zeros where there are fewer rows than lanes.
#[inline(always)]
fn column<const LANES: usize>(rows: &[CodesRow], word: impl Fn(&CodesRow) -> u32) -> [u32; LANES] {
    let mut column = [0; LANES];
    for (lane, row) in column.iter_mut().zip(rows) {
        *lane = word(row);
    }
    column
}

/// Codes that fill a word: two of 16 bits or four of 8.
trait Code: Copy + Default {
    /// `LANES` words of codes from `k` on, the first in the low bits.
    fn words<const LANES: usize>(rows: &[&[Self]; LANES], k: usize) -> [u32; LANES];
    /// Codes in a word.
    const PER_WORD: usize;
}

impl Code for u8 {
    const PER_WORD: usize = 4;

    #[inline(always)]
    fn words<const LANES: usize>(rows: &[&[u8]; LANES], k: usize) -> [u32; LANES] {
        let mut words = [0; LANES];
        for (word, row) in words.iter_mut().zip(rows) {
            if let Some(&codes) = row[k..].first_chunk() {
                *word = u32::from_le_bytes(codes);
            }
        }
        words
    }
}

impl Code for u16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn words<const LANES: usize>(rows: &[&[u16]; LANES], k: usize) -> [u32; LANES] {
        let mut words = [0; LANES];
        for (word, row) in words.iter_mut().zip(rows) {
            if let Some(&[low, high]) = row[k..].first_chunk() {
                *word = u32::from(low) | u32::from(high) << 16;
            }
        }
        words
    }
}

/// Word `index` of a stretch of K of every row; beyond the stretch's end lie zeros.
#[inline(always)]
fn words_at<C: Code, const LANES: usize>(rows: &[&[C]; LANES], index: usize) -> [u32; LANES] {
    let k = index * C::PER_WORD;
    if k + C::PER_WORD <= rows[0].len() {
        return C::words(rows, k);
    }
    let mut ends = [[C::default(); 4]; LANES];
    for (end, row) in ends.iter_mut().zip(rows) {
        let rest = row.get(k..).unwrap_or(&[]);
        end[..rest.len()].copy_from_slice(rest);
    }
    let mut slices: [&[C]; LANES] = [&[]; LANES];
    for (slice, end) in slices.iter_mut().zip(&ends) {
        *slice = end;
    }
    C::words(&slices, 0)
}

/// The stretch of every row of 8-bit codes; lanes without a row repeat the first,
/// and nobody reads what comes of them.
#[inline(always)]
fn slices8<'a, const LANES: usize>(
    rows: &[CodesRow<'a>],
    inner: &std::ops::Range<usize>,
) -> [&'a [u8]; LANES] {
    let slice = |row: Option<&CodesRow<'a>>| match row {
        Some(CodesRow::Bits8(codes)) => &codes[inner.clone()],
        _ => &[],
    };
    let mut slices = [slice(rows.first()); LANES];
    for (lane, row) in slices.iter_mut().zip(rows) {
        *lane = slice(Some(row));
    }
    slices
}

/// [`slices8`] of 16-bit codes.
#[inline(always)]
fn slices16<'a, const LANES: usize>(
    rows: &[CodesRow<'a>],
    inner: &std::ops::Range<usize>,
) -> [&'a [u16]; LANES] {
    let slice = |row: Option<&CodesRow<'a>>| match row {
        Some(CodesRow::Bits16(codes)) => &codes[inner.clone()],
        _ => &[],
    };
    let mut slices = [slice(rows.first()); LANES];
    for (lane, row) in slices.iter_mut().zip(rows) {
        *lane = slice(Some(row));
    }
    slices
}

/// The biased exponent of a narrow operand's zero is 0 and that of a nonzero
/// one is its exponent plus this: no sum with a zero in it reaches the smallest
/// exponent of a sum without, nor that of an accumulator.
const NARROW_BIAS: u32 = 79;

/// Writes, for each four elements of K, five vectors of `LANES` words. Bytes 0 to
/// 3 of a word are the four elements; the two vectors of 16-bit magnitudes and
/// signs hold elements 0 and 2, and 1 and 3.
#[inline(always)]
fn pack_narrow<const LANES: usize>(
    format: Format,
    rows: &[CodesRow],
    inner: std::ops::Range<usize>,
    products: usize,
    words: &mut [u32],
) {
    let fraction_bits = format.fraction_bits();
    // Four bytes side by side in a word; no operation carries from one into the next.
    let all = 0x0101_0101u32;
    let quads = inner.len().div_ceil(products) * products / 4;
    let rows = slices8::<LANES>(rows, &inner);
    for quad in 0..quads {
        let codes = words_at(&rows, quad);
        let vectors = &mut words[quad * 5 * LANES..(quad + 1) * 5 * LANES];
        let (exponents, rest) = vectors.split_at_mut(LANES);
        let (even_magnitudes, rest) = rest.split_at_mut(LANES);
        let (odd_magnitudes, rest) = rest.split_at_mut(LANES);
        let (even_signs, odd_signs) = rest.split_at_mut(LANES);
        for lane in 0..LANES {
            let code = codes[lane];
            let field_mask = (0x7f >> fraction_bits) * all;
            let field = code >> fraction_bits & field_mask;
            let normal = (field + 0x1f * all) >> 5 & all;
            let fraction = code & (((1 << fraction_bits) - 1) * all);
            let magnitude = fraction | normal << fraction_bits;
            let nonzero = (magnitude + 0xf * all) >> 4 & all;
            let min_exponent = (format.min_exponent() + NARROW_BIAS as i32 - 1) as u32;
            let exponent = field + (all - normal) + min_exponent * all;
            exponents[lane] = exponent & ((nonzero << 8).wrapping_sub(nonzero));
            let shifted = magnitude << (7 - fraction_bits);
            even_magnitudes[lane] = shifted & 0x00ff_00ff;
            odd_magnitudes[lane] = shifted >> 8 & 0x00ff_00ff;
            even_signs[lane] = 0x0001_0001 ^ ((code >> 7 & 0x0001_0001) * 0xfffe);
            odd_signs[lane] = 0x0001_0001 ^ ((code >> 15 & 0x0001_0001) * 0xfffe);
        }
    }
}

/// Which operand a wide layout is of: their significands are shifted by
/// different amounts, which add up to the unit's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    X,
    W,
}

/// The exponent of a wide operand's zero: far below all others.
const WIDE_ZERO_EXPONENT: i32 = -8000;

/// Writes, for each block, three vectors of `LANES` words per two elements of K
/// (two 16-bit exponents; the even and the odd element's shifted significand with
/// its sign above) and then one of sign bits.
#[inline(always)]
fn pack_wide<const LANES: usize>(
    format: Format,
    rows: &[CodesRow],
    raised: &[Raised<'_>],
    inner: std::ops::Range<usize>,
    core: &TensorCore,
    side: Side,
    words: &mut [u32],
) {
    match format {
        Format::Bf16 => pack_wide_as::<LANES, 8, 7>(format, rows, raised, inner, core, side, words),
        Format::F16 => pack_wide_as::<LANES, 5, 10>(format, rows, raised, inner, core, side, words),
        Format::Tf32 => {
            pack_wide_as::<LANES, 8, 10>(format, rows, raised, inner, core, side, words)
        }
        Format::E4m3 => pack_wide_as::<LANES, 4, 3>(format, rows, raised, inner, core, side, words),
        Format::E5m2 => pack_wide_as::<LANES, 5, 2>(format, rows, raised, inner, core, side, words),
        Format::E2m3 => pack_wide_as::<LANES, 2, 3>(format, rows, raised, inner, core, side, words),
        Format::E3m2 => pack_wide_as::<LANES, 3, 2>(format, rows, raised, inner, core, side, words),
        Format::E2m1 => pack_wide_as::<LANES, 2, 1>(format, rows, raised, inner, core, side, words),
        // No vector code multiplies them as floats.
        Format::F32 | Format::Int8 | Format::E4m3fnuz | Format::E5m2fnuz => {}
    }
}

#[inline(always)]
fn pack_wide_as<const LANES: usize, const EXPONENT_BITS: u32, const FRACTION_BITS: u32>(
    format: Format,
    rows: &[CodesRow],
    raised: &[Raised<'_>],
    inner: std::ops::Range<usize>,
    core: &TensorCore,
    side: Side,
    words: &mut [u32],
) {
    // x has 13 fraction bits, w the rest, and one more doubles the product.
    let shift = match side {
        Side::X => 13 - FRACTION_BITS,
        Side::W => core.alignment_bits + 1 - 13 - FRACTION_BITS,
    };
    let blocks = inner.len().div_ceil(core.products);
    let pairs_per_block = core.products / 2;
    let pairs = blocks * pairs_per_block;
    let mut packer = WidePacker::<LANES, EXPONENT_BITS, FRACTION_BITS> {
        shift,
        is_tf32: format == Format::Tf32,
        pairs_per_block,
        raised,
        first_block: inner.start / core.products,
        by: [0; LANES],
        words,
    };
    match rows.first() {
        Some(CodesRow::Bits8(_)) => {
            let rows = slices8::<LANES>(rows, &inner);
            for quad in 0..pairs / 2 {
                let codes = words_at(&rows, quad);
                packer.write(2 * quad, masked(&codes, 0, 0xff), masked(&codes, 8, 0xff));
                packer.write(2 * quad + 1, masked(&codes, 16, 0xff), masked(&codes, 24, 0xff));
            }
        }
        Some(CodesRow::Bits16(_)) => {
            let rows = slices16::<LANES>(rows, &inner);
            for pair in 0..pairs {
                let codes = words_at(&rows, pair);
                packer.write(pair, masked(&codes, 0, 0xffff), masked(&codes, 16, 0xffff));
            }
        }
        _ => {
            for pair in 0..pairs {
                let k = inner.start + 2 * pair;
                let mut codes = [[0; LANES]; 2];
                for (k, codes) in (k..inner.end).zip(&mut codes) {
                    *codes = column::<LANES>(rows, |row| row.get(k));
                }
                packer.write(pair, codes[0], codes[1]);
            }
        }
    }
}

#[inline(always)]
fn masked<const LANES: usize>(words: &[u32; LANES], shift: u32, mask: u32) -> [u32; LANES] {
    let mut masked = [0; LANES];
    for (masked, word) in masked.iter_mut().zip(words) {
        *masked = word >> shift & mask;
    }
    masked
}

/// Takes codes apart and puts them in their places.
struct WidePacker<'a, const LANES: usize, const EXPONENT_BITS: u32, const FRACTION_BITS: u32> {
    shift: u32,
    is_tf32: bool,
    pairs_per_block: usize,
    raised: &'a [Raised<'a>],
    /// The block of the row at which the stretch begins.
    first_block: usize,
    /// What the exponents of the block at hand are raised by.
    by: [u32; LANES],
    words: &'a mut [u32],
}

impl<const LANES: usize, const EXPONENT_BITS: u32, const FRACTION_BITS: u32>
    WidePacker<'_, LANES, EXPONENT_BITS, FRACTION_BITS>
{
    /// Writes elements `2 * pair` and `2 * pair + 1` of the stretch.
    #[inline(always)]
    fn write(&mut self, pair: usize, even: [u32; LANES], odd: [u32; LANES]) {
        let block_words = self.pairs_per_block * 3 + 1;
        let (block, pair) = (pair / self.pairs_per_block, pair % self.pairs_per_block);
        let vectors = &mut self.words[block * block_words * LANES..][..block_words * LANES];
        let (pairs, sign_bits) = vectors.split_at_mut((block_words - 1) * LANES);
        if pair == 0 {
            sign_bits.fill(0);
            for (by, raised) in self.by.iter_mut().zip(self.raised) {
                *by = raised.get(self.first_block + block).map_or(0, |by| *by as u32);
            }
        }
        let vectors = &mut pairs[pair * 3 * LANES..][..3 * LANES];
        let (exponents, rest) = vectors.split_at_mut(LANES);
        let (even_words, odd_words) = rest.split_at_mut(LANES);
        for lane in 0..LANES {
            let (even_word, even_exponent, even_negative) =
                take_apart::<EXPONENT_BITS, FRACTION_BITS>(even[lane], self.is_tf32, self.shift);
            let (odd_word, odd_exponent, odd_negative) =
                take_apart::<EXPONENT_BITS, FRACTION_BITS>(odd[lane], self.is_tf32, self.shift);
            even_words[lane] = even_word;
            odd_words[lane] = odd_word;
            let even_exponent = even_exponent.wrapping_add(self.by[lane]) & 0xffff;
            exponents[lane] = even_exponent | odd_exponent.wrapping_add(self.by[lane]) << 16;
            sign_bits[lane] |= (even_negative | odd_negative << 1) << (2 * pair);
        }
    }
}

/// A code's shifted significand with its sign, 1 or -1, above it; its 16-bit
/// exponent; and its sign bit.
#[inline(always)]
fn take_apart<const EXPONENT_BITS: u32, const FRACTION_BITS: u32>(
    code: u32,
    is_tf32: bool,
    shift: u32,
) -> (u32, u32, u32) {
    let code = if is_tf32 { code >> 13 } else { code };
    let field = code >> FRACTION_BITS & ((1 << EXPONENT_BITS) - 1);
    let normal = u32::from(field != 0);
    let magnitude = code & ((1 << FRACTION_BITS) - 1) | normal << FRACTION_BITS;
    let bias = (1 << (EXPONENT_BITS - 1)) - 1;
    let exponent = field.max(1) as i32 - bias;
    let exponent = if magnitude == 0 { WIDE_ZERO_EXPONENT } else { exponent };
    let negative = code >> (EXPONENT_BITS + FRACTION_BITS) & 1;
    let complement = negative.wrapping_neg();
    let significand = ((magnitude << shift) ^ complement).wrapping_sub(complement);
    (significand & 0xffff | (complement | 1) << 16, exponent as u32 & 0xffff, negative)
}

/// Rows of x that are chained side by side: each waits for its own accumulator,
/// so several are needed to keep the processor busy.
pub(super) const GROUP: usize = 4;

/// Chains a stretch of K for up to [`GROUP`] rows of x and `kernel.lanes()` rows
/// of w, from the accumulators `c` on: row by row of x, one per lane. `x` and `w`
/// hold the stretch's words only. Returns, for each row, false if an accumulator
/// left the range that vectors handle: then its `c` is of no use and plain code
/// must start over.
pub(super) fn chain(
    kernel: Kernel,
    layout: Layout,
    x: &[&[u32]],
    w: &[u32],
    c: &mut [f32],
) -> [bool; GROUP] {
    let words = x.first().map_or(0, |x| x.len());
    assert!(
        c.len() == kernel.lanes() * x.len()
            && x.iter().all(|x| x.len() == words)
            && words.is_multiple_of(layout.block_words())
            && w.len() >= words * kernel.lanes(),
        "operands are packed for this kernel"
    );
    let mut usable = [true; GROUP];
    match kernel.0 {
        Level::Plain => usable = [false; GROUP],
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => {
            let at_once = layout.rows_at_once();
            let chunks = x.chunks(at_once).zip(c.chunks_mut(8 * at_once));
            for ((x, c), usable) in chunks.zip(usable.chunks_mut(at_once)) {
                // SAFETY: a kernel of this level exists only where the features
                // were detected; the lengths were checked just above.
                unsafe { x86::chain_rows_avx2(layout, x, w, c, usable) };
            }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => {
            let at_once = layout.rows_at_once();
            let chunks = x.chunks(at_once).zip(c.chunks_mut(16 * at_once));
            for ((x, c), usable) in chunks.zip(usable.chunks_mut(at_once)) {
                // SAFETY: as above.
                unsafe { x86::chain_rows_avx512(layout, x, w, c, usable) };
            }
        }
    }
    usable
}

/// Rows of w that meet a row of x at a time where integers are multiplied.
pub(super) const INTEGER_LANES: usize = 16;
/// Rows of x that are multiplied side by side.
pub(super) const INTEGER_ROWS: usize = 8;

/// Words of one row, or of one lane of w, for `inner` elements of K: whole fours of them.
pub(super) fn integer_words(kernel: Kernel, inner: usize) -> usize {
    inner.div_ceil(4) * if holds_fours(kernel) { 1 } else { 2 }
}

/// Whether a word holds four elements of K as bytes, and not two of 16 bits.
fn holds_fours(kernel: Kernel) -> bool {
    match kernel.0 {
        Level::Plain => false,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => false,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => true,
    }
}

/// Two bytes of a word, the first of them `from`, each widened to 16 bits.
#[inline(always)]
fn widened(word: u32, from: usize) -> u32 {
    let bytes = word.to_le_bytes();
    let wide = |at: usize| u32::from(i16::from(bytes[at] as i8) as u16);
    wide(from) | wide(from + 1) << 16
}

/// A row of 8-bit integers as [`integer_sums`] takes it of x.
pub(super) fn pack_integers_of_x(kernel: Kernel, row: CodesRow, words: &mut Words) {
    words.resize(integer_words(kernel, row.len()));
    let inner = 0..row.len();
    let rows = slices8::<1>(&[row], &inner);
    let words = words.as_mut_slice();
    for four in 0..inner.len().div_ceil(4) {
        let [word] = words_at(&rows, four);
        if holds_fours(kernel) {
            words[four] = word;
        } else {
            words[2 * four] = widened(word, 0);
            words[2 * four + 1] = widened(word, 2);
        }
    }
}

/// A stretch of K of up to [`INTEGER_LANES`] rows of 8-bit integers as [`integer_sums`] takes it of w.
pub(super) fn pack_integers_of_w(
    kernel: Kernel,
    rows: &[CodesRow],
    inner: std::ops::Range<usize>,
    words: &mut Words,
) {
    const LANES: usize = INTEGER_LANES;
    words.resize(integer_words(kernel, inner.len()) * LANES);
    let rows = slices8::<LANES>(rows, &inner);
    let vectors = words.as_mut_slice().as_chunks_mut::<LANES>().0;
    for four in 0..inner.len().div_ceil(4) {
        let column = words_at(&rows, four);
        if holds_fours(kernel) {
            // 128 more: what was -128 to 127 is 0 to 255.
            vectors[four] = column.map(|word| word ^ 0x8080_8080);
        } else {
            vectors[2 * four] = column.map(|word| widened(word, 0));
            vectors[2 * four + 1] = column.map(|word| widened(word, 2));
        }
    }
}

/// The sums of products of up to [`INTEGER_ROWS`] rows of x with [`INTEGER_LANES`] rows of w, exact
/// modulo 2^32. All hold the words of one stretch of K.
pub(super) fn integer_sums(
    kernel: Kernel,
    x: &[&[u32]],
    w: &[u32],
    sums: &mut [[i32; INTEGER_LANES]],
) {
    let words = x.first().map_or(0, |x| x.len());
    assert!(
        sums.len() == x.len()
            && x.iter().all(|x| x.len() == words)
            && w.len() >= words * INTEGER_LANES,
        "operands are packed for this kernel"
    );
    let groups = |at_once: usize| x.chunks(at_once);
    match kernel.0 {
        Level::Plain => {
            for (x, sums) in x.iter().zip(sums) {
                *sums = [0; INTEGER_LANES];
                for (x, w) in x.iter().zip(w.as_chunks::<INTEGER_LANES>().0) {
                    for (sum, w) in sums.iter_mut().zip(w) {
                        let product = |shift: u32| {
                            i32::from((x >> shift) as i16) * i32::from((w >> shift) as i16)
                        };
                        *sum = sum.wrapping_add(product(0) + product(16));
                    }
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => {
            for (x, sums) in groups(4).zip(sums.chunks_mut(4)) {
                // SAFETY: a kernel of this level exists only where the features were detected; the
                // lengths were checked just above.
                unsafe { x86::integers_avx2(x, w, sums) };
            }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => {
            for (x, sums) in groups(INTEGER_ROWS).zip(sums.chunks_mut(INTEGER_ROWS)) {
                // SAFETY: as above.
                unsafe { x86::integers_avx512(x, w, sums) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::chip::TensorCore;
    use super::{
        CodesRow, Format, INTEGER_LANES, Layout, NARROW_BIAS, Raised, Words, pack_w_lanes,
    };

    /// A loop whose body is written out for each value of its index, up to 16, so
    /// that arrays of vectors stay in registers; the compiler gives up on loops of
    /// this size.
    macro_rules! unrolled {
        ($index:ident in 0..$count:ident, $body:block) => {
            unrolled!($index, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
        };
        ($index:ident, $count:ident, $body:block, $($value:literal)*) => {
            $(if $value < $count {
                let $index: usize = $value;
                $body
            })*
        };
    }

    /// Halves of a vector, in each of which a lane becomes an f64.
    const HALVES: usize = 2;

    /// The biased exponent below which no narrow maximum may fall: it keeps the
    /// powers of two that are made of it finite where all addends are zero, and
    /// lies below that of every accumulator.
    const NARROW_LOWEST: i8 = 58;
    /// What turns an accumulator's exponent field into a biased exponent.
    const NARROW_ACCUMULATOR_BIAS: i32 = 2 * NARROW_BIAS as i32 - 127;

    #[target_feature(enable = "avx2")]
    pub(super) fn pack_w_avx2(
        layout: Layout,
        format: Format,
        rows: &[CodesRow],
        raised: &[Raised<'_>],
        inner: std::ops::Range<usize>,
        words: &mut Words,
    ) {
        pack_w_lanes::<8>(layout, format, rows, raised, inner, words);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    pub(super) fn pack_w_avx512(
        layout: Layout,
        format: Format,
        rows: &[CodesRow],
        raised: &[Raised<'_>],
        inner: std::ops::Range<usize>,
        words: &mut Words,
    ) {
        pack_w_lanes::<16>(layout, format, rows, raised, inner, words);
    }

    /// # Safety
    /// `c` has 16 values for each row of x, which are one to four of one
    /// length, and `w` at least 16 times as many words as a row.
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vbmi2,avx512vnni,avx512vpopcntdq,avx2,fma"
    )]
    pub(super) unsafe fn chain_rows_avx512(
        layout: Layout,
        x: &[&[u32]],
        w: &[u32],
        c: &mut [f32],
        usable: &mut [bool],
    ) {
        // SAFETY: the caller's promise is the callees' need.
        unsafe {
            match *x {
                [p, q, r, s] if layout == Layout::Fma => fma_avx512([p, q, r, s], w, c),
                [p, q] => usable[..2].copy_from_slice(&chain_avx512(layout, [p, q], w, c)),
                _ => {
                    for ((x, c), usable) in x.iter().zip(c.chunks_exact_mut(16)).zip(usable) {
                        [*usable] = chain_avx512(layout, [x], w, c);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`chain_rows_avx512`].
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vbmi2,avx512vnni,avx512vpopcntdq,avx2,fma"
    )]
    unsafe fn chain_avx512<const ROWS: usize>(
        layout: Layout,
        x: [&[u32]; ROWS],
        w: &[u32],
        c: &mut [f32],
    ) -> [bool; ROWS] {
        // SAFETY: the caller's promise is the callees' need.
        unsafe {
            match layout {
                Layout::Narrow { products: 32 } => narrow_avx512::<8, ROWS>(x, w, c),
                Layout::Narrow { .. } => narrow_avx512::<4, ROWS>(x, w, c),
                Layout::Wide { core } => match core.products {
                    32 => wide_avx512::<16, ROWS>(&core, x, w, c),
                    16 => wide_avx512::<8, ROWS>(&core, x, w, c),
                    8 => wide_avx512::<4, ROWS>(&core, x, w, c),
                    _ => wide_avx512::<2, ROWS>(&core, x, w, c),
                },
                Layout::Fma => {
                    fma_avx512(x, w, c);
                    [true; ROWS]
                }
            }
        }
    }

    /// # Safety
    /// As [`chain_rows_avx512`].
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn fma_avx512<const ROWS: usize>(x: [&[u32]; ROWS], w: &[u32], c: &mut [f32]) {
        // SAFETY: `c` has 16 values for each row, `w` 16 words for each word of x.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); ROWS];
            for (sum, c) in sums.iter_mut().zip(c.chunks_exact(16)) {
                *sum = _mm512_loadu_ps(c.as_ptr());
            }
            for k in 0..x[0].len() {
                let w = _mm512_castsi512_ps(load512(w, 16 * k));
                for (sum, x) in sums.iter_mut().zip(x) {
                    let x = _mm512_set1_ps(f32::from_bits(x[k]));
                    *sum = _mm512_fmadd_ps(x, w, *sum);
                }
            }
            for (sum, c) in sums.iter().zip(c.chunks_exact_mut(16)) {
                _mm512_storeu_ps(c.as_mut_ptr(), *sum);
            }
        }
    }

    /// # Safety
    /// `at + 16 <= words.len()`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load512(words: &[u32], at: usize) -> __m512i {
        debug_assert!(at + 16 <= words.len());
        // SAFETY: the caller keeps the 16 words inside the slice.
        unsafe { _mm512_loadu_si512(words.as_ptr().add(at).cast()) }
    }

    /// # Safety
    /// As [`chain_avx512`]; `x` holds whole blocks of `QUADS` times five words.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx512vnni")]
    unsafe fn narrow_avx512<const QUADS: usize, const ROWS: usize>(
        x: [&[u32]; ROWS],
        w: &[u32],
        c: &mut [f32],
    ) -> [bool; ROWS] {
        let mut accumulators = [_mm512_setzero_ps(); ROWS];
        for (accumulator, c) in accumulators.iter_mut().zip(c.chunks_exact(16)) {
            // SAFETY: a chunk has 16 values.
            *accumulator = unsafe { _mm512_loadu_ps(c.as_ptr()) };
        }
        let zero = _mm512_setzero_si512();
        let low_byte = _mm512_set1_epi32(0xff);
        let replicate = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
        for block in 0..x[0].len() / (5 * QUADS) {
            let base = block * 5 * QUADS;
            // Macros, because the compiler declines to inline closures this often.
            macro_rules! w {
                ($word:expr) => {
                    // SAFETY: `w` has 16 words for each word of x.
                    unsafe { load512(w, (base + $word) * 16) }
                };
            }
            macro_rules! x {
                ($row:expr, $word:expr) => {
                    // SAFETY: the rows have one length and hold whole blocks, so this word too.
                    _mm512_set1_epi32(unsafe { *x[$row].get_unchecked(base + $word) } as i32)
                };
            }

            let mut exponents = [[zero; QUADS]; ROWS];
            let mut largest = [_mm512_set1_epi8(NARROW_LOWEST); ROWS];
            unrolled!(q in 0..QUADS, {
                let w = w!(5 * q);
                unrolled!(r in 0..ROWS, {
                    exponents[r][q] = _mm512_add_epi8(w, x!(r, 5 * q));
                    largest[r] = _mm512_max_epu8(largest[r], exponents[r][q]);
                });
            });

            let bias = 2 * NARROW_BIAS as i32;
            let mut clamps = [zero; ROWS];
            let mut sums = [[zero; 4]; ROWS];
            unrolled!(r in 0..ROWS, {
                let most = _mm512_max_epu8(largest[r], _mm512_srli_epi32::<16>(largest[r]));
                let most = _mm512_max_epu8(most, _mm512_srli_epi32::<8>(most));
                let bits = _mm512_castps_si512(accumulators[r]);
                let field = _mm512_srli_epi32::<24>(_mm512_slli_epi32::<1>(bits));
                let own = _mm512_add_epi32(field, _mm512_set1_epi32(NARROW_ACCUMULATOR_BIAS));
                largest[r] = _mm512_max_epi32(_mm512_and_si512(most, low_byte), own);
                // 2^(13 - M) brings the accumulator to the unit of the cut addends.
                let up = _mm512_sub_epi32(_mm512_set1_epi32(127 + 13 + bias), largest[r]);
                let up = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(up));
                sums[r][0] = _mm512_cvttps_epi32(_mm512_mul_ps(accumulators[r], up));
                let clamp = _mm512_shuffle_epi8(largest[r], replicate);
                clamps[r] = _mm512_sub_epi8(clamp, _mm512_set1_epi8(15));
            });

            unrolled!(q in 0..QUADS, {
                let (even_magnitudes, odd_magnitudes) = (w!(5 * q + 1), w!(5 * q + 2));
                let (even_signs, odd_signs) = (w!(5 * q + 3), w!(5 * q + 4));
                unrolled!(r in 0..ROWS, {
                    let counts = _mm512_subs_epu8(exponents[r][q], clamps[r]);
                    // The shift reads the low four bits of each 16-bit count.
                    let even = _mm512_mullo_epi16(even_magnitudes, x!(r, 5 * q + 1));
                    let even = _mm512_shldv_epi16(zero, even, counts);
                    let odd = _mm512_mullo_epi16(odd_magnitudes, x!(r, 5 * q + 2));
                    let odd = _mm512_shldv_epi16(zero, odd, _mm512_srli_epi16::<8>(counts));
                    let sums = &mut sums[r];
                    let signs = _mm512_xor_si512(even_signs, x!(r, 5 * q + 3));
                    sums[q % 2] = _mm512_dpwssd_epi32(sums[q % 2], even, signs);
                    let signs = _mm512_xor_si512(odd_signs, x!(r, 5 * q + 4));
                    sums[2 + q % 2] = _mm512_dpwssd_epi32(sums[2 + q % 2], odd, signs);
                });
            });

            unrolled!(r in 0..ROWS, {
                let [a, b, c, d] = sums[r];
                let sum = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
                let sum = _mm512_castps_si512(_mm512_cvtepi32_ps(sum));
                let kept = _mm512_and_si512(sum, _mm512_set1_epi32(!0x3ff));
                let down = _mm512_sub_epi32(largest[r], _mm512_set1_epi32(13 + bias - 127));
                let down = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(down));
                accumulators[r] = _mm512_mul_ps(_mm512_castsi512_ps(kept), down);
            });
        }
        for (accumulator, c) in accumulators.iter().zip(c.chunks_exact_mut(16)) {
            // SAFETY: a chunk has 16 values.
            unsafe { _mm512_storeu_ps(c.as_mut_ptr(), *accumulator) };
        }
        [true; ROWS]
    }

    /// # Safety
    /// As [`chain_avx512`]; `x` holds whole blocks of `3 * PAIRS + 1` words.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vpopcntdq,avx2")]
    unsafe fn wide_avx512<const PAIRS: usize, const ROWS: usize>(
        core: &TensorCore,
        x: [&[u32]; ROWS],
        w: &[u32],
        c: &mut [f32],
    ) -> [bool; ROWS] {
        let mut accumulators = [_mm512_setzero_ps(); ROWS];
        for (accumulator, c) in accumulators.iter_mut().zip(c.chunks_exact(16)) {
            // SAFETY: a chunk has 16 values.
            *accumulator = unsafe { _mm512_loadu_ps(c.as_ptr()) };
        }
        let zero = _mm512_setzero_si512();
        let one = _mm512_set1_epi32(1);
        let alignment_bits = core.alignment_bits as i32;
        let overflow = _mm512_set1_pd(f64::powi(2.0, 128));
        let mut overflowed = [0u8; ROWS];
        for block in 0..x[0].len() / (3 * PAIRS + 1) {
            let base = block * (3 * PAIRS + 1);
            // Macros, because the compiler declines to inline closures this often.
            macro_rules! w {
                ($word:expr) => {
                    // SAFETY: `w` has 16 words for each word of x.
                    unsafe { load512(w, (base + $word) * 16) }
                };
            }
            macro_rules! x {
                ($row:expr, $word:expr) => {
                    // SAFETY: the rows have one length and hold whole blocks, so this word too.
                    _mm512_set1_epi32(unsafe { *x[$row].get_unchecked(base + $word) } as i32)
                };
            }

            let mut exponents = [[zero; PAIRS]; ROWS];
            let mut largest = [_mm512_set1_epi16(core.exponent_floor as i16); ROWS];
            unrolled!(p in 0..PAIRS, {
                let w = w!(3 * p);
                unrolled!(r in 0..ROWS, {
                    exponents[r][p] = _mm512_add_epi16(w, x!(r, 3 * p));
                    largest[r] = _mm512_max_epi16(largest[r], exponents[r][p]);
                });
            });

            let mut nexts = [zero; ROWS];
            unrolled!(r in 0..ROWS, {
                let most = _mm512_max_epi16(largest[r], _mm512_srli_epi32::<16>(largest[r]));
                let most = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(most));
                let doubled = _mm512_slli_epi32::<1>(_mm512_castps_si512(accumulators[r]));
                let field = _mm512_max_epi32(_mm512_srli_epi32::<24>(doubled), one);
                let own = _mm512_sub_epi32(field, _mm512_set1_epi32(127));
                let nonzero = _mm512_test_epi32_mask(doubled, doubled);
                largest[r] = _mm512_mask_max_epi32(most, nonzero, most, own);
                // One more than the distance: the products are doubled.
                let next = _mm512_add_epi32(largest[r], one);
                nexts[r] =
                    _mm512_mask_blend_epi16(0xaaaa_aaaa, next, _mm512_slli_epi32::<16>(next));
            });

            // The even and the odd of the first 16 products, and those of the others.
            let mut sums = [[zero; 4]; ROWS];
            unrolled!(p in 0..PAIRS, {
                let (even_w, odd_w) = (w!(3 * p + 1), w!(3 * p + 2));
                unrolled!(r in 0..ROWS, {
                    let sums = &mut sums[r];
                    let distance = _mm512_sub_epi16(nexts[r], exponents[r][p]);
                    let even = _mm512_madd_epi16(even_w, x!(r, 3 * p + 1));
                    let odd = _mm512_madd_epi16(odd_w, x!(r, 3 * p + 2));
                    let even_distance = _mm512_and_si512(distance, _mm512_set1_epi32(0xffff));
                    let odd_distance = _mm512_srli_epi32::<16>(distance);
                    let first = p / 8 * 2;
                    sums[first] =
                        _mm512_add_epi32(sums[first], _mm512_srav_epi32(even, even_distance));
                    sums[first + 1] =
                        _mm512_add_epi32(sums[first + 1], _mm512_srav_epi32(odd, odd_distance));
                });
            });

            unrolled!(r in 0..ROWS, {
                let sums = &sums[r];
                let signs = _mm512_xor_si512(w!(3 * PAIRS), x!(r, 3 * PAIRS));
                let first_signs = _mm512_and_si512(signs, _mm512_set1_epi32(0xffff));
                let first = _mm512_add_epi32(sums[0], sums[1]);
                let first = _mm512_add_epi32(first, _mm512_popcnt_epi32(first_signs));
                let second = _mm512_add_epi32(sums[2], sums[3]);
                let second =
                    _mm512_add_epi32(second, _mm512_popcnt_epi32(_mm512_srli_epi32::<16>(signs)));
                let halves: [(__m256i, __m256i, __m256i, __m256); 2] = [
                    (
                        _mm512_castsi512_si256(first),
                        _mm512_castsi512_si256(second),
                        _mm512_castsi512_si256(largest[r]),
                        _mm512_castps512_ps256(accumulators[r]),
                    ),
                    (
                        _mm512_extracti64x4_epi64::<1>(first),
                        _mm512_extracti64x4_epi64::<1>(second),
                        _mm512_extracti64x4_epi64::<1>(largest[r]),
                        _mm512_extractf32x8_ps::<1>(accumulators[r]),
                    ),
                ];
                let mut results = [_mm256_setzero_ps(); 2];
                unrolled!(half in 0..HALVES, {
                    let (first, second, largest, accumulator) = halves[half];
                    let largest = _mm512_cvtepi32_epi64(largest);
                    let up = _mm512_sub_epi64(
                        _mm512_set1_epi64(i64::from(1023 + alignment_bits)),
                        largest,
                    );
                    let down = _mm512_add_epi64(
                        _mm512_set1_epi64(i64::from(1023 - alignment_bits)),
                        largest,
                    );
                    let up = _mm512_castsi512_pd(_mm512_slli_epi64::<52>(up));
                    let down = _mm512_castsi512_pd(_mm512_slli_epi64::<52>(down));
                    let own = _mm512_mul_pd(_mm512_cvtps_pd(accumulator), up);
                    let own =
                        _mm512_roundscale_pd::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(own);
                    let mut sum = _mm512_add_pd(_mm512_cvtepi32_pd(first), own);
                    if PAIRS > 8 {
                        sum = _mm512_add_pd(sum, _mm512_cvtepi32_pd(second));
                    }
                    let sum = _mm512_mul_pd(sum, down);
                    overflowed[r] |= _mm512_cmp_pd_mask::<_CMP_GE_OQ>(_mm512_abs_pd(sum), overflow);
                    results[half] =
                        _mm512_cvt_roundpd_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(sum);
                });
                accumulators[r] =
                    _mm512_insertf32x8::<1>(_mm512_castps256_ps512(results[0]), results[1]);
            });
        }
        for (accumulator, c) in accumulators.iter().zip(c.chunks_exact_mut(16)) {
            // SAFETY: a chunk has 16 values.
            unsafe { _mm512_storeu_ps(c.as_mut_ptr(), *accumulator) };
        }
        overflowed.map(|lanes| lanes == 0)
    }

    /// # Safety
    /// The rows of x, at most [`super::INTEGER_ROWS`], have one length; there are as many sums, and `w` has 16
    /// words for each word of a row.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn integers_avx512(
        x: &[&[u32]],
        w: &[u32],
        sums: &mut [[i32; INTEGER_LANES]],
    ) {
        // SAFETY: the caller's promise is the callees' need.
        unsafe {
            match *x {
                [a, b, c, d, e, f, g, h] => {
                    integer_rows_avx512([a, b, c, d, e, f, g, h], w, sums);
                }
                [a, b, c, d, ref rest @ ..] => {
                    integer_rows_avx512([a, b, c, d], w, &mut sums[..4]);
                    integers_avx512(rest, w, &mut sums[4..]);
                }
                _ => {
                    for (x, sums) in x.iter().zip(sums.chunks_mut(1)) {
                        integer_rows_avx512([x], w, sums);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`integers_avx512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn integer_rows_avx512<const ROWS: usize>(
        x: [&[u32]; ROWS],
        w: &[u32],
        sums: &mut [[i32; INTEGER_LANES]],
    ) {
        let ones = _mm512_set1_epi8(1);
        let mut exact = [_mm512_setzero_si512(); ROWS];
        unrolled!(r in 0..ROWS, {
            // 128 times the sum of x is what w's 128 adds to every lane.
            let (whole, rest) = x[r].as_chunks::<16>();
            let mut all = _mm512_setzero_si512();
            for words in whole {
                // SAFETY: a chunk has 16 words.
                let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
                all = _mm512_dpbusd_epi32(all, ones, words);
            }
            let bytes = rest.iter().flat_map(|word| word.to_le_bytes());
            let rest: i32 = bytes.map(|byte| i32::from(byte as i8)).sum();
            let all = _mm512_reduce_add_epi32(all).wrapping_add(rest);
            exact[r] = _mm512_set1_epi32(all.wrapping_mul(-128));
        });
        for k in 0..x[0].len() {
            // SAFETY: `w` has 16 words for each word of x.
            let w = unsafe { load512(w, 16 * k) };
            unrolled!(r in 0..ROWS, {
                // SAFETY: the rows have one length.
                let x = _mm512_set1_epi32(unsafe { *x[r].get_unchecked(k) } as i32);
                exact[r] = _mm512_dpbusd_epi32(exact[r], w, x);
            });
        }
        for (exact, sums) in exact.iter().zip(sums) {
            // SAFETY: a row of sums has 16.
            unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), *exact) };
        }
    }

    /// # Safety
    /// As [`integers_avx512`], for at most four rows.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn integers_avx2(x: &[&[u32]], w: &[u32], sums: &mut [[i32; INTEGER_LANES]]) {
        // SAFETY: the caller's promise is the callees' need.
        unsafe {
            match *x {
                [a, b, c, d] => integer_rows_avx2([a, b, c, d], w, sums),
                _ => {
                    for (x, sums) in x.iter().zip(sums.chunks_mut(1)) {
                        integer_rows_avx2([x], w, sums);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`integers_avx2`].
    #[target_feature(enable = "avx2")]
    unsafe fn integer_rows_avx2<const ROWS: usize>(
        x: [&[u32]; ROWS],
        w: &[u32],
        sums: &mut [[i32; INTEGER_LANES]],
    ) {
        let mut exact = [[_mm256_setzero_si256(); HALVES]; ROWS];
        for k in 0..x[0].len() {
            let mut halves = [_mm256_setzero_si256(); HALVES];
            unrolled!(half in 0..HALVES, {
                let at = INTEGER_LANES * k + 8 * half;
                debug_assert!(at + 8 <= w.len());
                // SAFETY: `w` has 16 words for each word of x.
                halves[half] = unsafe { _mm256_loadu_si256(w.as_ptr().add(at).cast()) };
            });
            unrolled!(r in 0..ROWS, {
                // SAFETY: the rows have one length.
                let x = _mm256_set1_epi32(unsafe { *x[r].get_unchecked(k) } as i32);
                unrolled!(half in 0..HALVES, {
                    let products = _mm256_madd_epi16(halves[half], x);
                    exact[r][half] = _mm256_add_epi32(exact[r][half], products);
                });
            });
        }
        for (exact, sums) in exact.iter().zip(sums) {
            for (exact, sums) in exact.iter().zip(sums.as_chunks_mut::<8>().0) {
                // SAFETY: half a row of sums has 8.
                unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), *exact) };
            }
        }
    }

    /// # Safety
    /// `c` has 8 values for each row of x, which are one to four of one
    /// length, and `w` at least 8 times as many words as a row.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn chain_rows_avx2(
        layout: Layout,
        x: &[&[u32]],
        w: &[u32],
        c: &mut [f32],
        usable: &mut [bool],
    ) {
        // SAFETY: the caller's promise is the callees' need.
        unsafe {
            match *x {
                [p, q, r, s] if layout == Layout::Fma => fma_avx2([p, q, r, s], w, c),
                [p, q] => usable[..2].copy_from_slice(&chain_avx2(layout, [p, q], w, c)),
                _ => {
                    for ((x, c), usable) in x.iter().zip(c.chunks_exact_mut(8)).zip(usable) {
                        [*usable] = chain_avx2(layout, [x], w, c);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`chain_rows_avx2`].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn chain_avx2<const ROWS: usize>(
        layout: Layout,
        x: [&[u32]; ROWS],
        w: &[u32],
        c: &mut [f32],
    ) -> [bool; ROWS] {
        // SAFETY: the caller's promise is the callees' need.
        unsafe {
            match layout {
                Layout::Narrow { products: 32 } => narrow_avx2::<8, ROWS>(x, w, c),
                Layout::Narrow { .. } => narrow_avx2::<4, ROWS>(x, w, c),
                Layout::Wide { core } => match core.products {
                    32 => wide_avx2::<16, ROWS>(&core, x, w, c),
                    16 => wide_avx2::<8, ROWS>(&core, x, w, c),
                    8 => wide_avx2::<4, ROWS>(&core, x, w, c),
                    _ => wide_avx2::<2, ROWS>(&core, x, w, c),
                },
                Layout::Fma => {
                    fma_avx2(x, w, c);
                    [true; ROWS]
                }
            }
        }
    }

    /// # Safety
    /// As [`chain_rows_avx2`].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn fma_avx2<const ROWS: usize>(x: [&[u32]; ROWS], w: &[u32], c: &mut [f32]) {
        // SAFETY: `c` has 8 values for each row, `w` 8 words for each word of x.
        unsafe {
            let mut sums = [_mm256_setzero_ps(); ROWS];
            for (sum, c) in sums.iter_mut().zip(c.chunks_exact(8)) {
                *sum = _mm256_loadu_ps(c.as_ptr());
            }
            for k in 0..x[0].len() {
                let w = _mm256_castsi256_ps(load256(w, 8 * k));
                for (sum, x) in sums.iter_mut().zip(x) {
                    let x = _mm256_set1_ps(f32::from_bits(x[k]));
                    *sum = _mm256_fmadd_ps(x, w, *sum);
                }
            }
            for (sum, c) in sums.iter().zip(c.chunks_exact_mut(8)) {
                _mm256_storeu_ps(c.as_mut_ptr(), *sum);
            }
        }
    }

    /// # Safety
    /// `at + 8 <= words.len()`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load256(words: &[u32], at: usize) -> __m256i {
        debug_assert!(at + 8 <= words.len());
        // SAFETY: the caller keeps the 8 words inside the slice.
        unsafe { _mm256_loadu_si256(words.as_ptr().add(at).cast()) }
    }

    /// # Safety
    /// As [`chain_avx2`]; `x` holds whole blocks of `QUADS` times five words.
    #[target_feature(enable = "avx2")]
    unsafe fn narrow_avx2<const QUADS: usize, const ROWS: usize>(
        x: [&[u32]; ROWS],
        w: &[u32],
        c: &mut [f32],
    ) -> [bool; ROWS] {
        let mut accumulators = [_mm256_setzero_ps(); ROWS];
        for (accumulator, c) in accumulators.iter_mut().zip(c.chunks_exact(8)) {
            // SAFETY: a chunk has 8 values.
            *accumulator = unsafe { _mm256_loadu_ps(c.as_ptr()) };
        }
        let zero = _mm256_setzero_si256();
        let low_byte = _mm256_set1_epi32(0xff);
        let replicate = _mm256_setr_epi32(
            0,
            0x0404_0404,
            0x0808_0808,
            0x0c0c_0c0c,
            0,
            0x0404_0404,
            0x0808_0808,
            0x0c0c_0c0c,
        );
        // The low and the high byte of 2^count.
        let low_power = _mm256_setr_epi64x(
            0x8040_2010_0804_0201_u64 as i64,
            0,
            0x8040_2010_0804_0201_u64 as i64,
            0,
        );
        let high_power = _mm256_setr_epi64x(
            0,
            0x8040_2010_0804_0201_u64 as i64,
            0,
            0x8040_2010_0804_0201_u64 as i64,
        );
        let high_bytes = _mm256_set1_epi16(0xff00_u16 as i16);
        for block in 0..x[0].len() / (5 * QUADS) {
            let base = block * 5 * QUADS;
            // Macros, because the compiler declines to inline closures this often.
            macro_rules! w {
                ($word:expr) => {
                    // SAFETY: `w` has 8 words for each word of x.
                    unsafe { load256(w, (base + $word) * 8) }
                };
            }
            macro_rules! x {
                ($row:expr, $word:expr) => {
                    // SAFETY: the rows have one length and hold whole blocks, so this word too.
                    _mm256_set1_epi32(unsafe { *x[$row].get_unchecked(base + $word) } as i32)
                };
            }

            let mut exponents = [[zero; QUADS]; ROWS];
            let mut largest = [_mm256_set1_epi8(NARROW_LOWEST); ROWS];
            unrolled!(q in 0..QUADS, {
                let w = w!(5 * q);
                unrolled!(r in 0..ROWS, {
                    exponents[r][q] = _mm256_add_epi8(w, x!(r, 5 * q));
                    largest[r] = _mm256_max_epu8(largest[r], exponents[r][q]);
                });
            });

            let bias = 2 * NARROW_BIAS as i32;
            let mut clamps = [zero; ROWS];
            let mut sums = [[zero; 4]; ROWS];
            unrolled!(r in 0..ROWS, {
                let most = _mm256_max_epu8(largest[r], _mm256_srli_epi32::<16>(largest[r]));
                let most = _mm256_max_epu8(most, _mm256_srli_epi32::<8>(most));
                let bits = _mm256_castps_si256(accumulators[r]);
                let field = _mm256_srli_epi32::<24>(_mm256_slli_epi32::<1>(bits));
                let own = _mm256_add_epi32(field, _mm256_set1_epi32(NARROW_ACCUMULATOR_BIAS));
                largest[r] = _mm256_max_epi32(_mm256_and_si256(most, low_byte), own);
                // 2^(13 - M) brings the accumulator to the unit of the cut addends.
                let up = _mm256_sub_epi32(_mm256_set1_epi32(127 + 13 + bias), largest[r]);
                let up = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(up));
                sums[r][0] = _mm256_cvttps_epi32(_mm256_mul_ps(accumulators[r], up));
                let clamp = _mm256_shuffle_epi8(largest[r], replicate);
                clamps[r] = _mm256_sub_epi8(clamp, _mm256_set1_epi8(15));
            });

            unrolled!(q in 0..QUADS, {
                let (even_magnitudes, odd_magnitudes) = (w!(5 * q + 1), w!(5 * q + 2));
                let (even_signs, odd_signs) = (w!(5 * q + 3), w!(5 * q + 4));
                unrolled!(r in 0..ROWS, {
                    let counts = _mm256_subs_epu8(exponents[r][q], clamps[r]);
                    let low = _mm256_shuffle_epi8(low_power, counts);
                    let high = _mm256_shuffle_epi8(high_power, counts);
                    let even_powers =
                        _mm256_blendv_epi8(low, _mm256_slli_epi16::<8>(high), high_bytes);
                    let odd_powers =
                        _mm256_blendv_epi8(_mm256_srli_epi16::<8>(low), high, high_bytes);
                    let even = _mm256_mullo_epi16(even_magnitudes, x!(r, 5 * q + 1));
                    let even = _mm256_mulhi_epu16(even, even_powers);
                    let odd = _mm256_mullo_epi16(odd_magnitudes, x!(r, 5 * q + 2));
                    let odd = _mm256_mulhi_epu16(odd, odd_powers);
                    let sums = &mut sums[r];
                    let signs = _mm256_xor_si256(even_signs, x!(r, 5 * q + 3));
                    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(even, signs));
                    let signs = _mm256_xor_si256(odd_signs, x!(r, 5 * q + 4));
                    sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(odd, signs));
                });
            });

            unrolled!(r in 0..ROWS, {
                let [a, b, c, d] = sums[r];
                let sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
                let sum = _mm256_castps_si256(_mm256_cvtepi32_ps(sum));
                let kept = _mm256_and_si256(sum, _mm256_set1_epi32(!0x3ff));
                let down = _mm256_sub_epi32(largest[r], _mm256_set1_epi32(13 + bias - 127));
                let down = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(down));
                accumulators[r] = _mm256_mul_ps(_mm256_castsi256_ps(kept), down);
            });
        }
        for (accumulator, c) in accumulators.iter().zip(c.chunks_exact_mut(8)) {
            // SAFETY: a chunk has 8 values.
            unsafe { _mm256_storeu_ps(c.as_mut_ptr(), *accumulator) };
        }
        [true; ROWS]
    }

    /// # Safety
    /// As [`chain_avx2`]; `x` holds whole blocks of `3 * PAIRS + 1` words.
    #[target_feature(enable = "avx2")]
    unsafe fn wide_avx2<const PAIRS: usize, const ROWS: usize>(
        core: &TensorCore,
        x: [&[u32]; ROWS],
        w: &[u32],
        c: &mut [f32],
    ) -> [bool; ROWS] {
        let mut accumulators = [_mm256_setzero_ps(); ROWS];
        for (accumulator, c) in accumulators.iter_mut().zip(c.chunks_exact(8)) {
            // SAFETY: a chunk has 8 values.
            *accumulator = unsafe { _mm256_loadu_ps(c.as_ptr()) };
        }
        let zero = _mm256_setzero_si256();
        let one = _mm256_set1_epi32(1);
        let alignment_bits = core.alignment_bits as i32;
        let magnitude_mask = _mm256_castsi256_pd(_mm256_set1_epi64x(i64::MAX));
        let too_large = _mm256_set1_pd(f64::powi(2.0, 128));
        let too_small = _mm256_set1_pd(f64::powi(2.0, -126));
        let no_number = _mm256_setzero_pd();
        let mut out_of_range = [0; ROWS];
        for block in 0..x[0].len() / (3 * PAIRS + 1) {
            let base = block * (3 * PAIRS + 1);
            // Macros, because the compiler declines to inline closures this often.
            macro_rules! w {
                ($word:expr) => {
                    // SAFETY: `w` has 8 words for each word of x.
                    unsafe { load256(w, (base + $word) * 8) }
                };
            }
            macro_rules! x {
                ($row:expr, $word:expr) => {
                    // SAFETY: the rows have one length and hold whole blocks, so this word too.
                    _mm256_set1_epi32(unsafe { *x[$row].get_unchecked(base + $word) } as i32)
                };
            }

            let mut exponents = [[zero; PAIRS]; ROWS];
            let mut largest = [_mm256_set1_epi16(core.exponent_floor as i16); ROWS];
            unrolled!(p in 0..PAIRS, {
                let w = w!(3 * p);
                unrolled!(r in 0..ROWS, {
                    exponents[r][p] = _mm256_add_epi16(w, x!(r, 3 * p));
                    largest[r] = _mm256_max_epi16(largest[r], exponents[r][p]);
                });
            });

            let mut nexts = [zero; ROWS];
            unrolled!(r in 0..ROWS, {
                let most = _mm256_max_epi16(largest[r], _mm256_srli_epi32::<16>(largest[r]));
                let most = _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(most));
                // An accumulator is zero or normal here: others leave the loop's range.
                let doubled = _mm256_slli_epi32::<1>(_mm256_castps_si256(accumulators[r]));
                let own =
                    _mm256_sub_epi32(_mm256_srli_epi32::<24>(doubled), _mm256_set1_epi32(127));
                let absent = _mm256_cmpeq_epi32(doubled, zero);
                let own = _mm256_blendv_epi8(own, _mm256_set1_epi32(core.exponent_floor), absent);
                largest[r] = _mm256_max_epi32(most, own);
                let next = _mm256_add_epi32(largest[r], one);
                nexts[r] = _mm256_blend_epi16::<0b1010_1010>(next, _mm256_slli_epi32::<16>(next));
            });

            // The even and the odd of the first 16 products, and those of the others.
            let mut sums = [[zero; 4]; ROWS];
            unrolled!(p in 0..PAIRS, {
                let (even_w, odd_w) = (w!(3 * p + 1), w!(3 * p + 2));
                unrolled!(r in 0..ROWS, {
                    let sums = &mut sums[r];
                    let distance = _mm256_sub_epi16(nexts[r], exponents[r][p]);
                    let even = _mm256_madd_epi16(even_w, x!(r, 3 * p + 1));
                    let odd = _mm256_madd_epi16(odd_w, x!(r, 3 * p + 2));
                    let even_distance = _mm256_and_si256(distance, _mm256_set1_epi32(0xffff));
                    let odd_distance = _mm256_srli_epi32::<16>(distance);
                    let first = p / 8 * 2;
                    sums[first] =
                        _mm256_add_epi32(sums[first], _mm256_srav_epi32(even, even_distance));
                    sums[first + 1] =
                        _mm256_add_epi32(sums[first + 1], _mm256_srav_epi32(odd, odd_distance));
                });
            });

            unrolled!(r in 0..ROWS, {
                let sums = &sums[r];
                let signs = _mm256_xor_si256(w!(3 * PAIRS), x!(r, 3 * PAIRS));
                // Bits set per byte, then per 16-bit lane.
                let nibbles = _mm256_setr_epi64x(
                    0x0302_0201_0201_0100,
                    0x0403_0302_0302_0201,
                    0x0302_0201_0201_0100,
                    0x0403_0302_0302_0201,
                );
                let low = _mm256_and_si256(signs, _mm256_set1_epi8(0xf));
                let high = _mm256_and_si256(_mm256_srli_epi32::<4>(signs), _mm256_set1_epi8(0xf));
                let bytes = _mm256_add_epi8(
                    _mm256_shuffle_epi8(nibbles, low),
                    _mm256_shuffle_epi8(nibbles, high),
                );
                let counts = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
                let first_count = _mm256_and_si256(counts, _mm256_set1_epi32(0xffff));
                let second_count = _mm256_srli_epi32::<16>(counts);
                let first = _mm256_add_epi32(sums[0], sums[1]);
                let first = _mm256_add_epi32(first, first_count);
                let second = _mm256_add_epi32(sums[2], sums[3]);
                let second = _mm256_add_epi32(second, second_count);
                let halves: [(__m128i, __m128i, __m128i, __m128); 2] = [
                    (
                        _mm256_castsi256_si128(first),
                        _mm256_castsi256_si128(second),
                        _mm256_castsi256_si128(largest[r]),
                        _mm256_castps256_ps128(accumulators[r]),
                    ),
                    (
                        _mm256_extracti128_si256::<1>(first),
                        _mm256_extracti128_si256::<1>(second),
                        _mm256_extracti128_si256::<1>(largest[r]),
                        _mm256_extractf128_ps::<1>(accumulators[r]),
                    ),
                ];
                let mut results = [_mm_setzero_ps(); 2];
                unrolled!(half in 0..HALVES, {
                    let (first, second, largest, accumulator) = halves[half];
                    let largest = _mm256_cvtepi32_epi64(largest);
                    let up = _mm256_sub_epi64(
                        _mm256_set1_epi64x(i64::from(1023 + alignment_bits)),
                        largest,
                    );
                    let down = _mm256_add_epi64(
                        _mm256_set1_epi64x(i64::from(1023 - alignment_bits)),
                        largest,
                    );
                    let up = _mm256_castsi256_pd(_mm256_slli_epi64::<52>(up));
                    let down = _mm256_castsi256_pd(_mm256_slli_epi64::<52>(down));
                    let own = _mm256_mul_pd(_mm256_cvtps_pd(accumulator), up);
                    let own = _mm256_round_pd::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(own);
                    let mut sum = _mm256_add_pd(_mm256_cvtepi32_pd(first), own);
                    if PAIRS > 8 {
                        sum = _mm256_add_pd(sum, _mm256_cvtepi32_pd(second));
                    }
                    let sum = _mm256_mul_pd(sum, down);
                    let magnitude = _mm256_and_pd(sum, magnitude_mask);
                    let large = _mm256_cmp_pd::<_CMP_GE_OQ>(magnitude, too_large);
                    let small = _mm256_and_pd(
                        _mm256_cmp_pd::<_CMP_LT_OQ>(magnitude, too_small),
                        _mm256_cmp_pd::<_CMP_NEQ_OQ>(magnitude, no_number),
                    );
                    out_of_range[r] |= _mm256_movemask_pd(_mm256_or_pd(large, small));
                    // 24 significant bits are left: the conversion rounds nothing.
                    let kept = _mm256_and_si256(
                        _mm256_castpd_si256(sum),
                        _mm256_set1_epi64x(!0x1fff_ffff),
                    );
                    results[half] = _mm256_cvtpd_ps(_mm256_castsi256_pd(kept));
                });
                accumulators[r] =
                    _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(results[0]), results[1]);
            });
        }
        for (accumulator, c) in accumulators.iter().zip(c.chunks_exact_mut(8)) {
            // SAFETY: a chunk has 8 values.
            unsafe { _mm256_storeu_ps(c.as_mut_ptr(), *accumulator) };
        }
        out_of_range.map(|lanes| lanes == 0)
    }
}
