//! The commands: what can be typed, and which part of the library answers.
//!
//! One file per command; what several share stands here. It parses, calls and
//! prints. Exit codes: 0 pass, 1 falsified, 2 bad manifest
//! or usage, 3 nothing was measured, 4 a required arm could not run, 70 a bug of
//! ours, 74 the disk is full or a limit of the system was met, 130 stopped on request.

mod cache;
mod capture;
mod check;
mod chip;
mod diff;
mod doctor;
mod explain;
mod export;
mod falsify;
mod fleet;
mod history;
mod identify;
mod journal;
mod judge;
mod manners;
mod measure;
mod model;
mod models;
mod new;
mod nightly;
mod past;
mod plan;
mod predict;
mod reference;
mod receipt;
mod remote;
mod report;
mod run;
mod schema;
mod slurm;
mod sweep;
mod unchanged;
mod watch;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

use cache::CacheArgs;
use capture::CaptureCli;
use chip::ChipCli;
use diff::DiffArgs;
use falsify::FalsifyArgs;
use fleet::FleetCli;
use history::HistoryArgs;
use judge::JudgeArgs;
use new::NewArgs;
use nightly::BaselineCli;
use past::record_of;
use plan::PlanArgs;
use predict::PredictArgs;
use report::ReportArgs;
use run::RunArgs;
use schema::SchemaOf;
use watch::WatchArgs;

use crate::cache::{CacheError, Stamps, Store};
use crate::compute::arms::Shipped;
use crate::compute::cuda;
use crate::executor::slurm::TASK_ARGUMENT;
use crate::executor::{SERVER_ARGUMENT, serve};
use crate::graph::{Graph, GraphFormat, render, select};
use crate::manifest::{Overrides, Pipeline, Place, load};
use crate::op::{Arm, StageId};
use crate::plan::{Plan, PlanError};
use crate::terminal;
use crate::text::{Shown, no_threads, one_line, shown};

/// Nothing to complain about.
const PASS: u8 = 0;
/// Something was falsified.
const FALSIFIED: u8 = 1;
/// The manifests or the command line are wrong.
const USAGE: u8 = 2;
/// A bug of ours.
const BUG: u8 = 70;
/// The system refused: a full disk, a limit on files or threads.
const SYSTEM: u8 = 74;
/// Stopped on request, as shells have it for SIGINT.
const INTERRUPTED: u8 = 130;

/// The GPU's numbers differ from the CPU's: is that the arithmetic we chose, or
/// a bug, and where does it start?
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 pass, 1 falsified, 2 bad manifest or usage, \
    3 nothing was measured, 4 a required arm could not run, 70 a bug of ours, \
    74 the disk is full or a limit of the system was met, 130 stopped on request.

