//! Which products along K are missing, counted twice, weighted by another scale, or made of
//! another tile's operand.
//!
//! The difference of some wrong outputs is written as a sum of the parts that blocks of K
//! have in them, by least squares. It knows values of operands; which tile a kernel has, it
//! does not.

use rayon::prelude::*;

use super::Cause;
use super::exam::Exam;
use super::looks::{Sample, ranked};
use super::place::Place;
use super::product::{Part, Product};
use crate::compute::ComputeError;
use crate::text::number;

/// Rows and columns whose outputs are looked at.
const SAMPLE: (usize, usize) = (32, 128);
/// Elements of K in a block: of few outputs only larger ones can be told apart.
const BLOCKS: [usize; 5] = [8, 16, 32, 64, 128];
/// Blocks at most: their equations are solved at once.
const MOST_BLOCKS: usize = 512;
/// How near a block's weight must come to a whole number.
const NEAR: f64 = 0.45;
/// Runs of blocks that are named.
const SHOWN: usize = 3;

/// A run of K that counts otherwise than once.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    first: usize,
    /// One past the last.
    end: usize,
    /// What is added to its weight, which must be 1.
    weight: f64,
}

/// Outputs as parts of K, on a sample.
struct Parts {
    /// The operands' values, row by row, `alpha` in x.
    x: Vec<f64>,
    w: Vec<f64>,
    inner: usize,
    /// Elements of a block.
    block: usize,
    /// For each block, its part of each output.
    parts: Vec<Vec<f32>>,
    /// Each output less its exact value.
    off: Vec<f64>,
}

