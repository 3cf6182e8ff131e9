//! What a stage computes and with which arithmetic: ops, arms, recipes, sites.
//!
//! Plain data, shared by every module. It knows neither how an op is computed
//! nor how a manifest is read.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::block_format::BlockFormat;
pub use crate::chip::ChipName;
use crate::dtype::Format;
use crate::engine::{Choices, EngineKernels, LinearKernel};
use crate::layer_sites::LAYER_SITES;

/// One way to compute a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// CPU, f64 accumulation over dequantised weights: the definition of truth.
    Reference,
    /// CPU, bit for bit what the chip's arithmetic prescribes.
    Emulated,
    /// The real GPU.
    Device,
    /// Tensors that somebody else's program left in a file.
    Recorded,
    /// A program of the user's that writes tensors when asked.
    External,
    /// A program of the user's: the one arm of every `command` stage, and of no other.
    Command,
}

/// The granularity of a GEMM operand's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightScale {
    /// One scale for the whole weight.
    Tensor,
    /// One scale per output channel (row of the weight).
    Channel,
    /// One scale per 128 x 128 block.
    Block128,
    /// A power of two per 32 elements of a row: MXFP8, MXFP6, MXFP4.
    Mx,
    /// An E4M3 value per 16 elements of a row, and one f32 for the whole weight: NVFP4.
    Nv,
}

/// The granularity of an activation's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationScale {
    /// One scale for the whole batch.
    Tensor,
    /// One scale per token (row of the activation).
    Token,
    /// One scale per 1 x 128 block of a row.
    Block128,
    /// A power of two per 32 elements of a row: MXFP8, MXFP6, MXFP4.
    Mx,
    /// An E4M3 value per 16 elements of a row, and one f32 for the whole batch: NVFP4.
    Nv,
}

/// Scales of both GEMM operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// Granularity of the weight's scale.
    pub weight: WeightScale,
    /// Granularity of the activation's scale.
    pub activation: ActivationScale,
}

/// How FP8 products are accumulated along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accumulate {
    /// The tensor core's accumulator carries all along K.
    Fast,
    /// Every 128 elements it is added to an f32 accumulator and restarts.
    Promoted,
}

/// Where the codes and scales of the weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codes {
    /// The arms convert the weights' values to the recipe's format.
    #[default]
    Made,
    /// The checkpoint: FP8 weights are multiplied as they stand in the file, by their own scales,
    /// and every other weight in its own type.
    Checkpoint,
}

impl Codes {
    /// Whether the arms convert.
    pub fn are_made(&self) -> bool {
        *self == Codes::Made
    }
}

/// The arithmetic under test. Emulated and device arms always share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, remote = "Self")]
pub struct Recipe {
    /// Operand format of every GEMM.
    pub gemm: Format,
    /// Whose codes the weights are. Where it is the checkpoint, `gemm` and `scale` stand for
    /// what a weight's own form says.
    #[serde(default, skip_serializing_if = "Codes::are_made")]
    pub codes: Codes,
    /// Granularity of the operands' scales; of FP8 and int8 only. Not written where the codes are the
    /// checkpoint's, whose scales they come with.
    #[serde(default = "Scale::usual")]
    pub scale: Scale,
    /// Accumulation along K; FP8 only.
    pub accumulate: Accumulate,
    /// Type of a GEMM's result: f32, bf16 or f16.
    pub output: Format,
    /// The chip.
    pub chip: ChipName,
    /// The type of every tensor that passes from one op to the next: f32, bf16 or f16.
    /// Where it is given, the arm under test is a foreign engine: it may round to this
    /// type wherever such engines do, and add in any order. `None` means the project's
    /// own kernels, whose f32 operations are known one by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<Format>,
    /// The kernels of that engine, where they are known to the bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKernels>,
    /// An engine of which no kernel is known to the bit, and what its products are is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub emulate: Option<Engine>,
    /// The library's algorithm, where the recipe insists on one.
    #[serde(default, skip_serializing_if = "Pin::is_empty")]
    pub pin: Pin,
    /// The type in which attention keeps keys and values of the positions seen so far; whole
    /// where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<Format>,
    /// GPUs that compute one pass together, where these are several: see
    /// [`parallel`](crate::compute::parallel).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor_parallel: Option<NonZeroU32>,
}

