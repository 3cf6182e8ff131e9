//! What `runner run` does beyond the run when nobody watches, and `baseline`.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::past::{record_of, relative};
use super::{Failed, INTERRUPTED, PASS, print};
use crate::executor::hook;
use crate::interrupt;
use crate::machine;
use crate::manifest::{Pipeline, Profile};
use crate::nightly::{
    Earlier, SUMMARY, Summary, baseline, earlier, failed, metrics, retention, sum_up,
};
use crate::op::{Arm, Op};
use crate::record::{RunRecord, Series};
use crate::terminal::tell_line;
use crate::text::{Shown, one_line, shown};

#[derive(Args)]
pub(super) struct NightlyArgs {
    /// A profile of pipeline.toml: selection, what is measured anew, required arms, repeats, runs
    /// to keep.
    #[arg(long)]
    pub profile: Option<String>,
    /// Arms to measure anew although their results are there; others are reused.
    #[arg(long, value_delimiter = ',', value_name = "ARMS", value_parser = measured)]
    pub fresh: Vec<Arm>,
    /// A program for `sh -c`, started at every end, also of a run that failed or was stopped: it
    /// reads the summary as JSON.
    #[arg(long, value_name = "COMMAND", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    notify: Option<String>,
    /// Seconds after which that program is killed.
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    notify_timeout: NonZeroU64,
    /// An OpenMetrics file to write at every end, for node_exporter.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Finished runs of this machine to keep; older ones are removed.
    #[arg(long, value_name = "COUNT")]
    keep: Option<NonZeroUsize>,
}

/// What can be measured anew, by its name.
fn measured(text: &str) -> Result<Arm, String> {
    let known = || Arm::MEASURED.into_iter();
    known().find(|arm| arm.name() == text).ok_or_else(|| {
        let names: Vec<&str> = known().map(Arm::name).collect();
        format!("no arm is called `{text}`; give some of {}", names.join(", "))
    })
}

