//! What `runner run` does beyond the run when nobody watches, and the commands
//! that look back: `baseline`, `history`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::{PASS, print, record_of};
use crate::manifest::{Pipeline, Profile};
use crate::nightly::{Summary, baseline, metrics, retention, sum_up};
use crate::op::{Op, StageId};
use crate::record::RunRecord;
use crate::terminal::tell_line;
use crate::text::Shown;

#[derive(Args)]
pub(super) struct NightlyArgs {
    /// A profile of pipeline.toml: selection, required arms, repeats, runs to keep.
    #[arg(long)]
    pub profile: Option<String>,
    /// A program for `sh -c`, started at the end: it reads the summary as JSON.
    #[arg(long, value_name = "COMMAND")]
    notify: Option<String>,
    /// An OpenMetrics file to write, for node_exporter.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Finished runs to keep; older ones are removed.
    #[arg(long, value_name = "COUNT")]
    keep: Option<std::num::NonZeroUsize>,
}

#[derive(Subcommand)]
pub(super) enum BaselineCli {
    /// Make a run the one that later ones are held against, on its hardware.
    Set {
        /// The run's name, or `latest`.
        run: String,
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
}

#[derive(Args)]
pub(super) struct HistoryArgs {
    /// Stages to show; all by default.
    stages: Vec<String>,
    /// How many runs to look back.
    #[arg(long, default_value_t = 10)]
    last: usize,
    /// The folder of runs.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

impl NightlyArgs {
    /// The profile that was asked for.
    pub fn profile<'p>(&self, pipeline: &'p Pipeline) -> Result<Option<&'p Profile>, String> {
        let Some(name) = &self.profile else { return Ok(None) };
        let known: Vec<&str> = pipeline.profiles.keys().map(String::as_str).collect();
        pipeline.profiles.get(name).map(Some).ok_or_else(|| match known.is_empty() {
            true => {
                format!("there is no profile `{name}`; add `[profile.{name}]` to pipeline.toml")
            }
            false => {
                format!("there is no profile `{name}`; pipeline.toml has {}", known.join(", "))
            }
        })
    }

    /// With a profile, the only run in its folder: a second one waits, and says so.
    pub fn alone(&self, runs: &Path) -> Result<Option<File>, String> {
        if self.profile.is_none() {
            return Ok(None);
        }
        std::fs::create_dir_all(runs)
            .map_err(|error| format!("cannot make `{}`: {error}", runs.shown()))?;
        let path = runs.join(".lock");
        let cannot = |error: std::io::Error| format!("cannot lock `{}`: {error}", path.shown());
        let file = File::options().create(true).append(true).open(&path).map_err(cannot)?;
        if file.try_lock().is_err() {
            tell_line(&format!("another run holds `{}`; waiting for it to end", path.shown()));
            file.lock().map_err(cannot)?;
        }
        Ok(Some(file))
    }

    /// Whether anything is to follow that a run of which nothing changed would skip.
    pub fn asks(&self) -> bool {
        let asked = self.profile.is_some() || self.notify.is_some();
        asked || self.metrics.is_some() || self.keep.is_some()
    }

    /// Everything that follows a finished run. What fails here is told and does not
    /// change the run's verdict. `aloud` prints the summary below the table.
    pub fn follow(
        &self,
        record: &RunRecord,
        runs: &Path,
        profile: Option<&Profile>,
        aloud: bool,
    ) -> Result<(), String> {
        let mut said = String::new();
        let summary = match sum_up(record, runs) {
            Ok(summary) => summary,
            Err(problem) => {
                tell_line(&format!("warning: {problem}"));
                return Ok(());
            }
        };
        let wanted = self.asks();
        if aloud && (summary.baseline.is_some() || wanted) {
            said += &format!("{}\n", summary.line);
            summary.changes.iter().for_each(|change| said += &format!("  {change}\n"));
        }
        let keep = self.keep.or(profile.and_then(|profile| profile.keep));
        let outcomes = [
            self.write_summary(&summary, &runs.join(&record.id)),
            self.write_metrics(record, &summary),
            self.tell(&summary),
            keep.map_or(Ok(()), |keep| retention::remove_old(runs, keep.get()).map(drop)),
        ];
        for problem in outcomes.into_iter().filter_map(Result::err) {
            tell_line(&format!("warning: {problem}"));
        }
        if said.is_empty() { Ok(()) } else { print(&said).map(drop) }
    }

    fn write_summary(&self, summary: &Summary, folder: &Path) -> Result<(), String> {
        let json = serde_json::to_vec_pretty(summary).map_err(|error| error.to_string())?;
        crate::cache::write_whole(&folder.join("summary.json"), &json)
            .map_err(|error| error.to_string())
    }

    fn write_metrics(&self, record: &RunRecord, summary: &Summary) -> Result<(), String> {
        let Some(path) = &self.metrics else { return Ok(()) };
        let changes = summary.baseline.as_ref().map(|_| summary.changes.len());
        let text = metrics::open_metrics(record, Timestamp::now().as_second(), changes);
        crate::cache::write_whole(path, text.as_bytes()).map_err(|error| error.to_string())
    }

