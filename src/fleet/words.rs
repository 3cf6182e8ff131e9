//! A fleet's report in words: the line of a message, and the text for a terminal.

use std::collections::{BTreeMap, BTreeSet};

use super::causes::{Cause, Fact};
use super::trends::{Kind, Trend};
use super::{Finding, Missing, Night, Report, Unsteady};
use crate::manifest::problem::plural;
use crate::op::Arm;
use crate::text::{number, one_line, share};
use crate::verdict::Verdict;

/// So many names are listed; of more their number is told.
const MOST_NAMES: usize = 8;
/// So many files that were left out are listed.
const MOST_FILES: usize = 10;
/// So many trends are listed.
const MOST_TRENDS: usize = 20;

/// Names in a row; of many the first, and how many more.
pub fn names<T: AsRef<str>>(all: &[T]) -> String {
    let shown: Vec<&str> = all.iter().take(MOST_NAMES).map(AsRef::as_ref).collect();
    match all.len().saturating_sub(MOST_NAMES) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// One line for people.
pub fn line(report: &Report) -> String {
    let mut parts =
        vec![format!("fleet of {}: {}", plural(report.machines.len(), "machine"), report.verdict)];
    let differing: BTreeSet<&str> = report.findings.iter().flat_map(machines_of).collect();
    if !differing.is_empty() {
        let differing: Vec<&str> = differing.into_iter().collect();
        let new = report.findings.iter().filter(|finding| finding.new).count();
        let new = if new > 0 { format!(", {new} new") } else { String::new() };
        parts.push(format!(
            "{} {} ({}{new})",
            plural(differing.len(), "machine"),
            if differing.len() == 1 { "differs" } else { "differ" },
            plural(report.findings.len(), "finding"),
        ));
        if let Some(first) = report.findings.first() {
            parts.push(brief(first));
        }
    } else if report.machines.len() > 1 {
        parts.push("no machine differs".to_owned());
    }
    if !report.failing.is_empty() {
        let stages: Vec<&str> = report.failing.iter().map(|f| f.stage.as_str()).collect();
        parts.push(format!("on most machines no pass: {}", names(&stages)));
    }
    if !report.unsteady.is_empty() {
        let whom: Vec<&str> = report.unsteady.iter().map(|u| u.machine.as_str()).collect();
        parts.push(format!("other bits of the same key on {}", names(&whom)));
    }
    if !report.missing.is_empty() {
        let whom: Vec<&str> = report.missing.iter().map(|m| m.machine.as_str()).collect();
        parts.push(format!("no report of {}", names(&whom)));
    }
    if !report.left_out.is_empty() {
        parts.push(format!("{} left out", plural(report.left_out.len(), "file")));
    }
    one_line(&parts.join("; "))
}

fn machines_of(finding: &Finding) -> impl Iterator<Item = &str> {
    finding.machines.iter().map(|since| since.machine.as_str())
}

/// A finding in a line.
pub fn brief(finding: &Finding) -> String {
    let whom: Vec<&str> = machines_of(finding).collect();
    let mut what: Vec<String> = verdicts(finding).into_iter().map(|(words, _)| words).collect();
    what.extend(arms(finding).into_iter().map(|(words, _)| words));
    what.extend(bits(finding).into_iter().map(|(words, _)| words));
    let cause = finding.causes.first().map_or(String::new(), |cause| {
        format!("; {}{}", if cause.weak { "perhaps " } else { "" }, facts(cause))
    });
    one_line(&format!("{} since {}: {}{cause}", names(&whom), finding.since, what.join(" and ")))
}

/// What verdicts are others, in words, with the stages.
pub fn verdicts(finding: &Finding) -> Vec<(String, Vec<&str>)> {
    let mut all: BTreeMap<(Verdict, Verdict), Vec<&str>> = BTreeMap::new();
    for other in &finding.verdicts {
        all.entry((other.verdict, other.instead_of)).or_default().push(&other.stage);
    }
    all.into_iter()
        .map(|((verdict, instead_of), stages)| {
            (format!("{verdict} instead of {instead_of} in {}", names(&stages)), stages)
        })
        .collect()
}

/// What arms have a result or none, in words, with the stages.
pub fn arms(finding: &Finding) -> Vec<(String, Vec<&str>)> {
    let mut all: BTreeMap<(Arm, Option<&str>), Vec<&str>> = BTreeMap::new();
    for other in &finding.arms {
        all.entry((other.arm, other.why.as_deref())).or_default().push(&other.stage);
    }
    all.into_iter()
        .map(|((arm, why), stages)| {
            let names = names(&stages);
            let words = match why {
                Some(why) => format!("no result of {arm} in {names}: {why}"),
                None => format!("a result of {arm} in {names}, where most have none"),
            };
            (words, stages)
        })
        .collect()
}

/// What bits are others, in words, with the stages.
pub fn bits(finding: &Finding) -> Vec<(String, Vec<&str>)> {
    let mut all: BTreeMap<Arm, (Vec<&str>, Option<&str>)> = BTreeMap::new();
    for other in &finding.bits {
        let entry = all.entry(other.arm).or_default();
        entry.0.push(&other.stage);
        entry.1 = entry.1.or(other.first.as_deref());
    }
    all.into_iter()
        .map(|(arm, (stages, first))| {
            let first = first.map_or(String::new(), |site| format!(", first at {site}"));
            (format!("other bits of {arm} in {}{first}", names(&stages)), stages)
        })
        .collect()
}

fn listed(values: &[String]) -> String {
    match values {
        [] => "nothing".to_owned(),
        [one] => one.clone(),
        [many @ .., last] if many.len() < 3 => format!("{} or {last}", many.join(", ")),
        many => format!("{} or {} others", many[..2].join(", "), many.len() - 2),
    }
}

fn fact(fact: &Fact) -> String {
    format!("{} {}", fact.name, listed(&fact.values))
}

/// The facts of a cause.
pub fn facts(cause: &Cause) -> String {
    cause.facts.iter().map(fact).collect::<Vec<_>>().join(" and ")
}

/// The facts of a cause, with what the others have.
pub fn facts_beside(cause: &Cause) -> String {
    let beside = |one: &Fact| format!("{} (others: {})", fact(one), listed(&one.instead_of));
    cause.facts.iter().map(beside).collect::<Vec<_>>().join(" and ")
}

/// On what a cause rests.
pub fn ground(cause: &Cause) -> String {
    let mut parts = vec![match (cause.weak, cause.of, cause.others) {
        (true, 1, 1) => {
            "one machine against one: whatever differs between them fits, so this shows nothing"
                .to_owned()
        }
        (true, 1, others) => {
            format!("one machine against {others}: any fact of its own would fit as well")
        }
        (true, of, _) => {
            format!("{of} machines against one: any fact of that one would fit as well")
        }
        (false, of, others) => format!("all {of} that differ have it, none of the {others} others"),
    }];
    if cause.known_before > 0 {
        let (came, known) = (cause.came_with_it, cause.known_before);
        parts.push(match came {
            0 => format!("it was there before the difference began ({known} of {known})"),
            came => {
                format!("it came on the night on which the difference began on {came} of {known}")
            }
        });
    }
    parts.join("; ")
}

/// A cause that came nearest, with its counts.
pub fn near(cause: &Cause) -> String {
    format!(
        "nothing separates them; nearest is {}: {} of {} that differ have it, and {} of {} others",
        facts(cause),
        cause.with,
        cause.of,
        cause.others_with,
        cause.others
    )
}

/// When each machine began, where they did not begin together.
pub fn began(finding: &Finding) -> String {
    let mut nights: BTreeMap<Night, Vec<&str>> = BTreeMap::new();
    for since in &finding.machines {
        nights.entry(since.since).or_default().push(&since.machine);
    }
    if nights.len() == 1 {
        return finding.since.to_string();
    }
    let night = |(night, whom): (Night, Vec<&str>)| format!("{night} ({})", names(&whom));
    nights.into_iter().map(night).collect::<Vec<_>>().join(", ")
}

/// How a machine was missed.
pub fn missed(missing: &Missing) -> String {
    match (&missing.last, &missing.due, missing.every_hours) {
        (Some(last), Some(due), Some(hours)) => format!(
            "last on {last}; it reports every {} h, so one was due on {due}",
            number(hours.round())
        ),
        (Some(last), ..) => format!("last on {last}"),
        (None, ..) => "it is expected, and there is no run of it".to_owned(),
    }
}

/// What an unsteady arm did.
pub fn unsteady(unsteady: &Unsteady) -> String {
    let Unsteady { machine, arm, stages, times, first, last } = unsteady;
    let nights = if first == last { format!("on {first}") } else { format!("{first} to {last}") };
    format!(
        "{machine} {arm}: other bits of the same key in {} ({}, {nights}): it is not deterministic, \
         or the hardware fails",
        names(stages),
        match times {
            1 => "once".to_owned(),
            times => format!("{times} times"),
        }
    )
}

/// How a value moved.
pub fn trend(trend: &Trend) -> String {
    let Trend { chip, stage, falsifier, metric, first, last, since, used, .. } = trend;
    let how = match trend.kind {
        Kind::Flat => "does not move".to_owned(),
        Kind::Step => format!("step on {since}"),
        Kind::Drift => format!("drifts since {since}"),
        Kind::Unsteady => format!("up and down since {since}"),
    };
    let (first, last) = (number(*first), number(*last));
    let used = share(*used);
    format!(
        "{chip}: {metric} of {falsifier} in {stage} {first} -> {last}, {how}; {used} of its bound"
    )
}

/// The report for a terminal.
pub fn text(report: &Report) -> String {
    let mut text = Text(String::new());
    text.line(0, &report.line);
    let nights = match (report.nights.first(), report.nights.last()) {
        (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
        (Some(first), _) => first.to_string(),
        _ => "no night".to_owned(),
    };
    let stages = plural(report.stages.len(), "stage");
    text.line(0, &format!("{} of {stages}, {nights}", plural(report.runs, "run")));
    for finding in &report.findings {
        text.finding(finding);
    }
    text.part("no pass on most machines", &report.failing, |failing| {
        let super::Failing { stage, verdict, machines, of, why } = failing;
        format!("{stage}  {verdict} on {machines} of {of}: {why}")
    });
    text.part("not steady", &report.unsteady, unsteady);
    let moved: Vec<&Trend> = report.trends.iter().filter(|t| t.kind != Kind::Flat).collect();
    let shown = &moved[..moved.len().min(MOST_TRENDS)];
    text.part("values that move", shown, |moved| trend(moved));
    text.more(moved.len(), shown.len());
    text.part("no report", &report.missing, |missing| {
        format!("{}  {}", missing.machine, missed(missing))
    });
    let shown = &report.left_out[..report.left_out.len().min(MOST_FILES)];
    text.part("left out", shown, |left_out| left_out.why.clone());
    text.more(report.left_out.len(), shown.len());
    text.machines(report);
    text.0
}

struct Text(String);

impl Text {
    fn line(&mut self, indent: usize, line: &str) {
        self.0.push_str(&" ".repeat(indent));
        self.0.push_str(one_line(line).trim_end());
        self.0.push('\n');
    }

    fn part<T>(&mut self, title: &str, all: &[T], words: impl Fn(&T) -> String) {
        if all.is_empty() {
            return;
        }
        self.0.push('\n');
        self.line(0, title);
        for one in all {
            self.line(2, &words(one));
        }
    }

    fn more(&mut self, all: usize, shown: usize) {
        if all > shown {
            self.line(2, &format!("and {} more; `--format json` has them all", all - shown));
        }
    }

    fn finding(&mut self, finding: &Finding) {
        let whom: Vec<&str> = machines_of(finding).collect();
        let count = whom.len();
        let of = count + finding.others;
        let new = if finding.new { "new: " } else { "" };
        self.0.push('\n');
        let differ = if count == 1 { "differs" } else { "differ" };
        let of = plural(of, "machine");
        self.line(0, &format!("{new}{count} of {of} {differ}: {}", names(&whom)));
        for (words, _) in verdicts(finding) {
            self.line(2, &words);
        }
        let first = finding.verdicts.iter().find_map(|verdict| verdict.first.as_ref());
        if let Some(first) = first {
            self.line(2, &format!("where it starts: {first}"));
        }
        for (words, _) in arms(finding).into_iter().chain(bits(finding)) {
            self.line(2, &words);
        }
        if finding.tie {
            self.line(2, "as many have the one as the other: nobody knows who is the odd one");
        }
        self.line(2, &format!("since {}", began(finding)));
        self.causes(finding);
    }

    fn causes(&mut self, finding: &Finding) {
        match &finding.nearest {
            Some(nearest) => return self.line(2, &near(nearest)),
            None if finding.causes.is_empty() => {
                return self.line(2, "no fact of the records, and no pair of them, separates them");
            }
            None => {}
        }
        // What rests on the same is said together.
        let mut grounds: Vec<(String, Vec<&Cause>)> = Vec::new();
        for cause in &finding.causes {
            let ground = ground(cause);
            match grounds.iter_mut().find(|(known, _)| *known == ground) {
                Some((_, causes)) => causes.push(cause),
                None => grounds.push((ground, vec![cause])),
            }
        }
        for (ground, causes) in grounds {
            self.line(2, &format!("what separates them ({ground}):"));
            for cause in causes.iter().take(MOST_NAMES) {
                let chosen = if cause.chosen { "chosen: " } else { "" };
                self.line(4, &format!("{chosen}{}", facts_beside(cause)));
            }
            self.more_facts(causes.len());
        }
    }

    fn more_facts(&mut self, count: usize) {
        if count > MOST_NAMES {
            self.line(4, &format!("and {} more; `--format json` has them all", count - MOST_NAMES));
        }
    }

    fn machines(&mut self, report: &Report) {
        let fact = |machine: &super::Machine, name: &str| {
            machine.facts.get(name).cloned().unwrap_or_else(|| "-".to_owned())
        };
        let rows: Vec<[String; 6]> = report
            .machines
            .iter()
            .map(|machine| {
                [
                    machine.name.clone(),
                    machine.verdict.map_or("no report".to_owned(), |v| v.to_string()),
                    machine.gpu.clone().unwrap_or_else(|| "no GPU".to_owned()),
                    fact(machine, "driver"),
                    fact(machine, "cuBLASLt"),
                    fact(machine, "runner"),
                ]
            })
            .collect();
        let heads =
            ["machine", "verdict", "GPU", "driver", "cuBLASLt", "runner"].map(str::to_owned);
        let wide = |column: usize| {
            let all = rows.iter().chain([&heads]).map(|row| row[column].chars().count());
            all.max().unwrap_or(0)
        };
        let widths: [usize; 6] = std::array::from_fn(wide);
        self.0.push('\n');
        for row in [&heads].into_iter().chain(&rows) {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
            self.line(0, &cells.collect::<Vec<_>>().join("  "));
        }
    }
}
