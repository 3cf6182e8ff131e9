//! Files and programs that mean no good, or came to harm: the runner says what is wrong and
//! lives; nothing waits for ever, nothing false is kept, nothing foreign is touched.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::cache::on_a_model;
use crate::command::{Outcome, Project};

/// What a program said, if it ended within so many seconds; else it is killed and this fails.
#[track_caller]
pub fn within(seconds: u64, command: &mut Command) -> Output {
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let begun = Instant::now();
    while child.try_wait().expect("asked").is_none() {
        if begun.elapsed() > Duration::from_secs(seconds) {
            child.kill().expect("killed");
            let output = child.wait_with_output().expect("what it said");
            panic!("still running after {seconds} s: {:?}", Outcome::of(output).err);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().expect("what it said")
}

fn make_pipe(path: &Path) {
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, 0o600.into(), 0).expect("a pipe");
}

fn flip_a_bit(path: &Path, place: usize) {
    let mut bytes = fs::read(path).expect("read");
    bytes[place] ^= 64;
    fs::write(path, bytes).expect("written");
}

/// A shell line with the runner as `"$R"`, within a project.
pub fn shell(project: &Project, line: &str) -> Command {
    let mut command = project.command(&[]);
    let mut shell = Command::new("bash");
    shell.args(["-c", line]).env("R", env!("CARGO_BIN_EXE_runner"));
    shell.current_dir(command.get_current_dir().expect("a folder"));
    for (name, value) in command.env("RUST_BACKTRACE", "0").get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

#[test]
fn a_flipped_bit_of_a_generated_model_is_noticed_named_and_mended() {
    let project = on_a_model();
    let model = "runs/cache/v1/models/qwen2-tiny-seed1-v1.gguf";
    project.runner(&["plan", "stages", "--select", "A"]).expect(0, "run");
    let made = fs::read(project.path(model)).expect("made");
    flip_a_bit(&project.path(model), 793_123);
    let plan = project.runner(&["plan", "stages", "--select", "A"]).expect(0, "run");
    assert!(plan.err.contains("v1.gguf` is not what it was when it was made"), "{}", plan.err);
    assert!(fs::read(project.path(model)).expect("there") == made, "the model is made anew");
    // The bit of a disk changes no time, and a runner that believes times does not see it.
    flip_a_bit(&project.path(model), 793_123);
    project.runner(&["cache", "verify"]).expect(1, "it is not what it was when it was made");
    assert!(!project.path(model).exists(), "it was moved aside");
    project.runner(&["plan", "stages", "--select", "A"]).expect(0, "run");
    assert!(fs::read(project.path(model)).expect("there") == made);
    project.runner(&["cache", "verify"]).expect(0, "1 generated model as made");
}

#[test]
fn a_flipped_bit_of_the_digest_of_a_generated_model_is_named_and_mended() {
    let project = on_a_model();
    let note = project.path("runs/cache/v1/models/qwen2-tiny-seed1-v1.blake3");
    let plan = || project.runner(&["plan", "stages", "--select", "A"]).expect(0, "run");
    plan();
    let made = fs::read(&note).expect("made");
    // Of the digest, the sign between, the check and the end.
    for place in [3, 64, 70, made.len() - 1] {
        flip_a_bit(&note, place);
        let verify = project.runner(&["cache", "verify"]);
        verify.expect(1, "v1.blake3`: its check does not fit; moved aside");
        plan();
        assert!(fs::read(&note).expect("there") == made);
        flip_a_bit(&note, place);
        let plan = plan();
        assert!(plan.err.contains("v1.blake3` is damaged and is not believed"), "{}", plan.err);
        assert!(fs::read(&note).expect("there") == made);
    }
    // An earlier runner wrote no check.
    fs::write(&note, [&made[..64], b"\n"].concat()).expect("written");
    project.runner(&["cache", "verify"]).expect(0, "1 generated model as made");
}

#[test]
fn a_generated_model_of_an_earlier_runner_is_held_to_what_this_one_makes() {
    let project = on_a_model();
    let models = project.path("runs/cache/v1/models");
    let (model, note) =
        (models.join("qwen2-tiny-seed1-v1.gguf"), models.join("qwen2-tiny-seed1-v1.blake3"));
    project.runner(&["plan", "stages", "--select", "A"]).expect(0, "run");
    let made = fs::read(&model).expect("made");
    fs::remove_file(&note).expect("an earlier runner left none");
    flip_a_bit(&model, 1_240_609);
    project.runner(&["plan", "stages", "--select", "A"]).expect(0, "run");
    assert!(fs::read(&model).expect("there") == made);
    assert!(note.is_file());
}

#[test]
fn verify_says_which_lists_and_lines_are_damaged() {
    let project = Project::new().stage("S", "shell = 'echo x > o'\noutputs = [\"o\"]");
    project.run().expect(0, "pass");
    std::thread::sleep(Duration::from_millis(50));
    project.run().expect(0, "everything was reused");
    project.runner(&["cache", "verify"]).expect(0, "sound");
    flip_a_bit(&project.path("runs/cache/v1/latest.log"), 10);
    project.runner(&["cache", "verify"]).expect(0, "1 line of `latest.log` damaged");
    let lists = project.path("runs/cache/v1/unchanged");
    let list = fs::read_dir(lists).expect("lists").next().expect("one").expect("read").path();
    flip_a_bit(&list, 30);
    project.runner(&["cache", "verify"]).expect(1, "its check does not fit; moved aside");
}

#[test]
fn verify_leaves_alone_what_a_living_run_writes() {
    let project = Project::new().stage("S", "shell = 'echo x > o'\noutputs = [\"o\"]");
    project.run().expect(0, "pass");
    let mut drafts = Vec::new();
    for kind in ["actions", "objects"] {
        let folder = project.path("runs/cache/v1").join(kind);
        let fan = fs::read_dir(folder).expect("there").next().expect("one").expect("read").path();
        drafts.push(fan.join(".writing-a1B2c3"));
        fs::write(drafts.last().expect("one"), "half").expect("written");
    }
    project.runner(&["cache", "verify"]).expect(0, "sound");
    assert!(drafts.iter().all(|draft| draft.is_file()));
}

#[test]
fn gc_clears_what_killed_runs_left_half_written() {
    let project = Project::new().stage("S", "shell = 'echo x > o'\noutputs = [\"o\"]");
    project.run().expect(0, "pass");
    let drafts = ["models/.synthetic-a1B2c3", "actions/ab/.writing-a1B2c3"];
    for draft in drafts {
        project.write(&format!("runs/cache/v1/{draft}"), "half");
    }
    project.runner(&["cache", "gc"]).expect(0, "2 files");
    assert!(drafts.iter().all(|draft| !project.path("runs/cache/v1").join(draft).exists()));
    project.run().expect(0, "everything was reused");
}

#[test]
fn a_file_behind_a_link_that_a_program_put_above_its_output_is_not_touched() {
    let project = Project::new().file("victim/file", "precious");
    let victim = project.path("victim").display().to_string();
    let line = format!("shell = 'rmdir out; ln -s {victim} out'\noutputs = [\"out/file\"]");
    let project = project.stage("H", &line);
    project.run().expect(4, "a link leads out of there");
    assert_eq!(project.read("victim/file"), "precious");
    // The same where its whole folder was replaced.
    let line = format!("shell = 'd=$PWD; cd /; rm -r $d; ln -s {victim} $d'\noutputs = [\"file\"]");
    let project = project.stage("H", &line);
    project.run().expect(4, "a link leads out of there");
    assert_eq!(project.read("victim/file"), "precious");
}

#[test]
fn no_folder_is_made_behind_a_link_that_leads_out_of_the_project() {
    let elsewhere = tempfile::tempdir().expect("a folder");
    let project =
        Project::new().stage("S", "shell = 'echo x > out/a/b/o'\noutputs = [\"out/a/b/o\"]");
    project.link("out", elsewhere.path().to_str().expect("text"));
    project.run().expect(4, "leads out of the project's folder");
    assert_eq!(fs::read_dir(elsewhere.path()).expect("there").count(), 0);
}

#[test]
fn stderr_that_is_closed_gone_or_full_loses_no_run() {
    let project = Project::new().stage("S", "shell = 'echo x > o'\noutputs = [\"o\"]");
    for (stderr, code) in [("2>&-", 0), ("2>/dev/full", 0), ("2> >(true)", 0)] {
        let line = format!("\"$R\" run stages --force --format plain {stderr} >/dev/null");
        let outcome = Outcome::of(within(60, &mut shell(&project, &line)));
        assert_eq!(outcome.code, Some(code), "{stderr}: {}", outcome.err);
    }
    let runs = fs::read_dir(project.path("runs")).expect("runs").flatten();
    let whole = runs.filter(|run| run.path().join("run.json").is_file()).count();
    assert_eq!(whole, 3);
    for stderr in ["2>&-", "2>/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"] {
        let mut check = shell(&project, &format!("\"$R\" check nowhere {stderr}"));
        assert_eq!(Outcome::of(within(60, &mut check)).code, Some(2), "{stderr}");
    }
    // A warning of the log goes the same way.
    fs::write(project.path("runs/cache/v1/latest.log"), "damaged\n").expect("written");
    let mut run = shell(&project, "\"$R\" run stages --rehash 2>/dev/full >/dev/null");
    assert_eq!(Outcome::of(within(60, &mut run)).code, Some(0));
}

/// Shortens a file as soon as a program works at it.
fn shortened_while_read(project: &Project, file: &str, command: &mut Command) -> Output {
    let path = project.path(file);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            fs::File::options().write(true).open(&path).and_then(|file| file.set_len(0))
        });
        within(60, command)
    })
}

