//! The synthetic models that have names: what each is called, its sizes, and how they grow.
//!
//! It decides numbers only; the rest of the generator makes a model of them.

use std::fmt;

use super::{Shape, random};
use crate::model::architecture::Architecture;
use crate::text::shown;

/// The largest factor of a preset's widths: a hidden width of 8,192, as models of 70 billion
/// weights have it.
pub const LARGEST_SCALE: usize = 32;

/// A model that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Preset {
    /// Qwen2 in small: biases, grouped-query attention, an output matrix of its own.
    Qwen2Tiny,
    /// Llama in small: interleaved RoPE with frequency factors, tied embeddings.
    LlamaTiny,
    /// Qwen3 in small: norms on Q and K, heads wider than their share of the hidden width.
    Qwen3Tiny,
    /// The shapes of Qwen2.5-0.5B, tied embeddings.
    Qwen25Half,
    /// The shapes of Qwen2.5-7B.
    Qwen25Seven,
    /// Shapes that the seed draws, odd ones too; `random.rs` says which.
    Random,
    /// Gemma 2 in small: norms on both sides, soft caps, a short window in every other block.
    Gemma2Tiny,
    /// Gemma 3 in small: norms of heads, two RoPEs, a short window in five of six blocks.
    Gemma3Tiny,
    /// OLMo 2 in small: norms after attention and feed-forward alone.
    Olmo2Tiny,
    /// Granite in small: four factors.
    GraniteTiny,
    /// SmolLM3 in small: every fourth block without RoPE.
    SmolLm3Tiny,
    /// GLM 4 in small: norms on both sides, RoPE on half of each head, biases.
    Glm4Tiny,
    /// StableLM in small: LayerNorm, RoPE on a quarter of each head.
    StableLmTiny,
    /// StarCoder 2 in small: LayerNorm, biases everywhere, no gate.
    Starcoder2Tiny,
    /// Mixtral in small: eight experts, two for each token.
    MixtralTiny,
    /// Qwen2 with experts in small: eight, four for each token, and one that all share.
    Qwen2MoeTiny,
    /// Qwen3 with experts in small: sixteen, four for each token.
    Qwen3MoeTiny,
    /// Mistral in small: a short window in every block. A folder, as all that follow.
    MistralTiny,
    /// Phi 3 in small: fused projections, RoPE on three quarters of each head.
    Phi3Tiny,
    /// gpt-oss in small: eight experts, two for each token, sinks, a short window in every other
    /// block.
    GptOssTiny,
    /// DeepSeek-V3 in small: latent attention, sixteen experts in four groups, a shared one.
    DeepSeekV3Tiny,
    /// Qwen3-Next in small: three gated delta nets, gated attention, eight experts, a shared one.
    Qwen3NextTiny,
}

/// A preset whose widths may be multiples of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scaled {
    /// Whose shape it is.
    pub preset: Preset,
    /// Factor of hidden and feed-forward width, heads, vocabulary and, up to the real number, of
    /// the blocks: 1 to [`LARGEST_SCALE`].
    scale: usize,
}

impl From<Preset> for Scaled {
    fn from(preset: Preset) -> Scaled {
        Scaled { preset, scale: 1 }
    }
}

impl Scaled {
    /// The model of a name such as `qwen3-moe-tiny` or `qwen3-moe-tiny@8`.
    ///
    /// # Errors
    /// In words, if no preset is called so, or it has no such scale.
    pub fn from_name(name: &str) -> Result<Scaled, String> {
        let (of, scale) = name.split_once('@').map_or((name, None), |(of, by)| (of, Some(by)));
        let preset = Preset::from_name(of).ok_or_else(|| {
            let known: Vec<&str> = Preset::ALL.iter().map(|preset| preset.name()).collect();
            format!("no synthetic model is called `{}`; known: {}", shown(of), known.join(", "))
        })?;
        let Some(scale) = scale else { return Ok(preset.into()) };
        if preset.layers_of_real().is_none() {
            return Err(format!(
                "`synthetic:{preset}` has no scales: its sizes are real ones, or the seed's; \
                 write it without `@{}`",
                shown(scale)
            ));
        }
        let known = (1..=LARGEST_SCALE).find(|known| known.to_string() == scale);
        let Some(scale) = known else {
            return Err(format!(
                "`{}` is no scale of `synthetic:{preset}`: write a whole number from 1 to \
                 {LARGEST_SCALE}, such as `synthetic:{preset}@8`",
                shown(scale)
            ));
        };
        Ok(Scaled { preset, scale })
    }

