//! One contract: as written, and checked so that every falsifier can fail.
//!
//! It knows no stage; whether a contract fits one is `check.rs`.

use std::collections::{BTreeMap, BTreeSet};

use super::fields::{Fields, Put, choose};
use super::problem::{At, Findings, Problem, quoted_list, short, suggest};
use super::stage::{check_name, check_text};
use super::{Contract, Equation, Falsifier, IfFails, sites};
use crate::chip::Evidence;
use crate::metric::Metric;
use crate::op::{Arm, Stream};

/// A contract's file: its name even where the rest is wrong.
pub(super) struct RawContract {
    pub name: Option<Put<String>>,
    /// The whole contract, if nothing is wrong with it.
    pub contract: Option<Contract>,
}

/// What a contract may ask for.
const EVIDENCE: [(&str, Evidence); 4] = {
    let mut named = [("", Evidence::Assumed); 4];
    let mut place = 0;
    while place < named.len() {
        named[place] = (Evidence::ALL[place].name(), Evidence::ALL[place]);
        place += 1;
    }
    named
};

struct RawEquation {
    id: Option<Put<String>>,
    formula: Option<Put<String>>,
    why: Option<Put<String>>,
}

struct RawFalsifier {
    opening: At,
    id: Option<Put<String>>,
    equation: Option<Put<String>>,
    prediction: Option<Put<String>>,
    compare: Option<[Put<Stream>; 2]>,
    metric: Option<Put<Metric>>,
    /// `Some(None)` where the key is absent: every site.
    sites: Option<Option<Vec<Put<String>>>>,
    unless_exact: Option<Put<bool>>,
    min: Option<Put<f64>>,
    max: Option<Put<f64>>,
    why: Option<Put<String>>,
    if_fails: Option<Put<IfFails>>,
}

impl RawContract {
    /// Reads and checks a contract.
    pub fn read(mut fields: Fields<'_>, source: usize, findings: &mut Findings) -> RawContract {
        let name = fields
            .need::<String>("name", "\"qkv-matmul\"", findings)
            .and_then(|name| check_name("name", name, findings));
        let version = fields
            .need::<String>("version", "\"1.0.0\"", findings)
            .and_then(|version| check_version(version, findings));
        let evidence = fields.choice("evidence", &EVIDENCE, findings);
        let raw_equations: Vec<RawEquation> = fields
            .tables("equation", findings)
            .into_iter()
            .map(|table| RawEquation::read(table, findings))
            .collect();
        let raw_falsifiers: Vec<RawFalsifier> = fields
            .tables("falsifier", findings)
            .into_iter()
            .map(|table| RawFalsifier::read(table, findings))
            .collect();
        let opening = fields.opening();
        fields.finish(findings);

        let known = unique_ids(
            "equation",
            raw_equations.iter().filter_map(|equation| equation.id.as_ref()),
            findings,
        );
        unique_ids(
            "falsifier",
            raw_falsifiers.iter().filter_map(|falsifier| falsifier.id.as_ref()),
            findings,
        );
        check_tested(&known, &raw_falsifiers, findings);
        if raw_falsifiers.is_empty() {
            findings.push(
                Problem::new(
                    "the contract has no falsifier",
                    "add a `[[falsifier]]`: a contract that nothing can break proves nothing",
                )
                .at(&opening, "cannot fail"),
            );
        }
        let (count_equations, count_falsifiers) = (raw_equations.len(), raw_falsifiers.len());
        let equations: Vec<Equation> =
            raw_equations.into_iter().filter_map(RawEquation::check).collect();
        let falsifiers: Vec<Falsifier> = raw_falsifiers
            .into_iter()
            .filter_map(|falsifier| falsifier.check(&known, findings))
            .collect();

        let sound = equations.len() == count_equations && falsifiers.len() == count_falsifiers;
        let contract = match (&name, version) {
            (Some(name), Some(version)) if sound => Some(Contract {
                name: name.value.clone(),
                version: version.value,
                file: findings.path(source).to_owned(),
                equations,
                falsifiers,
                evidence: evidence.map(|evidence| evidence.value),
            }),
            _ => None,
        };
        RawContract { name, contract }
    }
}

