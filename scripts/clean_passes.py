"""Records passes of small random models by transformers: as many questions of which the answer is "clean".

    pip install torch "transformers>=5" safetensors ./python
    python scripts/clean_passes.py --out clean --count 24 --device cuda
    runner run clean/stages

Each pass is one stage with the contract `engine`: a stage that does not pass is a false alarm. The
shapes follow from the seed alone: llama, qwen2 and qwen3; bf16 and f16; eager and sdpa; heads of 32
to 128; 1 to 1,500 tokens. `--architectures all` draws from every kind that is computed, with settings
of their own: windows, soft caps, factors, RoPE's methods. `--small` records one pass of each kind that is small
enough for a test, whatever the seed. `--quantization torchao-fp8-row` records them in
torchao's FP8. `--contract exact-engine` asks for every bit instead.
"""

import argparse
import math
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "adapters"))

try:
    import runner
    import torch
    import transformers
    from transformers_hooks import DTYPES, quantise
except ImportError as error:
    sys.exit(f'{error}: pip install torch "transformers>=5" safetensors, and the runner\'s own package (./python)')

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
OTHERS = {
    "mistral": transformers.MistralConfig,
    "phi3": transformers.Phi3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "olmo2": transformers.Olmo2Config,
    "granite": transformers.GraniteConfig,
    "smollm3": transformers.SmolLM3Config,
    "glm4": transformers.Glm4Config,
}

