//! Many machines' runs as one answer: where verdicts or bits differ and since when, what those that
//! differ have in common, how values move on each chip, and who did not report.
//!
//! It reads records of runs. It knows neither tensors nor how a verdict is made; what it says of a
//! cause is what the facts in the records separate, and on how many machines that rests.

mod absent;
mod causes;
mod differences;
pub mod metrics;
mod page;
pub mod read;
mod trends;
mod words;

pub use page::page;
pub use words::text;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use self::absent::Pace;
use self::causes::Cause;
use self::read::{Facts, Gathered, LeftOut, Stage, Window};
use self::trends::Trend;
use crate::op::Arm;
use crate::verdict::Verdict;

/// The version of [`Report`] and [`Notice`].
/// 1: the first format.
pub const SCHEMA: u32 = 1;

const DAY: i64 = 24 * 3600;

/// A night by the day on which it began, counted from 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Night(pub i64);

impl Night {
    /// Of `2026-11-29`.
    pub fn of_date(date: &str) -> Option<Night> {
        let start: Timestamp = format!("{date}T00:00:00Z").parse().ok()?;
        Some(Night(start.as_second().div_euclid(DAY)))
    }
}

impl fmt::Display for Night {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(in_words(self.0.saturating_mul(DAY)).get(..10).unwrap_or("unknown"))
    }
}

impl Serialize for Night {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// When a day begins: so many hours after midnight, UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shift(pub u8);

impl Shift {
    /// The night of a moment, in seconds since 1970.
    pub fn night(self, moment: i64) -> Night {
        Night((moment - i64::from(self.0) * 3600).div_euclid(DAY))
    }
}

/// A moment, as RFC 3339 has it.
fn in_words(moment: i64) -> String {
    Timestamp::from_second(moment).map_or("unknown".to_owned(), |moment| moment.to_string())
}

/// All that is said of a fleet.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The moment for which it is made.
    pub at: String,
    /// One line for people.
    pub line: String,
    /// The gravest verdict that a stage has on a machine now; `error` where a machine did not report
    /// and nothing is falsified.
    pub verdict: Verdict,
    /// The exit code: 1 also where bits differ.
    pub exit_code: u8,
    /// How many runs were read.
    pub runs: usize,
    /// The nights of which there are runs.
    pub nights: Vec<Night>,
    /// The machines, by chip and name.
    pub machines: Vec<Machine>,
    /// The stages, with the verdict of each machine.
    pub stages: Vec<Row>,
    /// Stages that no pass is the answer to on most machines.
    pub failing: Vec<Failing>,
    /// Where machines differ, and what those have in common.
    pub findings: Vec<Finding>,
    /// Arms that made other bits under the same key on the same machine.
    pub unsteady: Vec<Unsteady>,
    /// How the values of claims move, chip by chip.
    pub trends: Vec<Trend>,
    /// Machines that did not report.
    pub missing: Vec<Missing>,
    /// Files that were left out, and why.
    pub left_out: Vec<LeftOut>,
    /// Files that are older than the window, of machines that are left out, or read twice.
    pub passed_over: usize,
}

/// One machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its GPUs by model; nothing where no device arm had a result.
    pub gpu: Option<String>,
    /// Which cards they are, where the runs say.
    pub card: Option<String>,
    /// The facts that its last report holds of every stage alike: versions, platform, CPU.
    pub facts: Facts,
    /// Whether it starts runs itself; a node of a cluster may only compute for others.
    pub reports: bool,
    /// When its last run started.
    pub last: String,
    /// On how many nights it reported.
    pub nights: usize,
    /// The gravest verdict of its last report; nothing where it did not report.
    pub verdict: Option<Verdict>,
    /// For each night of the report the gravest verdict, by [`letter`].
    pub history: String,
}

/// One stage.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name, with the folder of stages where several folders have one of that name.
    pub stage: String,
    /// Each machine's last answer; machines that have none, or did not report, are absent.
    pub cells: Vec<Cell>,
}

