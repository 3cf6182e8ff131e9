//! What explains a difference without any bug: rounding to the type of the stream, and
//! another order of additions. Every hypothesis is held against these.
//!
//! It knows operands and results; which hypothesis is tested is not its concern.

use super::{Case, square_of_difference};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::departure::{Steps, matmul_rows};
use crate::compute::emulated::arm::Emulated;
use crate::compute::emulated::schedule::Schedule;
use crate::compute::floor::Floor;
use crate::dtype::Format;
use crate::op::Recipe;
use crate::tensor::Tensor;
use crate::text::{grouped, number};

/// Deviations of the noise beyond which a value is not noise.
const BEYOND: f64 = 6.0;
/// By how much the Bayesian information criterion must favour a hypothesis, in nats: odds
/// of 20,000 to 1.
pub(super) const CLEARLY: f64 = 10.0;
/// Values that a hypothesis must explain for each number that it fits.
const VALUES_A_NUMBER: usize = 2;
/// Columns on which the noise of another order is measured.
const SAMPLED: usize = 256;

/// The null models of one op.
pub struct Null {
    /// The variance that rounding and another order of additions give each value.
    noise: Vec<f64>,
}

/// What a prediction came to.
pub(super) struct Score {
    /// The energy that it leaves.
    pub rest: f64,
    /// Its share of what the null models leave.
    pub explained: f64,
    /// Values whose bits it does not predict.
    pub mismatches: usize,
    /// Whether it says clearly more than the null models.
    pub significant: bool,
    /// How much more, in nats.
    pub gain: f64,
}

impl Null {
    /// The null models of a call whose prescribed result is `clean`.
    ///
    /// # Errors
    /// As the call.
    pub fn of(
        call: &Call<'_>,
        clean: &Tensor,
        arm: &Emulated,
        recipe: &Recipe,
    ) -> Result<Null, ComputeError> {
        if let Call::Experts(products) = *call {
            // Each expert's product is one of its own.
            let [noise] = products.by_expert(|x, weight, bias| {
                let call = Call::Matmul { x, weight, bias };
                let clean = call.on(arm)?;
                let noise = Null::of(&call, &clean, arm, recipe)?.noise;
                let noise = noise.into_iter().map(|noise| noise as f32);
                Ok([Tensor::new(weight.rows(), noise.collect())])
            })?;
            let noise = noise.into_data().into_iter().map(f64::from);
            return Ok(Null { noise: noise.collect() });
        }
        let of_order = match *call {
            Call::Matmul { x, weight, .. } => {
                // The same products in two parts, before any rounding of the output.
                let columns = 0..weight.rows().min(SAMPLED);
                let whole = Schedule::of(recipe);
                let parts = if whole.split_k == 1 { 2 } else { 1 };
                let other = |schedule| {
                    let steps = Steps { schedule, output: Format::F32, ..Steps::of(recipe) };
                    matmul_rows(arm, recipe, (x, weight, None), columns.clone(), &steps)
                };
                let (a, b) = (other(whole)?, other(whole.with_split_k(parts))?);
                let pairs = a.data().iter().zip(b.data());
                let energy: f64 = pairs.map(|(&a, &b)| square_of_difference(a, b)).sum();
                // It grows with the products that are added, so with both rows' norms.
                let squares = |values: &[f32]| -> f64 {
                    values.iter().map(|&value| square_of_difference(value, 0.0)).sum()
                };
                let of_x: Vec<f64> = (0..x.rows()).map(|row| squares(x.row(row))).collect();
                let mut of_w = Vec::with_capacity(weight.rows());
                let mut row = vec![0.0; weight.width()];
                for index in 0..weight.rows() {
                    weight.decode_rows(index..index + 1, &mut row)?;
                    of_w.push(squares(&row));
                }
                let norms = of_x.iter().sum::<f64>() * of_w[columns].iter().sum::<f64>();
                let shown = if norms > 0.0 { energy / norms } else { 0.0 };
                // Where two parts happen to agree, a few roundings of f32 are left.
                let least = 8.0 * 2f64.powi(-48) / weight.width().max(1) as f64;
                let share = if shown > least { shown } else { least };
                of_x.iter().flat_map(|x| of_w.iter().map(move |w| share * x * w)).collect()
            }
            _ => {
                // What an engine casts beforehand, as its frequencies, its kernel computes.
                let floor = Floor::new(&Recipe { engine: None, ..*recipe })?;
                call.on(&floor)?;
                let sigma = floor.take_sigma();
                let sigma = sigma.map(Tensor::into_data).unwrap_or_default();
                if sigma.len() == clean.data().len() {
                    sigma.into_iter().map(|sigma| f64::from(sigma).powi(2)).collect()
                } else {
                    vec![0.0; clean.data().len()]
                }
            }
        };
        let output = match (call, recipe.stream) {
            (Call::Matmul { .. }, None) => recipe.output,
            (_, stream) => stream.unwrap_or(Format::F32),
        };
        let noise = of_order.into_iter().zip(clean.data());
        let noise = noise.map(|(order, &clean)| order + of_rounding(output, f64::from(clean)));
        Ok(Null { noise: noise.collect() })
    }

