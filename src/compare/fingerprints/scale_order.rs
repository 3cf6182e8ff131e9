//! Block scales that are applied to other blocks than theirs: read in the other order, from
//! the neighbour, or of the last block for a tail.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Converted, Edit, Steps, keep};
use crate::compute::emulated::gemm::Scales;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "block scales are applied to other blocks than theirs",
    causes: &["scale-order"],
    test,
};

/// From which block the scale of a block is taken: of `(row, column)` in a grid of
/// `rows` by `columns`, as a place in the list.
type Order = fn(usize, usize, usize, usize) -> usize;

const ORDERS: [(&str, Order); 6] = [
    ("in the reverse order along K", |row, column, _, columns| {
        row * columns + columns - 1 - column
    }),
    ("of the next block along K", |row, column, _, columns| row * columns + (column + 1) % columns),
    ("of the block before along K", |row, column, _, columns| {
        row * columns + (column + columns - 1) % columns
    }),
    ("of the next block of rows", |row, column, rows, columns| (row + 1) % rows * columns + column),
    ("of the block of rows before", |row, column, rows, columns| {
        (row + rows - 1) % rows * columns + column
    }),
    ("with rows and columns of the grid exchanged", |row, column, rows, _| column * rows + row),
];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let (_, Scales::Block128 { .. }) = case.arm.quantise_activation(gemm.x) else {
        return Ok(Vec::new());
    };
    let mut fits = Vec::new();
    for (what, order) in ORDERS {
        let change: &Edit = &|operand| reordered(operand, order);
        for (whose, x, w) in
            [("activation", change, &keep as &Edit), ("weight", &keep as &Edit, change)]
        {
            // A weight is converted some rows at a time: its grid is whole along K alone.
            if whose == "weight" && what.contains("rows") {
                continue;
            }
            let steps = Steps { x, w, ..Steps::of(case.recipe) };
            let detail = format!("the {whose}'s block scales are taken {what}");
            fits.extend(case.fit_gemm("scale-order", detail, gemm, &steps)?);
        }
    }
    Ok(fits)
}

fn reordered(operand: Converted<'_>, order: Order) -> Converted<'_> {
    const BLOCK: usize = 128;
    let Scales::Block128 { rows_per_block, first_row, scales } = &operand.scales else {
        return operand;
    };
    let columns = operand.codes.width().div_ceil(BLOCK);
    let rows = scales.len() / columns.max(1);
    let taken = (0..scales.len()).map(|place| {
        let from = order(place / columns, place % columns, rows, columns);
        scales.get(from).copied().unwrap_or(scales[place])
    });
    let scales = Scales::Block128 {
        rows_per_block: *rows_per_block,
        first_row: *first_row,
        scales: taken.collect(),
    };
    Converted { scales, ..operand }
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;
    use crate::compute::emulated::arm::Emulated;
    use crate::op::{ActivationScale, Recipe, Scale, WeightScale};

    #[test]
    fn scales_in_the_reverse_order_and_of_the_neighbour_are_recognised() {
        let bench = Bench::default();
        let scale = Scale { weight: WeightScale::Block128, activation: ActivationScale::Block128 };
        let recipe = Recipe { scale, ..bench.recipe };
        let bench = Bench { recipe, arm: Emulated::new(&recipe).expect("a recipe"), ..bench };
        let x = bench.tensor(8, 768, 1);
        let weight = bench.weight("blk.1.ffn_down.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        for (_, order) in &ORDERS[..2] {
            let change: &Edit = &|operand| reordered(operand, *order);
            let steps = Steps { w: change, ..Steps::of(&bench.recipe) };
            bench.expect("scale-order", &call, &bench.matmul(&x, weight, &steps));
        }
    }
}
