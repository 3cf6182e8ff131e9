"""Every site of a model as SGLang computes it: a recording, or the runner's external arm.

Loads a Hugging Face folder into this process, hooks its modules, runs the prompt through SGLang's
own one-batch path, eager, and writes a tensor for each site, `[tokens, width]`.

    pip install "sglang[all]" ./python        # the latter is this project's own package

    python sglang_sites.py --model FOLDER --tokens 1,2,3 --decode 8 --out capture.safetensors
    python sglang_sites.py                    # as a program of [external]: reads request.json

With `--decode N` it goes on for N tokens with its KV cache, one step each: the recording then has
the rows of the prompt and of every decoded token but the last, and `ids` says which they are.
"""

import argparse
import json
import os
import sys

try:
    import runner
    from runner.engines import sglang
    from safetensors.torch import load_file, save_file
except ImportError as error:
    sys.exit(f"{error}: pip install safetensors, and the runner's own package (./python)")


def main():
    options = read_options()
    if options.model:
        record(options.model, [int(token) for token in options.tokens.split(",")], options, options.out)
        return
    with open("request.json") as file:
        request = json.load(file)
    record(request["model"], request["tokens"], options, "capture.safetensors")
    kept = load_file("capture.safetensors")
    os.remove("capture.safetensors")
    missing = [site for site in request["sites"] if site not in kept]
    if missing:
        sys.exit(f"SGLang's modules do not make {len(missing)} sites: {', '.join(missing[:5])}")
    save_file({site: kept[site].float() for site in request["sites"]}, "tensors.safetensors")


def record(path, tokens, options, out):
    """Captures a prompt and what the engine makes of it."""
    if not os.path.isdir(path):
        sys.exit("give a Hugging Face folder")
    try:
        engine = sglang.load(
            path,
            dtype=options.dtype,
            quantization=options.quantization,
            attention_backend=options.attention,
            mem_fraction_static=options.memory,
        )
    except ImportError as error:
        sys.exit(f'{error}: pip install "sglang[all]"')
    with runner.capture(engine, out):
        engine.run(tokens, max(1, options.decode))


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a Hugging Face folder; without it request.json says it")
    parser.add_argument("--tokens", help="ids of the prompt, with commas")
    parser.add_argument("--decode", type=int, default=0, help="tokens to go on for")
    parser.add_argument("--out", default="capture.safetensors")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--quantization", help="fp8")
    parser.add_argument("--attention", default="triton", help="SGLang's attention backend")
    parser.add_argument("--memory", type=float, default=0.6, help="of the GPU, that SGLang may take")
    options = parser.parse_args()
    if options.model and not options.tokens:
        parser.error("--model goes with --tokens")
    if not options.model and options.decode:
        parser.error("--decode is for recordings: give --model and --tokens")
    return options


# SGLang starts processes that import this file again.
if __name__ == "__main__":
    main()
