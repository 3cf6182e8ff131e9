//! A whole GEMM as a chip computes it: `y[N, M] = x[N, K] * w[M, K]^T`.
//!
//! It knows scales, schedules and how to share the work out; one instruction's
//! arithmetic is `tensor_core.rs`. The result does not depend on the number of
//! threads: every output is computed by one of them, in the schedule's order.
//!
//! Block scales follow the DeepSeek scheme (arXiv 2412.19437, section 3.3.2):
//! each 128 elements of K accumulate from zero in the tensor core, and then
//! `main = main + (scale_x * scale_w) * partial`, the products and the sum each
//! rounded to f32.

use rayon::prelude::*;

use super::chip::Unit;
use super::quantize::Codes;
use super::schedule::{Epilogue, Schedule, Step, Then};
use super::tensor_core;
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
    format: Format,
    rows: usize,
    width: usize,
    scales: Scales,
    parts: Vec<Parts>,
    values: Vec<f32>,
}

/// Rows of w that one task multiplies.
const PANEL: usize = 16;
/// Rows of x that one task multiplies.
const ROWS: usize = 64;
/// Elements of K that share a block scale.
const SCALE_BLOCK: usize = 128;

/// Decodes an operand once, for [`gemm_prepared`].
///
/// # Errors
/// If its scales are not positive finite numbers, one for each row or block.
pub fn prepare(unit: &Unit, operand: &Operand) -> Result<PreparedOperand, GemmError> {
    prepare_as("x", unit, operand)
}

