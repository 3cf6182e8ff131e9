"""Records real engines with a published bug put back into them, to see whether the verdict finds it.

    pip install torch "transformers>=5" safetensors ./python      # and vllm for the bugs of vLLM
    python scripts/public_bugs.py --engine transformers --out examples/public-bugs
    python scripts/public_bugs.py --engine vllm --out examples/public-bugs
    runner run examples/public-bugs/stages

Each bug is a stage with the contract `exact-engine`, and must read `structural` with the site at which
it was planted and its cause; with `--clean` there are clean stages of the same model beside them, which
must pass. The engine itself computes: what is patched is a function or a weight of it, while it runs.
Of a pass with a bug only the sites around it are kept, unless `--whole` is given.
"""

import argparse
import json
import os
import random
import subprocess
import sys

try:
    import runner
    import torch
    import transformers
    from safetensors.torch import load_file
except ImportError as error:
    sys.exit(f'{error}: pip install torch "transformers>=5" safetensors, and the runner\'s own package (./python)')

HERE = os.path.dirname(os.path.abspath(__file__))
ADAPTERS = os.path.join(HERE, "..", "adapters")
MODEL = os.path.join(HERE, "..", "examples", "vllm", "model")


def main():
    options = read_options()
    if options.bug:
        return record(options)
    out = os.path.abspath(options.out)
    os.makedirs(os.path.join(out, "stages"), exist_ok=True)

    def seen_from_stages(path):
        return os.path.relpath(path, os.path.join(out, "stages"))

    write(out, "stages/pipeline.toml", PIPELINE.format(contracts=seen_from_stages(options.contracts)))
    with open(os.path.join(options.model, "config.json")) as file:
        vocabulary = json.load(file)["vocab_size"]
    failed = 0
    for name, bug in BUGS.items():
        if bug["engine"] != options.engine or bug["patch"] is nothing and not options.clean:
            continue
        dice = random.Random(name)
        tokens = [dice.randrange(vocabulary) for _ in range(bug["tokens"])]
        command = [sys.executable, os.path.abspath(__file__), "--engine", options.engine]
        command += ["--bug", name, "--model", options.model, "--device", options.device]
        command += ["--whole"] if options.whole else []
        command += ["--tokens", ",".join(map(str, tokens)), "--out", os.path.join(out, f"{name}.safetensors")]
        failed += subprocess.run(command, check=False).returncode != 0
        model = seen_from_stages(options.model)
        stage = STAGE.format(name=name, ids=tokens, model=model, **bug)
        write(out, f"stages/{name}.toml", stage)
    if failed:
        sys.exit(f"{failed} recordings failed")


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True, choices=["transformers", "vllm", "sglang"])
    parser.add_argument("--out", required=True, help="a folder for recordings and stages")
    parser.add_argument("--model", default=MODEL, help="a folder of two layers in bf16")
    parser.add_argument("--clean", action="store_true", help="record passes without a bug as well")
    parser.add_argument("--whole", action="store_true", help="keep every site")
    parser.add_argument("--device", default="cuda", help="of transformers: cpu, cuda")
    parser.add_argument("--contracts", default=os.path.join(HERE, "..", "contracts"))
    parser.add_argument("--bug", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    return parser.parse_args()


def record(options):
    """One recording, in a process of its own: what is patched stays patched."""
    sys.path.insert(0, ADAPTERS)
    bug = BUGS[options.bug]
    tokens = [int(token) for token in options.tokens.split(",")]
    sites = None if options.whole else bug.get("sites")
    if bug["engine"] == "transformers":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        model = model.to(options.device).eval()
        bug["patch"](model)
        with runner.capture(model, options.out, sites=sites), torch.inference_mode():
            model(input_ids=torch.tensor([tokens], device=options.device), use_cache=False)
        return
    if bug["engine"] == "sglang":
        from runner.engines import sglang

        engine = sglang.load(
            options.model, dtype="bfloat16", quantization=bug["quantization"], attention_backend="triton",
            mem_fraction_static=0.6, context_length=512, max_running_requests=4,
        )
        bug["patch"](engine.model_runner.model, options.model)
        with runner.capture(engine, options.out, sites=sites):
            engine.run(tokens)
        return
    import vllm_sites

    capture = runner.capture

    def patched(engine, out, **_):
        engine.apply_model(lambda model: bug["patch"](model, options.model))
        return capture(engine, out, sites=sites)

    runner.capture = patched
    asked = argparse.Namespace(
        decode=0, batch=1, dtype="bfloat16", quantization=bug["quantization"], memory=0.3, cache=1
    )
    vllm_sites.record(options.model, tokens, asked, options.out)


def write(folder, name, text):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


def nothing(*_):
    """A clean pass."""


def angles_in_bf16(model):
    """Positions, inverse frequencies and their products in bf16."""
    rotary = model.model.rotary_emb

    def forward(x, position_ids):
        positions = position_ids[..., None].to(torch.bfloat16)
        angles = positions * rotary.inv_freq.to(torch.bfloat16)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    rotary.forward = forward


def another_base(model):
    """A base that the model was not trained with, as where two keys of a config say two."""
    rotary = model.model.rotary_emb
    width = 2 * rotary.inv_freq.shape[0]
    exponents = torch.arange(0, width, 2, device=rotary.inv_freq.device).float() / width
    rotary.inv_freq = (1.0 / 500_000.0**exponents).to(rotary.inv_freq.dtype)


def cache_in_e4m3(_):
    """Keys and values through E4M3 with a scale of 1, as a cache whose scales were not loaded."""
    every = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    attend = every["sdpa"]

    def narrow(x):
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)

    def through_cache(module, q, k, v, *rest, **named):
        return attend(module, q, narrow(k), narrow(v), *rest, **named)

    every["sdpa"] = through_cache


