//! How the bugs that no fingerprint's file holds change one call.
//!
//! Everything else of the arm stays as it is. A bug that does not apply to the
//! call (a missing bias where there is none) plants nothing.

use std::collections::BTreeMap;

use crate::block_format::{BlockFormat, ScaleCodec};
use crate::compare::fingerprints::planted::{Ground, Made, Plant, chosen};
use crate::compare::fingerprints::scale_order::{sisters_of, with_tail_of_before};
use crate::compare::fingerprints::{cache_format, head_permutation, zero_point};
use crate::compute::block_departure::{
    exponents_one_larger, nibbles_exchanged, powers_rounded_up, scales_in_order,
    whole_scale_missing,
};
use crate::compute::call::{Call, MadeWeight};
use crate::compute::departure::{
    Converted, Edit, MOST_E4M3FNUZ, Steps, clipped, flushed, keep, matmul_by_factor, matmul_rows,
    only_inner, operands, read_as, read_as_fnuz, requantised, rounded_up_beside_codes, scaled,
    truncated, unsaturated, with_scales_of, wrapped, zero_point_ignored,
};
use crate::compute::emulated::arm::Emulated;
use crate::compute::emulated::gemm::Scales;
use crate::compute::emulated::schedule::Schedule;
use crate::compute::forward::top_1;
use crate::compute::kv_cache::Cached;
use crate::compute::reference::{Reference, activated, gated as of_pair};
use crate::compute::{AttentionShape, Ops};
use crate::dtype::Format;
use crate::model::{Activation, Weight};
use crate::op::{Accumulate, ActivationScale, Recipe, Scale, Site, WeightScale, in_layer};
use crate::tensor::Tensor;

/// What is done to a call.
#[derive(Clone, Copy)]
pub enum Defect {
    XScale(f32),
    WScale(f32),
    Times(f32),
    XScaleMissing,
    WScaleMissing,
    XScaleTwice,
    XSaturated(f32),
    WSaturated(f32),
    PerChannel,
    PerToken,
    WPowerOfTwo,
    XPowerOfTwo,
    XUnsaturated(f32),
    WReadAsFnuz,
    NibblesExchanged,
    NextBlocksScale,
    WholeScaleMissing,
    PowersRoundedUp,
    ExponentsOneLarger,
    XClippedAsFnuz,
    ScaleTail,
    ScaleSlice,
    ScaleProduct,
    ZeroPoint(usize),
    OtherHeads,
    Column(f32),
    Row(f32),
    TruncateX,
    TruncateW,
    TruncateBoth,
    FlushX,
    FlushW,
    ReadW,
    ReadX,
    Q8(usize),
    Computed(Format),
    NotEngaged,
    OtherAccumulation,
    SplitK(u32),
    Alternating,
    OutputTruncated,
    Output(Format),
    F16Overflow(bool),
    Tail(usize),
    BlockLost(usize),
    BlockTwice(usize),
    ColumnsSwapped,
    RowsShifted,
    RowsSwapped,
    ShiftedInBatch,
    StaleRows,
    TileUnwritten,
    LaneSpoilt(usize),
    TileSpoilt(usize),
    Transposed,
    HalvesSwapped,
    NeighboursSwapped,
    Interleaved,
    PreviousLayersWeight,
    SistersWeight,
    Layer0sInput,
    PreviousLayersInput,
    PreviousLayersOutput,
    Single(f32),
    TopSwapped,
    Flicker,
    Rounded(Format),
    CacheKept(Format, bool),
    Gelu,
    Relu,
    UpIgnored,
    RowOffByOne,
    EmbedInterleaved,
    TimesRootHidden,
    CacheFormat,
    CacheTruncated,
    CacheScaleOfTensor,
    CacheScaleMissing,
    XWrapped(f32),
    XZeroPointIgnored,
}

impl Plant for Defect {
    fn planted(&self, call: &Call<'_>, ground: &Ground<'_>) -> Made {
        planted(*self, call, ground)
    }
}