impl Default for Recipe {
    /// What a pipeline that says nothing of it has.
    fn default() -> Recipe {
        Recipe {
            gemm: Format::E4m3,
            codes: Codes::Made,
            scale: Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor },
            accumulate: Accumulate::Promoted,
            output: Format::Bf16,
            chip: ChipName::Auto,
            stream: None,
            engine: None,
            emulate: None,
            pin: Pin::NONE,
            kv_cache: None,
            tensor_parallel: None,
        }
    }
}

impl Serialize for Recipe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.codes.are_made() {
            return Recipe::serialize(self, serializer);
        }
        let json = Recipe::serialize(self, serde_json::value::Serializer);
        let mut json = json.map_err(serde::ser::Error::custom)?;
        if let Some(recipe) = json.as_object_mut() {
            recipe.shift_remove("scale");
        }
        json.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Recipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Recipe, D::Error> {
        let json = serde_json::Value::deserialize(deserializer)?;
        let has_scale = json.get("scale").is_some();
        let recipe = Recipe::deserialize(json).map_err(serde::de::Error::custom)?;
        match has_scale || !recipe.codes.are_made() {
            true => Ok(recipe),
            false => Err(serde::de::Error::missing_field("scale")),
        }
    }
}

impl Recipe {
    /// What a manifest's recipe is that says an engine and no more.
    pub fn of_engine(kernels: EngineKernels, stream: Format) -> Recipe {
        let scale = kernels.linear.first().and_then(Scale::of);
        let blocks = |scale: &Scale| scale.activation == ActivationScale::Block128;
        let default = Recipe::default();
        Recipe {
            gemm: if scale.is_some() { Format::E4m3 } else { stream },
            codes: Codes::Made,
            scale: scale.unwrap_or(default.scale),
            accumulate: match scale {
                Some(scale) if !blocks(&scale) => Accumulate::Fast,
                _ => default.accumulate,
            },
            output: stream,
            chip: ChipName::Hopper,
            stream: Some(stream),
            engine: Some(kernels),
            emulate: None,
            pin: Pin::NONE,
            kv_cache: None,
            tensor_parallel: None,
        }
    }
}

impl Recipe {
    /// GPUs that compute one pass together.
    pub fn ranks(&self) -> usize {
        self.tensor_parallel.map_or(1, |ranks| ranks.get() as usize)
    }

    /// The recipe with scales of another granularity; of an engine by that kernel of the same
    /// engine which makes such scales. Nothing where it has none.
    pub fn with_scale(&self, scale: Scale) -> Option<Recipe> {
        let Some(kernels) = self.engine else { return Some(Recipe { scale, ..*self }) };
        let of_vllm =
            [LinearKernel::VllmFp8, LinearKernel::VllmFp8Channel, LinearKernel::VllmFp8Block];
        let own = kernels.linear.first().filter(|own| of_vllm.contains(own))?;
        let other = of_vllm.into_iter().find(|kernel| Scale::of(*kernel) == Some(scale))?;
        let linear = Choices::one(other);
        let engine = Some(EngineKernels { linear, ..kernels });
        (other != own).then_some(Recipe { scale, engine, ..*self })
    }
}

impl Recipe {
    /// The block-scaled format of both operands, where that is what is multiplied.
    pub fn blocks(&self) -> Option<BlockFormat> {
        BlockFormat::ALL
            .into_iter()
            .find(|format| format.element() == self.gemm && Scale::of_blocks(*format) == self.scale)
    }

    /// What is multiplied, as manifests and reports name it.
    pub fn operands(&self) -> &'static str {
        self.blocks().map_or(self.gemm.name(), BlockFormat::name)
    }

    /// Whether operands carry scales.
    pub fn is_scaled(&self) -> bool {
        self.gemm.is_scaled() || self.blocks().is_some()
    }
}

impl Scale {
    /// The scales of a block-scaled format.
    pub const fn of_blocks(format: BlockFormat) -> Scale {
        match format {
            BlockFormat::Nvfp4 => {
                Scale { weight: WeightScale::Nv, activation: ActivationScale::Nv }
            }
            _ => Scale { weight: WeightScale::Mx, activation: ActivationScale::Mx },
        }
    }

