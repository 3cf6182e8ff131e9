//! The kernels of other people's engines against what they computed on a GPU.
//!
//! Fixtures of `tests/fixtures/engines` are small cuts of captures; their headers
//! name the GPU and the versions. With `RUNNER_ENGINE_DATA` naming a folder that
//! holds `engines` and `h200`, whole captures are replayed, operation by operation
//! and from the token ids alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use runner::compute::AttentionShape;
use runner::compute::call::Call as OpCall;
use runner::compute::emulated::chip::{Unit, chip};
use runner::compute::emulated::engine::EngineArm;
use runner::compute::emulated::gemm::{Operand, Scales};
use runner::compute::emulated::quantize::{CodeData, Codes};
use runner::compute::emulated::schedule::{Epilogue, Schedule};
use runner::compute::engine_kernels::activation::{Activation, Gated, gelu, gelu_tanh, silu};
use runner::compute::engine_kernels::attention::{Heads, Products, eager, transposed};
use runner::compute::engine_kernels::flash::{Flash3Call, Plan, flash};
use runner::compute::engine_kernels::fp8::{
    Quantise, block_scaled_mm, cutlass_scaled_mm, scaled_mm,
};
use runner::compute::engine_kernels::linear::{Linear, codes};
use runner::compute::engine_kernels::norm::{RmsNorm, add};
use runner::compute::engine_kernels::rope::{self, Rotation, Table};
use runner::compute::engine_kernels::row_sum::RowSum;
use runner::compute::engine_kernels::softmax::softmax;
use runner::compute::engine_kernels::{cuda_math, ggml, sfu};
use runner::dtype::Format;
use runner::engine::{EngineFile, EngineKernels, Order, Product};
use runner::model::{Rope, RopeLayout, Weight, WeightType};
use runner::op::ChipName;
use runner::tensor::Tensor;
use serde_json::Value;

const B: Format = Format::Bf16;
/// Multiprocessors of an H100 and an H200.
const PROCESSORS: usize = 132;

/// The kernels of an engine that ships.
fn kernels_of(engine: &str) -> EngineKernels {
    let file = EngineFile::find(engine, Path::new(".")).expect("ships");
    let (kernels, _) = file.known().expect("its kernels are known");
    kernels
}

fn unit(format: Format) -> &'static Unit {
    chip(ChipName::Hopper).unit(format, format).expect("hopper multiplies it")
}

/// An array of a capture: its shape, its values, and its raw codes where it is FP8.
#[derive(Clone, Debug)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl Array {
    fn new(dtype: &str, shape: Vec<usize>, bytes: &[u8]) -> Array {
        let halves = |decode: fn(u16) -> f32| -> Vec<f32> {
            bytes.chunks_exact(2).map(|b| decode(u16::from_le_bytes([b[0], b[1]]))).collect()
        };
        let words = |decode: fn([u8; 4]) -> f32| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| decode([b[0], b[1], b[2], b[3]])).collect()
        };
        let values = match dtype {
            "bfloat16" | "BF16" => halves(|code| Format::Bf16.decode(u32::from(code))),
            "float16" | "F16" => halves(|code| Format::F16.decode(u32::from(code))),
            "float32" | "F32" => words(f32::from_le_bytes),
            "int32" | "I32" => words(|b| i32::from_le_bytes(b) as f32),
            "int64" | "I64" => bytes
                .chunks_exact(8)
                .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32)
                .collect(),
            "float8_e4m3fn" => bytes.iter().map(|&b| Format::E4m3.decode(u32::from(b))).collect(),
            _ => Vec::new(),
        };
        Array { shape, values, bytes: bytes.to_vec() }
    }

    /// All but the last dimension are rows.
    fn matrix(&self) -> Tensor {
        Tensor::new(*self.shape.last().expect("a dimension"), self.values.clone())
    }

    /// `[1, heads, tokens, width]` as `[tokens, heads * width]`.
    fn heads_to_rows(&self) -> Tensor {
        let [_, heads, tokens, width] = self.shape[..] else { panic!("{:?}", self.shape) };
        let values = (0..tokens).flat_map(|token| {
            (0..heads).flat_map(move |head| {
                let start = (head * tokens + token) * width;
                &self.values[start..start + width]
            })
        });
        Tensor::new(heads * width, values.copied().collect())
    }

    /// The tokens of `[.., tokens, heads, width]` as rows.
    fn joined_heads(&self) -> Tensor {
        let [.., heads, width] = self.shape[..] else { panic!("{:?}", self.shape) };
        Tensor::new(heads * width, self.values.clone())
    }

    /// E4M3 codes, `[rows, width]`.
    fn e4m3(&self) -> Codes {
        let (rows, width) = (self.shape[0], self.shape[1]);
        Codes::new(Format::E4m3, rows, width, CodeData::Bits8(self.bytes.clone())).expect("codes")
    }
}

/// Named arrays of a safetensors file.
fn safetensors(path: &Path) -> BTreeMap<String, Array> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let dtype = format!("{:?}", view.dtype());
            (name, Array::new(&dtype, view.shape().to_vec(), view.data()))
        })
        .collect()
}

/// One operation of a capture.
struct Call {
    op: String,
    given: Vec<Value>,
    out: Vec<Value>,
    after: BTreeMap<String, Value>,
}

/// The operations of a capture in NumPy's format, and its arrays.
struct Capture {
    calls: Vec<Call>,
    arrays: BTreeMap<String, Vec<u8>>,
}

impl Capture {
    fn open(path: &Path) -> Capture {
        let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut archive = zip::ZipArchive::new(file).expect("a zip archive");
        let mut arrays = BTreeMap::new();
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).expect("an entry");
            let name = entry.name().expect("a name").trim_end_matches(".npy").to_owned();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes).expect("an array");
            let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
            let text = String::from_utf8_lossy(&bytes[10..10 + header]).into_owned();
            arrays.insert(name, row_major(&text, &bytes[10 + header..]));
        }
        let index: Vec<Value> = serde_json::from_slice(&arrays["index"]).expect("an index");
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let calls = index
            .iter()
            .map(|call| Call {
                op: call["op"].as_str().expect("a name").to_owned(),
                given: list(&call["in"]),
                out: list(&call["out"]),
                after: call["after"]
                    .as_object()
                    .map(|map| map.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
                    .unwrap_or_default(),
            })
            .collect();
        Capture { calls, arrays }
    }

    fn array(&self, note: &Value) -> Array {
        let shape = note["shape"].as_array().expect("a shape");
        let shape = shape.iter().map(|n| n.as_u64().expect("a size") as usize).collect();
        let key = note["key"].as_str().expect("a kept tensor");
        Array::new(note["dtype"].as_str().expect("a dtype"), shape, &self.arrays[key])
    }

    fn given(&self, call: &Call, index: usize) -> Array {
        self.array(&call.given[index])
    }

    fn maybe(&self, call: &Call, index: usize) -> Option<Array> {
        call.given.get(index).filter(|note| note.is_object()).map(|note| self.array(note))
    }

    fn out(&self, call: &Call) -> Array {
        self.array(&call.out[0])
    }

    fn after(&self, call: &Call, index: usize) -> Array {
        self.array(&call.after[&index.to_string()])
    }
}

/// The bytes of an array in rows; NumPy also writes matrices column by column.
fn row_major(header: &str, bytes: &[u8]) -> Vec<u8> {
    if header.contains("'fortran_order': False") {
        return bytes.to_vec();
    }
    let shape = header.split('(').nth(1).and_then(|rest| rest.split(')').next());
    let sizes: Vec<usize> =
        shape.unwrap_or("").split(',').filter_map(|size| size.trim().parse().ok()).collect();
    let [rows, columns] = sizes[..] else { panic!("a matrix, not {header}") };
    let size = bytes.len() / (rows * columns);
    (0..rows)
        .flat_map(|row| (0..columns).map(move |column| (column * rows + row) * size))
        .flat_map(|start| bytes[start..start + size].to_vec())
        .collect()
}

