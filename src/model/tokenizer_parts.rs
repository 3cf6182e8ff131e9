//! Which parts of a `tokenizer.json` are handed to the library: kinds that language models are
//! published with (BPE, Unigram, WordPiece), with fields that the library can work with.
//!
//! The library trusts these parts: an empty text to put first, a template that names a token
//! which is not there, or a table in a format of its own ends it in a panic or asks for all
//! memory. It knows JSON, not vocabularies.

use serde_json::Value;

use super::error::shown;

/// How deep sequences of parts may lie within each other.
const DEEPEST: usize = 4;
/// Characters that a part may cut off.
const MOST_CUT: u64 = 64;

/// Steps that each part may have; real ones have some ten. A pattern among them may take a
/// megabyte.
const MOST_STEPS: usize = 64;
/// How many times as long as it was the parts may make a text together. Real ones make it some
/// twenty times as long, ALBERT's 726 by the factors below; each step of a sequence multiplies, so
/// a short file could fill any memory.
const MOST_GROWTH: u64 = 1024;
/// The one pattern that is replaced beside texts, T5's: it matches no empty text.
const SPACES: &str = " {2,}";

/// The parts by their keys, and the kinds that each may have.
const PARTS: [(&str, &[&str]); 4] = [
    (
        "normalizer",
        &[
            "BertNormalizer",
            "Lowercase",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Nmt",
            "Precompiled",
            "Prepend",
            "Replace",
            "Strip",
            "StripAccents",
        ],
    ),
    (
        "pre_tokenizer",
        &[
            "BertPreTokenizer",
            "ByteLevel",
            "Digits",
            "Metaspace",
            "Punctuation",
            "Split",
            "Whitespace",
            "WhitespaceSplit",
        ],
    ),
    ("post_processor", &["BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"]),
    (
        "decoder",
        &["ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"],
    ),
];

/// Where each part's sequences have their members.
const MEMBERS: [&str; 4] = ["normalizers", "pretokenizers", "processors", "decoders"];

/// Checks all parts.
///
/// # Errors
/// In words, with the part.
pub(super) fn check(json: &Value) -> Result<(), String> {
    let mut whole = Whole { steps: 0, growth: 1 };
    for ((part, kinds), members) in PARTS.into_iter().zip(MEMBERS) {
        let Some(value) = json.get(part).filter(|value| !value.is_null()) else { continue };
        whole.steps = 0;
        check_part(value, kinds, members, DEEPEST, &mut whole)
            .map_err(|problem| format!("its `{part}` {problem}"))?;
        if whole.growth > MOST_GROWTH {
            return Err(format!(
                "its `{part}`, with the parts before it, may make a text more than {MOST_GROWTH} \
                 times as long"
            ));
        }
    }
    Ok(())
}

/// What the steps come to together.
struct Whole {
    /// How many this part has.
    steps: usize,
    /// How many times as long they make a text, those of the parts before included.
    growth: u64,
}

fn check_part(
    part: &Value,
    kinds: &[&str],
    members: &str,
    deeper: usize,
    whole: &mut Whole,
) -> Result<(), String> {
    let kind = part.get("type").and_then(Value::as_str).ok_or("has no `type`")?;
    if kind == "Sequence" {
        let list = part.get(members).and_then(Value::as_array);
        let list = list.ok_or_else(|| format!("is a sequence without `{members}`"))?;
        if deeper == 0 {
            return Err("nests its sequences too deeply".to_owned());
        }
        return list
            .iter()
            .try_for_each(|part| check_part(part, kinds, members, deeper - 1, whole));
    }
    if !kinds.contains(&kind) {
        let known = kinds.join(", ");
        return Err(format!("is of the kind `{}`; read are {known} and sequences", shown(kind)));
    }
    check_fields(part, kind, members)
        .map_err(|problem| format!("of the kind `{kind}` {problem}"))?;
    whole.growth = whole.growth.saturating_mul(growth_of(part, kind, members));
    whole.steps += 1;
    match whole.steps > MOST_STEPS {
        true => Err(format!("has more than {MOST_STEPS} steps")),
        false => Ok(()),
    }
}

/// How many times as long as it was a step may make a text, in bytes or in tokens.
fn growth_of(part: &Value, kind: &str, members: &str) -> u64 {
    let length = |path: &str| {
        let text = part.pointer(path).and_then(Value::as_str);
        text.map_or(0, |text| text.len() as u64)
    };
    match kind {
        // The factors of Unicode's FAQ on normalization, for UTF-8.
        "NFC" | "NFD" => 3,
        "NFKC" | "NFKD" => 11,
        // A letter of two bytes becomes one of three.
        "Lowercase" => 2,
        // Marks set apart, letters made small, and spaces around what is Chinese.
        "BertNormalizer" => 12,
        // What is longest stands for characters of three bytes in SentencePiece's own tables.
        "Precompiled" => longest_replacement(part).unwrap_or(0).div_ceil(3) as u64,
        // A letter of two bytes for each byte.
        "ByteLevel" if members == "pretokenizers" => 2,
        "Metaspace" if members == "pretokenizers" => length("/replacement"),
        "Replace" => length("/content").div_ceil(length("/pattern/String").max(1)),
        "TemplateProcessing" => {
            let texts = |key: &str| {
                let pieces = part.get(key).and_then(Value::as_array).into_iter().flatten();
                pieces.filter(|piece| piece.get("Sequence").is_some()).count() as u64
            };
            texts("single").max(texts("pair"))
        }
        _ => 1,
    }
    .max(1)
}

