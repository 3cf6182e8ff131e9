//! Memory that a manifest or a file asks for by a count: asked for before it is used, since
//! a program that gets none ends on the spot.
//!
//! It knows bytes and what the machine has, not what they are for.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::interrupt;
use crate::text::number;

/// The most memory that a run takes, shared out to what runs beside each other.
#[derive(Debug)]
pub struct Budget {
    most: u64,
    taken: Mutex<u64>,
    freed: Condvar,
}

/// Memory that a job has until it lets go.
#[derive(Debug)]
pub struct Share<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(most: u64) -> Budget {
        Budget { most, taken: Mutex::new(0), freed: Condvar::new() }
    }

    /// The bytes of it.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// Waits until so many bytes are free, and takes them. Nothing if the user asked to stop.
    ///
    /// What needs more than there is was refused before anything ran: here it takes everything.
    pub fn take(&self, bytes: u64) -> Option<Share<'_>> {
        /// How often one that waits looks for Ctrl-C.
        const LOOK: Duration = Duration::from_millis(100);
        let bytes = bytes.min(self.most);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken + bytes > self.most {
            if interrupt::requested() {
                return None;
            }
            let waited = self.freed.wait_timeout(taken, LOOK);
            taken = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken += bytes;
        Some(Share { budget: self, bytes })
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        *self.budget.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.budget.freed.notify_all();
    }
}

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
    use super::{Budget, ask};

    #[test]
    fn shares_of_a_budget_never_sum_to_more_than_it() {
        let budget = Budget::new(10);
        let most = std::sync::atomic::AtomicU64::new(0);
        let now = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for bytes in [3, 4, 5, 6, 7, 20] {
                let (budget, most, now) = (&budget, &most, &now);
                scope.spawn(move || {
                    use std::sync::atomic::Ordering::SeqCst;
                    let share = budget.take(bytes).expect("nobody stops it");
                    let here = bytes.min(10);
                    most.fetch_max(now.fetch_add(here, SeqCst) + here, SeqCst);
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    now.fetch_sub(here, SeqCst);
                    drop(share);
                });
            }
        });
        let most = most.into_inner();
        assert!((6..=10).contains(&most), "{most}");
    }

    #[test]
    fn what_no_machine_has_is_refused_in_words() {
        assert_eq!(ask(1 << 20), Ok(()));
        assert!(ask(1 << 60).expect_err("refused").contains("GiB"));
        assert!(ask(u64::MAX).expect_err("refused").contains("ask for less"));
    }
}
