//! How the values of claims move over the nights, chip by chip.
//!
//! What is computed is deterministic, so a value that nobody changed anything about stays what it
//! is. It is asked only of nights since the question (op, model, prompt, recipe) is what it is now.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{Fleet, Night};
use crate::metric::Metric;

/// A claim's value on one kind of chip, over the nights.
#[derive(Clone, Debug, Serialize)]
pub struct Trend {
    /// The GPUs by model.
    pub chip: String,
    /// The stage.
    pub stage: String,
    /// The falsifier.
    pub falsifier: String,
    /// What was measured.
    pub metric: Metric,
    /// How many machines of that chip had a value on the last of the nights.
    pub machines: usize,
    /// How it moves.
    pub kind: Kind,
    /// The night of the step; of a drift the first night.
    pub since: Night,
    /// The value on the first night.
    pub first: f64,
    /// The value on the last night.
    pub last: f64,
    /// The share of its bound that it uses on the last night.
    pub used: f64,
    /// Whether it is, of all claims of the stage on this chip, the one that uses most of its bound.
    pub tightest: bool,
    /// The median over the machines, night by night.
    pub values: Vec<(Night, f64)>,
}

/// How a value moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// By less than one in twenty.
    Flat,
    /// At once, between two nights.
    Step,
    /// Night after night in one direction.
    Drift,
    /// Up and down.
    Unsteady,
}

impl Kind {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Flat => "flat",
            Kind::Step => "step",
            Kind::Drift => "drift",
            Kind::Unsteady => "unsteady",
        }
    }
}

/// A value may move by this share of itself before it is told.
const NOISE: f64 = 0.05;
/// A step holds so much of all that moved.
const OF_ONE_NIGHT: f64 = 0.8;
/// Mann and Kendall's statistic from which on a direction is no chance (one in a thousand).
const NO_CHANCE: f64 = 3.3;

/// The values of one claim on one chip: on each night the question, and each machine's value and
/// share of its bound.
#[derive(Default)]
struct Series<'r> {
    metric: Option<Metric>,
    nights: BTreeMap<Night, Vec<(&'r str, f64, f64)>>,
}

/// The trends of all chips, stages and claims.
pub fn of(fleet: &Fleet<'_>) -> Vec<Trend> {
    let chips: Vec<String> = (0..fleet.hosts.len()).map(|host| fleet.chip(host)).collect();
    let mut all: BTreeMap<(&str, usize, &str), Series<'_>> = BTreeMap::new();
    for (stage, row) in fleet.cells.iter().enumerate() {
        for (host, nights) in row.iter().enumerate() {
            for (night, answer) in nights {
                for claim in &answer.values {
                    let key = (chips[host].as_str(), stage, &*claim.falsifier);
                    let series = all.entry(key).or_default();
                    series.metric = Some(claim.metric);
                    let of_night = series.nights.entry(*night).or_default();
                    of_night.push((&answer.question, claim.value, claim.used));
                }
            }
        }
    }
    let mut trends: Vec<Trend> =
        all.iter().filter_map(|(key, series)| trend(fleet, key, series)).collect();
    let mut tightest: BTreeMap<(String, String), (f64, usize)> = BTreeMap::new();
    for (place, trend) in trends.iter().enumerate() {
        let key = (trend.chip.clone(), trend.stage.clone());
        let entry = tightest.entry(key).or_insert((trend.used, place));
        if trend.used > entry.0 {
            *entry = (trend.used, place);
        }
    }
    let places: BTreeSet<usize> = tightest.into_values().map(|(_, place)| place).collect();
    for place in places {
        trends[place].tightest = true;
    }
    trends
}

fn trend(
    fleet: &Fleet<'_>,
    (chip, stage, falsifier): &(&str, usize, &str),
    series: &Series<'_>,
) -> Option<Trend> {
    let (_, last) = series.nights.last_key_value()?;
    let question = most(last.iter().map(|(question, ..)| *question))?;
    // Back to the night on which something else was asked.
    let mut values: Vec<(Night, f64)> = Vec::new();
    let (mut used, mut machines) = (None, 0);
    for (night, of_night) in series.nights.iter().rev() {
        let same: Vec<_> = of_night.iter().filter(|(asked, ..)| *asked == question).collect();
        let Some(value) = median(same.iter().map(|(_, value, _)| *value)) else { break };
        if used.is_none() {
            used = median(same.iter().map(|(.., used)| *used));
            machines = same.len();
        }
        values.push((*night, value));
    }
    values.reverse();
    let (first, last) = (*values.first()?, *values.last()?);
    let (kind, since) = kind_of(&values);
    Some(Trend {
        chip: (*chip).to_owned(),
        stage: fleet.stages[*stage].clone(),
        falsifier: (*falsifier).to_owned(),
        metric: series.metric?,
        machines,
        kind,
        since: since.unwrap_or(first.0),
        first: first.1,
        last: last.1,
        used: used?,
        tightest: false,
        values,
    })
}

