//! The process server: the parent of every program that the runner starts.
//!
//! It is this same program, started once with [`SERVER_ARGUMENT`], and stands
//! between the runner and the programs for three reasons. Its standard input
//! closes when the runner dies, by whatever signal, and then it kills them all. It
//! is a subreaper: a process that left its group and lost its parent becomes its
//! child instead of init's, so that "dead" can mean the whole tree. And it is
//! small, so that starting a process costs no copy of the runner's page tables.
//!
//! One thread, one loop over file descriptors. It knows nothing of stages.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getrlimit, kill_process,
    kill_process_group, pidfd_open, set_child_subreaper, setrlimit, test_kill_process_group, wait,
    waitpid,
};

use super::protocol::{Order, Program, Reply};

/// The command that makes this program a process server.
pub const SERVER_ARGUMENT: &str = "process-server";

/// How often a tree that does not die at once is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// One program and all that it started.
struct Tree {
    leader: Pid,
    /// Readable when the leader is dead; none once that was seen.
    watch: Option<OwnedFd>,
    status: Option<WaitStatus>,
    mark: Vec<u8>,
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
                match serde_json::from_slice(&line)? {
                    Order::Start { id, program } => match start(&program) {
                        Ok(tree) => {
                            trees.insert(id, tree);
                        }
                        Err(error) => reply(&Reply::Refused { id, problem: error.to_string() })?,
                    },
                    Order::Kill { id } => {
                        if let Some(tree) = trees.get(&id) {
                            kill_tree(tree, &trees);
                        }
                    }
                }
            }
        }
        for id in dead {
            if let Some(tree) = trees.get_mut(&id) {
                tree.watch = None;
                // Its number is not given away before it is waited for.
                let _ = kill_process_group(tree.leader, Signal::KILL);
            }
        }
        reap(&mut trees);
        report_ended(&mut trees)?;
    }
    kill_everything();
    Ok(())
}

/// Waits until the runner says something (the first value), a leader dies (their
/// ids), or it is time to look again after trees that are dying.
fn wait_for_news(trees: &BTreeMap<u64, Tree>) -> std::io::Result<(bool, Vec<u64>)> {
    let stdin = std::io::stdin();
    let watched: Vec<(u64, &OwnedFd)> =
        trees.iter().filter_map(|(id, tree)| Some((*id, tree.watch.as_ref()?))).collect();
    let dying = watched.len() < trees.len();
    let mut fds = vec![PollFd::new(&stdin, PollFlags::IN)];
    fds.extend(watched.iter().map(|(_, fd)| PollFd::new(*fd, PollFlags::IN)));
    let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK_AGAIN.as_nanos() as _ };
    match poll(&mut fds, dying.then_some(&timeout)) {
        Err(rustix::io::Errno::INTR) => return Ok((false, Vec::new())),
        outcome => outcome?,
    };
    let heard = !fds[0].revents().is_empty();
    let dead = fds[1..].iter().zip(&watched).filter(|(fd, _)| !fd.revents().is_empty());
    Ok((heard, dead.map(|(_, (id, _))| *id).collect()))
}

fn start(program: &Program) -> std::io::Result<Tree> {
    let name = program.argv.first().map(String::as_str).unwrap_or_default();
    let mut command = Command::new(&program.file);
    command
        .arg0(name)
        .args(program.argv.iter().skip(1))
        .env_clear()
        .envs(&program.env)
        .current_dir(&program.folder)
        .stdin(Stdio::null())
        .stdout(File::create(&program.stdout)?)
        .stderr(File::create(&program.stderr)?)
        .process_group(0);
    // A child inherits the limit; this process, which has one thread, takes it back.
    let usual = getrlimit(Resource::Fsize);
    if let Some(largest) = program.largest_file {
        setrlimit(Resource::Fsize, Rlimit { current: Some(largest), maximum: usual.maximum })?;
    }
    let child = command.spawn();
    if program.largest_file.is_some() {
        setrlimit(Resource::Fsize, usual)?;
    }
    let leader = Pid::from_child(&child?);
    let watch = pidfd_open(leader, PidfdFlags::empty())?;
    let mark = program.mark.as_bytes().to_vec();
    Ok(Tree { leader, watch: Some(watch), status: None, mark })
}

/// Collects every child that has died, and notes what became of the leaders. A
/// leader whose death was not seen yet is left until its group has been killed.
fn reap(trees: &mut BTreeMap<u64, Tree>) {
    for pid in children() {
        if trees.values().any(|tree| tree.leader == pid && tree.watch.is_some()) {
            continue;
        }
        if let Ok(Some((pid, status))) = waitpid(Some(pid), WaitOptions::NOHANG)
            && let Some(tree) = trees.values_mut().find(|tree| tree.leader == pid)
        {
            tree.status.get_or_insert(status);
        }
    }
}

/// All children of this process: the leaders, and what lost its parent.
fn children() -> Vec<Pid> {
    let pid = std::process::id();
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.unwrap_or_default();
    list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// Kills what is left of trees whose leader is dead, and reports those of which
/// nothing is left.
fn report_ended(trees: &mut BTreeMap<u64, Tree>) -> std::io::Result<()> {
    let dying: Vec<u64> =
        trees.iter().filter(|(_, tree)| tree.status.is_some()).map(|(id, _)| *id).collect();
    for id in dying {
        let tree = &trees[&id];
        let group_lives = test_kill_process_group(tree.leader).is_ok();
        if group_lives {
            let _ = kill_process_group(tree.leader, Signal::KILL);
        }
        if kill_strays(tree, trees) || group_lives {
            continue;
        }
        if let Some(tree) = trees.remove(&id) {
            let status = tree.status;
            let exit = status.and_then(|status| status.exit_status());
            let signal = status.and_then(|status| status.terminating_signal());
            reply(&Reply::Ended { id, exit, signal })?;
        }
    }
    Ok(())
}

fn kill_tree(tree: &Tree, trees: &BTreeMap<u64, Tree>) {
    let _ = kill_process_group(tree.leader, Signal::KILL);
    kill_strays(tree, trees);
}

/// Kills children that bear a tree's mark and are no leader: they left the group
/// and lost their parent. Says whether there were any.
fn kill_strays(tree: &Tree, trees: &BTreeMap<u64, Tree>) -> bool {
    let mut found = false;
    for pid in children() {
        if trees.values().any(|other| other.leader == pid) {
            continue;
        }
        let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero()));
        let environment = environment.unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|variable| variable == tree.mark) {
            let _ = kill_process(pid, Signal::KILL);
            found = true;
        }
    }
    found
}

/// After the runner's death: kills children until there are none. What they leave
/// behind becomes a child in turn.
fn kill_everything() {
    loop {
        for pid in children() {
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = kill_process(pid, Signal::KILL);
        }
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

fn reply(reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}
