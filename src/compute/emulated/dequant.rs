//! From the blocks of a GGUF tensor to f32 values, as the GPU kernel decodes them.
//!
//! It knows the block layouts and nothing of files, shapes or threads. It shares no
//! code with the reference arm, whose codecs are `model/blocks.rs`: the two are written apart
//! so that one can check the other.
//!
//! The arithmetic is that of ggml's `dequantize_row_*` (`ggml-quants.c`): integer
//! codes, exact conversions of integers and halves to f32, then IEEE f32 operations
//! to nearest even with subnormals kept, each rounded by itself. Where the scale is
//! a half, all products are exact: 11 bits of `d` and at most 12 of a group's scale
//! and a code make no more than 23 of an f32's 24 bits. So only the last subtraction
//! or addition rounds there, and a compiler that fuses it changes no bit.

use half::f16;

use crate::model::WeightType;

/// Decodes whole blocks: `bytes` as they stand in the file, one value of `out` each.
///
/// Values are the same bits on every machine, but for the payload of a NaN.
///
/// # Panics
/// If `bytes` is not whole blocks of `kind`, or `out` does not have one place for each
/// of their values. Both are bugs of the caller: a checked tensor's rows always fit.
pub fn dequantise_row(kind: WeightType, bytes: &[u8], out: &mut [f32]) {
    match kind {
        WeightType::F32 => each_block(bytes, out, f32_value),
        WeightType::F16 => each_block(bytes, out, f16_value),
        WeightType::BF16 => each_block(bytes, out, bf16_value),
        WeightType::Q4_0 => each_block(bytes, out, q4_0),
        WeightType::Q4_1 => each_block(bytes, out, q4_1),
        WeightType::Q5_0 => each_block(bytes, out, q5_0),
        WeightType::Q5_1 => each_block(bytes, out, q5_1),
        WeightType::Q8_0 => each_block(bytes, out, q8_0),
        WeightType::Q2K => each_block(bytes, out, q2_k),
        WeightType::Q3K => each_block(bytes, out, q3_k),
        WeightType::Q4K => each_block(bytes, out, q4_k),
        WeightType::Q5K => each_block(bytes, out, q5_k),
        WeightType::Q6K => each_block(bytes, out, q6_k),
        WeightType::Q8K => each_block(bytes, out, q8_k),
        WeightType::Iq4Nl
        | WeightType::Mxfp4
        | WeightType::Nvfp4
        | WeightType::Iq4Xs
        | WeightType::Iq2Xxs
        | WeightType::Iq2Xs
        | WeightType::Iq2S
        | WeightType::Iq3Xxs
        | WeightType::Iq3S
        | WeightType::Iq1S
        | WeightType::Iq1M
        | WeightType::Tq1_0
        | WeightType::Tq2_0
        | WeightType::E4m3
        | WeightType::E5m2
        | WeightType::E2m1
        | WeightType::F64
        | WeightType::I8
        | WeightType::E8m0
        | WeightType::Packed(_)
        | WeightType::Nf4
        | WeightType::Fp4 => {
            unreachable!("`Weight::decode_rows` decodes these")
        }
    }
}

/// Runs `decode` over blocks of `BYTES` bytes that hold `WIDTH` values each.
fn each_block<const BYTES: usize, const WIDTH: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; WIDTH]),
) {
    let (blocks, rest) = bytes.as_chunks::<BYTES>();
    assert!(rest.is_empty(), "{} bytes are not whole blocks of {BYTES}", bytes.len());
    assert_eq!(out.len(), blocks.len() * WIDTH, "{} blocks of {WIDTH} values", blocks.len());
    for (block, out) in blocks.iter().zip(out.as_chunks_mut::<WIDTH>().0) {
        decode(block, out);
    }
}

/// F32, 4 bytes, 1 value: the value.
fn f32_value(block: &[u8; 4], out: &mut [f32; 1]) {
    out[0] = f32::from_le_bytes(*block);
}

/// F16, 2 bytes, 1 value: a half.
fn f16_value(block: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = half_at(block, 0);
}

/// BF16, 2 bytes, 1 value: the upper half of a binary32.
fn bf16_value(block: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = f32::from_bits(u32::from(u16::from_le_bytes(*block)) << 16);
}

/// Q4_0, 18 bytes, 32 values: half `d`; 16 bytes of nibbles, low ones first.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, y) in out.iter_mut().enumerate() {
        let code = signed(nibble(&block[2..], i)) - 8;
        *y = f32::from(code) * d;
    }
}

/// Q4_1, 20 bytes, 32 values: half `d`; half `m`; 16 bytes of nibbles, low ones first.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let m = half_at(block, 2);
    for (i, y) in out.iter_mut().enumerate() {
        let code = nibble(&block[4..], i);
        let product = f32::from(code) * d;
        *y = product + m;
    }
}

