//! The emulated arm's product on a GPU: the arithmetic of any chip, to the bits of the CPU's.
//!
//! The kernels multiply finite operands (`kernels/emulation.cu`); rows with a NaN or an infinity, and
//! outputs that became NaN on the way, are computed by the CPU.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use rayon::prelude::*;

use super::MeasuredEmulation;
use super::enabled::gpus;
use super::gpu::{DeviceError, Gpu};
use super::probe::bytes_of;
use super::program;
use crate::compute::ComputeError;
use crate::compute::emulated::chip::{CHIPS, Unit};
use crate::compute::emulated::gemm::{Operand, Scales, check_scale_count, gemm};
use crate::compute::emulated::identify::{mismatches, spread};
use crate::compute::emulated::quantize::{Codes, CodesRowMut};
use crate::compute::emulated::schedule::{Epilogue, Schedule, Then};
use crate::compute::sweep::{Values, codes_of};
use crate::dtype::Format;
use crate::tensor::Tensor;

/// The kernels' source.
pub const SOURCE: &str =
    concat!(include_str!("kernels/common.cu"), include_str!("kernels/emulation.cu"));

/// The names of the kernels.
pub const KERNELS: [&str; 9] = [
    "decode_operand",
    "emulate_f32_16",
    "emulate_f32_32",
    "emulate_f64_4",
    "emulate_f64_8",
    "emulate_f64_16",
    "emulate_f64_32",
    "emulate_fma",
    "finish_emulated",
];

/// Threads of the kernels that add in blocks, and the rows of x of one of their tiles.
const THREADS: u32 = 128;
const TILE_ROWS: usize = 64;
/// Rows of w of a tile: where sums are f32 and where they are f64.
const TILE_OUTPUTS: [usize; 2] = [64, 32];
/// Rows of w whose outputs the CPU computes too.
const SAMPLED: usize = 8;
/// Elements of K that share a block scale.
const SCALE_BLOCK: usize = 128;

/// What a product is to be computed by, as the kernels read it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Emulated {
    rows: u64,
    outputs: u64,
    width: u64,
    stretch: u64,
    part: u64,
    alignment_bits: i32,
    result_bits: i32,
    exponent_floor: i32,
    x_least: i32,
    w_least: i32,
    by_block: i32,
}

// SAFETY: a C struct of plain integers without padding, the same as in `kernels/emulation.cu`.
unsafe impl DeviceRepr for Emulated {}

/// Which kernel computes a unit's products.
struct Choice {
    kernel: &'static str,
    tile_outputs: usize,
}

/// The kernel of a unit; none if it adds more or fewer products at once than any kernel does.
fn kernel_of(unit: &Unit, x: Format, w: Format) -> Option<Choice> {
    let core = match unit {
        Unit::TensorCore(core) => core,
        Unit::SequentialFma => {
            return Some(Choice { kernel: "emulate_fma", tile_outputs: 0 });
        }
        // The CPU alone computes these.
        Unit::BlockScaled(_) | Unit::MatrixCore(_) | Unit::Integers => return None,
    };
    // A cut product has F + 2 bits; their sum must be exact, and nothing subnormal.
    let sum_bits = core.alignment_bits + 2 + core.products.max(1).ilog2() + 1;
    let small = sum_bits <= 24 && x.is_fp8() && w.is_fp8();
    let kernel = match (small, core.products) {
        (true, 16) => "emulate_f32_16",
        (true, 32) => "emulate_f32_32",
        (_, 4) => "emulate_f64_4",
        (_, 8) => "emulate_f64_8",
        (_, 16) => "emulate_f64_16",
        (_, 32) => "emulate_f64_32",
        _ => return None,
    };
    let f32_sums = kernel.starts_with("emulate_f32");
    Some(Choice { kernel, tile_outputs: TILE_OUTPUTS[usize::from(!f32_sums)] })
}

