//! Models: files become checked hyperparameters, tensors and tokens, or a clear error.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Cursor;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Barrier;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;
use runner::model::synthetic::{self, Preset};
use runner::model::{Architecture, Model, ModelError, RopeLayout, Weight, WeightType};
use safetensors::SafeTensors;

pub const TINY: [Preset; 3] = [Preset::Qwen2Tiny, Preset::LlamaTiny, Preset::Qwen3Tiny];

/// A synthetic model's file, in memory.
pub fn synthetic_file(preset: Preset) -> Vec<u8> {
    let mut bytes = Vec::new();
    synthetic::write(preset, 1, &mut bytes).expect("a Vec takes everything");
    bytes
}

pub fn open(bytes: &[u8]) -> Result<Model, ModelError> {
    Model::from_bytes(Path::new("test.gguf"), bytes)
}

fn refusal(bytes: &[u8]) -> String {
    open(bytes).expect_err("the model must be refused").to_string()
}

#[test]
fn every_block_type_decodes_as_the_official_gguf_package_does() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blocks.safetensors");
    let file = fs::read(path).unwrap();
    let fixture = SafeTensors::deserialize(&file).unwrap();
    for kind in WeightType::ALL {
        let blocks = fixture.tensor(&format!("{kind}.bytes")).unwrap();
        let expected = fixture.tensor(&format!("{kind}.values")).unwrap();
        let [rows, width] = *expected.shape() else { panic!("{kind}: not a matrix") };
        let expected: Vec<u32> =
            expected.data().as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        // At every alignment, as a safetensors file may have it.
        for shift in 0..4 {
            let mut moved = vec![0; shift];
            moved.extend(blocks.data());
            let weight = Weight::new("w", kind, rows, width, &moved[shift..]).unwrap();
            let values: Vec<u32> = weight.to_vec().unwrap().iter().map(|v| v.to_bits()).collect();
            assert!(values == expected, "{kind} decodes to other bits");
            let mut row = vec![0.0; width];
            weight.decode_rows(1..2, &mut row).unwrap();
            let row: Vec<u32> = row.iter().map(|v| v.to_bits()).collect();
            assert!(row == expected[width..2 * width], "row 1 of {kind} decodes to other bits");
        }
    }
}

/// A file of `scripts/big_endian_fixture.py`.
fn of_byte_order(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/big-endian");
    fs::read(folder.join(name)).unwrap()
}

#[test]
fn a_big_endian_file_has_the_values_of_the_little_endian_one() {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let little = open(&of_byte_order("little.gguf")).unwrap();
    let mut file = of_byte_order("big.gguf");
    for version in [3_u32, 2] {
        file[4..8].copy_from_slice(&version.to_be_bytes());
        let big = open(&file).unwrap();
        assert_eq!(big.config(), little.config());
        let names: Vec<&str> = little.names().collect();
        assert_eq!(big.names().collect::<Vec<_>>(), names);
        let mut kinds = BTreeSet::new();
        for name in names {
            let [one, other] = [&little, &big].map(|model| model.tensor(name).unwrap());
            assert_eq!((one.kind(), one.rows(), one.width()), {
                (other.kind(), other.rows(), other.width())
            });
            assert!(bits(one.to_vec().unwrap()) == bits(other.to_vec().unwrap()), "{name}");
            let mut rows = [vec![0.0; one.width()], vec![0.0; one.width()]];
            let last = one.rows() - 1..one.rows();
            one.decode_rows(last.clone(), &mut rows[0]).unwrap();
            other.decode_rows(last, &mut rows[1]).unwrap();
            assert!(rows[0] == rows[1], "the last row of {name}");
            assert!(one.digest() != other.digest(), "{name}: other bytes, or read in another way");
            kinds.insert(one.kind());
        }
        let all = "F32 F16 BF16 Q4_0 Q8_0 Q4_K Q6_K MXFP4 NVFP4";
        let told: Vec<String> = kinds.iter().map(WeightType::to_string).collect();
        assert_eq!(told.join(" "), all);
        let tokens = big.encode("hello").unwrap();
        assert_eq!(tokens, little.encode("hello").unwrap());
        assert_eq!(tokens, [6, 3]);
    }
}

#[test]
fn blocks_whose_other_byte_order_is_defined_nowhere_are_refused_by_name() {
    let mut file = of_byte_order("big.gguf");
    let kind = find(&file, b"blk.0.attn_q.weight") + 19 + 4 + 2 * 8;
    for (number, name) in [(6_u32, "Q5_0"), (13, "Q5_K"), (20, "IQ4_NL")] {
        file[kind..kind + 4].copy_from_slice(&number.to_be_bytes());
        let error = refusal(&file);
        assert!(error.contains(&format!("it is {name} in a big-endian file")), "{error}");
        assert!(error.contains("`blk.0.attn_q.weight`"), "{error}");
    }
}