#[test]
fn a_file_that_becomes_shorter_while_it_is_hashed_is_named_and_ends_nothing() {
    let project = Project::new().stage("H", "argv = [\"true\"]\ninputs = [\"big.log\"]");
    let make = || {
        let file = fs::File::create(project.path("big.log")).expect("made");
        file.set_len(24 << 30).expect("a long one");
    };
    make();
    let mut digest = project.command(&["cache", "digest", "big.log"]);
    let outcome = Outcome::of(shortened_while_read(&project, "big.log", &mut digest));
    outcome.expect(2, "it became shorter while it was read");
    make();
    let mut run = project.command(&["run", "stages"]);
    let outcome = Outcome::of(shortened_while_read(&project, "big.log", &mut run));
    assert!(matches!(outcome.code, Some(2 | 4)), "{:?}: {}", outcome.code, outcome.err);
    assert!(outcome.err.contains("big.log"), "{}", outcome.err);
}

#[test]
fn a_model_that_becomes_shorter_is_named_and_ends_the_run_with_a_word() {
    use runner::model::Model;
    let project = on_a_model();
    let model = project.path("model.gguf");
    // In another process: this one would end.
    if std::env::var_os("RUNNER_TEST_SHORTENED").is_some() {
        let opened =
            Model::open(Path::new(&std::env::var_os("RUNNER_TEST_SHORTENED").expect("a path")));
        let opened = opened.expect("a model");
        let path = opened.path().to_owned();
        fs::File::options().write(true).open(path).and_then(|f| f.set_len(0)).expect("cut");
        let sum: u64 = opened
            .tensor("output.weight")
            .expect("there")
            .bytes()
            .iter()
            .map(|b| u64::from(*b))
            .sum();
        panic!("it was read: {sum}");
    }
    let this = std::env::current_exe().expect("this program");
    let name = "hostile::a_model_that_becomes_shorter_is_named_and_ends_the_run_with_a_word";
    let mut again = Command::new(this);
    again.args([name, "--exact", "--nocapture"]).env("RUNNER_TEST_SHORTENED", &model);
    let output = within(60, &mut again);
    assert_eq!(output.status.signal(), None, "no signal ends it");
    Outcome::of(output).expect(4, "model.gguf` became shorter while it was read");
}

