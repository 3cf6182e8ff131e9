#!/usr/bin/env python3
"""Holds `runner.matmul` to the package mmaemu, bit by bit, and their times beside each other.

    pip install mmaemu==0.1.0 ./python       # mmaemu needs PyTorch 2.6 or later
    scripts/mmaemu_compare.py

Both say what an H100's tensor cores return for FP8 operands, the accumulator before any scale. mmaemu computes on one
CPU here, in torch, as `runner` does on the same cores; where this machine has a GPU, its CUDA kernels are
timed too (`runner chip measure --emulation` has ours). Ends with 1 if a bit differs.
"""

import sys
import time
import warnings

import mmaemu
import runner
import torch

SHAPES = [(16, 128, 512), (33, 96, 1920), (64, 256, 1024), (8, 512, 4096)]
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def operand(rows, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-4, 4, (rows, width), generator=generator).float())
    return (torch.randn(rows, width, generator=generator) * spread).to(dtype)


def main():
    warnings.simplefilter("ignore")
    print(f"mmaemu {mmaemu.__version__}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    values = differ = 0
    theirs = ours = 0.0
    for number, (n, m, k) in enumerate(SHAPES):
        for x_type in FORMATS:
            for w_type in FORMATS:
                x, w = operand(n, k, x_type, 2 * number), operand(m, k, w_type, 2 * number + 1)
                for fast in (True, False):
                    start = time.perf_counter()
                    expected = mmaemu.accumulate(x, w, use_fast_accum=fast, splitk=1, backend="reference")
                    middle = time.perf_counter()
                    made = runner.matmul(x, w, accumulate="fast" if fast else "promoted")
                    theirs += middle - start
                    ours += time.perf_counter() - middle
                    values += expected.numel()
                    differ += int((made.view(torch.int32) != expected.view(torch.int32)).sum())
    print(f"{differ} of {values:,} accumulators differ")
    print(f"mmaemu {theirs:.1f} s, runner {ours:.1f} s with files and processes: {theirs / ours:.0f} times as long")
    # A product in which starting a process weighs little.
    x, w = operand(64, 4096, FORMATS[0], 101), operand(512, 4096, FORMATS[0], 102)
    times = []
    for compute in (
        lambda: mmaemu.accumulate(x, w, use_fast_accum=True, splitk=1, backend="reference"),
        lambda: runner.matmul(x, w, accumulate="fast"),
    ):
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    print(f"64 x 512 x 4096: mmaemu {times[0]:.2f} s, runner {times[1]:.2f} s: {times[0] / times[1]:.0f} times as long")
    if torch.cuda.is_available():
        x, w = (operand(4096, 4096, FORMATS[0], seed).cuda() for seed in (103, 104))
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            mmaemu.accumulate(x, w, use_fast_accum=True, splitk=1)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        rate = 4096**3 / seconds / 1e12
        print(f"mmaemu on {torch.cuda.get_device_name(0)}, 4096 x 4096 x 4096: {rate:.2f} T multiply-adds a second")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
