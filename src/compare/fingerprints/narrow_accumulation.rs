//! Sums that are kept in a narrow type: partial sums of a split K written as bf16 or f16,
//! or an f16 accumulator.

use super::{Case, Fingerprint, Fit, square_of_difference};
use crate::compute::ComputeError;
use crate::compute::departure::{Edit, Steps, matmul_rows, only_inner};
use crate::dtype::Format;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "sums are kept in a narrow type: partial sums of a split K, or the accumulator",
    causes: &["narrow-partials", "narrow-accumulator"],
    bugs: &[],
    test,
};

/// Parts of K whose sums some kernels write in the output's type.
const PARTS: [usize; 9] = [2, 3, 4, 5, 6, 7, 8, 12, 16];
/// Products that are added at once before an accumulator rounds.
const STEPS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Elements of K that a part begins at.
const UNIT: usize = 64;
/// Sums in a narrow type cost less than this share of the result's energy; what costs more
/// is something else, and is not computed here.
const MOST: f64 = 1e-2;
/// The share of the difference that must be explained on some rows and columns.
const PROMISING: f64 = 0.5;
/// Rows and columns on which a hypothesis is tried first.
const SAMPLE: (usize, usize) = (16, 64);
/// Multiplications that one accumulator may cost.
const MOST_PRODUCTS: usize = 1 << 30;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let width = case.subject.width();
    let size: f64 = case.clean.data().iter().map(|&c| square_of_difference(c, 0.0)).sum();
    let off = case.energy(case.clean, 0..width);
    if off == 0.0 || off > MOST * size || gemm.bias.is_some() || case.recipe.gemm.is_scaled() {
        return Ok(Vec::new());
    }
    let mut fits = partials(case)?;
    if !fits.iter().any(Fit::names_the_bug) {
        fits.extend(accumulators(case)?);
    }
    fits.retain(Fit::names_the_bug);
    Ok(fits)
}

/// Parts of K, each summed for itself, rounded, and added to the others.
fn partials(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (inner, width) = (gemm.x.width(), case.subject.width());
    let mut fits = Vec::new();
    for parts in PARTS {
        let part = inner.div_ceil(UNIT).div_ceil(parts) * UNIT;
        if part * (parts - 1) >= inner {
            continue;
        }
        let sum_of = |columns: std::ops::Range<usize>, format: Format, in_place: bool| {
            let mut sum = Tensor::zeros(gemm.x.rows(), columns.len());
            for start in (0..inner).step_by(part) {
                let range = start..(start + part).min(inner);
                let x: &Edit = &|operand| only_inner(operand, |k| range.contains(&k));
                let steps = Steps { x, output: Format::F32, ..Steps::of(case.recipe) };
                let operands = (gemm.x, gemm.weight, None);
                let y = matmul_rows(case.arm, case.recipe, operands, columns.clone(), &steps)?;
                for (sum, y) in sum.data_mut().iter_mut().zip(y.data()) {
                    *sum += format.round(*y);
                    if in_place {
                        *sum = format.round(*sum);
                    }
                }
            }
            let output = case.recipe.output;
            sum.data_mut().iter_mut().for_each(|sum| *sum = output.round(*sum));
            Ok::<Tensor, ComputeError>(sum)
        };
        for format in [Format::Bf16, Format::F16] {
            for in_place in [false, true] {
                let columns = case.screen();
                let tried = sum_of(columns.clone(), format, in_place)?;
                if !promising(case, &tried, 0..gemm.x.rows(), columns) {
                    continue;
                }
                let added = if in_place { format.name() } else { "f32" };
                let detail = format!(
                    "K is cut into {parts} parts whose sums are kept in {format} and added in {added}"
                );
                let whole = sum_of(0..width, format, in_place)?;
                fits.extend(case.fit_if_any("narrow-partials", detail, 1, &whole));
            }
        }
    }
    Ok(fits)
}

