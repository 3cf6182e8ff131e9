#!/usr/bin/env python3
"""Holds this checkout's speed to another revision's, in one run on this machine.

    benches/check.py [REVISION]      the last release (the newest tag `v*`) where none is named

Builds both, in target/bench-check, and times the same work with each in turn: products
(`cargo bench --bench gemm`), passes, stages with nothing to do, a fan of stages, verdicts judged anew. Of each the
best of the rounds counts, and what looks slower is measured once more before it is believed. Prints a line for each
and ends with 1 where one takes more than 5 % longer.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import peers

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACE = ROOT / "target" / "bench-check"
SLOWER = 1.05
FORWARD = """id = "pass"
title = "a pass"
contract = "{contract}"
[forward]
capture = "{capture}"
"""


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)


def last_release():
    tag = git("describe", "--tags", "--abbrev=0", "--match", "v*").stdout.strip()
    if not tag:
        sys.exit("no tag `v*` is in this repository: name the revision to compare with, as `just bench-check HEAD~20`")
    return tag


def built(folder, target):
    """The program and the benchmark of products, built from a folder."""
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    run = lambda *arguments: subprocess.run(["cargo", *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True)
    print(f"building {folder}", file=sys.stderr, flush=True)
    run("build", "--locked", "--release")
    said = run("bench", "--locked", "--bench", "gemm", "--no-run").stderr
    bench = re.search(r"Executable .*\((.+)\)", said)[1]
    return {"runner": str(target / "release" / "runner"), "gemm": str((folder / bench).resolve()), "folder": folder}


class Command:
    """Times a command of the program."""

    def __init__(self, name, arguments, prepare=None):
        self.name, self.arguments, self.prepare = name, arguments, prepare

    def seconds(self, side, work):
        if self.prepare:
            work = self.prepare(work) or work
        start = time.perf_counter()
        done = subprocess.run([side["runner"], *self.arguments(work)], cwd=work, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode not in (0, 1):
            sys.exit(f"{self.name}: {side['runner']} ended with {done.returncode}: {done.stderr[-500:]}")
        return seconds


class Product:
    """Times one benchmark of products."""

    def __init__(self, name):
        self.name = f"products: {name}"
        self.filter = name

    def seconds(self, side, work):
        command = [side["gemm"], "--bench", self.filter, "--sample-count", "20"]
        text = subprocess.run(command, capture_output=True, text=True, cwd=work).stdout
        # The fastest sample of each row.
        found = [re.search(r"([0-9.]+) (ns|µs|ms|s) +│", row) for row in text.splitlines()]
        units = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1}
        times = [float(match[1]) * units[match[2]] for match in found if match]
        if not times:
            sys.exit(f"{self.name}: no time in what the benchmark printed: {text[-500:]}")
        return sum(times)


def new_fan(work):
    """A project for one round. Nothing is removed before the end: files that were removed a moment ago
    make others slower to create."""
    folder = work / f"fan-{time.time_ns()}"
    peers.write_project("runner", "fan", 1_000, folder)
    return folder


def forgotten(work):
    """Leaves of earlier rounds the generated model alone: else measures are found in the cache."""
    for path in (work / "runs" / "cache" / "v1").glob("*"):
        if path.name != "models":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def another_contract(work):
    """The stages A to E, once computed; they are judged anew where a contract's text differs."""
    contract = work / "contracts" / "per-layer.toml"
    contract.write_text(contract.read_text() + f"# {time.time_ns()}\n")


def cases(folder):
    """What is timed, with the folder that each works in."""
    peers.write_project("runner", "chain", 10_000, folder / "chain")
    for capture, contract in (("logits", "numbers"), ("every-site", "per-layer")):
        work = folder / capture
        (work / "stages").mkdir(parents=True)
        shutil.copytree(ROOT / "contracts", work / "contracts")
        shutil.copy(ROOT / "benches/numbers.toml", work / "contracts")
        (work / "stages" / "a.toml").write_text(FORWARD.format(capture=capture, contract=contract))
    five = folder / "five"
    shutil.copytree(ROOT / "stages", five / "stages")
    shutil.copytree(ROOT / "contracts", five / "contracts")
    tokens = ",".join(str(5 + 37 * place) for place in range(64))
    model = ["--model", "synthetic:qwen2.5-0.5b", "--tokens", tokens]
    run = lambda *more: lambda work: ["run", "stages", "--quiet", "--jobs", "2", *more]
    yield folder, Command("a fan of 1,000 stages, cold", run(), new_fan)
    yield folder / "chain", Command("10,000 stages with nothing to do", run())
    yield folder / "logits", Command("logits of 64 tokens, 0.5 G weights", run(*model), forgotten)
    yield folder / "every-site", Command("every site of 64 tokens, its measures too", run(*model), forgotten)
    yield folder / "five", Command("A to E judged anew", run(*model), another_contract)
    for name in ("e4m3_fast_best_rows", "bf16_best_rows", "quantize", "reference", "decode"):
        yield folder, Product(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", help="what to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each; the best counts")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    revision = options.revision or last_release()
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").stdout.strip()
    if not commit:
        sys.exit(f"`{revision}` is no revision of this repository; `git log` lists them")
    before = PLACE / commit[:12]
    if not before.exists():
        git("worktree", "prune")
        added = git("worktree", "add", "--detach", str(before), commit)
        if added.returncode:
            sys.exit(f"git could not check {revision} out: {added.stderr.strip()}")
    sides = {revision: built(before, PLACE / "target"), "now": None}
    # The other one's program would be overwritten.
    for key in ("runner", "gemm"):
        kept = PLACE / f"{key}-{commit[:12]}"
        shutil.copy2(sides[revision][key], kept)
        sides[revision][key] = str(kept)
    sides["now"] = built(ROOT, PLACE / "target")
    slow = []
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        # Each side keeps its own results: the code is part of every key.
        places = {side: pathlib.Path(folder) / ("before" if side == revision else "now") for side in sides}
        work = {side: list(cases(place)) for side, place in places.items()}
        print(f"| work | {revision} | now | ratio |\n|---|---|---|---|", flush=True)
        for number, (_, case) in enumerate(work["now"]):
            if options.only not in case.name:
                continue
            best = {}
            for _ in range(2):
                for turn in range(options.rounds):
                    # Each goes first as often as the other.
                    for side in sorted(sides, reverse=turn % 2 == 1):
                        where, of_side = work[side][number]
                        seconds = of_side.seconds(sides[side], where)
                        best[side] = min(seconds, best.get(side, seconds))
                ratio = best["now"] / best[revision]
                if ratio <= SLOWER:
                    break
            print(f"| {case.name} | {best[revision]:.4g} s | {best['now']:.4g} s | {ratio:.2f} |", flush=True)
            if ratio > SLOWER:
                slow.append(f"{case.name}: {ratio:.2f} times as long")
    if slow:
        sys.exit(f"slower than {revision}:\n  " + "\n  ".join(slow))
    print(f"nothing is more than 5 % slower than {revision}")


if __name__ == "__main__":
    main()
