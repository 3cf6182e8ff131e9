//! A recipe that takes the checkpoint's own codes: what it says of one weight.
//!
//! It knows which forms the project's own kernels multiply as they stand in a file. A weight of
//! FP8 codes, of 8-bit integers or of a block-scaled format is an operand with its scales; one of a plain float type is multiplied in that type;
//! every other form would have to be converted, and is refused by name.

use super::ComputeError;
use super::departure::BLOCK;
use crate::dtype::Format;
use crate::model::{HeldBlocks, HeldCodes, Weight, WeightType};
use crate::op::{Accumulate, ActivationScale, Codes, Recipe, Scale, WeightScale};

/// What the recipe says of a product with one weight.
pub struct OfWeight<'a> {
    /// Formats and scales.
    pub recipe: Recipe,
    /// The codes, where the file holds them.
    pub(crate) held: Option<HeldCodes<'a>>,
    /// The elements and scales of a block-scaled weight, where the file holds such.
    pub(crate) blocks: Option<HeldBlocks<'a>>,
}

/// What a recipe of the checkpoint's codes says of this weight; nothing of another recipe, but for one
/// of integers over a weight that the file holds in integers: those are multiplied as they stand, and
/// not converted twice.
///
/// Activations have one scale where the file holds it, one per token and 128 values where the
/// weight has blocks of 128 by 128, and one per token elsewhere; beside a block-scaled weight they are of
/// its format.
///
/// # Errors
/// If the weight has a form that the project's kernels do not multiply, or blocks of another size.
pub fn of_weight<'a>(
    recipe: &Recipe,
    weight: &Weight<'a>,
) -> Result<Option<OfWeight<'a>>, ComputeError> {
    if recipe.codes.are_made() {
        let of_integers = recipe.gemm == Format::Int8;
        let held = of_integers.then(|| weight.held_codes(WeightType::I8)).flatten();
        let of_weight = held.and_then(|held| Some((held, of_rows(&held, weight)?)));
        return Ok(of_weight.map(|(held, of_weight)| {
            let activation = match held.input_scale {
                Some(_) => ActivationScale::Tensor,
                None => recipe.scale.activation,
            };
            let recipe = Recipe { scale: Scale { weight: of_weight, activation }, ..*recipe };
            OfWeight { recipe, held: Some(held), blocks: None }
        }));
    }
    let recipe = Recipe { codes: Codes::Made, ..*recipe };
    let refuse = |what: String| {
        Err(ComputeError::Recipe(format!(
            "`gemm = \"checkpoint\"`: the weight {} {what}; write another `gemm`, which converts \
             its values",
            weight.in_words()
        )))
    };
    if !weight.is_scaled() {
        let gemm = match weight.kind() {
            WeightType::BF16 => Format::Bf16,
            WeightType::F16 => Format::F16,
            WeightType::F32 | WeightType::F64 => Format::F32,
            kind => return refuse(format!("is {kind}, which no tensor core takes as it is")),
        };
        return Ok(Some(OfWeight { recipe: Recipe { gemm, ..recipe }, held: None, blocks: None }));
    }
    if let Some(blocks) = weight.held_blocks() {
        let recipe = Recipe {
            gemm: blocks.format.element(),
            scale: Scale::of_blocks(blocks.format),
            accumulate: Accumulate::Fast,
            ..recipe
        };
        return Ok(Some(OfWeight { recipe, held: None, blocks: Some(blocks) }));
    }
    let e4m3 = weight.held_codes(WeightType::E4m3).map(|held| (Format::E4m3, held));
    let e5m2 = || Some((Format::E5m2, weight.held_codes(WeightType::E5m2)?));
    let int8 = || Some((Format::Int8, weight.held_codes(WeightType::I8)?));
    let codes = e4m3.or_else(e5m2).or_else(int8);
    let Some((gemm, held)) = codes else {
        return refuse(format!(
            "holds {} codes, and the project's kernels take FP8 codes, 8-bit integers without zero \
             points and block-scaled formats alone",
            weight.kind()
        ));
    };
    let [tall, wide] = held.block();
    let of_weight = match (of_rows(&held, weight), tall, wide) {
        (Some(of_rows), ..) => of_rows,
        (None, BLOCK, BLOCK) if gemm.is_fp8() && held.first().is_multiple_of(BLOCK) => {
            WeightScale::Block128
        }
        _ if gemm == Format::Int8 => {
            return refuse(format!(
                "has blocks of {tall} by {wide} integers, and the kernels take a scale for each row or \
                 for the whole weight"
            ));
        }
        _ => {
            return refuse(format!(
                "has blocks of {tall} by {wide} values, and the kernels take 128 by 128"
            ));
        }
    };
    let blocks = of_weight == WeightScale::Block128;
    let activation = match (held.input_scale, blocks) {
        (Some(_), false) => ActivationScale::Tensor,
        (None, true) => ActivationScale::Block128,
        (None, false) => ActivationScale::Token,
        (Some(_), true) => {
            return refuse("has blocks, and one scale for all activations".to_owned());
        }
    };
    if blocks && recipe.accumulate == Accumulate::Fast {
        return Err(ComputeError::Recipe(format!(
            "`gemm = \"checkpoint\"`: the weight {} has a scale for 128 values of K, which \
             `accumulate = \"fast\"` cannot apply; write `accumulate = \"promoted\"`",
            weight.in_words()
        )));
    }
    let scale = Scale { weight: of_weight, activation };
    let recipe = Recipe { gemm, scale, ..recipe };
    Ok(Some(OfWeight { recipe, held: Some(held), blocks: None }))
}

/// The scales of codes of which a row has one, or all have.
fn of_rows(held: &HeldCodes<'_>, weight: &Weight<'_>) -> Option<WeightScale> {
    let [tall, wide] = held.block();
    match wide == weight.width() {
        true if tall == 1 => Some(WeightScale::Channel),
        true if tall >= weight.rows() => Some(WeightScale::Tensor),
        _ => None,
    }
}
