//! Parses, runs, and ends the process with the exit code.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(runner::cli::main())
}
