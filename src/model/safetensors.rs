//! A Hugging Face folder: `config.json` and one or more safetensors files.
//!
//! It finds the files, checks their headers and gives every tensor its canonical
//! (GGUF) name, which an architecture may decide; tensors that hold several of these
//! are cut. It knows neither which tensors must be there nor how values are decoded. A name is
//! parsed from its beginning, never searched for a part, and a shard may not lie outside the
//! folder.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::architecture::{Architecture, Norms, Presence};
use super::config::Config;
use super::error::{FETCH_AGAIN, Fault, ModelError, shown};
use super::json;
use super::mixture::Mixture;
use super::other_files;
use super::quantised::{Part, Piece, Quantised};
use super::weights::{Steps, WeightType};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Endings of tensors that are known to belong to quantised checkpoints, and are not read.
const OF_OTHER_METHODS: [&str; 18] = [
    "_scale",
    "_scale_inv",
    "_zero_point",
    "_packed",
    "_shape",
    "_g_idx",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    "_global_scale",
    ".SCB",
    ".absmax",
    ".quant_map",
    "_scale_2",
    ".k_scale",
    ".v_scale",
    ".weight_format",
];
/// Scales of a cache of keys and values, after the name of the attention.
const OF_CACHE: [&str; 9] = [
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "attn.k_scale",
    "attn.v_scale",
    "k_proj.k_scale",
    "v_proj.v_scale",
    "kv_cache_scale",
];
/// The limit of the safetensors format.
const LONGEST_HEADER: u64 = 100_000_000;

/// A tensor of a safetensors file under its canonical name.
#[derive(Debug)]
pub(super) struct TensorInfo {
    pub name: String,
    pub kind: WeightType,
    pub rows: usize,
    pub width: usize,
    /// Bytes of the file.
    pub bytes: Range<usize>,
    /// How values lie among them, where rows do not follow one another.
    pub steps: Option<Steps>,
}

/// What a file holds of a model.
pub(super) enum Held {
    /// A tensor of values.
    Tensor(TensorInfo),
    /// A piece of a weight of codes, or of several whose rows stand below one another: their
    /// canonical names, each with its rows; of one alone these are not told.
    Piece { weights: Vec<(String, usize)>, part: Part, piece: Piece },
}

impl Held {
    /// The same, so many bytes further on.
    fn moved(mut self, ahead: usize) -> Held {
        let (Held::Tensor(TensorInfo { bytes, .. })
        | Held::Piece { piece: Piece { bytes, .. }, .. }) = &mut self;
        *bytes = ahead + bytes.start..ahead + bytes.end;
        self
    }
}

/// What a safetensors file holds.
pub(super) struct Contents {
    pub held: Vec<Held>,
    /// The Hugging Face names of what a pass reads.
    pub names: BTreeSet<String>,
    /// What the file calls the tensors, by their canonical names; of codes the tensor of these.
    pub called: BTreeMap<String, String>,
}

/// A file of weights.
pub(super) struct Shard {
    pub path: PathBuf,
    /// The tensors that the index says are here, by their Hugging Face names; `None`
    /// where there is no index.
    pub promised: Option<BTreeSet<String>>,
}

