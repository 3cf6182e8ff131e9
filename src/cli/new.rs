//! `runner new`: a manifest to begin with, and its contract if the folder lacks it.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::print;
use crate::judge::operands::{Axes, Layout, Source, read};
use crate::text::Shown;

#[derive(Args)]
pub(super) struct NewArgs {
    /// What the stage computes.
    #[arg(value_enum)]
    op: NewOp,
    /// Its id.
    id: String,
    /// The folder of stages.
    #[arg(default_value = "stages")]
    folder: PathBuf,
    /// matmul: the files of a dump, x, w and y, each FILE or FILE:TENSOR; no model is read.
    #[arg(long, num_args = 3, value_names = ["X", "W", "Y"])]
    from_files: Option<Vec<String>>,
    /// The folder of contracts; `contracts` beside the stages by default.
    #[arg(long)]
    contracts: Option<PathBuf>,
}

/// The ops, as manifests name them.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum NewOp {
    /// The whole transformer.
    Forward,
    /// An embedding lookup.
    Embed,
    /// One normalisation.
    RmsNorm,
    /// Projections of one input.
    Matmul,
    /// One rotary position embedding.
    Rope,
    /// One layer's attention.
    Attention,
    /// One layer's activation.
    Swiglu,
    /// Tensors that are there already.
    Compare,
    /// A program.
    Command,
}

/// What a new stage begins with: its question, its op, and the contract that fits.
struct Scaffold<Text> {
    title: &'static str,
    op: Text,
    contract: (&'static str, &'static str),
}

impl Scaffold<&'static str> {
    fn owned(self) -> Scaffold<String> {
        Scaffold { title: self.title, op: self.op.to_owned(), contract: self.contract }
    }
}

impl NewOp {
    fn scaffold(self) -> Scaffold<&'static str> {
        macro_rules! contract {
            ($name:literal) => {
                ($name, include_str!(concat!("../../contracts/", $name, ".toml")))
            };
        }
        let (title, op, contract) = match self {
            NewOp::Forward => (
                "Does every site stay within its floor?",
                "[forward]\ncapture = \"every-site\" # or \"logits\", \"last-logits\"\n",
                contract!("per-layer"),
            ),
            NewOp::Embed => (
                "Is the looked-up embedding row bit-exact?",
                "[embed]\nweight = \"token_embd\"\n",
                contract!("embedding"),
            ),
            NewOp::RmsNorm => (
                "Is this RMSNorm right to the last place?",
                "[rms_norm]\n# a site of another stage: { stage = \"B\", site = \"blk.0.attn_residual\" }\n\
                 input  = { generate = \"outlier-channels\", rows = 16 }\nweight = \"blk.0.attn_norm\"\n",
                contract!("rms-norm"),
            ),
            NewOp::Matmul => (
                "Is this projection what the recipe must give?",
                "[matmul]\n# a site of another stage: { stage = \"B\", site = \"blk.0.ffn_swiglu\" }\n\
                 input   = { generate = \"outlier-channels\", rows = 16 }\n\
                 weights = [\"blk.0.ffn_down\"]\n",
                contract!("qkv-matmul"),
            ),
            NewOp::Rope => (
                "Are the queries rotated, and nothing else?",
                "[rope]\ninput = { generate = \"normal\", rows = 16 }\nsite  = \"blk.0.q_rope\"\n",
                contract!("rope"),
            ),
            NewOp::Attention => (
                "Is the attention of this layer f32's?",
                "[attention]\nq    = { generate = \"normal\", rows = 16 }\n\
                 k    = { generate = \"normal\", rows = 16 }\n\
                 v    = { generate = \"normal\", rows = 16 }\nsite = \"blk.0.attn\"\n",
                contract!("attention"),
            ),
            NewOp::Swiglu => (
                "Is this SwiGLU right to the last places?",
                "[swiglu]\ngate = { generate = \"normal\", rows = 16 }\n\
                 up   = { generate = \"normal\", rows = 16 }\nsite = \"blk.0.ffn_swiglu\"\n",
                contract!("swiglu"),
            ),
            NewOp::Compare => (
                "Do these two files hold the same numbers?",
                "[compare]\n# paths are seen from this folder\n\
                 reference = { file = \"../reference.safetensors\", tensor = \"logits\" }\n\
                 recorded  = { file = \"../capture.safetensors\", tensor = \"logits\" }\n",
                contract!("comparison"),
            ),
            NewOp::Command => (
                "Does this program end well?",
                "[command]\n# paths are seen from the folder that holds this one\n\
                 argv    = [\"sort\", \"in.txt\", \"-o\", \"out.txt\"]\n\
                 inputs  = [\"in.txt\"]\noutputs = [\"out.txt\"]\n",
                contract!("command"),
            ),
        };
        Scaffold { title, op, contract }
    }
}

