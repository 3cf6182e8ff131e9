//! Machines that did not report: by the pace of their own earlier reports, or because somebody
//! expects them.

use std::collections::BTreeSet;

use super::{Fleet, Missing, in_words};

/// How often somebody reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// The last report, in seconds since 1970.
    pub last: Option<i64>,
    /// Seconds between reports, where there are enough to tell.
    pub every: Option<f64>,
}

/// From so many reports on there is a pace.
const ENOUGH: usize = 3;
/// The last reports say how often somebody reports now.
const LOOK_BACK: usize = 10;
/// A report may be so much later than its turn: a share of the pace.
const GRACE: f64 = 0.5;

impl Pace {
    /// Of reports, the oldest first.
    pub fn of(reports: impl Iterator<Item = i64>) -> Pace {
        let reports: Vec<i64> = reports.collect();
        let late = reports.len().saturating_sub(LOOK_BACK + 1);
        let every = match reports.len() {
            few if few < ENOUGH => None,
            _ => median_gap(reports[late..].iter().copied()),
        };
        Pace { last: reports.last().copied(), every }
    }

    /// When the next report is due.
    pub fn due(&self) -> Option<i64> {
        Some(self.last? + self.every? as i64)
    }

    /// Whether a report is overdue at a moment.
    pub fn is_overdue(&self, at: i64) -> bool {
        let late = |due: i64| (at - due) as f64 > GRACE * self.every.unwrap_or(0.0);
        self.due().is_some_and(late)
    }
}

/// The median of the steps between numbers that rise.
pub fn median_gap(of: impl Iterator<Item = i64>) -> Option<f64> {
    let of: Vec<i64> = of.collect();
    let mut gaps: Vec<i64> = of.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect();
    gaps.sort_unstable();
    let middle = gaps.len() / 2;
    match gaps.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(gaps[middle] as f64),
        _ => Some((gaps[middle - 1] as f64 + gaps[middle] as f64) / 2.0),
    }
}

/// The pace of each machine. Of one that is expected and has too few reports for its own it is that
/// of the others.
pub fn paces(reports: &[Vec<i64>], expected: impl Fn(usize) -> bool) -> Vec<Pace> {
    let own: Vec<Pace> = reports.iter().map(|of| Pace::of(of.iter().copied())).collect();
    let mut known: Vec<f64> = own.iter().filter_map(|pace| pace.every).collect();
    known.sort_by(f64::total_cmp);
    let usual = known.get(known.len() / 2).copied();
    let pace = |(host, pace): (usize, Pace)| match pace.every {
        None if expected(host) => Pace { every: usual, ..pace },
        _ => pace,
    };
    own.into_iter().enumerate().map(pace).collect()
}

/// Machines whose report is overdue, and those that somebody expects and that never reported.
pub fn missing(fleet: &Fleet<'_>, expected: &[String], without: &[String]) -> Vec<Missing> {
    let mut missing = Vec::new();
    for (host, pace) in fleet.paces.iter().enumerate() {
        if fleet.is_overdue(host) {
            missing.push(Missing {
                machine: fleet.name(host),
                last: pace.last.map(in_words),
                due: pace.due().map(in_words),
                every_hours: pace.every.map(|every| every / 3600.0),
            });
        }
    }
    let known: BTreeSet<&str> = fleet.hosts.iter().map(AsRef::as_ref).collect();
    let expected: BTreeSet<&String> = expected.iter().collect();
    for name in expected {
        if !known.contains(name.as_str()) && !without.contains(name) {
            let machine = crate::text::shown(name);
            missing.push(Missing { machine, last: None, due: None, every_hours: None });
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600;

    #[test]
    fn a_report_is_overdue_half_a_pace_after_its_turn() {
        let daily = Pace::of((0..5).map(|day| day * 24 * HOUR));
        assert_eq!(daily.due(), Some(5 * 24 * HOUR));
        assert!(!daily.is_overdue(5 * 24 * HOUR + 11 * HOUR));
        assert!(daily.is_overdue(5 * 24 * HOUR + 13 * HOUR));
        let weekly = Pace::of((0..4).map(|week| week * 7 * 24 * HOUR));
        assert!(
            !weekly.is_overdue(4 * 7 * 24 * HOUR),
            "once a week is no daily report that is late"
        );
    }

    #[test]
    fn of_one_or_two_reports_nobody_knows_the_pace() {
        assert!(!Pace::of([0, HOUR].into_iter()).is_overdue(i64::MAX / 2));
        assert_eq!(Pace::of([].into_iter()), Pace { last: None, every: None });
    }

    #[test]
    fn one_night_without_a_report_does_not_change_the_pace() {
        let days = [0, 1, 2, 3, 6, 7, 8];
        let pace = Pace::of(days.into_iter().map(|day| day * 24 * HOUR));
        assert_eq!(pace.every, Some(24.0 * HOUR as f64));
    }
}
