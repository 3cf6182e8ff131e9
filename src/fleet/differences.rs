//! Where machines differ: in a stage's verdict, or in the bits that an arm made of the same question
//! on the same chip; since when; and who all differ in the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::read::{Digests, Made, Stage};
use super::{Finding, Fleet, Night, OtherArm, OtherBits, OtherVerdict, Since, Unsteady, causes};
use crate::op::Arm;
use crate::verdict::Verdict;

/// In what machines can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// A stage's answer.
    Verdict,
    /// Whether an arm has a result.
    Result(Arm),
    /// The bits of an arm.
    Bits(Arm),
}

/// Some machines that have another answer than most, which they share.
#[derive(Clone, Debug)]
struct Split {
    what: What,
    differing: BTreeSet<usize>,
    others: BTreeSet<usize>,
    /// As many have the one as the other.
    tie: bool,
    /// One machine of each side.
    example: [usize; 2],
}

/// What is to be said of a stage's answers on one night, or now.
#[derive(Clone, Debug, Default)]
struct Compared {
    splits: Vec<Split>,
    /// Who could be held against somebody, in what.
    comparable: BTreeSet<(usize, What)>,
}

impl Compared {
    fn differs(&self, host: usize, what: What) -> bool {
        self.splits.iter().any(|split| split.what == what && split.differing.contains(&host))
    }
}

/// How grave a verdict is: of two that as many machines have, the graver one is said to differ.
fn gravity(verdict: Verdict) -> usize {
    let order = [
        Verdict::Pass,
        Verdict::Unmeasured,
        Verdict::Blocked,
        Verdict::Error,
        Verdict::Drift,
        Verdict::Structural,
    ];
    order.iter().position(|known| *known == verdict).unwrap_or(order.len())
}

/// The verdict that most machines have; of equally many the least grave.
pub fn usual_verdict(view: &BTreeMap<usize, &Stage>) -> Option<Verdict> {
    let mut counts: BTreeMap<(usize, Verdict), usize> = BTreeMap::new();
    for answer in view.values() {
        *counts.entry((gravity(answer.verdict), answer.verdict)).or_default() += 1;
    }
    // The last of equal ones is the largest, so the gravest comes first.
    let most = counts.into_iter().rev().max_by_key(|(_, count)| *count);
    most.map(|((_, verdict), _)| verdict)
}

fn compared(view: &BTreeMap<usize, &Stage>) -> Compared {
    let mut compared = Compared::default();
    let mut verdicts: BTreeMap<(usize, Verdict), BTreeSet<usize>> = BTreeMap::new();
    for (host, answer) in view {
        verdicts.entry((gravity(answer.verdict), answer.verdict)).or_default().insert(*host);
    }
    add(&mut compared, What::Verdict, verdicts.into_values().map(Group::alone).collect());
    // That an arm could not run hinders no pass, and is to be seen all the same.
    let mut results: BTreeMap<Arm, [BTreeSet<usize>; 2]> = BTreeMap::new();
    for (host, answer) in view {
        for (arm, without) in &answer.without {
            let sides = results.entry(*arm).or_default();
            sides[usize::from(without.is_some())].insert(*host);
        }
    }
    for (arm, sides) in results {
        let sides = sides.into_iter().filter(|side| !side.is_empty());
        add(&mut compared, What::Result(arm), sides.map(Group::alone).collect());
    }
    let usual = usual_verdict(view);
    let mut peers: BTreeMap<(Arm, &str), Vec<Alike<'_>>> = BTreeMap::new();
    for (host, answer) in view {
        for Made { arm, peers: among, digests, .. } in &answer.arms {
            let groups = peers.entry((*arm, &**among)).or_default();
            let place = groups.iter().position(|(known, _)| same(known, digests));
            let place = place.unwrap_or_else(|| {
                groups.push((digests, Group::default()));
                groups.len() - 1
            });
            let group = &mut groups[place].1;
            group.hosts.insert(*host);
            group.usual += usize::from(Some(answer.verdict) == usual);
        }
    }
    for ((arm, _), groups) in peers {
        add(&mut compared, What::Bits(arm), groups.into_iter().map(|(_, group)| group).collect());
    }
    compared
}

/// Bits, and who has them.
type Alike<'s> = (&'s Arc<Digests>, Group);

/// Machines with the same answer.
#[derive(Clone, Debug, Default)]
struct Group {
    hosts: BTreeSet<usize>,
    /// How many of them have the verdict of the stage that most machines have.
    usual: usize,
}

impl Group {
    fn alone(hosts: BTreeSet<usize>) -> Group {
        Group { hosts, usual: 0 }
    }

    /// What makes a group the one that others differ from: bits with which most machines have the
    /// usual verdict are no odd ones, however few of a kind have them.
    fn weight(&self) -> (bool, usize) {
        (2 * self.usual > self.hosts.len(), self.hosts.len())
    }
}

