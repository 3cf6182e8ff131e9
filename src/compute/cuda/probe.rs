//! This machine's GPU held to its chip's arithmetic, algorithm by algorithm.
//!
//! For a format and a shape, every algorithm that cuBLASLt offers multiplies the
//! same seeded operands; a sample of its outputs is compared in every bit with
//! what the chip must return under the schedule that the algorithm declares. It is
//! how a new library, driver or chip is looked at before anybody believes it.

use std::path::Path;

use cudarc::driver::{CudaSlice, sys};
use rayon::prelude::*;

use super::cublaslt::{Algorithm, Operands, STREAM_K, Spec};
use super::enabled::{gpus, unit_here};
use super::gpu::{DeviceError, Gpu, State};
use super::{Measured, Trial};
use crate::compute::ComputeError;
use crate::compute::emulated::gemm::{self, Scales};
use crate::compute::emulated::identify::{identify, mismatches, spread};
use crate::compute::emulated::quantize::{CodeData, Codes, absmax, scale_for};
use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
use crate::op::{Accumulate, Pin};
use crate::tensor::Tensor;

/// Rows of x and of w whose products are compared.
const SAMPLE: (usize, usize) = (4, 64);
/// Products that are timed one by one.
const REPEATS: usize = 15;

/// Measures every algorithm that is offered for a trial, the favourite first.
///
/// # Errors
/// If there is no GPU, or if it fails.
pub fn measure(trial: &Trial, programs: Option<&Path>) -> Result<Vec<Measured>, ComputeError> {
    let gpus = gpus(programs).map_err(|problem| ComputeError::Recipe(problem.clone()))?;
    let gpu = gpus.first().ok_or_else(|| ComputeError::Recipe("no CUDA device".to_owned()))?;
    let unit = unit_here(&gpu.facts, trial.operands).ok_or_else(|| {
        ComputeError::Recipe(format!("{} has no {} unit", gpu.facts.name, trial.operands))
    })?;
    let [tokens, outputs, inner] = trial.shape;
    let x = Seeded::new(trial.operands, tokens, inner, 1);
    let w = Seeded::new(trial.operands, outputs, inner, 2);
    let measured = on_device(gpu, trial, &x, &w)?;
    let (rows, columns) = (spread(tokens, SAMPLE.0), spread(outputs, SAMPLE.1));
    let (x_codes, w_codes) = (x.codes.select_rows(&rows), w.codes.select_rows(&columns));
    // Of integers the sums are compared, which the library does not scale.
    let sums = trial.operands == Format::Int8;
    let scale = |scale: f32| Scales::Tensor(if sums { 1.0 } else { scale });
    let x = gemm::Operand { codes: &x_codes, scales: scale(x.scale) };
    let w = gemm::Operand { codes: &w_codes, scales: scale(w.scale) };
    measured
        .into_iter()
        .map(|raw| {
            let observed = sample(&raw.rows, &columns);
            let accumulate =
                if trial.operands.is_fp8() { trial.accumulate } else { Accumulate::Fast };
            let declared = Schedule { accumulate, ..Schedule::FAST };
            let parts = if raw.algorithm.split_k == STREAM_K { 1 } else { raw.algorithm.split_k };
            let declared = declared.with_split_k(parts);
            let expected = gemm::gemm(&unit, &declared, &x, &w, trial.output)?;
            let differing = mismatches(&expected, &observed);
            let identified = match differing {
                0 => None,
                _ => Some(identify(&unit, &x, &w, trial.output, &observed)?.to_string()),
            };
            Ok(Measured {
                algorithm: raw.algorithm.to_string(),
                chosen: raw.chosen,
                declared,
                mismatches: differing,
                sampled: observed.data().len(),
                identified,
                seconds: raw.seconds,
            })
        })
        .collect()
}

/// What one algorithm did: sampled rows of its result, and its time.
struct Raw {
    algorithm: Algorithm,
    chosen: bool,
    rows: Vec<Vec<f32>>,
    seconds: f64,
}

