//! Clean runs: pipelines without a bug, under models, recipes and prompts that a seed
//! draws. Whatever does not pass there is a false alarm.
//!
//! It draws settings and runs them side by side, each with a cache of its own that is
//! gone when the run ends. How a pipeline runs is not its concern, nor what an alarm means.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{Alarm, Beside, Setting, load, try_clean, with_recipe};
use crate::cache::{Stamps, Store};
use crate::dtype::Format;
use crate::graph::Graph;
use crate::interrupt;
use crate::manifest::{Pipeline, Prompt};
use crate::model::Model;
use crate::op::{
    Accumulate, ActivationScale, ChipName, Op, Pin, Recipe, Scale, StageId, WeightScale,
};
use crate::plan::open_model;
use crate::random::Random;

/// What clean runs draw from when no model is named: mostly shapes of a seed.
pub const MODELS: [&str; 12] = [
    "synthetic:random",
    "synthetic:random",
    "synthetic:random",
    "synthetic:qwen2-tiny",
    "synthetic:random",
    "synthetic:random",
    "synthetic:random",
    "synthetic:llama-tiny",
    "synthetic:random",
    "synthetic:random",
    "synthetic:random",
    "synthetic:qwen3-tiny",
];

/// The clean runs that are wanted.
pub struct CleanRuns<'a> {
    /// The folder of stages.
    pub folder: &'a Path,
    /// The models, in turn.
    pub models: &'a [String],
    /// Names all that is drawn.
    pub seed: u64,
    /// Their numbers: the same seed and number give the same run.
    pub numbers: Range<u64>,
    /// The stages of a pipeline that are run.
    pub selected: &'a Selected<'a>,
    /// Whether this machine's GPU is the device.
    pub gpu: bool,
}

/// Which stages of a pipeline are run.
pub type Selected<'a> = dyn Fn(&Graph, &Pipeline) -> Result<BTreeSet<StageId>, String> + Sync + 'a;

/// What clean runs gave.
#[derive(Debug, Default)]
pub struct CleanTally {
    /// Stages that were judged.
    pub stages: usize,
    /// Those that did not pass, in the order of the runs.
    pub alarms: Vec<Alarm>,
}

