//! What wrong values look like beside the right ones: a function of the right value, a
//! constant of each line, or right values in other places.
//!
//! It knows values, exact values and where they differ; no operands and no op. A guess is
//! computed on some of the wrong rows and columns only.

use super::Cause;
use super::exam::{Exam, rounding};
use super::place::Place;
use crate::compare::MOST_DEVIATIONS;
use crate::compare::fingerprints::gain::factor_of;
use crate::compare::fingerprints::permuted_outputs::{how, said};
use crate::compute::emulated::identify::spread;
use crate::dtype::Format;
use crate::text::{number, values_are};

/// Rows and columns on which a guess is computed.
const SAMPLE: (usize, usize) = (96, 192);
/// The share of the difference that a guess must explain to be named.
const EXPLAINED: f64 = 0.99;
/// The share that it must explain where rounding explains the rest.
const MOST_OF_IT: f64 = 0.5;
/// The root mean square of what is left, over the floor, that rounding explains.
const WITHIN: f64 = 1.5;
/// Values that a guess must foretell at least.
const LEAST: usize = 8;
/// Pairs of lines that are compared at most.
const MOST_COMPARED: usize = 1 << 26;
/// Steps by which lines are shifted, and the other way.
const SHIFTS: [usize; 12] = [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
/// Blocks of columns or rows that may share a factor.
const BLOCKS: [usize; 4] = [128, 64, 32, 16];
/// Lines that are named; more are told by their number.
const SHOWN: usize = 3;

/// Some of the wrong rows and columns of outputs.
pub(super) struct Sample<'a> {
    exam: &'a Exam,
    sigma: &'a [f32],
    /// The rows.
    pub rows: Vec<usize>,
    /// The columns.
    pub columns: Vec<usize>,
}

/// How well a guess fits.
#[derive(Clone, Copy)]
pub(super) struct Weight {
    /// The share of the difference that it explains.
    pub share: f64,
    /// Whether that is enough to give it its name.
    pub named: bool,
}

impl<'a> Sample<'a> {
    /// Some of the lines of a place.
    pub fn of(exam: &'a Exam, place: &Place, (rows, columns): (usize, usize)) -> Sample<'a> {
        let some = |lines: &[usize], most: usize| -> Vec<usize> {
            spread(lines.len(), most).into_iter().map(|at| lines[at]).collect()
        };
        let [in_rows, in_columns] = &place.lines;
        // Of few rows more columns are looked at, and the other way round.
        let most = rows * columns;
        let rows = some(in_rows, rows.max(most / in_columns.len().max(1)));
        let columns = some(in_columns, columns.max(most / rows.len().max(1)));
        let sigma = exam.floors.last().map_or(&[][..], |floor| &floor.sigma);
        Sample { exam, sigma, rows, columns }
    }

    /// Row, column, output and exact value of each place.
    pub fn each(&self) -> impl Iterator<Item = (usize, usize, f64, f64)> + '_ {
        self.rows.iter().flat_map(move |&row| {
            self.columns.iter().map(move |&column| {
                let index = row * self.exam.y.width() + column;
                (row, column, f64::from(self.exam.y.data()[index]), self.exam.truth[index])
            })
        })
    }

    /// How well predicted values fit, in the order of [`Sample::each`].
    pub fn weigh(&self, predicted: &[f64]) -> Weight {
        self.weigh_where(predicted, &|_, _| true)
    }

