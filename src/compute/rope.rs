//! The geometry of rotary position embedding, shared by all arms.
//!
//! The angles are made on the host in f64 for every arm: the reference uses
//! them as they are, the others round them to f32 tables. It rotates nothing.

use crate::model::{Rope, RopeLayout};

/// `sin` and `cos` of each pair's [`angle`] at `position`, times RoPE's magnitude.
pub fn angles(rope: &Rope, position: usize) -> Vec<(f64, f64)> {
    let of_pair = |pair| {
        let (sin, cos) = libm::sincos(angle(rope, pair, position));
        (sin * rope.magnitude, cos * rope.magnitude)
    };
    (0..rope.dimensions / 2).map(of_pair).collect()
}

/// By how many radians a pair turns at `position`:
/// `position / linear_scale * theta^(-2 pair / dimensions) / factor`.
///
/// Source: Su et al., RoFormer (arXiv 2104.09864); the factors are llama.cpp's
/// `rope_freqs.weight`.
pub fn angle(rope: &Rope, pair: usize, position: usize) -> f64 {
    let exponent = -2.0 * pair as f64 / rope.dimensions as f64;
    let factor = rope.factors.as_ref().map_or(1.0, |factors| f64::from(factors[pair]));
    let frequency = libm::pow(rope.theta, exponent) / factor / rope.linear_scale;
    position as f64 * frequency
}

/// The two elements of a head of `head_dim` that pair number `pair` rotates.
pub fn pair(rope: &Rope, head_dim: usize, pair: usize) -> (usize, usize) {
    let start = first(rope, head_dim);
    match rope.layout {
        RopeLayout::Interleaved => (start + 2 * pair, start + 2 * pair + 1),
        RopeLayout::Halves => (start + pair, start + pair + rope.dimensions / 2),
    }
}

/// The first element of a head that turns.
pub fn first(rope: &Rope, head_dim: usize) -> usize {
    if rope.at_end { head_dim.saturating_sub(rope.dimensions) } else { 0 }
}
