//! `runner check`: every problem of a folder that can be known without computing: what its
//! manifests and contracts say, and whether the files that they name are there and hold what
//! is read from them.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use super::{graph_of, load_pipeline, print, select_stages, told_once};
use crate::manifest::names::is_of_preset;
use crate::manifest::problem::{nearest, plural, quoted_list, yard_of};
use crate::manifest::{Overrides, Pipeline, Prompt, Stage};
use crate::op::{LayerNumber, Op, Recorded, is_of_class};
use crate::plan::PlanError;
use crate::tensor_file::{TensorFile, members};
use crate::text::Shown;

pub(super) fn check(folder: &Path) -> Result<u8, String> {
    let pipeline = load_pipeline(folder, &Overrides::default())?;
    selections_of_profiles(&pipeline)?;
    let mut outside = BTreeSet::new();
    let problems = problems_of_files(&pipeline, &mut outside);
    if !problems.is_empty() {
        return Err(told_once("error", &problems));
    }
    let unfit = |stage: &Stage| {
        let (id, file) = (stage.id.clone(), stage.file.clone());
        let problem = pipeline.unfit(stage)?;
        Some(PlanError::Stage { stage: id, file, problem })
    };
    let warnings: Vec<PlanError> = pipeline.stages.iter().filter_map(unfit).collect();
    if !warnings.is_empty() {
        print(&(told_once("warning", &warnings) + "\n"))?;
    }
    if let Some(first) = outside.first() {
        let count = plural(outside.len(), "file");
        print(&format!(
            "not looked into: {count} outside of the project, as `{}`; `plan` and `run` read them\n",
            first.shown()
        ))?;
    }
    let (stages, contracts) = (pipeline.stages.len(), pipeline.contracts.len());
    print(&format!(
        "{} and {} checked, no problems found\n",
        plural(stages, "stage"),
        plural(contracts, "contract")
    ))
}

/// A profile is used at night, when nobody sees that its selection finds nothing.
fn selections_of_profiles(pipeline: &Pipeline) -> Result<(), String> {
    let graph = graph_of(pipeline)?;
    for (name, profile) in &pipeline.profiles {
        let Some(expression) = &profile.select else { continue };
        select_stages(&graph, pipeline, expression).map_err(|problem| {
            let file = pipeline.folder.join("pipeline.toml");
            format!("error: {problem}\n  in `profile.{name}.select` of `{}`", file.shown())
        })?;
    }
    Ok(())
}

/// What is wrong with the files that the stages name. A stranger's manifest may name any file: what
/// lies outside of the project is not opened, and noted.
fn problems_of_files(pipeline: &Pipeline, outside: &mut BTreeSet<PathBuf>) -> Vec<PlanError> {
    let yard = yard_of(&pipeline.folder);
    let is_inside = |path: &Path| {
        // Of what is not there the folder decides, whose names a hint would tell.
        let found =
            path.canonicalize().or_else(|_| plain(path).parent().unwrap_or(path).canonicalize());
        yard.as_ref().zip(found.ok()).is_some_and(|(yard, path)| path.starts_with(yard))
    };
    let project = plain(&pipeline.folder).parent().unwrap_or(Path::new("")).to_owned();
    let commands = || {
        pipeline.stages.iter().filter_map(|stage| match &stage.op {
            Op::Command(command) => Some(command),
            _ => None,
        })
    };
    // What a command makes need not be there yet.
    let outputs = commands().flat_map(|command| &command.outputs);
    let made: Vec<PathBuf> = outputs.map(|path| plain(&project.join(path))).collect();
    let is_made = |path: &Path| {
        let path = plain(path);
        made.iter().any(|made| path.starts_with(made) || made.starts_with(&path))
    };
    let mut problems = Vec::new();
    for stage in &pipeline.stages {
        let mut found = |problem: String| {
            let (stage, file) = (stage.id.clone(), stage.file.clone());
            problems.push(PlanError::Stage { stage, file, problem });
        };
        if let Op::Command(command) = &stage.op {
            for written in &command.inputs {
                let input = project.join(written);
                if !input.exists() && !is_made(&input) {
                    let from = "the folder that contains the folder of stages";
                    found(not_there(&input, written, from, is_inside(&input)));
                }
            }
            continue;
        }
        let model = Path::new(&stage.model);
        if stage.op.reads_model()
            && !stage.model.starts_with("synthetic:")
            && !model.exists()
            && !is_made(model)
        {
            found(not_there(model, &model.shown(), "the manifest's folder", is_inside(model)));
        }
        for file in stage.files().into_iter().filter(|file| !file.exists() && !is_made(file)) {
            found(not_there(file, &file.shown(), "the manifest's folder", is_inside(file)));
        }
        let (inside, elsewhere): (Vec<&Path>, Vec<&Path>) =
            stage.files().into_iter().filter(|file| file.exists()).partition(|file| {
                is_inside(file) && members(file).iter().all(|file| is_inside(file))
            });
        outside.extend(elsewhere.into_iter().map(Path::to_owned));
        tensors(stage, &inside).into_iter().for_each(&mut found);
    }
    problems
}

