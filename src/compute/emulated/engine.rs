//! The emulated arm of an engine: each op by the kernels that the engine's file names, and
//! the choice among them by what the engine itself returned.
//!
//! It knows kernels and operands; the kernels' arithmetic is `compute/engine_kernels`'.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use super::chip::Unit;
use super::fp8_product::{Fp8Product, Otherwise, held_for};
use super::ggml_product::GgmlProduct;
use super::orders::{Operands, differing, is_tried, rows_afforded, same_row, some_names};
use super::schedule::Schedule;
use super::steps::{Steps, Whole, keep};
use crate::compute::call::{Call, Held};
use crate::compute::engine_kernels::activation::{Activation, Gated};
use crate::compute::engine_kernels::attention::{self, Heads, eager, eager_of};
use crate::compute::engine_kernels::flash::{Flash3Call, Plan, flash};
use crate::compute::engine_kernels::linear::residue_tile;
use crate::compute::engine_kernels::norm::{RmsNorm, add};
use crate::compute::engine_kernels::rope::{self, Rotation, Table};
use crate::compute::engine_kernels::{cpu_math, cuda_math};
use crate::compute::engine_kernels::{ggml, int8};
use crate::compute::rope as rotary;
use crate::compute::{AttentionShape, ComputeError};
use crate::dtype::Format;
use crate::engine::{
    AttentionKernel, EngineKernels, LinearKernel, NormKernel, Order, Product, ProductOf,
    RopeKernel, SwigluKernel, name_of,
};
use crate::model::{self, HeldCodes, Rope, RopeLayout, Weight, WeightType};
use crate::tensor::Tensor;

/// Multiprocessors of an H100 and an H200, by which FlashAttention 2 cuts its keys, and among
/// which llama.cpp deals its tiles.
pub(super) const PROCESSORS: usize = 132;
/// The kernel of attention whose products have orders, in words.
const EAGER: &str = "attention eager";

/// An engine's kernels on a chip.
#[derive(Debug)]
pub struct EngineArm {
    kernels: EngineKernels,
    /// The type of the stream.
    format: Format,
    unit: Unit,
    /// The tensor core of FP8 codes, where the chip has one.
    fp8_unit: Option<Unit>,
    /// The largest magnitude of each stack of weights met so far, by a weight's name: an arm
    /// lives as long as one model.
    largest: Mutex<BTreeMap<String, f32>>,
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
    /// Of a product the shapes of its calls and their orders: what an engine's file lists.
    pub products: Vec<Product>,
}

impl EngineArm {
    /// The arm of an engine whose stream has this type.
    pub fn new(
        kernels: EngineKernels,
        format: Format,
        unit: Unit,
        fp8_unit: Option<Unit>,
    ) -> EngineArm {
        EngineArm { kernels, format, unit, fp8_unit, largest: Mutex::default() }
    }

    /// Whether the product with a weight of that name multiplies FP8 codes.
    pub fn quantises(&self, weight: &str) -> bool {
        self.kernels.linear_of(weight).first().is_some_and(LinearKernel::is_fp8)
    }

    /// Whether the product with the weight of that name can be made by other steps than its
    /// kernel's.
    pub fn takes_steps(&self, weight: &str) -> bool {
        let kernel = self.kernels.linear_of(weight).first();
        !matches!(kernel, Some(LinearKernel::GgmlCuda | LinearKernel::VllmInt8))
    }

    /// Rows as the engine holds them.
    pub fn embedded(&self, mut rows: Tensor) -> Tensor {
        rows.data_mut().iter_mut().for_each(|value| *value = self.format.round(*value));
        rows
    }

    /// The calls in which the rows of a tensor came: the prompt's in one, and those of decoded
    /// tokens, of which each had a call of its own. With each the rows of a call: those of the
    /// other prompts of a batch stood beside them.
    fn calls(&self, rows: usize) -> Vec<(Range<usize>, usize)> {
        let batch = self.kernels.batch;
        match rows.checked_sub(self.kernels.decoded) {
            Some(prompt) if prompt > 0 && prompt < rows => {
                vec![(0..prompt, batch * prompt), (prompt..rows, batch)]
            }
            _ => vec![(0..rows, batch * rows)],
        }
    }

    /// What `compute` gives of the rows of each call, below one another.
    fn by_calls(
        &self,
        x: &Tensor,
        compute: impl Fn(&Tensor, usize) -> Result<Tensor, ComputeError>,
    ) -> Result<Tensor, ComputeError> {
        let calls = self.calls(x.rows());
        if let [(_, tokens)] = calls[..] {
            return compute(x, tokens);
        }
        let (mut width, mut data) = (x.width(), Vec::new());
        for (rows, tokens) in calls {
            let y = compute(&x.some_rows(rows), tokens)?;
            width = y.width();
            data.extend(y.into_data());
        }
        Ok(Tensor::new(width, data))
    }

