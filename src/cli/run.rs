//! `runner run`: a folder of stages becomes verdicts, a table and the run's folder.

use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use jiff::Timestamp;

use super::{BUG, INTERRUPTED, Selection, make_plan, print, selected, stamps_of, store_of};
use crate::compute::arms::Workshop;
use crate::event::{Event, Sink};
use crate::executor::{Attempts, Processes};
use crate::interrupt;
use crate::op::Arm;
use crate::record::{Provenance, RunRecord, SCHEMA};
use crate::report::{Bars, EventLog, Lines, Sinks, table};
use crate::run::{Options, run};
use crate::verdict::Verdict;

#[derive(Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    selection: Selection,
    /// An arm without which a stage is an error.
    #[arg(long)]
    require: Vec<Arm>,
    /// Jobs that run beside each other; all cores by default.
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// What to print.
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    format: OutputFormat,
}

impl RunArgs {
    /// The folder of runs.
    pub(super) fn runs(&self) -> &Path {
        &self.selection.runs
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// A table on stdout; bars on stderr if it is a terminal, else lines.
    Human,
    /// A table on stdout, lines on stderr.
    Plain,
    /// run.json on stdout, lines on stderr.
    Json,
}

/// Runs stages with the arms of `workshop`, writes the run's folder, prints the outcome.
pub(super) fn run_stages(args: &RunArgs, workshop: &dyn Workshop) -> Result<u8, String> {
    let (pipeline, graph, stages) = selected(&args.selection)?;
    let runs = &args.selection.runs;
    let store = store_of(runs);
    ctrlc::set_handler(on_signal).map_err(|error| format!("cannot watch for Ctrl-C: {error}"))?;
    let plan = make_plan(&pipeline, &graph, &stages, &store)?;

    let (started, clock) = (Timestamp::now(), Instant::now());
    let (id, folder) = make_run_folder(runs, &started, &plan.id)?;
    let log = std::fs::File::create(folder.join("events.jsonl"))
        .map_err(|error| format!("cannot write to `{}`: {error}", folder.display()))?;
    let bars = args.format == OutputFormat::Human && std::io::stderr().is_terminal();
    let progress: Box<dyn Sink> = if bars { Box::new(Bars::default()) } else { Box::new(Lines) };
    let mut sinks = Sinks(vec![progress, Box::new(EventLog::new(log))]);
    let stamps = stamps_of(runs, false);
    let processes = Processes::of_this_program();
    let (attempts, _) = Attempts::open(&store.attempts(), &id).map_err(|error| {
        format!("cannot make a folder for attempts in `{}`: {error}", runs.display())
    })?;
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let options = Options {
        run: id.clone(),
        created: seconds_only(&started),
        jobs: args.jobs.map_or(cores, NonZeroUsize::get),
        require: args.require.iter().copied().collect(),
        workshop,
        stamps: &stamps,
        processes: &processes,
        attempts: &attempts,
    };
    let finished = run(&plan, &store, &options, &mut sinks);
    if let Err(error) = stamps.save() {
        tracing::warn!("digests of files are not kept: {error}");
    }

    let verdict = Verdict::of_run(finished.stages.iter().map(|stage| stage.verdict));
    let exit_code = match (&finished.bug, finished.interrupted) {
        (Some(_), _) => BUG,
        (None, true) => INTERRUPTED,
        (None, false) => verdict.exit_code(),
    };
    let record = RunRecord {
        schema: SCHEMA,
        id,
        verdict,
        exit_code,
        interrupted: finished.interrupted,
        started: seconds_only(&started),
        seconds: clock.elapsed().as_secs_f64(),
        folder: pipeline.folder.display().to_string(),
        provenance: provenance(),
        stages: finished.stages,
    };
    sinks.event(&Event::RunFinished { verdict, seconds: record.seconds });
    let json = serde_json::to_string_pretty(&record)
        .map_err(|error| format!("run.json cannot be encoded: {error}"))?;
    crate::cache::write_whole(&folder.join("run.json"), json.as_bytes())
        .map_err(|error| error.to_string())?;
    if let Some(bug) = &finished.bug {
        eprintln!("a bug of ours, please report it: {bug}");
    }
    match args.format {
        OutputFormat::Json => print(&(json + "\n"))?,
        OutputFormat::Human | OutputFormat::Plain => {
            let place = folder.join("run.json").display().to_string();
            print(&table(&record, &place, terminal_width()))?
        }
    };
    Ok(exit_code)
}

/// The first Ctrl-C asks everything to end; the second ends the process.
fn on_signal() {
    if interrupt::requested() {
        std::process::exit(i32::from(INTERRUPTED));
    }
    eprintln!("stopping; once more to stop at once");
    interrupt::request();
}

fn terminal_width() -> usize {
    terminal_size::terminal_size().map_or(120, |(width, _)| usize::from(width.0))
}

fn seconds_only(time: &Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Makes `runs/<utc>-<plan8>`; a second run within a second gets a number.
fn make_run_folder(
    runs: &Path,
    started: &Timestamp,
    plan: &str,
) -> Result<(String, PathBuf), String> {
    let cannot = |path: &Path, error: &dyn std::fmt::Display| {
        format!("cannot make `{}`: {error}; choose another folder with `--runs`", path.display())
    };
    std::fs::create_dir_all(runs).map_err(|error| cannot(runs, &error))?;
    let stem = format!("{}-{plan}", started.strftime("%Y%m%dT%H%M%SZ"));
    let mut number = 1;
    loop {
        let id = if number == 1 { stem.clone() } else { format!("{stem}-{number}") };
        let folder = runs.join(&id);
        match std::fs::create_dir(&folder) {
            Ok(()) => return Ok((id, folder)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(cannot(&folder, &error)),
        }
    }
}

fn provenance() -> Provenance {
    Provenance {
        runner: env!("CARGO_PKG_VERSION").to_owned(),
        command: std::env::args().collect(),
        platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        cpu: cpu_name(),
        threads: rayon::current_num_threads(),
    }
}

/// The processor's name, where the system tells it.
pub(super) fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
