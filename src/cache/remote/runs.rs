//! Records of runs in a store: each machine's own, put there at the end of a run, and everybody's
//! read by whoever reports of all machines.
//!
//! ```text
//! PREFIX/v1/runs/<machine>/<run>/run.json   where `runs = true` of `[cache]` puts them
//! ```
//! Read is every run.json below a URL, whoever put it there: a copy of folders of runs will do.

use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use super::upkeep::asked_together;
use super::{Bucket, Listed, Remote, RemoteError, Trouble, secret_in, without_secrets};

/// Where they are put.
const RUNS: &str = "v1/runs";
/// The file of a run.
const RECORD: &str = "run.json";

impl Remote {
    /// Puts the record of a run there, unless this machine may only read.
    ///
    /// # Errors
    /// If the store refuses, or does not answer.
    pub fn put_run(&self, machine: &str, run: &str, record: &[u8]) -> Result<(), RemoteError> {
        if self.options.read_only {
            return Ok(());
        }
        let name = format!("{RUNS}/{}/{}/{RECORD}", part(machine), part(run));
        let put = self.bucket.put(&name, record, false);
        put.map(drop).map_err(|trouble| RemoteError::of(&self.shown, "to be written", trouble))
    }
}

/// A name as one part of a path: what is no plain character is an underscore.
fn part(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let text: String = name.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    if text.is_empty() || text.starts_with('.') { format!("_{text}") } else { text }
}

/// Whether a place is in a store and no path.
pub fn is_url(place: &Path) -> bool {
    let text = place.to_string_lossy();
    let scheme = text.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Brings every run.json below a URL into a folder of this machine, and gives their paths there.
/// One that is there since an earlier time, with the store's size and date, is not brought again;
/// `wanted` says of a run's name whether it is of interest.
///
/// # Errors
/// If the URL names no store, the store does not answer or does not say what it holds, or the
/// folder cannot be written.
pub fn bring_runs(
    url: &str,
    folder: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<PathBuf>, RemoteError> {
    let shown = without_secrets(url);
    let wrong = |problem: String| RemoteError::Url { url: shown.clone(), problem };
    if let Some(what) = secret_in(url) {
        return Err(wrong(format!(
            "{what} would be seen by whoever sees the command line; credentials are read from \
             variables (docs/shared-cache.md)"
        )));
    }
    let bucket = Bucket::open(url, false).map_err(wrong)?;
    let listed = bucket.list("").map_err(|trouble| match url.starts_with("http") {
        true => wrong(format!(
            "this HTTP server does not list what it holds ({}); give a bucket or a folder",
            trouble.text()
        )),
        false => RemoteError::of(&shown, "to be listed", trouble),
    })?;
    let is_record = |listed: &Listed| {
        let mut parts = listed.name.rsplit('/');
        parts.next() == Some(RECORD)
            && parts.next().is_some_and(&wanted)
            // Results lie there, and no runs.
            && !parts.any(|part| part == "cache")
    };
    let records: Vec<Listed> = listed.into_iter().filter(is_record).collect();
    let brought = asked_together(&records, |record| {
        bring(&bucket, record, folder)
            .map_err(|trouble| RemoteError::of(&shown, "to be read", trouble))
    });
    let paths: Result<Vec<Option<PathBuf>>, RemoteError> = brought.into_iter().collect();
    let mut paths: Vec<PathBuf> = paths?.into_iter().flatten().collect();
    paths.sort();
    Ok(paths)
}

/// Brings one; nothing where it was removed meanwhile.
fn bring(bucket: &Bucket, record: &Listed, folder: &Path) -> Result<Option<PathBuf>, Trouble> {
    let here = |error: std::io::Error| Trouble::Here(error.to_string());
    // A store's names are no paths of this machine until every part is a plain one.
    let name = Path::new(&record.name);
    if !name.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Trouble::Wrong(format!("`{}` is no path", crate::text::shown(&record.name))));
    }
    let path = folder.join(name);
    let known = std::fs::metadata(&path).ok();
    let known = known.and_then(|facts| Some((facts.len(), facts.modified().ok()?)));
    if known == Some((record.size, record.written)) {
        return Ok(Some(path));
    }
    let parent = path.parent().unwrap_or(folder);
    std::fs::create_dir_all(parent).map_err(here)?;
    let mut draft = tempfile::NamedTempFile::new_in(parent).map_err(here)?;
    if bucket.fetch(&record.name, draft.as_file_mut())?.is_none() {
        return Ok(None);
    }
    dated(draft.as_file(), record.written).map_err(here)?;
    draft.persist(&path).map_err(|error| here(error.error))?;
    Ok(Some(path))
}

/// Gives a file the date that it has in the store.
fn dated(file: &File, written: SystemTime) -> std::io::Result<()> {
    file.set_modified(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_name_is_one_part_of_a_path() {
        assert_eq!(part("node-07.local"), "node-07.local");
        assert_eq!(part("../x/y"), "_.._x_y");
        assert_eq!(part("Bürorechner 3"), "B_rorechner_3");
        assert_eq!(part(""), "_");
    }

    #[test]
    fn a_url_is_told_from_a_path() {
        assert!(is_url(Path::new("s3://bucket/team")) && is_url(Path::new("file:///x")));
        assert!(!is_url(Path::new("nodes/runs")) && !is_url(Path::new("/a://b")));
    }

    #[cfg(feature = "remote")]
    #[test]
    fn every_run_below_a_url_is_brought_once_and_again_when_it_changed() {
        let (store, here) = (tempfile::tempdir().expect("a"), tempfile::tempdir().expect("b"));
        let put = |name: &str, text: &str| {
            let path = store.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        put("v1/runs/node1/20261108T020000Z-aa/run.json", "one");
        put("old/20200101T020000Z-aa/run.json", "old");
        put("node2/runs/cache/v1/20261108T020000Z-aa/run.json", "no run");
        put("node2/runs/20261109T020000Z-bb/report.html", "a page");
        let url = format!("file://{}", store.path().display());
        let wanted = |run: &str| run.starts_with("2026");
        let bring = || bring_runs(&url, here.path(), wanted).expect("brought");
        let paths = bring();
        let [path] = paths.as_slice() else { panic!("{paths:?}") };
        assert!(path.ends_with("v1/runs/node1/20261108T020000Z-aa/run.json"), "{path:?}");
        assert_eq!(std::fs::read_to_string(path).expect("read"), "one");
        // What is known by size and date is left as it is.
        let date = std::fs::metadata(path).and_then(|facts| facts.modified()).expect("a date");
        std::fs::write(path, "ONE").expect("written");
        File::options().write(true).open(path).and_then(|f| f.set_modified(date)).expect("dated");
        assert_eq!(std::fs::read_to_string(&bring()[0]).expect("read"), "ONE");
        put("v1/runs/node1/20261108T020000Z-aa/run.json", "another");
        assert_eq!(std::fs::read_to_string(&bring()[0]).expect("read"), "another");
        // Gone there, it is no run any more.
        std::fs::remove_dir_all(store.path().join("v1")).expect("removed");
        assert_eq!(bring(), Vec::<PathBuf>::new());
    }
}
