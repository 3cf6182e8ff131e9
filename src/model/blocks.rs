//! Codecs of all of ggml's blocks.
//!
//! Each decodes one block to f32 as ggml's `dequantize_row_*` and the `gguf` package do, operation
//! by operation. It knows bytes and values: no files, no tensors. The tables of the IQ formats are
//! data of the format (`scripts/make-grids.py`).
//!
//! The loops are plain ones over runs of codes, compiled for each instruction set. No operation is
//! fused, so the values are the same on all of them.

use super::weights::WeightType;
use crate::vector::{Kernel, dispatch};

/// Values of the large blocks.
const LARGE: usize = 256;
/// The tables, as `scripts/make-grids.py` writes them.
const GRIDS: &[u8; 33_920] = include_bytes!("grids.bin");
const IQ2_XXS: usize = 0;
const IQ2_XS: usize = IQ2_XXS + 256 * 8;
const IQ2_S: usize = IQ2_XS + 512 * 8;
const IQ3_XXS: usize = IQ2_S + 1024 * 8;
const IQ3_S: usize = IQ3_XXS + 256 * 4;
const IQ1_S: usize = IQ3_S + 512 * 4;
const SIGNS: usize = IQ1_S + 2048 * 8;
/// The values of IQ4's codes.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the values of E2M1's codes.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Values and bytes of a block, where it is one of these.
pub(super) fn size(kind: WeightType) -> Option<(usize, usize)> {
    Some(match kind {
        WeightType::Q4_0 => (32, 18),
        WeightType::Q4_1 => (32, 20),
        WeightType::Q5_0 => (32, 22),
        WeightType::Q5_1 => (32, 24),
        WeightType::Q8_0 => (32, 34),
        WeightType::Q2K => (LARGE, 84),
        WeightType::Q3K => (LARGE, 110),
        WeightType::Q4K => (LARGE, 144),
        WeightType::Q5K => (LARGE, 176),
        WeightType::Q6K => (LARGE, 210),
        WeightType::Q8K => (LARGE, 292),
        WeightType::Iq4Nl => (32, 18),
        WeightType::Mxfp4 => (32, 17),
        WeightType::Nvfp4 => (64, 36),
        WeightType::Iq4Xs => (LARGE, 136),
        WeightType::Iq2Xxs => (LARGE, 66),
        WeightType::Iq2Xs => (LARGE, 74),
        WeightType::Iq2S => (LARGE, 82),
        WeightType::Iq3Xxs => (LARGE, 98),
        WeightType::Iq3S => (LARGE, 110),
        WeightType::Iq1S => (LARGE, 50),
        WeightType::Iq1M => (LARGE, 56),
        WeightType::Tq1_0 => (LARGE, 54),
        WeightType::Tq2_0 => (LARGE, 66),
        _ => return None,
    })
}

/// Decodes whole blocks; nothing where the type is none of these.
pub(super) fn decode(kind: WeightType, bytes: &[u8], out: &mut [f32]) -> Option<()> {
    size(kind)?;
    dispatch(Decode { kind, bytes, out });
    Some(())
}

/// Decodes whole blocks, one after the other. A macro: what a function calls through a parameter is
/// compiled without the instruction set that the loop has.
macro_rules! each {
    ($bytes:expr, $out:expr, $block:ident, $length:literal, $width:expr) => {{
        let (blocks, out) = ($bytes.as_chunks::<$length>().0, $out.as_chunks_mut::<{ $width }>().0);
        for (bytes, out) in blocks.iter().zip(out) {
            $block(bytes, out);
        }
    }};
}

