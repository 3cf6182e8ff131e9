//! A library's products of many drawn shapes, held to the plans that its own records give.
//!
//! It draws shapes and operands, predicts sampled outputs and counts; the library and its GPU are
//! behind [`Library`]. Operands are a function of a seed and of a place, so that a GPU makes them
//! itself and the CPU needs only the rows that it looks at (`compute/cuda/kernels/sweep.cu` has
//! the same function).

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::emulated::chip::Unit;
use super::emulated::gemm::{Operand, Scales};
use super::emulated::identify::identify;
use super::emulated::plan::{Plan, Record, STREAM_K, Types, plan_of};
use super::emulated::quantize::{CodeData, Codes};
use super::{ComputeError, check_interrupt};
use crate::dtype::Format;
use crate::op::Accumulate;
use crate::random::Random;
use crate::tensor::Tensor;

/// Rows of x and of w whose products are compared.
const SAMPLE: (usize, usize) = (4, 16);
/// Products that are asked for before the CPU's are computed.
const AT_ONCE: usize = 64;
/// The largest shape: N, M, K.
const LARGEST: [usize; 3] = [4096, 8192, 16_384];
/// Rows that a decoding step has at most.
const DECODED: usize = 64;

/// What values an operand has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Values {
    /// Four uniform numbers added: nearly normal.
    Bell,
    /// Every exponent of a wide range as often.
    Spread,
    /// Any finite code.
    Codes,
    /// Ones, and in each row of x one large value.
    MarkedX,
    /// Ones, and in each row of w one large value, negated.
    MarkedW,
}

/// The large value of [`Values::MarkedX`]: no sum of ones is seen beside it.
const MARK: f32 = (1u64 << 40) as f32;
/// In which column row `r` of a marked x has its mark: `r` times this, after the seed.
pub const MARK_STEP: usize = 37;

impl Values {
    /// As the kernel knows it.
    pub fn code(self) -> i32 {
        match self {
            Values::Bell => 0,
            Values::Spread => 1,
            Values::MarkedX => 2,
            Values::MarkedW => 3,
            Values::Codes => 4,
        }
    }
}

/// The code of one element of an operand whose rows have `width`.
pub fn code_at(
    format: Format,
    values: Values,
    seed: u64,
    [row, column]: [usize; 2],
    width: usize,
) -> u32 {
    let place = (row as u64) << 32 | column as u64;
    // One number of the stream that begins at the place.
    let hash = Random::at(seed ^ place.wrapping_mul(0xd134_2543_de82_ef95)).bits();
    let (high, low) = ((hash >> 32) as u32, hash as u32);
    match values {
        Values::Bell => {
            let sum = (high >> 16) + (high & 0xffff) + (low >> 16) + (low & 0xffff);
            // Exact: 18 bits, and a power of two.
            let value = (sum as i32 - 131_070) as f32;
            let value = value * if format.is_fp8() { 1.0 / 1024.0 } else { 1.0 / 65_536.0 };
            match format {
                Format::Tf32 => value.to_bits() & 0xffff_e000,
                _ => format.encode(value),
            }
        }
        Values::Spread => {
            let sign = high >> 31;
            let exponent = |count: u32| (high & 0xffff) % count;
            match format {
                Format::E4m3 => {
                    let code = low & 0xff;
                    if code & 0x7f == 0x7f { code ^ 1 } else { code }
                }
                Format::E5m2 => {
                    let code = low & 0xff;
                    if code & 0x7c == 0x7c { code ^ 0x40 } else { code }
                }
                Format::F16 => sign << 15 | (5 + exponent(10)) << 10 | low & 0x3ff,
                Format::Bf16 => sign << 15 | (111 + exponent(32)) << 7 | low & 0x7f,
                Format::Tf32 => sign << 31 | (111 + exponent(32)) << 23 | (low & 0x3ff) << 13,
                _ => sign << 31 | (111 + exponent(32)) << 23 | low & 0x7f_ffff,
            }
        }
        Values::Codes => {
            // The exponent's bits, and what makes a code finite whose bits are all set.
            let (code, exponent, flip) = match format {
                Format::E4m3 => (low & 0xff, 0x7f, 1),
                Format::E5m2 => (low & 0xff, 0x7c, 0x40),
                Format::F16 => (low & 0xffff, 0x7c00, 0x4000),
                Format::Bf16 => (low & 0xffff, 0x7f80, 0x4000),
                Format::Tf32 => (low & 0xffff_e000, 0x7f80_0000, 0x4000_0000),
                _ => (low, 0x7f80_0000, 0x4000_0000),
            };
            if code & exponent == exponent { code ^ flip } else { code }
        }
        Values::MarkedX
            if column as u64 == (row as u64 * MARK_STEP as u64 + seed) % width as u64 =>
        {
            format.encode(MARK)
        }
        Values::MarkedW if column as u64 == (row as u64 + seed) % width as u64 => {
            format.encode(-MARK)
        }
        Values::MarkedX | Values::MarkedW => format.encode(1.0),
    }
}

