//! What changed from one run to another: causes first (inputs and environment), then verdicts,
//! then the numbers that follow.
//!
//! Stages are matched by id, falsifiers by id, measures by streams and site. Where a stage's cause
//! is known, its numbers are counted and not listed.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};
use serde_json::Value;

use crate::metric::Metric;
use crate::op::{Arm, Site, Stream};
use crate::record::{RunRecord, StageRecord};
use crate::text::{number, one_line};

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The stage; none for the run as a whole.
    pub stage: Option<String>,
    /// What kind of difference it is.
    pub topic: Topic,
    /// What changed.
    pub what: String,
    /// As it was.
    pub before: String,
    /// As it is.
    pub after: String,
}

/// The kinds of differences, in the order in which they are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// What decides the numbers, and is written down in a manifest or contract.
    Input,
    /// What decides them, and is the machine's.
    Environment,
    /// An answer.
    Verdict,
    /// What a falsifier found.
    Claim,
    /// What was measured.
    Measure,
}

impl Topic {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Topic::Input => "input",
            Topic::Environment => "environment",
            Topic::Verdict => "verdict",
            Topic::Claim => "claim",
            Topic::Measure => "measure",
        }
    }

    fn is_cause(self) -> bool {
        matches!(self, Topic::Input | Topic::Environment)
    }

    fn follows(self) -> bool {
        matches!(self, Topic::Claim | Topic::Measure)
    }
}

/// Every difference between two runs; times, the number of threads and the name of the machine
/// are none: they decide no number.
pub fn diff(before: &RunRecord, after: &RunRecord) -> Vec<Change> {
    let mut changes = Changes { stage: None, all: Vec::new() };
    changes.text(Topic::Verdict, "the run", before.verdict.name(), after.verdict.name());
    let (old, new) = (&before.provenance, &after.provenance);
    let cpu = |cpu: &Option<String>| cpu.clone().unwrap_or_else(|| "unknown".to_owned());
    changes.text(Topic::Environment, "runner", &old.runner, &new.runner);
    changes.text(Topic::Environment, "cpu", &cpu(&old.cpu), &cpu(&new.cpu));
    changes.text(Topic::Environment, "platform", &old.platform, &new.platform);

    let of = |run: &'_ RunRecord| -> Vec<String> {
        run.stages.iter().map(|stage| stage.id.0.clone()).collect()
    };
    let mut ids = of(after);
    ids.extend(of(before).into_iter().filter(|id| !ids.contains(id)).collect::<Vec<_>>());
    for id in ids {
        let find = |run: &'_ RunRecord| run.stages.iter().position(|stage| stage.id.0 == id);
        changes.stage = Some(id.clone());
        match (find(before), find(after)) {
            (Some(a), Some(b)) => changes.stage(&before.stages[a], &after.stages[b]),
            (Some(a), None) => {
                changes.text(
                    Topic::Verdict,
                    "the stage",
                    before.stages[a].verdict.name(),
                    "is gone",
                );
            }
            (None, Some(b)) => {
                changes.text(
                    Topic::Verdict,
                    "the stage",
                    "was not there",
                    after.stages[b].verdict.name(),
                );
            }
            (None, None) => {}
        }
    }
    changes.all
}

struct Changes {
    stage: Option<String>,
    all: Vec<Change>,
}

impl Changes {
    fn text(&mut self, topic: Topic, what: &str, before: &str, after: &str) {
        if before != after {
            self.all.push(Change {
                stage: self.stage.clone(),
                topic,
                what: what.to_owned(),
                before: before.to_owned(),
                after: after.to_owned(),
            });
        }
    }

    /// Every leaf that differs, by its path.
    fn json<T: serde::Serialize>(&mut self, what: &str, before: &T, after: &T) {
        let mut leaves = Vec::new();
        differing(what, &serde_json::json!(before), &serde_json::json!(after), &mut leaves);
        for Leaf { path, before, after } in leaves {
            self.text(Topic::Input, &path, &before, &after);
        }
    }

    fn stage(&mut self, before: &StageRecord, after: &StageRecord) {
        self.text(Topic::Verdict, "the stage", before.verdict.name(), after.verdict.name());
        if before.verdict != after.verdict {
            self.text(Topic::Verdict, "why", &before.why, &after.why);
        }
        self.text(Topic::Input, "model", &before.model, &after.model);
        self.json("tokens", &before.tokens, &after.tokens);
        self.json("op", &before.op, &after.op);
        self.json("recipe", &before.recipe, &after.recipe);
        self.text(Topic::Input, "contract", &before.contract.join(" "), &after.contract.join(" "));
        self.arms(before, after);
        self.claims(before, after);
        self.measures(before, after);
    }

