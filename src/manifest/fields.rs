//! Takes a TOML table apart key by key, so that one wrong key hides no other.
//!
//! serde's derived structs stop at a file's first mistake, and report a missing
//! key at the table's end; here each key is read on its own, by serde, and what
//! nobody asked for is left over and reported. It knows TOML, not what the keys
//! mean.

use crate::text::Shown;
use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::problem::{At, Findings, Problem, quoted_list, short, suggest};

/// A value and where it was written; a default or an override has no place.
#[derive(Clone, Debug)]
pub(super) struct Put<T> {
    pub value: T,
    pub at: Option<At>,
}

impl<T> Put<T> {
    pub fn unwritten(value: T) -> Put<T> {
        Put { value, at: None }
    }

    pub fn map<U>(self, with: impl FnOnce(T) -> U) -> Put<U> {
        Put { value: with(self.value), at: self.at }
    }
}

/// The largest manifest or contract that is read.
const LARGEST: u64 = 1 << 20;

/// The text of a manifest, or a problem that says why there is none.
pub(super) fn read_text(path: &Path, findings: &mut Findings) -> Option<String> {
    let failed = |why: String, help: &str| Problem::new(why, help).in_path(path);
    let shown = path.shown();
    let about_access = "make the file readable, or move it out of the folder";

    let facts = match std::fs::metadata(path) {
        Ok(facts) => facts,
        Err(error) => {
            findings.push(failed(format!("cannot read `{shown}`: {error}"), about_access));
            return None;
        }
    };
    if leads_out(path) {
        findings.push(failed(
            format!("`{shown}` is a link that leads out of the project"),
            "put the file itself here: what a manifest may show is what lies in the project",
        ));
        return None;
    }
    if !facts.is_file() {
        findings.push(failed(
            format!("`{shown}` is not a regular file"),
            "manifests and contracts are plain TOML files; rename it or move it out of the folder",
        ));
        return None;
    }
    let bytes = match crate::files::read_whole(path, LARGEST) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::FileTooLarge => {
            findings.push(failed(
                format!("`{shown}` is larger than 1 MiB"),
                "a manifest is a short text; is this another file with the ending `.toml`?",
            ));
            return None;
        }
        Err(error) => {
            findings.push(failed(format!("cannot read `{shown}`: {error}"), about_access));
            return None;
        }
    };
    match String::from_utf8(bytes) {
        Ok(text) => Some(text),
        Err(error) => {
            let valid = error.utf8_error().valid_up_to();
            let line = 1 + error.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count();
            findings.push(failed(
                format!(
                    "`{shown}` is not UTF-8: byte {valid}, in line {line}, starts no character"
                ),
                "save the file as UTF-8",
            ));
            None
        }
    }
}

/// Whether a manifest or contract is a link to a file beyond the folder that holds its own:
/// messages show lines of what they are about, and not everything is to be shown.
fn leads_out(path: &Path) -> bool {
    let is_link = std::fs::symlink_metadata(path).is_ok_and(|facts| facts.is_symlink());
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok();
    let project = folder.as_deref().and_then(Path::parent);
    let real = path.canonicalize().ok();
    match (project, real) {
        (Some(project), Some(real)) => is_link && !real.starts_with(project),
        _ => is_link,
    }
}

/// Parses a whole text. Syntax errors are reported, and what could be read in
/// spite of them is still given, with `false`.
pub(super) fn parse<'text>(
    text: &'text str,
    source: usize,
    findings: &mut Findings,
) -> (DeTable<'text>, bool) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let sound = errors.is_empty();
    // What follows the first error is often its echo.
    for error in errors.into_iter().take(3) {
        let at = At { source, span: error.span().unwrap_or(0..0) };
        findings.push(
            Problem::new(
                format!("cannot parse `{}` as TOML", findings.path(source).shown()),
                "correct the syntax; the rest of this file was not checked",
            )
            .at(&at, error.message()),
        );
    }
    (table.into_inner(), sound)
}

/// A table under inspection. Ends with [`Fields::finish`].
pub(super) struct Fields<'text> {
    table: DeTable<'text>,
    source: usize,
    /// The table as a reader would name it: "the stage", "`[recipe]`".
    name: String,
    /// The heading that opened it; the file's first key for the top level.
    opening: Range<usize>,
    asked: Vec<&'static str>,
}

