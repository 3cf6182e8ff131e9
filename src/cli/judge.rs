//! `runner judge`: the command line of `judge/`, for a dump of one kernel.

use std::cell::RefCell;
use std::fmt::Write;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::chip::chip_name;
use super::{FALSIFIED, PASS, print, print_bytes};
use crate::block_format::OperandFormat;
use crate::compute::ComputeError;
use crate::compute::emulated::chip::{CHIPS, Chip};
use crate::dtype::Format;
use crate::judge::heads::{Known, Sequences, WANTED};
use crate::judge::operands::{
    Axes, JudgeError, Layout, Mostly, Operand, Source, by_name, read, recognised_in_words,
};
use crate::judge::product::Product;
use crate::judge::same::{Comparison, compare};
use crate::judge::single::{AttentionOf, Single};
use crate::judge::{Answer, Epilogue, Judgement};
use crate::model::{Rope, RopeLayout};
use crate::op::ChipName;
use crate::tensor::Tensor;
use crate::tensor_file::TensorFile;
use crate::text::{Shown, values_are};

/// Rows and columns on which readings of the axes are told apart.
const SAMPLE: (usize, usize) = (16, 64);
/// What stands under a norm's root unless that is said.
const EPS: f32 = 1e-6;
/// The base of RoPE's frequencies unless that is said.
const THETA: f64 = 10000.0;
/// The largest position.
const LAST_POSITION: usize = 1_000_000_000;

#[derive(Args)]
#[command(after_help = "\
Answers, and the exit code:
  to the bit        0  the outputs are the bits of a known schedule, which is named
  within rounding   0  they are not, but rounding explains every difference
  wrong             1  rounding does not explain them: where, how, and what it looks like
  2 is a bad file or command line.

Examples:
  runner judge x.npy w.npy y.npy
  runner judge dump.safetensors                      tensors x, w, y by their names
  runner judge dump.safetensors:act dump.safetensors:weight y.npy
  runner judge x.npy w.npy y.npy --scale-x xs.npy --scale-w ws.npy    FP8, any block
  runner judge x.npy w.npy y.npy --dtype-x bf16 --dtype-w bf16 --dtype-y bf16
  runner judge q.npy k.npy v.npy y.npy --op attention --heads 8 --kv-heads 2 --head-dim 128
  runner judge a.npy b.npy --op same       two tensors without an operation: b should be a

