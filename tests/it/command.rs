//! Stages of `[command]`, run by the real program: what a command sees, what is
//! kept of it, and what is left of it when it, or the runner, dies.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A project in a place of its own, with the contract that asks for status 0.
pub struct Project(tempfile::TempDir);

impl Project {
    pub fn new() -> Project {
        let project = Project(tempfile::tempdir().expect("a folder"));
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("contracts/command.toml");
        let contract = fs::read_to_string(shipped).expect("the shipped contract");
        project.file("contracts/command.toml", &contract)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn file(self, name: &str, text: &str) -> Project {
        self.write(name, text);
        self
    }

    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn link(&self, name: &str, target: &str) {
        // Whether or not there was one.
        let _ = fs::remove_file(self.path(name));
        std::os::unix::fs::symlink(target, self.path(name)).expect("linked");
    }

    pub fn executable(&self, name: &str) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).expect("set");
    }

    pub fn touch(&self, name: &str) {
        let file = fs::File::options().append(true).open(self.path(name)).expect("opened");
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).expect("set");
    }

    /// A copy of a file in its place.
    pub fn replace(&self, name: &str) {
        let copy = self.path("copy");
        fs::copy(self.path(name), &copy).expect("copied");
        fs::rename(copy, self.path(name)).expect("renamed");
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).expect("removed");
    }

    pub fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).expect("renamed");
    }

    /// A stage like another one, with another id and another output.
    pub fn copy_stage(&self, from: &str, to: &str, output: &str, other: &str) {
        let text = self.read(&format!("stages/{from}.toml"));
        let text = text.replace(&format!("\"{from}\""), &format!("\"{to}\""));
        self.write(&format!("stages/{to}.toml"), &text.replace(output, other));
    }

    /// A stage with an id, whose `[command]` has these lines.
    pub fn stage(self, id: &str, lines: &str) -> Project {
        let text = format!(
            "id = \"{id}\"\ntitle = \"a command\"\ncontract = \"command\"\n[command]\n{lines}\n"
        );
        self.file(&format!("stages/{id}.toml"), &text)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
        command.args(arguments).current_dir(self.0.path());
        command.env("XDG_CACHE_HOME", self.path("home")).env_remove("RUNNER_LOG");
        command.env_remove("RUNNER_CACHE").env_remove("RUNNER_CACHE_MODE");
        command.env("XDG_RUNTIME_DIR", self.0.path());
        // Without a visible device the outcome is the same on every machine.
        command.env("CUDA_VISIBLE_DEVICES", "");
        command
    }

    pub fn runner(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(self.command(arguments).output().expect("the runner starts"))
    }

    pub fn run(&self) -> Outcome {
        self.runner(&["run", "stages"])
    }
}

