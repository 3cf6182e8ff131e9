//! Runs in jobs of Slurm: what `runner run` makes ready for them, and the hidden command that
//! does one task of an array on a node.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;

use super::run::RunArgs;
use super::{
    Failed, INTERRUPTED, PASS, SYSTEM, USAGE, graph_of, keep, load_pipeline, nightly, overrides,
    scale_models, shipped, stamps_of, store_of, told_once,
};
use crate::cache::{Remote, RemoteOptions, Store};
use crate::executor::slurm::{
    Head, LOG_VARIABLE, Letters, MOST_SKEW, NO_STORE, Orders, STORE_VARIABLE, Said, Slurm,
    SlurmError, Teller, build, duration, heard, now, orders_of, read, results_of,
};
use crate::executor::{Attempts, Processes, Slots};
use crate::interrupt;
use crate::manifest::{Executor, Overrides, Resources};
use crate::op::{Arm, StageId};
use crate::plan::Plan;
use crate::run::{Errand, Options, carry_out, is_on_gpu};
use crate::terminal::tell_line;
use crate::text::{Shown, no_threads, shown};

/// What every task of a run is told.
#[derive(Serialize, Deserialize)]
struct Common {
    /// Where the runner was started; paths are seen from there.
    working: PathBuf,
    folder: PathBuf,
    runs: PathBuf,
    overrides: Overrides,
    scale: Option<String>,
    profile: Option<String>,
    rehash: bool,
    force: bool,
    fresh: BTreeSet<Arm>,
    created: String,
}

/// What a node is told of the shared cache, where it sees no folder. Who it is there, variables
/// and the node itself say.
#[derive(Serialize, Deserialize)]
struct StoreOf {
    url: String,
    anonymous: bool,
    commands: bool,
}

impl StoreOf {
    /// Everything that a node has made is sent: nobody else has it.
    fn options(self) -> RemoteOptions {
        let StoreOf { url, anonymous, commands } = self;
        RemoteOptions { url, read_only: false, anonymous, largest: u64::MAX, commands, runs: false }
    }
}

impl From<SlurmError> for Failed {
    fn from(error: SlurmError) -> Failed {
        let code = match error {
            SlurmError::Silent { .. } | SlurmError::Folder(_) | SlurmError::Post(_) => SYSTEM,
            _ => USAGE,
        };
        Failed { text: format!("error: {error}"), code }
    }
}

/// Whether some stage of a plan is to be done by Slurm.
pub(super) fn is_wanted(plan: &Plan<'_>) -> bool {
    plan.stages.iter().any(|prepared| prepared.stage.executor.slurm)
}

/// Makes Slurm ready for a run. What can be known to be wrong before anything is submitted is
/// an error.
pub(super) fn open(
    args: &RunArgs,
    plan: &Plan<'_>,
    run: &str,
    created: &str,
    remote: Option<&RemoteOptions>,
    store: &Store,
) -> Result<Slurm, Failed> {
    let selection = args.selection();
    let working = std::env::current_dir().map_err(|error| {
        Failed::system(format!("error: cannot tell the folder of this process: {error}"))
    })?;
    let common = Common {
        working,
        folder: selection.folder.clone(),
        runs: selection.runs.clone(),
        overrides: overrides(selection)?,
        scale: selection.scale.clone().filter(|_| selection.model.is_none()),
        profile: args.profile().cloned(),
        rehash: selection.rehash,
        force: plan.force,
        fresh: plan.fresh.clone(),
        created: created.to_owned(),
    };
    let common = to_raw_value(&common).map_err(|error| error.to_string())?;
    let folder = store_of(&selection.runs).root().join("slurm");
    let shared = for_nodes_without_folder(run, plan, remote, store)?;
    let slurm = Slurm::open(&folder, run, common, shared, args.attach())?;
    let mut checked: Vec<(&Resources, bool, &Executor)> = Vec::new();
    for prepared in plan.stages.iter().filter(|prepared| prepared.stage.executor.slurm) {
        let stage = prepared.stage;
        let arms = stage.arms.iter().filter(|arm| prepared.judged || **arm == Arm::Reference);
        for arm in arms {
            let wanted = (&stage.resources, is_on_gpu(prepared, Some(*arm)), &stage.executor);
            if checked.contains(&wanted) {
                continue;
            }
            checked.push(wanted);
            if let Err(error) = slurm.check(wanted.0, wanted.1, wanted.2) {
                let error = match error {
                    SlurmError::Never(text) => SlurmError::Never(format!(
                        "stage `{}` (`{}`): {text}",
                        stage.id,
                        stage.file.shown()
                    )),
                    error => error,
                };
                // Jobs that were taken up are another runner's to take up again.
                slurm.leave();
                return Err(error.into());
            }
        }
    }
    for line in slurm.taken_up() {
        tell_line(&line);
    }
    Ok(slurm)
}

