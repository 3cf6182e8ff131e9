//! Tensors from a seed, with the shapes of distribution that activations have.
//!
//! The numbers are a function of seed, distribution and place alone: they are
//! the same on every machine and for any number of rows before them. It knows
//! nothing of models.

use crate::op::{Distribution, Generated};
use crate::random::Random;
use crate::tensor::Tensor;

/// Every so many columns one is an outlier.
const OUTLIER_EVERY: usize = 64;
/// How much larger it is; field reports have channels of 50 to 100 times the rest.
const OUTLIER_GAIN: f64 = 60.0;

/// The tensor, `[rows, width]`. `place` tells an op's inputs apart: its queries
/// are not its keys.
pub fn generate(wanted: &Generated, place: usize, width: usize) -> Tensor {
    let mut random = Random::at(wanted.seed ^ (place as u64).wrapping_mul(0xd6e8_feb8_6659_fd93));
    random.bits();
    let values = (0..wanted.rows * width).map(|index| {
        let value = match wanted.generate {
            Distribution::Normal => random.normal(),
            // Student's t: a normal over the root of a mean of three squares.
            Distribution::HeavyTailed => {
                let top = random.normal();
                let squares: f64 = (0..3).map(|_| random.normal().powi(2)).sum();
                top / (squares / 3.0).sqrt()
            }
            Distribution::OutlierChannels => {
                let outlier = index % width % OUTLIER_EVERY == OUTLIER_EVERY / 2;
                random.normal() * if outlier { OUTLIER_GAIN } else { 1.0 }
            }
            Distribution::Sparse => {
                let (value, keep) = (random.normal(), random.unit() < 0.1);
                if keep { value } else { 0.0 }
            }
            Distribution::Subnormal => random.normal() * 2f64.powi(-130),
        };
        value as f32
    });
    Tensor::new(width, values.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(generate: Distribution, seed: u64) -> Tensor {
        super::generate(&Generated { generate, rows: 64, seed }, 0, 256)
    }

    #[test]
    fn each_distribution_is_what_its_name_says() {
        let share = |tensor: &Tensor, fits: fn(f32) -> bool| {
            tensor.data().iter().filter(|value| fits(**value)).count() as f64
                / tensor.data().len() as f64
        };
        let normal = made(Distribution::Normal, 1);
        let variance = normal.data().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 16384.0;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
        assert!((share(&normal, |v| v.abs() > 2.0) - 0.0455).abs() < 0.01);
        let heavy = made(Distribution::HeavyTailed, 1);
        assert!(share(&heavy, |v| v.abs() > 5.0) > 0.005, "P(|t3| > 5) is 0.015");
        let sparse = made(Distribution::Sparse, 1);
        assert!((share(&sparse, |v| v == 0.0) - 0.9).abs() < 0.02);
        let subnormal = made(Distribution::Subnormal, 1);
        assert!(share(&subnormal, f32::is_subnormal) > 0.99);
        let outliers = made(Distribution::OutlierChannels, 1);
        assert!(outliers.data().iter().skip(32).step_by(64).any(|value| value.abs() > 100.0));
        assert!(share(&outliers, |v| v.abs() > 10.0) < 0.02);
    }

    #[test]
    fn a_seed_gives_the_same_numbers_and_another_seed_others() {
        assert_eq!(made(Distribution::Normal, 7), made(Distribution::Normal, 7));
        assert_ne!(made(Distribution::Normal, 7), made(Distribution::Normal, 8));
    }
}
