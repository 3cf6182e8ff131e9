//! `[for]`: one manifest that stands for many, one for each combination of values.
//!
//! `"{layer}"` alone becomes the value itself, a number or a table; within a
//! longer text it becomes the value's text. The members' ids are the family's id
//! with the values after it. It knows no key of a stage but `id` and `title`.

use std::borrow::Cow;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{At, Findings, Problem, quoted_list};
use super::stage::RawStage;
use crate::op::StageId;

/// The most members of one family.
const MOST: usize = 1000;

/// A manifest after its `[for]` was carried out.
pub(super) struct Member<'text> {
    pub table: DeTable<'text>,
    /// The family's id; a manifest without `[for]` has none.
    pub family: Option<StageId>,
}

/// One variable with its values.
struct Variable<'text> {
    name: String,
    at: At,
    values: Vec<DeValue<'text>>,
}

/// The manifests that a table stands for; none where its `[for]` is wrong.
pub(super) fn expand<'text>(
    mut table: DeTable<'text>,
    source: usize,
    findings: &mut Findings,
) -> Vec<Member<'text>> {
    let Some((key, written)) = table.remove_entry("for") else {
        return vec![Member { table, family: None }];
    };
    let opening = At { source, span: key.span() };
    let Some(variables) = read_variables(written, source, &opening, findings) else {
        return Vec::new();
    };
    let mut sound = true;
    for variable in &variables {
        if !mentions(&DeValue::Table(table.clone()), &variable.name) {
            let name = &variable.name;
            findings.push(
                Problem::new(
                    format!("`{name}` of `[for]` is used nowhere"),
                    format!("write `{{{name}}}` where its value belongs, or remove it"),
                )
                .at(&variable.at, "every member would be the same"),
            );
            sound = false;
        }
    }
    let id = table.get("id").and_then(|id| id.get_ref().as_str()).map(str::to_owned);
    if let Some(text) = id.as_deref().filter(|id| id.contains('{')) {
        let span = table.get("id").map(|id| id.span()).unwrap_or_default();
        findings.push(
            Problem::new(
                format!("the id `{text}` holds a variable"),
                "write a plain id: each member's is that id with its values after it",
            )
            .at(&At { source, span }, "the family's id"),
        );
        sound = false;
    }
    if !sound {
        return Vec::new();
    }
    let counts: Vec<usize> = variables.iter().map(|variable| variable.values.len()).collect();
    let count = counts.iter().try_fold(1usize, |all, &count| all.checked_mul(count));
    let Some(count) = count.filter(|&count| count <= MOST) else {
        findings.push(
            Problem::new(
                "the family has too many members",
                format!("split it: at most {MOST} combinations in one manifest"),
            )
            .at(&opening, "all combinations of these"),
        );
        return Vec::new();
    };
    let family = id.map(StageId);
    (0..count)
        .map(|number| {
            let chosen = choose(&variables, number);
            Member { table: member(&table, &chosen), family: family.clone() }
        })
        .collect()
}

fn read_variables<'text>(
    written: Spanned<DeValue<'text>>,
    source: usize,
    opening: &At,
    findings: &mut Findings,
) -> Option<Vec<Variable<'text>>> {
    let wrong = |at: &At, findings: &mut Findings| {
        findings.push(
            Problem::new(
                "`[for]` is no table of lists",
                "write each variable with its values, as `layer = [0, 13, 27]`",
            )
            .at(at, "expected lists"),
        );
    };
    let DeValue::Table(table) = written.into_inner() else {
        wrong(opening, findings);
        return None;
    };
    let mut variables = Vec::new();
    // In the order written: the first varies slowest.
    let mut entries: Vec<_> = table.into_iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let at = At { source, span: key.span() };
        let DeValue::Array(array) = value.into_inner() else {
            wrong(&at, findings);
            return None;
        };
        let values: Vec<DeValue<'text>> =
            array.into_iter().map(|value| value.into_inner()).collect();
        if values.is_empty() {
            findings.push(
                Problem::new(
                    format!("`{}` of `[for]` has no value", key.get_ref()),
                    "list at least one value: a family without members proves nothing",
                )
                .at(&at, "no member"),
            );
            return None;
        }
        variables.push(Variable { name: key.get_ref().to_string(), at, values });
    }
    if variables.is_empty() {
        wrong(opening, findings);
        return None;
    }
    Some(variables)
}

/// The values of one member: name, value, and its place among the values.
fn choose<'v, 'text>(
    variables: &'v [Variable<'text>],
    mut number: usize,
) -> Vec<(&'v str, &'v DeValue<'text>, usize)> {
    let mut chosen = Vec::new();
    for variable in variables.iter().rev() {
        let place = number % variable.values.len();
        number /= variable.values.len();
        chosen.push((variable.name.as_str(), &variable.values[place], place));
    }
    chosen.reverse();
    chosen
}