#[derive(Subcommand)]
pub(super) enum BaselineCli {
    /// Make a run the one that later ones of its stages, models and hardware are held against.
    Set {
        /// The run: `latest`, `previous`, a name, or a path.
        run: String,
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
    /// Show the baselines, and what each is one of.
    Show {
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
    /// Remove a run from the baselines; the run itself stays.
    Remove {
        /// The run's name.
        run: String,
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
}

/// What watches over one run: that it is alone, and that its end is told once.
pub(super) struct Night<'a> {
    args: &'a NightlyArgs,
    lock: RefCell<Option<File>>,
    told: Cell<bool>,
}

impl<'a> Night<'a> {
    /// Of a run that is only shown nobody is told.
    pub fn new(args: &'a NightlyArgs, only_shown: bool) -> Night<'a> {
        Night { args, lock: RefCell::default(), told: Cell::new(only_shown) }
    }

    /// The only run of a profile in its folder on this machine: a second one waits, and says so.
    /// Other machines may use the folder at the same time.
    pub fn alone(&self, runs: &Path) -> Result<(), Failed> {
        const LOOK: Duration = Duration::from_millis(100);
        let path = runs.join(machine::file_of(".lock"));
        let cannot = |what: &str, path: &Path, error: &std::io::Error| {
            Failed::of_io(format!("cannot {what} `{}`: {error}", path.shown()), error)
        };
        std::fs::create_dir_all(runs).map_err(|error| cannot("make", runs, &error))?;
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|error| cannot("lock", &path, &error))?;
        let mut waiting = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(std::fs::TryLockError::WouldBlock) if interrupt::requested() => {
                    let text = "stopped while it waited for another run to end".to_owned();
                    return Err(Failed { text, code: INTERRUPTED });
                }
                Err(std::fs::TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut waiting, true) {
                        let path = path.shown();
                        tell_line(&format!("another run holds `{path}`; waiting for it to end"));
                    }
                    std::thread::sleep(LOOK);
                }
                Err(std::fs::TryLockError::Error(error)) => {
                    return Err(cannot("lock", &path, &error));
                }
            }
        }
        *self.lock.borrow_mut() = Some(file);
        Ok(())
    }

    /// Everything that follows a finished run, of which `trouble` could not be written. What fails
    /// here is told and does not change the run's verdict. `aloud` prints the summary below the
    /// table.
    pub fn follow(
        &self,
        record: &RunRecord,
        runs: &Path,
        profile: Option<&Profile>,
        aloud: bool,
        trouble: Option<&Failed>,
    ) -> Result<(), Failed> {
        let asks = self.args.asks();
        let earlier = earlier(record, runs, asks);
        for problem in &earlier.problems {
            tell_line(&format!("warning: {problem}"));
        }
        let mut summary = sum_up(record, runs, &earlier);
        if let Some(Failed { text, code }) = trouble {
            summary.exit_code = *code;
            summary.problems.push(text.clone());
            summary.line += &format!("; {}", one_line(text));
        }
        let keep = self.args.keep.or(profile.and_then(|profile| profile.keep));
        let machine = machine::name();
        let remove = |keep: NonZeroUsize| retention::remove_old(runs, keep.get(), machine);
        let outcomes = [
            write_summary(&summary, &runs.join(&record.id), asks),
            keep.map_or(Ok(()), |keep| remove(keep).map(drop)),
        ];
        for problem in outcomes.into_iter().filter_map(Result::err) {
            tell_line(&format!("warning: {problem}"));
        }
        self.tell(&summary, Some(record));
        if aloud && trouble.is_none() && (summary.baseline.is_some() || asks) {
            print(&in_words(&summary, &earlier)).map_err(Failed::system)?;
        }
        Ok(())
    }

    /// What follows where there is no finished run: whoever waits for a message gets one.
    pub fn follow_failure(&self, text: &str, code: u8) {
        self.tell(&failed(text, code, code == INTERRUPTED, machine::name()), None);
    }

    /// Metrics and message, once for each run. The folder is free by then: a message may take long.
    fn tell(&self, summary: &Summary, record: Option<&RunRecord>) {
        drop(self.lock.borrow_mut().take());
        if self.told.replace(true) {
            return;
        }
        let outcomes = [self.write_metrics(summary, record), self.notify(summary)];
        for problem in outcomes.into_iter().filter_map(Result::err) {
            tell_line(&format!("warning: {problem}"));
        }
    }

    fn write_metrics(&self, summary: &Summary, record: Option<&RunRecord>) -> Result<(), String> {
        let Some(path) = &self.args.metrics else { return Ok(()) };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            return Err(format!(
                "`--metrics {}` is not written: `{}` is no folder; make it, or name another file",
                path.shown(),
                folder.shown()
            ));
        }
        let text = metrics::open_metrics(summary, record, Timestamp::now().as_second());
        crate::cache::write_whole(path, text.as_bytes()).map_err(|error| error.to_string())
    }

    fn notify(&self, summary: &Summary) -> Result<(), String> {
        let Some(command) = &self.args.notify else { return Ok(()) };
        let json = serde_json::to_vec(summary)
            .map_err(|error| format!("the summary cannot be encoded: {error}"))?;
        let variables =
            [("RUNNER_SUMMARY", summary.line.as_str()), ("RUNNER_VERDICT", summary.verdict.name())];
        let limit = Duration::from_secs(self.args.notify_timeout.get());
        hook::call(command, &json, &variables, limit).map_err(|error| format!("--notify {error}"))
    }
}

/// Writes the summary beside run.json; of a run that nobody waits for without a flush.
fn write_summary(summary: &Summary, folder: &Path, flush: bool) -> Result<(), String> {
    let json = serde_json::to_vec_pretty(summary).map_err(|error| error.to_string())?;
    let path = folder.join(SUMMARY);
    match flush {
        true => crate::cache::write_whole(&path, &json).map_err(|error| error.to_string()),
        false => std::fs::write(&path, &json)
            .map_err(|error| format!("cannot write `{}`: {error}", path.shown())),
    }
}

