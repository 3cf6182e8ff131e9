//! Every reader of a file that somebody else wrote, each named once: the campaign and the fuzz
//! targets of `fuzz/` call them by this list.
//!
//! A reader gets a folder that is prepared for it and bytes that may be anything. It puts them
//! where a file is read, and accepts that file and uses all that is in it, or refuses it in
//! words that name it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use runner::cache::{Budget, Key, KeyWalk, Stamps, Store};
use runner::chip_command::{ChipCommand, run as run_chip};
use runner::compute::emulated::{captures, vectors};
use runner::dtype::Format;
use runner::engine::EngineFile;
use runner::graph::{Graph, GraphFormat, render};
use runner::manifest::{Overrides, load};
use runner::model::{Chat, Model};
use runner::nightly::{Earlier, metrics, sum_up};
use runner::op::FileTensor;
use runner::record::RunRecord;
use runner::report;
use runner::tensor_file::TensorFile;

/// One reader.
#[derive(Clone, Copy)]
pub struct Reader {
    /// What the campaign and the fuzz targets call it.
    pub name: &'static str,
    /// One of these stands in every refusal: the name of the file, or of the folder that is read.
    pub named: &'static [&'static str],
    /// Puts into the folder what the file needs beside it.
    pub prepare: fn(&Path),
    /// Reads the folder, in which the file has these bytes.
    pub read: fn(&Path, &[u8]) -> Answer,
}

/// What a reader said: nothing, or why it refuses the file.
pub type Answer = Result<(), String>;

/// All of them.
pub const READERS: [Reader; 29] = [
    reader("gguf", &["mutant.gguf"], nothing, gguf),
    reader("config", &["`model`", "/model`", "config.json"], beside_config, config),
    reader(
        "quantised",
        &["`model`", "/model`", "config.json", "model.safetensors"],
        beside_codes,
        config,
    ),
    reader("index", &["/model`", "/model/"], beside_config, index),
    reader("weights", &["model.safetensors", "/model`"], beside_config, weights),
    reader("codes", &["model.safetensors", "/model`"], beside_codes, weights),
    reader("forms", &["model.safetensors", "/model`"], beside_forms, forms),
    reader("tokenizer", &["/model`", "tokenizer.json"], beside_tokenizer, tokenizer),
    reader("tokenizer-config", &["/model`"], beside_tokenizer_config, tokenizer_config),
    reader("npy", &["mutant.npy"], nothing, npy),
    reader("npz", &["mutant.npz"], nothing, npz),
    reader("safetensors", &["mutant.safetensors"], nothing, safetensors),
    reader("gguf-tensors", &["mutant.gguf"], nothing, gguf_tensors),
    reader("raw", &["mutant.bin"], nothing, raw),
    reader("torch", &["mutant.pt"], nothing, torch),
    reader("polygraphy", &["mutant.json"], nothing, polygraphy),
    reader("msprobe", &["dump.json", "/mutant`"], beside_msprobe, msprobe),
    reader("flashinfer", &["mutant.jsonl", "x.safetensors"], beside_flashinfer, flashinfer),
    reader("llama-debug", &["llamacpp-mutant"], nothing, llama_debug),
    reader("captures", &["mutant.safetensors"], nothing, captured),
    reader("vectors", &["H100.safetensors"], nothing, answered),
    reader("manifest", &["S.toml"], beside_manifest, manifest),
    reader("contract", &["mutant.toml", "S.toml"], beside_manifest, contract),
    reader("defaults", &["pipeline.toml", "S.toml"], beside_manifest, defaults),
    reader("engine", &["mutant.toml"], nothing, engine),
    reader("run", &["run.json"], nothing, run),
    reader("events", &["events"], nothing, events),
    reader("record", &["actions"], nothing, record),
    reader("logs", &["latest.log"], nothing, logs),
];

const fn reader(
    name: &'static str,
    named: &'static [&'static str],
    prepare: fn(&Path),
    read: fn(&Path, &[u8]) -> Answer,
) -> Reader {
    Reader { name, named, prepare, read }
}

