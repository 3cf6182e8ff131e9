//! `runner report`: the page of a past run, anew.

use std::path::PathBuf;

use clap::Args;

use super::{print, record_of};
use crate::report::page;

#[derive(Args)]
pub(super) struct ReportArgs {
    /// The run's name, or `latest`.
    #[arg(default_value = "latest")]
    run: String,
    /// The file to write; `report.html` in the run's folder by default.
    #[arg(long)]
    out: Option<PathBuf>,
    /// The folder of runs.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

pub(super) fn report(args: &ReportArgs) -> Result<u8, String> {
    let (folder, record) = record_of(&args.run, &args.runs)?;
    let page = page(&record, &args.runs.display().to_string());
    let out = args.out.clone().unwrap_or_else(|| folder.join("report.html"));
    crate::cache::write_whole(&out, page.as_bytes()).map_err(|error| error.to_string())?;
    print(&format!("{}\n", out.display()))
}