/// The files that hold the weights.
pub(super) fn files(folder: &Path) -> Result<Vec<Shard>, ModelError> {
    let single = folder.join(SINGLE_FILE).exists();
    let index = folder.join(INDEX_FILE);
    if single && !index.exists() {
        return Ok(vec![Shard { path: inside(folder, SINGLE_FILE)?, promised: None }]);
    }
    if !index.exists() {
        let (problem, remedy) = other_files::other_weights(folder);
        return Err(Fault::malformed(problem, remedy).at(folder));
    }
    let json = super::read_small(&index)?;
    let index_of: Index =
        json::read(&json).map_err(|problem| Fault::malformed(problem, FETCH_AGAIN).at(&index))?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, shard) in index_of.weight_map {
        shards.entry(shard).or_default().insert(tensor);
    }
    if single && let Some(other) = shards.keys().find(|shard| *shard != SINGLE_FILE) {
        return Err(Fault::malformed(
            format!(
                "it holds {SINGLE_FILE} and {INDEX_FILE}, which places tensors in `{}`: two models",
                shown(other)
            ),
            format!("remove {SINGLE_FILE}, or the index and its files"),
        )
        .at(folder));
    }
    let shard = |(name, tensors): (String, BTreeSet<String>)| {
        let is_name = Path::new(&name).components().count() == 1;
        if is_name && !folder.join(&name).exists() {
            let (count, first) = (tensors.len(), tensors.first().map_or("", String::as_str));
            let (name, first) = (shown(&name), shown(first));
            return Err(Fault::malformed(
                format!(
                    "it places {count} tensors in `{name}`, `{first}` among them, and the folder has \
                     no such file"
                ),
                "fetch all files of the model",
            )
            .at(&index));
        }
        Ok(Shard { path: inside(folder, &name)?, promised: Some(tensors) })
    };
    shards.into_iter().map(shard).collect()
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The path of `name` in `folder`. A link may lead to the blob store that the
/// Hugging Face cache keeps beside its snapshots, and nowhere else outside.
fn inside(folder: &Path, name: &str) -> Result<PathBuf, ModelError> {
    let outside = || {
        Fault::malformed(
            format!("its shard `{}` lies outside the folder", shown(name)),
            "fetch the model again from a source that you trust",
        )
        .at(folder)
    };
    let mut components = Path::new(name).components();
    let (Some(Component::Normal(_)), None) = (components.next(), components.next()) else {
        return Err(outside());
    };
    let path = folder.join(name);
    let resolve = |path: &Path| {
        path.canonicalize().map_err(|source| ModelError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        })
    };
    let (target, home) = (resolve(&path)?, resolve(folder)?);
    let cache = home.parent().filter(|parent| parent.ends_with("snapshots"));
    let blobs = cache.and_then(Path::parent).map(|model| model.join("blobs"));
    let parent = target.parent();
    if parent == Some(&home) || (blobs.is_some() && parent == blobs.as_deref()) {
        Ok(path)
    } else {
        Err(outside())
    }
}

