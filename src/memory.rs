//! Memory that a manifest or a file asks for by a count: asked for before it is used, since
//! a program that gets none ends on the spot.
//!
//! It knows bytes and what the machine has, not what they are for.

use crate::text::number;

/// Whether so many bytes can be had now.
///
/// # Errors
/// In words, with how many are free.
pub fn ask(bytes: u64) -> Result<(), String> {
    let gib = |bytes: u64| number(bytes as f64 / f64::from(1 << 30));
    if let Some(free) = free().filter(|free| bytes > *free) {
        return Err(format!(
            "it needs {} GiB of memory, and {} GiB are free; ask for less, or use a larger machine",
            gib(bytes),
            gib(free)
        ));
    }
    // What one asks for may be limited below that.
    let count = usize::try_from(bytes).unwrap_or(usize::MAX);
    Vec::<u8>::new().try_reserve_exact(count).map_err(|_| {
        format!("it needs {} GiB of memory, which the system refuses; ask for less", gib(bytes))
    })
}

/// Bytes that the system could hand out now.
fn free() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::ask;

    #[test]
    fn what_no_machine_has_is_refused_in_words() {
        assert_eq!(ask(1 << 20), Ok(()));
        assert!(ask(1 << 60).expect_err("refused").contains("GiB"));
        assert!(ask(u64::MAX).expect_err("refused").contains("ask for less"));
    }
}
