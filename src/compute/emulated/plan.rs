//! In which order an algorithm of cuBLASLt adds, from the record that the library gives of it.
//!
//! It knows records and orders; who asks the library is `compute/cuda`. Nothing is fitted to
//! outputs: a record of which no rule is known has no plan, and says so. The rules were read off
//! tables of orders (`runner chip sweep --orders`) of an H200 with cuBLASLt 13.1.0, and a sweep
//! holds them to products that nobody had looked at (`runs/receipts/sweeps/h200.json`). That
//! records tell the order was known before: facebookexperimental/triton, bitequiv.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::chip::Unit;
use super::gemm::{GemmError, Operand, Scales, gemm};
use super::quantize::{Codes, quantize_row};
use super::schedule::Schedule;
use crate::compute::engine_kernels::linear::{by_lanes_in_turns, residue_first};
use crate::dtype::Format;
use crate::op::Accumulate;
use crate::tensor::Tensor;

/// What cuBLASLt reports as split-K where it deals tiles of K out in stream-K fashion.
pub const STREAM_K: u32 = u32::MAX;

/// An algorithm's record: the numbers by which cuBLASLt tells its algorithms apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Record {
    /// `CUBLASLT_ALGO_CONFIG_ID`.
    pub id: u32,
    /// `CUBLASLT_ALGO_CONFIG_TILE_ID`.
    pub tile: u32,
    /// `CUBLASLT_ALGO_CONFIG_STAGES_ID`.
    pub stages: u32,
    /// Parts that K is cut into; [`STREAM_K`] where work is dealt out otherwise.
    pub split_k: u32,
    /// `CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME`: how the parts are added.
    pub reduction: u32,
    /// `CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION`.
    pub custom: u32,
    /// `CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID`.
    pub inner_shape: u16,
    /// `CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID`.
    pub cluster_shape: u16,
    /// Bytes of workspace that it uses.
    pub workspace: usize,
}

impl std::fmt::Display for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = match self.split_k {
            STREAM_K => "stream-K".to_owned(),
            parts => format!("split-K {parts}"),
        };
        write!(
            f,
            "algorithm {} tile {} stages {} {parts} reduction {} custom {} inner {} cluster {} \
             workspace {}",
            self.id,
            self.tile,
            self.stages,
            self.reduction,
            self.custom,
            self.inner_shape,
            self.cluster_shape,
            self.workspace
        )
    }
}

/// The order of additions that a record stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plan {
    /// The tensor core's chains as `schedule.rs` has them.
    Schedule(Schedule),
    /// K in parts of so many elements, added in order; in each the rest of whole tiles comes first.
    Parts {
        /// Elements of a part.
        part: usize,
        /// Elements of K of a tile.
        tile: usize,
    },
    /// Tiles of K dealt to the parts in turn.
    Dealt {
        /// Elements of K of a tile.
        tile: usize,
        /// Parts.
        parts: usize,
        /// How the parts are added.
        gathered: Gathered,
    },
    /// K in stretches of whole tiles of nearly one length, the last ones the longer; from the last one
    /// on neighbours are added in pairs, then those sums, and so on.
    Pairs {
        /// Elements of K of a tile.
        tile: usize,
        /// Parts.
        parts: usize,
    },
    /// 16 lanes of f32, see [`by_lanes_in_turns`].
    Lanes {
        /// Elements of K of a turn.
        turn: usize,
        /// Parts of K, each a stretch; they are added in order.
        parts: usize,
    },
    /// The lanes of a warp, each a sum of its own; then those half of all lanes apart are added, and
    /// so on down to neighbours.
    Warp {
        /// Lanes.
        lanes: usize,
        /// Whether a lane's elements of K are neighbours; else they are `lanes` apart.
        neighbours: bool,
        /// Parts of K, each a stretch; they are added in order.
        parts: usize,
    },
    /// Blocks of 256 elements of K dealt to the parts in turn, see `by_dot`.
    Dot {
        /// Parts.
        parts: usize,
    },
}

/// How parts are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gathered {
    /// In order.
    InOrder,
    /// Each of the first half with its partner of the second half, and those sums in order to the
    /// last part.
    InPairs,
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Plan::Schedule(schedule) => write!(f, "{schedule}"),
            Plan::Parts { part, tile } => {
                write!(f, "parts of {part} elements of K, the rest of tiles of {tile} first")
            }
            Plan::Dealt { tile, parts, gathered } => {
                write!(f, "tiles of {tile} elements of K dealt to {parts} parts in turn")?;
                match gathered {
                    Gathered::InOrder => Ok(()),
                    Gathered::InPairs => f.write_str(", added in pairs"),
                }
            }
            Plan::Pairs { tile, parts } => {
                write!(f, "{parts} parts of whole tiles of {tile} elements of K, added in pairs")
            }
            Plan::Lanes { turn, parts } => {
                write!(f, "16 lanes of f32 in turns of {turn} elements of K{}", in_parts(parts))
            }
            Plan::Warp { lanes, neighbours, parts } => {
                let whose = if neighbours { ", each of neighbours" } else { "" };
                write!(f, "a warp's {lanes} lanes{whose}{}", in_parts(parts))
            }
            Plan::Dot { parts } => write!(f, "dot products of blocks of 256{}", in_parts(parts)),
        }
    }
}