/// The shared cache, where some stage's nodes see no folder of this machine, with what nodes are
/// told of it. What could never go through it is an error.
fn for_nodes_without_folder(
    run: &str,
    plan: &Plan<'_>,
    remote: Option<&RemoteOptions>,
    store: &Store,
) -> Result<Option<(String, Arc<Remote>)>, Failed> {
    let of_slurm = plan.stages.iter().filter(|prepared| prepared.stage.executor.slurm);
    let wanting: Vec<_> =
        of_slurm.filter(|prepared| prepared.stage.executor.without_folder).collect();
    let Some(first) = wanting.first() else {
        return Ok(remote.zip(store.remote()).map(|(options, remote)| (told_of(options), remote)));
    };
    let needs = format!(
        "stage `{}` (`{}`) is done by nodes without a shared folder (`shared_folder = false` of \
         `[executor]`), so",
        first.stage.id,
        first.stage.file.shown()
    );
    let Some((options, reached)) = remote.zip(store.remote()) else {
        return Err(Failed::from(format!(
            "error: {needs} a shared cache must carry what they are told and what they make: name \
             one with `--cache s3://BUCKET/PATH`, or `url` of `[cache]` (docs/slurm.md)"
        )));
    };
    if options.read_only {
        return Err(Failed::from(format!(
            "error: {needs} this run must write to the shared cache `{}`; leave out `--cache-mode \
             read-only`",
            shown(&options.url)
        )));
    }
    if options.url.starts_with("http") {
        return Err(Failed::from(format!(
            "error: {needs} the shared cache must be able to list what it holds, and a plain HTTP \
             server such as `{}` cannot; name a bucket or a folder",
            shown(&options.url)
        )));
    }
    if let Some(command) = wanting.iter().find(|prepared| prepared.stage.op.command().is_some()) {
        return Err(Failed::from(format!(
            "error: stage `{}` (`{}`) runs a program on files of the project's folder, which nodes \
             without a shared folder do not see of each other; give it `on = \"here\"`, or nodes \
             that share the folder",
            command.stage.id,
            command.stage.file.shown()
        )));
    }
    // A store that is down is left alone by a run that can do without it; this one cannot.
    reached.letters_in(run).map_err(SlurmError::from)?;
    Ok(Some((told_of(options), reached)))
}

fn told_of(options: &RemoteOptions) -> String {
    let RemoteOptions { url, anonymous, commands, .. } = options.clone();
    // Texts and truth values are always encoded.
    serde_json::to_string(&StoreOf { url, anonymous, commands }).unwrap_or_default()
}

/// Does a task of an array: the items that its orders list, into the cache that its runner reads.
pub(super) fn task(batch: &Path) -> Result<u8, Failed> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let task: usize = number("SLURM_ARRAY_TASK_ID").ok_or_else(|| {
        "error: this command is started by Slurm, in the jobs of `runner run --on slurm`".to_owned()
    })?;
    let start: usize = number("SLURM_RESTART_COUNT").unwrap_or(0);
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let node = variable("SLURMD_NODENAME").unwrap_or_else(|| crate::machine::name().to_owned());
    let Some(told) = variable(STORE_VARIABLE) else {
        let teller =
            Teller::open(batch, task, start).map_err(|error| cannot_write(batch, &error))?;
        return tell_all(batch, task, start, node, teller, None);
    };
    // Nothing of the runner's machine is here: what is to be done comes from the shared cache.
    let not_reached =
        |problem: String| Failed { text: format!("error: {problem}"), code: NO_STORE };
    let told: StoreOf = serde_json::from_str(&told).map_err(|error| {
        not_reached(format!("`{STORE_VARIABLE}` says nothing of a shared cache: {error}"))
    })?;
    let remote =
        Remote::reached(&told.options()).map_err(|error| not_reached(error.to_string()))?;
    let remote = Arc::new(remote);
    let folder = tempfile::Builder::new().prefix("runner-task-").tempdir().map_err(|error| {
        Failed::of_io(format!("error: cannot make a temporary folder: {error}"), &error)
    })?;
    let place = batch.to_string_lossy();
    let letters =
        Letters::bring(&remote, &place, task, start, folder.path()).map_err(not_reached)?;
    let teller = Teller::open(folder.path(), task, start)
        .map_err(|error| cannot_write(folder.path(), &error))?
        .by_letters(letters);
    let ended = tell_all(folder.path(), task, start, node, teller, Some(&remote));
    if let (Ok(PASS), Some(log)) = (&ended, std::env::var_os(LOG_VARIABLE)) {
        // All of it was sent; what is left on the node is of no use to anybody.
        let _ = std::fs::remove_file(log);
    }
    ended
}

