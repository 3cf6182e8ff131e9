//! The operands of a dump: read from files by path or by name, their types recognised,
//! their axes put in order.
//!
//! Whatever is assumed is said in a remark. It knows shapes and formats, not the
//! arithmetic that follows.

use std::path::{Path, PathBuf};

use crate::block_format::BlockFormat;
use crate::compute::ComputeError;
use crate::dtype::Format;
use crate::op::FileTensor;
use crate::tensor::Tensor;
use crate::tensor_file::{BlockScales, CodedTensor, TensorFile, TensorFileError, blocks};
use crate::text::Shown;

/// Why a dump cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    /// A tensor that cannot be had from its file.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// The op cannot be computed.
    #[error(transparent)]
    Compute(#[from] ComputeError),
    /// What was asked for does not fit, with the remedy.
    #[error("{0}")]
    Usage(String),
}

/// Where a tensor lies, and how its elements are to be read.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file.
    pub file: PathBuf,
    /// The tensor's name in it; a file of one tensor needs none.
    pub tensor: Option<String>,
    /// The format of its elements, where the file does not say.
    pub format: Option<Format>,
    /// The block-scaled format of its elements, where they are of one.
    pub blocks: Option<BlockFormat>,
    /// Its shape, where the file does not say.
    pub shape: Option<Vec<usize>>,
}

impl Source {
    /// `FILE` or `FILE:TENSOR`.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn parse(text: &str) -> Result<Source, JudgeError> {
        let of = |file: &str, tensor: Option<&str>| Source {
            file: PathBuf::from(file),
            tensor: tensor.map(str::to_owned),
            format: None,
            blocks: None,
            shape: None,
        };
        if Path::new(text).exists() {
            return Ok(of(text, None));
        }
        match text.rsplit_once(':') {
            Some((file, tensor)) if !tensor.is_empty() && Path::new(file).exists() => {
                Ok(of(file, Some(tensor)))
            }
            Some((file, tensor)) if !file.is_empty() && !tensor.is_empty() => Err(missing(file)),
            _ => Err(missing(text)),
        }
    }
}

fn missing(path: &str) -> JudgeError {
    JudgeError::Usage(format!(
        "cannot open `{path}`: there is no such file; give FILE, or FILE:TENSOR for a tensor of a \
         file"
    ))
}

/// An operand as it was read.
#[derive(Clone, Debug)]
pub struct Operand {
    /// What it is in the op: `x`.
    pub name: &'static str,
    /// Its codes; leading dimensions are multiplied together.
    pub codes: CodedTensor,
    /// The shape that the file has.
    pub shape: Vec<usize>,
    /// The block-scaled format that its elements are of.
    pub blocks: Option<BlockFormat>,
    /// The format that was recognised in f32 values.
    pub recognised: Option<Format>,
    /// The narrower format of nearly all of y's f32 values.
    pub mostly: Option<Mostly>,
}

/// A format that nearly all values of a tensor have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mostly {
    /// The format.
    pub format: Format,
    /// Values that it does not hold.
    pub others: usize,
    /// Where the first of them is: row and column.
    pub first: [usize; 2],
}

