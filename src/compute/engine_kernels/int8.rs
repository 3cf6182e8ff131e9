//! INT8 in engines: activations per token, weights per output, sums in 32-bit integers.
//!
//! | step | arithmetic |
//! | --- | --- |
//! | vLLM, the scale of a token | `absmax / 127` |
//! | vLLM, a code | `x * (127 / absmax)`, rounded to the nearest even integer |
//! | CUTLASS | the exact sum, rounded to f32; `sx (sw sum)`, with a bias `fma(sx, sw sum, bias)` |
//!
//! Evidence: whole passes of vLLM 0.26 on an H200 over a compressed-tensors checkpoint.

use rayon::prelude::*;

use crate::compute::emulated::quantize::absmax;
use crate::dtype::Format;
use crate::tensor::Tensor;

/// The largest code.
const MOST: f32 = 127.0;

/// A weight's codes, row-major, and what makes values of them.
pub struct Weight<'a> {
    /// `[outputs, inner]`, signed.
    pub codes: &'a [u8],
    /// One for each output.
    pub scales: Vec<f32>,
    /// As the engine holds it.
    pub bias: Option<Vec<f32>>,
}

/// The codes and the scale of a token, as `dynamic_scaled_int8_quant` makes them.
pub fn quantised(row: &[f32]) -> (Vec<i8>, f32) {
    let most = absmax(row);
    let inverse = if most == 0.0 { 0.0 } else { MOST / most };
    // A cast keeps within the type, and makes 0 of NaN; what the kernel makes of NaN was not recorded.
    let codes = row.iter().map(|x| (x * inverse).round_ties_even() as i8).collect();
    (codes, most / MOST)
}

/// `x w^T + bias`, rounded to `output`.
pub fn product(x: &Tensor, weight: &Weight<'_>, output: Format) -> Tensor {
    let (inner, outputs) = (x.width(), weight.scales.len());
    let mut y = Tensor::zeros(x.rows(), outputs);
    y.data_mut().par_chunks_mut(outputs.max(1)).enumerate().for_each(|(row, y)| {
        let (codes, of_token) = quantised(x.row(row));
        let rows = weight.codes.chunks_exact(inner).zip(&weight.scales);
        for (column, (value, (w, of_output))) in y.iter_mut().zip(rows).enumerate() {
            let sum = dot(&codes, w) as f32;
            let scaled = of_output * sum;
            let scaled = match &weight.bias {
                Some(bias) => of_token.mul_add(scaled, bias[column]),
                None => of_token * scaled,
            };
            *value = output.round(scaled);
        }
    });
    y
}

fn dot(x: &[i8], w: &[u8]) -> i32 {
    x.iter().zip(w).map(|(x, w)| i32::from(*x) * i32::from(*w as i8)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_rounded_to_even_and_a_row_of_zeros_is_zero() {
        let (codes, scale) = quantised(&[127.0, -0.5, 1.5, 2.5, -127.0]);
        assert_eq!((codes, scale), (vec![127, 0, 2, 2, -127], 1.0));
        assert_eq!(quantised(&[0.0, -0.0]), (vec![0, 0], 0.0));
    }
}