/// A stage on a machine.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// The machine.
    pub machine: String,
    /// The answer.
    pub verdict: Verdict,
    /// The reason, of what is no pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Whether the verdict or an arm's bits are others than on most machines.
    pub differs: bool,
    /// For each night of the report the verdict, by [`letter`].
    pub history: String,
}

/// A stage that most machines do not pass.
#[derive(Clone, Debug, Serialize)]
pub struct Failing {
    /// The stage.
    pub stage: String,
    /// Their verdict.
    pub verdict: Verdict,
    /// On how many machines.
    pub machines: usize,
    /// Of how many that have the stage.
    pub of: usize,
    /// The reason, as one of them has it.
    pub why: String,
}

/// Some machines that differ from most, in everything in which just these do.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The machines, each with the first night of the difference.
    pub machines: Vec<Since>,
    /// How many others there are to differ from.
    pub others: usize,
    /// Whether as many have the one as the other, so that nobody knows who is the odd one.
    pub tie: bool,
    /// The first of those nights.
    pub since: Night,
    /// Whether that is the last night of which there are runs, and not the first.
    pub new: bool,
    /// Other verdicts.
    pub verdicts: Vec<OtherVerdict>,
    /// Arms that have a result where most machines have none, or the other way round.
    pub arms: Vec<OtherArm>,
    /// Other bits.
    pub bits: Vec<OtherBits>,
    /// What separates those that differ from those that do not, the likeliest first.
    pub causes: Vec<Cause>,
    /// The fact that comes nearest, where none separates them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<Cause>,
}

/// Since when a machine differs.
#[derive(Clone, Debug, Serialize)]
pub struct Since {
    /// The machine.
    pub machine: String,
    /// The first night from which on it has differed without a break.
    pub since: Night,
}

/// A verdict that most machines do not have.
#[derive(Clone, Debug, Serialize)]
pub struct OtherVerdict {
    /// The stage.
    pub stage: String,
    /// The verdict.
    pub verdict: Verdict,
    /// That of most machines.
    pub instead_of: Verdict,
    /// Where it starts and what it is, as one of the machines has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
}

/// An arm that has a result where on most machines it has none, or the other way round.
#[derive(Clone, Debug, Serialize)]
pub struct OtherArm {
    /// The stage.
    pub stage: String,
    /// The arm.
    pub arm: Arm,
    /// Why it has no result; nothing where it has one, and most have none.
    pub why: Option<String>,
}

/// Bits that most machines do not have.
#[derive(Clone, Debug, Serialize)]
pub struct OtherBits {
    /// The stage.
    pub stage: String,
    /// The arm.
    pub arm: Arm,
    /// The first site with other bits; nothing where the sites are others.
    pub first: Option<String>,
}

/// An arm that made other bits of the same key on the same machine.
#[derive(Clone, Debug, Serialize)]
pub struct Unsteady {
    /// The machine.
    pub machine: String,
    /// The arm.
    pub arm: Arm,
    /// Its stages.
    pub stages: Vec<String>,
    /// How often in all.
    pub times: usize,
    /// The first night.
    pub first: Night,
    /// The last night.
    pub last: Night,
}

/// A machine that did not report.
#[derive(Clone, Debug, Serialize)]
pub struct Missing {
    /// Its name.
    pub machine: String,
    /// When its last run started; nothing where there is none.
    pub last: Option<String>,
    /// When the next one was due; nothing where that is not known.
    pub due: Option<String>,
    /// Hours between its reports, as they were.
    pub every_hours: Option<f64>,
}

/// What a message says of a fleet: one for all machines.
#[derive(Clone, Debug, Serialize)]
pub struct Notice {
    /// [`SCHEMA`].
    pub schema: u32,
    /// As the report's.
    pub verdict: Verdict,
    /// As the report's.
    pub exit_code: u8,
    /// As the report's; of a report that could not be made, why.
    pub line: String,
    /// How many machines have reported.
    pub machines: usize,
    /// Each finding in a line.
    pub findings: Vec<String>,
    /// Those that began on the last night.
    pub new: Vec<String>,
    /// Machines that did not report.
    pub missing: Vec<String>,
    /// How many files were left out.
    pub left_out: usize,
    /// The page, as an absolute path, where one was written.
    pub page: Option<String>,
}

