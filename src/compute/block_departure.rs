//! Departures of block-scaled operands: what a wrong reading of their elements or scales makes of them.
//!
//! Planted bugs and the fingerprints that recognise them share these; which of them is a bug neither
//! knows here. An operand of another kind is left as it is.

use super::departure::{Converted, recoded};
use super::emulated::gemm::Scales;
use super::emulated::quantize::BlockScales;
use crate::block_format::ScaleCodec;
use crate::dtype::Format;

/// The scales of a block-scaled operand.
fn blocks_of<'a>(operand: &'a Converted<'_>) -> Option<&'a BlockScales> {
    match &operand.scales {
        Scales::Blocks(scales) => Some(scales),
        _ => None,
    }
}

/// The two codes of each byte of 4-bit elements exchanged.
pub fn nibbles_exchanged(operand: Converted<'_>) -> Converted<'_> {
    let format = operand.codes.format();
    let even = operand.codes.width().is_multiple_of(2);
    if format != Format::E2m1 || !even {
        return operand;
    }
    let own = &operand.codes;
    let codes = recoded(own, format, |row, column, _| own.row(row).get(column ^ 1));
    Converted { codes, ..operand }
}

/// From which block the scale of a block is taken: of `(row, block)` in a grid of `rows` by
/// `blocks`, likewise.
pub type BlockOrder = fn(usize, usize, usize, usize) -> (usize, usize);

/// Scales in another order, elements as they are.
pub fn scales_in_order<'v>(operand: Converted<'v>, order: BlockOrder) -> Converted<'v> {
    let Some(scales) = blocks_of(&operand) else { return operand };
    let (rows, blocks) = (operand.codes.rows(), scales.blocks);
    let places = (0..rows).flat_map(|row| (0..blocks).map(move |block| (row, block)));
    let taken = places.map(|(row, block)| {
        let (from_row, from_block) = order(row, block, rows, blocks);
        scales.of_row(from_row.min(rows - 1))[from_block.min(blocks - 1)]
    });
    let scales = BlockScales { codes: taken.collect(), ..scales.clone() };
    Converted { scales: Scales::Blocks(scales), ..operand }
}

/// The scale of the whole operand left out.
pub fn whole_scale_missing(operand: Converted<'_>) -> Converted<'_> {
    let Some(scales) = blocks_of(&operand) else { return operand };
    let scales = BlockScales { whole: 1.0, ..scales.clone() };
    Converted { scales: Scales::Blocks(scales), ..operand }
}

/// Converted again with powers of two that are rounded up, so that no element saturates: the least
/// one that is not below `absmax / largest`, as `cvt.rp.satfinite.ue8m0x2` gives it.
pub fn powers_rounded_up(operand: Converted<'_>) -> Converted<'_> {
    let Some(scales) = blocks_of(&operand) else { return operand };
    let format = scales.format;
    if format.scales() != ScaleCodec::Ue8m0 {
        return operand;
    }
    let (width, block) = (operand.codes.width(), format.block());
    let mut codes = vec![0u8; operand.values.len()];
    let mut of_blocks = Vec::with_capacity(scales.codes.len());
    let rows = operand.values.chunks_exact(width).zip(codes.chunks_exact_mut(width));
    for (values, codes) in rows {
        for (values, codes) in values.chunks(block).zip(codes.chunks_mut(block)) {
            let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
            let quotient = most / format.element().max_finite();
            let (field, fraction) =
                (quotient.to_bits() >> 23 & 0xff, quotient.to_bits() & 0x7f_ffff);
            let code = (field + u32::from(fraction != 0)).min(254) as u8;
            let finite = values.iter().all(|value| value.is_finite());
            of_blocks.push(if finite { code } else { format.scales().nan() });
            format.encode_block(values, code, scales.whole, codes);
        }
    }
    let scales = BlockScales { codes: of_blocks, ..scales.clone() };
    let element = operand.codes.format();
    let codes =
        recoded(&operand.codes, element, |row, column, _| codes[row * width + column].into());
    Converted { codes, scales: Scales::Blocks(scales), ..operand }
}

/// Every block's scale with an exponent that is one larger: a bias that is one too small.
pub fn exponents_one_larger(operand: Converted<'_>) -> Converted<'_> {
    let Some(scales) = blocks_of(&operand) else { return operand };
    let codec = scales.format.scales();
    let step = 1u8 << codec.fraction_bits();
    let most = codec.nan() - 1;
    let codes = scales.codes.iter().map(|code| {
        if codec.is_number(*code) { code.saturating_add(step).min(most) } else { *code }
    });
    let scales = BlockScales { codes: codes.collect(), ..scales.clone() };
    Converted { scales: Scales::Blocks(scales), ..operand }
}
