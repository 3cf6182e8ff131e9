//! Tensors in files that other programs wrote: safetensors, NumPy's `.npy` and
//! `.npz`, torch's `.pt`, GGUF, Polygraphy's JSON, FlashInfer-Bench's JSON Lines and raw
//! little-endian values; and folders with a file for each tensor.
//!
//! A name is looked up whole, never by a part of it or by its place. It knows
//! bytes and shapes; what a tensor means, and to whom, is not its concern.

pub mod blocks;
mod flashinfer;
mod folders;
mod llama_debug;
mod npy;
mod pickle;
mod polygraphy;
mod scales;
mod torch;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors};

use crate::dtype::Format;
use crate::files::Mapped;
use crate::manifest::problem::nearest;
use crate::model::{self, ModelError, Weight, WeightType};
use crate::op::{FileScale, FileTensor, is_of_class};
use crate::tensor::Tensor;
use crate::text::{Shown, shown};

pub use scales::BlockScales;

/// Workloads that a file lists are read up to so many bytes.
const LARGEST_LIST: u64 = 1 << 30;
/// Names that an error lists.
const SHOWN: usize = 20;

/// A tensor that could not be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// The file cannot be opened or mapped.
    #[error(transparent)]
    File(#[from] ModelError),
    /// The file is not what its name says.
    #[error(
        "`{}` cannot be read: {problem}; write it again, or fetch it anew",
        path.shown()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The file is sound, and holds no tensors that can be taken.
    #[error("`{}` is not taken as tensors: {problem}", path.shown())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why not, and what to do.
        problem: String,
    },
    /// There is no such tensor. What was found ends with the name that was probably meant.
    #[error("`{}` has no tensor `{}`; it has {found}", path.shown(), shown(name))]
    Missing {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
        /// What is there.
        found: String,
    },
    /// The tensor is there and is not usable as asked.
    #[error("{} {problem}", of(name, path))]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Why not, and what to do.
        problem: String,
    },
}

fn of(name: &str, path: &Path) -> String {
    match name {
        "" => format!("`{}`", path.shown()),
        name => format!("tensor `{}` of `{}`", shown(name), path.shown()),
    }
}

/// How a file says its elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Element {
    /// One of the formats.
    Format(Format),
    /// IEEE binary64; read as the nearest f32.
    F64,
    /// Plain words of so many bytes: codes of a format that the file cannot name.
    Words(usize),
    /// A block format of GGUF.
    Blocks(WeightType),
    /// Something that holds no numbers for us.
    Other,
}

impl Element {
    /// Bytes of one; 1 where that is not said.
    fn size(self) -> usize {
        match self {
            Element::Format(format) => format.bytes(),
            Element::F64 => 8,
            Element::Words(bytes) => bytes,
            Element::Blocks(_) | Element::Other => 1,
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Element::Format(format) => write!(f, "{format}"),
            Element::F64 => f.write_str("f64"),
            Element::Words(bytes) => write!(f, "plain {}-bit words", bytes * 8),
            Element::Blocks(kind) => write!(f, "{kind}"),
            Element::Other => f.write_str("a type without a meaning here"),
        }
    }
}

/// A tensor's line in a file's table.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    element: Element,
    shape: Vec<usize>,
    place: Place,
    /// Which of the mapped files it lies in.
    map: usize,
}

/// Where a tensor's elements are.
#[derive(Clone, Debug)]
enum Place {
    /// These bytes of its file.
    At(Range<usize>),
    /// A member of a `.npz`, which is unpacked on reading.
    Member,
    /// A whole `.npy` file as base64, in these bytes of its file.
    Encoded(Range<usize>),
    /// Elements of so many bytes within these bytes of its file, apart by strides.
    Apart {
        /// From the first to the last element.
        bytes: Range<usize>,
        /// Bytes of one element.
        size: usize,
        /// By how many elements each dimension goes on.
        strides: Vec<usize>,
    },
    /// In no file, and why.
    Nowhere(String),
}

