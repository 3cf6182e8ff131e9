//! events.jsonl: one line per event, with the seconds since the start.

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use crate::event::{Event, Sink};

/// Writes events to a file as they happen.
pub struct EventLog {
    file: File,
    started: Instant,
    failed: bool,
}

impl EventLog {
    /// A log into `file`.
    pub fn new(file: File) -> EventLog {
        EventLog { file, started: Instant::now(), failed: false }
    }
}

impl Sink for EventLog {
    fn event(&mut self, event: &Event) {
        if self.failed || matches!(event, Event::Progress { .. } | Event::Queue { .. }) {
            return;
        }
        let mut write = || {
            let mut json = serde_json::to_value(event)?;
            json["seconds_since_start"] = self.started.elapsed().as_secs_f64().into();
            // In one piece, so that a reader sees whole lines.
            self.file.write_all(format!("{json}\n").as_bytes())
        };
        if let Err(error) = write() {
            self.failed = true;
            tracing::warn!("events.jsonl ends here: {error}");
        }
    }
}