/// Some rows of an operand.
pub fn codes_of(
    format: Format,
    values: Values,
    seed: u64,
    rows: &[usize],
    width: usize,
) -> Result<Codes, ComputeError> {
    let places = rows.iter().flat_map(|&row| (0..width).map(move |column| [row, column]));
    let codes = places.map(|place| code_at(format, values, seed, place, width));
    let data = match format.bytes() {
        1 => CodeData::Bits8(codes.map(|code| code as u8).collect()),
        2 => CodeData::Bits16(codes.map(|code| code as u16).collect()),
        _ => CodeData::Bits32(codes.collect()),
    };
    Codes::new(format, rows.len(), width, data)
        .map_err(|error| ComputeError::Recipe(error.to_string()))
}

/// One product that a library is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// Its types.
    #[serde(flatten)]
    pub types: Types,
    /// N, M, K.
    pub shape: [usize; 3],
    /// What values the operands have: of x and of w.
    pub values: [Values; 2],
    /// The seeds of x and of w.
    pub seeds: [u64; 2],
    /// The scales of x and of w; 1 where the format has none.
    pub scales: [f32; 2],
}

/// The types that are swept over where a format is asked for.
fn types_of(format: Format) -> Vec<Types> {
    let accumulates: &[Accumulate] = if format.is_fp8() {
        &[Accumulate::Promoted, Accumulate::Fast]
    } else {
        &[Accumulate::Fast]
    };
    let outputs: &[Format] = match format {
        Format::F32 | Format::Tf32 => &[Format::F32],
        Format::F16 => &[Format::F16, Format::F32],
        _ => &[Format::Bf16, Format::F32],
    };
    let all = accumulates.iter().flat_map(|&accumulate| {
        outputs.iter().map(move |&output| Types { operands: format, accumulate, output })
    });
    all.collect()
}

/// What a sweep asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The formats, each as often.
    pub formats: Vec<Format>,
    /// Which shapes and operands.
    pub seed: u64,
    /// How many products.
    pub shapes: usize,
    /// The least and the most rows of x, where that is not as models have it: one half a decoding
    /// step's, one half more.
    pub tokens: Option<[usize; 2]>,
}

