//! The emulated arm of an engine: each op by the kernels that the engine's file names, and
//! the choice among them by what the engine itself returned.
//!
//! It knows kernels and operands; the kernels' arithmetic is `compute/engine_kernels`'.

use super::chip::Unit;
use super::quantize::Codes;
use super::schedule::Schedule;
use crate::compute::call::Call;
use crate::compute::engine_kernels::activation::{Activation, Gated};
use crate::compute::engine_kernels::attention::{Heads, Products, eager};
use crate::compute::engine_kernels::flash::{Plan, flash};
use crate::compute::engine_kernels::linear::{Linear, codes};
use crate::compute::engine_kernels::norm::{RmsNorm, add};
use crate::compute::engine_kernels::rope::{self, Rotation, Table};
use crate::compute::{AttentionShape, ComputeError};
use crate::dtype::Format;
use crate::engine::{AttentionKernel, EngineKernels, NormKernel, RopeKernel, SplitK, SwigluKernel};
use crate::model::{Rope, RopeLayout, Weight};
use crate::tensor::Tensor;

/// Multiprocessors of an H100 and an H200, by which FlashAttention 2 cuts its keys.
const PROCESSORS: usize = 132;
/// The most parts of K that are tried.
const MOST_PARTS: u32 = 16;
/// Rows and columns of a product on which other orders are tried first.
const SAMPLE: (usize, usize) = (8, 64);

/// An engine's kernels on a chip.
#[derive(Clone, Copy, Debug)]
pub struct EngineArm {
    kernels: EngineKernels,
    /// The type of the stream.
    format: Format,
    unit: Unit,
}

/// What an op came to where its result is known.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// What the kernel that fits best returns.
    pub tensor: Tensor,
    /// That kernel in words.
    pub kernel: String,
    /// Values whose bits it does not give.
    pub mismatches: usize,
    /// Other kernels that fit as well.
    pub also: Vec<String>,
    /// Of a product its shape and the parts of K: what an engine's file lists.
    pub product: Option<SplitK>,
}

impl EngineArm {
    /// The arm of an engine whose stream has this type.
    pub fn new(kernels: EngineKernels, format: Format, unit: Unit) -> EngineArm {
        EngineArm { kernels, format, unit }
    }

    /// Rows as the engine holds them.
    pub fn embedded(&self, mut rows: Tensor) -> Tensor {
        rows.data_mut().iter_mut().for_each(|value| *value = self.format.round(*value));
        rows
    }

    /// RMSNorm of each group of `gain.len()` values.
    pub fn rms_norm(&self, x: &Tensor, gain: &[f32], eps: f32) -> Tensor {
        let kernel = self.kernels.rms_norm.first().unwrap_or(NormKernel::Transformers);
        self.rms_norm_by(kernel, x, gain, eps)
    }

    fn rms_norm_by(&self, kernel: NormKernel, x: &Tensor, gain: &[f32], eps: f32) -> Tensor {
        let gain: Vec<f32> = gain.iter().map(|gain| self.format.round(*gain)).collect();
        let rows = x.data().len() / gain.len().max(1);
        let norm = match kernel {
            NormKernel::Transformers => RmsNorm::transformers(self.format, eps, rows),
            NormKernel::TorchFused => RmsNorm::torch_fused(self.format, eps),
            NormKernel::Vllm => RmsNorm::vllm(self.format, eps, gain.len()),
        };
        norm.apply(x, &gain)
    }

