//! Carries out the op `command`: what it would see, the run itself, and its files
//! put in their places.
//!
//! A command works in a folder of its own in which its inputs stand as links at
//! their paths, and nothing else does: what it reads it must name. What it writes
//! is hashed and moved once everything that it started is dead. It knows files and
//! programs, not stages or verdicts.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Attempts, ProcessError, Processes, Request, Status};
use crate::cache::{self, CacheError, Facts, KeyWalk, Stamps, Store};
use crate::op::Command;
use crate::text::{Shown, one_line};

/// Where commands look for programs when nobody says where.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// An input folder nested deeper than this is taken for a loop of links.
const DEEPEST: usize = 64;
/// An output may always be read for as long.
const LEAST_SECONDS_TO_READ: u64 = 10;

/// What became of a command that ended by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandRecord {
    /// Its exit status.
    pub status: i32,
    /// Whether the status is one that counts as a result.
    pub accepted: bool,
    /// The files that it wrote, sorted by path; none where the status does not count.
    pub outputs: Vec<FileRecord>,
    /// What it said, by hash in the cache; absent if nothing.
    pub stdout: Option<String>,
    /// As `stdout`.
    pub stderr: Option<String>,
    /// What went wrong before it went well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flaky: Option<Flaky>,
}

/// A program that went well only when it was tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flaky {
    /// The attempt that went well, from 2.
    pub attempt: u32,
    /// How the first one failed.
    pub first: String,
}

impl std::fmt::Display for Flaky {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "flaky: attempt {} went well, the first failed: {}", self.attempt, self.first)
    }
}

/// Tries `once`, and again as often as the command may fail, while `failed` says why it
/// did. The last outcome, and whether it came only after another one.
pub(super) fn tried<T>(
    command: &Command,
    mut once: impl FnMut() -> T,
    failed: impl Fn(&T) -> Option<String>,
) -> (T, Option<Flaky>) {
    let mut first: Option<String> = None;
    let mut attempt = 1;
    loop {
        let outcome = once();
        match failed(&outcome) {
            Some(why) if attempt <= command.retries => {
                let (what, all) = (command.argv.join(" "), command.retries + 1);
                tracing::warn!("attempt {attempt} of {all} at `{what}` failed: {why}");
                first.get_or_insert(why);
                attempt += 1;
            }
            Some(_) => return (outcome, None),
            None => return (outcome, first.map(|first| Flaky { attempt, first })),
        }
    }
}

/// A file by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its path, seen from the project's folder.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// The hash of its content.
    pub blake3: String,
    /// Whether it may be executed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
}

/// Why a command has no result. None of this is kept: it may go well next time.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is nowhere to be found.
    #[error("there is no program `{program}` in {looked_in}; install it, or give its path")]
    NoProgram {
        /// As the manifest names it.
        program: String,
        /// Where it was looked for.
        looked_in: String,
    },
    /// An input is not there or cannot be read.
    #[error("the input `{path}` cannot be read: {source}; paths are seen from `{}`", project.shown())]
    Input {
        /// The path.
        path: String,
        /// Why.
        source: std::io::Error,
        /// The project's folder.
        project: PathBuf,
    },
    /// Somebody wrote its program, or an input, after it was looked at.
    #[error(
        "`{0}` changed while the command waited or ran; run again when nobody writes it, or, if the \
         command writes into a folder that it reads, list the files that it reads"
    )]
    Changed(String),
    /// A variable that no program could be given.
    #[error(
        "the variable `{0}` is not UTF-8, so the program cannot be given it; set it to a text, or \
         take it out of `env`"
    )]
    Variable(String),
    /// Its output takes longer to read than it may take to write.
    #[error(
        "the output `{path}` of {size} bytes could not be read within {seconds} s; write less, or \
         allow more with `timeout`"
    )]
    Endless {
        /// The output.
        path: String,
        /// Its size.
        size: u64,
        /// How long it was read.
        seconds: u64,
    },
    /// It ended well and left something out.
    #[error("it ended with status {status} and did not write `{path}`{but}")]
    NoOutput {
        /// What the program said of itself.
        status: i32,
        /// The missing output.
        path: String,
        /// What stands there instead.
        but: &'static str,
    },
    /// The output's place leads out of the project.
    #[error("the output `{0}` leads out of the project's folder by a link; write to another path")]
    Escapes(String),
    /// Something stands in the output's place that no file can replace.
    #[error(
        "the output `{0}` cannot be put in its place: a folder of that name is there; move it away and run again, the result is kept"
    )]
    Occupied(String),
    /// It did not end by itself.
    #[error("it ran into its timeout of {0} s and was killed; if it needs longer, write `timeout`")]
    TimedOut(u64),
    /// It did not end by itself.
    #[error("it was killed by signal {signal}{hint}")]
    Killed {
        /// The signal.
        signal: i32,
        /// What that usually means.
        hint: &'static str,
    },
    /// The user asked to stop.
    #[error("stopped on request")]
    Stopped,
    /// It could not be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The cache could not take its files.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The attempt's folder could not be made or read.
    #[error("cannot {action} `{}`: {source}; check the free space and the folder's rights", path.shown())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl CommandError {
    /// Whether another attempt may go well while everything around it stays as it is.
    pub(super) fn is_the_programs(&self) -> bool {
        match self {
            CommandError::NoOutput { .. }
            | CommandError::TimedOut(_)
            | CommandError::Killed { .. } => true,
            CommandError::NoProgram { .. }
            | CommandError::Input { .. }
            | CommandError::Changed(_)
            | CommandError::Variable(_)
            | CommandError::Endless { .. }
            | CommandError::Escapes(_)
            | CommandError::Occupied(_)
            | CommandError::Stopped
            | CommandError::Process(_)
            | CommandError::Cache(_)
            | CommandError::Io { .. } => false,
        }
    }
}

