//! A weight whose columns (the inner index) or rows stand in another order.

use super::{Case, Fingerprint, Fit, LARGEST_REARRANGED};
use crate::compute::ComputeError;
use crate::compute::call::{Call, MadeWeight};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the inner index of a weight is permuted, reversed or shifted",
    causes: &["weight-permuted"],
    bugs: &[],
    test,
};

type Order = fn(usize, usize) -> usize;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (weight, width) = (gemm.weight, gemm.weight.width());
    if weight.rows() * width > LARGEST_REARRANGED {
        return Ok(Vec::new());
    }
    let orders: [(&str, Order); 7] = [
        ("its halves are swapped", |k, n| (k + n / 2) % n),
        ("neighbours are swapped", |k, _| k ^ 1),
        ("it is reversed", |k, n| n - 1 - k),
        ("it is shifted by one", |k, n| (k + 1) % n),
        ("it is shifted by one", |k, n| (k + n - 1) % n),
        ("blocks of 32 hold their halves interleaved", |k, _| {
            k / 32 * 32 + k % 2 * 16 + k % 32 / 2
        }),
        ("blocks of 32 hold their halves swapped", |k, _| k ^ 16),
    ];
    let values = weight.to_vec()?;
    let mut fits = Vec::new();
    for (what, order) in orders {
        if (0..width).any(|k| order(k, width) >= width) {
            continue;
        }
        let rows = values.chunks_exact(width);
        let moved: Vec<f32> =
            rows.flat_map(|row| (0..width).map(|k| row[order(k, width)])).collect();
        let made = MadeWeight::new(format!("{} permuted", weight.name()), weight.rows(), &moved);
        let call = Call::Matmul { x: gemm.x, weight: made.weight()?, bias: gemm.bias };
        let detail = format!("the inner index of `{}`: {what}", weight.name());
        fits.extend(case.fit_call("weight-permuted", detail, &call)?);
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn swapped_halves_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.attn_q.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let values = weight.to_vec().expect("values");
        let moved: Vec<f32> = values
            .chunks_exact(256)
            .flat_map(|row| row[128..].iter().chain(&row[..128]).copied().collect::<Vec<f32>>())
            .collect();
        let made = MadeWeight::new("moved".to_owned(), 256, &moved);
        let wrong = Call::Matmul { x: &x, weight: made.weight().expect("a weight"), bias: None };
        bench.expect("weight-permuted", &call, &bench.clean(&wrong));
    }
}
