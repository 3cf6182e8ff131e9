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
    /// One kernel.
    pub fn one(kernel: T) -> Choices<T> {
        let mut all = [None; MOST_CHOICES];
        all[0] = Some(kernel);
        Choices(all)
    }

    /// All of them, in their order.
    pub fn all(&self) -> impl Iterator<Item = T> + '_ {
        self.0.iter().flatten().copied()
    }

    /// Whether there are several.
    pub fn is_open(&self) -> bool {
        self.all().nth(1).is_some()
    }

    /// The first one.
    pub fn first(&self) -> Option<T> {
        self.all().next()
    }
}

impl<T: Copy + Serialize> Choices<T> {
    /// The same with those first that a recording shows at more sites than the listed first one.
    fn led_by(self, shown: &impl Fn(&str) -> usize) -> Choices<T> {
        let sites = |kernel: &T| shown(&name_of(kernel));
        let mut all: Vec<T> = self.all().collect();
        let most = all.iter().map(sites).max().unwrap_or(0);
        if all.first().is_some_and(|first| sites(first) < most) {
            all.sort_by_key(|kernel| std::cmp::Reverse(sites(kernel)));
        }
        Choices::try_from(all).unwrap_or(self)
    }
}

/// A kernel's name as the engine's file has it.
pub fn name_of(kernel: impl Serialize) -> String {
    match serde_json::to_value(kernel) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
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
    /// SGLang's FP8: activations per token, weights per output.
    SglangFp8,
    /// torchao's dynamic FP8 of rows: activations per token, weights per output.
    TorchaoFp8Row,
    /// vLLM's of a checkpoint in INT8: activations per token, weights per output or whole.
    VllmInt8,
    /// llama.cpp's on CUDA, by the weight's type and the number of tokens.
    GgmlCuda,
}

impl LinearKernel {
    /// Whether it multiplies FP8 codes.
    pub fn is_fp8(self) -> bool {
        !matches!(self, LinearKernel::Cublas | LinearKernel::VllmInt8 | LinearKernel::GgmlCuda)
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
    /// llama.cpp's on CUDA.
    GgmlCuda,
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
    /// llama.cpp's on CUDA: no table, and fast math.
    GgmlCuda,
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
    /// FlashAttention 3, of keys that lie side by side.
    #[serde(rename = "flash-3")]
    Flash3,
    /// FlashAttention 3 over a cache in pages, as vLLM builds and calls it.
    #[serde(rename = "flash-3-paged")]
    Flash3Paged,
    /// cuDNN, as PyTorch's `sdpa` runs it on Hopper.
    Cudnn,
    /// llama.cpp's on CUDA without FlashAttention, over a cache in f16.
    #[serde(rename = "ggml-cuda-f16-cache")]
    GgmlCudaF16Cache,
    /// The same over a cache in f32.
    #[serde(rename = "ggml-cuda-f32-cache")]
    GgmlCudaF32Cache,
}

/// Kernels of `silu(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwigluKernel {
    /// SiLU is rounded before the product.
    Rounded,
    /// It is not.
    Unrounded,
    /// llama.cpp's on CUDA: fast math.
    GgmlCuda,
}

/// How a library adds a product up along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Order {
    /// Parts of K, each a chain of its own; they are added in f32.
    pub parts: u32,
    /// Elements of K in the tiles that are dealt to the parts.
    pub tile: u32,
    /// Whether each part is rounded to the stream's type before.
    pub rounded: bool,
    /// Products that one instruction adds: 16, or 8 (`mma.m16n8k8`); 1 where no tensor core
    /// multiplies, and 16 lanes add every sixteenth product in f32.
    pub instruction: u32,
    /// Where K is no multiple of 16 bytes: the tile whose rest comes first, if it is not the
    /// one that [`residue_tile`](crate::compute::engine_kernels::linear::residue_tile) says.
    pub rest: Option<u32>,
}

impl Order {
    /// One chain along K.
    pub const CHAIN: Order =
        Order { parts: 1, tile: 64, rounded: false, instruction: 16, rest: None };

