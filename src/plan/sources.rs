//! What arms read: models with the digests of their tensors, and files. Each is known as
//! it was looked at for a key, and says whether it was written since.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rayon::prelude::*;

use crate::cache::{self, Facts, KeyWalk, Stamp, Stamps, is_written};
use crate::model::Model;
use crate::op::{FileTensor, InputRef};
use crate::tensor_file;
use crate::text::Shown;

/// A model with the digests of the tensors that were asked for.
pub struct OpenModel {
    /// As the manifest names it.
    pub source: String,
    /// The model.
    pub model: Model,
    pub(super) digests: Mutex<BTreeMap<String, blake3::Hash>>,
}

impl OpenModel {
    /// A file of weights that was written since it was opened. With `by_name` also one
    /// whose name means another file now: whoever opens it sees that one.
    pub fn written(&self, by_name: bool) -> Option<String> {
        let mut files = self.model.opened_files();
        let written = files.find(|(path, file, facts)| {
            let look = || if by_name { std::fs::metadata(path) } else { file.metadata() };
            is_written(look, &Facts::of(facts))
        });
        written.map(|(path, ..)| path.shown().to_string())
    }

    /// What lies in the model's folder beside its weights.
    pub(super) fn files_beside(&self) -> Result<Vec<PathBuf>, SourceError> {
        let folder = self.model.path();
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let unreadable = |source| SourceError::File { path: folder.to_owned(), source };
        let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = entries.map_err(unreadable)?.into_iter();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.retain(|path| path.is_file() && !self.model.files().any(|weights| weights == path));
        paths.sort();
        Ok(paths)
    }

    /// One digest over the names and contents of some tensors.
    pub(super) fn digest(&self, names: &[String], stamps: &Stamps) -> blake3::Hash {
        let each: Vec<(&String, Option<blake3::Hash>)> =
            names.par_iter().map(|name| (name, self.tensor_digest(name, stamps))).collect();
        let mut walk = KeyWalk::new("weights");
        for (name, digest) in each {
            let digest = digest.map_or("absent".to_owned(), |digest| digest.to_hex().to_string());
            walk.field(name, digest);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(walk.key().0.as_bytes());
        hasher.finalize()
    }

    /// A tensor's digest: of this process, else by the file's stamp, else by reading it.
    fn tensor_digest(&self, name: &str, stamps: &Stamps) -> Option<blake3::Hash> {
        let digests = || self.digests.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(digest) = digests().get(name) {
            return Some(*digest);
        }
        let tensor = self.model.tensor(name).ok()?;
        let origin = self.model.origin(name);
        // The stamp is that of the file that was opened, whatever its name means now.
        // The scales of codes may stand in another file, and its stamp says nothing of them.
        let known = origin.filter(|_| tensor.is_in_one_file()).map(|origin| {
            let (kind, rows, width) = (tensor.kind(), tensor.rows(), tensor.width());
            let less = if tensor.is_less_one() { " less one" } else { "" };
            let layout = tensor.layout();
            let part = format!("{kind} {rows}x{width} @{}{less}{layout}", origin.offset);
            (Stamp::of(origin.facts), part, origin.path)
        });
        let found = known.as_ref().and_then(|(stamp, part, _)| stamps.known(stamp, part));
        let digest = found.unwrap_or_else(|| {
            let started = cache::now();
            let digest = tensor.digest();
            if let Some((stamp, part, path)) = &known
                && std::fs::metadata(path).is_ok_and(|facts| Stamp::of(&facts) == *stamp)
            {
                stamps.note(*stamp, part, digest, (tensor.bytes().len() as u64, started));
            }
            digest
        });
        digests().insert(name.to_owned(), digest);
        Some(digest)
    }
}

/// What an arm reads besides its model's weights.
#[derive(Default)]
pub struct Sources {
    /// As fields of its key.
    pub fields: Vec<(String, String)>,
    /// The files, each as it was before it was read.
    files: Vec<(PathBuf, Facts)>,
}

impl Sources {
    pub(super) fn field(&mut self, name: &str, value: impl std::fmt::Display) {
        self.fields.push((name.to_owned(), value.to_string()));
    }

    pub(super) fn file(
        &mut self,
        name: &str,
        path: &Path,
        stamps: &Stamps,
    ) -> Result<(), SourceError> {
        let unreadable = |source| SourceError::File { path: path.to_owned(), source };
        let facts = std::fs::metadata(path).map_err(unreadable)?;
        let looked_at = Facts::of(&facts);
        if facts.is_dir() {
            for file in tensor_file::members(path) {
                let member = file.file_name().unwrap_or_default().to_string_lossy();
                self.file(&format!("{name} {member}"), &file, stamps)?;
            }
            self.files.push((path.to_owned(), looked_at));
            return Ok(());
        }
        self.field(name, stamps.digest(path).map_err(unreadable)?.to_hex());
        self.files.push((path.to_owned(), looked_at));
        // Files that this one names, or that belong to it.
        for file in tensor_file::members(path).iter().filter(|file| *file != path) {
            let member = file.file_name().unwrap_or_default().to_string_lossy();
            self.file(&format!("{name} {member}"), file, stamps)?;
        }
        Ok(())
    }

    pub(super) fn tensor(
        &mut self,
        name: &str,
        tensor: &FileTensor,
        stamps: &Stamps,
    ) -> Result<(), SourceError> {
        self.file(name, &tensor.file, stamps)?;
        let mut read = serde_json::json!(tensor);
        // The content counts, wherever it lies.
        read.as_object_mut().map(|read| read.remove("file"));
        self.field(&format!("{name} tensor"), read);
        Ok(())
    }

    /// A file that was written since these were looked at, or is gone.
    pub fn written(&self) -> Option<&Path> {
        let written =
            |(path, earlier): &&(PathBuf, Facts)| is_written(|| std::fs::metadata(path), earlier);
        self.files.iter().find(written).map(|(path, _)| path.as_path())
    }
}

/// Why what an arm reads is not known.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Another stage makes it, and has not.
    #[error("its input `{}` of stage {} runs first", .0.site, .0.stage)]
    NotYet(InputRef),
    /// The program of the external arm, or one of its inputs.
    #[error("{0}")]
    Program(String),
    /// A file.
    #[error("cannot read `{}`: {source}; correct the path in the manifest, or make the file", path.shown())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_was_written_back_is_seen_and_one_that_was_touched_otherwise_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x");
        std::fs::write(&path, "1").expect("written");
        let mut sources = Sources::default();
        sources.file("x", &path, &Stamps::forgetful()).expect("read");
        assert_eq!(sources.written(), None);
        std::fs::hard_link(&path, folder.path().join("y")).expect("linked");
        assert_eq!(sources.written(), None);
        let time = std::fs::metadata(&path).and_then(|facts| facts.modified()).expect("a time");
        let mut back = Sources::default();
        back.file("x", &path, &Stamps::forgetful()).expect("read");
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, "1").expect("written");
        let file = std::fs::File::options().write(true).open(&path).expect("opened");
        file.set_modified(time).expect("set");
        assert_eq!(back.written(), Some(path.as_path()), "whatever its time says");
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, "1").expect("written");
        assert_eq!(sources.written(), Some(path.as_path()));
    }
}