/// What the runner said.
pub struct Outcome {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Outcome {
    pub fn of(output: Output) -> Outcome {
        Outcome {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub fn expect(self, code: i32, words: &str) -> Outcome {
        let all = format!("{}\n{}", self.out, self.err);
        assert_eq!(self.code, Some(code), "{all}");
        assert!(words_of(&all).contains(&words_of(words)), "no `{words}` in:\n{all}");
        self
    }
}

/// The table wraps its lines.
fn words_of(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn marks(project: &Project) -> usize {
    project.read("mark").lines().count()
}

/// A shell line that leaves a mark outside of what the runner sees.
fn marking(project: &Project, line: &str) -> String {
    format!("shell = 'echo x >> {}; {line}'", project.path("mark").display())
}

#[test]
fn a_command_runs_once_and_its_output_is_put_back_when_it_is_lost() {
    let project = Project::new().file("in.txt", "b\na\n");
    let line = marking(&project, "sort in.txt > out/sorted.txt");
    let project = project
        .stage("S", &format!("{line}\ninputs = [\"in.txt\"]\noutputs = [\"out/sorted.txt\"]"));
    project.run().expect(0, "status 0; wrote out/sorted.txt");
    assert_eq!((project.read("out/sorted.txt").as_str(), marks(&project)), ("a\nb\n", 1));
    project.run().expect(0, "everything was reused");
    fs::remove_file(project.path("out/sorted.txt")).expect("removed");
    project.run().expect(0, "put back: out/sorted.txt");
    project.write("out/sorted.txt", "edited by hand");
    project.run().expect(0, "put back: out/sorted.txt");
    assert_eq!((project.read("out/sorted.txt").as_str(), marks(&project)), ("a\nb\n", 1));
    project.write("in.txt", "c\n");
    project.run().expect(0, "input in.txt:");
    assert_eq!((project.read("out/sorted.txt").as_str(), marks(&project)), ("c\n", 2));
}

#[test]
fn a_command_sees_its_inputs_and_listed_variables_and_nothing_else() {
    let project = Project::new().file("in.txt", "").file("secret.txt", "").stage(
        "S",
        "shell = '''find . ! -name . ! -name seen | sort > seen; env | cut -d= -f1 | sort | tr '\\n' ' ' >> seen'''\n\
         inputs = [\"in.txt\"]\noutputs = [\"seen\"]\nenv = [\"LISTED\", \"UNSET\"]\nset = { GIVEN = \"1\" }",
    );
    let output = project
        .command(&["run", "stages"])
        .env("LISTED", "yes")
        .env("UNLISTED", "yes")
        .env_remove("UNSET")
        .output();
    Outcome::of(output.expect("started")).expect(0, "wrote seen");
    let seen = project.read("seen");
    assert_eq!(seen.trim_end(), "./in.txt\nGIVEN LISTED PATH PWD TMPDIR");
}

#[test]
fn a_stage_that_reads_what_another_writes_comes_after_it() {
    let project = Project::new()
        .stage("a-last", "shell = 'cat mid > end'\ninputs = [\"mid\"]\noutputs = [\"end\"]")
        .stage("z-first", "shell = 'echo 7 > mid'\noutputs = [\"mid\"]");
    project.runner(&["graph", "stages"]).expect(0, "needs z-first");
    project.run().expect(0, "wrote end");
    assert_eq!(project.read("end"), "7\n");
}

#[test]
fn a_status_is_judged_and_a_bad_one_is_no_result() {
    let project = Project::new();
    let line = marking(&project, "echo out of luck >&2; exit 3");
    let project = project.stage("S", &line).stage("T", "argv = [\"true\"]").file(
        "stages/T.toml",
        "id = \"T\"\ntitle = \"t\"\nneeds = [\"S\"]\ncontract = \"command\"\n[command]\nargv = [\"true\"]\n",
    );
    let first = project.run();
    first
        .expect(
            1,
            "CMD-001 at exit: exit_status of the command is 3, above 0; it said: out of luck",
        )
        .expect(1, "the command of stage S ended with status 3");
    project.run().expect(1, "status 3");
    assert_eq!(marks(&project), 2, "a bad status is not replayed");
    // Nor where no stage needs it and its files are old enough to be known again.
    fs::remove_file(project.path("stages/T.toml")).expect("removed");
    std::thread::sleep(Duration::from_millis(50));
    project.run().expect(1, "status 3");
    project.run().expect(1, "status 3");
    assert_eq!(marks(&project), 4);
}

#[test]
fn patterns_and_digests_are_judged_and_are_not_part_of_the_key() {
    let contract = "name = \"speaks\"\nversion = \"1.0.0\"\n[[equation]]\nid = \"e\"\nformula = \"f\"\nwhy = \"w\"\n\
        [[falsifier]]\nid = \"M\"\nequation = \"e\"\nprediction = \"p\"\nmetric = \"matches\"\nsites = [\"match.done\"]\nmin = 2\nif_fails = \"drift\"\nwhy = \"w\"\n\
        [[falsifier]]\nid = \"D\"\nequation = \"e\"\nprediction = \"p\"\nmetric = \"digest_mismatch\"\nmax = 0\nif_fails = \"structural\"\nwhy = \"w\"\n";
    let stage = |project: &Project, pattern: &str, digest: &str| {
        let line = marking(project, "echo done 1; echo done 2; printf x > x");
        format!(
            "id = \"S\"\ntitle = \"t\"\ncontract = \"speaks\"\n[command]\n{line}\noutputs = [\"x\"]\n\
             patterns = [{{ name = \"done\", pattern = \"{pattern}\" }}]\ndigests = {{ x = \"{digest}\" }}\n"
        )
    };
    let project = Project::new().file("contracts/speaks.toml", contract);
    let right = blake3::hash(b"x").to_hex().to_string();
    let project = project.file("stages/S.toml", "");
    project.write("stages/S.toml", &stage(&project, "^done \\\\d$", &right));
    project.run().expect(0, "pass");
    project.write("stages/S.toml", &stage(&project, "^done 1$", &right));
    project.run().expect(1, "M at match.done: matches of the command is 1, below 2");
    let wrong = blake3::hash(b"y").to_hex().to_string();
    project.write("stages/S.toml", &stage(&project, "^done", &wrong));
    project.run().expect(1, "digest_mismatch of the command is 1, above 0");
    assert_eq!(marks(&project), 1);
}

#[test]
fn what_is_no_result_is_an_error_in_words_and_is_tried_again() {
    let cases = [
        ("shell = 'true'\noutputs = [\"out\"]", "did not write `out`"),
        ("shell = 'ln -s /etc/passwd out'\noutputs = [\"out\"]", "no regular file"),
        ("shell = 'mkdir out'\noutputs = [\"out\"]", "no regular file"),
        ("argv = [\"no-such-program\"]", "there is no program `no-such-program` in PATH"),
        ("argv = [\"./no-such\"]", "there is no program `./no-such`"),
        ("argv = [\"true\"]\ninputs = [\"nothing\"]", "the input `nothing` cannot be read"),
        ("shell = 'kill -9 $$'", "killed by signal 9"),
        ("argv = [\"sleep\", \"60\"]\ntimeout = 1", "timeout of 1 s"),
        ("shell = 'echo > in; echo 2 >> in'\ninputs = [\"in\"]", "`in` changed while"),
    ];
    for (lines, words) in cases {
        let project = Project::new().file("in", "1").stage("S", lines);
        project.run().expect(4, words);
        assert!(!project.path("out").exists());
        project.run().expect(4, words);
    }
}

#[test]
fn what_changed_while_a_command_ran_leaves_no_result_under_the_old_name() {
    let lines = "argv = [\"./tool\"]\ninputs = [\"in\"]\noutputs = [\"out\"]";
    let project = || {
        let project = Project::new().file("in/a", "1").file("new", "#!/bin/sh\n");
        let root = project.path("").display().to_string();
        // What it does beside its work is not in its key.
        let tool = format!("#!/bin/sh\ncd {root}; . ./aside; cp in/a $OLDPWD/out\n");
        project.write("tool", &tool);
        ["tool", "new"].iter().for_each(|name| project.executable(name));
        project.stage("S", lines)
    };
    let writes = [
        ("mv new tool", "tool` changed"),
        ("> in/b", "`in` changed"),
        ("cp in/a keep; echo 2 > in/a; cp keep in/a", "`in` changed"),
        ("cp in/a b; mv b in/a", "`in` changed"),
    ];
    for (aside, words) in writes {
        let project = project();
        let old = project.read("tool");
        project.write("aside", aside);
        std::thread::sleep(Duration::from_millis(30));
        project.run().expect(4, words);
        assert!(!project.path("out").exists(), "{aside}");
        project.write("aside", "");
        project.write("tool", &old);
        let _ = fs::remove_file(project.path("in/b"));
        let again = project.run().expect(0, "run: pass");
        assert!(again.err.contains("ran in"), "{aside}: {}", again.err);
    }
    let harmless =
        ["ln tool another; cp -al in links", "touch in/lock; rm in/lock", "chmod 600 in/a"];
    for aside in harmless {
        let project = project();
        project.write("aside", aside);
        project.run().expect(0, "wrote out");
        project.run().expect(0, "everything was reused");
    }
}

#[test]
fn a_result_is_kept_although_its_file_cannot_be_put_in_its_place() {
    let project = Project::new();
    let lines = format!("{}\noutputs = [\"out\"]", marking(&project, "echo 1 > out"));
    let project = project.stage("S", &lines);
    fs::create_dir(project.path("out")).expect("made");
    let refused =
        project.run().expect(4, "a folder of that name is there; move it away and run again");
    assert_eq!(marks(&project), 1, "{}", refused.err);
    fs::remove_dir(project.path("out")).expect("removed");
    project.run().expect(0, "put back: out");
    assert_eq!((project.read("out").as_str(), marks(&project)), ("1\n", 1));
}

#[test]
fn a_command_that_waits_runs_what_is_there_when_it_starts() {
    let tool = |word: &str| format!("#!/bin/sh\necho {word} > out\n");
    let with_tools = |project: Project| {
        let project = project.file("tool", &tool("old")).file("new", &tool("new"));
        project.executable("tool");
        project.executable("new");
        project.stage("b", "argv = [\"./tool\"]\noutputs = [\"out\"]")
    };
    let reruns_the_old_one = |project: &Project| {
        assert_eq!(project.read("out"), "new\n");
        project.write("tool", &tool("old"));
        project.run().expect(0, "run: pass");
        assert_eq!(project.read("out"), "old\n");
    };

    // For want of a job.
    let project = with_tools(Project::new());
    let root = project.path("").display().to_string();
    let project = project.stage("a", &format!("shell = 'cp {root}new {root}tool'"));
    project.runner(&["run", "stages", "--jobs", "1"]).expect(0, "run: pass");
    reruns_the_old_one(&project);

    // For what another runner has of the machine.
    let mut holder = HasAllCores::new();
    let project = with_tools(Project::new());
    let mut waiting = holder.makes_wait(&project);
    fs::copy(project.path("new"), project.path("tool")).expect("copied");
    holder.lets_go();
    assert!(waiting.wait().expect("waited for").success());
    reruns_the_old_one(&project);
}

#[test]
fn a_run_that_is_stopped_while_it_waits_ends_at_once_and_the_next_one_goes_well() {
    let mut holder = HasAllCores::new();
    let project = Project::new().stage("S", "shell = 'echo x > out'\noutputs = [\"out\"]");
    let mut waiting = holder.makes_wait(&project);
    let id = waiting.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().expect("started").success());
    assert_eq!(waiting.wait().expect("waited for").code(), Some(130));
    assert!(!project.path("out").exists());
    holder.lets_go();
    project.run().expect(0, "wrote out");
}

/// A runner that has all cores of a machine that others share with it.
struct HasAllCores {
    place: tempfile::TempDir,
    _project: Project,
    runner: Child,
}

impl HasAllCores {
    fn new() -> HasAllCores {
        let place = tempfile::tempdir().expect("a folder");
        let [begun, go] = ["begun", "go"].map(|name| place.path().join(name));
        let shell = format!(
            "shell = 'touch {}; until test -e {}; do sleep 0.01; done'",
            begun.display(),
            go.display()
        );
        let project = Project::new().stage("a", &shell);
        let runner = Self::start(&project, place.path());
        wait_until("it has the cores", || begun.exists());
        HasAllCores { place, _project: project, runner }
    }

    fn start(project: &Project, place: &Path) -> Child {
        let cores = std::thread::available_parallelism().expect("cores");
        project.write("stages/pipeline.toml", &format!("[resources]\ncores = {cores}\n"));
        let mut command = project.command(&["run", "stages"]);
        command.env("XDG_RUNTIME_DIR", place).spawn().expect("started")
    }

    /// A run of a project that has looked at its command and waits for the cores.
    fn makes_wait(&self, project: &Project) -> Child {
        let runner = Self::start(project, self.place.path());
        let locked = project.path("runs/cache/v1/actions.lock");
        wait_until("the command is known", || locked.exists());
        std::thread::sleep(Duration::from_millis(200));
        runner
    }

    fn lets_go(&mut self) {
        fs::write(self.place.path().join("go"), "").expect("written");
        assert!(self.runner.wait().expect("waited for").success());
    }
}

impl Drop for HasAllCores {
    fn drop(&mut self) {
        // A test that failed has not let go.
        let _ = self.runner.kill();
        let _ = self.runner.wait();
    }
}

#[test]
fn an_input_that_somebody_writes_all_the_time_is_an_error_and_not_waited_for_for_ever() {
    let project = Project::new()
        .file("in", "00000000")
        .stage("S", "shell = 'sleep 0.3; cat in'\ninputs = [\"in\"]");
    let (input, over) = (project.path("in"), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for count in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                // In its place: a file that becomes shorter is another error.
                let file = fs::File::options().write(true).open(&input);
                let mut file = file.expect("opened");
                std::io::Write::write_all(&mut file, format!("{count:08}").as_bytes())
                    .expect("written");
            }
        });
        let outcome = project.run();
        over.store(true, Ordering::Relaxed);
        outcome.expect(4, "`in` changed while the command waited or ran");
    });
}

