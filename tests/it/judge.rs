//! `runner judge` on dumps that are right in many ways and wrong in many ways, each made
//! here from a seed: the three answers, and of the third where and what.

use std::fs;

use runner::dtype::Format;
use runner::random::Random;
use safetensors::tensor::{Dtype, TensorView};

use crate::command::{Outcome, Project};
use crate::single::project;

/// Values of a normal distribution, as the format has them.
fn drawn(seed: u64, count: usize, size: f64, format: Format) -> Vec<f32> {
    let mut random = Random::at(seed);
    (0..count).map(|_| format.round((random.normal() * size) as f32)).collect()
}

/// A product in bf16 with its exact result.
struct Dump {
    n: usize,
    k: usize,
    m: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    exact: Vec<f64>,
}

impl Dump {
    fn new(seed: u64, [n, k, m]: [usize; 3]) -> Dump {
        let x = drawn(seed, n * k, 1.0, Format::Bf16);
        let w = drawn(seed + 1, m * k, 0.03, Format::Bf16);
        let mut dump = Dump { n, k, m, x, w, exact: Vec::new() };
        dump.exact = dump.sums(0..k);
        dump
    }

    fn sums(&self, inner: std::ops::Range<usize>) -> Vec<f64> {
        let dot = |row: usize, column: usize| {
            let (x, w) = (&self.x[row * self.k..], &self.w[column * self.k..]);
            inner.clone().map(|k| f64::from(x[k]) * f64::from(w[k])).sum()
        };
        (0..self.n)
            .flat_map(|row| (0..self.m).map(move |column| (row, column)))
            .map(|(row, column)| dot(row, column))
            .collect()
    }

    /// The exact result rounded to bf16.
    fn right(&self) -> Vec<f32> {
        bf16(&self.exact)
    }

    /// In f32, blocks of 32 products one after the other: no schedule that is known.
    fn in_f32(&self) -> Vec<f32> {
        let mut sums = vec![0f32; self.n * self.m];
        for first in (0..self.k).step_by(32) {
            let block = self.sums(first..(first + 32).min(self.k));
            sums.iter_mut().zip(block).for_each(|(sum, block)| *sum += block as f32);
        }
        sums
    }

    fn judge(&self, y: &[f32]) -> Outcome {
        self.judge_in(y, &[])
    }

    fn judge_in(&self, y: &[f32], more: &[&str]) -> Outcome {
        let project = Project::new();
        let tensors = [
            ("x", Format::Bf16, vec![self.n, self.k], self.x.as_slice()),
            ("w", Format::Bf16, vec![self.m, self.k], self.w.as_slice()),
            ("y", Format::Bf16, vec![self.n, self.m], y),
        ];
        write(&project, "d.safetensors", &tensors);
        project.runner(&[&["judge", "d.safetensors"], more].concat())
    }
}

fn bf16(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| Format::Bf16.round(value as f32)).collect()
}

/// A safetensors file of typed tensors.
fn write(project: &Project, name: &str, tensors: &[(&str, Format, Vec<usize>, &[f32])]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, format, _, values)| {
            let code = |value: &f32| format.encode(*value).to_le_bytes();
            values.iter().flat_map(|v| code(v)[..format.bytes()].to_vec()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, format, shape, _), bytes)| {
        let dtype = match format {
            Format::Bf16 => Dtype::BF16,
            Format::F16 => Dtype::F16,
            Format::E4m3 => Dtype::F8_E4M3,
            Format::E5m2 => Dtype::F8_E5M2,
            _ => Dtype::F32,
        };
        (*name, TensorView::new(dtype, shape.clone(), bytes).expect("a view"))
    });
    let file = safetensors::serialize(views, None).expect("a file");
    fs::write(project.path(name), file).expect("written");
}

/// A `.npy` file.
fn npy(project: &Project, name: &str, descr: &str, shape: [usize; 2], bytes: &[u8]) {
    let [rows, width] = shape;
    let header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {width}), }}\n");
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(bytes);
    fs::write(project.path(name), file).expect("written");
}

const SHAPE: [usize; 3] = [80, 704, 288];

#[test]
fn the_exact_result_rounded_once_is_met_to_the_bit() {
    let dump = Dump::new(21, SHAPE);
    let said = dump.judge(&dump.right()).expect(0, "To the bit: these are the bits of a known");
    assert!(said.out.contains("the exact result, rounded once to bf16"), "{}", said.out);
}

#[test]
fn other_orders_of_additions_are_within_rounding() {
    let dump = Dump::new(22, SHAPE);
    let f32_sums = dump.in_f32();
    let rounded: Vec<f32> = f32_sums.iter().map(|&sum| Format::Bf16.round(sum)).collect();
    let said = dump.judge(&rounded).expect(0, "z 1.0");
    assert!(said.out.contains("ithin rounding") || said.out.contains("o the bit"), "{}", said.out);
    // Split K into uneven parts, as stream-K does.
    let parts = [0..300, 300..512, 512..704].map(|range| dump.sums(range));
    let sums = (0..parts[0].len()).map(|i| {
        let [a, b, c] = [parts[0][i] as f32, parts[1][i] as f32, parts[2][i] as f32];
        Format::Bf16.round((a + b) + c)
    });
    dump.judge(&sums.collect::<Vec<f32>>()).expect(0, "z 1.0");
    // The same sums left in f32.
    let project = Project::new();
    let [n, k, m] = SHAPE;
    let tensors = [
        ("x", Format::Bf16, vec![n, k], dump.x.as_slice()),
        ("w", Format::Bf16, vec![m, k], dump.w.as_slice()),
        ("y", Format::F32, vec![n, m], f32_sums.as_slice()),
    ];
    write(&project, "d.safetensors", &tensors);
    let said = project.runner(&["judge", "d.safetensors"]).expect(0, "Within rounding: not the");
    assert!(said.out.contains("this is what another order of additions costs"), "{}", said.out);
    assert!(said.out.contains("at most"), "{}", said.out);
}

#[test]
fn the_bits_of_a_chip_are_named() {
    let dump = Dump::new(23, [24, 512, 40]);
    let project = Project::new();
    let tensors = [
        ("x", Format::Bf16, vec![24, 512], dump.x.as_slice()),
        ("w", Format::Bf16, vec![40, 512], dump.w.as_slice()),
    ];
    write(&project, "d.safetensors", &tensors);
    let multiply = ["chip", "multiply", "d.safetensors:x", "d.safetensors:w", "--fast"];
    let save = ["--split-k", "2", "--save", "y.safetensors"];
    project.runner(&[&multiply[..], &save[..]].concat()).expect(0, "split-K 2");
    let judge = ["judge", "d.safetensors:x", "d.safetensors:w", "y.safetensors"];
    let said = project.runner(&judge).expect(0, "To the bit");
    assert!(
        said.out.contains("tensor core (hopper, blackwell, rtx-blackwell), fast, split-K 2"),
        "{}",
        said.out
    );
    // Of an older chip they are not, and still within rounding.
    let other = project.runner(&[&judge[..], &["--chip", "ampere"]].concat());
    other.expect(0, "Within rounding");
}

/// The answer must be wrong and say all of these.
#[track_caller]
fn wrong(said: Outcome, words: &[&str]) {
    let said = said.expect(1, "Wrong, here, so:");
    for word in words {
        assert!(said.out.contains(word), "{word} in\n{}", said.out);
    }
}

#[test]
fn a_lost_block_of_k_and_a_wrong_scale_are_named_with_their_numbers() {
    let dump = Dump::new(24, SHAPE);
    let block = dump.sums(192..256);
    let lost: Vec<f64> = dump.exact.iter().zip(&block).map(|(y, block)| y - block).collect();
    wrong(dump.judge(&bf16(&lost)), &["everywhere", "k-block-lost: products 192 to 255 of 704"]);
    let scaled: Vec<f64> = dump.exact.iter().map(|y| y * 1.02).collect();
    let words = ["everywhere", "they are 1.02 times the right values", "scale-wrong"];
    wrong(dump.judge(&bf16(&scaled)), &words);
}

#[test]
fn a_tile_that_was_not_written_is_told_by_rows_and_columns() {
    let dump = Dump::new(25, [160, 256, 224]);
    let mut y = dump.right();
    for row in 64..128 {
        y[row * 224 + 128..row * 224 + 192].fill(0.0);
    }
    wrong(dump.judge(&y), &["rows 64 to 127, columns 128 to 191", "all values there are zero"]);
}

