//! `tokenizer.json`: whatever it says, a text is encoded or refused.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use runner::model::Model;

/// A folder with the smallest sound model; the target writes its tokenizer.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = r#"{"model_type":"llama","hidden_size":2,"num_hidden_layers":1,
"num_attention_heads":1,"intermediate_size":2,"vocab_size":512,"max_position_embeddings":64,
"rms_norm_eps":1e-5,"tie_word_embeddings":true}"#;
    fs::write(folder.path().join("config.json"), config).expect("a config");
    fs::write(folder.path().join("model.safetensors"), safetensors()).expect("weights");
    folder
});

fn safetensors() -> Vec<u8> {
    let block = [
        ("input_layernorm", "2"),
        ("post_attention_layernorm", "2"),
        ("self_attn.q_proj", "2,2"),
        ("self_attn.k_proj", "2,2"),
        ("self_attn.v_proj", "2,2"),
        ("self_attn.o_proj", "2,2"),
        ("mlp.gate_proj", "2,2"),
        ("mlp.up_proj", "2,2"),
        ("mlp.down_proj", "2,2"),
    ];
    let block = block.map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape));
    let outer = [("model.embed_tokens.weight", "512,2"), ("model.norm.weight", "2")];
    let outer = outer.map(|(name, shape)| (name.to_owned(), shape));
    let (mut lines, mut end) = (Vec::new(), 0);
    for (name, shape) in block.into_iter().chain(outer) {
        let count: usize =
            shape.split(',').map(|n| n.parse::<usize>().expect("a number")).product();
        let start = end;
        end += 2 * count;
        lines.push(format!(
            r#""{name}":{{"dtype":"BF16","shape":[{shape}],"data_offsets":[{start},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", lines.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + end, 0);
    file
}

fuzz_target!(|json: &[u8]| {
    let folder = FOLDER.path();
    fs::write(folder.join("tokenizer.json"), json).expect("the temporary folder takes files");
    let model = Model::open(folder).expect("the model itself is sound");
    if let Ok(tokens) = model.encode("The 123 quick\n\n \u{e9}<|im_end|>") {
        let _ = model.decode(&tokens);
    }
});
