//! Where a GEMM's error comes from: weights, activations, accumulation, output.
//!
//! The error of some outputs is followed step by step, each step exact:
//! ```text
//! R0 = x  w     f64      the truth
//! Rw = x  w~    f64      Rw - R0   weight rounding
//! R1 = x~ w~    f64      R1 - Rw   activation rounding
//! A  = x~ w~    chip     A  - R1   accumulation
//! O  = round(A)          O  - A    output rounding
//! y  = the subject's     y  - O    unexplained
//! ```
//! A step's share is its projection on the whole error, `<step, e> / <e, e>`, so
//! the shares add up to one whatever the steps' correlations. It knows the steps
//! of a recipe, not what is a bug.

use serde::{Deserialize, Serialize};

use super::call::Call;
use super::departure::{Steps, matmul_rows};
use super::emulated::arm::Emulated;
use super::emulated::gemm::Scales;
use super::emulated::quantize::Codes;
use super::floor::set_columns;
use super::reference::{Widened, dot_rows};
use super::{ComputeError, parallel};
use crate::dtype::Format;
use crate::op::{Recipe, WeightScale};
use crate::tensor::Tensor;

/// Columns of a result that are followed: enough for shares of a per cent.
const FOLLOWED: usize = 16;
/// Rows that share a weight's block scale must be converted together.
const BLOCK: usize = 128;

/// The shares of an error's causes; they add up to one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shares {
    /// Of the weight's rounding.
    pub weight: f64,
    /// Of the activation's rounding.
    pub activation: f64,
    /// Of the accumulation along K.
    pub accumulation: f64,
    /// Of the output's rounding, the bias's addition included.
    pub output: f64,
    /// Of everything else: the subject is not what the recipe prescribes.
    pub unexplained: f64,
}

impl Shares {
    /// Name and share of each, in the order of the steps.
    pub fn named(&self) -> [(&'static str, f64); 5] {
        [
            ("weight rounding", self.weight),
            ("activation rounding", self.activation),
            ("accumulation", self.accumulation),
            ("output rounding", self.output),
            ("unexplained", self.unexplained),
        ]
    }
}

/// The energies behind [`Shares`]; those of several sites add.
#[derive(Clone, Copy, Debug, Default)]
pub struct Energies {
    steps: [f64; 5],
    whole: f64,
}

impl Energies {
    /// Both together.
    pub fn and(self, other: Energies) -> Energies {
        let mut sum = self;
        for (mine, others) in sum.steps.iter_mut().zip(other.steps) {
            *mine += others;
        }
        sum.whole += other.whole;
        sum
    }

    /// The shares, where there is an error at all.
    pub fn shares(self) -> Option<Shares> {
        let [weight, activation, accumulation, output, unexplained] =
            self.steps.map(|step| step / self.whole);
        let shares = Shares { weight, activation, accumulation, output, unexplained };
        (self.whole > 0.0 && self.whole.is_finite()).then_some(shares)
    }
}

/// Follows the error of a matmul's first columns; nothing for other ops.
///
/// # Errors
/// As the emulated arm's matmul.
pub fn energies(
    arm: &Emulated,
    recipe: &Recipe,
    call: &Call<'_>,
    subject: &Tensor,
) -> Result<Option<Energies>, ComputeError> {
    let Call::Matmul { x, weight, bias } = *call else { return Ok(None) };
    // An engine converts otherwise than the recipe says; the steps that are followed are one
    // arithmetic's.
    let plain;
    let (arm, recipe) = match recipe.engine {
        Some(_) => {
            plain = Recipe { engine: None, ..*recipe };
            (&Emulated::new(&plain)?, &plain)
        }
        None => (arm, recipe),
    };
    let of_weight = arm.of_weight(&weight)?;
    let (arm, recipe) = match &of_weight {
        Some(arm) => (arm, arm.recipe()),
        None => (arm, recipe),
    };
    let fewest = if recipe.scale.weight == WeightScale::Block128 { BLOCK } else { FOLLOWED };
    let count = fewest.min(weight.rows());
    let width = weight.width();
    let mut rows = vec![0.0; count * width];
    weight.decode_rows(0..count, &mut rows)?;
    let (w_codes, w_scales) = arm.quantise_weight_rows(weight, 0, &rows, arm.absmax_of(weight)?);
    let x_wide = Widened::of(x.data(), width);
    let w_rounded = Widened::of_f64(&dequantised(&w_codes, &w_scales), width);
    let parts = parallel::parts(recipe, &weight)?.unwrap_or_else(|| parallel::alone(width));
    let mut x_rounded = vec![0.0; x.data().len()];
    for inner in parts {
        let (codes, scales) = arm.quantise_activation(&x.columns(inner.clone()));
        let place = (inner.start, inner.len());
        set_columns(&mut x_rounded, width, place, &dequantised(&codes, &scales));
    }
    let x_rounded = Widened::of_f64(&x_rounded, width);
    let exact = dot_rows(&x_wide, &Widened::of(&rows, width));
    let of_weight = dot_rows(&x_wide, &w_rounded);
    let of_both = dot_rows(&x_rounded, &w_rounded);
    let operands = (x, weight, None);
    let f32_out = Steps { output: Format::F32, ..Steps::of(recipe) };
    let accumulated = matmul_rows(arm, recipe, operands, 0..count, &f32_out)?;
    let operands = (x, weight, bias);
    let prescribed = matmul_rows(arm, recipe, operands, 0..count, &Steps::of(recipe))?;
    let bias = bias.map(|bias| bias.to_vec()).transpose()?;
    let mut energies = Energies::default();
    for row in 0..x.rows() {
        for column in 0..count {
            let index = row * count + column;
            let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
            let path = [
                exact[index] + bias,
                of_weight[index] + bias,
                of_both[index] + bias,
                f64::from(accumulated.row(row)[column]) + bias,
                f64::from(prescribed.row(row)[column]),
                f64::from(subject.row(row)[column]),
            ];
            let error = path[5] - path[0];
            energies.whole += error * error;
            for (step, ends) in energies.steps.iter_mut().zip(path.windows(2)) {
                *step += (ends[1] - ends[0]) * error;
            }
        }
    }
    Ok(Some(energies))
}

/// The values that codes and scales stand for.
fn dequantised(codes: &Codes, scales: &Scales) -> Vec<f64> {
    let width = codes.width();
    let mut values = Vec::with_capacity(codes.rows() * width);
    for row in 0..codes.rows() {
        for (column, value) in codes.decode_row(row).into_iter().enumerate() {
            values.push(f64::from(value) * f64::from(scales.at(row, column, width)));
        }
    }
    values
}
