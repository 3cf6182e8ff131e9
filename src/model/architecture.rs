//! The families of models, one row each: their names, what their blocks have, which tokenizer
//! transformers keeps for them, what llama.cpp's files of them leave unsaid, and their row of
//! `docs/models.md`.
//!
//! A new one that needs no new op is a variant with its row here, and its settings of `config.json`
//! in `hf_config.rs`. It reads no file.

use super::error::{Fault, shown};

/// The family of a model: which tensors it has and how they are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Architecture {
    /// Llama, SmolLM2 and relatives.
    Llama,
    /// Qwen2 and Qwen2.5: biases on Q, K and V.
    Qwen2,
    /// Qwen3: RMS norms on every head's Q and K.
    Qwen3,
    /// Mistral: a window in every block.
    Mistral,
    /// Phi 3: fused projections, RoPE on a part of each head.
    Phi3,
    /// Gemma 2: norms before and after, soft caps, a window in every other block.
    Gemma2,
    /// Gemma 3, its text part: norms of Q and K, two RoPEs.
    Gemma3,
    /// OLMo 2: norms after attention and feed-forward alone, norms of whole Q and K.
    Olmo2,
    /// Granite: four factors.
    Granite,
    /// SmolLM3: blocks without RoPE.
    SmolLm3,
    /// GLM 4: norms before and after, RoPE on neighbours in a part of each head.
    Glm4,
    /// StableLM: norms of mean and variance, RoPE on a part of each head.
    StableLm,
    /// StarCoder 2: norms of mean and variance, a feed-forward network without a gate.
    Starcoder2,
    /// Mixtral: a mixture of experts in every block.
    Mixtral,
    /// Qwen2 with experts, and one that all tokens share behind a gate.
    Qwen2Moe,
    /// Qwen3 with experts.
    Qwen3Moe,
    /// gpt-oss: experts with a clamped SwiGLU, attention with sinks.
    GptOss,
    /// DeepSeek-V3: latent attention, experts in groups beside a shared one.
    DeepSeekV3,
    /// Qwen3-Next: a gated delta net in most blocks, gated attention in the others, experts.
    Qwen3Next,
}

/// Where a block has norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Norms {
    /// Before attention and feed-forward.
    Before,
    /// After them.
    After,
    /// Both.
    Both,
}

/// Which norms queries and keys have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QkNorms {
    /// None.
    None,
    /// Over each head.
    Heads,
    /// Over all heads together.
    Rows,
}

/// The function before the product of a gated feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU by the hyperbolic tangent.
    GeluTanh,
    /// gpt-oss: `g / (1 + e^(-1.702 g))` of a gate of at most 7, times the other value, within 7
    /// of 0, plus one.
    ClampedSwiglu,
}

impl Activation {
    /// The name that requests to programs use.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::ClampedSwiglu => "clamped_swiglu",
        }
    }
}

/// Whether projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// They must not.
    Never,
    /// The tensors tell.
    Open,
    /// They must.
    Always,
}

impl Presence {
    /// What a setting says.
    pub(super) fn of(flag: bool) -> Presence {
        if flag { Presence::Always } else { Presence::Never }
    }
}

/// Which projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Those of queries, keys and values.
    pub qkv: Presence,
    /// That of attention's output.
    pub output: Presence,
    /// Those of the feed-forward network.
    pub ffn: Presence,
}

/// Which two values of a head RoPE turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Values `2i` and `2i + 1`: GGUF files whose converter permutes (llama, granite, smollm3), glm4.
    Interleaved,
    /// Values `i` and `i + dimensions / 2`: qwen2, qwen3 and Hugging Face folders but glm4.
    Halves,
}

impl RopeLayout {
    /// The name that requests to programs use.
    pub fn name(self) -> &'static str {
        match self {
            RopeLayout::Interleaved => "interleaved",
            RopeLayout::Halves => "halves",
        }
    }
}

