//! How each bug of the catalogue changes one call.
//!
//! Everything else of the arm stays as it is. A bug that does not apply to the
//! call (a missing bias where there is none) plants nothing.

use std::collections::BTreeMap;

use super::chosen;
use crate::block_format::{BlockFormat, ScaleCodec};
use crate::compare::fingerprints::scale_order::{sisters_of, with_tail_of_before};
use crate::compare::fingerprints::{
    cache_format, head_permutation, layer_norm, rope_angles, zero_point,
};
use crate::compute::block_departure::{
    exponents_one_larger, nibbles_exchanged, powers_rounded_up, scales_in_order,
    whole_scale_missing,
};
use crate::compute::call::{Call, MadeWeight};
use crate::compute::delta::DeltaRule;
use crate::compute::departure::{
    Converted, Edit, MOST_E4M3FNUZ, Steps, clipped, flushed, keep, matmul_by_factor, matmul_rows,
    only_inner, operands, read_as, read_as_fnuz, requantised, rounded_up_beside_codes, scaled,
    truncated, unsaturated, with_scales_of, wrapped, zero_point_ignored,
};
use crate::compute::emulated::arm::Emulated;
use crate::compute::emulated::gemm::Scales;
use crate::compute::emulated::ranks::sum_by_rank;
use crate::compute::emulated::schedule::Schedule;
use crate::compute::experts::{self, Products};
use crate::compute::forward::top_1;
use crate::compute::kv_cache::Cached;
use crate::compute::reference::{Reference, activated, gated as of_pair};
use crate::compute::{AttentionShape, ComputeError, Ops, parallel, rope};
use crate::dtype::Format;
use crate::model::{Activation, Model, Rope, RopeLayout, RouterScores, Routing, Weight};
use crate::op::{Accumulate, ActivationScale, Recipe, Scale, Site, WeightScale, in_layer};
use crate::tensor::Tensor;

/// What is done to a call.
#[expect(missing_docs, reason = "the catalogue's names say what each of them is")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Plant {
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
    BiasMissing,
    BiasTwice,
    PreviousLayersBias,
    Single(f32),
    TopSwapped,
    Flicker,
    OtherEpsilon,
    Epsilon(f32),
    GainOffset,
    GainIgnored,
    OtherGain,
    MeanSubtracted,
    SumForMean,
    Rounded(Format),
    RopeLayout,
    RopeBase(f64),
    RopeBack,
    RopeOffset(usize),
    RopeFirst,
    RopeMissing,
    RopeFactorsIgnored,
    RopeAngles(Format),
    SoftmaxScale(u8),
    MaskMissing,
    MaskStrict,
    Window(usize),
    HeadsModulo,
    HeadsFirst,
    KeysForValues,
    CacheKept(Format, bool),
    GateForUp,
    Gelu,
    Relu,
    UpIgnored,
    StreamMissing,
    BlockMissing,
    BlockTwiceAdded,
    BlockSubtracted,
    EmbeddingAdded,
    RowOffByOne,
    EmbedInterleaved,
    TimesRootHidden,
    FactorMissing,
    FactorTwice,
    SoftCapMissing,
    CacheFormat,
    CacheTruncated,
    CacheScaleOfTensor,
    CacheScaleMissing,
    OffsetMissing,
    RopeWhole,
    WindowIgnored,
    WindowWider,
    SinksIgnored,
    MeanKept,
    NormBiasMissing,
    NextExpert,
    RoutingScores,
    RoutingFactor,
    RoutingBias,
    OtherExpert,
    StateKept,
    StateUncorrected,
    XWrapped(f32),
    XZeroPointIgnored,
    RankMissing,
    RankTwice,
    BiasOnEveryRank,
}

impl Plant {
    /// Whether several GPUs must compute the pass together.
    pub fn is_of_ranks(self) -> bool {
        matches!(self, Plant::RankMissing | Plant::RankTwice | Plant::BiasOnEveryRank)
    }
}

/// What a bug has at hand.
pub struct Ground<'a> {
    /// The clean arm.
    pub arm: &'a Emulated,
    /// Its recipe.
    pub recipe: &'a Recipe,
    /// The model.
    pub model: &'a Model,
    /// Decides columns, blocks and the like.
    pub seed: u64,
    /// Whether the prompt stands in a longer batch.
    pub in_batch: bool,
    /// How often this site was computed, this time included.
    pub call_number: u64,
    /// The last tensor of each site so far.
    pub made: &'a BTreeMap<Site, Tensor>,
    /// The last activation of each GEMM so far.
    pub inputs: &'a BTreeMap<Site, Tensor>,
}

