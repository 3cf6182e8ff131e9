//! Products of block-scaled operands: MXFP8, MXFP6, MXFP4, NVFP4.

use std::path::Path;

use runner::block_format::{BlockFormat, ScaleCodec};
use runner::chip::{Unit, chip};
use runner::compute::Ops;
use runner::compute::call::Call;
use runner::compute::emulated::arm::Emulated;
use runner::compute::emulated::gemm::{
    GemmError, Operand, Scales, gemm, gemm_prepared, prepare_for,
};
use runner::compute::emulated::matrix_core::{self, Stretch};
use runner::compute::emulated::quantize::{BlockScales, CodeData, Codes, quantize_blocks};
use runner::compute::emulated::schedule::Schedule;
use runner::compute::emulated::simd::Kernel;
use runner::compute::emulated::tensor_core::{ScaledRow, chain_scaled};
use runner::dtype::{Format, Parts};
use runner::model::Model;
use runner::op::{ChipName, Codes as CodesOf, Recipe};
use runner::random::Random;
use runner::tensor::Tensor;
use safetensors::SafeTensors;

fn unit(format: BlockFormat) -> &'static Unit {
    &chip(ChipName::Blackwell).block_unit(format).expect("Blackwell has it").unit
}

/// Random codes and scales; `spread` is how far apart the scales lie, in powers of two.
fn operand(
    format: BlockFormat,
    rows: usize,
    width: usize,
    spread: u64,
    seed: u64,
) -> (Codes, BlockScales) {
    let mut random = Random::at(seed);
    let element = format.element();
    let mut codes = Vec::new();
    while codes.len() < rows * width {
        let code = (random.bits() & ((1 << element.bits()) - 1)) as u8;
        // A third of zeros makes groups that are zero, and sums that cancel.
        let code = if random.bits().is_multiple_of(3) { 0 } else { code };
        if element.decode(code.into()).is_finite() {
            codes.push(code);
        }
    }
    let blocks = width / format.block();
    let scales = (0..rows * blocks).map(|_| match format.scales() {
        ScaleCodec::Ue8m0 => (127 - spread / 2 + random.bits() % (spread + 1)) as u8,
        ScaleCodec::Ue4m3 => (random.bits() % 0x7f) as u8,
    });
    let whole = if format == BlockFormat::Nvfp4 { 0.37 } else { 1.0 };
    let scales = BlockScales { format, codes: scales.collect(), blocks, whole };
    let codes = Codes::new(element, rows, width, CodeData::Bits8(codes)).expect("whole rows");
    (codes, scales)
}

fn product(
    kernel: Kernel,
    x: &(Codes, BlockScales),
    w: &(Codes, BlockScales),
    output: Format,
) -> Vec<u32> {
    let of = |(codes, scales): &(Codes, BlockScales)| (codes.clone(), scales.clone());
    let ((x_codes, x_scales), (w_codes, w_scales)) = (of(x), of(w));
    let unit = unit(x_scales.format);
    let x = Operand { codes: &x_codes, scales: Scales::Blocks(x_scales) };
    let w = Operand { codes: &w_codes, scales: Scales::Blocks(w_scales) };
    let x = prepare_for(kernel, unit, &x).expect("an operand");
    let y = gemm_prepared(&Schedule::FAST, &x, &w, output).expect("a product");
    y.data().iter().map(|y| y.to_bits()).collect()
}

#[test]
fn every_instruction_set_computes_the_definition_of_block_scaled_products() {
    for format in BlockFormat::ALL {
        for (n, m, k, spread) in [(3, 5, 64, 4), (5, 37, 192, 20), (2, 17, 32, 0), (4, 9, 160, 250)]
        {
            let k = k.max(format.block());
            let x = operand(format, n, k, spread, 1 + k as u64);
            let w = operand(format, m, k, spread, 2 + k as u64);
            let plain = product(Kernel::PLAIN, &x, &w, Format::F32);
            for kernel in Kernel::available() {
                let y = product(kernel, &x, &w, Format::F32);
                assert_eq!(
                    y,
                    plain,
                    "{format} {n} x {k} x {m}, scales over 2^{spread}, {}",
                    kernel.name()
                );
            }
        }
    }
}