#[test]
fn pipes_and_devices_are_refused_wherever_a_file_is_read() {
    let project = on_a_model();
    make_pipe(&project.path("fifo"));
    for folder in ["in", "hf", "hf2"] {
        fs::create_dir(project.path(folder)).expect("made");
    }
    make_pipe(&project.path("in/fifo"));
    make_pipe(&project.path("hf/config.json"));
    for model in ["fifo", "hf", "/dev/zero"] {
        let mut plan = project.command(&["plan", "stages", "--model", model]);
        Outcome::of(within(10, &mut plan)).expect(2, "regular file");
    }
    for stage in fs::read_dir(project.path("stages")).expect("stages").flatten() {
        fs::remove_file(stage.path()).expect("removed");
    }
    let commands = ["fifo", "in", "/dev/zero", "/proc/kmsg"];
    for input in commands {
        let project = &project;
        project.write(
            "stages/H.toml",
            &format!(
                "id = \"H\"\ntitle = \"t\"\ncontract = \"command\"\n[command]\nargv = [\"true\"]\n\
                 inputs = [\"{input}\"]\n"
            ),
        );
        let outcome = Outcome::of(within(10, &mut project.command(&["plan", "stages"])));
        assert!(outcome.out.contains("cannot be read"), "{input}: {} {}", outcome.out, outcome.err);
        let outcome = Outcome::of(within(20, &mut project.command(&["run", "stages"])));
        outcome.expect(4, "cannot be read");
    }
    project.write(
        "stages/H.toml",
        "id = \"H\"\ntitle = \"t\"\ncontract = \"qkv-matmul\"\n[matmul]\nx = { file = \"../fifo\", \
         dtype = \"f32\", shape = [2, 2] }\nw = { file = \"../fifo\", dtype = \"f32\", shape = [2, 2] }\n",
    );
    for (command, code) in [("check", 2), ("plan", 0), ("run", 4)] {
        let outcome = Outcome::of(within(20, &mut project.command(&[command, "stages"])));
        outcome.expect(code, "regular file");
    }
    let mut digest = project.command(&["cache", "digest", "fifo"]);
    Outcome::of(within(10, &mut digest)).expect(2, "it is a pipe");
}

#[test]
fn counts_without_sense_are_problems_of_the_manifest() {
    let project = Project::new().stage("S", "argv = [\"true\"]\ntimeout = 9223372036854775807");
    project.runner(&["check"]).expect(2, "`timeout` is out of range");
    let project = Project::new()
        .stage("S", "argv = [\"true\"]")
        .file("stages/pipeline.toml", "[resources]\nthreads = 1000000000000\n");
    project.runner(&["check"]).expect(2, "`threads` cannot be 1000000000000");
    let patterns: String = (0..200)
        .map(|n| {
            format!("[[command.patterns]]\nname = \"p{n}\"\npattern = '(\\p{{L}}{{60}}){{30}}'\n")
        })
        .collect();
    let project = Project::new().stage("S", &format!("argv = [\"true\"]\n{patterns}"));
    let outcome = Outcome::of(within(20, &mut project.command(&["check"])));
    outcome.expect(2, "is not a regular expression");
    let patterns: String = (0..101)
        .map(|n| format!("[[command.patterns]]\nname = \"p{n}\"\npattern = 'x'\n"))
        .collect();
    let project = Project::new().stage("S", &format!("argv = [\"true\"]\n{patterns}"));
    project.runner(&["check"]).expect(2, "a command has 101 patterns");
}

#[test]
fn a_stage_gets_no_more_threads_than_there_are_cores_and_a_command_none() {
    let project = Project::new()
        .stage("S", "shell = 'grep ^Threads: /proc/$(cut -d\" \" -f4 /proc/self/stat)/status > o'\noutputs = [\"o\"]")
        .file("stages/pipeline.toml", "[resources]\nthreads = 1024\n");
    // With room for few threads a pool of 1024 would fail.
    let mut run = shell(&project, "ulimit -v 8000000; \"$R\" run stages");
    Outcome::of(within(60, &mut run)).expect(0, "pass");
}

/// A folder with a model's tokenizer, in which parts are changed.
fn tokens_of_ab(change: &serde_json::Value) -> Result<Vec<u32>, String> {
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let mut json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": { "a": 0, "b": 1, "ab": 2, "\u{120}": 3, "<s>": 4 },
            "merges": [["a", "b"]],
        },
    });
    for (key, value) in change.as_object().expect("parts") {
        json[key] = value.clone();
    }
    let (_folder, model) = crate::hugging_face::with_tokenizer(&json);
    model.encode("ab").map_err(|error| error.to_string())
}