    /// What a pipeline has that says nothing of it.
    fn usual() -> Scale {
        Recipe::default().scale
    }

    /// The scales of an engine's FP8 product; nothing where it multiplies values of the
    /// stream's type.
    pub fn of(kernel: LinearKernel) -> Option<Scale> {
        let (weight, activation) = match kernel {
            LinearKernel::Cublas | LinearKernel::VllmInt8 | LinearKernel::GgmlCuda => return None,
            LinearKernel::VllmFp8 => (WeightScale::Tensor, ActivationScale::Token),
            LinearKernel::VllmFp8Channel
            | LinearKernel::SglangFp8
            | LinearKernel::TorchaoFp8Row => (WeightScale::Channel, ActivationScale::Token),
            LinearKernel::VllmFp8Block => (WeightScale::Block128, ActivationScale::Block128),
        };
        Some(Scale { weight, activation })
    }
}

/// What a recipe insists on of the GEMM library's algorithm; what it leaves open
/// is picked by rule. The numbers are cuBLASLt's own (`CUBLASLT_ALGO_CONFIG_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// The algorithm's id.
    pub algorithm: Option<u32>,
    /// The tile's id.
    pub tile: Option<u32>,
    /// The stages' id.
    pub stages: Option<u32>,
    /// Parts that K is cut into; 1 if it is left open, so that the emulated arm
    /// needs no device to know the order of additions.
    pub split_k: Option<NonZeroU32>,
}

impl Pin {
    /// Nothing is pinned.
    pub const NONE: Pin = Pin { algorithm: None, tile: None, stages: None, split_k: None };

    /// Whether everything is left open.
    pub fn is_empty(&self) -> bool {
        *self == Pin::NONE
    }

    /// Parts that K is cut into.
    pub fn parts(&self) -> u32 {
        self.split_k.map_or(1, NonZeroU32::get)
    }
}

/// A named tensor inside the model, such as `blk.7.attn_norm`; f32 `[tokens, width]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Site(pub String);

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A stage's name, as its manifest's `id` gives it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StageId(pub String);

impl std::fmt::Display for StageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A site of another stage's reference arm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputRef {
    /// The stage that made it.
    pub stage: StageId,
    /// The site within that stage.
    pub site: Site,
}

/// A tensor in a file: safetensors, NumPy, GGUF, or raw little-endian values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileTensor {
    /// The file.
    pub file: PathBuf,
    /// The tensor's name; a `.npy` or raw file has one tensor without a name.
    pub tensor: Option<String>,
    /// How its elements are to be read, where the file does not say: raw files
    /// always, and FP8 or bf16 codes that a file keeps as plain integers.
    pub format: Option<Format>,
    /// Its shape, where the file does not say.
    pub shape: Option<Vec<usize>>,
    /// What its values are to be multiplied with.
    pub scale: Option<FileScale>,
}

/// The scale of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileScale {
    /// A number, as its f32 bits.
    Bits(u32),
    /// A tensor of the same file: one value, one per row, or one per block.
    Tensor(String),
}

/// Where the `recorded` arm's tensors lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The file.
    pub file: PathBuf,
    /// Which tensor a site's is. A `*` in both stands for the layer's number, `{*+1}` for
    /// the next one's, and `{class}` for the class of a module. A name may end with columns, as `[0:576]`, or with `[q]`, `[k]`, `[v]`,
    /// `[gate]` or `[up]`: a part of a fused product. Sites without an entry have their own names in the file.
    pub names: BTreeMap<String, String>,
    /// How elements are to be read, where the file does not say.
    pub format: Option<Format>,
    /// The shape, where the file does not say: of a raw file.
    pub shape: Option<Vec<usize>>,
}

impl Recorded {
    /// The tensor that says which tokens a recording is of, where it has one.
    pub const IDS: &str = "ids";

    /// The tensor of a site. A pattern fits as a whole or not at all: `blk.*.q`
    /// is neither `blk.1.q_rope` nor `x.blk.1.q`.
    pub fn tensor_of(&self, site: &Site) -> String {
        if let Some(name) = self.names.get(&site.0) {
            return name.clone();
        }
        if let Some((layer, inner)) = in_layer(&site.0)
            && let Some(name) = self.names.get(&format!("blk.*.{inner}"))
        {
            return LayerNumber::put(name, layer);
        }
        site.0.clone()
    }
}

