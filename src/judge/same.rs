//! Two tensors without an operation: b should be a.
//!
//! There are three answers: b holds a's values; or b is a rounded, or lies within a few steps
//! of it; or it is wrong, and then where, and what it looks like. It knows values, types and
//! shapes, and not what made them.

use serde::Serialize;

use super::exam::{Exam, Floor, NonFinite, Steps, last_place};
use super::looks::{self, towards_zero};
use super::operands::Operand;
use super::{Answer, Cause, Map, Place, causes, not_finite, operand_bugs, why};
use crate::compare::MOST_DEVIATIONS;
use crate::compare::fingerprints::head_permutation::interleaved;
use crate::compute::ComputeError;
use crate::compute::call::{Call, Held};
use crate::dtype::Format;
use crate::tensor::Tensor;
use crate::text::grouped;

/// Values above which the slow hypotheses look at a window around what is wrong.
const LARGE: usize = 1 << 21;
/// Rows and columns of that window.
const WINDOW: (usize, usize) = (256, 1024);
/// Deviations by which a common factor stands out of what differs by chance.
const SYSTEMATIC: f64 = 6.0;
/// The share of the difference that a common factor must explain to be one.
const MOST_OF_IT: f64 = 0.5;
/// Bounds of the counts that are told.
const COUNTED: [u64; 7] = [1, 2, 4, 8, 16, 64, 256];
/// Widths of heads that are tried.
const HEADS: [usize; 7] = [32, 64, 80, 96, 128, 192, 256];

/// What is said of two tensors.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The answer.
    pub answer: Answer,
    /// The answer in a sentence.
    pub sentence: String,
    /// All values of a.
    pub values: usize,
    /// The types of a and b; f32 values that are all bf16 or f16 count as that.
    pub formats: [Format; 2],
    /// How b follows from a in every bit, where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relation: Option<String>,
    /// The type whose steps are counted.
    pub step: Format,
    /// Steps that b may be off.
    pub allowed: u64,
    /// Differences in steps.
    pub steps: Steps,
    /// Values that differ by at most so many steps, for several numbers.
    pub counts: Vec<(u64, usize)>,
    /// The value that differs most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst: Option<Worst>,
    /// NaN and infinity on one side only.
    pub non_finite: NonFinite,
    /// Where b is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// What it looks like, the best first.
    pub causes: Vec<Cause>,
    /// A map of the errors, where something is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<Map>,
}

/// One value of both tensors.
#[derive(Clone, Debug, Serialize)]
pub struct Worst {
    /// Its index in the tensor's shape.
    pub index: Vec<usize>,
    /// What a has there.
    pub a: f32,
    /// What b has there.
    pub b: f32,
}

/// Steps by which two ways to compute the same may differ in a type: what is left of sums
/// in another order, of one more rounding on the way.
pub fn usual_steps(format: Format) -> u64 {
    match (format.bits(), format.fraction_bits()) {
        // Sums of integers are exact.
        _ if format == Format::Int8 => 1,
        // Elements of blocks.
        (..8, _) => 1,
        (_, ..10) => 2,
        (_, ..23) => 8,
        _ => 256,
    }
}

