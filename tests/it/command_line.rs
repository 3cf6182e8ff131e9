//! The program as people use it: real commands in a folder of their own, their
//! exit codes, and what they print and leave behind.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::quantized::gguf_file::Value;

use crate::model::draft;

/// A folder with the shipped stages and contracts.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().expect("a temporary folder"));
        for part in ["stages", "contracts"] {
            let target = place.path(part);
            fs::create_dir(&target).expect("a folder");
            let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(part);
            for file in fs::read_dir(shipped).expect("shipped").flatten() {
                fs::copy(file.path(), target.join(file.file_name())).expect("a copy");
            }
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
        // Without a visible device the outcome is the same on every machine.
        command.args(arguments).current_dir(self.0.path()).env("CUDA_VISIBLE_DEVICES", "");
        command
    }

    /// Runs a command; gives its exit code, stdout and stderr.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } =
            self.command(arguments).output().expect("the program starts");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (status.code().expect("an exit code"), text(stdout), text(stderr))
    }

    /// The files below a folder.
    fn files(&self, folder: &str) -> Vec<PathBuf> {
        let mut open = vec![self.path(folder)];
        let mut files = Vec::new();
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).expect("a folder").flatten() {
                let path = entry.path();
                if path.is_dir() { open.push(path) } else { files.push(path) }
            }
        }
        files
    }

    /// Every run.json, parsed.
    fn records(&self) -> Vec<serde_json::Value> {
        let files = self.files("runs").into_iter().filter(|path| path.ends_with("run.json"));
        files.map(|path| parse(&fs::read_to_string(path).expect("readable"))).collect()
    }
}