    fn arms(&mut self, before: &StageRecord, after: &StageRecord) {
        let arms: BTreeSet<Arm> = before.arms.keys().chain(after.arms.keys()).copied().collect();
        for arm in arms {
            // That a result was reused changes nothing in it.
            let state = |stage: &StageRecord| match stage.arms.get(&arm) {
                None => "absent".to_owned(),
                Some(record) if record.object.is_some() || record.key.is_some() => {
                    record.arithmetic.clone().unwrap_or_else(|| "computed".to_owned())
                }
                Some(record) => record.why.clone(),
            };
            self.text(Topic::Environment, &format!("{arm} arm"), &state(before), &state(after));
            let (Some(old), Some(new)) = (before.arms.get(&arm), after.arms.get(&arm)) else {
                continue;
            };
            let digests: BTreeMap<&Site, &String> =
                old.sites.iter().map(|record| (&record.site, &record.blake3)).collect();
            let moved: Vec<_> = new
                .sites
                .iter()
                .filter(|record| digests.get(&record.site).is_some_and(|d| **d != record.blake3))
                .collect();
            if let Some(first) = moved.first() {
                let what = format!(
                    "{arm} arm's tensors, {} of {} sites, first {}",
                    moved.len(),
                    new.sites.len(),
                    first.site
                );
                // Enough of a hash to see that it is another one.
                let short = |digest: &str| digest.chars().take(12).collect::<String>();
                let old = digests.get(&first.site).map_or("", |digest| digest.as_str());
                self.text(Topic::Measure, &what, &short(old), &short(&first.blake3));
            }
        }
    }

    fn claims(&mut self, before: &StageRecord, after: &StageRecord) {
        for new in &after.judgements {
            let Some(old) = before.judgements.iter().find(|old| old.falsifier == new.falsifier)
            else {
                let is = format!("{:?}", new.outcome).to_lowercase();
                self.text(Topic::Claim, &new.falsifier, "was not there", &is);
                continue;
            };
            let outcome = |j: &crate::verdict::Judgement| format!("{:?}", j.outcome).to_lowercase();
            self.text(Topic::Claim, &new.falsifier, &outcome(old), &outcome(new));
            let bound = |j: &crate::verdict::Judgement| {
                let edge = |e: Option<f64>| e.map_or("none".to_owned(), number);
                format!("{} to {}", edge(j.min), edge(j.max))
            };
            self.text(
                Topic::Input,
                &format!("bound of {}", new.falsifier),
                &bound(old),
                &bound(new),
            );
            let value = |j: &crate::verdict::Judgement| match (&j.value, &j.site) {
                (Some(value), Some(site)) => format!("{} at {site}", number(*value)),
                (Some(value), None) => number(*value),
                (None, _) => "no value".to_owned(),
            };
            if old.value != new.value || old.site != new.site {
                let what = format!("{} of {}", new.metric, new.falsifier);
                let (a, b) = match (value(old), value(new)) {
                    (a, b) if a == b => (format!("{a}, in other bits"), b),
                    pair => pair,
                };
                self.text(Topic::Claim, &what, &a, &b);
            }
        }
        for old in &before.judgements {
            if !after.judgements.iter().any(|new| new.falsifier == old.falsifier) {
                let was = format!("{:?}", old.outcome).to_lowercase();
                self.text(Topic::Claim, &old.falsifier, &was, "is gone");
            }
        }
    }