/// Reads and checks the header of a safetensors file.
pub(super) fn parse(
    file: &[u8],
    config: &Config,
    quantised: Option<&Quantised>,
) -> Result<Contents, Fault> {
    let bad = |problem: String| Fault::malformed(problem, FETCH_AGAIN);
    other_files::refuse_unfetched(file)?;
    let Some(length) = file.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)) else {
        return Err(bad("it is shorter than a safetensors header".into()));
    };
    let header = usize::try_from(length).ok().filter(|_| length <= LONGEST_HEADER);
    let Some(json) = header.and_then(|length| file[8..].get(..length)) else {
        return Err(bad(format!(
            "its header of {length} bytes does not fit the file of {}",
            file.len()
        )));
    };
    let keys: UniqueKeys =
        serde_json::from_slice(json).map_err(|error| bad(format!("its header: {error}")))?;
    // Checks that shapes, types and places agree and that the places tile the data.
    let metadata: Metadata =
        serde_json::from_slice(json).map_err(|error| bad(format!("its header: {error}")))?;
    let data = &file[8 + json.len()..];
    if metadata.data_len() != data.len() {
        return Err(bad(format!(
            "its tensors need {} bytes, but {} follow the header",
            metadata.data_len(),
            data.len()
        )));
    }
    let mut contents =
        Contents { held: Vec::new(), names: BTreeSet::new(), called: BTreeMap::new() };
    let ahead = 8 + json.len();
    let moved = |bytes: Range<usize>| ahead + bytes.start..ahead + bytes.end;
    for own_name in keys.0 {
        let Some(info) = metadata.info(&own_name) else { continue };
        let in_tensor = |fault: Fault| fault.in_tensor(&own_name);
        let name = whole_name(&own_name);
        let before = contents.held.len();
        let piece = || {
            let (start, end) = info.data_offsets;
            let (dtype, shape) = (info.dtype, info.shape.clone());
            Piece { file: 0, bytes: moved(start..end), dtype, shape, steps: None }
        };
        if let Some(mixture) = Mixture::of(&name, config) {
            let parts = mixture.cut(info, quantised).map_err(in_tensor)?;
            contents.held.extend(parts.into_iter().map(|part| part.moved(ahead)));
        } else if let Some((layer, part)) = quantised.and_then(|known| known.part(&name)) {
            let weights = match canonical_name(&format!("{layer}.weight"), config) {
                Canonical::Known(canonical) => vec![(canonical, 0)],
                Canonical::Fused(parts) => parts,
                Canonical::Ignored => continue,
                _ => return Err(of_no_use(&own_name, config)),
            };
            contents.held.push(Held::Piece { weights, part, piece: piece() });
        } else {
            let codes = quantised.is_some_and(|known| known.are_codes(info.dtype));
            let codes = codes && name.ends_with(".weight");
            let whole = |canonical: String| {
                let tensor = tensor(canonical, info.dtype, &info.shape, info.data_offsets);
                tensor.map_err(in_tensor)
            };
            match canonical_name(&name, config) {
                Canonical::Ignored => continue,
                // Of activations, which no weight depends on.
                Canonical::InputScale if quantised.is_some() => continue,
                // No weight depends on a cache's scales: an arm may keep values with them.
                Canonical::OfCache(canonical) if quantised.is_some() => {
                    let all = info.shape.iter().product();
                    for canonical in canonical {
                        let tensor = tensor(canonical, info.dtype, &[all], info.data_offsets);
                        let tensor = Held::Tensor(tensor.map_err(in_tensor)?);
                        contents.held.push(tensor.moved(ahead));
                    }
                }
                Canonical::Known(canonical) if codes => {
                    let (weights, part) = (vec![(canonical, 0)], Part::Codes);
                    contents.held.push(Held::Piece { weights, part, piece: piece() });
                }
                Canonical::Fused(weights) if codes => {
                    contents.held.push(Held::Piece { weights, part: Part::Codes, piece: piece() });
                }
                Canonical::Known(canonical) => {
                    let tensor = Held::Tensor(whole(canonical)?);
                    contents.held.push(tensor.moved(ahead));
                }
                Canonical::Fused(parts) => {
                    let parts = cut(&whole(String::new())?, parts).map_err(in_tensor)?;
                    let parts = parts.into_iter().map(|part| Held::Tensor(part).moved(ahead));
                    contents.held.extend(parts);
                }
                Canonical::Scales | Canonical::InputScale if quantised.is_none() => {
                    let problem = "it is a scale, and there is no `quantization_config`";
                    return Err(in_tensor(Fault::malformed(problem, FETCH_AGAIN)));
                }
                Canonical::Scales => {
                    let scale = quantised.map_or("", Quantised::scale_name);
                    return Err(in_tensor(Fault::malformed(
                        format!("scales of its `quant_method` are called `{scale}`"),
                        FETCH_AGAIN,
                    )));
                }
                Canonical::Unknown | Canonical::InputScale | Canonical::OfCache(_) => {
                    return Err(of_no_use(&own_name, config));
                }
            }
        }
        for held in &contents.held[before..] {
            let weights: Vec<&String> = match held {
                Held::Tensor(tensor) => vec![&tensor.name],
                Held::Piece { weights, part: Part::Codes, .. } => {
                    weights.iter().map(|(weight, _)| weight).collect()
                }
                Held::Piece { .. } => Vec::new(),
            };
            let called = weights.into_iter().map(|weight| (weight.clone(), own_name.clone()));
            contents.called.extend(called);
        }
        contents.names.insert(own_name);
    }
    Ok(contents)
}

/// A tensor that no pass reads.
fn of_no_use(name: &str, config: &Config) -> Fault {
    if OF_OTHER_METHODS.iter().any(|ending| name.ends_with(ending)) {
        return Fault::unsupported(
            "it belongs to a way of quantising that `quantization_config` does not name, or to a \
             layer that no pass has",
            "fetch the folder again with its config.json, or choose the model's unquantised folder",
        )
        .in_tensor(name);
    }
    if let Some((what, remedy)) = other_files::owner_of(name) {
        return Fault::unsupported(what, remedy).in_tensor(name);
    }
    Fault::unsupported(
        format!("the forward pass of {} has no use for it", config.architecture.name()),
        "choose a model of one of the known architectures, without adapters",
    )
    .in_tensor(name)
}

