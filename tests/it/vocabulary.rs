//! Vocabularies and chat templates: they give transformers' own ids, or say why they cannot be
//! used.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use jiff::civil::{DateTime, date};
use runner::model::synthetic::Preset;
use runner::model::{Chat, Model, ModelError};
use serde_json::{Value as Json, json};

use crate::data::own;
use crate::hugging_face::write_folder;
use crate::model::{Draft, draft, open, synthetic_file};

fn tokens(pre: &str, text: &str) -> Vec<u32> {
    let architecture = draft("llama").vocabulary(pre);
    open(&architecture.write()).unwrap().encode(text).unwrap()
}

#[test]
fn a_gguf_vocabulary_cuts_text_as_its_pre_tokenizer_says() {
    let (one, two, three) = (49, 50, 51);
    assert_eq!(tokens("qwen2", "123"), [one, two, three]);
    assert_eq!(tokens("smollm", "123"), [one, two, three]);
    assert_eq!(tokens("gpt-2", "123"), [257]);
    assert_eq!(tokens("smaug-bpe", "123123"), [257, 257]);
    // Llama 3 puts its begin token first unless the file says otherwise.
    assert_eq!(tokens("llama-bpe", "123"), [258, 257]);
    let quiet = draft("llama")
        .vocabulary("llama-bpe")
        .with("tokenizer.ggml.add_bos_token", Value::Bool(false));
    assert_eq!(open(&quiet.write()).unwrap().encode("123").unwrap(), [257]);
    let loud =
        draft("llama").vocabulary("gpt-2").with("tokenizer.ggml.add_bos_token", Value::Bool(true));
    assert_eq!(open(&loud.write()).unwrap().encode("hel").unwrap(), [258, 260]);
}

#[test]
fn special_tokens_are_whole_and_everything_comes_back() {
    let model = open(&draft("llama").vocabulary("qwen2").write()).unwrap();
    assert_eq!(model.encode("<|bos|>hel<user>").unwrap(), [258, 260, 261]);
    for text in ["hello <user> 123", "caf\u{e9} \u{1f600}\t\n\n x  y ", "<|bos|>"] {
        assert_eq!(model.decode(&model.encode(text).unwrap()).unwrap(), text);
    }
    assert!(model.encode("").unwrap().is_empty());
    let error = model.decode(&[5000]).unwrap_err().to_string();
    assert!(error.contains("no token 5000"), "{error}");
    // Every text of a synthetic model can be encoded.
    let synthetic = open(&synthetic_file(Preset::Qwen2Tiny)).unwrap();
    let tokens = synthetic.encode("The capital of France is<|im_end|>").unwrap();
    assert_eq!(tokens.len(), 6);
    assert_eq!(synthetic.decode(&tokens).unwrap(), "The capital of France is<|im_end|>");
}

#[test]
fn an_unusable_vocabulary_says_to_give_tokens_and_leaves_the_weights_usable() {
    let text = |text: &str| Value::String(text.to_owned());
    let texts = |texts: &[&str]| Value::Array(texts.iter().map(|t| text(t)).collect());
    let base = || draft("llama").vocabulary("qwen2");
    let cases: Vec<(Draft, &str)> = vec![
        (draft("llama"), "no `tokenizer.ggml.model`"),
        (base().with("tokenizer.ggml.model", text("bert")), "of the kind `bert`"),
        (base().with("tokenizer.ggml.model", text("t5")), "of the kind `t5`"),
        (base().with("tokenizer.ggml.model", text("rwkv")), "of the kind `rwkv`"),
        (base().with("tokenizer.ggml.model", text("llama")), "no `tokenizer.ggml.scores`"),
        (base().with("tokenizer.ggml.suffixes", text("x")), "`tokenizer.ggml.suffixes`"),
        (base().with("tokenizer.ggml.add_eos_token", Value::Bool(true)), "end-of-sequence"),
        (base().with("tokenizer.ggml.pre", text("tekken")), "`tekken` is unknown"),
        (base().without("tokenizer.ggml.pre"), "no `tokenizer.ggml.pre`"),
        (base().with("tokenizer.ggml.merges", texts(&["zz yy"])), "needs the token `zz`"),
        (base().with("tokenizer.ggml.merges", texts(&["1 3"])), "needs the token `13`"),
        (base().with("tokenizer.ggml.merges", texts(&["13"])), "is no merge"),
        (base().with("tokenizer.ggml.tokens", texts(&["a", "a"])), "token types"),
        (
            base()
                .with("tokenizer.ggml.tokens", texts(&["a", "a"]))
                .without("tokenizer.ggml.token_type"),
            "`a` occurs twice",
        ),
        (base().with("tokenizer.ggml.tokens", Value::U32(1)), "not an array of strings"),
        (
            base().without("tokenizer.ggml.token_type"),
            "whether tokens such as `<|bos|>` are taken whole",
        ),
    ];
    for (draft, expected) in cases {
        let model = open(&draft.write()).unwrap();
        let error = model.encode("x").unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("`--tokens`"), "{error}");
        model.tensor("token_embd.weight").unwrap().to_vec().unwrap();
    }
    let beyond = base().tensor("token_embd.weight", &[100, 8]).write();
    let error = open(&beyond).unwrap().encode("hel").unwrap_err().to_string();
    assert!(error.contains("token 260, but the embedding has 100 rows"), "{error}");
}

