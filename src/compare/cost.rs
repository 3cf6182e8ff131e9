//! What the work of a verdict takes: seconds of each part of a stage's measures.
//!
//! A part is done once for all claims that read it, so a claim's cost is what it reads, not what
//! it would save if it were left out.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::metric::Metric;
use crate::op::{Arm, Stream};

/// A part of a stage's measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Whole passes of the reference whose roundings are drawn anew.
    DrawnPasses,
    /// The reference and the floors on an arm's own inputs, site by site.
    OwnInputs,
    /// The kernels of an engine on an arm's own inputs.
    Kernels,
    /// The reference on an arm's own residual stream, layer by layer.
    Layers,
    /// Numbers of tensors that are at hand.
    Comparisons,
    /// What is looked at where a claim falls.
    Diagnosis,
}

impl Part {
    /// The part in words.
    pub fn in_words(self) -> &'static str {
        match self {
            Part::DrawnPasses => "passes of the reference with drawn roundings",
            Part::OwnInputs => "the reference and the floors on its own inputs",
            Part::Kernels => "the engine's kernels on its own inputs",
            Part::Layers => "the reference on its residual stream, for the growth of its drift",
            Part::Comparisons => "comparisons of tensors",
            Part::Diagnosis => "the diagnosis",
        }
    }

    /// Whether a claim about `metric` of a pair of streams reads this part of that subject.
    /// `whole_pass` says that of the stage's pass the logits alone are known.
    pub fn is_read(
        self,
        of: Option<Stream>,
        [subject, judge]: [Stream; 2],
        metric: Metric,
        whole_pass: bool,
    ) -> bool {
        if of.is_some_and(|of| of != subject) {
            return false;
        }
        match self {
            Part::Comparisons => true,
            Part::OwnInputs => match judge {
                Stream::Anchored(_) => true,
                Stream::Arm(Arm::Reference) => metric.reads_floor() && !whole_pass,
                _ => false,
            },
            Part::DrawnPasses => metric.reads_drawn(),
            Part::Kernels => matches!(judge, Stream::Predicted(_)),
            Part::Layers | Part::Diagnosis => false,
        }
    }
}

/// The seconds that a part took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// The part.
    pub part: Part,
    /// The arm that it was done for; nothing where it was done for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Stream>,
    /// By the clock, with all threads of the stage.
    pub seconds: f64,
}

/// Notes what parts take.
#[derive(Debug, Default)]
pub struct Ledger(Vec<Cost>);

impl Ledger {
    /// Does a part of the work.
    pub fn time<T>(&mut self, part: Part, subject: Option<Stream>, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let made = work();
        self.add(part, subject, began.elapsed().as_secs_f64());
        made
    }

    /// Notes seconds beside those of the same part.
    fn add(&mut self, part: Part, subject: Option<Stream>, seconds: f64) {
        let same = |cost: &&mut Cost| (cost.part, cost.subject) == (part, subject);
        match self.0.iter_mut().find(same) {
            Some(cost) => cost.seconds += seconds,
            None => self.0.push(Cost { part, subject, seconds }),
        }
    }

    /// Everything noted, in the order in which it was begun.
    pub fn costs(self) -> Vec<Cost> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_reads_the_parts_of_its_own_subject() {
        let device = Stream::Arm(Arm::Device);
        let emulated = Stream::Arm(Arm::Emulated);
        let own = |of, pair, metric| Part::OwnInputs.is_read(Some(of), pair, metric, true);
        let anchored = [device, Stream::Anchored(Arm::Device)];
        assert!(own(device, anchored, Metric::ZRms));
        assert!(!own(emulated, anchored, Metric::ZRms), "another arm's");
        let reference = [device, Stream::Arm(Arm::Reference)];
        assert!(!own(device, reference, Metric::ZRms), "a whole pass has no local floor");
        assert!(Part::OwnInputs.is_read(Some(device), reference, Metric::ZRms, false));
        assert!(!Part::OwnInputs.is_read(Some(device), reference, Metric::Nmse, false));
        assert!(Part::DrawnPasses.is_read(None, reference, Metric::DriftRatio, true));
        assert!(!Part::DrawnPasses.is_read(None, reference, Metric::Kl, true));
        assert!(!Part::Layers.is_read(Some(device), reference, Metric::ZRms, true));
    }

    #[test]
    fn seconds_of_one_part_add_up() {
        let mut ledger = Ledger::default();
        let subject = Some(Stream::Arm(Arm::Device));
        ledger.add(Part::Comparisons, subject, 1.0);
        ledger.add(Part::Comparisons, None, 4.0);
        ledger.add(Part::Comparisons, subject, 2.0);
        let costs = ledger.costs();
        assert_eq!(costs.iter().map(|cost| cost.seconds).collect::<Vec<_>>(), [3.0, 4.0]);
    }
}