#[test]
fn rows_and_columns_that_hold_others_are_located() {
    let dump = Dump::new(26, SHAPE);
    let [n, _, m] = SHAPE;
    let right = dump.right();
    let row = |y: &[f32], row: usize| y[row * m..(row + 1) * m].to_vec();
    let mut stale = right.clone();
    stale[51 * m..52 * m].copy_from_slice(&row(&right, 50));
    wrong(dump.judge(&stale), &["row 51, all columns", "row-repeated"]);
    let mut rolled = right.clone();
    for target in 40..n {
        let source = if target == 40 { n - 1 } else { target - 1 };
        rolled[target * m..(target + 1) * m].copy_from_slice(&row(&right, source));
    }
    wrong(dump.judge(&rolled), &["rows 40 to 79, all columns", "rows-shifted"]);
    let mut swapped = right.clone();
    (0..n).for_each(|row| swapped.swap(row * m + 17, row * m + 18));
    let words = ["columns 17 to 18 of all rows", "columns-permuted: column 17 holds column 18"];
    wrong(dump.judge(&swapped), &words);
}

#[test]
fn a_coarser_accumulator_than_f32_is_not_within_rounding() {
    let dump = Dump::new(27, SHAPE);
    let mut sums = vec![0f32; dump.exact.len()];
    for first in (0..704).step_by(16) {
        let block = dump.sums(first..first + 16);
        sums.iter_mut().zip(block).for_each(|(s, b)| *s = Format::F16.round(*s + b as f32));
    }
    wrong(
        dump.judge(&bf16(&sums.iter().map(|&s| f64::from(s)).collect::<Vec<_>>())),
        &["everywhere", "narrow-accumulator"],
    );
    let parts = [0..192, 192..384, 384..576, 576..704].map(|range| bf16(&dump.sums(range)));
    let sums = (0..parts[0].len())
        .map(|i| f64::from(parts[0][i] + parts[1][i] + parts[2][i] + parts[3][i]));
    wrong(dump.judge(&bf16(&sums.collect::<Vec<_>>())), &["everywhere", "narrow-partials"]);
}

#[test]
fn one_value_and_nan_come_with_their_place() {
    let dump = Dump::new(28, SHAPE);
    let mut y = dump.right();
    y[3 * 288 + 5] = f32::NAN;
    let words = ["1 value is NaN, the first at row 3, column 5", "non-finite-output"];
    wrong(dump.judge(&y), &words);
    let mut y = dump.right();
    y[40 * 288 + 50] *= 1.5;
    wrong(dump.judge(&y), &["row 40, column 50"]);
}

#[test]
fn axes_follow_from_the_shapes_and_a_square_product_is_tried_both_ways() {
    let dump = Dump::new(29, SHAPE);
    let [n, k, m] = SHAPE;
    let turned = |values: &[f32], width: usize| -> Vec<f32> {
        let rows = values.len() / width;
        (0..width).flat_map(|c| (0..rows).map(move |r| values[r * width + c])).collect()
    };
    let project = Project::new();
    let (w, y) = (turned(&dump.w, k), dump.right());
    let tensors = [
        ("x", Format::Bf16, vec![n, k], dump.x.as_slice()),
        ("w", Format::Bf16, vec![k, m], w.as_slice()),
        ("y", Format::Bf16, vec![n, m], y.as_slice()),
        ("z", Format::Bf16, vec![n, m + 1], &vec![0.0; n * (m + 1)]),
    ];
    write(&project, "d.safetensors", &tensors);
    let said = project.runner(&["judge", "d.safetensors"]).expect(0, "To the bit");
    assert!(said.out.contains("the shapes fit only with w as [K, M]: taken so"), "{}", said.out);
    let both = ["judge", "d.safetensors:x", "d.safetensors:w", "d.safetensors:z"];
    let said = project.runner(&both).expect(2, "are no product");
    assert!(said.err.contains("K is 704 in x (80 if x is transposed)"), "{}", said.err);

    let square = Dump::new(30, [128, 128, 128]);
    let (w, y) = (turned(&square.w, 128), square.right());
    let shape = vec![128, 128];
    let tensors = [
        ("x", Format::Bf16, shape.clone(), square.x.as_slice()),
        ("w", Format::Bf16, shape.clone(), w.as_slice()),
        ("y", Format::Bf16, shape.clone(), y.as_slice()),
    ];
    write(&project, "d.safetensors", &tensors);
    let said = project.runner(&["judge", "d.safetensors"]).expect(0, "To the bit");
    assert!(said.out.contains("w as [K, M] is taken"), "{}", said.out);

    // A weight that is square fits both ways round; that y is turned is said all the same.
    let dump = Dump::new(32, [40, 128, 128]);
    let y = turned(&dump.right(), 128);
    let tensors = [
        ("x", Format::Bf16, vec![40, 128], dump.x.as_slice()),
        ("w", Format::Bf16, vec![128, 128], dump.w.as_slice()),
        ("y", Format::Bf16, vec![128, 40], y.as_slice()),
    ];
    write(&project, "d.safetensors", &tensors);
    let said = project.runner(&["judge", "d.safetensors"]).expect(0, "To the bit");
    assert!(said.out.contains("the shapes fit with y as [M, N]: taken so"), "{}", said.out);
}

#[test]
fn numpy_files_and_bf16_kept_as_f32_are_read_without_a_word() {
    let dump = Dump::new(31, [40, 256, 64]);
    let project = Project::new();
    let f32_bytes =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    npy(&project, "x.npy", "<f4", [40, 256], &f32_bytes(&dump.x));
    npy(&project, "w.npy", "<f4", [64, 256], &f32_bytes(&dump.w));
    npy(&project, "y.npy", "<f4", [40, 64], &f32_bytes(&dump.right()));
    let said = project.runner(&["judge", "x.npy", "w.npy", "y.npy"]).expect(0, "To the bit");
    assert!(
        said.out.contains("x, w and y are stored as f32 and every value is a bf16"),
        "{}",
        said.out
    );
    let codes: Vec<u8> =
        dump.x.iter().flat_map(|&x| (Format::Bf16.encode(x) as u16).to_le_bytes()).collect();
    npy(&project, "x16.npy", "<u2", [40, 256], &codes);
    let files = ["judge", "x16.npy", "w.npy", "y.npy"];
    project.runner(&files).expect(2, "--dtype-x");
    project.runner(&[&files[..], &["--dtype-x", "bf16"]].concat()).expect(0, "To the bit");
    project.runner(&["judge", "x.npy", "w.npy", "none.npy"]).expect(2, "`none.npy`");
}

/// E4M3 codes with their scales, by blocks of `high` x `wide`.
fn quantised(values: &[f32], width: usize, high: usize, wide: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = values.len() / width;
    let (down, across) = (rows.div_ceil(high), width.div_ceil(wide));
    let mut scales = vec![0f32; down * across];
    for (index, value) in values.iter().enumerate() {
        let scale = &mut scales[index / width / high * across + index % width / wide];
        *scale = if value.abs() / 448.0 > *scale { value.abs() / 448.0 } else { *scale };
    }
    let codes = values.iter().enumerate().map(|(index, value)| {
        Format::E4m3.round(value / scales[index / width / high * across + index % width / wide])
    });
    (codes.collect(), scales)
}

/// The product of codes with blocks of scales in f64, rounded to bf16.
fn scaled(
    (x, xs, x_block): (&[f32], &[f32], [usize; 2]),
    (w, ws, w_block): (&[f32], &[f32], [usize; 2]),
    k: usize,
) -> Vec<f32> {
    let value = |codes: &[f32], scales: &[f32], [high, wide]: [usize; 2], row: usize, at: usize| {
        let scale = scales[row / high * k.div_ceil(wide) + at / wide];
        f64::from(codes[row * k + at]) * f64::from(scale)
    };
    let rows = (0..x.len() / k).flat_map(|row| (0..w.len() / k).map(move |column| (row, column)));
    let sums = rows.map(|(row, column)| {
        (0..k).map(|at| value(x, xs, x_block, row, at) * value(w, ws, w_block, column, at)).sum()
    });
    bf16(&sums.collect::<Vec<f64>>())
}

