//! Fused attention to the bit: FlashAttention 2 and 3, and cuDNN's kernel.
//!
//! It knows queries, keys and values with their heads side by side, `[tokens,
//! heads * head_dim]`, and a plan of tiles: no caches, no models.
//!
//! All take a tile of queries through blocks of keys: `S = q k^T` on tensor cores
//! from zero; the running maximum `m` of a row; `P = ex2(S c - m c)` with `c = scale
//! log2 e`; where a block raises the maximum, the output and the row sum are
//! multiplied by a power of two of the difference; `O += P v` on tensor cores, P
//! rounded to the operands' format. Four threads share a row: thread `t` adds up
//! columns `2t` and `2t + 1` of every 8.
//!
//! | | FlashAttention 2 in PyTorch | FlashAttention 3 | cuDNN |
//! | --- | --- | --- | --- |
//! | blocks of keys | last to first | last to first | first to last |
//! | `S c - m c` | two operations | one | two |
//! | rescaling | `ex2((m' - m) c)` | the same | `ex2(m' c - m c)`, rounded products |
//! | a thread's sum | goes on, the first addition fused | the same | of the block, then fused |
//! | the four sums | 0 + 2, 1 + 3, both | the same | 0 + 1, 2 + 3, both |
//! | `O / sum` | IEEE reciprocal | `rcp.approx` | `rcp.approx` |
//!
//! FlashAttention 2 splits the keys over blocks of threads where few tiles would
//! leave the chip idle; each part has its logarithm of the sum of exponentials, and
//! parts are added in f32 with their weights, in order.
//!
//! Sources: Dao-AILab's `softmax.h`, `flash_fwd_kernel.h` and PyTorch's
//! `flash_api.cpp` with its `UNFUSE_FMA`; cuDNN from captures alone. Evidence, none
//! differing: PyTorch's FlashAttention 2 on an H200 (203,776 outputs, 179,200 of them
//! in 2 parts) and at 41 more shapes in bf16 and f16 on an H100 (heads of 32 to 256
//! values, up to 1,300 tokens, up to 8 parts as [`Plan::flash2`] foretells); cuDNN
//! on the same H200 captures and in two transformers models, and at 25 shapes on the
//! H100; FlashAttention 3 in vLLM on an H200 at 8 tokens and on an H100 at 33 to 300 with 7
//! decoded ones (heads of 64 and 128 values), and in the fa3-fwd package at 32. FlashAttention
//! 3 over split keys: 0 of 538,208 outputs of vLLM 0.26's build at 245 shapes (192 of them split, into up to
//! 45 parts) and 0 of 211,104 of fa3-fwd 0.0.3 at 60 shapes (41 split, up to 38 parts), heads of 32 to 256
//! values, on an H200; the number of parts was right at 377 of 377 shapes. Its parts follow from
//! vLLM's and Dao-AILab's `heuristics.h`, `tile_size.h`, `flash_prepare_scheduler.cu`, `block.h`,
//! their sum from `flash_fwd_combine_kernel.h`. cuDNN
//! at one query and 1,000 keys of 128 values splits the keys, which is not worked
//! out; nor is the memory-efficient kernel.

use rayon::prelude::*;

use super::attention::{Heads, head_of, transposed};
use super::cuda_math;
use super::linear::codes;
use super::row_sum;
use super::sfu;
use crate::compute::emulated::chain::{Chain, Stretch};
use crate::compute::emulated::chip::Unit;
use crate::compute::emulated::quantize::{Codes, quantize_row};
use crate::dtype::Format;
use crate::tensor::Tensor;

/// Threads that share a row of a tile.
const THREADS: usize = 4;

/// How the work is cut, and where two operations are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Queries of a tile.
    pub queries: usize,
    /// Keys of a block.
    pub keys: usize,
    /// Parts over which the blocks of keys are dealt; 1 is no split.
    pub parts: usize,
    /// Query heads of one key head that share a tile: a query's rows of these heads lie
    /// together. It matters where keys are split.
    pub packed: usize,
    /// Whose kernel.
    pub kernel: FlashKernel,
}

/// How FlashAttention 3 is given its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flash3Call {
    /// Side by side, as many for each sequence: the package's plain function.
    Contiguous,
    /// In pages of a cache, of sequences of their own lengths: vLLM's build and call.
    Paged,
}

