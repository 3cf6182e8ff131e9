//! GGUF files: whatever the bytes are, a model is refused or usable.
//!
//! An input that does not begin like a GGUF file is a list of changes, five bytes
//! each (position, value), to the header of a valid synthetic model: so the fuzzer
//! reaches the checks behind the first ones without a corpus.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use runner::model::Model;
use runner::model::synthetic::{self, Preset};

static VALID: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = Vec::new();
    synthetic::write(Preset::Qwen3Tiny, 1, &mut bytes).expect("a Vec takes everything");
    bytes
});
/// The header ends before this byte.
const HEADER: usize = 80_000;

fuzz_target!(|input: &[u8]| {
    // Building a tokenizer takes a hundred times as long as opening the model.
    let encode = input.len().is_multiple_of(16);
    if input.starts_with(b"GGUF") {
        read(input, encode);
    } else {
        let mut file = VALID.clone();
        for change in input.chunks_exact(5) {
            let at = u32::from_le_bytes([change[0], change[1], change[2], change[3]]) as usize;
            file[at % HEADER] = change[4];
        }
        read(&file, encode);
    }
});

fn read(file: &[u8], encode: bool) {
    let Ok(model) = Model::from_bytes(Path::new("fuzz.gguf"), file) else { return };
    for name in model.names() {
        let weight = model.tensor(name).expect("a name that the model gave");
        let mut row = vec![0.0; weight.width()];
        weight.decode_rows(weight.rows() - 1..weight.rows(), &mut row).expect("a row it has");
    }
    if encode && let Ok(tokens) = model.encode("The 123 quick\n\n <|im_end|>") {
        model.decode(&tokens).expect("tokens that it gave");
    }
}