/// Values compared and values that differ, for each operation.
#[derive(Default)]
struct Tally(BTreeMap<String, (usize, usize)>);

impl Tally {
    fn compare(&mut self, op: &str, ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len(), "{op}");
        let differ = ours.iter().zip(theirs).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let entry = self.0.entry(op.to_owned()).or_default();
        entry.0 += ours.len();
        entry.1 += differ;
    }

    #[track_caller]
    fn finish(&self, what: &str) {
        for (op, (compared, differ)) in &self.0 {
            println!("{what}: {op}: {differ} of {compared} values differ");
        }
        let differ: usize = self.0.values().map(|(_, differ)| differ).sum();
        assert_eq!(differ, 0, "{what}: values differ, see above");
        assert!(!self.0.is_empty(), "{what}: nothing was compared");
    }
}

/// The folder of captures.
fn data(path: &str) -> PathBuf {
    let folder = std::env::var_os("RUNNER_ENGINE_DATA")
        .expect("RUNNER_ENGINE_DATA names the folder that holds `engines` and `h200`");
    PathBuf::from(folder).join(path)
}

/// PyTorch's operations one by one: norms, activations, attention.
fn replay_pytorch(o: &BTreeMap<String, Array>) {
    let mut tally = Tally::default();
    for name in o.keys().filter(|name| name.starts_with("norm.") && name.ends_with(".x")) {
        let case = name.trim_end_matches(".x");
        let of = |what: &str| &o[&format!("{case}.{what}")];
        let (x, gain) = (of("x").matrix(), &of("g").values);
        let composed = RmsNorm::transformers(B, 1e-6, x.rows());
        tally.compare("rms_norm composed", composed.apply(&x, gain).data(), &of("hf").values);
        let fused = RmsNorm::torch_fused(B, 1e-6);
        tally.compare("rms_norm fused", fused.apply(&x, gain).data(), &of("fused").values);
        let roots: Vec<f32> = (0..x.rows()).map(|row| composed.inverse_root(x.row(row))).collect();
        tally.compare("rms_norm root", &roots, &of("rsqrt").values);
    }
    if let Some(gate) = o.get("act.gate") {
        let each = |function: fn(f32) -> f32| -> Vec<f32> {
            gate.values.iter().map(|&x| B.round(function(x))).collect()
        };
        tally.compare("silu", &each(silu), &o["act.silu"].values);
        tally.compare("gelu", &each(gelu), &o["act.gelu"].values);
        tally.compare("gelu_tanh", &each(gelu_tanh), &o["act.gelu_tanh"].values);
        let gated = Gated { activation: Activation::Silu, format: B, rounds_activation: true };
        let swiglu = gated.apply(&gate.matrix(), &o["act.up"].matrix());
        tally.compare("swiglu", swiglu.data(), &o["act.swiglu"].values);
    }
    for name in o.keys().filter(|name| name.starts_with("att.") && name.ends_with(".q")) {
        let case = name.trim_end_matches(".q");
        let of = |what: &str| &o[&format!("{case}.{what}")];
        let [q, k, v] = ["q", "k", "v"].map(|part| of(part).heads_to_rows());
        let (query, key) = (&of("q").shape, &of("k").shape);
        let heads = Heads::causal(query[1], key[1], query[3]);
        let (queries, keys) = (query[2], key[2]);
        let plan = Plan::flash2(query[1], query[3], queries, keys, PROCESSORS);
        let y = flash(unit(B), B, &q, &k, &v, &heads, &plan);
        let what = format!("flash 2, {} parts", plan.parts);
        tally.compare(&what, y.data(), of("flash").heads_to_rows().data());
        // A cut capture does not hold every kernel's output of every case.
        let of = |what: &str| o.get(&format!("{case}.{what}"));
        if let Some(cudnn) = of("cudnn") {
            let y = flash(unit(B), B, &q, &k, &v, &heads, &Plan::CUDNN);
            tally.compare("cuDNN", y.data(), cudnn.heads_to_rows().data());
        }
        if let Some(out) = of("eager.out") {
            let y = eager(&Products::new(unit(B), B, &heads, keys), &q, &k, &v, &heads)
                .expect("attention");
            tally.compare("eager", y.data(), out.heads_to_rows().data());
        }
        if let (Some(scaled), Some(p32)) = (of("eager.scaled"), of("eager.p32")) {
            let mut p = Tensor::new(keys, scaled.values.clone());
            for row in 0..p32.values.len() / keys {
                p.row_mut(row)[row % queries + 1..].fill(f32::NEG_INFINITY);
                softmax(p.row_mut(row));
            }
            tally.compare("softmax", &p.data()[..p32.values.len()], &p32.values);
        }
    }
    tally.finish("PyTorch");
}

#[test]
#[ignore = "needs RUNNER_ENGINE_DATA: captures of engines"]
fn pytorchs_operations_are_met_in_every_bit() {
    replay_pytorch(&safetensors(&data("engines/pytorch-ops-bf16.safetensors")));
}

/// Which attention a transformers model ran.
#[derive(Clone, Copy)]
enum Ran {
    Eager,
    Sdpa,
}

/// A pass of a transformers model, with what was recorded beside it.
struct Pass<'a> {
    config: &'a Value,
    weights: &'a BTreeMap<String, Array>,
    recorded: &'a BTreeMap<String, Array>,
    ran: Ran,
    /// Whether each operation reads what was recorded, or what came before.
    local: bool,
    tally: Tally,
}

