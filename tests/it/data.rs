//! Data of tests that are too large for the project. The folder that RUNNER_DATA names holds
//! `tensor-core-vectors/` (the whole hardware vectors), `h200/gemm-captures.safetensors` (the
//! whole captured GEMMs) and `golden/smollm2-135m-q4_1.safetensors` (a forward pass in f64 by
//! another program). What the other tests need is in the project.

use std::path::PathBuf;

/// The path of a file or folder of the data. A missing one is a failure, never a pass.
pub fn large(name: &str) -> PathBuf {
    let folder = std::env::var_os("RUNNER_DATA")
        .unwrap_or_else(|| panic!("set RUNNER_DATA to the folder that holds `{name}`"));
    let path = PathBuf::from(folder).join(name);
    assert!(path.exists(), "RUNNER_DATA has no `{name}`: `{}` is missing", path.display());
    path
}

/// A file or folder of the project.
pub fn own(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}
