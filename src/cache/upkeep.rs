//! The store as a whole: what it holds, whether it is sound, and what may go.
//!
//! It knows actions, objects and runs that are pinned. It computes nothing, and
//! removes nothing while a run uses the store.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::TryLockError;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

use super::key::KeyWalk;
use super::stamps::Stamps;
use super::store::{Action, CacheError, Store, WithName, decode_record, io, is_draft, unsealed};
use crate::model::synthetic;

/// One stored action.
#[derive(Debug)]
pub struct Held {
    /// The action.
    pub action: Action,
    /// Bytes of its record and of the objects that it names.
    pub size: u64,
    /// When it was last of use.
    pub used: SystemTime,
    objects: Vec<PathBuf>,
}

/// A file that a run makes again from nothing.
#[derive(Debug)]
pub struct Spare {
    /// The file.
    pub path: PathBuf,
    /// Its bytes.
    pub size: u64,
    /// When it was made.
    pub made: SystemTime,
}

/// What `verify` found.
#[derive(Debug, Default)]
pub struct Health {
    /// Sound records of actions.
    pub actions: usize,
    /// Sound objects.
    pub objects: usize,
    /// Bytes of sound objects.
    pub bytes: u64,
    /// Sound generated models.
    pub models: usize,
    /// Lines of `latest.log` that are damaged, and are not believed.
    pub lines: usize,
    /// What was damaged and was moved aside, and why.
    pub damaged: Vec<(PathBuf, &'static str)>,
}

impl Health {
    /// Whether nothing was damaged that holds a result. A line of the log that nobody believes
    /// costs a reason, and stays until the log is written anew.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty()
    }
}

/// What `gc` did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Cleared {
    /// Bytes that were freed, or would be.
    pub freed: u64,
    /// Bytes that are left.
    pub left: u64,
    /// Actions that were removed.
    pub actions: usize,
    /// Files that were removed: objects, generated models, compiled programs, and what runs
    /// that were killed left.
    pub files: usize,
}

/// The most that a cache may hold, and what must stay.
#[derive(Debug)]
pub struct Budget {
    /// Bytes.
    pub bytes: u64,
    /// Objects that stay, whatever they cost, by hash.
    pub pinned: BTreeSet<String>,
    /// Only say what would be removed.
    pub dry_run: bool,
}

