//! `runner history`: past runs, how each stage moved, and which machine differs.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{PASS, PastFormat, print};
use crate::manifest::problem::plural;
use crate::nightly::past::finished_in;
use crate::op::{Arm, Site, StageId};
use crate::record::{RunRecord, Series, StageRecord};
use crate::terminal::tell_line;
use crate::text::{Shown, number, one_line, shown};

#[derive(Args)]
#[command(after_help = "Examples:
  runner history                     the last ten runs
  runner history B E --last 30
  runner history --machines          the last run of each machine, and who has other bits
  runner history --runs nodes        the runs of all machines whose folders of runs lie below")]
pub(super) struct HistoryArgs {
    /// Stages to show; all by default.
    stages: Vec<String>,
    /// How many runs to look back.
    #[arg(long, default_value = "10")]
    last: NonZeroUsize,
    /// The runs of this machine only.
    #[arg(long, value_name = "NAME")]
    machine: Option<String>,
    /// Runs of other stages and models too: all that lie in the folder.
    #[arg(long)]
    all: bool,
    /// Hold the machines against each other: the last run of each, and whose bits differ.
    #[arg(long, conflicts_with_all = ["last", "machine", "all"])]
    machines: bool,
    /// What is printed.
    #[arg(long, value_enum, default_value_t = PastFormat::Text)]
    format: PastFormat,
    /// The folder of runs; several times for those of several machines. Of a folder that holds no
    /// run those below it are taken.
    #[arg(long, default_value = "runs")]
    runs: Vec<PathBuf>,
}

impl HistoryArgs {
    /// The folders of runs, as they are named in a message.
    fn folders(&self) -> String {
        let folders: Vec<String> = self.runs.iter().map(|runs| runs.shown().to_string()).collect();
        folders.join("`, `")
    }
}

pub(super) fn history(args: &HistoryArgs) -> Result<u8, String> {
    let (records, left_out) = if args.machines { last_of_each(args)? } else { last(args)? };
    if left_out > 0 {
        let left_out = plural(left_out, "run");
        tell_line(&format!("without {left_out} of other stages or models; `--all` shows all"));
    }
    if records.is_empty() {
        return Err(match &args.machine {
            Some(name) => {
                format!("`{}` holds no finished run of {}", args.folders(), shown(name))
            }
            None => format!("`{}` holds no finished run", args.folders()),
        });
    }
    let known: BTreeSet<&str> =
        records.iter().flat_map(|run| &run.stages).map(|stage| stage.id.0.as_str()).collect();
    if let Some(unknown) = args.stages.iter().find(|id| !known.contains(id.as_str())) {
        let known: Vec<&str> = known.into_iter().collect();
        let unknown = shown(unknown);
        return Err(format!("no run has the stage {unknown}; they have: {}", known.join(", ")));
    }
    let told = match args.machines {
        true => Told::Machines { arms: machines(args, &records) },
        false => Told::Runs { stages: stages(args, &records) },
    };
    print(&match args.format {
        PastFormat::Json => json(&records, &told),
        PastFormat::Text => {
            let told = match &told {
                Told::Machines { arms } => of_machines(arms),
                Told::Runs { stages } => stages.iter().map(Line::text_in(stages)).collect(),
            };
            format!("{}\n{told}", heads(&records))
        }
    })?;
    Ok(PASS)
}

/// What is told of past runs.
#[derive(Serialize)]
#[serde(untagged)]
enum Told<'r> {
    Runs { stages: Vec<Line<'r>> },
    Machines { arms: Vec<ArmOfMachines<'r>> },
}

/// The same for programs.
fn json(records: &[RunRecord], told: &Told<'_>) -> String {
    #[derive(Serialize)]
    struct Head<'r> {
        run: &'r str,
        started: &'r str,
        machine: Option<&'r str>,
        verdict: &'r str,
        stages: usize,
        seconds: f64,
        interrupted: bool,
    }
    #[derive(Serialize)]
    struct Whole<'r> {
        schema: u32,
        runs: Vec<Head<'r>>,
        #[serde(flatten)]
        told: &'r Told<'r>,
    }
    fn head(run: &RunRecord) -> Head<'_> {
        Head {
            run: &run.id,
            started: &run.started,
            machine: run.provenance.machine.as_deref(),
            verdict: run.verdict.name(),
            stages: run.stages.len(),
            seconds: run.seconds,
            interrupted: run.interrupted,
        }
    }
    let whole = Whole { schema: 1, runs: records.iter().map(head).collect(), told };
    // Texts, numbers and truth values are always encoded; what is not finite is null.
    serde_json::to_string_pretty(&whole).unwrap_or_default() + "\n"
}

