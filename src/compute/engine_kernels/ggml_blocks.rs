//! llama.cpp's integer products on CUDA: quantised weights by activations that are rounded to
//! 8 bits in blocks of 32.
//!
//! It knows blocks of codes and rows of values: no weights by name, no sites.
//!
//! Sums of integers are exact, so all that is left is how scales meet them and in which order
//! blocks are added. Up to 8 rows of activations (`mul_mat_vec_q`, MMVQ) each thread adds its own
//! blocks with one fused multiply-add each, warps are added in their order, then lanes by
//! butterflies. More rows (`mul_mat_q`, MMQ) are tiles of 128 outputs; a tile is one chain over
//! K in steps of 256, unless the even share of work of each multiprocessor ends within it
//! ("stream-k"): then each piece is a chain of its own, the last one is written, and the others
//! are added to it.
//!
//! Evidence: every product of 110 recordings of llama.cpp b6301 on an H200, of ten types of blocks and
//! 1 to 300 rows, and of 150 others of up to 700 rows (docs/engines.md).
//!
//! Sources: ggml's `mmvq.cu`, `mmq.cuh`, `vecdotq.cuh` and `quantize.cu` (MIT), of August 2025.
//! They are compiled with `-use_fast_math`: reciprocals are the special function unit's.

use half::f16;
use rayon::prelude::*;

use super::row_sum::tree;
use super::sfu;
use crate::model::WeightType;
use crate::tensor::Tensor;

/// Rows of activations that MMVQ takes.
pub const VECTOR_ROWS: usize = 8;
/// Elements of an activation's block.
const BLOCK: usize = 32;
/// Outputs of a tile of MMQ.
const TILE_OUTPUTS: usize = 128;
/// Elements of K in a step of MMQ.
const STEP: usize = 256;