impl Pass<'_> {
    /// Compares a site; returns what the pass goes on with.
    fn site(&mut self, op: &str, name: &str, ours: Tensor) -> Tensor {
        let theirs = &self.recorded[name];
        let theirs = if name.starts_with("rope.") {
            theirs.heads_to_rows()
        } else {
            Tensor::new(ours.width(), theirs.values.clone())
        };
        self.tally.compare(op, ours.data(), theirs.data());
        if self.local { theirs } else { ours }
    }

    fn linear(&mut self, name: &str, x: &Tensor) -> Tensor {
        let tied = format!("{name}.weight");
        let weight =
            self.weights.get(&tied).unwrap_or_else(|| &self.weights["model.embed_tokens.weight"]);
        let bias = self.weights.get(&format!("{name}.bias")).map(|bias| &bias.values[..]);
        let y = Linear::new(unit(B), x.width(), B)
            .apply(&codes(B, x), &codes(B, &weight.matrix()), bias)
            .expect("a product");
        self.site("linear", &format!("{name}.y"), y)
    }

    fn norm(&mut self, name: &str, x: &Tensor) -> Tensor {
        let gain = &self.weights[&format!("{name}.weight")].values;
        let eps = self.config["rms_norm_eps"].as_f64().expect("an epsilon") as f32;
        let rows = x.data().len() / gain.len();
        let y = RmsNorm::transformers(B, eps, rows).apply(x, gain);
        self.site("rms_norm", &format!("{name}.y"), y)
    }

    fn run(&mut self) {
        let number = |key: &str| self.config[key].as_u64().map(|n| n as usize);
        let (heads, kv_heads) = (
            number("num_attention_heads").expect("heads"),
            number("num_key_value_heads").expect("heads"),
        );
        let hidden = number("hidden_size").expect("a width");
        let head_dim = number("head_dim").unwrap_or(hidden / heads);
        let layers = number("num_hidden_layers").expect("layers");
        let theta = self.config["rope_parameters"]["rope_theta"].as_f64().expect("theta");
        let ids = &self.recorded["ids"].values;
        let embedding = self.weights["model.embed_tokens.weight"].matrix();
        let rows: Vec<f32> =
            ids.iter().flat_map(|&id| embedding.row(id as usize)).copied().collect();
        let mut x = self.site("embed", "model.embed_tokens.y", Tensor::new(hidden, rows));

        let frequencies: Vec<f32> = (0..head_dim / 2)
            .map(|pair| B.round(1.0 / (theta.powf((2 * pair) as f64 / head_dim as f64) as f32)))
            .collect();
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let table = Table::new(&positions, &frequencies, 1.0, B);
        for (part, name) in [(&table.cos, "cos"), (&table.sin, "sin")] {
            let twice: Vec<f32> =
                (0..part.rows()).flat_map(|row| [part.row(row), part.row(row)].concat()).collect();
            self.tally.compare(name, &twice, &self.recorded[name].values.clone());
        }

        for layer in 0..layers {
            let at = format!("model.layers.{layer}");
            let normed = self.norm(&format!("{at}.input_layernorm"), &x);
            let [mut q, mut k, v] = ["q", "k", "v"]
                .map(|part| self.linear(&format!("{at}.self_attn.{part}_proj"), &normed));
            if self.weights.contains_key(&format!("{at}.self_attn.q_norm.weight")) {
                q = self.norm(&format!("{at}.self_attn.q_norm"), &q);
                k = self.norm(&format!("{at}.self_attn.k_norm"), &k);
            }
            let rotated =
                |x: &Tensor| rope::apply(Rotation::RoundsProducts, B, x, head_dim, &table);
            let q = self.site("rope", &format!("rope.{layer}.q"), rotated(&q));
            let k = self.site("rope", &format!("rope.{layer}.k"), rotated(&k));
            let shape = Heads::causal(heads, kv_heads, head_dim);
            let y = match self.ran {
                Ran::Eager => {
                    eager(&Products::new(unit(B), B, &shape, k.rows()), &q, &k, &v, &shape)
                        .expect("attention")
                }
                Ran::Sdpa => flash(unit(B), B, &q, &k, &v, &shape, &Plan::CUDNN),
            };
            let y = self.site("attention", &format!("{at}.self_attn.o_proj.x"), y);
            let y = self.linear(&format!("{at}.self_attn.o_proj"), &y);
            x = add(B, &x, &y);
            let normed = self.norm(&format!("{at}.post_attention_layernorm"), &x);
            let gate = self.linear(&format!("{at}.mlp.gate_proj"), &normed);
            let up = self.linear(&format!("{at}.mlp.up_proj"), &normed);
            let gated = Gated { activation: Activation::Silu, format: B, rounds_activation: true };
            let activated =
                Tensor::new(gate.width(), gate.data().iter().map(|&x| B.round(silu(x))).collect());
            self.site("silu", &format!("{at}.mlp.act_fn.y"), activated);
            let y = gated.apply(&gate, &up);
            let y = self.site("swiglu", &format!("{at}.mlp.down_proj.x"), y);
            let y = self.linear(&format!("{at}.mlp.down_proj"), &y);
            let sum = add(B, &x, &y);
            x = self.site("residual", &format!("{at}.y"), sum);
        }
        let x = self.norm("model.norm", &x);
        self.linear("lm_head", &x);
    }
}

fn replay_transformers(folder: &Path, ran: Ran) {
    let text = std::fs::read_to_string(folder.join("config.json")).expect("a configuration");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    let weights = safetensors(&folder.join("model.safetensors"));
    let recorded = safetensors(&folder.join("capture.safetensors"));
    for (local, what) in [(true, "each operation"), (false, "from the token ids alone")] {
        let mut pass = Pass {
            config: &config,
            weights: &weights,
            recorded: &recorded,
            ran,
            local,
            tally: Tally::default(),
        };
        pass.run();
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        pass.tally.finish(&format!("{name}, {what}"));
    }
}

#[test]
#[ignore = "needs RUNNER_ENGINE_DATA: captures of engines"]
fn transformers_models_are_met_in_every_bit_from_the_token_ids_alone() {
    replay_transformers(&data("engines/qwen2-eager-33"), Ran::Eager);
    replay_transformers(&data("engines/qwen3-sdpa-150"), Ran::Sdpa);
    replay_transformers(&data("engines/llama-sdpa-333"), Ran::Sdpa);
}

fn decoded(codes: &Codes) -> Tensor {
    let rows = (0..codes.rows()).flat_map(|row| codes.decode_row(row));
    Tensor::new(codes.width(), rows.collect())
}

