//! The order in which a GPU adds up a row.
//!
//! It knows f32 values and threads: not what is summed, nor why.
//!
//! Sources: PyTorch's `aten/src/ATen/native/cuda/Reduce.cuh` (how many threads a row
//! gets, four accumulators a thread, shared memory, then shuffles) and CUB's
//! `BlockReduce` for vLLM. Evidence: means of squares of 10 numbers of rows by 14
//! widths from 64 to 8,192 on an H100, PyTorch 2.11: 0 of 5,098 differ; vLLM
//! 0.26 on an H100: 0 of 4,643,584 values of norms 256 to 3,584 wide, where the other orders
//! leave 1 to 10.

/// Threads of a warp.
const WARP: usize = 32;
/// Values that a PyTorch thread accumulates apart.
const APART: usize = 4;
/// Threads of a PyTorch reduction's block.
const BLOCK: usize = 512;

/// Who adds up a row, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSum {
    /// `torch.sum` or `mean` over the last dimension of a contiguous f32 tensor of
    /// so many rows: the number of rows decides how many threads share one.
    Torch {
        /// Rows of the whole tensor.
        rows: usize,
    },
    /// A block whose threads take vectors of `vector` values in turn, each value
    /// in order, then a warp shuffle downwards from 16, then the warps likewise.
    Block {
        /// Threads of the block, whole warps.
        threads: usize,
        /// Values of a vector.
        vector: usize,
    },
    /// CUB's `BlockReduce` over vectors of 8: neighbours of a warp meet first, and the warps
    /// are added one after the other.
    Cub {
        /// Threads that have values.
        threads: usize,
        /// Whether a thread adds a vector up by pairs before it adds the vector.
        pairs: bool,
    },
}

impl RowSum {
    /// The sum of the row's values.
    pub fn sum(self, row: &[f32]) -> f32 {
        match self {
            RowSum::Torch { rows } => torch_sum(row, rows),
            RowSum::Block { threads, vector } => {
                let mut lanes = vec![0.0f32; threads.next_multiple_of(WARP).max(WARP)];
                for (index, values) in row.chunks(vector.max(1)).enumerate() {
                    let lane = &mut lanes[index % threads.max(1)];
                    values.iter().for_each(|value| *lane += value);
                }
                warps(&lanes)
            }
            RowSum::Cub { threads, pairs } => {
                let mut lanes = vec![0.0f32; threads.next_multiple_of(WARP).max(WARP)];
                for (index, values) in row.chunks(8).enumerate() {
                    let lane = &mut lanes[index % threads.max(1)];
                    if pairs {
                        let pair = |pair: &[f32]| pair.iter().fold(0.0, |sum, value| sum + value);
                        *lane += values.chunks(2).fold(0.0, |sum, values| sum + pair(values));
                    } else {
                        values.iter().for_each(|value| *lane += value);
                    }
                }
                lanes.chunks(WARP).map(neighbours).fold(0.0, |sum, warp| sum + warp)
            }
        }
    }
}

/// The threads that PyTorch gives a row (x) and the rows or parts of one that
/// share a block (y).
fn block_shape(width: usize, rows: usize) -> (usize, usize) {
    let power = |count: usize| 1 << count.clamp(1, BLOCK).ilog2();
    let (width, rows) = (power(width), power(rows));
    let x = width.min(WARP);
    let y = rows.min(BLOCK / x);
    (width.min(BLOCK / y), y)
}

fn torch_sum(row: &[f32], rows: usize) -> f32 {
    let vectors = row.len() >= 128;
    let (x, y) = block_shape(if vectors { row.len() / APART } else { row.len() }, rows);
    // Long rows are shared out over the block's y as well.
    let across = row.len().div_ceil(x) >= (y * 16).min(256);
    let threads = if across { x * y } else { x };
    let mut lanes = vec![[0.0f32; APART]; threads];
    if vectors {
        let (whole, rest) = row.split_at(row.len() - row.len() % APART);
        for (index, values) in whole.chunks_exact(APART).enumerate() {
            let lane = &mut lanes[index % threads];
            lane.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, value)| lane[0] += value);
    } else {
        for (turn, values) in row.chunks(threads).enumerate() {
            lanes.iter_mut().zip(values).for_each(|(lane, value)| lane[turn % APART] += value);
        }
    }
    let sums: Vec<f32> = lanes
        .iter()
        .map(|&[first, second, third, fourth]| first + second + third + fourth)
        .collect();
    // First the threads of each row of x, then, where there are several, those rows.
    tree(&sums.chunks(x).map(tree).collect::<Vec<f32>>())
}

/// The sum over the threads of a block: each warp's by a [`tree`], then the warps' by one of 32.
pub fn warps(threads: &[f32]) -> f32 {
    let mut sums: Vec<f32> = threads.chunks(WARP).map(tree).collect();
    sums.resize(WARP, 0.0);
    if threads.len() > WARP { tree(&sums) } else { sums[0] }
}

/// Halves are folded until one number is left, the distant ones first: shared memory, then
/// shuffles downwards or across. Lanes up to the next power of two hold zeros.
pub fn tree(lanes: &[f32]) -> f32 {
    let mut sums = lanes.to_vec();
    sums.resize(sums.len().next_power_of_two(), 0.0);
    while sums.len() > 1 {
        let half = sums.len() / 2;
        for index in 0..half {
            sums[index] += sums[index + half];
        }
        sums.truncate(half);
    }
    sums[0]
}

/// Neighbours meet first: shuffles downwards by 1, 2, 4, 8 and 16.
fn neighbours(lanes: &[f32]) -> f32 {
    let mut sums = lanes.to_vec();
    while sums.len() > 1 {
        sums = sums.chunks(2).map(|pair| pair.iter().fold(0.0, |sum, value| sum + value)).collect();
    }
    sums[0]
}
