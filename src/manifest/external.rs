//! `[external]`: a program that is asked for tensors, checked without starting it.

use super::command::{check_variables, read_argv, read_effort, read_paths};
use super::fields::Fields;
use super::names::read_names;
use super::problem::{Findings, Problem};
use crate::op::{Command, Engine, External, Op};

/// Files that the runner puts where the program starts, or looks for there.
const OWN_FILES: [&str; 3] = [External::REQUEST, External::INPUTS, External::TENSORS];

/// Whether a program can be asked for what an op makes: an op over a model's tensors.
pub(super) fn can_make(op: &Op) -> bool {
    op.reads_model()
}

/// Reads and checks the table, if there is one.
pub(super) fn read(fields: &mut Fields<'_>, findings: &mut Findings) -> Option<External> {
    let mut table = fields.table("external", findings)?;
    let argv = read_argv(&mut table, findings);
    let inputs = read_paths(&mut table, "inputs", findings);
    let env = table.list::<String>("env", findings);
    let set = table.take("set", findings);
    let effort = read_effort(&mut table, findings);
    let version = table.need::<String>("version", "\"llama.cpp b4567\"", findings);
    let names = read_names(&mut table, findings);
    let emulate = table.choice("emulate", &Engine::ALL, findings);
    table.finish(findings);
    let (env, set) = check_variables(env, set, findings)?;
    let inputs = inputs?;
    // What the runner puts there would be written through the link to the user's file.
    for path in inputs.iter().filter(|path| OWN_FILES.contains(&&*path.value)) {
        findings.push(
            Problem::new(
                format!("the input `{}` has a name of the runner's own", path.value),
                "give your file another name: the program finds the request and its tensors there",
            )
            .at_if(path.at.as_ref(), "this input"),
        );
    }
    let effort = effort?;
    let mut inputs: Vec<String> = inputs.into_iter().map(|path| path.value).collect();
    inputs.sort();
    let program = Command {
        argv: argv?,
        inputs,
        outputs: Vec::new(),
        env,
        set,
        timeout: effort.timeout,
        retries: effort.retries,
        accepts: vec![0],
        patterns: Vec::new(),
        digests: Default::default(),
    };
    Some(External {
        program,
        version: version?.value,
        names,
        emulate: emulate.map(|engine| engine.value),
    })
}