fn prepare_as(
    name: &'static str,
    unit: &Unit,
    operand: &Operand,
) -> Result<PreparedOperand, GemmError> {
    let codes = operand.codes;
    check_scales(name, codes, &operand.scales)?;
    let format = codes.format();
    let (mut parts, mut values) = (Vec::new(), Vec::new());
    for row in 0..codes.rows() {
        match unit {
            Unit::TensorCore(_) => {
                parts.extend(codes.row(row).iter().map(|code| format.parts(code)));
            }
            Unit::SequentialFma => values.extend(codes.decode_row(row)),
        }
    }
    Ok(PreparedOperand {
        unit: *unit,
        format,
        rows: codes.rows(),
        width: codes.width(),
        scales: operand.scales.clone(),
        parts,
        values,
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
    let (n, k, m) = (x.rows, x.width, w.codes.rows());
    if w.codes.width() != k {
        return Err(GemmError::Inner { x: k, w: w.codes.width() });
    }
    if n == 0 || k == 0 || m == 0 {
        return Err(GemmError::Empty { n, m, k });
    }
    check_formats(&x.unit, x.format, w.codes.format())?;
    check_schedule(&x.unit, schedule, x.format)?;
    if !matches!(output, Format::F32 | Format::Bf16 | Format::F16) {
        return Err(GemmError::Output(output));
    }
    let w = prepare_as("w", &x.unit, w)?;

    let by_block = [&x.scales, &w.scales].iter().any(|s| matches!(s, Scales::Block128 { .. }));
    let steps = if by_block {
        Schedule::PROMOTED.steps(k, Format::E4m3)
    } else {
        schedule.steps(k, x.format)
    };
    let job = Job { x, w: &w, steps, by_block, epilogue: schedule.epilogue, output };

    let tiles: Vec<(usize, usize)> = (0..m)
        .step_by(PANEL)
        .flat_map(|first_w| (0..n).step_by(ROWS).map(move |first_x| (first_x, first_w)))
        .collect();
    let computed: Vec<Vec<f32>> =
        tiles.par_iter().map(|&(first_x, first_w)| job.tile(first_x, first_w)).collect();

    let mut y = Tensor::zeros(n, m);
    for (&(first_x, first_w), tile) in tiles.iter().zip(&computed) {
        let lanes = PANEL.min(m - first_w);
        for (row, values) in tile.chunks(lanes).enumerate() {
            y.row_mut(first_x + row)[first_w..first_w + lanes].copy_from_slice(values);
        }
    }
    Ok(y)
}

/// What every tile of one GEMM shares.
struct Job<'a> {
    x: &'a PreparedOperand,
    w: &'a PreparedOperand,
    steps: Vec<Step>,
    by_block: bool,
    epilogue: Epilogue,
    output: Format,
}

impl Job<'_> {
    /// The outputs of up to `ROWS` rows of x and `PANEL` rows of w, row-major.
    fn tile(&self, first_x: usize, first_w: usize) -> Vec<f32> {
        let rows = ROWS.min(self.x.rows - first_x);
        let lanes = PANEL.min(self.w.rows - first_w);
        let mut outputs = Vec::with_capacity(rows * lanes);
        for x_row in first_x..first_x + rows {
            for w_row in first_w..first_w + lanes {
                outputs.push(self.output(x_row, w_row));
            }
        }
        outputs
    }

    fn output(&self, x_row: usize, w_row: usize) -> f32 {
        let mut main: Option<f32> = None;
        let mut total: Option<f32> = None;
        for step in &self.steps {
            let mut partial = self.chain(x_row, w_row, step, 0.0);
            if self.by_block {
                let block = step.inner.start / SCALE_BLOCK;
                partial *= self.x.scale(x_row, block) * self.w.scale(w_row, block);
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

    fn chain(&self, x_row: usize, w_row: usize, step: &Step, c: f32) -> f32 {
        let x = x_row * self.x.width + step.inner.start..x_row * self.x.width + step.inner.end;
        let w = w_row * self.w.width + step.inner.start..w_row * self.w.width + step.inner.end;
        match &self.x.unit {
            Unit::TensorCore(core) => {
                let fraction_bits = self.x.format.fraction_bits() + self.w.format.fraction_bits();
                tensor_core::chain(core, fraction_bits, &self.x.parts[x], &self.w.parts[w], c)
            }
            Unit::SequentialFma => self.x.values[x]
                .iter()
                .zip(&self.w.values[w])
                .fold(c, |c, (&x, &w)| x.mul_add(w, c)),
        }
    }

    fn finish(&self, accumulator: f32, x_row: usize, w_row: usize) -> f32 {
        let scaled = if self.by_block {
            accumulator
        } else {
            let (x, w) = (self.x.scale(x_row, 0), self.w.scale(w_row, 0));
            match self.epilogue {
                Epilogue::ScalesFirst => (x * w) * accumulator,
                Epilogue::ActivationThenWeight => (accumulator * x) * w,
                Epilogue::WeightThenActivation => (accumulator * w) * x,
            }
        };
        self.output.round(scaled)
    }
}

impl PreparedOperand {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, the elements in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The operand's format.
    pub fn format(&self) -> Format {
        self.format
    }

    fn scale(&self, row: usize, block: usize) -> f32 {
        match &self.scales {
            Scales::Tensor(scale) => *scale,
            Scales::Row(scales) => scales[row],
            Scales::Block128 { rows_per_block, first_row, scales } => {
                let blocks = self.width.div_ceil(SCALE_BLOCK);
                scales[(first_row + row) / rows_per_block * blocks + block]
            }
        }
    }
}

fn check_scales(operand: &'static str, codes: &Codes, scales: &Scales) -> Result<(), GemmError> {
    let single;
    let (given, expected) = match scales {
        Scales::Tensor(scale) => {
            single = [*scale];
            (&single[..], 1..=1)
        }
        Scales::Row(scales) => (&scales[..], codes.rows()..=codes.rows()),
        Scales::Block128 { rows_per_block, first_row, scales } => {
            let blocks = codes.width().div_ceil(SCALE_BLOCK);
            let needed = (first_row + codes.rows()).div_ceil((*rows_per_block).max(1)) * blocks;
            // A chunk of rows may come with the scales of the whole matrix.
            (&scales[..], needed..=usize::MAX)
        }
    };
    if !expected.contains(&given.len()) {
        let expected = *expected.start();
        return Err(GemmError::ScaleCount { operand, expected, given: given.len() });
    }
    if matches!(scales, Scales::Block128 { rows_per_block: 0, .. }) {
        return Err(GemmError::ScaleCount { operand, expected: 1, given: 0 });
    }
    match given.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
        Some(index) => Err(GemmError::Scale { operand, index, scale: given[index] }),
        None => Ok(()),
    }
}

fn check_formats(unit: &Unit, x: Format, w: Format) -> Result<(), GemmError> {
    let fits = match unit {
        Unit::TensorCore(_) => (x == w && x != Format::F32) || (x.is_fp8() && w.is_fp8()),
        Unit::SequentialFma => x == Format::F32 && w == Format::F32,
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
        check("the promotion interval", schedule.promotion_interval as usize)?;
    }
    if schedule.split_k > 1 {
        check("the split-K tile", schedule.split_tile_bytes as usize / format.bytes())?;
    }
    Ok(())
}