impl<'text> Fields<'text> {
    pub fn of_file(table: DeTable<'text>, source: usize, name: &str) -> Fields<'text> {
        let first = table.keys().map(|key| key.span()).min_by_key(|span| span.start);
        let opening = first.unwrap_or(0..0);
        Fields { table, source, name: name.into(), opening, asked: Vec::new() }
    }

    pub fn at(&self, span: Range<usize>) -> At {
        At { source: self.source, span }
    }

    pub fn opening(&self) -> At {
        self.at(self.opening.clone())
    }

    /// Where a key is written, if it is.
    pub fn key_at(&self, key: &str) -> Option<At> {
        self.table.get_key_value(key).map(|(key, _)| self.at(key.span()))
    }

    fn remove(&mut self, key: &'static str) -> Option<(Range<usize>, Spanned<DeValue<'text>>)> {
        self.asked.push(key);
        let (written, value) = self.table.remove_entry(key)?;
        Some((written.span(), value))
    }

    /// Counts a key among the known ones without reading it.
    pub fn skip(&mut self, key: &'static str) {
        let _ = self.remove(key);
    }

    /// Whether a key's value is a text.
    pub fn is_text(&self, key: &str) -> bool {
        self.table.get(key).is_some_and(|value| matches!(value.get_ref(), DeValue::String(_)))
    }

    /// The entries of a table of texts, each key with its place.
    pub fn texts(
        &mut self,
        key: &'static str,
        findings: &mut Findings,
    ) -> Vec<(Put<String>, Put<String>)> {
        let Some(table) = self.table(key, findings) else { return Vec::new() };
        let source = table.source;
        let mut texts = Vec::new();
        for (name, value) in table.table {
            let at = |span| Some(At { source, span });
            let (name, value_at) =
                (Put { at: at(name.span()), value: name.into_inner().to_string() }, value.span());
            match value.into_inner() {
                DeValue::String(text) => {
                    texts.push((name, Put { at: at(value_at), value: text.to_string() }));
                }
                _ => findings.push(
                    Problem::new(
                        format!("`{}` of `[{key}]` is not a text", short(&name.value)),
                        "write a name in quotes",
                    )
                    .at_if(at(value_at).as_ref(), "expected a text"),
                ),
            }
        }
        texts
    }

    /// A key's value, or nothing where it is absent or wrong.
    pub fn take<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
        findings: &mut Findings,
    ) -> Option<Put<T>> {
        let (_, value) = self.remove(key)?;
        self.convert(key, value, findings)
    }

