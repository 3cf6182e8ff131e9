//! The recorded arm: tensors that another program left in a file.
//!
//! What it reads is what was recorded, converted to f32 and not otherwise
//! touched; of a fused product, the columns of the site. It knows which sites an op makes, not what they should hold.

use std::collections::BTreeSet;

use super::ComputeError;
use super::arms::{Output, site_names};
use crate::layer_sites::LAYER_SITES;
use crate::model::Model;
use crate::op::{Capture, FileTensor, Op, Recorded, Site, in_layer};
use crate::tensor::Tensor;
use crate::tensor_file::{CodedTensor, TensorFile, TensorFileError};
use crate::text::Shown;

/// Names that a sentence lists.
const SHOWN: usize = 6;

/// The tensors of the op's sites; `tokens` are the prompt's, where they are not checked
/// elsewhere. A forward pass whose file lacks some of them is read as far as it goes:
/// [`absent`] says what is missing.
///
/// # Errors
/// If the file is not readable, holds none of the sites, lacks one that an op of few sites
/// must make, or is the pass of other tokens.
pub fn recorded(
    op: &Op,
    recorded: &Recorded,
    model: Option<&Model>,
    tokens: Option<&[u32]>,
) -> Result<Output, ComputeError> {
    let file = TensorFile::open(&recorded.file)?;
    let mut output = Output::default();
    let partly = matches!(op, Op::Forward { .. });
    let sites = site_names(op, model);
    if file.is_nameless() && sites.len() > 1 {
        let problem = format!(
            "it holds one tensor without a name, and the stage makes {} sites; give a folder with \
             a `.npy` for each, named as the site, or a safetensors file",
            sites.len()
        );
        return Err(TensorFileError::Malformed { path: recorded.file.clone(), problem }.into());
    }
    if let (Some(tokens), Op::Forward { .. } | Op::Embed { .. }) = (tokens, op) {
        check_ids(&file, recorded, tokens)?;
    }
    let mut missing = None;
    for site in sites {
        match read(&file, recorded, &site, model) {
            Ok(tensor) => output.sites.push((site, tensor)),
            Err(TensorFileError::Missing { path, name, found }) if partly => {
                missing.get_or_insert((path, name, found));
            }
            Err(error) => return Err(error.into()),
        }
    }
    let last = keeps_last(op);
    if let (Some((site, first)), Some(tokens)) = (output.sites.first(), tokens)
        && matches!(op, Op::Forward { .. } | Op::Embed { .. })
        && output.sites.iter().all(|(_, tensor)| tensor.rows() != tokens.len())
        && !(last && first.rows() == 1)
    {
        let problem = format!(
            "has {} rows, and the prompt has {}: record the pass of this prompt, or set `tokens` \
             to those of the recorded pass",
            first.rows(),
            count(tokens.len(), "token")
        );
        let (path, name) = (recorded.file.clone(), recorded.tensor_of(site));
        return Err(TensorFileError::Unusable { path, name, problem }.into());
    }
    if output.sites.is_empty()
        && let Some((path, name, found)) = missing
    {
        return Err(TensorFileError::Missing { path, name, found }.into());
    }
    if tokens.is_some() {
        keep_last(op, &mut output);
    }
    output.arithmetic = format!("as recorded in `{}`", recorded.file.shown());
    Ok(output)
}

fn keeps_last(op: &Op) -> bool {
    matches!(op, Op::Forward { capture: Capture::LastLogits, .. })
}

/// Leaves of each site the last row where the stage keeps the last token's logits: what wrote the
/// file may have given every token's.
pub fn keep_last(op: &Op, output: &mut Output) {
    for (_, tensor) in output.sites.iter_mut().filter(|_| keeps_last(op)) {
        if let Some(row) = tensor.rows().checked_sub(1) {
            *tensor = Tensor::new(tensor.width(), tensor.row(row).to_vec());
        }
    }
}

/// Refuses a recording that says itself that it is of other tokens.
fn check_ids(
    file: &TensorFile,
    recorded: &Recorded,
    tokens: &[u32],
) -> Result<(), TensorFileError> {
    let Some(name) = ids_of(file, recorded) else { return Ok(()) };
    let Some(ids) = file.integers(Some(name))? else { return Ok(()) };
    let differs = |(a, b): (&i64, &u32)| *a != i64::from(*b);
    let problem = match ids.iter().zip(tokens).position(differs) {
        Some(place) => format!(
            "says that token {place} of the recorded pass is {}, and it is {} in the stage",
            ids[place], tokens[place]
        ),
        None if ids.len() != tokens.len() => format!(
            "says that the recorded pass has {}, and the stage has {}",
            count(ids.len(), "token"),
            tokens.len()
        ),
        None => return Ok(()),
    };
    let problem = format!("{problem}: write its numbers as `tokens`, or record that prompt's pass");
    let (path, name) = (recorded.file.clone(), name.to_owned());
    Err(TensorFileError::Unusable { path, name, problem })
}