    /// The same on the places that count.
    fn weigh_where(&self, predicted: &[f64], counts: &dyn Fn(usize, usize) -> bool) -> Weight {
        let (mut plain, mut rounded, mut whole) = (0.0, 0.0, 0.0);
        let (mut of_p, mut of_t, mut of_y) = (0.0, 0.0, 0.0);
        let (mut places, mut foretold) = (Vec::with_capacity(predicted.len()), 0usize);
        let none = Weight { share: 0.0, named: false };
        for ((row, column, y, truth), &p) in self.each().zip(predicted) {
            if !counts(row, column) {
                continue;
            }
            let narrow = f64::from(self.exam.output.round(p as f32));
            if !y.is_finite() || !narrow.is_finite() {
                // What is finite on one side only is no near miss.
                match narrow == y || narrow.is_nan() && y.is_nan() {
                    true => foretold += usize::from(truth.is_finite()),
                    false => return none,
                }
                continue;
            }
            if !truth.is_finite() {
                continue;
            }
            plain += (y - p).powi(2);
            rounded += (y - narrow).powi(2);
            whole += (y - truth).powi(2);
            (of_p, of_t, of_y) = (of_p + p * p, of_t + truth * truth, of_y + y * y);
            places.push((row * self.exam.y.width() + column, y, p, narrow));
        }
        let count = places.len();
        // A few values are met by chance.
        if count < LEAST || whole.is_nan() || whole <= 0.0 && foretold == 0 {
            return none;
        }
        let rest = if rounded < plain { rounded } else { plain };
        // Where outputs are small, anything small is near: they must be explained themselves.
        let whole = if of_y > 0.0 && of_y < whole { of_y } else { whole };
        let share = if whole > 0.0 { 1.0 - rest / whole } else { 0.0 };
        // What is larger than the exact values has larger errors.
        let larger = if of_t > 0.0 && of_p > of_t { of_p / of_t } else { 1.0 };
        let z2 = places.iter().map(|&(index, y, p, narrow)| {
            let sigma = f64::from(self.sigma.get(index).copied().unwrap_or(0.0));
            let variance = sigma * sigma * larger + rounding(self.exam.output, p);
            let off = if rounded < plain { y - narrow } else { y - p };
            off * off / variance
        });
        let within = (z2.sum::<f64>() / count as f64).sqrt() <= WITHIN;
        if foretold > 0 && within {
            return Weight { share: 1.0, named: true };
        }
        Weight { share, named: share >= EXPLAINED || within && share >= MOST_OF_IT }
    }

    /// A guess as a cause, where it is to be named.
    pub fn guess(
        &self,
        cause: &str,
        detail: impl Into<String>,
        predicted: &[f64],
    ) -> Option<Cause> {
        told(self.weigh(predicted), cause, detail.into())
    }

    /// A guess that is a function of place and exact value.
    pub fn guess_of(
        &self,
        cause: &str,
        detail: impl Into<String>,
        value: impl Fn(usize, usize, f64) -> f64,
    ) -> Option<Cause> {
        let predicted: Vec<f64> =
            self.each().map(|(row, column, _, t)| value(row, column, t)).collect();
        self.guess(cause, detail, &predicted)
    }
}

fn told(Weight { share, named }: Weight, cause: &str, detail: String) -> Option<Cause> {
    named.then(|| Cause { cause: cause.to_owned(), detail, explained: share, named })
}

/// The best of some guesses stands first; of those that explain as much, the earlier one.
pub(super) fn ranked(mut causes: Vec<Cause>) -> Vec<Cause> {
    /// Shares closer than this do not decide.
    const TIE: f64 = 2e-3;
    let mut ranked: Vec<Cause> = Vec::new();
    while !causes.is_empty() {
        let most = causes
            .iter()
            .map(|cause| cause.explained)
            .fold(f64::MIN, |a, b| if b > a { b } else { a });
        let Some(best) = causes.iter().position(|cause| cause.explained >= most - TIE) else {
            break;
        };
        ranked.push(causes.remove(best));
    }
    ranked
}

