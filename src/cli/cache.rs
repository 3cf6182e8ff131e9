//! `runner cache`: what the cache holds, whether it is sound, and what may go.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{FALSIFIED, PASS, keep, print, record_of, stamps_of, store_of};
use crate::cache::{Budget, Held, LARGEST_SENT, Remote, RemoteBudget, RemoteOptions, Spare};
use crate::manifest::problem::plural;
use crate::nightly::retention::PINNED;
use crate::record::RunRecord;
use crate::terminal::tell_line;
use crate::text::{Shown, size};

#[derive(Args)]
pub(super) struct CacheArgs {
    #[command(subcommand)]
    command: CacheCommand,
    /// The folder of runs, with the cache.
    #[arg(long, default_value = "runs", global = true)]
    runs: PathBuf,
}

#[derive(Subcommand)]
enum CacheCommand {
    /// List the results that are kept, the last used first.
    Ls,
    /// Read everything and name what is damaged; that is moved aside.
    Verify,
    /// Remove the results that were not used for longest.
    Gc {
        /// The most that may stay, as `20GiB` or in bytes; 20 GiB of this machine's cache where
        /// nothing is said.
        #[arg(long, value_parser = bytes)]
        budget: Option<u64>,
        /// Of a shared cache: results that were last written so many days ago go.
        #[arg(long, value_name = "DAYS", requires = "cache")]
        older: Option<u64>,
        /// A shared cache to clear instead of this machine's, as `s3://BUCKET/PATH`.
        #[arg(long, value_name = "URL")]
        cache: Option<String>,
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Send this machine's results to a shared cache, as far as it lacks them.
    Push {
        /// It, as `s3://BUCKET/PATH`.
        #[arg(long, value_name = "URL")]
        cache: String,
        /// Send commands' results too, with what the programs printed.
        #[arg(long)]
        commands: bool,
    },
    /// Keep the results of a run, whatever `gc` is told.
    Pin {
        /// The run: `latest`, `previous`, `baseline`, a name, or a path.
        run: String,
    },
    /// Keep them no longer.
    Unpin {
        /// The run: `latest`, `previous`, `baseline`, a name, or a path.
        run: String,
    },
    /// Print files' blake3 hashes, as `b3sum` does; unchanged files are not read.
    Digest {
        /// The files.
        files: Vec<PathBuf>,
        /// Read them although they are unchanged.
        #[arg(long)]
        rehash: bool,
    },
}

pub(super) fn cache(CacheArgs { command, runs }: &CacheArgs) -> Result<u8, String> {
    let store = store_of(runs);
    let failed = |error: crate::cache::CacheError| error.to_string();
    match command {
        CacheCommand::Ls => {
            let (held, spare) = (store.held().map_err(failed)?, store.spare().map_err(failed)?);
            print(&list(&held, &spare))
        }
        CacheCommand::Verify => {
            let health = store.verify().map_err(failed)?;
            let mut text = String::new();
            for (path, problem) in &health.damaged {
                text += &format!("damaged: `{}`: {problem}; moved aside\n", path.shown());
            }
            if health.lines > 0 {
                text += &format!(
                    "warning: {} of `latest.log` damaged; nobody believes them, and no result is lost\n",
                    plural(health.lines, "line")
                );
            }
            let (actions, objects, models) = (health.actions, health.objects, health.models);
            text += &format!("{actions} actions and {objects} objects are sound, ");
            text += &size(health.bytes);
            if models > 0 {
                text += &format!("; {} as made", plural(models, "generated model"));
            }
            print(&(text + "\n"))?;
            Ok(if health.is_sound() { PASS } else { FALSIFIED })
        }
        CacheCommand::Gc { budget, older, cache: Some(url), dry_run } => {
            if budget.is_none() && older.is_none() {
                return Err(
                    "say what may stay: `--budget 500GiB`, `--older 90`, or both".to_owned()
                );
            }
            let older = older.map(|days| Duration::from_secs(days.saturating_mul(24 * 3600)));
            let remote = shared(url, *dry_run, false)?;
            let budget = RemoteBudget { bytes: *budget, older, dry_run: *dry_run };
            let cleared = remote.clear(&store, &budget).map_err(|error| error.to_string())?;
            let verb = if *dry_run { "would remove" } else { "removed" };
            print(&format!(
                "{verb} {} and {}, {}; {} stay\n",
                plural(cleared.actions, "action"),
                plural(cleared.objects, "object"),
                size(cleared.freed),
                size(cleared.left)
            ))
        }
        CacheCommand::Push { cache, commands } => {
            let remote = Arc::new(shared(cache, false, *commands)?);
            let report = remote.push(&store).map_err(failed)?;
            for problem in &report.problems {
                tell_line(&format!("warning: {problem}"));
            }
            let results = plural(report.sent, "result");
            print(&format!("{results} there now, {} sent\n", size(report.sent_bytes)))?;
            Ok(if report.problems.is_empty() { PASS } else { FALSIFIED })
        }
        CacheCommand::Gc { budget, dry_run, .. } => {
            let pinned = pinned_objects(runs)?;
            let bytes = budget.unwrap_or(20 << 30);
            let budget = Budget { bytes, pinned, dry_run: *dry_run };
            let cleared = store.clear(&budget).map_err(failed)?;
            let cleared = cleared
                .ok_or("a run uses the cache now, so nothing was removed; try again after it")?;
            let verb = if *dry_run { "would remove" } else { "removed" };
            print(&format!(
                "{verb} {} actions and {} files, {}; {} stay\n",
                cleared.actions,
                cleared.files,
                size(cleared.freed),
                size(cleared.left)
            ))
        }
        CacheCommand::Pin { run } => {
            let mark = mark_of(runs, run)?;
            std::fs::write(&mark, "")
                .map_err(|e| format!("cannot write `{}`: {e}", mark.shown()))?;
            print("pinned\n")
        }
        CacheCommand::Unpin { run } => {
            let mark = mark_of(runs, run)?;
            if mark.exists() {
                std::fs::remove_file(&mark)
                    .map_err(|e| format!("cannot remove `{}`: {e}", mark.shown()))?;
            }
            print("not pinned\n")
        }
        CacheCommand::Digest { files, rehash } => {
            let stamps = stamps_of(runs, *rehash);
            let mut text = String::new();
            for file in files {
                let digest = stamps.digest(file);
                let digest = digest.map_err(|e| format!("cannot read `{}`: {e}", file.shown()))?;
                text += &format!("{digest}  {}\n", file.shown());
            }
            keep(&stamps);
            print(&text)
        }
    }
}

fn list(all: &[Held], spare: &[Spare]) -> String {
    let mut text = String::new();
    for Held { action, size: bytes, .. } in all {
        let field = |name: &str| {
            let found = action.fields.iter().find(|(known, _)| known == name);
            found.map_or("", |(_, value)| value.as_str())
        };
        let what = [field("kind"), field("arm"), field("op"), field("argv")].join(" ");
        let what: String = what.split_whitespace().collect::<Vec<_>>().join(" ");
        let what: String = what.chars().take(80).collect();
        let (key, created) = (&action.key.0[..8], &action.created);
        text += &format!("{key}  {:>10}  {created}  {what}\n", size(*bytes));
    }
    text += &format!("{} results\n", all.len());
    if !spare.is_empty() {
        let bytes = spare.iter().map(|spare| spare.size).sum();
        text += &format!(
            "{} files that a run makes again, such as generated models, {}\n",
            spare.len(),
            size(bytes)
        );
    }
    text
}

/// A cache of many machines, which must answer.
fn shared(url: &str, read_only: bool, commands: bool) -> Result<Remote, String> {
    let options = RemoteOptions {
        url: url.to_owned(),
        read_only,
        anonymous: false,
        largest: LARGEST_SENT,
        commands,
        runs: false,
    };
    Remote::reached(&options).map_err(|error| error.to_string())
}

/// Everything that pinned runs name.
fn pinned_objects(runs: &Path) -> Result<BTreeSet<String>, String> {
    let mut pinned = BTreeSet::new();
    let Ok(entries) = std::fs::read_dir(runs) else { return Ok(pinned) };
    for folder in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        if !folder.join(PINNED).exists() {
            continue;
        }
        // A pinned run that cannot be read would lose its results: that is an error.
        let record = RunRecord::read(&folder).map_err(|error| error.to_string())?;
        for arm in record.stages.iter().flat_map(|stage| stage.arms.values()) {
            pinned.extend(arm.object.clone());
            if let Some(command) = &arm.command {
                pinned.extend(command.stdout.iter().chain(&command.stderr).cloned());
                pinned.extend(command.outputs.iter().map(|output| output.blake3.clone()));
            }
        }
    }
    Ok(pinned)
}

fn mark_of(runs: &Path, run: &str) -> Result<PathBuf, String> {
    let (folder, _) = record_of(run, runs)?;
    Ok(folder.join(PINNED))
}

/// `20GiB`, `500 MB` or a number of bytes.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let scale: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" | "k" => 1024.0,
        "mib" | "m" => 1048576.0,
        "gib" | "g" => 1073741824.0,
        "tib" | "t" => 1099511627776.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(format!("`{}` is no unit; write B, KiB, MiB, GiB or TiB", unit.trim())),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is no size; write `20GiB`"))?;
    Ok((number * scale) as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;
    use crate::text::size;

    #[test]
    fn sizes_are_read_and_written() {
        assert_eq!(bytes("20GiB"), Ok(20 << 30));
        assert_eq!(bytes("1.5 kb"), Ok(1500));
        assert_eq!(bytes("7"), Ok(7));
        assert!(bytes("7 apples").is_err() && bytes("GiB").is_err());
        assert_eq!((size(512).as_str(), size(3 << 30).as_str()), ("512 B", "3.0 GiB"));
    }
}
