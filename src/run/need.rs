//! How much memory a job takes beyond mapped files, where tensors that are kept for later are put
//! away on disk: what a run with a bound reckons with before anything runs.
//!
//! The figures are upper bounds of what was measured: the anonymous memory of runs with 0.5B shapes
//! and with the tiny models, which `tests/it/memory.rs` measures again. They are no part of any result.

use crate::model::Model;
use crate::op::{Arm, Capture, Op, Recorded};
use crate::plan::{Plan, PreparedStage};
use crate::text::size;

/// A job, as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// One arm.
    Arm(Arm),
    /// The stage's measures, and what is looked at where a claim falls.
    Measures,
}

const MIB: u64 = 1 << 20;
/// What the program has before it computes anything, and with each thread.
const PROGRAM: u64 = 96 * MIB;
const PER_THREAD: u64 = 24 * MIB;
/// Bytes for each value of the widest activation that live at once: what an op reads and writes, both
/// also as f64, and the op before.
const PER_VALUE: u64 = 64;
/// Bytes for each logit of an arm: as f32 and f64, and a copy.
const PER_LOGIT: u64 = 16;
/// Passes that are drawn in one sweep, the bytes that each has of a value and of a logit, and those of
/// a logit that is compared.
const DRAWN: u64 = 4;
const PER_DRAWN_VALUE: u64 = 32;
const PER_DRAWN_LOGIT: u64 = 8;
const PER_COMPARED_LOGIT: u64 = 6;
/// Bytes for each byte of a file that is read as tensors: FP8 codes become f32, with room for a copy.
const PER_BYTE_READ: u64 = 6;

/// An upper bound of the memory that a job takes.
pub(super) fn need(prepared: &PreparedStage<'_>, item: Item) -> u64 {
    let threads = rayon::current_num_threads() as u64;
    let own = match (&prepared.stage.op, item) {
        (Op::Command(_), _) => return 0,
        (_, Item::Arm(Arm::Recorded)) => of_file(prepared.stage.recorded.as_ref()),
        (Op::Gemm { x, w }, _) => {
            let operands = [x, w].map(|tensor| length(&tensor.file));
            operands.into_iter().sum::<u64>() * PER_BYTE_READ
                + of_file(prepared.stage.recorded.as_ref())
        }
        _ => prepared.model.as_ref().map_or(0, |open| of_pass(prepared, &open.model, item)),
    };
    PER_THREAD * threads + own
}

fn of_file(recorded: Option<&Recorded>) -> u64 {
    recorded.map_or(0, |from| length(&from.file) * PER_BYTE_READ)
}

fn length(file: &std::path::Path) -> u64 {
    std::fs::metadata(file).map_or(0, |facts| facts.len())
}

fn of_pass(prepared: &PreparedStage<'_>, model: &Model, item: Item) -> u64 {
    let config = model.config();
    let op = &prepared.stage.op;
    let mut rows = prepared.tokens.len().max(1);
    let mut logits = 0;
    let mut drawn = false;
    if let Op::Forward { capture, .. } = op {
        logits = capture.with_logits(rows).len();
        if capture.is_of_logits() {
            // The prompt is repeated in one batch.
            rows = (2 * rows).min(config.context_length.max(rows));
            logits = if *capture == Capture::LastLogits { logits } else { rows };
            drawn = item == Item::Measures;
        }
    }
    let (rows, logits) = (rows as u64, logits as u64);
    let values = rows * widest(model) as u64;
    let cache = rows * (config.layers * 2 * config.kv_heads * config.head_dim * 4) as u64;
    let of_logits = logits * config.vocabulary as u64;
    let pass = values * PER_VALUE + cache;
    if !drawn {
        return pass + of_logits * PER_LOGIT;
    }
    let each = values * PER_DRAWN_VALUE + cache + of_logits * PER_DRAWN_LOGIT;
    pass + DRAWN * each + of_logits * PER_COMPARED_LOGIT
}

/// The widest activation of a pass but for its logits.
fn widest(model: &Model) -> usize {
    let config = model.config();
    let of_weights = model.names().filter(|name| name.starts_with("blk.0.")).filter_map(|name| {
        let weight = model.tensor(name).ok()?;
        Some(weight.rows().max(weight.width()))
    });
    let attention = config.heads * config.head_dim.max(config.value_dim());
    let experts = (0..config.layers).filter_map(|layer| config.experts_of(layer));
    let experts = experts.map(|experts| experts.routing.used * experts.ffn.max(config.hidden));
    of_weights.chain([config.hidden, config.ffn, attention]).chain(experts).max().unwrap_or(1)
}

/// Refuses a bound that a stage's jobs cannot keep, before anything runs.
///
/// # Errors
/// With the job of the plan that needs most, and what it needs.
pub fn check_memory(plan: &Plan<'_>, most: u64) -> Result<(), String> {
    let items = plan.stages.iter().flat_map(|prepared| {
        let arms = prepared.stage.arms.iter().map(|arm| Item::Arm(*arm));
        arms.chain([Item::Measures])
            .map(move |item| (PROGRAM + need(prepared, item), prepared, item))
    });
    let Some((needed, prepared, item)) = items.max_by_key(|(needed, ..)| *needed) else {
        return Ok(());
    };
    if needed <= most {
        return Ok(());
    }
    let what = match item {
        Item::Arm(arm) => format!("the {arm} arm"),
        Item::Measures => "measuring".to_owned(),
    };
    Err(format!(
        "stage `{}`: {what} needs up to {} of memory beyond the mapped model, more than any other \
         job, and `--memory` allows {}; allow that much, give a shorter prompt, or leave the stage \
         out with `--select`",
        prepared.stage.id,
        size(needed),
        size(most)
    ))
}

/// What of a bound is left for jobs.
pub fn for_jobs(most: u64) -> u64 {
    most.saturating_sub(PROGRAM)
}