/// What is known of an architecture before a file of it is read.
struct Row {
    /// The name that `config.json` uses.
    name: &'static str,
    /// Where a block has norms.
    norms: Norms,
    /// Which norms queries and keys have.
    qk_norms: QkNorms,
    /// Whether transformers' norms round once, after the gain.
    rounds_norms_late: bool,
    /// Whether norms take the mean off, and have a bias: LayerNorm.
    takes_means_off: bool,
    /// Whether a Hugging Face folder holds the gains of norms less one.
    gains_less_one: bool,
    /// Whether the feed-forward network has a gate beside the other projection.
    is_gated: bool,
    /// Whether each head of queries has a sink.
    has_sinks: bool,
    /// Whether the projection of queries gives a gate for each value of attention besides.
    gates_attention: bool,
    /// The class of tokenizers that transformers keeps for it, where it does.
    tokenizer: Option<&'static str>,
    /// What GGUF files of it leave unsaid, if they are read.
    gguf: Option<Gguf>,
    /// What it has of its own, in words.
    about: &'static str,
    /// Where the receipts of its passes on a GPU lie.
    receipts: &'static str,
    /// The engines whose kernels for it are known to the bit.
    engines: &'static str,
}

impl Row {
    /// What most of them have.
    const USUAL: Row = Row {
        name: "",
        norms: Norms::Before,
        qk_norms: QkNorms::None,
        rounds_norms_late: false,
        takes_means_off: false,
        gains_less_one: false,
        is_gated: true,
        has_sinks: false,
        gates_attention: false,
        tokenizer: Some("TokenizersBackend"),
        gguf: None,
        about: "",
        receipts: "runs/receipts/small-models",
        engines: "none: `stream` alone",
    };
    /// Those of which transformers' kernels are known.
    const OF_TRANSFORMERS: Row =
        Row { receipts: "runs/receipts/architectures", engines: "transformers", ..Row::USUAL };
    /// Those of which the kernels of every engine are known.
    const OF_ALL_ENGINES: Row = Row {
        receipts: "runs/receipts",
        engines: "transformers, vLLM, SGLang, torchao, llama.cpp",
        ..Row::USUAL
    };
}

/// What llama.cpp knows of an architecture by its name alone, and its files leave unsaid.
pub(super) struct Gguf {
    /// The name that files use, with which their keys begin.
    pub name: &'static str,
    /// Keys that are read, or must say what is computed, in this architecture alone.
    pub keys: &'static [&'static str],
    /// What is turned together: neighbours where its converter permutes queries and keys, and in some
    /// others.
    pub layout: RopeLayout,
    /// Whether its converter permutes queries and keys, so that neighbours turn together.
    pub permutes: bool,
    /// Whether a part of each head may turn.
    pub turns_parts: bool,
    /// Whether it demands an output matrix beside the embedding.
    pub needs_output: bool,
    /// Which projections have biases. Where it ends over tensors that it does not read, they have
    /// none; a mixture of experts has none either where nothing is said.
    pub biases: Biases,
    /// Whether the tensors tell which norms a block has.
    pub has_norms_by_tensors: bool,
    /// The feed-forward network's function.
    pub activation: Activation,
}

impl Gguf {
    /// What most of them have.
    const USUAL: Gguf = Gguf {
        name: "",
        keys: &[],
        layout: RopeLayout::Halves,
        permutes: false,
        turns_parts: false,
        needs_output: false,
        biases: Biases { qkv: Presence::Open, output: Presence::Open, ffn: Presence::Open },
        has_norms_by_tensors: false,
        activation: Activation::Silu,
    };
    const OF_LLAMA: Gguf =
        Gguf { name: "llama", layout: RopeLayout::Interleaved, permutes: true, ..Gguf::USUAL };
}

const NO_BIASES: Biases =
    Biases { qkv: Presence::Never, output: Presence::Never, ffn: Presence::Never };
const ALL_BIASES: Biases =
    Biases { qkv: Presence::Always, output: Presence::Always, ffn: Presence::Always };

impl Architecture {
    /// All that a Hugging Face folder may hold.
    pub const ALL: [Architecture; 19] = [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Mistral,
        Architecture::Phi3,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::Olmo2,
        Architecture::Granite,
        Architecture::SmolLm3,
        Architecture::Glm4,
        Architecture::StableLm,
        Architecture::Starcoder2,
        Architecture::Mixtral,
        Architecture::Qwen2Moe,
        Architecture::Qwen3Moe,
        Architecture::GptOss,
        Architecture::DeepSeekV3,
        Architecture::Qwen3Next,
    ];