/// Whether a kernel multiplies as a unit does.
pub fn multiplies(unit: &Unit, x: Format, w: Format) -> bool {
    kernel_of(unit, x, w).is_some()
}

/// The emulation's kernels on one GPU.
pub struct Emulation {
    gpu: Arc<Gpu>,
    functions: Vec<(&'static str, CudaFunction)>,
}

impl Emulation {
    /// The kernels for a GPU; compiled ones are kept in `programs`.
    ///
    /// # Errors
    /// If NVRTC is missing, or if the GPU fails.
    pub fn open(gpu: &Arc<Gpu>, programs: Option<&Path>) -> Result<Emulation, ComputeError> {
        let program = program::compile_kept(SOURCE, &KERNELS, gpu.facts.capability, programs)
            .map_err(ComputeError::Recipe)?;
        let functions = gpu.with("the emulation's kernels", |state| {
            let module = state.context.load_module(Ptx::from_src(&*program))?;
            KERNELS.into_iter().map(|name| Ok((name, module.load_function(name)?))).collect()
        })?;
        Ok(Emulation { gpu: Arc::clone(gpu), functions })
    }

    fn function(&self, name: &str) -> Result<&CudaFunction, DeviceError> {
        let found = self.functions.iter().find(|(own, _)| *own == name);
        found
            .map(|(_, function)| function)
            .ok_or_else(|| DeviceError::Refused(format!("no kernel is called {name}")))
    }

    /// What [`gemm`] returns, to the bit: outputs of some rows of w are computed by the CPU too.
    ///
    /// # Errors
    /// As [`gemm`]; if the GPU fails, or if it returns other bits.
    pub fn product(
        &self,
        unit: &Unit,
        schedule: &Schedule,
        x: &Operand,
        w: &Operand,
        output: Format,
    ) -> Result<Tensor, ComputeError> {
        let rows = spread(w.codes.rows(), SAMPLED);
        let expected = on_cpu(unit, schedule, x, w, output, &rows)?;
        let (y, _) = self.timed(unit, schedule, x, w, output, 1)?;
        match mismatches(&expected, &columns_of(&y, &rows)) {
            0 => Ok(y),
            differing => Err(ComputeError::Device {
                gpu: format!("GPU {} ({})", self.gpu.facts.ordinal, self.gpu.facts.name),
                what: "an emulated product".to_owned(),
                problem: format!(
                    "{differing} of {} sampled outputs differ in their bits from the CPU's: the \
                     GPU, its driver or its compiler errs, and nothing of it was kept; compute it \
                     on the CPU, and look at the GPU with `runner chip measure --emulation`",
                    expected.data().len()
                ),
            }),
        }
    }

    /// The product, and the seconds of the last of so many launches.
    fn timed(
        &self,
        unit: &Unit,
        schedule: &Schedule,
        x: &Operand,
        w: &Operand,
        output: Format,
        launches: usize,
    ) -> Result<(Tensor, f64), ComputeError> {
        let Some(choice) = kernel_of(unit, x.codes.format(), w.codes.format()) else {
            return Err(ComputeError::Recipe(format!(
                "no GPU kernel adds {} products as this unit does; leave `--on gpu` out",
                unit.products()
            )));
        };
        let job = Job { unit, schedule, x, w, output };
        let (mut y, seconds) = self.gpu.with("an emulated product", |state| {
            self.on_device(&state.stream.clone(), &job, &choice, launches)
        })?;
        job.repair(&mut y)?;
        Ok((y, seconds))
    }