fn check_version(version: Put<String>, findings: &mut Findings) -> Option<Put<String>> {
    let parts: Vec<&str> = version.value.split('.').collect();
    let number = |part: &&str| {
        !part.is_empty()
            && part.len() <= 9
            && part.bytes().all(|byte| byte.is_ascii_digit())
            && (*part == "0" || !part.starts_with('0'))
    };
    if parts.len() == 3 && parts.iter().all(number) {
        return Some(version);
    }
    findings.push(
        Problem::new(
            format!("`{}` is not a version", short(&version.value)),
            "write three numbers, as `1.0.0`: raise the first when a bound is tightened",
        )
        .at_if(version.at.as_ref(), "not MAJOR.MINOR.PATCH"),
    );
    None
}

/// Reports ids that are used twice and gives all with their places.
fn unique_ids<'a>(
    noun: &str,
    ids: impl Iterator<Item = &'a Put<String>>,
    findings: &mut Findings,
) -> BTreeMap<String, At> {
    let mut known: BTreeMap<String, At> = BTreeMap::new();
    for id in ids {
        let Some(at) = &id.at else { continue };
        match known.get(&id.value) {
            None => {
                known.insert(id.value.clone(), at.clone());
            }
            Some(first) => findings.push(
                Problem::new(
                    format!("two {noun}s have the id `{}`", id.value),
                    "give one of them another id",
                )
                .at(at, "again here")
                .at(first, "first here"),
            ),
        }
    }
    known
}

/// Every equation needs a falsifier that could prove it wrong.
fn check_tested(
    equations: &BTreeMap<String, At>,
    falsifiers: &[RawFalsifier],
    findings: &mut Findings,
) {
    // A falsifier whose equation could not be read may have been the one.
    if falsifiers.iter().any(|falsifier| falsifier.equation.is_none()) {
        return;
    }
    let tested: BTreeSet<&str> = falsifiers
        .iter()
        .filter_map(|falsifier| falsifier.equation.as_ref())
        .map(|equation| equation.value.as_str())
        .collect();
    for (id, at) in equations {
        if !tested.contains(id.as_str()) {
            findings.push(
                Problem::new(
                    format!("no falsifier tests the equation `{id}`"),
                    format!("add a `[[falsifier]]` with `equation = \"{id}\"`, or remove it"),
                )
                .at(at, "nothing could prove it wrong"),
            );
        }
    }
}

impl RawEquation {
    fn read(mut table: Fields<'_>, findings: &mut Findings) -> RawEquation {
        let id = table
            .need::<String>("id", "\"exact\"", findings)
            .and_then(|id| check_name("id", id, findings));
        let formula = table
            .need::<String>("formula", "\"device == emulated\"", findings)
            .and_then(|formula| check_text("formula", formula, findings));
        let why = table
            .need::<String>("why", "\"the reason why it holds\"", findings)
            .and_then(|why| check_text("why", why, findings));
        table.finish(findings);
        RawEquation { id, formula, why }
    }

    fn check(self) -> Option<Equation> {
        Some(Equation { id: self.id?.value, formula: self.formula?.value, why: self.why?.value })
    }
}