    /// RMSNorm of each group of `gain.width()` values.
    ///
    /// # Errors
    /// As what computes a call.
    pub fn rms_norm(&self, x: &Tensor, gain: Weight<'_>, eps: f32) -> Result<Tensor, ComputeError> {
        let kernel = self.kernels.rms_norm.first().unwrap_or(NormKernel::Transformers);
        self.rms_norm_by(kernel, x, gain, eps)
    }

    fn rms_norm_by(
        &self,
        kernel: NormKernel,
        x: &Tensor,
        weight: Weight<'_>,
        eps: f32,
    ) -> Result<Tensor, ComputeError> {
        let name = weight.name();
        let held: Vec<f32> = weight.as_held().to_vec()?;
        let held = held.into_iter().map(|gain| self.format.round(gain));
        // Gemma adds its 1 in f32.
        let one = if weight.is_less_one() { 1.0 } else { 0.0 };
        let gain: Vec<f32> = held.map(|gain| gain + one).collect();
        // These models round once, after the gain.
        let rounds_late = weight.is_less_one()
            || weight.model().is_some_and(|model| model.config().architecture.rounds_norms_late());
        // Where a residual stream comes in, vLLM's norm adds it; the first one and those of
        // heads have none.
        let alone = ["blk.0.attn_norm.weight", "q_norm.weight", "k_norm.weight"];
        let fused = !alone.iter().any(|end| name.ends_with(end));
        let width = gain.len().max(1);
        self.by_calls(x, |x, tokens| {
            let rows = tokens * (x.width() / width);
            let norm = match kernel {
                NormKernel::Transformers => RmsNorm {
                    rounds_before_gain: !rounds_late,
                    ..RmsNorm::transformers(self.format, eps, rows)
                },
                NormKernel::TorchFused => RmsNorm::torch_fused(self.format, eps),
                NormKernel::Vllm => RmsNorm::vllm(self.format, eps, width, rows, fused),
                NormKernel::GgmlCuda => return Ok(ggml::rms_norm(x, &gain, eps)),
            };
            Ok(norm.apply(x, &gain))
        })
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
        match self.kernels.linear_of(weight.name()).first() {
            None | Some(LinearKernel::Cublas) => {
                let operands = self.operands(weight, bias)?;
                let (outputs, inner) = (weight.rows(), x.width());
                self.by_calls(x, |x, tokens| {
                    let shape = [tokens, outputs, inner];
                    operands.product(x, self.kernels.products.order(ProductOf::Weight, shape))
                })
            }
            Some(LinearKernel::GgmlCuda) => self.ggml_product(x, weight, bias),
            Some(LinearKernel::VllmInt8) => self.int8_product(x, weight, bias),
            Some(kernel) => self.fp8_matmul(&self.fp8_product_of(kernel, weight, bias)?, x),
        }
    }

    /// llama.cpp's product, and its bias, an addition of its own.
    fn ggml_product(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        known_weight(weight)?;
        let product = GgmlProduct::of(self.unit, weight, self.held_bias(bias)?)?;
        let mut data = Vec::new();
        for rows in self.steps(x.rows()) {
            let x = x.some_rows(rows);
            let order = self.kernels.products.order(ProductOf::Weight, product.shape(&x));
            data.extend(product.apply(&x, order)?.into_data());
        }
        Ok(Tensor::new(weight.rows().max(1), data))
    }

    /// vLLM's product with the codes of a checkpoint in INT8.
    fn int8_product(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        let whole_rows = |held: &HeldCodes<'_>| held.block()[1] == weight.width();
        let held = weight.held_codes(WeightType::I8).filter(whole_rows);
        let held = held.filter(|held| held.input_scale.is_none()).ok_or_else(|| {
            ComputeError::Recipe(format!(
                "vLLM multiplies INT8 codes of a checkpoint, with a scale for each output or for \
                 all and activations quantised as they come; {} is {} in another form",
                weight.in_words(),
                weight.kind()
            ))
        })?;
        let rows = 0..weight.rows();
        let scales = rows.clone().map(|row| held.scale(row, 0)).collect();
        let bias = self.held_bias(bias)?;
        let weight = int8::Weight { codes: held.codes(rows), scales, bias };
        Ok(int8::product(x, &weight, self.format))
    }