fn planted(plant: Defect, call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Ground { site, clean, .. } = *ground;
    match plant {
        Defect::Times(factor) => return Ok(Some(mapped(clean, |y| y * factor))),
        Defect::TimesRootHidden => {
            let factor = (clean.width() as f32).sqrt();
            return Ok(Some(mapped(clean, |y| y * factor)));
        }
        Defect::Rounded(format) => return Ok(Some(mapped(clean, |y| format.round(y)))),
        Defect::Single(value) => {
            let mut y = clean.clone();
            let row = chosen(ground.seed, y.rows());
            let column = chosen(ground.seed + 1, y.width());
            y.row_mut(row)[column] = value;
            return Ok(Some(y));
        }
        Defect::Flicker => {
            let mut y = clean.clone();
            let column = chosen(ground.seed, y.width());
            y.row_mut(0)[column] += ground.call_number as f32;
            return Ok(Some(y));
        }
        Defect::ShiftedInBatch if !ground.in_batch => return Ok(None),
        Defect::ShiftedInBatch => {
            let mut y = clean.clone();
            y.data_mut().rotate_left(clean.width());
            return Ok(Some(y));
        }
        Defect::PreviousLayersOutput => return Ok(earlier(ground.made, site, 1, clean)),
        _ => {}
    }
    match *call {
        Call::Matmul { x, weight, bias } => {
            let gemm = Gemm { x, weight, bias, ground };
            match gemm.by_steps(plant)? {
                Some(spoilt) => Ok(Some(spoilt)),
                None => match gemm.by_operands(plant, site)? {
                    Some(spoilt) => Ok(Some(spoilt)),
                    None => gemm.by_result(plant, site, clean),
                },
            }
        }
        Call::Activated { x, activation } => match plant {
            Defect::Gelu | Defect::Relu => {
                let ones = Tensor::new(x.width(), vec![1.0; x.data().len()]);
                gated(plant, (x, &ones, activation))
            }
            _ => Ok(None),
        },
        Call::Cached(cached) => Ok(of_cache(plant, cached)),
        Call::Attention { q, k, v, shape } => attention(plant, (q, k, v, shape), ground),
        Call::Gated { gate, up, activation } => gated(plant, (gate, up, activation)),
        Call::Embed { weight, tokens } => embedding(plant, weight, tokens, clean, ground),
        // What is planted into the others stands in the fingerprints' files.
        _ => Ok(None),
    }
}

/// Bugs of what a cache of keys or values gives back; only FP8 has scales.
fn of_cache(plant: Defect, cached: Cached<'_>) -> Option<Tensor> {
    let Cached { x, format, scale } = cached;
    if !format.is_fp8() {
        return None;
    }
    match plant {
        Defect::CacheFormat => {
            let other = if format == Format::E4m3 { Format::E5m2 } else { Format::E4m3 };
            Some(Cached { format: other, ..cached }.read_back())
        }
        Defect::CacheTruncated => {
            Some(mapped(x, |x| cache_format::towards_zero(format, x / scale) * scale))
        }
        Defect::CacheScaleOfTensor => Some(cache_format::kept(x, format, false)),
        Defect::CacheScaleMissing if scale != 1.0 => {
            Some(mapped(&cached.read_back(), |x| x / scale))
        }
        _ => None,
    }
}

fn mapped(x: &Tensor, change: impl Fn(f32) -> f32) -> Tensor {
    Tensor::new(x.width(), x.data().iter().map(|&value| change(value)).collect())
}

/// The same site's tensor some layers before, if it has the shape.
fn earlier(
    known: &BTreeMap<Site, Tensor>,
    site: &Site,
    layers: u32,
    shape: &Tensor,
) -> Option<Tensor> {
    let (layer, name) = in_layer(&site.0)?;
    let site = Site(format!("blk.{}.{name}", layer.checked_sub(layers)?));
    let tensor = known.get(&site)?;
    let fits = (tensor.rows(), tensor.width()) == (shape.rows(), shape.width());
    fits.then(|| tensor.clone())
}

