//! The reference whose products a GPU computes: in f64, with the lanes and the order of the CPU's,
//! so with the same bits.
//!
//! Weights are decoded by the CPU, as for the reference there, and stay on the GPU where they fit.
//! Of every product some outputs are computed on the CPU too and must agree to the bit: the result
//! is kept under the key of the CPU's, and a GPU that errs must not reach it. Every other op is the
//! CPU's own.

use std::time::Instant;

use rayon::prelude::*;

use super::arm::download;
use super::gpu::{DeviceError, Gpu, Lease, State};
use super::kernels::ReferenceShape;
use super::weights::{CHUNK, Digests, Entry, Form};
use super::{MeasuredReference, enabled};
use crate::compute::call::Call;
use crate::compute::emulated::identify::spread;
use crate::compute::reference::{Reference, Widened, dot_rows, finished};
use crate::compute::{ComputeError, Ops, check_interrupt, check_matmul};
use crate::model::Weight;
use crate::tensor::Tensor;

/// Rows of a weight whose outputs are computed on the CPU too.
const SAMPLED: usize = 8;

/// The reference arm with its products on one GPU.
pub struct ReferenceOnGpu {
    gpu: Lease,
    digests: Digests,
}

impl ReferenceOnGpu {
    /// The arm on that GPU.
    pub fn new(gpu: Lease) -> ReferenceOnGpu {
        ReferenceOnGpu { gpu, digests: Digests::default() }
    }

    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_interrupt()?;
        check_matmul(x, &weight, bias.as_ref())?;
        if x.data().is_empty() || weight.rows() == 0 {
            return Reference.matmul(x, weight, bias);
        }
        let y = self.product(x, weight, bias)?;
        if y.data().iter().any(|value| value.is_nan()) {
            // Which of all NaN it is, is the processor's own choice.
            return Reference.matmul(x, weight, bias);
        }
        let rows = sampled_rows(weight.name(), weight.rows());
        let expected = Reference.outputs_at(x, weight, bias, &rows)?;
        match first_difference(&y, &expected, &rows) {
            None => Ok(y),
            Some(found) => Err(ComputeError::Device {
                gpu: format!("GPU {} ({})", self.gpu.facts.ordinal, self.gpu.facts.name),
                what: what(weight),
                problem: format!(
                    "{found}: the GPU, its driver or its compiler errs, and nothing of it was \
                     kept; write `--reference-on cpu`, and look at the GPU with `runner chip \
                     measure --reference`"
                ),
            }),
        }
    }

    fn product(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let digest = self.digests.of(weight);
        let (outputs, width) = (weight.rows(), weight.width());
        let step = (CHUNK / width).max(1);
        self.gpu.with(&what(weight), |state| {
            let there = state.stream.clone_htod(x.data())?;
            let bias = bias.as_ref().map(|bias| state.stream.clone_htod(bias)).transpose()?;
            let mut y = state.stream.alloc_zeros::<f32>(x.rows() * outputs)?;
            for first in (0..outputs).step_by(step) {
                let rows = step.min(outputs - first);
                let State { weights, stream, kernels, .. } = state;
                let form = Form::Decoded { first, rows };
                let entry = weights.get(stream, kernels, weight, &digest, form)?;
                let Entry::Values(w) = entry.as_ref() else {
                    return Err(DeviceError::Refused("a weight of another form".to_owned()));
                };
                let shape = ReferenceShape {
                    rows: x.rows() as u64,
                    outputs: rows as u64,
                    width: width as u64,
                    first: first as u64,
                    stride: outputs as u64,
                };
                kernels.reference_product(stream, &there, w, bias.as_ref(), shape, &mut y)?;
            }
            download(state, &y, outputs)
        })
    }
}

impl Ops for ReferenceOnGpu {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        match *call {
            Call::Matmul { x, weight, bias } => self.matmul(x, weight, bias),
            Call::Experts(products) => {
                let made =
                    products.by_expert(|x, weight, bias| Ok([self.matmul(x, weight, bias)?]));
                made.map(|[y]| y)
            }
            _ => call.on(&Reference),
        }
    }
}

fn what(weight: Weight<'_>) -> String {
    format!("the reference's product with `{}`", weight.name())
}

/// The rows of a weight that are sampled: spread over all of them, from a place that is each
/// weight's own.
fn sampled_rows(name: &str, rows: usize) -> Vec<usize> {
    let hash = blake3::hash(name.as_bytes());
    let [a, b, c, d, ..] = *hash.as_bytes();
    let shift = u32::from_le_bytes([a, b, c, d]) as usize;
    spread(rows, SAMPLED).into_iter().map(|row| (row + shift) % rows).collect()
}

/// Where sampled outputs differ in their bits from the CPU's, in words.
fn first_difference(y: &Tensor, expected: &Tensor, rows: &[usize]) -> Option<String> {
    let mut differing = 0;
    let mut first = None;
    for token in 0..y.rows() {
        for (&row, expected) in rows.iter().zip(expected.row(token)) {
            let observed = y.row(token)[row];
            if observed.to_bits() != expected.to_bits() {
                differing += 1;
                first.get_or_insert((token, row, observed, *expected));
            }
        }
    }
    let (token, row, observed, expected) = first?;
    let sampled = y.rows() * rows.len();
    Some(format!(
        "{differing} of {sampled} sampled outputs differ in their bits from the CPU's (token \
         {token}, output {row}: {observed:e}, not {expected:e})"
    ))
}

