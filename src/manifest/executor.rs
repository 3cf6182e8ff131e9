//! `[executor]` of `pipeline.toml` or a stage: where a stage's work is done, and what it asks
//! of Slurm there.
//!
//! It knows no queue: whether a partition is there is asked before something is submitted.

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use super::fields::{Fields, Put};
use super::problem::{Findings, Problem, short};
use crate::text::cleaned;

/// Where a stage's work is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// On this machine.
    #[default]
    Here,
    /// In jobs of Slurm.
    Slurm,
}

const PLACES: [(&str, Place); 2] = [("here", Place::Here), ("slurm", Place::Slurm)];

/// Where a stage's work is done, and how it is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Executor {
    /// Whether Slurm does it.
    pub slurm: bool,
    /// `--partition`.
    pub partition: Option<String>,
    /// `--account`.
    pub account: Option<String>,
    /// `--qos`.
    pub qos: Option<String>,
    /// `--constraint`, of work that needs a GPU, or of all work of a stage that asks for none.
    pub constraint: Option<String>,
    /// The type of the GPUs, as Slurm's `gres` names it.
    pub gpu: Option<String>,
    /// Minutes that one item may take.
    pub time: Option<usize>,
    /// How often an item is submitted again whose job ended through no fault of its own.
    pub retries: usize,
    /// The runner on the nodes; this very file where none is named.
    pub program: Option<String>,
    /// Whether the nodes do not see the folder of runs: then the shared cache carries all that
    /// the runner and its jobs tell each other.
    pub without_folder: bool,
    /// Other options of `sbatch`, as they are.
    pub options: Vec<String>,
}

/// What a node's failure or a preemption is forgiven, where nothing is written.
const DEFAULT_RETRIES: usize = 3;
/// Options of `sbatch` that the runner sets itself.
const OWN: [&str; 16] = [
    "--array",
    "-a",
    "--parsable",
    "--output",
    "-o",
    "--error",
    "-e",
    "--job-name",
    "-J",
    "--wrap",
    "--wait",
    "-W",
    "--test-only",
    "--dependency",
    "-d",
    "--open-mode",
];

/// `[executor]`, inherited key by key.
#[derive(Clone, Debug, Default)]
pub(super) struct RawExecutor {
    on: Option<Put<Place>>,
    partition: Option<Put<String>>,
    account: Option<Put<String>>,
    qos: Option<Put<String>>,
    constraint: Option<Put<String>>,
    gpu: Option<Put<String>>,
    time: Option<Put<NonZeroUsize>>,
    retries: Option<Put<usize>>,
    program: Option<Put<String>>,
    shared_folder: Option<Put<bool>>,
    options: Option<Put<Vec<Put<String>>>>,
}

impl RawExecutor {
    pub fn read(fields: &mut Fields<'_>, findings: &mut Findings) -> RawExecutor {
        let Some(mut table) = fields.table("executor", findings) else {
            return RawExecutor::default();
        };
        let executor = RawExecutor {
            on: table.choice("on", &PLACES, findings),
            partition: table.take("partition", findings),
            account: table.take("account", findings),
            qos: table.take("qos", findings),
            constraint: table.take("constraint", findings),
            gpu: table.take("gpu", findings),
            time: table.take("time", findings),
            retries: table.take("retries", findings),
            program: table.take("program", findings),
            shared_folder: table.take("shared_folder", findings),
            options: table.list("options", findings),
        };
        table.finish(findings);
        executor
    }

    /// What the command line sets.
    pub fn typed(on: Option<Place>) -> RawExecutor {
        RawExecutor { on: on.map(Put::unwritten), ..RawExecutor::default() }
    }

    pub fn or(self, inherited: &RawExecutor) -> RawExecutor {
        RawExecutor {
            on: self.on.or_else(|| inherited.on.clone()),
            partition: self.partition.or_else(|| inherited.partition.clone()),
            account: self.account.or_else(|| inherited.account.clone()),
            qos: self.qos.or_else(|| inherited.qos.clone()),
            constraint: self.constraint.or_else(|| inherited.constraint.clone()),
            gpu: self.gpu.or_else(|| inherited.gpu.clone()),
            time: self.time.or_else(|| inherited.time.clone()),
            retries: self.retries.or_else(|| inherited.retries.clone()),
            program: self.program.or_else(|| inherited.program.clone()),
            shared_folder: self.shared_folder.or_else(|| inherited.shared_folder.clone()),
            options: self.options.or_else(|| inherited.options.clone()),
        }
    }

    pub fn check(&self, findings: &mut Findings) -> Option<Executor> {
        let mut sound = true;
        let mut text = |key: &str, put: &Option<Put<String>>| {
            let put = put.as_ref()?;
            let strange = |c: char| c.is_whitespace() || cleaned(c) != c;
            if !put.value.is_empty() && !put.value.contains(strange) {
                return Some(put.value.clone());
            }
            sound = false;
            findings.push(
                Problem::new(
                    format!("`{key}` of `[executor]` cannot be `{}`", short(&put.value)),
                    format!(
                        "write what `sbatch` takes there, without spaces, or leave `{key}` out"
                    ),
                )
                .at_if(put.at.as_ref(), "no such name"),
            );
            None
        };
        let partition = text("partition", &self.partition);
        let account = text("account", &self.account);
        let qos = text("qos", &self.qos);
        let constraint = text("constraint", &self.constraint);
        let gpu = text("gpu", &self.gpu);
        let program = self.program.as_ref();
        if let Some(program) = program.filter(|put| !put.value.starts_with('/')) {
            sound = false;
            findings.push(
                Problem::new(
                    format!("`program` of `[executor]` cannot be `{}`", short(&program.value)),
                    "write the absolute path that the runner has on the nodes",
                )
                .at_if(program.at.as_ref(), "not absolute"),
            );
        }
        let options = self.options.as_ref().map_or(&[][..], |put| put.value.as_slice());
        for option in options {
            let name = option.value.split('=').next().unwrap_or_default();
            let problem = if OWN.contains(&name) {
                "the runner sets it itself"
            } else if !name.starts_with('-') || option.value.contains(char::is_control) {
                "not an option: write it as one word, as `--reservation=NAME`"
            } else {
                continue;
            };
            sound = false;
            findings.push(
                Problem::new(
                    format!("`options` of `[executor]` cannot hold `{}`", short(&option.value)),
                    "list options of `sbatch` that have no key of their own here",
                )
                .at_if(option.at.as_ref(), problem),
            );
        }
        sound.then(|| Executor {
            slurm: self.on.as_ref().is_some_and(|on| on.value == Place::Slurm),
            partition,
            account,
            qos,
            constraint,
            gpu,
            time: self.time.as_ref().map(|time| time.value.get()),
            retries: self.retries.as_ref().map_or(DEFAULT_RETRIES, |retries| retries.value),
            program: program.map(|program| program.value.clone()),
            without_folder: self.shared_folder.as_ref().is_some_and(|put| !put.value),
            options: options.iter().map(|option| option.value.clone()).collect(),
        })
    }
}
