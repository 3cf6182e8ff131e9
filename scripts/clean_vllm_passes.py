"""Records passes of small random models by vLLM: as many questions of which the answer is "clean".

    pip install vllm
    python scripts/clean_vllm_passes.py --out clean --count 24 --jobs 6
    runner run clean/stages

Each pass is two stages: `exact-engine` holds every site to the engine's kernels, `exact-pass` the whole pass
from the token ids. What does not pass is a false alarm, or a kernel that is not known. The shapes follow from the
seed alone: llama, qwen2 and qwen3; bf16 and three kinds of online FP8; heads of 64 and 128; 1 to 3,000
tokens, some with decoded ones, some within a batch.
"""

import argparse
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

try:
    import torch
    from clean_passes import CONFIGS, PIPELINE, made
    from safetensors import safe_open
except ImportError as error:
    sys.exit(f"{error}: pip install vllm")

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINES = {
    None: "vllm",
    "fp8": "vllm-fp8",
    "fp8_per_channel": "vllm-fp8-channel",
    "fp8_per_block": "vllm-fp8-block",
}


def main():
    options = read_options()
    out = os.path.abspath(options.out)
    os.makedirs(os.path.join(out, "stages"), exist_ok=True)
    contracts = os.path.abspath(options.contracts)
    write(out, "stages/pipeline.toml", PIPELINE.format(contracts=contracts))
    cases = {seed: draw(random.Random(seed)) for seed in range(options.seed, options.seed + options.count)}
    for seed, case in cases.items():
        made(seed, case).to(torch.bfloat16).save_pretrained(os.path.join(out, f"{seed}"))
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = list(pool.map(lambda item: record(out, options, *item), cases.items()))
    if any(failed):
        sys.exit(f"{sum(failed)} of {len(failed)} recordings failed: see the log beside each model")


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="a folder for models, recordings and stages")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1, help="of the first pass; the next ones count up")
    parser.add_argument("--jobs", type=int, default=1, help="engines side by side on one GPU")
    parser.add_argument("--contracts", default=os.path.join(HERE, "..", "contracts"))
    return parser.parse_args()


def draw(dice):
    """A shape, a kind of arithmetic and a number of tokens."""
    quantization = dice.choice(list(ENGINES))
    # vLLM's blocks of 128 do not straddle queries, keys and values.
    head = 128 if quantization == "fp8_per_block" else dice.choice([64, 128])
    key_heads = dice.choice([1, 2, 2, 4])
    heads = key_heads * dice.choice([1, 2, 3, 4, 7])
    length = dice.choice([
        dice.randint(1, 16),
        dice.randint(17, 200),
        dice.randint(201, 512),
        dice.randint(513, 1100),
        dice.randint(1101, 3000),
    ])
    return {
        "architecture": dice.choice(sorted(CONFIGS)),
        "quantization": quantization,
        "hidden": heads * (128 if heads % 2 else 64),
        "head": head,
        "heads": heads,
        "key_heads": key_heads,
        "ffn": 128 * dice.randint(1, 8),
        "layers": dice.randint(1, 2),
        "vocabulary": dice.choice([256, 512, 1024, 4096]),
        "length": length,
        "decode": dice.choice([0, 0, 3, 6]),
        "batch": dice.choice([1, 1, 1, 3]) if length <= 512 else 1,
        "theta": dice.choice([1e4, 5e5, 1e6]),
        "tied": dice.random() < 0.3,
        "spread": dice.choice([0.02, 0.05, 0.1]),
    }


def record(out, options, seed, case):
    """Whether the recording failed."""
    folder = os.path.join(out, f"{seed}")
    dice = random.Random(seed)
    tokens = [dice.randrange(case["vocabulary"]) for _ in range(case["length"])]
    capture = os.path.join(folder, "capture.safetensors")
    command = [sys.executable, os.path.join(HERE, "..", "adapters", "vllm_sites.py"), "--model", folder]
    command += ["--tokens", ",".join(map(str, tokens)), "--out", capture]
    command += ["--decode", str(case["decode"]), "--batch", str(case["batch"])]
    command += ["--memory", f"{0.8 / options.jobs:.3f}", "--cache", "1"]
    if case["quantization"]:
        command += ["--quantization", case["quantization"]]
    with open(os.path.join(folder, "log"), "w") as log:
        failed = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    print(f"{seed}: {'FAILED' if failed else 'recorded'} {case}", flush=True)
    if failed:
        return True
    engine = ENGINES[case["quantization"]]
    recipe = f'engine = "{engine}"'
    if case["batch"] > 1:
        recipe += f", batch = {case['batch']}"
    if case["decode"] > 1:
        recipe += f", decoded = {case['decode'] - 1}"
        tokens = ids_of(capture)
    for contract in ["exact-engine", "exact-pass"]:
        name = contract.removeprefix("exact-")
        stage = STAGE.format(
            id=f"{name}-{seed}", contract=contract, seed=seed, tokens=tokens, recipe=recipe
        )
        write(out, f"stages/{name}-{seed}.toml", f"# {case}\n{stage}")
    return False


def ids_of(capture):
    with safe_open(capture, "pt") as file:
        return file.get_tensor("ids").flatten().tolist()


def write(folder, name, text):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


STAGE = """id       = "{id}"
title    = "Is a clean pass of vLLM called clean?"
contract = "{contract}"
model    = "../{seed}"
tokens   = {tokens}
recipe   = {{ {recipe} }}

[forward]
capture = "every-site"

[recorded]
file = "../{seed}/capture.safetensors"
"""

if __name__ == "__main__":
    main()
