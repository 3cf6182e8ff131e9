//! A whole GEMM as a chip computes it: `y[N, M] = x[N, K] * w[M, K]^T`.
//!
//! It knows scales, schedules and how to share the work out; one instruction's
//! arithmetic is `tensor_core.rs`. The result does not depend on the number of
//! threads: every output is computed by one of them, in the schedule's order.
//!
//! Block scales follow the DeepSeek scheme (arXiv 2412.19437, section 3.3.2):
//! each 128 elements of K accumulate from zero in the tensor core, and then
//! `main = main + (scale_x * scale_w) * partial`, the products and the sum each
//! rounded to f32. They fix the order of additions; of a schedule, nothing else
//! applies then.

use std::ops::Range;

use rayon::prelude::*;

use super::chip::{BlockScaled, Unit};
use super::grouped;
use super::matrix_core;
use super::quantize::{BlockScales, Codes, CodesRow};
use super::schedule::{Epilogue, Schedule, Step, Then};
use super::simd::{self, Kernel, Layout, Words};
use super::tensor_core::{self, ScaledRow};
use crate::block_format::BlockFormat;
use crate::dtype::{Format, Parts};
use crate::tensor::Tensor;

/// One operand: its codes and what they are to be multiplied with.
#[derive(Clone, Debug)]
pub struct Operand<'a> {
    /// Codes, `[rows, K]`.
    pub codes: &'a Codes,
    /// Scales of the rows, or of blocks of them.
    pub scales: Scales,
}

/// What an operand's codes are to be multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// One scale for the whole operand.
    Tensor(f32),
    /// One scale per row: per token or per output channel.
    Row(Vec<f32>),
    /// One scale per 128 elements of K of `rows_per_block` rows.
    Block128 {
        /// Rows that share a scale: 1 for an activation, 128 for a weight.
        rows_per_block: usize,
        /// The operand's first row, counted within the matrix that the scales
        /// are of: for a weight that is multiplied in chunks of rows.
        first_row: usize,
        /// Row-major `[blocks of rows, ceil(K / 128)]`, from the matrix's first block on.
        scales: Vec<f32>,
    },
    /// The scales of a block-scaled format, which the unit itself applies, and one of the whole operand.
    Blocks(BlockScales),
}

/// A GEMM that cannot be computed.
#[derive(Debug, thiserror::Error)]
pub enum GemmError {
    /// The operands do not have one K.
    #[error("x has rows of {x} elements and w rows of {w}: a product needs one K")]
    Inner {
        /// K of x.
        x: usize,
        /// K of w.
        w: usize,
    },
    /// An operand without an element.
    #[error("the product of [{n}, {k}] and [{m}, {k}] has no element to compute")]
    Empty {
        /// Rows of x.
        n: usize,
        /// Rows of w.
        m: usize,
        /// K.
        k: usize,
    },
    /// The unit does not multiply these formats.
    #[error("this unit does not multiply {x} by {w}")]
    Formats {
        /// Format of x.
        x: Format,
        /// Format of w.
        w: Format,
    },
    /// There are fewer or more scales than the operand needs.
    #[error("{operand} needs {expected} scales and has {given}")]
    ScaleCount {
        /// `x` or `w`.
        operand: &'static str,
        /// Scales that the operand needs.
        expected: usize,
        /// Scales that it has.
        given: usize,
    },
    /// A scale that is zero, negative or not finite.
    #[error("scale {index} of {operand} is {scale}; a scale is a positive finite number")]
    Scale {
        /// `x` or `w`.
        operand: &'static str,
        /// Which one.
        index: usize,
        /// Its value.
        scale: f32,
    },
    /// Of a block-scaled operand a row does not hold whole blocks.
    #[error(
        "{operand} has rows of {width} elements, and {format} has a scale for each {block}; rows hold \
         whole blocks"
    )]
    PartBlock {
        /// `x` or `w`.
        operand: &'static str,
        /// Elements of a row.
        width: usize,
        /// The format.
        format: BlockFormat,
        /// Elements of a block.
        block: usize,
    },
    /// A unit for block-scaled operands was given others, or the reverse.
    #[error(
        "this unit multiplies {unit}, and {operand} has {given}; both operands have scales of one kind"
    )]
    BlockScales {
        /// `x` or `w`.
        operand: &'static str,
        /// What the unit multiplies.
        unit: &'static str,
        /// What the operand's scales are.
        given: String,
    },
    /// Observed outputs of another shape than the product's.
    #[error("the observed outputs are [{rows}, {width}], the product is [{n}, {m}]")]
    Observed {
        /// Rows of the observed outputs.
        rows: usize,
        /// Width of the observed outputs.
        width: usize,
        /// Rows of x.
        n: usize,
        /// Rows of w.
        m: usize,
    },
    /// A sum of products of integers that may leave 32 bits.
    #[error(
        "a sum of {inner} products of 8-bit integers may not fit in 32 bits, where one kernel wraps and \
         another saturates; K is at most {MOST_INTEGERS}"
    )]
    TooLong {
        /// Products of one sum.
        inner: usize,
    },
    /// Block-scaled products with promoted accumulation.
    #[error("block-scaled products are not promoted: their accumulator carries all along K")]
    Promoted,
    /// The output cannot be written in that format.
    #[error("a GEMM writes f32, bf16 or f16, not {0}")]
    Output(Format),
    /// The promotion interval or the split-K tile cuts a block of products.
    #[error(
        "{what} of {elements} elements does not hold whole blocks of {products} products; \
         choose a multiple"
    )]
    CutBlock {
        /// What cuts.
        what: &'static str,
        /// Its length along K.
        elements: usize,
        /// Products per block of the unit.
        products: usize,
    },
}

