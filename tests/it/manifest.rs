//! Manifests, contracts and the graph: what is accepted, what is refused, and
//! with which words. Each bad folder is a tiny manifest and a snapshot of the
//! text that its author reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::sample::Index;
use runner::graph::{Graph, GraphFormat, render, select};
use runner::manifest::{self, IfFails, Overrides, Pipeline, Problems, Prompt, Stage};
use runner::metric::Metric;
use runner::op::{Arm, Capture, Op, Site, StageId, Stream};

/// A folder of stages with its contracts, in a place of its own.
struct Folder(tempfile::TempDir);

const STAGE: &str = r#"
id = "X"
title = "A stage"
contract = "plain"
[embed]
"#;

const CONTRACT: &str = r#"
name = "plain"
version = "1.0.0"
[[equation]]
id = "exact"
formula = "device == emulated"
why = "deterministic"
[[falsifier]]
id = "P-1"
equation = "exact"
prediction = "no bit differs"
compare = ["device", "emulated"]
metric = "bit_mismatches"
max = 0
if_fails = "structural"
why = "same codes, same schedule, same bits"
"#;

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().expect("a temporary folder"));
        fs::create_dir(folder.0.path().join("stages")).expect("stages/");
        fs::create_dir(folder.0.path().join("contracts")).expect("contracts/");
        folder.file("contracts/plain.toml", CONTRACT)
    }

    fn file(self, name: &str, text: impl AsRef<[u8]>) -> Folder {
        fs::write(self.0.path().join(name), text).expect("a file");
        self
    }

    fn stage(self, text: &str) -> Folder {
        self.file("stages/x.toml", text)
    }

    /// The plain contract with one text replaced by another, and a stage that uses it.
    fn contract_with(self, from: &str, to: &str) -> Folder {
        assert!(CONTRACT.contains(from));
        self.stage(STAGE).file("contracts/plain.toml", CONTRACT.replace(from, to))
    }

    fn load(&self) -> Result<Pipeline, Problems> {
        self.load_with(&Overrides::default())
    }

    fn load_with(&self, overrides: &Overrides) -> Result<Pipeline, Problems> {
        manifest::load(&self.0.path().join("stages"), overrides)
    }

    /// What the author of this folder reads.
    fn complaint(&self) -> String {
        self.without_place(&self.load().expect_err("problems").to_string())
    }

    fn without_place(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.0.path().display()), "")
    }
}

fn shipped() -> Pipeline {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("stages");
    manifest::load(&folder, &Overrides::default()).unwrap_or_else(|problems| panic!("{problems}"))
}

fn id(name: &str) -> StageId {
    StageId(name.into())
}

fn ids(names: &[&str]) -> BTreeSet<StageId> {
    names.iter().map(|name| id(name)).collect()
}

macro_rules! complains {
    ($($name:ident: $folder:expr;)*) => {$(
        #[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), $folder.complaint());
        }
    )*};
}