/// The reader of that name.
pub fn of(name: &str) -> Reader {
    let all = READERS;
    let found = all.iter().find(|reader| reader.name == name);
    *found.unwrap_or_else(|| panic!("there is no reader `{name}`"))
}

/// What a fuzz target does with its input.
pub fn check(reader: &Reader, folder: &Path, bytes: &[u8]) -> Answer {
    let answer = (reader.read)(folder, bytes);
    if let Err(words) = &answer {
        let named = reader.named.iter().any(|name| words.contains(name));
        assert!(named, "the refusal names none of {:?}: {words}", reader.named);
    }
    answer
}

/// Writes the file that is read.
fn put(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

fn make(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

fn in_words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn nothing(_: &Path) {}

/// Every row of every tensor, and a text through the vocabulary.
fn use_model(model: &Model) -> Answer {
    for name in model.names() {
        let weight = model.tensor(name).expect("a name that the model gave");
        let mut row = vec![0.0; weight.width()];
        for at in [0, weight.rows() - 1] {
            weight.decode_rows(at..at + 1, &mut row).expect("a row that it has");
        }
    }
    Ok(())
}

fn use_vocabulary(model: &Model) -> Answer {
    let tokens = model.encode("The 123 quick\n\n \u{e9}<|im_end|> hello").map_err(in_words)?;
    model.decode(&tokens).map(drop).map_err(in_words)
}

fn gguf(folder: &Path, bytes: &[u8]) -> Answer {
    let model = Model::open(&put(folder, "mutant.gguf", bytes)).map_err(in_words)?;
    use_model(&model)?;
    use_vocabulary(&model)
}

/// The config of the smallest sound model.
pub const CONFIG: &str = r#"{"model_type":"llama","hidden_size":4,"num_hidden_layers":1,
"num_attention_heads":2,"num_key_value_heads":1,"intermediate_size":6,"vocab_size":8,
"max_position_embeddings":64,"rms_norm_eps":1e-5,"rope_theta":10000.0,"rope_scaling":null,
"tie_word_embeddings":true,"hidden_act":"silu","torch_dtype":"bfloat16"}"#;

/// The tensors of [`CONFIG`], with so many rows of the embedding.
pub fn tensors_of_config(vocabulary: usize) -> Vec<u8> {
    written(vocabulary, false)
}

/// The same with codes and their scales where a checkpoint of FP8 has them.
pub fn tensors_of_codes() -> Vec<u8> {
    written(8, true)
}

fn written(vocabulary: usize, coded: bool) -> Vec<u8> {
    let block = [
        ("input_layernorm", vec![4]),
        ("post_attention_layernorm", vec![4]),
        ("self_attn.q_proj", vec![4, 4]),
        ("self_attn.k_proj", vec![2, 4]),
        ("self_attn.v_proj", vec![2, 4]),
        ("self_attn.o_proj", vec![4, 4]),
        ("mlp.gate_proj", vec![6, 4]),
        ("mlp.up_proj", vec![6, 4]),
        ("mlp.down_proj", vec![4, 6]),
    ];
    let block = block.map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape));
    let outer =
        [("model.embed_tokens.weight", vec![vocabulary, 4]), ("model.norm.weight", vec![4])];
    let outer = outer.map(|(name, shape)| (name.to_owned(), shape));
    let (mut lines, mut end) = (Vec::new(), 0);
    let mut add = |name: &str, dtype: &str, bytes: usize, shape: &[usize]| {
        let start = end;
        end += bytes * shape.iter().product::<usize>();
        lines.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    };
    for (name, shape) in block.into_iter().chain(outer) {
        if coded && name.contains("proj") {
            add(&name, "F8_E4M3", 1, &shape);
            let scales: Vec<usize> = shape.iter().map(|side| side.div_ceil(4)).collect();
            add(&format!("{name}_scale_inv"), "F32", 4, &scales);
        } else {
            add(&name, "BF16", 2, &shape);
        }
    }
    let header = format!("{{{}}}", lines.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + end, 0x3c);
    file
}

fn beside_config(folder: &Path) {
    let folder = make(folder, "model");
    put(&folder, "config.json", CONFIG.as_bytes());
    put(&folder, "model.safetensors", &tensors_of_config(8));
}

