//! `runner reference --models`: which models are computed, and what holds each of them to what.
//!
//! `docs/models.md` is its output; a test holds it to that, and the receipts to what it says.

use std::fmt::Write;

use super::print;
use crate::model::synthetic::Preset;
use crate::model::{Architecture, WeightType};

pub(super) fn models() -> Result<u8, String> {
    print(&text())
}

/// Models that need no weights.
fn synthetic(text: &mut String) {
    text.push_str(
        "## Synthetic models\n`synthetic:NAME` makes a model of seeded values, the same bytes on \
         every machine, to try a kind without weights: a GGUF file in the cache, or \
         a Hugging Face folder (mistral, phi3, gpt-oss, deepseek-v3 and qwen3-next). A few channels of \
         its residual stream carry values some 25 times larger than the rest, and tokens of a \
         mixture go to all experts. `synthetic:NAME@SCALE`, such as `synthetic:qwen3-moe-tiny@8`, \
         has SCALE times the hidden and feed-forward width, the heads, the vocabulary and the \
         blocks, these up to the number of a large model of the kind.\n\n| name | what it is |\n|---|---|\n",
    );
    for preset in Preset::ALL {
        let _ = writeln!(text, "| `{preset}` | {} |", preset.about());
    }
    text.push('\n');
}

