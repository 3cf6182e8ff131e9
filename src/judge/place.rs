//! Where outputs are wrong, in words: which rows and columns, of what sign and size,
//! and a small map.
//!
//! It knows errors in units of their floor, not what made them.

use serde::Serialize;

use super::exam::{Exam, Marks, most_rms};
use crate::compare::MOST_DEVIATIONS;
use crate::text::{grouped, number};

/// Rows and columns of the map, at most.
const MAP: (usize, usize) = (8, 16);
/// The share of a span's lines from which the span is named instead of the lines.
const DENSE: f64 = 0.6;
/// Spans that are named one by one.
const SHOWN: usize = 4;

/// Where outputs are wrong, and how.
#[derive(Clone, Debug, Serialize)]
pub struct Place {
    /// Values beyond what rounding explains, NaN and infinity included.
    pub values: usize,
    /// The rows, in words.
    pub rows: String,
    /// The columns, in words.
    pub columns: String,
    /// First and last wrong row.
    pub row_span: [usize; 2],
    /// First and last wrong column.
    pub column_span: [usize; 2],
    /// The share of the values of these rows and columns that are wrong.
    pub filled: f64,
    /// The median error there, in units of the floor.
    pub size: f64,
    /// What stands there instead of the right values.
    pub instead: String,
    /// The rows and the columns one by one.
    #[serde(skip)]
    pub lines: [Vec<usize>; 2],
}

/// The largest error of each block of the outputs, in units of the floor.
#[derive(Clone, Debug, Serialize)]
pub struct Map {
    /// Rows and columns of a cell.
    pub cell: [usize; 2],
    /// Row-major; NaN or infinity where it should not be is `null`.
    pub cells: Vec<Vec<Option<f64>>>,
}

impl Place {
    /// Finds it.
    pub fn of(exam: &Exam, marks: &Marks) -> Place {
        let (rows, width) = (exam.y.rows(), exam.y.width());
        let is_wrong = |index: usize| {
            let too_far = f64::from(marks.each[index].abs()) > MOST_DEVIATIONS;
            too_far && !marks.z.within || exam.is_strange(index)
        };
        let (mut by_row, mut by_column) = (vec![0usize; rows], vec![0usize; width]);
        let mut values = 0;
        for index in (0..rows * width).filter(|&index| is_wrong(index)) {
            by_row[index / width] += 1;
            by_column[index % width] += 1;
            values += 1;
        }
        let chosen = |counts: &[usize]| -> Vec<usize> {
            (0..counts.len()).filter(|&line| counts[line] > 0).collect()
        };
        let (mut in_rows, mut in_columns) = (chosen(&by_row), chosen(&by_column));
        if values == 0 {
            // No value is wrong by itself: whole lines are.
            (in_rows, in_columns) = lines(marks, rows, width);
        }
        let (mut sizes, mut inside) = (Vec::new(), 0usize);
        for &row in &in_rows {
            for &column in &in_columns {
                let index = row * width + column;
                sizes.push(marks.each[index].abs());
                inside += usize::from(is_wrong(index));
            }
        }
        let ends = |lines: &[usize]| {
            [lines.first().copied().unwrap_or(0), lines.last().copied().unwrap_or(0)]
        };
        Place {
            values,
            rows: in_words("row", &in_rows, rows),
            columns: in_words("column", &in_columns, width),
            row_span: ends(&in_rows),
            column_span: ends(&in_columns),
            filled: inside as f64 / sizes.len().max(1) as f64,
            size: median(sizes),
            instead: instead(exam, &in_rows, &in_columns),
            lines: [in_rows, in_columns],
        }
    }

    /// Where, in a sentence's middle.
    pub fn in_words(&self) -> String {
        match (self.rows.starts_with("all"), self.columns.starts_with("all")) {
            (true, true) => "everywhere".to_owned(),
            (true, false) => format!("{} of all rows", self.columns),
            (false, true) => format!("{}, all columns", self.rows),
            (false, false) => format!("{}, {}", self.rows, self.columns),
        }
    }
}