    /// As [`Fields::take`], and its absence is a problem.
    pub fn need<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
        example: &str,
        findings: &mut Findings,
    ) -> Option<Put<T>> {
        if !self.table.contains_key(key) {
            self.asked.push(key);
            findings.push(
                Problem::new(
                    format!("{} has no `{key}`", self.name),
                    format!("add `{key} = {example}`"),
                )
                .at(&self.opening(), format!("`{key}` is missing")),
            );
            return None;
        }
        self.take(key, findings)
    }

    /// A list's elements, each with its own place; wrong elements are reported
    /// and left out, and `None` means that it is no list at all or absent.
    pub fn list<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
        findings: &mut Findings,
    ) -> Option<Put<Vec<Put<T>>>> {
        let (_, value) = self.remove(key)?;
        let at = self.at(value.span());
        let DeValue::Array(array) = value.into_inner() else {
            findings.push(
                Problem::new(
                    format!("`{key}` of {} is not a list", self.name),
                    format!("write `{key} = [...]`"),
                )
                .at(&at, "expected a list"),
            );
            return None;
        };
        let count = array.len();
        let value: Vec<Put<T>> =
            array.into_iter().filter_map(|value| self.convert(key, value, findings)).collect();
        // A list that lost elements is wrong as a whole; checking on would mislead.
        (value.len() == count).then_some(Put { value, at: Some(at) })
    }

    /// As [`Fields::list`], and its absence is a problem.
    pub fn need_list<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
        example: &str,
        findings: &mut Findings,
    ) -> Option<Put<Vec<Put<T>>>> {
        if self.table.contains_key(key) {
            self.list(key, findings)
        } else {
            self.need::<bool>(key, example, findings);
            None
        }
    }

    /// One of a few names.
    pub fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
        findings: &mut Findings,
    ) -> Option<Put<T>> {
        let written: Put<String> = self.take(key, findings)?;
        choose(key, written, choices, findings)
    }

    /// A nested table.
    pub fn table(&mut self, key: &'static str, findings: &mut Findings) -> Option<Fields<'text>> {
        let (opening, value) = self.remove(key)?;
        match value.into_inner() {
            DeValue::Table(table) => Some(self.nested(table, format!("`[{key}]`"), opening)),
            _ => {
                self.not_a_table(key, opening, &format!("[{key}]"), findings);
                None
            }
        }
    }

    /// The tables of `[[key]]`.
    pub fn tables(&mut self, key: &'static str, findings: &mut Findings) -> Vec<Fields<'text>> {
        let Some((opening, value)) = self.remove(key) else { return Vec::new() };
        let heading = format!("[[{key}]]");
        let DeValue::Array(array) = value.into_inner() else {
            self.not_a_table(key, opening, &heading, findings);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for value in array {
            let span = value.span();
            match value.into_inner() {
                DeValue::Table(table) => {
                    tables.push(self.nested(table, format!("`{heading}`"), span));
                }
                _ => self.not_a_table(key, span, &heading, findings),
            }
        }
        tables
    }

    /// The tables of a table whose keys are names.
    pub fn into_tables(self, findings: &mut Findings) -> Vec<(String, Fields<'text>)> {
        let (source, outer) = (self.source, self.name);
        let mut tables = Vec::new();
        for (key, value) in self.table {
            let (opening, name) = (key.span(), key.into_inner().to_string());
            match value.into_inner() {
                DeValue::Table(table) => {
                    let inner = format!("`{name}` of {outer}");
                    tables.push((
                        name,
                        Fields { table, source, name: inner, opening, asked: Vec::new() },
                    ));
                }
                _ => findings.push(
                    Problem::new(
                        format!("`{}` of {outer} is not a table", short(&name)),
                        "write its keys below a heading of its own",
                    )
                    .at(&At { source, span: opening }, "expected a table"),
                ),
            }
        }
        tables
    }

    fn nested(&self, table: DeTable<'text>, name: String, opening: Range<usize>) -> Fields<'text> {
        Fields { table, source: self.source, name, opening, asked: Vec::new() }
    }

    fn not_a_table(&self, key: &str, span: Range<usize>, heading: &str, findings: &mut Findings) {
        findings.push(
            Problem::new(
                format!("`{key}` of {} is not a table", self.name),
                format!("write `{heading}` on a line of its own, and its keys below"),
            )
            .at(&self.at(span), "expected a table"),
        );
    }

    fn convert<T: DeserializeOwned>(
        &self,
        key: &'static str,
        value: Spanned<DeValue<'text>>,
        findings: &mut Findings,
    ) -> Option<Put<T>> {
        let at = self.at(value.span());
        match T::deserialize(ValueDeserializer::from(value)) {
            Ok(value) => Some(Put { value, at: Some(at) }),
            Err(error) => {
                let place = self.at(error.span().unwrap_or(at.span));
                findings.push(
                    Problem::new(
                        format!("`{key}` of {} has a value of the wrong kind", self.name),
                        "correct the value",
                    )
                    .at(&place, error.message()),
                );
                None
            }
        }
    }

    /// The keys nobody asked for whose values are tables, taken out.
    pub fn other_tables(&mut self) -> Vec<(String, At)> {
        let others: Vec<(String, At)> = self
            .table
            .iter()
            .filter(|(_, value)| value.get_ref().is_table())
            .map(|(key, _)| (key.get_ref().to_string(), self.at(key.span())))
            .collect();
        for (name, _) in &others {
            self.table.remove(name.as_str());
        }
        others
    }

    /// What is left over was not understood.
    pub fn finish(self, findings: &mut Findings) {
        for (key, _) in &self.table {
            let list = format!("{} knows {}", self.name, quoted_list(&self.asked));
            findings.push(
                Problem::new(
                    format!("{} has an unknown key `{}`", self.name, short(key.get_ref())),
                    suggest(key.get_ref(), self.asked.iter().copied(), &list),
                )
                .at(&self.at(key.span()), "unknown key"),
            );
        }
    }
}

/// The choice that a text names.
pub(super) fn choose<T: Copy>(
    key: &str,
    written: Put<String>,
    choices: &[(&str, T)],
    findings: &mut Findings,
) -> Option<Put<T>> {
    if let Some((_, value)) = choices.iter().find(|(name, _)| *name == written.value) {
        return Some(Put { value: *value, at: written.at });
    }
    let names = choices.iter().map(|(name, _)| *name);
    let help = suggest(
        &written.value,
        names.clone(),
        &format!("`{key}` is one of {}", quoted_list(names)),
    );
    findings.push(
        Problem::new(format!("`{key}` cannot be `{}`", short(&written.value)), help)
            .at_if(written.at.as_ref(), "unknown value"),
    );
    None
}
