//! Text to tokens and back, with the model's own vocabulary.
//!
//! The work is done by Hugging Face's `tokenizers`; this module builds one from a
//! GGUF's metadata or from `tokenizer.json` and what stands beside it. It knows nothing of
//! weights. The library trusts a vocabulary's merges, so they are checked before it sees them.

use std::cell::Cell;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use serde::Deserialize;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
};

use super::architecture::Architecture;
use super::chat::{Chat, ChatTemplate};
use super::error::{Fault, ModelError, shown};
use super::gguf::Header;
use super::tokenizer_class::QWEN2_CUT;
use super::tokenizer_config::TokenizerConfig;
use super::tokenizer_parts;

/// A fault of the vocabulary, which leaves the weights usable.
#[derive(Clone, Debug)]
pub(super) struct TokenizerFault {
    problem: String,
    remedy: &'static str,
}

impl TokenizerFault {
    pub fn new(problem: impl Into<String>) -> TokenizerFault {
        let remedy = "give the prompt as numbers with `--tokens`";
        TokenizerFault { problem: problem.into(), remedy }
    }

    /// The template cannot lay this conversation.
    pub fn of_chat(problem: impl Into<String>) -> TokenizerFault {
        let remedy = "leave `chat` out and write the whole text, special tokens included, as \
                      `prompt`, or give the prompt as numbers with `--tokens`";
        TokenizerFault { problem: problem.into(), remedy }
    }

    /// The same fault, of this model.
    pub fn at(self, path: &Path) -> ModelError {
        ModelError::Tokenizer {
            path: path.to_owned(),
            problem: self.problem,
            remedy: self.remedy.to_owned(),
        }
    }
}

/// A tokenizer that is ready to use.
pub(super) struct Tokenizer {
    library: tokenizers::Tokenizer,
    /// Put before every text.
    begin: Option<u32>,
    /// Put behind every text.
    end: Option<u32>,
}

impl Tokenizer {
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerFault> {
        let tokens = self.encode_as(text, true)?;
        Ok(self.begin.into_iter().chain(tokens).chain(self.end).collect())
    }

    /// The tokens of a text that a template wrote, which holds its special tokens itself.
    pub fn encode_laid(&self, text: &str) -> Result<Vec<u32>, TokenizerFault> {
        self.encode_as(text, false)
    }

