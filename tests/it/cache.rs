//! What is computed again and what is reused: a table of single edits, and what reaches
//! which stage and arm.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use candle_core::quantized::gguf_file;
use runner::cache::{Stamps, Store, sealed, unsealed};
use runner::compute::arms::{Shipped, Workshop};
use runner::compute::{ComputeError, Pass};
use runner::event::{Event, Sink};
use runner::executor::{Attempts, Processes, Slots};
use runner::graph::Graph;
use runner::manifest::{Overrides, load};
use runner::model::Model;
use runner::op::{Arm, Recipe};
use runner::plan::Plan;
use runner::record::{ArmState, StageRecord};
use runner::run::Options;
use runner::verdict::Verdict;

use crate::command::{Outcome, Project};

/// The items that a run computed, from its lines: `a` for a command, else `E emulated`.
pub fn computed(outcome: &Outcome) -> BTreeSet<String> {
    let lines = outcome.err.lines().filter(|line| line.contains(" ran in "));
    let words = lines.map(|line| line.split_whitespace().take(2).collect::<Vec<_>>());
    words.map(|words| words.join(" ").trim_end_matches(" command").to_owned()).collect()
}

pub fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// `a` makes `mid` by a script of the project, `b` sorts that into `end`, `c` reads
/// variables, `d` a link and a folder.
pub fn pipeline() -> Project {
    let project = Project::new()
        .file("in.txt", "b\na\n")
        .file("tool.sh", "#!/bin/sh\ntr a-z A-Z < in.txt > mid\n")
        .file("v1.txt", "one")
        .file("v2.txt", "two")
        .file("same.txt", "one")
        .file("folder/x", "x")
        .stage("a", "argv = [\"./tool.sh\"]\ninputs = [\"in.txt\"]\noutputs = [\"mid\"]")
        .stage(
            "b",
            "argv = [\"sort\", \"-o\", \"end\", \"mid\"]\ninputs = [\"mid\"]\noutputs = [\"end\"]",
        )
        .stage(
            "c",
            "shell = 'echo $LISTED $GIVEN > said'\noutputs = [\"said\"]\n\
             env = [\"LISTED\"]\nset = { GIVEN = \"1\" }\ntimeout = 60",
        )
        .stage(
            "d",
            "shell = 'cat link.txt folder/* > all 2> /dev/null; true'\ninputs = [\"folder\", \"link.txt\"]\n\
             outputs = [\"all\"]",
        );
    project.link("link.txt", "v1.txt");
    project.executable("tool.sh");
    // Past the moment in which a young file's digest is not kept.
    std::thread::sleep(Duration::from_millis(25));
    project
}

/// What is done to the pipeline after its first run.
enum Edit {
    /// A text in a file becomes another.
    Replace(&'static str, &'static str, &'static str),
    /// A file gets this content.
    Write(&'static str, &'static str),
    /// Something else.
    Do(fn(&Project)),
    /// The next run has this variable.
    Set(&'static str, &'static str),
    /// The next run has it no more.
    Unset(&'static str),
}

struct Case {
    name: &'static str,
    edit: Edit,
    /// What the next run computes.
    computed: &'static [&'static str],
    /// What `plan` says before it.
    said: &'static str,
}

fn case(
    name: &'static str,
    edit: Edit,
    computed: &'static [&'static str],
    said: &'static str,
) -> Case {
    Case { name, edit, computed, said }
}

