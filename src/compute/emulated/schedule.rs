//! Schedules as data: how a GEMM chains instructions along K and ends.
//!
//! It knows the order of additions, not how an addition is done (that is
//! `tensor_core.rs`).
//!
//! Measured on an H200 (cuBLASLt of CUDA 13.0): tensor-core instructions are
//! chained along K; FP8 without fast accumulation adds the tensor core's
//! accumulator to an f32 every 128 elements; split-K cuts K into tiles of 128
//! bytes, gives each part `ceil(tiles / parts)` of them and adds the parts in
//! order. tf32 and f32 do the same: PyTorch's products of [16, 1024] and
//! [64, 1024] are met in every bit by split-K 16 for tf32 (operands rounded to
//! nearest even) and by split-K 32 for f32, each part a chain of fused
//! multiply-adds on the CUDA cores. One shape each: a promotion every 64 or 32
//! elements would look the same.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::dtype::Format;
use crate::op::{Accumulate, Recipe};

/// The order of additions of one GEMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Schedule {
    /// Whether the accumulator chains all along K or is promoted.
    pub accumulate: Accumulate,
    /// Elements of K between promotions; used by `Promoted` only.
    pub promotion_interval: u32,
    /// Parts into which K is cut; 1 is no cut.
    pub split_k: u32,
    /// Bytes of K in the tiles that are dealt to the parts.
    pub split_tile_bytes: u32,
    /// How the scales are applied.
    pub epilogue: Epilogue,
}

/// The order in which per-tensor, per-token and per-channel scales are
/// multiplied with the accumulator, each product rounded to f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Epilogue {
    /// `(scale_x * scale_w) * accumulator`, as cuBLASLt does.
    ScalesFirst,
    /// `(accumulator * scale_x) * scale_w`.
    ActivationThenWeight,
    /// `(accumulator * scale_w) * scale_x`.
    WeightThenActivation,
}

/// One stretch of K that the tensor core chains, and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Elements of K, in order.
    pub inner: Range<usize>,
    /// What happens to the accumulator after them.
    pub then: Then,
}

/// What happens to the tensor core's accumulator at the end of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is added to the part's main accumulator and restarts from zero.
    Promote,
    /// Likewise, and then the part is added to the total.
    EndPart,
}

impl Schedule {
    /// What cuBLASLt does on Hopper without split-K.
    pub const FAST: Schedule = Schedule {
        accumulate: Accumulate::Fast,
        promotion_interval: 128,
        split_k: 1,
        split_tile_bytes: 128,
        epilogue: Epilogue::ScalesFirst,
    };

    /// The same with promoted accumulation.
    pub const PROMOTED: Schedule = Schedule { accumulate: Accumulate::Promoted, ..Schedule::FAST };

    /// What follows sums of integers: `scale_x * (scale_w * sum)`, as CUTLASS does in vLLM.
    pub const INTEGERS: Schedule =
        Schedule { epilogue: Epilogue::WeightThenActivation, ..Schedule::FAST };

    /// The schedule of a recipe. Only FP8 is ever promoted, and K is cut only
    /// where the recipe pins it.
    pub fn of(recipe: &Recipe) -> Schedule {
        let base = match recipe.accumulate {
            _ if recipe.gemm == Format::Int8 => Schedule::INTEGERS,
            Accumulate::Promoted if recipe.gemm.is_fp8() && recipe.blocks().is_none() => {
                Schedule::PROMOTED
            }
            _ => Schedule::FAST,
        };
        base.with_split_k(recipe.pin.parts())
    }

    /// The same schedule with K cut into `split_k` parts.
    pub fn with_split_k(self, split_k: u32) -> Schedule {
        Schedule { split_k, ..self }
    }

    /// The steps over `inner` elements of K of the given format.
    ///
    /// A part that gets no tile is left out: adding its zero would change nothing.
    pub fn steps(&self, inner: usize, format: Format) -> Vec<Step> {
        let tile = (self.split_tile_bytes as usize / format.bytes()).max(1);
        let parts = (self.split_k as usize).max(1);
        let part = if parts == 1 { inner } else { inner.div_ceil(tile).div_ceil(parts) * tile };
        let stretch = match self.accumulate {
            Accumulate::Fast => part,
            Accumulate::Promoted => self.promotion_interval as usize,
        }
        .max(1);
        let mut steps = Vec::new();
        let mut start = 0;
        while start < inner {
            let part_end = (start + part).min(inner);
            while start < part_end {
                let end = (start + stretch).min(part_end);
                let then = if end == part_end { Then::EndPart } else { Then::Promote };
                steps.push(Step { inner: start..end, then });
                start = end;
            }
        }
        steps
    }
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.accumulate {
            Accumulate::Fast => f.write_str("fast")?,
            Accumulate::Promoted => f.write_str("promoted")?,
        }
        if self.accumulate == Accumulate::Promoted && self.promotion_interval != 128 {
            write!(f, " every {}", self.promotion_interval)?;
        }
        write!(f, ", split-K {}", self.split_k)?;
        if self.split_k > 1 && self.split_tile_bytes != 128 {
            write!(f, " in tiles of {} bytes", self.split_tile_bytes)?;
        }
        match self.epilogue {
            Epilogue::ScalesFirst => Ok(()),
            Epilogue::ActivationThenWeight => f.write_str(", scaled by x, then by w"),
            Epilogue::WeightThenActivation => f.write_str(", scaled by w, then by x"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(schedule: Schedule, inner: usize, format: Format) -> Vec<(usize, usize, bool)> {
        schedule
            .steps(inner, format)
            .into_iter()
            .map(|step| (step.inner.start, step.inner.end, step.then == Then::EndPart))
            .collect()
    }

    #[test]
    fn fast_is_one_chain_and_promoted_restarts_every_128() {
        assert_eq!(ranges(Schedule::FAST, 300, Format::E4m3), [(0, 300, true)]);
        assert_eq!(
            ranges(Schedule::PROMOTED, 300, Format::E4m3),
            [(0, 128, false), (128, 256, false), (256, 300, true)]
        );
    }

    #[test]
    fn split_k_deals_whole_tiles_and_drops_empty_parts() {
        let split = Schedule::FAST.with_split_k(4);
        // 5 tiles of 64 bf16 elements, 2 a part: the fourth part is empty.
        assert_eq!(
            ranges(split, 300, Format::Bf16),
            [(0, 128, true), (128, 256, true), (256, 300, true)]
        );
    }

    #[test]
    fn display_names_what_is_unusual() {
        assert_eq!(Schedule::FAST.with_split_k(7).to_string(), "fast, split-K 7");
        assert_eq!(Schedule::PROMOTED.to_string(), "promoted, split-K 1");
    }
}