    /// Per pair and metric how many sites moved, and where most.
    fn measures(&mut self, before: &StageRecord, after: &StageRecord) {
        let old: BTreeMap<(Stream, Stream, &Site), &BTreeMap<Metric, f64>> =
            before.measures.iter().map(|m| ((m.subject, m.judge, &m.site), &m.metrics)).collect();
        let mut moved: BTreeMap<(Stream, Stream, Metric), Moved<'_>> = BTreeMap::new();
        for measure in &after.measures {
            let key = (measure.subject, measure.judge, &measure.site);
            let Some(metrics) = old.get(&key) else { continue };
            for (metric, value) in &measure.metrics {
                let Some(was) = metrics.get(metric).filter(|was| was.to_bits() != value.to_bits())
                else {
                    continue;
                };
                let size = (value - was).abs() / was.abs().max(f64::MIN_POSITIVE);
                let most = Moved { sites: 0, size, site: &measure.site, was: *was, is: *value };
                let entry = moved.entry((measure.subject, measure.judge, *metric));
                let place = entry.or_insert(Moved { size: -1.0, ..most });
                let sites = place.sites + 1;
                *place = if size > place.size { Moved { sites, ..most } } else { *place };
                place.sites = sites;
            }
        }
        for ((subject, judge, metric), Moved { sites: count, site, was, is, .. }) in moved {
            let noun = if count == 1 { "site" } else { "sites" };
            let what =
                format!("{metric} of {subject} against {judge}, {count} {noun}, most at {site}");
            let (a, b) = match (number(was), number(is)) {
                (a, b) if a == b => (format!("{a}, in other bits"), b),
                pair => pair,
            };
            self.text(Topic::Measure, &what, &a, &b);
        }
    }
}

/// A leaf at which two values differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its path, as `recipe.scale.weight`.
    pub path: String,
    /// As it was.
    pub before: String,
    /// As it is.
    pub after: String,
}

/// Every leaf at which two values differ.
pub fn differing(path: &str, old: &Value, new: &Value, found: &mut Vec<Leaf>) {
    if old == new {
        return;
    }
    if let (Value::Object(a), Value::Object(b)) = (old, new) {
        let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        for name in names {
            let get = |side: &'_ serde_json::Map<String, Value>| {
                side.get(name).cloned().unwrap_or(Value::Null)
            };
            differing(&format!("{path}.{name}"), &get(a), &get(b), found);
        }
        return;
    }
    let word = |value: &Value| match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    found.push(Leaf { path: path.to_owned(), before: word(old), after: word(new) });
}

/// How a metric of one pair moved: at how many sites, and where most.
#[derive(Clone, Copy)]
struct Moved<'a> {
    sites: usize,
    size: f64,
    site: &'a Site,
    was: f64,
    is: f64,
}

/// How many differences are told: what several stages have in common is one.
fn told(changes: &[Change]) -> usize {
    causes(changes).len() + changes.iter().filter(|change| !change.topic.is_cause()).count()
}

/// A cause, with the stages that have it; none for the run as a whole.
struct Cause<'c> {
    change: &'c Change,
    stages: Vec<&'c str>,
}

/// What decides the numbers: the same difference of several stages once.
fn causes(changes: &[Change]) -> Vec<Cause<'_>> {
    let mut causes: Vec<Cause<'_>> = Vec::new();
    let mut sorted: Vec<&Change> = changes.iter().filter(|c| c.topic.is_cause()).collect();
    sorted.sort_by_key(|change| change.topic);
    for change in sorted {
        let same = |known: &&mut Cause<'_>| {
            let of = |c: &'_ Change| (c.topic, c.what.clone(), c.before.clone(), c.after.clone());
            of(known.change) == of(change) && known.change.stage.is_some() == change.stage.is_some()
        };
        let stage = change.stage.as_deref();
        match causes.iter_mut().find(same) {
            Some(known) => known.stages.extend(stage),
            None => causes.push(Cause { change, stages: stage.into_iter().collect() }),
        }
    }
    causes
}

/// The numbers of a stage, or of the run.
struct Effects<'c> {
    stage: Option<&'c str>,
    /// Whether a cause is known.
    explained: bool,
    changes: Vec<&'c Change>,
}

/// The numbers that moved, stage by stage.
fn effects(changes: &[Change]) -> Vec<Effects<'_>> {
    let whole = changes.iter().any(|c| c.stage.is_none() && c.topic.is_cause());
    let mut effects: Vec<Effects<'_>> = Vec::new();
    for change in changes.iter().filter(|change| change.topic.follows()) {
        let stage = change.stage.as_deref();
        if let Some(known) = effects.iter_mut().find(|known| known.stage == stage) {
            known.changes.push(change);
            continue;
        }
        let own = |c: &Change| c.stage.as_deref() == stage && c.topic.is_cause();
        let explained = whole || changes.iter().any(own);
        effects.push(Effects { stage, explained, changes: vec![change] });
    }
    effects
}

/// How many numbers of which kind moved.
fn counted(effects: &Effects<'_>) -> String {
    let count = |topic| effects.changes.iter().filter(|change| change.topic == topic).count();
    let (claims, measures) = (count(Topic::Claim), count(Topic::Measure));
    [(claims, "claim"), (measures, "measure")]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, noun)| format!("{count} {noun}{}", if count == 1 { "" } else { "s" }))
        .collect::<Vec<_>>()
        .join(" and ")
}