fn tensor(
    name: String,
    dtype: Dtype,
    shape: &[usize],
    place: (usize, usize),
) -> Result<TensorInfo, Fault> {
    let kind = match dtype {
        Dtype::F32 => WeightType::F32,
        Dtype::F64 => WeightType::F64,
        Dtype::F16 => WeightType::F16,
        Dtype::BF16 => WeightType::BF16,
        other @ (Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::I8 | Dtype::U8) => {
            return Err(Fault::malformed(
                format!(
                    "its type is {other:?}, and `quantization_config` says nothing of such codes"
                ),
                FETCH_AGAIN,
            ));
        }
        other => {
            return Err(Fault::unsupported(
                format!("its type is {other:?}"),
                "save the model in F32, F16 or BF16",
            ));
        }
    };
    let (rows, width) = match *shape {
        [width] => (1, width),
        [rows, width] => (rows, width),
        // A convolution of each channel by itself.
        [channels, 1, taps] if name.ends_with("conv1d.weight") => (channels, taps),
        _ => {
            return Err(Fault::malformed(
                format!("its shape {shape:?} is neither a vector's nor a matrix's"),
                FETCH_AGAIN,
            ));
        }
    };
    if rows == 0 || width == 0 {
        return Err(Fault::malformed(format!("its shape {shape:?} has a zero"), FETCH_AGAIN));
    }
    Ok(TensorInfo { name, kind, rows, width, bytes: place.0..place.1, steps: None })
}

/// The tensors that stand below one another in a fused one.
fn cut(whole: &TensorInfo, parts: Vec<(String, usize)>) -> Result<Vec<TensorInfo>, Fault> {
    let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
    if rows != whole.rows {
        return Err(Fault::malformed(
            format!("it has {} rows, and what it holds by the config has {rows}", whole.rows),
            FETCH_AGAIN,
        ));
    }
    let row_bytes = whole.bytes.len() / whole.rows;
    let mut start = whole.bytes.start;
    let part = |(name, rows): (String, usize)| {
        let bytes = start..start + rows * row_bytes;
        start = bytes.end;
        TensorInfo { name, kind: whole.kind, rows, width: whole.width, bytes, steps: None }
    };
    Ok(parts.into_iter().map(part).collect())
}

/// What a Hugging Face tensor is called in a GGUF file.
enum Canonical {
    Known(String),
    /// Several tensors with their rows, one below the other.
    Fused(Vec<(String, usize)>),
    /// The scales of codes.
    Scales,
    /// The scale of a product's activations.
    InputScale,
    /// The scales of what attention keeps of keys or values, under these names.
    OfCache(Vec<String>),
    /// Derived data that old checkpoints saved.
    Ignored,
    Unknown,
}

/// The name of a tensor in a language model: embedding models are saved without the `model.` before
/// it, and transformers finds each of them by the longer name.
fn whole_name(name: &str) -> Cow<'_, str> {
    match ["embed_tokens.", "layers.", "norm."].iter().any(|part| name.starts_with(part)) {
        true => Cow::Owned(format!("model.{name}")),
        false => Cow::Borrowed(name),
    }
}

fn canonical_name(name: &str, config: &Config) -> Canonical {
    let scales = name.strip_suffix("_scale_inv").or_else(|| name.strip_suffix("_scale"));
    if let Some(of) = scales.filter(|of| of.ends_with(".weight")) {
        return match canonical_name(of, config) {
            Canonical::Known(_) | Canonical::Fused(_) => Canonical::Scales,
            Canonical::Ignored => Canonical::Ignored,
            _ => Canonical::Unknown,
        };
    }
    let of_input = ["input_scale", "input_global_scale", "input_zero_point"];
    if let Some(of) = of_input.iter().find_map(|ending| name.strip_suffix(ending)) {
        return match canonical_name(&format!("{of}weight"), config) {
            Canonical::Known(_) | Canonical::Fused(_) => Canonical::InputScale,
            Canonical::Ignored => Canonical::Ignored,
            _ => Canonical::Unknown,
        };
    }
    let of_attention = |of: &&str| of.ends_with(".self_attn.");
    let before = |ending: &&str| name.strip_suffix(ending).filter(of_attention);
    if let Some(of) = OF_CACHE.iter().find_map(before) {
        return match canonical_name(&format!("{of}o_proj.weight"), config) {
            Canonical::Known(of) => Canonical::OfCache(scales_of_cache(name, &of)),
            Canonical::Ignored => Canonical::Ignored,
            _ => Canonical::Unknown,
        };
    }
    // What predicts further tokens, which a pass does without.
    if config.architecture == Architecture::Qwen3Next && name.starts_with("mtp.") {
        return Canonical::Ignored;
    }
    let known = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "model.norm.bias" if config.architecture.takes_means_off() => "output_norm.bias",
        "lm_head.weight" => "output.weight",
        _ => return canonical_block_name(name, config),
    };
    Canonical::Known(known.to_owned())
}

