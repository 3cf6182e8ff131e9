//! A product's dump judged: `y = alpha x w^T + bias` from the operands' codes.
//!
//! The operands are what the file holds, so they have no rounding error here: the floor
//! is the additions along K and the output's rounding. It opens no file.

use rayon::prelude::*;

use super::bits::{self, Epilogue};
use super::exam::{Exam, Floor, most_rms, rounding};
use super::{Cause, Checksums, Judgement, Place, Whole, causes, scale_bugs, verdict};
use crate::compare::MOST_DEVIATIONS;
use crate::compute::ComputeError;
use crate::compute::emulated::chip::{CHIPS, Unit};
use crate::compute::emulated::identify::spread;
use crate::compute::product::{Exact, exact, signed_sums};
use crate::dtype::Format;
use crate::op::ChipName;
use crate::random::Random;
use crate::tensor::Tensor;
use crate::tensor_file::CodedTensor;

/// Half an ULP of f32, relative.
const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Elements of K after which a promoted accumulator restarts.
const PROMOTION_INTERVAL: usize = 128;
/// Fraction bits of an f32, which a tensor core's sum has at most.
const F32_BITS: u32 = 23;

/// Products above which not every value is compared unless that is asked for.
const LARGE: usize = 1 << 31;
/// Rows and columns that are compared value by value then.
const SAMPLE: (usize, usize) = (64, 1024);
/// Values in a checksum.
const CHECKED: usize = 64;

/// A product with everything that its judgement depends on.
pub struct Product<'a> {
    /// The activation, `[N, K]`.
    pub x: &'a CodedTensor,
    /// The weight, `[M, K]`.
    pub w: &'a CodedTensor,
    /// What the kernel returned, `[N, M]`.
    pub y: Tensor,
    /// The type in which it returned it.
    pub output: Format,
    /// What follows the sum.
    pub epilogue: Epilogue,
    /// Whose schedules are tried.
    pub chips: &'a [ChipName],
    /// Whether a schedule is confirmed on all values, however long that takes.
    pub all: bool,
}

/// Some rows and columns of a product.
pub(super) struct Part {
    pub x: CodedTensor,
    pub w: CodedTensor,
    pub y: Tensor,
    pub epilogue: Epilogue,
}

impl Part {
    /// As a product of its own.
    pub fn of<'a>(&'a self, whole: &Product<'a>) -> Product<'a> {
        let Part { x, w, y, epilogue } = self;
        Product { x, w, y: y.clone(), epilogue: epilogue.clone(), ..*whole }
    }
}