/// `sum significand * 2^exponent` of some addends, each cut to `bits` fraction bits below the largest
/// exponent, in i128: the definition once more, written apart.
fn cut_sum(addends: &[(i128, i32, i32)], bits: i32, floor: i32) -> f64 {
    let largest = addends.iter().map(|(_, _, top)| *top).fold(floor, i32::max);
    let unit = largest - bits;
    let sum: i128 = addends
        .iter()
        .map(|&(significand, exponent, _)| match exponent - unit {
            up @ 0.. => significand << up.min(90),
            down if down > -100 => significand.signum() * (significand.abs() >> -down),
            _ => 0,
        })
        .sum();
    let mut exact = sum as f64;
    // 24 bits of it.
    if exact != 0.0 {
        let step = 2f64.powi(exact.abs().log2().floor() as i32 - 23);
        exact = (exact / step).trunc() * step;
    }
    exact * 2f64.powi(unit)
}

/// A value as an integer times a power of two, and the exponent that its format gives it.
fn apart(value: f32, least: i32, fraction_bits: i32) -> (i128, i32, i32) {
    if value == 0.0 {
        return (0, 0, i32::MIN);
    }
    let top = ((f64::from(value).abs().log2().floor()) as i32).max(least);
    let unit = top - fraction_bits;
    ((f64::from(value) / 2f64.powi(unit)) as i128, unit, top)
}

#[test]
fn a_block_scaled_output_is_what_the_published_model_says() {
    for format in BlockFormat::ALL {
        let k = 256;
        let (x, w) = (operand(format, 4, k, 12, 11), operand(format, 6, k, 12, 12));
        let y = product(Kernel::best(), &x, &w, Format::F32);
        let element = format.element();
        let (least, fraction) = (element.min_exponent(), element.fraction_bits() as i32);
        let value = |codes: &Codes, row: usize, at: usize| element.decode(codes.row(row).get(at));
        let scale = |scales: &BlockScales, row: usize, at: usize| {
            format.scales().decode(scales.of_row(row)[at / format.block()])
        };
        for row in 0..4 {
            for column in 0..6 {
                let mut c = 0f64;
                let grouped = element == Format::E2m1;
                for first in (0..k).step_by(if grouped { 64 } else { 32 }) {
                    let mut addends = vec![apart(c as f32, -126, 23)];
                    if grouped {
                        for start in (first..first + 64).step_by(16) {
                            let products: Vec<f64> = (start..start + 16)
                                .map(|at| f64::from(value(&x.0, row, at) * value(&w.0, column, at)))
                                .collect();
                            let (a, b) = (scale(&x.1, row, start), scale(&w.1, column, start));
                            if products.iter().all(|p| *p == 0.0) || a * b == 0.0 {
                                continue;
                            }
                            let least = if format == BlockFormat::Nvfp4 { -6 } else { -127 };
                            let top = |s: f32| (f64::from(s).log2().floor() as i32).max(least);
                            let sum = products.iter().sum::<f64>() * f64::from(a) * f64::from(b);
                            // The smallest step of all: 2^-2 of products, 2^-9 twice of scales.
                            let unit = if format == BlockFormat::Nvfp4 {
                                -20
                            } else {
                                top(a) + top(b) - 2
                            };
                            addends.push(((sum / 2f64.powi(unit)) as i128, unit, top(a) + top(b)));
                        }
                    } else {
                        for at in first..first + 32 {
                            let (xs, xu, xt) = apart(value(&x.0, row, at), least, fraction);
                            let (ws, wu, wt) = apart(value(&w.0, column, at), least, fraction);
                            if xs * ws == 0 {
                                continue;
                            }
                            let up = (scale(&x.1, row, at).log2() + scale(&w.1, column, at).log2())
                                as i32;
                            addends.push((xs * ws, xu + wu + up, xt + wt + up));
                        }
                    }
                    let (bits, floor) = if grouped { (35, -139) } else { (25, -133) };
                    c = cut_sum(&addends, bits, floor);
                }
                let whole = x.1.whole * w.1.whole;
                let expected = whole * c as f32;
                let got = f32::from_bits(y[row * 6 + column]);
                assert_eq!(got, expected, "{format} [{row}, {column}]");
            }
        }
    }
}