#[test]
fn fp8_with_scales_per_row_and_per_block_is_judged_and_a_wrong_order_of_scales_is_named() {
    let [n, k, m] = [64, 640, 256];
    let (x, w) = (drawn(41, n * k, 1.0, Format::F32), drawn(42, m * k, 0.05, Format::F32));
    // Rows of different size, so that scales differ.
    let x: Vec<f32> = x.iter().enumerate().map(|(i, x)| x * (1.0 + (i / k % 7) as f32)).collect();
    let w: Vec<f32> = w.iter().enumerate().map(|(i, w)| w * (1.0 + (i / 128 % 5) as f32)).collect();
    let project = Project::new();
    let judge = |y: &[f32], x: (&[f32], &[f32], [usize; 2]), w: (&[f32], &[f32], [usize; 2])| {
        let of =
            |[high, wide]: [usize; 2], rows: usize| vec![rows.div_ceil(high), k.div_ceil(wide)];
        let tensors = [
            ("x", Format::E4m3, vec![n, k], x.0),
            ("w", Format::E4m3, vec![m, k], w.0),
            ("x_scale", Format::F32, of(x.2, n), x.1),
            ("w_scale", Format::F32, of(w.2, m), w.1),
            ("y", Format::Bf16, vec![n, m], y),
        ];
        write(&project, "d.safetensors", &tensors);
        project.runner(&["judge", "d.safetensors"])
    };
    let by_row = [1, k];
    let ((xc, xs), (wc, ws)) = (quantised(&x, k, 1, k), quantised(&w, k, 1, k));
    let (of_x, of_w) = ((&xc[..], &xs[..], by_row), (&wc[..], &ws[..], by_row));
    let said = judge(&scaled(of_x, of_w, k), of_x, of_w).expect(0, "one scale per row");
    assert!(said.out.contains("o the bit") || said.out.contains("ithin rounding"), "{}", said.out);
    let mut shifted = xs.clone();
    shifted[32..].rotate_right(1);
    let y = scaled((&xc, &shifted, by_row), of_w, k);
    wrong(judge(&y, of_x, of_w), &["scale-order", "carry the scale of the row before them"]);

    let ((xc, xs), (wc, ws)) = (quantised(&x, k, 1, 128), quantised(&w, k, 128, 128));
    let (of_x, of_w) = ((&xc[..], &xs[..], [1, 128]), (&wc[..], &ws[..], [128, 128]));
    let said = judge(&scaled(of_x, of_w, k), of_x, of_w).expect(0, "one scale per 128 x 128");
    assert!(said.out.contains("one scale per 1 x 128"), "{}", said.out);
    let mut reversed = ws.clone();
    reversed.chunks_mut(5).for_each(<[f32]>::reverse);
    let y = scaled(of_x, (&wc, &reversed, [128, 128]), k);
    wrong(judge(&y, of_x, of_w), &["the scales of w are taken in the reverse order along K"]);
}

#[test]
fn bias_alpha_and_batches_are_part_of_the_product() {
    let dump = Dump::new(51, [48, 128, 64]);
    let bias = drawn(52, 64, 1.0, Format::Bf16);
    let with = |alpha: f64| -> Vec<f32> {
        let values = dump.exact.iter().enumerate();
        bf16(&values.map(|(i, y)| alpha * y + f64::from(bias[i % 64])).collect::<Vec<_>>())
    };
    let project = Project::new();
    let tensors = [
        ("x", Format::Bf16, vec![2, 24, 128], dump.x.as_slice()),
        ("w", Format::Bf16, vec![64, 128], dump.w.as_slice()),
        ("bias", Format::Bf16, vec![64], bias.as_slice()),
        ("y", Format::Bf16, vec![2, 24, 64], &with(0.5)),
    ];
    write(&project, "d.safetensors", &tensors);
    let said = project.runner(&["judge", "d.safetensors", "--alpha", "0.5"]).expect(0, "");
    assert!(said.out.contains("`bias` of `d.safetensors` is taken as bias"), "{}", said.out);
    project.runner(&["judge", "d.safetensors"]).expect(1, "Wrong");
}

#[test]
fn the_other_ops_are_judged_from_files_too() {
    let project = Project::new();
    let x = drawn(61, 32 * 96, 1.0, Format::Bf16);
    let g = drawn(62, 96, 1.0, Format::Bf16);
    let shape = || vec![32, 96];
    let save =
        |tensors: &[(&str, Format, Vec<usize>, &[f32])]| write(&project, "d.safetensors", tensors);
    let judge = |more: &[&str]| project.runner(&[&["judge", "d.safetensors"], more].concat());
    let normed = |eps: f64| -> Vec<f32> {
        let rows = x.chunks(96).flat_map(|row| {
            let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 96.0;
            let scale = 1.0 / (mean + eps).sqrt();
            row.iter().zip(&g).map(move |(&x, &g)| f64::from(x) * scale * f64::from(g))
        });
        bf16(&rows.collect::<Vec<_>>())
    };
    let norm = |y: &[f32]| {
        save(&[
            ("x", Format::Bf16, shape(), &x),
            ("weight", Format::Bf16, vec![96], &g),
            ("y", Format::Bf16, shape(), y),
        ]);
        judge(&["--op", "norm", "--eps", "1e-5"])
    };
    norm(&normed(1e-5)).expect(0, "To the bit");
    norm(&normed(0.3)).expect(1, "Wrong");

    let up = drawn(63, 32 * 96, 1.0, Format::Bf16);
    let swiglu = |sign: f64| -> Vec<f32> {
        let pairs = x.iter().zip(&up).map(|(&g, &u)| {
            let g = f64::from(g);
            sign * g / (1.0 + (-g).exp()) * f64::from(u)
        });
        bf16(&pairs.collect::<Vec<_>>())
    };
    let gated = |y: &[f32]| {
        save(&[
            ("gate", Format::Bf16, shape(), &x),
            ("up", Format::Bf16, shape(), &up),
            ("y", Format::Bf16, shape(), y),
        ]);
        judge(&["--op", "swiglu"])
    };
    gated(&swiglu(1.0)).expect(0, "To the bit");
    gated(&swiglu(-1.0)).expect(1, "they are -1 times the right values");

    let soft: Vec<f64> = x
        .chunks(96)
        .flat_map(|row| {
            let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            row.iter().map(move |&x| f64::from(x).exp() / total)
        })
        .collect();
    save(&[("x", Format::Bf16, shape(), &x), ("y", Format::Bf16, shape(), &bf16(&soft))]);
    judge(&["--op", "softmax"]).expect(0, "To the bit");

    // Four heads of 24, over two of keys and values; causal, with a window and without.
    let (k, v) = (drawn(64, 32 * 48, 1.0, Format::Bf16), drawn(65, 32 * 48, 1.0, Format::Bf16));
    let attended = |window: usize, scale: f64| -> Vec<f32> {
        let mut y = vec![0.0; 32 * 96];
        for (row, head) in (0..32).flat_map(|row| (0..4).map(move |head| (row, head))) {
            let keys: Vec<usize> = ((row + 1usize).saturating_sub(window)..=row).collect();
            let score = |key: &usize| -> f64 {
                (0..24)
                    .map(|i| {
                        f64::from(x[row * 96 + head * 24 + i])
                            * f64::from(k[key * 48 + head / 2 * 24 + i])
                    })
                    .sum::<f64>()
                    * scale
            };
            let powers: Vec<f64> = keys.iter().map(|key| score(key).exp()).collect();
            let total: f64 = powers.iter().sum();
            for i in 0..24 {
                y[row * 96 + head * 24 + i] = keys
                    .iter()
                    .zip(&powers)
                    .map(|(key, power)| power / total * f64::from(v[key * 48 + head / 2 * 24 + i]))
                    .sum();
            }
        }
        bf16(&y)
    };
    let attention = |y: &[f32], more: &[&str]| {
        let of_k = || vec![32, 48];
        save(&[
            ("q", Format::Bf16, shape(), &x),
            ("k", Format::Bf16, of_k(), &k),
            ("v", Format::Bf16, of_k(), &v),
            ("y", Format::Bf16, shape(), y),
        ]);
        let usual = ["--op", "attention", "--heads", "4", "--kv-heads", "2"];
        judge(&[&usual[..], more].concat())
    };
    let usual = 1.0 / 24f64.sqrt();
    attention(&attended(32, usual), &[]).expect(0, "rounding");
    attention(&attended(8, 0.1), &["--window", "8", "--scale", "0.1"]).expect(0, "rounding");
    attention(&attended(8, usual), &[]).expect(1, "Wrong");
    attention(&attended(32, 0.1), &[]).expect(1, "Wrong");

    let turned = |theta: f64| -> Vec<f32> {
        let mut y = vec![0.0; 32 * 96];
        for (row, head, pair) in
            (0..32).flat_map(|r| (0..4).flat_map(move |h| (0..12).map(move |p| (r, h, p))))
        {
            let angle = (row + 7) as f64 * theta.powf(-2.0 * pair as f64 / 24.0);
            let first = row * 96 + head * 24 + pair;
            let (a, b) = (f64::from(x[first]), f64::from(x[first + 12]));
            y[first] = a * angle.cos() - b * angle.sin();
            y[first + 12] = a * angle.sin() + b * angle.cos();
        }
        bf16(&y)
    };
    let rope = |y: &[f32]| {
        save(&[("x", Format::Bf16, shape(), &x), ("y", Format::Bf16, shape(), y)]);
        judge(&["--op", "rope", "--head-dim", "24", "--positions", "7"])
    };
    rope(&turned(10000.0)).expect(0, "ounding");
    rope(&turned(500000.0)).expect(1, "Wrong");
}