complains! {
    an_empty_folder: Folder::new();
    a_syntax_error_hides_no_other_file: Folder::new()
        .file("stages/a.toml", "id = \"A\"\ntitle = \"unclosed\ncontract = \"plain\"\n[embed]\n")
        .file("stages/b.toml", STAGE.replace("\"X\"", "\"B\"\nneeds = [\"A\"]\ncolour = \"red\""))
        .file("contracts/plain.toml", "name = ");
    several_problems_of_one_file: Folder::new()
        .stage("id = \"has space\"\nneds = [\"A\"]\ntokens = [1, -2, 3]\narms = []\ncontract = 5\n[forward]\nrepeats = 0\ncapture = \"every_site\"\n");
    unknown_keys: Folder::new()
        .stage(&format!("contarct = \"plain\"\n{STAGE}wieght = \"token_embd\"\n"));
    an_unknown_op: Folder::new().stage(&STAGE.replace("[embed]", "[matmull]\nx = 1"));
    no_op: Folder::new().stage(&STAGE.replace("[embed]", ""));
    two_ops: Folder::new().stage(&format!("{STAGE}[forward]\nrepeats = 1\n"));
    duplicate_ids: Folder::new().file("stages/a.toml", STAGE).file("stages/b.toml", STAGE);
    references_that_lead_nowhere: Folder::new()
        .file("stages/embed.toml", STAGE.replace("\"X\"", "\"embedding\""))
        .stage("id = \"X\"\ntitle = \"t\"\ncontract = \"plane\"\nneeds = [\"X\", \"embeding\"]\n\
                [rms_norm]\ninput = { stage = \"embedding\", site = \"embd\" }\nweight = \"blk.0.attn_norm\"\n");
    a_cycle: Folder::new()
        .file("stages/a.toml", STAGE.replace("\"X\"", "\"a\"\nneeds = [\"b\"]"))
        .file("stages/b.toml", STAGE.replace("\"X\"", "\"b\"\nneeds = [\"c\"]"))
        .file("stages/c.toml", "id = \"c\"\ntitle = \"t\"\ncontract = \"plain\"\n\
              [rms_norm]\ninput = { stage = \"a\", site = \"embed\" }\nweight = \"output_norm\"\n");
    tokens_and_prompt: Folder::new()
        .stage(&STAGE.replace("[embed]", "tokens = [1]\nprompt = \"one\"\n[embed]"));
    a_chat_of_nothing_and_a_system_without_a_chat: Folder::new()
        .file("stages/a.toml", STAGE.replace("\"X\"", "\"a\"\nchat = true\ntokens = [1]"))
        .file("stages/b.toml", STAGE.replace("\"X\"", "\"b\"\nprompt = \"x\"\nsystem = \"y\""));
    empty_prompt_and_arms_without_reference: Folder::new()
        .file("stages/pipeline.toml", "prompt = \"\"\narms = [\"device\", \"device\", \"gpu\"]\n")
        .stage(STAGE);
    recipes_that_make_no_sense: Folder::new()
        .file("stages/pipeline.toml",
              "[recipe]\nscale = { weight = \"block128\", activation = \"block128\" }\n")
        .file("stages/a.toml", STAGE.replace("\"X\"", "\"a\"") + "[recipe]\ngemm = \"bf16\"\n")
        .file("stages/b.toml", STAGE.replace("\"X\"", "\"b\"") + "[recipe]\naccumulate = \"fast\"\n")
        .file("stages/c.toml",
              STAGE.replace("\"X\"", "\"c\"") + "[recipe]\noutput = \"e4m3\"\nchip = \"ampere\"\n")
        .file("stages/d.toml",
              STAGE.replace("\"X\"", "\"d\"") + "[recipe]\nscale = { weight = \"tensor\" }\n");
    weights_that_belong_to_no_site: Folder::new()
        .file("stages/a.toml", STAGE.replace("\"X\"", "\"a\""))
        .stage("id = \"X\"\ntitle = \"t\"\ncontract = \"plain\"\n[matmul]\n\
                input = { stage = \"a\", site = \"embed\" }\n\
                weights = [\"blk.0.attn_q\", \"blk.0.attn_q\", \"blk.00.attn_k\", \"blk.0.attn_v.weight\"]\n");
    bounds_that_are_none: Folder::new().contract_with("max = 0", "min = -inf\nmax = nan");
    no_bound: Folder::new().contract_with("max = 0\n", "");
    bounds_that_can_never_be_met: Folder::new().contract_with("max = 0", "max = -1");
    bounds_the_wrong_way_round: Folder::new().contract_with("max = 0", "min = 3\nmax = 2");
    a_falsifier_that_can_never_fail: Folder::new()
        .contract_with("metric = \"bit_mismatches\"\nmax = 0", "metric = \"cosine\"\nmax = 1.0");
    an_equation_nobody_tests: Folder::new()
        .contract_with("[[falsifier]]",
                       "[[equation]]\nid = \"idle\"\nformula = \"1 = 1\"\nwhy = \" \"\n[[falsifier]]");
    a_contract_with_bad_names: Folder::new()
        .contract_with("equation = \"exact\"", "equation = \"exakt\"\nsites = [\"blk.*.atn\", \"blk.1*.q\"]")
        .file("contracts/version.toml", CONTRACT.replace("1.0.0", "1.0").replace("\"plain\"", "\"v\""));
    duplicate_falsifiers: Folder::new().stage(STAGE).file(
        "contracts/plain.toml",
        format!("{CONTRACT}{}", &CONTRACT[CONTRACT.find("[[falsifier]]").unwrap()..]));
    streams_in_the_wrong_order: Folder::new()
        .contract_with("[\"device\", \"emulated\"]", "[\"reference\", \"emulated\"]");
    streams_with_other_inputs: Folder::new()
        .contract_with("[\"device\", \"emulated\"]", "[\"device\", \"reference@emulated\"]");
    a_metric_without_a_floor: Folder::new().contract_with("bit_mismatches", "z_max");
    logits_metrics_without_logits: Folder::new()
        .contract_with("metric = \"bit_mismatches\"", "metric = \"kl\"\nsites = [\"embed\"]");
    contracts_that_do_not_fit: Folder::new()
        .contract_with("metric = \"bit_mismatches\"", "metric = \"kl\"")
        .file("stages/repeats.toml",
              "id = \"R\"\ntitle = \"t\"\ncontract = \"repeats\"\n[forward]\nrepeats = 1\n")
        .file("contracts/repeats.toml",
              CONTRACT.replace("\"plain\"", "\"repeats\"").replace("\"device\", ", "\"emulated\", "));
    a_missing_contract: Folder::new().stage(&STAGE.replace("\"plain\"", "\"qkv\""));
    a_file_that_is_not_utf8: Folder::new().stage(STAGE).file("stages/y.toml", b"id = \"A\"\n\xff\xfe");
    a_file_that_is_too_large: Folder::new().stage(STAGE)
        .file("stages/y.toml", "#".repeat((1 << 20) + 1));
}

