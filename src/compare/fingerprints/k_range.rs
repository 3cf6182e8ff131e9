//! Products that are left out or counted twice: a tail of K, or a block of it.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, matmul_rows, only_inner, scaled};
use crate::dtype::Format;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a part of K is left out or counted twice",
    causes: &["k-tail-dropped", "k-block-lost", "k-block-twice"],
    bugs: &[],
    test,
};

/// Tails that kernels forget: what is left of a vector, an instruction or a tile.
const TAILS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Widths of blocks.
const BLOCKS: [usize; 3] = [32, 64, 128];
/// Most blocks of a width that are tried; of a longer K the first ones.
const MOST_BLOCKS: usize = 64;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let inner = gemm.x.width();
    let mut fits = Vec::new();
    for tail in TAILS.into_iter().filter(|tail| *tail < inner) {
        let last = inner - tail;
        let x: &Edit = &|operand| only_inner(operand, |k| k < last);
        let steps = Steps { x, ..Steps::of(case.recipe) };
        let detail = format!("the last {tail} of {inner} products are dropped");
        fits.extend(case.fit_gemm("k-tail-dropped", detail, gemm, &steps)?);
    }
    for width in BLOCKS.into_iter().filter(|width| *width < inner) {
        let Some((block, weight)) = strongest_block(case, width)? else { continue };
        let range = block * width..((block + 1) * width).min(inner);
        let (first, last) = (range.start, range.end - 1);
        if weight < 0.0 {
            let x: &Edit = &|operand| only_inner(operand, |k| !range.contains(&k));
            let steps = Steps { x, ..Steps::of(case.recipe) };
            let detail = format!("products {first} to {last} of {inner} are lost");
            fits.extend(case.fit_gemm("k-block-lost", detail, gemm, &steps)?);
        } else {
            let Some(part) = part_of(case, range)? else { continue };
            let mut predicted = case.clean.clone();
            for (y, part) in predicted.data_mut().iter_mut().zip(part.data()) {
                *y += part;
            }
            let detail = format!("products {first} to {last} of {inner} are counted twice");
            fits.extend(case.fit_if_any("k-block-twice", detail, 0, &predicted));
        }
    }
    Ok(fits)
}

/// The contribution of some products to every output.
fn part_of(
    case: &Case<'_>,
    range: std::ops::Range<usize>,
) -> Result<Option<crate::tensor::Tensor>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(None) };
    let x: &Edit = &|operand| only_inner(scaled(operand, |scale| scale), |k| range.contains(&k));
    let steps = Steps { x, output: Format::F32, ..Steps::of(case.recipe) };
    let rows = 0..gemm.weight.rows();
    let operands = (gemm.x, gemm.weight, None);
    Ok(Some(matmul_rows(case.arm, case.recipe, operands, rows, &steps)?))
}

/// The block whose contribution explains most of the difference on the screened
/// columns, and with which factor.
fn strongest_block(case: &Case<'_>, width: usize) -> Result<Option<(usize, f64)>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(None) };
    let columns = case.screen();
    let inner = gemm.x.width();
    let mut best: Option<(f64, usize, f64)> = None;
    for block in 0..inner.div_ceil(width).min(MOST_BLOCKS) {
        let range = block * width..((block + 1) * width).min(inner);
        let x: &Edit = &|operand| only_inner(operand, |k| range.contains(&k));
        let steps = Steps { x, output: Format::F32, ..Steps::of(case.recipe) };
        let operands = (gemm.x, gemm.weight, None);
        let part = matmul_rows(case.arm, case.recipe, operands, columns.clone(), &steps)?;
        let (mut dp, mut pp) = (0.0, 0.0);
        for row in 0..part.rows() {
            let subject = &case.subject.row(row)[columns.clone()];
            let clean = &case.clean.row(row)[columns.clone()];
            for ((&s, &c), &p) in subject.iter().zip(clean).zip(part.row(row)) {
                let (difference, p) = (f64::from(s) - f64::from(c), f64::from(p));
                if difference.is_finite() {
                    dp += difference * p;
                    pp += p * p;
                }
            }
        }
        let gained = if pp > 0.0 { dp * dp / pp } else { 0.0 };
        if pp > 0.0 && best.is_none_or(|(most, ..)| gained > most) {
            best = Some((gained, block, dp / pp));
        }
    }
    Ok(best.map(|(_, block, weight)| (block, weight)))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn a_dropped_tail_and_a_lost_block_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.ffn_up.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let tail: &Edit = &|operand| only_inner(operand, |k| k < 248);
        let block: &Edit = &|operand| only_inner(operand, |k| k / 32 != 3);
        for (cause, x_edit) in [("k-tail-dropped", tail), ("k-block-lost", block)] {
            let steps = Steps { x: x_edit, ..Steps::of(&bench.recipe) };
            bench.expect(cause, &call, &bench.matmul(&x, weight, &steps));
        }
    }
}
