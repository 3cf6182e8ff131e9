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

use std::ops::Range;

use super::call::Call;
use super::delta::{Convolution, DeltaRule, Gates};
use super::experts::Products;
use super::floor::{Floor, rounding_errors};
use super::kv_cache::Cached;
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
fn redrawn(mut stream: Random, values: &[f32], errors: &[f32]) -> Vec<f32> {
    let mut drawn = errors.to_vec();
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
        let mut y = matmul(&self.floor, &[(self.number, x)], weight, bias)?;
        Ok(y.remove(0))
    }
}

/// An operand of one draw.
struct DrawnOperand {
    number: u64,
    values: Vec<f32>,
    energies: Vec<f64>,
    wide: Widened,
}

/// The product of each draw with its activation: the weight is decoded and converted once for all.
fn matmul(
    floor: &Floor,
    draws: &[(u64, &Tensor)],
    weight: Weight<'_>,
    bias: Option<Weight<'_>>,
) -> Result<Vec<Tensor>, ComputeError> {
    if let Some(floor) = floor.of_weight(&weight)? {
        return matmul(&floor, draws, weight, bias);
    }
    for (_, x) in draws {
        check_matmul(x, &weight, bias.as_ref())?;
    }
    let bias = bias.map(|bias| bias.to_vec()).transpose()?;
    let width = weight.width();
    let emulated = floor.emulated();
    let operands: Vec<DrawnOperand> = draws
        .iter()
        .map(|&(number, x)| {
            let (codes, scales) = emulated.quantise_activation(x);
            let errors = rounding_errors(x.data(), &codes, &scales);
            let values = redrawn(stream_of(number, x.data()), x.data(), &errors);
            let (energies, wide) = (energies(&values, width), Widened::of(&values, width));
            DrawnOperand { number, values, energies, wide }
        })
        .collect();
    let accumulation = floor.accumulation(width);
    let chunks = emulated.by_quantised_chunk(weight, |first, rows, codes, scales| {
        let errors = rounding_errors(rows, codes, &scales);
        let of_draw = |x: &DrawnOperand| {
            // A weight is large, and its name says as much as its values.
            let parts: [&[u8]; 3] =
                [&x.number.to_le_bytes(), &(first as u64).to_le_bytes(), weight.name().as_bytes()];
            let mut stream = Random::named("runner 2026 drawn roundings of weights v1", &parts);
            let w = redrawn(stream, rows, &errors);
            let w_energies = energies(&w, width);
            let dots = dot_rows(&x.wide, &Widened::of(&w, width));
            let chains = floor.chains(&x.values, &w, width);
            let mut y: Vec<f32> = Vec::with_capacity(dots.len());
            let signs = Random::at(!stream.bits()).signs();
            let each = x.energies.iter().flat_map(|x| w_energies.iter().map(move |w| x * w));
            for (index, ((&dot, energies), sign)) in dots.iter().zip(each).zip(signs).enumerate() {
                // sum (x w)^2, as if it did not matter which x meets which w.
                let terms = energies / width as f64;
                let chain = chains.as_ref().map(|chains| chains[index]);
                let moved = floor.after_operands(accumulation, dot, terms, chain).sqrt();
                let bias =
                    bias.as_ref().map_or(0.0, |b| f64::from(b[first + index % codes.rows()]));
                y.push((dot + f64::from(sign) * moved + bias) as f32);
            }
            Tensor::new(codes.rows(), y)
        };
        Ok((first, operands.iter().map(of_draw).collect::<Vec<Tensor>>()))
    })?;
    let empty = |x: &DrawnOperand| Tensor::zeros(x.energies.len(), weight.rows());
    let mut all: Vec<Tensor> = operands.iter().map(empty).collect();
    for (first, chunks) in chunks {
        for (y, chunk) in all.iter_mut().zip(chunks) {
            y.set_columns(first, &chunk);
        }
    }
    Ok(all)
}

/// Several draws in one pass: each tensor has the rows of the first, then those of the second, and
/// so on, and each op gives every draw the bits that it has alone.
pub struct Draws {
    draws: Vec<Drawn>,
}

