//! The right values in the wrong places: rows or columns of the result permuted, rows that
//! hold another row's values, a result stored transposed.
//!
//! Lines are matched by their values within the noise, so a place is found although every
//! value was rounded once more.

use std::collections::BTreeSet;

use super::{Case, Fingerprint, Fit, square_of_difference};
use crate::compute::ComputeError;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "rows or columns of the result are permuted, shifted or repeated, or it is transposed",
    causes: &[
        "rows-shifted",
        "row-repeated",
        "rows-permuted",
        "columns-permuted",
        "output-transposed",
    ],
    bugs: &[],
    test,
};

/// Pairs that are named.
const SHOWN: usize = 4;
/// Values of a line by which candidates are ranked first.
const SAMPLED: usize = 48;
/// Candidates whose whole lines are compared.
const CANDIDATES: usize = 3;
/// The share of a line's difference that may be left where it belongs.
const LEFT: f64 = 0.05;
/// Comparisons of single values that one search may cost.
const MOST_COMPARED: usize = 1 << 31;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let mut fits = Vec::new();
    let (rows, width) = (case.subject.rows(), case.subject.width());
    if rows > 1 {
        let by_row = Lines { case, count: rows, length: width, rows: true };
        fits.extend(by_row.fit());
    }
    if width > 1 && rows > 1 {
        let by_column = Lines { case, count: width, length: rows, rows: false };
        fits.extend(by_column.fit());
        // Written column by column, whatever shape the file says.
        let mut written = Vec::with_capacity(rows * width);
        for column in 0..width {
            written.extend((0..rows).map(|row| case.clean.row(row)[column]));
        }
        let detail = "the result is stored transposed, column after column".to_owned();
        let predicted = Tensor::new(width, written);
        fits.extend(case.fit_if_any("output-transposed", detail, 0, &predicted));
    }
    fits.retain(|fit| fit.names_the_bug());
    Ok(fits)
}

/// The rows or the columns of a case.
struct Lines<'c> {
    case: &'c Case<'c>,
    count: usize,
    length: usize,
    rows: bool,
}

impl Lines<'_> {
    fn index(&self, line: usize, entry: usize) -> usize {
        let width = self.case.subject.width();
        if self.rows { line * width + entry } else { entry * width + line }
    }

    fn trains(&self, line: usize, entry: usize) -> bool {
        if self.rows { self.case.trains(line, entry) } else { self.case.trains(entry, line) }
    }

    /// The distance of the subject's line from a clean line, over some entries.
    fn distance(&self, line: usize, from: usize, entries: &mut dyn Iterator<Item = usize>) -> f64 {
        let (subject, clean) = (self.case.subject.data(), self.case.clean.data());
        let one = |entry| {
            let (s, c) = (subject[self.index(line, entry)], clean[self.index(from, entry)]);
            square_of_difference(s, c)
        };
        entries.map(one).sum()
    }

    /// Lines with values that are no noise.
    fn off(&self) -> Vec<usize> {
        let (subject, clean) = (self.case.subject.data(), self.case.clean.data());
        let beyond = |line: usize| {
            (0..self.length).any(|entry| {
                let index = self.index(line, entry);
                let difference = f64::from(subject[index]) - f64::from(clean[index]);
                self.case.null.beyond(index, difference)
            })
        };
        (0..self.count).filter(|&line| beyond(line)).collect()
    }

    /// Which clean line each line that is off holds, where another one fits.
    fn moved(&self) -> Option<Vec<(usize, usize)>> {
        let off = self.off();
        let cost = off.len() * self.count * SAMPLED.min(self.length);
        if off.is_empty() || cost > MOST_COMPARED {
            return None;
        }
        let mut moved = Vec::new();
        for &line in &off {
            // The half that is held out stays out of the search as well.
            let trained = (0..self.length).filter(|&entry| self.trains(line, entry));
            let trained: Vec<usize> = match self.length < SAMPLED {
                true => (0..self.length).collect(),
                false => trained.collect(),
            };
            let step = trained.len().div_ceil(SAMPLED).max(1);
            let sample: Vec<usize> = trained.into_iter().step_by(step).collect();
            let mut ranked: Vec<(f64, usize)> = (0..self.count)
                .map(|from| (self.distance(line, from, &mut sample.iter().copied()), from))
                .collect();
            ranked.sort_by(|a, b| {
                a.0.total_cmp(&b.0).then(a.1.abs_diff(line).cmp(&b.1.abs_diff(line)))
            });
            let own = self.distance(line, line, &mut (0..self.length));
            let whole = |&(_, from): &(f64, usize)| {
                (self.distance(line, from, &mut (0..self.length)), from)
            };
            let best =
                ranked.iter().take(CANDIDATES).map(whole).min_by(|a, b| a.0.total_cmp(&b.0))?;
            // A line that no other line explains: then nothing was moved.
            if best.1 == line || best.0 > LEFT * own {
                return None;
            }
            moved.push((line, best.1));
        }
        Some(moved)
    }

    fn fit(&self) -> Option<Fit> {
        let moved = self.moved()?;
        let case = self.case;
        let mut predicted = case.clean.clone();
        for &(to, from) in &moved {
            for entry in 0..self.length {
                predicted.data_mut()[self.index(to, entry)] =
                    case.clean.data()[self.index(from, entry)];
            }
        }
        let (what, cause) = match self.rows {
            false => ("column", "columns-permuted"),
            true => match how(&moved, self.count) {
                "shifted" => ("row", "rows-shifted"),
                "permuted" => ("row", "rows-permuted"),
                _ => ("row", "row-repeated"),
            },
        };
        Some(case.fit(cause, said(what, &moved), moved.len(), &predicted))
    }
}

