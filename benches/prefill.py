#!/usr/bin/env python3
"""Times a pass over a prompt: the runner's reference and emulated arms beside llama.cpp on the CPU.

    benches/prefill.py target/release/runner --model models/SmolLM2-135M-Instruct.Q4_1.gguf

All compute the same file over the same tokens in turn, on all cores. llama.cpp gives the logits of the last
token, as its own benchmark does, and so do the runner's arms, in f64 (reference) or as a Hopper
multiplies E4M3 (emulated); with `--capture logits` they give every token's. A stage that keeps logits computes the prompt
once, and once more in a batch of twice its length: three times its tokens, all of which count. Prints tokens per second, the
best of the rounds, and the ratio. llama.cpp is llama-cpp-python's (tests/adapters/requirements.txt); with
LLAMA_CPP_LIB_PATH it is the library in that folder, of the version that the package binds.
"""

import argparse
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import llama_cpp

CONTRACT = pathlib.Path(__file__).with_name("numbers.toml")
STAGE = """id = "A"
title = "one pass"
contract = "numbers"
model = "{model}"
tokens = {tokens}
arms = ["reference", "emulated"]
[recipe]
gemm = "{gemm}"
[forward]
capture = "{capture}"
"""


def load_backends():
    """Backends that lie beside the library are loaded when asked for."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder:
        library = ctypes.CDLL(os.path.join(folder, "libggml.so"))
        library.ggml_backend_load_all_from_path(folder.encode())


@llama_cpp.llama_log_callback
def unheard(*_):
    """What the library says of itself."""


class Llama:
    """llama.cpp with one model."""

    def __init__(self, path, threads):
        llama_cpp.llama_log_set(unheard, ctypes.c_void_p())
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.threads = threads

    def seconds(self, tokens):
        """A pass over these tokens, after one that warms up."""
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = self.threads
        context = llama_cpp.llama_init_from_model(self.model, parameters)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.logits[place] = place + 1 == len(tokens)
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        for _ in range(2):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            start = time.perf_counter()
            if llama_cpp.llama_decode(context, batch):
                raise SystemExit("llama_decode failed")
            llama_cpp.llama_synchronize(context)
            seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return seconds


def of_runner(runner, model, tokens, capture="last-logits", gemm="e4m3"):
    """Seconds of each arm, computed anew."""
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        (work / "stages").mkdir()
        (work / "contracts").mkdir()
        shutil.copy(CONTRACT, work / "contracts")
        stage = STAGE.format(model=os.path.abspath(model), tokens=tokens, capture=capture, gemm=gemm)
        (work / "stages" / "a.toml").write_text(stage)
        command = [runner, "run", str(work / "stages"), "--runs", str(work / "runs"), "--jobs", "1", "--format", "plain"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted((work / "runs").glob("*/run.json"))
        if not found:
            raise SystemExit(f"{done.stdout}{done.stderr}")
        arms = json.loads(found[-1].read_text())["stages"][0]["arms"]
        return {arm: arms[arm]["seconds"] for arm in ("reference", "emulated")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", help="the runner's release binary")
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--tokens", default="16,300", help="lengths of prompts, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the best counts")
    parser.add_argument("--capture", default="last-logits", choices=["last-logits", "logits"], help="what the arms give")
    options = parser.parse_args()
    load_backends()
    llama = Llama(options.model, os.cpu_count())
    for length in map(int, options.tokens.split(",")):
        tokens = [(504 + 797 * place) % 49_152 for place in range(length)]
        best = {}
        for _ in range(options.rounds):
            arms = of_runner(options.runner, options.model, tokens, options.capture)
            seconds = {"llama.cpp": llama.seconds(tokens), **arms}
            for name, took in seconds.items():
                best[name] = min(best.get(name, took), took)
        rates = {name: (1 if name == "llama.cpp" else 3) * length / took for name, took in best.items()}
        for name, rate in rates.items():
            ratio = rate / rates["llama.cpp"]
            print(f"| {length} tokens | {name} | {rate:.0f} tokens/s | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
