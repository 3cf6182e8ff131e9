//! Text to tokens and back, with the model's own vocabulary.
//!
//! The work is done by Hugging Face's `tokenizers`; this module builds one from a
//! GGUF's metadata or from `tokenizer.json`. It knows nothing of weights. The
//! library trusts a vocabulary's merges, so they are checked before it sees them.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use serde::Deserialize;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::error::{Fault, ModelError, shown};
use super::gguf::Header;
use super::tokenizer_parts;

/// A fault of the vocabulary, which leaves the weights usable.
#[derive(Clone, Debug)]
pub(super) struct TokenizerFault(String);

impl TokenizerFault {
    pub fn new(problem: impl Into<String>) -> TokenizerFault {
        TokenizerFault(problem.into())
    }

    /// The same fault, of this model.
    pub fn at(self, path: &Path) -> ModelError {
        ModelError::Tokenizer {
            path: path.to_owned(),
            problem: self.0,
            remedy: "give the prompt as numbers with `--tokens`".to_owned(),
        }
    }

    fn in_file(path: &Path, fault: Fault) -> TokenizerFault {
        TokenizerFault::new(fault.at(path).to_string())
    }
}

/// A tokenizer that is ready to use.
pub(super) struct Tokenizer {
    library: tokenizers::Tokenizer,
    /// Put before every text.
    begin: Option<u32>,
}

impl Tokenizer {
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerFault> {
        let encoding = guarded(|| self.library.encode_fast(text, true))
            .map_err(|error| TokenizerFault::new(format!("the text is refused: {error}")))?;
        Ok(self.begin.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerFault> {
        if let Some(token) = tokens.iter().find(|&&token| self.library.id_to_token(token).is_none())
        {
            return Err(TokenizerFault::new(format!("the vocabulary has no token {token}")));
        }
        guarded(|| self.library.decode(tokens, false))
            .map_err(|error| TokenizerFault::new(format!("the tokens are refused: {error}")))
    }
}

/// What the library answers. Should it panic on something that nobody foresaw, that is its
/// answer.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    thread_local!(static INSIDE: Cell<bool> = const { Cell::new(false) });
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !INSIDE.get() {
                usual(panic);
            }
        }));
    });
    INSIDE.set(true);
    let answer = catch_unwind(AssertUnwindSafe(call));
    INSIDE.set(false);
    answer.unwrap_or_else(|_| Err("the tokenizer's library cannot work with it".into()))
}

/// How a text is cut before the merges apply, and what else goes with that cut.
struct Cut {
    steps: Vec<PreTokenizerWrapper>,
    /// Compose characters first, as the original tokenizer does.
    compose: bool,
    /// Take a whole piece that is in the vocabulary, whatever the merges say.
    ignore_merges: bool,
    /// Whether a begin-of-sequence token is put first where the file does not say.
    begin: bool,
}

/// The cuts that llama.cpp knows by the names in `tokenizer.ggml.pre`
/// (`llm_tokenizer_bpe` in its `llama-vocab.cpp`), with the expressions of the
/// original tokenizers.
fn cut(pre: &str) -> Result<Cut, TokenizerFault> {
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const GPT2: &str =
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    let plain = |steps| Cut { steps, compose: false, ignore_merges: false, begin: false };
    Ok(match pre {
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "exaone4" => plain(vec![split(GPT2)?]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            plain(vec![Digits::new(true).into(), split(GPT2)?])
        }
        "qwen2" | "deepseek-r1-qwen" | "megrez" => {
            Cut { compose: true, ..plain(vec![split(QWEN2)?]) }
        }
        "stablelm2" => plain(vec![split(QWEN2)?]),
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" => {
            Cut { ignore_merges: true, begin: true, ..plain(vec![split(LLAMA3)?]) }
        }
        "dbrx" | "smaug-bpe" => plain(vec![split(LLAMA3)?]),
        "default" => plain(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+")?,
            split(GPT2)?,
            split(r"\p{N}+")?,
            split("[0-9][0-9][0-9]")?,
        ]),
        other => {
            return Err(TokenizerFault::new(format!(
                "its pre-tokenizer `{}` is unknown",
                shown(other)
            )));
        }
    })
}