fn check_fields(part: &Value, kind: &str, members: &str) -> Result<(), String> {
    match kind {
        "Precompiled" => longest_replacement(part).map(|_| ()),
        "Replace" if part.pointer("/pattern/Regex").and_then(Value::as_str) == Some(SPACES) => {
            Ok(())
        }
        // A normalizer's, which cuts off spaces.
        "Strip" if members == "normalizers" => Ok(()),
        "Prepend" => some_text(part, "prepend"),
        "Replace" => match part.pointer("/pattern/String").and_then(Value::as_str) {
            Some(text) if !text.is_empty() => Ok(()),
            _ => Err("replaces something else than a text".to_owned()),
        },
        "Split" => match part.pointer("/pattern/String").and_then(Value::as_str) {
            Some("") => Err("splits at an empty text".to_owned()),
            _ => Ok(()),
        },
        "Metaspace" => one_character(part, "replacement"),
        "Strip" => one_character(part, "content").and_then(|()| {
            let cut = ["start", "stop"].map(|key| part.get(key).and_then(Value::as_u64));
            match cut.into_iter().all(|count| count.is_some_and(|count| count <= MOST_CUT)) {
                true => Ok(()),
                false => Err(format!("cuts off more than {MOST_CUT} characters")),
            }
        }),
        "TemplateProcessing" => check_template(part),
        _ => Ok(()),
    }
}

/// The longest text that SentencePiece's table of characters puts in the place of one. The table
/// is the length of a trie, the trie, and texts that end in zeros.
fn longest_replacement(part: &Value) -> Result<usize, String> {
    let table = part.get("precompiled_charsmap").and_then(Value::as_str);
    let table = table.and_then(from_base64).ok_or("has no table in base64")?;
    let (length, rest) = table.split_first_chunk::<4>().ok_or("has a table without a trie")?;
    let length = u32::from_le_bytes(*length) as usize;
    if length < 4 || !length.is_multiple_of(4) || length >= rest.len() {
        return Err("has a table whose trie does not lie in it".to_owned());
    }
    let texts = rest[length..].split(|&byte| byte == 0);
    Ok(texts.map(<[u8]>::len).max().unwrap_or(0))
}

fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').bytes().map(|byte| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    });
    let digits: Vec<u8> = digits.collect::<Option<_>>()?;
    let whole = |four: &[u8]| {
        let mut bits = [0; 4];
        bits[..four.len()].copy_from_slice(four);
        let [a, b, c, d] = bits.map(u32::from);
        let bytes = (a << 18 | b << 12 | c << 6 | d).to_be_bytes();
        bytes[1..four.len().max(1)].to_vec()
    };
    Some(digits.chunks(4).flat_map(whole).collect())
}

fn some_text(part: &Value, key: &str) -> Result<(), String> {
    match part.get(key).and_then(Value::as_str) {
        Some(text) if !text.is_empty() => Ok(()),
        _ => Err(format!("has no text as `{key}`")),
    }
}

fn one_character(part: &Value, key: &str) -> Result<(), String> {
    match part.get(key).and_then(Value::as_str).map(|text| text.chars().count()) {
        Some(1) => Ok(()),
        _ => Err(format!("has no single character as `{key}`")),
    }
}

/// A template for one text names that text and tokens that it defines; one for two texts is
/// never used, and is read all the same.
fn check_template(part: &Value) -> Result<(), String> {
    let tokens = part.get("special_tokens").and_then(Value::as_object);
    let tokens = tokens.ok_or("defines no `special_tokens`")?;
    for (name, token) in tokens {
        let length = |key: &str| token.get(key).and_then(Value::as_array).map(Vec::len);
        let whole = length("ids").is_some_and(|ids| ids > 0) && length("ids") == length("tokens");
        if !whole || token.get("id").and_then(Value::as_str) != Some(name) {
            return Err(format!("defines `{}` without its ids and tokens", shown(name)));
        }
    }
    for (key, texts) in [("single", &["A"][..]), ("pair", &["A", "B"][..])] {
        let pieces = part.get(key).and_then(Value::as_array);
        for piece in pieces.ok_or_else(|| format!("has no list as `{key}`"))? {
            let id = |path: &str| piece.pointer(path).and_then(Value::as_str);
            let known = match (id("/Sequence/id"), id("/SpecialToken/id")) {
                (Some(text), None) => texts.contains(&text),
                (None, Some(token)) => tokens.contains_key(token),
                _ => false,
            };
            if !known {
                return Err(format!("names in `{key}` what it does not define"));
            }
        }
    }
    Ok(())
}
