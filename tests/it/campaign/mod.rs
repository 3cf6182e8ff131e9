//! The campaign against hostile files and faults: what was once tried for a day is tried again
//! by a number of mutants, faults and rounds that variables name (`scripts/campaign.sh`).

mod faults;
mod gguf;
mod mutate;
mod mutants;
mod readers;
mod seeds;

/// A number that a variable names, or the one that a plain `cargo test` has time for.
fn count_of(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Err(_) => otherwise,
        Ok(text) => text
            .replace('_', "")
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is `{text}` and must be a number")),
    }
}

/// The seed of everything that is drawn.
fn seed() -> u64 {
    count_of("RUNNER_SEED", 1)
}
