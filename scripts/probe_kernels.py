#!/usr/bin/env python3
"""Asks a GPU for what its functions and PyTorch's kernels compute, and writes it to a folder.

    probe_kernels.py OUT

Needs CuPy, PyTorch and an NVIDIA GPU; takes less than a minute on an H100. Written are
digests.safetensors    for each function a sum of hashes of its results over all 2^32 inputs (pairs drawn from a hash
                       for pow), in 1,024 blocks of 2^22; all results at every bf16 and f16 value
reductions.safetensors means of squares, fused norms and softmax rows of many shapes
attention.safetensors  PyTorch's fused attentions and eager attention at many shapes
linear.safetensors     products with and without bias
table.NAME.z           lg2, sin and tanh over a stretch of inputs, as second differences
Inputs are drawn from a hash (`values`), so only results are kept. scripts/cut_engine_fixtures.py makes test fixtures.
"""
import json
import os
import sys
import zlib

import cupy as cp
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

OUT = sys.argv[1]
ABOUT = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = 1 << 22
CHUNK = 1 << 26

INSTRUCTIONS = [f"{name}.approx{ftz}.f32" for name in "ex2 rcp rsqrt sqrt lg2 sin cos".split() for ftz in (".ftz", "")]
INSTRUCTIONS.append("tanh.approx.f32")
SOURCE = r"""
typedef unsigned int u32; typedef unsigned long long u64;
__device__ u64 mixed(u32 bits, u32 index) {
    u64 h = (u64)bits * 0x9E3779B97F4A7C15ull + index;
    h ^= h >> 32; h *= 0xD6E8FEB86659FD93ull; return h ^ h >> 32;
}
__device__ u64 drawn(u64 z) {
    z += 0x9E3779B97F4A7C15ull; z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull; return z ^ z >> 31;
}
__device__ void put(u64 *digest, u32 index, float y) {
    u32 bits = __float_as_uint(y);
    if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0x7fffffffu;
    u64 h = mixed(bits, index);
    for (int o = 16; o; o >>= 1) h += __shfl_down_sync(~0u, h, o);
    if ((threadIdx.x & 31) == 0) atomicAdd(&digest[index >> 22], h);
}
extern "C" __global__ void hash(u64 *digest, const float *y, u32 first, u32 count) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) put(digest, first + i, y[i]);
}
extern "C" __global__ void pairs(float *x, float *y, u32 first, u32 count) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    u64 h = drawn(first + i);
    x[i] = __uint_as_float((u32)h); y[i] = __uint_as_float((u32)(h >> 32));
    if (i & 1) { x[i] = __uint_as_float(0x3f000000u + ((u32)h >> 7) % 0x03000000u); y[i] = ((int)(h >> 32)) * (1.0f / 67108864.0f); }
}
"""
for index, instruction in enumerate(INSTRUCTIONS):
    SOURCE += f"""
__device__ float function_{index}(float x) {{ float y; asm("{instruction} %0, %1;" : "=f"(y) : "f"(x)); return y; }}
extern "C" __global__ void digest_{index}(u64 *d) {{
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < 1ull << 32; i += step)
        put(d, (u32)i, function_{index}(__uint_as_float((u32)i)));
}}
extern "C" __global__ void table_{index}(float *y, u32 first, u32 step, u32 count) {{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = function_{index}(__uint_as_float(first + i * step));
}}
"""
MODULE = cp.RawModule(code=SOURCE, options=("--std=c++14",), backend="nvrtc")

FUNCTIONS = {
    "exp": torch.exp, "log": torch.log, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "erf": torch.erf,
    "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "exp2": torch.exp2, "log2": torch.log2,
}