type Made = Result<Option<Tensor>, ComputeError>;

/// What the call returns with the bug; nothing where the bug does not apply.
pub fn planted(
    plant: Plant,
    site: &Site,
    call: &Call<'_>,
    clean: &Tensor,
    ground: &Ground<'_>,
) -> Made {
    match plant {
        Plant::Times(factor) => return Ok(Some(mapped(clean, |y| y * factor))),
        Plant::TimesRootHidden => {
            let factor = (clean.width() as f32).sqrt();
            return Ok(Some(mapped(clean, |y| y * factor)));
        }
        Plant::Rounded(format) => return Ok(Some(mapped(clean, |y| format.round(y)))),
        Plant::Single(value) => {
            let mut y = clean.clone();
            let row = chosen(ground.seed, y.rows());
            let column = chosen(ground.seed + 1, y.width());
            y.row_mut(row)[column] = value;
            return Ok(Some(y));
        }
        Plant::Flicker => {
            let mut y = clean.clone();
            let column = chosen(ground.seed, y.width());
            y.row_mut(0)[column] += ground.call_number as f32;
            return Ok(Some(y));
        }
        Plant::ShiftedInBatch if !ground.in_batch => return Ok(None),
        Plant::ShiftedInBatch => {
            let mut y = clean.clone();
            y.data_mut().rotate_left(clean.width());
            return Ok(Some(y));
        }
        Plant::PreviousLayersOutput => return Ok(earlier(ground.made, site, 1, clean)),
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
        Call::RmsNorm { x, gain, eps } => norm(plant, (x, gain, eps), ground),
        Call::LayerNorm { x, gain, bias, eps } => match plant {
            Plant::MeanKept => layer_norm::with_mean(ground.arm, call),
            Plant::NormBiasMissing if bias.is_some() => {
                Ok(Some(ground.arm.layer_norm(x, gain, None, eps)?))
            }
            Plant::Epsilon(other) if other != eps => {
                Ok(Some(ground.arm.layer_norm(x, gain, bias, other)?))
            }
            _ => Ok(None),
        },
        Call::Activated { x, activation } => match plant {
            Plant::Gelu | Plant::Relu => {
                let ones = Tensor::new(x.width(), vec![1.0; x.data().len()]);
                gated(plant, (x, &ones, activation), ground)
            }
            _ => Ok(None),
        },
        Call::Route { scores, bias, routing } => router(plant, (scores, bias, routing), ground),
        Call::Experts(products) => match plant {
            Plant::OtherExpert if products.weights.len() > 1 => {
                let taken = experts::taken(products.routes, products.used);
                let Some(&first) = taken.get(chosen(ground.seed, taken.len())) else {
                    return Ok(None);
                };
                let count = products.weights.len();
                let mut weights = products.weights.to_vec();
                weights[first] = products.weights[(first + 1) % count];
                let spoilt = Products { weights: &weights, ..products };
                Ok(Some(ground.arm.experts(&spoilt)?))
            }
            _ => Ok(None),
        },
        Call::Delta(rule) => match plant {
            Plant::StateKept | Plant::StateUncorrected => {
                let heads = rule.net.value_heads;
                let kept = plant == Plant::StateKept;
                let mut gates = rule.gates.clone();
                for row in 0..gates.rows() {
                    let range = if kept { 0..heads } else { heads..2 * heads };
                    gates.row_mut(row)[range].fill(1.0);
                }
                let spoilt = DeltaRule { gates: &gates, ..rule };
                Ok(Some(Call::Delta(spoilt).on(ground.arm)?))
            }
            _ => Ok(None),
        },
        Call::Mix { .. } | Call::SigmoidGate { .. } | Call::Convolve(_) | Call::Gates(_) => {
            Ok(None)
        }
        Call::Rope { x, rope, head_dim, first_position } => {
            rotation(plant, (x, rope, head_dim, first_position), ground)
        }
        Call::Cached(cached) => Ok(of_cache(plant, cached)),
        Call::Attention { q, k, v, shape } => attention(plant, (q, k, v, shape), ground),
        Call::Gated { gate, up, activation } => gated(plant, (gate, up, activation), ground),
        Call::Add { a, b } => addition(plant, a, b, ground),
        Call::Embed { weight, tokens } => embedding(plant, weight, tokens, clean, ground),
        Call::Scale { x, factor, .. } => Ok(match plant {
            Plant::FactorMissing => Some(x.clone()),
            Plant::FactorTwice => Some(mapped(clean, |y| y * factor as f32)),
            _ => None,
        }),
        Call::SoftCap { x, .. } => Ok((plant == Plant::SoftCapMissing).then(|| x.clone())),
    }
}