/// What a cache's scales are called in a block whose output projection has that canonical name. Those
/// of queries no kernel of the project's own applies.
fn scales_of_cache(name: &str, projection: &str) -> Vec<String> {
    let block = projection.strip_suffix("attn_output.weight").unwrap_or(projection);
    let which = match name.rsplit('.').next() {
        Some("k_scale") => "k_cache",
        Some("v_scale") => "v_cache",
        Some("kv_scale" | "kv_cache_scale") => "kv_cache",
        _ => return Vec::new(),
    };
    vec![format!("{block}attn_{which}.scale")]
}

fn canonical_block_name(name: &str, config: &Config) -> Canonical {
    let Some((layer, part)) =
        name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
    else {
        return Canonical::Unknown;
    };
    let Some(layer) = layer.parse::<u32>().ok().filter(|index| index.to_string() == layer) else {
        return Canonical::Unknown;
    };
    let architecture = config.architecture;
    // What predicts further tokens stands behind the blocks of a pass, which do without it.
    if architecture == Architecture::DeepSeekV3 && layer as usize >= config.layers {
        return Canonical::Ignored;
    }
    if let Some(canonical) = of_experts(part, config) {
        return Canonical::Known(format!("blk.{layer}.{canonical}"));
    }
    if let Some(canonical) = of_head_norms(part, config) {
        return Canonical::Known(format!("blk.{layer}.{canonical}"));
    }
    let norms = config.architecture.norms();
    let glm = config.architecture == Architecture::Glm4;
    let fused = |parts: &[(&str, usize)]| {
        let part = |(part, rows): &(&str, usize)| (format!("blk.{layer}.{part}.weight"), *rows);
        Canonical::Fused(parts.iter().map(part).collect())
    };
    let part = match part {
        "input_layernorm.weight" => "attn_norm.weight",
        "input_layernorm.bias" if architecture.takes_means_off() => "attn_norm.bias",
        "post_attention_layernorm.bias" if architecture.takes_means_off() => "ffn_norm.bias",
        "mlp.c_fc.weight" if architecture == Architecture::Starcoder2 => "ffn_up.weight",
        "mlp.c_fc.bias" if architecture == Architecture::Starcoder2 => "ffn_up.bias",
        "mlp.c_proj.weight" if architecture == Architecture::Starcoder2 => "ffn_down.weight",
        "mlp.c_proj.bias" if architecture == Architecture::Starcoder2 => "ffn_down.bias",
        "linear_attn.in_proj_qkvz.weight" if config.delta.is_some() => "ssm_in.weight",
        "linear_attn.in_proj_ba.weight" if config.delta.is_some() => "ssm_ba.weight",
        "linear_attn.conv1d.weight" if config.delta.is_some() => "ssm_conv1d.weight",
        "linear_attn.A_log" if config.delta.is_some() => "ssm_a_log.weight",
        "linear_attn.dt_bias" if config.delta.is_some() => "ssm_dt.bias",
        "linear_attn.norm.weight" if config.delta.is_some() => "ssm_norm.weight",
        "linear_attn.out_proj.weight" if config.delta.is_some() => "ssm_out.weight",
        "self_attn.sinks" if architecture.has_sinks() => "attn_sinks.weight",
        "self_attn.q_a_proj.weight" if config.latent.is_some() => "attn_q_a.weight",
        "self_attn.q_a_proj.bias" if config.latent.is_some() => "attn_q_a.bias",
        "self_attn.q_a_layernorm.weight" if config.latent.is_some() => "attn_q_a_norm.weight",
        "self_attn.q_b_proj.weight" if config.latent.is_some() => "attn_q_b.weight",
        "self_attn.kv_a_proj_with_mqa.weight" if config.latent.is_some() => "attn_kv_a_mqa.weight",
        "self_attn.kv_a_proj_with_mqa.bias" if config.latent.is_some() => "attn_kv_a_mqa.bias",
        "self_attn.kv_a_layernorm.weight" if config.latent.is_some() => "attn_kv_a_norm.weight",
        "self_attn.kv_b_proj.weight" if config.latent.is_some() => "attn_kv_b.weight",
        "self_attn.q_proj.weight" => "attn_q.weight",
        "self_attn.k_proj.weight" => "attn_k.weight",
        "self_attn.v_proj.weight" => "attn_v.weight",
        "self_attn.q_proj.bias" => "attn_q.bias",
        "self_attn.k_proj.bias" => "attn_k.bias",
        "self_attn.v_proj.bias" => "attn_v.bias",
        "self_attn.q_norm.weight" => "attn_q_norm.weight",
        "self_attn.k_norm.weight" => "attn_k_norm.weight",
        "self_attn.o_proj.weight" => "attn_output.weight",
        "self_attn.o_proj.bias" => "attn_output.bias",
        "post_attention_layernorm.weight" => match (norms, glm) {
            // The names of Llama, of GLM, and of those that mean what they say.
            (Norms::Before, _) | (_, true) => "ffn_norm.weight",
            _ => "post_attention_norm.weight",
        },
        "post_self_attn_layernorm.weight" if glm => "post_attention_norm.weight",
        "post_mlp_layernorm.weight" if glm => "post_ffw_norm.weight",
        "pre_feedforward_layernorm.weight" if norms == Norms::Both => "ffn_norm.weight",
        "post_feedforward_layernorm.weight" if norms != Norms::Before => "post_ffw_norm.weight",
        "mlp.gate_proj.weight" => "ffn_gate.weight",
        "mlp.up_proj.weight" => "ffn_up.weight",
        "mlp.down_proj.weight" => "ffn_down.weight",
        "mlp.gate_proj.bias" => "ffn_gate.bias",
        "mlp.up_proj.bias" => "ffn_up.bias",
        "mlp.down_proj.bias" => "ffn_down.bias",
        "self_attn.qkv_proj.weight" if config.architecture == Architecture::Phi3 => {
            let [queries, keys] = [config.heads, config.kv_heads].map(|n| n * config.head_dim);
            return fused(&[("attn_q", queries), ("attn_k", keys), ("attn_v", keys)]);
        }
        "mlp.gate_up_proj.weight" if glm || config.architecture == Architecture::Phi3 => {
            return fused(&[("ffn_gate", config.ffn), ("ffn_up", config.ffn)]);
        }
        "self_attn.rotary_emb.inv_freq" => return Canonical::Ignored,
        _ => return Canonical::Unknown,
    };
    Canonical::Known(format!("blk.{layer}.{part}"))
}