#[test]
fn the_answer_as_json_has_everything_that_is_told() {
    let dump = Dump::new(71, [32, 256, 64]);
    let mut y = dump.right();
    y[5 * 64..6 * 64].fill(0.0);
    let said = dump.judge_in(&y, &["--format", "json"]).expect(1, "");
    let json: serde_json::Value = serde_json::from_str(&said.out).expect("JSON");
    assert_eq!(json["answer"], "wrong");
    let judgement = &json["judgements"][0];
    assert_eq!(judgement["place"]["row_span"], serde_json::json!([5, 5]));
    assert_eq!(judgement["place"]["values"], 64);
    assert_eq!(judgement["values"], 32 * 64);
}

#[test]
fn a_stage_made_from_files_gives_the_same_answers() {
    let dump = Dump::new(81, [64, 256, 96]);
    let mut stale = dump.right();
    let row: Vec<f32> = stale[20 * 96..21 * 96].to_vec();
    stale[21 * 96..22 * 96].copy_from_slice(&row);
    let sums: Vec<f32> = dump.in_f32().iter().map(|&sum| Format::Bf16.round(sum)).collect();
    for (y, code, words) in
        [(dump.right(), 0, "\"pass\""), (sums, 0, "\"pass\""), (stale, 1, "row 21, all columns")]
    {
        let project = project();
        let tensors = [
            ("x", Format::Bf16, vec![64, 256], dump.x.as_slice()),
            ("w", Format::Bf16, vec![96, 256], dump.w.as_slice()),
            ("y", Format::Bf16, vec![64, 96], &y),
        ];
        write(&project, "d.safetensors", &tensors);
        fs::remove_file(project.path("stages/pipeline.toml")).expect("removed");
        let files = ["d.safetensors:x", "d.safetensors:w", "d.safetensors:y"];
        let new = [&["new", "matmul", "g", "--from-files"], &files[..]].concat();
        project.runner(&new).expect(0, "wrote `stages/g.toml`");
        let said = project.runner(&["run", "stages", "--format", "json"]);
        assert_eq!(said.code, Some(code), "{}\n{}", said.out, said.err);
        assert!(said.out.contains(words), "{words} in\n{}", said.out);
    }
}

#[test]
fn a_recording_of_one_tensor_needs_no_name_and_a_kernel_within_rounding_is_told_as_such() {
    let dump = Dump::new(82, [64, 256, 96]);
    let project = project();
    let bytes =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    npy(&project, "x.npy", "<f4", [64, 256], &bytes(&dump.x));
    npy(&project, "w.npy", "<f4", [96, 256], &bytes(&dump.w));
    npy(&project, "y.npy", "<f4", [64, 96], &bytes(&dump.in_f32()));
    let stage = "id = \"G\"\ntitle = \"a product\"\ncontract = \"coded-matmul\"\n[matmul]\n\
                 x = { file = \"../x.npy\", dtype = \"bf16\" }\n\
                 w = { file = \"../w.npy\", dtype = \"bf16\" }\n[recorded]\nfile = \"../y.npy\"\n";
    fs::remove_file(project.path("stages/pipeline.toml")).expect("removed");
    project.write("stages/g.toml", stage);
    let said = project.runner(&["run", "stages", "--format", "json"]);
    assert_eq!(said.code, Some(1), "{}\n{}", said.out, said.err);
    assert!(said.out.contains("known schedules, but z 0."), "{}", said.out);
}

/// Attention of one sequence in f64: `[tokens, heads, width]`, causal.
fn attended([q, k, v]: [&[f32]; 3], [tokens, heads, kv_heads, width]: [usize; 4]) -> Vec<f32> {
    let mut y = vec![0.0; tokens * heads * width];
    for (row, head) in (0..tokens).flat_map(|row| (0..heads).map(move |head| (row, head))) {
        let of_k = |key: usize| (key * kv_heads + head / (heads / kv_heads)) * width;
        let of_q = (row * heads + head) * width;
        let score = |key: usize| -> f64 {
            let products = (0..width).map(|i| f64::from(q[of_q + i]) * f64::from(k[of_k(key) + i]));
            products.sum::<f64>() / (width as f64).sqrt()
        };
        let powers: Vec<f64> = (0..=row).map(|key| score(key).exp()).collect();
        let total: f64 = powers.iter().sum();
        for i in 0..width {
            let parts = powers.iter().enumerate();
            y[of_q + i] = parts.map(|(key, p)| p / total * f64::from(v[of_k(key) + i])).sum();
        }
    }
    bf16(&y)
}

#[test]
fn the_sequences_of_a_batch_are_judged_one_by_one() {
    let project = Project::new();
    let [t, h, g, d] = [12, 4, 2, 16];
    let q = drawn(91, 2 * t * h * d, 1.0, Format::Bf16);
    let k = drawn(92, 2 * t * g * d, 1.0, Format::Bf16);
    let v = drawn(93, 2 * t * g * d, 1.0, Format::Bf16);
    let half = |values: &[f32], number: usize| {
        values.chunks(values.len() / 2).nth(number).expect("a half").to_vec()
    };
    let y = (0..2).flat_map(|b| attended([&half(&q, b), &half(&k, b), &half(&v, b)], [t, h, g, d]));
    let y: Vec<f32> = y.collect();
    let judge = |shapes: [Vec<usize>; 4], y: &[f32], more: &[&str]| {
        let [of_q, of_k, of_v, of_y] = shapes;
        let tensors = [
            ("q", Format::Bf16, of_q, q.as_slice()),
            ("k", Format::Bf16, of_k, k.as_slice()),
            ("v", Format::Bf16, of_v, v.as_slice()),
            ("y", Format::Bf16, of_y, y),
        ];
        write(&project, "d.safetensors", &tensors);
        project.runner(&[&["judge", "d.safetensors", "--op", "attention"], more].concat())
    };
    let apart = [vec![2, t, h, d], vec![2, t, g, d], vec![2, t, g, d], vec![2, t, h, d]];
    let said = judge(apart.clone(), &y, &[]).expect(0, "batch 1: ");
    assert!(said.out.contains("q is read as 2 sequences of 12 tokens of 4 heads"), "{}", said.out);
    let joined = [vec![2, t, h * d], vec![2, t, g * d], vec![2, t, g * d], vec![2, t, h * d]];
    let heads = ["--heads", "4", "--kv-heads", "2"];
    judge(joined, &y, &heads).expect(0, "batch 1: ");
    let mut swapped = y.clone();
    swapped.rotate_left(t * h * d);
    judge(apart.clone(), &swapped, &[]).expect(1, "batch 1: wrong");
    // Heads before tokens are not read, and it is said what is.
    let turned = [vec![2, h, t, d], vec![2, g, t, d], vec![2, g, t, d], vec![2, h, t, d]];
    judge(turned, &y, &[]).expect(2, "q.swapaxes(-3, -2)");
    let [q_shape, _, v_shape, y_shape] = apart;
    let other = [q_shape, vec![4, t / 2, g, d], v_shape, y_shape];
    judge(other, &y, &[]).expect(2, "give one sequence at a time");

    // Each sequence of a batch begins at the first position.
    let turn = |x: &[f32]| -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        for (row, head, pair) in
            (0..t).flat_map(|r| (0..h).flat_map(move |h| (0..d / 2).map(move |p| (r, h, p))))
        {
            let angle = row as f64 * 10000f64.powf(-2.0 * pair as f64 / d as f64);
            let first = (row * h + head) * d + pair;
            let (a, b) = (f64::from(x[first]), f64::from(x[first + d / 2]));
            y[first] = a * angle.cos() - b * angle.sin();
            y[first + d / 2] = a * angle.sin() + b * angle.cos();
        }
        bf16(&y)
    };
    let rotated = [turn(&half(&q, 0)), turn(&half(&q, 1))].concat();
    let shape = || vec![2, t, h, d];
    write(
        &project,
        "r.safetensors",
        &[("x", Format::Bf16, shape(), &q), ("y", Format::Bf16, shape(), &rotated)],
    );
    project.runner(&["judge", "r.safetensors", "--op", "rope"]).expect(0, "batch 1: ");
    // Positions as NumPy makes them.
    let whole: Vec<u8> = (0..t as i64).flat_map(i64::to_le_bytes).collect();
    npy(&project, "p.npy", "<i8", [1, t], &whole);
    let rope = ["judge", "r.safetensors", "--op", "rope", "--positions", "p.npy"];
    project.runner(&rope).expect(0, "batch 1: ");
}

