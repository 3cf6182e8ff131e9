//! What was computed before, by content: keys and a store.
//!
//! An *action* is one computation; its key says everything that the result
//! depends on. The store keeps an action's record and the tensors that it made.
//! It knows nothing of stages or verdicts.

mod key;
mod store;

pub use key::{Key, KeyWalk};
pub(crate) use store::write_whole;
pub use store::{Action, CacheError, Store};
