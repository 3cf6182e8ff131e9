//! What can only be seen with all files on the table: ids used twice,
//! references that lead nowhere, cycles, contracts that do not fit a stage.
//!
//! It knows names, sites and metrics; it computes nothing and opens no file.

use std::collections::{BTreeMap, BTreeSet};

use super::contract::RawContract;
use super::cycle;
use super::family;
use super::problem::{At, Findings, Problem, quoted_list, short, suggest};
use super::stage::{RawInput, RawStage};
use super::{Contract, Falsifier, IfFails, Stage, Unread, sites};
use crate::dtype::Format;
use crate::metric::Metric;
use crate::op::{Arm, LOGITS_IN_BATCH, Op, Stream};
use crate::text::number;

/// The files under check.
pub(super) struct Folder<'a> {
    pub stages: &'a [RawStage],
    pub contracts: &'a [RawContract],
    pub unread_stages: &'a Unread,
    pub unread_contracts: &'a Unread,
}

/// Checks everything between files.
pub(super) fn check(folder: &Folder<'_>, findings: &mut Findings) {
    let stages = index(
        "stages",
        folder.stages.iter().filter_map(|stage| {
            let id = stage.id.as_ref()?;
            Some((id.value.0.as_str(), id.at.as_ref()?, stage))
        }),
        findings,
    );
    let contracts = index(
        "contracts",
        folder.contracts.iter().filter_map(|contract| {
            let name = contract.name.as_ref()?;
            Some((name.value.as_str(), name.at.as_ref()?, contract))
        }),
        findings,
    );
    for stage in folder.stages {
        check_references(stage, &stages, folder.unread_stages, findings);
        check_contract(stage, &contracts, folder.unread_contracts, findings);
    }
    check_cycles(&stages, findings);
}

/// All by name; a name that is used again is a problem.
fn index<'a, T>(
    noun: &str,
    items: impl Iterator<Item = (&'a str, &'a At, &'a T)>,
    findings: &mut Findings,
) -> BTreeMap<&'a str, &'a T> {
    let mut all: BTreeMap<&str, (&At, &T)> = BTreeMap::new();
    for (name, at, item) in items {
        match all.get(name) {
            None => {
                all.insert(name, (at, item));
            }
            Some((first, _)) => findings.push(
                Problem::new(
                    format!("two {noun} are called `{name}`"),
                    "give one of them another name",
                )
                .at(first, "first here")
                .at(at, "again here"),
            ),
        }
    }
    all.into_iter().map(|(name, (_, item))| (name, item)).collect()
}

fn check_references(
    stage: &RawStage,
    stages: &BTreeMap<&str, &RawStage>,
    unread: &Unread,
    findings: &mut Findings,
) {
    let inputs = stage.op.as_ref().map_or(&[][..], |op| &op.inputs);
    let references = stage.needs.iter().chain(inputs.iter().map(|input| &input.stage));
    for reference in references {
        let name = reference.value.0.as_str();
        let at = reference.at.as_ref();
        if stage.id.as_ref().is_some_and(|id| id.value.0 == name) {
            findings.push(
                Problem::new(format!("the stage `{name}` needs itself"), "name another stage")
                    .at_if(at, "its own id"),
            );
        } else if !stages.contains_key(name) && !unread.may_hold(name) {
            let known = stages.keys().copied();
            let members = stages.values().copied();
            let list = family::hint(members, name)
                .unwrap_or_else(|| format!("the stages are {}", quoted_list(known.clone())));
            findings.push(
                Problem::new(
                    format!("there is no stage `{}`", short(name)),
                    suggest(name, known, &list),
                )
                .at_if(at, "unknown stage"),
            );
        }
    }

    for input in inputs {
        check_input(input, stages, findings);
    }
}

/// The stage that an input names must make the site.
fn check_input(input: &RawInput, stages: &BTreeMap<&str, &RawStage>, findings: &mut Findings) {
    let maker = stages.get(input.stage.value.0.as_str()).and_then(|maker| maker.op.as_ref());
    let Some(maker) = maker else { return };
    let made = sites::made_by(&maker.op);
    let site = &input.site.value.0;
    if !made.iter().any(|made| made.includes(site)) {
        let shown: Vec<String> = made.iter().map(|made| made.shown()).collect();
        let list =
            format!("`{}` ({}) makes {}", input.stage.value, maker.op.name(), quoted_list(&shown));
        findings.push(
            Problem::new(
                format!("the stage `{}` makes no site `{}`", input.stage.value, short(site)),
                suggest(site, shown.iter().map(String::as_str), &list),
            )
            .at_if(input.site.at.as_ref(), "not made there"),
        );
    }
}