#[test]
fn what_an_op_does_not_read_or_no_kernel_can_mean_is_refused() {
    let dump = Dump::new(94, [16, 64, 24]);
    let project = Project::new();
    let tensors = [
        ("x", Format::Bf16, vec![16, 64], dump.x.as_slice()),
        ("w", Format::Bf16, vec![24, 64], dump.w.as_slice()),
        ("y", Format::F32, vec![16, 24], &dump.in_f32()),
    ];
    write(&project, "d.safetensors", &tensors);
    let judge = |more: &[&str]| project.runner(&[&["judge", "d.safetensors"], more].concat());
    for (more, words) in [
        (&["--eps", "3"][..], "`--eps` belongs to norm: matmul does not read it"),
        (&["--heads", "7"], "`--heads` belongs to attention"),
        (&["--op", "softmax", "--scale-x", "2"], "`--scale-x` belongs to matmul"),
        (&["--op", "rope", "--window", "2"], "`--window` belongs to attention"),
        (&["--alpha", "nan"], "`--alpha NaN` must be a finite number"),
        (&["--alpha", "inf"], "`--alpha inf`"),
        (&["--scale-x", "-1"], "a scale of x is -1"),
        (&["--op", "rope", "--theta", "nan"], "`--theta NaN` must be a finite number above 0"),
        (&["--op", "rope", "--theta", "-1"], "`--theta -1`"),
        (&["--op", "attention", "--window", "0"], "`--window 0`"),
        (&["--output", "bf16"], "`--output bf16` does not hold y"),
    ] {
        judge(more).expect(2, words);
    }
    let bytes: Vec<u8> = dump.x.iter().flat_map(|v| v.to_le_bytes()).collect();
    npy(&project, "x.npy", "<f4", [16, 64], &bytes);
    let named = ["judge", "x.npy:foo", "d.safetensors:w", "d.safetensors:y"];
    project.runner(&named).expect(2, "leave out `:foo`");
    let codes: Vec<u8> = dump.x.iter().map(|&x| Format::E4m3.encode(x) as u8).collect();
    npy(&project, "x8.npy", "<V1", [16, 64], &codes);
    let files = ["judge", "x8.npy", "d.safetensors:w", "d.safetensors:y"];
    let said = project.runner(&files).expect(2, "`x8.npy` is stored as plain 8-bit words");
    assert!(said.err.contains("by `--dtype-x`, one of e4m3, e5m2"), "{}", said.err);
    project.runner(&[&files[..], &["--dtype-x", "e4m3"]].concat()).expect(1, "x has no scale");
    let other = ["judge", "d.safetensors:y", "d.safetensors:w", "d.safetensors:x"];
    let said = project.runner(&[&other[..], &["--dtype-x", "f16"]].concat());
    said.expect(2, "leave out `--dtype-x`, or");
}

#[test]
fn a_bias_after_the_rounding_and_a_weight_that_was_rounded_are_named_for_what_they_are() {
    let dump = Dump::new(95, [64, 256, 96]);
    let bias = drawn(96, 96, 1.0, Format::Bf16);
    let y: Vec<f32> = dump
        .right()
        .iter()
        .enumerate()
        .map(|(i, y)| Format::Bf16.round(y + bias[i % 96]))
        .collect();
    let project = Project::new();
    let tensors = [
        ("x", Format::Bf16, vec![64, 256], dump.x.as_slice()),
        ("w", Format::Bf16, vec![96, 256], dump.w.as_slice()),
        ("bias", Format::Bf16, vec![96], bias.as_slice()),
        ("y", Format::Bf16, vec![64, 96], y.as_slice()),
    ];
    write(&project, "d.safetensors", &tensors);
    let words = ["output-rounded: the product is rounded to bf16 before the bias"];
    wrong(project.runner(&["judge", "d.safetensors"]), &words);

    let codes: Vec<f32> = dump.w.iter().map(|w| Format::E4m3.round(w / 0.01)).collect();
    let rounded: Vec<f32> = codes.iter().map(|w| Format::Bf16.round(w * 0.013)).collect();
    let mut kernel = Dump { w: rounded, exact: Vec::new(), ..dump };
    kernel.exact = kernel.sums(0..256);
    let tensors = [
        ("x", Format::Bf16, vec![64, 256], kernel.x.as_slice()),
        ("w", Format::E4m3, vec![96, 256], codes.as_slice()),
        ("w_scale", Format::F32, vec![1], &[0.013]),
        ("y", Format::Bf16, vec![64, 96], &kernel.right()),
    ];
    write(&project, "d.safetensors", &tensors);
    let said = project.runner(&["judge", "d.safetensors"]);
    let name = "other-format: w (e4m3 times its scale) rounded to bf16 before the product";
    assert_eq!(said.out.matches(name).count(), 2, "in the sentence and once below:\n{}", said.out);
    said.expect(1, name);
}

#[test]
fn of_a_file_of_all_it_is_said_what_was_not_used_and_a_missing_scale_names_no_other() {
    let [n, k, m] = [32, 256, 64];
    let (x, w) = (drawn(97, n * k, 1.0, Format::F32), drawn(98, m * k, 0.05, Format::F32));
    let ((xc, xs), (wc, ws)) = (quantised(&x, k, 1, k), quantised(&w, k, 1, k));
    let y = scaled((&xc, &xs, [1, k]), (&wc, &ws, [1, k]), k);
    let project = Project::new();
    let judge = |scale: &str| {
        let tensors = [
            ("x", Format::E4m3, vec![n, k], xc.as_slice()),
            ("w", Format::E4m3, vec![m, k], wc.as_slice()),
            ("x_scale_inv", Format::F32, vec![n, 1], xs.as_slice()),
            (scale, Format::F32, vec![m, 1], ws.as_slice()),
            ("y", Format::Bf16, vec![n, m], y.as_slice()),
        ];
        write(&project, "d.safetensors", &tensors);
        project.runner(&["judge", "d.safetensors"])
    };
    judge("w_scale_inv").expect(0, "`w_scale_inv` of `d.safetensors` is taken as scale w");
    let said = judge("factors").expect(1, "not used: `factors`");
    assert!(said.out.contains("w has no scale"), "{}", said.out);
    assert!(said.out.contains("not recognised"), "{}", said.out);
}

#[test]
fn a_tile_in_another_type_than_nearly_all_is_blamed_and_the_others_are_not() {
    let dump = Dump::new(99, [128, 256, 128]);
    let mut y = dump.right();
    for row in 32..64 {
        for column in 64..96 {
            y[row * 128 + column] *= 1.037;
        }
    }
    let project = Project::new();
    let tensors = [
        ("x", Format::Bf16, vec![128, 256], dump.x.as_slice()),
        ("w", Format::Bf16, vec![128, 256], dump.w.as_slice()),
        ("y", Format::F32, vec![128, 128], y.as_slice()),
    ];
    write(&project, "d.safetensors", &tensors);
    let said = project.runner(&["judge", "d.safetensors"]);
    let words = ["nearly all of its values are bf16", "rows 32 to 63, columns 64 to 95"];
    wrong(said, &words);

    let project = crate::single::project();
    write(&project, "d.safetensors", &tensors);
    fs::remove_file(project.path("stages/pipeline.toml")).expect("removed");
    let files = ["d.safetensors:x", "d.safetensors:w", "d.safetensors:y"];
    let new = [&["new", "matmul", "g", "--from-files"], &files[..]].concat();
    project.runner(&new).expect(0, "wrote `stages/g.toml`");
    let said = project.runner(&["run", "stages", "--format", "json"]);
    assert!(said.out.contains("rows 32 to 63, columns 64 to 95"), "{}", said.out);
}