/// Compares b with a. `allowed` are the steps of the coarser type by which b may be off.
///
/// # Errors
/// If a hypothesis about what is wrong cannot be computed.
pub fn compare(a: &Operand, b: &Operand, allowed: Option<u64>) -> Result<Comparison, ComputeError> {
    let formats = [a.codes.format, b.codes.format];
    let step = match formats[0].fraction_bits() <= formats[1].fraction_bits() {
        true => formats[0],
        false => formats[1],
    };
    let (x, y) = (a.codes.values(), b.codes.values());
    let mut said = Comparison {
        answer: Answer::Wrong,
        sentence: String::new(),
        values: x.data().len(),
        formats,
        relation: None,
        step,
        allowed: allowed.unwrap_or(usual_steps(step)),
        steps: Steps::default(),
        counts: Vec::new(),
        worst: None,
        non_finite: NonFinite::default(),
        place: None,
        causes: Vec::new(),
        map: None,
    };
    if long(&a.shape) != long(&b.shape) {
        said.sentence = format!("wrong: {}", other_shape(a, b, &x, &y));
        return Ok(said);
    }
    if let Some((answer, relation)) = relation(&x, &y, formats) {
        said.answer = answer;
        said.sentence = match answer {
            Answer::ToTheBit => format!("to the bit: {relation}"),
            _ => format!("within rounding: {relation}"),
        };
        said.relation = Some(relation);
        return Ok(said);
    }
    let pair = Pair { a: &x, b: &y, said: &said };
    let (steps, counts) = pair.steps();
    let exam = pair.exam();
    let marks = exam.marks();
    let within = marks.non_finite.wrong() == 0 && steps.most <= said.allowed;
    let factor = systematic(&x, &y).filter(|_| within);
    let [row, column] = steps.most_at;
    said.worst = (steps.differ > 0).then(|| Worst {
        index: index_of(&a.shape, row * x.width() + column),
        a: x.row(row)[column],
        b: y.row(row)[column],
    });
    (said.steps, said.counts) = (steps, counts);
    said.non_finite = marks.non_finite.clone();
    if within && factor.is_none() {
        said.answer = Answer::WithinRounding;
        said.sentence = format!(
            "within rounding: b lies within {} of a: {}",
            said.so_many(said.steps.most),
            said.steps_in_words()
        );
        return Ok(said);
    }
    let place = Place::of(&exam, &marks);
    said.causes = search(&exam, &place, a, b)?;
    said.sentence = said.say_wrong(&exam, &marks.non_finite, &place);
    said.place = Some(place);
    said.map = Some(Map::of(&exam, &marks));
    Ok(said)
}

/// The shape without dimensions of one element.
fn long(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().filter(|&length| length != 1).collect()
}

fn index_of(shape: &[usize], mut flat: usize) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&length| {
            let at = flat % length.max(1);
            flat /= length.max(1);
            at
        })
        .collect();
    index.reverse();
    index
}

fn same(a: f32, b: f32) -> bool {
    a == b || a.is_nan() && b.is_nan()
}

fn all_same(a: impl Iterator<Item = f32>, b: &[f32]) -> bool {
    a.zip(b).all(|(a, &b)| same(a, b))
}

/// What can be said of tensors of different shapes.
fn other_shape(a: &Operand, b: &Operand, x: &Tensor, y: &Tensor) -> String {
    let shapes = format!("the shapes differ: a is {:?} and b {:?}", a.shape, b.shape);
    let (x_shape, y_shape) = ([x.rows(), x.width()], [y.rows(), y.width()]);
    let shorter = |most: usize, least: usize| if most < least { most } else { least };
    let (rows, width) = (shorter(x_shape[0], y_shape[0]), shorter(x_shape[1], y_shape[1]));
    let part = |t: &Tensor, row: usize, first: usize| t.row(row)[first..first + width].to_vec();
    let meets = |other: &Tensor, a_first: [usize; 2], b_first: [usize; 2]| {
        (0..rows).all(|row| {
            let from = part(x, a_first[0] + row, a_first[1]);
            all_same(from.into_iter(), &part(other, b_first[0] + row, b_first[1]))
        })
    };
    if x.data().len() == y.data().len() {
        let turned = (0..x.width()).flat_map(|column| (0..x.rows()).map(move |row| (row, column)));
        let turned = turned.map(|(row, column)| x.row(row)[column]);
        if x_shape == [y_shape[1], y_shape[0]] && all_same(turned, y.data()) {
            return format!("{shapes}; b is a transposed: its values are the same, turned round");
        }
        if all_same(x.data().iter().copied(), y.data()) {
            return format!(
                "{shapes}; both hold the same values in the same order: only the shape is another"
            );
        }
        let reversed: Vec<usize> = a.shape.iter().rev().copied().collect();
        let also = match reversed == b.shape {
            true => {
                "; the one is the other's with its dimensions reversed, and the values are not \
                     those of the transpose"
            }
            false => "; both hold as many values, and not the same ones in the same order",
        };
        return format!("{shapes}{also}");
    }
    let ends = [x_shape[0] - rows, x_shape[1] - width];
    let (smaller, larger) = match x_shape[0] >= y_shape[0] && x_shape[1] >= y_shape[1] {
        true => ("b", "a"),
        false => ("a", "b"),
    };
    if meets(y, [0, 0], [0, 0]) {
        return format!(
            "{shapes}; where both have values they are the same: {smaller} is the first {rows} \
             rows and {width} columns of {larger}"
        );
    }
    if smaller == "b" && meets(y, ends, [0, 0]) {
        return format!("{shapes}; b is a from row {} and column {} on", ends[0], ends[1]);
    }
    format!("{shapes}, and the values that both have are not the same")
}