fn check_cycles(stages: &BTreeMap<&str, &RawStage>, findings: &mut Findings) {
    let references = |stage: &'_ RawStage| -> Vec<(String, Option<At>)> {
        let inputs = stage.op.as_ref().map_or(&[][..], |op| &op.inputs);
        stage
            .needs
            .iter()
            .chain(inputs.iter().map(|input| &input.stage))
            .map(|reference| (reference.value.0.clone(), reference.at.clone()))
            .collect()
    };
    let written: BTreeMap<&str, Vec<(String, Option<At>)>> =
        stages.iter().map(|(name, stage)| (*name, references(stage))).collect();
    // A stage that needs itself is reported where its references are.
    let needs: BTreeMap<&str, BTreeSet<&str>> = written
        .iter()
        .map(|(name, needed)| {
            let others = needed.iter().map(|(other, _)| other.as_str());
            (*name, others.filter(|other| other != name).collect())
        })
        .collect();
    for cycle in cycle::cycles(&needs) {
        let mut problem = Problem::new(
            format!("stages need each other: {}", cycle::text(&cycle)),
            "remove one of these needs: nothing could run first",
        );
        for (index, name) in cycle.iter().enumerate() {
            let next = cycle[(index + 1) % cycle.len()];
            let at = written[name].iter().find(|(other, _)| other == next);
            problem = problem
                .at_if(at.and_then(|(_, at)| at.as_ref()), format!("`{name}` needs `{next}`"));
        }
        findings.push(problem);
    }
}

fn check_contract(
    stage: &RawStage,
    contracts: &BTreeMap<&str, &RawContract>,
    unread: &Unread,
    findings: &mut Findings,
) {
    let Some(name) = &stage.contract else { return };
    let Some(raw) = contracts.get(name.value.as_str()) else {
        if !unread.may_hold(&name.value) {
            let list = match contracts.len() {
                0 => "the folder of contracts has none".to_owned(),
                _ => format!("the contracts are {}", quoted_list(contracts.keys().copied())),
            };
            let shipped = super::SHIPPED_CONTRACTS.iter().map(|(name, _)| *name);
            let known = contracts.keys().copied().chain(shipped);
            findings.push(
                Problem::new(
                    format!("there is no contract `{}`", short(&name.value)),
                    suggest(&name.value, known, &list),
                )
                .at_if(name.at.as_ref(), "unknown contract"),
            );
        }
        return;
    };
    if let (Some(op), Some(contract)) = (&stage.op, &raw.contract) {
        for falsifier in &contract.falsifiers {
            if let Some(problem) = misfit(&op.op, contract, falsifier) {
                findings.push(
                    problem
                        .at_if(name.at.as_ref(), "does not fit this stage")
                        .at(&op.repeats_at, "what the stage computes"),
                );
            }
        }
    }
}

/// What to say of a contract of the project's own kernels beside a recipe of narrow tensors, if so.
/// `stream`, and `engine` with it, rounds what every op writes: a bound of fewer ULP of f32
/// between the emulated arm and the reference is derived for kernels that do not, and the verdict
/// will be what its failure means. It is no problem: what the arm computes may be wanted all the same.
pub(super) fn unfit(stage: &Stage, contract: &Contract) -> Option<String> {
    let stream = stage.recipe.stream?;
    // Half a step of the type, in steps of f32.
    let cost: f64 = match stream {
        Format::Bf16 => 32_768.0,
        Format::F16 => 4_096.0,
        _ => return None,
    };
    if !stage.op.reads_model() || !stage.arms.contains(&Arm::Emulated) {
        return None;
    }
    let made = sites::made_by(&stage.op);
    let (falsifier, most) = contract.falsifiers.iter().find_map(|falsifier| {
        let of_rounding = matches!(falsifier.metric, Metric::MaxUlp | Metric::RowUlp);
        let named = falsifier.sites.as_ref().is_none_or(|patterns| {
            made.iter().any(|made| patterns.iter().any(|pattern| made.meets(pattern)))
        });
        // A few values may lie near their roundings; of a quarter no tensor has all there.
        let most = falsifier.max.filter(|most| 4.0 * most <= cost)?;
        (of_rounding && named && is_of_own_kernels(falsifier)).then_some((falsifier, most))
    })?;
    Some(unfit_words(
        contract,
        falsifier,
        &format!(
            "allows {} ULP of f32, and rounding to {stream} alone costs up to {}",
            number(most),
            number(cost)
        ),
    ))
}

