//! The emulated arm: the recipe's arithmetic for every op.
//!
//! GEMMs go through the chip's tensor core, everything else through the f32
//! sequences of `kernels.rs`. It knows no truth: it says what a chip returns,
//! right or wrong.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::chip::{Chip, Unit, chip};
use super::engine::EngineArm;
use super::gemm::{Operand, Scales, gemm_prepared, prepare};
use super::quantize::{
    BlockScales, CodeData, Codes, CodesRow, CodesRowMut, absmax, quantize_blocks, quantize_row,
    scale_for,
};
use super::schedule::Schedule;
use super::{dequant, kernels, ranks};
use crate::block_format::BlockFormat;
use crate::chip::{Basis, Evidence};
use crate::compute::call::{Call, Held};
use crate::compute::delta::{Convolution, DeltaRule};
use crate::compute::experts::{self, Products};
use crate::compute::{
    AttentionShape, ComputeError, Ops, check_gain, check_interrupt, check_matmul, check_same_shape,
    check_tokens, checkpoint, gain_and_bias, parallel, rope,
};
use crate::dtype::Format;
use crate::model::{
    Activation, HeldBlocks, HeldCodes, Rope, RouterScores, Routing, Weight, WeightType,
};
use crate::op::{Accumulate, ActivationScale, ChipName, Codes as CodesOf, Recipe, WeightScale};
use crate::tensor::Tensor;
use crate::vector::{Kernel, dispatch};

/// Elements of K, and rows of a weight, that share a block scale.
const BLOCK: usize = 128;
/// Rows of a weight that are decoded and converted at a time; a multiple of [`BLOCK`].
const CHUNK_ROWS: usize = 256;

/// The emulated arm of one recipe.
pub struct Emulated {
    recipe: Recipe,
    chip: &'static Chip,
    unit: Unit,
    schedule: Schedule,
    /// The kernels of an engine, where the recipe names one.
    engine: Option<EngineArm>,
    /// The absmax of each weight met so far, by name: an arm lives as long as
    /// one model, and decoding meets every weight once per token.
    absmax: Mutex<BTreeMap<String, f32>>,
    /// The scale that the checkpoint holds for the activations of one weight.
    input_scale: Option<f32>,
    /// Whether weights are taken as the checkpoint holds them.
    takes_codes: bool,
}

impl Emulated {
    /// The arm that computes as `recipe` prescribes.
    ///
    /// # Errors
    /// If the chip does not have the format.
    pub fn new(recipe: &Recipe) -> Result<Emulated, ComputeError> {
        let chip = chip(recipe.chip);
        let unit = match recipe.blocks() {
            Some(format) => chip.block_unit(format).map(|row| &row.unit),
            None => chip.unit(recipe.gemm, recipe.gemm),
        };
        let unit = *unit.ok_or_else(|| {
            let of = match recipe.codes {
                CodesOf::Made => "",
                CodesOf::Checkpoint => ", whose codes `gemm = \"checkpoint\"` multiplies",
            };
            ComputeError::Recipe(format!(
                "the chip `{}` has no {} tensor core{of}; choose another `chip` or `gemm`",
                chip.name,
                recipe.operands()
            ))
        })?;
        let schedule = Schedule::of(recipe);
        let stream = recipe.stream.unwrap_or(recipe.output);
        // The engine's operands have the stream's type, whatever a hypothesis makes of `gemm`.
        let own = chip.unit(stream, stream).copied();
        let engine = recipe.engine.zip(own);
        let fp8 = chip.unit(Format::E4m3, Format::E4m3).copied();
        let engine = engine.map(|(kernels, unit)| EngineArm::new(kernels, stream, unit, fp8));
        Ok(Emulated {
            recipe: *recipe,
            chip,
            unit,
            schedule,
            engine,
            absmax: Mutex::default(),
            input_scale: None,
            takes_codes: false,
        })
    }

    /// The arm of the products with one weight, where the recipe takes the checkpoint's codes.
    ///
    /// # Errors
    /// As [`checkpoint::of_weight`], and if the chip does not have the weight's format.
    pub fn of_weight(&self, weight: &Weight<'_>) -> Result<Option<Emulated>, ComputeError> {
        if self.takes_codes {
            return Ok(None);
        }
        let Some(of_weight) = checkpoint::of_weight(&self.recipe, weight)? else {
            return Ok(None);
        };
        if let Some(blocks) = of_weight.blocks
            && self.chip.block_unit(blocks.format).is_none()
        {
            return Err(ComputeError::Recipe(format!(
                "`gemm = \"checkpoint\"`: the weight {} is {}, which the chip `{}` does not multiply; \
                 choose another `chip`, or a `gemm` that converts its values",
                weight.in_words(),
                blocks.format,
                self.chip.name
            )));
        }
        let of_blocks = of_weight.blocks.and_then(|blocks| blocks.input_scale);
        let input_scale = of_weight.held.and_then(|held| held.input_scale).or(of_blocks);
        let arm = Emulated::new(&of_weight.recipe)?;
        let takes_codes = of_weight.held.is_some() || of_weight.blocks.is_some();
        Ok(Some(Emulated { input_scale, takes_codes, ..arm }))
    }