/// What `scripts/tokenizer_fixtures.py` recorded of transformers.
fn recorded() -> Json {
    let text = fs::read(own("tests/fixtures/tokenizers.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// When it was recorded, as its clock said.
fn then() -> DateTime {
    date(2026, 7, 4).at(9, 5, 0, 0)
}

fn chat<'a>(user: &'a str, system: Option<&'a str>) -> Chat<'a> {
    Chat { user, system, now: then() }
}

/// A model with room for every small vocabulary, whose files of the tokenizer are still to come.
fn folder_without_tokenizer() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let large = draft("llama").tensor("token_embd.weight", &[700, 8]);
    write_folder(&open(&large.write()).unwrap(), folder.path(), |_| {});
    folder
}

fn write_case(folder: &Path, all: &Json, case: &Json) -> Model {
    let tokenizer = &all["tokenizers"][case["tokenizer"].as_u64().unwrap() as usize];
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("tokenizer_config.json"), case["config"].to_string()).unwrap();
    let template = folder.join("chat_template.jinja");
    match case["template"].as_str() {
        Some(text) => fs::write(template, text).unwrap(),
        None if template.exists() => fs::remove_file(template).unwrap(),
        None => {}
    }
    Model::open(folder).unwrap()
}

fn ids(value: &Json) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// What differs from the recorded answers, in words.
fn differences(name: &str, model: &Model, case: &Json) -> Vec<String> {
    let mut found = Vec::new();
    for text in case["texts"].as_array().unwrap() {
        let expected = ids(&text["ids"]);
        let got = model.encode(text["text"].as_str().unwrap());
        if !got.as_ref().is_ok_and(|got| *got == expected) {
            found.push(format!("{name} {}: {got:?}, not {expected:?}", text["text"]));
        }
    }
    for said in case["chats"].as_array().unwrap() {
        let got = model.encode_chat(&chat(said["user"].as_str().unwrap(), said["system"].as_str()));
        let same = match (&got, said["refused"].as_str()) {
            (Ok(got), None) => *got == ids(&said["ids"]),
            (Err(error), Some(reason)) => error.to_string().contains(reason),
            _ => false,
        };
        if !same {
            found.push(format!("{name} {said}: {got:?}"));
        }
    }
    found
}

#[test]
fn texts_and_chats_get_the_ids_that_transformers_gives_them() {
    let (all, folder) = (recorded(), folder_without_tokenizer());
    let cases = all["cases"].as_array().unwrap();
    let found: Vec<String> = cases
        .iter()
        .flat_map(|case| {
            let model = write_case(folder.path(), &all, case);
            differences(case["name"].as_str().unwrap(), &model, case)
        })
        .collect();
    assert!(cases.len() > 10 && found.is_empty(), "{}", found.join("\n"));
}

/// A GGUF file with the SentencePiece vocabulary of a recorded folder, each token with a score by its
/// number.
fn sentencepiece_gguf(tokenizer: &Json, score: fn(u64) -> f32) -> Draft {
    let entries = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<(u64, &str)> =
        entries.iter().map(|(token, id)| (id.as_u64().unwrap(), token.as_str())).collect();
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        tokens.push((added["id"].as_u64().unwrap(), added["content"].as_str().unwrap()));
    }
    tokens.sort_unstable();
    tokens.dedup();
    let texts = tokens.iter().map(|(_, token)| Value::String((*token).to_owned())).collect();
    let scores = tokens.iter().map(|(id, _)| Value::F32(score(*id))).collect();
    let kind = |token: &str| match token {
        "<unk>" => 2,
        byte if byte.starts_with("<0x") => 6,
        special if special.starts_with('<') && special.ends_with('>') && special.len() > 2 => 3,
        _ => 1,
    };
    let kinds = tokens.iter().map(|(_, token)| Value::I32(kind(token))).collect();
    draft("llama")
        .tensor("token_embd.weight", &[700, 8])
        .with("tokenizer.ggml.model", Value::String("llama".to_owned()))
        .with("tokenizer.ggml.tokens", Value::Array(texts))
        .with("tokenizer.ggml.scores", Value::Array(scores))
        .with("tokenizer.ggml.token_type", Value::Array(kinds))
}

