//! Some rows or columns carry a factor of their own: one scale of many is wrong.

use super::gain::factor_of;
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "single rows or columns carry a factor: one scale of many is wrong",
    causes: &["column-scale", "row-scale"],
    bugs: &[],
    test,
};

/// The share of the difference that must lie in the named lines.
const CONCENTRATED: f64 = 0.98;
/// Lines that are named; more are described by their number.
const SHOWN: usize = 3;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let (rows, width) = (case.subject.rows(), case.subject.width());
    let bias = match case.gemm().and_then(|gemm| gemm.bias) {
        Some(bias) => bias.to_vec()?,
        None => vec![0.0; width],
    };
    let mut fits = Vec::new();
    if rows > 1 {
        fits.extend(lines(case, &bias, ("column-scale", "column"), width, |_, column| column));
    }
    fits.extend(lines(case, &bias, ("row-scale", "row"), rows, |row, _| row));
    Ok(fits)
}

fn lines(
    case: &Case<'_>,
    bias: &[f32],
    (cause, noun): (&str, &str),
    count: usize,
    line_of: impl Fn(usize, usize) -> usize,
) -> Option<Fit> {
    let (rows, width) = (case.subject.rows(), case.subject.width());
    let (mut sc, mut cc, mut energy) = (vec![0.0; count], vec![0.0; count], vec![0.0; count]);
    for row in 0..rows {
        for column in 0..width {
            let bias = f64::from(bias[column]);
            let s = f64::from(case.subject.row(row)[column]) - bias;
            let c = f64::from(case.clean.row(row)[column]) - bias;
            if s.is_finite() && c.is_finite() {
                let line = line_of(row, column);
                if case.trains(row, column) {
                    sc[line] += s * c;
                    cc[line] += c * c;
                }
                if case.null.beyond(row * width + column, s - c) {
                    energy[line] += (s - c) * (s - c);
                }
            }
        }
    }
    let total: f64 = energy.iter().sum();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| energy[b].total_cmp(&energy[a]));
    let mut chosen = Vec::new();
    let mut held = 0.0;
    for line in order {
        if held >= CONCENTRATED * total {
            break;
        }
        held += energy[line];
        chosen.push(line);
    }
    let mut is_chosen = vec![false; count];
    // A line without a value to fit on has no factor.
    chosen.retain(|&line| cc[line] > 0.0);
    if chosen.is_empty() {
        return None;
    }
    chosen.iter().for_each(|&line| is_chosen[line] = true);
    let mut predicted = Tensor::clone(case.clean);
    for row in 0..rows {
        for column in 0..width {
            let line = line_of(row, column);
            if is_chosen[line] && cc[line] > 0.0 {
                let bias = f64::from(bias[column]);
                let c = f64::from(case.clean.row(row)[column]) - bias;
                predicted.row_mut(row)[column] = (c * sc[line] / cc[line] + bias) as f32;
            }
        }
    }
    let factor = |line: &usize| format!("{noun} {line} is {}", factor_of(sc[*line] / cc[*line]));
    let shown: Vec<String> = chosen.iter().take(SHOWN).map(factor).collect();
    let more = match chosen.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(", and {more} more of {count} have factors of their own"),
    };
    case.fit_if_any(cause, shown.join(", ") + &more, chosen.len(), &predicted)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;

    #[test]
    fn one_column_and_one_row_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let mut column = bench.clean(&call);
        (0..4).for_each(|row| column.row_mut(row)[17] *= 1.2);
        bench.expect("column-scale", &call, &column);
        let mut row = bench.clean(&call);
        row.row_mut(2).iter_mut().for_each(|y| *y *= 0.5);
        bench.expect("row-scale", &call, &row);
    }
}