struct Decode<'a> {
    kind: WeightType,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Decode { kind, bytes, out } = self;
        match kind {
            WeightType::Q4_0 => each!(bytes, out, q4_0, 18, 32),
            WeightType::Q4_1 => each!(bytes, out, q4_1, 20, 32),
            WeightType::Q5_0 => each!(bytes, out, q5_0, 22, 32),
            WeightType::Q5_1 => each!(bytes, out, q5_1, 24, 32),
            WeightType::Q8_0 => each!(bytes, out, q8_0, 34, 32),
            WeightType::Q2K => each!(bytes, out, q2_k, 84, LARGE),
            WeightType::Q3K => each!(bytes, out, q3_k, 110, LARGE),
            WeightType::Q4K => each!(bytes, out, q4_k, 144, LARGE),
            WeightType::Q5K => each!(bytes, out, q5_k, 176, LARGE),
            WeightType::Q6K => each!(bytes, out, q6_k, 210, LARGE),
            WeightType::Q8K => each!(bytes, out, q8_k, 292, LARGE),
            WeightType::Iq4Nl => each!(bytes, out, iq4_nl, 18, 32),
            WeightType::Mxfp4 => each!(bytes, out, mxfp4, 17, 32),
            WeightType::Nvfp4 => each!(bytes, out, nvfp4, 36, 64),
            WeightType::Iq4Xs => each!(bytes, out, iq4_xs, 136, LARGE),
            WeightType::Iq2Xxs => each!(bytes, out, iq2_xxs, 66, LARGE),
            WeightType::Iq2Xs => each!(bytes, out, iq2_xs, 74, LARGE),
            WeightType::Iq2S => each!(bytes, out, iq2_s, 82, LARGE),
            WeightType::Iq3Xxs => each!(bytes, out, iq3_xxs, 98, LARGE),
            WeightType::Iq3S => each!(bytes, out, iq3_s, 110, LARGE),
            WeightType::Iq1S => each!(bytes, out, iq1_s, 50, LARGE),
            WeightType::Iq1M => each!(bytes, out, iq1_m, 56, LARGE),
            WeightType::Tq1_0 => each!(bytes, out, tq1_0, 54, LARGE),
            WeightType::Tq2_0 => each!(bytes, out, tq2_0, 66, LARGE),
            _ => {}
        }
    }
}

/// Where numbers of several bytes stand in a block, and how many bytes each has: what another byte
/// order swaps. Nothing where the `gguf` package, whose `gguf-convert-endian` defines it, says
/// nothing of the type.
pub(super) fn numbers(kind: WeightType) -> Option<&'static [(usize, usize)]> {
    Some(match kind {
        WeightType::F32 => &[(0, 4)],
        WeightType::F16 | WeightType::BF16 | WeightType::Q4_0 | WeightType::Q8_0 => &[(0, 2)],
        WeightType::Q4K => &[(0, 2), (2, 2)],
        WeightType::Q6K => &[(208, 2)],
        WeightType::Mxfp4 | WeightType::Nvfp4 => &[],
        _ => return None,
    })
}

/// Whole blocks in the other byte order.
pub(super) fn swapped(kind: WeightType, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        for &(at, size) in numbers(kind).unwrap_or(&[]) {
            block[at..at + size].reverse();
        }
    }
    bytes
}

/// The f32 of a binary16, in operations that need no table and no branch: the exponent is
/// moved by a product that is exact, subnormals too.
#[inline(always)]
fn half_value(bits: u16) -> f32 {
    let rest = u32::from(bits & 0x7fff) << 13;
    let finite = f32::from_bits(rest) * f32::from_bits((127 + 112) << 23);
    let whole = if bits & 0x7c00 == 0x7c00 { rest | 0x7f80_0000 } else { finite.to_bits() };
    f32::from_bits(whole | u32::from(bits & 0x8000) << 16)
}

#[inline(always)]
fn half(bytes: &[u8], at: usize) -> f32 {
    half_value(word(bytes, at))
}

/// Eight bytes as one word, whose bytes are then changed together: a loop over so few bytes is
/// written out one by one by the compiler.
#[inline(always)]
fn eight(bytes: &[u8], at: usize) -> u64 {
    u64::from(long(bytes, at)) | u64::from(long(bytes, at + 4)) << 32
}

/// The same byte eight times.
const fn each_byte(byte: u8) -> u64 {
    byte as u64 * 0x0101_0101_0101_0101
}

/// The low and the high nibbles of 16 bytes, as 32 codes.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    let mut codes = [0; 32];
    for at in [0, 8] {
        let both = eight(bytes, at);
        codes[at..at + 8].copy_from_slice(&(both & each_byte(15)).to_le_bytes());
        codes[at + 16..at + 24].copy_from_slice(&(both >> 4 & each_byte(15)).to_le_bytes());
    }
    codes
}

/// A byte's bits as eight bytes of 0 or 1, the lowest first.
#[inline(always)]
fn spread(bits: u8) -> u64 {
    let alone = each_byte(bits) & 0x8040_2010_0804_0201;
    (alone + each_byte(0x7f)) >> 7 & each_byte(1)
}

