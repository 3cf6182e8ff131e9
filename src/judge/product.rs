//! A product's dump judged: `y = alpha x w^T + bias` from the operands' codes.
//!
//! The operands are what the file holds, so they have no rounding error here: the floor
//! is the additions along K and the output's rounding. It opens no file.

use rayon::prelude::*;

use super::bits::{self, Epilogue};
use super::exam::{Exam, FLUSHED, Floor, deviation, excess, is_larger, rounding, z_of};
use super::{
    Cause, Checksums, Judgement, Place, Whole, causes, epilogue_bugs, k_bugs, looks, operand_bugs,
    scale_bugs, verdict,
};
use crate::compute::ComputeError;
use crate::compute::emulated::chip::{BlockScaled, CHIPS, Unit};
use crate::compute::emulated::identify::spread;
use crate::compute::product::{Exact, block_format, exact, signed_sums};
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

/// Deviations of a balanced sum up to which it leans to no sign.
const BALANCED: f64 = 3.0;

/// Products above which not every value is compared unless that is asked for.
const LARGE: usize = 1 << 31;
/// Rows and columns that are compared value by value then.
const SAMPLE: (usize, usize) = (64, 1024);
/// Causes that are told.
const MOST_CAUSES: usize = 3;
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

/// A way to add along K.
struct Adding {
    name: String,
    /// Its variance relative to `sum_k (x w)^2`.
    of_terms: f64,
    /// Its variance relative to the sum's square.
    of_sum: f64,
    /// What cutting products costs a sum that leans to one sign.
    lean: Option<Lean>,
    /// Whether its accumulator is narrow and cut, which makes sums smaller.
    truncates: bool,
}

/// Products are cut toward zero at the last place of the running sum. Where signs balance
/// these cuts cancel; of a sum that leans to one sign they take a share that grows with it.
struct Lean {
    /// The last place of a sum, relative.
    unit: f64,
    /// The share of K that is added in one chain.
    part: f64,
}

