//! Files of `torch.save`: `.pt` and `.pth`.
//!
//! Such a file is a zip archive of a pickle and of the tensors' storages, which lie in it
//! uncompressed. It knows where their bytes are; `pickle` says which tensors there are.

use std::io::{Cursor, Read};
use std::ops::Range;

use super::pickle::{self, Saved};
use super::{Element, Entry, Place};
use crate::dtype::Format;

/// The bytes with which torch began its files before version 1.6: a number as a pickle.
const BEFORE_ZIP: [u8; 5] = [0x80, 0x02, 0x8a, 0x0a, 0x6c];

/// A tensor that `expand` made repeats its values: so many bytes of it are given always, and more
/// where none is repeated more than so often.
const MOST_REPEATED: usize = 64 << 20;
const MOST_REPEATS: usize = 1024;

/// The tensors of a file, in the order in which it was saved.
pub(super) fn entries(file: &[u8]) -> Result<Vec<Entry>, String> {
    if file.starts_with(&BEFORE_ZIP) {
        return Err("a torch before 1.6 wrote it, or one that was told to; load it and save it \
                    with `torch.save(torch.load(file), file)`"
            .to_owned());
    }
    let archive = Archive::open(file)?;
    let tensors = pickle::tensors(&archive.pickle)?;
    tensors.into_iter().map(|(name, saved)| archive.entry(name, &saved)).collect()
}

struct Archive {
    pickle: Vec<u8>,
    /// Each storage's name and bytes.
    storages: std::collections::BTreeMap<String, Range<usize>>,
}

impl Archive {
    fn open(file: &[u8]) -> Result<Archive, String> {
        let whole = zip::ZipArchive::new(Cursor::new(file));
        let mut whole = whole.map_err(|error| format!("it is no archive of torch's: {error}"))?;
        let (mut pickle, mut storages) = (None, std::collections::BTreeMap::new());
        for index in 0..whole.len() {
            let member = whole.by_index(index).map_err(|error| error.to_string())?;
            let name = member.name().map_err(|error| error.to_string())?.into_owned();
            // The first folder is named after the file.
            let Some((_, name)) = name.split_once('/') else { continue };
            let name = name.to_owned();
            let start = member.data_start().and_then(|start| usize::try_from(start).ok());
            let range = start.and_then(|start| {
                let end = start.checked_add(usize::try_from(member.compressed_size()).ok()?)?;
                (end <= file.len()).then_some(start..end)
            });
            let range = range.ok_or_else(|| format!("its member `{name}` goes beyond its end"))?;
            let stored = member.compression() == zip::CompressionMethod::Stored;
            match name.as_str() {
                "data.pkl" => pickle = Some(read(member, pickle::LARGEST)?),
                "byteorder" if &file[range.clone()] == b"big" => {
                    return Err("a big-endian machine wrote it; load it on a little-endian one, \
                                and save it there"
                        .to_owned());
                }
                _ => {
                    let Some(storage) = name.strip_prefix("data/") else { continue };
                    if !stored {
                        return Err(format!(
                            "its member `{name}` is compressed, which torch does not do; save it \
                             with `torch.save`"
                        ));
                    }
                    storages.insert(storage.to_owned(), range);
                }
            }
        }
        let pickle = pickle.ok_or(
            "it has no member `data.pkl`, as a file of `torch.save` has; save it with `torch.save`",
        )?;
        Ok(Archive { pickle, storages })
    }

    fn entry(&self, name: String, saved: &Saved) -> Result<Entry, String> {
        let called = if name.is_empty() { String::new() } else { format!(" `{name}`") };
        let storage = self.storages.get(&saved.storage).ok_or_else(|| {
            format!("its tensor{called} lies in `data/{}`, which is not there", saved.storage)
        })?;
        let (element, size) = element(&saved.kind)
            .ok_or_else(|| format!("its tensor{called} has the type `torch.{}`", saved.kind))?;
        let Saved { offset, shape, strides, .. } = saved;
        let beyond = || {
            format!(
                "its tensor{called} of the shape {shape:?}, strides {strides:?} and place {offset} \
                 goes beyond its storage of {} bytes",
                storage.len()
            )
        };
        let (mut end, mut plain) = (*offset, true);
        let mut count = 1usize;
        for (side, stride) in shape.iter().zip(strides).rev() {
            let last = side.saturating_sub(1).checked_mul(*stride).ok_or_else(beyond)?;
            end = end.checked_add(last).ok_or_else(beyond)?;
            plain &= *side <= 1 || *stride == count;
            count = count.checked_mul(*side).ok_or_else(beyond)?;
        }
        if count == 0 {
            let place = Place::At(storage.start..storage.start);
            return Ok(Entry { name, element, shape: shape.clone(), place, map: 0 });
        }
        let bytes = |elements: usize| elements.checked_mul(size).map(|bytes| storage.start + bytes);
        let end = end.checked_add(1).and_then(bytes).filter(|end| *end <= storage.end);
        let (start, end) = (bytes(*offset).ok_or_else(beyond)?, end.ok_or_else(beyond)?);
        let place = match plain {
            true => Place::At(start..end),
            false => Place::Apart { bytes: start..end, size, strides: strides.clone() },
        };
        Ok(Entry { name, element, shape: shape.clone(), place, map: 0 })
    }
}