/// One accumulator all along K that rounds to a narrow type after every few products.
fn accumulators(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let inner = gemm.x.width();
    let (rows, width) = (case.subject.rows(), case.subject.width());
    let sum_of = |rows: usize, columns: usize, format: Format, step: usize| {
        let mut weight = vec![0.0; columns * inner];
        gemm.weight.decode_rows(0..columns, &mut weight)?;
        let round = |value: &f32| case.recipe.gemm.round(*value);
        let weight: Vec<f32> = weight.iter().map(round).collect();
        let mut data = Vec::with_capacity(rows * columns);
        for row in 0..rows {
            let x: Vec<f32> = gemm.x.row(row).iter().map(round).collect();
            for w in weight.chunks_exact(inner) {
                let mut sum = 0.0f32;
                for (x, w) in x.chunks(step).zip(w.chunks(step)) {
                    let some: f64 =
                        x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    sum = format.round((f64::from(sum) + some) as f32);
                }
                data.push(case.recipe.output.round(sum));
            }
        }
        Ok::<Tensor, ComputeError>(Tensor::new(columns, data))
    };
    let mut fits = Vec::new();
    for format in [Format::F16, Format::Bf16] {
        for step in STEPS.into_iter().filter(|step| *step < inner) {
            let (some_rows, some) = (SAMPLE.0.min(rows), SAMPLE.1.min(width));
            let tried = sum_of(some_rows, some, format, step)?;
            if !promising(case, &tried, 0..some_rows, 0..some)
                || rows * width * inner > MOST_PRODUCTS
            {
                continue;
            }
            let detail =
                format!("the accumulator is {format} and rounds after every {step} products");
            let whole = sum_of(rows, width, format, step)?;
            fits.extend(case.fit_if_any("narrow-accumulator", detail, 1, &whole));
        }
    }
    Ok(fits)
}

/// Whether a tried part of the result explains most of the difference there.
fn promising(
    case: &Case<'_>,
    tried: &Tensor,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
) -> bool {
    let (mut rest, mut whole) = (0.0, 0.0);
    for (place, row) in rows.enumerate() {
        let subject = &case.subject.row(row)[columns.clone()];
        let clean = &case.clean.row(row)[columns.clone()];
        for ((&s, &c), &t) in subject.iter().zip(clean).zip(tried.row(place)) {
            rest += square_of_difference(s, t);
            whole += square_of_difference(s, c);
        }
    }
    rest <= (1.0 - PROMISING) * whole
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::compute::emulated::arm::Emulated;
    use crate::op::Recipe;

    fn bf16() -> Bench {
        let bench = Bench::default();
        let recipe = Recipe { gemm: Format::Bf16, ..bench.recipe };
        Bench { recipe, arm: Emulated::new(&recipe).expect("a recipe"), ..bench }
    }

    #[test]
    fn partial_sums_in_bf16_are_recognised() {
        let bench = bf16();
        let x = bench.tensor(16, 768, 1);
        let weight = bench.weight("blk.1.ffn_down.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let mut wrong = Tensor::zeros(16, weight.rows());
        for start in (0..768).step_by(192) {
            let part: &Edit = &|operand| only_inner(operand, |k| k / 192 == start / 192);
            let steps = Steps { x: part, output: Format::Bf16, ..Steps::of(&bench.recipe) };
            let y = bench.matmul(&x, weight, &steps);
            wrong.data_mut().iter_mut().zip(y.data()).for_each(|(sum, y)| *sum += y);
        }
        wrong.data_mut().iter_mut().for_each(|y| *y = Format::Bf16.round(*y));
        bench.expect("narrow-partials", &call, &wrong);
    }

    #[test]
    fn an_f16_accumulator_is_recognised() {
        let bench = bf16();
        let x = bench.tensor(16, 768, 1);
        let weight = bench.weight("blk.1.ffn_down.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let w = weight.to_vec().expect("values");
        let mut data = Vec::new();
        for row in 0..16 {
            for w in w.chunks_exact(768) {
                let mut sum = 0.0f32;
                for (x, w) in x.row(row).chunks(16).zip(w.chunks(16)) {
                    let pairs = x.iter().zip(w);
                    let bf16 = |value: f32| f64::from(Format::Bf16.round(value));
                    let some: f64 = pairs.map(|(&x, &w)| bf16(x) * bf16(w)).sum();
                    sum = Format::F16.round((f64::from(sum) + some) as f32);
                }
                data.push(Format::Bf16.round(sum));
            }
        }
        bench.expect("narrow-accumulator", &call, &Tensor::new(weight.rows(), data));
    }
}