    /// Whether lanes of f32 add, and no tensor core.
    pub fn is_by_lanes(&self) -> bool {
        self.instruction == 1
    }

    /// Orders that were seen, the plainest first; those that add alike are listed once.
    /// `usual_rest` is the tile whose rest comes first where an order names none. 8 products at a
    /// time, and lanes, were seen only where rows of an operand or of the result are no multiple of
    /// 8 values.
    /// `widest` is the tile of 128 bytes: 64 elements of 16 bits, 32 of TF32.
    pub fn family(
        outputs: usize,
        inner: usize,
        usual_rest: Option<usize>,
        widest: u32,
    ) -> Vec<Order> {
        /// The most parts that are tried.
        const MOST_PARTS: u32 = 16;
        let aligned = outputs.is_multiple_of(8) && inner.is_multiple_of(8);
        let instructions: &[u32] = if aligned { &[16] } else { &[16, 8] };
        let mut all = Vec::new();
        let mut rests: Vec<usize> = Vec::new();
        let listed = usual_rest.map(|_| [Some(32), Some(64), Some(128)]);
        for rest in [None].into_iter().chain(listed.into_iter().flatten()) {
            let first =
                rest.or(usual_rest.map(|tile| tile as u32)).map_or(0, |t| inner % t as usize);
            if rest.is_none() || !rests.contains(&first) {
                rests.push(first);
                let by = |&instruction: &u32| Order { instruction, rest, ..Order::CHAIN };
                all.extend(instructions.iter().map(by));
            }
        }
        for rounded in [false, true] {
            let mut lengths = Vec::new();
            for tile in [widest, 8] {
                // A part beyond the last tile would be empty.
                let tiles = inner.div_ceil(tile as usize) as u32;
                for parts in 2..=MOST_PARTS.min(tiles) {
                    let length = tiles.div_ceil(parts) * tile;
                    if length as usize >= inner || lengths.contains(&length) {
                        continue;
                    }
                    lengths.push(length);
                    let cut = Order { parts, tile, rounded, ..Order::CHAIN };
                    let by = |&instruction: &u32| Order { instruction, ..cut };
                    all.extend(instructions.iter().map(by));
                }
            }
        }
        all.extend((!aligned).then_some(Order { instruction: 1, ..Order::CHAIN }));
        all
    }

    /// It in words, after a library's name; `stream` is the type that parts are rounded to.
    pub fn in_words(&self, stream: Format) -> String {
        if self.is_by_lanes() {
            return "in 16 lanes of f32".to_owned();
        }
        let mut words = match self.parts {
            1 => "in one chain".to_owned(),
            parts => format!("in {parts} parts of K"),
        };
        if self.parts > 1 && self.rounded {
            words += &format!(" rounded to {stream}");
        }
        if self.instruction != Order::CHAIN.instruction {
            words += &format!(" of {} products at a time", self.instruction);
        }
        if self.parts > 1 && self.tile != Order::CHAIN.tile {
            words += &format!(" dealt in tiles of {}", self.tile);
        }
        if let Some(rest) = self.rest {
            words += &format!(" after the rest of tiles of {rest}");
        }
        words
    }
}

/// What a product is made of.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ProductOf {
    /// An activation and a weight.
    #[default]
    Weight,
    /// Queries and keys, in eager attention.
    Scores,
    /// Attention's weights and values, in eager attention.
    Values,
}

/// How a library adds where a product has this shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Product {
    /// What is multiplied.
    #[serde(default, skip_serializing_if = "is_default")]
    pub of: ProductOf,
    /// Rows of the activation.
    pub tokens: usize,
    /// Rows of the weight.
    pub outputs: usize,
    /// Elements of K.
    pub inner: usize,
    /// As [`Order::parts`].
    #[serde(default = "one_part")]
    pub parts: u32,
    /// As [`Order::tile`].
    #[serde(default = "usual_tile", skip_serializing_if = "is_usual_tile")]
    pub tile: u32,
    /// As [`Order::rounded`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub rounded: bool,
    /// As [`Order::instruction`].
    #[serde(default = "usual_instruction", skip_serializing_if = "is_usual_instruction")]
    pub instruction: u32,
    /// As [`Order::rest`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub rest: Option<u32>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one_prompt() -> usize {
    1
}