#[test]
fn a_command_that_goes_well_when_it_is_tried_again_is_called_flaky_and_one_that_never_does_failed()
{
    let project = Project::new();
    let mark = project.path("mark").display().to_string();
    let failures = ["echo no luck >&2; exit 7", "kill -9 $$", "sleep 30", "exit 0"];
    let lines = |failure: &str, retries: u32| {
        let first = format!("test -e {mark} || {{ touch {mark}; {failure}; }}");
        format!(
            "shell = '{first}; test -e {mark} && echo x > out'\noutputs = [\"out\"]\n\
             timeout = 1\nretries = {retries}"
        )
    };
    for (failure, words) in failures.iter().zip(["it said: no luck", "signal 9", "timeout", ""]) {
        let project = Project::new().stage("s", &lines(failure, 1));
        // Whether or not there was one.
        let _ = fs::remove_file(&mark);
        let ran = project.run().expect(0, words);
        assert_eq!(project.read("out"), "x\n", "{failure}");
        ran.expect(0, "flaky: attempt 2 went well, the first failed");
        project.run().expect(0, "flaky: attempt 2 went well");
        // Nobody is asked again who asks for fewer tries.
        project.write("stages/s.toml", &project.read("stages/s.toml").replace("retries = 1", ""));
        project.run().expect(0, "reused");
    }
    let marking = marking(&project, "exit 3");
    let project = project.stage("s", &format!("{marking}\nretries = 2"));
    project.run().expect(1, "status 3");
    assert_eq!(marks(&project), 3);
    project.write("stages/s.toml", &project.read("stages/s.toml").replace("= 2", "= 11"));
    project.run().expect(2, "`retries` is out of range");
}

