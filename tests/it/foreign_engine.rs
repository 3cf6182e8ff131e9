//! A dump of somebody else's engine: an engine that shares no kernel with the project,
//! computes in bf16 or f32, and carries planted bugs on. The headline must name the planted
//! site, and the clean dump must pass.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use runner::dtype::Format;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::command::Project;
use crate::single::project;

const TOKENS: [usize; 13] = [5, 90, 17, 64, 201, 3, 118, 44, 250, 9, 77, 31, 160];

/// A small llama: sizes, and weights that are bf16 values.
pub struct Model {
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocabulary: usize,
    weights: BTreeMap<String, (usize, usize, Vec<f32>)>,
}

/// A bug of the engine; the layer is where it sits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    None,
    Down(usize),
    RopeBoth(usize),
    RopeQ(usize),
    StaleAttention(usize),
    StaleNorm(usize),
    ResidualTwice(usize),
}

impl Bug {
    fn site(self) -> String {
        match self {
            Bug::None => String::new(),
            Bug::Down(layer) => format!("blk.{layer}.ffn_down"),
            Bug::RopeBoth(layer) | Bug::RopeQ(layer) => format!("blk.{layer}.q_rope"),
            Bug::StaleAttention(layer) => format!("blk.{layer}.attn"),
            Bug::StaleNorm(layer) => format!("blk.{layer}.ffn_norm"),
            Bug::ResidualTwice(layer) => format!("blk.{layer}.ffn_residual"),
        }
    }

    fn cause(self) -> &'static str {
        match self {
            Bug::None => "",
            Bug::Down(_) => "scale-wrong",
            Bug::RopeBoth(_) | Bug::RopeQ(_) => "rope-position",
            Bug::StaleAttention(_) | Bug::StaleNorm(_) => "row-repeated",
            Bug::ResidualTwice(_) => "residual-weighted",
        }
    }
}

fn draws(mut state: u64) -> impl FnMut() -> f64 {
    // Sums of four uniform numbers: nearly normal, with variance 1.
    move || {
        let mut sum = 0.0;
        for _ in 0..4 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            sum += (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
        }
        sum * 3f64.sqrt()
    }
}

impl Model {
    pub fn new(seed: u64) -> Model {
        let (hidden, inner, layers, heads, kv_heads, head_dim, vocabulary) =
            (128, 320, 6, 4, 2, 32, 256);
        let mut draw = draws(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut weights = BTreeMap::new();
        let mut made = |name: String, rows: usize, width: usize, mean: f64, spread: f64| {
            let values = (0..rows * width).map(|_| mean + spread * draw());
            let values = values.map(|value| Format::Bf16.round(value as f32)).collect();
            weights.insert(name, (rows, width, values));
        };
        made("model.embed_tokens.weight".into(), vocabulary, hidden, 0.0, 1.0);
        made("model.norm.weight".into(), 1, hidden, 1.0, 0.2);
        for layer in 0..layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let (q, kv) = (heads * head_dim, kv_heads * head_dim);
            made(name("input_layernorm"), 1, hidden, 1.0, 0.2);
            made(name("post_attention_layernorm"), 1, hidden, 1.0, 0.2);
            for (part, rows, width) in [
                ("self_attn.q_proj", q, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, q),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ] {
                made(name(part), rows, width, 0.0, 1.0 / (width as f64).sqrt());
            }
        }
        Model { hidden, inner, layers, heads, kv_heads, head_dim, vocabulary, weights }
    }

    pub fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("a folder");
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": self.vocabulary,
            "max_position_embeddings": 512, "tie_word_embeddings": true, "hidden_act": "silu",
            "torch_dtype": "bfloat16", "attention_bias": false, "mlp_bias": false,
        });
        fs::write(folder.join("config.json"), config.to_string()).expect("written");
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .weights
            .iter()
            .map(|(name, (rows, width, values))| {
                let shape = if *rows == 1 { vec![*width] } else { vec![*rows, *width] };
                let words = values.iter().flat_map(|value| bf16(*value).to_le_bytes());
                (name.clone(), shape, words.collect())
            })
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("a view"))
        });
        let file = folder.join("model.safetensors");
        safetensors::serialize_to_file(views, None, &file).expect("written");
    }

    fn weight(&self, name: &str) -> &(usize, usize, Vec<f32>) {
        &self.weights[&format!("{name}.weight")]
    }
}

fn bf16(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

type Rows = Vec<Vec<f64>>;

/// The engine: every op in f64, its result rounded to the stream's type.
struct Engine<'m> {
    model: &'m Model,
    stream: Format,
    sites: Vec<(String, Rows)>,
}