#[test]
fn nan_comes_of_a_scale_that_is_none_and_of_nothing_beside_it() {
    for format in BlockFormat::ALL {
        let (mut x, w) = (operand(format, 3, 128, 6, 21), operand(format, 18, 128, 6, 22));
        let before = product(Kernel::best(), &x, &w, Format::F32);
        let blocks = x.1.blocks;
        x.1.codes[blocks + 1] = format.scales().nan();
        let after = product(Kernel::best(), &x, &w, Format::F32);
        assert_eq!(before[..18], after[..18]);
        assert_eq!(before[36..], after[36..]);
        assert!(after[18..36].iter().all(|y| f32::from_bits(*y).is_nan()), "{format}");
    }
}

#[test]
fn operands_that_do_not_fit_a_block_scaled_unit_are_refused_in_words() {
    let format = BlockFormat::Mxfp8;
    let (codes, scales) = operand(format, 2, 64, 2, 31);
    let of =
        |codes, scales: &BlockScales| Operand { codes, scales: Scales::Blocks(scales.clone()) };
    let told = |x: &Operand, unit: &Unit, schedule| -> String {
        let w = of(&codes, &scales);
        gemm(unit, schedule, x, &w, Format::F32).expect_err("no product").to_string()
    };
    let unit_of = unit(format);
    let bare = Operand { codes: &codes, scales: Scales::Tensor(1.0) };
    assert!(told(&bare, unit_of, &Schedule::FAST).contains("block-scaled operands"));
    let fp8 = chip(ChipName::Hopper).unit(Format::E4m3, Format::E4m3).expect("FP8");
    assert!(told(&of(&codes, &scales), fp8, &Schedule::FAST).contains("scales of mxfp8"));
    let promoted = told(&of(&codes, &scales), unit_of, &Schedule::PROMOTED);
    assert!(promoted.contains("not promoted"), "{promoted}");
    let fewer = BlockScales { codes: scales.codes[1..].to_vec(), ..scales.clone() };
    assert!(
        told(&of(&codes, &fewer), unit_of, &Schedule::FAST).contains("needs 4 scales and has 3")
    );
    let part = Codes::zeros(Format::E4m3, 2, 40);
    let part_scales = BlockScales { codes: vec![127; 4], blocks: 2, ..scales.clone() };
    let error = gemm(
        unit_of,
        &Schedule::FAST,
        &of(&part, &part_scales),
        &of(&part, &part_scales),
        Format::F32,
    );
    assert!(matches!(error, Err(GemmError::PartBlock { width: 40, block: 32, .. })));
    let other = operand(BlockFormat::Mxfp8E5m2, 2, 64, 2, 32);
    assert!(told(&of(&other.0, &other.1), unit_of, &Schedule::FAST).contains("does not multiply"));
}

