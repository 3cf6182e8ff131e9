//! Runs without a bug pass: shapes, recipes and prompts that once gave a false alarm.

use std::path::Path;

use runner::falsify::{CLEAN_MODELS, CleanRuns, clean_runs};
use runner::graph::Graph;
use runner::manifest::Pipeline;

/// What stages other than `pass` say in some clean runs of a seed.
fn said(seed: u64, first: u64, count: u64) -> Vec<String> {
    let models = CLEAN_MODELS.map(str::to_owned);
    let every = |_: &Graph, pipeline: &Pipeline| {
        Ok(pipeline.stages.iter().map(|stage| stage.id.clone()).collect())
    };
    let runs = CleanRuns {
        folder: &Path::new(env!("CARGO_MANIFEST_DIR")).join("stages"),
        models: &models,
        seed,
        numbers: first..first + count,
        selected: &every,
        gpu: false,
    };
    let tally = clean_runs(&runs, &|_| {}).expect("clean runs");
    assert_eq!(tally.stages, 5 * count as usize, "every stage of every run is judged");
    let alarm = |alarm: &runner::falsify::Alarm| format!("{}: {}", alarm.setting, alarm.why);
    tally.alarms.iter().map(alarm).collect()
}

#[test]
fn clean_runs_over_random_shapes_pass() {
    assert_eq!(said(1, 0, 6), Vec::<String>::new());
}
