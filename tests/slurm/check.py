#!/usr/bin/env python3
"""Holds runs in jobs of Slurm to local ones, with a real controller and real nodes here.

    tests/slurm/check.py RUNNER                    what CI does
    tests/slurm/check.py RUNNER --kills 100        kills the runner, jobs and nodes so often
    tests/slurm/check.py RUNNER --many 10000       times so many trivial stages beside sbatch
    tests/slurm/check.py RUNNER --only NAME,...    some of the checks

Needs root and Debian's `slurm-wlm munge faketime`. Every process that it ends is one that it started, or a
job of the cluster that it started.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CLUSTER = ROOT / "tests/slurm/cluster.sh"
# A test that goes wrong ends all the same.
LIMIT = 300


def fail(text):
    raise AssertionError(text)


class Cluster:
    """A controller and its nodes, as processes of this one."""

    def __init__(self, folder, nodes=3, **settings):
        self.folder = pathlib.Path(folder)
        self.settings = {**os.environ, **settings}
        self.nodes = nodes

    def __enter__(self):
        said = self.call("start", str(self.nodes))
        os.environ["SLURM_CONF"] = re.search(r"SLURM_CONF=(\S+)", said).group(1)
        return self

    def __exit__(self, *_):
        self.call("stop")

    def call(self, what, *arguments):
        command = [CLUSTER, what, self.folder, *arguments]
        done = subprocess.run(
            command, env=self.settings, text=True, capture_output=True, timeout=120
        )
        if done.returncode != 0:
            fail(f"cluster.sh {what}: {done.stderr}")
        return done.stdout

    def pid(self, name):
        return int((self.folder / f"{name}.pid").read_text())

    def kill_node(self, name):
        """As a power cut of its slurmd; the job on it goes on."""
        os.kill(self.pid(name), signal.SIGKILL)

    def start_node(self, name):
        self.call("node", name)


def slurm(*command):
    done = subprocess.run(command, text=True, capture_output=True, timeout=LIMIT)
    return done.stdout


def queue():
    """The jobs that have not ended."""
    return slurm("squeue", "-h", "-r", "-o", "%i %T").split("\n")[:-1]


def job_runners(batch_root):
    """The runners of this project's jobs: their command names the project's folder."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"slurm-task" in words and any(str(batch_root).encode() in word for word in words):
            found.append(int(entry.name))
    return found


class Project:
    """A folder of stages with runs of its own."""

    def __init__(self, runner, folder):
        self.runner, self.folder = runner, pathlib.Path(folder)
        (self.folder / "stages").mkdir(parents=True)
        self.log = self.folder / "log"

    def shipped(self):
        """The five stages of the repository."""
        for path in (ROOT / "stages").iterdir():
            shutil.copy(path, self.folder / "stages")
        return self

    def counted(self, count, seconds=0.0):
        """A family of commands, each of which writes a line when it begins and ends."""
        numbers = ", ".join(str(number) for number in range(count))
        (self.folder / "stages/pipeline.toml").write_text("[resources]\ncores = 1\n")
        (self.folder / "stages/work.toml").write_text(f"""
id = "work"
title = "t"
contract = "command"
[for]
n = [{numbers}]
[command]
shell = "echo begin {{n}} >> {self.log}; sleep {seconds}; echo {{n}} > out-{{n}}; echo end {{n}} >> {self.log}"
outputs = ["out-{{n}}"]
""")
        (self.folder / "stages/sum.toml").write_text(f"""
id = "sum"
title = "t"
contract = "command"
needs = ["work"]
[command]
shell = "cat out-*[0-9] | sort -n | sha256sum > sum"
inputs = [{", ".join(f'"out-{number}"' for number in range(count))}]
outputs = ["sum"]
""")
        return self

    def trivial(self, count):
        (self.folder / "stages/pipeline.toml").write_text("[resources]\ncores = 1\n")
        # One manifest holds a thousand members at most.
        for first in range(0, count, 1000):
            numbers = ", ".join(str(number) for number in range(first, min(first + 1000, count)))
            (self.folder / f"stages/work-{first}.toml").write_text(
                f'id = "work{first}"\ntitle = "t"\ncontract = "command"\n'
                f'[for]\nn = [{numbers}]\n[command]\nargv = ["true", "n{{n}}"]\n'
            )
        return self

    def start(self, *arguments, runs="runs", **settings):
        command = [self.runner, "run", "stages", "--runs", runs, "--format", "json", *arguments]
        err = open(self.folder / "err", "a+", encoding="utf-8")
        err.seek(0, 2)
        process = subprocess.Popen(
            command, cwd=self.folder, env={**os.environ, **settings}, text=True,
            stdout=subprocess.PIPE, stderr=err, start_new_session=True,
        )
        process.from_here = err.tell()
        process.err = err
        return process

    def end(self, process):
        out, _ = process.communicate(timeout=LIMIT)
        process.err.seek(process.from_here)
        said = process.err.read()
        process.err.close()
        # One that was killed while it printed has printed a part.
        whole = out.strip().startswith("{") and process.returncode >= 0
        record = json.loads(out) if whole else None
        return process.returncode, record, said

    def run(self, *arguments, **settings):
        return self.end(self.start(*arguments, **settings))

    def events(self):
        for path in sorted(self.folder.glob("runs/2*/events.jsonl")):
            for line in path.read_text().splitlines():
                yield json.loads(line)