struct Gemm<'a> {
    x: &'a Tensor,
    weight: Weight<'a>,
    bias: Option<Weight<'a>>,
    ground: &'a Ground<'a>,
}

/// Whether the scales of a recipe's blocks are powers of two.
fn has_powers(recipe: &Recipe) -> bool {
    recipe.blocks().is_some_and(|format| format.scales() == ScaleCodec::Ue8m0)
}

fn as_e5m2(operand: Converted<'_>) -> Converted<'_> {
    let other = if operand.codes.format() == Format::E4m3 { Format::E5m2 } else { Format::E4m3 };
    read_as(operand, other)
}

impl Gemm<'_> {
    fn run(&self, steps: &Steps<'_>) -> Made {
        let Ground { arm, recipe, .. } = self.ground;
        let operands = (self.x, self.weight, self.bias);
        Ok(Some(matmul_rows(arm, recipe, operands, 0..self.weight.rows(), steps)?))
    }

    fn with(&self, x: &Edit<'_>, w: &Edit<'_>) -> Made {
        self.run(&Steps { x, w, ..Steps::of(self.ground.recipe) })
    }

    fn with_schedule(&self, schedule: Schedule) -> Made {
        let format = self.ground.recipe.gemm;
        let inner = self.x.width();
        let prescribed = Schedule::of(self.ground.recipe);
        // Sums of integers are the same in any order.
        if format == Format::Int8
            || schedule.steps(inner, format) == prescribed.steps(inner, format)
        {
            return Ok(None);
        }
        self.run(&Steps { schedule, ..Steps::of(self.ground.recipe) })
    }

    /// Bugs of the conversion, the accumulation and the epilogue.
    fn by_steps(&self, plant: Defect) -> Made {
        let engine = self.ground.arm.engine();
        if engine.is_some_and(|engine| !engine.takes_steps(self.weight.name())) {
            return Ok(None);
        }
        let recipe = self.ground.recipe;
        let inner = self.x.width();
        let scheduled = Schedule::of(recipe);
        let is_e4m3 = recipe.gemm == Format::E4m3;
        match plant {
            Defect::XScale(factor) => self.with(&|o| scaled(o, |scale| scale * factor), &keep),
            Defect::WScale(factor) => self.with(&keep, &|o| scaled(o, |scale| scale * factor)),
            Defect::XScaleMissing => self.with(&|o| scaled(o, |_| 1.0), &keep),
            Defect::WScaleMissing => self.with(&keep, &|o| scaled(o, |_| 1.0)),
            Defect::XScaleTwice => self.with(&|o| scaled(o, |scale| scale * scale), &keep),
            Defect::XPowerOfTwo => self.with(&rounded_up_beside_codes, &keep),
            Defect::WPowerOfTwo => self.with(&keep, &rounded_up_beside_codes),
            Defect::XUnsaturated(factor) if is_e4m3 => {
                self.with(&|o| unsaturated(o, factor), &keep)
            }
            Defect::XWrapped(factor) => self.with(&|o| wrapped(o, factor), &keep),
            Defect::XZeroPointIgnored => self.with(&zero_point_ignored, &keep),
            Defect::WReadAsFnuz => self.with(&keep, &read_as_fnuz),
            Defect::NibblesExchanged if recipe.gemm == Format::E2m1 => {
                self.with(&keep, &nibbles_exchanged)
            }
            Defect::NextBlocksScale if recipe.blocks().is_some() => {
                let order = |row, block, _, blocks| (row, (block + 1) % blocks);
                self.with(&keep, &|operand| scales_in_order(operand, order))
            }
            Defect::WholeScaleMissing if recipe.blocks() == Some(BlockFormat::Nvfp4) => {
                self.with(&keep, &whole_scale_missing)
            }
            Defect::PowersRoundedUp if has_powers(recipe) => self.with(&powers_rounded_up, &keep),
            Defect::ExponentsOneLarger if has_powers(recipe) => {
                self.with(&keep, &exponents_one_larger)
            }
            Defect::XClippedAsFnuz if is_e4m3 => self.with(&|o| clipped(o, MOST_E4M3FNUZ), &keep),
            Defect::ScaleTail => {
                let [_, (codes, scales, _)] = operands(self.ground.arm, self.x, self.weight)?;
                match with_tail_of_before(&scales, codes.width()) {
                    Some(taken) => self.with(&keep, &|o| with_scales_of(o, &taken)),
                    None => Ok(None),
                }
            }
            Defect::ScaleSlice => {
                let Some(sister) =
                    sisters_of(self.weight.name(), self.ground.model).into_iter().next()
                else {
                    return Ok(None);
                };
                let sister = self.ground.model.tensor(&sister)?;
                if sister.rows() < self.weight.rows() {
                    return Ok(None);
                }
                let [_, (_, scales, before)] = operands(self.ground.arm, self.x, sister)?;
                if matches!(scales, Scales::Tensor(_)) || before > 0 {
                    return Ok(None);
                }
                self.with(&keep, &|o| with_scales_of(o, &scales))
            }
            Defect::ScaleProduct => {
                let factor = |scale| Format::F16.round(scale);
                let operands = (self.x, self.weight, self.bias);
                Ok(Some(matmul_by_factor(self.ground.arm, recipe, operands, factor)?))
            }
            Defect::XSaturated(factor) => self.with(&|o| requantised(o, factor), &keep),
            Defect::WSaturated(factor) => self.with(&keep, &|o| requantised(o, factor)),
            Defect::TruncateX => self.with(&truncated, &keep),
            Defect::TruncateW => self.with(&keep, &truncated),
            Defect::TruncateBoth => self.with(&truncated, &truncated),
            Defect::FlushX => self.with(&flushed, &keep),
            Defect::FlushW => self.with(&keep, &flushed),
            Defect::ReadX => self.with(&as_e5m2, &keep),
            Defect::ReadW => self.with(&keep, &as_e5m2),
            Defect::Tail(tail) if tail < inner => {
                self.with(&|o| only_inner(o, |k| k < inner - tail), &keep)
            }
            Defect::BlockLost(width) if width < inner => {
                let block = chosen(self.ground.seed, inner / width);
                self.with(&|o| only_inner(o, |k| k / width != block), &keep)
            }
            Defect::BlockTwice(width) if width < inner => {
                let block = chosen(self.ground.seed, inner / width);
                let Ground { arm, recipe, .. } = self.ground;
                let x: &Edit = &|o| only_inner(o, |k| k / width == block);
                let steps = Steps { x, output: Format::F32, ..Steps::of(recipe) };
                let rows = 0..self.weight.rows();
                let part =
                    matmul_rows(arm, recipe, (self.x, self.weight, None), rows.clone(), &steps)?;
                let steps = Steps { output: Format::F32, ..Steps::of(recipe) };
                let mut y = matmul_rows(arm, recipe, (self.x, self.weight, None), rows, &steps)?;
                for (y, part) in y.data_mut().iter_mut().zip(part.data()) {
                    *y = recipe.output.round(*y + part);
                }
                self.biased(y)
            }
            Defect::OtherAccumulation => {
                let other = match scheduled.accumulate {
                    Accumulate::Fast => Schedule::PROMOTED,
                    Accumulate::Promoted => Schedule::FAST,
                };
                self.with_schedule(other)
            }
            Defect::SplitK(parts) => self.with_schedule(scheduled.with_split_k(parts)),
            Defect::Alternating if self.ground.call_number.is_multiple_of(2) => Ok(None),
            Defect::Alternating => self.with_schedule(scheduled.with_split_k(2)),
            Defect::Output(format) if format != recipe.output => {
                self.run(&Steps { output: format, ..Steps::of(recipe) })
            }
            Defect::OutputTruncated => {
                let Ground { arm, .. } = self.ground;
                let steps = Steps { output: Format::F32, ..Steps::of(recipe) };
                let rows = 0..self.weight.rows();
                let y = matmul_rows(arm, recipe, (self.x, self.weight, None), rows, &steps)?;
                let format = recipe.output;
                self.biased(mapped(&y, |y| {
                    let code = format.encode(y);
                    let rounded = format.decode(code);
                    if rounded.abs() > y.abs() { format.decode(code - 1) } else { rounded }
                }))
            }
            Defect::F16Overflow(clipped) => self.f16_overflow(clipped),
            _ => Ok(None),
        }
    }

    /// The accumulator is written as f16, and both scales are applied afterwards.
    fn f16_overflow(&self, clipped: bool) -> Made {
        let Ground { arm, recipe, .. } = self.ground;
        let (_, Scales::Tensor(x_scale)) = arm.quantise_activation(self.x) else {
            return Ok(None);
        };
        let absmax = arm.absmax_of(self.weight)?;
        let (_, Scales::Tensor(w_scale)) = arm.quantise_weight_rows(self.weight, 0, &[], absmax)
        else {
            return Ok(None);
        };
        let one: &Edit = &|o| scaled(o, |_| 1.0);
        let steps = Steps { x: one, w: one, output: Format::F32, ..Steps::of(recipe) };
        let rows = 0..self.weight.rows();
        let y = matmul_rows(arm, recipe, (self.x, self.weight, None), rows, &steps)?;
        let limit = if clipped { Format::F16.max_finite() } else { f32::INFINITY };
        let scale = x_scale * w_scale;
        self.biased(mapped(&y, |y| {
            recipe.output.round(Format::F16.round(y.clamp(-limit, limit)) * scale)
        }))
    }

    fn biased(&self, mut y: Tensor) -> Made {
        if let Some(bias) = self.bias {
            y.add_to_rows(&bias.to_vec()?);
        }
        Ok(Some(y))
    }

    fn on(&self, arm: &dyn Ops, x: &Tensor, weight: Weight<'_>, bias: Option<Weight<'_>>) -> Made {
        Ok(Some(Call::Matmul { x, weight, bias }.on(arm)?))
    }

    fn rearranged(&self, order: impl Fn(usize) -> usize) -> Made {
        let width = self.weight.width();
        let values = self.weight.to_vec()?;
        let rows = values.chunks_exact(width);
        let moved: Vec<f32> = rows.flat_map(|row| (0..width).map(|k| row[order(k)])).collect();
        let name = format!("{} rearranged", self.weight.name());
        let made = MadeWeight::new(name, self.weight.rows(), &moved);
        self.on(self.ground.arm, self.x, made.weight()?, self.bias)
    }

    /// Bugs that multiply other tensors, or in another arithmetic.
    fn by_operands(&self, plant: Defect, site: &Site) -> Made {
        let Ground { arm, recipe, model, inputs, .. } = self.ground;
        let (x, weight, bias) = (self.x, self.weight, self.bias);
        let width = weight.width();
        let other_scale = |scale: Scale| match recipe.with_scale(scale) {
            Some(recipe) => self.on(&Emulated::new(&recipe)?, x, weight, bias),
            None => Ok(None),
        };
        let layers_name = |name: &str, back: u32| {
            let (layer, inner) = in_layer(name)?;
            Some(format!("blk.{}.{inner}", layer.checked_sub(back)?))
        };
        match plant {
            Defect::PerChannel => {
                other_scale(Scale { weight: WeightScale::Channel, ..recipe.scale })
            }
            Defect::PerToken if x.rows() > 1 => {
                other_scale(Scale { activation: ActivationScale::Token, ..recipe.scale })
            }
            Defect::Computed(format) if format != recipe.gemm => {
                let arm = Emulated::new(&Recipe { gemm: format, ..**recipe })?;
                self.on(&arm, x, weight, bias)
            }
            Defect::NotEngaged => self.on(&Reference, x, weight, bias),
            Defect::Q8(block) => {
                let mut rounded = x.clone();
                for row in 0..rounded.rows() {
                    for block in rounded.row_mut(row).chunks_mut(block) {
                        let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                        let step = if most > 0.0 { most / 127.0 } else { 1.0 };
                        block.iter_mut().for_each(|x| *x = (*x / step).round() * step);
                    }
                }
                self.on(&Reference, &rounded, weight, bias)
            }
            Defect::Transposed => {
                let (rows, values) = (weight.rows(), weight.to_vec()?);
                let at = |index: usize| values[index % width * rows + index / width];
                let moved: Vec<f32> = (0..rows * width).map(at).collect();
                let made = MadeWeight::new(format!("{} transposed", weight.name()), rows, &moved);
                self.on(*arm, x, made.weight()?, bias)
            }
            Defect::HalvesSwapped => self.rearranged(|k| (k + width / 2) % width),
            Defect::NeighboursSwapped => self.rearranged(|k| k ^ 1),
            Defect::Interleaved if width.is_multiple_of(32) => {
                self.rearranged(|k| k / 32 * 32 + k % 2 * 16 + k % 32 / 2)
            }
            Defect::ZeroPoint(group) => {
                let moved = zero_point::shifted(&weight.to_vec()?, width, group);
                let name = format!("{} shifted", weight.name());
                let made = MadeWeight::new(name, weight.rows(), &moved);
                self.on(*arm, x, made.weight()?, bias)
            }
            Defect::OtherHeads => {
                let (heads, kv_heads) = (model.config().heads, model.config().kv_heads);
                let rows = weight.rows();
                if heads == kv_heads || !rows.is_multiple_of(2 * heads) {
                    return Ok(None);
                }
                let values = weight.to_vec()?;
                let order = head_permutation::for_other_heads(rows, kv_heads, heads);
                let row = |row: usize| &values[row * width..(row + 1) * width];
                let moved: Vec<f32> = order.into_iter().flat_map(row).copied().collect();
                let made = MadeWeight::new(format!("{} moved", weight.name()), rows, &moved);
                self.on(*arm, x, made.weight()?, bias)
            }
            Defect::PreviousLayersWeight => match layers_name(weight.name(), 1) {
                Some(name) if model.has(&name) => self.on(*arm, x, model.tensor(&name)?, bias),
                _ => Ok(None),
            },
            Defect::SistersWeight => {
                let name = weight.name().replace("attn_v", "attn_k").replace("ffn_gate", "ffn_up");
                if !model.has(&name) {
                    return Ok(None);
                }
                let sister = model.tensor(&name)?;
                // K and V may be stored alike, never be alike.
                self.on(*arm, x, sister, bias)
            }
            Defect::Layer0sInput => {
                let back = in_layer(&site.0).map_or(0, |(layer, _)| layer);
                match earlier(inputs, site, back, x) {
                    Some(stale) => self.on(*arm, &stale, weight, bias),
                    None => Ok(None),
                }
            }
            Defect::PreviousLayersInput => match earlier(inputs, site, 1, x) {
                Some(stale) => self.on(*arm, &stale, weight, bias),
                None => Ok(None),
            },
            _ => Ok(None),
        }
    }

    /// Bugs of what is done with the result.
    fn by_result(&self, plant: Defect, site: &Site, clean: &Tensor) -> Made {
        let seed = self.ground.seed;
        let (rows, width) = (clean.rows(), clean.width());
        let mut y = clean.clone();
        match plant {
            Defect::Column(factor) => {
                let column = chosen(seed, width);
                (0..rows).for_each(|row| y.row_mut(row)[column] *= factor);
            }
            Defect::Row(factor) => {
                y.row_mut(chosen(seed, rows)).iter_mut().for_each(|y| *y *= factor);
            }
            Defect::ColumnsSwapped => {
                let first = chosen(seed, width);
                let second = (first + 1 + chosen(seed + 1, width - 1)) % width;
                (0..rows).for_each(|row| y.row_mut(row).swap(first, second));
            }
            Defect::RowsShifted if rows > 1 => {
                (1..rows).for_each(|row| y.row_mut(row).copy_from_slice(clean.row(row - 1)));
            }
            Defect::RowsSwapped if rows > 1 => {
                y.row_mut(0).copy_from_slice(clean.row(rows - 1));
                y.row_mut(rows - 1).copy_from_slice(clean.row(0));
            }
            Defect::StaleRows if rows > 1 => {
                let Some(stale) = earlier(self.ground.made, site, 1, clean) else {
                    return Ok(None);
                };
                (1..rows).for_each(|row| y.row_mut(row).copy_from_slice(stale.row(row)));
            }
            Defect::TileUnwritten if width >= 32 => {
                let first = chosen(seed, width / 32) * 32;
                (0..rows).for_each(|row| y.row_mut(row)[first..first + 32].fill(0.0));
            }
            Defect::LaneSpoilt(tile) => {
                let lane = chosen(seed, tile);
                for row in 0..rows {
                    for column in (lane..width).step_by(tile) {
                        y.row_mut(row)[column] += noise(seed, row * width + column, clean);
                    }
                }
            }
            Defect::TileSpoilt(tile) if 2 * tile <= width => {
                let first = chosen(seed, width / tile) * tile;
                for row in 0..rows {
                    for column in first..first + tile {
                        y.row_mut(row)[column] += noise(seed, row * width + column, clean);
                    }
                }
            }
            Defect::TopSwapped => {
                let (top, _) = top_1(clean.row(0));
                let other = (top as usize + 1 + chosen(seed, width - 1)) % width;
                (0..rows).for_each(|row| y.row_mut(row).swap(top as usize, other));
            }
            _ => return Ok(None),
        }
        Ok(Some(y))
    }
}