/// Functions of the right value: a factor, an offset, an activation, a limit, a rounding.
pub(super) fn functions(exam: &Exam, place: &Place) -> Vec<Cause> {
    let sample = Sample::of(exam, place, SAMPLE);
    let output = exam.output;
    let mut found: Vec<Cause> = Vec::new();
    let finite = || sample.each().filter(|(.., y, t)| y.is_finite() && t.is_finite());
    let count = finite().count();
    if count < 2 {
        return found;
    }
    let (mut yt, mut tt, mut off, mut most) = (0.0, 0.0, 0.0, 0.0);
    for (.., y, t) in finite() {
        (yt, tt, off) = (yt + y * t, tt + t * t, off + y - t);
        most = if y.abs() > most { y.abs() } else { most };
    }
    let first = finite().next().map_or(0.0, |(.., y, _)| y);
    if finite().all(|(.., y, _)| y == first) {
        let (cause, detail) = match first == 0.0 {
            true => ("unwritten", unwritten(exam, place)),
            false => ("constant", format!("every value there is {}", number(first))),
        };
        return sample.guess_of(cause, detail, |_, _, _| first).into_iter().collect();
    }
    found.extend(sample.guess_of(
        "sign-flipped",
        "every value there has the other sign",
        |_, _, t| -t,
    ));
    let factor = yt / tt;
    if factor.is_finite() && factor.abs() > 1e-3 && (factor + 1.0).abs() > 1e-3 {
        let detail = format!("every output{} is {}", confined(exam, place), factor_of(factor));
        let name = match (place.lines[0].len(), place.lines[1].len()) {
            (1, _) if exam.y.rows() > 1 => "row-scale",
            (_, 1) if exam.y.width() > 1 => "column-scale",
            _ => "scale-wrong",
        };
        found.extend(sample.guess_of(name, detail, |_, _, t| factor * t));
    }
    found.extend(sample.guess_of(
        "activation",
        "negative values are zero, as ReLU leaves them",
        |_, _, t| if t > 0.0 { t } else { 0.0 },
    ));
    type Function = fn(f64) -> f64;
    let activations: [(&str, Function); 3] = [
        ("SiLU, x / (1 + exp(-x)), was applied to the result", |t| t / (1.0 + libm::exp(-t))),
        ("GELU (with tanh) was applied to the result", |t| {
            0.5 * t * (1.0 + libm::tanh(0.797_884_560_802_865_4 * (t + 0.044715 * t * t * t)))
        }),
        ("GELU (with erf) was applied to the result", |t| {
            0.5 * t * (1.0 + libm::erf(t / std::f64::consts::SQRT_2))
        }),
    ];
    for (detail, function) in activations {
        found.extend(sample.guess_of("activation", detail, |_, _, t| function(t)));
    }
    found.extend(sample.guess_of(
        "sign-lost",
        "values are the magnitudes of the right ones",
        |_, _, t| t.abs(),
    ));
    // A limit is met by several values, and passed by exact ones.
    let met = finite().filter(|(.., y, _)| y.abs() == most).count();
    let passed = sample.each().filter(|(.., t)| t.abs() > most * 1.001).count();
    if met > 2 && passed >= met / 2 {
        let detail = format!("values are clipped at {}: larger ones saturate there", number(most));
        found.extend(sample.guess_of("clipped", detail, |_, _, t| t.clamp(-most, most)));
    }
    let mean = off / count as f64;
    let side = if mean < 0.0 { "subtracted from" } else { "added to" };
    let detail = format!("the constant {} is {side} every value there", number(mean.abs()));
    found.extend(sample.guess_of("offset", detail, |_, _, t| t + mean));
    // A tf32 is kept in 32 bits.
    let formats = Format::FLOATS.into_iter().filter(|format| match format {
        Format::F32 => false,
        Format::Tf32 => output == Format::F32,
        _ => true,
    });
    for format in formats {
        if format != output && format.fraction_bits() < output.fraction_bits().max(8) {
            let round = |t: f64| f64::from(output.round(format.round(t as f32)));
            let detail = match output {
                Format::F32 => format!("the result is rounded to {format}"),
                _ => format!("the result is rounded to {format} before it is rounded to {output}"),
            };
            found.extend(sample.guess_of("output-rounded", detail, |_, _, t| round(t)));
        }
        if format.fraction_bits() <= output.fraction_bits() {
            let detail = format!("the result is truncated to {format}: rounded towards zero");
            let cut = |t: f64| f64::from(output.round(towards_zero(format, t)));
            found.extend(sample.guess_of("output-truncated", detail, |_, _, t| cut(t)));
        }
    }
    ranked(found)
}