Examples:
  runner run stages/                          five questions about the built-in model
  runner run stages/ --model model.gguf --prompt 'The capital of France is'
  runner run stages/ --select +E              stage E with all that it needs
  runner judge x.npy w.npy y.npy              is this kernel's product right?
  runner plan stages/                         what would run, and why
  runner report latest --format junit         the youngest run, for a CI"
)]
struct Cli {
    /// Say more on stderr; twice for all there is.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

/// What is done with models.
#[derive(Subcommand)]
enum ModelCli {
    /// Say whether two forms of a model, such as a GGUF file and a folder, are the same function,
    /// and which setting, tensor, text or chat differs; the exit code is 1 where one does.
    #[command(after_help = "Example: runner model compare model.gguf FOLDER")]
    Compare {
        /// A GGUF file, a folder with config.json and safetensors, or `synthetic:<preset>[@<scale>]`.
        first: String,
        /// The other one.
        second: String,
        /// The folder of runs, where generated models are kept.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
}

#[derive(Subcommand)]
enum Command {
    /// Run stages and print one verdict for each.
    Run(RunArgs),
    /// Say what a run would do, and why; compute nothing.
    Plan(PlanArgs),
    /// Report every problem of a folder of stages, its contracts and the files that they name.
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
        /// The run: `latest`, `previous`, `baseline`, a name, or a path.
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
    /// Say how a stage came to its verdict, in words and numbers.
    Explain {
        /// The stage.
        stage: String,
        /// The run: `latest`, `previous`, `baseline`, a name, or a path.
        #[arg(default_value = "latest")]
        run: String,
        /// Say instead what it took: seconds of each arm and of each part of the measures, and
        /// which of them each claim reads.
        #[arg(long)]
        cost: bool,
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
    /// Print the engine's file that a recording shows: which kernels made its sites.
    #[command(after_help = "Example: runner identify sites > engines/mine.toml")]
    Identify {
        /// The stage; its recipe names an engine, and it has a recording.
        stage: String,
        /// The run: `latest`, `previous`, `baseline`, a name, or a path.
        #[arg(default_value = "latest")]
        run: String,
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
    /// Say what an engine answers to a prompt, without that engine and without a GPU.
    Predict(PredictArgs),
    /// Record a pass of another engine, without Python.
    Capture {
        #[command(subcommand)]
        engine: CaptureCli,
    },
    /// Plant bugs and see that every falsifier fires, at the right place.
    Falsify(FalsifyArgs),
    /// The cache: list, verify, clear away, pin.
    Cache(CacheArgs),
    /// Start and watch programs for a run; started by the runner itself.
    #[command(name = SERVER_ARGUMENT, hide = true)]
    ProcessServer,
    /// Do a task of an array on a node of Slurm; started by its jobs.
    #[command(name = TASK_ARGUMENT, hide = true)]
    SlurmTask {
        /// The folder of the submission.
        batch: PathBuf,
    },
    /// Keep what a run on a GPU showed in a small file.
    Receipt {
        /// The run: `latest`, `previous`, `baseline`, a name, or a path.
        run: String,
        /// The file to write.
        out: PathBuf,
        /// The folder of runs.
        #[arg(long, default_value = "runs")]
        runs: PathBuf,
    },
    /// Look at models themselves.
    Model {
        #[command(subcommand)]
        command: ModelCli,
    },
    /// What this machine has, and what each missing piece switches off.
    Doctor,
    /// Write a past run anew: its page, or a format that other tools read.
    Report(ReportArgs),
    /// Say what changed from one run to another.
    Diff(DiffArgs),
    /// Run stages again whenever a manifest or contract changes.
    Watch(WatchArgs),
    /// Print the completions of a shell.
    #[command(
        after_help = "Example: runner completions bash > ~/.local/share/bash-completion/completions/runner"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write man pages to a folder.
    #[command(after_help = "Example: runner man ~/.local/share/man/man1")]
    Man {
        /// The folder.
        folder: PathBuf,
    },
    /// Print the reference of commands, verdicts, metrics and exit codes.
    Reference {
        /// Print which models are computed, and what each is held to, instead.
        #[arg(long)]
        models: bool,
    },
    /// The run that later ones are held against: set it, show it, remove it.
    Baseline {
        #[command(subcommand)]
        command: BaselineCli,
    },
    /// Past runs, and how each stage's verdict and tightest value moved.
    History(HistoryArgs),
    /// Many machines together: one report of all their runs.
    Fleet {
        #[command(subcommand)]
        command: FleetCli,
    },
    /// Write a manifest to begin with, and its contract.
    New(NewArgs),
    /// Print the JSON Schema of manifests or contracts, for editors.
    Schema {
        /// Of what.
        #[arg(value_enum, default_value = "stage")]
        of: SchemaOf,
    },
    /// Judge a dump of one kernel: its operands and what it returned, no TOML.
    Judge(Box<JudgeArgs>),
    /// The chips whose arithmetic is known: list, verify, multiply, measure.
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
    /// The model: `synthetic:<preset>[@<scale>]`, a GGUF file or a safetensors folder.
    #[arg(long)]
    model: Option<String>,
    /// What a synthetic model's widths, heads, vocabulary and blocks are multiplied by: `--model
    /// synthetic:<preset> --scale 8` is `synthetic:<preset>@8`. Without `--model` it is of the
    /// models that the manifests name.
    #[arg(long)]
    scale: Option<String>,
    /// The prompt as token ids.
    #[arg(long, value_delimiter = ',', conflicts_with = "prompt")]
    tokens: Option<Vec<u32>>,
    /// The prompt as text.
    #[arg(long)]
    prompt: Option<String>,
    #[command(flatten)]
    chat: ChatArgs,
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
    /// Do not believe the digests of earlier runs: read every file again.
    #[arg(long)]
    rehash: bool,
    /// Run the selected stages although their results are there.
    #[arg(long)]
    force: bool,
    /// Where the stages' work is done; without it where `[executor]` says, else here.
    #[arg(long, value_enum, value_name = "PLACE")]
    on: Option<Place>,
}

/// Where the reference computes.
#[derive(Args)]
struct PlaceArgs {
    /// Where the reference's products are computed. A GPU gives the same bits, and a sample of each
    /// product is held to the CPU's; results are reused whichever it was.
    #[arg(long, value_enum, default_value_t = ProductsOn::Cpu)]
    reference_on: ProductsOn,
    /// Where the emulated arm's products are computed, whichever chip it emulates. A GPU gives the same
    /// bits, and a sample of each product is held to the CPU's; results are reused whichever it was.
    #[arg(long, value_enum, default_value_t = ProductsOn::Cpu)]
    emulated_on: ProductsOn,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProductsOn {
    /// On all cores.
    Cpu,
    /// On the GPU; all other ops of the arm stay on the CPU.
    Gpu,
}

impl PlaceArgs {
    /// What is to be computed on a GPU: the option, and whose products they are.
    fn on_gpu(&self) -> Option<(&'static str, &'static str)> {
        match (self.reference_on, self.emulated_on) {
            (ProductsOn::Gpu, _) => Some(("--reference-on gpu", "the reference")),
            (_, ProductsOn::Gpu) => Some(("--emulated-on gpu", "the emulated arm")),
            _ => None,
        }
    }

    /// Refuses a GPU that is not there, before anything runs.
    fn check(&self, runs: &Path) -> Result<(), String> {
        let Some((option, arm)) = self.on_gpu() else { return Ok(()) };
        match cuda::why_no_reference(Some(&store_of(runs).programs())) {
            None => Ok(()),
            Some(why) => Err(format!(
                "error: `{option}` cannot be done here: {why}; leave it out: {arm} has the same \
                 bits on the CPU, and `runner doctor` says what is missing"
            )),
        }
    }

    /// Refuses this machine's GPU for stages that other machines do.
    fn check_place(&self, plan: &Plan<'_>) -> Result<(), String> {
        match self.on_gpu() {
            Some((option, arm)) if slurm::is_wanted(plan) => Err(format!(
                "error: `{option}` is of this machine, and stages are to be done by Slurm; leave \
                 it out: {arm} has the same bits on the CPU of a node"
            )),
            _ => Ok(()),
        }
    }
}

/// How the text of `--prompt` is laid.
#[derive(Args)]
struct ChatArgs {
    /// Lay `--prompt` through the model's own chat template, as a user's message that the model
    /// is to answer. Where it is not given, a manifest's `chat` and `system` hold for the new text too;
    /// `--chat=false` lays it as it stands.
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        requires = "prompt",
        conflicts_with = "tokens"
    )]
    chat: Option<bool>,
    /// What the system says before it.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
}

/// How past runs are told of.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PastFormat {
    /// For reading.
    Text,
    /// Everything, for programs (docs/formats.md).
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
    let level = ["warn", "info", "debug"][usize::from(cli.verbose.min(2))];
    let filter = tracing_subscriber::EnvFilter::try_from_env("RUNNER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| terminal::Log).init();
    hear_of_large_files();
    match begin(cli.command) {
        Ok(code) => code,
        Err(Failed { text, code }) => {
            terminal::tell_line(text.trim_end());
            code
        }
    }
}

/// A command that came to no end, with a text for the user.
#[derive(Debug)]
struct Failed {
    text: String,
    code: u8,
}

impl From<String> for Failed {
    fn from(text: String) -> Failed {
        Failed { text, code: USAGE }
    }
}

impl Failed {
    /// Where the system refused, and not what was typed or written is wrong.
    fn system(text: String) -> Failed {
        Failed { text, code: SYSTEM }
    }