def verdicts(record):
    """What a record says of its stages, but for times and places."""
    stages = {}
    for stage in record["stages"]:
        arms = {
            name: (arm["state"].replace("reused", "ran"), arm.get("object"), arm.get("key"))
            for name, arm in stage["arms"].items()
        }
        stages[stage["id"]] = (
            stage["verdict"], stage["why"], arms, stage["judgements"], stage["measures"],
            stage.get("first"), stage.get("diagnoses"),
        )
    return stages


def same(one, other, what):
    one, other = verdicts(one), verdicts(other)
    if one.keys() != other.keys():
        fail(f"{what}: {one.keys()} and {other.keys()}")
    for stage in one:
        for before, after in zip(one[stage], other[stage]):
            if before != after:
                fail(f"{what}: stage {stage}: {before}\nand {after}")


def nothing_left(project):
    left = queue()
    if left:
        fail(f"jobs are left in the queue: {left}")
    folder = project.folder / "runs/cache/v1/slurm"
    left = [path.name for path in folder.iterdir() if path.is_dir()]
    if left:
        fail(f"folders of jobs are left: {left}")


def five_stages(runner, folder, cluster):
    """The verdicts of a local run, and each result under the same key."""
    project = Project(runner, folder / "five").shipped()
    code, here, said = project.run(runs="here")
    if code != 0:
        fail(f"the local run: {code}: {said}")
    code, there, said = project.run("--on", "slurm")
    if code != 0:
        fail(f"the run on Slurm: {code}: {said}")
    same(here, there, "here and on Slurm")
    nothing_left(project)
    machines = {arm.get("machine") for stage in there["stages"] for arm in stage["arms"].values()}
    submitted = [event for event in project.events() if event.get("state") == "submitted"]
    if not submitted:
        fail(f"nothing was submitted; {machines}")
    # What is in the cache is not submitted again, but for what only a node can know.
    code, again, said = project.run("--on", "slurm")
    same(here, again, "here and again")
    reused = [arm["state"] for stage in again["stages"] for arm in stage["arms"].values()]
    if "ran" in reused or code != 0:
        fail(f"a second run computes: {reused}")
    # Together with a stage that stays here.
    path = project.folder / "stages/c-embedding.toml"
    path.write_text(path.read_text() + '\n[executor]\non = "here"\n')
    pipeline = project.folder / "stages/pipeline.toml"
    pipeline.write_text(pipeline.read_text() + '\n[executor]\non = "slurm"\ntime = 5\n')
    code, mixed, said = project.run(runs="mixed")
    if code != 0 or "submitted" not in said:
        fail(f"[executor]: {code}: {said}")
    same(here, mixed, "here and with [executor]")


