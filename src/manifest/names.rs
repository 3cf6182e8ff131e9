//! `names` of `[recorded]` and `[external]`: what a program calls the tensor of a site.
//!
//! It knows names and patterns only; which of them a file has is seen where it is read.

use std::collections::BTreeMap;

use super::fields::{Fields, Put};
use super::problem::{Findings, Problem, quoted_list, short, suggest};
use super::{single, sites};
use crate::op::{LayerNumber, Recorded, Site};

/// What the modules of an engine are called, by site. `[q]` and the like are the columns of
/// a fused product; `.0` is the first of several tensors that a module returns.
const MODULES: [(&str, &[(&str, &str)]); 3] = [
    (
        "transformers",
        &[
            ("embed", "model.embed_tokens"),
            ("blk.*.attn_norm", "model.layers.*.input_layernorm"),
            ("blk.*.q", "model.layers.*.self_attn.q_proj"),
            ("blk.*.k", "model.layers.*.self_attn.k_proj"),
            ("blk.*.v", "model.layers.*.self_attn.v_proj"),
            ("blk.*.q_norm", "model.layers.*.self_attn.q_norm"),
            ("blk.*.k_norm", "model.layers.*.self_attn.k_norm"),
            ("blk.*.attn_out", "model.layers.*.self_attn.o_proj"),
            ("blk.*.ffn_norm", "model.layers.*.post_attention_layernorm"),
            ("blk.*.ffn_gate", "model.layers.*.mlp.gate_proj"),
            ("blk.*.ffn_up", "model.layers.*.mlp.up_proj"),
            ("blk.*.ffn_down", "model.layers.*.mlp.down_proj"),
            ("blk.*.ffn_residual", "model.layers.*"),
            ("output_norm", "model.norm"),
            ("logits", "lm_head"),
        ],
    ),
    (
        "vllm",
        &[
            ("embed", "model.embed_tokens"),
            ("blk.*.attn_norm", "model.layers.*.input_layernorm"),
            ("blk.*.q", "model.layers.*.self_attn.qkv_proj[q]"),
            ("blk.*.k", "model.layers.*.self_attn.qkv_proj[k]"),
            ("blk.*.v", "model.layers.*.self_attn.qkv_proj[v]"),
            ("blk.*.q_norm", "model.layers.*.self_attn.q_norm"),
            ("blk.*.k_norm", "model.layers.*.self_attn.k_norm"),
            ("blk.*.attn", "model.layers.*.self_attn.attn"),
            ("blk.*.attn_out", "model.layers.*.self_attn.o_proj"),
            ("blk.*.ffn_norm", "model.layers.*.post_attention_layernorm"),
            ("blk.*.ffn_gate", "model.layers.*.mlp.gate_up_proj[gate]"),
            ("blk.*.ffn_up", "model.layers.*.mlp.gate_up_proj[up]"),
            ("blk.*.ffn_swiglu", "model.layers.*.mlp.act_fn"),
            ("blk.*.ffn_down", "model.layers.*.mlp.down_proj"),
            ("output_norm", "model.norm"),
            ("logits", "lm_head"),
        ],
    ),
    // Norms return the stream beside it, but for the first, before which there is none.
    // All blocks share one rotary embedding, whose results have every block's name. The logits
    // are the last token's alone.
    (
        "sglang",
        &[
            ("embed", "model.embed_tokens"),
            ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
            ("blk.*.attn_norm", "model.layers.*.input_layernorm.0"),
            ("blk.*.q", "model.layers.*.self_attn.qkv_proj[q]"),
            ("blk.*.k", "model.layers.*.self_attn.qkv_proj[k]"),
            ("blk.*.v", "model.layers.*.self_attn.qkv_proj[v]"),
            ("blk.*.attn", "model.layers.*.self_attn.attn"),
            ("blk.*.attn_out", "model.layers.*.self_attn.o_proj"),
            ("blk.*.attn_residual", "model.layers.*.post_attention_layernorm.1"),
            ("blk.*.ffn_norm", "model.layers.*.post_attention_layernorm.0"),
            ("blk.*.ffn_gate", "model.layers.*.mlp.gate_up_proj[gate]"),
            ("blk.*.ffn_up", "model.layers.*.mlp.gate_up_proj[up]"),
            ("blk.*.ffn_swiglu", "model.layers.*.mlp.act_fn"),
            ("blk.*.ffn_down", "model.layers.*.mlp.down_proj"),
            ("blk.*.ffn_residual", "model.layers.{*+1}.input_layernorm.1"),
            ("output_norm", "model.norm.0"),
            (Recorded::IDS, "model.forward_batch_info.input_ids"),
        ],
    ),
];

/// How a program that dumps what modules return writes their names: which modules, what stands
/// before the name, and what between it and the number of the tensor.
const DUMPS: [(&str, &str, &str, &str); 3] = [
    ("msprobe", "transformers", "Module.", ".{class}.forward.0.output"),
    ("msprobe-vllm", "vllm", "Module.", ".{class}.forward.0.output"),
    ("sglang-dumper", "sglang", "non_intrusive__", ".output"),
];

