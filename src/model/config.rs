//! What a model's hyperparameters are, and which tensors they demand.
//!
//! Two raw forms, GGUF metadata and `config.json` (see `hf_config.rs`), become one
//! checked [`Config`]. A setting that the forward pass would silently ignore is refused
//! here, because a wrong result is worse than none. It knows no bytes of tensors.

use super::error::{FETCH_AGAIN, Fault, OTHER_MODEL, shown};
use super::gguf::{Header, Value};

/// Sizes above this are typing errors or attacks: the largest dense models stay far below.
pub(super) const LARGEST_SIZE: u64 = 1 << 24;
/// The largest RoPE width; real heads have 64 to 256 values.
pub(super) const LARGEST_HEAD: u64 = 1 << 13;

/// The family of a model: which tensors it has and how they are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Architecture {
    /// Llama, SmolLM2 and relatives.
    Llama,
    /// Qwen2 and Qwen2.5: biases on Q, K and V.
    Qwen2,
    /// Qwen3: RMS norms on every head's Q and K.
    Qwen3,
    /// Mistral: a window in every block.
    Mistral,
    /// Phi 3: fused projections, RoPE on a part of each head.
    Phi3,
    /// Gemma 2: norms before and after, soft caps, a window in every other block.
    Gemma2,
    /// Gemma 3, its text part: norms of Q and K, two RoPEs.
    Gemma3,
    /// OLMo 2: norms after attention and feed-forward alone, norms of whole Q and K.
    Olmo2,
    /// Granite: four factors.
    Granite,
    /// SmolLM3: blocks without RoPE.
    SmolLm3,
    /// GLM 4: norms before and after, RoPE on neighbours in a part of each head.
    Glm4,
}

/// Where a block has norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Norms {
    /// Before attention and feed-forward.
    Before,
    /// After them.
    After,
    /// Both.
    Both,
}

/// Which norms queries and keys have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QkNorms {
    /// None.
    None,
    /// Over each head.
    Heads,
    /// Over all heads together.
    Rows,
}

impl Architecture {
    /// The name that GGUF and `config.json` use.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Mistral => "mistral",
            Architecture::Phi3 => "phi3",
            Architecture::Gemma2 => "gemma2",
            Architecture::Gemma3 => "gemma3_text",
            Architecture::Olmo2 => "olmo2",
            Architecture::Granite => "granite",
            Architecture::SmolLm3 => "smollm3",
            Architecture::Glm4 => "glm4",
        }
    }

    /// All that a Hugging Face folder may hold.
    pub const ALL: [Architecture; 11] = [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Mistral,
        Architecture::Phi3,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::Olmo2,
        Architecture::Granite,
        Architecture::SmolLm3,
        Architecture::Glm4,
    ];
    /// Those that a GGUF file may hold.
    const OF_GGUF: [Architecture; 3] =
        [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3];

    pub(super) fn from_name(name: &str, known: &[Architecture]) -> Result<Architecture, Fault> {
        known.iter().copied().find(|architecture| architecture.name() == name).ok_or_else(|| {
            let names: Vec<&str> = known.iter().map(|architecture| architecture.name()).collect();
            Fault::unsupported(
                format!("the architecture `{}` is unknown", shown(name)),
                format!("choose a model of one of these: {}", names.join(", ")),
            )
        })
    }

    pub(super) fn norms(self) -> Norms {
        match self {
            Architecture::Olmo2 => Norms::After,
            Architecture::Gemma2 | Architecture::Gemma3 | Architecture::Glm4 => Norms::Both,
            _ => Norms::Before,
        }
    }

    pub(super) fn qk_norms(self) -> QkNorms {
        match self {
            Architecture::Qwen3 | Architecture::Gemma3 => QkNorms::Heads,
            Architecture::Olmo2 => QkNorms::Rows,
            _ => QkNorms::None,
        }
    }

    /// Whether transformers' norms round once, after the gain.
    pub fn rounds_norms_late(self) -> bool {
        matches!(self, Architecture::Olmo2) || self.gains_less_one()
    }

    /// Whether a Hugging Face folder holds the gains of norms less one.
    pub(super) fn gains_less_one(self) -> bool {
        matches!(self, Architecture::Gemma2 | Architecture::Gemma3)
    }
}

/// The function before the product of a gated feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU by the hyperbolic tangent.
    GeluTanh,
}

impl Activation {
    /// The name that requests to programs use.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_tanh",
        }
    }
}

/// Whether projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// They must not.
    Never,
    /// The tensors tell.
    Open,
    /// They must.
    Always,
}

