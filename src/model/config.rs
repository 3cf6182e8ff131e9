//! What a model's hyperparameters are, and which tensors they demand.
//!
//! Two raw forms, GGUF metadata and `config.json`, become one checked
//! [`Config`]. A setting that the forward pass would silently ignore is refused
//! here, because a wrong result is worse than none. It knows no bytes of tensors.

use std::f64::consts::PI;

use serde::Deserialize;

use super::error::{FETCH_AGAIN, Fault, OTHER_MODEL, shown};
use super::gguf::{Header, Value};

/// Sizes above this are typing errors or attacks: the largest dense models stay far below.
const LARGEST_SIZE: u64 = 1 << 24;
/// The largest RoPE width; real heads have 64 to 256 values.
const LARGEST_HEAD: u64 = 1 << 13;

/// The family of a model: which tensors it has and how they are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Architecture {
    /// Llama, SmolLM2 and relatives.
    Llama,
    /// Qwen2 and Qwen2.5: biases on Q, K and V.
    Qwen2,
    /// Qwen3: RMS norms on every head's Q and K.
    Qwen3,
}

impl Architecture {
    /// The name that GGUF and `config.json` use.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
        }
    }

    fn from_name(name: &str) -> Result<Architecture, Fault> {
        [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3]
            .into_iter()
            .find(|architecture| architecture.name() == name)
            .ok_or_else(|| {
                Fault::unsupported(
                    format!("the architecture `{}` is unknown", shown(name)),
                    "choose a llama, qwen2 or qwen3 model",
                )
            })
    }
}

/// Which two values of a head RoPE turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Values `2i` and `2i + 1`: GGUF files of llama models.
    Interleaved,
    /// Values `i` and `i + dimensions / 2`: qwen2, qwen3 and every Hugging Face folder.
    Halves,
}

impl RopeLayout {
    /// The name that requests to programs use.
    pub fn name(self) -> &'static str {
        match self {
            RopeLayout::Interleaved => "interleaved",
            RopeLayout::Halves => "halves",
        }
    }
}

/// Rotary position embedding: the angle of pair `i` at position `p` is
/// `p / linear_scale * theta^(-2i / dimensions) / factors[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// Which values form a pair.
    pub layout: RopeLayout,
    /// Values of a head that turn; always the whole head.
    pub dimensions: usize,
    /// Divisors of the frequencies, `dimensions / 2` of them (`rope_freqs.weight`).
    pub factors: Option<Vec<f32>>,
    /// Divisor of the positions; 1 where the context is not stretched.
    pub linear_scale: f64,
}

/// Checked hyperparameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The family.
    pub architecture: Architecture,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Positions that the model was trained for.
    pub context_length: usize,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the embedding is the output matrix too.
    pub tied_embeddings: bool,
}

/// A tensor that the forward pass reads.
pub(super) struct Expected {
    pub name: String,
    pub rows: usize,
    pub width: usize,
    pub required: bool,
}

impl Config {
    /// What the ops of a forward pass need besides tensors, for other programs.
    pub fn parameters(&self) -> serde_json::Value {
        let Rope { theta, layout, dimensions, factors, linear_scale } = &self.rope;
        serde_json::json!({
            "architecture": self.architecture.name(),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope": {
                "theta": theta,
                "layout": layout.name(),
                "dimensions": dimensions,
                "factors": factors,
                "linear_scale": linear_scale,
            },
        })
    }

    /// The tensors that stand outside the blocks.
    pub(super) fn expected_globals(&self) -> Vec<Expected> {
        vec![
            expected("token_embd.weight", self.vocabulary, self.hidden, true),
            expected("output_norm.weight", 1, self.hidden, true),
            expected("output.weight", self.vocabulary, self.hidden, !self.tied_embeddings),
        ]
    }

    /// The tensors of one block.
    pub(super) fn expected_in_block(&self, layer: usize) -> Vec<Expected> {
        let queries = self.heads * self.head_dim;
        let keys = self.kv_heads * self.head_dim;
        let biased = self.architecture == Architecture::Qwen2;
        let mut tensors = vec![
            ("attn_norm.weight", 1, self.hidden, true),
            ("attn_q.weight", queries, self.hidden, true),
            ("attn_k.weight", keys, self.hidden, true),
            ("attn_v.weight", keys, self.hidden, true),
            ("attn_q.bias", 1, queries, biased),
            ("attn_k.bias", 1, keys, biased),
            ("attn_v.bias", 1, keys, biased),
            ("attn_output.weight", self.hidden, queries, true),
            ("ffn_norm.weight", 1, self.hidden, true),
            ("ffn_gate.weight", self.ffn, self.hidden, true),
            ("ffn_up.weight", self.ffn, self.hidden, true),
            ("ffn_down.weight", self.hidden, self.ffn, true),
        ];
        if self.architecture == Architecture::Qwen3 {
            tensors.push(("attn_q_norm.weight", 1, self.head_dim, true));
            tensors.push(("attn_k_norm.weight", 1, self.head_dim, true));
        }
        tensors
            .into_iter()
            .map(|(name, rows, width, required)| {
                expected(&format!("blk.{layer}.{name}"), rows, width, required)
            })
            .collect()
    }
}