fn split(expression: &str) -> Result<PreTokenizerWrapper, TokenizerFault> {
    let pattern = SplitPattern::Regex(expression.to_owned());
    Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map(PreTokenizerWrapper::from)
        .map_err(|error| TokenizerFault::new(format!("its pre-tokenizer: {error}")))
}

/// `llama_token_type` of llama.cpp.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Builds the tokenizer that a GGUF's metadata describes; `file` is the whole file.
pub(super) fn from_gguf(header: &Header, file: &[u8]) -> Result<Tokenizer, TokenizerFault> {
    let read = |fault: Fault| TokenizerFault::in_file(Path::new("metadata"), fault);
    let missing = |key: &str| TokenizerFault::new(format!("the file has no `{key}`"));
    let text = |key: &str| header.text(file, key).map_err(read)?.ok_or_else(|| missing(key));
    let texts = |key: &str| header.texts(file, key).map_err(read)?.ok_or_else(|| missing(key));
    match text("tokenizer.ggml.model")? {
        "gpt2" => {}
        other => {
            return Err(TokenizerFault::new(format!(
                "its vocabulary is of the kind `{}`; only byte-level BPE (`gpt2`) is read",
                shown(other)
            )));
        }
    }
    let cut = cut(text("tokenizer.ggml.pre")?)?;
    let tokens = texts("tokenizer.ggml.tokens")?;
    let kinds = header.small_integers(file, "tokenizer.ggml.token_type").map_err(read)?;
    if let Some(kinds) = &kinds
        && kinds.len() != tokens.len()
    {
        return Err(TokenizerFault::new(format!(
            "it has {} tokens, but {} token types",
            tokens.len(),
            kinds.len()
        )));
    }
    let bpe = byte_pairs(&tokens, &texts("tokenizer.ggml.merges")?, cut.ignore_merges)?;
    let begin = begin_token(header, tokens.len(), cut.begin).map_err(read)?;

    let failed = |error: tokenizers::Error| TokenizerFault::new(error.to_string());
    let mut library = tokenizers::Tokenizer::new(bpe);
    if cut.compose {
        library.with_normalizer(Some(NFC)).map_err(failed)?;
    }
    let mut steps = cut.steps;
    steps.push(ByteLevel::new(false, false, false).into());
    library.with_pre_tokenizer(Some(Sequence::new(steps)));
    library.with_decoder(Some(ByteLevelDecoder::new(false, false, false)));
    let kinds = kinds.iter().flatten();
    let whole =
        tokens.iter().zip(kinds).filter(|(_, kind)| [&CONTROL, &USER_DEFINED].contains(kind));
    let whole =
        whole.map(|(token, &kind)| AddedToken::from(*token, kind == CONTROL).normalized(false));
    library.add_tokens(whole).map_err(failed)?;
    Ok(Tokenizer { library, begin })
}

/// The model of merges, checked: the library would index beyond its buffer.
fn byte_pairs(
    tokens: &[&str],
    merges: &[&str],
    ignore_merges: bool,
) -> Result<BPE, TokenizerFault> {
    let mut vocabulary = Vocab::default();
    for (id, token) in tokens.iter().enumerate() {
        let id = u32::try_from(id).map_err(|_| TokenizerFault::new("it has too many tokens"))?;
        if vocabulary.insert((*token).to_owned(), id).is_some() {
            return Err(TokenizerFault::new(format!("the token `{}` occurs twice", shown(token))));
        }
    }
    let mut pairs = Merges::new();
    for merge in merges {
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| TokenizerFault::new(format!("`{}` is no merge", shown(merge))))?;
        check_merge(left, right, |token| vocabulary.contains_key(token))?;
        pairs.push((left.to_owned(), right.to_owned()));
    }
    BPE::builder()
        .vocab_and_merges(vocabulary, pairs)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|error| TokenizerFault::new(error.to_string()))
}

