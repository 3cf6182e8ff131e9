//! Hardware vectors: what real tensor cores answered, and whether the model
//! answers the same.
//!
//! A folder holds one safetensors file per chip, named after it. For each
//! format there are `FORMAT.a` and `FORMAT.b` `[n, products]` (raw codes) and
//! `FORMAT.c` and `FORMAT.d` `[n]` (f32 bits): `d = sum(a * b) + c` as one
//! instruction computed it. The layout is that of the vectors that were
//! published with arXiv 2512.07004. Columns with an fp16 accumulator
//! (`d_fp16`) are another data path and are not modelled.
//!
//! A cut of those vectors ships with the runner (`tests/fixtures/vectors`, under the
//! licence of their authors), so that a chip's arithmetic can be checked anywhere.
//!
//! It knows files and single instructions; GEMMs are not its business.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::chip::{CHIPS, Chip, TensorCore, Unit};
use super::tensor_core;
use crate::dtype::{Format, Parts};
use crate::op::ChipName;
use crate::text::Shown;

/// The outcome for one chip and format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorCheck {
    /// The file's stem: the chip as the measurer named it.
    pub chip: String,
    /// The operands' format.
    pub format: Format,
    /// Vectors that were compared.
    pub vectors: usize,
    /// Vectors whose result differs in a bit.
    pub mismatches: usize,
    /// How the vectors' accumulator entered.
    pub accumulator: VectorAccumulator,
}

/// How the accumulator `c` enters a set of vectors. Established by comparing
/// the sets with the model, not by the measurers' code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorAccumulator {
    /// As the instruction's accumulator.
    Instruction,
    /// Not at all: the instruction started from zero (FP8 on H100 and H200).
    Unused,
    /// By an f32 addition after an instruction that started from zero (FP8 on B200).
    AddedAfter,
}

/// Vectors that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum VectorError {
    /// A folder or file that cannot be read.
    #[error("cannot read hardware vectors at `{}`: {source}; check the path", path.shown())]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// Why it cannot be.
        source: std::io::Error,
    },
    /// A file that is not safetensors or lacks a tensor.
    #[error("`{}` is no file of hardware vectors: {problem}; fetch it anew", path.shown())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A folder without a file of a known chip.
    #[error(
        "no safetensors file of a known chip in `{}`; a file is named after its chip",
        path.shown()
    )]
    Nothing {
        /// The folder.
        path: PathBuf,
    },
}

/// Names of the sets in a file and the formats of their operands.
const SETS: [(&str, Format); 5] = [
    ("E4M3", Format::E4m3),
    ("E5M2", Format::E5m2),
    ("bf16", Format::Bf16),
    ("fp16", Format::F16),
    ("tf32", Format::Tf32),
];

macro_rules! shipped {
    ($($chip:literal),*) => {
        [$((
            $chip,
            include_bytes!(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/fixtures/vectors/",
                $chip,
                ".safetensors"
            ))
            .as_slice(),
        )),*]
    };
}

/// The vectors that ship with the runner: each file's stem and its bytes.
const SHIPPED: [(&str, &[u8]); 8] =
    shipped!["A100", "A2", "Ada", "B200", "H100", "H200", "L40S", "V100"];

/// The licence of the vectors that ship with the runner.
pub const SHIPPED_LICENCE: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/vectors/LICENCE"));

/// Checks the vectors that ship with the runner. `change` is as in [`verify_folder`].
///
/// # Errors
/// If they cannot be read, which would be a bug of ours.
pub fn verify_shipped(
    change: impl Fn(TensorCore) -> TensorCore,
) -> Result<Vec<VectorCheck>, VectorError> {
    let mut checks = Vec::new();
    for (stem, bytes) in SHIPPED {
        if let Some(chip) = chip_of(stem) {
            checks.extend(verify_bytes(Path::new(stem), bytes, stem, chip, &change)?);
        }
    }
    Ok(checks)
}

