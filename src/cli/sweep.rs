//! `runner chip sweep`: a library's products of thousands of shapes, held to the plans that its own
//! records give.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{FALSIFIED, PASS, print, store_of};
use crate::compute::cuda::SweptLibrary;
use crate::compute::sweep::{Asked, Checked, Found, OrderTable, sweep, types_in_words};
use crate::dtype::Format;
use crate::terminal;
use crate::text::{Shown, grouped};

#[derive(Args)]
pub(super) struct SweepArgs {
    /// How many products.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    shapes: u32,
    /// Which shapes and operands: the same seed draws the same ones.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The formats: e4m3, bf16, f16, tf32, f32.
    #[arg(long, value_delimiter = ',', default_value = "e4m3,bf16,f16,tf32,f32", value_parser = format)]
    format: Vec<Format>,
    /// The least and the most rows of x (N), such as 1,64; without it one half of all shapes are a
    /// decoding step's.
    #[arg(long, value_parser = tokens)]
    tokens: Option<[usize; 2]>,
    /// The file to write all of it to, as JSON: what differs with its record and its outputs.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Instead of a sweep: the file to write tables to of the order in which each algorithm adds,
    /// of ones among which two large values stand (bf16, tf32 and f32).
    #[arg(long, conflicts_with_all = ["json", "shapes", "seed", "tokens"])]
    orders: Option<PathBuf>,
    /// The folder of runs, where compiled kernels are kept.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

/// A format that cuBLASLt multiplies by itself.
fn format(text: &str) -> Result<Format, String> {
    let swept = [Format::E4m3, Format::Bf16, Format::F16, Format::Tf32, Format::F32];
    swept.into_iter().find(|format| format.name() == text.trim()).ok_or_else(|| {
        let names: Vec<&str> = swept.iter().map(|format| format.name()).collect();
        format!("`{text}` is not swept over; choose of {}", names.join(", "))
    })
}

/// The least and the most rows of x.
fn tokens(text: &str) -> Result<[usize; 2], String> {
    let numbers: Result<Vec<usize>, _> = text.split(',').map(|part| part.trim().parse()).collect();
    match numbers.as_deref() {
        Ok(&[least, most]) if least > 0 && least <= most && most <= MOST_TOKENS => {
            Ok([least, most])
        }
        _ => Err(format!("write LEAST,MOST, from 1 to {MOST_TOKENS}, such as 1,64")),
    }
}

/// A sweep as a file: what was asked of whom, and what was found.
#[derive(Serialize, Deserialize)]
struct Receipt {
    /// The command's own choices.
    command: String,
    /// The GPU.
    gpu: String,
    /// The library's version.
    cublaslt: String,
    /// What was found.
    #[serde(flatten)]
    found: Found,
}

/// The most rows of x.
const MOST_TOKENS: usize = 65_536;
/// Products that differ, of which a line is printed.
const SHOWN: usize = 20;

/// Sweeps and prints a table; falsified if an output of a known plan differs.
pub(super) fn sweep_chip(args: &SweepArgs) -> Result<u8, String> {
    if args.format.contains(&Format::Int8) {
        return Err("sums of 8-bit integers are the same in any order, so that no plan decides \
                    anything; `runner chip measure --formats int8` holds a GPU's to the CPU's"
            .to_owned());
    }
    let programs = store_of(&args.runs).programs();
    let mut library = SweptLibrary::open(Some(&programs)).map_err(|error| error.to_string())?;
    if let Some(file) = &args.orders {
        return write_orders(&library, &args.format, file);
    }
    let (gpu, version) = (library.gpu(), library.version());
    let shapes = args.shapes as usize;
    let progress = |done: usize| {
        if terminal::coloured() {
            terminal::tell(&format!("\r{} of {} products", grouped(done), grouped(shapes)));
        }
    };
    let asked =
        Asked { formats: args.format.clone(), seed: args.seed, shapes, tokens: args.tokens };
    let found = sweep(&mut library, &asked, progress).map_err(|error| error.to_string())?;
    if terminal::coloured() {
        terminal::tell("\r");
    }
    print(&in_words(&found, &gpu, &version))?;
    if let Some(file) = &args.json {
        let names: Vec<&str> = args.format.iter().map(|format| format.name()).collect();
        let mut command = format!(
            "runner chip sweep --shapes {shapes} --seed {} --format {}",
            args.seed,
            names.join(",")
        );
        if let Some([least, most]) = args.tokens {
            let _ = write!(command, " --tokens {least},{most}");
        }
        write_json(file, &Receipt { command, gpu, cublaslt: version, found: found.clone() })?;
    }
    Ok(if found.differing > 0 { FALSIFIED } else { PASS })
}

fn write_orders(library: &SweptLibrary, formats: &[Format], file: &Path) -> Result<u8, String> {
    // Of narrower ones no value is large enough.
    let wide = [Format::Bf16, Format::Tf32, Format::F32];
    let mut tables: Vec<OrderTable> = Vec::new();
    for &format in formats.iter().filter(|format| wide.contains(format)) {
        tables.extend(library.tables(format).map_err(|error| error.to_string())?);
    }
    print(&format!("{} algorithms, in {}\n", grouped(tables.len()), file.shown()))?;
    write_json(file, &tables).map(|()| PASS)
}

fn write_json(file: &Path, value: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string(value).map_err(|error| error.to_string())?;
    crate::cache::write_whole(file, (text + "\n").as_bytes()).map_err(|error| error.to_string())
}

/// What was found, as a table and some lines.
fn in_words(found: &Found, gpu: &str, version: &str) -> String {
    let mut text = format!(
        "{:<22} {:<34} {:>7} {:>9} {:>8} {:>8}\n",
        "types", "algorithm", "shapes", "outputs", "differ", "no plan"
    );
    for family in &found.families {
        let _ = writeln!(
            text,
            "{:<22} {:<34} {:>7} {:>9} {:>8} {:>8}",
            family.types,
            family.algorithm,
            grouped(family.shapes),
            grouped(family.compared),
            grouped(family.differing),
            grouped(family.without_plan),
        );
    }
    let _ = writeln!(text, "\n{}", total(found, gpu, version));
    if !found.unequal.is_empty() {
        text += "\nwhat does not fit:\n";
    }
    for checked in found.unequal.iter().take(SHOWN) {
        text += &line(checked);
    }
    if let Some(more) = found.unequal.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        let _ = writeln!(text, "and {} more; `--json FILE` keeps all", grouped(more));
    }
    text
}