def shared_cache(runner, folder, cluster):
    """What jobs computed is sent to a shared cache by the runner that submitted them, and nobody submits what is there."""
    shared = folder / "shared-cache"
    shared.mkdir()
    cache = ("--cache", f"file://{shared}")
    project = Project(runner, folder / "cached").shipped()
    code, there, said = project.run("--on", "slurm", *cache)
    if code != 0 or "submitted" not in said:
        fail(f"the run on Slurm: {code}: {said}")
    if not there["cache"]["sent"] or there["cache"]["problems"]:
        fail(f"what was sent: {there['cache']}")
    # What a node computes for its own chip is a job's all the same: the runner cannot know its key.
    for mode, arguments, arms in (
        ("here", (), ("reference", "emulated")), ("there", ("--on", "slurm"), ("reference",))
    ):
        arguments = (*arguments, "--cache-mode", "read-only")
        code, again, said = project.run(*cache, *arguments, runs=mode)
        same(there, again, f"again {mode}")
        states = {stage["arms"][arm]["state"] for stage in again["stages"] for arm in arms}
        if code != 0 or states != {"reused"} or again["cache"]["problems"]:
            fail(f"again {mode}: {code}: {states}, {again['cache']}, {said}")
        if mode == "here" and again["cache"]["fetched"] != there["cache"]["sent"]:
            fail(f"again {mode}: {again['cache']}, {there['cache']}")


# On a node of its own the folder of runs is the node's: what the runner has there is covered by an empty
# file system, for this task alone.
APART = """#!/bin/sh
# What the runner says of its node's folder comes through the shared cache alone.
exec unshare --mount sh -c 'mount -t tmpfs none "$1" && shift && exec "$@"' sh {runs} {runner} "$@"
"""


def apart(project, runner, more=""):
    """Has each task see a folder of runs that nobody else has."""
    runs = project.folder / "runs"
    runs.mkdir(exist_ok=True)
    program = project.folder / "apart.sh"
    program.write_text(APART.format(runs=runs, runner=runner))
    program.chmod(0o755)
    pipeline = project.folder / "stages/pipeline.toml"
    before = pipeline.read_text() if pipeline.exists() else ""
    pipeline.write_text(
        f'{before}\n[executor]\non = "slurm"\nshared_folder = false\nprogram = "{program}"\n{more}'
    )
    return project


def letters_left(shared):
    """What runners and jobs have told each other and nobody has removed."""
    return [str(path) for path in pathlib.Path(shared).glob("v1/slurm/**/*") if path.is_file()]


