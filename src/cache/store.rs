//! The content-addressed store on disk.
//!
//! ```text
//! cache/v1/objects/ab/<blake3 of the file>.safetensors   tensors
//! cache/v1/objects/ab/<blake3 of the file>               what programs wrote and said
//! cache/v1/actions/ab/<key>.json                         what made them
//! cache/v1/latest/ab/<who>.json                          the last key of a (stage, arm)
//! ```
//! Everything is written to a temporary file, flushed to disk and renamed, so a
//! reader sees a whole file or none. An object is verified when it is read.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::key::{Key, KeyWalk};
use super::stamps::Stamps;

/// Files smaller than this are copied without asking for shared blocks.
const WORTH_SHARING: u64 = 64 << 10;

/// A cache that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("cannot {action} `{}`: {source}; check the folder's rights and the free space, or choose another with `--runs`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A stored file is not what was stored.
    #[error("`{}` is damaged ({problem}); it was moved aside and will be computed again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// The record of one computation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Action {
    /// Its key.
    pub key: Key,
    /// What the key is made of.
    pub fields: Vec<(String, String)>,
    /// The run that computed it.
    pub run: String,
    /// When, in UTC.
    pub created: String,
    /// The tensors, by the blake3 hash of their file; absent if it made none.
    pub object: Option<String>,
    /// What it says besides tensors.
    pub payload: serde_json::Value,
}

impl Action {
    /// The record of a computation whose result is not kept.
    pub fn unsaved(walk: &KeyWalk, run: &str, created: &str, payload: serde_json::Value) -> Action {
        Action {
            key: walk.key(),
            fields: walk.fields().to_vec(),
            run: run.to_owned(),
            created: created.to_owned(),
            object: None,
            payload,
        }
    }
}