/// Every operation of a capture of vLLM, SGLang or a package of PyTorch's.
fn replay_operations(path: &Path) {
    let capture = Capture::open(path);
    let mut tally = Tally::default();
    for call in &capture.calls {
        let given = |index| capture.given(call, index);
        let after = |index| capture.after(call, index);
        let number = |index: usize| call.given[index].as_f64().expect("a number") as f32;
        let op = call.op.as_str();
        match op {
            "_C::rms_norm" => {
                let x = given(1).matrix();
                let norm = RmsNorm::vllm(B, number(3), x.width(), x.rows(), false);
                tally.compare(op, norm.apply(&x, &given(2).values).data(), &after(0).values);
            }
            "_C::fused_add_rms_norm" => {
                let (x, residual) = (given(0).matrix(), given(1).matrix());
                let norm = RmsNorm::vllm(B, number(3), x.width(), x.rows(), true);
                let (y, sum) = norm.add_and_apply(&x, &residual, &given(2).values);
                tally.compare(op, y.data(), &after(0).values);
                tally.compare(op, sum.data(), &after(1).values);
            }
            "_C::rotary_embedding" | "sglang::apply_rope_inplace" => {
                let of_sglang = op.starts_with("sglang");
                let (q, k, cache, positions) = if of_sglang { (0, 1, 2, 3) } else { (1, 2, 4, 0) };
                let cache = given(cache).matrix();
                let half = cache.width() / 2;
                let positions = given(positions).values;
                let part = |from: usize| {
                    let rows = positions.iter().map(|&p| &cache.row(p as usize)[from..from + half]);
                    Tensor::new(half, rows.flatten().copied().collect())
                };
                let table = Table { cos: part(0), sin: part(half) };
                for index in [q, k] {
                    let x = given(index);
                    let x = if of_sglang { x.joined_heads() } else { x.matrix() };
                    let y = rope::apply(Rotation::Fused, B, &x, 2 * half, &table);
                    tally.compare(op, y.data(), &after(index).values);
                }
            }
            "_C::silu_and_mul" | "sglang::_run_activation_inplace" => {
                let rounds_activation = op.starts_with("_C");
                let (joined, out) = if rounds_activation { (1, 0) } else { (1, 2) };
                let gated = Gated { activation: Activation::Silu, format: B, rounds_activation };
                let y = gated.apply_joined(&given(joined).matrix());
                tally.compare(op, y.data(), &after(out).values);
            }
            "_C::dynamic_per_token_scaled_fp8_quant" | "sgl_kernel::sgl_per_token_quant_fp8" => {
                let of_sglang = op.starts_with("sgl");
                let (x, out) = if of_sglang { (given(0), 1) } else { (given(1), 0) };
                let rule = if of_sglang { Quantise::SGLANG } else { Quantise::VLLM };
                let x = x.matrix();
                let (codes, scales) = rule.grouped(&x, x.width());
                let values = decoded(&codes);
                tally.compare(op, values.data(), &after(out).values);
                tally.compare(op, &scales, &after(2).values);
            }
            "_C::per_token_group_fp8_quant" => {
                let (codes, scales) = Quantise::VLLM_GROUP.grouped(&given(0).matrix(), 128);
                let values = decoded(&codes);
                tally.compare(op, values.data(), &after(1).values);
                tally.compare(op, &scales, &after(2).values);
            }
            "_C::cutlass_scaled_mm" | "sgl_kernel::fp8_scaled_mm" | "aten::_scaled_mm" => {
                let of_vllm = op.starts_with("_C");
                let (first, bias, result) = match op {
                    "_C::cutlass_scaled_mm" => (1, 5, after(0)),
                    "aten::_scaled_mm" => (0, 4, capture.out(call)),
                    _ => (0, 5, capture.out(call)),
                };
                let (x, w) = (given(first).e4m3(), given(first + 1));
                let (rows, columns) = (w.shape[0], w.shape[1]);
                let mut turned = vec![0; w.bytes.len()];
                for row in 0..rows {
                    for column in 0..columns {
                        turned[column * rows + row] = w.bytes[row * columns + column];
                    }
                }
                let w = Codes::new(Format::E4m3, columns, rows, CodeData::Bits8(turned))
                    .expect("codes");
                let (x_scales, w_scales) = (given(first + 2), given(first + 3));
                let scales = |array: Array| {
                    if array.values.len() == 1 {
                        Scales::Tensor(array.values[0])
                    } else {
                        Scales::Row(array.values)
                    }
                };
                if of_vllm {
                    let bias = capture.maybe(call, bias);
                    let y = cutlass_scaled_mm(
                        unit(Format::E4m3),
                        &Schedule::FAST,
                        &Operand { codes: &x, scales: scales(x_scales) },
                        &Operand { codes: &w, scales: scales(w_scales) },
                        bias.as_ref().map(|bias| &bias.values[..]),
                        |_| x.rows(),
                        B,
                    );
                    tally.compare(op, y.expect("a product").data(), &result.values);
                    continue;
                }
                let schedule =
                    Schedule { epilogue: Epilogue::WeightThenActivation, ..Schedule::FAST };
                let bias = capture.maybe(call, bias);
                let y = scaled_mm(
                    unit(Format::E4m3),
                    &schedule,
                    &Operand { codes: &x, scales: scales(x_scales) },
                    &Operand { codes: &w, scales: scales(w_scales) },
                    bias.as_ref().map(|bias| &bias.values[..]),
                    B,
                );
                tally.compare(op, y.expect("a product").data(), &result.values);
            }
            "vllm::fp8_gemm_nt_op" => {
                let (x, w) = (given(0).e4m3(), given(2).e4m3());
                let blocks = |rows_per_block, scales| Scales::Block128 {
                    rows_per_block,
                    first_row: 0,
                    scales,
                };
                let y = block_scaled_mm(
                    unit(Format::E4m3),
                    &Schedule::FAST,
                    &Operand { codes: &x, scales: blocks(1, given(1).values) },
                    &Operand { codes: &w, scales: blocks(128, given(3).values) },
                    B,
                );
                tally.compare(op, y.expect("a product").data(), &after(4).values);
            }
            "vllm::unified_attention_with_output" => {
                let [q, k, v] = [0, 1, 2].map(&given);
                let heads = Heads::causal(q.shape[1], k.shape[1], q.shape[2]);
                let [q, k, v] = [q, k, v].map(|x| x.joined_heads());
                let sizes = [1, q.rows(), k.rows()];
                let plan = Plan::flash3(Flash3Call::Paged, &heads, sizes, PROCESSORS);
                let y = flash(unit(B), B, &q, &k, &v, &heads, &plan);
                tally.compare(op, y.data(), &after(3).values);
            }
            "fa3_fwd::_flash_attn_forward" => {
                let [q, k, v] = [0, 1, 2].map(&given);
                let heads = Heads::causal(q.shape[2], k.shape[2], q.shape[3]);
                let [q, k, v] = [q, k, v].map(|x| x.joined_heads());
                let sizes = [1, q.rows(), k.rows()];
                let plan = Plan::flash3(Flash3Call::Contiguous, &heads, sizes, PROCESSORS);
                let y = flash(unit(B), B, &q, &k, &v, &heads, &plan);
                tally.compare(op, y.data(), &capture.out(call).values);
            }
            "aten::_scaled_dot_product_cudnn_attention" => {
                let [q, k, v] = [0, 1, 2].map(&given);
                let heads = Heads::causal(q.shape[1], k.shape[1], q.shape[3]);
                let [q, k, v] = [q, k, v].map(|x| x.heads_to_rows());
                let y = flash(unit(B), B, &q, &k, &v, &heads, &Plan::CUDNN);
                tally.compare(op, y.data(), capture.out(call).heads_to_rows().data());
            }
            "aten::linear" | "aten::mm" | "aten::addmm" => {
                let (x, w, bias) = match op {
                    "aten::addmm" => (given(1), given(2), Some(given(0).values)),
                    "aten::linear" => {
                        (given(0), given(1), capture.maybe(call, 2).map(|b| b.values))
                    }
                    _ => (given(0), given(1), None),
                };
                let (x, w) = (x.matrix(), w.matrix());
                let w = if op == "aten::linear" { w } else { transposed(&w) };
                let y = Linear::new(unit(B), x.width(), B)
                    .apply(&codes(B, &x), &codes(B, &w), bias.as_deref())
                    .expect("a product");
                tally.compare(op, y.data(), &capture.out(call).values);
            }
            "aten::embedding" => {
                let (table, ids) = (given(0).matrix(), given(1).values);
                let rows: Vec<f32> =
                    ids.iter().flat_map(|&id| table.row(id as usize)).copied().collect();
                tally.compare(op, &rows, &capture.out(call).values);
            }
            "aten::bmm" => {
                let (a, b) = (given(0).values, given(1).values);
                let y: Vec<f32> = a.iter().flat_map(|a| b.iter().map(move |b| a * b)).collect();
                tally.compare(op, &y, &capture.out(call).values);
            }
            // These move data or plan work: they compute nothing.
            "_vllm_fa3_C::get_scheduler_metadata"
            | "vllm::unified_kv_cache_update"
            | "sglang::store_cache" => {}
            other => panic!("{}: `{other}` is not replayed", path.display()),
        }
    }
    tally.finish(&path.file_name().unwrap_or_default().to_string_lossy());
}