def grid(count):
    return ((count + 511) // 512,), (512,)


def hashed(digest, values, first):
    torch.cuda.synchronize()
    MODULE.get_function("hash")(*grid(CHUNK), (digest, cp.asarray(values), np.uint32(first), np.uint32(CHUNK)))
    cp.cuda.Device().synchronize()


def digests():
    def kept(digest):
        return torch.from_numpy(cp.asnumpy(digest).view(np.int64))

    out = {}
    for index, instruction in enumerate(INSTRUCTIONS):
        digest = cp.zeros(1024, cp.uint64)
        MODULE.get_function(f"digest_{index}")((1056,), (512,), (digest,))
        out[instruction] = kept(digest)
    for name, function in FUNCTIONS.items():
        digest = cp.zeros(1024, cp.uint64)
        for first in range(0, 1 << 32, CHUNK):
            bits = torch.arange(CHUNK, device="cuda", dtype=torch.int64) + first
            hashed(digest, function(bits.to(torch.int32).view(F32)), first)
        out[f"torch.{name}"] = kept(digest)
    digest, x, y = cp.zeros(1024, cp.uint64), cp.empty(CHUNK, cp.float32), cp.empty(CHUNK, cp.float32)
    for first in range(0, 1 << 32, CHUNK):
        MODULE.get_function("pairs")(*grid(CHUNK), (x, y, np.uint32(first), np.uint32(CHUNK)))
        cp.cuda.Device().synchronize()
        hashed(digest, torch.pow(torch.as_tensor(x, device="cuda"), torch.as_tensor(y, device="cuda")), first)
    out["torch.pow"] = kept(digest)
    for dtype, name in ((BF16, "bf16"), (F16, "f16")):
        x = torch.arange(65536, device="cuda", dtype=torch.int32).to(torch.int16).view(dtype)
        for function in ("silu", "gelu", "gelu_tanh", "sigmoid", "exp", "tanh", "cos", "sin"):
            out[f"all.{name}.{function}"] = FUNCTIONS[function](x).view(torch.int16).cpu()
    save_file(out, f"{OUT}/digests.safetensors", metadata=ABOUT)


def tables():
    for name, first, step, count in (
        ("lg2.approx.ftz.f32", 0x3F000000, 1, 1 << 24),
        ("sin.approx.ftz.f32", 0x3D800000, 4, 10 << 20),
        ("tanh.approx.f32", 0x39000000, 8, 17 << 20),
    ):
        y = cp.empty(count, cp.float32)
        values = (y, np.uint32(first), np.uint32(step), np.uint32(count))
        MODULE.get_function(f"table_{INSTRUCTIONS.index(name)}")(*grid(count), values)
        bits = cp.asnumpy(y).view(np.int32).astype(np.int64)
        second = np.diff(bits, n=2)
        large = np.nonzero(np.abs(second) > 126)[0]
        head = {"first": first, "step": step, "count": count, "head": bits[:2].tolist()}
        head |= {"at": large.tolist(), "are": second[large].tolist()}
        body = json.dumps(head).encode() + b"\0" + np.clip(second, -127, 127).astype(np.int8).tobytes()
        with open(f"{OUT}/table.{name}.z", "wb") as file:
            file.write(zlib.compress(body, 6))


def values(seed, count, amplitude=1.0):
    """Sums of four uniform numbers from a hash, with some 0.6 as standard deviation."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64(seed << 40) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    low = np.uint64(0xFFFF)
    parts = (z & low) + ((z >> np.uint64(16)) & low) + ((z >> np.uint64(32)) & low) + (z >> np.uint64(48))
    return (parts.astype(np.int64) - 131070).astype(np.float32) * np.float32(2**-16 * amplitude)


def drawn(seed, shape, dtype, amplitude=1.0):
    return torch.from_numpy(values(seed, int(np.prod(shape)), amplitude).reshape(shape)).cuda().to(dtype)


def save(name, out):
    save_file({k: v.detach().contiguous().cpu() for k, v in out.items()}, f"{OUT}/{name}.safetensors", metadata=ABOUT)


def reductions():
    out = {}
    for rows in (1, 2, 3, 5, 8, 15, 16, 17, 40, 300):
        for width in (64, 100, 128, 256, 512, 576, 896, 1000, 1024, 2048, 3584, 4096, 5120, 8192):
            if rows == 300 and width > 4096:
                continue
            x = drawn(1, (rows, width), F32, 2)
            out[f"mean.{rows}.{width}"] = x.pow(2).mean(-1)
            if rows <= 8:
                for dtype, name in ((BF16, "bf16"), (F16, "f16")):
                    y = F.rms_norm(x.to(dtype), (width,), drawn(2, (width,), dtype), 1e-6)
                    out[f"fused.{name}.{rows}.{width}"] = y
    for rows in (1, 7, 20):
        for width in (1, 5, 31, 32, 33, 64, 100, 128, 300, 512, 777, 1024, 1025, 1500, 2048, 4096, 5000):
            x = drawn(3, (rows, width), F32, 8)
            out[f"softmax.{rows}.{width}"] = torch.softmax(x, -1)
            out[f"softmax_bf16.{rows}.{width}"] = torch.softmax(x.to(BF16), -1, dtype=F32).to(BF16)
    save("reductions", out)


SHAPES = [
    (5, 5, 4, 2, 64), (64, 64, 4, 4, 64), (129, 129, 4, 2, 64), (333, 333, 6, 2, 64), (600, 600, 2, 1, 64),
    (1300, 1300, 2, 1, 64), (150, 150, 4, 2, 128), (333, 333, 2, 1, 128), (700, 700, 2, 1, 128), (40, 40, 2, 1, 32),
    (200, 200, 4, 2, 32), (200, 200, 2, 1, 96), (333, 333, 2, 2, 96), (100, 100, 2, 1, 80), (200, 200, 2, 1, 256),
    (300, 300, 64, 8, 64), (200, 200, 64, 8, 128), (1, 33, 4, 2, 64), (1, 500, 4, 2, 64), (1, 77, 4, 2, 128),
    (1, 1000, 4, 2, 128), (1, 400, 32, 8, 128), (7, 100, 4, 2, 64),
]


def attention():
    """Queries, keys, heads, key heads, width; causal where there are as many keys as queries. Four heads are kept."""
    out = {}
    for dtype, kind in ((BF16, "bf16"), (F16, "f16")):
        for queries, keys, heads, kv, width in SHAPES:
            if kind == "f16" and (queries > 700 or heads > 8):
                continue
            q = drawn(4, (1, heads, queries, width), dtype, 4)
            k, v = drawn(5, (1, kv, keys, width), dtype, 4), drawn(6, (1, kv, keys, width), dtype)
            k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
            causal = queries == keys
            name = f"att.{kind}.{queries}.{keys}.{heads}.{kv}.{width}"
            flash = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
            out[f"{name}.flash"] = flash[0][:, :4]
            if queries >= 400 or heads > 8:
                continue
            for backend, what in ((SDPBackend.EFFICIENT_ATTENTION, "efficient"), (SDPBackend.CUDNN_ATTENTION, "cudnn")):
                try:
                    with sdpa_kernel([backend]):
                        out[f"{name}.{what}"] = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                except RuntimeError as problem:
                    print(name, what, str(problem)[:100])
            if width in (64, 128):
                scores = torch.matmul(q, k.transpose(2, 3)) * width**-0.5
                if causal:
                    mask = torch.full((queries, keys), torch.finfo(dtype).min, device="cuda", dtype=dtype)
                    scores = scores + mask.triu(1)
                out[f"{name}.eager"] = torch.matmul(torch.softmax(scores, -1, dtype=F32).to(dtype), v)
    save("attention", out)


def linear():
    out = {}
    for dtype, kind in ((BF16, "bf16"), (F16, "f16")):
        for tokens, inner, outputs in [
            (1, 512, 512), (2, 512, 512), (4, 512, 1024), (8, 512, 512), (9, 896, 896), (16, 896, 4864),
            (33, 512, 1536), (40, 4864, 896), (100, 896, 128), (150, 1536, 512), (333, 512, 2048), (1, 896, 4864),
            (1, 4864, 896), (1, 3584, 3584), (5, 3584, 512), (30, 3584, 3584), (30, 18944, 3584), (300, 3584, 512),
            (7, 576, 192), (20, 100, 60), (20, 300, 64), (3, 130, 40),
        ]:
            x, w = drawn(7, (tokens, inner), dtype), drawn(8, (outputs, inner), dtype)
            out[f"lin.{kind}.{tokens}.{inner}.{outputs}.bias"] = F.linear(x, w, drawn(9, (outputs,), dtype))
            if outputs <= 2048:
                out[f"lin.{kind}.{tokens}.{inner}.{outputs}.plain"] = F.linear(x, w)
    save("linear", out)


if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    print(ABOUT)
    for part in (digests, tables, reductions, attention, linear):
        part()
        print(part.__name__, "written", flush=True)
