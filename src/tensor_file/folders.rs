//! Folders with a file for each tensor: `.npy` and `.pt` under their own names, dumps of
//! msprobe and of SGLang's dumper, and iterations of Polygraphy.
//!
//! It knows which files belong to a folder and what their tensors are called, not what is in them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::text::Shown;

/// The files in which msprobe says what it dumped: of modules, and of `debugger.save`.
const ABOUT: [&str; 2] = ["dump.json", "debug.json"];
/// The folder beside it.
const DATA: &str = "dump_tensor_data";
/// Nobody dumps so many tensors.
const LARGEST: u64 = 1 << 30;
/// Folders that are looked into for a dump that was meant.
const LOOKED_INTO: usize = 64;

/// A folder of tensors.
pub(super) struct Folder {
    /// What msprobe says of its files.
    about: Option<PathBuf>,
    /// The files of tensors, sorted, each with the name of its tensor.
    pub files: Vec<(PathBuf, String)>,
}

impl Folder {
    /// Looks a folder through, without reading a file.
    pub(super) fn of(path: &Path) -> Folder {
        let about = ABOUT.iter().map(|name| path.join(name)).find(|about| about.is_file());
        if about.is_some() {
            let files = sorted(&path.join(DATA), &["npy", "pt", "pth"]);
            return Folder { about, files: named(files, stem) };
        }
        let files = sorted(path, &["npy", "pt", "pth"]);
        if !files.is_empty() {
            let dumped = !files.iter().any(|file| fields(file).is_none());
            let files = if dumped { of_dumper(files) } else { named(files, stem) };
            return Folder { about: None, files };
        }
        // Polygraphy numbers the files of its iterations.
        let mut files = sorted(path, &["json"]);
        files.retain(|file| stem(file).bytes().all(|byte| byte.is_ascii_digit()));
        let only = files.len() == 1;
        let number = |file: &Path| match stem(file).trim_start_matches('0') {
            _ if only => String::new(),
            "" => "0".to_owned(),
            number => number.to_owned(),
        };
        Folder { about: None, files: named(files, number) }
    }

    /// Every file that is read.
    pub(super) fn all(&self) -> Vec<PathBuf> {
        self.about.iter().chain(self.files.iter().map(|(file, _)| file)).cloned().collect()
    }

    /// Refuses a dump whose list says more than there is.
    ///
    /// # Errors
    /// With the file that says so, and why.
    pub(super) fn check(&self) -> Result<(), (PathBuf, String)> {
        let Some(about) = &self.about else { return Ok(()) };
        let problem = |problem: String| (about.clone(), problem);
        let text =
            crate::files::read_whole(about, LARGEST).map_err(|error| problem(error.to_string()))?;
        let whole: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| problem(format!("{error}")))?;
        let mut said = BTreeSet::new();
        data_names(&whole, &mut said);
        if said.is_empty() {
            return Err(problem(
                "it holds statistics and names no tensor's file; dump again with `\"task\": \
                 \"tensor\"` in msprobe's configuration"
                    .to_owned(),
            ));
        }
        let there: BTreeSet<String> = self.files.iter().map(|(file, _)| file_name(file)).collect();
        let missing: Vec<&str> = said.difference(&there).map(String::as_str).collect();
        match missing.first() {
            None => Ok(()),
            Some(first) => Err(problem(format!(
                "{} of {} files that it names are not in `{DATA}`, such as `{}`; copy the whole \
                 dump, or name the folder `{DATA}` itself to read what there is",
                missing.len(),
                said.len(),
                crate::text::shown(first)
            ))),
        }
    }
}

/// The name of a tensor of a file that has a name itself. A file of SGLang's dumper holds its
/// tensor as `value`.
pub(super) fn joined(file: &str, tensor: &str, iteration: bool) -> String {
    match tensor.strip_prefix("value").unwrap_or(tensor) {
        _ if iteration && file.is_empty() => tensor.to_owned(),
        _ if iteration => format!("{file}/{tensor}"),
        "" => file.to_owned(),
        inner if inner.starts_with('.') => format!("{file}{inner}"),
        _ => format!("{file}.{tensor}"),
    }
}

