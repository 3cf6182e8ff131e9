//! `runner model compare A B`: whether two forms of a model are the same function.

use std::path::Path;

use super::print;
use crate::compare::models::{Found, Models, compare};
use crate::model::Model;
use crate::text::shown;

/// Names that a line lists.
const SHOWN: usize = 5;

/// Prints what differs, and ends with 1 where anything does.
pub(super) fn same(first: &Path, second: &Path) -> Result<u8, String> {
    let [a, b] = [first, second].map(|path| Model::open(path).map_err(|error| error.to_string()));
    let (a, b) = (a?, b?);
    let found = compare(&a, &b).map_err(|error| error.to_string())?;
    print(&told(&found))?;
    Ok(u8::from(!found.are_same()))
}

fn told(found: &Models) -> String {
    let mut lines: Vec<String> = Vec::new();
    for (name, [a, b]) in &found.settings {
        lines.push(format!("setting    {name}: {a} in the first, {b} in the second"));
    }
    for (place, names) in ["first", "second"].into_iter().zip(&found.alone) {
        if !names.is_empty() {
            let some = names.iter().take(SHOWN).map(|name| shown(name)).collect::<Vec<_>>();
            let more = names.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            lines.push(format!("tensor     {}{more}: in the {place} alone", some.join(", ")));
        }
    }
    let (mut same, mut rounded, mut worst) = (0, 0, 0.0);
    for pair in &found.tensors {
        match &pair.found {
            Found::Same => same += 1,
            Found::Rounded(off) => {
                rounded += 1;
                worst = if *off > worst { *off } else { worst };
            }
            Found::Differs(what) => {
                let [a, b] = pair.kinds;
                let kinds = if a == b { a.to_string() } else { format!("{a} and {b}") };
                lines.push(format!("tensor     {} ({kinds}): {what}", shown(&pair.name)));
            }
        }
    }
    for (text, place) in &found.texts {
        lines.push(format!("text       {text:?}: other tokens, from token {place} on"));
    }
    let all = found.tensors.len();
    lines.push(match rounded {
        0 => format!("{same} of {all} tensors have the same values"),
        _ => format!(
            "{same} of {all} tensors have the same values, and {rounded} the same but for rounding \
             (at most {:.2} % of their size)",
            100.0 * f64::sqrt(worst)
        ),
    });
    lines.push(match &found.no_texts {
        Some(why) => format!("texts were not compared: {why}"),
        None if found.texts.is_empty() => "the same text gives the same tokens".to_owned(),
        None => "the same text gives other tokens".to_owned(),
    });
    lines.push(match found.are_same() {
        true => "the two are the same function".to_owned(),
        false => "the two are not the same function".to_owned(),
    });
    lines.join("\n") + "\n"
}
