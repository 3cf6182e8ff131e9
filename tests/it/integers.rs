//! Products of 8-bit integers: held to sums in 64 bits, to the kernel that gives every bit of vLLM's passes
//! over an int8 checkpoint (`engines.rs`), and to the codes that such a checkpoint holds.

use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use runner::compute::Ops;
use runner::compute::call::Call;
use runner::compute::emulated::arm::Emulated;
use runner::compute::emulated::chip::chip;
use runner::compute::emulated::gemm::{
    MOST_INTEGERS, Operand, Scales, gemm, gemm_prepared, prepare_for,
};
use runner::compute::emulated::quantize::{CodeData, Codes};
use runner::compute::emulated::schedule::Schedule;
use runner::compute::emulated::simd::Kernel;
use runner::compute::engine_kernels::int8;
use runner::dtype::Format;
use runner::model::Model;
use runner::op::{ActivationScale, ChipName, Recipe, Scale, WeightScale};
use runner::tensor::Tensor;

use crate::checkpoint::said_in;

const UNIT: ChipName = ChipName::Hopper;

fn codes(rows: usize, width: usize, bytes: &[u8]) -> Codes {
    let data = (0..rows * width).map(|at| bytes[at % bytes.len()]).collect();
    Codes::new(Format::Int8, rows, width, CodeData::Bits8(data)).unwrap()
}

fn bare(codes: &Codes) -> Operand<'_> {
    Operand { codes, scales: Scales::Tensor(1.0) }
}