/// How b follows from a in every bit, where it does.
fn relation(a: &Tensor, b: &Tensor, [of_a, of_b]: [Format; 2]) -> Option<(Answer, String)> {
    let all = match b.data().len() {
        1 => "the only value".to_owned(),
        many => format!("all {} values", grouped(many)),
    };
    if all_same(a.data().iter().copied(), b.data()) {
        let pairs = a.data().iter().zip(b.data());
        let signs = pairs.filter(|(a, b)| **a == 0.0 && a.to_bits() != b.to_bits()).count();
        let mut said = format!("b has a's values, {all}");
        if of_a != of_b {
            said += &format!("; a is {of_a}, and b holds them as {of_b}");
        }
        if signs > 0 {
            said += &format!("; {} of the zeros have the other sign", grouped(signs));
        }
        return Some((Answer::ToTheBit, said));
    }
    let sides = [("b", "a", a, b), ("a", "b", b, a)];
    // Of two types that hold the values the one with fewer bits says more.
    let formats = Format::FLOATS.into_iter().rev().filter(|format| *format != Format::F32);
    let formats: Vec<Format> = formats.collect();
    for (to, from, fine, coarse) in sides {
        for &format in &formats {
            for (how, rounding) in ROUNDINGS {
                let rounded = fine.data().iter().map(|&value| rounding(format, value));
                if all_same(rounded, coarse.data()) {
                    let said = format!("{to} is {from} rounded to {format}, {how}, in {all}");
                    return Some((Answer::WithinRounding, said));
                }
            }
        }
    }
    let half = |format: Format, value: f32| 0.5 * last_place(format, f64::from(value).abs());
    let both = of_a != of_b && of_a != Format::F32 && of_b != Format::F32;
    let near = |(&a, &b): (&f32, &f32)| {
        same(a, b) || (f64::from(a) - f64::from(b)).abs() <= half(of_a, a) + half(of_b, b)
    };
    if both && a.data().iter().zip(b.data()).all(near) {
        let said = format!(
            "a and b may be roundings of the same values, a to {of_a} and b to {of_b}: they lie \
             within half a step of each, in {all}"
        );
        return Some((Answer::WithinRounding, said));
    }
    for (to, from, fine, coarse) in sides {
        if let Some(format) = formats.iter().find(|format| neighbours(**format, fine, coarse)) {
            let said = format!(
                "{to} is {from} rounded to {format}, sometimes up and sometimes down (neither to \
                 the nearest nor towards zero), as stochastic rounding does, in {all}"
            );
            return Some((Answer::WithinRounding, said));
        }
    }
    None
}

type Rounding = fn(Format, f32) -> f32;

/// Ways to round, the commonest first.
const ROUNDINGS: [(&str, Rounding); 3] = [
    ("to nearest even", |format, value| format.round(value)),
    ("towards zero", |format, value| towards_zero(format, f64::from(value))),
    ("to nearest with ties away from zero", |format, value| {
        let down = towards_zero(format, f64::from(value));
        let up = beyond(format, down, value);
        let (value, down_by) = (f64::from(value), f64::from(down));
        if (f64::from(up) - value).abs() <= (value - down_by).abs() { up } else { down }
    }),
];

/// The next value of a format after `down`, away from zero on the side of `value`.
fn beyond(format: Format, down: f32, value: f32) -> f32 {
    if f64::from(down) == f64::from(value) || !down.is_finite() {
        return down;
    }
    let down = if down == 0.0 { 0.0f32.copysign(value) } else { down };
    match format {
        Format::F32 => value,
        Format::Tf32 => format.decode(down.to_bits() + 0x2000),
        _ => format.decode(format.encode(down) + 1),
    }
}

/// Whether each value is one of the two of a format beside a finer one.
fn neighbours(format: Format, fine: &Tensor, coarse: &Tensor) -> bool {
    fine.data().iter().zip(coarse.data()).all(|(&fine, &coarse)| {
        let down = towards_zero(format, f64::from(fine));
        same(down, coarse) || same(beyond(format, down, fine), coarse)
    })
}

