//! The steps of a GEMM as data: what happens to each operand after its conversion, in which
//! order the products are added, and what is written. With none replaced they are what a recipe
//! prescribes.

use super::gemm::Scales;
use super::quantize::Codes;
use super::schedule::Schedule;
use crate::dtype::Format;
use crate::op::Recipe;

/// An operand after its conversion.
pub struct Converted<'v> {
    /// The values that were converted, row-major.
    pub values: &'v [f32],
    /// Their codes.
    pub codes: Codes,
    /// What the codes are multiplied with.
    pub scales: Scales,
    /// The first of these rows within the matrix that the scales are of.
    pub first_row: usize,
    /// The first of its elements of K within the whole operand's.
    pub first_inner: usize,
}

/// A whole operand after its conversion: codes, scales, and how many rows stand before its own
/// because they share its blocks.
pub type Whole = (Codes, Scales, usize);

/// What is done to an operand after its conversion.
pub type Edit<'e> = dyn Fn(Converted<'_>) -> Converted<'_> + Sync + 'e;

/// Leaves an operand as it is.
pub fn keep(operand: Converted<'_>) -> Converted<'_> {
    operand
}

/// A GEMM's steps. [`Steps::of`] is what the recipe prescribes.
pub struct Steps<'e> {
    /// After the activation's conversion.
    pub x: &'e Edit<'e>,
    /// After the conversion of some rows of the weight.
    pub w: &'e Edit<'e>,
    /// The order of additions.
    pub schedule: Schedule,
    /// The output's type.
    pub output: Format,
}

impl Steps<'_> {
    /// The steps of a recipe, none replaced.
    pub fn of(recipe: &Recipe) -> Steps<'static> {
        Steps { x: &keep, w: &keep, schedule: Schedule::of(recipe), output: recipe.output }
    }
}
