//! The predicted floor: the deviation that rounding alone gives each output.
//!
//! For a GEMM whose operands are rounded to `x~ = x + dx` and `w~ = w + dw`
//! (both known exactly), output (i, j) has
//! `sigma^2 = sum_k (x^2 dw^2 + dx^2 w^2 + dx^2 dw^2) + accumulation + output rounding`,
//! and two outputs that share an operand's rounding have a covariance known likewise.
//! The other ops round in f32 a counted number of times; each rounding of a value
//! s counts as an independent error of variance `(u s)^2 / 3`, u = 2^-24, and is
//! carried to the output by the op's derivative. It predicts sizes and computes the
//! truth beside them; what an arm made is not known here.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::call::Call;
use super::conversion::{Lifted, Rows, WeightSquares, errors_by_part};
use super::delta::{Convolution, DeltaRule};
use super::dots::dots;
use super::emulated::arm::Emulated;
use super::emulated::chip::{BlockScaled, MatrixCore, Unit, chip};
use super::emulated::kernels::WARP_LANES;
use super::emulated::schedule::{Schedule, Step};
use super::experts::{self, Products};
use super::exponential::exponentials;
use super::reference::{CLAMP, Reference, Widened, activated, dot_rows, routed, sigmoid_argument};
use super::rope;
use super::{
    AttentionShape, ComputeError, Ops, check_gain, check_interrupt, check_matmul, check_tokens,
    gain_and_bias, parallel,
};
use crate::block_format::BlockFormat;
use crate::dtype::Format;
use crate::engine::RopeKernel;
use crate::model::{Activation, Rope, Routing, Weight};
use crate::op::{Accumulate, Recipe};
use crate::random::Random;
use crate::tensor::Tensor;
use crate::vector::{Kernel, dispatch};

/// What rounding alone makes of a result.
#[derive(Clone, Debug, PartialEq)]
pub struct Deviations {
    /// The deviation of each value, in the result's shape.
    pub each: Tensor,
    /// What the errors of one line have in common, of a GEMM; elsewhere it is not known.
    pub shared: Option<Shared>,
}

/// The mean squared correlation of two errors of a line, for each line: errors of one
/// row share the rounding of `x`, those of one column the rounding of `w`.
#[derive(Clone, Debug, PartialEq)]
pub struct Shared {
    /// Of each row.
    pub rows: Vec<f32>,
    /// Of each column.
    pub columns: Vec<f32>,
    /// The share of values that the conversions and the additions leave as they are, but for
    /// less than their own last rounding: of a weight of zeros, or where a bias outweighs the
    /// product. Every arm may round them alike, so their errors may lie as low as they like.
    pub quiet: f64,
}

/// Pairs of rows whose correlation is computed in each column.
const ROW_PAIRS: usize = 8;
/// Pairs of columns whose correlation is computed in each row, of every chunk of a weight.
const COLUMN_PAIRS: usize = 4;

/// Below this share of a value's variance what comes before its last rounding leaves it quiet.
const QUIET: f64 = 1.0 / 16.0;

/// Half an ULP of f32, relative.
const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Elements of K after which the promoted accumulator restarts.
const PROMOTION_INTERVAL: f64 = 128.0;

/// The reference arm, which notes beside each result the deviation that the
/// recipe's rounding gives it.
pub struct Floor {
    recipe: Recipe,
    emulated: Emulated,
    /// The deviations of the calls so far, in their order.
    sigmas: Mutex<Vec<Deviations>>,
}

impl Floor {
    /// The floor of a recipe.
    ///
    /// # Errors
    /// As [`Emulated::new`].
    pub fn new(recipe: &Recipe) -> Result<Floor, ComputeError> {
        let emulated = Emulated::new(recipe)?;
        Ok(Floor { recipe: *recipe, emulated, sigmas: Mutex::default() })
    }

    /// The floor of the products with one weight, where the recipe takes the checkpoint's codes.
    ///
    /// # Errors
    /// As [`Emulated::of_weight`].
    pub fn of_weight(&self, weight: &Weight<'_>) -> Result<Option<Floor>, ComputeError> {
        let Some(emulated) = self.emulated.of_weight(weight)? else { return Ok(None) };
        Ok(Some(Floor { recipe: *emulated.recipe(), emulated, sigmas: Mutex::default() }))
    }

    /// The prescribed arithmetic, whose rounding this is.
    pub fn emulated(&self) -> &Emulated {
        &self.emulated
    }

    /// The deviations of all calls so far, in their order.
    pub fn into_sigmas(self) -> Vec<Deviations> {
        self.sigmas.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The deviations of the last call, which are then forgotten.
    pub fn take_sigma(&self) -> Option<Tensor> {
        self.take_deviations().map(|deviations| deviations.each)
    }

    /// The same, with what the errors of a line share.
    pub fn take_deviations(&self) -> Option<Deviations> {
        self.sigmas.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop()
    }

    /// Notes deviations as those of the last call.
    pub fn put(&self, deviations: Deviations) {
        self.sigmas.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(deviations);
    }

    /// The variance of what a GEMM's result meets after its operands' conversion:
    /// accumulation and output rounding. The first pair is what [`Floor::accumulation`] gives for
    /// the width, `terms` is `sum_k (x w)^2`, and `chain` the
    /// accumulation's variance where [`Floor::chains`] gives it.
    pub fn after_operands(
        &self,
        (of_terms, of_sum): (f64, f64),
        dot: f64,
        terms: f64,
        chain: Option<f64>,
    ) -> f64 {
        let accumulation = chain.unwrap_or(of_terms * terms + of_sum * dot * dot);
        accumulation + self.output(dot.abs()) + rounding(Format::F32, dot.abs())
    }

    /// The variance of each product's accumulation, `[x rows, w rows]`, where it is a
    /// chain of f32 additions; `None` on a tensor core.
    ///
    /// Each addition rounds the running sum, `ulp^2 / 12`. The sums depend on where along
    /// K the large terms stand: a sum that an outlier channel raises early rounds coarsely
    /// all the way, however small the result is. So they are followed one by one.
    pub fn chains(&self, x: &[f32], w: &[f32], width: usize) -> Option<Vec<f64>> {
        match self.unit() {
            Some(
                Unit::TensorCore(_) | Unit::BlockScaled(_) | Unit::MatrixCore(_) | Unit::Integers,
            ) => None,
            Some(Unit::SequentialFma) | None => {
                let steps = Schedule::of(&self.recipe).steps(width, Format::F32);
                Some(dispatch(Chains { x, w, width, steps: &steps }))
            }
        }
    }

    /// The unit that multiplies.
    fn unit(&self) -> Option<&'static Unit> {
        let chip = chip(self.recipe.chip);
        match self.recipe.blocks() {
            Some(format) => chip.block_unit(format).map(|row| &row.unit),
            None => chip.unit(self.recipe.gemm, self.recipe.gemm),
        }
    }

    /// The same of a product whose K is dealt out: of each rank's product, and of their sum.
    pub(super) fn after_ranks(
        &self,
        (of_terms, of_sum): (f64, f64),
        dots: &[f64],
        terms: f64,
        chain: Option<f64>,
        bias: Option<f64>,
    ) -> f64 {
        let squares: f64 = dots.iter().map(|dot| dot * dot).sum();
        let accumulation = chain.unwrap_or(of_terms * terms + of_sum * squares);
        let whole = dots.iter().sum::<f64>();
        accumulation + self.of_sums(dots, 0.0, bias) + rounding(Format::F32, whole.abs())
    }

