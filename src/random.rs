//! The one generator of numbers: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
//!
//! A stream is named by whoever draws from it, so the same numbers come for any
//! number of threads and in any order of the streams.

/// A stream of numbers.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream that begins at a state.
    pub fn at(state: u64) -> Random {
        Random(state)
    }

    /// The stream that a context and some bytes name.
    pub fn named(context: &str, parts: &[&[u8]]) -> Random {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        for part in parts {
            hasher.update(part);
        }
        let hash = hasher.finalize();
        let first = hash.as_bytes().first_chunk().expect("a digest has 32 bytes");
        Random(u64::from_le_bytes(*first))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer below `bound`, which is small.
    pub fn below(&mut self, bound: usize) -> usize {
        (((self.bits() >> 32) * bound as u64) >> 32) as usize
    }

    /// Uniform in (0, 1).
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Uniform in (-1, 1).
    pub fn symmetric(&mut self) -> f32 {
        let bits = (self.bits() >> 40) as i32;
        (2 * bits + 1 - (1 << 24)) as f32 / (1 << 24) as f32
    }

    /// Box and Muller's transform, its first half. `libm` has the same bits everywhere.
    pub fn normal(&mut self) -> f64 {
        let (radius, angle) = (self.unit(), self.unit());
        (-2.0 * libm::log(radius)).sqrt() * libm::cos(2.0 * std::f64::consts::PI * angle)
    }

    /// Signs, +1 or -1, without end.
    pub fn signs(mut self) -> impl Iterator<Item = f32> {
        let words = std::iter::repeat_with(move || self.bits());
        words.flat_map(|word| (0..64).map(move |bit| if word >> bit & 1 == 0 { 1.0 } else { -1.0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_moments_of_their_distributions() {
        let count = 20_000;
        let mean = |draw: &mut dyn FnMut(&mut Random) -> f64| {
            let mut random = Random::at(7);
            (0..count).map(|_| draw(&mut random)).sum::<f64>() / f64::from(count)
        };
        assert!(mean(&mut |r| r.normal()).abs() < 0.03);
        assert!((mean(&mut |r| r.normal().powi(2)) - 1.0).abs() < 0.05);
        assert!((mean(&mut |r| r.unit()) - 0.5).abs() < 0.01);
        assert!((mean(&mut |r| f64::from(r.symmetric()).powi(2)) - 1.0 / 3.0).abs() < 0.02);
        let signs: f32 = Random::at(7).signs().take(20_000).sum();
        assert!(signs.abs() < 500.0);
    }
}
