//! `runner run`: a folder of stages becomes verdicts, a table and the run's folder.

use std::io::{IsTerminal, Write};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use jiff::Timestamp;
use rayon::prelude::*;

use super::cache::bytes;
use super::nightly::{self, Night, NightlyArgs};
use super::remote::RemoteArgs;
use super::slurm;
use super::unchanged::{self, SHOWN_ONE_BY_ONE, Unchanged};
use super::{
    BUG, Failed, INTERRUPTED, PlaceArgs, Selection, journal, keep, load_pipeline, make_plan, print,
    print_bytes, selected, stamps_of, store_of,
};
use crate::cache::{Remote, Store};
use crate::compute::arms::Workshop;
use crate::event::{Event, Sink};
use crate::executor::{Attempts, Processes, Slots, hook};
use crate::files::Spill;
use crate::interrupt;
use crate::memory::Budget;
use crate::nightly::baseline;
use crate::op::Arm;
use crate::record::{FamilyRecord, Provenance, RunRecord, SCHEMA, StageRecord};
use crate::report::{Bars, EventLog, Lines, Sinks};
use crate::report::{annotations, drift, junit, markdown, page, table};
use crate::run::{Bound, Options, check_memory, for_jobs, run_with};
use crate::terminal::{tell, tell_line};
use crate::text::{Shown, grouped, no_threads};
use crate::verdict::Verdict;

#[derive(Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    places: PlaceArgs,
    /// An arm without which a stage is an error.
    #[arg(long)]
    require: Vec<Arm>,
    /// Jobs that run beside each other; all cores by default.
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// The most memory that the run may take beside mapped files, such as `4G`: tensors that are
    /// kept for later go to disk, and jobs wait for each other. A run that cannot keep to it is
    /// refused, with what it needs.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    memory: Option<u64>,
    /// Say what would run, and why; compute nothing.
    #[arg(long)]
    dry_run: bool,
    /// Start nothing more once a stage has not passed.
    #[arg(long)]
    fail_fast: bool,
    /// Go on with whatever does not need a stage that failed; this is the default.
    #[arg(long, overrides_with = "fail_fast")]
    keep_going: bool,
    /// Take up the jobs that a runner which died has left in Slurm's queue.
    #[arg(long)]
    attach: bool,
    /// Print every field of every key, and which of them changed.
    #[arg(long)]
    explain: bool,
    /// No progress on stderr; the outcome on stdout stays.
    #[arg(short, long)]
    quiet: bool,
    /// What to print.
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    format: OutputFormat,
    #[command(flatten)]
    remote: RemoteArgs,
    #[command(flatten)]
    nightly: NightlyArgs,
}

impl RunArgs {
    /// The folder of runs.
    pub(super) fn runs(&self) -> &Path {
        &self.selection.runs
    }

    /// What is run, and how.
    pub(super) fn selection(&self) -> &Selection {
        &self.selection
    }

    /// The name of the profile, if it is of one.
    pub(super) fn profile(&self) -> Option<&String> {
        self.nightly.profile.as_ref()
    }

    /// Whether jobs of a dead runner are taken up.
    pub(super) fn attach(&self) -> bool {
        self.attach
    }