/// What commands are carried out with.
pub struct Tools<'a> {
    /// Where programs start.
    pub processes: &'a Processes,
    /// Where attempts have their folders.
    pub attempts: &'a Attempts,
    /// Where files go.
    pub store: &'a Store,
    /// Digests of files.
    pub stamps: &'a Stamps,
    /// The project's folder, absolute.
    pub project: &'a Path,
}

/// Everything that a command would see if it ran now.
pub struct Seen {
    program: PathBuf,
    /// Of the program, before it was read.
    program_facts: Facts,
    /// When the look began.
    began: i64,
    /// Folders in which it was looked for, where another could appear.
    searched: Vec<PathBuf>,
    program_digest: String,
    inputs: Vec<Input>,
    env: BTreeMap<String, String>,
    /// Listed variables with what stands for their values; unset ones have none.
    listed: BTreeMap<String, Option<String>>,
}

struct Input {
    path: String,
    digest: String,
    /// The file, or the files of the folder, as they were before they were read.
    files: Vec<(PathBuf, Facts)>,
    /// The folder and those in it.
    folders: Vec<(PathBuf, Facts)>,
}

/// What became of a file since it was looked at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Since {
    Same,
    /// Its content may be another one.
    Touched,
    Written,
}

/// Looks at everything that a command would see; runs nothing.
///
/// # Errors
/// If the program or an input is not there.
pub fn look(command: &Command, project: &Path, stamps: &Stamps) -> Result<Seen, CommandError> {
    let began = cache::now();
    let values = command.env.iter().map(|name| Ok((name.clone(), variable(name)?)));
    let values: BTreeMap<String, Option<String>> = values.collect::<Result<_, CommandError>>()?;
    let listed = values.iter().map(|(name, value)| (name.clone(), sealed_value(name, value)));
    let listed = listed.collect();
    let mut env = command.set.clone();
    env.extend(values.into_iter().filter_map(|(name, value)| Some((name, value?))));
    let path = match env.get("PATH") {
        Some(path) => path.clone(),
        None => variable("PATH")?.unwrap_or(DEFAULT_PATH.to_owned()),
    };
    env.insert("PATH".to_owned(), path.clone());

    let name = command.argv.first().map(String::as_str).unwrap_or_default();
    let (program, searched) = find_program(name, &path, project)?;
    let unreadable = |source| io("read", &program, source);
    let program_facts = Facts::of(&std::fs::metadata(&program).map_err(unreadable)?);
    let digest = stamps.digest(&program).map_err(unreadable)?;
    let inputs = command.inputs.iter().map(|path| {
        look_at_input(path, project, stamps).map_err(|source| CommandError::Input {
            path: path.clone(),
            source,
            project: project.to_owned(),
        })
    });
    Ok(Seen {
        inputs: inputs.collect::<Result<_, _>>()?,
        program_digest: digest.to_hex().to_string(),
        program,
        program_facts,
        began,
        searched,
        env,
        listed,
    })
}

/// A variable of the runner's own.
fn variable(name: &str) -> Result<Option<String>, CommandError> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(CommandError::Variable(name.to_owned())),
    }
}

