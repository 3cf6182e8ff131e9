//! The shipped stages with an arm that was broken on purpose: the right stage
//! ends `structural`, at the right site, and the others do not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use runner::cache::{Stamps, Store};
use runner::compute::arms::{Shipped, Workshop};
use runner::compute::call::Call;
use runner::compute::{ComputeError, Pass};
use runner::event::{Event, Sink};
use runner::executor::{Attempts, Processes, Slots};
use runner::graph::Graph;
use runner::manifest::{Overrides, load};
use runner::model::{Rope, Weight};
use runner::op::{Arm, Recipe, Site};
use runner::plan::Plan;
use runner::record::{Provenance, RunRecord, SCHEMA, StageRecord};
use runner::run::{Options, run};
use runner::tensor::Tensor;
use runner::verdict::Verdict;

use crate::records::unknown_places;

/// What is wrong with the emulated arm.
#[derive(Clone, Copy)]
enum Fault {
    /// Nothing: the control.
    None,
    /// One row of this weight reads as zeros.
    ZeroedRow(&'static str),
    /// One byte of this weight has a flipped bit, in its first block.
    FlippedBit(&'static str),
    /// The epsilon of every norm is ten times as large.
    Epsilon,
    /// The epsilon of the norm with this gain is ten times as large.
    EpsilonOf(&'static str),
    /// The base of RoPE's frequencies is another.
    RopeBase,
}

/// The shipped arms, with a fault in the emulated one.
struct Faulty(Fault);

impl Workshop for Faulty {
    fn name(&self, _: Arm) -> String {
        "faulty".to_owned()
    }

    fn ops(&self, arm: Arm, recipe: &Recipe) -> Result<(Box<dyn Pass>, String), ComputeError> {
        let (ops, arithmetic) = Shipped::default().ops(arm, recipe)?;
        match arm {
            Arm::Emulated => Ok((Box::new(FaultyOps { ops, fault: self.0 }), arithmetic)),
            _ => Ok((ops, arithmetic)),
        }
    }

    fn unavailable(&self, arm: Arm, _: &Recipe) -> Option<String> {
        (arm == Arm::Device).then(|| "this test has no device".to_owned())
    }
}

struct FaultyOps {
    ops: Box<dyn Pass>,
    fault: Fault,
}

impl FaultyOps {
    /// Does `work` with the weight, or with what the fault makes of it.
    fn with<T>(
        &self,
        weight: Weight<'_>,
        work: impl FnOnce(Weight<'_>) -> Result<T, ComputeError>,
    ) -> Result<T, ComputeError> {
        let mut bytes = weight.bytes().to_vec();
        match self.fault {
            Fault::ZeroedRow(name) if name == weight.name() => {
                let row = weight.kind().row_bytes(weight.width());
                bytes[..row].fill(0);
            }
            Fault::FlippedBit(name) if name == weight.name() => bytes[1] ^= 0x08,
            _ => return work(weight),
        }
        let kind = weight.kind();
        work(Weight::new(weight.name(), kind, weight.rows(), weight.width(), &bytes)?)
    }
}

impl Pass for FaultyOps {
    fn answer(&self, site: &Site, call: &Call<'_>) -> Result<Tensor, ComputeError> {
        let answer = |call: &Call<'_>| self.ops.answer(site, call);
        match *call {
            Call::Embed { weight, tokens } => {
                self.with(weight, |weight| answer(&Call::Embed { weight, tokens }))
            }
            Call::Matmul { x, weight, bias } => {
                self.with(weight, |weight| answer(&Call::Matmul { x, weight, bias }))
            }
            Call::RmsNorm { x, gain, eps } => {
                let wrong = match self.fault {
                    Fault::Epsilon => true,
                    Fault::EpsilonOf(name) => name == gain.name(),
                    _ => false,
                };
                answer(&Call::RmsNorm { x, gain, eps: if wrong { 10.0 * eps } else { eps } })
            }
            Call::Rope { x, rope, head_dim, first_position }
                if matches!(self.fault, Fault::RopeBase) =>
            {
                let rope = &Rope { theta: rope.theta * 1.01, ..rope.clone() };
                answer(&Call::Rope { x, rope, head_dim, first_position })
            }
            _ => answer(call),
        }
    }
}

/// Nobody looks.
struct Dark;

impl Sink for Dark {
    fn event(&mut self, _: &Event) {}
}

/// Every shipped stage's verdict and reason under a fault.
fn verdicts(fault: Fault, model: &str) -> BTreeMap<String, (Verdict, String)> {
    let stages = judged(fault, model).into_iter().map(|stage| {
        println!("{}: {}: {}", stage.id, stage.verdict, stage.why);
        (stage.id.0, (stage.verdict, stage.why))
    });
    stages.collect()
}

/// Every shipped stage under a fault.
fn judged(fault: Fault, model: &str) -> Vec<StageRecord> {
    let place = tempfile::tempdir().expect("a temporary folder");
    let stages = Path::new(env!("CARGO_MANIFEST_DIR")).join("stages");
    let overrides = Overrides { model: Some(model.to_owned()), ..Overrides::default() };
    let pipeline = load(&stages, &overrides).unwrap_or_else(|problems| panic!("{problems}"));
    let graph = Graph::of(&pipeline.stages).expect("no cycle");
    let store = Store::new(place.path());
    let (attempts, _) = Attempts::open(&store.attempts(), "test").expect("a folder");
    let all = graph.order().into_iter().collect();
    let stamps = Stamps::forgetful();
    let Ok(plan) = Plan::new(&pipeline, &graph, &all, &store, &stamps) else { panic!("no plan") };
    let options = Options {
        run: "test".to_owned(),
        created: "2026-11-24T00:00:00Z".to_owned(),
        jobs: 2,
        require: BTreeSet::new(),
        workshop: &Faulty(fault),
        fail_fast: false,
        slots: &Slots::here(),
        processes: &Processes::of_this_program(),
        attempts: &attempts,
        memory: None,
    };
    let finished = run(&plan, &store, &options, &mut Dark);
    assert_eq!(finished.bug, None);
    finished.stages
}

const QWEN2: &str = "synthetic:qwen2-tiny";

/// Holds a fault to the stages that it must turn `structural`, each at the given
/// site, and to those that it must not touch.
fn assert_found(fault: Fault, model: &str, structural: &[(&str, &str)], pass: &[&str]) {
    let found = verdicts(fault, model);
    for (stage, site) in structural {
        let (verdict, why) = &found[*stage];
        assert_eq!(*verdict, Verdict::Structural, "{stage}: {why}");
        assert!(why.contains(&format!("at {site}:")), "{stage} should name `{site}`: {why}");
    }
    for stage in pass {
        let (verdict, why) = &found[*stage];
        assert_eq!(*verdict, Verdict::Pass, "{stage}: {why}");
    }
}

#[test]
fn arms_without_a_fault_pass_on_every_architecture() {
    for model in [QWEN2, "synthetic:llama-tiny", "synthetic:qwen3-tiny"] {
        assert_found(Fault::None, model, &[], &["A", "B", "C", "D", "E"]);
    }
}

#[test]
fn a_broken_weight_is_found_where_it_is_read() {
    let row = |weight| Fault::ZeroedRow(weight);
    let (b, c, d, e) = ("B", "C", "D", "E");
    let k = [(b, "blk.0.k"), (e, "blk.0.k")];
    assert_found(row("blk.0.attn_k.weight"), QWEN2, &k, &[c, d]);
    let down = [(b, "blk.2.ffn_down")];
    assert_found(row("blk.2.ffn_down.weight"), QWEN2, &down, &[c, d, e]);
    let output = [(b, "logits")];
    assert_found(row("output.weight"), QWEN2, &output, &[c, d, e]);
}

#[test]
fn one_flipped_bit_of_one_block_is_found() {
    let fault = Fault::FlippedBit("blk.0.attn_q.weight");
    assert_found(fault, QWEN2, &[("B", "blk.0.q"), ("E", "blk.0.q")], &["C", "D"]);
}

#[test]
fn a_broken_epsilon_is_found_at_the_first_norm() {
    let first = "blk.0.attn_norm";
    assert_found(Fault::Epsilon, QWEN2, &[("B", first), ("D", first)], &["C", "E"]);
    let later = Fault::EpsilonOf("blk.2.ffn_norm.weight");
    assert_found(later, QWEN2, &[("B", "blk.2.ffn_norm")], &["C", "D", "E"]);
}

#[test]
fn a_broken_rope_base_is_found_at_the_first_rotation() {
    assert_found(Fault::RopeBase, QWEN2, &[("B", "blk.0.q_rope")], &["C", "D", "E"]);
}

/// Leaves the record of a run with a planted bug where the browser's tests look
/// for it: `target/tmp/planted/run.json`.
#[test]
fn a_planted_bug_stands_in_a_record_for_the_browser() {
    let stages = judged(Fault::ZeroedRow("blk.2.ffn_down.weight"), QWEN2);
    let verdict = Verdict::of_run(stages.iter().map(|stage| stage.verdict));
    assert_eq!(verdict, Verdict::Structural);
    let record = RunRecord {
        schema: SCHEMA,
        id: "planted".to_owned(),
        verdict,
        exit_code: verdict.exit_code(),
        interrupted: false,
        started: "2026-11-24T00:00:00Z".to_owned(),
        seconds: stages.iter().map(|stage| stage.seconds).sum(),
        families: Vec::new(),
        folder: "stages".to_owned(),
        provenance: Provenance {
            runner: env!("CARGO_PKG_VERSION").to_owned(),
            command: ["cargo", "test", "a_planted_bug"].map(str::to_owned).into(),
            platform: "the test's".to_owned(),
            cpu: None,
            threads: 2,
            machine: Some("node07".to_owned()),
        },
        series: Some(runner::record::Series {
            folder: "../stages".to_owned(),
            models: vec!["synthetic:qwen2-tiny".to_owned()],
            selection: Some("B".to_owned()),
        }),
        cache: None,
        stages,
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted");
    std::fs::create_dir_all(&folder).expect("a folder");
    let places = unknown_places(&serde_json::to_value(&record).expect("a record is JSON"));
    assert_eq!(places, BTreeSet::new(), "docs/run.schema.json describes a diagnosis");
    let json = serde_json::to_string(&record).expect("a record is JSON");
    std::fs::write(folder.join("run.json"), json).expect("it can be written");
    assert_eq!(RunRecord::read(&folder).expect("it can be read"), record);
}

#[test]
fn logits_that_depend_on_their_batch_are_named_in_whichever_arm() {
    let project = crate::single::project();
    let shipped = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("stages");
    let stages = shipped.to_str().expect("a path");
    let asked = ["falsify", stages, "--models", "synthetic:qwen2-tiny", "--recipes", "bf16"];
    let asked = [&asked[..], &["--select", "A", "--bugs", "longer batch"]].concat();
    project.runner(&asked).expect(0, "batch-dependence above batch-dependence 2");
}
