//! The transformer, written once over the arms' ops.
//!
//! It knows the order of the ops and the names of the sites, not how an op is
//! computed. Which norms a block has is told by its tensors, the rest by the
//! model's config. What happens to a site's tensor is up to [`Sites`]: a recorder
//! keeps it, an anchor puts another arm's tensor in its place.

use std::ops::Range;

use super::call::{Call, Held};
use super::delta::{Convolution, DeltaRule, Gates};
use super::experts::Products;
use super::kv_cache::{self, Cached, Which};
use super::{AttentionShape, ComputeError, Pass, check_interrupt};
use crate::dtype::Format;
use crate::layer_sites::Has;
use crate::model::{Activation, Architecture, Config, DeltaNet, Experts, Latent, Model, Weight};
use crate::op::Site;
use crate::tensor::Tensor;

/// Whether a block has that; its attention keeps keys and values in `kv_cache` where one is given.
pub(super) fn has(model: &Model, kv_cache: Option<Format>, layer: usize, what: Has) -> bool {
    let config = model.config();
    let (delta, experts) = (config.delta_of(layer), config.experts_of(layer));
    match what {
        Has::Weight(name) => model.has(&format!("blk.{layer}.{name}.weight")),
        Has::Attention => delta.is_none(),
        Has::DeltaNet => delta.is_some(),
        Has::Latent => config.latent.is_some(),
        Has::NoLatent => config.latent.is_none(),
        Has::QueryLatent => config.latent.is_some_and(|latent| latent.queries.is_some()),
        Has::Turns => config.rope_of(layer).is_some(),
        Has::GatesAttention => config.architecture.gates_attention(),
        Has::NarrowCache => kv_cache.is_some(),
        Has::ScalesResidual => config.factors.residual.is_some(),
        Has::Parallel => is_parallel(model, layer),
        Has::OneBranch => !is_parallel(model, layer),
        Has::Gate => config.architecture.is_gated(),
        Has::NoGate => !config.architecture.is_gated(),
        Has::Experts => experts.is_some(),
        Has::Shared => experts.is_some_and(|experts| experts.shared.is_some()),
        Has::GatesShared => experts.is_some_and(|experts| experts.gates_shared),
    }
}

/// Whether a block's feed-forward network reads what its attention reads, and is added beside it:
/// in a StableLM that gives it no norm of its own.
fn is_parallel(model: &Model, layer: usize) -> bool {
    let normed = || model.has(&format!("blk.{layer}.ffn_norm.weight"));
    model.config().architecture == Architecture::StableLm && !normed()
}

/// The sites from the output matrix's product to the logits, in their order.
pub fn after_output(model: &Model) -> &'static [&'static str] {
    let config = model.config();
    match (config.factors.logits_divisor.is_some(), config.caps.logits.is_some()) {
        (false, false) => &["logits"],
        (true, true) => &["logits_raw", "logits_scaled", "logits"],
        _ => &["logits_raw", "logits"],
    }
}

/// Receives every site's tensor, and says with which tensor the pass goes on.
pub trait Sites {
    /// Called once per site, in the order of the flow.
    fn visit(&mut self, site: Site, tensor: Tensor) -> Result<Tensor, ComputeError>;
}

/// What a block keeps of the positions seen so far.
struct Seen {
    /// Keys, `[positions, kv_heads * head_dim]`; of a delta net what its convolution reads.
    keys: Tensor,
    /// Values, `[positions, kv_heads * value_dim]`; of a delta net what the convolution gives.
    values: Tensor,
    /// The gates of a delta net.
    gates: Tensor,
}

/// What blocks keep of the positions seen so far.
pub struct KvCache {
    layers: Vec<Seen>,
    positions: usize,
    /// The type of what attention keeps; whole where nothing is said.
    format: Option<Format>,
}

impl KvCache {
    /// An empty cache for a model of this shape; attention keeps keys and values in `format`.
    pub fn new(config: &Config, format: Option<Format>) -> KvCache {
        let empty = |head| Tensor::zeros(0, config.kv_heads * head);
        let layer = || Seen {
            keys: empty(config.head_dim),
            values: empty(config.value_dim()),
            gates: Tensor::zeros(0, 1),
        };
        KvCache { layers: (0..config.layers).map(|_| layer()).collect(), positions: 0, format }
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
pub fn attention_of(
    config: &Config,
    layer: usize,
    first_position: usize,
) -> AttentionShape<'static> {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    AttentionShape {
        value_dim: config.value_dim(),
        scale: config.factors.scores,
        window: config.window_of(layer),
        cap: config.caps.scores,
        ..AttentionShape::causal(heads, kv_heads, head_dim, first_position)
    }
}