fn beside_codes(folder: &Path) {
    let folder = make(folder, "model");
    let fp8 = r#"{"quantization_config":{"quant_method":"fp8","weight_block_size":[4,4]},"#;
    put(&folder, "config.json", CONFIG.replacen('{', fp8, 1).as_bytes());
    put(&folder, "model.safetensors", &tensors_of_codes());
}

/// Quantised folders of tests/fixtures/quantised, one of each way of decoding, with their configs.
macro_rules! configs {
    ($($form:literal),*) => {
        [$(($form, include_str!(concat!("../../fixtures/quantised/", $form, "/config.json")))),*]
    };
}
pub const FORMS: [(&str, &str); 7] = configs![
    "gptq-4-ordered",
    "gptq-3",
    "awq",
    "packed-4-zeros",
    "nf4-nested",
    "int-8-zeros",
    "phi3-nvfp4"
];

fn beside_forms(folder: &Path) {
    for (form, config) in FORMS {
        put(&make(folder, &format!("{form}/model")), "config.json", config.as_bytes());
    }
}

fn beside_tokenizer(folder: &Path) {
    let folder = make(folder, "model");
    put(&folder, "config.json", CONFIG.replace(r#"size":8,"#, r#"size":512,"#).as_bytes());
    put(&folder, "model.safetensors", &tensors_of_config(512));
}

/// The smallest vocabulary, which has no bytes to fall back to.
fn beside_tokenizer_config(folder: &Path) {
    beside_tokenizer(folder);
    let json = br#"{"model":{"type":"BPE","vocab":{"h":0,"e":1,"he":2,"<s>":3,"<unk>":4},"merges":["h e"]}}"#;
    put(folder, "model/tokenizer.json", json);
}

fn config(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "model/config.json", bytes);
    use_model(&Model::open(&folder.join("model")).map_err(in_words)?)
}

fn index(folder: &Path, bytes: &[u8]) -> Answer {
    let whole = folder.join("model/model.safetensors");
    if whole.exists() {
        fs::rename(whole, folder.join("model/a.safetensors")).expect("renamed");
    }
    put(folder, "model/model.safetensors.index.json", bytes);
    use_model(&Model::open(&folder.join("model")).map_err(in_words)?)
}

fn weights(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "model/model.safetensors", bytes);
    use_model(&Model::open(&folder.join("model")).map_err(in_words)?)
}

/// Under the config of each form: one at most is its own.
fn forms(folder: &Path, bytes: &[u8]) -> Answer {
    let answers = FORMS.map(|(form, _)| {
        let folder = folder.join(form).join("model");
        put(&folder, "model.safetensors", bytes);
        use_model(&Model::open(&folder).map_err(in_words)?)
    });
    answers.into_iter().reduce(Answer::or).expect("forms")
}

fn tokenizer(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "model/tokenizer.json", bytes);
    let model = Model::open(&folder.join("model")).expect("the model itself is sound");
    use_vocabulary(&model)
}

fn tokenizer_config(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "model/tokenizer_config.json", bytes);
    let model = Model::open(&folder.join("model")).expect("the model itself is sound");
    use_vocabulary(&model)?;
    model.encode_chat(&Chat::now("he said", None)).map(drop).map_err(in_words)
}

/// Every tensor of a file of tensors, as codes, values and integers.
fn use_tensors(path: &Path) -> Answer {
    let file = TensorFile::open(path).map_err(in_words)?;
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    for name in names {
        file.rows(&name);
        let tensor = Some(name).filter(|name| !name.is_empty());
        file.integers(tensor.as_deref()).map_err(in_words)?;
        let wanted =
            FileTensor { file: path.to_owned(), tensor, format: None, shape: None, scale: None };
        use_codes(&file, &wanted)?;
    }
    Ok(())
}

fn use_codes(file: &TensorFile, wanted: &FileTensor) -> Answer {
    let codes = file.read(wanted).map_err(in_words)?;
    let values = codes.values();
    assert_eq!((values.rows(), values.width()), (codes.rows, codes.width));
    codes.digest();
    codes.select_rows(&[codes.rows - 1, 0]);
    Ok(())
}

