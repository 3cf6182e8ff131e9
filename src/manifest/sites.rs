//! Which sites an op makes, and how a contract names them.
//!
//! It knows names only: how many layers a model has is unknown here.

use crate::layer_sites::LAYER_SITES;
use crate::op::{Command, LAYER_PROJECTIONS, LOGITS_IN_BATCH, Op, Site, in_layer};
use crate::op::{site_of_norm, site_of_projection};

/// A site that an op makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// This very site.
    One(Site),
    /// `blk.N.<name>` for every layer N.
    EachLayer(&'static str),
}

impl Made {
    pub fn includes(&self, site: &str) -> bool {
        match self {
            Made::One(one) => one.0 == site,
            Made::EachLayer(name) => in_layer(site).is_some_and(|(_, inner)| inner == *name),
        }
    }

    /// Whether it is one site whose name begins so.
    pub fn starts_with(&self, start: &str) -> bool {
        matches!(self, Made::One(one) if one.0.starts_with(start))
    }

    /// Whether some site that is made here is one that the pattern names.
    pub fn meets(&self, pattern: &str) -> bool {
        match self {
            Made::One(one) => names(pattern, &one.0),
            Made::EachLayer(name) => {
                // Any layer would do: try the one that the pattern asks for.
                let layer = match pattern.split('.').nth(1) {
                    Some(layer) if layer != "*" => layer,
                    _ => "0",
                };
                let site = format!("blk.{layer}.{name}");
                in_layer(&site).is_some() && names(pattern, &site)
            }
        }
    }

    /// The pattern that names all of it.
    pub fn pattern(&self) -> String {
        match self {
            Made::One(one) => one.0.clone(),
            Made::EachLayer(name) => format!("blk.*.{name}"),
        }
    }

    /// As a reader would write it.
    pub fn shown(&self) -> String {
        match self {
            Made::One(one) => one.0.clone(),
            Made::EachLayer(name) => format!("blk.N.{name}"),
        }
    }
}

/// Whether a pattern names a site: segment by segment, where `*` is exactly one
/// whole segment. `blk.1.*` does not name `blk.10.q`, and `q` not `blk.0.q`.
pub(super) fn names(pattern: &str, site: &str) -> bool {
    // Asked for every measure of every falsifier: bytes are split faster than text.
    let dot = |byte: &u8| *byte == b'.';
    let (mut left, mut right) = (pattern.as_bytes().split(dot), site.as_bytes().split(dot));
    loop {
        match (left.next(), right.next()) {
            (None, None) => return true,
            (Some(segment), Some(name)) if segment == b"*" || segment == name => {}
            _ => return false,
        }
    }
}

/// The sites that an op makes.
pub(super) fn made_by(op: &Op) -> Vec<Made> {
    let one = |name: &str| Made::One(Site(name.into()));
    match op {
        Op::Forward { capture, .. } if capture.is_of_logits() => {
            vec![one("logits"), one(LOGITS_IN_BATCH)]
        }
        Op::Forward { .. } => every(),
        Op::Embed { .. } => vec![one("embed")],
        Op::RmsNorm { weight, .. } => site_of_norm(weight).map(Made::One).into_iter().collect(),
        Op::Matmul { weights, .. } => {
            weights.iter().filter_map(|name| site_of_projection(name)).map(Made::One).collect()
        }
        Op::Gemm { .. } => vec![one(super::single::PRODUCT)],
        Op::Rope { site, .. }
        | Op::Attention { site, .. }
        | Op::Swiglu { site, .. }
        | Op::Compare { site, .. } => vec![Made::One(site.clone())],
        Op::Command(command) => {
            let matches = command.patterns.iter().map(|p| Command::match_site(&p.name));
            let outputs = command.digests.keys().map(|path| Command::output_site(path));
            [Command::exit_site()]
                .into_iter()
                .chain(matches)
                .chain(outputs)
                .map(Made::One)
                .collect()
        }
    }
}

/// The sites that any op can make: those of a whole forward pass.
pub(super) fn every() -> Vec<Made> {
    let one = |name: &str| Made::One(Site(name.into()));
    let mut all = vec![one("embed"), one("embed_scaled")];
    all.extend(LAYER_SITES.map(Made::EachLayer));
    all.extend(["output_norm", "logits_raw", "logits_scaled", "logits"].map(one));
    all
}

/// The weights that `[matmul]` can read, as a reader would write them.
pub(super) fn projections() -> Vec<String> {
    LAYER_PROJECTIONS
        .iter()
        .map(|(weight, _)| format!("blk.N.{weight}"))
        .chain(["output".to_owned()])
        .collect()
}
