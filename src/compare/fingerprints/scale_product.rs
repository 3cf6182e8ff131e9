//! The product of two scales in f16: where it is too small for that type it becomes 0, and a
//! block of products vanishes.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{BLOCK, matmul_by_factor, operands};
use crate::compute::emulated::gemm::Scales;
use crate::dtype::Format;
use crate::model::{Weight, WeightType};
use crate::tensor::Tensor;
use crate::text::grouped;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the product of the operands' scales is formed in f16",
    causes: &["scale-product"],
    bugs: &[],
    test,
};

/// Larger weights are not multiplied again.
const LARGEST: usize = 1 << 23;
/// More products are not made one by one.
const MOST_PRODUCTS: usize = 1 << 28;
/// Values of a block of ggml's that share a scale.
const GGML_BLOCK: usize = 32;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (x, weight) = (gemm.x, gemm.weight);
    if weight.rows() * weight.width() > LARGEST {
        return Ok(Vec::new());
    }
    let in_words = |lost: usize, all: usize| match lost {
        0 => "the product of the operands' scales is rounded to f16".to_owned(),
        _ => format!(
            "the product of the operands' scales is formed in f16: {} of {} underflow to 0",
            grouped(lost),
            grouped(all)
        ),
    };
    if let Some((predicted, lost, all)) = by_ggml(x, weight)? {
        let mut predicted = predicted;
        if let Some(bias) = gemm.bias {
            predicted.add_to_rows(&bias.to_vec()?);
        }
        let detail = in_words(lost, all);
        return Ok(case.fit_if_any("scale-product", detail, 0, &predicted).into_iter().collect());
    }
    if !case.multiplies_codes() {
        return Ok(Vec::new());
    }
    let predicted = match matmul_by_factor(case.arm, case.recipe, (x, weight, gemm.bias), in_f16) {
        // The engine gives this weight to a kernel that is not known.
        Err(ComputeError::Recipe(_) | ComputeError::Gemm(_)) => return Ok(Vec::new()),
        predicted => predicted?,
    };
    let [(x_codes, of_x, _), (w_codes, of_w, _)] = operands(case.arm, x, weight)?;
    let width = x_codes.width();
    let blocks = if matches!(of_x, Scales::Block128 { .. }) { width.div_ceil(BLOCK) } else { 1 };
    let underflow = |block: usize| -> usize {
        let of_w: Vec<f32> =
            (0..w_codes.rows()).map(|row| of_w.at(row, block * BLOCK, width)).collect();
        let of_x = (0..x_codes.rows()).map(|row| of_x.at(row, block * BLOCK, width));
        of_x.map(|x| of_w.iter().filter(|w| in_f16(x * *w) == 0.0).count()).sum()
    };
    let lost = (0..blocks).map(underflow).sum();
    let detail = in_words(lost, x_codes.rows() * w_codes.rows() * blocks);
    Ok(case.fit_if_any("scale-product", detail, 0, &predicted).into_iter().collect())
}

fn in_f16(scale: f32) -> f32 {
    Format::F16.round(scale)
}

/// The product with a weight of ggml's whose blocks have one scale, activations rounded to 8 bits:
/// each block's sum times `f16(d_w d_x)`. With it how many of those products are 0, and of how many.
fn by_ggml(x: &Tensor, weight: Weight<'_>) -> Result<Option<(Tensor, usize, usize)>, ComputeError> {
    let kind = weight.kind();
    let one_scale = matches!(kind, WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0);
    let fits = x.width() == weight.width() && x.width().is_multiple_of(GGML_BLOCK);
    if !one_scale || !weight.is_plain() || !fits || x.data().len() * weight.rows() > MOST_PRODUCTS {
        return Ok(None);
    }
    let blocks = x.width() / GGML_BLOCK;
    // A block begins with its scale.
    let scale_of =
        |bytes: &[u8]| Format::F16.decode(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])));
    let w_scales: Vec<f32> = weight.bytes().chunks(kind.block_bytes()).map(scale_of).collect();
    let values = weight.to_vec()?;
    let (mut lost, mut y) = (0, Tensor::zeros(x.rows(), weight.rows()));
    for row in 0..x.rows() {
        for block in 0..blocks {
            let inner = block * GGML_BLOCK..(block + 1) * GGML_BLOCK;
            let x = &x.row(row)[inner.clone()];
            let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            if most == 0.0 {
                continue;
            }
            let x_scale = in_f16(most / 127.0);
            let codes: Vec<f32> = x.iter().map(|x| (x * (127.0 / most)).round()).collect();
            for (column, y) in y.row_mut(row).iter_mut().enumerate() {
                let w_scale = w_scales[column * blocks + block];
                let factor = in_f16(w_scale * x_scale);
                lost += usize::from(factor == 0.0 && w_scale != 0.0);
                if w_scale == 0.0 || factor == 0.0 {
                    continue;
                }
                let w = &values[column * weight.width()..][inner.clone()];
                let sum: f32 = w.iter().zip(&codes).map(|(w, code)| w / w_scale * code).sum();
                *y += sum * factor;
            }
        }
    }
    Ok(Some((y, lost, x.rows() * w_scales.len())))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::op::{ActivationScale, WeightScale};

    #[test]
    fn a_product_of_scales_in_f16_is_recognised() {
        let bench = Bench::with_scales(WeightScale::Channel, ActivationScale::Token);
        // The scales are 1e-3 and 1e-4: some tens of the smallest f16.
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.ffn_up.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let wrong = matmul_by_factor(&bench.arm, &bench.recipe, (&x, weight, None), in_f16);
        bench.expect("scale-product", &call, &wrong.expect("a product"));
    }

    #[test]
    fn blocks_of_q8_0_whose_scales_multiply_to_nothing_are_recognised() {
        let bench = Bench::default();
        // The second block of each row has a scale of 1e-4; the activation's is 8e-6 there.
        let (rows, width) = (48, 64);
        let mut bytes = Vec::new();
        for block in 0..rows * width / 32 {
            let scale: f32 = if block % 2 == 1 { 1e-4 } else { 1e-2 };
            bytes.extend((Format::F16.encode(scale) as u16).to_le_bytes());
            bytes.extend(
                (0..32u8).map(|k| k.wrapping_mul(37).wrapping_add((block as u8).wrapping_mul(11))),
            );
        }
        let weight = Weight::new("w", WeightType::Q8_0, rows, width, &bytes).expect("a weight");
        let x = bench.tensor(6, width, 1);
        let quiet = |(k, x): (usize, &f32)| if k % width >= 32 { x * 1e-4 } else { x * 1e-2 };
        let x = Tensor::new(width, x.data().iter().enumerate().map(quiet).collect());
        let (wrong, lost, all) = by_ggml(&x, weight).expect("values").expect("known");
        // Every second block's product, 8e-10 at most, is below the smallest f16.
        assert_eq!((lost, all), (6 * rows, 6 * rows * 2));
        let call = Call::Matmul { x: &x, weight, bias: None };
        let fits = bench.found(&call, &wrong, test);
        assert!(fits[0].names_the_bug() && fits[0].detail.contains("underflow"), "{fits:#?}");
    }
}
