#!/usr/bin/env python3
"""Writes a small random Qwen2 as a checkpoint of transformers' `fp8`, by PyTorch's own conversions.

    scripts/fp8_folder.py OUT [--plain PLAIN] [--seed 7]

OUT gets `config.json` with a `quantization_config`, and `model.safetensors`: codes in E4M3, one f32
scale for each block of 128 by 128 (blocks at the edges are cut), everything else in BF16. PLAIN
gets the same model with the decoded weights in F32: code times scale, rounded once.
Needs PyTorch and safetensors.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file

BLOCK = 128
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
METHOD = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}


def tensors():
    """Every tensor of the model, by its name."""
    hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    made = {
        "model.embed_tokens.weight": torch.randn(CONFIG["vocab_size"], hidden) * 0.5,
        "lm_head.weight": torch.randn(CONFIG["vocab_size"], hidden) * 0.05,
        "model.norm.weight": torch.rand(hidden) * 0.6 + 0.7,
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{block}{name}.weight"] = torch.rand(hidden) * 0.6 + 0.7
        for name, rows in (("q", hidden), ("k", keys), ("v", keys)):
            made[f"{block}self_attn.{name}_proj.weight"] = torch.randn(rows, hidden) * 0.08
            made[f"{block}self_attn.{name}_proj.bias"] = torch.randn(rows) * 0.1
        made[f"{block}self_attn.o_proj.weight"] = torch.randn(hidden, hidden) * 0.08
        made[f"{block}mlp.gate_proj.weight"] = torch.randn(ffn, hidden) * 0.08
        made[f"{block}mlp.up_proj.weight"] = torch.randn(ffn, hidden) * 0.08
        made[f"{block}mlp.down_proj.weight"] = torch.randn(hidden, ffn) * 0.08
    return made


def quantised(weight):
    """Codes, scales and the decoded values of a matrix."""
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-width // BLOCK))
    values = torch.empty(rows, width)
    for down in range(scales.shape[0]):
        for along in range(scales.shape[1]):
            part = (
                slice(down * BLOCK, (down + 1) * BLOCK),
                slice(along * BLOCK, (along + 1) * BLOCK),
            )
            scale = weight[part].abs().max() / 448.0
            scales[down, along] = scale
            codes[part] = (weight[part] / scale).to(torch.float8_e4m3fn)
            values[part] = codes[part].float() * scale
    return codes, scales, values


def main():
    """Writes one folder or two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--plain", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    coded, plain = {}, {}
    for name, value in tensors().items():
        if not name.endswith("proj.weight"):
            coded[name] = value.to(torch.bfloat16)
            plain[name] = coded[name].float()
            continue
        codes, scales, values = quantised(value)
        coded[name] = codes
        coded[f"{name}_scale_inv"] = scales
        plain[name] = values
    folders = [(given.out, coded, {**CONFIG, "quantization_config": METHOD})]
    if given.plain:
        folders.append((given.plain, plain, CONFIG))
    for folder, held, config in folders:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(held, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
