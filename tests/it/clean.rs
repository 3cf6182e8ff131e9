//! Runs without a bug pass: shapes, recipes and prompts that once gave a false alarm.

use std::fs;
use std::path::Path;
use std::process::Command;

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

/// Runs the shipped stages on a random shape under the recipe f32, as a user would.
fn with_f32(seed: u64, tokens: u64) -> (Option<i32>, String) {
    let place = tempfile::tempdir().expect("a folder");
    for part in ["stages", "contracts"] {
        fs::create_dir(place.path().join(part)).expect("a folder");
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(part);
        for file in fs::read_dir(shipped).expect("shipped").flatten() {
            let to = place.path().join(part).join(file.file_name());
            fs::copy(file.path(), to).expect("a copy");
        }
    }
    let tokens: Vec<String> = (0..tokens).map(|i| ((37 * i + 11) % 600).to_string()).collect();
    let pipeline = format!(
        "model = \"synthetic:random\"\nseed = {seed}\ntokens = [{}]\n\
         arms = [\"reference\", \"emulated\", \"device\"]\n[recipe]\ngemm = \"f32\"\noutput = \"f32\"\n",
        tokens.join(", ")
    );
    fs::write(place.path().join("stages/pipeline.toml"), pipeline).expect("a manifest");
    let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
    // Stage A computes many whole passes, and says nothing of floors.
    command.args(["run", "stages/", "--select", "B,C,D,E", "--format", "plain"]);
    command.current_dir(place.path());
    let output = command.env("CUDA_VISIBLE_DEVICES", "").output().expect("the program starts");
    (output.status.code(), String::from_utf8(output.stdout).expect("text"))
}

/// An average over where along K the large terms stand called these structural: a value of
/// 7.8 to 8.3 deviations, a site's error of 0.79 times its floor.
#[test]
fn f32_sums_stay_within_a_floor_that_follows_them() {
    for (seed, tokens) in [(102, 5), (120, 17), (114, 40), (121, 40)] {
        let (code, table) = with_f32(seed, tokens);
        assert_eq!(code, Some(0), "seed {seed}: {table}");
    }
}

/// Fewer than 512 outputs were called too few for a root mean square.
#[test]
fn one_token_with_narrow_heads_is_measured() {
    for seed in [104, 107, 123] {
        let (code, table) = with_f32(seed, 1);
        assert_eq!(code, Some(0), "seed {seed}: {table}");
    }
}