    /// What multiplies.
    pub fn unit(&self) -> &Unit {
        &self.unit
    }

    /// The order in which products are added.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The recipe that it computes.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The kernels of an engine, where the recipe names one.
    pub fn engine(&self) -> Option<&EngineArm> {
        self.engine.as_ref()
    }

    /// What a report says of the arithmetic.
    pub fn describe(&self) -> String {
        let stream = self.recipe.stream.map(|stream| format!(", {stream} between ops"));
        let stream = stream.unwrap_or_default();
        let gemm = match self.recipe.codes {
            CodesOf::Made => self.recipe.operands().to_owned(),
            CodesOf::Checkpoint => "the checkpoint's codes".to_owned(),
        };
        let ranks = parallel::in_words(&self.recipe);
        format!("{} {gemm}, {}{stream}{ranks}", self.chip.name, self.schedule)
    }

    /// What the products of a recipe on a chip rest on. Nothing where an engine's kernels are named
    /// that were seen on that chip: their file says which ones.
    pub fn basis(recipe: &Recipe, name: ChipName) -> Option<Basis> {
        let chip = chip(name);
        if recipe.emulate.is_some() {
            return None;
        }
        if recipe.engine.is_some() {
            let seen = "the engine's kernels were seen on an H200, and not on this chip";
            let basis = Basis { evidence: Evidence::Assumed, source: seen.into() };
            return (chip.name != ChipName::Hopper).then_some(basis);
        }
        if let Some(format) = recipe.blocks() {
            return chip.block_unit(format).map(|row| row.chained.clone());
        }
        let promoted = recipe.accumulate == Accumulate::Promoted;
        let formats: &[Format] = match recipe.codes {
            CodesOf::Made => &[recipe.gemm],
            CodesOf::Checkpoint => &[Format::E4m3, Format::Bf16],
        };
        let of = formats.iter().filter_map(|format| chip.basis(*format, promoted)).cloned();
        of.chain(parallel::basis(recipe)).max_by_key(|basis| basis.evidence)
    }

    /// A result as the next op reads it: rounded to the stream's type.
    pub fn streamed(&self, mut y: Tensor) -> Tensor {
        if let Some(stream) = self.recipe.stream.filter(|stream| *stream != Format::F32) {
            y.data_mut().iter_mut().for_each(|y| *y = stream.round(*y));
        }
        y
    }

    /// The type of a product before its bias is added. Engines that pass narrow tensors
    /// add the bias in f32 and round once.
    pub fn before_bias(&self, output: Format, biased: bool) -> Format {
        if biased && self.recipe.stream.is_some() { Format::F32 } else { output }
    }

    /// Whether operands carry scales.
    fn scaled(&self) -> bool {
        self.recipe.is_scaled()
    }

    /// An activation's codes and scales.
    pub fn quantise_activation(&self, x: &Tensor) -> (Codes, Scales) {
        if let Some(format) = self.recipe.blocks() {
            let whole = self.input_scale.unwrap_or_else(|| format.whole_scale(absmax(x.data())));
            return in_blocks(format, x.data(), x.width(), whole);
        }
        let format = self.recipe.gemm;
        let scales = match self.recipe.scale.activation {
            _ if !self.scaled() => Scales::Tensor(1.0),
            ActivationScale::Tensor => Scales::Tensor(
                self.input_scale.unwrap_or_else(|| scale_for(format, absmax(x.data()))),
            ),
            ActivationScale::Token => {
                let rows = (0..x.rows()).map(|row| scale_for(format, absmax(x.row(row))));
                Scales::Row(rows.collect())
            }
            // Of block-scaled formats alone, which are done with.
            ActivationScale::Mx | ActivationScale::Nv => Scales::Tensor(1.0),
            ActivationScale::Block128 => Scales::Block128 {
                rows_per_block: 1,
                first_row: 0,
                scales: block_scales(format, x.data(), x.width(), 1),
            },
        };
        self.converted(x.data(), x.width(), scales)
    }

    /// The codes and scales of some rows of a weight, whose values are `rows`; `whole` is the
    /// absmax of the whole weight.
    pub fn quantise_weight_rows(
        &self,
        weight: Weight<'_>,
        first: usize,
        rows: &[f32],
        whole: f32,
    ) -> (Codes, Scales) {
        let (format, width) = (self.recipe.gemm, weight.width());
        if let Some(format) = self.recipe.blocks() {
            if let Some(held) = self.held_blocks(&weight) {
                let (codes, scales) = held.rows(first..first + rows.len() / width);
                return of_blocks(format, width, codes, scales, held.whole);
            }
            return in_blocks(format, rows, width, format.whole_scale(whole));
        }
        if let Some(held) = self.held(&weight) {
            return as_held(format, &held, first..first + rows.len() / width, width);
        }
        let scales = match self.recipe.scale.weight {
            _ if !self.scaled() => Scales::Tensor(1.0),
            WeightScale::Tensor => Scales::Tensor(scale_for(format, whole)),
            WeightScale::Channel => {
                Scales::Row(rows.chunks(width).map(|row| scale_for(format, absmax(row))).collect())
            }
            WeightScale::Mx | WeightScale::Nv => Scales::Tensor(1.0),
            WeightScale::Block128 => Scales::Block128 {
                rows_per_block: BLOCK,
                first_row: 0,
                scales: block_scales(format, rows, width, BLOCK),
            },
        };
        self.converted(rows, width, scales)
    }