/// Why a folder holds nothing to read, and what may have been meant.
pub(super) fn empty(path: &Path) -> String {
    let mut text = "this folder holds no `.npy` or `.pt` file; it needs one for each tensor, with \
                    the tensor's name"
        .to_owned();
    if let Some(meant) = within(path) {
        text += &format!("; did you mean `{}`?", meant.shown());
    }
    text
}

/// A dump some folders further in.
fn within(path: &Path) -> Option<PathBuf> {
    let mut level = vec![path.to_owned()];
    for _ in 0..3 {
        let inner = level.iter().flat_map(|folder| {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).filter(|path| path.is_dir())
        });
        let mut inner: Vec<PathBuf> = inner.take(LOOKED_INTO).collect();
        inner.sort();
        if let Some(found) = inner.iter().find(|folder| !Folder::of(folder).files.is_empty()) {
            return Some(found.clone());
        }
        level = inner;
    }
    None
}

fn sorted(path: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    let fits = |file: &PathBuf| {
        let ending = file.extension().and_then(|ending| ending.to_str());
        ending.is_some_and(|ending| endings.contains(&ending)) && file.is_file()
    };
    files.retain(fits);
    files.sort();
    files
}

fn named(files: Vec<PathBuf>, name: impl Fn(&Path) -> String) -> Vec<(PathBuf, String)> {
    let with_name = |file: PathBuf| {
        let name = name(&file);
        (file, name)
    };
    files.into_iter().map(with_name).collect()
}

fn stem(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn file_name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn data_names(value: &serde_json::Value, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(pairs) => {
            if let Some(name) = pairs.get("data_name").and_then(|name| name.as_str())
                && (name.ends_with(".pt") || name.ends_with(".npy"))
            {
                found.insert(name.to_owned());
            }
            pairs.values().for_each(|value| data_names(value, found));
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| data_names(item, found)),
        _ => {}
    }
}

/// What a file of SGLang's dumper says in its name, as `step=0___rank=0___name=attn_out`; nothing
/// if it is no such file.
fn fields(file: &Path) -> Option<Vec<(String, String)>> {
    let stem = stem(file);
    let fields: Option<Vec<(String, String)>> = stem
        .split("___")
        .map(|field| field.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned())))
        .collect();
    let fields = fields?;
    let has = |key: &str| fields.iter().any(|(known, _)| known == key);
    (has("name") && has("dump_index") && has("step") && has("rank")).then_some(fields)
}

/// Fields that every file has, and that tell tensors apart only where they differ.
fn is_common(key: &str) -> bool {
    key == "step" || key == "recompute_status" || key == "rank" || key.ends_with("_rank")
}

/// The names of tensors of a dump: the `name` that was given, with the fields behind it that
/// tell them apart. The number of the layer is left out where the name has it.
fn of_dumper(files: Vec<PathBuf>) -> Vec<(PathBuf, String)> {
    let all: Vec<Vec<(String, String)>> =
        files.iter().map(|file| fields(file).unwrap_or_default()).collect();
    let mut values: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (key, value) in all.iter().flatten() {
        values.entry(key).or_default().insert(value);
    }
    let differs = |key: &str| values.get(key).is_some_and(|values| values.len() > 1);
    let of = |fields: &[(String, String)], key: &str| {
        fields.iter().find(|(known, _)| known == key).map(|(_, value)| value.clone())
    };
    let short = |fields: &Vec<(String, String)>| {
        let mut text = of(fields, "name").unwrap_or_default();
        let name = text.clone();
        for (key, value) in fields {
            let told = match key.as_str() {
                "name" | "dump_index" => continue,
                "layer_id" => !format!(".{name}.").contains(&format!(".layers.{value}.")),
                key if is_common(key) => differs(key),
                _ => true,
            };
            if told {
                text += &format!("___{key}={value}");
            }
        }
        text
    };
    let names: Vec<String> = all.iter().map(short).collect();
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    names.iter().for_each(|name| *times.entry(name).or_default() += 1);
    let whole = |(place, name): (usize, &String)| match times[name.as_str()] {
        1 => name.clone(),
        _ => format!("{name}___dump_index={}", of(&all[place], "dump_index").unwrap_or_default()),
    };
    let names: Vec<String> = names.iter().enumerate().map(whole).collect();
    files.into_iter().zip(names).collect()
}