impl Presence {
    /// What a setting says.
    pub(super) fn of(flag: bool) -> Presence {
        if flag { Presence::Always } else { Presence::Never }
    }
}

/// Which projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Those of queries, keys and values.
    pub qkv: Presence,
    /// That of attention's output.
    pub output: Presence,
    /// Those of the feed-forward network.
    pub ffn: Presence,
}

/// Which two values of a head RoPE turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Values `2i` and `2i + 1`: GGUF files of llama models.
    Interleaved,
    /// Values `i` and `i + dimensions / 2`: qwen2, qwen3 and Hugging Face folders but glm4.
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
/// `p / linear_scale * theta^(-2i / dimensions) / factors[i]`, and sine and cosine are
/// multiplied by `magnitude`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// Which values form a pair.
    pub layout: RopeLayout,
    /// Values of a head that turn, its first ones; the others stay.
    pub dimensions: usize,
    /// Divisors of the frequencies, `dimensions / 2` of them (`rope_freqs.weight`).
    pub factors: Option<Vec<f32>>,
    /// What sine and cosine are multiplied by; 1 but for YaRN and LongRoPE.
    pub magnitude: f64,
    /// Divisor of the positions; 1 where the context is not stretched.
    pub linear_scale: f64,
    /// How a folder's config stretches frequencies: what `factors`, `linear_scale` and
    /// `magnitude` came from. Engines compute it in steps of their own.
    pub scaling: Option<Scaling>,
    /// Whether transformers' own code turns in f32, whatever the type of the stream (OLMo 2).
    pub in_f32: bool,
}

/// A method that stretches RoPE's frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// All by the same factor.
    Linear(f64),
    /// Long waves by `factor`, short ones not, those between blended.
    Llama3 {
        /// The stretch of long waves.
        factor: f64,
        /// Waves in the first context from which on one is long.
        low: f64,
        /// And up to which it is short.
        high: f64,
        /// Positions of the first context.
        context: f64,
    },
    /// From pair `low` to pair `high` more and more, up to `factor`.
    Yarn {
        /// The stretch.
        factor: f64,
        /// The last pair that is kept.
        low: f64,
        /// The first one that is stretched whole.
        high: f64,
    },
    /// Each by a factor of its own.
    Long,
}

impl Rope {
    /// Whether frequencies follow from the base alone.
    pub fn is_plain(&self) -> bool {
        self.factors.is_none() && self.linear_scale == 1.0 && self.magnitude == 1.0
    }
}

/// What blocks do that are not like all others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sliding {
    /// Positions that a query sees in a sliding block, its own among them.
    pub window: Option<usize>,
    /// Which blocks slide; all of them where the list is empty.
    pub blocks: Vec<bool>,
    /// RoPE of the sliding blocks, where it is another.
    pub rope: Option<Rope>,
}

/// What the values of a pass are multiplied by, beside weights; 1 where nothing is said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Factors {
    /// Embedded tokens.
    pub embedding: Option<f64>,
    /// Whether engines hold that factor as a value of the stream's type (Gemma).
    pub embedding_is_held: bool,
    /// What is added to the residual stream.
    pub residual: Option<f64>,
    /// Scores, in the place of `1 / sqrt(head_dim)`.
    pub scores: Option<f64>,
    /// What logits are divided by.
    pub logits_divisor: Option<f64>,
}

