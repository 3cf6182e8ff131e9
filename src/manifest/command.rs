//! `[command]`: a program with everything that it may see, checked without
//! running or opening anything.
//!
//! It knows paths as text: whether a file is there is found out when it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use super::fields::{Fields, Put};
use super::problem::{At, Findings, Problem, short};
use super::stage::{RawFiles, RawOp, RawStage, check_name};
use crate::op::{Command, Op, OutputPattern, StageId};

/// The shell that `shell = "..."` asks for.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];
/// Set for every attempt, so it is nobody's to set.
const RESERVED: &str = "TMPDIR";
/// The most that a program is started again.
const MOST_RETRIES: u32 = 10;

/// Reads and checks `[command]`.
pub(super) fn read(mut table: Fields<'_>, findings: &mut Findings) -> Option<RawOp> {
    let heading = table.opening();
    let argv = read_argv(&mut table, findings);
    let inputs = read_paths(&mut table, "inputs", findings);
    let outputs = read_paths(&mut table, "outputs", findings);
    let env = table.list::<String>("env", findings);
    let set = table.take::<BTreeMap<String, String>>("set", findings);
    let effort = read_effort(&mut table, findings);
    let accepts = table.list::<i32>("accepts", findings);
    let mut tables = table.tables("patterns", findings);
    let sound_count = check_count(&tables, findings);
    // Each is compiled, which takes its time.
    tables.truncate(MOST_PATTERNS);
    let patterns: Vec<_> =
        tables.into_iter().map(|pattern| read_pattern(pattern, findings)).collect();
    let digests = table.take::<BTreeMap<String, String>>("digests", findings);
    table.finish(findings);

    let (inputs, outputs) = (inputs?, outputs?);
    let mut sound = check_outputs(&inputs, &outputs, findings);
    let outputs_named: BTreeSet<&str> = outputs.iter().map(|put| put.value.as_str()).collect();
    let patterns: Option<Vec<(OutputPattern, At)>> = patterns.into_iter().collect();
    let patterns = patterns?;
    sound &= sound_count && check_patterns(&patterns, &outputs_named, findings);
    sound &= check_digests(digests.as_ref(), &outputs_named, findings);
    let variables = check_variables(env, set, findings)?;
    let accepts = check_accepts(accepts, findings)?;
    let effort = effort?;
    let names = |list: &[Put<String>]| {
        let names: BTreeSet<String> = list.iter().map(|put| put.value.clone()).collect();
        names.into_iter().collect()
    };
    let command = Command {
        argv: argv?,
        inputs: names(&inputs),
        outputs: names(&outputs),
        env: variables.0,
        set: variables.1,
        timeout: effort.timeout,
        retries: effort.retries,
        accepts,
        patterns: patterns.into_iter().map(|(pattern, _)| pattern).collect(),
        digests: digests.map_or(BTreeMap::new(), |digests| digests.value),
    };
    sound.then_some(RawOp {
        op: Op::Command(command),
        inputs: Vec::new(),
        files: RawFiles { inputs, outputs },
        repeats_at: heading,
    })
}

/// Ten years.
pub(crate) const LONGEST_TIMEOUT: u64 = 10 * 366 * 24 * 3600;

/// How long and how often a program is tried.
pub(super) struct Effort {
    pub timeout: Option<u64>,
    pub retries: u32,
}

/// `timeout` and `retries`.
pub(super) fn read_effort(table: &mut Fields<'_>, findings: &mut Findings) -> Option<Effort> {
    let timeout = table.take::<u64>("timeout", findings);
    let retries = table.take::<u32>("retries", findings);
    let mut sound = true;
    if let Some(timeout) = timeout.as_ref().filter(|timeout| timeout.value == 0) {
        findings.push(
            Problem::new("`timeout` is 0", "write the seconds after which the program is killed")
                .at_if(timeout.at.as_ref(), "nothing could run"),
        );
        sound = false;
    }
    if let Some(timeout) = timeout.as_ref().filter(|timeout| timeout.value > LONGEST_TIMEOUT) {
        findings.push(
            Problem::new(
                "`timeout` is out of range",
                format!("write at most {LONGEST_TIMEOUT} seconds, or leave it out for no limit"),
            )
            .at_if(timeout.at.as_ref(), "this number"),
        );
        sound = false;
    }
    if let Some(retries) = retries.as_ref().filter(|retries| retries.value > MOST_RETRIES) {
        findings.push(
            Problem::new("`retries` is out of range", format!("write at most {MOST_RETRIES}"))
                .at_if(retries.at.as_ref(), "this number"),
        );
        sound = false;
    }
    sound.then(|| Effort {
        timeout: timeout.map(|timeout| timeout.value),
        retries: retries.map_or(0, |retries| retries.value),
    })
}

