#!/usr/bin/env python3
"""Prints how fast passes and verdicts are, beside what they were on 27 November 2026.

    benches/passes.py target/release/runner --model models/SmolLM2-135M-Instruct.Q4_1.gguf

Each row is measured now, on this machine: passes beside llama.cpp's over the same file in the same minute
(benches/prefill.py says how), beside what `cargo bench --bench gemm` gives on one core for products alone, and stages A to E over
seven billion weights, cold. `--large MODEL` names other weights, `--large ''` leaves them out (they take 5 GB of
disk and some minutes). `--build` adds a cold release build. The old column is another machine's: two cores of a Xeon with AVX-512.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time

import llama_cpp
import prefill

TOKENS = ",".join(str(token) for token in range(1, 17))


def say(work, peer, then, now):
    print(f"| {work} | {peer} | {then} | {now} |", flush=True)


def products(pattern):
    """Multiply-adds per second of one core, by the benchmark of products with 256 rows."""
    command = ["cargo", "bench", "--locked", "--bench", "gemm", "--", pattern, "--sample-count", "20"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = text[text.index("256"):].splitlines()
    found = [match for row in rows for match in re.findall(r"([0-9.]+) ([GM])item/s", row)]
    number, unit = found[0]
    return float(number) * {"G": 1e9, "M": 1e6}[unit]


def passes(options):
    """Passes of a small model beside llama.cpp's and beside the products alone."""
    prefill.load_backends()
    cores = os.cpu_count()
    llama = prefill.Llama(options.model, cores)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama.model))
    output = vocabulary * llama_cpp.llama_model_n_embd(llama.model)
    body = llama_cpp.llama_model_n_params(llama.model) - output
    then = {("reference", 16): 34, ("reference", 300): 29, ("e4m3", 16): 31, ("e4m3", 300): 26}
    rates = {name: products(f"{name}.*best_rows") for name in ("e4m3", "bf16")}
    for length in (16, 300):
        tokens = [(504 + 797 * place) % 49_152 for place in range(length)]
        best = {}
        for _ in range(options.rounds):
            took = {"llama.cpp": llama.seconds(tokens)}
            for gemm in ("e4m3", "bf16"):
                arms = prefill.of_runner(options.runner, options.model, tokens, gemm=gemm)
                took["reference"] = min(arms["reference"], took.get("reference", arms["reference"]))
                took[gemm] = arms["emulated"]
            best = {name: min(seconds, best.get(name, seconds)) for name, seconds in took.items()}
        peer = length / best["llama.cpp"]
        for name in ("reference", "e4m3", "bf16"):
            # Three times the prompt's tokens, and two last ones.
            rate = 3 * length / best[name]
            before = f"{then[name, length]} tokens/s" if (name, length) in then else ""
            if name == "reference":
                limit, share = f"llama.cpp: {peer:.0f} tokens/s", f"{rate / peer:.2f} of it"
            else:
                speed = (3 * length * body + 2 * output) / best[name] / cores
                limit = f"its products alone: {rates[name] / 1e9:.1f} G multiply-adds a second and core"
                share = f"{100 * speed / rates[name]:.0f} % of it"
            what = "reference pass" if name == "reference" else f"emulated pass, {name}"
            say(f"{what}, {length} tokens", limit, before, f"{rate:.0f} tokens/s, {share}")


def stages(options):
    """Stages A to E over a large model, cold."""
    with tempfile.TemporaryDirectory(dir=options.folder) as runs:
        command = [options.runner, "run", "stages/", "--model", options.large, "--tokens", TOKENS, "--runs", runs]
        command += ["--format", "plain", "--quiet"]
        # Writes the model.
        subprocess.run([*command, "--select", "C"], check=True, stdout=subprocess.DEVNULL)
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - start
        record = json.loads(max(pathlib.Path(runs).glob("2*/run.json")).read_text())
        stage = {stage["id"]: stage for stage in record["stages"]}["B"]
        arms = {name: arm["seconds"] for name, arm in stage["arms"].items() if arm.get("seconds")}
        # Arms run beside each other.
        measures = stage["seconds"] - max(arms.values())
        shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in arms.items())
        ratio = f"{measures:.1f} s, {measures / max(arms.values()):.2f} of the arms"
        say(f"stage B, `{options.large}`, 16 tokens, cold: arms", "", "64 s, 60 s", shown)
        say("its measures", "0.5 of the arms", "297 s", ratio)
        say("stages A to E, cold", "300 s", "beyond 900 s", f"{whole:.0f} s")


def build():
    with tempfile.TemporaryDirectory() as target:
        start = time.perf_counter()
        environment = {**os.environ, "CARGO_TARGET_DIR": target}
        subprocess.run(["cargo", "build", "--locked", "--release", "--quiet"], check=True, env=environment)
        say("cold release build", "", "526 s", f"{time.perf_counter() - start:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", help="the runner's release binary")
    parser.add_argument("--model", required=True, help="a small GGUF file")
    parser.add_argument("--large", default="synthetic:qwen2.5-7b", help="the model of stages A to E")
    parser.add_argument("--folder", help="where its runs go for the time being; the system's folder else")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each pass; the best counts")
    parser.add_argument("--build", action="store_true", help="build the program anew, too")
    options = parser.parse_args()
    options.runner = os.path.abspath(options.runner)
    say("work", "peer or limit", "27 November 2026", "now")
    say("---", "---", "---", "---")
    passes(options)
    if options.large:
        stages(options)
    if options.build:
        build()


if __name__ == "__main__":
    main()