/// Whether runs are of the same folder of stages and the same models; those of earlier runners do
/// not say.
fn are_kin(one: &Option<Series>, other: &Option<Series>) -> bool {
    one.as_ref().map(Series::kin) == other.as_ref().map(Series::kin)
}

/// The last runs, the oldest first, and how many of others were passed over.
fn last(args: &HistoryArgs) -> Result<(Vec<RunRecord>, usize), String> {
    let mut records: Vec<RunRecord> = Vec::new();
    let (mut left_out, mut series) = (0, None);
    for past in finished_in(&args.runs)?.iter().rev() {
        if records.len() == args.last.get() {
            break;
        }
        let Some(brief) = past.brief() else {
            tell_line(&format!("left out: `{}` cannot be read", past.folder.shown()));
            continue;
        };
        if args.machine.is_some() && brief.machine != args.machine {
            continue;
        }
        if !args.all && !are_kin(series.get_or_insert_with(|| brief.series.clone()), &brief.series)
        {
            left_out += 1;
            continue;
        }
        match RunRecord::read(&past.folder) {
            Ok(record) => records.push(record),
            Err(problem) => tell_line(&format!("left out: {problem}")),
        }
    }
    records.reverse();
    Ok((records, left_out))
}

/// The youngest whole run of each machine, by the machines' names; all of the stages and models of
/// the youngest of all.
fn last_of_each(args: &HistoryArgs) -> Result<(Vec<RunRecord>, usize), String> {
    let mut found: BTreeMap<String, RunRecord> = BTreeMap::new();
    let (mut left_out, mut series) = (0, None);
    for past in finished_in(&args.runs)?.iter().rev() {
        let Some(brief) = past.brief() else { continue };
        let Some(machine) = brief.machine else { continue };
        if brief.interrupted || found.contains_key(&machine) {
            continue;
        }
        if !are_kin(series.get_or_insert_with(|| brief.series.clone()), &brief.series) {
            left_out += 1;
            continue;
        }
        match RunRecord::read(&past.folder) {
            Ok(record) => drop(found.insert(machine, record)),
            Err(problem) => tell_line(&format!("left out: {problem}")),
        }
    }
    Ok((found.into_values().collect(), left_out))
}

/// A line for each run.
fn heads(records: &[RunRecord]) -> String {
    let machine = |run: &RunRecord| run.provenance.machine.clone().unwrap_or("-".to_owned());
    let wide = records.iter().map(|run| run.id.len()).max().unwrap_or(0);
    let named = records.iter().map(|run| machine(run).chars().count()).max().unwrap_or(0);
    let line = |run: &RunRecord| {
        let stopped = if run.interrupted { ", stopped" } else { "" };
        let count = plural(run.stages.len(), "stage");
        let (id, verdict, seconds) = (&run.id, run.verdict.name(), run.seconds);
        let machine = machine(run);
        let text = format!(
            "{id:wide$}  {machine:named$}  {verdict:10}  {count} in {seconds:.2} s{stopped}"
        );
        one_line(&text) + "\n"
    };
    records.iter().map(line).collect()
}

/// A stage over the runs, the oldest first.
#[derive(Serialize)]
struct Line<'r> {
    stage: &'r StageId,
    runs: Vec<Point<'r>>,
}

/// A stage in one run.
#[derive(Serialize)]
struct Point<'r> {
    run: &'r str,
    /// None where the run has no such stage.
    verdict: Option<&'r str>,
    /// What decides it: the value that comes nearest to its bound.
    falsifier: Option<&'r str>,
    metric: Option<&'r str>,
    value: Option<f64>,
}

impl Line<'_> {
    /// As a line of text, below others.
    fn text_in(lines: &[Line<'_>]) -> impl Fn(&Line<'_>) -> String {
        let width = lines.iter().map(|line| line.stage.0.chars().count()).max().unwrap_or(0);
        move |line| {
            let last = line.runs.iter().rposition(|point| point.verdict.is_some());
            let seen = &line.runs[..last.map_or(0, |last| last + 1)];
            let verdicts: Vec<String> =
                seen.iter().map(|point| point.verdict.unwrap_or("-").to_owned()).collect();
            let values: Vec<(f64, &str)> =
                seen.iter().filter_map(|point| Some((point.value?, point.run))).collect();
            let named = seen.iter().rev().find_map(|p| Some((p.metric?, p.falsifier?)));
            let what = named.map_or(String::new(), |(metric, by)| format!("{metric} of {by}"));
            let trend = trend(&values).map_or(String::new(), |trend| format!("{what}: {trend}"));
            let text = format!("{:width$}  {}  {trend}", line.stage.0, runs_of(&verdicts));
            one_line(text.trim_end()) + "\n"
        }
    }
}