/// `argv`, or `shell` as what it stands for.
pub(super) fn read_argv(table: &mut Fields<'_>, findings: &mut Findings) -> Option<Vec<String>> {
    let (argv_at, shell_at) = (table.key_at("argv"), table.key_at("shell"));
    let heading = table.opening();
    let argv = table.list::<String>("argv", findings);
    let shell = table.take::<String>("shell", findings);
    match (argv_at, shell_at) {
        (Some(argv_at), Some(shell_at)) => {
            findings.push(
                Problem::new(
                    "`argv` and `shell` are both given",
                    "keep one: `argv` starts a program, `shell` gives a text to `/bin/sh -c`",
                )
                .at(&shell_at, "the text")
                .at(&argv_at, "the program"),
            );
            None
        }
        (None, None) => {
            findings.push(
                Problem::new(
                    "`[command]` has neither `argv` nor `shell`",
                    "add `argv = [\"program\", \"argument\"]`",
                )
                .at(&heading, "nothing to run"),
            );
            None
        }
        (Some(_), None) => {
            let argv = argv?;
            let words: Vec<String> = argv.value.into_iter().map(|word| word.value).collect();
            let named = words.first().is_some_and(|program| !program.is_empty());
            if !named || words.iter().any(|word| word.contains('\0')) {
                findings.push(
                    Problem::new(
                        "`argv` does not name a program",
                        "write the program first, then its arguments: `argv = [\"sort\", \"a.txt\"]`",
                    )
                    .at_if(argv.at.as_ref(), "nothing to run"),
                );
                return None;
            }
            Some(words)
        }
        (None, Some(_)) => {
            let shell = shell?;
            if shell.value.trim().is_empty() || shell.value.contains('\0') {
                findings.push(
                    Problem::new("`shell` is empty", "write what `/bin/sh -c` is to run")
                        .at_if(shell.at.as_ref(), "nothing to run"),
                );
                return None;
            }
            Some(SHELL.into_iter().map(str::to_owned).chain([shell.value]).collect())
        }
    }
}

/// The paths of a list, without `./` and doubled slashes. One that leaves the
/// project by `..` is refused: the attempt's folder could not hold it.
pub(super) fn read_paths(
    table: &mut Fields<'_>,
    key: &'static str,
    findings: &mut Findings,
) -> Option<Vec<Put<String>>> {
    if table.key_at(key).is_none() {
        // Asked for, so that it is listed among the known keys.
        table.list::<String>(key, findings);
        return Some(Vec::new());
    }
    let list = table.list::<String>(key, findings)?;
    let mut paths: Vec<Put<String>> = Vec::new();
    let mut sound = true;
    for path in list.value {
        let at = path.at.clone();
        let absolute = Path::new(&path.value).is_absolute();
        let problem = match clean(&path.value) {
            None => {
                Some("a path may not be empty or hold `..`; write one from the project's folder")
            }
            Some(_) if absolute && key == "outputs" => {
                Some("outputs lie in the project's folder; write a relative path")
            }
            Some(clean) if paths.iter().any(|other| other.value == clean) => {
                Some("it is listed twice; remove one")
            }
            Some(clean) => {
                paths.push(Put { value: clean, at: path.at });
                None
            }
        };
        if let Some(help) = problem {
            sound = false;
            findings.push(
                Problem::new(format!("`{key}` cannot hold `{}`", short(&path.value)), help)
                    .at_if(at.as_ref(), "this path"),
            );
        }
    }
    sound.then_some(paths)
}

fn clean(path: &str) -> Option<String> {
    if path.contains('\0') {
        return None;
    }
    let mut clean = std::path::PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
            part => clean.push(part),
        }
    }
    let clean = clean.to_str()?.to_owned();
    (!clean.is_empty() && clean != "/").then_some(clean)
}

/// An output may neither be an input nor lie below another path of the stage.
fn check_outputs(inputs: &[Put<String>], outputs: &[Put<String>], findings: &mut Findings) -> bool {
    let mut sound = true;
    for output in outputs {
        let path = Path::new(&output.value);
        let others = outputs.iter().filter(|other| other.value != output.value);
        let clash = inputs.iter().chain(others).find(|other| {
            path.starts_with(&other.value) || Path::new(&other.value).starts_with(path)
        });
        if let Some(other) = clash {
            sound = false;
            findings.push(
                Problem::new(
                    format!(
                        "the output `{}` and `{}` are in each other's way",
                        output.value, other.value
                    ),
                    "write outputs beside the inputs, each as a file of its own",
                )
                .at_if(output.at.as_ref(), "is written")
                .at_if(other.at.as_ref(), "the other path"),
            );
        }
    }
    sound
}

