//! Digests the sources that decide what an arm computes and what is measured,
//! so that a result of other code is never reused.

use std::path::{Path, PathBuf};

fn main() {
    let of_arms = [
        "src/compute",
        "src/model",
        "src/chip.rs",
        "src/dtype.rs",
        "src/engine.rs",
        "src/layer_sites.rs",
        "src/op.rs",
        "src/random.rs",
        "src/tensor.rs",
        "src/tensor_file",
        "src/vector.rs",
    ];
    let of_measures = ["src/compare", "src/judge", "src/metric.rs"];
    println!("cargo::rustc-env=RUNNER_ARMS_CODE={}", digest(&of_arms));
    println!("cargo::rustc-env=RUNNER_MEASURES_CODE={}", digest(&of_measures));
}

fn digest(places: &[&str]) -> String {
    let mut files = Vec::new();
    for place in places {
        println!("cargo::rerun-if-changed={place}");
        collect(Path::new(place), &mut files);
    }
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let text = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        for part in [file.to_string_lossy().as_bytes(), &text] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    if path.is_dir() {
        let entries = std::fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for entry in entries {
            collect(&entry.expect("a folder's entry").path(), files);
        }
    } else {
        files.push(path.to_owned());
    }
}