/// For each stage its verdicts, oldest first, and how the decisive value moved.
fn stages<'r>(args: &HistoryArgs, records: &'r [RunRecord]) -> Vec<Line<'r>> {
    let asked_for = |id: &StageId| args.stages.is_empty() || args.stages.contains(&id.0);
    let ids: BTreeSet<&StageId> =
        records.iter().flat_map(|run| &run.stages).map(|stage| &stage.id).collect();
    let point = |record: &'r RunRecord, id: &StageId| {
        let stage = record.stages.iter().find(|stage| stage.id == *id);
        let tightest = stage.and_then(|stage| {
            let valued = stage.judgements.iter().filter(|judgement| judgement.value.is_some());
            valued.max_by(|a, b| a.used.unwrap_or(0.0).total_cmp(&b.used.unwrap_or(0.0)))
        });
        Point {
            run: &record.id,
            verdict: stage.map(|stage| stage.verdict.name()),
            falsifier: tightest.map(|judgement| judgement.falsifier.as_str()),
            metric: tightest.map(|judgement| judgement.metric.name()),
            value: tightest.and_then(|judgement| judgement.value),
        }
    };
    let of = |stage: &'r StageId| Line {
        stage,
        runs: records.iter().map(|record| point(record, stage)).collect(),
    };
    ids.into_iter().filter(|id| asked_for(id)).map(of).collect()
}

/// The first value and the last, and the run in which it became what it is.
fn trend(values: &[(f64, &str)]) -> Option<String> {
    let ((first, _), (last, _)) = (values.first()?, values.last()?);
    let moved = values.windows(2).rev().find(|pair| pair[0].0.to_bits() != pair[1].0.to_bits());
    Some(match moved {
        Some([_, (_, run)]) => {
            format!("{} -> {}, moved last in {run}", number(*first), number(*last))
        }
        _ => number(*last),
    })
}

/// `pass x 6, drift, pass`.
fn runs_of(verdicts: &[String]) -> String {
    let mut parts: Vec<(String, usize)> = Vec::new();
    for verdict in verdicts {
        match parts.last_mut() {
            Some((last, count)) if last == verdict => *count += 1,
            _ => parts.push((verdict.clone(), 1)),
        }
    }
    let part = |(verdict, count): &(String, usize)| match count {
        1 => verdict.clone(),
        count => format!("{verdict} x {count}"),
    };
    parts.iter().map(part).collect::<Vec<_>>().join(", ")
}

/// An arm of a stage over the machines that computed it themselves.
#[derive(Serialize)]
struct ArmOfMachines<'r> {
    stage: &'r StageId,
    arm: Arm,
    /// A list for each question that was asked: machines that were asked another one (recipe,
    /// prompt, model or GPU) are not held against each other.
    asked: Vec<Vec<Group<'r>>>,
}

/// Machines with the same bits; the largest group comes first.
#[derive(Serialize)]
struct Group<'r> {
    machines: Vec<&'r str>,
    /// The first site that is another one than the first group's; none in that group itself, or
    /// where the lists of sites differ.
    first: Option<&'r Site>,
}

/// For each stage and arm who has which bits.
fn machines<'r>(args: &HistoryArgs, records: &'r [RunRecord]) -> Vec<ArmOfMachines<'r>> {
    let asked_for = |id: &StageId| args.stages.is_empty() || args.stages.contains(&id.0);
    // What was asked, and what came of it: other questions have other answers.
    let mut arms: BTreeMap<(&StageId, Arm), BTreeMap<String, Vec<Bits<'r>>>> = BTreeMap::new();
    for run in records {
        for stage in run.stages.iter().filter(|stage| asked_for(&stage.id)) {
            for arm in stage.arms.keys() {
                if let Some((asked, bits)) = Bits::of(run, stage, *arm) {
                    let of_arm = arms.entry((&stage.id, *arm)).or_default();
                    of_arm.entry(asked).or_default().push(bits);
                }
            }
        }
    }
    let told = arms.into_iter().map(|((stage, arm), asked)| ArmOfMachines {
        stage,
        arm,
        asked: asked.values().map(|bits| groups(bits)).collect(),
    });
    told.collect()
}

