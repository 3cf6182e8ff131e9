//! `runner chip measure`: this machine's GPU held to its chip's arithmetic.

use std::path::PathBuf;

use clap::Args;

use super::{FALSIFIED, PASS, print, store_of};
use crate::compute::cuda::{Measured, Trial, measure};
use crate::dtype::Format;
use crate::op::Accumulate;
use crate::text::grouped;

#[derive(Args)]
pub(super) struct MeasureArgs {
    /// The formats: e4m3, bf16, f16, tf32, f32.
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
                let trial = Trial { operands, output: args.output, accumulate, shape };
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