    fn on_device(
        &self,
        stream: &Arc<CudaStream>,
        job: &Job<'_>,
        choice: &Choice,
        launches: usize,
    ) -> Result<(Tensor, f64), DeviceError> {
        let Job { x, w, .. } = *job;
        let (rows, outputs) = (x.codes.rows(), w.codes.rows());
        let (x_values, w_values) = (self.decoded(stream, x)?, self.decoded(stream, w)?);
        let by_block = job.by_block();
        let (x_scales, w_scales) = (
            stream.clone_htod(&scales_of(x, by_block))?,
            stream.clone_htod(&scales_of(w, by_block))?,
        );
        let mut y = stream.alloc_zeros::<f32>(rows * outputs)?;
        let emulated = job.emulated();
        let config = match choice.tile_outputs {
            0 => striding((rows * outputs) as u64),
            tile => LaunchConfig {
                grid_dim: (outputs.div_ceil(tile) as u32, rows.div_ceil(TILE_ROWS) as u32, 1),
                block_dim: (THREADS, 1, 1),
                shared_mem_bytes: 0,
            },
        };
        let function = self.function(choice.kernel)?;
        let mut seconds = 0.0;
        for _ in 0..launches {
            stream.synchronize()?;
            let started = Instant::now();
            let mut launch = stream.launch_builder(function);
            launch.arg(&emulated).arg(&x_values).arg(&w_values);
            launch.arg(&x_scales).arg(&w_scales).arg(&mut y);
            // SAFETY: the arguments are those of the kernel, in its order and of its types; the
            // operands hold `rows` and `outputs` rows of `width` values, the scales one for each
            // row and block where they are read, and `y` the `rows * outputs` that are written.
            unsafe { launch.launch(config) }?;
            stream.synchronize()?;
            seconds = started.elapsed().as_secs_f64();
        }
        let granularity = |operand: &Operand| i32::from(matches!(operand.scales, Scales::Row(_)));
        let (x_granularity, w_granularity) = (granularity(x), granularity(w));
        let (scaled, output) = (i32::from(!by_block), job.output.number());
        let epilogue = match job.schedule.epilogue {
            Epilogue::ScalesFirst => 0i32,
            Epilogue::ActivationThenWeight => 1,
            Epilogue::WeightThenActivation => 2,
        };
        let (n, m) = (rows as u64, outputs as u64);
        let mut launch = stream.launch_builder(self.function("finish_emulated")?);
        launch.arg(&mut y).arg(&n).arg(&m).arg(&scaled);
        launch.arg(&x_scales).arg(&x_granularity).arg(&w_scales).arg(&w_granularity);
        launch.arg(&epilogue).arg(&output);
        // SAFETY: as above; there is a scale for each row, or one.
        unsafe { launch.launch(striding(n * m)) }?;
        let values = stream.clone_dtoh(&y)?;
        stream.synchronize()?;
        Ok((Tensor::new(outputs, values), seconds))
    }

    /// An operand's values.
    fn decoded(
        &self,
        stream: &Arc<CudaStream>,
        operand: &Operand,
    ) -> Result<CudaSlice<f32>, DeviceError> {
        let codes = stream.clone_htod(&bytes_of(operand.codes))?;
        let count = (operand.codes.rows() * operand.codes.width()) as u64;
        let mut values = stream.alloc_zeros::<f32>(count as usize)?;
        let format = operand.codes.format().number();
        let mut launch = stream.launch_builder(self.function("decode_operand")?);
        launch.arg(&codes).arg(&format).arg(&count).arg(&mut values);
        // SAFETY: the arguments are those of the kernel, in its order and of its types; `codes`
        // holds `count` codes of the format, and `values` as many values.
        unsafe { launch.launch(striding(count)) }?;
        Ok(values)
    }
}

fn striding(elements: u64) -> LaunchConfig {
    let blocks = elements.div_ceil(256).clamp(1, 1 << 16) as u32;
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 }
}

/// One product.
#[derive(Clone, Copy)]
struct Job<'a> {
    unit: &'a Unit,
    schedule: &'a Schedule,
    x: &'a Operand<'a>,
    w: &'a Operand<'a>,
    output: Format,
}