    /// A file that could not be written.
    fn written(error: &CacheError) -> Failed {
        match error {
            CacheError::Io { source, .. } => Failed::of_io(error.to_string(), source),
            CacheError::Damaged { .. } => error.to_string().into(),
        }
    }

    fn of_io(text: String, source: &std::io::Error) -> Failed {
        use std::io::ErrorKind::{FileTooLarge, OutOfMemory, QuotaExceeded, StorageFull};
        match source.kind() {
            FileTooLarge | OutOfMemory | QuotaExceeded | StorageFull => Failed::system(text),
            _ => text.into(),
        }
    }
}

/// Threads for what is computed, made before anything needs them: what finds none later
/// would end in a panic.
fn ready_threads() -> Result<(), Failed> {
    let wanted = std::thread::available_parallelism().map_or(1, usize::from);
    let built = rayon::ThreadPoolBuilder::new().build_global();
    built.map_err(|error| Failed::system(format!("error: {}", no_threads(wanted, &error))))
}

/// What a write beyond a limit on files' sizes raises ends the program without a word; the
/// write fails too, and that is told. Programs that are started have the signal as usual.
fn hear_of_large_files() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    extern "C" fn nothing(_: nix::libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing.
    let set = unsafe { sigaction(Signal::SIGXFSZ, &action) };
    if let Err(error) = set {
        tracing::debug!("a limit on files will end the program: {error}");
    }
}

/// Makes ready what a command needs, and carries it out.
fn begin(command: Command) -> Result<u8, Failed> {
    match &command {
        // They compute nothing; the process server has to have one thread.
        Command::ProcessServer | Command::Check { .. } | Command::Graph { .. } => {}
        Command::Watch(_) | Command::Completions { .. } | Command::Man { .. } => {}
        Command::Reference { .. } | Command::New(_) | Command::Schema { .. } => {}
        _ => ready_threads()?,
    }
    match command {
        Command::Run(args) => run::run_stages(&args, &shipped_on(args.runs(), args.places())),
        Command::SlurmTask { batch } => slurm::task(&batch),
        Command::Fleet { command } => fleet::fleet(&command),
        command => Ok(carry_out(command)?),
    }
}

/// Carries out a command; an error is a text for the user, and bad usage.
fn carry_out(command: Command) -> Result<u8, String> {
    match command {
        Command::Run(args) => run::run_stages(&args, &shipped_on(args.runs(), args.places()))
            .map_err(|failed| failed.text),
        Command::Plan(args) => plan::plan_stages(&args),
        Command::Check { folder } => check::check(&folder),
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
        Command::Export { run, stage, arm, out, runs } => {
            export::export(&run, &stage, arm, &out, &runs)
        }
        Command::Cache(args) => cache::cache(&args),
        Command::ProcessServer => {
            serve().map_err(|error| format!("the process server failed: {error}"))?;
            Ok(PASS)
        }
        Command::SlurmTask { batch } => slurm::task(&batch).map_err(|failed| failed.text),
        Command::Receipt { run, out, runs } => receipt::receipt(&run, &out, &runs),
        Command::Model { command: ModelCli::Compare { first, second, runs } } => {
            model::same([&first, &second], &runs)
        }
        Command::Doctor => doctor::examine(),
        Command::Explain { stage, run, cost, runs } => explain::explain(&stage, &run, &runs, cost),
        Command::Identify { stage, run, runs } => identify::identify(&stage, &run, &runs),
        Command::Predict(args) => predict::predict(&args),
        Command::Capture { engine } => capture::capture(&engine),
        Command::Falsify(args) => falsify::falsify(&args),
        Command::Report(args) => report::report(&args),
        Command::Diff(args) => diff::changes(&args),
        Command::Watch(args) => watch::watch(&args),
        Command::Completions { shell } => manners::completions(shell),
        Command::Man { folder } => manners::man(&folder),
        Command::Reference { models: true } => models::models(),
        Command::Reference { models: false } => reference::reference(),
        Command::Baseline { command } => nightly::baseline(&command),
        Command::History(args) => history::history(&args),
        Command::Fleet { command } => fleet::fleet(&command).map_err(|failed| failed.text),
        Command::New(args) => new::new(&args),
        Command::Schema { of } => schema::schema(of),
        Command::Judge(args) => judge::judge(&args),
        Command::Chip { command } => chip::chip(command),
    }
}

/// Prints to stdout; a reader who has gone away is no error.
fn print(text: &str) -> Result<u8, String> {
    terminal::print(text).map(|()| PASS)
}

fn print_bytes(bytes: &[u8]) -> Result<u8, String> {
    terminal::print_bytes(bytes).map(|()| PASS)
}

fn load_pipeline(folder: &Path, overrides: &Overrides) -> Result<Pipeline, String> {
    load(folder, overrides).map_err(|problems| problems.render(terminal::coloured()))
}

fn graph_of(pipeline: &Pipeline) -> Result<Graph, String> {
    Graph::of(&pipeline.stages).map_err(|cycle| cycle.to_string())
}

/// The synthetic model of this name, so many times as large.
fn scaled(model: &str, scale: &str, written: &str) -> Result<String, String> {
    match model.strip_prefix("synthetic:").map(|name| name.split_once('@')) {
        None => Err(format!(
            "`--scale` is of synthetic models, and `{}`{written} is none: write `--model \
             synthetic:NAME`, or leave `--scale` out",
            shown(model)
        )),
        Some(Some((_, own))) => Err(format!(
            "`{}`{written} has the scale {} already, and `--scale {}` says another: keep one of them",
            shown(model),
            shown(own),
            shown(scale)
        )),
        Some(None) => Ok(format!("{model}@{scale}")),
    }
}

/// What the command line sets for every stage.
fn overrides(args: &Selection) -> Result<Overrides, String> {
    let model = match (&args.model, &args.scale) {
        (Some(model), Some(scale)) => Some(scaled(model, scale, "")?),
        (model, _) => model.clone(),
    };
    Ok(Overrides {
        model,
        tokens: args.tokens.clone(),
        prompt: args.prompt.clone(),
        chat: args.chat.chat,
        system: args.chat.system.clone(),
        arms: args.arms.clone(),
        on: args.on,
    })
}

/// The pipeline, its graph and the selected stages.
fn selected(args: &Selection) -> Result<(Pipeline, Graph, BTreeSet<StageId>), String> {
    let mut pipeline = load_pipeline(&args.folder, &overrides(args)?)?;
    let graph = graph_of(&pipeline)?;
    let stages: BTreeSet<StageId> = match &args.select {
        None => pipeline.stages.iter().map(|stage| stage.id.clone()).collect(),
        Some(expression) => select_stages(&graph, &pipeline, expression)?,
    };
    if let (Some(scale), None) = (&args.scale, &args.model) {
        scale_models(&mut pipeline, scale, &stages)?;
    }
    Ok((pipeline, graph, stages))
}

/// Scales the synthetic models that the manifests name. Whoever is not selected may have others.
fn scale_models(
    pipeline: &mut Pipeline,
    scale: &str,
    selected: &BTreeSet<StageId>,
) -> Result<(), String> {
    for stage in pipeline.stages.iter_mut().filter(|stage| stage.op.reads_model()) {
        let written =
            format!(", the model of the stage `{}` (`{}`),", stage.id, stage.file.shown());
        match scaled(&stage.model, scale, &written) {
            Ok(model) => stage.model = model,
            Err(problem) if selected.contains(&stage.id) => return Err(problem),
            Err(_) => {}
        }
    }
    Ok(())
}

fn select_stages(
    graph: &Graph,
    pipeline: &Pipeline,
    expression: &str,
) -> Result<BTreeSet<StageId>, String> {
    select(graph, &pipeline.stages, expression).map_err(|error| error.to_string())
}

fn store_of(runs: &Path) -> Store {
    Store::new(&runs.join("cache"))
}

/// The digests of files. They are the machine's, not a project's: the same model
/// is hashed once for all. Without a home they lie in the cache.
fn stamps_of(runs: &Path, rehash: bool) -> Stamps {
    let folder = own_folder().unwrap_or_else(|| runs.join("cache").join("v1"));
    Stamps::new(&folder, rehash)
}

/// Where what is this machine's and no project's is kept, if its user has a home.
fn own_folder() -> Option<PathBuf> {
    let from = |name: &str| {
        let path = std::env::var_os(name).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    let home = from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")));
    home.map(|home| home.join("runner").join("v1"))
}

/// The arms as they ship; compiled GPU programs and what this machine has are kept beside the
/// results.
fn shipped(runs: &Path) -> Shipped {
    let kept = Some(store_of(runs).programs());
    Shipped { kept, reference_on_gpu: false, emulated_on_gpu: false }
}

/// The arms as they ship, each where it is wanted.
fn shipped_on(runs: &Path, places: &PlaceArgs) -> Shipped {
    let reference_on_gpu = places.reference_on == ProductsOn::Gpu;
    let emulated_on_gpu = places.emulated_on == ProductsOn::Gpu;
    Shipped { reference_on_gpu, emulated_on_gpu, ..shipped(runs) }
}

/// Keeps the digests that were made; without them the next run makes them again.
fn keep(stamps: &Stamps) {
    if let Err(error) = stamps.save() {
        tracing::warn!("digests of files are not kept: {error}");
    }
}

fn make_plan<'a>(
    pipeline: &'a Pipeline,
    graph: &Graph,
    stages: &BTreeSet<StageId>,
    store: &Store,
    stamps: &'a Stamps,
) -> Result<Plan<'a>, String> {
    let plan = Plan::new(pipeline, graph, stages, store, stamps);
    let plan = plan.map_err(|problems| told_once("error", &problems))?;
    if !plan.warnings.is_empty() {
        terminal::tell_line(&told_once("warning", &plan.warnings));
    }
    Ok(plan)
}

/// Problems of stages. Stages share models, prompts and files: each problem is told once.
fn told_once(level: &str, problems: &[PlanError]) -> String {
    let mut told: Vec<(String, Vec<String>)> = Vec::new();
    for PlanError::Stage { stage, file, problem } in problems {
        let problem = one_line(problem);
        let place = format!("`{stage}` (`{}`)", file.shown());
        match told.iter_mut().find(|(earlier, _)| *earlier == problem) {
            Some((_, places)) => places.push(place),
            None => told.push((problem, vec![place])),
        }
    }
    let lines: Vec<String> = told
        .iter()
        .map(|(problem, places)| {
            let stages = if places.len() == 1 { "stage" } else { "stages" };
            format!("{level}: {problem}\n  in {stages} {}", places.join(", "))
        })
        .collect();
    lines.join("\n")
}