    fn tell(&self, summary: &Summary) -> Result<(), String> {
        use std::io::Write;
        let Some(command) = &self.notify else { return Ok(()) };
        let cannot = |error: &dyn std::fmt::Display| format!("`--notify {command}`: {error}");
        let json = serde_json::to_vec(summary).map_err(|error| cannot(&error))?;
        let mut child = Command::new("/bin/sh")
            .args(["-c", command])
            .env("RUNNER_SUMMARY", &summary.line)
            .env("RUNNER_VERDICT", summary.verdict.name())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .map_err(|error| cannot(&error))?;
        if let Some(mut input) = child.stdin.take() {
            // A program that reads no input is no failure.
            let _ = input.write_all(&json);
        }
        let status = child.wait().map_err(|error| cannot(&error))?;
        if status.success() { Ok(()) } else { Err(cannot(&status)) }
    }
}

/// Repeats of a profile: a pass counts only if its repeats agree.
pub(super) fn repeat(pipeline: &mut Pipeline, profile: &str) {
    let repeats = pipeline.profiles.get(profile).and_then(|profile| profile.repeats);
    let Some(wanted) = repeats else { return };
    for stage in &mut pipeline.stages {
        if let Op::Forward { repeats, .. } = &mut stage.op {
            *repeats = wanted.get().max(*repeats);
        }
    }
}

pub(super) fn set_baseline(command: &BaselineCli) -> Result<u8, String> {
    let BaselineCli::Set { run, runs } = command;
    let (_, record) = record_of(run, runs)?;
    let id = &record.id;
    if record.interrupted {
        return Err(format!("`{id}` was stopped; a baseline is a whole run"));
    }
    let hardware = baseline::set(&record, runs)?;
    print(&format!("{id} is the baseline of {hardware}\n"))
}

/// One line per stage: its verdicts, oldest first, and how the decisive value moved.
pub(super) fn history(args: &HistoryArgs) -> Result<u8, String> {
    let entries = std::fs::read_dir(&args.runs)
        .map_err(|error| format!("cannot read `{}`: {error}", args.runs.shown()))?;
    // By age: several runs of one second differ in nothing else.
    let finished = entries.filter_map(|entry| {
        let folder = entry.ok()?.path();
        let changed = folder.join("run.json").metadata().ok()?.modified().ok()?;
        Some((changed, folder))
    });
    let finished: BTreeSet<(std::time::SystemTime, PathBuf)> = finished.collect();
    let mut records: Vec<RunRecord> = Vec::new();
    for (_, folder) in finished.iter().rev() {
        if records.len() == args.last {
            break;
        }
        match RunRecord::read(folder) {
            Ok(record) => records.push(record),
            Err(problem) => tell_line(&format!("left out: {problem}")),
        }
    }
    records.reverse();
    if records.is_empty() {
        return Err(format!("`{}` holds no finished run", args.runs.shown()));
    }
    let mut text = String::new();
    for record in &records {
        let count = record.stages.len();
        text += &format!("{}  {:10}  {count} stages\n", record.id, record.verdict);
    }
    text += "\n";
    let shown = |id: &StageId| args.stages.is_empty() || args.stages.contains(&id.0);
    let mut lines: BTreeMap<&StageId, (Vec<String>, Vec<f64>, String)> = BTreeMap::new();
    for (index, record) in records.iter().enumerate() {
        for stage in record.stages.iter().filter(|stage| shown(&stage.id)) {
            let line = lines.entry(&stage.id).or_default();
            line.0.resize(index, "-".to_owned());
            line.0.push(stage.verdict.to_string());
            let tightest = stage
                .judgements
                .iter()
                .filter(|judgement| judgement.value.is_some())
                .max_by(|a, b| a.used.unwrap_or(0.0).total_cmp(&b.used.unwrap_or(0.0)));
            if let Some(judgement) = tightest {
                line.1.extend(judgement.value);
                line.2 = format!("{} of {}", judgement.metric, judgement.falsifier);
            }
        }
    }
    if lines.is_empty() {
        return Err(format!("no run has the stage {}", args.stages.join(" or ")));
    }
    let width = lines.keys().map(|id| id.0.len()).max().unwrap_or(0);
    for (id, (verdicts, values, what)) in &lines {
        let trend = match (values.first(), values.last()) {
            (Some(first), Some(last)) => {
                let (first, last) = (crate::text::number(*first), crate::text::number(*last));
                format!("{what}: {first} -> {last}")
            }
            _ => String::new(),
        };
        text += &format!("{:width$}  {}  {trend}\n", id.0, runs_of(verdicts));
    }
    print(&text)?;
    Ok(PASS)
}

/// `pass x 6, drift, pass`.
fn runs_of(verdicts: &[String]) -> String {
    let mut parts: Vec<(String, usize)> = Vec::new();
    for verdict in verdicts {
        match parts.last_mut() {
            Some((last, count)) if last == verdict => *count += 1,
            _ => parts.push((verdict.clone(), 1)),
        }
    }
    let part = |(verdict, count): &(String, usize)| match count {
        1 => verdict.clone(),
        count => format!("{verdict} x {count}"),
    };
    parts.iter().map(part).collect::<Vec<_>>().join(", ")
}
