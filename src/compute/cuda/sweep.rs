//! cuBLASLt on this machine's GPU, as `compute/sweep.rs` asks it.
//!
//! The GPU makes the operands itself; only sampled outputs leave it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::cublaslt::{Algorithm, Operands, Spec};
use super::enabled::{gpus, library_version, unit_here};
use super::gpu::{DeviceError, Gpu};
use super::probe::{bytes_of, decode};
use super::program;
use crate::compute::emulated::chip::Unit;
use crate::compute::emulated::plan::{Record, Types};
use crate::compute::sweep::{Answer, Library, MARK_STEP, OrderTable, Question, Values, codes_of};
use crate::compute::{ComputeError, check_interrupt};
use crate::dtype::Format;
use crate::op::Accumulate;
use crate::tensor::Tensor;

/// The kernels' source.
pub const SOURCE: &str =
    concat!(include_str!("kernels/common.cu"), include_str!("kernels/sweep.cu"));

/// The names of the kernels.
pub const KERNELS: [&str; 1] = ["fill_operand"];

/// Columns of an order's table.
const TABLE: usize = 1024;
/// Rows of an order's table.
const TABLE_ROWS: usize = 4;

/// This machine's first GPU and its library.
pub struct SweptLibrary {
    gpu: Arc<Gpu>,
    fill: CudaFunction,
}

impl SweptLibrary {
    /// Opens it; compiled kernels are kept in `programs`.
    ///
    /// # Errors
    /// If there is no GPU, or if NVRTC is missing.
    pub fn open(programs: Option<&Path>) -> Result<SweptLibrary, ComputeError> {
        let gpus = gpus(programs).map_err(|problem| ComputeError::Recipe(problem.clone()))?;
        let gpu = gpus.first().ok_or_else(|| ComputeError::Recipe("no CUDA device".to_owned()))?;
        let program = program::compile_kept(SOURCE, &KERNELS, gpu.facts.capability, programs)
            .map_err(ComputeError::Recipe)?;
        let fill = gpu.with("the sweep's kernels", |state| {
            let module = state.context.load_module(Ptx::from_src(&*program))?;
            Ok(module.load_function("fill_operand")?)
        })?;
        let library = SweptLibrary { gpu: Arc::clone(gpu), fill };
        library.check_operands()?;
        Ok(library)
    }

    /// Whether the GPU makes the operands that the CPU computes with.
    fn check_operands(&self) -> Result<(), ComputeError> {
        const ROWS: usize = 3;
        const WIDTH: usize = 2000;
        const ALL_VALUES: [Values; 5] =
            [Values::Bell, Values::Spread, Values::Codes, Values::MarkedX, Values::MarkedW];
        let rows: Vec<usize> = (0..ROWS).collect();
        for operands in [Format::E4m3, Format::Bf16, Format::F16, Format::Tf32, Format::F32] {
            for values in ALL_VALUES {
                let question = Question {
                    types: Types { operands, accumulate: Accumulate::Fast, output: Format::F32 },
                    shape: [ROWS, ROWS, WIDTH],
                    values: [values; 2],
                    seeds: [7; 2],
                    scales: [1.0; 2],
                };
                let made = self.gpu.with("an operand of the sweep", |state| {
                    let stream = state.stream.clone();
                    let codes = self.operand(&stream, &question, 0)?;
                    let codes = stream.clone_dtoh(&codes)?;
                    stream.synchronize()?;
                    Ok(codes)
                })?;
                let expected = codes_of(operands, values, 7, &rows, WIDTH)?;
                if made != bytes_of(&expected) {
                    return Err(ComputeError::Recipe(format!(
                        "{} makes other operands in {operands} than the CPU: the GPU, its driver \
                         or its compiler errs",
                        self.gpu.facts.name
                    )));
                }
            }
        }
        Ok(())
    }

    /// The GPU's name.
    pub fn gpu(&self) -> String {
        self.gpu.facts.name.clone()
    }

    /// The library's version.
    pub fn version(&self) -> String {
        library_version(self.gpu.library_version())
    }

    /// An operand made on the GPU.
    fn operand(
        &self,
        stream: &Arc<CudaStream>,
        question: &Question,
        place: usize,
    ) -> Result<CudaSlice<u8>, DeviceError> {
        let [tokens, outputs, inner] = question.shape;
        let rows = [tokens, outputs][place];
        let format = question.types.operands;
        let mut codes = stream.alloc_zeros::<u8>(rows * inner * format.bytes())?;
        let (format, values) = (format.number(), question.values[place].code());
        let (seed, rows, width) = (question.seeds[place], rows as u64, inner as u64);
        let blocks = (rows * width).div_ceil(256).clamp(1, 1 << 16) as u32;
        let config =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        let mut launch = stream.launch_builder(&self.fill);
        launch.arg(&mut codes).arg(&format).arg(&values).arg(&seed).arg(&rows).arg(&width);
        // SAFETY: the arguments are those of the kernel, in its order and of its types, and `codes`
        // holds the `rows * width` codes of the format that it writes.
        unsafe { launch.launch(config) }?;
        Ok(codes)
    }

