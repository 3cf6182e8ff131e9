//! Dumps of torch, SGLang, msprobe, Polygraphy, FlashInfer-Bench and llama.cpp, as these
//! programs' own code wrote them (`tests/adapters/write_dumps.py`), and what is refused of them.

use std::fs;
use std::path::{Path, PathBuf};

use runner::dtype::Format;
use runner::op::FileTensor;
use runner::tensor_file::{TensorFile, members, read};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};

use crate::missing::{module_of, recorded, renamed, set, why};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dumps")
}

fn wanted(file: &Path, tensor: &str) -> FileTensor {
    let tensor = Some(tensor.to_owned()).filter(|name| !name.is_empty());
    FileTensor { file: file.to_owned(), tensor, format: None, shape: None, scale: None }
}

/// A tensor's values in every bit, against those that its writer says it has.
#[track_caller]
fn same(file: &str, tensor: &str, expected: &str) {
    let path = folder().join(file);
    let values = read(&wanted(&path, tensor)).unwrap_or_else(|error| panic!("{error}")).values();
    let bytes = fs::read(folder().join(format!("{expected}.expected"))).expect("the values");
    let expected: Vec<u32> = bytes.as_chunks().0.iter().map(|w| u32::from_le_bytes(*w)).collect();
    let bits: Vec<u32> = values.data().iter().map(|value| value.to_bits()).collect();
    assert_eq!(bits, expected, "{file} {tensor}");
}

#[track_caller]
fn refused(path: &Path, tensor: &str, words: &str) {
    let error = read(&wanted(path, tensor)).expect_err(words).to_string();
    assert!(error.contains(words), "{error}");
    let name = path.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(error.contains(&name), "it says of which file: {error}");
}

fn names(file: &str) -> Vec<String> {
    let file = TensorFile::open(&folder().join(file)).unwrap_or_else(|error| panic!("{error}"));
    file.names().map(str::to_owned).collect()
}

/// All types and views of one storage, by protocols 2 and 4 of pickle.
#[test]
fn every_tensor_of_a_torch_file_has_the_bits_that_torch_saved() {
    let kinds = ["f32", "f16", "bf16", "e4m3", "e5m2", "f64"];
    let views = ["transposed", "columns", "rows", "expanded", "eighths", "whole"];
    for file in ["torch/dict.pt", "torch/protocol4.pt"] {
        for name in kinds.iter().chain(&views) {
            same(file, name, &format!("torch/{name}"));
        }
        same(file, "layers.0.out", "torch/bf16");
        same(file, "layers.1.0", "torch/f16");
        same(file, "7", "torch/f32");
        let opened = TensorFile::open(&folder().join(file)).expect("a file");
        let ids = opened.integers(Some("ids")).expect("numbers").expect("numbers");
        assert_eq!(ids, [3, 1, 4]);
    }
    same("torch/one.pt", "", "torch/columns");
    same("torch/state.pth", "weight", "torch/f32");
    assert_eq!(names("torch/state.pth"), ["weight", "bias"]);
}

#[test]
fn a_torch_file_that_holds_more_than_tensors_is_refused_by_what_it_holds() {
    let file = |name: &str| folder().join("torch").join(name);
    refused(&file("object.pt"), "", "holds a `torch.nn.modules.linear.Linear`");
    refused(&file("numpy.pt"), "", "holds a `numpy._core.multiarray._reconstruct`");
    refused(&file("sparse.pt"), "", "holds a `torch._utils._rebuild_sparse_tensor`");
    refused(&file("old.pt"), "", "a torch before 1.6 wrote it");
    refused(&file("dict.pt"), "flags", "is stored as a type without a meaning here");
    refused(&file("dict.pt"), "e4m4", "did you mean `e4m3`?");
}

#[test]
fn half_a_torch_file_is_no_tensor_wherever_it_ends() {
    let work = tempfile::tempdir().expect("a folder");
    let whole = fs::read(folder().join("torch/one.pt")).expect("a file");
    let path = work.path().join("one.pt");
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).expect("written");
        let error = read(&wanted(&path, "")).expect_err("half a file").to_string();
        assert!(error.contains("one.pt"), "{length}: {error}");
    }
}