impl Engine<'_> {
    fn round(&self, rows: Rows) -> Rows {
        let round = |value: f64| f64::from(self.stream.round(value as f32));
        rows.into_iter().map(|row| row.into_iter().map(round).collect()).collect()
    }

    fn note(&mut self, site: String, rows: Rows) -> Rows {
        self.sites.push((site, rows.clone()));
        rows
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let (_, width, w) = self.model.weight(name);
        let dot = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum();
        let rows = x.iter().map(|x| w.chunks(*width).map(|w| dot(x, w)).collect());
        self.round(rows.collect())
    }

    fn norm(&self, x: &Rows, name: &str) -> Rows {
        let (_, _, gain) = self.model.weight(name);
        let one = |row: &Vec<f64>| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            row.iter().zip(gain).map(|(x, gain)| x * scale * f64::from(*gain)).collect()
        };
        self.round(x.iter().map(one).collect())
    }

    fn rope(&self, x: &Rows, later: usize) -> Rows {
        let width = self.model.head_dim;
        let one = |(position, row): (usize, &Vec<f64>)| {
            let mut turned = row.clone();
            for head in turned.chunks_mut(width) {
                for pair in 0..width / 2 {
                    let frequency = 10000f64.powf(-2.0 * pair as f64 / width as f64);
                    let (sin, cos) = ((position + later) as f64 * frequency).sin_cos();
                    let (a, b) = (head[pair], head[pair + width / 2]);
                    head[pair] = a * cos - b * sin;
                    head[pair + width / 2] = b * cos + a * sin;
                }
            }
            turned
        };
        self.round(x.iter().enumerate().map(one).collect())
    }

    fn attention(&self, q: &Rows, k: &Rows, v: &Rows) -> Rows {
        let (width, heads) = (self.model.head_dim, self.model.heads);
        let group = heads / self.model.kv_heads;
        let mut out = Vec::new();
        for (row, q) in q.iter().enumerate() {
            let mut result = Vec::new();
            for head in 0..heads {
                let own = head * width..(head + 1) * width;
                let kv = head / group * width..(head / group + 1) * width;
                let score = |k: &Vec<f64>| {
                    let pairs = q[own.clone()].iter().zip(&k[kv.clone()]);
                    pairs.map(|(q, k)| q * k).sum::<f64>() / (width as f64).sqrt()
                };
                let scores: Vec<f64> = k[..=row].iter().map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                for column in kv.clone() {
                    let sum: f64 =
                        weights.iter().zip(v).map(|(weight, v)| weight * v[column]).sum();
                    result.push(sum / total);
                }
            }
            out.push(result);
        }
        self.round(out)
    }

    fn add(&self, a: &Rows, b: &Rows) -> Rows {
        let sum = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a + b).collect();
        self.round(a.iter().zip(b).map(sum).collect())
    }

    fn pass(mut self, bug: Bug) -> Vec<(String, Rows)> {
        let (_, width, table) = self.model.weight("model.embed_tokens");
        let row = |&token: &usize| table[token * width..(token + 1) * width].iter();
        let embedded = TOKENS.iter().map(|token| row(token).map(|v| f64::from(*v)).collect());
        let mut stream = self.note("embed".into(), embedded.collect());
        for layer in 0..self.model.layers {
            let site = |name: &str| format!("blk.{layer}.{name}");
            let part = |name: &str| format!("model.layers.{layer}.{name}");
            let stale = |mut rows: Rows| {
                rows[7] = rows[6].clone();
                rows
            };
            let normed = self.note(site("attn_norm"), self.norm(&stream, &part("input_layernorm")));
            let [q, k, v] = ["q", "k", "v"].map(|name| {
                let rows = self.linear(&normed, &part(&format!("self_attn.{name}_proj")));
                self.note(site(name), rows)
            });
            let later = |bad: bool| usize::from(bad);
            let both = matches!(bug, Bug::RopeBoth(from) if layer >= from);
            let only_q = matches!(bug, Bug::RopeQ(from) if layer >= from);
            let q = self.note(site("q_rope"), self.rope(&q, later(both || only_q)));
            let k = self.note(site("k_rope"), self.rope(&k, later(both)));
            let mut attended = self.attention(&q, &k, &v);
            if bug == Bug::StaleAttention(layer) {
                attended = stale(attended);
            }
            let attended = self.note(site("attn"), attended);
            let out =
                self.note(site("attn_out"), self.linear(&attended, &part("self_attn.o_proj")));
            let middle = self.note(site("attn_residual"), self.add(&stream, &out));
            let mut normed = self.norm(&middle, &part("post_attention_layernorm"));
            if bug == Bug::StaleNorm(layer) {
                normed = stale(normed);
            }
            let normed = self.note(site("ffn_norm"), normed);
            let gate = self.note(site("ffn_gate"), self.linear(&normed, &part("mlp.gate_proj")));
            let up = self.note(site("ffn_up"), self.linear(&normed, &part("mlp.up_proj")));
            let product = |(gate, up): (&Vec<f64>, &Vec<f64>)| {
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
            };
            let activated = self.round(gate.iter().zip(&up).map(product).collect());
            let activated = self.note(site("ffn_swiglu"), activated);
            let mut down = self.linear(&activated, &part("mlp.down_proj"));
            if bug == Bug::Down(layer) {
                down =
                    down.into_iter().map(|r| r.into_iter().map(|y| y * 1.02).collect()).collect();
                down = self.round(down);
            }
            let down = self.note(site("ffn_down"), down);
            let mut end = self.add(&middle, &down);
            if bug == Bug::ResidualTwice(layer) {
                end = self.add(&self.add(&middle, &middle), &down);
            }
            stream = self.note(site("ffn_residual"), end);
        }
        let normed = self.note("output_norm".into(), self.norm(&stream, "model.norm"));
        let logits = self.linear(&normed, "model.embed_tokens");
        self.note("logits".into(), logits);
        self.sites
    }
}

