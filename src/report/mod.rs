//! Sinks: what a run shows while it goes on, and what it leaves behind.
//!
//! They read events and the run's record; they compute nothing. Stdout is data
//! (the table, or run.json); progress goes to stderr.

mod commands;
mod html;
mod layers;
mod log;
mod progress;
mod table;

pub use html::page;
pub use log::EventLog;
pub use progress::{Bars, Lines};
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
