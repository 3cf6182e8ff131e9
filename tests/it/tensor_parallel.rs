//! `tensor_parallel`: passes that several GPUs compute together.

use std::fs;

use runner::compute::Ops;
use runner::compute::call::{Call, MadeWeight};
use runner::compute::emulated::arm::Emulated;
use runner::compute::emulated::chip::chip;
use runner::compute::emulated::gemm::{Operand, Scales, gemm};
use runner::compute::emulated::quantize::Codes;
use runner::compute::emulated::schedule::Schedule;
use runner::dtype::Format;
use runner::op::{ActivationScale, ChipName, Recipe, Scale, WeightScale};
use runner::tensor::Tensor;

use crate::checkpoint::said_in;

fn recipe(ranks: u32) -> Recipe {
    let tensor_parallel = std::num::NonZeroU32::new(ranks).filter(|ranks| ranks.get() > 1);
    Recipe { chip: ChipName::Hopper, tensor_parallel, ..Recipe::default() }
}

/// Seeded values with a few that are large.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| 4.0 * draw() * draw() * draw()).collect()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| if value.abs() > most { value.abs() } else { most })
}

/// Some columns of a matrix.
fn columns(values: &[f32], width: usize, from: usize, to: usize) -> Vec<f32> {
    values.chunks(width).flat_map(|row| row[from..to].iter().copied()).collect()
}

