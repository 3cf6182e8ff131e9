//! Programs of the user's: each attempt in a folder and a process group of its
//! own, and nothing of it outlives the runner.
//!
//! [`Processes`] starts programs through a small server process (`server`), which
//! is the parent of them all: when the runner dies, however it dies, the server
//! kills what is left. [`Attempt`] is a folder that is gone when its item is done.
//! [`command`] carries out the op `command` with both, [`external`] asks a program
//! for tensors, [`hook`] calls what is to hear of a run's end, [`slurm`] does work in jobs of a cluster. [`Slots`] shares the machine's cores, memory and GPUs among the jobs
//! of all runners on it.

pub mod command;
pub mod external;
pub mod hook;
pub mod slurm;

mod attempt;
mod keeper;
mod processes;
mod protocol;
mod server;
mod slots;

pub use attempt::{Attempt, Attempts};
pub use processes::{Ended, ProcessError, Processes, Request, Status};
pub use server::{SERVER_ARGUMENT, serve};
pub use slots::{Held, Machine, SlotError, Slots};