/// Adds the fifth bits of 32 codes, in their places.
#[inline(always)]
fn add_fifths(codes: &mut [u8; 32], bytes: &[u8], at: usize) {
    for (codes, &bits) in codes.as_chunks_mut::<8>().0.iter_mut().zip(&bytes[at..at + 4]) {
        *codes = (u64::from_le_bytes(*codes) | spread(bits) << 4).to_le_bytes();
    }
}

/// Codes less what stands for zero.
#[inline(always)]
fn centred<const N: usize>(codes: &[u8; N], zero: u8) -> [i8; N] {
    let mut moved = [0; N];
    for (moved, &code) in moved.iter_mut().zip(codes) {
        *moved = code.wrapping_sub(zero) as i8;
    }
    moved
}

/// Signed codes times a scale.
#[inline(always)]
fn scaled(codes: &[i8], scale: f32, out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = f32::from(code) * scale;
    }
}

/// Signed codes, the first 16 times a scale and the others times another.
#[inline(always)]
fn scaled_halves(codes: &[u8; 32], scales: [f32; 2], out: &mut [f32]) {
    let codes = centred(codes, 0);
    for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        scaled(&codes[16 * half..][..16], scales[half], out);
    }
}

/// Codes times a scale, and a minimum added.
#[inline(always)]
fn moved_by(codes: &[u8], scale: f32, minimum: f32, out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = f32::from(code) * scale + minimum;
    }
}

#[inline(always)]
fn q4_0(bytes: &[u8; 18], out: &mut [f32; 32]) {
    scaled(&centred(&nibbles(&bytes[2..]), 8), half(bytes, 0), out);
}

#[inline(always)]
fn q4_1(bytes: &[u8; 20], out: &mut [f32; 32]) {
    moved_by(&nibbles(&bytes[4..]), half(bytes, 0), half(bytes, 2), out);
}

#[inline(always)]
fn q5_0(bytes: &[u8; 22], out: &mut [f32; 32]) {
    let mut codes = nibbles(&bytes[6..]);
    add_fifths(&mut codes, bytes, 2);
    scaled(&centred(&codes, 16), half(bytes, 0), out);
}

#[inline(always)]
fn q5_1(bytes: &[u8; 24], out: &mut [f32; 32]) {
    let mut codes = nibbles(&bytes[8..]);
    add_fifths(&mut codes, bytes, 4);
    moved_by(&codes, half(bytes, 0), half(bytes, 2), out);
}

#[inline(always)]
fn q8_0(bytes: &[u8; 34], out: &mut [f32; 32]) {
    let mut codes = [0; 32];
    codes.copy_from_slice(&bytes[2..]);
    scaled(&centred(&codes, 0), half(bytes, 0), out);
}

#[inline(always)]
fn q8_k(bytes: &[u8; 292], out: &mut [f32; LARGE]) {
    let mut codes = [0; LARGE];
    codes.copy_from_slice(&bytes[4..][..LARGE]);
    scaled(&centred(&codes, 0), f32::from_bits(long(bytes, 0)), out);
}

/// Two bits of each of 64 bytes, as 256 codes: 32 bytes hold four runs of 32.
#[inline(always)]
fn crumbs(bytes: &[u8]) -> [u8; LARGE] {
    let mut codes = [0; LARGE];
    for (at, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let (run, place) = (at / 4, at % 4);
        let four = eight(bytes, run / 4 * 32 + 8 * place);
        *codes = (four >> (run % 4 * 2) & each_byte(3)).to_le_bytes();
    }
    codes
}

#[inline(always)]
fn q2_k(bytes: &[u8; 84], out: &mut [f32; LARGE]) {
    let (d, least) = (half(bytes, 80), half(bytes, 82));
    let codes = crumbs(&bytes[16..80]);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(bytes[group] & 15);
        let minimum = least * f32::from(bytes[group] >> 4);
        moved_by(&codes[16 * group..][..16], scale, -minimum, out);
    }
}

#[inline(always)]
fn q3_k(bytes: &[u8; 110], out: &mut [f32; LARGE]) {
    let d = half(bytes, 108);
    let mut codes = crumbs(&bytes[32..96]);
    // A third bit that is set keeps 4 from being taken off.
    for (at, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let third = eight(bytes, at % 4 * 8) >> (at / 4) & each_byte(1);
        *codes = (u64::from_le_bytes(*codes) | third << 2).to_le_bytes();
    }
    let codes = centred(&codes, 4);
    // Sixteen scales of six bits: four below, in the nibbles of eight bytes, two above.
    let (mut scales, below) = ([0; 16], &bytes[96..104]);
    for (at, scale) in scales.iter_mut().enumerate() {
        let four = below[at % 8] >> (at / 8 * 4) & 15;
        *scale = four | (bytes[104 + at % 4] >> (at / 4 * 2) & 3) << 4;
    }
    let scales = centred(&scales, 32);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        scaled(&codes[16 * group..][..16], d * f32::from(scales[group]), out);
    }
}