/// Checks every set of every known chip in a folder, in the files' order.
/// `change` may alter a unit before it is used: a test that the check can fail.
///
/// # Errors
/// If the folder or a file cannot be read, or if there is nothing to check.
pub fn verify_folder(
    folder: &Path,
    change: impl Fn(TensorCore) -> TensorCore,
) -> Result<Vec<VectorCheck>, VectorError> {
    let read = |source| VectorError::Read { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    let mut checks = Vec::new();
    for path in files {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(chip) = chip_of(&stem) {
            let bytes = std::fs::read(&path)
                .map_err(|source| VectorError::Read { path: path.clone(), source })?;
            checks.extend(verify_bytes(&path, &bytes, &stem, chip, &change)?);
        }
    }
    if checks.is_empty() {
        return Err(VectorError::Nothing { path: folder.to_owned() });
    }
    Ok(checks)
}

/// The chip that a file's stem names, by product or by family.
fn chip_of(stem: &str) -> Option<&'static Chip> {
    CHIPS.iter().find(|chip| {
        chip.products.iter().any(|product| product.eq_ignore_ascii_case(stem))
            || format!("{:?}", chip.name).eq_ignore_ascii_case(stem)
    })
}

fn verify_bytes(
    path: &Path,
    bytes: &[u8],
    stem: &str,
    chip: &Chip,
    change: impl Fn(TensorCore) -> TensorCore,
) -> Result<Vec<VectorCheck>, VectorError> {
    let content = |problem: String| VectorError::Content { path: path.to_owned(), problem };
    let file = SafeTensors::deserialize(bytes).map_err(|error| content(error.to_string()))?;
    let mut checks = Vec::new();
    for (set, format) in SETS {
        let Some(Unit::TensorCore(core)) = chip.unit(format, format) else { continue };
        if file.tensor(&format!("{set}.d")).is_err() {
            continue;
        }
        let column = |name: &str| {
            let name = format!("{set}.{name}");
            raw_codes(&file, &name).ok_or_else(|| content(format!("no tensor of codes `{name}`")))
        };
        let (a, b, c, d) = (column("a")?, column("b")?, column("c")?, column("d")?);
        let vectors = d.len();
        if vectors == 0 || c.len() != vectors || a.len() != b.len() || a.len() % vectors != 0 {
            return Err(content(format!("the tensors of `{set}` do not have one length")));
        }
        let accumulator = match chip.name {
            ChipName::Hopper if format.is_fp8() => VectorAccumulator::Unused,
            ChipName::Blackwell if format.is_fp8() => VectorAccumulator::AddedAfter,
            _ => VectorAccumulator::Instruction,
        };
        let core = change(*core);
        let width = a.len() / vectors;
        let mismatches = (0..vectors)
            .filter(|&row| {
                let parts = |codes: &[u32]| -> Vec<Parts> {
                    codes[row * width..][..width].iter().map(|&code| format.parts(code)).collect()
                };
                let c = f32::from_bits(c[row]);
                let chain = |c| {
                    let fraction_bits = 2 * format.fraction_bits();
                    tensor_core::chain(&core, fraction_bits, &parts(&a), &parts(&b), c)
                };
                let result = match accumulator {
                    VectorAccumulator::Instruction => chain(c),
                    VectorAccumulator::Unused => chain(0.0),
                    VectorAccumulator::AddedAfter => chain(0.0) + c,
                };
                result.to_bits() != d[row]
            })
            .count();
        checks.push(VectorCheck {
            chip: stem.to_owned(),
            format,
            vectors,
            mismatches,
            accumulator,
        });
    }
    Ok(checks)
}

/// A tensor of unsigned integers of any width.
fn raw_codes(file: &SafeTensors, name: &str) -> Option<Vec<u32>> {
    let tensor = file.tensor(name).ok()?;
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::U8 => Some(data.iter().map(|&code| u32::from(code)).collect()),
        Dtype::U16 => Some(
            data.as_chunks().0.iter().map(|&code| u32::from(u16::from_le_bytes(code))).collect(),
        ),
        Dtype::U32 => {
            Some(data.as_chunks().0.iter().map(|&code| u32::from_le_bytes(code)).collect())
        }
        _ => None,
    }
}
