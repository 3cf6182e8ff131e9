//! Faults of the machine around the real program: streams that are closed, disks that are full,
//! bits that flip in all that the cache holds, and runs, checks and clearings beside each other.
//! Whatever came of a run is held to an undisturbed one: verdicts, keys, objects, sites' hashes,
//! values.
//!
//! `RUNNER_FAULTS` says how many streams and disks, ten times as many bits, and five times as
//! many rounds; `RUNNER_SEED` draws them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use runner::random::Random;
use serde_json::Value;

use super::{count_of, seed};
use crate::cache::pipeline;
use crate::command::{Outcome, Project};
use crate::data::own;
use crate::faults::files;
use crate::hostile::{shell, within};

/// A drawing of its own for each test.
fn random(name: &str) -> Random {
    Random::named("runner 2026 campaign faults", &[&seed().to_le_bytes(), name.as_bytes()])
}

fn faults() -> u64 {
    count_of("RUNNER_FAULTS", 5)
}

/// Commands and questions about a generated model, so that its cache holds everything that a
/// cache can hold.
fn whole() -> Project {
    let mut project = pipeline();
    // A program that passes over its own failure to write would be believed.
    let honest = project.read("stages/d.toml").replace(" 2> /dev/null; true", "");
    project = project.file("stages/d.toml", &honest);
    for name in ["embedding", "rms-norm", "qkv-matmul"] {
        let text = fs::read_to_string(own(&format!("contracts/{name}.toml"))).expect("shipped");
        project = project.file(&format!("contracts/{name}.toml"), &text);
    }
    for name in ["c-embedding", "d-rms-norm", "e-qkv-matmul"] {
        let text = fs::read_to_string(own(&format!("stages/{name}.toml"))).expect("shipped");
        project = project.file(&format!("stages/{name}.toml"), &text);
    }
    // Large enough that writing it takes a moment, and that it does not fit by chance.
    let large = "shell = 'yes large | head -c 700000 > large'\noutputs = [\"large\"]";
    project.stage("large", large).file(
        "stages/pipeline.toml",
        "model = \"synthetic:qwen2-tiny\"\ntokens = [791, 374, 264, 1296]\n\
         arms = [\"reference\", \"emulated\"]\n[recipe]\ngemm = \"e4m3\"\n",
    )
}

/// What the commands of [`whole`] write, and which of them.
const OUTPUTS: [&str; 5] = ["mid", "end", "said", "all", "large"];
const WRITERS: [&str; 5] = ["a", "b", "c", "d", "large"];

/// What may not differ between two runs of the same: all of run.json but its times, and why an
/// arm did or did not run.
fn results(run: &str) -> Result<BTreeMap<String, Value>, String> {
    let mut run: Value =
        serde_json::from_str(run).map_err(|e| format!("no run.json: {e}: {run}"))?;
    let mut all = BTreeMap::new();
    for stage in run["stages"].as_array_mut().ok_or("no stages")? {
        let id = stage["id"].as_str().unwrap_or_default().to_owned();
        let stage = stage.as_object_mut().ok_or("no stage")?;
        stage.remove("seconds");
        stage.remove("costs");
        for arm in stage["arms"].as_object_mut().ok_or("no arms")?.values_mut() {
            let arm = arm.as_object_mut().ok_or("no arm")?;
            let state = arm.remove("state").unwrap_or_default();
            if state != "ran" && state != "reused" {
                return Err(format!("an arm of {id} is {state}: {}", arm["why"]));
            }
            arm.remove("why");
            arm.remove("seconds");
            if let Some(command) = arm.get_mut("command").and_then(Value::as_object_mut) {
                command.remove("seconds");
            }
        }
        all.insert(id, Value::Object(stage.clone()));
    }
    Ok(all)
}

