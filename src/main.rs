//! Parses, runs, and ends the process with the exit code.

/// Large texts are written on many threads: the system's allocator gives their memory back
/// to the kernel and asks for it again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(runner::cli::main())
}
