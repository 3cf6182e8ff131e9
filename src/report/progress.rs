//! Progress on stderr: bars on a terminal, plain lines elsewhere.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

use crate::event::{Event, Sink};
use crate::op::{Arm, StageId};
use crate::record::ArmState;
use crate::terminal::tell_line;
use crate::text::one_line;

/// Between two lines about an arm that goes on, where there are no bars.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// A bar for each arm that runs.
#[derive(Default)]
pub struct Bars {
    all: MultiProgress,
    arms: BTreeMap<(StageId, Arm), ProgressBar>,
    measuring: BTreeMap<StageId, ProgressBar>,
    queue: Option<ProgressBar>,
}

impl Bars {
    fn add(&self, message: String, length: Option<u64>) -> ProgressBar {
        let bar = self.all.add(length.map_or_else(ProgressBar::new_spinner, ProgressBar::new));
        let template = match length {
            Some(_) => "{msg:24} {wide_bar} {prefix}",
            None => "{msg:30} {spinner}  {elapsed}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(message);
        bar
    }
}

impl Sink for Bars {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Progress { stage, arm, done, total, bytes } => {
                let key = (stage.clone(), *arm);
                if !self.arms.contains_key(&key) {
                    let bar = self.add(format!("{stage}  {arm}"), Some(*total));
                    self.arms.insert(key.clone(), bar);
                }
                let bar = &self.arms[&key];
                bar.set_position(*done);
                bar.set_prefix(pace((*done, *total), *bytes, bar.elapsed()));
            }
            Event::ArmFinished { stage, arm, .. } => {
                if let Some(bar) = self.arms.remove(&(stage.clone(), *arm)) {
                    bar.finish_and_clear();
                }
                if let Some(line) = reason(event) {
                    // Above the bars, where it stays; a terminal that is gone shows nothing.
                    let _ = self.all.println(line);
                }
            }
            Event::Measuring { stage } => {
                let bar = self.add(format!("{stage}  measuring"), None);
                bar.enable_steady_tick(Duration::from_millis(100));
                self.measuring.insert(stage.clone(), bar);
            }
            Event::StageJudged { stage, .. } => {
                if let Some(bar) = self.measuring.remove(stage) {
                    bar.finish_and_clear();
                }
            }
            Event::Job { .. } => {
                if let Some(line) = of_job(event) {
                    let _ = self.all.println(line);
                }
            }
            Event::Queue { waiting, running, done, why } => {
                let bar = self.queue.take().unwrap_or_else(|| self.add(String::new(), None));
                bar.enable_steady_tick(Duration::from_millis(100));
                bar.set_message(queue(*waiting, *running, *done, why));
                if waiting + running == 0 {
                    bar.finish_and_clear();
                } else {
                    self.queue = Some(bar);
                }
            }
            Event::RunStarted { .. } | Event::ArmStarted { .. } | Event::RunFinished { .. } => {}
        }
    }
}

/// A line for everything that ends, and now and then one for what takes long.
#[derive(Default)]
pub struct Lines {
    /// When each arm that runs began, and when a line last told of it.
    running: BTreeMap<(StageId, Arm), (Instant, Instant)>,
    /// When a line last told of a scheduler's queue.
    queue: Option<Instant>,
}

impl Sink for Lines {
    fn event(&mut self, event: &Event) {
        match event {
            Event::ArmStarted { stage, arm } => {
                let now = Instant::now();
                self.running.insert((stage.clone(), *arm), (now, now));
            }
            Event::Progress { stage, arm, done, total, bytes } => {
                let Some((began, told)) = self.running.get_mut(&(stage.clone(), *arm)) else {
                    return;
                };
                if told.elapsed() >= BETWEEN_LINES {
                    *told = Instant::now();
                    let pace = pace((*done, *total), *bytes, began.elapsed());
                    tell_line(&format!("{stage}  {:9}  {pace}", arm.name()));
                }
            }
            Event::ArmFinished { stage, arm, .. } => {
                self.running.remove(&(stage.clone(), *arm));
                if let Some(line) = reason(event) {
                    tell_line(&line);
                }
            }
            Event::StageJudged { stage, verdict, .. } => {
                tell_line(&format!("{stage}  judged     {verdict}"));
            }
            Event::Job { .. } => {
                if let Some(line) = of_job(event) {
                    tell_line(&line);
                }
            }
            Event::Queue { waiting, running, done, why } => {
                let told = self.queue.get_or_insert_with(Instant::now);
                if told.elapsed() >= BETWEEN_LINES {
                    *told = Instant::now();
                    tell_line(&queue(*waiting, *running, *done, why));
                }
            }
            _ => {}
        }
    }
}

/// How far an arm is, how fast, and how long the rest takes if it goes on like this.
fn pace((done, total): (u64, u64), bytes: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let mut text = format!("{done}/{total} sites  {}", HumanBytes(bytes));
    if seconds > 0.0 && done > 0 {
        let rate = HumanBytes((bytes as f64 / seconds) as u64);
        // Repeats and steps that were not foreseen leave nothing to wait for.
        let left = seconds * total.saturating_sub(done) as f64 / done as f64;
        text += &format!("  {rate}/s  {} left", duration(left));
    }
    text
}

fn duration(seconds: f64) -> String {
    match seconds.round() as u64 {
        s if s < 100 => format!("{s} s"),
        s if s < 6000 => format!("{} min", s.div_ceil(60)),
        s => format!("{:.1} h", s as f64 / 3600.0),
    }
}

/// What became of an arm, and why: the line that every run prints for it.
fn reason(event: &Event) -> Option<String> {
    let Event::ArmFinished { stage, arm, state, why, seconds } = event else { return None };
    let what = match state {
        ArmState::Ran => format!("ran in {seconds:.2} s: {why}"),
        ArmState::Reused => why.clone(),
        ArmState::Unmeasured => format!("unmeasured: {why}"),
        ArmState::Error => format!("error: {why}"),
        ArmState::Blocked => format!("blocked: {why}"),
    };
    Some(format!("{stage}  {:9}  {}", arm.name(), one_line(&what)))
}

/// The line of a job that a person may want to know of; each begin and end stands in the log
/// alone.
fn of_job(event: &Event) -> Option<String> {
    let Event::Job { job, state, node, why } = event else { return None };
    if state == "running" {
        return None;
    }
    let job = if job.is_empty() { String::new() } else { format!(" job {job}") };
    let node = node.as_ref().map_or(String::new(), |node| format!(" on {node}"));
    Some(one_line(&match state.as_str() {
        // What its programs printed.
        "said" => format!("slurm{job}{node}: {why}"),
        state => format!("slurm{job}{node} {state}: {why}"),
    }))
}

fn queue(waiting: usize, running: usize, done: usize, why: &str) -> String {
    let why = match why {
        "" | "None" => String::new(),
        why => format!(" ({why})"),
    };
    format!("slurm  {waiting} waiting{why}, {running} running, {done} done")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_what_was_done() {
        let text = pace((10, 40), 10 << 20, Duration::from_secs(5));
        assert_eq!(text, "10/40 sites  10.00 MiB  2.00 MiB/s  15 s left");
        assert_eq!(pace((0, 40), 0, Duration::ZERO), "0/40 sites  0 B");
        assert!(pace((50, 40), 1024, Duration::from_secs(1)).ends_with("0 s left"));
        let slow = pace((1, 91), 1 << 30, Duration::from_secs(60));
        assert!(slow.ends_with("90 min left"), "{slow}");
    }
}
