//! Names for what is wrong: hypotheses that are tested against the tensors.
//!
//! A fingerprint asks what the subject's op would have returned if one thing
//! were wrong with it, computes that from the subject's own inputs, and says how
//! much of the unexplained difference it accounts for. One file each, with its
//! test; a new one is a file and a line in [`ALL`]. It decides nothing about
//! verdicts: a site that nobody suspects is never looked at.

mod activation_function;
mod bias;
mod block_scales;
pub mod cache_format;
mod cache_position;
mod cast;
mod causal_mask;
mod delta;
mod e5m2_read;
mod epsilon;
mod f16_overflow;
mod factor;
mod fnuz;
pub mod gain;
mod gqa_map;
pub mod head_permutation;
mod integers;
mod k_range;
mod layer_norm;
mod mixture;
mod narrow_accumulation;
mod narrow_operand;
mod non_finite;
mod null;
mod norm_gain;
mod norm_mean;
mod other_format;
mod other_schedule;
pub mod permuted_outputs;
mod permuted_weight;
pub mod planted;
mod quantised_activations;
mod ranks;
mod residual;
mod rope_angles;
mod rope_geometry;
mod rounded_output;
mod row_or_column_gain;
mod saturated;
mod scale_applied;
mod scale_choice;
mod scale_granularity;
pub mod scale_order;
mod scale_product;
mod scores;
mod softmax_scale;
mod stale_input;
mod stale_rows;
mod subnormals_flushed;
mod swapped_operands;
mod swapped_weight;
mod tile;
mod transposed_weight;
mod truncating_cast;
mod unwritten;
mod wrong_row;
mod zero_block;
pub mod zero_point;

#[cfg(test)]
mod bench;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::departure::{Steps, matmul_rows};
use crate::compute::emulated::arm::Emulated;
use crate::model::{Model, Weight};
use crate::op::{Recipe, Site};
use crate::tensor::Tensor;

use null::{CLEARLY, Score};
pub use null::{Null, describe};
use planted::Bug;

/// The share of the difference above which a hypothesis gives the bug its name.
pub const NAMED: f64 = 0.9;
/// Shares closer than this do not decide between two hypotheses.
const TIE: f64 = 0.01;
/// Hypotheses that are kept for the reader.
const KEPT: usize = 5;
/// Columns of a wide GEMM on which a hypothesis is tried first; whole blocks of scales.
const SCREEN: usize = 128;
/// The share that it must explain there to be computed on all columns.
const PROMISING: f64 = 0.5;
/// Weights with more values are not rearranged: it would take longer than the stage.
const LARGEST_REARRANGED: usize = 1 << 24;

/// One hypothesis about a cause.
pub struct Fingerprint {
    /// What it tests, in a few words.
    pub what: &'static str,
    /// The causes that it can name.
    pub causes: &'static [&'static str],
    /// The bugs that it alone recognises.
    pub bugs: &'static [Bug],
    /// Tests it.
    test: Test,
}

