//! `runner chip measure`: this machine's GPU held to its chip's arithmetic.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{FALSIFIED, PASS, print, store_of};
use crate::compute::cuda::{
    Measured, MeasuredFunction, Trial, measure, measure_emulation, measure_functions,
    measure_reference,
};
use crate::dtype::Format;
use crate::op::Accumulate;
use crate::text::grouped;

#[derive(Args)]
pub(super) struct MeasureArgs {
    /// The formats: e4m3, bf16, f16, tf32, f32; int8, whose sums are compared before any scale.
    #[arg(long, value_delimiter = ',', default_value = "e4m3,bf16,f16")]
    formats: Vec<Format>,
    /// The type of y: f32, bf16, f16.
    #[arg(long, default_value = "f32")]
    output: Format,
    /// N,M,K of y[N, M] = x[N, K] w[M, K]^T; may be given several times.
    #[arg(long = "shape", value_parser = shape, default_values = ["16,3584,3584", "512,18944,3584"])]
    shapes: Vec<[usize; 3]>,
    /// Only the algorithm that the device arm uses, not all that are offered.
    #[arg(long)]
    chosen: bool,
    /// Not products, but the functions of one number: the special function unit's and CUDA's.
    #[arg(long, conflicts_with_all = ["formats", "output", "shapes", "chosen"])]
    functions: bool,
    /// Not the library's products, but the reference's in f64, as `--reference-on gpu` computes
    /// them: every output held to the CPU's bits.
    #[arg(long, conflicts_with_all = ["formats", "output", "shapes", "chosen", "functions"])]
    reference: bool,
    /// Not the library's products, but the emulated arm's, as `--emulated-on gpu` computes them: the
    /// arithmetic of every chip, held to the CPU's bits.
    #[arg(long, conflicts_with_all = ["formats", "output", "shapes", "chosen", "functions", "reference"])]
    emulation: bool,
    /// With --functions: compare at every so many of the 2^32 floats; 1 for all of them, and an
    /// odd number else: an even one leaves out every float that ends in a bit of 1.
    #[arg(long, default_value_t = 251, value_parser = clap::value_parser!(u32).range(1..), requires = "functions")]
    every: u32,
    /// The folder of runs, where compiled kernels are kept.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

/// N, M and K, each a multiple of 16.
fn shape(text: &str) -> Result<[usize; 3], String> {
    let numbers: Result<Vec<usize>, _> = text.split(',').map(|part| part.trim().parse()).collect();
    match numbers.as_deref() {
        Ok(&[n, m, k]) if [n, m, k].iter().all(|side| *side > 0 && side % 16 == 0) => Ok([n, m, k]),
        _ => Err("write N,M,K, each a positive multiple of 16, such as 512,18944,3584".to_owned()),
    }
}

/// Measures and prints a line per algorithm; falsified if the chosen one differs.
pub(super) fn measure_chip(args: &MeasureArgs) -> Result<u8, String> {
    let programs = store_of(&args.runs).programs();
    if args.functions {
        return measure_all_functions(args.every, &programs);
    }
    if args.reference {
        return measure_references(&programs);
    }
    if args.emulation {
        return measure_emulations(&programs);
    }
    print(
        "N,M,K                format  accumulate  output  differ of sampled  TFLOP/s  schedule; algorithm\n",
    )?;
    let mut outcome = PASS;
    for &shape in &args.shapes {
        for &operands in &args.formats {
            let kinds: &[Accumulate] = if operands.is_fp8() {
                &[Accumulate::Promoted, Accumulate::Fast]
            } else {
                &[Accumulate::Fast]
            };
            for &accumulate in kinds {
                let output = if operands == Format::Int8 { Format::F32 } else { args.output };
                let trial = Trial { operands, output, accumulate, shape };
                let all = measure(&trial, Some(&programs)).map_err(|error| error.to_string())?;
                for one in all.iter().filter(|one| one.chosen || !args.chosen) {
                    if one.chosen && one.mismatches > 0 {
                        outcome = FALSIFIED;
                    }
                    print(&line(&trial, one))?;
                }
            }
        }
    }
    Ok(outcome)
}

/// Measures and prints a line per function; falsified if a result differs.
fn measure_all_functions(every: u32, programs: &Path) -> Result<u8, String> {
    print("function             differ of compared inputs\n")?;
    let (mut outcome, mut printed) = (PASS, Ok(()));
    measure_functions(every, Some(programs), |found| {
        if found.differing > 0 {
            outcome = FALSIFIED;
        }
        if printed.is_ok() {
            printed = print(&line_of(&found)).map(|_| ());
        }
    })
    .map_err(|error| error.to_string())?;
    printed.map(|()| outcome)
}

/// N, M, K of the reference's products that are measured: odd ones, and those of a 7B model.
const REFERENCE_SHAPES: [[usize; 3]; 10] = [
    [1, 1, 1],
    [1, 5, 7],
    [3, 33, 9],
    [17, 31, 33],
    [5, 100, 1000],
    [33, 65, 3587],
    [16, 3584, 3584],
    [16, 18_944, 3584],
    [16, 3584, 18_944],
    [512, 3584, 3584],
];

/// Measures and prints a line per shape; falsified if an output differs.
fn measure_references(programs: &Path) -> Result<u8, String> {
    print("N,M,K                differ of compared  TFLOP/s  the reference's product in f64\n")?;
    let mut outcome = PASS;
    for shape in REFERENCE_SHAPES {
        let found = measure_reference(shape, Some(programs)).map_err(|error| error.to_string())?;
        if found.differing > 0 {
            outcome = FALSIFIED;
        }
        let [n, m, k] = shape;
        print(&format!(
            "{:20} {:>6} of {:<9}  {:7.2}\n",
            format!("{n},{m},{k}"),
            grouped(found.differing),
            grouped(found.compared),
            2.0 * (n * m * k) as f64 / found.seconds / 1e12
        ))?;
    }
    Ok(outcome)
}

/// Measures and prints a line per unit; falsified if an output differs.
fn measure_emulations(programs: &Path) -> Result<u8, String> {
    print("chip            x     w     per block   differ of compared   G multiply-adds/s\n")?;
    let (mut outcome, mut printed) = (PASS, Ok(()));
    measure_emulation(Some(programs), |found| {
        if found.differing > 0 {
            outcome = FALSIFIED;
        }
        if printed.is_ok() {
            printed = print(&format!(
                "{:14}  {:4}  {:4}  {:>9}  {:>7} of {:<9}  {:>17.1}\n",
                found.chip.to_string(),
                found.formats[0].name(),
                found.formats[1].name(),
                found.products,
                grouped(found.differing),
                grouped(found.compared),
                found.multiply_adds / found.seconds / 1e9
            ))
            .map(|_| ());
        }
    })
    .map_err(|error| error.to_string())?;
    printed.map(|()| outcome)
}

fn line_of(found: &MeasuredFunction) -> String {
    let example = found.first.map_or(String::new(), |first| {
        format!("; of {:e} it is {:e}, not {:e}", first.input, first.observed, first.expected)
    });
    format!(
        "{:20} {:>6} of {}{example}\n",
        found.name,
        grouped(found.differing as usize),
        grouped(found.compared as usize)
    )
}

fn line(trial: &Trial, one: &Measured) -> String {
    let [n, m, k] = trial.shape;
    let operations = 2.0 * n as f64 * m as f64 * k as f64;
    let accumulate = match trial.accumulate {
        Accumulate::Fast => "fast",
        Accumulate::Promoted => "promoted",
    };
    let found = one.identified.as_ref().map_or(String::new(), |found| format!(" [{found}]"));
    format!(
        "{:20} {:6}  {:10}  {:6}  {:>6} of {:<8}  {:7.1}  {}{}{}; {}\n",
        format!("{n},{m},{k}"),
        trial.operands,
        accumulate,
        trial.output,
        grouped(one.mismatches),
        grouped(one.sampled),
        operations / one.seconds / 1e12,
        if one.chosen { "* " } else { "" },
        one.declared,
        found,
        one.algorithm
    )
}