impl Product<'_> {
    /// The exact values and the floors that are tried.
    ///
    /// # Errors
    /// If the operands have different K.
    pub fn exam(&self) -> Result<Exam, ComputeError> {
        let Exact { width, mut dots, terms } = exact(self.x, self.w)?;
        let alpha = f64::from(self.epilogue.alpha);
        let floors = self.accumulations();
        let floors = floors.into_iter().map(|(name, of_terms, of_sum)| {
            let sigma = dots.par_iter().zip(&terms).enumerate().map(|(index, (&dot, &terms))| {
                let inner = alpha * alpha * (of_terms * terms + of_sum * dot * dot);
                let result = alpha * dot + self.bias(index % width);
                // A sum that nearly cancels is rounded where its error lies.
                let size = larger(result.abs(), inner.sqrt());
                let before = larger((alpha * dot).abs(), size);
                let variance = inner + rounding(self.output, size) + rounding(Format::F32, before);
                variance.sqrt() as f32
            });
            Floor { name, sigma: sigma.collect() }
        });
        let floors = floors.collect();
        for (index, dot) in dots.iter_mut().enumerate() {
            *dot = alpha * *dot + self.bias(index % width);
        }
        Ok(Exam { y: self.y.clone(), output: self.output, truth: dots, floors })
    }

    fn bias(&self, column: usize) -> f64 {
        self.epilogue.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]))
    }

    /// Ways to add along K, the finest first: the variance relative to `sum_k (x w)^2`
    /// and to the sum's square.
    ///
    /// In f32 each of K additions rounds the running sum: `ulp^2 / 12` of s is
    /// `s^2 u^2 / (8 ln 2)` on average, and a random walk that ends at y has
    /// `sum s^2 = K / 6 sum (x w)^2 + K / 3 y^2`; a chain one after the other is the
    /// worst order, so any order is within it. A tensor core adds blocks of products
    /// that are cut to R bits below their largest: as [`crate::compute::floor`] has it.
    fn accumulations(&self) -> Vec<(String, f64, f64)> {
        let inner = self.x.width;
        let step = F32_UNIT.powi(2) / (8.0 * std::f64::consts::LN_2);
        let length = inner as f64;
        // Products of two f32 are rounded before they are added, unless they are fused.
        let of_product = if self.x.format == Format::F32 { F32_UNIT.powi(2) / 3.0 } else { 0.0 };
        let f32_terms = length / 6.0 * step + of_product;
        let f32_sum = length / 3.0 * step;
        let mut all = vec![("f32 additions in any order".to_owned(), f32_terms, f32_sum)];
        let mut chains: Vec<(f64, (String, f64, f64))> = Vec::new();
        for chip in CHIPS.iter().filter(|chip| self.chips.contains(&chip.name)) {
            let Some(Unit::TensorCore(core)) = chip.unit(self.x.format, self.w.format) else {
                continue;
            };
            let bits = core.alignment_bits.min(core.result_bits);
            let narrow = bits < F32_BITS;
            for promoted in if narrow { &[true, false][..] } else { &[false][..] } {
                let chain = if *promoted { inner.min(PROMOTION_INTERVAL) } else { inner };
                let steps = (chain as f64 / core.products as f64).ceil();
                let unit = 0.5f64.powi(bits as i32);
                let name = match (narrow, promoted) {
                    (false, _) => "a tensor core's additions in f32".to_owned(),
                    (true, true) => format!(
                        "a tensor core's accumulator of {bits} fraction bits, promoted to f32 \
                         every {PROMOTION_INTERVAL} products"
                    ),
                    (true, false) => {
                        format!("a tensor core's accumulator of {bits} fraction bits")
                    }
                };
                let of_terms = steps * unit * unit + f32_terms;
                let of_sum = (steps * unit / 2.0).powi(2) + f32_sum;
                chains.push((of_terms + of_sum, (name, of_terms, of_sum)));
            }
        }
        chains.sort_by(|a, b| b.0.total_cmp(&a.0));
        // Of chips whose sums have the same name, the coarsest is enough.
        let mut kept: Vec<(f64, (String, f64, f64))> = Vec::new();
        for chain in chains {
            if !kept.iter().any(|(_, (name, ..))| *name == chain.1.0) {
                kept.push(chain);
            }
        }
        all.extend(kept.into_iter().rev().map(|(_, chain)| chain));
        all
    }

    /// Judges some rows and columns, by rounding alone: enough to tell readings of the
    /// operands apart.
    ///
    /// # Errors
    /// As [`Product::judge`].
    pub fn glance(&self, (rows, columns): (usize, usize)) -> Result<Judgement, ComputeError> {
        let rows = spread(self.y.rows(), rows);
        let columns = spread(self.y.width(), columns);
        let exam = self.part(&rows, &columns).of(self).exam()?;
        let marks = exam.marks();
        verdict(&exam, marks, None, |_| Ok(Vec::new()))
    }

    /// Some rows and columns of it.
    pub(super) fn part(&self, rows: &[usize], columns: &[usize]) -> Part {
        let values = rows.iter().flat_map(|&row| columns.iter().map(move |&c| self.y.row(row)[c]));
        let bias = self.epilogue.bias.as_ref();
        let bias = bias.map(|bias| columns.iter().map(|&column| bias[column]).collect());
        Part {
            x: self.x.select_rows(rows),
            w: self.w.select_rows(columns),
            y: Tensor::new(columns.len(), values.collect()),
            epilogue: Epilogue { bias, ..self.epilogue },
        }
    }

    /// Judges it.
    ///
    /// # Errors
    /// If shapes or formats do not fit.
    pub fn judge(&self) -> Result<Judgement, ComputeError> {
        let products = self.y.data().len().saturating_mul(self.x.width);
        let large = !self.all && products > LARGE;
        match if large { self.by_sample()? } else { None } {
            Some(judgement) => Ok(judgement),
            None => self.by_value(),
        }
    }

    /// Judges a sample of rows and columns value by value and everything by checksums;
    /// nothing where either shows something that must be looked at closely.
    fn by_sample(&self) -> Result<Option<Judgement>, ComputeError> {
        if self.y.data().iter().any(|value| !value.is_finite()) {
            return Ok(None);
        }
        let rows = spread(self.y.rows(), SAMPLE.0);
        let columns = spread(self.y.width(), SAMPLE.1);
        let part = self.part(&rows, &columns);
        let part = part.of(self);
        let exam = part.exam()?;
        let marks = exam.marks();
        let floor = marks.z.floor.clone();
        let checksums = self.checksums(&floor)?;
        // Sums of several errors stand as close as single ones: their floor is their root of
        // squares.
        let limit = most_rms(checksums.count);
        let sound = checksums.rms <= limit && checksums.max <= MOST_DEVIATIONS;
        if !marks.z.within || !sound {
            return Ok(None);
        }
        let bits = bits::look(part.x, part.w, &exam, &part.epilogue, self.chips, false)?;
        let judgement = verdict(&exam, marks, Some(bits), |_| Ok(Vec::new()))?;
        let whole = Whole { values: self.y.data().len(), rows: &rows, columns: &columns };
        Ok(Some(judgement.of_sample(whole, checksums)))
    }

    /// Signed sums of [`CHECKED`] outputs of a row, each held against the same sum of the
    /// exact values: `sum_j c_j y_ij` against `x_i . sum_j c_j w_j`, with signs c.
    fn checksums(&self, floor: &str) -> Result<Checksums, ComputeError> {
        let floors = self.accumulations();
        let (_, of_terms, of_sum) =
            floors.iter().find(|(name, ..)| name == floor).unwrap_or(&floors[0]);
        let (rows, width) = (self.y.rows(), self.y.width());
        let signs: Vec<f64> = Random::named("runner 2026 checksums v1", &[])
            .signs()
            .take(width)
            .map(f64::from)
            .collect();
        let sums = signed_sums(self.x, self.w, &signs, CHECKED)?;
        let count = width.div_ceil(CHECKED);
        let alpha = f64::from(self.epilogue.alpha);
        let each = (0..rows * count).into_par_iter().map(|index| {
            let (row, first) = (index / count, index % count * CHECKED);
            let columns = first..(first + CHECKED).min(width);
            let (mut seen, mut exact) = (0.0, alpha * sums.dots[index]);
            let mut variance = alpha * alpha * of_terms * sums.terms[index];
            for column in columns {
                let y = f64::from(self.y.row(row)[column]);
                let bias = self.bias(column);
                seen += signs[column] * y;
                exact += signs[column] * bias;
                variance += of_sum * y * y
                    + rounding(self.output, y)
                    + rounding(Format::F32, larger(y.abs(), bias.abs()));
            }
            (seen - exact) / variance.sqrt()
        });
        let each: Vec<f64> = each.collect();
        let squares: f64 = each.iter().map(|z| z * z).sum();
        let max = each.iter().fold(0.0, |most, z| larger(most, z.abs()));
        let rms = (squares / each.len() as f64).sqrt();
        Ok(Checksums { count: each.len(), of: CHECKED.min(width), rms, max })
    }

    fn by_value(&self) -> Result<Judgement, ComputeError> {
        let exam = self.exam()?;
        let marks = exam.marks();
        let bits = bits::look(self.x, self.w, &exam, &self.epilogue, self.chips, self.all)?;
        let search = |place: &Place| -> Result<Vec<Cause>, ComputeError> {
            let mut found = scale_bugs::search(self, &exam, place)?;
            if !found.iter().any(|cause| cause.named) {
                found.extend(causes::of_product(self, &exam, place)?);
            }
            Ok(found)
        };
        verdict(&exam, marks, Some(bits), search)
    }
}

/// The larger of two sizes, neither of which is NaN where the exam compares.
fn larger(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}