/// Eight scales and eight minimums of six bits in twelve bytes.
#[inline(always)]
fn sixes(bytes: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut minimums) = ([0; 8], [0; 8]);
    for at in 0..4 {
        (scales[at], minimums[at]) = (bytes[at] & 63, bytes[at + 4] & 63);
        let low = bytes[at + 8];
        scales[at + 4] = low & 15 | bytes[at] >> 6 << 4;
        minimums[at + 4] = low >> 4 | bytes[at + 4] >> 6 << 4;
    }
    (scales, minimums)
}

#[inline(always)]
fn q4_k(bytes: &[u8; 144], out: &mut [f32; LARGE]) {
    let (d, least) = (half(bytes, 0), half(bytes, 2));
    let (scales, minimums) = sixes(&bytes[4..16]);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let both = &bytes[16 + group / 2 * 32..][..32];
        let mut codes = [0; 32];
        for (code, byte) in codes.iter_mut().zip(both) {
            *code = byte >> (group % 2 * 4) & 15;
        }
        let minimum = least * f32::from(minimums[group]);
        moved_by(&codes, d * f32::from(scales[group]), -minimum, out);
    }
}

#[inline(always)]
fn q5_k(bytes: &[u8; 176], out: &mut [f32; LARGE]) {
    let (d, least) = (half(bytes, 0), half(bytes, 2));
    let (scales, minimums) = sixes(&bytes[4..16]);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let both = &bytes[48 + group / 2 * 32..][..32];
        let mut codes = [0; 32];
        for ((code, byte), fifth) in codes.iter_mut().zip(both).zip(&bytes[16..48]) {
            *code = byte >> (group % 2 * 4) & 15 | (fifth >> group & 1) << 4;
        }
        let minimum = least * f32::from(minimums[group]);
        moved_by(&codes, d * f32::from(scales[group]), -minimum, out);
    }
}

#[inline(always)]
fn q6_k(bytes: &[u8; 210], out: &mut [f32; LARGE]) {
    let d = half(bytes, 208);
    for (run, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // A half of the block has 64 bytes of nibbles, 32 bytes of upper bits and four runs.
        let (half, place) = (run / 4, run % 4);
        let low = &bytes[64 * half + place % 2 * 32..][..32];
        let high = &bytes[128 + 32 * half..][..32];
        let mut codes = [0; 32];
        for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
            *code = low >> (place / 2 * 4) & 15 | (high >> (2 * place) & 3) << 4;
        }
        let codes = centred(&codes, 32);
        for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = d * f32::from(bytes[192 + 2 * run + part] as i8);
            scaled(&codes[16 * part..][..16], scale, out);
        }
    }
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

/// One entry of a table of `width` values.
#[inline(always)]
fn grid(table: usize, width: usize, index: usize) -> &'static [u8] {
    &GRIDS[table + index * width..][..width]
}

/// Eight values of a table, none of them zero, with the signs that bits of a byte give.
#[inline(always)]
fn with_signs(values: u64, signs: u8) -> [u8; 8] {
    let negative = spread(signs);
    // Every bit is turned and one is added: no byte is zero, so nothing is carried.
    ((values ^ (negative * 255)) + negative).to_le_bytes()
}

/// Eight bytes of a table.
#[inline(always)]
fn eight_of(table: usize, index: usize) -> u64 {
    eight(&GRIDS[table + 8 * index..][..8], 0)
}

/// Four bytes of a table.
#[inline(always)]
fn four_of(table: usize, index: usize) -> u64 {
    long(&GRIDS[table + 4 * index..][..4], 0).into()
}

#[inline(always)]
fn pattern(index: u32) -> u8 {
    GRIDS[SIGNS + (index & 127) as usize]
}

#[inline(always)]
fn iq4_nl(bytes: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(bytes, 0);
    for (at, &code) in bytes[2..18].iter().enumerate() {
        out[at] = d * f32::from(IQ4[usize::from(code & 15)]);
        out[at + 16] = d * f32::from(IQ4[usize::from(code >> 4)]);
    }
}

