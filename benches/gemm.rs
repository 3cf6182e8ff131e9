//! Speed of the emulated GEMM on one core: `cargo bench --bench gemm`.
//!
//! `y[N, 256] = x[N, 3584] * w[256, 3584]^T`, N = 64 where no N is named and 1 for
//! plain code; divan's `item/s` are multiply-adds per second. `fma_peak` is what
//! this core can do in f32 multiply-adds, measured in the same run: the yardstick.
//!
//! The limit, counted in the disassembly of the AVX-512 loops: E4M3 takes about
//! 285 arithmetic vector instructions and 133 loads for 1024 multiply-adds, which
//! is 71 cycles on four pipes: 14 multiply-adds a cycle. bf16 takes about 275 and
//! 80 for 512: 7 a cycle. README.md beside this file has what was predicted and
//! what was measured, step by step.

use divan::Bencher;
use divan::counter::ItemsCount;
use runner::block_format::BlockFormat;
use runner::compute::Ops;
use runner::compute::call::{Call, MadeWeight};
use runner::compute::emulated::chip::{Unit, chip};
use runner::compute::emulated::gemm::{Operand, Scales, gemm_prepared, prepare_for};
use runner::compute::emulated::quantize::{Codes, quantize_blocks, quantize_row};
use runner::compute::emulated::schedule::Schedule;
use runner::compute::emulated::simd::Kernel;
use runner::compute::reference::Reference;
use runner::dtype::Format;
use runner::model::{Weight, WeightType};
use runner::op::ChipName;
use runner::tensor::Tensor;

const K: usize = 3584;
const M: usize = 256;

fn main() {
    // One core: rates are per core.
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build_global()
        .expect("the pool is built once, here");
    divan::main();
}

fn values(count: usize, seed: u64) -> Vec<f32> {
    // A sum of four uniforms is normal enough.
    let mut state = seed;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
}

fn codes(format: Format, rows: usize, seed: u64) -> Codes {
    let scale = match format {
        Format::E4m3 | Format::E5m2 => 1.0 / 256.0,
        Format::Int8 => 1.0 / 64.0,
        _ => 1.0,
    };
    Codes::quantize(format, K, &values(rows * K, seed), scale).expect("whole rows")
}

fn kernel(name: &str) -> Option<Kernel> {
    Kernel::available().into_iter().find(|kernel| kernel.name() == name)
}

fn bench_gemm(bencher: Bencher, name: &str, format: Format, schedule: Schedule, n: usize) {
    let Some(kernel) = kernel(name) else { return };
    let unit: &Unit = chip(ChipName::Hopper).unit(format, format).expect("a Hopper format");
    let (x, w) = (codes(format, n, 1), codes(format, M, 2));
    let x = Operand { codes: &x, scales: Scales::Tensor(1.0) };
    let w = Operand { codes: &w, scales: Scales::Tensor(1.0) };
    let x = prepare_for(kernel, unit, &x).expect("an operand");
    bencher
        .counter(ItemsCount::new(n * M * K))
        .bench_local(|| gemm_prepared(&schedule, &x, &w, Format::F32).expect("a product"));
}

const KERNELS: [&str; 2] = ["avx2", "avx512"];

#[divan::bench(args = KERNELS)]
fn e4m3_fast(bencher: Bencher, name: &str) {
    bench_gemm(bencher, name, Format::E4m3, Schedule::FAST, 64);
}

#[divan::bench(args = KERNELS)]
fn e4m3_promoted(bencher: Bencher, name: &str) {
    bench_gemm(bencher, name, Format::E4m3, Schedule::PROMOTED, 64);
}

#[divan::bench(args = [1, 4, 16, 256])]
fn e4m3_fast_best_rows(bencher: Bencher, n: usize) {
    bench_gemm(bencher, Kernel::best().name(), Format::E4m3, Schedule::FAST, n);
}

#[divan::bench(args = [1, 4, 16, 256])]
fn bf16_best_rows(bencher: Bencher, n: usize) {
    bench_gemm(bencher, Kernel::best().name(), Format::Bf16, Schedule::FAST, n);
}

#[divan::bench(args = KERNELS)]
fn bf16(bencher: Bencher, name: &str) {
    bench_gemm(bencher, name, Format::Bf16, Schedule::FAST, 64);
}

#[divan::bench(args = KERNELS)]
fn int8(bencher: Bencher, name: &str) {
    bench_gemm(bencher, name, Format::Int8, Schedule::INTEGERS, 64);
}

#[divan::bench(args = KERNELS)]
fn int8_one_row(bencher: Bencher, name: &str) {
    bench_gemm(bencher, name, Format::Int8, Schedule::INTEGERS, 1);
}

#[divan::bench(args = KERNELS)]
fn tf32(bencher: Bencher, name: &str) {
    bench_gemm(bencher, name, Format::Tf32, Schedule::FAST, 64);
}

#[divan::bench(args = KERNELS)]
fn f32(bencher: Bencher, name: &str) {
    bench_gemm(bencher, name, Format::F32, Schedule::FAST, 64);
}

#[divan::bench]
fn plain_e4m3(bencher: Bencher) {
    bench_gemm(bencher, "plain", Format::E4m3, Schedule::FAST, 1);
}