/// How many values of a place are zero where they must not be, and the first one.
fn unwritten(exam: &Exam, place: &Place) -> String {
    let width = exam.y.width();
    let [rows, columns] = &place.lines;
    let lines = rows.iter().flat_map(|&row| columns.iter().map(move |&column| [row, column]));
    let zero = |&[row, column]: &[usize; 2]| {
        exam.y.row(row)[column] == 0.0 && exam.truth[row * width + column] != 0.0
    };
    let mut zeros = lines.filter(zero);
    let Some([row, column]) = zeros.next() else { return String::new() };
    format!("{} zero, the first at [{row}, {column}]", values_are(1 + zeros.count()))
}

/// A value of a format that is not larger in magnitude: the nearest such.
pub(super) fn towards_zero(format: Format, value: f64) -> f32 {
    let nearest = format.round(value as f32);
    if !nearest.is_finite() {
        return if value.is_finite() {
            format.max_finite().copysign(value as f32)
        } else {
            nearest
        };
    }
    if f64::from(nearest).abs() <= value.abs() {
        return nearest;
    }
    // Codes of one sign order like their magnitudes.
    match format {
        Format::Tf32 => format.decode(nearest.to_bits() - 0x2000),
        _ => format.decode(format.encode(nearest) - 1),
    }
}

/// ` there`, unless a place is everything.
fn confined(exam: &Exam, place: &Place) -> &'static str {
    let all = place.lines[0].len() == exam.y.rows() && place.lines[1].len() == exam.y.width();
    if all { "" } else { " there" }
}

/// A constant or a factor of each column, row, or block of them.
pub(super) fn of_lines(exam: &Exam, place: &Place) -> Vec<Cause> {
    let sample = Sample::of(exam, place, SAMPLE);
    let mut found = Vec::new();
    for by_row in [false, true] {
        let (lines, noun) = match by_row {
            true => (&sample.rows, "row"),
            false => (&sample.columns, "column"),
        };
        let across = if by_row { sample.columns.len() } else { sample.rows.len() };
        if lines.len() < 2 || across < 4 {
            continue;
        }
        let of = |row: usize, column: usize| if by_row { row } else { column };
        // Numbers are fitted on every second value of a line, and must hold on the others.
        let trains = |row: usize, column: usize| (row + column).is_multiple_of(2);
        let count = if by_row { exam.y.rows() } else { exam.y.width() };
        for block in BLOCKS.into_iter().chain([1]).filter(|block| *block == 1 || 2 * block <= count)
        {
            let groups = count.div_ceil(block);
            let (mut yt, mut tt) = (vec![0.0; groups], vec![0.0; groups]);
            let (mut off, mut many) = (vec![0.0; groups], vec![0usize; groups]);
            for (row, column, y, t) in sample.each() {
                let group = of(row, column) / block;
                if y.is_finite() && t.is_finite() && trains(row, column) {
                    yt[group] += y * t;
                    tt[group] += t * t;
                    off[group] += y - t;
                    many[group] += 1;
                }
            }
            let factor = |group: usize| if tt[group] > 0.0 { yt[group] / tt[group] } else { 1.0 };
            let constant = |group: usize| off[group] / many[group].max(1) as f64;
            let held = |cause: &str, detail: String, value: &dyn Fn(usize, f64) -> f64| {
                let each = sample.each();
                let predicted: Vec<f64> =
                    each.map(|(row, column, _, t)| value(of(row, column) / block, t)).collect();
                // What was fitted says nothing.
                let weight = sample.weigh_where(&predicted, &|row, column| !trains(row, column));
                told(weight, cause, detail)
            };
            let name = |group: usize| match block {
                1 => format!("{noun} {group}"),
                _ => {
                    let last = ((group + 1) * block).min(count) - 1;
                    format!("{noun}s {} to {last}", group * block)
                }
            };
            let mut known: Vec<usize> = lines.iter().map(|line| line / block).collect();
            known.dedup();
            let list = |one: &dyn Fn(usize) -> String| {
                let shown: Vec<String> =
                    known.iter().take(SHOWN).map(|&group| one(group)).collect();
                let rest = known.len().saturating_sub(SHOWN);
                let more = if rest > 0 { ", and so on" } else { "" };
                format!("{}{more}", shown.join(", "))
            };
            let verb = if block == 1 { "is" } else { "are" };
            let detail = format!(
                "each {} has a factor of its own: {}",
                if block == 1 { noun.to_owned() } else { format!("block of {block} {noun}s") },
                list(&|group| format!("{} {verb} {}", name(group), factor_of(factor(group))))
            );
            let cause = format!("{noun}-scale");
            found.extend(held(&cause, detail, &|group, t| factor(group) * t));
            if block == 1 {
                let detail = format!(
                    "a constant of its own is added to each {noun}{}: {}",
                    if by_row { "" } else { ", as another bias does" },
                    list(&|group| format!("{} to {}", number(constant(group)), name(group)))
                );
                let cause = format!("{noun}-offset");
                found.extend(held(&cause, detail, &|group, t| t + constant(group)));
            }
        }
    }
    ranked(found)
}