#[test]
fn a_folder_that_does_not_exist() {
    let folder = Folder::new();
    let problems = manifest::load(&folder.0.path().join("nowhere"), &Overrides::default())
        .expect_err("no such folder");
    insta::assert_snapshot!(folder.without_place(&problems.to_string()));
}

#[test]
fn names_that_are_not_utf8_are_refused_in_words() {
    use std::os::unix::ffi::OsStrExt;
    let place = tempfile::tempdir().expect("a folder");
    let refusal = |folder: &Path| {
        let problems = manifest::load(folder, &Overrides::default()).expect_err("refused");
        problems.to_string()
    };
    let folder = place.path().join(std::ffi::OsStr::from_bytes(b"st\xffges"));
    fs::create_dir(&folder).expect("made");
    assert!(refusal(&folder).contains("is not UTF-8"), "{}", refusal(&folder));
    let file = place.path().join(std::ffi::OsStr::from_bytes(b"\xff.toml"));
    fs::write(&file, STAGE).expect("written");
    assert!(refusal(place.path()).contains("is not UTF-8"), "{}", refusal(place.path()));
}

#[test]
fn a_folder_named_like_a_manifest_is_no_manifest() {
    let folder = Folder::new().stage(STAGE);
    fs::create_dir(folder.0.path().join("stages/y.toml")).expect("a folder");
    let titles = folder.load().expect_err("a problem").to_string();
    assert!(titles.contains("is not a regular file"), "{titles}");
}

#[test]
fn contradictions_on_the_command_line() {
    let folder = Folder::new().stage(STAGE);
    let both =
        Overrides { tokens: Some(vec![1]), prompt: Some("one".into()), ..Overrides::default() };
    let empty = Overrides {
        tokens: Some(vec![]),
        arms: Some(vec![Arm::Device]),
        model: Some(String::new()),
        ..Overrides::default()
    };
    let text: Vec<String> = [both, empty]
        .iter()
        .map(|overrides| folder.load_with(overrides).expect_err("problems").to_string())
        .collect();
    insta::assert_snapshot!(folder.without_place(&text.join("\n---\n")));
}

#[test]
fn colour_is_drawn_on_request_only() {
    let problems = Folder::new().load().expect_err("problems");
    assert!(!problems.to_string().contains('\u{1b}'));
    assert!(problems.render(true).contains('\u{1b}'));
}

#[test]
fn the_shipped_folder_is_sound_and_says_what_the_design_says() {
    let pipeline = shipped();
    let names: Vec<&str> = pipeline.stages.iter().map(|stage| stage.id.0.as_str()).collect();
    assert_eq!(names, ["A", "B", "C", "D", "E"]);
    let [a, b, c, d, e] = &pipeline.stages[..] else { panic!("five stages") };
    assert_eq!(
        a.op,
        Op::Forward { capture: Capture::Logits, repeats: 2, decode: 8, kv_cache: None }
    );
    assert_eq!(
        b.op,
        Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None }
    );
    assert_eq!(b.needs, [id("A")]);
    assert_eq!(c.needs, []);
    assert_eq!(d.needs, [id("C")]);
    assert_eq!(e.needs, [id("D")]);
    assert_eq!(a.model, "synthetic:qwen2-tiny");
    assert_eq!(a.prompt, Prompt::Tokens(vec![791, 374, 264, 1296]));
    let contracts: Vec<&str> = pipeline.contracts.keys().map(String::as_str).collect();
    for name in ["embedding", "per-layer", "qkv-matmul", "reproducer", "rms-norm"] {
        assert!(contracts.contains(&name), "{name}");
    }
    // Every stage has a falsifier between the two CPU arms: without a GPU it is judged all the same.
    for stage in &pipeline.stages {
        let judged = pipeline.contracts[&stage.contract]
            .falsifiers
            .iter()
            .any(|falsifier| !falsifier.compare.contains(&Stream::Arm(Arm::Device)));
        assert!(judged, "{}", stage.id);
    }
}

