//! Problems of a folder of manifests: collected, ordered, and drawn with the
//! line and a caret.
//!
//! It knows texts and places in them. It knows neither TOML nor stages.

use crate::text::{Shown, one_line};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

/// Everything that is wrong with a folder of manifests, in the order of files
/// and lines. Displays as plain text; [`Problems::render`] also draws colour.
#[derive(Clone, Debug)]
pub struct Problems {
    sources: Vec<Source>,
    list: Vec<Problem>,
}

/// Stands for a file where a value was typed.
const TYPED: &str = "the command line";

/// How many problems are drawn in full; the rest is counted.
const SHOWN: usize = 50;

impl Problems {
    /// How many problems there are; at least one.
    #[expect(clippy::len_without_is_empty, reason = "problems without a problem do not exist")]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// The headline of each problem, in the order in which they are drawn.
    pub fn titles(&self) -> impl Iterator<Item = &str> {
        self.list.iter().map(|problem| problem.title.as_str())
    }

    /// Every problem with file, line, caret and remedy, and a closing count.
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let mut text = String::new();
        for problem in self.list.iter().take(SHOWN) {
            text.push_str(&renderer.render(&[self.draw(problem)]));
            text.push_str("\n\n");
        }
        if self.list.len() > SHOWN {
            text.push_str(&format!("and {} more\n\n", self.list.len() - SHOWN));
        }
        text.push_str(&self.count());
        text
    }

    fn draw<'a>(&'a self, problem: &'a Problem) -> Group<'a> {
        let mut group = Group::with_title(Level::ERROR.primary_title(one_line(&problem.title)));
        // One snippet per file, the first spot's file first.
        let mut drawn: Vec<usize> = Vec::new();
        for spot in &problem.spots {
            if drawn.contains(&spot.at.source) {
                continue;
            }
            drawn.push(spot.at.source);
            let source = &self.sources[spot.at.source];
            if source.outside {
                let line = source.text[..source.drawable(&spot.at.span).start].lines().count();
                let origin = Origin::path(source.path.shown().to_string()).line(line.max(1));
                let why = "it lies outside of the project, so its lines are not shown";
                group = group.element(origin).element(Level::NOTE.message(why));
                continue;
            }
            let mut snippet = Snippet::source(&*source.text).path(source.path.shown().to_string());
            for (index, other) in problem.spots.iter().enumerate() {
                if other.at.source == spot.at.source {
                    let kind =
                        if index == 0 { AnnotationKind::Primary } else { AnnotationKind::Context };
                    snippet = snippet.annotation(
                        kind.span(source.drawable(&other.at.span)).label(one_line(&other.label)),
                    );
                }
            }
            group = group.element(snippet);
        }
        if let Some(path) = &problem.path {
            group = group.element(Origin::path(path.shown().to_string()));
        }
        group.element(Level::HELP.message(lines_of(&problem.help)))
    }

    fn count(&self) -> String {
        let files: BTreeSet<&Path> = self
            .list
            .iter()
            .filter_map(|problem| match problem.spots.first() {
                Some(spot) => Some(self.sources[spot.at.source].path.as_path()),
                None => problem.path.as_deref().filter(|path| *path != Path::new(TYPED)),
            })
            .collect();
        let problems = plural(self.list.len(), "problem");
        match files.len() {
            0 => format!("{problems}; nothing was run"),
            n => format!("{problems} in {}; nothing was run", plural(n, "file")),
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Problems {}

/// A text that was read, kept for drawing.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub path: PathBuf,
    pub text: String,
    /// Whether it lies elsewhere than what was asked for: a stranger's folder may name any file.
    pub outside: bool,
}

impl Source {
    /// The span within the text and on character boundaries; a span over
    /// several lines (a table, an array) is drawn by its first line.
    fn drawable(&self, span: &Range<usize>) -> Range<usize> {
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let mut end = span.end.clamp(start, self.text.len());
        if let Some(line) = self.text[start..].find(['\n', '\r']) {
            end = end.min(start + line);
        }
        while !self.text.is_char_boundary(end) {
            end += 1;
        }
        start..end
    }
}

/// A place in one of the sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub source: usize,
    pub span: Range<usize>,
}

/// A place with what to say about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub at: At,
    pub label: String,
}

/// One problem: what is wrong, where, and the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    title: String,
    spots: Vec<Spot>,
    path: Option<PathBuf>,
    help: String,
}

impl Problem {
    pub fn new(title: impl Into<String>, help: impl Into<String>) -> Problem {
        Problem { title: title.into(), spots: Vec::new(), path: None, help: help.into() }
    }

