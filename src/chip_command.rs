//! `runner chip`: list the chips, hold them to what real ones answered, multiply
//! two tensors as a chip would.
//!
//! It knows options that are parsed already and a place to write to; not the
//! command line, and no arithmetic of its own.

use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::block_format::{BlockFormat, OperandFormat};
use crate::chip::{Basis, MatrixCore, TensorCore};
use crate::compute::emulated::captures::{self, Capture, CaptureError};
use crate::compute::emulated::chip::{CHIPS, Chip, Unit, chip};
use crate::compute::emulated::gemm::{GemmError, Operand, Scales, gemm};
use crate::compute::emulated::identify::identify;
use crate::compute::emulated::quantize::{
    BlockScales, Codes, CodesError, absmax, quantize_blocks, quantize_row, scale_for,
};
use crate::compute::emulated::schedule::Schedule;
use crate::compute::emulated::vectors::{
    self, VectorAccumulator, VectorCheck, VectorError, verify_folder,
};
use crate::compute::{ComputeError, cuda, product};
use crate::dtype::Format;
use crate::op::{Accumulate, ChipName, FileTensor};
use crate::tensor::Tensor;
use crate::tensor_file::{self, TensorFileError, blocks};
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
    pub format: Option<OperandFormat>,
    /// The codes of the blocks' scales, where the tensor holds the codes of a block-scaled format.
    pub scales: Option<TensorRef>,
    /// The scale; none is 1, or absmax over the largest finite value where f32
    /// is converted to FP8; of a block-scaled format that of the whole operand.
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
    #[error(
        "the chip `{chip}` does not multiply {x} by {w}; `runner chip list` shows what it does"
    )]
    Unsupported {
        /// The chip.
        chip: ChipName,
        /// Format of x.
        x: String,
        /// Format of w.
        w: String,
    },
    /// An operand whose codes or scales cannot be had from a file as they are asked for.
    #[error("{0}")]
    Operand(String),
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
        "{:<14} {:<16} {:<13} {:>9} {:>3} {:>5} {:>5}  {:<20} {:<9} {:<9}",
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
            let formats: Vec<&str> = unit.formats.iter().map(|format| format.name()).collect();
            let formats = formats.join(", ");
            let figures = figures_of(&unit.unit);
            let row = ListRow { chip: row, formats, figures, chained: &unit.chained };
            list_unit(&row, unit.instructions, unit.promoted.as_ref(), &mut sources, out)?;
        }
        for unit in row.block_units {
            let (formats, figures) = (families(unit.formats), figures_of(&unit.unit));
            let row = ListRow { chip: row, formats, figures, chained: &unit.chained };
            list_unit(&row, unit.instructions, None, &mut sources, out)?;
        }
    }
    for line in [
        "",
        "per block: products that are added at once, after the blocks of an instruction; 4 of 16: four sums of",
        "   16 products each, which are exact",
        "   pairs: sums of pairs in f32",
        "F: fraction bits of an aligned addend; all: the sum is exact; R: fraction bits of the sum; 31,23: rounded",
        "   down to 31, then to nearest; floor: the least exponent to which addends are aligned",
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

/// What a row of the list is of.
struct ListRow<'a> {
    chip: &'a Chip,
    formats: String,
    /// Products per block, F, R, and the exponent's floor.
    figures: [String; 4],
    chained: &'a Basis,
}

/// A unit in figures: products per block, F, R, and the exponent's floor.
fn figures_of(unit: &Unit) -> [String; 4] {
    let of_core = |core: &TensorCore, block: String| {
        let TensorCore { alignment_bits, result_bits, exponent_floor, .. } = core;
        [block, alignment_bits.to_string(), result_bits.to_string(), exponent_floor.to_string()]
    };
    let none = || "-".to_owned();
    match unit {
        Unit::TensorCore(core) if core.blocks > 1 => {
            of_core(core, format!("{} x {}", core.blocks, core.products))
        }
        Unit::TensorCore(core) => of_core(core, core.products.to_string()),
        Unit::BlockScaled(scaled) if scaled.group > 1 => {
            let groups = scaled.core.products / scaled.group;
            of_core(&scaled.core, format!("{groups} of {}", scaled.group))
        }
        Unit::BlockScaled(scaled) => of_core(&scaled.core, scaled.core.products.to_string()),
        Unit::SequentialFma => ["1".to_owned(), none(), "23".to_owned(), none()],
        Unit::Integers => ["any".to_owned(), "all".to_owned(), "int32".to_owned(), none()],
        Unit::MatrixCore(MatrixCore::Exact { products }) => {
            [products.to_string(), "all".to_owned(), "23".to_owned(), none()]
        }
        Unit::MatrixCore(MatrixCore::Pairwise { products }) => {
            [format!("{products} pairs"), "f32".to_owned(), "23".to_owned(), none()]
        }
        Unit::MatrixCore(MatrixCore::TwoStages { products, alignment_bits, sum_bits }) => {
            let sum = format!("{sum_bits},23");
            [products.to_string(), alignment_bits.to_string(), sum, none()]
        }
        Unit::MatrixCore(MatrixCore::EvenOdd { products, alignment_bits, sum_bits }) => {
            let sum = format!("{sum_bits},23");
            [format!("2 of {}", products / 2), alignment_bits.to_string(), sum, none()]
        }
    }
}