#[test]
fn a_gguf_file_of_sentencepiece_gets_the_ids_of_the_folder_that_it_was_made_of() {
    let all = recorded();
    let cases = all["cases"].as_array().unwrap();
    let falling = |id: u64| -(id as f32);
    let mut found = Vec::new();
    for (name, prefix) in [("sentencepiece-each", None), ("sentencepiece-none", Some(false))] {
        let case = cases.iter().find(|case| case["name"] == name).unwrap();
        let tokenizer = &all["tokenizers"][case["tokenizer"].as_u64().unwrap() as usize];
        let mut file = sentencepiece_gguf(tokenizer, falling)
            .with("tokenizer.ggml.bos_token_id", Value::U32(1));
        if let Some(prefix) = prefix {
            file = file.with("tokenizer.ggml.add_space_prefix", Value::Bool(prefix));
        }
        let template = case["config"]["chat_template"].as_str().or(case["template"].as_str());
        let template = Value::String(template.unwrap().to_owned());
        let model = open(&file.with("tokenizer.chat_template", template).write()).unwrap();
        found.extend(differences(name, &model, case));
        let text = "The floor, caf\u{e9} \u{1f600}";
        let ids = model.encode(text).unwrap();
        assert_eq!(model.decode(&ids[1..]).unwrap(), text);
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    let of = |file: Draft| open(&file.write()).unwrap().encode("The floor");
    let file = |score| sentencepiece_gguf(&all["tokenizers"][1], score);
    let plain = of(file(falling)).unwrap();
    let ends = file(falling).with("tokenizer.ggml.add_eos_token", Value::Bool(true));
    let ends = of(ends).unwrap();
    assert_eq!((plain[0], &ends[..plain.len()], ends.last()), (1, &plain[..], Some(&2)));
    let error = of(file(|_| -1000.0)).unwrap_err().to_string();
    assert!(error.contains("have the same score -1000"), "{error}");
}

#[test]
fn what_tokenizer_config_asks_for_and_is_not_done_is_refused_with_its_value() {
    let (all, folder) = (recorded(), folder_without_tokenizer());
    let cases: [(Json, &str); 8] = [
        (json!({ "split_special_tokens": true }), "`split_special_tokens` is true"),
        (json!({ "fix_mistral_regex": true }), "`fix_mistral_regex` is true"),
        (json!({ "auto_map": { "AutoTokenizer": ["a.B", null] } }), "code of its own"),
        (json!({ "init_inputs": [1] }), "`init_inputs` is [1]"),
        (json!({ "colour": "red" }), "`colour` is \"red\""),
        (json!({ "tokenizer_class": "T5TokenizerFast" }), "`T5Tokenizer`"),
        (json!({ "extra_special_tokens": 3 }), "`extra_special_tokens` is 3"),
        (json!({ "added_tokens_decoder": { "x": { "content": "y" } } }), "by their numbers"),
    ];
    let model = write_case(folder.path(), &all, &all["cases"][0]);
    for (config, expected) in cases {
        let path = folder.path().join("tokenizer_config.json");
        fs::write(&path, config.to_string()).unwrap();
        let error = Model::open(folder.path()).unwrap().encode("x").unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("`--tokens`"), "{error}");
    }
    drop(model);
    // Settings of padding, of truncation and of other programs change nothing.
    let idle = json!({ "model_max_length": 1, "padding_side": "left", "truncation_side": "left",
        "clean_up_tokenization_spaces": true, "add_bos_token": true, "unk_token": null });
    fs::write(folder.path().join("tokenizer_config.json"), idle.to_string()).unwrap();
    let plain = Model::open(folder.path()).unwrap().encode("The floor of a sum").unwrap();
    assert_eq!(plain, ids(&all["cases"][0]["texts"][0]["ids"])[..plain.len()]);
}

