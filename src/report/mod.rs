//! Sinks: what a run shows while it goes on, and what it leaves behind.
//!
//! They read events and the run's record; they compute nothing. Stdout is data
//! (the table, or run.json); progress goes to stderr.

mod arrow;
mod commands;
mod csv;
mod diff;
mod github;
mod html;
mod junit;
mod layers;
mod log;
mod places;
mod progress;
mod rows;
mod sarif;
mod sparkline;
mod table;

pub use arrow::arrow;
pub use csv::csv;
pub use diff::{
    CODE, Change, IDENTITIES, diff, diff_json, diff_text, of_definition, of_environment,
    other_sites,
};
pub use github::{annotations, markdown};
pub use html::{diff_page, document, page, symbol, verdict};
pub use junit::junit;
pub use log::EventLog;
pub use progress::{Bars, Lines};
pub use sarif::sarif;
pub use sparkline::{drift, is_of_drift};
pub use table::table;

use crate::event::{Event, Sink};

/// Several sinks as one.
pub struct Sinks(pub Vec<Box<dyn Sink>>);

impl Sink for Sinks {
    fn event(&mut self, event: &Event) {
        for sink in &mut self.0 {
            sink.event(event);
        }
    }
}
