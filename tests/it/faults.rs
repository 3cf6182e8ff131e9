//! Faults that the cache survives: runners that are killed or beside each other, files
//! that are written while they are read, and bits that flip.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use runner::model::synthetic::Preset;

use crate::cache::{computed, on_a_model, pipeline, set};
use crate::command::{Outcome, Project};

/// Twelve stages of a fan and a chain, of which each takes a moment.
fn slow_pipeline() -> Project {
    let mut project = Project::new().file("in", "0\n");
    for i in 0..12 {
        let from = if i < 6 { "in".to_owned() } else { format!("out/{}", i - 6) };
        let lines = format!(
            "shell = 'sleep 0.02; cat {from} > out/{i}; echo {i} >> out/{i}'\n\
             inputs = [\"{from}\"]\noutputs = [\"out/{i}\"]"
        );
        project = project.stage(&format!("s{i:02}"), &lines);
    }
    project
}

/// How often each stage was run to its end, over all runs.
fn finished(project: &Project) -> Vec<String> {
    let mut finished = Vec::new();
    for run in fs::read_dir(project.path("runs")).expect("runs").flatten() {
        let journal = fs::read_to_string(run.path().join("events.jsonl")).unwrap_or_default();
        for line in journal.lines() {
            let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else { continue };
            if event["event"] == "arm_finished" && event["state"] == "ran" {
                finished.extend(event["stage"].as_str().map(str::to_owned));
            }
        }
    }
    finished.sort();
    finished
}

/// `RUNNER_KILLS=200 cargo test --test it killed_at_random` is the long form.
#[test]
fn killed_at_random_moments_nothing_is_lost_false_or_stuck() {
    let kills = std::env::var("RUNNER_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(15);
    let mut project = slow_pipeline();
    let mut moment = 12_345u64;
    let mut done = 0;
    while done < kills {
        let mut runner = project.command(&["run", "stages"]);
        let runner = runner.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut runner = runner.spawn().expect("started");
        // A fixed sequence of moments, spread over a run.
        moment = moment.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((moment >> 33) % 250_000));
        let ended = runner.try_wait().expect("asked").is_some();
        runner.kill().expect("killed");
        runner.wait().expect("waited for");
        done += u32::from(!ended);
        if ended {
            check_all_finished(&project);
            project = slow_pipeline();
        }
    }
    let started = Instant::now();
    project.run().expect(0, "pass");
    assert!(started.elapsed() < Duration::from_secs(20), "something was stuck");
    check_all_finished(&project);
}