/// The name within its block of a head's own gain, which is put together with those of the others.
fn of_head_norms(part: &str, config: &Config) -> Option<String> {
    if config.head_norms == Presence::Never {
        return None;
    }
    let (norms, head) = part.strip_prefix("self_attn.")?.split_once(".norms.")?;
    let head = head.strip_suffix(".weight")?;
    let number = head.parse::<usize>().ok().filter(|number| number.to_string() == head)?;
    let (name, heads) = match norms {
        "q_layernorm" => ("attn_q_norm", config.heads),
        "k_layernorm" => ("attn_k_norm", config.kv_heads),
        _ => return None,
    };
    (number < heads).then(|| format!("{name}.{number}.weight"))
}

/// The canonical name within its block of a tensor that belongs to a mixture of experts.
fn of_experts(part: &str, config: &Config) -> Option<String> {
    config.experts.as_ref()?;
    let rest = match config.architecture {
        Architecture::Mixtral => part.strip_prefix("block_sparse_moe.")?,
        _ => part.strip_prefix("mlp.")?,
    };
    let fixed = match (rest, config.architecture) {
        ("gate.weight", _) => "ffn_gate_inp.weight",
        ("router.weight", Architecture::GptOss) => "ffn_gate_inp.weight",
        ("router.bias", Architecture::GptOss) => "ffn_gate_inp.bias",
        ("gate.e_score_correction_bias", Architecture::DeepSeekV3) => "exp_probs_b.bias",
        ("shared_expert_gate.weight", Architecture::Qwen2Moe | Architecture::Qwen3Next) => {
            "ffn_gate_inp_shexp.weight"
        }
        _ => "",
    };
    if !fixed.is_empty() {
        return Some(fixed.to_owned());
    }
    let projection = |name: &str| match name {
        "gate_proj.weight" | "w1.weight" => Some("ffn_gate"),
        "up_proj.weight" | "w3.weight" => Some("ffn_up"),
        "down_proj.weight" | "w2.weight" => Some("ffn_down"),
        _ => None,
    };
    let shared = match config.architecture {
        Architecture::DeepSeekV3 => rest.strip_prefix("shared_experts."),
        _ => rest.strip_prefix("shared_expert."),
    };
    if let Some(name) = shared {
        return Some(format!("{}_shexp.weight", projection(name)?));
    }
    let (expert, name) = rest.strip_prefix("experts.")?.split_once('.')?;
    let number = expert.parse::<u32>().ok().filter(|number| number.to_string() == expert)?;
    Some(format!("{}_exps.{number}.weight", projection(name)?))
}

