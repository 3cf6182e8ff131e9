//! The keeper of one program: its parent, and that of all that it leaves behind.
//!
//! A copy of the process server, made for one program. It is a subreaper, so that whoever
//! loses its parent below it becomes its child: what has another session, another environment
//! or another name is killed as surely as the rest. It says how the program ended when
//! nothing of it lives, and then ends. Its end of a pipe tells it that the server is dead.
//!
//! It knows one program, not what it is for.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getrlimit, kill_process,
    kill_process_group, pidfd_open, set_child_subreaper, setrlimit, wait, waitpid,
};

use super::protocol::{Program, Reply};
use super::server::reply;

/// The status with which a keeper ends that has said how its program ended.
pub(super) const REPORTED: i32 = 0;
/// The status of one that could not.
const UNREPORTED: i32 = 1;

/// How often what has died meanwhile is collected.
const COLLECT: Duration = Duration::from_millis(500);
/// How often what does not die at once is killed again.
const AGAIN: Duration = Duration::from_millis(2);
/// After so long, what cannot be killed is somebody else's.
const PATIENCE: Duration = Duration::from_secs(5);

/// Starts a program and waits until it and everything that it started are dead. `lifeline`
/// becomes readable when the server is dead. Gives the status to end with.
pub(super) fn keep(id: u64, program: &Program, lifeline: &OwnedFd) -> i32 {
    let kept = set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(std::io::Error::from)
        .and_then(|()| start(program));
    let said = match kept {
        Ok((leader, watch)) => {
            if !wait_for_end(leader, &watch, lifeline) {
                kill_all(None);
                return UNREPORTED;
            }
            // Its number is not given away before it is waited for.
            let _ = kill_process_group(leader, Signal::KILL);
            ended(id, kill_all(Some(leader)))
        }
        Err(error) => Reply::Refused { id, problem: error.to_string() },
    };
    if reply(&said).is_ok() { REPORTED } else { UNREPORTED }
}

/// What became of all that a program started.
struct Killed {
    /// How the program itself ended.
    leader: Option<WaitStatus>,
    /// Whether something lives that may not be killed.
    left: bool,
}

fn ended(id: u64, killed: Killed) -> Reply {
    if killed.left {
        return Reply::Left { id };
    }
    let exit = killed.leader.and_then(|status| status.exit_status());
    let signal = killed.leader.and_then(|status| status.terminating_signal());
    Reply::Ended { id, exit, signal }
}

/// A file for what a program says, which may be a secret of the user's: nobody else reads it. It
/// keeps its mode when it becomes part of the cache.
fn for_words(path: &Path) -> std::io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn start(program: &Program) -> std::io::Result<(Pid, OwnedFd)> {
    let name = program.argv.first().map(String::as_str).unwrap_or_default();
    let mut command = Command::new(&program.file);
    command
        .arg0(name)
        .args(program.argv.iter().skip(1))
        .env_clear()
        .envs(&program.env)
        .current_dir(&program.folder)
        .stdin(Stdio::null())
        .stdout(for_words(&program.stdout)?)
        .stderr(for_words(&program.stderr)?)
        .process_group(0);
    // A child inherits the limit; this process writes no file.
    if let Some(largest) = program.largest_file {
        let maximum = getrlimit(Resource::Fsize).maximum;
        setrlimit(Resource::Fsize, Rlimit { current: Some(largest), maximum })?;
    }
    let leader = Pid::from_child(&command.spawn()?);
    Ok((leader, pidfd_open(leader, PidfdFlags::empty())?))
}

/// Waits until the program itself is dead; false if the server died before.
fn wait_for_end(leader: Pid, watch: &OwnedFd, lifeline: &OwnedFd) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: COLLECT.as_nanos() as _ };
    loop {
        let mut fds = [PollFd::new(watch, PollFlags::IN), PollFd::new(lifeline, PollFlags::IN)];
        let _ = poll(&mut fds, Some(&timeout));
        let [dead, alone] = fds.map(|fd| !fd.revents().is_empty());
        if dead || alone {
            return dead && !alone;
        }
        for pid in children().into_iter().filter(|pid| *pid != leader) {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

/// Kills children until there are none: what they leave behind becomes a child in turn.
fn kill_all(leader: Option<Pid>) -> Killed {
    let begun = Instant::now();
    let mut killed = Killed { leader: None, left: false };
    loop {
        for pid in children() {
            let _ = kill_process(pid, Signal::KILL);
        }
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if Some(pid) == leader => killed.leader = Some(status),
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) => break,
                // There is none.
                Err(_) => return killed,
            }
        }
        if begun.elapsed() > PATIENCE && children().iter().any(|pid| is_out_of_reach(*pid)) {
            killed.left = true;
            return killed;
        }
        std::thread::sleep(AGAIN);
    }
}

/// Whether a process belongs to another user: it changed its own by `sudo` or the like.
fn is_out_of_reach(pid: Pid) -> bool {
    kill_process(pid, Signal::KILL) == Err(rustix::io::Errno::PERM)
}

/// All children of this process: those that it started, and what lost its parent.
pub(super) fn children() -> Vec<Pid> {
    let pid = std::process::id();
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.unwrap_or_default();
    list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}