fn check_merge(
    left: &str,
    right: &str,
    known: impl Fn(&str) -> bool,
) -> Result<(), TokenizerFault> {
    let whole = format!("{left}{right}");
    match [left, right, &whole].into_iter().find(|token| !known(token)) {
        None => Ok(()),
        Some(token) => Err(TokenizerFault::new(format!(
            "the merge of `{}` and `{}` needs the token `{}`, which the vocabulary has not",
            shown(left),
            shown(right),
            shown(token)
        ))),
    }
}

fn begin_token(header: &Header, tokens: usize, default: bool) -> Result<Option<u32>, Fault> {
    if !header.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(default) {
        return Ok(None);
    }
    let token = header.unsigned("tokenizer.ggml.bos_token_id")?;
    match token.filter(|&token| token < tokens as u64) {
        Some(token) => Ok(Some(token as u32)),
        None => Err(Fault::malformed(
            format!("the begin-of-sequence token is {token:?} of {tokens} tokens"),
            "correct `tokenizer.ggml.bos_token_id`",
        )),
    }
}

/// The parts of `tokenizer.json` that are checked before the library reads it.
#[derive(Deserialize)]
struct HfTokenizer {
    model: HfModel,
}

#[derive(Deserialize)]
struct HfModel {
    r#type: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<HfMerge>,
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum HfMerge {
    Pair(String, String),
    Joined(String),
}

/// Builds the tokenizer of a Hugging Face folder.
pub(super) fn from_folder(folder: &Path) -> Result<Tokenizer, TokenizerFault> {
    let json = super::read_small(&folder.join("tokenizer.json"))
        .map_err(|error| TokenizerFault::new(error.to_string()))?;
    from_json(&json)
}

/// Builds a tokenizer from the text of a `tokenizer.json`.
pub(super) fn from_json(json: &[u8]) -> Result<Tokenizer, TokenizerFault> {
    let failed = |error: String| TokenizerFault::new(format!("tokenizer.json: {error}"));
    // In full, and written anew for the library, which panics on JSON that is malformed
    // deep inside.
    let json: serde_json::Value =
        serde_json::from_slice(json).map_err(|error| failed(error.to_string()))?;
    let HfTokenizer { model } =
        HfTokenizer::deserialize(&json).map_err(|error| failed(error.to_string()))?;
    if model.r#type.as_deref().is_some_and(|kind| kind != "BPE") {
        return Err(failed("its model is not BPE".to_owned()));
    }
    if model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
        return Err(failed("it has a prefix for continued words".to_owned()));
    }
    let mut ids = HashSet::new();
    if let Some((token, id)) = model.vocab.iter().find(|(_, id)| !ids.insert(**id)) {
        return Err(failed(format!("`{}` shares the number {id}", shown(token))));
    }
    for merge in &model.merges {
        let (left, right) = match merge {
            HfMerge::Pair(left, right) => (left.as_str(), right.as_str()),
            HfMerge::Joined(merge) => merge
                .split_once(' ')
                .ok_or_else(|| failed(format!("`{}` is no merge", shown(merge))))?,
        };
        check_merge(left, right, |token| model.vocab.contains_key(token))?;
    }
    tokenizer_parts::check(&json).map_err(failed)?;
    let mut library = guarded(|| tokenizers::Tokenizer::from_bytes(json.to_string()))
        .map_err(|error| failed(error.to_string()))?;
    // Some files carry the settings of a training run.
    library.with_truncation(None).map_err(|error| failed(error.to_string()))?;
    library.with_padding(None);
    Ok(Tokenizer { library, begin: None })
}