fn expected(name: &str, rows: usize, width: usize, required: bool) -> Expected {
    Expected { name: name.to_owned(), rows, width, required }
}

/// Hyperparameters as written, whichever file they come from.
struct Raw {
    architecture: Architecture,
    layers: u64,
    hidden: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    rope_dimensions: u64,
    ffn: u64,
    vocabulary: u64,
    context_length: u64,
    rms_norm_eps: f64,
    theta: f64,
    layout: RopeLayout,
    factors: Option<Vec<f32>>,
    linear_scale: f64,
    tied_embeddings: bool,
}

impl Raw {
    fn check(self) -> Result<Config, Fault> {
        let size = |what: &str, value: u64, largest: u64| {
            if (1..=largest).contains(&value) {
                Ok(value as usize)
            } else {
                Err(Fault::malformed(
                    format!("its {what} is {value}, not between 1 and {largest}"),
                    FETCH_AGAIN,
                ))
            }
        };
        let config = Config {
            architecture: self.architecture,
            layers: size("number of blocks", self.layers, LARGEST_SIZE)?,
            hidden: size("hidden width", self.hidden, LARGEST_SIZE)?,
            heads: size("number of heads", self.heads, LARGEST_SIZE)?,
            kv_heads: size("number of key and value heads", self.kv_heads, LARGEST_SIZE)?,
            head_dim: size("head width", self.head_dim, LARGEST_HEAD)?,
            ffn: size("feed-forward width", self.ffn, LARGEST_SIZE)?,
            vocabulary: size("vocabulary", self.vocabulary, LARGEST_SIZE)?,
            context_length: size("context length", self.context_length, u32::MAX.into())?,
            rms_norm_eps: self.rms_norm_eps as f32,
            rope: Rope {
                theta: self.theta,
                layout: self.layout,
                dimensions: size("RoPE width", self.rope_dimensions, LARGEST_HEAD)?,
                factors: self.factors,
                linear_scale: self.linear_scale,
            },
            tied_embeddings: self.tied_embeddings,
        };
        config.check()?;
        Ok(config)
    }
}

impl Config {
    /// What must hold between the values.
    fn check(&self) -> Result<(), Fault> {
        let bad = |problem: String| Err(Fault::malformed(problem, FETCH_AGAIN));
        let Config { heads, kv_heads, head_dim, .. } = *self;
        if !heads.is_multiple_of(kv_heads) {
            return bad(format!("its {heads} heads do not share {kv_heads} key and value heads"));
        }
        if (heads * head_dim) as u64 > LARGEST_SIZE {
            return bad(format!("its {heads} heads of {head_dim} are too wide"));
        }
        if !head_dim.is_multiple_of(2) {
            return bad(format!("its head width {head_dim} is odd, so RoPE has no pairs"));
        }
        if self.rope.dimensions != head_dim {
            return Err(Fault::unsupported(
                format!("RoPE turns {} of a head's {head_dim} values", self.rope.dimensions),
                OTHER_MODEL,
            ));
        }
        positive("RMS norm epsilon", self.rms_norm_eps.into())?;
        positive("RoPE base", self.rope.theta)?;
        positive("RoPE scale", self.rope.linear_scale)?;
        self.check_factors()
    }

    /// RoPE's factors, which a GGUF keeps in a tensor and so come later.
    pub(super) fn check_factors(&self) -> Result<(), Fault> {
        let Some(factors) = &self.rope.factors else { return Ok(()) };
        if factors.len() != self.rope.dimensions / 2 {
            return Err(Fault::malformed(
                format!("{} RoPE factors for {} pairs", factors.len(), self.rope.dimensions / 2),
                FETCH_AGAIN,
            ));
        }
        factors.iter().try_for_each(|&factor| positive("RoPE factor", factor.into()))
    }
}