#[test]
fn polygraphys_arrays_are_named_by_what_tells_them_apart() {
    same("polygraphy/outputs.json", "hidden", "polygraphy/f32");
    same("polygraphy/outputs.json", "half", "polygraphy/f16");
    same("polygraphy/inputs.json", "x", "polygraphy/f32");
    // A `torch.Tensor` is saved by torch within the JSON.
    same("polygraphy/torch.json", "hidden", "polygraphy/bf16");
    same("polygraphy/torch.json", "half", "polygraphy/f16");
    let of = |runner| ["0", "1"].map(|iteration| format!("{runner}/{iteration}/hidden"));
    assert_eq!(names("polygraphy/two.json"), [of("trt-runner"), of("onnxrt-runner")].concat());
    same("polygraphy/two.json", "onnxrt-runner/1/hidden", "polygraphy/f16");
    assert_eq!(names("polygraphy/iterations"), ["0/hidden", "1/hidden"]);
    same("polygraphy/iterations", "1/hidden", "polygraphy/f16");
    let file = folder().join("polygraphy/nothing.json");
    refused(&file, "", "holds no array as Polygraphy saves them");
}

#[test]
fn sglangs_dumps_are_named_without_what_all_of_them_have() {
    same("sglang/one", "attn_out___layer_id=3", "sglang/attn_out");
    same("sglang/one", "non_intrusive__model.layers.0.mlp.output", "sglang/block");
    same("sglang/two", "attn_out___step=1___layer_id=3", "sglang/attn_out");
    // Another dumper of SGLang's: a file for each pass, in which a norm returns two tensors.
    same("sglang/Pass00000.pt", "model.layers.0.mlp", "sglang/block");
    same("sglang/Pass00000.pt", "model.norm.1", "sglang/block");
    let twice = names("sglang/repeated");
    let expected = ["14", "7"].map(|place| format!("attn_out___layer_id=3___dump_index={place}"));
    assert_eq!(twice, expected);
}

#[test]
fn msprobes_dumps_are_read_by_name_with_the_class_of_the_module_left_open() {
    let dump = "msprobe/tensor/step0/rank0";
    for module in ["model.layers.0.self_attn.q_proj", "model.layers.0", "lm_head"] {
        let name = format!("Module.{module}.{{class}}.forward.0.output.0");
        same(dump, &name, &format!("msprobe/{module}"));
    }
    let linear = "Module.lm_head.Linear.forward.0.output.0";
    same(dump, linear, "msprobe/lm_head");
    same(&format!("{dump}/dump_tensor_data"), linear, "msprobe/lm_head");
    let missing = "Module.lm_head.{class}.forward.1.output.0";
    refused(&folder().join(dump), missing, "has no tensor");
}

#[test]
fn an_msprobe_dump_without_its_tensors_says_what_is_missing() {
    let statistics = folder().join("msprobe/statistics/step0/rank0");
    let error = TensorFile::open(&statistics).map(drop).expect_err("statistics").to_string();
    assert!(error.contains("dump.json` is not taken as tensors: it holds statistics"), "{error}");
    assert!(error.contains("`\"task\": \"tensor\"`"), "{error}");
    let work = tempfile::tempdir().expect("a folder");
    let whole = folder().join("msprobe/tensor/step0/rank0");
    let dump = work.path().join("dump/step0/rank0");
    fs::create_dir_all(dump.join("dump_tensor_data")).expect("a folder");
    fs::copy(whole.join("dump.json"), dump.join("dump.json")).expect("copied");
    let linear = "dump_tensor_data/Module.lm_head.Linear.forward.0.output.0.pt";
    fs::copy(whole.join(linear), dump.join(linear)).expect("copied");
    let error = TensorFile::open(&dump).map(drop).expect_err("a part").to_string();
    assert!(error.contains("are not in `dump_tensor_data`, such as `Module."), "{error}");
    let error = TensorFile::open(work.path()).map(drop).expect_err("above it").to_string();
    assert!(error.contains("did you mean `") && error.contains("dump/step0/rank0`?"), "{error}");
    assert_eq!(members(&dump), [dump.join("dump.json"), dump.join(linear)]);
}