/// An operand decoded for a unit, to be multiplied many times.
#[derive(Clone, Debug)]
pub struct PreparedOperand {
    unit: Unit,
    kernel: Kernel,
    layout: Option<Layout>,
    codes: Codes,
    scales: Scales,
    /// Rows in vector order.
    rows: Vec<Words>,
    /// Rows in the order of grouped products, where the unit has such.
    grouped: Vec<grouped::Rows>,
    /// Rows with a NaN or an infinity: those are computed by plain code.
    special: Vec<bool>,
}

/// Elements of K whose products fit in 32 bits, whatever 8-bit integers they are of: 2^17 times 2^14
/// is one too many.
pub const MOST_INTEGERS: usize = (1 << 17) - 1;

/// Rows of x that one task multiplies at most: enough to pay for putting its
/// rows of w into vector order, few enough for the second-level cache.
const MOST_ROWS: usize = 256;
/// Rows of x that one task multiplies at least, if there are as many.
const LEAST_ROWS: usize = 16;
/// Panels of rows of w that one task multiplies at most: x comes from the
/// second-level cache for all but the first.
const MOST_PANELS: usize = 4;
/// Tasks for each thread, so that none waits long for the last.
const TASKS_PER_THREAD: usize = 4;
/// Elements of K that are in vector order at a time: few enough for the
/// first-level cache.
const STRETCH: usize = 256;
/// Elements of K that share a block scale.
const SCALE_BLOCK: usize = 128;
/// Rows of w that one task multiplies where there are no vectors.
const PLAIN_PANEL: usize = 8;

/// Decodes an operand once, for [`gemm_prepared`].
///
/// # Errors
/// If its scales are not positive finite numbers, one for each row or block.
pub fn prepare(unit: &Unit, operand: &Operand) -> Result<PreparedOperand, GemmError> {
    prepare_for(Kernel::best(), unit, operand)
}

/// [`prepare`] for a chosen instruction set; the bits are the same with each.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_for(
    kernel: Kernel,
    unit: &Unit,
    operand: &Operand,
) -> Result<PreparedOperand, GemmError> {
    let codes = operand.codes;
    check_scales("x", codes, &operand.scales)?;
    check_kind("x", unit, codes, &operand.scales)?;
    let layout = Layout::of(unit, kernel, codes.format());
    let (rows, special) = (0..codes.rows())
        .into_par_iter()
        .map(|row| {
            let mut words = Words::default();
            if *unit == Unit::Integers {
                simd::pack_integers_of_x(kernel, codes.row(row), &mut words);
            } else if let Some(layout) = layout {
                let raised = raised_by(unit, &operand.scales, row);
                simd::pack_x(layout, codes.format(), codes.row(row), &raised, &mut words);
            }
            (words, is_special(codes, row) || has_no_scale(&operand.scales, row))
        })
        .unzip();
    let grouped = match (grouped_unit(unit, kernel), &operand.scales) {
        (Some(_), Scales::Blocks(scales)) => (0..codes.rows())
            .into_par_iter()
            .map(|row| {
                let of_row = [(codes.row(row), row)];
                grouped::Rows::pack(1, codes.format(), &of_row, scales, 0..codes.width())
            })
            .collect(),
        _ => Vec::new(),
    };
    Ok(PreparedOperand {
        unit: *unit,
        kernel,
        layout,
        codes: codes.clone(),
        scales: operand.scales.clone(),
        rows,
        grouped,
        special,
    })
}

/// `y[N, M] = x[N, K] * w[M, K]^T` as the unit computes it: the values after the
/// epilogue, rounded to `output`.
///
/// # Errors
/// If shapes, formats, scales or the schedule do not fit.
pub fn gemm(
    unit: &Unit,
    schedule: &Schedule,
    x: &Operand,
    w: &Operand,
    output: Format,
) -> Result<Tensor, GemmError> {
    gemm_prepared(schedule, &prepare(unit, x)?, w, output)
}