/// Whether a falsifier holds the emulated arm to the reference, whatever is to the bit.
pub(super) fn is_of_own_kernels(falsifier: &Falsifier) -> bool {
    let judged = [Stream::Arm(Arm::Reference), Stream::Anchored(Arm::Emulated)];
    let [subject, judge] = falsifier.compare;
    subject == Stream::Arm(Arm::Emulated) && judged.contains(&judge) && !falsifier.unless_exact
}

/// The same in words: `why` says what the falsifier asks and what the recipe does.
pub(super) fn unfit_words(contract: &Contract, falsifier: &Falsifier, why: &str) -> String {
    let verdict = match falsifier.if_fails {
        IfFails::Structural => "structural",
        IfFails::Drift => "drift",
    };
    format!(
        "the contract `{}` is of the project's own kernels, and this recipe describes an engine \
         (`stream`, `engine`): its falsifier `{}` {why}, so the verdict will be `{verdict}`; write \
         a contract that judges an engine, as `engine`, `exact-engine` or `exact-pass`, with what \
         the engine made in `[recorded]` or `[external]`, or leave `stream` and `engine` out of the \
         recipe, also where they are inherited",
        contract.name, falsifier.id
    )
}

/// Why a falsifier could never be measured on an op, if so.
fn misfit(op: &Op, contract: &Contract, falsifier: &Falsifier) -> Option<Problem> {
    let title = |why: String| {
        format!(
            "the falsifier `{}` of `{}` can never fire here: {why}",
            falsifier.id, contract.name
        )
    };
    let [subject, judge] = falsifier.compare;
    if falsifier.metric.of_commands_only() != op.command().is_some() {
        let (why, help) = match op {
            Op::Command(_) => (
                format!(
                    "`{}` is measured between tensors, and a command makes none",
                    falsifier.metric
                ),
                "judge a command by `exit_status`, `matches` or `digest_mismatch`",
            ),
            _ => (
                format!("`{}` is a command's outcome", falsifier.metric),
                "judge tensors by another metric, or the stage by another contract",
            ),
        };
        return Some(Problem::new(title(why), help));
    }
    let repeated = op.repeats() >= 2 || falsifier.metric.of_batches_only();
    if subject == judge && !repeated && op.command().is_none() {
        let repeats = match op {
            Op::Forward { .. } => "write `repeats = 2` or more",
            _ => "this op is computed once; judge the stage by another contract",
        };
        let why = format!("it compares the repeats of `{subject}`, and there are none");
        return Some(Problem::new(title(why), repeats));
    }
    let anchored = matches!(judge, Stream::Anchored(_) | Stream::Predicted(_));
    if anchored && matches!(op, Op::Forward { capture, .. } if capture.is_of_logits()) {
        return Some(Problem::new(
            title(format!("`{judge}` needs the input of every op")),
            "write `capture = \"every-site\"`",
        ));
    }
    let made = sites::made_by(op);
    let fires = made.iter().any(|made| {
        let of_metric = match falsifier.metric {
            Metric::ExitStatus => made.includes("exit"),
            Metric::Matches => made.starts_with("match."),
            Metric::DigestMismatch => made.starts_with("output."),
            metric if metric.of_batches_only() => made.includes(LOGITS_IN_BATCH),
            _ => true,
        };
        let logits = made.includes("logits");
        let named = match &falsifier.sites {
            None => true,
            Some(patterns) => patterns.iter().any(|pattern| made.meets(pattern)),
        };
        of_metric && named && (logits || !falsifier.metric.of_logits_only())
    });
    if fires {
        return None;
    }
    let shown = made.iter().map(sites::Made::shown);
    let asked = match &falsifier.sites {
        None if falsifier.metric.of_commands_only() => format!("`{}`", falsifier.metric),
        Some(patterns) if !falsifier.metric.of_logits_only() => quoted_list(patterns),
        _ => "`logits`".to_owned(),
    };
    Some(Problem::new(
        title(format!("it judges {asked}")),
        format!(
            "the stage makes {}; choose a contract for these, or move the falsifier to another",
            quoted_list(shown)
        ),
    ))
}
