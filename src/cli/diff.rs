//! `runner diff`: what changed from one run to another.

use std::path::{Path, PathBuf};

use clap::Args;

use super::past::{record_of, relative};
use super::{FALSIFIED, PASS, PastFormat, print};
use crate::record::RunRecord;
use crate::report::{diff, diff_json, diff_page, diff_text};
use crate::text::shown;

#[derive(Args)]
#[command(
    after_help = "A run is `latest`, `previous` (the one before, of the same stages and models on
the same machine), `baseline`, a name, or a path to a run's folder or file.

Exit codes: 0 nothing changed, 1 something changed, 2 bad usage.

Examples:
  runner diff                                  what changed since the run before
  runner diff baseline
  runner diff 20261123T021500Z-5f4fa13b latest --html changes.html
  runner diff --format json | jq '.changes[] | select(.topic == \"verdict\")'
  runner diff /net/node07/runs/RUN /net/node08/runs/RUN --all"
)]
pub(super) struct DiffArgs {
    /// The earlier run.
    #[arg(default_value = "previous")]
    before: String,
    /// The later run; the latest by default.
    after: Option<String>,
    /// List every number, those too that follow from a known cause; JSON always has all.
    #[arg(long)]
    all: bool,
    /// What is printed.
    #[arg(long, value_enum, default_value_t = PastFormat::Text)]
    format: PastFormat,
    /// A page to write beside the lines.
    #[arg(long)]
    html: Option<PathBuf>,
    /// The folder of runs.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

pub(super) fn changes(args: &DiffArgs) -> Result<u8, String> {
    let (before, after) = both(args, &args.runs)?;
    let changes = diff(&before, &after);
    if let Some(out) = &args.html {
        let page = diff_page(&before, &after, &changes);
        crate::cache::write_whole(out, page.as_bytes()).map_err(|error| error.to_string())?;
    }
    print(&match args.format {
        PastFormat::Text => diff_text(&before, &after, &changes, args.all),
        PastFormat::Json => diff_json(&before, &after, &changes),
    })?;
    Ok(if changes.is_empty() { PASS } else { FALSIFIED })
}

/// The two runs. `previous` and `baseline` are those of the later one.
fn both(args: &DiffArgs, runs: &Path) -> Result<(RunRecord, RunRecord), String> {
    let later = record_of(args.after.as_deref().unwrap_or("latest"), runs)?;
    let before = match args.before.as_str() {
        word @ ("previous" | "baseline") => relative(word, &later)?,
        name => record_of(name, runs)?.1,
    };
    let (_, after) = later;
    if args.after.is_none() && before.id == after.id {
        return Err(format!(
            "`{}` is the latest run itself; give an earlier one, or `runner diff previous`",
            shown(&before.id)
        ));
    }
    Ok((before, after))
}