fn in_parts(parts: usize) -> String {
    if parts > 1 { format!(", in {parts} parts") } else { String::new() }
}

/// The types of a product whose plan is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Types {
    /// Format of both operands.
    pub operands: Format,
    /// Whether FP8 sums carry all along K or are promoted.
    pub accumulate: Accumulate,
    /// Format of the result.
    pub output: Format,
}

/// How the kernels of an algorithm add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Tensor-core chains; K in tiles of 128 bytes dealt in stretches.
    Chains,
    /// CUTLASS: parts of a whole number of vectors or lines, the rest of a part first.
    Parts,
    /// CUTLASS for Hopper, with stream-K.
    StreamK,
    /// Fused multiply-adds; tiles of K dealt in turn.
    Dealt,
    /// Sums in f32 by 16 lanes.
    Lanes,
    /// One row of x: a warp for each output.
    Warp,
    /// One row of x: dot products of blocks, and their sums.
    Dot,
    /// Fused multiply-adds; parts of whole tiles of 8 elements of K, added in place.
    InPlace,
}

/// A family of algorithms.
struct Family {
    /// The algorithm's number.
    id: u32,
    /// What they multiply.
    formats: &'static [Format],
    /// How they add.
    kind: Kind,
}

/// The algorithms whose order is known.
const FAMILIES: [Family; 10] = [
    // nvjet.
    Family { id: 66, formats: &[Format::E4m3, Format::Bf16, Format::F16], kind: Kind::Chains },
    // CUTLASS, on tensor cores and with fused multiply-adds.
    Family { id: 21, formats: &[Format::Tf32], kind: Kind::Parts },
    Family { id: 23, formats: &[Format::Tf32], kind: Kind::Parts },
    Family { id: 20, formats: &[Format::F32], kind: Kind::Parts },
    Family { id: 43, formats: &[Format::Tf32], kind: Kind::StreamK },
    Family { id: 55, formats: &[Format::F32, Format::Tf32], kind: Kind::Dealt },
    Family { id: 10, formats: &[Format::F32], kind: Kind::InPlace },
    Family { id: 11, formats: &[Format::F32, Format::Tf32], kind: Kind::Lanes },
    // gemv.
    Family { id: 13, formats: &[Format::F32, Format::Tf32], kind: Kind::Warp },
    Family { id: 14, formats: &[Format::F32, Format::Tf32], kind: Kind::Dot },
];

/// Elements of K of a tile, by `CUBLASLT_MATMUL_STAGES_*`: the number before the `x`.
fn tile_depth(stages: u32) -> Option<usize> {
    Some(match stages {
        26 | 28 | 31 | 32 => 8,
        1..=6 | 27 | 29 | 33 => 16,
        7..=12 | 25 | 34 => 32,
        13..=18 | 30 | 35 => 64,
        19..=24 | 36 => 128,
        _ => return None,
    })
}

/// Rows of w and rows of x of a tile of the result, by `CUBLASLT_MATMUL_TILE_*`.
fn tile_sides(tile: u32) -> Option<[usize; 2]> {
    Some(match tile {
        11 => [32, 32],
        12 => [32, 64],
        13 => [64, 32],
        14 => [32, 128],
        15 => [64, 64],
        16 => [128, 32],
        17 => [64, 128],
        18 => [128, 64],
        19 => [64, 256],
        20 => [128, 128],
        21 => [256, 64],
        22 => [64, 512],
        23 => [128, 256],
        24 => [256, 128],
        25 => [512, 64],
        _ => return None,
    })
}

/// Tiles of a cluster along rows of w and of x, by `CUBLASLT_CLUSTER_SHAPE_*`.
fn cluster_sides(cluster: u16) -> Option<[usize; 2]> {
    Some(match cluster {
        0 | 2 => [1, 1],
        3 => [2, 1],
        4 => [4, 1],
        5 => [1, 2],
        6 => [2, 2],
        7 => [4, 2],
        8 => [1, 4],
        9 => [2, 4],
        10 => [4, 4],
        11 => [8, 1],
        12 => [1, 8],
        13 => [8, 2],
        14 => [2, 8],
        15 => [16, 1],
        16 => [1, 16],
        17 => [3, 1],
        18 => [5, 1],
        19 => [6, 1],
        20 => [7, 1],
        21 => [9, 1],
        22 => [10, 1],
        23 => [11, 1],
        24 => [12, 1],
        25 => [13, 1],
        26 => [14, 1],
        27 => [15, 1],
        28 => [3, 2],
        29 => [5, 2],
        30 => [6, 2],
        31 => [7, 2],
        32 => [1, 3],
        33 => [2, 3],
        34 => [3, 3],
        35 => [4, 3],
        36 => [5, 3],
        37 => [3, 4],
        38 => [1, 5],
        39 => [2, 5],
        40 => [3, 5],
        41 => [1, 6],
        42 => [2, 6],
        43 => [1, 7],
        44 => [2, 7],
        45 => [1, 9],
        46 => [1, 10],
        47 => [1, 11],
        48 => [1, 12],
        49 => [1, 13],
        50 => [1, 14],
        51 => [1, 15],
        _ => return None,
    })
}

