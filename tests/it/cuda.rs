//! What of the CUDA room can be held to account without a GPU.

#![cfg(feature = "cuda")]

use runner::compute::cuda::program::{KERNELS, compile, compile_kept, compile_usual};
use runner::compute::cuda::{emulation, functions, sweep};

#[test]
#[ignore = "needs libnvrtc, which .ci/run installs; run with --include-ignored"]
fn every_kernel_compiles_for_every_chip_and_nothing_is_contracted() {
    for capability in [(8, 0), (8, 9), (9, 0), (10, 0)] {
        let program = compile(capability, None).unwrap_or_else(|e| panic!("{capability:?}: {e}"));
        for kernel in KERNELS {
            assert!(program.contains(&format!(".entry {kernel}(")), "{capability:?}: {kernel}");
        }
        // Rounding is spelt out: no operation is left for the assembler to fuse or to flush.
        for loose in [
            "mul.f32",
            "add.f32",
            "sub.f32",
            "mul.ftz",
            "add.ftz",
            "div.approx",
            "sqrt.approx",
            "ex2.approx",
        ] {
            assert!(!program.contains(loose), "{capability:?}: `{loose}`");
        }
        // The reference's sums round once for each product, in f64 alone.
        assert!(program.contains("fma.rn.f64"), "{capability:?}");
        for loose in ["mul.f64", "add.f64", "fma.rm.f64", "fma.rp.f64", "fma.rz.f64"] {
            assert!(!program.contains(loose), "{capability:?}: `{loose}`");
        }
        let program_of_functions = compile_usual(&functions::source(), capability);
        let program_of_functions =
            program_of_functions.unwrap_or_else(|e| panic!("{capability:?}: {e}"));
        for own in [".entry functions(", "lg2.approx.ftz.f32", "cos.approx.ftz.f32"] {
            assert!(program_of_functions.contains(own), "{capability:?}: `{own}`");
        }
        let swept = compile_kept(sweep::SOURCE, &sweep::KERNELS, capability, None);
        let emulated = compile_kept(emulation::SOURCE, &emulation::KERNELS, capability, None);
        let own = [(swept, &sweep::KERNELS[..]), (emulated, &emulation::KERNELS[..])];
        for (program, kernels) in own {
            let program = program.unwrap_or_else(|e| panic!("{capability:?}: {e}"));
            for kernel in kernels {
                assert!(program.contains(&format!(".entry {kernel}(")), "{capability:?}: {kernel}");
            }
            for loose in ["mul.f32", "add.f32", "sub.f32", "mul.f64", "add.f64", ".ftz"] {
                assert!(!program.contains(loose), "{capability:?}: `{loose}`");
            }
        }
        let hardware = program.contains("cvt.rn.satfinite.e4m3x2.f32");
        assert_eq!(hardware, capability >= (8, 9), "{capability:?}");
    }
}