/// Where a name's pattern has the layer's number: `*`, or `{*+1}` and `{*-1}` for names that
/// count otherwise, as the hidden states of transformers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerNumber<'a> {
    /// What stands before it.
    pub before: &'a str,
    /// What is added to the layer's number.
    pub offset: i64,
    /// What stands after it.
    pub after: &'a str,
}

impl<'a> LayerNumber<'a> {
    /// The first one of a pattern.
    pub fn find(pattern: &'a str) -> Option<LayerNumber<'a>> {
        let (before, after) = pattern.split_once('*')?;
        let plain = LayerNumber { before, offset: 0, after };
        let Some(before) = before.strip_suffix('{') else { return Some(plain) };
        let offset = after.split_once('}').and_then(|(offset, after)| {
            let signed = offset.starts_with(['+', '-']) || offset.is_empty();
            let offset = if offset.is_empty() { 0 } else { offset.parse().ok()? };
            signed.then_some(LayerNumber { before, offset, after })
        });
        Some(offset.unwrap_or(plain))
    }

    /// How many a pattern has.
    pub fn count(pattern: &str) -> usize {
        pattern.matches('*').count()
    }

    /// The pattern with a layer's number.
    fn put(pattern: &str, layer: u32) -> String {
        match LayerNumber::find(pattern) {
            None => pattern.to_owned(),
            Some(LayerNumber { before, offset, after }) => {
                format!("{before}{}{after}", i64::from(layer).saturating_add(offset))
            }
        }
    }

    /// Whether a name is the pattern with the number of some layer.
    pub fn fits(&self, name: &str) -> bool {
        let Some(rest) = name.strip_prefix(self.before) else { return false };
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        // What stands behind it may begin with a digit.
        (1..=digits).any(|end| is_of_class(&rest[end..], self.after))
    }
}

/// What stands in a tensor's name for the class of its module, where a dump's names have it.
const CLASS: &str = "{class}";

/// Whether a name is the written one, in which `{class}` stands for any one word without dots.
pub fn is_of_class(name: &str, written: &str) -> bool {
    let Some((before, after)) = written.split_once(CLASS) else { return name == written };
    let class = name.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
    class.is_some_and(|class| !class.is_empty() && !class.contains('.'))
}

/// A program of the user's that is asked for tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// What is started; its inputs and variables are all that it sees.
    pub program: Command,
    /// What the engine is, as its user declares it.
    pub version: String,
    /// Which tensor a site's is, as for [`Recorded::names`].
    pub names: BTreeMap<String, String>,
    /// The engine whose arithmetic the emulated arm follows, if it is a known one.
    pub emulate: Option<Engine>,
}

impl External {
    /// Seconds until a program is killed whose manifest says nothing.
    pub const DEFAULT_TIMEOUT: u64 = 3600;
    /// The file in which a program finds what is wanted.
    pub const REQUEST: &str = "request.json";
    /// The file of the tensors that a single op reads.
    pub const INPUTS: &str = "inputs.safetensors";
    /// The file that a program leaves.
    pub const TENSORS: &str = "tensors.safetensors";
}

/// An engine whose arithmetic is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Engine {
    /// llama.cpp on a CPU: activations rounded to 8 bits.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

impl Engine {
    /// All engines with the names that manifests use.
    pub const ALL: [(&'static str, Engine); 1] = [("llama.cpp", Engine::LlamaCpp)];
}

/// How generated values are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distribution {
    /// Standard normal.
    Normal,
    /// Student's t with three degrees of freedom.
    HeavyTailed,
    /// Normal, and every 64th column 60 times as large, as LLM activations are.
    OutlierChannels,
    /// Normal, and nine of ten values are zero.
    Sparse,
    /// Normal times 2^-130: f32 subnormals, most of them.
    Subnormal,
}

impl Distribution {
    /// All distributions with the names that manifests use.
    pub const ALL: [(&'static str, Distribution); 5] = [
        ("normal", Distribution::Normal),
        ("heavy-tailed", Distribution::HeavyTailed),
        ("outlier-channels", Distribution::OutlierChannels),
        ("sparse", Distribution::Sparse),
        ("subnormal", Distribution::Subnormal),
    ];
}

/// A generated tensor; the op says how wide it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generated {
    /// Its values.
    pub generate: Distribution,
    /// Its rows: tokens.
    pub rows: usize,
    /// The stage's seed.
    pub seed: u64,
}

/// The tensor that an op reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Input {
    /// A site of another stage.
    Site(InputRef),
    /// A tensor of a file.
    File(FileTensor),
    /// Numbers from a seed.
    Generated(Generated),
}