impl Job<'_> {
    fn by_block(&self) -> bool {
        let by_block = |operand: &Operand| matches!(operand.scales, Scales::Block128 { .. });
        by_block(self.x) || by_block(self.w)
    }

    fn emulated(&self) -> Emulated {
        let width = self.x.codes.width();
        let steps = if self.by_block() {
            Schedule::PROMOTED.steps(width, Format::E4m3)
        } else {
            self.schedule.steps(width, self.x.codes.format())
        };
        let stretch = steps.first().map_or(width, |step| step.inner.len());
        let part = steps.iter().find(|step| step.then == Then::EndPart);
        let (alignment_bits, result_bits, exponent_floor) = match self.unit {
            Unit::TensorCore(core) => {
                (core.alignment_bits as i32, core.result_bits as i32, core.exponent_floor)
            }
            Unit::SequentialFma | Unit::BlockScaled(_) | Unit::MatrixCore(_) | Unit::Integers => {
                (0, 0, 0)
            }
        };
        Emulated {
            rows: self.x.codes.rows() as u64,
            outputs: self.w.codes.rows() as u64,
            width: width as u64,
            stretch: stretch as u64,
            part: part.map_or(width, |step| step.inner.end) as u64,
            alignment_bits,
            result_bits,
            exponent_floor,
            x_least: self.x.codes.format().min_exponent(),
            w_least: self.w.codes.format().min_exponent(),
            by_block: i32::from(self.by_block()),
        }
    }

    /// Computes again what the kernels do not handle: the outputs of rows with a NaN or an
    /// infinity, and rows in which a NaN came up.
    fn repair(&self, y: &mut Tensor) -> Result<(), ComputeError> {
        if *self.unit == Unit::SequentialFma {
            return Ok(());
        }
        let special = |codes: &Codes, row: usize| {
            codes.row(row).iter().any(|code| !codes.format().decode(code).is_finite())
        };
        let nan = |y: &Tensor, row: usize| y.row(row).iter().any(|value| value.is_nan());
        let rows: Vec<usize> = (0..self.x.codes.rows())
            .into_par_iter()
            .filter(|&row| special(self.x.codes, row) || nan(y, row))
            .collect();
        let columns: Vec<usize> = (0..self.w.codes.rows())
            .into_par_iter()
            .filter(|&row| special(self.w.codes, row))
            .collect();
        let Job { unit, schedule, x, w, output } = *self;
        if !columns.is_empty() {
            let again = on_cpu(unit, schedule, x, w, output, &columns)?;
            for row in 0..y.rows() {
                for (&column, &value) in columns.iter().zip(again.row(row)) {
                    y.row_mut(row)[column] = value;
                }
            }
        }
        if !rows.is_empty() {
            let codes = x.codes.select_rows(&rows);
            let x = Operand { codes: &codes, scales: selected(x, &rows) };
            let again = gemm(unit, schedule, &x, w, output)?;
            for (place, &row) in rows.iter().enumerate() {
                y.row_mut(row).copy_from_slice(again.row(place));
            }
        }
        Ok(())
    }
}

/// The outputs of some rows of w, by the definition; it refuses what cannot be computed.
fn on_cpu(
    unit: &Unit,
    schedule: &Schedule,
    x: &Operand,
    w: &Operand,
    output: Format,
    rows: &[usize],
) -> Result<Tensor, ComputeError> {
    check_scale_count("w", w.codes, &w.scales)?;
    check_scale_count("x", x.codes, &x.scales)?;
    let codes = w.codes.select_rows(rows);
    let w = Operand { codes: &codes, scales: selected(w, rows) };
    Ok(gemm(unit, schedule, x, &w, output)?)
}

/// The scales of some rows.
fn selected(operand: &Operand, rows: &[usize]) -> Scales {
    match &operand.scales {
        Scales::Tensor(scale) => Scales::Tensor(*scale),
        Scales::Row(scales) => Scales::Row(rows.iter().map(|&row| scales[row]).collect()),
        scales @ Scales::Block128 { .. } => {
            let width = operand.codes.width();
            let blocks = 0..width.div_ceil(SCALE_BLOCK);
            let of = |&row: &usize| {
                blocks.clone().map(move |block| scales.at(row, block * SCALE_BLOCK, width))
            };
            let scales = rows.iter().flat_map(of).collect();
            Scales::Block128 { rows_per_block: 1, first_row: 0, scales }
        }
        Scales::Blocks(scales) => Scales::Blocks(scales.select_rows(rows)),
    }
}