impl Lean {
    /// The variance of a sum of `inner` products.
    fn variance(&self, dot: f64, terms: f64, inner: usize) -> f64 {
        let beyond = dot.abs() * self.part - BALANCED * (terms * self.part).sqrt();
        if !(beyond > 0.0 && terms > 0.0) {
            return 0.0;
        }
        // Half of a last place for each product more of one sign; the sum grows to its end.
        let share = self.unit * beyond / (2.0 * (terms / inner as f64).sqrt());
        (if share < 1.0 { share } else { 1.0 } * dot).powi(2)
    }
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
        let floors =
            floors.into_iter().map(|Adding { name, of_terms, of_sum, lean, truncates }| {
                let sigma =
                    dots.par_iter().zip(&terms).enumerate().map(|(index, (&dot, &terms))| {
                        let leaning =
                            lean.as_ref().map_or(0.0, |l| l.variance(dot, terms, self.x.width));
                        let inner =
                            alpha * alpha * (of_terms * terms + of_sum * dot * dot + leaning);
                        let result = alpha * dot + self.bias(index % width);
                        // A sum that nearly cancels is rounded where its error lies.
                        let size = larger(result.abs(), inner.sqrt());
                        let before = larger((alpha * dot).abs(), size);
                        deviation(
                            inner + rounding(self.output, size) + rounding(Format::F32, before),
                        )
                    });
                Floor { name, sigma: sigma.collect(), truncates }
            });
        let floors = floors.collect();
        for (index, dot) in dots.iter_mut().enumerate() {
            *dot = alpha * *dot + self.bias(index % width);
        }
        Ok(Exam { y: self.y.clone(), output: self.output, truth: dots, floors })
    }

    /// Whether codes of 8 bits have no scale.
    fn lacks_scale(&self) -> bool {
        let bare = |codes: &CodedTensor| codes.format.is_scaled() && codes.scales.is_none();
        bare(self.x) || bare(self.w)
    }

    /// What sums of plain codes are multiplied with before alpha; nothing where that is not one
    /// number.
    pub(super) fn scale(&self) -> Option<f64> {
        let one = |codes: &CodedTensor| match &codes.scales {
            None => Some(1.0),
            Some(scales) => match scales.values.as_slice() {
                [only] => Some(f64::from(*only)),
                _ => None,
            },
        };
        Some(one(self.x)? * one(self.w)?)
    }

    pub(super) fn bias(&self, column: usize) -> f64 {
        self.epilogue.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]))
    }

    /// Ways to add along K, the finest first.
    ///
    /// In f32 each of K additions rounds the running sum: `ulp^2 / 12` of s is
    /// `s^2 u^2 / (8 ln 2)` on average, and a random walk that ends at y has
    /// `sum s^2 = K / 6 sum (x w)^2 + K / 3 y^2`; a chain one after the other is the
    /// worst order, so any order is within it. A tensor core adds blocks of products
    /// that are cut to R bits below their largest: as [`crate::compute::floor`] has it.
    fn accumulations(&self) -> Vec<Adding> {
        let inner = self.x.width;
        let step = F32_UNIT.powi(2) / (8.0 * std::f64::consts::LN_2);
        let length = inner as f64;
        // Products of two f32 are rounded before they are added, unless they are fused.
        let of_product = if self.x.format == Format::F32 { F32_UNIT.powi(2) / 3.0 } else { 0.0 };
        if [self.x.format, self.w.format] == [Format::Int8; 2] {
            // The sum is exact; its conversion to f32 and two scales are each rounded.
            return vec![Adding {
                name: "exact sums of integers, rounded to f32".to_owned(),
                of_terms: 0.0,
                of_sum: F32_UNIT.powi(2),
                lean: None,
                truncates: false,
            }];
        }
        let f32_terms = length / 6.0 * step + of_product;
        let f32_sum = length / 3.0 * step;
        let mut all = vec![Adding {
            name: "f32 additions in any order".to_owned(),
            of_terms: f32_terms,
            of_sum: f32_sum,
            lean: None,
            truncates: false,
        }];
        let mut chains: Vec<Adding> = Vec::new();
        for chip in CHIPS.iter().filter(|chip| self.chips.contains(&chip.name)) {
            let unit = match block_format(self.x) {
                Some(format) => chip.block_unit(format).map(|row| &row.unit),
                None => chip.unit(self.x.format, self.w.format),
            };
            let Some(Unit::TensorCore(core) | Unit::BlockScaled(BlockScaled { core, .. })) = unit
            else {
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
                let lean = Some(Lean { unit, part: chain as f64 / length });
                chains.push(Adding { name, of_terms, of_sum, lean, truncates: narrow });
            }
        }
        let size = |adding: &Adding| adding.of_terms + adding.of_sum;
        chains.sort_by(|a, b| size(b).total_cmp(&size(a)));
        // Of chips whose sums have the same name, the coarsest is enough.
        let mut kept: Vec<Adding> = Vec::new();
        for chain in chains {
            if !kept.iter().any(|known| known.name == chain.name) {
                kept.push(chain);
            }
        }
        all.extend(kept.into_iter().rev());
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
        let sound = checksums.within && !is_larger(checksums.larger);
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
        let Adding { of_terms, of_sum, lean, truncates, .. } =
            floors.iter().find(|adding| adding.name == floor).unwrap_or(&floors[0]);
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
                let terms = sums.terms[index] / CHECKED.min(width) as f64;
                let dot = (y - bias) / alpha;
                let leaning = lean.as_ref().map_or(0.0, |l| l.variance(dot, terms, self.x.width));
                seen += signs[column] * y;
                exact += signs[column] * bias;
                variance += of_sum * y * y
                    + FLUSHED
                    + alpha * alpha * leaning
                    + rounding(self.output, y)
                    + rounding(Format::F32, larger(y.abs(), bias.abs()));
            }
            let deviation = variance.sqrt();
            (((seen - exact) / deviation) as f32, (exact / deviation) as f32)
        });
        let (each, sizes): (Vec<f32>, Vec<f32>) = each.unzip();
        let z = z_of(&each, count, floor);
        let larger = if *truncates { excess(&each, &sizes, count) } else { 0.0 };
        let of = CHECKED.min(width);
        Ok(Checksums { count: each.len(), of, rms: z.rms, max: z.max, within: z.within, larger })
    }

    fn by_value(&self) -> Result<Judgement, ComputeError> {
        let exam = self.exam()?;
        let marks = exam.marks();
        let bits = bits::look(self.x, self.w, &exam, &self.epilogue, self.chips, self.all)?;
        let search = |place: &Place| -> Result<Vec<Cause>, ComputeError> {
            let mut found = self.causes(&exam, place)?;
            if self.lacks_scale() {
                // Any scale would fit some other scale that is not there.
                for cause in found.iter_mut().filter(|cause| cause.cause.contains("scale")) {
                    cause.named = false;
                }
            }
            Ok(found)
        };
        verdict(&exam, marks, Some(bits), search)
    }

    /// What the outputs look like: quick hypotheses on some of what is wrong, and where none
    /// is named, the fingerprints.
    fn causes(&self, exam: &Exam, place: &Place) -> Result<Vec<Cause>, ComputeError> {
        type Look<'l> = &'l dyn Fn() -> Result<Vec<Cause>, ComputeError>;
        let looks: [Look<'_>; 8] = [
            &|| Ok(epilogue_bugs::search(self, exam, place)),
            &|| Ok(looks::not_finite(exam, place)),
            &|| {
                let mut found = match self.lacks_scale() {
                    true => Vec::new(),
                    false => scale_bugs::search(self, exam, place)?,
                };
                found.extend(looks::functions(exam, place));
                Ok(looks::ranked(found))
            },
            &|| Ok(looks::places(exam, place)),
            &|| Ok(looks::lines(exam, place)),
            &|| k_bugs::search(self, exam, place),
            &|| operand_bugs::search(self, exam, place),
            &|| Ok(looks::of_lines(exam, place)),
        ];
        for look in looks {
            let mut found = look()?;
            if !found.is_empty() {
                found.truncate(MOST_CAUSES);
                return Ok(found);
            }
        }
        causes::of_product(self, exam, place)
    }
}

