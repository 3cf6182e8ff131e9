//! Integers of a few bits in words of 32: GPTQ, AWQ and compressed-tensors.
//!
//! A value is its code less the code of zero, times the scale of its group. The three differ in
//! where a code stands and in how zeros are written.

use std::ops::Range;

use super::scaled;
use crate::model::weights::WeightType;

/// Where codes, scales and zeros stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// compressed-tensors: a row's codes one after the other, `[rows, words]`; scales `[rows,
    /// groups]`, zeros `[words of rows, groups]`.
    Rows,
    /// GPTQ: an output's codes below one another, `[words, rows]`; scales `[groups, rows]`, zeros
    /// `[groups, words of rows]`, less this.
    Columns { less: u32 },
    /// AWQ: eight outputs in a word, `[width, words of rows]`; scales `[groups, rows]`, zeros
    /// `[groups, words of rows]`.
    Interleaved,
}

/// How a weight is packed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    pub bits: usize,
    pub order: Order,
    /// Rows and width of the weight.
    pub shape: [usize; 2],
    /// Values of a row that share a scale.
    pub group: usize,
    pub scales: WeightType,
    /// Whether one scale is that of the whole weight.
    pub one_scale: bool,
}

/// A packed weight in its file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed<'a> {
    pub packing: &'a Packing,
    pub codes: &'a [u8],
    pub scales: &'a [u8],
    /// None where the middle code is zero.
    pub zeros: Option<&'a [u8]>,
    /// The group of each value of a row, where they do not follow one another.
    pub groups: Option<&'a [u8]>,
}

/// Where AWQ keeps each of eight outputs: the bits of a word, in fours.
const NIBBLE_OF: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// Outputs that are gathered at a time: a line of the cache holds the words of as many.
const TILE: usize = 16;

/// A word of 32 bits, by its number.
fn word(bytes: &[u8], number: usize) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[4 * number + byte]))
}

/// Code `number` of a stream of codes, by its words.
fn field(bits: usize, number: usize, word: impl Fn(usize) -> u32) -> u32 {
    let (first, shift) = (number * bits / 32, number * bits % 32);
    let mut field = word(first) >> shift;
    if shift + bits > 32 {
        field |= word(first + 1) << (32 - shift);
    }
    field & ((1 << bits) - 1)
}

impl Packing {
    pub fn groups(&self) -> usize {
        self.shape[1].div_ceil(self.group)
    }

    /// Words that hold so many codes.
    pub fn words(&self, codes: usize) -> usize {
        (codes * self.bits).div_ceil(32)
    }
}