#[test]
fn a_second_scale_beside_nvfp4_multiplies_the_weight_or_is_refused() {
    let file = of_byte_order("little.gguf");
    let model = open(&file).unwrap();
    let name = "blk.0.ffn_gate.weight";
    let weight = model.tensor(name).unwrap();
    let alone = Weight::new(name, WeightType::Nvfp4, weight.rows(), weight.width(), weight.bytes());
    let alone = alone.unwrap();
    let expected: Vec<f32> = alone.to_vec().unwrap().iter().map(|value| value * 0.37).collect();
    assert_eq!(weight.to_vec().unwrap(), expected);
    assert!(weight.digest() != alone.digest() && !weight.is_plain());
    assert!(!model.has("blk.0.ffn_gate.scale") && !model.has("blk.0.ffn_gate.input_scale"));
    // Beside a weight of another type nothing has a use for it.
    let mut other = file.clone();
    let at = find(&other, b"blk.0.ffn_gate.scale");
    other[at..at + 20].copy_from_slice(b"blk.0.ffn_down.scale");
    let error = refusal(&other);
    assert!(error.contains("`blk.0.ffn_down.scale`") && error.contains("no use for it"), "{error}");
    for bad in [f32::NAN, 0.0, -1.0, f32::INFINITY] {
        let mut other = file.clone();
        let at = find(&other, &0.37_f32.to_le_bytes());
        other[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        let error = refusal(&other);
        assert!(
            error.contains("`blk.0.ffn_gate.scale`") && error.contains("a scale of"),
            "{error}"
        );
    }
}

#[test]
fn a_weight_refuses_rows_that_it_has_not_and_buffers_that_do_not_fit() {
    let bytes = [0; 3 * 18];
    let weight = Weight::new("w", WeightType::Q4_0, 3, 32, &bytes).unwrap();
    assert!(weight.decode_rows(2..4, &mut [0.0; 64]).is_err());
    assert!(weight.decode_rows(0..1, &mut [0.0; 33]).is_err());
    assert!(Weight::new("w", WeightType::Q4_0, 3, 33, &bytes).is_err());
    assert!(Weight::new("w", WeightType::Q4_0, usize::MAX, 32, &bytes).is_err());
    assert!(Weight::new("w", WeightType::Q4_0, 0, 32, &[]).is_err());
}

#[test]
fn a_digest_covers_type_shape_and_bytes_and_nothing_else() {
    let bytes = [7; 64];
    let digest =
        |name, kind, rows, width| Weight::new(name, kind, rows, width, &bytes).unwrap().digest();
    let base = digest("a", WeightType::F16, 4, 8);
    assert_eq!(base, digest("b", WeightType::F16, 4, 8));
    assert_ne!(base, digest("a", WeightType::BF16, 4, 8));
    assert_ne!(base, digest("a", WeightType::F16, 8, 4));
}

#[test]
fn tiny_presets_have_the_hyperparameters_that_they_promise() {
    let model = |preset| open(&synthetic_file(preset)).unwrap();
    let qwen2 = model(Preset::Qwen2Tiny);
    let config = qwen2.config();
    assert_eq!(config.architecture, Architecture::Qwen2);
    assert_eq!((config.layers, config.hidden, config.ffn, config.vocabulary), (4, 256, 768, 2048));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (4, 2, 64));
    assert_eq!((config.rms_norm_eps, config.rope.theta), (1e-6, 1e6));
    assert_eq!(config.rope.layout, RopeLayout::Halves);
    assert!(!config.tied_embeddings && qwen2.has("output.weight"));
    assert!(qwen2.has("blk.3.attn_k.bias") && !qwen2.has("blk.4.attn_k.bias"));

    let llama = model(Preset::LlamaTiny);
    let config = llama.config();
    assert_eq!(config.rope.layout, RopeLayout::Interleaved);
    assert!(config.tied_embeddings && !llama.has("output.weight"));
    let factors = config.rope.factors.as_ref().unwrap();
    assert_eq!((factors.len(), factors[0], factors[15]), (16, 1.0, 32.0));

    let qwen3 = model(Preset::Qwen3Tiny);
    let config = qwen3.config();
    assert_ne!(config.heads * config.head_dim, config.hidden);
    assert_eq!(qwen3.tensor("blk.0.attn_q_norm.weight").unwrap().width(), config.head_dim);
}

#[test]
fn synthetic_bytes_are_the_same_everywhere() {
    let digests: Vec<String> = TINY
        .iter()
        .map(|&preset| blake3::hash(&synthetic_file(preset)).to_hex()[..16].to_owned())
        .collect();
    insta::assert_snapshot!(digests.join(" "), @"26b2d408a3612b06 fbdc9202a3165fd1 c63172965ba1efba");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let alone = pool.install(|| synthetic_file(Preset::Qwen2Tiny));
    assert!(alone == synthetic_file(Preset::Qwen2Tiny), "threads change the bytes");
}

#[test]
fn another_seed_gives_another_model() {
    let mut other = Vec::new();
    synthetic::write(Preset::Qwen2Tiny, 2, &mut other).unwrap();
    let (one, other) = (open(&synthetic_file(Preset::Qwen2Tiny)).unwrap(), open(&other).unwrap());
    for name in one.names() {
        assert_ne!(
            one.tensor(name).unwrap().digest(),
            other.tensor(name).unwrap().digest(),
            "{name}"
        );
    }
}

#[test]
fn a_cached_synthetic_model_is_reused_and_a_broken_one_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = synthetic::ensure(Preset::Qwen2Tiny, 1, folder.path()).unwrap();
    let made = fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(path, synthetic::ensure(Preset::Qwen2Tiny, 1, folder.path()).unwrap());
    assert_eq!(made, fs::metadata(&path).unwrap().modified().unwrap());
    fs::write(&path, &synthetic_file(Preset::Qwen2Tiny)[..2_000_000]).unwrap();
    synthetic::ensure(Preset::Qwen2Tiny, 1, folder.path()).unwrap();
    assert!(fs::read(&path).unwrap() == synthetic_file(Preset::Qwen2Tiny));
    let left = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 2, "the model and its note, and no temporary file");
}

