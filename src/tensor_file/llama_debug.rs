//! What llama.cpp's debugging programs leave.
//!
//! `llama-debug --save-logits` writes the logits of the last token, or the embeddings, as
//! plain f32 values (`llamacpp-MODEL.bin`) and the prompt's tokens beside them
//! (`llamacpp-MODEL-tokens.bin`). `llama-eval-callback` and `llama-debug` print tensors in
//! parts and rounded, which is no recording. It knows names and sizes of these files.

use std::path::{Path, PathBuf};

use super::{Element, Entry, Place};
use crate::dtype::Format;

/// What the lines of printed tensors begin with, older ones last.
const PRINTED: [&str; 2] = ["common_debug_cb_eval:", "ggml_debug:"];
/// So much of a text shows whether tensors are printed in it.
const LOOKED_AT: usize = 1 << 20;

/// The file of the tokens that belongs to a file of logits or embeddings.
pub(super) fn tokens_beside(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(".bin").filter(|stem| stem.starts_with("llamacpp-"))?;
    let beside = path.with_file_name(format!("{stem}-tokens.bin"));
    beside.is_file().then_some(beside)
}

/// The logits or embeddings, in the first file, and the tokens, in the second.
pub(super) fn entries(path: &Path, values: usize, tokens: usize) -> Result<Vec<Entry>, String> {
    if !values.is_multiple_of(4) || values == 0 || !tokens.is_multiple_of(4) || tokens == 0 {
        return Err(format!(
            "it has {values} bytes and its tokens {tokens}, which are no numbers of four bytes"
        ));
    }
    let (values, tokens) = (values / 4, tokens / 4);
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let (name, shape) = match stem.ends_with("-embeddings") {
        // One row, where the model pools them.
        true if values.is_multiple_of(tokens) => ("embeddings", vec![tokens, values / tokens]),
        true => ("embeddings", vec![1, values]),
        false => ("logits", vec![1, values]),
    };
    Ok(vec![
        Entry {
            name: name.to_owned(),
            element: Element::Format(Format::F32),
            shape,
            place: Place::At(0..values * 4),
            map: 0,
        },
        Entry {
            name: "ids".to_owned(),
            element: Element::Words(4),
            shape: vec![tokens],
            place: Place::At(0..tokens * 4),
            map: 1,
        },
    ])
}

/// Why a text with printed tensors is not read; nothing if it is no such text.
pub(super) fn printed(file: &[u8]) -> Option<String> {
    let start = &file[..file.len().min(LOOKED_AT)];
    let has = |words: &str| start.windows(words.len()).any(|window| window == words.as_bytes());
    PRINTED.into_iter().any(has).then(|| {
        "llama.cpp printed these tensors: of each dimension the first and the last three values, \
         with four digits behind the point; the rest is not in this text. Record the pass with \
         `runner capture llama.cpp --model MODEL.gguf`, which keeps every value"
            .to_owned()
    })
}
