//! One stage's manifest: as written, and the op checked on its own.
//!
//! It knows no other stage; references between stages are `check.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use super::fields::{Fields, Put};
use super::problem::{At, Findings, Problem, quoted_list, short, suggest};
use super::settings::RawSettings;
use super::{command, external, inputs, single, sites};
use crate::op::{Capture, External, Op, Recorded, Site, StageId, site_of_norm, site_of_projection};

/// A stage as its file writes it. What is wrong is reported and absent.
pub(super) struct RawStage {
    pub source: usize,
    pub id: Option<Put<StageId>>,
    pub title: Option<Put<String>>,
    pub needs: Vec<Put<StageId>>,
    pub contract: Option<Put<String>>,
    pub tags: Option<Vec<String>>,
    pub settings: RawSettings,
    pub op: Option<RawOp>,
    pub recorded: Option<Recorded>,
    pub external: Option<External>,
    /// Of which `[for]` it is a member.
    pub family: Option<StageId>,
}

/// An op with the places that checks of other stages point to.
pub(super) struct RawOp {
    pub op: Op,
    /// The other stages' sites that it reads.
    pub inputs: Vec<RawInput>,
    /// The files that a command reads and writes.
    pub files: RawFiles,
    /// The key `repeats` where it is written, else the op's heading.
    pub repeats_at: At,
}

impl RawOp {
    /// An op without files of its own.
    pub fn new(op: Op, inputs: Vec<RawInput>, repeats_at: At) -> RawOp {
        RawOp { op, inputs, files: RawFiles::default(), repeats_at }
    }
}

/// The files that a command names.
#[derive(Clone, Default)]
pub(super) struct RawFiles {
    pub inputs: Vec<Put<String>>,
    pub outputs: Vec<Put<String>>,
}

/// `{ stage = "...", site = "..." }`.
#[derive(Clone)]
pub(super) struct RawInput {
    pub stage: Put<StageId>,
    pub site: Put<Site>,
}

/// The op tables that a manifest can have.
pub(super) const OPS: [&str; 9] =
    ["forward", "embed", "rms_norm", "matmul", "rope", "attention", "swiglu", "compare", "command"];

impl RawStage {
    /// Reads a stage out of its file.
    pub fn read(
        mut fields: Fields<'_>,
        source: usize,
        family: Option<StageId>,
        findings: &mut Findings,
    ) -> RawStage {
        let folder = findings.path(source).parent().unwrap_or(Path::new("")).to_owned();
        let id = fields
            .need::<String>("id", "\"E\"", findings)
            .and_then(|id| check_name("id", id, findings))
            .map(|id| id.map(StageId));
        let title = fields
            .need::<String>("title", "\"what this stage asks\"", findings)
            .and_then(|title| check_text("title", title, findings));
        let needs = fields.list::<String>("needs", findings);
        let contract = fields.need::<String>("contract", "\"qkv-matmul\"", findings);
        let tags = match fields.list::<String>("tags", findings) {
            None => Some(Vec::new()),
            Some(list) => list.value.into_iter().map(|tag| check_tag(tag, findings)).collect(),
        };
        let settings = RawSettings::read(&mut fields, &folder, findings);
        // Taken before the op is looked for among what is left.
        let recorded = fields.table("recorded", findings);
        let external = external::read(&mut fields, findings);
        let op = read_op(&mut fields, &folder, findings);
        let made = op.as_ref().map_or(Vec::new(), |op| sites::made_by(&op.op));
        let only_site = match made.as_slice() {
            [sites::Made::One(site)] => Some(site),
            _ => None,
        };
        let recorded =
            recorded.and_then(|table| inputs::read_recorded(table, &folder, only_site, findings));
        if let Some(op) = &op
            && op.op.command().is_some()
        {
            settings.refuse_for_command(findings);
        }
        fields.finish(findings);
        let needs = needs.map_or(Vec::new(), |list| {
            list.value.into_iter().map(|need| need.map(StageId)).collect()
        });
        RawStage {
            source,
            id,
            title,
            needs,
            contract,
            tags,
            settings,
            op,
            recorded,
            external,
            family,
        }
    }
}