impl Notice {
    /// Of a report.
    pub fn of(report: &Report, page: Option<String>) -> Notice {
        let line = |finding: &Finding| words::brief(finding);
        let new = report.findings.iter().filter(|finding| finding.new);
        Notice {
            schema: SCHEMA,
            verdict: report.verdict,
            exit_code: report.exit_code,
            line: report.line.clone(),
            machines: report.machines.len(),
            findings: report.findings.iter().map(line).collect(),
            new: new.map(line).collect(),
            missing: report.missing.iter().map(|missing| missing.machine.clone()).collect(),
            left_out: report.left_out.len(),
            page,
        }
    }

    /// Where no report could be made.
    pub fn failed(text: &str, exit_code: u8) -> Notice {
        let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason");
        Notice {
            schema: SCHEMA,
            verdict: Verdict::Error,
            exit_code,
            line: format!("fleet: error, no report; {}", crate::text::one_line(first)),
            machines: 0,
            findings: Vec::new(),
            new: Vec::new(),
            missing: Vec::new(),
            left_out: 0,
            page: None,
        }
    }
}

/// The letter of a verdict in a history: `.` is a pass, a blank no report.
pub fn letter(verdict: Verdict) -> char {
    match verdict {
        Verdict::Pass => '.',
        Verdict::Drift => 'd',
        Verdict::Structural => 'S',
        Verdict::Unmeasured => 'u',
        Verdict::Blocked => 'b',
        Verdict::Error => 'E',
    }
}

/// Stages and machines over the nights.
struct Fleet<'r> {
    /// The moment of the report.
    at: i64,
    nights: Vec<Night>,
    /// Names of stages, as they are shown.
    stages: Vec<String>,
    hosts: Vec<Arc<str>>,
    /// The last answer of each night, by stage and host.
    cells: Vec<Vec<BTreeMap<Night, &'r Stage>>>,
    /// When each host's own runs started, the last of each night.
    reports: Vec<BTreeMap<Night, i64>>,
    /// When each host was last heard of, by a run of its own or another's.
    heard: Vec<i64>,
    /// How often each host reports.
    paces: Vec<Pace>,
    /// The last night of which each host has any stage.
    latest: Vec<Option<Night>>,
}

impl<'r> Fleet<'r> {
    fn of(gathered: &'r Gathered, at: i64, expected: &[String]) -> Fleet<'r> {
        let runs = &gathered.runs;
        let all = || runs.iter().flat_map(|run| run.stages.iter().map(move |stage| (run, stage)));
        let nights: BTreeSet<Night> = runs.iter().map(|run| run.night).collect();
        let names: BTreeSet<&(Arc<str>, Arc<str>)> = all().map(|(_, stage)| &stage.name).collect();
        let hosts: BTreeSet<&Arc<str>> = runs
            .iter()
            .map(|run| &run.machine)
            .chain(all().map(|(_, stage)| &stage.host))
            .collect();
        let hosts: Vec<Arc<str>> = hosts.into_iter().cloned().collect();
        let places: BTreeMap<&Arc<str>, usize> =
            hosts.iter().enumerate().map(|(place, host)| (host, place)).collect();
        let rows: BTreeMap<&(Arc<str>, Arc<str>), usize> =
            names.iter().enumerate().map(|(row, name)| (*name, row)).collect();
        let mut cells = vec![vec![BTreeMap::new(); hosts.len()]; names.len()];
        let mut reports = vec![BTreeMap::new(); hosts.len()];
        let mut heard = vec![i64::MIN; hosts.len()];
        let mut latest = vec![None; hosts.len()];
        // The oldest first, so that the last of a night stays.
        for run in runs {
            let place = places[&run.machine];
            reports[place].insert(run.night, run.started);
            heard[place] = run.started;
            for stage in &run.stages {
                let place = places[&stage.host];
                heard[place] = run.started;
                latest[place] = latest[place].max(Some(run.night));
                cells[rows[&stage.name]][place].insert(run.night, stage);
            }
        }
        let moments = |reports: &BTreeMap<Night, i64>| reports.values().copied().collect();
        let moments: Vec<Vec<i64>> = reports.iter().map(moments).collect();
        let paces =
            absent::paces(&moments, |host| expected.iter().any(|name| *name == *hosts[host]));
        let mut alike: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
        names.iter().for_each(|(_, id)| *alike.entry(id).or_default() += 1);
        let shown = |name: &&(Arc<str>, Arc<str>)| {
            let (folder, id) = name;
            if alike[id] == 1 { id.to_string() } else { format!("{id} of {folder}") }
        };
        let stages = names.iter().map(shown).collect();
        let nights = nights.into_iter().collect();
        Fleet { at, nights, stages, hosts, cells, reports, heard, paces, latest }
    }

    /// What a stage's last answer on each machine is: of machines that are not overdue, and only
    /// where the stage is still in their reports.
    fn now(&self, stage: usize) -> BTreeMap<usize, &'r Stage> {
        let mut view = BTreeMap::new();
        for (host, nights) in self.cells[stage].iter().enumerate() {
            let Some((last, answer)) = nights.last_key_value() else { continue };
            let gap = absent::median_gap(nights.keys().map(|night| night.0)).unwrap_or(0.0);
            let latest = self.latest[host].unwrap_or(*last);
            let current = (latest.0 - last.0) as f64 <= 1.5 * gap;
            if current && !self.is_overdue(host) {
                view.insert(host, *answer);
            }
        }
        view
    }