/// What stands for a variable's value in keys, records and reasons: values are secrets as
/// often as not.
pub fn sealed_value(name: &str, value: &Option<String>) -> Option<String> {
    let value = value.as_ref()?;
    let text = format!("{name}={value}");
    let digest = blake3::derive_key("runner 2026 value of a listed variable", text.as_bytes());
    Some(blake3::Hash::from_bytes(digest).to_hex()[..16].to_owned())
}

impl Seen {
    /// Every file and folder that was looked at.
    pub fn looked_at(&self) -> impl Iterator<Item = &Path> {
        let inputs = self.inputs.iter().flat_map(|input| input.files.iter().chain(&input.folders));
        let inputs = inputs.map(|(path, _)| path.as_path());
        let searched = self.searched.iter().map(PathBuf::as_path);
        inputs.chain(searched).chain([self.program.as_path()])
    }

    /// The variables that it depends on.
    pub fn variables(&self) -> &BTreeMap<String, Option<String>> {
        &self.listed
    }

    /// The inputs that were touched and have the same content.
    pub fn touched(&self, stamps: &Stamps) -> Vec<String> {
        let touched = |input: &&Input| input.files.iter().any(|(_, f)| stamps.touched(&f.stamp));
        self.inputs.iter().filter(touched).map(|input| input.path.clone()).collect()
    }

    /// What is not what was looked at any more: the program, or an input. A file that was
    /// written is, whatever stands in it now; one that was only touched, linked or looked at
    /// when it was young is read again, and so is a folder in which something came or went.
    pub fn changed(&self, tools: &Tools<'_>) -> Option<String> {
        let since = |(path, earlier): &(PathBuf, Facts)| {
            let Ok(facts) = std::fs::metadata(path) else { return Since::Written };
            let now = Facts::of(&facts);
            match () {
                () if now.is_written_since(earlier) => Since::Written,
                () if now == *earlier && earlier.stamp.settled(self.began) => Since::Same,
                () => Since::Touched,
            }
        };
        let program = (self.program.clone(), self.program_facts);
        let same = match since(&program) {
            Since::Same => true,
            Since::Written => false,
            Since::Touched => {
                let digest = tools.stamps.digest(&self.program);
                digest.is_ok_and(|digest| digest.to_hex().as_str() == self.program_digest)
            }
        };
        if !same {
            return Some(self.program.shown().to_string());
        }
        let is_another = |input: &&Input| {
            let files = input.files.iter().map(since).max().unwrap_or(Since::Same);
            let folders = input.folders.iter().map(since).any(|since| since != Since::Same);
            match files {
                Since::Same if !folders => false,
                Since::Written => true,
                Since::Same | Since::Touched => {
                    let now = look_at_input(&input.path, tools.project, tools.stamps);
                    !now.is_ok_and(|now| now.digest == input.digest)
                }
            }
        };
        self.inputs.iter().find(is_another).map(|input| input.path.clone())
    }

    /// The program's file.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// All variables that it sees. Of the machine's GPUs it sees `gpus`, if any were
    /// handed out to it.
    pub(super) fn env_with(&self, gpus: &[usize]) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        if !gpus.is_empty() {
            let numbers: Vec<String> = gpus.iter().map(usize::to_string).collect();
            env.insert("CUDA_VISIBLE_DEVICES".to_owned(), numbers.join(","));
        }
        env
    }

    /// Names everything that the result depends on. The timeout is not among it,
    /// nor what is only looked for in the result.
    pub fn describe(&self, command: &Command, walk: &mut KeyWalk) {
        walk.field("argv", serde_json::json!(command.argv));
        walk.field("program", &self.program_digest);
        for (name, value) in &self.listed {
            walk.field(&format!("variable {name}"), value.as_deref().unwrap_or("unset"));
        }
        for (name, value) in &command.set {
            walk.field(&format!("set {name}"), format!("{value:?}"));
        }
        for input in &self.inputs {
            walk.field(&format!("input {}", input.path), &input.digest);
        }
        walk.field("outputs", serde_json::json!(command.outputs));
    }
}

