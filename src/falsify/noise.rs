//! What a foreign engine does to its values besides a planted bug: other roundings, another
//! order of additions. A bug must be found and named all the same.
//!
//! It knows no bug.

use std::num::NonZeroU32;

use clap::ValueEnum;
use serde::Serialize;

use crate::dtype::Format;
use crate::op::{Pin, Recipe, Site};
use crate::random::Random;
use crate::tensor::Tensor;

/// What every op of the arm that carries a bug does to its values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Noise {
    /// Nothing.
    #[default]
    None,
    /// Every other value is one unit of the last place of f32 off, to either side.
    Ulp,
    /// Every value is off by up to an eighth of a step of bf16 and then rounded to bf16.
    Bf16,
    /// Every product is summed in three parts.
    Order,
}

impl Noise {
    /// The name that tables use.
    pub fn in_words(self) -> &'static str {
        match self {
            Noise::None => "without noise",
            Noise::Ulp => "every other value one ULP off",
            Noise::Bf16 => "every value rounded to bf16",
            Noise::Order => "sums in another order",
        }
    }

    /// The type of the arm's stream.
    pub fn stream(self) -> Option<Format> {
        match self {
            Noise::None => None,
            Noise::Ulp | Noise::Order => Some(Format::F32),
            Noise::Bf16 => Some(Format::Bf16),
        }
    }

    /// The recipe with the arm's order of additions.
    pub(super) fn order(self, recipe: &Recipe) -> Recipe {
        match self {
            Noise::Order => {
                let pin = Pin { split_k: NonZeroU32::new(3), ..recipe.pin };
                Recipe { pin, ..*recipe }
            }
            _ => *recipe,
        }
    }

    /// A result as the arm passes it on; the site and a seed decide which values move.
    pub(super) fn applied(self, mut y: Tensor, site: &Site, seed: u64) -> Tensor {
        if matches!(self, Noise::None | Noise::Order) {
            return y;
        }
        let parts: [&[u8]; 2] = [site.0.as_bytes(), &seed.to_le_bytes()];
        let mut random = Random::named("runner falsify: noise", &parts);
        for value in y.data_mut().iter_mut() {
            let bits = random.bits();
            *value = match self {
                Noise::None | Noise::Order => *value,
                Noise::Ulp if bits & 1 == 0 || *value == 0.0 || !value.is_finite() => *value,
                Noise::Ulp if bits & 2 == 0 => value.next_up(),
                Noise::Ulp => value.next_down(),
                Noise::Bf16 => {
                    // An eighth of 2^-8, to either side.
                    let part = random.symmetric();
                    Format::Bf16.round(*value * (1.0 + part / 2048.0))
                }
            };
        }
        y
    }
}
