//! This machine's GPU held to the functions of one number that engines' kernels are made of:
//! the special function unit's, and CUDA's math library's on top of it.
//!
//! The GPU's results come here and are compared bit by bit with what
//! `compute/engine_kernels/{sfu,cuda_math}.rs` predicts; any NaN equals any other.

use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use rayon::prelude::*;

use super::enabled::gpus;
use super::gpu::DeviceError;
use super::program;
use super::{Differs, MeasuredFunction};
use crate::compute::ComputeError;
use crate::compute::engine_kernels::{cuda_math, sfu};

/// Inputs of a launch.
const LAUNCH: u64 = 1 << 24;

/// A function's name, and what is predicted of it.
type Predicted = (&'static str, fn(f32) -> f32);

/// The functions, an instruction of PTX or one of CUDA's math library; `powf` comes after them.
const FUNCTIONS: [Predicted; 22] = [
    ("ex2.approx.ftz.f32", sfu::ex2_ftz),
    ("ex2.approx.f32", sfu::ex2),
    ("lg2.approx.ftz.f32", sfu::lg2_ftz),
    ("lg2.approx.f32", sfu::lg2),
    ("rcp.approx.ftz.f32", sfu::rcp_ftz),
    ("rcp.approx.f32", sfu::rcp),
    ("rsqrt.approx.ftz.f32", sfu::rsqrt_ftz),
    ("rsqrt.approx.f32", sfu::rsqrt),
    ("sqrt.approx.ftz.f32", sfu::sqrt_ftz),
    ("sqrt.approx.f32", sfu::sqrt),
    ("sin.approx.ftz.f32", sfu::sin_ftz),
    ("cos.approx.ftz.f32", sfu::cos_ftz),
    ("expf", cuda_math::exp),
    ("__expf", cuda_math::exp_fast),
    ("exp2f", cuda_math::exp2),
    ("logf", cuda_math::log),
    ("__logf", cuda_math::log_fast),
    ("log2f", cuda_math::log2),
    ("sinf", cuda_math::sin),
    ("cosf", cuda_math::cos),
    ("tanhf", cuda_math::tanh),
    ("erff", cuda_math::erf),
];

/// The kernel's source: the numbers of `which` are the places in `FUNCTIONS`.
pub fn source() -> String {
    let case = |(number, (name, _)): (usize, &Predicted)| match name.contains('.') {
        true => {
            format!("case {number}: asm(\"{name} %0, %1;\" : \"=f\"(y) : \"f\"(x)); return y;\n")
        }
        false => format!("case {number}: return {name}(x);\n"),
    };
    let cases: String = FUNCTIONS.iter().enumerate().map(case).collect();
    include_str!("kernels/functions.cu").replace("CASES", &cases)
}

/// Every function over every `step`-th of the 2^32 floats, in the order of their bits.
///
/// # Errors
/// If there is no GPU, if NVRTC is missing, or if the GPU fails.
pub fn measure_functions(
    step: u32,
    programs: Option<&Path>,
    mut report: impl FnMut(MeasuredFunction),
) -> Result<(), ComputeError> {
    let gpus = gpus(programs).map_err(|problem| ComputeError::Recipe(problem.clone()))?;
    let gpu = gpus.first().ok_or_else(|| ComputeError::Recipe("no CUDA device".to_owned()))?;
    let program =
        program::compile_usual(&source(), gpu.facts.capability).map_err(ComputeError::Recipe)?;
    let (stream, function) = gpu.with("the functions", |state| {
        let module = state.context.load_module(Ptx::from_src(&*program))?;
        Ok((state.context.new_stream()?, module.load_function("functions")?))
    })?;
    let step = u64::from(step.max(1));
    let inputs = (1u64 << 32).div_ceil(step);
    for which in 0..=FUNCTIONS.len() {
        let name = FUNCTIONS.get(which).map_or("powf", |(name, _)| name);
        let mut found = MeasuredFunction { name, compared: 0, differing: 0, first: None };
        for first in (0..inputs).step_by(LAUNCH as usize) {
            let count = LAUNCH.min(inputs - first);
            let theirs = gpu.with("a function", |_| {
                on_device(&stream, &function, which as i32, [first, step, count])
            })?;
            let (differing, example) = compared(which, first, step, &theirs);
            found.compared += theirs.len() as u64;
            found.differing += differing;
            found.first = found.first.or(example);
        }
        report(found);
    }
    Ok(())
}

fn on_device(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    which: i32,
    [first, step, count]: [u64; 3],
) -> Result<Vec<f32>, DeviceError> {
    let mut y = stream.alloc_zeros::<f32>(count as usize)?;
    let config = LaunchConfig {
        grid_dim: (count.div_ceil(256) as u32, 1, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    };
    let mut launch = stream.launch_builder(function);
    launch.arg(&mut y).arg(&which).arg(&first).arg(&step).arg(&count);
    // SAFETY: the arguments are those of the kernel, in its order and of its types, and `y` holds
    // the `count` values that it writes.
    unsafe { launch.launch(config) }?;
    let values = stream.clone_dtoh(&y)?;
    stream.synchronize()?;
    Ok(values)
}

/// How many results differ from the prediction, and the first of them.
fn compared(which: usize, first: u64, step: u64, theirs: &[f32]) -> (u64, Option<Differs>) {
    let differs = |index: usize| {
        let bits = ((first + index as u64) * step) as u32;
        let x = f32::from_bits(bits);
        let expected = match FUNCTIONS.get(which) {
            Some((_, function)) => function(x),
            None => {
                let drawn = bits.wrapping_mul(2_654_435_761) ^ bits >> 13;
                cuda_math::pow(x, drawn as i32 as f32 * (1.0 / 67_108_864.0))
            }
        };
        let observed = theirs[index];
        let same =
            expected.to_bits() == observed.to_bits() || expected.is_nan() && observed.is_nan();
        (!same).then_some(Differs { input: x, expected, observed })
    };
    let found: Vec<Differs> = (0..theirs.len()).into_par_iter().filter_map(differs).collect();
    (found.len() as u64, found.first().copied())
}
