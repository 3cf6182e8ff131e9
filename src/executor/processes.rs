//! Starts programs through the process server and waits for their whole trees.
//!
//! It knows programs, not what they are for.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{Order, Program, Reply};
use super::server::SERVER_ARGUMENT;
use crate::interrupt;
use crate::text::Shown;
use crate::text::no_threads;

/// How often a waiting job looks whether the user wants to stop.
const LOOK_UP: Duration = Duration::from_millis(50);
/// How long an order to kill may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A program to run.
#[derive(Clone, Debug)]
pub struct Request {
    /// The file to execute.
    pub file: PathBuf,
    /// Its name for itself, and its arguments.
    pub argv: Vec<String>,
    /// All the variables that it sees, but for `TMPDIR`.
    pub env: BTreeMap<String, String>,
    /// Where it works.
    pub folder: PathBuf,
    /// A folder for its temporary files, which no other attempt has: `TMPDIR`.
    pub temporary: PathBuf,
    /// The files that take its two streams.
    pub stdout: PathBuf,
    /// As `stdout`.
    pub stderr: PathBuf,
    /// After this time it is killed.
    pub timeout: Option<Duration>,
    /// Bytes that no file which it writes may exceed, its streams included.
    pub largest_file: Option<u64>,
}

/// How a program ended. Whatever it started is dead too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ended {
    /// The way.
    pub status: Status,
    /// How long it took.
    pub seconds: f64,
}

/// The way in which a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// By itself, with this exit status.
    Exited(i32),
    /// By this signal, which came from somebody else.
    Killed(i32),
    /// It ran beyond its timeout and was killed.
    TimedOut,
    /// The user asked to stop, and it was killed.
    Stopped,
}

/// Why a program did not run.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The system does not start it.
    #[error("cannot start `{}`: {problem}", file.shown())]
    Refused {
        /// The program.
        file: PathBuf,
        /// The system's words.
        problem: String,
    },
    /// Something of it could not be killed.
    #[error(
        "it started a process as another user, which it left alive and which cannot be ended from \
         here; end it, and let the program wait for what it starts"
    )]
    Left,
    /// The server does not start.
    #[error("no program can be started: {0}")]
    NoServer(String),
    /// The server is gone, and all programs with it.
    #[error("the process server ended while programs ran: {0}; run again")]
    Server(String),
}

/// Where programs are started. The server starts with the first of them, and ends
/// with this.
pub struct Processes {
    program: PathBuf,
    server: Mutex<Option<Server>>,
}

struct Server {
    child: Child,
    /// Closing it is what ends the server.
    input: Option<ChildStdin>,
    waiting: Arc<Mutex<BTreeMap<u64, Sender<Reply>>>>,
    last_id: u64,
}

impl Processes {
    /// `program` is the runner, which is also the server.
    pub fn new(program: PathBuf) -> Processes {
        Processes { program, server: Mutex::default() }
    }

    /// For this very program, which must be the runner.
    pub fn of_this_program() -> Processes {
        // The link survives an upgrade of the file under a running process.
        Processes::new(PathBuf::from("/proc/self/exe"))
    }

