//! The device arm: every op of a transformer, on a real GPU.
//!
//! Activations come from the host and go back to it at every op, because every
//! site is looked at; weights stay on the GPU. Between upload and download each
//! op is the sequence that the emulated arm defines, except for the products,
//! which are the library's own.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use cudarc::driver::CudaSlice;

use super::cublaslt::{Operands, Spec};
use super::gpu::{DeviceError, Lease, State};
use super::kernels::{AttentionCall, Granularity, Product, Scales};
use super::nccl::Sums;
use super::weights::{
    ALIGNMENT, Digests, Entry, Form, Operand, fill_scales, group_of, held_as, scales_of,
};
use crate::compute::call::Call;
use crate::compute::delta::{Convolution, DeltaRule};
use crate::compute::emulated::gemm::{GemmError, MOST_INTEGERS};
use crate::compute::experts::{self, Products};
use crate::compute::kv_cache::Cached;
use crate::compute::{
    AttentionShape, ComputeError, GemmRecord, Ops, check_gain, check_interrupt, check_matmul,
    check_same_shape, check_tokens, checkpoint, gain_and_bias, parallel, rope,
};
use crate::dtype::Format;
use crate::model::{Activation, Rope, RopeLayout, Routing, Weight};
use crate::op::{Accumulate, ActivationScale, Recipe, WeightScale};
use crate::tensor::Tensor;

/// Elements of K that share a block scale.
const BLOCK: usize = 128;
/// Bytes of attention scores that are held at a time.
const MOST_SCORES: usize = 256 << 20;
/// Rows of one attention launch.
const MOST_ROWS: usize = 32_768;

/// The weights of every product, by shape and algorithm.
type Gemms = BTreeMap<([usize; 3], String), Vec<String>>;

/// The device arm of one recipe on one GPU.
pub struct Device {
    gpu: Lease,
    /// The other GPUs, where several compute a pass together.
    others: Vec<Lease>,
    /// What adds their results, once there were any.
    sums: Mutex<Option<Sums>>,
    recipe: Recipe,
    digests: Digests,
    /// What each product was computed with, and for which weights.
    gemms: Mutex<Gemms>,
}

impl Device {
    /// The arm that computes as `recipe` prescribes, on that GPU, and where the recipe deals
    /// products out on the others too.
    pub fn new(gpu: Lease, others: Vec<Lease>, recipe: &Recipe) -> Device {
        let (digests, gemms, sums) = (Digests::default(), Mutex::default(), Mutex::default());
        Device { gpu, others, sums, recipe: *recipe, digests, gemms }
    }

    fn entry(
        &self,
        state: &mut State,
        weight: Weight<'_>,
        form: Form,
    ) -> Result<Arc<Entry>, DeviceError> {
        let State { weights, stream, kernels, .. } = state;
        weights.get(stream, kernels, weight, &self.digests.of(weight), form)
    }

    fn values(&self, state: &mut State, weight: Weight<'_>) -> Result<Arc<Entry>, DeviceError> {
        self.entry(state, weight, Form::Values)
    }

    fn note(&self, spec: &Spec, algorithm: String, weight: Weight<'_>) {
        let shape = [spec.tokens, spec.outputs, spec.inner];
        let mut gemms = self.gemms.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let weights = gemms.entry((shape, algorithm)).or_default();
        if !weights.iter().any(|name| name == weight.name()) {
            weights.push(weight.name().to_owned());
        }
    }

    fn weight_granularity(recipe: &Recipe) -> Granularity {
        match recipe.scale.weight {
            _ if !recipe.gemm.is_scaled() => Granularity::Tensor,
            WeightScale::Tensor | WeightScale::Mx | WeightScale::Nv => Granularity::Tensor,
            WeightScale::Channel => Granularity::Row,
            WeightScale::Block128 => Granularity::Block(BLOCK as u64),
        }
    }

    fn activation_granularity(recipe: &Recipe) -> Granularity {
        match recipe.scale.activation {
            _ if !recipe.gemm.is_scaled() => Granularity::Tensor,
            ActivationScale::Tensor | ActivationScale::Mx | ActivationScale::Nv => {
                Granularity::Tensor
            }
            ActivationScale::Token => Granularity::Row,
            ActivationScale::Block128 => Granularity::Block(1),
        }
    }