#[test]
fn conversion_takes_the_nearest_elements_under_the_scales_it_writes() {
    let mut random = Random::at(41);
    let values: Vec<f32> =
        (0..4 * 96).map(|i| random.normal() as f32 * 2f32.powi(i / 37 - 5)).collect();
    for format in BlockFormat::ALL {
        let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        let whole = format.whole_scale(most);
        let (codes, scales) = quantize_blocks(format, 96, &values, whole).expect("whole rows");
        let element = format.element();
        for row in 0..4 {
            for column in 0..96 {
                let value = values[row * 96 + column];
                let scale = scales.at(row, column);
                let code = codes.row(row).get(column);
                let off = |code: u32| (element.decode(code) * scale - value).abs();
                let all =
                    (0..1u32 << element.bits()).filter(|code| element.decode(*code).is_finite());
                let best = all.map(off).fold(f32::INFINITY, f32::min);
                assert!(off(code) <= best * 1.000_001, "{format} {value} became {code:#x}");
            }
        }
    }
}

/// What MMA-Sim says of single instructions; `scripts/mmasim_vectors.py` wrote it.
#[test]
fn single_instructions_are_those_of_mma_sim() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mmasim-blocks.safetensors");
    let bytes = std::fs::read(path).expect("the fixture");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    for format in BlockFormat::ALL {
        let part = |name: &str| file.tensor(&format!("{format}.{name}")).expect("a tensor");
        let floats = |name: &str| -> Vec<f32> {
            let bytes = part(name).data().to_vec();
            bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
        };
        let (a, b) = (part("a"), part("b"));
        let (a_scale, b_scale) = (part("a_scale"), part("b_scale"));
        let (c, d) = (floats("c"), floats("d"));
        let width = a.shape()[1];
        let blocks = width / format.block();
        let Unit::BlockScaled(unit) = unit(format) else { panic!("{format} has another unit") };
        assert_eq!(unit.core.products, width);
        for row in 0..c.len() {
            let element = format.element();
            let parts = |codes: &[u8]| -> Vec<Parts> {
                codes[row * width..][..width].iter().map(|c| element.parts((*c).into())).collect()
            };
            let (x, w) = (parts(a.data()), parts(b.data()));
            let of = |elements, scales| ScaledRow {
                elements,
                fraction_bits: element.fraction_bits(),
                scales,
                codec: format.scales(),
                block: format.block(),
            };
            let x = of(&x, &a_scale.data()[row * blocks..][..blocks]);
            let w = of(&w, &b_scale.data()[row * blocks..][..blocks]);
            let made = chain_scaled(unit, &x, &w, c[row]);
            assert_eq!(made.to_bits(), d[row].to_bits(), "{format}, row {row}: {made} {}", d[row]);
        }
    }
}