/// Reads an operand. f32 values that are all values of bf16 or f16 are taken as such.
///
/// # Errors
/// If the file or tensor is missing or unusable.
pub fn read(name: &'static str, source: &Source) -> Result<Operand, JudgeError> {
    let file = TensorFile::open(&source.file)?;
    let wanted = FileTensor {
        file: source.file.clone(),
        tensor: source.tensor.clone(),
        format: source.blocks.map_or(source.format, |format| Some(blocks::bytes_of(format))),
        shape: source.shape.clone(),
        scale: None,
    };
    if let Some(tensor) = source.tensor.as_ref().filter(|_| file.is_nameless()) {
        return Err(JudgeError::Usage(format!(
            "`{}` holds one tensor, which has no name: leave out `:{tensor}`",
            source.file.display()
        )));
    }
    if source.tensor.is_none() && file.names().count() > 1 {
        return Err(JudgeError::Usage(format!(
            "`{}` holds several tensors: write `{}:NAME` for {name}; it has {}",
            source.file.shown(),
            source.file.shown(),
            file.found()
        )));
    }
    let codes = file.read(&wanted).map_err(|error| {
        let text = error.to_string();
        match text.contains("`dtype`") {
            true => JudgeError::Usage(
                text.replace(
                    "`dtype` and `shape`",
                    &format!("`--dtype-{name}` and `--shape-{name}`"),
                )
                .replace("`dtype`", &format!("`--dtype-{name}`")),
            ),
            false => JudgeError::File(error),
        }
    })?;
    let shape = match &source.shape {
        Some(shape) => shape.clone(),
        None => file.shape(source.tensor.as_deref())?.to_vec(),
    };
    let mut shape = shape;
    let (codes, narrow) = match (source.blocks, source.format) {
        (Some(format), _) => {
            let stored = codes.width;
            let codes = blocks::elements(name, format, codes).map_err(JudgeError::Usage)?;
            if let Some(last) = shape.last_mut() {
                *last = *last * codes.width / stored;
            }
            (codes, None)
        }
        (None, None) => recognised(codes),
        (None, Some(_)) => (codes, None),
    };
    let mostly = if name == "y" { mostly(&codes) } else { None };
    Ok(Operand { name, codes, shape, blocks: source.blocks, recognised: narrow, mostly })
}

/// The scales of blocks: codes of a byte each, or their values as f32.
fn block_scales(name: &str, format: BlockFormat, source: &Source) -> Result<Operand, JudgeError> {
    let as_bytes = Source { format: Some(Format::E4m3), ..source.clone() };
    let Ok(stored) = read("scale", &as_bytes) else { return read("scale", source) };
    let codec = format.scales();
    blocks::check_scales(name, format, &stored.codes).map_err(JudgeError::Usage)?;
    let codes = &stored.codes.bytes;
    let bytes = codes.iter().flat_map(|code| codec.decode(*code).to_le_bytes()).collect();
    let codes = CodedTensor { format: Format::F32, bytes, ..stored.codes };
    Ok(Operand { codes, ..stored })
}

/// The share of y's values that give it their type.
const NEARLY_ALL: f64 = 0.9;

/// The narrower format of nearly all values that are not zero, where some have another.
pub fn mostly(codes: &CodedTensor) -> Option<Mostly> {
    if codes.format != Format::F32 {
        return None;
    }
    let values = codes.values();
    let telling = values.data().iter().filter(|value| **value != 0.0 && value.is_finite()).count();
    [Format::Bf16, Format::F16].into_iter().find_map(|format| {
        let is_other = |value: &&f32| value.is_finite() && format.round(**value) != **value;
        let others = values.data().iter().filter(is_other).count();
        let first = values.data().iter().position(|value| is_other(&value))?;
        let first = [first / codes.width, first % codes.width];
        let nearly_all = (telling - others) as f64 >= NEARLY_ALL * telling as f64;
        nearly_all.then_some(Mostly { format, others, first })
    })
}

/// What was recognised in f32 values, in a remark: `x and w are stored as f32 and ...`.
pub fn recognised_in_words(operands: &[Operand]) -> Vec<String> {
    [Format::Bf16, Format::F16]
        .into_iter()
        .filter_map(|format| {
            let found = operands.iter().filter(|operand| operand.recognised == Some(format));
            let names: Vec<&str> = found.map(|operand| operand.name).collect();
            let (last, others) = names.split_last()?;
            let (names, are) = match others {
                [] => ((*last).to_owned(), "is"),
                others => (format!("{} and {last}", others.join(", ")), "are"),
            };
            Some(format!(
                "{names} {are} stored as f32 and every value is a {format}: taken as {format}"
            ))
        })
        .collect()
}