/// An opened file of tensors.
pub struct TensorFile {
    path: PathBuf,
    /// One file and those that it names, or those of a folder.
    maps: Vec<Mapped>,
    entries: Vec<Entry>,
}

/// A tensor as codes: `[rows, width]` of a format, and what they are to be multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub struct CodedTensor {
    /// The format of every code.
    pub format: Format,
    /// Number of rows; leading dimensions are multiplied together.
    pub rows: usize,
    /// The innermost dimension.
    pub width: usize,
    /// The codes, little-endian, row by row.
    pub bytes: Vec<u8>,
    /// What the codes are multiplied with, where that is said.
    pub scales: Option<BlockScales>,
}

impl TensorFile {
    /// Opens a file; its ending says what it is, and any other ending is raw values. In a
    /// folder each `.npy` and `.pt` is a tensor with the name of its file.
    ///
    /// # Errors
    /// If the file is not what its ending says.
    pub fn open(path: &Path) -> Result<TensorFile, TensorFileError> {
        if path.is_dir() {
            return TensorFile::open_folder(path);
        }
        let (map, _) = model::map(path)?;
        let (mut maps, mut entries) = (vec![map], Vec::new());
        let problem = |problem| TensorFileError::Malformed { path: path.to_owned(), problem };
        match ending(path) {
            "gguf" => {
                let tensors = model::gguf_tensors(path, &maps[0])?;
                entries.extend(tensors.into_iter().map(|(name, kind, [rows, width], bytes)| {
                    let (element, shape) = (of_weight(kind), vec![rows, width]);
                    Entry { name, element, shape, place: Place::At(bytes), map: 0 }
                }));
            }
            "jsonl" => {
                let inputs = flashinfer::inputs(path, &maps[0]).map_err(problem)?;
                TensorFile::add_inputs(inputs, &mut maps, &mut entries)?;
            }
            "safetensors" | "npy" | "npz" | "pt" | "pth" | "json" => {
                let (found, copies) = parse(path, &maps[0], 0).map_err(problem)?;
                entries.extend(found);
                maps.extend(copies);
            }
            _ => {
                if let Some(problem) = llama_debug::printed(&maps[0]) {
                    return Err(TensorFileError::Refused { path: path.to_owned(), problem });
                }
                match llama_debug::tokens_beside(path) {
                    Some(tokens) => {
                        maps.push(model::map(&tokens)?.0);
                        let found = llama_debug::entries(path, maps[0].len(), maps[1].len());
                        entries.extend(found.map_err(problem)?);
                    }
                    None => entries.push(Entry {
                        name: String::new(),
                        element: Element::Other,
                        shape: vec![],
                        place: Place::At(0..maps[0].len()),
                        map: 0,
                    }),
                }
            }
        }
        Ok(TensorFile { path: path.to_owned(), maps, entries })
    }