/// The first way in which results differ, in words.
fn difference(right: &BTreeMap<String, Value>, run: &str) -> Option<String> {
    fn differs(at: &str, right: &Value, other: &Value) -> Option<String> {
        match (right, other) {
            (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
                a.iter().find_map(|(key, value)| differs(&format!("{at}/{key}"), value, &b[key]))
            }
            (Value::Array(a), Value::Array(b)) if a.len() == b.len() => (0..a.len())
                .find_map(|index| differs(&format!("{at}/{index}"), &a[index], &b[index])),
            _ => (right != other).then(|| format!("{at}: {other}, not {right}")),
        }
    }
    let found = match results(run) {
        Ok(found) => found,
        Err(problem) => return Some(problem),
    };
    if !found.keys().eq(right.keys()) {
        return Some(format!("it has the stages {:?}", found.keys().collect::<Vec<_>>()));
    }
    right.iter().find_map(|(id, stage)| differs(id, stage, &found[id]))
}

/// A run without the stages that ended in an error, which is no verdict, or wait for such; and
/// without those whose program said itself that it failed.
fn without_errors(run: &str) -> String {
    let Ok(mut json) = serde_json::from_str::<Value>(run) else { return run.to_owned() };
    if let Some(stages) = json["stages"].as_array_mut() {
        stages.retain(|stage| {
            let ended = stage["verdict"] != "error" && stage["verdict"] != "blocked";
            ended && !failed_by_itself(stage)
        });
    }
    json.to_string()
}

/// Whether a stage's program ended with another status than 0, as on a full disk it must.
fn failed_by_itself(stage: &Value) -> bool {
    let why = stage["why"].as_str().unwrap_or_default();
    why.starts_with("status ") && !why.starts_with("status 0")
}

/// The right results of the stages that are known.
fn those_of(
    right: &BTreeMap<String, Value>,
    known: &BTreeMap<String, Value>,
) -> BTreeMap<String, Value> {
    let known = right.iter().filter(|(id, _)| known.contains_key(*id));
    known.map(|(id, stage)| (id.clone(), stage.clone())).collect()
}

fn json(project: &Project, arguments: &[&str]) -> Outcome {
    let all: Vec<&str> =
        ["run", "stages", "--format", "json"].iter().chain(arguments).copied().collect();
    Outcome::of(within(120, &mut project.command(&all)))
}

/// A whole project with a run behind it, and what came of that.
fn undisturbed() -> (Project, BTreeMap<String, Value>) {
    let project = whole();
    let run = json(&project, &[]);
    assert_eq!(run.code, Some(0), "{}", run.err);
    let right = results(&run.out).expect("a run");
    // Past the moment in which young files are not written down.
    std::thread::sleep(Duration::from_millis(30));
    let run = json(&project, &[]);
    assert_eq!((run.code, difference(&right, &run.out)), (Some(0), None), "{}", run.err);
    (project, right)
}

/// No panic, no abort, no signal: an exit code that is documented.
fn is_documented(code: Option<i32>) -> bool {
    matches!(code, Some(0..=4 | 74))
}

#[test]
fn streams_that_close_at_any_moment_lose_no_run_and_make_none_false() {
    let (project, right) = undisturbed();
    let mut random = random("streams");
    const RUNS: usize = 4;
    let commands = [
        "run stages",
        "run stages --force --format plain",
        "run stages --force --quiet",
        "run stages --format json",
        "check",
        "plan stages --explain",
        "explain E",
        "report latest --format junit",
        "report latest --format csv",
        "cache ls",
        "cache verify",
        "history",
        "graph",
    ];
    let whole_runs = || {
        let runs = fs::read_dir(project.path("runs")).expect("runs").flatten();
        runs.filter(|run| run.path().join("run.json").is_file()).count()
    };
    let (mut problems, mut expected) = (Vec::new(), whole_runs());
    let rounds = faults();
    for round in 0..rounds {
        // Half of them are runs, which have something to lose.
        let among = if random.below(2) == 0 { RUNS } else { commands.len() };
        let command = commands[random.below(among)];
        let mut stream = |number: u8| match random.below(5) {
            0 => (format!("{number}>&-"), true),
            1 => (format!("{number}>/dev/full"), true),
            2 | 3 => {
                let wait = random.unit() * 0.3;
                (format!("{number}> >(sleep {wait:.3})"), true)
            }
            _ => (format!("{number}>/dev/null"), false),
        };
        let ((out, disturbed), (err, _)) = (stream(1), stream(2));
        let stdin = if random.below(2) == 0 { "<&-" } else { "</dev/null" };
        let line = format!("exec \"$R\" {command} {stdin} {out} {err}");
        let code = Outcome::of(within(60, &mut shell(&project, &line))).code;
        let right = code == Some(0) || disturbed && matches!(code, Some(2 | 74));
        if !right {
            problems.push(format!("round {round}: exit {code:?} of: {line}"));
        }
        expected += usize::from(command.starts_with("run"));
        if whole_runs() != expected {
            problems.push(format!("round {round}: {} runs, not {expected}: {line}", whole_runs()));
            expected = whole_runs();
        }
    }
    let run = json(&project, &[]);
    assert_eq!((run.code, difference(&right, &run.out)), (Some(0), None), "{}", run.err);
    project.runner(&["cache", "verify"]).expect(0, "sound");
    println!("seed {}, {rounds} commands with closed streams", seed());
    assert!(problems.is_empty(), "seed {}:\n{}", seed(), problems.join("\n"));
}

