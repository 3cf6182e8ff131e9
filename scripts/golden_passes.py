"""Saves small random models with passes of transformers in f64: what a reference must give.

    pip install torch "transformers>=5" safetensors
    python scripts/golden_passes.py --out golden --count 77
    RUNNER_GOLDEN_PASSES=$PWD/golden cargo test --test it -- --ignored the_reference_is_transformers

Each folder has a model as transformers saves it, and `golden.safetensors`: token ids, logits and hidden states
of an eager pass. Architectures take turns; shapes and settings follow from the seed.
"""

import argparse
import os
import random
import sys

sys.path.insert(0, os.path.dirname(__file__))

import clean_passes as passes

try:
    import torch
    import transformers
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f'{error}: pip install torch "transformers>=5" safetensors')

# What no engine's kernels are known of.
MORE = {
    "stablelm": transformers.StableLmConfig,
    "starcoder2": transformers.Starcoder2Config,
    "mixtral": transformers.MixtralConfig,
    "qwen2-moe": transformers.Qwen2MoeConfig,
    "qwen3-moe": transformers.Qwen3MoeConfig,
    "gpt-oss": transformers.GptOssConfig,
    "deepseek-v3": transformers.DeepseekV3Config,
    "qwen3-next": transformers.Qwen3NextConfig,
}
passes.OTHERS |= MORE
# RoPE and settings of very small passes.
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SMALL = {
    "stablelm": (ROPE | {"partial_rotary_factor": 0.25}, {"use_qkv_bias": True, "layer_norm_eps": 1e-5}),
    "stablelm-parallel": (
        ROPE | {"partial_rotary_factor": 0.25},
        {"use_qkv_bias": False, "layer_norm_eps": 1e-5, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2": (ROPE, {"norm_epsilon": 1e-5, "sliding_window": 5}),
    "mixtral": (ROPE, {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2-moe": (ROPE, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}),
    "qwen3-moe": (ROPE, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3-next": (
        ROPE | {"partial_rotary_factor": 0.25},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"linear_key_head_dim": 12, "linear_value_head_dim": 10, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "deepseek-v3": (
        ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"n_group": 2, "topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"moe_intermediate_size": 16, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    ),
}


def small(name, case):
    rope, settings = case
    return passes.small("llama3") | {
        "architecture": name.removesuffix("-parallel"),
        "hidden": 32,
        "head": 16,
        "heads": 2,
        "key_heads": 2 if name == "deepseek-v3" else 1,
        "ffn": 48,
        "vocabulary": 64,
        "attention": "eager",
        "spread": 0.2,
        "rope": rope,
        "settings": settings,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="a folder for the models")
    parser.add_argument("--count", type=int, default=22)
    parser.add_argument("--seed", type=int, default=1, help="of the first pass; the next ones count up")
    parser.add_argument("--architectures", nargs="*", help="by default all")
    parser.add_argument("--small", action="store_true", help="one very small pass of each kind that no engine is known of")
    options = parser.parse_args()
    if options.small:
        for name, case in SMALL.items():
            case = small(name, case)
            model = passes.made(1, case).double().eval()
            model.set_experts_implementation("eager")
            record(os.path.join(options.out, name), model, case, random.Random(name))
        return
    names = options.architectures or sorted(passes.CONFIGS | passes.OTHERS)
    for seed in range(options.seed, options.seed + options.count):
        case = draw(random.Random(seed), names[seed % len(names)])
        try:
            model = passes.made(seed, case).double().eval()
            # Products of groups have no kernel in f64.
            model.set_experts_implementation("eager")
        except ValueError as error:
            print(f"{seed}: transformers does not make it: {error}")
            continue
        record(os.path.join(options.out, str(seed)), model, case, random.Random(seed))
        print(f"{seed}: {case}", flush=True)


def draw(dice, kind):
    """A small shape, and settings that the architecture has."""
    case = passes.draw(dice)
    head, keys = dice.choice([16, 32, 48]), dice.choice([1, 2])
    heads = keys * dice.choice([1, 2, 3])
    case |= {
        "length": dice.randint(6, 40),
        "head": head,
        "heads": heads,
        "key_heads": keys,
        "hidden": heads * (head if dice.random() < 0.5 else 16),
        "ffn": 16 * dice.randint(2, 10),
        "layers": dice.randint(1, 4),
        "vocabulary": dice.choice([100, 128, 200]),
    }
    passes.add_settings(dice, [kind], case)
    if kind in MORE:
        add_settings(dice, kind, case)
    # Sinks are not part of every kernel.
    case["attention"] = "eager"
    if kind == "phi3" and dice.random() < 0.6:
        pairs = int(case["head"] * case["rope"]["partial_rotary_factor"]) // 2
        factors = lambda most: [round(1 + dice.random() * most, 3) for _ in range(pairs)]
        case["rope"] |= {"rope_type": "longrope", "short_factor": factors(3), "long_factor": factors(30)}
        case["settings"]["original_max_position_embeddings"] = dice.choice([64, 1024])
    return case


def add_settings(dice, kind, case):
    """What an architecture of `MORE` has of its own."""
    settings, heads, head = {}, case["heads"], case["head"]
    window = dice.choice([None, max(2, case["length"] // 2), 4096])
    rope = {"rope_theta": case["theta"], "rope_type": dice.choice(["default", "linear", "yarn"])}
    if rope["rope_type"] != "default":
        rope["factor"] = dice.choice([2.0, 3.5])
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = dice.choice([64, 1024])
    experts = {"num_experts_per_tok": dice.choice([1, 2, 3])}
    if kind == "stablelm":
        case["hidden"] = head * heads
        rope["partial_rotary_factor"] = dice.choice([0.25, 0.5, 1.0])
        settings |= {"use_qkv_bias": dice.random() < 0.5, "layer_norm_eps": case["eps"]}
        settings |= {key: dice.random() < 0.3 for key in ("use_parallel_residual", "qk_layernorm")}
    if kind == "starcoder2":
        case["hidden"] = head * heads
        settings |= {"use_bias": dice.random() < 0.7, "norm_epsilon": case["eps"], "sliding_window": window}
    if kind == "mixtral":
        settings |= experts | {"num_local_experts": dice.choice([3, 4, 8]), "sliding_window": window}
    if kind in ("qwen2-moe", "qwen3-moe"):
        case["layers"] = dice.randint(2, 4)
        case["hidden"] = head * heads if kind == "qwen2-moe" else case["hidden"]
        settings |= experts | {
            "num_experts": dice.choice([4, 6, 16]),
            "norm_topk_prob": dice.random() < 0.5,
            "moe_intermediate_size": 16 * dice.randint(1, 6),
            "decoder_sparse_step": dice.choice([1, 1, 2]),
            "mlp_only_layers": dice.choice([[], [0]]),
        }
    if kind == "qwen2-moe":
        settings |= {"shared_expert_intermediate_size": 16 * dice.randint(1, 6), "qkv_bias": dice.random() < 0.7}
    if kind == "gpt-oss":
        settings |= experts | {"num_local_experts": dice.choice([3, 4, 8]), "sliding_window": dice.choice([3, 8, 128])}
        if dice.random() < 0.7:
            rope = {"rope_theta": 150000.0, "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
            rope |= {"truncate": False, "original_max_position_embeddings": 4096}
    if kind == "qwen3-next":
        case["layers"] = dice.randint(2, 4)
        rope["partial_rotary_factor"] = dice.choice([0.25, 0.5])
        keys = dice.choice([1, 2])
        settings |= experts | {
            "num_experts": dice.choice([4, 6, 16]),
            "norm_topk_prob": dice.random() < 0.7,
            "moe_intermediate_size": 16 * dice.randint(1, 6),
            "shared_expert_intermediate_size": 16 * dice.randint(1, 6),
            "linear_conv_kernel_dim": dice.choice([2, 4]),
            "linear_key_head_dim": dice.choice([16, 24]),
            "linear_value_head_dim": dice.choice([8, 32]),
            "linear_num_key_heads": keys,
            "linear_num_value_heads": keys * dice.choice([1, 2, 3]),
            "layer_types": [dice.choice(["linear_attention", "full_attention"]) for _ in range(case["layers"])],
        }
    if kind == "deepseek-v3":
        groups = dice.choice([1, 2, 4])
        case["key_heads"] = heads
        case["layers"] = dice.randint(2, 3)
        if rope["rope_type"] == "yarn":
            rope |= dice.choice([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 1.3}])
        settings |= {
            "n_group": groups,
            "topk_group": dice.randint(1, groups),
            "n_routed_experts": groups * dice.choice([3, 4]),
            "num_experts_per_tok": dice.choice([1, 2, 3]),
            "n_shared_experts": dice.choice([1, 2]),
            "norm_topk_prob": dice.random() < 0.5,
            "routed_scaling_factor": dice.choice([1.0, 2.5]),
            "first_k_dense_replace": dice.choice([0, 1]),
            "moe_intermediate_size": 16 * dice.randint(1, 6),
            "q_lora_rank": dice.choice([None, 24, 48]),
            "kv_lora_rank": dice.choice([16, 40]),
            "qk_rope_head_dim": dice.choice([8, 16]),
            "qk_nope_head_dim": dice.choice([16, 24]),
            "v_head_dim": dice.choice([16, 24, 40]),
            "rope_interleave": dice.random() < 0.7,
            "attention_bias": dice.random() < 0.3,
        }
    case["rope"], case["settings"] = rope, settings


def record(folder, model, case, dice):
    tokens = [dice.randrange(case["vocabulary"]) for _ in range(case["length"])]
    with torch.inference_mode():
        result = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    kept = {"ids": torch.tensor(tokens, dtype=torch.int32), "logits": result.logits[0].clone()}
    kept |= {f"hidden.{number}": state[0].clone() for number, state in enumerate(result.hidden_states)}
    model.float().save_pretrained(folder)
    save_file(kept, os.path.join(folder, "golden.safetensors"))


if __name__ == "__main__":
    main()