impl Input {
    /// The tensor of a file, if it is one.
    pub fn file(&self) -> Option<&FileTensor> {
        match self {
            Input::File(tensor) => Some(tensor),
            Input::Site(_) | Input::Generated(_) => None,
        }
    }

    /// The other stage's site, if it is one.
    pub fn site(&self) -> Option<&InputRef> {
        match self {
            Input::Site(site) => Some(site),
            Input::File(_) | Input::Generated(_) => None,
        }
    }
}

/// Which sites a forward pass keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capture {
    /// The logits of every token, alone and within a longer batch.
    #[default]
    Logits,
    /// The logits of the last token, alone and within a longer batch: what a generation reads. No
    /// other token's are computed.
    LastLogits,
    /// Every site of every layer.
    EverySite,
}

impl Capture {
    /// Whether a pass keeps nothing but logits.
    pub fn is_of_logits(self) -> bool {
        self != Capture::EverySite
    }

    /// Which of so many tokens have logits.
    pub fn with_logits(self, tokens: usize) -> Range<usize> {
        if self == Capture::LastLogits { tokens.saturating_sub(1)..tokens } else { 0..tokens }
    }
}

/// What a stage computes, with its parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// The whole transformer over the prompt.
    Forward {
        /// Sites to keep.
        capture: Capture,
        /// How often each arm computes it; above one, the repeats must be bit-identical.
        repeats: u32,
        /// Tokens to decode greedily after the prompt, with a KV cache.
        decode: u32,
        /// The type in which attention keeps keys and values, which adds sites: the recipe's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kv_cache: Option<Format>,
    },
    /// Token rows looked up in an embedding matrix; site `embed`.
    Embed {
        /// The embedding tensor, without `.weight`.
        weight: String,
    },
    /// Root mean square normalisation; the site is the weight's name.
    RmsNorm {
        /// The tensor to normalise.
        input: Input,
        /// The gain, without `.weight`.
        weight: String,
    },
    /// `y = x w^T + b` for each weight; the sites are the projections' own.
    Matmul {
        /// The activation, `[tokens, K]`.
        input: Input,
        /// The weights, without `.weight`, each `[M, K]`.
        weights: Vec<String>,
    },
    /// `y = x w^T` of two operands whose codes and scales lie in files; site `y`.
    /// It reads no model.
    Gemm {
        /// The activation's codes, `[N, K]`.
        x: FileTensor,
        /// The weight's codes, `[M, K]`.
        w: FileTensor,
    },
    /// Rotary position embedding of the queries or keys of one layer.
    Rope {
        /// The projections, `[tokens, heads * head_dim]`; row `i` stands at position `i`.
        input: Input,
        /// `blk.N.q_rope` or `blk.N.k_rope`.
        site: Site,
    },
    /// Causal attention of one layer.
    Attention {
        /// Rotated queries, `[tokens, heads * head_dim]`.
        q: Input,
        /// Rotated keys, `[tokens, kv_heads * head_dim]`.
        k: Input,
        /// Values, `[tokens, kv_heads * head_dim]`.
        v: Input,
        /// `blk.N.attn`.
        site: Site,
    },
    /// `silu(gate) * up` of one layer.
    Swiglu {
        /// The gate's projection.
        gate: Input,
        /// The other projection.
        up: Input,
        /// `blk.N.ffn_swiglu`.
        site: Site,
    },
    /// Tensors that are there already, held against each other: each arm's is read.
    Compare {
        /// Where they stand; any name, a site's if it is one.
        site: Site,
        /// Each arm's tensor.
        sides: BTreeMap<Arm, Input>,
    },
    /// A program that reads files and writes files; it makes no tensors.
    Command(Command),
}