/// A block of a weight, taken apart.
struct Block {
    /// Codes as the kernel multiplies them.
    codes: [i8; 256],
    /// A scale for each group of 16 or 32.
    scales: [i32; 16],
    /// What each group's minimum is multiplied by.
    minimums: [i32; 16],
    d: f32,
    m: f32,
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Rounds to f16 and back.
fn to_half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

impl Block {
    fn read(kind: WeightType, bytes: &[u8]) -> Block {
        let mut block =
            Block { codes: [0; 256], scales: [0; 16], minimums: [0; 16], d: 0.0, m: 0.0 };
        match kind {
            WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q5_0 | WeightType::Q5_1 => {
                block.d = half_at(bytes, 0);
                let mut at = 2;
                if matches!(kind, WeightType::Q4_1 | WeightType::Q5_1) {
                    block.m = half_at(bytes, at);
                    at += 2;
                }
                let mut high = 0u32;
                if matches!(kind, WeightType::Q5_0 | WeightType::Q5_1) {
                    high = u32::from_le_bytes([
                        bytes[at],
                        bytes[at + 1],
                        bytes[at + 2],
                        bytes[at + 3],
                    ]);
                    at += 4;
                }
                for l in 0..16 {
                    let byte = bytes[at + l];
                    block.codes[l] = (byte & 15) as i8 | ((high >> l & 1) << 4) as i8;
                    block.codes[l + 16] = (byte >> 4) as i8 | ((high >> (l + 16) & 1) << 4) as i8;
                }
            }
            WeightType::Q8_0 => {
                block.d = half_at(bytes, 0);
                for l in 0..32 {
                    block.codes[l] = bytes[2 + l] as i8;
                }
            }
            WeightType::Q2K => {
                for (group, byte) in bytes[..16].iter().enumerate() {
                    block.scales[group] = i32::from(byte & 15);
                    block.minimums[group] = i32::from(byte >> 4);
                }
                for e in 0..256 {
                    let byte = bytes[16 + 32 * (e / 128) + e % 32];
                    block.codes[e] = (byte >> (2 * (e % 128 / 32)) & 3) as i8;
                }
                (block.d, block.m) = (half_at(bytes, 80), half_at(bytes, 82));
            }
            WeightType::Q3K => {
                let scales = &bytes[96..108];
                for group in 0..16 {
                    let low = scales[group % 8] >> (4 * (group / 8)) & 15;
                    let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
                    block.scales[group] = i32::from(low | high << 4) - 32;
                }
                for e in 0..256 {
                    let byte = bytes[32 + 32 * (e / 128) + e % 32];
                    let code = (byte >> (2 * (e % 128 / 32)) & 3) as i8;
                    let set = bytes[e % 32] >> (e / 32) & 1 != 0;
                    block.codes[e] = code - if set { 0 } else { 4 };
                }
                block.d = half_at(bytes, 108);
            }
            WeightType::Q4K | WeightType::Q5K => {
                (block.d, block.m) = (half_at(bytes, 0), half_at(bytes, 2));
                let scales = &bytes[4..16];
                for group in 0..8 {
                    let (scale, minimum) = if group < 4 {
                        (scales[group] & 63, scales[group + 4] & 63)
                    } else {
                        (
                            scales[group + 4] & 15 | scales[group - 4] >> 6 << 4,
                            scales[group + 4] >> 4 | scales[group] >> 6 << 4,
                        )
                    };
                    block.scales[group] = i32::from(scale);
                    block.minimums[group] = i32::from(minimum);
                }
                let fifth = kind == WeightType::Q5K;
                let codes = if fifth { 48 } else { 16 };
                for e in 0..256 {
                    let byte = bytes[codes + 32 * (e / 64) + e % 32];
                    let low = if e / 32 % 2 == 0 { byte & 15 } else { byte >> 4 };
                    let high = if fifth { bytes[16 + e % 32] >> (e / 32) & 1 } else { 0 };
                    block.codes[e] = (low | high << 4) as i8;
                }
            }
            WeightType::Q6K => {
                for e in 0..256 {
                    let (half, within) = (e / 128, e % 128);
                    let byte = bytes[64 * half + within % 64];
                    let low = if within < 64 { byte & 15 } else { byte >> 4 };
                    let high = bytes[128 + 32 * half + within % 32] >> (2 * (within / 32)) & 3;
                    block.codes[e] = (low | high << 4) as i8 - 32;
                }
                for group in 0..16 {
                    block.scales[group] = i32::from(bytes[192 + group] as i8);
                }
                block.d = half_at(bytes, 208);
            }
            // None of them has integer products: see `is_known`.
            _ => {}
        }
        block
    }
}

/// Whether the integer products are known for weights of this type.
pub fn is_known(kind: WeightType) -> bool {
    let plain = matches!(kind, WeightType::F32 | WeightType::F16 | WeightType::BF16);
    let scaled = kind.is_scaled() || kind == WeightType::E8m0;
    kind.is_of_kernels() && !(plain || scaled || kind == WeightType::Q8K)
}

/// A row of activations in 8 bits.
struct Rounded {
    codes: Vec<i8>,
    /// For each block of 32 (64 where a Q2_K weight is tiled).
    scales: Vec<f32>,
    /// For each block of 32 (16 where a Q2_K weight is tiled).
    sums: Vec<f32>,
}

/// Halves away from zero.
fn to_code(x: f32) -> i8 {
    x.round() as i8
}

/// As `quantize_q8_1`: scale and sum in f16.
fn round_for_vectors(row: &[f32]) -> Rounded {
    let mut rounded = Rounded { codes: Vec::new(), scales: Vec::new(), sums: Vec::new() };
    for block in row.chunks(BLOCK) {
        let most = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        // The compiler multiplies by the reciprocal of a constant.
        let scale = most * (1.0 / 127.0);
        let inverse = sfu::rcp_ftz(scale);
        rounded
            .codes
            .extend(block.iter().map(|x| if most == 0.0 { 0 } else { to_code(x * inverse) }));
        rounded.scales.push(to_half(scale));
        rounded.sums.push(to_half(tree(block)));
    }
    rounded
}

/// How a tile keeps scales and sums beside codes.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// A scale in f32 for each 32.
    Scale,
    /// A scale and a sum in f16 for each 32.
    ScaleAndSum,
    /// A scale for each 64, a sum for each 16, in f16.
    Sixteens,
}

fn layout(kind: WeightType) -> Layout {
    match kind {
        WeightType::Q4_0
        | WeightType::Q4_1
        | WeightType::Q5_1
        | WeightType::Q4K
        | WeightType::Q5K => Layout::ScaleAndSum,
        WeightType::Q2K => Layout::Sixteens,
        _ => Layout::Scale,
    }
}