    fn encode_as(&self, text: &str, adds_special: bool) -> Result<Vec<u32>, TokenizerFault> {
        let encoding = guarded(|| self.library.encode_fast(text, adds_special))
            .map_err(|error| TokenizerFault::new(format!("the text is refused: {error}")))?;
        Ok(encoding.get_ids().to_vec())
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
    guarded_from("the tokenizer's library", call)
}

fn guarded_from<T>(
    library: &str,
    call: impl FnOnce() -> tokenizers::Result<T>,
) -> tokenizers::Result<T> {
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
    answer.unwrap_or_else(|_| Err(format!("{library} cannot work with it").into()))
}

/// The text that a template makes of a conversation.
pub(super) fn lay(template: &ChatTemplate, chat: &Chat<'_>) -> Result<String, TokenizerFault> {
    let library = "its chat template cannot be followed: the library of templates";
    let laid = guarded_from(library, || template.lay(chat).map_err(Into::into));
    laid.map_err(|error| TokenizerFault::of_chat(error.to_string()))
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
            Cut { compose: true, ..plain(vec![split(QWEN2_CUT)?]) }
        }
        "stablelm2" => plain(vec![split(QWEN2_CUT)?]),
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
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Keys of a GGUF file's vocabulary that are read.
const READ: [&str; 17] = [
    "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.cls_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.model",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.unknown_token_id",
];

/// Keys that change no ids of these vocabularies: other templates, where an answer ends, what
/// fills a gap in a text, and what llama.cpp reads of other kinds alone.
const WITHOUT_EFFECT: [&str; 18] = [
    "tokenizer.chat_templates",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.fim_mid_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.middle_token_id",
    "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.token_type_count",
    "tokenizer.huggingface.json",
    "tokenizer.rwkv.world",
];

/// Whether a key of a GGUF file's vocabulary is read, or known to change no ids.
pub(super) fn knows_key(key: &str) -> bool {
    // Further templates have names of their own, and none is asked for by name.
    let other_template = key.starts_with("tokenizer.chat_template.");
    other_template || READ.contains(&key) || WITHOUT_EFFECT.contains(&key)
}

/// Bytes of a token of SentencePiece; real ones have some tens.
const LONGEST_PIECE: usize = 512;

/// Builds the tokenizer that a GGUF's metadata describes; `file` is the whole file.
pub(super) fn from_gguf(header: &Header, file: &[u8]) -> Result<Tokenizer, TokenizerFault> {
    let read = |fault: Fault| TokenizerFault::new(fault.in_words());
    let missing = |key: &str| TokenizerFault::new(format!("the file has no `{key}`"));
    let text = |key: &str| header.text(file, key).map_err(read)?.ok_or_else(|| missing(key));
    let texts = |key: &str| header.texts(file, key).map_err(read)?.ok_or_else(|| missing(key));
    let mut own = header.keys().filter(|key| key.starts_with("tokenizer."));
    if let Some(key) = own.find(|key| !knows_key(key)) {
        return Err(TokenizerFault::new(format!(
            "what `{}` asks for is not known here",
            shown(key)
        )));
    }
    let kind = text("tokenizer.ggml.model")?;
    // Before what is long.
    let cut = match kind {
        "gpt2" => Some(cut(text("tokenizer.ggml.pre")?)?),
        "llama" => None,
        other => {
            return Err(TokenizerFault::new(format!(
                "its vocabulary is of the kind `{}`; read are byte-level BPE (`gpt2`) and \
                 SentencePiece's BPE (`llama`)",
                shown(other)
            )));
        }
    };
    let tokens = texts("tokenizer.ggml.tokens")?;
    let kinds = header.small_integers(file, "tokenizer.ggml.token_type").map_err(read)?;
    let matching = |what: &str, count: Option<usize>| match count {
        Some(count) if count != tokens.len() => {
            Err(TokenizerFault::new(format!("it has {} tokens, but {count} {what}", tokens.len())))
        }
        _ => Ok(()),
    };
    matching("token types", kinds.as_ref().map(Vec::len))?;
    if kinds.is_none()
        && let Some(token) = tokens.iter().find(|token| looks_whole(token))
    {
        return Err(TokenizerFault::new(format!(
            "the file has no `tokenizer.ggml.token_type`, which would say whether tokens such as \
             `{}` are taken whole; give the prompt as ids, or convert the model anew",
            shown(token)
        )));
    }
    let kinds = kinds.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
    let failed = |error: tokenizers::Error| TokenizerFault::new(error.to_string());
    let is_sentencepiece = cut.is_none();
    let begins_text = cut.as_ref().is_none_or(|cut| cut.begin);
    let mut library = match cut {
        Some(cut) => {
            let bpe = byte_pairs(&tokens, &texts("tokenizer.ggml.merges")?, cut.ignore_merges)?;
            byte_level(bpe, cut.compose, cut.steps).map_err(failed)?
        }
        None => {
            let scores = header.floats(file, "tokenizer.ggml.scores").map_err(read)?;
            let scores = scores.ok_or_else(|| missing("tokenizer.ggml.scores"))?;
            matching("scores", Some(scores.len()))?;
            let key = "tokenizer.ggml.add_space_prefix";
            let prefix = header.bool(key).map_err(read)?.unwrap_or(true);
            sentencepiece(pieces(&tokens, &scores, &kinds)?, prefix).map_err(failed)?
        }
    };
    let whole = tokens
        .iter()
        .zip(&kinds)
        .filter(|(_, kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind));
    let whole =
        whole.map(|(token, &kind)| AddedToken::from(*token, kind == CONTROL).normalized(false));
    library.add_tokens(whole).map_err(failed)?;
    let edge = |which: &Edge, adds: bool| edge_token(header, which, tokens.len(), adds);
    // Where the file does not say, llama.cpp begins a text of SentencePiece's with token 1.
    let usual = is_sentencepiece.then_some(1);
    let begin = Edge { name: "begin", key: "bos", usual };
    let end = Edge { name: "end", key: "eos", usual: is_sentencepiece.then_some(2) };
    let begin = edge(&begin, begins_text).map_err(read)?;
    let end = edge(&end, false).map_err(read)?;
    Ok(Tokenizer { library, begin, end })
}

/// Whether a token is written as those are that texts hold whole: `<|end|>`, `<s>`; not `<0x0A>`, which
/// stands for a byte.
fn looks_whole(token: &str) -> bool {
    let inner = token.strip_prefix('<').and_then(|rest| rest.strip_suffix('>'));
    inner.is_some_and(|inner| inner.chars().any(char::is_alphabetic) && !inner.starts_with("0x"))
}

/// Byte-level BPE.
fn byte_level(
    bpe: BPE,
    compose: bool,
    mut steps: Vec<PreTokenizerWrapper>,
) -> tokenizers::Result<tokenizers::Tokenizer> {
    let mut library = tokenizers::Tokenizer::new(bpe);
    if compose {
        library.with_normalizer(Some(NFC))?;
    }
    steps.push(ByteLevel::new(false, false, false).into());
    library.with_pre_tokenizer(Some(Sequence::new(steps)));
    library.with_decoder(Some(ByteLevelDecoder::new(false, false, false)));
    Ok(library)
}

/// SentencePiece's BPE, which writes spaces as a character of their own; `prefix` puts one before
/// each part of a text between tokens that are taken whole, as llama.cpp does.
fn sentencepiece(bpe: BPE, prefix: bool) -> tokenizers::Result<tokenizers::Tokenizer> {
    const SPACE: &str = "\u{2581}";
    let mut library = tokenizers::Tokenizer::new(bpe);
    let replace = Replace::new(ReplacePattern::String(" ".to_owned()), SPACE)?;
    let prepend = prefix.then(|| Prepend::new(SPACE.to_owned()).into());
    let steps: Vec<NormalizerWrapper> = prepend.into_iter().chain([replace.into()]).collect();
    library.with_normalizer(Some(NormalizerSequence::new(steps)))?;
    let space = Replace::new(ReplacePattern::String(SPACE.to_owned()), " ")?;
    let mut decoders: Vec<DecoderWrapper> =
        vec![space.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    library.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(library)
}

/// The model of a SentencePiece vocabulary: two pieces that stand beside each other become the one
/// of their text, the one of the highest score first.
fn pieces(tokens: &[&str], scores: &[f32], kinds: &[i64]) -> Result<BPE, TokenizerFault> {
    let vocabulary = vocabulary(tokens)?;
    if let Some(byte) = (0..=u8::MAX).find(|byte| !vocabulary.contains_key(&byte_piece(*byte))) {
        return Err(TokenizerFault::new(format!("it has no token `{}`", byte_piece(byte))));
    }
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    let mut by_score: HashMap<u32, &str> = HashMap::new();
    for ((&token, &score), _) in tokens.iter().zip(scores).zip(kinds).filter(|(_, k)| **k == NORMAL)
    {
        if token.len() > LONGEST_PIECE || score.is_nan() {
            return Err(TokenizerFault::new(format!(
                "the token `{}` has {} bytes and the score {score}",
                shown(token),
                token.len()
            )));
        }
        let cuts = token.char_indices().skip(1).map(|(place, _)| token.split_at(place));
        let known = |part: &str| vocabulary.get(part).and_then(|id| scores.get(*id as usize));
        let mut own: Vec<(&str, &str, [f32; 2])> = cuts
            .filter_map(|(left, right)| Some((left, right, [*known(left)?, *known(right)?])))
            .collect();
        if own.is_empty() {
            continue;
        }
        if let Some(other) = by_score.insert(score.to_bits(), token) {
            return Err(TokenizerFault::new(format!(
                "the tokens `{}` and `{}` have the same score {score}, so no order of merges \
                 follows",
                shown(other),
                shown(token)
            )));
        }
        own.sort_by(|(.., a), (.., b)| b.partial_cmp(a).unwrap_or(Ordering::Equal));
        merges.extend(own.into_iter().map(|(left, right, _)| (score, left, right)));
    }
    merges.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    let merges = merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned()));
    BPE::builder()
        .vocab_and_merges(vocabulary, merges.collect())
        .byte_fallback(true)
        .build()
        .map_err(|error| TokenizerFault::new(error.to_string()))
}