#[test]
fn a_stage_is_written_only_of_operands_that_fit_as_a_stage_reads_them() {
    let dump = Dump::new(100, [16, 64, 24]);
    let project = project();
    let turned: Vec<f32> = (0..64)
        .flat_map(|k| (0..24).map(move |m| (k, m)))
        .map(|(k, m)| dump.w[m * 64 + k])
        .collect();
    let tensors = [
        ("x", Format::Bf16, vec![16, 64], dump.x.as_slice()),
        ("w", Format::Bf16, vec![24, 64], dump.w.as_slice()),
        ("wt", Format::Bf16, vec![64, 24], turned.as_slice()),
        ("y", Format::Bf16, vec![16, 24], &dump.right()),
    ];
    write(&project, "d.safetensors", &tensors);
    let new = |id: &str, w: &str, y: &str| {
        let files = ["d.safetensors:x", w, y];
        project.runner(&[&["new", "matmul", id, "--from-files"], &files[..]].concat())
    };
    new("a", "d.safetensors:w", "d.safetensors:y").expect(0, "wrote");
    new("b", "d.safetensors:wt", "d.safetensors:y").expect(2, "these fit with w as [K, M] only");
    new("c", "d.safetensors:w", "d.safetensors:x").expect(2, "are no product");
    assert!(!project.path("stages/b.toml").exists());
}

/// Rows and columns of a product, one value after the other.
fn places(dump: &Dump) -> impl Iterator<Item = (usize, usize)> {
    let (n, m) = (dump.n, dump.m);
    (0..n).flat_map(move |row| (0..m).map(move |column| (row, column)))
}

#[test]
fn every_part_of_k_that_counts_otherwise_than_once_is_named_by_its_elements() {
    let [n, k, m] = [48, 520, 160];
    let dump = Dump::new(201, [n, k, m]);
    let part = |range| dump.sums(range);
    let with = |parts: &[(f64, Vec<f64>)]| -> Vec<f32> {
        let mut y = dump.exact.clone();
        for (weight, part) in parts {
            y.iter_mut().zip(part).for_each(|(y, part)| *y += weight * part);
        }
        bf16(&y)
    };
    // One operand's tile is the one before it.
    let stale = |of_x: bool| -> Vec<f32> {
        let sum = |(row, column): (usize, usize)| {
            let product = |at: usize| {
                let old = if (256..288).contains(&at) { at - 32 } else { at };
                let (x, w) = if of_x { (old, at) } else { (at, old) };
                f64::from(dump.x[row * k + x]) * f64::from(dump.w[column * k + w])
            };
            (0..k).map(product).sum()
        };
        bf16(&places(&dump).map(sum).collect::<Vec<f64>>())
    };
    let in_tile = {
        let lost = part(64..80);
        let y = dump.exact.iter().zip(&lost).enumerate();
        let tile = |at: usize| (32..96).contains(&(at % m));
        bf16(&y.map(|(at, (y, p))| if tile(at) { y - p } else { *y }).collect::<Vec<f64>>())
    };
    let others: Vec<(f64, Vec<f64>)> =
        (0..4).map(|tile| (-1.0, part(128 * tile + 64..128 * tile + 128))).collect();
    for (y, words) in [
        (with(&[(-1.0, part(336..352))]), "k-block-lost: products 336 to 351 of 520 are left out"),
        (
            with(&[(1.0, part(336..352))]),
            "k-block-twice: products 336 to 351 of 520 are counted twice",
        ),
        (
            with(&[(-1.0, part(480..520))]),
            "k-tail-dropped: the last 40 of 520 products are dropped",
        ),
        (with(&others), "that is every other block of 64, from 64 on"),
        (
            with(&[(-1.0, part(320..384)), (1.0, part(256..320))]),
            "products 320 to 383 of 520 are left out, and products 256 to 319 are counted twice in",
        ),
        (
            stale(true),
            "elements 256 to 287 of x along K hold its elements 224 to 255: a stale tile",
        ),
        (
            stale(false),
            "elements 256 to 287 of w along K hold its elements 224 to 255: a stale tile",
        ),
        (in_tile, "columns 32 to 95 of all rows"),
    ] {
        wrong(dump.judge(&y), &[words]);
    }
}