/// [`gemm`] with an x that is decoded already.
///
/// # Errors
/// As [`gemm`].
pub fn gemm_prepared(
    schedule: &Schedule,
    x: &PreparedOperand,
    w: &Operand,
    output: Format,
) -> Result<Tensor, GemmError> {
    let (n, k, m) = (x.codes.rows(), x.codes.width(), w.codes.rows());
    if w.codes.width() != k {
        return Err(GemmError::Inner { x: k, w: w.codes.width() });
    }
    if n == 0 || k == 0 || m == 0 {
        return Err(GemmError::Empty { n, m, k });
    }
    check_formats(&x.unit, x.codes.format(), w.codes.format())?;
    check_schedule(&x.unit, schedule, x.codes.format())?;
    check_scales("w", w.codes, &w.scales)?;
    check_kind("w", &x.unit, w.codes, &w.scales)?;
    if x.unit == Unit::Integers && k > MOST_INTEGERS {
        return Err(GemmError::TooLong { inner: k });
    }
    if !matches!(output, Format::F32 | Format::Bf16 | Format::F16) {
        return Err(GemmError::Output(output));
    }

    let by_block = [&x.scales, &w.scales].iter().any(|s| matches!(s, Scales::Block128 { .. }));
    let steps = if by_block {
        Schedule::PROMOTED.steps(k, Format::E4m3)
    } else if x.unit == Unit::Integers {
        // Whatever the parts, they are added exactly.
        Schedule::FAST.steps(k, Format::Int8)
    } else {
        schedule.steps(k, x.codes.format())
    };
    let job = Job { x, w, steps, by_block, epilogue: schedule.epilogue, output };

    let panel = job.panel();
    let panels = m.div_ceil(panel);
    let wanted = TASKS_PER_THREAD * rayon::current_num_threads();
    let rows = n.div_ceil(wanted.div_ceil(panels)).clamp(LEAST_ROWS, MOST_ROWS);
    let width = panel * (panels / wanted).clamp(1, MOST_PANELS);
    let tiles: Vec<(usize, usize)> = (0..m)
        .step_by(width)
        .flat_map(|first_w| (0..n).step_by(rows).map(move |first_x| (first_x, first_w)))
        .collect();
    let computed: Vec<Vec<Vec<f32>>> = tiles
        .par_iter()
        .map(|&(first_x, first_w)| {
            job.tile(first_x..(first_x + rows).min(n), first_w..(first_w + width).min(m))
        })
        .collect();

    let mut y = Tensor::zeros(n, m);
    for (&(first_x, first_w), tile) in tiles.iter().zip(&computed) {
        for (outputs, first_w) in tile.iter().zip((first_w..m).step_by(panel)) {
            let lanes = panel.min(m - first_w);
            for (row, values) in outputs.chunks(panel).enumerate() {
                let target = &mut y.row_mut(first_x + row)[first_w..first_w + lanes];
                target.copy_from_slice(&values[..lanes]);
            }
        }
    }
    Ok(y)
}

/// What every tile of one GEMM shares.
struct Job<'a> {
    x: &'a PreparedOperand,
    w: &'a Operand<'a>,
    steps: Vec<Step>,
    by_block: bool,
    epilogue: Epilogue,
    output: Format,
}

