//! Files and folders that are of a language model, and are not one: adapters, encoders, vocabularies,
//! statistics, heads of classifiers.
//!
//! It says what such a file is, before anybody misses the tensors of a model in it. It knows keys
//! and names of tensors, and neither shapes nor values.

use std::path::Path;

use super::error::{FETCH_AGAIN, Fault, ModelError, shown};
use super::gguf::Header;
use super::json;

/// Keys of models whose tensors or passes are others, which are none of a language model's own.
const OF_OTHERS: [&str; 2] = ["diffusion.", "xielu."];
/// What the head of a classifier is for.
pub(super) const CLASSIFIER: &str =
    "it is the head of a classifier or reranker, whose scores are not computed";
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

/// What a folder without `config.json` is: an adapter, or none of a model. Beside a model an adapter
/// is refused too: transformers loads the model that it names, and puts it on top.
pub(super) fn refuse_folder(folder: &Path) -> Result<(), ModelError> {
    let name = "adapter_config.json";
    let path = folder.join(name);
    if folder.join("config.json").exists() {
        if !path.exists() {
            return Ok(());
        }
        let what = format!("an adapter ({name}) lies beside the model, and would change it");
        return Err(Fault::unsupported(
            what,
            "move the adapter's files out of the folder, or give the folder of the merged model",
        )
        .at(folder));
    }
    if !path.exists() {
        return Err(Fault::malformed(
            "the folder has no config.json",
            "give a folder with config.json and safetensors, or a GGUF file",
        )
        .at(folder));
    }
    let json = super::read_small(&path)?;
    let json: serde_json::Value =
        json::read(&json).map_err(|problem| Fault::malformed(problem, FETCH_AGAIN).at(&path))?;
    let (what, remedy) = match json.get("base_model_name_or_path").and_then(|base| base.as_str()) {
        Some(base) => (
            format!("it is an adapter of `{}` ({name}), no model", shown(base)),
            "merge it into that model (`merge_and_unload` of peft), and give the merged folder",
        ),
        None => (format!("it is an adapter ({name}), no model"), MERGE),
    };
    Err(Fault::unsupported(what, remedy).at(folder))
}

/// Refuses what stands in the place of a file whose contents were not fetched.
pub(super) fn refuse_unfetched(file: &[u8]) -> Result<(), Fault> {
    if file.starts_with(b"version https://git-lfs.github.com/spec/") {
        return Err(Fault::malformed(
            "it is a pointer of Git LFS, not the file itself",
            "fetch the file itself: `git lfs pull`, or `hf download`",
        ));
    }
    let page = [&b"<!DOCTYPE"[..], b"<!doctype", b"<html", b"<HTML"];
    if page.iter().any(|begin| file.starts_with(begin)) {
        return Err(Fault::malformed("it is a page of HTML, not the file itself", FETCH_AGAIN));
    }
    Ok(())
}

/// What a folder holds that has no weights under the names that are read.
pub(super) fn other_weights(folder: &Path) -> (String, &'static str) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let lacks = "the folder has neither model.safetensors nor model.safetensors.index.json";
    let found = |is: &dyn Fn(&str) -> bool| names.iter().find(|name| is(name)).map(|n| shown(n));
    if let Some(name) = found(&|name| name.contains("-of-") && name.ends_with(".safetensors")) {
        return (
            format!("{lacks}, and it holds a part of a split model, `{name}`"),
            "fetch model.safetensors.index.json too",
        );
    }
    if let Some(name) = found(&|name| name.ends_with(".safetensors")) {
        return (
            format!("{lacks}, and `{name}` is not read"),
            "fetch the files that transformers loads, or rename the file to model.safetensors if \
             its tensors have transformers' names",
        );
    }
    if let Some(name) = found(&|name| name.ends_with(".bin") || name.ends_with(".pth")) {
        return (
            format!("{lacks}, and `{name}`, which is made to be run by Python, is not read"),
            "save the model with transformers' `save_pretrained`, or fetch its safetensors files",
        );
    }
    (lacks.to_owned(), "fetch the model's safetensors files, or give a GGUF file")
}

/// What a tensor belongs to that no pass of a language model reads, and what to do, where its name
/// tells.
pub(super) fn owner_of(name: &str) -> Option<(&'static str, &'static str)> {
    let of_base = "give the language model that it was made of";
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    if begins(&["cls.", "score.", "classifier."]) {
        return Some((CLASSIFIER, of_base));
    }
    if begins(&["base_model.model."]) || name.contains(".lora_") {
        return Some(("it belongs to an adapter of peft, or to a model within one", MERGE));
    }
    let multimodal = [
        "language_model.",
        "model.language_model.",
        "model.vision",
        "model.visual",
        "vision_",
        "visual.",
        "multi_modal_projector.",
    ];
    if begins(&multimodal) {
        return Some((
            "it belongs to a model that also reads images or sound",
            "save its language model alone, with the config.json of that, and give this folder",
        ));
    }
    if begins(&["model.model."]) {
        return Some((
            "its name begins with `model.` twice, as no class of transformers names it",
            "save the model anew with transformers' `save_pretrained`",
        ));
    }
    None
}