#[test]
fn thirty_edits_and_what_each_makes_run() {
    use Edit::{Do, Replace, Set, Unset, Write};
    let cases = [
        case("nothing", Do(|_| {}), &[], "reused from"),
        case("an argument", Replace("stages/b.toml", "\"-o\"", "\"-r\", \"-o\""), &["b"], "argv:"),
        case("a shell's text", Replace("stages/c.toml", "echo $L", "echo  $L"), &["c"], "argv:"),
        case("a listed variable", Set("LISTED", "other"), &["c"], "variable LISTED: "),
        case("a listed variable unset", Unset("LISTED"), &["c"], " -> unset"),
        case("an unlisted variable", Set("UNLISTED", "1"), &[], "reused from"),
        case(
            "a set variable",
            Replace("stages/c.toml", "\"1\"", "\"2\""),
            &["c"],
            "set GIVEN: \"1\" -> \"2\"",
        ),
        case(
            "a comment",
            Replace("stages/a.toml", "id =", "# A comment.\nid ="),
            &[],
            "reused from",
        ),
        case(
            "the order of keys",
            Write(
                "stages/b.toml",
                "contract = \"command\"\ntitle = \"a command\"\nid = \"b\"\n[command]\noutputs = [\"end\"]\ninputs = [\"mid\"]\nargv = [\"sort\", \"-o\", \"end\", \"mid\"]\n",
            ),
            &[],
            "reused from",
        ),
        case("a title", Replace("stages/a.toml", "a command", "another title"), &[], "reused from"),
        case(
            "a tag",
            Replace("stages/a.toml", "[command]", "tags = [\"t\"]\n[command]"),
            &[],
            "reused from",
        ),
        case(
            "a timeout",
            Replace("stages/c.toml", "timeout = 60", "timeout = 61"),
            &[],
            "reused from",
        ),
        case(
            "a contract",
            Replace("contracts/command.toml", "max        = 0", "max        = 1"),
            &[],
            "reused from",
        ),
        case(
            "a pattern",
            Replace(
                "stages/c.toml",
                "timeout",
                "patterns = [{ name = \"p\", pattern = \"x\" }]\ntimeout",
            ),
            &[],
            "reused from",
        ),
        case(
            "accepted statuses",
            Replace("stages/c.toml", "timeout", "accepts = [0, 1]\ntimeout"),
            &[],
            "reused from",
        ),
        case("an input's content", Write("in.txt", "d\nc\n"), &["a", "b"], "input in.txt:"),
        case(
            "an input's content, with an equal output",
            Write("in.txt", "B\nA\n"),
            &["a"],
            "input in.txt:",
        ),
        case(
            "an input's content, as long as before",
            Write("v1.txt", "two"),
            &["d"],
            "input link.txt:",
        ),
        case("an input's time", Do(|p| p.touch("in.txt")), &[], "touched, content same: in.txt"),
        case("an input, by a copy of itself", Do(|p| p.replace("in.txt")), &[], "reused from"),
        case("an input's mode", Do(|p| p.executable("in.txt")), &[], "reused from"),
        case(
            "a link, to another content",
            Do(|p| p.link("link.txt", "v2.txt")),
            &["d"],
            "input link.txt:",
        ),
        case(
            "a link, to the same content",
            Do(|p| p.link("link.txt", "same.txt")),
            &[],
            "reused from",
        ),
        case("a file more in an input folder", Write("folder/y", "y"), &["d"], "input folder:"),
        case(
            "a file's name in an input folder",
            Do(|p| p.rename("folder/x", "folder/z")),
            &["d"],
            "input folder:",
        ),
        case(
            "the program",
            Write("tool.sh", "#!/bin/sh\ntr a-z A-Z < in.txt | sort -r > mid\n"),
            &["a"],
            "program:",
        ),
        case(
            "the program, with another output",
            Write("tool.sh", "#!/bin/sh\ncat in.txt > mid\n"),
            &["a", "b"],
            "program:",
        ),
        case("the program's time", Do(|p| p.touch("tool.sh")), &[], "reused from"),
        case("an output lost", Do(|p| p.remove("end")), &[], "reused from"),
        case("an output edited", Write("mid", "edited"), &[], "reused from"),
        case(
            "one command more",
            Replace("stages/c.toml", "echo $LISTED", "echo > more; echo $LISTED"),
            &["c"],
            "argv:",
        ),
        case(
            "an input more",
            Replace("stages/b.toml", "[\"mid\"]", "[\"mid\", \"v1.txt\"]"),
            &["b"],
            "input v1.txt is new",
        ),
        case(
            "an input fewer",
            Replace("stages/d.toml", "\"folder\", ", ""),
            &["d"],
            "input folder is gone",
        ),
        case(
            "a manifest's name",
            Do(|p| p.rename("stages/a.toml", "stages/z.toml")),
            &[],
            "reused from",
        ),
        case(
            "a stage's id",
            Replace("stages/c.toml", "id = \"c\"", "id = \"e\""),
            &[],
            "reused from",
        ),
        case(
            "a stage more",
            Do(|p| p.copy_stage("c", "e", "said", "also")),
            &["e"],
            "not in the cache",
        ),
    ];
    for Case { name, edit, computed: expected, said } in cases {
        let project = pipeline();
        let with = |arguments: &[&str], set: Option<(&str, Option<&str>)>| {
            let mut command = project.command(arguments);
            command.env("LISTED", "yes");
            match set {
                Some((name, Some(value))) => command.env(name, value),
                Some((name, None)) => command.env_remove(name),
                None => &mut command,
            };
            Outcome::of(command.output().expect("started"))
        };
        let first = with(&["run", "stages"], None).expect(0, "pass");
        assert_eq!(computed(&first), set(&["a", "b", "c", "d"]), "{name}");
        let before = ["mid", "end", "said", "all"].map(|file| project.read(file));
        let mut variable = None;
        match edit {
            Replace(file, from, to) => {
                let text = project.read(file);
                assert!(text.contains(from), "{name}: no `{from}` in {text}");
                project.write(file, &text.replace(from, to));
            }
            Write(file, text) => project.write(file, text),
            Do(what) => what(&project),
            Set(name, value) => variable = Some((name, Some(value))),
            Unset(name) => variable = Some((name, None)),
        }
        let planned = with(&["plan", "stages"], variable);
        assert!(planned.out.contains(said), "{name}: no `{said}` in\n{}", planned.out);
        let second = with(&["run", "stages"], variable).expect(0, "pass");
        let expected = set(expected);
        assert_eq!(computed(&second), expected, "{name}\n{}", second.err);
        if expected.is_empty() {
            assert_eq!(before, ["mid", "end", "said", "all"].map(|file| project.read(file)));
        }
        let third = with(&["run", "stages"], variable).expect(0, "pass");
        assert_eq!(computed(&third), set(&[]), "{name}, once more\n{}", third.err);
    }
}

