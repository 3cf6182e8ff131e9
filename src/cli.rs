//! The commands: what can be typed, and which part of the library answers.
//!
//! It parses, calls and prints. Exit codes: 0 pass, 1 falsified, 2 bad manifest
//! or usage, 3 nothing was measured, 4 a required arm could not run, 70 a bug of
//! ours, 130 stopped on request.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;

use crate::cache::Store;
use crate::chip_command::{self, ChipCommand, ChipOutcome, Multiply, MultiplyOperand, TensorRef};
use crate::compute::arms::{Shipped, Workshop};
use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
use crate::event::{Event, Sink};
use crate::graph::{Graph, GraphFormat, render, select};
use crate::interrupt;
use crate::manifest::{Overrides, Pipeline, load};
use crate::op::{Accumulate, Arm, ChipName, StageId};
use crate::plan::Plan;
use crate::record::{Provenance, RunRecord, SCHEMA};
use crate::report::{Bars, EventLog, Lines, Sinks, table};
use crate::run::{Options, run};
use crate::verdict::Verdict;

/// Nothing to complain about.
const PASS: u8 = 0;
/// Something was falsified.
const FALSIFIED: u8 = 1;
/// The manifests or the command line are wrong.
const USAGE: u8 = 2;
/// A bug of ours.
const BUG: u8 = 70;
/// Stopped on request, as shells have it for SIGINT.
const INTERRUPTED: u8 = 130;

/// The GPU's numbers differ from the CPU's: is that the arithmetic we chose, or
/// a bug, and where does it start?
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 pass, 1 falsified, 2 bad manifest or usage, \
    3 nothing was measured, 4 a required arm could not run, 70 a bug of ours, \
    130 stopped on request."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run stages and print one verdict for each.
    Run(RunArgs),
    /// Say what a run would do, and why; compute nothing.
    Plan(PlanArgs),
    /// Report every problem of a folder of stages and its contracts.
    Check {
        /// The folder of stages.
        #[arg(default_value = "stages")]
        folder: PathBuf,
    },
    /// Draw how the stages depend on each other.
    Graph {
        /// The folder of stages.
        #[arg(default_value = "stages")]
        folder: PathBuf,
        /// How to draw.
        #[arg(long, value_enum, default_value_t = DrawFormat::Text)]
        format: DrawFormat,
    },
    /// Write an arm's tensors of a past run to a safetensors file.
    Export {
        /// The run's name, or `latest`.
        run: String,
        /// The stage.
        stage: String,
        /// The arm.
        arm: Arm,
        /// The file to write.
        out: PathBuf,
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
    /// The chips whose arithmetic is known: list, verify, multiply.
    Chip {
        #[command(subcommand)]
        command: ChipCli,
    },
}