    /// An activation's codes and scales; rows are padded too. `held` is the scale that the
    /// checkpoint has for it.
    fn quantise(
        &self,
        state: &State,
        x: &Tensor,
        recipe: &Recipe,
        held: Option<f32>,
    ) -> Result<Operand, DeviceError> {
        let State { stream, kernels, .. } = state;
        let (format, granularity) = (recipe.gemm, Self::activation_granularity(recipe));
        let (rows, width) = (x.rows(), x.width());
        let (padded_rows, padded_width) =
            (rows.next_multiple_of(ALIGNMENT), width.next_multiple_of(ALIGNMENT));
        let values = stream.clone_htod(x.data())?;
        let count = scales_of(granularity, rows, width);
        let mut most = stream.alloc_zeros::<u32>(count)?;
        if granularity == Granularity::Tensor {
            kernels.absmax_all(stream, &values, (rows * width) as u64, &mut most)?;
        } else {
            let (shape, group) = ((rows as u64, width as u64), group_of(granularity, width));
            kernels.absmax_groups(stream, &values, shape, group, &mut most)?;
        }
        let mut scales = stream.alloc_zeros::<f32>(count)?;
        fill_scales(stream, kernels, format, &most, &mut scales)?;
        if let Some(scale) = held {
            stream.memcpy_htod(&[scale], &mut scales)?;
        }
        if let Some(scale) = stream.clone_dtoh(&scales)?.iter().find(|scale| !scale.is_finite()) {
            return Err(DeviceError::Refused(format!(
                "a scale of the activation is {scale}: the input holds NaN or infinity"
            )));
        }
        let row_bytes = padded_width * format.bytes();
        let mut codes = stream.alloc_zeros::<u8>(padded_rows * row_bytes)?;
        let shape = (rows as u64, width as u64, padded_width as u64);
        let shared = Scales { values: &scales, granularity };
        let mut target = codes.slice_mut(..rows * row_bytes);
        kernels.convert(stream, format, &values, shape, shared, &mut target)?;
        Ok(Operand { codes, scales, granularity, padded_rows, padded_width })
    }

    /// The format that the library is to write.
    fn library_output(recipe: &Recipe, scaled: bool) -> Format {
        // Of FP8 any, of a format of 16 bits its own, of others f32.
        let writes = match recipe.gemm {
            // Sums in 32 bits.
            Format::Int8 => return Format::Int8,
            format if format.is_fp8() => scaled,
            format => format.bits() == 16 && recipe.output == format,
        };
        if writes { recipe.output } else { Format::F32 }
    }

    /// A product, or of a weight whose K is dealt out that of the elements `inner`, which x has.
    fn multiply(
        &self,
        state: &mut State,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
        inner: Option<&Range<usize>>,
    ) -> Result<Tensor, DeviceError> {
        let bias = bias.map(|bias| self.values(state, bias)).transpose()?;
        let bias = match bias.as_deref() {
            Some(Entry::Values(values)) => Some(values),
            _ => None,
        };
        let of_weight = checkpoint::of_weight(&self.recipe, &weight);
        let of_weight = of_weight.map_err(|error| DeviceError::Refused(error.to_string()))?;
        if let Some(blocks) = of_weight.as_ref().and_then(|of_weight| of_weight.blocks) {
            return Err(DeviceError::Refused(format!(
                "the weight {} is {}, which the device arm does not multiply yet",
                weight.in_words(),
                blocks.format
            )));
        }
        let held = of_weight.as_ref().and_then(|of_weight| of_weight.held);
        let recipe = &of_weight.map_or(self.recipe, |of_weight| of_weight.recipe);
        let granularity = Self::weight_granularity(recipe);
        let form = match held {
            Some(_) => Form::Held(recipe.gemm, granularity),
            None => Form::Operand(recipe.gemm, granularity),
        };
        let entry = self.entry(state, weight, form)?;
        let Entry::Operand(w) = entry.as_ref() else {
            return Err(DeviceError::Refused("a weight of another form".to_owned()));
        };
        let input_scale = held.and_then(|held| held.input_scale);
        let activation = self.quantise(state, x, recipe, input_scale)?;
        let (tokens, outputs) = (x.rows(), weight.rows());
        let mut y = state.stream.alloc_zeros::<f32>(tokens * outputs)?;
        let shape = (tokens, outputs, inner);
        let operands = (&activation, w);
        if matches!(w.granularity, Granularity::Block(_)) {
            self.multiply_by_block(state, recipe, weight, operands, shape, bias, &mut y)?;
        } else {
            self.multiply_whole(state, recipe, weight, operands, shape, bias, &mut y)?;
        }
        download(state, &y, outputs)
    }