fn read(mut member: impl Read, most: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = member.by_ref().take(most as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| format!("its pickle cannot be read: {error}"))?;
    Ok(bytes)
}

/// How a type of torch's is stored, and its bytes.
fn element(kind: &str) -> Option<(Element, usize)> {
    Some(match kind {
        "float32" => (Element::Format(Format::F32), 4),
        "float16" => (Element::Format(Format::F16), 2),
        "bfloat16" => (Element::Format(Format::Bf16), 2),
        "float8_e4m3fn" => (Element::Format(Format::E4m3), 1),
        "float8_e5m2" => (Element::Format(Format::E5m2), 1),
        "float64" => (Element::F64, 8),
        "uint8" | "int8" => (Element::Words(1), 1),
        "uint16" | "int16" => (Element::Words(2), 2),
        "uint32" | "int32" => (Element::Words(4), 4),
        "uint64" | "int64" => (Element::Words(8), 8),
        "complex32" => (Element::Other, 4),
        "complex64" => (Element::Other, 8),
        "complex128" => (Element::Other, 16),
        "bool" => (Element::Other, 1),
        other if other.starts_with("float8_") || other.starts_with("float4_") => {
            (Element::Other, 1)
        }
        _ => return None,
    })
}

/// The elements of a tensor whose strides are not those of its shape, one behind the other.
pub(super) fn gather(
    bytes: &[u8],
    size: usize,
    shape: &[usize],
    strides: &[usize],
) -> Result<Vec<u8>, String> {
    let count = shape.iter().try_fold(size, |bytes, side| bytes.checked_mul(*side));
    let count = count.ok_or_else(|| format!("its shape {shape:?} is too large"))?;
    if count > MOST_REPEATED && count / MOST_REPEATS > bytes.len() {
        return Err(format!(
            "has {} bytes, which repeat few values again and again; save `tensor.contiguous()`",
            count
        ));
    }
    crate::memory::ask(count as u64)?;
    let mut gathered = Vec::with_capacity(count);
    let mut index = vec![0; shape.len()];
    while gathered.len() < count {
        let place: usize = index.iter().zip(strides).map(|(at, stride)| at * stride * size).sum();
        gathered.extend_from_slice(&bytes[place..place + size]);
        for (at, side) in index.iter_mut().zip(shape).rev() {
            *at += 1;
            if *at < *side {
                break;
            }
            *at = 0;
        }
    }
    Ok(gathered)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A view of a row-major storage, by any order of its dimensions, is read element by element.
        #[test]
        fn a_view_has_the_elements_at_its_strides(
            sides in prop::array::uniform3(1usize..5),
            order in Just([0usize, 1, 2]).prop_shuffle(),
            step in 1usize..3,
        ) {
            let own = [sides[1] * sides[2] * step, sides[2] * step, step];
            let shape: Vec<usize> = order.iter().map(|at| sides[*at]).collect();
            let strides: Vec<usize> = order.iter().map(|at| own[*at]).collect();
            let count = sides.iter().product::<usize>() * step;
            let storage: Vec<u8> = (0..count as u16).flat_map(u16::to_le_bytes).collect();
            let mut expected = Vec::new();
            for a in 0..shape[0] {
                for b in 0..shape[1] {
                    for c in 0..shape[2] {
                        expected.push((a * strides[0] + b * strides[1] + c * strides[2]) as u16);
                    }
                }
            }
            let gathered = gather(&storage, 2, &shape, &strides).expect("elements");
            let gathered: Vec<u16> =
                gathered.as_chunks().0.iter().map(|word| u16::from_le_bytes(*word)).collect();
            prop_assert_eq!(gathered, expected);
        }
    }

    #[test]
    fn a_tensor_beyond_its_storage_and_one_that_repeats_a_value_for_ever_are_refused() {
        let storages = [("0".to_owned(), 10..26)].into();
        let archive = Archive { pickle: Vec::new(), storages };
        let saved = |offset, shape: &[usize], strides: &[usize]| Saved {
            storage: "0".to_owned(),
            kind: "float32".to_owned(),
            offset,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        let entry = |saved| archive.entry("x".to_owned(), &saved);
        assert!(matches!(
            entry(saved(1, &[3], &[1])).expect("three of four").place,
            Place::At(bytes) if bytes == (14..26)
        ));
        for (offset, shape, strides) in [
            (2, [3, 1], [1, 1]),
            (0, [2, 3], [2, 1]),
            (usize::MAX, [1, 1], [1, 1]),
            (0, [usize::MAX, 2], [0, 1]),
            (0, [2, 2], [usize::MAX, 1]),
        ] {
            let error = entry(saved(offset, &shape, &strides)).expect_err("beyond");
            assert!(error.contains("tensor `x`") && error.contains("beyond"), "{error}");
        }
        assert!(gather(&[0; 4], 4, &[1 << 40], &[0]).expect_err("long").contains("repeat"));
    }
}