    /// What cuBLAS multiplies for PyTorch.
    fn operands(
        &self,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Operands, ComputeError> {
        known_weight(weight)?;
        let w = Tensor::new(weight.width(), weight.to_vec()?);
        Ok(Operands::torch(self.unit, self.format, &w, self.held_bias(bias)?))
    }

    /// A call of cuBLAS in the order that fits best.
    fn call_of(
        &self,
        operands: &Operands,
        (x, observed): (&Tensor, &Tensor),
        shape: [usize; 3],
        of: &str,
    ) -> Result<Made, ComputeError> {
        let listed = self.kernels.products.order(ProductOf::Weight, shape);
        let (order, tensor, others) = operands.order_of(x, observed, listed)?;
        let in_words = |order: &Order| format!("cuBLAS{of} {}", order.in_words(operands.format()));
        Ok(Made {
            kernel: in_words(&order),
            also: others.iter().map(in_words).collect(),
            product: Some(Product::new(ProductOf::Weight, shape, order)),
            tensor,
        })
    }

    /// The rows of each step of the engine: the prompt's, and each decoded token's.
    fn steps(&self, rows: usize) -> Vec<Range<usize>> {
        let calls = self.calls(rows);
        let Some(((first, _), decoded)) = calls.split_first() else { return Vec::new() };
        let decoded = decoded.iter().flat_map(|(rows, _)| rows.clone());
        [first.clone()].into_iter().chain(decoded.map(|row| row..row + 1)).collect()
    }

    /// The kernel that converts a weight and its activation to FP8; nothing where another one
    /// multiplies by it, or one that is not known.
    pub(super) fn converting<'a>(&'a self, weight: Weight<'a>) -> Option<Fp8Product<'a>> {
        let product = self.fp8_product(weight, None).ok()??;
        product.converted_rows(0..1).is_ok().then_some(product)
    }

    /// The FP8 product with that weight and bias; nothing where another kernel multiplies by it.
    fn fp8_product<'a>(
        &'a self,
        weight: Weight<'a>,
        bias: Option<Weight<'_>>,
    ) -> Result<Option<Fp8Product<'a>>, ComputeError> {
        let kernel = self.kernels.linear_of(weight.name()).first();
        let Some(kernel) = kernel.filter(|kernel| kernel.is_fp8()) else { return Ok(None) };
        self.fp8_product_of(kernel, weight, bias).map(Some)
    }

    fn fp8_product_of<'a>(
        &'a self,
        kernel: LinearKernel,
        weight: Weight<'a>,
        bias: Option<Weight<'_>>,
    ) -> Result<Fp8Product<'a>, ComputeError> {
        let unit = self.fp8_unit.as_ref().ok_or_else(|| {
            ComputeError::Recipe("the engine multiplies FP8, and the chip cannot".to_owned())
        })?;
        let held = held_for(kernel, &weight)?;
        let (format, bias, largest) = (self.format, self.held_bias(bias)?, &self.largest);
        Ok(Fp8Product { kernel, format, unit, weight, bias, largest, held })
    }

    /// How many rows the call had in which a row of a tensor of so many came.
    fn tokens_of(&self, rows: usize) -> impl Fn(usize) -> usize + Sync {
        let calls = self.calls(rows);
        move |row| calls.iter().find(|(of, _)| of.contains(&row)).map_or(rows, |(_, all)| *all)
    }

    fn fp8_matmul(&self, product: &Fp8Product<'_>, x: &Tensor) -> Result<Tensor, ComputeError> {
        let rows = 0..product.weight.rows();
        let plain = Otherwise { x: &keep, w: &keep, schedule: None, output: self.format };
        product.rows(x, rows, self.tokens_of(x.rows()), &plain)
    }

    /// `x w^T + bias` for some rows of a weight that the engine quantises, by other steps; nothing
    /// where it does not. Of the steps' schedule only what differs from `prescribed` counts.
    ///
    /// # Errors
    /// As [`EngineArm::matmul`].
    pub fn fp8_rows(
        &self,
        (x, weight, bias): (&Tensor, Weight<'_>, Option<Weight<'_>>),
        rows: Range<usize>,
        steps: &Steps<'_>,
        prescribed: Schedule,
    ) -> Result<Option<Tensor>, ComputeError> {
        let Some(product) = self.fp8_product(weight, bias)? else { return Ok(None) };
        let schedule = (steps.schedule != prescribed).then_some(steps.schedule);
        let Steps { x: of_x, w, output, .. } = *steps;
        let otherwise = Otherwise { x: of_x, w, schedule, output };
        product.rows(x, rows, self.tokens_of(x.rows()), &otherwise).map(Some)
    }

    /// What the engine makes of an activation and of a weight; nothing where it does not quantise.
    ///
    /// # Errors
    /// As [`EngineArm::matmul`].
    pub fn fp8_operands(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
    ) -> Result<Option<[Whole; 2]>, ComputeError> {
        let Some(product) = self.fp8_product(weight, None)? else { return Ok(None) };
        let (codes, scales) = product.activation(x)?;
        Ok(Some([(codes, scales, 0), product.whole_weight()?]))
    }

    /// A bias as the engine holds it.
    fn held_bias(&self, bias: Option<Weight<'_>>) -> Result<Option<Vec<f32>>, ComputeError> {
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        Ok(bias.map(|bias| bias.into_iter().map(|b| self.format.round(b)).collect()))
    }

    /// Rotation of every head.
    ///
    /// # Errors
    /// If the kernel is not known for the model's RoPE.
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
        let of_transformers =
            matches!(kernel, RopeKernel::Transformers | RopeKernel::TransformersF32Frequencies);
        // What others do about other kinds of RoPE was not looked at, and factors of a GGUF file
        // do not say by what method they were made.
        let is_known = |geometry: &Rope| geometry.is_plain() || geometry.scaling.is_some();
        let plain = (of_transformers && is_known(geometry))
            || (geometry.is_plain() && geometry.dimensions == head_dim && !geometry.in_f32);
        if kernel == RopeKernel::GgmlCuda && plain {
            let turned = (geometry.theta as f32, geometry.dimensions);
            return Ok(ggml::rope(x, geometry.layout, turned, head_dim, first_position));
        }
        if !plain {
            return Err(ComputeError::Recipe(
                "the engine's rotary kernels turn whole heads by plain frequencies, and the model \
                 scales them or turns a part; take a recipe with `stream` and without `engine`"
                    .to_owned(),
            ));
        }
        if geometry.layout != RopeLayout::Halves {
            // Pairs of neighbours turn as the pairs of halves do.
            let halves = Rope { layout: RopeLayout::Halves, ..geometry.clone() };
            let places = |pair: usize| {
                (rotary::pair(geometry, head_dim, pair), rotary::pair(&halves, head_dim, pair))
            };
            let places: Vec<_> = (0..geometry.dimensions / 2).map(places).collect();
            let mut turned = x.clone();
            move_pairs(x, &mut turned, head_dim, places.iter().copied());
            let turned = self.rope_by(kernel, &turned, &halves, head_dim, first_position)?;
            let mut y = turned.clone();
            move_pairs(
                &turned,
                &mut y,
                head_dim,
                places.iter().map(|&(own, halves)| (halves, own)),
            );
            return Ok(y);
        }
        let format = self.format;
        let on_cpu = |exponent| cpu_math::pow(geometry.theta as f32, exponent);
        let scaled = |frequencies| rope::scaled(frequencies, geometry);
        let frequency = |pair: usize| {
            // The engines divide in f32, and raise to a power in f32 too.
            let exponent = (2 * pair) as f32 / geometry.dimensions as f32;
            match kernel {
                RopeKernel::Transformers | RopeKernel::TransformersF32Frequencies => {
                    1.0 / on_cpu(exponent)
                }
                // Made on the GPU.
                RopeKernel::Vllm | RopeKernel::Sglang => {
                    1.0 / cuda_math::pow(geometry.theta as f32, exponent)
                }
                RopeKernel::GgmlCuda => 1.0 / libm::pow(geometry.theta, f64::from(exponent)) as f32,
            }
        };
        let mut frequencies: Vec<f32> =
            scaled((0..geometry.dimensions / 2).map(frequency).collect());
        if kernel == RopeKernel::Transformers {
            // A model that is cast as a whole has them cast too.
            frequencies.iter_mut().for_each(|frequency| *frequency = format.round(*frequency));
        }
        let positions: Vec<u32> = (0..x.rows()).map(|row| (first_position + row) as u32).collect();
        let (table, rotation) = match kernel {
            _ if geometry.in_f32 => (Format::F32, Rotation::InF32),
            RopeKernel::Transformers | RopeKernel::TransformersF32Frequencies => {
                (format, Rotation::RoundsProducts)
            }
            RopeKernel::Vllm => (format, Rotation::Fused),
            RopeKernel::Sglang | RopeKernel::GgmlCuda => (Format::F32, Rotation::Fused),
        };
        let table = Table::new(&positions, &frequencies, geometry.magnitude as f32, table);
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
        shape: AttentionShape<'_>,
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
        shape: AttentionShape<'_>,
    ) -> Result<Tensor, ComputeError> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        if !knows_attention(kernel, shape, k.rows()) {
            return Err(unknown(
                "attention with a window, a soft cap, sinks, a scale of its own or narrower values",
            ));
        }
        let mut own = Heads::causal(heads, kv_heads, head_dim);
        own.scale = shape.scale.map_or(own.scale, |scale| scale as f32);
        own.window = shape.window;
        own.cap = shape.cap.map(|cap| cap as f32);
        if matches!(kernel, AttentionKernel::GgmlCudaF16Cache | AttentionKernel::GgmlCudaF32Cache) {
            own.scale = ggml::score_scale(head_dim);
        }
        let one = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<Tensor, ComputeError> {
            let plan = match kernel {
                AttentionKernel::Eager => {
                    let products = self.eager_products(&own, q.rows(), k.rows());
                    return Ok(eager(&products, q, k, v, &own)?);
                }
                AttentionKernel::Flash2 => {
                    // The heads of all prompts of a batch fill the chip together.
                    let heads = heads * self.kernels.batch;
                    Plan::flash2(heads, head_dim, q.rows(), k.rows(), PROCESSORS)
                }
                AttentionKernel::Flash3 | AttentionKernel::Flash3Paged => {
                    let call = match kernel {
                        AttentionKernel::Flash3Paged => Flash3Call::Paged,
                        _ => Flash3Call::Contiguous,
                    };
                    let sizes = [self.kernels.batch, q.rows(), k.rows()];
                    Plan::flash3(call, &own, sizes, PROCESSORS)
                }
                AttentionKernel::Cudnn => Plan::CUDNN,
                AttentionKernel::GgmlCudaF16Cache => {
                    return Ok(ggml::attention(q, k, v, &own, Format::F16)?);
                }
                AttentionKernel::GgmlCudaF32Cache => {
                    return Ok(ggml::attention(q, k, v, &own, Format::F32)?);
                }
            };
            Ok(flash(&self.unit, self.format, q, k, v, &own, &plan))
        };
        if self.calls(q.rows()).len() == 1 {
            return one(q, k, v);
        }
        // Each decoded token sees the keys up to its own.
        let before = k.rows() - q.rows();
        let mut data = Vec::new();
        for rows in self.steps(q.rows()) {
            let keys = 0..before + rows.end;
            let (k, v) = (k.some_rows(keys.clone()), v.some_rows(keys));
            data.extend(one(&q.some_rows(rows), &k, &v)?.into_data());
        }
        Ok(Tensor::new(heads * head_dim, data))
    }

    /// The products of eager attention as the engine's file has them.
    fn eager_products(&self, heads: &Heads, queries: usize, keys: usize) -> attention::Products {
        let usual = attention::Products::new(&self.unit, self.format, heads, keys);
        let listed = |of, shape| self.kernels.products.order(of, shape);
        let scores = listed(ProductOf::Scores, [queries, keys, heads.head_dim]);
        let values = listed(ProductOf::Values, [queries, heads.head_dim, keys]);
        usual.in_order(scores, values)
    }

    /// Notes the orders of eager attention that the engine's file lists, where they gave every bit.
    fn list_eager(
        &self,
        choice: &mut Choice<'_>,
        q: &Tensor,
        k: &Tensor,
        shape: AttentionShape<'_>,
    ) {
        let (queries, keys, head_dim) = (q.rows(), k.rows(), shape.head_dim);
        let listed = [
            (ProductOf::Scores, [queries, keys, head_dim]),
            (ProductOf::Values, [queries, head_dim, keys]),
        ];
        let listed = listed
            .map(|(of, shape)| Product::new(of, shape, self.kernels.products.order(of, shape)));
        let own = listed.iter().any(|product| product.order() != Order::CHAIN);
        if let Some(best) = choice.best.as_mut().filter(|_| own) {
            best.products = listed.to_vec();
        }
    }

    /// Offers eager attention in the order whose sums fit best, where what it gave in the listed
    /// one is not what was observed. Of decoded tokens none is looked for.
    fn choose_eager(
        &self,
        choice: &mut Choice<'_>,
        listed: &Tensor,
        [q, k, v]: [&Tensor; 3],
        shape: AttentionShape<'_>,
    ) -> Result<(), ComputeError> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let heads = Heads {
            window: shape.window,
            cap: shape.cap.map(|cap| cap as f32),
            scale: shape.scale.map_or_else(
                || Heads::causal(heads, kv_heads, head_dim).scale,
                |scale| scale as f32,
            ),
            ..Heads::causal(heads, kv_heads, head_dim)
        };
        let (queries, keys) = (q.rows(), k.rows());
        let usual = attention::Products::new(&self.unit, self.format, &heads, keys);
        if self.calls(queries).len() > 1 {
            return Ok(());
        }
        let family = Order::family(head_dim, keys, residue_tile(self.format, keys), 64);
        let of_scores: &[u32] = if keys.is_multiple_of(8) { &[16] } else { &[16, 8] };
        // Of long rows a few tell as much as many of short ones.
        let row_costs = 2 * keys * heads.heads * head_dim;
        let count = rows_afforded(row_costs * family.len() * of_scores.len());
        let differs = |row: &usize| !same_row(listed.row(*row), choice.observed.row(*row));
        let rows: Vec<usize> = (0..queries).filter(differs).take(count).collect();
        let some = |x: &Tensor| {
            let values = rows.iter().flat_map(|row| x.row(*row).to_vec());
            Tensor::new(x.width(), values.collect())
        };
        let (asked, observed) = (some(q), some(choice.observed));
        let mut fitting = Vec::new();
        for values in family {
            for &instruction in of_scores {
                let scores = Order { instruction, ..Order::CHAIN };
                let products = usual.in_order(scores, values);
                let y = eager_of(&products, (&asked, &rows, queries), k, v, &heads)?;
                if differing(&y, &observed) == 0 {
                    fitting.push((scores, values));
                }
            }
        }
        let mut found: Option<Vec<Product>> = None;
        let mut also = Vec::new();
        for (tried, (scores, values)) in fitting.into_iter().enumerate() {
            if !is_tried(tried, found.is_some(), row_costs * queries) {
                break;
            }
            let y = eager(&usual.in_order(scores, values), q, k, v, &heads)?;
            let exact = differing(&y, choice.observed) == 0;
            let words = |of: &str, order: Order| {
                let usual = order == Order::CHAIN;
                let words = (!usual).then(|| format!(", {of} {}", order.in_words(self.format)));
                words.unwrap_or_default()
            };
            let (of_scores, of_values) = (words("scores", scores), words("values", values));
            let name = format!("attention eager{of_scores}{of_values}");
            match (&found, exact) {
                (None, _) => choice.offer(name, y),
                (Some(_), true) => also.push(name),
                (Some(_), false) => {}
            }
            if exact && found.is_none() {
                let of = |of, shape, order| Product::new(of, shape, order);
                found = Some(vec![
                    of(ProductOf::Scores, [queries, keys, head_dim], scores),
                    of(ProductOf::Values, [queries, head_dim, keys], values),
                ]);
            }
        }
        if let (Some(best), Some(products)) = (&mut choice.best, found) {
            best.products = products;
            best.also.extend(some_names(also));
        }
        Ok(())
    }

    /// `activation(gate) * up`.
    ///
    /// # Errors
    /// If the engine's kernel of that activation is not known.
    pub fn gated(
        &self,
        gate: &Tensor,
        up: &Tensor,
        activation: model::Activation,
    ) -> Result<Tensor, ComputeError> {
        let kernel = self.kernels.swiglu.first().unwrap_or(SwigluKernel::Rounded);
        self.gated_by(kernel, gate, up, activation)
    }

    fn gated_by(
        &self,
        kernel: SwigluKernel,
        gate: &Tensor,
        up: &Tensor,
        activation: model::Activation,
    ) -> Result<Tensor, ComputeError> {
        let rounds_activation = kernel == SwigluKernel::Rounded;
        let activation = match activation {
            model::Activation::Silu if kernel == SwigluKernel::GgmlCuda => {
                return Ok(ggml::swiglu(gate, up));
            }
            model::Activation::Silu => Activation::Silu,
            // PyTorch's; what other engines compute was not looked at.
            model::Activation::GeluTanh if rounds_activation => Activation::GeluTanh,
            model::Activation::GeluTanh | model::Activation::ClampedSwiglu => {
                return Err(unknown("a gated activation that is not SiLU"));
            }
        };
        let gated = Gated { activation, format: self.format, rounds_activation };
        Ok(gated.apply(gate, up))
    }

    /// `x * factor`, which PyTorch multiplies in f32 and rounds once.
    ///
    /// # Errors
    /// If the engine is not transformers.
    pub fn scale(&self, x: &Tensor, factor: f64, held: Held) -> Result<Tensor, ComputeError> {
        self.is_transformers("a factor beside weights")?;
        let factor = match held {
            Held::Number => factor as f32,
            Held::Stream => self.format.round(factor as f32),
            Held::Divisor => 1.0 / (1.0 / factor) as f32,
        };
        let data = x.data().iter().map(|x| self.format.round(x * factor));
        Ok(Tensor::new(x.width(), data.collect()))
    }

    /// `cap * tanh(x / cap)` in three operations of PyTorch, each rounded.
    ///
    /// # Errors
    /// If the engine is not transformers.
    pub fn soft_cap(&self, x: &Tensor, cap: f64) -> Result<Tensor, ComputeError> {
        self.is_transformers("a soft cap")?;
        let data = x.data().iter().map(|x| attention::soft_cap(self.format, *x, cap as f32));
        Ok(Tensor::new(x.width(), data.collect()))
    }

    fn is_transformers(&self, what: &str) -> Result<(), ComputeError> {
        match self.kernels.rms_norm.first() {
            None | Some(NormKernel::Transformers | NormKernel::TorchFused) => Ok(()),
            Some(NormKernel::Vllm | NormKernel::GgmlCuda) => Err(unknown(what)),
        }
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
            Call::Matmul { x, weight, bias } => {
                for kernel in self.kernels.linear_of(weight.name()).all() {
                    match kernel {
                        LinearKernel::Cublas => {
                            let operands = self.operands(weight, bias)?;
                            let calls = self.calls(x.rows()).into_iter().map(|(rows, tokens)| {
                                let shape = [tokens, weight.rows(), x.width()];
                                let pair = (&x.some_rows(rows.clone()), &observed.some_rows(rows));
                                self.call_of(&operands, pair, shape, "")
                            });
                            choice.offer_calls(calls.collect::<Result<_, _>>()?);
                        }
                        LinearKernel::GgmlCuda => {
                            let product =
                                GgmlProduct::of(self.unit, weight, self.held_bias(bias)?)?;
                            let calls = self.steps(x.rows()).into_iter().map(|rows| {
                                let (x, observed) =
                                    (x.some_rows(rows.clone()), observed.some_rows(rows));
                                let Some(operands) = product.by_blas(&x) else {
                                    let tensor = product.apply(&x, Order::CHAIN)?;
                                    return Ok(Made::by(product.name(&x), tensor));
                                };
                                let of = format!(" of {}", weight.kind());
                                self.call_of(operands, (&x, &observed), product.shape(&x), &of)
                            });
                            choice.offer_calls(calls.collect::<Result<_, ComputeError>>()?);
                        }
                        LinearKernel::VllmInt8 => {
                            let y = self.int8_product(x, weight, bias)?;
                            choice.offer(format!("product {}", name_of(kernel)), y);
                        }
                        kernel => {
                            let y =
                                self.fp8_matmul(&self.fp8_product_of(kernel, weight, bias)?, x)?;
                            choice.offer(format!("product {}", name_of(kernel)), y);
                        }
                    }
                }
            }
            Call::Attention { q, k, v, shape } => {
                let mut eager = None;
                self.each_kernel(call, &mut |name, y| {
                    if name == EAGER {
                        eager = Some((choice.mismatches(&y), y.clone()));
                    }
                    choice.offer(name, y);
                })?;
                let exact = choice.best.as_ref().is_some_and(|best| best.mismatches == 0);
                match eager {
                    Some((0, _)) => self.list_eager(&mut choice, q, k, shape),
                    // Rounded parts leave a quarter of the values off; another kernel more.
                    Some((off, y)) if !exact && off <= observed.data().len() / 2 => {
                        self.choose_eager(&mut choice, &y, [q, k, v], shape)?;
                    }
                    _ => {}
                }
            }
            Call::RmsNorm { .. } | Call::Rope { .. } | Call::Gated { .. } => {
                self.each_kernel(call, &mut |name, y| choice.offer(name, y))?;
            }
            Call::Add { a, b } => choice.offer("an addition", self.add(a, b)),
            Call::Scale { x, factor, held } => {
                choice.offer("a factor", self.scale(x, factor, held)?);
            }
            Call::SoftCap { x, cap } => choice.offer("a soft cap", self.soft_cap(x, cap)?),
            // An op of which no engine's kernel is known.
            _ => return Err(unknown(&format!("`{}`", call.op()))),
        }
        let nothing = || ComputeError::Recipe("the engine lists no kernel for this op".to_owned());
        choice.best.ok_or_else(nothing)
    }

    /// The kernels that give every bit of what was observed, in words; nothing of a product, and
    /// of an op of which the engine lists one kernel. Of eager attention no other order is tried.
    ///
    /// # Errors
    /// As the ops.
    pub fn exact_kernels(
        &self,
        call: &Call<'_>,
        observed: &Tensor,
    ) -> Result<Vec<String>, ComputeError> {
        let choice = Choice { observed, best: None };
        let mut exact = Vec::new();
        if self.is_open(call) {
            self.each_kernel(call, &mut |name, y| {
                if choice.mismatches(&y) == 0 {
                    exact.push(name);
                }
            })?;
        }
        Ok(exact)
    }

    /// Whether an op can be made by one kernel alone, in one order.
    pub fn settles(&self, call: &Call<'_>) -> bool {
        // Of what cuBLAS and llama.cpp multiply there are orders.
        let has_orders = match call {
            Call::Attention { .. } => {
                self.kernels.attention.first() == Some(AttentionKernel::Eager)
            }
            Call::Matmul { weight, .. } => {
                let name = weight.name();
                self.kernels.linear_of(name).is_open() || !self.quantises(name)
            }
            _ => false,
        };
        !has_orders && !self.is_open(call)
    }

    /// Whether the engine lists several kernels for an op that is no product.
    fn is_open(&self, call: &Call<'_>) -> bool {
        match call {
            Call::RmsNorm { .. } => self.kernels.rms_norm.is_open(),
            Call::Rope { .. } => self.kernels.rope.is_open(),
            Call::Attention { .. } => self.kernels.attention.is_open(),
            Call::Gated { .. } => self.kernels.swiglu.is_open(),
            _ => false,
        }
    }

    /// What each listed kernel of an op makes, with its name in words; nothing of a product, whose
    /// kernels have orders, and of what has no kernels.
    fn each_kernel(
        &self,
        call: &Call<'_>,
        offer: &mut dyn FnMut(String, Tensor),
    ) -> Result<(), ComputeError> {
        let kernels = &self.kernels;
        match *call {
            Call::RmsNorm { x, gain, eps } => {
                for kernel in kernels.rms_norm.all() {
                    let y = self.rms_norm_by(kernel, x, gain, eps)?;
                    offer(format!("norm {}", name_of(kernel)), y);
                }
            }
            Call::Rope { x, rope, head_dim, first_position } => {
                for kernel in kernels.rope.all() {
                    let y = self.rope_by(kernel, x, rope, head_dim, first_position)?;
                    offer(format!("rope {}", name_of(kernel)), y);
                }
            }
            Call::Attention { q, k, v, shape } => {
                let known = |kernel: &AttentionKernel| knows_attention(*kernel, shape, k.rows());
                for kernel in kernels.attention.all().filter(known) {
                    let y = self.attention_by(kernel, q, k, v, shape)?;
                    offer(format!("attention {}", name_of(kernel)), y);
                }
            }
            Call::Gated { gate, up, activation } => {
                for kernel in kernels.swiglu.all() {
                    let y = self.gated_by(kernel, gate, up, activation)?;
                    offer(format!("swiglu {}", name_of(kernel)), y);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether a kernel of attention is known with what is done to these scores. Where a window is
/// wider than the keys, transformers gives no mask; else `sdpa` takes its memory-efficient kernel.
fn knows_attention(kernel: AttentionKernel, shape: AttentionShape<'_>, keys: usize) -> bool {
    let slides = shape.window.is_some_and(|window| window <= keys);
    let unusual = shape.sinks.is_some() || shape.value_dim != shape.head_dim;
    match kernel {
        _ if unusual => false,
        AttentionKernel::Eager => true,
        AttentionKernel::Flash2 | AttentionKernel::Cudnn => !slides && shape.cap.is_none(),
        _ => shape.is_plain(),
    }
}

/// What an engine does with the codes and scales of a file is not known: its kernels multiply
/// them, and not the values that they stand for.
pub(super) fn known_weight(weight: Weight<'_>) -> Result<(), ComputeError> {
    if weight.is_plain() {
        return Ok(());
    }
    Err(match weight.is_scaled() || weight.kind().is_of_kernels() {
        true => unknown("a product with the codes and scales of a quantised checkpoint"),
        false => unknown(&format!("a product with {} blocks", weight.kind())),
    })
}

/// An op whose kernel in the engine is not known.
pub(super) fn unknown(what: &str) -> ComputeError {
    ComputeError::Recipe(format!(
        "the engine's kernel of {what} is not known, and this model needs it; take a recipe with \
         `stream` and without `engine`"
    ))
}

/// Copies the two values of each pair of each head from one place to another.
fn move_pairs(
    from: &Tensor,
    to: &mut Tensor,
    head_dim: usize,
    places: impl Iterator<Item = ((usize, usize), (usize, usize))>,
) {
    for (old, new) in places {
        for row in 0..from.rows() {
            let heads = to.row_mut(row).chunks_exact_mut(head_dim);
            for (to, from) in heads.zip(from.row(row).chunks_exact(head_dim)) {
                (to[new.0], to[new.1]) = (from[old.0], from[old.1]);
            }
        }
    }
}

/// What a call of the engine came to.
struct Made {
    /// The kernel in words.
    kernel: String,
    /// Other orders that fit as well, in words.
    also: Vec<String>,
    /// Where cuBLAS multiplied, its shape and order.
    product: Option<Product>,
    tensor: Tensor,
}

impl Made {
    /// By a kernel without orders.
    fn by(kernel: String, tensor: Tensor) -> Made {
        Made { kernel, also: Vec::new(), product: None, tensor }
    }
}

/// The best of the kernels so far.
struct Choice<'a> {
    observed: &'a Tensor,
    best: Option<Chosen>,
}

impl Choice<'_> {
    /// Values that differ from what was observed; all of them where the shape does.
    fn mismatches(&self, tensor: &Tensor) -> usize {
        let same = (tensor.rows(), tensor.width()) == (self.observed.rows(), self.observed.width());
        if same { differing(tensor, self.observed) } else { tensor.data().len() }
    }

    fn offer(&mut self, name: impl AsRef<str>, tensor: Tensor) {
        let name = name.as_ref().to_owned();
        let mismatches = self.mismatches(&tensor);
        match &mut self.best {
            Some(best) if mismatches == best.mismatches => best.also.push(name),
            Some(best) if mismatches > best.mismatches => {}
            best => {
                let also = Vec::new();
                let products = Vec::new();
                *best = Some(Chosen { tensor, kernel: name, mismatches, also, products });
            }
        }
    }

    /// Offers what the calls of an op came to, the prompt's first: their rows below one another.
    fn offer_calls(&mut self, calls: Vec<Made>) {
        let (mut names, mut also, mut products, mut data) = (vec![], vec![], vec![], vec![]);
        for (call, made) in calls.into_iter().enumerate() {
            let prefix = if call == 0 { "" } else { "decoded " };
            let name = match names.first() == Some(&made.kernel) {
                // Decoded by the prompt's own kernel.
                true => made.kernel,
                false => format!("{prefix}{}", made.kernel),
            };
            if !names.contains(&name) {
                names.push(name);
            }
            also.extend(made.also.iter().map(|other| format!("{prefix}{other}")));
            products.extend(made.product);
            data.extend(made.tensor.into_data());
        }
        products.dedup();
        let name = names.join(", ");
        self.offer(&name, Tensor::new(self.observed.width().max(1), data));
        if let Some(best) = self.best.as_mut().filter(|best| best.kernel == name) {
            best.products = products;
            best.also.extend(some_names(also));
        }
    }
}