    /// One product over all of K. The library applies scales of whole tensors;
    /// finer ones are applied by the kernel that finishes the product.
    #[expect(clippy::too_many_arguments, reason = "one product: its operands, shape and recipe")]
    fn multiply_whole(
        &self,
        state: &mut State,
        recipe: &Recipe,
        weight: Weight<'_>,
        (x, w): (&Operand, &Operand),
        (tokens, outputs, part): (usize, usize, Option<&Range<usize>>),
        bias: Option<&CudaSlice<f32>>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DeviceError> {
        if recipe.gemm == Format::Int8 && x.padded_width > MOST_INTEGERS {
            let problem = GemmError::TooLong { inner: x.padded_width };
            return Err(DeviceError::Refused(problem.to_string()));
        }
        let per_tensor = |operand: &Operand| operand.granularity == Granularity::Tensor;
        let by_library = recipe.gemm.is_fp8() && per_tensor(x) && per_tensor(w);
        let spec = Spec {
            operands: recipe.gemm,
            output: Self::library_output(recipe, by_library),
            tokens: x.padded_rows,
            outputs: w.padded_rows,
            inner: x.padded_width,
            stride: w.padded_width,
            x_stride: x.padded_width,
            fast: recipe.accumulate == Accumulate::Fast,
            scaled: by_library,
        };
        let scales = by_library.then_some((&w.scales, &x.scales));
        let skip = part.map_or(0, |part| part.start * recipe.gemm.bytes());
        let operands = Operands { w: &w.codes, x: &x.codes, skip, x_skip: 0, scales };
        let product = self.product(state, &spec, &operands, weight)?;
        let product = Product {
            values: &product,
            format: spec.output,
            stride: spec.outputs as u64,
            tokens: tokens as u64,
            outputs: outputs as u64,
        };
        let unscaled = (!by_library).then_some((x.scales(), w.scales()));
        let State { stream, kernels, .. } = state;
        Ok(kernels.finish(stream, &product, unscaled, recipe.output, bias, y)?)
    }

    /// One product per 128 elements of K, each scaled and added by a kernel.
    #[expect(clippy::too_many_arguments, reason = "one product: its operands, shape and recipe")]
    fn multiply_by_block(
        &self,
        state: &mut State,
        recipe: &Recipe,
        weight: Weight<'_>,
        (x, w): (&Operand, &Operand),
        (tokens, outputs, part): (usize, usize, Option<&Range<usize>>),
        bias: Option<&CudaSlice<f32>>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DeviceError> {
        let whole = weight.width().div_ceil(BLOCK);
        let of_part = part.map_or(0..whole, |part| part.start / BLOCK..part.end.div_ceil(BLOCK));
        // The kernel finds both scales of a block by its number within the part.
        let w_scales = match part {
            None => None,
            Some(_) => {
                let scales = state.stream.clone_dtoh(&w.scales)?;
                let rows = scales.chunks_exact(whole);
                let of_rows = rows.flat_map(|row| row[of_part.clone()].iter().copied());
                Some(state.stream.clone_htod(&of_rows.collect::<Vec<f32>>())?)
            }
        };
        let w_scales = match &w_scales {
            Some(values) => Scales { values, granularity: w.granularity },
            None => w.scales(),
        };
        let blocks = of_part.len();
        let mut main = state.stream.alloc_zeros::<u8>(tokens * outputs * 4)?;
        for block in 0..blocks {
            let width = BLOCK.min(x.padded_width - block * BLOCK);
            let spec = Spec {
                operands: recipe.gemm,
                output: Format::F32,
                tokens: x.padded_rows,
                outputs: w.padded_rows,
                inner: width,
                stride: w.padded_width,
                x_stride: x.padded_width,
                fast: true,
                scaled: false,
            };
            let skip = |block: usize| block * BLOCK * recipe.gemm.bytes();
            let (skip, x_skip) = (skip(of_part.start + block), skip(block));
            let operands = Operands { w: &w.codes, x: &x.codes, skip, x_skip, scales: None };
            let partial = self.product(state, &spec, &operands, weight)?;
            let partial = Product {
                values: &partial,
                format: Format::F32,
                stride: spec.outputs as u64,
                tokens: tokens as u64,
                outputs: outputs as u64,
            };
            let place = (block as u64, blocks as u64);
            let State { stream, kernels, .. } = state;
            kernels.add_block(stream, &partial, place, x.scales(), w_scales, &mut main)?;
        }
        let sum = Product {
            values: &main,
            format: Format::F32,
            stride: outputs as u64,
            tokens: tokens as u64,
            outputs: outputs as u64,
        };
        let one = state.stream.clone_htod(&[1.0f32])?;
        let one = Scales { values: &one, granularity: Granularity::Tensor };
        let State { stream, kernels, .. } = state;
        Ok(kernels.finish(stream, &sum, Some((one, one)), recipe.output, bias, y)?)
    }

    /// The library's product, with the algorithm that the rule picks for its shape.
    fn product(
        &self,
        state: &mut State,
        spec: &Spec,
        operands: &Operands<'_>,
        weight: Weight<'_>,
    ) -> Result<CudaSlice<u8>, DeviceError> {
        let State { stream, library, algorithms, .. } = state;
        let key = (*spec, self.recipe.pin);
        let algorithm = match algorithms.get(&key) {
            Some(algorithm) => *algorithm,
            None => {
                let chosen = library.choose(stream, spec, operands, &self.recipe.pin)?;
                algorithms.insert(key, chosen);
                chosen
            }
        };
        let bytes = spec.tokens * spec.outputs * spec.output_bytes();
        let mut product = stream.alloc_zeros::<u8>(bytes)?;
        library.multiply(stream, spec, operands, &algorithm, &mut product)?;
        self.note(spec, algorithm.to_string(), weight);
        Ok(product)
    }

    /// Runs an op of one or two inputs and one result of the first one's shape.
    fn elementwise(
        &self,
        what: &str,
        a: &Tensor,
        b: &Tensor,
        run: impl Fn(
            &State,
            &CudaSlice<f32>,
            &CudaSlice<f32>,
            &mut CudaSlice<f32>,
        ) -> Result<(), DeviceError>,
    ) -> Result<Tensor, ComputeError> {
        check_same_shape(what, a, b)?;
        self.gpu.with(what, |state| {
            let first = state.stream.clone_htod(a.data())?;
            let second = state.stream.clone_htod(b.data())?;
            let mut y = state.stream.alloc_zeros::<f32>(a.data().len())?;
            run(state, &first, &second, &mut y)?;
            download(state, &y, a.width())
        })
    }
}

/// A result on the host. Every piece of work ends here, so its errors are seen here.
pub(super) fn download(
    state: &State,
    values: &CudaSlice<f32>,
    width: usize,
) -> Result<Tensor, DeviceError> {
    let host = state.stream.clone_dtoh(values)?;
    state.stream.synchronize()?;
    Ok(Tensor::new(width, host))
}

/// Values as the type of a sum holds them.
fn as_bytes(values: &Tensor, format: Format) -> Vec<u8> {
    let size = format.bytes();
    let codes = values.data().iter().map(|value| format.encode(*value).to_le_bytes());
    codes.flat_map(|code| code.into_iter().take(size)).collect()
}

/// The values of such bytes.
fn of_bytes(bytes: &[u8], format: Format) -> Vec<f32> {
    let decode = |bytes: &[u8]| {
        let mut code = [0; 4];
        code[..bytes.len()].copy_from_slice(bytes);
        format.decode(u32::from_le_bytes(code))
    };
    bytes.chunks_exact(format.bytes()).map(decode).collect()
}

impl Ops for Device {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        match *call {
            Call::Embed { weight, tokens } => self.embed(weight, tokens),
            Call::RmsNorm { x, gain, eps } => self.rms_norm(x, gain, eps),
            Call::LayerNorm { x, gain, bias, eps } => self.layer_norm(x, gain, bias, eps),
            Call::Matmul { x, weight, bias } => self.matmul(x, weight, bias),
            Call::Rope { x, rope, head_dim, first_position } => {
                self.rope(x, rope, head_dim, first_position)
            }
            Call::Cached(cached) => self.cached(&cached),
            Call::Attention { q, k, v, shape } => self.attention(q, k, v, shape),
            Call::Gated { gate, up, activation } => self.gated(gate, up, activation),
            Call::Activated { x, activation } => {
                self.gated(x, &Tensor::new(x.width(), vec![1.0; x.data().len()]), activation)
            }
            Call::Route { scores, bias, routing } => self.route(scores, bias, routing),
            Call::Experts(products) => self.experts(&products),
            Call::Mix { x, routes, used } => self.mix(x, routes, used),
            Call::SigmoidGate { x, gate } => self.sigmoid_gate(x, gate),
            Call::Convolve(convolution) => self.convolve(&convolution),
            Call::Gates(gates) => gates.made(),
            Call::Delta(rule) => self.delta(&rule),
            Call::Add { a, b } => self.add(a, b),
            Call::Scale { x, factor, .. } => self.scale(x, factor),
            Call::SoftCap { x, cap } => self.soft_cap(x, cap),
        }
    }

    fn gemms(&self) -> Vec<GemmRecord> {
        let gemms = self.gemms.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let record = |((shape, algorithm), weights): (&([usize; 3], String), &Vec<String>)| {
            GemmRecord { shape: *shape, algorithm: algorithm.clone(), weights: weights.clone() }
        };
        gemms.iter().map(record).collect()
    }
}

impl Device {
    fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError> {
        check_tokens(&weight, tokens)?;
        self.gpu.with("the embedding", |state| {
            let entry = self.entry(state, weight, Form::Table)?;
            let Entry::Table(table) = entry.as_ref() else {
                return Err(DeviceError::Refused("a table of another form".to_owned()));
            };
            let State { stream, kernels, .. } = state;
            let (rows, width) = (tokens.len(), weight.width());
            let tokens = stream.clone_htod(tokens)?;
            let mut y = stream.alloc_zeros::<f32>(rows * width)?;
            let (kind, table) = (held_as(weight), table.as_view());
            let shape = (rows as u64, width as u64);
            kernels.dequantise(stream, kind, &table, Some(&tokens), shape.0, shape.1, &mut y)?;
            download(state, &y, width)
        })
    }