    /// The variance of rounding each rank's product to the output type, and of the sums of them;
    /// `noise` is the variance of what came before.
    fn of_sums(&self, dots: &[f64], noise: f64, bias: Option<f64>) -> f64 {
        let output = self.recipe.output;
        let noise = (noise / dots.len().max(1) as f64).sqrt();
        let at_least = |size: f64| if size.abs() > noise { size.abs() } else { noise };
        let mut variance = 0.0;
        let mut sum: Option<f64> = None;
        for &dot in dots {
            variance += self.output(at_least(dot));
            let Some(before) = sum else {
                // The first rank's has the bias, and is rounded again.
                variance += bias.map_or(0.0, |bias| rounding(output, at_least(dot + bias)));
                sum = Some(dot + bias.unwrap_or(0.0));
                continue;
            };
            variance += rounding_of_sum(output, at_least(before), at_least(dot), before + dot);
            sum = Some(before + dot);
        }
        variance
    }

    fn note(&self, each: Tensor) {
        self.note_shared(each, None);
    }

    fn note_shared(&self, each: Tensor, shared: Option<Shared>) {
        self.put(Deviations { each, shared });
    }

    /// Notes a deviation for each value of a result.
    fn note_each(&self, y: &Tensor, sigma: impl Fn(usize, f32) -> f64) {
        let values = y.data().iter().enumerate();
        let sigmas = values.map(|(index, &y)| sigma(index, y) as f32).collect();
        self.note(Tensor::new(y.width(), sigmas));
    }

    /// The variance of a tensor core's truncations, relative to `sum_k (x w)^2` and to
    /// `y^2`; a chain of f32 additions is followed by [`Floor::chains`].
    ///
    /// Each of `steps` block sums is cut to R bits below its largest term: the
    /// cuts of terms of either sign add as a random walk, `steps 2^-2R` of the
    /// terms' squares; the running sum loses up to half a unit each time, in
    /// the same direction, `(steps 2^-(R+1))^2` of its square.
    pub fn accumulation(&self, inner: usize) -> (f64, f64) {
        let inner = inner as f64;
        let blocks = self.recipe.blocks();
        match self.unit() {
            Some(Unit::TensorCore(core) | Unit::BlockScaled(BlockScaled { core, .. })) => {
                let promoted = blocks.is_none()
                    && self.recipe.gemm.is_fp8()
                    && self.recipe.accumulate == Accumulate::Promoted;
                let chain = if promoted { inner.min(PROMOTION_INTERVAL) } else { inner };
                let steps = (chain / core.products as f64).ceil();
                let bits = core.alignment_bits.min(core.result_bits);
                let unit = 0.5f64.powi(bits as i32);
                (steps * unit * unit, (steps * unit / 2.0).powi(2))
            }
            Some(Unit::MatrixCore(core)) => {
                let steps = (inner / core.products() as f64).ceil();
                match core {
                    MatrixCore::TwoStages { alignment_bits, .. }
                    | MatrixCore::EvenOdd { alignment_bits, .. } => {
                        let unit = 0.5f64.powi(*alignment_bits as i32);
                        (steps * unit * unit, (steps * unit / 2.0).powi(2))
                    }
                    // Each block rounds the sum so far, which is as large as a random walk to y; in
                    // pairs each product is rounded besides.
                    MatrixCore::Exact { .. } | MatrixCore::Pairwise { .. } => {
                        let ulp = f64::from(f32::EPSILON).powi(2);
                        let step = ulp / (8.0 * std::f64::consts::LN_2);
                        let of_product = match core {
                            MatrixCore::Pairwise { .. } => ulp / 3.0,
                            _ => 0.0,
                        };
                        (steps / 6.0 * step + of_product, steps / 3.0 * step)
                    }
                }
            }
            // The sum's conversion to f32 and the second of its two scales; the first is counted with
            // the output.
            Some(Unit::Integers) => (0.0, 2.0 * (F32_UNIT * F32_UNIT) / 3.0),
            _ => (0.0, 0.0),
        }
    }

    /// The variance of rounding a value of about `size` to the stream's type; nothing
    /// where the project's own kernels pass f32.
    fn passed(&self, size: f64) -> f64 {
        match self.recipe.stream {
            Some(stream) => rounding(stream, size.abs()),
            None => 0.0,
        }
    }

    /// The variance of rounding a value of about `size` to the stream's type, if it is below that
    /// type's normal numbers: what such a value makes is off by far more than by its own rounding.
    fn passed_below_normal(&self, size: f64) -> f64 {
        let least = self.recipe.stream.map(|stream| power_of_two(stream.min_exponent()));
        if least.is_some_and(|least| size.abs() < least) { self.passed(size) } else { 0.0 }
    }

    /// What a foreign engine may add to a value of about `size` that `roundings` f32
    /// operations of unknown order made.
    fn foreign(&self, roundings: f64, size: f64) -> f64 {
        if self.recipe.stream.is_some() { roundings * rounded(size) } else { 0.0 }
    }

    /// The variance of rounding a value of about `size` to the output type, and of its
    /// product with the scales. What f32 additions end with is an f32 already.
    fn output(&self, size: f64) -> f64 {
        let Recipe { gemm, output, .. } = self.recipe;
        let is_scaled = match self.recipe.blocks() {
            // The unit applies powers of two exactly, and no other scale follows.
            Some(format) => format == BlockFormat::Nvfp4,
            None => gemm.is_scaled(),
        };
        let scaled = if is_scaled { rounding(Format::F32, size) } else { 0.0 };
        let rounded = if output == Format::F32 { 0.0 } else { rounding(output, size) };
        scaled + rounded
    }
}

/// The activation of a product whose K is dealt out to ranks.
pub(super) struct Ranks {
    parts: Vec<Range<usize>>,
    values: Vec<Tensor>,
    wide: Vec<Widened>,
}

impl Ranks {
    /// The slices of an activation.
    pub fn of(x: &Tensor, parts: Vec<Range<usize>>) -> Ranks {
        let values: Vec<Tensor> = parts.iter().map(|inner| x.columns(inner.clone())).collect();
        let wide = values.iter().map(|x| Widened::of(x.data(), x.width())).collect();
        Ranks { parts, values, wide }
    }

    /// Elements of K that a rank has.
    pub fn inner(&self) -> usize {
        self.parts.first().map_or(0, Range::len)
    }

    /// Each rank's products with some rows of a weight, and the variance of all ranks' chains,
    /// where [`Floor::chains`] gives them.
    pub fn meet(
        &self,
        floor: &Floor,
        rows: &[f32],
        width: usize,
    ) -> (Vec<Vec<f64>>, Option<Vec<f64>>) {
        let whole = Tensor::new(width, rows.to_vec());
        let mut sums: Option<Vec<f64>> = None;
        let mut dots = Vec::with_capacity(self.parts.len());
        for ((inner, x), wide) in self.parts.iter().zip(&self.values).zip(&self.wide) {
            let w = whole.columns(inner.clone());
            dots.push(dot_rows(wide, &Widened::of(w.data(), inner.len())));
            if let Some(chains) = floor.chains(x.data(), w.data(), inner.len()) {
                let sums = sums.get_or_insert_with(|| vec![0.0; chains.len()]);
                sums.iter_mut().zip(chains).for_each(|(sum, chain)| *sum += chain);
            }
        }
        (dots, sums)
    }
}