fn is_one(batch: &usize) -> bool {
    *batch == one_prompt()
}

fn one_part() -> u32 {
    Order::CHAIN.parts
}

fn usual_tile() -> u32 {
    Order::CHAIN.tile
}

fn is_usual_tile(tile: &u32) -> bool {
    *tile == Order::CHAIN.tile
}

fn usual_instruction() -> u32 {
    Order::CHAIN.instruction
}

fn is_usual_instruction(instruction: &u32) -> bool {
    *instruction == Order::CHAIN.instruction
}

impl Product {
    /// A product of this shape, added in this order.
    pub fn new(of: ProductOf, [tokens, outputs, inner]: [usize; 3], order: Order) -> Product {
        let Order { parts, tile, rounded, instruction, rest } = order;
        Product { of, tokens, outputs, inner, parts, tile, rounded, instruction, rest }
    }

    /// Tokens, outputs and elements of K.
    pub fn shape(&self) -> [usize; 3] {
        [self.tokens, self.outputs, self.inner]
    }

    /// The order.
    pub fn order(&self) -> Order {
        let Product { parts, tile, rounded, instruction, rest, .. } = *self;
        Order { parts, tile, rounded, instruction, rest }
    }

    /// What is wrong with it, in words.
    fn problem(&self) -> Option<String> {
        if self.parts == 0 || self.parts > 64 {
            return Some(format!("K cannot be cut into {} parts", self.parts));
        }
        if ![1, 8, 16].contains(&self.instruction) {
            let given = self.instruction;
            return Some(format!("`instruction` is 1, 8 or 16 products, and {given} is here"));
        }
        if self.order().is_by_lanes() && (self.parts > 1 || self.rest.is_some()) {
            return Some(
                "`instruction = 1` is for one sum along K, without `parts` or `rest`".to_owned(),
            );
        }
        if ![8, 16, 32, 64, 128].contains(&self.tile) {
            return Some("`tile` is 8, 16, 32, 64 or 128 elements of K".to_owned());
        }
        if self.rest.is_some_and(|rest| ![32, 64, 128].contains(&rest)) {
            return Some("`rest` is 32, 64 or 128 elements of K".to_owned());
        }
        if self.rest.is_some() && (self.inner.is_multiple_of(8) || self.parts > 1) {
            let why = "`rest` is for one chain along a K that is no multiple of 8";
            return Some(format!(
                "{why}, and here are parts = {}, inner = {}",
                self.parts, self.inner
            ));
        }
        if self.parts == 1 && (self.rounded || self.tile != Order::CHAIN.tile) {
            return Some("`tile` and `rounded` are for K in parts; write `parts`".to_owned());
        }
        if self.order() == Order::CHAIN {
            let [tokens, outputs, inner] = self.shape();
            return Some(format!(
                "`products` lists tokens = {tokens}, outputs = {outputs}, inner = {inner} without an \
                 order; write `parts`, `instruction` or `rest`, or leave the shape out"
            ));
        }
        None
    }
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
    /// Shapes of products that the library adds in an order of their own; of others K is one
    /// chain.
    #[serde(default, alias = "split_k", skip_serializing_if = "Products::is_empty")]
    pub products: Products,
    /// How many of the last tokens came in steps of their own, with a KV cache. A recipe says
    /// it; an engine's file does not.
    #[serde(default, skip_serializing_if = "is_default")]
    pub decoded: usize,
    /// How many prompts of the same length each step held, of which this one was the first. A
    /// recipe says it; an engine's file does not.
    #[serde(default = "one_prompt", skip_serializing_if = "is_one")]
    pub batch: usize,
}

