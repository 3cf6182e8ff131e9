"""Records passes of small random models by transformers: as many questions of which the answer is "clean".

    pip install torch "transformers>=5" safetensors
    python scripts/clean_passes.py --out clean --count 24 --device cuda
    runner run clean/stages

Each pass is one stage with the contract `engine`: a stage that does not pass is a false alarm. The
shapes follow from the seed alone: llama, qwen2 and qwen3; bf16 and f16; eager and sdpa; heads of 32
to 128; 1 to 1,500 tokens. `--quantization torchao-fp8-row` records them in torchao's FP8. `--contract exact-engine` asks for every bit instead.
"""

import argparse
import math
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "adapters"))

try:
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers_hooks import DTYPES, Hooks, quantise
except ImportError as error:
    sys.exit(f'{error}: pip install torch "transformers>=5" safetensors')

SITES = ["attn_norm", "q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "attn", "attn_out"]
SITES += ["attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_down", "ffn_residual"]
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def main():
    options = read_options()
    os.makedirs(os.path.join(options.out, "stages"), exist_ok=True)
    with open(os.path.join(options.out, "stages", "pipeline.toml"), "w") as file:
        file.write(PIPELINE.format(contracts=os.path.abspath(options.contracts)))
    for seed in range(options.seed, options.seed + options.count):
        case = draw(random.Random(seed))
        if options.quantization:
            # FP8 products take widths of 16 values.
            unit = math.lcm(16, case["heads"])
            case["type"], case["hidden"] = "bfloat16", -(-case["hidden"] // unit) * unit
        record(options, seed, case)
        print(f"{seed}: {case}", flush=True)


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="a folder for models, recordings and stages")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1, help="of the first pass; the next ones count up")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--contract", default="engine")
    parser.add_argument("--quantization", choices=["torchao-fp8-row"], help="of all passes, which are in bf16 then")
    here = os.path.dirname(__file__)
    parser.add_argument("--contracts", default=os.path.join(here, "..", "contracts"))
    return parser.parse_args()


def draw(dice):
    """A shape, a type, a kind of attention and a number of tokens."""
    head = dice.choice([32, 64, 64, 80, 96, 128])
    key_heads = dice.choice([1, 2, 2, 3, 4])
    heads = key_heads * dice.choice([1, 1, 2, 3, 4])
    length = dice.choice([1, 2, 3, dice.randint(4, 16), dice.randint(17, 64), dice.randint(65, 256)])
    if dice.random() < 0.1:
        length = dice.randint(257, 1500)
    return {
        "architecture": dice.choice(sorted(CONFIGS)),
        "hidden": heads * (head if dice.random() < 0.6 else 8 * dice.randint(4, 16)),
        "head": head,
        "heads": heads,
        "key_heads": key_heads,
        "ffn": 16 * dice.randint(8, 96),
        "layers": dice.randint(1, 3),
        "vocabulary": dice.choice([256, 500, 512, 1000, 1001, 2048, 4096]),
        "length": length,
        "type": dice.choice(["bfloat16", "float16"]),
        "attention": dice.choice(["eager", "sdpa"]),
        "eps": dice.choice([1e-5, 1e-6]),
        "theta": dice.choice([1e4, 5e5, 1e6]),
        "tied": dice.random() < 0.3,
        "spread": dice.choice([0.02, 0.05, 0.1]),
    }


def made(seed, case):
    """A random model of that shape, in f32 on the CPU."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[case["architecture"]](
            hidden_size=case["hidden"],
            head_dim=case["head"],
            num_attention_heads=case["heads"],
            num_key_value_heads=case["key_heads"],
            intermediate_size=case["ffn"],
            num_hidden_layers=case["layers"],
            vocab_size=case["vocabulary"],
            max_position_embeddings=4096,
            rms_norm_eps=case.get("eps", 1e-6),
            rope_theta=case["theta"],
            tie_word_embeddings=case["tied"],
            initializer_range=case["spread"],
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
        attn_implementation=case.get("attention"),
    )
    for name, parameter in model.named_parameters():
        # Gains of 1 and biases of 0 would hide what is done with them.
        if name.endswith("norm.weight") or name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) * 0.1
    return model


def record(options, seed, case):
    model = made(seed, case)
    model = model.to(dtype=DTYPES[case["type"]], device=options.device).eval()
    folder = os.path.join(options.out, f"{seed}")
    model.save_pretrained(folder)
    if options.quantization:
        quantise(model)
    sites = ["embed", "output_norm", "logits"]
    sites += [f"blk.{layer}.{site}" for layer in range(case["layers"]) for site in SITES]
    hooks = Hooks(model, set(sites), "halves")
    dice = random.Random(seed)
    tokens = [dice.randrange(case["vocabulary"]) for _ in range(case["length"])]
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens], device=options.device), use_cache=False)
    save_file(hooks.kept, os.path.join(folder, "capture.safetensors"))
    stream = "f16" if case["type"] == "float16" else "bf16"
    engine = "torchao" if options.quantization else "transformers"
    stage = STAGE.format(
        seed=seed, contract=options.contract, tokens=tokens, stream=stream, engine=engine
    )
    with open(os.path.join(options.out, "stages", f"{seed}.toml"), "w") as file:
        file.write(f"# {case}\n{stage}")


PIPELINE = """contracts = "{contracts}"
arms = ["reference", "emulated", "recorded"]
"""

STAGE = """id       = "p{seed}"
title    = "Is a clean pass of transformers called clean?"
contract = "{contract}"
model    = "../{seed}"
tokens   = {tokens}
recipe   = {{ engine = "{engine}", stream = "{stream}" }}

[forward]
capture = "every-site"

[recorded]
file = "../{seed}/capture.safetensors"
"""

if __name__ == "__main__":
    main()