/// The variance of chains of f32 additions, `[x rows, w rows]`.
struct Chains<'a> {
    x: &'a [f32],
    w: &'a [f32],
    width: usize,
    steps: &'a [Step],
}

impl Kernel for Chains<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Vec<f64> {
        /// Rows of the weight that are followed side by side.
        const SIDE: usize = 8;
        let Chains { x, w, width, steps } = self;
        let (rows, count) = (x.len() / width, w.len() / width);
        let mut variances = vec![0.0; rows * count];
        let mut turned = vec![[0.0f32; SIDE]; width];
        for (block, w) in w.chunks(SIDE * width).enumerate() {
            for (lane, w) in w.chunks_exact(width).enumerate() {
                turned.iter_mut().zip(w).for_each(|(turned, &w)| turned[lane] = w);
            }
            let lanes = w.len() / width;
            for (row, x) in x.chunks_exact(width).enumerate() {
                let mut squares = [0.0f64; SIDE];
                let mut total = [0.0f32; SIDE];
                for (number, step) in steps.iter().enumerate() {
                    let mut sum = [0.0f32; SIDE];
                    for (&x, w) in x[step.inner.clone()].iter().zip(&turned[step.inner.clone()]) {
                        for lane in 0..SIDE {
                            sum[lane] = if FMA {
                                x.mul_add(w[lane], sum[lane])
                            } else {
                                x * w[lane] + sum[lane]
                            };
                            squares[lane] += square_of_power(sum[lane]);
                        }
                    }
                    for lane in 0..SIDE {
                        total[lane] += sum[lane];
                        squares[lane] +=
                            if number > 0 { square_of_power(total[lane]) } else { 0.0 };
                    }
                }
                let first = row * count + block * SIDE;
                let unit = (2.0 * F32_UNIT).powi(2) / 12.0;
                let places = variances[first..first + lanes].iter_mut().zip(squares);
                places.for_each(|(variance, squares)| *variance = squares * unit);
            }
        }
        variances
    }
}

/// The square of the largest power of two in a value: of its ULP, but for a factor.
#[inline(always)]
fn square_of_power(value: f32) -> f64 {
    let power = f64::from(f32::from_bits(value.to_bits() & 0x7f80_0000));
    power * power
}

/// `2^exponent`, of exponents in f64's normal range.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// The variance of rounding the sum of two values of a type to it: a sum lies on the finer grid of
/// both, so that few places of it are lost, and half of all ties go either way.
fn rounding_of_sum(format: Format, a: f64, b: f64, sum: f64) -> f64 {
    let of_sum = rounding(format, sum.abs());
    let of_addends = rounding(format, if a < b { a } else { b });
    // Of m places of the finer grid in one of the sum's.
    let square = of_sum / of_addends;
    if square > 1.0 { of_sum * (1.0 + 2.0 / square) } else { 0.0 }
}