    /// Codes and scales. NaN or infinity among the values makes their scale no
    /// number: whatever shares it becomes NaN, as on the chip, and the scale 1; of integers, which
    /// have no NaN, the scale stays none, and makes NaN of the sums.
    fn converted(&self, values: &[f32], width: usize, scales: Scales) -> (Codes, Scales) {
        let each = |scales: Scales, change: fn(f32) -> f32| match scales {
            Scales::Tensor(scale) => Scales::Tensor(change(scale)),
            Scales::Row(scales) => Scales::Row(scales.into_iter().map(change).collect()),
            Scales::Block128 { rows_per_block, first_row, scales } => {
                let scales = scales.into_iter().map(change).collect();
                Scales::Block128 { rows_per_block, first_row, scales }
            }
            blocks @ Scales::Blocks(_) => blocks,
        };
        let scales = each(scales, |scale| if scale.is_finite() { scale } else { f32::NAN });
        let codes = self.convert(values, width, &scales);
        if self.recipe.gemm == Format::Int8 {
            return (codes, scales);
        }
        (codes, each(scales, |scale| if scale.is_nan() { 1.0 } else { scale }))
    }

    /// The absmax of a whole weight; only per-tensor scales need it.
    ///
    /// # Errors
    /// If the weight's file does not give its rows.
    pub fn absmax_of(&self, weight: Weight<'_>) -> Result<f32, ComputeError> {
        let made = self.held(&weight).is_none() && self.held_blocks(&weight).is_none();
        let of_whole = matches!(self.recipe.scale.weight, WeightScale::Tensor | WeightScale::Nv);
        if !self.scaled() || !of_whole || !made {
            return Ok(1.0);
        }
        let known = |arm: &Emulated| {
            let absmax = arm.absmax.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            absmax.get(weight.name()).copied()
        };
        if let Some(absmax) = known(self) {
            return Ok(absmax);
        }
        let chunks = by_chunk(weight, |_, rows| Ok(absmax(rows)))?;
        let whole = absmax(&chunks);
        let mut all = self.absmax.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        all.insert(weight.name().to_owned(), whole);
        Ok(whole)
    }

    /// Applies `work` to each chunk of a weight's rows, decoded and converted:
    /// the chunk's first row, its f32 values, its codes and their scales.
    pub fn by_quantised_chunk<T: Send>(
        &self,
        weight: Weight<'_>,
        work: impl Fn(usize, &[f32], &Codes, Scales) -> Result<T, ComputeError> + Sync,
    ) -> Result<Vec<T>, ComputeError> {
        let whole = self.absmax_of(weight)?;
        by_chunk(weight, |first, rows| {
            let (codes, scales) = self.quantise_weight_rows(weight, first, rows, whole);
            work(first, rows, &codes, scales)
        })
    }

    /// An activation's codes and scales in a product with a weight: those of the engine's kernel,
    /// where the recipe names one that converts.
    ///
    /// # Errors
    /// If the weights that an engine stacks are not of one checkpoint.
    pub fn converted_activation(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
    ) -> Result<(Codes, Scales), ComputeError> {
        match self.engine().and_then(|engine| engine.converting(weight)) {
            Some(product) => product.activation(x),
            None => Ok(self.quantise_activation(x)),
        }
    }

    /// As [`Emulated::by_quantised_chunk`], with the codes of the engine's kernel where the recipe
    /// names one that converts; beside a chunk's first row and values, how many rows of the codes
    /// stand before them.
    ///
    /// # Errors
    /// As `work`, and if the weight cannot be read.
    pub fn by_converted_chunk<T: Send>(
        &self,
        weight: Weight<'_>,
        work: impl Fn(usize, &[f32], usize, (&Codes, &Scales)) -> Result<T, ComputeError> + Sync,
    ) -> Result<Vec<T>, ComputeError> {
        let Some(product) = self.engine().and_then(|engine| engine.converting(weight)) else {
            return self.by_quantised_chunk(weight, |first, rows, codes, scales| {
                work(first, rows, 0, (codes, &scales))
            });
        };
        by_chunk(weight, |first, rows| {
            let of_chunk = first..first + rows.len() / weight.width();
            let (codes, scales, before) = product.converted_rows(of_chunk)?;
            work(first, rows, before, (&codes, &scales))
        })
    }

