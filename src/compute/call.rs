//! One op with its operands as a value, and the site that it makes.
//!
//! Whoever looks over an arm's shoulder needs it: a planted bug that changes
//! one call, a diagnosis that computes one call again under a hypothesis. The
//! site follows from the weights' names and the order of the ops; nothing is
//! computed here that an arm does not compute.

use std::sync::Mutex;

use super::{AttentionShape, ComputeError, Ops};
use crate::model::{Rope, Weight, WeightType};
use crate::op::{Site, in_layer, site_of_norm, site_of_projection};
use crate::tensor::Tensor;

/// One op with its operands.
#[derive(Clone, Copy)]
pub enum Call<'a> {
    /// See [`Ops::embed`].
    Embed {
        /// The embedding.
        weight: Weight<'a>,
        /// The rows to look up.
        tokens: &'a [u32],
    },
    /// See [`Ops::rms_norm`].
    RmsNorm {
        /// What is normalised.
        x: &'a Tensor,
        /// The gain.
        gain: Weight<'a>,
        /// What stands under the root beside the mean square.
        eps: f32,
    },
    /// See [`Ops::matmul`].
    Matmul {
        /// The activation.
        x: &'a Tensor,
        /// The weight.
        weight: Weight<'a>,
        /// The bias, where there is one.
        bias: Option<Weight<'a>>,
    },
    /// See [`Ops::rope`].
    Rope {
        /// What is rotated.
        x: &'a Tensor,
        /// The geometry.
        rope: &'a Rope,
        /// Width of a head.
        head_dim: usize,
        /// Position of the first row.
        first_position: usize,
    },
    /// See [`Ops::attention`].
    Attention {
        /// Queries.
        q: &'a Tensor,
        /// Keys.
        k: &'a Tensor,
        /// Values.
        v: &'a Tensor,
        /// Heads and positions.
        shape: AttentionShape,
    },
    /// See [`Ops::swiglu`].
    SwiGlu {
        /// What goes through the sigmoid.
        gate: &'a Tensor,
        /// What it is multiplied with.
        up: &'a Tensor,
    },
    /// See [`Ops::add`].
    Add {
        /// The residual stream.
        a: &'a Tensor,
        /// What is added to it.
        b: &'a Tensor,
    },
}

impl Call<'_> {
    /// Computes it on an arm.
    ///
    /// # Errors
    /// As the arm's op.
    pub fn on(&self, ops: &dyn Ops) -> Result<Tensor, ComputeError> {
        match *self {
            Call::Embed { weight, tokens } => ops.embed(weight, tokens),
            Call::RmsNorm { x, gain, eps } => ops.rms_norm(x, gain, eps),
            Call::Matmul { x, weight, bias } => ops.matmul(x, weight, bias),
            Call::Rope { x, rope, head_dim, first_position } => {
                ops.rope(x, rope, head_dim, first_position)
            }
            Call::Attention { q, k, v, shape } => ops.attention(q, k, v, shape),
            Call::SwiGlu { gate, up } => ops.swiglu(gate, up),
            Call::Add { a, b } => ops.add(a, b),
        }
    }

    /// The op's name.
    pub fn op(&self) -> &'static str {
        match self {
            Call::Embed { .. } => "embed",
            Call::RmsNorm { .. } => "rms_norm",
            Call::Matmul { .. } => "matmul",
            Call::Rope { .. } => "rope",
            Call::Attention { .. } => "attention",
            Call::SwiGlu { .. } => "swiglu",
            Call::Add { .. } => "add",
        }
    }

    /// Rows and width of the result.
    pub fn shape(&self) -> [usize; 2] {
        match *self {
            Call::Embed { weight, tokens } => [tokens.len(), weight.width()],
            Call::RmsNorm { x, .. } | Call::Rope { x, .. } => [x.rows(), x.width()],
            Call::Matmul { x, weight, .. } => [x.rows(), weight.rows()],
            Call::Attention { q, shape, .. } => [q.rows(), shape.heads * shape.head_dim],
            Call::SwiGlu { gate, .. } => [gate.rows(), gate.width()],
            Call::Add { a, .. } => [a.rows(), a.width()],
        }
    }
}

/// Where in the flow the calls have come to.
#[derive(Clone, Debug, Default)]
struct Place {
    layer: u32,
    /// The site that the last call with a weight made, within its layer.
    last: String,
    /// RoPEs since then.
    ropes: usize,
}

impl Place {
    /// The site that this call makes.
    fn next(&mut self, call: &Call<'_>) -> Site {
        let named = match call {
            Call::Embed { .. } => return Site("embed".to_owned()),
            Call::RmsNorm { gain, .. } => Some(norm_site(gain.name())),
            Call::Matmul { weight, .. } => Some(projection_site(weight.name())),
            _ => None,
        };
        if let Some(site) = named {
            if let Some((layer, inner)) = in_layer(&site.0) {
                (self.layer, self.last) = (layer, inner.to_owned());
            }
            self.ropes = 0;
            return site;
        }
        let name = match call {
            Call::Rope { .. } => {
                self.ropes += 1;
                if self.ropes == 1 { "q_rope" } else { "k_rope" }
            }
            Call::Attention { .. } => "attn",
            Call::SwiGlu { .. } => "ffn_swiglu",
            _ if self.last == "attn_out" => "attn_residual",
            _ => "ffn_residual",
        };
        Site(format!("blk.{}.{name}", self.layer))
    }
}