/// Whether a pass knows what to do with a tensor of this name, if only to say that it has no use
/// for it.
pub(super) fn counts(name: &str, config: &Config, quantised: bool) -> bool {
    match canonical_name(&whole_name(name), config) {
        Canonical::Ignored => false,
        Canonical::InputScale | Canonical::OfCache(_) => !quantised,
        _ => true,
    }
}

/// The canonical names of what a tensor of this name holds; none where a pass has no use for it.
pub(super) fn held(name: &str, config: &Config) -> Vec<String> {
    match canonical_name(&whole_name(name), config) {
        Canonical::Known(canonical) => vec![canonical],
        Canonical::Fused(parts) => parts.into_iter().map(|(part, _)| part).collect(),
        _ => Vec::new(),
    }
}

/// What folders usually call the tensor of this canonical name, which this one need not hold; none
/// where that is not known.
pub(super) fn usual_name(canonical: &str, config: &Config) -> Option<String> {
    const OUTSIDE: [&str; 4] =
        ["model.embed_tokens.weight", "model.norm.weight", "model.norm.bias", "lm_head.weight"];
    const WITHIN: [&str; 30] = [
        "input_layernorm",
        "post_attention_layernorm",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "self_attn.q_a_proj",
        "self_attn.q_a_layernorm",
        "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_a_layernorm",
        "self_attn.kv_b_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.gate_up_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        "mlp.gate",
        "mlp.router",
        "block_sparse_moe.gate",
        "linear_attn.out_proj",
        "linear_attn.norm",
    ];
    let is = |name: &String| held(name, config).iter().any(|held| held == canonical);
    if let Some(name) = OUTSIDE.into_iter().map(str::to_owned).find(is) {
        return Some(name);
    }
    let (layer, part) = crate::op::in_layer(canonical)?;
    let ending = part.rsplit('.').next()?;
    WITHIN.iter().map(|module| format!("model.layers.{layer}.{module}.{ending}")).find(is)
}

/// The keys of a JSON object, refused if one occurs twice: a map would keep the last.
struct UniqueKeys(Vec<String>);

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<UniqueKeys, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = UniqueKeys;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueKeys, A::Error> {
                let mut keys = BTreeSet::new();
                while let Some((key, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                    if keys.contains(&key) {
                        let name = shown(&key);
                        return Err(serde::de::Error::custom(format!("`{name}` occurs twice")));
                    }
                    keys.insert(key);
                }
                Ok(UniqueKeys(keys.into_iter().collect()))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}
