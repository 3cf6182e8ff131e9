#!/usr/bin/env python3
"""Writes very small models in the quantised forms that checkpoints have, each as its own package writes it.

    scripts/quantised_folders.py OUT [--seed 11] [--gptqmodel SOURCES] [--autoawq SOURCES]

Each OUT/FORM gets `config.json`, `model.safetensors`, and `weights.json`: of each weight, by its canonical
name, the BLAKE3 of its values in f32, little-endian, row by row, zeros without a sign, as the package
itself decodes it in f32.
Needs PyTorch, compressed-tensors 0.20.1, bitsandbytes 0.50.2, nvidia-modelopt 0.47.0, safetensors, blake3, and the
sources of gptqmodel 7.7.0 and autoawq 0.2.9, of which it takes the functions that unpack (neither installs without
a GPU). tests/fixtures/quantised was written by it.
"""

import argparse
import importlib.util
import json
import pathlib
import sys

import bitsandbytes.functional as bnb
import blake3
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as generic_4bit
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import save_file

HIDDEN, FFN, VOCABULARY, GROUP = 64, 96, 64, 32
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# Layers of a block: their names, the canonical names of what they hold, with the rows of each.
LLAMA = {
    "self_attn.q_proj": [("attn_q", 64)],
    "self_attn.k_proj": [("attn_k", 32)],
    "self_attn.v_proj": [("attn_v", 32)],
    "self_attn.o_proj": [("attn_output", 64)],
    "mlp.gate_proj": [("ffn_gate", 96)],
    "mlp.up_proj": [("ffn_up", 96)],
    "mlp.down_proj": [("ffn_down", 64)],
}
PHI3 = {
    "self_attn.qkv_proj": [("attn_q", 64), ("attn_k", 32), ("attn_v", 32)],
    "self_attn.o_proj": [("attn_output", 64)],
    "mlp.gate_up_proj": [("ffn_gate", 96), ("ffn_up", 96)],
    "mlp.down_proj": [("ffn_down", 64)],
}
PHI3_CONFIG = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0}