fn on_device(gpu: &Gpu, trial: &Trial, x: &Seeded, w: &Seeded) -> Result<Vec<Raw>, ComputeError> {
    let [tokens, outputs, inner] = trial.shape;
    let scaled = trial.operands.is_fp8();
    let spec = Spec {
        operands: trial.operands,
        output: if trial.operands == Format::Int8 { Format::Int8 } else { trial.output },
        tokens,
        outputs,
        inner,
        stride: inner,
        x_stride: inner,
        fast: trial.accumulate == Accumulate::Fast,
        scaled,
    };
    gpu.with("a measured product", |state| {
        let (x_codes, w_codes) = (upload(state, &x.codes)?, upload(state, &w.codes)?);
        let x_scale = state.stream.clone_htod(&[x.scale])?;
        let w_scale = state.stream.clone_htod(&[w.scale])?;
        let scales = scaled.then_some((&w_scale, &x_scale));
        let operands = Operands { w: &w_codes, x: &x_codes, skip: 0, x_skip: 0, scales };
        let stream = state.stream.clone();
        let chosen = state.library.choose(&stream, &spec, &operands, &Pin::NONE)?;
        let mut algorithms = vec![chosen];
        for algorithm in state.library.algorithms(&stream, &spec, &operands, true)? {
            if algorithm.to_string() != chosen.to_string() {
                algorithms.push(algorithm);
            }
        }
        let mut y = stream.alloc_zeros::<u8>(tokens * outputs * spec.output_bytes())?;
        let mut all = Vec::new();
        for (index, algorithm) in algorithms.into_iter().enumerate() {
            let seconds = time(state, &spec, &operands, &algorithm, &mut y)?;
            let row_bytes = outputs * spec.output_bytes();
            let rows: Result<Vec<Vec<f32>>, DeviceError> = spread(tokens, SAMPLE.0)
                .into_iter()
                .map(|row| {
                    let bytes = y.slice(row * row_bytes..(row + 1) * row_bytes);
                    let bytes = stream.clone_dtoh(&bytes)?;
                    Ok(match spec.output {
                        Format::Int8 => rounded_sums(&bytes),
                        output => decode(output, &bytes),
                    })
                })
                .collect();
            stream.synchronize()?;
            all.push(Raw { algorithm, chosen: index == 0, rows: rows?, seconds });
        }
        Ok(all)
    })
}

/// The median time of a product.
fn time(
    state: &mut State,
    spec: &Spec,
    operands: &Operands<'_>,
    algorithm: &Algorithm,
    y: &mut CudaSlice<u8>,
) -> Result<f64, DeviceError> {
    let stream = state.stream.clone();
    for _ in 0..3 {
        state.library.multiply(&stream, spec, operands, algorithm, y)?;
    }
    let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
    let mut times = Vec::with_capacity(REPEATS);
    for _ in 0..REPEATS {
        let start = stream.record_event(Some(timed))?;
        state.library.multiply(&stream, spec, operands, algorithm, y)?;
        let end = stream.record_event(Some(timed))?;
        end.synchronize()?;
        times.push(f64::from(start.elapsed_ms(&end)?) / 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}

/// Seeded operands: normal values, converted with one scale.
struct Seeded {
    codes: Codes,
    scale: f32,
}

impl Seeded {
    fn new(format: Format, rows: usize, width: usize, seed: u64) -> Seeded {
        let mut values = vec![0.0f32; rows * width];
        values.par_chunks_mut(width).enumerate().for_each(|(row, values)| {
            let mut state = (seed << 32 | row as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut uniform = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32 / (1u64 << 24) as f32
            };
            for value in values {
                // Twelve uniform numbers less six are nearly normal (Irwin and Hall).
                *value = (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
            }
        });
        let scale = scale_for(format, absmax(&values));
        let mut codes = Codes::zeros(format, rows, width);
        let rows = codes.rows_mut();
        rows.into_par_iter().zip(values.par_chunks(width)).for_each(|(mut codes, values)| {
            crate::compute::emulated::quantize::quantize_row(format, values, scale, &mut codes);
        });
        Seeded { codes, scale }
    }
}

fn upload(state: &State, codes: &Codes) -> Result<CudaSlice<u8>, DeviceError> {
    Ok(state.stream.clone_htod(&bytes_of(codes))?)
}

/// Codes as a GPU holds them.
pub(super) fn bytes_of(codes: &Codes) -> Vec<u8> {
    match codes.data() {
        CodeData::Bits8(codes) => codes.clone(),
        CodeData::Bits16(codes) => codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
        CodeData::Bits32(codes) => codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
    }
}

/// Values of a format from their bytes.
pub(super) fn decode(format: Format, bytes: &[u8]) -> Vec<f32> {
    let code = |bytes: &[u8]| bytes.iter().rev().fold(0, |code, &byte| code << 8 | u32::from(byte));
    bytes.chunks_exact(format.bytes()).map(|bytes| format.decode(code(bytes))).collect()
}

/// Sums in 32 bits, each rounded to f32.
fn rounded_sums(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|sum| i32::from_le_bytes(*sum) as f32).collect()
}

/// The sampled columns of the sampled rows.
fn sample(rows: &[Vec<f32>], columns: &[usize]) -> Tensor {
    let values = rows.iter().flat_map(|row| columns.iter().map(|&column| row[column]));
    Tensor::new(columns.len(), values.collect())
}
