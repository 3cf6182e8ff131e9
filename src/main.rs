//! Parses, runs, and ends the process with the exit code.

/// Large texts are written on many threads: the system's allocator gives their memory back
/// to the kernel and asks for it again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc 3's `mimalloc.h`: after how many milliseconds freed memory goes back to
/// the kernel.
const PURGE_DELAY: i32 = 15;

fn main() -> std::process::ExitCode {
    // A pass frees tensors and asks for others all the time; what goes back to the kernel between
    // two of them is a tenth to a third of the pass. A setting in the environment stands above it.
    // SAFETY: it sets a number that mimalloc reads, before any other thread runs.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, 5_000) };
    std::process::ExitCode::from(runner::cli::main())
}
