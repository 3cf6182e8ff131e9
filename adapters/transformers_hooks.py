"""Every site of a model as PyTorch computes it: a recording, or the runner's external arm.

Loads the model with transformers, hooks its modules, runs the prompt and writes a tensor for
each site, `[tokens, width]`.

    pip install torch "transformers>=4.56" accelerate gguf ./python     # the last is this project's own

    python transformers_hooks.py --model FOLDER --tokens 1,2,3 --device cuda --dtype bfloat16 \\
        --attention sdpa --decode 8 --out capture.safetensors
    python transformers_hooks.py              # as a program of [external]: reads request.json

The model is a GGUF file, which transformers dequantises, or a Hugging Face folder. With
`--decode N` the model goes on for N tokens with its KV cache, one step each: the recording then
has the rows of the prompt and of every decoded token but the last, and `ids` says which tokens
they are. With `--batch N` the prompt is the first of N of the same length, of which the others
are drawn; its rows alone are kept.

As a program it writes `tensors.safetensors`, in f32. Its options then stand in the manifest's
`argv`, so that they are part of the result's key: a device that was found by itself would not be.
"""

import argparse
import json
import os
import random
import sys

try:
    import runner
    import torch
    import transformers
    from runner.engines.transformers import Hooks
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f'{error}: pip install torch "transformers>=4.56" accelerate gguf, and the runner\'s own package (./python)')

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main():
    options = read_options()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here; list what it needs in `env`, or use cpu")
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    if options.model:
        record(options)
        return
    with open("request.json") as file:
        request = json.load(file)
    model = load(request["model"], options)
    kept = {}

    def keep(site, tensor):
        # A copy: the model may go on to write where it stands.
        kept[site] = tensor[0].detach().float().cpu().reshape(tensor.shape[1], -1).clone()

    Hooks(model, keep, request["parameters"]["rope"]["layout"] == "interleaved")
    tokens = torch.tensor([request["tokens"]], device=options.device)
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    missing = [site for site in request["sites"] if site not in kept]
    if missing:
        shown = ", ".join(missing[:5])
        sys.exit(f"this model's modules do not make {len(missing)} of the sites: {shown}")
    save_file({site: kept[site].contiguous() for site in request["sites"]}, "tensors.safetensors")
    print(", ".join(about(options).values()))


def record(options):
    """Writes the recording of a prompt, of what the model makes of it, and of which tokens."""
    tokens = read_tokens(options.tokens)
    model = load(options.model, options)
    beyond = [token for token in tokens if not 0 <= token < model.config.vocab_size]
    if beyond:
        known = model.config.vocab_size
        sys.exit(f"--tokens: {beyond[0]} is no token of this model, whose vocabulary has {known}")
    step = torch.tensor([tokens, *others(tokens, options.batch - 1, model.config.vocab_size)], device=options.device)
    cache = None
    with torch.inference_mode(), runner.capture(model, options.out, row=0) as capture:
        for _ in range(max(1, options.decode)):
            result = model(input_ids=step, past_key_values=cache, use_cache=options.decode > 0)
            cache, step = result.past_key_values, result.logits[:, -1:].argmax(-1)
    rows = sum(capture.recording.steps)
    print(f"{options.out}: {len(capture.recording.store.tensors) - 1} sites of {rows} tokens, {', '.join(about(options).values())}")


def read_tokens(text):
    try:
        return [int(token) for token in text.split(",")]
    except ValueError as error:
        sys.exit(f"--tokens {text}: ids with commas, please: {error}")


def others(tokens, count, vocabulary):
    """Prompts as long as this one, the same in every call."""
    dice = random.Random(0)
    return [[dice.randrange(vocabulary) for _ in tokens] for _ in range(count)]


def about(options):
    return {
        "torch": f"PyTorch {torch.__version__}",
        "engine": f"transformers {transformers.__version__}",
        "gpu": name_of(options.device),
        "arithmetic": f"{options.quantization or options.dtype}, {options.attention}",
    }


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a Hugging Face folder; without it request.json says it")
    parser.add_argument("--tokens", help="ids of the prompt, with commas")
    parser.add_argument("--decode", type=int, default=0, help="tokens to go on for")
    parser.add_argument("--batch", type=int, default=1, help="prompts that are computed together")
    parser.add_argument("--out", default="capture.safetensors")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    parser.add_argument("--tf32", action="store_true", help="f32 products on tensor cores")
    parser.add_argument("--quantization", choices=["torchao-fp8-row"], help="of all linear layers but the last")
    options = parser.parse_args()
    if options.model and not options.tokens:
        parser.error("--model goes with --tokens")
    if options.model and not os.path.isdir(options.model):
        parser.error(f"--model {options.model}: no such folder; a recording is of a Hugging Face folder")
    if not options.model and (options.decode or options.batch != 1):
        parser.error("--decode and --batch are for recordings: give --model and --tokens")
    if options.quantization and options.dtype != "bfloat16":
        parser.error("--quantization goes with --dtype bfloat16")
    if options.batch < 1 or options.decode < 0:
        parser.error("--batch is 1 or more, --decode 0 or more")
    return options


def name_of(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def load(path, options):
    """The model of a GGUF file or of a Hugging Face folder; nothing is fetched."""
    place, gguf = (path, {}) if os.path.isdir(path) else (
        os.path.dirname(path),
        {"gguf_file": os.path.basename(path)},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place,
        dtype=DTYPES[options.dtype],
        attn_implementation=options.attention,
        local_files_only=True,
        **gguf,
    )
    model = model.to(options.device).eval()
    if options.quantization:
        quantise(model)
    return model


def quantise(model):
    """torchao's FP8 in every linear layer but the one that makes the logits."""
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        sys.exit(f"{error}: pip install torchao")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and (layer.in_features % 16 or layer.out_features % 16):
            if layer is not model.lm_head:
                sys.exit(f"{name} is {layer.out_features} by {layer.in_features}: torchao leaves out what is no multiple of 16")
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model, config, lambda module, _: isinstance(module, torch.nn.Linear) and module is not model.lm_head)


if __name__ == "__main__":
    main()