impl Job<'_> {
    /// Rows of w in a tile.
    fn panel(&self) -> usize {
        match (self.x.layout, self.grouped()) {
            _ if self.x.unit == Unit::Integers => simd::INTEGER_LANES,
            (Some(_), _) => self.x.kernel.lanes(),
            (None, Some(_)) => grouped::LANES,
            (None, None) => PLAIN_PANEL,
        }
    }

    /// The unit of grouped products, where vectors compute it: all of K is one chain.
    fn grouped(&self) -> Option<&BlockScaled> {
        grouped_unit(&self.x.unit, self.x.kernel).filter(|_| self.steps.len() == 1)
    }

    /// The outputs of some rows of x and some panels of rows of w: for each panel
    /// row-major, in rows of a whole panel.
    fn tile(&self, x_rows: Range<usize>, w_rows: Range<usize>) -> Vec<Vec<f32>> {
        let panels = w_rows.clone().step_by(self.panel()).map(|first| {
            let w_rows = first..(first + self.panel()).min(w_rows.end);
            Panel::new(self, x_rows.clone(), w_rows)
        });
        match (self.x.layout, self.grouped(), &self.w.scales) {
            _ if self.x.unit == Unit::Integers => {
                panels.map(|panel| self.integer_panel(panel)).collect()
            }
            (Some(layout), ..) => self.vector_tile(layout, panels.collect()),
            (None, Some(unit), Scales::Blocks(scales)) => {
                panels.map(|panel| self.grouped_panel(unit, scales, &panel)).collect()
            }
            _ => panels
                .map(|panel| {
                    let mut outputs = vec![0.0; x_rows.len() * self.panel()];
                    self.plain_tile(x_rows.clone(), panel.w_rows, |_, _| true, &mut outputs);
                    outputs
                })
                .collect(),
        }
    }

    /// A tile by vector code, and again by plain code where that is not enough.
    fn vector_tile(&self, layout: Layout, mut panels: Vec<Panel>) -> Vec<Vec<f32>> {
        let mut words = Words::default();
        for step in &self.steps {
            for start in step.inner.clone().step_by(STRETCH) {
                let inner = start..(start + STRETCH).min(step.inner.end);
                for panel in &mut panels {
                    panel.chain(self, layout, inner.clone(), &mut words);
                }
            }
            for panel in &mut panels {
                panel.fold(self, step);
            }
        }
        panels.into_iter().map(|panel| panel.finish(self, layout)).collect()
    }

    /// A panel of products of integers: exact sums, each of a step rounded once to f32.
    fn integer_panel(&self, mut panel: Panel<'_>) -> Vec<f32> {
        let kernel = self.x.kernel;
        let mut words = Words::default();
        let mut exact = [[0i32; simd::INTEGER_LANES]; simd::INTEGER_ROWS];
        for step in &self.steps {
            let of_step = simd::integer_words(kernel, step.inner.start)
                ..simd::integer_words(kernel, step.inner.end);
            simd::pack_integers_of_w(kernel, &panel.w_codes, step.inner.clone(), &mut words);
            let partials = panel.sums.partial.chunks_mut(simd::INTEGER_ROWS * simd::INTEGER_LANES);
            let groups = panel.x_rows.clone().step_by(simd::INTEGER_ROWS);
            for (first, partials) in groups.zip(partials) {
                let count = partials.len() / simd::INTEGER_LANES;
                let mut x: [&[u32]; simd::INTEGER_ROWS] = [&[]; simd::INTEGER_ROWS];
                for (x, row) in x.iter_mut().zip(first..first + count) {
                    *x = &self.x.rows[row].as_slice()[of_step.clone()];
                }
                let exact = &mut exact[..count];
                simd::integer_sums(kernel, &x[..count], words.as_slice(), exact);
                for (partial, exact) in partials.iter_mut().zip(exact.as_flattened()) {
                    *partial = *exact as f32;
                }
            }
            panel.fold(self, step);
        }
        let Panel { x_rows, w_rows, sums, .. } = panel;
        let mut outputs = sums.total;
        for (x_row, outputs) in x_rows.zip(outputs.chunks_exact_mut(self.panel())) {
            for (w_row, output) in w_rows.clone().zip(outputs) {
                *output = self.finish(*output, x_row, w_row);
            }
        }
        outputs
    }

    /// A panel of grouped products by vector code, and again by plain code where that is not enough.
    fn grouped_panel(
        &self,
        unit: &BlockScaled,
        scales: &BlockScales,
        panel: &Panel<'_>,
    ) -> Vec<f32> {
        let (x_rows, w_rows) = (panel.x_rows.clone(), panel.w_rows.clone());
        let rows: Vec<(CodesRow<'_>, usize)> =
            panel.w_codes.iter().copied().zip(w_rows.clone()).collect();
        let whole = 0..self.w.codes.width();
        let w = grouped::Rows::pack(grouped::LANES, self.w.codes.format(), &rows, scales, whole);
        let mut outputs = vec![0.0; x_rows.len() * grouped::LANES];
        let mut usable = vec![true; x_rows.len()];
        let lines = outputs.as_chunks_mut::<{ grouped::LANES }>().0.iter_mut();
        for ((row, line), usable) in x_rows.clone().zip(lines).zip(&mut usable) {
            *usable = grouped::chain(unit, &self.x.grouped[row], &w, line);
            for (w_row, output) in w_rows.clone().zip(line) {
                *output = self.finish(*output, row, w_row);
            }
        }
        let special: Vec<bool> =
            w_rows.clone().map(|row| has_no_scale(&self.w.scales, row)).collect();
        let (first_x, first_w) = (x_rows.start, w_rows.start);
        let again = |x_row: usize, w_row: usize| {
            !usable[x_row - first_x] || self.x.special[x_row] || special[w_row - first_w]
        };
        self.plain_tile(x_rows, w_rows, again, &mut outputs);
        outputs
    }

    /// The chosen outputs of a tile by the definition.
    fn plain_tile(
        &self,
        x_rows: Range<usize>,
        w_rows: Range<usize>,
        chosen: impl Fn(usize, usize) -> bool,
        outputs: &mut [f32],
    ) {
        let first_w = w_rows.start;
        let mut decoded: Vec<Option<PlainRow>> = w_rows.clone().map(|_| None).collect();
        for (x_row, outputs) in x_rows.zip(outputs.chunks_exact_mut(self.panel())) {
            let mut x = None;
            for (w_row, output) in w_rows.clone().zip(outputs) {
                if chosen(x_row, w_row) {
                    let x = x.get_or_insert_with(|| {
                        PlainRow::new(&self.x.unit, &self.x.codes, &self.x.scales, x_row)
                    });
                    let w = decoded[w_row - first_w].get_or_insert_with(|| {
                        PlainRow::new(&self.x.unit, self.w.codes, &self.w.scales, w_row)
                    });
                    *output = self.plain_output(x_row, x, w_row, w);
                }
            }
        }
    }

    fn plain_output(&self, x_row: usize, x: &PlainRow, w_row: usize, w: &PlainRow) -> f32 {
        let mut main: Option<f32> = None;
        let mut total: Option<f32> = None;
        for step in &self.steps {
            let mut partial = x.chain(&self.x.unit, w, step.inner.clone());
            if self.by_block {
                let column = step.inner.start;
                partial *= self.x.scales.at(x_row, column, self.x.codes.width())
                    * self.w.scales.at(w_row, column, self.w.codes.width());
            }
            let promoted = main.map_or(partial, |main| main + partial);
            match step.then {
                Then::Promote => main = Some(promoted),
                Then::EndPart => {
                    total = Some(total.map_or(promoted, |total| total + promoted));
                    main = None;
                }
            }
        }
        self.finish(total.unwrap_or(0.0), x_row, w_row)
    }

    fn finish(&self, accumulator: f32, x_row: usize, w_row: usize) -> f32 {
        let scaled = if self.by_block {
            accumulator
        } else {
            let (x, w) = (self.x.scales.of_output(x_row), self.w.scales.of_output(w_row));
            match self.epilogue {
                Epilogue::ScalesFirst => (x * w) * accumulator,
                Epilogue::ActivationThenWeight => (accumulator * x) * w,
                Epilogue::WeightThenActivation => (accumulator * w) * x,
            }
        };
        self.output.round(scaled)
    }
}

/// One panel of rows of w and the rows of x that a task multiplies it by.
struct Panel<'a> {
    x_rows: Range<usize>,
    w_rows: Range<usize>,
    w_codes: Vec<CodesRow<'a>>,
    /// What the scales of its blocks add to the exponents of each row of w.
    raised: Vec<Vec<i16>>,
    /// For each row of x, whether vectors have handled all so far.
    usable: Vec<bool>,
    sums: Sums,
}

