//! Random rows of quantized weights, written as blocks at once.
//!
//! Values are drawn in the block format's own codes instead of being drawn as
//! floats and quantized: that is some twenty times faster and gives the same kind
//! of rows. It knows formats and distributions, not what a tensor is for.

use half::{bf16, f16};

use crate::model::weights::WeightType;
use crate::random::Random;

/// What happens to outlier channels, which are columns of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Columns {
    /// Nothing.
    Even,
    /// Their weights are small.
    Damped,
    /// Their values are large.
    Amplified,
}

/// The stream of one row of one tensor.
pub(super) fn stream(seed: u64, tensor: &str, row: u64) -> Random {
    let parts: [&[u8]; 3] = [&seed.to_le_bytes(), &row.to_le_bytes(), tensor.as_bytes()];
    Random::named("runner 2026 synthetic model v1", &parts)
}

/// Relative sizes of a row's groups; their mean square is near 1. Groups of different
/// size make the row's distribution heavy-tailed.
const GROUP_SIZES: [f32; 16] =
    [0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0];
/// How far above the standard deviation an amplified channel lies at most.
const AMPLIFIED: f32 = 8.0;
/// Values in the largest group of any format.
const LARGEST_GROUP: usize = 32;

/// Writes rows of one matrix.
pub(super) struct RowWriter<'a> {
    kind: WeightType,
    columns: Columns,
    outliers: &'a [usize],
    /// A normal distribution's quantiles at 256 levels, largest 127.
    bell: [i8; 256],
    /// Standard deviation of `bell`, as a share of 127.
    deviation: f32,
}

/// Values of one group, as shares of `largest` in 127ths.
struct Group {
    largest: f32,
    shares: [i8; LARGEST_GROUP],
}

