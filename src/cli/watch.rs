//! `runner watch`: the stages run again whenever a manifest or contract changes.
//!
//! Each run is a process of its own, so that a change is met by a fresh start.
//! The folders are looked at a few times a second; they are small.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use clap::Args;

use super::PASS;
use crate::manifest::{Overrides, load};
use crate::terminal::tell_line;
use crate::text::Shown;

/// Between two looks at the folders.
const PAUSE: Duration = Duration::from_millis(300);

#[derive(Args)]
#[command(after_help = "Examples:
  runner watch stages/
  runner watch stages/ -- --select E --model model.gguf")]
pub(super) struct WatchArgs {
    /// The folder of stages.
    #[arg(default_value = "stages")]
    folder: PathBuf,
    /// What else `runner run` is given, after `--`.
    #[arg(last = true)]
    arguments: Vec<String>,
    /// Runs to make before it ends; it goes on until it is stopped by default.
    #[arg(long)]
    times: Option<u64>,
}

/// Runs until stopped: Ctrl-C ends the run that goes on, and this with it.
pub(super) fn watch(args: &WatchArgs) -> Result<u8, String> {
    let program =
        std::env::current_exe().map_err(|error| format!("cannot find itself: {error}"))?;
    let mut made = 0;
    loop {
        let seen = stamps(&args.folder)?;
        let status = Command::new(&program)
            .arg("run")
            .arg(&args.folder)
            .args(&args.arguments)
            .status()
            .map_err(|error| format!("cannot start `{}`: {error}", program.shown()))?;
        made += 1;
        if args.times == Some(made) {
            return Ok(PASS);
        }
        let code = status.code().map_or("a signal".to_owned(), |code| format!("exit code {code}"));
        tell_line(&format!("ended with {code}; waiting for a change in `{}`", args.folder.shown()));
        while stamps(&args.folder)? == seen {
            std::thread::sleep(PAUSE);
        }
    }
}

/// Every manifest and contract with what tells that it changed.
fn stamps(folder: &Path) -> Result<BTreeMap<PathBuf, (Option<SystemTime>, u64)>, String> {
    // Where the contracts lie is for the manifests to say, if they can be read.
    let pipeline = load(folder, &Overrides::default()).ok();
    let files = pipeline.iter().flat_map(|pipeline| pipeline.contracts.values());
    let mut folders: BTreeMap<PathBuf, bool> =
        files.filter_map(|contract| Some((contract.file.parent()?.to_owned(), false))).collect();
    let beside = folder.parent().map_or_else(PathBuf::new, Path::to_owned).join("contracts");
    folders.insert(beside, false);
    folders.insert(folder.to_owned(), true);
    let mut all = BTreeMap::new();
    for (folder, needed) in &folders {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if *needed => {
                return Err(format!("cannot read `{}`: {error}", folder.shown()));
            }
            Err(_) => continue,
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|extension| extension == "toml") {
                // A file that goes away while it is looked at has changed.
                let facts = path.metadata().ok();
                let facts = facts.map_or((None, 0), |facts| (facts.modified().ok(), facts.len()));
                all.insert(path, facts);
            }
        }
    }
    Ok(all)
}