# Kind, type, attention, RoPE and settings of small passes.
SMALL = {
    "llama-yarn": ("llama", "bfloat16", "sdpa", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", "bfloat16", "sdpa", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, {}),
    "qwen2-linear": ("qwen2", "float16", "eager", {"rope_type": "linear", "factor": 3.5}, {}),
    "mistral": ("mistral", "bfloat16", "eager", {}, {"sliding_window": 5}),
    "phi3": ("phi3", "bfloat16", "sdpa", {"partial_rotary_factor": 0.75}, {"sliding_window": None}),
    "gemma2": ("gemma2", "bfloat16", "eager", {}, {"sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", "bfloat16", "eager", {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, {"sliding_window": 5, "query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo2": ("olmo2", "float16", "sdpa", {}, {}),
    "granite": ("granite", "bfloat16", "sdpa", {}, {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156, "logits_scaling": 6.0}),
    "smollm3": ("smollm3", "bfloat16", "sdpa", {}, {"no_rope_layer_interval": 2}),
    "glm4": ("glm4", "bfloat16", "sdpa", {"partial_rotary_factor": 0.5}, {}),
}


def main():
    options = read_options()
    os.makedirs(os.path.join(options.out, "stages"), exist_ok=True)
    with open(os.path.join(options.out, "stages", "pipeline.toml"), "w") as file:
        file.write(PIPELINE.format(contracts=os.path.abspath(options.contracts)))
    if options.small:
        for name in sorted(SMALL):
            record(options, name, small(name))
        return
    for seed in range(options.seed, options.seed + options.count):
        case = draw(random.Random(seed))
        if options.architectures:
            add_settings(random.Random(seed + 1_000_000), options.architectures, case)
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
    parser.add_argument("--architectures", help="of which to draw, with commas, or `all`: by default llama, qwen2, qwen3")
    parser.add_argument("--quantization", choices=["torchao-fp8-row"], help="of all passes, which are in bf16 then")
    parser.add_argument("--small", action="store_true", help="one small pass of each kind, and no other")
    here = os.path.dirname(__file__)
    parser.add_argument("--contracts", default=os.path.join(here, "..", "contracts"))
    options = parser.parse_args()
    known = sorted(CONFIGS | OTHERS)
    if options.architectures:
        options.architectures = known if options.architectures == "all" else options.architectures.split(",")
        for name in options.architectures:
            if name not in known:
                parser.error(f"--architectures {name}: choose of {', '.join(known)}, or all")
    return options


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


def small(name):
    """The case of a small pass, in which everything happens that its kind has of its own."""
    kind, number, attention, rope, settings = SMALL[name]
    rope = rope if "full_attention" in rope else {"rope_theta": 10000.0, "rope_type": "default"} | rope
    return {
        "architecture": kind,
        "hidden": 64,
        "head": 32,
        "heads": 2,
        "key_heads": 1,
        "ffn": 96,
        "layers": 2,
        "vocabulary": 128,
        "length": 12,
        "type": number,
        "attention": attention,
        "eps": 1e-6,
        "theta": 10000.0,
        "tied": False,
        "spread": 0.1,
        "rope": rope,
        "settings": settings,
    }


def add_settings(dice, architectures, case):
    """An architecture of those, and settings that it alone has."""
    kind = case["architecture"] = dice.choice(architectures)
    settings = {}
    length = case["length"]
    rope = {"rope_theta": case["theta"]}
    if kind in ("llama", "qwen2", "qwen3", "mistral", "smollm3"):
        method = dice.choice(["default", "linear", "llama3", "yarn"])
        rope["rope_type"] = method
        if method != "default":
            rope["factor"] = dice.choice([2.0, 3.5, 8.0])
            rope["original_max_position_embeddings"] = dice.choice([64, 256, 1024])
        if method == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": dice.choice([4.0, 8.0])}
        if method == "linear":
            del rope["original_max_position_embeddings"]
    if kind in ("phi3", "glm4"):
        rope["partial_rotary_factor"] = dice.choice([0.5, 0.75, 1.0])
        case["head"] = -(-case["head"] // 32) * 32
    if kind == "phi3":
        # Its head width is a quotient.
        case["hidden"] = case["head"] * case["heads"]
    window = dice.choice([None, max(2, length // 2), length, 4096])
    if kind in ("mistral", "phi3"):
        settings["sliding_window"] = window
    if kind in ("gemma2", "gemma3"):
        window = settings["sliding_window"] = window or max(2, length // 3)
        settings["query_pre_attn_scalar"] = dice.choice([16, 24, 64, 100])
        settings["final_logit_softcapping"] = dice.choice([None, 3.0, 30.0])
    if kind == "gemma2":
        settings["attn_logit_softcapping"] = dice.choice([None, 5.0, 50.0])
    if kind == "gemma3":
        rope = {"full_attention": rope | {"rope_type": "default"}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    if kind == "granite":
        settings["embedding_multiplier"] = dice.choice([1.0, 12.0])
        settings["residual_multiplier"] = dice.choice([1.0, 0.22])
        settings["attention_multiplier"] = dice.choice([0.0156, 0.125, 1.0])
        settings["logits_scaling"] = dice.choice([1.0, 6.0, 8.0])
    if kind in ("llama", "granite", "olmo2", "qwen3", "glm4"):
        settings["attention_bias"] = dice.random() < 0.5
    if kind in ("llama", "granite"):
        settings["mlp_bias"] = dice.random() < 0.5
    if kind == "smollm3":
        settings["no_rope_layer_interval"] = dice.choice([2, 4])
    masked = settings.get("sliding_window") is not None and settings["sliding_window"] <= length
    if masked or settings.get("attn_logit_softcapping"):
        # sdpa gives such masks to a kernel that is not known, and leaves out the cap.
        case["attention"] = "eager"
    case["rope"], case["settings"] = rope, settings


def made(seed, case):
    """A random model of that shape, in f32 on the CPU."""
    torch.manual_seed(seed)
    rope = {"rope_parameters": case["rope"]} if "rope" in case else {"rope_theta": case["theta"]}
    config = (CONFIGS | OTHERS)[case["architecture"]]
    # What a class does not know it would save all the same.
    shape = {"head_dim": case["head"], "rms_norm_eps": case.get("eps", 1e-6)}
    fields = config.__dataclass_fields__
    rope |= {name: value for name, value in shape.items() if name in fields or config in CONFIGS.values()}
    model = transformers.AutoModelForCausalLM.from_config(
        config(
            hidden_size=case["hidden"],
            num_attention_heads=case["heads"],
            num_key_value_heads=case["key_heads"],
            intermediate_size=case["ffn"],
            num_hidden_layers=case["layers"],
            vocab_size=case["vocabulary"],
            max_position_embeddings=4096,
            **rope,
            **case.get("settings", {}),
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
        gain = name.endswith("norm.weight") or "layernorm.norms." in name
        if gain or name.endswith("bias") or name.endswith("sinks"):
            parameter.data += torch.randn_like(parameter) * 0.1
    return model


def record(options, seed, case):
    model = made(seed if isinstance(seed, int) else 1, case)
    model = model.to(dtype=DTYPES[case["type"]], device=options.device).eval()
    folder = os.path.join(options.out, f"{seed}")
    model.save_pretrained(folder)
    if options.quantization:
        quantise(model)
    dice = random.Random(str(seed) if options.small else seed)
    tokens = [dice.randrange(case["vocabulary"]) for _ in range(case["length"])]
    capture = os.path.join(folder, "capture.safetensors")
    with runner.capture(model, capture), torch.inference_mode():
        model(input_ids=torch.tensor([tokens], device=options.device), use_cache=False)
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
