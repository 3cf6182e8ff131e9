//! The integration tests: each module reads as the specification of one room.

mod manifest;
