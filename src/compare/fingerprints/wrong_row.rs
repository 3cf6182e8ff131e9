//! An embedding lookup of other rows, or of rows whose blocks are read wrongly.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the embedding looked other rows up, or read their blocks in another order",
    causes: &["wrong-row", "block-order"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Embed { weight, tokens } = *case.call else { return Ok(Vec::new()) };
    let vocabulary = weight.rows() as u32;
    let mut fits = Vec::new();
    type Choice = fn(u32, u32) -> u32;
    let choices: [(&str, Choice); 3] = [
        ("every token's row is one too high", |token, n| (token + 1) % n),
        ("every token's row is one too low", |token, n| (token + n - 1) % n),
        ("every token reads row 0", |_, _| 0),
    ];
    for (detail, choice) in choices {
        let tokens: Vec<u32> = tokens.iter().map(|&token| choice(token, vocabulary)).collect();
        let call = Call::Embed { weight, tokens: &tokens };
        fits.extend(case.fit_call("wrong-row", detail.to_owned(), &call)?);
    }
    type Order = fn(usize) -> usize;
    let orders: [(&str, Order); 2] = [
        ("the halves of blocks of 32 are interleaved", |k| k / 32 * 32 + k % 2 * 16 + k % 32 / 2),
        ("the halves of blocks of 32 are swapped", |k| k ^ 16),
    ];
    let width = case.clean.width();
    for (detail, order) in orders.into_iter().filter(|_| width.is_multiple_of(32)) {
        let rows = (0..case.clean.rows()).map(|row| case.clean.row(row));
        let moved = rows.flat_map(|row| (0..width).map(|k| row[order(k)])).collect();
        fits.extend(case.fit_if_any(
            "block-order",
            detail.to_owned(),
            0,
            &Tensor::new(width, moved),
        ));
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn a_row_off_by_one_is_recognised() {
        let bench = Bench::default();
        let weight = bench.weight("token_embd.weight");
        let wrong = bench.clean(&Call::Embed { weight, tokens: &[8, 100, 3] });
        bench.expect("wrong-row", &Call::Embed { weight, tokens: &[7, 99, 2] }, &wrong);
    }
}