/// Whether digests are the same: most are kept once, and need no look at each site.
fn same(a: &Arc<Digests>, b: &Arc<Digests>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}

/// Adds what a partition says: every group but the weightiest, or of equal ones the first, differs.
fn add(compared: &mut Compared, what: What, groups: Vec<Group>) {
    let count: usize = groups.iter().map(|group| group.hosts.len()).sum();
    if count < 2 {
        return;
    }
    let all = || groups.iter().flat_map(|group| group.hosts.iter().copied());
    compared.comparable.extend(all().map(|host| (host, what)));
    let Some(weight) = groups.iter().map(Group::weight).max() else { return };
    let Some(most) = groups.iter().position(|group| group.weight() == weight) else { return };
    for (_, group) in groups.iter().enumerate().filter(|(at, _)| *at != most) {
        let one = |group: &Group| group.hosts.first().copied().unwrap_or_default();
        compared.splits.push(Split {
            what,
            differing: group.hosts.clone(),
            tie: group.weight() == weight,
            others: all().filter(|host| !group.hosts.contains(host)).collect(),
            example: [one(group), one(&groups[most])],
        });
    }
}

/// Who differs, by stage and host.
pub type Differing = BTreeSet<(usize, usize)>;

/// All that differs now, by who does.
pub fn findings(fleet: &Fleet<'_>, views: &[BTreeMap<usize, &Stage>]) -> (Vec<Finding>, Differing) {
    let now: Vec<Compared> = views.iter().map(compared).collect();
    let mut differing = Differing::new();
    let mut groups: BTreeMap<BTreeSet<usize>, Vec<(usize, &Split)>> = BTreeMap::new();
    for (stage, compared) in now.iter().enumerate() {
        for split in &compared.splits {
            differing.extend(split.differing.iter().map(|host| (stage, *host)));
            groups.entry(split.differing.clone()).or_default().push((stage, split));
        }
    }
    let nights = Nights::of(fleet, &groups);
    let found = |hosts: &BTreeSet<usize>, splits: &[(usize, &Split)]| {
        finding(fleet, views, &nights, hosts, splits)
    };
    // Where the same fact separates several groups, such as those of several chips, they are one.
    let mut by_cause: BTreeMap<Signature, Vec<&BTreeSet<usize>>> = BTreeMap::new();
    let mut findings = Vec::new();
    for (hosts, splits) in &groups {
        let finding = found(hosts, splits);
        match signature(&finding) {
            Some(signature) => by_cause.entry(signature).or_default().push(hosts),
            None => findings.push(finding),
        }
    }
    for (cause, sets) in by_cause {
        let hosts: BTreeSet<usize> = sets.iter().flat_map(|set| set.iter().copied()).collect();
        let splits: Vec<(usize, &Split)> =
            sets.iter().flat_map(|set| groups[*set].iter().copied()).collect();
        let together = found(&hosts, &splits);
        if signature(&together) == Some(cause) {
            findings.push(together);
        } else {
            findings.extend(sets.iter().map(|set| found(set, &groups[*set])));
        }
    }
    // What is new and what concerns most machines comes first.
    findings.sort_by_key(|finding| {
        (std::cmp::Reverse(finding.since), std::cmp::Reverse(finding.machines.len()))
    });
    (findings, differing)
}

/// Facts with their values.
type Signature = Vec<(String, Vec<String>)>;

/// The facts and values of the likeliest cause; nothing where none was found.
fn signature(finding: &Finding) -> Option<Signature> {
    let facts = finding.causes.first()?.facts.iter();
    Some(facts.map(|fact| (fact.name.clone(), fact.values.clone())).collect())
}

/// What was to be said of earlier nights, of the stages that matter.
struct Nights(BTreeMap<(usize, Night), Compared>);

impl Nights {
    fn of(fleet: &Fleet<'_>, groups: &BTreeMap<BTreeSet<usize>, Vec<(usize, &Split)>>) -> Nights {
        let stages: BTreeSet<usize> = groups.values().flatten().map(|(stage, _)| *stage).collect();
        let mut nights = BTreeMap::new();
        for stage in stages {
            for night in &fleet.nights {
                nights.insert((stage, *night), compared(&fleet.on(stage, *night)));
            }
        }
        Nights(nights)
    }

    /// The first night from which on a machine differs without a break, and the one before it on
    /// which it did not. Nights on which nobody else asked the same say nothing.
    fn since(
        &self,
        fleet: &Fleet<'_>,
        (stage, host, what): (usize, usize, What),
    ) -> (Option<Night>, Option<Night>) {
        let mut since = None;
        for night in fleet.cells[stage][host].keys().rev() {
            let Some(compared) = self.0.get(&(stage, *night)) else { continue };
            if !compared.comparable.contains(&(host, what)) {
                continue;
            }
            if !compared.differs(host, what) {
                return (since, Some(*night));
            }
            since = Some(*night);
        }
        (since, None)
    }
}