    /// The weight's elements and scales, where the arm takes what the checkpoint holds.
    fn held_blocks<'a>(&self, weight: &Weight<'a>) -> Option<HeldBlocks<'a>> {
        let held = weight.held_blocks().filter(|_| self.takes_codes)?;
        (self.recipe.blocks() == Some(held.format)).then_some(held)
    }

    /// The weight's codes, where the arm takes what the checkpoint holds.
    fn held<'a>(&self, weight: &Weight<'a>) -> Option<HeldCodes<'a>> {
        let codes = match self.recipe.gemm {
            Format::E4m3 => WeightType::E4m3,
            Format::E5m2 => WeightType::E5m2,
            Format::Int8 => WeightType::I8,
            _ => return None,
        };
        weight.held_codes(codes).filter(|_| self.takes_codes)
    }

    fn convert(&self, values: &[f32], width: usize, scales: &Scales) -> Codes {
        let format = self.recipe.gemm;
        let mut codes = Codes::zeros(format, values.len() / width, width);
        let rows = codes.rows_mut();
        for (row, (values, mut codes)) in values.chunks_exact(width).zip(rows).enumerate() {
            match scales {
                _ if format == Format::Tf32 => self.convert_tf32(values, &mut codes),
                Scales::Tensor(scale) => quantize_row(format, values, *scale, &mut codes),
                Scales::Row(scales) => quantize_row(format, values, scales[row], &mut codes),
                Scales::Blocks(blocks) => quantize_row(format, values, blocks.whole, &mut codes),
                Scales::Block128 { rows_per_block, scales, .. } => {
                    let blocks = width.div_ceil(BLOCK);
                    let scales = &scales[row / rows_per_block * blocks..][..blocks];
                    for (block, (values, scale)) in values.chunks(BLOCK).zip(scales).enumerate() {
                        let mut codes = codes.slice(block * BLOCK, values.len());
                        quantize_row(format, values, *scale, &mut codes);
                    }
                }
            }
        }
        codes
    }

    /// Chips round ties to tf32 differently.
    fn convert_tf32(&self, values: &[f32], codes: &mut CodesRowMut) {
        if let CodesRowMut::Bits32(codes) = codes {
            for (code, &value) in codes.iter_mut().zip(values) {
                *code = self.chip.encode(Format::Tf32, value);
            }
        }
    }
}

/// Values in a block-scaled format.
fn in_blocks(format: BlockFormat, values: &[f32], width: usize, whole: f32) -> (Codes, Scales) {
    // Rows are whole: their number is that of the values.
    match quantize_blocks(format, width, values, whole) {
        Ok((codes, scales)) => (codes, Scales::Blocks(scales)),
        Err(_) => (Codes::zeros(format.element(), 0, width), Scales::Tensor(1.0)),
    }
}

/// Codes and scales of a block-scaled format that are there already.
fn of_blocks(
    format: BlockFormat,
    width: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    whole: f32,
) -> (Codes, Scales) {
    let rows = codes.len() / width.max(1);
    let blocks = width.div_ceil(format.block());
    let scales = BlockScales { format, codes: scales, blocks, whole };
    // Rows are whole, and the elements have a byte each.
    let element = format.element();
    let codes = Codes::new(element, rows, width, CodeData::Bits8(codes))
        .unwrap_or_else(|_| Codes::zeros(element, rows, width));
    (codes, Scales::Blocks(scales))
}

/// Rows of a weight as the checkpoint holds them.
fn as_held(
    format: Format,
    held: &HeldCodes<'_>,
    rows: Range<usize>,
    width: usize,
) -> (Codes, Scales) {
    let mut codes = Codes::zeros(format, rows.len(), width);
    let lines = held.codes(rows.clone()).chunks_exact(width);
    for (mut codes, held) in codes.rows_mut().into_iter().zip(lines) {
        codes.copy_from(CodesRow::Bits8(held));
    }
    let [tall, wide] = held.block();
    let scales = if wide < width {
        let blocks = width.div_ceil(BLOCK);
        let of_rows = |row: usize| (0..blocks).map(move |block| held.scale(row, block * BLOCK));
        Scales::Block128 {
            rows_per_block: BLOCK,
            first_row: 0,
            scales: rows.step_by(BLOCK).flat_map(of_rows).collect(),
        }
    } else if tall == 1 {
        Scales::Row(rows.map(|row| held.scale(row, 0)).collect())
    } else {
        Scales::Tensor(held.scale(0, 0))
    };
    (codes, scales)
}

