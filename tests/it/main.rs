//! The integration tests, one binary: each module holds one part of the
//! project to things that nobody here wrote.

mod cache;
mod command;
mod command_line;
mod compute;
mod cuda;
mod golden;
mod manifest;
mod model;
mod peers;
mod receipts;
mod records;
mod stages;
mod tensor_cores;
