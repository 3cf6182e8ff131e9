//! A cache of many machines: what one machine computed another one takes, and nothing that a
//! store hands over is believed unless it is what its name says.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::cache::{computed, set};
use crate::command::{Outcome, Project};

const STAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/stages");

/// Four arms, and what was measured.
const RESULTS: usize = 5;

/// What a run of stage E computes where nothing is at hand: it needs what C and D make.
fn everything() -> std::collections::BTreeSet<String> {
    set(&["C reference", "D reference", "E reference", "E emulated"])
}

/// One machine: a folder of runs of its own.
fn machine() -> Project {
    Project::new()
}

fn run(machine: &Project, cache: &str, more: &[&str]) -> Outcome {
    let arguments = ["run", STAGES, "--select", "E", "--arms", "reference,emulated"];
    machine.runner(&[&arguments, &["--cache", cache][..], more].concat())
}

#[test]
fn each_run_puts_its_record_where_the_report_of_all_machines_reads_it() {
    let shared = tempfile::tempdir().expect("a folder");
    let keys = format!("[cache]\nurl = \"{}\"\nruns = true\n", url(&shared));
    let machines = ["node1", "node2"].map(|name| {
        let machine = machine();
        for file in fs::read_dir(STAGES).expect("stages").flatten() {
            let text = fs::read_to_string(file.path()).expect("a manifest");
            let name = file.file_name().to_string_lossy().into_owned();
            let more = if name == "pipeline.toml" { keys.as_str() } else { "" };
            machine.write(&format!("stages/{name}"), &format!("{text}\n{more}"));
        }
        let arguments = ["run", "stages", "--select", "C", "--arms", "reference"];
        let run = || {
            let mut command = machine.command(&arguments);
            Outcome::of(command.env("RUNNER_MACHINE", name).output().expect("the runner starts"))
        };
        run().expect(3, "C");
        // One that finds nothing to do is waited for all the same.
        run().expect(3, "reused");
        machine
    });
    let told = machines[0].runner(&["fleet", "report", &url(&shared), "--format", "json"]);
    let told: serde_json::Value = serde_json::from_str(&told.expect(3, "").out).expect("JSON");
    let names: Vec<_> = told["machines"].as_array().expect("machines").iter().collect();
    assert_eq!(names.len(), 2, "{told}");
    assert_eq!(told["runs"], 4, "{told}");
}

/// The run's own words of the cache.
fn report(machine: &Project) -> serde_json::Value {
    let mut runs: Vec<PathBuf> = fs::read_dir(machine.path("runs"))
        .expect("runs")
        .filter_map(|entry| Some(entry.ok()?.path().join("run.json")))
        .filter(|file| file.is_file())
        .collect();
    runs.sort();
    let text = fs::read_to_string(runs.last().expect("a run")).expect("run.json");
    serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["cache"].clone()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => files.extend(files_below(&path)),
            path => files.push(path),
        }
    }
    files.sort();
    files
}

fn url(folder: &tempfile::TempDir) -> String {
    format!("file://{}", folder.path().display())
}

#[test]
fn what_one_machine_computed_another_one_takes() {
    let shared = tempfile::tempdir().expect("a folder");
    let (first, second) = (machine(), machine());
    let ran = run(&first, &url(&shared), &[]).expect(0, "E  matmul  pass");
    assert_eq!(computed(&ran), everything());
    assert_eq!(report(&first)["sent"], RESULTS);
    assert_eq!(report(&first)["problems"], serde_json::json!([]));

    let ran = run(&second, &url(&shared), &[]).expect(0, "E  matmul  pass");
    assert_eq!(computed(&ran), set(&[]), "{}", ran.err);
    assert_eq!(
        (&report(&second)["fetched"], &report(&second)["sent"]),
        (&RESULTS.into(), &0.into())
    );

    // A machine that may not write sends nothing, and takes all the same.
    let third = machine();
    let before = files_below(shared.path());
    run(&third, &url(&shared), &["--cache-mode", "read-only", "--force"]).expect(0, "E  matmul");
    assert_eq!(files_below(shared.path()), before);
}

