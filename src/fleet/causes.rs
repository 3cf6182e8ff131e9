//! What machines that differ have in common, and the others have not.
//!
//! A fact separates them where all that differ have it and nobody else does. Single facts come first,
//! then pairs of facts. It is a correlation, and is told with the number of machines on which it
//! rests, and with whether the fact came on the night on which the difference began.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::read::Stage;
use super::{Fleet, Night};

/// A fact, or two facts together, that separate machines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cause {
    /// The facts.
    pub facts: Vec<Fact>,
    /// How many of those that differ have them.
    pub with: usize,
    /// Of how many that differ.
    pub of: usize,
    /// How many of the others have them.
    pub others_with: usize,
    /// Of how many others.
    pub others: usize,
    /// Of how many machines it is known what they had before they differed.
    pub known_before: usize,
    /// How many of those got the facts on the night on which the difference began.
    pub came_with_it: usize,
    /// Whether the fact is what a library or a rule chose, and so may itself follow from another one.
    pub chosen: bool,
    /// Whether it rests on one machine on either side, so that any fact of that machine's own
    /// would fit as well.
    pub weak: bool,
}

/// One fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// Its name.
    pub name: String,
    /// What those that differ have.
    pub values: Vec<String>,
    /// What the others have.
    pub instead_of: Vec<String>,
}

/// When a machine began to differ.
#[derive(Clone, Copy, Debug)]
pub struct Began {
    /// The machine.
    pub host: usize,
    /// The stage by which that is known.
    pub stage: usize,
    /// The first night.
    pub since: Night,
    /// The night before it, on which it did not differ.
    pub before: Option<Night>,
}

/// Facts of a machine, over some stages.
pub type Known = BTreeMap<String, String>;

/// What stands for a fact that a machine does not have.
const NONE: &str = "none";

/// The place of a fact among those that separate equally well: what people change comes before what
/// follows from it.
fn rank(name: &str) -> usize {
    let begins = |words: &[&str]| words.iter().any(|word| name.starts_with(word));
    match name {
        "model" | "prompt" | "op" | "contract" => 1,
        name if name.starts_with("recipe.") => 1,
        "runner" | "the runner's own arithmetic" => 2,
        "gpu" => 3,
        "driver" => 4,
        "platform" | "CPU" => 6,
        "inputs" => 7,
        "threads" => 10,
        _ if begins(&["algorithm of ", "split-K of "]) => 8,
        name if name.ends_with(" arithmetic") || name.ends_with(" chip") => 9,
        name if name.ends_with(" arm") => 0,
        _ => 5,
    }
}

/// Whether a fact is one of a machine, and not of a stage or of what was chosen for it.
pub fn is_of_machine(name: &str) -> bool {
    matches!(rank(name), 2..=6 | 10)
}

/// Whether a fact is a choice that follows from others.
fn is_chosen(name: &str) -> bool {
    matches!(rank(name), 8 | 9)
}

/// The facts of a machine's stages: where stages differ in one, all its values.
pub fn facts_of<'s>(stages: impl Iterator<Item = &'s &'s Stage>) -> Known {
    let mut all: BTreeMap<&String, BTreeSet<&str>> = BTreeMap::new();
    for (name, value) in stages.flat_map(|stage| stage.facts.iter()) {
        all.entry(name).or_default().insert(value);
    }
    let joined = |values: BTreeSet<&str>| values.into_iter().collect::<Vec<_>>().join("; ");
    all.into_iter().map(|(name, values)| (name.clone(), joined(values))).collect()
}

fn value<'k>(known: &'k Known, name: &str) -> &'k str {
    known.get(name).map_or(NONE, String::as_str)
}

/// What separates those that differ from the others, the likeliest first; and what comes nearest
/// where nothing does.
pub fn of(
    fleet: &Fleet<'_>,
    differing: &BTreeMap<usize, Known>,
    others: &BTreeMap<usize, Known>,
    began: &[Began],
) -> (Vec<Cause>, Option<Cause>) {
    if others.is_empty() {
        return (Vec::new(), None);
    }
    let search = Search { fleet, differing, others, began };
    let mut causes = search.singles();
    if causes.is_empty() {
        causes = search.pairs();
    }
    // What came when it began, then what people change; a choice never stands before its reason.
    causes.sort_by_key(|cause| {
        let came = cause.known_before > 0 && cause.came_with_it == cause.known_before;
        let ranks: usize = cause.facts.iter().map(|fact| rank(&fact.name)).sum();
        (cause.chosen, !came, ranks)
    });
    let nearest = if causes.is_empty() { search.nearest() } else { None };
    (causes, nearest)
}