    fn rms_norm(&self, x: &Tensor, gain: Weight<'_>, eps: f32) -> Result<Tensor, ComputeError> {
        check_gain(x, &gain)?;
        self.gpu.with("an RMSNorm", |state| {
            let entry = self.values(state, gain)?;
            let Entry::Values(gain) = entry.as_ref() else {
                return Err(DeviceError::Refused("a gain of another form".to_owned()));
            };
            let State { stream, kernels, .. } = state;
            let values = stream.clone_htod(x.data())?;
            let mut y = stream.alloc_zeros::<f32>(x.data().len())?;
            kernels.rms_norm(stream, &values, gain, eps, &mut y)?;
            download(state, &y, x.width())
        })
    }

    fn layer_norm(
        &self,
        x: &Tensor,
        gain: Weight<'_>,
        bias: Option<Weight<'_>>,
        eps: f32,
    ) -> Result<Tensor, ComputeError> {
        let width = gain.width();
        let (gain, bias) = gain_and_bias(x, gain, bias)?;
        self.gpu.with("a LayerNorm", |state| {
            let State { stream, kernels, .. } = state;
            let (gain, bias) = (stream.clone_htod(&gain)?, stream.clone_htod(&bias)?);
            let values = stream.clone_htod(x.data())?;
            let mut y = stream.alloc_zeros::<f32>(x.data().len())?;
            kernels.layer_norm(stream, &values, (&gain, &bias, width), eps, &mut y)?;
            download(state, &y, x.width())
        })
    }

