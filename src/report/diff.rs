//! What changed from one run to another: causes first (inputs and environment), then verdicts,
//! then the numbers that follow.
//!
//! Stages are matched by id, falsifiers by id, measures by streams and site. Where a stage's cause
//! is known, its numbers are counted and not listed.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};
use serde::Serialize;
use serde_json::Value;

use crate::manifest::problem::plural;
use crate::metric::Metric;
use crate::op::{Arm, Site, Stream};
use crate::plan::SiteRecord;
use crate::record::{ArmRecord, RunRecord, StageRecord};
use crate::text::{number, one_line};
use crate::verdict::Judgement;

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
    /// What decides how numbers are judged, and none of them.
    Judging,
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
            Topic::Judging => "judging",
            Topic::Verdict => "verdict",
            Topic::Claim => "claim",
            Topic::Measure => "measure",
        }
    }

    fn is_cause(self) -> bool {
        self.decides_numbers() || self == Topic::Judging
    }

    /// Whether numbers may move because of it.
    pub fn decides_numbers(self) -> bool {
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

/// What of a stage's definition is another one: what decides its numbers, and how they are judged.
pub fn of_definition(before: &StageRecord, after: &StageRecord) -> Vec<Change> {
    let mut changes = Changes { stage: Some(after.id.0.clone()), all: Vec::new() };
    changes.definition(before, after);
    changes.all
}

/// What of a stage's environment is another one: the facts that the results of its arms depend on,
/// and the algorithms that a library chose. Which of equal cards it was decides nothing.
pub fn of_environment(before: &StageRecord, after: &StageRecord) -> Vec<Change> {
    let mut changes = Changes { stage: Some(after.id.0.clone()), all: Vec::new() };
    changes.facts(before, after);
    changes.all
}

/// The tensors of an arm that are others than before.
pub fn other_sites<'r>(before: &ArmRecord, after: &'r ArmRecord) -> Vec<&'r SiteRecord> {
    let digests: BTreeMap<&Site, &String> =
        before.sites.iter().map(|record| (&record.site, &record.blake3)).collect();
    let other =
        |record: &&SiteRecord| digests.get(&record.site).is_some_and(|d| **d != record.blake3);
    after.sites.iter().filter(other).collect()
}

/// Two prompts as they are told: whole where they are short, else where they first differ.
fn prompts(before: &[u32], after: &[u32]) -> [String; 2] {
    const SHORT: usize = 16;
    let short = before.len().max(after.len()) <= SHORT;
    let at = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    [before, after].map(|tokens| match (short, tokens.get(at)) {
        (true, _) => serde_json::json!(tokens).to_string(),
        (false, Some(token)) => format!("{} tokens, {token} at position {at}", tokens.len()),
        (false, None) => format!("{} tokens, none at position {at}", tokens.len()),
    })
}

