#!/usr/bin/env python3
"""Times a whole pass on the emulated arm: an engine's kernels beside the project's own.

    benches/engine_pass.py target/release/runner --model synthetic:qwen2.5-7b --engine transformers

Both arms compute the logits of 16 tokens in bf16, one after the other in one run, on all cores.
Prints each arm's seconds and their ratio. `synthetic:qwen2.5-7b` takes 5 GB of disk, and 8 GB of memory while it is computed.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

CONTRACT = """name = "pass"
version = "1.0.0"
[[equation]]
id = "same"
formula = "emulated = reference"
why = "both compute the same pass"
[[falsifier]]
id = "PAS-001"
equation = "same"
prediction = "the logits are those of the model"
compare = ["emulated", "reference"]
metric = "nmse"
max = 0.01
if_fails = "structural"
why = "bf16 over all layers costs less; a pass of something else costs more"
"""
STAGE = """id = "{id}"
title = "a pass of 16 tokens"
contract = "pass"
arms = ["reference", "emulated"]
{recipe}
[forward]
capture = "logits"
"""


def main():
    """Writes the two stages, runs them, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runner")
    parser.add_argument("--model", default="synthetic:qwen2-tiny")
    parser.add_argument("--engine", default="transformers")
    given = parser.parse_args()
    place = pathlib.Path(tempfile.mkdtemp(prefix="engine-pass-"))
    try:
        (place / "stages").mkdir()
        (place / "contracts").mkdir()
        (place / "contracts/pass.toml").write_text(CONTRACT)
        tokens = list(range(1, 17))
        (place / "stages/pipeline.toml").write_text(f'model = "{given.model}"\ntokens = {tokens}\n')
        recipes = {
            "own": 'recipe = { gemm = "bf16", output = "bf16" }',
            "engine": f'recipe = {{ engine = "{given.engine}" }}',
        }
        for name, recipe in recipes.items():
            (place / f"stages/{name}.toml").write_text(STAGE.format(id=name, recipe=recipe))
        runner = str(pathlib.Path(given.runner).resolve())
        command = [runner, "run", "stages", "--jobs", "1", "--format", "json"]
        done = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.exit(f"`{' '.join(command)}` ended with {done.returncode}")
        stages = {stage["id"]: stage for stage in json.loads(done.stdout)["stages"]}
        seconds = {name: stages[name]["arms"]["emulated"]["seconds"] for name in recipes}
        for name, took in seconds.items():
            print(f"{name:7} {took:8.2f} s")
        print(f"ratio   {seconds['engine'] / seconds['own']:8.2f}")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
