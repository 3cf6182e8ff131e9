//! What transformers makes of a `tokenizer.json`: some of its classes take the vocabulary and the
//! merges alone and build everything else anew.
//!
//! It knows JSON and names of classes, not what a tokenizer does.
//!
//! Source: `tokenization_auto.py` and the classes' own files in transformers 5.17.

use serde_json::{Map, Value, json};

use super::architecture::Architecture;
use super::error::shown;

/// How texts are cut by Qwen2's class.
pub(super) const QWEN2_CUT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A class of tokenizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// `tokenizer.json` as it is.
    File,
    /// SentencePiece's BPE: a space before the first text, before each part, or before none.
    Llama(&'static str),
    /// SentencePiece's BPE, cut at spaces.
    Gemma,
    /// Byte-level BPE, cut as Qwen2 does.
    Qwen2 {
        /// Whether a space is put first.
        prefix: bool,
    },
    /// Byte-level BPE, cut as GPT-2 does.
    Gpt2 {
        /// Whether a space is put first.
        prefix: bool,
    },
}

/// The classes that take the file as it is, with `Fast` cut off.
const PLAIN: [&str; 3] = ["PreTrainedTokenizer", "PythonBackend", "TokenizersBackend"];

impl Class {
    /// The class by `tokenizer_config.json`, `config.json` and the architecture.
    ///
    /// # Errors
    /// In words, if it builds what is not known here.
    pub fn of(
        config: &Map<String, Value>,
        of_model: &Map<String, Value>,
        architecture: Architecture,
    ) -> Result<Class, String> {
        let named = |map: &Map<String, Value>| {
            let name = map.get("tokenizer_class").and_then(Value::as_str);
            name.map(|name| name.strip_suffix("Fast").unwrap_or(name).to_owned())
        };
        let name = match (named(config).or_else(|| named(of_model)), architecture.tokenizer()) {
            (None, None) => return Ok(Class::File),
            (None, Some(kept)) => kept.to_owned(),
            (Some(name), Some(kept)) if name != kept => match kept {
                "TokenizersBackend" => return Ok(Class::File),
                // Their files name many classes, all of them wrong.
                kept if architecture == Architecture::Qwen2 => kept.to_owned(),
                _ => name,
            },
            (Some(name), _) => name,
        };
        let flag = |key: &str| config.get(key).and_then(Value::as_bool);
        let prefix = flag("add_prefix_space");
        match name.as_str() {
            "LlamaTokenizer" => Ok(Class::Llama(match (prefix, flag("legacy")) {
                (Some(false), _) => "never",
                (_, Some(true)) => "always",
                _ => "first",
            })),
            "GemmaTokenizer" => Ok(Class::Gemma),
            "Qwen2Tokenizer" => Ok(Class::Qwen2 { prefix: prefix.unwrap_or(false) }),
            "GPT2Tokenizer" => Ok(Class::Gpt2 { prefix: prefix.unwrap_or(false) }),
            name if PLAIN.contains(&name) => Ok(Class::File),
            other => {
                Err(format!("its `tokenizer_class` is `{}`, which is not known here", shown(other)))
            }
        }
    }

    /// The named tokens that it has where the files do not say.
    pub fn named(self) -> &'static [(&'static str, &'static str)] {
        const END: &str = "<|endoftext|>";
        match self {
            Class::File => &[],
            Class::Llama(_) => {
                &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")]
            }
            Class::Gemma => &[
                ("unk_token", "<unk>"),
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Class::Qwen2 { .. } => &[("unk_token", END), ("eos_token", END), ("pad_token", END)],
            Class::Gpt2 { .. } => &[("unk_token", END), ("bos_token", END), ("eos_token", END)],
        }
    }

    /// Builds a `tokenizer.json` anew. Gives the tokens that it held to be taken whole, which are
    /// then no part of it.
    ///
    /// # Errors
    /// In words, if it is of another kind than the class.
    pub fn rebuild(self, json: &mut Value, unk_token: Option<&str>) -> Result<Vec<Value>, String> {
        let Some(mut parts) = self.parts() else { return Ok(Vec::new()) };
        let sentencepiece = matches!(self, Class::Llama(_) | Class::Gemma);
        // Distilled models whose files name the class of another vocabulary: transformers knows them
        // by the models' names, and takes their files as they are.
        if sentencepiece && json["pre_tokenizer"].to_string().contains(r#""ByteLevel""#) {
            return Ok(Vec::new());
        }
        let kind = json.pointer("/model/type").and_then(Value::as_str).unwrap_or("BPE");
        if kind != "BPE" {
            return Err(format!("its model is {kind}, and its class would read it as BPE"));
        }
        let part = |key: &str| json.pointer(&format!("/model/{key}")).cloned();
        let unknown = unk_token.filter(|_| self == Class::Gemma);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": sentencepiece, "byte_fallback": sentencepiece, "ignore_merges": false,
            "vocab": part("vocab"), "merges": part("merges"),
        });
        let added = json.get("added_tokens").and_then(Value::as_array).cloned();
        if let (Some(all), Some(parts)) = (json.as_object_mut(), parts.as_object_mut()) {
            all.append(parts);
            all.insert("model".to_owned(), model);
            all.insert("added_tokens".to_owned(), json!([]));
        }
        Ok(added.unwrap_or_default())
    }

    /// Normalizer, pre-tokenizer and decoder.
    fn parts(self) -> Option<Value> {
        let replace = |pattern: &str, content: &str| json!({ "type": "Replace", "pattern": { "String": pattern }, "content": content });
        let byte_level = |prefix: bool, use_regex: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true,
                "use_regex": use_regex,
            })
        };
        let mut decoders = vec![
            replace("\u{2581}", " "),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        Some(match self {
            Class::File => return None,
            Class::Llama(scheme) => {
                if scheme != "never" {
                    decoders
                        .push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
                }
                json!({
                    "normalizer": null,
                    "pre_tokenizer": { "type": "Metaspace", "replacement": "\u{2581}",
                        "prepend_scheme": scheme, "split": false },
                    "decoder": { "type": "Sequence", "decoders": decoders },
                })
            }
            Class::Gemma => json!({
                "normalizer": replace(" ", "\u{2581}"),
                "pre_tokenizer": { "type": "Split", "pattern": { "String": " " },
                    "behavior": "MergedWithPrevious", "invert": false },
                "decoder": { "type": "Sequence", "decoders": decoders },
            }),
            Class::Qwen2 { prefix } => json!({
                "normalizer": { "type": "NFC" },
                "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                    { "type": "Split", "pattern": { "Regex": QWEN2_CUT }, "behavior": "Isolated",
                      "invert": false },
                    byte_level(prefix, false),
                ] },
                "decoder": byte_level(true, true),
            }),
            Class::Gpt2 { prefix } => json!({
                "normalizer": null,
                "pre_tokenizer": byte_level(prefix, true),
                "decoder": byte_level(true, true),
            }),
        })
    }
}
