//! What was computed before, by content: keys and a store.
//!
//! An *action* is one computation; its key says everything that the result
//! depends on. The store keeps an action's record and the files that it made;
//! the stamps remember the digests of files elsewhere.
//! It knows nothing of stages or verdicts.

mod key;
mod remote;
mod stamps;
mod store;
mod upkeep;

pub use key::{Key, KeyWalk};
pub use remote::{
    LARGEST_SENT, Remote, RemoteBudget, RemoteCleared, RemoteError, RemoteOptions, RemoteReport,
    bring_runs, is_url,
};
pub use stamps::{Facts, Stamp, Stamps, is_written, now};
pub(crate) use store::write_whole;
pub use store::{
    Action, ActionLock, CacheError, NewAction, Store, is_draft, seal_of, sealed, unsealed,
};
pub use upkeep::{Budget, Cleared, Health, Held, Spare};