#[test]
fn runners_that_make_one_synthetic_model_at_once_read_one_file() {
    let store = tempfile::tempdir().unwrap();
    let start = Barrier::new(8);
    let make = || {
        start.wait();
        let path = synthetic::ensure(Preset::Qwen2Tiny, 1, store.path()).unwrap();
        fs::metadata(path).unwrap().ino()
    };
    let inodes: BTreeSet<u64> = std::thread::scope(|scope| {
        let runners: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
        runners.into_iter().map(|runner| runner.join().unwrap()).collect()
    });
    assert_eq!(inodes.len(), 1);
}

#[test]
fn synthetic_models_carry_outlier_channels_in_every_layer() {
    let model = open(&synthetic_file(Preset::Qwen2Tiny)).unwrap();
    let embedding = model.tensor("token_embd.weight").unwrap();
    let values = embedding.to_vec().unwrap();
    let rms = |channel: usize| {
        let column = values.iter().skip(channel).step_by(embedding.width());
        (column.map(|v| v * v).sum::<f32>() / embedding.rows() as f32).sqrt()
    };
    let outliers: Vec<usize> = (0..256).filter(|&channel| rms(channel) > 0.1).collect();
    assert_eq!(outliers.len(), 2);
    for layer in 0..4 {
        let gains = model.tensor(&format!("blk.{layer}.attn_norm.weight")).unwrap();
        let gains = gains.to_vec().unwrap();
        let large: Vec<usize> = (0..256).filter(|&channel| gains[channel] > 1.5).collect();
        assert_eq!(large, outliers, "layer {layer}");
    }
}

#[test]
fn candles_own_reader_sees_the_same_tensors() {
    for preset in TINY {
        let file = synthetic_file(preset);
        let model = open(&file).unwrap();
        let mut cursor = Cursor::new(&file);
        let content = gguf_file::Content::read(&mut cursor).unwrap();
        assert_eq!(
            model.names().count(),
            content.tensor_infos.keys().filter(|n| *n != "rope_freqs.weight").count()
        );
        for name in model.names() {
            let theirs = content.tensor(&mut cursor, name, &Device::Cpu).unwrap();
            assert_eq!(theirs.data().unwrap(), model.tensor(name).unwrap().bytes(), "{name}");
        }
    }
}

#[test]
fn a_model_is_shared_between_threads() {
    fn assert_shared<T: Send + Sync>() {}
    assert_shared::<Model>();
    assert_shared::<ModelError>();
}

#[test]
fn an_unknown_tensor_is_named_with_the_nearest_ones() {
    let model = open(&synthetic_file(Preset::Qwen2Tiny)).unwrap();
    let error = model.tensor("blk.1.attn_qq.weight").unwrap_err().to_string();
    assert!(error.contains("`test.gguf`") && error.contains("`blk.1.attn_q.weight`"), "{error}");
}

// A GGUF file written by candle, whose parts a test may change.

pub struct Draft {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, QTensor>,
}

fn f32_tensor(dimensions: &[usize]) -> QTensor {
    let count = dimensions.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|n| (n % 7) as f32 - 3.0).collect();
    let tensor = Tensor::from_vec(values, dimensions, &Device::Cpu).unwrap();
    QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
}

/// A model of one block: hidden 8, 2 heads of 4 with one key head, FFN 12, 300 tokens.
pub fn draft(architecture: &str) -> Draft {
    let text = |text: &str| Value::String(text.to_owned());
    let mut metadata = BTreeMap::from([("general.architecture".to_owned(), text(architecture))]);
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 8),
        ("feed_forward_length", 12),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ] {
        metadata.insert(format!("{architecture}.{key}"), Value::U32(value));
    }
    let eps = format!("{architecture}.attention.layer_norm_rms_epsilon");
    metadata.insert(eps, Value::F32(1e-5));
    let shapes: [(&str, &[usize]); 11] = [
        ("token_embd.weight", &[300, 8]),
        ("output_norm.weight", &[8]),
        ("blk.0.attn_norm.weight", &[8]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[4, 8]),
        ("blk.0.attn_v.weight", &[4, 8]),
        ("blk.0.attn_output.weight", &[8, 8]),
        ("blk.0.ffn_norm.weight", &[8]),
        ("blk.0.ffn_gate.weight", &[12, 8]),
        ("blk.0.ffn_up.weight", &[12, 8]),
        ("blk.0.ffn_down.weight", &[8, 12]),
    ];
    let tensors = shapes.map(|(name, shape)| (name.to_owned(), f32_tensor(shape)));
    Draft { metadata, tensors: tensors.into() }
}

impl Draft {
    pub fn with(mut self, key: &str, value: Value) -> Draft {
        self.metadata.insert(key.to_owned(), value);
        self
    }

    pub fn without(mut self, key: &str) -> Draft {
        assert!(self.metadata.remove(key).is_some(), "{key}");
        self
    }

    pub fn tensor(mut self, name: &str, dimensions: &[usize]) -> Draft {
        self.tensors.insert(name.to_owned(), f32_tensor(dimensions));
        self
    }

    pub fn without_tensor(mut self, name: &str) -> Draft {
        assert!(self.tensors.remove(name).is_some(), "{name}");
        self
    }

    /// A byte-level vocabulary with a few merges, cut by `pre`.
    pub fn vocabulary(self, pre: &str) -> Draft {
        let text = |text: &str| Value::String(text.to_owned());
        let texts = |texts: &[&str]| Value::Array(texts.iter().map(|t| text(t)).collect());
        let mut tokens: Vec<Value> = (0..256).map(|byte| text(&byte_letter(byte))).collect();
        tokens.extend(["12", "123", "<|bos|>", "he", "hel", "<user>"].map(text));
        let mut kinds = vec![Value::I32(1); 256];
        kinds.extend([1, 1, 3, 1, 1, 4].map(Value::I32));
        self.with("tokenizer.ggml.model", text("gpt2"))
            .with("tokenizer.ggml.pre", text(pre))
            .with("tokenizer.ggml.tokens", Value::Array(tokens))
            .with("tokenizer.ggml.token_type", Value::Array(kinds))
            .with("tokenizer.ggml.merges", texts(&["1 2", "12 3", "h e", "he l"]))
            .with("tokenizer.ggml.bos_token_id", Value::U32(258))
    }