#[test]
fn an_output_cannot_leave_the_project_by_a_link() {
    let elsewhere = tempfile::tempdir().expect("a folder");
    let project = Project::new().stage("S", "shell = 'echo > d/x'\noutputs = [\"d/x\"]");
    std::os::unix::fs::symlink(elsewhere.path(), project.path("d")).expect("linked");
    project.run().expect(4, "leads out of the project's folder");
    assert!(!elsewhere.path().join("x").exists());
}

#[test]
fn manifests_of_commands_that_make_no_sense_are_refused() {
    let cases = [
        ("", "neither `argv` nor `shell`"),
        ("argv = [\"a\"]\nshell = \"a\"", "`argv` and `shell` are both given"),
        ("argv = []", "does not name a program"),
        ("argv = [\"a\"]\noutputs = [\"../x\"]", "`outputs` cannot hold `../x`"),
        ("argv = [\"a\"]\noutputs = [\"/x\"]", "write a relative path"),
        ("argv = [\"a\"]\ninputs = [\"x/../../y\"]", "`inputs` cannot hold"),
        ("argv = [\"a\"]\ninputs = [\"d\"]\noutputs = [\"d/x\"]", "in each other's way"),
        ("argv = [\"a\"]\nenv = [\"TMPDIR\"]", "`TMPDIR` cannot be given"),
        (
            "argv = [\"a\"]\npatterns = [{ name = \"p\", pattern = \"(\" }]",
            "not a regular expression",
        ),
        (
            "argv = [\"a\"]\npatterns = [{ name = \"p\", of = \"o\", pattern = \"a\" }]",
            "looks into `o`",
        ),
        ("argv = [\"a\"]\ntimeout = 0", "`timeout` is 0"),
        ("argv = [\"a\"]\naccepts = [256]", "`accepts` cannot be met"),
        ("argv = [\"a\"]\ncolour = 1", "unknown key `colour`"),
    ];
    for (lines, words) in cases {
        Project::new().stage("S", lines).runner(&["check", "stages"]).expect(2, words);
    }
    let two = Project::new()
        .stage("A", "argv = [\"a\"]\noutputs = [\"x\"]")
        .stage("B", "argv = [\"a\"]\noutputs = [\"./x\"]");
    two.runner(&["check", "stages"]).expect(2, "two stages write `x`");
    let knot = Project::new()
        .stage("A", "argv = [\"a\"]\ninputs = [\"y\"]\noutputs = [\"x\"]")
        .stage("B", "argv = [\"a\"]\ninputs = [\"x\"]\noutputs = [\"y\"]");
    knot.runner(&["check", "stages"]).expect(2, "stages need each other");
    let of_models = Project::new().stage("A", "argv = [\"a\"]");
    of_models.write(
        "stages/A.toml",
        &of_models.read("stages/A.toml").replace("[command]", "model = \"m\"\n[command]"),
    );
    of_models.runner(&["check", "stages"]).expect(2, "`model` has no use");
}