/// The shipped stages on a copy of a small model.
pub fn on_a_model() -> Project {
    let project = Project::new();
    let shipped = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["stages", "contracts"] {
        for file in fs::read_dir(shipped.join(folder)).expect("shipped").flatten() {
            let text = fs::read_to_string(file.path()).expect("read");
            project.write(&format!("{folder}/{}", file.file_name().display()), &text);
        }
    }
    let store = project.path("store");
    let tiny = runner::model::synthetic::Preset::Qwen2Tiny;
    let model = runner::model::synthetic::ensure(tiny, 1, &store).expect("a model");
    fs::rename(model, project.path("model.gguf")).expect("moved");
    project
}

#[test]
fn edits_of_a_model_and_a_recipe_reach_the_arms_that_read_them() {
    let project = on_a_model();
    let run = |arguments: &[&str]| {
        let fixed = ["run", "stages", "--select", "C,D,E", "--model", "model.gguf"];
        let all: Vec<&str> = fixed.into_iter().chain(arguments.iter().copied()).collect();
        project.runner(&all)
    };
    let all =
        ["C", "D", "E"].iter().flat_map(|s| [format!("{s} reference"), format!("{s} emulated")]);
    assert_eq!(computed(&run(&[])), all.collect());
    assert_eq!(computed(&run(&[])), set(&[]));

    // One byte of one tensor.
    let model = project.path("model.gguf");
    let offset = {
        let opened = Model::open(&model).expect("opened");
        opened.origin("blk.0.attn_q.weight").expect("a place").offset
    };
    let mut bytes = fs::read(&model).expect("read");
    bytes[offset + 40] ^= 1;
    fs::write(&model, &bytes).expect("written");
    assert_eq!(computed(&run(&[])), set(&["E reference", "E emulated"]));

    project.touch("model.gguf");
    let touched = run(&[]);
    assert_eq!(computed(&touched), set(&[]));
    assert!(touched.err.contains("touched, content same: model.gguf"), "{}", touched.err);

    let defaults = project.read("stages/pipeline.toml");
    project.write("stages/pipeline.toml", &defaults.replace("\"promoted\"", "\"fast\""));
    let emulated = set(&["C emulated", "D emulated", "E emulated"]);
    assert_eq!(computed(&run(&[])), emulated);
    let tokens = run(&["--tokens", "5,6"]);
    assert_eq!(computed(&tokens).len(), 6, "{}", tokens.err);
    let forced = run(&["--force"]);
    assert_eq!(computed(&forced).len(), 6);
    assert!(!forced.err.contains("not deterministic"), "{}", forced.err);
}