#[test]
fn inputs_of_flashinfer_bench_are_found_beneath_the_whole_set() {
    let file = "flashinfer/workloads/gemm/gemm_n2_k4.jsonl";
    same(file, "A", "flashinfer/A");
    same("flashinfer/workloads/gemm/both.jsonl", "77aa.A", "flashinfer/A");
    refused(&folder().join(file), "B", "is drawn by FlashInfer-Bench when it runs");
    refused(&folder().join(file), "alpha", "is a number and no tensor");
    let of = members(&folder().join(file));
    assert!(of.len() == 2 && of[1].ends_with("gemm_n2_k4/first.safetensors"), "{of:?}");
    let work = tempfile::tempdir().expect("a folder");
    let alone = work.path().join("alone.jsonl");
    fs::copy(folder().join(file), &alone).expect("copied");
    refused(&alone, "A", "copy the whole set of traces");
    fs::write(&alone, "{\"definition\": \"x\"}\n").expect("written");
    refused(&alone, "A", "line 1 is no workload or trace of FlashInfer-Bench");
}

/// The files that `llama-debug --save-logits` writes, by its source: f32 values and i32 tokens.
#[test]
fn saved_logits_of_llama_cpp_have_their_tokens_beside_them() {
    let work = tempfile::tempdir().expect("a folder");
    let put = |name: &str, bytes: Vec<u8>| {
        let path = work.path().join(name);
        fs::write(&path, bytes).expect("written");
        path
    };
    let values: Vec<u8> = (0..8u8).flat_map(|v| f32::from(v).to_le_bytes()).collect();
    let tokens: Vec<u8> = [1i32, 2].iter().flat_map(|v| v.to_le_bytes()).collect();
    let logits = put("llamacpp-tiny.bin", values.clone());
    let of_raw =
        FileTensor { format: Some(Format::F32), shape: Some(vec![2, 4]), ..wanted(&logits, "") };
    assert_eq!(read(&of_raw).expect("raw, without its tokens").rows, 2);
    let beside = put("llamacpp-tiny-tokens.bin", tokens.clone());
    let file = TensorFile::open(&logits).expect("logits");
    assert_eq!(file.shape(Some("logits")).expect("logits"), [1, 8]);
    assert_eq!(file.integers(Some("ids")).expect("ids"), Some(vec![1, 2]));
    assert_eq!(members(&logits), [logits.clone(), beside]);
    let hidden = put("llamacpp-tiny-embeddings.bin", values);
    put("llamacpp-tiny-embeddings-tokens.bin", tokens);
    let file = TensorFile::open(&hidden).expect("embeddings");
    assert_eq!(file.shape(Some("embeddings")).expect("embeddings"), [2, 4]);
    put("llamacpp-tiny-tokens.bin", vec![1, 2, 3]);
    refused(&logits, "logits", "which are no numbers of four bytes");
}

/// Lines as the two programs print them.
#[test]
fn tensors_that_llama_cpp_printed_are_refused_with_what_to_do() {
    let work = tempfile::tempdir().expect("a folder");
    let path = work.path().join("eval.log");
    for from in ["ggml_debug", "common_debug_cb_eval"] {
        let head = format!("{from}:                 inp_embd = (f32)   GET_ROWS(");
        fs::write(&path, head + "token_embd.weight{64, 96, 1, 1}, inp_tokens{3, 1, 1, 1}}) = {64, 3, 1, 1}\n   [\n    [\n     [     -0.0181,       0.0272,       0.0272, ...")
            .expect("written");
        refused(&path, "", "the first and the last three values");
    }
}