/// A kernel's dump in FP4: packed codes, scales of blocks, alpha for the scales of the whole.
#[test]
fn a_dump_of_block_scaled_operands_is_judged_to_the_bit_and_bad_ones_are_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("dump.safetensors");
    let format = BlockFormat::Nvfp4;
    let (x, w) = (operand(format, 5, 128, 0, 51), operand(format, 24, 128, 0, 52));
    let alpha = x.1.whole * w.1.whole;
    let y = product(Kernel::best(), &x, &w, Format::Bf16);
    let packed = |(codes, _): &(Codes, BlockScales)| -> Vec<u8> {
        let rows = (0..codes.rows()).flat_map(|row| codes.row(row).iter().collect::<Vec<u32>>());
        rows.collect::<Vec<u32>>().chunks(2).map(|pair| (pair[0] | pair[1] << 4) as u8).collect()
    };
    let y: Vec<u8> = y.iter().flat_map(|bits| ((bits >> 16) as u16).to_le_bytes()).collect();
    let (x_bytes, w_bytes) = (packed(&x), packed(&w));
    let write = |x_scales: &[u8], y: &[u8]| {
        let view = |dtype, shape: [usize; 2], bytes| {
            safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).expect("a view")
        };
        use safetensors::Dtype;
        let tensors = [
            ("x", view(Dtype::U8, [5, 64], &x_bytes)),
            ("w", view(Dtype::U8, [24, 64], &w_bytes)),
            ("xs", view(Dtype::F8_E4M3, [5, 8], x_scales)),
            ("ws", view(Dtype::F8_E4M3, [24, 8], &w.1.codes)),
            ("y", view(Dtype::BF16, [5, 24], y)),
        ];
        std::fs::write(&file, safetensors::serialize(tensors, None).expect("a file"))
            .expect("written");
    };
    let judged = |more: &[&str]| {
        let of = |name: &str| format!("{}:{name}", file.display());
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_runner"));
        command.args(["judge", &of("x"), &of("w"), &of("y"), "--dtype-x", "nvfp4"]);
        command.args(["--dtype-w", "nvfp4", "--alpha", &alpha.to_string()]).args(more);
        let done = command.output().expect("the command runs");
        let said = [done.stdout, done.stderr].concat();
        (done.status.code(), String::from_utf8(said).expect("text"))
    };
    let (xs, ws) = (format!("{}:xs", file.display()), format!("{}:ws", file.display()));
    let scales = ["--scale-x", &xs, "--scale-w", &ws];
    write(&x.1.codes, &y);
    let (status, said) = judged(&scales);
    assert!(status == Some(0) && said.contains("blackwell, rtx-blackwell"), "{said}");
    let (status, said) = judged(&scales[..2]);
    assert!(status == Some(2) && said.contains("blocks' scales are missing"), "{status:?} {said}");
    let mut bad = x.1.codes.clone();
    bad[11] = 0x7f;
    write(&bad, &y);
    let (status, said) = judged(&scales);
    assert!(status == Some(2) && said.contains("row 1, block 3 is NaN"), "{status:?} {said}");
    // The scales of the next block: the product is wrong.
    bad.clone_from(&x.1.codes);
    bad.rotate_left(1);
    write(&bad, &y);
    let (status, said) = judged(&scales);
    assert!(status == Some(1) && said.contains("scale-order"), "{status:?} {said}");
}

/// What MMA-Sim says of AMD's instructions.
#[test]
fn single_instructions_of_amds_matrix_cores_are_those_of_mma_sim() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mmasim-amd.safetensors");
    let bytes = std::fs::read(path).expect("the fixture");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    for (name, format) in [
        ("cdna1", Format::F16),
        ("cdna1", Format::Bf16),
        ("cdna2", Format::F16),
        ("cdna2", Format::Bf16),
        ("cdna3", Format::F16),
        ("cdna3", Format::Bf16),
        ("cdna3", Format::Tf32),
    ] {
        let chip_name = ChipName::ALL.into_iter().find(|chip| chip.name() == name).expect("a chip");
        let Some(Unit::MatrixCore(core)) = chip(chip_name).unit(format, format) else {
            panic!("{name} has no {format}");
        };
        let part = |part: &str| file.tensor(&format!("{name}.{format}.{part}")).expect("a tensor");
        let codes = |of: &str| -> Vec<u32> {
            let bytes = part(of).data().to_vec();
            let word =
                |word: &[u8]| word.iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
            bytes.chunks(format.bytes()).map(word).collect()
        };
        let floats = |of: &str| -> Vec<u32> {
            let bytes = part(of).data().to_vec();
            bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
        };
        let (a, b, c, d) = (codes("a"), codes("b"), floats("c"), floats("d"));
        let width = part("a").shape()[1];
        for row in 0..c.len() {
            let of = |codes: &[u32]| -> (Vec<Parts>, Vec<f32>) {
                let own = &codes[row * width..][..width];
                let parts = own.iter().map(|code| format.parts(*code)).collect();
                (parts, own.iter().map(|code| format.decode(*code)).collect())
            };
            let ((x_parts, x_values), (w_parts, w_values)) = (of(&a), of(&b));
            let x = Stretch { parts: &x_parts, values: &x_values, format };
            let w = Stretch { parts: &w_parts, values: &w_values, format };
            let made = matrix_core::chain(core, x, w, f32::from_bits(c[row]));
            let expected = f32::from_bits(d[row]);
            assert!(made == expected, "{name} {format}, row {row}: {made:e}, not {expected:e}");
        }
    }
}

