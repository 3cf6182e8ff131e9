//! Quantised checkpoints of Hugging Face: codes in one tensor, what makes values of them in others.
//!
//! `config` reads `quantization_config`; this module knows which tensors belong to a weight, puts
//! them together, checks their shapes and decodes. The formats: `fp8` of transformers (one scale
//! for a block or a tensor), compressed-tensors (8 bits, packed integers, NVFP4, MXFP4, MXFP8),
//! ModelOpt (FP8, NVFP4), GPTQ, AWQ, bitsandbytes (4 and 8 bits) and gpt-oss's MXFP4. A weight is its
//! code, less the code of zero where there is one, times its scale, rounded to f32 where the product
//! needs it; scales of several parts are rounded as the format's own package does in f32.

mod config;
mod packed;
mod scaled;
mod table;

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::tensor::Dtype;

use super::MappedFile;
use super::error::{FETCH_AGAIN, Fault, shown};
use super::weights::{Steps, WeightType};
use crate::block_format::BlockFormat;
use crate::dtype::Format;
pub(super) use config::{Activations, activations, read, read_sidecar};
use packed::{Order, Packed, Packing};
use scaled::{Scaled, Scales, Whole};
use table::{Blocks, Table};

/// How a checkpoint's weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantised {
    /// Codes of a byte, or of half one, with a scale for each block.
    Scaled {
        codes: WeightType,
        strategy: Strategy,
        /// Which tensors hold them.
        names: Names,
        /// Whether the activations of its products are converted likewise.
        converts: bool,
    },
    /// Integers of few bits in words.
    Packed {
        bits: usize,
        /// Values of a row that share a scale; none is a whole row.
        group: Option<usize>,
        of: PackedBy,
    },
    /// Codes of bitsandbytes' tables.
    Table,
}

impl Quantised {
    /// What the codes are, and which of them share a scale, in words.
    pub fn in_words(&self) -> String {
        match self {
            Quantised::Scaled { codes, strategy, .. } => {
                let of = match strategy {
                    Strategy::Tensor => "each tensor".to_owned(),
                    Strategy::Channel => "each row".to_owned(),
                    Strategy::Group(values) => format!("each {values} values of a row"),
                    Strategy::Block([rows, values]) => format!("each block of {rows} x {values}"),
                };
                format!("{codes} codes with a scale for {of}")
            }
            Quantised::Packed { bits, group: Some(group), .. } => {
                format!("integers of {bits} bits with a scale for each {group} values of a row")
            }
            Quantised::Packed { bits, group: None, .. } => {
                format!("integers of {bits} bits with a scale for each row")
            }
            Quantised::Table => "codes of bitsandbytes' tables".to_owned(),
        }
    }
}

/// What packs integers into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PackedBy {
    CompressedTensors {
        one_scale: bool,
        /// Whether values of a row are of any group.
        ordered: bool,
    },
    /// Zeros are written less this.
    Gptq {
        less: u32,
    },
    Awq,
}

/// How the tensors of codes and scales are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// `weight` and `weight_scale_inv`.
    Inverse,
    /// `weight`, and `weight_scale` or `weight_scale_inv`: a scale alone is that of the whole
    /// weight, whatever the strategy is.
    Either,
    /// `weight` and `weight_scale`, perhaps with `weight_zero_point`.
    Plain,
    /// `weight`, `weight_scale` and `weight_scale_2`, which multiplies it.
    ModelOptNvfp4,
    /// `weight_packed`, `weight_scale` and `weight_global_scale`, which divides it.
    PackedNvfp4,
    /// `weight_packed` and `weight_scale`.
    PackedMxfp4,
    /// `*_blocks` and `*_scales` of all experts.
    Mixture,
    /// `weight` and `SCB`: the largest magnitude of each row.
    BitsAndBytes,
}

/// What of a weight has one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strategy {
    /// All of it.
    Tensor,
    /// A row.
    Channel,
    /// So many values of a row.
    Group(usize),
    /// So many rows of so many values.
    Block([usize; 2]),
}

impl Strategy {
    /// Rows and values of a block.
    fn block(self, rows: usize, width: usize) -> [usize; 2] {
        match self {
            Strategy::Tensor => [rows, width],
            Strategy::Channel => [1, width],
            Strategy::Group(values) => [1, values],
            Strategy::Block(block) => block,
        }
    }
}

/// What a tensor holds of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Codes,
    Scales,
    /// One scale of the whole weight, beside those of its blocks.
    WholeScale,
    Zeros,
    /// The group of each value of a row.
    Groups,
    /// Rows and width, as numbers.
    Shape,
    /// The values of codes.
    Values,
    /// The values of scales that are codes themselves.
    ScaleValues,
    /// The scales of scales.
    ScaleScales,
    /// What else belongs to it, as JSON.
    State,
    /// In which order the codes stand.
    Format,
    /// The scale of a product's activations.
    InputScale,
}

