//! The FP8 product of an engine: weight and activation as its kernel quantises them, and what
//! the kernel makes of them.
//!
//! It knows which kernel scales and rounds how; their arithmetic is
//! `compute/engine_kernels/fp8.rs`'s.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::chip::Unit;
use super::engine::known_weight;
use super::gemm::{Operand, Scales};
use super::quantize::{Codes, CodesRow, absmax};
use super::schedule::{Epilogue, Schedule};
use super::steps::{Converted, Edit, Whole};
use crate::compute::ComputeError;
use crate::compute::engine_kernels::fp8::{
    GROUP, Quantise, block_scaled_mm, block_weight, blocks_by_powers, cutlass_scaled_mm, scaled_mm,
};
use crate::compute::engine_kernels::linear::finish;
use crate::dtype::Format;
use crate::engine::LinearKernel;
use crate::model::{HeldCodes, Weight, WeightType};
use crate::tensor::Tensor;

/// The FP8 product of an engine with one weight.
pub(super) struct Fp8Product<'a> {
    pub kernel: LinearKernel,
    /// The type of the stream.
    pub format: Format,
    pub unit: &'a Unit,
    pub weight: Weight<'a>,
    /// The bias as the engine holds it.
    pub bias: Option<Vec<f32>>,
    /// The largest magnitudes of stacks, by a weight's name, as they were met.
    pub largest: &'a Mutex<BTreeMap<String, f32>>,
    /// What the file holds, where that is FP8 already.
    pub held: Option<HeldCodes<'a>>,
}

/// What the file holds of a weight, where that is FP8 as the kernel takes it.
///
/// # Errors
/// If it is quantised in a way of which it is not known what the kernel does.
pub(super) fn held_for<'a>(
    kernel: LinearKernel,
    weight: &Weight<'a>,
) -> Result<Option<HeldCodes<'a>>, ComputeError> {
    if weight.is_plain() {
        return Ok(None);
    }
    let (rows, width) = (weight.rows(), weight.width());
    let fits = |held: &HeldCodes<'_>| match kernel {
        LinearKernel::VllmFp8 => held.block()[0] >= rows && held.block()[1] == width,
        LinearKernel::VllmFp8Channel => held.block() == [1, width],
        LinearKernel::VllmFp8Block => held.block() == [GROUP, GROUP],
        _ => false,
    };
    match weight.held_codes(WeightType::E4m3).filter(fits) {
        Some(held) => Ok(Some(held)),
        None => known_weight(*weight).map(|()| None),
    }
}

/// What is done otherwise than the kernel does.
pub(super) struct Otherwise<'e> {
    /// After the activation's conversion.
    pub x: &'e Edit<'e>,
    /// After the weight's.
    pub w: &'e Edit<'e>,
    /// Another order of additions than the kernel's chain.
    pub schedule: Option<Schedule>,
    /// The output's type.
    pub output: Format,
}

/// Rows of a weight as the kernel multiplies them.
struct Rows {
    values: Tensor,
    codes: Codes,
    scales: Scales,
    /// How many rows before those that were asked for share their blocks of scales.
    before: usize,
    /// The first of these rows within all that share blocks with the weight.
    first_row: usize,
}

