//! What a cluster has, and whether what an item asks for can ever be had.
//!
//! It knows nodes, partitions and limits as Slurm's programs tell them, no queue.

use std::collections::BTreeSet;

use super::SlurmError;
use super::class::{Class, options};
use super::commands::{self, Limits, Node};
use super::ending::is_for_now;
use crate::manifest::{Executor, Resources};
use crate::text::shown;

/// The cluster that Slurm's programs speak of.
pub(super) struct Cluster {
    pub limits: Limits,
    nodes: Vec<Node>,
}

impl Cluster {
    /// Asks for it.
    pub fn ask() -> Result<Cluster, SlurmError> {
        Ok(Cluster { limits: commands::limits()?, nodes: commands::nodes()? })
    }

    /// Whether what an item asks for can be had, as far as that is known before.
    ///
    /// # Errors
    /// What cannot be had, and what there is.
    pub fn check(
        &self,
        resources: &Resources,
        on_gpu: bool,
        executor: &Executor,
    ) -> Result<(), SlurmError> {
        let class = self.class(resources, on_gpu, executor);
        self.fits(&class)?;
        // The controller knows the rest: accounts, limits, what other options mean.
        let mut arguments = options(&class, 1);
        arguments.extend(["--test-only", "--wrap", "true"].map(str::to_owned));
        let answer = commands::ask("sbatch", &arguments)?;
        if answer.good || is_for_now(&answer.said) || answer.said.contains("to start at") {
            return Ok(());
        }
        Err(SlurmError::Never(format!(
            "Slurm would refuse the jobs: {}; it was asked for {}",
            shown(&answer.said),
            options(&class, 1).join(" ")
        )))
    }

    pub fn class(&self, resources: &Resources, on_gpu: bool, executor: &Executor) -> Class {
        let threads = resources.threads.map_or(1, usize::from);
        let asked = resources.gpus.max(usize::from(resources.gpu_memory > 0));
        // Where no node has a GPU the arm says so itself.
        let has_gpus = self.of_partition(executor).any(|node| !node.gpus.is_empty());
        let gpus = match on_gpu {
            true => asked.max(usize::from(has_gpus)),
            false => 0,
        };
        let mut executor = executor.clone();
        if gpus == 0 && asked > 0 {
            // The kind of GPU is of no concern to the rest of the stage.
            executor.constraint = None;
        }
        if gpus == 0 {
            executor.gpu = None;
        }
        Class { executor, cpus: resources.cores.max(threads), gibibytes: resources.memory, gpus }
    }

    fn of_partition<'a>(&'a self, executor: &'a Executor) -> impl Iterator<Item = &'a Node> {
        self.nodes.iter().filter(|node| match &executor.partition {
            // Several may be named.
            Some(partition) => partition.split(',').any(|name| name == node.partition),
            None => node.is_default,
        })
    }

    /// The most minutes of a job, where its partition has a limit.
    pub fn longest(&self, executor: &Executor) -> Option<usize> {
        let limits: Option<Vec<usize>> =
            self.of_partition(executor).map(|node| node.minutes).collect();
        limits?.into_iter().max()
    }

    fn fits(&self, class: &Class) -> Result<(), SlurmError> {
        let Executor { partition, constraint, gpu, .. } = &class.executor;
        let never = |text: String| Err(SlurmError::Never(text));
        let list = |names: BTreeSet<&str>| {
            let names: Vec<String> = names.into_iter().map(shown).collect();
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        };
        let partitions: BTreeSet<&str> = self.nodes.iter().map(|n| n.partition.as_str()).collect();
        if let Some(partition) = partition
            && let Some(wrong) = partition.split(',').find(|name| !partitions.contains(name))
        {
            return never(format!(
                "Slurm has no partition `{}`; it has: {}; correct `partition` of `[executor]`",
                shown(wrong),
                list(partitions)
            ));
        }
        let named = partition.as_deref().unwrap_or("the default one");
        let nodes: Vec<&Node> = self.of_partition(&class.executor).collect();
        if nodes.is_empty() {
            return never(format!(
                "Slurm has no default partition; name one of {} as `partition` of `[executor]`",
                list(partitions)
            ));
        }
        if !nodes.iter().any(|node| node.is_up) {
            return never(format!(
                "the partition `{}` of Slurm is down; choose another one of {}, or wait until it \
                 is up",
                shown(named),
                list(partitions)
            ));
        }
        // What is written with operators only the controller can read.
        let plain = |text: &&String| text.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c));
        if let Some(feature) = constraint.as_ref().filter(plain)
            && !nodes.iter().any(|node| node.features.contains(feature))
        {
            let known = nodes.iter().flat_map(|node| &node.features).map(String::as_str);
            return never(format!(
                "no node of partition `{}` has the feature `{}`; they have: {}; correct \
                 `constraint` of `[executor]`",
                shown(named),
                shown(feature),
                list(known.filter(|name| *name != "(null)").collect())
            ));
        }
        let most =
            |of: &dyn Fn(&Node) -> usize| nodes.iter().map(|node| of(node)).max().unwrap_or(0);
        let gpus = |node: &Node| -> usize {
            let of_kind = |(kind, _): &&(String, usize)| gpu.as_ref().is_none_or(|gpu| gpu == kind);
            node.gpus.iter().filter(of_kind).map(|(_, count)| count).sum()
        };
        let kind = gpu.as_ref().map_or(String::new(), |gpu| format!(" of type `{}`", shown(gpu)));
        let wants = [
            ("CPUs".to_owned(), class.cpus, most(&|node| node.cpus)),
            ("GiB of memory".to_owned(), class.gibibytes, most(&|node| node.mebibytes >> 10)),
            (format!("GPUs{kind}"), class.gpus, most(&gpus)),
        ];
        if let (Some(time), Some(limit)) = (class.executor.time, self.longest(&class.executor))
            && time > limit
        {
            return never(format!(
                "a stage asks for {time} minutes, and partition `{}` allows {limit}; ask for less \
                 with `time` of `[executor]`, or choose another partition",
                shown(named)
            ));
        }
        match wants.into_iter().find(|(_, asked, there)| asked > there) {
            Some((what, asked, there)) => never(format!(
                "a stage asks for {asked} {what}, and no node of partition `{}` has more than \
                 {there}; ask for less under `[resources]`, or choose another partition",
                shown(named)
            )),
            None => Ok(()),
        }
    }

    /// How many tasks of this kind the cluster does at once when it is empty.
    pub fn at_once(&self, class: &Class) -> usize {
        let of_node = |node: &Node| {
            let by_cpus = node.cpus / class.cpus.max(1);
            let gpus: usize = node.gpus.iter().map(|(_, count)| count).sum();
            by_cpus.min(gpus.checked_div(class.gpus).unwrap_or(usize::MAX))
        };
        self.of_partition(&class.executor).map(of_node).sum::<usize>().max(1)
    }
}