impl Part {
    fn words(self) -> &'static str {
        match self {
            Part::Codes => "codes",
            Part::Scales => "scales",
            Part::WholeScale => "scale of the whole weight",
            Part::Zeros => "zero points",
            Part::Groups => "groups",
            Part::Shape => "shape",
            Part::Values => "values of codes",
            Part::ScaleValues => "values of scales",
            Part::ScaleScales => "scales of scales",
            Part::State => "state",
            Part::Format => "order of codes",
            Part::InputScale => "scale of activations",
        }
    }
}

/// A tensor of those that make a weight, and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub file: usize,
    pub bytes: Range<usize>,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// How rows lie, where they do not follow one another.
    pub steps: Option<Steps>,
}

/// The tensors of one weight.
pub(super) type Pieces = BTreeMap<Part, Piece>;

/// A weight of codes: what makes its values, and where that stands.
#[derive(Clone, Debug)]
pub(super) struct Coded {
    layout: Layout,
    pieces: Pieces,
    /// Rows of the tensors that stand before its own, where several weights share them.
    first: usize,
    /// Whether the activations of its products are converted likewise.
    converts: bool,
}

impl Coded {
    /// The same tensors, whose rows begin there.
    pub fn from(&self, first: usize) -> Coded {
        Coded { first, ..self.clone() }
    }

    /// The file of the codes, and where they stand in it.
    pub fn place(&self) -> (usize, Range<usize>) {
        let codes = self.pieces.get(&Part::Codes);
        codes.map_or((0, 0..0), |codes| (codes.file, codes.bytes.clone()))
    }

    /// Whether another weight has the same codes, scales and all else.
    pub fn is_same(&self, other: &Coded, files: &[MappedFile]) -> bool {
        let bytes = |piece: &Piece| &files[piece.file].map[piece.bytes.clone()];
        let pairs = self.pieces.iter().zip(&other.pieces);
        let is_same = |((part, one), (of, other)): ((&Part, &Piece), (&Part, &Piece))| {
            part == of && one.dtype == other.dtype && bytes(one) == bytes(other)
        };
        self.pieces.len() == other.pieces.len() && { pairs }.all(is_same)
    }
}

/// How the tensors of a weight are decoded; their shapes were checked.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Scaled { codes: WeightType, scales: WeightType, block: [usize; 2], width: usize, whole: Whole },
    Packed(Packing),
    Table(Blocks),
}

/// A weight of codes in its files.
#[derive(Clone, Copy)]
pub(super) struct Coding<'a> {
    coded: &'a Coded,
    files: &'a [MappedFile],
}

/// What became of a weight's tensors: its rows, its width, how its values are stored.
pub(super) struct Assembled {
    pub kind: WeightType,
    pub rows: usize,
    pub width: usize,
    pub coded: Coded,
}

fn broken(problem: impl Into<String>) -> Fault {
    Fault::malformed(problem, FETCH_AGAIN)
}

/// The tensors of one weight while they are put together.
struct Found<'a> {
    pieces: &'a Pieces,
    files: &'a [MappedFile],
}

impl<'a> Found<'a> {
    fn piece(&self, part: Part) -> Result<&'a Piece, Fault> {
        self.pieces.get(&part).ok_or_else(|| {
            let has: Vec<&str> = self.pieces.keys().map(|part| part.words()).collect();
            broken(format!("there are {} of it, and no {}", has.join(", "), part.words()))
        })
    }

    fn bytes(&self, part: Part) -> Option<&'a [u8]> {
        let piece = self.pieces.get(&part)?;
        Some(&self.files[piece.file].map[piece.bytes.clone()])
    }

    /// A piece whose type and shape must be these.
    fn expect(&self, part: Part, types: &[Dtype], shape: &[usize]) -> Result<&'a Piece, Fault> {
        let piece = self.typed(part, types)?;
        if piece.shape != shape {
            return Err(broken(format!(
                "its {} are {:?}, and `quantization_config` asks for {shape:?}",
                part.words(),
                piece.shape
            )));
        }
        Ok(piece)
    }

    fn typed(&self, part: Part, types: &[Dtype]) -> Result<&'a Piece, Fault> {
        let piece = self.piece(part)?;
        if !types.contains(&piece.dtype) {
            return Err(broken(format!(
                "its {} are of type {:?}, not {}",
                part.words(),
                piece.dtype,
                types.iter().map(|kind| format!("{kind:?}")).collect::<Vec<_>>().join(" or ")
            )));
        }
        Ok(piece)
    }

    /// A matrix's sides.
    fn sides(&self, part: Part) -> Result<[usize; 2], Fault> {
        let piece = self.piece(part)?;
        match *piece.shape {
            [rows, width] if rows > 0 && width > 0 => Ok([rows, width]),
            ref shape => Err(broken(format!(
                "its {} are {shape:?}; matrices alone are codes, without a zero side",
                part.words()
            ))),
        }
    }

    /// A positive number.
    fn number(&self, part: Part) -> Result<f32, Fault> {
        let piece = self.typed(part, &SCALE_TYPES)?;
        if piece.shape.iter().product::<usize>() != 1 {
            return Err(broken(format!("its {} is {:?}, not one", part.words(), piece.shape)));
        }
        let bytes = self.bytes(part).unwrap_or_default();
        let number = scaled::scale(scale_type(piece.dtype), bytes);
        match number.is_finite() && number > 0.0 {
            true => Ok(number),
            false => Err(broken(format!("its {} is {number}, no positive number", part.words()))),
        }
    }
}