/// Seeded values, some of them large.
fn values(rows: usize, width: usize, seed: u32) -> Tensor {
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    Tensor::new(width, (0..rows * width).map(|_| 3.0 * draw() * draw() * draw()).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn sums_of_integers_are_exact_whatever_computes_them(
        x in prop::collection::vec(any::<u8>(), 61..400),
        w in prop::collection::vec(any::<u8>(), 67..400),
        shape in (1usize..12, 1usize..40, 1usize..700),
        parts in 1u32..5,
    ) {
        let (n, m, k) = shape;
        let (x_codes, w_codes) = (codes(n, k, &x), codes(m, k, &w));
        let unit = chip(UNIT).unit(Format::Int8, Format::Int8).unwrap();
        for kernel in Kernel::available() {
            let x = prepare_for(kernel, unit, &bare(&x_codes)).unwrap();
            let schedule = Schedule::INTEGERS.with_split_k(parts);
            let y = gemm_prepared(&schedule, &x, &bare(&w_codes), Format::F32).unwrap();
            for row in 0..n {
                for column in 0..m {
                    let sum: i64 = x_codes.row(row).iter().zip(w_codes.row(column).iter())
                        .map(|(x, w)| i64::from(x as u8 as i8) * i64::from(w as u8 as i8)).sum();
                    prop_assert_eq!(y.row(row)[column], sum as f32, "{} {:?}", kernel.name(), shape);
                }
            }
        }
    }
}

#[test]
fn the_longest_sums_fit_and_longer_ones_are_refused() {
    let unit = chip(UNIT).unit(Format::Int8, Format::Int8).unwrap();
    let least = codes(1, MOST_INTEGERS, &[0x80]);
    for kernel in Kernel::available() {
        let x = prepare_for(kernel, unit, &bare(&least)).unwrap();
        let y = gemm_prepared(&Schedule::INTEGERS, &x, &bare(&least), Format::F32).unwrap();
        assert_eq!(y.data(), [(MOST_INTEGERS as f64 * 16_384.0) as f32], "{}", kernel.name());
    }
    let long = codes(1, MOST_INTEGERS + 1, &[1]);
    let refused = gemm(unit, &Schedule::INTEGERS, &bare(&long), &bare(&long), Format::F32);
    let refused = refused.expect_err("may overflow").to_string();
    assert!(refused.contains("131072") && refused.contains("131071"), "{refused}");
}

#[test]
fn scaled_products_have_the_bits_of_the_kernel_that_vllms_passes_show() {
    let (x, w) = (values(9, 384, 3), values(40, 384, 4));
    let of_rows = |values: &Tensor| {
        let rows = (0..values.rows()).map(|row| int8::quantised(values.row(row)));
        let (codes, scales): (Vec<Vec<i8>>, Vec<f32>) = rows.unzip();
        let bytes: Vec<u8> = codes.into_iter().flatten().map(|code| code as u8).collect();
        (bytes, scales)
    };
    let ((x_bytes, x_scales), (w_bytes, w_scales)) = (of_rows(&x), of_rows(&w));
    let (x_codes, w_codes) = (codes(9, 384, &x_bytes), codes(40, 384, &w_bytes));
    let unit = chip(UNIT).unit(Format::Int8, Format::Int8).unwrap();
    for output in [Format::F32, Format::Bf16, Format::F16] {
        let weight = int8::Weight { codes: &w_bytes, scales: w_scales.clone(), bias: None };
        let theirs = int8::product(&x, &weight, output);
        let x = Operand { codes: &x_codes, scales: Scales::Row(x_scales.clone()) };
        let w = Operand { codes: &w_codes, scales: Scales::Row(w_scales.clone()) };
        let y = gemm(unit, &Schedule::INTEGERS, &x, &w, output).unwrap();
        assert_eq!(y, theirs, "{output}");
        // cuBLASLt's order of scales is another one, and some bits say so.
        let other = gemm(unit, &Schedule::FAST, &x, &w, output).unwrap();
        assert!(output != Format::F32 || other != theirs);
    }
}

#[test]
fn integers_are_rounded_to_even_and_saturate_and_no_number_is_zero() {
    for step in -2200..2200 {
        let value = step as f32 / 16.0;
        let expected = value.round_ties_even().clamp(-128.0, 127.0);
        assert_eq!(Format::Int8.decode(Format::Int8.encode(value)), expected, "{value}");
    }
    let said = [f32::NAN, f32::INFINITY, -f32::INFINITY, -0.0].map(|v| Format::Int8.round(v));
    assert_eq!(said, [0.0, 127.0, -128.0, 0.0]);
    for code in 0..256 {
        assert_eq!(Format::Int8.encode(Format::Int8.decode(code)), code);
    }
}

fn recipe() -> Recipe {
    let scale = Scale { weight: WeightScale::Channel, activation: ActivationScale::Token };
    Recipe { gemm: Format::Int8, scale, chip: UNIT, ..Recipe::default() }
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

#[test]
fn weights_that_a_file_holds_in_integers_are_not_converted_again() {
    for name in ["examples/vllm-checkpoints/int8", "tests/fixtures/quantised/int8-rows"] {
        let model = Model::open(&folder(name)).unwrap();
        let arm = Emulated::new(&recipe()).unwrap();
        let mut halved = 0;
        for weight in ["blk.0.attn_q", "blk.0.ffn_down"] {
            let weight = model.tensor(&format!("{weight}.weight")).unwrap();
            let values = weight.to_vec().unwrap();
            let Some(of_weight) = arm.of_weight(&weight).unwrap() else {
                // bitsandbytes' values are no code times a scale.
                assert!(name.ends_with("int8-rows"));
                continue;
            };
            let (codes, scales) = of_weight.quantise_weight_rows(weight, 0, &values, 1.0);
            let (width, mut largest) = (weight.width(), vec![0.0f32; weight.rows()]);
            for (at, value) in values.iter().enumerate() {
                let (row, column) = (at / width, at % width);
                let code = codes.decode_row(row)[column];
                assert_eq!(code * scales.at(row, column, width), *value, "{name} {at}");
                largest[row] = largest[row].max(code.abs());
            }
            halved += largest.iter().filter(|most| **most < 127.0).count();
            assert_eq!(of_weight.recipe().gemm, Format::Int8);
            assert!(of_weight.of_weight(&weight).unwrap().is_none());
        }
        println!("{name}: {halved} rows without a code of 127");
    }
}

#[test]
fn what_is_no_number_reaches_its_own_row_and_no_other() {
    let model = Model::open(&folder("examples/vllm-checkpoints/int8")).unwrap();
    let arm = Emulated::new(&recipe()).unwrap();
    let weight = model.tensor("blk.0.attn_q.weight").unwrap();
    let clean = values(4, weight.width(), 7);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = clean.clone();
        x.row_mut(2)[5] = bad;
        let of = |x: &Tensor| arm.compute(&Call::Matmul { x, weight, bias: None }).unwrap();
        let (y, before) = (of(&x), of(&clean));
        assert!(y.row(2).iter().all(|y| y.is_nan()), "{bad}");
        for row in [0, 1, 3] {
            assert_eq!(y.row(row), before.row(row), "{bad}");
        }
    }
}

#[test]
fn chips_and_scales_that_do_not_go_with_integers_are_refused_before_anything_runs() {
    let stage = "id = \"A\"\nquestion = \"?\"\ncontract = \"forward\"\n[forward]\n";
    let said = |recipe: &str| {
        let put = |stages: &Path| std::fs::write(stages.join("a.toml"), stage).unwrap();
        said_in(&["check", "stages"], "synthetic:qwen2-tiny", recipe, put)
    };
    let (code, volta) = said("gemm = \"int8\"\nchip = \"volta\"");
    assert!(code != Some(0) && volta.contains("the chip `volta` has no `int8`"), "{volta}");
    let block = "gemm = \"int8\"\n[recipe.scale]\nweight = \"block128\"\nactivation = \"block128\"";
    let (code, block) = said(block);
    assert!(code != Some(0) && block.contains("write `channel` and `token`"), "{block}");
    let (code, output) = said("gemm = \"int8\"\noutput = \"int8\"");
    assert!(code != Some(0) && output.contains("a GEMM cannot write `int8`"), "{output}");
}

/// A `.npy` of one type.
fn npy(path: &Path, kind: &str, shape: [usize; 2], bytes: &[u8]) {
    let [rows, width] = shape;
    let mut header =
        format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(bytes);
    std::fs::write(path, file).unwrap();
}

#[test]
fn a_dumped_product_of_integers_is_judged_to_the_bit_and_its_bugs_are_seen() {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| place.path().join(name);
    let (n, m, k) = (12, 48, 320);
    let (x, w) = (values(n, k, 11), values(m, k, 12));
    let floats =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let mut scales = Vec::new();
    for (name, operand) in [("x", &x), ("w", &w)] {
        let rows = (0..operand.rows()).map(|row| int8::quantised(operand.row(row)));
        let (codes, of_rows): (Vec<Vec<i8>>, Vec<f32>) = rows.unzip();
        let bytes: Vec<u8> = codes.into_iter().flatten().map(|code| code as u8).collect();
        npy(&file(&format!("{name}.npy")), "|i1", [operand.rows(), k], &bytes);
        npy(&file(&format!("{name}s.npy")), "<f4", [operand.rows(), 1], &floats(&of_rows));
        scales.push((bytes, of_rows));
    }
    let weight = int8::Weight { codes: &scales[1].0, scales: scales[1].1.clone(), bias: None };
    // In f32, where each order of the scales leaves its own bits.
    let y = int8::product(&x, &weight, Format::F32);
    let judge = |y: &Tensor| {
        npy(&file("y.npy"), "<f4", [n, m], &floats(y.data()));
        let done = Command::new(env!("CARGO_BIN_EXE_runner"))
            .current_dir(place.path())
            .args(["judge", "x.npy", "w.npy", "y.npy", "--dtype-x", "int8", "--dtype-w", "int8"])
            .args(["--scale-x", "xs.npy", "--scale-w", "ws.npy"])
            .output()
            .unwrap();
        let said = [done.stdout, done.stderr].concat();
        (done.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let (code, said) = judge(&y);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("To the bit") && said.contains("scaled by w, then by x"), "{said}");
    let wrong = Tensor::new(m, y.data().iter().map(|y| y * 1.02).collect());
    let (code, said) = judge(&wrong);
    assert_eq!(code, Some(1), "{said}");
}
