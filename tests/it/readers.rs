//! The readers of tensors against files that NumPy, `gguf` and `safetensors` wrote
//! (`tests/adapters/write_fixtures.py`), and against what becomes of such files.

use std::fs;
use std::path::{Path, PathBuf};

use runner::dtype::Format;
use runner::op::FileTensor;
use runner::tensor_file::read;

const ROWS: usize = 3;

/// The files as they are kept here, or as CI has just written them.
fn folder() -> PathBuf {
    match std::env::var_os("RUNNER_READER_FIXTURES") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/readers"),
    }
}

fn wanted(file: PathBuf, tensor: &str) -> FileTensor {
    let tensor = Some(tensor.to_owned()).filter(|name| !name.is_empty());
    FileTensor { file, tensor, format: None, shape: None, scale: None }
}

fn expected(name: &str) -> Vec<f32> {
    let bytes = fs::read(folder().join(format!("{name}.expected"))).expect("the values");
    bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// The tensor's values in every bit.
#[track_caller]
fn same(wanted: &FileTensor, name: &str) {
    let values = read(wanted).unwrap_or_else(|error| panic!("{name}: {error}")).values();
    let expected = expected(name);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(values.rows(), ROWS, "{name}");
    assert_eq!(bits(values.data()), bits(&expected), "{name}");
}

#[test]
fn every_format_is_read_as_its_own_writer_reads_it() {
    let file = |name: &str| folder().join(name);
    for name in ["f2", "f4", "f8", "version2", "column"] {
        same(&wanted(file(&format!("{name}.npy")), ""), name);
    }
    for name in ["stored", "compressed"] {
        same(&wanted(file(&format!("{name}.npz")), "hidden"), name);
        same(&wanted(file(&format!("{name}.npz")), "half"), "f2");
    }
    for name in ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] {
        same(&wanted(file("tensors.gguf"), name), name);
    }
    for name in ["f32", "f16", "bf16", "e4m3", "e5m2"] {
        same(&wanted(file("tensors.safetensors"), name), name);
    }
    let shape = Some(vec![ROWS, 32]);
    same(&FileTensor { format: Some(Format::F32), shape, ..wanted(file("raw.bin"), "") }, "raw");
    // NumPy has no bf16: a library keeps its codes as plain words.
    let codes = wanted(file("codes.npy"), "");
    same(&FileTensor { format: Some(Format::Bf16), ..codes.clone() }, "codes");
    refused(&codes, "say which codes they are by `dtype`, one of bf16, f16");
}

#[track_caller]
fn refused(wanted: &FileTensor, words: &str) {
    let error = read(wanted).expect_err(words).to_string();
    assert!(error.contains(words), "{error}");
    let name = wanted.file.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(error.contains(&name), "it says of which file: {error}");
}

#[test]
fn what_is_not_read_is_refused_with_the_remedy() {
    let file = |name: &str| folder().join(name);
    refused(&wanted(file("fortran.npy"), ""), "save it with numpy.ascontiguousarray");
    refused(&wanted(file("big-endian.npy"), ""), "`>f4` is not little-endian numbers; save it as");
    refused(&wanted(file("stored.npz"), "hiden"), "has no tensor `hiden`; it has `hidden` f32");
    refused(&wanted(file("tensors.gguf"), "f64"), "has no tensor `f64`; it has `f32` f32 [3, 32]");
    refused(
        &wanted(file("tensors.safetensors"), "E4M3"),
        "has no tensor `E4M3`; it has `bf16` bf16 [3, 32], `e4m3` e4m3 [3, 32], `e5m2`",
    );
    let other_shape = FileTensor { shape: Some(vec![32, 3]), ..wanted(file("f4.npy"), "") };
    refused(&other_shape, "has the shape [3, 32], and [32, 3] was asked for");
    let other_type =
        FileTensor { format: Some(Format::E5m2), ..wanted(file("tensors.safetensors"), "e4m3") };
    refused(&other_type, "is stored as e4m3, and not as e5m2");
    let nan = read(&wanted(file("nan.npy"), "")).expect("NaN is a value that is measured");
    assert!(nan.values().data()[34].is_nan());
}

#[test]
fn half_a_file_is_no_tensor_wherever_it_ends() {
    let work = tempfile::tempdir().expect("a folder");
    let names = [
        ("f4.npy", ""),
        ("stored.npz", "hidden"),
        ("compressed.npz", "hidden"),
        ("tensors.gguf", "q4_1"),
        ("tensors.safetensors", "e5m2"),
    ];
    for (name, tensor) in names {
        let whole = fs::read(folder().join(name)).expect("a file");
        // GGUF pads its last tensor to 32 bytes, of which nobody reads the last four.
        let end = whole.len() - if name.ends_with(".gguf") { 4 } else { 0 };
        // Every length up to the header's end, then in steps, and one byte less than all.
        let lengths = (0..end.min(160)).chain((160..end).step_by(37));
        for length in lengths.chain([end - 1]) {
            let file = work.path().join(name);
            fs::write(&file, &whole[..length]).expect("written");
            let error = read(&wanted(file, tensor)).expect_err(name).to_string();
            assert!(error.contains(name), "{length} bytes of {name}: {error}");
        }
    }
}