impl Ops for Emulated {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        if let (Some(_), Some(what)) = (&self.engine, call.without_engine_kernels()) {
            return Err(super::engine::unknown(what));
        }
        match *call {
            Call::Embed { weight, tokens } => self.embed(weight, tokens),
            Call::RmsNorm { x, gain, eps } => self.rms_norm(x, gain, eps),
            Call::LayerNorm { x, gain, bias, eps } => self.layer_norm(x, gain, bias, eps),
            Call::Matmul { x, weight, bias } => self.matmul(x, weight, bias),
            Call::Rope { x, rope, head_dim, first_position } => {
                self.rope(x, rope, head_dim, first_position)
            }
            Call::Cached(cached) => Ok(self.streamed(cached.read_back())),
            Call::Attention { q, k, v, shape } => self.attention(q, k, v, shape),
            Call::Gated { gate, up, activation } => self.gated(gate, up, activation),
            Call::Activated { x, activation } => self.activated(x, activation),
            Call::Route { scores, bias, routing } => self.route(scores, bias, routing),
            Call::Experts(products) => self.experts(&products),
            Call::Mix { x, routes, used } => self.mix(x, routes, used),
            Call::SigmoidGate { x, gate } => self.sigmoid_gate(x, gate),
            Call::Convolve(convolution) => self.convolve(&convolution),
            Call::Gates(gates) => Ok(self.streamed(gates.made()?)),
            Call::Delta(rule) => self.delta(&rule),
            Call::Add { a, b } => self.add(a, b),
            Call::Scale { x, factor, held } => self.scale(x, factor, held),
            Call::SoftCap { x, cap } => self.soft_cap(x, cap),
        }
    }
}

impl Emulated {
    pub(crate) fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError> {
        check_tokens(&weight, tokens)?;
        let mut rows = Tensor::zeros(tokens.len(), weight.width());
        for (index, &token) in tokens.iter().enumerate() {
            let token = token as usize;
            if !weight.is_plain() {
                weight.decode_rows(token..token + 1, rows.row_mut(index))?;
                continue;
            }
            let bytes = weight.row_bytes(token..token + 1);
            dequant::dequantise_row(weight.kind(), bytes, rows.row_mut(index));
        }
        Ok(self.streamed(rows))
    }

    pub(crate) fn rms_norm(
        &self,
        x: &Tensor,
        gain: Weight<'_>,
        eps: f32,
    ) -> Result<Tensor, ComputeError> {
        check_gain(x, &gain)?;
        if let Some(engine) = &self.engine {
            return engine.rms_norm(x, gain, eps);
        }
        let gain = gain.to_vec()?;
        let mut y = Tensor::zeros(x.rows(), x.width());
        let width = gain.len();
        y.data_mut()
            .par_chunks_exact_mut(width)
            .zip(x.data().par_chunks_exact(width))
            .for_each(|(y, x)| dispatch(RmsNorm { x, gain: &gain, eps, y }));
        Ok(self.streamed(y))
    }

    pub(crate) fn layer_norm(
        &self,
        x: &Tensor,
        gain: Weight<'_>,
        bias: Option<Weight<'_>>,
        eps: f32,
    ) -> Result<Tensor, ComputeError> {
        let (rows, width) = (gain.rows(), gain.width());
        let (gain, bias) = gain_and_bias(x, gain, bias)?;
        let mut y = Tensor::zeros(x.rows(), x.width());
        y.data_mut()
            .par_chunks_exact_mut(width)
            .zip(x.data().par_chunks_exact(width))
            .enumerate()
            .for_each(|(group, (y, x))| {
                let own = group % rows * width..(group % rows + 1) * width;
                let (gain, bias) = (&gain[own.clone()], &bias[own]);
                dispatch(LayerNorm { x, gain, bias, eps, y });
            });
        Ok(self.streamed(y))
    }

    fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor, ComputeError> {
        let ones = Tensor::new(x.width(), vec![1.0; x.data().len()]);
        self.gated(x, &ones, activation)
    }

    pub(crate) fn route(
        &self,
        scores: &Tensor,
        bias: Option<Weight<'_>>,
        routing: &Routing,
    ) -> Result<Tensor, ComputeError> {
        experts::check_route(scores, bias.as_ref(), routing)?;
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let mut y = Tensor::zeros(scores.rows(), scores.width());
        for row in 0..scores.rows() {
            let (scores, bias, y) = (scores.row(row), bias.as_deref(), y.row_mut(row));
            dispatch(Route { scores, bias, routing, taken: None, y });
        }
        Ok(self.streamed(y))
    }

    /// The weights of these experts, `used` for each row in ascending order, whatever the scores
    /// ask for.
    pub(crate) fn route_to(&self, scores: &Tensor, routing: &Routing, taken: &[usize]) -> Tensor {
        let mut y = Tensor::zeros(scores.rows(), scores.width());
        for (row, taken) in taken.chunks_exact(routing.used.max(1)).enumerate() {
            let (scores, y) = (scores.row(row), y.row_mut(row));
            dispatch(Route { scores, bias: None, routing, taken: Some(taken), y });
        }
        self.streamed(y)
    }

    pub(crate) fn experts(&self, products: &Products<'_>) -> Result<Tensor, ComputeError> {
        let made = products.by_expert(|x, weight, bias| Ok([self.matmul(x, weight, bias)?]));
        made.map(|[y]| y)
    }

