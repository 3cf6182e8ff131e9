//! What a model's hyperparameters are, and which tensors they demand.
//!
//! Two raw forms, GGUF metadata and `config.json` (see `hf_config.rs`), become one
//! checked [`Config`]. A setting that the forward pass would silently ignore is refused
//! here, because a wrong result is worse than none. It knows no bytes of tensors.

use super::architecture::{
    Activation, Architecture, Biases, Gguf, Norms, Presence, QkNorms, RopeLayout,
};
use super::error::{FETCH_AGAIN, Fault, OTHER_MODEL, shown};
use super::gguf::{Header, Value};
use super::hf_config::Yarn;
use super::other_files;

/// Sizes above this are typing errors or attacks: the largest models stay far below.
pub(super) const LARGEST_SIZE: u64 = 1 << 24;
/// Experts of a block: the largest mixtures have hundreds.
const LARGEST_LIST: usize = 1 << 16;
/// The largest RoPE width; real heads have 64 to 256 values.
pub(super) const LARGEST_HEAD: u64 = 1 << 13;

/// Rotary position embedding: the angle of pair `i` at position `p` is
/// `p / linear_scale * theta^(-2i / dimensions) / factors[i]`, and sine and cosine are
/// multiplied by `magnitude`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// Which values form a pair.
    pub layout: RopeLayout,
    /// Values of a head that turn; the others stay.
    pub dimensions: usize,
    /// Whether these are the last ones of the head (latent attention), not the first.
    pub at_end: bool,
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

/// How a router's scores become weights of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouterScores {
    /// Softmax over all experts; those that are taken keep their shares.
    Softmax,
    /// Softmax over those that are taken alone, which is what softmax over all and a division by
    /// the sum of the taken ones comes to.
    SoftmaxOfTaken,
    /// The sigmoid of each.
    Sigmoid,
    /// The sigmoid of each, divided by the sum of those that are taken.
    SigmoidNormalised,
}

impl RouterScores {
    /// The name that requests to programs use.
    pub fn name(self) -> &'static str {
        match self {
            RouterScores::Softmax => "softmax",
            RouterScores::SoftmaxOfTaken => "softmax_of_taken",
            RouterScores::Sigmoid => "sigmoid",
            RouterScores::SigmoidNormalised => "sigmoid_normalised",
        }
    }
}

/// Which experts a token goes to, and with which weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Experts that each token goes to.
    pub used: usize,
    /// From scores to weights.
    pub scores: RouterScores,
    /// What weights are multiplied by.
    pub factor: f64,
    /// Groups that experts are in, of equal size; one where nothing is said.
    pub groups: usize,
    /// Groups that a token may go to: those with the largest sums of their two best scores.
    pub used_groups: usize,
}

/// A mixture of experts in the place of a feed-forward network.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// Width of each.
    pub ffn: usize,
    /// Which a token goes to.
    pub routing: Routing,
    /// Width of the network that all tokens go through beside; none where nothing is said.
    pub shared: Option<usize>,
    /// Whether a sigmoid of its own scales what the shared network returns.
    pub gates_shared: bool,
    /// Which blocks have experts; all of them where the list is empty.
    pub blocks: Vec<bool>,
}

/// Latent attention (MLA): queries, keys and values come out of narrow vectors, and a part of each
/// key is the same for all heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latent {
    /// Width of the vector that queries come out of; from the normed stream itself where none.
    pub queries: Option<usize>,
    /// Width of the vector that keys and values come out of.
    pub keys: usize,
    /// Values of each head of queries and keys that RoPE does not turn, its first ones.
    pub still: usize,
    /// Values that it turns; of keys they are the same for all heads.
    pub turned: usize,
    /// Width of a head of values.
    pub values: usize,
    /// What stands under the root in the norms of the narrow vectors.
    pub eps: f32,
}

/// Gated delta nets in the place of attention (Yang et al., arXiv 2412.06464): a state for each
/// head of values, which decays and is corrected at every token.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaNet {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of those of keys.
    pub value_heads: usize,
    /// Width of a head of queries and keys.
    pub key_dim: usize,
    /// Width of a head of values.
    pub value_dim: usize,
    /// Positions that the convolution before it reads, its own among them.
    pub taps: usize,
    /// Whether the file holds the logarithm of each head's rate of decay; else it holds the rate
    /// itself, less than zero.
    pub rates_are_logs: bool,
    /// Which blocks have one; the others have attention.
    pub blocks: Vec<bool>,
}