/// Right values in other places: shifted lines, a result written along the other axis, a
/// tile that holds another one.
pub(super) fn places(exam: &Exam, place: &Place) -> Vec<Cause> {
    let sample = Sample::of(exam, place, SAMPLE);
    let (rows, width) = (exam.y.rows(), exam.y.width());
    let mut found = Vec::new();
    let at = |row: usize, column: usize| exam.truth[row * width + column];
    for (noun, count, by_row) in [("row", rows, true), ("column", width, false)] {
        let lines = &place.lines[usize::from(!by_row)];
        let span = if by_row { place.row_span } else { place.column_span };
        let other = &place.lines[usize::from(by_row)];
        let of_tile = lines.len() < count && other.len() < if by_row { width } else { rows };
        let half = count / 2;
        let shifts = SHIFTS.into_iter().chain([half]).filter(|shift| (1..count).contains(shift));
        for shift in shifts {
            for (step, side) in [(count - shift, "before"), (shift, "after")] {
                let from = |line: usize| (line + step) % count;
                // Lines that hold others which are right where they stand.
                let copied = lines.iter().all(|&line| lines.binary_search(&from(line)).is_err());
                if copied && of_tile {
                    continue;
                }
                let (cause, detail) = match (lines.as_slice(), copied) {
                    ([line], _) => (
                        format!("{noun}-repeated"),
                        format!("{noun} {line} holds {noun} {}", from(*line)),
                    ),
                    (_, true) => (
                        format!("{noun}s-repeated"),
                        format!(
                            "{noun}s {} to {} hold {noun}s {} to {}",
                            span[0],
                            span[1],
                            from(span[0]),
                            from(span[1])
                        ),
                    ),
                    _ if 2 * shift == count => (
                        format!("{noun}s-shifted"),
                        format!("the two halves of the {noun}s are exchanged"),
                    ),
                    _ if shift == 1 => (
                        format!("{noun}s-shifted"),
                        format!("each {noun} there holds the {noun} {side} it"),
                    ),
                    _ => (
                        format!("{noun}s-shifted"),
                        format!("each {noun} there holds the {noun} {shift} {side} it"),
                    ),
                };
                let value = |row: usize, column: usize, _| match by_row {
                    true => at(from(row), column),
                    false => at(row, from(column)),
                };
                found.extend(sample.guess_of(&cause, detail, value));
            }
        }
        if lines.len() > 1 {
            let detail = format!("the {noun}s there stand in the reverse order");
            let value = |row: usize, column: usize, _| match by_row {
                true => at(rows - 1 - row, column),
                false => at(row, width - 1 - column),
            };
            found.extend(sample.guess_of(&format!("{noun}s-reversed"), detail, value));
        }
    }
    if rows > 1 && width > 1 {
        let value = |row: usize, column: usize, _| {
            let written = row * width + column;
            at(written % rows, written / rows)
        };
        let detail = "the result is stored transposed, column after column";
        found.extend(sample.guess_of("output-transposed", detail, value));
    }
    if found.is_empty() {
        found.extend(tile(exam, place, &sample));
    }
    ranked(found)
}

