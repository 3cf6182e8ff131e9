//! `runner model compare A B`: whether two forms of a model are the same function.

use std::path::Path;

use super::{print, store_of};
use crate::cache::Stamps;
use crate::compare::models::{Found, Models, compare};
use crate::manifest::problem::plural;
use crate::plan::open_model;
use crate::text::{one_line, shown};

/// Names that a line lists.
const SHOWN: usize = 5;

/// The seed that a stage has unless it says otherwise.
const SEED: u64 = 1;

/// Prints what differs, and ends with 1 where anything does.
pub(super) fn same(models: [&str; 2], runs: &Path) -> Result<u8, String> {
    let (store, stamps) = (store_of(runs), Stamps::forgetful());
    let [a, b] = models.map(|source| open_model(source, SEED, &store, &stamps));
    let (a, b) = (a?, b?);
    let found = compare(&a.model, &b.model).map_err(|error| error.to_string())?;
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
    let scale = |scale: &Option<f32>| scale.map_or("none".to_owned(), |scale| scale.to_string());
    for (name, [a, b]) in &found.input_scales {
        lines.push(format!(
            "tensor     {}: the scale of its activations is {} in the first, {} in the second",
            shown(name),
            scale(a),
            scale(b)
        ));
    }
    for (text, place) in &found.texts {
        lines.push(format!("text       {text:?}: other tokens, from token {place} on"));
    }
    for (chat, what) in &found.chats {
        lines.push(format!("chat       {chat}: {}", one_line(what)));
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
    if found.input_scales_of_one > 0 {
        lines.push(format!(
            "scales of activations of {} were not compared: one form holds codes, and the other values",
            plural(found.input_scales_of_one, "weight")
        ));
    }
    if let Some(why) = &found.no_chats {
        lines.push(format!("chat templates were not compared: {}", one_line(why)));
    }
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