/// Bugs of what a cache of keys or values gives back; only FP8 has scales.
fn of_cache(plant: Plant, cached: Cached<'_>) -> Option<Tensor> {
    let Cached { x, format, scale } = cached;
    if !format.is_fp8() {
        return None;
    }
    match plant {
        Plant::CacheFormat => {
            let other = if format == Format::E4m3 { Format::E5m2 } else { Format::E4m3 };
            Some(Cached { format: other, ..cached }.read_back())
        }
        Plant::CacheTruncated => {
            Some(mapped(x, |x| cache_format::towards_zero(format, x / scale) * scale))
        }
        Plant::CacheScaleOfTensor => Some(cache_format::kept(x, format, false)),
        Plant::CacheScaleMissing if scale != 1.0 => {
            Some(mapped(&cached.read_back(), |x| x / scale))
        }
        _ => None,
    }
}

/// Bugs of the choice of experts and of their weights.
fn router(
    plant: Plant,
    (scores, bias, routing): (&Tensor, Option<Weight<'_>>, &Routing),
    ground: &Ground<'_>,
) -> Made {
    let by = |scores: &Tensor, bias, routing: Routing| {
        Ok(Some(ground.arm.route(scores, bias, &routing)?))
    };
    match plant {
        // The best expert of one token is passed over, and the best of the others takes its place.
        Plant::NextExpert if scores.width() > routing.used => {
            let used = routing.used;
            let clean = ground.arm.route(scores, bias, routing)?;
            let mut taken = experts::taken(&clean, used);
            let row = chosen(ground.seed, scores.rows());
            let best = top_1(clean.row(row)).0 as usize;
            let own = &mut taken[row * used..(row + 1) * used];
            let mut rest: Vec<f32> = scores.row(row).to_vec();
            own.iter().for_each(|&expert| rest[expert] = f32::NEG_INFINITY);
            let next = top_1(&rest).0 as usize;
            own.iter_mut().filter(|expert| **expert == best).for_each(|expert| *expert = next);
            own.sort_unstable();
            Ok(Some(ground.arm.route_to(scores, routing, &taken)))
        }
        Plant::RoutingScores => {
            let scores_of = match routing.scores {
                RouterScores::Softmax => RouterScores::SoftmaxOfTaken,
                RouterScores::SoftmaxOfTaken => RouterScores::Softmax,
                RouterScores::Sigmoid => RouterScores::SigmoidNormalised,
                RouterScores::SigmoidNormalised => RouterScores::Sigmoid,
            };
            by(scores, bias, Routing { scores: scores_of, ..*routing })
        }
        Plant::RoutingFactor if routing.factor != 1.0 => {
            by(scores, bias, Routing { factor: 1.0, ..*routing })
        }
        Plant::RoutingBias if bias.is_some() => by(scores, None, *routing),
        _ => Ok(None),
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
    fn by_steps(&self, plant: Plant) -> Made {
        let engine = self.ground.arm.engine();
        if engine.is_some_and(|engine| !engine.takes_steps(self.weight.name())) {
            return Ok(None);
        }
        let recipe = self.ground.recipe;
        let inner = self.x.width();
        let scheduled = Schedule::of(recipe);
        let is_e4m3 = recipe.gemm == Format::E4m3;
        match plant {
            Plant::XScale(factor) => self.with(&|o| scaled(o, |scale| scale * factor), &keep),
            Plant::WScale(factor) => self.with(&keep, &|o| scaled(o, |scale| scale * factor)),
            Plant::XScaleMissing => self.with(&|o| scaled(o, |_| 1.0), &keep),
            Plant::WScaleMissing => self.with(&keep, &|o| scaled(o, |_| 1.0)),
            Plant::XScaleTwice => self.with(&|o| scaled(o, |scale| scale * scale), &keep),
            Plant::XPowerOfTwo => self.with(&rounded_up_beside_codes, &keep),
            Plant::WPowerOfTwo => self.with(&keep, &rounded_up_beside_codes),
            Plant::XUnsaturated(factor) if is_e4m3 => self.with(&|o| unsaturated(o, factor), &keep),
            Plant::XWrapped(factor) => self.with(&|o| wrapped(o, factor), &keep),
            Plant::XZeroPointIgnored => self.with(&zero_point_ignored, &keep),
            Plant::WReadAsFnuz => self.with(&keep, &read_as_fnuz),
            Plant::NibblesExchanged if recipe.gemm == Format::E2m1 => {
                self.with(&keep, &nibbles_exchanged)
            }
            Plant::NextBlocksScale if recipe.blocks().is_some() => {
                let order = |row, block, _, blocks| (row, (block + 1) % blocks);
                self.with(&keep, &|operand| scales_in_order(operand, order))
            }
            Plant::WholeScaleMissing if recipe.blocks() == Some(BlockFormat::Nvfp4) => {
                self.with(&keep, &whole_scale_missing)
            }
            Plant::PowersRoundedUp if has_powers(recipe) => self.with(&powers_rounded_up, &keep),
            Plant::ExponentsOneLarger if has_powers(recipe) => {
                self.with(&keep, &exponents_one_larger)
            }
            Plant::XClippedAsFnuz if is_e4m3 => self.with(&|o| clipped(o, MOST_E4M3FNUZ), &keep),
            Plant::ScaleTail => {
                let [_, (codes, scales, _)] = operands(self.ground.arm, self.x, self.weight)?;
                match with_tail_of_before(&scales, codes.width()) {
                    Some(taken) => self.with(&keep, &|o| with_scales_of(o, &taken)),
                    None => Ok(None),
                }
            }
            Plant::ScaleSlice => {
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
            Plant::ScaleProduct => {
                let factor = |scale| Format::F16.round(scale);
                let operands = (self.x, self.weight, self.bias);
                Ok(Some(matmul_by_factor(self.ground.arm, recipe, operands, factor)?))
            }
            Plant::XSaturated(factor) => self.with(&|o| requantised(o, factor), &keep),
            Plant::WSaturated(factor) => self.with(&keep, &|o| requantised(o, factor)),
            Plant::TruncateX => self.with(&truncated, &keep),
            Plant::TruncateW => self.with(&keep, &truncated),
            Plant::TruncateBoth => self.with(&truncated, &truncated),
            Plant::FlushX => self.with(&flushed, &keep),
            Plant::FlushW => self.with(&keep, &flushed),
            Plant::ReadX => self.with(&as_e5m2, &keep),
            Plant::ReadW => self.with(&keep, &as_e5m2),
            Plant::Tail(tail) if tail < inner => {
                self.with(&|o| only_inner(o, |k| k < inner - tail), &keep)
            }
            Plant::BlockLost(width) if width < inner => {
                let block = chosen(self.ground.seed, inner / width);
                self.with(&|o| only_inner(o, |k| k / width != block), &keep)
            }
            Plant::BlockTwice(width) if width < inner => {
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
            Plant::OtherAccumulation => {
                let other = match scheduled.accumulate {
                    Accumulate::Fast => Schedule::PROMOTED,
                    Accumulate::Promoted => Schedule::FAST,
                };
                self.with_schedule(other)
            }
            Plant::SplitK(parts) => self.with_schedule(scheduled.with_split_k(parts)),
            Plant::Alternating if self.ground.call_number.is_multiple_of(2) => Ok(None),
            Plant::Alternating => self.with_schedule(scheduled.with_split_k(2)),
            Plant::Output(format) if format != recipe.output => {
                self.run(&Steps { output: format, ..Steps::of(recipe) })
            }
            Plant::OutputTruncated => {
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
            Plant::F16Overflow(clipped) => self.f16_overflow(clipped),
            Plant::RankMissing | Plant::RankTwice | Plant::BiasOnEveryRank => self.of_ranks(plant),
            _ => Ok(None),
        }
    }

    /// Bugs of the sum of what several GPUs made.
    fn of_ranks(&self, plant: Plant) -> Made {
        let Ground { arm, recipe, seed, .. } = self.ground;
        let Some(parts) = parallel::parts(recipe, &self.weight)? else { return Ok(None) };
        let mut made = arm.products_of_ranks(&parts, self.x, self.weight, self.bias)?;
        let rank = chosen(*seed, made.len());
        match (plant, self.bias) {
            (Plant::RankMissing, _) => drop(made.remove(rank)),
            (Plant::RankTwice, _) => made.push(made[rank].clone()),
            (Plant::BiasOnEveryRank, Some(bias)) => {
                let values = bias.to_vec()?;
                made.iter_mut().skip(1).for_each(|part| part.add_to_rows(&values));
            }
            _ => return Ok(None),
        }
        Ok(Some(arm.streamed(sum_by_rank(made, recipe.output))))
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
    fn by_operands(&self, plant: Plant, site: &Site) -> Made {
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
            Plant::PerChannel => {
                other_scale(Scale { weight: WeightScale::Channel, ..recipe.scale })
            }
            Plant::PerToken if x.rows() > 1 => {
                other_scale(Scale { activation: ActivationScale::Token, ..recipe.scale })
            }
            Plant::Computed(format) if format != recipe.gemm => {
                let arm = Emulated::new(&Recipe { gemm: format, ..**recipe })?;
                self.on(&arm, x, weight, bias)
            }
            Plant::NotEngaged => self.on(&Reference, x, weight, bias),
            Plant::Q8(block) => {
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
            Plant::Transposed => {
                let (rows, values) = (weight.rows(), weight.to_vec()?);
                let at = |index: usize| values[index % width * rows + index / width];
                let moved: Vec<f32> = (0..rows * width).map(at).collect();
                let made = MadeWeight::new(format!("{} transposed", weight.name()), rows, &moved);
                self.on(*arm, x, made.weight()?, bias)
            }
            Plant::HalvesSwapped => self.rearranged(|k| (k + width / 2) % width),
            Plant::NeighboursSwapped => self.rearranged(|k| k ^ 1),
            Plant::Interleaved if width.is_multiple_of(32) => {
                self.rearranged(|k| k / 32 * 32 + k % 2 * 16 + k % 32 / 2)
            }
            Plant::ZeroPoint(group) => {
                let moved = zero_point::shifted(&weight.to_vec()?, width, group);
                let name = format!("{} shifted", weight.name());
                let made = MadeWeight::new(name, weight.rows(), &moved);
                self.on(*arm, x, made.weight()?, bias)
            }
            Plant::OtherHeads => {
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
            Plant::PreviousLayersWeight => match layers_name(weight.name(), 1) {
                Some(name) if model.has(&name) => self.on(*arm, x, model.tensor(&name)?, bias),
                _ => Ok(None),
            },
            Plant::SistersWeight => {
                let name = weight.name().replace("attn_v", "attn_k").replace("ffn_gate", "ffn_up");
                if !model.has(&name) {
                    return Ok(None);
                }
                let sister = model.tensor(&name)?;
                // K and V may be stored alike, never be alike.
                self.on(*arm, x, sister, bias)
            }
            Plant::Layer0sInput => {
                let back = in_layer(&site.0).map_or(0, |(layer, _)| layer);
                match earlier(inputs, site, back, x) {
                    Some(stale) => self.on(*arm, &stale, weight, bias),
                    None => Ok(None),
                }
            }
            Plant::PreviousLayersInput => match earlier(inputs, site, 1, x) {
                Some(stale) => self.on(*arm, &stale, weight, bias),
                None => Ok(None),
            },
            Plant::BiasMissing if bias.is_some() => self.on(*arm, x, weight, None),
            Plant::PreviousLayersBias => match bias.and_then(|bias| layers_name(bias.name(), 1)) {
                Some(name) if model.has(&name) => {
                    self.on(*arm, x, weight, Some(model.tensor(&name)?))
                }
                _ => Ok(None),
            },
            _ => Ok(None),
        }
    }

    /// Bugs of what is done with the result.
    fn by_result(&self, plant: Plant, site: &Site, clean: &Tensor) -> Made {
        let seed = self.ground.seed;
        let (rows, width) = (clean.rows(), clean.width());
        let mut y = clean.clone();
        match plant {
            Plant::Column(factor) => {
                let column = chosen(seed, width);
                (0..rows).for_each(|row| y.row_mut(row)[column] *= factor);
            }
            Plant::Row(factor) => {
                y.row_mut(chosen(seed, rows)).iter_mut().for_each(|y| *y *= factor);
            }
            Plant::ColumnsSwapped => {
                let first = chosen(seed, width);
                let second = (first + 1 + chosen(seed + 1, width - 1)) % width;
                (0..rows).for_each(|row| y.row_mut(row).swap(first, second));
            }
            Plant::RowsShifted if rows > 1 => {
                (1..rows).for_each(|row| y.row_mut(row).copy_from_slice(clean.row(row - 1)));
            }
            Plant::RowsSwapped if rows > 1 => {
                y.row_mut(0).copy_from_slice(clean.row(rows - 1));
                y.row_mut(rows - 1).copy_from_slice(clean.row(0));
            }
            Plant::StaleRows if rows > 1 => {
                let Some(stale) = earlier(self.ground.made, site, 1, clean) else {
                    return Ok(None);
                };
                (1..rows).for_each(|row| y.row_mut(row).copy_from_slice(stale.row(row)));
            }
            Plant::TileUnwritten if width >= 32 => {
                let first = chosen(seed, width / 32) * 32;
                (0..rows).for_each(|row| y.row_mut(row)[first..first + 32].fill(0.0));
            }
            Plant::LaneSpoilt(tile) => {
                let lane = chosen(seed, tile);
                for row in 0..rows {
                    for column in (lane..width).step_by(tile) {
                        y.row_mut(row)[column] += noise(seed, row * width + column, clean);
                    }
                }
            }
            Plant::TileSpoilt(tile) if 2 * tile <= width => {
                let first = chosen(seed, width / tile) * tile;
                for row in 0..rows {
                    for column in first..first + tile {
                        y.row_mut(row)[column] += noise(seed, row * width + column, clean);
                    }
                }
            }
            Plant::BiasTwice => {
                let Some(bias) = self.bias else { return Ok(None) };
                y.add_to_rows(&bias.to_vec()?);
            }
            Plant::TopSwapped => {
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

fn norm(plant: Plant, (x, gain, eps): (&Tensor, Weight<'_>, f32), ground: &Ground<'_>) -> Made {
    let arm = ground.arm;
    let values = gain.to_vec()?;
    let with_gain = |change: &dyn Fn(f32) -> f32| {
        let changed: Vec<f32> = values.iter().map(|&g| change(g)).collect();
        let made = MadeWeight::new(format!("{} changed", gain.name()), 1, &changed);
        Ok(Some(arm.rms_norm(x, made.weight()?, eps)?))
    };
    match plant {
        Plant::OtherEpsilon => {
            let other = if eps == 1e-6 { 1e-5 } else { 1e-6 };
            Ok(Some(arm.rms_norm(x, gain, other)?))
        }
        Plant::Epsilon(other) if other != eps => Ok(Some(arm.rms_norm(x, gain, other)?)),
        Plant::GainOffset => with_gain(&|g| 1.0 + g),
        Plant::GainIgnored => with_gain(&|_| 1.0),
        Plant::OffsetMissing if gain.is_less_one() => with_gain(&|g| g - 1.0),
        Plant::OtherGain => {
            let name = gain.name();
            let other = if name.contains("attn_norm") {
                name.replace("attn_norm", "ffn_norm")
            } else {
                name.replace("ffn_norm", "attn_norm")
            };
            if !ground.model.has(&other) {
                return Ok(None);
            }
            Ok(Some(arm.rms_norm(x, ground.model.tensor(&other)?, eps)?))
        }
        Plant::MeanSubtracted => {
            let mut centred = x.clone();
            for group in centred.data_mut().chunks_exact_mut(values.len()) {
                let mean = group.iter().sum::<f32>() / group.len() as f32;
                group.iter_mut().for_each(|x| *x -= mean);
            }
            Ok(Some(arm.rms_norm(&centred, gain, eps)?))
        }
        Plant::SumForMean => {
            let root = (values.len() as f32).sqrt();
            Ok(Some(mapped(&arm.rms_norm(x, gain, eps / values.len() as f32)?, |y| y / root)))
        }
        _ => Ok(None),
    }
}

fn rotation(
    plant: Plant,
    (x, geometry, head_dim, first): (&Tensor, &Rope, usize, usize),
    ground: &Ground<'_>,
) -> Made {
    let turned = |geometry: &Rope, first| Ok(Some(ground.arm.rope(x, geometry, head_dim, first)?));
    match plant {
        Plant::RopeLayout => {
            let layout = match geometry.layout {
                RopeLayout::Halves => RopeLayout::Interleaved,
                RopeLayout::Interleaved => RopeLayout::Halves,
            };
            turned(&Rope { layout, ..geometry.clone() }, first)
        }
        Plant::RopeBase(theta) if theta != geometry.theta => {
            turned(&Rope { theta, ..geometry.clone() }, first)
        }
        Plant::RopeOffset(offset) => turned(geometry, first + offset),
        Plant::RopeFirst if x.rows() > 1 => {
            let mut data = Vec::with_capacity(x.data().len());
            for row in 0..x.rows() {
                let one = Tensor::new(x.width(), x.row(row).to_vec());
                data.extend(ground.arm.rope(&one, geometry, head_dim, first)?.into_data());
            }
            Ok(Some(Tensor::new(x.width(), data)))
        }
        Plant::RopeMissing => Ok(Some(x.clone())),
        Plant::RopeAngles(format) => {
            let angles = (format, true);
            Ok(Some(ground.arm.streamed(rope_angles::turned(x, geometry, head_dim, first, angles))))
        }
        Plant::RopeFactorsIgnored if geometry.factors.is_some() => {
            turned(&Rope { factors: None, scaling: None, ..geometry.clone() }, first)
        }
        Plant::RopeWhole if geometry.dimensions < head_dim && geometry.factors.is_none() => {
            turned(&Rope { dimensions: head_dim, ..geometry.clone() }, first)
        }
        Plant::RopeBack => {
            let mirrored = |x: &Tensor| {
                let mut y = x.clone();
                for head in y.data_mut().chunks_exact_mut(head_dim) {
                    for pair in 0..geometry.dimensions / 2 {
                        let (_, second) = rope::pair(geometry, head_dim, pair);
                        head[second] = -head[second];
                    }
                }
                y
            };
            let back = ground.arm.rope(&mirrored(x), geometry, head_dim, first)?;
            Ok(Some(mirrored(&back)))
        }
        _ => Ok(None),
    }
}

fn attention(
    plant: Plant,
    (q, k, v, shape): (&Tensor, &Tensor, &Tensor, AttentionShape<'_>),
    ground: &Ground<'_>,
) -> Made {
    let arm = ground.arm;
    let AttentionShape { heads, kv_heads, head_dim, value_dim, first_position, .. } = shape;
    let scaled = |factor: f32| Ok(Some(arm.attention(&mapped(q, |q| q * factor), k, v, shape)?));
    let seen = |range: &dyn Fn(usize) -> std::ops::Range<usize>| {
        let mut data = Vec::with_capacity(q.data().len());
        for row in 0..q.rows() {
            let positions = range(first_position + row);
            let some = |x: &Tensor| {
                let range = positions.start * x.width()..positions.end * x.width();
                Tensor::new(x.width(), x.data()[range].to_vec())
            };
            let one = Tensor::new(q.width(), q.row(row).to_vec());
            let first_position = positions.len() - 1;
            let shape = AttentionShape { first_position, window: None, ..shape };
            data.extend(arm.attention(&one, &some(k), &some(v), shape)?.into_data());
        }
        Ok(Some(Tensor::new(heads * value_dim, data)))
    };
    let mapped_heads = |kv_of: &dyn Fn(usize) -> usize| {
        let wide = |x: &Tensor, width: usize| {
            let rows = (0..x.rows()).flat_map(|row| {
                let row = x.row(row);
                (0..heads).flat_map(move |head| {
                    let kv = kv_of(head);
                    row[kv * width..(kv + 1) * width].iter().copied()
                })
            });
            Tensor::new(heads * width, rows.collect())
        };
        let every = AttentionShape { kv_heads: heads, ..shape };
        Ok(Some(arm.attention(q, &wide(k, head_dim), &wide(v, value_dim), every)?))
    };
    let root = 1.0 / shape.f32_scale();
    let first = |own: usize| shape.seen(own - first_position).start;
    match plant {
        Plant::CacheKept(format, unscaled) => {
            let kept = |x: &Tensor| cache_format::kept(x, format, unscaled);
            Ok(Some(arm.attention(q, &kept(k), &kept(v), shape)?))
        }
        Plant::SoftmaxScale(0) => scaled(root),
        Plant::SoftmaxScale(1) => scaled(1.0 / root),
        Plant::SoftmaxScale(_) => scaled(std::f32::consts::LN_2),
        Plant::SoftCapMissing if shape.cap.is_some() => {
            Ok(Some(arm.attention(q, k, v, AttentionShape { cap: None, ..shape })?))
        }
        Plant::WindowIgnored if shape.window.is_some() => seen(&|own| 0..own + 1),
        Plant::WindowWider => match shape.window {
            Some(window) if window < k.rows() => {
                seen(&|own| (own + 1).saturating_sub(window + 1)..own + 1)
            }
            _ => Ok(None),
        },
        Plant::MaskMissing if k.rows() > 1 => seen(&|_| 0..k.rows()),
        Plant::MaskStrict if k.rows() > 1 => {
            seen(&|own| first(own).min(own.max(1) - 1)..own.max(1))
        }
        Plant::Window(window)
            if k.rows() > window && shape.window.is_none_or(|own| window < own) =>
        {
            seen(&|own| (own + 1).saturating_sub(window)..own + 1)
        }
        Plant::HeadsModulo if kv_heads > 1 && kv_heads < heads => {
            mapped_heads(&|head| head % kv_heads)
        }
        Plant::HeadsFirst if kv_heads > 1 => mapped_heads(&|_| 0),
        Plant::SinksIgnored if shape.sinks.is_some() => {
            Ok(Some(arm.attention(q, k, v, AttentionShape { sinks: None, ..shape })?))
        }
        Plant::KeysForValues if k.width() == v.width() => Ok(Some(arm.attention(q, v, k, shape)?)),
        _ => Ok(None),
    }
}

fn gated(
    plant: Plant,
    (gate, up, activation): (&Tensor, &Tensor, Activation),
    ground: &Ground<'_>,
) -> Made {
    let each = |function: &dyn Fn(f64, f64) -> f64| {
        let pairs = gate.data().iter().zip(up.data());
        let values = pairs.map(|(&g, &u)| function(f64::from(g), f64::from(u)) as f32);
        Ok(Some(Tensor::new(gate.width(), values.collect())))
    };
    match plant {
        Plant::GateForUp => Ok(Some(ground.arm.gated(up, gate, activation)?)),
        Plant::Gelu => each(&|g, u| 0.5 * g * (1.0 + libm::erf(g / std::f64::consts::SQRT_2)) * u),
        Plant::Relu => each(&|g, u| if g > 0.0 { g * u } else { 0.0 }),
        // gpt-oss's other value counts as one where it is zero.
        Plant::UpIgnored => each(&|g, _| match activation {
            Activation::ClampedSwiglu => of_pair(activation, g, 0.0),
            _ => activated(activation, g),
        }),
        _ => Ok(None),
    }
}

fn addition(plant: Plant, a: &Tensor, b: &Tensor, ground: &Ground<'_>) -> Made {
    let arm = ground.arm;
    match plant {
        Plant::StreamMissing => Ok(Some(b.clone())),
        Plant::BlockMissing => Ok(Some(a.clone())),
        Plant::BlockTwiceAdded => Ok(Some(arm.add(&arm.add(a, b)?, b)?)),
        Plant::BlockSubtracted => Ok(Some(arm.add(a, &mapped(b, |b| -b))?)),
        Plant::EmbeddingAdded => match ground.made.get(&Site("embed".to_owned())) {
            Some(embedded) if embedded.rows() == b.rows() => Ok(Some(arm.add(embedded, b)?)),
            _ => Ok(None),
        },
        _ => Ok(None),
    }
}

fn embedding(
    plant: Plant,
    weight: Weight<'_>,
    tokens: &[u32],
    clean: &Tensor,
    ground: &Ground<'_>,
) -> Made {
    match plant {
        Plant::RowOffByOne => {
            let rows = weight.rows() as u32;
            let next: Vec<u32> = tokens.iter().map(|&token| (token + 1) % rows).collect();
            Ok(Some(ground.arm.embed(weight, &next)?))
        }
        Plant::EmbedInterleaved if clean.width().is_multiple_of(32) => {
            let width = clean.width();
            let order = |k: usize| k / 32 * 32 + k % 2 * 16 + k % 32 / 2;
            let rows = (0..clean.rows()).map(|row| clean.row(row));
            let moved = rows.flat_map(|row| (0..width).map(move |k| row[order(k)]));
            Ok(Some(Tensor::new(width, moved.collect())))
        }
        _ => Ok(None),
    }
}
