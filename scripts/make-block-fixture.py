#!/usr/bin/env python3
"""Makes tests/fixtures/blocks.safetensors: random blocks of every weight type and
the values that the official `gguf` package decodes them to.

    python3 -m venv venv && venv/bin/pip install gguf==0.19.0 safetensors==0.6.2
    venv/bin/python scripts/make-block-fixture.py

Every byte is random, except that scales (binary16 or binary32) are drawn finite and
of ordinary size. The package has no decoder for Q8_K; its three-line definition in
ggml's `dequantize_row_q8_K` (y = d * q) stands here instead.
"""

import pathlib

import gguf
import numpy as np
from gguf.quants import dequantize
from safetensors.numpy import save_file

ROWS, WIDTH = 3, 512
# Byte offsets of the binary16 scales in a block of each type.
SCALES = {
    "F32": [], "F16": [], "BF16": [],
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q8_K": [],
    "IQ4_NL": [0], "MXFP4": [], "IQ4_XS": [0], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0],
    "IQ3_S": [0], "IQ1_S": [0], "IQ1_M": [], "TQ1_0": [52], "TQ2_0": [64],
    "NVFP4": [],
}


def blocks(rng, name, block_bytes, count):
    raw = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    scale = lambda dtype: rng.standard_normal(count).astype(dtype).view(np.uint8).reshape(count, -1)
    for offset in SCALES[name]:
        raw[:, offset : offset + 2] = scale(np.float16)
    if name == "Q8_K":
        raw[:, :4] = scale(np.float32)
    if name == "MXFP4":
        # Powers of two that are numbers of ordinary size, the two smallest among them.
        raw[:, 0] = rng.integers(96, 160, count)
        raw[:2, 0] = [0, 1]
    if name == "IQ1_M":
        # The scale is the upper bits of four words.
        bits = rng.standard_normal(count).astype(np.float16).view(np.uint16)
        words = raw[:, 48:56].copy().view(np.uint16)
        for place in range(4):
            words[:, place] = (words[:, place] & 0x0FFF) | ((bits >> (4 * place)) & 15) << 12
        raw[:, 48:56] = words.view(np.uint8)
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal(count).astype(np.float32)
        if name == "BF16":
            raw = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            raw = values.astype(np.float16 if name == "F16" else np.float32).view(np.uint8)
    return raw


def main():
    rng = np.random.default_rng(1)
    tensors = {}
    for name in SCALES:
        # Types that joined later leave the others' blocks as they are.
        if name == "IQ4_NL":
            rng = np.random.default_rng(2)
        if name == "NVFP4":
            rng = np.random.default_rng(3)
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = blocks(rng, name, size, ROWS * WIDTH // block).reshape(ROWS, -1)
        if name == "Q8_K":
            each = raw.reshape(-1, size)
            d = each[:, :4].copy().view(np.float32)
            values = d * each[:, 4 : 4 + block].view(np.int8).astype(np.float32)
        else:
            values = dequantize(raw, kind)
        values = values.reshape(ROWS, WIDTH).astype(np.float32)
        assert np.isfinite(values).all(), name
        tensors[f"{name}.bytes"] = np.ascontiguousarray(raw)
        tensors[f"{name}.values"] = np.ascontiguousarray(values)
    path = pathlib.Path(__file__).parent.parent / "tests/fixtures/blocks.safetensors"
    save_file(tensors, path, {"made_by": "scripts/make-block-fixture.py with gguf 0.19.0"})


if __name__ == "__main__":
    main()