    /// The router's weights. Which experts are taken is sorted out on the host; of sigmoids from
    /// those that the GPU made.
    fn route(
        &self,
        scores: &Tensor,
        bias: Option<Weight<'_>>,
        routing: &Routing,
    ) -> Result<Tensor, ComputeError> {
        experts::check_route(scores, bias.as_ref(), routing)?;
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        self.gpu.with("a router of experts", |state| {
            let values = state.stream.clone_htod(scores.data())?;
            let by = if experts::by_sigmoid(routing) {
                let mut powers = state.stream.alloc_zeros::<f32>(scores.data().len())?;
                state.kernels.sigmoid(&state.stream, &values, &mut powers)?;
                let mut by = download(state, &powers, scores.width())?;
                if let Some(bias) = &bias {
                    by.add_to_rows(bias);
                }
                by
            } else {
                scores.clone()
            };
            let taken: Vec<i32> = (0..by.rows())
                .flat_map(|row| experts::chosen(by.row(row), routing))
                .map(|expert| expert as i32)
                .collect();
            let State { stream, kernels, .. } = state;
            let taken = stream.clone_htod(&taken)?;
            let mut y = stream.alloc_zeros::<f32>(scores.data().len())?;
            let shape = (scores.rows() as u64, scores.width() as u64, routing.used as u64);
            let factor = routing.factor as f32;
            kernels.route(stream, &values, &taken, shape, routing.scores, factor, &mut y)?;
            download(state, &y, scores.width())
        })
    }