/// The question of that number in a sweep.
pub fn question(asked: &Asked, number: usize) -> Question {
    let Asked { formats, seed, .. } = asked;
    let mut random = Random::named(
        "runner 2026 chip sweep: shape",
        &[&seed.to_le_bytes(), &(number as u64).to_le_bytes()],
    );
    let format = formats[number % formats.len().max(1)];
    let types = types_of(format);
    let types = types[random.below(types.len())];
    // As many small ones as large ones.
    let mut between = |least: usize, most: usize| {
        let (least, most) = ((least as f64).ln(), (most as f64).ln());
        (least + (most - least) * random.unit()).exp().round() as usize
    };
    let decoding = (number / formats.len()).is_multiple_of(2);
    let usual = if decoding { [1, DECODED] } else { [DECODED, LARGEST[0]] };
    let [least, most] = asked.tokens.unwrap_or(usual);
    let tokens = between(least, most);
    let step = if format.is_fp8() { 16 } else { 8 };
    let outputs = between(16, LARGEST[1]).next_multiple_of(step);
    let inner = between(32, LARGEST[2]).next_multiple_of(step);
    let values = if random.below(2) == 0 { Values::Bell } else { Values::Spread };
    let mut scale = || if format.is_fp8() { (0.005 + 0.02 * random.unit()) as f32 } else { 1.0 };
    let scales = [scale(), scale()];
    Question {
        types,
        shape: [tokens, outputs.min(LARGEST[1]), inner.min(LARGEST[2])],
        values: [values; 2],
        seeds: [random.bits(), random.bits()],
        scales,
    }
}

/// What a library answered: its algorithm, and sampled outputs.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The record of the algorithm that it likes best.
    pub record: Record,
    /// The outputs of the sampled rows and columns.
    pub outputs: Tensor,
}

/// Something that multiplies, and says by which algorithm.
pub trait Library {
    /// The product's sampled outputs; none where the library offers no algorithm.
    ///
    /// # Errors
    /// If it fails.
    fn answer(
        &mut self,
        question: &Question,
        rows: &[usize],
        columns: &[usize],
    ) -> Result<Option<Answer>, ComputeError>;

    /// The unit that multiplies operands of a format there.
    ///
    /// # Errors
    /// If there is none.
    fn unit(&self, format: Format) -> Result<Unit, ComputeError>;
}

/// The sampled rows or columns: the first, the last, and some between them.
fn sampled(count: usize, most: usize, random: &mut Random) -> Vec<usize> {
    if count <= most {
        return (0..count).collect();
    }
    let mut places = vec![0, count - 1];
    while places.len() < most {
        let place = random.below(count);
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places.sort_unstable();
    places
}

/// One product, held to its plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checked {
    /// What was asked.
    #[serde(flatten)]
    pub question: Question,
    /// The algorithm.
    pub record: Record,
    /// The plan in words, or why there is none.
    pub plan: Result<String, String>,
    /// Outputs that were compared.
    pub compared: usize,
    /// Those whose bits differ from the plan's; all of them where there is none.
    pub differing: usize,
    /// Where the outputs are those of K without its tail: the elements that were added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_tail: Option<usize>,
    /// Where it differs: another schedule that gives every bit. It says where to look, no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fits: Option<String>,
    /// The sampled rows and columns, and what was returned there, as bits; where it differs also what
    /// was expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs: Option<Outputs>,
}

/// Sampled outputs of a product, row by row, as bits of f32.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outputs {
    /// The sampled rows.
    pub rows: Vec<usize>,
    /// The sampled columns.
    pub columns: Vec<usize>,
    /// By the plan; empty where there is none, or where it is the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expected: Vec<String>,
    /// By the library.
    pub observed: Vec<String>,
}

impl Outputs {
    /// The library's answer; none if a value is no hexadecimal number or one is missing.
    pub fn answer(&self, record: Record) -> Option<Answer> {
        let bits = self.observed.iter().map(|bits| u32::from_str_radix(bits, 16).ok());
        let values: Vec<f32> = bits.map(|bits| bits.map(f32::from_bits)).collect::<Option<_>>()?;
        let whole = values.len() == self.rows.len() * self.columns.len() && !values.is_empty();
        whole.then(|| Answer { record, outputs: Tensor::new(self.columns.len(), values) })
    }
}

/// Tiles of K whose last one, where it is not whole, a library is known to have left out.
const TAILS: [usize; 5] = [16, 32, 64, 128, 256];

