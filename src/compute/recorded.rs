//! The recorded arm: tensors that another program left in a file.
//!
//! What it reads is what was recorded, converted to f32 and not otherwise
//! touched. It knows which sites an op makes, not what they should hold.

use super::ComputeError;
use super::arms::{Output, site_names};
use crate::model::Model;
use crate::op::{FileTensor, Op, Recorded, Site};
use crate::tensor_file::{CodedTensor, TensorFile, TensorFileError};

/// The tensors of the op's sites. A forward pass whose file lacks some of them is
/// read as far as it goes: what is missing is measured as missing.
///
/// # Errors
/// If the file is not readable, holds none of the sites, or lacks one that an op
/// of few sites must make.
pub fn recorded(
    op: &Op,
    recorded: &Recorded,
    model: Option<&Model>,
) -> Result<Output, ComputeError> {
    let file = TensorFile::open(&recorded.file)?;
    let mut output = Output::default();
    let partly = matches!(op, Op::Forward { .. });
    let mut missing = None;
    for site in site_names(op, model) {
        match file.read(&wanted(recorded, &site)) {
            Ok(tensor) => output.sites.push((site, tensor.values())),
            Err(TensorFileError::Missing { path, name, found }) if partly => {
                missing.get_or_insert((path, name, found));
            }
            Err(error) => return Err(error.into()),
        }
    }
    if output.sites.is_empty()
        && let Some((path, name, found)) = missing
    {
        return Err(TensorFileError::Missing { path, name, found }.into());
    }
    output.arithmetic = format!("as recorded in `{}`", recorded.file.display());
    Ok(output)
}

/// The one recorded tensor of a product, as its file stores it.
///
/// # Errors
/// If it is not there.
pub fn product(recorded: &Recorded, site: &Site) -> Result<CodedTensor, ComputeError> {
    Ok(TensorFile::open(&recorded.file)?.read(&wanted(recorded, site))?)
}

fn wanted(recorded: &Recorded, site: &Site) -> FileTensor {
    FileTensor {
        file: recorded.file.clone(),
        tensor: Some(recorded.tensor_of(site)).filter(|_| recorded.shape.is_none()),
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
pub fn check_written(output: &Output, rows: usize, vocabulary: usize) -> Result<(), ComputeError> {
    for (site, tensor) in &output.sites {
        if site.0 == "logits" && tensor.width() != vocabulary {
            return Err(ComputeError::Shape {
                what: format!("site `{site}` as the program wrote it"),
                left: format!("[{}, {}]", tensor.rows(), tensor.width()),
                right: format!("a vocabulary of {vocabulary} tokens"),
            });
        }
        if tensor.rows() != rows {
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