fn member<'text>(
    table: &DeTable<'text>,
    chosen: &[(&str, &DeValue<'text>, usize)],
) -> DeTable<'text> {
    let mut table = table.clone();
    let titled = matches!(table.get("title").map(|title| title.get_ref()),
        Some(DeValue::String(title)) if title.contains('{'));
    for (_, value) in table.iter_mut() {
        substitute(value.get_mut(), chosen);
    }
    let mut append = |key: &str, text: String| {
        if let Some(DeValue::String(old)) = table.get_mut(key).map(|value| value.get_mut()) {
            *old = Cow::Owned(format!("{old}{text}"));
        }
    };
    for (_, value, place) in chosen {
        append("id", format!("-{}", in_a_name(value, *place)));
    }
    if !titled {
        let values: Vec<String> = chosen
            .iter()
            .map(|(name, value, place)| format!("{name} {}", in_a_name(value, *place)))
            .collect();
        append("title", format!(" ({})", values.join(", ")));
    }
    table
}

fn substitute<'text>(value: &mut DeValue<'text>, chosen: &[(&str, &DeValue<'text>, usize)]) {
    match value {
        DeValue::String(text) => {
            if let Some((_, whole, _)) =
                chosen.iter().find(|(name, _, _)| *text == format!("{{{name}}}").as_str())
            {
                *value = (*whole).clone();
                return;
            }
            for (name, part, place) in chosen {
                let mark = format!("{{{name}}}");
                if text.contains(&mark) {
                    *text = Cow::Owned(text.replace(&mark, &in_a_text(part, *place)));
                }
            }
        }
        DeValue::Array(array) => {
            for element in array.iter_mut() {
                substitute(element.get_mut(), chosen);
            }
        }
        DeValue::Table(table) => {
            for (_, element) in table.iter_mut() {
                substitute(element.get_mut(), chosen);
            }
        }
        _ => {}
    }
}

fn mentions(value: &DeValue<'_>, name: &str) -> bool {
    match value {
        DeValue::String(text) => text.contains(&format!("{{{name}}}")),
        DeValue::Array(array) => array.iter().any(|element| mentions(element.get_ref(), name)),
        DeValue::Table(table) => table.values().any(|element| mentions(element.get_ref(), name)),
        _ => false,
    }
}

/// A value's text; a table or a list has none, and its number stands for it.
fn in_a_text(value: &DeValue<'_>, place: usize) -> String {
    match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(truth) => truth.to_string(),
        _ => (place + 1).to_string(),
    }
}

/// The same as a part of an id.
fn in_a_name(value: &DeValue<'_>, place: usize) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let text = in_a_text(value, place);
    // A path's last part tells it apart; what is still no name becomes a dash.
    let last = text.rsplit(['/', ':']).find(|part| !part.is_empty()).unwrap_or_default();
    last.chars().map(|c| if plain(c) { c } else { '-' }).take(40).collect()
}

/// Where a stage needs a family, it needs every member.
pub(super) fn expand_needs(stages: &mut [RawStage]) {
    let members: Vec<(StageId, StageId)> = stages
        .iter()
        .filter_map(|stage| Some((stage.family.clone()?, stage.id.as_ref()?.value.clone())))
        .collect();
    let is_stage = |stages: &[RawStage], id: &StageId| {
        stages.iter().any(|stage| stage.id.as_ref().is_some_and(|own| own.value == *id))
    };
    for index in 0..stages.len() {
        let mut needs = Vec::new();
        for need in std::mem::take(&mut stages[index].needs) {
            let of_family: Vec<&StageId> = members
                .iter()
                .filter(|(family, _)| *family == need.value)
                .map(|(_, member)| member)
                .collect();
            if of_family.is_empty() || is_stage(stages, &need.value) {
                needs.push(need);
            } else {
                needs.extend(
                    of_family.into_iter().map(|member| need.clone().map(|_| member.clone())),
                );
            }
        }
        stages[index].needs = needs;
    }
}

/// An input that names a family names no stage; says so in the list of remedies.
pub(super) fn hint<'a>(stages: impl Iterator<Item = &'a RawStage>, name: &str) -> Option<String> {
    let members: Vec<&str> = stages
        .filter(|stage| stage.family.as_ref().is_some_and(|family| family.0 == name))
        .filter_map(|stage| Some(stage.id.as_ref()?.value.0.as_str()))
        .collect();
    let all = quoted_list(members.iter().copied());
    (!members.is_empty()).then(|| format!("`{name}` is a family; name one of its members: {all}"))
}
