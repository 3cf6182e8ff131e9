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

/// What may stand in one place of the sources alone, and where: each guard is made once.
const GUARDED: [(&str, &[&str]); 11] = [
    ("eprint!", &[]),
    ("eprintln!", &[]),
    (" println!", &[]),
    (" print!", &[]),
    ("io::stderr().lock", &["terminal.rs"]),
    // The process server speaks to the runner, and `chip` writes as it computes.
    ("stdout().lock", &["terminal.rs", "executor/server.rs", "cli/chip.rs"]),
    ("Mmap::map(", &["files/mapped.rs"]),
    // What is asynchronous stays where stores are spoken to.
    ("async ", &["cache/remote/bucket.rs"]),
    ("tokio::", &["cache/remote/bucket.rs"]),
    (".is_control()", &["text.rs", "report/github.rs"]),
    // A keeper starts the user's programs; the others start the runner itself, the driver's own
    // tool, Slurm's, and what `--notify` names.
    (
        "Command::new(",
        &[
            "executor/keeper.rs",
            "executor/processes.rs",
            "executor/slots.rs",
            "executor/hook.rs",
            "executor/slurm/commands.rs",
            "cli/watch.rs",
        ],
    ),
];

/// Files that may open others without `files`: they open what the runner itself has written, or
/// the kernel's own.
const OPENING: [&str; 19] = [
    "files/mod.rs",
    "cache/",
    "cli/unchanged.rs",
    "cli/journal.rs",
    "cli/run.rs",
    "cli/watch.rs",
    "nightly/baseline.rs",
    "executor/attempt.rs",
    "executor/keeper.rs",
    "executor/slots.rs",
    "executor/slurm/folder.rs",
    "compute/cuda/",
    // A person names these files on the command line, and may name a pipe.
    "compute/emulated/vectors.rs",
    "compute/emulated/captures.rs",
    "compute/emulated/dequant.rs",
    "memory.rs",
    "report/log.rs",
    "falsify/",
    "cli/doctor.rs",
];

/// The part of a source file that is no test.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

#[test]
fn each_guard_stands_in_its_place_alone() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    files_below(&sources, &mut files);
    let mut beside = Vec::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|ending| ending == "rs")) {
        let name = file.strip_prefix(&sources).expect("below").display().to_string();
        let text = fs::read_to_string(file).expect("a source");
        for (number, line) in without_tests(&text).lines().enumerate() {
            if line.trim_start().starts_with("//") {
                continue;
            }
            let mut found = |word: &str| beside.push(format!("src/{name}:{}: {word}", number + 1));
            for (word, places) in GUARDED {
                let line = format!(" {line}");
                if line.contains(word) && !places.iter().any(|place| name == *place) {
                    found(word);
                }
            }
            let line = line.replace("TensorFile::open(", "");
            for word in ["File::open(", "fs::read(", "fs::read_to_string("] {
                if line.contains(word) && !OPENING.iter().any(|place| name.starts_with(place)) {
                    found(word);
                }
            }
        }
    }
    assert!(beside.is_empty(), "use `files`, `memory` or `terminal`:\n{}", beside.join("\n"));
}

/// What a document names in code, as `src/op.rs`, and where its links lead.
fn files_named_in(text: &str) -> Vec<&str> {
    let in_code = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)).filter(|word| {
        let open = word.contains(|c: char| c.is_whitespace() || c == '*') || word.contains("NAME");
        let starts = word.split_once('/').is_some_and(|(first, _)| {
            ["src", "tests", "docs", "scripts", "engines", "contracts", "examples", "runs"]
                .into_iter()
                .chain(["fuzz", "benches", "adapters", ".ci", ".github", ".githooks"])
                .any(|folder| folder == first)
        });
        starts && !open
    });
    let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    in_code.chain(links.filter(|link| !link.is_empty() && !link.contains("://"))).collect()
}

#[test]
fn what_contributing_and_the_index_of_documents_name_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut missing = Vec::new();
    for (document, folder) in
        [("CONTRIBUTING.md", "."), ("docs/README.md", "docs"), ("docs/release.md", ".")]
    {
        let text = fs::read_to_string(root.join(document)).expect("a document");
        let named = files_named_in(&text);
        assert!(named.len() > 3, "{document} names {named:?}");
        let lacking = named.into_iter().filter(|name| !root.join(folder).join(name).exists());
        missing.extend(lacking.map(|name| format!("{document}: {name}")));
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn the_index_of_documents_lists_them_all() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let index = fs::read_to_string(docs.join("README.md")).expect("the index");
    let entries = fs::read_dir(&docs).expect("docs").map(|entry| entry.expect("an entry").path());
    let names = entries
        .filter(|path| path.is_file())
        .filter_map(|path| path.file_name().and_then(|name| name.to_str()).map(str::to_owned));
    let left_out: Vec<String> =
        names.filter(|name| name != "README.md" && !index.contains(&format!("({name})"))).collect();
    assert!(left_out.is_empty(), "docs/README.md leaves out {left_out:?}");
}

#[test]
fn every_contract_of_the_repository_ships() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = fs::read_to_string(root.join("src/manifest/mod.rs")).expect("a source");
    for entry in fs::read_dir(root.join("contracts")).expect("contracts") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().and_then(|name| name.to_str()).expect("a name");
        let row = format!("(\"{name}\", include_str!(\"../../contracts/{name}.toml\"))");
        assert!(source.contains(&row), "SHIPPED_CONTRACTS lacks {name}");
        let text = fs::read_to_string(&path).expect("readable");
        assert!(
            text.lines().any(|line| line.replace(' ', "") == format!("name=\"{name}\"")),
            "{name}"
        );
    }
}