/// Which part of a project lies on the small disk.
#[derive(Clone, Copy, Debug)]
enum Disk {
    Runs,
    /// What the runner keeps of the user's own.
    Home,
    /// The whole project.
    All,
}

/// A script for a space of mounts of its own: a run on a disk of some KiB, then another with room.
fn on_a_small_disk(project: &Path, disk: Disk, kib: u64, out: &Path) -> Command {
    let place = match disk {
        Disk::Runs => "runs",
        Disk::Home => "home",
        Disk::All => ".",
    };
    let script = r#"
set -eu
root=$(mktemp -d "$OUT/root.XXXXXX")
if [ "$PLACE" = . ]; then
    mount -t tmpfs -o size="$KIB"k small "$root" && cp -a "$PROJECT/." "$root"
    disk=$root
else
    cp -a "$PROJECT/." "$root" && mkdir -p "$root/$PLACE"
    disk=$root/$PLACE
    mount -t tmpfs -o size="$KIB"k small "$disk"
fi
echo mounted > "$OUT/mounted"
cd "$root"
export XDG_CACHE_HOME=$root/home XDG_RUNTIME_DIR=$root
set +e
timeout 60 "$R" run stages --format json > "$OUT/first.json" 2> "$OUT/first.err"
echo $? > "$OUT/first.code"
mkdir "$OUT/first"
cp mid end said all large "$OUT/first"
set -e
mount -o remount,size=256m "$disk"
set +e
timeout 60 "$R" run stages --format json > "$OUT/second.json" 2> "$OUT/second.err"
echo $? > "$OUT/second.code"
timeout 60 "$R" cache verify > "$OUT/verify.out" 2>&1
echo $? > "$OUT/verify.code"
cp mid end said all large "$OUT"
cd /
umount "$disk"
"#;
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "bash", "-c", script]).env("R", env!("CARGO_BIN_EXE_runner"));
    command.env("PROJECT", project).env("OUT", out).env("PLACE", place);
    command.env("KIB", kib.to_string()).env("CUDA_VISIBLE_DEVICES", "").env_remove("RUNNER_LOG");
    command.stdin(Stdio::null());
    command
}

fn size_of(folder: &Path) -> u64 {
    let size = |file: &PathBuf| fs::metadata(file).map_or(0, |facts| facts.len() / 1024 + 4);
    files(folder.to_owned()).iter().map(size).sum()
}