/// Two numbers as they are told: with all their digits where a few do not tell them apart.
fn told_apart(before: f64, after: f64) -> [String; 2] {
    match [before, after].map(number) {
        [a, b] if a == b && before.to_bits() != after.to_bits() => {
            [before, after].map(|value| format!("{value:?}"))
        }
        pair => pair,
    }
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
        self.definition(before, after);
        self.arms(before, after);
        self.claims(before, after);
        self.measures(before, after);
    }

    fn definition(&mut self, before: &StageRecord, after: &StageRecord) {
        self.text(Topic::Input, "model", &before.model, &after.model);
        let [old, new] = prompts(&before.tokens, &after.tokens);
        self.text(Topic::Input, "tokens", &old, &new);
        self.json("op", &before.op, &after.op);
        self.json("recipe", &before.recipe, &after.recipe);
        let arms = |stage: &StageRecord| {
            stage.arms.keys().map(|arm| arm.name()).collect::<Vec<_>>().join(", ")
        };
        self.text(Topic::Judging, "arms", &arms(before), &arms(after));
        let contracts = [before, after].map(|stage| stage.contract.join(" "));
        self.text(Topic::Judging, "contract", &contracts[0], &contracts[1]);
        // A contract may be changed without a new version.
        for new in &after.judgements {
            let Some(old) = before.judgements.iter().find(|old| old.falsifier == new.falsifier)
            else {
                self.text(Topic::Judging, &new.falsifier, "was not there", &outcome(new));
                continue;
            };
            let [from, to] = [(old.min, new.min), (old.max, new.max)].map(edges);
            let bound = |side: usize| format!("{} to {}", from[side], to[side]);
            let what = format!("bound of {}", new.falsifier);
            self.text(Topic::Judging, &what, &bound(0), &bound(1));
        }
        for old in &before.judgements {
            if !after.judgements.iter().any(|new| new.falsifier == old.falsifier) {
                self.text(Topic::Judging, &old.falsifier, &outcome(old), "is gone");
            }
        }
    }

    fn facts(&mut self, before: &StageRecord, after: &StageRecord) {
        for (arm, new) in &after.arms {
            let Some(old) = before.arms.get(arm) else { continue };
            // Earlier runners wrote none.
            if !old.facts.is_empty() && !new.facts.is_empty() {
                let names: BTreeSet<&String> = old.facts.keys().chain(new.facts.keys()).collect();
                for name in names.into_iter().filter(|name| !IDENTITIES.contains(&name.as_str())) {
                    let fact = |record: &ArmRecord| match record.facts.get(name) {
                        Some(digest) if name == CODE => short(digest),
                        Some(value) => value.clone(),
                        None => "none".to_owned(),
                    };
                    let what = match name.as_str() {
                        CODE => "the runner's own arithmetic".to_owned(),
                        name => format!("{arm} {name}"),
                    };
                    let known = self.all.iter().any(|c| c.what == what && c.stage == self.stage);
                    if !known {
                        self.text(Topic::Environment, &what, &fact(old), &fact(new));
                    }
                }
            }
            self.algorithms(*arm, old, new);
        }
    }

    /// The algorithms that a library chose for shapes that both have: the first, and how many more.
    fn algorithms(&mut self, arm: Arm, old: &ArmRecord, new: &ArmRecord) {
        let known: BTreeMap<[usize; 3], &str> =
            old.gemms.iter().map(|gemm| (gemm.shape, gemm.algorithm.as_str())).collect();
        let others = new.gemms.iter().filter_map(|gemm| {
            let before = *known.get(&gemm.shape)?;
            (before != gemm.algorithm).then_some((gemm.shape, before, gemm.algorithm.as_str()))
        });
        let others: Vec<_> = others.collect();
        let Some(([tokens, outputs, inner], before, after)) = others.first() else { return };
        let more = match others.len() {
            1 => String::new(),
            many => format!(", and of {} more shapes", many - 1),
        };
        let what = format!("{arm} algorithm of {tokens}x{outputs}x{inner}{more}");
        self.text(Topic::Environment, &what, before, after);
    }

    fn arms(&mut self, before: &StageRecord, after: &StageRecord) {
        self.facts(before, after);
        for (arm, new) in &after.arms {
            let Some(old) = before.arms.get(arm) else { continue };
            // Card and library stand behind a semicolon, and are facts where there are any.
            let told_apart = old.facts.contains_key("gpu") && new.facts.contains_key("gpu");
            // That a result was reused changes nothing in it.
            let state = |record: &ArmRecord| match record.object.is_some() || record.key.is_some() {
                true => {
                    let words = record.arithmetic.as_deref().unwrap_or("computed");
                    let numbers = words.split(';').next().unwrap_or(words);
                    if told_apart { numbers } else { words }.to_owned()
                }
                false => record.why.clone(),
            };
            self.text(Topic::Environment, &format!("{arm} arm"), &state(old), &state(new));
            let moved = other_sites(old, new);
            if let Some(first) = moved.first() {
                let what = format!(
                    "{arm} arm's tensors, {} of {} sites, first {}",
                    moved.len(),
                    new.sites.len(),
                    first.site
                );
                let old = old.sites.iter().find(|record| record.site == first.site);
                let old = old.map_or("", |record| record.blake3.as_str());
                self.text(Topic::Measure, &what, &short(old), &short(&first.blake3));
            }
        }
    }

    fn claims(&mut self, before: &StageRecord, after: &StageRecord) {
        for new in &after.judgements {
            let Some(old) = before.judgements.iter().find(|old| old.falsifier == new.falsifier)
            else {
                continue;
            };
            self.text(Topic::Claim, &new.falsifier, &outcome(old), &outcome(new));
            let value = |j: &Judgement| match (&j.value, &j.site) {
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
            let sites = plural(count, "site");
            let what = format!("{metric} of {subject} against {judge}, {sites}, most at {site}");
            let (a, b) = match (number(was), number(is)) {
                (a, b) if a == b => (format!("{a}, in other bits"), b),
                pair => pair,
            };
            self.text(Topic::Measure, &what, &a, &b);
        }
    }
}

/// The fact that names the runner's own arithmetic.
pub const CODE: &str = "code";

/// Facts that say which one a machine or card is, and nothing of what it is like.
pub const IDENTITIES: [&str; 2] = ["which gpu", "machine"];