impl RawFalsifier {
    fn read(mut table: Fields<'_>, findings: &mut Findings) -> RawFalsifier {
        let opening = table.opening();
        let outcomes = [("structural", IfFails::Structural), ("drift", IfFails::Drift)];
        let metrics = Metric::ALL.map(|metric| (metric.name(), metric));
        let mut text = |key, example, findings: &mut Findings| {
            table
                .need::<String>(key, example, findings)
                .and_then(|text| check_text(key, text, findings))
        };
        let prediction = text("prediction", "\"what must be seen\"", findings);
        let why = text("why", "\"the derivation of the bound\"", findings);
        let equation = text("equation", "\"exact\"", findings);
        let id = table
            .need::<String>("id", "\"QKV-001\"", findings)
            .and_then(|id| check_name("id", id, findings));
        let metric = table
            .need::<String>("metric", "\"bit_mismatches\"", findings)
            .and_then(|metric| choose("metric", metric, &metrics, findings));
        let of_command = metric.as_ref().is_some_and(|metric| metric.value.of_commands_only());
        let compare = match of_command {
            true => outcome(&mut table, findings),
            false => read_compare(&mut table, findings),
        };
        let sites = if table.key_at("sites").is_some() {
            table
                .list::<String>("sites", findings)
                .and_then(|list| check_sites(list, of_command, findings))
                .map(Some)
        } else {
            // Asked for, so that it is listed among the known keys.
            table.list::<String>("sites", findings);
            Some(None)
        };
        let unless_exact = table.take::<bool>("unless_exact", findings);
        let min = table.take("min", findings);
        let max = table.take("max", findings);
        let if_fails = table
            .need::<String>("if_fails", "\"structural\"", findings)
            .and_then(|outcome| choose("if_fails", outcome, &outcomes, findings));
        table.finish(findings);
        RawFalsifier {
            opening,
            id,
            equation,
            prediction,
            compare,
            metric,
            sites,
            unless_exact,
            min,
            max,
            why,
            if_fails,
        }
    }

    fn check(self, equations: &BTreeMap<String, At>, findings: &mut Findings) -> Option<Falsifier> {
        let mut sound = true;
        let mut found = |problem: Problem| {
            findings.push(problem);
            sound = false;
        };

        if let Some(equation) = &self.equation
            && !equations.contains_key(&equation.value)
        {
            let known = equations.keys().map(String::as_str);
            let list = match equations.len() {
                0 => "add an `[[equation]]` with this id".to_owned(),
                _ => format!("the contract's equations are {}", quoted_list(known.clone())),
            };
            found(
                Problem::new(
                    format!("there is no equation `{}`", short(&equation.value)),
                    suggest(&equation.value, known, &list),
                )
                .at_if(equation.at.as_ref(), "unknown equation"),
            );
        }
        self.check_bounds().into_iter().for_each(&mut found);
        self.check_compare().into_iter().for_each(&mut found);
        if let (Some(metric), Some(Some(sites))) = (&self.metric, &self.sites)
            && metric.value.of_logits_only()
            && !sites.iter().any(|site| sites::names(&site.value, "logits"))
        {
            found(
                Problem::new(
                    format!("`{}` only exists at `logits`", metric.value),
                    "write `sites = [\"logits\"]`, or leave `sites` out",
                )
                .at_if(metric.at.as_ref(), "a metric of logits")
                .at_if(sites.first().and_then(|site| site.at.as_ref()), "leaves them out"),
            );
        }
        if let (Some(put), Some([_, judge]), Some(metric)) =
            (self.unless_exact.as_ref().filter(|put| put.value), &self.compare, &self.metric)
            && (!matches!(judge.value, Stream::Anchored(_) | Stream::Arm(Arm::Reference))
                || metric.value == Metric::NonFinite)
        {
            found(
                Problem::new(
                    "`unless_exact` leaves sites out of a claim on what the reference says of them",
                    "judge against `reference` or `reference@` the subject, by another metric than \
                     `non_finite`, or leave the key out",
                )
                .at_if(put.at.as_ref(), "this claim would leave out what it is to see"),
            );
        }
        if !sound {
            return None;
        }
        let sites = self.sites?;
        Some(Falsifier {
            id: self.id?.value,
            equation: self.equation?.value,
            prediction: self.prediction?.value,
            compare: self.compare?.map(|stream| stream.value),
            metric: self.metric?.value,
            sites: sites.map(|list| list.into_iter().map(|site| site.value).collect()),
            unless_exact: self.unless_exact.is_some_and(|put| put.value),
            min: self.min.map(|bound| bound.value),
            max: self.max.map(|bound| bound.value),
            why: self.why?.value,
            if_fails: self.if_fails?.value,
        })
    }