/// What MMA-Sim says of CDNA3's FP8 instructions, each two blocks of 16 products.
#[test]
fn single_instructions_of_cdna3s_fp8_are_those_of_mma_sim() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mmasim-fnuz.safetensors");
    let bytes = std::fs::read(path).expect("the fixture");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let formats = [Format::E4m3fnuz, Format::E5m2fnuz];
    for (x_format, w_format) in formats.into_iter().flat_map(|x| formats.map(|w| (x, w))) {
        let unit = chip(ChipName::Cdna3).unit(x_format, w_format).expect("CDNA3 mixes them");
        let Unit::MatrixCore(core) = unit else { panic!("no matrix core") };
        let part = |part: &str| file.tensor(&format!("{x_format}_{w_format}.{part}")).unwrap();
        let floats = |of: &str| -> Vec<f32> {
            let bytes = part(of).data().to_vec();
            bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
        };
        let (c, d, width) = (floats("c"), floats("d"), part("a").shape()[1]);
        let taken_apart = |format: Format, of: &str, row: usize| -> (Vec<Parts>, Vec<f32>) {
            let own = part(of).data()[row * width..][..width].to_vec();
            let codes = || own.iter().map(|code| u32::from(*code));
            let values = codes().map(|code| format.decode(code)).collect();
            (codes().map(|code| format.parts(code)).collect(), values)
        };
        assert_eq!(c.len(), 240);
        for row in 0..c.len() {
            let (x_parts, x_values) = taken_apart(x_format, "a", row);
            let (w_parts, w_values) = taken_apart(w_format, "b", row);
            let x = Stretch { parts: &x_parts, values: &x_values, format: x_format };
            let w = Stretch { parts: &w_parts, values: &w_values, format: w_format };
            let made = matrix_core::chain(core, x, w, c[row]);
            let expected = d[row];
            assert!(
                made == expected,
                "{x_format} {w_format}, row {row}: {made:e}, not {expected:e}"
            );
        }
    }
}

fn runner(folder: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_runner"));
    command.current_dir(folder).args(arguments).env_remove("RUNNER_CACHE");
    let done = command.output().expect("the command runs");
    let said = [done.stdout, done.stderr].concat();
    (done.status.code(), String::from_utf8(said).expect("text"))
}

/// A folder with a stage that captures every site, whose recipe holds these lines.
fn stage_with(recipe: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("stages")).expect("made");
    let stage = format!(
        "id = \"B\"\ntitle = \"every site\"\ncontract = \"per-layer\"\nmodel = \"synthetic:qwen2-tiny\"\n\
         tokens = [3, 9, 44, 7, 1, 60, 17, 5]\narms = [\"reference\", \"emulated\"]\n\
         [forward]\ncapture = \"every-site\"\n[recipe]\n{recipe}\n"
    );
    std::fs::write(folder.path().join("stages/b.toml"), stage).expect("written");
    folder
}

#[test]
fn a_stage_of_block_scaled_products_passes_and_says_what_that_rests_on() {
    for format in BlockFormat::ALL {
        let folder = stage_with(&format!("gemm = \"{format}\"\nchip = \"rtx-blackwell\""));
        let (status, said) = runner(folder.path(), &["run", "stages", "--format", "plain"]);
        // Four bits may move the whole pass beyond the contract's budget; no site leaves its floor.
        let narrow = format.element() == Format::E2m1;
        let within = status == Some(0) && said.contains("run: pass")
            || narrow && said.contains("run: drift") && said.contains("LAY-010 at output_norm");
        assert!(within, "{format}: {said}");
        let (_, said) = runner(folder.path(), &["explain", "B"]);
        assert!(said.contains(&format!("rtx-blackwell {format}, fast")), "{format}: {said}");
        assert!(said.contains("assumed"), "{format}: {said}");
    }
}

