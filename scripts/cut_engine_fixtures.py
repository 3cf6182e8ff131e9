#!/usr/bin/env python3
"""Cuts small fixtures out of captures of engines: tests/fixtures/engines/.

    cut_engine_fixtures.py CAPTURES PROBES OUT

CAPTURES holds `engines` (PyTorch's operations, vLLM, SGLang, torchao, FlashAttention 3, an H200) and `h200`; PROBES
is what scripts/probe_kernels.py wrote on a GPU. Nothing is computed here: values are copied, bit for bit. Each file's
header, or the entry `about` of an .npz, names the GPU, the versions and the origin.
"""
import json
import struct
import sys
from pathlib import Path

import numpy as np

# PyTorch's own operations that are kept of other packages' captures.
ATEN = ("aten::_scaled_mm", "aten::_scaled_dot_product_cudnn_attention")
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "I16": 2}


def read(path):
    """Tensors of a safetensors file: (dtype, shape, bytes)."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    about = header.pop("__metadata__", {}) or {}
    return {k: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for k, v in header.items()}, about


def write(path, tensors, about):
    header, data = {"__metadata__": about}, b""
    for name in sorted(tensors):
        dtype, shape, body = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    print(path, path.stat().st_size)


def head(tensor, axis, count):
    """The first `count` along an axis."""
    dtype, shape, body = tensor
    items = np.frombuffer(body, np.uint8).reshape(*shape, SIZES[dtype])
    cut = np.take(items, range(min(count, shape[axis])), axis=axis)
    return dtype, list(cut.shape[:-1]), cut.tobytes()


def pytorch(captures, out):
    tensors, about = read(captures / "engines/pytorch-ops-bf16.safetensors")
    kept = {}
    for name, tensor in tensors.items():
        if name.startswith("norm.24.576") or name.startswith("att.48.8"):
            kept[name] = tensor
        elif name.startswith("act."):
            kept[name] = head(tensor, 0, 3)
        elif name.startswith("att.") and name.split(".")[-1] in ("q", "k", "v", "flash", "cudnn", "out"):
            # One head; a query head reads the key head of its group, and these are the first of each.
            _, tokens, heads, kv, width, *rest = name.split(".")
            if tokens == "200" and rest[-1] in ("out", "cudnn"):
                continue
            kept[".".join(["att", tokens, "1", "1", width, *rest])] = head(tensor, 1, 1)
    for name in [n for n in kept if n.startswith("att.48") and n.split(".")[-1] in ("efficient", "math", "qk", "p")]:
        del kept[name]
    write(out / "pytorch.safetensors", kept, {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130", "origin": "PyTorch's operations one by one, heads and rows of a larger capture", **about})


def operations(captures, out):
    """The first call of each operation of the named captures, with its arrays."""
    wanted = {
        "vllm": ["qwen2-fp8-8.npz", "qwen2-fp8-block-8.npz"],
        "sglang": ["qwen2-fp8-8.npz"],
        "torch": ["torchao-fp8-row.npz", "flash-attention-3.npz"],
    }
    for folder, files in wanted.items():
        calls, arrays, seen = [], {}, set()
        for file in files:
            with np.load(captures / "engines" / folder / file) as capture:
                index = json.loads(capture["index"].tobytes())
                def weight(call):
                    return sum(capture[v["key"]].nbytes for v in call["in"] if isinstance(v, dict) and "key" in v)
                for call in sorted(index, key=weight):
                    empty = any(isinstance(v, dict) and "key" not in v for v in call["in"] + call["out"][:1])
                    if call["op"] in seen or call["op"].startswith("aten::") and call["op"] not in ATEN or "cache" in call["op"] or "scheduler" in call["op"]:
                        continue
                    if empty and "attention" not in call["op"] and "flash" not in call["op"]:
                        continue
                    seen.add(call["op"])
                    calls.append(call)
                    for note in [*call["in"], *call["out"], *call["after"].values()]:
                        if isinstance(note, dict) and "key" in note:
                            key = f"{file}.{note['key']}"
                            arrays[key] = capture[note["key"]]
                            note["key"] = key
        about = {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130", "cuda": "13.0", "origin": f"{folder}: {', '.join(files)}, one call of each operation"}
        entries = {"index": calls, "about": about}
        entries = {k: np.frombuffer(json.dumps(v).encode(), np.uint8) for k, v in entries.items()}
        np.savez_compressed(out / f"{folder}.npz", **entries, **arrays)
        print(out / f"{folder}.npz", (out / f"{folder}.npz").stat().st_size, sorted(seen))


def functions(captures, probes, out):
    samples, about = read(captures / "h200/special-functions.safetensors")
    kept = {k: head(v, 0, 400) for k, v in samples.items() if k.startswith(("in.", "out."))}
    digests, probe = read(probes / "digests.safetensors")
    for name, (dtype, shape, body) in digests.items():
        if not name.startswith("all."):
            kept[f"digest.{name}"] = ("I64", shape, body)
    origin = "samples: an H200; digests of all 2^32 inputs in blocks of 2^22: the GPU named here"
    write(out / "functions.safetensors", kept, {**probe, "samples": about.get("gpu", ""), "origin": origin})


def limit(name):
    return 80_000 if name.endswith("flash") and ".bf16." in name else 34_000


def probes_of(probes, out):
    kept, about = {}, {}
    reductions, about = read(probes / "reductions.safetensors")
    for name, tensor in reductions.items():
        kind, *rest = name.split(".")
        if kind == "mean" or (kind == "fused" and rest[1] in ("1", "3") and int(rest[2]) <= 1024):
            kept[name] = tensor
        if kind == "softmax" and (rest[0] == "1" or (rest[0] == "7" and int(rest[1]) <= 128)):
            kept[name] = tensor
    attention, _ = read(probes / "attention.safetensors")
    for name, tensor in attention.items():
        if name.split(".")[-1] in ("flash", "cudnn") and len(tensor[2]) <= limit(name) and tensor[1][-1] <= 128:
            kept[name] = tensor
    linear, _ = read(probes / "linear.safetensors")
    for name, tensor in linear.items():
        _, kind, tokens, inner, outputs, what = name.split(".")
        if int(inner) * int(outputs) <= 300_000 and (what == "bias" or kind == "f16"):
            kept[name] = tensor
    write(out / "probes.safetensors", kept, {**about, "origin": "scripts/probe_kernels.py; inputs are drawn from a hash, seeds 1 to 9"})


if __name__ == "__main__":
    captures, probes, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    pytorch(captures, out)
    operations(captures, out)
    functions(captures, probes, out)
    probes_of(probes, out)