/// As `quantize_mmq_q8_1`.
fn round_for_tiles(row: &[f32], layout: Layout) -> Rounded {
    let mut rounded = Rounded { codes: Vec::new(), scales: Vec::new(), sums: Vec::new() };
    let (per_scale, per_sum) = if layout == Layout::Sixteens { (64, 16) } else { (32, 32) };
    for block in row.chunks(per_scale) {
        let most = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        let inverse = 127.0 * sfu::rcp_ftz(most);
        rounded
            .codes
            .extend(block.iter().map(|x| if most == 0.0 { 0 } else { to_code(x * inverse) }));
        let scale = sfu::rcp_ftz(inverse);
        rounded.scales.push(if layout == Layout::Scale { scale } else { to_half(scale) });
    }
    if layout != Layout::Scale {
        for block in row.chunks(per_sum) {
            let mut lanes = [0.0f32; 8];
            for (lane, four) in lanes.iter_mut().zip(block.chunks(4)) {
                *lane = four.iter().copied().reduce(|a, b| a + b).unwrap_or(0.0);
            }
            rounded.sums.push(to_half(tree(&lanes[..per_sum / 4])));
        }
    }
    rounded
}

/// An exact sum of products of codes.
fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
}

fn sum(a: &[i8]) -> i32 {
    a.iter().map(|a| i32::from(*a)).sum()
}

/// Threads that share a block of a weight in MMVQ.
fn threads_of_block(kind: WeightType) -> usize {
    match kind {
        WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q5_0 | WeightType::Q5_1 => 2,
        WeightType::Q8_0 => 4,
        WeightType::Q6K => 32,
        _ => 16,
    }
}

/// The products of one group of 16 codes with those of an activation's block.
fn sixteen(block: &Block, group: usize, codes: &[i8]) -> i32 {
    let within = 16 * (group % 2);
    dot(&block.codes[16 * group..16 * group + 16], &codes[within..within + 16])
}

/// What thread `t` of a block adds to its sum.
fn vector_dot(
    kind: WeightType,
    block: &Block,
    x: &Rounded,
    first: usize,
    t: usize,
    sum_: f32,
) -> f32 {
    let codes = &x.codes[first..];
    let scale = |s: usize| x.scales[first / BLOCK + s];
    match kind {
        WeightType::Q8_0 => {
            let at = 8 * t..8 * t + 8;
            let product = dot(&block.codes[at.clone()], &codes[at]);
            (block.d * scale(0)).mul_add(product as f32, sum_)
        }
        WeightType::Q4_0 | WeightType::Q4_1 | WeightType::Q5_0 | WeightType::Q5_1 => {
            let (low, high) = (8 * t..8 * t + 8, 16 + 8 * t..24 + 8 * t);
            let product = dot(&block.codes[low.clone()], &codes[low])
                + dot(&block.codes[high.clone()], &codes[high]);
            let sum_of_block = x.sums[first / BLOCK];
            match kind {
                WeightType::Q4_0 | WeightType::Q5_0 => {
                    let half = if kind == WeightType::Q4_0 { 4.0 } else { 8.0 };
                    let centred = (product as f32).mul_add(scale(0), -(half * sum_of_block));
                    block.d.mul_add(centred, sum_)
                }
                _ => {
                    let (d, m) = (to_half(block.d * scale(0)), to_half(block.m * sum_of_block));
                    sum_ + (product as f32).mul_add(d, m / 2.0)
                }
            }
        }
        WeightType::Q4K | WeightType::Q5K => {
            let (mut of_codes, mut of_minimums) = (0.0f32, 0.0f32);
            for i in 0..2 {
                let s = 2 * (t / 4) + i;
                let (a, b) = (32 * s + 4 * (t % 4), 32 * s + 16 + 4 * (t % 4));
                let product = dot(&block.codes[a..a + 4], &codes[a..a + 4])
                    + dot(&block.codes[b..b + 4], &codes[b..b + 4]);
                let total = sum(&codes[a..a + 4]) + sum(&codes[b..b + 4]);
                of_codes = scale(s).mul_add((product * block.scales[s]) as f32, of_codes);
                of_minimums = scale(s).mul_add((total * block.minimums[s]) as f32, of_minimums);
            }
            sum_ + block.d.mul_add(of_codes, -(block.m * of_minimums))
        }
        WeightType::Q6K => {
            let mut of_codes = 0.0f32;
            for i in 0..2 {
                let s = 4 * (t / 16) + t % 16 / 8 + 2 * i;
                let a = 32 * s + 4 * (t % 8);
                let product = dot(&block.codes[a..a + 4], &codes[a..a + 4]);
                of_codes = scale(s).mul_add((product * block.scales[a / 16]) as f32, of_codes);
            }
            block.d.mul_add(of_codes, sum_)
        }
        _ => {
            let (mut of_codes, mut of_minimums) = (0.0f32, 0.0f32);
            for i in 0..4 {
                let s = 4 * (t / 8) + i;
                let a = 32 * s + 4 * (t % 8);
                let product = dot(&block.codes[a..a + 4], &codes[a..a + 4]);
                of_codes = scale(s).mul_add((product * block.scales[a / 16]) as f32, of_codes);
                let total = sum(&codes[a..a + 4]) * block.minimums[a / 16];
                of_minimums = scale(s).mul_add(total as f32, of_minimums);
            }
            if kind == WeightType::Q3K {
                block.d.mul_add(of_codes, sum_)
            } else {
                sum_ + block.d.mul_add(of_codes, -(block.m * of_minimums))
            }
        }
    }
}

