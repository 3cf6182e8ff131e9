//! What may go from a cache of many machines: by age, and by a budget.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::{LARGEST_RECORD, LETTERS, LETTERS_LAST, Listed, Remote, RemoteError, Trouble, is_hash};
use crate::cache::key::Key;
use crate::cache::store::Store;

/// An object that nothing names may be one whose record is about to follow.
const MAY_FOLLOW: Duration = Duration::from_secs(24 * 3600);

/// What a cache of many machines may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteBudget {
    /// The most bytes; no bound where none is given.
    pub bytes: Option<u64>,
    /// Results that were last of use so long ago go, whatever the budget is.
    pub older: Option<Duration>,
    /// Only say what would be removed.
    pub dry_run: bool,
}

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteCleared {
    /// Records.
    pub actions: usize,
    /// Objects.
    pub objects: usize,
    /// Bytes that were freed.
    pub freed: u64,
    /// Bytes that are left.
    pub left: u64,
}

impl Remote {
    /// Removes results that were last written longest ago, until the rest fits, and objects that
    /// no record names. `store` knows which objects a record names.
    ///
    /// # Errors
    /// If the store does not answer, refuses, or lists nothing.
    pub fn clear(
        &self,
        store: &Store,
        budget: &RemoteBudget,
    ) -> Result<RemoteCleared, RemoteError> {
        let failed = |trouble| RemoteError::of(&self.shown, "to be cleared", trouble);
        let now = SystemTime::now();
        let age = |listed: &Listed| now.duration_since(listed.written).unwrap_or_default();
        let listed = self.bucket.list("v1/actions");
        let mut records = listed.map_err(|trouble| match self.shown.starts_with("http") {
            true => RemoteError::Url {
                url: self.shown.clone(),
                problem: format!(
                    "this HTTP server does not list what it holds ({}); clear it where its files \
                     lie",
                    trouble.text()
                ),
            },
            false => failed(trouble),
        })?;
        records.sort_by(|a, b| b.written.cmp(&a.written).then_with(|| a.name.cmp(&b.name)));
        let objects = self.bucket.list("v1/objects").map_err(failed)?;
        let sizes: std::collections::BTreeMap<&str, u64> =
            objects.iter().map(|object| (object.name.as_str(), object.size)).collect();
        let mut kept: BTreeSet<String> = BTreeSet::new();
        let (mut cleared, mut going) = (RemoteCleared::default(), Vec::new());
        let mut let_go: BTreeSet<String> = BTreeSet::new();
        let named = asked_together(&records, |record| self.objects_named_in(store, &record.name));
        for (record, names) in records.iter().zip(named) {
            let Some(names) = names.map_err(failed)? else {
                // Nobody will ever believe it.
                cleared.actions += 1;
                cleared.freed += record.size;
                going.push(&record.name);
                continue;
            };
            let new = || names.iter().filter(|name| !kept.contains(*name));
            let cost: u64 = new().filter_map(|name| sizes.get(name.as_str())).sum();
            let fits = budget.bytes.is_none_or(|most| cleared.left + cost + record.size <= most);
            if fits && budget.older.is_none_or(|older| age(record) <= older) {
                cleared.left += cost + record.size;
                kept.extend(names);
            } else {
                cleared.actions += 1;
                cleared.freed += record.size;
                going.push(&record.name);
                let_go.extend(names);
            }
        }
        let records_going = going.len();
        for object in objects.iter().filter(|object| !kept.contains(&object.name)) {
            if age(object) < MAY_FOLLOW && !let_go.contains(&object.name) {
                cleared.left += object.size;
                continue;
            }
            cleared.objects += 1;
            cleared.freed += object.size;
            going.push(&object.name);
        }
        let letters = self.bucket.list(LETTERS).map_err(failed)?;
        for letter in &letters {
            if age(letter) < LETTERS_LAST {
                cleared.left += letter.size;
                continue;
            }
            cleared.objects += 1;
            cleared.freed += letter.size;
            going.push(&letter.name);
        }
        if !budget.dry_run {
            // Records first: none may name an object that is gone, as long as that can be helped.
            let (records, objects) = going.split_at(records_going);
            for names in [records, objects] {
                for removed in asked_together(names, |name| self.bucket.remove(name)) {
                    removed.map_err(failed)?;
                }
            }
        }
        Ok(cleared)
    }

    /// The objects that a record names; nothing if it is no sound record.
    fn objects_named_in(&self, store: &Store, name: &str) -> Result<Option<Vec<String>>, Trouble> {
        let key = name.rsplit('/').next().and_then(|file| file.strip_suffix(".json"));
        let Some(key) = key.filter(|key| is_hash(key)) else { return Ok(None) };
        let found = match self.bucket.get(name, LARGEST_RECORD) {
            Err(Trouble::Wrong(_)) => None,
            found => found?,
        };
        let Some((bytes, _)) = found else { return Ok(None) };
        let Ok(action) = super::sound_record(&bytes, &Key(key.to_owned())) else { return Ok(None) };
        Ok(Some(store.named_by(&action).iter().map(|object| object.remote_name()).collect()))
    }
}

/// Asks for each of them, several at once: a store far away answers many in the time of one.
/// The answers are in the order of what was asked.
pub(super) fn asked_together<T: Sync, R: Send>(all: &[T], ask: impl Fn(&T) -> R + Sync) -> Vec<R> {
    const AT_ONCE: usize = 16;
    let share = all.len().div_ceil(AT_ONCE).max(1);
    let ask = &ask;
    std::thread::scope(|scope| {
        let mut parts = Vec::new();
        for part in all.chunks(share) {
            let asked = move || part.iter().map(ask).collect::<Vec<R>>();
            let started = std::thread::Builder::new().spawn_scoped(scope, asked);
            // Where there is no thread to be had, this one asks.
            parts.push(started.map_err(|_| asked()));
        }
        let answers = parts.into_iter().map(|part| match part {
            Ok(thread) => thread.join().unwrap_or_else(|bug| std::panic::resume_unwind(bug)),
            Err(answers) => answers,
        });
        answers.flatten().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_together_is_answered_in_order() {
        for count in [0, 1, 15, 16, 17, 1000] {
            let all: Vec<usize> = (0..count).collect();
            let twice: Vec<usize> = all.iter().map(|n| n * 2).collect();
            assert_eq!(asked_together(&all, |n| n * 2), twice);
        }
    }
}