/// `RUNNER_FAULTS=100 cargo test --test it full_disks -- --ignored --nocapture` is the long form.
#[test]
#[ignore = "mounts small disks: it needs root, or a kernel that lets users mount"]
fn full_disks_of_any_size_lose_nothing_and_make_nothing_false() {
    let (done, right) = undisturbed();
    let outputs = OUTPUTS.map(|file| done.read(file));
    let fresh = whole();
    let of_project = size_of(&fresh.path(""));
    let needs = [(Disk::Runs, "runs"), (Disk::Home, "home"), (Disk::All, "")]
        .map(|(disk, part)| (disk, size_of(&done.path(part))));
    let mut random = random("disks");
    let (mut problems, mut full) = (Vec::new(), 0);
    let disks = faults();
    for round in 0..disks {
        let (disk, need) = needs[[0, 0, 0, 1, 2, 2][random.below(6)]];
        let least = if matches!(disk, Disk::All) { of_project + 16 } else { 4 };
        let kib = least + (random.unit() * 1.1 * need.saturating_sub(least) as f64) as u64;
        let place = tempfile::tempdir().expect("a folder");
        let out = place.path();
        let mut script = on_a_small_disk(&fresh.path(""), disk, kib, out);
        let outcome = Outcome::of(within(200, &mut script));
        let mounted = out.join("mounted").exists();
        assert!(mounted, "no disk could be mounted here, so nothing was tried: {}", outcome.err);
        let said = |name: &str| fs::read_to_string(out.join(name)).unwrap_or_default();
        let code = |name: &str| said(name).trim().parse::<i32>().ok();
        let mut wrong = |what: String| {
            problems.push(format!("round {round}, {kib} KiB for {disk:?}: {what}"));
        };
        if outcome.code != Some(0) {
            wrong(format!("the script ended with {:?}: {}", outcome.code, outcome.err));
        }
        let first = code("first.code");
        full += u64::from(first != Some(0));
        if !is_documented(first) || said("first.err").contains("panicked") {
            wrong(format!("exit {first:?}: {}", said("first.err")));
        }
        // What it says of the stages that did not end in an error is right, and so are their outputs.
        let rest = without_errors(&said("first.json"));
        if let Ok(known) = results(&rest) {
            if let Some(difference) = difference(&those_of(&right, &known), &rest) {
                wrong(format!("the first run says {difference}"));
            }
            for (at, writer) in WRITERS.iter().enumerate() {
                let file = format!("first/{}", OUTPUTS[at]);
                if known.contains_key(*writer) && said(&file) != outputs[at] {
                    wrong(format!("{writer} passes, and `{file}` is another file"));
                }
            }
        } else if first == Some(0) {
            wrong("it passes without a run.json".to_owned());
        }
        let run: Value = serde_json::from_str(&said("first.json")).unwrap_or_default();
        let by_program =
            run["stages"].as_array().is_some_and(|all| all.iter().any(failed_by_itself));
        if first != Some(0) && !by_program && !said("first.err").contains("space") {
            wrong(format!("it does not say that there is no space: {}", said("first.err")));
        }
        let second = difference(&right, &said("second.json"));
        if code("second.code") != Some(0) || second.is_some() {
            wrong(format!(
                "with room: {:?}, {second:?}: {}",
                code("second.code"),
                said("second.err")
            ));
        }
        if code("verify.code") != Some(0) {
            wrong(format!("`cache verify` says: {}", said("verify.out")));
        }
        if OUTPUTS.map(said) != outputs {
            wrong("the outputs are others".to_owned());
        }
    }
    println!("seed {}, {disks} small disks, of which {full} were full", seed());
    assert!(full > 0, "no disk was full: such a check shows nothing");
    assert!(problems.is_empty(), "seed {}:\n{}", seed(), problems.join("\n"));
}

/// What the files of a cache are; each kind gets its share of the bits.
const CLASSES: [&str; 9] = [
    "records",
    "tensors",
    "outputs",
    "models",
    "digests of models",
    "lists",
    "stages of lists",
    "last keys",
    "stamps",
];

fn class_of(path: &Path) -> &'static str {
    let text = path.display().to_string();
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    match () {
        () if text.contains("/actions/") => "records",
        () if text.contains("/objects/") && ending == "safetensors" => "tensors",
        () if text.contains("/objects/") => "outputs",
        () if text.contains("/models/") && ending == "gguf" => "models",
        () if text.contains("/models/") => "digests of models",
        () if text.contains("/unchanged/") && ending == "list" => "lists",
        () if text.contains("/unchanged/") => "stages of lists",
        () if text.ends_with("latest.log") => "last keys",
        () if text.ends_with("stamps.log") => "stamps",
        () => panic!("`{text}` is of no class: it is tried by nothing"),
    }
}