/// Holds an answer to the plan of its record.
///
/// # Errors
/// If the product cannot be computed.
pub fn check(
    question: &Question,
    unit: &Unit,
    answer: &Answer,
    rows: &[usize],
    columns: &[usize],
) -> Result<Checked, ComputeError> {
    let Question { types, shape: [_, _, inner], .. } = *question;
    let operand = |place: usize, rows: &[usize]| {
        codes_of(types.operands, question.values[place], question.seeds[place], rows, inner)
    };
    let (x_codes, w_codes) = (operand(0, rows)?, operand(1, columns)?);
    let (x, w) = (scaled(&x_codes, question.scales[0]), scaled(&w_codes, question.scales[1]));
    let plan = plan_of(&answer.record, types, question.shape);
    let compared = answer.outputs.data().len();
    let bits = |y: &Tensor| y.data().iter().map(|y| format!("{:08x}", y.to_bits())).collect();
    let outputs = Outputs {
        rows: rows.to_vec(),
        columns: columns.to_vec(),
        expected: Vec::new(),
        observed: bits(&answer.outputs),
    };
    let mut checked = Checked {
        question: *question,
        record: answer.record,
        plan: plan.as_ref().map(Plan::to_string).map_err(String::clone),
        compared,
        differing: compared,
        without_tail: None,
        fits: None,
        outputs: Some(outputs),
    };
    if let Ok(plan) = &plan {
        let y = plan.product(unit, &x, &w, types.output)?;
        checked.differing = differing(&y, &answer.outputs);
        if checked.differing == 0 {
            return Ok(checked);
        }
        for tile in TAILS.into_iter().filter(|tile| inner > *tile && inner % tile != 0) {
            let kept = inner - inner % tile;
            let (x_short, w_short) = (without_tail(&x_codes, kept), without_tail(&w_codes, kept));
            let [x_scale, w_scale] = question.scales;
            let (x, w) = (scaled(&x_short, x_scale), scaled(&w_short, w_scale));
            let short = plan.product(unit, &x, &w, types.output)?;
            if differing(&short, &answer.outputs) == 0 {
                checked.without_tail = Some(kept);
                break;
            }
        }
        if let Some(outputs) = &mut checked.outputs {
            outputs.expected = bits(&y);
        }
    }
    let found = identify(unit, &x, &w, types.output, &answer.outputs)?;
    checked.fits = found.is_exact().then(|| found.schedule.to_string());
    Ok(checked)
}

/// The codes with zeros after the first `kept` of each row.
fn without_tail(codes: &Codes, kept: usize) -> Codes {
    let mut short = Codes::zeros(codes.format(), codes.rows(), codes.width());
    for row in 0..codes.rows() {
        short.row_mut(row).slice(0, kept).copy_from(codes.row(row).slice(0..kept));
    }
    short
}

fn scaled(codes: &Codes, scale: f32) -> Operand<'_> {
    Operand { codes, scales: Scales::Tensor(scale) }
}

/// Values whose bits differ; one NaN is as good as another.
fn differing(a: &Tensor, b: &Tensor) -> usize {
    let equal = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    a.data().iter().zip(b.data()).filter(|&(&a, &b)| !equal(a, b)).count()
}

/// Products of one kind of algorithm.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// Operands, accumulation and result.
    pub types: String,
    /// The algorithm's number, how K is cut and how the parts are added.
    pub algorithm: String,
    /// Products.
    pub shapes: usize,
    /// Outputs that were compared.
    pub compared: usize,
    /// Those that differ from the plan's.
    pub differing: usize,
    /// Outputs of products whose record has no plan.
    pub without_plan: usize,
}

/// What a sweep found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    /// Products that were computed.
    pub shapes: usize,
    /// Products for which the library offers no algorithm.
    pub not_offered: usize,
    /// Outputs that were compared.
    pub compared: usize,
    /// Outputs equal to the plan's.
    pub equal: usize,
    /// Outputs that differ from the plan's.
    pub differing: usize,
    /// Outputs of products whose record has no plan.
    pub without_plan: usize,
    /// Products whose outputs are those of K without its tail.
    pub without_tail: usize,
    /// By types and algorithm.
    pub families: Vec<Family>,
    /// Of each kind of algorithm the product with the fewest elements of K whose outputs are all equal.
    #[serde(default)]
    pub examples: Vec<Checked>,
    /// The products that differ or have no plan.
    pub unequal: Vec<Checked>,
}

