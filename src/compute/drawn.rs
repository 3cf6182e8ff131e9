//! A reference pass whose roundings are drawn anew: how far rounding alone carries
//! a whole pass.
//!
//! A floor is local; what becomes of it over the layers depends on the model. So
//! the reference's pass is computed once more with every operand off by its own
//! rounding error, `x + s dx` and `w + s dw`, where each sign s is a fair coin:
//! errors of the recipe's sizes at the recipe's places, shared between columns and
//! tokens as they are in the arm, but not the arm's. What follows the operands
//! (accumulation, output rounding, the f32 roundings of the other ops) is drawn by
//! its deviation. The signs are named by the values or the weight that they belong to, so the
//! draw is a function of the recipe, the model and the prompt. It does not know
//! what an arm made.

use super::call::Call;
use super::emulated::gemm::Scales;
use super::emulated::quantize::Codes;
use super::floor::{Floor, rounding_errors};
use super::reference::{Reference, Widened, dot_rows};
use super::{ComputeError, Ops, check_matmul};
use crate::model::Weight;
use crate::op::Recipe;
use crate::random::Random;
use crate::tensor::Tensor;

/// The reference with the recipe's roundings, drawn.
pub struct Drawn {
    floor: Floor,
    /// Which draw it is.
    number: u64,
}

impl Drawn {
    /// The draw of a recipe.
    ///
    /// # Errors
    /// As [`Floor::new`].
    pub fn new(recipe: &Recipe, number: u64) -> Result<Drawn, ComputeError> {
        Ok(Drawn { floor: Floor::new(recipe)?, number })
    }

    /// The result of one of the floor's ops, each value moved by its deviation to
    /// one side or the other.
    fn moved(&self, mut y: Tensor) -> Tensor {
        if let Some(sigma) = self.floor.take_sigma() {
            let signs = stream_of(self.number, y.data()).signs();
            let values = y.data_mut().iter_mut().zip(sigma.data());
            values.zip(signs).for_each(|((y, sigma), sign)| *y += sign * sigma);
        }
        y
    }
}

/// The stream that some values name.
fn stream_of(number: u64, values: &[f32]) -> Random {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Random::named("runner 2026 drawn roundings v1", &[&number.to_le_bytes(), &bytes])
}

/// An operand, each value off by its rounding error with a sign of its own.
fn redrawn(mut stream: Random, values: &[f32], codes: &Codes, scales: &Scales) -> Vec<f32> {
    let mut drawn = rounding_errors(values, codes, scales);
    for (errors, values) in drawn.chunks_mut(64).zip(values.chunks(64)) {
        let mut signs = stream.bits();
        for (error, value) in errors.iter_mut().zip(values) {
            let sign = ((signs & 1) as u32) << 31;
            *error = value + f32::from_bits(error.to_bits() ^ sign);
            signs >>= 1;
        }
    }
    drawn
}

fn energies(rows: &[f32], width: usize) -> Vec<f64> {
    let energy = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum();
    rows.chunks_exact(width).map(energy).collect()
}

impl Ops for Drawn {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        match *call {
            // A copy rounds nothing.
            Call::Embed { .. } => call.on(&Reference),
            Call::Matmul { x, weight, bias } => self.matmul(x, weight, bias),
            Call::Experts(products) => {
                let made =
                    products.by_expert(|x, weight, bias| Ok([self.matmul(x, weight, bias)?]));
                made.map(|[y]| y)
            }
            // Its choice is the scores' own: a zero is no weight that was rounded.
            Call::Route { .. } => {
                let mut y = call.on(&self.floor)?;
                let sigma = self.floor.take_sigma();
                if let Some(sigma) = sigma {
                    let signs = stream_of(self.number, y.data()).signs();
                    let values = y.data_mut().iter_mut().zip(sigma.data());
                    for ((y, sigma), sign) in values.zip(signs) {
                        // Nor is a choice that hangs on a rounding a rounding of the weight.
                        if *y != 0.0 && *sigma < 0.5 * y.abs() {
                            *y += sign * sigma;
                        }
                    }
                }
                Ok(y)
            }
            _ => Ok(self.moved(call.on(&self.floor)?)),
        }
    }
}

impl Drawn {
    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_matmul(x, &weight, bias.as_ref())?;
        if let Some(floor) = self.floor.of_weight(&weight)? {
            return Drawn { floor, number: self.number }.matmul(x, weight, bias);
        }
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let width = x.width();
        let emulated = self.floor.emulated();
        let (codes, scales) = emulated.quantise_activation(x);
        let x_values = redrawn(stream_of(self.number, x.data()), x.data(), &codes, &scales);
        let x_energies = energies(&x_values, width);
        let x = Widened::of(&x_values, width);
        let accumulation = self.floor.accumulation(width);
        let chunks = emulated.by_quantised_chunk(weight, |first, rows, codes, scales| {
            // A weight is large, and its name says as much as its values.
            let parts: [&[u8]; 3] = [
                &self.number.to_le_bytes(),
                &(first as u64).to_le_bytes(),
                weight.name().as_bytes(),
            ];
            let mut stream = Random::named("runner 2026 drawn roundings of weights v1", &parts);
            let w = redrawn(stream, rows, codes, &scales);
            let w_energies = energies(&w, width);
            let dots = dot_rows(&x, &Widened::of(&w, width));
            let chains = self.floor.chains(&x_values, &w, width);
            let mut y: Vec<f32> = Vec::with_capacity(dots.len());
            let signs = Random::at(!stream.bits()).signs();
            let each = x_energies.iter().flat_map(|x| w_energies.iter().map(move |w| x * w));
            for (index, ((&dot, energies), sign)) in dots.iter().zip(each).zip(signs).enumerate() {
                // sum (x w)^2, as if it did not matter which x meets which w.
                let terms = energies / width as f64;
                let chain = chains.as_ref().map(|chains| chains[index]);
                let moved = self.floor.after_operands(accumulation, dot, terms, chain).sqrt();
                let bias =
                    bias.as_ref().map_or(0.0, |b| f64::from(b[first + index % codes.rows()]));
                y.push((dot + f64::from(sign) * moved + bias) as f32);
            }
            Ok((first, Tensor::new(codes.rows(), y)))
        })?;
        let mut y = Tensor::zeros(x_energies.len(), weight.rows());
        for (first, chunk) in chunks {
            y.set_columns(first, &chunk);
        }
        Ok(y)
    }
}
