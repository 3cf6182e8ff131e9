//! The process server: the ancestor of every program that the runner starts.
//!
//! It is this same program, started once with [`SERVER_ARGUMENT`], and stands between the
//! runner and the programs for three reasons. Its standard input closes when the runner dies,
//! by whatever signal, and then it kills them all. It is a subreaper: a process that lost its
//! parent becomes its child instead of init's. And it is small, so that a copy of it costs
//! little.
//!
//! Each program has such a copy as its parent, its *keeper* ([`super::keeper`]), a subreaper
//! too: all that the program starts stays below the keeper, whatever sessions and variables
//! it gives itself, and is dead before the keeper says that the program has ended. Where a
//! keeper itself was killed, its children become the server's: a child of the server that is
//! no keeper is what somebody left behind, and is killed.
//!
//! One thread, one loop over file descriptors. It knows nothing of stages.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, kill_process_group, pidfd_open,
    set_child_subreaper, wait, waitpid,
};

use super::keeper::{self, REPORTED};
use super::protocol::{Order, Program, Reply};

/// The command that makes this program a process server.
pub const SERVER_ARGUMENT: &str = "process-server";

/// How often what does not die at once is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How often keepers are told to go on, if one of their programs has stopped them.
const WAKE: Duration = Duration::from_millis(500);

/// One program and all that it started.
struct Tree {
    keeper: Pid,
    /// Readable when the keeper is dead.
    watch: OwnedFd,
    /// Its other end closes when this process dies, and the keeper kills its tree.
    _lifeline: OwnedFd,
    /// The keeper was killed: what it kept is killed here.
    orphaned: bool,
}

/// Serves until the runner closes the other end; returns when nothing is left.
pub fn serve() -> std::io::Result<()> {
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut trees: BTreeMap<u64, Tree> = BTreeMap::new();
    let input = std::io::stdin();
    let mut pending: Vec<u8> = Vec::new();
    loop {
        let (heard, dead) = wait_for_news(&trees)?;
        if heard {
            let mut chunk = [0; 64 << 10];
            // Not through `Stdin`, which would keep in its buffer what `poll` does not see.
            let count = rustix::io::read(&input, &mut chunk)?;
            if count == 0 {
                break;
            }
            pending.extend_from_slice(&chunk[..count]);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                obey(serde_json::from_slice(&line)?, &mut trees)?;
            }
        }
        for id in dead {
            bury(id, &mut trees)?;
        }
        end_orphaned(&mut trees)?;
    }
    kill_everything();
    Ok(())
}

fn obey(order: Order, trees: &mut BTreeMap<u64, Tree>) -> std::io::Result<()> {
    match order {
        Order::Start { id, program } => match start(id, &program, trees) {
            Ok(tree) => {
                trees.insert(id, tree);
                Ok(())
            }
            Err(error) => reply(&Reply::Refused { id, problem: error.to_string() }),
        },
        Order::Kill { id } => {
            if let Some(tree) = trees.get(&id) {
                // What it kept becomes a child of this process.
                let _ = kill_process(tree.keeper, Signal::KILL);
            }
            Ok(())
        }
    }
}

/// Waits until the runner says something (the first value), a keeper dies (their ids), or it
/// is time to look again.
fn wait_for_news(trees: &BTreeMap<u64, Tree>) -> std::io::Result<(bool, Vec<u64>)> {
    let stdin = std::io::stdin();
    let watched: Vec<(u64, &OwnedFd)> = trees
        .iter()
        .filter(|(_, tree)| !tree.orphaned)
        .map(|(id, tree)| (*id, &tree.watch))
        .collect();
    let mut fds = vec![PollFd::new(&stdin, PollFlags::IN)];
    fds.extend(watched.iter().map(|(_, fd)| PollFd::new(*fd, PollFlags::IN)));
    let dying = watched.len() < trees.len();
    let pause = if dying { LOOK_AGAIN } else { WAKE };
    let timeout = Timespec { tv_sec: 0, tv_nsec: pause.as_nanos() as _ };
    match poll(&mut fds, (!trees.is_empty()).then_some(&timeout)) {
        Err(rustix::io::Errno::INTR) => return Ok((false, Vec::new())),
        Ok(0) => trees.values().filter(|tree| !tree.orphaned).for_each(|tree| {
            let _ = kill_process(tree.keeper, Signal::CONT);
        }),
        outcome => drop(outcome?),
    }
    let heard = !fds[0].revents().is_empty();
    let dead = fds[1..].iter().zip(&watched).filter(|(fd, _)| !fd.revents().is_empty());
    Ok((heard, dead.map(|(_, (id, _))| *id).collect()))
}

/// Starts a keeper, which starts the program.
fn start(id: u64, program: &Program, trees: &mut BTreeMap<u64, Tree>) -> std::io::Result<Tree> {
    let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread, so that its copy may do whatever it could itself.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            drop(ours);
            // The lifelines of others must not hang on this copy.
            trees.clear();
            let code = keeper::keep(id, program, &theirs);
            // SAFETY: nothing that would have to be done at the end is this copy's to do.
            unsafe { nix::libc::_exit(code) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let keeper = Pid::from_raw(child.as_raw()).ok_or(std::io::ErrorKind::Other)?;
            let watch = pidfd_open(keeper, PidfdFlags::empty())?;
            Ok(Tree { keeper, watch, _lifeline: ours, orphaned: false })
        }
    }
}

/// Collects a dead keeper. One that was killed before it said how its program ended leaves
/// its children to this process.
fn bury(id: u64, trees: &mut BTreeMap<u64, Tree>) -> std::io::Result<()> {
    let Some(tree) = trees.get_mut(&id) else { return Ok(()) };
    let ended = waitpid(Some(tree.keeper), WaitOptions::NOHANG)?;
    let status = ended.and_then(|(_, status)| status.exit_status());
    if status == Some(REPORTED) {
        trees.remove(&id);
    } else {
        tree.orphaned = true;
    }
    Ok(())
}

/// Kills what killed keepers have left, and says of their programs that they were killed
/// when nothing of it lives.
fn end_orphaned(trees: &mut BTreeMap<u64, Tree>) -> std::io::Result<()> {
    let orphaned: Vec<u64> =
        trees.iter().filter(|(_, tree)| tree.orphaned).map(|(id, _)| *id).collect();
    if orphaned.is_empty() || kill_strays(trees) {
        return Ok(());
    }
    for id in orphaned {
        trees.remove(&id);
        reply(&Reply::Ended { id, exit: None, signal: Some(Signal::KILL.as_raw()) })?;
    }
    Ok(())
}

/// Kills the children that are no keepers; says whether there were any.
fn kill_strays(trees: &BTreeMap<u64, Tree>) -> bool {
    let mut found = false;
    for pid in keeper::children() {
        if trees.values().any(|tree| tree.keeper == pid && !tree.orphaned) {
            continue;
        }
        let _ = kill_process_group(pid, Signal::KILL);
        // What belongs to another user stays, whoever waits for it.
        found |= kill_process(pid, Signal::KILL) != Err(rustix::io::Errno::PERM);
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
    found
}

/// After the runner's death: kills children until there are none. What they leave
/// behind becomes a child in turn.
fn kill_everything() {
    loop {
        for pid in keeper::children() {
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = kill_process(pid, Signal::KILL);
        }
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Says something to the runner, in one piece: keepers speak through the same pipe.
pub(super) fn reply(reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}
