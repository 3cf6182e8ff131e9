//! How the heads of attention and RoPE lie in a file: `[tokens, heads, width]` or
//! `[tokens, heads x width]`, with batches before, each of which is a sequence of its own.
//!
//! It knows shapes, not what is computed from them.

use super::operands::{JudgeError, Operand};
use crate::tensor::Tensor;

/// The layouts that are read, for an error.
pub const WANTED: &str = "read are [tokens, heads, head width] and [tokens, heads x head width], \
                          with batches before; what lies as [heads, tokens, head width] must be \
                          turned before it is saved: q.swapaxes(-3, -2)";

/// What is known of the heads before the shape is looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// How many.
    pub heads: Option<usize>,
    /// How wide each is.
    pub width: Option<usize>,
}

/// A tensor's sequences.
#[derive(Debug)]
pub struct Sequences {
    /// Each is `[tokens, heads * width]`.
    pub each: Vec<Tensor>,
    /// Heads.
    pub heads: usize,
    /// The width of a head.
    pub width: usize,
}

/// A shape as it is read.
#[derive(Debug, PartialEq, Eq)]
struct Reading {
    batches: usize,
    tokens: usize,
    heads: usize,
    width: usize,
}

impl Known {
    /// `[batches, tokens, heads, width]` of a shape, if it can be read so.
    fn read(self, shape: &[usize]) -> Option<Reading> {
        let apart = |batches: &[usize], [tokens, heads, width]: [usize; 3]| {
            let fits = self.heads.is_none_or(|known| known == heads)
                && self.width.is_none_or(|known| known == width);
            let batches = batches.iter().product();
            fits.then_some(Reading { batches, tokens, heads, width })
        };
        let joined = |batches: &[usize], [tokens, both]: [usize; 2]| {
            let (heads, width) = match (self.heads, self.width) {
                (Some(heads), _) => (heads, both.checked_div(heads)?),
                (None, Some(width)) => (both.checked_div(width)?, width),
                (None, None) => return None,
            };
            let fits = heads * width == both && self.width.is_none_or(|known| known == width);
            let batches = batches.iter().product();
            fits.then_some(Reading { batches, tokens, heads, width })
        };
        match *shape {
            [] => None,
            [both] => joined(&[], [1, both]),
            [tokens, both] => joined(&[], [tokens, both]),
            [first, tokens, last] => {
                apart(&[], [first, tokens, last]).or_else(|| joined(&[first], [tokens, last]))
            }
            [ref batches @ .., tokens, heads, width] => apart(batches, [tokens, heads, width]),
        }
    }
}

impl Sequences {
    /// Reads an operand.
    ///
    /// # Errors
    /// If its shape fits no layout, with those that are read.
    pub fn of(operand: &Operand, known: Known) -> Result<Sequences, JudgeError> {
        let Reading { batches, tokens, heads, width } =
            known.read(&operand.shape).ok_or_else(|| {
                let say = |what: &str, known: Option<usize>| {
                    known.map_or(String::new(), |known| format!(", {what} {known}"))
                };
                JudgeError::Usage(format!(
                    "{} has the shape {:?}{}{}: say by `--heads` and `--head-dim` how its heads lie; \
                     {WANTED}",
                    operand.name,
                    operand.shape,
                    say("heads", known.heads),
                    say("head width", known.width)
                ))
            })?;
        let values = operand.codes.values().into_data();
        let size = tokens * heads * width;
        let each = values.chunks_exact(size).map(|v| Tensor::new(heads * width, v.to_vec()));
        let each: Vec<Tensor> = each.collect();
        debug_assert_eq!(each.len(), batches);
        Ok(Sequences { each, heads, width })
    }

    /// The same in words: `192 tokens of 8 heads of 64`.
    pub fn in_words(&self) -> String {
        let tokens = self.each.first().map_or(0, Tensor::rows);
        let (heads, width) = (self.heads, self.width);
        let noun = if heads == 1 { "head" } else { "heads" };
        match self.each.len() {
            1 => format!("{tokens} tokens of {heads} {noun} of {width}"),
            many => format!("{many} sequences of {tokens} tokens of {heads} {noun} of {width}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_usual_layout_of_heads_is_read_and_a_batch_is_no_longer_sequence() {
        let read = |shape: &[usize], heads, width| {
            let known = Known { heads, width };
            known.read(shape).map(|r| [r.batches, r.tokens, r.heads, r.width])
        };
        assert_eq!(read(&[9, 8, 64], None, None), Some([1, 9, 8, 64]));
        assert_eq!(read(&[9, 512], Some(8), None), Some([1, 9, 8, 64]));
        assert_eq!(read(&[9, 512], None, Some(64)), Some([1, 9, 8, 64]));
        assert_eq!(read(&[9, 512], None, None), None);
        assert_eq!(read(&[2, 9, 8, 64], None, None), Some([2, 9, 8, 64]));
        assert_eq!(read(&[2, 3, 9, 8, 64], None, None), Some([6, 9, 8, 64]));
        assert_eq!(read(&[2, 9, 512], Some(8), None), Some([2, 9, 8, 64]));
        assert_eq!(read(&[2, 9, 512], Some(8), Some(64)), Some([2, 9, 8, 64]));
        assert_eq!(read(&[9, 8, 64], Some(8), None), Some([1, 9, 8, 64]));
        assert_eq!(read(&[9, 8, 64], None, Some(48)), None);
        assert_eq!(read(&[9, 512], Some(0), Some(0)), None);
    }
}