fn finding(
    fleet: &Fleet<'_>,
    views: &[BTreeMap<usize, &Stage>],
    nights: &Nights,
    hosts: &BTreeSet<usize>,
    splits: &[(usize, &Split)],
) -> Finding {
    let others = splits.iter().flat_map(|(_, split)| split.others.iter().copied());
    let others: BTreeSet<usize> = others.filter(|host| !hosts.contains(host)).collect();
    let stages: BTreeSet<usize> = splits.iter().map(|(stage, _)| *stage).collect();
    let mut machines = Vec::new();
    let mut began = Vec::new();
    for host in hosts {
        // Of several stages and arms the one that has differed the longest.
        let own = splits.iter().filter(|(_, split)| split.differing.contains(host));
        let all = own.map(|(stage, split)| {
            let (since, before) = nights.since(fleet, (*stage, *host, split.what));
            let last = fleet.cells[*stage][*host].last_key_value().map(|(night, _)| *night);
            (since.or(last), before, *stage)
        });
        let Some((Some(since), before, stage)) = all.min_by_key(|(since, ..)| *since) else {
            continue;
        };
        machines.push(Since { machine: fleet.name(*host), since });
        began.push(causes::Began { host: *host, stage, since, before });
    }
    let since = machines.iter().map(|machine| machine.since).min();
    let since = since.or(fleet.nights.last().copied()).unwrap_or(Night(0));
    let facts = |host: usize| causes::facts_of(stages.iter().filter_map(|s| views[*s].get(&host)));
    let of = |hosts: &BTreeSet<usize>| hosts.iter().map(|host| (*host, facts(*host))).collect();
    let (causes, nearest) = causes::of(fleet, &of(hosts), &of(&others), &began);
    let several = fleet.nights.len() > 1;
    let mut finding = Finding {
        machines,
        others: others.len(),
        tie: splits.iter().all(|(_, split)| split.tie),
        since,
        new: several && fleet.nights.last() == Some(&since),
        verdicts: Vec::new(),
        arms: Vec::new(),
        bits: Vec::new(),
        causes,
        nearest,
    };
    for (stage, split) in splits {
        let name = fleet.stages[*stage].clone();
        let view = &views[*stage];
        let [Some(one), Some(other)] = split.example.map(|host| view.get(&host)) else { continue };
        match split.what {
            What::Verdict => finding.verdicts.push(OtherVerdict {
                stage: name,
                verdict: one.verdict,
                instead_of: other.verdict,
                first: one.first.as_ref().map(ToString::to_string),
            }),
            What::Result(arm) => finding.arms.push(OtherArm {
                stage: name,
                arm,
                why: one.without.get(&arm).and_then(|why| why.as_ref()).map(ToString::to_string),
            }),
            // Several chips may have other bits each of their own.
            What::Bits(arm) if finding.bits.iter().any(|b| (&b.stage, b.arm) == (&name, arm)) => {}
            What::Bits(arm) => {
                let of = |stage: &'_ &Stage| stage.arms.iter().position(|made| made.arm == arm);
                let (Some(a), Some(b)) = (of(one), of(other)) else { continue };
                let first = first_site(&other.arms[b].digests, &one.arms[a].digests);
                finding.bits.push(OtherBits { stage: name, arm, first });
            }
        }
    }
    finding
}

/// The first site, in the order of the record, whose bits are others.
fn first_site(usual: &Digests, others: &Digests) -> Option<String> {
    let pair = usual.iter().zip(others).find(|(a, b)| a != b);
    pair.filter(|(a, b)| a.0 == b.0).map(|(_, (site, _))| site.to_string())
}

/// Arms that made other bits on a later night, under the same key and on the same machine.
pub fn unsteady(fleet: &Fleet<'_>) -> Vec<Unsteady> {
    let mut found: BTreeMap<(usize, Arm), Unsteady> = BTreeMap::new();
    for (stage, row) in fleet.cells.iter().enumerate() {
        for (host, nights) in row.iter().enumerate() {
            let mut before: BTreeMap<Arm, &Made> = BTreeMap::new();
            for (night, answer) in nights {
                for made in &answer.arms {
                    let Some(old) = before.insert(made.arm, made) else { continue };
                    let same_key = !made.key.is_empty() && old.key == made.key;
                    if !same_key || same(&old.digests, &made.digests) {
                        continue;
                    }
                    let entry = found.entry((host, made.arm)).or_insert_with(|| Unsteady {
                        machine: fleet.name(host),
                        arm: made.arm,
                        stages: Vec::new(),
                        times: 0,
                        first: *night,
                        last: *night,
                    });
                    entry.times += 1;
                    (entry.first, entry.last) = (entry.first.min(*night), entry.last.max(*night));
                    let name = &fleet.stages[stage];
                    if !entry.stages.contains(name) {
                        entry.stages.push(name.clone());
                    }
                }
            }
        }
    }
    found.into_values().collect()
}
