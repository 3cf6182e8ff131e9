#!/usr/bin/env python3
"""Writes what MMA-Sim (the package `mmasim`, arXiv 2511.10909) says of block-scaled and of AMD's instructions.

    pip install mmasim==2.1.1        # needs PyTorch 2.9 or later
    scripts/mmasim_vectors.py tests/fixtures

mmasim-blocks.safetensors holds for each format: FORMAT.a and FORMAT.b, codes of elements, a byte each, [N, K]; FORMAT.a_scale and
FORMAT.b_scale, codes of the blocks' scales; FORMAT.c and FORMAT.d, f32: row i of d is one instruction's result
for row i of the others. mmasim-amd.safetensors: CHIP.FORMAT.a to .d likewise, a and b being values.
mmasim-fnuz.safetensors: FORMAT_FORMAT.a to .d of CDNA3's FP8, a and b being codes.
"""

import pathlib
import sys

import torch
from mmasim.amd.sim import MFMA
from mmasim.nv_ptx.sim import MMABlockScale
from safetensors.torch import save_file

ROWS = 240
KINDS = {
    "mxfp8": ("e4m3", "m16n8k32.kind::mxf8f6f4.block32.f32.e4m3.e4m3.f32.ue8m0", 32),
    "mxfp8-e5m2": ("e5m2", "m16n8k32.kind::mxf8f6f4.block32.f32.e5m2.e5m2.f32.ue8m0", 32),
    "mxfp6-e2m3": ("e2m3", "m16n8k32.kind::mxf8f6f4.block32.f32.e2m3.e2m3.f32.ue8m0", 32),
    "mxfp6-e3m2": ("e3m2", "m16n8k32.kind::mxf8f6f4.block32.f32.e3m2.e3m2.f32.ue8m0", 32),
    "mxfp4": ("e2m1", "m16n8k64.kind::mxf4.block32.f32.e2m1.e2m1.f32.ue8m0", 32),
    "nvfp4": ("e2m1", "m16n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.f32.ue4m3", 16),
}
AMD = {
    "cdna1.f16": ("CDNA1", "f32_32x32x8f16", torch.float16, 8),
    "cdna1.bf16": ("CDNA1", "f32_32x32x4bf16", torch.bfloat16, 4),
    "cdna2.f16": ("CDNA2", "f32_32x32x8f16", torch.float16, 8),
    "cdna2.bf16": ("CDNA2", "f32_32x32x8bf16_1k", torch.bfloat16, 8),
    "cdna3.f16": ("CDNA3", "f32_32x32x8_f16", torch.float16, 8),
    "cdna3.bf16": ("CDNA3", "f32_32x32x8_bf16", torch.bfloat16, 8),
    "cdna3.tf32": ("CDNA3", "f32_16x16x8_xf32", torch.float32, 8),
}
BITS = {"e4m3": 8, "e5m2": 8, "e2m3": 6, "e3m2": 6, "e2m1": 4}
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def elements(element, width, generator):
    """Codes of finite elements; a third of them zero, and some rows with few that are not."""
    codes = torch.randint(0, 1 << BITS[element], (ROWS, width), generator=generator)
    if element in TYPES:
        values = codes.to(torch.uint8).view(TYPES[element]).float()
        codes[~values.isfinite()] = 1
    zeros = torch.rand((ROWS, width), generator=generator)
    share = torch.where(torch.arange(ROWS) % 5 == 0, 0.95, 0.33)[:, None]
    codes[zeros < share] = 0
    return codes.to(torch.uint8)