#[inline(always)]
fn iq4_xs(bytes: &[u8; 136], out: &mut [f32; LARGE]) {
    let (d, high) = (half(bytes, 0), word(bytes, 2));
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let low = bytes[4 + part / 2] >> (4 * (part % 2)) & 15;
        let scale = i32::from(low) | i32::from(high >> (2 * part) & 3) << 4;
        let dl = d * (scale - 32) as f32;
        for (at, &code) in bytes[8 + 16 * part..][..16].iter().enumerate() {
            out[at] = dl * f32::from(IQ4[usize::from(code & 15)]);
            out[at + 16] = dl * f32::from(IQ4[usize::from(code >> 4)]);
        }
    }
}

#[inline(always)]
fn mxfp4(bytes: &[u8; 17], out: &mut [f32; 32]) {
    // Half of 2^(e - 127), since the values stand doubled.
    let d = match bytes[0] {
        0 => f32::from_bits(0x0020_0000),
        1 => f32::from_bits(0x0040_0000),
        e => f32::from_bits(u32::from(e - 1) << 23),
    };
    for (at, &code) in bytes[1..17].iter().enumerate() {
        out[at] = d * f32::from(E2M1[usize::from(code & 15)]);
        out[at + 16] = d * f32::from(E2M1[usize::from(code >> 4)]);
    }
}

#[inline(always)]
fn nvfp4(bytes: &[u8; 36], out: &mut [f32; 64]) {
    let (scales, codes) = bytes.split_at(4);
    for (part, out) in out.chunks_exact_mut(16).enumerate() {
        let d = half_of_e4m3(scales[part]);
        for (at, &code) in codes[8 * part..][..8].iter().enumerate() {
            out[at] = d * f32::from(E2M1[usize::from(code & 15)]);
            out[at + 8] = d * f32::from(E2M1[usize::from(code >> 4)]);
        }
    }
}

/// Half the value of an E4M3 code, since the values stand doubled. Its sign counts for nothing, and
/// its NaN is 0.
#[inline(always)]
fn half_of_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (code >> 3 & 15, f32::from(code & 7));
    match (code, exponent) {
        (0x7f, _) => 0.0,
        // In units of 2^-10.
        (_, 0) => mantissa / 1024.0,
        // 2^(exponent - 8), half of what the bias of 7 makes of it.
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((u32::from(exponent) + 127 - 8) << 23),
    }
}

#[inline(always)]
fn iq2_xxs(bytes: &[u8; 66], out: &mut [f32; LARGE]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let at = 2 + 8 * part;
        let rest = long(bytes, at + 4);
        let scale = d * (0.5 + (rest >> 28) as f32) * 0.25;
        let mut codes = [0; 32];
        for (group, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let values = eight_of(IQ2_XXS, bytes[at + group].into());
            *codes = with_signs(values, pattern(rest >> (7 * group)));
        }
        scaled(&centred(&codes, 0), scale, out);
    }
}

/// Two scales of 4 bits.
#[inline(always)]
fn scales(d: f32, byte: u8, unit: f32) -> [f32; 2] {
    [byte & 15, byte >> 4].map(|scale| d * (0.5 + f32::from(scale)) * unit)
}

#[inline(always)]
fn iq2_xs(bytes: &[u8; 74], out: &mut [f32; LARGE]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let scales = scales(d, bytes[66 + part], 0.25);
        let mut codes = [0; 32];
        for (group, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let code = word(bytes, 2 + 8 * part + 2 * group);
            let values = eight_of(IQ2_XS, usize::from(code & 511));
            *codes = with_signs(values, pattern(u32::from(code >> 9)));
        }
        scaled_halves(&codes, scales, out);
    }
}

#[inline(always)]
fn iq2_s(bytes: &[u8; 82], out: &mut [f32; LARGE]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (high, scales) = (bytes[66 + part], scales(d, bytes[74 + part], 0.25));
        let mut codes = [0; 32];
        for (group, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let at = 4 * part + group;
            let index = usize::from(bytes[2 + at]) | usize::from(high >> (2 * group) & 3) << 8;
            *codes = with_signs(eight_of(IQ2_S, index), bytes[34 + at]);
        }
        scaled_halves(&codes, scales, out);
    }
}