fn cannot_write(batch: &Path, error: &std::io::Error) -> Failed {
    Failed::of_io(format!("error: cannot write to `{}`: {error}", batch.shown()), error)
}

/// Does the task, and says what became of it.
fn tell_all(
    batch: &Path,
    task: usize,
    start: usize,
    node: String,
    mut teller: Teller,
    remote: Option<&Arc<Remote>>,
) -> Result<u8, Failed> {
    let cannot = |error: std::io::Error| cannot_write(batch, &error);
    match carry(batch, task, start, &node, &mut teller, remote) {
        Ok(code) => {
            teller.finish().map_err(cannot)?;
            Ok(code)
        }
        Err(Stopped::Refused(problem)) => {
            teller.say(&Said::Refused { node, problem: problem.clone() }).map_err(cannot)?;
            teller.finish().map_err(cannot)?;
            Err(Failed { text: format!("error: {problem}"), code: PASS })
        }
        Err(Stopped::Silent(error)) => Err(cannot(error)),
    }
}

/// Why a task does no more.
enum Stopped {
    /// It can do nothing here.
    Refused(String),
    /// It cannot say what it does.
    Silent(std::io::Error),
}

impl From<String> for Stopped {
    fn from(problem: String) -> Stopped {
        Stopped::Refused(problem)
    }
}