/// A sweep; `progress` is told how many products were asked for.
///
/// # Errors
/// If the library or its GPU fails, or on the user's wish.
pub fn sweep(
    library: &mut dyn Library,
    asked: &Asked,
    mut progress: impl FnMut(usize),
) -> Result<Found, ComputeError> {
    let mut families: BTreeMap<Kind, (Family, Option<Checked>)> = BTreeMap::new();
    let mut found = Found::default();
    if asked.formats.is_empty() {
        return Err(ComputeError::Recipe("a sweep needs a format".to_owned()));
    }
    let shapes = asked.shapes;
    for first in (0..shapes).step_by(AT_ONCE) {
        let mut answers = Vec::new();
        for number in first..shapes.min(first + AT_ONCE) {
            check_interrupt()?;
            let question = question(asked, number);
            let mut random = Random::at(question.seeds[0] ^ question.seeds[1]);
            let [tokens, outputs, _] = question.shape;
            let rows = sampled(tokens, SAMPLE.0, &mut random);
            let columns = sampled(outputs, SAMPLE.1, &mut random);
            match library.answer(&question, &rows, &columns)? {
                Some(answer) => {
                    let unit = library.unit(question.types.operands)?;
                    answers.push((question, unit, answer, rows, columns));
                }
                None => found.not_offered += 1,
            }
        }
        let checked: Result<Vec<Checked>, ComputeError> = answers
            .par_iter()
            .map(|(question, unit, answer, rows, columns)| {
                check(question, unit, answer, rows, columns)
            })
            .collect();
        for checked in checked? {
            count(&mut families, &mut found, checked);
        }
        progress(shapes.min(first + AT_ONCE));
    }
    for (family, example) in families.into_values() {
        found.families.push(family);
        found.examples.extend(example);
    }
    Ok(found)
}

/// How the algorithms of a record are told apart in a table.
fn kind_of(record: &Record) -> String {
    let cut = match record.split_k {
        STREAM_K => "stream-K",
        0 | 1 => "one part",
        _ => "split-K",
    };
    format!("{:>3} {cut}, reduction {}", record.id, record.reduction)
}

/// Types in words.
pub fn types_in_words(types: &Types) -> String {
    let accumulate = match (types.operands.is_fp8(), types.accumulate) {
        (false, _) => "",
        (true, Accumulate::Fast) => " fast",
        (true, Accumulate::Promoted) => " promoted",
    };
    format!("{}{accumulate} to {}", types.operands, types.output)
}

/// What products are counted by: their types and the kind of their algorithm.
type Kind = (String, String);

fn count(
    families: &mut BTreeMap<Kind, (Family, Option<Checked>)>,
    found: &mut Found,
    checked: Checked,
) {
    let (types, algorithm) = (types_in_words(&checked.question.types), kind_of(&checked.record));
    let (family, example) = families
        .entry((types.clone(), algorithm.clone()))
        .or_insert_with(|| (Family { types, algorithm, ..Family::default() }, None));
    let (differing, without_plan) = match checked.plan {
        Ok(_) => (checked.differing, 0),
        Err(_) => (0, checked.compared),
    };
    family.shapes += 1;
    family.compared += checked.compared;
    family.differing += differing;
    family.without_plan += without_plan;
    found.shapes += 1;
    found.compared += checked.compared;
    found.differing += differing;
    found.without_plan += without_plan;
    found.equal += checked.compared - differing - without_plan;
    found.without_tail += usize::from(checked.without_tail.is_some());
    let inner = |checked: &Checked| checked.question.shape[2];
    if differing + without_plan > 0 {
        found.unequal.push(checked);
    } else if example.as_ref().is_none_or(|kept| inner(&checked) < inner(kept)) {
        *example = Some(checked);
    }
}