/// A program with everything that it may see. Paths are seen from the project's
/// folder, the one that holds the folder of stages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The program and its arguments; nothing expands them.
    pub argv: Vec<String>,
    /// Files and folders that it reads, sorted; absolute ones may lie elsewhere.
    pub inputs: Vec<String>,
    /// Files that it must write, sorted.
    pub outputs: Vec<String>,
    /// Variables that it sees as the runner's own environment has them, sorted.
    pub env: Vec<String>,
    /// Variables that it sees with these values.
    pub set: BTreeMap<String, String>,
    /// Seconds until it is killed.
    pub timeout: Option<u64>,
    /// How often it is started again after a failure.
    #[serde(default, skip_serializing_if = "is_none")]
    pub retries: u32,
    /// Exit statuses that count as a result; others are judged, and it runs again.
    pub accepts: Vec<i32>,
    /// What is counted in its output.
    pub patterns: Vec<OutputPattern>,
    /// The blake3 hashes that outputs must have.
    pub digests: BTreeMap<String, String>,
}

/// A regular expression whose matches in a text are counted; the site is `match.<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputPattern {
    /// The name that contracts and reports use.
    pub name: String,
    /// `stdout`, `stderr` or one of the outputs.
    pub of: String,
    /// The expression; `^` and `$` mean a line's ends.
    pub pattern: String,
}

fn is_none(count: &u32) -> bool {
    *count == 0
}

impl Command {
    /// The site of the exit status.
    pub fn exit_site() -> Site {
        Site("exit".to_owned())
    }

    /// The site of a pattern's matches.
    pub fn match_site(pattern: &str) -> Site {
        Site(format!("match.{pattern}"))
    }

    /// The site of an output's digest.
    pub fn output_site(path: &str) -> Site {
        Site(format!("output.{path}"))
    }
}

impl Arm {
    /// All arms that a manifest can ask for, the most trusted first.
    pub const ALL: [Arm; 5] =
        [Arm::Reference, Arm::Emulated, Arm::Device, Arm::Recorded, Arm::External];

    /// All that can be asked for to be measured anew: the arms of a manifest, and commands.
    pub const MEASURED: [Arm; 6] =
        [Arm::Reference, Arm::Emulated, Arm::Device, Arm::Recorded, Arm::External, Arm::Command];

    /// The arms that a stage has unless it says otherwise.
    pub const USUAL: [Arm; 3] = [Arm::Reference, Arm::Emulated, Arm::Device];

    /// The name that manifests, contracts, commands and reports use.
    pub fn name(self) -> &'static str {
        match self {
            Arm::Reference => "reference",
            Arm::Emulated => "emulated",
            Arm::Device => "device",
            Arm::Recorded => "recorded",
            Arm::External => "external",
            Arm::Command => "command",
        }
    }
}

impl std::fmt::Display for Arm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Arm {
    type Err = String;

    fn from_str(text: &str) -> Result<Arm, String> {
        Arm::ALL.into_iter().find(|arm| arm.name() == text).ok_or_else(|| {
            format!(
                "no arm is called `{text}`; write `reference`, `emulated`, `device`, `recorded` \
                 or `external`"
            )
        })
    }
}

/// What one side of a comparison reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Stream {
    /// The tensors of an arm; `emulated`.
    Arm(Arm),
    /// The reference computed op by op on that arm's own inputs, which leaves
    /// the arm's local error and nothing inherited; `reference@emulated`.
    Anchored(Arm),
    /// The engine's kernels computed op by op on that arm's own inputs, of each op the one
    /// that fits best; `emulated@recorded`.
    Predicted(Arm),
}

impl Stream {
    /// Both sides of what a command's outcome is measured between: nothing stands
    /// against it but the contract's bound.
    pub const OUTCOME: Stream = Stream::Arm(Arm::Command);

    /// All streams of tensors, the most trusted first.
    pub const ALL: [Stream; 12] = [
        Stream::Arm(Arm::Reference),
        Stream::Anchored(Arm::Emulated),
        Stream::Anchored(Arm::Device),
        Stream::Anchored(Arm::Recorded),
        Stream::Anchored(Arm::External),
        Stream::Predicted(Arm::Device),
        Stream::Predicted(Arm::Recorded),
        Stream::Predicted(Arm::External),
        Stream::Arm(Arm::Emulated),
        Stream::Arm(Arm::Device),
        Stream::Arm(Arm::Recorded),
        Stream::Arm(Arm::External),
    ];