fn npy(folder: &Path, bytes: &[u8]) -> Answer {
    use_tensors(&put(folder, "mutant.npy", bytes))
}

fn npz(folder: &Path, bytes: &[u8]) -> Answer {
    use_tensors(&put(folder, "mutant.npz", bytes))
}

fn safetensors(folder: &Path, bytes: &[u8]) -> Answer {
    use_tensors(&put(folder, "mutant.safetensors", bytes))
}

fn gguf_tensors(folder: &Path, bytes: &[u8]) -> Answer {
    use_tensors(&put(folder, "mutant.gguf", bytes))
}

fn torch(folder: &Path, bytes: &[u8]) -> Answer {
    use_tensors(&put(folder, "mutant.pt", bytes))
}

fn polygraphy(folder: &Path, bytes: &[u8]) -> Answer {
    use_tensors(&put(folder, "mutant.json", bytes))
}

/// The smallest safetensors file: one value.
fn one_value() -> Vec<u8> {
    let header = br#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    [&(header.len() as u64).to_le_bytes(), header.as_slice(), &[0; 4]].concat()
}

fn beside_msprobe(folder: &Path) {
    let header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n";
    let start = [b"\x93NUMPY\x01\x00", (header.len() as u16).to_le_bytes().as_slice()].concat();
    let file = [&start, header.as_slice(), &[0; 4]].concat();
    put(&make(folder, "mutant/dump_tensor_data"), "x.npy", &file);
}

/// What msprobe says of a folder's tensors.
fn msprobe(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "mutant/dump.json", bytes);
    use_tensors(&folder.join("mutant"))
}

fn beside_flashinfer(folder: &Path) {
    put(&make(folder, "blob"), "x.safetensors", &one_value());
    make(folder, "workloads");
}

fn flashinfer(folder: &Path, bytes: &[u8]) -> Answer {
    use_tensors(&put(folder, "workloads/mutant.jsonl", bytes))
}

/// Logits, the first half of the bytes, with their tokens.
fn llama_debug(folder: &Path, bytes: &[u8]) -> Answer {
    let (logits, tokens) = bytes.split_at(bytes.len() / 2);
    put(folder, "llamacpp-mutant-tokens.bin", tokens);
    let path = put(folder, "llamacpp-mutant.bin", logits);
    let file = TensorFile::open(&path).map_err(in_words)?;
    file.integers(Some("ids")).map_err(in_words)?;
    let tensor = Some("logits".to_owned());
    use_codes(&file, &FileTensor { file: path, tensor, format: None, shape: None, scale: None })
}

/// Raw values, after what a manifest says of them: a byte for the format, and two sizes.
fn raw(folder: &Path, bytes: &[u8]) -> Answer {
    let mut head = [0; 17];
    let at = bytes.len().min(17);
    head[..at].copy_from_slice(&bytes[..at]);
    let size = |from: usize| {
        let word = head[from..from + 8].try_into().expect("eight bytes");
        usize::try_from(u64::from_le_bytes(word)).unwrap_or(usize::MAX)
    };
    let formats = [Format::F32, Format::F16, Format::Bf16, Format::E4m3, Format::E5m2];
    let format = formats[usize::from(head[0]) % formats.len()];
    let path = put(folder, "mutant.bin", &bytes[at..]);
    let file = TensorFile::open(&path).map_err(in_words)?;
    let shape = Some(vec![size(1), size(9)]);
    let wanted = FileTensor { file: path, tensor: None, format: Some(format), shape, scale: None };
    use_codes(&file, &wanted)
}

fn captured(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "mutant.safetensors", bytes);
    for capture in captures::read_folder(folder).map_err(in_words)? {
        for output in &capture.outputs {
            let (x, w) = capture.operands(output);
            assert_eq!((x.codes.rows(), w.codes.rows()), (output.y.rows(), output.y.width()));
        }
    }
    Ok(())
}

fn answered(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "H100.safetensors", bytes);
    vectors::verify_folder(folder, |core| core).map_err(in_words)?;
    let verify = ChipCommand::Verify { folder: Some(folder.to_owned()) };
    run_chip(&verify, &mut Vec::new()).map(drop).map_err(in_words)
}