#[test]
#[ignore = "needs RUNNER_ENGINE_DATA: captures of engines"]
fn every_operation_of_vllm_sglang_and_torchao_is_met_in_every_bit() {
    for folder in ["vllm", "sglang", "torch"] {
        let folder = data("engines").join(folder);
        let entries = std::fs::read_dir(&folder).expect("captures");
        for entry in entries {
            replay_operations(&entry.expect("an entry").path());
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engines").join(name)
}

#[test]
fn a_cut_of_pytorchs_operations_is_met_in_every_bit() {
    replay_pytorch(&safetensors(&fixture("pytorch.safetensors")));
}

#[test]
fn one_call_of_each_operation_of_vllm_sglang_and_torchao_is_met_in_every_bit() {
    for name in ["vllm.npz", "sglang.npz", "torch.npz"] {
        replay_operations(&fixture(name));
    }
}

#[test]
fn what_vllm_computes_of_decoded_tokens_is_met_in_every_bit() {
    let o = safetensors(&fixture("vllm-decode.safetensors"));
    let matrix = |name: &str| o[name].matrix();
    let mut tally = Tally::default();
    let (q, k, v, y) = (matrix("attn.q"), matrix("attn.k"), matrix("attn.v"), matrix("attn.y"));
    let heads = Heads::causal(14, 2, 64);
    // A query within the prompt, then the decoded ones, each with the keys up to its own.
    for (index, position) in [148].into_iter().chain(300..307).enumerate() {
        let queries = if position < 300 { 300 } else { 1 };
        let keys = 0..position + 1;
        let plan = Plan::flash3(Flash3Call::Paged, &heads, [1, queries, keys.end], PROCESSORS);
        let (k, v) = (k.some_rows(keys.clone()), v.some_rows(keys));
        let ours = flash(unit(B), B, &q.some_rows(index..index + 1), &k, &v, &heads, &plan);
        tally.compare("attention", ours.data(), y.row(index));
    }
    let (x, w) = (codes(B, &matrix("product.x")), codes(B, &matrix("product.w")));
    let schedule = Schedule::FAST.with_split_k(3);
    let linear = Linear { schedule, ..Linear::new(unit(B), x.width(), B) };
    let ours = linear.apply(&x, &w, None).expect("a product");
    tally.compare("product in 3 parts", ours.data(), &o["product.y"].values);
    let norm = RmsNorm::vllm(B, 1e-6, 3584, 157, true);
    let ours = norm.apply(&matrix("norm.x"), &o["norm.gain"].values);
    tally.compare("norm", ours.data(), &o["norm.y"].values);
    tally.finish("decoded tokens");
    // What another order or another tile gives is not the same.
    let another = |sum| RmsNorm { sum, ..norm }.apply(&matrix("norm.x"), &o["norm.gain"].values);
    for sum in
        [RowSum::Cub { threads: 256, pairs: true }, RowSum::Block { threads: 448, vector: 8 }]
    {
        assert_ne!(another(sum).data(), &o["norm.y"].values[..], "{sum:?}");
    }
    let wide =
        Plan { keys: 128, ..Plan::flash3(Flash3Call::Paged, &heads, [1, 1, 307], PROCESSORS) };
    let ours = flash(unit(B), B, &q.some_rows(7..8), &k, &v, &heads, &wide);
    assert_ne!(ours.data(), y.row(7));
}

#[test]
fn flash_attention_3_over_split_keys_is_met_in_every_bit() {
    let o = safetensors(&fixture("flash-3.safetensors"));
    let numbers =
        |name: &str| o[name].values.iter().map(|&number| number as usize).collect::<Vec<usize>>();
    let (mut tally, mut split) = (Tally::default(), 0);
    for case in [19, 62, 74, 109, 178] {
        let named = |what: &str| format!("{case}.{what}");
        let [count, kv_heads, width] = numbers(&named("shape"))[..] else { panic!("three") };
        let heads = Heads::causal(count, kv_heads, width);
        let (rows, kept) = (numbers(&named("rows")), numbers(&named("heads")));
        let [q, k, v] = ["q", "k", "v"].map(|name| o[&named(name)].matrix());
        // One case is f16: what bf16 cannot hold says so.
        let bf16 = q.data().iter().all(|&value| B.round(value) == value);
        let format = if bf16 { B } else { Format::F16 };
        let some = |y: &Tensor| -> Vec<f32> {
            let head = |&head: &usize| head * width..(head + 1) * width;
            let row = |&row: &usize| kept.iter().flat_map(move |h| y.row(row)[head(h)].to_vec());
            rows.iter().flat_map(row).collect()
        };
        let calls = [(Flash3Call::Paged, "paged"), (Flash3Call::Contiguous, "contiguous")];
        for (call, name) in calls {
            let Some(wanted) = o.get(&named(name)) else { continue };
            let plan = Plan::flash3(call, &heads, [1, q.rows(), k.rows()], PROCESSORS);
            let ours = |plan: &Plan| some(&flash(unit(format), format, &q, &k, &v, &heads, plan));
            tally.compare(name, &ours(&plan), &wanted.values);
            let whole = Plan { parts: 1, ..plan };
            if plan != whole {
                split += 1;
                assert_ne!(ours(&whole), wanted.values, "case {case}: one part gives other bits");
            }
        }
    }
    assert_eq!(split, 7, "all but one of them split the keys");
    tally.finish("FlashAttention 3 over split keys");
}

#[test]
fn vllms_frequencies_are_powers_as_cuda_makes_them() {
    // Of heads of 128 and base 10^6, pair 18: the nearest f32 is the neighbour. At position 850 the
    // table's cosine then rounds to another bf16, and four values of seven heads differed from
    // a pass of vLLM 0.26 on an H200 that CUDA's power meets.
    let turned = |engine: &str| {
        let kernels = kernels_of(engine);
        let arm = EngineArm::new(kernels, B, *unit(B), None);
        // The first of the pair is 1, the second 0: what comes out is the cosine.
        let mut x = Tensor::zeros(1, 128);
        x.row_mut(0)[18] = 1.0;
        let plain = Rope {
            layout: RopeLayout::Halves,
            dimensions: 128,
            at_end: false,
            theta: 1e6,
            linear_scale: 1.0,
            magnitude: 1.0,
            factors: None,
            scaling: None,
            in_f32: false,
        };
        arm.rope(&x, &plain, 128, 850).expect("turned").row(0)[18]
    };
    assert_eq!(turned("vllm"), 0.174_804_69);
    let nearest = 1e6f64.powf(36.0 / 128.0) as f32;
    let table = rope::Table::new(&[850], &[1.0 / nearest], 1.0, B);
    assert_eq!(table.cos.data()[0], 0.175_781_25);
}

#[test]
fn the_sine_of_a_negative_zero_is_a_negative_zero() {
    assert_eq!(cuda_math::sin(-0.0).to_bits(), (-0.0f32).to_bits());
    assert_eq!(cuda_math::sin(0.0).to_bits(), 0);
}

#[test]
fn a_row_without_a_scale_is_nan_in_torchao_as_it_was_recorded() {
    let x = Tensor::new(4, vec![0.0, 0.0, 0.0, 0.0, 1.0, f32::NAN, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0]);
    let product = |rule: Quantise| {
        let (codes, scales) = rule.grouped(&x, 4);
        let w = Tensor::new(4, vec![1.0, 2.0, 3.0, 4.0]);
        let (w, w_scales) = rule.grouped(&w, 4);
        let x = Operand { codes: &codes, scales: Scales::Row(scales) };
        let w = Operand { codes: &w, scales: Scales::Row(w_scales) };
        let y = scaled_mm(unit(Format::E4m3), &Schedule::FAST, &x, &w, None, B);
        y.expect("a product").into_data()
    };
    let [zeros, nan, plain] = product(Quantise::torchao(B))[..] else { panic!("three rows") };
    assert!(zeros.is_nan() && nan.is_nan(), "0 / 0, and a NaN that came in");
    assert!((29.0..31.0).contains(&plain), "{plain}");
    let [zeros, ..] = product(Quantise::SGLANG)[..] else { panic!("three rows") };
    assert_eq!(zeros, 0.0, "an inverse of 0 is guarded");
}

/// A function of one number.
type Function = fn(f32) -> f32;
/// What it would be without rounding.
type Exact = fn(f64) -> f64;

/// The functions with samples, by their names in the file.
const SAMPLED: [(&str, Function); 15] = [
    ("ex2", sfu::ex2_ftz),
    ("lg2", sfu::lg2_ftz),
    ("rcp", sfu::rcp_ftz),
    ("rsqrt", sfu::rsqrt_ftz),
    ("sin", sfu::sin_ftz),
    ("cos", sfu::cos_ftz),
    ("expf", cuda_math::exp),
    ("__expf", cuda_math::exp_fast),
    ("exp2f", cuda_math::exp2),
    ("sinf", cuda_math::sin),
    ("cosf", cuda_math::cos),
    ("tanhf", cuda_math::tanh),
    ("rsqrtf", sfu::rsqrt),
    ("sigmoid", cuda_math::sigmoid),
    ("silu", silu),
];

#[test]
fn samples_of_functions_are_met_in_every_bit() {
    let samples = safetensors(&fixture("functions.safetensors"));
    let mut tally = Tally::default();
    for (name, function) in &SAMPLED {
        let ours: Vec<f32> =
            samples[&format!("in.{name}")].values.iter().map(|&x| function(x)).collect();
        tally.compare(name, &ours, &samples[&format!("out.{name}")].values);
    }
    tally.finish("samples");
}

#[test]
#[ignore = "needs RUNNER_ENGINE_DATA: captures of engines"]
fn all_samples_and_tables_of_functions_are_met_in_every_bit() {
    let path = data("h200/special-functions.safetensors");
    let samples = safetensors(&path);
    let mut tally = Tally::default();
    for (name, function) in &SAMPLED {
        let ours: Vec<f32> =
            samples[&format!("in.{name}")].values.iter().map(|&x| function(x)).collect();
        tally.compare(name, &ours, &samples[&format!("out.{name}")].values);
    }
    // Deltas to the correctly rounded result, two bits each; f64 is exact enough to round.
    let tables: [(&str, Function, Exact, u32); 4] = [
        ("ex2_frac", sfu::ex2_ftz, f64::exp2, 0),
        ("rcp_1_2", sfu::rcp_ftz, |x| 1.0 / x, 0x3f80_0000),
        ("rsqrt_1_4", sfu::rsqrt_ftz, |x| 1.0 / x.sqrt(), 0x3f80_0000),
        ("sqrt_1_4", sfu::sqrt_ftz, f64::sqrt, 0x3f80_0000),
    ];
    for (name, function, exact, first) in tables {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (index, byte) in samples[name].bytes.iter().enumerate() {
            for place in 0..4u32 {
                let index = 4 * index as u32 + place;
                let x = match first {
                    0 => index as f32 * f32::EPSILON,
                    _ => f32::from_bits(first + index),
                };
                let rounded = exact(f64::from(x)) as f32;
                let delta = i32::from(byte >> (2 * place) & 3) - 2;
                ours.push(function(x));
                theirs.push(f32::from_bits(rounded.to_bits().wrapping_add_signed(delta)));
            }
        }
        tally.compare(name, &ours, &theirs);
    }
    tally.finish("special functions");
}

/// A function of an input's number: of its bits as a float, or of a pair drawn from it.
type OfIndex = Box<dyn Fn(u32) -> f32 + Sync>;

/// The functions with digests over all inputs.
fn digested() -> Vec<(&'static str, OfIndex)> {
    let of_bits: [(&str, Function); 27] = [
        ("ex2.approx.ftz.f32", sfu::ex2_ftz),
        ("ex2.approx.f32", sfu::ex2),
        ("rcp.approx.ftz.f32", sfu::rcp_ftz),
        ("rcp.approx.f32", sfu::rcp),
        ("rsqrt.approx.ftz.f32", sfu::rsqrt_ftz),
        ("rsqrt.approx.f32", sfu::rsqrt),
        ("sqrt.approx.ftz.f32", sfu::sqrt_ftz),
        ("sqrt.approx.f32", sfu::sqrt),
        ("lg2.approx.ftz.f32", sfu::lg2_ftz),
        ("lg2.approx.f32", sfu::lg2),
        ("sin.approx.ftz.f32", sfu::sin_ftz),
        ("sin.approx.f32", sfu::sin_ftz),
        ("cos.approx.ftz.f32", sfu::cos_ftz),
        ("cos.approx.f32", sfu::cos_ftz),
        ("torch.exp", cuda_math::exp),
        ("torch.exp2", cuda_math::exp2),
        ("torch.log", cuda_math::log),
        ("torch.log2", cuda_math::log2),
        ("torch.sin", cuda_math::sin),
        ("torch.cos", cuda_math::cos),
        ("torch.tanh", cuda_math::tanh),
        ("torch.erf", cuda_math::erf),
        ("torch.rsqrt", sfu::rsqrt),
        ("torch.sigmoid", cuda_math::sigmoid),
        ("torch.silu", silu),
        ("torch.gelu", gelu),
        ("torch.gelu_tanh", gelu_tanh),
    ];
    let mut functions: Vec<(&'static str, OfIndex)> = Vec::new();
    for (name, function) in of_bits {
        functions.push((name, Box::new(move |index| function(f32::from_bits(index)))));
    }
    functions.push((
        "torch.pow",
        Box::new(|index| {
            let (low, high) = {
                let drawn = splitmix(u64::from(index));
                (drawn as u32, (drawn >> 32) as u32)
            };
            if index & 1 == 1 {
                let x = f32::from_bits(0x3f00_0000 + (low >> 7) % 0x0300_0000);
                cuda_math::pow(x, high as i32 as f32 * (1.0 / 67_108_864.0))
            } else {
                cuda_math::pow(f32::from_bits(low), f32::from_bits(high))
            }
        }),
    ));
    functions
}

fn splitmix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The sum of hashes of a function's results over block `block` of 2^22 inputs.
fn digest(function: &OfIndex, block: u32) -> u64 {
    (block << 22..=(block << 22 | 0x3f_ffff)).fold(0, |sum: u64, index| {
        let y = function(index);
        let bits = if y.is_nan() { 0x7fff_ffff } else { y.to_bits() };
        let hash = u64::from(bits).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index.into());
        let hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        sum.wrapping_add(hash ^ (hash >> 32))
    })
}

/// With `RUNNER_DIGEST_BLOCKS=1024` all 2^32 inputs of every function (half an hour on
/// two cores); otherwise four blocks of each, other ones for each function.
#[test]
fn digests_of_functions_over_blocks_of_all_inputs_are_those_of_a_gpu() {
    let digests = safetensors(&fixture("functions.safetensors"));
    let blocks: u32 = std::env::var("RUNNER_DIGEST_BLOCKS")
        .map_or(4, |text| text.parse().expect("RUNNER_DIGEST_BLOCKS is a number up to 1024"));
    for (place, (name, function)) in digested().into_iter().enumerate() {
        let theirs = &digests[&format!("digest.{name}")].bytes;
        let different: Vec<u32> = (0..blocks)
            .into_par_iter()
            .map(|turn| (turn * (1024 / blocks) + 37 * place as u32) % 1024)
            .filter(|&block| {
                let bytes = &theirs[8 * block as usize..][..8];
                bytes != digest(&function, block).to_le_bytes()
            })
            .collect();
        println!("{name}: {} of {blocks} blocks of 2^22 inputs differ", different.len());
        assert!(different.is_empty(), "{name}: blocks {different:?} differ");
    }
}

/// The values that `scripts/probe_kernels.py` draws.
fn drawn(format: Format, seed: u64, count: usize, amplitude: f32) -> Vec<f32> {
    (0..count as u64)
        .map(|index| {
            let z = splitmix(index.wrapping_add(seed << 40));
            let parts = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
            format.round((parts as i64 - 131_070) as f32 * (amplitude / 65_536.0))
        })
        .collect()
}

/// `[heads, tokens, width]` drawn, as `[tokens, heads * width]`.
fn drawn_heads(
    format: Format,
    seed: u64,
    [heads, tokens, width]: [usize; 3],
    amplitude: f32,
) -> Tensor {
    let values = drawn(format, seed, heads * tokens * width, amplitude);
    Array { shape: vec![1, heads, tokens, width], values, bytes: Vec::new() }.heads_to_rows()
}

/// What PyTorch made of drawn inputs.
fn replay_probes(o: &BTreeMap<String, Array>) {
    let mut tally = Tally::default();
    for (name, theirs) in o {
        let parts: Vec<&str> = name.split('.').collect();
        let number = |index: usize| parts[index].parse::<usize>().expect("a size");
        let format = |index: usize| parts[index].parse::<Format>().expect("a format");
        let (what, ours) = match parts[0] {
            "mean" => {
                let (rows, width) = (number(1), number(2));
                let x = drawn(Format::F32, 1, rows * width, 2.0);
                let mean = |row: &[f32]| {
                    let squares: Vec<f32> = row.iter().map(|x| x * x).collect();
                    RowSum::Torch { rows }.sum(&squares) * (1.0 / width as f32)
                };
                ("mean".to_owned(), x.chunks(width).map(mean).collect())
            }
            "fused" => {
                let (format, rows, width) = (format(1), number(2), number(3));
                let x = Tensor::new(width, drawn(format, 1, rows * width, 2.0));
                let norm = RmsNorm::torch_fused(format, 1e-6);
                let y = norm.apply(&x, &drawn(format, 2, width, 1.0));
                (format!("rms_norm fused {format}"), y.into_data())
            }
            kind @ ("softmax" | "softmax_bf16") => {
                let (rows, width) = (number(1), number(2));
                let format = if kind == "softmax" { Format::F32 } else { B };
                let mut x = Tensor::new(width, drawn(format, 3, rows * width, 8.0));
                (0..rows).for_each(|row| softmax(x.row_mut(row)));
                let y = x.into_data().into_iter().map(|y| format.round(y)).collect();
                (kind.to_owned(), y)
            }
            "att" => {
                let format = format(1);
                let [queries, keys, heads, kv_heads, head_dim] = [2, 3, 4, 5, 6].map(number);
                let causal = queries == keys;
                let shape = Heads { causal, ..Heads::causal(heads, kv_heads, head_dim) };
                let q = drawn_heads(format, 4, [heads, queries, head_dim], 4.0);
                let k = drawn_heads(format, 5, [kv_heads, keys, head_dim], 4.0);
                let v = drawn_heads(format, 6, [kv_heads, keys, head_dim], 1.0);
                // Two kernels are not worked out: see the files' heads.
                let split = queries == 1 && keys == 1000;
                let plan = match parts[7] {
                    "flash" => Plan::flash2(heads, head_dim, queries, keys, PROCESSORS),
                    "cudnn" if !split => Plan::CUDNN,
                    _ => continue,
                };
                let y = flash(unit(format), format, &q, &k, &v, &shape, &plan);
                let width = theirs.shape[1] * head_dim;
                let kept: Vec<f32> =
                    (0..queries).flat_map(|row| &y.row(row)[..width]).copied().collect();
                let theirs = theirs.heads_to_rows();
                tally.compare(&format!("{} {format}", parts[7]), &kept, theirs.data());
                continue;
            }
            "lin" => {
                let (format, rows, inner, outputs) = (format(1), number(2), number(3), number(4));
                let x = Tensor::new(inner, drawn(format, 7, rows * inner, 1.0));
                let w = Tensor::new(inner, drawn(format, 8, outputs * inner, 1.0));
                let bias = (parts[5] == "bias").then(|| drawn(format, 9, outputs, 1.0));
                let y = Linear::new(unit(format), inner, format)
                    .apply(&codes(format, &x), &codes(format, &w), bias.as_deref())
                    .expect("a product");
                (format!("linear {format}"), y.into_data())
            }
            other => panic!("`{other}` is no probe"),
        };
        tally.compare(&what, &ours, &theirs.values);
    }
    tally.finish("probes");
}

#[test]
fn drawn_inputs_give_what_pytorch_gave_on_an_h100() {
    replay_probes(&safetensors(&fixture("probes.safetensors")));
}

/// What the engine `transformers` chooses for an op whose result is known, and how many values
/// that leaves.
fn chosen(format: Format, call: &OpCall<'_>, observed: &Tensor) -> (String, usize, Vec<Product>) {
    let kernels = kernels_of("transformers");
    let arm = EngineArm::new(kernels, format, *unit(format), None);
    let chosen = arm.choose(call, observed).expect("computed");
    (chosen.kernel, chosen.mismatches, chosen.products)
}

/// What an op of llama.cpp on CUDA comes to: the kernel in words, values that differ, and orders.
fn of_llama_cpp(call: &OpCall<'_>, observed: &Tensor) -> (String, usize, Vec<Product>) {
    decoded_by_llama_cpp(0, call, observed)
}

/// The same where so many of the last tokens came in steps of their own.
fn decoded_by_llama_cpp(
    decoded: usize,
    call: &OpCall<'_>,
    observed: &Tensor,
) -> (String, usize, Vec<Product>) {
    let kernels = kernels_of("llama-cpp-cuda");
    let kernels = EngineKernels { decoded, ..kernels };
    let arm = EngineArm::new(kernels, Format::F32, *unit(Format::F32), None);
    let chosen = arm.choose(call, observed).expect("computed");
    (chosen.kernel, chosen.mismatches, chosen.products)
}

#[test]
fn products_of_llama_cpp_on_cuda_are_met_in_every_bit_for_every_type_of_weight() {
    let o = safetensors(&fixture("llama-cpp-cuda.safetensors"));
    let kinds: Vec<&str> =
        o.keys().filter_map(|key| key.strip_prefix("product.")?.strip_suffix(".w")).collect();
    assert_eq!(kinds.len(), 33);
    for case in kinds {
        let of = |name: &str| &o[&format!("product.{case}.{name}")];
        let (x, w, y) = (of("x").matrix(), of("w"), of("y").matrix());
        let (name, tokens) = case.split_once('.').expect("a type and a number of tokens");
        let kind = WeightType::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name));
        let kind = kind.expect("a type");
        let weight = Weight::new("blk.0.attn_k.weight", kind, y.width(), x.width(), &w.bytes);
        let call = OpCall::Matmul { x: &x, weight: weight.expect("a weight"), bias: None };
        let (kernel, mismatches, products) = of_llama_cpp(&call, &y);
        assert_eq!(mismatches, 0, "{case}: {kernel}");
        let float = matches!(kind, WeightType::F32 | WeightType::F16 | WeightType::BF16);
        let expected = match (float, tokens) {
            (false, "6" | "7") => "ggml MMVQ",
            (false, _) => "ggml MMQ",
            (true, "1") => "ggml mul_mat_vec_f",
            (true, "6") => "ggml mul_mat_f",
            (true, _) => "cuBLAS",
        };
        assert!(kernel.starts_with(&format!("{expected} of {kind}")), "{case}: {kernel}");
        assert_eq!(!products.is_empty(), expected == "cuBLAS", "{case}");
        // Other codes in one block of the weight, and outputs differ.
        let mut wrong = w.bytes.clone();
        let block = kind.block_bytes();
        wrong[block / 2..block].iter_mut().for_each(|byte| *byte ^= 2);
        let weight = Weight::new("blk.0.attn_k.weight", kind, y.width(), x.width(), &wrong);
        let call = OpCall::Matmul { x: &x, weight: weight.expect("a weight"), bias: None };
        assert!(of_llama_cpp(&call, &y).1 > 0, "{case}");
    }
}