/// The token of a byte that no other token holds.
fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The tokens' numbers.
fn vocabulary(tokens: &[&str]) -> Result<Vocab, TokenizerFault> {
    let mut vocabulary = Vocab::default();
    for (id, token) in tokens.iter().enumerate() {
        let id = u32::try_from(id).map_err(|_| TokenizerFault::new("it has too many tokens"))?;
        if vocabulary.insert((*token).to_owned(), id).is_some() {
            return Err(TokenizerFault::new(format!("the token `{}` occurs twice", shown(token))));
        }
    }
    Ok(vocabulary)
}

/// The model of merges, checked: the library would index beyond its buffer.
fn byte_pairs(
    tokens: &[&str],
    merges: &[&str],
    ignore_merges: bool,
) -> Result<BPE, TokenizerFault> {
    let vocabulary = vocabulary(tokens)?;
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

/// What is put before or behind a text.
struct Edge {
    name: &'static str,
    key: &'static str,
    /// Its number where the file does not say.
    usual: Option<u64>,
}

/// The token of an edge, if texts have it.
fn edge_token(
    header: &Header,
    edge: &Edge,
    tokens: usize,
    adds: bool,
) -> Result<Option<u32>, Fault> {
    let Edge { name, key, usual } = edge;
    if !header.bool(&format!("tokenizer.ggml.add_{key}_token"))?.unwrap_or(adds) {
        return Ok(None);
    }
    let key = format!("tokenizer.ggml.{key}_token_id");
    let token = header.unsigned(&key)?.or(*usual);
    match token {
        Some(token) if token < tokens as u64 => Ok(Some(token as u32)),
        Some(token) => Err(Fault::malformed(
            format!("the {name}-of-sequence token is {token} of {tokens} tokens, from 0 on"),
            format!("correct `{key}`"),
        )),
        None => Err(Fault::malformed(
            format!("texts get a {name}-of-sequence token, and `{key}` is missing"),
            format!("add `{key}`"),
        )),
    }
}

/// The template of a GGUF file, with the tokens that it may name.
pub(super) fn template_of_gguf(
    header: &Header,
    file: &[u8],
) -> Result<ChatTemplate, TokenizerFault> {
    let failed = |fault: Fault| TokenizerFault::of_chat(fault.in_words());
    let key = "tokenizer.chat_template";
    let text = header.text(file, key).map_err(failed)?;
    let text = text.ok_or_else(|| {
        TokenizerFault::of_chat(format!("it has no chat template: the file has no `{key}`"))
    })?;
    let tokens = header.texts(file, "tokenizer.ggml.tokens").map_err(failed)?.unwrap_or_default();
    let mut specials = BTreeMap::new();
    for (name, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ("sep_token", "tokenizer.ggml.seperator_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
        ("cls_token", "tokenizer.ggml.cls_token_id"),
        ("mask_token", "tokenizer.ggml.mask_token_id"),
    ] {
        let id = header.unsigned(key).map_err(failed)?;
        let token = id.and_then(|id| tokens.get(usize::try_from(id).ok()?));
        specials.extend(token.map(|token| (name.to_owned(), (*token).to_owned())));
    }
    Ok(ChatTemplate { place: format!("`{key}`"), text: text.to_owned(), specials })
}

/// The merges of a `tokenizer.json`, which are checked before the library reads them.
#[derive(Deserialize)]
struct HfPairs {
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
pub(super) fn from_folder(
    folder: &Path,
    architecture: Architecture,
) -> Result<Tokenizer, TokenizerFault> {
    let json = super::read_small(&folder.join("tokenizer.json"))
        .map_err(|error| TokenizerFault::new(error.to_string()))?;
    let config = TokenizerConfig::of_folder(folder, architecture).map_err(TokenizerFault::new)?;
    from_json(&json, &config)
}

/// Builds a tokenizer from the text of a `tokenizer.json` and what stands beside it.
fn from_json(json: &[u8], config: &TokenizerConfig) -> Result<Tokenizer, TokenizerFault> {
    let failed = |error: String| TokenizerFault::new(format!("tokenizer.json: {error}"));
    let in_words = |error: tokenizers::Error| failed(error.to_string());
    // In full, and written anew for the library, which panics on JSON that is malformed
    // deep inside.
    let mut json: serde_json::Value =
        serde_json::from_slice(json).map_err(|error| failed(error.to_string()))?;
    let held = config.rebuild(&mut json).map_err(failed)?;
    check_model(&json).map_err(|error| failed(error.to_string()))?;
    tokenizer_parts::check(&json).map_err(failed)?;
    let mut library =
        guarded(|| tokenizers::Tokenizer::from_bytes(json.to_string())).map_err(in_words)?;
    // Some files carry the settings of a training run.
    library.with_truncation(None).map_err(in_words)?;
    library.with_padding(None);
    guarded(|| library.add_tokens(config.numbered.clone().unwrap_or(held))).map_err(in_words)?;
    let known: HashSet<String> =
        library.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    let missing = config.special.iter().filter(|token| !known.contains(&token.content)).cloned();
    guarded(|| library.add_tokens(missing)).map_err(in_words)?;
    Ok(Tokenizer { library, begin: None, end: None })
}

/// Checks what the library trusts in a model.
fn check_model(json: &serde_json::Value) -> Result<(), String> {
    let model = json.get("model").ok_or("it has no `model`")?;
    let kind = model.get("type").filter(|kind| !kind.is_null());
    match kind.map_or(Some("BPE"), serde_json::Value::as_str) {
        Some("BPE") => check_pairs(model),
        Some("Unigram") => check_unigram(model),
        Some("WordPiece") => check_word_piece(model),
        _ => Err("its model is neither BPE nor Unigram nor WordPiece".to_owned()),
    }
}

fn check_pairs(model: &serde_json::Value) -> Result<(), String> {
    let model = HfPairs::deserialize(model).map_err(|error| error.to_string())?;
    if model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
        return Err("it has a prefix for continued words".to_owned());
    }
    check_numbers(&model.vocab)?;
    for merge in &model.merges {
        let (left, right) = match merge {
            HfMerge::Pair(left, right) => (left.as_str(), right.as_str()),
            HfMerge::Joined(merge) => {
                merge.split_once(' ').ok_or_else(|| format!("`{}` is no merge", shown(merge)))?
            }
        };
        check_merge(left, right, |token| model.vocab.contains_key(token))
            .map_err(|fault| fault.problem)?;
    }
    Ok(())
}

fn check_unigram(model: &serde_json::Value) -> Result<(), String> {
    let vocab = model.get("vocab").ok_or("it has no `vocab`")?;
    let vocab = Vec::<(String, f64)>::deserialize(vocab).map_err(|error| error.to_string())?;
    let mut seen = HashSet::new();
    match vocab.iter().find(|(token, _)| token.is_empty() || !seen.insert(token.as_str())) {
        Some((token, _)) => Err(format!("the token `{}` occurs twice, or is empty", shown(token))),
        None if vocab.is_empty() => Err("its vocabulary is empty".to_owned()),
        None => Ok(()),
    }
}

fn check_word_piece(model: &serde_json::Value) -> Result<(), String> {
    let vocab = model.get("vocab").ok_or("it has no `vocab`")?;
    let vocab = HashMap::<String, u32>::deserialize(vocab).map_err(|error| error.to_string())?;
    let unknown = model.get("unk_token").and_then(serde_json::Value::as_str);
    match unknown {
        Some(token) if vocab.contains_key(token) => check_numbers(&vocab),
        _ => Err("its vocabulary has no token for what it does not know".to_owned()),
    }
}

fn check_numbers(vocabulary: &HashMap<String, u32>) -> Result<(), String> {
    let mut ids = HashSet::new();
    match vocabulary.iter().find(|(_, id)| !ids.insert(**id)) {
        Some((token, id)) => Err(format!("`{}` shares the number {id}", shown(token))),
        None => Ok(()),
    }
}