def keys_for_query_heads(model):
    """A converter interleaves the keys' rows for the number of query heads."""
    weight = model.model.layers[0].self_attn.k_proj.weight
    rows, config = weight.shape[0], model.config

    def interleaved(heads):
        halves = torch.arange(rows).reshape(heads, 2, rows // heads // 2)
        return halves.transpose(1, 2).reshape(-1)

    # What reads the file takes the rows back for the number of key heads.
    wrong, back = interleaved(config.num_attention_heads), interleaved(config.num_key_value_heads)
    weight.data = weight.data[wrong[back.argsort()].to(weight.device)].contiguous()


def zero_point_off_by_one(model):
    """Every group of 128 moves by its step, as where a zero point is stored less one."""
    weight = model.model.layers[0].mlp.up_proj.weight
    groups = weight.data.float().reshape(weight.shape[0], -1, 128)
    step = groups.abs().amax(-1, keepdim=True) / 7.5
    weight.data = (groups - step).reshape(weight.shape).to(weight.dtype)


def layer_of(model):
    return model.model.layers[1].self_attn.qkv_proj


def stacked(folder):
    """The bf16 weights of layer 1's queries, keys and values, one below the other."""
    weights = load_file(os.path.join(folder, "model.safetensors"))
    parts = [weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    return torch.cat(parts).float()


def codes_of_other_scales(model, folder):
    """Scales rounded up to powers of two beside codes that were made with the scales before."""
    weight = stacked(folder)
    codes = torch.empty_like(weight)
    for row in range(0, weight.shape[0], 128):
        for column in range(0, weight.shape[1], 128):
            block = weight[row : row + 128, column : column + 128]
            scale = block.abs().max().clamp(min=1e-4) / 448
            codes[row : row + 128, column : column + 128] = block / scale
    target = layer_of(model).weight
    assert target.dtype == torch.float8_e4m3fn and target.shape == codes.shape, target.shape
    target.data.copy_(codes.clamp(-448, 448).to(torch.float8_e4m3fn))


def scales_of(layer, count):
    """The layer's scales, of which it has so many."""
    named = dict(layer.named_parameters()) | dict(layer.named_buffers())
    scales = [x for name, x in named.items() if "weight_scale" in name and x.numel() == count]
    assert len(scales) == 1, {name: x.shape for name, x in named.items()}
    return scales[0]


def scales_of_another_slice(model, _):
    """The keys' scales are read from the place of the queries'."""
    layer = layer_of(model)
    q, k, _ = layer.output_sizes
    scales = scales_of(layer, sum(layer.output_sizes)).data.view(-1)
    scales[q : q + k] = scales[:k].clone()


def scale_not_loaded(model, _):
    """The weight's scale stays what it was made with, 1."""
    scales_of(layer_of(model), 1).data.fill_(1.0)


def cache_of_another_base(model, _):
    """The rotary embedding's table is made with a base that is not the config's."""
    rotary = model.model.layers[0].self_attn.rotary_emb
    table = rotary.cos_sin_cache
    rotary.base = 500_000
    rotary.cos_sin_cache = rotary._compute_cos_sin_cache().to(table.device, table.dtype)


BUGS = {
    "transformers-clean": {
        "engine": "transformers",
        "recipe": 'engine = "transformers", stream = "bf16"',
        "tokens": 48,
        "patch": nothing,
        "report": "none",
        "truth": "pass",
    },
    "angles-in-bf16": {
        "engine": "transformers",
        "recipe": 'engine = "transformers", stream = "bf16"',
        "tokens": 96,
        "patch": angles_in_bf16,
        "report": "huggingface/transformers#29285, huggingface/candle#3520",
        "truth": "rope-precision at layer 0, q_rope",
        "sites": [f"blk.0.{site}" for site in ["q", "k", "q_rope", "k_rope"]],
    },
    "another-base": {
        "engine": "transformers",
        "recipe": 'engine = "transformers", stream = "bf16"',
        "tokens": 48,
        "patch": another_base,
        "report": "vllm-project/vllm#42624",
        "truth": "rope-base at layer 0, q_rope",
        "sites": [f"blk.0.{site}" for site in ["q", "k", "q_rope", "k_rope"]],
    },
    "cache-in-e4m3": {
        "engine": "transformers",
        "recipe": 'engine = "transformers", stream = "bf16"',
        "tokens": 48,
        "patch": cache_in_e4m3,
        "report": "vllm-project/vllm#4893",
        "truth": "kv-cache-format at layer 0, attn",
        "sites": [f"blk.0.{site}" for site in ["v", "q_rope", "k_rope", "attn"]],
    },
    "keys-for-query-heads": {
        "engine": "transformers",
        "recipe": 'engine = "transformers", stream = "bf16"',
        "tokens": 48,
        "patch": keys_for_query_heads,
        "report": "ggml-org/llama.cpp#3364, huggingface/transformers#31788",
        "truth": "head-permutation at layer 0, k",
        "sites": [f"blk.0.{site}" for site in ["attn_norm", "q", "k", "v"]],
    },
    "zero-point-off-by-one": {
        "engine": "transformers",
        "recipe": 'engine = "transformers", stream = "bf16"',
        "tokens": 48,
        "patch": zero_point_off_by_one,
        "report": "vllm-project/vllm#38966, ModelCloud/GPTQModel#2350",
        "truth": "zero-point at layer 0, ffn_up",
        "sites": [f"blk.0.{site}" for site in ["ffn_norm", "ffn_gate", "ffn_up"]],
    },
    "vllm-clean-fp8": {
        "engine": "vllm",
        "quantization": "fp8",
        "recipe": 'engine = "vllm-fp8"',
        "tokens": 48,
        "patch": nothing,
        "report": "none",
        "truth": "pass",
    },
    "vllm-clean-fp8-channel": {
        "engine": "vllm",
        "quantization": "fp8_per_channel",
        "recipe": 'engine = "vllm-fp8-channel"',
        "tokens": 48,
        "patch": nothing,
        "report": "none",
        "truth": "pass",
    },
    "vllm-clean-fp8-block": {
        "engine": "vllm",
        "quantization": "fp8_per_block",
        "recipe": 'engine = "vllm-fp8-block"',
        "tokens": 48,
        "patch": nothing,
        "report": "none",
        "truth": "pass",
    },
    "scales-up-codes-kept": {
        "engine": "vllm",
        "quantization": "fp8_per_block",
        "recipe": 'engine = "vllm-fp8-block"',
        "tokens": 48,
        "patch": codes_of_other_scales,
        "report": "vllm-project/vllm#22399, huggingface/transformers#47030",
        "truth": "scale-power-of-two at layer 1, q",
        "sites": [f"blk.1.{site}" for site in ["attn_norm", "q", "k", "v"]],
    },
    "scales-of-another-slice": {
        "engine": "vllm",
        "quantization": "fp8_per_channel",
        "recipe": 'engine = "vllm-fp8-channel"',
        "tokens": 48,
        "patch": scales_of_another_slice,
        "report": "no single one: a slice of fused scales that begins elsewhere",
        "truth": "scale-slice at layer 1, k",
        "sites": [f"blk.1.{site}" for site in ["attn_norm", "q", "k", "v"]],
    },
    "scale-not-loaded": {
        "engine": "vllm",
        "quantization": "fp8",
        "recipe": 'engine = "vllm-fp8"',
        "tokens": 48,
        "patch": scale_not_loaded,
        "report": "NVIDIA/TensorRT-Model-Connect#1115: scales are ignored",
        "truth": "scale-missing at layer 1, q",
        "sites": [f"blk.1.{site}" for site in ["attn_norm", "q", "k", "v"]],
    },
    "sglang-another-base": {
        "engine": "sglang",
        "quantization": None,
        "recipe": 'engine = "sglang"',
        "tokens": 48,
        "patch": cache_of_another_base,
        "report": "sgl-project/SpecForge#265, sgl-project/mini-sglang#13",
        "truth": "rope-base at layer 0, q_rope",
        "sites": [f"blk.0.{site}" for site in ["q", "k", "q_rope", "k_rope"]],
    },
    "sglang-scales-of-another-slice": {
        "engine": "sglang",
        "quantization": "fp8",
        "recipe": 'engine = "sglang-fp8"',
        "tokens": 48,
        "patch": scales_of_another_slice,
        "report": "no single one: a slice of fused scales that begins elsewhere",
        "truth": "scale-slice at layer 1, k",
        "sites": [f"blk.1.{site}" for site in ["attn_norm", "q", "k", "v"]],
    },
}

PIPELINE = """contracts = "{contracts}"
arms = ["reference", "emulated", "recorded"]
"""

STAGE = """# {report}
# Must read: {truth}
id       = "{name}"
title    = "Is what was changed in the engine located and named?"
contract = "exact-engine"
model    = "{model}"
tokens   = {ids}
recipe   = {{ {recipe} }}

[forward]
capture = "every-site"

[recorded]
file = "../{name}.safetensors"
"""

if __name__ == "__main__":
    main()