    const fn row(self) -> Row {
        match self {
            Architecture::Llama => Row {
                name: "llama",
                tokenizer: None,
                gguf: Some(Gguf::OF_LLAMA),
                about: "biases where the file says so",
                ..Row::OF_ALL_ENGINES
            },
            Architecture::Qwen2 => Row {
                name: "qwen2",
                tokenizer: Some("Qwen2Tokenizer"),
                gguf: Some(Gguf {
                    name: "qwen2",
                    biases: Biases { qkv: Presence::Always, ..NO_BIASES },
                    ..Gguf::USUAL
                }),
                about: "biases of Q, K and V, windows from `max_window_layers` on",
                ..Row::OF_ALL_ENGINES
            },
            Architecture::Qwen3 => Row {
                name: "qwen3",
                qk_norms: QkNorms::Heads,
                tokenizer: Some("Qwen2Tokenizer"),
                gguf: Some(Gguf { name: "qwen3", biases: NO_BIASES, ..Gguf::USUAL }),
                about: "norms of heads, windows",
                ..Row::OF_ALL_ENGINES
            },
            Architecture::Mistral => {
                Row { name: "mistral", about: "a window in every block", ..Row::OF_TRANSFORMERS }
            }
            Architecture::Phi3 => Row {
                name: "phi3",
                gguf: Some(Gguf {
                    name: "phi3",
                    keys: &["rope.scaling.attn_factor"],
                    turns_parts: true,
                    biases: NO_BIASES,
                    ..Gguf::USUAL
                }),
                about: "fused projections, RoPE on a part of each head",
                ..Row::OF_TRANSFORMERS
            },
            Architecture::Gemma2 => Row {
                name: "gemma2",
                norms: Norms::Both,
                rounds_norms_late: true,
                gains_less_one: true,
                tokenizer: Some("GemmaTokenizer"),
                gguf: Some(Gguf {
                    name: "gemma2",
                    keys: &["attn_logit_softcapping", "final_logit_softcapping"],
                    biases: Biases { qkv: Presence::Never, ..Gguf::USUAL.biases },
                    activation: Activation::GeluTanh,
                    ..Gguf::USUAL
                }),
                about: "norms on both sides with gains of 1 + w, GELU, windows in every other block, \
                        soft caps",
                ..Row::OF_TRANSFORMERS
            },
            Architecture::Gemma3 => Row {
                name: "gemma3_text",
                norms: Norms::Both,
                qk_norms: QkNorms::Heads,
                rounds_norms_late: true,
                gains_less_one: true,
                tokenizer: Some("GemmaTokenizer"),
                gguf: Some(Gguf {
                    name: "gemma3",
                    keys: &["rope.freq_base_swa"],
                    activation: Activation::GeluTanh,
                    ..Gguf::USUAL
                }),
                about: "the same with norms of heads and two RoPEs (its text part)",
                ..Row::OF_TRANSFORMERS
            },
            Architecture::Olmo2 => Row {
                name: "olmo2",
                norms: Norms::After,
                qk_norms: QkNorms::Rows,
                rounds_norms_late: true,
                gguf: Some(Gguf {
                    name: "olmo2",
                    needs_output: true,
                    biases: Biases { qkv: Presence::Never, ..Gguf::USUAL.biases },
                    ..Gguf::USUAL
                }),
                about: "norms after attention and feed-forward alone, norms of whole Q and K",
                ..Row::OF_TRANSFORMERS
            },
            Architecture::Granite => Row {
                name: "granite",
                gguf: Some(Gguf {
                    name: "granite",
                    keys: &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"],
                    ..Gguf::OF_LLAMA
                }),
                about: "four factors",
                ..Row::OF_TRANSFORMERS
            },
            Architecture::SmolLm3 => Row {
                name: "smollm3",
                tokenizer: None,
                gguf: Some(Gguf {
                    name: "smollm3",
                    biases: Biases { qkv: Presence::Never, ..Gguf::USUAL.biases },
                    ..Gguf::OF_LLAMA
                }),
                about: "blocks without RoPE",
                ..Row::OF_TRANSFORMERS
            },
            Architecture::Glm4 => Row {
                name: "glm4",
                norms: Norms::Both,
                gguf: Some(Gguf {
                    name: "glm4",
                    layout: RopeLayout::Interleaved,
                    turns_parts: true,
                    ..Gguf::USUAL
                }),
                about: "norms on both sides, RoPE on neighbours in a part of each head",
                ..Row::OF_TRANSFORMERS
            },
            Architecture::StableLm => Row {
                name: "stablelm",
                takes_means_off: true,
                gguf: Some(Gguf {
                    name: "stablelm",
                    keys: &["attention.layer_norm_epsilon", "use_parallel_residual"],
                    turns_parts: true,
                    needs_output: true,
                    has_norms_by_tensors: true,
                    ..Gguf::USUAL
                }),
                about: "LayerNorm, RoPE on a part of each head; norms of each head's own and parallel \
                        residuals where the file says so",
                ..Row::USUAL
            },
            Architecture::Starcoder2 => Row {
                name: "starcoder2",
                takes_means_off: true,
                is_gated: false,
                tokenizer: Some("GPT2Tokenizer"),
                gguf: Some(Gguf {
                    name: "starcoder2",
                    keys: &["attention.layer_norm_epsilon"],
                    biases: ALL_BIASES,
                    activation: Activation::GeluTanh,
                    ..Gguf::USUAL
                }),
                about: "LayerNorm, biases, a feed-forward network without a gate",
                ..Row::USUAL
            },
            // In GGUF files it is a llama with experts.
            Architecture::Mixtral => Row {
                name: "mixtral",
                gguf: Some(Gguf::OF_LLAMA),
                about: "experts in every block",
                ..Row::USUAL
            },
            Architecture::Qwen2Moe => Row {
                name: "qwen2_moe",
                tokenizer: Some("Qwen2Tokenizer"),
                gguf: Some(Gguf {
                    name: "qwen2moe",
                    keys: &["expert_feed_forward_length", "expert_shared_feed_forward_length"],
                    needs_output: true,
                    biases: Biases { qkv: Presence::Always, ..NO_BIASES },
                    ..Gguf::USUAL
                }),
                about: "experts, and a gated one that all tokens share",
                ..Row::USUAL
            },
            Architecture::Qwen3Moe => Row {
                name: "qwen3_moe",
                qk_norms: QkNorms::Heads,
                tokenizer: Some("Qwen2Tokenizer"),
                gguf: Some(Gguf {
                    name: "qwen3moe",
                    keys: &[
                        "expert_feed_forward_length",
                        "expert_shared_feed_forward_length",
                        "expert_group_count",
                        "expert_group_used_count",
                        "expert_gating_func",
                    ],
                    biases: NO_BIASES,
                    ..Gguf::USUAL
                }),
                about: "experts, norms of heads",
                ..Row::USUAL
            },
            Architecture::GptOss => Row {
                name: "gpt_oss",
                has_sinks: true,
                tokenizer: None,
                gguf: Some(Gguf {
                    name: "gpt-oss",
                    keys: &[
                        "expert_feed_forward_length",
                        "attention.sliding_window_pattern",
                        "rope.scaling.yarn_ext_factor",
                        "rope.scaling.yarn_attn_factor",
                        "rope.scaling.yarn_beta_fast",
                        "rope.scaling.yarn_beta_slow",
                    ],
                    needs_output: true,
                    biases: Biases { qkv: Presence::Open, ..ALL_BIASES },
                    activation: Activation::ClampedSwiglu,
                    ..Gguf::USUAL
                }),
                about: "experts in MXFP4 or BF16 with biases, clamped SwiGLU, attention with sinks and \
                        windows",
                ..Row::USUAL
            },
            Architecture::DeepSeekV3 => Row {
                name: "deepseek_v3",
                gguf: Some(Gguf {
                    name: "deepseek2",
                    keys: &[
                        "attention.key_length_mla",
                        "attention.kv_lora_rank",
                        "attention.q_lora_rank",
                        "attention.value_length_mla",
                        "expert_feed_forward_length",
                        "expert_gating_func",
                        "expert_group_count",
                        "expert_group_used_count",
                        "expert_shared_count",
                        "expert_weights_norm",
                        "expert_weights_scale",
                        "leading_dense_block_count",
                        "rope.scaling.yarn_attn_factor",
                        "rope.scaling.yarn_beta_fast",
                        "rope.scaling.yarn_beta_slow",
                        "rope.scaling.yarn_ext_factor",
                        "rope.scaling.yarn_log_multiplier",
                    ],
                    layout: RopeLayout::Interleaved,
                    turns_parts: true,
                    biases: NO_BIASES,
                    ..Gguf::USUAL
                }),
                about: "latent attention (MLA), experts in groups by sigmoids, a shared one",
                ..Row::USUAL
            },
            Architecture::Qwen3Next => Row {
                name: "qwen3_next",
                qk_norms: QkNorms::Heads,
                rounds_norms_late: true,
                gains_less_one: true,
                gates_attention: true,
                tokenizer: Some("Qwen2Tokenizer"),
                gguf: Some(Gguf {
                    name: "qwen3next",
                    keys: &[
                        "expert_feed_forward_length",
                        "expert_shared_feed_forward_length",
                        "full_attention_interval",
                        "ssm.conv_kernel",
                        "ssm.group_count",
                        "ssm.inner_size",
                        "ssm.state_size",
                        "ssm.time_step_rank",
                    ],
                    turns_parts: true,
                    biases: NO_BIASES,
                    ..Gguf::USUAL
                }),
                about: "gated delta nets, gated attention, experts and a shared one",
                ..Row::USUAL
            },
        }
    }

