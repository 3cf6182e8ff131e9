//! What can be wrong with a model file, told with the file, the tensor and the remedy.
//!
//! It knows no format: the readers say what they found, this module words it.

use crate::text::Shown;
pub(super) use crate::text::shown;
use std::path::{Path, PathBuf};

/// Why a model could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused.
    #[error("cannot {action} `{}`: {source}{}", path.shown(), remedy_of(source))]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file contradicts its format or itself.
    #[error("`{}` is not a sound model: {}{problem}; {remedy}", path.shown(), of_tensor(tensor))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The tensor concerned, if one is.
        tensor: Option<String>,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// The file is sound, but needs something that would be computed wrongly.
    #[error("`{}` is not supported: {}{problem}; {remedy}", path.shown(), of_tensor(tensor))]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The tensor concerned, if one is.
        tensor: Option<String>,
        /// What is not supported.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// The model has no tensor of that name.
    #[error("`{}` has no tensor `{tensor}`; the nearest names are {}", path.shown(), list(nearest))]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
        /// The most similar names, best first.
        nearest: Vec<String>,
    },
    /// A tensor was asked for something that it does not have.
    #[error("tensor `{tensor}`: {problem}")]
    Request {
        /// The tensor.
        tensor: String,
        /// What was asked for.
        problem: String,
    },
    /// The vocabulary cannot be used for this text or these tokens.
    #[error("cannot tokenize with `{}`: {problem}; {remedy}", path.shown())]
    Tokenizer {
        /// The model.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
}

/// What to do about the system's answer.
fn remedy_of(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::NotFound => {
            "; check the path: a model is a GGUF file, a folder with safetensors, or \
             `synthetic:NAME`"
        }
        std::io::ErrorKind::PermissionDenied => "; change its permissions, or choose another place",
        std::io::ErrorKind::StorageFull => {
            "; free some space, or choose another disk with `--runs`"
        }
        _ => "",
    }
}

fn of_tensor(tensor: &Option<String>) -> String {
    tensor.as_ref().map(|name| format!("tensor `{}`: ", shown(name))).unwrap_or_default()
}

fn list(names: &[String]) -> String {
    names.iter().map(|name| format!("`{}`", shown(name))).collect::<Vec<_>>().join(", ")
}

/// A fault that does not know yet in which file it is.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    supported: bool,
    tensor: Option<String>,
    problem: String,
    remedy: String,
}

impl Fault {
    /// The file contradicts its format or itself.
    pub fn malformed(problem: impl Into<String>, remedy: impl Into<String>) -> Fault {
        Fault { supported: true, tensor: None, problem: problem.into(), remedy: remedy.into() }
    }

    /// The file is sound, but computing it is not implemented.
    pub fn unsupported(problem: impl Into<String>, remedy: impl Into<String>) -> Fault {
        Fault { supported: false, tensor: None, problem: problem.into(), remedy: remedy.into() }
    }

    /// The same fault, of this tensor.
    pub fn in_tensor(self, tensor: impl Into<String>) -> Fault {
        Fault { tensor: Some(tensor.into()), ..self }
    }

    /// The same fault, whose tensor has the name that `called` gives it, where it knows one.
    pub fn called(self, called: impl Fn(&str) -> Option<String>) -> Fault {
        let own = self.tensor.as_deref().and_then(called);
        Fault { tensor: own.or(self.tensor), ..self }
    }

    /// The fault alone, where somebody else names the file.
    pub fn in_words(&self) -> String {
        format!("{}{}; {}", of_tensor(&self.tensor), self.problem, self.remedy)
    }

    /// The same fault, in this file.
    pub fn at(self, path: &Path) -> ModelError {
        let Fault { supported, tensor, problem, remedy } = self;
        let path = path.to_owned();
        if supported {
            ModelError::Malformed { path, tensor, problem, remedy }
        } else {
            ModelError::Unsupported { path, tensor, problem, remedy }
        }
    }
}

/// Remedy for a file that is damaged or was made by a faulty program.
pub(super) const FETCH_AGAIN: &str =
    "fetch the file again and compare its checksum, or convert the model anew";

/// Remedy for a model that the runner would compute wrongly.
pub(super) const OTHER_MODEL: &str =
    "choose a model of one of the known architectures without this feature";
