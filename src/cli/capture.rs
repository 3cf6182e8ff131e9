//! `runner capture`: a pass of somebody else's engine, recorded without Python.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::print;
use crate::capture::{Pass, record};
use crate::text::{Shown, grouped};

#[derive(Subcommand)]
pub(super) enum CaptureCli {
    /// Record a pass of llama.cpp, every site of it, through its shared libraries.
    #[command(name = "llama.cpp")]
    Llama(LlamaArgs),
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  runner capture llama.cpp --model model.gguf --tokens 1,2,3 --library llama.cpp/build/bin --out capture.safetensors
  runner capture llama.cpp --model model.gguf --tokens 1,2,3 --decode 8 --gpu-layers 999 --out capture.safetensors

Which builds it can be, and what the recording is held to, stands in docs/engines.md.")]
pub(super) struct LlamaArgs {
    /// A GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// The prompt's token ids, with commas.
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    /// The recording to write: f32 [tokens, width] for each site, and the ids of the tokens.
    #[arg(long)]
    out: PathBuf,
    /// The folder of libllama.so and libggml.so; without it they are the system's.
    #[arg(long)]
    library: Option<PathBuf>,
    /// Layers that a GPU computes; 0 computes on the CPU alone.
    #[arg(long, default_value_t = 0)]
    gpu_layers: u16,
    /// How many tokens the engine goes on for, the likeliest each time. The recording has the rows
    /// of all of them but the last.
    #[arg(long, default_value_t = 1)]
    decode: usize,
    /// What keys and values are kept in.
    #[arg(long, value_enum, default_value_t = Cache::F16)]
    cache: Cache,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Cache {
    /// As llama.cpp keeps them by itself.
    F16,
    /// Without a rounding.
    F32,
}

/// A prompt and what is decoded are computed at once, and held in memory.
const LONGEST: usize = 1 << 20;

pub(super) fn capture(command: &CaptureCli) -> Result<u8, String> {
    let CaptureCli::Llama(args) = command;
    if args.tokens.len().saturating_add(args.decode) > LONGEST {
        return Err(format!("a pass has at most {LONGEST} tokens; decode fewer"));
    }
    let tokens = args.tokens.iter().map(|token| i32::try_from(*token));
    let tokens = tokens.collect::<Result<Vec<i32>, _>>();
    let pass = Pass {
        model: args.model.clone(),
        tokens: tokens.map_err(|_| "a token's id is below 2147483648".to_owned())?,
        decode: args.decode,
        gpu_layers: args.gpu_layers.into(),
        wide_cache: args.cache == Cache::F32,
        library: args.library.clone(),
    };
    let recording = record(&pass).map_err(|error| error.to_string())?;
    super::predict::put(&args.out, &recording.to_safetensors())?;
    print(&format!(
        "{} sites of {} tokens written to {}\n",
        grouped(recording.sites.len()),
        grouped(recording.ids.len()),
        args.out.shown()
    ))
}
