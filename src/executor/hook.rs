//! What a user wants to be called at the end of a run: one shell line, with a text as its input
//! and a time after which it is ended.
//!
//! It is no stage: it has the runner's own variables, and may leave something running on purpose.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The process group of the one that is under way; 0 where there is none.
static UNDER_WAY: AtomicI32 = AtomicI32::new(0);

/// Ends the one that is under way, with all of its process group.
pub fn end() {
    end_group(UNDER_WAY.swap(0, Ordering::Relaxed));
}

fn end_group(group: i32) {
    if group > 0 {
        // It may just have ended by itself.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
}

/// Between two looks at whether it has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Runs a line for `sh -c` with `input` and more variables. What it prints goes to stderr: stdout
/// may be for another program.
///
/// # Errors
/// In words, if it cannot be started, ends with another status than 0, or has not ended after
/// `limit`; then it and all of its process group are killed.
pub fn call(
    line: &str,
    input: &[u8],
    variables: &[(&str, &str)],
    limit: Duration,
) -> Result<(), String> {
    let cannot = |error: &dyn std::fmt::Display| format!("`{line}`: {error}");
    let mut child = Command::new("/bin/sh")
        .args(["-c", line])
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(std::io::stderr())
        .process_group(0)
        .spawn()
        .map_err(|error| cannot(&error))?;
    let group = i32::try_from(child.id()).unwrap_or(0);
    UNDER_WAY.store(group, Ordering::Relaxed);
    let ended = waited_for(&mut child, input, limit);
    UNDER_WAY.store(0, Ordering::Relaxed);
    match ended {
        // What it left running on purpose is its own affair.
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(cannot(&status)),
        unended => {
            end_group(group);
            let _ = child.wait();
            let too_long = || format!("not ended after {} s, and was killed", limit.as_secs_f64());
            Err(cannot(&unended.err().unwrap_or_else(too_long)))
        }
    }
}

/// Hands over the input, and waits; nothing where the time is over before.
fn waited_for(
    child: &mut Child,
    input: &[u8],
    limit: Duration,
) -> Result<Option<ExitStatus>, String> {
    if let Some(mut pipe) = child.stdin.take() {
        let input = input.to_owned();
        // It may read nothing for long, and need not read at all.
        let written = std::thread::Builder::new().spawn(move || pipe.write_all(&input));
        written.map_err(|error| crate::text::no_threads(1, &error))?;
    }
    let started = Instant::now();
    loop {
        match child.try_wait().map_err(|error| error.to_string())? {
            None if started.elapsed() < limit => std::thread::sleep(LOOK),
            status => return Ok(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_hook_gets_its_input_and_its_variables() {
        let line = "test \"$(cat)\" = told && test \"$WHO\" = me";
        assert_eq!(call(line, b"told", &[("WHO", "me")], LONG), Ok(()));
        assert_eq!(call("exit 3", b"", &[], LONG), Err("`exit 3`: exit status: 3".to_owned()));
    }

    #[test]
    fn a_hook_that_reads_nothing_of_a_long_input_is_no_failure() {
        assert_eq!(call("true", &vec![b'x'; 1 << 20], &[], LONG), Ok(()));
    }

    #[test]
    fn a_hook_that_does_not_end_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().expect("a folder");
        let line = format!("cd {}; (sleep 2; echo > late) & sleep 60", folder.path().display());
        let started = Instant::now();
        let said = call(&line, b"", &[], Duration::from_millis(300)).expect_err("it never ends");
        assert!(said.ends_with("not ended after 0.3 s, and was killed"), "{said}");
        assert!(started.elapsed() < LONG);
        std::thread::sleep(Duration::from_secs(3));
        assert!(!folder.path().join("late").exists());
    }
}