struct Search<'s> {
    fleet: &'s Fleet<'s>,
    differing: &'s BTreeMap<usize, Known>,
    others: &'s BTreeMap<usize, Known>,
    began: &'s [Began],
}

/// So many pairs are told.
const MOST_PAIRS: usize = 5;
/// Of so many facts pairs are made: a stranger's record may hold any number.
const MOST_SHARED: usize = 500;

impl<'s> Search<'s> {
    fn names(&self) -> BTreeSet<&'s String> {
        self.differing.values().chain(self.others.values()).flat_map(BTreeMap::keys).collect()
    }

    /// The values of some machines for a fact.
    fn values(of: &'s BTreeMap<usize, Known>, name: &str) -> BTreeSet<&'s str> {
        of.values().map(|known| value(known, name)).collect()
    }

    fn singles(&self) -> Vec<Cause> {
        let mut causes = Vec::new();
        for name in self.names() {
            let theirs = Self::values(self.differing, name);
            let usual = Self::values(self.others, name);
            // As many values as machines: each has its own, which separates anybody.
            let own = theirs.len() > 1 && theirs.len() == self.differing.len();
            if theirs.is_disjoint(&usual) && !own {
                causes.push(self.cause(&[name]));
            }
        }
        causes
    }

    fn pairs(&self) -> Vec<Cause> {
        // What all that differ share, with which of the others have it too: some, but not all.
        let mut shared: Vec<(usize, &String, Vec<bool>)> = Vec::new();
        for name in self.names().into_iter().filter(|name| !is_chosen(name)) {
            let theirs = Self::values(self.differing, name);
            let (1, Some(wanted)) = (theirs.len(), theirs.first()) else { continue };
            let has = |known: &Known| value(known, name) == *wanted;
            let who: Vec<bool> = self.others.values().map(has).collect();
            if who.contains(&false) {
                shared.push((rank(name), name, who));
            }
        }
        shared.sort();
        shared.truncate(MOST_SHARED);
        let mut pairs = Vec::new();
        for (place, (first, a, with_a)) in shared.iter().enumerate() {
            for (second, b, with_b) in &shared[place + 1..] {
                if !with_a.iter().zip(with_b).any(|(a, b)| *a && *b) {
                    pairs.push((first + second, [*a, *b]));
                }
            }
        }
        pairs.sort();
        pairs.iter().take(MOST_PAIRS).map(|(_, names)| self.cause(names)).collect()
    }

    /// The single fact that most of those that differ have, and the fewest others.
    fn nearest(&self) -> Option<Cause> {
        let mut best: Option<(f64, usize, Cause)> = None;
        for name in self.names().into_iter().filter(|name| !is_chosen(name)) {
            for wanted in Self::values(self.differing, name) {
                let count = |of: &BTreeMap<usize, Known>| {
                    of.values().filter(|known| value(known, name) == wanted).count()
                };
                let (with, others_with) = (count(self.differing), count(self.others));
                let share = with as f64 / self.differing.len().max(1) as f64
                    - others_with as f64 / self.others.len().max(1) as f64;
                let better = best.as_ref().is_none_or(|(known, place, _)| {
                    share > *known || (share == *known && rank(name) < *place)
                });
                if share > 0.5 && better {
                    let mut cause = self.cause(&[name]);
                    cause.facts[0].values = vec![wanted.to_owned()];
                    (cause.with, cause.others_with) = (with, others_with);
                    (cause.known_before, cause.came_with_it) = (0, 0);
                    best = Some((share, rank(name), cause));
                }
            }
        }
        best.map(|(.., cause)| cause)
    }

    fn cause(&self, names: &[&String]) -> Cause {
        let listed = |values: BTreeSet<&str>| values.into_iter().map(str::to_owned).collect();
        let fact = |name: &&String| Fact {
            name: (*name).clone(),
            values: listed(Self::values(self.differing, name)),
            instead_of: listed(Self::values(self.others, name)),
        };
        let (mut known_before, mut came_with_it) = (0, 0);
        for began in self.began {
            let row = &self.fleet.cells[began.stage][began.host];
            let (Some(before), Some(after)) =
                (began.before.and_then(|night| row.get(&night)), row.get(&began.since))
            else {
                continue;
            };
            known_before += 1;
            let [old, new] = [before, after].map(|stage| facts_of([stage].into_iter()));
            let moved = |name: &&String| value(&old, name) != value(&new, name);
            came_with_it += usize::from(names.iter().any(moved));
        }
        Cause {
            facts: names.iter().map(fact).collect(),
            with: self.differing.len(),
            of: self.differing.len(),
            others_with: 0,
            others: self.others.len(),
            known_before,
            came_with_it,
            chosen: names.iter().all(|name| is_chosen(name)),
            weak: self.differing.len() == 1 || self.others.len() == 1,
        }
    }
}