#[test]
fn tokens_that_llama_cpp_decoded_one_by_one_are_products_of_their_own() {
    let o = safetensors(&fixture("llama-cpp-cuda.safetensors"));
    let (x, y) = (o["decoded.q3_K.x"].matrix(), o["decoded.q3_K.y"].matrix());
    let bytes = &o["product.q3_K.7.w"].bytes;
    let weight = Weight::new("blk.0.attn_output.weight", WeightType::Q3K, 32, 1024, bytes);
    let call = OpCall::Matmul { x: &x, weight: weight.expect("a weight"), bias: None };
    let (kernel, mismatches, _) = decoded_by_llama_cpp(4, &call, &y);
    assert_eq!(mismatches, 0, "{kernel}");
    assert_eq!(kernel, "ggml MMVQ of Q3_K");
    // In one step they would be another kernel's.
    assert!(of_llama_cpp(&call, &y).1 > 0);
}

#[test]
fn a_part_of_k_that_is_dealt_in_tiles_of_8_begins_with_its_rest() {
    let o = safetensors(&fixture("transformers-parts.safetensors"));
    let (x, w, y) = (o["x"].matrix(), &o["w"], o["y"].matrix());
    let weight = Weight::new("output.weight", WeightType::BF16, 8, x.width(), &w.bytes);
    let call = OpCall::Matmul { x: &x, weight: weight.expect("a weight"), bias: None };
    let (kernel, mismatches, _) = chosen(B, &call, &y);
    assert_eq!(mismatches, 0, "{kernel}");
    assert!(kernel.contains("in 11 parts of K rounded to bf16 dealt in tiles of 8"), "{kernel}");
}

