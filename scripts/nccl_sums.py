#!/usr/bin/env python3
"""Holds what NCCL's all-reduce over two GPUs returns to the rounded sum, bit by bit.

Random values of many sizes and lengths in bf16, f16 and f32, with NCCL's own choice of algorithm and
with those that can be asked for. Ends with 1 where a bit differs. Needs two GPUs and PyTorch with NCCL.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LENGTHS = (1, 7, 256, 3_584, 65_536, 917_504, 5_000_000)
MODES = ((None, None), ("Ring", "Simple"), ("Ring", "LL"), ("Ring", "LL128"), ("Tree", "Simple"), ("Tree", "LL"))
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def addend(length, rank, dtype):
    generator = torch.Generator().manual_seed(1000 * length + rank)
    size = torch.exp2(torch.randint(-12, 12, (length,), generator=generator).float())
    return (torch.randn(length, generator=generator) * size).to(dtype)


def work(rank, mode, port):
    for name, value in zip(("NCCL_ALGO", "NCCL_PROTO"), mode):
        if value:
            os.environ[name] = value
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    words = " ".join(value for value in mode if value) or "as NCCL chooses"
    found = 0
    for dtype, bits in BITS.items():
        total = differ = 0
        for length in LENGTHS:
            parts = [addend(length, of, dtype) for of in range(2)]
            made = parts[rank].cuda()
            dist.all_reduce(made)
            # Of two f32 or narrower values f32 gives the sum of which a rounding is the rounded sum.
            wanted = (parts[0].float() + parts[1].float()).to(dtype)
            total += length
            differ += int((made.cpu().view(bits) != wanted.view(bits)).sum())
        found += differ
        if rank == 0:
            print(f"{words}: {str(dtype).removeprefix('torch.')}, {differ} of {total:,} sums differ", flush=True)
    dist.destroy_process_group()
    if found:
        sys.exit(1)


if __name__ == "__main__":
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    print(f"{torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} GPUs, NCCL {nccl}, PyTorch {torch.__version__}")
    status = 0
    for number, mode in enumerate(MODES):
        try:
            mp.spawn(work, args=(mode, 29_511 + number), nprocs=2)
        except Exception as problem:
            print(f"{mode}: {str(problem).strip().splitlines()[-1]}", flush=True)
            status = 1
    sys.exit(status)
