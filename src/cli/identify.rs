//! `runner identify`: the engine's file that a recording shows, from the kernels that a
//! stage found.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use super::{print, record_of};
use crate::compare::SiteKernel;
use crate::dtype::Format;
use crate::engine::SplitK;
use crate::record::StageRecord;

/// The ops of an engine's file: the key, and how the kernels found are called.
const OPS: [(&str, &str); 4] =
    [("rms_norm", "norm "), ("rope", "rope "), ("attention", "attention "), ("swiglu", "swiglu ")];

pub(super) fn identify(stage: &str, run: &str, runs: &Path) -> Result<u8, String> {
    let (_, record) = record_of(run, runs)?;
    let found = record.stages.iter().find(|record| record.id.0 == stage).ok_or_else(|| {
        let known: Vec<&str> = record.stages.iter().map(|stage| stage.id.0.as_str()).collect();
        format!("run `{}` has no stage `{stage}`; it has: {}", record.id, known.join(", "))
    })?;
    if found.kernels.is_empty() {
        return Err(format!(
            "stage `{stage}` was held to no engine; write `recipe = {{ engine = \"transformers\" }}` \
             and a recording (`[recorded]`), and run it again"
        ));
    }
    print(&file(found))
}

/// The engine's file: kernels that give every site of their op to the bit, and the shapes of
/// products whose K is cut. What no kernel gives stands in comments.
fn file(stage: &StageRecord) -> String {
    let mut text = String::new();
    let stream = stage.recipe.stream.unwrap_or(Format::Bf16);
    let exact = stage.kernels.iter().filter(|kernel| kernel.mismatches == 0).count();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "# Identified from stage {}: {exact} of {} sites to the bit.",
        stage.id,
        stage.kernels.len()
    );
    let _ = writeln!(text, "name   = \"identified\"\nstream = \"{stream}\"\n\n[kernels]");
    let _ = writeln!(text, "linear    = [\"cublas\"]");
    for (key, prefix) in OPS {
        let names = kernels_of(&stage.kernels, prefix);
        match names.is_empty() {
            true => {
                let _ = writeln!(text, "# {key}: no site of the recording tells");
            }
            false => {
                let listed: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
                let _ = writeln!(text, "{key:9} = [{}]", listed.join(", "));
            }
        }
    }
    let cut: BTreeSet<[usize; 4]> = stage
        .kernels
        .iter()
        .filter(|kernel| kernel.mismatches == 0)
        .filter_map(|kernel| kernel.product.filter(|product| product.parts > 1))
        .map(|SplitK { tokens, outputs, inner, parts }| [tokens, outputs, inner, parts as usize])
        .collect();
    if !cut.is_empty() {
        let _ = writeln!(text, "split_k = [");
        for [tokens, outputs, inner, parts] in cut {
            let _ = writeln!(
                text,
                "    {{ tokens = {tokens}, outputs = {outputs}, inner = {inner}, parts = {parts} }},"
            );
        }
        let _ = writeln!(text, "]");
    }
    for kernel in stage.kernels.iter().filter(|kernel| kernel.mismatches > 0) {
        let _ = writeln!(
            text,
            "# open: {}, {} of {} values differ from the nearest, {}",
            kernel.site, kernel.mismatches, kernel.values, kernel.kernel
        );
    }
    text
}

/// The kernels that give every exact site of an op; where none gives all, those that give
/// some, in the order of the flow.
fn kernels_of(kernels: &[SiteKernel], prefix: &str) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    let mut all: Option<BTreeSet<String>> = None;
    for kernel in kernels.iter().filter(|kernel| kernel.mismatches == 0) {
        let Some(first) = kernel.kernel.strip_prefix(prefix) else { continue };
        let also = kernel.also.iter().filter_map(|name| name.strip_prefix(prefix));
        let fitting: BTreeSet<String> =
            [first].into_iter().chain(also).map(str::to_owned).collect();
        if !seen.contains(&first.to_owned()) {
            seen.push(first.to_owned());
        }
        all = Some(match all {
            None => fitting,
            Some(all) => all.intersection(&fitting).cloned().collect(),
        });
    }
    match all {
        Some(all) if !all.is_empty() => {
            let mut listed: Vec<String> =
                seen.iter().filter(|n| all.contains(*n)).cloned().collect();
            listed.extend(all.into_iter().filter(|name| !seen.contains(name)));
            listed
        }
        _ => seen,
    }
}
