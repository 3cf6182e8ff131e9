//! `runner predict`: what an engine answers to a prompt, computed without that engine and without
//! its GPU, from the model's file and the engine's kernels.

use std::path::{Path, PathBuf};

use clap::Args;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::{ChatArgs, print, store_of};
use crate::cache::Stamps;
use crate::compute::ComputeError;
use crate::compute::emulated::arm::Emulated;
use crate::compute::forward::{KvCache, Sites, forward};
use crate::dtype::Format;
use crate::engine::EngineFile;
use crate::manifest::Prompt;
use crate::op::{Recipe, Site};
use crate::plan::{encoded, open_model};
use crate::tensor::Tensor;
use crate::text::{Shown, grouped};

/// Tokens that are printed of a position.
const SHOWN: usize = 5;

#[derive(Args)]
#[command(after_help = "\
Examples:
  runner predict --engine vllm-fp8-block --model FOLDER --tokens 313,503,39 --decode 8
  runner predict --engine engines/mine.toml --model model.gguf --prompt \"The capital of France is\" \\
      --out logits.safetensors

What it rests on stands in docs/engines.md. Where an engine's file lists several kernels for an op the first
one is taken: save what `runner identify` prints of a recording of yours, and name that file.")]
pub(super) struct PredictArgs {
    /// An engine that ships, or an engine's file.
    #[arg(long)]
    engine: String,
    /// A GGUF file, a Hugging Face folder, or `synthetic:NAME`.
    #[arg(long)]
    model: String,
    /// The prompt's token ids, with commas.
    #[arg(long, value_delimiter = ',', required_unless_present = "prompt")]
    tokens: Vec<u32>,
    /// The prompt as text.
    #[arg(long, conflicts_with = "tokens")]
    prompt: Option<String>,
    #[command(flatten)]
    chat: ChatArgs,
    /// The type in which the engine passes tensors from op to op, where it is not its file's: bf16, f16, f32.
    #[arg(long)]
    stream: Option<Format>,
    /// How many tokens the engine goes on for, the likeliest each time.
    #[arg(long, default_value_t = 0)]
    decode: usize,
    /// How many prompts of this length each step of the engine holds.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Where to write the logits, f32 [positions, vocabulary], and the ids of the tokens.
    #[arg(long)]
    out: Option<PathBuf>,
    /// The folder of runs, where generated models are kept.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
}

pub(super) fn predict(args: &PredictArgs) -> Result<u8, String> {
    let file = EngineFile::find(&args.engine, Path::new("."))?;
    let (mut kernels, stream) = file.known()?;
    let stream = args.stream.unwrap_or(stream);
    if let Some(problem) = kernels.stream_problem(stream) {
        return Err(format!("of the engine `{}`: {problem}; leave --stream out", file.name));
    }
    if args.batch > 1 && kernels.is_ggml() {
        return Err("batches of llama.cpp are not known: leave --batch out".to_owned());
    }
    let store = store_of(&args.runs);
    let open = open_model(&args.model, 0, &store, &Stamps::forgetful())?;
    let model = &open.model;
    let vocabulary = model.config().vocabulary;
    let prompt = match &args.prompt {
        Some(text) => {
            let chat = args.chat.chat.unwrap_or(false);
            Prompt::of_text(text.clone(), chat, args.chat.system.clone())
        }
        None => Prompt::Tokens(args.tokens.clone()),
    };
    // The last token is only sampled, as engines do.
    let mut tokens = encoded(&prompt, args.decode.saturating_sub(1), model)?;
    let given = tokens.len();
    kernels.batch = args.batch as usize;
    let recipe = Recipe::of_engine(kernels, stream);
    let arm = Emulated::new(&recipe).map_err(|error| error.to_string())?;
    let words = |error: ComputeError| error.to_string();
    let mut cache = KvCache::new(model.config(), None);
    let mut logits = forward(model, &arm, &tokens, &mut cache, &mut Nothing).map_err(words)?;
    let mut all = logits.data().to_vec();
    let mut report = String::new();
    loop {
        let row = logits.row(logits.rows() - 1);
        let position = tokens.len() - 1;
        if let Some(place) = row.iter().position(|logit| logit.is_nan()) {
            print(&report)?;
            return Err(format!(
                "the logit of token {place} after position {position} is NaN: the engine's kernels make \
                 that of this model, and no token follows"
            ));
        }
        let best = largest(row, SHOWN);
        let listed: Vec<String> =
            best.iter().map(|&token| format!("{token} ({})", row[token])).collect();
        report += &format!(
            "after token {} at position {position}: {}\n",
            tokens[position],
            listed.join(", ")
        );
        if args.decode > 0 {
            tokens.push(best[0] as u32);
        }
        if tokens.len() >= given + args.decode {
            break;
        }
        let last = &tokens[tokens.len() - 1..];
        logits = forward(model, &arm, last, &mut cache, &mut Nothing).map_err(words)?;
        all.extend_from_slice(logits.data());
    }
    let computed = all.len() / vocabulary;
    report += &format!(
        "{} logits of {computed} {} by the kernels of `{}`\n",
        grouped(all.len()),
        if computed == 1 { "position" } else { "positions" },
        file.name
    );
    if args.decode > 0 {
        let decoded: Vec<String> = tokens[given..].iter().map(u32::to_string).collect();
        report += &format!("decoded: {}\n", decoded.join(","));
    }
    if let Some(out) = &args.out {
        print(&std::mem::take(&mut report))?;
        write(out, &Tensor::new(vocabulary, all), &tokens[..computed])?;
        report += &format!("written to {}\n", out.shown());
    }
    print(&report)
}

/// The places of the largest values, the first of equal ones first.
fn largest(row: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..row.len()).collect();
    places.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap_or(std::cmp::Ordering::Equal));
    places.truncate(count);
    places
}

fn write(path: &Path, logits: &Tensor, tokens: &[u32]) -> Result<(), String> {
    let bytes = logits.to_le_bytes();
    let ids: Vec<u8> = tokens.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes);
    let views = view(Dtype::F32, vec![logits.rows(), logits.width()], &bytes[..])
        .and_then(|logits| {
            Ok([("logits", logits), ("ids", view(Dtype::I64, vec![tokens.len()], &ids)?)])
        })
        .map_err(|error| error.to_string())?;
    let file = safetensors::serialize(views, None).map_err(|error| error.to_string())?;
    put(path, &file)
}

/// Writes a file that `--out` names.
pub(super) fn put(path: &Path, file: &[u8]) -> Result<(), String> {
    crate::cache::write_whole(path, file).map_err(|error| {
        let cause = std::error::Error::source(&error);
        let cause = cause.map_or_else(|| error.to_string(), ToString::to_string);
        format!("cannot write `{}`: {cause}; choose another place with --out", path.shown())
    })
}

/// Keeps no site.
struct Nothing;

impl Sites for Nothing {
    fn visit(&mut self, _: Site, tensor: Tensor) -> Result<Tensor, ComputeError> {
        Ok(tensor)
    }
}
