//! Figures in the page: each says where in run.json it stands.
//!
//! `data-at` is a JSON pointer (RFC 6901), so that a reader or a test finds the
//! number behind the digits.

use maud::{Markup, html};

use crate::text::{grouped, number, percent};

/// A number of run.json.
pub(super) fn figure(value: f64, at: &str) -> Markup {
    html! { data value=(format!("{value:?}")) data-at=(at) { (shown(value)) } }
}

/// A share of run.json, in per cent.
pub(super) fn figure_share(value: f64, at: &str) -> Markup {
    html! { data value=(format!("{value:?}")) data-at=(at) { (shown_share(value)) } }
}

/// A share as the page shows it.
pub(super) fn shown_share(value: f64) -> String {
    if value.is_finite() { percent(value) } else { "not finite".to_owned() }
}

/// A number as the page shows it.
pub(super) fn shown(value: f64) -> String {
    if !value.is_finite() {
        return "not finite".to_owned();
    }
    if value.fract() == 0.0 && (0.0..1e15).contains(&value) {
        return grouped(value as usize);
    }
    number(value)
}