/// The same as lines.
fn of_machines(arms: &[ArmOfMachines<'_>]) -> String {
    let mut lines = String::new();
    let (mut same, mut compared) = (0, 0);
    for ArmOfMachines { stage, arm, asked } in arms {
        let mut line =
            |words: String| lines += &(one_line(&format!("{stage} {arm}: {words}")) + "\n");
        for groups in asked {
            compared +=
                usize::from(groups.iter().map(|group| group.machines.len()).sum::<usize>() > 1);
            match differing(groups) {
                None => same += usize::from(groups.iter().any(|group| group.machines.len() > 1)),
                Some(words) => line(words),
            }
        }
        if asked.len() > 1 {
            let names = |groups: &Vec<Group<'_>>| {
                groups
                    .iter()
                    .flat_map(|group| &group.machines)
                    .copied()
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            let groups: Vec<String> = asked.iter().map(names).collect();
            line(format!(
                "not held against each other, since recipe, prompt, model or GPU differ: {}",
                groups.join(" | ")
            ));
        }
    }
    lines
        + &match compared {
            0 => "no two machines computed the same arm of a stage; `fresh` of a profile has each \
                  compute its own\n"
                .to_owned(),
            1 => format!("{same} of 1 arm that several machines computed has the same bits\n"),
            many => {
                format!("{same} of {many} arms that several machines computed have the same bits\n")
            }
        }
}

/// What an arm made on a machine.
struct Bits<'r> {
    machine: &'r str,
    sites: Vec<(&'r Site, &'r str)>,
}

impl<'r> Bits<'r> {
    /// Nothing where the arm made no tensors, or another machine made them.
    fn of(run: &'r RunRecord, stage: &'r StageRecord, arm: Arm) -> Option<(String, Bits<'r>)> {
        let machine = run.provenance.machine.as_deref()?;
        // What another machine computed says nothing of this one.
        let record = stage.arms.get(&arm).filter(|arm| arm.machine.as_deref() == Some(machine))?;
        let sites: Vec<_> =
            record.sites.iter().map(|record| (&record.site, record.blake3.as_str())).collect();
        let StageRecord { op, tokens, model, recipe, .. } = stage;
        let asked = serde_json::json!([op, tokens, model, recipe, record.gpu]).to_string();
        (!sites.is_empty()).then_some((asked, Bits { machine, sites }))
    }
}

/// The answers by their bits: the largest group first, of equal ones the one that came first.
fn groups<'r>(bits: &[Bits<'r>]) -> Vec<Group<'r>> {
    let mut groups: Vec<Vec<&Bits<'r>>> = Vec::new();
    for one in bits {
        match groups.iter_mut().find(|group| group[0].sites == one.sites) {
            Some(group) => group.push(one),
            None => groups.push(vec![one]),
        }
    }
    // Stable: equal ones stay in their order.
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    let most: Vec<(&Site, &str)> =
        groups.first().map_or(Vec::new(), |group| group[0].sites.clone());
    let told = groups.iter().map(|group| Group {
        machines: group.iter().map(|bits| bits.machine).collect(),
        first: most.iter().zip(&group[0].sites).find(|(a, b)| a != b).map(|(_, (site, _))| *site),
    });
    told.collect()
}

/// Who differs from most, and where first; nothing where all agree.
fn differing(groups: &[Group<'_>]) -> Option<String> {
    let (most, others) = groups.split_first()?;
    let words: Vec<String> = others
        .iter()
        .map(|group| {
            let first = match group.first {
                Some(site) => format!("first {site}"),
                None => "another list of sites".to_owned(),
            };
            let [those, these] = [group, most].map(|group| group.machines.join(", "));
            format!("{those} differs from {these}, {first}")
        })
        .collect();
    (!words.is_empty()).then(|| words.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_that_differs_from_most_is_named_with_its_first_site() {
        let sites = ["embed", "logits"].map(|site| Site(site.to_owned()));
        let of = |machine: &'static str, last: &'static str| Bits {
            machine,
            sites: vec![(&sites[0], "a"), (&sites[1], last)],
        };
        assert_eq!(differing(&groups(&[of("a", "b"), of("b", "b"), of("c", "b")])), None);
        let words = differing(&groups(&[of("a", "x"), of("b", "b"), of("c", "b")]));
        assert_eq!(words.as_deref(), Some("a differs from b, c, first logits"));
    }

    #[test]
    fn a_trend_names_the_run_in_which_the_value_became_what_it_is() {
        let values = [(1.0, "one"), (2.0, "two"), (2.0, "three")];
        assert_eq!(trend(&values).as_deref(), Some("1 -> 2, moved last in two"));
        assert_eq!(trend(&values[1..]).as_deref(), Some("2"));
        assert_eq!(trend(&[]), None);
    }
}