    /// `x w^T + bias`.
    ///
    /// # Errors
    /// If the weight cannot be read, or the shapes do not fit.
    pub fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        let parts = self.kernels.split_k.parts(x.rows(), weight.rows(), x.width());
        let operands = Operands::of(self, x, weight, bias)?;
        operands.product(Schedule::FAST.with_split_k(parts))
    }

    /// Rotation of every head.
    ///
    /// # Errors
    /// If the model's pairs are no halves of a head.
    pub fn rope(
        &self,
        x: &Tensor,
        geometry: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        let kernel = self.kernels.rope.first().unwrap_or(RopeKernel::Transformers);
        self.rope_by(kernel, x, geometry, head_dim, first_position)
    }

    fn rope_by(
        &self,
        kernel: RopeKernel,
        x: &Tensor,
        geometry: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        // Dividing positions or frequencies is not how these engines hold other kinds of RoPE.
        if geometry.layout != RopeLayout::Halves
            || geometry.factors.is_some()
            || geometry.linear_scale != 1.0
        {
            return Err(ComputeError::Recipe(
                "the engine's rotary kernels turn halves of a head by plain frequencies; take the \
                 model's Hugging Face folder, or a recipe with `stream` and without `engine`"
                    .to_owned(),
            ));
        }
        let format = self.format;
        let frequency = |pair: usize| {
            let exponent = (2 * pair) as f64 / geometry.dimensions as f64;
            let frequency = 1.0 / (libm::pow(geometry.theta, exponent) as f32);
            if kernel == RopeKernel::Transformers { format.round(frequency) } else { frequency }
        };
        let frequencies: Vec<f32> = (0..geometry.dimensions / 2).map(frequency).collect();
        let positions: Vec<u32> = (0..x.rows()).map(|row| (first_position + row) as u32).collect();
        let (table, rotation) = match kernel {
            RopeKernel::Transformers | RopeKernel::TransformersF32Frequencies => {
                (format, Rotation::RoundsProducts)
            }
            RopeKernel::Vllm => (format, Rotation::Fused),
            RopeKernel::Sglang => (Format::F32, Rotation::Fused),
        };
        let table = Table::new(&positions, &frequencies, 1.0, table);
        Ok(rope::apply(rotation, format, x, head_dim, &table))
    }

    /// Causal attention.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
    ) -> Result<Tensor, ComputeError> {
        let kernel = self.kernels.attention.first().unwrap_or(AttentionKernel::Eager);
        self.attention_by(kernel, q, k, v, shape)
    }

    fn attention_by(
        &self,
        kernel: AttentionKernel,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
    ) -> Result<Tensor, ComputeError> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let own = Heads::causal(heads, kv_heads, head_dim);
        let plan = match kernel {
            AttentionKernel::Eager => {
                let products = Products::new(&self.unit, self.format, &own, k.rows());
                return Ok(eager(&products, q, k, v, &own)?);
            }
            AttentionKernel::Flash2 => {
                Plan::flash2(heads, head_dim, q.rows(), k.rows(), PROCESSORS)
            }
            AttentionKernel::Flash3 => Plan::FLASH3,
            AttentionKernel::Cudnn => Plan::CUDNN,
        };
        Ok(flash(&self.unit, self.format, q, k, v, &own, &plan))
    }

    /// `silu(gate) * up`.
    pub fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        let kernel = self.kernels.swiglu.first().unwrap_or(SwigluKernel::Rounded);
        self.swiglu_by(kernel, gate, up)
    }

    fn swiglu_by(&self, kernel: SwigluKernel, gate: &Tensor, up: &Tensor) -> Tensor {
        let rounds_activation = kernel == SwigluKernel::Rounded;
        let gated = Gated { activation: Activation::Silu, format: self.format, rounds_activation };
        gated.apply(gate, up)
    }

    /// `a + b`.
    pub fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        add(self.format, a, b)
    }

    /// The kernel of an op that comes nearest to what the engine returned.
    ///
    /// # Errors
    /// As the op.
    pub fn choose(&self, call: &Call<'_>, observed: &Tensor) -> Result<Chosen, ComputeError> {
        let mut choice = Choice { observed, best: None };
        match *call {
            Call::Embed { weight, tokens } => {
                let mut rows = Tensor::zeros(tokens.len(), weight.width());
                for (row, &token) in tokens.iter().enumerate() {
                    let token = token as usize;
                    weight.decode_rows(token..token + 1, rows.row_mut(row))?;
                }
                choice.offer("a lookup", self.embedded(rows));
            }
            Call::RmsNorm { x, gain, eps } => {
                let gain = gain.to_vec()?;
                for kernel in self.kernels.rms_norm.all() {
                    let y = self.rms_norm_by(kernel, x, &gain, eps);
                    choice.offer(format!("norm {}", name_of(kernel)), y);
                }
            }
            Call::Matmul { x, weight, bias } => {
                let mut cut = 1;
                let operands = Operands::of(self, x, weight, bias)?;
                choice.offer("cuBLAS in one chain", operands.product(Schedule::FAST)?);
                if !choice.is_exact() {
                    for parts in operands.parts_that_fit(observed)? {
                        let schedule = Schedule::FAST.with_split_k(parts);
                        let name = format!("cuBLAS in {parts} parts of K");
                        choice.offer(&name, operands.product(schedule)?);
                        if choice.is_exact() {
                            cut = parts;
                            break;
                        }
                    }
                }
                let (tokens, inner) = (x.rows(), x.width());
                let product = SplitK { tokens, outputs: weight.rows(), inner, parts: cut };
                if let Some(best) = &mut choice.best {
                    best.product = Some(product);
                }
            }
            Call::Rope { x, rope, head_dim, first_position } => {
                for kernel in self.kernels.rope.all() {
                    let turned = self.rope_by(kernel, x, rope, head_dim, first_position)?;
                    choice.offer(format!("rope {}", name_of(kernel)), turned);
                }
            }
            Call::Attention { q, k, v, shape } => {
                for kernel in self.kernels.attention.all() {
                    let y = self.attention_by(kernel, q, k, v, shape)?;
                    choice.offer(format!("attention {}", name_of(kernel)), y);
                }
            }
            Call::SwiGlu { gate, up } => {
                for kernel in self.kernels.swiglu.all() {
                    let y = self.swiglu_by(kernel, gate, up);
                    choice.offer(format!("swiglu {}", name_of(kernel)), y);
                }
            }
            Call::Add { a, b } => choice.offer("an addition", self.add(a, b)),
        }
        let nothing = || ComputeError::Recipe("the engine lists no kernel for this op".to_owned());
        choice.best.ok_or_else(nothing)
    }
}