#[test]
fn few_rows_by_outputs_that_are_no_multiple_of_8_are_added_in_16_lanes_of_f32() {
    let o = safetensors(&fixture("lanes.safetensors"));
    for (name, kind) in [("f32", WeightType::F32), ("f16", WeightType::F16)] {
        let of = |part: &str| &o[&format!("{name}.{part}")];
        let (x, w, y) = (of("x").matrix(), of("w"), of("y").matrix());
        let weight = Weight::new("output.weight", kind, y.width(), x.width(), &w.bytes);
        let call = OpCall::Matmul { x: &x, weight: weight.expect("a weight"), bias: None };
        let (kernel, mismatches, products) = match kind {
            WeightType::F32 => of_llama_cpp(&call, &y),
            _ => chosen(Format::F16, &call, &y),
        };
        assert_eq!(mismatches, 0, "{name}: {kernel}");
        assert!(kernel.ends_with("in 16 lanes of f32"), "{name}: {kernel}");
        assert_eq!(products.iter().map(|product| product.instruction).collect::<Vec<_>>(), [1]);
        // Listed in an engine's file, it is what the engine computes of itself.
        let engine = if kind == WeightType::F32 { "llama-cpp-cuda" } else { "transformers" };
        let mut kernels = kernels_of(engine);
        kernels.products = products.try_into().expect("one");
        let format = if kind == WeightType::F32 { Format::F32 } else { Format::F16 };
        let arm = EngineArm::new(kernels, format, *unit(format), None);
        let weight = Weight::new("output.weight", kind, y.width(), x.width(), &w.bytes);
        let computed = arm.matmul(&x, weight.expect("a weight"), None).expect("computed");
        assert_eq!(computed.to_le_bytes(), y.to_le_bytes(), "{name}");
    }
}