/// Whose kernel of fused attention; the file's head has the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlashKernel {
    /// FlashAttention 2 as PyTorch compiles it.
    Flash2,
    /// FlashAttention 3.
    Flash3,
    /// cuDNN, as PyTorch's `sdpa` calls it on Hopper.
    Cudnn,
}

impl Plan {
    /// What FlashAttention 3 chooses on a Hopper chip of so many multiprocessors, for
    /// so many queries and keys of each of `batch` sequences.
    ///
    /// With one query a causal call is none, but for a cache in pages with heads of 65 to 128
    /// values.
    pub fn flash3(
        call: Flash3Call,
        heads: &Heads,
        [batch, queries, keys]: [usize; 3],
        processors: usize,
    ) -> Plan {
        let packed = (heads.heads / heads.kv_heads.max(1)).max(1);
        let paged = call == Flash3Call::Paged;
        let width = heads.head_dim;
        let causal = queries > 1 || (paged && (65..=128).contains(&width));
        // Few rows take one group of warps, where vLLM has compiled that.
        let one_group = paged && matches!(width, 64 | 128) && queries * packed <= 64;
        let (rows, block) = match width {
            0..=64 if one_group => (64, 192),
            0..=64 if causal => (192, 128),
            0..=64 if paged => (192, 160),
            0..=64 => (192, 192),
            65..=96 => (192, if paged { 128 } else { 144 }),
            97..=128 if one_group => (64, 128),
            97..=128 => (128, if causal || paged { 128 } else { 176 }),
            129..=192 => (128, if paged { 96 } else { 112 }),
            _ => (128, 80),
        };
        let (tiles, blocks) = ((queries * packed).div_ceil(rows), keys.div_ceil(block));
        // Of sequences of unknown lengths the first count is that of one.
        let together = if paged { 1 } else { batch };
        let most = if blocks <= 4 { 1 } else { processors.min(blocks) };
        let parts = parts(together * heads.kv_heads * tiles, processors, most, |_| true);
        let parts = match call {
            Flash3Call::Paged if parts > 1 => {
                // A tenth more than what each multiprocessor gets of all blocks.
                let all = (batch * tiles * blocks) as f32 * 1.1 * heads.kv_heads as f32;
                let each = (all / processors as f32).ceil() as usize;
                blocks.div_ceil(each.max(1)).clamp(1, parts)
            }
            _ => parts,
        };
        // One part is the same whichever rows share a tile.
        let (packed, queries) = if parts > 1 { (packed, rows) } else { (1, 128) };
        Plan { queries, keys: block, parts, packed, kernel: FlashKernel::Flash3 }
    }

    /// cuDNN on Hopper for heads of up to 128 values: what `sdpa` of transformers
    /// takes there.
    pub const CUDNN: Plan =
        Plan { queries: 128, keys: 128, parts: 1, packed: 1, kernel: FlashKernel::Cudnn };

    /// What PyTorch's FlashAttention 2 chooses on a chip of so many
    /// multiprocessors, for the heads of one sequence, or of all of a batch, without dropout.
    pub fn flash2(
        heads: usize,
        head_dim: usize,
        queries: usize,
        keys: usize,
        processors: usize,
    ) -> Plan {
        let split_keys = match head_dim {
            0..=64 => 256,
            65..=128 => 128,
            _ => 64,
        };
        let blocks = keys.div_ceil(split_keys);
        // Parts of as many blocks as one part less leaves are of no use.
        let useful =
            |parts: usize| parts == 1 || blocks.div_ceil(parts) != blocks.div_ceil(parts - 1);
        // 128 threads a block: two blocks count for one multiprocessor.
        let slots = 2 * processors;
        let parts = parts(heads * queries.div_ceil(64), slots, slots.min(blocks), useful);
        let kernel = FlashKernel::Flash2;
        if parts > 1 {
            return Plan { queries: 64, keys: split_keys, parts, packed: 1, kernel };
        }
        let keys = if head_dim <= 64 { 128 } else { 64 };
        Plan { queries: 128, keys, parts: 1, packed: 1, kernel }
    }
}