    /// The same model in parts, as `gguf-split` writes it: all metadata in the first one.
    fn parts(&self, count: u16) -> Vec<Draft> {
        let each = self.tensors.len().div_ceil(count.into());
        let mut tensors = self.tensors.iter();
        let part = |number: u16| {
            let mut metadata = if number == 0 { self.metadata.clone() } else { BTreeMap::new() };
            metadata.insert("split.no".to_owned(), Value::U16(number));
            metadata.insert("split.count".to_owned(), Value::U16(count));
            let all = Value::I32(self.tensors.len() as i32);
            metadata.insert("split.tensors.count".to_owned(), all);
            let own = tensors.by_ref().take(each);
            let held = |(name, tensor): (&String, &QTensor)| {
                (name.clone(), f32_tensor(tensor.shape().dims()))
            };
            Draft { metadata, tensors: own.map(held).collect() }
        };
        (0..count).map(part).collect()
    }

    pub fn write(&self) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
        file.into_inner()
    }
}

/// Writes the parts under their names, and gives the first one's path.
fn write_parts(folder: &Path, parts: &[Draft]) -> PathBuf {
    let count = parts.len();
    let name = |number: usize| folder.join(format!("m-{:05}-of-{count:05}.gguf", number + 1));
    for (number, part) in parts.iter().enumerate() {
        std::fs::write(name(number), part.write()).unwrap();
    }
    name(0)
}