fn without_suffix(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

fn norm_site(name: &str) -> Site {
    let name = without_suffix(name);
    site_of_norm(name).unwrap_or_else(|| {
        Site(name.replace("attn_q_norm", "q_norm").replace("attn_k_norm", "k_norm"))
    })
}

fn projection_site(name: &str) -> Site {
    match without_suffix(name) {
        "output" | "token_embd" => Site("logits".to_owned()),
        name => site_of_projection(name).unwrap_or_else(|| Site(name.to_owned())),
    }
}

/// What is done with each call: it returns the tensor that the pass goes on with.
pub type Hook<'h> = dyn Fn(&Site, &Call<'_>) -> Result<Tensor, ComputeError> + Sync + 'h;

/// An arm that hands every call to a hook, with the site that it makes.
///
/// The calls of one pass must come in the order of the flow, as
/// [`forward`](super::forward::forward) makes them.
pub struct Watched<'h> {
    hook: Box<Hook<'h>>,
    place: Mutex<Place>,
}

impl<'h> Watched<'h> {
    /// An arm that computes what `hook` returns.
    pub fn new(
        hook: impl Fn(&Site, &Call<'_>) -> Result<Tensor, ComputeError> + Sync + 'h,
    ) -> Watched<'h> {
        Watched { hook: Box::new(hook), place: Mutex::default() }
    }

    fn call(&self, call: Call<'_>) -> Result<Tensor, ComputeError> {
        let site = {
            let mut place = self.place.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            place.next(&call)
        };
        (self.hook)(&site, &call)
    }
}

impl Ops for Watched<'_> {
    fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError> {
        self.call(Call::Embed { weight, tokens })
    }

    fn rms_norm(&self, x: &Tensor, gain: Weight<'_>, eps: f32) -> Result<Tensor, ComputeError> {
        self.call(Call::RmsNorm { x, gain, eps })
    }

    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        self.call(Call::Matmul { x, weight, bias })
    }

    fn rope(
        &self,
        x: &Tensor,
        rope: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        self.call(Call::Rope { x, rope, head_dim, first_position })
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
    ) -> Result<Tensor, ComputeError> {
        self.call(Call::Attention { q, k, v, shape })
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor, ComputeError> {
        self.call(Call::SwiGlu { gate, up })
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError> {
        self.call(Call::Add { a, b })
    }
}

/// A weight made of f32 values: what a call looks like under another weight.
pub struct MadeWeight {
    name: String,
    rows: usize,
    width: usize,
    bytes: Vec<u8>,
}

impl MadeWeight {
    /// `rows` rows of `values`; arms remember weights by name, so it must be new.
    pub fn new(name: String, rows: usize, values: &[f32]) -> MadeWeight {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        MadeWeight { name, rows, width: values.len() / rows.max(1), bytes }
    }

    /// The weight.
    ///
    /// # Errors
    /// If it has no element.
    pub fn weight(&self) -> Result<Weight<'_>, ComputeError> {
        Ok(Weight::new(&self.name, WeightType::F32, self.rows, self.width, &self.bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(name: &str) -> Weight<'_> {
        Weight::new(name, WeightType::F32, 1, 1, &[0; 4]).expect("one value")
    }

    #[test]
    fn calls_in_the_order_of_the_flow_make_the_sites_of_the_flow() {
        let x = Tensor::zeros(1, 1);
        let rope = Rope {
            layout: crate::model::RopeLayout::Halves,
            dimensions: 1,
            theta: 1.0,
            factors: None,
            linear_scale: 1.0,
        };
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 1, first_position: 0 };
        let norm = |name| Call::RmsNorm { x: &x, gain: weight(name), eps: 0.0 };
        let matmul = |name| Call::Matmul { x: &x, weight: weight(name), bias: None };
        let rope = Call::Rope { x: &x, rope: &rope, head_dim: 1, first_position: 0 };
        let calls = [
            Call::Embed { weight: weight("token_embd.weight"), tokens: &[] },
            norm("blk.3.attn_norm.weight"),
            matmul("blk.3.attn_q.weight"),
            matmul("blk.3.attn_k.weight"),
            matmul("blk.3.attn_v.weight"),
            norm("blk.3.attn_q_norm.weight"),
            norm("blk.3.attn_k_norm.weight"),
            rope,
            rope,
            Call::Attention { q: &x, k: &x, v: &x, shape },
            matmul("blk.3.attn_output.weight"),
            Call::Add { a: &x, b: &x },
            norm("blk.3.ffn_norm.weight"),
            matmul("blk.3.ffn_gate.weight"),
            matmul("blk.3.ffn_up.weight"),
            Call::SwiGlu { gate: &x, up: &x },
            matmul("blk.3.ffn_down.weight"),
            Call::Add { a: &x, b: &x },
            norm("output_norm.weight"),
            matmul("token_embd.weight"),
        ];
        let mut place = Place::default();
        let sites: Vec<String> = calls.iter().map(|call| place.next(call).0).collect();
        let mut expected = vec!["embed".to_owned()];
        expected.extend(crate::op::LAYER_SITES.map(|name| format!("blk.3.{name}")));
        expected.extend(["output_norm", "logits"].map(str::to_owned));
        assert_eq!(sites, expected);
    }
}