/// One output of MMVQ.
fn vector_sum(kind: WeightType, row: &[Block], x: &Rounded, warps: usize) -> f32 {
    let width = kind.block_width();
    let sharing = threads_of_block(kind);
    let at_once = warps * 32 / sharing;
    let mut threads = vec![0.0f32; warps * 32];
    for (number, block) in row.iter().enumerate() {
        for t in 0..sharing {
            let thread = &mut threads[number % at_once * sharing + t];
            *thread = vector_dot(kind, block, x, number * width, t, *thread);
        }
    }
    let mut lanes = [0.0f32; 32];
    for (lane, total) in lanes.iter_mut().enumerate() {
        *total = threads[lane];
        for warp in 1..warps {
            *total += threads[32 * warp + lane];
        }
    }
    tree(&lanes)
}

/// Adds blocks `[from, to)` of 32 of a row to one chain, as a tile of MMQ does.
fn tile_chain(kind: WeightType, row: &[Block], x: &Rounded, from: usize, to: usize) -> f32 {
    let mut chain = 0.0f32;
    // Of a block's code the groups that it has.
    let per_block = kind.block_width() / BLOCK;
    let codes = |block: usize| &x.codes[32 * block..(32 * block + 32).min(x.codes.len())];
    match kind {
        WeightType::Q8_0 | WeightType::Q5_0 | WeightType::Q4_0 => {
            let centre = match kind {
                WeightType::Q4_0 => 8,
                WeightType::Q5_0 => 16,
                _ => 0,
            };
            for (at, block) in (from..to).zip(&row[from..to]) {
                let product = dot(&block.codes[..32], codes(at)) - centre * sum(codes(at));
                chain = (product as f32 * block.d).mul_add(x.scales[at], chain);
            }
        }
        WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4K | WeightType::Q5K => {
            for at in from..to {
                let (block, s) = (&row[at / per_block], at % per_block);
                let product = dot(&block.codes[32 * s..32 * s + 32], codes(at));
                let (d, m) = if per_block == 1 {
                    (block.d, block.m)
                } else {
                    (
                        to_half(block.d * block.scales[s] as f32),
                        to_half(-block.m * block.minimums[s] as f32),
                    )
                };
                chain = (d * x.scales[at]).mul_add(product as f32, chain);
                chain = m.mul_add(x.sums[at], chain);
            }
        }
        WeightType::Q6K => {
            for half in (from..to).step_by(4) {
                let mut part = 0.0f32;
                for at in half..half + 4 {
                    let (block, s) = (&row[at / per_block], at % per_block);
                    let product: i32 = (2 * s..2 * s + 2)
                        .map(|group| sixteen(block, group, codes(at)) * block.scales[group])
                        .sum();
                    part = (product as f32).mul_add(x.scales[at], part);
                }
                chain = part.mul_add(row[half / per_block].d, chain);
            }
        }
        WeightType::Q3K => {
            for at in from..to {
                let (block, s) = (&row[at / per_block], at % per_block);
                let [a, b] = [0, 1].map(|g| sixteen(block, 2 * s + g, codes(at)));
                let [of_a, of_b] = [0, 1].map(|g| block.d * block.scales[2 * s + g] as f32);
                let both = (a as f32).mul_add(of_a, b as f32 * of_b);
                chain = x.scales[at].mul_add(both, chain);
            }
        }
        _ => {
            // Q2_K: minimums meet sums of 16, but for the last 32 of each 128 the codes.
            for half in (from..to).step_by(4) {
                let scaled = |at: usize, g: usize| {
                    let (block, group) = (&row[at / per_block], 2 * (at % per_block) + g);
                    (
                        to_half(block.d * block.scales[group] as f32),
                        to_half(block.m * block.minimums[group] as f32),
                    )
                };
                for at in half..half + 4 {
                    let (block, s) = (&row[at / per_block], at % per_block);
                    let [a, b] = [0, 1].map(|g| sixteen(block, 2 * s + g, codes(at)) as f32);
                    let [(of_a, least_a), (of_b, least_b)] = [0, 1].map(|g| scaled(at, g));
                    let mut both = a.mul_add(of_a, b * of_b);
                    if at == half + 3 {
                        let [a, b] = [0, 1].map(|g| sum(&codes(at)[16 * g..16 * g + 16]) as f32);
                        both -= a.mul_add(least_a, b * least_b);
                    }
                    chain = both.mul_add(x.scales[at / 2], chain);
                }
                for at in half..half + 3 {
                    for g in 0..2 {
                        chain = (-scaled(at, g).1).mul_add(x.sums[2 * at + g], chain);
                    }
                }
            }
        }
    }
    chain
}