fn read_pattern(mut table: Fields<'_>, findings: &mut Findings) -> Option<(OutputPattern, At)> {
    let opening = table.opening();
    let name = table
        .need::<String>("name", "\"finished\"", findings)
        .and_then(|name| check_name("name", name, findings));
    let of = table.take::<String>("of", findings);
    let pattern = table.need::<String>("pattern", "\"^finished$\"", findings);
    table.finish(findings);
    let (name, pattern) = (name?, pattern?);
    if let Err(error) = crate::text::lines_pattern(&pattern.value) {
        findings.push(
            Problem::new(
                format!("`{}` is not a regular expression", short(&pattern.value)),
                format!("{error}"),
            )
            .at_if(pattern.at.as_ref(), "cannot be read"),
        );
        return None;
    }
    let of = of.map_or("stdout".to_owned(), |of| of.value);
    Some((OutputPattern { name: name.value, of, pattern: pattern.value }, opening))
}

/// Patterns that a command may have.
pub(crate) const MOST_PATTERNS: usize = 100;

fn check_count(patterns: &[Fields<'_>], findings: &mut Findings) -> bool {
    let Some(beyond) = patterns.get(MOST_PATTERNS) else { return true };
    findings.push(
        Problem::new(
            format!("a command has {} patterns", patterns.len()),
            format!("write at most {MOST_PATTERNS}; `a|b` looks for both in one"),
        )
        .at(&beyond.opening(), "the first one too many"),
    );
    false
}

fn check_patterns(
    patterns: &[(OutputPattern, At)],
    outputs: &BTreeSet<&str>,
    findings: &mut Findings,
) -> bool {
    let mut sound = true;
    let mut seen: BTreeMap<&str, &At> = BTreeMap::new();
    for (pattern, at) in patterns {
        let known = matches!(pattern.of.as_str(), "stdout" | "stderr");
        if !known && !outputs.contains(pattern.of.as_str()) {
            sound = false;
            findings.push(
                Problem::new(
                    format!("the pattern `{}` looks into `{}`", pattern.name, short(&pattern.of)),
                    "write `of = \"stdout\"`, `\"stderr\"` or one of `outputs`",
                )
                .at(at, "not an output of this command"),
            );
        }
        if let Some(first) = seen.insert(&pattern.name, at) {
            sound = false;
            findings.push(
                Problem::new(
                    format!("two patterns are called `{}`", pattern.name),
                    "give one of them another name",
                )
                .at(first, "first here")
                .at(at, "again here"),
            );
        }
    }
    sound
}

fn check_digests(
    digests: Option<&Put<BTreeMap<String, String>>>,
    outputs: &BTreeSet<&str>,
    findings: &mut Findings,
) -> bool {
    let Some(digests) = digests else { return true };
    let mut sound = true;
    for (path, digest) in &digests.value {
        let hexadecimal = digest.len() == 64
            && digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let help = if !outputs.contains(path.as_str()) {
            "name one of `outputs`"
        } else if !hexadecimal {
            "write the file's blake3 hash: 64 digits of 0-9 and a-f, as `b3sum` prints it"
        } else {
            continue;
        };
        sound = false;
        findings.push(
            Problem::new(format!("`digests` cannot say what `{}` must be", short(path)), help)
                .at_if(digests.at.as_ref(), "this table"),
        );
    }
    sound
}

type Variables = (Vec<String>, BTreeMap<String, String>);

pub(super) fn check_variables(
    env: Option<Put<Vec<Put<String>>>>,
    set: Option<Put<BTreeMap<String, String>>>,
    findings: &mut Findings,
) -> Option<Variables> {
    let mut sound = true;
    let mut check = |name: &str, at: Option<&At>, doubled: bool| {
        let help = if name.is_empty() || name.contains(['=', '\0']) {
            "a variable's name is not empty and holds no `=`"
        } else if name == RESERVED {
            "every attempt has a folder of its own for temporary files, which is set already"
        } else if doubled {
            "it stands in `env` and in `set`: keep one"
        } else {
            return;
        };
        sound = false;
        findings.push(
            Problem::new(format!("the variable `{}` cannot be given", short(name)), help)
                .at_if(at, "this variable"),
        );
    };
    let env = env.map_or(Vec::new(), |env| env.value);
    let (set, set_at) = set.map_or((BTreeMap::new(), None), |set| (set.value, set.at));
    for name in &env {
        check(&name.value, name.at.as_ref(), set.contains_key(&name.value));
    }
    for (name, value) in &set {
        check(if value.contains('\0') { "" } else { name }, set_at.as_ref(), false);
    }
    let env: BTreeSet<String> = env.into_iter().map(|name| name.value).collect();
    sound.then(|| (env.into_iter().collect(), set))
}

fn check_accepts(accepts: Option<Put<Vec<Put<i32>>>>, findings: &mut Findings) -> Option<Vec<i32>> {
    let Some(list) = accepts else { return Some(vec![0]) };
    let statuses: BTreeSet<i32> = list.value.iter().map(|status| status.value).collect();
    if !statuses.is_empty() && statuses.iter().all(|status| (0..=255).contains(status)) {
        return Some(statuses.into_iter().collect());
    }
    findings.push(
        Problem::new(
            "`accepts` cannot be met",
            "list the exit statuses that count as a result, each from 0 to 255",
        )
        .at_if(list.at.as_ref(), "no such status"),
    );
    None
}

/// Where a runner keeps results, seen from the project's folder.
const CACHE: &str = "runs/cache";

/// An output may not take the place of a manifest, of the contract that judges it, or of
/// what the runner itself keeps. `kept` are the folders of stages and contracts.
pub(super) fn check_places(stages: &[RawStage], kept: &[&Path], findings: &mut Findings) {
    let project = kept.first().and_then(|stages| plain(stages).parent().map(Path::to_owned));
    let Some(project) = project else { return };
    for output in stages.iter().flat_map(|stage| stage.op.iter().flat_map(|op| &op.files.outputs)) {
        let path = project.join(&output.value);
        let folder = path.parent().unwrap_or(Path::new(""));
        let is_manifest = path.extension().is_some_and(|ending| ending == "toml")
            && kept.iter().any(|kept| plain(kept) == folder);
        let label = match () {
            () if is_manifest => "manifests and contracts lie here",
            () if Path::new(&output.value).starts_with(CACHE) => "the runner keeps results here",
            () => continue,
        };
        findings.push(
            Problem::new(
                format!("the output `{}` would overwrite what a run is made of", output.value),
                "write it to another folder",
            )
            .at_if(output.at.as_ref(), label),
        );
    }
}

/// A path from the root, without `.` and `..`; links are not followed.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in std::path::absolute(path).unwrap_or(path.to_owned()).components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}

/// A stage that reads what another writes needs it; a file that two write is a problem.
pub(super) fn add_implied_needs(stages: &mut [RawStage], findings: &mut Findings) {
    let mut makers: BTreeMap<String, usize> = BTreeMap::new();
    for (index, stage) in stages.iter().enumerate() {
        let outputs = stage.op.iter().flat_map(|op| &op.files.outputs);
        for output in outputs {
            match makers.get(&output.value) {
                None => {
                    makers.insert(output.value.clone(), index);
                }
                Some(first) => {
                    let earlier = stages[*first].op.iter().flat_map(|op| &op.files.outputs);
                    let first_at = earlier.filter(|other| other.value == output.value);
                    let first_at = first_at.map(|other| other.at.clone()).next().flatten();
                    findings.push(
                        Problem::new(
                            format!("two stages write `{}`", output.value),
                            "let one of them write another file",
                        )
                        .at_if(output.at.as_ref(), "again here")
                        .at_if(first_at.as_ref(), "first here"),
                    );
                }
            }
        }
    }
    let mut implied: Vec<(usize, Put<StageId>)> = Vec::new();
    for (index, stage) in stages.iter().enumerate() {
        for input in stage.op.iter().flat_map(|op| &op.files.inputs) {
            let exact = makers.get(&input.value).copied();
            // A folder is made by whoever writes a file in it.
            let below = format!("{}/", input.value);
            let inside = makers.range(below.clone()..).take_while(|(p, _)| p.starts_with(&below));
            for maker in exact.into_iter().chain(inside.map(|(_, maker)| *maker)) {
                if let Some(id) = &stages[maker].id {
                    let need = Put { value: id.value.clone(), at: input.at.clone() };
                    implied.push((index, need));
                }
            }
        }
    }
    for (index, need) in implied {
        let known = stages[index].needs.iter().any(|known| known.value == need.value);
        if !known {
            stages[index].needs.push(need);
        }
    }
}