impl EngineKernels {
    /// The kernels of a product with the weight of that name.
    pub fn linear_of(&self, weight: &str) -> &Choices<LinearKernel> {
        // What a hypothesis makes of a weight has its name and some words behind it.
        let name = weight.split(' ').next();
        let makes_logits = matches!(name, Some("output.weight" | "token_embd.weight"));
        self.output.as_ref().filter(|_| makes_logits).unwrap_or(&self.linear)
    }

    /// Whether some op but the products may be one of several kernels.
    pub fn is_open(&self) -> bool {
        self.rms_norm.is_open()
            || self.rope.is_open()
            || self.attention.is_open()
            || self.swiglu.is_open()
    }

    /// The same with those kernels first that a recording shows; `shown` says at how many sites
    /// a kernel gives every bit, by its name in words such as `rope vllm`.
    pub fn led_by(mut self, shown: impl Fn(&str) -> usize) -> EngineKernels {
        let of = |op: &'static str| {
            let shown = &shown;
            move |name: &str| shown(&format!("{op} {name}"))
        };
        self.rms_norm = self.rms_norm.led_by(&of("norm"));
        self.rope = self.rope.led_by(&of("rope"));
        self.attention = self.attention.led_by(&of("attention"));
        self.swiglu = self.swiglu.led_by(&of("swiglu"));
        self
    }

    /// The same where one op is known to be made by one kernel, by its name in words such as
    /// `rope vllm`: that op lists it alone.
    pub fn with_only(mut self, kernel: &str) -> EngineKernels {
        fn only<T: Copy + Serialize>(choices: &mut Choices<T>, op: &str, kernel: &str) {
            let own = |one: &T| kernel == format!("{op} {}", name_of(*one));
            let one = choices.all().find(own);
            *choices = one.map_or(*choices, Choices::one);
        }
        only(&mut self.rms_norm, "norm", kernel);
        only(&mut self.rope, "rope", kernel);
        only(&mut self.attention, "attention", kernel);
        only(&mut self.swiglu, "swiglu", kernel);
        self
    }

    /// Whether a kernel of each op is llama.cpp's.
    fn are_ggml(&self) -> Vec<bool> {
        use AttentionKernel::{GgmlCudaF16Cache, GgmlCudaF32Cache};
        let linear = self.linear.all().chain(self.output.iter().flat_map(Choices::all));
        linear
            .map(|kernel| kernel == LinearKernel::GgmlCuda)
            .chain(self.rms_norm.all().map(|kernel| kernel == NormKernel::GgmlCuda))
            .chain(self.rope.all().map(|kernel| kernel == RopeKernel::GgmlCuda))
            .chain(
                self.attention
                    .all()
                    .map(|kernel| matches!(kernel, GgmlCudaF16Cache | GgmlCudaF32Cache)),
            )
            .chain(self.swiglu.all().map(|kernel| kernel == SwigluKernel::GgmlCuda))
            .collect()
    }

    /// Whether llama.cpp's kernels are among them.
    pub fn is_ggml(&self) -> bool {
        self.are_ggml().contains(&true)
    }

    /// What of its kernels cannot pass tensors of that type: llama.cpp's pass `f32`, all others
    /// `bf16` or `f16`.
    pub fn stream_problem(&self, stream: Format) -> Option<String> {
        let are_ggml = self.are_ggml();
        let all = are_ggml.iter().all(|ggml| *ggml);
        match (stream, all, are_ggml.contains(&true)) {
            (Format::F32, true, _) | (Format::Bf16 | Format::F16, _, false) => None,
            (_, false, true) => Some(
                "it lists kernels `ggml-cuda`, whose stream is `f32`, beside others, whose stream \
                 is `bf16` or `f16`"
                    .to_owned(),
            ),
            (other, true, _) => {
                Some(format!("its stream is `{other}`; its kernels `ggml-cuda` pass `f32`"))
            }
            (other, ..) => {
                Some(format!("its stream is `{other}`; its kernels pass `bf16` or `f16`"))
            }
        }
    }
}

