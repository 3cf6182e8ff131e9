//! Rows of a query's or a key's weight that a converter interleaved for another number of heads,
//! or did not interleave.
//!
//! GGUF files of the llama family hold each head's pairs as neighbours, checkpoints hold them in
//! halves: `[heads, 2, d/2]` becomes `[heads, d/2, 2]`. With the number of query heads for the
//! keys' weight every shape is right and every key is wrong.

use super::{Case, Fingerprint, Fit, LARGEST_REARRANGED};
use crate::compute::ComputeError;
use crate::compute::call::{Call, MadeWeight};
use crate::model::RopeLayout;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "rows of a query's or key's weight are interleaved for another number of heads",
    causes: &["head-permutation"],
    bugs: &[],
    test,
};

/// The row from which each row is taken where `rows` are interleaved for so many heads.
pub fn interleaved(rows: usize, heads: usize) -> Vec<usize> {
    let half = rows / heads / 2;
    let of = |row: usize| {
        let (head, inner) = (row / (2 * half), row % (2 * half));
        head * 2 * half + inner % 2 * half + inner / 2
    };
    (0..rows).map(of).collect()
}

/// The order that takes an order back.
fn inverse(order: &[usize]) -> Vec<usize> {
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(to, &from)| back[from] = to);
    back
}

/// Rows that were interleaved for `own` heads, and are interleaved for `other` instead.
pub fn for_other_heads(rows: usize, own: usize, other: usize) -> Vec<usize> {
    let back = inverse(&interleaved(rows, own));
    interleaved(rows, other).into_iter().map(|row| back[row]).collect()
}

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let (Some(gemm), Some(model)) = (case.gemm(), case.model) else { return Ok(Vec::new()) };
    let (weight, config) = (gemm.weight, model.config());
    let (rows, width) = (weight.rows(), weight.width());
    let (own, other) = match weight.name() {
        name if name.ends_with(".attn_q.weight") => (config.heads, config.kv_heads),
        name if name.ends_with(".attn_k.weight") => (config.kv_heads, config.heads),
        _ => return Ok(Vec::new()),
    };
    let fits_heads = |heads: usize| heads > 0 && rows.is_multiple_of(2 * heads);
    if rows * width > LARGEST_REARRANGED || !fits_heads(own) {
        return Ok(Vec::new());
    }
    let (wrong, right) = (interleaved(rows, own), inverse(&interleaved(rows, own)));
    // Files whose pairs are neighbours hold them interleaved, others in halves.
    let mut orders = match config.rope.layout {
        RopeLayout::Interleaved => vec![
            (format!("interleaved for {own} heads once more than they must be"), wrong.clone()),
            (format!("in halves, and must be interleaved for {own} heads"), right.clone()),
        ],
        RopeLayout::Halves => vec![
            (format!("interleaved for {own} heads, and must be in halves"), wrong.clone()),
            (format!("taken to halves for {own} heads, which they are already"), right.clone()),
        ],
    };
    if other != own && fits_heads(other) {
        let (to, from) = (interleaved(rows, other), inverse(&interleaved(rows, other)));
        // Rows that the first order put where they are, put elsewhere by the second.
        let both = |first: &[usize], then: &[usize]| -> Vec<usize> {
            then.iter().map(|&row| first[row]).collect()
        };
        orders.extend([
            (format!("interleaved for {other} heads instead of {own}"), both(&right, &to)),
            (format!("interleaved for {other} heads and taken back for {own}"), both(&to, &right)),
            (
                format!("interleaved for {own} heads and taken back for {other}"),
                both(&wrong, &from),
            ),
            (format!("taken to halves for {other} heads instead of {own}"), both(&from, &wrong)),
            (format!("interleaved for {other} heads, and must not be"), to),
            (format!("taken to halves for {other} heads, and must not be"), from),
        ]);
    }
    let values = weight.to_vec()?;
    let mut fits = Vec::new();
    for (how, order) in orders {
        let moved: Vec<f32> = order
            .iter()
            .flat_map(|&row| &values[row * width..(row + 1) * width])
            .copied()
            .collect();
        let made = MadeWeight::new(format!("{} interleaved", weight.name()), rows, &moved);
        let call = Call::Matmul { x: gemm.x, weight: made.weight()?, bias: gemm.bias };
        let detail = format!("the rows of `{}` are {how}", weight.name());
        fits.extend(case.fit_call("head-permutation", detail, &call)?);
    }
    fits.retain(Fit::names_the_bug);
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn pairs_become_neighbours_and_are_taken_back() {
        // One head of 8: halves 0-3 and 4-7.
        assert_eq!(interleaved(8, 1), [0, 4, 1, 5, 2, 6, 3, 7]);
        // Two of 4.
        assert_eq!(interleaved(8, 2), [0, 2, 1, 3, 4, 6, 5, 7]);
        // 8 heads over 2: what a converter does for the wrong heads, and a reader takes back for
        // the right ones, is another order than the wrong heads alone.
        let (eight, two) = (interleaved(64, 8), inverse(&interleaved(64, 2)));
        let both: Vec<usize> = two.iter().map(|&row| eight[row]).collect();
        assert_ne!(both, for_other_heads(64, 2, 8));
        assert_ne!(both, for_other_heads(64, 8, 2));
        let order = interleaved(24, 3);
        let back = inverse(&order);
        assert!((0..24).all(|row| order[back[row]] == row));
        assert_eq!(for_other_heads(24, 3, 3), (0..24).collect::<Vec<_>>());
    }

    #[test]
    fn keys_that_are_interleaved_for_the_query_heads_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let config = bench.model.config();
        let weight = bench.weight("blk.1.attn_k.weight");
        let (rows, width) = (weight.rows(), weight.width());
        let values = weight.to_vec().expect("values");
        let order = for_other_heads(rows, config.kv_heads, config.heads);
        let moved: Vec<f32> = order
            .iter()
            .flat_map(|&row| values[row * width..(row + 1) * width].iter().copied())
            .collect();
        let made = MadeWeight::new("moved".to_owned(), rows, &moved);
        let wrong = Call::Matmul { x: &x, weight: made.weight().expect("a weight"), bias: None };
        let call = Call::Matmul { x: &x, weight, bias: None };
        let wrong = bench.clean(&wrong);
        bench.expect("head-permutation", &call, &wrong);
        let detail = &bench.fits(&call, &wrong)[0].detail;
        let heads = format!("for {} heads instead of {}", config.heads, config.kv_heads);
        assert!(detail.contains(&heads), "{detail}");
    }
}
