//! An engine as data: the type in which it passes tensors from op to op, and for each op the
//! kernels that it may run. The shipped ones lie in `engines/`; another one is another file.
//!
//! It knows the names of kernels, not what they compute.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::dtype::Format;
use crate::text::Shown;

/// Kernels that an op may be; the first one stands where nothing tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "Vec<T>", try_from = "Vec<T>", bound(serialize = "T: Copy + Serialize"))]
pub struct Choices<T: Copy>([Option<T>; MOST_CHOICES]);

/// The most kernels that one op may list.
const MOST_CHOICES: usize = 6;

impl<T: Copy> Choices<T> {
    /// All of them, in their order.
    pub fn all(&self) -> impl Iterator<Item = T> + '_ {
        self.0.iter().flatten().copied()
    }

    /// The first one.
    pub fn first(&self) -> Option<T> {
        self.all().next()
    }
}

impl<T: Copy> From<Choices<T>> for Vec<T> {
    fn from(choices: Choices<T>) -> Vec<T> {
        choices.all().collect()
    }
}

impl<T: Copy> TryFrom<Vec<T>> for Choices<T> {
    type Error = String;

    fn try_from(listed: Vec<T>) -> Result<Choices<T>, String> {
        if listed.is_empty() || listed.len() > MOST_CHOICES {
            return Err(format!(
                "an op lists 1 to {MOST_CHOICES} kernels, and {} are here",
                listed.len()
            ));
        }
        let mut choices = [None; MOST_CHOICES];
        choices.iter_mut().zip(listed).for_each(|(choice, kernel)| *choice = Some(kernel));
        Ok(Choices(choices))
    }
}

/// Kernels of a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinearKernel {
    /// cuBLAS and cuBLASLt: one chain along K, or K in parts.
    Cublas,
    /// vLLM's online FP8: activations per token, one scale for a weight.
    VllmFp8,
    /// The same with a scale for each output of a weight.
    VllmFp8Channel,
    /// vLLM's online FP8 in blocks of 128, by DeepGEMM.
    VllmFp8Block,
}

impl LinearKernel {
    /// Whether it multiplies FP8 codes.
    pub fn is_fp8(self) -> bool {
        self != LinearKernel::Cublas
    }
}

/// Kernels of RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormKernel {
    /// Composed of tensor operations, as transformers' models do.
    Transformers,
    /// `torch.nn.functional.rms_norm`.
    TorchFused,
    /// vLLM's.
    Vllm,
}

/// Kernels of rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RopeKernel {
    /// Tensor operations; the inverse frequencies were cast with the model.
    Transformers,
    /// The same with the inverse frequencies in f32.
    #[serde(rename = "transformers-f32-frequencies")]
    TransformersF32Frequencies,
    /// A table in the stream's type, rotated in f32 and rounded once.
    Vllm,
    /// A table in f32, rotated in f32 and rounded once.
    Sglang,
}

/// Kernels of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKernel {
    /// Two products and a softmax, each rounded.
    Eager,
    /// FlashAttention 2, as PyTorch's `sdpa` runs it.
    #[serde(rename = "flash-2")]
    Flash2,
    /// FlashAttention 3.
    #[serde(rename = "flash-3")]
    Flash3,
    /// cuDNN, as PyTorch's `sdpa` runs it on Hopper.
    Cudnn,
}

/// Kernels of `silu(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwigluKernel {
    /// SiLU is rounded before the product.
    Rounded,
    /// It is not.
    Unrounded,
}

/// Into how many parts a library cuts K where a product has this shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitK {
    /// Rows of the activation.
    pub tokens: usize,
    /// Rows of the weight.
    pub outputs: usize,
    /// Elements of K.
    pub inner: usize,
    /// Parts of K.
    pub parts: u32,
}

/// The kernels that an engine may run, op by op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineKernels {
    /// Of a matrix product.
    pub linear: Choices<LinearKernel>,
    /// Of the product that makes the logits, where it is another: engines that quantise
    /// leave the output matrix as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Choices<LinearKernel>>,
    /// Of RMSNorm.
    pub rms_norm: Choices<NormKernel>,
    /// Of rotary position embedding.
    pub rope: Choices<RopeKernel>,
    /// Of attention.
    pub attention: Choices<AttentionKernel>,
    /// Of `silu(gate) * up`.
    pub swiglu: Choices<SwigluKernel>,
    /// Shapes of products whose K the library cuts; of others it is one chain.
    #[serde(default, skip_serializing_if = "Splits::is_empty")]
    pub split_k: Splits,
    /// How many of the last tokens came in steps of their own, with a KV cache. A recipe says
    /// it; an engine's file does not.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub decoded: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl EngineKernels {
    /// The kernels of a product with the weight of that name.
    pub fn linear_of(&self, weight: &str) -> &Choices<LinearKernel> {
        let makes_logits = matches!(weight, "output.weight" | "token_embd.weight");
        self.output.as_ref().filter(|_| makes_logits).unwrap_or(&self.linear)
    }
}

/// A list of shapes, as an engine's file has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "Vec<SplitK>", try_from = "Vec<SplitK>")]
pub struct Splits([Option<SplitK>; MOST_SPLITS]);

/// The most shapes that an engine's file lists: a model has a handful.
pub const MOST_SPLITS: usize = 16;

impl Splits {
    /// Whether every product is one chain.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The parts of a product of this shape.
    pub fn parts(&self, tokens: usize, outputs: usize, inner: usize) -> u32 {
        let listed = self.0.iter().flatten();
        let mut fitting = listed
            .filter(|split| (split.tokens, split.outputs, split.inner) == (tokens, outputs, inner));
        fitting.next().map_or(1, |split| split.parts)
    }
}

