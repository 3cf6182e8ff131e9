//! Scales that are applied to other blocks or rows than theirs: read in another order, from the
//! neighbour, those of the last whole block for a tail, or those of another weight that the
//! engine fuses with this one.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{BLOCK, Edit, Steps, keep, operands, with_scales_of};
use crate::compute::emulated::fp8_product::stacked_names;
use crate::compute::emulated::gemm::Scales;
use crate::model::{Model, Weight};
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "scales are applied to other blocks or rows than theirs",
    causes: &["scale-order", "scale-tail", "scale-slice"],
    bugs: &[],
    test,
};

/// Larger weights are not converted as a whole.
const LARGEST: usize = 1 << 26;

/// From which block the scale of a block is taken: of `(row, column)` in a grid of
/// `rows` by `columns`, as a place in the list.
type Order = fn(usize, usize, usize, usize) -> usize;

const ORDERS: [(&str, &str, Order); 8] = [
    ("scale-order", "in the reverse order along K", |row, column, _, columns| {
        row * columns + columns - 1 - column
    }),
    ("scale-order", "of the next block along K", |row, column, _, columns| {
        row * columns + (column + 1) % columns
    }),
    ("scale-order", "of the block before along K", |row, column, _, columns| {
        row * columns + (column + columns - 1) % columns
    }),
    ("scale-order", "of the next block of rows", |row, column, rows, columns| {
        (row + 1) % rows * columns + column
    }),
    ("scale-order", "of the block of rows before", |row, column, rows, columns| {
        (row + rows - 1) % rows * columns + column
    }),
    ("scale-order", "with rows and columns of the grid exchanged", |row, column, rows, _| {
        column * rows + row
    }),
    ("scale-tail", "of the block before for the last block along K", |row, column, _, columns| {
        row * columns + column.min(columns.saturating_sub(2))
    }),
    (
        "scale-tail",
        "of the block before for the last block of rows",
        |row, column, rows, columns| row.min(rows.saturating_sub(2)) * columns + column,
    ),
];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    if !case.multiplies_codes() || gemm.weight.rows() * gemm.weight.width() > LARGEST {
        return Ok(Vec::new());
    }
    let whole = match operands(case.arm, gemm.x, gemm.weight) {
        // The engine gives this weight to a kernel that is not known.
        Err(ComputeError::Recipe(_)) => return Ok(Vec::new()),
        whole => whole?,
    };
    let [(x_codes, x_scales, _), (w_codes, w_scales, before)] = whole;
    let mut fits = Vec::new();
    for (cause, what, order) in ORDERS {
        for (whose, codes, scales) in
            [("activation", &x_codes, &x_scales), ("weight", &w_codes, &w_scales)]
        {
            let Some(taken) = reordered(scales, codes.width(), order) else { continue };
            let change: &Edit = &|operand| with_scales_of(operand, &taken);
            let (x, w) =
                if whose == "weight" { (&keep as &Edit, change) } else { (change, &keep as &Edit) };
            let steps = Steps { x, w, ..Steps::of(case.recipe) };
            let detail = format!("the {whose}'s block scales are taken {what}");
            fits.extend(case.fit_gemm(cause, detail, gemm, &steps)?);
        }
    }
    // A single scale is no slice; nor is a grid that begins within another weight's blocks.
    let has_slices = !matches!(w_scales, Scales::Tensor(_)) && before == 0;
    let sisters = if has_slices { scales_of_sisters(case, gemm.weight)? } else { Vec::new() };
    for (name, scales) in sisters {
        let change: &Edit = &|operand| with_scales_of(operand, &scales);
        let steps = Steps { w: change, ..Steps::of(case.recipe) };
        let detail = format!(
            "the weight has the scales of `{name}`: the slice of the fused weight's scales begins \
             where that one's does"
        );
        fits.extend(case.fit_gemm("scale-slice", detail, gemm, &steps)?);
    }
    Ok(fits)
}

/// Block scales in another order; nothing where there are none, or where it is the same order.
pub fn reordered(scales: &Scales, width: usize, order: Order) -> Option<Scales> {
    let Scales::Block128 { rows_per_block, first_row: _, scales } = scales else { return None };
    let columns = width.div_ceil(BLOCK);
    let rows = scales.len() / columns.max(1);
    let taken = (0..scales.len()).map(|place| {
        let from = order(place / columns, place % columns, rows, columns);
        scales.get(from).copied().unwrap_or(scales[place])
    });
    let taken: Vec<f32> = taken.collect();
    let rows_per_block = *rows_per_block;
    (taken != *scales).then_some(Scales::Block128 { rows_per_block, first_row: 0, scales: taken })
}