#[test]
fn a_folder_without_pipeline_toml_has_the_shipped_defaults() {
    let pipeline = Folder::new().stage(STAGE).load().expect("sound");
    let [stage] = &pipeline.stages[..] else { panic!("one stage") };
    let shipped = &shipped().stages[2];
    assert_eq!(
        (&stage.model, &stage.prompt, stage.seed, &stage.arms, stage.recipe, &stage.resources),
        (
            &shipped.model,
            &shipped.prompt,
            shipped.seed,
            &shipped.arms,
            shipped.recipe,
            &shipped.resources
        )
    );
}

fn recipe_of_engine(name: &str, besides: &str) -> Result<runner::op::Recipe, String> {
    let recipe = format!("[recipe]\nengine = \"{name}\"\n{besides}");
    let stage = format!("model = \"x.gguf\"\ntokens = [5]\n{STAGE}{recipe}");
    let pipeline = Folder::new().stage(&stage).load();
    pipeline.map(|pipeline| pipeline.stages[0].recipe).map_err(|problems| problems.render(false))
}

#[test]
fn a_recipe_that_says_an_engine_alone_is_the_one_that_predict_takes() {
    let mut known = 0;
    for (name, _) in runner::engine::SHIPPED {
        let file = runner::engine::EngineFile::find(name, Path::new(".")).expect("ships");
        if let Ok((kernels, stream)) = file.known() {
            let own = runner::op::Recipe::of_engine(kernels, stream);
            assert_eq!(recipe_of_engine(name, "").expect("sound"), own, "{name}");
            known += 1;
        }
    }
    assert_eq!(known, 10);
}

#[test]
fn the_projects_own_kernels_take_the_place_of_an_engine_that_is_inherited() {
    let own = |pipeline: &str, recipe: &str| {
        let stage = format!("model = \"x.gguf\"\ntokens = [5]\n{STAGE}[recipe]\n{recipe}\n");
        let folder = Folder::new().file("stages/pipeline.toml", pipeline).stage(&stage);
        folder.load().map(|pipeline| pipeline.stages[0].recipe)
    };
    let pipeline = "[recipe]\nengine = \"vllm\"\nstream = \"f16\"\ndecoded = 7\n";
    let recipe = own(pipeline, "engine = \"runner\"").expect("sound");
    assert_eq!(recipe, runner::op::Recipe::default());
    // Of f32 nothing is inherited that its kernels would need.
    let recipe = own(pipeline, "engine = \"f32\"").expect("sound");
    assert_eq!((recipe.engine, recipe.stream), (None, Some(runner::dtype::Format::F32)));
    let recipe = own("[recipe]\ngemm = \"bf16\"\n", "engine = \"runner\"").expect("sound");
    assert_eq!(recipe.gemm, runner::dtype::Format::Bf16);
}

#[test]
fn an_engine_whose_kernels_are_not_known_says_what_is_multiplied() {
    use runner::dtype::Format::F32;
    for (name, emulate) in [("f32", None), ("llama-cpp-cpu", Some(runner::op::Engine::LlamaCpp))] {
        let recipe = recipe_of_engine(name, "").expect("sound");
        assert_eq!((recipe.gemm, recipe.output, recipe.stream), (F32, F32, Some(F32)), "{name}");
        assert_eq!((recipe.engine, recipe.emulate), (None, emulate), "{name}");
        let refused = recipe_of_engine(name, "decoded = 2\n").expect_err("no kernels");
        assert!(refused.contains("needs an `engine` whose kernels are known"), "{refused}");
        let refused = recipe_of_engine(name, "stream = \"bf16\"\n").expect_err("another stream");
        assert!(refused.contains("it passes tensors in `f32`"), "{refused}");
        let refused = recipe_of_engine(name, "gemm = \"bf16\"\n").expect_err("another product");
        assert!(refused.contains("`gemm` has no use beside `engine`"), "{refused}");
    }
    // The project's own kernels are what a recipe says, and what it is by default.
    assert_eq!(recipe_of_engine("runner", "").expect("sound"), runner::op::Recipe::default());
    let bf16 = recipe_of_engine("runner", "gemm = \"bf16\"\n").expect("sound");
    assert_eq!(
        bf16,
        runner::op::Recipe { gemm: runner::dtype::Format::Bf16, ..Default::default() }
    );
    let refused = recipe_of_engine("runner", "stream = \"bf16\"\n").expect_err("a stream");
    assert!(refused.contains("its kernels pass f32"), "{refused}");
}