/// A name that can stand in a selection, a path and a diagram.
pub(super) fn check_name(
    key: &str,
    name: Put<String>,
    findings: &mut Findings,
) -> Option<Put<String>> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let sound = name.value.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.value.len() <= 64
        && name.value.chars().all(plain);
    if sound {
        return Some(name);
    }
    findings.push(
        Problem::new(
            format!("`{key}` cannot be `{}`", short(&name.value)),
            "use up to 64 letters, digits, `-`, `_` and `.`, and begin with a letter or digit",
        )
        .at_if(name.at.as_ref(), "not a name"),
    );
    None
}

/// A sentence that says something.
pub(super) fn check_text(
    key: &str,
    text: Put<String>,
    findings: &mut Findings,
) -> Option<Put<String>> {
    if !text.value.trim().is_empty() {
        return Some(text);
    }
    findings.push(
        Problem::new(format!("`{key}` is empty"), "write a sentence")
            .at_if(text.at.as_ref(), "says nothing"),
    );
    None
}

fn check_tag(tag: Put<String>, findings: &mut Findings) -> Option<String> {
    check_name("tags", tag, findings).map(|tag| tag.value)
}

fn read_op(fields: &mut Fields<'_>, folder: &Path, findings: &mut Findings) -> Option<RawOp> {
    let mut written: Vec<(&str, At)> = Vec::new();
    let mut op = None;
    for name in OPS {
        let Some(at) = fields.key_at(name) else { continue };
        written.push((name, at));
        if let Some(table) = fields.table(name, findings) {
            let read = match name {
                "forward" => read_forward(table, findings),
                "embed" => read_embed(table, findings),
                "rms_norm" => read_rms_norm(table, folder, findings),
                "rope" => single::read_rope(table, folder, findings),
                "attention" => single::read_attention(table, folder, findings),
                "swiglu" => single::read_swiglu(table, folder, findings),
                "compare" => single::read_compare(table, folder, findings),
                "command" => command::read(table, findings),
                _ if table.key_at("x").is_some() || table.key_at("w").is_some() => {
                    single::read_gemm(table, folder, findings)
                }
                _ => read_matmul(table, folder, findings),
            };
            op = op.or(read);
        }
    }
    written.sort_by_key(|(_, at)| at.span.start);

    let unknown = fields.other_tables();
    for (name, at) in &unknown {
        let list = format!("the ops are {}", quoted_list(OPS));
        findings.push(
            Problem::new(
                format!("there is no op `{}`", short(name)),
                suggest(name, OPS.iter().copied(), &list),
            )
            .at(at, "unknown op"),
        );
    }

    match written.as_slice() {
        [] if unknown.is_empty() => {
            let tables = OPS.map(|name| format!("[{name}]"));
            findings.push(
                Problem::new(
                    "the stage has no op",
                    format!("say what it computes by one of {}", quoted_list(tables)),
                )
                .at(&fields.opening(), "no op in this file"),
            );
            None
        }
        [] | [_] => op,
        [(_, first), others @ ..] => {
            let problem = Problem::new(
                format!("the stage has {} ops", written.len()),
                "keep one here and move the others to manifests of their own",
            );
            let problem = others.iter().fold(problem, |problem, (_, at)| problem.at(at, "another"));
            findings.push(problem.at(first, "the first op"));
            None
        }
    }
}

fn read_forward(mut table: Fields<'_>, findings: &mut Findings) -> Option<RawOp> {
    let captures = [
        ("logits", Capture::Logits),
        ("last-logits", Capture::LastLogits),
        ("every-site", Capture::EverySite),
    ];
    let heading = table.opening();
    let capture = table.choice("capture", &captures, findings);
    let repeats = table.take::<u32>("repeats", findings);
    let decode = table.take::<u32>("decode", findings);
    table.finish(findings);
    if let Some(repeats) = repeats.as_ref().filter(|repeats| repeats.value == 0) {
        findings.push(
            Problem::new("`repeats` is 0", "write 1 to compute once, 2 to prove determinism")
                .at_if(repeats.at.as_ref(), "nothing would be computed"),
        );
        return None;
    }
    let repeats_at = repeats.as_ref().and_then(|repeats| repeats.at.clone()).unwrap_or(heading);
    let op = Op::Forward {
        capture: capture.map_or(Capture::default(), |capture| capture.value),
        repeats: repeats.map_or(1, |repeats| repeats.value),
        decode: decode.map_or(0, |decode| decode.value),
        // The recipe's, which is read elsewhere.
        kv_cache: None,
    };
    Some(RawOp::new(op, Vec::new(), repeats_at))
}