/// The changes as lines. What follows from a known cause is counted, unless `all` is asked for.
pub fn diff_text(before: &RunRecord, after: &RunRecord, changes: &[Change], all: bool) -> String {
    let name = |run: &RunRecord| {
        let machine = run.provenance.machine.as_ref();
        one_line(&format!("{}{}", run.id, machine.map_or(String::new(), |m| format!(" on {m}"))))
    };
    let mut text = format!("{} -> {}\n", name(before), name(after));
    if changes.is_empty() {
        text.push_str("nothing changed: the same inputs, environment, verdicts and numbers\n");
    }
    let line = |change: &Change| {
        one_line(&format!("{}: {} -> {}", change.what, change.before, change.after))
    };
    let one = |whom: &str| one_line(whom);
    let causes = causes(changes);
    if !causes.is_empty() {
        text.push_str("causes\n");
    }
    for Cause { change, stages } in causes {
        let whom = if stages.is_empty() { "run".to_owned() } else { one(&stages.join(", ")) };
        text.push_str(&format!("  {whom}  {}\n", line(change)));
    }
    let verdicts: Vec<&Change> = changes.iter().filter(|c| c.topic == Topic::Verdict).collect();
    if !verdicts.is_empty() {
        text.push_str("verdicts\n");
    }
    for change in verdicts {
        let whom = one(change.stage.as_deref().unwrap_or("run"));
        text.push_str(&format!("  {whom}  {}\n", line(change)));
    }
    let effects = effects(changes);
    if !effects.is_empty() {
        text.push_str("numbers\n");
    }
    let mut folded = false;
    for stage in &effects {
        let whom = one(stage.stage.unwrap_or("run"));
        if stage.explained && !all {
            folded = true;
            text.push_str(&format!("  {whom}  {} moved with it\n", counted(stage)));
            continue;
        }
        for change in &stage.changes {
            text.push_str(&format!("  {whom}  {}\n", line(change)));
        }
    }
    if folded {
        text.push_str("`--all` lists every number\n");
    }
    text
}

/// The changes side by side, for the page.
pub(super) fn diff_table(before: &RunRecord, after: &RunRecord, changes: &[Change]) -> Markup {
    html! {
        header class=(format!("v-{}", after.verdict)) {
            h1 { "What changed" }
            p class="lead" {
                @if changes.is_empty() { "Nothing: the same inputs, environment, verdicts and numbers." }
                @else { (told(changes)) " differences." }
            }
        }
        main {
            @let causes = causes(changes);
            @if !causes.is_empty() {
                h2 { "Causes" }
                (table(before, after, causes.iter().map(|c| (c.stages.join(", "), c.change))))
            }
            @let verdicts: Vec<_> = changes.iter().filter(|c| c.topic == Topic::Verdict).collect();
            @if !verdicts.is_empty() {
                h2 { "Verdicts" }
                (table(before, after, verdicts.iter().map(|c| (whom(c), *c))))
            }
            @let effects = effects(changes);
            @if !effects.is_empty() { h2 { "Numbers" } }
            @for stage in &effects {
                details open[!stage.explained] {
                    summary {
                        (stage.stage.unwrap_or("run")) ": " (counted(stage)) " moved"
                        @if stage.explained { " with it" }
                    }
                    (table(before, after, stage.changes.iter().map(|c| (whom(c), *c))))
                }
            }
        }
    }
}

fn whom(change: &Change) -> String {
    change.stage.clone().unwrap_or_default()
}

/// Some changes side by side; no stage is the run.
fn table<'c>(
    before: &RunRecord,
    after: &RunRecord,
    changes: impl Iterator<Item = (String, &'c Change)>,
) -> Markup {
    html! {
        div class="scroll" {
            table class="stages diff" {
                thead { tr {
                    th scope="col" { "stage" } th scope="col" { "topic" } th scope="col" { "what" }
                    th scope="col" { (before.id) } th scope="col" { (after.id) }
                } }
                tbody {
                    @for (stage, change) in changes {
                        tr {
                            th scope="row" { bdi { (if stage.is_empty() { "run" } else { &stage }) } }
                            td { (change.topic.name()) }
                            td { (change.what) }
                            td { (change.before) }
                            td { (change.after) }
                        }
                    }
                }
            }
        }
    }
}