/// A type as the package `half` rounds to it.
fn rounded(format: Format, value: f32) -> f32 {
    match format {
        Format::Bf16 => half::bf16::from_f32(value).to_f32(),
        Format::F16 => half::f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// One rank's product: its slice of x with a scale of its own, its slice of w with the scales that
/// the whole weight has.
fn of_rank(recipe: &Recipe, x: &[f32], w: &[f32], inner: usize, w_scales: &[f32]) -> Tensor {
    let format = recipe.gemm;
    let most = if format.is_fp8() { format.max_finite() } else { 1.0 };
    let x_scales: Vec<f32> = match recipe.scale.activation {
        _ if !format.is_fp8() => vec![1.0],
        ActivationScale::Tensor => vec![largest(x) / most],
        _ => x.chunks(inner).map(|row| largest(row) / most).collect(),
    };
    let codes = |values: &[f32], scales: &[f32]| {
        // Row by row, as each may have a scale of its own.
        let mut all = Vec::new();
        for (row, values) in values.chunks(inner).enumerate() {
            let scale = scales[row.min(scales.len() - 1)];
            all.extend(values.iter().map(|value| format.decode(format.encode(value / scale))));
        }
        Codes::quantize(format, inner, &all, 1.0).unwrap()
    };
    let (x_codes, w_codes) = (codes(x, &x_scales), codes(w, w_scales));
    let scales = |scales: &[f32], per_row: bool| match per_row {
        true => Scales::Row(scales.to_vec()),
        false => Scales::Tensor(scales[0]),
    };
    let by_token = recipe.scale.activation == ActivationScale::Token && format.is_fp8();
    let by_channel = recipe.scale.weight == WeightScale::Channel && format.is_fp8();
    let x = Operand { codes: &x_codes, scales: scales(&x_scales, by_token) };
    let w = Operand { codes: &w_codes, scales: scales(w_scales, by_channel) };
    let unit = chip(recipe.chip).unit(format, format).unwrap();
    gemm(unit, &Schedule::of(recipe), &x, &w, recipe.output).unwrap()
}

#[test]
fn a_product_over_ranks_is_their_products_rounded_and_added() {
    const WIDTH: usize = 768;
    let (rows, outputs) = (5, 130);
    let (x, w) = (values(rows * WIDTH, 1), values(outputs * WIDTH, 2));
    let bias = values(outputs, 3);
    let per_tensor = Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor };
    let per_row = Scale { weight: WeightScale::Channel, activation: ActivationScale::Token };
    let made = MadeWeight::new("blk.3.ffn_down.weight".to_owned(), outputs, &w);
    let of_bias = MadeWeight::new("blk.3.ffn_down.bias".to_owned(), 1, &bias);
    let tensor = Tensor::new(WIDTH, x.clone());
    let mut apart = 0;
    for gemm in [Format::E4m3, Format::Bf16, Format::F16, Format::F32] {
        for (scale, output, ranks) in [
            (per_tensor, Format::Bf16, 2),
            (per_row, Format::Bf16, 2),
            (per_row, Format::F32, 3),
            (per_tensor, Format::F16, 4),
        ] {
            let recipe = Recipe { gemm, scale, output, ..recipe(ranks) };
            let most = if gemm.is_fp8() { gemm.max_finite() } else { 1.0 };
            let w_scales: Vec<f32> = match scale.weight {
                _ if !gemm.is_fp8() => vec![1.0],
                WeightScale::Tensor => vec![largest(&w) / most],
                _ => w.chunks(WIDTH).map(|row| largest(row) / most).collect(),
            };
            let inner = WIDTH / ranks as usize;
            for biased in [false, true] {
                let mut sum: Option<Vec<f32>> = None;
                for rank in 0..ranks as usize {
                    let cut = |values| columns(values, WIDTH, rank * inner, (rank + 1) * inner);
                    let part = of_rank(&recipe, &cut(&x), &cut(&w), inner, &w_scales);
                    let mut part = part.into_data();
                    // The first rank adds the bias, and what it gives has the output's type.
                    if biased && rank == 0 {
                        for row in part.chunks_mut(outputs) {
                            for (value, bias) in row.iter_mut().zip(&bias) {
                                *value = rounded(output, *value + bias);
                            }
                        }
                    }
                    sum = Some(match sum {
                        None => part,
                        Some(sum) => {
                            let both = sum.iter().zip(&part);
                            both.map(|(sum, part)| rounded(output, sum + part)).collect()
                        }
                    });
                }
                let weight = made.weight().unwrap();
                let bias = biased.then(|| of_bias.weight().unwrap());
                let call = Call::Matmul { x: &tensor, weight, bias };
                let arm = Emulated::new(&recipe).unwrap();
                let got = arm.compute(&call).unwrap();
                let what = format!("{gemm}, {scale:?}, {output}, {ranks} ranks, {biased}");
                assert_eq!(got.data(), sum.unwrap(), "{what}");
                let alone = Recipe { tensor_parallel: None, ..recipe };
                let alone = Emulated::new(&alone).unwrap().compute(&call).unwrap();
                apart += usize::from(alone != got);
            }
        }
    }
    assert_eq!(apart, 32, "one GPU alone gives other bits");
}

#[test]
fn ranks_with_blocks_of_scales_take_those_of_their_blocks() {
    const WIDTH: usize = 512;
    let (x, w) = (values(3 * WIDTH, 4), values(200 * WIDTH, 5));
    let scale = Scale { weight: WeightScale::Block128, activation: ActivationScale::Block128 };
    let made = MadeWeight::new("blk.0.attn_output.weight".to_owned(), 200, &w);
    let of = |ranks: u32, name: &str, x: &[f32], w: &[f32], width: usize| {
        let made = MadeWeight::new(name.to_owned(), 200, w);
        let recipe = Recipe { scale, output: Format::F32, ..recipe(ranks) };
        let x = Tensor::new(width, x.to_vec());
        let call = Call::Matmul { x: &x, weight: made.weight().unwrap(), bias: None };
        Emulated::new(&recipe).unwrap().compute(&call).unwrap()
    };
    // Blocks lie within a rank, so that its slice of w has the blocks that it has alone.
    let half = |values, at: usize| columns(values, WIDTH, at * 256, (at + 1) * 256);
    let parts = [0, 1].map(|at| of(1, "w", &half(&x, at), &half(&w, at), 256));
    let sum: Vec<f32> = parts[0].data().iter().zip(parts[1].data()).map(|(a, b)| a + b).collect();
    assert_eq!(of(2, "blk.0.attn_output.weight", &x, &w, WIDTH).data(), sum);
    // A cut through a block is refused.
    let recipe = Recipe { scale, ..recipe(8) };
    let x = Tensor::new(WIDTH, x);
    let call = Call::Matmul { x: &x, weight: made.weight().unwrap(), bias: None };
    let error = Emulated::new(&recipe).unwrap().compute(&call).unwrap_err().to_string();
    assert!(error.contains("512 elements of K, which are not 8 equal parts of whole"), "{error}");
    assert!(error.contains("what goes: 2, 4"), "{error}");
}

#[test]
fn products_whose_outputs_are_dealt_out_keep_their_bits() {
    let x = Tensor::new(256, values(3 * 256, 6));
    let w = values(64 * 256, 7);
    for name in ["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"] {
        let made = MadeWeight::new(format!("blk.0.{name}.weight"), 64, &w);
        let call = Call::Matmul { x: &x, weight: made.weight().unwrap(), bias: None };
        let [alone, dealt] =
            [1, 4].map(|ranks| Emulated::new(&recipe(ranks)).unwrap().compute(&call).unwrap());
        assert_eq!(alone, dealt, "{name}");
    }
}

/// What `runner` says of one stage.
fn said(model: &str, recipe: &str, stage: &str, command: &[&str]) -> (Option<i32>, String) {
    said_in(command, model, recipe, |stages| {
        let manifest = format!("id = \"B\"\ntitle = \"t\"\n{stage}\n");
        fs::write(stages.join("b.toml"), manifest).unwrap();
    })
}

const EVERY_SITE: &str = "contract = \"per-layer\"\n[forward]\ncapture = \"every-site\"";
const LOGITS: &str =
    "contract = \"reproducer\"\n[forward]\ncapture = \"logits\"\nrepeats = 2\ndecode = 4";

#[test]
fn a_clean_pass_over_several_gpus_passes_every_contract() {
    let assumed = "is assumed: the order in which more than two GPUs' results are added";
    for (model, recipe, is_assumed) in [
        ("qwen2-tiny", "tensor_parallel = 2\nchip = \"hopper\"", false),
        ("qwen2-tiny", "tensor_parallel = 4\ngemm = \"bf16\"\nchip = \"hopper\"", true),
        // Its products have biases, which the first rank adds.
        ("starcoder2-tiny", "tensor_parallel = 2\ngemm = \"bf16\"", false),
    ] {
        for stage in [EVERY_SITE, LOGITS] {
            let run = ["run", "stages", "--format", "plain"];
            let (code, said) = said(&format!("synthetic:{model}"), recipe, stage, &run);
            assert_eq!(code, Some(0), "{recipe}: {said}");
            let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(words.contains(assumed), is_assumed, "{recipe}: {said}");
        }
    }
    let words = Emulated::new(&recipe(2)).unwrap().describe();
    assert!(words.ends_with(", K over 2 ranks, added in bf16 by rank"), "{words}");
}

#[test]
fn a_model_that_gpus_cannot_share_is_refused_before_anything_runs() {
    let tiny = "synthetic:qwen2-tiny";
    let block = "scale = { weight = \"block128\", activation = \"block128\" }";
    let of_blocks = format!("tensor_parallel = 4\n{block}");
    for (model, recipe, words) in [
        (tiny, "tensor_parallel = 3", "4 heads of queries do not go to 3 GPUs whole"),
        (tiny, "tensor_parallel = 8", "4 heads of queries do not go to 8 GPUs whole"),
        ("synthetic:qwen2-tiny@3", "tensor_parallel = 4", "6 heads of keys and values neither go"),
        (tiny, &of_blocks, "equal parts of whole blocks of 128 scaled together"),
        ("synthetic:mixtral-tiny", "tensor_parallel = 2", "this model has a mixture of experts"),
        ("synthetic:deepseek-v3-tiny", "tensor_parallel = 2", "tensor_parallel = 2"),
        ("synthetic:qwen3-next-tiny", "tensor_parallel = 2", "tensor_parallel = 2"),
        (tiny, "tensor_parallel = 0", "tensor_parallel"),
        (tiny, "tensor_parallel = 2\n[resources]\ngpus = 1", "takes more GPUs than `gpus = 1`"),
        (tiny, "engine = \"vllm\"\ntensor_parallel = 2", "not known of the engine `vllm`"),
    ] {
        let (code, said) = said(model, recipe, EVERY_SITE, &["plan", "stages"]);
        assert_ne!(code, Some(0), "{recipe}: {said}");
        assert!(said.contains(words), "{recipe}: {said}");
    }
}

#[test]
fn the_number_of_gpus_is_part_of_the_keys_of_what_they_make_and_of_no_other() {
    let explained = |recipe| {
        let command = ["plan", "stages", "--explain"];
        let (code, said) = said("synthetic:qwen2-tiny", recipe, EVERY_SITE, &command);
        assert_eq!(code, Some(0), "{said}");
        said
    };
    let (one, two) = (explained(""), explained("tensor_parallel = 2"));
    assert!(!one.contains("tensor_parallel"), "{one}");
    assert_eq!(explained("tensor_parallel = 1"), one);
    assert_eq!(two.matches("\"tensor_parallel\":2").count(), 1, "{two}");
    let reference =
        |said: &str| said.lines().find(|line| line.contains("reference")).map(str::to_owned);
    assert_eq!(reference(&one), reference(&two));
    let json = serde_json::to_string(&Recipe::default()).unwrap();
    assert!(!json.contains("tensor_parallel"), "{json}");
}

#[test]
fn a_planted_bug_of_a_sum_is_found_and_named() {
    for (model, lines) in [("synthetic:qwen2-tiny", 2), ("synthetic:starcoder2-tiny", 2)] {
        let command =
            ["falsify", "stages", "--bugs", "GPU", "--models", model, "--tokens", "3,60,17,0,42"];
        let (code, said) = said(model, "tensor_parallel = 2", EVERY_SITE, &command);
        assert_eq!(code, Some(0), "{model}: {said}");
        let above = |line: &&str| line.contains("above the floor");
        for line in said.lines().filter(above) {
            assert_eq!(line.matches("(100.0 %)").count(), 3, "{model}: {said}");
        }
        assert_eq!(said.lines().filter(above).count(), lines, "{model}: {said}");
    }
}
