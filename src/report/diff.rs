//! What changed from one run to another: inputs, environment, verdicts, numbers.
//!
//! Stages are matched by id, falsifiers by id, measures by streams and site.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};

use crate::metric::Metric;
use crate::op::{Arm, Site, Stream};
use crate::record::{RunRecord, StageRecord};
use crate::text::number;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The stage; none for the run as a whole.
    pub stage: Option<String>,
    /// `verdict`, `input`, `environment`, `claim` or `measure`.
    pub topic: &'static str,
    /// What changed.
    pub what: String,
    /// As it was.
    pub before: String,
    /// As it is.
    pub after: String,
}

/// Every difference between two runs; times are none.
pub fn diff(before: &RunRecord, after: &RunRecord) -> Vec<Change> {
    let mut changes = Changes { stage: None, all: Vec::new() };
    changes.text("verdict", "the run", before.verdict.name(), after.verdict.name());
    let (old, new) = (&before.provenance, &after.provenance);
    let cpu = |cpu: &Option<String>| cpu.clone().unwrap_or_else(|| "unknown".to_owned());
    changes.text("environment", "runner", &old.runner, &new.runner);
    changes.text("environment", "cpu", &cpu(&old.cpu), &cpu(&new.cpu));
    changes.text("environment", "platform", &old.platform, &new.platform);
    changes.text("environment", "threads", &old.threads.to_string(), &new.threads.to_string());

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
                changes.text("verdict", "the stage", before.stages[a].verdict.name(), "is gone");
            }
            (None, Some(b)) => {
                changes.text(
                    "verdict",
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
    fn text(&mut self, topic: &'static str, what: &str, before: &str, after: &str) {
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

    fn json<T: serde::Serialize>(&mut self, what: &str, before: &T, after: &T) {
        let text = |value: &T| serde_json::to_string(value).unwrap_or_default();
        self.text("input", what, &text(before), &text(after));
    }

    fn stage(&mut self, before: &StageRecord, after: &StageRecord) {
        self.text("verdict", "the stage", before.verdict.name(), after.verdict.name());
        if before.verdict != after.verdict {
            self.text("verdict", "why", &before.why, &after.why);
        }
        self.text("input", "model", &before.model, &after.model);
        self.json("tokens", &before.tokens, &after.tokens);
        self.json("op", &before.op, &after.op);
        self.json("recipe", &before.recipe, &after.recipe);
        self.text("input", "contract", &before.contract.join(" "), &after.contract.join(" "));
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
            self.text("environment", &format!("{arm} arm"), &state(before), &state(after));
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
                let old = digests.get(&first.site).map_or("", |digest| digest.as_str());
                self.text("measure", &what, old, &first.blake3);
            }
        }
    }

    fn claims(&mut self, before: &StageRecord, after: &StageRecord) {
        for new in &after.judgements {
            let Some(old) = before.judgements.iter().find(|old| old.falsifier == new.falsifier)
            else {
                self.text("claim", &new.falsifier, "was not there", &format!("{:?}", new.outcome));
                continue;
            };
            let outcome = |j: &crate::verdict::Judgement| format!("{:?}", j.outcome).to_lowercase();
            self.text("claim", &new.falsifier, &outcome(old), &outcome(new));
            let bound = |j: &crate::verdict::Judgement| {
                let edge = |e: Option<f64>| e.map_or("none".to_owned(), number);
                format!("{} to {}", edge(j.min), edge(j.max))
            };
            self.text("input", &format!("bound of {}", new.falsifier), &bound(old), &bound(new));
            let value = |j: &crate::verdict::Judgement| match (&j.value, &j.site) {
                (Some(value), Some(site)) => format!("{} at {site}", number(*value)),
                (Some(value), None) => number(*value),
                (None, _) => "no value".to_owned(),
            };
            if old.value != new.value || old.site != new.site {
                let what = format!("{} of {}", new.metric, new.falsifier);
                self.text("claim", &what, &value(old), &value(new));
            }
        }
        for old in &before.judgements {
            if !after.judgements.iter().any(|new| new.falsifier == old.falsifier) {
                self.text("claim", &old.falsifier, &format!("{:?}", old.outcome), "is gone");
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
            self.text("measure", &what, &format!("{was:?}"), &format!("{is:?}"));
        }
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

/// The changes as lines.
pub fn diff_text(before: &RunRecord, after: &RunRecord, changes: &[Change]) -> String {
    let mut text = format!("{} -> {}\n", before.id, after.id);
    if changes.is_empty() {
        text.push_str("nothing changed: the same inputs, environment, verdicts and numbers\n");
    }
    let mut stage = None;
    for change in changes {
        if stage != Some(&change.stage) {
            text.push_str(&match &change.stage {
                None => "run\n".to_owned(),
                Some(id) => format!("stage {id}\n"),
            });
            stage = Some(&change.stage);
        }
        text.push_str(&format!(
            "  {:11}  {}: {} -> {}\n",
            change.topic, change.what, change.before, change.after
        ));
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
                @else { (changes.len()) " differences." }
            }
        }
        main {
            div class="scroll" {
                table class="stages diff" {
                    thead { tr {
                        th scope="col" { "stage" } th scope="col" { "topic" } th scope="col" { "what" }
                        th scope="col" { (before.id) } th scope="col" { (after.id) }
                    } }
                    tbody {
                        @for change in changes {
                            tr {
                                th scope="row" { bdi { (change.stage.as_deref().unwrap_or("run")) } }
                                td { (change.topic) }
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
}
