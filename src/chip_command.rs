//! `runner chip`: list the chips, hold them to what real ones answered, multiply
//! two tensors as a chip would.
//!
//! It knows options that are parsed already and a place to write to; not the
//! command line, and no arithmetic of its own.

use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::chip::Basis;
use crate::compute::emulated::captures::{self, Capture, CaptureError};
use crate::compute::emulated::chip::{CHIPS, Chip, Unit, chip};
use crate::compute::emulated::gemm::{GemmError, Operand, Scales, gemm};
use crate::compute::emulated::identify::identify;
use crate::compute::emulated::quantize::{Codes, CodesError, absmax, scale_for};
use crate::compute::emulated::schedule::Schedule;
use crate::compute::emulated::vectors::{
    self, VectorAccumulator, VectorCheck, VectorError, verify_folder,
};
use crate::compute::{ComputeError, cuda, product};
use crate::dtype::Format;
use crate::op::{ChipName, FileTensor};
use crate::tensor::Tensor;
use crate::tensor_file::{self, TensorFileError};
use crate::text::Shown;
use crate::text::grouped;

/// What to do.
#[derive(Clone, Debug)]
pub enum ChipCommand {
    /// Chips, formats and their arithmetic.
    List,
    /// Check the chips against what real ones answered: hardware vectors, captured GEMMs, or both.
    Verify {
        /// The folder of safetensors files; none is what ships with the runner.
        folder: Option<PathBuf>,
    },
    /// The licence of the vectors that ship with the runner.
    Licence,
    /// `y = x w^T` as a chip computes it.
    Multiply(Box<Multiply>),
}

/// A tensor in a file: safetensors, NumPy, GGUF.
#[derive(Clone, Debug)]
pub struct TensorRef {
    /// The file.
    pub file: PathBuf,
    /// The tensor's name in it; a file of one tensor needs none.
    pub tensor: Option<String>,
}

/// One operand of a multiplication.
#[derive(Clone, Debug)]
pub struct MultiplyOperand {
    /// A matrix of rows of K elements.
    pub source: TensorRef,
    /// The format to multiply in; none is the tensor's own. An f32 tensor is
    /// converted, a tensor of bytes holds FP8 codes.
    pub format: Option<Format>,
    /// The scale; none is 1, or absmax over the largest finite value where f32
    /// is converted to FP8.
    pub scale: Option<f32>,
}

/// What to multiply and how.
#[derive(Clone, Debug)]
pub struct Multiply {
    /// x, `[N, K]`.
    pub x: MultiplyOperand,
    /// w, `[M, K]`.
    pub w: MultiplyOperand,
    /// Whose arithmetic.
    pub chip: ChipName,
    /// The schedule.
    pub schedule: Schedule,
    /// Type of the outputs: f32, bf16 or f16.
    pub output: Format,
    /// Whether this machine's GPU computes it, whatever chip it is of; the bits are the same.
    pub on_gpu: bool,
    /// Where to write `y`, `[N, M]` in f32.
    pub save: Option<PathBuf>,
}

/// What came of it, for the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChipOutcome {
    /// Done, and what was compared is equal.
    Pass,
    /// What was compared differs.
    Falsified,
}