const SCALE_TYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

fn scale_type(dtype: Dtype) -> WeightType {
    match dtype {
        Dtype::F16 => WeightType::F16,
        Dtype::BF16 => WeightType::BF16,
        Dtype::F8_E4M3 => WeightType::E4m3,
        // compressed-tensors keeps powers of two as bytes.
        Dtype::F8_E8M0 | Dtype::U8 => WeightType::E8m0,
        _ => WeightType::F32,
    }
}

impl Quantised {
    /// What a tensor is called after the name of its layer, and what it holds; codes that are
    /// called `weight` are told by their type.
    fn endings(&self) -> &'static [(&'static str, Part)] {
        match self {
            Quantised::Scaled { names, .. } => match names {
                Names::Inverse => {
                    &[(".weight_scale_inv", Part::Scales), (".input_scale", Part::InputScale)]
                }
                Names::Either => &[
                    (".weight_scale", Part::Scales),
                    (".weight_scale_inv", Part::Scales),
                    (".input_scale", Part::InputScale),
                ],
                Names::Plain => &[
                    (".weight_scale", Part::Scales),
                    (".weight_zero_point", Part::Zeros),
                    (".input_scale", Part::InputScale),
                ],
                Names::ModelOptNvfp4 => &[
                    (".weight_scale", Part::Scales),
                    (".weight_scale_2", Part::WholeScale),
                    (".input_scale", Part::InputScale),
                ],
                Names::PackedNvfp4 => &[
                    (".weight_packed", Part::Codes),
                    (".weight_scale", Part::Scales),
                    (".weight_global_scale", Part::WholeScale),
                    (".input_global_scale", Part::InputScale),
                ],
                Names::PackedMxfp4 => {
                    &[(".weight_packed", Part::Codes), (".weight_scale", Part::Scales)]
                }
                Names::Mixture => &[],
                Names::BitsAndBytes => &[(".SCB", Part::Scales), (".weight_format", Part::Format)],
            },
            Quantised::Packed { of: PackedBy::CompressedTensors { .. }, .. } => &[
                (".weight_packed", Part::Codes),
                (".weight_scale", Part::Scales),
                (".weight_zero_point", Part::Zeros),
                (".weight_g_idx", Part::Groups),
                (".weight_shape", Part::Shape),
            ],
            Quantised::Packed { of: PackedBy::Gptq { .. } | PackedBy::Awq, .. } => &[
                (".qweight", Part::Codes),
                (".scales", Part::Scales),
                (".qzeros", Part::Zeros),
                (".g_idx", Part::Groups),
            ],
            Quantised::Table => &[
                (".weight.absmax", Part::Scales),
                (".weight.quant_map", Part::Values),
                (".weight.nested_absmax", Part::ScaleScales),
                (".weight.nested_quant_map", Part::ScaleValues),
                (".weight.quant_state.bitsandbytes__nf4", Part::State),
                (".weight.quant_state.bitsandbytes__fp4", Part::State),
            ],
        }
    }

    /// The layer whose weight a tensor belongs to, and what it holds of it.
    pub fn part<'n>(&self, name: &'n str) -> Option<(&'n str, Part)> {
        self.endings().iter().find_map(|(ending, part)| Some((name.strip_suffix(ending)?, *part)))
    }

    /// Whether a file of this form may hold a scale of a product's activations that is read.
    pub fn reads_input_scales(&self) -> bool {
        self.endings().iter().any(|(_, part)| *part == Part::InputScale)
    }

    /// How tensors of scales are called.
    pub fn scale_name(&self) -> &'static str {
        let ending = self.endings().iter().find(|(_, part)| *part == Part::Scales);
        ending.map_or("", |(ending, _)| ending.trim_start_matches('.'))
    }

    /// Whether a tensor called `weight` of this type holds codes.
    pub fn are_codes(&self, dtype: Dtype) -> bool {
        match self {
            Quantised::Scaled { names: Names::PackedMxfp4 | Names::PackedNvfp4, .. } => false,
            Quantised::Scaled { codes, .. } => matches!(
                (codes, dtype),
                (WeightType::E4m3, Dtype::F8_E4M3)
                    | (WeightType::E5m2, Dtype::F8_E5M2)
                    | (WeightType::I8, Dtype::I8)
                    | (WeightType::E2m1, Dtype::U8)
            ),
            Quantised::Packed { .. } => false,
            Quantised::Table => dtype == Dtype::U8,
        }
    }

    /// Whether files have biases of zeros for layers that have none: early ones of GPTQ.
    pub fn has_idle_biases(&self) -> bool {
        matches!(self, Quantised::Packed { of: PackedBy::Gptq { .. }, .. })
    }

    /// Whether experts' codes of MXFP4 stand in one tensor.
    pub fn is_mixture(&self) -> bool {
        matches!(self, Quantised::Scaled { names: Names::Mixture, .. })
    }

    /// Puts the tensors of a weight together.
    ///
    /// # Errors
    /// If one is missing or there is one too many, if types or shapes do not fit, or if a scale is
    /// no positive number.
    pub fn assemble(&self, pieces: Pieces, files: &[MappedFile]) -> Result<Assembled, Fault> {
        let found = Found { pieces: &pieces, files };
        let (kind, [rows, width], layout) = match *self {
            Quantised::Scaled { codes, strategy, names, .. } => {
                assemble_scaled(&found, codes, strategy, names)?
            }
            Quantised::Packed { bits, group, of } => assemble_packed(&found, bits, group, of)?,
            Quantised::Table => assemble_table(&found)?,
        };
        let converts = matches!(*self, Quantised::Scaled { converts: true, .. });
        let coded = Coded { layout, pieces, first: 0, converts };
        Coding { coded: &coded, files }.check(rows)?;
        Ok(Assembled { kind, rows, width, coded })
    }
}

