#!/usr/bin/env python3
"""Writes a small random Qwen2 or Llama as checkpoints of 8 bits are published: the same weights in seven forms.

    scripts/fp8_checkpoints.py OUT [--hidden 256] [--ffn 384] [--heads 4] [--kv-heads 2] [--layers 1]
        [--vocabulary 128] [--seed 5] [--kind llama]

Scales are up to a third larger than the largest value needs, as calibrated ones are, so that nothing
that quantises the decoded values anew gets the same codes. Needs PyTorch and safetensors.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file

E4M3 = torch.finfo(torch.float8_e4m3fn).max


def loose(scale):
    return scale * (1 + torch.rand_like(scale) / 3)


def by_tensor(weight):
    scale = loose(weight.abs().max() / E4M3)
    return (weight / scale).to(torch.float8_e4m3fn), scale


def by_channel(weight):
    # In bf16, as llm-compressor keeps scales of a bf16 model.
    scale = loose(weight.abs().amax(1, keepdim=True) / E4M3).bfloat16()
    return (weight / scale.float()).to(torch.float8_e4m3fn), scale


def by_integers(weight):
    scale = loose(weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    return (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def by_block(weight):
    rows, width = weight.shape
    tall, wide = -(-rows // 128), -(-width // 128)
    padded = torch.zeros(tall * 128, wide * 128)
    padded[:rows, :width] = weight
    scale = loose(padded.reshape(tall, 128, wide, 128).abs().amax((1, 3)) / E4M3)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :width]
    return (weight / spread).to(torch.float8_e4m3fn), scale


def compressed(strategy, activations, **more):
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **more}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, **activations}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def integers(config):
    for part in ["weights", "input_activations"]:
        config["config_groups"]["group_0"][part]["type"] = "int"
    return config | {"format": "int-quantized"}


TOKEN = {"dynamic": True, "strategy": "token"}
STATIC = {"dynamic": False, "strategy": "tensor"}
FORMS = {
    "channel": (by_channel, compressed("channel", TOKEN), "weight_scale", False),
    "tensor": (by_tensor, compressed("tensor", TOKEN), "weight_scale", False),
    "static": (by_tensor, compressed("tensor", STATIC), "weight_scale", True),
    "fp8-static": (by_tensor, {"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", True),
    "fp8-dynamic": (by_tensor, {"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_scale", False),
    "int8": (by_integers, integers(compressed("channel", TOKEN)), "weight_scale", False),
    "block": (
        by_block,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "weight_scale_inv",
        False,
    ),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    for name, usual in [("hidden", 256), ("ffn", 384), ("heads", 4), ("kv-heads", 2), ("layers", 1), ("vocabulary", 128), ("seed", 5)]:
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--kind", choices=["qwen2", "llama"], default="qwen2")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    hidden, head = options.hidden, options.hidden // options.heads
    config = {
        "model_type": options.kind,
        "architectures": [f"{options.kind.capitalize()}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": options.ffn,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    plain, weights = {}, {}
    for name in ["model.embed_tokens", "lm_head"]:
        plain[f"{name}.weight"] = torch.randn(options.vocabulary, hidden).bfloat16()
    plain["model.norm.weight"] = (1 + torch.randn(hidden) * 0.1).bfloat16()
    for number in range(options.layers):
        layer = f"model.layers.{number}"
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            plain[f"{layer}.{norm}.weight"] = (1 + torch.randn(hidden) * 0.1).bfloat16()
        heads = {"q": options.heads, "k": options.kv_heads, "v": options.kv_heads}
        shapes = {f"self_attn.{name}_proj": (count * head, hidden) for name, count in heads.items()}
        for name, (rows, _) in shapes.items() if options.kind == "qwen2" else []:
            plain[f"{layer}.{name}.bias"] = (torch.randn(rows) * 0.5).bfloat16()
        shapes |= {
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (options.ffn, hidden),
            "mlp.up_proj": (options.ffn, hidden),
            "mlp.down_proj": (hidden, options.ffn),
        }
        for place, (name, (rows, width)) in enumerate(shapes.items()):
            # Stacked matrices have other ranges.
            weights[f"{layer}.{name}"] = torch.randn(rows, width) * (1 + place % 3) / width**0.5
    for form, (quantise, method, scale_name, static) in FORMS.items():
        tensors = dict(plain)
        for name, weight in weights.items():
            codes, scale = quantise(weight)
            tensors[f"{name}.weight"], tensors[f"{name}.{scale_name}"] = codes, scale
            if static:
                tensors[f"{name}.input_scale"] = loose(torch.tensor(8.0 / E4M3))
        folder = options.out / form
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}, indent=1) + "\n")


if __name__ == "__main__":
    main()