impl Fp8Product<'_> {
    /// The product with some rows of the weight. `tokens` is how many rows the call had in which
    /// a row of `x` came.
    ///
    /// # Errors
    /// If the weight cannot be read, or is one that the engine gives to another kernel.
    pub fn rows(
        &self,
        x: &Tensor,
        rows: Range<usize>,
        tokens: impl Fn(usize) -> usize + Sync,
        otherwise: &Otherwise<'_>,
    ) -> Result<Tensor, ComputeError> {
        let (codes, scales) = self.activation(x)?;
        let (first_row, first_inner) = (0, 0);
        let values = x.data();
        let x = (otherwise.x)(Converted { values, codes, scales, first_row, first_inner });
        let weight = self.weight_rows(rows.clone())?;
        let w = Converted {
            values: weight.values.data(),
            codes: weight.codes,
            scales: weight.scales,
            first_row: weight.first_row,
            first_inner: 0,
        };
        let w = (otherwise.w)(w);
        let x = Operand { codes: &x.codes, scales: x.scales };
        let w = Operand { codes: &w.codes, scales: w.scales };
        let schedule = &otherwise.schedule.unwrap_or(Schedule::FAST);
        let tokens = |row| match otherwise.schedule.map(|schedule| schedule.epilogue) {
            // The order of the scales that a call of few rows has, and of many.
            Some(Epilogue::ActivationThenWeight) => 0,
            Some(Epilogue::WeightThenActivation) => usize::MAX,
            Some(Epilogue::ScalesFirst) | None => tokens(row),
        };
        let bias = self.bias.as_ref().map(|bias| &bias[rows.clone()]);
        let (unit, output) = (self.unit, otherwise.output);
        Ok(match self.kernel {
            LinearKernel::VllmFp8Block => {
                let y = block_scaled_mm(unit, schedule, &x, &w, output)?;
                let mut y = y.columns(weight.before..weight.before + rows.len());
                // The bias is an addition of its own, and rounds once more.
                finish(&mut y, bias, output);
                y
            }
            LinearKernel::VllmFp8 | LinearKernel::VllmFp8Channel => {
                cutlass_scaled_mm(unit, schedule, &x, &w, bias, tokens, output)?
            }
            _ => scaled_mm(unit, schedule, &x, &w, bias, output)?,
        })
    }

    /// The codes and scales of an activation.
    ///
    /// # Errors
    /// If the weights that are stacked with this one are not those of one checkpoint.
    pub fn activation(&self, x: &Tensor) -> Result<(Codes, Scales), ComputeError> {
        if let Some(scale) = self.static_scale()? {
            let codes = Quantise::VLLM_TENSOR.codes(x, &vec![scale; x.rows()]);
            return Ok((codes, Scales::Tensor(scale)));
        }
        Ok(self.dynamic_activation(x))
    }

    /// The scale of activations that the file holds: the largest of what is stacked.
    fn static_scale(&self) -> Result<Option<f32>, ComputeError> {
        let Some(own) = self.held.and_then(|held| held.input_scale) else { return Ok(None) };
        let mut most = own;
        for part in stacked(self.weight)? {
            let of_part = part.held_codes(WeightType::E4m3).and_then(|held| held.input_scale);
            most = most.max(of_part.ok_or_else(|| mixed(&part))?);
        }
        Ok(Some(most))
    }

    fn dynamic_activation(&self, x: &Tensor) -> (Codes, Scales) {
        let by_row = |quantise: Quantise| {
            let (codes, scales) = quantise.grouped(x, x.width());
            (codes, Scales::Row(scales))
        };
        match self.kernel {
            LinearKernel::SglangFp8 => by_row(Quantise::SGLANG),
            LinearKernel::TorchaoFp8Row => by_row(Quantise::torchao(self.format)),
            LinearKernel::VllmFp8Block => {
                let (codes, scales) = Quantise::VLLM_GROUP.grouped(x, GROUP);
                (codes, Scales::Block128 { rows_per_block: 1, first_row: 0, scales })
            }
            _ => by_row(Quantise::VLLM),
        }
    }

    /// All of the weight after its conversion.
    ///
    /// # Errors
    /// As [`Fp8Product::rows`].
    pub fn whole_weight(&self) -> Result<Whole, ComputeError> {
        self.converted_rows(0..self.weight.rows())
    }

    /// Some rows of the weight after their conversion, and those before them that share blocks of
    /// scales with them.
    ///
    /// # Errors
    /// As [`Fp8Product::rows`].
    pub fn converted_rows(&self, rows: Range<usize>) -> Result<Whole, ComputeError> {
        let rows = self.weight_rows(rows)?;
        Ok((rows.codes, rows.scales, rows.before))
    }

    fn weight_rows(&self, rows: Range<usize>) -> Result<Rows, ComputeError> {
        if self.kernel == LinearKernel::VllmFp8Block {
            return self.block_rows(rows);
        }
        let first_row = rows.start;
        if let Some(held) = self.held {
            return self.rows_of_file(&held, rows);
        }
        let values = self.held(&self.weight, rows)?;
        let by_row = |quantise: Quantise| {
            let (codes, scales) = quantise.grouped(&values, values.width());
            (codes, Scales::Row(scales))
        };
        let (codes, scales) = match self.kernel {
            LinearKernel::SglangFp8 => by_row(Quantise::SGLANG),
            LinearKernel::TorchaoFp8Row => by_row(Quantise::torchao(self.format)),
            LinearKernel::VllmFp8Channel => by_row(Quantise::VLLM),
            _ => {
                let scale = Quantise::VLLM_TENSOR.scale_of(&[self.largest_of_stack()?]);
                let codes = Quantise::VLLM_TENSOR.codes(&values, &vec![scale; values.rows()]);
                (codes, Scales::Tensor(scale))
            }
        };
        Ok(Rows { values, codes, scales, before: 0, first_row })
    }

    /// Rows of a weight that the file holds in FP8, with a scale for each or for all.
    fn rows_of_file(&self, held: &HeldCodes<'_>, rows: Range<usize>) -> Result<Rows, ComputeError> {
        let (first_row, width) = (rows.start, self.weight.width());
        let mut values = Tensor::zeros(rows.len(), width);
        self.weight.decode_rows(rows.clone(), values.data_mut())?;
        let as_held = || {
            let mut codes = Codes::zeros(Format::E4m3, rows.len(), width);
            let lines = held.codes(rows.clone()).chunks_exact(width);
            for (mut codes, held) in codes.rows_mut().into_iter().zip(lines) {
                codes.copy_from(CodesRow::Bits8(held));
            }
            codes
        };
        let (codes, scales) = match self.kernel {
            LinearKernel::VllmFp8Channel => {
                (as_held(), Scales::Row(rows.clone().map(|row| held.scale(row, 0)).collect()))
            }
            // Fused in the file: the scale is that of all.
            _ if self.weight.is_fused() => (as_held(), Scales::Tensor(held.scale(0, 0))),
            // One scale for what is stacked, to which all is converted, also what is alone
            // (`requantize_with_max_scale`): through f16, to which PyTorch rounds the scale too,
            // since both operands are tensors on the GPU.
            _ => {
                let mut most = 0_f32;
                for part in stacked(self.weight)? {
                    let of_part = part.held_codes(WeightType::E4m3).ok_or_else(|| mixed(&part))?;
                    most = most.max(of_part.scale(0, 0));
                }
                let own = Format::F16.round(held.scale(0, 0));
                let read = |code: &u8| Format::F16.round(Format::E4m3.decode((*code).into()) * own);
                let halves = held.codes(rows.clone()).iter().map(read).collect();
                let halves = Tensor::new(width, halves);
                let codes = Quantise::VLLM_TENSOR.codes(&halves, &vec![most; rows.len()]);
                (codes, Scales::Tensor(most))
            }
        };
        Ok(Rows { values, codes, scales, before: 0, first_row })
    }

    /// The largest magnitude of what the engine stacks with the weight.
    fn largest_of_stack(&self) -> Result<f32, ComputeError> {
        let name = self.weight.name();
        let known = || self.largest.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // What a hypothesis makes of a weight is of no model, and may share a name.
        if self.weight.model().is_some()
            && let Some(most) = known().get(name).copied()
        {
            return Ok(most);
        }
        let mut most = 0_f32;
        for part in stacked(self.weight)? {
            most = most.max(absmax(self.held(&part, 0..part.rows())?.data()));
        }
        if self.weight.model().is_some() {
            known().insert(name.to_owned(), most);
        }
        Ok(most)
    }

    /// DeepGEMM's. Blocks of a weight are those of the matrix that the engine stacks, so a
    /// block may reach into the next weight's rows.
    fn block_rows(&self, rows: Range<usize>) -> Result<Rows, ComputeError> {
        let weight = self.weight;
        let stacked = stacked(weight)?;
        let before = stacked.iter().take_while(|part| part.name() != weight.name());
        let own = before.map(Weight::rows).sum::<usize>();
        let all: usize = stacked.iter().map(Weight::rows).sum();
        if !weight.width().is_multiple_of(GROUP) || !all.is_multiple_of(64) {
            return Err(ComputeError::Recipe(format!(
                "vLLM gives {}, stacked [{all}, {}], to another kernel than DeepGEMM, which is \
                 not known to the bit; judge it by the contract `engine`, without `engine` in the \
                 recipe",
                weight.in_words(),
                weight.width()
            )));
        }
        let first = (own + rows.start) / GROUP * GROUP;
        let last = (own + rows.end).next_multiple_of(GROUP).min(all);
        let mut values = Vec::with_capacity((last - first) * weight.width());
        let mut at = 0;
        for part in &stacked {
            let rows = first.max(at)..last.min(at + part.rows());
            if !rows.is_empty() {
                values.extend(self.held(part, rows.start - at..rows.end - at)?.into_data());
            }
            at += part.rows();
        }
        let values = Tensor::new(weight.width(), values);
        let (codes, scales) = match self.held {
            Some(_) => blocks_by_powers(&values),
            None => block_weight(&values),
        };
        let scales = Scales::Block128 { rows_per_block: GROUP, first_row: 0, scales };
        let before = own + rows.start - first;
        Ok(Rows { values, codes, scales, before, first_row: first - own / GROUP * GROUP })
    }

    /// Rows of a weight as the engine holds them before it quantises.
    fn held(&self, weight: &Weight<'_>, rows: Range<usize>) -> Result<Tensor, ComputeError> {
        let mut values = Tensor::zeros(rows.len(), weight.width());
        weight.decode_rows(rows, values.data_mut())?;
        if self.held.is_some() {
            return Ok(values);
        }
        let round = |value: &mut f32| *value = self.format.round(*value);
        values.data_mut().par_iter_mut().for_each(round);
        Ok(values)
    }
}

