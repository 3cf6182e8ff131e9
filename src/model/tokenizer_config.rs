//! `tokenizer_config.json` and the files beside it: what a Hugging Face folder says of its
//! tokenizer outside of `tokenizer.json`, read as transformers reads it.
//!
//! Every key is used, known to change no ids, or refused with its value. It knows no vocabulary.
//!
//! Source: `AutoTokenizer`, `PreTrainedTokenizerBase` and `TokenizersBackend` of transformers 5.17.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::architecture::Architecture;
use super::chat::ChatTemplate;
use super::error::shown;
use super::tokenizer_class::Class;

/// The special tokens that have a name, which templates know them by.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Keys that change no ids of one text: of decoding, padding, truncation, of where files lie, of
/// processors, and of older tokenizers; transformers takes what `tokenizer.json` says.
const WITHOUT_EFFECT: &[&str] = &[
    "_commit_hash",
    "add_bos_token",
    "add_eos_token",
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "device_map",
    "do_basic_tokenize",
    "do_lower_case",
    "errors",
    "extra_ids",
    "files_loaded",
    "from_slow",
    "full_tokenizer_file",
    "is_local",
    "keep_accents",
    "local_files_only",
    "max_len",
    "max_length",
    "merges_file",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "never_split",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding",
    "padding_side",
    "processor_class",
    "remove_space",
    "response_schema",
    "response_template",
    "return_token_type_ids",
    "slow_tokenizer_class",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "special_tokens_map_file",
    "stride",
    "strip_accents",
    "tokenize_chinese_chars",
    "tokenizer_file",
    "tool_parser_type",
    "trim_offsets",
    "truncation",
    "truncation_side",
    "truncation_strategy",
    "unk_id",
    "use_default_system_prompt",
    "use_fast",
    "verbose",
    "vocab_file",
];

const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// What the files say.
pub(super) struct TokenizerConfig {
    /// What transformers makes of `tokenizer.json`.
    pub class: Class,
    /// Tokens that are taken whole, by their numbers, where they stand here and not there.
    pub numbered: Option<Vec<AddedToken>>,
    /// Further tokens that are taken whole.
    pub special: Vec<AddedToken>,
    /// `bos_token` and the like.
    named: BTreeMap<String, String>,
    /// The template, and where it stands.
    template: Option<(String, Value)>,
}

impl TokenizerConfig {
    /// Reads a folder of a model, in which none of the files need be there.
    ///
    /// # Errors
    /// In words, if a file cannot be read, is none of its kind, or asks for something else than
    /// what is done.
    pub fn of_folder(folder: &Path, architecture: Architecture) -> Result<TokenizerConfig, String> {
        let read = |name: &str| -> Result<Option<Vec<u8>>, String> {
            let path = folder.join(name);
            let bytes = path.exists().then(|| super::read_small(&path)).transpose();
            bytes.map_err(|error| error.to_string())
        };
        let object = |name: &str| -> Result<Map<String, Value>, String> {
            match read(name)?.map(|bytes| serde_json::from_slice(&bytes)).transpose() {
                Ok(None) => Ok(Map::new()),
                Ok(Some(Value::Object(map))) => Ok(map),
                Ok(Some(_)) => Err(format!("{name}: it is no object")),
                Err(error) => Err(format!("{name}: {error}")),
            }
        };
        let mut config = object(CONFIG)?;
        let of_model = object("config.json")?;
        let template = match read(TEMPLATE)? {
            Some(text) => {
                let text =
                    String::from_utf8(text).map_err(|_| format!("{TEMPLATE}: it is no UTF-8"))?;
                Some((TEMPLATE.to_owned(), Value::String(text)))
            }
            None => {
                let template = config.get("chat_template").filter(|value| !value.is_null());
                template.map(|template| (format!("`chat_template` of {CONFIG}"), template.clone()))
            }
        };
        // The older files, which transformers reads where the newer one lists no tokens.
        let mut numbered = match config.get("added_tokens_decoder") {
            Some(list) => Some(numbered(list)?),
            None => None,
        };
        if numbered.is_none() {
            config.extend(object("special_tokens_map.json")?);
            let added = object("added_tokens.json")?;
            if !added.is_empty() {
                numbered = Some(older(&added, &config)?);
            }
        }
        let class = Class::of(&config, &of_model, architecture)?;
        let mut whole = TokenizerConfig {
            class,
            numbered,
            special: Vec::new(),
            named: BTreeMap::new(),
            template,
        };
        whole.take_special(&config)?;
        refuse_unknown(&config)?;
        Ok(whole)
    }