/// Runs a command, again if it fails, as often as it may, and takes its files into the
/// store. Of the machine's GPUs it sees `gpus`, if any were handed out to it. `ended` is
/// told when its program has ended, unless that may be tried again.
///
/// # Errors
/// If it did not end by itself, did not keep its promises, or what it had seen changed.
pub fn carry_out(
    command: &Command,
    seen: &Seen,
    gpus: &[usize],
    tools: &Tools<'_>,
    ended: &mut dyn FnMut(),
) -> Result<(CommandRecord, f64), CommandError> {
    let once = || once(command, seen, gpus, tools, ended);
    let (outcome, flaky) = tried(command, once, |outcome| match outcome {
        Ok((record, _)) if record.accepted => None,
        Ok((record, _)) => {
            let said = last_words(record, tools.store);
            let said = said.map_or(String::new(), |said| format!("; it said: {said}"));
            Some(format!("status {}{said}", record.status))
        }
        Err(error) => error.is_the_programs().then(|| error.to_string()),
    });
    let (record, seconds) = outcome?;
    Ok((CommandRecord { flaky, ..record }, seconds))
}

fn once(
    command: &Command,
    seen: &Seen,
    gpus: &[usize],
    tools: &Tools<'_>,
    ended: &mut dyn FnMut(),
) -> Result<(CommandRecord, f64), CommandError> {
    let attempt = tools.attempts.attempt();
    let attempt = attempt.map_err(|source| io("make a folder in", tools.project, source))?;
    let work = attempt.work();
    lay_out(command, tools.project, &work)?;
    let outcome = tools.processes.run(&Request {
        file: seen.program.clone(),
        argv: command.argv.clone(),
        env: seen.env_with(gpus),
        folder: work.clone(),
        temporary: attempt.temporary(),
        stdout: attempt.stdout(),
        stderr: attempt.stderr(),
        timeout: command.timeout.map(Duration::from_secs),
        largest_file: None,
    })?;
    // Whatever may be tried again is not over.
    if command.retries == 0 {
        ended();
    }
    let status = match outcome.status {
        Status::Exited(status) => status,
        Status::TimedOut => {
            return Err(CommandError::TimedOut(command.timeout.unwrap_or_default()));
        }
        Status::Stopped => return Err(CommandError::Stopped),
        Status::Killed(signal) => {
            let hint = match signal {
                9 => ": by the system for want of memory, or by somebody",
                11 | 7 | 4 | 8 | 6 => ": it crashed",
                _ => "",
            };
            return Err(CommandError::Killed { signal, hint });
        }
    };
    if let Some(changed) = seen.changed(tools) {
        return Err(CommandError::Changed(changed));
    }
    let accepted = command.accepts.contains(&status);
    let paths: &[String] = if accepted { &command.outputs } else { &[] };
    let outputs = paths.iter().map(|path| take_output(path, status, &work, command, tools));
    let record = CommandRecord {
        status,
        accepted,
        outputs: outputs.collect::<Result<_, _>>()?,
        stdout: take_log(&attempt.stdout(), tools)?,
        stderr: take_log(&attempt.stderr(), tools)?,
        flaky: None,
    };
    Ok((record, outcome.seconds))
}

/// Whether all outputs of a record stand where they belong.
pub fn is_in_place(record: &CommandRecord, project: &Path, stamps: &Stamps) -> bool {
    record.outputs.iter().all(|output| stands(output, project, stamps))
}

/// Puts the outputs of a record where they belong, unless they stand there. Gives
/// the paths of those that it put, or nothing if the store has lost one.
///
/// # Errors
/// If a place cannot be written.
pub fn restore(
    record: &CommandRecord,
    tools: &Tools<'_>,
) -> Result<Option<Vec<String>>, CommandError> {
    let wrong: Vec<&FileRecord> = record
        .outputs
        .iter()
        .filter(|output| !stands(output, tools.project, tools.stamps))
        .collect();
    if !wrong.iter().all(|output| tools.store.has_blob(&output.blake3, tools.stamps)) {
        return Ok(None);
    }
    for output in &wrong {
        put_one_in_place(output, tools)?;
    }
    Ok(Some(wrong.into_iter().map(|output| output.path.clone()).collect()))
}

/// The same for a record whose files the store has taken just now.
///
/// # Errors
/// If a place cannot be written.
pub fn put_in_place(record: &CommandRecord, tools: &Tools<'_>) -> Result<(), CommandError> {
    // What has the right content is left alone: whoever watches it sees no change.
    let mut wrong =
        record.outputs.iter().filter(|output| !stands(output, tools.project, tools.stamps));
    wrong.try_for_each(|output| put_one_in_place(output, tools))
}

fn stands(output: &FileRecord, project: &Path, stamps: &Stamps) -> bool {
    let path = project.join(&output.path);
    let plain = std::fs::symlink_metadata(&path).is_ok_and(|facts| {
        let executable = facts.permissions().mode() & 0o100 != 0;
        facts.is_file() && facts.len() == output.size && executable == output.executable
    });
    plain && stamps.digest(&path).is_ok_and(|digest| digest.to_hex().as_str() == output.blake3)
}