type Layed = (WeightType, [usize; 2], Layout);

fn assemble_scaled(
    found: &Found<'_>,
    codes: WeightType,
    strategy: Strategy,
    names: Names,
) -> Result<Layed, Fault> {
    let code_types = match codes {
        WeightType::E5m2 => [Dtype::F8_E5M2],
        WeightType::I8 => [Dtype::I8],
        WeightType::E2m1 => [Dtype::U8],
        _ => [Dtype::F8_E4M3],
    };
    found.typed(Part::Codes, &code_types)?;
    let alone = found.piece(Part::Scales)?.shape.iter().product::<usize>() == 1;
    let strategy = if names == Names::Either && alone { Strategy::Tensor } else { strategy };
    let [rows, stored] = found.sides(Part::Codes)?;
    let width = if codes == WeightType::E2m1 { 2 * stored } else { stored };
    let block = strategy.block(rows, width);
    let [tall, wide] = block;
    let wanted = [rows.div_ceil(tall), width.div_ceil(wide)];
    let scales = found.piece(Part::Scales)?;
    let scale_types: &[Dtype] = match names {
        Names::ModelOptNvfp4 | Names::PackedNvfp4 => &[Dtype::F8_E4M3],
        Names::PackedMxfp4 | Names::Mixture => &[Dtype::U8, Dtype::F8_E8M0],
        Names::BitsAndBytes => &[Dtype::F32],
        Names::Plain => &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E8M0, Dtype::U8],
        Names::Inverse | Names::Either => &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E8M0],
    };
    found.typed(Part::Scales, scale_types)?;
    let shape = match *scales.shape {
        [] => vec![1, 1],
        // A column: one for each row of codes.
        [rows] => vec![rows, 1],
        ref shape => shape.to_owned(),
    };
    if shape != wanted {
        return Err(broken(format!(
            "its scales are {shape:?}, and `quantization_config` asks for {wanted:?}: one for \
             each {tall} rows of {wide} values"
        )));
    }
    if let Strategy::Group(values) = strategy
        && !width.is_multiple_of(values)
    {
        return Err(broken(format!("its rows of {width} values are no whole groups of {values}")));
    }
    if found.pieces.contains_key(&Part::Zeros) {
        let of = if codes == WeightType::I8 { Dtype::I8 } else { Dtype::F8_E4M3 };
        let zeros = found.typed(Part::Zeros, &[of])?;
        if zeros.shape != scales.shape {
            return Err(broken(format!(
                "its zero points are {:?} and its scales {:?}",
                zeros.shape, scales.shape
            )));
        }
        let set = found.bytes(Part::Zeros).unwrap_or_default().iter().any(|&zero| zero != 0);
        if codes != WeightType::I8 && set {
            return Err(broken("its codes are floats, and its zero points are not 0"));
        }
    }
    if found.pieces.contains_key(&Part::InputScale) {
        found.number(Part::InputScale)?;
    }
    if let Some(format) = found.bytes(Part::Format) {
        // `row` is the only one that bitsandbytes still reads.
        if format != [0] {
            return Err(Fault::unsupported(
                format!("its `weight_format` is {format:?}, not 0, rows"),
                "save it with a newer bitsandbytes",
            ));
        }
    }
    let whole = match names {
        Names::ModelOptNvfp4 => Whole::Multiplies(found.number(Part::WholeScale)?),
        Names::PackedNvfp4 => Whole::Divides(found.number(Part::WholeScale)?),
        // As bitsandbytes' `int8_vectorwise_dequant`.
        Names::BitsAndBytes => Whole::Follows(1.0 / 127.0),
        _ => Whole::None,
    };
    let scales = scale_type(scales.dtype);
    Ok((codes, [rows, width], Layout::Scaled { codes, scales, block, width, whole }))
}