impl Store {
    /// All actions, the last used one first.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn held(&self) -> Result<Vec<Held>, CacheError> {
        let mut all = Vec::new();
        for path in files_below(&self.root().join("actions"))? {
            let Ok(bytes) = std::fs::read(&path) else { continue };
            let Some(action) = decode_record(&bytes) else { continue };
            let facts = std::fs::metadata(&path).map_err(|source| io("inspect", &path, source))?;
            let objects = self.objects_of(&action);
            let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |facts| facts.len());
            all.push(Held {
                size: facts.len() + objects.iter().map(size).sum::<u64>(),
                used: facts.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                objects,
                action,
            });
        }
        all.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.action.key.cmp(&b.action.key)));
        Ok(all)
    }

    /// The files that an action names, there or not.
    fn objects_of(&self, action: &Action) -> Vec<PathBuf> {
        self.named_by(action).into_iter().map(|object| object.path).collect()
    }

    /// The same with their hashes, as the record has them.
    pub(super) fn named_by(&self, action: &Action) -> Vec<WithName> {
        let tensors = action.object.iter().map(|digest| WithName {
            path: self.object_path(digest),
            digest: digest.clone(),
            of_command: false,
            private: false,
        });
        let payload = action.read::<Value>().unwrap_or_default();
        let command = payload.get("command");
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let streams = ["stdout", "stderr"].map(|name| text(command.and_then(|c| c.get(name))));
        let streams = streams.into_iter().flatten().map(|digest| (digest, true));
        let outputs = command.and_then(|command| command.get("outputs")?.as_array());
        let outputs = outputs.into_iter().flatten().filter_map(|o| text(o.get("blake3")));
        let blobs = streams.chain(outputs.map(|digest| (digest, false)));
        let blobs = blobs.map(|(digest, private)| WithName {
            path: self.blob_path(&digest),
            digest,
            of_command: true,
            private,
        });
        tensors.chain(blobs).collect()
    }

    /// Reads everything; what is not what it was is moved aside. What a run is writing has no
    /// name yet and is left alone, and `gc` waits.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn verify(&self) -> Result<Health, CacheError> {
        // A cache that cannot be written is verified too: nobody clears it.
        let _in_use = self.in_use();
        let mut health = Health::default();
        for path in files_below(&self.root().join("actions"))? {
            let problem = self.problem_of_record(&path)?;
            health.actions += self.took(&mut health.damaged, &path, problem);
        }
        for path in files_below(&self.root().join("objects"))? {
            let problem = problem_of_object(&path)?;
            let sound = self.took(&mut health.damaged, &path, problem);
            health.objects += sound;
            health.bytes += std::fs::metadata(&path).map_or(0, |facts| facts.len());
        }
        for path in files_below(&self.models())? {
            let problem = problem_of_model(&path)?;
            health.models += self.took(&mut health.damaged, &path, problem);
        }
        for path in files_below(&self.root().join("unchanged"))? {
            let problem = problem_of_list(&path)?;
            self.took(&mut health.damaged, &path, problem);
        }
        health.lines = self.damaged_lines();
        Ok(health)
    }

    /// Moves a damaged file aside; gives the number of sound files, 1 or 0.
    fn took(&self, damaged: &mut Vec<(PathBuf, &'static str)>, path: &Path, found: Found) -> usize {
        match found {
            Found::Sound => 1,
            Found::NoneOfOurs => 0,
            Found::Damaged(problem) => {
                self.move_aside(path);
                damaged.push((path.to_owned(), problem));
                0
            }
        }
    }

    fn problem_of_record(&self, path: &Path) -> Result<Found, CacheError> {
        let Some(bytes) = still_there(path, std::fs::read(path))? else {
            return Ok(Found::NoneOfOurs);
        };
        Ok(match decode_record(&bytes) {
            None => Found::Damaged("its check does not fit"),
            Some(action) if KeyWalk::again(&action.fields).key() != action.key => {
                Found::Damaged("its fields do not give its key")
            }
            Some(action) if self.action_path(&action.key) != path => {
                Found::Damaged("it has the name of another")
            }
            Some(_) => Found::Sound,
        })
    }

    /// Removes actions that were not used for longest until the rest fits the budget, and
    /// objects that nothing names any more. Generated models and compiled programs stay
    /// where there is room beside the results. `None` if a run uses the store now.
    ///
    /// # Errors
    /// If the folder cannot be read or written.
    pub fn clear(&self, budget: &Budget) -> Result<Option<Cleared>, CacheError> {
        let in_use = self.in_use_file()?;
        match in_use.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(source)) => return Err(io("lock", self.root(), source)),
        }
        let pinned: BTreeSet<PathBuf> = budget
            .pinned
            .iter()
            .flat_map(|digest| [self.object_path(digest), self.blob_path(digest)])
            .collect();
        let mut sizes: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for path in files_below(&self.root().join("objects"))? {
            let size = std::fs::metadata(&path).map_or(0, |facts| facts.len());
            sizes.insert(path, size);
        }
        let mut cleared = Cleared::default();
        // An object that several actions name is paid for once, by the first that keeps it.
        let mut kept: BTreeSet<&PathBuf> = BTreeSet::new();
        for path in pinned.iter().filter(|path| sizes.contains_key(*path)) {
            kept.insert(path);
            cleared.left += sizes[path];
        }
        let all = self.held()?;
        for held in &all {
            let new = held.objects.iter().filter(|path| !kept.contains(path));
            let cost: u64 = new.filter_map(|path| sizes.get(path)).sum();
            let record = self.action_path(&held.action.key);
            let record_size = std::fs::metadata(&record).map_or(0, |facts| facts.len());
            if cleared.left + cost + record_size <= budget.bytes {
                cleared.left += cost + record_size;
                kept.extend(held.objects.iter().filter(|path| sizes.contains_key(*path)));
            } else {
                cleared.actions += 1;
                cleared.freed += record_size;
                self.remove(&record, budget)?;
            }
        }
        for (path, size) in sizes.iter().filter(|(path, _)| !kept.contains(path)) {
            cleared.files += 1;
            cleared.freed += size;
            self.remove(path, budget)?;
        }
        for Spare { path, size, .. } in self.spare()? {
            if cleared.left + size <= budget.bytes {
                cleared.left += size;
            } else {
                cleared.files += 1;
                cleared.freed += size;
                self.remove(&path, budget)?;
            }
        }
        for folder in ["actions", "objects", "models", "programs", "unchanged"] {
            for path in drafts_below(&self.root().join(folder))? {
                cleared.files += 1;
                cleared.freed += std::fs::metadata(&path).map_or(0, |facts| facts.len());
                self.remove(&path, budget)?;
            }
        }
        // Nobody reads them now. In `locks` older runners kept theirs.
        for folder in ["unchanged", "locks"] {
            for path in files_below(&self.root().join(folder))? {
                self.remove(&path, budget)?;
            }
        }
        Ok(Some(cleared))
    }

    /// What a run makes again from nothing: generated models, compiled programs and what
    /// the driver said; the last made first.
    ///
    /// # Errors
    /// If a folder cannot be read.
    pub fn spare(&self) -> Result<Vec<Spare>, CacheError> {
        let mut all = Vec::new();
        for folder in [self.models(), self.programs()] {
            for path in files_below(&folder)? {
                // A draft that has just got its name, or was removed by another.
                let Ok(facts) = std::fs::metadata(&path) else { continue };
                let made = facts.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                all.push(Spare { path, size: facts.len(), made });
            }
        }
        all.sort_by(|a, b| b.made.cmp(&a.made).then_with(|| a.path.cmp(&b.path)));
        Ok(all)
    }

    fn remove(&self, path: &Path, budget: &Budget) -> Result<(), CacheError> {
        if budget.dry_run {
            return Ok(());
        }
        std::fs::remove_file(path).map_err(|source| io("remove", path, source))
    }
}