impl<'a> Panel<'a> {
    fn new(job: &Job<'a>, x_rows: Range<usize>, w_rows: Range<usize>) -> Panel<'a> {
        Panel {
            w_codes: w_rows.clone().map(|row| job.w.codes.row(row)).collect(),
            raised: match &job.w.scales {
                Scales::Blocks(_) => {
                    let of = |row| raised_by(&job.x.unit, &job.w.scales, row);
                    w_rows.clone().map(of).collect()
                }
                _ => Vec::new(),
            },
            usable: vec![true; x_rows.len()],
            sums: Sums::new(x_rows.len() * job.panel()),
            x_rows,
            w_rows,
        }
    }

    /// Chains a stretch of K for every output.
    fn chain(&mut self, job: &Job, layout: Layout, inner: Range<usize>, words: &mut Words) {
        let kernel = job.x.kernel;
        let x_words = layout.words(inner.start)..layout.words(inner.end);
        // Empty, and then nothing is allocated, but for block-scaled operands.
        let raised: Vec<&[i16]> = self.raised.iter().map(Vec::as_slice).collect();
        let format = job.w.codes.format();
        simd::pack_w(kernel, layout, format, &self.w_codes, &raised, inner, words);
        let partials = self.sums.partial.chunks_mut(simd::GROUP * job.panel());
        let groups = partials.zip(self.usable.chunks_mut(simd::GROUP));
        for ((partial, usable), first) in groups.zip(self.x_rows.clone().step_by(simd::GROUP)) {
            let mut x: [&[u32]; simd::GROUP] = [&[]; simd::GROUP];
            for (x, row) in x.iter_mut().zip(first..first + usable.len()) {
                *x = &job.x.rows[row].as_slice()[x_words.clone()];
            }
            let in_range =
                simd::chain(kernel, layout, &x[..usable.len()], words.as_slice(), partial);
            for (usable, in_range) in usable.iter_mut().zip(in_range) {
                *usable &= in_range;
            }
        }
    }

    /// Ends a step for every output: scale, promote, add up the parts.
    fn fold(&mut self, job: &Job, step: &Step) {
        let sums = &mut self.sums;
        if job.by_block {
            let column = step.inner.start;
            let partials = sums.partial.chunks_exact_mut(job.panel());
            for (row, partial) in self.x_rows.clone().zip(partials) {
                let x = job.x.scales.at(row, column, job.x.codes.width());
                for (w_row, partial) in self.w_rows.clone().zip(partial) {
                    *partial *= x * job.w.scales.at(w_row, column, job.w.codes.width());
                }
            }
        }
        add_or_start(&mut sums.main, &sums.partial, &mut sums.main_started);
        if step.then == Then::EndPart {
            add_or_start(&mut sums.total, &sums.main, &mut sums.total_started);
            sums.main_started = false;
        }
        sums.partial.fill(0.0);
    }

    /// The epilogue, and plain code for what vectors do not handle.
    fn finish(self, job: &Job, layout: Layout) -> Vec<f32> {
        let Panel { x_rows, w_rows, usable, sums, .. } = self;
        let mut outputs = sums.total;
        for (x_row, outputs) in x_rows.clone().zip(outputs.chunks_exact_mut(job.panel())) {
            for (w_row, output) in w_rows.clone().zip(outputs) {
                *output = job.finish(*output, x_row, w_row);
            }
        }
        if layout != Layout::Fma {
            let w_special: Vec<bool> = w_rows
                .clone()
                .map(|row| is_special(job.w.codes, row) || has_no_scale(&job.w.scales, row))
                .collect();
            let (first_x, first_w) = (x_rows.start, w_rows.start);
            let again = |x_row: usize, w_row: usize| {
                !usable[x_row - first_x] || job.x.special[x_row] || w_special[w_row - first_w]
            };
            job.plain_tile(x_rows, w_rows, again, &mut outputs);
        }
        outputs
    }
}

/// The running sums of a tile's outputs.
struct Sums {
    /// The tensor core's accumulators.
    partial: Vec<f32>,
    /// The promoted sums of the part of K at hand.
    main: Vec<f32>,
    main_started: bool,
    /// The sums of the parts.
    total: Vec<f32>,
    total_started: bool,
}

impl Sums {
    fn new(outputs: usize) -> Sums {
        Sums {
            partial: vec![0.0; outputs],
            main: vec![0.0; outputs],
            main_started: false,
            total: vec![0.0; outputs],
            total_started: false,
        }
    }
}

/// The first addend starts a sum, without an addition.
fn add_or_start(sums: &mut [f32], addends: &[f32], started: &mut bool) {
    if *started {
        for (sum, addend) in sums.iter_mut().zip(addends) {
            *sum += addend;
        }
    } else {
        sums.copy_from_slice(addends);
    }
    *started = true;
}

/// A decoded row for plain code.
struct PlainRow {
    format: Format,
    parts: Vec<Parts>,
    values: Vec<f32>,
    /// The scales of its blocks, and their format.
    blocks: Option<(Vec<u8>, BlockFormat)>,
}

impl PlainRow {
    fn new(unit: &Unit, codes: &Codes, scales: &Scales, row: usize) -> PlainRow {
        let format = codes.format();
        let (mut parts, mut values) = (Vec::new(), Vec::new());
        if format == Format::F32 || matches!(unit, Unit::MatrixCore(_)) {
            values = codes.decode_row(row);
        }
        if format != Format::F32 {
            parts = codes.row(row).iter().map(|code| format.parts(code)).collect();
        }
        let blocks = match scales {
            Scales::Blocks(scales) => Some((scales.of_row(row).to_vec(), scales.format)),
            _ => None,
        };
        PlainRow { format, parts, values, blocks }
    }

