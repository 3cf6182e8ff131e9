//! Mutants of every file that the runner reads, read by a process of its own: whatever a file
//! holds, it is read or refused in words; nothing panics, aborts, hangs or takes memory that
//! the file does not need.
//!
//! `RUNNER_MUTANTS` says how many, `RUNNER_SEED` which; `RUNNER_READER` names one reader. The
//! same numbers make the same mutants.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use runner::random::Random;
use serde::{Deserialize, Serialize};

use super::mutate::{Kind, mutant};
use super::readers::{READERS, Reader, check, of};
use super::{count_of, seed, seeds};
use crate::data::own;

/// A mutant that takes longer is said to hang.
const LONGEST: Duration = Duration::from_secs(10);
/// The memory that a reader of some kilobytes may ask for, its program and threads included.
const MEMORY: u64 = 2 << 30;
/// Of one reader no more failures are looked for.
const ENOUGH: usize = 20;

/// What another process is to do: read mutants of one reader.
#[derive(Serialize, Deserialize)]
struct Task {
    reader: String,
    seed: u64,
    numbers: std::ops::Range<u64>,
    /// The sound files, and where it says how far it is.
    folder: PathBuf,
}

/// What it found.
#[derive(Default, Serialize, Deserialize)]
struct Found {
    accepted: u64,
    refused: u64,
    /// Which mutant, and what it did.
    failures: Vec<(u64, String)>,
    /// KiB that the process had at most.
    memory: u64,
    /// Seconds, and which mutant took them.
    slowest: (f64, u64),
}

/// The mutant of that number. Every process makes the same.
fn make(reader: &str, seed: u64, number: u64, kind: Kind, files: &[Vec<u8>]) -> Vec<u8> {
    let parts = [&seed.to_le_bytes(), reader.as_bytes(), &number.to_le_bytes()];
    let mut random = Random::named("runner 2026 campaign mutant", &parts);
    let file = &files[random.below(files.len())];
    mutant(kind, file, &mut random)
}

