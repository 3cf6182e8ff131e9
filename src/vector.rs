//! Runs a loop with the widest vector instructions that this machine has.
//!
//! The loops themselves are plain Rust; compiling them once per instruction set
//! is all that happens here. It knows nothing of what they compute, and it must
//! not matter to the result: every caller is written so that the instruction
//! set cannot change a bit.

use pulp::{Arch, NullaryFnOnce};

/// A loop that is compiled once for every instruction set.
///
/// `run` must be `#[inline(always)]`, and so must what it calls (a function that is handed over as a
/// parameter, or a closure in `extend` or `map`, often is not), or the loop is
/// compiled for the baseline only.
pub trait Kernel {
    /// What the loop returns.
    type Output;

    /// The loop. `FMA` says whether a fused multiply-add is an instruction
    /// here; a kernel may use it only where it cannot change the result, as
    /// for the exact product of two f32 in f64.
    fn run<const FMA: bool>(self) -> Self::Output;
}

struct Fused<K, const FMA: bool>(K);

impl<K: Kernel, const FMA: bool> NullaryFnOnce for Fused<K, FMA> {
    type Output = K::Output;

    #[inline(always)]
    fn call(self) -> K::Output {
        self.0.run::<FMA>()
    }
}

/// Runs `kernel` compiled for this machine's instruction set.
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    let arch = Arch::new();
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) | Arch::V4(_) => arch.dispatch(Fused::<K, true>(kernel)),
        _ => arch.dispatch(Fused::<K, false>(kernel)),
    }
}