/// What the library writes where parts are added in f32, in order; and where that is done in place.
const IN_F32: u32 = 2;
const IN_PLACE: u32 = 1;
/// Elements of K of a block of [`Plan::Dot`], and the most parts whose order is known.
const DOT_BLOCK: usize = 256;
const MOST_DOTS: usize = 32;
/// The most parts of [`Plan::Pairs`] that were seen.
const MOST_PAIRED: usize = 7;

/// The plan of an algorithm for a product of that shape: N, M, K.
///
/// # Errors
/// In words, if no rule is known for such a record.
pub fn plan_of(record: &Record, types: Types, shape: [usize; 3]) -> Result<Plan, String> {
    let [_, _, inner] = shape;
    let Types { operands, accumulate, .. } = types;
    let known = |family: &&Family| family.id == record.id && family.formats.contains(&operands);
    let family = FAMILIES.iter().find(known).ok_or_else(|| {
        format!("the order of algorithm {} is not known for {operands}", record.id)
    })?;
    let vector = 16 / operands.bytes();
    if !inner.is_multiple_of(vector) {
        return Err(format!("rows of {inner} elements are no whole vectors of {vector}"));
    }
    let parts = record.split_k;
    let scheme = if family.kind == Kind::InPlace { IN_PLACE } else { IN_F32 };
    if parts > 1 && record.reduction != scheme {
        return Err(format!("parts that are added by scheme {} were not seen", record.reduction));
    }
    let depth = || {
        let unknown = || format!("the tile of stages {} is not known", record.stages);
        tile_depth(record.stages).ok_or_else(unknown)
    };
    let chain = Schedule {
        accumulate: if operands.is_fp8() { accumulate } else { Accumulate::Fast },
        ..Schedule::FAST
    };
    match family.kind {
        Kind::StreamK if parts == STREAM_K => Ok(match stream_k_parts(record, shape)? {
            1 => Plan::Schedule(chain),
            parts => Plan::Pairs { tile: depth()?, parts },
        }),
        _ if parts == STREAM_K => Err("its stream-K was not seen".to_owned()),
        Kind::Chains => Ok(Plan::Schedule(chain.with_split_k(parts.max(1)))),
        Kind::Lanes if parts <= 1 => Ok(Plan::Lanes { turn: 256, parts: 1 }),
        Kind::Lanes => Err("its parts were not seen".to_owned()),
        Kind::Warp => warp_of(record.custom, parts.max(1) as usize),
        Kind::Dot => match parts.max(1) as usize {
            // Beyond, their sums are added otherwise.
            parts if parts.min(inner.div_ceil(DOT_BLOCK)) > MOST_DOTS => {
                Err(format!("its order for more than {MOST_DOTS} parts is not known"))
            }
            parts => Ok(Plan::Dot { parts }),
        },
        // It cuts K where its record says one part too.
        Kind::InPlace if parts <= 1 => Err("how it cuts K is not in the record".to_owned()),
        Kind::InPlace => {
            let part = inner.div_ceil(parts as usize).next_multiple_of(8);
            Ok(Plan::Parts { part, tile: 8 })
        }
        Kind::Dealt if parts <= 1 => {
            Ok(Plan::Dealt { tile: 8, parts: 1, gathered: Gathered::InOrder })
        }
        _ if parts <= 1 => Ok(Plan::Schedule(chain)),
        Kind::Parts => {
            // Whole cache lines where rows are such, else whole vectors.
            let line = 128 / operands.bytes();
            let step = if inner.is_multiple_of(line) { line } else { vector };
            let part = inner.div_ceil(parts as usize).next_multiple_of(step);
            Ok(Plan::Parts { part, tile: depth()? })
        }
        Kind::Dealt => {
            let gathered = match record.custom {
                0 | 2 => Gathered::InOrder,
                1 => Gathered::InPairs,
                other => return Err(format!("its custom option {other} was not seen")),
            };
            Ok(Plan::Dealt { tile: depth()?, parts: parts as usize, gathered })
        }
        Kind::StreamK => Err("its split-K was not seen".to_owned()),
    }
}

