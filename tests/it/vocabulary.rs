//! The vocabulary of a GGUF file: it cuts text as its `pre` says, gives everything back, or
//! says why it cannot be used.

use candle_core::quantized::gguf_file::Value;
use runner::model::synthetic::Preset;

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
        (base().with("tokenizer.ggml.model", text("llama")), "of the kind `llama`"),
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
