//! The emulated tensor cores against real ones: single instructions of eight
//! chips, and whole GEMMs of an H200.
//!
//! A cut of the data is in the project; the whole of it is tested where RUNNER_DATA names it.

use proptest::prelude::*;
use runner::chip_command::{self, ChipCommand, ChipOutcome};
use runner::compute::emulated::captures::{self, Capture};
use runner::compute::emulated::chip::{CHIPS, TensorCore, Unit, chip};
use runner::compute::emulated::gemm::{
    GemmError, Operand, Scales, gemm, gemm_prepared, prepare_for,
};
use runner::compute::emulated::identify::{identify, mismatches};
use runner::compute::emulated::quantize::{CodeData, Codes};
use runner::compute::emulated::schedule::Schedule;
use runner::compute::emulated::simd::Kernel;
use runner::compute::emulated::vectors::{VectorCheck, verify_folder, verify_shipped};
use runner::dtype::Format;
use runner::op::ChipName;

use crate::data::{large, own};

/// Every chip and format that was measured.
const SETS: [&str; 32] = [
    "A100 bf16",
    "A100 f16",
    "A100 tf32",
    "A2 bf16",
    "A2 f16",
    "A2 tf32",
    "Ada e4m3",
    "Ada e5m2",
    "Ada bf16",
    "Ada f16",
    "Ada tf32",
    "B200 e4m3",
    "B200 e5m2",
    "B200 bf16",
    "B200 f16",
    "B200 tf32",
    "H100 e4m3",
    "H100 e5m2",
    "H100 bf16",
    "H100 f16",
    "H100 tf32",
    "H200 e4m3",
    "H200 e5m2",
    "H200 bf16",
    "H200 f16",
    "H200 tf32",
    "L40S e4m3",
    "L40S e5m2",
    "L40S bf16",
    "L40S f16",
    "L40S tf32",
    "V100 f16",
];

/// Holds a check of vectors to all sets, each with so many of them.
fn met(checks: &[VectorCheck], vectors: usize) {
    let sets: Vec<String> =
        checks.iter().map(|check| format!("{} {}", check.chip, check.format)).collect();
    assert_eq!(sets, SETS);
    for check in checks {
        assert_eq!((check.vectors, check.mismatches), (vectors, 0), "{check:?}");
    }
}

/// A tensor core with one number changed.
type Change = fn(TensorCore) -> TensorCore;

/// Units that differ a little from the chips', with their names.
const ALMOST: [(&str, Change); 3] = [
    ("F - 1", |core| TensorCore { alignment_bits: core.alignment_bits - 1, ..core }),
    ("F + 1", |core| TensorCore { alignment_bits: core.alignment_bits + 1, ..core }),
    ("blocks of 2", |core| TensorCore { products: 2, ..core }),
];

/// Holds a check with a changed unit to more than so many differing vectors in each set.
fn broken(name: &str, checks: &[VectorCheck], more_than: usize) {
    for check in checks {
        // FP8 products of B200's vectors fit into far fewer than its 25 bits.
        if !(check.chip == "B200" && check.format.is_fp8()) {
            assert!(check.mismatches > more_than, "{name} {check:?}");
        }
    }
}

#[test]
fn the_vectors_that_ship_are_met_to_the_bit_for_every_chip_and_format() {
    met(&verify_shipped(|core| core).expect("vectors"), 64);
}

#[test]
fn a_changed_alignment_or_block_breaks_the_match_with_the_vectors_that_ship() {
    for (name, change) in ALMOST {
        broken(name, &verify_shipped(change).expect("vectors"), 0);
    }
}

#[test]
#[ignore = "needs RUNNER_DATA, see tests/it/data.rs"]
fn every_hardware_vector_of_every_chip_is_met_to_the_bit() {
    met(&verify_folder(&large("tensor-core-vectors"), |core| core).expect("vectors"), 5000);
}

#[test]
#[ignore = "needs RUNNER_DATA, see tests/it/data.rs"]
fn a_changed_alignment_or_block_breaks_the_match_with_every_set_of_vectors() {
    for (name, change) in ALMOST {
        let checks = verify_folder(&large("tensor-core-vectors"), change).expect("vectors");
        broken(name, &checks, 50);
    }
}

/// The captures that ship.
fn captures() -> Vec<Capture> {
    captures::read_shipped().expect("the captures are readable")
}

fn hopper(x: &Codes, w: &Codes) -> Unit {
    *chip(ChipName::Hopper).unit(x.format(), w.format()).expect("a format that Hopper multiplies")
}

#[test]
fn every_element_of_the_captures_that_ship_is_met_with_an_identified_schedule() {
    met_by_a_schedule(&captures());
}