fn median(mut sizes: Vec<f32>) -> f64 {
    let middle = sizes.len() / 2;
    if sizes.is_empty() {
        return 0.0;
    }
    f64::from(*sizes.select_nth_unstable_by(middle, f32::total_cmp).1)
}

/// Rows and columns whose mean square is more than chance explains; all of them where
/// that says nothing.
fn lines(marks: &Marks, rows: usize, width: usize) -> (Vec<usize>, Vec<usize>) {
    let square = |row: usize, column: usize| f64::from(marks.each[row * width + column]).powi(2);
    let in_rows: Vec<usize> = (0..rows)
        .filter(|&row| {
            let sum: f64 = (0..width).map(|column| square(row, column)).sum();
            (sum / width as f64).sqrt() > most_rms(width)
        })
        .collect();
    let in_columns: Vec<usize> = (0..width)
        .filter(|&column| {
            let sum: f64 = (0..rows).map(|row| square(row, column)).sum();
            (sum / rows as f64).sqrt() > most_rms(rows)
        })
        .collect();
    let all = |count: usize, some: Vec<usize>| match some.is_empty() {
        true => (0..count).collect(),
        false => some,
    };
    (all(rows, in_rows), all(width, in_columns))
}

/// `rows 64 to 127`, `every 8th column from 3`, `all rows`.
fn in_words(noun: &str, lines: &[usize], all: usize) -> String {
    let (Some(&first), Some(&last)) = (lines.first(), lines.last()) else {
        return format!("no {noun}");
    };
    if lines.len() == 1 {
        return format!("{noun} {first}");
    }
    let span = last - first + 1;
    let margin = all / 16;
    if lines.len() as f64 >= DENSE * all as f64 && first <= margin && last + margin + 1 >= all {
        return format!("all {noun}s");
    }
    let step = (lines[1] - lines[0]).max(2);
    if lines.len() >= 3 && lines.windows(2).all(|pair| pair[1] - pair[0] == step) {
        return format!("every {step}th {noun} from {first} to {last}");
    }
    let spans = spans(lines);
    if spans.len() > SHOWN && lines.len() as f64 >= DENSE * span as f64 {
        return format!("{noun}s {first} to {last}");
    }
    let shown: Vec<String> = spans
        .iter()
        .take(SHOWN)
        .map(|&(from, to)| if from == to { from.to_string() } else { format!("{from} to {to}") })
        .collect();
    match spans.len() > SHOWN {
        true => format!("{} {noun}s ({}, ...)", grouped(lines.len()), shown.join(", ")),
        false => format!("{noun}s {}", shown.join(" and ")),
    }
}

/// Runs of lines; a line that is missed by chance does not end one.
fn spans(lines: &[usize]) -> Vec<(usize, usize)> {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for &line in lines {
        match spans.last_mut() {
            Some((from, to)) if line - *to <= if *to > *from { 2 } else { 1 } => *to = line,
            _ => spans.push((line, line)),
        }
    }
    spans
}

/// What stands in the wrong rows and columns instead of the right values.
fn instead(exam: &Exam, rows: &[usize], columns: &[usize]) -> String {
    let width = exam.y.width();
    let (mut count, mut zero, mut above) = (0usize, 0usize, 0usize);
    let (mut yy, mut tt, mut yt) = (0.0, 0.0, 0.0);
    for &row in rows {
        for &column in columns {
            let index = row * width + column;
            let (y, truth) = (f64::from(exam.y.data()[index]), exam.truth[index]);
            if !y.is_finite() || !truth.is_finite() {
                continue;
            }
            count += 1;
            zero += usize::from(y == 0.0);
            above += usize::from(y.abs() > truth.abs());
            (yy, tt, yt) = (yy + y * y, tt + truth * truth, yt + y * truth);
        }
    }
    if count == 0 {
        return "nothing there is finite".to_owned();
    }
    if zero == count {
        return "all values there are zero".to_owned();
    }
    let likeness = if yy > 0.0 && tt > 0.0 { yt / (yy * tt).sqrt() } else { 0.0 };
    let slope = if tt > 0.0 { yt / tt } else { 0.0 };
    let share = above as f64 / count as f64;
    let side = match share {
        share if share > 0.9 => ", nearly all too large in magnitude",
        share if share < 0.1 => ", nearly all too small in magnitude",
        _ => ", too large as often as too small",
    };
    match likeness {
        l if l > 0.999 && (slope - 1.0).abs() > 1e-4 => {
            format!("they are {} times the right values (correlation {l:.5}){side}", number(slope))
        }
        l if l > 0.99 => format!("they are near the right values (correlation {l:.5}){side}"),
        l if l < -0.99 => format!("they are {} times the right values", number(slope)),
        l if l.abs() < 0.3 => {
            format!("they have nothing to do with the right values (correlation {l:.3})")
        }
        l => format!(
            "they are only like the right values (correlation {l:.3}, slope {})",
            number(slope)
        ),
    }
}