/// The parts that each tile's K is cut into, from the workspace: a tile of f32 for each; one where
/// it holds none.
fn stream_k_parts(record: &Record, [tokens, outputs, _]: [usize; 3]) -> Result<usize, String> {
    let sides = tile_sides(record.tile).zip(cluster_sides(record.cluster_shape));
    let ([tall, wide], [down, across]) = sides.ok_or_else(|| {
        format!("tile {} or cluster {} is not known", record.tile, record.cluster_shape)
    })?;
    let tiles = outputs.div_ceil(tall).next_multiple_of(down)
        * tokens.div_ceil(wide).next_multiple_of(across);
    let held = record.workspace / (tall * wide * size_of::<f32>());
    if held == 0 {
        return Ok(1);
    }
    let parts = held / tiles.max(1);
    if parts * tiles != held {
        return Err(format!(
            "its workspace holds {held} parts of {tiles} tiles: some tiles are cut, and which is \
             not in the record"
        ));
    }
    if !(2..=MOST_PAIRED).contains(&parts) {
        return Err(format!("tiles in {parts} parts were not seen"));
    }
    Ok(parts)
}

/// gemv's lanes, by `CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION`.
fn warp_of(custom: u32, parts: usize) -> Result<Plan, String> {
    Ok(match custom {
        11 => Plan::Lanes { turn: 512, parts },
        12 => Plan::Lanes { turn: 256, parts },
        73 | 101 => Plan::Warp { lanes: 16, neighbours: false, parts },
        75 | 83 | 93 => Plan::Warp { lanes: 32, neighbours: false, parts },
        74 => Plan::Warp { lanes: 32, neighbours: true, parts },
        other => return Err(format!("its custom option {other} was not seen")),
    })
}

impl Plan {
    /// `y[N, M] = x[N, K] w[M, K]^T` in this order. Scales count where the plan is a schedule; nothing
    /// else was seen with any.
    ///
    /// # Errors
    /// If shapes, formats, scales or the schedule do not fit.
    pub fn product(
        &self,
        unit: &Unit,
        x: &Operand,
        w: &Operand,
        output: Format,
    ) -> Result<Tensor, GemmError> {
        let inner = x.codes.width();
        let sum = |x: &Codes, w: &Codes| {
            let operand = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
            gemm(unit, &Schedule::FAST, &operand(x), &operand(w), Format::F32)
        };
        let mut y = match *self {
            Plan::Schedule(schedule) => return gemm(unit, &schedule, x, w, output),
            Plan::Lanes { turn, parts } => {
                let sums = in_stretches(x, w, parts, |x, w| by_lanes_in_turns(x, w, turn));
                in_order(sums?, x, w)
            }
            Plan::Warp { lanes, neighbours, parts } => {
                let sums = in_stretches(x, w, parts, |x, w| by_warp(x, w, lanes, neighbours));
                in_order(sums?, x, w)
            }
            Plan::Dot { parts } => by_dot(x.codes, w.codes, parts)?,
            Plan::Parts { part, tile } => {
                let rest_first = |codes: &Codes, range: Range<usize>| {
                    let codes = codes.some_columns(range);
                    // Sums of single products do not show where tiles begin.
                    match unit {
                        Unit::SequentialFma | Unit::Integers => codes,
                        Unit::TensorCore(_) | Unit::BlockScaled(_) | Unit::MatrixCore(_) => {
                            residue_first(&codes, tile)
                        }
                    }
                };
                let starts = (0..inner).step_by(part.max(1));
                let sums = starts.map(|start| {
                    let range = start..(start + part).min(inner);
                    sum(&rest_first(x.codes, range.clone()), &rest_first(w.codes, range))
                });
                in_order(sums.collect::<Result<_, _>>()?, x, w)
            }
            Plan::Dealt { tile, parts, gathered } => {
                // Parts beyond the last tile are zero.
                let filled = parts.min(inner.div_ceil(tile.max(1)));
                let sums = (0..filled).map(|part| {
                    let dealt = |codes: &Codes| every(codes, tile, part, parts);
                    sum_by_fma(&dealt(x.codes), &dealt(w.codes))
                });
                let sums = sums.collect::<Result<Vec<Tensor>, _>>()?;
                match gathered {
                    Gathered::InOrder => in_order(sums, x, w),
                    Gathered::InPairs => in_order(paired(sums, parts), x, w),
                }
            }
            Plan::Pairs { tile, parts } => {
                let ranges = stretches(inner, tile, parts);
                let sums = ranges.into_iter().map(|range| {
                    sum(&x.codes.some_columns(range.clone()), &w.codes.some_columns(range))
                });
                neighbours_added(sums.collect::<Result<Vec<Tensor>, _>>()?)
            }
        };
        y.data_mut().par_iter_mut().for_each(|y| *y = output.round(*y));
        Ok(y)
    }
}