#[test]
#[ignore = "needs RUNNER_DATA, see tests/it/data.rs"]
fn every_element_of_every_captured_gemm_is_met_with_an_identified_schedule() {
    met_by_a_schedule(&captures::read_folder(&large("h200")).expect("the captures"));
}

fn met_by_a_schedule(captures: &[Capture]) {
    let mut found = Vec::new();
    for capture in captures {
        let unit = hopper(&capture.x, &capture.w);
        for output in &capture.outputs {
            let (x, w) = capture.operands(output);
            let identified = identify(&unit, &x, &w, output.format, &output.y).expect("a product");
            let name = format!("{}.{}", capture.name, output.name);
            println!("{name}: {identified}");
            assert!(identified.is_exact(), "{name}: {identified}");
            if name.contains("fast1") {
                assert_eq!(identified.schedule.accumulate, runner::op::Accumulate::Fast);
            }
            found.push(identified);
        }
    }
    // Five FP8 cases of six outputs; bf16 and f16 with native and with f32
    // output; tf32 and f32.
    assert_eq!(found.len(), 5 * 6 + 2 * 2 + 2);
}

/// Mismatches of a capture's output under a changed unit and schedule.
fn mismatches_with(
    capture: &Capture,
    name: &str,
    change_unit: impl Fn(TensorCore) -> TensorCore,
    schedule: Schedule,
) -> usize {
    let output = capture.outputs.iter().find(|output| output.name == name);
    let output = output.expect("an output of that name");
    let (x, w) = capture.operands(output);
    let Unit::TensorCore(core) = hopper(&capture.x, &capture.w) else { panic!("no tensor core") };
    let unit = Unit::TensorCore(change_unit(core));
    mismatches(&gemm(&unit, &schedule, &x, &w, output.format).expect("a product"), &output.y)
}