fn positive(what: &str, value: f64) -> Result<(), Fault> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Fault::malformed(format!("its {what} is {value}, not a positive number"), FETCH_AGAIN))
}

/// Reads the hyperparameters of a GGUF file. `vocabulary` is the number of rows
/// of the embedding and `tied` says that there is no output matrix: a GGUF tells
/// both by its tensors.
pub(super) fn from_gguf(
    header: &Header,
    file: &[u8],
    vocabulary: usize,
    tied: bool,
) -> Result<Config, Fault> {
    refuse_other_files(header, file)?;
    let name = header
        .text(file, "general.architecture")?
        .ok_or_else(|| missing_key("general.architecture"))?;
    let architecture = Architecture::from_name(name)?;
    let keys = Keys { header, prefix: architecture.name() };
    keys.refuse_unknown(file)?;
    let hidden = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let head_dim = match keys.optional("attention.key_length")? {
        Some(width) => width,
        None => exact_share(hidden, heads)?,
    };
    if let Some(values) = keys.optional("attention.value_length")?
        && values != head_dim
    {
        return Err(Fault::unsupported(
            format!("keys are {head_dim} wide, but values {values}"),
            OTHER_MODEL,
        ));
    }
    Raw {
        architecture,
        layers: keys.required("block_count")?,
        hidden,
        heads,
        kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        rope_dimensions: keys.optional("rope.dimension_count")?.unwrap_or(head_dim),
        ffn: keys.required("feed_forward_length")?,
        vocabulary: vocabulary as u64,
        context_length: keys.required("context_length")?,
        rms_norm_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| missing_key(&keys.full("attention.layer_norm_rms_epsilon")))?,
        theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
        layout: match architecture {
            Architecture::Llama => RopeLayout::Interleaved,
            Architecture::Qwen2 | Architecture::Qwen3 => RopeLayout::Halves,
        },
        factors: None,
        linear_scale: keys.linear_scale(file)?,
        tied_embeddings: tied,
    }
    .check()
}

/// Files that are GGUF, but no whole model.
fn refuse_other_files(header: &Header, file: &[u8]) -> Result<(), Fault> {
    if let Some(kind) = header.text(file, "general.type")?
        && kind != "model"
    {
        return Err(Fault::unsupported(
            format!("it holds a GGUF of type `{}`, not a model", shown(kind)),
            "give the language model's own file",
        ));
    }
    if header.unsigned("split.count")?.is_some_and(|parts| parts > 1) {
        return Err(Fault::unsupported(
            "it is one part of a split model",
            "join the parts with `llama-gguf-split --merge FIRST-PART OUTPUT`",
        ));
    }
    match header.unsigned("general.quantization_version")? {
        None | Some(2) => Ok(()),
        Some(version) => Err(Fault::unsupported(
            format!("its blocks have the quantization version {version}, not 2"),
            "quantize the model anew",
        )),
    }
}

fn missing_key(key: &str) -> Fault {
    Fault::malformed(format!("the metadata key `{key}` is missing"), FETCH_AGAIN)
}

fn exact_share(hidden: u64, heads: u64) -> Result<u64, Fault> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(Fault::malformed(
            format!("its {heads} heads do not share the hidden width {hidden}"),
            FETCH_AGAIN,
        ));
    }
    Ok(hidden / heads)
}

/// The keys under the architecture's name.
struct Keys<'a> {
    header: &'a Header,
    prefix: &'static str,
}

