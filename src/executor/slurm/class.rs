//! What a class of items asks for, in the words of `sbatch`, and the script that a task starts.

use std::path::{Path, PathBuf};

use super::post::{LOG_VARIABLE, STORE_VARIABLE};
use crate::manifest::Executor;

/// What one class of items asks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class {
    pub executor: Executor,
    pub cpus: usize,
    pub gibibytes: usize,
    pub gpus: usize,
}

/// The options of `sbatch` for a class, where a task does `each` items.
pub(super) fn options(class: &Class, each: usize) -> Vec<String> {
    let Class { executor, cpus, gibibytes, gpus } = class;
    let mut options: Vec<String> =
        ["--nodes=1", "--ntasks=1", "--requeue"].map(str::to_owned).into();
    options.push(format!("--cpus-per-task={cpus}"));
    let named = [
        ("partition", &executor.partition),
        ("account", &executor.account),
        ("qos", &executor.qos),
        ("constraint", &executor.constraint),
    ];
    for (name, value) in named {
        options.extend(value.as_ref().map(|value| format!("--{name}={value}")));
    }
    if *gibibytes > 0 {
        options.push(format!("--mem={gibibytes}G"));
    }
    if *gpus > 0 {
        let kind = executor.gpu.as_ref().map_or(String::new(), |gpu| format!("{gpu}:"));
        options.push(format!("--gres=gpu:{kind}{gpus}"));
    }
    if let Some(minutes) = executor.time {
        options.push(format!("--time={}", minutes.saturating_mul(each.max(1))));
    }
    options.extend(executor.options.iter().cloned());
    options
}

/// How a task of an array learns what it is to do.
pub(super) enum Source<'a> {
    /// A folder that its node sees.
    Folder(&'a Path),
    /// Letters in the shared cache: what the runner on the node is told of it, in JSON, the
    /// submission's place there, and where Slurm writes on the node what a task prints.
    Letters { store: &'a str, batch: &'a str, log: &'a str },
}

/// What a task of the array starts.
pub(super) fn script(class: &Class, source: &Source<'_>) -> String {
    let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("runner"));
    let program = class.executor.program.clone();
    let program = program.unwrap_or_else(|| own.display().to_string());
    // An upgrade of the file under a running process.
    let program = quoted(program.trim_end_matches(" (deleted)"));
    let cpus = class.cpus;
    let gpus = match class.gpus {
        // What is not asked for is not looked at.
        0 => "export CUDA_VISIBLE_DEVICES=\n",
        _ => "",
    };
    let (before, batch) = match source {
        Source::Folder(folder) => {
            let folder = quoted(&folder.display().to_string());
            let before = format!(
                "test -r {folder}/head.json || {{ echo \"this node does not see\" {folder}; exit 66; }}\n"
            );
            (before, folder)
        }
        Source::Letters { store, batch, log } => {
            let (store, log) = (quoted(store), quoted(log));
            let before = format!(
                "export {STORE_VARIABLE}={store} {LOG_VARIABLE}={log}\"$SLURM_ARRAY_TASK_ID.log\"\n"
            );
            (before, quoted(batch))
        }
    };
    format!(
        "#!/bin/sh\n\
         {before}\
         {gpus}export RAYON_NUM_THREADS={cpus} RUNNER_MACHINE=\"$SLURMD_NODENAME\"\n\
         exec {program} {TASK_ARGUMENT} {batch}\n"
    )
}

/// The command that does one task of an array.
pub const TASK_ARGUMENT: &str = "slurm-task";

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(executor: Executor) -> Class {
        Class { executor, cpus: 4, gibibytes: 16, gpus: 1 }
    }

    #[test]
    fn a_class_is_asked_for_in_sbatchs_own_words() {
        let executor = Executor {
            partition: Some("gpu".to_owned()),
            constraint: Some("h200".to_owned()),
            time: Some(10),
            options: vec!["--reservation=nightly".to_owned()],
            ..Executor::default()
        };
        let asked = options(&class(executor), 3).join(" ");
        for part in [
            "--cpus-per-task=4",
            "--mem=16G",
            "--gres=gpu:1",
            "--partition=gpu",
            "--constraint=h200",
            "--time=30",
            "--reservation=nightly",
        ] {
            assert!(asked.contains(part), "{asked}");
        }
    }

    #[test]
    fn a_folder_with_a_quote_is_one_word_of_the_script() {
        let text = script(&class(Executor::default()), &Source::Folder(Path::new("/a b/it's")));
        assert!(text.contains("slurm-task '/a b/it'\\''s'\n"), "{text}");
    }
}