impl Map {
    /// Draws it.
    pub fn of(exam: &Exam, marks: &Marks) -> Map {
        let (rows, width) = (exam.y.rows(), exam.y.width());
        let cell = [rows.div_ceil(MAP.0), width.div_ceil(MAP.1)];
        let mut cells = vec![vec![Some(0.0f64); width.div_ceil(cell[1])]; rows.div_ceil(cell[0])];
        for (index, z) in marks.each.iter().enumerate() {
            let target = &mut cells[index / width / cell[0]][index % width / cell[1]];
            let strange = !exam.y.data()[index].is_finite() && exam.is_strange(index);
            match target {
                _ if strange => *target = None,
                Some(most) if f64::from(z.abs()) > *most => *most = f64::from(z.abs()),
                _ => {}
            }
        }
        Map { cell, cells }
    }

    /// The map as text, under what its numbers are.
    pub fn in_text(&self, of: &str) -> String {
        let [rows, width] = self.cell;
        let mut text = format!(
            "  {of} of each block of {rows} x {width}; `.` is within rounding, ! is NaN or \
             infinite\n"
        );
        let head = (0..self.cells.first().map_or(0, Vec::len))
            .map(|column| format!("{:>6}", column * width));
        text += &format!("  {:>8}{}\n", "", head.collect::<String>());
        for (number_of, cells) in self.cells.iter().enumerate() {
            let cells = cells.iter().map(|cell| match cell {
                None => format!("{:>6}", "!"),
                Some(z) if *z <= MOST_DEVIATIONS => format!("{:>6}", "."),
                Some(z) if *z < 9999.5 => format!("{z:>6.0}"),
                Some(z) => format!("{z:>6.0e}"),
            });
            text += &format!("  {:>8}{}\n", number_of * rows, cells.collect::<String>());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_named_as_a_reader_would() {
        let words = |lines: &[usize]| in_words("row", lines, 128);
        assert_eq!(words(&[77]), "row 77");
        assert_eq!(words(&(64..128).collect::<Vec<_>>()), "rows 64 to 127");
        assert_eq!(words(&(0..128).collect::<Vec<_>>()), "all rows");
        assert_eq!(words(&[8, 9]), "rows 8 to 9");
        assert_eq!(words(&[3, 11, 19, 27]), "every 8th row from 3 to 27");
        assert_eq!(words(&[1, 5, 77]), "rows 1 and 5 and 77");
        assert_eq!(words(&[1, 5, 9, 20, 40, 77]), "6 rows (1, 5, 9, 20, ...)");
    }

    #[test]
    fn where_rounding_explains_the_numbers_only_what_is_not_finite_is_placed() {
        use super::super::exam::Floor;
        use crate::dtype::Format;
        use crate::tensor::Tensor;
        let mut y = vec![0.0; 10_000];
        (y[7], y[205]) = (6.0, f32::NAN);
        let floors =
            vec![Floor { name: "a floor".to_owned(), sigma: vec![1.0; 10_000], truncates: false }];
        let exam =
            Exam { y: Tensor::new(100, y), output: Format::F32, truth: vec![0.0; 10_000], floors };
        let marks = exam.marks();
        assert!(marks.z.within, "{:?}", marks.z);
        let place = Place::of(&exam, &marks);
        assert_eq!((place.values, place.row_span, place.column_span), (1, [2, 2], [5, 5]));
    }
}