/// The names of block-scaled formats; those that differ in the element alone have one.
fn families(formats: &[BlockFormat]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for format in formats {
        let name = format.name().split('-').next().unwrap_or_default();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

/// Writes a line for each instruction of a unit, and keeps the sources that are new.
fn list_unit<'a>(
    row: &ListRow<'a>,
    instructions: &'a [(&'static str, Basis)],
    promoted: Option<&'a Basis>,
    sources: &mut Vec<&'a Basis>,
    out: &mut dyn Write,
) -> Result<(), ChipCommandError> {
    let ListRow { chip, formats, figures: [block, alignment, result, floor], chained } = row;
    for (place, (instruction, basis)) in instructions.iter().enumerate() {
        let first = place == 0;
        let one = |text: String| if first { text } else { String::new() };
        let of_products = |basis: Option<&Basis>| {
            one(basis.map_or("-".to_owned(), |basis| basis.evidence.to_string()))
        };
        let line = format!(
            "{:<14} {:<16} {:<13} {:>9} {:>3} {:>5} {:>5}  {:<20} {:<9} {:<9}",
            one(chip.name.to_string()),
            one(chip.products.join(", ")),
            one(formats.clone()),
            one(block.clone()),
            one(alignment.clone()),
            one(result.clone()),
            one(floor.clone()),
            format!("{instruction} {}", basis.evidence),
            of_products(Some(chained)),
            of_products(promoted),
        );
        writeln!(out, "{}", line.trim_end())?;
        for basis in [Some(basis), Some(*chained), promoted] {
            let new = basis.filter(|basis| !sources.contains(basis));
            sources.extend(new);
        }
    }
    Ok(())
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
            x: x_format.to_string(),
            w: w_format.to_string(),
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
    let (x_codes, x_scales) = read_operand("x", &options.x)?;
    let (w_codes, w_scales) = read_operand("w", &options.w)?;
    let [x_name, w_name] = [(&x_codes, &x_scales), (&w_codes, &w_scales)].map(named);
    let chip = chip(options.chip);
    let unit = match (&x_scales, &w_scales) {
        (Scales::Blocks(x), Scales::Blocks(w)) if x.format == w.format => {
            chip.block_unit(x.format).map(|row| &row.unit)
        }
        (Scales::Blocks(_), _) | (_, Scales::Blocks(_)) => None,
        _ => chip.unit(x_codes.format(), w_codes.format()),
    };
    let unit = unit.ok_or_else(|| ChipCommandError::Unsupported {
        chip: chip.name,
        x: x_name.clone(),
        w: w_name.clone(),
    })?;
    let x_said = scale_in_words(&x_scales);
    let w_said = scale_in_words(&w_scales);
    // The accumulator of block-scaled operands carries all along K, and sums of integers are exact, whatever is
    // asked for.
    let schedule = match unit {
        Unit::BlockScaled(_) => Schedule { accumulate: Accumulate::Fast, ..options.schedule },
        Unit::Integers => Schedule::INTEGERS,
        _ => options.schedule,
    };
    let x = Operand { codes: &x_codes, scales: x_scales };
    let w = Operand { codes: &w_codes, scales: w_scales };
    let output = options.output;
    let y = match options.on_gpu {
        true => cuda::emulated_product(unit, &schedule, &x, &w, output)?,
        false => gemm(unit, &schedule, &x, &w, output)?,
    };
    writeln!(
        out,
        "y [{}, {}] = x [{2}, {3}] {x_name}, {x_said}, times w [{1}, {3}] {w_name}, {w_said}, \
         as {4} does",
        x_codes.rows(),
        w_codes.rows(),
        x_codes.rows(),
        x_codes.width(),
        chip.name
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

/// What an operand is made of.
fn named((codes, scales): (&Codes, &Scales)) -> String {
    match scales {
        Scales::Blocks(scales) => scales.format.to_string(),
        _ => codes.format().to_string(),
    }
}

/// An operand's scale, for the report.
fn scale_in_words(scales: &Scales) -> String {
    match scales {
        Scales::Blocks(scales) if scales.whole == 1.0 => "scales of blocks".to_owned(),
        Scales::Blocks(scales) => format!("scales of blocks and {} of all", scales.whole),
        Scales::Row(_) => "a scale for each row".to_owned(),
        scales => format!("scale {}", scales.at(0, 0, 1)),
    }
}

fn read_operand(
    name: &'static str,
    operand: &MultiplyOperand,
) -> Result<(Codes, Scales), ChipCommandError> {
    let format = match operand.format {
        Some(OperandFormat::Blocks(format)) => return read_blocks(name, operand, format),
        Some(OperandFormat::Single(format)) => Some(format),
        None => None,
    };
    let of_rows = operand.scales.as_ref().map(|scales| row_scales(name, operand, scales));
    let of_rows = of_rows.transpose()?;
    let own = tensor_file::read(&wanted(&operand.source, None));
    let stored = match (own, format) {
        // What is stored as f32 is converted.
        (Ok(stored), Some(format)) if stored.format == Format::F32 && format != Format::F32 => {
            let values = stored.values();
            if let Some(scales) = of_rows {
                return converted_rows(name, format, &values, scales);
            }
            let scale = operand.scale.unwrap_or_else(|| scale_for(format, absmax(values.data())));
            let codes = Codes::quantize(format, stored.width, values.data(), scale)?;
            return Ok((codes, Scales::Tensor(scale)));
        }
        (Ok(stored), None) => stored,
        // Plain words, which are codes of the format that is asked for.
        (_, Some(format)) => tensor_file::read(&wanted(&operand.source, Some(format)))?,
        (Err(error), None) => return Err(unnamed(error)),
    };
    let scales = of_rows.map_or(Scales::Tensor(operand.scale.unwrap_or(1.0)), Scales::Row);
    Ok((product::codes(&stored)?, scales))
}

/// A scale for each row of an operand.
fn row_scales(
    name: &'static str,
    operand: &MultiplyOperand,
    scales: &TensorRef,
) -> Result<Vec<f32>, ChipCommandError> {
    if operand.scale.is_some() {
        return Err(ChipCommandError::Operand(format!(
            "{name} has `--{name}-scale` and `--{name}-scales`; it has one scale or one for each row"
        )));
    }
    let stored = match tensor_file::read(&wanted(scales, None)) {
        Err(error) if error.to_string().contains("by `dtype`") => {
            return Err(ChipCommandError::Operand(format!(
                "`--{name}-scales` holds codes: scales of rows are f32, and of codes of blocks' \
                 scales `--{name}-format` says the block-scaled format, as `nvfp4`"
            )));
        }
        stored => stored?,
    };
    Ok(stored.values().data().to_vec())
}

/// Values converted with a scale for each row.
fn converted_rows(
    name: &'static str,
    format: Format,
    values: &Tensor,
    scales: Vec<f32>,
) -> Result<(Codes, Scales), ChipCommandError> {
    let (rows, given) = (values.rows(), scales.len());
    if rows != given {
        return Err(ChipCommandError::Gemm(GemmError::ScaleCount {
            operand: name,
            expected: rows,
            given,
        }));
    }
    let mut codes = Codes::zeros(format, rows, values.width());
    for (row, (mut codes, scale)) in codes.rows_mut().into_iter().zip(&scales).enumerate() {
        quantize_row(format, values.row(row), *scale, &mut codes);
    }
    Ok((codes, Scales::Row(scales)))
}

/// An operand of a block-scaled format: values that are converted, or codes beside those of the
/// blocks' scales.
fn read_blocks(
    name: &'static str,
    operand: &MultiplyOperand,
    format: BlockFormat,
) -> Result<(Codes, Scales), ChipCommandError> {
    if let Some(scale) = operand.scale.filter(|scale| !(scale.is_finite() && *scale > 0.0)) {
        return Err(ChipCommandError::Operand(format!(
            "`--{name}-scale` is {scale}; a scale is a positive finite number"
        )));
    }
    let Some(scales) = &operand.scales else {
        let stored = tensor_file::read(&wanted(&operand.source, None));
        let is_words = matches!(&stored, Err(error) if error.to_string().contains("by `dtype`"));
        if is_words || stored.as_ref().is_ok_and(|stored| stored.format.is_fp8()) {
            return Err(ChipCommandError::Operand(format!(
                "{name} holds codes, and codes of {format} need the scales of their blocks: write \
                 `--{name}-scales FILE:TENSOR` too, or give values, which are converted"
            )));
        }
        let stored = stored?;
        let values = stored.values();
        let whole = operand.scale.unwrap_or_else(|| format.whole_scale(absmax(values.data())));
        let (codes, scales) = quantize_blocks(format, stored.width, values.data(), whole)?;
        return Ok((codes, Scales::Blocks(scales)));
    };
    let stored = tensor_file::read(&wanted(&operand.source, Some(blocks::bytes_of(format))))?;
    let elements = blocks::elements(name, format, stored).map_err(ChipCommandError::Operand)?;
    let (rows, width) = (elements.rows, elements.width);
    let of_blocks = tensor_file::read(&wanted(scales, Some(Format::E4m3)))?;
    let count = width.div_ceil(format.block());
    if (of_blocks.rows, of_blocks.width) != (rows, count) {
        return Err(ChipCommandError::Operand(format!(
            "the scales of {name} are [{}, {}], and {format} codes of [{rows}, {width}] need \
             [{rows}, {count}]: one for each {} elements, in the order of the rows; undo a layout \
             that is made for tensor cores first",
            of_blocks.rows,
            of_blocks.width,
            format.block()
        )));
    }
    blocks::check_scales(name, format, &of_blocks).map_err(ChipCommandError::Operand)?;
    let codes = product::codes(&elements)?;
    let whole = operand.scale.unwrap_or(1.0);
    Ok((
        codes,
        Scales::Blocks(BlockScales { format, codes: of_blocks.bytes, blocks: count, whole }),
    ))
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
        let words = TensorView::new(Dtype::U8, vec![2, 128], &values[..256]).expect("a view");
        let tensors = [("x", view(2)), ("w", view(4)), ("codes", words)];
        let bytes = safetensors::serialize(tensors, None).expect("a file");
        std::fs::write(&file, bytes).expect("a file in the temporary folder");

        let operand = |tensor: &str| MultiplyOperand {
            source: TensorRef { file: file.clone(), tensor: Some(tensor.to_owned()) },
            format: Some(OperandFormat::Single(Format::E4m3)),
            scales: None,
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

        let blocks = |name: &str| name.parse().ok();
        let told = |options: &Multiply| -> String {
            let mut out = Vec::new();
            match run(&ChipCommand::Multiply(Box::new(options.clone())), &mut out) {
                Ok(_) => String::from_utf8(out).expect("text"),
                Err(error) => error.to_string(),
            }
        };
        (options.x.format, options.w.format) = (blocks("nvfp4"), blocks("nvfp4"));
        let on_hopper = told(&options);
        assert!(on_hopper.contains("does not multiply nvfp4 by nvfp4"), "{on_hopper}");
        options.chip = ChipName::Blackwell;
        let report = told(&options);
        assert!(report.contains("of all, as blackwell does\nfast, split-K 1"), "{report}");
        options.w.format = blocks("mxfp4");
        assert!(told(&options).contains("the chip `blackwell` does not multiply nvfp4 by mxfp4"));
        let of_codes = TensorRef { file: file.clone(), tensor: Some("codes".to_owned()) };
        options.x.source.clone_from(&of_codes);
        let told_scales = told(&options);
        assert!(told_scales.starts_with("x holds codes, and codes of nvfp4"), "{told_scales}");
        options.x.source.tensor = Some("x".to_owned());
        options.x.format = blocks("e4m3");
        options.x.scales = Some(of_codes);
        let told_rows = told(&options);
        assert!(told_rows.starts_with("`--x-scales` holds codes"), "{told_rows}");
        options.x.scales = None;
        (options.x.format, options.w.format) = (blocks("e4m3"), blocks("e4m3"));

        options.w.source.tensor = Some("v".to_owned());
        let error = run(&ChipCommand::Multiply(Box::new(options)), &mut Vec::new())
            .expect_err("no such tensor");
        assert!(error.to_string().contains("no tensor `v`"), "{error}");
    }
}
