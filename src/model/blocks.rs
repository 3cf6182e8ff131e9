//! Codecs of ggml's blocks that no library here has: IQ, TQ and MXFP4.
//!
//! Each decodes one block to f32 as ggml's `dequantize_row_*` and the `gguf` package do, operation
//! by operation. It knows bytes and values: no files, no tensors. The tables of the IQ formats are
//! data of the format (`scripts/make-grids.py`).

use half::f16;

use super::weights::WeightType;

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
const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Values and bytes of a block, where it is one of these.
pub(super) fn size(kind: WeightType) -> Option<(usize, usize)> {
    Some(match kind {
        WeightType::Iq4Nl => (32, 18),
        WeightType::Mxfp4 => (32, 17),
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
    let (width, length) = size(kind)?;
    let block: fn(&[u8], &mut [f32]) = match kind {
        WeightType::Iq4Nl => iq4_nl,
        WeightType::Mxfp4 => mxfp4,
        WeightType::Iq4Xs => iq4_xs,
        WeightType::Iq2Xxs => iq2_xxs,
        WeightType::Iq2Xs => iq2_xs,
        WeightType::Iq2S => iq2_s,
        WeightType::Iq3Xxs => iq3_xxs,
        WeightType::Iq3S => iq3_s,
        WeightType::Iq1S => iq1_s,
        WeightType::Iq1M => iq1_m,
        WeightType::Tq1_0 => tq1_0,
        WeightType::Tq2_0 => tq2_0,
        _ => return None,
    };
    for (bytes, out) in bytes.chunks_exact(length).zip(out.chunks_exact_mut(width)) {
        block(bytes, out);
    }
    Some(())
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

/// One entry of a table of `width` values.
fn grid(table: usize, width: usize, index: usize) -> &'static [u8] {
    &GRIDS[table + index * width..][..width]
}

/// Values of a table with the signs that bits of a byte give, times a scale.
fn signed(scale: f32, values: &[u8], signs: u8, out: &mut [f32]) {
    for (bit, (out, &value)) in out.iter_mut().zip(values).enumerate() {
        let sign = if signs >> bit & 1 == 1 { -1.0 } else { 1.0 };
        *out = scale * f32::from(value) * sign;
    }
}

fn pattern(index: u32) -> u8 {
    GRIDS[SIGNS + (index & 127) as usize]
}

fn iq4_nl(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (at, &code) in bytes[2..18].iter().enumerate() {
        out[at] = d * f32::from(IQ4[usize::from(code & 15)]);
        out[at + 16] = d * f32::from(IQ4[usize::from(code >> 4)]);
    }
}

fn iq4_xs(bytes: &[u8], out: &mut [f32]) {
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

fn mxfp4(bytes: &[u8], out: &mut [f32]) {
    // Half of 2^(e - 127), since the values stand doubled.
    let d = match bytes[0] {
        0 => f32::from_bits(0x0020_0000),
        1 => f32::from_bits(0x0040_0000),
        e => f32::from_bits(u32::from(e - 1) << 23),
    };
    for (at, &code) in bytes[1..17].iter().enumerate() {
        out[at] = d * f32::from(MXFP4[usize::from(code & 15)]);
        out[at + 16] = d * f32::from(MXFP4[usize::from(code >> 4)]);
    }
}

fn iq2_xxs(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let at = 2 + 8 * part;
        let rest = long(bytes, at + 4);
        let scale = d * (0.5 + (rest >> 28) as f32) * 0.25;
        for (group, out) in out.chunks_exact_mut(8).enumerate() {
            let values = grid(IQ2_XXS, 8, bytes[at + group].into());
            signed(scale, values, pattern(rest >> (7 * group)), out);
        }
    }
}

/// Two scales of 4 bits.
fn scales(d: f32, byte: u8, unit: f32) -> [f32; 2] {
    [byte & 15, byte >> 4].map(|scale| d * (0.5 + f32::from(scale)) * unit)
}

fn iq2_xs(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let scales = scales(d, bytes[66 + part], 0.25);
        for (group, out) in out.chunks_exact_mut(8).enumerate() {
            let code = word(bytes, 2 + 8 * part + 2 * group);
            let values = grid(IQ2_XS, 8, usize::from(code & 511));
            signed(scales[group / 2], values, pattern(u32::from(code >> 9)), out);
        }
    }
}

fn iq2_s(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (high, scales) = (bytes[66 + part], scales(d, bytes[74 + part], 0.25));
        for (group, out) in out.chunks_exact_mut(8).enumerate() {
            let at = 4 * part + group;
            let index = usize::from(bytes[2 + at]) | usize::from(high >> (2 * group) & 3) << 8;
            signed(scales[group / 2], grid(IQ2_S, 8, index), bytes[34 + at], out);
        }
    }
}

fn iq3_xxs(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let rest = long(bytes, 66 + 4 * part);
        let scale = d * (0.5 + (rest >> 28) as f32) * 0.5;
        for (group, out) in out.chunks_exact_mut(8).enumerate() {
            let signs = pattern(rest >> (7 * group));
            for (side, out) in out.chunks_exact_mut(4).enumerate() {
                let code = bytes[2 + 8 * part + 2 * group + side];
                signed(scale, grid(IQ3_XXS, 4, code.into()), signs >> (4 * side), out);
            }
        }
    }
}

fn iq3_s(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let scale = bytes[106 + part / 2] >> (4 * (part % 2)) & 15;
        let scale = d * f32::from(1 + 2 * scale);
        let high = usize::from(bytes[66 + part]);
        for (group, out) in out.chunks_exact_mut(8).enumerate() {
            let signs = bytes[74 + 4 * part + group];
            for (side, out) in out.chunks_exact_mut(4).enumerate() {
                let place = 2 * group + side;
                let index = usize::from(bytes[2 + 8 * part + place]) | (high >> place & 1) << 8;
                signed(scale, grid(IQ3_S, 4, index), signs >> (4 * side), out);
            }
        }
    }
}

/// Eight values of IQ1's table, all moved by the same share.
fn moved(scale: f32, index: usize, down: bool, out: &mut [f32]) {
    let delta = if down { -0.125 } else { 0.125 };
    for (out, &value) in out.iter_mut().zip(grid(IQ1_S, 8, index)) {
        *out = scale * (f32::from(value as i8) + delta);
    }
}

fn iq1_s(bytes: &[u8], out: &mut [f32]) {
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

fn iq1_m(bytes: &[u8], out: &mut [f32]) {
    let scales: [u16; 4] = std::array::from_fn(|place| word(bytes, 48 + 2 * place));
    let d = scales.iter().enumerate().fold(0, |d, (place, s)| d | (s >> 12) << (4 * place));
    let d = f16::from_bits(d).to_f32();
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
fn digit(byte: u8, place: usize) -> f32 {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let moved = byte.wrapping_mul(POWERS[place]);
    f32::from((u16::from(moved) * 3) >> 8) - 1.0
}

fn tq1_0(bytes: &[u8], out: &mut [f32]) {
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

fn tq2_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 64);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        for (place, out) in out.chunks_exact_mut(32).enumerate() {
            for (out, code) in out.iter_mut().zip(&bytes[32 * half..]) {
                *out = (f32::from(code >> (2 * place) & 3) - 1.0) * d;
            }
        }
    }
}