/// What stages are run on, and which.
#[derive(Args)]
struct Selection {
    /// The folder of stages.
    #[arg(default_value = "stages")]
    folder: PathBuf,
    /// The model: `synthetic:<preset>`, a GGUF file or a safetensors folder.
    #[arg(long)]
    model: Option<String>,
    /// The prompt as token ids.
    #[arg(long, value_delimiter = ',', conflicts_with = "prompt")]
    tokens: Option<Vec<u32>>,
    /// The prompt as text.
    #[arg(long)]
    prompt: Option<String>,
    /// Stages: `E` alone, `+E` with all it needs, `E+` with all that need it,
    /// `tag:NAME`, `*`; several with commas.
    #[arg(long)]
    select: Option<String>,
    /// The arms: reference, emulated, device.
    #[arg(long, value_delimiter = ',')]
    arms: Option<Vec<Arm>>,
    /// The folder of runs, with the cache.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

#[derive(Args)]
struct RunArgs {
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

#[derive(Args)]
struct PlanArgs {
    #[command(flatten)]
    selection: Selection,
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

#[derive(Clone, Copy, ValueEnum)]
enum DrawFormat {
    /// For reading.
    Text,
    /// For Graphviz.
    Dot,
    /// For Markdown.
    Mermaid,
}

#[derive(Subcommand)]
enum ChipCli {
    /// List the chips, their formats and their arithmetic.
    List,
    /// Check a folder of hardware vectors, one safetensors file per chip.
    Verify {
        /// The folder.
        folder: PathBuf,
    },
    /// Multiply two tensors as a chip does: y[N, M] = x[N, K] w[M, K]^T.
    Multiply(MultiplyArgs),
}

#[derive(Args)]
struct MultiplyArgs {
    /// x as FILE:TENSOR.
    #[arg(value_parser = tensor_ref)]
    x: TensorRef,
    /// w as FILE:TENSOR.
    #[arg(value_parser = tensor_ref)]
    w: TensorRef,
    /// The format of x; its own by default.
    #[arg(long)]
    x_format: Option<Format>,
    /// The format of w; its own by default.
    #[arg(long)]
    w_format: Option<Format>,
    /// The scale of x.
    #[arg(long)]
    x_scale: Option<f32>,
    /// The scale of w.
    #[arg(long)]
    w_scale: Option<f32>,
    /// Whose arithmetic: volta, ampere, ada, hopper, blackwell.
    #[arg(long, default_value = "hopper", value_parser = chip_name)]
    chip: ChipName,
    /// Carry the tensor core's accumulator all along K, instead of promoting it.
    #[arg(long)]
    fast: bool,
    /// Parts that K is cut into.
    #[arg(long, default_value = "1")]
    split_k: u32,
    /// The type of y: f32, bf16, f16.
    #[arg(long, default_value = "f32")]
    output: Format,
    /// A device's outputs as FILE:TENSOR, whose schedule is to be identified.
    #[arg(long, value_parser = tensor_ref)]
    observed: Option<TensorRef>,
    /// The file to write y to.
    #[arg(long)]
    save: Option<PathBuf>,
}

fn tensor_ref(text: &str) -> Result<TensorRef, String> {
    match text.rsplit_once(':') {
        Some((file, tensor)) if !file.is_empty() && !tensor.is_empty() => {
            Ok(TensorRef { file: PathBuf::from(file), tensor: tensor.to_owned() })
        }
        _ => Err("write FILE:TENSOR, such as captures.safetensors:c0.x".to_owned()),
    }
}

fn chip_name(text: &str) -> Result<ChipName, String> {
    ChipName::ALL.into_iter().find(|chip| chip.name() == text).ok_or_else(|| {
        let known: Vec<&str> = ChipName::ALL.iter().map(|chip| chip.name()).collect();
        format!("no chip is called `{text}`; known: {}", known.join(", "))
    })
}

/// Parses the command line, carries it out, and returns the exit code.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; a closed pipe is not our concern.
            let _ = error.print();
            return if error.use_stderr() { USAGE } else { PASS };
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("RUNNER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match carry_out(cli.command) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("{}", message.trim_end());
            USAGE
        }
    }
}

/// Carries out a command; an error is a text for the user, and bad usage.
fn carry_out(command: Command) -> Result<u8, String> {
    match command {
        Command::Run(args) => run_stages(&args, &Shipped),
        Command::Plan(args) => plan_stages(&args.selection),
        Command::Check { folder } => {
            let pipeline = load_pipeline(&folder, &Overrides::default())?;
            let (stages, contracts) = (pipeline.stages.len(), pipeline.contracts.len());
            print(&format!("{stages} stages and {contracts} contracts, no problem found\n"))
        }
        Command::Graph { folder, format } => {
            let pipeline = load_pipeline(&folder, &Overrides::default())?;
            let graph = graph_of(&pipeline)?;
            let format = match format {
                DrawFormat::Text => GraphFormat::Text,
                DrawFormat::Dot => GraphFormat::Dot,
                DrawFormat::Mermaid => GraphFormat::Mermaid,
            };
            print(&render(&graph, &pipeline.stages, format))
        }
        Command::Export { run, stage, arm, out, runs } => export(&run, &stage, arm, &out, &runs),
        Command::Chip { command } => chip(command),
    }
}

/// Prints to stdout; a reader who has gone away is no error.
fn print(text: &str) -> Result<u8, String> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to stdout: {error}"))
        }
        _ => Ok(PASS),
    }
}

fn load_pipeline(folder: &Path, overrides: &Overrides) -> Result<Pipeline, String> {
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    load(folder, overrides).map_err(|problems| problems.render(colour))
}

fn graph_of(pipeline: &Pipeline) -> Result<Graph, String> {
    Graph::of(&pipeline.stages).map_err(|cycle| cycle.to_string())
}

/// The pipeline, its graph and the selected stages.
fn selected(args: &Selection) -> Result<(Pipeline, Graph, BTreeSet<StageId>), String> {
    let overrides = Overrides {
        model: args.model.clone(),
        tokens: args.tokens.clone(),
        prompt: args.prompt.clone(),
        arms: args.arms.clone(),
    };
    let pipeline = load_pipeline(&args.folder, &overrides)?;
    let graph = graph_of(&pipeline)?;
    let stages = match &args.select {
        None => pipeline.stages.iter().map(|stage| stage.id.clone()).collect(),
        Some(expression) => {
            select(&graph, &pipeline.stages, expression).map_err(|error| error.to_string())?
        }
    };
    Ok((pipeline, graph, stages))
}

fn store_of(runs: &Path) -> Store {
    Store::new(&runs.join("cache"))
}

fn make_plan<'a>(
    pipeline: &'a Pipeline,
    graph: &Graph,
    stages: &BTreeSet<StageId>,
    store: &Store,
) -> Result<Plan<'a>, String> {
    Plan::new(pipeline, graph, stages, store).map_err(|problems| {
        let mut lines: Vec<String> = Vec::new();
        for problem in problems {
            lines.push(format!("error: {problem}"));
        }
        lines.join("\n")
    })
}

