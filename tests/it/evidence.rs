//! What a claim about a chip rests on is data, and every row keeps to what it says of itself.

use std::path::Path;

use runner::chip::{CHIPS, ChipName, Evidence};
use runner::op::Arm;
use runner::record::RunRecord;

use crate::command::Project;

/// The shipped stages with a line of the recipe and of a contract changed.
fn project(chip: &str, evidence: &str) -> Project {
    let project = Project::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["stages", "contracts"] {
        for entry in std::fs::read_dir(root.join(folder)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).expect("readable");
            let text = text.replace("chip       = \"auto\"", &format!("chip       = \"{chip}\""));
            let text = match folder {
                "contracts" => format!("{evidence}\n{text}"),
                _ => text,
            };
            project.write(&format!("{folder}/{name}"), &text);
        }
    }
    project
}

fn record(project: &Project) -> RunRecord {
    let runs = std::fs::read_dir(project.path("runs")).expect("a folder of runs");
    let runs = runs.map(|entry| entry.expect("an entry").path());
    let mut runs: Vec<_> = runs.filter(|path| path.join("run.json").exists()).collect();
    runs.sort();
    RunRecord::read(runs.last().expect("a run")).expect("it can be read")
}

#[test]
fn a_verdict_says_where_no_chip_of_the_kind_was_seen_to_do_it() {
    for (chip, evidence, words) in [
        ("hopper", Evidence::Replayed, None),
        ("blackwell", Evidence::Assumed, Some("; what this chip computes is assumed: ")),
    ] {
        let project = project(chip, "");
        project.runner(&["run", "stages", "--select", "C,D,E", "--arms", "reference,emulated"]);
        let record = record(&project);
        for stage in &record.stages {
            let basis = stage.arms[&Arm::Emulated].basis.as_ref();
            // An embedding and a norm have no product.
            assert_eq!(basis.is_some(), stage.id.0 == "E", "{chip}, {}", stage.id);
            let said = basis.and(words).is_none_or(|words| stage.why.contains(words));
            assert!(said, "{chip}, {}: {}", stage.id, stage.why);
            if words.is_none() {
                assert!(!stage.why.contains("what this chip computes"), "{}", stage.why);
            }
        }
        let stage = record.stages.iter().find(|stage| stage.id.0 == "E").expect("E");
        let basis = stage.arms[&Arm::Emulated].basis.as_ref().expect("a basis");
        assert_eq!(basis.evidence, evidence, "{chip}");
        project.runner(&["explain", "E"]).expect(0, &format!("    {evidence}: {}", basis.source));
    }
}

#[test]
fn a_contract_that_asks_for_more_than_there_is_leaves_its_claims_unmeasured() {
    let run = |chip: &str, evidence: &str| {
        let project = project(chip, evidence);
        project.runner(&["run", "stages", "--select", "E", "--arms", "reference,emulated"]);
        let record = record(&project);
        let stage = record.stages.into_iter().find(|stage| stage.id.0 == "E").expect("E");
        (stage.verdict.name().to_owned(), stage.why)
    };
    let free = run("blackwell", "").0;
    for enough in ["evidence = \"assumed\"", "evidence = \"published\""] {
        let (verdict, why) = run("blackwell", enough);
        let asked = enough.contains("published");
        assert_eq!(why.contains("and the contract asks for `evidence = "), asked, "{why}");
        assert_eq!(verdict == free, !asked, "{enough}: {verdict}: {why}");
        assert_eq!(verdict == "unmeasured", asked, "{enough}: {verdict}: {why}");
    }
    assert_eq!(run("hopper", "evidence = \"replayed\"").0, run("hopper", "").0);
    let refused = project("hopper", "evidence = \"hearsay\"");
    refused.runner(&["check", "stages"]).expect(2, "evidence");
}

#[test]
fn rows_that_rest_on_vectors_or_receipts_are_held_to_some() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shipped = Project::new().runner(&["chip", "verify"]).expect(0, "").out;
    for chip in &CHIPS {
        for unit in chip.units {
            for (instruction, basis) in unit.instructions {
                if basis.evidence == Evidence::Vectors {
                    let seen = chip.products.iter().any(|product| {
                        let word = product.trim_start_matches("RTX 4090");
                        shipped.contains(if word.is_empty() { "Ada" } else { word })
                    });
                    assert!(seen, "{}, {instruction}: {shipped}", chip.name);
                }
                if basis.evidence == Evidence::Replayed {
                    assert_eq!(chip.name, ChipName::Hopper, "receipts are of an H200");
                    assert!(root.join("runs/receipts/h200-qwen2-tiny-bf16.json").exists());
                }
            }
            // A product is known no better than the instructions that it is made of.
            let least = unit.instructions.iter().map(|(_, basis)| basis.evidence).min();
            assert!(Some(unit.chained.evidence) >= least, "{}", chip.name);
        }
    }
    let list = Project::new().runner(&["chip", "list"]).expect(0, "").out;
    for name in ChipName::ALL.into_iter().filter(|name| *name != ChipName::Auto) {
        assert!(list.lines().any(|line| line.starts_with(name.name())), "{name}: {list}");
    }
}