#[test]
fn a_stage_inherits_and_overrides_key_by_key() {
    let folder = Folder::new()
        .file(
            "stages/pipeline.toml",
            "model = \"m/x.gguf\"\nprompt = \"hello\"\nseed = 7\n[recipe]\ngemm = \"bf16\"\nchip = \"ada\"\n\
             [resources]\nthreads = 3\n",
        )
        .stage(&format!("tokens = [5]{STAGE}[recipe]\nchip = \"hopper\"\n"))
        .file("stages/y.toml", STAGE.replace("\"X\"", "\"Y\""));
    let pipeline = folder.load().expect("sound");
    let [x, y] = &pipeline.stages[..] else { panic!("two stages") };
    assert_eq!(x.prompt, Prompt::Tokens(vec![5]));
    assert_eq!(y.prompt, Prompt::Text("hello".into()));
    assert_eq!((x.seed, x.resources.threads.map(|n| n.get())), (7, Some(3)));
    assert_eq!(x.recipe.gemm, y.recipe.gemm);
    assert_ne!(x.recipe.chip, y.recipe.chip);
    // A path in a manifest is seen from the manifest's folder; one that was typed is not.
    assert_eq!(folder.without_place(&x.model), "stages/m/x.gguf");
    let typed = Overrides {
        model: Some("x.gguf".into()),
        prompt: Some("typed".into()),
        arms: Some(vec![Arm::Reference]),
        ..Overrides::default()
    };
    for stage in folder.load_with(&typed).expect("sound").stages {
        assert_eq!(stage.model, "x.gguf");
        assert_eq!(stage.prompt, Prompt::Text("typed".into()));
        assert_eq!(stage.arms, [Arm::Reference]);
    }
}

#[test]
fn a_chat_is_of_the_prompt_that_stands_beside_it() {
    let laid = |text: &str, system: Option<&str>| Prompt::Chat {
        text: text.to_owned(),
        system: system.map(str::to_owned),
    };
    let folder = Folder::new()
        .file("stages/pipeline.toml", "prompt = \"hello\"\nchat = true\nsystem = \"Be brief.\"\n")
        .stage(&format!("prompt = \"plain\"\n{STAGE}"))
        .file("stages/y.toml", STAGE.replace("\"X\"", "\"Y\""));
    let prompts = |overrides: &Overrides| -> Vec<Prompt> {
        let pipeline = folder.load_with(overrides).expect("sound");
        pipeline.stages.into_iter().map(|stage| stage.prompt).collect()
    };
    let written = [Prompt::Text("plain".into()), laid("hello", Some("Be brief."))];
    assert_eq!(prompts(&Overrides::default()), written);
    let typed = Overrides { prompt: Some("typed".into()), ..Overrides::default() };
    // A typed text stands in place of the manifest's, and is laid as that was.
    let new = [Prompt::Text("typed".into()), laid("typed", Some("Be brief."))];
    assert_eq!(prompts(&typed), new);
    let chat = Overrides { chat: Some(true), ..typed.clone() };
    assert_eq!(prompts(&chat), [laid("typed", None), laid("typed", Some("Be brief."))]);
    let system = Overrides { system: Some("Rhyme.".into()), ..chat.clone() };
    assert_eq!(prompts(&system), vec![laid("typed", Some("Rhyme.")); 2]);
    let plain = Overrides { chat: Some(false), ..typed };
    assert_eq!(prompts(&plain), vec![Prompt::Text("typed".into()); 2]);
    let both = Overrides { system: Some("Rhyme.".into()), ..plain };
    let problems = folder.load_with(&both).expect_err("refused").to_string();
    assert!(problems.contains("`--chat=false` lays none"), "{problems}");
    let tokens = Overrides { tokens: Some(vec![3]), ..Overrides::default() };
    assert_eq!(prompts(&tokens), vec![Prompt::Tokens(vec![3]); 2]);
}

