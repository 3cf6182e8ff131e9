//! The integration tests, one binary: each module holds one part of the
//! project to things that nobody here wrote.

mod architectures;
mod cache;
mod checkpoint;
mod campaign;
mod clean;
mod command;
mod command_line;
mod compute;
mod cuda;
mod engine_kernels;
mod engines;
mod data;
mod external;
mod faults;
mod foreign_engine;
mod golden;
mod hostile;
mod hugging_face;
mod judge;
mod manifest;
mod missing;
mod model;
mod model_compare;
mod nightly;
mod peers;
mod quantised;
mod readers;
mod receipts;
mod recorded;
mod records;
mod single;
mod stages;
mod tensor_cores;
mod tidy;
mod vocabulary;