    /// Whether a value is no noise.
    pub(super) fn beyond(&self, index: usize, difference: f64) -> bool {
        difference * difference > BEYOND * BEYOND * self.noise[index]
    }

    /// Whether rounding and another order of additions explain all of a difference: every
    /// value by itself, and all together.
    pub fn explains(&self, subject: &Tensor, clean: &Tensor) -> bool {
        if subject.data().len() != clean.data().len() {
            return false;
        }
        let pairs = subject.data().iter().zip(clean.data()).enumerate();
        let mut squares = 0.0;
        for (index, (&s, &c)) in pairs {
            let difference = f64::from(s) - f64::from(c);
            let noise = self.noise[index];
            let z2 = match (difference == 0.0, noise > 0.0) {
                (true, _) => 0.0,
                (_, true) => difference * difference / noise,
                (_, false) => f64::INFINITY,
            };
            if z2.is_nan() || z2 > (2.0 * BEYOND).powi(2) {
                return false;
            }
            squares += z2;
        }
        // Two roundings of the same value, and the order's: three times the variance.
        squares <= 3.0 * subject.data().len() as f64
    }

    /// Minus the log-likelihood of a squared difference, under noise with a heavy tail
    /// (Cauchy's): a few values that nothing explains do not decide.
    fn loss(&self, index: usize, square: f64) -> f64 {
        let noise = self.noise[index];
        if square > 0.0 { (1.0 + square / noise.max(f64::MIN_POSITIVE)).ln() } else { 0.0 }
    }

    /// How well a prediction fits a case's subject.
    pub(super) fn score(&self, case: &Case<'_>, parameters: usize, predicted: &Tensor) -> Score {
        let (subject, clean) = (case.subject, case.clean);
        let width = subject.width();
        let (mut rest, mut whole, mut size, mut gain, mut count) = (0.0, 0.0, 0.0, 0.0, 0usize);
        let (mut all_rest, mut all_whole, mut all_size) = (0.0, 0.0, 0.0);
        let (mut values, mut differ, mut mismatches) = (0usize, 0usize, 0usize);
        let mut contradicted = false;
        let triples = subject.data().iter().zip(clean.data()).zip(predicted.data());
        for (index, ((&s, &c), &p)) in triples.enumerate() {
            let same = s.to_bits() == p.to_bits() || (s.is_nan() && p.is_nan());
            mismatches += usize::from(!same);
            differ += usize::from(s.to_bits() != c.to_bits() && !(s.is_nan() && c.is_nan()));
            // What is finite on one side only is no near miss.
            contradicted |= s.is_finite() != p.is_finite();
            let (of_p, of_c, of_s) = (
                square_of_difference(s, p),
                square_of_difference(s, c),
                square_of_difference(s, 0.0),
            );
            all_rest += of_p;
            all_whole += of_c;
            all_size += of_s;
            let bad = self.beyond(index, f64::from(s) - f64::from(c)) || !s.is_finite();
            values += usize::from(bad && (of_p < 0.25 * of_c || same));
            if parameters > 0 && case.trains(index / width, index % width) {
                continue;
            }
            rest += of_p;
            whole += of_c;
            size += of_s;
            gain += self.loss(index, of_c) - self.loss(index, of_p);
            count += 1;
        }
        // So few values that none are left to hold out.
        if parameters > 0 && (count == 0 || whole == 0.0) {
            (rest, whole, size) = (all_rest, all_whole, all_size);
            count = subject.data().len();
            values = 0;
        }
        // Where the subject is small, anything small is near: it must be explained itself.
        let whole = if size > 0.0 && size < whole { size } else { whole };
        // Every fitted number explains one element by itself.
        let freedom = count as f64 / (count.saturating_sub(parameters).max(1)) as f64;
        let explained = if whole > 0.0 { 1.0 - rest / whole * freedom } else { 0.0 };
        let explained = match (mismatches, contradicted) {
            (0, _) => 1.0,
            (_, true) => 0.0,
            _ => explained,
        };
        // To the bit means more than any criterion: but each fitted number must pay for itself.
        let pays = |values: usize| values >= VALUES_A_NUMBER * parameters;
        let price = 0.5 * parameters as f64 * (count.max(2) as f64).ln();
        let gain = gain - price;
        let significant = match mismatches {
            0 => pays(differ),
            _ => values > 0 && pays(values) && gain > CLEARLY,
        };
        Score { rest: all_rest, explained, mismatches, significant, gain }
    }
}

