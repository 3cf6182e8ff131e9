//! Passes of other engines, recorded without Python.
//!
//! `llama` opens llama.cpp's shared libraries and shows every node of a graph when it has been
//! computed; here stands which node is which site, and what becomes of several steps. It knows
//! names and bytes, not what a site should hold.

mod llama;

use std::path::{Path, PathBuf};

pub use llama::record;

/// Which pass of which model.
#[derive(Clone, Debug)]
pub struct Pass {
    /// A GGUF file.
    pub model: PathBuf,
    /// The prompt.
    pub tokens: Vec<i32>,
    /// Tokens that the engine goes on for, the likeliest each time.
    pub decode: usize,
    /// Layers that a GPU computes.
    pub gpu_layers: i32,
    /// Whether keys and values are kept in f32, and not in f16.
    pub wide_cache: bool,
    /// The folder of llama.cpp's libraries; without it the system's own.
    pub library: Option<PathBuf>,
}

/// What a pass left.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// Each site's name, rows and values: f32, little-endian, row by row.
    pub sites: Vec<(String, usize, Vec<u8>)>,
    /// The tokens of all rows.
    pub ids: Vec<i32>,
}

/// Why nothing was recorded.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A library that is not there, or lacks a function.
    #[error(
        "cannot open llama.cpp's library `{}`: {problem}; name the folder of `libllama.so` by --library",
        crate::text::Shown::shown(path.as_path())
    )]
    Library {
        /// The file, or the name that the system was asked for.
        path: PathBuf,
        /// What the system says.
        problem: String,
    },
    /// A library whose parameters lie elsewhere than in any version that is known.
    #[error(
        "this llama.cpp keeps {what} in another form than the builds that are known (b6133 to \
         v0.4.0): nothing else of it was called; give --library the folder of such a build"
    )]
    Unknown {
        /// Which parameters.
        what: &'static str,
    },
    /// The engine refused.
    #[error("llama.cpp {problem}")]
    Engine {
        /// What it could not do, and the last of what it said.
        problem: String,
    },
    /// The user's wish.
    #[error("stopped on request; nothing was written")]
    Stopped,
}

/// What llama.cpp calls a site's tensor, and the operations that make it. Several nodes may have
/// one name: the last one makes the site, a bias that is added after a product among them.
const SITES: [(&str, &str, &[&str]); 19] = [
    ("inp_embd", "embed", &["GET_ROWS"]),
    // As builds of 2026 call it.
    ("embd", "embed", &["GET_ROWS"]),
    ("attn_norm", "attn_norm", &["MUL"]),
    ("Qcur", "q", &["MUL_MAT", "ADD"]),
    ("Kcur", "k", &["MUL_MAT", "ADD"]),
    ("Vcur", "v", &["MUL_MAT", "ADD"]),
    ("Qcur_normed", "q_norm", &["MUL"]),
    ("Kcur_normed", "k_norm", &["MUL"]),
    ("kqv_out", "attn", &["CONT"]),
    ("attn_out", "attn_out", &["MUL_MAT"]),
    ("ffn_inp", "attn_residual", &["ADD"]),
    ("ffn_norm", "ffn_norm", &["MUL"]),
    ("ffn_gate", "ffn_gate", &["MUL_MAT"]),
    ("ffn_up", "ffn_up", &["MUL_MAT"]),
    ("ffn_swiglu", "ffn_swiglu", &["SWIGLU"]),
    ("ffn_out", "ffn_down", &["MUL_MAT"]),
    ("l_out", "ffn_residual", &["ADD"]),
    ("result_norm", "output_norm", &["MUL"]),
    ("result_output", "logits", &["MUL_MAT"]),
];
/// Queries and keys after their rotation keep their names.
const ROTATED: [(&str, &str); 2] = [("Qcur", "q_rope"), ("Kcur", "k_rope")];

/// The site of a node by its name, the operation that made it, and the name of its first
/// operand: graphs that give a product no name are known by its weight.
fn site_of(name: &str, made_by: &str, operand: impl Fn() -> String) -> Option<String> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (name, layer) = match name.rsplit_once('-') {
        Some((name, layer)) if digits(layer) => (name, Some(layer)),
        _ => (name, None),
    };
    let site = match made_by {
        "ROPE" => ROTATED.iter().find(|(known, _)| *known == name).map(|(_, site)| *site),
        _ => match SITES.iter().find(|(known, ..)| *known == name) {
            Some((_, site, by)) => Some(*site).filter(|_| by.contains(&made_by)),
            None if made_by == "MUL_MAT" => {
                let operand = operand();
                let inner = operand.strip_prefix("blk.")?.strip_suffix(".attn_output.weight")?;
                return digits(inner).then(|| format!("blk.{inner}.attn_out"));
            }
            None => None,
        },
    }?;
    Some(match layer {
        None => site.to_owned(),
        Some(layer) => format!("blk.{layer}.{site}"),
    })
}

