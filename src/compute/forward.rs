//! The transformer, written once over the arms' ops: llama, qwen2, qwen3.
//!
//! It knows the order of the ops and the names of the sites, not how an op is
//! computed. What happens to a site's tensor is up to [`Sites`]: a recorder
//! keeps it, an anchor puts another arm's tensor in its place.

use super::{AttentionShape, ComputeError, Ops, check_interrupt};
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

/// The site `blk.LAYER.NAME`.
fn block_site(layer: usize, name: &str) -> Site {
    Site(format!("blk.{layer}.{name}"))
}

/// The name of the tensor that makes the logits: `output`, or the embedding where they are tied.
pub fn output_weight(model: &Model) -> &'static str {
    if model.has("output.weight") { "output.weight" } else { "token_embd.weight" }
}

/// One pass over `tokens`, which follow the positions that `cache` holds.
///
/// Every site is handed to `sites`; the logits of every token are returned,
/// `[tokens, vocabulary]`.
pub fn forward(
    model: &Model,
    ops: &dyn Ops,
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
    let embedded = ops.embed(model.tensor("token_embd.weight")?, tokens)?;
    let mut stream = sites.visit(Site("embed".to_owned()), embedded)?;
    for layer in 0..config.layers {
        let block = Block { model, ops, layer, first_position };
        stream = block.run(stream, &mut cache.layers[layer], sites)?;
    }
    cache.positions = positions;
    let gain = model.tensor("output_norm.weight")?;
    let normed = ops.rms_norm(&stream, gain, config.rms_norm_eps)?;
    let normed = sites.visit(Site("output_norm".to_owned()), normed)?;
    check_interrupt()?;
    let logits = ops.matmul(&normed, model.tensor(output_weight(model))?, None)?;
    sites.visit(Site("logits".to_owned()), logits)
}

/// One transformer block.
struct Block<'a> {
    model: &'a Model,
    ops: &'a dyn Ops,
    layer: usize,
    first_position: usize,
}

impl Block<'_> {
    fn run(
        &self,
        stream: Tensor,
        cache: &mut (Tensor, Tensor),
        sites: &mut dyn Sites,
    ) -> Result<Tensor, ComputeError> {
        let config = self.model.config();
        let mut visit = |name: &str, tensor: Tensor| {
            check_interrupt()?;
            sites.visit(block_site(self.layer, name), tensor)
        };

        let normed = visit("attn_norm", self.norm(&stream, "attn_norm")?)?;
        let mut q = visit("q", self.project(&normed, "attn_q")?)?;
        let mut k = visit("k", self.project(&normed, "attn_k")?)?;
        let v = visit("v", self.project(&normed, "attn_v")?)?;
        if self.model.has(&self.weight_name("attn_q_norm")) {
            q = visit("q_norm", self.norm(&q, "attn_q_norm")?)?;
            k = visit("k_norm", self.norm(&k, "attn_k_norm")?)?;
        }
        let q = visit("q_rope", self.rope(&q)?)?;
        let k = visit("k_rope", self.rope(&k)?)?;
        append(&mut cache.0, &k);
        append(&mut cache.1, &v);

        let shape = AttentionShape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            first_position: self.first_position,
        };
        let attended = visit("attn", self.ops.attention(&q, &cache.0, &cache.1, shape)?)?;
        let attended = visit("attn_out", self.project(&attended, "attn_output")?)?;
        let stream = visit("attn_residual", self.ops.add(&stream, &attended)?)?;

        let normed = visit("ffn_norm", self.norm(&stream, "ffn_norm")?)?;
        let gate = visit("ffn_gate", self.project(&normed, "ffn_gate")?)?;
        let up = visit("ffn_up", self.project(&normed, "ffn_up")?)?;
        let activated = visit("ffn_swiglu", self.ops.swiglu(&gate, &up)?)?;
        let down = visit("ffn_down", self.project(&activated, "ffn_down")?)?;
        visit("ffn_residual", self.ops.add(&stream, &down)?)
    }

    fn weight_name(&self, name: &str) -> String {
        format!("blk.{}.{name}.weight", self.layer)
    }

    fn weight(&self, name: &str) -> Result<Weight<'_>, ComputeError> {
        Ok(self.model.tensor(&self.weight_name(name))?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor, ComputeError> {
        self.ops.rms_norm(x, self.weight(name)?, self.model.config().rms_norm_eps)
    }

    fn project(&self, x: &Tensor, name: &str) -> Result<Tensor, ComputeError> {
        let bias = bias_of(self.model, &format!("blk.{}.{name}", self.layer))?;
        self.ops.matmul(x, self.weight(name)?, bias)
    }

    fn rope(&self, x: &Tensor) -> Result<Tensor, ComputeError> {
        let config = self.model.config();
        self.ops.rope(x, &config.rope, config.head_dim, self.first_position)
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
    ops: &dyn Ops,
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
            last = forward(model, ops, &[token], cache, &mut Discard)?.into_data();
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
