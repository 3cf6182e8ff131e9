//! `runner judge`: the command line of `judge/`, for a dump of one kernel.

use std::fmt::Write;

use clap::{Args, ValueEnum};

use super::chip::chip_name;
use super::{FALSIFIED, PASS, print, print_bytes};
use crate::compute::emulated::chip::CHIPS;
use crate::dtype::Format;
use crate::judge::operands::{
    Axes, JudgeError, Layout, Operand, Source, by_name, read, recognised_in_words,
};
use crate::judge::product::Product;
use crate::judge::single::{AttentionOf, Single};
use crate::judge::{Answer, Epilogue, Judgement};
use crate::model::{Rope, RopeLayout};
use crate::op::ChipName;
use crate::tensor::Tensor;
use crate::tensor_file::TensorFile;
use crate::text::Shown;

/// Rows and columns on which readings of the axes are told apart.
const SAMPLE: (usize, usize) = (16, 64);

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

A GEMM is y[N, M] = alpha x[N, K] w[M, K]^T + bias; leading dimensions are batches.")]
pub(super) struct JudgeArgs {
    /// The tensors in the op's order, each FILE or FILE:TENSOR; or one file that holds
    /// them all by name. matmul: x w y. norm: x weight y. rope: x y. attention: q k v y.
    /// swiglu: gate up y. softmax: x y.
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
    /// What the product is multiplied with.
    #[arg(long, default_value = "1", allow_hyphen_values = true)]
    alpha: f32,
    /// The scale of x: a number, or FILE or FILE:TENSOR with one per tensor, row or block.
    #[arg(long)]
    scale_x: Option<String>,
    /// The scale of w, likewise.
    #[arg(long)]
    scale_w: Option<String>,
    /// The format of the first tensor, where its file does not say: f32, bf16, f16, e4m3, e5m2.
    #[arg(long, visible_aliases = ["dtype-q", "dtype-gate"])]
    dtype_x: Option<Format>,
    /// The format of the second tensor.
    #[arg(long, visible_aliases = ["dtype-k", "dtype-up", "dtype-weight"])]
    dtype_w: Option<Format>,
    /// The format of the third of four tensors.
    #[arg(long)]
    dtype_v: Option<Format>,
    /// The format of y.
    #[arg(long)]
    dtype_y: Option<Format>,
    /// The shape of the first tensor, where its file is raw: rows,width.
    #[arg(long, value_delimiter = ',', visible_aliases = ["shape-q", "shape-gate"])]
    shape_x: Option<Vec<usize>>,
    /// The shape of the second tensor.
    #[arg(long, value_delimiter = ',', visible_aliases = ["shape-k", "shape-up", "shape-weight"])]
    shape_w: Option<Vec<usize>>,
    /// The shape of the third of four tensors.
    #[arg(long, value_delimiter = ',')]
    shape_v: Option<Vec<usize>>,
    /// The shape of y.
    #[arg(long, value_delimiter = ',')]
    shape_y: Option<Vec<usize>>,
    /// The type in which the kernel returned y; by default the one that y's values have.
    #[arg(long)]
    output: Option<Format>,
    /// Whose tensor cores are tried: auto is all of them; volta, ampere, ada, hopper, blackwell.
    #[arg(long, default_value = "auto", value_parser = chip_name)]
    chip: ChipName,
    /// Confirm a schedule on all values of a large product, however long that takes.
    #[arg(long)]
    all: bool,
    /// norm: what stands under the root beside the mean square.
    #[arg(long, default_value = "1e-6")]
    eps: f32,
    /// rope: the base of the frequencies.
    #[arg(long, default_value = "10000")]
    theta: f64,
    /// rope: the position of the first row, or a tensor with one for each row.
    #[arg(long, default_value = "0")]
    positions: String,
    /// rope: which values form a pair.
    #[arg(long, value_enum, default_value_t = PairLayout::Halves)]
    layout: PairLayout,
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
    #[arg(long)]
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
}

