//! Hugging Face folders: `config.json`, the index and a safetensors file.
//!
//! The input is three texts with zero bytes between: config, index, safetensors.
#![no_main]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use runner::model::Model;

static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));
const CONFIG: &str = r#"{"model_type":"llama","hidden_size":8,"num_hidden_layers":1,
"num_attention_heads":2,"intermediate_size":12,"vocab_size":4,"max_position_embeddings":64,
"rms_norm_eps":1e-5,"tie_word_embeddings":true}"#;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(3, |&byte| byte == 0);
    let mut part = || parts.next().unwrap_or_default();
    let (config, index, safetensors) = (part(), part(), part());
    // An empty config is a good one, so that the fuzzer need not find one to get further.
    let config = if config.is_empty() { CONFIG.as_bytes() } else { config };
    let folder = FOLDER.path();
    write(&folder.join("config.json"), config);
    if index.is_empty() {
        write(&folder.join("model.safetensors"), safetensors);
    } else {
        let _ = fs::remove_file(folder.join("model.safetensors"));
        write(&folder.join("model.safetensors.index.json"), index);
        write(&folder.join("a.safetensors"), safetensors);
    }
    let Ok(model) = Model::open(folder) else { return };
    for name in model.names() {
        let weight = model.tensor(name).expect("a name that the model gave");
        weight.to_vec().expect("all of its rows");
    }
});

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("the temporary folder takes files");
}