    /// The name that `config.json` uses.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    pub(super) fn from_name(name: &str) -> Result<Architecture, Fault> {
        Architecture::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| {
            Fault::unsupported(
                format!("the architecture `{}` is unknown", shown(name)),
                format!(
                    "choose a model of one of these: {}",
                    Architecture::ALL.map(Architecture::name).join(", ")
                ),
            )
        })
    }

    /// What GGUF files of it leave unsaid, if they are read.
    pub(super) fn gguf(self) -> Option<Gguf> {
        self.row().gguf
    }

    /// Those that a GGUF file can name. A Mixtral is a llama with experts there.
    pub(super) fn of_gguf() -> impl Iterator<Item = (Gguf, Architecture)> {
        let named = Architecture::ALL.into_iter().filter(|known| *known != Architecture::Mixtral);
        named.filter_map(|known| Some((known.gguf()?, known)))
    }

    /// The name that GGUF files use.
    pub(super) fn gguf_name(self) -> &'static str {
        self.gguf().map_or(self.name(), |gguf| gguf.name)
    }

    /// Whether GGUF files of it are read.
    pub fn is_of_gguf(self) -> bool {
        self.gguf().is_some()
    }

    pub(super) fn norms(self) -> Norms {
        self.row().norms
    }

    pub(super) fn qk_norms(self) -> QkNorms {
        self.row().qk_norms
    }

    /// Whether transformers' norms round once, after the gain.
    pub fn rounds_norms_late(self) -> bool {
        self.row().rounds_norms_late
    }

    /// Whether norms take the mean off, and have a bias: LayerNorm.
    pub fn takes_means_off(self) -> bool {
        self.row().takes_means_off
    }

    /// Whether the feed-forward network has a gate beside the other projection.
    pub fn is_gated(self) -> bool {
        self.row().is_gated
    }

    /// Whether each head of queries has a sink: a score that takes its share and has no value.
    pub fn has_sinks(self) -> bool {
        self.row().has_sinks
    }

    /// Whether a Hugging Face folder holds the gains of norms less one.
    pub(super) fn gains_less_one(self) -> bool {
        self.row().gains_less_one
    }

    /// Whether the projection of queries gives a gate for each value of attention besides.
    pub fn gates_attention(self) -> bool {
        self.row().gates_attention
    }

    /// The class of tokenizers that transformers keeps for it, where it does.
    pub(super) fn tokenizer(self) -> Option<&'static str> {
        self.row().tokenizer
    }

    /// What it has of its own, in words.
    pub fn about(self) -> &'static str {
        self.row().about
    }

    /// Where the receipts of its passes on a GPU lie.
    pub fn receipts(self) -> &'static str {
        self.row().receipts
    }

    /// The engines whose kernels for it are known to the bit.
    pub fn engines(self) -> &'static str {
        self.row().engines
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_row_is_in_the_list_once_and_has_a_name_and_words_of_its_own() {
        for (place, architecture) in Architecture::ALL.into_iter().enumerate() {
            assert_eq!(architecture as usize, place, "{architecture:?}");
            assert!(!architecture.about().is_empty(), "{architecture:?}");
            assert_eq!(Architecture::from_name(architecture.name()).ok(), Some(architecture));
        }
        let names: BTreeSet<&str> = Architecture::of_gguf().map(|(gguf, _)| gguf.name).collect();
        assert_eq!(names.len(), Architecture::of_gguf().count());
        assert!(!names.contains(""), "{names:?}");
    }
}