fn check_all_finished(project: &Project) {
    for i in 0..12 {
        let expected = if i < 6 { format!("0\n{i}\n") } else { format!("0\n{}\n{i}\n", i - 6) };
        assert_eq!(project.read(&format!("out/{i}")), expected);
    }
    let finished = finished(project);
    let distinct: BTreeSet<&String> = finished.iter().collect();
    assert_eq!(finished.len(), distinct.len(), "what was finished ran again: {finished:?}");
    // A folder that was about to be made stays for a minute: it may be another's.
    let attempts = fs::read_dir(project.path("runs/cache/v1/attempts")).expect("a folder");
    let names = attempts.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let left: Vec<String> = names.filter(|name| !name.starts_with(".new-")).collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn two_runners_compute_an_action_once() {
    let project = Project::new();
    let mark = project.path("mark").display().to_string();
    let project = project.stage(
        "S",
        &format!("shell = 'echo x >> {mark}; sleep 0.3; echo 1 > out'\noutputs = [\"out\"]"),
    );
    let mut runners: Vec<_> =
        (0..3).map(|_| project.command(&["run", "stages"]).spawn().expect("started")).collect();
    for runner in &mut runners {
        assert!(runner.wait().expect("waited for").success());
    }
    assert_eq!(project.read("mark"), "x\n");
}

#[test]
fn an_output_that_one_runner_is_putting_in_its_place_is_left_to_it() {
    let large = "shell = 'head -c 400000000 /dev/zero > out'\noutputs = [\"out\"]";
    let project =
        Project::new().stage("a", large).stage("b", "shell = 'sleep 0.5'\ninputs = [\"out\"]");
    let start = || project.command(&["run", "stages"]).spawn().expect("started");
    let mut first = start();
    while files(project.path("runs/cache/v1/actions")).is_empty() {
        assert!(first.try_wait().expect("asked").is_none());
        std::thread::sleep(Duration::from_millis(2));
    }
    // The result is known, and its copy is being made.
    let mut second = start();
    for runner in [&mut first, &mut second] {
        assert!(runner.wait().expect("waited for").success());
    }
}

#[test]
fn what_a_runner_left_half_written_is_no_part_of_an_input_folder() {
    let project = Project::new().file("in/a", "1");
    let project =
        project.stage("S", "shell = 'ls in > out'\ninputs = [\"in\"]\noutputs = [\"out\"]");
    project.run().expect(0, "run: pass");
    project.write("in/.writing-aB3xY9", "half");
    project.run().expect(0, "reused");
    // What only begins like it is the user's.
    project.write("in/.writing-desk", "his");
    assert_eq!(computed(&project.run().expect(0, "run: pass")), set(&["S"]));
}

/// A library that makes of a local file system a shared one, for who loads it before others.
fn shared_file_system(folder: &std::path::Path) -> PathBuf {
    let library = folder.join("shared_file_system.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/shared_file_system.c");
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o"]).arg(&library).arg(source);
    assert!(compiler.status().expect("a C compiler").success());
    library
}

#[test]
fn runners_on_a_shared_file_system_wait_for_each_other_and_leave_nothing() {
    let project = Project::new();
    let library = shared_file_system(&project.path(""));
    let mark = project.path("mark").display().to_string();
    let line = format!("shell = 'echo x >> {mark}; sleep 0.3; echo 1 > out'\noutputs = [\"out\"]");
    let project = project.stage("S", &line);
    let runner = |arguments: &[&str]| {
        let mut command = project.command(arguments);
        command.env("LD_PRELOAD", &library).env("SHARED_FILE_SYSTEM_LOG", project.path("locked"));
        command
    };
    let mut killed = runner(&["run", "stages"]).spawn().expect("started");
    while !project.path("mark").exists() {
        assert!(killed.try_wait().expect("asked").is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let gc = Outcome::of(runner(&["cache", "gc", "--budget", "0"]).output().expect("started"));
    gc.expect(2, "a run uses the cache");
    killed.kill().expect("killed");
    killed.wait().expect("waited for");

    let runners: Vec<_> = (0..3)
        .map(|_| {
            let mut command = runner(&["run", "stages"]);
            command.stderr(std::process::Stdio::piped()).spawn().expect("started")
        })
        .collect();
    for runner in runners {
        let outcome = Outcome::of(runner.wait_with_output().expect("waited for"));
        assert!(!outcome.err.contains("cannot"), "{}", outcome.err);
        assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    }
    assert_eq!(project.read("mark"), "x\nx\n", "once by the one that was killed");
    let left = fs::read_dir(project.path("runs/cache/v1/attempts")).expect("a folder");
    assert_eq!(left.count(), 0);
    assert!(!project.read("locked").is_empty(), "the library was not loaded");
    let gc = Outcome::of(runner(&["cache", "gc", "--budget", "0"]).output().expect("started"));
    gc.expect(0, "");
}

#[test]
fn stages_that_ask_for_all_cores_take_turns_across_runners() {
    let place = tempfile::tempdir().expect("a folder");
    let held = place.path().join("held").display().to_string();
    let cores = std::thread::available_parallelism().expect("cores");
    // Whoever finds the folder there was let in beside another.
    let line = format!("shell = 'mkdir {held} && sleep 0.05 && rmdir {held}'");
    let projects = [(); 2].map(|()| {
        let defaults = format!("[resources]\ncores = {cores}\n");
        let project = Project::new().file("stages/pipeline.toml", &defaults);
        project.stage("a", &line).stage("b", &line)
    });
    let runners = projects.each_ref().map(|project| {
        let mut command = project.command(&["run", "stages", "--jobs", "2"]);
        command.env("XDG_RUNTIME_DIR", place.path()).spawn().expect("started")
    });
    for mut runner in runners {
        assert!(runner.wait().expect("waited for").success());
    }
    let project =
        Project::new().file("stages/pipeline.toml", "[resources]\ngpu_memory = 1000000\n");
    project.stage("a", &line).run().expect(4, "asks for 1000000 GiB of one GPU's memory");
}

#[test]
fn no_more_commands_run_beside_each_other_than_there_are_jobs() {
    let place = tempfile::tempdir().expect("a folder");
    let held = place.path().display().to_string();
    for jobs in ["1", "2"] {
        let mut project = Project::new();
        for stage in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            let line = format!(
                "shell = 'mkdir {held}/{stage} && sleep 0.03 && test $(ls {held} | wc -l) -le \
                 {jobs} && rmdir {held}/{stage}'"
            );
            project = project.stage(stage, &line);
        }
        let run = project.runner(&["run", "stages", "--jobs", jobs]).expect(0, "run: pass");
        assert_eq!(computed(&run).len(), 8);
    }
}

#[test]
fn what_another_file_stands_for_when_the_run_ends_is_not_taken_for_what_it_read() {
    let lines = "shell = 'cat in > out'\ninputs = [\"in\"]\noutputs = [\"out\"]";
    for swap in ["mv other in", "ln -sfn other in"] {
        let project = Project::new().file("one", "1\n").file("other", "2\n");
        std::os::unix::fs::symlink("one", project.path("in")).expect("linked");
        let root = project.path("").display().to_string();
        // After it has been read, and before the run ends.
        let swaps =
            format!("shell = 'cd {root}; if test -e other; then {swap}; fi'\ninputs = [\"out\"]");
        let project = project.stage("a", lines).stage("b", &swaps);
        std::thread::sleep(Duration::from_millis(50));
        project.run().expect(0, "run: pass");
        assert_eq!(project.read("out"), "1\n");
        project.run().expect(0, "run: pass");
        assert_eq!(project.read("out"), "2\n", "{swap}");
    }

    // The same for an output that somebody writes before the run ends.
    let project = Project::new();
    let root = project.path("").display().to_string();
    let edits = format!("shell = 'cd {root} && echo 2 > out'\ninputs = [\"made\"]");
    let project = project
        .stage("a", "shell = 'echo 1 > out; echo 1 > made'\noutputs = [\"out\", \"made\"]")
        .stage("b", &edits);
    std::thread::sleep(Duration::from_millis(50));
    project.run().expect(0, "run: pass");
    assert_eq!(project.read("out"), "2\n");
    project.run().expect(0, "put back: out");
    assert_eq!(project.read("out"), "1\n");

    let project = on_a_model();
    let root = project.path("").display().to_string();
    let other = runner::model::synthetic::ensure(Preset::Qwen2Tiny, 2, &project.path("store"));
    let other = other.expect("a model").display().to_string();
    fs::rename(project.path("model.gguf"), project.path("one.gguf")).expect("renamed");
    std::os::unix::fs::symlink("one.gguf", project.path("model.gguf")).expect("linked");
    let swaps = format!("shell = 'cd {root} && ln -sfn {other} model.gguf'");
    let project = project.stage("Z", &swaps);
    std::thread::sleep(Duration::from_millis(50));
    let run = || {
        project.runner(&[
            "run",
            "stages",
            "--select",
            "C,Z",
            "--model",
            "model.gguf",
            "--jobs",
            "1",
        ])
    };
    assert_eq!(computed(&run()), set(&["C reference", "C emulated", "Z"]));
    assert_eq!(computed(&run()), set(&["C reference", "C emulated"]));
}

/// All files below a folder.
pub fn files(folder: PathBuf) -> Vec<PathBuf> {
    let mut open = vec![folder];
    let mut files = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    files
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_makes_no_false_result() {
    let project = pipeline();
    project.run().expect(0, "pass");
    // Past the moment in which young files are not written down.
    std::thread::sleep(Duration::from_millis(30));
    project.run().expect(0, "pass");
    let outputs = ["mid", "end", "said", "all"];
    let right = outputs.map(|file| project.read(file));
    let mut damaged = 0;
    for folder in ["runs/cache/v1", "home"] {
        for file in files(project.path(folder)) {
            let whole = fs::read(&file).expect("read");
            if whole.is_empty() {
                continue;
            }
            damaged += 1;
            let mut broken = whole.clone();
            let place = broken.len() / 2;
            broken[place] ^= 1;
            fs::write(&file, &broken).expect("written");
            let name = file.display().to_string();
            if name.contains("/objects/") || name.contains("/actions/") {
                // So that the cache is asked for it.
                project.remove("end");
                let file_name = file.file_name().expect("a name").to_string_lossy().into_owned();
                project.runner(&["cache", "verify"]).expect(1, &file_name);
            }
            project.run().expect(0, "pass");
            assert_eq!(right, outputs.map(|file| project.read(file)), "{name}");
        }
    }
    assert!(damaged >= 10, "{damaged}");
    project.runner(&["cache", "verify"]).expect(0, "are sound");
}

#[test]
fn nothing_is_kept_of_a_model_that_is_written_while_arms_read_it() {
    let project = on_a_model();
    let run = || project.runner(&["run", "stages", "--select", "D", "--model", "model.gguf"]);
    let (model, over) = (project.path("model.gguf"), AtomicBool::new(false));
    let file = fs::OpenOptions::new().write(true).open(&model).expect("opened");
    let magic = fs::read(&model).expect("read")[..4].to_vec();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                file.write_all_at(&magic, 0).expect("written");
            }
        });
        let outcome = run();
        over.store(true, Ordering::Relaxed);
        outcome.expect(4, "model.gguf` changed while it was used; run again when nobody writes");
    });
    assert_eq!(computed(&run()), set(&["C reference", "D reference", "D emulated"]));
}
