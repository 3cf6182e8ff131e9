//! NumPy's `.npy`, and `.npz`, which is a zip archive of them.
//!
//! Format: NumPy Enhancement Proposal 1. Only little-endian C order is read;
//! another order is refused, not converted. Archives of `numpy.savez` and of
//! `numpy.savez_compressed` are read.

use std::io::{Cursor, Read};
use std::ops::Range;

use super::{Element, Entry, Place};
use crate::dtype::Format;

/// The largest member of an archive that is unpacked.
const LARGEST_MEMBER: u64 = 16 << 30;
/// A header is one short line.
const LARGEST_HEADER: usize = 64 << 10;

/// Element, shape and place of the data of a `.npy` file.
pub(super) fn parse(file: &[u8]) -> Result<(Element, Vec<usize>, Range<usize>), String> {
    let cut_off = || "it ends within its header".to_owned();
    let rest = file.strip_prefix(b"\x93NUMPY").ok_or("it does not begin as a NumPy file")?;
    let major = *rest.first().ok_or_else(cut_off)?;
    let (length, start) = if major == 1 {
        let bytes = rest.get(2..4).ok_or_else(cut_off)?;
        (usize::from(u16::from_le_bytes([bytes[0], bytes[1]])), 10)
    } else {
        let bytes = rest.get(2..6).ok_or_else(cut_off)?;
        (u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize, 12)
    };
    let end = start + length;
    let header = file.get(start..end).filter(|_| length <= LARGEST_HEADER).ok_or_else(cut_off)?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is no text".to_owned())?;
    let (element, shape) = parse_header(header)?;
    Ok((element, shape, end..file.len()))
}

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`.
fn parse_header(header: &str) -> Result<(Element, Vec<usize>), String> {
    let value = |key: &str| {
        let place = header.find(&format!("'{key}':"));
        let place = place.ok_or_else(|| format!("its header has no `{key}`"))?;
        Ok::<&str, String>(header[place + key.len() + 3..].trim_start())
    };
    let descr = value("descr")?;
    let descr = descr.strip_prefix('\'').and_then(|text| text.split_once('\''));
    let (descr, _) = descr.ok_or("it holds records, not one type of number")?;
    let element = match descr {
        "<f4" => Element::Format(Format::F32),
        "<f2" => Element::Format(Format::F16),
        "<f8" => Element::F64,
        // NumPy has no bf16 and no FP8: libraries that add them store them as plain bytes.
        "|u1" | "|i1" | "|V1" | "<V1" | "<f1" => Element::Words(1),
        "<u2" | "<i2" | "|V2" | "<V2" => Element::Words(2),
        "<u4" | "<i4" => Element::Words(4),
        "<u8" | "<i8" => Element::Words(8),
        other => {
            return Err(format!(
                "its type `{other}` is not little-endian numbers; save it as `<f4`, `<f2` or `<f8`"
            ));
        }
    };
    if !value("fortran_order")?.starts_with("False") {
        return Err("it is in Fortran order; save it with numpy.ascontiguousarray".to_owned());
    }
    let shape = value("shape")?.strip_prefix('(').and_then(|text| text.split_once(')'));
    let (shape, _) = shape.ok_or("its header has no shape")?;
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty());
    let sizes: Result<Vec<usize>, _> = sizes.map(str::parse).collect();
    Ok((element, sizes.map_err(|_| format!("its shape ({shape}) is no list of sizes"))?))
}

/// The tensors of a `.npz` archive, by their names without `.npy`.
pub(super) fn archive_entries(file: &[u8]) -> Result<Vec<Entry>, String> {
    let mut archive = zip::ZipArchive::new(Cursor::new(file)).map_err(|error| error.to_string())?;
    let mut entries = Vec::new();
    for index in 0..archive.len() {
        let mut member = archive.by_index(index).map_err(|error| {
            format!("{error}; save it with numpy.savez or numpy.savez_compressed")
        })?;
        let name = member.name().map_err(|error| error.to_string())?;
        let Some(name) = name.strip_suffix(".npy").map(str::to_owned) else { continue };
        let mut start = Vec::new();
        let most = (LARGEST_HEADER + 12) as u64;
        let read = member.by_ref().take(most).read_to_end(&mut start);
        read.map_err(|error| format!("`{name}`: {error}"))?;
        let (element, shape, _) =
            parse(&start).map_err(|problem| format!("`{name}`: {problem}"))?;
        entries.push(Entry { name, element, shape, place: Place::Member, map: 0 });
    }
    Ok(entries)
}

/// The data of a member of an archive.
pub(super) fn unpack(file: &[u8], name: &str) -> Result<Vec<u8>, String> {
    let mut archive = zip::ZipArchive::new(Cursor::new(file)).map_err(|error| error.to_string())?;
    let member = archive.by_name(&format!("{name}.npy")).map_err(|error| error.to_string())?;
    if member.size() > LARGEST_MEMBER {
        return Err(format!("it says it has {} bytes", member.size()));
    }
    let mut member = member;
    let mut bytes = Vec::new();
    let mut read = |most: u64, bytes: &mut Vec<u8>| {
        member.by_ref().take(most).read_to_end(bytes).map_err(|error| error.to_string())
    };
    read((LARGEST_HEADER + 12) as u64, &mut bytes)?;
    let (element, shape, data) = parse(&bytes)?;
    bytes.drain(..data.start);
    // One byte more than the shape needs tells that there are too many. A small file may
    // unpack to more than any memory holds.
    let needed = shape.iter().try_fold(element.size(), |size, next| size.checked_mul(*next));
    let needed = needed.ok_or_else(|| format!("its shape {shape:?} is too large"))?;
    crate::memory::ask(needed as u64)?;
    let more = (needed as u64 + 1).saturating_sub(bytes.len() as u64);
    read(more, &mut bytes)?;
    Ok(bytes)
}