/// What a look at a file showed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Sound,
    Damaged(&'static str),
    /// It went away meanwhile, or nothing is known of it.
    NoneOfOurs,
}

/// A file of a living run's store may go, or be moved aside by another, at any moment.
fn still_there<T>(path: &Path, read: std::io::Result<T>) -> Result<Option<T>, CacheError> {
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(|source| io("read", path, source)),
    }
}

fn problem_of_object(path: &Path) -> Result<Found, CacheError> {
    let hash = Stamps::forgetful().digest(path);
    let Some(hash) = still_there(path, hash)? else { return Ok(Found::NoneOfOurs) };
    let name = path.file_stem().map(|name| name.to_string_lossy().into_owned());
    Ok(match name.as_deref() == Some(hash.to_hex().as_str()) {
        true => Found::Sound,
        false => Found::Damaged("its hash is not its name"),
    })
}

/// A generated model is held to the digest that was noted when it was made, and the note to
/// its check.
fn problem_of_model(path: &Path) -> Result<Found, CacheError> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let made = match (ending, synthetic::noted(path)) {
        (synthetic::NOTE, synthetic::Noted::Damaged) => {
            return Ok(Found::Damaged("its check does not fit"));
        }
        ("gguf" | "safetensors", synthetic::Noted::Digest(made)) => made,
        // The next run makes a note for a model of an earlier version.
        _ => return Ok(Found::NoneOfOurs),
    };
    let hash = still_there(path, Stamps::forgetful().digest(path))?;
    Ok(match hash {
        None => Found::NoneOfOurs,
        Some(hash) if hash == made => Found::Sound,
        Some(_) => Found::Damaged("it is not what it was when it was made"),
    })
}

fn problem_of_list(path: &Path) -> Result<Found, CacheError> {
    let bytes = still_there(path, std::fs::read(path))?;
    Ok(match bytes.as_deref().map(unsealed) {
        None => Found::NoneOfOurs,
        Some(Some(_)) => Found::Sound,
        Some(None) => Found::Damaged("its check does not fit"),
    })
}

/// All plain files below a folder but drafts and those moved aside, sorted; none if it is
/// not there.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>, CacheError> {
    let mut files = all_below(folder)?;
    files.retain(|path| !path.file_name().is_some_and(is_draft));
    Ok(files)
}

/// What runs that were killed have left half-written. Nobody else's draft is there while
/// nobody uses the store.
fn drafts_below(folder: &Path) -> Result<Vec<PathBuf>, CacheError> {
    let mut files = all_below(folder)?;
    files.retain(|path| path.file_name().is_some_and(is_draft));
    Ok(files)
}