    fn open_folder(path: &Path) -> Result<TensorFile, TensorFileError> {
        let malformed = |path: &Path, problem| {
            let path = path.to_owned();
            TensorFileError::Malformed { path, problem }
        };
        let folder = folders::Folder::of(path);
        if let Err((path, problem)) = folder.check() {
            return Err(TensorFileError::Refused { path, problem });
        }
        let (mut maps, mut entries) = (Vec::new(), Vec::new());
        for (file, name) in &folder.files {
            let (map, _) = model::map(file)?;
            let parsed = parse(file, &map, maps.len());
            let (found, copies) = parsed.map_err(|problem| malformed(file, problem))?;
            entries.extend(found.into_iter().map(|entry| {
                let name = folders::joined(name, &entry.name, ending(file) == "json");
                Entry { name, ..entry }
            }));
            maps.push(map);
            maps.extend(copies);
        }
        if entries.is_empty() {
            return Err(malformed(path, folders::empty(path)));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = entries.iter().find(|entry| !names.insert(&entry.name)) {
            let problem =
                format!("two files of this folder have a tensor `{}`", shown(&twice.name));
            return Err(malformed(path, problem));
        }
        Ok(TensorFile { path: path.to_owned(), maps, entries })
    }

    /// The tensors of other files that a file names.
    fn add_inputs(
        inputs: Vec<(String, flashinfer::Found)>,
        maps: &mut Vec<Mapped>,
        entries: &mut Vec<Entry>,
    ) -> Result<(), TensorFileError> {
        let mut opened: BTreeMap<PathBuf, Vec<Entry>> = BTreeMap::new();
        for (name, found) in inputs {
            let (file, tensor) = match found {
                flashinfer::Found::In(file, tensor) => (file, tensor),
                flashinfer::Found::Nowhere(why) => {
                    let (element, place) = (Element::Other, Place::Nowhere(why));
                    entries.push(Entry { name, element, shape: vec![], place, map: 0 });
                    continue;
                }
            };
            if !opened.contains_key(&file) {
                let (map, _) = model::map(&file)?;
                let found = safetensors_entries(&map, maps.len());
                let found = found.map_err(|problem| TensorFileError::Malformed {
                    path: file.clone(),
                    problem,
                })?;
                maps.push(map);
                opened.insert(file.clone(), found);
            }
            let there = &opened[&file];
            let Some(entry) = there.iter().find(|entry| entry.name == tensor) else {
                let found = listed(there);
                return Err(TensorFileError::Missing { path: file, name: tensor, found });
            };
            entries.push(Entry { name, ..entry.clone() });
        }
        Ok(())
    }

    /// Whether it holds one tensor that has no name, as a `.npy` does.
    pub fn is_nameless(&self) -> bool {
        matches!(self.entries.as_slice(), [only] if only.name.is_empty())
    }

    /// The whole name of a tensor whose name is written with `{class}`, or as it is.
    pub fn name_of(&self, written: &str) -> Option<&str> {
        self.names().find(|name| is_of_class(name, written))
    }

    /// The rows of a tensor, where the file knows its shape.
    pub fn rows(&self, name: &str) -> Option<usize> {
        let entry = self.entries.iter().find(|entry| entry.name == name)?;
        let (_, outer) = entry.shape.split_last()?;
        outer.iter().try_fold(1usize, |rows, &next| rows.checked_mul(next))
    }

    /// Looks a tensor and its scale up without reading them.
    ///
    /// # Errors
    /// If one of them is not there.
    pub fn find(&self, wanted: &FileTensor) -> Result<(), TensorFileError> {
        self.entry(wanted.tensor.as_deref())?;
        match &wanted.scale {
            Some(FileScale::Tensor(name)) => self.entry(Some(name)).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// The names of its tensors, in the file's order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.name.as_str())
    }

    /// The shape of a tensor as the file stores it; empty where the file does not say.
    ///
    /// # Errors
    /// If it is missing.
    pub fn shape(&self, name: Option<&str>) -> Result<&[usize], TensorFileError> {
        Ok(&self.entry(name)?.shape)
    }

    /// What the file holds, for an error: names with types and shapes.
    pub fn found(&self) -> String {
        listed(&self.entries)
    }

    /// Reads a tensor with its scale.
    ///
    /// # Errors
    /// If it is missing, has another type than asked for, or no element.
    pub fn read(&self, wanted: &FileTensor) -> Result<CodedTensor, TensorFileError> {
        let entry = self.entry(wanted.tensor.as_deref())?;
        let refuse = |problem: String| self.unusable(entry, problem);
        if let Place::Nowhere(why) = &entry.place {
            return Err(refuse(why.clone()));
        }
        let shape = match &wanted.shape {
            Some(shape) if entry.element == Element::Other || entry.shape == *shape => shape,
            Some(shape) => {
                return Err(refuse(format!(
                    "has the shape {:?}, and {shape:?} was asked for",
                    entry.shape
                )));
            }
            None if entry.element == Element::Other && !entry.shape.is_empty() => {
                return Err(refuse(format!("is stored as {}", entry.element)));
            }
            None if entry.element == Element::Other => {
                return Err(refuse(
                    "is raw values: say what they are by `dtype` and `shape`".to_owned(),
                ));
            }
            None => &entry.shape,
        };
        let (width, outer) = match shape.split_last() {
            None => (1, &[][..]),
            Some((width, outer)) => (*width, outer),
        };
        let rows = outer.iter().try_fold(1usize, |rows, &next| rows.checked_mul(next));
        let rows = rows.filter(|&rows| rows > 0 && width > 0);
        let rows = rows.ok_or_else(|| refuse(format!("has the shape {shape:?}: no element")))?;
        let count = rows.checked_mul(width).filter(|count| *count <= isize::MAX as usize / 8);
        let count = count.ok_or_else(|| refuse(format!("has the shape {shape:?}: too large")))?;

        let bytes = self.bytes(entry)?;
        let (format, bytes) = convert(entry.element, wanted.format, count, bytes)
            .map_err(|problem| self.unusable(entry, problem))?;
        let scales = match &wanted.scale {
            None => None,
            Some(FileScale::Bits(bits)) => {
                Some(BlockScales::one(f32::from_bits(*bits), rows, width))
            }
            Some(FileScale::Tensor(name)) => Some(self.scales(entry, name, rows, width)?),
        };
        let values = scales.iter().flat_map(|scales| &scales.values);
        if let Some(scale) = values.into_iter().find(|scale| !(scale.is_finite() && **scale > 0.0))
        {
            return Err(refuse(format!(
                "has the scale {scale}; a scale is a positive finite number"
            )));
        }
        Ok(CodedTensor { format, rows, width, bytes, scales })
    }

    /// The whole numbers of a tensor that is stored as integers of four or eight bytes; nothing
    /// where it is stored otherwise.
    ///
    /// # Errors
    /// If it is missing or cut off.
    pub fn integers(&self, name: Option<&str>) -> Result<Option<Vec<i64>>, TensorFileError> {
        let entry = self.entry(name)?;
        let Element::Words(size @ (4 | 8)) = entry.element else { return Ok(None) };
        let bytes = self.bytes(entry)?;
        let count: usize = entry.shape.iter().product();
        if bytes.len() != count * size {
            let (got, problem) = (bytes.len(), "bytes, and its shape says");
            return Err(self.unusable(entry, format!("has {got} {problem} {}", count * size)));
        }
        let of_four = |word: &[u8; 4]| i64::from(i32::from_le_bytes(*word));
        Ok(Some(match size {
            4 => bytes.as_chunks().0.iter().map(of_four).collect(),
            _ => bytes.as_chunks().0.iter().map(|word| i64::from_le_bytes(*word)).collect(),
        }))
    }

    /// What the metadata of a safetensors file says under a key.
    pub fn note(&self, key: &str) -> Option<String> {
        let is_safetensors = self.path.extension().is_some_and(|of| of == "safetensors");
        let map = self.maps.first().filter(|_| is_safetensors)?;
        let (_, header) = SafeTensors::read_metadata(map).ok()?;
        header.metadata().as_ref()?.get(key).cloned()
    }

    fn entry(&self, name: Option<&str>) -> Result<&Entry, TensorFileError> {
        let wanted = match (name, self.entries.as_slice()) {
            (None, [only]) => return Ok(only),
            (None, _) => "",
            // A file of one tensor without a name: whatever it is called, it is that one.
            (Some(_), [only]) if only.name.is_empty() => return Ok(only),
            (Some(name), _) => name,
        };
        let mut fitting = self.entries.iter().filter(|entry| is_of_class(&entry.name, wanted));
        if let (Some(one), Some(other)) = (fitting.next(), fitting.next()) {
            let problem = format!(
                "fits `{}` and `{}`: write the class of the module in place of `{{class}}`",
                shown(&one.name),
                shown(&other.name)
            );
            let (path, name) = (self.path.clone(), wanted.to_owned());
            return Err(TensorFileError::Unusable { path, name, problem });
        }
        let found = self.entries.iter().find(|entry| is_of_class(&entry.name, wanted));
        found.ok_or_else(|| {
            let (path, name) = (self.path.clone(), wanted.to_owned());
            let mut found = self.found();
            if let Some(near) = nearest(&name, self.names()) {
                // Writing to a string cannot fail.
                let _ = write!(found, "; did you mean `{near}`?");
            }
            TensorFileError::Missing { path, name, found }
        })
    }

    fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>, TensorFileError> {
        let map = &self.maps[entry.map];
        let unpacked = match &entry.place {
            Place::At(bytes) => return Ok(Cow::Borrowed(&map[bytes.clone()])),
            Place::Member => npy::unpack(map, &entry.name),
            Place::Encoded(text) => polygraphy::unpack(map, text.clone()),
            Place::Apart { bytes, size, strides } => {
                torch::gather(&map[bytes.clone()], *size, &entry.shape, strides)
            }
            Place::Nowhere(why) => return Err(self.unusable(entry, why.clone())),
        };
        unpacked
            .map(Cow::Owned)
            .map_err(|problem| self.unusable(entry, format!("cannot be unpacked: {problem}")))
    }

    fn scales(
        &self,
        of: &Entry,
        name: &str,
        rows: usize,
        width: usize,
    ) -> Result<BlockScales, TensorFileError> {
        let wanted = FileTensor {
            file: self.path.clone(),
            tensor: Some(name.to_owned()),
            format: None,
            shape: None,
            scale: None,
        };
        let shape = self.entry(wanted.tensor.as_deref())?.shape.clone();
        let values = self.read(&wanted)?.values().into_data();
        let own = of.shape.iter().product::<usize>() == rows * width;
        let operand = match of.shape.as_slice() {
            [.., last] if own && *last == width => of.shape.clone(),
            _ => vec![rows, width],
        };
        BlockScales::fit(&shape, &operand, values)
            .map_err(|problem| self.unusable(of, format!("{problem} (its scale is `{name}`)")))
    }

    fn unusable(&self, entry: &Entry, problem: String) -> TensorFileError {
        let (path, name) = (self.path.clone(), entry.name.clone());
        TensorFileError::Unusable { path, name, problem }
    }
}

impl CodedTensor {
    /// The values: each code's, times its scale.
    pub fn values(&self) -> Tensor {
        let decode = |code: &[u8]| {
            let mut word = [0; 4];
            word[..code.len()].copy_from_slice(code);
            self.format.decode(u32::from_le_bytes(word))
        };
        let mut values: Vec<f32> =
            self.bytes.chunks_exact(self.format.bytes()).map(decode).collect();
        if let Some(scales) = &self.scales {
            for (row, values) in values.chunks_exact_mut(self.width).enumerate() {
                for (block, values) in values.chunks_mut(scales.width_per_block).enumerate() {
                    let scale = scales.at(row, block * scales.width_per_block);
                    values.iter_mut().for_each(|value| *value *= scale);
                }
            }
        }
        Tensor::new(self.width, values)
    }

    /// Some rows, in the given order.
    pub fn select_rows(&self, rows: &[usize]) -> CodedTensor {
        let row_bytes = self.width * self.format.bytes();
        let bytes = rows.iter().flat_map(|row| &self.bytes[row * row_bytes..(row + 1) * row_bytes]);
        CodedTensor {
            rows: rows.len(),
            bytes: bytes.copied().collect(),
            scales: self.scales.as_ref().map(|scales| scales.select_rows(rows, self.width)),
            ..*self
        }
    }

    /// A digest of everything that it says.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key("runner 2026 file tensor v2");
        // v2: scales have blocks.
        let (blocks, scales) = match &self.scales {
            None => ([0, 0], &[][..]),
            Some(scales) => {
                ([scales.rows_per_block, scales.width_per_block], scales.values.as_slice())
            }
        };
        for number in [self.rows, self.width, blocks[0], blocks[1], scales.len()] {
            hasher.update(&(number as u64).to_le_bytes());
        }
        hasher.update(self.format.name().as_bytes());
        for scale in scales {
            hasher.update(&scale.to_le_bytes());
        }
        hasher.update_rayon(&self.bytes);
        hasher.finalize()
    }
}

/// The files that are read where a file of tensors is named: itself and those that belong to
/// it, or the files of a folder, sorted.
pub fn members(path: &Path) -> Vec<PathBuf> {
    if path.is_dir() {
        return folders::Folder::of(path).all();
    }
    let mut files = vec![path.to_owned()];
    if ending(path) == "jsonl" {
        let text = crate::files::read_whole(path, LARGEST_LIST).unwrap_or_default();
        for (_, found) in flashinfer::inputs(path, &text).unwrap_or_default() {
            let flashinfer::Found::In(file, _) = found else { continue };
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    files.extend(llama_debug::tokens_beside(path));
    files
}

fn ending(path: &Path) -> &str {
    path.extension().and_then(|ending| ending.to_str()).unwrap_or("")
}

/// The tensors of a file that stands alone, and copies of what was unpacked; `map` is the
/// file's number.
fn parse(path: &Path, file: &[u8], map: usize) -> Result<(Vec<Entry>, Vec<Mapped>), String> {
    let entries = match ending(path) {
        "json" => return polygraphy::entries(file, map),
        "safetensors" => return Ok((safetensors_entries(file, map)?, Vec::new())),
        "npz" => npy::archive_entries(file)?,
        "pt" | "pth" => torch::entries(file)?,
        _ => {
            let (element, shape, bytes) = npy::parse(file)?;
            vec![Entry { name: String::new(), element, shape, place: Place::At(bytes), map }]
        }
    };
    Ok((entries.into_iter().map(|entry| Entry { map, ..entry }).collect(), Vec::new()))
}

/// Names with types and shapes, for an error.
fn listed(entries: &[Entry]) -> String {
    let mut text = String::new();
    for (index, entry) in entries.iter().take(SHOWN).enumerate() {
        let comma = if index > 0 { ", " } else { "" };
        // Writing to a string cannot fail.
        let _ = write!(text, "{comma}`{}` {} {:?}", shown(&entry.name), entry.element, entry.shape);
    }
    match entries.len() {
        0 => "no tensor at all".to_owned(),
        n if n > SHOWN => format!("{text} and {} more", n - SHOWN),
        _ => text,
    }
}

/// Reads one tensor of one file.
///
/// # Errors
/// As [`TensorFile::open`] and [`TensorFile::read`].
pub fn read(wanted: &FileTensor) -> Result<CodedTensor, TensorFileError> {
    TensorFile::open(&wanted.file)?.read(wanted)
}

/// The codes of a stored tensor and their format.
fn convert(
    element: Element,
    wanted: Option<Format>,
    count: usize,
    bytes: Cow<'_, [u8]>,
) -> Result<(Format, Vec<u8>), String> {
    let whole = |size: usize, bytes: &[u8]| {
        if bytes.len() == count * size {
            return Ok(());
        }
        Err(format!("has {} bytes, and {count} elements of {size} were expected", bytes.len()))
    };
    match (element, wanted) {
        (Element::Format(stored), None) => {
            whole(stored.bytes(), &bytes)?;
            Ok((stored, bytes.into_owned()))
        }
        (Element::Format(stored), Some(wanted)) if stored == wanted => {
            whole(stored.bytes(), &bytes)?;
            Ok((stored, bytes.into_owned()))
        }
        (Element::Words(size), Some(wanted)) if wanted.bytes() == size => {
            whole(size, &bytes)?;
            Ok((wanted, bytes.into_owned()))
        }
        (Element::Other, Some(wanted)) => {
            whole(wanted.bytes(), &bytes)?;
            Ok((wanted, bytes.into_owned()))
        }
        (Element::Format(Format::F32), Some(wanted))
            if matches!(wanted, Format::Bf16 | Format::F16 | Format::Tf32) =>
        {
            whole(4, &bytes)?;
            narrowed(&bytes, wanted).map(|bytes| (wanted, bytes))
        }
        (Element::F64, None | Some(Format::F32)) => {
            whole(8, &bytes)?;
            let narrow = |word: &[u8; 8]| (f64::from_le_bytes(*word) as f32).to_le_bytes();
            Ok((Format::F32, bytes.as_chunks().0.iter().flat_map(narrow).collect()))
        }
        (Element::Blocks(kind), None | Some(Format::F32)) => {
            let width = kind.block_width();
            let weight = Weight::new("tensor", kind, count / width, width, &bytes)
                .map_err(|error| error.to_string())?;
            let values = weight.to_vec().map_err(|error| error.to_string())?;
            Ok((Format::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        }
        (Element::Words(size), None) => {
            let formats = Format::ALL.iter().filter(|format| format.bytes() == size);
            let formats: Vec<&str> = formats.map(|format| format.name()).collect();
            Err(match formats.is_empty() {
                true => format!("is stored as {element}, which are no codes of a format"),
                false => format!(
                    "is stored as {element}: say which codes they are by `dtype`, one of {}",
                    formats.join(", ")
                ),
            })
        }
        (stored, Some(wanted)) => Err(format!("is stored as {stored}, and not as {wanted}")),
        (Element::Other, None) => Err(format!("is stored as {element}")),
    }
}

/// The codes of f32 values that are all values of a narrower format, as a dump of
/// `tensor.float()` holds them.
fn narrowed(bytes: &[u8], wanted: Format) -> Result<Vec<u8>, String> {
    let mut codes = Vec::with_capacity(bytes.len() / 4 * wanted.bytes());
    for (index, word) in bytes.as_chunks().0.iter().enumerate() {
        let value = f32::from_le_bytes(*word);
        let code = wanted.encode(value);
        if wanted.decode(code).to_bits() != value.to_bits() && !value.is_nan() {
            return Err(format!(
                "is stored as f32, and value {index}, {value:e}, is no {wanted}: leave out \
                 `dtype`, or round the values before they are saved"
            ));
        }
        codes.extend_from_slice(&code.to_le_bytes()[..wanted.bytes()]);
    }
    Ok(codes)
}

fn of_weight(kind: WeightType) -> Element {
    match kind {
        WeightType::F32 => Element::Format(Format::F32),
        WeightType::F16 => Element::Format(Format::F16),
        WeightType::BF16 => Element::Format(Format::Bf16),
        blocks => Element::Blocks(blocks),
    }
}

fn safetensors_entries(file: &[u8], map: usize) -> Result<Vec<Entry>, String> {
    let whole = SafeTensors::deserialize(file).map_err(|error| error.to_string())?;
    let base = file.as_ptr() as usize;
    let mut entries: Vec<Entry> = whole
        .iter()
        .map(|(name, view)| {
            let start = view.data().as_ptr() as usize - base;
            let element = match view.dtype() {
                Dtype::F32 => Element::Format(Format::F32),
                Dtype::F16 => Element::Format(Format::F16),
                Dtype::BF16 => Element::Format(Format::Bf16),
                Dtype::F8_E4M3 => Element::Format(Format::E4m3),
                Dtype::F8_E5M2 => Element::Format(Format::E5m2),
                Dtype::F64 => Element::F64,
                Dtype::U8 | Dtype::I8 => Element::Words(1),
                Dtype::U16 | Dtype::I16 => Element::Words(2),
                Dtype::U32 | Dtype::I32 => Element::Words(4),
                Dtype::U64 | Dtype::I64 => Element::Words(8),
                _ => Element::Other,
            };
            Entry {
                name: name.to_owned(),
                element,
                shape: view.shape().to_vec(),
                place: Place::At(start..start + view.data().len()),
                map,
            }
        })
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(file: PathBuf, tensor: Option<&str>) -> FileTensor {
        let tensor = tensor.map(str::to_owned);
        FileTensor { file, tensor, format: None, shape: None, scale: None }
    }

    fn folder_with(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("a file");
        (folder, path)
    }

    #[test]
    fn raw_values_need_a_type_and_a_shape_that_fit() {
        let bytes: Vec<u8> =
            [1.0f32, -2.5, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let (_folder, path) = folder_with("x.bin", &bytes);
        let mut wanted = wanted(path, None);
        assert!(read(&wanted).expect_err("no type").to_string().contains("`dtype` and `shape`"));
        wanted.format = Some(Format::F32);
        wanted.shape = Some(vec![2, 3]);
        let error = read(&wanted).expect_err("too short").to_string();
        assert!(error.contains("has 16 bytes, and 6 elements of 4"), "{error}");
        wanted.shape = Some(vec![2, 2]);
        let tensor = read(&wanted).expect("a tensor").values();
        assert_eq!((tensor.rows(), tensor.data()), (2, &[1.0, -2.5, 3.0, 4.0][..]));
        wanted.shape = Some(vec![2, 0]);
        assert!(read(&wanted).expect_err("empty").to_string().contains("no element"));
        wanted.shape = Some(vec![usize::MAX, 2, 2]);
        assert!(read(&wanted).is_err());
    }

    #[test]
    fn numpy_files_say_what_they_are() {
        let header = "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 2), }\n";
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        for value in [1.0, 0.5, -2.0, 65504.0] {
            bytes.extend(half::f16::from_f32(value).to_le_bytes());
        }
        let (_folder, path) = folder_with("x.npy", &bytes);
        let tensor = read(&wanted(path.clone(), None)).expect("a tensor");
        assert_eq!(tensor.format, Format::F16);
        assert_eq!(tensor.values().data(), [1.0, 0.5, -2.0, 65504.0]);
        let truncated = &bytes[..bytes.len() - 1];
        std::fs::write(&path, truncated).expect("a file");
        assert!(read(&wanted(path, None)).is_err(), "half a file is no tensor");
    }

    #[test]
    fn a_missing_tensor_is_told_with_what_is_there() {
        let data = [0u8; 8];
        let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![1, 2], &data);
        let bytes = safetensors::serialize([("layer.10", view.expect("a view"))], None);
        let (_folder, path) = folder_with("x.safetensors", &bytes.expect("a file"));
        let error = read(&wanted(path, Some("layer.1"))).expect_err("no such name").to_string();
        assert!(error.contains("has no tensor `layer.1`; it has `layer.10` f32 [1, 2]"), "{error}");
    }

    #[test]
    fn codes_are_multiplied_by_their_scales() {
        let (codes, scales) = ([0x38u8, 0x40, 0x38, 0x40], [0.5f32, 2.0]);
        let scales: Vec<u8> = scales.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = |dtype, shape: &[usize], data| {
            safetensors::tensor::TensorView::new(dtype, shape.to_vec(), data).expect("a view")
        };
        let tensors =
            [("x", view(Dtype::U8, &[2, 2], &codes)), ("s", view(Dtype::F32, &[2, 1], &scales))];
        let bytes = safetensors::serialize(tensors, None).expect("a file");
        let (_folder, path) = folder_with("x.safetensors", &bytes);
        let mut wanted = wanted(path, Some("x"));
        let error = read(&wanted).expect_err("which codes?").to_string();
        assert!(error.contains("by `dtype`, one of e4m3, e5m2"), "{error}");
        wanted.format = Some(Format::E4m3);
        wanted.scale = Some(FileScale::Tensor("s".to_owned()));
        assert_eq!(read(&wanted).expect("a tensor").values().data(), [0.5, 1.0, 2.0, 4.0]);
        wanted.scale = Some(FileScale::Bits((-1.0f32).to_bits()));
        assert!(read(&wanted).expect_err("a scale").to_string().contains("positive finite"));
    }
}
