//! `runner diff`: what changed from one run to another.

use std::path::PathBuf;

use clap::Args;

use super::{FALSIFIED, PASS, print, record_of};
use crate::report::{diff, diff_page, diff_text};

#[derive(Args)]
#[command(after_help = "Exit codes: 0 nothing changed, 1 something changed, 2 bad usage.

Examples:
  runner diff 20261123T021500Z-5f4fa13b latest
  runner diff RUN latest --html changes.html")]
pub(super) struct DiffArgs {
    /// The earlier run, or `latest`.
    before: String,
    /// The later run, or `latest`.
    #[arg(default_value = "latest")]
    after: String,
    /// A page to write beside the lines.
    #[arg(long)]
    html: Option<PathBuf>,
    /// The folder of runs.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

pub(super) fn changes(args: &DiffArgs) -> Result<u8, String> {
    let (_, before) = record_of(&args.before, &args.runs)?;
    let (_, after) = record_of(&args.after, &args.runs)?;
    let changes = diff(&before, &after);
    if let Some(out) = &args.html {
        let page = diff_page(&before, &after, &changes);
        crate::cache::write_whole(out, page.as_bytes()).map_err(|error| error.to_string())?;
    }
    print(&diff_text(&before, &after, &changes))?;
    Ok(if changes.is_empty() { PASS } else { FALSIFIED })
}