/// A list of shapes, as an engine's file has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "Vec<Product>", try_from = "Vec<Product>")]
pub struct Products([Option<Product>; MOST_PRODUCTS]);

/// The most shapes that an engine's file lists: a model has a handful.
pub const MOST_PRODUCTS: usize = 16;

impl Products {
    /// Whether every product is one chain.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The order of a product of this shape.
    pub fn order(&self, of: ProductOf, shape: [usize; 3]) -> Order {
        let mut listed = self.0.iter().flatten();
        let found = listed.find(|product| product.of == of && product.shape() == shape);
        found.map_or(Order::CHAIN, Product::order)
    }
}

impl From<Products> for Vec<Product> {
    fn from(products: Products) -> Vec<Product> {
        products.0.into_iter().flatten().collect()
    }
}

impl TryFrom<Vec<Product>> for Products {
    type Error = String;

    fn try_from(listed: Vec<Product>) -> Result<Products, String> {
        if listed.len() > MOST_PRODUCTS {
            return Err(format!(
                "`products` lists at most {MOST_PRODUCTS} shapes, and {} are here",
                listed.len()
            ));
        }
        if let Some(problem) = listed.iter().find_map(Product::problem) {
            return Err(problem);
        }
        let key = |product: &Product| (product.of, product.shape());
        let twice = |(place, product): &(usize, &Product)| {
            listed[..*place].iter().any(|earlier| key(earlier) == key(product))
        };
        if let Some((_, product)) = listed.iter().enumerate().find(twice) {
            let [tokens, outputs, inner] = product.shape();
            return Err(format!(
                "`products` lists tokens = {tokens}, outputs = {outputs}, inner = {inner} twice"
            ));
        }
        let mut products = [None; MOST_PRODUCTS];
        products.iter_mut().zip(listed).for_each(|(place, product)| *place = Some(product));
        Ok(Products(products))
    }
}

/// An engine's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineFile {
    /// Its name.
    pub name: String,
    /// The type of its stream, where a recipe says no other. Only the project's own kernels have
    /// none: they pass f32, and a recipe says what they multiply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<Format>,
    /// What its products make of their activation, where that is known and their kernels are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<Activations>,
    /// Its kernels, where they are known to the bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernels: Option<EngineKernels>,
}

/// What an engine's products make of their activation before they multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// 8-bit integers in the blocks that ggml pairs with the weight's type, as llama.cpp makes
    /// them on a CPU.
    Ggml8Bit,
}

