//! Captured GEMMs: operands, and what a device made of them, in one file.
//!
//! The file is safetensors. Its header says on which `gpu` it was made, and
//! lists the `cases` as `(w format, x format, ...)`. Case `i` has the operands
//! `c{i}.w [M, K]` and `c{i}.x [N, K]` (raw codes of FP8, else values), scales
//! `c{i}.w_scale` and `c{i}.x_scale` where there are any, and outputs `[N, M]`
//! named `c{i}.y.NAME`: a name that ends in `absmax` was made with the scales,
//! `nontf32` without tensor cores, in f32.
//!
//! It knows files and whole GEMMs; how a schedule is found is not its business.

use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::chip::{CHIPS, Chip};
use super::gemm::{Operand, Scales};
use super::quantize::{CodeData, Codes};
use crate::dtype::Format;
use crate::tensor::Tensor;
use crate::text::Shown;

/// One GEMM's operands with everything that a device made of them.
#[derive(Debug)]
pub struct Capture {
    /// The case, such as `c0`.
    pub name: String,
    /// The chip that it was captured on.
    pub chip: &'static Chip,
    /// x, `[N, K]`.
    pub x: Codes,
    /// w, `[M, K]`.
    pub w: Codes,
    /// The scale of x, where one was given.
    pub x_scale: f32,
    /// The scale of w, where one was given.
    pub w_scale: f32,
    /// What the device made, by name.
    pub outputs: Vec<CapturedOutput>,
}

/// One output of a captured GEMM.
#[derive(Debug)]
pub struct CapturedOutput {
    /// Its name within the case, such as `fast0.bf16.absmax`.
    pub name: String,
    /// Its type.
    pub format: Format,
    /// The values, `[N, M]`.
    pub y: Tensor,
}

impl Capture {
    /// x and w with the scales that this output was made with.
    pub fn operands(&self, output: &CapturedOutput) -> (Operand<'_>, Operand<'_>) {
        let scaled = output.name.ends_with("absmax");
        let scales = |scale| Scales::Tensor(if scaled { scale } else { 1.0 });
        (
            Operand { codes: &self.x, scales: scales(self.x_scale) },
            Operand { codes: &self.w, scales: scales(self.w_scale) },
        )
    }
}

/// Captures that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A folder or file that cannot be read.
    #[error("cannot read captured GEMMs at `{}`: {source}; check the path", path.shown())]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// Why it cannot be.
        source: std::io::Error,
    },
    /// A file that contradicts itself or the layout.
    #[error("`{}` is no file of captured GEMMs: {problem}; fetch it anew", path.shown())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// The captures in the safetensors files of a folder, in the files' order. Files
/// whose header lists no `cases` are something else and are passed over.
///
/// # Errors
/// If the folder or a file with cases cannot be read.
pub fn read_folder(folder: &Path) -> Result<Vec<Capture>, CaptureError> {
    let read = |source| CaptureError::Read { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    let mut captures = Vec::new();
    for path in files {
        let bytes = std::fs::read(&path)
            .map_err(|source| CaptureError::Read { path: path.clone(), source })?;
        captures.extend(read_bytes(&path, &bytes)?);
    }
    Ok(captures)
}

/// Some rows of every GEMM that was captured on an H200; they ship with the runner.
///
/// # Errors
/// If they cannot be read, which would be a bug of ours.
pub fn read_shipped() -> Result<Vec<Capture>, CaptureError> {
    let bytes = include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/h200-captures/captures.safetensors"
    ));
    read_bytes(Path::new("captures.safetensors"), bytes)
}

fn read_bytes(path: &Path, bytes: &[u8]) -> Result<Vec<Capture>, CaptureError> {
    let content = |problem: String| CaptureError::Content { path: path.to_owned(), problem };
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|error| content(error.to_string()))?;
    let none = Default::default();
    let metadata = header.metadata().as_ref().unwrap_or(&none);
    let Some(cases) = metadata.get("cases") else { return Ok(Vec::new()) };
    let cases: Vec<Vec<serde_json::Value>> = serde_json::from_str(cases)
        .map_err(|error| content(format!("`cases` is not a list of lists: {error}")))?;
    let gpu = metadata.get("gpu").map(String::as_str).unwrap_or_default();
    let chip = chip_of(gpu).ok_or_else(|| {
        content(format!(
            "it was captured on the gpu `{gpu}`, which is not modelled; `runner chip list` shows \
             the chips that are"
        ))
    })?;
    let file = SafeTensors::deserialize(bytes).map_err(|error| content(error.to_string()))?;
    let mut captures = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let format = |position: usize| {
            let name = case.get(position).and_then(|name| name.as_str()).unwrap_or_default();
            name.parse::<Format>()
                .map_err(|_| content(format!("case {index} has the unknown format `{name}`")))
        };
        let (w, x) = (format(0)?, format(1)?);
        let name = format!("c{index}");
        captures.push(case_of(&file, &name, chip, (x, w), |name| name != "nontf32"));
        if (x, w) == (Format::Tf32, Format::Tf32) {
            let f32 = (Format::F32, Format::F32);
            captures.push(case_of(&file, &name, chip, f32, |name| name == "nontf32"));
        }
    }
    let captures: Result<Vec<Capture>, String> = captures.into_iter().collect();
    let mut captures = captures.map_err(content)?;
    captures.retain(|capture| !capture.outputs.is_empty());
    Ok(captures)
}