/// A model file with its layers over and over, until there are so many.
fn deepen(file: &std::path::Path, layers: u32) {
    let mut reader = std::io::Cursor::new(fs::read(file).expect("read"));
    let mut content = gguf_file::Content::read(&mut reader).expect("a model");
    let block_count = content.metadata.get_mut("qwen2.block_count").expect("layers");
    let there = block_count.to_u32().expect("a number");
    *block_count = gguf_file::Value::U32(layers);
    let mut tensors = BTreeMap::new();
    for name in content.tensor_infos.keys() {
        let read = || {
            let mut reader = reader.clone();
            content.tensor(&mut reader, name, &candle_core::Device::Cpu).expect("a tensor")
        };
        match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            None => drop(tensors.insert(name.clone(), read())),
            Some((layer, part)) => {
                let layer: u32 = layer.parse().expect("a number");
                for layer in (layer..layers).step_by(there as usize) {
                    tensors.insert(format!("blk.{layer}.{part}"), read());
                }
            }
        }
    }
    let metadata: Vec<_> = content.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let mut file = fs::File::create(file).expect("made");
    gguf_file::write(&mut file, &metadata, &tensors).expect("written");
}

#[test]
fn a_changed_tensor_of_28_layers_reaches_the_stages_that_read_it_and_no_others() {
    let project = on_a_model();
    let model = project.path("model.gguf");
    deepen(&model, 28);
    let run = || project.runner(&["run", "stages", "--model", "model.gguf", "--tokens", "5,6"]);
    assert_eq!(computed(&run()).len(), 10);
    let cases: [(&str, &[&str]); 4] = [
        ("blk.13.ffn_up.weight", &["A", "B"]),
        ("blk.27.attn_norm.weight", &["A", "B"]),
        ("blk.0.attn_k.weight", &["A", "B", "E"]),
        ("output.weight", &["A", "B"]),
    ];
    for (tensor, stages) in cases {
        let place = Model::open(&model).expect("opened").origin(tensor).expect("a place").offset;
        let mut bytes = fs::read(&model).expect("read");
        bytes[place + 40] ^= 1;
        fs::write(&model, &bytes).expect("written");
        let outcome = run();
        let both = stages.iter().flat_map(|s| [format!("{s} reference"), format!("{s} emulated")]);
        assert_eq!(computed(&outcome), both.collect(), "{tensor}\n{}", outcome.err);
        let part = tensor.rsplit_once('.').map_or(tensor, |(part, _)| part);
        let part = part.rsplit_once('.').map_or(tensor, |(layer, _)| layer);
        let reasons = outcome.err.matches(&format!("weights of {part}: ")).count();
        assert_eq!(reasons, 2 * stages.len(), "the reason names {part}\n{}", outcome.err);
    }
}

#[test]
fn gc_keeps_what_a_pinned_run_made() {
    let project = pipeline();
    project.run().expect(0, "pass");
    project.runner(&["cache", "ls"]).expect(0, "4 results");
    project.runner(&["cache", "pin", "latest"]).expect(0, "pinned");
    project.runner(&["cache", "gc", "--budget", "0"]).expect(0, "removed 4 actions and 0 files");
    project.runner(&["cache", "unpin", "latest"]).expect(0, "not pinned");
    project.runner(&["cache", "gc", "--budget", "0"]).expect(0, "0 B stay");
    project.run().expect(0, "pass");
}

#[test]
fn fail_fast_starts_nothing_after_a_failure() {
    let project = Project::new()
        .stage("a", "shell = 'exit 1'")
        .stage("b", "shell = 'sleep 0.2'")
        .stage("c", "argv = [\"true\"]");
    let all = project.runner(&["run", "stages", "--jobs", "1"]).expect(1, "structural");
    assert_eq!(computed(&all), set(&["a", "b", "c"]));
    let project = Project::new().stage("a", "shell = 'exit 1'").stage("b", "argv = [\"true\"]");
    let fast = project.runner(&["run", "stages", "--jobs", "1", "--fail-fast"]);
    assert_eq!(computed(&fast), set(&["a"]));
    fast.expect(1, "not started: stage a did not pass");
}

