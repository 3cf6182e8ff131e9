//! Progress on stderr: bars on a terminal, plain lines elsewhere.

use std::collections::BTreeMap;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::event::{Event, Sink};
use crate::op::{Arm, StageId};
use crate::record::ArmState;

/// A bar for each arm that runs.
#[derive(Default)]
pub struct Bars {
    all: MultiProgress,
    arms: BTreeMap<(StageId, Arm), ProgressBar>,
    measuring: BTreeMap<StageId, ProgressBar>,
}

impl Bars {
    fn add(&self, message: String, length: Option<u64>) -> ProgressBar {
        let bar = self.all.add(length.map_or_else(ProgressBar::new_spinner, ProgressBar::new));
        let template = match length {
            Some(_) => "{msg:30} {bar:30} {pos}/{len} sites  {elapsed}",
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
            Event::Progress { stage, arm, done, total } => {
                let key = (stage.clone(), *arm);
                if !self.arms.contains_key(&key) {
                    let bar = self.add(format!("{stage}  {arm}"), Some(*total));
                    self.arms.insert(key.clone(), bar);
                }
                self.arms[&key].set_position(*done);
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
                bar.enable_steady_tick(std::time::Duration::from_millis(100));
                self.measuring.insert(stage.clone(), bar);
            }
            Event::StageJudged { stage, .. } => {
                if let Some(bar) = self.measuring.remove(stage) {
                    bar.finish_and_clear();
                }
            }
            Event::RunStarted { .. } | Event::ArmStarted { .. } | Event::RunFinished { .. } => {}
        }
    }
}

/// A line for everything that ends.
#[derive(Default)]
pub struct Lines;

impl Sink for Lines {
    fn event(&mut self, event: &Event) {
        match event {
            Event::ArmFinished { .. } => {
                if let Some(line) = reason(event) {
                    eprintln!("{line}");
                }
            }
            Event::StageJudged { stage, verdict, .. } => eprintln!("{stage}  judged     {verdict}"),
            _ => {}
        }
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
    Some(format!("{stage}  {arm:9}  {what}"))
}