/// The rows of all steps, site by site, in the order of the first step.
fn joined(steps: Vec<Vec<(String, usize, Vec<u8>)>>) -> Vec<(String, usize, Vec<u8>)> {
    let mut steps = steps.into_iter();
    let mut whole = steps.next().unwrap_or_default();
    for step in steps {
        for (site, rows, bytes) in step {
            if let Some((_, all, values)) = whole.iter_mut().find(|(known, ..)| *known == site) {
                *all += rows;
                values.extend(bytes);
            }
        }
    }
    whole
}

impl Recording {
    /// A safetensors file: each site in f32, and `ids`.
    pub fn to_safetensors(&self) -> Vec<u8> {
        let mut header = String::from("{");
        let mut end = 0;
        let mut add = |name: &str, kind: &str, shape: &str, bytes: usize| {
            let comma = if end > 0 { ", " } else { "" };
            let name = serde_json::Value::from(name);
            let stop = end + bytes;
            header += &format!(
                "{comma}{name}: {{\"dtype\": \"{kind}\", \"shape\": [{shape}], \
                 \"data_offsets\": [{end}, {stop}]}}"
            );
            end = stop;
        };
        for (name, rows, values) in &self.sites {
            let width = values.len() / 4 / rows;
            add(name, "F32", &format!("{rows}, {width}"), values.len());
        }
        add("ids", "I64", &self.ids.len().to_string(), 8 * self.ids.len());
        header.push('}');
        header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        self.sites.iter().for_each(|(_, _, values)| file.extend(values));
        file.extend(self.ids.iter().flat_map(|id| i64::from(*id).to_le_bytes()));
        file
    }
}

/// The libraries of llama.cpp in a folder: those of ggml first, as they need each other. Some
/// builds put their number into a file's name.
fn libraries(folder: Option<&Path>) -> [PathBuf; 3] {
    ["libggml-base", "libggml", "libllama"].map(|name| {
        let plain = format!("{name}.so");
        let Some(folder) = folder else { return plain.into() };
        let there = folder.join(&plain);
        if there.exists() {
            return there;
        }
        let numbered = |file: &PathBuf| {
            let file = file.file_name().unwrap_or_default().to_string_lossy();
            file.starts_with(&format!("{name}.")) && file.ends_with(".so")
        };
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(numbered).collect();
        found.sort();
        found.into_iter().next().unwrap_or(there)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_the_site_that_its_name_and_operation_make() {
        let site = |name, made_by| site_of(name, made_by, || "blk.3.attn_output.weight".to_owned());
        assert_eq!(site("Qcur-11", "ADD").as_deref(), Some("blk.11.q"));
        assert_eq!(site("Qcur-11", "ROPE").as_deref(), Some("blk.11.q_rope"));
        assert_eq!(site("Vcur-0", "ROPE"), None);
        assert_eq!(site("Qcur-0", "RESHAPE"), None);
        assert_eq!(site("node_17", "MUL_MAT").as_deref(), Some("blk.3.attn_out"));
        assert_eq!(site("result_output", "MUL_MAT").as_deref(), Some("logits"));
        assert_eq!(site_of("kq-0", "MUL_MAT", || "cache_k_l0".to_owned()), None);
    }

    #[test]
    fn steps_are_laid_one_behind_the_other_and_read_back() {
        let step = |name: &str, rows: usize, value: f32| {
            (name.to_owned(), rows, value.to_le_bytes().repeat(rows * 2))
        };
        let steps = vec![
            vec![step("embed", 2, 1.0), step("blk.0.q", 2, 2.0)],
            vec![step("embed", 1, 3.0), step("blk.0.q", 1, 4.0)],
        ];
        let recording = Recording { sites: joined(steps), ids: vec![7, 8, 9] };
        let file = recording.to_safetensors();
        let read = safetensors::SafeTensors::deserialize(&file).expect("safetensors");
        let embed = read.tensor("embed").expect("a site");
        assert_eq!(embed.shape(), [3, 2]);
        let values: Vec<f32> =
            embed.data().as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
        assert_eq!(values, [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]);
        assert_eq!(read.tensor("ids").expect("ids").data().len(), 24);
    }
}
