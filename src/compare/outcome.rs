//! Measures a command's outcome: its exit status, matches in what it said and
//! wrote, digests of its files.
//!
//! Nothing stands against an outcome but the contract's bound, so both streams of
//! such a measure are [`Stream::OUTCOME`]. It judges nothing.

use std::collections::BTreeMap;

use super::{Measure, StageMeasures};
use crate::executor::command::CommandRecord;
use crate::metric::Metric;
use crate::op::{Command, Site, Stream};
use crate::text::lines_pattern;

/// Measures what became of a command; `read` gives a file of its by hash.
pub fn measure_outcome(
    command: &Command,
    record: &CommandRecord,
    read: &dyn Fn(&str) -> Result<Vec<u8>, String>,
) -> StageMeasures {
    let status = f64::from(record.status);
    let mut measures = vec![outcome(Command::exit_site(), Metric::ExitStatus, Ok(status))];
    for pattern in &command.patterns {
        let file = match pattern.of.as_str() {
            "stdout" => Ok(record.stdout.as_deref()),
            "stderr" => Ok(record.stderr.as_deref()),
            path => written(record, path).map(Some),
        };
        let count = file.and_then(|file| {
            let text = file.map_or(Ok(Vec::new()), read)?;
            let pattern = lines_pattern(&pattern.pattern).map_err(|error| error.to_string())?;
            Ok(pattern.find_iter(&text).count() as f64)
        });
        measures.push(outcome(Command::match_site(&pattern.name), Metric::Matches, count));
    }
    for (path, digest) in &command.digests {
        let differs = written(record, path).map(|found| f64::from(u8::from(found != digest)));
        measures.push(outcome(Command::output_site(path), Metric::DigestMismatch, differs));
    }
    StageMeasures { measures, ..StageMeasures::default() }
}

/// The hash of an output.
fn written<'a>(record: &'a CommandRecord, path: &str) -> Result<&'a str, String> {
    let output = record.outputs.iter().find(|output| output.path == path);
    let output = output.map(|output| output.blake3.as_str());
    output.ok_or_else(|| format!("`{path}` was not taken, for the status is {}", record.status))
}

fn outcome(site: Site, metric: Metric, value: Result<f64, String>) -> Measure {
    let (metrics, unmeasured) = match value {
        Ok(value) => (BTreeMap::from([(metric, value)]), None),
        Err(reason) => (BTreeMap::new(), Some(reason)),
    };
    Measure {
        subject: Stream::OUTCOME,
        judge: Stream::OUTCOME,
        site,
        shape: [0, 0],
        metrics,
        unmeasured,
        worst: None,
        first_mismatches: Vec::new(),
        z_histogram: None,
        chance: BTreeMap::new(),
    }
}
