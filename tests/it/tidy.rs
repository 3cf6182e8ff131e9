//! The project's rules about itself: a clone stands alone. No tracked file names a path beside
//! the checkout, or the host of a package registry; only CI's script may.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that are no part of the project, and what only CI runs.
const PASSED_OVER: [&str; 7] =
    [".git", ".ci", "target", "node_modules", "models", ".carry", "__pycache__"];

/// Written in two halves, so that this file does not find itself.
fn forbidden() -> Vec<String> {
    let halves = [
        ("../", "shared"),
        ("/work/", "shared"),
        ("registry.", "npmjs.org"),
        ("pypi.", "org"),
        ("files.", "pythonhosted.org"),
        ("crates", ".io"),
        ("hugging", "face.co/"),
    ];
    halves.map(|(start, end)| format!("{start}{end}")).into()
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of the project") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let is_link = path.symlink_metadata().expect("its kind").is_symlink();
        if is_link || PASSED_OVER.contains(&name.as_str()) {
            continue;
        }
        // Runs that a person made here are theirs.
        let run = folder.ends_with("runs") && name != "receipts";
        if path.is_dir() && !run {
            files_below(&path, found);
        } else if path.is_file() && !name.ends_with(".lock") && name != "package-lock.json" {
            found.push(path);
        }
    }
}

#[test]
fn no_file_names_a_path_beside_the_checkout_or_the_host_of_a_registry() {
    let mut files = Vec::new();
    files_below(Path::new(env!("CARGO_MANIFEST_DIR")), &mut files);
    assert!(files.len() > 100, "only {} files were found", files.len());
    let mut named = Vec::new();
    for file in files {
        // Files of tensors and pictures are no text.
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for (number, line) in text.lines().enumerate() {
            for word in forbidden().iter().filter(|word| line.contains(word.as_str())) {
                named.push(format!("{}:{}: {word}", file.display(), number + 1));
            }
        }
    }
    assert!(named.is_empty(), "{}", named.join("\n"));
}