#[divan::bench]
fn plain_bf16(bencher: Bencher) {
    bench_gemm(bencher, "plain", Format::Bf16, Schedule::FAST, 1);
}

/// Block-scaled operands on Blackwell's unit, conversion of x and of its scales left out. FP4 takes
/// the widest instructions there are, whatever is asked for.
#[divan::bench(args = ["mxfp8 avx2", "mxfp8 avx512", "mxfp6-e2m3 avx512", "mxfp4 avx512",
    "nvfp4 avx512"])]
fn blocks(bencher: Bencher, which: &str) {
    let (format, name) = which.split_once(' ').expect("a format and an instruction set");
    let format: BlockFormat = format.parse().expect("a format");
    let Some(kernel) = kernel(name) else { return };
    let unit = &chip(ChipName::Blackwell).block_unit(format).expect("a format of Blackwell").unit;
    let operand = |rows, seed| {
        let values = values(rows * K, seed);
        quantize_blocks(format, K, &values, format.whole_scale(2.0)).expect("whole rows")
    };
    let ((x, x_scales), (w, w_scales)) = (operand(64, 1), operand(M, 2));
    let x = Operand { codes: &x, scales: Scales::Blocks(x_scales) };
    let w = Operand { codes: &w, scales: Scales::Blocks(w_scales) };
    let x = prepare_for(kernel, unit, &x).expect("an operand");
    bencher
        .counter(ItemsCount::new(64 * M * K))
        .bench_local(|| gemm_prepared(&Schedule::FAST, &x, &w, Format::F32).expect("a product"));
}

/// Values per second, converted to a block-scaled format.
#[divan::bench(args = [BlockFormat::Mxfp8, BlockFormat::Nvfp4])]
fn quantize_in_blocks(bencher: Bencher, format: BlockFormat) {
    let values = values(64 * K, 3);
    bencher
        .counter(ItemsCount::new(values.len()))
        .bench_local(|| quantize_blocks(format, K, &values, 0.01).expect("whole rows"));
}

/// Values per second, one scale for all.
#[divan::bench(args = [Format::E4m3, Format::E5m2, Format::Int8, Format::Bf16, Format::F16])]
fn quantize(bencher: Bencher, format: Format) {
    let values = values(64 * K, 3);
    let mut codes = Codes::zeros(format, 64, K);
    bencher.counter(ItemsCount::new(values.len())).bench_local(|| {
        for (row, values) in values.chunks_exact(K).enumerate() {
            quantize_row(format, values, 0.013, &mut codes.row_mut(row));
        }
    });
}

/// The reference's product in f64, decoding of f32 weights and all, on as many threads as rayon
/// has: `RAYON_NUM_THREADS=1` for one core, whose peak in f64 is half of `fma_peak`.
#[divan::bench(args = [1, 16, 300])]
fn reference(bencher: Bencher, n: usize) {
    let made = MadeWeight::new("w".to_owned(), M, &values(M * K, 1));
    let x = Tensor::new(K, values(n * K, 2));
    bencher.counter(ItemsCount::new(n * M * K)).bench_local(|| {
        let weight = made.weight().expect("values");
        Reference.compute(&Call::Matmul { x: &x, weight, bias: None }).expect("a product")
    });
}

/// Block types, decoded a whole tensor at a time: values per second.
#[divan::bench(args = [WeightType::F16, WeightType::Q4_0, WeightType::Q4_1, WeightType::Q8_0,
    WeightType::Q4K, WeightType::Q6K, WeightType::Iq4Xs, WeightType::Iq2Xxs, WeightType::Iq3S])]
fn decode(bencher: Bencher, kind: WeightType) {
    let bytes: Vec<u8> = (0..kind.row_bytes(K) * M).map(|at| (at * 89 % 251) as u8).collect();
    let weight = Weight::new("w", kind, M, K, &bytes).expect("whole blocks");
    let mut out = vec![0.0; M * K];
    bencher.counter(ItemsCount::new(M * K)).bench_local(|| {
        weight.decode_rows(0..M, &mut out).expect("rows");
    });
}

/// The core's f32 multiply-adds per second, in the widest vectors it has.
#[divan::bench]
fn fma_peak(bencher: Bencher) {
    #[cfg(target_arch = "x86_64")]
    match Kernel::best().name() {
        "avx512" => bencher
            .counter(ItemsCount::new(x86::STEPS * x86::CHAINS * 16))
            // SAFETY: this kernel is the best one only where its features were detected.
            .bench_local(|| unsafe { x86::fma_avx512() }),
        "avx2" => bencher
            .counter(ItemsCount::new(x86::STEPS * x86::CHAINS * 8))
            // SAFETY: as above.
            .bench_local(|| unsafe { x86::fma_avx2() }),
        _ => {}
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    pub const STEPS: usize = 1 << 16;
    /// Independent chains: enough to hide the latency of a multiply-add.
    pub const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub fn fma_avx512() -> f32 {
        let factor = _mm512_set1_ps(divan::black_box(0.999));
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn fma_avx2() -> f32 {
        let factor = _mm256_set1_ps(divan::black_box(0.999));
        let mut sums = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        sums.into_iter().map(|sum| _mm_cvtss_f32(_mm256_castps256_ps128(sum))).sum()
    }
}