/// `` `dump.safetensor` does not exist; did you mean `dump.safetensors`? ``
fn not_there(path: &Path, written: &dyn std::fmt::Display, from: &str, is_inside: bool) -> String {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = is_inside.then(|| folder.unwrap_or(Path::new(".")));
    let entries = folder.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten();
    let names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let near = match nearest(&name, names.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("correct the path; it is relative to {from}"),
    };
    format!("`{written}` does not exist; {near}")
}

/// What a stage reads from these files, and is not in them.
fn tensors(stage: &Stage, files: &[&Path]) -> Vec<String> {
    let mut problems = Vec::new();
    let inputs = stage.op.inputs();
    let mut wanted: Vec<_> = inputs.iter().filter_map(|(_, input)| input.file()).collect();
    if let Op::Gemm { x, w } = &stage.op {
        wanted.extend([x, w]);
    }
    for tensor in wanted.into_iter().filter(|tensor| files.contains(&tensor.file.as_path())) {
        let looked_up = TensorFile::open(&tensor.file).and_then(|file| file.find(tensor));
        problems.extend(looked_up.err().map(|error| error.to_string()));
    }
    if let Some(recorded) =
        stage.recorded.as_ref().filter(|recorded| files.contains(&recorded.file.as_path()))
    {
        match TensorFile::open(&recorded.file) {
            Ok(file) => problems.extend(names(stage, recorded, &file)),
            Err(error) => problems.push(error.to_string()),
        }
    }
    problems
}

/// Names of a recording that fit no tensor, and a recording of another prompt.
fn names(stage: &Stage, recorded: &Recorded, file: &TensorFile) -> Vec<String> {
    if file.is_nameless() {
        return Vec::new();
    }
    let mut problems = Vec::new();
    for (site, written) in &recorded.names {
        let pattern = match written.strip_suffix(']').and_then(|text| text.rsplit_once('[')) {
            Some((whole, _)) if !file.names().any(|name| name == written) => whole,
            _ => written.as_str(),
        };
        let fits = |name: &&str| match LayerNumber::find(pattern) {
            Some(number) => number.fits(name),
            None => is_of_class(name, pattern),
        };
        // A preset names more than a dump need hold.
        if file.names().any(|name| fits(&name)) || is_of_preset(site, written) {
            continue;
        }
        let patterns: BTreeSet<String> = file.names().map(with_star).collect();
        let near = nearest(pattern, patterns.iter().map(String::as_str));
        let near = near.map_or(String::new(), |near| format!("did you mean `{near}`? "));
        problems.push(format!(
            "no tensor of `{}` is called `{pattern}`, as `{site}` is by `[recorded.names]`; \
             {near}it has {}",
            recorded.file.shown(),
            quoted_list(&patterns)
        ));
    }
    if let (Op::Forward { .. } | Op::Embed { .. }, Prompt::Tokens(tokens)) =
        (&stage.op, &stage.prompt)
        && let rows = file.names().filter_map(|name| file.rows(name)).collect::<Vec<_>>()
        && let Some(first) = rows.first()
        && !rows.contains(&tokens.len())
    {
        problems.push(format!(
            "`{}` has {first} rows, and the prompt has {}: record the pass of this prompt, or set \
             `tokens` to those of the recorded pass",
            recorded.file.shown(),
            plural(tokens.len(), "token")
        ));
    }
    problems
}

/// A name with its first number of a layer as `*`.
fn with_star(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(place) = parts.iter().position(|part| number(part)) {
        parts[place] = "*";
    }
    parts.join(".")
}

/// The path without `.` and `..`, as far as that can be told from its words.
fn plain(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut plain = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_number_is_the_first_part_that_is_one() {
        assert_eq!(with_star("model.layers.3.mlp.up_proj"), "model.layers.*.mlp.up_proj");
        assert_eq!(with_star("lm_head"), "lm_head");
        assert_eq!(plain(Path::new("/a/./b/../c")), Path::new("/a/c"));
    }
}