/// A stage of each kind that a contract of the campaign judges.
const STAGES: [(&str, &str); 3] = [
    ("command", "[command]\nargv = [\"true\"]\n"),
    (
        "matmul",
        "[matmul]\ninput = { generate = \"normal\", rows = 4 }\nweights = [\"blk.0.attn_q\"]\n",
    ),
    ("forward", "[forward]\ncapture = \"every-site\"\n"),
];

macro_rules! shipped {
    ($($name:literal,)*) => {
        [$(($name, include_str!(concat!("../../../contracts/", $name, ".toml"))),)*]
    };
}

/// The contracts that ship.
const CONTRACTS: [(&str, &str); 22] = shipped![
    "attention",
    "batch-invariance",
    "coded-matmul",
    "command",
    "comparison",
    "embedding",
    "engine",
    "exact-engine",
    "exact-pass",
    "f32-engine",
    "f32-kernel",
    "golden-output",
    "kernel",
    "llama-cpp",
    "llama-cpp-cuda",
    "llama-cpp-sites",
    "per-layer",
    "qkv-matmul",
    "reproducer",
    "rms-norm",
    "rope",
    "swiglu",
];

fn beside_manifest(folder: &Path) {
    make(folder, "stages");
    make(folder, "contracts");
    put(folder, "stages/pipeline.toml", b"model = \"synthetic:qwen2-tiny\"\ntokens = [7, 2]\n");
    put_stage(folder, stage("command", STAGES[0].1).as_bytes());
}

fn stage(contract: &str, op: &str) -> String {
    format!("id = \"S\"\ntitle = \"t\"\ncontract = \"{contract}\"\n{op}")
}

/// Writes the stage, and the contract that it names where that is one of the shipped.
fn put_stage(folder: &Path, bytes: &[u8]) {
    put(folder, "stages/S.toml", bytes);
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines().filter(|line| line.starts_with("contract"));
    let named = lines.find_map(|line| line.split('"').nth(1)).unwrap_or_default();
    let (_, contract) = CONTRACTS.iter().find(|(name, _)| *name == named).unwrap_or(&CONTRACTS[0]);
    put(folder, "contracts/asked.toml", contract.as_bytes());
}

fn use_pipeline(folder: &Path) -> Answer {
    let pipeline = load(&folder.join("stages"), &Overrides::default()).map_err(in_words)?;
    let graph = Graph::of(&pipeline.stages).map_err(|cycle| format!("S.toml: {cycle:?}"))?;
    for format in [GraphFormat::Text, GraphFormat::Dot, GraphFormat::Mermaid] {
        render(&graph, &pipeline.stages, format);
    }
    Ok(())
}

fn manifest(folder: &Path, bytes: &[u8]) -> Answer {
    put_stage(folder, bytes);
    use_pipeline(folder)
}

fn defaults(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "stages/pipeline.toml", bytes);
    use_pipeline(folder)
}

/// The contract's first line says which kind of stage it judges.
fn contract(folder: &Path, bytes: &[u8]) -> Answer {
    let text = String::from_utf8_lossy(bytes);
    let kind = text.lines().next().unwrap_or_default().trim_start_matches("# ").to_owned();
    let (_, op) = STAGES.iter().find(|(name, _)| *name == kind).unwrap_or(&STAGES[2]);
    put_stage(folder, stage("mutant", op).as_bytes());
    put(folder, "contracts/mutant.toml", bytes);
    use_pipeline(folder)
}

fn engine(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "mutant.toml", bytes);
    let engine = EngineFile::find("mutant.toml", folder)?;
    // An engine whose kernels nobody knows is a sound file all the same.
    if let Ok((kernels, stream)) = engine.known() {
        kernels.stream_problem(stream);
    }
    Ok(())
}