fn put_one_in_place(output: &FileRecord, tools: &Tools<'_>) -> Result<(), CommandError> {
    let target = tools.project.join(&output.path);
    let parent = target.parent().unwrap_or(tools.project);
    // Before a missing folder is made: it could come to stand behind a link.
    let there = parent.ancestors().find(|folder| folder.exists()).unwrap_or(tools.project);
    let real = there.canonicalize().map_err(|source| io("find", there, source))?;
    if !real.starts_with(tools.project) {
        return Err(CommandError::Escapes(output.path.clone()));
    }
    std::fs::create_dir_all(parent).map_err(|source| io("make", parent, source))?;
    let real = parent.canonicalize().map_err(|source| io("find", parent, source))?;
    if !real.starts_with(tools.project) {
        return Err(CommandError::Escapes(output.path.clone()));
    }
    // A link to a folder is replaced as any file.
    if std::fs::symlink_metadata(&target).is_ok_and(|facts| facts.is_dir()) {
        return Err(CommandError::Occupied(output.path.clone()));
    }
    tools.store.publish(&output.blake3, &target, output.executable)?;
    let digest = blake3::Hash::from_hex(&output.blake3).ok();
    if let Some(digest) = digest
        && let Err(error) = tools.stamps.note_own(&target, digest)
    {
        return Err(io("inspect", &target, error));
    }
    Ok(())
}

/// The inputs as links at their paths, and the folders that outputs go to.
pub(super) fn lay_out(command: &Command, project: &Path, work: &Path) -> Result<(), CommandError> {
    let make = |folder: Option<&Path>| {
        let folder = folder.unwrap_or(work);
        std::fs::create_dir_all(folder).map_err(|source| io("make", folder, source))
    };
    let relative = command.inputs.iter().filter(|path| !Path::new(path).is_absolute());
    let mut linked: Vec<&Path> = Vec::new();
    for path in relative.map(Path::new) {
        if linked.iter().any(|folder| path.starts_with(folder)) {
            continue;
        }
        let link = work.join(path);
        make(link.parent())?;
        std::os::unix::fs::symlink(project.join(path), &link)
            .map_err(|source| io("link", &link, source))?;
        linked.push(path);
    }
    command.outputs.iter().try_for_each(|path| make(work.join(path).parent()))
}

fn take_output(
    path: &str,
    status: i32,
    work: &Path,
    command: &Command,
    tools: &Tools<'_>,
) -> Result<FileRecord, CommandError> {
    let file = work.join(path);
    let missing = |but| CommandError::NoOutput { status, path: path.to_owned(), but };
    if !stays_below(work, &file) {
        return Err(missing(
            " in its own folder: a link leads out of there, and what lies behind it is not \
             touched; write the file itself",
        ));
    }
    let facts = std::fs::symlink_metadata(&file).map_err(|_| missing(""))?;
    if !facts.is_file() {
        return Err(missing(": what stands there is no regular file"));
    }
    let executable = facts.permissions().mode() & 0o100 != 0;
    // What is written in time is read in time: a file may claim more bytes than any disk has.
    let seconds = command.timeout.map(|timeout| timeout.max(LEAST_SECONDS_TO_READ));
    let until = seconds.and_then(|s| Instant::now().checked_add(Duration::from_secs(s)));
    let digest = match tools.store.adopt(&file, until)? {
        Some(digest) => digest,
        None => {
            let (path, size) = (path.to_owned(), facts.len());
            return Err(CommandError::Endless { path, size, seconds: seconds.unwrap_or_default() });
        }
    };
    Ok(FileRecord { path: path.to_owned(), size: facts.len(), blake3: digest, executable })
}

/// Whether the folder of a file that a program was to write is still in its own: it may have
/// put a link in the place of a folder.
pub(super) fn stays_below(work: &Path, file: &Path) -> bool {
    let folder = file.parent().and_then(|folder| folder.canonicalize().ok());
    folder.is_none_or(|folder| folder.starts_with(work))
}

fn take_log(file: &Path, tools: &Tools<'_>) -> Result<Option<String>, CommandError> {
    let size = std::fs::metadata(file).map_err(|source| io("read", file, source))?.len();
    if size == 0 { Ok(None) } else { Ok(tools.store.adopt(file, None)?) }
}

