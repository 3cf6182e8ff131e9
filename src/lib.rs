//! `runner` answers one question: the GPU's numbers differ from the CPU's; is
//! that the arithmetic we chose, or a bug, and where does it start?
//!
//! The modules stand in the order in which a run flows through them.

// Vocabulary: formats and their codecs, host tensors, what a stage computes, what is measured.
pub mod dtype;
pub mod metric;
pub mod op;
pub mod tensor;

// Beside everything: the user's wish to stop.
pub mod interrupt;

// 1 TOML to checked stages and contracts, all problems at once.
pub mod manifest;

// 2 The order of the stages.
pub mod graph;

// 3 Weights, configuration, tokenizer, synthetic models.
pub mod model;

// 4 One op on one arm.
pub mod compute;

// Beside: `runner chip`.
pub mod chip_command;