fn plan_stages(args: &Selection) -> Result<u8, String> {
    let (pipeline, graph, stages) = selected(args)?;
    let store = store_of(&args.runs);
    let plan = make_plan(&pipeline, &graph, &stages, &store)?;
    let lines = plan.preview(&store, &Shipped);
    let width = lines.iter().map(|line| line.stage.0.len()).max().unwrap_or(0);
    let rows = lines.iter().map(|line| {
        format!(
            "{:width$}  {:9}  {:10}  {}\n",
            line.stage.0,
            line.arm.name(),
            line.action,
            line.why
        )
    });
    print(&rows.collect::<String>())
}

/// Runs stages with the arms of `workshop`, writes the run's folder, prints the outcome.
fn run_stages(args: &RunArgs, workshop: &dyn Workshop) -> Result<u8, String> {
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
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let options = Options {
        run: id.clone(),
        created: seconds_only(&started),
        jobs: args.jobs.map_or(cores, NonZeroUsize::get),
        require: args.require.iter().copied().collect(),
        workshop,
    };
    let finished = run(&plan, &store, &options, &mut sinks);

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
    let cpu = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    Provenance {
        runner: env!("CARGO_PKG_VERSION").to_owned(),
        command: std::env::args().collect(),
        platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        cpu,
        threads: rayon::current_num_threads(),
    }
}

fn export(run: &str, stage: &str, arm: Arm, out: &Path, runs: &Path) -> Result<u8, String> {
    let id = if run == "latest" { latest_run(runs)? } else { run.to_owned() };
    let path = runs.join(&id).join("run.json");
    let record = read_record(&path)?;
    let found = record.stages.iter().find(|record| record.id.0 == stage).ok_or_else(|| {
        let known: Vec<&str> = record.stages.iter().map(|stage| stage.id.0.as_str()).collect();
        format!("run `{id}` has no stage `{stage}`; it has: {}", known.join(", "))
    })?;
    let result = found.arms.get(&arm).ok_or_else(|| {
        let known: Vec<&str> = found.arms.keys().map(|arm| arm.name()).collect();
        format!("stage `{stage}` has no arm `{arm}`; it has: {}", known.join(", "))
    })?;
    let object = result.object.as_ref().ok_or_else(|| {
        format!("the {arm} arm of stage `{stage}` has no tensors: {}", result.why)
    })?;
    let bytes = store_of(runs).read_object(object).map_err(|error| error.to_string())?;
    crate::cache::write_whole(out, &bytes).map_err(|error| error.to_string())?;
    print(&format!(
        "{} sites of {stage} {arm} of run {id} in {}\n",
        result.sites.len(),
        out.display()
    ))
}

/// The youngest folder that holds a finished run; names begin with the time.
fn latest_run(runs: &Path) -> Result<String, String> {
    let entries = std::fs::read_dir(runs)
        .map_err(|error| format!("cannot read `{}`: {error}", runs.display()))?;
    let finished = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        entry.path().join("run.json").is_file().then_some(())?;
        let changed = entry.path().join("run.json").metadata().ok()?.modified().ok()?;
        Some((changed, entry.file_name().into_string().ok()?))
    });
    let latest = finished.max().map(|(_, id)| id);
    latest.ok_or_else(|| {
        format!("`{}` holds no finished run; start one with `runner run`", runs.display())
    })
}

fn read_record(path: &Path) -> Result<RunRecord, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read `{}`: {error}", path.display()))?;
    let wrong =
        |problem: String| format!("`{}` is not a run of this version: {problem}", path.display());
    let record: RunRecord =
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if record.schema != SCHEMA {
        return Err(wrong(format!("it has schema {}, this runner reads {SCHEMA}", record.schema)));
    }
    Ok(record)
}

fn chip(command: ChipCli) -> Result<u8, String> {
    let command = match command {
        ChipCli::List => ChipCommand::List,
        ChipCli::Verify { folder } => ChipCommand::Verify { folder },
        ChipCli::Multiply(args) => {
            let accumulate = if args.fast { Accumulate::Fast } else { Accumulate::Promoted };
            let schedule = Schedule { accumulate, split_k: args.split_k, ..Schedule::PROMOTED };
            let operand = |source, format, scale| MultiplyOperand { source, format, scale };
            ChipCommand::Multiply(Box::new(Multiply {
                x: operand(args.x, args.x_format, args.x_scale),
                w: operand(args.w, args.w_format, args.w_scale),
                chip: args.chip,
                schedule,
                output: args.output,
                observed: args.observed,
                save: args.save,
            }))
        }
    };
    let outcome = chip_command::run(&command, &mut std::io::stdout().lock());
    match outcome.map_err(|error| error.to_string())? {
        ChipOutcome::Pass => Ok(PASS),
        ChipOutcome::Falsified => Ok(FALSIFIED),
    }
}