/// A folder of actions and objects.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store in `folder`, which is made when something is first stored.
    pub fn new(folder: &Path) -> Store {
        Store { root: folder.join("v1") }
    }

    /// Where generated models are kept.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Where compiled GPU programs are kept.
    pub fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    /// The file of an object.
    pub fn object_path(&self, digest: &str) -> PathBuf {
        self.place("objects", digest, "safetensors")
    }

    fn place(&self, kind: &str, name: &str, extension: &str) -> PathBuf {
        let fan = name.get(..2).unwrap_or("__");
        self.root.join(kind).join(fan).join(format!("{name}.{extension}"))
    }

    /// The record of an action, if there is one and its tensors are there.
    ///
    /// A damaged record is moved aside and counts as absent: it is computed again.
    pub fn find(&self, key: &Key) -> Option<Action> {
        let path = self.place("actions", &key.0, "json");
        let bytes = std::fs::read(&path).ok()?;
        match serde_json::from_slice::<Action>(&bytes) {
            Ok(action) if action.key == *key => {
                let whole = action.object.as_ref().is_none_or(|o| self.object_path(o).is_file());
                whole.then_some(action)
            }
            _ => {
                self.move_aside(&path);
                None
            }
        }
    }

    /// Keeps an action with its tensors, if it made any.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn save(
        &self,
        walk: &KeyWalk,
        run: &str,
        created: &str,
        object: Option<&[u8]>,
        payload: serde_json::Value,
    ) -> Result<Action, CacheError> {
        let object = match object {
            None => None,
            Some(bytes) => {
                let digest = blake3::hash(bytes).to_hex().to_string();
                let path = self.object_path(&digest);
                if !path.is_file() {
                    write_whole(&path, bytes)?;
                }
                Some(digest)
            }
        };
        let action = Action { object, ..Action::unsaved(walk, run, created, payload) };
        let path = self.place("actions", &action.key.0, "json");
        write_whole(&path, &to_json(&action, &path)?)?;
        Ok(action)
    }

    /// The bytes of an object, verified.
    ///
    /// # Errors
    /// If it cannot be read, or is not what was stored; then it is moved aside.
    pub fn read_object(&self, digest: &str) -> Result<Vec<u8>, CacheError> {
        self.read_verified(self.object_path(digest), digest)
    }

    fn read_verified(&self, path: PathBuf, digest: &str) -> Result<Vec<u8>, CacheError> {
        let bytes = std::fs::read(&path).map_err(|source| io("read", &path, source))?;
        if blake3::hash(&bytes).to_hex().as_str() != digest {
            self.move_aside(&path);
            let problem = "its hash is not its name".to_owned();
            return Err(CacheError::Damaged { path, problem });
        }
        Ok(bytes)
    }

    /// The file of something that a program wrote.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let fan = digest.get(..2).unwrap_or("__");
        self.root.join("objects").join(fan).join(digest)
    }

    /// Where attempts have their folders; on the same file system as the objects.
    pub fn attempts(&self) -> PathBuf {
        self.root.join("attempts")
    }

    /// Takes a finished file into the store by moving it; gives its hash.
    ///
    /// # Errors
    /// If it cannot be read or moved.
    pub fn adopt(&self, file: &Path) -> Result<String, CacheError> {
        let hash = Stamps::forgetful().digest(file).map_err(|source| io("read", file, source))?;
        let digest = hash.to_hex().to_string();
        let path = self.blob_path(&digest);
        let folder = path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(folder).map_err(|source| io("make", folder, source))?;
        // Also over one that is there: if that is damaged, this is its repair.
        std::fs::rename(file, &path).map_err(|source| io("write", &path, source))?;
        Ok(digest)
    }

    /// Whether something that a program wrote is there and is what it was; if it is
    /// not, it is moved aside.
    pub fn has_blob(&self, digest: &str, stamps: &Stamps) -> bool {
        let path = self.blob_path(digest);
        match stamps.digest(&path) {
            Ok(found) if found.to_hex().as_str() == digest => true,
            Ok(_) => {
                self.move_aside(&path);
                false
            }
            Err(_) => false,
        }
    }

    /// Something that a program wrote, verified.
    ///
    /// # Errors
    /// If it cannot be read, or is not what was stored; then it is moved aside.
    pub fn read_blob(&self, digest: &str) -> Result<Vec<u8>, CacheError> {
        self.read_verified(self.blob_path(digest), digest)
    }

    /// Puts a copy of something that a program wrote at `target`, whole or not at
    /// all. Where the file system can share blocks between files, it does.
    ///
    /// # Errors
    /// If the place cannot be written.
    pub fn publish(&self, digest: &str, target: &Path, executable: bool) -> Result<(), CacheError> {
        let source = self.blob_path(digest);
        let folder = target.parent().unwrap_or(Path::new("."));
        let write = || {
            let mut from = std::fs::File::open(&source)?;
            let mut draft = tempfile::Builder::new().prefix(".writing-").tempfile_in(folder)?;
            let shared = from.metadata()?.len() >= WORTH_SHARING
                && rustix::fs::ioctl_ficlone(draft.as_file(), &from).is_ok();
            if !shared {
                std::io::copy(&mut from, draft.as_file_mut())?;
            }
            let mode = if executable { 0o755 } else { 0o644 };
            draft.as_file().set_permissions(Permissions::from_mode(mode))?;
            draft.persist(target).map_err(|error| error.error)
        };
        write().map(drop).map_err(|source| io("write", target, source))
    }

    /// Remembers the last fields of somebody's action, for [`Store::latest`].
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn remember(&self, who: &str, action: &Action) -> Result<(), CacheError> {
        let path = self.place("latest", &name_of(who), "json");
        write_whole(&path, &to_json(action, &path)?)
    }

    /// The last action that was remembered for somebody.
    pub fn latest(&self, who: &str) -> Option<Action> {
        let bytes = std::fs::read(self.place("latest", &name_of(who), "json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Renames a damaged file, so that it is neither used nor lost.
    fn move_aside(&self, path: &Path) {
        let aside = path.with_extension("damaged");
        if let Err(error) = std::fs::rename(path, &aside) {
            tracing::warn!("cannot move `{}` aside: {error}", path.display());
        } else {
            tracing::warn!("`{}` was damaged and was moved aside", path.display());
        }
    }
}

fn name_of(who: &str) -> String {
    blake3::hash(who.as_bytes()).to_hex().to_string()
}

fn to_json(value: &impl Serialize, path: &Path) -> Result<Vec<u8>, CacheError> {
    serde_json::to_vec(value).map_err(|error| io("encode", path, std::io::Error::other(error)))
}

/// Writes a file so that it is there whole or not at all.
///
/// # Errors
/// If the folder cannot be written.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CacheError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|source| io("make", folder, source))?;
    let write = || {
        let mut file = tempfile::Builder::new().prefix(".writing-").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_data()?;
        file.persist(path).map_err(|error| error.error)
    };
    write().map(drop).map_err(|source| io("write", path, source))
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CacheError {
    CacheError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(value: &str) -> KeyWalk {
        let mut walk = KeyWalk::new("test");
        walk.field("value", value);
        walk
    }

    #[test]
    fn what_was_saved_is_found_again_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        assert!(store.find(&walk("a").key()).is_none());
        let saved =
            store.save(&walk("a"), "run", "now", Some(b"tensors"), 7.into()).expect("saved");
        assert_eq!(store.find(&walk("a").key()), Some(saved.clone()));
        assert!(store.find(&walk("b").key()).is_none());
        let object = saved.object.expect("an object");
        assert_eq!(store.read_object(&object).expect("readable"), b"tensors");
    }

    #[test]
    fn a_flipped_bit_in_an_object_is_found_and_the_object_is_set_aside() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let saved =
            store.save(&walk("a"), "run", "now", Some(b"tensors"), 7.into()).expect("saved");
        let object = saved.object.expect("an object");
        std::fs::write(store.object_path(&object), b"tensorz").expect("written");
        assert!(matches!(store.read_object(&object), Err(CacheError::Damaged { .. })));
        assert!(
            store.find(&walk("a").key()).is_none(),
            "an action without its tensors is no result"
        );
    }

    #[test]
    fn a_damaged_record_counts_as_absent() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let saved = store.save(&walk("a"), "run", "now", None, 7.into()).expect("saved");
        let path = store.place("actions", &saved.key.0, "json");
        std::fs::write(&path, b"{").expect("written");
        assert!(store.find(&walk("a").key()).is_none());
        assert!(path.with_extension("damaged").is_file());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, b"").expect("written");
        let error = Store::new(&file).save(&walk("a"), "run", "now", None, 7.into());
        assert!(error.expect_err("refused").to_string().contains("file"));
    }
}