#[test]
fn what_is_not_what_its_name_says_is_named_computed_again_and_replaced() {
    let shared = tempfile::tempdir().expect("a folder");
    run(&machine(), &url(&shared), &[]).expect(0, "E  matmul  pass");
    let whole: Vec<(PathBuf, Vec<u8>)> = files_below(&shared.path().join("v1/objects"))
        .into_iter()
        .map(|file| (file.clone(), fs::read(&file).expect("read")))
        .collect();
    assert_eq!(whole.len(), RESULTS - 1, "the tensors of all arms");
    for (file, bytes) in &whole {
        let mut wrong = bytes.clone();
        *wrong.last_mut().expect("bytes") ^= 1;
        fs::write(file, wrong).expect("written");
    }
    let second = machine();
    let ran = run(&second, &url(&shared), &[]).expect(0, "E  matmul  pass");
    assert_eq!(computed(&ran), everything());
    let told = ran.err.matches("is not believed: its hash is not its name").count();
    assert_eq!(told, whole.len(), "each once: {}", ran.err);
    let problems = report(&second)["problems"].to_string();
    assert!(problems.contains("v1/objects/"), "{problems}");
    for (file, bytes) in &whole {
        assert!(fs::read(file).expect("read") == *bytes, "`{}` was replaced", file.display());
    }

    // A record of another key, and one whose check does not fit.
    let records = files_below(&shared.path().join("v1/actions"));
    let other = fs::read(&records[0]).expect("read");
    fs::write(&records[1], other).expect("written");
    fs::write(&records[2], b"{}").expect("written");
    let third = machine();
    let ran = run(&third, &url(&shared), &[]).expect(0, "E  matmul  pass");
    for words in ["it is another key's", "its check does not fit"] {
        assert!(ran.err.contains(words), "{}", ran.err);
    }
    run(&machine(), &url(&shared), &[]).expect(0, "E  matmul  pass");
}

#[test]
fn what_is_cleared_away_is_computed_again_and_push_sends_it_back() {
    let shared = tempfile::tempdir().expect("a folder");
    let first = machine();
    run(&first, &url(&shared), &[]).expect(0, "E  matmul  pass");
    let gc =
        |more: &[&str]| first.runner(&[&["cache", "gc", "--cache", &url(&shared)], more].concat());
    gc(&[]).expect(2, "say what may stay");
    gc(&["--older", "1"]).expect(0, "removed 0 actions and 0 objects");
    gc(&["--budget", "0", "--dry-run"]).expect(0, "would remove 5 actions and 4 objects");
    gc(&["--budget", "0"]).expect(0, "removed 5 actions and 4 objects");
    assert!(files_below(&shared.path().join("v1/actions")).is_empty());
    let push = ["cache", "push", "--cache", &url(&shared)];
    first.runner(&push).expect(0, "5 results there now");
    assert_eq!(computed(&run(&machine(), &url(&shared), &[])), set(&[]));
}

#[test]
fn what_a_command_made_is_sent_only_where_somebody_asks_for_it() {
    let shared = tempfile::tempdir().expect("a folder");
    let mark = tempfile::NamedTempFile::new().expect("a file");
    let marks = || fs::read_to_string(mark.path()).expect("read").lines().count();
    let project = |more: &str| {
        let line = format!("echo said; echo x >> {}; echo made > made", mark.path().display());
        let url = url(&shared);
        Project::new()
            .stage("S", &format!("shell = '{line}'\noutputs = [\"made\"]"))
            .file("stages/pipeline.toml", &format!("[cache]\nurl = \"{url}\"\n{more}"))
    };
    project("").run().expect(0, "wrote made");
    assert!(files_below(&shared.path().join("v1/objects")).is_empty());
    project("commands = true").run().expect(0, "wrote made");
    assert_eq!(marks(), 2);
    let taker = project("");
    taker.run().expect(0, "wrote made");
    assert_eq!((marks(), taker.read("made").as_str()), (2, "made\n"));
    // What a program printed is for its user alone.
    let private = files_below(&taker.path("runs/cache/v1/objects"))
        .into_iter()
        .find(|file| fs::read(file).expect("read") == b"said\n");
    let facts = fs::metadata(private.expect("what it printed")).expect("facts");
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&facts.permissions()) & 0o077, 0);
    // The variable stands above the manifest.
    let alone = project("commands = true");
    let mut command = alone.command(&["run", "stages"]);
    let ran = Outcome::of(command.env("RUNNER_CACHE", "off").output().expect("started"));
    ran.expect(0, "wrote made");
    assert_eq!(marks(), 3);
}

