//! `runner` answers one question: the GPU's numbers differ from the CPU's; is
//! that the arithmetic we chose, or a bug, and where does it start?
//!
//! The modules stand in the order in which a run flows through them.

// Vocabulary: chips, formats and their codecs, host tensors, what a stage computes, what is measured,
// seeded numbers.
pub mod block_format;
pub mod chip;
pub mod dtype;
pub mod engine;
pub mod layer_sites;
pub mod metric;
pub mod op;
pub mod random;
pub mod tensor;
pub mod text;
pub mod vector;

// Beside everything: the only ways to a foreign file, to memory by a count, and to a terminal.
pub mod files;
pub mod memory;
pub mod terminal;

// Beside everything: the user's wish to stop, and the machine's name.
pub mod interrupt;
pub mod machine;

// 1 TOML to checked stages and contracts, all problems at once.
pub mod manifest;
pub mod schema;

// 2 The order of the stages.
pub mod graph;

// Weights, configuration, tokenizer, synthetic models.
pub mod model;

// Tensors in files that other programs wrote.
pub mod tensor_file;

// Beside the flow: keys, the content-addressed store, digests of files.
pub mod cache;

// Programs of the user's: processes and their attempts.
pub mod executor;

// 3 Per (stage, arm): run, reuse or blocked, with the reason.
pub mod plan;

// 4 One op on one arm.
pub mod compute;

// 5 Two streams of tensors held against each other.
pub mod compare;

// Beside the flow: one kernel's dump, with no stage and no contract.
pub mod judge;

// 6 Measures and a contract become a verdict.
pub mod verdict;

// The heart: a plan becomes verdicts; and what it says while it beats.
pub mod run;
pub mod event;

// Beside the flow: passes of other engines, recorded through their own libraries.
pub mod capture;

// Beside the flow: bugs planted into arms, to see that verdicts find them.
pub mod falsify;

// 7 What a run was, and how people and machines read it.
pub mod record;
pub mod report;

// 8 What unattended runs need: baseline, summary, metrics, retention.
pub mod nightly;

// 9 Many machines' runs as one answer.
pub mod fleet;

// The commands.
pub mod chip_command;
pub mod cli;
