//! Activations rounded to 8-bit integers in blocks: a CPU path that saves work.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::reference::Reference;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "activations were rounded to 8-bit integers in blocks, as llama.cpp's CPU path does",
    causes: &["quantised-activations"],
    bugs: &[],
    test,
};

/// Block sizes of Q8_0 and Q8_K.
const BLOCKS: [usize; 2] = [32, 256];
/// Larger weights are not multiplied again.
const LARGEST: usize = 1 << 23;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    if gemm.weight.rows() * gemm.weight.width() > LARGEST {
        return Ok(Vec::new());
    }
    let mut fits = Vec::new();
    for block in BLOCKS {
        let x = rounded(gemm.x, block);
        let call = Call::Matmul { x: &x, weight: gemm.weight, bias: gemm.bias };
        let predicted = Reference.matmul(&x, gemm.weight, gemm.bias)?;
        let detail = format!(
            "activations are rounded to 8-bit integers in blocks of {block}, weights are not"
        );
        fits.extend(case.fit_if_any("quantised-activations", detail, 0, &predicted));
        let detail = format!("activations are rounded to 8-bit integers in blocks of {block}");
        fits.extend(case.fit_call("quantised-activations", detail, &call)?);
    }
    Ok(fits)
}

/// Each block of a row on a grid of `absmax / 127`.
pub fn rounded(x: &Tensor, block: usize) -> Tensor {
    let mut y = x.clone();
    for row in 0..y.rows() {
        for block in y.row_mut(row).chunks_mut(block) {
            let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let step = if most > 0.0 { most / 127.0 } else { 1.0 };
            block.iter_mut().for_each(|x| *x = (*x / step).round() * step);
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn q8_blocks_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let wrong = Reference.matmul(&rounded(&x, 32), weight, None).expect("a product");
        bench.expect("quantised-activations", &call, &wrong);
    }
}
