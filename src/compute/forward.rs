//! The transformer, written once over the arms' ops.
//!
//! It knows the order of the ops and the names of the sites, not how an op is
//! computed. Which norms a block has is told by its tensors, the rest by the
//! model's config. What happens to a site's tensor is up to [`Sites`]: a recorder
//! keeps it, an anchor puts another arm's tensor in its place.

use super::call::{Call, Held};
use super::{AttentionShape, ComputeError, Pass, check_interrupt};
use crate::model::{Config, Model, Weight};
use crate::op::Site;
use crate::tensor::Tensor;

/// Receives every site's tensor, and says with which tensor the pass goes on.
pub trait Sites {
    /// Called once per site, in the order of the flow.
    fn visit(&mut self, site: Site, tensor: Tensor) -> Result<Tensor, ComputeError>;
}

/// Keys and values of the positions seen so far, per layer `[positions, kv_heads * head_dim]`.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    positions: usize,
}

impl KvCache {
    /// An empty cache for a model of this shape.
    pub fn new(config: &Config) -> KvCache {
        let width = config.kv_heads * config.head_dim;
        let layer = || (Tensor::zeros(0, width), Tensor::zeros(0, width));
        KvCache { layers: (0..config.layers).map(|_| layer()).collect(), positions: 0 }
    }

    /// Number of positions that the cache holds.
    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// The name of the tensor that makes the logits: `output`, or the embedding where they are tied.
pub fn output_weight(model: &Model) -> &'static str {
    if model.has("output.weight") { "output.weight" } else { "token_embd.weight" }
}

/// The attention of a block, of queries from that position on.
pub fn attention_of(config: &Config, layer: usize, first_position: usize) -> AttentionShape {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    AttentionShape {
        scale: config.factors.scores,
        window: config.window_of(layer),
        cap: config.caps.scores,
        ..AttentionShape::causal(heads, kv_heads, head_dim, first_position)
    }
}

/// One pass over `tokens`, which follow the positions that `cache` holds.
///
/// Every site is handed to `sites`; the logits of every token are returned,
/// `[tokens, vocabulary]`.
pub fn forward(
    model: &Model,
    pass: &dyn Pass,
    tokens: &[u32],
    cache: &mut KvCache,
    sites: &mut dyn Sites,
) -> Result<Tensor, ComputeError> {
    let config = model.config();
    let first_position = cache.positions;
    let positions = first_position + tokens.len();
    if positions > config.context_length {
        let context_length = config.context_length;
        return Err(ComputeError::Context { positions, context_length });
    }
    let mut flow = Flow { pass, sites };
    let weight = model.tensor("token_embd.weight")?;
    let mut stream = flow.make(Site("embed".to_owned()), &Call::Embed { weight, tokens })?;
    if let Some(factor) = config.factors.embedding {
        let held = match config.factors.embedding_is_held {
            true => Held::Stream,
            false => Held::Number,
        };
        let call = Call::Scale { x: &stream, factor, held };
        stream = flow.make(Site("embed_scaled".to_owned()), &call)?;
    }
    for layer in 0..config.layers {
        let block = Block { model, layer, first_position };
        stream = block.run(stream, &mut cache.layers[layer], &mut flow)?;
    }
    cache.positions = positions;
    let gain = model.tensor("output_norm.weight")?;
    let call = Call::RmsNorm { x: &stream, gain, eps: config.rms_norm_eps };
    let normed = flow.make(Site("output_norm".to_owned()), &call)?;
    let weight = model.tensor(output_weight(model))?;
    let mut names = super::flow::after_output(model).iter();
    let mut next = || Site(names.next().unwrap_or(&"logits").to_string());
    let mut logits = flow.make(next(), &Call::Matmul { x: &normed, weight, bias: None })?;
    if let Some(divisor) = config.factors.logits_divisor {
        let (factor, held) = (1.0 / divisor, Held::Divisor);
        logits = flow.make(next(), &Call::Scale { x: &logits, factor, held })?;
    }
    if let Some(cap) = config.caps.logits {
        logits = flow.make(next(), &Call::SoftCap { x: &logits, cap })?;
    }
    Ok(logits)
}

/// What computes a pass, and what becomes of its sites.
struct Flow<'a> {
    pass: &'a dyn Pass,
    sites: &'a mut dyn Sites,
}

impl Flow<'_> {
    /// The tensor with which the pass goes on after a site.
    fn make(&mut self, site: Site, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        check_interrupt()?;
        let tensor = self.pass.answer(&site, call)?;
        self.sites.visit(site, tensor)
    }
}

/// One transformer block.
struct Block<'a> {
    model: &'a Model,
    layer: usize,
    first_position: usize,
}