/// The scores of a block's sinks, one for each head of queries; none where it has none.
///
/// # Errors
/// If the model's file does not give them.
pub fn sinks_of(model: &Model, layer: usize) -> Result<Option<Vec<f32>>, ComputeError> {
    let name = format!("blk.{layer}.attn_sinks.weight");
    Ok(if model.has(&name) { Some(model.tensor(&name)?.to_vec()?) } else { None })
}

/// The norm with the gain of that name (without `.weight`).
///
/// # Errors
/// If the model lacks it.
pub fn norm_of<'x>(
    model: &'x Model,
    name: &str,
    x: &'x Tensor,
    eps: f32,
) -> Result<Call<'x>, ComputeError> {
    let gain = model.tensor(&format!("{name}.weight"))?;
    Ok(match model.config().architecture.takes_means_off() {
        true => Call::LayerNorm { x, gain, bias: bias_of(model, name)?, eps },
        false => Call::RmsNorm { x, gain, eps },
    })
}

/// One pass over `tokens`, which follow the positions that `cache` holds.
///
/// Every site is handed to `sites`; the logits of every token are returned,
/// `[tokens, vocabulary]`.
///
/// # Errors
/// If the context ends before the tokens do, and as the ops.
pub fn forward(
    model: &Model,
    pass: &dyn Pass,
    tokens: &[u32],
    cache: &mut KvCache,
    sites: &mut dyn Sites,
) -> Result<Tensor, ComputeError> {
    forward_to(model, pass, tokens, 0..tokens.len(), cache, sites)
}

/// As [`forward`], with the logits of the tokens `kept` alone: the last norm and the output matrix
/// see no others.
///
/// # Errors
/// As [`forward`].
pub fn forward_to(
    model: &Model,
    pass: &dyn Pass,
    tokens: &[u32],
    kept: Range<usize>,
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
        let block = Block { model, layer, first_position, kept_in: cache.format };
        stream = block.run(stream, &mut cache.layers[layer], &mut flow)?;
    }
    cache.positions = positions;
    if kept.len() < tokens.len() {
        // Several passes may be one above the other.
        let rows = stream.data().chunks_exact(tokens.len() * stream.width());
        let of_pass =
            |rows: &[f32]| rows[kept.start * stream.width()..kept.end * stream.width()].to_vec();
        stream = Tensor::new(stream.width(), rows.flat_map(of_pass).collect());
    }
    let call = norm_of(model, "output_norm", &stream, config.rms_norm_eps)?;
    let normed = flow.make(Site("output_norm".to_owned()), &call)?;
    let weight = model.tensor(output_weight(model))?;
    let mut names = after_output(model).iter();
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

/// Makes a site of a block, by its name within it.
type Make<'m> = dyn FnMut(&str, &Call<'_>) -> Result<Tensor, ComputeError> + 'm;

/// One transformer block.
struct Block<'a> {
    model: &'a Model,
    layer: usize,
    first_position: usize,
    /// The type in which attention keeps keys and values.
    kept_in: Option<Format>,
}