impl Packed<'_> {
    /// The scale of a group of a row.
    fn scale(&self, row: usize, group: usize) -> f32 {
        let Packing { shape: [rows, _], scales, one_scale, .. } = *self.packing;
        let place = match self.packing.order {
            _ if one_scale => 0,
            Order::Rows => row * self.packing.groups() + group,
            Order::Columns { .. } | Order::Interleaved => group * rows + row,
        };
        scaled::scale(scales, &self.scales[place * scaled::size_of(scales)..])
    }

    /// The code of zero of a group of a row.
    fn zero(&self, row: usize, group: usize) -> u32 {
        let Packing { bits, shape: [rows, _], .. } = *self.packing;
        let Some(zeros) = self.zeros else { return 1 << (bits - 1) };
        let groups = self.packing.groups();
        match self.packing.order {
            Order::Rows => field(bits, row, |number| word(zeros, number * groups + group)),
            Order::Columns { less } => {
                let words = self.packing.words(rows);
                field(bits, row, |number| word(zeros, group * words + number)) + less
            }
            Order::Interleaved => {
                let word = word(zeros, group * (rows / 8) + row / 8);
                word >> (4 * NIBBLE_OF[row % 8]) & 15
            }
        }
    }

    /// The codes of rows, which are at most [`TILE`], one row after the other.
    fn codes(&self, rows: Range<usize>, out: &mut Vec<u8>) {
        let Packing { bits, shape: [all, width], .. } = *self.packing;
        out.clear();
        match self.packing.order {
            Order::Rows => {
                let words = self.packing.words(width);
                for row in rows {
                    let bytes = &self.codes[4 * row * words..4 * (row + 1) * words];
                    unpack(bits, width, |number| word(bytes, number), out);
                }
            }
            Order::Columns { .. } => {
                let words = self.packing.words(width);
                let mut gathered = vec![0u32; rows.len() * words];
                for number in 0..words {
                    let line = &self.codes[4 * (number * all + rows.start)..];
                    for (place, gathered) in gathered.chunks_exact_mut(words).enumerate() {
                        gathered[number] = word(line, place);
                    }
                }
                for words in gathered.chunks_exact(words) {
                    unpack(bits, width, |number| words[number], out);
                }
            }
            Order::Interleaved => {
                out.resize(rows.len() * width, 0);
                for value in 0..width {
                    let line = &self.codes[4 * value * (all / 8)..];
                    for row in rows.clone() {
                        let code = word(line, row / 8) >> (4 * NIBBLE_OF[row % 8]) & 15;
                        out[(row - rows.start) * width + value] = code as u8;
                    }
                }
            }
        }
    }

    /// Decodes rows.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let Packing { shape: [_, width], group, .. } = *self.packing;
        let mut codes = Vec::with_capacity(TILE * width);
        let tiles = rows.clone().step_by(TILE).zip(out.chunks_mut(TILE * width));
        for (first, out) in tiles {
            let tile = first..rows.end.min(first + TILE);
            self.codes(tile.clone(), &mut codes);
            let lines = out.chunks_exact_mut(width).zip(codes.chunks_exact(width));
            for (row, (out, codes)) in tile.zip(lines) {
                let groups = 0..self.packing.groups();
                let of_group = |group| (self.zero(row, group) as f32, self.scale(row, group));
                let facts: Vec<(f32, f32)> = groups.map(of_group).collect();
                let value = |code: u8, (zero, scale): (f32, f32)| (f32::from(code) - zero) * scale;
                match self.groups {
                    None => {
                        let parts = out.chunks_mut(group).zip(codes.chunks(group));
                        for ((out, codes), fact) in parts.zip(facts) {
                            for (out, code) in out.iter_mut().zip(codes) {
                                *out = value(*code, fact);
                            }
                        }
                    }
                    Some(groups) => {
                        for (place, (out, code)) in out.iter_mut().zip(codes).enumerate() {
                            *out = value(*code, facts[word(groups, place) as usize]);
                        }
                    }
                }
            }
        }
    }

    /// The first group whose scale is no positive finite number: its row, its number, its scale.
    pub fn first_bad_scale(&self) -> Option<(usize, usize, f32)> {
        self.places().find_map(|(row, group)| {
            let scale = self.scale(row, group);
            (!(scale.is_finite() && scale > 0.0)).then_some((row, group, scale))
        })
    }

    /// The first group whose zero, as the older files of GPTQ write it, is beyond all codes.
    pub fn first_bad_zero(&self) -> Option<(usize, usize)> {
        let Order::Columns { less: 1 } = self.packing.order else { return None };
        self.places().find(|&(row, group)| self.zero(row, group) >> self.packing.bits != 0)
    }

    /// Where a value's group is none, and which it says.
    pub fn first_bad_group(&self) -> Option<(usize, i32)> {
        let groups = self.groups?;
        let all = (0..self.packing.shape[1]).map(|place| word(groups, place) as i32).enumerate();
        let known = 0..self.packing.groups() as i32;
        all.into_iter().find(|(_, group)| !known.contains(group))
    }

    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let ([rows, _], groups) = (self.packing.shape, self.packing.groups());
        let (rows, groups) = if self.packing.one_scale { (1, 1) } else { (rows, groups) };
        (0..rows).flat_map(move |row| (0..groups).map(move |group| (row, group)))
    }
}

/// The codes of a stream.
fn unpack(bits: usize, width: usize, word: impl Fn(usize) -> u32, out: &mut Vec<u8>) {
    if !32usize.is_multiple_of(bits) {
        out.extend((0..width).map(|place| field(bits, place, &word) as u8));
        return;
    }
    let (each, end) = (32 / bits, out.len() + width);
    let mask = (1u32 << bits) - 1;
    for number in 0..width.div_ceil(each) {
        let word = word(number);
        out.extend((0..each).map(|place| (word >> (place * bits) & mask) as u8));
    }
    out.truncate(end);
}