#[test]
fn a_url_that_names_no_store_is_refused_before_anything_is_computed() {
    let machine = machine();
    for (cache, words) in [
        ("ftp://host/x", "is no kind of store"),
        ("no url", "cannot be used"),
        ("file:///no/such/folder", "is no folder; make it, or mount it"),
        ("https://me:secret@127.0.0.1:1/x", "the shared cache `https://127.0.0.1:1/x`"),
        ("https://127.0.0.1:1/x?token=secret", "credentials are read from variables"),
    ] {
        let refused = run(&machine, cache, &[]).expect(2, words);
        assert!(!refused.err.contains("secret"), "{}", refused.err);
    }
    let read_only = machine.path("runs/cache/v1/objects");
    assert!(!read_only.exists(), "nothing was computed");
    run(&machine, "off", &[]).expect(0, "E  matmul  pass");
}

/// What a server does to a request for a path.
type Fault = Box<dyn Fn(&str, usize) -> Answer + Send + Sync>;

/// How it answers.
enum Answer {
    Right,
    /// With this status.
    Status(u16),
    /// With half of the body, and then nothing.
    Half,
    /// With a body of the right length and another content.
    Wrong,
}

/// A small HTTP server over a folder, which takes files too.
struct Server {
    address: String,
    requests: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address.trim_start_matches("http://"));
    }
}

fn serve(folder: &Path, fault: Fault) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    let (requests, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let server = Server { address, requests: Arc::clone(&requests), ends: Arc::clone(&ends) };
    let (folder, fault) = (folder.to_owned(), Arc::new(fault));
    let seen: Arc<Mutex<std::collections::BTreeMap<String, usize>>> = Arc::default();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            if ends.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let (folder, fault) = (folder.clone(), Arc::clone(&fault));
            let (requests, seen) = (Arc::clone(&requests), Arc::clone(&seen));
            std::thread::spawn(move || {
                requests.fetch_add(1, Ordering::SeqCst);
                // A client that goes away in the middle is no concern of the test.
                let _ = answer(&stream, &folder, &fault, &seen);
            });
        }
    });
    server
}

fn answer(
    mut stream: &TcpStream,
    folder: &Path,
    fault: &Fault,
    seen: &Mutex<std::collections::BTreeMap<String, usize>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, path) =
        (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("/").to_owned());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let file = folder.join(path.trim_start_matches('/'));
    let times = {
        let mut seen = seen.lock().expect("a count");
        let times = seen.entry(format!("{method} {path}")).or_default();
        *times += 1;
        *times
    };
    let how = fault(&format!("{method} {path}"), times);
    let head = |status: u16, length: usize| {
        format!(
            "HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nlast-modified: Mon, 30 Nov 2026 \
             00:00:00 GMT\r\nconnection: close\r\n\r\n"
        )
    };
    if let Answer::Status(status) = how {
        return stream.write_all(head(status, 0).as_bytes());
    }
    if method == "PUT" {
        fs::create_dir_all(file.parent().expect("a folder"))?;
        fs::write(&file, body)?;
        return stream.write_all(head(201, 0).as_bytes());
    }
    if method != "GET" && method != "HEAD" {
        return stream.write_all(head(405, 0).as_bytes());
    }
    let Ok(mut bytes) = fs::read(&file) else {
        return stream.write_all(head(404, 0).as_bytes());
    };
    stream.write_all(head(200, bytes.len()).as_bytes())?;
    if method == "HEAD" {
        return Ok(());
    }
    match how {
        Answer::Half => bytes.truncate(bytes.len() / 2),
        Answer::Wrong => bytes.iter_mut().for_each(|byte| *byte ^= 0x55),
        _ => {}
    }
    stream.write_all(&bytes)
}