    /// The bounds must be numbers that some measure could break, and some keep.
    fn check_bounds(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (key, bound) in [("min", &self.min), ("max", &self.max)] {
            if let Some(bound) = bound
                && !bound.value.is_finite()
            {
                problems.push(
                    Problem::new(
                        format!("`{key} = {}` is no bound", bound.value),
                        "write a finite number, or leave the key out where that side is open",
                    )
                    .at_if(bound.at.as_ref(), "not a finite number"),
                );
            }
        }
        if !problems.is_empty() {
            return problems;
        }
        let Some(metric) = &self.metric else { return problems };
        let (lowest, highest) = metric.value.range();
        let range = match (lowest.is_finite(), highest.is_finite()) {
            (true, true) => format!("`{}` lies between {lowest} and {highest}", metric.value),
            _ => format!("`{}` is never below {lowest}", metric.value),
        };
        match (&self.min, &self.max) {
            (None, None) => problems.push(
                Problem::new(
                    "the falsifier has no bound",
                    "add `max`, `min` or both: without a bound it can never fail",
                )
                .at(&self.opening, "cannot fail"),
            ),
            (Some(min), Some(max)) if min.value > max.value => problems.push(
                Problem::new(
                    format!("`min = {}` is above `max = {}`", min.value, max.value),
                    "swap them, or correct one: no measure could lie between",
                )
                .at_if(min.at.as_ref(), "the lower bound")
                .at_if(max.at.as_ref(), "the upper bound"),
            ),
            _ => {
                for (key, bound, never_passes) in [
                    ("min", &self.min, self.min.as_ref().is_some_and(|min| min.value > highest)),
                    ("max", &self.max, self.max.as_ref().is_some_and(|max| max.value < lowest)),
                ] {
                    if let Some(bound) = bound
                        && never_passes
                    {
                        problems.push(
                            Problem::new(
                                format!("`{key} = {}` can never be met", bound.value),
                                format!("correct the bound: {range}"),
                            )
                            .at_if(bound.at.as_ref(), "out of the metric's range"),
                        );
                    }
                }
                let min_bites = self.min.as_ref().is_some_and(|min| min.value > lowest);
                let max_bites = self.max.as_ref().is_some_and(|max| max.value < highest);
                if !min_bites && !max_bites {
                    let at = self.max.as_ref().or(self.min.as_ref());
                    problems.push(
                        Problem::new(
                            "the falsifier can never fail",
                            format!("tighten the bound: {range}"),
                        )
                        .at_if(at.and_then(|bound| bound.at.as_ref()), "every value keeps it"),
                    );
                }
            }
        }
        problems
    }

    /// The two streams must be comparable, and comparable by this metric.
    fn check_compare(&self) -> Vec<Problem> {
        let Some([subject, judge]) = &self.compare else { return Vec::new() };
        let (a, b) = (subject.value, judge.value);
        let mut problems = Vec::new();

        if let Stream::Anchored(arm) | Stream::Predicted(arm) = b
            && a != Stream::Arm(arm)
        {
            let problem = if a == b {
                Problem::new(
                    format!("`{b}` is compared with itself"),
                    format!("write `compare = [\"{arm}\", \"{b}\"]`"),
                )
            } else {
                Problem::new(
                    format!("`{b}` does not go with `{a}`"),
                    format!("it is computed on the inputs of `{arm}`: compare it with `{arm}`"),
                )
            };
            problems.push(problem.at_if(judge.at.as_ref(), "other inputs"));
        } else if rank(a) < rank(b) {
            problems.push(
                Problem::new(
                    "the streams are in the wrong order",
                    format!("write `compare = [\"{b}\", \"{a}\"]`: first the subject, then what it is judged against"),
                )
                .at_if(subject.at.as_ref(), "the more trusted one"),
            );
        }

        let Some(metric) = &self.metric else { return problems };
        let needs_floor = metric.value.reads_floor();
        let against_reference =
            matches!(b, Stream::Arm(Arm::Reference) | Stream::Anchored(_)) && a != b;
        if problems.is_empty() && needs_floor && !against_reference {
            problems.push(
                Problem::new(
                    format!("`{}` needs the reference as second stream", metric.value),
                    "its floor is the distance that rounding puts between an arm and the \
                     reference; compare two other streams by `bit_mismatches`",
                )
                .at_if(metric.at.as_ref(), "has no floor here")
                .at_if(judge.at.as_ref(), "not the reference"),
            );
        }
        problems
    }
}

