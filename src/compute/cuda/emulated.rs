//! The emulated arm whose products a GPU computes by the emulation's kernels: in the order of the
//! chip that the recipe names, so with the bits of the CPU.
//!
//! Operands are converted by the CPU, as for the emulated arm there. Of every product some outputs are
//! computed on the CPU too and must agree to the bit: the result is kept under the key of the CPU's,
//! and a GPU that errs must not reach it. What no kernel multiplies (block-scaled operands,
//! AMD's matrix cores, an engine's own kernels, products dealt out to ranks) and every other op is the
//! CPU's own.

use super::emulation::{Emulation, multiplies};
use super::gpu::Lease;
use crate::compute::call::Call;
use crate::compute::emulated::arm::Emulated;
use crate::compute::emulated::gemm::{Operand, Scales};
use crate::compute::emulated::quantize::Codes;
use crate::compute::{ComputeError, Ops, check_interrupt, check_matmul, parallel};
use crate::model::Weight;
use crate::tensor::Tensor;

/// Elements of a weight that are multiplied in one launch: as f32 they take 1 GiB there.
const AT_ONCE: usize = 256 << 20;

/// The emulated arm with its products on one GPU.
pub struct EmulatedOnGpu {
    arm: Emulated,
    emulation: Emulation,
    /// That somebody computes there.
    _gpu: Lease,
}

impl EmulatedOnGpu {
    /// The arm on that GPU.
    pub fn new(arm: Emulated, emulation: Emulation, gpu: Lease) -> EmulatedOnGpu {
        EmulatedOnGpu { arm, emulation, _gpu: gpu }
    }

    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_interrupt()?;
        check_matmul(x, &weight, bias.as_ref())?;
        let of_ranks = parallel::parts(self.arm.recipe(), &weight)?.is_some();
        if self.arm.engine().is_some() || of_ranks {
            return self.arm.matmul(x, weight, bias);
        }
        match self.arm.of_weight(&weight)? {
            Some(arm) => self.product(&arm, x, weight, bias),
            None => self.product(&self.arm, x, weight, bias),
        }
    }

    /// The product with one weight, by the arm that multiplies it.
    fn product(
        &self,
        arm: &Emulated,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        let format = arm.recipe().gemm;
        let empty = x.data().is_empty() || weight.rows() == 0;
        if empty || arm.recipe().blocks().is_some() || !multiplies(arm.unit(), format, format) {
            return arm.matmul(x, weight, bias);
        }
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let (codes, scales) = arm.quantise_activation(x);
        let activation = Operand { codes: &codes, scales };
        let output = arm.before_bias(arm.recipe().output, bias.is_some());
        let chunks = arm.by_quantised_chunk(weight, |first, _, codes, scales| {
            Ok(Part { first, codes: codes.clone(), scales })
        })?;
        let mut y = Tensor::zeros(x.rows(), weight.rows());
        for parts in grouped(chunks, AT_ONCE / weight.width().max(1)) {
            check_interrupt()?;
            let Some(part) = joined(parts) else { continue };
            let operand = Operand { codes: &part.codes, scales: part.scales };
            let (unit, schedule) = (arm.unit(), arm.schedule());
            let product = self.emulation.product(unit, schedule, &activation, &operand, output);
            y.set_columns(part.first, &product?);
        }
        if let Some(bias) = bias {
            y.add_to_rows(&bias);
        }
        Ok(arm.streamed(y))
    }
}

/// Some rows of a weight.
struct Part {
    first: usize,
    codes: Codes,
    scales: Scales,
}

/// Neighbours together, each group of so many rows at most, but of one part at least.
fn grouped(parts: Vec<Part>, rows: usize) -> Vec<Vec<Part>> {
    let mut groups: Vec<Vec<Part>> = Vec::new();
    let mut held = usize::MAX;
    for part in parts {
        let more = part.codes.rows();
        match groups.last_mut().filter(|_| held.saturating_add(more) <= rows) {
            Some(group) => {
                group.push(part);
                held += more;
            }
            None => {
                groups.push(vec![part]);
                held = more;
            }
        }
    }
    groups
}

/// Parts that follow each other as one; nothing of none.
fn joined(parts: Vec<Part>) -> Option<Part> {
    let codes: Vec<&Codes> = parts.iter().map(|part| &part.codes).collect();
    let codes = Codes::joined(&codes)?;
    let mut parts = parts.into_iter();
    let Part { first, mut scales, .. } = parts.next()?;
    for part in parts {
        match (&mut scales, part.scales) {
            (Scales::Row(all), Scales::Row(more)) => all.extend(more),
            (Scales::Block128 { scales: all, .. }, Scales::Block128 { scales: more, .. }) => {
                all.extend(more);
            }
            // One scale of the whole weight.
            _ => {}
        }
    }
    Some(Part { first, codes, scales })
}

impl Ops for EmulatedOnGpu {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        match *call {
            Call::Matmul { x, weight, bias } => self.matmul(x, weight, bias),
            Call::Experts(products) if self.arm.engine().is_none() => {
                let made =
                    products.by_expert(|x, weight, bias| Ok([self.matmul(x, weight, bias)?]));
                made.map(|[y]| y)
            }
            _ => call.on(&self.arm),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Format;

    fn part(first: usize, rows: usize, scales: Scales) -> Part {
        Part { first, codes: Codes::zeros(Format::E4m3, rows, 8), scales }
    }

    #[test]
    fn rows_of_a_weight_are_joined_with_their_scales_and_kept_to_the_bound() {
        let rows = |first: usize, rows: usize| {
            let scales = (first..first + rows).map(|row| row as f32).collect();
            part(first, rows, Scales::Row(scales))
        };
        let parts = vec![rows(0, 256), rows(256, 256), rows(512, 256), rows(768, 20)];
        let groups = grouped(parts, 600);
        assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
        let whole: Vec<Part> = groups.into_iter().filter_map(joined).collect();
        assert_eq!(whole[1].first, 512);
        assert_eq!(whole[1].codes.rows(), 276);
        let Scales::Row(scales) = &whole[1].scales else { panic!("scales of rows") };
        assert_eq!((scales.len(), scales[0], scales[275]), (276, 512.0, 787.0));
        let large = grouped(vec![rows(0, 256), rows(256, 256)], 10);
        assert_eq!(large.len(), 2, "a part that is larger than the bound stands alone");
    }

    #[test]
    fn scales_of_blocks_follow_the_rows() {
        let block = |first: usize, at: f32| {
            let scales =
                Scales::Block128 { rows_per_block: 128, first_row: 0, scales: vec![at; 2] };
            part(first, 256, scales)
        };
        let whole = joined(vec![block(0, 1.0), block(256, 2.0)]).expect("parts");
        assert_eq!(whole.scales.at(300, 0, 8), 2.0);
        assert_eq!(whole.scales.at(255, 0, 8), 1.0);
    }
}