type Test = fn(&Case<'_>) -> Result<Vec<Fit>, ComputeError>;

/// All of them; of two that fit equally well, the first one names the bug.
pub const ALL: [&Fingerprint; 56] = [
    &narrow_operand::FINGERPRINT,
    &cast::FINGERPRINT,
    &zero_block::FINGERPRINT,
    &fnuz::FINGERPRINT,
    &block_scales::FINGERPRINT,
    &integers::FINGERPRINT,
    &non_finite::FINGERPRINT,
    &other_format::FINGERPRINT,
    &wrong_row::FINGERPRINT,
    &rope_geometry::FINGERPRINT,
    &rope_angles::FINGERPRINT,
    &causal_mask::FINGERPRINT,
    &gqa_map::FINGERPRINT,
    &swapped_operands::FINGERPRINT,
    &residual::FINGERPRINT,
    &factor::FINGERPRINT,
    &scores::FINGERPRINT,
    &cache_position::FINGERPRINT,
    &scale_product::FINGERPRINT,
    &unwritten::FINGERPRINT,
    &stale_rows::FINGERPRINT,
    &head_permutation::FINGERPRINT,
    &permuted_outputs::FINGERPRINT,
    &ranks::FINGERPRINT,
    &bias::FINGERPRINT,
    &zero_point::FINGERPRINT,
    &other_schedule::FINGERPRINT,
    &truncating_cast::FINGERPRINT,
    &subnormals_flushed::FINGERPRINT,
    &saturated::FINGERPRINT,
    &f16_overflow::FINGERPRINT,
    &e5m2_read::FINGERPRINT,
    &rounded_output::FINGERPRINT,
    &scale_applied::FINGERPRINT,
    &cache_format::FINGERPRINT,
    &gain::FINGERPRINT,
    &scale_granularity::FINGERPRINT,
    &scale_choice::FINGERPRINT,
    &scale_order::FINGERPRINT,
    &row_or_column_gain::FINGERPRINT,
    &k_range::FINGERPRINT,
    &transposed_weight::FINGERPRINT,
    &permuted_weight::FINGERPRINT,
    &swapped_weight::FINGERPRINT,
    &stale_input::FINGERPRINT,
    &quantised_activations::FINGERPRINT,
    &narrow_accumulation::FINGERPRINT,
    &norm_gain::FINGERPRINT,
    &norm_mean::FINGERPRINT,
    &layer_norm::FINGERPRINT,
    &mixture::FINGERPRINT,
    &delta::FINGERPRINT,
    &epsilon::FINGERPRINT,
    &softmax_scale::FINGERPRINT,
    &activation_function::FINGERPRINT,
    &tile::FINGERPRINT,
];

/// Those that a result without one finite number can tell: they look at the operands.
const OF_OPERANDS: [&Fingerprint; 4] = [
    &narrow_operand::FINGERPRINT,
    &zero_block::FINGERPRINT,
    &scores::FINGERPRINT,
    &non_finite::FINGERPRINT,
];

/// How well a hypothesis fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// The cause's name, as `stale-input`.
    pub cause: String,
    /// The cause in words, with the parameters that were found.
    pub detail: String,
    /// The share of the difference's energy that it explains: 1 is all of it.
    pub explained: f64,
    /// Values whose bits it does not predict.
    pub mismatches: usize,
    /// All values.
    pub elements: usize,
    /// Numbers that were fitted to the data.
    pub parameters: usize,
    /// Whether it says clearly more than rounding and another order of additions do. What
    /// older runs recorded did not ask for that.
    #[serde(default = "always")]
    pub significant: bool,
    /// By how much, in nats of the Bayesian information criterion: for ranking alone.
    #[serde(skip)]
    pub gain: f64,
}

fn always() -> bool {
    true
}

impl Fit {
    /// Whether it predicts every bit.
    pub fn is_exact(&self) -> bool {
        self.mismatches == 0
    }

    /// Whether it explains enough to give the bug its name.
    pub fn names_the_bug(&self) -> bool {
        self.significant && (self.is_exact() || self.explained >= NAMED)
    }
}

/// One suspicious call, and everything that a fingerprint may look at.
pub struct Case<'a> {
    /// Where.
    pub site: &'a Site,
    /// The op with the operands that the subject's op had.
    pub call: &'a Call<'a>,
    /// What the subject returned.
    pub subject: &'a Tensor,
    /// What the recipe prescribes for these operands.
    pub clean: &'a Tensor,
    /// What the reference returns for them.
    pub truth: &'a Tensor,
    /// What rounding alone explains.
    pub null: &'a Null,
    /// The prescribed arithmetic.
    pub arm: &'a Emulated,
    /// The recipe.
    pub recipe: &'a Recipe,
    /// The model, where there is one.
    pub model: Option<&'a Model>,
    /// The subject's other tensors, in the order of the flow.
    pub recorded: &'a [(Site, Tensor)],
}

/// The operands of a matmul.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// The activation.
    pub x: &'a Tensor,
    /// The weight.
    pub weight: Weight<'a>,
    /// The bias.
    pub bias: Option<Weight<'a>>,
}

/// Tests every fingerprint and ranks those that say something, the best first.
///
/// # Errors
/// If the model's file does not give what a hypothesis reads.
pub fn rank(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let mut fits = Vec::new();
    // Where nothing is finite every hypothesis that ends there fits alike.
    let blind = case.subject.data().iter().all(|value| !value.is_finite());
    let all = if blind { &OF_OPERANDS[..] } else { &ALL[..] };
    for fingerprint in all {
        fits.extend((fingerprint.test)(case)?);
        if fits.iter().any(|fit| fit.is_exact() && fit.significant) {
            break;
        }
    }
    let mut ranked: Vec<Fit> = Vec::new();
    while let Some(best) = best_of(&fits) {
        let best = fits.remove(best);
        if ranked.iter().any(|fit| fit.cause == best.cause && fit.detail == best.detail) {
            continue;
        }
        // The gain ranks and is not kept.
        ranked.push(Fit { gain: 0.0, ..best });
        if ranked.len() == KEPT {
            break;
        }
    }
    Ok(ranked)
}