fn assemble_packed(
    found: &Found<'_>,
    bits: usize,
    group: Option<usize>,
    of: PackedBy,
) -> Result<Layed, Fault> {
    found.typed(Part::Codes, &[Dtype::I32])?;
    let [tall, wide] = found.sides(Part::Codes)?;
    let (order, shape, one_scale) = match of {
        PackedBy::CompressedTensors { one_scale, ordered } => {
            if ordered {
                found.piece(Part::Groups)?;
            }
            found.expect(Part::Shape, &[Dtype::I64], &[2])?;
            let bytes = found.bytes(Part::Shape).unwrap_or_default();
            let sides = bytes.as_chunks::<8>().0.iter().map(|side| i64::from_le_bytes(*side));
            let sides: Vec<usize> = sides.filter_map(|side| usize::try_from(side).ok()).collect();
            match *sides {
                [rows, width] if rows == tall && (1..=1 << 32).contains(&width) => {
                    (Order::Rows, [rows, width], one_scale)
                }
                _ => {
                    return Err(broken(format!(
                        "its `weight_shape` is {sides:?}, and its codes have {tall} rows"
                    )));
                }
            }
        }
        PackedBy::Gptq { less } => {
            let width = 32 * tall / bits;
            (Order::Columns { less }, [wide, width], false)
        }
        PackedBy::Awq => (Order::Interleaved, [8 * wide, tall], false),
    };
    let [rows, width] = shape;
    let group = group.unwrap_or(width);
    let scales = found.typed(Part::Scales, &SCALE_TYPES)?.dtype;
    let packing = Packing { bits, order, shape, group, scales: scale_type(scales), one_scale };
    let (groups, words) = (packing.groups(), packing.words(width));
    let whole = |sides: usize| (sides * bits).is_multiple_of(32);
    match order {
        Order::Rows => {
            if wide != words || !(32usize.is_multiple_of(bits) || whole(width)) {
                return Err(broken(format!(
                    "its codes are {wide} words wide, and {width} codes of {bits} bits, one after \
                     the other, are {words} whole ones"
                )));
            }
            if one_scale {
                let count = found.piece(Part::Scales)?.shape.iter().product::<usize>();
                if count != 1 {
                    return Err(broken(format!(
                        "it has {count} scales, and `strategy` is `tensor`"
                    )));
                }
            } else {
                found.expect(Part::Scales, &SCALE_TYPES, &[rows, groups])?;
            }
            if found.pieces.contains_key(&Part::Zeros) {
                found.expect(Part::Zeros, &[Dtype::I32], &[packing.words(rows), groups])?;
            }
        }
        Order::Columns { .. } => {
            if !whole(width) || !whole(rows) {
                return Err(broken(format!(
                    "its {tall} rows of {wide} words are no whole number of codes of {bits} bits"
                )));
            }
            found.expect(Part::Scales, &SCALE_TYPES, &[groups, rows])?;
            found.expect(Part::Zeros, &[Dtype::I32], &[groups, packing.words(rows)])?;
        }
        Order::Interleaved => {
            found.expect(Part::Scales, &SCALE_TYPES, &[groups, rows])?;
            found.expect(Part::Zeros, &[Dtype::I32], &[groups, rows / 8])?;
        }
    }
    if !width.is_multiple_of(group) {
        return Err(broken(format!("its rows of {width} values are no whole groups of {group}")));
    }
    if found.pieces.contains_key(&Part::Groups) {
        found.expect(Part::Groups, &[Dtype::I32], &[width])?;
    }
    Ok((WeightType::Packed(bits as u8), shape, Layout::Packed(packing)))
}

