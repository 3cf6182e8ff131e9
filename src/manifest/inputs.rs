//! Where an op's tensors come from: a site of another stage, a file, or a seed.
//!
//! It opens no file: paths are taken from the manifest's folder and used later.

use std::path::Path;

use super::fields::{Fields, Put, choose};
use super::names::read_names;
use super::problem::{Findings, Problem};
use super::stage::RawInput;
use crate::dtype::Format;
use crate::op::{
    Distribution, FileScale, FileTensor, Generated, Input, InputRef, Recorded, Site, StageId,
};

/// Formats by the names that manifests use.
pub(super) fn formats() -> [(&'static str, Format); Format::ALL.len()] {
    Format::ALL.map(|format| (format.name(), format))
}

/// The input at `key` and, if it is another stage's site, where that is written.
pub(super) fn read(
    fields: &mut Fields<'_>,
    key: &'static str,
    folder: &Path,
    findings: &mut Findings,
) -> Option<(Input, Option<RawInput>)> {
    if fields.key_at(key).is_none() {
        // Reports the missing key.
        fields.need::<bool>(key, "{ stage = \"D\", site = \"blk.0.attn_norm\" }", findings);
        return None;
    }
    let mut table = fields.table(key, findings)?;
    let opening = table.opening();
    let kinds = ["stage", "file", "generate"].map(|kind| table.key_at(kind));
    let input = match kinds {
        [None, Some(_), None] => {
            let tensor = read_file(&mut table, folder, findings);
            tensor.map(|tensor| (Input::File(tensor), None))
        }
        [None, None, Some(_)] => {
            read_generated(&mut table, findings).map(|made| (Input::Generated(made), None))
        }
        [_, None, None] => read_site(&mut table, findings).map(|raw| {
            let (stage, site) = (raw.stage.value.clone(), raw.site.value.clone());
            (Input::Site(InputRef { stage, site }), Some(raw))
        }),
        _ => {
            for key in ["stage", "site", "file", "tensor", "dtype", "shape", "scale", "generate"] {
                table.skip(key);
            }
            table.skip("rows");
            findings.push(
                Problem::new(
                    format!("`{key}` has several sources"),
                    "keep one of `stage` with `site`, `file`, and `generate` with `rows`",
                )
                .at(&opening, "which one?"),
            );
            None
        }
    };
    table.finish(findings);
    input
}

fn read_site(table: &mut Fields<'_>, findings: &mut Findings) -> Option<RawInput> {
    let stage = table.need::<String>("stage", "\"D\"", findings);
    let site = table.need::<String>("site", "\"blk.0.attn_norm\"", findings);
    Some(RawInput { stage: stage?.map(StageId), site: site?.map(Site) })
}

fn read_generated(table: &mut Fields<'_>, findings: &mut Findings) -> Option<Generated> {
    let generate = table
        .need::<String>("generate", "\"normal\"", findings)
        .and_then(|name| choose("generate", name, &Distribution::ALL, findings));
    let rows = table.need::<usize>("rows", "16", findings);
    let rows = rows.and_then(|rows| check_rows(rows, findings));
    // The stage's seed is known when all its settings are.
    Some(Generated { generate: generate?.value, rows: rows?, seed: 0 })
}

fn check_rows(rows: Put<usize>, findings: &mut Findings) -> Option<usize> {
    const MOST: usize = 1 << 20;
    if (1..=MOST).contains(&rows.value) {
        return Some(rows.value);
    }
    findings.push(
        Problem::new(
            format!("`rows` cannot be {}", rows.value),
            format!("write the number of tokens, from 1 to {MOST}"),
        )
        .at_if(rows.at.as_ref(), "out of range"),
    );
    None
}

/// The keys of a tensor in a file.
pub(super) fn read_file(
    table: &mut Fields<'_>,
    folder: &Path,
    findings: &mut Findings,
) -> Option<FileTensor> {
    let file = table.need::<String>("file", "\"capture.safetensors\"", findings);
    let tensor = table.take::<String>("tensor", findings);
    let format = table.choice("dtype", &formats(), findings);
    let shape = read_shape(table, findings);
    let scale = match table.is_text("scale") {
        true => table.take::<String>("scale", findings).map(|scale| FileScale::Tensor(scale.value)),
        false => {
            let scale = table.take::<f32>("scale", findings);
            scale.and_then(|scale| check_scale(scale, findings))
        }
    };
    Some(FileTensor {
        file: folder.join(file?.value),
        tensor: tensor.map(|tensor| tensor.value),
        format: format.map(|format| format.value),
        shape: shape.map(|shape| shape.value),
        scale,
    })
}

fn check_scale(scale: Put<f32>, findings: &mut Findings) -> Option<FileScale> {
    if scale.value.is_finite() && scale.value > 0.0 {
        return Some(FileScale::Bits(scale.value.to_bits()));
    }
    findings.push(
        Problem::new(
            format!("`scale` cannot be {}", scale.value),
            "write what the codes are multiplied with, a positive number, or a tensor's name",
        )
        .at_if(scale.at.as_ref(), "not a scale"),
    );
    None
}

fn read_shape(table: &mut Fields<'_>, findings: &mut Findings) -> Option<Put<Vec<usize>>> {
    let shape = table.list::<usize>("shape", findings)?;
    let sizes: Vec<usize> = shape.value.iter().map(|size| size.value).collect();
    if !sizes.is_empty() && sizes.iter().all(|&size| size > 0) {
        return Some(Put { value: sizes, at: shape.at });
    }
    findings.push(
        Problem::new("`shape` has no element", "write rows and width, as `[16, 576]`")
            .at_if(shape.at.as_ref(), "no element"),
    );
    None
}

/// `[recorded]`. `sites` are those of an op that makes exactly one.
pub(super) fn read_recorded(
    mut table: Fields<'_>,
    folder: &Path,
    only_site: Option<&Site>,
    findings: &mut Findings,
) -> Option<Recorded> {
    let tensor_at = table.key_at("tensor");
    let file = table.need::<String>("file", "\"capture.safetensors\"", findings);
    let tensor = table.take::<String>("tensor", findings);
    let mut known = read_names(&mut table, findings);
    let format = table.choice("dtype", &formats(), findings);
    let shape = read_shape(&mut table, findings);
    table.finish(findings);
    match (tensor, only_site) {
        (None, _) => {}
        (Some(tensor), Some(site)) => {
            known.insert(site.0.clone(), tensor.value);
        }
        (Some(_), None) => findings.push(
            Problem::new(
                "`tensor` names one tensor, and the stage makes several sites",
                "write a table `[recorded.names]`: each site and its tensor's name",
            )
            .at_if(tensor_at.as_ref(), "of which site?"),
        ),
    }
    Some(Recorded {
        file: folder.join(file?.value),
        names: known,
        format: format.map(|format| format.value),
        shape: shape.map(|shape| shape.value),
    })
}