/// The more trusted stream ranks lower and stands second.
fn rank(stream: Stream) -> usize {
    Stream::ALL.iter().position(|known| *known == stream).unwrap_or(Stream::ALL.len())
}

/// A command's outcome is held against nothing but the bound.
fn outcome(table: &mut Fields<'_>, findings: &mut Findings) -> Option<[Put<Stream>; 2]> {
    if let Some(at) = table.key_at("compare") {
        table.list::<String>("compare", findings);
        findings.push(
            Problem::new(
                "`compare` has no use beside a metric of commands",
                "remove `compare`: an exit status or a count is held against the bound alone",
            )
            .at(&at, "nothing to compare"),
        );
        return None;
    }
    // Asked for, so that it is listed among the known keys.
    table.list::<String>("compare", findings);
    Some([Put::unwritten(Stream::OUTCOME), Put::unwritten(Stream::OUTCOME)])
}

fn read_compare(table: &mut Fields<'_>, findings: &mut Findings) -> Option<[Put<Stream>; 2]> {
    let list = table.need_list::<String>("compare", "[\"device\", \"emulated\"]", findings)?;
    let names: Vec<(String, Stream)> =
        Stream::ALL.map(|stream| (stream.to_string(), stream)).into_iter().collect();
    let choices: Vec<(&str, Stream)> =
        names.iter().map(|(name, stream)| (name.as_str(), *stream)).collect();
    let count = list.value.len();
    if count != 2 {
        findings.push(
            Problem::new(
                format!("`compare` has {count} streams"),
                "name two: first the subject, then what it is judged against",
            )
            .at_if(list.at.as_ref(), "expected two streams"),
        );
        return None;
    }
    let streams: Vec<Put<Stream>> = list
        .value
        .into_iter()
        .filter_map(|name| choose("compare", name, &choices, findings))
        .collect();
    streams.try_into().ok()
}

fn check_sites(
    list: Put<Vec<Put<String>>>,
    of_command: bool,
    findings: &mut Findings,
) -> Option<Vec<Put<String>>> {
    if list.value.is_empty() {
        findings.push(
            Problem::new("`sites` is empty", "leave the key out to judge every site")
                .at_if(list.at.as_ref(), "no site could fail"),
        );
        return None;
    }
    let known = sites::every();
    let mut sound = true;
    for pattern in &list.value {
        let partial = pattern.value.split('.').any(|part| part.contains('*') && part != "*");
        let problem = if partial {
            Problem::new(
                format!("`{}` has a `*` within a name", short(&pattern.value)),
                "`*` stands for one whole part between dots, as in `blk.*.ffn_down`",
            )
            .at_if(pattern.at.as_ref(), "not a whole part")
        } else if !of_command && !known.iter().any(|made| made.meets(&pattern.value)) {
            let shown: Vec<String> = known.iter().map(|made| made.pattern()).collect();
            let list = format!("the sites are {}", quoted_list(&shown));
            Problem::new(
                format!("no site is called `{}`", short(&pattern.value)),
                suggest(&pattern.value, shown.iter().map(String::as_str), &list),
            )
            .at_if(pattern.at.as_ref(), "names nothing")
        } else {
            continue;
        };
        findings.push(problem);
        sound = false;
    }
    sound.then_some(list.value)
}
