//! A difference that keeps to one tile of outputs, or to one place of every tile.
//!
//! It says where, not why; so it comes last and needs nearly all of the energy.

use super::{Case, Fingerprint, Fit, square_of_difference};
use crate::compute::ComputeError;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the difference keeps to one tile of outputs, or to one place of every tile",
    causes: &["tile-periodic", "one-tile"],
    bugs: &[],
    test,
};

/// Widths of tiles.
const TILES: [usize; 6] = [8, 16, 32, 64, 128, 256];
/// The share of the energy that must lie there.
const CONCENTRATED: f64 = 0.999;
/// The share of a tile's values that must be off, so that the tile is what they share.
const MOST_OF_IT: f64 = 0.25;
/// The share of all values that a tile may hold.
const LARGEST: f64 = 0.5;
/// Numbers that name a tile: its first and last row and column.
const CORNERS: usize = 4;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let (rows, width) = (case.subject.rows(), case.subject.width());
    // The energy and the number of values that are no noise, by column; and where they lie.
    let (mut energy, mut count) = (vec![0.0; width], vec![0usize; width]);
    let (mut first_row, mut last_row) = (rows, 0);
    for row in 0..rows {
        for (column, (&s, &c)) in case.subject.row(row).iter().zip(case.clean.row(row)).enumerate()
        {
            if case.null.beyond(row * width + column, f64::from(s) - f64::from(c)) {
                energy[column] += square_of_difference(s, c);
                count[column] += 1;
                (first_row, last_row) = (first_row.min(row), last_row.max(row));
            }
        }
    }
    let total: f64 = energy.iter().sum();
    let touched: Vec<usize> = (0..width).filter(|&column| count[column] > 0).collect();
    let (Some(&first), Some(&last)) = (touched.first(), touched.last()) else {
        return Ok(Vec::new());
    };
    // A single column is a matter of its scale, and a single row of many too.
    if total == 0.0 || touched.len() < 2 || (rows > 1 && first_row == last_row) {
        return Ok(Vec::new());
    }
    let all: usize = count.iter().sum();
    let mut fits = Vec::new();
    let mut note = |cause: &str, detail: String, held: f64, values: usize, area: usize| {
        let fit = case.fit(cause, detail, 0, case.clean);
        let significant = values >= 2 * CORNERS && values as f64 >= MOST_OF_IT * area as f64;
        fits.push(Fit { explained: held / total, parameters: CORNERS, significant, ..fit });
    };
    for tile in TILES.into_iter().filter(|tile| 4 * tile <= width) {
        for lane in 0..tile {
            let lanes = || (lane..width).step_by(tile);
            let held: f64 = lanes().map(|column| energy[column]).sum();
            if held >= CONCENTRATED * total {
                let values = lanes().map(|column| count[column]).sum();
                let detail = format!("only columns {lane} modulo {tile} differ");
                note("tile-periodic", detail, held, values, lanes().count() * rows);
            }
        }
    }
    let (height, breadth) = (last_row - first_row + 1, last - first + 1);
    let (area, whole) = (height * breadth, rows * width);
    if area as f64 <= LARGEST * whole as f64 {
        let columns = format!("columns {first} to {last}");
        let detail = match height == rows {
            true => format!("only {columns} differ"),
            false if breadth == width => format!("only rows {first_row} to {last_row} differ"),
            false => format!("only rows {first_row} to {last_row} and {columns} differ"),
        };
        note("one-tile", detail, total, all, area);
    }
    fits.retain(|fit| fit.significant);
    fits.truncate(1);
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;

    #[test]
    fn one_lane_of_every_tile_and_a_tile_of_rows_and_columns_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(16, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let noise = bench.tensor(16, 256, 9);
        let clean = bench.clean(&call);
        let spoilt = |rows: std::ops::Range<usize>, columns: &dyn Fn(usize) -> bool| {
            let mut wrong = clean.clone();
            for row in rows {
                for column in (0..256).filter(|&column| columns(column)) {
                    wrong.row_mut(row)[column] += noise.row(row)[column];
                }
            }
            wrong
        };
        bench.expect("tile-periodic", &call, &spoilt(0..16, &|column| column % 32 == 5));
        let wrong = spoilt(8..12, &|column| (64..128).contains(&column));
        bench.expect("one-tile", &call, &wrong);
        let said = &bench.fits(&call, &wrong)[0].detail;
        assert!(said.contains("rows 8 to 11 and columns 64 to 127"), "{said}");
    }

    #[test]
    fn values_that_are_one_step_off_are_no_tile() {
        let bench = Bench::default();
        let x = bench.tensor(16, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let mut wrong = bench.clean(&call);
        for row in 0..16 {
            let y = &mut wrong.row_mut(row)[5];
            *y = f32::from_bits(y.to_bits() + 0x1_0000);
        }
        let named: Vec<_> =
            bench.fits(&call, &wrong).into_iter().filter(|fit| fit.names_the_bug()).collect();
        assert!(named.is_empty(), "{named:#?}");
    }
}
