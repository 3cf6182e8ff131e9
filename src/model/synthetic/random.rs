//! Shapes that a seed draws, to try what the presets never show: odd widths and
//! vocabularies, narrow heads, one layer, no outliers or many, scores of any size.
//!
//! It decides numbers only; the rest of the generator makes a model of them.

use super::Shape;
use super::blocks::stream;
use crate::model::architecture::Architecture;
use crate::model::weights::WeightType;
use crate::random::Random;

/// The least vocabulary that holds the words of `vocabulary.rs`.
const LEAST_VOCABULARY: usize = 600;

/// Weights of a model's layers, about: wide models are shallow, so that all are quick.
const FEW_WEIGHTS: usize = 1 << 20;

/// The shape of a seed: hidden width 64 to 1024 and FFN 32 to 3000, a third of the widths
/// fitting no block; vocabulary 600 to 1200; 1 to 4 layers; heads of 2 to 128.
pub(super) fn shape(seed: u64) -> Shape {
    let mut random = stream(seed, "a random shape", 0);
    let random = &mut random;
    let architectures = [Architecture::Qwen2, Architecture::Llama, Architecture::Qwen3];
    let architecture = architectures[random.below(3)];
    let hidden = width(random, 64, 1024);
    let head_dim = match random.below(3) {
        0 => 2 * (1 + random.below(64)),
        _ => [8, 16, 32, 48, 64, 80, 96, 128][random.below(8)],
    };
    // As many heads as the hidden width holds, or fewer or more, as Qwen3 has them.
    let most = (hidden * (1 + random.below(3)) / (2 * head_dim)).clamp(1, 16);
    let kv_heads = 1 + random.below(most.min(4));
    let heads = kv_heads * (1 + random.below(most / kv_heads));
    let attention = 2 * hidden * (heads + kv_heads) * head_dim;
    let ffn = width(random, 32, (FEW_WEIGHTS / (3 * hidden)).clamp(64, 3000));
    let layers = (FEW_WEIGHTS / (attention + 3 * hidden * ffn)).clamp(1, 4);
    Shape {
        architecture,
        layers: 1 + random.below(layers),
        hidden,
        heads,
        kv_heads,
        head_dim,
        turned: head_dim,
        ffn,
        vocabulary: LEAST_VOCABULARY + random.below(600),
        rms_norm_eps: [1e-5, 1e-6][random.below(2)],
        theta: [1e4, 5e5, 1e6][random.below(3)],
        tied: random.below(2) == 0,
        biases: architecture == Architecture::Qwen2 && random.below(3) != 0,
        scale: 1,
        settings: &[],
        besides: &[],
        outliers: [0, 1, 2, 3, 6][random.below(5)],
        sharpness: [0.4, 1.2, 1.2, 2.5, 5.0][random.below(5)],
        plain: match random.below(6) {
            0 => Some(WeightType::F32),
            1 => Some(WeightType::F16),
            2 => Some(WeightType::BF16),
            _ => None,
        },
    }
}

/// A width between two, small ones as often as large ones: of whole blocks of 256 or 32
/// where they fit, or any.
fn width(random: &mut Random, least: usize, most: usize) -> usize {
    let share = random.unit();
    let ratio = most as f64 / least as f64;
    let width = (least as f64 * libm::pow(ratio, share)) as usize;
    let block = [1, 32, 256][random.below(3)];
    if width < block { width } else { width / block * block }
}
