//! `runner history`: past runs, how each stage moved, and which machine differs.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::{PASS, print};
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
    let mut text = heads(&records);
    text.push('\n');
    text += &if args.machines { machines(args, &records) } else { stages(args, &records) };
    print(&text)?;
    Ok(PASS)
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

/// A stage over the runs: its verdicts, and the values of what decides it, each with its run.
#[derive(Default)]
struct Line<'r> {
    verdicts: Vec<String>,
    values: Vec<(f64, &'r str)>,
    what: String,
}

/// One line per stage: its verdicts, oldest first, and how the decisive value moved.
fn stages(args: &HistoryArgs, records: &[RunRecord]) -> String {
    let asked_for = |id: &StageId| args.stages.is_empty() || args.stages.contains(&id.0);
    let mut lines: BTreeMap<&StageId, Line<'_>> = BTreeMap::new();
    for (index, record) in records.iter().enumerate() {
        for stage in record.stages.iter().filter(|stage| asked_for(&stage.id)) {
            let line = lines.entry(&stage.id).or_default();
            line.verdicts.resize(index, "-".to_owned());
            line.verdicts.push(stage.verdict.to_string());
            let tightest = stage
                .judgements
                .iter()
                .filter(|judgement| judgement.value.is_some())
                .max_by(|a, b| a.used.unwrap_or(0.0).total_cmp(&b.used.unwrap_or(0.0)));
            if let Some(judgement) = tightest {
                line.values.extend(judgement.value.map(|value| (value, record.id.as_str())));
                line.what = format!("{} of {}", judgement.metric, judgement.falsifier);
            }
        }
    }
    let width = lines.keys().map(|id| id.0.chars().count()).max().unwrap_or(0);
    let line = |(id, line): (&&StageId, &Line<'_>)| {
        let trend =
            trend(&line.values).map_or(String::new(), |trend| format!("{}: {trend}", line.what));
        let text = format!("{:width$}  {}  {trend}", id.0, runs_of(&line.verdicts));
        one_line(text.trim_end()) + "\n"
    };
    lines.iter().map(line).collect()
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

/// For each stage and arm whether all machines have the same bits, and who has others.
fn machines(args: &HistoryArgs, records: &[RunRecord]) -> String {
    let asked_for = |id: &StageId| args.stages.is_empty() || args.stages.contains(&id.0);
    // What was asked, and what came of it: other questions have other answers.
    let mut arms: BTreeMap<(&StageId, Arm), BTreeMap<String, Vec<Bits<'_>>>> = BTreeMap::new();
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
    let mut lines = String::new();
    let (mut same, mut compared) = (0, 0);
    for ((stage, arm), asked) in &arms {
        let mut line =
            |words: String| lines += &(one_line(&format!("{stage} {arm}: {words}")) + "\n");
        for bits in asked.values() {
            compared += usize::from(bits.len() > 1);
            match differing(bits) {
                None => same += usize::from(bits.len() > 1),
                Some(words) => line(words),
            }
        }
        if asked.len() > 1 {
            let names = |bits: &Vec<Bits<'_>>| names(&bits.iter().collect::<Vec<_>>());
            let groups: Vec<String> = asked.values().map(names).collect();
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

/// The machines of some answers.
fn names(group: &[&Bits<'_>]) -> String {
    group.iter().map(|bits| bits.machine).collect::<Vec<_>>().join(", ")
}

/// Who differs from most, and where first; nothing where all agree.
fn differing(bits: &[Bits<'_>]) -> Option<String> {
    let mut groups: Vec<Vec<&Bits<'_>>> = Vec::new();
    for one in bits {
        match groups.iter_mut().find(|group| group[0].sites == one.sites) {
            Some(group) => group.push(one),
            None => groups.push(vec![one]),
        }
    }
    // The largest group; of equal ones the first.
    let largest = groups.iter().map(Vec::len).max()?;
    let most = groups.iter().position(|group| group.len() == largest)?;
    let others = groups.iter().enumerate().filter(|(at, _)| *at != most);
    let words: Vec<String> = others
        .map(|(_, group)| {
            let first = groups[most][0]
                .sites
                .iter()
                .zip(&group[0].sites)
                .find(|(a, b)| a != b)
                .map_or("another list of sites".to_owned(), |(_, (site, _))| {
                    format!("first {site}")
                });
            format!("{} differs from {}, {first}", names(group), names(&groups[most]))
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
        assert_eq!(differing(&[of("a", "b"), of("b", "b"), of("c", "b")]), None);
        let words = differing(&[of("a", "x"), of("b", "b"), of("c", "b")]);
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