    pub(crate) fn mix(
        &self,
        x: &Tensor,
        routes: &Tensor,
        used: usize,
    ) -> Result<Tensor, ComputeError> {
        let add = |sum: f32, weight: f32, value| weight.mul_add(value, sum);
        Ok(self.streamed(experts::mixed(x, routes, used, add, |sum| sum)?))
    }

    pub(crate) fn sigmoid_gate(&self, x: &Tensor, gate: &Tensor) -> Result<Tensor, ComputeError> {
        experts::check_gate(x, gate)?;
        let mut y = x.clone();
        for row in 0..x.rows() {
            let gates = gate.row(row);
            dispatch(SigmoidGate { gates, y: y.row_mut(row) });
        }
        Ok(self.streamed(y))
    }

    fn convolve(&self, convolution: &Convolution<'_>) -> Result<Tensor, ComputeError> {
        let taps = convolution.checked()?;
        let [rows, channels] = convolution.shape();
        let mut y = Tensor::zeros(rows, channels);
        y.data_mut().par_chunks_exact_mut(channels.max(1)).enumerate().for_each(|(row, y)| {
            let position = convolution.first + row;
            dispatch(Convolve { x: convolution.x, taps: &taps, position, y });
        });
        Ok(self.streamed(y))
    }

    fn delta(&self, rule: &DeltaRule<'_>) -> Result<Tensor, ComputeError> {
        rule.check()?;
        let [rows, width] = rule.shape();
        let mut y = Tensor::zeros(rows, width);
        let heads: Vec<Vec<f32>> = (0..rule.net.value_heads)
            .into_par_iter()
            .map(|head| {
                check_interrupt()?;
                Ok(dispatch(Delta { rule, head }))
            })
            .collect::<Result<_, ComputeError>>()?;
        let value_dim = rule.net.value_dim;
        for (head, values) in heads.iter().enumerate() {
            for (row, values) in values.chunks_exact(value_dim).enumerate() {
                let first = head * value_dim;
                y.row_mut(row)[first..first + value_dim].copy_from_slice(values);
            }
        }
        Ok(self.streamed(y))
    }

