//! The ops of one kernel each: `rope`, `attention`, `swiglu`, `matmul` of coded
//! operands, and `compare`, which computes nothing.
//!
//! It knows which sites an op can make, not what a model holds.

use std::collections::BTreeMap;
use std::path::Path;

use super::fields::{Fields, Put};
use super::inputs;
use super::problem::{Findings, Problem, short};
use super::stage::{RawInput, RawOp, check_name};
use crate::op::{Arm, FileTensor, Input, Op, Site, in_layer};

/// The site of a coded product.
pub(super) const PRODUCT: &str = "y";
/// The site of a comparison whose manifest names none.
const COMPARED: &str = "compared";

/// `[rope]`.
pub(super) fn read_rope(
    mut table: Fields<'_>,
    folder: &Path,
    findings: &mut Findings,
) -> Option<RawOp> {
    let heading = table.opening();
    let input = inputs::read(&mut table, "input", folder, findings);
    let site = read_site(&mut table, &["q_rope", "k_rope"], findings);
    table.finish(findings);
    let ((input, raw), site) = (input?, site?);
    Some(RawOp::new(Op::Rope { input, site }, raw.into_iter().collect(), heading))
}

/// `[attention]`.
pub(super) fn read_attention(
    mut table: Fields<'_>,
    folder: &Path,
    findings: &mut Findings,
) -> Option<RawOp> {
    let heading = table.opening();
    let [q, k, v] = ["q", "k", "v"].map(|key| inputs::read(&mut table, key, folder, findings));
    let site = read_site(&mut table, &["attn"], findings);
    table.finish(findings);
    let ((q, raw_q), (k, raw_k), (v, raw_v), site) = (q?, k?, v?, site?);
    let raw = [raw_q, raw_k, raw_v].into_iter().flatten().collect();
    Some(RawOp::new(Op::Attention { q, k, v, site }, raw, heading))
}

/// `[swiglu]`.
pub(super) fn read_swiglu(
    mut table: Fields<'_>,
    folder: &Path,
    findings: &mut Findings,
) -> Option<RawOp> {
    let heading = table.opening();
    let [gate, up] = ["gate", "up"].map(|key| inputs::read(&mut table, key, folder, findings));
    let site = read_site(&mut table, &["ffn_swiglu"], findings);
    table.finish(findings);
    let ((gate, raw_gate), (up, raw_up), site) = (gate?, up?, site?);
    let raw = [raw_gate, raw_up].into_iter().flatten().collect();
    Some(RawOp::new(Op::Swiglu { gate, up, site }, raw, heading))
}

/// `[matmul]` with `x` and `w`: operands that come as codes.
pub(super) fn read_gemm(
    mut table: Fields<'_>,
    folder: &Path,
    findings: &mut Findings,
) -> Option<RawOp> {
    let heading = table.opening();
    let [x, w] = ["x", "w"].map(|key| read_operand(&mut table, key, folder, findings));
    table.finish(findings);
    Some(RawOp::new(Op::Gemm { x: x?, w: w? }, Vec::new(), heading))
}

fn read_operand(
    table: &mut Fields<'_>,
    key: &'static str,
    folder: &Path,
    findings: &mut Findings,
) -> Option<FileTensor> {
    if table.key_at(key).is_none() {
        table.need::<bool>(key, "{ file = \"capture.safetensors\", tensor = \"x\" }", findings);
        return None;
    }
    let mut operand = table.table(key, findings)?;
    let tensor = inputs::read_file(&mut operand, folder, findings);
    operand.finish(findings);
    tensor
}

/// `[compare]`: an input for each arm.
pub(super) fn read_compare(
    mut table: Fields<'_>,
    folder: &Path,
    findings: &mut Findings,
) -> Option<RawOp> {
    let heading = table.opening();
    let site = match table.take::<String>("site", findings) {
        None => Some(COMPARED.to_owned()),
        Some(site) => check_name("site", site, findings).map(|site| site.value),
    };
    let mut sides: BTreeMap<Arm, Input> = BTreeMap::new();
    let mut raw: Vec<RawInput> = Vec::new();
    let mut sound = true;
    for arm in Arm::ALL {
        if table.key_at(arm.name()).is_none() {
            table.skip(arm.name());
            continue;
        }
        match inputs::read(&mut table, arm.name(), folder, findings) {
            Some((Input::Generated(_), _)) => {
                findings.push(
                    Problem::new(
                        "a side of `[compare]` cannot be generated",
                        "name a file, or a stage with a site: both sides are read as they are",
                    )
                    .at(&heading, "computes nothing"),
                );
                sound = false;
            }
            Some((input, from)) => {
                sides.insert(arm, input);
                raw.extend(from);
            }
            None => sound = false,
        }
    }
    table.finish(findings);
    if sound && (sides.len() < 2 || !sides.contains_key(&Arm::Reference)) {
        findings.push(
            Problem::new(
                "`[compare]` needs `reference` and at least one other arm",
                "write `reference = { file = ... }` and, as `recorded = { file = ... }`, what is \
                 held against it",
            )
            .at(&heading, "nothing to compare"),
        );
        return None;
    }
    let site = Site(site?);
    sound.then(|| RawOp::new(Op::Compare { site, sides }, raw, heading))
}

/// The site that the op makes: one of a layer's, by these names.
fn read_site(table: &mut Fields<'_>, names: &[&str], findings: &mut Findings) -> Option<Site> {
    let example = format!("\"blk.0.{}\"", names[0]);
    let site: Put<String> = table.need("site", &example, findings)?;
    if in_layer(&site.value).is_some_and(|(_, inner)| names.contains(&inner)) {
        return Some(Site(site.value));
    }
    let known: Vec<String> = names.iter().map(|name| format!("`blk.N.{name}`")).collect();
    findings.push(
        Problem::new(
            format!("this op does not make `{}`", short(&site.value)),
            format!("it makes {}", known.join(" or ")),
        )
        .at_if(site.at.as_ref(), "another site"),
    );
    None
}