/// Where chains of a tile begin and end, in blocks of 32 of K: `tile` of `tiles`, whose work is
/// shared evenly among that many multiprocessors.
fn pieces(
    kind: WeightType,
    inner: usize,
    tile: usize,
    tiles: usize,
    processors: usize,
) -> Vec<usize> {
    let width = kind.block_width();
    let (blocks, step) = (inner / width, STEP / width);
    let mut cuts = vec![0];
    for processor in 0..=processors {
        let share = processor * tiles * blocks / processors;
        let share = share - share % blocks % step;
        if share > tile * blocks && share < (tile + 1) * blocks {
            cuts.push((share - tile * blocks) * width / BLOCK);
        }
    }
    cuts.push(inner / BLOCK);
    cuts.dedup();
    cuts
}

/// The rows of activations in a tile of MMQ, for that many in all.
fn tile_rows(rows: usize) -> usize {
    let (mut best, mut fewest) = (8, usize::MAX);
    for size in (8..=128).step_by(8) {
        let granularity = if size >= 48 { 16 } else { 8 };
        if fewest > 1 && size % granularity == 0 && rows.div_ceil(size) < fewest {
            (best, fewest) = (size, rows.div_ceil(size));
        }
    }
    best
}

/// `x[N, K] w[M, K]^T`, `w` as rows of blocks of that type.
///
/// # Panics
/// If [`is_known`] does not hold, or the width fills no whole blocks.
pub fn product(
    x: &Tensor,
    kind: WeightType,
    bytes: &[u8],
    outputs: usize,
    processors: usize,
) -> Tensor {
    let (rows, inner) = (x.rows(), x.width());
    let row_bytes = kind.row_bytes(inner);
    let vectors = rows <= VECTOR_ROWS;
    let layout = layout(kind);
    let rounded: Vec<Rounded> = (0..rows)
        .into_par_iter()
        .map(|row| match vectors {
            true => round_for_vectors(x.row(row)),
            false => round_for_tiles(x.row(row), layout),
        })
        .collect();
    let warps = if rows <= 4 { 4 } else { 2 };
    let tile_rows = tile_rows(rows);
    let tiles_of_rows = rows.div_ceil(tile_rows);
    let tiles = tiles_of_rows * outputs.div_ceil(TILE_OUTPUTS);
    let columns: Vec<Vec<f32>> = (0..outputs)
        .into_par_iter()
        .map(|output| {
            let row = &bytes[output * row_bytes..(output + 1) * row_bytes];
            let row: Vec<Block> =
                row.chunks(kind.block_bytes()).map(|bytes| Block::read(kind, bytes)).collect();
            let mut cuts = (usize::MAX, Vec::new());
            let one = |(number, x): (usize, &Rounded)| {
                if vectors {
                    return vector_sum(kind, &row, x, warps);
                }
                let tile = output / TILE_OUTPUTS * tiles_of_rows + number / tile_rows;
                if cuts.0 != tile {
                    cuts = (tile, pieces(kind, inner, tile, tiles, processors));
                }
                let mut chains: Vec<f32> = cuts
                    .1
                    .windows(2)
                    .map(|cut| tile_chain(kind, &row, x, cut[0], cut[1]))
                    .collect();
                let last = chains.pop().unwrap_or(0.0);
                if chains.is_empty() {
                    return last;
                }
                last + chains.iter().rev().fold(0.0, |sum, chain| sum + chain)
            };
            rounded.iter().enumerate().map(one).collect()
        })
        .collect();
    let mut y = Tensor::zeros(rows, outputs);
    for (output, column) in columns.iter().enumerate() {
        for (row, value) in column.iter().enumerate() {
            y.row_mut(row)[output] = *value;
        }
    }
    y
}