#[test]
fn a_tokenizer_whose_parts_the_library_cannot_work_with_is_refused_in_words() {
    let template = |single: serde_json::Value| {
        serde_json::json!({ "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [4], "tokens": ["<s>"] } },
        }})
    };
    let sequence = |id: &str| serde_json::json!({ "Sequence": { "id": id, "type_id": 0 } });
    let token = |id: &str| serde_json::json!({ "SpecialToken": { "id": id, "type_id": 0 } });
    let nfc = serde_json::json!({ "normalizer": { "type": "NFC" } });
    let times = |count: usize, part: serde_json::Value| vec![part; count];
    let byte_levels = |count| {
        let part = serde_json::json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
        });
        let parts = times(count, part);
        serde_json::json!({ "pre_tokenizer": { "type": "Sequence", "pretokenizers": parts } })
    };
    let longer = serde_json::json!({
        "type": "Replace", "pattern": { "String": "a" }, "content": "aaaaaaaaaaaaaaaa",
    });
    let longer = serde_json::json!({ "normalizer":
        { "type": "Sequence", "normalizers": times(8, longer) } });
    let digits = serde_json::json!({ "type": "Digits", "individual_digits": true });
    assert_eq!(tokens_of_ab(&byte_levels(4)).expect("sound"), [2]);
    let whole = template(serde_json::json!([token("<s>"), sequence("A")]));
    assert_eq!(tokens_of_ab(&nfc).expect("sound"), [2]);
    assert_eq!(tokens_of_ab(&whole).expect("sound"), [4, 2]);
    let refused = [
        serde_json::json!({ "normalizer": { "type": "Precompiled" } }),
        serde_json::json!({ "normalizer": { "type": "Precompiled", "precompiled_charsmap": "" } }),
        serde_json::json!({ "normalizer":
            { "type": "Precompiled", "precompiled_charsmap": "BAAAAGFiY2Q=" } }),
        serde_json::json!({ "normalizer": { "type": "Prepend", "prepend": "" } }),
        serde_json::json!({ "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Replace", "pattern": { "Regex": "^" }, "content": "x" }] } }),
        serde_json::json!({ "pre_tokenizer": { "type": "FixedLength", "length": 0 } }),
        template(serde_json::json!([sequence("B")])),
        template(serde_json::json!([token("<t>"), sequence("A")])),
        // Each pattern takes memory of its own, and there are many.
        serde_json::json!({ "pre_tokenizer": { "type": "Sequence", "pretokenizers": times(65, digits) } }),
        // Each step makes the text longer, and there are many.
        byte_levels(64),
        longer,
        template(times(5000, sequence("A")).into()),
    ];
    for change in refused {
        let error = tokens_of_ab(&change).expect_err("refused");
        assert!(error.contains("`--tokens`"), "{error}");
        assert!(!error.contains("library cannot"), "the list knows it: {error}");
    }
}

/// Whether a text could move a cursor or speak to a build server on a line of its own.
fn is_plain(text: &str) -> bool {
    let plain =
        |c: char| c == '\n' || c == '\t' || !c.is_control() && c != '\u{202e}' && c != '\u{2028}';
    text.chars().all(plain) && !text.lines().any(|line| line.starts_with("::"))
}

#[test]
fn names_from_outside_reach_no_terminal_as_they_are() {
    const EVIL: &str = "a\x1b[31m\u{202e}\n::error::x";
    let toml = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let project = Project::new();
    project.write(&format!("stages/{EVIL}.toml"), "id = 3\n");
    let outcome = project.runner(&["check"]);
    assert!(outcome.code == Some(2) && is_plain(&outcome.err), "{:?}", outcome.err);
    fs::remove_file(project.path(&format!("stages/{EVIL}.toml"))).expect("removed");
    for line in [
        format!("argv = [\"true\"]\ninputs = [{}]", toml(EVIL)),
        format!("argv = [{}]", toml(&format!("./{EVIL}"))),
        format!("argv = [\"true\"]\noutputs = [{}]", toml(EVIL)),
    ] {
        let title = format!("title = {}", toml(EVIL));
        let text = format!("id = \"S\"\n{title}\ncontract = \"command\"\n[command]\n{line}\n");
        project.write("stages/S.toml", &text);
        for command in ["plan", "run", "explain"] {
            let with = if command == "explain" { "S" } else { "stages" };
            let outcome = project.runner(&[command, with]);
            assert!(
                is_plain(&outcome.err) && is_plain(&outcome.out),
                "{command}: {:?} {:?}",
                outcome.out,
                outcome.err
            );
        }
    }
    let run = fs::read_dir(project.path("runs")).expect("runs").flatten().map(|run| run.path());
    let run = run.filter(|run| run.join("run.json").is_file()).max().expect("a run");
    let json = fs::read_to_string(run.join("run.json")).expect("read");
    let mut json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    json["provenance"]["runner"] = EVIL.into();
    json["schema"] = 999.into();
    fs::write(run.join("run.json"), json.to_string()).expect("written");
    let name = run.file_name().and_then(|name| name.to_str()).expect("text");
    let outcome = project.runner(&["report", name]);
    assert!(outcome.code == Some(2) && is_plain(&outcome.err), "{:?}", outcome.err);
    // A name that stands in a data file.
    let header =
        serde_json::json!({ EVIL: { "dtype": "F32", "shape": [1], "data_offsets": [0, 4] } });
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&[0; 4]);
    fs::write(project.path("x.safetensors"), bytes).expect("written");
    let file = "{ file = \"../x.safetensors\", tensor = \"y\" }";
    project.write(
        "stages/S.toml",
        &format!("id = \"S\"\ntitle = \"t\"\ncontract = \"c\"\n[matmul]\nx = {file}\nw = {file}\n"),
    );
    project.write(
        "contracts/c.toml",
        &fs::read_to_string(crate::data::own("contracts/qkv-matmul.toml"))
            .expect("shipped")
            .replace("qkv-matmul", "c"),
    );
    let outcome = project.runner(&["check"]);
    assert!(outcome.code == Some(2) && is_plain(&outcome.err), "{:?}", outcome.err);
}

