//! Tensor parallelism: which products several ranks compute together, and what each of them does.
//!
//! A pass over N GPUs deals each block's products out as Megatron does. Of `attn_q`, `attn_k`,
//! `attn_v`, `ffn_gate` and `ffn_up` each rank has some outputs, whole heads where there are heads:
//! an output's bits do not depend on who computes it. Of `attn_output` and `ffn_down` each rank
//! has the elements of K that it made before. It converts its own slice of x, with scales of that
//! slice, and multiplies it by its slice of the weight, which was converted before it was dealt out;
//! what it has is rounded to the output type, and the ranks' results are added in that type.
//! The vocabulary is dealt out too, but lookups and logits are copied together, never added up.
//!
//! Here stand the ranks' parts of K; how an arm computes and adds them is the arm's.

use std::ops::Range;

use super::{ComputeError, checkpoint};
use crate::chip::{Basis, Evidence};
use crate::model::{Config, Model, Weight};
use crate::op::{Recipe, WeightScale, in_layer};

/// Elements of K at whose multiples a cut may lie: what an instruction of a tensor core and a
/// load of a GPU take together.
const STEP: usize = 16;
/// Elements of K that share a block scale.
const BLOCK: usize = 128;

/// The parts of K that the ranks multiply with a weight; nothing where one GPU computes the
/// product alone, or each rank has outputs of its own.
///
/// # Errors
/// If the ranks' parts of this K cannot be equal, or would cut a block of scales.
pub fn parts(
    recipe: &Recipe,
    weight: &Weight<'_>,
) -> Result<Option<Vec<Range<usize>>>, ComputeError> {
    let ranks = recipe.ranks();
    if ranks < 2 || !is_cut_along_k(weight.name()) {
        return Ok(None);
    }
    let of_128 = recipe.gemm.is_fp8() && recipe.scale.weight == WeightScale::Block128;
    let of_format = recipe.blocks().map(|format| format.block());
    let block = of_128.then_some(BLOCK).or(of_format);
    let step = block.unwrap_or(STEP);
    let width = weight.width();
    if !width.is_multiple_of(ranks * step) {
        let what = match block {
            Some(block) => format!("blocks of {block} scaled together"),
            None => format!("steps of {STEP}"),
        };
        return Err(ComputeError::Recipe(format!(
            "`tensor_parallel = {ranks}`: the weight {} has {width} elements of K, which are not \
             {ranks} equal parts of whole {what}; {}",
            weight.in_words(),
            fitting(width / step)
        )));
    }
    let part = width / ranks;
    Ok(Some((0..ranks).map(|rank| rank * part..(rank + 1) * part).collect()))
}

/// The one part of a product that one GPU computes alone.
pub fn alone(width: usize) -> Vec<Range<usize>> {
    std::iter::once(0..width).collect()
}

/// Whether ranks have parts of K of this weight, by its name.
fn is_cut_along_k(name: &str) -> bool {
    in_layer(name)
        .is_some_and(|(_, inner)| matches!(inner, "attn_output.weight" | "ffn_down.weight"))
}

/// What to write where so many steps do not go into equal parts.
fn fitting(steps: usize) -> String {
    let fit: Vec<String> = (2..=steps)
        .filter(|ranks| steps.is_multiple_of(*ranks))
        .take(6)
        .map(|ranks| ranks.to_string())
        .collect();
    match fit.as_slice() {
        [] => "leave `tensor_parallel` out".to_owned(),
        fit => format!("what goes: {}", fit.join(", ")),
    }
}

/// Refuses a model whose products the recipe's ranks cannot share, before anything runs.
///
/// # Errors
/// In words: what does not fit, and what to write.
pub fn check(recipe: &Recipe, model: &Model) -> Result<(), String> {
    let ranks = recipe.ranks();
    if ranks < 2 {
        return Ok(());
    }
    let refuse = |what: String| {
        Err(format!(
            "`tensor_parallel = {ranks}`: {what}; leave it out, or write a number that fits"
        ))
    };
    let Config { heads, kv_heads, ffn, .. } = *model.config();
    for (is_there, what) in [
        (model.config().experts.is_some(), "a mixture of experts"),
        (model.config().latent.is_some(), "latent attention"),
        (model.config().delta.is_some(), "delta nets"),
    ] {
        if is_there {
            return Err(format!(
                "`tensor_parallel = {ranks}`: this model has {what}, and how engines deal that \
                 out was not looked at; leave `tensor_parallel` out"
            ));
        }
    }
    if !heads.is_multiple_of(ranks) {
        return refuse(format!(
            "the model's {heads} heads of queries do not go to {ranks} GPUs whole"
        ));
    }
    // Of fewer heads of keys than ranks, several ranks have the same one.
    if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
        return refuse(format!(
            "the model's {kv_heads} heads of keys and values neither go to {ranks} GPUs whole nor \
             to the same number of GPUs each"
        ));
    }
    if !ffn.is_multiple_of(ranks) {
        return refuse(format!(
            "{ffn} values of the feed-forward network are not {ranks} equal parts"
        ));
    }
    for name in model.names().filter(|name| is_cut_along_k(name)) {
        let weight = model.tensor(name).map_err(|error| error.to_string())?;
        let of_weight =
            checkpoint::of_weight(recipe, &weight).map_err(|error| error.to_string())?;
        let recipe = of_weight.map_or(*recipe, |of_weight| of_weight.recipe);
        parts(&recipe, &weight).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// What the order of the ranks' sums rests on, where an engine's own may be another one.
pub fn basis(recipe: &Recipe) -> Option<Basis> {
    let source = "the order in which more than two GPUs' results are added: NCCL's ring begins each \
                  stretch of a sum at another rank, and this is the order from rank 0 on";
    (recipe.ranks() > 2).then(|| Basis { evidence: Evidence::Assumed, source: source.into() })
}

/// What the ranks do, for the words of an arm's arithmetic.
pub fn in_words(recipe: &Recipe) -> String {
    match recipe.ranks() {
        0 | 1 => String::new(),
        ranks => format!(", K over {ranks} ranks, added in {} by rank", recipe.output),
    }
}