#[test]
fn a_dry_run_and_an_explanation_run_nothing() {
    let project = pipeline();
    let dry = project.runner(&["run", "stages", "--dry-run"]);
    let dry = dry.expect(0, "not in the cache");
    assert!(computed(&dry).is_empty() && !project.path("mid").exists());
    project.run().expect(0, "pass");
    project.write("in.txt", "z\n");
    let explained = project.runner(&["plan", "stages", "--explain"]);
    explained.expect(0, "* input in.txt: ").expect(0, "stage a, which it needs, runs first");
}

/// The shipped arms on a machine with this driver, on which only the emulated arm
/// is said to depend.
struct WithDriver(&'static str);

impl Workshop for WithDriver {
    fn name(&self, _: Arm) -> String {
        "with a driver".to_owned()
    }

    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
        Shipped::default().ops(arm, recipe)
    }

    fn unavailable(&self, arm: Arm, _: &Recipe) -> Option<String> {
        (arm == Arm::Device).then(|| "this test has no device".to_owned())
    }

    fn facts(&self, arm: Arm, _: &Recipe) -> Vec<(String, String)> {
        let driver = ("driver".to_owned(), self.0.to_owned());
        Some(driver).filter(|_| arm == Arm::Emulated).into_iter().collect()
    }
}

/// Stage C of a small model, run with these arms.
fn stage_c(project: &Project, workshop: &dyn Workshop, name: &str) -> StageRecord {
    let model = Some(project.path("model.gguf").display().to_string());
    let overrides = Overrides { model, ..Overrides::default() };
    let pipeline = load(&project.path("stages"), &overrides).expect("sound manifests");
    let graph = Graph::of(&pipeline.stages).expect("no cycle");
    let only_c = pipeline.stages.iter().map(|stage| stage.id.clone()).filter(|id| id.0 == "C");
    let only_c = only_c.collect();
    let store = Store::new(&project.path("cache"));
    let stamps = Stamps::forgetful();
    let plan = Plan::new(&pipeline, &graph, &only_c, &store, &stamps).expect("a plan");
    let (attempts, _) = Attempts::open(&store.attempts(), name).expect("a folder");
    let options = Options {
        run: name.to_owned(),
        created: "2026-11-20T00:00:00Z".to_owned(),
        jobs: 1,
        require: BTreeSet::new(),
        workshop,
        fail_fast: false,
        slots: &Slots::here(),
        processes: &Processes::new(env!("CARGO_BIN_EXE_runner").into()),
        attempts: &attempts,
        memory: None,
    };
    struct Silent;
    impl Sink for Silent {
        fn event(&mut self, _: &Event) {}
    }
    runner::run::run(&plan, &store, &options, &mut Silent).stages.remove(0)
}

#[test]
fn a_new_driver_makes_only_the_arms_run_that_depend_on_it() {
    let project = on_a_model();
    let run = |driver: &'static str| {
        let stage = stage_c(&project, &WithDriver(driver), driver);
        [Arm::Reference, Arm::Emulated].map(|arm| {
            let record = &stage.arms[&arm];
            (record.state, record.why.clone())
        })
    };
    run("580.65");
    let [reference, emulated] = run("585.10");
    let from = "reused from 2026-11-20T00:00:00Z (580.65)".to_owned();
    assert_eq!(reference, (ArmState::Reused, from));
    assert_eq!(emulated, (ArmState::Ran, "driver: 580.65 -> 585.10 (since 580.65)".to_owned()));
}

/// A device that is said to be there and does not answer.
struct Gone;

impl Workshop for Gone {
    fn name(&self, _: Arm) -> String {
        "gone".to_owned()
    }

    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
        match arm {
            Arm::Device => Err(ComputeError::Unavailable("it does not answer".to_owned())),
            _ => Shipped::default().ops(arm, recipe),
        }
    }

    fn unavailable(&self, _: Arm, _: &Recipe) -> Option<String> {
        None
    }
}