    /// A stretch of K.
    fn stretch(&self, inner: Range<usize>) -> matrix_core::Stretch<'_> {
        matrix_core::Stretch {
            parts: &self.parts[inner.clone()],
            values: &self.values[inner],
            format: self.format,
        }
    }

    /// A stretch of K of a block-scaled row, which begins at a whole block.
    fn scaled(&self, inner: Range<usize>) -> Option<ScaledRow<'_>> {
        let (scales, format) = self.blocks.as_ref()?;
        Some(ScaledRow {
            scales: &scales[inner.start / format.block()..],
            elements: &self.parts[inner],
            fraction_bits: self.format.fraction_bits(),
            codec: format.scales(),
            block: format.block(),
        })
    }

    fn chain(&self, unit: &Unit, w: &PlainRow, inner: Range<usize>) -> f32 {
        match unit {
            Unit::TensorCore(core) => {
                let fraction_bits = self.format.fraction_bits() + w.format.fraction_bits();
                let (x, w) = (&self.parts[inner.clone()], &w.parts[inner]);
                tensor_core::chain(core, fraction_bits, x, w, 0.0)
            }
            Unit::MatrixCore(core) => {
                let (x, w) = (self.stretch(inner.clone()), w.stretch(inner));
                matrix_core::chain(core, x, w, 0.0)
            }
            Unit::BlockScaled(unit) => {
                // That there are scales was checked.
                let (x, w) = (self.scaled(inner.clone()), w.scaled(inner));
                x.zip(w).map_or(f32::NAN, |(x, w)| tensor_core::chain_scaled(unit, &x, &w, 0.0))
            }
            Unit::SequentialFma => self.values[inner.clone()]
                .iter()
                .zip(&w.values[inner])
                .fold(0.0, |c: f32, (&x, &w)| x.mul_add(w, c)),
            // Every panel of integers is summed by `simd.rs`.
            Unit::Integers => f32::NAN,
        }
    }
}

impl Scales {
    /// What an element of a row of `width` is multiplied with.
    pub fn at(&self, row: usize, column: usize, width: usize) -> f32 {
        match self {
            Scales::Blocks(scales) => scales.at(row, column),
            Scales::Tensor(scale) => *scale,
            Scales::Row(scales) => scales[row],
            Scales::Block128 { rows_per_block, first_row, scales } => {
                let blocks = width.div_ceil(SCALE_BLOCK);
                scales[(first_row + row) / rows_per_block * blocks + column / SCALE_BLOCK]
            }
        }
    }

    /// How many columns, from a multiple of their number on, share one scale at least.
    pub fn shared_columns(&self) -> usize {
        match self {
            Scales::Tensor(_) | Scales::Row(_) => usize::MAX,
            Scales::Block128 { .. } => SCALE_BLOCK,
            Scales::Blocks(scales) => scales.format.block(),
        }
    }

    /// What an output of a row is multiplied with: the scales that no block of K has to itself.
    fn of_output(&self, row: usize) -> f32 {
        match self {
            Scales::Blocks(scales) => scales.whole,
            other => other.at(row, 0, 1),
        }
    }
}

/// The unit of grouped products, where vectors are wanted and there is code for it.
fn grouped_unit(unit: &Unit, kernel: Kernel) -> Option<&BlockScaled> {
    match unit {
        Unit::BlockScaled(unit) => {
            Some(unit).filter(|unit| kernel != Kernel::PLAIN && grouped::computes(unit))
        }
        _ => None,
    }
}