/// The sums, in words.
fn total(found: &Found, gpu: &str, version: &str) -> String {
    let share = 100.0 * found.equal as f64 / found.compared.max(1) as f64;
    let mut text = format!(
        "{gpu}, cuBLASLt {version}: {} products, {} of {} outputs equal to the plan ({share:.3} %), {} \
         differ, {} of records without a plan",
        grouped(found.shapes),
        grouped(found.equal),
        grouped(found.compared),
        grouped(found.differing),
        grouped(found.without_plan)
    );
    if found.not_offered > 0 {
        let _ = write!(text, "; {} products not offered", grouped(found.not_offered));
    }
    if found.without_tail > 0 {
        let _ = write!(
            text,
            "\nIn {} products the library leaves out the tail of K: a known bug of some versions; \
             use another version of cuBLAS than {version}",
            grouped(found.without_tail)
        );
    }
    text
}

fn line(checked: &Checked) -> String {
    let [n, m, k] = checked.question.shape;
    let what = match (&checked.plan, checked.without_tail) {
        (Err(why), _) => format!("no plan: {why}"),
        (Ok(_), Some(kept)) => {
            format!("the tail of K is left out: {kept} of {k} elements are added")
        }
        (Ok(plan), None) => format!(
            "{} of {} outputs are not those of {plan}",
            grouped(checked.differing),
            grouped(checked.compared)
        ),
    };
    let fits = checked.fits.as_ref().map_or(String::new(), |fits| format!(" [{fits}]"));
    let types = types_in_words(&checked.question.types);
    format!("  {n},{m},{k} {types}: {what}{fits}; {}\n", checked.record)
}