def no_shared_folder(runner, folder, cluster):
    """Nodes that see no folder of the runner's: the shared cache carries all, and the verdicts are a local run's."""
    can = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"])
    if can.returncode != 0:
        return "NOT TRIED, since this machine lets nobody mount"
    shared = folder / "letters"
    shared.mkdir()
    cache = ("--cache", f"file://{shared}")
    project = Project(runner, folder / "apart").shipped()
    code, here, said = project.run(runs="here")
    if code != 0:
        fail(f"the local run: {code}: {said}")
    apart(project, runner)
    code, there, said = project.run(*cache)
    if code != 0 or "submitted" not in said:
        fail(f"nodes without a shared folder: {code}: {said}")
    same(here, there, "here and on nodes without a shared folder")
    if there["cache"]["problems"] or not there["cache"]["fetched"]:
        fail(f"what was fetched: {there['cache']}")
    nothing_left(project)
    if letters_left(shared):
        fail(f"letters are left: {letters_left(shared)}")
    # What this machine has is brought to the nodes; nothing is done twice.
    code, again, said = project.run(*cache)
    states = {arm["state"] for stage in again["stages"] for arm in stage["arms"].values()}
    same(here, again, "here and again on nodes without a shared folder")
    if code != 0 or "ran" in states:
        fail(f"a second run: {code}: {states}: {said}")
    # Where the runner has what its shared cache has not.
    emptied = folder / "letters-empty"
    emptied.mkdir()
    shutil.rmtree(project.folder / "runs/cache/v1/actions")
    local = Project(runner, folder / "apart-local").shipped()
    code, _, said = local.run("--arms", "reference")
    apart(local, runner)
    code, mixed, said = local.run("--cache", f"file://{emptied}")
    if code != 0:
        fail(f"a reference of this machine: {code}: {said}")
    same(here, mixed, "here, and with a reference that only the runner had")

    # What cannot be is known before anything is submitted.
    def refused(words, *arguments, code=2):
        found, record, said = project.run(*arguments)
        for word in words:
            if word not in said:
                fail(f"{words}: {said}")
        if found != code or record is not None or queue():
            fail(f"{words}: status {found}, {queue()}: {said}")

    refused(["shared_folder = false", "--cache s3://"])
    refused(["must write"], *cache, "--cache-mode", "read-only")
    refused(["plain HTTP"], "--cache", "http://127.0.0.1:1/x")
    command = apart(Project(runner, folder / "apart-command").counted(2), runner)
    code, record, said = command.run(*cache)
    if code != 2 or 'on = "here"' not in said:
        fail(f"a command without a shared folder: {code}: {said}")

    # A runner that dies is taken up, and nodes that cannot reach the cache are told apart.
    project = apart(Project(runner, folder / "apart-attach").shipped(), runner)
    process = project.start(*cache, "--force")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not queue():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    project.end(process)
    code, record, said = project.run("--attach")
    if code != 2 or "--cache" not in said:
        fail(f"--attach without --cache: {code}: {said}")
    code, record, said = project.run(*cache, "--attach")
    if code != 0:
        fail(f"--attach: {code}: {said}")
    same(here, record, "here and after --attach")
    nothing_left(project)
    if letters_left(shared):
        fail(f"letters are left: {letters_left(shared)}")
    hidden = folder / "hidden"
    hidden.mkdir()
    program = project.folder / "apart.sh"
    program.write_text(program.read_text().replace('"$1" &&', f'"$1" && mount -t tmpfs none {hidden} &&'))
    code, record, said = project.run("--cache", f"file://{hidden}", "--select", "C", "--force")
    whys = [stage["why"] for stage in record["stages"]]
    if code != 4 or not all("shared cache has no" in why or "use the shared cache" in why for why in whys):
        fail(f"a node that does not reach the shared cache: {code}: {whys} {said}")