#[test]
fn a_device_that_does_not_answer_is_unmeasured_and_no_error() {
    let stage = stage_c(&on_a_model(), &Gone, "gone");
    let device = &stage.arms[&Arm::Device];
    assert_eq!((device.state, device.why.as_str()), (ArmState::Unmeasured, "it does not answer"));
    assert_eq!(stage.verdict, Verdict::Pass);
}

/// The records of a cache, and what each says besides tensors.
fn change_records(project: &Project, change: impl Fn(&mut serde_json::Value)) -> usize {
    let mut changed = 0;
    for fan in fs::read_dir(project.path("runs/cache/v1/actions")).expect("actions") {
        for record in fs::read_dir(fan.expect("a folder").path()).expect("records") {
            let path = record.expect("a record").path();
            let bytes = fs::read(&path).expect("read");
            let text = unsealed(&bytes).expect("sealed");
            let mut json: serde_json::Value = serde_json::from_slice(text).expect("JSON");
            change(&mut json);
            fs::write(&path, sealed(json.to_string().into_bytes())).expect("written");
            changed += 1;
        }
    }
    changed
}

/// The run before is not believed by the list of what is unchanged alone.
fn run_on_a_model(project: &Project) -> Outcome {
    project.runner(&["run", "stages", "--model", "model.gguf", "--select", "C", "--explain"])
}

#[test]
fn a_record_that_no_longer_decodes_is_a_miss_that_is_told_and_computed_again() {
    let project = on_a_model();
    let first = run_on_a_model(&project).expect(0, "pass");
    assert_eq!(computed(&first), set(&["C reference", "C emulated"]));
    assert_eq!(computed(&run_on_a_model(&project).expect(0, "pass")), set(&[]));
    // Whole and sealed, as a version with another format would leave it: arms and measures.
    let changed =
        change_records(&project, |record| record["payload"] = serde_json::json!({ "x": 7 }));
    assert!(changed >= 3, "{changed}");
    let again = run_on_a_model(&project).expect(0, "pass");
    assert_eq!(computed(&again), set(&["C reference", "C emulated"]));
    let told = again.err.matches("is no record that this runner reads (missing field").count();
    assert_eq!(told, changed, "{}", again.err);
    assert_eq!(computed(&run_on_a_model(&project).expect(0, "pass")), set(&[]));

    // A record whose tensors are of another form, under their own right name.
    let object = b"no tensors".to_vec();
    let digest = blake3::hash(&object).to_hex().to_string();
    let place = format!("runs/cache/v1/objects/{}", &digest[..2]);
    fs::create_dir_all(project.path(&place)).expect("made");
    let path = project.path(&format!("{place}/{digest}.safetensors"));
    fs::write(path, &object).expect("written");
    change_records(&project, |record| {
        if record["object"].is_string() {
            record["object"] = serde_json::json!(digest);
        }
    });
    let again = run_on_a_model(&project).expect(0, "pass");
    assert_eq!(computed(&again), set(&["C reference", "C emulated"]));
    assert_eq!(
        again.err.matches("is no record that this runner reads").count(),
        2,
        "{}",
        again.err
    );
}

#[test]
fn tensors_that_are_not_what_was_stored_are_named_and_not_believed() {
    let project = on_a_model();
    run_on_a_model(&project).expect(0, "pass");
    let objects = project.path("runs/cache/v1/objects");
    let mut poisoned = 0;
    for fan in fs::read_dir(objects).expect("objects") {
        for object in fs::read_dir(fan.expect("a folder").path()).expect("tensors") {
            let path = object.expect("an object").path();
            let mut bytes = fs::read(&path).expect("read");
            *bytes.last_mut().expect("a byte") ^= 1;
            fs::write(&path, bytes).expect("written");
            poisoned += 1;
        }
    }
    assert!(poisoned >= 1);
    // The measures are gone too: tensors have to be read.
    change_records(&project, |record| {
        if record["object"].is_null() {
            record["payload"] = serde_json::json!(7);
        }
    });
    let run = run_on_a_model(&project);
    assert_ne!(run.code, Some(0), "{}", run.out);
    assert!(run.err.contains("was damaged and was moved aside"), "{}", run.err);
    run_on_a_model(&project).expect(0, "pass");
}
