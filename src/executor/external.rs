//! The external arm: a program is asked for tensors and writes them to a file.
//!
//! It starts in a folder of its own, where `request.json` says what is wanted,
//! `inputs.safetensors` holds what a single op reads and its listed inputs stand as
//! links; what it is to leave is `tensors.safetensors`.
//! It is killed at its timeout, and may not write more than the tensors can need.
//! It knows programs and files, not arms or stages.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::command::{CommandError, Flaky, Seen, Tools, last_line, lay_out, stays_below, tried};
use super::{Attempt, Request, Status};
use crate::op::External;

/// Characters of a program's last words.
const LAST_WORDS: usize = 400;

/// Why a program gave no tensors.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// It could not be started, or was killed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It ended badly.
    #[error("it ended with status {status}{said}; correct the program, nothing of this was kept")]
    Status {
        /// Its exit status.
        status: i32,
        /// Its last words.
        said: String,
    },
    /// It wrote more than it may.
    #[error(
        "it wrote more than {0} bytes to a file, beyond what the tensors can need, and was \
         stopped; write the sites of `{name}` alone",
        name = External::REQUEST
    )]
    TooLarge(u64),
    /// It ended well without a result.
    #[error(
        "it ended with status 0 and left no `{name}`{0}; it must be a file, in the folder where \
         the program starts",
        name = External::TENSORS
    )]
    Nothing(String),
}

/// What a program left, for as long as this lives.
pub struct Left {
    /// Holds the folder.
    _attempt: Attempt,
    /// The file of tensors.
    pub tensors: PathBuf,
    /// What went wrong before it went well.
    pub flaky: Option<Flaky>,
}

/// What a program is asked.
pub struct Asked<'a> {
    /// What is wanted.
    pub request: &'a serde_json::Value,
    /// The file of what the op reads, where it is a single one.
    pub inputs: Option<&'a [u8]>,
    /// The GPUs that were handed out to it.
    pub gpus: &'a [usize],
    /// The most bytes that a file of its may have.
    pub largest: u64,
}

/// Asks a program, again if it fails, as often as it may.
///
/// # Errors
/// Why the last attempt gave nothing.
pub fn ask(
    external: &External,
    seen: &Seen,
    asked: &Asked<'_>,
    tools: &Tools<'_>,
) -> Result<Left, ExternalError> {
    let once = || once(external, seen, asked, tools);
    let (outcome, flaky) = tried(&external.program, once, |outcome| match outcome {
        Ok(_) => None,
        Err(ExternalError::Command(error)) if !error.is_the_programs() => None,
        Err(error) => Some(error.to_string()),
    });
    outcome.map(|left| Left { flaky, ..left })
}

fn once(
    external: &External,
    seen: &Seen,
    asked: &Asked<'_>,
    tools: &Tools<'_>,
) -> Result<Left, ExternalError> {
    let attempt = tools.attempts.attempt().map_err(|source| CommandError::Io {
        action: "make a folder in",
        path: tools.project.to_owned(),
        source,
    })?;
    let work = attempt.work();
    lay_out(&external.program, tools.project, &work)?;
    let text = serde_json::to_vec_pretty(asked.request).unwrap_or_default();
    for (name, bytes) in
        [(External::REQUEST, Some(text.as_slice())), (External::INPUTS, asked.inputs)]
    {
        let Some(bytes) = bytes else { continue };
        let path = work.join(name);
        std::fs::write(&path, bytes).map_err(|source| io("write", &path, source))?;
    }
    let timeout = external.program.timeout.unwrap_or(External::DEFAULT_TIMEOUT);
    let ended = tools
        .processes
        .run(&Request {
            file: seen.program().to_owned(),
            argv: external.program.argv.clone(),
            env: seen.env_with(asked.gpus),
            folder: work.clone(),
            temporary: attempt.temporary(),
            stdout: attempt.stdout(),
            stderr: attempt.stderr(),
            timeout: Some(Duration::from_secs(timeout)),
            largest_file: Some(asked.largest),
        })
        .map_err(CommandError::from)?;
    let said = || {
        let words = last_line(&attempt.stderr(), LAST_WORDS);
        words.map_or(String::new(), |words| format!("; it said: {words}"))
    };
    match ended.status {
        Status::Exited(0) => {}
        // What a shell says of a child that SIGXFSZ ended.
        Status::Exited(153) => return Err(ExternalError::TooLarge(asked.largest)),
        Status::Exited(status) => return Err(ExternalError::Status { status, said: said() }),
        Status::TimedOut => return Err(CommandError::TimedOut(timeout).into()),
        Status::Stopped => return Err(CommandError::Stopped.into()),
        // SIGXFSZ: the limit on a file's size.
        Status::Killed(25) => return Err(ExternalError::TooLarge(asked.largest)),
        Status::Killed(signal) => return Err(CommandError::Killed { signal, hint: "" }.into()),
    }
    let tensors = work.join(External::TENSORS);
    // A link could lead to a file that somebody else still writes.
    let is_file = std::fs::symlink_metadata(&tensors).is_ok_and(|facts| facts.is_file());
    if !is_file || !stays_below(&work, &tensors) {
        return Err(ExternalError::Nothing(said()));
    }
    Ok(Left { tensors, flaky: None, _attempt: attempt })
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CommandError {
    CommandError::Io { action, path: path.to_owned(), source }
}
