//! How jobs end, and how submissions are refused: what is told apart, and what may go well
//! another time.

use crate::text::shown;

/// The status of a task that does not see the shared folder.
const NO_FOLDER: &str = "66:0";
/// The status of a task that cannot use the shared cache.
pub const NO_STORE: u8 = 69;

/// What the controller no longer knows.
pub(super) const GONE: &str = "GONE";

/// How a task ended that has left items undone.
pub(super) struct Ending {
    pub words: String,
    /// What to do.
    pub help: &'static str,
    /// Whether the same may go well another time.
    pub again: bool,
    /// Whether only what it was at is to blame.
    pub spares_others: bool,
}

impl Ending {
    pub(super) fn of(state: &str, exit: &str, reason: &str) -> Ending {
        let end = |words: &str, help, again, spares_others| Ending {
            words: words.to_owned(),
            help,
            again,
            spares_others,
        };
        let signal = exit.split_once(':').map(|(_, signal)| signal).filter(|s| *s != "0");
        match state {
            "TIMEOUT" | "DEADLINE" => end(
                "its job met its time limit",
                "give it more with `time` of `[executor]`",
                false,
                true,
            ),
            "OUT_OF_MEMORY" => end(
                "its job met its limit of memory",
                "give it more with `memory` of `[resources]`",
                false,
                true,
            ),
            "NODE_FAIL" | "BOOT_FAIL" => end("its node failed", "see `sinfo -R`", true, true),
            "PREEMPTED" => end(
                "its job was preempted, and Slurm did not queue it again",
                "choose a partition or `qos` that is not preempted, or raise `retries`",
                true,
                true,
            ),
            "CANCELLED" => end(
                "somebody cancelled its job",
                "run again; results that were finished are reused",
                false,
                false,
            ),
            "FAILED" if exit == NO_FOLDER => end(
                "its node does not see the folder of runs",
                "put it, and the project, where every node has it under the same path",
                false,
                false,
            ),
            "FAILED" if exit == format!("{NO_STORE}:0") => end(
                "its node cannot use the shared cache",
                "do the nodes reach it, and have they the variables with its credentials? \
                 (docs/slurm.md says what they need)",
                true,
                true,
            ),
            "FAILED" if exit == "126:0" || exit == "127:0" => end(
                "its node cannot start the runner",
                "name the runner on the nodes with `program` of `[executor]`",
                false,
                false,
            ),
            "FAILED" => {
                let how = match signal {
                    Some(signal) => format!("the runner on its node was ended by signal {signal}"),
                    None => format!("the runner on its node ended with status {}", shown(exit)),
                };
                end(&how, "run again, or raise `retries` of `[executor]`", true, true)
            }
            "COMPLETED" => end(
                "its job ended well and left no result where this runner reads it",
                "is the folder of runs the same on every node, and its disk not full?",
                true,
                true,
            ),
            GONE => end(
                "Slurm knows its job no more",
                "run again; results that were finished are reused",
                true,
                true,
            ),
            other => end(
                &format!("its job ended as {} {}", shown(other), shown(reason)),
                "see Slurm's documentation of job states",
                true,
                true,
            ),
        }
    }
}

/// Why a task that waits will wait for ever.
pub(super) fn never_starts(state: &str, reason: &str) -> Option<Ending> {
    const NEVER: [&str; 6] = [
        "BadConstraints",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "InvalidAccount",
        "InvalidQOS",
        "DependencyNeverSatisfied",
    ];
    let held = reason.contains("launch failed requeued held") || state == "SPECIAL_EXIT";
    let waits = matches!(state, "PENDING" | "REQUEUE_HOLD" | "REQUEUED" | "SPECIAL_EXIT");
    if !waits || !(held || NEVER.contains(&reason)) {
        return None;
    }
    Some(Ending {
        words: match held {
            true => "its node could not start the job, and Slurm holds it".to_owned(),
            false => format!("Slurm will never start its job: {reason}"),
        },
        help: match held {
            true => "see `sinfo -R`, and slurmd's log on the node",
            false => "correct `[executor]` and `[resources]`",
        },
        again: held,
        spares_others: false,
    })
}

pub(super) fn has_ended(state: &str) -> bool {
    matches!(
        state,
        "COMPLETED"
            | "FAILED"
            | "TIMEOUT"
            | "CANCELLED"
            | "NODE_FAIL"
            | "BOOT_FAIL"
            | "PREEMPTED"
            | "OUT_OF_MEMORY"
            | "DEADLINE"
            | "REVOKED"
            | GONE
    )
}

/// Whether `sbatch` refused something that it may take later.
pub(super) fn is_for_now(said: &str) -> bool {
    const WORDS: [&str; 8] = [
        "temporarily",
        "Unable to contact",
        "timed out",
        "no answer in",
        "Connection refused",
        "Zero Bytes",
        "Communication connection failure",
        "try again",
    ];
    is_of_quota(said) || WORDS.iter().any(|word| said.contains(word))
}

/// Whether it is a limit on how much one may have in the queue.
pub(super) fn is_of_quota(said: &str) -> bool {
    ["submit limit", "MaxSubmit", "SubmitJob"].iter().any(|word| said.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_are_told_apart_and_only_accidents_are_tried_again() {
        let again = |state, exit| Ending::of(state, exit, "").again;
        assert!(again("NODE_FAIL", "") && again("PREEMPTED", "") && again("FAILED", "0:9"));
        assert!(!again("TIMEOUT", "") && !again("OUT_OF_MEMORY", "") && !again("CANCELLED", ""));
        assert!(!again("FAILED", NO_FOLDER) && !again("FAILED", "127:0"));
        assert!(Ending::of("FAILED", "0:9", "").words.contains("signal 9"));
        assert!(never_starts("PENDING", "BadConstraints").is_some());
        assert!(never_starts("PENDING", "Resources").is_none());
        assert!(never_starts("RUNNING", "BadConstraints").is_none());
    }

    #[test]
    fn what_slurm_refuses_for_now_is_not_what_it_refuses_for_ever() {
        let said = "Batch job submission failed: Job violates accounting/QOS policy (job submit \
                    limit, user's size and/or time limits)";
        assert!(is_for_now(said) && is_of_quota(said));
        assert!(is_for_now("Slurm temporarily unable to accept job, sleeping and retrying"));
        assert!(is_for_now("QOSMaxSubmitJobPerUserLimit"));
        assert!(!is_for_now("sbatch: error: invalid partition specified: zz"));
        assert!(!is_for_now("Requested time limit is invalid"));
        assert!(!is_for_now("Invalid feature specification"));
    }
}