/// The best fit: exact ones first, then those that explain most; of near ties the
/// one with the fewest fitted numbers, then the first.
fn best_of(fits: &[Fit]) -> Option<usize> {
    let exact = fits.iter().position(|fit| fit.is_exact() && fit.significant);
    if exact.is_some() {
        return exact;
    }
    // What no null model rivals stands before what one does.
    let clear = fits.iter().any(|fit| fit.significant);
    let worth = |fit: &&Fit| fit.significant == clear;
    let most = fits.iter().filter(worth).map(|fit| fit.explained).max_by(f64::total_cmp)?;
    let near = fits.iter().enumerate().filter(|(_, fit)| worth(fit));
    let near: Vec<(usize, &Fit)> = near.filter(|(_, fit)| fit.explained >= most - TIE).collect();
    // Of those that explain as much, what leaves clearly less beyond the noise; then the
    // fewest numbers, then the first.
    let gain = near.iter().map(|(_, fit)| fit.gain).max_by(f64::total_cmp)?;
    let near = near.into_iter().filter(|(_, fit)| fit.gain >= gain - CLEARLY);
    near.min_by_key(|(_, fit)| fit.parameters).map(|(index, _)| index)
}

impl<'a> Case<'a> {
    /// The operands, if the op is a matmul.
    pub fn gemm(&self) -> Option<Gemm<'a>> {
        match *self.call {
            Call::Matmul { x, weight, bias } => Some(Gemm { x, weight, bias }),
            _ => None,
        }
    }

    /// Whether the op multiplies FP8 codes.
    pub fn multiplies_fp8(&self) -> bool {
        self.recipe.gemm.is_fp8() && self.multiplies_codes()
    }

    /// Whether the op multiplies codes of 8 bits with scales: an engine may multiply by some weights as
    /// they are.
    pub fn multiplies_codes(&self) -> bool {
        let quantised = |gemm: Gemm<'_>| {
            let engine = self.arm.engine();
            engine.is_none_or(|engine| engine.quantises(gemm.weight.name()))
        };
        self.recipe.gemm.is_scaled() && self.gemm().is_some_and(quantised)
    }

    /// How well a predicted tensor fits, held against the best null model: its share of
    /// the energy that rounding leaves, over the values that no number was fitted to
    /// ([`Case::trains`]), and whether that is clearly more than the null models say.
    pub fn fit(&self, cause: &str, detail: String, parameters: usize, predicted: &Tensor) -> Fit {
        let passed = self.arm.streamed(predicted.clone());
        let plain = self.null.score(self, parameters, predicted);
        let rounded = self.null.score(self, parameters, &passed);
        let best = if rounded.rest < plain.rest { rounded } else { plain };
        let elements = self.subject.data().len();
        let cause = cause.to_owned();
        let (explained, mismatches) = (best.explained, best.mismatches);
        let Score { significant, gain, .. } = best;
        Fit { cause, detail, explained, mismatches, elements, parameters, significant, gain }
    }

    /// Whether numbers may be fitted to this value. The other half of the values is held
    /// out: a fitted hypothesis must predict them.
    pub fn trains(&self, row: usize, column: usize) -> bool {
        // Every second row of each column; which of them, the column decides.
        let phase = (column as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63;
        (row as u64 ^ phase) & 1 == 0
    }

    /// The rows with values that are no noise.
    pub fn rows_beyond_noise(&self) -> Vec<usize> {
        let width = self.subject.width();
        let off = |&row: &usize| {
            let pairs = self.subject.row(row).iter().zip(self.clean.row(row));
            pairs.enumerate().any(|(column, (&s, &c))| {
                self.null.beyond(row * width + column, f64::from(s) - f64::from(c))
            })
        };
        (0..self.subject.rows()).filter(off).collect()
    }

    /// A fit that is worth mentioning.
    pub fn fit_if_any(
        &self,
        cause: &str,
        detail: String,
        parameters: usize,
        predicted: &Tensor,
    ) -> Option<Fit> {
        let fit = self.fit(cause, detail, parameters, predicted);
        (fit.is_exact() || fit.explained > 0.0).then_some(fit)
    }

    /// Computes a call by the recipe's arithmetic and says how well it fits. What that
    /// arithmetic has no kernel for explains nothing: an engine's rotary kernels turn by plain
    /// frequencies, and a hypothesis may ask for scaled ones.
    ///
    /// # Errors
    /// As the call.
    pub fn fit_call(
        &self,
        cause: &str,
        detail: String,
        call: &Call<'_>,
    ) -> Result<Option<Fit>, ComputeError> {
        if let Call::Matmul { x, weight, bias } = *call {
            return self.fit_gemm(cause, detail, Gemm { x, weight, bias }, &Steps::of(self.recipe));
        }
        let predicted = match call.on(self.arm) {
            Err(ComputeError::Recipe(_)) => return Ok(None),
            predicted => predicted?,
        };
        if !same_shape(&predicted, self.subject) {
            return Ok(None);
        }
        Ok(self.fit_if_any(cause, detail, 0, &predicted))
    }

    /// Computes a GEMM by other steps or operands; on some columns first, and on
    /// all where it is promising.
    ///
    /// # Errors
    /// As the emulated arm's matmul.
    pub fn fit_gemm(
        &self,
        cause: &str,
        detail: String,
        gemm: Gemm<'_>,
        steps: &Steps<'_>,
    ) -> Result<Option<Fit>, ComputeError> {
        let (rows, width) = (self.subject.rows(), self.subject.width());
        if (gemm.x.rows(), gemm.weight.rows()) != (rows, width)
            || gemm.x.width() != gemm.weight.width()
        {
            return Ok(None);
        }
        let compute = |columns| {
            let operands = (gemm.x, gemm.weight, gemm.bias);
            match matmul_rows(self.arm, self.recipe, operands, columns, steps) {
                // What the engine has no kernel for, or a scale that is 0 or infinite by now,
                // explains nothing.
                Err(ComputeError::Recipe(_) | ComputeError::Gemm(_)) => Ok(None),
                made => made.map(Some),
            }
        };
        if width > 2 * SCREEN {
            let columns = self.screen();
            let Some(tried) = compute(columns.clone())? else { return Ok(None) };
            let (mut rest, mut whole, mut differ) = (0.0, 0.0, 0);
            for row in 0..rows {
                let subject = &self.subject.row(row)[columns.clone()];
                let clean = &self.clean.row(row)[columns.clone()];
                for ((&s, &c), &t) in subject.iter().zip(clean).zip(tried.row(row)) {
                    differ += usize::from(s.to_bits() != t.to_bits());
                    rest += square_of_difference(s, t);
                    whole += square_of_difference(s, c);
                }
            }
            if differ > 0 && rest > (1.0 - PROMISING) * whole {
                return Ok(None);
            }
        }
        let predicted = compute(0..width)?;
        Ok(predicted.and_then(|predicted| self.fit_if_any(cause, detail, 0, &predicted)))
    }

    /// The block of columns that differs most.
    pub fn screen(&self) -> Range<usize> {
        let width = self.subject.width();
        let mut best = (0.0, 0..SCREEN.min(width));
        for first in (0..width).step_by(SCREEN) {
            let columns = first..(first + SCREEN).min(width);
            let energy = self.energy(self.clean, columns.clone());
            if energy > best.0 {
                best = (energy, columns);
            }
        }
        best.1
    }

    /// The energy of the subject's difference from another tensor, on some columns.
    pub fn energy(&self, other: &Tensor, columns: Range<usize>) -> f64 {
        let rows = 0..self.subject.rows();
        rows.map(|row| {
            let pairs = self.subject.row(row)[columns.clone()].iter();
            let pairs = pairs.zip(&other.row(row)[columns.clone()]);
            pairs.map(|(&a, &b)| square_of_difference(a, b)).sum::<f64>()
        })
        .sum()
    }
}

/// `(a - b)^2`, and nothing where one of them is not finite.
fn square_of_difference(a: f32, b: f32) -> f64 {
    let difference = f64::from(a) - f64::from(b);
    if difference.is_finite() { difference * difference } else { 0.0 }
}

/// Whether all bits of two rows are the same.
fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn same_shape(a: &Tensor, b: &Tensor) -> bool {
    (a.rows(), a.width()) == (b.rows(), b.width())
}

/// Every value of a tensor changed.
fn mapped(x: &Tensor, change: impl Fn(f32) -> f32) -> Tensor {
    Tensor::new(x.width(), x.data().iter().map(|&value| change(value)).collect())
}
