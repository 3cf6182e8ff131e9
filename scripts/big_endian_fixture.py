#!/usr/bin/env python3
"""Makes tests/fixtures/big-endian: a small llama of random blocks, little-endian and big-endian.

    python3 -m venv venv && venv/bin/pip install gguf==0.19.0
    venv/bin/python scripts/big_endian_fixture.py

The package's own `gguf-convert-endian` makes the second file of the first, so it has every type
that the package converts; the weight in NVFP4 has a second scale beside it. That its writer (`GGUFWriter` with `GGUFEndian.BIG`) writes plain
floats in the same way is checked here too.
"""

import argparse
import builtins
import pathlib
import shutil
import tempfile

import gguf
import numpy as np
from gguf.scripts.gguf_convert_endian import convert_byteorder

FOLDER = pathlib.Path(__file__).parent.parent / "tests/fixtures/big-endian"
HIDDEN, HEADS, HEAD, FFN, TOKENS = 256, 2, 16, 64, ["h", "e", "l", "o", "he", "ll", "hell", "<end>"]
# Byte offsets of the binary16 scales in a block of each type.
SCALES = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "MXFP4": [], "NVFP4": []}
MATRICES = {
    "token_embd": ("Q4_0", len(TOKENS), HIDDEN),
    "output": ("F32", len(TOKENS), HIDDEN),
    "blk.0.attn_q": ("Q4_K", HEADS * HEAD, HIDDEN),
    "blk.0.attn_k": ("F16", HEAD, HIDDEN),
    "blk.0.attn_v": ("MXFP4", HEAD, HIDDEN),
    "blk.0.attn_output": ("BF16", HIDDEN, HEADS * HEAD),
    "blk.0.ffn_gate": ("NVFP4", FFN, HIDDEN),
    "blk.0.ffn_up": ("Q6_K", FFN, HIDDEN),
    "blk.0.ffn_down": ("Q8_0", HIDDEN, FFN),
}


def blocks(rng, name, rows, width):
    kind = gguf.GGMLQuantizationType[name]
    if name == "F32":
        return rng.standard_normal((rows, width)).astype(np.float32)
    if name == "F16":
        return rng.standard_normal((rows, width)).astype(np.float16)
    if name == "BF16":
        bits = rng.standard_normal((rows, width)).astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint8).reshape(rows, -1)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = rows * width // block
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in SCALES[name]:
        raw[:, at : at + 2] = rng.standard_normal((count, 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        raw[:, 0] = rng.integers(110, 130, count)
    return raw.reshape(rows, -1)


def write(path, order, floats_alone):
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(12345.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_add_bos_token(False)
    for name, (kind, rows, width) in MATRICES.items():
        kind = "F16" if floats_alone and kind != "F32" else kind
        raw = None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", blocks(rng, kind, rows, width), raw_dtype=raw)
    if not floats_alone:
        writer.add_tensor("blk.0.ffn_gate.scale", np.array([0.37], np.float32))
        writer.add_tensor("blk.0.ffn_gate.input_scale", np.array([0.05], np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def to_big(path):
    asked = builtins.input
    builtins.input = lambda *_: "YES"
    reader = gguf.GGUFReader(path, "r+")
    convert_byteorder(reader, argparse.Namespace(order="big", dry_run=False))
    builtins.input = asked
    reader.data.flush()


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    write(FOLDER / "little.gguf", gguf.GGUFEndian.LITTLE, False)
    shutil.copy(FOLDER / "little.gguf", FOLDER / "big.gguf")
    to_big(FOLDER / "big.gguf")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (pathlib.Path(folder) / name for name in ("converted", "written"))
        write(ours, gguf.GGUFEndian.LITTLE, True)
        to_big(ours)
        write(theirs, gguf.GGUFEndian.BIG, True)
        assert ours.read_bytes() == theirs.read_bytes(), "the package writes what it converts to"


if __name__ == "__main__":
    main()