#[test]
fn a_pass_that_msprobe_or_sglang_dumped_is_judged_under_their_names() {
    let project = recorded("");
    let of_msprobe = |site: &str| match module_of(site) {
        name if name == site => name,
        module => format!("Module.{module}.Some_Class2.forward.0.output.0"),
    };
    renamed(&project, "msprobe.safetensors", of_msprobe);
    set(&project, "msprobe.safetensors", "names = \"msprobe\"\n");
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    let told = why(&project, 0);
    assert!(!told.contains("no tensor for"), "{told}");
    // The class may be left open in names of one's own, and be written out.
    let own = "[recorded.names]\npreset = \"msprobe\"\n\
               \"logits\" = \"Module.lm_head.Linear.forward.0.output.0\"\n\
               \"blk.*.q\" = \"Module.model.layers.*.self_attn.q_proj.{class}.forward.0.output.0\"\n";
    set(&project, "msprobe.safetensors", own);
    project.runner(&["check", "stages"]).expect(2, "`Module.lm_head.Linear.forward.0.output.0`");
    set(&project, "msprobe.safetensors", &own.replace("Linear", "Some_Class2"));
    project.runner(&["check", "stages"]).expect(0, "no problems found");

    // Fused products apart, which another test reads, and the last block's stream.
    let of_sglang = |site: &str, output: &str| {
        let (layer, inner) =
            site.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).unwrap_or_default();
        let next = layer.parse::<usize>().map_or(0, |layer| layer + 1);
        let name = match inner {
            "attn_norm" if layer != "0" => module_of(site) + output + ".0",
            "ffn_norm" => module_of(site) + output + ".0",
            "attn" => format!("model.layers.{layer}.self_attn.attn{output}"),
            "attn_residual" => format!("model.layers.{layer}.post_attention_layernorm{output}.1"),
            "ffn_residual" => format!("model.layers.{next}.input_layernorm{output}.1"),
            "ffn_swiglu" => format!("model.layers.{layer}.mlp.act_fn{output}"),
            _ if site == "output_norm" => format!("model.norm{output}.0"),
            _ if site == "logits" => return site.to_owned(),
            _ if module_of(site) == site => return site.to_owned(),
            _ => module_of(site) + output,
        };
        if output.is_empty() { name } else { format!("non_intrusive__{name}") }
    };
    for (preset, output) in [("sglang", ""), ("sglang-dumper", ".output")] {
        renamed(&project, "sglang.safetensors", |site| of_sglang(site, output));
        set(&project, "sglang.safetensors", &format!("names = \"{preset}\"\n"));
        project.runner(&["check", "stages"]).expect(0, "no problems found");
        let told = why(&project, 0);
        assert!(told.contains("for 20 of 63 sites: `blk.*.q` (as `"), "{told}");
    }
}

#[test]
fn a_dump_that_says_that_it_is_of_another_prompt_is_refused() {
    let project = recorded("");
    let bytes = fs::read(project.path("dump.safetensors")).expect("the dump");
    let dump = SafeTensors::deserialize(&bytes).expect("safetensors");
    let with_ids = |name: &str, ids: [i64; 4]| {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let ids = TensorView::new(Dtype::I64, vec![1, 4], &ids).expect("a view");
        let all = dump.tensors().into_iter().chain([(name.to_owned(), ids)]);
        fs::write(project.path("ids.safetensors"), serialize(all, None).expect("a file"))
            .expect("written");
    };
    let said = "token 0 of the recorded pass is 1, and it is";
    let embedding = "Module.model.embed_tokens.Embedding.forward.0.input.0";
    for (name, lines) in [
        (embedding, "names = \"msprobe\"\n"),
        ("model.forward_batch_info.input_ids", "names = \"sglang\"\n"),
        ("tokens", "names = { ids = \"tokens\" }\n"),
        ("ids", ""),
    ] {
        with_ids(name, [1, 1, 1, 1]);
        set(&project, "ids.safetensors", lines);
        project.run().expect(4, said);
    }
    set(&project, "ids.safetensors", "names = { ids = \"token\" }\n");
    project.runner(&["check", "stages"]).expect(2, "is called `token`, as `ids` is by");
}