/// A seeded value of the result's own size.
fn noise(seed: u64, index: usize, like: &Tensor) -> f32 {
    let values = like.data();
    let pick = chosen(seed.wrapping_add(index as u64), values.len());
    if pick.is_multiple_of(2) { values[pick] } else { -values[pick] }
}

fn attention(
    plant: Defect,
    (q, k, v, shape): (&Tensor, &Tensor, &Tensor, AttentionShape<'_>),
    ground: &Ground<'_>,
) -> Made {
    let arm = ground.arm;
    match plant {
        Defect::CacheKept(format, unscaled) => {
            let kept = |x: &Tensor| cache_format::kept(x, format, unscaled);
            Ok(Some(arm.attention(q, &kept(k), &kept(v), shape)?))
        }
        _ => Ok(None),
    }
}

fn gated(plant: Defect, (gate, up, activation): (&Tensor, &Tensor, Activation)) -> Made {
    let each = |function: &dyn Fn(f64, f64) -> f64| {
        let pairs = gate.data().iter().zip(up.data());
        let values = pairs.map(|(&g, &u)| function(f64::from(g), f64::from(u)) as f32);
        Ok(Some(Tensor::new(gate.width(), values.collect())))
    };
    match plant {
        Defect::Gelu => each(&|g, u| 0.5 * g * (1.0 + libm::erf(g / std::f64::consts::SQRT_2)) * u),
        Defect::Relu => each(&|g, u| if g > 0.0 { g * u } else { 0.0 }),
        // gpt-oss's other value counts as one where it is zero.
        Defect::UpIgnored => each(&|g, _| match activation {
            Activation::ClampedSwiglu => of_pair(activation, g, 0.0),
            _ => activated(activation, g),
        }),
        _ => Ok(None),
    }
}

fn embedding(
    plant: Defect,
    weight: Weight<'_>,
    tokens: &[u32],
    clean: &Tensor,
    ground: &Ground<'_>,
) -> Made {
    match plant {
        Defect::RowOffByOne => {
            let rows = weight.rows() as u32;
            let next: Vec<u32> = tokens.iter().map(|&token| (token + 1) % rows).collect();
            Ok(Some(ground.arm.embed(weight, &next)?))
        }
        Defect::EmbedInterleaved if clean.width().is_multiple_of(32) => {
            let width = clean.width();
            let order = |k: usize| k / 32 * 32 + k % 2 * 16 + k % 32 / 2;
            let rows = (0..clean.rows()).map(|row| clean.row(row));
            let moved = rows.flat_map(|row| (0..width).map(move |k| row[order(k)]));
            Ok(Some(Tensor::new(width, moved.collect())))
        }
        _ => Ok(None),
    }
}