#[test]
fn a_split_model_is_the_model_of_its_parts() {
    let whole = open(&draft("llama").write()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let first = write_parts(folder.path(), &draft("llama").parts(3));
    let split = Model::open(&first).unwrap();
    assert_eq!(split.files().count(), 3);
    assert_eq!(split.config(), whole.config());
    let names: Vec<&str> = whole.names().collect();
    assert_eq!(split.names().collect::<Vec<_>>(), names);
    for name in names {
        let [whole, split] = [&whole, &split].map(|model| model.tensor(name).unwrap());
        assert_eq!(whole.digest(), split.digest(), "{name}");
        assert_eq!(whole.to_vec().unwrap(), split.to_vec().unwrap(), "{name}");
    }
    assert_eq!(split.encode("abc").ok(), whole.encode("abc").ok());
}

#[test]
fn parts_that_are_not_one_model_are_named() {
    let said = |change: &dyn Fn(&Path, &mut Vec<Draft>) -> Option<PathBuf>| {
        let folder = tempfile::tempdir().unwrap();
        let mut parts = draft("llama").parts(3);
        let other = change(folder.path(), &mut parts);
        let first = write_parts(folder.path(), &parts);
        let other = other.map(|name| folder.path().join(name));
        if let Some(gone) = other.as_ref().filter(|name| name.ends_with("gone")) {
            std::fs::remove_file(gone.with_file_name("m-00003-of-00003.gguf")).unwrap();
            return Model::open(&first).unwrap_err().to_string();
        }
        if let Some(other) = other.as_ref().filter(|name| name.ends_with("plain.gguf")) {
            std::fs::rename(&first, other).unwrap();
        }
        Model::open(other.as_deref().unwrap_or(&first)).unwrap_err().to_string()
    };
    let name = |name: &'static str| move |_: &Path, _: &mut Vec<Draft>| Some(PathBuf::from(name));
    let cases = [
        (
            said(&name("m-00002-of-00003.gguf")),
            "it is part 2 of 3 of a split model; give `m-00001-of",
        ),
        (said(&name("gone")), "m-00003-of-00003.gguf` is not a sound model: part 3 of 3"),
        (said(&name("plain.gguf")), "it is part 1 of 3 of a split model, and is not named so"),
        (
            said(&|_, parts| {
                parts[1].metadata.insert("split.no".to_owned(), Value::U16(2));
                None
            }),
            "its metadata do not say that it is part 2 of 3",
        ),
        (
            said(&|_, parts| {
                let key = "llama.rope.freq_base".to_owned();
                parts[2].metadata.insert(key, Value::F32(1e6));
                None
            }),
            "`llama.rope.freq_base`, which belongs in the first part",
        ),
        (
            said(&|_, parts| {
                let (name, _) = parts[0].tensors.first_key_value().unwrap();
                let name = name.clone();
                parts[1].tensors.insert(name, f32_tensor(&[8]));
                None
            }),
            "another part holds it too",
        ),
        (
            said(&|_, parts| {
                parts[1].tensors.pop_last();
                None
            }),
            "`split.tensors.count` is 11, and its parts hold 10 tensors",
        ),
    ];
    for (said, words) in cases {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn a_file_that_says_more_tensors_or_parts_than_it_holds_is_refused_with_both_numbers() {
    let (part, tensors) = (Value::U16, Value::I32);
    let whole = draft("llama").with("split.tensors.count", tensors(11));
    open(&whole.write()).expect("a file that holds what it says");
    let merged = whole.with("split.no", part(0)).with("split.count", part(0));
    open(&merged.write()).expect("what `gguf-split --merge` leaves");
    let lacks = draft("llama").with("split.tensors.count", tensors(12));
    for (draft, expected) in [
        (lacks.with("split.count", part(1)), "is 12, and it holds 11 tensors"),
        (merged.with("split.tensors.count", tensors(12)), "is 12, and it holds 11 tensors"),
        (draft("llama").with("split.no", part(1)), "`split.no` is 1, counted from 0, and `split.c"),
        (draft("llama").with("split.no", part(1)).with("split.count", part(1)), "count` is 1"),
    ] {
        let error = refusal(&draft.write());
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
    }
}

/// GPT-2's letter of a byte.
fn byte_letter(byte: u32) -> String {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = if printable(byte) {
        byte
    } else {
        0x100 + (0..byte).filter(|&b| !printable(b)).count() as u32
    };
    char::from_u32(code).unwrap().to_string()
}

#[test]
fn a_gguf_gets_its_defaults_where_keys_are_absent() {
    let model = open(&draft("llama").write()).unwrap();
    let config = model.config();
    assert_eq!((config.head_dim, config.rope.dimensions, config.vocabulary), (4, 4, 300));
    assert_eq!((config.rope.theta, config.rope.linear_scale), (10_000.0, 1.0));
    assert!(config.tied_embeddings && config.rope.factors.is_none());
    let scaled = draft("llama")
        .with("llama.rope.scaling.type", Value::String("linear".into()))
        .with("llama.rope.scaling.factor", Value::F32(4.0))
        .with("llama.rope.freq_base", Value::F32(5e5))
        .tensor("output.weight", &[300, 8])
        .tensor("rope_freqs.weight", &[2]);
    let error = refusal(&scaled.write());
    assert!(error.contains("RoPE factor"), "negative factors must be refused: {error}");
    let model = open(&scaled.without_tensor("rope_freqs.weight").write()).unwrap();
    assert_eq!((model.config().rope.theta, model.config().rope.linear_scale), (5e5, 4.0));
    assert!(!model.config().tied_embeddings);
}

#[test]
fn what_llama_cpp_reads_otherwise_or_not_at_all_is_refused_by_name() {
    let mixture = || {
        draft("qwen3moe")
            .with("qwen3moe.expert_count", Value::U32(2))
            .with("qwen3moe.expert_used_count", Value::U32(1))
            .with("qwen3moe.expert_feed_forward_length", Value::U32(16))
    };
    let granite = || draft("granite").with("granite.logit_scale", Value::F32(2.0));
    let cases: Vec<(Draft, &str)> = vec![
        (mixture().tensor("blk.0.ffn_gate_exps.weight", &[16, 2, 8]), "make it [2, 16, 8]"),
        (mixture().tensor("blk.0.ffn_gate_exps.weight", &[32, 8]), "make it [2, 16, 8]"),
        (mixture().tensor("blk.9.ffn_up_exps.weight", &[2, 16, 8]), "`blk.9.ffn_up_exps.weight`"),
        (mixture().tensor("blk.0.ffn_up_exps.1.weight", &[16, 8]), "in one tensor"),
        (mixture().with("qwen3moe.expert_gating_func", Value::U32(2)), "expert_gating_func"),
        (
            mixture().with("qwen3moe.expert_shared_feed_forward_length", Value::U32(8)),
            "all tokens share",
        ),
        (draft("granite"), "granite.logit_scale"),
        (granite().with("granite.rope.scaling.finetuned", Value::Bool(false)), "finetuned"),
        (draft("gemma2").with("gemma2.attn_logit_softcapping", Value::F32(0.0)), "soft cap"),
        (draft("gemma2").with("gemma2.attention.sliding_window", Value::U32(0)), "is 0"),
        (draft("gemma3").with("gemma3.final_logit_softcapping", Value::F32(30.0)), "softcapping"),
        (draft("gemma3").with("gemma3.rope.freq_base_swa", Value::F32(500.0)), "is 500"),
        (
            draft("qwen3")
                .tensor("blk.0.attn_q_norm.weight", &[4])
                .tensor("blk.0.attn_k_norm.weight", &[4])
                .tensor("blk.0.ffn_up.bias", &[12]),
            "`blk.0.ffn_up.bias`",
        ),
        (draft("olmo2"), "`output.weight` is missing"),
        (draft("gemma2").tensor("output.weight", &[300, 8]), "is its embedding"),
    ];
    for (draft, expected) in cases {
        let error = open(&draft.write()).unwrap_err().to_string();
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
    }
}

#[test]
fn an_order_of_rows_that_is_not_known_is_refused_with_its_value() {
    let of = |architecture: &str, layout: &str| {
        let key = format!("{architecture}.tensor_data_layout");
        draft(architecture).with(&key, Value::String(layout.to_owned())).write()
    };
    for layout in ["reference", "Meta AI original pth"] {
        open(&of("llama", layout)).expect("what llama.cpp reads");
    }
    for (architecture, layout) in
        [("llama", "jploski"), ("llama", ""), ("qwen3", "Meta AI original pth")]
    {
        let error = refusal(&of(architecture, layout));
        let expected = format!("`{architecture}.tensor_data_layout` is `{layout}`");
        assert!(error.contains(&expected), "`{expected}` is not in: {error}");
    }
}

#[test]
fn an_embedding_model_is_read_and_the_head_of_a_classifier_is_called_one() {
    let qwen = || {
        draft("qwen3")
            .tensor("blk.0.attn_q_norm.weight", &[4])
            .tensor("blk.0.attn_k_norm.weight", &[4])
    };
    for kind in 0..5 {
        let pooled = qwen().with("qwen3.pooling_type", Value::U32(kind));
        open(&pooled.write()).expect("pooling changes no hidden state");
    }
    let labels = Value::Array(vec![Value::String("yes".to_owned())]);
    for (draft, expected) in [
        (qwen().with("qwen3.pooling_type", Value::U32(7)), "`qwen3.pooling_type` is 7"),
        (
            qwen().tensor("cls.output.weight", &[2, 8]),
            "`cls.output.weight`: it is the head of a cl",
        ),
        (
            qwen().with("qwen3.classifier.output_labels", labels),
            "output_labels`: it is the head of",
        ),
    ] {
        let error = refusal(&draft.write());
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
    }
}

#[test]
fn a_head_width_that_only_the_tensors_tell_is_told_with_the_key_that_is_missing() {
    let wide = || {
        draft("llama")
            .tensor("blk.0.attn_q.weight", &[32, 8])
            .tensor("blk.0.attn_k.weight", &[16, 8])
            .tensor("blk.0.attn_v.weight", &[16, 8])
            .tensor("blk.0.attn_output.weight", &[8, 32])
    };
    open(&wide().with("llama.attention.key_length", Value::U32(16)).write())
        .expect("the key tells");
    for key in ["llama.rope.dimension_count", "llama.attention.value_length", "general.name.x"] {
        let error = refusal(&wide().with(key, Value::U32(16)).write());
        let expected = "`llama.attention.key_length` is missing: its 2 heads have 16 values each";
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
    }
}

#[test]
fn a_value_that_is_written_for_each_block_is_one_value_where_it_is_the_same() {
    let each = |values: &[i32]| Value::Array(values.iter().map(|v| Value::I32(*v)).collect());
    let key = "llama.attention.head_count_kv";
    let model = open(&draft("llama").with(key, each(&[1])).write()).expect("one block, one value");
    assert_eq!(model.config().kv_heads, 1);
    open(&draft("llama").with("llama.feed_forward_length", each(&[12])).write()).expect("widths");
    let two = || draft("llama").with("llama.block_count", Value::U32(2));
    for (draft, expected) in [
        (draft("llama").with(key, each(&[1, 1])), "has 2 values for 1 blocks"),
        (two().with(key, each(&[1, 2])), "differs from block to block: 1, and 2 in block 1"),
        (draft("llama").with(key, each(&[-1])), "is -1 for each block"),
        (draft("llama").with("llama.context_length", each(&[64])), "is an array"),
    ] {
        let error = refusal(&draft.write());
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
    }
}

#[test]
fn what_would_be_computed_wrongly_is_refused_with_its_name() {
    let text = |text: &str| Value::String(text.to_owned());
    let cases: Vec<(Draft, &str)> = vec![
        (draft("gemma3n"), "architecture `gemma3n`"),
        (draft("qwen2").with("qwen2.expert_count", Value::U32(8)), "mixture of experts"),
        (draft("llama").with("llama.rope.scaling.type", text("yarn")), "`yarn`"),
        (draft("llama").with("llama.attn_logit_softcapping", Value::F32(50.0)), "softcapping"),
        (draft("llama").with("llama.attention.sliding_window", Value::U32(32)), "slides over 32"),
        (draft("llama").with("llama.rope.dimension_count", Value::U32(2)), "turns 2 of"),
        (draft("llama").with("llama.attention.value_length", Value::U32(8)), "values 8"),
        (draft("llama").with("llama.attention.causal", Value::Bool(false)), "not causal"),
        (draft("llama").with("split.count", Value::U16(3)), "split"),
        (draft("llama").with("general.type", text("adapter")), "`adapter`"),
        (draft("llama").tensor("blk.0.attn_sinks.weight", &[2]), "`blk.0.attn_sinks.weight`"),
        (draft("llama").tensor("blk.0.attn_q_norm.weight", &[4]), "`blk.0.attn_q_norm.weight`"),
        (draft("llama").tensor("blk.1.attn_norm.weight", &[8]), "`blk.1.attn_norm.weight`"),
    ];
    for (draft, expected) in cases {
        let error = open(&draft.write()).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "`{expected}` is not in: {error}");
        assert!(error.to_string().contains("`test.gguf`"), "{error}");
    }
    let window = draft("llama").with("llama.attention.sliding_window", Value::U32(64));
    open(&window.write()).expect("a window as wide as the context hides nothing");
}

#[test]
fn contradictions_are_refused_with_the_tensor_or_the_value() {
    let u32 = Value::U32;
    let cases: Vec<(Draft, &str)> = vec![
        (draft("llama").without("llama.block_count"), "`llama.block_count` is missing"),
        (draft("llama").without("general.architecture"), "`general.architecture` is missing"),
        (draft("llama").with("llama.block_count", Value::F32(1.0)), "is a float"),
        (draft("llama").with("llama.block_count", u32(0)), "number of blocks is 0"),
        (draft("llama").with("llama.block_count", u32(2)), "`blk.1.attn_norm.weight`"),
        (draft("llama").with("llama.block_count", Value::U64(u64::MAX)), "number of blocks"),
        (draft("llama").with("llama.block_count", u32(1 << 24)), "`blk.1.attn_norm.weight`"),
        (draft("llama").with("llama.attention.head_count", u32(0)), "0 heads"),
        (draft("llama").with("llama.attention.head_count", u32(3)), "3 heads"),
        (draft("llama").with("llama.attention.head_count_kv", u32(0)), "key and value heads is 0"),
        (draft("llama").with("llama.attention.head_count_kv", u32(4)), "2 heads do not share 4"),
        (draft("llama").with("llama.attention.key_length", u32(0)), "head width is 0"),
        (draft("llama").with("llama.embedding_length", u32(12)), "the hyperparameters make it"),
        (draft("llama").with("llama.rope.freq_base", Value::F32(f32::NAN)), "RoPE base is NaN"),
        (draft("llama").with("llama.rope.freq_base", Value::F32(-1.0)), "RoPE base is -1"),
        (draft("llama").tensor("token_embd.weight", &[300, 9]), "`token_embd.weight`"),
        (draft("llama").tensor("output.weight", &[301, 8]), "`output.weight`"),
        (draft("llama").without_tensor("token_embd.weight"), "`token_embd.weight`: it is missing"),
        (draft("llama").without_tensor("blk.0.ffn_up.weight"), "`blk.0.ffn_up.weight`: it is miss"),
        (draft("qwen2"), "`blk.0.attn_q.bias`: it is missing"),
        (draft("qwen3"), "`blk.0.attn_q_norm.weight`: it is missing"),
        (draft("llama").with("general.alignment", u32(0)), "`general.alignment` is 0"),
        (draft("llama").with("general.alignment", u32(48)), "`general.alignment` is 48"),
    ];
    for (draft, expected) in cases {
        let error = open(&draft.write()).unwrap_err();
        assert!(error.to_string().contains(expected), "`{expected}` is not in: {error}");
    }
    for eps in [f32::NAN, f32::INFINITY, 0.0, -1e-6] {
        let key = "llama.attention.layer_norm_rms_epsilon";
        let error = refusal(&draft("llama").with(key, Value::F32(eps)).write());
        assert!(error.contains("epsilon"), "{error}");
    }
}

/// Where `needle` begins in `file`.
fn find(file: &[u8], needle: &[u8]) -> usize {
    file.windows(needle.len()).position(|window| window == needle).expect("it is there")
}

#[test]
fn damaged_tables_are_refused_with_the_tensor() {
    let good = draft("llama").write();
    // A line of the table: length, name, rank, dimensions, type, offset.
    let table = |file: &[u8], name: &str| find(file, name.as_bytes()) + name.len();
    let q = table(&good, "blk.0.attn_q.weight");
    let (rank, width, kind, offset) = (q, q + 4, q + 20, q + 24);
    let cases: [(usize, &[u8], &str); 10] = [
        (rank, &5_u32.to_le_bytes(), "5 dimensions"),
        (width, &0_u64.to_le_bytes(), "has a zero"),
        (width, &u64::MAX.to_le_bytes(), "too large"),
        (width, &(1_u64 << 40).to_le_bytes(), "beyond the file"),
        (kind, &16_u32.to_le_bytes(), "IQ2_XXS"),
        (kind, &12_u32.to_le_bytes(), "do not fill Q4_K blocks"),
        (kind, &77_u32.to_le_bytes(), "number 77"),
        (offset, &1_u64.to_le_bytes(), "not a multiple of 32"),
        (offset, &(1_u64 << 32).to_le_bytes(), "beyond the file"),
        (offset, &u64::MAX.to_le_bytes(), "not a multiple of 32"),
    ];
    for (at, bytes, expected) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let error = refusal(&bad);
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
        assert!(error.contains("`blk.0.attn_q.weight`"), "{error}");
    }
    let mut overlap = good.clone();
    let other = table(&good, "blk.0.attn_output.weight") + 24;
    overlap.copy_within(other..other + 8, offset);
    assert!(refusal(&overlap).contains("overlaps tensor `blk.0.attn_"), "{}", refusal(&overlap));
    let mut twice = good.clone();
    let name = find(&good, b"blk.0.attn_q.weight");
    twice[name..name + 19].copy_from_slice(b"blk.0.attn_k.weight");
    assert!(refusal(&twice).contains("`blk.0.attn_k.weight`: the name occurs twice"));
    let mut garbled = good.clone();
    garbled[name] = 0xff;
    assert!(refusal(&garbled).contains("not UTF-8"));
}

#[test]
fn files_that_are_no_model_are_refused_whatever_they_are_called() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let file = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Model::open(&path).unwrap_err().to_string()
    };
    assert!(file(b"").contains("GGUF"));
    assert!(file(b"PK\x03\x04 a zip").contains("does not begin with the bytes `GGUF`"));
    assert!(file(b"GGUF").contains("fetch the file again"));
    assert!(file(b"GGUF\x01\0\0\0").contains("version 1"));
    assert!(file(b"GGUF\0\0\0\x01").contains("version 1"));
    assert!(file(b"GGUF\0\0\0\x03").contains("the number of tensors needs 8 bytes"));
    let counts = [&b"GGUF\x03\0\0\0"[..], &[0xff; 16]].concat();
    assert!(file(&counts).contains("a metadata key needs 8 bytes"));
    let error = Model::open(&folder.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("cannot open"), "{error}");
    fs::write(folder.path().join("renamed.bin"), draft("llama").write()).unwrap();
    Model::open(&folder.path().join("renamed.bin")).expect("the content decides, not the name");
}