/// Tests them all; the best first.
pub(super) fn search(
    product: &Product<'_>,
    exam: &Exam,
    place: &Place,
) -> Result<Vec<Cause>, ComputeError> {
    let sample = Sample::of(exam, place, SAMPLE);
    if sample.each().any(|(.., y, t)| !y.is_finite() || !t.is_finite()) {
        return Ok(Vec::new());
    }
    let part = product.part(&sample.rows, &sample.columns);
    for block in BLOCKS {
        let Some(parts) = Parts::of(&part, &sample, block) else { continue };
        let found = parts.search(&sample);
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

/// Blocks of the same weight in a row, those of weight 0 left out.
fn runs(weights: &[f64], block: usize, inner: usize, of: impl Fn(f64) -> f64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (number, &weight) in weights.iter().enumerate() {
        let (first, end) = (number * block, ((number + 1) * block).min(inner));
        let weight = of(weight);
        match runs.last_mut() {
            _ if weight == 0.0 => {}
            Some(run) if run.end == first && run.weight == weight => run.end = end,
            _ => runs.push(Run { first, end, weight }),
        }
    }
    runs
}

/// The mean weight of larger blocks.
fn means(weights: &[f64], block: usize, larger: usize) -> Vec<f64> {
    let many = (larger / block).max(1);
    weights.chunks(many).map(|some| some.iter().sum::<f64>() / some.len() as f64).collect()
}

fn listed(runs: &[Run], one: impl Fn(&Run) -> String) -> String {
    let shown: Vec<String> = runs.iter().take(SHOWN).map(one).collect();
    match runs.len().saturating_sub(SHOWN) {
        0 => shown.join(" and "),
        more => format!("{}, and {more} more", shown.join(", ")),
    }
}

fn said(lost: &[Run], twice: &[Run], inner: usize) -> (&'static str, String) {
    let span = |run: &Run| match run.end - run.first {
        1 => run.first.to_string(),
        _ => format!("{} to {}", run.first, run.end - 1),
    };
    let all = |runs: &[Run]| listed(runs, span);
    let length = |runs: &[Run]| runs.iter().map(|run| run.end - run.first).sum::<usize>();
    let regular = match lost {
        [first, second, ..] if lost.len() > SHOWN => {
            let (width, step) = (first.end - first.first, second.first - first.first);
            let even = lost.windows(2).all(|pair| pair[1].first - pair[0].first == step);
            (even && step == 2 * width)
                .then(|| format!("; that is every other block of {width}, from {} on", first.first))
        }
        _ => None,
    };
    match (lost, twice) {
        ([run], []) if run.end == inner => (
            "k-tail-dropped",
            format!("the last {} of {inner} products are dropped", inner - run.first),
        ),
        (lost, []) => (
            "k-block-lost",
            format!(
                "products {} of {inner} are left out{}",
                all(lost),
                regular.unwrap_or_default()
            ),
        ),
        ([], twice) => {
            ("k-block-twice", format!("products {} of {inner} are counted twice", all(twice)))
        }
        (lost, twice) if length(lost) == length(twice) => (
            "k-block-stale",
            format!(
                "products {} of {inner} are left out, and products {} are counted twice in their \
                 place: both operands' tiles are stale",
                all(lost),
                all(twice)
            ),
        ),
        (lost, twice) => (
            "k-block-lost",
            format!(
                "products {} of {inner} are left out, and products {} are counted twice",
                all(lost),
                all(twice)
            ),
        ),
    }
}

impl Parts {
    /// What these blocks' weights say.
    fn search(&self, sample: &Sample<'_>) -> Vec<Cause> {
        let Some(weights) = self.weights() else { return Vec::new() };
        let truth: Vec<f64> = sample.each().map(|(.., t)| t).collect();
        let inner = self.inner;
        let mut found = Vec::new();
        let whole = runs(&weights, self.block, inner, |weight| {
            let near = weight.round();
            if (weight - near).abs() < NEAR { near } else { 0.0 }
        });
        let whole: Vec<Run> = whole.into_iter().filter(|run| run.weight.abs() == 1.0).collect();
        let lost: Vec<Run> = whole.iter().copied().filter(|run| run.weight < 0.0).collect();
        let twice: Vec<Run> = whole.iter().copied().filter(|run| run.weight > 0.0).collect();
        let is_all = lost.iter().map(|run| run.end - run.first).sum::<usize>() == inner;
        if !whole.is_empty() && !is_all {
            let (cause, detail) = said(&lost, &twice, inner);
            found.extend(sample.guess(cause, detail, &self.with(&truth, &whole)));
        }
        if found.is_empty() {
            found.extend(self.stale(sample, &truth, &lost));
        }
        if found.is_empty() {
            // A scale of a block weighs its part by a factor.
            for block in [128, 64, 32] {
                let mean = means(&weights, self.block, block);
                let some =
                    runs(
                        &mean,
                        block,
                        inner,
                        |weight| if weight.abs() > 0.02 { weight } else { 0.0 },
                    );
                if block % self.block != 0 || some.is_empty() || some.len() > inner.div_ceil(block)
                {
                    continue;
                }
                let one = |run: &Run| {
                    format!(
                        "products {} to {} count {} times",
                        run.first,
                        run.end - 1,
                        number(1.0 + run.weight)
                    )
                };
                let detail =
                    format!("{}: another scale is applied to that block", listed(&some, one));
                found.extend(sample.guess("block-scale", detail, &self.with(&truth, &some)));
                if !found.is_empty() {
                    break;
                }
            }
        }
        ranked(found)
    }

    /// Nothing where there are too few outputs to tell blocks apart.
    fn of(part: &Part, sample: &Sample<'_>, block: usize) -> Option<Parts> {
        let alpha = f64::from(part.epilogue.alpha);
        let wide = |t: crate::tensor::Tensor, factor: f64| -> Vec<f64> {
            t.data().iter().map(|&value| factor * f64::from(value)).collect()
        };
        let inner = part.x.width;
        let (x, w) = (wide(part.x.values(), alpha), wide(part.w.values(), 1.0));
        let off: Vec<f64> = sample.each().map(|(.., y, t)| y - t).collect();
        // Three outputs for each block, so that what is left over says whether it fits.
        let most = MOST_BLOCKS.min(off.len() / 3);
        let count = inner.div_ceil(block);
        if !(2..=most).contains(&count) || x.iter().chain(&w).any(|value| !value.is_finite()) {
            return None;
        }
        let (rows, columns) = (part.x.rows, part.w.rows);
        let parts = (0..count).into_par_iter().map(|number| {
            let range = number * block..((number + 1) * block).min(inner);
            let mut values = Vec::with_capacity(rows * columns);
            for row in 0..rows {
                let x = &x[row * inner..][range.clone()];
                for column in 0..columns {
                    let w = &w[column * inner..][range.clone()];
                    values.push(x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>() as f32);
                }
            }
            values
        });
        let parts = parts.collect();
        Some(Parts { x, w, inner, block, parts, off })
    }

    /// What is added to each block's weight, by least squares.
    fn weights(&self) -> Option<Vec<f64>> {
        let count = self.parts.len();
        let size = self.parts.iter().flatten().fold(0f32, |most, p| most.max(p.abs()));
        if !(size > 0.0 && size.is_finite()) {
            return None;
        }
        let unit = f64::from(size).recip();
        let scaled: Vec<Vec<f32>> = self
            .parts
            .par_iter()
            .map(|part| part.iter().map(|&p| (f64::from(p) * unit) as f32).collect())
            .collect();
        let mut matrix: Vec<Vec<f64>> = (0..count)
            .into_par_iter()
            .map(|a| (0..=a).map(|b| dot(&scaled[a], &scaled[b])).collect())
            .collect();
        let mut right: Vec<f64> = scaled
            .par_iter()
            .map(|part| part.iter().zip(&self.off).map(|(&p, off)| f64::from(p) * off * unit).sum())
            .collect();
        let ridge = 1e-6 * (0..count).map(|at| matrix[at][at]).sum::<f64>() / count as f64;
        (0..count).for_each(|at| matrix[at][at] += ridge);
        solve(&mut matrix, &mut right).then_some(right)
    }

    /// The outputs where runs have these weights besides.
    fn with(&self, truth: &[f64], runs: &[Run]) -> Vec<f64> {
        let mut predicted = truth.to_vec();
        for run in runs {
            for number in run.first / self.block..run.end.div_ceil(self.block) {
                for (value, &part) in predicted.iter_mut().zip(&self.parts[number]) {
                    *value += run.weight * f64::from(part);
                }
            }
        }
        predicted
    }

    /// A run of one operand that holds what another run of it holds.
    fn stale(&self, sample: &Sample<'_>, truth: &[f64], lost: &[Run]) -> Option<Cause> {
        let [run] = lost else { return None };
        let (first, length) = (run.first, run.end - run.first);
        let without = self.with(truth, &[*run]);
        let (columns, inner) = (self.w.len() / self.inner, self.inner);
        let starts: Vec<usize> =
            (0..=inner - length).step_by(BLOCKS[0]).filter(|start| *start != first).collect();
        let (mut best, mut best_rest): (Option<(bool, usize, Vec<f64>)>, f64) = (None, f64::MAX);
        for is_x in [true, false] {
            let tried: Vec<(f64, usize, Vec<f64>)> = starts
                .par_iter()
                .map(|&start| {
                    let (of_x, of_w) = if is_x { (start, first) } else { (first, start) };
                    let mut predicted = without.clone();
                    let mut rest = 0.0;
                    for (index, value) in predicted.iter_mut().enumerate() {
                        let (row, column) = (index / columns, index % columns);
                        let x = &self.x[row * inner + of_x..][..length];
                        let w = &self.w[column * inner + of_w..][..length];
                        *value += x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
                        rest += (truth[index] + self.off[index] - *value).powi(2);
                    }
                    (rest, start, predicted)
                })
                .collect();
            for (rest, start, predicted) in tried {
                if rest < best_rest {
                    (best, best_rest) = (Some((is_x, start, predicted)), rest);
                }
            }
        }
        let (is_x, start, predicted) = best?;
        let name = if is_x { "x" } else { "w" };
        let detail = format!(
            "elements {first} to {} of {name} along K hold its elements {start} to {}: a stale tile",
            run.end - 1,
            start + length - 1
        );
        sample.guess("k-block-stale", detail, &predicted)
    }
}

/// The sum of products, in several sums beside each other.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut whole = 0.0;
    // Short sums in f32 lose nothing that a weight is told by.
    for (a, b) in a.chunks(1024).zip(b.chunks(1024)) {
        let mut sums = [0f32; LANES];
        let (of_a, of_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let left: f32 = of_a.remainder().iter().zip(of_b.remainder()).map(|(a, b)| a * b).sum();
        for (a, b) in of_a.zip(of_b) {
            sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
        }
        whole += f64::from(left) + sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
    }
    whole
}

/// Solves `matrix x = right` for a positive matrix, of which the lower half is given; the
/// answer stands in `right`.
fn solve(matrix: &mut [Vec<f64>], right: &mut [f64]) -> bool {
    let count = right.len();
    for column in 0..count {
        let (before, rest) = matrix.split_at_mut(column);
        let pivot = rest[0][column] - rest[0][..column].iter().map(|l| l * l).sum::<f64>();
        if !(pivot > 0.0 && pivot.is_finite()) {
            return false;
        }
        let pivot = pivot.sqrt();
        rest[0][column] = pivot;
        let (this, below) = rest.split_at_mut(1);
        let this = &this[0];
        debug_assert_eq!(before.len(), column);
        below.par_iter_mut().for_each(|row| {
            let sum: f64 = row[..column].iter().zip(&this[..column]).map(|(a, b)| a * b).sum();
            row[column] = (row[column] - sum) / pivot;
        });
    }
    for at in 0..count {
        let sum: f64 = matrix[at][..at].iter().zip(right.iter()).map(|(l, x)| l * x).sum();
        right[at] = (right[at] - sum) / matrix[at][at];
    }
    for at in (0..count).rev() {
        let sum: f64 = (at + 1..count).map(|below| matrix[below][at] * right[below]).sum();
        right[at] = (right[at] - sum) / matrix[at][at];
    }
    right.iter().all(|value| value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_positive_matrix_is_solved() {
        let mut matrix = vec![vec![4.0], vec![2.0, 5.0], vec![1.0, 3.0, 6.0]];
        let mut right = vec![4.0 + 4.0 - 3.0, 2.0 + 10.0 - 9.0, 1.0 + 6.0 - 18.0];
        assert!(solve(&mut matrix, &mut right));
        let wanted = [1.0, 2.0, -3.0];
        assert!(
            right.iter().zip(wanted).all(|(got, want)| (got - want).abs() < 1e-12),
            "{right:?}"
        );
        assert!(!solve(&mut [vec![-1.0]], &mut [1.0]));
    }
}