    /// The named tokens, and those that have no name.
    fn take_special(&mut self, config: &Map<String, Value>) -> Result<(), String> {
        for (name, usual) in self.class.named() {
            if !config.contains_key(*name) {
                self.named.insert((*name).to_owned(), (*usual).to_owned());
                self.special.push(AddedToken::from(*usual, true));
            }
        }
        let mut named: Vec<(&String, &Value)> = config
            .iter()
            .filter(|(key, value)| {
                let own = key.ends_with("_token") && (value.is_string() || value.is_object());
                (own || NAMED.contains(&key.as_str())) && !value.is_null()
            })
            .collect();
        let rest = extra(config);
        if let Some(Value::Object(map)) = rest {
            named.extend(map.iter());
        }
        for (name, value) in named {
            let token = token(name, value)?;
            self.named.insert(name.clone(), token.content.clone());
            self.special.push(token);
        }
        match rest {
            None | Some(Value::Null | Value::Object(_)) => Ok(()),
            Some(Value::Array(list)) => {
                let tokens = list.iter().map(|value| token("extra_special_tokens", value));
                self.special.extend(tokens.collect::<Result<Vec<AddedToken>, String>>()?);
                Ok(())
            }
            Some(other) => Err(unfit("extra_special_tokens", other, "a list of tokens")),
        }
    }

    /// Builds a `tokenizer.json` anew where the class does. Gives the tokens that it held to be
    /// taken whole.
    ///
    /// # Errors
    /// In words, if it is of another kind than the class.
    pub fn rebuild(&self, json: &mut Value) -> Result<Vec<AddedToken>, String> {
        let unknown = self.named.get("unk_token").map(String::as_str);
        let held = self.class.rebuild(json, unknown)?;
        held.iter().map(|value| token("added_tokens", value)).collect()
    }

    /// The template that holds where none is asked for by name.
    ///
    /// # Errors
    /// In words, if there is none.
    pub fn chat_template(&self) -> Result<ChatTemplate, String> {
        let Some((place, value)) = &self.template else {
            return Err(format!(
                "it has no chat template: neither {TEMPLATE} nor `chat_template` in {CONFIG} is \
                 there"
            ));
        };
        let of = |place: String, text: &str| ChatTemplate {
            place,
            text: text.to_owned(),
            specials: self.named.clone(),
        };
        let list = match value {
            Value::String(text) => return Ok(of(place.clone(), text)),
            Value::Array(list) => list,
            other => return Err(format!("{place} is {}, no template", shown(&other.to_string()))),
        };
        let mut named = BTreeMap::new();
        for entry in list {
            let text = |key: &str| entry.get(key).and_then(Value::as_str);
            let (Some(name), Some(text)) = (text("name"), text("template")) else {
                return Err(format!("{place} lists what has no `name` and `template`"));
            };
            named.insert(name, text);
        }
        match named.get("default") {
            Some(text) => Ok(of(format!("`default` among {place}"), text)),
            None if named.is_empty() => {
                Err(format!("{place} is an empty list, so there is no chat template"))
            }
            None => {
                let names: Vec<String> =
                    named.into_keys().map(|name| format!("`{}`", shown(name))).collect();
                Err(format!(
                    "{place} is a list of named templates, of which the one named `default` is taken, \
                     and none has that name; it names {}",
                    names.join(", ")
                ))
            }
        }
    }
}

