//! Tensors that a pass reads as one, and a file holds as several or in another order.
//!
//! llama.cpp multiplies queries with what makes the keys of latent attention, so its files hold
//! those matrices with their rows as columns (`attn_k_b`), apart from those of the values
//! (`attn_v_b`); a pass reads both as `attn_kv_b`, head by head. The projection of a delta net stands
//! in such files head by head (`ssm_in`), or all queries, keys and values, and gates apart (`attn_qkv`,
//! `attn_gate`). A folder of a StableLM holds a gain
//! for each head (`q_layernorm.norms.0`), and a pass reads them as one. A row is put together when
//! somebody asks for it. It knows names, shapes and orders, no types.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::config::Config;
use super::error::{FETCH_AGAIN, Fault, ModelError};
use super::gguf::TensorInfo;
use super::weights::{Weight, WeightType};
use super::{MappedFile, Place, missing_tensor, weight_at};

/// A tensor whose rows stand in others.
#[derive(Clone, Debug)]
pub(super) struct Gathered {
    order: Order,
    sources: Vec<Place>,
}

/// Where rows stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Of each head so many columns of its matrix in the first, `[width, still]`, and so many rows
    /// of the second.
    Latent { still: usize, values: usize, width: usize },
    /// Of each head of keys its query, key, values and gates; the first holds all queries, then all
    /// keys and all values, the second all gates.
    Delta { key_heads: usize, key: usize, values: usize },
    /// Each in a tensor of its own.
    Stacked,
}

/// Where a row stands: in which tensor, and there.
enum Stands {
    /// As a row.
    Row(usize, usize),
    /// As a column of rows.
    Column(usize, Range<usize>, usize),
}

impl Order {
    fn of(self, row: usize) -> Stands {
        match self {
            Order::Latent { still, values, width } => {
                let (head, inner) = (row / (still + values), row % (still + values));
                match inner.checked_sub(still) {
                    Some(value) => Stands::Row(1, head * values + value),
                    None => Stands::Column(0, head * width..(head + 1) * width, inner),
                }
            }
            Order::Delta { key_heads, key, values } => {
                let each = 2 * key + 2 * values;
                let (head, inner) = (row / each, row % each);
                let (all, in_values) = (key_heads * key, inner.wrapping_sub(2 * key));
                match inner {
                    _ if inner < key => Stands::Row(0, head * key + inner),
                    _ if inner < 2 * key => Stands::Row(0, all + head * key + inner - key),
                    _ if in_values < values => Stands::Row(0, 2 * all + head * values + in_values),
                    _ => Stands::Row(1, head * values + in_values - values),
                }
            }
            Order::Stacked => Stands::Row(row, 0),
        }
    }
}

/// What a GGUF file holds in the place of a tensor of each block.
struct Layout {
    /// The tensor that a pass reads, its rows and width.
    whole: (&'static str, [usize; 2]),
    order: Order,
    sources: Vec<Source>,
}

/// A tensor of a file: its name within the block, and its matrices, their rows and width.
struct Source {
    inner: &'static str,
    shape: [usize; 3],
}

impl Layout {
    fn of(config: &Config) -> Option<Layout> {
        if let Some(net) = &config.delta {
            let (channels, all) = (net.channels(), net.value_heads * net.value_dim);
            let values = net.value_heads / net.key_heads * net.value_dim;
            let source = |inner, rows| Source { inner, shape: [1, rows, config.hidden] };
            return Some(Layout {
                whole: ("ssm_in.weight", [channels + all, config.hidden]),
                order: Order::Delta { key_heads: net.key_heads, key: net.key_dim, values },
                sources: vec![source("attn_qkv.weight", channels), source("attn_gate.weight", all)],
            });
        }
        let latent = config.latent?;
        let (heads, width) = (config.heads, latent.keys);
        Some(Layout {
            whole: ("attn_kv_b.weight", [heads * (latent.still + latent.values), width]),
            order: Order::Latent { still: latent.still, values: latent.values, width },
            sources: vec![
                Source { inner: "attn_k_b.weight", shape: [heads, width, latent.still] },
                Source { inner: "attn_v_b.weight", shape: [heads, latent.values, width] },
            ],
        })
    }
}

impl Source {
    /// Its place, taken out of the file's tensors.
    fn take(
        &self,
        layer: u32,
        tensors: &mut BTreeMap<String, Place>,
        infos: &BTreeMap<&str, &TensorInfo>,
    ) -> Result<Place, Fault> {
        let name = format!("blk.{layer}.{}", self.inner);
        let (Some(place), Some(info)) = (tensors.remove(&name), infos.get(name.as_str())) else {
            return Err(missing_tensor(&name));
        };
        let [depth, rows, width] = self.shape;
        if (info.depth, info.rows, info.width) == (depth, depth * rows, width) {
            return Ok(place);
        }
        let given = [info.depth, info.rows / info.depth.max(1), info.width];
        let problem = format!("it is {given:?}, but the hyperparameters make it {:?}", self.shape);
        Err(Fault::malformed(problem, FETCH_AGAIN).in_tensor(name))
    }
}

/// Puts tensors in the place of those of a GGUF file that hold their rows.
///
/// # Errors
/// If one of them is missing or has another shape, or the whole stands beside its parts.
pub(super) fn gather<'t>(
    tensors: &mut BTreeMap<String, Place>,
    infos: impl Iterator<Item = &'t TensorInfo>,
    config: &Config,
) -> Result<(), Fault> {
    let Some(Layout { whole: (whole, shape), order, sources }) = Layout::of(config) else {
        return Ok(());
    };
    let infos: BTreeMap<&str, &TensorInfo> = infos.map(|info| (info.name.as_str(), info)).collect();
    let layer = |name: &&str| {
        let (layer, inner) = crate::op::in_layer(name)?;
        let is_source = sources.iter().any(|source| source.inner == inner);
        // A block of a model with delta nets may have attention.
        let reads = config.delta.is_none() || config.delta_of(layer as usize).is_some();
        (is_source && reads && (layer as usize) < config.layers).then_some(layer)
    };
    let mut layers: Vec<u32> = infos.keys().filter_map(layer).collect();
    layers.sort_unstable();
    layers.dedup();
    for layer in layers {
        let places = sources.iter().map(|source| source.take(layer, tensors, &infos));
        let places = places.collect::<Result<Vec<Place>, Fault>>()?;
        let name = format!("blk.{layer}.{whole}");
        if tensors.contains_key(&name) {
            let parts: Vec<&str> = sources.iter().map(|source| source.inner).collect();
            let problem =
                format!("`{}` of the same block hold its values too", parts.join("` and `"));
            return Err(Fault::malformed(problem, "convert the model anew").in_tensor(name));
        }
        if let Some(place) = put_together(order, places, shape) {
            tensors.insert(name, place);
        }
    }
    Ok(())
}