/// Q5_0, 22 bytes, 32 values: half `d`; 32 fifth bits; 16 bytes of nibbles, low ones first.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, y) in out.iter_mut().enumerate() {
        let code = signed(nibble(&block[6..], i) | (bit(&block[2..6], i) << 4)) - 16;
        *y = f32::from(code) * d;
    }
}

/// Q5_1, 24 bytes, 32 values: half `d`; half `m`; 32 fifth bits; 16 bytes of nibbles.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let m = half_at(block, 2);
    for (i, y) in out.iter_mut().enumerate() {
        let code = nibble(&block[8..], i) | (bit(&block[4..8], i) << 4);
        let product = f32::from(code) * d;
        *y = product + m;
    }
}

/// Q8_0, 34 bytes, 32 values: half `d`; 32 signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (y, code) in out.iter_mut().zip(&block[2..]) {
        *y = f32::from(code.cast_signed()) * d;
    }
}

/// Q2_K, 84 bytes, 256 values: 16 bytes of group scale (low nibble) and minimum (high);
/// 64 bytes of 2-bit codes; half `d`; half `dmin`.
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let codes = &block[16..80];
    let d = half_at(block, 80);
    let dmin = half_at(block, 82);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(block[group] & 15);
        let minimum = dmin * f32::from(block[group] >> 4);
        for (i, y) in out.iter_mut().enumerate() {
            let product = scale * f32::from(crumb(codes, group, i));
            *y = product - minimum;
        }
    }
}

/// Q3_K, 110 bytes, 256 values: 32 bytes of third bits, which are set where 4 is not to
/// be subtracted; 64 bytes of 2-bit codes; 16 6-bit group scales in 12 bytes; half `d`.
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let third_bits = &block[..32];
    let codes = &block[32..96];
    let scales = &block[96..108];
    let d = half_at(block, 108);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Bytes 0..8 hold the lower 4 bits of two scales each, 8..12 the upper 2 of four.
        let lower = (scales[group % 8] >> (4 * (group / 8))) & 15;
        let upper = (scales[8 + group % 4] >> (2 * (group / 4))) & 3;
        let scale = d * f32::from(signed(lower | (upper << 4)) - 32);
        for (i, y) in out.iter_mut().enumerate() {
            // Bit b of byte j belongs to value j of the b-th run of 32 values.
            let third = (third_bits[16 * (group % 2) + i] >> (group / 2)) & 1;
            let code = signed(crumb(codes, group, i) | (third << 2)) - 4;
            *y = scale * f32::from(code);
        }
    }
}

/// Q4_K, 144 bytes, 256 values: half `d`; half `dmin`; 8 6-bit pairs of group scale and
/// minimum in 12 bytes; 128 bytes of nibbles, of each 32 bytes low ones first.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let d = half_at(block, 0);
    let dmin = half_at(block, 2);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], group);
        let scale = d * f32::from(scale);
        let minimum = dmin * f32::from(minimum);
        for (i, y) in out.iter_mut().enumerate() {
            let code = (block[16 + 32 * (group / 2) + i] >> (4 * (group % 2))) & 15;
            let product = scale * f32::from(code);
            *y = product - minimum;
        }
    }
}

/// Q5_K, 176 bytes, 256 values: half `d`; half `dmin`; 8 6-bit pairs of group scale and
/// minimum in 12 bytes; 32 bytes of fifth bits; 128 bytes of nibbles as in Q4_K.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let d = half_at(block, 0);
    let dmin = half_at(block, 2);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], group);
        let scale = d * f32::from(scale);
        let minimum = dmin * f32::from(minimum);
        for (i, y) in out.iter_mut().enumerate() {
            let lower = (block[48 + 32 * (group / 2) + i] >> (4 * (group % 2))) & 15;
            let fifth = (block[16 + i] >> group) & 1;
            let product = scale * f32::from(lower | (fifth << 4));
            *y = product - minimum;
        }
    }
}

/// Q6_K, 210 bytes, 256 values: 128 bytes of lower nibbles; 64 bytes of upper 2 bits;
/// 16 signed bytes of group scale; half `d`.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let nibbles = &block[..128];
    let scales = &block[192..208];
    let d = half_at(block, 208);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[group].cast_signed());
        // A half of the block has 64 bytes of nibbles: 64 values low, then 64 high.
        let first = 64 * (group / 8) + 16 * (group % 4);
        let shift = 4 * (group % 8 / 4);
        for (i, y) in out.iter_mut().enumerate() {
            let lower = (nibbles[first + i] >> shift) & 15;
            let code = signed(lower | (crumb(&block[128..192], group, i) << 4)) - 32;
            *y = scale * f32::from(code);
        }
    }
}

/// Q8_K, 292 bytes, 256 values: binary32 `d`; 256 signed bytes; 16 sums, not used here.
fn q8_k(block: &[u8; 292], out: &mut [f32; 256]) {
    let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    for (y, code) in out.iter_mut().zip(&block[4..260]) {
        *y = d * f32::from(code.cast_signed());
    }
}

