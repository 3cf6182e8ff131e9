//! The door to the GPUs: what this machine has, and the device arm.
//!
//! The room behind it holds all `unsafe` of the device arm. Without the feature
//! `cuda` a sibling answers every question with an honest no. Nothing here
//! panics where a library, a driver or a GPU is missing.

use serde::{Deserialize, Serialize};

use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
use crate::op::{Accumulate, ChipName};

#[cfg(feature = "cuda")]
mod arm;
#[cfg(feature = "cuda")]
mod cublaslt;
#[cfg(feature = "cuda")]
mod emulated;
#[cfg(feature = "cuda")]
pub mod emulation;
#[cfg(feature = "cuda")]
pub mod functions;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod kernels;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(feature = "cuda")]
mod probe;
#[cfg(feature = "cuda")]
pub mod program;
#[cfg(feature = "cuda")]
mod reference;
#[cfg(feature = "cuda")]
mod remembered;
#[cfg(feature = "cuda")]
mod staging;
#[cfg(feature = "cuda")]
pub mod sweep;
#[cfg(feature = "cuda")]
mod weights;

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(feature = "cuda")]
mod enabled;

#[cfg(not(feature = "cuda"))]
pub use disabled::{
    SweptLibrary, chip_here, emulated_ops, emulated_product, facts, measure, measure_emulation,
    measure_functions, measure_reference, ops, reference_ops, survey, why_no_reference,
    why_unavailable,
};
#[cfg(feature = "cuda")]
pub use emulation::{emulated_product, measure_emulation};
#[cfg(feature = "cuda")]
pub use enabled::{
    chip_here, emulated_ops, facts, ops, reference_ops, survey, why_no_reference, why_unavailable,
};
#[cfg(feature = "cuda")]
pub use functions::measure_functions;
#[cfg(feature = "cuda")]
pub use probe::measure;
#[cfg(feature = "cuda")]
pub use reference::measure_reference;
#[cfg(feature = "cuda")]
pub use sweep::SweptLibrary;

/// What this machine has for a device arm, and what each missing piece switches off.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Survey {
    /// The pieces that the device arm stands on, in the order in which it needs them.
    pub pieces: Vec<Piece>,
    /// The GPUs that the driver sees.
    pub gpus: Vec<GpuFacts>,
}

/// One piece: the driver, a library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Its name.
    pub name: String,
    /// Its version and its file, or what is wrong with it.
    pub state: Result<String, String>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuFacts {
    /// Its number, as the driver counts.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability, such as (9, 0).
    pub capability: (i32, i32),
    /// The chip, where its arithmetic is known.
    pub chip: Option<ChipName>,
    /// Its memory, in bytes.
    pub memory: usize,
    /// Which one it is: `GPU-` and the driver's UUID, as `nvidia-smi -L` prints it.
    pub uuid: String,
}

/// A product that is to be measured on this machine's GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Format of both operands.
    pub operands: Format,
    /// Format of the result.
    pub output: Format,
    /// Fast or promoted accumulation; FP8 only.
    pub accumulate: Accumulate,
    /// N, M, K: multiples of 16.
    pub shape: [usize; 3],
}

/// One algorithm's result.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The algorithm, in the library's numbers.
    pub algorithm: String,
    /// Whether it is the one that the device arm would use.
    pub chosen: bool,
    /// The schedule that it declares.
    pub declared: Schedule,
    /// Sampled outputs whose bits differ from the declared schedule's.
    pub mismatches: usize,
    /// Sampled outputs.
    pub sampled: usize,
    /// Another schedule that explains every bit, where the declared one does not.
    pub identified: Option<String>,
    /// Median time of a product, in seconds.
    pub seconds: f64,
}

/// The reference's product on this machine's GPU, held to the CPU's.
#[derive(Clone, Copy, Debug, Default)]
pub struct MeasuredReference {
    /// Outputs that were compared.
    pub compared: usize,
    /// Those whose bits differ.
    pub differing: usize,
    /// The time of a product, in seconds.
    pub seconds: f64,
}

/// The emulation of one unit on this machine's GPU, held to the CPU's.
#[derive(Clone, Copy, Debug)]
pub struct MeasuredEmulation {
    /// The first chip that has the unit.
    pub chip: ChipName,
    /// Formats of x and of w.
    pub formats: [Format; 2],
    /// Products that are added at once.
    pub products: usize,
    /// Outputs that were compared.
    pub compared: usize,
    /// Those whose bits differ.
    pub differing: usize,
    /// Time of the large product, in seconds, without what is brought to the GPU and back.
    pub seconds: f64,
    /// Multiply-adds of the large product.
    pub multiply_adds: f64,
}

/// A function of one number, as this machine's GPU computes it.
#[derive(Clone, Copy, Debug)]
pub struct MeasuredFunction {
    /// Its name: an instruction of PTX, or a function of CUDA's math library.
    pub name: &'static str,
    /// Inputs that were compared.
    pub compared: u64,
    /// Those whose results differ in their bits from the prediction.
    pub differing: u64,
    /// The first of them.
    pub first: Option<Differs>,
}

/// A result that is not the predicted one.
#[derive(Clone, Copy, Debug)]
pub struct Differs {
    /// The function's operand.
    pub input: f32,
    /// What it should return.
    pub expected: f32,
    /// What the GPU returned.
    pub observed: f32,
}