#[test]
#[ignore = "needs SmolLM2-135M-Instruct: set RUNNER_SMOLLM2, see scripts/fetch-smollm2.sh"]
fn smollm2_s_own_template_gives_the_ids_that_transformers_gives() {
    let path = PathBuf::from(std::env::var_os("RUNNER_SMOLLM2").expect("RUNNER_SMOLLM2"));
    let model = Model::open(&path).unwrap();
    let mut found = differences("smollm2", &model, &recorded()["smollm2"]);
    // transformers reads a GGUF file without the cut that it names (`smollm`), which sets each
    // digit apart, that in a circle too; llama.cpp and the model's own tokenizer.json make it.
    found.retain(|words| !words.contains('\u{2460}'));
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_gguf_file_s_template_is_laid_without_a_second_begin_token() {
    let template =
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}{{ m.content }}<user>{% endfor %}";
    let model = |template: &str| {
        let vocabulary = draft("llama").vocabulary("llama-bpe");
        let template = Value::String(template.to_owned());
        open(&vocabulary.with("tokenizer.chat_template", template).write()).unwrap()
    };
    let (s, u) = (u32::from(b's'), u32::from(b'u'));
    let letter = |byte: u32| tokens("gpt-2", &char::from(byte as u8).to_string())[0];
    let laid = model(template).encode_chat(&chat("hel", None)).unwrap();
    assert_eq!(laid, [258, letter(u), 260, 261]);
    let laid = model(template).encode_chat(&chat("hel", Some("12"))).unwrap();
    assert_eq!(laid, [258, letter(s), 256, 261, letter(u), 260, 261]);
    let error = model("\n{{ raise_exception('not today') }}").encode_chat(&chat("x", None));
    let error = error.unwrap_err().to_string();
    for part in ["`tokenizer.chat_template`, line 2", "not today", "`chat`", "`--tokens`"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_missing_or_broken_template_is_named_with_what_to_do() {
    let said = |answer: Result<Vec<u32>, ModelError>| answer.unwrap_err().to_string();
    let without = open(&draft("llama").vocabulary("qwen2").write()).unwrap();
    let error = said(without.encode_chat(&chat("x", None)));
    assert!(error.contains("no `tokenizer.chat_template`") && error.contains("`chat`"), "{error}");
    let (all, folder) = (recorded(), folder_without_tokenizer());
    let model = write_case(folder.path(), &all, &all["cases"][0]);
    let cases: [(Json, &str); 10] = [
        (json!({}), "neither chat_template.jinja nor `chat_template`"),
        (json!({ "chat_template": null }), "neither chat_template.jinja nor `chat_template`"),
        (json!({ "chat_template": 3 }), "is 3, no template"),
        (json!({ "chat_template": [{ "name": "rag" }] }), "has no `name` and `template`"),
        (json!({ "chat_template": [] }), "is an empty list, so there is no chat template"),
        (
            json!({ "chat_template": [{ "name": "rag", "template": "" }, { "name": "a", "template": "" }] }),
            "none has that name; it names `a`, `rag`",
        ),
        (
            json!({ "chat_template": "" }),
            "`chat_template` of tokenizer_config.json) rendered nothing",
        ),
        (
            json!({ "chat_template": "{% if false %}x{% endif %}\n" }),
            "rendered nothing of this conversation",
        ),
        (json!({ "chat_template": "{% for %}" }), "cannot be followed"),
        (json!({ "bos_token": 7, "chat_template": "" }), "`bos_token` is 7"),
    ];
    for (config, expected) in cases {
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let error = said(model.encode_chat(&chat("x", None)));
        assert!(error.contains(expected) && error.contains("leave `chat` out"), "{error}");
    }
    fs::write(folder.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(said(model.encode_chat(&chat("x", None))).contains("tokenizer_config.json"));
}