#[test]
fn a_folder_of_contracts_that_is_not_there_is_shown_where_it_is_named() {
    let folder = Folder::new().stage(STAGE);
    let folder = folder.file("stages/pipeline.toml", "seed = 1\ncontracts = \"rules\"\n");
    let problems = folder.load().expect_err("refused").to_string();
    let named = problems.contains("pipeline.toml:2:13") && problems.contains("it is named here");
    assert!(named, "{problems}");
}

#[test]
fn contracts_may_lie_elsewhere() {
    let folder = Folder::new()
        .stage(&STAGE.replace("plain", "other"))
        .file("stages/pipeline.toml", "contracts = \"rules\"\n");
    fs::create_dir(folder.0.path().join("stages/rules")).expect("a folder");
    let folder = folder.file("stages/rules/other.toml", CONTRACT.replace("\"plain\"", "\"other\""));
    let contracts = folder.load().expect("sound").contracts;
    assert_eq!(contracts.keys().collect::<Vec<_>>(), ["other"]);
}

#[test]
fn the_input_is_a_need() {
    let folder = Folder::new().stage(STAGE).file(
        "stages/n.toml",
        "id = \"N\"\ntitle = \"t\"\ncontract = \"plain\"\n[rms_norm]\n\
         input = { stage = \"X\", site = \"embed\" }\nweight = \"output_norm\"\n",
    );
    assert_eq!(folder.load().expect("sound").stages[0].needs, [id("X")]);
}

#[test]
fn file_names_and_their_order_mean_nothing() {
    let stages: Vec<String> =
        ["a", "b", "c"].iter().map(|name| STAGE.replace("\"X\"", &format!("\"{name}\""))).collect();
    let load = |names: [&str; 3]| {
        let folder = names.iter().zip(&stages).fold(Folder::new(), |folder, (name, text)| {
            folder.file(&format!("stages/{name}.toml"), text)
        });
        let mut loaded = folder.load().expect("sound").stages;
        loaded.iter_mut().for_each(|stage| stage.file = "".into());
        loaded
    };
    assert_eq!(load(["1", "2", "3"]), load(["z", "y", "x"]));
}

#[test]
fn a_sixth_manifest_needs_nothing_else() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folder = Folder::new();
    for part in ["stages", "contracts"] {
        for file in fs::read_dir(root.join(part)).expect("shipped").flatten() {
            let text = fs::read(file.path()).expect("shipped");
            folder = folder.file(&format!("{part}/{}", file.file_name().display()), text);
        }
    }
    let folder = folder.file(
        "stages/f-ffn.toml",
        "id = \"F\"\ntitle = \"FFN of layer 3\"\ncontract = \"qkv-matmul\"\n[matmul]\n\
         input = { stage = \"B\", site = \"blk.3.ffn_norm\" }\n\
         weights = [\"blk.3.ffn_gate\", \"blk.3.ffn_up\"]\n",
    );
    let pipeline = folder.load().unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(pipeline.stages.len(), 6);
    assert_eq!(pipeline.stages[5].needs, [id("B")]);
}

#[test]
fn sites_are_matched_by_whole_parts() {
    let falsifier = |metric, sites: Option<&[&str]>| manifest::Falsifier {
        id: "F".into(),
        equation: "e".into(),
        prediction: "p".into(),
        compare: [Stream::Arm(Arm::Device), Stream::Arm(Arm::Emulated)],
        metric,
        sites: sites.map(|list| list.iter().map(|site| (*site).to_owned()).collect()),
        unless_exact: false,
        min: None,
        max: Some(0.0),
        why: "w".into(),
        if_fails: IfFails::Structural,
    };
    let applies = |pattern: &str, site: &str| {
        falsifier(Metric::MaxAbs, Some(&[pattern])).applies_to(&Site(site.into()))
    };
    assert!(applies("blk.*.ffn_down", "blk.17.ffn_down"));
    assert!(applies("blk.1.*", "blk.1.q"));
    assert!(!applies("blk.1.*", "blk.10.q"));
    assert!(!applies("q", "blk.0.q"));
    assert!(!applies("blk.0.q", "blk.0.q_rope"));
    assert!(!applies("blk.*", "blk.0.q"));
    assert!(falsifier(Metric::MaxAbs, None).applies_to(&Site("embed".into())));
    assert!(falsifier(Metric::Kl, None).applies_to(&Site("logits".into())));
    assert!(!falsifier(Metric::Kl, None).applies_to(&Site("embed".into())));
}