/// Writes a dump; of bf16 streams as bf16.
fn write_dump(sites: &[(String, Rows)], stream: Format, file: &Path) {
    let dtype = if stream == Format::Bf16 { Dtype::BF16 } else { Dtype::F32 };
    let bytes = sites.iter().map(|(_, rows)| {
        let values = rows.iter().flatten().map(|value| *value as f32);
        match dtype {
            Dtype::BF16 => values.flat_map(|value| bf16(value).to_le_bytes()).collect(),
            _ => values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>(),
        }
    });
    let bytes: Vec<Vec<u8>> = bytes.collect();
    let views = sites.iter().zip(&bytes).map(|((site, rows), bytes)| {
        let shape = vec![rows.len(), rows[0].len()];
        (site.clone(), TensorView::new(dtype, shape, bytes).expect("a view"))
    });
    safetensors::serialize_to_file(views, None, file).expect("written");
}

/// The stages of all these bugs, run; run.json.
fn judged(seed: u64, stream: Format, bugs: &[Bug]) -> (Project, Value) {
    let model = Model::new(seed);
    let project = project();
    model.write(&project.path("model"));
    for (number, bug) in bugs.iter().enumerate() {
        let engine = Engine { model: &model, stream, sites: Vec::new() };
        let file = project.path(&format!("dump{number}.safetensors"));
        write_dump(&engine.pass(*bug), stream, &file);
    }
    let numbers: Vec<usize> = (0..bugs.len()).collect();
    let tokens = TOKENS;
    let manifest = format!(
        "id = \"engine\"\ntitle = \"Is it what {stream} must give?\"\ncontract = \"engine\"\n\
         model = \"../model\"\ntokens = {tokens:?}\n\
         recipe = {{ gemm = \"{stream}\", output = \"{stream}\", stream = \"{stream}\" }}\n\
         arms = [\"reference\", \"emulated\", \"recorded\"]\n\
         [for]\ndump = {numbers:?}\n\
         [forward]\ncapture = \"every-site\"\n\
         [recorded]\nfile = \"../dump{{dump}}.safetensors\"\n"
    );
    let project = project.file("stages/engine.toml", &manifest);
    let ran = project.runner(&["run", "stages", "--format", "json"]);
    let run = serde_json::from_str(&ran.out)
        .unwrap_or_else(|error| panic!("{error}\n{}\n{}", ran.out, ran.err));
    (project, run)
}

/// Six bugs and none, of one engine: located and named.
fn check(seed: u64, stream: Format) {
    let bugs = [
        Bug::None,
        Bug::Down(4),
        Bug::RopeBoth(3),
        Bug::RopeQ(2),
        Bug::StaleAttention(1),
        Bug::StaleNorm(3),
        Bug::ResidualTwice(5),
    ];
    let (_project, run) = judged(seed, stream, &bugs);
    let mut named = 0;
    for (bug, stage) in bugs.iter().zip(run["stages"].as_array().expect("stages")) {
        let why = stage["why"].as_str().expect("a reason");
        if *bug == Bug::None {
            assert_eq!(stage["verdict"], "pass", "seed {seed}, {stream}, clean: {why}");
            assert!(stage.get("first").is_none(), "{why}");
            assert_eq!(stage["diagnoses"], json!([]), "a passing stage names no bug");
            continue;
        }
        assert_eq!(stage["verdict"], "structural", "seed {seed}, {stream}, {bug:?}: {why}");
        let first = &stage["first"];
        assert_eq!(first["arm"], "recorded");
        assert_eq!(first["site"], json!(bug.site()), "seed {seed}, {stream}, {bug:?}: {why}");
        let (_, layer_and_name) =
            bug.site().split_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).expect("a site");
        let (layer, name) = layer_and_name.split_once('.').expect("a layer");
        let place = format!("layer {layer}, {name}");
        assert!(why.contains(&place), "the headline says {place}: {why}");
        named += usize::from(first["cause"] == json!(bug.cause()));
        assert!(
            first["cause"].is_null() || first["cause"] == json!(bug.cause()),
            "seed {seed}, {stream}, {bug:?}: {why}"
        );
    }
    assert!(named >= 5, "seed {seed}, {stream}: {named} of 6 were named");
}

#[test]
fn six_bugs_of_a_bf16_engine_are_located_in_the_headline_and_the_clean_dump_passes() {
    (1..=3).for_each(|seed| check(seed, Format::Bf16));
}

#[test]
fn six_bugs_of_an_f32_engine_are_located_in_the_headline_and_the_clean_dump_passes() {
    (4..=6).for_each(|seed| check(seed, Format::F32));
}