/// The scales of the last block along K taken of the block before.
pub fn with_tail_of_before(scales: &Scales, width: usize) -> Option<Scales> {
    reordered(scales, width, ORDERS[6].2)
}

/// The scales of the weights that engines fuse with this one, where they have as many rows, with
/// their names; nothing where a weight has a single scale.
fn scales_of_sisters(
    case: &Case<'_>,
    weight: Weight<'_>,
) -> Result<Vec<(String, Scales)>, ComputeError> {
    let Some(model) = case.model else { return Ok(Vec::new()) };
    let mut sisters = Vec::new();
    let x = Tensor::zeros(1, weight.width());
    for name in sisters_of(weight.name(), model) {
        let sister = model.tensor(&name)?;
        let is_large = sister.rows() * sister.width() > LARGEST;
        if is_large || sister.rows() < weight.rows() || sister.width() != weight.width() {
            continue;
        }
        let [_, (_, scales, before)] = operands(case.arm, &x, sister)?;
        if before == 0 {
            sisters.push((name, scales));
        }
    }
    Ok(sisters)
}

/// The names of the weights that engines fuse with the one of this name, where the model has them.
pub fn sisters_of(name: &str, model: &Model) -> Vec<String> {
    stacked_names(name).into_iter().filter(|other| other != name && model.has(other)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::{Call, MadeWeight};
    use crate::op::{ActivationScale, WeightScale};

    fn in_blocks() -> Bench {
        Bench::with_scales(WeightScale::Block128, ActivationScale::Block128)
    }

    #[test]
    fn scales_in_another_order_or_of_the_block_before_a_tail_are_recognised() {
        let bench = in_blocks();
        let x = bench.tensor(8, 768, 1);
        let weight = bench.weight("blk.1.ffn_down.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        let [_, (_, scales, _)] = operands(&bench.arm, &x, weight).expect("operands");
        for index in [0, 1, 3, 6, 7] {
            let (cause, what, order) = ORDERS[index];
            let taken = reordered(&scales, 768, order).expect("another order");
            let change: &Edit = &|operand| with_scales_of(operand, &taken);
            let steps = Steps { w: change, ..Steps::of(&bench.recipe) };
            let wrong = bench.matmul(&x, weight, &steps);
            let fits = bench.fits(&call, &wrong);
            // A grid of two blocks of rows: its neighbour is the next and the one before.
            assert_eq!(fits[0].cause, cause, "{what}: {fits:#?}");
            assert!(fits[0].is_exact(), "{what}: {fits:#?}");
        }
    }

    #[test]
    fn the_scales_of_another_part_of_a_fused_weight_are_recognised() {
        let by_row = Bench::with_scales(WeightScale::Channel, ActivationScale::Token);
        for bench in [in_blocks(), by_row] {
            let x = bench.tensor(4, 256, 1);
            // Weights of the synthetic model have one largest value; this one is smaller.
            let values = bench.weight("blk.1.attn_k.weight").to_vec().expect("values");
            let values: Vec<f32> = values.iter().map(|w| 0.7 * w).collect();
            let made =
                MadeWeight::new("blk.1.attn_k.weight".to_owned(), values.len() / 256, &values);
            let weight = made.weight().expect("a weight");
            let sister = bench.weight("blk.1.attn_q.weight");
            let [_, (_, scales, _)] = operands(&bench.arm, &x, sister).expect("operands");
            let change: &Edit = &|operand| with_scales_of(operand, &scales);
            let steps = Steps { w: change, ..Steps::of(&bench.recipe) };
            let call = Call::Matmul { x: &x, weight, bias: None };
            let wrong = bench.matmul(&x, weight, &steps);
            bench.expect("scale-slice", &call, &wrong);
            assert!(bench.fits(&call, &wrong)[0].detail.contains("attn_q"));
        }
        let model = &super::super::bench::Bench::default().model;
        assert!(sisters_of("blk.0.ffn_down.weight", model).is_empty());
        assert_eq!(sisters_of("blk.2.ffn_up.weight", model), ["blk.2.ffn_gate.weight"]);
    }
}