#[inline(always)]
fn iq3_xxs(bytes: &[u8; 98], out: &mut [f32; LARGE]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let rest = long(bytes, 66 + 4 * part);
        let scale = d * (0.5 + (rest >> 28) as f32) * 0.5;
        let mut codes = [0; 32];
        for (group, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let of = |side: usize| four_of(IQ3_XXS, bytes[2 + 8 * part + 2 * group + side].into());
            *codes = with_signs(of(0) | of(1) << 32, pattern(rest >> (7 * group)));
        }
        scaled(&centred(&codes, 0), scale, out);
    }
}

#[inline(always)]
fn iq3_s(bytes: &[u8; 110], out: &mut [f32; LARGE]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let scale = bytes[106 + part / 2] >> (4 * (part % 2)) & 15;
        let scale = d * f32::from(1 + 2 * scale);
        let high = usize::from(bytes[66 + part]);
        let mut codes = [0; 32];
        for (group, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let of = |place: usize| {
                let low = usize::from(bytes[2 + 8 * part + place]);
                four_of(IQ3_S, low | (high >> place & 1) << 8)
            };
            let values = of(2 * group) | of(2 * group + 1) << 32;
            *codes = with_signs(values, bytes[74 + 4 * part + group]);
        }
        scaled(&centred(&codes, 0), scale, out);
    }
}

/// Eight values of IQ1's table, all moved by the same share.
#[inline(always)]
fn moved(scale: f32, index: usize, down: bool, out: &mut [f32]) {
    let delta = if down { -0.125 } else { 0.125 };
    for (out, &value) in out.iter_mut().zip(grid(IQ1_S, 8, index)) {
        *out = scale * (f32::from(value as i8) + delta);
    }
}

#[inline(always)]
fn iq1_s(bytes: &[u8; 50], out: &mut [f32; LARGE]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let high = word(bytes, 34 + 2 * part);
        let scale = d * f32::from(2 * (high >> 12 & 7) + 1);
        for (group, out) in out.chunks_exact_mut(8).enumerate() {
            let code = bytes[2 + 4 * part + group];
            let index = usize::from(code) | usize::from(high >> (3 * group) & 7) << 8;
            moved(scale, index, high & 0x8000 != 0, out);
        }
    }
}

#[inline(always)]
fn iq1_m(bytes: &[u8; 56], out: &mut [f32; LARGE]) {
    let scales: [u16; 4] = std::array::from_fn(|place| word(bytes, 48 + 2 * place));
    let d = scales.iter().enumerate().fold(0, |d, (place, s)| d | (s >> 12) << (4 * place));
    let d = half_value(d);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        for (group, out) in out.chunks_exact_mut(8).enumerate() {
            let scale = scales[part / 2] >> (6 * (part % 2) + 3 * (group / 2)) & 7;
            let high = bytes[32 + 2 * part + group / 2] >> (4 * (group % 2));
            let index = usize::from(bytes[4 * part + group]) | usize::from(high & 7) << 8;
            moved(d * f32::from(2 * scale + 1), index, high & 8 != 0, out);
        }
    }
}

/// The digit of a byte that five ternary digits share.
#[inline(always)]
fn digit(byte: u8, place: usize) -> f32 {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let moved = byte.wrapping_mul(POWERS[place]);
    f32::from((u16::from(moved) * 3) >> 8) - 1.0
}

#[inline(always)]
fn tq1_0(bytes: &[u8; 54], out: &mut [f32; LARGE]) {
    let d = half(bytes, 52);
    let mut values = out.iter_mut();
    for (codes, digits) in [(&bytes[..32], 5), (&bytes[32..48], 5), (&bytes[48..52], 4)] {
        for place in 0..digits {
            for (code, value) in codes.iter().zip(&mut values) {
                *value = digit(*code, place) * d;
            }
        }
    }
}

#[inline(always)]
fn tq2_0(bytes: &[u8; 66], out: &mut [f32; LARGE]) {
    let d = half(bytes, 64);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        for (place, out) in out.chunks_exact_mut(32).enumerate() {
            for (out, code) in out.iter_mut().zip(&bytes[32 * half..]) {
                *out = (f32::from(code >> (2 * place) & 3) - 1.0) * d;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_binary16_has_its_f32() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_value(bits), half::f16::from_bits(bits).to_f32());
            let same = ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan();
            assert!(same, "{bits:#06x}: {ours} is not {theirs}");
        }
    }
}