#[test]
fn annotations_hold_nothing_that_a_terminal_obeys() {
    let project = Project::new().stage("S", "shell = 'exit 3'");
    project.run().expect(1, "");
    let run = fs::read_dir(project.path("runs")).expect("runs").flatten().map(|run| run.path());
    let run = run.filter(|run| run.join("run.json").is_file()).max().expect("a run");
    let mut json: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(run.join("run.json")).expect("read"))
            .expect("JSON");
    json["stages"][0]["why"] = "a\x1b[2J\u{9b}\u{202e}b".into();
    // Neither an endless file nor one that waits is read for its line.
    make_pipe(&project.path("fifo"));
    for file in ["/dev/zero".to_owned(), project.path("fifo").display().to_string()] {
        json["stages"][0]["file"] = file.into();
        fs::write(run.join("run.json"), json.to_string()).expect("written");
        for format in ["github", "sarif"] {
            let mut report = project.command(&["report", "latest", "--format", format]);
            let outcome = Outcome::of(within(10, &mut report));
            assert_eq!(outcome.code, Some(0), "{}", outcome.err);
            if format == "github" {
                assert!(outcome.out.starts_with("::error"), "{}", outcome.out);
                assert!(!outcome.out.contains(['\x1b', '\u{9b}', '\u{202e}']), "{:?}", outcome.out);
            }
        }
    }
}

#[test]
fn a_small_archive_that_unpacks_to_gigabytes_costs_what_its_shape_needs() {
    use std::io::Write;
    let project = Project::new();
    let mut archive = zip::ZipWriter::new(fs::File::create(project.path("b.npz")).expect("made"));
    archive.start_file("a.npy", zip::write::SimpleFileOptions::default()).expect("started");
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4), }";
    let header = format!("{header:<117}\n");
    archive.write_all(b"\x93NUMPY\x01\x00").expect("written");
    archive.write_all(&(header.len() as u16).to_le_bytes()).expect("written");
    archive.write_all(header.as_bytes()).expect("written");
    let zeros = vec![0; 1 << 20];
    for _ in 0..600 {
        archive.write_all(&zeros).expect("written");
    }
    archive.finish().expect("finished");
    // A process with room for the shape, and for no member.
    let line = "ulimit -v 1000000; \"$R\" judge b.npz b.npz b.npz";
    let outcome = Outcome::of(within(60, &mut shell(&project, line)));
    assert!(matches!(outcome.code, Some(1..=4)), "{:?}: {}", outcome.code, outcome.err);
    assert!(
        outcome.err.contains("bytes") || outcome.out.contains("bytes"),
        "{} {}",
        outcome.out,
        outcome.err
    );
}

#[test]
fn rows_that_need_more_memory_than_there_is_are_an_error_in_words() {
    let project = on_a_model();
    for stage in fs::read_dir(project.path("stages")).expect("stages").flatten() {
        fs::remove_file(stage.path()).expect("removed");
    }
    project.write(
        "stages/M.toml",
        "id = \"M\"\ntitle = \"t\"\ncontract = \"qkv-matmul\"\n[matmul]\n\
         input = { generate = \"normal\", rows = 1048576 }\nweights = [\"blk.0.attn_q\"]\n",
    );
    let line = "ulimit -v 1048576; RAYON_NUM_THREADS=2 \"$R\" run stages --model model.gguf --arms reference";
    let outcome = Outcome::of(within(120, &mut shell(&project, line)));
    outcome.expect(4, "GiB of memory");
}

#[test]
fn a_folders_key_tells_modes_empty_folders_links_and_odd_names_apart() {
    let project = Project::new()
        .stage("S", "shell = 'ls -lR data > o'\ninputs = [\"data\"]\noutputs = [\"o\"]");
    let data = |name: &[u8]| project.path("data").join(OsStr::from_bytes(name));
    project.write("data/run.sh", "x");
    project.executable("data/run.sh");
    fs::write(data(b"a\xff"), "x").expect("written");
    project.run().expect(0, "pass");
    project.run().expect(0, "everything was reused");
    let changes: [&dyn Fn(); 5] = [
        &|| fs::rename(data(b"a\xff"), data(b"a\xfe")).expect("renamed"),
        &|| {
            let plain = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            fs::set_permissions(data(b"run.sh"), plain).expect("set");
        },
        &|| fs::create_dir(data(b"empty")).expect("made"),
        &|| {
            fs::remove_file(data(b"run.sh")).expect("removed");
            std::os::unix::fs::symlink(OsStr::from_bytes(b"a\xfe"), data(b"run.sh"))
                .expect("linked");
        },
        &|| {
            fs::remove_file(data(b"run.sh")).expect("removed");
            std::os::unix::fs::symlink(OsStr::from_bytes(b"./a\xfe"), data(b"run.sh"))
                .expect("linked");
        },
    ];
    for (number, change) in changes.iter().enumerate() {
        change();
        let outcome = project.run();
        assert!(outcome.err.contains(" ran in "), "change {number} was not seen: {}", outcome.err);
    }
}