/// The tokens without a name of their own, under the newer key or the older one.
fn extra(config: &Map<String, Value>) -> Option<&Value> {
    config.get("extra_special_tokens").or_else(|| config.get("additional_special_tokens"))
}

/// A token as a text, or as an object with what stands beside it.
fn token(key: &str, value: &Value) -> Result<AddedToken, String> {
    let content = value.as_str().or_else(|| value.get("content")?.as_str());
    let content = content.ok_or_else(|| unfit(key, value, "a token"))?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = value.is_string() || flag("special").unwrap_or(true);
    let token = AddedToken::from(content, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false));
    let normalized = flag("normalized").unwrap_or(!special);
    Ok(token.normalized(normalized))
}

/// `added_tokens_decoder`: tokens by their numbers.
fn numbered(list: &Value) -> Result<Vec<AddedToken>, String> {
    let key = "added_tokens_decoder";
    let map = list.as_object().ok_or_else(|| unfit(key, list, "an object"))?;
    let mut tokens = BTreeMap::new();
    for (number, value) in map {
        let id: u32 = number.parse().map_err(|_| unfit(key, list, "tokens by their numbers"))?;
        if !value.is_object() {
            return Err(unfit(key, value, "an object of a token"));
        }
        tokens.insert(id, token(key, value)?);
    }
    Ok(tokens.into_values().collect())
}

/// `added_tokens.json`: numbers by their tokens.
fn older(map: &Map<String, Value>, config: &Map<String, Value>) -> Result<Vec<AddedToken>, String> {
    let named = NAMED.iter().filter_map(|name| config.get(*name));
    let extra = extra(config).and_then(Value::as_array).into_iter().flatten();
    let special: Vec<AddedToken> =
        named.chain(extra).filter_map(|value| token("", value).ok()).collect();
    let mut tokens = BTreeMap::new();
    for (content, number) in map {
        let number = number.as_u64();
        let number = number.ok_or_else(|| "added_tokens.json: a token has no number".to_owned())?;
        let is_special = special.iter().any(|token| token.content == *content);
        tokens.insert(number, AddedToken::from(content.as_str(), is_special));
    }
    Ok(tokens.into_values().collect())
}

fn unfit(key: &str, value: &Value, what: &str) -> String {
    format!("{CONFIG}: `{key}` is {}, not {what}", shown(&value.to_string()))
}

/// Refuses what may change ids and is not done.
fn refuse_unknown(config: &Map<String, Value>) -> Result<(), String> {
    let not_done = |key: &str, value: &Value, why: &str| {
        Err(format!("{CONFIG}: `{key}` is {}: {why}", shown(&value.to_string())))
    };
    for (key, value) in config {
        let is_off = value.is_null() || value == &Value::Bool(false);
        let known = match key.as_str() {
            "add_prefix_space"
            | "added_tokens_decoder"
            | "additional_special_tokens"
            | "extra_special_tokens"
            | "legacy"
            | "tokenizer_class" => true,
            "split_special_tokens" | "fix_mistral_regex" if is_off => true,
            "split_special_tokens" => {
                return not_done(key, value, "special tokens in a text are taken whole here");
            }
            "fix_mistral_regex" => {
                return not_done(key, value, "another cut than tokenizer.json's is not made");
            }
            "init_inputs" if is_off || value.as_array().is_some_and(Vec::is_empty) => true,
            "auto_map" => {
                let code = value.is_array() || value.get("AutoTokenizer").is_some();
                if code && !value.pointer("/AutoTokenizer").is_some_and(Value::is_null) {
                    return not_done(key, value, "a tokenizer with code of its own is not run");
                }
                true
            }
            name if NAMED.contains(&name) => true,
            name if name.ends_with("_token") && (value.is_string() || value.is_object()) => true,
            name => WITHOUT_EFFECT.contains(&name),
        };
        if !known && !value.is_null() {
            return not_done(key, value, "what it asks for is not known");
        }
    }
    Ok(())
}