#[test]
fn a_changed_f_block_or_promotion_interval_breaks_the_match_with_the_captures() {
    let captures = captures();
    let fp8 = &captures[1];
    let (fast, promoted) = ("fast1.f32.absmax", "fast0.f32.absmax");
    let half = fp8.x.rows() * fp8.w.rows() / 2;
    let same = |core| core;
    assert_eq!(mismatches_with(fp8, fast, same, Schedule::FAST), 0);
    assert_eq!(mismatches_with(fp8, promoted, same, Schedule::PROMOTED), 0);
    for alignment_bits in [12, 14] {
        let change = |core| TensorCore { alignment_bits, ..core };
        assert!(mismatches_with(fp8, fast, change, Schedule::FAST) > half, "F {alignment_bits}");
    }
    for products in [16, 64] {
        let change = |core| TensorCore { products, ..core };
        assert!(mismatches_with(fp8, fast, change, Schedule::FAST) > half, "block {products}");
    }
    for promotion_interval in [64, 256] {
        let schedule = Schedule { promotion_interval, ..Schedule::PROMOTED };
        let broken = mismatches_with(fp8, promoted, same, schedule);
        assert!(broken > half, "promotion every {promotion_interval}: {broken}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused_with_a_reason() {
    let codes = |format, rows, width| Codes::zeros(format, rows, width);
    let (a, b) = (codes(Format::E4m3, 2, 64), codes(Format::E4m3, 3, 32));
    let unit = *chip(ChipName::Hopper).unit(Format::E4m3, Format::E4m3).expect("hopper fp8");
    let one = |codes| Operand { codes, scales: Scales::Tensor(1.0) };
    let refused = |x: &Operand, w: &Operand, schedule: Schedule, output| {
        gemm(&unit, &schedule, x, w, output).expect_err("refused").to_string()
    };
    assert!(refused(&one(&a), &one(&b), Schedule::FAST, Format::F32).contains("needs one K"));
    assert!(refused(&one(&a), &one(&a), Schedule::FAST, Format::E4m3).contains("f32, bf16 or f16"));
    for scale in [0.0, -1.0, f32::INFINITY, f32::NAN] {
        let x = Operand { codes: &a, scales: Scales::Tensor(scale) };
        let message = refused(&x, &one(&a), Schedule::FAST, Format::F32);
        assert!(message.contains("positive finite"), "{message}");
    }
    let rows = Operand { codes: &a, scales: Scales::Row(vec![1.0; 3]) };
    assert!(refused(&rows, &one(&a), Schedule::FAST, Format::F32).contains("needs 2 scales"));
    let odd = Schedule { promotion_interval: 48, ..Schedule::PROMOTED };
    assert!(refused(&one(&a), &one(&a), odd, Format::F32).contains("whole blocks"));
    let bf16 = codes(Format::Bf16, 2, 64);
    assert!(matches!(
        gemm(&unit, &Schedule::FAST, &one(&a), &one(&bf16), Format::F32),
        Err(GemmError::Formats { .. })
    ));
}

fn verified(folder: Option<std::path::PathBuf>) -> String {
    let mut report = Vec::new();
    let outcome = chip_command::run(&ChipCommand::Verify { folder }, &mut report);
    let report = String::from_utf8(report).expect("text");
    assert_eq!(outcome.expect("data of chips"), ChipOutcome::Pass, "{report}");
    report
}

#[test]
fn chip_verify_without_a_folder_checks_the_vectors_and_captures_that_ship() {
    let report = verified(None);
    assert!(report.contains("32 sets: 0 of 2,048 vectors differ\n"), "{report}");
    assert!(report.contains("36 captured outputs: 0 of 1,290 elements differ\n"), "{report}");
    assert!(report.contains("BSD-2-Clause"), "{report}");
    let mut licence = Vec::new();
    chip_command::run(&ChipCommand::Licence, &mut licence).expect("a licence");
    assert_eq!(
        String::from_utf8(licence).expect("text"),
        std::fs::read_to_string(own("tests/fixtures/vectors/LICENCE")).expect("the licence")
    );
}

#[test]
fn chip_verify_checks_a_folder_of_vectors_and_says_which_folder_is_missing() {
    let report = verified(Some(own("tests/fixtures/vectors")));
    assert!(report.ends_with("32 sets: 0 of 2,048 vectors differ\n"), "{report}");
    let missing = ChipCommand::Verify { folder: Some("no/such/folder".into()) };
    let error = chip_command::run(&missing, &mut Vec::new()).expect_err("nothing there");
    assert!(error.to_string().contains("`no/such/folder`"), "{error}");
}

#[test]
#[ignore = "needs RUNNER_DATA, see tests/it/data.rs"]
fn chip_verify_finds_no_difference_in_the_whole_data() {
    let report = verified(Some(large("tensor-core-vectors")));
    assert!(report.ends_with("32 sets: 0 of 160,000 vectors differ\n"), "{report}");
    let report = verified(Some(large("h200")));
    assert!(report.ends_with("36 captured outputs: 0 of 34,560 elements differ\n"), "{report}");
}

#[test]
fn chip_verify_refuses_captures_that_contradict_themselves_and_finds_other_answers() {
    let original =
        std::fs::read(own("examples/h200-captures/captures.safetensors")).expect("captures");
    let place = tempfile::tempdir().expect("a temporary folder");
    let verify = |from: &str, to: &str| {
        // The same length, so that only this changes.
        assert_eq!(from.len(), to.len());
        let at = original.windows(from.len()).position(|window| window == from.as_bytes());
        let at = at.expect("the header has it");
        let mut changed = original.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(place.path().join("captures.safetensors"), changed).expect("a file");
        let command = ChipCommand::Verify { folder: Some(place.path().to_owned()) };
        let mut report = Vec::new();
        let outcome = chip_command::run(&command, &mut report);
        (outcome.map_err(|error| error.to_string()), String::from_utf8(report).expect("text"))
    };
    let refusal = |from: &str, to: &str| verify(from, to).0.expect_err("refused");
    assert!(refusal("NVIDIA H200", "NVIDIA X200").contains("`NVIDIA X200`, which is not modelled"));
    assert!(refusal("c0.x\"", "d0.x\"").contains("there is no tensor `c0.x`"));
    assert!(refusal("[[\\\"e4m3", "[[\\\"e9m3").contains("the unknown format `e9m3`"));
    assert!(refusal("\"shape\":[4,3584]", "\"shape\":[7,2048]").contains("shape"));
    // Codes of another format are other numbers: nothing fits, and that is said.
    let (outcome, report) = verify("[[\\\"e4m3", "[[\\\"e5m2");
    assert_eq!(outcome, Ok(ChipOutcome::Falsified));
    assert!(report.contains("no schedule of "), "{report}");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let words: Vec<u32> = (0..997u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
    let unit = *chip(ChipName::Hopper).unit(Format::E4m3, Format::E4m3).expect("hopper fp8");
    let (x, w) =
        (codes_of(Format::E4m3, 70, 640, &words, 6), codes_of(Format::E4m3, 50, 640, &words, 6));
    let x = Operand { codes: &x, scales: Scales::Tensor(1.0) };
    let w = Operand { codes: &w, scales: Scales::Tensor(1.0) };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| gemm(&unit, &Schedule::FAST, &x, &w, Format::F32).expect("a product"))
    };
    let one = run(1);
    for threads in [2, 5] {
        assert_eq!(mismatches(&run(threads), &one), 0);
    }
}

/// Every pair of formats that a chip multiplies, with its unit.
fn all_units() -> Vec<(Format, Format, Unit)> {
    let mut units = Vec::new();
    for row in &CHIPS {
        for x in Format::ALL {
            for w in Format::ALL {
                if let Some(unit) = row.unit(x, w) {
                    units.push((x, w, *unit));
                }
            }
        }
    }
    units
}

/// Codes with bits from `words`: any code where `reach` is 0, else values within
/// that many binary orders of magnitude, some zero.
fn codes_of(format: Format, rows: usize, width: usize, words: &[u32], reach: i32) -> Codes {
    let code = |index: usize| {
        let word = words[index % words.len()].rotate_left((index / words.len()) as u32);
        if reach == 0 {
            return word;
        }
        let spread = (word & 0xff) as i32 % (2 * reach) - reach;
        let value = ((word >> 8) as f32 / (1 << 23) as f32 - 1.0) * f32::powi(2.0, spread);
        // Zeros of both signs.
        format.encode(if word & 0x700 == 0 { 0.0f32.copysign(value) } else { value })
    };
    let count = rows * width;
    let data = match format.bytes() {
        1 => CodeData::Bits8((0..count).map(|index| code(index) as u8).collect()),
        2 => CodeData::Bits16((0..count).map(|index| code(index) as u16).collect()),
        _ if format == Format::Tf32 => {
            CodeData::Bits32((0..count).map(|index| code(index) & 0xffff_e000).collect())
        }
        _ => CodeData::Bits32((0..count).map(code).collect()),
    };
    Codes::new(format, rows, width, data).expect("codes")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition(
        words in prop::collection::vec(any::<u32>(), 61..400),
        shape in (1usize..4, 1usize..20, 1usize..400),
        reach in prop::sample::select(vec![0, 3, 8, 8, 8, 40, 120]),
        split_k in 1u32..4,
        promoted in any::<bool>(),
        blocks in any::<bool>(),
    ) {
        let (n, m, k) = shape;
        let base = if promoted { Schedule::PROMOTED } else { Schedule::FAST };
        let schedule = base.with_split_k(split_k);
        for (x_format, w_format, unit) in all_units() {
            let x = codes_of(x_format, n, k, &words, reach);
            let w = codes_of(w_format, m, k, &words[7..], reach);
            let scales = |rows: usize| if blocks {
                let scales = (0..rows * k.div_ceil(128)).map(|i| 0.5 + i as f32).collect();
                Scales::Block128 { rows_per_block: 1, first_row: 0, scales }
            } else {
                Scales::Tensor(0.37)
            };
            let x = Operand { codes: &x, scales: scales(n) };
            let w = Operand { codes: &w, scales: scales(m) };
            let run = |kernel| {
                let prepared = prepare_for(kernel, &unit, &x).expect("an operand");
                gemm_prepared(&schedule, &prepared, &w, Format::F32).expect("a product")
            };
            let expected = run(Kernel::PLAIN);
            for kernel in Kernel::available() {
                prop_assert_eq!(
                    mismatches(&run(kernel), &expected), 0,
                    "{} {} x {} {:?} {:?}", kernel.name(), x_format, w_format, unit, shape
                );
            }
        }
    }
}

/// `tests/fixtures/fp8.json`, written by `python3 scripts/fp8_fixture.py`.
#[derive(serde::Deserialize)]
struct Fp8Fixture {
    decoded: Vec<u32>,
    inputs: Vec<u32>,
    encoded: Vec<u32>,
}

#[test]
fn fp8_codes_and_values_convert_as_ml_dtypes_converts_them() {
    let text = include_str!("../fixtures/fp8.json");
    let fixture: std::collections::BTreeMap<String, Fp8Fixture> =
        serde_json::from_str(text).expect("the fixture");
    assert_eq!(fixture.len(), 4);
    for (name, cases) in fixture {
        let format: Format = name.parse().expect("a format");
        assert_eq!(cases.decoded.len(), 256);
        for (code, &bits) in (0..).zip(&cases.decoded) {
            let (ours, theirs) = (format.decode(code), f32::from_bits(bits));
            assert!(ours.to_bits() == bits || (ours.is_nan() && theirs.is_nan()), "{code:#x}");
        }
        for (&bits, &code) in cases.inputs.iter().zip(&cases.encoded) {
            let value = f32::from_bits(bits);
            assert_eq!(format.encode(value), code, "{format} {value}");
        }
    }
}