fn all_below(folder: &Path) -> Result<Vec<PathBuf>, CacheError> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(|source| io("read", &folder, source))?,
        };
        for entry in entries {
            let entry = entry.map_err(|source| io("read", &folder, source))?;
            let kind = entry.file_type().map_err(|source| io("inspect", &folder, source))?;
            let path = entry.path();
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file() && path.extension().is_none_or(|e| e != "damaged") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::super::store::NewAction;
    use super::*;

    fn save(store: &Store, name: &str, object: &[u8], age: u64) -> Action {
        let mut walk = KeyWalk::new("test");
        walk.field("name", name);
        let (run, created, object) = ("run", "now", Some(object));
        let payload = serde_json::value::RawValue::NULL.to_owned();
        let new = NewAction { walk: &walk, run, created, object, payload, seconds: 0.0 };
        let action = store.save(new).expect("saved");
        let record = std::fs::File::options().append(true).open(store.action_path(&action.key));
        let used = SystemTime::now() - std::time::Duration::from_secs(age);
        record.and_then(|file| file.set_modified(used)).expect("aged");
        action
    }

    fn budget(bytes: u64) -> Budget {
        Budget { bytes, pinned: BTreeSet::new(), dry_run: false }
    }

    #[test]
    fn the_longest_unused_goes_first_and_pinned_objects_stay() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let old = save(&store, "old", &[1; 4000], 300);
        let middle = save(&store, "middle", &[2; 4000], 200);
        let new = save(&store, "new", &[3; 4000], 100);
        let pinned = old.object.clone().into_iter().collect();
        let cleared = store.clear(&Budget { pinned, ..budget(9000) }).expect("cleared");
        // The oldest costs its record alone, for its object stays anyway.
        assert_eq!(cleared.map(|c| (c.actions, c.files)), Some((1, 1)));
        assert!(store.find(&new.key).is_some() && store.find(&middle.key).is_none());
        assert!(store.find(&old.key).is_some());
        assert!(store.read_object(old.object.as_deref().expect("an object")).is_ok());
    }

    #[test]
    fn generated_models_stay_only_where_there_is_room_beside_the_results() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let action = save(&store, "a", &[1; 4000], 0);
        std::fs::create_dir_all(store.models()).expect("made");
        let model = store.models().join("model.gguf");
        std::fs::write(&model, [0; 3000]).expect("written");
        assert!(store.clear(&budget(8000)).expect("cleared").is_some() && model.exists());
        let cleared = store.clear(&budget(6000)).expect("cleared");
        assert_eq!(cleared.map(|c| (c.actions, c.files, c.freed)), Some((0, 1, 3000)));
        assert!(store.find(&action.key).is_some() && !model.exists());
    }

    #[test]
    fn a_dry_run_removes_nothing_and_a_store_in_use_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let action = save(&store, "a", &[1; 100], 0);
        let dry = Budget { dry_run: true, ..budget(0) };
        assert_eq!(store.clear(&dry).expect("looked").map(|c| c.actions), Some(1));
        let in_use = store.in_use().expect("locked");
        assert_eq!(store.clear(&budget(0)).expect("looked"), None);
        assert!(store.find(&action.key).is_some());
        drop(in_use);
        assert!(store.clear(&budget(0)).expect("cleared").is_some());
        assert!(store.find(&action.key).is_none());
    }

    #[test]
    fn verify_names_what_is_damaged() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path());
        let action = save(&store, "a", &[1; 100], 0);
        save(&store, "b", &[2; 100], 0);
        assert!(store.verify().expect("read").damaged.is_empty());
        let object = store.object_path(action.object.as_deref().expect("an object"));
        std::fs::write(&object, [1; 99]).expect("written");
        let record = store.action_path(&action.key);
        let bytes = std::fs::read(&record).expect("read");
        std::fs::write(&record, &bytes[..bytes.len() - 30]).expect("written");
        let health = store.verify().expect("read");
        assert_eq!((health.actions, health.objects), (1, 1));
        let damaged: Vec<&PathBuf> = health.damaged.iter().map(|(path, _)| path).collect();
        assert_eq!(damaged, [&record, &object]);
    }
}