impl Block<'_> {
    fn run(
        &self,
        stream: Tensor,
        cache: &mut (Tensor, Tensor),
        flow: &mut Flow<'_>,
    ) -> Result<Tensor, ComputeError> {
        let config = self.model.config();
        let mut make = |name: &str, call: &Call<'_>| {
            flow.make(Site(format!("blk.{}.{name}", self.layer)), call)
        };

        let normed = self.norm("attn_norm", &stream)?.map(|call| make("attn_norm", &call));
        let normed = normed.transpose()?;
        let x = normed.as_ref().unwrap_or(&stream);
        let mut q = make("q", &self.project("attn_q", x)?)?;
        let mut k = make("k", &self.project("attn_k", x)?)?;
        let v = make("v", &self.project("attn_v", x)?)?;
        if let Some(call) = self.norm("attn_q_norm", &q)? {
            q = make("q_norm", &call)?;
        }
        if let Some(call) = self.norm("attn_k_norm", &k)? {
            k = make("k_norm", &call)?;
        }
        if let Some(rope) = config.rope_of(self.layer) {
            let (head_dim, first_position) = (config.head_dim, self.first_position);
            let turn = |x| Call::Rope { x, rope, head_dim, first_position };
            let turned = make("q_rope", &turn(&q))?;
            k = make("k_rope", &turn(&k))?;
            q = turned;
        }
        append(&mut cache.0, &k);
        append(&mut cache.1, &v);

        let shape = attention_of(config, self.layer, self.first_position);
        let mut branch = make("attn", &Call::Attention { q: &q, k: &cache.0, v: &cache.1, shape })?;
        branch = make("attn_out", &self.project("attn_output", &branch)?)?;
        if let Some(call) = self.norm("post_attention_norm", &branch)? {
            branch = make("attn_post_norm", &call)?;
        }
        if let Some(factor) = config.factors.residual {
            branch = make("attn_scaled", &Call::Scale { x: &branch, factor, held: Held::Number })?;
        }
        let stream = make("attn_residual", &Call::Add { a: &stream, b: &branch })?;

        let normed = self.norm("ffn_norm", &stream)?.map(|call| make("ffn_norm", &call));
        let normed = normed.transpose()?;
        let x = normed.as_ref().unwrap_or(&stream);
        let gate = make("ffn_gate", &self.project("ffn_gate", x)?)?;
        let up = make("ffn_up", &self.project("ffn_up", x)?)?;
        let activation = config.activation;
        let activated = make("ffn_swiglu", &Call::Gated { gate: &gate, up: &up, activation })?;
        let mut branch = make("ffn_down", &self.project("ffn_down", &activated)?)?;
        if let Some(call) = self.norm("post_ffw_norm", &branch)? {
            branch = make("ffn_post_norm", &call)?;
        }
        if let Some(factor) = config.factors.residual {
            branch = make("ffn_scaled", &Call::Scale { x: &branch, factor, held: Held::Number })?;
        }
        make("ffn_residual", &Call::Add { a: &stream, b: &branch })
    }

    /// The norm of that gain, where the block has it.
    fn norm<'x>(&'x self, name: &str, x: &'x Tensor) -> Result<Option<Call<'x>>, ComputeError> {
        let name = format!("blk.{}.{name}.weight", self.layer);
        if !self.model.has(&name) {
            return Ok(None);
        }
        let gain = self.model.tensor(&name)?;
        Ok(Some(Call::RmsNorm { x, gain, eps: self.model.config().rms_norm_eps }))
    }

    fn project<'x>(&'x self, name: &str, x: &'x Tensor) -> Result<Call<'x>, ComputeError> {
        let name = format!("blk.{}.{name}", self.layer);
        let weight = self.model.tensor(&format!("{name}.weight"))?;
        Ok(Call::Matmul { x, weight, bias: bias_of(self.model, &name)? })
    }
}

/// The bias that belongs to the weight `name` (without `.weight`), if the model has one.
pub fn bias_of<'m>(model: &'m Model, name: &str) -> Result<Option<Weight<'m>>, ComputeError> {
    let name = format!("{name}.bias");
    Ok(if model.has(&name) { Some(model.tensor(&name)?) } else { None })
}

/// Adds the rows of `rows` below those of `cache`.
fn append(cache: &mut Tensor, rows: &Tensor) {
    let mut data = std::mem::replace(cache, Tensor::zeros(0, rows.width())).into_data();
    data.extend_from_slice(rows.data());
    *cache = Tensor::new(rows.width(), data);
}

/// Greedy decoding after a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Greedy {
    /// The tokens, in order.
    pub tokens: Vec<u32>,
    /// For each of them, its logit less the second largest.
    pub margins: Vec<f32>,
}

/// Decodes `count` tokens greedily; `logits` are those of the last pass, whose
/// positions `cache` holds. Of equal logits the smallest token id wins.
pub fn decode_greedily(
    model: &Model,
    pass: &dyn Pass,
    logits: &Tensor,
    cache: &mut KvCache,
    count: usize,
) -> Result<Greedy, ComputeError> {
    let mut greedy = Greedy { tokens: Vec::new(), margins: Vec::new() };
    let mut last = logits.row(logits.rows() - 1).to_vec();
    while greedy.tokens.len() < count {
        let (token, margin) = top_1(&last);
        greedy.tokens.push(token);
        greedy.margins.push(margin);
        if greedy.tokens.len() < count {
            last = forward(model, pass, &[token], cache, &mut Discard)?.into_data();
        }
    }
    Ok(greedy)
}

/// The largest logit's token and its lead over the second largest.
pub fn top_1(logits: &[f32]) -> (u32, f32) {
    let (mut best, mut second) = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate().skip(1) {
        if logit > logits[best] {
            second = logits[best];
            best = token;
        } else if logit > second {
            second = logit;
        }
    }
    (best as u32, logits[best] - second)
}

/// Keeps nothing.
pub struct Discard;

impl Sites for Discard {
    fn visit(&mut self, _: Site, tensor: Tensor) -> Result<Tensor, ComputeError> {
        Ok(tensor)
    }
}