#[test]
fn flipped_bits_in_all_that_the_cache_holds_are_named_and_change_no_result() {
    let (project, right) = undisturbed();
    let outputs = OUTPUTS.map(|file| project.read(file));
    let mut random = random("bits");
    let bits = 10 * faults();
    let mut tried: BTreeMap<&str, [u64; 4]> = BTreeMap::new();
    let mut problems = Vec::new();
    for round in 0..bits {
        let class = CLASSES[round as usize % CLASSES.len()];
        let of_class = || {
            let parts = ["runs/cache/v1", "home"].map(|part| files(project.path(part)));
            let mut all = parts.concat();
            all.retain(|file| {
                fs::metadata(file).is_ok_and(|facts| facts.len() > 0) && class_of(file) == class
            });
            all
        };
        // An output that was moved aside is made again when somebody asks for it.
        if of_class().is_empty() {
            json(&project, &["--force"]).expect(0, "pass");
        }
        let of_class = of_class();
        assert!(!of_class.is_empty(), "round {round}: there are no {class}");
        let file = &of_class[random.below(of_class.len())];
        let mut bytes = fs::read(file).expect("read");
        let (place, bit) = (random.below(bytes.len()), random.below(8));
        bytes[place] ^= 1 << bit;
        fs::write(file, &bytes).expect("written");
        let verify = || Outcome::of(within(60, &mut project.command(&["cache", "verify"])));
        // The short way through a run in which nothing has changed reads no stamps.
        let short = class != "stamps" && random.below(2) == 0;
        let arguments: &[&str] = if short { &[] } else { &["--explain"] };
        let mut written_over = false;
        let (run, verify) = match random.below(2) {
            0 => {
                let run = json(&project, arguments);
                // Whole and unread: the run has just made the same anew.
                written_over = fs::read(file).is_ok_and(|now| now != bytes);
                (run, verify())
            }
            _ => {
                let verify = verify();
                (json(&project, arguments), verify)
            }
        };
        let name = file.file_name().and_then(|name| name.to_str()).expect("text");
        let by = [&run.err, &verify.out, &verify.err].map(|text| text.contains(name));
        let counts = tried.entry(class).or_default();
        counts[0] += 1;
        counts[1] += u64::from(by[1] || by[2]);
        counts[2] += u64::from(by[0]);
        counts[3] += u64::from(written_over && !by.contains(&true));
        let what =
            format!("round {round}, bit {bit} of byte {place} of a file of {class} ({name})");
        if !by.contains(&true) && !written_over {
            problems.push(format!("{what}: neither `cache verify` nor the run names it"));
        }
        // Tensors that are damaged when they are needed end their stage in an error that names
        // them; the next run makes them again.
        let read_damaged = class == "tensors" && by[0] && run.code == Some(4);
        let differs = match read_damaged {
            true => {
                let rest = without_errors(&run.out);
                let known = results(&rest).unwrap_or_default();
                difference(&those_of(&right, &known), &rest)
            }
            false => difference(&right, &run.out),
        };
        if !(run.code == Some(0) || read_damaged) || differs.is_some() {
            problems.push(format!("{what}: the run: {:?} {differs:?}: {}", run.code, run.err));
        }
        if !matches!(verify.code, Some(0 | 1)) {
            problems.push(format!("{what}: `cache verify`: {:?} {}", verify.code, verify.err));
        }
        if OUTPUTS.map(|file| project.read(file)) != outputs {
            problems.push(format!("{what}: the outputs are others"));
        }
        // What was moved aside is made again and written down once more. A damaged line of a log
        // would stay until the log is written anew.
        let all =
            files(project.path("runs/cache/v1")).into_iter().chain(files(project.path("home")));
        for left in all {
            let aside = left.extension().is_some_and(|ending| ending == "damaged");
            let log = left.extension().is_some_and(|ending| ending == "log");
            if aside || log && left == *file {
                fs::remove_file(left).expect("removed");
            }
        }
        for _ in 0..2 {
            let run = json(&project, &["--jobs", "2"]);
            let differs = difference(&right, &run.out);
            if run.code != Some(0) || differs.is_some() {
                problems
                    .push(format!("{what}: a later run: {:?} {differs:?}: {}", run.code, run.err));
            }
            std::thread::sleep(Duration::from_millis(25));
            json(&project, &[]);
        }
    }
    println!("seed {}, {bits} bits", seed());
    let heads = ["what", "flipped", "by verify", "by the run", "written over"];
    println!("{:<20}{:>8}{:>12}{:>12}{:>14}", heads[0], heads[1], heads[2], heads[3], heads[4]);
    for (class, [flipped, verify, run, over]) in &tried {
        println!("{class:<20}{flipped:>8}{verify:>12}{run:>12}{over:>14}");
    }
    assert!(tried.len() == CLASSES.len(), "of {:?} alone", tried.keys());
    assert!(problems.is_empty(), "seed {}:\n{}", seed(), problems.join("\n"));
}

