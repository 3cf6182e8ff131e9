//! The right values in the wrong places: rows or columns of the result permuted.

use std::collections::BTreeMap;

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "rows or columns of the result are permuted or shifted",
    causes: &["rows-shifted", "rows-permuted", "columns-permuted"],
    test,
};

/// Pairs that are named.
const SHOWN: usize = 4;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let mut fits = Vec::new();
    let rows = |t: &Tensor| -> Vec<Vec<u32>> {
        (0..t.rows()).map(|row| t.row(row).iter().map(|v| v.to_bits()).collect()).collect()
    };
    let (subject, clean) = (rows(case.subject), rows(case.clean));
    if let Some(map) = map_of(&subject, &clean) {
        let shift = case.subject.rows() as isize - 1;
        let by = |offset: isize| {
            map.iter().enumerate().skip(1).all(|(to, &from)| from as isize == to as isize + offset)
        };
        let cause = if shift > 0
            && (by(-1) || map.iter().enumerate().rev().skip(1).all(|(to, &from)| from == to + 1))
        {
            "rows-shifted"
        } else {
            "rows-permuted"
        };
        fits.push(case.fit(cause, said("row", &map), 0, case.subject));
    }
    let (subject, clean) = (columns(case.subject), columns(case.clean));
    if let Some(map) = map_of(&subject, &clean) {
        fits.push(case.fit("columns-permuted", said("column", &map), 0, case.subject));
    }
    Ok(fits)
}

fn columns(t: &Tensor) -> Vec<Vec<u32>> {
    (0..t.width())
        .map(|column| (0..t.rows()).map(|row| t.row(row)[column].to_bits()).collect())
        .collect()
}

/// For each place the clean place that its values come from, where all come from
/// one and some from another; of equal ones the place itself, then the nearest before.
fn map_of(subject: &[Vec<u32>], clean: &[Vec<u32>]) -> Option<Vec<usize>> {
    let mut places: BTreeMap<&Vec<u32>, Vec<usize>> = BTreeMap::new();
    for (place, values) in clean.iter().enumerate() {
        places.entry(values).or_default().push(place);
    }
    let map: Option<Vec<usize>> = subject
        .iter()
        .enumerate()
        .map(|(place, values)| {
            let from = places.get(values)?;
            Some(if from.contains(&place) { place } else { from[0] })
        })
        .collect();
    map.filter(|map| map.iter().enumerate().any(|(to, &from)| to != from))
}

fn said(what: &str, map: &[usize]) -> String {
    let moved: Vec<String> = map
        .iter()
        .enumerate()
        .filter(|(to, from)| to != *from)
        .map(|(to, from)| format!("{what} {to} holds {what} {from}"))
        .collect();
    let more = moved.len().saturating_sub(SHOWN);
    let shown = moved[..moved.len().min(SHOWN)].join(", ");
    if more > 0 { format!("{shown}, and {more} more") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn swapped_columns_and_shifted_rows_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let clean = bench.clean(&call);
        let mut swapped = clean.clone();
        for row in 0..4 {
            swapped.row_mut(row).swap(17, 99);
        }
        bench.expect("columns-permuted", &call, &swapped);
        let shifted: Vec<f32> =
            [0, 0, 1, 2].iter().flat_map(|&row| clean.row(row).to_vec()).collect();
        bench.expect("rows-shifted", &call, &Tensor::new(256, shifted));
    }
}