/// FlashAttention's heuristic: the fewest parts, of at most `most`, that fill the chip to 85 %
/// of the best that any useful number of parts does.
fn parts(tiles: usize, slots: usize, most: usize, useful: impl Fn(usize) -> bool) -> usize {
    if tiles as f32 >= 0.8 * slots as f32 {
        return 1;
    }
    let efficiency = |parts: usize| {
        let waves = (tiles * parts) as f32 / slots as f32;
        waves / waves.ceil()
    };
    let tried = || (1..=most.min(128)).filter(|&parts| useful(parts));
    let best = tried().map(efficiency).fold(0.0, f32::max);
    tried().find(|&parts| efficiency(parts) >= 0.85 * best).unwrap_or(1)
}

/// The output of a FlashAttention, `[queries, heads * head_dim]`.
pub fn flash(
    unit: &Unit,
    format: Format,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: &Heads,
    plan: &Plan,
) -> Tensor {
    let width = heads.head_dim;
    let chain = Chain::new(unit, format);
    let operands: Vec<(Codes, Codes)> = (0..heads.kv_heads)
        .into_par_iter()
        .map(|head| {
            let k = codes(format, &head_of(k, head, width));
            (k, codes(format, &transposed(&head_of(v, head, width))))
        })
        .collect();
    let packed = plan.packed;
    let rows = q.rows() * packed;
    // The first head of those that share tiles, and the tile's first row.
    let tiles: Vec<(usize, usize)> = (0..heads.heads)
        .step_by(packed)
        .flat_map(|head| (0..rows).step_by(plan.queries).map(move |first| (head, first)))
        .collect();
    // Where a row stands in `q`: its query, and the first of its head's columns.
    let place = |head: usize, row: usize| (row / packed, (head + row % packed) * width);
    let computed: Vec<Vec<f32>> = tiles
        .par_iter()
        .map(|&(head, first)| {
            let last = (first + plan.queries).min(rows);
            let rows = (first..last).flat_map(|row| {
                let (query, column) = place(head, row);
                &q.row(query)[column..column + width]
            });
            let q_tile = codes(format, &Tensor::new(width, rows.copied().collect()));
            let (k, v) = &operands[heads.kv_head(head)];
            let tile =
                Tile { chain, format, q: &q_tile, k, v, heads, plan, first, queries: q.rows() };
            tile.output()
        })
        .collect();
    let mut y = Tensor::zeros(q.rows(), heads.heads * width);
    for (&(head, first), output) in tiles.iter().zip(&computed) {
        for (row, values) in output.chunks_exact(width).enumerate() {
            let (query, column) = place(head, first + row);
            y.row_mut(query)[column..column + width].copy_from_slice(values);
        }
    }
    y
}

/// A tile of queries of one head, or of the heads that share it.
struct Tile<'a> {
    chain: Chain,
    format: Format,
    /// Queries of the tile, `[queries, head_dim]`.
    q: &'a Codes,
    /// Keys of the head, `[keys, head_dim]`.
    k: &'a Codes,
    /// Values of the head, `[head_dim, keys]`.
    v: &'a Codes,
    heads: &'a Heads,
    plan: &'a Plan,
    /// The first row of the tile among all.
    first: usize,
    /// Queries in all.
    queries: usize,
}

/// What a part of the keys leaves of a tile.
struct Part {
    /// Unscaled outputs, `[queries, head_dim]`.
    output: Vec<f32>,
    /// Maxima of the scores.
    maxima: Vec<f32>,
    /// Sums of exponentials, one for each thread of a row.
    sums: Vec<[f32; THREADS]>,
}