/// Limits towards which values are bent: `cap tanh(x / cap)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Caps {
    /// Of scores.
    pub scores: Option<f64>,
    /// Of logits.
    pub logits: Option<f64>,
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
    /// The feed-forward network's function.
    pub activation: Activation,
    /// Which projections have biases.
    pub biases: Biases,
    /// Blocks whose attention sees a window.
    pub sliding: Sliding,
    /// Which blocks turn queries and keys; all of them where the list is empty.
    pub turned: Vec<bool>,
    /// What values are multiplied by.
    pub factors: Factors,
    /// Towards what values are bent.
    pub caps: Caps,
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
        let rope = |rope: &Rope| {
            let Rope { theta, layout, dimensions, factors, linear_scale, magnitude, .. } = rope;
            serde_json::json!({
                "theta": theta,
                "layout": layout.name(),
                "dimensions": dimensions,
                "factors": factors,
                "linear_scale": linear_scale,
                "magnitude": magnitude,
            })
        };
        let Sliding { window, blocks, rope: of_sliding } = &self.sliding;
        serde_json::json!({
            "architecture": self.architecture.name(),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope": rope(&self.rope),
            "activation": self.activation.name(),
            "sliding": {
                "window": window,
                "blocks": blocks,
                "rope": of_sliding.as_ref().map(rope),
            },
            "turned": self.turned,
            "factors": {
                "embedding": self.factors.embedding,
                "residual": self.factors.residual,
                "scores": self.factors.scores,
                "logits_divisor": self.factors.logits_divisor,
            },
            "caps": { "scores": self.caps.scores, "logits": self.caps.logits },
        })
    }

    /// Whether a block's attention sees a window.
    fn slides(&self, layer: usize) -> bool {
        let Sliding { window, blocks, .. } = &self.sliding;
        window.is_some() && blocks.get(layer).copied().unwrap_or(blocks.is_empty())
    }

    /// How many positions a query sees in a block, its own among them; all where nothing is said.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.sliding.window.filter(|_| self.slides(layer))
    }

    /// RoPE of a block; nothing where it turns nothing.
    pub fn rope_of(&self, layer: usize) -> Option<&Rope> {
        if !self.turned.get(layer).copied().unwrap_or(true) {
            return None;
        }
        let of_sliding = self.sliding.rope.as_ref().filter(|_| self.slides(layer));
        Some(of_sliding.unwrap_or(&self.rope))
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
        let mut tensors = Vec::new();
        let norms = self.architecture.norms();
        if norms != Norms::After {
            tensors.push(("attn_norm.weight", 1, self.hidden, true));
            tensors.push(("ffn_norm.weight", 1, self.hidden, true));
        }
        if norms != Norms::Before {
            tensors.push(("post_attention_norm.weight", 1, self.hidden, true));
            tensors.push(("post_ffw_norm.weight", 1, self.hidden, true));
        }
        tensors.extend([
            ("attn_q.weight", queries, self.hidden, true),
            ("attn_k.weight", keys, self.hidden, true),
            ("attn_v.weight", keys, self.hidden, true),
            ("attn_output.weight", self.hidden, queries, true),
            ("ffn_gate.weight", self.ffn, self.hidden, true),
            ("ffn_up.weight", self.ffn, self.hidden, true),
            ("ffn_down.weight", self.hidden, self.ffn, true),
        ]);
        let Biases { qkv, output, ffn } = self.biases;
        let biases = [
            ("attn_q.bias", queries, qkv),
            ("attn_k.bias", keys, qkv),
            ("attn_v.bias", keys, qkv),
            ("attn_output.bias", self.hidden, output),
            ("ffn_gate.bias", self.ffn, ffn),
            ("ffn_up.bias", self.ffn, ffn),
            ("ffn_down.bias", self.hidden, ffn),
        ];
        let biases = biases.into_iter().filter(|(.., presence)| *presence != Presence::Never);
        tensors.extend(
            biases.map(|(name, width, presence)| (name, 1, width, presence == Presence::Always)),
        );
        let widths = match self.architecture.qk_norms() {
            QkNorms::None => None,
            QkNorms::Heads => Some([self.head_dim; 2]),
            QkNorms::Rows => Some([queries, keys]),
        };
        if let Some([of_queries, of_keys]) = widths {
            tensors.push(("attn_q_norm.weight", 1, of_queries, true));
            tensors.push(("attn_k_norm.weight", 1, of_keys, true));
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
pub(super) struct Raw {
    pub architecture: Architecture,
    pub layers: u64,
    pub hidden: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    pub rope: RawRope,
    pub ffn: u64,
    pub vocabulary: u64,
    pub context_length: u64,
    pub rms_norm_eps: f64,
    pub tied_embeddings: bool,
    pub activation: Activation,
    pub biases: Biases,
    pub window: Option<u64>,
    pub sliding: Vec<bool>,
    pub sliding_rope: Option<RawRope>,
    pub turned: Vec<bool>,
    pub factors: Factors,
    pub caps: Caps,
}

/// RoPE as written.
pub(super) struct RawRope {
    pub dimensions: u64,
    pub theta: f64,
    pub layout: RopeLayout,
    pub factors: Option<Vec<f32>>,
    pub linear_scale: f64,
    pub magnitude: f64,
    pub scaling: Option<Scaling>,
    pub in_f32: bool,
}

impl RawRope {
    fn check(self) -> Result<Rope, Fault> {
        let RawRope { dimensions, theta, layout, factors, linear_scale, .. } = self;
        let RawRope { magnitude, scaling, in_f32, .. } = self;
        if !(1..=LARGEST_HEAD).contains(&dimensions) || !dimensions.is_multiple_of(2) {
            return Err(Fault::malformed(
                format!("its RoPE width {dimensions} is no even number up to {LARGEST_HEAD}"),
                FETCH_AGAIN,
            ));
        }
        positive("RoPE base", theta)?;
        positive("RoPE scale", linear_scale)?;
        positive("RoPE attention factor", magnitude)?;
        let dimensions = dimensions as usize;
        let rope =
            Rope { theta, layout, dimensions, factors, magnitude, linear_scale, scaling, in_f32 };
        rope.check_factors()?;
        Ok(rope)
    }
}

impl Raw {
    pub(super) fn check(self) -> Result<Config, Fault> {
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
            rope: self.rope.check()?,
            tied_embeddings: self.tied_embeddings,
            activation: self.activation,
            biases: self.biases,
            sliding: Sliding {
                window: self
                    .window
                    .map(|window| size("window", window, u32::MAX.into()))
                    .transpose()?,
                blocks: self.sliding,
                rope: self.sliding_rope.map(RawRope::check).transpose()?,
            },
            turned: self.turned,
            factors: self.factors,
            caps: self.caps,
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
        for rope in [Some(&self.rope), self.sliding.rope.as_ref()].into_iter().flatten() {
            if rope.dimensions > head_dim {
                return bad(format!(
                    "RoPE turns {} of a head's {head_dim} values",
                    rope.dimensions
                ));
            }
        }
        for (what, blocks) in [("window", &self.sliding.blocks), ("RoPE", &self.turned)] {
            if !blocks.is_empty() && blocks.len() != self.layers {
                let (count, layers) = (blocks.len(), self.layers);
                return bad(format!(
                    "it says of {count} blocks whether they have {what}, of {layers}"
                ));
            }
        }
        positive("RMS norm epsilon", self.rms_norm_eps.into())?;
        let Factors { embedding, residual, scores, logits_divisor, .. } = self.factors;
        let Caps { scores: score_cap, logits: logit_cap } = self.caps;
        for (what, value) in [
            ("factor of the embedding", embedding),
            ("factor of the residual stream", residual),
            ("factor of the scores", scores),
            ("divisor of the logits", logits_divisor),
            ("soft cap of the scores", score_cap),
            ("soft cap of the logits", logit_cap),
        ] {
            // Arms compute in f32.
            value.map_or(Ok(()), |value| positive(what, f64::from(value as f32)))?;
        }
        Ok(())
    }
}

impl Rope {
    /// The factors, which a GGUF keeps in a tensor and so come later.
    pub(super) fn check_factors(&self) -> Result<(), Fault> {
        let Some(factors) = &self.factors else { return Ok(()) };
        if factors.len() != self.dimensions / 2 {
            return Err(Fault::malformed(
                format!("{} RoPE factors for {} pairs", factors.len(), self.dimensions / 2),
                FETCH_AGAIN,
            ));
        }
        factors.iter().try_for_each(|&factor| positive("RoPE factor", factor.into()))
    }
}

pub(super) fn positive(what: &str, value: f64) -> Result<(), Fault> {
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
    let architecture = Architecture::from_name(name, &Architecture::OF_GGUF)?;
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
        rope: RawRope {
            dimensions: whole_head(keys.optional("rope.dimension_count")?, head_dim)?,
            theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
            layout: match architecture {
                Architecture::Llama => RopeLayout::Interleaved,
                _ => RopeLayout::Halves,
            },
            factors: None,
            linear_scale: keys.linear_scale(file)?,
            magnitude: 1.0,
            scaling: None,
            in_f32: false,
        },
        ffn: keys.required("feed_forward_length")?,
        vocabulary: vocabulary as u64,
        context_length: keys.required("context_length")?,
        rms_norm_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| missing_key(&keys.full("attention.layer_norm_rms_epsilon")))?,
        tied_embeddings: tied,
        activation: Activation::Silu,
        biases: Biases {
            qkv: match architecture {
                Architecture::Qwen2 => Presence::Always,
                _ => Presence::Open,
            },
            output: Presence::Open,
            ffn: Presence::Open,
        },
        window: None,
        sliding: Vec::new(),
        sliding_rope: None,
        turned: Vec::new(),
        factors: Factors::default(),
        caps: Caps::default(),
    }
    .check()
}

/// The RoPE width of a GGUF file, whose heads turn as a whole.
fn whole_head(dimensions: Option<u64>, head_dim: u64) -> Result<u64, Fault> {
    match dimensions {
        Some(turned) if turned != head_dim => Err(Fault::unsupported(
            format!("RoPE turns {turned} of a head's {head_dim} values"),
            OTHER_MODEL,
        )),
        _ => Ok(head_dim),
    }
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

pub(super) fn missing_key(key: &str) -> Fault {
    Fault::malformed(format!("the metadata key `{key}` is missing"), FETCH_AGAIN)
}

pub(super) fn exact_share(hidden: u64, heads: u64) -> Result<u64, Fault> {
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
