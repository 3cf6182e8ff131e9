//! A byte-level BPE vocabulary for synthetic models: every text can be encoded, and
//! common English words become one token.
//!
//! It knows how GGUF and `tokenizer.json` keep a vocabulary, not which model wants it.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::model::gguf_writer::HeaderWriter;

/// Words that become one token each, with the space before them; `The` without it too,
/// because prompts like to begin with it.
const WORDS: &str = "the of and to in is that it was for on are as with his they at be this from \
have or by one had not but what all were when we there can an your which their said if do will \
each about how up out them then she many some so these would other into has more her two like him \
see time could no make than first been its who now people my made over did down only way find use \
may water long little very after words called just where most know capital France city country \
largest model number";

/// Marks at the end of the vocabulary.
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// How many these are.
pub(super) const MARKS: usize = CONTROL.len();

/// `llama_token_type`.
const NORMAL: i32 = 1;
const CONTROL_TYPE: i32 = 3;
const UNUSED: i32 = 5;

/// Writes a vocabulary of `size` tokens with the pre-tokenizer `cut`.
pub(super) fn write(header: &mut HeaderWriter, size: usize, cut: &str) {
    let (mut tokens, merges) = words();
    let mut kinds = vec![NORMAL; tokens.len()];
    for id in tokens.len()..size - CONTROL.len() {
        tokens.push(format!("[unused{id}]"));
        kinds.push(UNUSED);
    }
    let end = tokens.len() as u32;
    tokens.extend(CONTROL.map(str::to_owned));
    kinds.extend([CONTROL_TYPE; CONTROL.len()]);
    header.text("tokenizer.ggml.model", "gpt2");
    header.text("tokenizer.ggml.pre", cut);
    header.texts("tokenizer.ggml.tokens", &tokens);
    header.integers("tokenizer.ggml.token_type", &kinds);
    header.texts("tokenizer.ggml.merges", &merges);
    header.unsigned("tokenizer.ggml.eos_token_id", end);
    header.unsigned("tokenizer.ggml.padding_token_id", end);
    header.bool("tokenizer.ggml.add_bos_token", false);
}

/// A vocabulary of `size` tokens as `tokenizer.json`.
pub(super) fn tokenizer_json(size: usize) -> Value {
    let (mut tokens, merges) = words();
    tokens.extend((tokens.len()..size - CONTROL.len()).map(|id| format!("[unused{id}]")));
    let first = tokens.len();
    tokens.extend(CONTROL.map(str::to_owned));
    let added = |(place, content): (usize, &str)| {
        json!({
            "id": first + place,
            "content": content,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": true,
        })
    };
    let ids = tokens.into_iter().zip(0_u32..).map(|(token, id)| (token, json!(id)));
    let bytes = json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": true,
    });
    json!({
        "version": "1.0",
        "added_tokens": CONTROL.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "pre_tokenizer": bytes,
        "decoder": bytes,
        "model": { "type": "BPE", "vocab": ids.collect::<Map<_, _>>(), "merges": merges },
    })
}

/// The 256 bytes, then what the words' merges make; and the merges.
fn words() -> (Vec<String>, Vec<String>) {
    let mut tokens: Vec<String> = (0..=255).map(|byte| letter(byte).to_string()).collect();
    let mut known: HashSet<String> = tokens.iter().cloned().collect();
    let mut merges = Vec::new();
    let spaced = WORDS.split_whitespace().map(|word| format!(" {word}"));
    for word in spaced.chain(["The".to_owned()]) {
        let mut letters = word.into_bytes().into_iter().map(letter);
        let mut joined = letters.next().map(String::from).unwrap_or_default();
        for letter in letters {
            let merge = format!("{joined} {letter}");
            joined.push(letter);
            if known.insert(joined.clone()) {
                merges.push(merge);
                tokens.push(joined.clone());
            }
        }
    }
    (tokens, merges)
}

/// GPT-2's printable letter of a byte: itself where it is printable, else the next
/// free letter from U+0100 on.
fn letter(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !printable(other)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}