/// The narrowest of bf16 and f16 that holds all values of an f32 tensor, with its codes.
pub fn recognised(codes: CodedTensor) -> (CodedTensor, Option<Format>) {
    if codes.format != Format::F32 {
        return (codes, None);
    }
    let words = codes.bytes.as_chunks().0;
    let values = || words.iter().map(|word| f32::from_le_bytes(*word));
    let format = [Format::Bf16, Format::F16].into_iter().find(|format| {
        values().all(|value| format.round(value).to_bits() == value.to_bits() || value.is_nan())
    });
    // Zeros are values of every format.
    let Some(format) = format.filter(|_| values().any(|value| value != 0.0)) else {
        return (codes, None);
    };
    let bytes = values().flat_map(|value| (format.encode(value) as u16).to_le_bytes()).collect();
    (CodedTensor { format, bytes, ..codes }, Some(format))
}

impl Operand {
    /// The operand in words: `x [128, 1024] bf16, one scale per row`.
    pub fn in_words(&self) -> String {
        let scales = self.codes.scales.as_ref();
        let scales = scales
            .map(|scales| format!(", {}", scales.in_words(self.codes.rows, self.codes.width)));
        format!(
            "{} {:?} {}{}",
            self.name,
            self.shape,
            self.codes.format,
            scales.unwrap_or_default()
        )
    }

    /// Gives it scales: a number, or a tensor whose shape says which values share one.
    ///
    /// # Errors
    /// If they fit no blocks of it, or are no positive finite numbers.
    pub fn scale_by(&mut self, text: &str, remarks: &mut Vec<String>) -> Result<(), JudgeError> {
        let (rows, width) = (self.codes.rows, self.codes.width);
        let scales = match text.parse::<f32>() {
            Ok(scale) => BlockScales::one(scale, rows, width),
            Err(_) => {
                let source = Source::parse(text)?;
                let read = match self.blocks {
                    Some(format) => block_scales(self.name, format, &source)?,
                    None => read("scale", &source)?,
                };
                let operand = match self.shape.as_slice() {
                    [.., last] if *last == width => self.shape.clone(),
                    _ => vec![rows, width],
                };
                BlockScales::fit(&read.shape, &operand, read.codes.values().into_data())
                    .map_err(|problem| JudgeError::Usage(format!("{} {problem}", self.name)))?
            }
        };
        if let Some(wrong) = scales.values.iter().find(|scale| {
            // A block of zeros may have the scale zero.
            let zero = self.blocks.is_some() && **scale == 0.0;
            !(scale.is_finite() && (**scale > 0.0 || zero))
        }) {
            return Err(JudgeError::Usage(format!(
                "a scale of {} is {wrong}; a scale is a positive finite number",
                self.name
            )));
        }
        remarks.extend(scales.remark.clone().map(|remark| format!("{}: {remark}", self.name)));
        self.codes.scales = Some(scales);
        Ok(())
    }

    /// Matrices of the last two dimensions: how many, their rows and their width.
    fn matrices(&self) -> (usize, usize, usize) {
        match self.shape.as_slice() {
            [] => (1, 1, 1),
            [width] => (1, 1, *width),
            [outer @ .., rows, width] => (outer.iter().product(), *rows, *width),
        }
    }

    fn matrix(&self, number: usize) -> CodedTensor {
        let (count, rows, _) = self.matrices();
        if count == 1 {
            return self.codes.clone();
        }
        let first = number * rows;
        self.codes.select_rows(&(first..first + rows).collect::<Vec<_>>())
    }
}