#[test]
fn a_listed_variable_that_is_no_text_is_an_error_and_no_absence() {
    let project = Project::new().stage("S", "argv = [\"true\"]\nenv = [\"ODD\"]");
    let mut run = project.command(&["run", "stages"]);
    let outcome = Outcome::of(within(60, run.env("ODD", OsStr::from_bytes(b"\xff"))));
    outcome.expect(4, "the variable `ODD` is not UTF-8");
}

#[test]
fn values_of_listed_variables_are_kept_nowhere() {
    let project = Project::new().stage("S", "argv = [\"true\"]\nenv = [\"TOKEN\"]");
    for value in ["hunter2", "hunter3"] {
        let mut run = project.command(&["run", "stages", "--explain"]);
        let outcome = Outcome::of(within(60, run.env("TOKEN", value)));
        assert!(!outcome.err.contains("hunter"), "{}", outcome.err);
        outcome.expect(0, "variable TOKEN:");
    }
    let mut grep = Command::new("grep");
    let found = within(60, grep.args(["-r", "hunter"]).arg(project.path("runs")));
    assert_eq!(Outcome::of(found).out, "");
}

#[test]
fn an_input_that_is_written_and_written_back_is_noticed() {
    let project = Project::new().file("src", "original\n");
    let place = project.path("src").display().to_string();
    let line = format!(
        "shell = 'touch -r {place} r; cp {place} c; echo hacked00 > {place}; cat src > o; cat c > {place}; \
         touch -r r {place}'\ninputs = [\"src\"]\noutputs = [\"o\"]"
    );
    let project = project.stage("S", &line);
    std::thread::sleep(Duration::from_millis(50));
    project.run().expect(4, "`src` changed while the command waited or ran");
}

#[test]
fn an_output_that_claims_a_terabyte_is_not_hashed_for_ever() {
    let project =
        Project::new().stage("S", "shell = 'truncate -s 1T o'\noutputs = [\"o\"]\ntimeout = 2");
    let begun = Instant::now();
    let outcome = Outcome::of(within(40, &mut project.command(&["run", "stages"])));
    outcome.expect(4, "could not be read within 10 s");
    assert!(begun.elapsed() > Duration::from_secs(9));
}