/// Twice the variance of rounding a value to a format: both sides may have rounded.
fn of_rounding(format: Format, value: f64) -> f64 {
    let size = value.abs();
    let exponent = if size > 0.0 { size.log2().floor() as i32 } else { format.min_exponent() };
    let exponent = exponent.max(format.min_exponent()) - format.fraction_bits() as i32;
    2.0 * 2f64.powi(exponent).powi(2) / 12.0
}

/// What is known of a difference that nothing names: how many values are no noise, in which
/// rows and columns, to which side, and how large they are in units of the noise.
pub fn describe(case: &Case<'_>) -> Option<String> {
    let (subject, clean) = (case.subject, case.clean);
    let width = subject.width();
    let (mut rows, mut columns) = (vec![0usize; subject.rows()], vec![0usize; width]);
    let (mut count, mut above, mut sizes) = (0usize, 0usize, Vec::new());
    for (index, (&s, &c)) in subject.data().iter().zip(clean.data()).enumerate() {
        let difference = f64::from(s) - f64::from(c);
        if s.is_finite() && !case.null.beyond(index, difference) {
            continue;
        }
        count += 1;
        above += usize::from(difference > 0.0);
        rows[index / width] += 1;
        columns[index % width] += 1;
        let noise = case.null.noise[index];
        if noise > 0.0 && difference.is_finite() {
            sizes.push(difference.abs() / noise.sqrt());
        }
    }
    if count == 0 {
        return None;
    }
    let lines = |lines: &[usize], what: &str| {
        let touched: Vec<usize> =
            lines.iter().enumerate().filter(|(_, n)| **n > 0).map(|(line, _)| line).collect();
        match (touched.as_slice(), lines.len()) {
            ([one], all) if all > 1 => format!("in {what} {one}"),
            ([first, .., last], all) if touched.len() < all => {
                let whole = last - first + 1 == touched.len();
                let gaps =
                    if whole { String::new() } else { format!(" ({} of them)", touched.len()) };
                format!("in {what}s {first} to {last}{gaps}")
            }
            (_, 1) => format!("in its only {what}"),
            (_, all) => format!("in all {all} {what}s"),
        }
    };
    sizes.sort_by(f64::total_cmp);
    let median = sizes.get(sizes.len() / 2).copied();
    let side = match (above, count - above) {
        (above, 0) if above > 1 => ", all too large",
        (0, below) if below > 1 => ", all too small",
        _ => "",
    };
    let size = median.map_or(String::new(), |median| {
        format!(", {} times what rounding does in the median", number(median))
    });
    Some(format!(
        "{} of {} values are off, {} and {}{side}{size}",
        grouped(count),
        grouped(subject.data().len()),
        lines(&rows, "row"),
        lines(&columns, "column")
    ))
}