/// Puts the gains of all heads of a folder's norms into one tensor each.
///
/// # Errors
/// If a head has none, or one of another width.
pub(super) fn stack_head_norms(
    tensors: &mut BTreeMap<String, Place>,
    config: &Config,
) -> Result<(), Fault> {
    for (name, heads) in [("attn_q_norm", config.heads), ("attn_k_norm", config.kv_heads)] {
        let prefix = format!("{name}.");
        let layer = |held: &String| {
            let (layer, inner) = crate::op::in_layer(held)?;
            inner.strip_prefix(&prefix).filter(|rest| *rest != "weight").map(|_| layer)
        };
        let layers: BTreeSet<u32> = tensors.keys().filter_map(layer).collect();
        for layer in layers.into_iter().filter(|layer| (*layer as usize) < config.layers) {
            let mut places = Vec::new();
            for head in 0..heads {
                let own = format!("blk.{layer}.{name}.{head}.weight");
                let place = tensors.remove(&own).ok_or_else(|| missing_tensor(&own))?;
                if (place.rows, place.width) != (1, config.head_dim) {
                    let problem = format!(
                        "it is [{}, {}], but the hyperparameters make it [1, {}]",
                        place.rows, place.width, config.head_dim
                    );
                    return Err(Fault::malformed(problem, FETCH_AGAIN).in_tensor(own));
                }
                places.push(place);
            }
            if let Some(place) = put_together(Order::Stacked, places, [heads, config.head_dim]) {
                tensors.insert(format!("blk.{layer}.{name}.weight"), place);
            }
        }
    }
    Ok(())
}

/// The place of a tensor whose rows stand in others; none where there is none of these.
fn put_together(order: Order, sources: Vec<Place>, [rows, width]: [usize; 2]) -> Option<Place> {
    let first = sources.first()?.clone();
    let same = sources.iter().all(|place| place.kind == first.kind);
    // Values of several types are those of none.
    let kind = if same { first.kind } else { WeightType::F32 };
    let gathered = Some(Box::new(Gathered { order, sources }));
    Some(Place { kind, rows, width, gathered, ..first })
}

/// A tensor of several, with the files that hold them.
#[derive(Clone, Copy)]
pub(super) struct Gathering<'a> {
    of: &'a Gathered,
    files: &'a [MappedFile],
}

impl<'a> Gathering<'a> {
    pub fn new(of: &'a Gathered, files: &'a [MappedFile]) -> Gathering<'a> {
        Gathering { of, files }
    }

    fn sources(&self) -> Result<Vec<Weight<'a>>, ModelError> {
        let source = |place| weight_at("a part of a weight", place, self.files);
        self.of.sources.iter().map(source).collect()
    }

    /// Decodes rows, which are there, of so many values.
    pub fn decode(
        &self,
        rows: Range<usize>,
        width: usize,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let sources = self.sources()?;
        // The rows whose columns were asked for last.
        let (mut matrix, mut held) = (Vec::new(), None);
        for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
            let (source, rows, column) = match self.of.order.of(row) {
                Stands::Row(source, row) => {
                    sources[source].decode_rows(row..row + 1, out)?;
                    continue;
                }
                Stands::Column(source, rows, column) => (source, rows, column),
            };
            let wide = sources[source].width();
            if held.as_ref() != Some(&rows) {
                matrix.resize(rows.len() * wide, 0.0);
                sources[source].decode_rows(rows.clone(), &mut matrix)?;
                held = Some(rows);
            }
            for (out, row) in out.iter_mut().zip(matrix.chunks_exact(wide)) {
                *out = row[column];
            }
        }
        Ok(())
    }

    /// Whether all of them stand in one file.
    pub fn is_in_one_file(&self) -> bool {
        let sources = &self.of.sources;
        sources.iter().all(|source| source.file == sources[0].file)
    }

    /// What lies where, in words for a key.
    pub fn layout(&self) -> String {
        let source = |place: &Place| format!("{} @{}", place.kind, place.bytes.start);
        let sources: Vec<String> = self.of.sources.iter().map(source).collect();
        format!(" by {:?} of {}", self.of.order, sources.join(", "))
    }

    /// Adds what makes its values.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(format!("{:?}", self.of.order).as_bytes());
        // What cannot be read has no values either.
        for source in self.sources().unwrap_or_default() {
            hasher.update(source.digest().as_bytes());
        }
    }
}
