//! Hypotheses about an operand's scales: left out, applied twice, shifted, turned round.
//!
//! Each is the exact product with other scales; one is named where rounding then
//! explains the outputs, or nearly all of the difference is gone. It knows codes and
//! scales; other causes are the fingerprints'.

use super::Cause;
use super::exam::{Exam, most_rms};
use super::place::Place;
use super::product::Product;
use crate::compute::ComputeError;
use crate::compute::emulated::identify::spread;
use crate::dtype::Format;
use crate::tensor_file::{BlockScales, CodedTensor};

/// Rows and columns on which a hypothesis is tested.
const SAMPLE: (usize, usize) = (48, 96);
/// The share of the difference that it must explain.
const EXPLAINED: f64 = 0.99;

/// A change of an operand's scales, in words that follow its name.
struct Change {
    cause: &'static str,
    detail: &'static str,
    /// Whether scales change their places and not their values.
    of_order: bool,
    make: fn(&BlockScales, usize) -> BlockScales,
}

/// Tests them all; the best first.
pub(super) fn search(
    product: &Product<'_>,
    exam: &Exam,
    place: &Place,
) -> Result<Vec<Cause>, ComputeError> {
    let mut causes = Vec::new();
    let rows = sample(place.row_span, exam.y.rows(), SAMPLE.0);
    let columns = sample(place.column_span, exam.y.width(), SAMPLE.1);
    let mut part = product.part(&rows, &columns);
    let plain = [part.x.scales.clone(), part.w.scales.clone()];
    let mut attempt = |cause: &str, detail: String, scales: [Option<BlockScales>; 2]| {
        let [x, w] = scales;
        (part.x.scales, part.w.scales) = (x, w);
        let tried = part.of(product).exam()?;
        let (rest, whole, within) = explained(&tried, exam, &rows, &columns);
        let share = if whole > 0.0 { 1.0 - rest / whole } else { 0.0 };
        if within || share >= EXPLAINED {
            let cause = cause.to_owned();
            causes.push(Cause { cause, detail, explained: share, named: true });
        }
        Ok::<(), ComputeError>(())
    };
    let of = |change: &Change, operand: &CodedTensor, lines: &[usize]| {
        let scales = operand.scales.as_ref().map(|scales| (change.make)(scales, operand.rows));
        scales.map(|scales| scales.select_rows(lines, operand.width))
    };
    let [of_x, of_w] = [changes(product.x), changes(product.w)];
    for change in &of_x {
        let detail = format!("the scales of x {}", change.detail);
        attempt(change.cause, detail, [of(change, product.x, &rows), plain[1].clone()])?;
    }
    for change in &of_w {
        let detail = format!("the scales of w {}", change.detail);
        attempt(change.cause, detail, [plain[0].clone(), of(change, product.w, &columns)])?;
    }
    for x in of_x.iter().filter(|x| !x.of_order) {
        if let Some(w) = of_w.iter().find(|w| w.detail == x.detail) {
            let detail = format!("the scales of x and w {}", x.detail);
            let both = [of(x, product.x, &rows), of(w, product.w, &columns)];
            attempt(x.cause, detail, both)?;
        }
    }
    causes.sort_by(|a, b| b.explained.total_cmp(&a.explained));
    if causes.is_empty() {
        causes.extend(of_neighbour(product, exam));
    }
    causes.truncate(3);
    Ok(causes)
}

/// Lines of the wrong span, and some outside it: a hypothesis must hold there too.
fn sample([first, last]: [usize; 2], all: usize, most: usize) -> Vec<usize> {
    let inside = spread(last + 1 - first, most * 3 / 4).into_iter().map(|line| first + line);
    let mut lines: Vec<usize> = inside.chain(spread(all, most / 4)).collect();
    lines.sort_unstable();
    lines.dedup();
    lines
}

/// What is left of the difference, what it was, and whether rounding explains the rest.
fn explained(tried: &Exam, exam: &Exam, rows: &[usize], columns: &[usize]) -> (f64, f64, bool) {
    let (mut rest, mut whole, mut size) = (0.0, 0.0, 0.0);
    for (at, &row) in rows.iter().enumerate() {
        for (beside, &column) in columns.iter().enumerate() {
            let y = f64::from(exam.y.row(row)[column]);
            let now = y - tried.truth[at * columns.len() + beside];
            let before = y - exam.truth[row * exam.y.width() + column];
            if now.is_finite() && before.is_finite() {
                rest += now * now;
                whole += before * before;
                size += y * y;
            }
        }
    }
    // Where outputs are small, anything small is near: they must be explained themselves.
    let whole = if size > 0.0 && size < whole { size } else { whole };
    let z = tried.marks().z;
    let within = z.rms <= most_rms(tried.truth.len()) && rest < whole;
    (rest, whole, within)
}

