//! Codes of block-scaled formats as files hold them: elements, and the scales of their blocks.
//!
//! It knows how bytes hold codes; which operand they are of, and what becomes of them, is the
//! caller's business.

use super::CodedTensor;
use crate::block_format::BlockFormat;
use crate::dtype::Format;

/// The format in which a file's bytes are read that hold elements.
pub fn bytes_of(format: BlockFormat) -> Format {
    let element = format.element();
    if element.is_fp8() { element } else { Format::E4m3 }
}

/// The codes of the elements, a byte each, out of a file's bytes: those of 4 bits stand two in a
/// byte, the first in the lower half. `name` is the operand's.
///
/// # Errors
/// In words, where a byte is no code of the element.
pub fn elements(
    name: &str,
    format: BlockFormat,
    stored: CodedTensor,
) -> Result<CodedTensor, String> {
    let element = format.element();
    let (width, bytes) = match element {
        Format::E2m1 => {
            let halves = stored.bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]);
            (2 * stored.width, halves.collect())
        }
        _ => (stored.width, stored.bytes),
    };
    let codes: &[u8] = &bytes;
    if let Some(at) = codes.iter().position(|code| u32::from(*code) >> element.bits() != 0) {
        return Err(format!(
            "{name} holds {:#04x} at row {}, value {}, which is no code of {} bits; {element} codes \
             stand in the low bits of a byte each",
            codes[at],
            at / width,
            at % width,
            element.bits()
        ));
    }
    Ok(CodedTensor { format: element, width, bytes, ..stored })
}

/// Refuses codes of scales that are no numbers. `name` is the operand's.
///
/// # Errors
/// In words, with the first one's place.
pub fn check_scales(name: &str, format: BlockFormat, scales: &CodedTensor) -> Result<(), String> {
    let codec = format.scales();
    match scales.bytes.iter().position(|code| !codec.is_number(*code)) {
        None => Ok(()),
        Some(at) => Err(format!(
            "the scale of {name} at row {}, block {} is NaN ({:#04x}); nothing but NaN would come \
             of it",
            at / scales.width,
            at % scales.width,
            scales.bytes[at]
        )),
    }
}
