//! A weight whose memory is read along the wrong axis.

use super::{Case, Fingerprint, Fit, LARGEST_REARRANGED};
use crate::compute::ComputeError;
use crate::compute::call::{Call, MadeWeight};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the weight is read along the wrong axis",
    causes: &["transposed-weight"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (weight, rows, width) = (gemm.weight, gemm.weight.rows(), gemm.weight.width());
    if rows * width > LARGEST_REARRANGED {
        return Ok(Vec::new());
    }
    let values = weight.to_vec()?;
    let moved: Vec<f32> = (0..rows)
        .flat_map(|row| (0..width).map(move |k| (row, k)))
        .map(|(row, k)| values[k * rows + row])
        .collect();
    let made = MadeWeight::new(format!("{} transposed", weight.name()), rows, &moved);
    let call = Call::Matmul { x: gemm.x, weight: made.weight()?, bias: gemm.bias };
    let detail = format!("`{}` is read as [{width}, {rows}]", weight.name());
    Ok(case.fit_call("transposed-weight", detail, &call)?.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn a_weight_read_column_by_column_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.ffn_up.weight");
        let values = weight.to_vec().expect("values");
        let moved: Vec<f32> =
            (0..768 * 256).map(|index| values[index % 256 * 768 + index / 256]).collect();
        let made = MadeWeight::new("moved".to_owned(), 768, &moved);
        let wrong = Call::Matmul { x: &x, weight: made.weight().expect("a weight"), bias: None };
        let call = Call::Matmul { x: &x, weight, bias: None };
        bench.expect("transposed-weight", &call, &bench.clean(&wrong));
    }
}