pub(super) fn new(args: &NewArgs) -> Result<u8, String> {
    let scaffold = args.op.scaffold();
    let Scaffold { title, op, contract: (contract, text) } = match &args.from_files {
        None => scaffold.owned(),
        Some(files) => from_files(args, files)?,
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let sound = args.id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && args.id.len() <= 64
        && args.id.chars().all(plain);
    if !sound {
        return Err(format!(
            "the id cannot be `{}`: use up to 64 letters, digits, `-`, `_` and `.`, and begin \
             with a letter or digit",
            args.id
        ));
    }
    let file = args.folder.join(format!("{}.toml", args.id.to_lowercase()));
    let manifest = format!(
        "id       = \"{}\"\ntitle    = \"{title}\"\ncontract = \"{contract}\"\n\n{op}",
        args.id
    );
    write_new(&file, &manifest)?;
    let mut said = format!("wrote `{}`\n", file.shown());
    let beside = args.folder.parent().unwrap_or(Path::new("")).join("contracts");
    let contract_file = args.contracts.clone().unwrap_or(beside).join(format!("{contract}.toml"));
    if contract_file.exists() {
        said += &format!("it is judged by `{}`, which is there\n", contract_file.shown());
    } else {
        write_new(&contract_file, text)?;
        said += &format!("wrote `{}`\n", contract_file.shown());
    }
    said += &format!("`runner check {}` checks them\n", args.folder.shown());
    print(&said)
}

/// A product of a dump: its operands and what was recorded of it.
fn from_files(args: &NewArgs, files: &[String]) -> Result<Scaffold<String>, String> {
    if !matches!(args.op, NewOp::Matmul) {
        return Err("`--from-files` writes a `matmul`; `runner judge --op ...` judges the other \
                    ops from files"
            .to_owned());
    }
    let sources = files.iter().map(|text| Source::parse(text));
    let sources: Vec<Source> =
        sources.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let (mut keys, mut operands) = (Vec::new(), Vec::new());
    for (name, source) in ["x", "w", "y"].into_iter().zip(&sources) {
        let operand = read(name, source).map_err(|error| error.to_string())?;
        let file = seen_from(&args.folder, &source.file)?;
        let mut text = format!("file = {}", serde_json::json!(file));
        if let Some(tensor) = &source.tensor {
            text += &format!(", tensor = {}", serde_json::json!(tensor));
        }
        // f32 that holds bf16 or f16 is said to be that.
        if operand.recognised.is_some() && name != "y" {
            text += &format!(", dtype = \"{}\"", operand.codes.format);
        }
        keys.push(text);
        operands.push(operand);
    }
    let [x, w, y] = [&operands[0], &operands[1], &operands[2]];
    let readings = Layout { x, w, y, told: Axes::default() }.readings();
    let axes = readings.map_err(|error| error.to_string())?[0];
    if axes != Axes::default() {
        return Err(format!(
            "these fit with {} only, and a stage reads x as [N, K], w as [M, K] and y as [N, M]: \
             turn them before they are saved",
            axes.in_words()
        ));
    }
    if w.shape.len() > 2 {
        return Err(format!(
            "w has the shape {:?}: a stage reads one weight; give one batch at a time",
            w.shape
        ));
    }
    let [x, w, y] = [&keys[0], &keys[1], &keys[2]];
    let op = format!(
        "[matmul]\n# codes with scales: scale = 0.5, or scale = \"NAME\" of a tensor in the same \
         file\nx = {{ {x} }}\nw = {{ {w} }}\n\n[recorded]\n{}\n",
        y.replace(", ", "\n")
    );
    let contract = ("kernel", include_str!("../../contracts/kernel.toml"));
    Ok(Scaffold { title: "Is this kernel's product within rounding?", op, contract })
}

/// A file's path as a manifest of this folder names it.
fn seen_from(folder: &Path, file: &Path) -> Result<String, String> {
    let whole = |path: &Path| {
        std::path::absolute(path)
            .map_err(|error| format!("cannot find `{}`: {error}", path.shown()))
    };
    let (folder, file) = (whole(folder)?, whole(file)?);
    let (from, to): (Vec<_>, Vec<_>) = (folder.components().collect(), file.components().collect());
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let mut path = PathBuf::new();
    path.extend(from[shared..].iter().map(|_| ".."));
    path.extend(&to[shared..]);
    let text = path.to_str().ok_or_else(|| format!("`{}` is not UTF-8", path.shown()))?;
    Ok(text.to_owned())
}

/// Writes a file that must not be there yet.
fn write_new(path: &Path, text: &str) -> Result<(), String> {
    use std::io::Write;
    let cannot = |error: std::io::Error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::AlreadyExists => "choose another id, or edit that file",
            _ => "choose another folder",
        };
        format!("cannot write `{}`: {error}; {remedy}", path.shown())
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(cannot)?;
    }
    let mut file = std::fs::File::create_new(path).map_err(cannot)?;
    file.write_all(text.as_bytes()).map_err(cannot)
}