/// Sums, one after the other.
fn in_order(sums: Vec<Tensor>, x: &Operand, w: &Operand) -> Tensor {
    let zero = || Tensor::zeros(x.codes.rows(), w.codes.rows());
    sums.into_iter().reduce(|sum, part| added(sum, &part)).unwrap_or_else(zero)
}

fn added(mut sum: Tensor, part: &Tensor) -> Tensor {
    sum.data_mut().iter_mut().zip(part.data()).for_each(|(sum, part)| *sum += part);
    sum
}

/// What is added in order where partners come first: the last part, and each of the first half of
/// all with its partner of the second half, but for the last part's.
fn paired(sums: Vec<Tensor>, parts: usize) -> Vec<Tensor> {
    let half = parts.div_ceil(2);
    let mut all = Vec::new();
    if parts > 1 {
        all.extend(sums.get(parts - 1).cloned());
    }
    for (part, sum) in sums.iter().enumerate().take(half) {
        let partner = part + half;
        all.push(match sums.get(partner).filter(|_| partner + 1 < parts) {
            Some(other) => added(sum.clone(), other),
            None => sum.clone(),
        });
    }
    all
}

/// Stretches of whole tiles, the last ones a tile longer.
fn stretches(inner: usize, tile: usize, parts: usize) -> Vec<Range<usize>> {
    let tiles = inner.div_ceil(tile.max(1));
    let (each, more) = (tiles / parts.max(1), tiles % parts.max(1));
    let mut start = 0;
    let ranges = (0..parts).map(|part| {
        let end = start + each + usize::from(part + more >= parts);
        let range = start * tile..(end * tile).min(inner);
        start = end;
        range
    });
    ranges.filter(|range| !range.is_empty()).collect()
}

/// From the last one on neighbours are added, then their sums, until one is left.
fn neighbours_added(mut sums: Vec<Tensor>) -> Tensor {
    sums.reverse();
    while sums.len() > 1 {
        let pairs = sums.chunks(2).map(|pair| match pair {
            [one, other] => added(one.clone(), other),
            pair => pair[0].clone(),
        });
        sums = pairs.collect();
    }
    sums.remove(0)
}

/// The sums of some stretches of K of one length.
fn in_stretches(
    x: &Operand,
    w: &Operand,
    parts: usize,
    sum: impl Fn(&Codes, &Codes) -> Result<Tensor, GemmError>,
) -> Result<Vec<Tensor>, GemmError> {
    let inner = x.codes.width();
    if inner != w.codes.width() {
        return Err(GemmError::Inner { x: inner, w: w.codes.width() });
    }
    let part = inner.div_ceil(parts.max(1)).max(1);
    let starts = (0..inner).step_by(part);
    let sums = starts.map(|start| {
        let range = start..(start + part).min(inner);
        sum(&x.codes.some_columns(range.clone()), &w.codes.some_columns(range))
    });
    sums.collect()
}

/// Every tile of K that is dealt to a part, as f32.
fn every(codes: &Codes, tile: usize, part: usize, parts: usize) -> Codes {
    let own: Vec<usize> = (0..codes.width()).filter(|k| k / tile % parts == part).collect();
    let mut some = Codes::zeros(Format::F32, codes.rows(), own.len());
    for row in 0..codes.rows() {
        let all = codes.decode_row(row);
        let values: Vec<f32> = own.iter().map(|&k| all[k]).collect();
        quantize_row(Format::F32, &values, 1.0, &mut some.row_mut(row));
    }
    some
}

/// Fused multiply-adds in ascending K.
fn sum_by_fma(x: &Codes, w: &Codes) -> Result<Tensor, GemmError> {
    let operand = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
    gemm(&Unit::SequentialFma, &Schedule::FAST, &operand(x), &operand(w), Format::F32)
}

/// Dot products by blocks of 256 elements of K, which are dealt to the parts in turn. Each of 64
/// threads has elements `2t`, `2t + 1`, `128 + 2t` and `129 + 2t` of every block in a sum of its own;
/// the sums are added in pairs, and the threads as a warp's lanes are. Of the parts every fourth makes
/// a sum, and those follow each other.
fn by_dot(x: &Codes, w: &Codes, parts: usize) -> Result<Tensor, GemmError> {
    const THREADS: usize = 64;
    const SUMS: usize = 4;
    let inner = x.width();
    if inner != w.width() {
        return Err(GemmError::Inner { x: inner, w: w.width() });
    }
    let blocks = inner.div_ceil(DOT_BLOCK);
    let part_of = |x: &[f32], w: &[f32], part: usize| {
        let threads = (0..THREADS).map(|thread| {
            let own = [2 * thread, 2 * thread + 1, 128 + 2 * thread, 129 + 2 * thread];
            let [a, b, c, d] = own.map(|place| {
                let places = (part..blocks).step_by(parts).map(|block| block * DOT_BLOCK + place);
                let there = places.filter(|place| *place < inner);
                there.fold(0.0f32, |sum, place| x[place].mul_add(w[place], sum))
            });
            (a + b) + (c + d)
        });
        lanes_added(threads.collect())
    };
    let one = |x: &[f32], w: &[f32]| {
        let mut sums: [Option<f32>; SUMS] = [None; SUMS];
        for part in 0..parts.min(blocks) {
            let value = part_of(x, w, part);
            let sum = &mut sums[part % SUMS];
            *sum = Some(sum.map_or(value, |sum| sum + value));
        }
        sums.into_iter().flatten().reduce(|sum, next| sum + next).unwrap_or(0.0)
    };
    Ok(each_output(x, w, one))
}

