//! `runner report`: a past run anew, as a page or in a format that other tools read.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{print, print_bytes, record_of};
use crate::record::RunRecord;
use crate::report::{annotations, arrow, csv, junit, markdown, page, sarif};
use crate::text::Shown;

#[derive(Args)]
#[command(after_help = "Examples:
  runner report                              the page of the youngest run, in its folder
  runner report latest --format sarif > run.sarif
  runner report RUN --format csv --out measures.csv
  runner report RUN --format arrow --out measures.arrow")]
pub(super) struct ReportArgs {
    /// The run: `latest`, `previous`, `baseline`, a name, or a path.
    #[arg(default_value = "latest")]
    run: String,
    /// What to write.
    #[arg(long, value_enum, default_value_t = ReportFormat::Html)]
    format: ReportFormat,
    /// The file to write; stdout by default, and `report.html` in the run's folder for a page.
    #[arg(long)]
    out: Option<PathBuf>,
    /// The folder of runs.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReportFormat {
    /// One page for a browser, without network or server.
    Html,
    /// JUnit's XML: a suite per stage, a case per falsifier.
    Junit,
    /// SARIF 2.1.0: every breach at the manifest's line.
    Sarif,
    /// Every measure, a row per pair of streams and site.
    Csv,
    /// The same as an Arrow IPC file (Feather), for pandas and polars.
    Arrow,
    /// A table, as GitHub's step summary takes it.
    Markdown,
    /// GitHub's annotations at the manifests' lines.
    Github,
}

pub(super) fn report(args: &ReportArgs) -> Result<u8, String> {
    let (folder, record) = record_of(&args.run, &args.runs)?;
    let bytes = written(args, &record)?;
    let page = (args.format == ReportFormat::Html).then(|| folder.join("report.html"));
    match args.out.clone().or(page) {
        Some(out) => {
            crate::cache::write_whole(&out, &bytes).map_err(|error| error.to_string())?;
            print(&format!("{}\n", out.shown()))
        }
        None => print_bytes(&bytes),
    }
}

fn written(args: &ReportArgs, record: &RunRecord) -> Result<Vec<u8>, String> {
    let cannot = |error: &dyn std::fmt::Display| format!("the run cannot be encoded: {error}");
    Ok(match args.format {
        ReportFormat::Html => page(record, &args.runs.display().to_string()).into_bytes(),
        ReportFormat::Junit => junit(record).map_err(|error| cannot(&error))?.into_bytes(),
        ReportFormat::Sarif => {
            serde_json::to_vec_pretty(&sarif(record)).map_err(|error| cannot(&error))?
        }
        ReportFormat::Csv => csv(record).map_err(|error| cannot(&error))?,
        ReportFormat::Arrow => arrow(record).map_err(|error| cannot(&error))?,
        ReportFormat::Markdown => markdown(record).into_bytes(),
        ReportFormat::Github => annotations(record).into_bytes(),
    })
}
