//! `runner chip`: the command line of `chip_command`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::measure::{MeasureArgs, measure_chip};
use super::sweep::{SweepArgs, sweep_chip};
use super::{FALSIFIED, PASS};
use crate::block_format::OperandFormat;
use crate::chip_command::{self, ChipCommand, ChipOutcome, Multiply, MultiplyOperand, TensorRef};
use crate::compute::emulated::schedule::Schedule;
use crate::dtype::Format;
use crate::judge::operands::Source;
use crate::op::{Accumulate, ChipName};

#[derive(Subcommand)]
pub(super) enum ChipCli {
    /// List the chips, their formats and their arithmetic.
    List,
    /// Check the chips against what real ones answered: vectors of single instructions, captured GEMMs.
    Verify {
        /// A folder: one safetensors file of vectors per chip, captures list their `cases`. Without
        /// it, the set that ships with the runner is checked.
        folder: Option<PathBuf>,
    },
    /// Print the licence of the hardware vectors that ship with the runner.
    Licence,
    /// Multiply two tensors as a chip does: y[N, M] = x[N, K] w[M, K]^T.
    Multiply(MultiplyArgs),
    /// Hold this machine's GPU to its chip's arithmetic, algorithm by algorithm.
    Measure(MeasureArgs),
    /// Hold the library's own choices to their plans, over thousands of shapes on this machine's GPU.
    Sweep(SweepArgs),
}

#[derive(Args)]
pub(super) struct MultiplyArgs {
    /// x as FILE or FILE:TENSOR: safetensors, NumPy, GGUF.
    #[arg(value_parser = tensor_ref)]
    x: TensorRef,
    /// w as FILE or FILE:TENSOR.
    #[arg(value_parser = tensor_ref)]
    w: TensorRef,
    /// The format of x; its own by default. Values are converted to it. Block-scaled: mxfp8, mxfp8-e5m2,
    /// mxfp6-e2m3, mxfp6-e3m2, mxfp4, nvfp4.
    #[arg(long)]
    x_format: Option<OperandFormat>,
    /// The format of w; its own by default.
    #[arg(long)]
    w_format: Option<OperandFormat>,
    /// A scale for each row of x, in f32. Where x holds codes of a block-scaled format: the codes of the scales of
    /// its blocks, [rows, blocks], a byte each; x's own of 4 bits stand two in a byte, the first in the lower half.
    #[arg(long, value_parser = tensor_ref)]
    x_scales: Option<TensorRef>,
    /// The scales of w's rows or blocks, likewise.
    #[arg(long, value_parser = tensor_ref)]
    w_scales: Option<TensorRef>,
    /// The scale of x; of a block-scaled format that of all of x, beside those of its blocks.
    #[arg(long)]
    x_scale: Option<f32>,
    /// The scale of w.
    #[arg(long)]
    w_scale: Option<f32>,
    /// Whose arithmetic: a chip of `runner chip list`.
    #[arg(long, default_value = "hopper", value_parser = chip_name)]
    chip: ChipName,
    /// Carry the tensor core's accumulator all along K, instead of promoting it.
    #[arg(long)]
    fast: bool,
    /// Parts that K is cut into.
    #[arg(long, default_value = "1")]
    split_k: u32,
    /// The type of y: f32, bf16, f16.
    #[arg(long, default_value = "f32")]
    output: Format,
    /// Where it is computed. Any GPU gives the chip's bits, and a sample of them is held to the CPU's.
    #[arg(long, value_enum, default_value_t = MultiplyPlace::Cpu)]
    on: MultiplyPlace,
    /// Gone: `runner judge` says which schedule outputs have.
    #[arg(long, hide = true)]
    observed: Option<String>,
    /// The file to write y to.
    #[arg(long)]
    save: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MultiplyPlace {
    /// On all cores.
    Cpu,
    /// On this machine's first GPU, which need not be the chip.
    Gpu,
}

fn tensor_ref(text: &str) -> Result<TensorRef, String> {
    let Source { file, tensor, .. } = Source::parse(text).map_err(|error| error.to_string())?;
    Ok(TensorRef { file, tensor })
}

pub(super) fn chip_name(text: &str) -> Result<ChipName, String> {
    ChipName::ALL.into_iter().find(|chip| chip.name() == text).ok_or_else(|| {
        let known: Vec<&str> = ChipName::ALL.iter().map(|chip| chip.name()).collect();
        format!("no chip is called `{text}`; known: {}", known.join(", "))
    })
}

pub(super) fn chip(command: ChipCli) -> Result<u8, String> {
    let command = match command {
        ChipCli::List => ChipCommand::List,
        ChipCli::Measure(args) => return measure_chip(&args),
        ChipCli::Sweep(args) => return sweep_chip(&args),
        ChipCli::Verify { folder } => ChipCommand::Verify { folder },
        ChipCli::Licence => ChipCommand::Licence,
        ChipCli::Multiply(args) => {
            if let Some(observed) = &args.observed {
                return Err(format!(
                    "`--observed` is gone: `runner judge X W {observed}` says whether these are \
                     the bits of a chip, by which schedule, and what is wrong where they are not"
                ));
            }
            let accumulate = if args.fast { Accumulate::Fast } else { Accumulate::Promoted };
            let schedule = Schedule { accumulate, split_k: args.split_k, ..Schedule::PROMOTED };
            let operand =
                |source, format, scales, scale| MultiplyOperand { source, format, scales, scale };
            ChipCommand::Multiply(Box::new(Multiply {
                x: operand(args.x, args.x_format, args.x_scales, args.x_scale),
                w: operand(args.w, args.w_format, args.w_scales, args.w_scale),
                chip: args.chip,
                schedule,
                output: args.output,
                on_gpu: args.on == MultiplyPlace::Gpu,
                save: args.save,
            }))
        }
    };
    let outcome = chip_command::run(&command, &mut std::io::stdout().lock());
    match outcome.map_err(|error| error.to_string())? {
        ChipOutcome::Pass => Ok(PASS),
        ChipOutcome::Falsified => Ok(FALSIFIED),
    }
}