#[test]
fn one_request_to_stop_ends_hashing() {
    let project = Project::new().stage("S", "argv = [\"true\"]\ninputs = [\"big\"]");
    let big = fs::File::create(project.path("big")).expect("made");
    big.set_len(1 << 40).expect("a long one");
    let mut run = project.command(&["run", "stages"]);
    let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    std::thread::sleep(Duration::from_secs(1));
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("told");
    let begun = Instant::now();
    while run.try_wait().expect("asked").is_none() {
        if begun.elapsed() > Duration::from_secs(10) {
            run.kill().expect("killed");
            panic!("it hashes on");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn whoever_leaves_its_session_and_its_variables_dies_with_its_stage() {
    let mark = format!("86{}", std::process::id());
    let line = format!(
        "shell = '(env -i TMPDIR=/var/tmp setsid sh -c \"sleep {mark} & exit\" >/dev/null 2>&1 &); \
         sleep 0.2; echo x > o'\noutputs = [\"o\"]"
    );
    let after = format!(
        "shell = 'sleep 0.2; pgrep -xc -f \"sleep {mark}\" > n || true'\noutputs = [\"n\"]"
    );
    let project = Project::new().stage("H", &line);
    let text = format!(
        "id = \"I\"\ntitle = \"t\"\ncontract = \"command\"\nneeds = [\"H\"]\n[command]\n{after}\n"
    );
    project.write("stages/I.toml", &text);
    project.run().expect(0, "pass");
    assert_eq!(project.read("n").trim(), "0");
}

#[test]
fn whoever_holds_an_output_open_writes_nothing_into_the_cache() {
    let line = "shell = '(env -i setsid sh -c \"for i in 1 2 3 4 5 6 7 8 9; do sleep 0.03; echo late; done\" \
                >> o 2>/dev/null &); sleep 0.1; echo x >> o'\noutputs = [\"o\"]";
    let project = Project::new()
        .stage("H", line)
        .stage("I", "shell = 'cat o > n'\ninputs = [\"o\"]\noutputs = [\"n\"]");
    project.run().expect(0, "pass");
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(project.read("o"), project.read("n"));
    project.runner(&["cache", "verify"]).expect(0, "sound");
}

#[test]
fn a_program_that_kills_or_stops_its_parent_is_answered_and_leaves_nothing() {
    let mark = format!("87{}", std::process::id());
    let project = Project::new()
        .stage("K", &format!("shell = 'setsid sleep {mark} & sleep 0.1; kill -9 $PPID; sleep 2'"));
    Outcome::of(within(20, &mut project.command(&["run", "stages"])))
        .expect(4, "killed by signal 9");
    let left = |mark: &str| {
        let mut pgrep = Command::new("pgrep");
        Outcome::of(within(10, pgrep.args(["-xc", "-f", &format!("sleep {mark}")]))).out
    };
    assert_eq!(left(&mark).trim(), "0");
    let project = Project::new()
        .stage("K", &format!("shell = 'sleep {mark} & kill -STOP $PPID; sleep 9'\ntimeout = 2"));
    Outcome::of(within(20, &mut project.command(&["run", "stages"]))).expect(4, "timeout of 2 s");
    assert_eq!(left(&mark).trim(), "0");
    // Stopped for a moment, it goes on.
    let project =
        Project::new().stage("K", "shell = 'kill -STOP $PPID; echo x > o'\noutputs = [\"o\"]");
    Outcome::of(within(20, &mut project.command(&["run", "stages"]))).expect(0, "pass");
}

#[test]
fn what_a_program_starts_dies_when_the_process_server_is_killed() {
    let mark = format!("88{}", std::process::id());
    let line = format!(
        "shell = 'setsid sleep {mark} & sleep 0.1; kill -9 $(cut -d\" \" -f4 /proc/$PPID/stat); sleep 3'"
    );
    let project = Project::new().stage("K", &line);
    Outcome::of(within(20, &mut project.command(&["run", "stages"]))).expect(4, "process server");
    std::thread::sleep(Duration::from_millis(300));
    let mut pgrep = Command::new("pgrep");
    let left = Outcome::of(within(10, pgrep.args(["-xc", "-f", &format!("sleep {mark}")])));
    assert_eq!(left.out.trim(), "0");
}

#[test]
fn a_program_sees_none_of_the_runners_secrets_in_its_ancestors() {
    let project =
        Project::new().stage("S", "shell = 'cat /proc/$PPID/environ > o'\noutputs = [\"o\"]");
    let mut run = project.command(&["run", "stages"]);
    Outcome::of(within(20, run.env("SECRET", "hunter2"))).expect(0, "pass");
    assert!(!project.read("o").contains("hunter2"));
}

#[test]
fn a_link_that_leads_out_of_the_project_shows_nothing_of_what_lies_there() {
    let elsewhere = tempfile::tempdir().expect("a folder");
    let secret = elsewhere.path().join("credentials.toml");
    fs::write(&secret, "[registry]\ntoken = \"hunter2\"\n").expect("written");
    let project = Project::new().stage("S", "argv = [\"true\"]");
    project.link("stages/x.toml", secret.to_str().expect("text"));
    let outcome = project.runner(&["check"]);
    assert!(!outcome.err.contains("hunter2"), "{}", outcome.err);
    outcome.expect(2, "is a link that leads out of the project");
    project.remove("stages/x.toml");
    // Within the project a link is as good as a file.
    project.rename("stages/S.toml", "common.toml");
    project.link("stages/S.toml", "../common.toml");
    project.runner(&["check"]).expect(0, "no problems found");
}

#[test]
fn lines_of_files_outside_of_the_project_are_shown_by_no_command() {
    let elsewhere = tempfile::tempdir().expect("a folder");
    let secret = elsewhere.path().join("credentials.toml");
    fs::write(&secret, "[registry]\ntoken = \"hunter2\"\n").expect("written");
    let outside = elsewhere.path().display().to_string();
    let quiet = |project: &Project, folder: &str| {
        for command in ["check", "graph", "plan", "run"] {
            let outcome = project.runner(&[command, folder]);
            assert!(!outcome.err.contains("hunter2"), "{command}: {}", outcome.err);
            outcome.expect(2, "credentials.toml");
        }
    };
    let stage = |lines: &str| {
        let op = "[rope]\ninput = { generate = \"normal\", rows = 4 }\nsite = \"blk.0.q_rope\"\n";
        format!("id = \"R\"\ntitle = \"t\"\ncontract = \"rope\"\n{lines}\n{op}")
    };
    let contracts = Project::new()
        .file("stages/pipeline.toml", &format!("tokens = [1]\ncontracts = \"{outside}\"\n"))
        .file("stages/r.toml", &stage(""));
    quiet(&contracts, "stages");
    let outcome = contracts.runner(&["check"]);
    assert!(
        outcome.err.contains("outside of the project, so its lines are not shown"),
        "{}",
        outcome.err
    );
    let engine = format!("recipe = {{ engine = \"{}\" }}", secret.display());
    quiet(&Project::new().file("stages/r.toml", &stage(&engine)), "stages");
    // The folder itself may be a link.
    let linked = Project::new();
    linked.link("elsewhere", &outside);
    quiet(&linked, "elsewhere");
    // A dump that lies elsewhere is not looked into by `check`, nor is its folder listed.
    let dump = elsewhere.path().join("dump.safetensors");
    fs::write(&dump, "hunter2").expect("written");
    for (named, code, words) in [
        (dump.clone(), 0, "not looked into: 1 file outside of the project"),
        (elsewhere.path().join("dump.safetensor"), 2, "does not exist; correct the path"),
    ] {
        let input = format!("{{ file = \"{}\" }}", named.display());
        let text = stage("").replace("{ generate = \"normal\", rows = 4 }", &input);
        let project = Project::new()
            .file("stages/r.toml", &text)
            .file("stages/pipeline.toml", "tokens = [1]\n");
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("contracts/rope.toml");
        project.write("contracts/rope.toml", &fs::read_to_string(shipped).expect("shipped"));
        let outcome = project.runner(&["check"]);
        assert!(!outcome.err.contains("did you mean"), "{}", outcome.err);
        outcome.expect(code, words);
    }
    // In a repository all of it may be named: contracts above the project are shown.
    let project = Project::new()
        .file("a/stages/pipeline.toml", "tokens = [1]\ncontracts = \"../../contracts\"\n")
        .file("a/stages/r.toml", &stage(""))
        .file("contracts/own.toml", "token = \"mine\"\n");
    project.runner(&["check", "a/stages"]).expect(2, "lines are not shown");
    fs::create_dir(project.path(".git")).expect("made");
    project.runner(&["check", "a/stages"]).expect(2, "token = \"mine\"");
}

#[test]
fn what_a_program_says_is_for_its_user_alone_and_all_else_as_the_mask_says() {
    use std::os::unix::fs::PermissionsExt;
    let lines = "shell = \"echo spoken; echo told >&2; echo made > o; echo x > p; chmod 755 p\"\n\
                 outputs = [\"o\", \"p\"]";
    let holding = |folder: &Path, text: &str| {
        let mut open = vec![folder.to_owned()];
        let mut modes = Vec::new();
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).expect("a folder").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    open.push(path);
                } else if fs::read(&path).is_ok_and(|bytes| bytes == text.as_bytes()) {
                    modes.push(entry.metadata().expect("facts").permissions().mode() & 0o777);
                }
            }
        }
        modes
    };
    for (mask, mode) in [("022", 0o644), ("027", 0o640), ("077", 0o600)] {
        let project = Project::new().stage("S", lines);
        let line = format!("umask {mask}; exec \"$R\" run stages");
        Outcome::of(within(20, &mut shell(&project, &line))).expect(0, "pass");
        let runs = project.path("runs");
        assert_eq!(holding(&runs, "spoken\n"), [0o600], "stdout under {mask}");
        assert_eq!(holding(&runs, "told\n"), [0o600], "stderr under {mask}");
        assert_eq!(holding(&runs, "made\n"), [mode], "an output in the cache under {mask}");
        let of = |name: &str| {
            fs::metadata(project.path(name)).expect("facts").permissions().mode() & 0o777
        };
        assert_eq!(of("o"), mode, "the output under {mask}");
        assert_eq!(of("p"), mode | (mode & 0o444) >> 2, "the program that it made under {mask}");
    }
}

