//! A run with `--memory` keeps within it, or says beforehand that it cannot: held to the kernel's own
//! count of a process's anonymous memory.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use runner::op::Arm;
use runner::record::RunRecord;

const STAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/stages");

/// The shipped stages.
const ALL: &str = "A,B,C,D,E";

/// What a run came to.
struct Ran {
    code: Option<i32>,
    stderr: String,
    /// The most anonymous memory that it had, in MiB.
    peak: u64,
}

/// Runs stages of a model under a bound in MiB, and watches its memory. Mapped files are not anonymous
/// memory: the kernel drops their pages when it needs room.
fn run(runs: &Path, model: &str, select: &str, tokens: usize, memory: Option<u64>) -> Ran {
    let tokens: Vec<String> = (1..=tokens).map(|token| (token % 90).to_string()).collect();
    let place = runs.to_str().expect("a path of text");
    let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
    command
        .args(["run", STAGES, "--model", model, "--runs", place, "--format", "plain", "--tokens"]);
    command.arg(tokens.join(",")).args(["--select", select]);
    command.args(memory.map(|memory| format!("--memory={memory}M")));
    // Without a visible device the outcome is the same on every machine.
    command.env("CUDA_VISIBLE_DEVICES", "").stdout(Stdio::null());
    let stderr = runs.join("stderr");
    command.stderr(File::create(&stderr).expect("a file"));
    let mut child = command.spawn().expect("the program starts");
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let code = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status.code();
        }
        let now = std::fs::read_to_string(&status).unwrap_or_default();
        let line = now.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) >> 10);
        std::thread::sleep(Duration::from_millis(1));
    };
    let stderr = std::fs::read_to_string(stderr).expect("its stderr");
    Ran { code, stderr, peak }
}

fn record(runs: &Path) -> RunRecord {
    let entries = std::fs::read_dir(runs).expect("a folder of runs");
    let entries = entries.map(|entry| entry.expect("an entry").path());
    let mut folders: Vec<_> = entries.filter(|path| path.join("run.json").exists()).collect();
    folders.sort();
    RunRecord::read(folders.last().expect("a run")).expect("it can be read")
}

/// What a run says of bits: each arm's key and tensors, and the verdicts.
fn bits(run: &RunRecord) -> Vec<String> {
    let arms = |stage: &runner::record::StageRecord| {
        let of = |(arm, record): (&Arm, &runner::record::ArmRecord)| {
            format!("{arm} {:?} {:?} {:?}", record.key, record.object, record.sites)
        };
        stage.arms.iter().map(of).collect::<Vec<_>>().join("; ")
    };
    let stages = run.stages.iter();
    stages
        .map(|stage| format!("{}: {} {}; {}", stage.id, stage.verdict, stage.why, arms(stage)))
        .collect()
}

#[test]
fn a_run_keeps_to_its_memory_and_makes_the_same_bits_or_is_refused_beforehand() {
    for (model, tokens) in [
        ("synthetic:qwen2-tiny", 300),
        ("synthetic:qwen3-moe-tiny", 100),
        ("synthetic:llama-tiny", 7),
    ] {
        let free = tempfile::tempdir().expect("a folder");
        let Ran { code, stderr, .. } = run(free.path(), model, ALL, tokens, None);
        assert!(matches!(code, Some(0 | 1)), "{model}: {stderr}");
        let expected = bits(&record(free.path()));
        let (mut kept, mut refused) = (0, 0);
        for memory in [64, 160, 192, 224, 256, 320, 384] {
            let runs = tempfile::tempdir().expect("a folder");
            let Ran { code: bounded, stderr, peak } =
                run(runs.path(), model, ALL, tokens, Some(memory));
            let place = format!("{model}, {memory} MiB");
            if bounded == Some(2) {
                assert!(kept == 0, "{place}: less was enough");
                for part in ["stage `", "needs up to", "`--memory` allows", "the mapped model"] {
                    assert!(stderr.contains(part), "{place}: {part}: {stderr}");
                }
                let left = std::fs::read_dir(runs.path()).expect("the folder of runs");
                let runs =
                    left.filter(|e| e.as_ref().is_ok_and(|e| e.path().join("run.json").exists()));
                assert_eq!(runs.count(), 0, "{place}: something ran");
                refused += 1;
                continue;
            }
            kept += 1;
            assert_eq!(bounded, code, "{place}: {stderr}");
            assert!(peak <= memory, "{place}: it took {peak} MiB");
            assert_eq!(bits(&record(runs.path())), expected, "{place}");
        }
        assert!(kept > 0 && refused > 0, "{model}: {kept} kept, {refused} refused");
    }
}

/// Every site of this prompt, its truths and its floors are several times the bound: where they stayed
/// in memory the second run would need as much as the first.
#[test]
fn what_is_kept_for_later_does_not_stay_in_memory() {
    const BOUND: u64 = 256;
    let runs = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    let [free, bounded] = [None, Some(BOUND)].map(|memory| {
        let place = &runs[usize::from(memory.is_some())];
        let ran = run(place.path(), "synthetic:qwen2-tiny", "B", 1200, memory);
        assert!(matches!(ran.code, Some(0 | 4)), "{}", ran.stderr);
        ran.peak
    });
    assert!(free > 3 * BOUND / 2, "without a bound it took {free} MiB: this shows nothing");
    assert!(bounded <= BOUND, "it took {bounded} MiB");
    let [free, bounded] = runs.map(|place| bits(&record(place.path())));
    assert_eq!(free, bounded);
}
