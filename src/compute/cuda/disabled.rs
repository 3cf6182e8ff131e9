//! The same questions as in `enabled.rs`, where the runner was built without CUDA.

use std::path::Path;
use std::sync::OnceLock;

use super::{
    Measured, MeasuredEmulation, MeasuredFunction, MeasuredReference, Piece, Survey, Trial,
};
use crate::compute::emulated::arm::Emulated;
use crate::compute::emulated::chip::Unit;
use crate::compute::emulated::gemm::Operand;
use crate::compute::emulated::schedule::Schedule;
use crate::compute::sweep::{Answer, Library, OrderTable, Question};
use crate::compute::{ComputeError, Pass};
use crate::dtype::Format;
use crate::op::{ChipName, Recipe};
use crate::tensor::Tensor;

const WHY: &str = "built without the feature `cuda`";

/// Why no device arm can compute a recipe here.
pub fn why_unavailable(_: &Recipe, _: Option<&Path>) -> Option<String> {
    Some(WHY.to_owned())
}

/// The device arm of a recipe.
///
/// # Errors
/// Always.
pub fn ops(_: &Recipe, _: Option<&Path>) -> Result<(Box<dyn Pass>, String), ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// Why the reference's products cannot be computed on a GPU here.
pub fn why_no_reference(_: Option<&Path>) -> Option<String> {
    Some(WHY.to_owned())
}

/// The reference with its products on a GPU.
///
/// # Errors
/// Always.
pub fn reference_ops(_: Option<&Path>) -> Result<(Box<dyn Pass>, String), ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// The emulated arm with its products on a GPU.
///
/// # Errors
/// Always.
pub fn emulated_ops(
    _: Emulated,
    _: Option<&Path>,
) -> Result<(Box<dyn Pass>, String), ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// Holds the reference's product to the CPU's bits.
///
/// # Errors
/// Always.
pub fn measure_reference(
    _: [usize; 3],
    _: Option<&Path>,
) -> Result<MeasuredReference, ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// This machine's GPU and its library: there is none.
pub enum SweptLibrary {}

impl SweptLibrary {
    /// Opens it.
    ///
    /// # Errors
    /// Always.
    pub fn open(_: Option<&Path>) -> Result<SweptLibrary, ComputeError> {
        Err(ComputeError::Recipe(WHY.to_owned()))
    }

    /// The GPU's name.
    pub fn gpu(&self) -> String {
        match *self {}
    }

    /// The library's version.
    pub fn version(&self) -> String {
        match *self {}
    }

    /// The orders of all algorithms on offer.
    ///
    /// # Errors
    /// Never: there is no such library.
    pub fn tables(&self, _: Format) -> Result<Vec<OrderTable>, ComputeError> {
        match *self {}
    }
}

impl Library for SweptLibrary {
    fn answer(
        &mut self,
        _: &Question,
        _: &[usize],
        _: &[usize],
    ) -> Result<Option<Answer>, ComputeError> {
        match *self {}
    }

    fn unit(&self, _: Format) -> Result<Unit, ComputeError> {
        match *self {}
    }
}

/// A product as a chip computes it, by this machine's GPU.
///
/// # Errors
/// Always.
pub fn emulated_product(
    _: &Unit,
    _: &Schedule,
    _: &Operand,
    _: &Operand,
    _: Format,
) -> Result<Tensor, ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// Holds the emulation on a GPU to the CPU's bits.
///
/// # Errors
/// Always.
pub fn measure_emulation(
    _: Option<&Path>,
    _: impl FnMut(MeasuredEmulation),
) -> Result<(), ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// The chip of this machine's first GPU.
pub fn chip_here(_: Option<&Path>) -> Option<ChipName> {
    None
}

/// What the device arm's results depend on.
pub fn facts(_: &Recipe, _: Option<&Path>) -> Vec<(String, String)> {
    Vec::new()
}

/// Measures every algorithm that is offered for a trial.
///
/// # Errors
/// Always.
pub fn measure(_: &Trial, _: Option<&Path>) -> Result<Vec<Measured>, ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// Measures every function of one number.
///
/// # Errors
/// Always.
pub fn measure_functions(
    _: u32,
    _: Option<&Path>,
    _: impl FnMut(MeasuredFunction),
) -> Result<(), ComputeError> {
    Err(ComputeError::Recipe(WHY.to_owned()))
}

/// What this machine has.
pub fn survey() -> &'static Survey {
    static SURVEY: OnceLock<Survey> = OnceLock::new();
    SURVEY.get_or_init(|| {
        let piece = Piece { name: "CUDA".to_owned(), state: Err(WHY.to_owned()) };
        Survey { pieces: vec![piece], gpus: Vec::new() }
    })
}
