//! Slurm's own programs: what they are asked, and how their answers are read.
//!
//! Each has a time in which it must answer, and a process group of its own: a Ctrl-C is for the
//! runner, which then cancels its jobs with them.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::SlurmError;
use crate::text::one_line;

/// How long an answer may take. Slurm's programs ask again by themselves for some time.
const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks at whether a program has ended.
const LOOK: Duration = Duration::from_millis(4);

/// What a program answered.
pub(super) struct Answer {
    /// Whether its status was 0.
    pub good: bool,
    pub out: String,
    /// What it said of itself, in one line.
    pub said: String,
}

/// Runs one of Slurm's programs to its end.
pub(super) fn ask(program: &str, arguments: &[String]) -> Result<Answer, SlurmError> {
    ask_holding(program, arguments, None)
}

/// The same; as long as the program lives it holds a lock, also where the runner dies meanwhile.
pub(super) fn ask_holding(
    program: &str,
    arguments: &[String],
    lock: Option<&File>,
) -> Result<Answer, SlurmError> {
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => SlurmError::NotThere(program.to_owned()),
        _ => SlurmError::Silent { program: program.to_owned(), said: error.to_string() },
    };
    // A lock is of the opened file, which the program has as its input and does not read.
    let input = match lock {
        Some(lock) => Stdio::from(lock.try_clone().map_err(failed)?),
        None => Stdio::null(),
    };
    let mut command = Command::new(program);
    // Where the runner is a job itself, what is said of that job is not of those that it submits.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("SLURM_") && !["SLURM_CONF", "SLURM_CLUSTERS"].contains(&&*text) {
            command.env_remove(&name);
        }
    }
    let mut child = command
        .args(arguments)
        // Times in UTC, and names of states as they are documented.
        .env("TZ", "UTC")
        .env("LC_ALL", "C")
        .env_remove("SBATCH_WAIT")
        .env_remove("SQUEUE_FORMAT")
        .env_remove("SQUEUE_STATES")
        .env_remove("SINFO_FORMAT")
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::Builder::new().spawn(move || {
            let mut text = Vec::new();
            if let Some(mut pipe) = pipe {
                // What was read until a failure is what there is.
                let _ = pipe.read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
    let said = read(child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
    let started = Instant::now();
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break Some(status),
            None if started.elapsed() > PATIENCE => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(LOOK),
        }
    };
    let (out, said) = (out.map_err(failed)?, said.map_err(failed)?);
    let (out, said) = (out.join().unwrap_or_default(), said.join().unwrap_or_default());
    let said = one_line(said.trim());
    match status {
        Some(status) => Ok(Answer { good: status.success(), out, said }),
        None => {
            let said = format!("no answer in {} s; {said}", PATIENCE.as_secs());
            Err(SlurmError::Silent { program: program.to_owned(), said })
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// What the cluster is set up for.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    /// Indices of an array are below it.
    pub array: usize,
    /// Jobs that the controller keeps at a time.
    pub jobs: usize,
    /// The controller's time, in seconds since 1970.
    pub now: Option<i64>,
}

pub(super) fn limits() -> Result<Limits, SlurmError> {
    let answer = ask("scontrol", &words(&["show", "config"]))?;
    if !answer.good {
        return Err(SlurmError::Silent { program: "scontrol".to_owned(), said: answer.said });
    }
    Ok(limits_in(&answer.out))
}

fn limits_in(config: &str) -> Limits {
    let number = |name: &str| {
        let line = config.lines().find(|line| line.split('=').next().map(str::trim) == Some(name));
        line?.split_once('=')?.1.trim().parse().ok()
    };
    let time = config.lines().find_map(|line| line.strip_prefix("Configuration data as of "));
    let time = time.and_then(|time| format!("{}Z", time.trim()).parse::<jiff::Timestamp>().ok());
    Limits {
        array: number("MaxArraySize").unwrap_or(1001),
        jobs: number("MaxJobCount").unwrap_or(10_000),
        now: time.map(|time| time.as_second()),
    }
}

/// A node of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub partition: String,
    pub is_default: bool,
    pub is_up: bool,
    pub cpus: usize,
    pub mebibytes: usize,
    pub features: Vec<String>,
    /// By type; a type may be empty.
    pub gpus: Vec<(String, usize)>,
    /// Minutes that a job of the partition may take; none where there is no limit.
    pub minutes: Option<usize>,
}

pub(super) fn nodes() -> Result<Vec<Node>, SlurmError> {
    let answer = ask("sinfo", &words(&["-h", "-a", "-N", "-o", "%P|%a|%c|%m|%f|%G|%l"]))?;
    if !answer.good {
        return Err(SlurmError::Silent { program: "sinfo".to_owned(), said: answer.said });
    }
    Ok(answer.out.lines().filter_map(node_in).collect())
}

fn node_in(line: &str) -> Option<Node> {
    let parts: Vec<&str> = line.split('|').collect();
    let [partition, up, cpus, memory, features, gres, limit] = parts.as_slice() else {
        return None;
    };
    let number = |text: &str| text.trim_end_matches('+').parse().unwrap_or(0);
    let gpus = gres.split(',').filter_map(|gres| {
        // `gpu:h200:8(S:0-1)`, `gpu:8`, `(null)`.
        let gres = gres.split('(').next().unwrap_or_default();
        let parts: Vec<&str> = gres.split(':').collect();
        match parts.as_slice() {
            ["gpu"] => Some((String::new(), 1)),
            ["gpu", count] => Some((String::new(), count.parse().ok()?)),
            ["gpu", kind, count] => Some(((*kind).to_owned(), count.parse().ok()?)),
            _ => None,
        }
    });
    Some(Node {
        partition: partition.trim_end_matches('*').to_owned(),
        is_default: partition.ends_with('*'),
        is_up: *up == "up",
        cpus: number(cpus),
        mebibytes: number(memory),
        features: features.split([',', '&', '|']).map(str::to_owned).collect(),
        gpus: gpus.collect(),
        minutes: minutes_in(limit),
    })
}

/// `2-00:00:00`, `1:00:00` and `30:00` in minutes; `infinite` is none.
fn minutes_in(limit: &str) -> Option<usize> {
    let (days, rest) =
        limit.split_once('-').map_or((0, limit), |(days, rest)| (days.parse().unwrap_or(0), rest));
    let parts: Option<Vec<usize>> = rest.split(':').map(|part| part.parse().ok()).collect();
    match parts?.as_slice() {
        [hours, minutes, _] => Some(days * 24 * 60 + hours * 60 + minutes),
        [minutes, _] | [minutes] => Some(*minutes),
        _ => None,
    }
}

/// A task of an array as the queue shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub job: u64,
    pub task: usize,
    pub state: String,
    pub reason: String,
    pub node: String,
}

/// All tasks of these jobs that the controller still knows, whatever their state.
pub(super) fn queue(jobs: &[u64]) -> Result<Vec<Row>, SlurmError> {
    let jobs: Vec<String> = jobs.iter().map(u64::to_string).collect();
    let format = ["-h", "-r", "-t", "all", "-o", "%F|%K|%T|%r|%B", "-j"];
    let mut arguments = words(&format);
    arguments.push(jobs.join(","));
    let answer = ask("squeue", &arguments)?;
    // The controller has forgotten them all.
    if !answer.good && answer.said.contains("Invalid job id") {
        return Ok(Vec::new());
    }
    if !answer.good {
        return Err(SlurmError::Silent { program: "squeue".to_owned(), said: answer.said });
    }
    Ok(answer.out.lines().filter_map(row_in).collect())
}

fn row_in(line: &str) -> Option<Row> {
    let parts: Vec<&str> = line.split('|').collect();
    let [job, task, state, reason, node] = parts.as_slice() else { return None };
    let node = if node.contains("n/a") { "" } else { node };
    Some(Row {
        job: job.parse().ok()?,
        task: task.parse().ok()?,
        state: (*state).to_owned(),
        reason: (*reason).to_owned(),
        node: node.to_owned(),
    })
}

/// The job of this name, if the controller knows one.
pub(super) fn job_called(name: &str) -> Result<Option<u64>, SlurmError> {
    let answer = ask("squeue", &words(&["-h", "-t", "all", "-o", "%F", "-n", name]))?;
    if !answer.good {
        return Err(SlurmError::Silent { program: "squeue".to_owned(), said: answer.said });
    }
    Ok(answer.out.lines().find_map(|line| line.trim().parse().ok()))
}

/// How many jobs and tasks the controller keeps.
pub(super) fn jobs_kept() -> Result<usize, SlurmError> {
    let answer = ask("squeue", &words(&["-h", "-r", "-t", "all", "-o", "%i"]))?;
    if !answer.good {
        return Err(SlurmError::Silent { program: "squeue".to_owned(), said: answer.said });
    }
    Ok(answer.out.lines().count())
}

/// What the controller, else the accounts, say of a task that has ended.
pub(super) fn ending(job: u64, task: usize) -> Option<(String, String)> {
    let name = format!("{job}_{task}");
    let shown = ask("scontrol", &words(&["-o", "show", "job", &name])).ok();
    let shown = shown.filter(|answer| answer.good);
    if let Some(answer) = shown {
        let field = |key: &str| {
            let mut words = answer.out.split_whitespace();
            words.find_map(|word| word.strip_prefix(key)).map(str::to_owned)
        };
        if let (Some(state), Some(exit)) = (field("JobState="), field("ExitCode=")) {
            return Some((state, exit));
        }
    }
    // There may be no database of accounts.
    let asked = words(&["-n", "-X", "-P", "-o", "State,ExitCode", "-j", &name]);
    let answer = ask("sacct", &asked).ok().filter(|answer| answer.good)?;
    let (state, exit) = answer.out.lines().last()?.split_once('|')?;
    // `CANCELLED by 1000`.
    Some((state.split(' ').next().unwrap_or_default().to_owned(), exit.trim().to_owned()))
}

/// Cancels jobs, or single tasks.
pub(super) fn cancel(names: &[String]) -> Result<(), SlurmError> {
    let answer = ask("scancel", names)?;
    // Those that have ended meanwhile are no concern.
    if answer.good || answer.said.contains("Invalid job id") {
        return Ok(());
    }
    Err(SlurmError::Silent { program: "scancel".to_owned(), said: answer.said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_slurm_are_read_as_it_prints_them() {
        let limits = limits_in(
            "Configuration data as of 2026-11-30T04:42:34\nMaxArraySize            = 1001\n\
             MaxJobCount             = 20000\n",
        );
        assert_eq!((limits.array, limits.jobs), (1001, 20000));
        assert_eq!(limits.now, Some(1_796_013_754));
        let node =
            node_in("gpu*|up|64|515000|h200,ib|gpu:h200:8(S:0-1)|2-01:30:00").expect("a node");
        assert!(node.is_default && node.is_up);
        assert_eq!(node.gpus, [("h200".to_owned(), 8)]);
        assert_eq!(node.features, ["h200", "ib"]);
        assert_eq!(node.minutes, Some(49 * 60 + 30));
        assert_eq!((minutes_in("infinite"), minutes_in("30:00")), (None, Some(30)));
        let node = node_in("cpu|down|2|2000|(null)|(null)|infinite").expect("a node");
        assert!(!node.is_up && node.gpus.is_empty());
        let row = row_in("17|3|RUNNING|None|n2").expect("a row");
        assert_eq!((row.job, row.task, row.node.as_str()), (17, 3, "n2"));
        assert_eq!(row_in("17|4|PENDING|Resources|n/a").expect("a row").node, "");
        assert_eq!(row_in("17|N/A|PENDING|Resources|n/a"), None);
    }
}
