//! Which sites a model's forward pass makes, in their order, and what each op reads.
//!
//! The same decisions as [`forward`](super::forward::forward) makes, which a test holds it to.
//! It computes nothing; what a block has, and where a pass ends, `forward` says.

use super::forward::{after_output, has};
use crate::dtype::Format;
use crate::layer_sites::{LayerSite, ROWS, Read, STREAM};
use crate::model::Model;
use crate::op::{Site, in_layer};

fn makes(model: &Model, kv_cache: Option<Format>, layer: usize, row: &LayerSite) -> bool {
    row.made.iter().all(|what| has(model, kv_cache, layer, *what))
}

/// Whether a block's pass makes a site, by its name within the block.
fn is_made(model: &Model, kv_cache: Option<Format>, layer: usize, inner: &str) -> bool {
    let row = ROWS.iter().find(|row| row.name == inner);
    row.is_some_and(|row| makes(model, kv_cache, layer, row))
}

/// Whether the embedded tokens are scaled.
fn scales_embedding(model: &Model) -> bool {
    model.config().factors.embedding.is_some()
}

/// The sites of a forward pass whose attention keeps keys and values in a type of its own where one
/// is given, in the order of the flow.
pub fn sites(model: &Model, kv_cache: Option<Format>) -> impl Iterator<Item = Site> + '_ {
    let one = |name: &str| Site(name.to_owned());
    let scaled = scales_embedding(model).then(|| one("embed_scaled"));
    let first = [one("embed")].into_iter().chain(scaled);
    let layers = (0..model.config().layers).flat_map(move |layer| {
        let made = ROWS.iter().filter(move |row| makes(model, kv_cache, layer, row));
        made.map(move |row| Site(format!("blk.{layer}.{}", row.name)))
    });
    let last = after_output(model).iter().map(move |name| one(name));
    first.chain(layers).chain([one("output_norm")]).chain(last)
}

/// The sites that the op of a model's forward pass reads to make a site; none for the embedding and
/// for sites that no forward pass makes. Nor for the last norm: who asks looks within a block.
pub fn read_by(model: &Model, kv_cache: Option<Format>, site: &Site) -> Vec<Site> {
    let named = |name: &str| vec![Site(name.to_owned())];
    let Some((layer, inner)) = in_layer(&site.0) else {
        let last = after_output(model);
        return match last.iter().position(|name| *name == site.0) {
            Some(0) => named("output_norm"),
            Some(place) => named(last[place - 1]),
            None if site.0 == "embed_scaled" => named("embed"),
            None => Vec::new(),
        };
    };
    let block = layer as usize;
    let stream = match layer.checked_sub(1) {
        Some(before) => Site(format!("blk.{before}.ffn_residual")),
        None if scales_embedding(model) => Site("embed_scaled".to_owned()),
        None => Site("embed".to_owned()),
    };
    let last = |names: &[&str]| {
        let made = names.iter().rev().find(|name| is_made(model, kv_cache, block, name));
        match made.or(names.first()).copied() {
            None | Some(STREAM) => stream.clone(),
            Some(name) => Site(format!("blk.{layer}.{name}")),
        }
    };
    let row = ROWS.iter().find(|row| row.name == inner);
    let reads = row.map_or(&[][..], |row| row.reads);
    let read = reads.iter().filter_map(|read| match *read {
        Read::Last(names) => Some(last(names)),
        Read::When(what, names) => has(model, kv_cache, block, what).then(|| last(names)),
    });
    read.collect()
}