    /// What a stage's answers of one night are.
    fn on(&self, stage: usize, night: Night) -> BTreeMap<usize, &'r Stage> {
        let of = |(host, nights): (usize, &BTreeMap<Night, &'r Stage>)| {
            Some((host, *nights.get(&night)?))
        };
        self.cells[stage].iter().enumerate().filter_map(of).collect()
    }

    fn is_overdue(&self, host: usize) -> bool {
        self.paces[host].is_overdue(self.at)
    }

    fn name(&self, host: usize) -> String {
        self.hosts[host].to_string()
    }

    /// The last stage of a host that says what GPU it has.
    fn with_gpu(&self, host: usize) -> Option<&'r Stage> {
        let answers = self.cells.iter().filter_map(|row| row[host].last_key_value());
        let with = answers.filter(|(_, stage)| stage.gpu.is_some());
        with.max_by_key(|(night, _)| **night).map(|(_, stage)| *stage)
    }

    /// The GPUs of a host by model, for tables.
    fn chip(&self, host: usize) -> String {
        let gpu = self.with_gpu(host).and_then(|stage| stage.gpu.as_deref());
        gpu.unwrap_or("no GPU").to_owned()
    }

    fn history(&self, of: impl Fn(Night) -> Option<Verdict>) -> String {
        self.nights.iter().map(|night| of(*night).map_or(' ', letter)).collect()
    }
}

/// Everything that is said of what was gathered. `expected` are machines that must report.
pub fn report(gathered: &Gathered, window: &Window, expected: &[String]) -> Report {
    let fleet = Fleet::of(gathered, window.at, expected);
    let views: Vec<BTreeMap<usize, &Stage>> =
        (0..fleet.stages.len()).map(|stage| fleet.now(stage)).collect();
    let (findings, differing) = differences::findings(&fleet, &views);
    let missing = absent::missing(&fleet, expected, &window.without);
    let machines = machines(&fleet, &views);
    let row = |(stage, view): (usize, &BTreeMap<usize, &Stage>)| Row {
        stage: fleet.stages[stage].clone(),
        cells: view
            .iter()
            .map(|(host, answer)| Cell {
                machine: fleet.name(*host),
                verdict: answer.verdict,
                why: answer.why.as_ref().map(ToString::to_string),
                differs: differing.contains(&(stage, *host)),
                history: fleet.history(|night| {
                    fleet.cells[stage][*host].get(&night).map(|stage| stage.verdict)
                }),
            })
            .collect(),
    };
    let mut report = Report {
        schema: SCHEMA,
        at: in_words(window.at),
        line: String::new(),
        verdict: Verdict::Unmeasured,
        exit_code: 0,
        runs: gathered.runs.len(),
        nights: fleet.nights.clone(),
        machines,
        stages: views.iter().enumerate().map(row).collect(),
        failing: failing(&fleet, &views),
        findings,
        unsteady: differences::unsteady(&fleet),
        trends: trends::of(&fleet),
        missing,
        left_out: gathered.left_out.clone(),
        passed_over: gathered.passed_over,
    };
    (report.verdict, report.exit_code) = outcome(&report);
    report.line = words::line(&report);
    report
}

