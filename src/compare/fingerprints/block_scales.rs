//! Block-scaled operands whose elements or scales are read wrongly: the halves of a byte exchanged,
//! another block's scale, the scale of the whole left out, powers of two that are rounded up.

use super::{Case, Fingerprint, Fit};
use crate::block_format::{BlockFormat, ScaleCodec};
use crate::compute::ComputeError;
use crate::compute::block_departure::{
    BlockOrder, nibbles_exchanged, powers_rounded_up, scales_in_order, whole_scale_missing,
};
use crate::compute::departure::{Edit, Steps, keep};
use crate::dtype::Format;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "elements or scales of block-scaled operands are read wrongly",
    causes: &["nibble-order", "scale-order", "scale-missing", "block-scale-rounding"],
    bugs: &[],
    test,
};

/// Larger weights are not converted as a whole.
const LARGEST: usize = 1 << 26;

const ORDERS: [(&str, BlockOrder); 6] = [
    ("of the next block along K", |row, block, _, blocks| (row, (block + 1) % blocks)),
    ("of the block before along K", |row, block, _, blocks| (row, (block + blocks - 1) % blocks)),
    ("in the reverse order along K", |row, block, _, blocks| (row, blocks - 1 - block)),
    ("of the first block of each two along K", |row, block, _, _| (row, block & !1)),
    ("of the next row", |row, block, rows, _| ((row + 1) % rows, block)),
    ("along the wrong axis", |row, block, rows, blocks| {
        let place = block * rows + row;
        (place / blocks, place % blocks)
    }),
];

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let (Some(gemm), Some(format)) = (case.gemm(), format_of(case)?) else {
        return Ok(Vec::new());
    };
    if gemm.weight.rows() * gemm.weight.width() > LARGEST {
        return Ok(Vec::new());
    }
    let mut fits = Vec::new();
    let mut tried = |cause: &str, edit: &Edit<'_>, words: &dyn Fn(&str) -> String| {
        for (whose, x, w) in
            [("activation's", edit, &keep as &Edit), ("weight's", &keep as &Edit, edit)]
        {
            let steps = Steps { x, w, ..Steps::of(case.recipe) };
            fits.extend(case.fit_gemm(cause, words(whose), gemm, &steps)?);
        }
        Ok::<(), ComputeError>(())
    };
    if format.element() == Format::E2m1 {
        tried("nibble-order", &nibbles_exchanged, &|whose| {
            format!("the two 4-bit codes of each of the {whose} bytes are exchanged")
        })?;
    }
    for (what, order) in ORDERS {
        let edit: &Edit = &|operand| scales_in_order(operand, order);
        tried("scale-order", edit, &|whose| format!("the {whose} block scales are taken {what}"))?;
    }
    match format.scales() {
        ScaleCodec::Ue4m3 => tried("scale-missing", &whole_scale_missing, &|whose| {
            format!("the {whose} scale of the whole tensor is left out")
        })?,
        ScaleCodec::Ue8m0 => tried("block-scale-rounding", &powers_rounded_up, &|whose| {
            format!(
                "the {whose} block scales are the powers of two at or above absmax / {}, not \
                 those of the OCP specification",
                format.element().max_finite()
            )
        })?,
    }
    Ok(fits)
}

/// The block-scaled format of the product at hand.
fn format_of(case: &Case<'_>) -> Result<Option<BlockFormat>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(None) };
    if case.recipe.codes.are_made() {
        return Ok(case.recipe.blocks());
    }
    Ok(case.arm.of_weight(&gemm.weight)?.and_then(|arm| arm.recipe().blocks()))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::block_departure::exponents_one_larger;
    use crate::compute::call::Call;
    use crate::compute::emulated::arm::Emulated;
    use crate::op::{Accumulate, ChipName, Recipe, Scale};

    fn bench_of(format: BlockFormat) -> Bench {
        let bench = Bench::default();
        let recipe = Recipe {
            gemm: format.element(),
            scale: Scale::of_blocks(format),
            accumulate: Accumulate::Fast,
            chip: ChipName::Blackwell,
            ..bench.recipe
        };
        Bench { recipe, arm: Emulated::new(&recipe).expect("a recipe"), ..bench }
    }

    #[test]
    fn what_is_wrong_with_blocks_is_named_in_every_format() {
        for format in BlockFormat::ALL {
            let bench = bench_of(format);
            let x = bench.tensor(8, 256, 1);
            let weight = bench.weight("blk.1.attn_q.weight");
            let call = Call::Matmul { x: &x, weight, bias: None };
            let of = |x_edit: &Edit<'_>, w_edit: &Edit<'_>| {
                bench.matmul(
                    &x,
                    weight,
                    &Steps { x: x_edit, w: w_edit, ..Steps::of(&bench.recipe) },
                )
            };
            let next: &Edit = &|operand| scales_in_order(operand, ORDERS[0].1);
            bench.expect("scale-order", &call, &of(next, &keep));
            bench.expect("scale-order", &call, &of(&keep, next));
            if format.element() == Format::E2m1 {
                bench.expect("nibble-order", &call, &of(&keep, &nibbles_exchanged));
                bench.expect("nibble-order", &call, &of(&nibbles_exchanged, &keep));
            }
            match format.scales() {
                ScaleCodec::Ue4m3 => {
                    bench.expect("scale-missing", &call, &of(&keep, &whole_scale_missing));
                }
                ScaleCodec::Ue8m0 => {
                    bench.expect("block-scale-rounding", &call, &of(&powers_rounded_up, &keep));
                    // Another bias is a factor, which other faults make too.
                    bench.expect("scale-wrong", &call, &of(&keep, &exponents_one_larger));
                }
            }
        }
    }
}