impl JudgedOp {
    fn tensors(self) -> &'static [&'static str] {
        match self {
            JudgedOp::Matmul => &["x", "w", "y"],
            JudgedOp::Norm => &["x", "weight", "y"],
            JudgedOp::Rope | JudgedOp::Softmax => &["x", "y"],
            JudgedOp::Attention => &["q", "k", "v", "y"],
            JudgedOp::Swiglu => &["gate", "up", "y"],
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
    judgements: Vec<Judgement>,
}

pub(super) fn judge(args: &JudgeArgs) -> Result<u8, String> {
    let told = answer(args).map_err(|error| error.to_string())?;
    let worst = told.judgements.iter().map(|judgement| judgement.answer).max();
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
            let _ = writeln!(text, "  batch {number}: {}", judgement.sentence);
        }
        let worst = self.judgements.iter().enumerate().rev().max_by_key(|(_, j)| j.answer);
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

fn answer(args: &JudgeArgs) -> Result<Told, JudgeError> {
    let names = args.op.tensors();
    let Found { mut sources, whole } = find(args)?;
    let last = sources.len() - 1;
    let formats = [args.dtype_x, args.dtype_w, args.dtype_v];
    let shapes = [&args.shape_x, &args.shape_w, &args.shape_v];
    for (place, source) in sources.iter_mut().enumerate() {
        let is_y = place == last;
        source.format = if is_y { args.dtype_y } else { formats[place] };
        source.shape = if is_y { args.shape_y.clone() } else { shapes[place].clone() };
    }
    let operands = names.iter().zip(&sources);
    let operands: Vec<Operand> =
        operands.map(|(name, source)| read(name, source)).collect::<Result<_, _>>()?;
    let mut remarks = recognised_in_words(&operands);
    let (judgements, operands) = match args.op {
        JudgedOp::Matmul => products(args, operands, whole.as_ref(), &mut remarks)?,
        _ => {
            let judgement = single(args, &operands)?;
            (vec![judgement], operands)
        }
    };
    let operands = operands.iter().map(Operand::in_words).collect();
    Ok(Told { op: args.op.name(), operands, remarks, judgements })
}

fn products(
    args: &JudgeArgs,
    operands: Vec<Operand>,
    whole: Option<&(TensorFile, String)>,
    remarks: &mut Vec<String>,
) -> Result<(Vec<Judgement>, Vec<Operand>), JudgeError> {
    let [mut x, mut w, y]: [Operand; 3] =
        operands.try_into().map_err(|_| usage("a product has three tensors"))?;
    // A file that holds everything holds its scales and bias too.
    let beside = |given: &Option<String>, what: &[&str], remarks: &mut Vec<String>| {
        let by_name = || {
            let (file, path) = whole?;
            let name = what.iter().find_map(|what| by_name(file, what))?;
            remarks.push(format!("`{name}` of `{path}` is taken as {}", what[0].replace('_', " ")));
            Some(format!("{path}:{name}"))
        };
        given.clone().or_else(by_name)
    };
    let is_fp8 = x.codes.format.is_fp8() || w.codes.format.is_fp8();
    let scale_of = |given: &Option<String>, what: &[&str], remarks: &mut Vec<String>| {
        if is_fp8 { beside(given, what, remarks) } else { given.clone() }
    };
    if let Some(scale) = scale_of(&args.scale_x, &["scale_x"], remarks) {
        x.scale_by(&scale, remarks)?;
    }
    if let Some(scale) = scale_of(&args.scale_w, &["scale_w", "weight_scale"], remarks) {
        w.scale_by(&scale, remarks)?;
    }
    for operand in [&x, &w].into_iter().filter(|o| o.codes.format.is_fp8()) {
        if operand.codes.scales.is_none() {
            let name = operand.name;
            remarks.push(format!(
                "{name} has no scale: its codes are taken as they stand; `--scale-{name}` gives one"
            ));
        }
    }
    let bias =
        beside(&args.bias, &["bias"], remarks).map(|text| Source::parse(&text)).transpose()?;
    let bias = bias.map(|source| read("bias", &source)).transpose()?;
    let bias = bias.map(|bias| bias.codes.values().into_data());
    let chips: Vec<ChipName> = match args.chip {
        ChipName::Auto => CHIPS.iter().map(|chip| chip.name).collect(),
        chip => vec![chip],
    };
    let output = args.output.unwrap_or(y.codes.format);
    let told = Axes { x: args.transposed_x, w: args.transposed_w, y: false };
    let layout = Layout { x: &x, w: &w, y: &y, told };
    let readings = layout.readings()?;
    let mut axes = readings[0];
    let judge = |axes: Axes, sampled: bool| -> Result<Vec<Judgement>, JudgeError> {
        let mut judgements = Vec::new();
        for matrices in layout.products(axes) {
            if bias.as_ref().is_some_and(|bias| bias.len() != matrices.w.rows) {
                return Err(usage(format!(
                    "the bias has {} values, and y {} columns",
                    bias.as_ref().map_or(0, Vec::len),
                    matrices.w.rows
                )));
            }
            let epilogue = Epilogue { alpha: args.alpha, bias: bias.clone() };
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
            let glance = judge(axes, true)?;
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
    let judgements = judge(axes, false)?;
    Ok((judgements, vec![x, w, y]))
}

fn single(args: &JudgeArgs, operands: &[Operand]) -> Result<Judgement, JudgeError> {
    let values: Vec<Tensor> = operands.iter().map(|operand| operand.codes.values()).collect();
    let y = &operands[operands.len() - 1];
    let output = args.output.unwrap_or(y.codes.format);
    let y = values[values.len() - 1].clone();
    let judgement = match args.op {
        JudgedOp::Matmul => return Err(usage("a product is no single op")),
        JudgedOp::Norm => {
            let gain = Tensor::new(values[1].data().len(), values[1].data().to_vec());
            Single::RmsNorm { x: &values[0], gain: &gain, eps: args.eps }.judge(y, output)
        }
        JudgedOp::Swiglu => Single::Swiglu { gate: &values[0], up: &values[1] }.judge(y, output),
        JudgedOp::Softmax => Single::Softmax { x: &values[0] }.judge(y, output),
        JudgedOp::Rope => {
            let (x, head_dim) = by_heads(&operands[0], &values[0], args.head_dim)?;
            let y = Tensor::new(x.width(), y.into_data());
            let positions = positions(&args.positions, x.rows())?;
            let rope = Rope {
                theta: args.theta,
                layout: match args.layout {
                    PairLayout::Halves => RopeLayout::Halves,
                    PairLayout::Interleaved => RopeLayout::Interleaved,
                },
                dimensions: head_dim,
                factors: None,
                linear_scale: 1.0,
            };
            Single::Rope { x: &x, rope: &rope, head_dim, positions: &positions }.judge(y, output)
        }
        JudgedOp::Attention => return attention(args, operands, &values, output),
    };
    Ok(judgement?)
}

/// `[tokens, heads * head_dim]` of what may be `[tokens, heads, head_dim]`.
fn by_heads(
    operand: &Operand,
    values: &Tensor,
    head_dim: Option<usize>,
) -> Result<(Tensor, usize), JudgeError> {
    match (operand.shape.as_slice(), head_dim) {
        ([.., heads, width], None) if operand.shape.len() > 2 => {
            Ok((Tensor::new(heads * width, values.data().to_vec()), *width))
        }
        ([.., heads, width], Some(head_dim)) if operand.shape.len() > 2 && *width == head_dim => {
            Ok((Tensor::new(heads * width, values.data().to_vec()), head_dim))
        }
        (_, Some(head_dim)) => Ok((values.clone(), head_dim)),
        (shape, None) => Err(usage(format!(
            "{} has the shape {shape:?}: say how wide a head is by `--head-dim`",
            operand.name
        ))),
    }
}

fn positions(text: &str, rows: usize) -> Result<Vec<usize>, JudgeError> {
    if let Ok(first) = text.parse::<usize>() {
        return Ok((first..first + rows).collect());
    }
    let source = Source::parse(text)?;
    let read = read("positions", &source)?.codes.values().into_data();
    let whole = read.iter().all(|&p| p >= 0.0 && p.fract() == 0.0 && p < 1e9);
    if !whole || read.len() != rows {
        return Err(usage(format!(
            "`{text}` must hold {rows} positions, whole numbers from 0 as f32; it holds {}",
            read.len()
        )));
    }
    Ok(read.into_iter().map(|position| position as usize).collect())
}

fn attention(
    args: &JudgeArgs,
    operands: &[Operand],
    values: &[Tensor],
    output: Format,
) -> Result<Judgement, JudgeError> {
    let (q, q_dim) = by_heads(&operands[0], &values[0], args.head_dim).or_else(|error| {
        // Without a head's width the heads say it.
        match args.heads {
            Some(heads) if heads > 0 && values[0].width().is_multiple_of(heads) => {
                Ok((values[0].clone(), values[0].width() / heads))
            }
            _ => Err(error),
        }
    })?;
    let heads = args.heads.unwrap_or(q.width() / q_dim.max(1));
    let (k, _) = by_heads(&operands[1], &values[1], Some(q_dim))?;
    let kv_heads = args.kv_heads.unwrap_or(k.width() / q_dim.max(1));
    let v = match operands[2].shape.as_slice() {
        [.., heads, width] if operands[2].shape.len() > 2 => {
            Tensor::new(heads * width, values[2].data().to_vec())
        }
        _ => values[2].clone(),
    };
    let y = match operands[3].shape.as_slice() {
        [.., heads, width] if operands[3].shape.len() > 2 => {
            Tensor::new(heads * width, values[3].data().to_vec())
        }
        _ => values[3].clone(),
    };
    let shape = AttentionOf {
        heads,
        kv_heads,
        head_dim: q_dim,
        scale: args.scale.unwrap_or(1.0 / (q_dim as f64).sqrt()),
        causal: !args.no_causal,
        window: args.window,
    };
    Ok(Single::Attention { q: &q, k: &k, v: &v, shape }.judge(y, output)?)
}