    pub(crate) fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_matmul(x, &weight, bias.as_ref())?;
        if let Some(engine) = &self.engine {
            return engine.matmul(x, weight, bias);
        }
        if let Some(arm) = self.of_weight(&weight)? {
            return arm.matmul(x, weight, bias);
        }
        if let Some(parts) = parallel::parts(&self.recipe, &weight)? {
            let of_ranks = self.products_of_ranks(&parts, x, weight, bias)?;
            return Ok(self.streamed(ranks::sum_by_rank(of_ranks, self.recipe.output)));
        }
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let (codes, scales) = self.quantise_activation(x);
        let prepared = prepare(&self.unit, &Operand { codes: &codes, scales })?;
        let output = self.before_bias(self.recipe.output, bias.is_some());
        let chunks = self.by_quantised_chunk(weight, |first, _, codes, scales| {
            let operand = Operand { codes, scales };
            let y = gemm_prepared(&self.schedule, &prepared, &operand, output)?;
            Ok((first, y))
        })?;
        let mut y = Tensor::zeros(x.rows(), weight.rows());
        for (first, chunk) in chunks {
            y.set_columns(first, &chunk);
        }
        if let Some(bias) = bias {
            y.add_to_rows(&bias);
        }
        Ok(self.streamed(y))
    }

    /// What each rank makes of a product whose K is dealt out, before it is rounded for the sum. The
    /// bias is the first rank's, as it is added once.
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub(crate) fn products_of_ranks(
        &self,
        parts: &[Range<usize>],
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Vec<Tensor>, ComputeError> {
        if let Some(arm) = self.of_weight(&weight)? {
            return arm.products_of_ranks(parts, x, weight, bias);
        }
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let (width, output) = (weight.width(), self.recipe.output);
        let prepared = parts
            .iter()
            .map(|inner| {
                let (codes, scales) = self.quantise_activation(&x.columns(inner.clone()));
                Ok(prepare(&self.unit, &Operand { codes: &codes, scales })?)
            })
            .collect::<Result<Vec<_>, ComputeError>>()?;
        let chunks = self.by_quantised_chunk(weight, |first, _, codes, scales| {
            let of_ranks = parts.iter().zip(&prepared).enumerate().map(|(rank, (inner, x))| {
                let codes = codes.some_columns(inner.clone());
                let scales = ranks::scales_of_part(&scales, inner, width);
                let output = self.before_bias(output, rank == 0 && bias.is_some());
                gemm_prepared(&self.schedule, x, &Operand { codes: &codes, scales }, output)
            });
            Ok((first, of_ranks.collect::<Result<Vec<_>, _>>()?))
        })?;
        let mut of_ranks = vec![Tensor::zeros(x.rows(), weight.rows()); parts.len()];
        for (first, chunks) in chunks {
            for (y, chunk) in of_ranks.iter_mut().zip(&chunks) {
                y.set_columns(first, chunk);
            }
        }
        if let (Some(bias), Some(y)) = (bias, of_ranks.first_mut()) {
            y.add_to_rows(&bias);
        }
        Ok(of_ranks)
    }

    pub(crate) fn rope(
        &self,
        x: &Tensor,
        geometry: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        if let Some(engine) = &self.engine {
            return engine.rope(x, geometry, head_dim, first_position);
        }
        let mut y = x.clone();
        for row in 0..x.rows() {
            let angles = rope::angles(geometry, first_position + row);
            for head in y.row_mut(row).chunks_exact_mut(head_dim) {
                for (pair, &(sin, cos)) in angles.iter().enumerate() {
                    let (first, second) = rope::pair(geometry, head_dim, pair);
                    (head[first], head[second]) =
                        kernels::rotate(head[first], head[second], sin as f32, cos as f32);
                }
            }
        }
        Ok(self.streamed(y))
    }

    pub(crate) fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape<'_>,
    ) -> Result<Tensor, ComputeError> {
        if let Some(engine) = &self.engine {
            return engine.attention(q, k, v, shape);
        }
        let AttentionShape { heads, kv_heads, head_dim, value_dim, .. } = shape;
        let (scale, cap) = (shape.f32_scale(), shape.cap.unwrap_or(0.0) as f32);
        let mut y = Tensor::zeros(q.rows(), heads * value_dim);
        y.data_mut().par_chunks_exact_mut(value_dim).enumerate().try_for_each(|(index, out)| {
            check_interrupt()?;
            let (row, head) = (index / heads, index % heads);
            let seen = shape.seen(row);
            let rows = |x: &'_ Tensor| seen.start * x.width()..seen.end * x.width();
            let kv_head = head / (heads / kv_heads);
            dispatch(Attend {
                query: &q.row(row)[head * head_dim..(head + 1) * head_dim],
                keys: kernels::Rows {
                    data: &k.data()[rows(k)],
                    stride: k.width(),
                    offset: kv_head * head_dim,
                },
                values: kernels::Rows {
                    data: &v.data()[rows(v)],
                    stride: v.width(),
                    offset: kv_head * value_dim,
                },
                scores: kernels::OfScores { scale, cap, sink: shape.sink(head) },
                out,
            });
            Ok::<(), ComputeError>(())
        })?;
        Ok(self.streamed(y))
    }

    pub(crate) fn gated(
        &self,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<Tensor, ComputeError> {
        check_same_shape("a gated activation", gate, up)?;
        if let Some(engine) = &self.engine {
            return engine.gated(gate, up, activation);
        }
        let mut y = Tensor::zeros(gate.rows(), gate.width());
        dispatch(Gated { activation, gate: gate.data(), up: up.data(), y: y.data_mut() });
        Ok(self.streamed(y))
    }

    pub(crate) fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError> {
        check_same_shape("a residual addition", a, b)?;
        let data = a.data().iter().zip(b.data()).map(|(a, b)| a + b);
        Ok(self.streamed(Tensor::new(a.width(), data.collect())))
    }

    fn scale(&self, x: &Tensor, factor: f64, held: Held) -> Result<Tensor, ComputeError> {
        if let Some(engine) = &self.engine {
            return engine.scale(x, factor, held);
        }
        let factor = factor as f32;
        let data = x.data().iter().map(|x| x * factor);
        Ok(self.streamed(Tensor::new(x.width(), data.collect())))
    }

    fn soft_cap(&self, x: &Tensor, cap: f64) -> Result<Tensor, ComputeError> {
        if let Some(engine) = &self.engine {
            return engine.soft_cap(x, cap);
        }
        let data = x.data().iter().map(|x| kernels::soft_cap(*x, cap as f32));
        Ok(self.streamed(Tensor::new(x.width(), data.collect())))
    }
}

/// Decodes a weight in chunks of rows, in parallel: first row and f32 values.
fn by_chunk<T: Send>(
    weight: Weight<'_>,
    work: impl Fn(usize, &[f32]) -> Result<T, ComputeError> + Sync,
) -> Result<Vec<T>, ComputeError> {
    let (rows, width) = (weight.rows(), weight.width());
    let starts: Vec<usize> = (0..rows).step_by(CHUNK_ROWS).collect();
    starts
        .into_par_iter()
        .map(|start| {
            check_interrupt()?;
            let range = start..(start + CHUNK_ROWS).min(rows);
            let mut decoded = DECODED.take();
            decoded.resize(range.len() * width, 0.0);
            weight.decode_rows(range, &mut decoded)?;
            let made = work(start, &decoded);
            DECODED.set(decoded);
            made
        })
        .collect()
}

thread_local! {
    /// The values of a chunk, whose memory serves the next chunk again.
    static DECODED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// One scale per block of `rows_per_block` rows by [`BLOCK`] columns, row-major.
fn block_scales(format: Format, values: &[f32], width: usize, rows_per_block: usize) -> Vec<f32> {
    values
        .chunks(rows_per_block * width)
        .flat_map(|rows| {
            (0..width).step_by(BLOCK).map(move |first| {
                let last = (first + BLOCK).min(width);
                let blocks: Vec<f32> =
                    rows.chunks(width).map(|row| absmax(&row[first..last])).collect();
                scale_for(format, absmax(&blocks))
            })
        })
        .collect()
}

struct RmsNorm<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        kernels::rms_norm(self.x, self.gain, self.eps, self.y);
    }
}