fn changes(operand: &CodedTensor) -> Vec<Change> {
    let mut all: Vec<Change> = Vec::new();
    let Some(scales) = &operand.scales else { return all };
    let mut add = |cause, detail: &'static str, make: fn(&BlockScales, usize) -> BlockScales| {
        all.push(Change { cause, detail, of_order: cause == "scale-order", make });
    };
    if scales.values.iter().any(|&scale| scale != 1.0) {
        add("scale-missing", "are not applied", |scales, _| mapped(scales, |_| 1.0));
        add("scale-twice", "are applied twice", |scales, _| mapped(scales, |scale| scale * scale));
        add("scale-inverted", "divide instead of multiplying", |scales, _| {
            mapped(scales, |scale| 1.0 / scale)
        });
        add("scale-rounded", "are rounded up to powers of two", |scales, _| {
            mapped(scales, |scale| scale.log2().ceil().exp2())
        });
        add("scale-rounded", "are rounded down to powers of two", |scales, _| {
            mapped(scales, |scale| scale.log2().floor().exp2())
        });
        add("scale-rounded", "are rounded to the nearest powers of two", |scales, _| {
            mapped(scales, |scale| scale.log2().round().exp2())
        });
        add("scale-rounded", "are rounded to bf16", |scales, _| {
            mapped(scales, |scale| Format::Bf16.round(scale))
        });
        add("scale-rounded", "are rounded to f16", |scales, _| {
            mapped(scales, |scale| Format::F16.round(scale))
        });
    }
    if scales.values.len() > 1 {
        add("scale-order", "are all taken as the largest of them", |scales, _| {
            let most =
                scales.values.iter().fold(0.0f32, |most, &s| if s > most { s } else { most });
            mapped(scales, |_| most)
        });
    }
    let wide = scales.blocks_per_row;
    let high = scales.values.len() / wide;
    if wide > 1 {
        add("scale-order", "are taken in the reverse order along K", |scales, _| {
            moved(scales, |row, column, _, wide| (row, wide - 1 - column))
        });
        add("scale-order", "are those of the next block along K", |scales, _| {
            moved(scales, |row, column, _, wide| (row, (column + 1) % wide))
        });
        add("scale-order", "are those of the block before along K", |scales, _| {
            moved(scales, |row, column, _, wide| (row, (column + wide - 1) % wide))
        });
        add("scale-order", "of the first block along K are applied to all of K", |scales, _| {
            moved(scales, |row, _, _, _| (row, 0))
        });
    }
    if high > 1 {
        add("scale-order", "are those of the next block of rows", |scales, _| {
            moved(scales, |row, column, high, _| ((row + 1) % high, column))
        });
        add("scale-order", "are those of the block of rows before", |scales, _| {
            moved(scales, |row, column, high, _| ((row + high - 1) % high, column))
        });
        add("scale-order", "are taken in the reverse order of rows", |scales, _| {
            moved(scales, |row, column, high, _| (high - 1 - row, column))
        });
        add("scale-order", "of the first row are applied to all rows", |scales, _| {
            moved(scales, |_, column, _, _| (0, column))
        });
    }
    if wide > 1 && high > 1 {
        add("scale-order", "are read along the wrong axis", |scales, _| {
            // The memory is walked as if the table were [wide, high].
            moved(scales, |row, column, high, wide| {
                let place = column * high + row;
                (place / wide, place % wide)
            })
        });
        add("scale-order", "are read along the wrong axis", |scales, _| {
            // The table is stored as [wide, high] and walked as [high, wide].
            moved(scales, |row, column, high, wide| {
                let place = row * wide + column;
                (place % high, place / high)
            })
        });
    }
    all
}

fn mapped(scales: &BlockScales, change: impl Fn(f32) -> f32) -> BlockScales {
    let values = scales.values.iter().map(|&scale| change(scale)).collect();
    BlockScales { values, ..scales.clone() }
}

/// Each scale replaced by the one at another place of the table.
fn moved(
    scales: &BlockScales,
    from: impl Fn(usize, usize, usize, usize) -> (usize, usize),
) -> BlockScales {
    let wide = scales.blocks_per_row;
    let high = scales.values.len() / wide;
    let values = (0..high * wide).map(|index| {
        let (row, column) = from(index / wide, index % wide, high, wide);
        scales.values[row * wide + column]
    });
    BlockScales { values: values.collect(), ..scales.clone() }
}

/// How near a line's factor must come to that of a neighbour's scale.
const NEAR: f64 = 2e-3;
/// The share of the wrong lines that must carry their neighbour's scale.
const MOST: f64 = 0.9;

/// Rows or columns that carry the scale of the line before or after them.
fn of_neighbour(product: &Product<'_>, exam: &Exam) -> Option<Cause> {
    let width = exam.y.width();
    let axes = [("row", product.x, exam.y.rows(), true), ("column", product.w, width, false)];
    for (noun, operand, count, by_row) in axes {
        let Some(scales) = operand.scales.as_ref().filter(|s| s.is_by_row() && s.values.len() > 1)
        else {
            continue;
        };
        let factor = |line: usize| {
            let others = if by_row { width } else { exam.y.rows() };
            let (mut yt, mut tt) = (0.0, 0.0);
            for other in 0..others {
                let index = if by_row { line * width + other } else { other * width + line };
                let (y, truth) = (f64::from(exam.y.data()[index]), exam.truth[index]);
                if y.is_finite() && truth.is_finite() {
                    (yt, tt) = (yt + y * truth, tt + truth * truth);
                }
            }
            if tt > 0.0 { yt / tt } else { 1.0 }
        };
        let factors: Vec<f64> = (0..count).map(factor).collect();
        let wrong: Vec<usize> =
            (0..count).filter(|&line| (factors[line] - 1.0).abs() > NEAR).collect();
        let scale = |line: usize| f64::from(scales.at(line, 0));
        for (which, step) in [("before", count - 1), ("after", 1)] {
            let near = |&&line: &&usize| {
                let other = scale((line + step) % count) / scale(line);
                (factors[line] / other - 1.0).abs() < NEAR
            };
            let fitting: Vec<usize> = wrong.iter().filter(near).copied().collect();
            if wrong.len() > 1 && fitting.len() as f64 >= MOST * wrong.len() as f64 {
                let (first, last) = (wrong[0], wrong[wrong.len() - 1]);
                return Some(Cause {
                    cause: "scale-order".to_owned(),
                    detail: format!(
                        "{} of the {} wrong {noun}s between {first} and {last} carry the scale of \
                         the {noun} {which} them",
                        fitting.len(),
                        wrong.len()
                    ),
                    explained: fitting.len() as f64 / wrong.len() as f64,
                    named: true,
                });
            }
        }
    }
    None
}
