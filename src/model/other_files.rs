//! Files and folders that are of a language model, and are not one: adapters, encoders, vocabularies,
//! statistics, heads of classifiers.
//!
//! It says what such a file is, before anybody misses the tensors of a model in it. It knows keys
//! and names of tensors, and neither shapes nor values.

use std::path::Path;

use super::error::{FETCH_AGAIN, Fault, ModelError, shown};
use super::gguf::Header;

/// Keys of models whose tensors or passes are others, which are none of a language model's own.
const OF_OTHERS: [&str; 2] = ["diffusion.", "xielu."];
const OWN_FILE: &str = "give the language model's own file";
const MERGE: &str = "merge it into its base model, and give the merged model";

/// What a GGUF file is that is no whole model, by its metadata and the names of its tensors.
///
/// # Errors
/// If it is something else than a language model.
pub(super) fn refuse<'a>(
    header: &Header,
    file: &[u8],
    names: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), Fault> {
    let refused = |what: String, remedy: &str| Err(Fault::unsupported(what, remedy));
    let kind = header.text(file, "general.type")?.filter(|kind| *kind != "model");
    if let Some(kind) = kind {
        let (what, remedy) = match kind {
            "adapter" => ("an adapter", MERGE),
            "mmproj" => ("an encoder of images or sound (mmproj)", OWN_FILE),
            "imatrix" => ("an importance matrix", OWN_FILE),
            "vocab" => ("a vocabulary without weights", OWN_FILE),
            _ => ("something else", OWN_FILE),
        };
        let kind = shown(kind);
        return refused(format!("its `general.type` is `{kind}`: it is {what}, no model"), remedy);
    }
    let key = |prefix: &str| header.keys().find(|key| key.starts_with(prefix)).map(shown);
    for (prefix, what, remedy) in [
        ("adapter.", "an adapter", MERGE),
        ("clip.", "an encoder of images or sound (mmproj)", OWN_FILE),
        ("controlvector.", "a control vector", "give the model that it steers"),
        ("imatrix.", "an importance matrix", OWN_FILE),
    ] {
        if let Some(key) = key(prefix) {
            return refused(format!("it has the key `{key}`: it is {what}, no model"), remedy);
        }
    }
    if let Some(key) = OF_OTHERS.iter().find_map(|prefix| key(prefix)) {
        return refused(format!("what `{key}` asks for is not computed"), OWN_FILE);
    }
    let named = |is: &dyn Fn(&str) -> bool| names.clone().find(|name| is(name)).map(shown);
    let is_model = named(&|name| name == "token_embd.weight").is_some();
    let of_adapter = named(&|name| name.ends_with(".lora_a") || name.ends_with(".lora_b"));
    let others = [
        (of_adapter, "an adapter", MERGE),
        (named(&|name| name.ends_with(".in_sum2")), "an importance matrix", OWN_FILE),
        (named(&|name| name.starts_with("direction.")), "a control vector", OWN_FILE),
        (
            named(&|name| ["v.", "mm.", "a."].iter().any(|prefix| name.starts_with(prefix)))
                .filter(|_| !is_model),
            "an encoder of images or sound (mmproj)",
            OWN_FILE,
        ),
    ];
    for (name, what, remedy) in others {
        if let Some(name) = name {
            return refused(
                format!("it holds the tensor `{name}`: it is {what}, no model"),
                remedy,
            );
        }
    }
    if names.clone().next().is_none() {
        let what = match (header.get("tokenizer.ggml.tokens"), header.keys().next()) {
            (Some(_), _) => "it holds a vocabulary and no tensors",
            (None, Some(_)) => "it holds metadata and no tensors",
            (None, None) => "it is an empty GGUF file: it holds neither metadata nor tensors",
        };
        return Err(Fault::malformed(
            what,
            "give the model's own file, all parts of it where it is split",
        ));
    }
    match header.unsigned("general.quantization_version")? {
        None | Some(2) => Ok(()),
        Some(version) => refused(
            format!("its blocks have the quantization version {version}, not 2"),
            "quantize the model anew",
        ),
    }
}

/// What a folder without `config.json` is.
pub(super) fn refuse_folder(folder: &Path) -> Result<(), ModelError> {
    let name = "adapter_config.json";
    let path = folder.join(name);
    if folder.join("config.json").exists() || !path.exists() {
        return Ok(());
    }
    let json = super::read_small(&path)?;
    let json: serde_json::Value = serde_json::from_slice(&json)
        .map_err(|error| Fault::malformed(error.to_string(), FETCH_AGAIN).at(&path))?;
    let (what, remedy) = match json.get("base_model_name_or_path").and_then(|base| base.as_str()) {
        Some(base) => (
            format!("it is an adapter of `{}` ({name}), no model", shown(base)),
            "merge it into that model (`merge_and_unload` of peft), and give the merged folder",
        ),
        None => (format!("it is an adapter ({name}), no model"), MERGE),
    };
    Err(Fault::unsupported(what, remedy).at(folder))
}