/// Lanes half of all apart are added, and so on down to neighbours.
fn lanes_added(mut sums: Vec<f32>) -> f32 {
    while sums.len() > 1 {
        let upper = sums.split_off(sums.len() / 2);
        sums.iter_mut().zip(upper).for_each(|(sum, upper)| *sum += upper);
    }
    sums[0]
}

/// All outputs, one at a time.
fn each_output(x: &Codes, w: &Codes, one: impl Fn(&[f32], &[f32]) -> f32) -> Tensor {
    let w: Vec<Vec<f32>> = (0..w.rows()).map(|row| w.decode_row(row)).collect();
    let mut values = Vec::with_capacity(x.rows() * w.len());
    for row in 0..x.rows() {
        let x = x.decode_row(row);
        values.extend(w.iter().map(|w| one(&x, w)));
    }
    Tensor::new(w.len(), values)
}

/// The lanes of a warp, see [`Plan::Warp`].
fn by_warp(x: &Codes, w: &Codes, lanes: usize, neighbours: bool) -> Result<Tensor, GemmError> {
    let inner = x.width();
    if inner != w.width() {
        return Err(GemmError::Inner { x: inner, w: w.width() });
    }
    let own = inner.div_ceil(lanes);
    let one = |x: &[f32], w: &[f32]| {
        let mut sums = vec![0.0f32; lanes];
        for (k, (x, w)) in x.iter().zip(w).enumerate() {
            let lane = if neighbours { k / own } else { k % lanes };
            sums[lane] = x.mul_add(*w, sums[lane]);
        }
        lanes_added(sums)
    };
    Ok(each_output(x, w, one))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::emulated::chip::chip;
    use crate::op::ChipName;
    use crate::random::Random;

    fn record(id: u32, stages: u32, split_k: u32) -> Record {
        Record {
            id,
            tile: 15,
            stages,
            split_k,
            reduction: if split_k > 1 { 2 } else { 0 },
            custom: 0,
            inner_shape: 0,
            cluster_shape: 0,
            workspace: 0,
        }
    }

    fn types(operands: Format) -> Types {
        Types { operands, accumulate: Accumulate::Fast, output: Format::F32 }
    }

    fn plan(record: &Record, operands: Format, shape: [usize; 3]) -> Result<Plan, String> {
        plan_of(record, types(operands), shape)
    }

    #[test]
    fn records_of_an_h200_have_the_plans_that_its_products_showed() {
        let tf32 = |record: &Record, shape| plan(record, Format::Tf32, shape).expect("a plan");
        // [59, 88, 440], CUTLASS in 6 parts: whole vectors, the rest of tiles of 16 first.
        let cut = record(21, 6, 6);
        assert_eq!(tf32(&cut, [59, 88, 440]), Plan::Parts { part: 76, tile: 16 });
        // Whole lines where rows are such: 1024 in 12 parts of 96 and not of 88.
        assert_eq!(tf32(&record(23, 6, 12), [2, 1024, 1024]), Plan::Parts { part: 96, tile: 16 });
        // [345, 528, 7968], stream-K: 9 tiles in clusters of 4 by 3 of 64 x 128, 108 of them held.
        let mut streamed = Record { tile: 17, cluster_shape: 4, ..record(43, 34, STREAM_K) };
        streamed.workspace = 3_539_535;
        assert_eq!(tf32(&streamed, [345, 528, 7968]), Plan::Pairs { tile: 32, parts: 3 });
        // Less than a tile: nothing is cut.
        let whole = Record { workspace: 131, ..streamed };
        assert_eq!(tf32(&whole, [345, 528, 7968]), Plan::Schedule(Schedule::FAST));
        // [1324, 1752, 3464]: 112 of 176 tiles are held.
        let some = Record { tile: 20, workspace: 7_340_415, ..streamed };
        let why = plan(&some, Format::Tf32, [1324, 1752, 3464]).expect_err("not in the record");
        assert!(why.contains("112 parts of 176 tiles"), "{why}");
        let dealt = Record { custom: 1, ..record(55, 31, 33) };
        let gathered = Gathered::InPairs;
        assert_eq!(
            plan(&dealt, Format::F32, [50, 144, 6448]),
            Ok(Plan::Dealt { tile: 8, parts: 33, gathered })
        );
        let gemv = Record { custom: 101, ..record(13, 0, 1) };
        assert_eq!(
            plan(&gemv, Format::F32, [1, 3384, 2136]),
            Ok(Plan::Warp { lanes: 16, neighbours: false, parts: 1 })
        );
        let lanes = Record { custom: 11, ..record(13, 0, 8) };
        assert_eq!(
            plan(&lanes, Format::F32, [1, 688, 12_768]),
            Ok(Plan::Lanes { turn: 512, parts: 8 })
        );
        let in_place = Record { reduction: 1, ..record(10, 0, 7) };
        assert_eq!(
            plan(&in_place, Format::F32, [2, 1024, 1024]),
            Ok(Plan::Parts { part: 152, tile: 8 })
        );
        let nvjet = plan(&record(66, 36, 3), Format::Bf16, [4, 64, 4096]);
        assert_eq!(nvjet, Ok(Plan::Schedule(Schedule::FAST.with_split_k(3))));
    }

    #[test]
    fn what_was_not_seen_has_no_plan_and_says_why() {
        let shape = [4, 64, 16_384];
        for (record, format, why) in [
            (record(99, 6, 1), Format::Bf16, "algorithm 99 is not known for bf16"),
            (record(21, 6, 1), Format::Bf16, "algorithm 21 is not known for bf16"),
            (Record { reduction: 4, ..record(66, 36, 2) }, Format::Bf16, "scheme 4"),
            (record(66, 36, STREAM_K), Format::Bf16, "stream-K was not seen"),
            (record(21, 99, 2), Format::Tf32, "stages 99"),
            (Record { custom: 7, ..record(55, 31, 2) }, Format::F32, "custom option 7"),
            (Record { custom: 7, ..record(13, 0, 1) }, Format::F32, "custom option 7"),
            (record(11, 0, 4), Format::F32, "parts were not seen"),
            (record(10, 0, 1), Format::F32, "how it cuts K"),
            (record(14, 0, 33), Format::F32, "more than 32 parts"),
            (record(43, 34, 4), Format::Tf32, "split-K was not seen"),
        ] {
            let said = plan(&record, format, shape).expect_err("no plan");
            assert!(said.contains(why), "{said}");
        }
        let ragged = plan(&record(66, 36, 1), Format::Bf16, [4, 64, 4100]);
        assert!(ragged.expect_err("no plan").contains("no whole vectors of 8"));
    }

    /// Ones, and two values that hide them: what is left says where the two meet.
    fn left(plan: Plan, inner: usize, [first, second]: [usize; 2]) -> f32 {
        let mut x = vec![1.0f32; inner];
        x[first] = 2f32.powi(40);
        let mut w = vec![1.0f32; inner];
        w[second] = -(2f32.powi(40));
        let codes =
            |values: &[f32]| Codes::quantize(Format::F32, inner, values, 1.0).expect("one row");
        let (x, w) = (codes(&x), codes(&w));
        let y = plan.product(&Unit::SequentialFma, &operand(&x), &operand(&w), Format::F32);
        y.expect("a product").data()[0]
    }

    #[test]
    fn plans_leave_what_the_tables_of_an_h200_have() {
        // Of `runner chip sweep --format f32 --orders` (cuBLASLt 13.1.0): K, the algorithm, the two
        // places, and what was left.
        let dealt = |parts, gathered| Plan::Dealt { tile: 8, parts, gathered };
        let three = dealt(3, Gathered::InOrder);
        let pairs = dealt(32, Gathered::InPairs);
        let parts = Plan::Parts { part: 96, tile: 8 };
        let lanes = Plan::Lanes { turn: 256, parts: 1 };
        let warp = Plan::Warp { lanes: 32, neighbours: false, parts: 1 };
        let own = Plan::Warp { lanes: 32, neighbours: true, parts: 1 };
        let turns = Plan::Lanes { turn: 512, parts: 1 };
        let dot = |parts| Plan::Dot { parts };
        for (plan, inner, places, expected) in [
            (three, 1024, [0, 1], 1022.0),
            (three, 1024, [0, 8], 336.0),
            (three, 1024, [0, 16], 0.0),
            (three, 1024, [0, 24], 1015.0),
            (three, 1024, [37, 8], 1010.0),
            (pairs, 2048, [0, 7], 2040.0),
            (pairs, 2048, [0, 8], 1728.0),
            (pairs, 2048, [0, 120], 0.0),
            (pairs, 2048, [0, 128], 1920.0),
            (pairs, 2048, [0, 248], 1856.0),
            (pairs, 2048, [37, 0], 1344.0),
            (parts, 2048, [0, 95], 1952.0),
            (parts, 2048, [0, 96], 1856.0),
            (parts, 2048, [0, 200], 1760.0),
            (lanes, 1024, [0, 1], 896.0),
            (lanes, 1024, [0, 2], 832.0),
            (lanes, 1024, [0, 16], 1022.0),
            (lanes, 1024, [37, 5], 1021.0),
            (warp, 1024, [0, 1], 0.0),
            (warp, 1024, [0, 2], 512.0),
            (warp, 1024, [0, 16], 960.0),
            (warp, 1024, [0, 32], 1022.0),
            (warp, 1024, [0, 512], 1007.0),
            (own, 256, [0, 1], 254.0),
            (own, 256, [0, 8], 0.0),
            (own, 256, [0, 128], 240.0),
            (turns, 1024, [0, 1], 896.0),
            (turns, 1024, [0, 256], 1007.0),
            (turns, 1024, [0, 512], 960.0),
            (dot(16), 1024, [0, 1], 1022.0),
            (dot(16), 1024, [0, 2], 768.0),
            (dot(16), 1024, [0, 64], 1016.0),
            (dot(16), 1024, [0, 128], 1020.0),
            (dot(16), 1024, [0, 256], 512.0),
            (dot(16), 1408, [0, 256], 512.0),
            (dot(16), 1408, [0, 512], 256.0),
            (dot(16), 2136, [0, 256], 1024.0),
            (dot(16), 5000, [0, 1], 4996.0),
            (dot(16), 5000, [0, 256], 2440.0),
            (dot(32), 12_176, [0, 512], 2960.0),
        ] {
            assert_eq!(left(plan, inner, places), expected, "{plan} of {inner}: {places:?}");
        }
    }

    #[test]
    fn stretches_and_halves_are_whole_tiles() {
        // 305 tiles of 32 in 4 parts: 76, 76, 76, 77.
        let ranges = stretches(9736, 32, 4);
        assert_eq!(ranges, [0..2432, 2432..4864, 4864..7296, 7296..9736]);
        // Parts without a tile are left out.
        assert_eq!(stretches(64, 32, 4), [0..32, 32..64]);
        let sum = |values: &[f32]| {
            let sums = values.iter().map(|value| Tensor::new(1, vec![*value]));
            neighbours_added(sums.collect()).data()[0]
        };
        // The first is added last: 1 + (1 + 2^24) loses both ones.
        let big = 2f32.powi(24);
        assert_eq!(sum(&[1.0, 1.0, big]), big);
        assert_eq!(sum(&[1.0, big, -big]), 1.0);
        assert_eq!(sum(&[big, 1.0, 1.0]), big + 2.0);
        assert_eq!(sum(&[1.0, 1.0, big, -big]), 2.0);
        // Five: 1 + ((2 + 3) + (4 + 5)).
        assert_eq!(sum(&[big, 0.0, 1.0, 1.0, 0.0]), big + 2.0);
    }

    fn operand(codes: &Codes) -> Operand<'_> {
        Operand { codes, scales: Scales::Tensor(1.0) }
    }

    #[test]
    fn a_rest_comes_first_in_each_part_of_a_tensor_core() {
        let inner = 300;
        let unit = chip(ChipName::Hopper).unit(Format::Tf32, Format::Tf32).expect("hopper tf32");
        let mut random = Random::at(5);
        let mut codes = |rows: usize| {
            let values: Vec<f32> = (0..rows * inner).map(|_| random.symmetric()).collect();
            Codes::quantize(Format::Tf32, inner, &values, 1.0).expect("whole rows")
        };
        let (x, w) = (codes(3), codes(17));
        let plan = Plan::Parts { part: 156, tile: 16 };
        let y = plan.product(unit, &operand(&x), &operand(&w), Format::F32).expect("a product");
        // 156 = 12 + 9 * 16, and 144 = 9 * 16: chained by hand with the rest in front.
        let part = |range: Range<usize>, rest: usize| {
            let widened = |codes: &Codes| {
                let codes = codes.some_columns(range.clone());
                let mut padded = Codes::zeros(Format::Tf32, codes.rows(), 16 - rest + range.len());
                for row in 0..codes.rows() {
                    let mut values = codes.decode_row(row);
                    values.splice(rest..rest, vec![0.0; 16 - rest]);
                    quantize_row(Format::Tf32, &values, 1.0, &mut padded.row_mut(row));
                }
                padded
            };
            let (x, w) = (widened(&x), widened(&w));
            gemm(unit, &Schedule::FAST, &operand(&x), &operand(&w), Format::F32).expect("a part")
        };
        let expected = added(part(0..156, 12), &part(156..300, 0));
        assert_eq!(y.data(), expected.data());
        let plain = Schedule::FAST.with_split_k(2);
        let other = gemm(unit, &plain, &operand(&x), &operand(&w), Format::F32).expect("a product");
        assert_ne!(y.data(), other.data());
    }
}