struct LayerNorm<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        kernels::layer_norm(self.x, self.gain, self.bias, self.eps, self.y);
    }
}

struct SigmoidGate<'a> {
    gates: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for SigmoidGate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (y, gate) in self.y.iter_mut().zip(self.gates.iter().cycle()) {
            *y /= 1.0 + kernels::exp(-gate);
        }
    }
}

struct Convolve<'a> {
    x: &'a Tensor,
    taps: &'a [f32],
    position: usize,
    y: &'a mut [f32],
}

impl Kernel for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Convolve { x, taps, position, y } = self;
        let count = taps.len() / y.len().max(1);
        for (channel, y) in y.iter_mut().enumerate() {
            let taps = &taps[channel * count..(channel + 1) * count];
            let mut sum = 0.0f32;
            for (tap, &weight) in taps.iter().enumerate() {
                // The last tap is the position's own.
                if let Some(row) = (position + tap + 1).checked_sub(count) {
                    sum = weight.mul_add(x.row(row)[channel], sum);
                }
            }
            *y = kernels::swiglu(sum, 1.0);
        }
    }
}

struct Delta<'a> {
    rule: &'a DeltaRule<'a>,
    head: usize,
}

impl Kernel for Delta<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Vec<f32> {
        let Delta { rule, head } = self;
        let (key_dim, value_dim) = (rule.net.key_dim, rule.net.value_dim);
        let mut state = vec![0.0; key_dim * value_dim];
        let [rows, _] = rule.shape();
        let mut all = Vec::with_capacity(rows * value_dim);
        let mut out = vec![0.0; value_dim];
        for position in 0..rule.x.rows() {
            let token = rule.token(position, head);
            kernels::delta_step(&token, &mut state, &mut out);
            if position >= rule.first {
                all.extend_from_slice(&out);
            }
        }
        all
    }
}

/// A row of a router's scores: the weights of the experts that it takes, in the order of the
/// experts, each of them divided by the sum and multiplied by the factor.
struct Route<'a> {
    scores: &'a [f32],
    bias: Option<&'a [f32]>,
    routing: &'a Routing,
    /// The experts, where they are not those that the scores ask for.
    taken: Option<&'a [usize]>,
    y: &'a mut [f32],
}

impl Kernel for Route<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Route { scores, bias, routing, taken: forced, y } = self;
        let factor = routing.factor as f32;
        let in_order = |all: &[f32]| all.iter().fold(0.0f32, |sum, x| sum + x);
        let (taken, powers) = if experts::by_sigmoid(routing) {
            let powers: Vec<f32> = scores.iter().map(|x| kernels::sigmoid(*x)).collect();
            let by = match bias {
                Some(bias) => powers.iter().zip(bias).map(|(s, b)| s + b).collect(),
                None => powers.clone(),
            };
            (experts::chosen(&by, routing), powers)
        } else {
            let largest = scores
                .iter()
                .copied()
                .fold(f32::NEG_INFINITY, |most, x| if x > most || x.is_nan() { x } else { most });
            let powers = scores.iter().map(|x| kernels::exp(x - largest)).collect();
            (experts::chosen(scores, routing), powers)
        };
        let taken = forced.map_or(taken, <[usize]>::to_vec);
        let of_taken: Vec<f32> = taken.iter().map(|&expert| powers[expert]).collect();
        let total = match routing.scores {
            RouterScores::Softmax => in_order(&powers),
            RouterScores::SoftmaxOfTaken => in_order(&of_taken),
            RouterScores::SigmoidNormalised => in_order(&of_taken) + 1e-20,
            RouterScores::Sigmoid => 1.0,
        };
        for expert in taken {
            y[expert] = powers[expert] / total * factor;
        }
    }
}

struct Attend<'a> {
    query: &'a [f32],
    keys: kernels::Rows<'a>,
    values: kernels::Rows<'a>,
    scores: kernels::OfScores,
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Attend { query, keys, values, scores, out } = self;
        let mut weights = Vec::with_capacity(keys.data.len() / keys.stride.max(1));
        kernels::attend(query, &keys, &values, scores, &mut weights, out);
    }
}

struct Gated<'a> {
    activation: Activation,
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let all = self.y.iter_mut().zip(self.gate).zip(self.up);
        match self.activation {
            Activation::Silu => all.for_each(|((y, &gate), &up)| *y = kernels::swiglu(gate, up)),
            Activation::GeluTanh => all.for_each(|((y, &gate), &up)| *y = kernels::geglu(gate, up)),
            Activation::ClampedSwiglu => {
                all.for_each(|((y, &gate), &up)| *y = kernels::clamped_swiglu(gate, up));
            }
        }
    }
}