impl From<Splits> for Vec<SplitK> {
    fn from(splits: Splits) -> Vec<SplitK> {
        splits.0.into_iter().flatten().collect()
    }
}

impl TryFrom<Vec<SplitK>> for Splits {
    type Error = String;

    fn try_from(listed: Vec<SplitK>) -> Result<Splits, String> {
        if listed.len() > MOST_SPLITS {
            return Err(format!(
                "`split_k` lists at most {MOST_SPLITS} shapes, and {} are here",
                listed.len()
            ));
        }
        if let Some(split) = listed.iter().find(|split| split.parts == 0 || split.parts > 64) {
            return Err(format!("K cannot be cut into {} parts", split.parts));
        }
        let shape = |split: &SplitK| [split.tokens, split.outputs, split.inner];
        let twice = |(place, split): &(usize, &SplitK)| {
            listed[..*place].iter().any(|earlier| shape(earlier) == shape(split))
        };
        if let Some((_, split)) = listed.iter().enumerate().find(twice) {
            let [tokens, outputs, inner] = shape(split);
            return Err(format!(
                "`split_k` lists tokens = {tokens}, outputs = {outputs}, inner = {inner} twice"
            ));
        }
        let mut splits = [None; MOST_SPLITS];
        splits.iter_mut().zip(listed).for_each(|(place, split)| *place = Some(split));
        Ok(Splits(splits))
    }
}

/// An engine's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineFile {
    /// Its name.
    pub name: String,
    /// The type of its stream, where a recipe says no other.
    pub stream: Format,
    /// Its kernels.
    pub kernels: EngineKernels,
}

/// The engines that ship: their names and their files.
pub const SHIPPED: [(&str, &str); 6] = [
    ("transformers", include_str!("../engines/transformers.toml")),
    ("vllm", include_str!("../engines/vllm.toml")),
    ("vllm-fp8", include_str!("../engines/vllm-fp8.toml")),
    ("vllm-fp8-channel", include_str!("../engines/vllm-fp8-channel.toml")),
    ("vllm-fp8-block", include_str!("../engines/vllm-fp8-block.toml")),
    ("sglang", include_str!("../engines/sglang.toml")),
];

impl EngineFile {
    /// The engine of that name, or of that file, seen from `folder`.
    ///
    /// # Errors
    /// In words: no such engine, or what is wrong with its file.
    pub fn find(name: &str, folder: &Path) -> Result<EngineFile, String> {
        if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
            return EngineFile::parse(text, name);
        }
        if !name.ends_with(".toml") {
            let known: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
            return Err(format!(
                "no engine is called `{name}`; it is one of {}, or a file as `../engines/mine.toml`",
                known.join(", ")
            ));
        }
        /// Larger files are no engines.
        const LARGEST: u64 = 1 << 16;
        let path = folder.join(name);
        let about = std::fs::metadata(&path);
        let about = about.map_err(|error| format!("cannot read `{}`: {error}", path.shown()))?;
        if !about.is_file() || about.len() > LARGEST {
            return Err(format!("`{}` is no engine's file of TOML", path.shown()));
        }
        let text = crate::files::read_text(&path, LARGEST);
        let text = text.map_err(|error| format!("cannot read `{}`: {error}", path.shown()))?;
        EngineFile::parse(&text, &path.display().to_string())
    }

    fn parse(text: &str, name: &str) -> Result<EngineFile, String> {
        let file: EngineFile =
            toml::from_str(text).map_err(|error| format!("engine `{name}`: {error}"))?;
        if file.kernels.decoded > 0 {
            return Err(format!(
                "engine `{name}`: `decoded` is no key of an engine's file; write it in the recipe, \
                 beside `engine`"
            ));
        }
        match file.stream {
            Format::Bf16 | Format::F16 => Ok(file),
            other => Err(format!(
                "engine `{name}`: its stream is `{other}`; the known kernels pass `bf16` or `f16`"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_engine_is_read_and_named_as_its_file() {
        for (name, _) in SHIPPED {
            let engine = EngineFile::find(name, Path::new(".")).expect("an engine");
            assert_eq!(engine.name, name);
            let text = toml::to_string(&engine).expect("TOML");
            assert_eq!(EngineFile::parse(&text, name).expect("an engine"), engine);
        }
    }

    #[test]
    fn an_unknown_engine_kernel_or_key_is_refused_in_words() {
        let refused = |name: &str| EngineFile::find(name, Path::new(".")).expect_err("refused");
        assert!(refused("trnsformers").contains("transformers, vllm, vllm-fp8, "));
        assert!(refused("nowhere.toml").contains("cannot read `./nowhere.toml`"));
        let text = SHIPPED[0].1.replace("\"eager\"", "\"eagre\"");
        let error = EngineFile::parse(&text, "mine").expect_err("refused");
        assert!(error.contains("eagre") && error.contains("flash-2"), "{error}");
        let cut = "{ tokens = 8, outputs = 64, inner = 256, parts = 2 }";
        let text = format!("{}\nsplit_k = [{cut}, {cut}]", SHIPPED[0].1);
        let error = EngineFile::parse(&text, "mine").expect_err("refused");
        assert!(error.contains("outputs = 64, inner = 256 twice"), "{error}");
        let text = SHIPPED[0].1.replace("stream = \"bf16\"", "stream = \"e4m3\"");
        assert!(EngineFile::parse(&text, "mine").expect_err("refused").contains("e4m3"));
    }
}
