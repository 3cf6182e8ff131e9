//! `runner capture` where llama.cpp is not what it must be. What it records of a real one is
//! held to the adapter's bytes by `tests/adapters/examples.py`.

use std::path::Path;
use std::process::Command;

use crate::command::Project;
use crate::data::own;

/// A folder of libraries that `tests/it/foreign_llama.c` is compiled to.
fn libraries(project: &Project, folder: &str, options: &[&str]) {
    let folder = project.path(folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    for name in ["libggml-base.so", "libggml.so", "libllama.b9999.so"] {
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(folder.join(name)).args(options);
        let compiled = compiler.arg(own("tests/it/foreign_llama.c")).status();
        assert!(compiled.expect("a C compiler").success());
    }
}

fn arguments<'a>(model: &'a Path, library: &'a str) -> [&'a str; 10] {
    let model = model.to_str().expect("text");
    [
        "capture",
        "llama.cpp",
        "--model",
        model,
        "--tokens",
        "1,2",
        "--out",
        "c.st",
        "--library",
        library,
    ]
}

#[test]
fn a_llama_cpp_that_is_not_known_is_refused_before_it_is_used() {
    let project = Project::new();
    let model = own("examples/llama-cpp-cuda/model.gguf");
    let words = "cannot open llama.cpp's library `nowhere/libggml-base.so`";
    let told = project.runner(&arguments(&model, "nowhere")).expect(2, words);
    assert!(told.err.contains("name the folder of `libllama.so` by --library"), "{}", told.err);
    libraries(&project, "older", &["-DOLDER"]);
    project.runner(&arguments(&model, "older")).expect(2, "llama_get_logits_ith");
    libraries(&project, "other", &[]);
    let words = "keeps a context's parameters in another form than the builds that are known";
    project.runner(&arguments(&model, "other")).expect(2, words);
    assert!(!project.path("c.st").exists());
}

#[test]
fn what_is_asked_of_a_capture_is_checked_before_a_library_is_opened() {
    let project = Project::new();
    let model = own("examples/llama-cpp-cuda/model.gguf");
    let mut asked = arguments(&model, "nowhere").to_vec();
    asked[5] = "4294967295";
    project.runner(&asked).expect(2, "a token's id is below 2147483648");
    asked[5] = "1";
    asked.extend(["--decode", "18446744073709551615"]);
    project.runner(&asked).expect(2, "a pass has at most 1048576 tokens");
    asked[1] = "vllm";
    project.runner(&asked).expect(2, "unrecognized subcommand");
}