    /// Adds a place; the first one is the primary.
    pub fn at(mut self, at: &At, label: impl Into<String>) -> Problem {
        self.spots.push(Spot { at: at.clone(), label: label.into() });
        self
    }

    /// As [`Problem::at`], where the value came from a text at all.
    pub fn at_if(self, at: Option<&At>, label: impl Into<String>) -> Problem {
        match at {
            Some(at) => self.at(at, label),
            None => self,
        }
    }

    /// Names a file or folder without a place in it.
    pub fn in_path(mut self, path: &Path) -> Problem {
        self.path = Some(path.to_owned());
        self
    }
}

/// What belongs to a folder of stages: its repository, the nearest folder with `.git`, or where
/// there is none the folder above it. Nothing if that is not there.
pub(crate) fn yard_of(folder: &Path) -> Option<PathBuf> {
    let above = std::path::absolute(folder).ok()?;
    let above = above.parent()?.canonicalize().ok()?;
    let repository = above.ancestors().find(|folder| folder.join(".git").exists());
    Some(repository.map_or_else(|| above.clone(), Path::to_owned))
}

/// Collects problems and the sources that they point into.
#[derive(Default)]
pub(super) struct Findings {
    sources: Vec<Source>,
    list: Vec<Problem>,
    root: Option<PathBuf>,
}

impl Findings {
    /// Findings in a folder of stages. What lies outside of its yard is a stranger's to name and not
    /// to show.
    pub fn of(folder: &Path) -> Findings {
        Findings { root: yard_of(folder), ..Findings::default() }
    }

    /// Keeps a text for drawing and gives its number.
    pub fn add_source(&mut self, path: PathBuf, text: String) -> usize {
        self.sources.push(Source { path, text, outside: false });
        self.sources.len() - 1
    }

    pub fn path(&self, source: usize) -> &Path {
        &self.sources[source].path
    }

    pub fn push(&mut self, mut problem: Problem) {
        // Defaults are sound and manifests have places: what is left was typed.
        if problem.spots.is_empty() && problem.path.is_none() {
            problem.path = Some(TYPED.into());
        }
        self.list.push(problem);
    }

    /// `value` if nothing was found, else everything that was.
    pub fn into_result<T>(mut self, value: T) -> Result<T, Problems> {
        if self.list.is_empty() {
            return Ok(value);
        }
        if let Some(root) = &self.root {
            for source in &mut self.sources {
                source.outside =
                    source.path.canonicalize().map_or(true, |path| !path.starts_with(root));
            }
        }
        let sources = &self.sources;
        self.list.sort_by_cached_key(|problem| match problem.spots.first() {
            Some(Spot { at, .. }) => {
                (sources[at.source].path.clone(), at.span.start, problem.title.clone())
            }
            None => (problem.path.clone().unwrap_or_default(), 0, problem.title.clone()),
        });
        // A setting that several stages inherit is wrong once, not once per stage.
        self.list.dedup();
        Err(Problems { sources: self.sources, list: self.list })
    }
}

/// As [`one_line`], each line for itself.
fn lines_of(text: &str) -> String {
    text.split('\n').map(one_line).collect::<Vec<_>>().join("\n")
}

/// `1 file`, `2 files`.
pub(crate) fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// `` `a`, `b` and `c` ``; a long list is cut and counted.
pub(crate) fn quoted_list<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    const LISTED: usize = 24;
    let mut rest = names.into_iter();
    let names: Vec<String> =
        rest.by_ref().take(LISTED).map(|name| format!("`{}`", name.as_ref())).collect();
    let hidden = rest.count();
    if hidden > 0 {
        return format!("{} and {hidden} more", names.join(", "));
    }
    match names.split_last() {
        None => String::new(),
        Some((only, [])) => only.clone(),
        Some((last, head)) => format!("{} and {last}", head.join(", ")),
    }
}

/// A name as written, cut where nobody would read on.
pub(crate) fn short(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The known name that was probably meant, if one is near enough.
pub(crate) fn nearest<'a>(
    written: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // A long name is not a misspelling, and the distance is quadratic in its length.
    if written.len() > 64 {
        return None;
    }
    let lower = written.to_lowercase();
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&lower, &name.to_lowercase()), name))
        .filter(|(distance, name)| {
            let longer = name.len().max(written.len());
            *distance < longer && *distance <= (longer / 3).max(1)
        })
        .min()
        .map(|(_, name)| name)
}

/// `did you mean `a`?` before the list of what is known, where one name is near.
pub(crate) fn suggest<'a>(
    written: &str,
    known: impl IntoIterator<Item = &'a str> + Clone,
    otherwise: &str,
) -> String {
    match nearest(written, known) {
        Some(name) => format!("did you mean `{name}`? {otherwise}"),
        None => otherwise.to_owned(),
    }
}