/// Holds every output of a seeded product to the CPU's bits, with a bias and without.
///
/// # Errors
/// If there is no GPU, or if it fails.
pub fn measure_reference(
    [rows, outputs, width]: [usize; 3],
    programs: Option<&std::path::Path>,
) -> Result<MeasuredReference, ComputeError> {
    let gpus = enabled::gpus(programs).map_err(|why| ComputeError::Recipe(why.clone()))?;
    let gpu = gpus.first().ok_or_else(|| ComputeError::Recipe("no CUDA device".to_owned()))?;
    let (x, w) = (seeded(rows * width, 1), seeded(outputs * width, 2));
    let bias = seeded(outputs, 3);
    let mut found = MeasuredReference::default();
    for bias in [None, Some(&bias)] {
        let (y, seconds) = timed(gpu, (&x, &w, bias), [rows, outputs, width])?;
        let expected = on_cpu((&x, &w, bias), [rows, outputs, width]);
        found.compared += y.len();
        let pairs = y.iter().zip(&expected);
        found.differing += pairs.filter(|(y, e)| y.to_bits() != e.to_bits()).count();
        found.seconds = seconds;
    }
    Ok(found)
}

type Operands<'a> = (&'a [f32], &'a [f32], Option<&'a Vec<f32>>);

/// The product, and the seconds of its second launch.
fn timed(
    gpu: &Gpu,
    (x, w, bias): Operands<'_>,
    [rows, outputs, width]: [usize; 3],
) -> Result<(Vec<f32>, f64), ComputeError> {
    gpu.with("a measured product of the reference", |state| {
        let State { stream, kernels, .. } = state;
        let (x, w) = (stream.clone_htod(x)?, stream.clone_htod(w)?);
        let bias = bias.map(|bias| stream.clone_htod(bias)).transpose()?;
        let mut y = stream.alloc_zeros::<f32>(rows * outputs)?;
        let shape = ReferenceShape {
            rows: rows as u64,
            outputs: outputs as u64,
            width: width as u64,
            first: 0,
            stride: outputs as u64,
        };
        let mut seconds = 0.0;
        for _ in 0..2 {
            stream.synchronize()?;
            let started = Instant::now();
            kernels.reference_product(stream, &x, &w, bias.as_ref(), shape, &mut y)?;
            stream.synchronize()?;
            seconds = started.elapsed().as_secs_f64();
        }
        let host = stream.clone_dtoh(&y)?;
        stream.synchronize()?;
        Ok((host, seconds))
    })
}

/// The same product as the reference computes it.
fn on_cpu((x, w, bias): Operands<'_>, [rows, outputs, width]: [usize; 3]) -> Vec<f32> {
    let x = Widened::of(x, width);
    let columns: Vec<Vec<f32>> = w
        .par_chunks(width)
        .enumerate()
        .map(|(output, w)| {
            let bias = bias.map(|bias| bias[output]);
            dot_rows(&x, &Widened::of(w, width)).iter().map(|dot| finished(*dot, bias)).collect()
        })
        .collect();
    (0..rows)
        .flat_map(|row| (0..outputs).map(move |at| (row, at)))
        .map(|(r, o)| columns[o][r])
        .collect()
}

/// Values of many magnitudes and both signs.
fn seeded(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut value = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = (state >> 32) as u32;
        let magnitude = f32::from_bits((bits & 0x007f_ffff) | (117 + (bits >> 23 & 15)) << 23);
        if bits >> 31 == 0 { magnitude } else { -magnitude }
    };
    (0..count).map(|_| value()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sampled_output_with_another_bit_is_said_with_its_place() {
        let rows = sampled_rows("blk.0.ffn_up.weight", 5);
        assert_eq!(rows.len(), 5, "a small weight is sampled whole");
        let y = Tensor::new(5, (0..10).map(|value| value as f32).collect());
        let at = |y: &Tensor| {
            let values = (0..2).flat_map(|token| rows.iter().map(move |row| (token, *row)));
            Tensor::new(5, values.map(|(token, row)| y.row(token)[row]).collect())
        };
        let expected = at(&y);
        assert_eq!(first_difference(&y, &expected, &rows), None);
        let mut wrong = y.clone();
        wrong.row_mut(1)[3] = f32::from_bits(8.0f32.to_bits() + 1);
        let said = first_difference(&wrong, &expected, &rows).expect("another bit");
        assert!(said.starts_with("1 of 10 sampled outputs differ"), "{said}");
        assert!(said.contains("token 1, output 3"), "{said}");
    }

    #[test]
    fn samples_are_of_the_weight_and_spread_over_it() {
        let rows = sampled_rows("blk.7.attn_q.weight", 3584);
        let mut sorted = rows.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), SAMPLED);
        assert!(sorted.iter().all(|row| *row < 3584));
        assert_ne!(rows, sampled_rows("blk.8.attn_q.weight", 3584));
    }
}