    /// Where arms compute.
    pub(super) fn places(&self) -> &PlaceArgs {
        &self.places
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

/// What stands between two stages in run.json.
pub(super) const SEPARATOR: &str = ",\n    ";

/// Runs stages with the arms of `workshop`, writes the run's folder, prints the outcome. Whoever
/// is to hear of the end hears of every one, of a failure and of a bug too.
pub(super) fn run_stages(args: &RunArgs, workshop: &dyn Workshop) -> Result<u8, Failed> {
    let night = Night::new(&args.nightly, args.dry_run);
    let outcome = catch_unwind(AssertUnwindSafe(|| run_to_an_end(args, workshop, &night)));
    match outcome {
        Ok(Ok(code)) => Ok(code),
        Ok(Err(failed)) => {
            night.follow_failure(&failed.text, failed.code);
            Err(failed)
        }
        Err(panic) => {
            night.follow_failure("a bug of ours ended the run; see its log", BUG);
            resume_unwind(panic)
        }
    }
}

fn run_to_an_end(args: &RunArgs, workshop: &dyn Workshop, night: &Night<'_>) -> Result<u8, Failed> {
    let began = crate::cache::now();
    let runs = &args.selection.runs;
    args.places.check(runs)?;
    ctrlc::set_handler(on_signal).map_err(|error| {
        Failed::system(format!("cannot watch for Ctrl-C: {}", no_threads(1, &error)))
    })?;
    if args.nightly.profile.is_some() && !args.dry_run {
        // A profile that is not there need not wait for its turn.
        let overrides = super::overrides(&args.selection)?;
        args.nightly.profile(&load_pipeline(&args.selection.folder, &overrides)?)?;
        night.alone(runs)?;
    }
    let store = store_of(runs);
    let as_before = !(args.selection.force
        || args.selection.rehash
        || args.dry_run
        || args.explain
        || args.attach
        || !args.nightly.fresh.is_empty()
        || args.nightly.asks()
        // What is held against another run is looked at whole.
        || baseline::is_any(runs));
    if as_before && let Some(unchanged) = unchanged::find(&store, workshop) {
        return finish_unchanged(args, night, unchanged);
    }
    let (mut pipeline, graph, mut stages) = selected(&args.selection)?;
    let profile = args.nightly.profile(&pipeline)?.cloned();
    if let Some(name) = &args.nightly.profile {
        nightly::repeat(&mut pipeline, name);
    }
    let of_profile = profile.as_ref().and_then(|profile| profile.select.as_ref());
    if let Some(expression) = of_profile.filter(|_| args.selection.select.is_none()) {
        stages = super::select_stages(&graph, &pipeline, expression)?;
    }
    let selection = args.selection.select.as_ref().or(of_profile);
    let shared = args.remote.options(pipeline.cache.as_ref())?.filter(|_| !args.dry_run);
    let store = match &shared {
        None => store,
        Some(options) => {
            let remote = Remote::open(options).map_err(|error| error.to_string())?;
            store.behind(Arc::new(remote))
        }
    };
    let stamps = stamps_of(runs, args.selection.rehash);
    let mut plan = make_plan(&pipeline, &graph, &stages, &store, &stamps)?;
    plan.force = args.selection.force;
    args.places.check_place(&plan)?;
    let fresh = profile.iter().flat_map(|profile| &profile.fresh).chain(&args.nightly.fresh);
    plan.fresh = fresh.copied().collect();
    if let Some(most) = args.memory {
        if slurm::is_wanted(&plan) {
            let text = "error: `--memory` is of this machine, and stages are to be done by Slurm: \
                        write `memory` under `[resources]` of their manifests instead";
            return Err(text.to_owned().into());
        }
        check_memory(&plan, most).map_err(|problem| format!("error: {problem}"))?;
    }
    if args.dry_run || args.explain {
        let text = super::plan::lines(&plan, &store, workshop, args.explain);
        if args.dry_run {
            keep(&stamps);
            return Ok(print(&text)?);
        }
        tell(&text);
    }
    let _in_use = store.in_use().map_err(|error| Failed::written(&error))?;

    let (started, clock) = (Timestamp::now(), Instant::now());
    let (id, folder) = make_run_folder(runs, &started, &plan.id)?;
    let series = nightly::series_of(&pipeline, runs, selection.map(String::as_str));
    let mut slurm = match slurm::is_wanted(&plan) {
        true => {
            let created = seconds_only(&started);
            let opened = slurm::open(args, &plan, &id, &created, shared.as_ref(), &store);
            Some(opened.inspect_err(|_| {
                // Nothing stands in it.
                let _ = std::fs::remove_dir(&folder);
            })?)
        }
        false if args.attach => {
            let _ = std::fs::remove_dir(&folder);
            let text = "error: `--attach` takes up jobs of Slurm, and no stage is to be run there: \
                        add `--on slurm`, or `[executor]` to pipeline.toml";
            return Err(text.to_owned().into());
        }
        false => None,
    };
    let mut sinks = sinks(args, &folder)?;
    let processes = Processes::of_this_program();
    let (attempts, cut_off) = Attempts::open(&store.attempts(), &id).map_err(|error| {
        let place = runs.shown();
        Failed::of_io(format!("cannot make a folder for attempts in `{place}`: {error}"), &error)
    })?;
    for earlier in cut_off {
        journal::tell_what_was_cut_off(runs, &earlier);
    }
    let bound = args.memory.map(|most| bound(most, &store)).transpose()?;
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let options = Options {
        run: id.clone(),
        created: seconds_only(&started),
        jobs: args.jobs.map_or(cores, NonZeroUsize::get),
        require: args
            .require
            .iter()
            .chain(profile.iter().flat_map(|p| &p.require))
            .copied()
            .collect(),
        workshop,
        fail_fast: args.fail_fast,
        slots: &Slots::here(),
        processes: &processes,
        attempts: &attempts,
        memory: bound.as_ref(),
    };
    let finished = run_with(&plan, &store, &options, slurm.as_mut(), &mut sinks);
    if let Some(slurm) = slurm {
        slurm.finish();
    }
    let seconds = clock.elapsed().as_secs_f64();
    // What was sent beside the work is there now, or is told.
    let cache = store.settled();
    let cache_problems = cache.as_ref().map_or(&[][..], |cache| &cache.problems).to_vec();
    // Gone before the run can be called unchanged, after which nobody would look for it.
    drop(attempts);
    keep(&stamps);

    let verdict = Verdict::of_run(finished.stages.iter().map(|stage| stage.verdict));
    let exit_code = match (&finished.bug, finished.interrupted) {
        (Some(_), _) => BUG,
        (None, true) => INTERRUPTED,
        (None, false) => verdict.exit_code(),
    };
    let mut record = RunRecord {
        schema: SCHEMA,
        id,
        verdict,
        exit_code,
        interrupted: finished.interrupted,
        started: seconds_only(&started),
        seconds,
        folder: pipeline.folder.display().to_string(),
        provenance: provenance(),
        series: Some(series),
        cache,
        families: FamilyRecord::of(&finished.stages),
        stages: Vec::new(),
    };
    sinks.event(&Event::RunFinished { verdict, seconds: record.seconds });
    let head = record.clone();
    record.stages = finished.stages;
    // Written beside each other: all of it is wanted soon after the last verdict.
    let sends_runs = shared.as_ref().is_some_and(|options| options.runs && !options.read_only);
    let write_down = || {
        let stages = encoded(&record.stages)?;
        let note = || match finished.bug {
            // The next run tries again what was not sent.
            // Nor is a run called unchanged whose record others wait for.
            None if cache_problems.is_empty() && !sends_runs => {
                unchanged::note(&store, &plan, &record, &stages, &finished.made, workshop, began)
            }
            _ => None,
        };
        rayon::join(|| write_json(&head, &stages.join(SEPARATOR), &folder), note).0
    };
    let (json, page) = rayon::join(write_down, || write_page(&record, runs, &folder));
    if json.is_err() || page.is_err() {
        unchanged::forget(&store);
    }
    tell_github(&record);
    if let Some(bug) = &finished.bug {
        tell_line(&format!("a bug of ours, please report it: {bug}"));
    }
    // Also where a file found no room: what was computed is told.
    if let (true, Ok(json), Some(remote)) = (sends_runs, &json, store.remote()) {
        let machine = record.provenance.machine.as_deref().unwrap_or("unknown");
        if let Err(error) = remote.put_run(machine, &record.id, json.as_bytes()) {
            tell_line(&format!("warning: the record of this run was not sent: {error}"));
        }
    }
    let shown = json.and_then(|json| show(args, &record, record.stages.len(), json, &folder));
    for problem in &cache_problems {
        tell_line(&format!("warning: {problem}"));
    }
    let trouble = shown.and(page).err();
    let aloud = args.format != OutputFormat::Json;
    night.follow(&record, runs, profile.as_ref(), aloud, trouble.as_ref())?;
    trouble.map_or(Ok(exit_code), Err)
}

/// A bound of memory, with a file in the store for what is put away.
fn bound(most: u64, store: &Store) -> Result<Bound, Failed> {
    let spill = Spill::new(store.root()).map_err(|error| {
        let place = store.root().shown();
        Failed::of_io(format!("cannot make a file for tensors in `{place}`: {error}"), &error)
    })?;
    Ok(Bound { budget: Budget::new(for_jobs(most)), spill })
}

/// Each stage as it stands in run.json.
fn encoded(stages: &[StageRecord]) -> Result<Vec<String>, String> {
    let stages = stages.par_iter().map(serde_json::to_string);
    stages.collect::<Result<_, _>>().map_err(cannot_encode)
}

/// The text of run.json: what is said of the run, and a line for each stage.
fn whole_json(head: &RunRecord, stages: &str) -> Result<String, String> {
    let head = serde_json::to_string_pretty(head).map_err(cannot_encode)?;
    Ok(match stages {
        "" => head,
        stages => {
            let stages = format!("\"stages\": [\n    {stages}\n  ]");
            head.replacen("\"stages\": []", &stages, 1)
        }
    })
}

fn cannot_encode(error: serde_json::Error) -> String {
    format!("run.json cannot be encoded: {error}")
}

/// Writes run.json, and returns it.
fn write_json(head: &RunRecord, stages: &str, folder: &Path) -> Result<String, Failed> {
    let json = whole_json(head, stages)?;
    crate::cache::write_whole(&folder.join("run.json"), json.as_bytes())
        .map_err(|error| Failed::written(&error))?;
    Ok(json)
}

/// Writes what people and build servers read.
fn write_page(record: &RunRecord, runs: &Path, folder: &Path) -> Result<(), Failed> {
    let page = page(record, &runs.display().to_string());
    crate::cache::write_whole(&folder.join("report.html"), page.as_bytes())
        .map_err(|error| Failed::written(&error))?;
    let junit = junit(record).map_err(|error| format!("junit.xml cannot be encoded: {error}"))?;
    crate::cache::write_whole(&folder.join("junit.xml"), junit.as_bytes())
        .map_err(|error| Failed::written(&error))
}

/// The end of a run that found everything as the last one left it.
fn finish_unchanged(args: &RunArgs, night: &Night<'_>, unchanged: Unchanged) -> Result<u8, Failed> {
    let (started, clock) = (Timestamp::now(), Instant::now());
    let (id, folder) = make_run_folder(&args.selection.runs, &started, &unchanged.plan)?;
    let mut sinks = sinks(args, &folder)?;
    let Unchanged { count, shown, families, json, verdict, series, .. } = unchanged;
    let ids = shown.iter().map(|stage| stage.id.clone()).collect();
    sinks.event(&Event::RunStarted { run: id.clone(), stages: ids });
    for stage in &shown {
        for (arm, record) in &stage.arms {
            let (stage, arm, why) = (stage.id.clone(), *arm, record.why.clone());
            sinks.event(&Event::ArmFinished { stage, arm, state: record.state, why, seconds: 0.0 });
        }
        let (stage, verdict, why) = (stage.id.clone(), stage.verdict, stage.why.clone());
        sinks.event(&Event::StageJudged { stage, verdict, why, seconds: 0.0 });
    }
    let mut record = RunRecord {
        schema: SCHEMA,
        id,
        verdict,
        exit_code: verdict.exit_code(),
        interrupted: false,
        started: seconds_only(&started),
        seconds: 0.0,
        folder: unchanged.folder,
        provenance: provenance(),
        series,
        cache: None,
        families,
        stages: Vec::new(),
    };
    record.seconds = clock.elapsed().as_secs_f64();
    sinks.event(&Event::RunFinished { verdict, seconds: record.seconds });
    let json = whole_json(&record, &json)?;
    // Not flushed to disk: a run that changed nothing has nothing to lose.
    std::fs::write(folder.join("run.json"), &json)
        .map_err(|error| cannot_write(folder.as_path(), &error))?;
    record.stages = shown;
    show(args, &record, count, json, &folder)?;
    // Where there are many stages the record holds only some: nothing can be compared.
    if count <= SHOWN_ONE_BY_ONE {
        let runs = &args.selection.runs;
        night.follow(&record, runs, None, args.format != OutputFormat::Json, None)?;
    }
    Ok(record.exit_code)
}

fn cannot_write(folder: &Path, error: &std::io::Error) -> Failed {
    Failed::of_io(format!("cannot write to `{}`: {error}", folder.shown()), error)
}

fn sinks(args: &RunArgs, folder: &Path) -> Result<Sinks, Failed> {
    let log = std::fs::File::create(folder.join("events.jsonl"))
        .map_err(|error| cannot_write(folder, &error))?;
    let bars = args.format == OutputFormat::Human && std::io::stderr().is_terminal();
    let mut sinks: Vec<Box<dyn Sink>> = vec![Box::new(EventLog::new(log))];
    if bars && !args.quiet {
        sinks.push(Box::new(Bars::default()));
    } else if !args.quiet {
        sinks.push(Box::new(Lines::default()));
    }
    Ok(Sinks(sinks))
}

/// Prints a run of `count` stages. Where there are very many, those that passed are
/// counted instead of listed.
fn show(
    args: &RunArgs,
    record: &RunRecord,
    count: usize,
    json: String,
    folder: &Path,
) -> Result<u8, Failed> {
    if args.format == OutputFormat::Json {
        return print_bytes((json + "\n").as_bytes()).map_err(Failed::system);
    }
    // A run that changed nothing has no time for a page; `runner report` makes it.
    let pages = ["report.html", "run.json"].map(|name| folder.join(name));
    let page = pages.iter().find(|page| page.is_file()).unwrap_or(&pages[1]);
    let place = page.shown().to_string();
    if count <= SHOWN_ONE_BY_ONE {
        let drawn = args.format == OutputFormat::Human && speaks_unicode();
        let drift = drift(record, drawn, terminal_width());
        let gap = if drift.is_empty() { "" } else { "\n" };
        let table = table(record, &place, terminal_width());
        return print(&format!("{drift}{gap}{table}")).map_err(Failed::system);
    }
    let listed: Vec<_> = record.stages.iter().filter(|s| s.verdict != Verdict::Pass).collect();
    let passed = grouped(count - listed.len());
    if listed.is_empty() {
        let seconds = record.seconds;
        let text = format!("all {passed} stages pass in {seconds:.2} s    {place}\n");
        return print(&text).map_err(Failed::system);
    }
    let listed = listed.into_iter().cloned().collect();
    let record = RunRecord { stages: listed, ..record.clone() };
    let table = table(&record, &place, terminal_width());
    print(&format!("{passed} stages pass, the others:\n{table}")).map_err(Failed::system)
}

/// The first Ctrl-C asks everything to end; the second ends the process.
fn on_signal() {
    if interrupt::requested() {
        hook::end();
        std::process::exit(i32::from(INTERRUPTED));
    }
    tell_line("stopping; once more to stop at once");
    interrupt::request();
}

/// Whether the locale can show more than ASCII.
fn speaks_unicode() -> bool {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG"));
    locale.is_some_and(|locale| locale.to_lowercase().replace('-', "").contains("utf8"))
}

/// What GitHub Actions shows beside the code and below the job, where it runs this.
fn tell_github(record: &RunRecord) {
    if std::env::var("GITHUB_ACTIONS").as_deref() != Ok("true") {
        return;
    }
    tell(&annotations(record));
    let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY") else { return };
    let summary = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let written = summary.and_then(|mut file| file.write_all(markdown(record).as_bytes()));
    if let Err(error) = written {
        tracing::warn!("the step's summary is not written: {error}");
    }
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
) -> Result<(String, PathBuf), Failed> {
    let cannot = |path: &Path, error: &std::io::Error| {
        let place = path.shown();
        let text = format!("cannot make `{place}`: {error}; choose another folder with `--runs`");
        Failed::of_io(text, error)
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
        command: std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect(),
        platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        cpu: cpu_name(),
        threads: rayon::current_num_threads(),
        machine: Some(crate::machine::name().to_owned()),
    }
}

/// The processor's name, where the system tells it.
pub(super) fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