/// A folder in which one machine's results lie, sent there over HTTP.
fn filled() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let server = serve(folder.path(), Box::new(|_, _| Answer::Right));
    let ran = run(&machine(), &format!("{}/team", server.address), &[]);
    ran.expect(0, "E  matmul  pass");
    assert_eq!(files_below(&folder.path().join("team/v1/actions")).len(), RESULTS);
    folder
}

#[test]
fn a_server_that_fails_for_a_moment_is_asked_again() {
    let folder = filled();
    // Every first request of a path fails, and of some the second breaks off in the middle.
    let server = serve(
        folder.path(),
        Box::new(|path, times| match times {
            1 => Answer::Status(503),
            2 if path.contains("objects") => Answer::Half,
            _ => Answer::Right,
        }),
    );
    let second = machine();
    let ran = run(&second, &format!("{}/team", server.address), &[]).expect(0, "pass");
    assert_eq!(computed(&ran), set(&[]), "{}", ran.err);
    assert_eq!(report(&second)["problems"], serde_json::json!([]));
}

#[test]
fn wrong_bytes_of_a_server_are_computed_again() {
    let folder = filled();
    let server = serve(
        folder.path(),
        Box::new(|path, _| match path.contains("GET") && path.contains("objects") {
            true => Answer::Wrong,
            false => Answer::Right,
        }),
    );
    let second = machine();
    let ran = run(&second, &format!("{}/team", server.address), &[]).expect(0, "pass");
    assert_eq!(computed(&ran), everything());
    assert!(ran.err.contains("its hash is not its name"), "{}", ran.err);
}

#[test]
fn a_server_that_is_down_costs_a_warning_and_no_verdict() {
    let gone = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}/team", gone.local_addr().expect("an address"));
    drop(gone);
    let first = machine();
    let ran = run(&first, &address, &[]).expect(0, "E  matmul  pass");
    assert_eq!(ran.err.matches("was left alone after it failed").count(), 1, "{}", ran.err);
    assert_eq!(report(&first)["unsent"], RESULTS);

    // Down in the middle: what was there is taken, and the rest is computed.
    let folder = filled();
    let server = serve(
        folder.path(),
        Box::new(|path, _| match path.contains("objects") {
            true => Answer::Status(403),
            false => Answer::Right,
        }),
    );
    let second = machine();
    let ran = run(&second, &format!("{}/team", server.address), &[]).expect(0, "pass");
    assert!(ran.err.contains("was left alone after it failed"), "{}", ran.err);
    assert!(server.requests.load(Ordering::SeqCst) > 1);
}

#[test]
fn a_server_that_refuses_is_an_error_before_anything_is_computed() {
    let folder = tempfile::tempdir().expect("a folder");
    for status in [401, 403] {
        let server = serve(folder.path(), Box::new(move |_, _| Answer::Status(status)));
        let refused = run(&machine(), &format!("{}/team", server.address), &[]);
        refused.expect(2, "refuses to be read");
    }
    // One that lets nobody write: said before anything is computed, and read-only is enough.
    let server = serve(
        folder.path(),
        Box::new(|path, _| match path.starts_with("PUT") {
            true => Answer::Status(403),
            false => Answer::Right,
        }),
    );
    let address = format!("{}/team", server.address);
    run(&machine(), &address, &[]).expect(2, "refuses to be written");
    run(&machine(), &address, &["--cache-mode", "read-only"]).expect(0, "E  matmul  pass");
    let gc = ["cache", "gc", "--cache", &address, "--budget", "0", "--dry-run"];
    machine().runner(&gc).expect(2, "does not list what it holds");
}