/// The chip that a GPU's name, such as `NVIDIA H200`, speaks of.
fn chip_of(gpu: &str) -> Option<&'static Chip> {
    let words = |text: &str| {
        let words: Vec<&str> = text.split(|letter: char| !letter.is_alphanumeric()).collect();
        format!(" {} ", words.join(" "))
    };
    let gpu = words(gpu);
    CHIPS.iter().find(|chip| chip.products.iter().any(|product| gpu.contains(&words(product))))
}

fn case_of(
    file: &SafeTensors,
    name: &str,
    chip: &'static Chip,
    (x, w): (Format, Format),
    wanted: impl Fn(&str) -> bool,
) -> Result<Capture, String> {
    let codes = |operand: &str, format: Format| {
        let name = format!("{name}.{operand}");
        let view = file.tensor(&name).map_err(|_| format!("there is no tensor `{name}`"))?;
        codes_of(chip, format, &view).map_err(|problem| format!("tensor `{name}`: {problem}"))
    };
    let scale = |operand: &str| {
        let name = format!("{name}.{operand}_scale");
        let Ok(view) = file.tensor(&name) else { return Ok(1.0) };
        match (view.dtype(), view.data().try_into()) {
            (Dtype::F32, Ok(bytes)) => Ok(f32::from_le_bytes(bytes)),
            _ => Err(format!("tensor `{name}` is not one f32")),
        }
    };
    let (x, w) = (codes("x", x)?, codes("w", w)?);
    let prefix = format!("{name}.y.");
    let mut outputs = Vec::new();
    for (full, view) in file.iter() {
        let Some(name) = full.strip_prefix(&prefix).filter(|name| wanted(name)) else { continue };
        let format = match view.dtype() {
            Dtype::F32 => Format::F32,
            Dtype::BF16 => Format::Bf16,
            Dtype::F16 => Format::F16,
            other => return Err(format!("output `{full}` has the type {other}")),
        };
        if view.shape() != [x.rows(), w.rows()] {
            let (shape, n, m) = (view.shape(), x.rows(), w.rows());
            return Err(format!(
                "output `{full}` has shape {shape:?}; its operands give [{n}, {m}]"
            ));
        }
        let values = view.data().chunks_exact(format.bytes()).map(|bytes| {
            let mut code = [0; 4];
            code[..bytes.len()].copy_from_slice(bytes);
            format.decode(u32::from_le_bytes(code))
        });
        let y = Tensor::new(w.rows(), values.collect());
        outputs.push(CapturedOutput { name: name.to_owned(), format, y });
    }
    outputs.sort_by(|a, b| a.name.cmp(&b.name));
    let (x_scale, w_scale) = (scale("x")?, scale("w")?);
    Ok(Capture { name: name.to_owned(), chip, x, w, x_scale, w_scale, outputs })
}

/// An operand's codes. tf32 operands are captured as the f32 values that were
/// given to the library; the chip converts them.
fn codes_of(chip: &Chip, format: Format, view: &TensorView) -> Result<Codes, String> {
    let &[rows, width] = view.shape() else {
        return Err(format!("its shape is {:?}; a product needs matrices", view.shape()));
    };
    if rows == 0 || width == 0 {
        return Err("it is empty".to_owned());
    }
    let bytes = view.data();
    let wide = || bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
    let data = match (format, view.dtype()) {
        (Format::E4m3 | Format::E5m2, Dtype::U8) => CodeData::Bits8(bytes.to_vec()),
        (Format::Bf16, Dtype::BF16) | (Format::F16, Dtype::F16) => {
            let codes = bytes.as_chunks().0.iter().map(|&code| u16::from_le_bytes(code));
            CodeData::Bits16(codes.collect())
        }
        (Format::Tf32 | Format::F32, Dtype::F32) => {
            CodeData::Bits32(wide().map(|value| chip.encode(format, value)).collect())
        }
        (format, dtype) => return Err(format!("its type {dtype} holds no operand of {format}")),
    };
    Codes::new(format, rows, width, data).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::ChipName;

    #[test]
    fn a_gpu_is_known_by_whole_words() {
        let name = |gpu| chip_of(gpu).map(|chip| chip.name);
        assert_eq!(name("NVIDIA H200"), Some(ChipName::Hopper));
        assert_eq!(name("NVIDIA A100-SXM4-80GB"), Some(ChipName::Ampere));
        assert_eq!(name("NVIDIA GeForce RTX 4090"), Some(ChipName::Ada));
        assert_eq!(name("NVIDIA A2000"), None);
        assert_eq!(name(""), None);
    }
}