/// The half at this byte, exactly.
fn half_at(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

/// An unsigned code, with room to subtract from it.
fn signed(code: u8) -> i16 {
    i16::from(code)
}

/// Code `i` of 32 in 16 bytes: their low nibbles, then their high ones.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    (bytes[i % 16] >> (4 * (i / 16))) & 15
}

/// Bit `i` of little-endian bytes.
fn bit(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 8] >> (i % 8)) & 1
}

/// Code `i` of a group of 16 among 256 codes of 2 bits: each 32 bytes hold 128 codes,
/// 32 in their lowest bits, 32 in the next, and so on.
fn crumb(bytes: &[u8], group: usize, i: usize) -> u8 {
    (bytes[32 * (group / 8) + 16 * (group % 2) + i] >> (2 * (group % 8 / 2))) & 3
}

/// Scale and minimum of one of 8 groups, 6 bits each. Bytes 0..4 hold the first four
/// scales, 4..8 the first four minimums, 8..12 the lower nibbles of the others, whose
/// upper 2 bits top bytes 0..8.
fn scale_and_minimum(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let lower = packed[group + 4];
    let scale = (lower & 15) | ((packed[group - 4] >> 6) << 4);
    let minimum = (lower >> 4) | ((packed[group] >> 6) << 4);
    (scale, minimum)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;
    use crate::model::Weight;

    /// The first value whose bits differ; NaNs are all one.
    fn first_difference(ours: &[f32], theirs: &[f32]) -> Option<usize> {
        assert_eq!(ours.len(), theirs.len());
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        ours.iter().zip(theirs).position(|(&a, &b)| !same(a, b))
    }

    fn ours(kind: WeightType, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; bytes.len() / kind.block_bytes() * kind.block_width()];
        dequantise_row(kind, bytes, &mut out);
        out
    }

    fn candles(kind: WeightType, bytes: &[u8]) -> Vec<f32> {
        let width = bytes.len() / kind.block_bytes() * kind.block_width();
        let weight = Weight::new("w", kind, 1, width, bytes).unwrap();
        let mut out = vec![0.0; width];
        weight.decode_rows(0..1, &mut out).unwrap();
        out
    }

    const BLOCKS: usize = 3;
    const LARGEST_BLOCK: usize = 292;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_bytes_decode_as_the_reference_decodes_them(
            bytes in prop::collection::vec(any::<u8>(), BLOCKS * LARGEST_BLOCK)
        ) {
            for kind in WeightType::ALL.into_iter().filter(|kind| kind.is_of_kernels()) {
                let bytes = &bytes[..BLOCKS * kind.block_bytes()];
                let (ours, theirs) = (ours(kind, bytes), candles(kind, bytes));
                prop_assert_eq!(first_difference(&ours, &theirs), None, "{}", kind);
            }
        }
    }

    #[test]
    fn every_half_is_decoded_as_the_reference_decodes_it() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for kind in [WeightType::F16, WeightType::BF16] {
            let (ours, theirs) = (ours(kind, &bytes), candles(kind, &bytes));
            assert_eq!(first_difference(&ours, &theirs), None, "{kind}");
        }
    }

    #[test]
    fn the_official_packages_blocks_decode_to_its_values() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blocks.safetensors");
        let file = fs::read(path).unwrap();
        let fixture = SafeTensors::deserialize(&file).unwrap();
        for kind in WeightType::ALL.into_iter().filter(|kind| kind.is_of_kernels()) {
            let blocks = fixture.tensor(&format!("{kind}.bytes")).unwrap();
            let expected = fixture.tensor(&format!("{kind}.values")).unwrap();
            let expected: Vec<f32> = expected
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect();
            let values = ours(kind, blocks.data());
            assert_eq!(first_difference(&values, &expected), None, "{kind}");
            let alive = expected.iter().filter(|v| v.is_finite() && **v != 0.0).count();
            assert!(alive > expected.len() / 2, "{kind}: the fixture shows too little");

            // The check can fail: each bit of a block, flipped in all blocks, moves a value.
            // In all, since a group whose scale is 0 hides its codes.
            let mut unused = 0;
            for position in 0..8 * kind.block_bytes() {
                let mut other = blocks.data().to_vec();
                for block in other.chunks_exact_mut(kind.block_bytes()) {
                    block[position / 8] ^= 1 << (position % 8);
                }
                unused += usize::from(first_difference(&ours(kind, &other), &expected).is_none());
            }
            let sums = if kind == WeightType::Q8K { 8 * 32 } else { 0 };
            assert_eq!(unused, sums, "{kind}: bits that no value depends on");
        }
    }

    #[test]
    #[should_panic(expected = "not whole blocks")]
    fn a_part_of_a_block_is_the_callers_bug() {
        dequantise_row(WeightType::Q4_0, &[0; 17], &mut [0.0; 32]);
    }

    #[test]
    #[should_panic(expected = "1 blocks of 32 values")]
    fn a_buffer_of_another_length_is_the_callers_bug() {
        dequantise_row(WeightType::Q4_0, &[0; 18], &mut [0.0; 31]);
    }
}
