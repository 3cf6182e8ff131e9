//! junit.xml: a suite per stage, a case per falsifier, and one for the verdict.
//!
//! A falsifier without a value is skipped; that alone would read as success, so
//! the stage's verdict is a case of its own, which only `pass` passes.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::record::{RunRecord, StageRecord};
use crate::text::number;
use crate::verdict::{Judgement, Outcome, Verdict};

/// A run as JUnit has it.
///
/// # Errors
/// If the text cannot be encoded as XML.
pub fn junit(run: &RunRecord) -> Result<String, quick_junit::SerializeError> {
    let mut report = Report::new(format!("runner {}", run.id));
    report.set_time(seconds(run.seconds));
    for stage in &run.stages {
        let mut suite = TestSuite::new(stage.id.0.clone());
        suite.set_time(seconds(stage.seconds));
        suite.add_property(("title", stage.title.as_str()));
        suite.add_property(("model", stage.model.as_str()));
        suite.add_test_cases(stage.judgements.iter().map(|judgement| case(stage, judgement)));
        suite.add_test_case(verdict(stage));
        report.add_test_suite(suite);
    }
    report.to_string()
}

fn case(stage: &StageRecord, judgement: &Judgement) -> TestCase {
    let status = match judgement.outcome {
        Outcome::Held => TestCaseStatus::success(),
        Outcome::Falsified => {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_type(format!("{:?}", judgement.if_fails).to_lowercase());
            status.set_message(measured(judgement));
            status.set_description(judgement.why.clone());
            status
        }
        Outcome::Unmeasured => {
            let mut status = TestCaseStatus::skipped();
            status.set_message(judgement.reason.as_deref().unwrap_or("no value"));
            status
        }
    };
    let mut case =
        TestCase::new(format!("{}: {}", judgement.falsifier, judgement.prediction), status);
    case.set_classname(format!("{}.{}", stage.contract[0], stage.id));
    case.set_time(Duration::ZERO);
    case
}

fn verdict(stage: &StageRecord) -> TestCase {
    let kind = match stage.verdict {
        Verdict::Pass => None,
        Verdict::Drift | Verdict::Structural => Some(NonSuccessKind::Failure),
        Verdict::Unmeasured | Verdict::Blocked | Verdict::Error => Some(NonSuccessKind::Error),
    };
    let status = match kind {
        None => TestCaseStatus::success(),
        Some(kind) => {
            let mut status = TestCaseStatus::non_success(kind);
            status.set_type(stage.verdict.name());
            status.set_message(stage.why.clone());
            status
        }
    };
    let mut case = TestCase::new("verdict", status);
    case.set_classname(format!("{}.{}", stage.contract[0], stage.id));
    case.set_time(seconds(stage.seconds));
    case
}

/// What a falsifier found, in one line.
pub(super) fn measured(judgement: &Judgement) -> String {
    let [subject, judge] = judgement.compare;
    let value = judgement.value.map_or("no value".to_owned(), number);
    let site = judgement.site.as_ref().map_or(String::new(), |site| format!(" at {site}"));
    let bound = match judgement.bounds() {
        (Some(min), Some(max)) => format!("{} to {}", number(min), number(max)),
        (Some(min), None) => format!("at least {}", number(min)),
        (None, Some(max)) => format!("at most {}", number(max)),
        (None, None) => "none".to_owned(),
    };
    format!("{} of {subject} against {judge}{site} is {value}, bound: {bound}", judgement.metric)
}

/// A duration that another writer may have made negative or not finite.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