def scales(kind, count, generator):
    """Codes of scales: near each other, and far apart; those of NVFP4 with zeros and subnormals."""
    if kind == "nvfp4":
        return torch.randint(0, 0x7F, (ROWS, count), generator=generator).to(torch.uint8)
    spread = torch.where(torch.arange(ROWS) % 2 == 0, 4, 60)[:, None]
    middle = torch.randint(100, 155, (ROWS, 1), generator=generator)
    offsets = torch.rand((ROWS, count), generator=generator)
    return (middle + (offsets * spread).long() - spread // 2).clamp(0, 254).to(torch.uint8)


def operand(element, codes):
    """What MMA-Sim takes: values of 8 bits, codes of 6 bits, pairs of codes of 4 bits."""
    if element in TYPES:
        return codes.view(TYPES[element])
    if element == "e2m1":
        return codes[:, 0::2] << 4 | codes[:, 1::2]
    return codes


def amd(generator):
    """Instructions of AMD's matrix cores on values near each other and far apart, subnormal ones among them."""
    tensors = {}
    for kind, (chip, instruction, dtype, width) in AMD.items():
        spread = torch.where(torch.arange(ROWS) % 2 == 0, 2, 24)[:, None]
        least = {torch.float16: -22, torch.bfloat16: -128, torch.float32: -20}[dtype]
        base = torch.where(torch.arange(ROWS) % 9 == 0, least, 0)[:, None]

        def values():
            size = base + (torch.rand((ROWS, width), generator=generator) - 0.5) * spread
            made = torch.randn((ROWS, width), generator=generator) * torch.exp2(size)
            made[torch.rand((ROWS, width), generator=generator) < 0.1] = 0.0
            made = made.clamp(-60000, 60000).to(dtype)
            # An xf32 operand is one already: how f32 becomes one is not the instruction's business.
            return (made.view(torch.int32) >> 13 << 13).view(dtype) if dtype == torch.float32 else made

        a, b = values(), values()
        c = torch.randn(ROWS, generator=generator)
        c *= torch.exp2((torch.rand(ROWS, generator=generator) - 0.5) * 50 + 2.0 * base[:, 0].clamp(-60, 0))
        c[torch.arange(ROWS) % 7 == 0] = 0.0
        d = MFMA(chip, instruction).dpa(a, b, c.clone())
        parts = {"a": a, "b": b, "c": c, "d": d}
        tensors |= {f"{kind}.{name}": part.contiguous() for name, part in parts.items()}
        print(kind, ROWS, "instructions,", int(d.isfinite().sum()), "finite results")
    return tensors


def fnuz(generator):
    """CDNA3's FP8 instructions, all pairs of its two formats: any codes, near each other and few that are not zero."""
    types = {"e4m3fnuz": (torch.float8_e4m3fnuz, "fp8"), "e5m2fnuz": (torch.float8_e5m2fnuz, "bf8")}
    tensors = {}
    for of_a, (a_type, a_name) in types.items():
        for of_b, (b_type, b_name) in types.items():

            def codes(dtype):
                any_code = torch.randint(0, 256, (ROWS, 32), generator=generator)
                any_code[any_code == 0x80] = 0x81
                near = torch.randn((ROWS, 32), generator=generator).to(dtype).view(torch.uint8).long()
                near[near == 0x80] = 0
                made = torch.where((torch.arange(ROWS) % 3 == 0)[:, None], near, any_code)
                zeros = torch.rand((ROWS, 32), generator=generator)
                share = torch.where(torch.arange(ROWS) % 5 == 0, 0.9, 0.1)[:, None]
                made[zeros < share] = 0
                return made.to(torch.uint8)

            a, b = codes(a_type), codes(b_type)
            c = torch.randn(ROWS, generator=generator)
            c *= torch.exp2((torch.rand(ROWS, generator=generator) - 0.5) * 60)
            c[torch.arange(ROWS) % 7 == 0] = 0.0
            instruction = f"f32_16x16x32_{a_name}_{b_name}"
            d = MFMA("CDNA3", instruction).dpa(a.view(a_type), b.view(b_type), c.clone())
            parts = {"a": a, "b": b, "c": c, "d": d}
            tensors |= {f"{of_a}_{of_b}.{name}": part.contiguous() for name, part in parts.items()}
            print(instruction, ROWS, "instructions,", int(d.isfinite().sum()), "finite results")
    return tensors


def blocks(generator):
    """Instructions with block-scaled operands."""
    tensors = {}
    for kind, (element, instruction, block) in KINDS.items():
        width = 64 if "k64" in instruction else 32
        count = width // block
        a, b = (elements(element, width, generator) for _ in range(2))
        a_scale, b_scale = (scales(kind, count, generator) for _ in range(2))
        # Sums so far of all sizes beside the products: far above, far below, cancelling, none.
        size = torch.randint(-30, 40, (ROWS,), generator=generator).float()
        if kind != "nvfp4":
            size += a_scale[:, 0].float() + b_scale[:, 0].float() - 254
        c = torch.randn(ROWS, generator=generator) * torch.exp2(size.clamp(-120, 120))
        c[torch.arange(ROWS) % 7 == 0] = 0.0
        of_scales = torch.float8_e4m3fn if kind == "nvfp4" else torch.float8_e8m0fnu
        d = MMABlockScale("RTX Blackwell", instruction).dpa(
            operand(element, a),
            operand(element, b),
            c.clone(),
            a_scale.view(of_scales),
            b_scale.view(of_scales),
        )
        parts = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "c": c, "d": d}
        tensors |= {f"{kind}.{name}": part.contiguous() for name, part in parts.items()}
        print(kind, ROWS, "instructions,", int(d.isfinite().sum()), "finite results")
    return tensors


def main(folder):
    made_by = {"made_by": "scripts/mmasim_vectors.py, mmasim 2.1.1, torch " + torch.__version__}
    for name, make, seed in (("blocks", blocks, 20261130), ("amd", amd, 20261201), ("fnuz", fnuz, 20261202)):
        tensors = make(torch.Generator().manual_seed(seed))
        save_file(tensors, pathlib.Path(folder) / f"mmasim-{name}.safetensors", made_by)


if __name__ == "__main__":
    main(sys.argv[1])