#[test]
fn check_and_plan_run_nothing() {
    let project = Project::new();
    let line = marking(&project, "true");
    let project = project.stage("S", &line);
    project.runner(&["check", "stages"]).expect(0, "no problems found");
    project.runner(&["plan", "stages"]).expect(0, "not in the cache");
    assert!(!project.path("mark").exists());
}

/// Whether a process of this number lives and is no zombie.
fn lives(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    let state = status.rsplit_once(')').map(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, None | Some(None | Some('Z' | 'X')))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(20), "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A line that starts a process outside of its group which writes for ever.
const STRAY: &str = "setsid sh -c 'echo $$ > stray; while :; do echo >> log; sleep 0.01; done' & while ! test -s stray; do sleep 0.01; done; cp stray";

#[test]
fn an_attempt_is_over_when_everything_that_it_started_is_dead() {
    let project = Project::new();
    let keep = project.path("pid");
    let project = project.stage(
        "S",
        &format!("shell = '''{STRAY} {}; cp log out'''\noutputs = [\"out\"]", keep.display()),
    );
    project.run().expect(0, "wrote out");
    assert!(!lives(&project.read("pid")));
}

#[test]
fn nothing_outlives_a_runner_that_was_killed() {
    let project = Project::new();
    let keep = project.path("pid");
    let project = project.stage(
        "S",
        &format!("shell = '''{STRAY} {}; sleep 600'''\noutputs = [\"out\"]", keep.display()),
    );
    let mut runner = project.command(&["run", "stages"]).spawn().expect("started");
    wait_until("the command runs", || fs::read_to_string(&keep).is_ok_and(|pid| !pid.is_empty()));
    runner.kill().expect("killed");
    runner.wait().expect("waited for");
    let pid = project.read("pid");
    wait_until("the stray is dead", || !lives(&pid));
    // The next run starts at once and clears away what is left.
    project.write(
        "stages/S.toml",
        &project.read("stages/S.toml").replace("sleep 600", "echo done > out"),
    );
    project.run().expect(0, "wrote out");
    let left = fs::read_dir(project.path("runs/cache/v1/attempts")).expect("a folder").count();
    assert_eq!(left, 0);
}

#[test]
fn an_executable_stays_executable() {
    let project = Project::new()
        .stage("A", "shell = 'echo \"#!/bin/sh\" > tool; echo \"echo hi\" >> tool; chmod +x tool'\noutputs = [\"tool\"]")
        .stage("B", "shell = './tool > said'\ninputs = [\"tool\"]\noutputs = [\"said\"]");
    project.run().expect(0, "wrote said");
    assert_eq!(project.read("said"), "hi\n");
    let mode = fs::metadata(project.path("tool")).expect("there").permissions().mode();
    assert_eq!(mode & 0o111, 0o111);
}