impl<'a> RowWriter<'a> {
    pub fn new(kind: WeightType, columns: Columns, outliers: &'a [usize]) -> RowWriter<'a> {
        let bell = bell();
        let squares: i32 = bell.iter().map(|&share| i32::from(share) * i32::from(share)).sum();
        let deviation = (squares as f32 / 256.0).sqrt() / 127.0;
        RowWriter { kind, columns, outliers, bell, deviation }
    }

    /// Fills a row of blocks with values of this standard deviation.
    pub fn write(&self, mut random: Random, deviation: f32, row: &mut [u8]) {
        let width = self.kind.block_width();
        if width == 1 {
            return self.write_plain(random, deviation, row);
        }
        for (n, block) in row.chunks_exact_mut(self.kind.block_bytes()).enumerate() {
            let mut group = |index: usize, size: usize| {
                self.group(&mut random, deviation, n * width + index * size, size)
            };
            match self.kind {
                WeightType::Q4K => write_q4_k(block, |index| group(index, 32)),
                WeightType::Q6K => write_q6_k(block, |index| group(index, 16)),
                WeightType::Q5_0 => write_q5_0(block, &group(0, 32)),
                WeightType::Q8_0 => write_q8_0(block, &group(0, 32)),
                other => unreachable!("no synthetic matrix is {other}"),
            }
        }
    }

    /// Fills a row of plain numbers: the groups' shares, and random digits below them.
    fn write_plain(&self, mut random: Random, deviation: f32, row: &mut [u8]) {
        let bytes = self.kind.block_bytes();
        for (n, row) in row.chunks_mut(LARGEST_GROUP * bytes).enumerate() {
            let first = n * LARGEST_GROUP;
            let group = self.group(&mut random, deviation, first, LARGEST_GROUP);
            for (bytes, share) in row.chunks_exact_mut(bytes).zip(group.shares) {
                let digits = f32::from(share) + 0.5 * random.symmetric();
                let value = digits * group.largest / 127.0;
                match self.kind {
                    WeightType::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                    WeightType::BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                    _ => bytes.copy_from_slice(&value.to_le_bytes()),
                }
            }
        }
    }

    fn group(&self, random: &mut Random, deviation: f32, first: usize, size: usize) -> Group {
        let largest = deviation / self.deviation * GROUP_SIZES[random.below(16)];
        let mut shares = [0; LARGEST_GROUP];
        for shares in shares[..size].as_chunks_mut::<8>().0 {
            for (share, byte) in shares.iter_mut().zip(random.bits().to_le_bytes()) {
                *share = self.bell[usize::from(byte)];
            }
        }
        let mut group = Group { largest, shares };
        if self.columns != Columns::Even {
            let inside = |channel: &&usize| (first..first + size).contains(*channel);
            for &channel in self.outliers.iter().filter(inside) {
                self.place_outlier(random, deviation, &mut group, channel - first);
            }
        }
        group
    }

    fn place_outlier(&self, random: &mut Random, deviation: f32, group: &mut Group, at: usize) {
        match self.columns {
            Columns::Even => {}
            Columns::Damped => group.shares[at] /= 16,
            Columns::Amplified => {
                // The block's scale follows the outlier, and its neighbours lose
                // resolution, as they do when a real embedding is quantized.
                let neighbours = (AMPLIFIED * self.deviation) as i8;
                group.largest = AMPLIFIED * deviation;
                group.shares.iter_mut().for_each(|share| *share /= neighbours);
                let size = 96 + random.below(32) as i8;
                let mostly_one_sign = random.below(4) != 0;
                group.shares[at] = if mostly_one_sign { size } else { -size };
            }
        }
    }
}

/// Quantiles of the sum of four dice of 64 faces, which is nearly normal, in integers.
fn bell() -> [i8; 256] {
    const FACES: usize = 64;
    let mut ways = vec![1_u64];
    for _ in 0..4 {
        let mut more = vec![0; ways.len() + FACES - 1];
        for (sum, count) in ways.iter().enumerate() {
            more[sum..sum + FACES].iter_mut().for_each(|ways| *ways += count);
        }
        ways = more;
    }
    // 64^4 ways in 256 levels of 65,536: the sum in the middle of each level.
    let middle = |level: u64| level * 65_536 + 32_768;
    let mut sums = [0_i32; 256];
    let (mut sum, mut below) = (0, ways[0]);
    for (level, slot) in sums.iter_mut().enumerate() {
        while below <= middle(level as u64) {
            sum += 1;
            below += ways[sum];
        }
        *slot = 2 * sum as i32 - (ways.len() as i32 - 1);
    }
    let largest = sums[255].max(-sums[0]);
    sums.map(|sum| (sum * 127 / largest) as i8)
}

fn put_f16(bytes: &mut [u8], value: f32) -> f32 {
    let value = f16::from_f32(value);
    bytes.copy_from_slice(&value.to_le_bytes());
    value.to_f32()
}

/// The nearest of `levels` steps on either side of zero.
fn code(share: i8, levels: i32) -> i32 {
    let doubled = 2 * i32::from(share) * levels;
    (doubled + if doubled < 0 { -127 } else { 127 }) / 254
}

fn write_q8_0(block: &mut [u8], group: &Group) {
    let (scale, codes) = block.split_at_mut(2);
    put_f16(scale, group.largest / 127.0);
    for (code, share) in codes.iter_mut().zip(group.shares) {
        *code = share.to_le_bytes()[0];
    }
}

fn write_q5_0(block: &mut [u8], group: &Group) {
    put_f16(&mut block[..2], group.largest / 15.0);
    let codes = group.shares.map(|share| (code(share, 15) + 16) as u32);
    let high = codes.iter().enumerate().fold(0_u32, |high, (n, code)| high | (code >> 4) << n);
    block[2..6].copy_from_slice(&high.to_le_bytes());
    for (n, byte) in block[6..].iter_mut().enumerate() {
        *byte = (codes[n] & 15 | (codes[n + 16] & 15) << 4) as u8;
    }
}

/// `value = d * scale * code - dmin * minimum` with `dmin = 7.5 d` and
/// `minimum = scale`, so that codes 0 to 15 lie evenly around zero.
fn write_q4_k(block: &mut [u8], mut group: impl FnMut(usize) -> Group) {
    let groups: [Group; 8] = std::array::from_fn(&mut group);
    let largest = groups.iter().fold(0.0, |largest: f32, group| largest.max(group.largest));
    let d = put_f16(&mut block[..2], largest / (7.5 * 63.0));
    put_f16(&mut block[2..4], 7.5 * d);
    let scale = |group: &Group| ((group.largest / (7.5 * d) + 0.5) as u8).clamp(1, 63);
    let scales: [u8; 8] = std::array::from_fn(|n| scale(&groups[n]));
    for n in 0..4 {
        let (low, high) = (scales[n], scales[n + 4]);
        block[4 + n] = low | (high >> 4) << 6;
        block[8 + n] = low | (high >> 4) << 6;
        block[12 + n] = high & 15 | (high & 15) << 4;
    }
    // (share + 127) * 15 / 254, rounded.
    let code = |share: i8| ((2 * (i32::from(share) + 127) * 15 + 254) / 508) as u8;
    for (pair, codes) in groups.as_chunks::<2>().0.iter().zip(block[16..].chunks_exact_mut(32)) {
        for (n, byte) in codes.iter_mut().enumerate() {
            *byte = code(pair[0].shares[n]) | code(pair[1].shares[n]) << 4;
        }
    }
}

/// `value = d * scale * (code - 32)`.
fn write_q6_k(block: &mut [u8], mut group: impl FnMut(usize) -> Group) {
    let groups: [Group; 16] = std::array::from_fn(&mut group);
    let largest = groups.iter().fold(0.0, |largest: f32, group| largest.max(group.largest));
    let d = put_f16(&mut block[208..], largest / (31.0 * 127.0));
    let (low, rest) = block.split_at_mut(128);
    let (high, scales) = rest.split_at_mut(64);
    for (scale, group) in scales.iter_mut().zip(&groups) {
        *scale = ((group.largest / (31.0 * d) + 0.5) as u8).clamp(1, 127);
    }
    for half in 0..2 {
        let share = |index: usize| {
            let index = 128 * half + index;
            (code(groups[index / 16].shares[index % 16], 31) + 32) as u8
        };
        for n in 0..32 {
            let (a, b, c, d) = (share(n), share(n + 32), share(n + 64), share(n + 96));
            low[64 * half + n] = a & 15 | (c & 15) << 4;
            low[64 * half + n + 32] = b & 15 | (d & 15) << 4;
            high[32 * half + n] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
        }
    }
}