/// The gravest verdict, and the exit code.
fn outcome(report: &Report) -> (Verdict, u8) {
    let cells = report.stages.iter().flat_map(|row| &row.cells).map(|cell| cell.verdict);
    let missing = report.missing.iter().map(|_| Verdict::Error);
    let verdict = Verdict::of_run(cells.chain(missing));
    let bits = report.findings.iter().any(|finding| !finding.bits.is_empty());
    let falsified = Verdict::Structural.exit_code();
    let code = if bits || !report.unsteady.is_empty() { falsified } else { verdict.exit_code() };
    (verdict, code)
}

fn machines(fleet: &Fleet<'_>, views: &[BTreeMap<usize, &Stage>]) -> Vec<Machine> {
    let machine = |host: usize| {
        let own: Vec<&Stage> = views.iter().filter_map(|view| view.get(&host).copied()).collect();
        let with_gpu = fleet.with_gpu(host);
        let verdicts = own.iter().map(|stage| stage.verdict);
        let gravest = (!own.is_empty()).then(|| Verdict::of_run(verdicts));
        Machine {
            name: fleet.name(host),
            gpu: with_gpu.and_then(|stage| stage.gpu.as_ref()).map(ToString::to_string),
            card: with_gpu.and_then(|stage| stage.card.as_ref()).map(ToString::to_string),
            facts: common(fleet, host),
            reports: !fleet.reports[host].is_empty(),
            last: in_words(fleet.heard[host]),
            nights: fleet.reports[host].len(),
            verdict: gravest,
            history: fleet.history(|night| {
                let of_night = fleet.cells.iter().filter_map(|row| row[host].get(&night));
                let verdicts: Vec<Verdict> = of_night.map(|stage| stage.verdict).collect();
                (!verdicts.is_empty()).then(|| Verdict::of_run(verdicts))
            }),
        }
    };
    let mut hosts: Vec<usize> = (0..fleet.hosts.len()).collect();
    hosts.sort_by_key(|host| (fleet.chip(*host), fleet.name(*host)));
    hosts.into_iter().map(machine).collect()
}

/// What a machine's table shows of it: the environment, as its last stages have it alike.
fn common(fleet: &Fleet<'_>, host: usize) -> Facts {
    let mut facts: BTreeMap<&String, BTreeSet<&String>> = BTreeMap::new();
    let last = fleet.cells.iter().filter_map(|row| row[host].last_key_value());
    for (name, value) in last.flat_map(|(_, stage)| stage.facts.iter()) {
        if causes::is_of_machine(name) {
            facts.entry(name).or_default().insert(value);
        }
    }
    let alike = facts.into_iter().filter(|(_, values)| values.len() == 1);
    let fact = |(name, values): (&String, BTreeSet<&String>)| {
        Some((name.clone(), (*values.first()?).clone()))
    };
    alike.filter_map(fact).collect()
}

fn failing(fleet: &Fleet<'_>, views: &[BTreeMap<usize, &Stage>]) -> Vec<Failing> {
    let mut failing = Vec::new();
    for (stage, view) in views.iter().enumerate() {
        let Some(verdict) = differences::usual_verdict(view) else { continue };
        let alike = || view.values().filter(|answer| answer.verdict == verdict);
        if verdict == Verdict::Pass {
            continue;
        }
        let why = alike().find_map(|answer| answer.why.as_ref());
        failing.push(Failing {
            stage: fleet.stages[stage].clone(),
            verdict,
            machines: alike().count(),
            of: view.len(),
            why: why.map_or(String::new(), ToString::to_string),
        });
    }
    failing
}
