//! A block of zeros whose scale is 0: 0 / 0 is no number.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::op::ActivationScale;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "NaN where an operand holds a block of zeros, whose scale is 0",
    causes: &["zero-block"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (inner, kind) = (gemm.x.width(), gemm.weight.kind());
    // As many values as share a scale.
    let block = match case.recipe.scale.activation {
        ActivationScale::Block128 if case.multiplies_codes() => 128.min(inner),
        _ if case.multiplies_codes() => inner,
        _ if kind.block_width() > 1 => kind.block_width().min(inner),
        _ => return Ok(Vec::new()),
    };
    let bad = |row: usize, column: usize| !case.subject.row(row)[column].is_finite();
    let (rows, width) = (case.subject.rows(), case.subject.width());
    let of_rows: Vec<bool> = (0..rows).map(|row| (0..width).all(|c| bad(row, c))).collect();
    let of_columns: Vec<bool> = (0..width).map(|c| (0..rows).all(|row| bad(row, c))).collect();
    let lines = of_rows.contains(&true) || of_columns.contains(&true);
    let is_whole = |row: usize, column: usize| of_rows[row] || of_columns[column];
    let agrees = |row: usize| (0..width).all(|c| bad(row, c) == is_whole(row, c));
    let is_clean = case.clean.data().iter().all(|value| value.is_finite());
    if !lines || !is_clean || !(0..rows).all(agrees) {
        return Ok(Vec::new());
    }
    let zero = |row: &[f32]| row.chunks(block).any(|block| block.iter().all(|x| *x == 0.0));
    let of_x: Vec<bool> = gemm.x.data().chunks(inner).map(zero).collect();
    let mut of_w = Vec::with_capacity(width);
    let mut values = vec![0.0; inner];
    for row in 0..width {
        gemm.weight.decode_rows(row..row + 1, &mut values)?;
        of_w.push(zero(&values));
    }
    let foretold = |row: usize| (0..width).all(|c| bad(row, c) == (of_x[row] || of_w[c]));
    if !(0..rows).all(foretold) {
        return Ok(Vec::new());
    }
    let what = match (of_x.contains(&true), of_w.contains(&true)) {
        (true, false) => "row whose activation",
        (false, _) => "column whose weight",
        (true, true) => "row or column whose operand",
    };
    let detail = format!(
        "every {what} holds a block of {block} zeros is NaN, and no other: the block's scale is 0, \
         and 0 / 0 is no number"
    );
    let fit = case.fit("zero-block", detail, 0, case.clean);
    // Which lines are NaN is what is seen.
    Ok(vec![Fit { explained: 1.0, significant: true, ..fit }])
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::{Call, MadeWeight};
    use crate::op::{ActivationScale, WeightScale};

    #[test]
    fn nan_of_a_block_of_zeros_is_recognised_in_either_operand() {
        let bench = Bench::with_scales(WeightScale::Block128, ActivationScale::Block128);
        let mut x = bench.tensor(5, 256, 1);
        x.row_mut(3)[128..].fill(0.0);
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let mut wrong = bench.clean(&call);
        wrong.row_mut(3).fill(f32::NAN);
        bench.expect("zero-block", &call, &wrong);
        // Another row is no consequence of these zeros.
        wrong.row_mut(1).fill(f32::NAN);
        bench.expect("non-finite-output", &call, &wrong);

        let x = bench.tensor(5, 256, 1);
        let mut values = weight.to_vec().expect("values");
        values[7 * 256..7 * 256 + 128].fill(0.0);
        let made = MadeWeight::new("zeros".to_owned(), 256, &values);
        let call = Call::Matmul { x: &x, weight: made.weight().expect("a weight"), bias: None };
        let mut wrong = bench.clean(&call);
        (0..5).for_each(|row| wrong.row_mut(row)[7] = f32::NAN);
        bench.expect("zero-block", &call, &wrong);
    }
}