/// A chip command that cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum ChipCommandError {
    /// The vectors cannot be read.
    #[error(transparent)]
    Vectors(#[from] VectorError),
    /// The captured GEMMs cannot be read.
    #[error(transparent)]
    Captures(#[from] CaptureError),
    /// The product cannot be computed.
    #[error(transparent)]
    Gemm(#[from] GemmError),
    /// The codes have no usable shape.
    #[error(transparent)]
    Codes(#[from] CodesError),
    /// A tensor that cannot be had from its file.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// A tensor of plain words without a format.
    #[error("{0}")]
    Unnamed(String),
    /// The operands cannot be multiplied.
    #[error(transparent)]
    Compute(#[from] ComputeError),
    /// A file that cannot be written.
    #[error("cannot write `{}`: {source}; choose another place", path.shown())]
    Save {
        /// The file.
        path: PathBuf,
        /// Why it cannot be.
        source: std::io::Error,
    },
    /// A file or tensor that is not what it should be.
    #[error("`{}`: {problem}", path.shown())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The chip has no unit for these formats.
    #[error("{chip:?} does not multiply {x} by {w}; `runner chip list` shows what it does")]
    Unsupported {
        /// The chip.
        chip: ChipName,
        /// Format of x.
        x: Format,
        /// Format of w.
        w: Format,
    },
    /// The report cannot be written.
    #[error("cannot write the report: {0}")]
    Report(#[from] std::io::Error),
}

/// Carries out a command and writes its report to `out`.
///
/// # Errors
/// If a file cannot be read, or the product cannot be computed.
pub fn run(command: &ChipCommand, out: &mut dyn Write) -> Result<ChipOutcome, ChipCommandError> {
    match command {
        ChipCommand::List => list(out),
        ChipCommand::Verify { folder: Some(folder) } => verify(folder, out),
        ChipCommand::Verify { folder: None } => verify_own(out),
        ChipCommand::Licence => {
            write!(out, "{}", vectors::SHIPPED_LICENCE)?;
            Ok(ChipOutcome::Pass)
        }
        ChipCommand::Multiply(multiply) => self::multiply(multiply, out),
    }
}

fn list(out: &mut dyn Write) -> Result<ChipOutcome, ChipCommandError> {
    writeln!(
        out,
        "{:<14} {:<16} {:<11} {:>9} {:>3} {:>3} {:>5}  {:<20} {:<9} {:<9}",
        "chip",
        "products",
        "formats",
        "per block",
        "F",
        "R",
        "floor",
        "instruction",
        "chained",
        "promoted"
    )?;
    let mut sources: Vec<&Basis> = Vec::new();
    for row in &CHIPS {
        for unit in row.units {
            let Unit::TensorCore(core) = unit.unit else { continue };
            let formats: Vec<&str> = unit.formats.iter().map(|format| format.name()).collect();
            let block = if core.blocks > 1 {
                format!("{} x {}", core.blocks, core.products)
            } else {
                core.products.to_string()
            };
            for (place, (instruction, basis)) in unit.instructions.iter().enumerate() {
                let first = place == 0;
                let one = |text: String| if first { text } else { String::new() };
                let of_products = |basis: Option<&Basis>| {
                    one(basis.map_or("-".to_owned(), |basis| basis.evidence.to_string()))
                };
                let line = format!(
                    "{:<14} {:<16} {:<11} {:>9} {:>3} {:>3} {:>5}  {:<20} {:<9} {:<9}",
                    one(row.name.to_string()),
                    one(row.products.join(", ")),
                    one(formats.join(", ")),
                    one(block.clone()),
                    one(core.alignment_bits.to_string()),
                    one(core.result_bits.to_string()),
                    one(core.exponent_floor.to_string()),
                    format!("{instruction} {}", basis.evidence),
                    of_products(Some(&unit.chained)),
                    of_products(unit.promoted.as_ref()),
                );
                writeln!(out, "{}", line.trim_end())?;
                for basis in [Some(basis), Some(&unit.chained), unit.promoted.as_ref()] {
                    let new = basis.filter(|basis| !sources.contains(basis));
                    sources.extend(new);
                }
            }
        }
    }
    for line in [
        "",
        "per block: products that are added at once, after the blocks of an instruction",
        "F: fraction bits of an aligned addend; R: fraction bits of the sum; floor: the least exponent",
        "   to which addends are aligned",
        "chained, promoted: products of which each instruction goes on with the sum of the last, and FP8",
        "   products whose sums are promoted to f32 every 128 elements of K",
        "f32: every chip, sequential fused multiply-adds on the CUDA cores; replayed on Hopper, else assumed",
        "",
        "What it rests on",
    ] {
        writeln!(out, "{line}")?;
    }
    sources.sort_by_key(|basis| basis.evidence);
    for Basis { evidence, source } in sources {
        writeln!(out, "  {:<9}  {source}", evidence.name())?;
    }
    Ok(ChipOutcome::Pass)
}

fn chip_name(chip: &Chip) -> String {
    format!("{:?}", chip.name).to_lowercase()
}

fn verify(folder: &Path, out: &mut dyn Write) -> Result<ChipOutcome, ChipCommandError> {
    let captures = captures::read_folder(folder)?;
    let checks = match verify_folder(folder, |core| core) {
        Err(VectorError::Nothing { .. }) if !captures.is_empty() => Vec::new(),
        checks => checks?,
    };
    let differ = report_vectors(&checks, out)? + report_captures(&captures, out)?;
    Ok(if differ == 0 { ChipOutcome::Pass } else { ChipOutcome::Falsified })
}

/// Checks what ships with the runner: a cut of published vectors, and of captures of our own.
fn verify_own(out: &mut dyn Write) -> Result<ChipOutcome, ChipCommandError> {
    let checks = vectors::verify_shipped(|core| core)?;
    let differ = report_vectors(&checks, out)?;
    let differ = differ + report_captures(&captures::read_shipped()?, out)?;
    writeln!(
        out,
        "vectors: Khattak and Mikaitis, arXiv 2512.07004, BSD-2-Clause (`runner chip licence`); \
         captures: PyTorch on an H200"
    )?;
    Ok(if differ == 0 { ChipOutcome::Pass } else { ChipOutcome::Falsified })
}

/// Writes a line per set of vectors and one for all; gives the vectors that differ.
fn report_vectors(checks: &[VectorCheck], out: &mut dyn Write) -> Result<usize, ChipCommandError> {
    let (mut vectors, mut differ) = (0, 0);
    for check in checks {
        let note = match check.accumulator {
            VectorAccumulator::Instruction => "",
            VectorAccumulator::Unused => "  (c not used)",
            VectorAccumulator::AddedAfter => "  (c added after, in f32)",
        };
        writeln!(
            out,
            "{:<6} {:<5} {:>6} of {:>6} vectors differ{note}",
            check.chip,
            check.format,
            grouped(check.mismatches),
            grouped(check.vectors)
        )?;
        vectors += check.vectors;
        differ += check.mismatches;
    }
    if !checks.is_empty() {
        let (sets, differ, vectors) = (checks.len(), grouped(differ), grouped(vectors));
        writeln!(out, "{sets} sets: {differ} of {vectors} vectors differ")?;
    }
    Ok(differ)
}

/// Identifies the schedule of every captured output; writes a line for each and
/// one for all, and gives the elements that no schedule explains.
fn report_captures(captures: &[Capture], out: &mut dyn Write) -> Result<usize, ChipCommandError> {
    let (mut outputs, mut elements, mut differ) = (0, 0, 0);
    for capture in captures {
        let (x_format, w_format) = (capture.x.format(), capture.w.format());
        let unit = capture.chip.unit(x_format, w_format).ok_or(ChipCommandError::Unsupported {
            chip: capture.chip.name,
            x: x_format,
            w: w_format,
        })?;
        for output in &capture.outputs {
            let (x, w) = capture.operands(output);
            let identified = identify(unit, &x, &w, output.format, &output.y)?;
            writeln!(out, "{:<4} {:<18} {identified}", capture.name, output.name)?;
            outputs += 1;
            elements += identified.elements;
            differ += identified.mismatches;
        }
    }
    if outputs > 0 {
        let (differ, elements) = (grouped(differ), grouped(elements));
        writeln!(out, "{outputs} captured outputs: {differ} of {elements} elements differ")?;
    }
    Ok(differ)
}

fn multiply(options: &Multiply, out: &mut dyn Write) -> Result<ChipOutcome, ChipCommandError> {
    let (x_codes, x_scale) = read_operand(&options.x)?;
    let (w_codes, w_scale) = read_operand(&options.w)?;
    let (x_format, w_format) = (x_codes.format(), w_codes.format());
    let chip = chip(options.chip);
    let unit = chip.unit(x_format, w_format).ok_or(ChipCommandError::Unsupported {
        chip: chip.name,
        x: x_format,
        w: w_format,
    })?;
    let x = Operand { codes: &x_codes, scales: Scales::Tensor(x_scale) };
    let w = Operand { codes: &w_codes, scales: Scales::Tensor(w_scale) };
    let (schedule, output) = (options.schedule, options.output);
    let y = match options.on_gpu {
        true => cuda::emulated_product(unit, &schedule, &x, &w, output)?,
        false => gemm(unit, &schedule, &x, &w, output)?,
    };
    writeln!(
        out,
        "y [{}, {}] = x [{2}, {3}] {x_format}, scale {x_scale}, times w [{1}, {3}] {w_format}, \
         scale {w_scale}, as {4} does",
        x_codes.rows(),
        w_codes.rows(),
        x_codes.rows(),
        x_codes.width(),
        chip_name(chip)
    )?;
    writeln!(out, "{schedule}, output {output}")?;
    writeln!(out, "blake3 of y's f32 values: {}", blake3::hash(&y.to_le_bytes()))?;
    match &options.save {
        None => writeln!(out, "y is not kept; `--save FILE` keeps it")?,
        Some(path) => {
            save(path, &y)?;
            writeln!(out, "y written to `{}`", path.shown())?;
        }
    }
    Ok(ChipOutcome::Pass)
}

fn wanted(source: &TensorRef, format: Option<Format>) -> FileTensor {
    let (file, tensor) = (source.file.clone(), source.tensor.clone());
    FileTensor { file, tensor, format, shape: None, scale: None }
}

fn read_operand(operand: &MultiplyOperand) -> Result<(Codes, f32), ChipCommandError> {
    let own = tensor_file::read(&wanted(&operand.source, None));
    let stored = match (own, operand.format) {
        // What is stored as f32 is converted.
        (Ok(stored), Some(format)) if stored.format == Format::F32 && format != Format::F32 => {
            let values = stored.values();
            let scale = operand.scale.unwrap_or_else(|| scale_for(format, absmax(values.data())));
            return Ok((Codes::quantize(format, stored.width, values.data(), scale)?, scale));
        }
        (Ok(stored), None) => stored,
        // Plain words, which are codes of the format that is asked for.
        (_, Some(format)) => tensor_file::read(&wanted(&operand.source, Some(format)))?,
        (Err(error), None) => return Err(unnamed(error)),
    };
    Ok((product::codes(&stored)?, operand.scale.unwrap_or(1.0)))
}

/// A file's keyword for a format is an option here.
fn unnamed(error: TensorFileError) -> ChipCommandError {
    let text = error.to_string();
    match text.contains("by `dtype`") {
        true => ChipCommandError::Unnamed(text.replace("`dtype`", "`--x-format` and `--w-format`")),
        false => ChipCommandError::File(error),
    }
}

fn save(path: &Path, y: &Tensor) -> Result<(), ChipCommandError> {
    let content = |problem: String| ChipCommandError::Content { path: path.to_owned(), problem };
    let bytes = y.to_le_bytes();
    let view = TensorView::new(Dtype::F32, vec![y.rows(), y.width()], &bytes)
        .map_err(|error| content(error.to_string()))?;
    let file =
        safetensors::serialize([("y", view)], None).map_err(|error| content(error.to_string()))?;
    std::fs::write(path, file)
        .map_err(|source| ChipCommandError::Save { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(command: &ChipCommand) -> (ChipOutcome, String) {
        let mut out = Vec::new();
        let outcome = run(command, &mut out).expect("a command that can be carried out");
        (outcome, String::from_utf8(out).expect("text"))
    }

    #[test]
    fn the_list_shows_every_chip_and_format() {
        let (outcome, text) = text(&ChipCommand::List);
        assert_eq!(outcome, ChipOutcome::Pass);
        for word in ["volta", "ampere", "ada", "hopper", "blackwell", "e4m3, e5m2", "2 x 16"] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
    }

    #[test]
    fn a_product_is_saved_and_a_tensor_that_is_not_there_is_told() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("in.safetensors");
        let values: Vec<u8> =
            (0..4 * 256).flat_map(|i| ((i * 37 % 101) as f32 - 50.0).to_le_bytes()).collect();
        let view = |rows: usize| {
            TensorView::new(Dtype::F32, vec![rows, 256], &values[..rows * 256 * 4]).expect("a view")
        };
        let bytes = safetensors::serialize([("x", view(2)), ("w", view(4))], None).expect("a file");
        std::fs::write(&file, bytes).expect("a file in the temporary folder");

        let operand = |tensor: &str| MultiplyOperand {
            source: TensorRef { file: file.clone(), tensor: Some(tensor.to_owned()) },
            format: Some(Format::E4m3),
            scale: None,
        };
        let y = folder.path().join("y.safetensors");
        let mut options = Multiply {
            x: operand("x"),
            w: operand("w"),
            chip: ChipName::Auto,
            schedule: Schedule::PROMOTED,
            output: Format::F32,
            on_gpu: false,
            save: Some(y.clone()),
        };
        let (_, report) = text(&ChipCommand::Multiply(Box::new(options.clone())));
        assert!(report.contains("as hopper does\npromoted, split-K 1"), "{report}");

        let wanted = FileTensor { file: y, tensor: None, format: None, shape: None, scale: None };
        let saved = tensor_file::read(&wanted).expect("what was written");
        assert_eq!((saved.rows, saved.width, saved.format), (2, 4, Format::F32));

        options.w.source.tensor = Some("v".to_owned());
        let error = run(&ChipCommand::Multiply(Box::new(options)), &mut Vec::new())
            .expect_err("no such tensor");
        assert!(error.to_string().contains("no tensor `v`"), "{error}");
    }
}