/// A kernel's name as the engine's file has it.
fn name_of(kernel: impl serde::Serialize) -> String {
    match serde_json::to_value(kernel) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// The best of the kernels so far.
struct Choice<'a> {
    observed: &'a Tensor,
    best: Option<Chosen>,
}

impl Choice<'_> {
    fn is_exact(&self) -> bool {
        self.best.as_ref().is_some_and(|best| best.mismatches == 0)
    }

    fn offer(&mut self, name: impl AsRef<str>, tensor: Tensor) {
        let name = name.as_ref().to_owned();
        let same = (tensor.rows(), tensor.width()) == (self.observed.rows(), self.observed.width());
        let pairs = tensor.data().iter().zip(self.observed.data());
        let differ =
            pairs.filter(|(a, b)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
        let mismatches = if same { differ.count() } else { tensor.data().len() };
        match &mut self.best {
            Some(best) if mismatches == best.mismatches => best.also.push(name),
            Some(best) if mismatches > best.mismatches => {}
            best => {
                let also = Vec::new();
                *best = Some(Chosen { tensor, kernel: name, mismatches, also, product: None });
            }
        }
    }
}

/// A product's operands as the engine holds them.
struct Operands {
    unit: Unit,
    format: Format,
    x: Codes,
    w: Codes,
    bias: Option<Vec<f32>>,
}

impl Operands {
    fn of(
        arm: &EngineArm,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Operands, ComputeError> {
        let format = arm.format;
        let w = Tensor::new(weight.width(), weight.to_vec()?);
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let round = |bias: Vec<f32>| bias.into_iter().map(|b| format.round(b)).collect();
        Ok(Operands {
            unit: arm.unit,
            format,
            x: codes(format, x),
            w: codes(format, &w),
            bias: bias.map(round),
        })
    }

    fn product(&self, schedule: Schedule) -> Result<Tensor, ComputeError> {
        let linear = Linear { schedule, ..Linear::new(&self.unit, self.x.width(), self.format) };
        Ok(linear.apply(&self.x, &self.w, self.bias.as_deref())?)
    }

    /// The numbers of parts of K whose sums are the engine's on a sample.
    fn parts_that_fit(&self, observed: &Tensor) -> Result<Vec<u32>, ComputeError> {
        let (rows, columns) = (observed.rows().min(SAMPLE.0), observed.width().min(SAMPLE.1));
        if (observed.rows(), observed.width()) != (self.x.rows(), self.w.rows()) {
            return Ok(Vec::new());
        }
        let some = |codes: &Codes, count: usize| codes.select_rows(&(0..count).collect::<Vec<_>>());
        let sample = Operands {
            unit: self.unit,
            format: self.format,
            x: some(&self.x, rows),
            w: some(&self.w, columns),
            bias: self.bias.as_ref().map(|bias| bias[..columns].to_vec()),
        };
        let mut fitting = Vec::new();
        for parts in 2..=MOST_PARTS {
            let y = sample.product(Schedule::FAST.with_split_k(parts))?;
            let equal = (0..rows).all(|row| {
                let pairs = y.row(row).iter().zip(&observed.row(row)[..columns]);
                pairs.into_iter().all(|(a, b)| a.to_bits() == b.to_bits())
            });
            if equal {
                fitting.push(parts);
            }
        }
        Ok(fitting)
    }
}