/// The larger of two sizes, neither of which is NaN where the exam compares.
fn larger(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::emulated::gemm::{Operand, gemm};
    use crate::compute::emulated::schedule::Schedule;
    use crate::compute::product::{codes, scales};
    use crate::judge::Answer;

    fn coded(seed: u64, [rows, width]: [usize; 2], format: Format, size: f64) -> CodedTensor {
        let mut random = Random::at(seed);
        let values = (0..rows * width).map(|_| (random.normal() * size) as f32);
        let code = |value: f32| format.encode(value).to_le_bytes()[..format.bytes()].to_vec();
        CodedTensor { format, rows, width, bytes: values.flat_map(code).collect(), scales: None }
    }

    fn product<'a>(
        x: &'a CodedTensor,
        w: &'a CodedTensor,
        y: Tensor,
        output: Format,
    ) -> Product<'a> {
        let epilogue = Epilogue { alpha: 1.0, bias: None };
        Product { x, w, y, output, epilogue, chips: &[ChipName::Hopper], all: false }
    }

    fn rounded(x: &CodedTensor, w: &CodedTensor, times: f64, output: Format) -> Tensor {
        let exact = exact(x, w).expect("a product");
        let values = exact.dots.iter().map(|dot| output.round((times * dot) as f32));
        Tensor::new(exact.width, values.collect())
    }

    /// As Hopper's FP8 accumulator adds, without promotion.
    fn truncated(x: &CodedTensor, w: &CodedTensor) -> Tensor {
        added(x, w, Format::Bf16)
    }

    /// As Hopper's tensor cores add, in one chain.
    fn added(x: &CodedTensor, w: &CodedTensor, output: Format) -> Tensor {
        scheduled(x, w, &Schedule::FAST, output)
    }

    fn scheduled(x: &CodedTensor, w: &CodedTensor, schedule: &Schedule, output: Format) -> Tensor {
        let hopper = CHIPS.iter().find(|chip| chip.name == ChipName::Hopper).expect("a chip");
        let unit = hopper.unit(x.format, w.format).expect("a unit");
        let (x_codes, w_codes) = (codes(x).expect("codes"), codes(w).expect("codes"));
        let x = Operand { codes: &x_codes, scales: scales(x).expect("scales") };
        let w = Operand { codes: &w_codes, scales: scales(w).expect("scales") };
        gemm(unit, schedule, &x, &w, output).expect("a product")
    }

    #[test]
    fn values_below_f32s_normal_range_may_be_flushed() {
        let x = coded(1, [8, 32], Format::F32, 1e-25);
        let w = coded(2, [16, 32], Format::F32, 1e-19);
        for y in [rounded(&x, &w, 1.0, Format::F32), Tensor::new(16, vec![0.0; 128])] {
            let marks = product(&x, &w, y, Format::F32).exam().expect("an exam").marks();
            assert!(marks.z.within && marks.z.rms < 1.0, "{:?}", marks.z);
        }
    }

    #[test]
    fn a_scale_that_is_too_large_is_no_truncation() {
        for inner in [4096, 16384] {
            let x = coded(3, [48, inner], Format::E4m3, 1.0);
            let w = coded(4, [64, inner], Format::E4m3, 1.0);
            let y = rounded(&x, &w, 1.02, Format::Bf16);
            let judged = product(&x, &w, y, Format::Bf16).by_value().expect("a judgement");
            assert_eq!(judged.answer, Answer::Wrong, "K {inner}: {}", judged.sentence);
            assert!(judged.sentence.contains("1.02 times"), "{}", judged.sentence);
        }
    }

    #[test]
    fn a_row_whose_scale_is_too_large_is_no_truncation_of_the_others() {
        let x = coded(5, [48, 8192], Format::E4m3, 1.0);
        let w = coded(6, [256, 8192], Format::E4m3, 1.0);
        let mut y = truncated(&x, &w).into_data();
        let right = rounded(&x, &w, 1.02, Format::Bf16);
        y[7 * 256..8 * 256].copy_from_slice(right.row(7));
        let y = Tensor::new(256, y);
        let judged = product(&x, &w, y, Format::Bf16).by_value().expect("a judgement");
        assert_eq!(judged.answer, Answer::Wrong, "{}", judged.sentence);
    }

    #[test]
    fn a_truncating_accumulator_is_within_its_own_floor() {
        for (seed, inner) in [(10, 512), (20, 1024), (30, 4096), (40, 8192), (50, 16384)] {
            for (more, size) in [(0, 1.0), (2, 0.05), (4, 30.0)] {
                let x = coded(seed + more, [24, inner], Format::E4m3, size);
                let w = coded(seed + more + 1, [32, inner], Format::E4m3, 0.5);
                let marks = product(&x, &w, truncated(&x, &w), Format::Bf16).exam();
                let marks = marks.expect("an exam").marks();
                assert!(marks.z.within, "K {inner}, size {size}: {:?}", marks.z);
            }
        }
    }

    #[test]
    fn a_promoted_and_scaled_product_is_within_rounding() {
        for (seed, inner) in [(110, 512), (120, 4096), (130, 16384)] {
            let mut x = coded(seed, [16, inner], Format::E4m3, 1.0);
            let w = coded(seed + 1, [24, inner], Format::E4m3, 1.0);
            x.scales = Some(crate::tensor_file::BlockScales::one(0.0123, 16, inner));
            let y = scheduled(&x, &w, &Schedule::PROMOTED, Format::Bf16);
            let marks = product(&x, &w, y, Format::Bf16).exam().expect("an exam").marks();
            assert!(marks.z.within && marks.larger.is_none(), "K {inner}: {:?}", marks.z);
        }
    }

    #[test]
    fn sums_of_one_sign_are_within_a_truncating_accumulators_floor() {
        let signed = |mut codes: CodedTensor, sign: u8| {
            codes.bytes.iter_mut().for_each(|code| *code = *code & 0x7f | sign);
            codes
        };
        for (seed, sign) in [(60, 0x00), (70, 0x80)] {
            let x = signed(coded(seed, [24, 4096], Format::E4m3, 1.0), 0);
            let w = signed(coded(seed + 1, [32, 4096], Format::E4m3, 1.0), sign);
            let marks = product(&x, &w, truncated(&x, &w), Format::Bf16).exam();
            let marks = marks.expect("an exam").marks();
            assert!(marks.z.within, "{:?}", marks.z);
        }
    }

    #[test]
    fn sums_of_one_sign_in_f32_are_within_a_tensor_cores_floor() {
        let positive = |seed, rows| {
            let mut codes = coded(seed, [rows, 4096], Format::Bf16, 1.0);
            codes.bytes.chunks_exact_mut(2).for_each(|code| code[1] &= 0x7f);
            codes
        };
        let (x, w) = (positive(80, 24), positive(90, 32));
        let y = added(&x, &w, Format::F32);
        let marks = product(&x, &w, y, Format::F32).exam().expect("an exam").marks();
        assert!(marks.z.within, "{:?}", marks.z);
    }

    #[test]
    fn a_column_outside_of_the_sample_that_is_a_little_too_large_is_seen_in_its_sums() {
        let x = coded(7, [512, 64], Format::Bf16, 1.0);
        let w = coded(8, [1100, 64], Format::Bf16, 1.0);
        let mut y = rounded(&x, &w, 1.0, Format::Bf16);
        let column = (0..1100).find(|c| !spread(1100, SAMPLE.1).contains(c)).expect("a column");
        for row in 0..512 {
            y.row_mut(row)[column] = Format::Bf16.round(y.row(row)[column] * 1.02);
        }
        let judged = product(&x, &w, y, Format::Bf16).by_sample().expect("a judgement");
        assert!(judged.is_none(), "{:?}", judged.map(|judged| judged.sentence));
    }

    #[test]
    fn of_a_large_product_it_is_said_what_was_sampled() {
        let x = coded(7, [80, 64], Format::Bf16, 1.0);
        let w = coded(8, [1100, 64], Format::Bf16, 1.0);
        let y = rounded(&x, &w, 1.0, Format::Bf16);
        let judged = product(&x, &w, y, Format::Bf16).by_sample().expect("a judgement");
        let judged = judged.expect("nothing to look at closely");
        let sampled = "all others are within rounding in sums of 64";
        assert!(judged.sentence.contains(sampled), "{}", judged.sentence);
        assert!(judged.in_text().contains("over all sampled values"), "{}", judged.in_text());
    }
}