/// Rows, or else columns, each of which holds another one.
pub(super) fn lines(exam: &Exam, place: &Place) -> Vec<Cause> {
    moved(exam, place, true).or_else(|| moved(exam, place, false)).into_iter().collect()
}

/// Rows or columns each of which holds another one.
fn moved(exam: &Exam, place: &Place, by_row: bool) -> Option<Cause> {
    /// Values of a line by which it is found elsewhere, and how many there must be.
    const KEY: usize = 24;
    const SHORTEST: usize = 4;
    let (rows, width) = (exam.y.rows(), exam.y.width());
    let (count, noun) = if by_row { (rows, "row") } else { (width, "column") };
    let [lines, across] = match by_row {
        true => [&place.lines[0], &place.lines[1]],
        false => [&place.lines[1], &place.lines[0]],
    };
    let key: Vec<usize> = spread(across.len(), KEY).into_iter().map(|at| across[at]).collect();
    if key.len() < SHORTEST || lines.len() * count > MOST_COMPARED {
        return None;
    }
    let index = |line: usize, entry: usize| match by_row {
        true => line * width + entry,
        false => entry * width + line,
    };
    let meets = |line: usize, from: usize| {
        key.iter().all(|&entry| {
            let from = index(from, entry);
            let y = f64::from(exam.y.data()[index(line, entry)]);
            (y - exam.truth[from]).abs() <= 6.0 * sigma_of(exam, from)
        })
    };
    let mut pairs = Vec::new();
    for &line in lines {
        pairs
            .push((line, (0..count).filter(|from| *from != line).find(|&from| meets(line, from))?));
    }
    let cause = match (how(&pairs, count), pairs.as_slice()) {
        ("repeated", [_]) => format!("{noun}-repeated"),
        (how, _) => format!("{noun}s-{how}"),
    };
    let mut of = vec![0; count];
    pairs.iter().for_each(|&(to, from)| of[to] = from);
    let value = |row: usize, column: usize, _| match by_row {
        true => exam.truth[of[row] * width + column],
        false => exam.truth[row * width + of[column]],
    };
    Sample::of(exam, place, SAMPLE).guess_of(&cause, said(noun, &pairs), value)
}

fn sigma_of(exam: &Exam, index: usize) -> f64 {
    let floor = exam.floors.last().and_then(|floor| floor.sigma.get(index)).copied();
    f64::from(floor.unwrap_or(0.0))
}