    /// The arm whose tensors these are, or on whose inputs they were computed.
    pub fn arm(self) -> Arm {
        match self {
            Stream::Arm(arm) | Stream::Anchored(arm) | Stream::Predicted(arm) => arm,
        }
    }

    /// The same stream where `written` is read as `arm`: what a file or a program
    /// holds stands for the device that made it.
    pub fn with(self, written: Arm, arm: Arm) -> Stream {
        match self {
            Stream::Arm(stream) if stream == written => Stream::Arm(arm),
            Stream::Anchored(stream) if stream == written => Stream::Anchored(arm),
            Stream::Predicted(stream) if stream == written => Stream::Predicted(arm),
            other => other,
        }
    }
}

impl std::fmt::Display for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stream::Arm(arm) => write!(f, "{arm}"),
            Stream::Anchored(arm) => write!(f, "reference@{arm}"),
            Stream::Predicted(arm) => write!(f, "emulated@{arm}"),
        }
    }
}

impl std::str::FromStr for Stream {
    type Err = String;

    fn from_str(text: &str) -> Result<Stream, String> {
        let mut known = Stream::ALL.into_iter().chain([Stream::OUTCOME]);
        known.find(|stream| stream.to_string() == text).ok_or_else(|| {
            format!(
                "no stream is called `{text}`; write an arm (`reference`, `emulated`, `device`, \
                 `recorded`, `external`), or `reference@` or `emulated@` and an arm"
            )
        })
    }
}

impl From<Stream> for String {
    fn from(stream: Stream) -> String {
        stream.to_string()
    }
}

impl TryFrom<String> for Stream {
    type Error = String;

    fn try_from(text: String) -> Result<Stream, String> {
        text.parse()
    }
}

/// The site of the prompt's logits where more tokens follow it in the same pass.
pub const LOGITS_IN_BATCH: &str = "logits_in_batch";

/// Where a site stands in the flow of a forward pass: a number per layer, and one within
/// it. Sites that no forward pass makes stand at its beginning.
pub fn flow(site: &Site) -> (u64, usize) {
    let end = u64::MAX - 1;
    match (in_layer(&site.0), site.0.as_str()) {
        (Some((layer, inner)), _) => {
            let place = LAYER_SITES.iter().position(|name| *name == inner);
            (u64::from(layer) + 1, place.unwrap_or(LAYER_SITES.len()))
        }
        (None, "output_norm") => (end, 0),
        (None, "logits_raw") => (end, 1),
        (None, "logits_scaled") => (end, 2),
        (None, "logits") => (end, 3),
        (None, LOGITS_IN_BATCH) => (end, 4),
        (None, "embed_scaled") => (0, 1),
        (None, _) => (0, 0),
    }
}

/// Which projection's output a layer's weight makes: weight, site.
pub const LAYER_PROJECTIONS: [(&str, &str); 19] = [
    ("attn_q", "q"),
    ("attn_k", "k"),
    ("attn_v", "v"),
    ("attn_output", "attn_out"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_up", "ffn_up"),
    ("ffn_down", "ffn_down"),
    ("attn_q_a", "q_a"),
    ("attn_q_b", "q"),
    ("attn_kv_a_mqa", "kv_a"),
    ("attn_kv_b", "kv"),
    ("ssm_in", "lin_qkvz"),
    ("ssm_ba", "lin_ba"),
    ("ssm_out", "attn_out"),
    ("ffn_gate_inp", "ffn_router"),
    ("ffn_gate_shexp", "ffn_shared_gate"),
    ("ffn_up_shexp", "ffn_shared_up"),
    ("ffn_down_shexp", "ffn_shared_down"),
    ("ffn_gate_inp_shexp", "ffn_shared_router"),
];

/// The sites that projections of a layer write, each once.
pub fn projection_sites() -> Vec<&'static str> {
    let mut sites: Vec<&str> = Vec::new();
    for (_, site) in LAYER_PROJECTIONS {
        if !sites.contains(&site) {
            sites.push(site);
        }
    }
    sites
}