/// Enough of a hash to see that it is another one.
fn short(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// A leaf at which two values differ, by its path, as `recipe.scale.weight`.
struct Leaf {
    path: String,
    before: String,
    after: String,
}

/// Every leaf at which two values differ.
fn differing(path: &str, old: &Value, new: &Value, found: &mut Vec<Leaf>) {
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

fn outcome(judgement: &Judgement) -> String {
    format!("{:?}", judgement.outcome).to_lowercase()
}

/// An edge of a bound, before and after.
fn edges((before, after): (Option<f64>, Option<f64>)) -> [String; 2] {
    match (before, after) {
        (Some(before), Some(after)) => told_apart(before, after),
        edges => [edges.0, edges.1].map(|edge| edge.map_or("none".to_owned(), number)),
    }
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
    let whole = changes.iter().any(|c| c.stage.is_none() && c.topic.decides_numbers());
    let mut effects: Vec<Effects<'_>> = Vec::new();
    for change in changes.iter().filter(|change| change.topic.follows()) {
        let stage = change.stage.as_deref();
        if let Some(known) = effects.iter_mut().find(|known| known.stage == stage) {
            known.changes.push(change);
            continue;
        }
        let own = |c: &Change| c.stage.as_deref() == stage && c.topic.decides_numbers();
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
        .map(|(count, noun)| plural(count, noun))
        .collect::<Vec<_>>()
        .join(" and ")
}

/// Which cards the device arm of a run computed on.
fn card(run: &RunRecord) -> Option<&str> {
    let mut devices = run.stages.iter().filter_map(|stage| stage.arms.get(&Arm::Device));
    devices.find_map(|device| device.facts.get("which gpu")).map(String::as_str)
}

/// The changes as lines. What follows from a known cause is counted, unless `all` is asked for.
pub fn diff_text(before: &RunRecord, after: &RunRecord, changes: &[Change], all: bool) -> String {
    let cards = [before, after].map(card);
    let name = |run: &RunRecord| {
        let machine = run.provenance.machine.as_ref();
        let machine = machine.map_or(String::new(), |machine| format!(" on {machine}"));
        let card = card(run).filter(|_| cards[0] != cards[1]);
        let card = card.map_or(String::new(), |card| format!(", {card}"));
        one_line(&format!("{}{machine}{card}", run.id))
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

/// What is told to programs of two runs.
#[derive(Serialize)]
struct Told<'c> {
    schema: u32,
    before: Head<'c>,
    after: Head<'c>,
    changes: Vec<ToldChange<'c>>,
}

/// What is told of a run itself.
#[derive(Serialize)]
struct Head<'c> {
    run: &'c str,
    started: &'c str,
    machine: Option<&'c str>,
    gpu: Option<&'c str>,
    verdict: &'c str,
}

/// A change, and whether a known cause explains it.
#[derive(Serialize)]
struct ToldChange<'c> {
    stage: Option<&'c str>,
    topic: &'c str,
    what: &'c str,
    before: &'c str,
    after: &'c str,
    /// Of a number: whether something that decides numbers changed with it. Else nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    explained: Option<bool>,
}

/// The changes as JSON, each by itself.
pub fn diff_json(before: &RunRecord, after: &RunRecord, changes: &[Change]) -> String {
    fn head(run: &RunRecord) -> Head<'_> {
        Head {
            run: &run.id,
            started: &run.started,
            machine: run.provenance.machine.as_deref(),
            gpu: card(run),
            verdict: run.verdict.name(),
        }
    }
    let explained: BTreeMap<Option<&str>, bool> =
        effects(changes).iter().map(|effects| (effects.stage, effects.explained)).collect();
    let mut sorted: Vec<&Change> = changes.iter().collect();
    sorted.sort_by_key(|change| change.topic);
    let told = sorted.into_iter().map(|change| {
        let stage = change.stage.as_deref();
        ToldChange {
            stage,
            topic: change.topic.name(),
            what: &change.what,
            before: &change.before,
            after: &change.after,
            explained: explained.get(&stage).copied().filter(|_| change.topic.follows()),
        }
    });
    let told =
        Told { schema: 1, before: head(before), after: head(after), changes: told.collect() };
    // Texts, numbers and truth values are always encoded.
    serde_json::to_string_pretty(&told).unwrap_or_default() + "\n"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_prompts_that_begin_alike_are_told_apart() {
        let before: Vec<u32> = (0..300).collect();
        let mut after = before.clone();
        after[250] = 7;
        let told = prompts(&before, &after);
        assert_eq!(told, ["300 tokens, 250 at position 250", "300 tokens, 7 at position 250"]);
        let told = prompts(&before, &before[..299]);
        assert_eq!(told, ["300 tokens, 299 at position 299", "299 tokens, none at position 299"]);
        assert_eq!(prompts(&[1, 2], &[1]), ["[1,2]", "[1]"]);
        let [a, b] = prompts(&before, &before);
        assert_eq!(a, b, "the same prompt is no change");
    }

    #[test]
    fn a_bound_that_moved_by_less_than_is_shown_is_told_all_the_same() {
        assert_eq!(edges((Some(0.12341), Some(0.12342))), ["0.12341", "0.12342"]);
        assert_eq!(edges((Some(1.0), Some(2.0))), ["1", "2"]);
        assert_eq!(edges((None, Some(2.0))), ["none", "2"]);
    }
}