/// What bitsandbytes keeps beside codes of 4 bits.
#[derive(serde::Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: [usize; 2],
    #[serde(default)]
    nested_blocksize: Option<usize>,
    #[serde(default)]
    nested_offset: Option<f64>,
    #[serde(default)]
    nested_dtype: Option<String>,
}

fn assemble_table(found: &Found<'_>) -> Result<Layed, Fault> {
    found.typed(Part::State, &[Dtype::U8])?;
    let state = found.bytes(Part::State).unwrap_or_default();
    let state: State = serde_json::from_slice(state)
        .map_err(|error| broken(format!("its state is not what bitsandbytes writes: {error}")))?;
    let (kind, table) = match state.quant_type.as_str() {
        "nf4" => (WeightType::Nf4, &table::NF4),
        "fp4" => (WeightType::Fp4, &table::FP4),
        other => {
            return Err(Fault::unsupported(
                format!("its `quant_type` is `{}`; `nf4` and `fp4` are read", shown(other)),
                "choose another model",
            ));
        }
    };
    let [rows, width] = state.shape;
    let count = rows.checked_mul(width).filter(|&count| count > 0);
    let Some(count) = count.filter(|_| state.blocksize > 0) else {
        return Err(broken(format!(
            "its state says blocks of {} in a weight of {:?}",
            state.blocksize, state.shape
        )));
    };
    let codes = found.typed(Part::Codes, &[Dtype::U8])?;
    if codes.shape.iter().product::<usize>() != count.div_ceil(2) {
        return Err(broken(format!(
            "its codes are {:?} bytes, and its state says {:?} codes of 4 bits",
            codes.shape, state.shape
        )));
    }
    if let Some(values) = found.bytes(Part::Values) {
        let same = table.iter().flat_map(|value| value.to_le_bytes());
        if !values.iter().copied().eq(same) {
            return Err(broken(format!(
                "its `quant_map` is not the table of {}, which kernels take",
                state.quant_type
            )));
        }
    }
    let blocks = count.div_ceil(state.blocksize);
    let nested = match (state.nested_blocksize, state.nested_offset) {
        (None, None) => {
            found.expect(Part::Scales, &[Dtype::F32], &[blocks])?;
            None
        }
        (Some(together), Some(offset)) if together > 0 => {
            if state.nested_dtype.as_deref().is_some_and(|kind| kind != "float32") {
                return Err(broken("its `nested_dtype` is not float32"));
            }
            found.expect(Part::Scales, &[Dtype::U8], &[blocks])?;
            found.expect(Part::ScaleValues, &[Dtype::F32], &[256])?;
            found.expect(Part::ScaleScales, &[Dtype::F32], &[blocks.div_ceil(together)])?;
            Some((together, offset as f32))
        }
        _ => return Err(broken("its state has a part of what scales of scales need")),
    };
    let layout = Blocks { table, width, block: state.blocksize, nested };
    Ok((kind, state.shape, Layout::Table(layout)))
}

/// The codes of a weight, a byte each, as its file holds them.
#[derive(Clone, Copy)]
pub(crate) struct HeldCodes<'a> {
    scaled: Scaled<'a>,
    /// Rows of the tensor before its own.
    first: usize,
    /// The scale of the activations that it is multiplied with, where the file has one.
    pub input_scale: Option<f32>,
}

impl<'a> HeldCodes<'a> {
    /// Rows and values of a block that has one scale.
    pub fn block(&self) -> [usize; 2] {
        self.scaled.scales.block
    }

    /// Rows of the tensor that stand before the weight's own.
    pub fn first(&self) -> usize {
        self.first
    }

    /// The codes of rows.
    pub fn codes(&self, rows: Range<usize>) -> &'a [u8] {
        let width = self.scaled.width;
        &self.scaled.bytes[(self.first + rows.start) * width..(self.first + rows.end) * width]
    }

    /// The scale of a row's value.
    pub fn scale(&self, row: usize, value: usize) -> f32 {
        let [tall, wide] = self.block();
        let columns = self.scaled.width.div_ceil(wide);
        self.scaled.scales.at((self.first + row) / tall, value / wide, columns)
    }
}

/// The elements and scales of a block-scaled weight, as its file holds them.
#[derive(Clone, Copy)]
pub(crate) struct HeldBlocks<'a> {
    scaled: Scaled<'a>,
    /// Rows of the tensor before its own.
    first: usize,
    /// What they are.
    pub format: BlockFormat,
    /// The scale of the whole weight; 1 where there is none.
    pub whole: f32,
    /// The scale of all activations that it is multiplied with, where the file has one.
    pub input_scale: Option<f32>,
}

