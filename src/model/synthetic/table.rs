//! The tensors of a synthetic model, from the table by which the reader checks a file.
//!
//! The metadata that the file will have are read as anybody's are; what they demand is what is
//! made. It decides what kind of values a tensor has by its name, and makes none.

use super::blocks::Columns;
use super::{ADDED, EMBEDDING, LOGITS, Planned, Rows, Shape, Values, planned, reader};
use crate::model::architecture::Norms;
use crate::model::config::{self, Config, Expected};
use crate::model::gguf::Header;
use crate::model::gguf_fused::{self, Fused};
use crate::model::gguf_writer::HeaderWriter;
use crate::model::weights::WeightType;

/// Standard deviation of a router's scores: some experts are close, most are not.
const ROUTER: f32 = 1.5;

/// All tensors, in the order of the file.
pub(super) fn tensors(shape: &Shape) -> Vec<Planned> {
    let table = Table::new(shape, config(shape));
    let mut all = table.globals();
    for layer in 0..shape.layers {
        all.extend(table.block(layer));
    }
    all
}

/// The hyperparameters, as a file with this shape's metadata says them.
pub(super) fn config(shape: &Shape) -> Config {
    let mut header = HeaderWriter::default();
    header.text("general.architecture", shape.architecture.gguf_name());
    shape.hyperparameters(&mut header);
    let bytes = header.finish();
    Header::parse(&bytes)
        .and_then(|header| config::from_gguf(&header, &bytes, shape.vocabulary, shape.tied, None))
        .expect("a preset's metadata are those of a model that is read")
}

/// What a model's tensors are made by.
pub(super) struct Table<'a> {
    shape: &'a Shape,
    pub config: Config,
}

