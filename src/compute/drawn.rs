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

use std::cell::Cell;
use std::ops::Range;

use super::call::Call;
use super::conversion::{Rows, errors_by_part, rounding_errors};
use super::floor::{Floor, Ranks, set_columns};
use super::reference::{Reference, Widened, dot_rows};
use super::{ComputeError, Ops, check_matmul, parallel};
use crate::model::Weight;
use crate::op::Recipe;
use crate::random::Random;
use crate::tensor::Tensor;
use crate::vector::{Kernel, dispatch};

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

/// Signs of a stream, which may be taken a stretch after the other.
struct Signs {
    stream: Random,
    /// The next of them, the lowest first, and how many.
    word: u64,
    left: usize,
}

impl Signs {
    fn of(stream: Random) -> Signs {
        Signs { stream, word: 0, left: 0 }
    }
}

/// An operand, each value off by its rounding error with a sign of its own, in place of what
/// `drawn` holds.
fn redraw(signs: &mut Signs, values: &[f32], errors: &[f32], drawn: &mut Vec<f32>) {
    drawn.resize(values.len(), 0.0);
    dispatch(Redraw { signs, values, errors, drawn });
}

struct Redraw<'a> {
    signs: &'a mut Signs,
    values: &'a [f32],
    errors: &'a [f32],
    drawn: &'a mut [f32],
}

impl Kernel for Redraw<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Redraw { signs, values, errors, drawn } = self;
        let mut at = 0;
        while at < values.len() {
            if signs.left == 0 {
                (signs.word, signs.left) = (signs.stream.bits(), 64);
            }
            let rest = values.len() - at;
            // Half a word at a time: its bits and the values have 32 bits.
            let count = signs.left.min(rest).min(32);
            let word = signs.word as u32;
            let span = at..at + count;
            let places = drawn[span.clone()].iter_mut().enumerate();
            let pairs = values[span.clone()].iter().zip(&errors[span]);
            for ((bit, drawn), (value, error)) in places.zip(pairs) {
                let sign = word >> (bit as u32) << 31;
                *drawn = value + f32::from_bits(error.to_bits() ^ sign);
            }
            signs.word >>= count;
            signs.left -= count;
            at += count;
        }
    }
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
    /// Its slices, where ranks share K.
    of_ranks: Option<Ranks>,
}

/// What a draw makes of a chunk of a weight's rows.
struct DrawnChunk {
    /// The stream that the chunk names, and what is taken of it.
    stream: Random,
    signs: Signs,
    energies: Vec<f64>,
    /// `[x rows, w rows]`, and so are the accumulations' variances, where they are followed.
    dots: Vec<f64>,
    /// The same of each rank, where ranks share K.
    of_ranks: Vec<Vec<f64>>,
    chains: Option<Vec<f64>>,
}