/// The names of all presets.
pub(crate) fn presets() -> impl Iterator<Item = &'static str> + Clone {
    MODULES.iter().map(|(name, _)| *name).chain(DUMPS.iter().map(|(name, ..)| *name))
}

/// The sites of a preset with their names.
fn preset(name: &str) -> Option<Vec<(&'static str, String)>> {
    let modules = |name| MODULES.iter().find(|(known, _)| *known == name).map(|(_, names)| *names);
    if let Some(names) = modules(name) {
        return Some(names.iter().map(|(site, name)| (*site, (*name).to_owned())).collect());
    }
    let (dump, of, before, after) = DUMPS.iter().find(|(known, ..)| *known == name)?;
    let numbered = dump.starts_with("msprobe");
    let dumped = |(site, name): &(&'static str, &str)| {
        let (module, rest) = match name.find('[') {
            Some(part) => name.split_at(part),
            None if name.ends_with(".0") || name.ends_with(".1") => name.split_at(name.len() - 2),
            None => (*name, ""),
        };
        // msprobe numbers the only tensor that a module returns too.
        let number = if numbered && !rest.starts_with('.') { ".0" } else { "" };
        (*site, format!("{before}{module}{after}{number}{rest}"))
    };
    // Which tokens a pass is of, the embedding's input says.
    let ids = numbered
        .then(|| (Recorded::IDS, "Module.model.embed_tokens.{class}.forward.0.input.0".to_owned()));
    let sites = modules(of)?.iter().filter(|(site, _)| *site != Recorded::IDS);
    Some(sites.map(dumped).chain(ids).collect())
}

/// The key of a table of names that says from which preset it starts.
const PRESET: &str = "preset";

/// Whether a name is one that a preset gives.
pub(crate) fn is_of_preset(site: &str, name: &str) -> bool {
    let mut known = presets().filter_map(preset).flatten();
    known.any(|(of, preset)| of == site && preset == name)
}

/// `names`: each site's tensor, or the name of a preset. A pattern holds the layer's number
/// and nothing else.
pub(super) fn read_names(
    table: &mut Fields<'_>,
    findings: &mut Findings,
) -> BTreeMap<String, String> {
    if table.is_text("names") {
        let preset = table.take::<String>("names", findings);
        return preset.map_or_else(BTreeMap::new, |preset| of_preset(&preset, findings));
    }
    let mut known = BTreeMap::new();
    let names = table.texts("names", findings);
    let (presets, names): (Vec<_>, Vec<_>) =
        names.into_iter().partition(|(site, _)| site.value == PRESET);
    for (_, preset) in presets {
        known.extend(of_preset(&preset, findings));
    }
    for (site, name) in names {
        let written = site.value.matches('*').count();
        let layer = site.value.split('.').nth(1) == Some("*");
        let wanted = LayerNumber::count(&name.value);
        let anchored = match written {
            0 => wanted == 0,
            1 => layer && wanted == 1,
            _ => false,
        };
        if !anchored {
            findings.push(
                Problem::new(
                    "a name's pattern has one `*` on each side",
                    "write `\"blk.*.q\" = \"model.layers.*.self_attn.q_proj\"`, where `*` is the \
                     layer's number and `{*+1}` the next one, or both names without `*`",
                )
                .at_if(site.at.as_ref(), "this pattern"),
            );
        } else if check_site(&site, findings) {
            known.insert(site.value, name.value);
        }
    }
    known
}

fn of_preset(preset: &Put<String>, findings: &mut Findings) -> BTreeMap<String, String> {
    if let Some(names) = self::preset(&preset.value) {
        return names.into_iter().map(|(site, name)| (site.to_owned(), name)).collect();
    }
    let known = presets();
    let list = format!(
        "the presets are {}; or write a table `[recorded.names]` of sites and their names",
        quoted_list(known.clone())
    );
    findings.push(
        Problem::new(
            format!("there are no names called `{}`", short(&preset.value)),
            suggest(&preset.value, known, &list),
        )
        .at_if(preset.at.as_ref(), "unknown preset"),
    );
    BTreeMap::new()
}

/// Whether some op makes the site, or any layer's.
fn check_site(site: &Put<String>, findings: &mut Findings) -> bool {
    if site.value == Recorded::IDS {
        return true;
    }
    let mut made = sites::every();
    made.push(sites::Made::One(Site(single::PRODUCT.to_owned())));
    if made.iter().any(|made| made.pattern() == site.value || made.includes(&site.value)) {
        return true;
    }
    let patterns: Vec<String> = made.iter().map(sites::Made::pattern).collect();
    let list = format!("the sites are {}", quoted_list(&patterns));
    findings.push(
        Problem::new(
            format!("there is no site `{}`", short(&site.value)),
            suggest(&site.value, patterns.iter().map(String::as_str), &list),
        )
        .at_if(site.at.as_ref(), "no op makes it"),
    );
    false
}
