//! Small objects that runners and their jobs leave for each other in a cache of many machines,
//! where they share no folder.
//!
//! ```text
//! PREFIX/v1/slurm/<run>/<n>/...   what a submission is, and what its tasks say
//! ```
//! What stands in them is their readers' affair. Whoever has read one removes it.

use std::sync::Arc;
use std::time::SystemTime;

use super::upkeep::asked_together;
use super::{LARGEST_RECORD, LETTERS, Listed, Remote, RemoteError};
use crate::cache::key::Key;
use crate::cache::store::Store;

impl Remote {
    /// Leaves a letter, whole or not at all; one of the same name is replaced.
    ///
    /// # Errors
    /// If the store refuses, or does not answer.
    pub fn leave(&self, name: &str, bytes: &[u8]) -> Result<(), RemoteError> {
        let name = format!("{LETTERS}/{name}");
        let put = self.bucket.put(&name, bytes, false);
        put.map(drop).map_err(|trouble| RemoteError::of(&self.shown, "to be written", trouble))
    }

    /// Leaves many, several at a time.
    ///
    /// # Errors
    /// As [`Remote::leave`]: then some of them may be there.
    pub fn leave_all(&self, letters: &[(String, Vec<u8>)]) -> Result<(), RemoteError> {
        asked_together(letters, |(name, bytes)| self.leave(name, bytes)).into_iter().collect()
    }

    /// Reads a letter, and when it was left by the store's clock; nothing where there is none.
    ///
    /// # Errors
    /// If the store refuses, or does not answer.
    pub fn letter(&self, name: &str) -> Result<Option<(Vec<u8>, SystemTime)>, RemoteError> {
        let found = self.bucket.get(&format!("{LETTERS}/{name}"), LARGEST_RECORD);
        found.map_err(|trouble| RemoteError::of(&self.shown, "to be read", trouble))
    }

    /// Reads many, several at a time, in their order.
    ///
    /// # Errors
    /// As [`Remote::letter`].
    pub fn letters(&self, names: &[String]) -> Result<Vec<Option<Vec<u8>>>, RemoteError> {
        let read = asked_together(names, |name| self.letter(name));
        read.into_iter().map(|read| Ok(read?.map(|(bytes, _)| bytes))).collect()
    }

    /// The names of the letters in a folder of them.
    ///
    /// # Errors
    /// If the store refuses, does not answer, or does not say what it holds.
    pub fn letters_in(&self, folder: &str) -> Result<Vec<String>, RemoteError> {
        let listed = self.bucket.list(&format!("{LETTERS}/{folder}"));
        let listed =
            listed.map_err(|trouble| RemoteError::of(&self.shown, "to be listed", trouble))?;
        let name = |listed: Listed| Some(listed.name.get(LETTERS.len() + 1..)?.to_owned());
        Ok(listed.into_iter().filter_map(name).collect())
    }

    /// Removes letters, several at a time.
    ///
    /// # Errors
    /// If the store refuses, or does not answer.
    pub fn discard(&self, names: &[String]) -> Result<(), RemoteError> {
        let removed = asked_together(names, |name| {
            let removed = self.bucket.remove(&format!("{LETTERS}/{name}"));
            removed.map_err(|trouble| RemoteError::of(&self.shown, "to be cleared", trouble))
        });
        removed.into_iter().collect()
    }
}

impl Store {
    /// Makes sure that a result which is here is in the cache of many machines, now: somebody
    /// who has nothing else will read it there.
    ///
    /// # Errors
    /// In words, if it cannot be sent.
    pub fn send_now(&self, key: &Key) -> Result<(), String> {
        let Some(remote) = self.remote_handle() else {
            return Err("there is no shared cache".to_owned());
        };
        remote.send_now(&self.without_remote(), key)
    }

    /// Asks the cache of many machines again for what was not there a moment ago: somebody has
    /// just said that it is.
    pub fn ask_again(&self) {
        if let Some(remote) = self.remote_handle() {
            let mut state = remote.state();
            state.missing.clear();
            // Also where it failed before: there is no other way to the result.
            state.given_up.clear();
            state.down = false;
        }
    }

    /// The cache of many machines behind this one.
    pub fn remote(&self) -> Option<Arc<Remote>> {
        self.remote_handle()
    }
}

impl Remote {
    fn send_now(&self, store: &Store, key: &Key) -> Result<(), String> {
        if self.is_known_there(key) {
            return Ok(());
        }
        let told =
            |what: &str| Err(format!("cannot send to the shared cache `{}`: {what}", self.shown));
        if self.is_read_only() {
            return told("this run may only read there");
        }
        match self.sent(store, key) {
            Ok(super::Sent::There) => Ok(()),
            Ok(super::Sent::Gone) => told("the result was cleared away meanwhile"),
            Ok(super::Sent::OfCommand) => told("commands' results stay on their machine"),
            Ok(super::Sent::TooLarge(bytes)) => {
                told(&format!("the result has {bytes} bytes, more than `largest` of `[cache]`"))
            }
            Err((_, trouble)) => told(trouble.text()),
        }
    }
}