impl<'a> Table<'a> {
    pub fn new(shape: &'a Shape, config: Config) -> Table<'a> {
        Table { shape, config }
    }

    /// What the values of the tensor of this canonical name look like, and whether a folder holds
    /// them less one.
    pub fn values_of(&self, canonical: &str, width: usize) -> (Values, bool) {
        let inner = crate::op::in_layer(canonical).map_or(canonical, |(_, inner)| inner);
        let stem = inner.split('.').next().unwrap_or(inner);
        let less_one = self.config.architecture.gains_less_one()
            && inner.ends_with("norm.weight")
            && stem != "ssm_norm";
        (self.values(stem, inner.ends_with(".bias"), width), less_one)
    }

    fn globals(&self) -> Vec<Planned> {
        let tensors = self.config.expected_globals().into_iter().filter(|tensor| tensor.required);
        tensors
            .map(|Expected { name, rows, width, .. }| self.plan(&name, None, rows, width))
            .collect()
    }

    /// What a file holds of a block: what its parts are fused in stands in the place of the first.
    fn block(&self, layer: usize) -> Vec<Planned> {
        let prefix = format!("blk.{layer}.");
        let fused: Vec<(&str, Fused)> = gguf_fused::NAMES
            .into_iter()
            .filter_map(|name| Some((name, gguf_fused::parts(name, &self.config)?)))
            .collect();
        let mut all: Vec<Planned> = Vec::new();
        for Expected { name, rows, width, required } in self.config.expected_in_block(layer) {
            let inner = name.strip_prefix(&prefix).unwrap_or(&name);
            if !required && !self.shape.besides.contains(&inner) {
                continue;
            }
            let holds = |(_, Fused { parts, .. }): &&(&str, Fused)| {
                parts.iter().any(|(part, _)| part == inner)
            };
            let Some((whole, Fused { parts, width, depth })) = fused.iter().find(holds) else {
                all.push(self.plan(inner, Some(layer), rows, width));
                continue;
            };
            if parts[0].0 == inner {
                let rows = parts.iter().map(|(_, rows)| rows).sum();
                let planned = self.plan(whole, Some(layer), rows, *width);
                all.push(Planned { depth: *depth, ..planned });
            }
        }
        all
    }

    /// A tensor with the values that one of its name has.
    fn plan(&self, inner: &str, layer: Option<usize>, rows: usize, width: usize) -> Planned {
        let name = layer.map_or_else(|| inner.to_owned(), |layer| format!("blk.{layer}.{inner}"));
        let more = match layer {
            Some(layer) => self.shape.more_bits(layer),
            None => inner == "output.weight" || self.shape.tied,
        };
        let stem = inner.split('.').next().unwrap_or(inner);
        let values = self.values(stem, inner.ends_with(".bias"), width);
        let kind = match stem {
            // llama.cpp keeps routers and vectors in f32.
            "ffn_gate_inp" => WeightType::F32,
            _ if rows == 1 => WeightType::F32,
            "attn_v" | "ffn_down" | "ffn_down_exps" | "ffn_down_shexp" | "token_embd"
            | "output" => self.shape.kind(width, more),
            _ => self.shape.kind(width, false),
        };
        planned(&name, kind, rows, width, values)
    }

    /// What the values of a tensor look like.
    fn values(&self, stem: &str, is_bias: bool, width: usize) -> Values {
        let Shape { architecture, sharpness, tied, biases, .. } = *self.shape;
        let root = (self.config.hidden as f32).sqrt();
        let config = &self.config;
        let factor = |factor: Option<f64>| factor.unwrap_or(1.0) as f32;
        // What a block adds to the stream, which begins as the embedding and its factor.
        let added = ADDED * factor(config.factors.embedding) / factor(config.factors.residual);
        // What reads the stream itself, without a norm before, reads small values.
        let unit = match architecture.norms() {
            Norms::After => 1.0 / (root * EMBEDDING),
            Norms::Before | Norms::Both => 1.0 / root,
        };
        if is_bias {
            let on = if biases { 1.0 } else { 0.0 };
            let (size, spike) = match stem {
                "attn_q" => (0.3 * on, 0.0),
                "attn_k" => (0.3 * on, 3.0 * on),
                "attn_v" => (0.05 * on, 0.0),
                "attn_output" | "ffn_down" => (0.2 * added, 0.0),
                "exp_probs_b" => (0.05, 0.0),
                _ => (0.1, 0.0),
            };
            return Values::Bias { size, spike };
        }
        // A norm behind decides the size of what a block adds, else the matrix does.
        let writer = |input: f32| Values::Matrix {
            deviation: match architecture.norms() {
                Norms::Before => added / (input * (width as f32).sqrt()),
                Norms::After | Norms::Both => 1.0 / (width as f32).sqrt(),
            },
            columns: Columns::Even,
            rows: match architecture.norms() {
                Norms::Before => Rows::Outliers,
                Norms::After | Norms::Both => Rows::Even,
            },
        };
        let even =
            |deviation| Values::Matrix { deviation, columns: Columns::Even, rows: Rows::Even };
        match stem {
            "token_embd" => Values::Matrix {
                deviation: EMBEDDING,
                columns: Columns::Amplified,
                rows: Rows::Even,
            },
            "output" => reader(LOGITS / root, Rows::Even),
            "output_norm" if tied => {
                let mean = LOGITS / (EMBEDDING * root) * factor(config.factors.logits_divisor);
                Values::Gain { mean, outlier: 1.0 / 16.0, signed: true }
            }
            "output_norm" => Values::Gain { mean: 1.0, outlier: 0.25, signed: false },
            "attn_norm" | "ffn_norm" => Values::Gain { mean: 1.0, outlier: 4.0, signed: false },
            "post_attention_norm" | "post_ffw_norm" => {
                Values::Gain { mean: added, outlier: 6.0, signed: false }
            }
            "attn_q_norm" | "attn_k_norm" => {
                Values::Gain { mean: 1.1, outlier: 1.0, signed: false }
            }
            "attn_q" | "attn_k" => {
                // Scores of the same size, whatever they are multiplied by.
                let usual = 1.0 / (config.head_dim as f32).sqrt();
                let scores = config.factors.scores.map_or(usual, |factor| factor as f32);
                reader(sharpness * unit * (usual / scores).sqrt(), Rows::Even)
            }
            "attn_v" | "attn_q_a" | "attn_kv_a_mqa" | "ssm_in" | "ssm_ba" => {
                reader(unit, Rows::Even)
            }
            // They read narrow vectors, which have no channels of the stream.
            "attn_q_b" => even(sharpness / (width as f32).sqrt()),
            "attn_kv_b" => even(1.0 / (width as f32).sqrt()),
            "attn_q_a_norm" | "attn_kv_a_norm" | "ssm_norm" => {
                Values::Gain { mean: 1.0, outlier: 1.0, signed: false }
            }
            "attn_sinks" => Values::Bias { size: 0.6, spike: 0.0 },
            "ssm_conv1d" => even(1.0 / (width as f32).sqrt()),
            // States lose about a quarter at every token.
            "ssm_a_log" => Values::Gain { mean: -1.0, outlier: 1.0, signed: false },
            "ssm_out" => writer(0.6),
            // Attention averages values down to a root mean square of 0.7; a gated network's
            // hard neurons raise it to 1.5.
            "attn_output" => writer(0.7),
            "ffn_down" | "ffn_down_exps" | "ffn_down_shexp" => writer(1.5),
            "ffn_gate_inp" => reader(ROUTER * unit, Rows::Even),
            "ffn_gate_inp_shexp" => reader(unit, Rows::Even),
            "ffn_gate" | "ffn_gate_exps" | "ffn_gate_shexp" => reader(1.5 * unit, Rows::Neurons),
            "ffn_up" | "ffn_up_exps" | "ffn_up_shexp" => reader(unit, Rows::Neurons),
            other => unreachable!("no preset has a tensor called {other}"),
        }
    }
}
