"""Holds the emulated arm with its products on a GPU (`--emulated-on gpu`) to the CPU's bits.

    python3 scripts/emulated_on_gpu.py target/release/runner

Needs a GPU. Each line is a model and a recipe: how many values of how many sites were compared by their hashes, how many
sites differ, and the seconds of the arm on the CPU's cores and on the GPU. It ends with status 1 where one differs.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNNER = os.path.abspath(sys.argv[1])
ROWS = 'scale = { activation = "token", weight = "channel" }'
BLOCKS = 'scale = { activation = "block128", weight = "block128" }'
# The stage, the model, how many tokens, and the keys of the recipe.
CASES = [
    *[
        ("B", "synthetic:qwen2-tiny", 70, keys)
        for keys in (
            ['gemm = "e4m3"'], ['gemm = "e4m3"', 'accumulate = "fast"'], ['gemm = "e4m3"', ROWS], ['gemm = "e4m3"', BLOCKS],
            ['gemm = "e4m3"', 'chip = "ada"'], ['gemm = "e4m3"', 'chip = "blackwell"'], ['gemm = "e5m2"'],
            ['gemm = "bf16"'], ['gemm = "bf16"', 'chip = "ampere"'], ['gemm = "f16"'], ['gemm = "f16"', 'chip = "turing"'],
            ['gemm = "tf32"'], ['gemm = "f32"'], ['gemm = "int8"', ROWS], ['gemm = "mxfp8"', 'chip = "blackwell"'],
        )
    ],
    ("B", "synthetic:mixtral-tiny", 70, ['gemm = "e4m3"']),
    *[("A", "synthetic:qwen2.5-0.5b", tokens, [f'gemm = "{gemm}"']) for tokens in (16, 256) for gemm in ("e4m3", "bf16")],
]


def arm(folder, stage, model, tokens, on):
    runs = f"{folder}/{on}"
    numbers = ",".join(str(number + 1) for number in range(tokens))
    argv = [RUNNER, "run", f"{folder}/stages", "--select", stage, "--arms", "reference,emulated", "--runs", runs]
    argv += ["--model", model, "--tokens", numbers, "--emulated-on", on, "--reference-on", "gpu", "--quiet"]
    done = subprocess.run(argv, capture_output=True, text=True)
    records = glob.glob(f"{runs}/2*/run.json")
    if not records:
        sys.exit(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
    with open(records[0]) as file:
        stages = json.load(file)["stages"]
    return next(found for found in stages if found["id"] == stage)["arms"]["emulated"]


def main():
    differing = 0
    print("stage  model                   tokens  differ of sites (values)       CPU       GPU  recipe")
    for stage, model, tokens, keys in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("stages", "contracts"):
                shutil.copytree(f"{ROOT}/{name}", f"{folder}/{name}")
            with open(f"{folder}/stages/pipeline.toml") as file:
                text = re.sub(r"(?ms)^\[recipe\].*?(?=^\[|\Z)", "", file.read())
            with open(f"{folder}/stages/pipeline.toml", "w") as file:
                file.write(text + "\n[recipe]\n" + "\n".join(keys) + "\n")
            cpu, gpu = (arm(folder, stage, model, tokens, on) for on in ("cpu", "gpu"))
            pairs = list(zip(cpu["sites"], gpu["sites"]))
            other = sum(a["blake3"] != b["blake3"] for a, b in pairs)
            values = sum(a["shape"][0] * a["shape"][1] for a, _ in pairs)
            if len(cpu["sites"]) != len(gpu["sites"]) or not pairs or "products on" not in gpu["arithmetic"]:
                sys.exit(f"{model}, {keys}: {cpu['why']}; {gpu['why']}; {gpu['arithmetic']}")
            differing += other
            counts = f"{other} of {len(pairs)} ({values:,})"
            print(
                f"{stage:5}  {model:22}  {tokens:6}  {counts:>24}  {cpu['seconds']:6.2f} s  {gpu['seconds']:6.2f} s  {', '.join(keys)}",
                flush=True,
            )
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