/// The engines that ship: their names and their files.
pub const SHIPPED: [(&str, &str); 13] = [
    ("transformers", include_str!("../engines/transformers.toml")),
    ("vllm", include_str!("../engines/vllm.toml")),
    ("vllm-fp8", include_str!("../engines/vllm-fp8.toml")),
    ("vllm-fp8-channel", include_str!("../engines/vllm-fp8-channel.toml")),
    ("vllm-int8", include_str!("../engines/vllm-int8.toml")),
    ("vllm-fp8-block", include_str!("../engines/vllm-fp8-block.toml")),
    ("sglang", include_str!("../engines/sglang.toml")),
    ("sglang-fp8", include_str!("../engines/sglang-fp8.toml")),
    ("torchao", include_str!("../engines/torchao.toml")),
    ("llama-cpp-cuda", include_str!("../engines/llama-cpp-cuda.toml")),
    ("llama-cpp-cpu", include_str!("../engines/llama-cpp-cpu.toml")),
    ("f32", include_str!("../engines/f32.toml")),
    ("runner", include_str!("../engines/runner.toml")),
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
        let known = file.kernels.as_ref();
        let of_recipes = [
            ("decoded", known.is_some_and(|kernels| kernels.decoded > 0)),
            ("batch", known.is_some_and(|kernels| !is_one(&kernels.batch))),
        ];
        if let Some((key, _)) = of_recipes.iter().find(|(_, written)| *written) {
            return Err(format!(
                "engine `{name}`: `{key}` is no key of an engine's file; write it in the recipe, \
                 beside `engine`"
            ));
        }
        let problem = match (file.stream, known, file.activations) {
            (None, Some(_), _) | (None, _, Some(_)) => {
                Some("`stream` is missing, the type in which it passes tensors".to_owned())
            }
            (_, Some(_), Some(_)) => Some(
                "`activations` has no use beside `kernels`, which say what each product is"
                    .to_owned(),
            ),
            (Some(stream), Some(kernels), None) => kernels.stream_problem(stream),
            (Some(Format::F32 | Format::Bf16 | Format::F16), None, _) => None,
            (Some(other), None, _) => {
                Some(format!("its stream is `{other}`, and is one of `f32`, `bf16` and `f16`"))
            }
            // Only the project's own kernels need say nothing.
            (None, None, None) if SHIPPED.iter().any(|(shipped, _)| *shipped == name) => None,
            (None, None, None) => {
                Some("`stream` is missing, the type in which it passes tensors".to_owned())
            }
        };
        match problem {
            Some(problem) => Err(format!("engine `{name}`: {problem}")),
            None => Ok(file),
        }
    }

    /// Its kernels and the type of its stream.
    ///
    /// # Errors
    /// In words, where no kernel of it is known to the bit.
    pub fn known(&self) -> Result<(EngineKernels, Format), String> {
        self.kernels.zip(self.stream).ok_or_else(|| {
            format!(
                "no kernel of the engine `{}` is known to the bit, so its bits cannot be computed; \
                 docs/engines.md lists those whose are",
                self.name
            )
        })
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
    fn a_family_of_orders_lists_none_twice_that_adds_alike() {
        let part = |order: &Order, inner: usize| {
            inner.div_ceil(order.tile as usize).div_ceil(order.parts as usize) * order.tile as usize
        };
        for (inner, rest) in
            [(96, None), (560, None), (3584, None), (335, Some(32)), (38, Some(128))]
        {
            let family = Order::family(1001, inner, rest, 64);
            assert_eq!(family[0], Order::CHAIN);
            let adds = |order: &Order| {
                let first = order.rest.map_or(rest.unwrap_or(8), |tile| tile as usize);
                let cut = (order.parts > 1).then(|| (part(order, inner), order.rounded));
                (order.instruction, cut, if order.parts > 1 { 0 } else { inner % first })
            };
            let mut seen: Vec<_> = family.iter().map(adds).collect();
            seen.sort_unstable();
            let all = seen.len();
            seen.dedup();
            assert_eq!(seen.len(), all, "{inner}");
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
        let listing = |products: &str| {
            let text = format!("{}\nproducts = [{products}]", SHIPPED[0].1);
            EngineFile::parse(&text, "mine")
        };
        let error = listing(&format!("{cut}, {cut}")).expect_err("refused");
        assert!(error.contains("outputs = 64, inner = 256 twice"), "{error}");
        let scores = cut.replace("{ ", "{ of = \"scores\", ");
        assert!(listing(&format!("{cut}, {scores}")).is_ok());
        for (key, words) in [
            ("parts = 65", "cut into 65 parts"),
            ("instruction = 4", "8 or 16 products, and 4"),
            ("tile = 48", "`tile` is 8, 16, 32, 64 or 128"),
            ("rest = 7", "`rest` is 32, 64 or 128"),
            ("rest = 32", "no multiple of 8"),
            ("rounded = true", "write `parts`"),
            ("tile = 8", "write `parts`"),
            ("parts = 1", "without an order"),
        ] {
            let error = listing(&cut.replace("parts = 2", key)).expect_err("refused");
            assert!(error.contains(words), "{error}");
        }
        let text = SHIPPED[0].1.replace("stream = \"bf16\"", "stream = \"e4m3\"");
        assert!(EngineFile::parse(&text, "mine").expect_err("refused").contains("e4m3"));
    }
}
