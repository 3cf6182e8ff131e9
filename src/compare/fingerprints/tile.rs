//! A difference that keeps to certain columns: a tile, or one lane of each tile.
//!
//! It says where, not why; so it comes last and needs nearly all of the energy.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the difference keeps to one tile of outputs, or to one place of every tile",
    causes: &["tile-periodic", "one-tile"],
    test,
};

/// Widths of tiles.
const TILES: [usize; 6] = [8, 16, 32, 64, 128, 256];
/// The share of the energy that must lie there.
const CONCENTRATED: f64 = 0.999;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let width = case.subject.width();
    let energy: Vec<f64> =
        (0..width).map(|column| case.energy(case.clean, column..column + 1)).collect();
    let total: f64 = energy.iter().sum();
    let touched = energy.iter().filter(|energy| **energy > 0.0).count();
    let mut fits = Vec::new();
    // A single column is a matter of its scale.
    if total == 0.0 || touched < 2 {
        return Ok(fits);
    }
    let mut note = |cause: &str, detail: String, held: f64| {
        let mut fit = case.fit(cause, detail, case.subject.data().len() / 2, case.clean);
        fit.explained = held / total;
        fits.push(fit);
    };
    for tile in TILES.into_iter().filter(|tile| 2 * tile <= width) {
        for lane in 0..tile {
            let held: f64 = energy.iter().skip(lane).step_by(tile).sum();
            if held >= CONCENTRATED * total && width / tile >= 4 {
                note("tile-periodic", format!("only columns {lane} modulo {tile} differ"), held);
            }
        }
        for (number, columns) in energy.chunks(tile).enumerate() {
            let held: f64 = columns.iter().sum();
            if held >= CONCENTRATED * total && fits_none(columns) {
                let first = number * tile;
                let last = (first + tile).min(width) - 1;
                note("one-tile", format!("only columns {first} to {last} differ"), held);
            }
        }
    }
    fits.sort_by_key(|fit| fit.detail.len());
    fits.truncate(1);
    Ok(fits)
}

/// Whether most of a tile's columns differ, so that the tile is what they share.
fn fits_none(columns: &[f64]) -> bool {
    columns.iter().filter(|energy| **energy > 0.0).count() * 2 > columns.len()
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;

    #[test]
    fn one_lane_of_every_tile_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let noise = bench.tensor(4, 256, 9);
        let mut wrong = bench.clean(&call);
        for row in 0..4 {
            for column in (5..256).step_by(32) {
                wrong.row_mut(row)[column] += noise.row(row)[column];
            }
        }
        bench.expect("tile-periodic", &call, &wrong);
    }
}