fn mixed(part: &Weight<'_>) -> ComputeError {
    ComputeError::Recipe(format!(
        "the engine stacks {} with weights that the file holds in FP8, and it is {}",
        part.in_words(),
        part.kind()
    ))
}

/// The weights that engines stack to one matrix, in the order of its rows: queries, keys and
/// values, or gate and up. The weight alone where it is none of these, or of no model.
fn stacked(weight: Weight<'_>) -> Result<Vec<Weight<'_>>, ComputeError> {
    let names = stacked_names(weight.name());
    match weight.model() {
        Some(model) if !names.is_empty() => {
            names.iter().map(|name| Ok(model.tensor(name)?)).collect()
        }
        _ => Ok(vec![weight]),
    }
}

/// The names of the weights that engines stack to one matrix with the weight of this name, itself
/// among them, in the order of its rows; none where it stands alone.
pub fn stacked_names(name: &str) -> Vec<String> {
    const STACKED: [&[&str]; 2] = [
        &[".attn_q.weight", ".attn_k.weight", ".attn_v.weight"],
        &[".ffn_gate.weight", ".ffn_up.weight"],
    ];
    let found = STACKED.iter().find_map(|parts| {
        let block = parts.iter().find_map(|part| name.strip_suffix(part))?;
        Some((block, parts))
    });
    let Some((block, parts)) = found else { return Vec::new() };
    parts.iter().map(|part| format!("{block}{part}")).collect()
}