#[test]
fn what_does_not_go_with_a_block_scaled_format_is_refused_before_anything_runs() {
    for (recipe, words) in [
        ("gemm = \"nvfp4\"", "the chip `auto` has no `nvfp4`"),
        (
            "gemm = \"nvfp4\"\nchip = \"hopper\"",
            "those that have it: `blackwell` and `rtx-blackwell`",
        ),
        (
            "gemm = \"mxfp8\"\nchip = \"blackwell\"\naccumulate = \"promoted\"",
            "does not go with `gemm = \"mxfp8\"`",
        ),
        (
            "gemm = \"mxfp4\"\nchip = \"blackwell\"\nscale = { weight = \"tensor\", activation = \"tensor\" }",
            "`scale` has no use beside `gemm = \"mxfp4\"`",
        ),
        ("gemm = \"nvfp5\"\nchip = \"blackwell\"", "`nvfp4`"),
    ] {
        let folder = stage_with(recipe);
        let (status, said) = runner(folder.path(), &["check", "stages"]);
        assert!(status != Some(0) && said.contains(words), "{recipe}: {said}");
    }
}

/// The elements and scales of a checkpoint whose activations are converted too.
#[test]
fn a_checkpoints_own_blocks_are_multiplied_by_a_chip_that_has_the_format() {
    for (name, format) in
        [("nvfp4", "nvfp4"), ("modelopt-nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("mxfp4", "mxfp4")]
    {
        let fixture =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantised").join(name);
        let folder = tempfile::tempdir().expect("a folder");
        for entry in std::fs::read_dir(&fixture).expect("a folder") {
            let entry = entry.expect("an entry");
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
        }
        let recipe =
            Recipe { codes: CodesOf::Checkpoint, chip: ChipName::Blackwell, ..Recipe::default() };
        let arm = Emulated::new(&recipe).expect("a recipe");
        // The fixtures of compressed-tensors convert weights alone, and then no product is known.
        let config = folder.path().join("config.json");
        let own = std::fs::read_to_string(&config).expect("a config");
        if !name.starts_with("modelopt") {
            let model = Model::open(folder.path()).expect("a folder");
            let weight = model.tensor("blk.0.attn_q.weight").expect("a weight");
            let refused = arm.of_weight(&weight).err().expect("refused").to_string();
            assert!(
                refused.contains("block-scaled formats alone")
                    || refused.contains("blocks of 1 by 32"),
                "{refused}"
            );
        }
        let mut config_of_both: serde_json::Value = serde_json::from_str(&own).expect("JSON");
        let groups = &mut config_of_both["quantization_config"]["config_groups"];
        if groups.is_object() {
            groups["group_0"]["input_activations"] = serde_json::json!({ "dynamic": true });
        }
        std::fs::write(&config, config_of_both.to_string()).expect("written");
        let model = Model::open(folder.path()).expect("a folder");
        let weight = model.tensor("blk.0.attn_q.weight").expect("a weight");
        let of_weight = arm.of_weight(&weight);
        let of_weight = of_weight.expect("a form that is multiplied").expect("codes");
        assert_eq!(of_weight.recipe().operands(), format, "{name}");
        // A column of the weight comes back through a one-hot activation.
        let width = weight.width();
        let mut x = Tensor::zeros(1, width);
        x.row_mut(0)[3] = 1.0;
        let made = arm.compute(&Call::Matmul { x: &x, weight, bias: None }).expect("a product");
        let values = weight.to_vec().expect("values");
        for (row, made) in made.row(0).iter().enumerate() {
            let expected = values[row * width + 3];
            let off = (made - expected).abs();
            // The activation's one block has a scale of its own, in E4M3: a static scale of the whole
            // leaves it up to half a step off.
            let within = if name == "modelopt-nvfp4" { 0.0625 } else { 0.005 };
            assert!(off <= expected.abs() * within, "{name} {row}: {made} beside {expected}");
        }
    }
}