fn read_embed(mut table: Fields<'_>, findings: &mut Findings) -> Option<RawOp> {
    let repeats_at = table.opening();
    let weight = match table.take::<String>("weight", findings) {
        None => Some("token_embd".to_owned()),
        Some(weight) => check_weight(weight, findings).map(|weight| weight.value),
    };
    table.finish(findings);
    Some(RawOp::new(Op::Embed { weight: weight? }, Vec::new(), repeats_at))
}

fn read_rms_norm(mut table: Fields<'_>, folder: &Path, findings: &mut Findings) -> Option<RawOp> {
    let repeats_at = table.opening();
    let input = inputs::read(&mut table, "input", folder, findings);
    let weight = table
        .need::<String>("weight", "\"blk.0.attn_norm\"", findings)
        .and_then(|weight| check_weight(weight, findings));
    table.finish(findings);
    let ((input, raw), weight) = (input?, weight?);
    if site_of_norm(&weight.value).is_none() {
        findings.push(
            Problem::new(
                format!("`{}` is not the gain of a known norm", short(&weight.value)),
                "`[rms_norm]` reads `blk.N.attn_norm`, `blk.N.ffn_norm` or `output_norm`",
            )
            .at_if(weight.at.as_ref(), "no site belongs to it"),
        );
        return None;
    }
    let op = Op::RmsNorm { input, weight: weight.value };
    Some(RawOp::new(op, raw.into_iter().collect(), repeats_at))
}

fn read_matmul(mut table: Fields<'_>, folder: &Path, findings: &mut Findings) -> Option<RawOp> {
    let repeats_at = table.opening();
    let input = inputs::read(&mut table, "input", folder, findings);
    let weights = table.need_list::<String>("weights", "[\"blk.0.attn_q\"]", findings);
    table.finish(findings);
    let ((input, raw), list) = (input?, weights?);
    if list.value.is_empty() {
        findings.push(
            Problem::new("`weights` is empty", "list at least one weight, as `blk.0.attn_q`")
                .at_if(list.at.as_ref(), "nothing to compute"),
        );
        return None;
    }
    let count = list.value.len();
    let mut weights: Vec<String> = Vec::with_capacity(count);
    let mut seen: BTreeMap<String, Option<At>> = BTreeMap::new();
    for weight in list.value {
        let Some(weight) = check_weight(weight, findings) else { continue };
        if site_of_projection(&weight.value).is_none() {
            let help = format!("`[matmul]` reads {}", quoted_list(sites::projections()));
            findings.push(
                Problem::new(format!("`{}` is not a known projection", short(&weight.value)), help)
                    .at_if(weight.at.as_ref(), "no site belongs to it"),
            );
        } else if let Some(earlier) = seen.get(&weight.value) {
            findings.push(
                Problem::new(
                    format!("the weight `{}` is listed twice", weight.value),
                    "remove one",
                )
                .at_if(weight.at.as_ref(), "again here")
                .at_if(earlier.as_ref(), "first here"),
            );
        } else {
            seen.insert(weight.value.clone(), weight.at);
            weights.push(weight.value);
        }
    }
    (weights.len() == count)
        .then(|| RawOp::new(Op::Matmul { input, weights }, raw.into_iter().collect(), repeats_at))
}

fn check_weight(weight: Put<String>, findings: &mut Findings) -> Option<Put<String>> {
    let (problem, label) = if let Some(name) = weight.value.strip_suffix(".weight") {
        let help = format!("write `{}`: the ending is understood", short(name));
        (Problem::new("a weight is named without `.weight`", help), "with its ending")
    } else if weight.value.trim().is_empty() {
        (Problem::new("`weight` is empty", "name a tensor of the model"), "no tensor")
    } else {
        return Some(weight);
    };
    findings.push(problem.at_if(weight.at.as_ref(), label));
    None
}