impl Keys<'_> {
    /// Keys that are read below, or that change no result.
    const UNDERSTOOD: [&'static str; 22] = [
        "vocab_size",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.causal",
        "attention.sliding_window",
        "expert_count",
        "expert_used_count",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scale_linear",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "tensor_data_layout",
    ];

    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn optional(&self, key: &str) -> Result<Option<u64>, Fault> {
        let key = self.full(key);
        match self.header.get(&key) {
            Some(Value::List { .. }) => {
                Err(Fault::unsupported(format!("`{key}` differs from block to block"), OTHER_MODEL))
            }
            _ => self.header.unsigned(&key),
        }
    }

    fn required(&self, key: &str) -> Result<u64, Fault> {
        self.optional(key)?.ok_or_else(|| missing_key(&self.full(key)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, Fault> {
        self.header.float(&self.full(key))
    }

    /// A key that nobody reads may be a feature that nobody computes.
    fn refuse_unknown(&self, file: &[u8]) -> Result<(), Fault> {
        let own = self
            .header
            .keys()
            .filter_map(|key| key.strip_prefix(self.prefix).and_then(|key| key.strip_prefix('.')));
        // YaRN and its relatives: their other keys follow from the type.
        self.linear_scale(file)?;
        for key in own {
            if !Self::UNDERSTOOD.contains(&key) {
                return Err(Fault::unsupported(
                    format!("what `{}` asks for is not computed", shown(&self.full(key))),
                    OTHER_MODEL,
                ));
            }
        }
        if self.optional("expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(Fault::unsupported("it is a mixture of experts", OTHER_MODEL));
        }
        if self.header.bool(&self.full("attention.causal"))? == Some(false) {
            return Err(Fault::unsupported("its attention is not causal", OTHER_MODEL));
        }
        refuse_window(
            self.optional("attention.sliding_window")?,
            self.optional("context_length")?.unwrap_or(u64::MAX),
        )
    }

    fn linear_scale(&self, file: &[u8]) -> Result<f64, Fault> {
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        match self.header.text(file, &self.full("rope.scaling.type"))? {
            Some("none") => Ok(1.0),
            // llama.cpp takes an absent type for linear and a zero for no scaling.
            None | Some("linear") => Ok(factor.filter(|&factor| factor != 0.0).unwrap_or(1.0)),
            Some(other) => Err(Fault::unsupported(
                format!("RoPE is scaled by the method `{}`", shown(other)),
                OTHER_MODEL,
            )),
        }
    }
}

/// A window as wide as the context hides nothing.
fn refuse_window(window: Option<u64>, context_length: u64) -> Result<(), Fault> {
    match window {
        Some(window) if window != 0 && window < context_length => Err(Fault::unsupported(
            format!("its attention slides over {window} of {context_length} positions"),
            OTHER_MODEL,
        )),
        _ => Ok(()),
    }
}

/// `config.json` as Hugging Face writes it; keys that change nothing are left out.
#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    hidden_size: u64,
    num_hidden_layers: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    intermediate_size: u64,
    vocab_size: u64,
    max_position_embeddings: u64,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    rope_parameters: Option<HfRope>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<serde_json::Value>,
    num_experts: Option<u64>,
    num_local_experts: Option<u64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
}

#[derive(Deserialize)]
struct HfRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; some files hold both.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

/// Reads the hyperparameters of a Hugging Face folder out of its `config.json`.
pub(super) fn from_hf(json: &[u8]) -> Result<Config, Fault> {
    let hf: HfConfig = serde_json::from_slice(json)
        .map_err(|error| Fault::malformed(format!("config.json: {error}"), FETCH_AGAIN))?;
    let architecture = Architecture::from_name(&hf.model_type)?;
    hf.refuse_uncomputed(architecture)?;
    let head_dim = match (hf.head_dim, architecture) {
        (Some(width), _) => width,
        // The default of transformers' Qwen3Config, whatever the hidden width.
        (None, Architecture::Qwen3) => 128,
        (None, _) => exact_share(hf.hidden_size, hf.num_attention_heads)?,
    };
    // Newer files keep theta and the scaling together in `rope_parameters`.
    let rope = hf.rope_parameters.as_ref().or(hf.rope_scaling.as_ref());
    let theta = match hf.rope_theta.or(rope.and_then(|rope| rope.rope_theta)) {
        Some(theta) => theta,
        None if hf.rope_parameters.is_some() => return Err(missing_key("rope_theta")),
        // The default of transformers' classes, and what the first Llama files mean.
        None => 10_000.0,
    };
    let (factors, linear_scale) = rope_scaling(rope, theta, head_dim)?;
    Raw {
        architecture,
        layers: hf.num_hidden_layers,
        hidden: hf.hidden_size,
        heads: hf.num_attention_heads,
        kv_heads: hf.num_key_value_heads.unwrap_or(hf.num_attention_heads),
        head_dim,
        rope_dimensions: head_dim,
        ffn: hf.intermediate_size,
        vocabulary: hf.vocab_size,
        context_length: hf.max_position_embeddings,
        rms_norm_eps: hf.rms_norm_eps,
        theta,
        layout: RopeLayout::Halves,
        factors,
        linear_scale,
        tied_embeddings: hf.tie_word_embeddings.unwrap_or(false),
    }
    .check()
}

impl HfConfig {
    fn refuse_uncomputed(&self, architecture: Architecture) -> Result<(), Fault> {
        let refuse = |problem: String| Err(Fault::unsupported(problem, OTHER_MODEL));
        if let Some(activation) = self.hidden_act.as_deref().filter(|&name| name != "silu") {
            return refuse(format!("its activation is `{}`, not `silu`", shown(activation)));
        }
        if let Some(share) = self.partial_rotary_factor.filter(|&share| share != 1.0) {
            return refuse(format!("RoPE turns {share} of each head"));
        }
        if self.quantization_config.is_some() {
            return refuse("its weights are quantized in a Hugging Face format".to_owned());
        }
        if self.num_experts.or(self.num_local_experts).is_some_and(|experts| experts > 0) {
            return refuse("it is a mixture of experts".to_owned());
        }
        if self.attn_logit_softcapping.or(self.final_logit_softcapping).is_some() {
            return refuse("its logits are soft-capped".to_owned());
        }
        if let Some(kind) = self.layer_types.iter().flatten().find(|&kind| kind != "full_attention")
        {
            return refuse(format!("it has layers of type `{}`", shown(kind)));
        }
        // Qwen's files name a window that they do not use.
        let used = self.use_sliding_window.unwrap_or(architecture == Architecture::Llama);
        refuse_window(self.sliding_window.filter(|_| used), self.max_position_embeddings)
    }
}

/// RoPE's factors and linear scale.
fn rope_scaling(
    rope: Option<&HfRope>,
    theta: f64,
    head_dim: u64,
) -> Result<(Option<Vec<f32>>, f64), Fault> {
    let Some(rope) = rope else { return Ok((None, 1.0)) };
    let required = |value: Option<f64>, key: &str| {
        value.ok_or_else(|| missing_key(&format!("rope_scaling.{key}")))
    };
    match rope.rope_type.as_deref().or(rope.r#type.as_deref()) {
        None | Some("default") => Ok((None, 1.0)),
        Some("linear") => Ok((None, required(rope.factor, "factor")?)),
        Some("llama3") => {
            let scaling = Llama3 {
                factor: required(rope.factor, "factor")?,
                low: required(rope.low_freq_factor, "low_freq_factor")?,
                high: required(rope.high_freq_factor, "high_freq_factor")?,
                context: required(
                    rope.original_max_position_embeddings,
                    "original_max_position_embeddings",
                )?,
            };
            Ok((Some(scaling.factors(theta, head_dim)?), 1.0))
        }
        Some(other) => Err(Fault::unsupported(
            format!("RoPE is scaled by the method `{}`", shown(other)),
            OTHER_MODEL,
        )),
    }
}

/// Llama 3.1's scaling: long waves are stretched by `factor`, short ones kept,
/// those between blended (`_compute_llama3_parameters` of transformers).
pub(super) struct Llama3 {
    pub factor: f64,
    pub low: f64,
    pub high: f64,
    pub context: f64,
}

impl Llama3 {
    /// The divisor of each pair's frequency.
    pub fn factors(&self, theta: f64, head_dim: u64) -> Result<Vec<f32>, Fault> {
        positive("RoPE base", theta)?;
        positive("RoPE scaling factor", self.factor)?;
        positive("low_freq_factor", self.low)?;
        positive("high_freq_factor - low_freq_factor", self.high - self.low)?;
        positive("original_max_position_embeddings", self.context)?;
        if head_dim > LARGEST_HEAD {
            return Err(Fault::malformed(format!("its head width is {head_dim}"), FETCH_AGAIN));
        }
        let pairs = head_dim / 2;
        Ok((0..pairs).map(|pair| self.factor_of(theta, pair as f64 / pairs as f64)).collect())
    }

    fn factor_of(&self, theta: f64, exponent: f64) -> f32 {
        let wavelength = 2.0 * PI * theta.powf(exponent);
        if wavelength < self.context / self.high {
            return 1.0;
        }
        if wavelength > self.context / self.low {
            return self.factor as f32;
        }
        let kept = (self.context / wavelength - self.low) / (self.high - self.low);
        (1.0 / ((1.0 - kept) / self.factor + kept)) as f32
    }
}