/// A program's file, as `execvp` finds it and seen from the project's folder, and
/// the folders that were searched up to it.
fn find_program(
    name: &str,
    path: &str,
    project: &Path,
) -> Result<(PathBuf, Vec<PathBuf>), CommandError> {
    let runs = |file: &PathBuf| {
        let facts = std::fs::metadata(file);
        facts.is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
    };
    let missing = |looked_in| CommandError::NoProgram { program: name.to_owned(), looked_in };
    if name.contains('/') {
        let file = Some(project.join(name)).filter(runs);
        let file = file.ok_or_else(|| missing(format!("`{}`", project.shown())))?;
        return Ok((file, Vec::new()));
    }
    let mut searched = Vec::new();
    for folder in std::env::split_paths(path) {
        let folder = project.join(folder);
        let file = folder.join(name);
        searched.push(folder);
        if runs(&file) {
            return Ok((file, searched));
        }
    }
    Err(missing(format!("PATH ({path})")))
}

/// One digest for an input. A folder's is over everything that a program sees of it without
/// being told: names, kinds, where links lead, what may be executed, and contents.
fn look_at_input(path: &str, project: &Path, stamps: &Stamps) -> std::io::Result<Input> {
    let root = project.join(path);
    let facts = std::fs::metadata(&root)?;
    let mut input =
        Input { path: path.to_owned(), digest: String::new(), files: vec![], folders: vec![] };
    if !facts.is_dir() {
        input.digest = stamps.digest(&root)?.to_hex().to_string();
        input.files.push((root, Facts::of(&facts)));
        return Ok(input);
    }
    let mut walk = KeyWalk::new("folder 2");
    list_folder(&root, &facts, DEEPEST, &mut input, &mut |path, facts| {
        let name = path.strip_prefix(&root).unwrap_or(path);
        let link = std::fs::read_link(path).map(|to| format!(", a link to {}", unmistakable(&to)));
        let link = link.unwrap_or_default();
        let what = match facts.is_dir() {
            true => "a folder".to_owned(),
            false => {
                let named = |error: std::io::Error| {
                    std::io::Error::new(error.kind(), format!("`{}`: {error}", name.shown()))
                };
                stamps.digest(path).map_err(named)?.to_hex().to_string() + marked_executable(facts)
            }
        };
        walk.field(&unmistakable(name), what + &link);
        Ok(())
    })?;
    input.digest = walk.key().0;
    Ok(input)
}

fn marked_executable(facts: &std::fs::Metadata) -> &'static str {
    if facts.permissions().mode() & 0o111 == 0 { "" } else { ", executable" }
}

/// A path as a text that no other path has, also where it is not UTF-8.
fn unmistakable(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        text += &chunk.valid().replace('\\', "\\\\");
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

/// Lists a folder with all that is in it, and shows each entry to `see`.
fn list_folder(
    folder: &Path,
    facts: &std::fs::Metadata,
    deeper: usize,
    input: &mut Input,
    see: &mut dyn FnMut(&Path, &std::fs::Metadata) -> std::io::Result<()>,
) -> std::io::Result<()> {
    input.folders.push((folder.to_owned(), Facts::of(facts)));
    if deeper == 0 {
        return Err(std::io::Error::other("its folders are nested too deeply; is a link a loop?"));
    }
    let entries: std::io::Result<Vec<_>> = std::fs::read_dir(folder)?.collect();
    let mut paths: Vec<PathBuf> = entries?.into_iter().map(|entry| entry.path()).collect();
    paths.sort();
    // What a runner is writing there has no name yet.
    paths.retain(|path| !path.file_name().is_some_and(cache::is_draft));
    for path in paths {
        let facts = std::fs::metadata(&path)?;
        see(&path, &facts)?;
        if facts.is_dir() {
            list_folder(&path, &facts, deeper - 1, input, see)?;
        } else {
            input.files.push((path, Facts::of(&facts)));
        }
    }
    Ok(())
}

/// The last line that a command said to its stderr, for the reason of a failure.
pub fn last_words(record: &CommandRecord, store: &Store) -> Option<String> {
    last_line(&store.blob_path(record.stderr.as_ref()?), 200)
}

/// The last line of a log that says something, and at most so many characters of it.
pub(super) fn last_line(log: &Path, most: usize) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    const LOOKED_AT: u64 = 4096;
    let mut file = crate::files::open(log).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOOKED_AT))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOOKED_AT).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    Some(one_line(line.trim()).chars().take(most).collect())
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CommandError {
    CommandError::Io { action, path: path.to_owned(), source }
}