/// The factor that b has, where differences that are small enough have one in common.
fn systematic(a: &Tensor, b: &Tensor) -> Option<f64> {
    let (mut dt, mut tt, mut dd, mut both) = (0.0, 0.0, 0.0, 0.0);
    for (&a, &b) in a.data().iter().zip(b.data()) {
        let (t, d) = (f64::from(a), f64::from(b) - f64::from(a));
        if t.is_finite() && d.is_finite() {
            (dt, tt, dd) = (dt + d * t, tt + t * t, dd + d * d);
            both += d * d * t * t;
        }
    }
    let stands_out = dt.abs() > SYSTEMATIC * f64::sqrt(both);
    let explains = dt * dt > MOST_OF_IT * dd * tt;
    (tt > 0.0 && stands_out && explains).then(|| 1.0 + dt / tt)
}

struct Pair<'a> {
    a: &'a Tensor,
    b: &'a Tensor,
    said: &'a Comparison,
}

impl Pair<'_> {
    /// The step of each value: at its own size or at its row's, whichever is larger.
    fn step_sizes(&self) -> impl Iterator<Item = f64> + '_ {
        (0..self.a.rows()).flat_map(move |row| {
            let row = self.a.row(row);
            let finite = row.iter().filter(|value| value.is_finite());
            let squares: f64 = finite.map(|&value| f64::from(value).powi(2)).sum();
            let typical = (squares / row.len() as f64).sqrt();
            row.iter().map(move |&value| {
                let size = f64::from(value).abs();
                last_place(self.said.step, if size > typical { size } else { typical })
            })
        })
    }

    fn steps(&self) -> (Steps, Vec<(u64, usize)>) {
        let (mut steps, width) = (Steps::default(), self.a.width());
        let mut counts: Vec<(u64, usize)> = COUNTED.iter().map(|&most| (most, 0)).collect();
        let pairs = self.a.data().iter().zip(self.b.data()).zip(self.step_sizes());
        for (index, ((&a, &b), step)) in pairs.enumerate() {
            if same(a, b) || !a.is_finite() || !b.is_finite() {
                continue;
            }
            let off = (f64::from(a) - f64::from(b)).abs();
            let distance = (off / step).ceil() as u64;
            steps.differ += 1;
            steps.by_one += usize::from(distance <= 1);
            counts.iter_mut().filter(|(most, _)| distance <= *most).for_each(|(_, n)| *n += 1);
            if distance > steps.most {
                (steps.most, steps.most_at) = (distance, [index / width, index % width]);
            }
        }
        (steps, counts)
    }

    /// b held to a, with the allowed steps as what rounding explains.
    fn exam(&self) -> Exam {
        let allowed = if self.said.allowed > 0 { self.said.allowed as f64 } else { 0.5 };
        let sigma = self.step_sizes().map(|step| (allowed * step / MOST_DEVIATIONS) as f32);
        let name = self.said.so_many(self.said.allowed);
        Exam {
            y: self.b.clone(),
            output: self.said.formats[1],
            truth: self.a.data().iter().map(|&a| f64::from(a)).collect(),
            floors: vec![Floor { name, sigma: sigma.collect(), truncates: false }],
        }
    }
}

