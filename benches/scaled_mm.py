#!/usr/bin/env python3
"""FP8 GEMM rate of the device arm's algorithm against PyTorch's `torch._scaled_mm`.

Usage, on a machine with an NVIDIA GPU and PyTorch: benches/scaled_mm.py path/to/runner

Both are timed on the same GPU, one after the other for each shape, with CUDA events: the
median of 15 products after three that do not count. Prints a table of TFLOP/s and ratios.
"""
import subprocess
import sys

import torch

# (M, N, K): outputs, tokens, inner width.
SHAPES = [(18944, 512, 3584), (3584, 512, 18944), (8192, 8192, 8192)]
REPEATS = 15


def runner_rate(runner, m, n, k, accumulate):
    """TFLOP/s of the algorithm that the device arm picks."""
    command = [runner, "chip", "measure", "--chosen", "--formats", "e4m3", "--output", "bf16", "--shape", f"{n},{m},{k}"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    row = next(line for line in lines if f" {accumulate} " in line)
    # Columns are set apart by two spaces or more; the rate is the sixth.
    return float([cell for cell in row.split("  ") if cell.strip()][5])


def torch_rate(m, n, k, fast):
    """TFLOP/s of `torch._scaled_mm` with one scale per operand."""
    device = torch.device("cuda")
    x = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    w = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    times = []
    for repeat in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return 2.0 * m * n * k / sorted(times)[REPEATS // 2] / 1e12


def main():
    runner = sys.argv[1]
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    print(f"{'(M, N, K)':22} {'accumulate':10} {'runner':>8} {'PyTorch':>8} ratio")
    for m, n, k in SHAPES:
        for accumulate in ["fast", "promoted"]:
            ours = runner_rate(runner, m, n, k, accumulate)
            theirs = torch_rate(m, n, k, accumulate == "fast")
            print(f"{str((m, n, k)):22} {accumulate:10} {ours:8.1f} {theirs:8.1f} {ours / theirs:5.2f}")


if __name__ == "__main__":
    main()