#[test]
fn streams_read_as_they_are_written() {
    for stream in Stream::ALL {
        assert_eq!(stream.to_string().parse(), Ok(stream));
    }
    assert!("reference@reference".parse::<Stream>().is_err());
    assert!("Device".parse::<Stream>().is_err());
}

#[test]
fn drawings_of_the_shipped_graph() {
    let stages = shipped().stages;
    let graph = Graph::of(&stages).expect("no cycle");
    let drawn: Vec<String> = [GraphFormat::Text, GraphFormat::Dot, GraphFormat::Mermaid]
        .map(|format| render(&graph, &stages, format))
        .into();
    insta::assert_snapshot!(drawn.join("\n"));
}

#[test]
fn drawings_escape_titles() {
    let mut stages = shipped().stages;
    stages.truncate(1);
    stages[0].title = "say \"hi\" \\ <b>#1;\nnext".into();
    let graph = Graph::of(&stages).expect("no cycle");
    let drawn: Vec<String> = [GraphFormat::Text, GraphFormat::Dot, GraphFormat::Mermaid]
        .map(|format| render(&graph, &stages, format))
        .into();
    insta::assert_snapshot!(drawn.join("\n"));
}

#[test]
fn selections() {
    let stages = shipped().stages;
    let graph = Graph::of(&stages).expect("no cycle");
    let select =
        |expr: &str| select(&graph, &stages, expr).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(select("E"), ids(&["E"]));
    assert_eq!(select("+E"), ids(&["C", "D", "E"]));
    assert_eq!(select("C+"), ids(&["C", "D", "E"]));
    assert_eq!(select("+D+"), ids(&["C", "D", "E"]));
    assert_eq!(select("A, C"), ids(&["A", "C"]));
    assert_eq!(select("tag:cheap"), ids(&["C", "D", "E"]));
    assert_eq!(select("tag:g*m+"), ids(&["E"]));
    assert_eq!(select("*"), ids(&["A", "B", "C", "D", "E"]));
}

#[test]
fn a_selection_of_nothing_is_an_error() {
    let mut stages = shipped().stages;
    stages[4].id = id("qkv");
    let graph = Graph::of(&stages).expect("no cycle");
    let errors: Vec<String> = ["Z", "+qvk", "tag:chaep", "A,,B", "+", "", "x*"]
        .iter()
        .map(|expr| select(&graph, &stages, expr).expect_err(expr).to_string())
        .collect();
    insta::assert_snapshot!(errors.join("\n"));
}

#[test]
fn a_cycle_is_told_by_the_graph_too() {
    let mut stages = shipped().stages;
    stages[2].needs = vec![id("E")];
    let error = Graph::of(&stages).expect_err("a cycle").to_string();
    assert_eq!(
        error,
        "stages need each other: `C` -> `E` -> `D` -> `C`; remove one of these needs"
    );
}