#[test]
fn outputs_replace_no_manifest_no_contract_and_no_result() {
    for output in ["contracts/command.toml", "stages/z.toml", "runs/cache/v1/x"] {
        let project =
            Project::new().stage("S", &format!("argv = [\"true\"]\noutputs = [\"{output}\"]"));
        project.runner(&["check"]).expect(2, "would overwrite what a run is made of");
    }
    let project = Project::new().stage("S", "argv = [\"true\"]\noutputs = [\"stages.toml\"]");
    project.runner(&["check"]).expect(0, "no problems found");
}

#[test]
fn a_run_that_does_not_parse_is_of_no_other_version() {
    let project = Project::new().stage("S", "argv = [\"true\"]");
    project.run().expect(0, "pass");
    let run = fs::read_dir(project.path("runs")).expect("runs").flatten().map(|run| run.path());
    let run: PathBuf = run.filter(|run| run.join("run.json").is_file()).max().expect("a run");
    let mut json: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(run.join("run.json")).expect("read"))
            .expect("JSON");
    json["stages"] = 3.into();
    fs::write(run.join("run.json"), json.to_string()).expect("written");
    let outcome = project.runner(&["report", "latest"]);
    assert!(!outcome.err.contains("was written by"), "{}", outcome.err);
    outcome.expect(2, "run the stages again");
}

#[test]
fn a_limit_on_files_is_told_and_has_an_exit_code_of_its_own() {
    let project = on_a_model();
    let line = "ulimit -f 100; \"$R\" run stages --arms reference --select A";
    let outcome = Outcome::of(within(120, &mut shell(&project, line)));
    assert!(matches!(outcome.code, Some(74 | 2 | 4)), "{:?}: {}", outcome.code, outcome.err);
    assert!(outcome.err.contains("File too large"), "{}", outcome.err);
    let line = "ulimit -f 0; \"$R\" run stages --arms reference --select A --model model.gguf";
    let outcome = Outcome::of(within(120, &mut shell(&project, line)));
    outcome.expect(74, "File too large");
}

#[test]
fn a_folder_of_slots_that_somebody_else_made_is_not_used() {
    let project = Project::new().stage("S", "argv = [\"true\"]");
    project.write("stages/pipeline.toml", "[resources]\ncores = 1\n");
    let user = rustix::process::getuid().as_raw();
    let elsewhere = tempfile::tempdir().expect("a folder");
    project.link(&format!("runner-slots-{user}"), elsewhere.path().to_str().expect("text"));
    project.run().expect(4, "somebody else made it");
    assert_eq!(fs::read_dir(elsewhere.path()).expect("there").count(), 0);
    project.remove(&format!("runner-slots-{user}"));
    project.run().expect(0, "pass");
}

#[test]
fn few_threads_are_an_error_in_words_and_no_panic() {
    let project = Project::new().stage("S", "shell = 'echo x > o'\noutputs = [\"o\"]");
    // Root has no limit: the runner and its project are handed to nobody.
    fs::copy(env!("CARGO_BIN_EXE_runner"), project.path("runner")).expect("copied");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(project.path("."), open).expect("set");
    let root = rustix::process::getuid().is_root();
    let other = if root { "setpriv --reuid=61234 --regid=61234 --clear-groups" } else { "" };
    let mut codes = Vec::new();
    for most in 1..=12 {
        let line =
            format!("exec prlimit --nproc={most} {other} ./runner run stages -q --runs r{most}");
        let outcome = Outcome::of(within(60, &mut shell(&project, &line)));
        let sound = matches!(outcome.code, Some(0 | 4 | 74));
        assert!(
            sound && !outcome.err.contains("panicked"),
            "{most}: {:?} {}",
            outcome.code,
            outcome.err
        );
        if outcome.code == Some(74) {
            assert!(outcome.err.contains("allow more processes"), "{}", outcome.err);
        }
        codes.push(outcome.code);
    }
    assert_eq!(codes[0], Some(74), "{codes:?}");
}