thread_local! {
    /// Errors, drawn values and the same as f64, whose memory serves the next stretch again.
    static SCRATCH: Cell<(Vec<f32>, Vec<f32>, Widened)> = Cell::default();
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
    let dealt = parallel::parts(emulated.recipe(), &weight)?;
    let operands = draws
        .iter()
        .map(|&(number, x)| {
            let (mut errors, mut values) = (Vec::new(), Vec::new());
            match &dealt {
                None => {
                    let (codes, scales) = emulated.converted_activation(x, weight)?;
                    rounding_errors(Rows::all(x.data(), &codes, &scales), &mut errors);
                }
                Some(parts) => {
                    errors = errors_by_part(x, parts, |x| emulated.quantise_activation(x));
                }
            }
            let mut signs = Signs::of(stream_of(number, x.data()));
            redraw(&mut signs, x.data(), &errors, &mut values);
            let wide = Widened::of(&values, width);
            let of_ranks =
                dealt.clone().map(|parts| Ranks::of(&Tensor::new(width, values.clone()), parts));
            Ok(DrawnOperand { number, energies: wide.energies(), values, wide, of_ranks })
        })
        .collect::<Result<Vec<DrawnOperand>, ComputeError>>()?;
    let inner = dealt.as_ref().and_then(|parts| parts.first()).map_or(width, Range::len);
    let accumulation = floor.accumulation(inner);
    let chunks = emulated.by_converted_chunk(weight, |first, rows, before, converted| {
        let (codes, scales) = converted;
        let count = rows.len() / width;
        let start = |x: &DrawnOperand| {
            // A weight is large, and its name says as much as its values.
            let parts: [&[u8]; 3] =
                [&x.number.to_le_bytes(), &(first as u64).to_le_bytes(), weight.name().as_bytes()];
            let stream = Random::named("runner 2026 drawn roundings of weights v1", &parts);
            DrawnChunk {
                stream,
                signs: Signs::of(stream),
                energies: Vec::with_capacity(count),
                dots: vec![0.0; x.energies.len() * count],
                of_ranks: Vec::new(),
                chains: None,
            }
        };
        let mut made: Vec<DrawnChunk> = operands.iter().map(start).collect();
        for part in Rows::all(rows, codes, scales).after(before).stretches() {
            let (mut errors, mut w, mut wide) = SCRATCH.take();
            rounding_errors(part, &mut errors);
            let place = (part.first, part.count());
            for (x, made) in operands.iter().zip(&mut made) {
                redraw(&mut made.signs, part.values, &errors, &mut w);
                wide.refill(&w, width);
                made.energies.extend(wide.energies());
                set_columns(&mut made.dots, count, place, &dot_rows(&x.wide, &wide));
                let chains = match &x.of_ranks {
                    None => floor.chains(&x.values, &w, width),
                    Some(ranks) => {
                        let (dots, chains) = ranks.meet(floor, &w, width);
                        let empty = vec![0.0; x.energies.len() * count];
                        made.of_ranks.resize(dots.len(), empty);
                        for (all, dots) in made.of_ranks.iter_mut().zip(&dots) {
                            set_columns(all, count, place, dots);
                        }
                        chains
                    }
                };
                if let Some(chains) = chains {
                    let all =
                        made.chains.get_or_insert_with(|| vec![0.0; x.energies.len() * count]);
                    set_columns(all, count, place, &chains);
                }
            }
            SCRATCH.set((errors, w, wide));
        }
        let finish = |(x, mut made): (&DrawnOperand, DrawnChunk)| {
            let mut y: Vec<f32> = Vec::with_capacity(made.dots.len());
            let signs = Random::at(!made.stream.bits()).signs();
            let each = x.energies.iter().flat_map(|x| made.energies.iter().map(move |w| x * w));
            for (index, ((&dot, energies), sign)) in
                made.dots.iter().zip(each).zip(signs).enumerate()
            {
                // sum (x w)^2, as if it did not matter which x meets which w.
                let terms = energies / width as f64;
                let chain = made.chains.as_ref().map(|chains| chains[index]);
                let bias = bias.as_ref().map(|b| f64::from(b[first + index % count]));
                let moved = if made.of_ranks.is_empty() {
                    floor.after_operands(accumulation, dot, terms, chain)
                } else {
                    let dots: Vec<f64> = made.of_ranks.iter().map(|dots| dots[index]).collect();
                    floor.after_ranks(accumulation, &dots, terms, chain, bias)
                };
                y.push((dot + f64::from(sign) * moved.sqrt() + bias.unwrap_or(0.0)) as f32);
            }
            Tensor::new(count, y)
        };
        Ok((first, operands.iter().zip(made).map(finish).collect::<Vec<Tensor>>()))
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
            // Each draw's own call, with its own rows of every tensor.
            _ => {
                let mut operands = Vec::new();
                call.with_operands(|x| {
                    operands.push(self.apart(x));
                    x
                });
                let made = self.draws.iter().enumerate().map(|(place, draw)| {
                    let mut parts = operands.iter();
                    let own = |x| parts.next().map_or(x, |parts| &parts[place]);
                    draw.compute(&call.with_operands(own))
                });
                Ok(together(&made.collect::<Result<Vec<_>, _>>()?))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::AttentionShape;
    use crate::compute::call::MadeWeight;
    use crate::model::Activation;

    const RECIPE: &str = r#"{ "gemm": "e4m3", "scale": { "weight": "tensor", "activation": "tensor" },
        "accumulate": "promoted", "output": "bf16", "chip": "hopper" }"#;

    #[test]
    fn draws_together_are_each_draw_alone() {
        let recipe: Recipe = serde_json::from_str(RECIPE).expect("a recipe");
        let draws = Draws::new(&recipe, 3..6).expect("draws");
        let tensor = |rows: usize, width: usize, seed: u64| {
            let value = |index: usize| {
                let mut bits = Random::at(seed << 32 | index as u64);
                bits.below(2000) as f32 / 1000.0 - 1.0
            };
            Tensor::new(width, (0..rows * width).map(value).collect())
        };
        let of = |width: usize, seed: u64| -> Vec<Tensor> {
            (0..3u64).map(|draw| tensor(4, width, 10 * seed + draw)).collect()
        };
        let (a, b, c) = (of(32, 1), of(32, 2), of(32, 3));
        let made = MadeWeight::new("gain".to_owned(), 1, tensor(1, 32, 99).data());
        let gain = made.weight().expect("a gain");
        let shape = AttentionShape::causal(2, 2, 16, 0);
        let [all_a, all_b, all_c] = [&a, &b, &c].map(|parts| together(parts));
        let call = |kind: usize, a, b, c| match kind {
            0 => Call::RmsNorm { x: a, gain, eps: 1e-6 },
            1 => Call::Attention { q: a, k: b, v: c, shape },
            2 => Call::Gated { gate: a, up: b, activation: Activation::Silu },
            3 => Call::SigmoidGate { x: a, gate: b },
            _ => Call::Add { a, b },
        };
        for kind in 0..5 {
            let whole = draws.compute(&call(kind, &all_a, &all_b, &all_c)).expect("a call");
            let parts = draws.apart(&whole);
            for (place, draw) in draws.draws.iter().enumerate() {
                let own = draw.compute(&call(kind, &a[place], &b[place], &c[place]));
                assert_eq!(parts[place], own.expect("a call"), "{kind} of draw {place}");
            }
        }
    }
}
