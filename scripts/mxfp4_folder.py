#!/usr/bin/env python3
"""Writes a small random gpt-oss whose experts are MXFP4, and the same model decoded by transformers.

    scripts/mxfp4_folder.py OUT [--seed 7]

OUT/packed gets `config.json` with a `quantization_config`, and `model.safetensors` with `*_blocks` and
`*_scales`. OUT/plain gets the same model in F32, its experts decoded by transformers' own
`convert_moe_packed_tensors`. OUT/golden.safetensors gets token ids, logits and hidden states of an
eager pass of the plain model in f64. Needs PyTorch, transformers 5 and safetensors.
"""

import argparse
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
METHOD = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = transformers.GptOssConfig(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        spread = 1.0 if name.endswith(("sinks", "embed_tokens.weight")) else 0.1
        parameter.data = torch.randn_like(parameter) * spread + (1.0 if name.endswith("norm.weight") else 0.0)
    packed = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = parameter.data.to(torch.bfloat16)
            parameter.data = packed[name].float()
            continue
        experts, inputs, outputs = parameter.shape
        codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = codes, scales
        parameter.data = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).contiguous()
    save(options.out / "packed", packed, config.to_dict() | {"quantization_config": METHOD})
    plain = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    save(options.out / "plain", plain, config.to_dict())
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 11))
    with torch.inference_mode():
        result = model.double()(input_ids=tokens, use_cache=False, output_hidden_states=True)
    golden = {"ids": tokens[0].to(torch.int32), "logits": result.logits[0].clone()}
    golden |= {f"hidden.{number}": state[0].clone() for number, state in enumerate(result.hidden_states)}
    save_file(golden, options.out / "golden.safetensors")


def save(folder, tensors, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