    fn experts(&self, products: &Products<'_>) -> Result<Tensor, ComputeError> {
        let made = products.by_expert(|x, weight, bias| Ok([self.matmul(x, weight, bias)?]));
        made.map(|[y]| y)
    }

    fn mix(&self, x: &Tensor, routes: &Tensor, used: usize) -> Result<Tensor, ComputeError> {
        experts::check_mix(x, routes, used)?;
        let taken = experts::taken(routes, used);
        let weights: Vec<f32> =
            taken.iter().enumerate().map(|(at, &e)| routes.row(at / used)[e]).collect();
        self.gpu.with("the sum of a mixture of experts", |state| {
            let State { stream, kernels, .. } = state;
            let (values, weights) = (stream.clone_htod(x.data())?, stream.clone_htod(&weights)?);
            let width = x.width() / used;
            let mut y = stream.alloc_zeros::<f32>(x.rows() * width)?;
            let shape = (x.rows() as u64, used as u64, width as u64);
            kernels.mix(stream, &values, &weights, shape, &mut y)?;
            download(state, &y, width)
        })
    }

    fn sigmoid_gate(&self, x: &Tensor, gate: &Tensor) -> Result<Tensor, ComputeError> {
        experts::check_gate(x, gate)?;
        self.gpu.with("the gate of a shared expert", |state| {
            let State { stream, kernels, .. } = state;
            let (values, gates) = (stream.clone_htod(x.data())?, stream.clone_htod(gate.data())?);
            let mut y = stream.alloc_zeros::<f32>(x.data().len())?;
            let shape = (x.rows() as u64, x.width() as u64, gate.width() as u64);
            kernels.sigmoid_gate(stream, &values, &gates, shape, &mut y)?;
            download(state, &y, x.width())
        })
    }

    fn convolve(&self, convolution: &Convolution<'_>) -> Result<Tensor, ComputeError> {
        let taps = convolution.checked()?;
        let [rows, channels] = convolution.shape();
        self.gpu.with("a convolution", |state| {
            let State { stream, kernels, .. } = state;
            let values = stream.clone_htod(convolution.x.data())?;
            let taps = stream.clone_htod(&taps)?;
            let mut y = stream.alloc_zeros::<f32>(rows * channels)?;
            let count = convolution.weight.width() as u64;
            let shape = (rows as u64, channels as u64, count, convolution.first as u64);
            kernels.convolve(stream, &values, &taps, shape, &mut y)?;
            download(state, &y, channels)
        })
    }