#[test]
fn every_seed_is_accepted_by_its_reader() {
    let mut refused = Vec::new();
    for reader in READERS {
        let (_, files) = seeds::of(reader.name);
        for (number, file) in files.iter().enumerate() {
            let folder = tempfile::tempdir().expect("a folder");
            (reader.prepare)(folder.path());
            if let Err(words) = check(&reader, folder.path(), file) {
                refused.push(format!("seed {number} of `{}`: {words}", reader.name));
            }
            // The fuzz targets begin with them.
            if let Some(corpus) = std::env::var_os("RUNNER_CORPUS") {
                let place = PathBuf::from(corpus).join(reader.name);
                fs::create_dir_all(&place).expect("a folder");
                fs::write(place.join(format!("seed-{number}")), file).expect("written");
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
fn each_reader_has_its_fuzz_target() {
    let listed = fs::read_to_string(own("fuzz/Cargo.toml")).expect("a list of targets");
    let targets = fs::read_dir(own("fuzz/fuzz_targets")).expect("targets").count();
    assert_eq!(targets, READERS.len());
    for Reader { name, .. } in READERS {
        let path = format!("fuzz_targets/{name}.rs");
        assert!(listed.contains(&format!("name = \"{name}\"\npath = \"{path}\"")), "{name}");
        let target = fs::read_to_string(own("fuzz").join(path)).expect("a target");
        assert!(target.contains(&format!("read(\"{name}\", bytes)")), "{target}");
    }
}

/// In another process, which has no more memory than [`MEMORY`]. By itself it does nothing.
#[test]
fn the_process_that_reads_mutants() {
    let Some(task) = std::env::var_os("RUNNER_CAMPAIGN_TASK") else { return };
    let task = task.into_string().expect("text");
    let task: Task = serde_json::from_str(&task).expect("a task");
    let limit = rustix::process::Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
    rustix::process::setrlimit(rustix::process::Resource::As, limit).expect("a limit");
    let progress = fs::File::create(task.folder.join("progress")).expect("a file");
    let result = task.folder.join("result");
    let mut found: Found = match fs::read(&result) {
        Ok(text) => serde_json::from_slice(&text).expect("a result"),
        Err(_) => Found::default(),
    };
    let reader = of(&task.reader);
    let (kind, files) = seeds::of(reader.name);
    let folder = task.folder.join("folder");
    fs::create_dir_all(&folder).expect("a folder");
    (reader.prepare)(&folder);
    let said: Arc<Mutex<String>> = Arc::default();
    let hears = Arc::clone(&said);
    std::panic::set_hook(Box::new(move |panic| {
        *hears.lock().expect("one thread") = panic.to_string().replace('\n', " ");
    }));
    let mut kept = task.numbers.start;
    for number in task.numbers.clone() {
        if number - kept >= 256 {
            fs::write(&result, serde_json::to_vec(&found).expect("JSON")).expect("written");
            kept = number;
        }
        progress.write_all_at(&number.to_le_bytes(), 0).expect("written");
        let bytes = make(reader.name, task.seed, number, kind, &files);
        let begun = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| check(&reader, &folder, &bytes))) {
            Ok(Ok(())) => found.accepted += 1,
            Ok(Err(_)) => found.refused += 1,
            Err(_) => {
                let words = said.lock().expect("one thread").clone();
                found.failures.push((number, words));
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        if seconds > found.slowest.0 {
            found.slowest = (seconds, number);
        }
        if found.failures.len() >= ENOUGH {
            break;
        }
    }
    found.memory = found.memory.max(most_memory());
    fs::write(&result, serde_json::to_vec(&found).expect("JSON")).expect("written");
    fs::write(task.folder.join("done"), "").expect("written");
}

/// KiB of memory that this process had at most.
fn most_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

/// Has another process read these mutants, again and again where one ends it.
fn read_by_another(reader: &Reader, numbers: std::ops::Range<u64>) -> Found {
    let place = tempfile::tempdir().expect("a folder");
    let said = |name: &str| place.path().join(name);
    let number_at = || {
        let bytes = fs::read(said("progress")).unwrap_or_default();
        bytes.try_into().map(u64::from_le_bytes).ok()
    };
    let mut start = numbers.start;
    while start < numbers.end {
        let task = Task {
            reader: reader.name.to_owned(),
            seed: seed(),
            numbers: start..numbers.end,
            folder: place.path().to_owned(),
        };
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["campaign::mutants::the_process_that_reads_mutants", "--exact"]);
        command.env("RUNNER_CAMPAIGN_TASK", serde_json::to_string(&task).expect("JSON"));
        command.env("RAYON_NUM_THREADS", "1").env("RUNNER_LOG", "off");
        command.stdout(Stdio::null()).stderr(fs::File::create(said("stderr")).expect("a file"));
        let mut child = command.spawn().expect("it starts");
        let (mut last, mut since) = (None, Instant::now());
        let ended = loop {
            if let Some(status) = child.try_wait().expect("asked") {
                break match status.signal() {
                    Some(signal) => format!("it was ended by signal {signal}"),
                    None => format!("it ended by itself: {status}"),
                };
            }
            let now = number_at();
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() > LONGEST {
                child.kill().expect("killed");
                child.wait().expect("waited for");
                break format!("it was read for more than {} s", LONGEST.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if said("done").exists() {
            break;
        }
        // What was counted since the last result is lost; the failure is not.
        let number = number_at().unwrap_or(start);
        let words = fs::read_to_string(said("stderr")).unwrap_or_default();
        let last = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        let mut found = result_in(place.path());
        found.failures.push((number, format!("{ended}: {last}")));
        if found.failures.len() >= ENOUGH {
            return found;
        }
        fs::write(said("result"), serde_json::to_vec(&found).expect("JSON")).expect("written");
        start = number + 1;
    }
    result_in(place.path())
}

fn result_in(folder: &Path) -> Found {
    let text = fs::read(folder.join("result")).ok();
    text.map(|text| serde_json::from_slice(&text).expect("a result")).unwrap_or_default()
}

/// The readers that are asked for.
fn asked() -> Vec<Reader> {
    let only = std::env::var("RUNNER_READER").ok();
    READERS.into_iter().filter(|r| only.as_ref().is_none_or(|only| r.name == only)).collect()
}

/// `RUNNER_MUTANTS=1_000_000 cargo test --test it campaign::mutants -- --nocapture` is the long form.
#[test]
fn every_mutant_is_read_or_refused_in_words_that_name_it() {
    let readers = asked();
    assert!(!readers.is_empty(), "RUNNER_READER names no reader");
    let each = (count_of("RUNNER_MUTANTS", 20_000) / readers.len() as u64).max(1);
    let results: Mutex<BTreeMap<usize, Found>> = Mutex::default();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(8) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(reader) = readers.get(at) else { break };
                    let found = read_by_another(reader, 0..each);
                    results.lock().expect("whole").insert(at, found);
                }
            });
        }
    });
    let kept = std::env::temp_dir().join(format!("runner-campaign-{}", std::process::id()));
    let mut problems = Vec::new();
    println!("seed {}, {each} mutants of each reader", seed());
    println!(
        "{:<14}{:>9}{:>9}{:>9}{:>9}{:>10}",
        "reader", "accepted", "refused", "failed", "MiB", "slowest"
    );
    for (at, found) in results.into_inner().expect("whole") {
        let name = readers[at].name;
        let (failed, memory) = (found.failures.len(), found.memory >> 10);
        let (accepted, refused, (seconds, slowest)) =
            (found.accepted, found.refused, found.slowest);
        println!(
            "{name:<14}{accepted:>9}{refused:>9}{failed:>9}{memory:>9}{seconds:>8.3} s by {slowest}"
        );
        let (kind, files) = seeds::of(name);
        for (number, words) in found.failures {
            let file = kept.join(format!("{name}-{number}"));
            fs::create_dir_all(&kept).expect("a folder");
            fs::write(&file, make(name, seed(), number, kind, &files)).expect("written");
            problems.push(format!(
                "mutant {number} of `{name}` (seed {}), kept as `{}`: {words}",
                seed(),
                file.display()
            ));
        }
        if found.accepted == 0 || found.refused == 0 {
            problems.push(format!(
                "`{name}` accepted {} mutants and refused {}: such a check shows nothing",
                found.accepted, found.refused
            ));
        }
    }
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}