/// `blk.7.attn_q` taken apart: the layer and the name within it.
/// Leading zeros and signs are not a layer's number.
pub fn in_layer(name: &str) -> Option<(u32, &str)> {
    let (layer, inner) = name.strip_prefix("blk.")?.split_once('.')?;
    let number = layer.parse().ok()?;
    (number_is_canonical(layer) && !inner.is_empty()).then_some((number, inner))
}

fn number_is_canonical(text: &str) -> bool {
    text == "0" || (!text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The site that a projection writes: `blk.0.attn_q` -> `blk.0.q`, `output` -> `logits`.
pub fn site_of_projection(weight: &str) -> Option<Site> {
    if weight == "output" {
        return Some(Site("logits".into()));
    }
    let (layer, inner) = in_layer(weight)?;
    let (_, site) = LAYER_PROJECTIONS.iter().find(|(name, _)| *name == inner)?;
    Some(Site(format!("blk.{layer}.{site}")))
}

/// The site that a normalisation over the whole width writes; it has the gain's name.
pub fn site_of_norm(weight: &str) -> Option<Site> {
    let known = match in_layer(weight) {
        Some((_, inner)) => matches!(inner, "attn_norm" | "ffn_norm"),
        None => weight == "output_norm",
    };
    known.then(|| Site(weight.into()))
}

impl Op {
    /// The name of the manifest's table.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Forward { .. } => "forward",
            Op::Embed { .. } => "embed",
            Op::RmsNorm { .. } => "rms_norm",
            Op::Matmul { .. } | Op::Gemm { .. } => "matmul",
            Op::Rope { .. } => "rope",
            Op::Attention { .. } => "attention",
            Op::Swiglu { .. } => "swiglu",
            Op::Compare { .. } => "compare",
            Op::Command(_) => "command",
        }
    }

    /// The type in which a forward pass keeps keys and values; nothing of one that keeps them
    /// whole, and of other ops.
    pub fn kv_cache(&self) -> Option<Format> {
        match self {
            Op::Forward { kv_cache, .. } => *kv_cache,
            _ => None,
        }
    }

    /// The tensors that it reads besides the model's, by their keys.
    pub fn inputs(&self) -> Vec<(&'static str, &Input)> {
        match self {
            Op::Forward { .. } | Op::Embed { .. } | Op::Gemm { .. } | Op::Command(_) => Vec::new(),
            Op::RmsNorm { input, .. } | Op::Matmul { input, .. } | Op::Rope { input, .. } => {
                vec![("input", input)]
            }
            Op::Attention { q, k, v, .. } => vec![("q", q), ("k", k), ("v", v)],
            Op::Swiglu { gate, up, .. } => vec![("gate", gate), ("up", up)],
            Op::Compare { sides, .. } => {
                sides.iter().map(|(arm, input)| (arm.name(), input)).collect()
            }
        }
    }

    /// The other stages' tensors that it reads.
    pub fn input_refs(&self) -> Vec<&InputRef> {
        self.inputs().into_iter().filter_map(|(_, input)| input.site()).collect()
    }

    /// Gives every generated input the stage's seed.
    pub fn seed_with(&mut self, seed: u64) {
        let inputs: Vec<&mut Input> = match self {
            Op::RmsNorm { input, .. } | Op::Matmul { input, .. } | Op::Rope { input, .. } => {
                vec![input]
            }
            Op::Attention { q, k, v, .. } => vec![q, k, v],
            Op::Swiglu { gate, up, .. } => vec![gate, up],
            Op::Compare { sides, .. } => sides.values_mut().collect(),
            Op::Forward { .. } | Op::Embed { .. } | Op::Gemm { .. } | Op::Command(_) => Vec::new(),
        };
        for input in inputs {
            if let Input::Generated(generated) = input {
                generated.seed = seed;
            }
        }
    }

    /// Whether it reads a model at all.
    pub fn reads_model(&self) -> bool {
        !matches!(self, Op::Gemm { .. } | Op::Compare { .. } | Op::Command(_))
    }

    /// How often each arm computes it.
    pub fn repeats(&self) -> u32 {
        match self {
            Op::Forward { repeats, .. } => *repeats,
            _ => 1,
        }
    }

    /// The program, where the op is one.
    pub fn command(&self) -> Option<&Command> {
        match self {
            Op::Command(command) => Some(command),
            _ => None,
        }
    }
}