fn carry(
    batch: &Path,
    task: usize,
    start: usize,
    node: &str,
    teller: &mut Teller,
    remote: Option<&Arc<Remote>>,
) -> Result<u8, Stopped> {
    let head: Head = read(&batch.join("head.json"))?;
    same_build(&head.build, &build())?;
    let written = match teller.letters() {
        Some(letters) => letters.clock()?,
        None => {
            let written = std::fs::metadata(results_of(batch, task, start));
            let written = written.and_then(|facts| facts.modified()).map_err(Stopped::Silent)?;
            written.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs() as i64
        }
    };
    same_clock(now(), head.submitted, written)?;
    let common: Common =
        serde_json::from_str(head.common.get()).map_err(|error| error.to_string())?;
    std::env::set_current_dir(&common.working).map_err(|error| {
        format!(
            "this node has no folder `{}`, where the runner was started: {error}; put the \
             project where every node has it under the same path",
            common.working.as_path().shown()
        )
    })?;
    let stop = || {
        if interrupt::requested() {
            std::process::exit(i32::from(INTERRUPTED));
        }
        interrupt::request();
    };
    ctrlc::set_handler(stop)
        .map_err(|error| format!("cannot watch for signals: {}", no_threads(1, &error)))?;
    let orders: Orders = read(&orders_of(batch, task))?;
    // What an earlier start of the task has said is done.
    let mut done = BTreeSet::new();
    for earlier in 0..=start {
        let said = heard(&results_of(batch, task, earlier), &mut 0);
        done.extend(said.into_iter().filter_map(|said| match said {
            Said::Done { item, .. } => Some(item),
            _ => None,
        }));
    }
    let mut errands = Vec::new();
    for (item, order) in orders.items.iter().enumerate().filter(|(item, _)| !done.contains(item)) {
        let errand: Errand =
            serde_json::from_str(order.get()).map_err(|error| error.to_string())?;
        errands.push((item, errand));
    }

    let mut pipeline = load_pipeline(&common.folder, &common.overrides)?;
    let graph = graph_of(&pipeline)?;
    let stages: BTreeSet<StageId> =
        errands.iter().map(|(_, errand)| errand.stage.clone()).collect();
    if let Some(unknown) = stages.iter().find(|id| pipeline.stage(id).is_none()) {
        return Err(Stopped::Refused(format!(
            "`{}` has no stage {unknown} any more, which was submitted; run again",
            common.folder.as_path().shown()
        )));
    }
    if let Some(scale) = &common.scale {
        scale_models(&mut pipeline, scale, &stages)?;
    }
    if let Some(profile) = &common.profile {
        nightly::repeat(&mut pipeline, profile);
    }
    let store = store_of(&common.runs);
    let store = match remote {
        Some(remote) => store.behind(Arc::clone(remote)),
        None => store,
    };
    let _in_use = store.in_use().map_err(|error| error.to_string())?;
    let stamps = stamps_of(&common.runs, common.rehash);
    let mut plan = Plan::new(&pipeline, &graph, &stages, &store, &stamps)
        .map_err(|problems| told_once("error", &problems))?;
    plan.force = common.force;
    plan.fresh = common.fresh;
    plan.part_of = Some(head.run.clone());
    for prepared in &mut plan.stages {
        let id = &prepared.stage.id;
        prepared.judged = errands.iter().any(|(_, errand)| errand.stage == *id && errand.judged);
    }
    let job = std::env::var("SLURM_JOB_ID").unwrap_or_default();
    let name = format!("{}.{job}-{start}", head.run);
    let (attempts, _) = Attempts::open(&store.attempts(), &name)
        .map_err(|error| format!("cannot make a folder for attempts: {error}"))?;
    let workshop = shipped(&common.runs);
    let options = Options {
        run: head.run,
        created: common.created,
        jobs: 1,
        require: BTreeSet::new(),
        workshop: &workshop,
        fail_fast: false,
        slots: &Slots::handed_out(),
        processes: &Processes::of_this_program(),
        attempts: &attempts,
        memory: None,
    };
    let mut code = PASS;
    for (item, errand) in errands {
        if interrupt::requested() {
            code = INTERRUPTED;
            break;
        }
        let node = node.to_owned();
        teller.say(&Said::Began { item, node }).map_err(Stopped::Silent)?;
        let Some((answer, seconds)) = carry_out(&plan, &store, &options, errand) else {
            code = INTERRUPTED;
            break;
        };
        teller.say(&Said::Done { item, answer, seconds }).map_err(Stopped::Silent)?;
    }
    drop(attempts);
    keep(&stamps);
    Ok(code)
}

/// Two builds may compute different things under one key, or read each other's files wrongly.
fn same_build(theirs: &str, ours: &str) -> Result<(), String> {
    if theirs == ours {
        return Ok(());
    }
    Err(format!(
        "this node has runner {ours}, and runner {theirs} submitted the job; install the same on \
         both, or name one that every node has with `program` of `[executor]`"
    ))
}

/// A node's clock beside those of whoever submitted and of the shared folder.
fn same_clock(now: i64, submitted: i64, written: i64) -> Result<(), String> {
    let wrong = |apart: i64, what: &str| {
        Err(format!(
            "the clock of this node is {} {what}; set it by NTP, since files and results are \
             known by their times",
            duration(apart)
        ))
    };
    if submitted - now > MOST_SKEW {
        return wrong(submitted - now, "behind that of the machine that submitted the job");
    }
    let apart = (now - written).abs();
    if apart > MOST_SKEW {
        return wrong(apart, "apart from that of the folder of runs");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_build_is_refused_and_both_are_named() {
        assert_eq!(same_build("0.1.0 (arms a)", "0.1.0 (arms a)"), Ok(()));
        let text = same_build("0.1.0 (arms a)", "0.1.0 (arms b)").expect_err("refused");
        assert!(text.contains("(arms a)") && text.contains("(arms b)"), "{text}");
    }

    #[test]
    fn a_clock_that_is_hours_off_is_refused() {
        assert_eq!(same_clock(10_000, 9_000, 10_001), Ok(()));
        let behind = same_clock(10_000, 10_000 + 5 * 3600, 10_000).expect_err("refused");
        assert!(behind.contains("5 h behind"), "{behind}");
        let apart = same_clock(10_000 + 3 * 3600, 10_000, 10_000).expect_err("refused");
        assert!(apart.contains("3 h apart"), "{apart}");
    }
}