#[test]
fn a_gguf_file_that_is_no_model_is_called_what_it_is() {
    let text = |text: &str| Value::String(text.to_owned());
    let bare = |key: &str, value: Value, tensor: Option<&str>| {
        let tensors = tensor.map(|name| (name.to_owned(), f32_tensor(&[4, 8])));
        Draft { metadata: [(key.to_owned(), value)].into(), tensors: tensors.into_iter().collect() }
    };
    let of = |kind: &str, tensor: &str| bare("general.type", text(kind), Some(tensor));
    let llama = |tensor: Option<&str>| bare("general.architecture", text("llama"), tensor);
    let tokens = Value::Array(vec![text("a")]);
    let cases: Vec<(Draft, &str)> = vec![
        (
            of("adapter", "blk.0.attn_q.weight.lora_a"),
            "`general.type` is `adapter`: it is an adapt",
        ),
        (
            llama(Some("blk.0.attn_q.weight.lora_a")),
            "`blk.0.attn_q.weight.lora_a`: it is an adapter",
        ),
        (llama(None).with("adapter.type", text("lora")), "`adapter.type`: it is an adapter"),
        (of("mmproj", "v.patch_embd.weight"), "`mmproj`: it is an encoder"),
        (llama(Some("v.patch_embd.weight")), "`v.patch_embd.weight`: it is an encoder"),
        (bare("clip.has_vision_encoder", Value::Bool(true), Some("mm.0.weight")), "an encoder"),
        (of("imatrix", "blk.0.attn_q.weight.in_sum2"), "an importance matrix"),
        (llama(Some("blk.0.attn_q.weight.in_sum2")), "an importance matrix"),
        (bare("controlvector.layer_count", Value::U32(2), Some("direction.1")), "a control vector"),
        (llama(None).with("tokenizer.ggml.tokens", tokens.clone()), "a vocabulary and no tensors"),
        (bare("general.type", text("vocab"), None), "`vocab`: it is a vocabulary"),
        (llama(None), "metadata and no tensors"),
        (bare("general.architecture", text("eagle3"), Some("fc.weight")), "`eagle3` is unknown"),
        (Draft { metadata: BTreeMap::new(), tensors: BTreeMap::new() }, "an empty GGUF file"),
        // What is a model, and lacks a tensor.
        (draft("llama").without_tensor("token_embd.weight"), "`token_embd.weight`: it is missing"),
    ];
    for (draft, expected) in cases {
        let error = refusal(&draft.write());
        assert!(error.contains(expected), "`{expected}` is not in: {error}");
    }
}