def load(path, name):
    """A module of a package that does not install here."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def scales_of(*shape):
    return torch.rand(*shape) * 0.02 + 0.001


def gptq(model, bits, newer=False, ordered=False):
    def quantise(rows, width):
        groups = width // GROUP
        codes, zeros = words(width * bits // 32, rows), words(groups, rows * bits // 32)
        if not newer:
            # The largest code would be a zero point beyond all codes: none is written.
            held = model.unpack_cols(zeros, bits).clamp(max=2**bits - 2)
            zeros = model.pack_cols(held, bits, pack_dtype=torch.int32)
        scales = scales_of(groups, rows).half()
        order = torch.arange(width, dtype=torch.int32) // GROUP
        if ordered:
            order = order[torch.randperm(width)]
        true_zeros = zeros if newer else model._correct_gptq_v1_qzeros(zeros, bits)
        held = model.unpack_rows(codes, bits).float() - model.unpack_cols(true_zeros, bits).float()[order.long()]
        tensors = {".qweight": codes, ".qzeros": zeros, ".scales": scales, ".g_idx": order}
        return tensors, (held * scales.float()[order.long()]).T

    config = {
        "bits": bits,
        "group_size": GROUP,
        "desc_act": ordered,
        "sym": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if newer else "gptq",
    }
    return config, quantise


def awq(packing):
    def quantise(rows, width):
        codes, zeros = words(width, rows // 8), words(width // GROUP, rows // 8)
        scales = scales_of(width // GROUP, rows).half()
        values = packing.dequantize_gemm(codes, zeros, scales.float(), 4, GROUP)
        return {".qweight": codes, ".qzeros": zeros, ".scales": scales}, values.T

    config = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm", "quant_method": "awq"}
    return config, quantise


def compressed(form, ordered=False, **args):
    arguments = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)

    def quantise(rows, width):
        weight = torch.randn(rows, width) * 0.1
        group = {"tensor": None, "channel": width}.get(arguments.strategy, arguments.group_size)
        grouped = weight.reshape(rows, -1, group) if group else weight.reshape(1, 1, -1)
        whole = generate_gparam(weight.min(), weight.max()) if arguments.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments, global_scale=whole)
        dtype = torch.float32 if "fp" in form else torch.bfloat16
        state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        if whole is not None:
            state["weight_global_scale"] = whole
        held = compressor.compress(dict(state), scheme)
        tensors = {f".{name}": tensor.contiguous() for name, tensor in held.items()}
        # In f32, whatever the scales are.
        read = held | {"weight_scale": held["weight_scale"].float() if "mx" not in form else held["weight_scale"]}
        if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            codes = unpack_fp4_from_uint8(held["weight_packed"], rows, width, dtype=torch.float32)
            scale = 2.0 ** (held["weight_scale"].float() - 127) if "mx" in form else held["weight_scale"].float()
            values = dequantize(codes, scale, None, arguments, torch.float32, whole)
        elif form == "mxfp8-quantized":
            scale = 2.0 ** (held["weight_scale"].float() - 127)
            values = dequantize(held["weight"], scale, None, arguments, torch.float32)
        else:
            values = compressor.decompress(dict(read), scheme)["weight"]
        assert values.dtype == torch.float32
        if ordered:
            order = torch.arange(width, dtype=torch.int32) // GROUP
            order = order[torch.randperm(width)]
            codes = values / read["weight_scale"].repeat_interleave(GROUP, 1)
            values = codes.round() * read["weight_scale"][:, order.long()]
            tensors[".weight_g_idx"] = order
        return tensors, values

    weights = json.loads(arguments.model_dump_json())
    if ordered:
        weights["actorder"] = "group"
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}},
    }
    return config, quantise


def bits_of_bytes(kind, nested):
    def quantise(rows, width):
        weight = torch.randn(rows, width) * 0.1
        codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        tensors = {".weight": codes} | {f".weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        magnitudes = state.absmax
        if nested:
            magnitudes = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        # Blocks run on from row to row, as they were made and as CUDA reads them; the CPU kernel of 0.50.2
        # begins one with each row, and decodes rows of 96 values wrongly.
        values = generic_4bit(codes.reshape(-1), magnitudes, state.code, 64, (rows, width), torch.float32)
        return tensors, values

    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
    }
    return config, quantise


def eight_bits():
    def quantise(rows, width):
        codes, scales, _ = bnb.int8_vectorwise_quant((torch.randn(rows, width) * 0.1).half())
        tensors = {".weight": codes, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, bnb.int8_vectorwise_dequant(codes, scales)

    return {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, quantise


def modelopt_fp8():
    def quantise(rows, width):
        weight = torch.randn(rows, width) * 0.1
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        tensors = {".weight": codes, ".weight_scale": scale, ".input_scale": torch.tensor(0.01)}
        return tensors, codes.float() * scale

    config = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    return config, quantise


def modelopt_nvfp4():
    def quantise(rows, width):
        weight = torch.randn(rows, width) * 0.1
        quantised, scale, second = NVFP4QTensor.quantize(weight, 16)
        codes = quantised._quantized_data
        tensors = {".weight": codes, ".weight_scale": scale, ".weight_scale_2": second}
        values = quantised.dequantize(dtype=torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
        return tensors | {".input_scale": torch.tensor(0.01)}, values

    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, quantise


def write(folder, form, layers, kind, more):
    config, quantise = form
    tensors, digests = {}, {}
    for name, parts in layers.items():
        rows, width = sum(rows for _, rows in parts), FFN if "down" in name else HIDDEN
        held, values = quantise(rows, width)
        assert values.shape == (rows, width) and values.dtype == torch.float32, (folder, values.shape, values.dtype)
        tensors |= {f"model.layers.0.{name}{ending}": tensor.clone() for ending, tensor in held.items()}
        first = 0
        for part, count in parts:
            # Zeros lose their sign: packages differ in it.
            own = (values[first : first + count] + 0.0).contiguous().numpy().astype("<f4").tobytes()
            digests[f"blk.0.{part}.weight"] = blake3.blake3(own).hexdigest()
            first += count
    for name, shape in [("model.embed_tokens", (VOCABULARY, HIDDEN)), ("lm_head", (VOCABULARY, HIDDEN))]:
        tensors[f"{name}.weight"] = torch.randn(shape).bfloat16()
    for name in ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]:
        tensors[f"{name}.weight"] = (torch.randn(HIDDEN) * 0.1 + 1).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = COMMON | {"model_type": kind} | more | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "weights.json").write_text(json.dumps(digests, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--gptqmodel", type=pathlib.Path, required=True)
    parser.add_argument("--autoawq", type=pathlib.Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    sys.path.insert(0, str(options.gptqmodel))
    from gptqmodel.utils import model_dequant

    packing = load(options.autoawq / "awq/utils/packing_utils.py", "packing_utils")
    group = {"strategy": "group", "group_size": GROUP}
    floats = {"num_bits": 4, "type": "float"}
    llama = {
        "gptq-4": gptq(model_dequant, 4),
        "gptq-4-ordered": gptq(model_dequant, 4, ordered=True),
        "gptq-v2-2": gptq(model_dequant, 2, newer=True),
        "gptq-3": gptq(model_dequant, 3),
        "gptq-v2-8": gptq(model_dequant, 8, newer=True),
        "awq": awq(packing),
        "packed-4": compressed("pack-quantized", num_bits=4, **group),
        "packed-4-ordered": compressed("pack-quantized", num_bits=4, ordered=True, **group),
        "packed-4-zeros": compressed("pack-quantized", num_bits=4, symmetric=False, **group),
        "packed-8-rows": compressed("pack-quantized", num_bits=8, strategy="channel"),
        "packed-3-zeros": compressed("pack-quantized", num_bits=3, symmetric=False, **group),
        "int-8-zeros": compressed("int-quantized", num_bits=8, symmetric=False, strategy="channel"),
        "nvfp4": compressed("nvfp4-pack-quantized", **floats, strategy="tensor_group", group_size=16),
        "mxfp4": compressed("mxfp4-pack-quantized", **floats, strategy="group", group_size=32, scale_dtype=torch.uint8),
        "mxfp8": compressed(
            "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
        ),
        "nf4": bits_of_bytes("nf4", False),
        "nf4-nested": bits_of_bytes("nf4", True),
        "fp4": bits_of_bytes("fp4", False),
        "int8-rows": eight_bits(),
        "modelopt-fp8": modelopt_fp8(),
        "modelopt-nvfp4": modelopt_nvfp4(),
    }
    for name, form in llama.items():
        write(options.out / name, form, LLAMA, "llama", {})
    phi3 = {
        "phi3-gptq": gptq(model_dequant, 4),
        "phi3-awq": awq(packing),
        "phi3-nvfp4": compressed("nvfp4-pack-quantized", **floats, strategy="tensor_group", group_size=16),
        "phi3-nf4": bits_of_bytes("nf4", True),
        "phi3-fp8": modelopt_fp8(),
    }
    for name, form in phi3.items():
        write(options.out / name, form, PHI3, "phi3", PHI3_CONFIG)


if __name__ == "__main__":
    main()
