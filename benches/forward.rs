//! Speed of whole forward passes of SmolLM2-135M on all cores: `cargo bench --bench forward`.
//!
//! It needs RUNNER_SMOLLM2, the path of the file that `scripts/fetch-smollm2.sh`
//! fetches. divan's `item/s` are tokens per second.

use divan::Bencher;
use divan::counter::ItemsCount;
use runner::compute::arms::{self, Shipped, Task, Workshop};
use runner::dtype::Format;
use runner::model::Model;
use runner::op::{
    Accumulate, ActivationScale, Arm, Capture, ChipName, Op, Recipe, Scale, WeightScale,
};

/// Tokens of the prompt.
const TOKENS: usize = 16;

const E4M3: Recipe = Recipe {
    gemm: Format::E4m3,
    scale: Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor },
    accumulate: Accumulate::Promoted,
    output: Format::Bf16,
    chip: ChipName::Hopper,
    stream: None,
    engine: None,
    emulate: None,
    codes: runner::op::Codes::Made,
    pin: runner::op::Pin::NONE,
    kv_cache: None,
    tensor_parallel: None,
};

fn main() {
    divan::main();
}

fn smollm2() -> Model {
    let path = std::env::var_os("RUNNER_SMOLLM2").unwrap_or_else(|| {
        panic!(
            "set RUNNER_SMOLLM2 to models/SmolLM2-135M-Instruct.Q4_1.gguf, \
             which scripts/fetch-smollm2.sh fetches"
        )
    });
    Model::open(path.as_ref()).expect("the file that the script fetched")
}

/// A pass over `tokens` tokens, and `decode` more one at a time.
fn bench_forward(bencher: Bencher, arm: Arm, capture: Capture, tokens: usize, decode: u32) {
    let model = smollm2();
    let prompt: Vec<u32> = (0..tokens as u32).map(|index| (504 + 797 * index) % 49_152).collect();
    let op = Op::Forward { capture, repeats: 1, decode, kv_cache: None };
    let task = Task { op: &op, model: &model, tokens: &prompt, input: None, spill: None };
    bencher.counter(ItemsCount::new(tokens + decode as usize)).bench_local(|| {
        let (ops, arithmetic) = Shipped::default().ops(arm, &E4M3).expect("an arm of the CPU");
        arms::compute(&task, &*ops, arithmetic, &mut |_| {}).expect("a forward pass")
    });
}

#[divan::bench(args = [1, TOKENS, 128])]
fn reference_logits(bencher: Bencher, tokens: usize) {
    bench_forward(bencher, Arm::Reference, Capture::Logits, tokens, 0);
}

#[divan::bench]
fn reference_every_site(bencher: Bencher) {
    bench_forward(bencher, Arm::Reference, Capture::EverySite, TOKENS, 0);
}

#[divan::bench]
fn reference_decode_8(bencher: Bencher) {
    bench_forward(bencher, Arm::Reference, Capture::Logits, 1, 8);
}

#[divan::bench]
fn emulated_e4m3_every_site(bencher: Bencher) {
    bench_forward(bencher, Arm::Emulated, Capture::EverySite, TOKENS, 0);
}