impl Tile<'_> {
    fn output(&self) -> Vec<f32> {
        let keys = self.k.rows();
        // The tile's last row, whether or not a query stands there, says which blocks it visits.
        let visited = self.seen(self.plan.queries - 1).div_ceil(self.plan.keys);
        let dealt = match self.plan.kernel {
            FlashKernel::Flash3 => visited,
            FlashKernel::Flash2 | FlashKernel::Cudnn => keys.div_ceil(self.plan.keys),
        };
        let a_part = dealt.div_ceil(self.plan.parts);
        let parts: Vec<Part> = (0..self.plan.parts)
            .map(|part| (part * a_part).min(visited)..((part + 1) * a_part).min(visited))
            .map(|blocks| self.part(blocks))
            .collect();
        let width = self.heads.head_dim;
        let mut output = vec![0.0; self.q.rows() * width];
        for (row, output) in output.chunks_exact_mut(width).enumerate() {
            self.finish(&parts, row, output);
        }
        output
    }

    /// The keys that a row of the tile sees.
    fn seen(&self, row: usize) -> usize {
        self.heads.seen((self.first + row) / self.plan.packed, self.queries, self.k.rows())
    }

    /// The blocks of keys, in the kernel's order.
    fn part(&self, blocks: std::ops::Range<usize>) -> Part {
        let (rows, width) = (self.q.rows(), self.heads.head_dim);
        let mut part = Part {
            output: vec![0.0; rows * width],
            maxima: vec![f32::NEG_INFINITY; rows],
            sums: vec![[0.0; THREADS]; rows],
        };
        let q = self.chain.prepare(Stretch { codes: self.q, rows: 0..rows, inner: 0..width });
        let mut scores = Vec::new();
        let blocks: Vec<usize> = match self.plan.kernel {
            FlashKernel::Cudnn => blocks.collect(),
            FlashKernel::Flash2 | FlashKernel::Flash3 => blocks.rev().collect(),
        };
        for (turn, block) in blocks.into_iter().enumerate() {
            let first = block * self.plan.keys;
            let count = self.plan.keys.min(self.k.rows() - first);
            scores.clear();
            scores.resize(rows * count, 0.0);
            let k = Stretch { codes: self.k, rows: first..first + count, inner: 0..width };
            self.chain.accumulate(&q, &k, &mut scores);
            for (row, scores) in scores.chunks_exact_mut(count).enumerate() {
                let seen = self.seen(row).saturating_sub(first).min(count);
                let scale = self.weigh(scores, seen, turn == 0, row, &mut part);
                if turn > 0 {
                    let output = &mut part.output[row * width..(row + 1) * width];
                    output.iter_mut().for_each(|output| *output *= scale);
                }
            }
            let mut p = Codes::zeros(self.format, rows, count);
            for (scores, mut p) in scores.chunks_exact(count).zip(p.rows_mut()) {
                quantize_row(self.format, scores, 1.0, &mut p);
            }
            let p = self.chain.prepare(Stretch { codes: &p, rows: 0..rows, inner: 0..count });
            let v = Stretch { codes: self.v, rows: 0..width, inner: first..first + count };
            self.chain.accumulate(&p, &v, &mut part.output);
        }
        part
    }

    /// Scores become exponentials; maximum and sums go on. Returns what the output
    /// is to be multiplied by.
    fn weigh(
        &self,
        scores: &mut [f32],
        seen: usize,
        starts: bool,
        row: usize,
        part: &mut Part,
    ) -> f32 {
        let c = self.factor();
        let before = part.maxima[row];
        let (seen, masked) = scores.split_at_mut(seen);
        masked.fill(0.0);
        let largest = seen.iter().copied().fold(before, |a, b| if b > a { b } else { a });
        part.maxima[row] = largest;
        let largest = if largest == f32::NEG_INFINITY { 0.0 } else { largest };
        let shift = largest * c;
        for score in seen {
            *score = match self.plan.kernel {
                FlashKernel::Flash3 => sfu::ex2_ftz(score.mul_add(c, -shift)),
                FlashKernel::Flash2 | FlashKernel::Cudnn => sfu::ex2(*score * c - shift),
            };
        }
        let scale = match self.plan.kernel {
            _ if starts => 1.0,
            FlashKernel::Cudnn => sfu::ex2(before * c - shift),
            FlashKernel::Flash2 | FlashKernel::Flash3 => sfu::ex2((before - largest) * c),
        };
        let sums = &mut part.sums[row];
        if self.plan.kernel == FlashKernel::Cudnn {
            let mut block = [0.0f32; THREADS];
            for (index, &p) in scores.iter().enumerate() {
                block[index / 2 % THREADS] += p;
            }
            for (sum, block) in sums.iter_mut().zip(block) {
                *sum = if starts { block } else { sum.mul_add(scale, block) };
            }
            return scale;
        }
        for (index, &p) in scores.iter().enumerate() {
            let sum = &mut sums[index / 2 % THREADS];
            *sum = match (index / 2 < THREADS && index % 2 == 0, starts) {
                (true, true) => p,
                (true, false) => sum.mul_add(scale, p),
                (false, _) => *sum + p,
            };
        }
        // A thread whose columns the block does not have adds zeros.
        for sum in sums.iter_mut().skip(scores.len().div_ceil(2)) {
            *sum *= scale;
        }
        scale
    }

    /// `scale log2 e`, multiplied in f64 and rounded.
    fn factor(&self) -> f32 {
        (f64::from(self.heads.scale) * std::f64::consts::LOG2_E) as f32
    }

    /// A row's output of its parts, rounded to the format.
    fn finish(&self, parts: &[Part], row: usize, output: &mut [f32]) {
        let width = output.len();
        let sums: Vec<f32> = parts
            .iter()
            .map(|part| {
                let [a, b, c, d] = part.sums[row];
                match self.plan.kernel {
                    FlashKernel::Cudnn => (a + b) + (c + d),
                    FlashKernel::Flash2 | FlashKernel::Flash3 => (a + c) + (b + d),
                }
            })
            .collect();
        // The reciprocal of no sum is 1, so that a row without a key is 0.
        let inverse = |sum: f32| match self.plan.kernel {
            _ if sum == 0.0 || sum.is_nan() => 1.0,
            FlashKernel::Cudnn | FlashKernel::Flash3 => sfu::rcp_ftz(sum),
            FlashKernel::Flash2 => 1.0 / sum,
        };
        let values = |part: usize| &parts[part].output[row * width..(row + 1) * width];
        if let [sum] = sums[..] {
            for (output, value) in output.iter_mut().zip(values(0)) {
                *output = self.format.round(value * inverse(sum));
            }
            return;
        }
        let weights = match self.plan.kernel {
            FlashKernel::Flash3 => self.weights_of_flash3(parts, &sums, row),
            FlashKernel::Flash2 | FlashKernel::Cudnn => self.weights_of_flash2(parts, &sums, row),
        };
        for (part, weight) in weights.into_iter().enumerate() {
            for (output, value) in output.iter_mut().zip(values(part)) {
                *output = weight.mul_add(value * inverse(sums[part]), *output);
            }
        }
        output.iter_mut().for_each(|output| *output = self.format.round(*output));
    }

    /// What the parts of a row count for.
    fn weights_of_flash2(&self, parts: &[Part], sums: &[f32], row: usize) -> Vec<f32> {
        let logarithms: Vec<f32> = sums
            .iter()
            .zip(parts)
            .map(|(&sum, part)| match sum {
                0.0 => f32::NEG_INFINITY,
                _ => part.maxima[row].mul_add(self.heads.scale, cuda_math::log_fast(sum)),
            })
            .collect();
        let largest = largest_of(&logarithms);
        let shares: Vec<f32> = logarithms.iter().map(|x| cuda_math::exp(x - largest)).collect();
        let sum = row_sum::tree(&shares);
        let logarithm =
            if sum == 0.0 || sum.is_nan() { f32::INFINITY } else { cuda_math::log(sum) + largest };
        logarithms.into_iter().map(|own| cuda_math::exp(own - logarithm)).collect()
    }

    /// What the parts of a row count for, with fast math.
    fn weights_of_flash3(&self, parts: &[Part], sums: &[f32], row: usize) -> Vec<f32> {
        let scale = self.factor() * std::f32::consts::LN_2;
        let logarithms: Vec<f32> = sums
            .iter()
            .zip(parts)
            .map(|(&sum, part)| match sum {
                0.0 => f32::NEG_INFINITY,
                _ => part.maxima[row].mul_add(scale, cuda_math::log_fast(sum)),
            })
            .collect();
        let largest = largest_of(&logarithms);
        let shares: Vec<f32> =
            logarithms.iter().map(|x| cuda_math::exp_fast(x - largest)).collect();
        // So many threads share a row's parts; each adds up its own first.
        let threads = if self.heads.head_dim <= 64 { 16 } else { 32 };
        let mut lanes = vec![0.0f32; threads];
        for (part, share) in shares.iter().enumerate() {
            lanes[part % threads] += share;
        }
        let sum = row_sum::tree(&lanes);
        let inverse = if sum == 0.0 || sum.is_nan() { 0.0 } else { sfu::rcp_ftz(sum) };
        shares.into_iter().map(|share| share * inverse).collect()
    }
}

/// The largest, or 0 where none is a number.
fn largest_of(logarithms: &[f32]) -> f32 {
    let largest = logarithms.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY { 0.0 } else { largest }
}