/// The scales as a kernel reads them: one, one for each row, or one for each row and block of K.
fn scales_of(operand: &Operand, by_block: bool) -> Vec<f32> {
    let (rows, width) = (operand.codes.rows(), operand.codes.width());
    match &operand.scales {
        scales if by_block => {
            let blocks = width.div_ceil(SCALE_BLOCK);
            let of = |row: usize| {
                (0..blocks).map(move |block| scales.at(row, block * SCALE_BLOCK, width))
            };
            (0..rows).flat_map(of).collect()
        }
        Scales::Tensor(scale) => vec![*scale],
        Scales::Row(scales) | Scales::Block128 { scales, .. } => scales.clone(),
        // No kernel computes such a unit.
        Scales::Blocks(scales) => vec![scales.whole],
    }
}

/// Some columns of a result.
fn columns_of(y: &Tensor, columns: &[usize]) -> Tensor {
    let rows = (0..y.rows()).flat_map(|row| columns.iter().map(move |&at| y.row(row)[at]));
    Tensor::new(columns.len(), rows.collect())
}

/// What [`gemm`] returns, to the bit, by this machine's first GPU: outputs of some rows of w are
/// computed by the CPU too.
///
/// # Errors
/// As [`gemm`]; if there is no GPU, if it fails, or if it returns other bits.
pub fn emulated_product(
    unit: &Unit,
    schedule: &Schedule,
    x: &Operand,
    w: &Operand,
    output: Format,
) -> Result<Tensor, ComputeError> {
    Emulation::open(first_gpu(None)?, None)?.product(unit, schedule, x, w, output)
}

fn first_gpu(programs: Option<&Path>) -> Result<&'static Arc<Gpu>, ComputeError> {
    let gpus = gpus(programs).map_err(|problem| ComputeError::Recipe(problem.clone()))?;
    gpus.first().ok_or_else(|| ComputeError::Recipe("no CUDA device".to_owned()))
}

/// N, M, K of products of which all outputs are compared: odd ones, of rows and of K.
const SMALL: [[usize; 3]; 3] = [[1, 1, 1], [3, 65, 200], [70, 130, 1000]];
/// N, M, K of a large one, of which some outputs are compared, and which is timed.
const LARGE: [usize; 3] = [1024, 4096, 4096];

/// Puts a value into the middle of a row.
fn set(codes: &mut Codes, row: usize, value: f32) {
    let (code, middle) = (codes.format().encode(value), codes.width() / 2);
    match codes.row_mut(row) {
        CodesRowMut::Bits8(codes) => codes[middle] = code as u8,
        CodesRowMut::Bits16(codes) => codes[middle] = code as u16,
        CodesRowMut::Bits32(codes) => codes[middle] = code,
    }
}

/// The schedules that are tried of a format.
fn schedules(format: Format) -> Vec<Schedule> {
    let mut all = vec![Schedule::FAST, Schedule::FAST.with_split_k(3)];
    if format.is_fp8() {
        all.extend([Schedule::PROMOTED, Schedule::PROMOTED.with_split_k(2)]);
    }
    all
}