/// In which order one algorithm adds, as a table: what is left of ones where two large values of
/// opposite sign stand among them. What lies between the two in the order is lost.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrderTable {
    /// Its types.
    #[serde(flatten)]
    pub types: Types,
    /// N, M, K.
    pub shape: [usize; 3],
    /// The algorithm.
    pub record: Record,
    /// The element of K at which the large value of each row of x stands.
    pub marks: Vec<usize>,
    /// For each of them: the sum where w has its own at element 0, 1, 2 and so on.
    pub left: Vec<Vec<f32>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::emulated::chip::chip;
    use crate::op::ChipName;

    /// A library that computes as the plan says, but for what is planted.
    struct Planned {
        /// Elements of K that it leaves out where K is cut.
        tail: usize,
        /// The place of an output with another bit, in each product.
        flipped: Option<usize>,
    }

    impl Library for Planned {
        fn answer(
            &mut self,
            question: &Question,
            rows: &[usize],
            columns: &[usize],
        ) -> Result<Option<Answer>, ComputeError> {
            let Question { types, shape: [tokens, _, inner], values, seeds, .. } = *question;
            if tokens == 1 {
                return Ok(None);
            }
            let split_k = if inner >= 1024 { 2 } else { 1 };
            let record = Record {
                id: if types.operands == Format::Tf32 { 21 } else { 66 },
                tile: 10,
                stages: 6,
                split_k,
                reduction: if split_k > 1 { 2 } else { 0 },
                custom: 0,
                inner_shape: 0,
                cluster_shape: 0,
                workspace: 0,
            };
            let codes = |place: usize, rows| {
                let codes = codes_of(types.operands, values[place], seeds[place], rows, inner)?;
                let kept = if split_k > 1 { inner - inner % self.tail } else { inner };
                Ok::<Codes, ComputeError>(without_tail(&codes, kept))
            };
            let (x, w) = (codes(0, rows)?, codes(1, columns)?);
            let plan = plan_of(&record, types, question.shape).expect("a plan");
            let (x, w) = (scaled(&x, question.scales[0]), scaled(&w, question.scales[1]));
            let mut outputs = plan.product(&self.unit(types.operands)?, &x, &w, types.output)?;
            if let Some(place) = self.flipped {
                let value = &mut outputs.data_mut()[place];
                *value = f32::from_bits(value.to_bits() ^ 1 << 16);
            }
            Ok(Some(Answer { record, outputs }))
        }

        fn unit(&self, format: Format) -> Result<Unit, ComputeError> {
            Ok(library_unit(format))
        }
    }

    fn library_unit(format: Format) -> Unit {
        *chip(ChipName::Hopper).unit(format, format).expect("hopper has all")
    }

    const SWEPT: [Format; 4] = [Format::E4m3, Format::Bf16, Format::F16, Format::Tf32];

    fn asked(seed: u64) -> Asked {
        Asked { formats: SWEPT.to_vec(), seed, shapes: 0, tokens: None }
    }

    fn swept(library: &mut Planned, shapes: usize) -> Found {
        let mut done = 0;
        let asked = Asked { shapes, ..asked(3) };
        let found = sweep(library, &asked, |so_far| done = so_far).expect("a sweep");
        assert_eq!(done, shapes, "every product was asked for");
        assert_eq!(found.shapes + found.not_offered, shapes);
        assert_eq!(found.equal + found.differing + found.without_plan, found.compared);
        found
    }

    #[test]
    fn a_library_that_keeps_to_its_plans_has_every_output_equal() {
        let found = swept(&mut Planned { tail: 1, flipped: None }, 100);
        assert_eq!((found.differing, found.without_plan), (0, 0), "{:?}", found.unequal);
        assert!(found.not_offered > 0 && found.compared > 4000, "{found:?}");
        assert!(found.families.iter().any(|family| family.algorithm.contains("split-K")));
        assert_eq!(found.examples.len(), found.families.len());
        for example in &found.examples {
            let unit = library_unit(example.question.types.operands);
            let outputs = example.outputs.as_ref().expect("an example keeps its outputs");
            let answer = outputs.answer(example.record).expect("bits");
            let again = check(&example.question, &unit, &answer, &outputs.rows, &outputs.columns);
            assert_eq!(again.expect("a product").differing, 0);
        }
    }

    #[test]
    fn one_bit_is_found_in_each_product_and_listed_with_its_outputs() {
        let found = swept(&mut Planned { tail: 1, flipped: Some(3) }, 30);
        assert_eq!(found.differing, found.shapes);
        let first = &found.unequal[0];
        assert_eq!((first.differing, first.without_tail, &first.fits), (1, None, &None));
        let outputs = first.outputs.as_ref().expect("its outputs");
        let differ: Vec<usize> = (0..outputs.expected.len())
            .filter(|&at| outputs.expected[at] != outputs.observed[at])
            .collect();
        assert_eq!(differ, [3]);
        let json = serde_json::to_string(&found).expect("JSON");
        let again: Found = serde_json::from_str(&json).expect("what was written");
        assert_eq!(serde_json::to_string(&again).expect("JSON"), json);
    }

    #[test]
    fn a_tail_of_k_that_is_left_out_is_named() {
        let found = swept(&mut Planned { tail: 64, flipped: None }, 100);
        let lost: Vec<&Checked> =
            found.unequal.iter().filter(|checked| checked.without_tail.is_some()).collect();
        assert!(lost.len() > 5, "{} of {}", lost.len(), found.shapes);
        assert_eq!(found.without_tail, lost.len());
        for checked in lost {
            let inner = checked.question.shape[2];
            let kept = checked.without_tail.expect("named");
            assert!(kept < inner && inner - kept <= 64, "{kept} of {inner}");
        }
    }

    #[test]
    fn questions_are_of_the_seed_and_fit_the_library() {
        let mut decoding = 0;
        for number in 0..2000 {
            let drawn = question(&asked(1), number);
            assert_eq!(drawn, question(&asked(1), number));
            let [tokens, outputs, inner] = drawn.shape;
            let step = if drawn.types.operands.is_fp8() { 16 } else { 8 };
            assert!(outputs.is_multiple_of(step) && inner.is_multiple_of(step), "{drawn:?}");
            assert!(tokens >= 1 && tokens <= LARGEST[0], "{drawn:?}");
            assert!(outputs <= LARGEST[1] && inner <= LARGEST[2], "{drawn:?}");
            decoding += usize::from(tokens <= DECODED);
        }
        assert!((900..1200).contains(&decoding), "{decoding}");
        assert_ne!(question(&asked(1), 5), question(&asked(2), 5));
        let few = Asked { tokens: Some([3, 5]), ..asked(1) };
        let tokens = (0..100).map(|number| question(&few, number).shape[0]);
        assert_eq!(tokens.collect::<std::collections::BTreeSet<usize>>(), [3, 4, 5].into());
    }

    #[test]
    fn operands_are_finite_and_as_wide_as_they_should_be() {
        for format in Format::FLOATS {
            for values in [Values::Bell, Values::Spread, Values::Codes] {
                let codes = codes_of(format, values, 9, &[0, 5], 3000).expect("codes");
                let drawn = [codes.decode_row(0), codes.decode_row(1)].concat();
                assert!(drawn.iter().all(|value| value.is_finite()), "{format} {values:?}");
                let exponents: std::collections::BTreeSet<u32> =
                    drawn.iter().map(|value| value.to_bits() >> 23 & 0xff).collect();
                let least = match values {
                    Values::Spread => 10,
                    _ => 5,
                };
                assert!(exponents.len() >= least, "{format} {values:?}: {}", exponents.len());
                let negative = drawn.iter().filter(|value| value.is_sign_negative()).count();
                assert!((2600..3400).contains(&negative), "{format} {values:?}: {negative}");
            }
        }
    }
}
