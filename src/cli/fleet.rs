//! `runner fleet`: the runs of many machines as one report.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;

use super::{Failed, SYSTEM, USAGE, print};
use crate::cache::{RemoteError, bring_runs, is_url};
use crate::executor::hook;
use crate::fleet::read::{Window, find, gather};
use crate::fleet::{Notice, Report, Shift, metrics, page, report, text};
use crate::terminal::tell_line;
use crate::text::{Shown, shown};

#[derive(Subcommand)]
pub(super) enum FleetCli {
    /// Say where machines differ and since when, what those have in common, how values move on each
    /// chip, and who did not report.
    #[command(
        after_help = "Exit codes: 0 every machine passes, alike and in time; 1 something is \
        falsified, or bits differ; 2 bad usage, or no run can be read; 3 nothing was measured; 4 a \
        machine did not report, or a stage could not run; 74 the disk is full.

Examples:
  runner fleet report /shared/inference/runs
  runner fleet report s3://BUCKET/team --html fleet.html
  runner fleet report nodes/*/runs --html fleet.html --metrics fleet.prom
  runner fleet report runs --expect node01,node02 --notify 'mail -s \"$RUNNER_SUMMARY\" me'
  runner fleet report runs --format json | jq '.findings[].causes[0]'"
    )]
    Report(Box<ReportArgs>),
}

#[derive(Args)]
pub(super) struct ReportArgs {
    /// Folders with runs anywhere below them, runs, run.json files, or stores such as
    /// s3://BUCKET/PATH with run.json files below.
    #[arg(default_value = "runs")]
    runs: Vec<PathBuf>,
    /// What to print.
    #[arg(long, value_enum, default_value_t = FleetFormat::Text)]
    format: FleetFormat,
    /// The file to write that to; stdout by default.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// A page to write besides.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// A JSON file to write besides.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// An OpenMetrics file to write besides, for node_exporter.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Machines that must have reported, also if no run of theirs is there.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    expect: Vec<String>,
    /// Machines that are left out: those that are gone for good.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    without: Vec<String>,
    /// How many nights to look back.
    #[arg(long, value_name = "COUNT", default_value = "90")]
    nights: NonZeroU32,
    /// When a day begins, in hours after midnight, UTC: a run belongs to the night of its day.
    #[arg(long, value_name = "HOUR", default_value = "0", value_parser = clap::value_parser!(u8).range(0..24))]
    day_begins: u8,
    /// The moment for which the report is made, such as 2026-11-30T08:00:00Z; now by default.
    #[arg(long, value_name = "TIME")]
    at: Option<Timestamp>,
    /// A program for `sh -c`, started once at the end: it reads what is to be told of the whole fleet
    /// as JSON.
    #[arg(long, value_name = "COMMAND", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    notify: Option<String>,
    /// Seconds after which that program is killed.
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    notify_timeout: NonZeroU64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FleetFormat {
    /// For reading.
    Text,
    /// Everything, for programs: docs/fleet.schema.json.
    Json,
    /// One page for a browser, without network or server.
    Html,
    /// For Prometheus, with the machine as a label.
    Openmetrics,
}

pub(super) fn fleet(command: &FleetCli) -> Result<u8, Failed> {
    let FleetCli::Report(args) = command;
    let made = make(args).and_then(|report| write(args, &report).map(|()| report));
    let (notice, result) = match made {
        Ok(report) => {
            let page = args.html.as_ref().and_then(|page| std::path::absolute(page).ok());
            let page = page.map(|page| page.display().to_string());
            (Notice::of(&report, page), Ok(report.exit_code))
        }
        Err(failed) => (Notice::failed(&failed.text, failed.code), Err(failed)),
    };
    if let Err(problem) = notify(args, &notice) {
        tell_line(&format!("warning: {problem}"));
    }
    result
}

/// The runs that lie in a store, as files of this machine.
fn brought(url: &str, window: &Window) -> Result<Vec<PathBuf>, Failed> {
    // One folder for each URL, beside what else is known on this machine.
    let name = blake3::hash(url.as_bytes()).to_hex();
    let folder = super::own_folder().unwrap_or_else(|| std::env::temp_dir().join("runner"));
    let folder = folder.join("fleet").join(&name.as_str()[..16]);
    let paths = bring_runs(url, &folder, |run| window.may_hold(run)).map_err(|error| {
        let (code, text) = match error {
            RemoteError::Url { url, problem } => {
                (USAGE, format!("error: `{url}` cannot be read: {problem}"))
            }
            RemoteError::Refused { url, what, problem } => (
                USAGE,
                format!(
                    "error: `{url}` refuses {what}: {problem}; are its name and the credentials \
                     right? (docs/shared-cache.md says which variables are read)"
                ),
            ),
            RemoteError::Down { url, problem } => {
                (SYSTEM, format!("error: `{url}` cannot be read now: {problem}; try again later"))
            }
        };
        Failed { text, code }
    })?;
    if paths.is_empty() {
        return Err(Failed::from(format!(
            "error: `{}` holds no run of the last {} nights: no run.json lies below it whose folder \
             is named as a run's",
            shown(url),
            window.nights
        )));
    }
    Ok(paths)
}

fn make(args: &ReportArgs) -> Result<Report, Failed> {
    let at = args.at.unwrap_or_else(Timestamp::now).as_second();
    let window = Window {
        at,
        nights: args.nights.get(),
        shift: Shift(args.day_begins),
        without: args.without.clone(),
    };
    let (urls, folders): (Vec<PathBuf>, Vec<PathBuf>) =
        args.runs.iter().cloned().partition(|place| is_url(place));
    let mut found = find(&folders)?;
    for url in &urls {
        found.files.extend(brought(&url.to_string_lossy(), &window)?);
    }
    let gathered = gather(&found, &window);
    if gathered.runs.is_empty() {
        let why = match gathered.left_out.first() {
            Some(left_out) => left_out.why.clone(),
            None => format!(
                "all {} are older than {} nights, or of machines that `--without` leaves out",
                found.files.len(),
                args.nights
            ),
        };
        let where_to = args.runs.iter().map(|place| place.shown().to_string()).collect::<Vec<_>>();
        return Err(format!("no run in `{}` can be taken: {why}", where_to.join("`, `")).into());
    }
    Ok(report(&gathered, &window, &args.expect))
}

/// What is asked for, each whole or not there; what is printed comes last.
fn write(args: &ReportArgs, report: &Report) -> Result<(), Failed> {
    let moment = Timestamp::now().as_second();
    let json = || {
        serde_json::to_string_pretty(report)
            .map(|json| json + "\n")
            .map_err(|error| format!("the report cannot be encoded: {error}"))
    };
    if let Some(path) = &args.html {
        put(path, &page(report))?;
    }
    if let Some(path) = &args.json {
        put(path, &json()?)?;
    }
    if let Some(path) = &args.metrics {
        put(path, &metrics::open_metrics(report, moment))?;
    }
    let text = match args.format {
        FleetFormat::Text => text(report),
        FleetFormat::Json => json()?,
        FleetFormat::Html => page(report),
        FleetFormat::Openmetrics => metrics::open_metrics(report, moment),
    };
    match &args.out {
        Some(path) => put(path, &text),
        None => print(&text).map(drop).map_err(Failed::system),
    }
}

fn put(path: &Path, text: &str) -> Result<(), Failed> {
    crate::cache::write_whole(path, text.as_bytes()).map_err(|error| Failed::written(&error))
}

fn notify(args: &ReportArgs, notice: &Notice) -> Result<(), String> {
    let Some(command) = &args.notify else { return Ok(()) };
    let json = serde_json::to_vec(notice)
        .map_err(|error| format!("the notice cannot be encoded: {error}"))?;
    let variables =
        [("RUNNER_SUMMARY", notice.line.as_str()), ("RUNNER_VERDICT", notice.verdict.name())];
    let limit = Duration::from_secs(args.notify_timeout.get());
    hook::call(command, &json, &variables, limit)
        .map_err(|error| format!("--notify {}", shown(&error)))
}