    pub(super) fn shape(self, seed: u64) -> Shape {
        let shape = self.preset.shape(seed);
        let Scaled { preset, scale } = self;
        let Some(most) = preset.layers_of_real().filter(|_| scale > 1) else { return shape };
        Shape {
            layers: (shape.layers * scale).min(most),
            hidden: shape.hidden * scale,
            heads: shape.heads * scale,
            kv_heads: shape.kv_heads * scale,
            ffn: shape.ffn * scale,
            vocabulary: shape.vocabulary * scale,
            scale,
            ..shape
        }
    }
}

impl fmt::Display for Scaled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.scale {
            1 => write!(f, "{}", self.preset),
            scale => write!(f, "{}@{scale}", self.preset),
        }
    }
}

/// A value of the metadata.
#[derive(Clone, Copy)]
pub(super) enum Setting {
    /// An integer that is the same at every scale.
    Count(usize),
    /// A width, which grows with the scale.
    Width(usize),
    /// A float.
    Number(f32),
    /// A bool.
    Flag(bool),
}

use Setting::{Count, Flag, Number, Width};

/// Biases of queries, keys and values, where an architecture may have them or not.
const QKV: &[&str] = &["attn_q.bias", "attn_k.bias", "attn_v.bias"];
/// The same, and the norm before the feed-forward network.
const QKV_AND_NORM: &[&str] =
    &["attn_q.bias", "attn_k.bias", "attn_v.bias", "ffn_norm.weight", "ffn_norm.bias"];

impl Preset {
    /// All presets, the default first.
    pub const ALL: [Preset; 22] = [
        Preset::Qwen2Tiny,
        Preset::LlamaTiny,
        Preset::Qwen3Tiny,
        Preset::Gemma2Tiny,
        Preset::Gemma3Tiny,
        Preset::Olmo2Tiny,
        Preset::GraniteTiny,
        Preset::SmolLm3Tiny,
        Preset::Glm4Tiny,
        Preset::StableLmTiny,
        Preset::Starcoder2Tiny,
        Preset::MixtralTiny,
        Preset::Qwen2MoeTiny,
        Preset::Qwen3MoeTiny,
        Preset::MistralTiny,
        Preset::Phi3Tiny,
        Preset::GptOssTiny,
        Preset::DeepSeekV3Tiny,
        Preset::Qwen3NextTiny,
        Preset::Qwen25Half,
        Preset::Qwen25Seven,
        Preset::Random,
    ];