A GEMM is y[N, M] = alpha x[N, K] w[M, K]^T + bias; leading dimensions are batches.")]
pub(super) struct JudgeArgs {
    /// The tensors in the op's order, each FILE or FILE:TENSOR; or one file that holds
    /// them all by name. matmul: x w y. norm: x weight y. rope: x y. attention: q k v y.
    /// swiglu: gate up y. softmax: x y. same: a b.
    #[arg(required = true)]
    tensors: Vec<String>,
    /// What the kernel computes.
    #[arg(long, value_enum, default_value_t = JudgedOp::Matmul)]
    op: JudgedOp,
    /// x is stored as [K, N].
    #[arg(long)]
    transposed_x: bool,
    /// w is stored as [K, M], as `x @ w` has it.
    #[arg(long)]
    transposed_w: bool,
    /// The bias, FILE or FILE:TENSOR, one value for each column of y.
    #[arg(long)]
    bias: Option<String>,
    /// What the product is multiplied with; 1 by default.
    #[arg(long, allow_hyphen_values = true)]
    alpha: Option<f32>,
    /// The scale of x: a number, or FILE or FILE:TENSOR with one per tensor, row or block.
    #[arg(long, allow_hyphen_values = true)]
    scale_x: Option<String>,
    /// The scale of w, likewise.
    #[arg(long, allow_hyphen_values = true)]
    scale_w: Option<String>,
    /// The format of the first tensor, where its file does not say: f32, bf16, f16, e4m3, e5m2, e4m3fnuz, e5m2fnuz, int8. Of a product also the
    /// block-scaled mxfp8, mxfp8-e5m2, mxfp6-e2m3, mxfp6-e3m2, mxfp4 and nvfp4: codes of a byte each, those of 4 bits two in a
    /// byte, with `--scale-x` naming the codes of the blocks' scales, and `--alpha` the scales of the whole tensors.
    #[arg(long, visible_aliases = ["dtype-q", "dtype-gate", "dtype-a"])]
    dtype_x: Option<OperandFormat>,
    /// The format of the second tensor, likewise.
    #[arg(long, visible_aliases = ["dtype-k", "dtype-up", "dtype-weight"])]
    dtype_w: Option<OperandFormat>,
    /// The format of the third of four tensors.
    #[arg(long)]
    dtype_v: Option<Format>,
    /// The format of y.
    #[arg(long, visible_alias = "dtype-b")]
    dtype_y: Option<Format>,
    /// The shape of the first tensor, where its file is raw: rows,width.
    #[arg(long, value_delimiter = ',', visible_aliases = ["shape-q", "shape-gate", "shape-a"])]
    shape_x: Option<Vec<usize>>,
    /// The shape of the second tensor.
    #[arg(long, value_delimiter = ',', visible_aliases = ["shape-k", "shape-up", "shape-weight"])]
    shape_w: Option<Vec<usize>>,
    /// The shape of the third of four tensors.
    #[arg(long, value_delimiter = ',')]
    shape_v: Option<Vec<usize>>,
    /// The shape of y.
    #[arg(long, value_delimiter = ',', visible_alias = "shape-b")]
    shape_y: Option<Vec<usize>>,
    /// The type in which the kernel returned y; by default the one that y's values have.
    #[arg(long)]
    output: Option<Format>,
    /// Whose tensor cores are tried: a chip of `runner chip list`; auto is all of NVIDIA's.
    #[arg(long, default_value = "auto", value_parser = chip_name)]
    chip: ChipName,
    /// Confirm a schedule on all values of a large product, however long that takes.
    #[arg(long)]
    all: bool,
    /// norm: what stands under the root beside the mean square; 1e-6 by default.
    #[arg(long, allow_hyphen_values = true)]
    eps: Option<f32>,
    /// rope: the base of the frequencies; 10000 by default.
    #[arg(long, allow_hyphen_values = true)]
    theta: Option<f64>,
    /// rope: the position of each sequence's first row, 0 by default; or a tensor with one for
    /// each row.
    #[arg(long, allow_hyphen_values = true)]
    positions: Option<String>,
    /// rope: which values form a pair; halves by default.
    #[arg(long, value_enum)]
    layout: Option<PairLayout>,
    /// attention: query heads.
    #[arg(long)]
    heads: Option<usize>,
    /// attention: heads of keys and values; as many as query heads by default.
    #[arg(long)]
    kv_heads: Option<usize>,
    /// rope, attention: the width of a head.
    #[arg(long)]
    head_dim: Option<usize>,
    /// attention: what scores are multiplied with; 1 / sqrt(head width) by default.
    #[arg(long, allow_hyphen_values = true)]
    scale: Option<f64>,
    /// attention: a query sees no later key (the default).
    #[arg(long, conflicts_with = "no_causal")]
    causal: bool,
    /// attention: a query sees every key.
    #[arg(long)]
    no_causal: bool,
    /// attention: keys that a query sees at most, its own included.
    #[arg(long)]
    window: Option<usize>,
    /// same: steps of the coarser type by which b may be off; by default 2 in bf16 and FP8, 8 in
    /// f16 and tf32, 256 in f32.
    #[arg(long)]
    ulps: Option<u64>,
    /// How to print the answer.
    #[arg(long, value_enum, default_value_t = JudgeFormat::Table)]
    format: JudgeFormat,
}

/// The ops.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum JudgedOp {
    /// y = alpha x w^T + bias.
    Matmul,
    /// RMS norm.
    Norm,
    /// Rotary position embedding.
    Rope,
    /// Attention.
    Attention,
    /// silu(gate) * up.
    Swiglu,
    /// Softmax of each row.
    Softmax,
    /// Two tensors without an operation: b should be a.
    Same,
}