impl Block<'_> {
    fn run(
        &self,
        stream: Tensor,
        cache: &mut Seen,
        flow: &mut Flow<'_>,
    ) -> Result<Tensor, ComputeError> {
        let config = self.model.config();
        let mut make = |name: &str, call: &Call<'_>| {
            flow.make(Site(format!("blk.{}.{name}", self.layer)), call)
        };

        let normed = self.norm("attn_norm", &stream)?.map(|call| make("attn_norm", &call));
        let normed = normed.transpose()?;
        let x = normed.as_ref().unwrap_or(&stream);
        let mut branch = match config.delta_of(self.layer) {
            None => self.attention(x, cache, &mut make)?,
            Some(delta) => self.delta_net(delta, x, cache, &mut make)?,
        };
        if let Some(call) = self.norm("post_attention_norm", &branch)? {
            branch = make("attn_post_norm", &call)?;
        }
        if let Some(factor) = config.factors.residual {
            branch = make("attn_scaled", &Call::Scale { x: &branch, factor, held: Held::Number })?;
        }
        let stream = make("attn_residual", &Call::Add { a: &stream, b: &branch })?;

        let beside = normed.filter(|_| is_parallel(self.model, self.layer));
        let normed = self.norm("ffn_norm", &stream)?.map(|call| make("ffn_norm", &call));
        let normed = normed.transpose()?.or(beside);
        let x = normed.as_ref().unwrap_or(&stream);
        let mut branch = match config.experts_of(self.layer) {
            None => self.feed_forward(["ffn_gate", "ffn_up", "ffn_down"], "ffn", x, &mut make)?,
            Some(experts) => self.experts(experts, x, &mut make)?,
        };
        if let Some(call) = self.norm("post_ffw_norm", &branch)? {
            branch = make("ffn_post_norm", &call)?;
        }
        if let Some(factor) = config.factors.residual {
            branch = make("ffn_scaled", &Call::Scale { x: &branch, factor, held: Held::Number })?;
        }
        make("ffn_residual", &Call::Add { a: &stream, b: &branch })
    }

    /// Attention, and the product behind it.
    fn attention(
        &self,
        x: &Tensor,
        cache: &mut Seen,
        make: &mut Make<'_>,
    ) -> Result<Tensor, ComputeError> {
        let config = self.model.config();
        let ([q, k, v], gates) = match config.latent {
            None => self.kept_heads(x, make)?,
            Some(latent) => (self.latent_heads(latent, x, make)?, None),
        };
        append(&mut cache.keys, &k);
        append(&mut cache.values, &v);
        let sinks = sinks_of(self.model, self.layer)?;
        let shape = attention_of(config, self.layer, self.first_position);
        let shape = AttentionShape { sinks: sinks.as_deref(), ..shape };
        let call = Call::Attention { q: &q, k: &cache.keys, v: &cache.values, shape };
        let mut branch = make("attn", &call)?;
        if let Some(gate) = &gates {
            branch = make("attn_gated", &Call::SigmoidGate { x: &branch, gate })?;
        }
        make("attn_out", &self.project("attn_output", &branch)?)
    }

    /// A gated delta net, and the product behind it. Each head of keys has its query, its key, and
    /// the values and gates of its group side by side.
    fn delta_net(
        &self,
        net: &DeltaNet,
        x: &Tensor,
        cache: &mut Seen,
        make: &mut Make<'_>,
    ) -> Result<Tensor, ComputeError> {
        let eps = self.model.config().rms_norm_eps;
        let weight = |name: &str| self.model.tensor(&format!("blk.{}.{name}", self.layer));
        let all = make("lin_qkvz", &self.project("ssm_in", x)?)?;
        let raw = make("lin_ba", &self.project("ssm_ba", x)?)?;
        let (keys, values) = (net.key_dim, net.value_heads / net.key_heads * net.value_dim);
        let parts = |widths: [usize; 2]| {
            let heads = (0..all.rows()).flat_map(|row| {
                all.row(row)
                    .chunks_exact(2 * keys + 2 * values)
                    .flat_map(move |head| head[widths[0]..widths[1]].iter().copied())
            });
            Tensor::new(net.key_heads * (widths[1] - widths[0]), heads.collect())
        };
        let (query, key) = (parts([0, keys]), parts([keys, 2 * keys]));
        let value = parts([2 * keys, 2 * keys + values]);
        let gate = parts([2 * keys + values, 2 * keys + 2 * values]);
        let mut mixed = Tensor::zeros(all.rows(), net.channels());
        mixed.set_columns(0, &query);
        mixed.set_columns(query.width(), &key);
        mixed.set_columns(2 * query.width(), &value);
        append(&mut cache.keys, &mixed);
        let first = self.first_position;
        let taps = weight("ssm_conv1d.weight")?;
        let call = Call::Convolve(Convolution { x: &cache.keys, weight: taps, first });
        let convolved = make("lin_conv", &call)?;
        append(&mut cache.values, &convolved);
        let (rates, shift) = (weight(net.rates())?, weight("ssm_dt.bias")?);
        let gates = make("lin_gates", &Call::Gates(Gates { x: &raw, rates, shift, net }))?;
        append(&mut cache.gates, &gates);
        let rule = DeltaRule { x: &cache.values, gates: &cache.gates, first, net };
        let read = make("lin_delta", &Call::Delta(rule))?;
        let call = norm_of(self.model, &format!("blk.{}.ssm_norm", self.layer), &read, eps)?;
        let normed = make("lin_norm", &call)?;
        let activation = Activation::Silu;
        let call = Call::Gated { gate: &gate, up: &normed, activation };
        let gated = make("lin_gated", &call)?;
        make("attn_out", &self.project("ssm_out", &gated)?)
    }

    /// What attention reads back of keys or values that it kept: as they were made, or in the
    /// cache's type.
    fn kept(
        &self,
        which: Which,
        site: &str,
        x: Tensor,
        make: &mut Make<'_>,
    ) -> Result<Tensor, ComputeError> {
        let Some(format) = self.kept_in else { return Ok(x) };
        let scale = kv_cache::scale_of(self.model, self.layer, which, format)?;
        make(site, &Call::Cached(Cached { x: &x, format, scale }))
    }

    /// [`Block::heads`], keys and values as the cache gives them back.
    fn kept_heads(
        &self,
        x: &Tensor,
        make: &mut Make<'_>,
    ) -> Result<([Tensor; 3], Option<Tensor>), ComputeError> {
        let ([q, k, v], gates) = self.heads(x, make)?;
        let k = self.kept(Which::Keys, "k_cache", k, make)?;
        let v = self.kept(Which::Values, "v_cache", v, make)?;
        Ok(([q, k, v], gates))
    }

    /// Queries, keys and values of a projection each, and gates where queries come with them.
    fn heads(
        &self,
        x: &Tensor,
        make: &mut Make<'_>,
    ) -> Result<([Tensor; 3], Option<Tensor>), ComputeError> {
        let config = self.model.config();
        let mut q = make("q", &self.project("attn_q", x)?)?;
        let mut k = make("k", &self.project("attn_k", x)?)?;
        let v = make("v", &self.project("attn_v", x)?)?;
        let mut gates = None;
        if config.architecture.gates_attention() {
            // Each head has its query and then its gates.
            let part = |which: usize| {
                let heads = q.data().chunks_exact(config.head_dim).skip(which).step_by(2);
                let data = heads.flatten().copied().collect();
                Tensor::new(config.heads * config.head_dim, data)
            };
            let queries = part(0);
            gates = Some(part(1));
            q = queries;
        }
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
        Ok(([q, k, v], gates))
    }

    /// Queries, keys and values of latent attention: a head of keys is what its latent vector
    /// gives, and after it what turns, which is the same for all heads.
    fn latent_heads(
        &self,
        latent: Latent,
        x: &Tensor,
        make: &mut Make<'_>,
    ) -> Result<[Tensor; 3], ComputeError> {
        let config = self.model.config();
        let name = |name: &str| format!("blk.{}.{name}", self.layer);
        let mut q = if latent.queries.is_some() {
            let narrow = make("q_a", &self.project("attn_q_a", x)?)?;
            let normed = norm_of(self.model, &name("attn_q_a_norm"), &narrow, latent.eps)?;
            let normed = make("q_a_norm", &normed)?;
            make("q", &self.project("attn_q_b", &normed)?)?
        } else {
            make("q", &self.project("attn_q", x)?)?
        };
        let narrow = make("kv_a", &self.project("attn_kv_a_mqa", x)?)?;
        let of_heads = narrow.columns(0..latent.keys);
        let mut shared = narrow.columns(latent.keys..narrow.width());
        let normed = norm_of(self.model, &name("attn_kv_a_norm"), &of_heads, latent.eps)?;
        let normed = make("kv_a_norm", &normed)?;
        // The latent vector and what turns are all that is kept, with one scale.
        let normed = self.kept(Which::Keys, "kv_a_cache", normed, make)?;
        let both = make("kv", &self.project("attn_kv_b", &normed)?)?;
        if let Some(rope) = config.rope_of(self.layer) {
            let first_position = self.first_position;
            let turn = |x, head_dim| Call::Rope { x, rope, head_dim, first_position };
            let turned = make("q_rope", &turn(&q, config.head_dim))?;
            shared = make("k_rope", &turn(&shared, latent.turned))?;
            q = turned;
        }
        let shared = self.kept(Which::Keys, "k_cache", shared, make)?;
        let mut k = Tensor::zeros(both.rows(), config.heads * config.head_dim);
        let mut v = Tensor::zeros(both.rows(), config.heads * latent.values);
        for row in 0..both.rows() {
            let heads = both.row(row).chunks_exact(latent.still + latent.values);
            let keys = k.row_mut(row).chunks_exact_mut(config.head_dim);
            for (head, key) in heads.clone().zip(keys) {
                key[..latent.still].copy_from_slice(&head[..latent.still]);
                key[latent.still..].copy_from_slice(shared.row(row));
            }
            for (head, value) in heads.zip(v.row_mut(row).chunks_exact_mut(latent.values)) {
                value.copy_from_slice(&head[latent.still..]);
            }
        }
        Ok([q, k, v])
    }

    /// A feed-forward network of these weights; its sites begin so.
    fn feed_forward(
        &self,
        [gate, up, down]: [&str; 3],
        site: &str,
        x: &Tensor,
        make: &mut Make<'_>,
    ) -> Result<Tensor, ComputeError> {
        let activation = self.model.config().activation;
        let name = |name: &str| format!("{site}_{name}");
        let activated = if self.model.config().architecture.is_gated() {
            let gate = make(&name("gate"), &self.project(gate, x)?)?;
            let up = make(&name("up"), &self.project(up, x)?)?;
            make(&name("swiglu"), &Call::Gated { gate: &gate, up: &up, activation })?
        } else {
            let up = make(&name("up"), &self.project(up, x)?)?;
            make(&name("act"), &Call::Activated { x: &up, activation })?
        };
        make(&name("down"), &self.project(down, &activated)?)
    }

    /// A mixture of experts, and the network that all tokens go through beside it.
    fn experts(
        &self,
        experts: &Experts,
        x: &Tensor,
        make: &mut Make<'_>,
    ) -> Result<Tensor, ComputeError> {
        let (activation, used) = (self.model.config().activation, experts.routing.used);
        let scores = make("ffn_router", &self.project("ffn_gate_inp", x)?)?;
        let bias = bias_of(self.model, &format!("blk.{}.exp_probs_b", self.layer))?;
        let call = Call::Route { scores: &scores, bias, routing: &experts.routing };
        let routes = make("ffn_route", &call)?;
        let product = |site: &str, name: &str, x: &Tensor, make: &mut Make<'_>| {
            let (weights, biases) = self.of_experts(name, experts.count)?;
            let biases = biases.as_deref();
            let products = Products { x, weights: &weights, biases, routes: &routes, used };
            make(site, &Call::Experts(products))
        };
        let gate = product("ffn_gate", "ffn_gate_exps", x, make)?;
        let up = product("ffn_up", "ffn_up_exps", x, make)?;
        let activated = make("ffn_swiglu", &Call::Gated { gate: &gate, up: &up, activation })?;
        let down = product("ffn_down", "ffn_down_exps", &activated, make)?;
        let mixed = make("ffn_mix", &Call::Mix { x: &down, routes: &routes, used })?;
        if experts.shared.is_none() {
            return Ok(mixed);
        }
        let names = ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"];
        let mut shared = self.feed_forward(names, "ffn_shared", x, make)?;
        if experts.gates_shared {
            let gate = make("ffn_shared_router", &self.project("ffn_gate_inp_shexp", x)?)?;
            shared = make("ffn_shared_gated", &Call::SigmoidGate { x: &shared, gate: &gate })?;
        }
        make("ffn_out", &Call::Add { a: &mixed, b: &shared })
    }

    /// The weights of all experts, and their biases where they have them.
    fn of_experts(
        &self,
        name: &str,
        count: usize,
    ) -> Result<(Vec<Weight<'_>>, Option<Vec<Weight<'_>>>), ComputeError> {
        let named = |expert: usize| format!("blk.{}.{name}.{expert}", self.layer);
        let weight = |expert| Ok(self.model.tensor(&format!("{}.weight", named(expert)))?);
        let weights: Vec<Weight<'_>> =
            (0..count).map(weight).collect::<Result<_, ComputeError>>()?;
        let biases = (0..count).map(|expert| bias_of(self.model, &named(expert)));
        let biases: Option<Vec<Weight<'_>>> =
            biases.collect::<Result<Vec<Option<_>>, _>>()?.into_iter().collect();
        Ok((weights, biases))
    }

    /// The norm of that gain, where the block has it.
    fn norm<'x>(&'x self, name: &str, x: &'x Tensor) -> Result<Option<Call<'x>>, ComputeError> {
        let name = format!("blk.{}.{name}", self.layer);
        if !self.model.has(&format!("{name}.weight")) {
            return Ok(None);
        }
        norm_of(self.model, &name, x, self.model.config().rms_norm_eps).map(Some)
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
