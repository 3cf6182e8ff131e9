//! The integration tests, one binary: each module holds one part of the
//! project to things that nobody here wrote.

mod cache;
mod command;
mod command_line;
mod compute;
mod cuda;
mod external;
mod faults;
mod golden;
mod hugging_face;
mod judge;
mod manifest;
mod model;
mod nightly;
mod peers;
mod readers;
mod receipts;
mod recorded;
mod records;
mod single;
mod stages;
mod tensor_cores;
mod vocabulary;