fn text() -> String {
    let mut text = String::from("# Models\nMade by `runner reference --models`; do not edit.\n\n");
    text.push_str(
        "## Architectures\nThe name is `model_type` of `config.json`. Every architecture is \
         computed by the reference, emulated and device arms.\nThe reference is held to passes of \
         transformers 5.17 in f64, of saved models that nobody here made and of very small ones \
         (`cargo test --test it the_reference_is_transformers`): logits and hidden states within \
         2e-5 of the largest value. The device arm gave the emulated arm's bits at every site on \
         an H200; `cargo test --test it receipts` replays the receipts.\n\n\
         | architecture | what it has of its own | GGUF | receipts | engines known to the bit |\n\
         |---|---|---|---|---|\n",
    );
    for architecture in Architecture::ALL {
        let gguf = if architecture.is_of_gguf() { "yes" } else { "no" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| `{}` | {} | {gguf} | `{}` | {} |",
            architecture.name(),
            architecture.about(),
            architecture.receipts(),
            architecture.engines()
        );
    }
    text.push_str(
        "\nNot computed, and refused by name: windows in GGUF files but gemma's \
         and gpt-oss's, adapters, vision and audio parts. An embedding model is read where its blocks are of one of these kinds: \
         pooling changes no hidden state. GGUF files are read as llama.cpp computes them, \
         and the reference is held to its logits (`tests/adapters/gguf_architectures.py`): of \
         smollm3 every fourth block is left unturned, of gemma3 five of six blocks slide, of \
         gpt-oss every other one, and YaRN's bounds are whole pairs in it, of \
         stablelm residuals are parallel in a block that holds no `ffn_norm`, of phi3 no block slides and the context ends where one would or where LongRoPE's other factors hold (its \
         file is held to the folder of the same model), and \
         gemma's scores are scaled by the width of a head, whatever the original's config said. \
         Big-endian files are read where the `gguf` package says which bytes of a block are swapped: \
         F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q6_K, MXFP4 and NVFP4. A second scale beside NVFP4 \
         (`.scale`) multiplies the weight. A file of architecture `deepseek2` is read as a deepseek_v3, \
         in both layouts (`attn_kv_b`, or `attn_k_b` and `attn_v_b`), with softmax or sigmoids, with \
         groups of experts where its keys name them, and with the file's own epsilon in all norms; \
         groups beside a softmax, and YaRN without `rope.scaling.yarn_log_multiplier`, of which \
         llama.cpp's versions make different things, are refused. A `qwen3next` is read in both layouts \
         (`ssm_in`, or `attn_qkv` and `attn_gate`), with the rates that the converter made of their \
         logarithms, and is held to the folder of the same model; queries and keys are divided by the \
         root of their sum of squares and 1e-6, as transformers does, where llama.cpp takes the larger \
         of the root and the norms' epsilon.\n\n",
    );
    synthetic(&mut text);
    text.push_str("## Weights\n| form | where | held to |\n|---|---|---|\n");
    for kind in WeightType::ALL {
        let of = match kind {
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => {
                "GGUF, safetensors | every bit of its values"
            }
            _ => "GGUF | the `gguf` package, in every bit",
        };
        let _ = writeln!(text, "| {kind} | {of} |");
    }
    text.push_str(
        "| `quant_method: fp8` (blocks of any size, whole tensors) | safetensors | PyTorch's \
         codes, an H200 (`runs/receipts/quantised`, `runs/receipts/checkpoints`) |\n\
         | compressed-tensors, 8 bits: floats, integers with and without zero points; MXFP8 | \
         safetensors | the package, in f32 |\n\
         | compressed-tensors, integers of 1 to 8 bits in words, with zero points and activation \
         order; NVFP4; MXFP4 | safetensors | the package, in f32 |\n\
         | ModelOpt, FP8 and NVFP4, also by `hf_quant_config.json` | safetensors | the package, \
         in f32 |\n\
         | GPTQ, 2, 3, 4 and 8 bits, `gptq` and `gptq_v2`, activation order | safetensors | \
         GPTQModel's unpacking, in f32 |\n\
         | AWQ, 4 bits, `gemm` | safetensors | AutoAWQ's unpacking, in f32 |\n\
         | bitsandbytes, NF4 and FP4, scales of scales; 8 bits | safetensors | the package, in f32 \
         |\n\
         | MXFP4 (gpt-oss) | safetensors | transformers' decoding, in every bit of a pass |\n\
         | F64 | safetensors | its values, rounded to f32 |\n\n\
         A package in f32: the same bits of every weight (`cargo test --test it quantised`; \
         `scripts/quantised_folders.py` names the versions), also of weights that are fused (phi3, \
         glm4). Packages decode to BF16 or F16 by default, which rounds; the reference takes the \
         values before that. Codes and scales of activations and \
         scales of a KV cache change no weight: `gemm = \"checkpoint\"` and `kv_cache` take them, and \
         other recipes read past them.\n\n\
         A recipe with `gemm = \"checkpoint\"` multiplies FP8 weights and 8-bit integers without zero points \
         (a scale for each row or for the whole) by the codes and scales that \
         the file holds, in the emulated and the device arm, without converting them anew, and every \
         other weight in its own type (BF16, F16, F32). Activations have the scale that the file \
         holds for them (`input_scale`), one per token and 128 values beside blocks of 128 x 128, \
         and one per token elsewhere. NVFP4, MXFP4 and MXFP8 weights are \
         multiplied by their elements and scales as Blackwell does, by the emulated arm alone \
         ([chips.md](chips.md#block-scaled-formats)), where the config says that activations are \
         converted too (`input_activations`; ModelOpt's NVFP4 and MXFP8): these become blocks of \
         the same format, NVFP4's with the scale that the file holds for all of them \
         (`input_scale`, or 1 / `input_global_scale`), or their own. Other codes (integers with zero points, GGUF's \
         blocks), 4-bit weights beside plain activations, and blocks of \
         another size are refused by name. A folder whose config says static scales of activations \
         while a weight lacks its own, or dynamic ones while a weight has one, is not opened.\n\n\
         Refused by name: AWQ's `gemv`, GPTQ's `dynamic` and `marlin`, scales of AWQ on the inputs \
         (`pre_quant_scale`), several ways of quantising in one folder and sparse formats.\n\n\
         ## Texts\nA prompt as text gets the ids that transformers 5.17 gives it (`cargo test --test it \
         vocabulary`; `scripts/tokenizer_fixtures.py` records them), with `chat` those of its \
         `apply_chat_template`.\n\n\
         | vocabulary | where |\n|---|---|\n\
         | byte-level BPE | `tokenizer.json`; GGUF's `gpt2` |\n\
         | SentencePiece's BPE | `tokenizer.json`; GGUF's `llama` |\n\
         | Unigram, WordPiece | `tokenizer.json` |\n\n\
         Classes that transformers builds anew (`LlamaTokenizer`, `GemmaTokenizer`, \
         `Qwen2Tokenizer`, `GPT2Tokenizer`) are built as it builds them; any other takes \
         `tokenizer.json` as it is, or is refused by name. Refused are other kinds of GGUF's \
         vocabularies (`bert`, `t5`, `rwkv` and more), and files of SentencePiece alone \
         (`tokenizer.model`). A template may ask for the date, so the same message may have other \
         ids tomorrow: give the ids as `tokens` where they must stay; run.json lists them (`tokens` of a stage), and so does `run --dry-run --explain`. \
         A template's texts, numbers and loops are Python's; a default of a macro that names another argument, \
         a list or an object within a text, and more than 500 operators in one tag are refused.\n\n\
         ## Settings\nEvery key of `config.json`, of `tokenizer_config.json` and of GGUF metadata \
         is used, known to change nothing, or refused with its value; a test holds those of \
         `config.json` and of GGUF to transformers' and `gguf`'s own lists (`cargo test known_keys`). \
         Of a key that changes nothing, such as one of training, the value is not looked at. `generation_config.json` \
         says how tokens are drawn, and is not read: what is decoded here is the likeliest token. \
         Metadata that describes a GGUF file (`general.`), and what llama.cpp does not know, \
         changes nothing.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The folder that the table names holds a receipt of that architecture.
    #[test]
    fn every_architecture_has_receipts_where_the_table_says() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        for architecture in Architecture::ALL {
            let folder = root.join(architecture.receipts());
            let name = architecture.name().replace("_text", "").replace('_', "-");
            let files = std::fs::read_dir(&folder).expect("a folder of receipts");
            let found = files.flatten().any(|file| {
                let file = file.file_name().to_string_lossy().into_owned();
                file.starts_with(&format!("h200-{name}"))
            });
            assert!(found, "{}: no receipt of {name}", folder.display());
        }
    }
}