/// What a recording calls the tensor of its tokens, where it has one.
fn ids_of<'f>(file: &'f TensorFile, recorded: &Recorded) -> Option<&'f str> {
    file.name_of(recorded.names.get(Recorded::IDS).map_or(Recorded::IDS, String::as_str))
}

/// Refuses a recipe that says of an engine another number of tokens that came in steps of their own
/// than the recording says itself. Another batch is a question that a stage may ask.
///
/// # Errors
/// If the file is not readable, or says something else.
pub fn check_steps(recorded: &Recorded, decoded: usize) -> Result<(), ComputeError> {
    let file = TensorFile::open(&recorded.file)?;
    // The last token that an engine answers is only sampled.
    let steps = file.note("steps").and_then(|steps| steps.parse::<usize>().ok()?.checked_sub(1));
    let of_ids = || file.note("decoded").map(|ids| ids.split(',').count() - 1);
    match steps.or_else(of_ids) {
        Some(said) if said != decoded => Err(ComputeError::Recipe(format!(
            "`{}` says that {} came in steps of their own, and the recipe says {decoded}: write \
             `decoded = {said}` beside `engine`",
            recorded.file.shown(),
            count(said, "token")
        ))),
        _ => Ok(()),
    }
}

/// Which of the op's sites a file holds no tensor for, in a sentence that also lists what the
/// file has and no site uses; nothing if it holds all.
///
/// # Errors
/// If the file is not readable.
pub fn absent(
    op: &Op,
    recorded: &Recorded,
    model: Option<&Model>,
) -> Result<Option<String>, ComputeError> {
    let file = TensorFile::open(&recorded.file)?;
    let sites = site_names(op, model);
    if file.is_nameless() {
        return Ok(None);
    }
    let has: BTreeSet<&str> = file.names().collect();
    let name_of = |site: &Site| Part::of(&recorded.tensor_of(site), model).name;
    let missing: Vec<&Site> =
        sites.iter().filter(|site| file.name_of(&name_of(site)).is_none()).collect();
    if missing.is_empty() {
        return Ok(None);
    }
    let written: Vec<String> = sites.iter().map(name_of).collect();
    let used: BTreeSet<&str> = written.iter().filter_map(|name| file.name_of(name)).collect();
    let ids = ids_of(&file, recorded);
    let known = |name: &str| Some(name) == ids || used.contains(name);
    let unused: Vec<&str> = has.into_iter().filter(|name| !known(name)).collect();
    let wanted: Vec<String> = by_layer(&missing)
        .into_iter()
        .map(|(shown, site)| {
            let written = recorded.names.get(&shown).cloned();
            match written.unwrap_or_else(|| recorded.tensor_of(site)) {
                name if name == site.0 || name == shown => format!("`{shown}`"),
                name => format!("`{shown}` (as `{name}`)"),
            }
        })
        .collect();
    let mut text = format!(
        "`{}` has no tensor for {} of {} sites: {}",
        recorded.file.shown(),
        missing.len(),
        sites.len(),
        listed(&wanted)
    );
    if !unused.is_empty() {
        let unused: Vec<String> = unused.iter().map(|name| format!("`{name}`")).collect();
        text += &format!("; no site uses {}", listed(&unused));
    }
    Ok(Some(text))
}

/// The sites, those of one name in many layers as one: how it is shown, and the first.
pub fn by_layer<'s>(sites: &[&'s Site]) -> Vec<(String, &'s Site)> {
    let mut shown: Vec<(String, &Site)> = Vec::new();
    for site in sites {
        let pattern = match in_layer(&site.0) {
            Some((_, inner)) if LAYER_SITES.contains(&inner) => format!("blk.*.{inner}"),
            _ => site.0.clone(),
        };
        if !shown.iter().any(|(known, _)| *known == pattern) {
            shown.push((pattern, site));
        }
    }
    for (pattern, site) in &mut shown {
        let inner = in_layer(&site.0).map(|(_, inner)| inner);
        let many = sites.iter().filter(|s| in_layer(&s.0).map(|(_, i)| i) == inner).count();
        if inner.is_some() && many == 1 {
            *pattern = site.0.clone();
        }
    }
    shown
}