#[test]
fn runs_a_check_and_a_clearing_beside_each_other_err_no_more_than_alone() {
    let (project, right) = undisturbed();
    let mut random = random("beside");
    let rounds = 5 * faults();
    let mut problems = Vec::new();
    let (mut checked, mut cleared) = (0, 0);
    let more: [&[&str]; 5] = [&[], &["--force"], &["--force"], &["--jobs", "1"], &["--rehash"]];
    for round in 0..rounds {
        let budget = ["0", "100KiB", "20GiB"][random.below(3)];
        let runs = [(); 2].map(|()| (more[random.below(more.len())], random.unit()));
        let (project, going) = (&project, AtomicUsize::new(runs.len()));
        // Again and again for as long as one of the runs goes on.
        let beside = |arguments: &'static [&'static str], last: Option<&'static str>| {
            let all: Vec<&str> = arguments.iter().copied().chain(last).collect();
            let mut said = Vec::new();
            loop {
                said.push(Outcome::of(within(60, &mut project.command(&all))));
                if going.load(Ordering::Relaxed) == 0 {
                    return said;
                }
            }
        };
        let (checks, clearings, ran) = std::thread::scope(|scope| {
            let checks = scope.spawn(|| beside(&["cache", "verify"], None));
            let clearings = scope.spawn(|| beside(&["cache", "gc", "--budget"], Some(budget)));
            let runs = runs.map(|(arguments, wait)| {
                let going = &going;
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_secs_f64(0.1 * wait));
                    let outcome = json(project, arguments);
                    going.fetch_sub(1, Ordering::Relaxed);
                    outcome
                })
            });
            let ran = runs.map(|run| run.join().expect("joined"));
            (checks.join().expect("joined"), clearings.join().expect("joined"), ran)
        });
        let mut wrong = |who: &str, outcome: &Outcome, differs: Option<String>| {
            let said = if differs.is_some() { "" } else { &outcome.out };
            problems.push(format!(
                "round {round}: {who}: exit {:?}, {differs:?}: {}{said}",
                outcome.code, outcome.err
            ));
        };
        for check in checks.iter().filter(|check| check.code != Some(0)) {
            wrong("verify", check, None);
        }
        checked += checks.len();
        for clearing in &clearings {
            let busy = clearing.code == Some(2) && clearing.err.contains("a run uses the cache");
            cleared += usize::from(clearing.code == Some(0));
            if clearing.code != Some(0) && !busy {
                wrong("gc", clearing, None);
            }
        }
        for run in &ran {
            let differs = difference(&right, &run.out);
            if run.code != Some(0) || differs.is_some() {
                wrong("run", run, differs.or(Some("no difference".to_owned())));
            }
        }
    }
    let run = json(&project, &[]);
    assert_eq!((run.code, difference(&right, &run.out)), (Some(0), None), "{}", run.err);
    project.runner(&["cache", "verify"]).expect(0, "sound");
    println!("seed {}, {rounds} rounds, {checked} checks, {cleared} clearings", seed());
    assert!(checked > 0 && cleared > 0, "nothing went on beside the runs");
    assert!(problems.is_empty(), "seed {}:\n{}", seed(), problems.join("\n"));
}