/// The operand with rows and columns exchanged.
pub fn transposed(operand: &CodedTensor) -> CodedTensor {
    let (rows, width, size) = (operand.rows, operand.width, operand.format.bytes());
    let mut bytes = vec![0; operand.bytes.len()];
    // In tiles, so that neither side leaves the cache.
    const TILE: usize = 32;
    for first in (0..rows).step_by(TILE) {
        for left in (0..width).step_by(TILE) {
            for row in first..(first + TILE).min(rows) {
                for column in left..(left + TILE).min(width) {
                    let (from, to) = ((row * width + column) * size, (column * rows + row) * size);
                    bytes[to..to + size].copy_from_slice(&operand.bytes[from..from + size]);
                }
            }
        }
    }
    let scales = operand.scales.as_ref().map(|scales| {
        let wide = scales.blocks_per_row;
        let high = scales.values.len() / wide;
        let values = (0..wide).flat_map(|c| (0..high).map(move |r| scales.values[r * wide + c]));
        BlockScales {
            rows_per_block: scales.width_per_block,
            width_per_block: scales.rows_per_block,
            blocks_per_row: high,
            values: values.collect(),
            remark: scales.remark.clone(),
        }
    });
    CodedTensor { rows: width, width: rows, bytes, scales, ..*operand }
}

/// One product of a dump: x `[N, K]`, w `[M, K]`, y `[N, M]`.
pub struct Matrices {
    /// The activation.
    pub x: CodedTensor,
    /// The weight.
    pub w: CodedTensor,
    /// The outputs' values.
    pub y: Tensor,
}

/// Which operands lie transposed in their files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Axes {
    /// x is stored as `[K, N]`.
    pub x: bool,
    /// w is stored as `[K, M]`.
    pub w: bool,
    /// y is stored as `[M, N]`.
    pub y: bool,
}

impl Axes {
    /// Every reading, the plainest first.
    fn all() -> impl Iterator<Item = Axes> {
        [false, true].into_iter().flat_map(|y| {
            [(false, false), (false, true), (true, false), (true, true)]
                .into_iter()
                .map(move |(x, w)| Axes { x, w, y })
        })
    }

    /// What is transposed, in words; empty where nothing is.
    pub fn in_words(self) -> String {
        let said = [(self.x, "x as [K, N]"), (self.w, "w as [K, M]"), (self.y, "y as [M, N]")];
        let said: Vec<&str> =
            said.into_iter().filter(|(is, _)| *is).map(|(_, what)| what).collect();
        said.join(" and ")
    }
}

/// Operands of one or several products, before their axes are settled.
pub struct Layout<'a> {
    /// The activation.
    pub x: &'a Operand,
    /// The weight.
    pub w: &'a Operand,
    /// The outputs.
    pub y: &'a Operand,
    /// What the user says is transposed.
    pub told: Axes,
}

