//! The user's wish to stop, seen by everything that takes long.
//!
//! It only remembers that the wish was uttered; whoever computes asks for it.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Notes that the user wants to stop.
pub fn request() {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// Whether the user wants to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