fn parse(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn five_stages_pass_and_the_second_run_reuses_everything() {
    let place = Place::new();
    let (code, first, lines) = place.run(&["run", "stages/"]);
    assert_eq!(code, 0, "{first}{lines}");
    for stage in ["A  forward ", "B  forward ", "C  embed ", "D  rms_norm", "E  matmul"] {
        let line = first.lines().find(|line| line.starts_with(stage));
        assert!(line.is_some_and(|line| line.contains(" pass ")), "{stage}: {first}");
    }
    assert!(!first.contains("everything was reused"), "{first}");
    let record = &place.records()[0];
    assert_eq!(record["stages"].as_array().expect("stages").len(), 5);
    assert_eq!((&record["verdict"], &record["exit_code"]), (&"pass".into(), &0.into()));
    let logs = place.files("runs").into_iter().filter(|path| path.ends_with("events.jsonl"));
    for log in logs {
        let text = fs::read_to_string(log).expect("a log");
        assert!(text.lines().map(parse).count() > 10, "{text}");
    }

    let (code, second, _) = place.run(&["run", "stages/"]);
    assert_eq!(code, 0, "{second}");
    assert!(second.contains("everything was reused"), "{second}");
    // Long ago enough that the stages are known again: what is shown is what was kept of it.
    std::thread::sleep(std::time::Duration::from_millis(50));
    place.run(&["run", "stages/"]);
    let (_, third, _) = place.run(&["run", "stages/"]);
    let page = |table: &str| table.contains("report.html");
    assert!(page(&second) && !page(&third), "the third must go the short way: {third}");
    let told = |table: &str| -> Vec<String> {
        let told = table.lines().filter(|line| line.contains('%') || line.contains("drift"));
        told.map(|line| line.split_once(" s ").map_or(line, |(_, rest)| rest).replace("reused", ""))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    };
    assert_eq!(told(&second), told(&third));
    assert!(third.contains("nmse of ffn_residual"), "{third}");

    let (code, json, _) = place.run(&["run", "stages/", "--format", "json"]);
    assert_eq!(code, 0);
    let json = parse(&json);
    assert!(place.records().contains(&json), "stdout is not a run.json");
    for arm in ["reference", "emulated"] {
        assert_eq!(json["stages"][1]["arms"][arm]["state"], "reused", "{arm}");
    }

    let (code, _, problem) = place.run(&["export", "latest", "B", "emulated", "b.safetensors"]);
    assert_eq!(code, 0, "{problem}");
    let bytes = fs::read(place.path("b.safetensors")).expect("the exported file");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let sites = json["stages"][1]["arms"]["emulated"]["sites"].as_array().expect("sites");
    assert_eq!(file.len(), sites.len());
    for site in sites {
        let name = site["site"].as_str().expect("a name");
        assert!(file.tensor(name).is_ok(), "`{name}` is missing");
    }
}

#[test]
fn the_sixth_stage_of_the_readme_runs_with_no_other_change() {
    let place = Place::new();
    let readme = include_str!("../../README.md");
    let (_, from) = readme.split_once("```toml\n# stages/g-ffn-down.toml\n").expect("a manifest");
    let (manifest, _) = from.split_once("```").expect("its end");
    fs::write(place.path("stages/g-ffn-down.toml"), manifest).expect("a new stage");
    let (code, table, lines) = place.run(&["run", "stages/", "--select", "+G"]);
    assert_eq!(code, 0, "{table}{lines}");
    let line = table.lines().find(|line| line.starts_with("G  matmul"));
    assert!(line.is_some_and(|line| line.contains("blk.3.ffn_down")), "{table}");
}

#[test]
fn exit_codes_are_those_of_the_help() {
    let place = Place::new();
    let code = |arguments: &[&str]| place.run(arguments).0;
    let cheap = ["run", "stages/", "--select", "+E"];
    assert_eq!(code(&cheap), 0);
    assert_eq!(code(&[&cheap[..], &["--arms", "reference"]].concat()), 3);
    assert_eq!(code(&[&cheap[..], &["--require", "device"]].concat()), 4);
    assert_eq!(code(&["run", "stages/", "--select", "Z"]), 2);
    assert_eq!(code(&["no-such-command"]), 2);
    // A bound that no arithmetic can keep falsifies, from stored measures alone.
    let contract = place.path("contracts/qkv-matmul.toml");
    let text = fs::read_to_string(&contract).expect("a contract");
    let impossible = text.replace(
        "metric     = \"z_rms\"\nmin        = 0.8\nmax        = 1.25",
        "metric     = \"nmse\"\nmax        = 1e-9",
    );
    assert_ne!(impossible, text);
    fs::write(&contract, impossible).expect("written");
    let (code, table, lines) = place.run(&cheap);
    assert_eq!(code, 1, "{table}{lines}");
    assert!(table.contains("structural") && table.contains("reused"), "{table}");
}

#[test]
fn bad_input_is_refused_with_its_name_and_a_remedy() {
    let place = Place::new();
    fs::write(place.path("hostile.gguf"), b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f")
        .expect("a file");
    fs::write(place.path("notes.txt"), "no model").expect("a file");
    let cases: [(&[&str], &[&str]); 8] = [
        (&["--tokens", "1,999999"], &["token 999999 at position 1", "give smaller ids"]),
        (&["--prompt", ""], &["`prompt` is empty", "at least one token"]),
        (&["--model", "none.gguf"], &["`none.gguf`", "check the path"]),
        (&["--model", "notes.txt"], &["`notes.txt`", "does not begin with the bytes `GGUF`"]),
        (&["--model", "hostile.gguf"], &["`hostile.gguf`", "fetch the file again"]),
        (&["--model", "synthetic:none"], &["`none`", "known: qwen2-tiny"]),
        (&["--select", "nothing"], &["`nothing`", "the stages are `A`"]),
        (&["--arms", "device"], &["leaves out `reference`", "add `reference`"]),
    ];
    for (arguments, expected) in cases {
        let (code, stdout, stderr) = place.run(&[&["run", "stages/"], arguments].concat());
        assert_eq!(code, 2, "{arguments:?}: {stderr}");
        assert_eq!(stdout, "", "{arguments:?}");
        for words in expected {
            // All five stages have it, but it is told once.
            assert_eq!(stderr.matches(words).count(), 1, "{arguments:?}, {words}: {stderr}");
        }
    }
}

#[test]
fn a_chat_s_results_are_those_of_the_ids_that_its_template_makes() {
    let place = Place::new();
    let template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<user>{% endfor %}";
    let model = draft("llama")
        .vocabulary("llama-bpe")
        .with("tokenizer.chat_template", Value::String(template.to_owned()));
    fs::write(place.path("m.gguf"), model.write()).expect("a model");
    let run = |prompt: &[&str]| {
        let usual = ["run", "stages/", "--model", "m.gguf", "--select", "C"];
        let (code, table, lines) = place.run(&[&usual[..], prompt].concat());
        assert_eq!(code, 0, "{table}{lines}");
        table
    };
    assert!(!run(&["--prompt", "hel", "--chat", "--system", "123"]).contains("was reused"));
    assert_eq!(
        place.records()[0]["stages"][0]["tokens"],
        serde_json::json!([258, 257, 261, 260, 261])
    );
    assert!(run(&["--tokens", "258,257,261,260,261"]).contains("everything was reused"));
    // The template is asked each time: it may ask for the date.
    assert!(
        run(&["--prompt", "hel", "--chat", "--system", "123"]).contains("everything was reused")
    );
    for (arguments, words) in [
        (&["--chat"][..], "--prompt <PROMPT>"),
        (&["--prompt", "x", "--system", "y"], "--chat"),
        (&["--prompt", "x", "--chat"], "it has no chat template"),
    ] {
        let (code, _, stderr) = place.run(&[&["run", "stages/"], arguments].concat());
        assert!(code == 2 && stderr.contains(words), "{arguments:?}: {stderr}");
    }
}

#[test]
fn chip_multiply_refuses_what_no_chip_can_do() {
    use safetensors::tensor::{Dtype, TensorView};
    let place = Place::new();
    let bytes = vec![0u8; 4 * 4 * 64];
    let view = |rows: usize, width: usize| {
        TensorView::new(Dtype::F32, vec![rows, width], &bytes[..4 * rows * width]).expect("a view")
    };
    let tensors = [("x", view(2, 64)), ("w", view(4, 64)), ("short", view(2, 32))];
    let file = safetensors::serialize(tensors, None).expect("a file");
    fs::write(place.path("t.safetensors"), file).expect("written");
    let (x, w, short) = ("t.safetensors:x", "t.safetensors:w", "t.safetensors:short");
    let fp8 = ["--x-format", "e4m3", "--w-format", "e4m3"];
    let refused = |arguments: &[&str], words: &str| {
        let arguments = [&["chip", "multiply"], arguments, &fp8].concat();
        let (code, _, stderr) = place.run(&arguments);
        assert_eq!(code, 2, "{arguments:?}: {stderr}");
        assert!(stderr.contains(words), "{arguments:?}: {stderr}");
    };
    refused(&[x, short], "needs one K");
    for scale in ["--x-scale=0", "--x-scale=-1", "--x-scale=nan", "--x-scale=inf"] {
        refused(&[x, w, scale], "positive finite");
    }
    refused(&[x, w, "--chip", "pascal"], "no chip is called `pascal`; known:");
    refused(&[x, w, "--chip", "volta"], "`runner chip list`");
    refused(&[x, "t.safetensors:v"], "no tensor `v`");
    refused(&[x, w, "--output", "e4m3"], "f32, bf16 or f16");
}

#[test]
#[cfg(unix)]
fn a_stopped_run_leaves_nothing_half_written_and_the_next_one_carries_on() {
    let place = Place::new();
    let prompt = ["1"; 400].join(",");
    let arguments = ["run", "stages/", "--tokens", &prompt, "--format", "plain"];
    let mut child = place
        .command(&arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // The first line says that an arm has ended; the deep stages go on for seconds.
    let mut lines = BufReader::new(child.stderr.take().expect("stderr"));
    let mut line = String::new();
    lines.read_line(&mut line).expect("a line");
    let id = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status().expect("kill starts");
    assert!(sent.success());
    lines.read_to_string(&mut line).expect("the rest");
    let output = child.wait_with_output().expect("it ends");
    let stdout = String::from_utf8(output.stdout).expect("text");
    assert_eq!(output.status.code(), Some(130), "{line}{stdout}");
    assert!(stdout.contains("stopped on request"), "{stdout}");
    let record = &place.records()[0];
    assert_eq!(record["interrupted"], true);
    assert_ne!(record["verdict"], "pass");
    for file in place.files("runs") {
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(!name.starts_with('.') && !name.contains("tmp"), "left behind: {name}");
        if name.ends_with(".json") {
            let text = fs::read_to_string(file).expect("readable");
            // A record of the cache has its checksum below it.
            let checksum =
                |line: &str| line.len() == 16 && line.bytes().all(|b| b.is_ascii_hexdigit());
            match text.trim_end().rsplit_once('\n') {
                Some((record, last)) if checksum(last) => parse(record),
                _ => parse(&text),
            };
        }
    }
    let (code, table, lines) = place.run(&["run", "stages/", "--select", "+E"]);
    assert_eq!(code, 0, "{table}{lines}");
}

#[test]
fn an_arm_that_was_left_out_hinders_no_pass_but_one_without_any_claim_left_is_unmeasured() {
    let place = Place::new();
    let (code, table, lines) = place.run(&["run", "stages/", "--arms", "reference,emulated"]);
    assert_eq!(code, 0, "{table}{lines}");
    assert!(!table.contains("unmeasured"), "what is not asked for is not missing: {table}");
    let (code, table, _) =
        place.run(&["run", "stages/", "--select", "C,D,E", "--arms", "reference"]);
    assert_eq!(code, 3, "{table}");
    assert!(table.contains("the emulated arm did not run: it was not asked for"), "{table}");
}

#[test]
fn one_token_is_enough_for_every_claim() {
    let place = Place::new();
    for model in ["synthetic:llama-tiny", "synthetic:qwen2-tiny"] {
        let (code, table, lines) =
            place.run(&["run", "stages/", "--model", model, "--tokens", "7"]);
        assert_eq!(code, 0, "{table}{lines}");
    }
}

#[test]
fn a_reference_on_a_gpu_that_is_not_there_is_refused_before_anything_runs() {
    let place = Place::new();
    for command in ["run", "plan"] {
        let (code, _, stderr) = place.run(&[command, "stages", "--emulated-on", "gpu"]);
        assert_eq!(code, 2, "{stderr}");
        for part in ["`--emulated-on gpu`", "the emulated arm has the same bits", "runner doctor"] {
            assert!(stderr.contains(part), "{stderr}");
        }
        let (code, stdout, stderr) = place.run(&[command, "stages", "--reference-on", "gpu"]);
        assert_eq!((code, stdout.as_str()), (2, ""), "{command}: {stderr}");
        for part in ["`--reference-on gpu`", "leave it out", "runner doctor"] {
            assert!(stderr.contains(part), "{command}: {stderr}");
        }
        assert!(!place.path("runs").exists() || place.files("runs").is_empty(), "{command}");
    }
    let (code, _, stderr) = place.run(&["plan", "stages", "--reference-on", "cpu"]);
    assert_eq!(code, 0, "{stderr}");
}