    /// The name that a manifest gives after `synthetic:`.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Qwen2Tiny => "qwen2-tiny",
            Preset::LlamaTiny => "llama-tiny",
            Preset::Qwen3Tiny => "qwen3-tiny",
            Preset::Qwen25Half => "qwen2.5-0.5b",
            Preset::Qwen25Seven => "qwen2.5-7b",
            Preset::Random => "random",
            Preset::Gemma2Tiny => "gemma2-tiny",
            Preset::Gemma3Tiny => "gemma3-tiny",
            Preset::Olmo2Tiny => "olmo2-tiny",
            Preset::GraniteTiny => "granite-tiny",
            Preset::SmolLm3Tiny => "smollm3-tiny",
            Preset::Glm4Tiny => "glm4-tiny",
            Preset::StableLmTiny => "stablelm-tiny",
            Preset::Starcoder2Tiny => "starcoder2-tiny",
            Preset::MixtralTiny => "mixtral-tiny",
            Preset::Qwen2MoeTiny => "qwen2-moe-tiny",
            Preset::Qwen3MoeTiny => "qwen3-moe-tiny",
            Preset::MistralTiny => "mistral-tiny",
            Preset::Phi3Tiny => "phi3-tiny",
            Preset::GptOssTiny => "gpt-oss-tiny",
            Preset::DeepSeekV3Tiny => "deepseek-v3-tiny",
            Preset::Qwen3NextTiny => "qwen3-next-tiny",
        }
    }

    /// The preset of that name.
    pub fn from_name(name: &str) -> Option<Preset> {
        Preset::ALL.into_iter().find(|preset| preset.name() == name)
    }

    /// Its architecture and sizes, and how far it grows, in words.
    pub fn about(self) -> String {
        if self == Preset::Random {
            return "a llama, qwen2 or qwen3 whose shape the seed draws".to_owned();
        }
        let Shape { architecture, layers, hidden, .. } = self.shape(0);
        let sizes = format!("`{}`, {layers} blocks, hidden width {hidden}", architecture.name());
        match self.layers_of_real() {
            None => sizes,
            Some(most) => format!(
                "{sizes}; up to `@{LARGEST_SCALE}`: {} blocks, {}",
                (layers * LARGEST_SCALE).min(most),
                hidden * LARGEST_SCALE
            ),
        }
    }

    /// Blocks of a large model of the kind, which a scaled one has at most; nothing where the
    /// preset does not grow.
    fn layers_of_real(self) -> Option<usize> {
        Some(match self {
            Preset::Qwen25Half | Preset::Qwen25Seven | Preset::Random => return None,
            Preset::Qwen2Tiny | Preset::LlamaTiny => 80,
            Preset::Qwen3Tiny | Preset::Olmo2Tiny => 64,
            // Not 46 and 62, where llama.cpp scales scores in another way.
            Preset::Gemma2Tiny => 42,
            Preset::Gemma3Tiny | Preset::Qwen3MoeTiny | Preset::Qwen3NextTiny => 48,
            Preset::GraniteTiny | Preset::Glm4Tiny | Preset::StableLmTiny => 40,
            Preset::Starcoder2Tiny | Preset::MistralTiny | Preset::Phi3Tiny => 40,
            Preset::GptOssTiny => 36,
            Preset::DeepSeekV3Tiny => 61,
            Preset::SmolLm3Tiny => 36,
            Preset::MixtralTiny => 32,
            Preset::Qwen2MoeTiny => 28,
        })
    }

    fn shape(self, seed: u64) -> Shape {
        let tiny = Shape {
            architecture: Architecture::Qwen2,
            layers: 4,
            hidden: 256,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            turned: 64,
            ffn: 768,
            vocabulary: 2048,
            rms_norm_eps: 1e-6,
            theta: 1e6,
            tied: false,
            biases: true,
            scale: 1,
            settings: &[],
            besides: &[],
            outliers: 2,
            sharpness: 1.2,
            plain: None,
        };
        match self {
            Preset::Qwen2Tiny => tiny,
            Preset::LlamaTiny => Shape {
                architecture: Architecture::Llama,
                heads: 8,
                head_dim: 32,
                turned: 32,
                rms_norm_eps: 1e-5,
                theta: 5e5,
                tied: true,
                biases: false,
                ..tiny
            },
            Preset::Qwen3Tiny => {
                let architecture = Architecture::Qwen3;
                Shape { architecture, head_dim: 128, turned: 128, biases: false, ..tiny }
            }
            Preset::Qwen25Half => Shape {
                layers: 24,
                hidden: 896,
                heads: 14,
                ffn: 4864,
                vocabulary: 151_936,
                tied: true,
                outliers: 3,
                ..tiny
            },
            Preset::Qwen25Seven => Shape {
                layers: 28,
                hidden: 3584,
                heads: 28,
                kv_heads: 4,
                head_dim: 128,
                turned: 128,
                ffn: 18_944,
                vocabulary: 152_064,
                outliers: 6,
                ..tiny
            },
            Preset::Random => random::shape(seed),
            Preset::Gemma2Tiny => Shape {
                architecture: Architecture::Gemma2,
                theta: 1e4,
                tied: true,
                settings: &[
                    ("attention.sliding_window", Count(12)),
                    ("attn_logit_softcapping", Number(50.0)),
                    ("final_logit_softcapping", Number(30.0)),
                ],
                ..tiny
            },
            Preset::Gemma3Tiny => Shape {
                architecture: Architecture::Gemma3,
                // The sixth does not slide.
                layers: 6,
                tied: true,
                settings: &[("attention.sliding_window", Count(12))],
                ..tiny
            },
            Preset::Olmo2Tiny => Shape { architecture: Architecture::Olmo2, theta: 5e5, ..tiny },
            Preset::GraniteTiny => Shape {
                architecture: Architecture::Granite,
                rms_norm_eps: 1e-5,
                theta: 1e7,
                tied: true,
                settings: &[
                    ("attention.scale", Number(1.0 / 64.0)),
                    ("embedding_scale", Number(12.0)),
                    ("residual_scale", Number(0.22)),
                    ("logit_scale", Number(8.0)),
                ],
                ..tiny
            },
            Preset::SmolLm3Tiny => {
                let architecture = Architecture::SmolLm3;
                Shape { architecture, theta: 5e6, tied: true, ..tiny }
            }
            Preset::Glm4Tiny => Shape {
                architecture: Architecture::Glm4,
                turned: 32,
                rms_norm_eps: 1e-5,
                theta: 1e4,
                besides: QKV,
                ..tiny
            },
            Preset::StableLmTiny => Shape {
                architecture: Architecture::StableLm,
                turned: 16,
                rms_norm_eps: 1e-5,
                theta: 1e4,
                besides: QKV_AND_NORM,
                ..tiny
            },
            Preset::Starcoder2Tiny => Shape {
                architecture: Architecture::Starcoder2,
                rms_norm_eps: 1e-5,
                tied: true,
                ..tiny
            },
            Preset::MixtralTiny => Shape {
                architecture: Architecture::Mixtral,
                rms_norm_eps: 1e-5,
                settings: &[("expert_count", Count(8)), ("expert_used_count", Count(2))],
                ffn: 512,
                ..tiny
            },
            Preset::Qwen2MoeTiny => Shape {
                architecture: Architecture::Qwen2Moe,
                settings: &[
                    ("expert_count", Count(8)),
                    ("expert_used_count", Count(4)),
                    ("expert_feed_forward_length", Width(256)),
                    ("expert_shared_feed_forward_length", Width(512)),
                ],
                ..tiny
            },
            Preset::Qwen3MoeTiny => Shape {
                architecture: Architecture::Qwen3Moe,
                settings: &[
                    ("expert_count", Count(16)),
                    ("expert_used_count", Count(4)),
                    ("expert_feed_forward_length", Width(256)),
                ],
                ..tiny
            },
            Preset::MistralTiny => Shape {
                architecture: Architecture::Mistral,
                rms_norm_eps: 1e-5,
                settings: &[("sliding_window", Count(12))],
                ..tiny
            },
            Preset::Phi3Tiny => Shape {
                architecture: Architecture::Phi3,
                turned: 48,
                rms_norm_eps: 1e-5,
                theta: 1e4,
                settings: &[("original_max_position_embeddings", Count(32_768))],
                ..tiny
            },
            Preset::GptOssTiny => Shape {
                architecture: Architecture::GptOss,
                // Of each expert.
                ffn: 256,
                rms_norm_eps: 1e-5,
                theta: 150_000.0,
                settings: &[
                    ("attention_bias", Flag(true)),
                    ("num_local_experts", Count(8)),
                    ("num_experts_per_tok", Count(2)),
                    ("sliding_window", Count(12)),
                ],
                ..tiny
            },
            Preset::DeepSeekV3Tiny => Shape {
                architecture: Architecture::DeepSeekV3,
                // Latent attention has as many heads of keys as of queries.
                kv_heads: 4,
                head_dim: 48,
                turned: 16,
                theta: 1e4,
                settings: &[
                    ("attention_bias", Flag(false)),
                    ("q_lora_rank", Width(96)),
                    ("kv_lora_rank", Width(64)),
                    ("qk_nope_head_dim", Count(32)),
                    ("qk_rope_head_dim", Count(16)),
                    ("v_head_dim", Count(40)),
                    ("first_k_dense_replace", Count(1)),
                    ("n_routed_experts", Count(16)),
                    ("n_shared_experts", Count(1)),
                    ("num_experts_per_tok", Count(4)),
                    ("n_group", Count(4)),
                    ("topk_group", Count(2)),
                    ("norm_topk_prob", Flag(true)),
                    ("routed_scaling_factor", Number(2.5)),
                    ("moe_intermediate_size", Width(256)),
                    ("rope_interleave", Flag(true)),
                ],
                ..tiny
            },
            Preset::Qwen3NextTiny => Shape {
                architecture: Architecture::Qwen3Next,
                turned: 16,
                theta: 1e7,
                settings: &[
                    ("attention_bias", Flag(false)),
                    ("linear_conv_kernel_dim", Count(4)),
                    ("linear_key_head_dim", Count(32)),
                    ("linear_value_head_dim", Count(32)),
                    ("linear_num_key_heads", Width(4)),
                    ("linear_num_value_heads", Width(8)),
                    ("decoder_sparse_step", Count(1)),
                    ("num_experts", Count(8)),
                    ("num_experts_per_tok", Count(4)),
                    ("norm_topk_prob", Flag(true)),
                    ("moe_intermediate_size", Width(256)),
                    ("shared_expert_intermediate_size", Width(256)),
                ],
                ..tiny
            },
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_a_model_that_is_read_at_every_scale() {
        for preset in Preset::ALL {
            let scales = if preset.layers_of_real().is_some() { LARGEST_SCALE } else { 1 };
            for scale in 1..=scales {
                let shape = Scaled { preset, scale }.shape(1);
                let config = shape.config();
                let told = (config.architecture, config.hidden, config.layers, config.ffn);
                let asked = (shape.architecture, shape.hidden, shape.layers, shape.ffn);
                assert_eq!(told, asked, "{preset}@{scale}");
                assert_eq!(config.heads * 64 / shape.heads, 64, "{preset}@{scale}");
                // Names occur once, and rows fill their blocks.
                let mut names = std::collections::BTreeSet::new();
                for tensor in shape.tensors() {
                    assert!(tensor.width.is_multiple_of(tensor.kind.block_width()));
                    assert!(tensor.rows.is_multiple_of(tensor.depth), "{}", tensor.name);
                    assert!(names.insert(tensor.name.clone()), "{}", tensor.name);
                }
            }
        }
    }

    #[test]
    fn a_scaled_preset_has_real_widths_and_no_more_blocks_than_a_real_model() {
        let shape = |name: &str| Scaled::from_name(name).expect("a scale").shape(1);
        let large = shape("qwen3-moe-tiny@8");
        assert_eq!((large.hidden, large.layers, large.heads, large.kv_heads), (2048, 32, 32, 16));
        let config = large.config();
        assert_eq!(config.experts.map(|experts| (experts.count, experts.ffn)), Some((16, 2048)));
        assert_eq!(shape("qwen3-moe-tiny@32").layers, 48);
        assert_eq!(Scaled::from_name("llama-tiny@1"), Ok(Preset::LlamaTiny.into()));
    }
}