/// Runs them, as many side by side as this process has cores; `said` hears of each
/// alarm at once.
///
/// # Errors
/// If a folder cannot be written, the stages have problems, or the user stops it.
pub fn clean_runs(
    runs: &CleanRuns<'_>,
    said: &(dyn Fn(&Alarm) + Sync),
) -> Result<CleanTally, String> {
    let next = AtomicU64::new(runs.numbers.start);
    let broken = AtomicBool::new(false);
    let done: Mutex<Vec<(u64, Result<CleanTally, String>)>> = Mutex::default();
    let lock = || done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let work = || {
        while !interrupt::requested() && !broken.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if !runs.numbers.contains(&number) {
                break;
            }
            let tally = clean_run(runs, number);
            broken.fetch_or(tally.is_err(), Ordering::Relaxed);
            tally.iter().flat_map(|tally| &tally.alarms).for_each(said);
            lock().push((number, tally));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    if interrupt::requested() {
        return Err("the clean runs were stopped".to_owned());
    }
    let mut done = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    done.sort_by_key(|(number, _)| *number);
    let mut all = CleanTally::default();
    for (_, tally) in done {
        let tally = tally?;
        all.stages += tally.stages;
        all.alarms.extend(tally.alarms);
    }
    Ok(all)
}

/// One run, in a cache of its own: two thousand would leave gigabytes in one.
fn clean_run(runs: &CleanRuns<'_>, number: u64) -> Result<CleanTally, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("cannot make a folder: {error}"))?;
    let store = Store::new(folder.path());
    let beside = Beside::new(&store, runs.gpu)?;
    let parts = [runs.seed.to_le_bytes(), number.to_le_bytes()];
    let mut random = Random::named("runner 2026 clean runs v2", &[&parts[0], &parts[1]]);
    let model = &runs.models[(number % runs.models.len() as u64) as usize];
    let recipe = drawn_recipe(&mut random);
    let seed = random.below(1 << 30) as u64;
    let open = open_model(model, seed, &store, &Stamps::forgetful())?;
    let tokens = drawn_tokens(&mut random, &open.model, number);
    let pipeline = with_recipe(&load(runs.folder, model, None)?, recipe);
    let pipeline = on_tokens(&pipeline, &tokens, seed);
    let graph = Graph::of(&pipeline.stages).map_err(|error| error.to_string())?;
    let stages = (runs.selected)(&graph, &pipeline)?;
    let Recipe { gemm, scale, accumulate, output, chip, .. } = recipe;
    let setting = Setting {
        name: format!(
            "run {number}: {model} seed {seed}, {gemm} {scale:?} {accumulate:?} to {output} on \
             {chip}, {} tokens",
            tokens.len()
        ),
        pipeline: &pipeline,
        graph: &graph,
        stages: &stages,
        store: &store,
        beside: &beside,
    };
    Ok(CleanTally { stages: stages.len(), alarms: try_clean(&setting)? })
}

/// A recipe of any format, scales, accumulation, output and chip that go together.
fn drawn_recipe(random: &mut Random) -> Recipe {
    const FORMATS: [Format; 8] = [
        Format::F32,
        Format::Tf32,
        Format::Bf16,
        Format::F16,
        Format::E4m3,
        Format::E4m3,
        Format::E5m2,
        Format::Int8,
    ];
    let gemm = FORMATS[random.below(FORMATS.len())];
    let weight = [WeightScale::Tensor, WeightScale::Channel][random.below(2)];
    let activation = [ActivationScale::Tensor, ActivationScale::Token][random.below(2)];
    let accumulate = [Accumulate::Fast, Accumulate::Promoted][random.below(2)];
    // Scales of blocks go together, and with promotion alone; only FP8 and int8 are scaled.
    let scale = match random.below(3) {
        _ if !gemm.is_scaled() => {
            Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor }
        }
        0 if accumulate == Accumulate::Promoted && gemm.is_fp8() => {
            Scale { weight: WeightScale::Block128, activation: ActivationScale::Block128 }
        }
        _ => Scale { weight, activation },
    };
    let output = [Format::F32, Format::Bf16, Format::F16][random.below(3)];
    // Of those that multiply the format, the chips of which something was seen.
    let chips: Vec<ChipName> = ChipName::ALL
        .into_iter()
        .filter(|&name| {
            let chip = crate::compute::emulated::chip::chip(name);
            chip.unit(gemm, gemm).is_some() && chip.is_seen()
        })
        .collect();
    let chip = chips[random.below(chips.len())];
    Recipe {
        gemm,
        scale,
        accumulate,
        output,
        chip,
        stream: None,
        engine: None,
        emulate: None,
        codes: crate::op::Codes::Made,
        pin: Pin::NONE,
        kv_cache: None,
        tensor_parallel: None,
    }
}

/// A prompt of 1 to 300 tokens, shorter for a larger model, so that every run is cheap;
/// one run in sixteen may cost four times as much.
fn drawn_tokens(random: &mut Random, model: &Model, number: u64) -> Vec<u32> {
    /// Products of one pass over the prompt.
    const WORK: usize = 4 << 20;
    const LONGEST: usize = 300;
    let config = model.config();
    let per_layer = config.hidden * (config.heads + config.kv_heads) * 2 * config.head_dim
        + 3 * config.hidden * config.ffn;
    let products = config.layers * per_layer + config.hidden * config.vocabulary;
    let work = if number % 16 == 7 { 4 * WORK } else { WORK };
    let most = (work / products.max(1)).clamp(1, LONGEST);
    let count = 1 + if random.below(6) == 0 { random.below(4) } else { random.below(most) };
    (0..count).map(|_| random.below(config.vocabulary) as u32).collect()
}

/// The same pipeline on other tokens and another seed. Nothing is decoded: no contract
/// judges that, and each token costs as much as a prompt.
fn on_tokens(pipeline: &Pipeline, tokens: &[u32], seed: u64) -> Pipeline {
    let mut pipeline = pipeline.clone();
    for stage in pipeline.stages.iter_mut().filter(|stage| !matches!(stage.op, Op::Command(_))) {
        stage.prompt = Prompt::Tokens(tokens.to_vec());
        stage.seed = seed;
        if let Op::Forward { decode, .. } = &mut stage.op {
            *decode = 0;
        }
    }
    pipeline
}