/// What pairs of target and source have in common, of `count` lines: one distance, the same
/// lines in another order, or neither.
pub fn how(moved: &[(usize, usize)], count: usize) -> &'static str {
    /// The share of moved lines that must have moved by the same number.
    const MOST: f64 = 0.9;
    let offsets: Vec<isize> = moved.iter().map(|&(to, from)| from as isize - to as isize).collect();
    let common = offsets
        .iter()
        .map(|offset| offsets.iter().filter(|other| *other == offset).count())
        .max()
        .unwrap_or(0);
    let many = moved.len() > 1 || count == 2;
    if many && common as f64 >= MOST * moved.len() as f64 {
        return "shifted";
    }
    let to: BTreeSet<usize> = moved.iter().map(|(to, _)| *to).collect();
    let from: BTreeSet<usize> = moved.iter().map(|(_, from)| *from).collect();
    if to == from { "permuted" } else { "repeated" }
}

/// Which lines hold which, in words: the first few pairs of target and source.
pub fn said(what: &str, moved: &[(usize, usize)]) -> String {
    let one = |&(to, from): &(usize, usize)| format!("{what} {to} holds {what} {from}");
    let shown: Vec<String> = moved.iter().take(SHOWN).map(one).collect();
    match moved.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{}, and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn swapped_columns_shifted_rows_a_repeated_row_and_a_transposed_result_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(16, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let clean = bench.clean(&call);
        let mut swapped = clean.clone();
        for row in 0..16 {
            swapped.row_mut(row).swap(17, 99);
        }
        bench.expect("columns-permuted", &call, &swapped);
        let rows = |order: &dyn Fn(usize) -> usize| {
            let data = (0..16).flat_map(|row| clean.row(order(row)).to_vec()).collect();
            Tensor::new(256, data)
        };
        bench.expect("rows-shifted", &call, &rows(&|row| row.saturating_sub(1)));
        bench.expect("row-repeated", &call, &rows(&|row| if row == 7 { 6 } else { row }));
        bench.expect(
            "rows-permuted",
            &call,
            &rows(&|row| match row {
                3 => 9,
                9 => 3,
                row => row,
            }),
        );
        let mut stored = Vec::new();
        for column in 0..256 {
            stored.extend((0..16).map(|row| clean.row(row)[column]));
        }
        bench.expect("output-transposed", &call, &Tensor::new(256, stored));
    }

    #[test]
    fn a_place_is_found_although_every_value_is_one_step_off() {
        let bench = Bench::default();
        let x = bench.tensor(16, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let mut wrong = bench.clean(&call);
        for row in 0..16 {
            wrong.row_mut(row).swap(17, 99);
            // One step of bf16, the output's type.
            for y in wrong.row_mut(row).iter_mut().step_by(2) {
                *y = f32::from_bits(y.to_bits() + 0x1_0000);
            }
        }
        bench.expect("columns-permuted", &call, &wrong);
    }
}
