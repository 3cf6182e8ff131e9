//! A product over several GPUs whose sum lacks one, or has one's result or the bias too often.

use super::planted::{Bug, Ground, Made, bug, chosen};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::emulated::ranks::sum_by_rank;
use crate::compute::parallel;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a GPU's part of a product is missing or added twice, or each adds the bias",
    causes: &["rank-missing", "rank-twice", "bias-on-every-rank"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let Some(parts) = parallel::parts(case.recipe, &gemm.weight)? else { return Ok(Vec::new()) };
    let of_ranks = case.arm.products_of_ranks(&parts, gemm.x, gemm.weight, gemm.bias)?;
    let output = case.recipe.output;
    let mut fits = Vec::new();
    let mut fit = |cause: &str, detail: String, parts: Vec<Tensor>| {
        let predicted = case.arm.streamed(sum_by_rank(parts, output));
        fits.extend(case.fit_if_any(cause, detail, 0, &predicted));
    };
    let count = of_ranks.len();
    for rank in 0..count {
        let mut others = of_ranks.clone();
        let own = others.remove(rank);
        let detail = format!("what GPU {rank} of {count} made is not in the sum");
        fit("rank-missing", detail, others);
        let mut twice = of_ranks.clone();
        twice.push(own);
        fit("rank-twice", format!("what GPU {rank} of {count} made is added twice"), twice);
    }
    if let Some(bias) = gemm.bias {
        let values = bias.to_vec()?;
        let mut biased = of_ranks;
        biased.iter_mut().skip(1).for_each(|part| part.add_to_rows(&values));
        let detail = format!("each of {count} GPUs added `{}`", bias.name());
        fit("bias-on-every-rank", detail, biased);
    }
    Ok(fits)
}

const BUGS: &[Bug] = &[
    bug("a GPU left out of the sum", &["rank-missing"], DEALT_OUT, &missing).of_ranks(),
    bug("a GPU added twice", &["rank-twice"], DEALT_OUT, &twice).of_ranks(),
    bug("the bias added on every GPU", &["bias-on-every-rank", "bias-twice"], DEALT_OUT, &biased)
        .of_ranks(),
];

const DEALT_OUT: &[&str] = &["attn_out", "ffn_down"];

fn missing(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    summed(call, ground, |made, rank, _| drop(made.remove(rank)))
}

fn twice(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    summed(call, ground, |made, rank, _| made.push(made[rank].clone()))
}

fn biased(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    if matches!(call, Call::Matmul { bias: None, .. }) {
        return Ok(None);
    }
    summed(call, ground, |made, _, bias| {
        made.iter_mut().skip(1).for_each(|part| part.add_to_rows(bias));
    })
}

/// The sum of what GPUs made, after a change of what one of them made, or by the bias.
fn summed(
    call: &Call<'_>,
    ground: &Ground<'_>,
    change: fn(&mut Vec<Tensor>, usize, &[f32]),
) -> Made {
    let Call::Matmul { x, weight, bias } = *call else { return Ok(None) };
    let Ground { arm, recipe, seed, .. } = *ground;
    if arm.engine().is_some_and(|engine| !engine.takes_steps(weight.name())) {
        return Ok(None);
    }
    let Some(parts) = parallel::parts(recipe, &weight)? else { return Ok(None) };
    let mut made = arm.products_of_ranks(&parts, x, weight, bias)?;
    let rank = chosen(seed, made.len());
    let values = bias.map(|bias| bias.to_vec()).transpose()?.unwrap_or_default();
    change(&mut made, rank, &values);
    Ok(Some(arm.streamed(sum_by_rank(made, recipe.output))))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::MadeWeight;
    use crate::compute::emulated::arm::Emulated;
    use crate::op::Recipe;

    #[test]
    fn a_sum_without_a_rank_with_one_twice_and_with_its_bias_too_often_are_recognised() {
        let bench = Bench::default();
        for ranks in [2, 4] {
            let recipe = Recipe { tensor_parallel: NonZeroU32::new(ranks), ..bench.recipe };
            let arm = Emulated::new(&recipe).expect("a recipe");
            let bench = Bench { recipe, arm, ..Bench::default() };
            let x = bench.tensor(4, 768, 1);
            let weight = bench.weight("blk.1.ffn_down.weight");
            let values = bench.tensor(1, weight.rows(), 2);
            let made = MadeWeight::new("blk.1.ffn_down.bias".to_owned(), 1, values.data());
            let bias = Some(made.weight().expect("a bias"));
            let parts = parallel::parts(&recipe, &weight).expect("equal parts").expect("parts");
            let of_ranks = bench.arm.products_of_ranks(&parts, &x, weight, bias);
            let of_ranks = of_ranks.expect("products");
            let call = Call::Matmul { x: &x, weight, bias };
            let output = recipe.output;
            let others = [&of_ranks[..1], &of_ranks[2..]].concat();
            bench.expect("rank-missing", &call, &sum_by_rank(others, output));
            let twice = [&of_ranks[..], &of_ranks[1..2]].concat();
            bench.expect("rank-twice", &call, &sum_by_rank(twice, output));
            let mut biased = of_ranks;
            biased.iter_mut().skip(1).for_each(|part| part.add_to_rows(values.data()));
            bench.expect("bias-on-every-rank", &call, &sum_by_rank(biased, output));
        }
    }
}