    /// Runs a program until it and everything that it started are dead.
    ///
    /// # Errors
    /// If it does not start, or the server was killed.
    pub fn run(&self, request: &Request) -> Result<Ended, ProcessError> {
        let started = Instant::now();
        let (id, replies) = self.start(request)?;
        // A time that no clock will show is none.
        let deadline = request.timeout.and_then(|timeout| started.checked_add(timeout));
        let mut ordered: Option<Instant> = None;
        let mut killed_for: Option<Status> = None;
        loop {
            let until = deadline.map_or(LOOK_UP, |deadline| {
                deadline.saturating_duration_since(Instant::now()).min(LOOK_UP)
            });
            match replies.recv_timeout(until) {
                Ok(Reply::Refused { problem, .. }) => {
                    let file = PathBuf::from(request.argv.first().cloned().unwrap_or_default());
                    return Err(ProcessError::Refused { file, problem });
                }
                Ok(Reply::Left { .. }) => return Err(ProcessError::Left),
                Ok(Reply::Ended { exit, signal, .. }) => {
                    let seconds = started.elapsed().as_secs_f64();
                    let by_itself = exit.map(Status::Exited).or(signal.map(Status::Killed));
                    let status = match (killed_for, by_itself) {
                        // It may have ended in the very moment.
                        (Some(reason), Some(Status::Killed(_)) | None) => reason,
                        (_, Some(status)) => status,
                        (None, None) => {
                            return Err(ProcessError::Server("it lost a status".to_owned()));
                        }
                    };
                    return Ok(Ended { status, seconds });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ProcessError::Server("it was killed".to_owned()));
                }
                Err(RecvTimeoutError::Timeout)
                    if ordered.is_some_and(|ordered| ordered.elapsed() > PATIENCE) =>
                {
                    // Its keepers see that it is gone, and kill what they keep.
                    self.end_server();
                    return Err(ProcessError::Server("it did not answer".to_owned()));
                }
                Err(RecvTimeoutError::Timeout) if killed_for.is_some() => {}
                Err(RecvTimeoutError::Timeout) => {
                    killed_for = if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        Some(Status::TimedOut)
                    } else if interrupt::requested() {
                        Some(Status::Stopped)
                    } else {
                        None
                    };
                    if killed_for.is_some() {
                        ordered = Some(Instant::now());
                        self.order(&Order::Kill { id })?;
                    }
                }
            }
        }
    }

    fn start(&self, request: &Request) -> Result<(u64, Receiver<Reply>), ProcessError> {
        let mut env = request.env.clone();
        let temporary = request.temporary.display().to_string();
        env.insert("TMPDIR".to_owned(), temporary);
        let program = Program {
            file: request.file.clone(),
            argv: request.argv.clone(),
            env,
            folder: request.folder.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            largest_file: request.largest_file,
        };
        let mut guard = locked(&self.server);
        if guard.as_mut().is_none_or(Server::is_dead) {
            *guard = None;
            let started = Server::start(&self.program);
            *guard = Some(started.map_err(|error| ProcessError::NoServer(error.to_string()))?);
        }
        let Some(server) = guard.as_mut() else {
            return Err(ProcessError::Server("it did not start".to_owned()));
        };
        server.last_id += 1;
        let id = server.last_id;
        let (sender, receiver) = channel();
        locked(&server.waiting).insert(id, sender);
        server.send(&Order::Start { id, program }).map_err(server_error)?;
        Ok((id, receiver))
    }

    /// Ends a server that does not answer; the next program starts another.
    fn end_server(&self) {
        if let Some(mut server) = locked(&self.server).take() {
            // It may have ended in this moment.
            let _ = server.child.kill();
        }
    }

    fn order(&self, order: &Order) -> Result<(), ProcessError> {
        match locked(&self.server).as_mut() {
            Some(server) => server.send(order).map_err(server_error),
            None => Ok(()),
        }
    }
}

fn server_error(error: std::io::Error) -> ProcessError {
    ProcessError::Server(error.to_string())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    fn start(program: &PathBuf) -> std::io::Result<Server> {
        let mut child = Command::new(program)
            .arg(SERVER_ARGUMENT)
            // Every program can read what its ancestors were started with.
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C at the terminal is the runner's to answer.
            .process_group(0)
            .spawn()?;
        let input = child.stdin.take();
        let waiting: Arc<Mutex<BTreeMap<u64, Sender<Reply>>>> = Arc::default();
        if let Some(output) = child.stdout.take() {
            let waiting = Arc::clone(&waiting);
            let listen = move || deliver(output, &waiting);
            if let Err(error) = std::thread::Builder::new().spawn(listen) {
                // It ends by itself when nobody speaks to it any more.
                drop(input);
                let _ = child.wait();
                return Err(std::io::Error::other(no_threads(1, &error)));
            }
        }
        Ok(Server { child, input, waiting, last_id: 0 })
    }

    fn is_dead(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    fn send(&mut self, order: &Order) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        match &mut self.input {
            Some(input) => input.write_all(&line),
            None => Err(std::io::Error::other("it was closed")),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.input = None;
        // Nobody could be told if it cannot be waited for.
        let _ = self.child.wait();
    }
}

/// Hands each reply to the job that waits for it. When the server is gone, nobody
/// is left waiting.
fn deliver(output: ChildStdout, waiting: &Mutex<BTreeMap<u64, Sender<Reply>>>) {
    for line in BufReader::new(output).lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str::<Reply>(&line) {
            Ok(reply) => {
                let (Reply::Refused { id, .. } | Reply::Ended { id, .. } | Reply::Left { id }) =
                    &reply;
                if let Some(sender) = locked(waiting).remove(id) {
                    // A job that gave up does not listen.
                    let _ = sender.send(reply);
                }
            }
            Err(error) => tracing::warn!("the process server said `{line}`: {error}"),
        }
    }
    locked(waiting).clear();
}