impl Layout<'_> {
    /// Every reading of the axes that fits the shapes, the plainest first. An output is
    /// taken as transposed only where nothing else fits.
    ///
    /// # Errors
    /// If none fits, with both K and what to try.
    pub fn readings(&self) -> Result<Vec<Axes>, JudgeError> {
        let fits = |axes: &Axes| {
            (axes.x || !self.told.x) && (axes.w || !self.told.w) && self.shapes(*axes).is_some()
        };
        let mut fitting: Vec<Axes> = Axes::all().filter(fits).collect();
        if fitting.iter().any(|axes| !axes.y) {
            fitting.retain(|axes| !axes.y);
        }
        if !fitting.is_empty() {
            return Ok(fitting);
        }
        Err(JudgeError::Usage(self.misfit()))
    }

    /// Products, N, K and M under a reading, where it fits.
    fn shapes(&self, axes: Axes) -> Option<(usize, usize, usize, usize)> {
        let turn = |(count, rows, width): (usize, usize, usize), turned: bool| {
            if turned { (count, width, rows) } else { (count, rows, width) }
        };
        let (mut xs, mut n, k) = turn(self.x.matrices(), axes.x);
        let (ws, m, w_k) = turn(self.w.matrices(), axes.w);
        let (mut ys, mut y_n, y_m) = turn(self.y.matrices(), axes.y);
        if ws == 1 && !axes.x && !axes.y {
            // One weight for all: leading dimensions are rows.
            (n, xs, y_n, ys) = (n * xs, 1, y_n * ys, 1);
        }
        let count = xs.max(ws);
        let shared = |many: usize| many == 1 || many == count;
        let fits = k == w_k && n == y_n && m == y_m && ys == count && shared(xs) && shared(ws);
        fits.then_some((count, n, k, m))
    }

    fn misfit(&self) -> String {
        let (_, x_rows, x_width) = self.x.matrices();
        let (_, w_rows, w_width) = self.w.matrices();
        let mut text = format!(
            "{}, {} and {} are no product y [N, M] = x [N, K] w [M, K]^T: K is {x_width} in x \
             ({x_rows} if x is transposed) and {w_width} in w ({w_rows} if w is transposed)",
            self.x.in_words(),
            self.w.in_words(),
            self.y.in_words()
        );
        let remedy = if x_width == w_width || x_width == w_rows || x_rows == w_width {
            "these can meet, but N and M then differ from y's shape: check which tensor is y, or \
             give the files in the order x w y"
        } else {
            "no reading of them agrees: check that x and w belong together, and give the files in \
             the order x w y"
        };
        text += &format!("; {remedy}");
        text
    }

    /// The products under a reading that fits.
    pub fn products(&self, axes: Axes) -> Vec<Matrices> {
        let Some((count, n, _, m)) = self.shapes(axes) else { return Vec::new() };
        let pick = |operand: &Operand, number: usize, turned: bool| {
            let (many, ..) = operand.matrices();
            // One weight for all: x and y are taken whole.
            let whole = count == 1 || many == 1;
            let codes = if whole { operand.codes.clone() } else { operand.matrix(number) };
            if turned { transposed(&codes) } else { codes }
        };
        (0..count)
            .map(|number| {
                let y = pick(self.y, number, axes.y);
                debug_assert_eq!((y.rows, y.width), (n, m));
                Matrices {
                    x: pick(self.x, number, axes.x),
                    w: pick(self.w, number, axes.w),
                    y: y.values(),
                }
            })
            .collect()
    }
}

/// Names under which programs keep an op's tensors, the commonest first.
const NAMES: [(&str, &[&str]); 16] = [
    ("a", &["a", "expected", "reference", "ref", "want"]),
    ("b", &["b", "actual", "observed", "got", "result"]),
    ("x", &["x", "input", "act", "activation", "a", "hidden_states"]),
    ("w", &["w", "weight", "weights", "b"]),
    ("y", &["y", "output", "out", "result", "d", "c"]),
    ("q", &["q", "query"]),
    ("k", &["k", "key"]),
    ("v", &["v", "value"]),
    ("gate", &["gate", "g", "gate_proj"]),
    ("up", &["up", "u", "up_proj"]),
    ("weight", &["weight", "w", "gain", "gamma"]),
    ("bias", &["bias", "b_bias"]),
    (
        "scale_x",
        &[
            "scale_x",
            "x_scale",
            "xs",
            "x_scales",
            "scale_a",
            "input_scale",
            "a_scale",
            "x_scale_inv",
            "input_scale_inv",
        ],
    ),
    (
        "scale_w",
        &["scale_w", "w_scale", "ws", "w_scales", "scale_b", "weight_scale_inv", "w_scale_inv"],
    ),
    ("weight_scale", &["weight_scale", "b_scale"]),
    ("positions", &["positions", "position_ids"]),
];

/// Looks an op's tensor up by name in a file of several: whole names first, then the
/// last part of a name with dots.
pub fn by_name(file: &TensorFile, what: &str) -> Option<String> {
    let aliases = NAMES.iter().find(|(name, _)| *name == what).map_or(&[][..], |(_, names)| names);
    let names: Vec<&str> = file.names().collect();
    let last = |name: &str| name.rsplit(['.', '/']).next().unwrap_or(name).to_lowercase();
    for alias in aliases {
        if let Some(found) = names.iter().find(|name| name.eq_ignore_ascii_case(alias)) {
            return Some((*found).to_owned());
        }
    }
    for alias in aliases {
        let mut with_end = names.iter().filter(|name| last(name) == **alias);
        if let (Some(found), None) = (with_end.next(), with_end.next()) {
            return Some((*found).to_owned());
        }
    }
    None
}