/// Stages `s0`, `s1`, ... with some of the edges that lead to earlier ones.
fn some_stages() -> impl Strategy<Value = Vec<Stage>> {
    let template = shipped().stages.remove(0);
    (1usize..12, proptest::collection::vec((any::<Index>(), any::<Index>()), 0..30)).prop_map(
        move |(count, edges)| {
            let mut stages: Vec<Stage> = (0..count)
                .map(|number| Stage {
                    // Names that do not sort as the edges lead.
                    id: id(&format!("s{}", (number * 7) % count)),
                    ..template.clone()
                })
                .collect();
            for (a, b) in edges {
                let (a, b) = (a.index(count), b.index(count));
                if a != b {
                    let need = stages[a.min(b)].id.clone();
                    stages[a.max(b)].needs.push(need);
                }
            }
            let mut unique: BTreeMap<StageId, Stage> = BTreeMap::new();
            for stage in stages {
                unique.entry(stage.id.clone()).or_insert(stage);
            }
            unique.retain(|own, stage| !stage.needs.contains(own));
            unique.into_values().collect()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_order_is_topological_and_stable(stages in some_stages(), seed in any::<u64>()) {
        let Ok(graph) = Graph::of(&stages) else { return Ok(()) };
        let order = graph.order();
        prop_assert_eq!(order.len(), stages.len());
        let place = |id: &StageId| order.iter().position(|other| other == id);
        for stage in &stages {
            for need in &stage.needs {
                if let Some(earlier) = place(need) {
                    prop_assert!(Some(earlier) < place(&stage.id));
                }
            }
        }
        let mut shuffled = stages.clone();
        let length = shuffled.len();
        let mut state = seed;
        for index in (1..length).rev() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            shuffled.swap(index, (state >> 33) as usize % (index + 1));
        }
        for stage in &mut shuffled {
            stage.needs.reverse();
        }
        prop_assert_eq!(Graph::of(&shuffled).expect("no cycle").order(), order);
    }

    #[test]
    fn selections_obey_their_laws(stages in some_stages(), pick in any::<Index>(), other in any::<Index>()) {
        let Ok(graph) = Graph::of(&stages) else { return Ok(()) };
        if stages.is_empty() { return Ok(()) }
        let id = &stages[pick.index(stages.len())].id;
        let second = &stages[other.index(stages.len())].id;
        let select = |expr: String| select(&graph, &stages, &expr).expect("a known stage");
        let (alone, up, down) = (select(format!("{id}")), select(format!("+{id}")), select(format!("{id}+")));
        prop_assert_eq!(&alone, &BTreeSet::from([id.clone()]));
        prop_assert_eq!(select(format!("+{id}+")), &up | &down);
        prop_assert_eq!(&up & &down, alone);
        prop_assert_eq!(select(format!("+{id},{second}+")), &up | &select(format!("{second}+")));
        // Closed: what is selected with all its needs needs nothing else.
        for chosen in &up {
            prop_assert!(graph.ancestors(chosen).is_subset(&up));
        }
        // Who is above sees who is below.
        prop_assert_eq!(graph.ancestors(id).contains(second), graph.descendants(second).contains(id));
        prop_assert_eq!(select("*".into()).len(), stages.len());
    }

    #[test]
    fn mutilated_manifests_never_panic(
        which in any::<Index>(),
        cuts in proptest::collection::vec((any::<Index>(), 0usize..40, "\\PC{0,8}|[\\[\\]{}=\"'.,\n#*+0-9-]{0,6}"), 1..6),
    ) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut names: Vec<(&str, String)> = Vec::new();
        for part in ["stages", "contracts"] {
            for file in fs::read_dir(root.join(part)).expect("shipped").flatten() {
                names.push((part, file.file_name().display().to_string()));
            }
        }
        names.sort();
        let mut folder = Folder::new();
        for (part, name) in &names {
            let text = fs::read(root.join(part).join(name)).expect("shipped");
            folder = folder.file(&format!("{part}/{name}"), text);
        }
        let (part, name) = &names[which.index(names.len())];
        let mut text = fs::read_to_string(root.join(part).join(name)).expect("shipped");
        for (at, length, insert) in cuts {
            let start = text.floor_char_boundary(at.index(text.len() + 1));
            let end = text.floor_char_boundary((start + length).min(text.len()));
            text.replace_range(start..end.max(start), &insert);
        }
        let folder = folder.file(&format!("{part}/{name}"), &text);
        if let Err(problems) = folder.load() {
            prop_assert!(problems.len() > 0);
            prop_assert!(problems.to_string().contains("problem"));
            problems.render(true);
        }
    }
}

#[test]
fn a_contract_that_ships_needs_no_file_and_a_file_of_its_name_goes_before_it() {
    let folder = Folder::new().stage(&STAGE.replace("plain", "embedding"));
    let own = folder.load().expect("sound").contracts;
    assert_eq!(own.keys().collect::<Vec<_>>(), ["embedding", "plain"]);
    fs::remove_dir_all(folder.0.path().join("contracts")).expect("removed");
    let shipped = folder.load().expect("sound").contracts;
    assert_eq!(shipped.keys().collect::<Vec<_>>(), ["embedding"]);

    let mine = CONTRACT.replace("\"plain\"", "\"embedding\"").replace("1.0.0", "9.8.7");
    let folder = Folder::new().stage(&STAGE.replace("plain", "embedding"));
    let folder = folder.file("contracts/mine.toml", mine);
    assert_eq!(folder.load().expect("sound").contracts["embedding"].version, "9.8.7");

    let folder = Folder::new().stage(&STAGE.replace("plain", "embeding"));
    let problems = folder.load().expect_err("refused").to_string();
    assert!(problems.contains("did you mean `embedding`"), "{problems}");
}