    /// The sampled outputs of a product by an algorithm that `choose` takes of those on offer.
    fn ask(
        &self,
        question: &Question,
        rows: &[usize],
        columns: &[usize],
        mut choose: impl FnMut(&[Algorithm]) -> Vec<Algorithm>,
    ) -> Result<Vec<Answer>, ComputeError> {
        let Types { operands, accumulate, output } = question.types;
        let [tokens, outputs, inner] = question.shape;
        let scaled = operands.is_fp8();
        let spec = Spec {
            operands,
            output,
            tokens,
            outputs,
            inner,
            stride: inner,
            x_stride: inner,
            fast: accumulate == Accumulate::Fast,
            scaled,
        };
        self.gpu.with("a product of the sweep", |state| {
            let stream = state.stream.clone();
            let x = self.operand(&stream, question, 0)?;
            let w = self.operand(&stream, question, 1)?;
            let x_scale = stream.clone_htod(&[question.scales[0]])?;
            let w_scale = stream.clone_htod(&[question.scales[1]])?;
            let scales = scaled.then_some((&w_scale, &x_scale));
            let held = Operands { w: &w, x: &x, skip: 0, x_skip: 0, scales };
            let offered = state.library.algorithms(&stream, &spec, &held, true)?;
            let row_bytes = outputs * output.bytes();
            let mut y = stream.alloc_zeros::<u8>(tokens * row_bytes)?;
            let mut answers = Vec::new();
            for algorithm in choose(&offered) {
                state.library.multiply(&stream, &spec, &held, &algorithm, &mut y)?;
                let mut values = Vec::with_capacity(rows.len() * columns.len());
                for row in rows {
                    let bytes = y.slice(row * row_bytes..(row + 1) * row_bytes);
                    let bytes = stream.clone_dtoh(&bytes)?;
                    stream.synchronize()?;
                    let all = decode(output, &bytes);
                    values.extend(columns.iter().map(|&column| all[column]));
                }
                let outputs = Tensor::new(columns.len(), values);
                answers.push(Answer { record: algorithm.record(), outputs });
            }
            Ok(answers)
        })
    }

    /// The orders of all algorithms on offer for small products of a format, each record once; where
    /// x has one row, of the favourites of many shapes.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn tables(&self, format: Format) -> Result<Vec<OrderTable>, ComputeError> {
        let types = Types { operands: format, accumulate: Accumulate::Fast, output: Format::F32 };
        let mut seen = HashSet::new();
        let mut tables = Vec::new();
        for tokens in [2, 4, 8, 16, 32, 64, 128, 512] {
            for [outputs, inner] in [[1024, 1024], [4096, 520], [256, 2048]] {
                let new = |offered: &[Algorithm]| {
                    let mut new = offered.to_vec();
                    new.retain(|one| {
                        let Record { id, tile, stages, split_k, reduction, .. } = one.record();
                        seen.insert((id, tile, stages, split_k, reduction))
                    });
                    new
                };
                tables.extend(self.table(types, [tokens, outputs, inner], new)?);
            }
        }
        for outputs in [16, 48, 176, 424, 696, 1024, 1880, 2896, 3384, 8192] {
            for inner in [64, 256, 1024, 1408, 2136, 5000, 12_176] {
                let favourite = |offered: &[Algorithm]| offered.iter().take(1).copied().collect();
                tables.extend(self.table(types, [1, outputs, inner], favourite)?);
            }
        }
        Ok(tables)
    }

    /// The orders of some algorithms for one shape.
    fn table(
        &self,
        types: Types,
        shape: [usize; 3],
        choose: impl FnMut(&[Algorithm]) -> Vec<Algorithm>,
    ) -> Result<Vec<OrderTable>, ComputeError> {
        let [tokens, outputs, inner] = shape;
        let rows: Vec<usize> = (0..tokens.min(TABLE_ROWS)).collect();
        let columns: Vec<usize> = (0..outputs.min(inner)).collect();
        let mut question = Question {
            types,
            shape,
            values: [Values::MarkedX, Values::MarkedW],
            seeds: [0; 2],
            scales: [1.0; 2],
        };
        let mut chosen = Vec::new();
        let mut tables: Vec<OrderTable> = Vec::new();
        let mut choose = Some(choose);
        // Each product has as many places of w's mark as w has rows.
        for first in (0..inner.min(TABLE)).step_by(columns.len()) {
            check_interrupt()?;
            question.seeds[1] = first as u64;
            let answers = self.ask(&question, &rows, &columns, |offered| {
                if let Some(mut choose) = choose.take() {
                    chosen = choose(offered);
                }
                chosen.clone()
            })?;
            if tables.is_empty() {
                tables = answers
                    .iter()
                    .map(|answer| OrderTable {
                        types,
                        shape,
                        record: answer.record,
                        marks: rows.iter().map(|row| row * MARK_STEP % inner).collect(),
                        left: vec![Vec::new(); rows.len()],
                    })
                    .collect();
            }
            for (table, answer) in tables.iter_mut().zip(&answers) {
                for (place, left) in table.left.iter_mut().enumerate() {
                    left.extend(answer.outputs.row(place));
                    left.truncate(inner.min(TABLE));
                }
            }
        }
        Ok(tables)
    }
}

impl Library for SweptLibrary {
    fn answer(
        &mut self,
        question: &Question,
        rows: &[usize],
        columns: &[usize],
    ) -> Result<Option<Answer>, ComputeError> {
        let favourite = |offered: &[Algorithm]| offered.first().copied().into_iter().collect();
        Ok(self.ask(question, rows, columns, favourite)?.pop())
    }

    fn unit(&self, format: Format) -> Result<Unit, ComputeError> {
        unit_here(&self.gpu.facts, format).ok_or_else(|| {
            ComputeError::Recipe(format!("{} has no {format} unit", self.gpu.facts.name))
        })
    }
}