/// Values that are not finite where all that is finite is as it must be.
pub(super) fn not_finite(exam: &Exam, place: &Place) -> Vec<Cause> {
    let width = exam.y.width();
    let sigma = exam.floors.last().map_or(&[][..], |floor| &floor.sigma);
    let [rows, columns] = &place.lines;
    let (mut strange, mut first) = (0usize, None);
    for (row, column) in rows.iter().flat_map(|&row| columns.iter().map(move |&c| (row, c))) {
        let index = row * width + column;
        let y = exam.y.data()[index];
        if exam.is_strange(index) && !y.is_finite() {
            strange += 1;
            first.get_or_insert([row, column]);
            continue;
        }
        let off = (f64::from(y) - exam.truth[index]).abs();
        let floor = f64::from(sigma.get(index).copied().unwrap_or(0.0));
        if exam.is_strange(index) || off > MOST_DEVIATIONS * floor {
            return Vec::new();
        }
    }
    let Some([row, column]) = first else { return Vec::new() };
    let lines = match (rows.len(), columns.len()) {
        _ if strange == 1 || strange < rows.len() * columns.len() => "",
        (_, wide) if wide == width => ": whole rows",
        (high, _) if high == exam.y.rows() => ": whole columns",
        _ => ": a whole block",
    };
    let detail = format!(
        "{} not finite, the first at [{row}, {column}]{lines}; what is right there is finite",
        values_are(strange)
    );
    let cause = "non-finite-output".to_owned();
    vec![Cause { cause, detail, explained: 1.0, named: true }]
}

/// A block that holds the outputs of another block, or its own along the other axis.
fn tile(exam: &Exam, place: &Place, sample: &Sample<'_>) -> Option<Cause> {
    /// Values by which a block is found.
    const KEY: usize = 12;
    let (rows, width) = (exam.y.rows(), exam.y.width());
    let whole = |[first, last]: [usize; 2], lines: &[usize]| last + 1 - first == lines.len();
    let (of_rows, of_columns) = (place.row_span, place.column_span);
    let solid = whole(of_rows, &place.lines[0]) && whole(of_columns, &place.lines[1]);
    let (height, breadth) = (of_rows[1] + 1 - of_rows[0], of_columns[1] + 1 - of_columns[0]);
    let all = height == rows || breadth == width;
    if !solid || height * breadth < LEAST || all {
        return None;
    }
    let [row, column] = [of_rows[0], of_columns[0]];
    if height == breadth && height > 1 {
        let value =
            |r: usize, c: usize, _| exam.truth[(row + c - column) * width + column + r - row];
        let turned = sample.guess_of("tile-transposed", "the tile there is transposed", value);
        if turned.is_some() {
            return turned;
        }
    }
    let key = KEY.min(height * breadth);
    let is_there = |r: usize, c: usize| {
        (0..key).all(|i| {
            let [down, right] = [i / breadth, i % breadth];
            let (y, from) =
                (exam.y.row(row + down)[column + right], (r + down) * width + c + right);
            (f64::from(y) - exam.truth[from]).abs() <= 6.0 * sigma_of(exam, from)
        })
    };
    let (to_row, to_column) = (rows + 1 - height, width + 1 - breadth);
    let others = (0..to_row).flat_map(|r| (0..to_column).map(move |c| (r, c)));
    let (r0, c0) = others.filter(|&at| at != (row, column)).find(|&(r, c)| is_there(r, c))?;
    let value = |r: usize, c: usize, _| exam.truth[(r0 + r - row) * width + c0 + c - column];
    let span = |noun: &str, first: usize, count: usize| match count {
        1 => format!("{noun} {first}"),
        _ => format!("{noun}s {first} to {}", first + count - 1),
    };
    let (in_rows, in_columns) = (span("row", r0, height), span("column", c0, breadth));
    let detail = format!("they are the outputs of {in_rows} and {in_columns}");
    sample.guess_of("tile-stale", detail, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_is_never_larger_and_less_than_a_step_away() {
        for format in [Format::Bf16, Format::F16, Format::E4m3, Format::E5m2, Format::Tf32] {
            for value in [1.0, 1.9999, -3.3, 447.9, 0.0123, 1e-9, -17.77] {
                let cut = f64::from(towards_zero(format, value));
                assert!(cut.abs() <= value.abs() && cut * value >= 0.0, "{format} {value} {cut}");
                let step = (12.0 * rounding(format, value)).sqrt();
                assert!((cut - value).abs() < step, "{format} {value} {cut}");
            }
        }
    }
}