impl Draws {
    /// The draws of a recipe by their numbers.
    ///
    /// # Errors
    /// As [`Drawn::new`].
    pub fn new(recipe: &Recipe, numbers: Range<u64>) -> Result<Draws, ComputeError> {
        let draws = numbers.map(|number| Drawn::new(recipe, number));
        Ok(Draws { draws: draws.collect::<Result<_, _>>()? })
    }

    /// What each draw made, of a tensor of all.
    pub fn apart(&self, all: &Tensor) -> Vec<Tensor> {
        let rows = all.rows() / self.draws.len().max(1);
        let part = |draw: usize| {
            let data = &all.data()[draw * rows * all.width()..(draw + 1) * rows * all.width()];
            Tensor::new(all.width(), data.to_vec())
        };
        (0..self.draws.len()).map(part).collect()
    }
}

/// The tensors of all draws in one.
fn together(parts: &[Tensor]) -> Tensor {
    let width = parts.first().map_or(1, Tensor::width);
    Tensor::new(width, parts.iter().flat_map(|part| part.data().iter().copied()).collect())
}

impl Ops for Draws {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        // The call of each draw, with its own rows of these tensors.
        macro_rules! each {
            ([$($x:ident),*], $call:expr) => {{
                $(let $x = self.apart($x);)*
                let mut made = Vec::with_capacity(self.draws.len());
                for (place, draw) in self.draws.iter().enumerate() {
                    $(let $x = &$x[place];)*
                    made.push(draw.compute(&$call)?);
                }
                Ok(together(&made))
            }};
        }
        match *call {
            Call::Embed { .. } => {
                let rows = call.on(&Reference)?;
                Ok(together(&vec![rows; self.draws.len()]))
            }
            Call::Matmul { x, weight, bias } => {
                let Some(first) = self.draws.first() else { return call.on(&Reference) };
                let parts = self.apart(x);
                let numbers = self.draws.iter().map(|draw| draw.number);
                let of_draws: Vec<(u64, &Tensor)> = numbers.zip(&parts).collect();
                Ok(together(&matmul(&first.floor, &of_draws, weight, bias)?))
            }
            Call::RmsNorm { x, gain, eps } => each!([x], Call::RmsNorm { x, gain, eps }),
            Call::LayerNorm { x, gain, bias, eps } => {
                each!([x], Call::LayerNorm { x, gain, bias, eps })
            }
            Call::Rope { x, rope, head_dim, first_position } => {
                each!([x], Call::Rope { x, rope, head_dim, first_position })
            }
            Call::Cached(Cached { x, format, scale }) => {
                each!([x], Call::Cached(Cached { x, format, scale }))
            }
            Call::Attention { q, k, v, shape } => {
                each!([q, k, v], Call::Attention { q, k, v, shape })
            }
            Call::Gated { gate, up, activation } => {
                each!([gate, up], Call::Gated { gate, up, activation })
            }
            Call::Activated { x, activation } => each!([x], Call::Activated { x, activation }),
            Call::Route { scores, bias, routing } => {
                each!([scores], Call::Route { scores, bias, routing })
            }
            Call::Experts(products) => {
                let Products { x, routes, .. } = products;
                each!([x, routes], Call::Experts(Products { x, routes, ..products }))
            }
            Call::Mix { x, routes, used } => each!([x, routes], Call::Mix { x, routes, used }),
            Call::SigmoidGate { x, gate } => each!([x, gate], Call::SigmoidGate { x, gate }),
            Call::Convolve(convolution) => {
                let x = convolution.x;
                each!([x], Call::Convolve(Convolution { x, ..convolution }))
            }
            Call::Gates(gates) => {
                let x = gates.x;
                each!([x], Call::Gates(Gates { x, ..gates }))
            }
            Call::Delta(rule) => {
                let DeltaRule { x, gates, .. } = rule;
                each!([x, gates], Call::Delta(DeltaRule { x, gates, ..rule }))
            }
            Call::Add { a, b } => each!([a, b], Call::Add { a, b }),
            Call::Scale { x, factor, held } => each!([x], Call::Scale { x, factor, held }),
            Call::SoftCap { x, cap } => each!([x], Call::SoftCap { x, cap }),
        }
    }
}