/// Holds the emulation of every chip, format and kind of schedule on this machine's first GPU to
/// the CPU's bits.
///
/// # Errors
/// If there is no GPU, or if it fails.
pub fn measure_emulation(
    programs: Option<&Path>,
    mut report: impl FnMut(MeasuredEmulation),
) -> Result<(), ComputeError> {
    let emulation = Emulation::open(first_gpu(programs)?, programs)?;
    // Chips that share a unit are computed once.
    let mut seen: Vec<(Unit, Format, Format)> = Vec::new();
    for chip in &CHIPS {
        for x in Format::ALL {
            for w in Format::ALL {
                let Some(unit) = chip.unit(x, w) else { continue };
                if seen.contains(&(*unit, x, w)) || kernel_of(unit, x, w).is_none() {
                    continue;
                }
                seen.push((*unit, x, w));
                let mut found = MeasuredEmulation {
                    chip: chip.name,
                    formats: [x, w],
                    products: unit.products(),
                    compared: 0,
                    differing: 0,
                    seconds: 0.0,
                    multiply_adds: LARGE.iter().map(|&side| side as f64).product(),
                };
                emulation.measure(unit, [x, w], &mut found)?;
                report(found);
            }
        }
    }
    Ok(())
}

impl Emulation {
    fn measure(
        &self,
        unit: &Unit,
        [x, w]: [Format; 2],
        found: &mut MeasuredEmulation,
    ) -> Result<(), ComputeError> {
        for (number, shape) in SMALL.into_iter().chain([LARGE]).enumerate() {
            let [tokens, outputs, inner] = shape;
            let kinds = if shape == LARGE {
                vec![Values::Bell]
            } else {
                vec![Values::Bell, Values::Spread, Values::Codes]
            };
            for values in kinds {
                let all = |rows: usize| (0..rows).collect::<Vec<usize>>();
                let seed = number as u64;
                let mut x_codes = codes_of(x, values, seed, &all(tokens), inner)?;
                let mut w_codes = codes_of(w, values, seed + 100, &all(outputs), inner)?;
                if shape == SMALL[1] {
                    set(&mut x_codes, 1, f32::NAN);
                    set(&mut w_codes, 20, f32::INFINITY);
                }
                for (place, schedule) in schedules(x).into_iter().enumerate() {
                    if shape == LARGE && place > 0 {
                        continue;
                    }
                    let scaled = x.is_fp8();
                    let scales = |rows: usize| match (scaled, place) {
                        (false, _) => Scales::Tensor(1.0),
                        (true, 1) => {
                            Scales::Row((0..rows).map(|row| 0.01 + 0.003 * row as f32).collect())
                        }
                        (true, _) => Scales::Tensor(0.013),
                    };
                    let x = Operand { codes: &x_codes, scales: scales(tokens) };
                    let w = Operand { codes: &w_codes, scales: scales(outputs) };
                    let output = if place == 0 { Format::F32 } else { Format::Bf16 };
                    self.compare(unit, &schedule, &x, &w, output, shape == LARGE, found)?;
                }
                if x.is_fp8() && shape != LARGE {
                    let block = |rows: usize, rows_per_block: usize| {
                        let count = rows.div_ceil(rows_per_block) * inner.div_ceil(SCALE_BLOCK);
                        let scales = (0..count).map(|at| 0.01 + 0.0007 * at as f32).collect();
                        Scales::Block128 { rows_per_block, first_row: 0, scales }
                    };
                    let x = Operand { codes: &x_codes, scales: block(tokens, 1) };
                    let w = Operand { codes: &w_codes, scales: block(outputs, 128) };
                    let schedule = Schedule::PROMOTED;
                    self.compare(unit, &schedule, &x, &w, Format::F32, false, found)?;
                }
            }
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "a product, and how it is looked at")]
    fn compare(
        &self,
        unit: &Unit,
        schedule: &Schedule,
        x: &Operand,
        w: &Operand,
        output: Format,
        large: bool,
        found: &mut MeasuredEmulation,
    ) -> Result<(), ComputeError> {
        let rows = spread(w.codes.rows(), if large { SAMPLED } else { usize::MAX });
        let expected = on_cpu(unit, schedule, x, w, output, &rows)?;
        let (y, seconds) = self.timed(unit, schedule, x, w, output, if large { 3 } else { 1 })?;
        found.compared += expected.data().len();
        found.differing += mismatches(&expected, &columns_of(&y, &rows));
        if large {
            found.seconds = seconds;
        }
        Ok(())
    }
}