#[test]
fn what_was_done_to_the_right_result_is_named_in_words() {
    let dump = Dump::new(202, [96, 256, 160]);
    let m = dump.m;
    let of = |change: &dyn Fn(usize, usize, f64) -> f64| -> Vec<f32> {
        let values = places(&dump).zip(&dump.exact).map(|((r, c), &y)| change(r, c, y));
        bf16(&values.collect::<Vec<f64>>())
    };
    let tile = |row: usize, column: usize| (32..64).contains(&row) && (64..96).contains(&column);
    let at = |row: usize, column: usize| dump.exact[row * m + column];
    let cut = |y: f64| f64::from(f32::from_bits((y as f32).to_bits() & 0xffff_0000));
    let column_of = |column: usize| (column * 7 % 11) as f64 / 4.0 - 1.0;
    type Change<'c> = &'c dyn Fn(usize, usize, f64) -> f64;
    let all: [(Change<'_>, &[&str]); 17] = [
        (&|_, _, y| -y, &["sign-flipped: every value there has the other sign"]),
        (&|_, _, y: f64| y.abs(), &["sign-lost: values are the magnitudes"]),
        (&|_, _, y| if y > 0.0 { y } else { 0.0 }, &["as ReLU leaves them"]),
        (&|_, _, y: f64| y / (1.0 + (-y).exp()), &["SiLU, x / (1 + exp(-x)), was applied"]),
        (&|_, _, y: f64| y.clamp(-0.5, 0.5), &["clipped: values are clipped at 0.5"]),
        (&|_, _, y| y + 0.25, &["offset: the constant 0.25 is added to every value"]),
        (
            &|_, c, y| y + column_of(c),
            &["column-offset: a constant of its own is added to each column"],
        ),
        (
            &|_, c, y| y * (1.5 + column_of(c)),
            &["column-scale: each column has a factor of its own"],
        ),
        (&|_, c, y| if c / 64 == 1 { y * 1.1 } else { y }, &["columns 64 to 127", "1.1 times"]),
        (&|_, _, y| cut(y), &["output-truncated: the result is truncated to bf16"]),
        (&|_, _, y| f64::from(Format::E5m2.round(y as f32)), &["rounded to e5m2"]),
        (&|r, c, y| if tile(r, c) { 0.75 } else { y }, &["constant: every value there is 0.75"]),
        (
            &|r, c, y| if tile(r, c) { at(r, c + 32) } else { y },
            &[
                "rows 32 to 63, columns 64 to 95",
                "tile-stale: they are the outputs of rows 32 to 63 and columns 96 to 127",
            ],
        ),
        (
            &|r, c, y| if tile(r, c) { at(c - 32, r + 32) } else { y },
            &["rows 32 to 63, columns 64 to 95", "tile-transposed"],
        ),
        (
            &|r, c, y| if (32..64).contains(&r) { at(r - 32, c) } else { y },
            &["rows-repeated: rows 32 to 63 hold rows 0 to 31"],
        ),
        (
            &|r, c, _| at(r, (c + m - 1) % m),
            &["columns-shifted: each column there holds the column before it"],
        ),
        (&|r, c, _| at(r, (c + m / 2) % m), &["the two halves of the columns are exchanged"]),
    ];
    for (change, words) in all {
        wrong(dump.judge(&of(change)), words);
    }
    let mut y = dump.right();
    y[5 * m..6 * m].fill(f32::NAN);
    wrong(dump.judge(&y), &["non-finite-output", "whole rows"]);
    // One value may be met by chance by any of these.
    let mut y = dump.right();
    y[5 * m + 7] += 1.0;
    wrong(dump.judge(&y), &["row 5, column 7", "not recognised"]);
}

#[test]
fn what_alpha_and_bias_did_is_named_in_words() {
    let dump = Dump::new(203, [64, 128, 96]);
    let bias = drawn(204, 96, 1.0, Format::Bf16);
    let b = |column: usize| f64::from(bias[column % 96]);
    let project = Project::new();
    type Change<'c> = &'c dyn Fn(usize, f64) -> f64;
    let all: [(Change<'_>, &str); 7] = [
        (&|c, y| y + b(c), "alpha-missing: alpha, 0.25, is not applied"),
        (&|c, y| y / 16.0 + b(c), "alpha-twice: alpha, 0.25, is applied twice"),
        (&|_, y| y / 4.0, "bias-missing: the bias is not added"),
        (&|c, y| y / 4.0 + 2.0 * b(c), "bias-twice: the bias is added twice"),
        (&|c, y| y / 4.0 - b(c), "bias-sign: the bias is subtracted"),
        (&|c, y| y / 4.0 + b(c + 1), "bias-shifted: each column gets the bias of the next column"),
        (&|c, y| (y + b(c)) / 4.0, "bias-scaled: the bias is added before alpha is applied"),
    ];
    for (change, words) in all {
        let y = places(&dump).zip(&dump.exact).map(|((_, c), &y)| change(c, y));
        let y = bf16(&y.collect::<Vec<f64>>());
        let tensors = [
            ("x", Format::Bf16, vec![64, 128], dump.x.as_slice()),
            ("w", Format::Bf16, vec![96, 128], dump.w.as_slice()),
            ("bias", Format::Bf16, vec![96], bias.as_slice()),
            ("y", Format::Bf16, vec![64, 96], &y),
        ];
        write(&project, "d.safetensors", &tensors);
        wrong(project.runner(&["judge", "d.safetensors", "--alpha", "0.25"]), &[words]);
    }
}

#[test]
fn an_operand_that_was_read_or_rounded_otherwise_is_named_with_what_happened_to_it() {
    let dump = Dump::new(205, [48, 256, 96]);
    let k = dump.k;
    let product = |x: &[f32], w: &[f32]| {
        let other = Dump { x: x.to_vec(), w: w.to_vec(), exact: Vec::new(), ..dump };
        bf16(&other.sums(0..k))
    };
    let each = |values: &[f32], change: &dyn Fn(f32) -> f32| -> Vec<f32> {
        values.iter().map(|&value| change(value)).collect()
    };
    let as_f16 = |value: f32| Format::F16.decode(Format::Bf16.encode(value));
    let eight_bit: Vec<f32> = dump
        .w
        .chunks(k)
        .flat_map(|row| {
            let most = row.iter().fold(0f32, |most, w| if w.abs() > most { w.abs() } else { most });
            let step = most / 127.0;
            row.iter().map(move |w| (w / step).round_ties_even() * step)
        })
        .collect();
    for (y, words) in [
        (product(&each(&dump.x, &as_f16), &dump.w), "wrong-format: x (bf16) is read as f16"),
        (
            product(&each(&dump.x, &|x| Format::E4m3.round(x)), &dump.w),
            "other-format: x is rounded to e4m3",
        ),
        (
            product(&dump.x, &eight_bit),
            "other-format: w is rounded to 8-bit integers with one scale for each row",
        ),
    ] {
        wrong(dump.judge(&y), &[words]);
    }
}

#[test]
fn scales_that_were_rounded_or_left_out_and_codes_that_were_misread_are_named() {
    let [n, k, m] = [32, 256, 128];
    let x = drawn(206, n * k, 1.0, Format::F32);
    let w: Vec<f32> = drawn(207, m * k, 0.05, Format::F32);
    let w: Vec<f32> = w.iter().enumerate().map(|(i, w)| w * (1.0 + (i / k % 5) as f32)).collect();
    let ((xc, xs), (wc, ws)) = (quantised(&x, k, 1, k), quantised(&w, k, 1, k));
    let (of_x, by_row) = ((&xc[..], &xs[..], [1, k]), [1, k]);
    let ones = vec![1.0; m];
    let powers: Vec<f32> = ws.iter().map(|s| s.log2().ceil().exp2()).collect();
    let most = ws.iter().fold(0f32, |most, &s| if s > most { s } else { most });
    let read = |change: &dyn Fn(u8) -> f32| -> Vec<f32> {
        wc.iter().map(|&w| change(Format::E4m3.encode(w) as u8)).collect()
    };
    let (integers, halves) = (
        read(&|code| f32::from(code as i8)),
        read(&|code| Format::E4m3.decode(u32::from(code.rotate_left(4)))),
    );
    // A kernel whose halves of bytes are exchanged makes NaN of some; here such codes are 0.
    let whole = |value: &f32| value.is_finite();
    let kept: Vec<f32> =
        wc.iter().zip(&halves).map(|(&w, h)| if whole(h) { w } else { 1.0 }).collect();
    let halves: Vec<f32> = kept
        .iter()
        .map(|&w| Format::E4m3.decode(u32::from((Format::E4m3.encode(w) as u8).rotate_left(4))))
        .collect();
    let project = Project::new();
    for (codes, y, words) in [
        (
            &wc,
            scaled(of_x, (&wc, &ones, by_row), k),
            "scale-missing: the scales of w are not applied",
        ),
        (
            &wc,
            scaled((&xc, &vec![1.0; n], by_row), (&wc, &ones, by_row), k),
            "scale-missing: the scales of x and w are not applied",
        ),
        (
            &wc,
            scaled(of_x, (&wc, &powers, by_row), k),
            "scale-rounded: the scales of w are rounded up to powers of two",
        ),
        (
            &wc,
            scaled(of_x, (&wc, &vec![most; m], by_row), k),
            "scale-order: the scales of w are all taken as the largest of them",
        ),
        (
            &wc,
            scaled(of_x, (&integers, &ws, by_row), k),
            "wrong-format: w (e4m3) is read as 8-bit integers",
        ),
        (
            &kept,
            scaled(of_x, (&halves, &ws, by_row), k),
            "nibble-order: w is read with the two halves of each byte exchanged",
        ),
    ] {
        let tensors = [
            ("x", Format::E4m3, vec![n, k], xc.as_slice()),
            ("w", Format::E4m3, vec![m, k], codes.as_slice()),
            ("x_scale", Format::F32, vec![n, 1], xs.as_slice()),
            ("w_scale", Format::F32, vec![m, 1], ws.as_slice()),
            ("y", Format::Bf16, vec![n, m], &y),
        ];
        write(&project, "d.safetensors", &tensors);
        wrong(project.runner(&["judge", "d.safetensors"]), &[words]);
    }
    // One block of a table carries another's scale.
    let ((xc, xs), (wc, ws)) = (quantised(&x, k, 1, 128), quantised(&w, k, 64, 128));
    let mut other = ws.clone();
    other[3] *= 0.75;
    let of_x = (&xc[..], &xs[..], [1, 128]);
    let y = scaled(of_x, (&wc, &other, [64, 128]), k);
    let tensors = [
        ("x", Format::E4m3, vec![n, k], xc.as_slice()),
        ("w", Format::E4m3, vec![m, k], wc.as_slice()),
        ("x_scale", Format::F32, vec![n, 2], xs.as_slice()),
        ("w_scale", Format::F32, vec![2, 2], ws.as_slice()),
        ("y", Format::Bf16, vec![n, m], &y),
    ];
    write(&project, "d.safetensors", &tensors);
    let words = ["columns 64 to 127 of all rows", "block-scale: products 128 to 255 count 0.7"];
    wrong(project.runner(&["judge", "d.safetensors"]), &words);
}

#[test]
fn no_clean_product_of_any_common_shape_is_called_wrong() {
    let mut random = Random::at(208);
    for seed in 0..12 {
        let mut one_of = |sizes: &[usize]| sizes[random.below(sizes.len())];
        let (n, m) = (one_of(&[1, 3, 16, 33, 64]), one_of(&[64, 96, 160, 257]));
        let dump = Dump::new(300 + 2 * seed, [n, one_of(&[64, 200, 512, 1000]), m]);
        dump.judge(&dump.right()).expect(0, "To the bit");
        let sums: Vec<f32> = dump.in_f32().iter().map(|&sum| Format::Bf16.round(sum)).collect();
        dump.judge(&sums).expect(0, "");
    }
}

/// Two tensors in one file, judged as such.
fn same(a: (Format, &[usize], &[f32]), b: (Format, &[usize], &[f32]), more: &[&str]) -> Outcome {
    let project = Project::new();
    let tensors = [("a", a.0, a.1.to_vec(), a.2), ("b", b.0, b.1.to_vec(), b.2)];
    write(&project, "ab.safetensors", &tensors);
    project.runner(&[&["judge", "ab.safetensors", "--op", "same"], more].concat())
}

#[test]
fn of_two_tensors_equal_bits_roundings_and_steps_are_told_apart() {
    let shape = [24, 96];
    let a = drawn(401, 24 * 96, 1.0, Format::F32);
    let each = |change: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
        a.iter().enumerate().map(|(at, &a)| change(at, a)).collect()
    };
    let (f32, bf16, f16) = (Format::F32, Format::Bf16, Format::F16);
    let to = |format: Format| each(&|_, a| format.round(a));
    let of_a = (f32, &shape[..], a.as_slice());
    same(of_a, of_a, &[]).expect(0, "To the bit: b has a's values, all 2,304 values");
    let narrow = to(bf16);
    let of_narrow = (bf16, &shape[..], narrow.as_slice());
    same(of_narrow, of_narrow, &["--format", "json"]).expect(0, "\"answer\": \"to-the-bit\"");
    let rounded = "b is a rounded to bf16, to nearest even, in all 2,304 values";
    same(of_a, of_narrow, &[]).expect(0, rounded);
    same(of_a, (f32, &shape, &narrow), &[]).expect(0, rounded);
    same(of_narrow, of_a, &[]).expect(0, "a is b rounded to bf16, to nearest even");
    let cut = each(&|_, a| f32::from_bits(a.to_bits() & 0xffff_0000));
    same(of_a, (bf16, &shape, &cut), &[]).expect(0, "b is a rounded to bf16, towards zero");
    let tf32 = to(Format::Tf32);
    same(of_a, (f32, &shape, &tf32), &[]).expect(0, "rounded to tf32, to nearest even");
    let coarse = to(Format::E4m3);
    same(of_a, (Format::E4m3, &shape, &coarse), &[]).expect(0, "rounded to e4m3, to nearest even");
    let drawn_up = each(&|at, a| {
        let up = if at % 3 == 0 { 0x1_0000 } else { 0 };
        f32::from_bits((a.to_bits() & 0xffff_0000) + up)
    });
    same(of_a, (bf16, &shape, &drawn_up), &[]).expect(0, "as stochastic rounding does");
    let half = to(f16);
    let both = "a and b may be roundings of the same values, a to bf16 and b to f16";
    same(of_narrow, (f16, &shape, &half), &[]).expect(0, both);

    let mut off = narrow.clone();
    for at in (0..off.len()).step_by(7) {
        off[at] = f32::from_bits(off[at].to_bits() + 0x1_0000);
    }
    let of_off = (bf16, &shape[..], off.as_slice());
    let said = same(of_narrow, of_off, &[]).expect(0, "b lies within 1 bf16 step of a: 330 of");
    assert!(said.out.contains("the largest difference is 1 bf16 step at ["), "{}", said.out);
    same(of_narrow, of_off, &["--ulps", "0"]).expect(1, "Wrong: ");
    // All of them a little too large is no chance.
    let larger = narrow.iter().map(|a| bf16.round(a * 1.004)).collect::<Vec<_>>();
    let words = "scale-wrong: every output is 1.00";
    same(of_narrow, (bf16, &shape, &larger), &[]).expect(1, words);
}

#[test]
fn of_two_tensors_it_is_said_what_the_wrong_one_looks_like() {
    let (rows, width) = (24, 128);
    let shape = [rows, width];
    let a = drawn(403, rows * width, 1.0, Format::F32);
    let of_a = (Format::F32, &shape[..], a.as_slice());
    let at = |row: usize, column: usize| a[row % rows * width + column % width];
    let tile = |row: usize, column: usize| (8..16).contains(&row) && (32..64).contains(&column);
    type Change<'c> = &'c dyn Fn(usize, usize) -> f32;
    let all: [(Change<'_>, &str); 14] = [
        (&|r, c| at(r, c) * 1.02, "scale-wrong: every output is 1.02 times"),
        (&|r, c| if r == 7 { at(r, c) * 1.5 } else { at(r, c) }, "row-scale"),
        (&|r, c| if c == 7 { at(r, c) * 1.5 } else { at(r, c) }, "column-scale"),
        (&|r, c| at(r, c) + 0.5, "offset: the constant 0.5 is added"),
        (&|r, c| -at(r, c), "sign-flipped"),
        (&|r, c| at(r, c).clamp(-1.0, 1.0), "clipped: values are clipped at 1"),
        (&|r, c| at(r + 1, c), "rows-shifted: each row there holds the row after it"),
        (
            &|r, c| at(r, c / 64 * 64 + c % 2 * 32 + c % 64 / 2),
            "the halves of each head of 64 are interleaved",
        ),
        (&|r, c| if tile(r, c) { 0.0 } else { at(r, c) }, "unwritten: 256 values are zero"),
        (&|r, c| if tile(r, c) { at(r, c + 32) } else { at(r, c) }, "tile-stale"),
        (
            &|r, c| {
                at(
                    r,
                    match c {
                        3 => 90,
                        90 => 3,
                        c => c,
                    },
                )
            },
            "columns-permuted",
        ),
        (&|r, c| at(r, c) * [1.5, 0.5][c / 64], "each block of 64 columns has a factor of its own"),
        (&|r, c| if (r, c) == (3, 5) { f32::NAN } else { at(r, c) }, "1 value is NaN"),
        (&|r, c| if (r, c) == (3, 5) { 9.0 } else { at(r, c) }, "row 3, column 5"),
    ];
    for (change, words) in all {
        let b: Vec<f32> = (0..rows)
            .flat_map(|r| (0..width).map(move |c| (r, c)))
            .map(|(r, c)| change(r, c))
            .collect();
        same(of_a, (Format::F32, &shape, &b), &[]).expect(1, words);
    }
    let narrow: Vec<f32> = a.iter().map(|&a| Format::Bf16.round(a)).collect();
    let misread: Vec<f32> =
        narrow.iter().map(|&a| Format::F16.decode(Format::Bf16.encode(a))).collect();
    let of_narrow = (Format::Bf16, &shape[..], narrow.as_slice());
    let words = "b is a's bytes, which hold bf16, read as f16";
    same(of_narrow, (Format::F16, &shape, &misread), &[]).expect(1, words);
}

#[test]
fn tensors_of_different_shapes_are_compared_in_words() {
    let a = drawn(404, 6 * 4, 1.0, Format::F32);
    let places = (0..4).flat_map(|column| (0..6).map(move |row| row * 4 + column));
    let turned: Vec<f32> = places.map(|place| a[place]).collect();
    let of_a = (Format::F32, &[6, 4][..], a.as_slice());
    let of = |shape: &'static [usize], values: &[f32], words: &str| {
        same(of_a, (Format::F32, shape, values), &[]).expect(1, words);
    };
    of(&[4, 6], &turned, "a is [6, 4] and b [4, 6]; b is a transposed");
    of(&[4, 6], &a, "both hold the same values in the same order");
    of(&[3, 4], &a[..12], "b is the first 3 rows and 4 columns of a");
    of(&[3, 4], &a[12..], "b is a from row 3 and column 0 on");
    of(&[3, 5], &[0.0; 15], "the values that both have are not the same");
    let one = same(of_a, (Format::F32, &[1, 6, 4], &a), &[]);
    one.expect(0, "To the bit");
    let project = Project::new();
    write(&project, "a.safetensors", &[("a", Format::F32, vec![6, 4], &a)]);
    let judge = |more: &[&str]| project.runner(&[&["judge", "a.safetensors"], more].concat());
    judge(&["--op", "same"]).expect(2, "has no tensor that is b by its name");
    judge(&["--ulps", "3"]).expect(2, "`--ulps` belongs to same");
    judge(&["--op", "same", "--output", "bf16"]).expect(2, "`--output` belongs to");
}

#[test]
fn observed_outputs_of_chip_multiply_are_sent_to_judge() {
    let project = Project::new();
    let multiply = ["chip", "multiply", "x.npy", "w.npy", "--observed", "y.npy"];
    let x: Vec<u8> = 1f32.to_le_bytes().repeat(4);
    npy(&project, "x.npy", "<f4", [2, 2], &x);
    npy(&project, "w.npy", "<f4", [2, 2], &x);
    project.runner(&multiply).expect(2, "`runner judge X W y.npy` says whether these are");
}