#[test]
fn scores_of_a_single_head_of_keys_are_a_product_of_vectors_at_any_length() {
    let o = safetensors(&fixture("lanes.safetensors"));
    let of = |name: &str| o[&format!("attention.{name}")].matrix();
    let (q, k, v, y) = (of("q"), of("k"), of("v"), of("y"));
    let shape = AttentionShape::causal(4, 1, 32, 663);
    let call = OpCall::Attention { q: &q, k: &k, v: &v, shape };
    let (kernel, mismatches, _) = of_llama_cpp(&call, &y);
    assert_eq!((kernel.as_str(), mismatches), ("attention ggml-cuda-f16-cache", 0));
}

#[test]
fn attention_and_norms_of_llama_cpp_on_cuda_are_met_in_every_bit() {
    let o = safetensors(&fixture("llama-cpp-cuda.safetensors"));
    for (case, cache) in [("f32.40", "f32"), ("f16.17", "f16"), ("f16.3", "f16"), ("f32.6", "f32")]
    {
        let of = |name: &str| o[&format!("attention.{case}.{name}")].matrix();
        let (q, k, v, y) = (of("q"), of("k"), of("v"), of("y"));
        let shape = AttentionShape::causal(4, 2, 64, 0);
        let call = OpCall::Attention { q: &q, k: &k, v: &v, shape };
        let (kernel, mismatches, _) = of_llama_cpp(&call, &y);
        assert_eq!(mismatches, 0, "{case}: {kernel}");
        assert_eq!(kernel, format!("attention ggml-cuda-{cache}-cache"));
    }
    let [x, y] = ["norm.x", "norm.y"].map(|name| o[name].matrix());
    let normed = ggml::rms_norm(&x, &o["norm.gain"].values, 1e-6);
    assert_eq!(normed.to_le_bytes(), y.to_le_bytes());
}

#[test]
fn the_orders_in_which_pytorch_adds_unaligned_and_small_products_are_found() {
    let o = safetensors(&fixture("transformers-orders.safetensors"));
    // The case, the type, and what is known of the order from all values of the pass.
    for (case, format, expected) in [
        (121, B, "cuBLAS in one chain of 8 products at a time"),
        (102, B, ""),
        (58, B, "of 8 products at a time"),
        (115, B, "cuBLAS in 4 parts of K rounded to bf16"),
        (66, B, "cuBLAS in 7 parts of K rounded to bf16"),
        (112, Format::F16, "cuBLAS in 14 parts of K rounded to f16"),
        (144, Format::F16, "cuBLAS in 14 parts of K of 8 products at a time"),
        (118, B, "cuBLAS in 8 parts of K of 8 products at a time"),
        // 560 elements in parts of 72: K is dealt in tiles of 8.
        (1198, B, "cuBLAS in 8 parts of K rounded to bf16"),
    ] {
        let of = |name: &str| &o[&format!("{case}/{name}")];
        let (x, w, y) = (of("x").matrix(), of("w"), of("y").matrix());
        let kind = if format == B { WeightType::BF16 } else { WeightType::F16 };
        let [rows, width] = [w.shape[0], w.shape[1]];
        let weight = Weight::new("output.weight", kind, rows, width, &w.bytes).expect("a weight");
        let call = OpCall::Matmul { x: &x, weight, bias: None };
        let (kernel, mismatches, _) = chosen(format, &call, &y);
        assert_eq!(mismatches, 0, "case {case}: {kernel}");
        assert!(kernel.contains(expected), "case {case}: {kernel}");
    }
}

#[test]
fn the_orders_of_eager_attention_with_unaligned_keys_are_found() {
    let o = safetensors(&fixture("transformers-orders.safetensors"));
    for (case, format, [heads, head_dim]) in [
        (144, Format::F16, [2, 128]),
        (146, Format::F16, [2, 128]),
        (116, B, [1, 80]),
        (109, B, [1, 128]),
        (91, B, [1, 80]),
        // f16 rows of 1,410 scores: a softmax of its own, whose threads count from an address.
        (1149, Format::F16, [1, 80]),
    ] {
        let of = |name: &str| o[&format!("{case}/{name}")].matrix();
        let (q, k, v) = (of("q"), of("k"), of("v"));
        let shape = AttentionShape::causal(heads, 1, head_dim, 0);
        let call = OpCall::Attention { q: &q, k: &k, v: &v, shape };
        let (kernel, mismatches, products) = chosen(format, &call, &of("attn"));
        assert_eq!(mismatches, 0, "case {case}: {kernel}");
        assert!(kernel.starts_with("attention eager"), "case {case}: {kernel}");
        assert_eq!(products.is_empty(), case == 1149, "case {case}: {kernel}");
        // With what was found in its file, the engine computes it of itself.
        let mut kernels = kernels_of("transformers");
        let own = products.iter().filter(|product| product.order() != Order::CHAIN);
        kernels.products = own.copied().collect::<Vec<_>>().try_into().expect("few");
        let arm = EngineArm::new(kernels, format, *unit(format), None);
        let y = arm.attention(&q, &k, &v, shape).expect("computed");
        assert_eq!(y.data(), of("attn").data(), "case {case}: {kernel}");
        // And it finds the same again: nothing of the file is lost.
        let again = arm.choose(&call, &of("attn")).expect("computed");
        assert_eq!((again.mismatches, again.products), (0, products), "case {case}: {kernel}");
        if case == 91 {
            assert!(kernel.contains("values in 5 parts of K rounded to bf16"), "{kernel}");
        }
    }
}

#[test]
fn frequencies_divide_in_f32_and_are_powers_as_the_cpu_makes_them() {
    let o = safetensors(&fixture("transformers-orders.safetensors"));
    for (case, format, head_dim, theta, first_position) in [
        (105, Format::F16, 96, 1e6, 0),
        (84, Format::F16, 80, 5e5, 0),
        (51, B, 96, 1e4, 0),
        // Here the 20th power is not the nearest f32.
        (1070, Format::F16, 96, 1e4, 219),
    ] {
        let of = |name: &str| o[&format!("{case}/{name}")].matrix();
        let layout = RopeLayout::Halves;
        let rope = Rope {
            theta,
            layout,
            dimensions: head_dim,
            at_end: false,
            factors: None,
            magnitude: 1.0,
            linear_scale: 1.0,
            scaling: None,
            in_f32: false,
        };
        let x = of("turned");
        let call = OpCall::Rope { x: &x, rope: &rope, head_dim, first_position };
        let (kernel, mismatches, _) = chosen(format, &call, &of("y"));
        assert_eq!(
            (kernel.as_str(), mismatches),
            ("rope transformers-f32-frequencies", 0),
            "{case}"
        );
    }
}