/// What the scales of a row's blocks add to the exponents of its elements, block by block; nothing
/// where the unit adds exact sums of several products.
fn raised_by(unit: &Unit, scales: &Scales, row: usize) -> Vec<i16> {
    match (unit, scales) {
        (Unit::BlockScaled(BlockScaled { group: 1, .. }), Scales::Blocks(scales)) => {
            let codec = scales.format.scales();
            scales.of_row(row).iter().map(|code| codec.parts(*code).1 as i16).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether the scale of some block of a row is NaN.
fn has_no_scale(scales: &Scales, row: usize) -> bool {
    match scales {
        Scales::Blocks(scales) => {
            let codec = scales.format.scales();
            scales.of_row(row).iter().any(|code| !codec.is_number(*code))
        }
        _ => false,
    }
}

/// Whether an operand's scales are of the kind that the unit takes.
fn check_kind(
    operand: &'static str,
    unit: &Unit,
    codes: &Codes,
    scales: &Scales,
) -> Result<(), GemmError> {
    let of_blocks = "block-scaled operands";
    match (unit, scales) {
        (Unit::BlockScaled(_), Scales::Blocks(scales)) => {
            let (format, width) = (scales.format, codes.width());
            let block = format.block();
            if !width.is_multiple_of(block) {
                return Err(GemmError::PartBlock { operand, width, format, block });
            }
            if format.element() != codes.format() {
                let given = format!("{} elements with scales of {format}", codes.format());
                return Err(GemmError::BlockScales { operand, unit: of_blocks, given });
            }
            Ok(())
        }
        (Unit::BlockScaled(_), _) => {
            let given = "scales of rows or of the whole".to_owned();
            Err(GemmError::BlockScales { operand, unit: of_blocks, given })
        }
        (_, Scales::Blocks(scales)) => {
            let (unit, given) = ("single values", format!("scales of {}", scales.format));
            Err(GemmError::BlockScales { operand, unit, given })
        }
        _ => Ok(()),
    }
}

/// Whether a row holds a NaN or an infinity.
fn is_special(codes: &Codes, row: usize) -> bool {
    let any16 = |codes: &[u16], from: u16| {
        codes.iter().fold(false, |any, code| any | (code & 0x7fff >= from))
    };
    match (codes.format(), codes.row(row)) {
        // Integers and elements of blocks have no other codes than numbers.
        (Format::Int8 | Format::E2m3 | Format::E3m2 | Format::E2m1, _) => false,
        (Format::E4m3, CodesRow::Bits8(codes)) => {
            codes.iter().fold(false, |any, code| any | (code & 0x7f == 0x7f))
        }
        (Format::E4m3fnuz | Format::E5m2fnuz, CodesRow::Bits8(codes)) => codes.contains(&0x80),
        (Format::E5m2, CodesRow::Bits8(codes)) => {
            codes.iter().fold(false, |any, code| any | (code & 0x7f >= 0x7c))
        }
        (format, CodesRow::Bits8(codes)) => {
            codes.iter().any(|&code| !format.decode(u32::from(code)).is_finite())
        }
        (Format::Bf16, CodesRow::Bits16(codes)) => any16(codes, 0x7f80),
        (_, CodesRow::Bits16(codes)) => any16(codes, 0x7c00),
        (_, CodesRow::Bits32(codes)) => {
            codes.iter().fold(false, |any, code| any | (code & 0x7fff_ffff >= 0x7f80_0000))
        }
    }
}

impl PreparedOperand {
    /// The codes, `[rows, K]`.
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// The unit that it was decoded for.
    pub fn unit(&self) -> &Unit {
        &self.unit
    }
}

fn check_scales(operand: &'static str, codes: &Codes, scales: &Scales) -> Result<(), GemmError> {
    check_scale_count(operand, codes, scales)?;
    let single;
    let given = match scales {
        Scales::Tensor(scale) => {
            single = [*scale];
            &single[..]
        }
        Scales::Blocks(scales) => {
            single = [scales.whole];
            &single[..]
        }
        Scales::Row(scales) | Scales::Block128 { scales, .. } => scales,
    };
    // Integers have no NaN: where a value that was to be converted is none, the scale says so.
    let says_nan = |scale: f32| scale.is_nan() && codes.format() == Format::Int8;
    let is_good = |scale: f32| (scale.is_finite() && scale > 0.0) || says_nan(scale);
    match given.iter().position(|scale| !is_good(*scale)) {
        Some(index) => Err(GemmError::Scale { operand, index, scale: given[index] }),
        None => Ok(()),
    }
}

/// Whether there are as many scales as the operand has rows or blocks.
///
/// # Errors
/// If there are not.
pub fn check_scale_count(
    operand: &'static str,
    codes: &Codes,
    scales: &Scales,
) -> Result<(), GemmError> {
    let (given, expected) = match scales {
        Scales::Tensor(_) => return Ok(()),
        Scales::Row(scales) => (scales.len(), codes.rows()..=codes.rows()),
        Scales::Block128 { rows_per_block, first_row, scales } => {
            let blocks = codes.width().div_ceil(SCALE_BLOCK);
            let needed = (first_row + codes.rows()).div_ceil((*rows_per_block).max(1)) * blocks;
            // A chunk of rows may come with the scales of the whole matrix.
            (scales.len(), needed..=usize::MAX)
        }
        Scales::Blocks(scales) => {
            let needed = codes.rows() * codes.width().div_ceil(scales.format.block());
            if scales.blocks != codes.width().div_ceil(scales.format.block()) {
                let given = codes.rows() * scales.blocks;
                return Err(GemmError::ScaleCount { operand, expected: needed, given });
            }
            (scales.codes.len(), needed..=needed)
        }
    };
    if !expected.contains(&given) {
        return Err(GemmError::ScaleCount { operand, expected: *expected.start(), given });
    }
    if matches!(scales, Scales::Block128 { rows_per_block: 0, .. }) {
        return Err(GemmError::ScaleCount { operand, expected: 1, given: 0 });
    }
    Ok(())
}

fn check_formats(unit: &Unit, x: Format, w: Format) -> Result<(), GemmError> {
    let fits = match unit {
        Unit::TensorCore(_) => {
            let floats = x != Format::F32 && x != Format::Int8;
            (x == w && floats) || (x.is_fp8() && w.is_fp8())
        }
        Unit::SequentialFma => x == Format::F32 && w == Format::F32,
        Unit::BlockScaled(_) => x == w,
        Unit::MatrixCore(_) => {
            let mixes = x.is_fnuz() && w.is_fnuz();
            mixes || x == w && x != Format::F32 && x != Format::Int8
        }
        Unit::Integers => x == Format::Int8 && w == Format::Int8,
    };
    if fits { Ok(()) } else { Err(GemmError::Formats { x, w }) }
}

fn check_schedule(unit: &Unit, schedule: &Schedule, format: Format) -> Result<(), GemmError> {
    let products = unit.products();
    let check = |what, elements: usize| {
        if elements == 0 || !elements.is_multiple_of(products) {
            return Err(GemmError::CutBlock { what, elements, products });
        }
        Ok(())
    };
    if schedule.accumulate == crate::op::Accumulate::Promoted {
        if matches!(unit, Unit::BlockScaled(_)) {
            return Err(GemmError::Promoted);
        }
        check("the promotion interval", schedule.promotion_interval as usize)?;
    }
    if schedule.split_k > 1 {
        check("the split-K tile", schedule.split_tile_bytes as usize / format.bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::emulated::chip::chip;
    use crate::op::ChipName;

    fn codes(rows: usize, width: usize, seed: u32) -> Codes {
        let mut state = seed;
        let values: Vec<f32> = (0..rows * width)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        Codes::quantize(Format::E4m3, width, &values, 1.0 / 448.0).expect("whole rows")
    }

    fn hopper() -> &'static Unit {
        chip(ChipName::Hopper).unit(Format::E4m3, Format::E4m3).expect("hopper fp8")
    }

    #[test]
    fn block_scales_are_those_of_the_whole_matrix_for_any_chunk_of_it() {
        let (n, m, k) = (3, 300, 300);
        let (x, w) = (codes(n, k, 1), codes(m, k, 2));
        let blocks = k.div_ceil(SCALE_BLOCK);
        let scales = |rows: usize| (0..rows * blocks).map(|i| 0.01 + 0.003 * i as f32).collect();
        let (x_scales, w_scales): (Vec<f32>, Vec<f32>) = (scales(n), scales(m.div_ceil(128)));
        let x = Operand {
            codes: &x,
            scales: Scales::Block128 { rows_per_block: 1, first_row: 0, scales: x_scales.clone() },
        };
        let w_rows = |first_row| Scales::Block128 {
            rows_per_block: 128,
            first_row,
            scales: w_scales.clone(),
        };
        let run = |w: &Codes, first_row| {
            let w = Operand { codes: w, scales: w_rows(first_row) };
            gemm(hopper(), &Schedule::PROMOTED, &x, &w, Format::F32).expect("a product")
        };
        let whole = run(&w, 0);
        let chunk: Vec<usize> = (100..180).collect();
        let part = run(&w.select_rows(&chunk), 100);
        for row in 0..n {
            assert_eq!(part.row(row), &whole.row(row)[100..180]);
        }

        // One output, step by step.
        let (row, w_row) = (2, 150);
        let Unit::TensorCore(core) = hopper() else { panic!("no tensor core") };
        let parts = |codes: &Codes, row: usize| -> Vec<Parts> {
            codes.row(row).iter().map(|code| codes.format().parts(code)).collect()
        };
        let (x_parts, w_parts) = (parts(x.codes, row), parts(&w, w_row));
        let mut main = 0.0f32;
        for block in 0..blocks {
            let inner = block * 128..k.min((block + 1) * 128);
            let partial =
                tensor_core::chain(core, 6, &x_parts[inner.clone()], &w_parts[inner], 0.0);
            main += (x_scales[row * blocks + block] * w_scales[blocks + block]) * partial;
        }
        assert_eq!(whole.row(row)[w_row], main);
    }

    #[test]
    fn row_scales_multiply_the_accumulator_and_the_output_is_rounded() {
        let (x, w) = (codes(2, 64, 3), codes(5, 64, 4));
        let run = |x_scales, w_scales, output| {
            let x = Operand { codes: &x, scales: x_scales };
            let w = Operand { codes: &w, scales: w_scales };
            gemm(hopper(), &Schedule::FAST, &x, &w, output).expect("a product")
        };
        let bare = run(Scales::Tensor(1.0), Scales::Tensor(1.0), Format::F32);
        let (x_scales, w_scales) = ([0.3f32, 0.7], [0.11f32, 0.2, 0.3, 0.41, 0.5]);
        let scaled =
            run(Scales::Row(x_scales.to_vec()), Scales::Row(w_scales.to_vec()), Format::Bf16);
        for (row, x) in x_scales.iter().enumerate() {
            for (column, w) in w_scales.iter().enumerate() {
                let exact = (x * w) * bare.row(row)[column];
                assert_eq!(scaled.row(row)[column], Format::Bf16.round(exact));
            }
        }
    }

    #[test]
    fn a_nan_reaches_its_own_outputs_and_no_others() {
        let (mut x, w) = (codes(3, 96, 5), codes(20, 96, 6));
        let clean = |x: &Codes| {
            let x = Operand { codes: x, scales: Scales::Tensor(1.0) };
            let w = Operand { codes: &w, scales: Scales::Tensor(1.0) };
            gemm(hopper(), &Schedule::FAST, &x, &w, Format::F32).expect("a product")
        };
        let before = clean(&x);
        if let super::super::quantize::CodesRowMut::Bits8(codes) = x.row_mut(1) {
            codes[50] = 0x7f;
        }
        let after = clean(&x);
        assert_eq!((before.row(0), before.row(2)), (after.row(0), after.row(2)));
        assert!(after.row(1).iter().all(|value| value.to_bits() == 0x7fff_ffff));
    }
}