fn run(folder: &Path, bytes: &[u8]) -> Answer {
    put(folder, "run.json", bytes);
    let in_a_fleet = as_a_fleet(folder);
    let run = RunRecord::read(folder).map_err(in_words)?;
    in_a_fleet?;
    // One of the pages at a time: which one follows from the file.
    let which = bytes.iter().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(*byte));
    match which % 8 {
        0 => drop(report::page(&run, "runs")),
        1 => drop(report::junit(&run)),
        2 => drop(report::sarif(&run).to_string()),
        3 => drop(report::csv(&run)),
        4 => drop(report::arrow(&run)),
        5 => drop((report::markdown(&run), report::annotations(&run))),
        6 => drop((report::table(&run, "runs", 80), report::table(&run, "runs", 0))),
        _ => {
            let changes = report::diff(&run, &run);
            report::diff_text(&run, &run, &changes, true);
            report::diff_page(&run, &run, &changes);
            let earlier = Earlier { baseline: Some(run.clone()), ..Earlier::default() };
            let summary = sum_up(&run, folder, &earlier);
            assert!(!summary.line.contains('\n'), "a message's head is one line");
            metrics::open_metrics(&summary, Some(&run), 0);
        }
    }
    Ok(())
}

/// The same file as the only run of a fleet, whose report is written in all its forms. What is left
/// out is named, and is no refusal: a whole run may be a stopped one, or of a machine without a
/// name.
fn as_a_fleet(folder: &Path) -> Answer {
    use runner::fleet::{metrics, page, read, report, text};
    let found = read::find(&[folder.to_owned()])?;
    let window = read::Window {
        at: 1_800_000_000,
        nights: 4_000_000_000,
        shift: runner::fleet::Shift(0),
        without: Vec::new(),
    };
    let gathered = read::gather(&found, &window);
    if let [left_out] = gathered.left_out.as_slice() {
        assert!(left_out.why.contains("run.json"), "it is not named: {}", left_out.why);
        return Ok(());
    }
    let report = report(&gathered, &window, &["expected".to_owned()]);
    assert!(!report.line.contains('\n'), "a message's head is one line");
    drop((text(&report), page(&report), metrics::open_metrics(&report, 0)));
    serde_json::to_string(&report).map(drop).map_err(in_words)
}

/// The events of a run that was cut off: its last one is told.
fn events(folder: &Path, bytes: &[u8]) -> Answer {
    let folder = make(folder, "events");
    put(&folder, "events.jsonl", bytes);
    let told = RunRecord::read(&folder).expect_err("there is no run.json").to_string();
    if told.contains(" after `") { Ok(()) } else { Err(told) }
}

/// The fields of the campaign's record.
pub fn record_walk() -> KeyWalk {
    let mut walk = KeyWalk::new("campaign");
    walk.field("name", "mutant");
    walk
}

fn record(folder: &Path, bytes: &[u8]) -> Answer {
    let store = Store::new(folder);
    let key = record_walk().key();
    let place = store.root().join("actions").join(&key.0[..2]);
    fs::create_dir_all(&place).expect("a folder");
    put(&place, &format!("{}.json", key.0), bytes);
    store.held().map_err(in_words)?;
    let budget = Budget { bytes: 0, pinned: BTreeSet::new(), dry_run: true };
    store.clear(&budget).map_err(in_words)?;
    let health = store.verify().map_err(in_words)?;
    match health.damaged.as_slice() {
        [] => {}
        [(path, problem)] => return Err(format!("{}: {problem}", path.display())),
        more => panic!("{} files are damaged", more.len()),
    }
    let action = store.record(&key).expect("what is sound is found");
    assert!(action.key == key, "another key's record was believed");
    Ok(())
}

fn logs(folder: &Path, bytes: &[u8]) -> Answer {
    let store = Store::new(folder);
    fs::create_dir_all(store.root()).expect("a folder");
    put(store.root(), "latest.log", bytes);
    store.latest("who");
    store.remember("somebody", &Key("0".repeat(64))).map_err(in_words)?;
    let stamps = make(folder, "stamps");
    put(&stamps, "stamps.log", bytes);
    let known = put(folder, "known", b"1");
    Stamps::new(&stamps, false).digest(&known).map_err(in_words)?;
    match store.verify().map_err(in_words)?.lines {
        0 => Ok(()),
        lines => Err(format!("{lines} damaged lines of latest.log")),
    }
}