impl DeltaNet {
    /// The name within a block of the tensor of rates.
    pub fn rates(&self) -> &'static str {
        if self.rates_are_logs { "ssm_a_log.weight" } else { "ssm_a" }
    }

    /// Values that go through the convolution: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }
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
    /// Whether blocks have a norm before the feed-forward network.
    pub ffn_norm: Presence,
    /// Whether each head of queries and keys has a norm with a gain of its own.
    pub head_norms: Presence,
    /// Blocks whose attention sees a window.
    pub sliding: Sliding,
    /// Which blocks turn queries and keys; all of them where the list is empty.
    pub turned: Vec<bool>,
    /// What values are multiplied by.
    pub factors: Factors,
    /// Towards what values are bent.
    pub caps: Caps,
    /// A mixture of experts in the place of the feed-forward network.
    pub experts: Option<Experts>,
    /// Latent attention.
    pub latent: Option<Latent>,
    /// Gated delta nets.
    pub delta: Option<DeltaNet>,
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
                "at_end": rope.at_end,
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
            "norm": if self.architecture.takes_means_off() { "layer" } else { "rms" },
            "gated": self.architecture.is_gated(),
            "experts": self.experts.as_ref().map(|experts| serde_json::json!({
                "count": experts.count,
                "used": experts.routing.used,
                "scores": experts.routing.scores.name(),
                "factor": experts.routing.factor,
                "groups": experts.routing.groups,
                "used_groups": experts.routing.used_groups,
                "shared": experts.shared,
                "gates_shared": experts.gates_shared,
                "blocks": experts.blocks,
            })),
            "delta": self.delta.as_ref().map(|delta| serde_json::json!({
                "key_heads": delta.key_heads,
                "value_heads": delta.value_heads,
                "key_dim": delta.key_dim,
                "value_dim": delta.value_dim,
                "taps": delta.taps,
                "rates_are_logs": delta.rates_are_logs,
                "blocks": delta.blocks,
            })),
            "latent": self.latent.map(|latent| serde_json::json!({
                "queries": latent.queries,
                "keys": latent.keys,
                "still": latent.still,
                "turned": latent.turned,
                "values": latent.values,
                "norm_eps": latent.eps,
            })),
        })
    }

    /// Width of a head of values; of queries and keys it is `head_dim`.
    pub fn value_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.values)
    }

    /// The gated delta net of a block, where it has one and no attention.
    pub fn delta_of(&self, layer: usize) -> Option<&DeltaNet> {
        let has = |delta: &&DeltaNet| delta.blocks.get(layer).copied().unwrap_or(false);
        self.delta.as_ref().filter(has)
    }

    /// The mixture of experts of a block, where it has one.
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        let has = |experts: &&Experts| {
            experts.blocks.get(layer).copied().unwrap_or(experts.blocks.is_empty())
        };
        self.experts.as_ref().filter(has)
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
        let mut tensors = vec![
            expected("token_embd.weight", self.vocabulary, self.hidden, true),
            expected("output_norm.weight", 1, self.hidden, true),
            expected("output.weight", self.vocabulary, self.hidden, !self.tied_embeddings),
        ];
        if self.architecture.takes_means_off() {
            tensors.push(expected("output_norm.bias", 1, self.hidden, true));
        }
        tensors
    }

    /// The tensors of one block.
    pub(super) fn expected_in_block(&self, layer: usize) -> Vec<Expected> {
        let queries = self.heads * self.head_dim;
        let keys = self.kv_heads * self.head_dim;
        let mut tensors: Vec<(String, usize, usize, Presence)> = Vec::new();
        let mut push = |name: &str, rows: usize, width: usize, presence: Presence| {
            if presence != Presence::Never {
                tensors.push((name.to_owned(), rows, width, presence));
            }
        };
        let always = Presence::Always;
        let Biases { qkv, output, ffn } = self.biases;
        let norms = self.architecture.norms();
        let before = [("attn_norm", always), ("ffn_norm", self.ffn_norm)];
        for (name, presence) in before.into_iter().filter(|_| norms != Norms::After) {
            push(&format!("{name}.weight"), 1, self.hidden, presence);
            if self.architecture.takes_means_off() {
                push(&format!("{name}.bias"), 1, self.hidden, presence);
            }
        }
        if norms != Norms::Before {
            push("post_attention_norm.weight", 1, self.hidden, always);
            push("post_ffw_norm.weight", 1, self.hidden, always);
        }
        let delta = self.delta_of(layer);
        match self.latent {
            None if delta.is_some() => {}
            None => {
                let gates = if self.architecture.gates_attention() { queries } else { 0 };
                let all = [("attn_q", queries + gates), ("attn_k", keys), ("attn_v", keys)];
                for (name, rows) in all {
                    push(&format!("{name}.weight"), rows, self.hidden, always);
                    push(&format!("{name}.bias"), 1, rows, qkv);
                }
            }
            Some(latent) => {
                match latent.queries {
                    Some(width) => {
                        push("attn_q_a.weight", width, self.hidden, always);
                        push("attn_q_a.bias", 1, width, qkv);
                        push("attn_q_a_norm.weight", 1, width, always);
                        push("attn_q_b.weight", queries, width, always);
                    }
                    None => push("attn_q.weight", queries, self.hidden, always),
                }
                let narrow = latent.keys + latent.turned;
                push("attn_kv_a_mqa.weight", narrow, self.hidden, always);
                push("attn_kv_a_mqa.bias", 1, narrow, qkv);
                push("attn_kv_a_norm.weight", 1, latent.keys, always);
                let wide = self.heads * (latent.still + latent.values);
                push("attn_kv_b.weight", wide, latent.keys, always);
            }
        }
        match delta {
            Some(delta) => {
                let (heads, values) = (delta.value_heads, delta.value_heads * delta.value_dim);
                push("ssm_in.weight", delta.channels() + values, self.hidden, always);
                push("ssm_ba.weight", 2 * heads, self.hidden, always);
                push("ssm_conv1d.weight", delta.channels(), delta.taps, always);
                push(delta.rates(), 1, heads, always);
                push("ssm_dt.bias", 1, heads, always);
                push("ssm_norm.weight", 1, delta.value_dim, always);
                push("ssm_out.weight", self.hidden, values, always);
            }
            None => {
                push("attn_output.weight", self.hidden, self.heads * self.value_dim(), always);
                push("attn_output.bias", 1, self.hidden, output);
            }
        }
        if self.architecture.has_sinks() {
            push("attn_sinks.weight", 1, self.heads, always);
        }
        let widths = match self.architecture.qk_norms() {
            QkNorms::None => None,
            QkNorms::Heads => Some([self.head_dim; 2]),
            QkNorms::Rows => Some([queries, keys]),
        };
        if let Some([of_queries, of_keys]) = widths.filter(|_| delta.is_none()) {
            push("attn_q_norm.weight", 1, of_queries, always);
            push("attn_k_norm.weight", 1, of_keys, always);
        }
        push("attn_q_norm.weight", self.heads, self.head_dim, self.head_norms);
        push("attn_k_norm.weight", self.kv_heads, self.head_dim, self.head_norms);
        match self.experts_of(layer) {
            None => {
                if self.architecture.is_gated() {
                    push("ffn_gate.weight", self.ffn, self.hidden, always);
                    push("ffn_gate.bias", 1, self.ffn, ffn);
                }
                push("ffn_up.weight", self.ffn, self.hidden, always);
                push("ffn_up.bias", 1, self.ffn, ffn);
                push("ffn_down.weight", self.hidden, self.ffn, always);
                push("ffn_down.bias", 1, self.hidden, ffn);
            }
            Some(experts) => {
                push("ffn_gate_inp.weight", experts.count, self.hidden, always);
                push("ffn_gate_inp.bias", 1, experts.count, ffn);
                if matches!(
                    experts.routing.scores,
                    RouterScores::Sigmoid | RouterScores::SigmoidNormalised
                ) {
                    push("exp_probs_b.bias", 1, experts.count, always);
                }
                for expert in 0..experts.count {
                    for (name, rows, width) in [
                        ("ffn_gate_exps", experts.ffn, self.hidden),
                        ("ffn_up_exps", experts.ffn, self.hidden),
                        ("ffn_down_exps", self.hidden, experts.ffn),
                    ] {
                        push(&format!("{name}.{expert}.weight"), rows, width, always);
                        push(&format!("{name}.{expert}.bias"), 1, rows, ffn);
                    }
                }
                if let Some(width) = experts.shared {
                    push("ffn_gate_shexp.weight", width, self.hidden, always);
                    push("ffn_up_shexp.weight", width, self.hidden, always);
                    push("ffn_down_shexp.weight", self.hidden, width, always);
                }
                if experts.gates_shared {
                    push("ffn_gate_inp_shexp.weight", 1, self.hidden, always);
                }
            }
        }
        tensors
            .into_iter()
            .map(|(name, rows, width, presence)| {
                let required = presence == Presence::Always;
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
    pub ffn_norm: Presence,
    pub head_norms: Presence,
    pub window: Option<u64>,
    pub sliding: Vec<bool>,
    pub sliding_rope: Option<RawRope>,
    pub turned: Vec<bool>,
    pub factors: Factors,
    pub caps: Caps,
    pub experts: Option<Experts>,
    pub latent: Option<Latent>,
    pub delta: Option<DeltaNet>,
}

/// RoPE as written.
pub(super) struct RawRope {
    pub dimensions: u64,
    pub at_end: bool,
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
        let RawRope { magnitude, scaling, in_f32, at_end, .. } = self;
        if !(1..=LARGEST_HEAD).contains(&dimensions) || !dimensions.is_multiple_of(2) {
            return Err(Fault::malformed(
                format!(
                    "its RoPE width {dimensions}, of `head_dim` or of the key of its own, is no even \
                     number up to {LARGEST_HEAD}"
                ),
                FETCH_AGAIN,
            ));
        }
        positive("RoPE base", theta)?;
        positive("RoPE scale", linear_scale)?;
        positive("RoPE attention factor", magnitude)?;
        let dimensions = dimensions as usize;
        let rope = Rope {
            theta,
            layout,
            dimensions,
            at_end,
            factors,
            magnitude,
            linear_scale,
            scaling,
            in_f32,
        };
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
            ffn_norm: self.ffn_norm,
            head_norms: self.head_norms,
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
            // A list of all blocks says no more than none.
            experts: self.experts.map(|experts| match experts.blocks.contains(&false) {
                true => experts,
                false => Experts { blocks: Vec::new(), ..experts },
            }),
            latent: self.latent,
            delta: self.delta,
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
        if let Some(Experts { count, ffn, routing, shared, blocks, .. }) = &self.experts {
            let Routing { used, factor, groups, used_groups, .. } = *routing;
            if *count == 0 || *count > LARGEST_LIST || *ffn == 0 {
                return bad(format!("it has {count} experts of width {ffn}"));
            }
            if let Some(width) = shared.filter(|width| *width == 0 || *width > 1 << 24) {
                return bad(format!("the expert that all tokens share has width {width}"));
            }
            if groups == 0 || !count.is_multiple_of(groups) || used_groups == 0 {
                return bad(format!("its {count} experts do not fill {groups} groups"));
            }
            if used == 0 || used_groups > groups || used > used_groups * (count / groups) {
                return bad(format!(
                    "each token goes to {used} of {count} experts, in {used_groups} of {groups} \
                     groups"
                ));
            }
            if groups > 1 && count / groups < 2 {
                return bad(format!("its groups of experts have {} each", count / groups));
            }
            if !blocks.is_empty() && blocks.len() != self.layers {
                let (given, layers) = (blocks.len(), self.layers);
                return bad(format!(
                    "it says of {given} blocks whether they have experts, of {layers}"
                ));
            }
            positive("factor of the experts' weights", f64::from(factor as f32))?;
        }
        if let Some(Latent { queries, keys, still, turned, values, eps }) = self.latent {
            positive("norm epsilon", eps.into())?;
            for (what, width) in [
                ("q_lora_rank", queries.unwrap_or(1)),
                ("kv_lora_rank", keys),
                ("qk_nope_head_dim", still),
                ("qk_rope_head_dim", turned),
                ("v_head_dim", values),
            ] {
                if width == 0 || width > LARGEST_SIZE as usize {
                    return bad(format!("its {what} is {width}"));
                }
            }
            if kv_heads != heads {
                return bad(format!(
                    "latent attention has {heads} heads of queries and {kv_heads} of keys"
                ));
            }
        }
        if let Some(delta) = &self.delta {
            let DeltaNet { key_heads, value_heads, key_dim, value_dim, taps, blocks, .. } = delta;
            let all = [key_heads, value_heads, key_dim, value_dim, taps];
            if all.iter().any(|size| **size == 0 || **size > 1 << 16)
                || !value_heads.is_multiple_of(*key_heads)
                || blocks.len() != self.layers
            {
                return bad(format!(
                    "its delta nets have {key_heads} heads of {key_dim} keys, {value_heads} heads \
                     of {value_dim} values, a convolution over {taps} positions, and it says of {} \
                     blocks whether they have one",
                    blocks.len()
                ));
            }
        }
        positive("norm epsilon", self.rms_norm_eps.into())?;
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

/// The projection of queries of the first block.
pub(super) const FIRST_QUERIES: &str = "blk.0.attn_q.weight";

/// The architecture of a GGUF file, and what the file leaves unsaid.
pub(super) fn architecture_of(header: &Header, file: &[u8]) -> Result<(Gguf, Architecture), Fault> {
    let name = header
        .text(file, "general.architecture")?
        .ok_or_else(|| missing_key("general.architecture"))?;
    Architecture::of_gguf().find(|(known, _)| known.name == name).ok_or_else(|| {
        let names: Vec<&str> = Architecture::of_gguf().map(|(known, _)| known.name).collect();
        Fault::unsupported(
            format!("the architecture `{}` is unknown", shown(name)),
            format!("choose a GGUF file of one of these: {}", names.join(", ")),
        )
    })
}

/// Reads the hyperparameters of a GGUF file. `vocabulary` is the number of rows
/// of the embedding and `tied` says that there is no output matrix: a GGUF tells
/// both by its tensors. `queries` is the shape of the tensor [`FIRST_QUERIES`], where it has one.
pub(super) fn from_gguf(
    header: &Header,
    file: &[u8],
    vocabulary: usize,
    tied: bool,
    queries: Option<[usize; 2]>,
) -> Result<Config, Fault> {
    let (gguf, architecture) = architecture_of(header, file)?;
    let keys = Keys { header, file, gguf, architecture };
    keys.refuse_unknown(file)?;
    let layers = keys.required("block_count")?;
    keys.refuse_untold_width(queries)?;
    let experts = keys.experts(layers)?;
    let latent = keys.latent()?;
    let delta = keys.delta(layers)?;
    let architecture = match (architecture, &experts) {
        (Architecture::Llama, Some(_)) => Architecture::Mixtral,
        (other, _) => other,
    };
    let hidden = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let head_dim = match (latent, keys.optional("attention.key_length")?) {
        (Some(latent), _) => (latent.still + latent.turned) as u64,
        (None, Some(width)) => width,
        (None, None) => exact_share(hidden, heads)?,
    };
    if let Some(values) = keys.optional("attention.value_length")?
        && values != head_dim
        && latent.is_none()
    {
        return Err(Fault::unsupported(
            format!("keys are {head_dim} wide, but values {values}"),
            OTHER_MODEL,
        ));
    }
    let magnitude = match architecture {
        Architecture::Phi3 => keys.float("rope.scaling.attn_factor")?.unwrap_or(1.0),
        _ => 1.0,
    };
    let rope = |theta: f64, stretch: Stretch| -> Result<RawRope, Fault> {
        let dimensions = keys.optional("rope.dimension_count")?;
        let dimensions = match keys.gguf.turns_parts {
            true => dimensions.unwrap_or(head_dim),
            false => whole_head(dimensions, head_dim)?,
        };
        let (linear_scale, factors, magnitude) = match stretch {
            Stretch::Linear(scale) => (scale, None, magnitude),
            Stretch::Yarn(yarn) => {
                positive("RoPE base", theta)?;
                if dimensions > LARGEST_HEAD {
                    return Err(Fault::malformed(
                        format!("RoPE turns {dimensions} values of a head"),
                        FETCH_AGAIN,
                    ));
                }
                let (low, high) = yarn.bounds(theta, dimensions)?;
                // Of latent attention it is a factor of the scores.
                let magnitude = if latent.is_some() { 1.0 } else { yarn.magnitude(1.0) };
                (1.0, Some(yarn.factors(dimensions, low, high)), magnitude)
            }
        };
        Ok(RawRope {
            dimensions,
            at_end: latent.is_some(),
            theta,
            layout: keys.gguf.layout,
            factors,
            linear_scale,
            magnitude,
            scaling: None,
            in_f32: false,
        })
    };
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    let blocks = 0..layers.min(LARGEST_SIZE);
    let window = keys.optional("attention.sliding_window")?;
    let of_gemma = matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3);
    let slides = of_gemma || architecture == Architecture::GptOss;
    if slides && window == Some(0) {
        let key = keys.full("attention.sliding_window");
        return Err(Fault::malformed(format!("`{key}` is 0"), FETCH_AGAIN));
    }
    // What llama.cpp demands, or has no use for.
    if keys.gguf.needs_output && tied {
        return Err(Fault::malformed("`output.weight` is missing", FETCH_AGAIN));
    }
    if architecture == Architecture::Gemma2 && !tied {
        return Err(Fault::malformed(
            "it holds `output.weight`, and a gemma2's output matrix is its embedding",
            FETCH_AGAIN,
        ));
    }
    let (window, sliding, sliding_rope) = match architecture {
        // What llama.cpp does by itself: every other block, or five of six.
        Architecture::Gemma2 => {
            let every_other = blocks.clone().map(|block| block % 2 == 0).collect();
            (Some(window.unwrap_or(4096)), every_other, None)
        }
        Architecture::Gemma3 if window.is_some() => {
            let sliding = blocks.clone().map(|block| block % 6 != 5).collect();
            (window, sliding, Some(rope(10_000.0, Stretch::Linear(1.0))?))
        }
        Architecture::GptOss => {
            let window = keys.required("attention.sliding_window")?;
            (Some(window), blocks.clone().map(|block| block % 2 == 0).collect(), None)
        }
        _ => (None, Vec::new(), None),
    };
    let ffn = keys.optional("feed_forward_length")?;
    let ffn = match (ffn, &experts) {
        (Some(width), _) => width,
        (None, Some(experts)) => experts.ffn as u64,
        (None, None) => keys.required("feed_forward_length")?,
    };
    let eps_key = match architecture.takes_means_off() {
        true => "attention.layer_norm_epsilon",
        false => "attention.layer_norm_rms_epsilon",
    };
    let (mut factors, caps) = keys.factors(architecture, layers, hidden, heads, head_dim)?;
    if let Some(latent) = &latent {
        factors.scores = keys.latent_scale(file, latent)?;
    }
    let context_length = keys.required("context_length")?;
    let context_length = match (architecture, keys.optional("attention.sliding_window")?) {
        // llama.cpp computes no window in it, which is the same as long as nothing slides out.
        (Architecture::Phi3, Some(window)) if window > 0 => context_length.min(window),
        _ => context_length,
    };
    Raw {
        architecture,
        layers,
        hidden,
        heads,
        kv_heads: match latent {
            // One, as llama.cpp keeps them, is all of them.
            Some(_) => heads,
            None => keys.optional("attention.head_count_kv")?.unwrap_or(heads),
        },
        head_dim,
        rope: rope(theta, keys.stretch(file)?)?,
        ffn,
        vocabulary: vocabulary as u64,
        context_length,
        rms_norm_eps: keys.float(eps_key)?.ok_or_else(|| missing_key(&keys.full(eps_key)))?,
        tied_embeddings: tied,
        activation: keys.gguf.activation,
        biases: match keys.gguf.biases {
            // Experts have none but where it is said.
            open @ Biases { ffn: Presence::Open, .. } if experts.is_some() => {
                Biases { ffn: Presence::Never, ..open }
            }
            told => told,
        },
        // llama.cpp goes by the tensors in some.
        ffn_norm: if keys.gguf.has_norms_by_tensors { Presence::Open } else { Presence::Always },
        head_norms: if keys.gguf.has_norms_by_tensors { Presence::Open } else { Presence::Never },
        window,
        sliding,
        sliding_rope,
        // llama.cpp leaves every fourth block of it unturned, whatever the file says.
        turned: match architecture {
            Architecture::SmolLm3 => blocks.map(|block| (block + 1) % 4 != 0).collect(),
            _ => Vec::new(),
        },
        factors,
        caps,
        experts,
        latent,
        delta,
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

/// Keys under an architecture's name that change nothing, as long as they are of their type.
const WITHOUT_EFFECT: [&str; 5] = [
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
];

/// Whether a key of a GGUF file's metadata is known to change no value of a pass: what describes
/// the file, what is the vocabulary's, and what llama.cpp does not read.
#[cfg(test)]
pub(super) fn changes_nothing(key: &str) -> bool {
    let described = key.starts_with("general.") && key != "general.alignment";
    let own = key.split_once('.').is_some_and(|(architecture, key)| {
        // Of a stablelm whether there is a norm before its feed-forward network says it, and these
        // norms have an epsilon of another name.
        let of_norms = key == "attention.layer_norm_rms_epsilon";
        WITHOUT_EFFECT.contains(&key)
            || architecture == "stablelm" && (key == "use_parallel_residual" || of_norms)
            || architecture == "starcoder2" && of_norms
    });
    described || own || super::tokenizer::knows_key(key)
}

fn missing_key(key: &str) -> Fault {
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
    file: &'a [u8],
    gguf: Gguf,
    architecture: Architecture,
}

impl Keys<'_> {
    /// Keys that are read below.
    const UNDERSTOOD: [&'static str; 18] = [
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
    ];

    /// Keys that may be written for each block.
    const OF_EACH_BLOCK: [&'static str; 3] =
        ["attention.head_count", "attention.head_count_kv", "feed_forward_length"];

    /// Keys that say something of YaRN alone.
    const OF_YARN: [&'static str; 5] = [
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_log_multiplier",
    ];

    /// The mixture of experts, as llama.cpp computes it: of a llama and a qwen3moe the weights are
    /// divided by their sum, of a qwen2moe they are not.
    fn experts(&self, layers: u64) -> Result<Option<Experts>, Fault> {
        let count = self.optional("expert_count")?.unwrap_or(0).min(LARGEST_SIZE) as usize;
        let width = |key: &str| -> Result<usize, Fault> {
            Ok(self.required(key)?.min(LARGEST_SIZE + 1) as usize)
        };
        let shares = matches!(self.architecture, Architecture::Qwen2Moe | Architecture::Qwen3Next);
        let (ffn, scores) = match self.architecture {
            Architecture::Qwen2Moe
            | Architecture::Qwen3Moe
            | Architecture::GptOss
            | Architecture::DeepSeekV3
            | Architecture::Qwen3Next
                if count == 0 =>
            {
                return Err(missing_key(&self.full("expert_count")));
            }
            _ if count == 0 => return self.refuse_experts_of_none().map(|()| None),
            Architecture::Llama => ("feed_forward_length", RouterScores::SoftmaxOfTaken),
            Architecture::Qwen3Moe | Architecture::GptOss | Architecture::Qwen3Next => {
                ("expert_feed_forward_length", RouterScores::SoftmaxOfTaken)
            }
            Architecture::Qwen2Moe => ("expert_feed_forward_length", RouterScores::Softmax),
            Architecture::DeepSeekV3 => return self.experts_in_groups(layers, count).map(Some),
            _ => {
                return Err(Fault::unsupported(
                    format!(
                        "`{}` is {count}: it is a mixture of experts",
                        self.full("expert_count")
                    ),
                    OTHER_MODEL,
                ));
            }
        };
        let used = width("expert_used_count")?;
        Ok(Some(Experts {
            count,
            ffn: width(ffn)?,
            routing: Routing { used, scores, factor: 1.0, groups: 1, used_groups: 1 },
            shared: match shares {
                true => Some(width("expert_shared_feed_forward_length")?),
                false => None,
            },
            gates_shared: shares,
            blocks: Vec::new(),
        }))
    }

    /// The experts of a deepseek2: a softmax or sigmoids, in groups where the file says so, and one
    /// that all tokens share.
    fn experts_in_groups(&self, layers: u64, count: usize) -> Result<Experts, Fault> {
        let width = |key: &str| -> Result<usize, Fault> {
            Ok(self.required(key)?.min(LARGEST_SIZE + 1) as usize)
        };
        let normalises = self.header.bool(&self.full("expert_weights_norm"))?.unwrap_or(false);
        // Its first files do not say it.
        let scores = match (self.optional("expert_gating_func")?, normalises) {
            (None | Some(1), true) => RouterScores::SoftmaxOfTaken,
            (None | Some(1), false) => RouterScores::Softmax,
            (Some(2), true) => RouterScores::SigmoidNormalised,
            (Some(2), false) => RouterScores::Sigmoid,
            (Some(other), _) => {
                let key = self.full("expert_gating_func");
                return Err(Fault::unsupported(
                    format!("`{key}` is {other}, neither softmax (1) nor sigmoid (2)"),
                    OTHER_MODEL,
                ));
            }
        };
        let of_groups = |key: &str| -> Result<usize, Fault> {
            Ok(self.optional(key)?.unwrap_or(0).clamp(1, LARGEST_SIZE) as usize)
        };
        let groups = of_groups("expert_group_count")?;
        let used_groups = match groups {
            0 | 1 => of_groups("expert_group_used_count")?,
            _ => width("expert_group_used_count")?,
        };
        let by_softmax = matches!(scores, RouterScores::Softmax | RouterScores::SoftmaxOfTaken);
        if groups > 1 && by_softmax {
            let key = self.full("expert_group_count");
            return Err(Fault::unsupported(
                format!("`{key}` is {groups}, and its experts are chosen by a softmax"),
                OTHER_MODEL,
            ));
        }
        let first = self.optional("leading_dense_block_count")?.unwrap_or(0);
        let ffn = width("expert_feed_forward_length")?;
        Ok(Experts {
            count,
            ffn,
            routing: Routing {
                used: width("expert_used_count")?,
                scores,
                factor: self.float("expert_weights_scale")?.unwrap_or(1.0),
                groups,
                used_groups,
            },
            shared: Some(ffn.saturating_mul(width("expert_shared_count")?)),
            gates_shared: false,
            blocks: (0..layers.min(LARGEST_SIZE)).map(|block| block >= first).collect(),
        })
    }

    /// The delta nets of a qwen3next.
    fn delta(&self, layers: u64) -> Result<Option<DeltaNet>, Fault> {
        if self.architecture != Architecture::Qwen3Next {
            return Ok(None);
        }
        let size = |key: &str| -> Result<u64, Fault> { Ok(self.required(key)?.min(LARGEST_SIZE)) };
        let [key_heads, heads, width] =
            ["ssm.group_count", "ssm.time_step_rank", "ssm.state_size"].map(size);
        let (key_heads, heads, width) = (key_heads?, heads?, width?);
        let inner = self.required("ssm.inner_size")?;
        if inner != heads * width {
            let key = self.full("ssm.inner_size");
            let problem = format!("`{key}` is {inner}, and its {heads} heads have {width} values");
            return Err(Fault::malformed(problem, FETCH_AGAIN));
        }
        let interval = self.optional("full_attention_interval")?.unwrap_or(4);
        if interval == 0 {
            let key = self.full("full_attention_interval");
            return Err(Fault::malformed(format!("`{key}` is 0"), FETCH_AGAIN));
        }
        let blocks = 0..layers.min(LARGEST_SIZE);
        Ok(Some(DeltaNet {
            key_heads: key_heads as usize,
            value_heads: heads as usize,
            key_dim: width as usize,
            value_dim: width as usize,
            taps: size("ssm.conv_kernel")? as usize,
            rates_are_logs: false,
            blocks: blocks.map(|block| (block + 1) % interval != 0).collect(),
        }))
    }

    /// The latent attention of a deepseek2. Newer files name the widths of the heads apart from those
    /// that llama.cpp keeps of keys and values.
    fn latent(&self) -> Result<Option<Latent>, Fault> {
        if self.architecture != Architecture::DeepSeekV3 {
            return Ok(None);
        }
        let refused = |key: &str, given: u64, wanted: u64| {
            let key = self.full(key);
            Err(Fault::malformed(format!("`{key}` is {given}, not {wanted}"), FETCH_AGAIN))
        };
        let (keys, turned) =
            (self.required("attention.kv_lora_rank")?, self.required("rope.dimension_count")?);
        let of_heads = ["attention.key_length_mla", "attention.value_length_mla"];
        let [of_keys, of_values] = of_heads.map(|key| self.optional(key));
        let (whole, values) = match (of_keys?.filter(|w| *w > 0), of_values?.filter(|w| *w > 0)) {
            (Some(whole), Some(values)) => {
                for (key, wanted) in [
                    ("attention.head_count_kv", 1),
                    ("attention.key_length", keys.saturating_add(turned)),
                    ("attention.value_length", keys),
                ] {
                    match self.required(key)? {
                        given if given == wanted => {}
                        given => return refused(key, given, wanted),
                    }
                }
                (whole, values)
            }
            (None, None) => {
                let heads = self.required("attention.head_count")?;
                if let Some(given) =
                    self.optional("attention.head_count_kv")?.filter(|given| *given != heads)
                {
                    return refused("attention.head_count_kv", given, heads);
                }
                (self.required("attention.key_length")?, self.required("attention.value_length")?)
            }
            (Some(_), None) => return Err(missing_key(&self.full(of_heads[1]))),
            (None, Some(_)) => return Err(missing_key(&self.full(of_heads[0]))),
        };
        let Some(still) = whole.checked_sub(turned) else {
            return Err(Fault::malformed(
                format!("its heads have {whole} values, and RoPE turns {turned} of them"),
                FETCH_AGAIN,
            ));
        };
        let size = |width: u64| width.min(LARGEST_SIZE + 1) as usize;
        let queries = self.optional("attention.q_lora_rank")?.filter(|width| *width > 0);
        Ok(Some(Latent {
            queries: queries.map(size),
            keys: size(keys),
            still: size(still),
            turned: size(turned),
            values: size(values),
            eps: self.float("attention.layer_norm_rms_epsilon")?.unwrap_or(0.0) as f32,
        }))
    }

    /// What the scores of latent attention are multiplied by where YaRN stretches the context:
    /// the usual scale times the square of what the logarithm of the factor makes.
    fn latent_scale(&self, file: &[u8], latent: &Latent) -> Result<Option<f64>, Fault> {
        let key = "rope.scaling.yarn_log_multiplier";
        let multiplier = self.float(key)?;
        match self.stretch(file)? {
            Stretch::Linear(1.0) => Ok(None),
            Stretch::Linear(factor) => Err(Fault::unsupported(
                format!(
                    "its context is stretched {factor} times, and in this architecture that is done \
                     by YaRN alone"
                ),
                OTHER_MODEL,
            )),
            // Without it llama.cpp's versions turn by other magnitudes.
            Stretch::Yarn(_) if multiplier.is_none_or(|multiplier| multiplier == 0.0) => {
                Err(match multiplier {
                    None => missing_key(&self.full(key)),
                    Some(zero) => Fault::unsupported(
                        format!(
                            "`{}` is {zero}, with a context that YaRN stretches",
                            self.full(key)
                        ),
                        OTHER_MODEL,
                    ),
                })
            }
            Stretch::Yarn(yarn) => {
                let usual = 1.0 / ((latent.still + latent.turned) as f64).sqrt();
                let magnitude = 1.0 + multiplier.unwrap_or(0.0) * yarn.factor.ln();
                Ok(Some(usual * magnitude * magnitude))
            }
        }
    }

    /// What says how many experts a token goes to, where there are none: llama.cpp ends there.
    fn refuse_experts_of_none(&self) -> Result<(), Fault> {
        match self.optional("expert_used_count")?.filter(|used| *used > 0) {
            Some(used) => Err(Fault::malformed(
                format!("`{}` is {used}, and it has no experts", self.full("expert_used_count")),
                FETCH_AGAIN,
            )),
            None => Ok(()),
        }
    }

    /// Factors and caps, as llama.cpp reads or knows them.
    fn factors(
        &self,
        architecture: Architecture,
        layers: u64,
        hidden: u64,
        heads: u64,
        head_dim: u64,
    ) -> Result<(Factors, Caps), Fault> {
        let (mut factors, mut caps) = (Factors::default(), Caps::default());
        match architecture {
            Architecture::Gemma2 | Architecture::Gemma3 => {
                // The largest of both families scales scores by the share of a head, not its width.
                let largest = if architecture == Architecture::Gemma2 { 46 } else { 62 };
                let width = match layers == largest {
                    true => hidden as f64 / heads.max(1) as f64,
                    false => head_dim as f64,
                };
                positive("width of a head", width)?;
                factors.scores = Some(1.0 / width.sqrt());
                factors.embedding = Some((hidden as f64).sqrt());
                factors.embedding_is_held = true;
                // Where nothing is said llama.cpp takes these of a gemma2, and of a gemma3 none.
                if architecture == Architecture::Gemma2 {
                    let of_cap = |key: &str, usual: f64| -> Result<Option<f64>, Fault> {
                        Ok(Some(self.float(key)?.unwrap_or(usual)))
                    };
                    caps.logits = of_cap("final_logit_softcapping", 30.0)?;
                    caps.scores = of_cap("attn_logit_softcapping", 50.0)?;
                }
            }
            Architecture::Granite => {
                let other_than_one = |key: &str| -> Result<Option<f64>, Fault> {
                    Ok(self.float(key)?.filter(|factor| *factor != 1.0 && *factor != 0.0))
                };
                factors.embedding = other_than_one("embedding_scale")?;
                factors.residual = other_than_one("residual_scale")?;
                let divisor = self.float("logit_scale")?;
                let divisor = divisor.ok_or_else(|| missing_key(&self.full("logit_scale")))?;
                factors.logits_divisor = Some(divisor).filter(|divisor| *divisor != 1.0);
                // llama.cpp takes it for a switch of RoPE in this architecture.
                if self.header.bool(&self.full("rope.scaling.finetuned"))? == Some(false) {
                    return Err(Fault::unsupported(
                        "its `rope.scaling.finetuned` is false, and llama.cpp turns nothing then",
                        OTHER_MODEL,
                    ));
                }
                factors.scores = self.float("attention.scale")?.filter(|scale| *scale != 0.0);
            }
            _ => {}
        }
        Ok((factors, caps))
    }

    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.gguf.name)
    }

    fn optional(&self, key: &str) -> Result<Option<u64>, Fault> {
        let whole = self.full(key);
        match self.header.get(&whole) {
            Some(Value::List { .. }) if Self::OF_EACH_BLOCK.contains(&key) => {
                self.of_each_block(&whole).map(Some)
            }
            Some(Value::List { .. }) => Err(Fault::unsupported(
                format!("`{whole}` is an array, which may differ from block to block"),
                OTHER_MODEL,
            )),
            _ => self.header.unsigned(&whole),
        }
    }

    /// A value that is written for each block, and is the same in all.
    fn of_each_block(&self, key: &str) -> Result<u64, Fault> {
        let values = self.header.small_integers(self.file, key)?.unwrap_or_default();
        let blocks = self.required("block_count")?;
        if values.len() as u64 != blocks {
            return Err(Fault::malformed(
                format!("`{key}` has {} values for {blocks} blocks", values.len()),
                FETCH_AGAIN,
            ));
        }
        let first = values.first().copied().unwrap_or_default();
        if let Some((block, other)) = values.iter().enumerate().find(|(_, other)| **other != first)
        {
            return Err(Fault::unsupported(
                format!(
                    "`{key}` differs from block to block: {first}, and {other} in block {block}"
                ),
                OTHER_MODEL,
            ));
        }
        u64::try_from(first).map_err(|_| {
            Fault::malformed(format!("`{key}` is {first} for each block"), FETCH_AGAIN)
        })
    }

    /// Refuses heads whose width only their tensor tells: `queries` is the shape of the first block's
    /// projection of queries.
    fn refuse_untold_width(&self, queries: Option<[usize; 2]>) -> Result<(), Fault> {
        let (heads, hidden) =
            (self.required("attention.head_count")?, self.required("embedding_length")?);
        let key = "attention.key_length";
        let Some([rows, width]) = queries else { return Ok(()) };
        let rows = rows as u64;
        if self.header.get(&self.full(key)).is_some()
            || width as u64 != hidden
            || heads == 0
            || !rows.is_multiple_of(heads)
            || rows == hidden
        {
            return Ok(());
        }
        Err(Fault::malformed(
            format!(
                "`{}` is missing: its {heads} heads have {} values each by `{FIRST_QUERIES}`, and \
                 without the key they share the {hidden} of `{}`",
                self.full(key),
                rows / heads,
                self.full("embedding_length"),
            ),
            "write the key, and `attention.value_length`, into the file, or convert the model anew",
        ))
    }

    fn required(&self, key: &str) -> Result<u64, Fault> {
        self.optional(key)?.ok_or_else(|| missing_key(&self.full(key)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, Fault> {
        self.header.float(&self.full(key))
    }

    /// A key that nobody reads may be a feature that nobody computes.
    fn refuse_unknown(&self, file: &[u8]) -> Result<(), Fault> {
        let own = self.header.keys().filter_map(|key| {
            key.strip_prefix(self.gguf.name).and_then(|key| key.strip_prefix('.'))
        });
        // YaRN and its relatives: their other keys follow from the type.
        self.stretch(file)?;
        for key in own {
            if key.starts_with("classifier.") {
                return Err(Fault::unsupported(
                    format!("it has `{}`: {}", self.full(key), other_files::CLASSIFIER),
                    "give the language model that it was made of",
                ));
            }
            let known = Self::UNDERSTOOD.contains(&key) || WITHOUT_EFFECT.contains(&key);
            if !known && !self.gguf.keys.contains(&key) {
                return Err(Fault::unsupported(
                    format!("what `{}` asks for is not computed", shown(&self.full(key))),
                    OTHER_MODEL,
                ));
            }
        }
        // What must say what is computed. `use_parallel_residual` says nothing: llama.cpp goes by
        // whether there is a norm before the feed-forward network.
        for (key, known) in [
            ("expert_group_count", &[0, 1][..]),
            ("expert_group_used_count", &[0, 1]),
            // Softmax.
            ("expert_gating_func", &[1]),
            // Every other block slides.
            ("attention.sliding_window_pattern", &[2]),
        ] {
            // Of these its experts come in kinds.
            if self.architecture == Architecture::DeepSeekV3 && key.starts_with("expert_") {
                continue;
            }
            if let Some(other) = self.optional(key)?.filter(|value| !known.contains(value)) {
                let key = self.full(key);
                return Err(Fault::unsupported(format!("`{key}` is {other}"), OTHER_MODEL));
            }
        }
        let shared = self.optional("expert_shared_feed_forward_length")?;
        if let (Architecture::Qwen3Moe, Some(width)) =
            (self.architecture, shared.filter(|width| *width > 0))
        {
            let key = self.full("expert_shared_feed_forward_length");
            return Err(Fault::unsupported(
                format!("`{key}` is {width}: it has experts that all tokens share"),
                OTHER_MODEL,
            ));
        }
        if let Some(base) = self.float("rope.freq_base_swa")?.filter(|base| *base != 10_000.0) {
            return Err(Fault::unsupported(
                format!("`{}` is {base}, not 10000", self.full("rope.freq_base_swa")),
                OTHER_MODEL,
            ));
        }
        // The specification's word for no order of its own, and, of what converters permute, theirs for
        // rows of queries and keys whose neighbours turn together.
        let key = self.full("tensor_data_layout");
        match self.header.text(file, &key)? {
            None | Some("reference") => {}
            Some("Meta AI original pth") if self.gguf.permutes => {}
            Some(other) => {
                return Err(Fault::unsupported(
                    format!("`{key}` is `{}`, an order of rows that is not known", shown(other)),
                    "convert the model anew with llama.cpp's converter",
                ));
            }
        }
        // What becomes of the hidden states behind the last norm, as llama.cpp numbers it, changes none.
        let key = self.full("pooling_type");
        if let Some(other) = self.optional("pooling_type")?.filter(|kind| *kind > 4) {
            return Err(Fault::malformed(
                format!("`{key}` is {other}, no way of pooling (0 to 4)"),
                FETCH_AGAIN,
            ));
        }
        if self.header.bool(&self.full("attention.causal"))? == Some(false) {
            let key = self.full("attention.causal");
            return Err(Fault::unsupported(
                format!("`{key}` is false: its attention is not causal"),
                OTHER_MODEL,
            ));
        }
        if matches!(
            self.architecture,
            Architecture::Gemma2 | Architecture::Gemma3 | Architecture::Phi3 | Architecture::GptOss
        ) {
            return Ok(());
        }
        refuse_window(
            self.optional("attention.sliding_window")?,
            self.optional("context_length")?.unwrap_or(u64::MAX),
        )
    }

    /// How the context is stretched.
    fn stretch(&self, file: &[u8]) -> Result<Stretch, Fault> {
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        // llama.cpp takes a zero for no scaling.
        let factor = factor.filter(|&factor| factor != 0.0).unwrap_or(1.0);
        let kind = self.header.text(file, &self.full("rope.scaling.type"))?;
        let given = |key: &&str| self.header.get(&self.full(key)).is_some();
        let of_yarn = Self::OF_YARN.iter().find(|key| given(key) && self.gguf.keys.contains(key));
        if let Some(key) = of_yarn.filter(|_| kind != Some("yarn")) {
            return Err(Fault::unsupported(
                format!("it has `{}`, and its `rope.scaling.type` is not `yarn`", self.full(key)),
                OTHER_MODEL,
            ));
        }
        match kind {
            Some("none") => Ok(Stretch::Linear(1.0)),
            // And an absent type for linear.
            None | Some("linear") => Ok(Stretch::Linear(factor)),
            Some("yarn")
                if matches!(self.architecture, Architecture::GptOss | Architecture::DeepSeekV3) =>
            {
                // Its versions differ on what turns faster than the model was trained for.
                if factor < 1.0 {
                    let key = self.full("rope.scaling.factor");
                    return Err(Fault::malformed(
                        format!("`{key}` is {factor}, and YaRN stretches by 1 or more"),
                        FETCH_AGAIN,
                    ));
                }
                for key in ["rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"] {
                    if let Some(other) = self.float(key)?.filter(|value| *value != 1.0) {
                        return Err(Fault::unsupported(
                            format!("`{}` is {other}, not 1", self.full(key)),
                            OTHER_MODEL,
                        ));
                    }
                }
                let original = match self.optional("rope.scaling.original_context_length")? {
                    Some(positions) => positions,
                    None => self.required("context_length")?,
                };
                positive("rope.scaling.original_context_length", original as f64)?;
                let turns = |key: &str, usual: f64| -> Result<f64, Fault> {
                    Ok(self.float(key)?.unwrap_or(usual))
                };
                Ok(Stretch::Yarn(Yarn {
                    factor,
                    original: original as f64,
                    fast: turns("rope.scaling.yarn_beta_fast", 32.0)?,
                    slow: turns("rope.scaling.yarn_beta_slow", 1.0)?,
                    // Whatever the original's config said.
                    truncate: true,
                }))
            }
            Some(other) => Err(Fault::unsupported(
                format!("RoPE is scaled by the method `{}`", shown(other)),
                OTHER_MODEL,
            )),
        }
    }
}

/// How a GGUF file's context is stretched.
enum Stretch {
    /// All frequencies by the same factor.
    Linear(f64),
    /// Slow frequencies more than fast ones.
    Yarn(Yarn),
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