/// The variance of rounding a value of about `size`: `ulp^2 / 12`.
fn rounding(format: Format, size: f64) -> f64 {
    // Below f64's normal range the exponent's bits say less than any format's least one.
    let exponent = (size.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    let least = format.min_exponent();
    let exponent = if size > 0.0 && exponent > least { exponent } else { least };
    let place = power_of_two(exponent - format.fraction_bits() as i32);
    place * place / 12.0
}

/// A quarter of the last place of an f32: where a result must be the correctly
/// rounded one or its neighbour, one place is 4 deviations and two are 8.
fn quarter_place(value: f32) -> f64 {
    let size = value.abs();
    let next = f32::from_bits(size.to_bits().saturating_add(1));
    (f64::from(next) - f64::from(size)) / 4.0 + f64::from(f32::MIN_POSITIVE)
}

/// The variance of one f32 rounding of a value.
fn rounded(value: f64) -> f64 {
    (value * F32_UNIT).powi(2) / 3.0
}

/// What the floor finds in one chunk of a weight's rows.
struct Chunk {
    first: usize,
    truth: Vec<f32>,
    sigma: Vec<f32>,
    /// The mean squared correlation within each of the chunk's columns.
    columns: Vec<f32>,
    /// The sum of the squared correlations within each row, over `pairs` pairs.
    in_rows: Vec<f32>,
    pairs: usize,
    /// How many values are quiet, see [`Shared::quiet`].
    quiet: usize,
}

/// The sums over K of all rows of a chunk, which is met in stretches of rows.
struct OfChunk {
    /// Row-major, `[x rows, columns]`.
    dots: Vec<f64>,
    /// The same of each rank, where ranks share K.
    of_ranks: Vec<Vec<f64>>,
    /// Variances: of lifted rows, but for `from_x`.
    from_x: Vec<f64>,
    from_dx: Vec<f32>,
    /// Row-major, `[pairs, columns]`: what two rows of x make of the same dw, and of the same dx.
    of_dw: Vec<f32>,
    of_both: Option<Vec<f32>>,
    /// What each row of w was divided by.
    powers: Vec<f64>,
}

impl OfChunk {
    fn new(x_rows: usize, columns: usize, pairs: usize, repeated: bool) -> OfChunk {
        OfChunk {
            dots: vec![0.0; x_rows * columns],
            of_ranks: Vec::new(),
            from_x: vec![0.0; x_rows * columns],
            from_dx: vec![0.0; x_rows * columns],
            of_dw: vec![0.0; pairs * columns],
            of_both: repeated.then(|| vec![0.0; pairs * columns]),
            powers: Vec::with_capacity(columns),
        }
    }
}

/// Puts `[rows, count]` at a column of `[rows, columns]`.
pub(super) fn set_columns<T: Copy>(
    all: &mut [T],
    columns: usize,
    (first, count): (usize, usize),
    some: &[T],
) {
    for (all, some) in all.chunks_exact_mut(columns).zip(some.chunks_exact(count)) {
        all[first..first + count].copy_from_slice(some);
    }
}

thread_local! {
    /// What is made of a stretch of a weight's rows, whose memory serves the next one again.
    static SCRATCH: Cell<(Widened, WeightSquares)> = Cell::default();
}

/// Some pairs of `count` things, all of them where there are few.
fn pairs_of(count: usize, most: usize) -> Vec<(usize, usize)> {
    if count * count.saturating_sub(1) / 2 <= most {
        return (0..count).flat_map(|b| (0..b).map(move |a| (a, b))).collect();
    }
    let mut random = Random::at(count as u64);
    let pair = || {
        let a = random.below(count);
        (a, (a + 1 + random.below(count - 1)) % count)
    };
    std::iter::repeat_with(pair).take(most).collect()
}

/// Products of two rows of an activation, pair by pair.
struct RowPairs {
    /// `x_a x_b`.
    x: Vec<f32>,
    /// `dx_a dx_b` where both rows are the same, which are rounded alike; else zero.
    dx: Option<Vec<f32>>,
}

impl RowPairs {
    fn of(x: &Lifted, width: usize, pairs: &[(usize, usize)]) -> RowPairs {
        let dx_square = &x.error_squares;
        let row = |row: usize| &x.values[row * width..(row + 1) * width];
        let products = |&(a, b): &(usize, usize)| row(a).iter().zip(row(b)).map(|(a, b)| a * b);
        let same = |&(a, b): &(usize, usize)| x.powers[a] == x.powers[b] && row(a) == row(b);
        let squares = |pair: &(usize, usize)| {
            let squares = &dx_square[pair.0 * width..(pair.0 + 1) * width];
            let same = same(pair);
            squares.iter().map(move |&square| if same { square } else { 0.0 })
        };
        let repeated = pairs.iter().any(same);
        RowPairs {
            x: pairs.iter().flat_map(products).collect(),
            dx: repeated.then(|| pairs.iter().flat_map(squares).collect()),
        }
    }

    /// The covariances of each pair in each column of a weight's chunk, `[pairs, columns]`.
    fn covariances(
        &self,
        with_x: &[f32],
        with_dx: &[f32],
        width: usize,
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let dots = |x: &[f32], w: &[f32]| dots(x, w, width);
        (dots(&self.x, with_x), self.dx.as_ref().map(|dx| dots(dx, with_dx)))
    }
}

/// All dot products of the rows of two operands of positive values: `[x rows, w rows]`.
pub(super) fn positive_dots(x: &[f32], w: &[f32], width: usize) -> Vec<f32> {
    dots(x, w, width)
}

impl Ops for Floor {
    fn compute(&self, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        match *call {
            Call::Embed { weight, tokens } => self.embed(weight, tokens),
            Call::RmsNorm { x, gain, eps } => self.rms_norm(x, gain, eps),
            Call::LayerNorm { x, gain, bias, .. } => self.layer_norm(call, x, gain, bias),
            Call::Matmul { x, weight, bias } => self.matmul(x, weight, bias),
            Call::Rope { x, rope, head_dim, first_position } => {
                self.rope(x, rope, head_dim, first_position)
            }
            Call::Cached(cached) => {
                let y = call.on(&Reference)?;
                // What a code leaves of a value is known to the bit: it moves by that much.
                let read = cached.read_back();
                self.note_each(&y, |index, y| {
                    f64::from(read.data()[index] - y).abs() + quarter_place(y)
                });
                Ok(y)
            }
            Call::Attention { q, k, v, shape } => self.attention(q, k, v, shape),
            Call::Gated { gate, up, activation } => self.gated(gate, up, activation),
            Call::Activated { x, activation } => {
                self.gated(x, &Tensor::new(x.width(), vec![1.0; x.data().len()]), activation)
            }
            Call::Route { scores, bias, routing } => self.route(call, scores, bias, routing),
            Call::Experts(products) => self.experts(&products),
            Call::Mix { x, routes, used } => self.mix(call, x, routes, used),
            Call::SigmoidGate { gate, .. } => self.sigmoid_gate(call, gate),
            Call::Convolve(convolution) => self.convolve(&convolution),
            Call::Gates(gates) => {
                let y = gates.made()?;
                // The same values for every arm of the project.
                self.note_each(&y, |_, y| {
                    let size = f64::from(y);
                    (2.0 * self.passed(1.0) + self.foreign(64.0, 1.0)).sqrt()
                        + quarter_place(y)
                        + F32_UNIT * size
                });
                Ok(y)
            }
            Call::Delta(rule) => self.delta(&rule),
            Call::Add { a, b } => self.add(a, b),
            Call::Scale { x, factor, .. } => self.scale(x, factor),
            Call::SoftCap { x, cap } => self.soft_cap(x, cap),
        }
    }
}

impl Floor {
    fn embed(&self, weight: Weight<'_>, tokens: &[u32]) -> Result<Tensor, ComputeError> {
        check_tokens(&weight, tokens)?;
        let y = Reference.embed(weight, tokens)?;
        // A copy rounds nothing but to the stream's type.
        self.note_each(&y, |_, y| {
            let size = f64::from(y);
            (self.passed(size) + self.foreign(4.0, size)).sqrt()
        });
        Ok(y)
    }

    fn rms_norm(&self, x: &Tensor, gain: Weight<'_>, eps: f32) -> Result<Tensor, ComputeError> {
        check_gain(x, &gain)?;
        let y = Reference.rms_norm(x, gain, eps)?;
        // The kernel carries two f32 throughout and is within one place. A foreign one sums
        // the squares in f32, in the worst case in order: a random walk of K roundings of
        // partial sums, halved by the root, and some eight roundings beside. It may round
        // to the stream's type before the gain and after it.
        let sum = gain.width() as f64 / 36.0 + 8.0;
        self.note_each(&y, |_, y| {
            let size = f64::from(y);
            let variance = self.foreign(sum, size) + 2.0 * self.passed(size);
            variance.sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn layer_norm(
        &self,
        call: &Call<'_>,
        x: &Tensor,
        gain: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        let y = call.on(&Reference)?;
        let (_, bias) = gain_and_bias(x, gain, bias)?;
        // As an RMSNorm's. A foreign kernel's sum of squares is that of values less a mean which
        // it rounded; what the bias takes off was rounded at its own size.
        let sum = gain.width() as f64 / 36.0 + 8.0;
        let (width, means) = (gain.width(), means_by_spread(x, gain.width()));
        self.note_each(&y, |index, y| {
            let shift = f64::from(bias[index % bias.len()]).abs();
            let size = f64::from(y).abs() + shift;
            let of_mean = self.foreign(8.0, means[index / width]);
            let variance = self.foreign(sum, size) + 2.0 * self.passed(size) + of_mean;
            variance.sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn route(
        &self,
        call: &Call<'_>,
        scores: &Tensor,
        bias: Option<Weight<'_>>,
        routing: &Routing,
    ) -> Result<Tensor, ComputeError> {
        let y = call.on(&Reference)?;
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let mut sigma = Tensor::zeros(y.rows(), y.width());
        for row in 0..y.rows() {
            let values = scores.row(row);
            // Where the choice hangs on a rounding, a weight may as well be another expert's.
            let open = self.open_choices(values, bias.as_deref(), routing);
            for (expert, sigma) in sigma.row_mut(row).iter_mut().enumerate() {
                let size = f64::from(y.row(row)[expert]);
                // An exponential, within two places, and the difference that it is taken of; the
                // sum of as many, a quotient, the factor, and the reference.
                let argument = f64::from(values[expert]).abs();
                let exponential = (4.0 * F32_UNIT * size).powi(2) + rounded(size * argument);
                let adding = scores.width() as f64 / 4.0 + 6.0;
                let engine = 3.0 * self.passed(size) + self.foreign(adding, size);
                let variance = exponential + adding * rounded(size) + engine;
                let mut deviation = variance.sqrt() + f64::from(f32::MIN_POSITIVE);
                if open.contains(&expert) {
                    deviation += routing.factor;
                }
                *sigma = deviation as f32;
            }
        }
        self.note(sigma);
        Ok(y)
    }

    /// The experts whose choice hangs on a rounding: those that another one replaces where each
    /// score is moved by some places.
    fn open_choices(&self, scores: &[f32], bias: Option<&[f32]>, routing: &Routing) -> Vec<usize> {
        // The project's kernels compare scores themselves, which rounds nothing.
        if !experts::by_sigmoid(routing) && self.recipe.stream.is_none() {
            return Vec::new();
        }
        let (taken, _) = routed(scores, bias, routing);
        let step = match self.recipe.stream {
            Some(stream) => 2.0 * 0.5f64.powi(stream.fraction_bits() as i32),
            None => 16.0 * F32_UNIT,
        };
        let mut open = Vec::new();
        for expert in 0..scores.len() {
            let sign = if taken.contains(&expert) { -1.0 } else { 1.0 };
            let mut moved = scores.to_vec();
            let value = f64::from(scores[expert]);
            let size = if value.abs() > 1.0 { value.abs() } else { 1.0 };
            moved[expert] = (value + sign * step * size) as f32;
            let (others, _) = routed(&moved, bias, routing);
            if others != taken {
                let only = |a: &[usize], b: &[usize]| -> Vec<usize> {
                    a.iter().filter(|expert| !b.contains(expert)).copied().collect()
                };
                open.extend(only(&others, &taken));
                open.extend(only(&taken, &others));
            }
        }
        open
    }

    fn experts(&self, products: &Products<'_>) -> Result<Tensor, ComputeError> {
        let used = products.used;
        let mut all: Vec<Shared> = Vec::new();
        let [y, sigma] = products.by_expert(|x, weight, bias| {
            let y = self.matmul(x, weight, bias)?;
            let mut sigmas = self.sigmas.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let Some(Deviations { each, shared }) = sigmas.pop() else {
                return Err(ComputeError::NotRecorded(weight.name().to_owned()));
            };
            all.extend(shared);
            Ok([y, each])
        })?;
        // A column holds values of several experts, whose roundings have nothing in common: the
        // largest correlation within one of them bounds what the column has. A row's parts are
        // such too; what is known of one expert's rows is taken for all.
        let outputs = (y.width() / used.max(1)).max(1);
        let most = |values: &mut dyn Iterator<Item = f32>| {
            values.fold(0.0f32, |most, value| if value > most { value } else { most })
        };
        let columns = (0..y.width()).map(|column| {
            most(&mut all.iter().filter_map(|s| s.columns.get(column % outputs)).copied())
        });
        let in_rows = most(&mut all.iter().flat_map(|shared| shared.rows.iter()).copied());
        let quiet = all.iter().fold(0.0, |most, of| if of.quiet > most { of.quiet } else { most });
        let shared = Shared { rows: vec![in_rows; y.rows()], columns: columns.collect(), quiet };
        self.note_shared(sigma, Some(shared));
        Ok(y)
    }

    fn mix(
        &self,
        call: &Call<'_>,
        x: &Tensor,
        routes: &Tensor,
        used: usize,
    ) -> Result<Tensor, ComputeError> {
        let y = call.on(&Reference)?;
        let taken = experts::taken(routes, used);
        let outputs = y.width();
        self.note_each(&y, |index, y| {
            let (row, column) = (index / outputs, index % outputs);
            let (mut sum, mut variance) = (0.0f64, 0.0);
            for (place, expert) in taken[row * used..(row + 1) * used].iter().enumerate() {
                let value = x.row(row)[place * outputs + column];
                let term = f64::from(routes.row(row)[*expert]) * f64::from(value);
                sum += term;
                variance += rounded(sum) + 2.0 * self.passed(term) + self.foreign(2.0, term);
                variance += self.passed(sum);
            }
            variance.sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn sigmoid_gate(&self, call: &Call<'_>, gate: &Tensor) -> Result<Tensor, ComputeError> {
        let y = call.on(&Reference)?;
        let width = y.width() / gate.width().max(1);
        self.note_each(&y, |index, y| {
            let power = libm::exp(-f64::from(gate.data()[index / width.max(1)]));
            let share = if power.is_finite() { power / (1.0 + power) } else { 1.0 };
            let size = f64::from(y);
            let exponential = (2.0 * F32_UNIT * share * size).powi(2);
            let engine = 2.0 * self.passed(size) + self.foreign(8.0, size);
            (exponential + 3.0 * rounded(size) + engine).sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn convolve(&self, convolution: &Convolution<'_>) -> Result<Tensor, ComputeError> {
        let y = convolution.exact()?;
        let taps = convolution.checked()?;
        let (count, channels) = (convolution.weight.width(), y.width());
        self.note_each(&y, |index, y| {
            let (row, channel) = (convolution.first + index / channels, index % channels);
            let (mut sum, mut before) = (0.0f64, 0.0);
            for (tap, &weight) in taps[channel * count..][..count].iter().enumerate() {
                if let Some(row) = (row + tap + 1).checked_sub(count) {
                    sum += f64::from(weight) * f64::from(convolution.x.row(row)[channel]);
                    before += rounded(sum) + self.foreign(2.0, sum);
                }
            }
            before += self.passed(sum);
            // SiLU's slope is at most 1.1; its exponential is within two places.
            let size = f64::from(y);
            let own = (4.0 * F32_UNIT * size).powi(2) + 4.0 * rounded(size) + self.passed(size);
            let argument = rounded(sum) * size * size;
            (1.21 * before + own + argument).sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn delta(&self, rule: &DeltaRule<'_>) -> Result<Tensor, ComputeError> {
        let (y, deviations) = rule.exact()?;
        // Roundings of one query or key are shared by all columns, and a token's by all later ones:
        // twice the deviation of independent ones. A foreign engine computes in chunks of
        // positions, in an order of its own, and passes values of the stream's type.
        let foreign = if self.recipe.stream.is_some() { 8.0 } else { 2.0 };
        let largest =
            y.data().iter().fold(0.0f32, |most, y| if y.abs() > most { y.abs() } else { most });
        self.note_each(&y, |index, y| {
            let own = foreign * f64::from(deviations.data()[index]);
            let passed =
                (2.0 * self.passed(f64::from(y)) + self.foreign(8.0, f64::from(largest))).sqrt();
            own + passed + quarter_place(y)
        });
        Ok(y)
    }

    fn matmul(
        &self,
        x: &Tensor,
        weight: Weight<'_>,
        bias: Option<Weight<'_>>,
    ) -> Result<Tensor, ComputeError> {
        check_matmul(x, &weight, bias.as_ref())?;
        if let Some(floor) = self.of_weight(&weight)? {
            let truth = floor.matmul(x, weight, bias)?;
            let mut sigmas = self.sigmas.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            sigmas.extend(floor.into_sigmas());
            return Ok(truth);
        }
        let bias = bias.map(|bias| bias.to_vec()).transpose()?;
        let width = x.width();
        let dealt = parallel::parts(&self.recipe, &weight)?;
        let lifted = match &dealt {
            None => {
                let (codes, scales) = self.emulated.converted_activation(x, weight)?;
                let rows = Rows::all(x.data(), &codes, &scales);
                Lifted::of(rows)
            }
            Some(parts) => {
                let convert = |x: &Tensor| self.emulated.quantise_activation(x);
                Lifted::with_errors(x.data(), &errors_by_part(x, parts, convert), width)
            }
        };
        let of_ranks = dealt.map(|parts| Ranks::of(x, parts));
        let (x_square, dx_square) = (&lifted.squares, &lifted.error_squares);
        let x_wide = Widened::of(x.data(), width);
        let (of_terms, of_sum) = self.accumulation(of_ranks.as_ref().map_or(width, Ranks::inner));
        let pairs = pairs_of(x.rows(), ROW_PAIRS);
        let products = RowPairs::of(&lifted, width, &pairs);
        let of_x = &lifted.powers;
        let chunks =
            self.emulated.by_converted_chunk(weight, |first, rows, before, converted| {
                let (codes, scales) = converted;
                let count = rows.len() / width;
                let mut all = OfChunk::new(x.rows(), count, pairs.len(), products.dx.is_some());
                for part in Rows::all(rows, codes, scales).after(before).stretches() {
                    let (mut wide, mut squares) = SCRATCH.take();
                    wide.refill(part.values, width);
                    squares.refill(part, of_terms as f32);
                    let place = (part.first, part.count());
                    set_columns(&mut all.dots, count, place, &dot_rows(&x_wide, &wide));
                    let chains = match &of_ranks {
                        None => self.chains(x.data(), part.values, width),
                        Some(ranks) => {
                            let (dots, chains) = ranks.meet(self, part.values, width);
                            all.of_ranks.resize(dots.len(), vec![0.0; x.rows() * count]);
                            for (all, dots) in all.of_ranks.iter_mut().zip(&dots) {
                                set_columns(all, count, place, dots);
                            }
                            chains
                        }
                    };
                    let from_x = match chains {
                        Some(chains) => chains,
                        None => {
                            let lifted = positive_dots(x_square, &squares.with_x, width);
                            let lowered = |(at, of): (usize, f32)| {
                                let powers = of_x[at / place.1] * squares.powers[at % place.1];
                                f64::from(of) * powers.powi(2)
                            };
                            lifted.into_iter().enumerate().map(lowered).collect()
                        }
                    };
                    set_columns(&mut all.from_x, count, place, &from_x);
                    let from_dx = positive_dots(dx_square, &squares.with_dx, width);
                    set_columns(&mut all.from_dx, count, place, &from_dx);
                    let (of_dw, of_both) =
                        products.covariances(&squares.with_x, &squares.with_dx, width);
                    set_columns(&mut all.of_dw, count, place, &of_dw);
                    if let Some((all, some)) = all.of_both.as_mut().zip(of_both) {
                        set_columns(all, count, place, &some);
                    }
                    all.powers.extend_from_slice(&squares.powers);
                    SCRATCH.set((wide, squares));
                }
                let OfChunk { dots, of_ranks, from_x, from_dx, of_dw, of_both, powers: of_w } = all;
                // Variances of lifted rows, as they are.
                let lowered = |variance: f32, row: usize, column: usize| {
                    f64::from(variance) * (of_x[row] * of_w[column]).powi(2)
                };
                let mut quiet = 0;
                let mut truth = Vec::with_capacity(dots.len());
                let mut sigma = Vec::with_capacity(dots.len());
                for (index, &dot) in dots.iter().enumerate() {
                    let of_dx = lowered(from_dx[index], index / count, index % count);
                    let parts: Vec<f64> = of_ranks.iter().map(|dots| dots[index]).collect();
                    let cut = match parts.as_slice() {
                        [] => dot * dot,
                        parts => parts.iter().map(|dot| dot * dot).sum(),
                    };
                    let inner = from_x[index] + of_dx + of_sum * cut;
                    let size = if dot.abs() > inner.sqrt() { dot.abs() } else { inner.sqrt() };
                    let bias = bias.as_ref().map(|bias| f64::from(bias[first + index % count]));
                    let whole = dot + bias.unwrap_or(0.0);
                    // The reference rounds to f32, and so does the sum with a bias.
                    let ends = if bias.is_some() { 2.0 } else { 1.0 };
                    // Zero is rounded to itself.
                    let output = match parts.as_slice() {
                        [] => self.output(size),
                        parts => self.of_sums(parts, inner, bias),
                    };
                    let before = if size > 0.0 { inner + output } else { 0.0 };
                    let mut variance = before + ends * rounding(Format::F32, whole.abs());
                    // The product may be rounded to the stream's type before its bias is added.
                    variance += self.passed(whole);
                    if bias.is_some_and(|bias| bias != 0.0) {
                        variance += self.passed(dot);
                    }
                    quiet += usize::from(before < QUIET * variance);
                    truth.push(whole as f32);
                    sigma.push(variance.sqrt() as f32);
                }
                let correlation = |covariance: f64, a: usize, b: usize| {
                    let size = f64::from(sigma[a]) * f64::from(sigma[b]);
                    if size > 0.0 { (covariance / size).powi(2) as f32 } else { 0.0 }
                };
                // Within a column: what two rows make of the same dw, and of the same dx.
                let mut columns = vec![0.0; count];
                for (pair, &(a, b)) in pairs.iter().enumerate() {
                    for (column, sum) in columns.iter_mut().enumerate() {
                        let at = pair * count + column;
                        let lifted =
                            f64::from(of_dw[at]) + of_both.as_ref().map_or(0.0, |d| d[at].into());
                        let shared = lifted * of_x[a] * of_x[b] * of_w[column].powi(2);
                        let (a, b) = (a * count + column, b * count + column);
                        *sum += correlation(shared + of_sum * dots[a] * dots[b], a, b)
                            / pairs.len() as f32;
                    }
                }
                // Within a row: what two columns make of the same dx.
                let neighbours = pairs_of(count, COLUMN_PAIRS);
                let lifted = |number: usize| {
                    let row = &rows[number * width..(number + 1) * width];
                    let inverse = 1.0 / of_w[number];
                    row.iter().map(move |&value| (f64::from(value) * inverse) as f32)
                };
                let weights: Vec<f32> = neighbours
                    .iter()
                    .flat_map(|&(a, b)| lifted(a).zip(lifted(b)).map(|(a, b)| a * b))
                    .collect();
                let of_dx = positive_dots(dx_square, &weights, width);
                let mut in_rows = vec![0.0; x.rows()];
                for (token, sum) in in_rows.iter_mut().enumerate() {
                    for (pair, &(a, b)) in neighbours.iter().enumerate() {
                        let lifted = f64::from(of_dx[token * neighbours.len() + pair]);
                        let shared = lifted * of_x[token].powi(2) * of_w[a] * of_w[b];
                        let (a, b) = (token * count + a, token * count + b);
                        *sum += correlation(shared + of_sum * dots[a] * dots[b], a, b);
                    }
                }
                let pairs = neighbours.len();
                Ok(Chunk { first, truth, sigma, columns, in_rows, pairs, quiet })
            })?;
        let mut truth = Tensor::zeros(x.rows(), weight.rows());
        let mut sigma = Tensor::zeros(x.rows(), weight.rows());
        let quiet: usize = chunks.iter().map(|chunk| chunk.quiet).sum();
        let quiet = quiet as f64 / (x.rows() * weight.rows()).max(1) as f64;
        let mut shared = Shared { rows: vec![0.0; x.rows()], columns: Vec::new(), quiet };
        let pairs: usize = chunks.iter().map(|chunk| chunk.pairs).sum();
        for chunk in chunks {
            let count = chunk.columns.len();
            truth.set_columns(chunk.first, &Tensor::new(count, chunk.truth));
            sigma.set_columns(chunk.first, &Tensor::new(count, chunk.sigma));
            shared.columns.extend(chunk.columns);
            let sums = shared.rows.iter_mut().zip(chunk.in_rows);
            sums.for_each(|(row, sum)| *row += sum / pairs.max(1) as f32);
        }
        self.note_shared(sigma, Some(shared));
        Ok(truth)
    }

    fn rope(
        &self,
        x: &Tensor,
        geometry: &Rope,
        head_dim: usize,
        first_position: usize,
    ) -> Result<Tensor, ComputeError> {
        let rope_kernels = self.recipe.engine.map(|engine| engine.rope);
        let casts =
            rope_kernels.is_some_and(|rope| rope.all().any(|k| k == RopeKernel::Transformers));
        let y = Reference.rope(x, geometry, head_dim, first_position)?;
        let mut sigma = Tensor::zeros(x.rows(), x.width());
        for row in 0..x.rows() {
            let angles = rope::angles(geometry, first_position + row);
            let heads = sigma.row_mut(row).chunks_exact_mut(head_dim);
            let heads = heads.zip(x.row(row).chunks_exact(head_dim));
            for ((sigma, x), y) in heads.zip(y.row(row).chunks_exact(head_dim)) {
                for (pair, &(sin, cos)) in angles.iter().enumerate() {
                    let (first, second) = rope::pair(geometry, head_dim, pair);
                    let (a, b) = (f64::from(x[first]), f64::from(x[second]));
                    // A foreign engine computes the angle in f32, a frequency times a
                    // position, and may round table, products and sum to the stream's type.
                    let angle = rope::angle(geometry, pair, first_position + row);
                    // A model that is cast as a whole has its frequencies cast too.
                    let of_cast = |angle: f64| if casts { self.passed(angle) } else { 0.0 };
                    let of_engine = |fused: f64, product: f64, y: f64| {
                        let turned = self.foreign(4.0, angle * a.hypot(b))
                            + of_cast(angle) * (a * a + b * b);
                        turned + 2.0 * (self.passed(fused) + self.passed(product)) + self.passed(y)
                    };
                    // The table's entries round, the second product does, the sum does,
                    // and so does the reference.
                    let of = |fused: f64, product: f64, y: f32| {
                        let y = f64::from(y);
                        let variance = rounded(fused) + 2.0 * rounded(product) + 2.0 * rounded(y);
                        let variance = variance + of_engine(fused, product, y);
                        (variance.sqrt() + f64::from(f32::MIN_POSITIVE)) as f32
                    };
                    sigma[first] = of(a * cos, b * sin, y[first]);
                    sigma[second] = of(a * sin, b * cos, y[second]);
                }
            }
        }
        self.note(sigma);
        Ok(y)
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape<'_>,
    ) -> Result<Tensor, ComputeError> {
        let y = Reference.attention(q, k, v, shape)?;
        let AttentionShape { heads, kv_heads, head_dim, value_dim, .. } = shape;
        let mut sigma = Tensor::zeros(y.rows(), y.width());
        sigma.data_mut().par_chunks_exact_mut(value_dim).enumerate().try_for_each(
            |(index, sigma)| {
                check_interrupt()?;
                let (row, head) = (index / heads, index % heads);
                let kv_head = head / (heads / kv_heads);
                let group = kv_head * head_dim..(kv_head + 1) * head_dim;
                let of_values = kv_head * value_dim..(kv_head + 1) * value_dim;
                let query = &q.row(row)[head * head_dim..(head + 1) * head_dim];
                let out = &y.row(row)[head * value_dim..(head + 1) * value_dim];
                let seen = shape.seen(row);
                let keys = seen.clone().map(|position| &k.row(position)[group.clone()]);
                let values: Vec<&[f32]> =
                    seen.map(|position| &v.row(position)[of_values.clone()]).collect();
                let (stream, sink) = (self.recipe.stream, shape.sink(head));
                let spread = attention_spread(&shape, query, keys, &values, out, (stream, sink));
                for (sigma, spread) in sigma.iter_mut().zip(spread) {
                    *sigma = (spread.sqrt() + f64::from(f32::MIN_POSITIVE)) as f32;
                }
                Ok::<(), ComputeError>(())
            },
        )?;
        self.note(sigma);
        Ok(y)
    }

    fn gated(
        &self,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<Tensor, ComputeError> {
        let y = Reference.gated(gate, up, activation)?;
        self.note_each(&y, |index, y| {
            let gate = f64::from(gate.data()[index]);
            let of_gate = match activation {
                Activation::ClampedSwiglu if gate > CLAMP => CLAMP,
                _ => gate,
            };
            let argument = sigmoid_argument(activation, of_gate);
            let power = libm::exp(-argument);
            // The exponential is within two places, and weighs as its share of 1 + e^-g;
            // then a sum, a quotient and two products round, and so does the reference.
            let share = if power.is_finite() { power / (1.0 + power) } else { 1.0 };
            let mut exponential = (2.0 * F32_UNIT * share).powi(2);
            let size = f64::from(y);
            // A foreign engine may round the activation and the product to the stream's type.
            let mut engine = self.foreign(8.0, size) + 2.0 * self.passed(size);
            let of_up = f64::from(up.data()[index]);
            engine += self.passed_below_normal(activated(activation, of_gate)) * of_up * of_up;
            if activation == Activation::ClampedSwiglu {
                // A product and its coefficient before the exponential, and one is added to the
                // other value.
                exponential += share * share * 3.0 * rounded(argument);
                let up = f64::from(up.data()[index]).clamp(-CLAMP, CLAMP);
                engine += rounded(activated(activation, gate.min(CLAMP)) * (up.abs() + 1.0));
                engine += 3.0 * self.passed(size);
            }
            if activation == Activation::GeluTanh {
                // Three roundings and a coefficient lie before the exponential. A foreign engine
                // computes `1 + tanh`, whose small values keep the roundings of 1.
                exponential += share * share * 4.0 * rounded(argument);
                engine += self.foreign(8.0, 0.5 * gate * f64::from(up.data()[index]));
            }
            // Beyond f32's largest number the exponential is infinite, and the quotient 0: all that
            // is left of the value is lost.
            let lost = if power > 0.999 * f64::from(f32::MAX) { size * size } else { 0.0 };
            let own = size * size * exponential + 5.0 * rounded(size) + lost;
            (own + engine).sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, ComputeError> {
        let y = Reference.add(a, b)?;
        // One correctly rounded sum, the same as the reference's or its neighbour. A foreign
        // engine may have scaled a term, or added a third one, before.
        self.note_each(&y, |_, y| {
            let size = f64::from(y);
            (self.passed(size) + self.foreign(4.0, size)).sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn scale(&self, x: &Tensor, factor: f64) -> Result<Tensor, ComputeError> {
        let y = Reference.scale(x, factor)?;
        // The factor is an f32, the same for every value, and the product rounds once. A
        // foreign engine may hold the factor in the stream's type.
        let of_factor = f64::from(factor as f32) / factor - 1.0;
        self.note_each(&y, |_, y| {
            let size = f64::from(y);
            let engine = 2.0 * self.passed(size) + self.foreign(2.0, size);
            ((size * of_factor).powi(2) + engine).sqrt() + quarter_place(y)
        });
        Ok(y)
    }

    fn soft_cap(&self, x: &Tensor, cap: f64) -> Result<Tensor, ComputeError> {
        let y = Reference.soft_cap(x, cap)?;
        // A quotient, the tangent, within two places, a product, and the reference.
        self.note_each(&y, |index, y| {
            let size = f64::from(y);
            let tangent = (2.0 * F32_UNIT * size).powi(2);
            let mut engine = 3.0 * self.passed(size) + self.foreign(8.0, size);
            // The quotient and its tangent, which are as small.
            let quotient = f64::from(x.data()[index]) / cap;
            engine += 2.0 * self.passed_below_normal(quotient) * cap * cap;
            (tangent + 4.0 * rounded(size) + engine).sqrt() + quarter_place(y)
        });
        Ok(y)
    }
}

/// The mean of each group of `width` values, over the root of their variance.
fn means_by_spread(x: &Tensor, width: usize) -> Vec<f64> {
    let of = |group: &[f32]| {
        let count = group.len() as f64;
        let mean = group.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let spread = group.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        if spread > 0.0 { mean / spread.sqrt() } else { 0.0 }
    };
    x.data().chunks_exact(width.max(1)).map(of).collect()
}

/// The variance of each value of one attention head's output.
///
/// A score's error has the variance of its rounded partial sums ([`rounded_score`]). The
/// exponential adds two places, and the difference that it is taken of one rounding. A
/// relative error of weight j moves the output by `p_j (v_j - out)`. The score's factor
/// `1 / sqrt(d)` is an f32 too, off by a share that is the same for every score s: what it
/// moves is `sum_j p_j (v_j - out) s_j` times that share, and grows with the scores. The
/// chain over the values rounds each partial sum, the total, the quotient and the
/// reference once each. `stream` is the type to which a foreign engine may round between
/// its steps; it sums a score in an order of its own, which `2 A^2 u^2 / 3` covers with
/// `A = sum |q k|`.
///
/// Where scores are bent to `c tanh(s / c)`, what moved s moves that by the slope
/// `1 - tanh(s / c)^2`, and a quotient, the tangent and a product round beside.
fn attention_spread<'k>(
    shape: &AttentionShape<'_>,
    query: &[f32],
    keys: impl Iterator<Item = &'k [f32]>,
    values: &[&[f32]],
    out: &[f32],
    (stream, sink): (Option<Format>, Option<f32>),
) -> Vec<f64> {
    /// A score, what moves it, and what its factor's rounding moves.
    struct Score {
        value: f64,
        variance: f64,
        of_scale: f64,
    }
    let scale = shape.exact_scale();
    let of_scale = f64::from(shape.f32_scale()) / scale - 1.0;
    let scores: Vec<Score> = keys
        .map(|key| {
            let (sum, mut variance) = rounded_score(query, key);
            if stream.is_some() {
                let size =
                    query.iter().zip(key).map(|(&q, &k)| (f64::from(q) * f64::from(k)).abs());
                variance += 2.0 * rounded(size.sum());
            }
            let (value, variance) = (sum * scale, variance * scale * scale);
            let plain = Score { value, variance, of_scale: value * of_scale };
            let Some(cap) = shape.cap else { return plain };
            let tangent = libm::tanh(value / cap);
            let (bent, slope) = (cap * tangent, 1.0 - tangent * tangent);
            let of_stream = stream.map_or(0.0, |stream| 2.0 * rounding(stream, bent.abs()));
            let own = (2.0 * F32_UNIT * bent).powi(2) + 3.0 * rounded(bent) + of_stream;
            let before = variance + rounded(value);
            let variance = before * slope * slope + own;
            Score { value: bent, variance, of_scale: plain.of_scale * slope }
        })
        .collect();
    let sink = sink.map(f64::from);
    let least = sink.unwrap_or(f64::NEG_INFINITY);
    let largest = scores.iter().fold(least, |most, s| if s.value > most { s.value } else { most });
    let mut weights: Vec<f64> = scores.iter().map(|score| score.value - largest).collect();
    exponentials(&mut weights);
    let of_sink = sink.map_or(0.0, |sink| libm::exp(sink - largest));
    let total: f64 = weights.iter().sum::<f64>() + of_sink;
    let mut spread = vec![0.0; out.len()];
    let mut partial = vec![0.0; out.len()];
    let mut together = vec![0.0; out.len()];
    for ((score, weight), value) in scores.iter().zip(&weights).zip(values) {
        let Score { value: score, variance, of_scale } = *score;
        let share = weight / total;
        let of_score = variance + rounded(score) + rounded(score - largest);
        let relative = of_score + (2.0 * F32_UNIT).powi(2);
        // A foreign engine may round a score before and after its scale, and the weight.
        let relative = match stream {
            Some(stream) => {
                let of_score = 2.0 * rounding(stream, score.abs()) + rounding(stream, 1.0);
                relative + of_score + (8.0 * F32_UNIT).powi(2)
            }
            None => relative,
        };
        for (index, &value) in value.iter().enumerate() {
            let value = f64::from(value);
            partial[index] += share * value;
            let moved = share * (value - f64::from(out[index]));
            spread[index] += moved * moved * relative + rounded(partial[index]);
            together[index] += moved * of_scale;
        }
    }
    if let Some(sink) = sink {
        // Its weight moves every value towards zero.
        let of_stream = stream.map_or(0.0, |stream| 2.0 * rounding(stream, sink.abs()));
        let relative = rounded(sink - largest) + (2.0 * F32_UNIT).powi(2) + of_stream;
        for (spread, &out) in spread.iter_mut().zip(out) {
            *spread += (of_sink / total * f64::from(out)).powi(2) * relative;
        }
    }
    let chain = (values.len() as f64 / 32.0).ceil() + 8.0;
    for ((spread, &out), together) in spread.iter_mut().zip(out).zip(together) {
        *spread += chain * rounded(f64::from(out)) + together * together;
        if let Some(stream) = stream {
            *spread += rounding(stream, f64::from(out).abs());
        }
    }
    spread
}

/// A warp's dot product, and the variance of its rounded partial sums: 32 lanes of chains
/// of fused multiply-adds, then a tree. One large product among small ones is rounded at
/// its own size on every level of the tree.
fn rounded_score(query: &[f32], key: &[f32]) -> (f64, f64) {
    let mut lanes = [0.0f64; WARP_LANES];
    let mut variance = 0.0;
    for (query, key) in query.chunks(WARP_LANES).zip(key.chunks(WARP_LANES)) {
        for ((&q, &k), lane) in query.iter().zip(key).zip(&mut lanes) {
            *lane += f64::from(q) * f64::from(k);
            variance += rounded(*lane);
        }
    }
    let mut half = WARP_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
            variance += rounded(lanes[lane]);
        }
        half /= 2;
    }
    (lanes[0], variance)
}