    fn delta(&self, rule: &DeltaRule<'_>) -> Result<Tensor, ComputeError> {
        rule.check()?;
        let [rows, width] = rule.shape();
        let net = rule.net;
        self.gpu.with("a gated delta rule", |state| {
            let State { stream, kernels, .. } = state;
            let values = stream.clone_htod(rule.x.data())?;
            let gates = stream.clone_htod(rule.gates.data())?;
            let cells = net.value_heads * net.key_dim * net.value_dim;
            let mut memory = stream.alloc_zeros::<f32>(cells)?;
            let mut y = stream.alloc_zeros::<f32>(rows * width)?;
            let positions = (rule.x.rows() as u64, rule.first as u64);
            kernels.delta(stream, &values, &gates, net, positions, &mut memory, &mut y)?;
            download(state, &y, width)
        })
    }

    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_matmul(x, &weight, bias.as_ref())?;
        check_interrupt()?;
        let what = format!("the product with `{}`", weight.name());
        let of_weight = checkpoint::of_weight(&self.recipe, &weight)?;
        let recipe = of_weight.map_or(self.recipe, |of_weight| of_weight.recipe);
        if let Some(parts) = parallel::parts(&recipe, &weight)? {
            return self.multiply_by_rank(&what, &parts, x, weight, bias);
        }
        self.gpu.with(&what, |state| self.multiply(state, x, weight, bias, None))
    }

    /// A product whose K is dealt out: each GPU's part of it, and the library's sum of them.
    fn multiply_by_rank(
        &self,
        what: &str,
        parts: &[Range<usize>],
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        let gpus: Vec<&Lease> = std::iter::once(&self.gpu).chain(&self.others).collect();
        if gpus.len() != parts.len() {
            return Err(ComputeError::Recipe(format!(
                "{} GPUs were taken for a product of {} parts",
                gpus.len(),
                parts.len()
            )));
        }
        let output = self.recipe.output;
        let mut made = Vec::with_capacity(parts.len());
        for (rank, (gpu, inner)) in gpus.iter().zip(parts).enumerate() {
            let x = x.columns(inner.clone());
            let bias = bias.filter(|_| rank == 0);
            let part =
                gpu.with(what, |state| self.multiply(state, &x, weight, bias, Some(inner)))?;
            made.push(as_bytes(&part, output));
        }
        let context = |gpu: &&Lease| gpu.with(what, |state| Ok(Arc::clone(&state.context)));
        let mut sums = self.sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if sums.is_none() {
            let contexts = gpus.iter().map(context).collect::<Result<Vec<_>, _>>()?;
            *sums = Some(self.gpu.with(what, |_| Sums::new(&contexts))?);
        }
        let Some(sums) = sums.as_mut() else {
            return Err(ComputeError::Recipe("no sums over several GPUs".to_owned()));
        };
        let sum = self.gpu.with(what, |_| sums.add(&made, output))?;
        Ok(Tensor::new(weight.rows(), of_bytes(&sum, output)))
    }