impl JudgedOp {
    fn tensors(self) -> &'static [&'static str] {
        match self {
            JudgedOp::Matmul => &["x", "w", "y"],
            JudgedOp::Norm => &["x", "weight", "y"],
            JudgedOp::Rope | JudgedOp::Softmax => &["x", "y"],
            JudgedOp::Attention => &["q", "k", "v", "y"],
            JudgedOp::Swiglu => &["gate", "up", "y"],
            JudgedOp::Same => &["a", "b"],
        }
    }

    fn name(self) -> &'static str {
        match self {
            JudgedOp::Matmul => "matmul",
            JudgedOp::Norm => "norm",
            JudgedOp::Rope => "rope",
            JudgedOp::Attention => "attention",
            JudgedOp::Swiglu => "swiglu",
            JudgedOp::Softmax => "softmax",
            JudgedOp::Same => "same",
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum PairLayout {
    /// Values i and i + width / 2: Hugging Face.
    Halves,
    /// Values 2i and 2i + 1: GPT-J, GGUF's llama.
    Interleaved,
}

#[derive(Clone, Copy, ValueEnum)]
enum JudgeFormat {
    /// For reading.
    Table,
    /// For programs.
    Json,
}

/// What is told of a dump.
struct Told {
    op: &'static str,
    operands: Vec<String>,
    remarks: Vec<String>,
    judgements: Vec<Said>,
}

/// What is said of one op or of two tensors.
#[derive(Serialize)]
#[serde(untagged)]
enum Said {
    Op(Box<Judgement>),
    Same(Box<Comparison>),
}

impl Said {
    fn answer(&self) -> Answer {
        match self {
            Said::Op(judgement) => judgement.answer,
            Said::Same(comparison) => comparison.answer,
        }
    }

    fn sentence(&self) -> &str {
        match self {
            Said::Op(judgement) => &judgement.sentence,
            Said::Same(comparison) => &comparison.sentence,
        }
    }

    fn in_text(&self) -> String {
        match self {
            Said::Op(judgement) => judgement.in_text(),
            Said::Same(comparison) => comparison.in_text(),
        }
    }
}

pub(super) fn judge(args: &JudgeArgs) -> Result<u8, String> {
    let told = answer(args).map_err(|error| error.to_string())?;
    let worst = told.judgements.iter().map(Said::answer).max();
    let worst = worst.ok_or("there is nothing to judge")?;
    match args.format {
        JudgeFormat::Table => print(&told.in_text())?,
        JudgeFormat::Json => {
            let json = serde_json::json!({
                "schema": 1,
                "op": told.op,
                "answer": worst,
                "operands": told.operands,
                "remarks": told.remarks,
                "judgements": told.judgements,
            });
            let text = serde_json::to_string_pretty(&json)
                .map_err(|error| format!("the answer cannot be encoded: {error}"))?;
            print_bytes((text + "\n").as_bytes())?
        }
    };
    Ok(if worst == Answer::Wrong { FALSIFIED } else { PASS })
}

impl Told {
    fn in_text(&self) -> String {
        let mut text = format!("{}: {}\n", self.op, self.operands.join(", "));
        for remark in &self.remarks {
            let _ = writeln!(text, "  note: {remark}");
        }
        text.push('\n');
        if let [only] = self.judgements.as_slice() {
            return text + &only.in_text();
        }
        for (number, judgement) in self.judgements.iter().enumerate() {
            let _ = writeln!(text, "  batch {number}: {}", judgement.sentence());
        }
        let worst = self.judgements.iter().enumerate().rev().max_by_key(|(_, j)| j.answer());
        if let Some((number, worst)) = worst {
            let _ = write!(text, "\nbatch {number}:\n{}", worst.in_text());
        }
        text
    }
}

fn usage(text: impl Into<String>) -> JudgeError {
    JudgeError::Usage(text.into())
}

/// Where each tensor of the op lies, and what else a file of all has by name.
struct Found {
    sources: Vec<Source>,
    whole: Option<(TensorFile, String)>,
}

fn find(args: &JudgeArgs) -> Result<Found, JudgeError> {
    let names = args.op.tensors();
    let (sources, whole) = match args.tensors.as_slice() {
        [one] => {
            let file = Source::parse(one)?;
            if file.tensor.is_some() {
                return Err(usage(format!(
                    "one tensor is no dump: {} needs {}",
                    args.op.name(),
                    names.join(", ")
                )));
            }
            let opened = TensorFile::open(&file.file)?;
            let find = |what: &&str| {
                let tensor = by_name(&opened, what).ok_or_else(|| {
                    usage(format!(
                        "`{}` has no tensor that is {what} by its name; it has {}; write \
                         FILE:TENSOR for each of {}",
                        file.file.shown(),
                        opened.found(),
                        names.join(", ")
                    ))
                })?;
                Ok(Source { tensor: Some(tensor), ..file.clone() })
            };
            let sources = names.iter().map(find).collect::<Result<Vec<_>, JudgeError>>()?;
            (sources, Some((opened, one.clone())))
        }
        several if several.len() == names.len() => {
            let sources = several.iter().map(|text| Source::parse(text));
            (sources.collect::<Result<Vec<_>, _>>()?, None)
        }
        several => {
            return Err(usage(format!(
                "{} takes {} tensors, {}, or one file that holds them; {} were given",
                args.op.name(),
                names.len(),
                names.join(" "),
                several.len()
            )));
        }
    };
    Ok(Found { sources, whole })
}

/// Refuses options that the op does not read, and numbers that are none.
fn check(args: &JudgeArgs) -> Result<(), JudgeError> {
    use JudgedOp::{Attention, Matmul, Norm, Rope, Same, Softmax, Swiglu};
    let computed = [Matmul, Norm, Rope, Attention, Swiglu, Softmax];
    let given: [(&str, bool, &[JudgedOp]); 22] = [
        ("--transposed-x", args.transposed_x, &[Matmul]),
        ("--transposed-w", args.transposed_w, &[Matmul]),
        ("--bias", args.bias.is_some(), &[Matmul]),
        ("--alpha", args.alpha.is_some(), &[Matmul]),
        ("--scale-x", args.scale_x.is_some(), &[Matmul]),
        ("--scale-w", args.scale_w.is_some(), &[Matmul]),
        ("--chip", args.chip != ChipName::Auto, &[Matmul]),
        ("--all", args.all, &[Matmul]),
        ("--eps", args.eps.is_some(), &[Norm]),
        ("--theta", args.theta.is_some(), &[Rope]),
        ("--positions", args.positions.is_some(), &[Rope]),
        ("--layout", args.layout.is_some(), &[Rope]),
        ("--head-dim", args.head_dim.is_some(), &[Rope, Attention]),
        ("--heads", args.heads.is_some(), &[Attention]),
        ("--kv-heads", args.kv_heads.is_some(), &[Attention]),
        ("--scale", args.scale.is_some(), &[Attention]),
        ("--causal", args.causal, &[Attention]),
        ("--no-causal", args.no_causal, &[Attention]),
        ("--window", args.window.is_some(), &[Attention]),
        ("--output", args.output.is_some(), &computed),
        ("--ulps", args.ulps.is_some(), &[Same]),
        ("--dtype-v", args.dtype_v.is_some() || args.shape_v.is_some(), &[Attention]),
    ];
    if let Some((name, _, ops)) =
        given.iter().find(|(_, given, ops)| *given && !ops.contains(&args.op))
    {
        let ops: Vec<&str> = ops.iter().map(|op| op.name()).collect();
        return Err(usage(format!(
            "`{name}` belongs to {}: {} does not read it; leave it out, or choose the op by `--op`",
            ops.join(" and "),
            args.op.name()
        )));
    }
    let all = |_: f64| true;
    let number =
        |name: &str, value: Option<f64>, range: &str, fits: &dyn Fn(f64) -> bool| match value
            .filter(|value| !(value.is_finite() && fits(*value)))
        {
            Some(value) => Err(usage(format!("`{name} {value}` must be a finite number{range}"))),
            None => Ok(()),
        };
    number("--alpha", args.alpha.map(f64::from), "", &all)?;
    number("--scale", args.scale, "", &all)?;
    number("--eps", args.eps.map(f64::from), ", 0 or more", &|eps| eps >= 0.0)?;
    number("--theta", args.theta, " above 0", &|theta| theta > 0.0)?;
    if args.window == Some(0) {
        return Err(usage("`--window 0` sees no key: a query sees its own, so it is at least 1"));
    }
    Ok(())
}

/// What of a whole file nothing was taken from.
fn unused(args: &JudgeArgs, file: &TensorFile, used: &[String]) -> Option<String> {
    let named = [&args.bias, &args.scale_x, &args.scale_w, &args.positions];
    let is_named = |name: &str| {
        named.iter().any(|text| text.as_ref().is_some_and(|t| t.ends_with(&format!(":{name}"))))
    };
    let left = file.names().filter(|name| !used.iter().any(|u| u == name) && !is_named(name));
    let left: Vec<String> = left.map(|name| format!("`{name}`")).collect();
    (!left.is_empty()).then(|| format!("not used: {}", left.join(", ")))
}

fn answer(args: &JudgeArgs) -> Result<Told, JudgeError> {
    check(args)?;
    let names = args.op.tensors();
    let Found { mut sources, whole } = find(args)?;
    let last = sources.len() - 1;
    let formats = [args.dtype_x, args.dtype_w, args.dtype_v.map(OperandFormat::Single)];
    let shapes = [&args.shape_x, &args.shape_w, &args.shape_v];
    for (place, source) in sources.iter_mut().enumerate() {
        let is_y = place == last;
        let format = if is_y { args.dtype_y.map(OperandFormat::Single) } else { formats[place] };
        match format {
            Some(OperandFormat::Single(format)) => source.format = Some(format),
            Some(OperandFormat::Blocks(format)) if matches!(args.op, JudgedOp::Matmul) => {
                source.blocks = Some(format);
            }
            Some(OperandFormat::Blocks(format)) => {
                return Err(usage(format!(
                    "`{format}` is the format of a product's operands; give the values of other ops"
                )));
            }
            None => {}
        }
        source.shape = if is_y { args.shape_y.clone() } else { shapes[place].clone() };
    }
    let operands = names.iter().zip(&sources);
    let operands: Vec<Operand> =
        operands.map(|(name, source)| read(name, source)).collect::<Result<_, _>>()?;
    let mut remarks = recognised_in_words(&operands);
    let mut used: Vec<String> = sources.iter().filter_map(|s| s.tensor.clone()).collect();
    let (judgements, operands) = match args.op {
        JudgedOp::Matmul => {
            let beside = Beside::new(whole.as_ref());
            let told = products(args, operands, &beside, &mut remarks)?;
            used.extend(beside.used.take());
            (ops(told.0), told.1)
        }
        JudgedOp::Same => {
            let said = compare(&operands[0], &operands[1], args.ulps)?;
            (vec![Said::Same(Box::new(said))], operands)
        }
        _ => (ops(single(args, &operands, &mut remarks)?), operands),
    };
    remarks.extend(whole.as_ref().and_then(|(file, _)| unused(args, file, &used)));
    let operands = operands.iter().map(Operand::in_words).collect();
    Ok(Told { op: args.op.name(), operands, remarks, judgements })
}

fn ops(judgements: Vec<Judgement>) -> Vec<Said> {
    judgements.into_iter().map(|judgement| Said::Op(Box::new(judgement))).collect()
}

/// A file that holds everything, and what was taken from it beside the operands.
struct Beside<'a> {
    whole: Option<&'a (TensorFile, String)>,
    used: RefCell<Vec<String>>,
}

