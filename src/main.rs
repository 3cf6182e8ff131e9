//! Parses, runs, and ends the process with the exit code.

fn main() {}