#[test]
fn an_adapters_folder_names_its_base_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type": "LORA", "base_model_name_or_path": "someone/base-7b"}"#;
    fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), b"").unwrap();
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("it is an adapter of `someone/base-7b`"), "{error}");
    // Beside a model it would change it.
    let small = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/small-models/stablelm");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(small.join(name), folder.path().join(name)).unwrap();
    }
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("an adapter (adapter_config.json) lies beside the model"), "{error}");
    fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    Model::open(folder.path()).unwrap();
}

#[test]
fn no_truncation_of_a_model_opens_or_panics() {
    let file = synthetic_file(Preset::Qwen3Tiny);
    let small = draft("llama").vocabulary("qwen2").write();
    // The very last bytes may be padding.
    for end in (0..small.len() - 32).step_by(7) {
        open(&small[..end]).expect_err("a truncated file must be refused");
    }
    for end in (0..file.len() - 32).step_by(30_011) {
        open(&file[..end]).expect_err("a truncated file must be refused");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// Whatever a few bytes of the header become, the model is refused or usable.
    #[test]
    fn a_damaged_header_is_refused_or_harmless(
        changes in prop::collection::vec((0_usize..1 << 20, any::<u8>()), 1..6),
        smash in prop::option::of((0_usize..1 << 20, prop::sample::select(vec![
            u64::MAX, 1 << 63, 1 << 32, i64::MAX as u64, 0,
        ]))),
    ) {
        let mut file = draft("llama").vocabulary("llama-bpe").write();
        let header = file.len() - 12_000;
        for (at, byte) in changes {
            file[at % header] = byte;
        }
        if let Some((at, value)) = smash {
            let at = at % header;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(model) = open(&file) {
            for name in model.names() {
                model.tensor(name).unwrap().to_vec().unwrap();
            }
            if let Ok(tokens) = model.encode("hello 123 <|bos|>") {
                let _ = model.decode(&tokens);
            }
        }
    }
}

/// The file that `scripts/fetch-smollm2.sh` fetches.
pub fn smollm2() -> PathBuf {
    match std::env::var_os("RUNNER_SMOLLM2") {
        Some(path) => path.into(),
        None => panic!(
            "set RUNNER_SMOLLM2 to models/SmolLM2-135M-Instruct.Q4_1.gguf, \
             which scripts/fetch-smollm2.sh fetches"
        ),
    }
}

#[test]
#[ignore = "needs RUNNER_SMOLLM2, see scripts/fetch-smollm2.sh"]
fn smollm2_opens_and_speaks_its_own_tokens() {
    let model = Model::open(&smollm2()).unwrap();
    let config = model.config();
    assert_eq!((config.layers, config.hidden, config.vocabulary), (30, 576, 49_152));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.ffn), (9, 3, 64, 1536));
    assert_eq!(config.rope.layout, RopeLayout::Interleaved);
    assert_eq!((config.rope.theta, config.rms_norm_eps), (1e5, 1e-5));
    assert!(config.tied_embeddings);
    for (text, expected) in [
        ("The capital of France is", &[504, 3575, 282, 4649, 314][..]),
        ("Hello world! 123", &[19556, 905, 17, 216, 33, 34, 35]),
        ("  multiple   spaces", &[216, 2701, 256, 5600]),
        ("Caf\u{e9} d\u{e9}j\u{e0} vu.", &[51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("<|im_start|>user\n", &[1, 4093, 198]),
    ] {
        assert_eq!(model.encode(text).unwrap(), expected, "{text}");
        assert_eq!(model.decode(expected).unwrap(), text);
    }
    let embedding = model.tensor("token_embd.weight").unwrap();
    assert_eq!((embedding.kind(), embedding.rows()), (WeightType::Q8_0, 49_152));
    assert_eq!(model.tensor("blk.29.ffn_down.weight").unwrap().kind(), WeightType::Q4_1);
}