/// What most are.
fn most<'t>(of: impl Iterator<Item = &'t str>) -> Option<&'t str> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    of.for_each(|one| *counts.entry(one).or_default() += 1);
    counts.into_iter().max_by_key(|(_, count)| *count).map(|(one, _)| one)
}

fn median(of: impl Iterator<Item = f64>) -> Option<f64> {
    let mut of: Vec<f64> = of.collect();
    of.sort_by(f64::total_cmp);
    let middle = of.len() / 2;
    match of.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(of[middle]),
        _ => Some(of[middle - 1] / 2.0 + of[middle] / 2.0),
    }
}

/// How values move, and where a step is.
fn kind_of(values: &[(Night, f64)]) -> (Kind, Option<Night>) {
    let sizes = values.iter().map(|(_, value)| value.abs());
    let largest = sizes.fold(0.0, f64::max);
    let (low, high) =
        values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (_, v)| {
            (low.min(*v), high.max(*v))
        });
    if values.len() < 2 || high - low <= NOISE * largest {
        return (Kind::Flat, None);
    }
    let steps = values.windows(2).map(|pair| (pair[1].0, pair[1].1 - pair[0].1));
    let moved: f64 = steps.clone().map(|(_, step)| step.abs()).sum();
    let largest = steps.max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    if let Some((night, _)) = largest.filter(|(_, step)| step.abs() >= OF_ONE_NIGHT * moved) {
        return (Kind::Step, Some(night));
    }
    match mann_kendall(values) {
        Some(z) if z.abs() >= NO_CHANCE => (Kind::Drift, None),
        _ => (Kind::Unsteady, None),
    }
}

/// The statistic of Mann and Kendall's test for a direction, with their correction for ties: about
/// normal where there is none.
fn mann_kendall(values: &[(Night, f64)]) -> Option<f64> {
    let count = values.len() as f64;
    let mut s = 0.0;
    let mut ties: BTreeMap<u64, f64> = BTreeMap::new();
    for (place, (_, a)) in values.iter().enumerate() {
        *ties.entry(a.to_bits()).or_default() += 1.0;
        for (_, b) in &values[place + 1..] {
            s += f64::from(i8::from(b > a) - i8::from(b < a));
        }
    }
    let term = |n: f64| n * (n - 1.0) * (2.0 * n + 5.0);
    let tied: f64 = ties.values().map(|n| term(*n)).sum();
    let variance = (term(count) - tied) / 18.0;
    // Without a direction there is nothing to correct.
    let corrected = if s == 0.0 { 0.0 } else { s - f64::signum(s) };
    (variance > 0.0).then(|| corrected / variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nights(values: impl Iterator<Item = f64>) -> Vec<(Night, f64)> {
        values.enumerate().map(|(night, value)| (Night(night as i64), value)).collect()
    }

    #[test]
    fn a_step_a_drift_and_what_goes_up_and_down_are_told_apart() {
        let flat = nights((0..30).map(|n| 1.0 + 0.001 * f64::from(n % 3)));
        assert_eq!(kind_of(&flat), (Kind::Flat, None));
        let step = nights((0..30).map(|n| if n < 20 { 1.0 } else { 1.5 }));
        assert_eq!(kind_of(&step), (Kind::Step, Some(Night(20))));
        let drift = nights((0..30).map(|n| 1.0 + 0.02 * f64::from(n) + 0.005 * f64::from(n % 2)));
        assert_eq!(kind_of(&drift), (Kind::Drift, None));
        let noise = nights((0..30).map(|n| 1.0 + 0.2 * f64::from(n % 2)));
        assert_eq!(kind_of(&noise), (Kind::Unsteady, None));
        assert_eq!(kind_of(&nights([1.0].into_iter())), (Kind::Flat, None));
        assert_eq!(kind_of(&nights([0.0, 0.0].into_iter())), (Kind::Flat, None));
    }

    #[test]
    fn mann_and_kendalls_statistic_is_the_one_of_their_formula() {
        // S of 1, 2, ..., 10 is 45, its variance 10 x 9 x 25 / 18 = 125.
        let z = mann_kendall(&nights((0..10).map(f64::from))).expect("it varies");
        assert!((z - 44.0 / 125f64.sqrt()).abs() < 1e-12, "{z}");
        assert_eq!(mann_kendall(&nights([2.0, 2.0, 2.0].into_iter())), None);
    }
}
