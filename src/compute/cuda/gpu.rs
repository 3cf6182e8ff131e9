//! One GPU: its context, its stream, its kernels, its library, its weights.
//!
//! Everything that runs on it goes through [`Gpu::with`], one piece of work at a
//! time; several arms share a GPU by taking turns. A GPU whose context died stays
//! refused: its results could no longer be trusted.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use super::cublaslt::{Algorithm, Library, Spec};
use super::kernels::Kernels;
use super::weights::Weights;
use super::{GpuFacts, program};
use crate::compute::ComputeError;
use crate::model::ModelError;
use crate::op::Pin;

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver.
    #[error("{0}")]
    Driver(#[from] DriverError),
    /// The GEMM library.
    #[error("{0}")]
    Library(String),
    /// Something that the device arm does not do.
    #[error("{0}")]
    Refused(String),
    /// The model's file.
    #[error("{0}")]
    Model(#[from] ModelError),
}

/// A GPU that can compute.
pub struct Gpu {
    /// What it is.
    pub facts: GpuFacts,
    /// Arms that use it now.
    pub leases: AtomicUsize,
    state: Mutex<State>,
}

/// What belongs to a GPU while work is done on it.
pub struct State {
    /// Keeps the GPU's context alive.
    pub context: Arc<CudaContext>,
    /// The one stream: work on a GPU is in order.
    pub stream: Arc<CudaStream>,
    /// The compiled kernels.
    pub kernels: Kernels,
    /// cuBLASLt.
    pub library: Library,
    /// Converted weights.
    pub weights: Weights,
    /// The algorithm of each product met so far.
    pub algorithms: HashMap<(Spec, Pin), Algorithm>,
    lost: Option<String>,
}

impl Gpu {
    /// Takes hold of a GPU: compiles the kernels, opens the library.
    ///
    /// # Errors
    /// In words, if any of it fails.
    pub fn open(facts: GpuFacts, programs: Option<&Path>) -> Result<Gpu, String> {
        let compiled = program::compile(facts.capability, programs)?;
        let open = || {
            let context = CudaContext::new(facts.ordinal)?;
            let stream = context.new_stream()?;
            let kernels = Kernels::load(&context, compiled)?;
            let library = Library::open(&stream)?;
            let (free, _) = context.mem_get_info()?;
            Ok(State {
                weights: Weights::new(budget(free)),
                context,
                stream,
                kernels,
                library,
                algorithms: HashMap::new(),
                lost: None,
            })
        };
        let state = open().map_err(|error: DeviceError| match &error {
            DeviceError::Driver(DriverError(sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION)) => {
                format!(
                    "the driver is older than NVRTC {:?}; update the driver, or put an older \
                     libnvrtc first on the loader's path",
                    program::version().unwrap_or_default()
                )
            }
            _ => format!("GPU {} ({}) cannot be used: {error}", facts.ordinal, facts.name),
        })?;
        Ok(Gpu { facts, leases: AtomicUsize::new(0), state: Mutex::new(state) })
    }

    /// cuBLASLt's version.
    pub fn library_version(&self) -> usize {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).library.version
    }

    /// Does a piece of work on the GPU; `what` names it in errors. If memory runs
    /// out, weights that are kept are given up and it is tried once more.
    ///
    /// # Errors
    /// What happened and what to do.
    pub fn with<T>(
        &self,
        what: &str,
        mut work: impl FnMut(&mut State) -> Result<T, DeviceError>,
    ) -> Result<T, ComputeError> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let device = |problem: String| ComputeError::Device {
            gpu: format!("GPU {} ({})", self.facts.ordinal, self.facts.name),
            what: what.to_owned(),
            problem,
        };
        if let Some(reason) = &state.lost {
            return Err(device(format!("it was lost before: {reason}")));
        }
        let mut outcome = state.context.bind_to_thread().map_err(DeviceError::from);
        if outcome.is_ok() {
            match work(&mut state) {
                Ok(done) => return Ok(done),
                Err(error) if is_out_of_memory(&error) && state.weights.clear() > 0 => {
                    match state
                        .stream
                        .synchronize()
                        .map_err(Into::into)
                        .and_then(|()| work(&mut state))
                    {
                        Ok(done) => return Ok(done),
                        Err(error) => outcome = Err(error),
                    }
                }
                Err(error) => outcome = Err(error),
            }
        }
        match outcome {
            Err(DeviceError::Model(error)) => Err(error.into()),
            Err(error) if is_out_of_memory(&error) => Err(device(
                "out of device memory; end other programs on the GPU, shorten the prompt, or set \
                 RUNNER_GPU_MEMORY (bytes for weights) lower"
                    .to_owned(),
            )),
            Err(DeviceError::Driver(error)) => {
                if is_fatal(error) {
                    state.lost = Some(error.to_string());
                }
                Err(device(format!("{error}; nothing of it was kept")))
            }
            Err(error) => Err(device(error.to_string())),
            Ok(()) => Err(device("no work was done".to_owned())),
        }
    }

    /// Notes that an arm uses this GPU.
    pub fn lease(self: &Arc<Gpu>) -> Lease {
        self.leases.fetch_add(1, Ordering::Relaxed);
        Lease(Arc::clone(self))
    }
}

/// An arm's use of a GPU, until it is dropped.
pub struct Lease(Arc<Gpu>);

impl std::ops::Deref for Lease {
    type Target = Gpu;

    fn deref(&self) -> &Gpu {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.leases.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Bytes for weights: what `RUNNER_GPU_MEMORY` says, else four fifths of what is free.
fn budget(free: usize) -> usize {
    let asked = std::env::var("RUNNER_GPU_MEMORY").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(free / 5 * 4)
}

fn is_out_of_memory(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Driver(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)))
}

/// Errors after which a context answers nothing but the same error.
fn is_fatal(error: DriverError) -> bool {
    use sys::CUresult as Code;
    matches!(
        error.0,
        Code::CUDA_ERROR_ILLEGAL_ADDRESS
            | Code::CUDA_ERROR_LAUNCH_FAILED
            | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | Code::CUDA_ERROR_MISALIGNED_ADDRESS
            | Code::CUDA_ERROR_ASSERT
            | Code::CUDA_ERROR_LAUNCH_TIMEOUT
            | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
            | Code::CUDA_ERROR_ECC_UNCORRECTABLE
            | Code::CUDA_ERROR_DEINITIALIZED
            | Code::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | Code::CUDA_ERROR_SYSTEM_NOT_READY
    )
}
