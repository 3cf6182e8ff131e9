//! What the runner and its process server say to each other: one JSON object a line.
//!
//! Plain data. Both ends are the same program, so there are no versions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// To the server.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Start a program.
    Start { id: u64, program: Program },
    /// Kill everything that a program has started, and itself.
    Kill { id: u64 },
}

/// A program to start.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Program {
    /// The file to execute.
    pub file: PathBuf,
    /// Its name for itself, and its arguments.
    pub argv: Vec<String>,
    /// All its variables.
    pub env: BTreeMap<String, String>,
    /// Where it works.
    pub folder: PathBuf,
    /// The files that take its two streams.
    pub stdout: PathBuf,
    pub stderr: PathBuf,
    /// No file that it writes may grow beyond.
    pub largest_file: Option<u64>,
}

/// From the server.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// The program did not start.
    Refused { id: u64, problem: String },
    /// The program and everything that it started are dead. One of the two is there.
    Ended { id: u64, exit: Option<i32>, signal: Option<i32> },
    /// The program is dead, and something that it started belongs to another user and lives.
    Left { id: u64 },
}