impl HeldBlocks<'_> {
    /// The elements' codes of rows, a byte each, and the codes of their scales.
    pub fn rows(&self, rows: Range<usize>) -> (Vec<u8>, Vec<u8>) {
        let rows = self.first + rows.start..self.first + rows.end;
        let (width, block) = (self.scaled.width, self.format.block());
        let halves = self.format.element() == Format::E2m1;
        let length = if halves { width / 2 } else { width };
        let bytes = &self.scaled.bytes[rows.start * length..rows.end * length];
        let codes = match halves {
            true => bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect(),
            false => bytes.to_vec(),
        };
        let blocks = width / block;
        (codes, self.scaled.scales.bytes[rows.start * blocks..rows.end * blocks].to_vec())
    }
}

/// A weight of codes, by how it is decoded.
enum Decoder<'a> {
    Scaled(Scaled<'a>),
    Packed(Packed<'a>),
    Table(Table<'a>),
}

impl<'a> Coding<'a> {
    pub fn new(coded: &'a Coded, files: &'a [MappedFile]) -> Coding<'a> {
        Coding { coded, files }
    }

    /// The bytes of a part, empty where there is none.
    fn bytes(&self, part: Part) -> &'a [u8] {
        let found = Found { pieces: &self.coded.pieces, files: self.files };
        found.bytes(part).unwrap_or_default()
    }

    fn has(&self, part: Part) -> bool {
        self.coded.pieces.contains_key(&part)
    }

    /// The codes as they stand in the file.
    pub fn codes(&self) -> &'a [u8] {
        self.bytes(Part::Codes)
    }

    /// The codes and scales as they are, where they are codes of a byte of this type, each with no
    /// more than a scale.
    pub fn held_codes(&self, codes: WeightType) -> Option<HeldCodes<'a>> {
        let Decoder::Scaled(scaled) = self.decoder() else { return None };
        let plain =
            scaled.step.is_none() && scaled.zeros.is_none() && scaled.scales.whole == Whole::None;
        let input_scale = self.input_scale();
        (plain && scaled.codes == codes && codes != WeightType::E2m1).then_some(HeldCodes {
            scaled,
            first: self.coded.first,
            input_scale,
        })
    }

    /// The elements and scales as they are, where they make a block-scaled format that tensor cores
    /// multiply, and activations are converted to it too: elsewhere engines multiply by its values.
    pub fn held_blocks(&self) -> Option<HeldBlocks<'a>> {
        if !self.coded.converts {
            return None;
        }
        let Decoder::Scaled(scaled) = self.decoder() else { return None };
        let Scales { kind, block, step, whole, .. } = scaled.scales;
        if scaled.step.is_some() || step.is_some() || scaled.zeros.is_some() {
            return None;
        }
        let format = match (scaled.codes, kind, block) {
            (WeightType::E4m3, WeightType::E8m0, [1, 32]) => BlockFormat::Mxfp8,
            (WeightType::E5m2, WeightType::E8m0, [1, 32]) => BlockFormat::Mxfp8E5m2,
            (WeightType::E2m1, WeightType::E8m0, [1, 32]) => BlockFormat::Mxfp4,
            (WeightType::E2m1, WeightType::E4m3, [1, 16]) => BlockFormat::Nvfp4,
            _ => return None,
        };
        // A scale that divides that of the weight divides that of the activations too.
        let (whole, inverse) = match whole {
            Whole::None => (1.0, false),
            Whole::Multiplies(whole) => (whole, false),
            Whole::Divides(whole) => (1.0 / whole, true),
            Whole::Follows(_) => return None,
        };
        let whole_blocks = scaled.width.is_multiple_of(format.block());
        let input_scale = self.input_scale().map(|scale| if inverse { 1.0 / scale } else { scale });
        let first = self.coded.first;
        whole_blocks.then_some(HeldBlocks { scaled, first, format, whole, input_scale })
    }

    /// The scale of the activations that it is multiplied with, where the file has one.
    pub fn input_scale(&self) -> Option<f32> {
        let input = self.coded.pieces.get(&Part::InputScale)?;
        Some(scaled::scale(scale_type(input.dtype), self.bytes(Part::InputScale)))
    }

    /// Whether its rows are not all of the tensor's.
    pub fn is_fused(&self, rows: usize) -> bool {
        self.coded.first > 0
            || self.coded.pieces.get(&Part::Codes).is_some_and(|codes| codes.shape[0] != rows)
    }

    fn decoder(&self) -> Decoder<'a> {
        let step = |part| self.coded.pieces.get(&part)?.steps.map(|steps: Steps| steps.row);
        let when = |part| self.has(part).then(|| self.bytes(part));
        match &self.coded.layout {
            &Layout::Scaled { codes, scales, block, width, whole } => {
                let scales = Scales {
                    kind: scales,
                    bytes: self.bytes(Part::Scales),
                    block,
                    step: step(Part::Scales),
                    whole,
                };
                // Of floats they are zero.
                let zeros = when(Part::Zeros).filter(|_| codes == WeightType::I8);
                let (bytes, step) = (self.codes(), step(Part::Codes));
                Decoder::Scaled(Scaled { codes, bytes, step, scales, zeros, width })
            }
            Layout::Packed(packing) => {
                // compressed-tensors writes -1 everywhere where groups follow one another.
                let follow = |groups: &&[u8]| groups.iter().all(|&byte| byte == 255);
                Decoder::Packed(Packed {
                    packing,
                    codes: self.codes(),
                    scales: self.bytes(Part::Scales),
                    zeros: when(Part::Zeros),
                    groups: when(Part::Groups).filter(|groups| !follow(groups)),
                })
            }
            Layout::Table(blocks) => Decoder::Table(Table {
                blocks,
                codes: self.codes(),
                magnitudes: self.bytes(Part::Scales),
                nested: [self.bytes(Part::ScaleValues), self.bytes(Part::ScaleScales)],
            }),
        }
    }

    /// Decodes rows of the weight.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let rows = rows.start + self.coded.first..rows.end + self.coded.first;
        match self.decoder() {
            Decoder::Scaled(scaled) => scaled.decode(rows, out),
            Decoder::Packed(packed) => packed.decode(rows, out),
            Decoder::Table(table) => table.decode(rows, out),
        }
    }

    /// Adds what makes the values of the weight to a digest.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        let Coded { layout, first, pieces, converts } = self.coded;
        hasher.update(format!("{layout:?} from row {first}").as_bytes());
        if !converts {
            hasher.update(b" beside plain activations");
        }
        for (part, piece) in pieces {
            hasher.update(format!("{part:?} {:?} {:?}", piece.shape, piece.steps).as_bytes());
            hasher.update_rayon(self.bytes(*part));
        }
    }

    /// Whether all that it reads stands in one file.
    pub fn is_in_one_file(&self) -> bool {
        let mut files = self.coded.pieces.values().map(|piece| piece.file);
        let first = files.next();
        files.all(|file| Some(file) == first)
    }

    /// Where the parts stand and how they are decoded, as a line for a key.
    pub fn layout(&self) -> String {
        let Coded { layout, first, pieces, converts } = self.coded;
        let places = pieces.iter().map(|(part, piece)| format!("{part:?}@{:?}", piece.bytes));
        format!(" {layout:?} {first} {converts} {}", places.collect::<Vec<_>>().join(" "))
    }

    /// Refuses scales that are no positive numbers, and groups and zeros that are none.
    fn check(&self, rows: usize) -> Result<(), Fault> {
        match self.decoder() {
            Decoder::Scaled(scaled) => match scaled.first_bad(rows) {
                None => Ok(()),
                Some((row, column, scale)) => Err(broken(format!(
                    "the scale of its block at row {row}, value {column} is {scale}, no positive \
                     number"
                ))),
            },
            Decoder::Packed(packed) => {
                if let Some((place, group)) = packed.first_bad_group() {
                    return Err(broken(format!(
                        "value {place} of its rows is said to be of group {group}, and there are \
                         {}",
                        packed.packing.groups()
                    )));
                }
                if let Some((row, group, scale)) = packed.first_bad_scale() {
                    return Err(broken(format!(
                        "the scale of its block at row {row}, value {} is {scale}, no positive \
                         number",
                        group * packed.packing.group
                    )));
                }
                match packed.first_bad_zero() {
                    None => Ok(()),
                    Some((row, group)) => {
                        let most = (1 << packed.packing.bits) - 1;
                        Err(Fault::unsupported(
                            format!(
                                "the zero point of row {row}, group {group} is written as {most}: \
                                 zero points of `checkpoint_format` `gptq` are one more, and some \
                                 kernels take {}, others 0",
                                most + 1
                            ),
                            "save the model as `gptq_v2`, which says which is meant",
                        ))
                    }
                }
            }
            Decoder::Table(table) => {
                let Blocks { block, width, .. } = *table.blocks;
                // A block of zeros has the magnitude 0.
                let bad = |number: &usize| !table.magnitude(*number).is_finite();
                match (0..(rows * width).div_ceil(block)).find(bad) {
                    None => Ok(()),
                    Some(number) => Err(broken(format!(
                        "the scale of its block at row {}, value {} is {}",
                        number * block / width,
                        number * block % width,
                        table.magnitude(number)
                    ))),
                }
            }
        }
    }
}