/// The line, and what changed since when.
fn in_words(summary: &Summary, earlier: &Earlier) -> String {
    let mut lines = vec![summary.line.clone()];
    let same = summary.previous == summary.baseline;
    let of_previous = &summary.changes_since_previous;
    let previous = earlier.previous.as_ref().filter(|_| !same && !of_previous.is_empty());
    if let Some(previous) = previous {
        lines.push(format!("since {}, the run before:", previous.id));
        lines.extend(of_previous.iter().map(|change| format!("  {change}")));
    }
    if let Some(baseline) = earlier.baseline.as_ref().filter(|_| !summary.changes.is_empty()) {
        let known = previous.is_some() && *of_previous == summary.changes;
        let told = if known { " the same" } else { "" };
        lines.push(format!("since {}, the baseline:{told}", baseline.id));
        let changes = summary.changes.iter().filter(|_| !known);
        lines.extend(changes.map(|change| format!("  {change}")));
    }
    lines.iter().map(|line| one_line(line) + "\n").collect()
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

    /// Whether anything is to follow that a run of which nothing changed would skip.
    pub fn asks(&self) -> bool {
        let asked = self.profile.is_some() || self.notify.is_some();
        asked || self.metrics.is_some() || self.keep.is_some()
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

/// What a run is one of: its folder of stages as seen from the folder of runs, the models of all
/// stages, and the selection.
pub(super) fn series_of(pipeline: &Pipeline, runs: &Path, selection: Option<&str>) -> Series {
    let whole = |path: &Path| {
        path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or(path.to_owned())
    };
    let folder = from(&whole(runs), &whole(&pipeline.folder)).display().to_string();
    let models = pipeline.stages.iter().filter(|stage| stage.op.reads_model());
    let mut models: Vec<String> = models.map(|stage| stage.model.clone()).collect();
    models.sort_unstable();
    models.dedup();
    Series { folder, models, selection: selection.map(str::to_owned) }
}

/// The way from one absolute folder to another.
fn from(start: &Path, end: &Path) -> PathBuf {
    let shared = start.components().zip(end.components()).take_while(|(a, b)| a == b).count();
    let up = start.components().skip(shared).map(|_| std::path::Component::ParentDir);
    up.chain(end.components().skip(shared)).collect()
}

pub(super) fn baseline(command: &BaselineCli) -> Result<u8, String> {
    let (BaselineCli::Set { runs, .. }
    | BaselineCli::Show { runs }
    | BaselineCli::Remove { runs, .. }) = command;
    if !runs.is_dir() {
        return Err(format!("`{}` is no folder of runs", runs.shown()));
    }
    match command {
        BaselineCli::Set { run, .. } => {
            let (_, record) = record_of(run, runs)?;
            let id = shown(&record.id);
            if record.interrupted {
                return Err(format!("`{id}` was stopped; a baseline is a whole run"));
            }
            let before = baseline::set(&record, runs)?.filter(|before| *before != record.id);
            let instead =
                before.map_or(String::new(), |before| format!("instead of {}: ", shown(&before)));
            print(&format!("{instead}the baseline is now\n{}", in_full(&record)))
        }
        BaselineCli::Show { .. } => {
            let all = baseline::all(runs)?;
            let mut text: Vec<String> = Vec::new();
            for (_, run) in &all {
                match run {
                    Ok(run) => text.push(in_full(run)),
                    Err(problem) => tell_line(&format!("left out: {problem}")),
                }
            }
            print(&match all.as_slice() {
                [] => "there is no baseline; `runner baseline set RUN` makes one\n".to_owned(),
                _ => text.join("\n"),
            })
        }
        BaselineCli::Remove { run, .. } => {
            let id = match run.as_str() {
                word @ ("latest" | "previous") => record_of(word, runs)?.1.id,
                "baseline" => relative("baseline", &record_of("latest", runs)?)?.id,
                name => name.to_owned(),
            };
            let count = baseline::remove(&id, runs)?;
            let of = if count == 1 { String::new() } else { format!("; it was {count} of them") };
            print(&format!("{} is no baseline any more{of}\n", shown(&id)))
        }
    }
    .map(|_| PASS)
}

/// A baseline, and what it is one of.
fn in_full(run: &RunRecord) -> String {
    let machine = run.provenance.machine.as_deref().map_or(String::new(), |m| format!(", on {m}"));
    let mut lines = vec![format!("{}  {}, {}{machine}", run.id, run.verdict, run.started)];
    if let Some(Series { folder, models, selection }) = &run.series {
        lines.push(format!("  stages    {folder}"));
        lines.extend(selection.as_ref().map(|selection| format!("  selected  {selection}")));
        let models = if models.is_empty() { "none".to_owned() } else { models.join(", ") };
        lines.push(format!("  models    {models}"));
    }
    lines.push(format!("  hardware  {}", baseline::hardware(run)));
    lines.iter().map(|line| one_line(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::from;
    use std::path::Path;

    #[test]
    fn the_way_from_one_folder_to_another_survives_a_move_of_both() {
        let way = |start: &str, end: &str| from(Path::new(start), Path::new(end));
        assert_eq!(way("/srv/a/runs", "/srv/a/stages"), Path::new("../stages"));
        assert_eq!(way("/srv/a", "/srv/a/stages"), Path::new("stages"));
        assert_eq!(way("/x/runs", "/srv/a"), Path::new("../../srv/a"));
    }
}