fn listed(names: &[String]) -> String {
    match names.len() {
        n if n > SHOWN => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
        _ => names.join(", "),
    }
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// A name with the columns that are meant of its tensor, where not all are.
struct Part {
    name: String,
    columns: Option<(usize, usize)>,
}

impl Part {
    /// `NAME`, `NAME[0:576]` or, of a model's fused products, `NAME[q]` and the like.
    fn of(written: &str, model: Option<&Model>) -> Part {
        let whole = || Part { name: written.to_owned(), columns: None };
        let Some((name, part)) = written.strip_suffix(']').and_then(|text| text.rsplit_once('['))
        else {
            return whole();
        };
        let widths = model.map(|model| {
            let config = model.config();
            let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
            (q, kv, config.ffn)
        });
        let columns = match (part, widths) {
            ("q", Some((q, ..))) => Some((0, q)),
            ("k", Some((q, kv, _))) => Some((q, q + kv)),
            ("v", Some((q, kv, _))) => Some((q + kv, q + 2 * kv)),
            ("gate", Some((.., inner))) => Some((0, inner)),
            ("up", Some((.., inner))) => Some((inner, 2 * inner)),
            _ => part.split_once(':').and_then(|(start, end)| {
                let (start, end) = (start.parse().ok()?, end.parse().ok()?);
                (start < end).then_some((start, end))
            }),
        };
        match columns {
            Some(_) => Part { name: name.to_owned(), columns },
            None => whole(),
        }
    }
}

fn read(
    file: &TensorFile,
    recorded: &Recorded,
    site: &Site,
    model: Option<&Model>,
) -> Result<Tensor, TensorFileError> {
    let Part { name, columns } = Part::of(&recorded.tensor_of(site), model);
    let values = file.read(&wanted(file, recorded, site, name.clone()))?.values();
    let Some((start, end)) = columns else { return Ok(values) };
    if end > values.width() {
        let problem =
            format!("is {} wide, and its columns {start} to {end} are asked for", values.width());
        return Err(TensorFileError::Unusable { path: recorded.file.clone(), name, problem });
    }
    Ok(values.columns(start..end))
}

/// The one recorded tensor of a product, as its file stores it.
///
/// # Errors
/// If it is not there.
pub fn product(recorded: &Recorded, site: &Site) -> Result<CodedTensor, ComputeError> {
    let file = TensorFile::open(&recorded.file)?;
    Ok(file.read(&wanted(&file, recorded, site, recorded.tensor_of(site)))?)
}

fn wanted(file: &TensorFile, recorded: &Recorded, site: &Site, name: String) -> FileTensor {
    // The only tensor of a file that gives it no name is the one that is meant.
    let unnamed =
        recorded.shape.is_some() || file.is_nameless() && !recorded.names.contains_key(&site.0);
    FileTensor {
        file: recorded.file.clone(),
        tensor: Some(name).filter(|_| !unnamed),
        format: recorded.format,
        shape: recorded.shape.clone(),
        scale: None,
    }
}

/// Refuses what a program cannot have meant: rows that are not its input's, logits
/// that are not the vocabulary's, and values that are no numbers.
///
/// # Errors
/// In words, with the site.
pub fn check_written(
    op: &Op,
    output: &Output,
    rows: usize,
    vocabulary: usize,
) -> Result<(), ComputeError> {
    for (site, tensor) in &output.sites {
        if site.0 == "logits" && tensor.width() != vocabulary {
            return Err(ComputeError::Shape {
                what: format!("site `{site}` as the program wrote it"),
                left: format!("[{}, {}]", tensor.rows(), tensor.width()),
                right: format!("a vocabulary of {vocabulary} tokens"),
            });
        }
        if tensor.rows() != rows && !(keeps_last(op) && tensor.rows() == 1) {
            return Err(ComputeError::Shape {
                what: format!("site `{site}` as the program wrote it"),
                left: format!("[{}, {}]", tensor.rows(), tensor.width()),
                right: format!("the {rows} rows that were asked for"),
            });
        }
        let strange = tensor.data().iter().filter(|value| !value.is_finite()).count();
        if strange > 0 {
            return Err(ComputeError::Recipe(format!(
                "the program wrote {strange} values at `{site}` that are NaN or infinite"
            )));
        }
    }
    Ok(())
}
