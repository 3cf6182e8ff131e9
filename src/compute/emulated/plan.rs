//! In which order an algorithm of cuBLASLt adds, from the record that the library gives of it.
//!
//! It knows records and schedules; who asks the library is `compute/cuda`. Nothing is fitted to
//! outputs: a record of which no rule is known has no plan, and says so.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::chip::Unit;
use super::gemm::{GemmError, Operand, Scales, gemm};
use super::schedule::{Schedule, Then};
use crate::compute::engine_kernels::linear::by_lanes;
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

/// How the parts of K become one sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartSums {
    /// Added in f32, in order.
    F32,
    /// Each rounded to the result's format, then added in f32, in order.
    Rounded,
    /// Added in order, and the sum rounded to the result's format after each.
    InPlace,
}

/// The order of additions that a record stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Plan {
    /// Chains, promotions and parts of K.
    pub schedule: Schedule,
    /// How the parts become one sum.
    pub parts: PartSums,
    /// Whether 16 lanes of f32 add instead of the unit, see [`by_lanes`].
    pub lanes: bool,
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.lanes {
            return f.write_str("16 lanes of f32");
        }
        write!(f, "{}", self.schedule)?;
        match self.parts {
            PartSums::F32 => Ok(()),
            PartSums::Rounded => f.write_str(", each part rounded"),
            PartSums::InPlace => f.write_str(", the sum rounded after each part"),
        }
    }
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

/// The plan of an algorithm for operands of `inner` elements of K.
///
/// # Errors
/// In words, if no rule is known for such a record.
pub fn plan_of(record: &Record, types: Types, inner: usize) -> Result<Plan, String> {
    let _ = inner;
    let accumulate = if types.operands.is_fp8() { types.accumulate } else { Accumulate::Fast };
    let parts = if record.split_k == STREAM_K { 1 } else { record.split_k.max(1) };
    let schedule = Schedule { accumulate, ..Schedule::FAST }.with_split_k(parts);
    let parts = match record.reduction {
        0 | 2 => PartSums::F32,
        1 => PartSums::InPlace,
        4 => PartSums::Rounded,
        other => return Err(format!("reduction scheme {other} is not known")),
    };
    Ok(Plan { schedule, parts, lanes: false })
}

impl Plan {
    /// `y[N, M] = x[N, K] w[M, K]^T` in this order.
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
        if self.lanes {
            let mut y = by_lanes(x.codes, w.codes)?;
            y.data_mut().par_iter_mut().for_each(|y| *y = output.round(*y));
            return Ok(y);
        }
        if self.parts == PartSums::F32 || self.schedule.split_k <= 1 {
            return gemm(unit, &self.schedule, x, w, output);
        }
        let scale = scale_of(x) * scale_of(w);
        let mut sums: Option<Tensor> = None;
        for part in self.part_ranges(x.codes.width(), x.codes.format()) {
            let (x, w) = (x.codes.some_columns(part.clone()), w.codes.some_columns(part));
            let bare = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
            let whole = self.schedule.with_split_k(1);
            let mut part = gemm(unit, &whole, &bare(&x), &bare(&w), Format::F32)?;
            part.data_mut().iter_mut().for_each(|part| *part = output.round(scale * *part));
            match &mut sums {
                None => sums = Some(part),
                Some(sums) => {
                    for (sum, part) in sums.data_mut().iter_mut().zip(part.data()) {
                        *sum += part;
                        if self.parts == PartSums::InPlace {
                            *sum = output.round(*sum);
                        }
                    }
                }
            }
        }
        let mut sums = sums.unwrap_or_else(|| Tensor::zeros(x.codes.rows(), w.codes.rows()));
        sums.data_mut().iter_mut().for_each(|sum| *sum = output.round(*sum));
        Ok(sums)
    }

    /// The stretches of K that are summed apart.
    fn part_ranges(&self, inner: usize, format: Format) -> Vec<std::ops::Range<usize>> {
        let mut start = 0;
        let ends = self.schedule.steps(inner, format).into_iter();
        ends.filter(|step| step.then == Then::EndPart)
            .map(|step| {
                let range = start..step.inner.end;
                start = range.end;
                range
            })
            .collect()
    }
}

/// The one scale of an operand; products with others have no parts that are rounded.
fn scale_of(operand: &Operand) -> f32 {
    match operand.scales {
        Scales::Tensor(scale) => scale,
        _ => 1.0,
    }
}