impl<'a> Beside<'a> {
    fn new(whole: Option<&'a (TensorFile, String)>) -> Beside<'a> {
        Beside { whole, used: RefCell::default() }
    }

    /// What was given, or else what the file has by one of these names.
    fn find(
        &self,
        given: &Option<String>,
        what: &[&str],
        remarks: &mut Vec<String>,
    ) -> Option<String> {
        let by_name = || {
            let (file, path) = self.whole?;
            let name = what.iter().find_map(|what| by_name(file, what))?;
            remarks.push(format!("`{name}` of `{path}` is taken as {}", what[0].replace('_', " ")));
            self.used.borrow_mut().push(name.clone());
            Some(format!("{path}:{name}"))
        };
        given.clone().or_else(by_name)
    }
}

fn products(
    args: &JudgeArgs,
    operands: Vec<Operand>,
    beside: &Beside<'_>,
    remarks: &mut Vec<String>,
) -> Result<(Vec<Judgement>, Vec<Operand>), JudgeError> {
    let [mut x, mut w, y]: [Operand; 3] =
        operands.try_into().map_err(|_| usage("a product has three tensors"))?;
    let is_scaled =
        |operand: &Operand| operand.codes.format.is_scaled() || operand.blocks.is_some();
    let is_fp8 = is_scaled(&x) || is_scaled(&w);
    let scale_of = |given: &Option<String>, what: &[&str], remarks: &mut Vec<String>| {
        if is_fp8 { beside.find(given, what, remarks) } else { given.clone() }
    };
    if let Some(scale) = scale_of(&args.scale_x, &["scale_x"], remarks) {
        x.scale_by(&scale, remarks)?;
    }
    if let Some(scale) = scale_of(&args.scale_w, &["scale_w", "weight_scale"], remarks) {
        w.scale_by(&scale, remarks)?;
    }
    for operand in [&x, &w].into_iter().filter(|operand| is_scaled(operand)) {
        if operand.codes.scales.is_none() {
            let name = operand.name;
            if let Some(format) = operand.blocks {
                return Err(usage(format!(
                    "{name} is {format}, and its blocks' scales are missing: `--scale-{name} FILE:TENSOR`"
                )));
            }
            remarks.push(format!(
                "{name} has no scale: its codes are taken as they stand, and no cause is named by \
                 a scale; `--scale-{name}` gives one"
            ));
        }
    }
    let bias =
        beside.find(&args.bias, &["bias"], remarks).map(|text| Source::parse(&text)).transpose()?;
    let bias = bias.map(|source| read("bias", &source)).transpose()?;
    let bias = bias.map(|bias| bias.codes.values().into_data());
    let chips: Vec<ChipName> = match args.chip {
        // Of AMD's chips only one that is named: their plain code takes its time.
        ChipName::Auto => {
            let is_nvidias = |chip: &&Chip| !chip.capabilities.is_empty();
            CHIPS.iter().filter(is_nvidias).map(|chip| chip.name).collect()
        }
        chip => vec![chip],
    };
    let told = Axes { x: args.transposed_x, w: args.transposed_w, y: false };
    let layout = Layout { x: &x, w: &w, y: &y, told };
    let readings = layout.readings()?;
    let mut axes = readings[0];
    let judge = |axes: Axes, output: Format, sampled: bool| -> Result<Vec<Judgement>, JudgeError> {
        let mut judgements = Vec::new();
        for matrices in layout.products(axes) {
            if bias.as_ref().is_some_and(|bias| bias.len() != matrices.w.rows) {
                return Err(usage(format!(
                    "the bias has {} values, and y {} columns",
                    bias.as_ref().map_or(0, Vec::len),
                    matrices.w.rows
                )));
            }
            let epilogue = Epilogue { alpha: args.alpha.unwrap_or(1.0), bias: bias.clone() };
            let (x, w, y) = (&matrices.x, &matrices.w, matrices.y);
            let product = Product { x, w, y, output, epilogue, chips: &chips, all: args.all };
            judgements.push(if sampled { product.glance(SAMPLE)? } else { product.judge()? });
            if sampled {
                break;
            }
        }
        Ok(judgements)
    };
    if readings.len() > 1 {
        let fits = |axes: Axes| -> Result<(bool, f64), JudgeError> {
            let output = args.output.unwrap_or(y.mostly.map_or(y.codes.format, |m| m.format));
            let glance = judge(axes, output, true)?;
            let first = glance.first();
            Ok(first.map_or((false, f64::MAX), |first| (first.z.within, first.z.rms)))
        };
        let (plain_fits, plain) = fits(axes)?;
        let mut others: Vec<(Axes, f64)> = Vec::new();
        if !plain_fits {
            for &other in &readings[1..] {
                let (is_within, rms) = fits(other)?;
                if is_within {
                    others.push((other, rms));
                }
            }
        }
        match others.first() {
            Some((other, rms)) => {
                let first = match axes.in_words() {
                    first if first.is_empty() => "as they stand".to_owned(),
                    first => format!("with {first}"),
                };
                remarks.push(format!(
                    "the shapes fit several readings: with {} z is {rms:.2}, {first} it is \
                     {plain:.3e}; {} is taken",
                    other.in_words(),
                    other.in_words()
                ));
                axes = *other;
            }
            None if !plain_fits => {
                let tried: Vec<String> = readings[1..].iter().map(|a| a.in_words()).collect();
                remarks.push(format!(
                    "the shapes would also fit with {}: tried, and no better",
                    tried.join(", or with ")
                ));
            }
            None => {}
        }
    }
    if axes == readings[0] && axes != told {
        let only = if readings.len() == 1 { "only " } else { "" };
        remarks.push(format!("the shapes fit {only}with {}: taken so", axes.in_words()));
    }
    let judgements = in_its_type(args, &y, remarks, &|output| judge(axes, output, false))?;
    Ok((judgements, vec![x, w, y]))
}

fn single(
    args: &JudgeArgs,
    operands: &[Operand],
    remarks: &mut Vec<String>,
) -> Result<Vec<Judgement>, JudgeError> {
    let (y, inputs) = operands.split_last().ok_or_else(|| usage("there is no tensor"))?;
    for operand in inputs.iter().filter(|operand| operand.codes.format.is_scaled()) {
        let name = operand.name;
        remarks.push(format!("{name} has no scale: its codes are taken as they stand"));
    }
    if matches!(args.op, JudgedOp::Rope | JudgedOp::Attention) {
        return of_heads(args, operands, remarks);
    }
    let values: Vec<Tensor> = inputs.iter().map(|operand| operand.codes.values()).collect();
    let gain = values[inputs.len() - 1].data().to_vec();
    let gain = Tensor::new(gain.len(), gain);
    let op = match args.op {
        JudgedOp::Norm => {
            Single::RmsNorm { x: &values[0], gain: &gain, eps: args.eps.unwrap_or(EPS) }
        }
        JudgedOp::Swiglu => Single::Swiglu { gate: &values[0], up: &values[1] },
        _ => Single::Softmax { x: &values[0] },
    };
    in_its_type(args, y, remarks, &|output| Ok(vec![op.judge(y.codes.values(), output)?]))
}

/// RoPE and attention, each sequence of a batch for itself.
fn of_heads(
    args: &JudgeArgs,
    operands: &[Operand],
    remarks: &mut Vec<String>,
) -> Result<Vec<Judgement>, JudgeError> {
    let read = match args.op {
        JudgedOp::Rope => rope_heads(args, operands)?,
        _ => attention_heads(args, operands)?,
    };
    let counts: Vec<usize> = read.iter().map(|sequences| sequences.each.len()).collect();
    if counts.iter().any(|count| *count != counts[0]) {
        let shapes: Vec<String> = operands.iter().map(Operand::in_words).collect();
        return Err(usage(format!(
            "{} are read as {counts:?} sequences; give one sequence at a time, or the same \
             number of each",
            shapes.join(", ")
        )));
    }
    for (operand, sequences) in operands.iter().zip(&read).take(2) {
        remarks.push(format!("{} is read as {}", operand.name, sequences.in_words()));
    }
    let y = &operands[operands.len() - 1];
    let judge =
        |output| (0..counts[0]).map(|number| sequence(args, &read, number, output)).collect();
    let judgements = in_its_type(args, y, remarks, &judge)?;
    let tokens = read[0].each[0].rows();
    let is_wrong = judgements.iter().any(|judgement| judgement.answer == Answer::Wrong);
    if is_wrong && operands[0].shape.len() > 2 && tokens < read[0].heads {
        remarks.push(format!("{tokens} tokens of {} heads are few: {WANTED}", read[0].heads));
    }
    Ok(judgements)
}

fn rope_heads(args: &JudgeArgs, operands: &[Operand]) -> Result<Vec<Sequences>, JudgeError> {
    let x = Sequences::of(&operands[0], Known { heads: None, width: args.head_dim })?;
    let known = Known { heads: Some(x.heads), width: Some(x.width) };
    Ok(vec![x, Sequences::of(&operands[1], known)?])
}

fn attention_heads(args: &JudgeArgs, operands: &[Operand]) -> Result<Vec<Sequences>, JudgeError> {
    let known = Known { heads: args.heads, width: args.head_dim };
    let q = Sequences::of(&operands[0], known)?;
    let k = Sequences::of(&operands[1], Known { heads: args.kv_heads, width: Some(q.width) })?;
    let v = Sequences::of(&operands[2], Known { heads: Some(k.heads), width: None })?;
    let y = Sequences::of(&operands[3], Known { heads: Some(q.heads), width: Some(v.width) })?;
    Ok(vec![q, k, v, y])
}

/// One sequence of those that were read.
fn sequence(
    args: &JudgeArgs,
    read: &[Sequences],
    number: usize,
    output: Format,
) -> Result<Judgement, JudgeError> {
    let of = |place: usize| &read[place].each[number];
    let y = of(read.len() - 1).clone();
    let (heads, head_dim) = (read[0].heads, read[0].width);
    if args.op == JudgedOp::Rope {
        let rows = y.rows();
        let positions = positions(args.positions.as_deref(), rows, number, read[0].each.len())?;
        let rope = geometry(args, head_dim);
        let op = Single::Rope { x: of(0), rope: &rope, head_dim, positions: &positions };
        return Ok(op.judge(y, output)?);
    }
    let shape = AttentionOf {
        heads,
        kv_heads: read[1].heads,
        head_dim,
        scale: args.scale.unwrap_or(1.0 / (head_dim as f64).sqrt()),
        causal: !args.no_causal,
        window: args.window,
    };
    let op = Single::Attention { q: of(0), k: of(1), v: of(2), shape };
    op.judge(y, output).map_err(|error| match error {
        error @ ComputeError::Shape { .. } => usage(format!("{error}; {WANTED}")),
        other => other.into(),
    })
}

fn geometry(args: &JudgeArgs, head_dim: usize) -> Rope {
    Rope {
        theta: args.theta.unwrap_or(THETA),
        layout: match args.layout {
            Some(PairLayout::Interleaved) => RopeLayout::Interleaved,
            _ => RopeLayout::Halves,
        },
        dimensions: head_dim,
        at_end: false,
        factors: None,
        magnitude: 1.0,
        linear_scale: 1.0,
        scaling: None,
        in_f32: false,
    }
}

/// The positions of one sequence's rows: counted from a first one, or a tensor's, which may
/// hold those of every sequence one after the other.
fn positions(
    text: Option<&str>,
    rows: usize,
    number: usize,
    sequences: usize,
) -> Result<Vec<usize>, JudgeError> {
    let text = text.unwrap_or("0");
    if let Ok(first) = text.parse::<usize>() {
        let last = first.checked_add(rows).filter(|last| *last <= LAST_POSITION);
        let last = last.ok_or_else(|| {
            usage(format!("`--positions {text}` is beyond the last position, {LAST_POSITION}"))
        })?;
        return Ok((first..last).collect());
    }
    let source = Source::parse(text)?;
    let file = TensorFile::open(&source.file)?;
    let whole: Vec<f64> = match file.integers(source.tensor.as_deref())? {
        Some(whole) => whole.into_iter().map(|position| position as f64).collect(),
        None => {
            let read = read("positions", &source)?.codes.values();
            read.data().iter().map(|&position| f64::from(position)).collect()
        }
    };
    let sound = |p: &f64| *p >= 0.0 && p.fract() == 0.0 && *p < LAST_POSITION as f64;
    let first = if whole.len() == rows { 0 } else { number * rows };
    if !whole.iter().all(sound) || ![rows, rows * sequences].contains(&whole.len()) {
        return Err(usage(format!(
            "`{text}` must hold {rows} positions, whole numbers from 0, one for each row of a \
             sequence; it holds {} values",
            whole.len()
        )));
    }
    Ok(whole[first..first + rows].iter().map(|&position| position as usize).collect())
}

/// Judges y in the type of its values. Where that blames more of them than have another type
/// than nearly all, in the type of nearly all.
fn in_its_type(
    args: &JudgeArgs,
    y: &Operand,
    remarks: &mut Vec<String>,
    judge: &dyn Fn(Format) -> Result<Vec<Judgement>, JudgeError>,
) -> Result<Vec<Judgement>, JudgeError> {
    if let Some(output) = args.output {
        return judge(fitting(y, output)?);
    }
    let judgements = judge(y.codes.format)?;
    let Some(Mostly { format, others, first }) = y.mostly else { return Ok(judgements) };
    let blamed = judgements.iter().filter_map(|judgement| judgement.place.as_ref());
    if blamed.map(|place| place.values).sum::<usize>() <= others {
        return Ok(judgements);
    }
    remarks.push(format!(
        "y is stored as f32 and nearly all of its values are {format}: taken as {format}; {} none, \
         the first at row {}, column {}",
        values_are(others),
        first[0],
        first[1]
    ));
    judge(format)
}

/// A type that the kernel is said to return, which must hold what it returned.
fn fitting(y: &Operand, output: Format) -> Result<Format, JudgeError> {
    let values = y.codes.values();
    let finer = values.data().iter().find(|v| v.is_finite() && output.round(**v) != **v);
    match finer {
        None => Ok(output),
        Some(value) => Err(usage(format!(
            "`--output {output}` does not hold y: {value:e} is none of its values; leave it out, \
             or name the type that the kernel returned"
        ))),
    }
}