/// What b looks like beside a.
fn search(
    exam: &Exam,
    place: &Place,
    a: &Operand,
    b: &Operand,
) -> Result<Vec<Cause>, ComputeError> {
    let quick: [&dyn Fn() -> Vec<Cause>; 8] = [
        &|| looks::not_finite(exam, place),
        &|| read_as_another(exam, a, b),
        &|| looks::functions(exam, place),
        &|| looks::places(exam, place),
        &|| of_heads(exam, place, &a.shape),
        &|| looks::lines(exam, place),
        &|| looks::of_lines(exam, place),
        &|| operand_bugs::conversions(&a.codes, exam, place),
    ];
    for look in quick {
        let found = look();
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let (rows, width) = (exam.y.rows(), exam.y.width());
    let window = |[first, _]: [usize; 2], most: usize, count: usize| {
        let whole = rows * width <= LARGE || count <= most;
        let first = if whole { 0 } else { first.min(count - most) };
        first..if whole { count } else { first + most }
    };
    let some_rows = window(place.row_span, WINDOW.0, rows);
    let some_columns = window(place.column_span, WINDOW.1, width);
    let cut = |t: &Tensor| t.some_rows(some_rows.clone()).columns(some_columns.clone());
    let x = cut(&a.codes.values());
    let some = Exam {
        y: cut(&exam.y),
        output: exam.output,
        truth: x.data().iter().map(|&a| f64::from(a)).collect(),
        floors: Vec::new(),
    };
    let identity = Call::Scale { x: &x, factor: 1.0, held: Held::Number };
    let recipe = super::single::recipe(exam.output);
    let mut found = causes::of_call(&identity, &some, &recipe)?;
    if some_rows.len() < rows || some_columns.len() < width {
        let from = format!(
            "; seen in rows {} to {} and columns {} to {}, and counted from there",
            some_rows.start,
            some_rows.end - 1,
            some_columns.start,
            some_columns.end - 1
        );
        found.iter_mut().for_each(|cause| cause.detail += &from);
    }
    Ok(found)
}

/// The same bytes, read as another type of the same width, or in the other order.
fn read_as_another(exam: &Exam, a: &Operand, b: &Operand) -> Vec<Cause> {
    let size = a.codes.format.bytes();
    let words = a.codes.bytes.chunks_exact(size);
    let code = |word: &[u8], swapped: bool| {
        let mut bytes = [0; 4];
        bytes[..size].copy_from_slice(word);
        if swapped {
            bytes[..size].reverse();
        }
        u32::from_le_bytes(bytes)
    };
    let of_a = a.codes.format;
    for format in Format::ALL.into_iter().filter(|f| f.bytes() == size && *f != Format::Tf32) {
        for swapped in [false, true] {
            if format == of_a && !swapped {
                continue;
            }
            let values = words.clone().map(|word| format.decode(code(word, swapped)));
            if all_same(values, exam.y.data()) {
                let order = if swapped { " with their bytes in the other order" } else { "" };
                let detail = format!(
                    "b is a's bytes{order}, which hold {of_a}, read as {format}{}",
                    if format == b.codes.format { "" } else { " and converted" }
                );
                let cause = "read-as-another-type".to_owned();
                return vec![Cause { cause, detail, explained: 1.0, named: true }];
            }
        }
    }
    Vec::new()
}

/// Values of heads in another order, or axes that were exchanged before the tensor was stored.
fn of_heads(exam: &Exam, place: &Place, shape: &[usize]) -> Vec<Cause> {
    let sample = looks::Sample::of(exam, place, (64, 256));
    let width = exam.y.width();
    let mut found = Vec::new();
    let from = |order: &[usize]| -> Vec<f64> {
        sample.each().map(|(row, column, ..)| exam.truth[row * width + order[column]]).collect()
    };
    for head in HEADS.into_iter().filter(|head| width.is_multiple_of(*head)) {
        let heads = width / head;
        let order = interleaved(width, heads);
        let mut back = vec![0; width];
        order.iter().enumerate().for_each(|(to, &from)| back[from] = to);
        let half = head / 2;
        let cause = "head-permutation";
        let detail = format!(
            "the halves of each head of {head} are interleaved: values i and i + {half} stand at \
             2i and 2i + 1"
        );
        found.extend(sample.guess(cause, detail, &from(&order)));
        let detail = format!(
            "the pairs of each head of {head} are taken apart: values 2i and 2i + 1 stand at i \
             and i + {half}"
        );
        found.extend(sample.guess(cause, detail, &from(&back)));
        if heads > 1 {
            let turned: Vec<usize> = (0..width).map(|at| at % heads * head + at / heads).collect();
            let detail =
                format!("[heads, width] of {heads} heads of {head} is stored as [width, heads]");
            found.extend(sample.guess(cause, detail, &from(&turned)));
            let mut back = vec![0; width];
            turned.iter().enumerate().for_each(|(to, &from)| back[from] = to);
            let detail =
                format!("[width, heads] is stored as [heads, width], {heads} heads of {head}");
            found.extend(sample.guess(cause, detail, &from(&back)));
            let reversed: Vec<usize> =
                (0..width).map(|at| (heads - 1 - at / head) * head + at % head).collect();
            let detail = format!("the {heads} heads of {head} stand in the reverse order");
            found.extend(sample.guess(cause, detail, &from(&reversed)));
        }
    }
    for axis in 1..shape.len().saturating_sub(1) {
        let [first, second] = [shape[axis - 1], shape[axis]];
        let inner: usize = shape[axis + 1..].iter().product();
        let values = sample.each().map(|(row, column, ..)| {
            let flat = row * width + column;
            let (outer, rest) = (flat / (first * second * inner), flat % (first * second * inner));
            let (written, within) = (rest / inner, rest % inner);
            // Written as [second, first].
            let (s, f) = (written / first, written % first);
            exam.truth[outer * first * second * inner + (f * second + s) * inner + within]
        });
        let predicted: Vec<f64> = values.collect();
        let detail = format!(
            "dimensions {} and {axis} were exchanged before b was stored, [{second}, {first}] \
             instead of [{first}, {second}]",
            axis - 1
        );
        found.extend(sample.guess("axes-exchanged", detail, &predicted));
    }
    looks::ranked(found)
}

/// A value in as few digits as tell it from all others.
fn exactly(value: f32) -> String {
    let plain = value == 0.0 || (1e-4..1e7).contains(&value.abs()) || !value.is_finite();
    if plain { format!("{value}") } else { format!("{value:e}") }
}

impl Comparison {
    fn so_many(&self, steps: u64) -> String {
        match steps {
            1 => format!("1 {} step", self.step),
            many => format!("{} {} steps", grouped(many as usize), self.step),
        }
    }

    fn steps_in_words(&self) -> String {
        let Steps { differ, by_one, most, .. } = &self.steps;
        let mut said = format!("{} of {} values differ", grouped(*differ), grouped(self.values));
        if *most > 1 && *by_one > 0 {
            said += &format!(", {} of them by 1 step at most", grouped(*by_one));
        }
        if let Some(Worst { index, a, b }) = &self.worst {
            said += &format!(
                "; the largest difference is {} at {index:?}, where a is {} and b {}",
                self.so_many(*most),
                exactly(*a),
                exactly(*b)
            );
        }
        said
    }

    fn say_wrong(&self, exam: &Exam, non_finite: &NonFinite, place: &Place) -> String {
        let mut parts = Vec::new();
        parts.extend(not_finite(non_finite));
        let [rows, columns] = &place.lines;
        let finite = |&(row, column): &(usize, usize)| {
            let index = row * exam.y.width() + column;
            !exam.is_strange(index) && exam.y.data()[index] != exam.truth[index] as f32
        };
        let mut inside = rows.iter().flat_map(|&r| columns.iter().map(move |&c| (r, c)));
        if inside.any(|at| finite(&at)) {
            parts.push(format!("{}: {}", place.in_words(), place.instead));
            parts.push(self.steps_in_words());
        }
        parts.push(why(&self.causes));
        format!("wrong: {}", parts.join("; "))
    }

    /// Everything that is known, in lines.
    pub fn in_text(&self) -> String {
        let mut text = format!("  {}\n\n", super::capitalised(&self.sentence));
        let mut line = |name: &str, value: String| text += &format!("  {name:<9} {value}\n");
        if self.relation.is_none() && (self.steps.differ > 0 || self.non_finite.wrong() > 0) {
            line("steps", self.steps_in_words());
            let step = self.step;
            line(
                "",
                format!(
                    "a step is from one {step} to the next, at the size of a's value or of its \
                     row's root mean square, whichever is larger"
                ),
            );
            let counts = self.counts.iter().map(|(most, n)| format!("{} by {most}", grouped(*n)));
            line("", format!("at most: {}", counts.collect::<Vec<_>>().join(", ")));
            line("allowed", format!("{}; `--ulps` changes it", self.so_many(self.allowed)));
        }
        if let Some(place) = &self.place {
            let (values, all) = (grouped(place.values), grouped(self.values));
            line(
                "where",
                format!(
                    "{}, {}: {values} of {all} values are further off, {:.0} % of that block",
                    place.rows,
                    place.columns,
                    100.0 * place.filled
                ),
            );
            line("how", place.instead.clone());
        }
        for cause in &self.causes {
            line("cause", cause.in_words());
        }
        if let Some(map) = &self.map {
            text += "\n";
            text += &map.in_text("largest difference over the allowed steps, times 7.5,");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rounding_is_told_from_the_others() {
        let a = Tensor::new(4, vec![1.0 + 1.0 / 256.0, -1.013, -7.7771, 1.0 + 3.0 / 256.0]);
        for (how, rounding) in ROUNDINGS {
            let b = a.data().iter().map(|&value| rounding(Format::Bf16, value)).collect();
            let b = Tensor::new(4, b);
            let (_, said) = relation(&a, &b, [Format::F32, Format::Bf16]).expect("a relation");
            assert!(said.contains(&format!("b is a rounded to bf16, {how},")), "{said}");
            let (_, said) = relation(&b, &a, [Format::Bf16, Format::F32]).expect("a relation");
            assert!(said.contains("a is b rounded to bf16"), "{said}");
        }
    }
}