    fn rope(
        &self,
        x: &Tensor,
        geometry: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        let pairs = geometry.dimensions / 2;
        if geometry.dimensions > head_dim || !x.width().is_multiple_of(head_dim) {
            return Err(ComputeError::Shape {
                what: "a rotary position embedding".to_owned(),
                left: format!("rows of {} in heads of {head_dim}", x.width()),
                right: format!("{} turning dimensions", geometry.dimensions),
            });
        }
        let angles: Vec<(f32, f32)> = (0..x.rows())
            .flat_map(|row| rope::angles(geometry, first_position + row))
            .map(|(sin, cos)| (sin as f32, cos as f32))
            .collect();
        let (sines, cosines): (Vec<f32>, Vec<f32>) = angles.into_iter().unzip();
        self.gpu.with("a rotary position embedding", |state| {
            let State { stream, kernels, .. } = state;
            let values = stream.clone_htod(x.data())?;
            let tables = (stream.clone_htod(&sines)?, stream.clone_htod(&cosines)?);
            let mut y = stream.alloc_zeros::<f32>(x.data().len())?;
            let heads = (x.width() / head_dim) as u64;
            let start = rope::first(geometry, head_dim) as u64;
            let shape = (x.rows() as u64, heads, head_dim as u64, pairs as u64, start);
            let interleaved = geometry.layout == RopeLayout::Interleaved;
            kernels.rope(stream, &values, (&tables.0, &tables.1), shape, interleaved, &mut y)?;
            download(state, &y, x.width())
        })
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape<'_>,
    ) -> Result<Tensor, ComputeError> {
        let AttentionShape { heads, kv_heads, head_dim, value_dim, first_position, .. } = shape;
        let positions = k.rows();
        if first_position + q.rows() > positions || v.rows() != positions {
            return Err(ComputeError::Shape {
                what: "attention".to_owned(),
                left: format!("{} queries from position {first_position}", q.rows()),
                right: format!("{positions} keys and {} values", v.rows()),
            });
        }
        let rows_at_once = (MOST_SCORES / (heads * positions * 4).max(1)).clamp(1, MOST_ROWS);
        self.gpu.with("attention", |state| {
            let State { stream, kernels, .. } = state;
            let (keys, values) = (stream.clone_htod(k.data())?, stream.clone_htod(v.data())?);
            let sinks = shape.sinks.map(|sinks| stream.clone_htod(sinks)).transpose()?;
            let mut out = Tensor::zeros(q.rows(), heads * value_dim);
            for first in (0..q.rows()).step_by(rows_at_once) {
                let rows = rows_at_once.min(q.rows() - first);
                let part = first * q.width()..(first + rows) * q.width();
                let queries = stream.clone_htod(&q.data()[part])?;
                let mut scores = stream.alloc_zeros::<f32>(rows * heads * positions)?;
                let mut y = stream.alloc_zeros::<f32>(rows * heads * value_dim)?;
                let call = AttentionCall {
                    rows: rows as u64,
                    heads: heads as u64,
                    kv_heads: kv_heads as u64,
                    head_dim: head_dim as u64,
                    value_dim: value_dim as u64,
                    first_position: (first_position + first) as u64,
                    positions: positions as u64,
                    window: shape.window.map_or(u64::MAX, |window| window as u64),
                    scale: shape.f32_scale(),
                    cap: shape.cap.unwrap_or(0.0) as f32,
                };
                let (sinks, scores) = (sinks.as_ref(), &mut scores);
                kernels.attention(stream, &queries, &keys, &values, call, sinks, scores, &mut y)?;
                let width = out.width();
                let target = &mut out.data_mut()[first * width..(first + rows) * width];
                stream.memcpy_dtoh(&y, target)?;
                stream.synchronize()?;
            }
            Ok(out)
        })
    }

    fn gated(
        &self,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<Tensor, ComputeError> {
        self.elementwise("a gated activation", gate, up, |state, gate, up, y| {
            let State { stream, kernels, .. } = state;
            Ok(kernels.gated(stream, activation, gate, up, y)?)
        })
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError> {
        self.elementwise("a residual addition", a, b, |state, a, b, y| {
            Ok(state.kernels.add(&state.stream, a, b, y)?)
        })
    }

    fn scale(&self, x: &Tensor, factor: f64) -> Result<Tensor, ComputeError> {
        self.each("a scale", x, |state, x, y| {
            Ok(state.kernels.scale(&state.stream, x, factor as f32, y)?)
        })
    }

    fn soft_cap(&self, x: &Tensor, cap: f64) -> Result<Tensor, ComputeError> {
        self.each("a soft cap", x, |state, x, y| {
            Ok(state.kernels.soft_cap(&state.stream, x, cap as f32, y)?)
        })
    }

    fn cached(&self, cached: &Cached<'_>) -> Result<Tensor, ComputeError> {
        let Cached { x, format, scale } = *cached;
        self.each("a cache of keys or values", x, |state, x, y| {
            Ok(state.kernels.cached(&state.stream, x, (format, scale), y)?)
        })
    }

    /// Runs an op of one input and one result of its shape.
    fn each(
        &self,
        what: &str,
        x: &Tensor,
        run: impl Fn(&State, &CudaSlice<f32>, &mut CudaSlice<f32>) -> Result<(), DeviceError>,
    ) -> Result<Tensor, ComputeError> {
        self.gpu.with(what, |state| {
            let values = state.stream.clone_htod(x.data())?;
            let mut y = state.stream.alloc_zeros::<f32>(x.data().len())?;
            run(state, &values, &mut y)?;
            download(state, &y, x.width())
        })
    }
}
