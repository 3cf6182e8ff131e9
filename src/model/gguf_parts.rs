//! A GGUF file that is split: `NAME-00001-of-00003.gguf` and its other parts.
//!
//! The first part has all metadata, the others tensors alone (llama.cpp's `gguf-split`). It finds
//! the parts and puts their tables of tensors together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::error::{FETCH_AGAIN, Fault, ModelError};
use super::gguf::{self, Header, TensorInfo};
use super::{MappedFile, map};

/// What a header says of its part: its number from 0 on, of how many.
fn part(header: &Header) -> Result<Option<(u64, u64)>, Fault> {
    let said = header.unsigned("split.count")?;
    let number = header.unsigned("split.no")?;
    match (number, said.unwrap_or(0)) {
        (None | Some(0), 0 | 1) => Ok(None),
        (None, count) => Err(Fault::unsupported(
            format!("it is one of {count} parts of a split model, and `split.no` is missing"),
            FETCH_AGAIN,
        )),
        (Some(number), count) if number >= count => {
            let of = said.map_or("is missing".to_owned(), |count| format!("is {count}"));
            Err(Fault::malformed(
                format!("`split.no` is {number}, counted from 0, and `split.count` {of}"),
                "give the first part of the split model, with the other parts beside it",
            ))
        }
        (Some(number), count) => Ok(Some((number, count))),
    }
}

/// The name of part `number` of the model whose part has this path, where it is named as parts are.
fn sibling(path: &Path, number: u64, count: u64) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (stem, own) = stem.rsplit_once('-')?;
    let is_number = own.len() == 5 && own.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1)))
}

/// Opens the other parts of a file; none where it is whole, or no GGUF file.
///
/// # Errors
/// If it is not the first part, or another one is not there.
pub(super) fn others(path: &Path, first: &[u8]) -> Result<Vec<MappedFile>, ModelError> {
    if !gguf::is_gguf(first) {
        return Ok(Vec::new());
    }
    let header = Header::parse(first).map_err(|fault| fault.at(path))?;
    let Some((number, count)) = part(&header).map_err(|fault| fault.at(path))? else {
        return Ok(Vec::new());
    };
    let named = |number| sibling(path, number, count);
    if number > 0 {
        let first = named(0).map_or_else(
            || "the first part".to_owned(),
            |first| format!("`{}`", first.file_name().unwrap_or_default().display()),
        );
        return Err(Fault::unsupported(
            format!("it is part {} of {count} of a split model", number + 1),
            format!("give {first}, with the other parts beside it"),
        )
        .at(path));
    }
    let open = |number: u64| {
        let path = named(number).ok_or_else(|| {
            Fault::malformed(
                format!("it is part 1 of {count} of a split model, and is not named so"),
                format!("name the parts `NAME-00001-of-{count:05}.gguf` and so on"),
            )
            .at(path)
        })?;
        if !path.exists() {
            return Err(Fault::malformed(
                format!("part {} of {count} of the split model is not there", number + 1),
                "fetch all parts into one folder",
            )
            .at(&path));
        }
        let (map, opened) = map(&path)?;
        Ok(MappedFile { path, map, opened: Some(opened) })
    };
    (1..count).map(open).collect()
}

/// The tensors of all parts, each with the number of its file; `header` is the first part's.
///
/// # Errors
/// If the parts are not those of one model.
pub(super) fn tensors(
    header: &mut Header,
    files: &[MappedFile],
) -> Result<Vec<(usize, TensorInfo)>, ModelError> {
    let first = &files[0].path;
    let own = part(header).map_err(|fault| fault.at(first))?;
    let count = own.map_or(1, |(_, count)| count);
    if files.len() as u64 != count {
        return Err(Fault::unsupported(
            format!("it is one part of {count} of a split model"),
            "give the path of its first part, with the other parts beside it",
        )
        .at(first));
    }
    let mut all: Vec<(usize, TensorInfo)> = Vec::new();
    all.extend(std::mem::take(&mut header.tensors).into_iter().map(|info| (0, info)));
    let mut names: BTreeSet<String> = all.iter().map(|(_, info)| info.name.clone()).collect();
    for (number, file) in files.iter().enumerate().skip(1) {
        let at = |fault: Fault| fault.at(&file.path);
        let other = Header::parse(&file.map).map_err(at)?;
        if part(&other).map_err(at)? != Some((number as u64, count)) {
            return Err(at(Fault::malformed(
                format!("its metadata do not say that it is part {} of {count}", number + 1),
                FETCH_AGAIN,
            )));
        }
        let known = |key: &&str| key.starts_with("split.") || key.starts_with("general.");
        if let Some(key) = other.keys().find(|key| !known(key)) {
            return Err(at(Fault::unsupported(
                format!(
                    "it has the metadata key `{}`, which belongs in the first part",
                    crate::text::shown(key)
                ),
                "split the model anew",
            )));
        }
        for info in other.tensors {
            if !names.insert(info.name.clone()) {
                let fault = Fault::malformed("another part holds it too", FETCH_AGAIN);
                return Err(at(fault.in_tensor(info.name)));
            }
            all.push((number, info));
        }
    }
    let key = "split.tensors.count";
    let promised = header.unsigned(key).map_err(|fault| fault.at(first))?;
    match promised.filter(|&promised| promised != all.len() as u64) {
        None => Ok(all),
        Some(promised) => {
            let (held, what) = (all.len(), if count > 1 { "its parts hold" } else { "it holds" });
            Err(Fault::malformed(
                format!("`{key}` is {promised}, and {what} {held} tensors"),
                "give all parts of the split model, or fetch the file again",
            )
            .at(first))
        }
    }
}