def bad_input(runner, folder, cluster):
    """Errors that are known before anything is submitted."""
    project = Project(runner, folder / "bad").shipped()
    pipeline = project.folder / "stages/pipeline.toml"
    sound = pipeline.read_text()

    def refused(words, *arguments, code=2, executor="", resources="", **settings):
        pipeline.write_text(f"{sound}\n[executor]\n{executor}\n[resources]\n{resources}\n")
        found, record, said = project.run("--on", "slurm", *arguments, **settings)
        for word in words:
            if word not in said:
                fail(f"{words}: {said}")
        if found != code or record is not None or queue():
            fail(f"{words}: status {found}, {queue()}: {said}")

    refused(["`scontrol` is not installed"], PATH="/nonexistent")
    refused(["no partition `nowhere`", "closed, test, urgent"], executor='partition = "nowhere"')
    refused(["`closed` of Slurm is down"], executor='partition = "closed"')
    refused(
        ["has the feature `h100`", "a100, h200", "stage `A`"], executor='constraint = "h100"'
    )
    refused(["Slurm would refuse"], executor='constraint = "h200&a100"')
    refused(["1000 GiB of memory"], resources="memory = 1000")
    refused(["9 GPUs"], resources="gpus = 9")
    refused(["1 GPUs of type `b200`"], executor='gpu = "b200"', resources="gpus = 1")
    refused(["600 minutes, and partition `urgent` allows 60"], executor='partition = "urgent"\ntime = 600')
    refused(["option"], executor='options = ["--no-such-option"]')
    refused(["`scontrol` failed"], code=74, SLURM_CONF="/nonexistent/slurm.conf")
    # Another clock, as the runner sees it.
    if not shutil.which("faketime"):
        fail("`faketime` is not installed, and clocks cannot be tried without it")
    pipeline.write_text(sound)
    command = ["faketime", "-f", "+5h", runner, "run", "stages", "--on", "slurm"]
    done = subprocess.run(command, cwd=project.folder, text=True, capture_output=True)
    if "clock of this machine" not in done.stderr or done.returncode != 2:
        fail(f"clocks: {done.returncode}: {done.stderr}")

    # A runner of another build on the nodes.
    other = project.folder / "other-runner"
    binary = pathlib.Path(runner).read_bytes()
    pipeline.write_text(sound)
    process = project.start("--on", "slurm", runs="first")
    heads = project.folder / "first/cache/v1/slurm"
    deadline = time.monotonic() + 60
    while not list(heads.glob("*/*/head.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    head = next(heads.glob("*/*/head.json")).read_text()
    project.end(process)
    arms = re.search(r"arms ([0-9a-f]{8})", head).group(1)
    changed = arms[:-1] + ("0" if arms[-1] != "0" else "1")
    other.write_bytes(binary.replace(arms.encode(), changed.encode()))
    other.chmod(0o755)
    pipeline.write_text(f'{sound}\n[executor]\nprogram = "{other}"\n')
    code, record, said = project.run("--on", "slurm", "--select", "C")
    whys = [stage["why"] for stage in record["stages"]]
    if code != 4 or not all(arms in why and changed in why for why in whys):
        fail(f"another runner: {code}: {whys} {said}")
    # One that is not there, and a folder that the node does not see.
    pipeline.write_text(f'{sound}\n[executor]\nprogram = "/nonexistent/runner"\n')
    code, record, said = project.run("--on", "slurm", "--select", "C")
    whys = [stage["why"] for stage in record["stages"]]
    if code != 4 or not all("cannot start the runner" in why for why in whys):
        fail(f"no runner: {code}: {whys} {said}")
    if queue():
        fail(f"left: {queue()}")


def endings(runner, folder, cluster):
    """A time limit, a cancelled job, a preempted one and a stage's own failure, told apart."""
    project = Project(runner, folder / "endings")
    (project.folder / "stages/pipeline.toml").write_text(
        '[executor]\non = "slurm"\n[resources]\ncores = 1\n'
    )

    def stage(name, shell, more=""):
        (project.folder / f"stages/{name}.toml").write_text(
            f'id = "{name}"\ntitle = "t"\ncontract = "command"\n'
            f'[command]\nshell = "{shell}"\n{more}'
        )

    stage("bad", "exit 7")
    stage("cancelled", "sleep 100")
    stage("after", "true")
    path = project.folder / "stages/after.toml"
    path.write_text(path.read_text().replace("contract", 'needs = ["cancelled"]\ncontract'))
    process = project.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        running = slurm("squeue", "-h", "-r", "-t", "running", "-o", "%F_%K").split()
        if len(running) == 1 and project.log.parent.joinpath("err").read_text().count("judged"):
            break
        time.sleep(0.2)
    slurm("scancel", *running)
    code, record, said = project.end(process)
    whys = {stage["id"]: (stage["verdict"], stage["why"]) for stage in record["stages"]}
    if whys["bad"][0] != "structural" or "status 7" not in whys["bad"][1]:
        fail(f"{whys}")
    if whys["cancelled"][0] != "error" or "somebody cancelled its job" not in whys["cancelled"][1]:
        fail(f"{whys}")
    if whys["after"][0] != "blocked":
        fail(f"{whys}")

    # Preempted by a job of a partition that goes before: queued again by Slurm, and done.
    for path in (project.folder / "stages").glob("[!p]*.toml"):
        path.unlink()
    stage("long", "sleep 8")
    process = project.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not slurm("squeue", "-h", "-t", "running").strip():
        time.sleep(0.2)
    every = ["--exclusive", f"--nodes={cluster.nodes}", "--partition=urgent"]
    slurm("sbatch", *every, "--output=/dev/null", "--wrap", "sleep 3")
    code, record, said = project.end(process)
    if code != 0 or not ("requeued" in said or "PREEMPTION" in said):
        fail(f"preempted: {code}: {said}")
    deadline = time.monotonic() + 60
    while queue() and time.monotonic() < deadline:
        time.sleep(0.2)


def stopped(runner, folder, cluster):
    """Ctrl-C cancels what the runner started, and nothing else."""
    project = Project(runner, folder / "stopped").counted(6, seconds=60)
    other = slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600").strip()
    process = project.start("--on", "slurm")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not project.log.exists():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    code, record, said = project.end(process)
    left = [line.split()[0] for line in queue()]
    slurm("scancel", other)
    if code != 130 or left != [other]:
        fail(f"stopped: {code}, left {left} and not {other}: {said}")
    whys = {stage["why"] for stage in record["stages"]}
    if "stopped on request" not in whys:
        fail(f"{whys}")
    deadline = time.monotonic() + 60
    while queue() and time.monotonic() < deadline:
        time.sleep(0.2)


def families(runner, folder, cluster):
    """A family becomes an array, with several items to a task where it is large."""
    project = Project(runner, folder / "family").counted(60)
    code, record, said = project.run("--on", "slurm")
    if code != 0 or len(record["stages"]) != 61:
        fail(f"a family: {code}: {said}")
    first = next(event for event in project.events() if event.get("state") == "submitted")
    if "60 items in 24 tasks" != first["why"] and "60 items in" not in first["why"]:
        fail(f"{first}")
    nothing_left(project)


def attach(runner, folder, cluster):
    """Jobs of a dead runner are an error, or are taken up."""
    project = Project(runner, folder / "attach").counted(4, seconds=5)
    process = project.start("--on", "slurm")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not project.log.exists():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    project.end(process)
    before = len(queue())
    code, record, said = project.run("--on", "slurm")
    if code != 2 or "--attach" not in said or len(queue()) != before:
        fail(f"without --attach: {code}: {said}")
    code, record, said = project.run("--on", "slurm", "--attach")
    if code != 0 or "took up 4 items" not in said:
        fail(f"with --attach: {code}: {said}")
    lines = project.log.read_text().split("\n")
    twice = [line for line in lines if line and lines.count(line) > 1]
    if twice:
        fail(f"computed twice: {twice}")
    nothing_left(project)
    same_sum(project, 4)


def same_sum(project, count):
    """What the last stage makes of all others is what it must be."""
    text = "".join(f"{number}\n" for number in range(count))
    wanted = subprocess.run(["sha256sum"], input=text, text=True, capture_output=True).stdout
    found = (project.folder / "sum").read_text()
    if found != wanted:
        fail(f"the sum is {found}, and must be {wanted}")


def kills(runner, folder, cluster, count, seed):
    """Killed at random: nothing is lost, computed twice or left, and no verdict is false."""
    draw = random.Random(seed)
    print(f"kills: seed {seed}", flush=True)
    five = Project(runner, folder / "kills-five").shipped()
    code, here, said = five.run(runs="here")
    done, rounds, of = 0, 0, {"runner": 0, "job": 0, "slurmd": 0}
    began = time.monotonic()
    while done < count:
        rounds += 1
        size = draw.randint(4, 12)
        project = Project(runner, folder / f"kills-{rounds}")
        if rounds % 4 == 0:
            project.shipped()
        else:
            project.counted(size, seconds=draw.choice([0.2, 1, 2]))
        process = project.start("--on", "slurm")
        moments, at = [], {}
        for _ in range(draw.randint(1, 3)):
            time.sleep(draw.uniform(0.1, 2.5))
            what = draw.choice(["runner", "job", "slurmd"])
            if process.poll() is not None and what == "runner":
                continue
            if what == "runner":
                os.kill(process.pid, signal.SIGKILL)
                project.end(process)
                if draw.random() < 0.5:
                    time.sleep(draw.uniform(0, 2))
                process = project.start("--on", "slurm", "--attach")
            elif what == "job":
                victims = job_runners(project.folder)
                if not victims:
                    continue
                try:
                    os.kill(draw.choice(victims), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            else:
                name = draw.choice([f"n{number + 1}" for number in range(cluster.nodes)])
                cluster.kill_node(name)
                if draw.random() < 0.7:
                    time.sleep(draw.uniform(0, 2))
                cluster.start_node(name)
            moments.append(what)
            of[what] += 1
            done += 1
        code, record, said = project.end(process)
        if record is None or code != 0:
            fail(f"round {rounds}, {moments}: status {code}: {said}")
        if rounds % 4 == 0:
            same(here, record, f"round {rounds}, {moments}")
        else:
            same_sum(project, size)
            lines = project.log.read_text().split("\n")
            ends = {line for line in lines if line.startswith("end")}
            if len(ends) != size:
                fail(f"round {rounds}, {moments}: {len(ends)} of {size} ended")
            # A job that was killed between the end of its command and its record may do it again.
            twice = sum(lines.count(line) - 1 for line in ends)
            if twice > moments.count("job"):
                fail(f"round {rounds}, {moments}: {twice} ended twice")
            ran = {}
            for event in project.events():
                if event["event"] == "arm_finished" and event["state"] == "ran":
                    ran[event["stage"]] = ran.get(event["stage"], 0) + 1
            again = [stage for stage, times in ran.items() if times > 1]
            if again:
                fail(f"round {rounds}, {moments}: computed twice under one key: {again}")
        nothing_left(project)
        shutil.rmtree(project.folder)
        print(f"round {rounds}: {', '.join(moments) or 'nothing'}; {done} kills", flush=True)
    seconds = time.monotonic() - began
    print(f"{done} kills ({of}) in {rounds} rounds and {seconds:.0f} s: all verdicts are right")


def many(runner, folder, cluster, count):
    """So many trivial stages, beside an array of as many trivial tasks."""
    project = Project(runner, folder / "many").trivial(count)
    started = time.monotonic()
    process = project.start("--on", "slurm", "--quiet")
    code, record, said = project.end(process)
    seconds = time.monotonic() - started
    usage = os.times()
    if code != 0 or len(record["stages"]) != count:
        fail(f"many: {code}: {said[-2000:]}")
    nothing_left(project)
    print(f"{count} trivial stages through Slurm: {seconds:.1f} s (processor: {usage.children_user + usage.children_system:.1f} s)", flush=True)
    largest = int(re.search(r"MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config")).group(1))
    started = time.monotonic()
    left = count
    while left > 0:
        size = min(left, largest)
        slurm(
            "sbatch", f"--array=0-{size - 1}", "--cpus-per-task=1", "--output=/dev/null", "--wrap", "true"
        )
        left -= size
    while queue():
        time.sleep(0.5)
    array = time.monotonic() - started
    print(f"`sbatch --array` of {count} tasks of `true`: {array:.1f} s; ratio {seconds / array:.2f}")


def small_arrays(runner, folder, cluster):
    """A controller that takes small arrays only: they are kept to."""
    with other_cluster(folder / "small", CLUSTER_MAX_ARRAY="4"):
        project = Project(runner, folder / "arrays").counted(40, seconds=0.1)
        code, record, said = project.run("--on", "slurm")
        if code != 0 or "40 items in 4 tasks" not in said:
            fail(f"small arrays: {code}: {said}")
        same_sum(project, 40)
        nothing_left(project)


def full_queue(runner, folder, cluster):
    """A controller that keeps as many jobs as it may: the runner waits, and goes on."""
    few = {"CLUSTER_MAX_JOBS": "10", "CLUSTER_MIN_JOB_AGE": "2"}
    with other_cluster(folder / "full", **few):
        other = slurm(
            "sbatch", "--parsable", "--array=0-8", "--output=/dev/null", "--wrap", "sleep 5"
        ).strip()
        project = Project(runner, folder / "full-queue").counted(3)
        code, record, said = project.run("--on", "slurm")
        if code != 0 or "nothing can be submitted for now" not in said:
            fail(f"a full queue: {code}: {said}")
        slurm("scancel", other)
        while queue():
            time.sleep(0.2)
        same_sum(project, 3)
        nothing_left(project)


def node_failure(runner, folder, cluster):
    """A node that is gone for good: its work is done elsewhere."""
    with other_cluster(folder / "failing", CLUSTER_NODE_TIMEOUT="5") as failing:
        project = Project(runner, folder / "node").counted(4, seconds=20)
        process = project.start("--on", "slurm")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            running = slurm("squeue", "-h", "-r", "-t", "running", "-o", "%B").split()
            if running and job_runners(project.folder):
                break
            time.sleep(0.2)
        name = running[0]
        # All that its slurmd started is gone with it.
        spool = str(failing.folder / f"spool-{name}").encode()
        failing.kill_node(name)
        for pid in job_runners(project.folder):
            try:
                environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={name}".encode() in environment:
                    parent = int(re.search(r"PPid:\s*(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text()).group(1))
                    os.kill(parent, signal.SIGKILL)
                    os.kill(pid, signal.SIGKILL)
            except (OSError, AttributeError):
                pass
        code, record, said = project.end(process)
        if code != 0:
            fail(f"a node that failed: {code}: {spool} {said}")
        same_sum(project, 4)
        nothing_left(project)
        print(said)


class other_cluster(Cluster):
    """Another one for a while."""

    def __init__(self, folder, **settings):
        super().__init__(folder, nodes=2, **settings)

    def __enter__(self):
        self.before = os.environ["SLURM_CONF"]
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        os.environ["SLURM_CONF"] = self.before


CHECKS = {
    "five_stages": five_stages, "shared_cache": shared_cache, "no_shared_folder": no_shared_folder, "bad_input": bad_input,
    "families": families, "attach": attach, "stopped": stopped, "endings": endings, "small_arrays": small_arrays,
}
# Each takes a minute or two, of which most is Slurm's own patience.
BY_HAND = {"full_queue": full_queue, "node_failure": node_failure}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("runner")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", help="a folder that is kept")
    args = parser.parse_args()
    runner = str(pathlib.Path(args.runner).resolve())
    only = [name for name in args.only.split(",") if name]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(args.keep or folder).resolve()
        folder.mkdir(exist_ok=True)
        # Digests and slots of its own.
        os.environ["XDG_CACHE_HOME"] = str(folder / "xdg")
        # munged takes no socket below a folder that others may not enter.
        folder.chmod(0o755)
        with Cluster(folder / "cluster") as cluster:
            if args.many:
                return many(runner, folder, cluster, args.many)
            for name, check in {**CHECKS, **BY_HAND}.items():
                if name in only or (not only and name in CHECKS):
                    started = time.monotonic()
                    # What could not be tried says so; it has shown nothing.
                    said = check(runner, folder, cluster) or "as it must be"
                    print(f"{name}: {said}, {time.monotonic() - started:.0f} s", flush=True)
            if args.kills and (not only or "kills" in only):
                kills(runner, folder, cluster, args.kills, args.seed)
    return None


if __name__ == "__main__":
    sys.exit(main())
