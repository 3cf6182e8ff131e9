#!/usr/bin/env python3
"""Cuts the hardware vectors and the captures that ship with the project out of the whole sets.

    scripts/cut_fixtures.py VECTORS CAPTURES

VECTORS is the folder of the whole vectors (a safetensors file for each chip, and their LICENCE),
CAPTURES the whole file of captured GEMMs. Needs numpy, safetensors and ml_dtypes. It writes
tests/fixtures/vectors/ and examples/h200-captures/captures.safetensors. Of each chip and format
64 vectors are kept: where the sum cancels most, where the exponents lie furthest apart, where a
subnormal takes part, where the instruction does not return the correctly rounded sum, and some
at random. Of each captured GEMM some rows of x and w are kept with their outputs, which depend
on nothing else.
"""

import json
import math
import pathlib
import shutil
import sys

import ml_dtypes
import numpy
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = 64
TYPES = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2,
         "bf16": ml_dtypes.bfloat16, "fp16": numpy.float16, "tf32": numpy.float32}
# Rows of x and of w that are kept of each case.
ROWS = [(4, 8), (4, 16), (1, 24), (4, 16), (2, 6), (2, 6), (3, 8), (3, 5)]


def values(codes, name):
    if name == "tf32":
        codes = codes & numpy.uint32(0xFFFFE000)
    return codes.view(TYPES[name]).astype(numpy.float64)


def chosen(a, b, c, d, name):
    """The rows to keep, in order."""
    x, w = values(a, name), values(b, name)
    start, result = c.view(numpy.float32).astype(numpy.float64), d.view(numpy.float32)
    # Which of the sets use c is not known here; it counts as one addend.
    addends = numpy.concatenate([x * w, start[:, None]], axis=1)
    size = numpy.abs(addends)
    largest = size.max(axis=1)
    sums = numpy.array([math.fsum(row) if numpy.isfinite(row).all() else math.nan
                        for row in addends])
    with numpy.errstate(all="ignore"):
        left = numpy.where(sums != 0, numpy.abs(sums) / largest, numpy.inf)
        smallest = numpy.where(size > 0, size, numpy.inf).min(axis=1)
        spread = numpy.log2(largest / smallest)
        correct = sums.astype(numpy.float32)
    tiny = float(ml_dtypes.finfo(TYPES[name]).tiny)
    subnormal = ((numpy.abs(x) < tiny) & (x != 0)).any(axis=1)
    subnormal |= ((numpy.abs(w) < tiny) & (w != 0)).any(axis=1)
    subnormal |= (numpy.abs(result) < 2.0**-126) & (result != 0)
    other = correct.view(numpy.uint32) != d
    random = numpy.random.default_rng(20261127).permutation(len(d))
    groups = [
        (10, numpy.argsort(left, kind="stable")),
        (10, numpy.argsort(-numpy.nan_to_num(spread), kind="stable")),
        (10, random[subnormal[random]]),
        (24, random[other[random]]),
        (KEPT, random),
    ]
    kept = {}
    for count, order in groups:
        fresh = [int(row) for row in order if int(row) not in kept]
        kept.update(dict.fromkeys(fresh[:min(count, KEPT - len(kept))]))
    return sorted(kept)


def cut_vectors(source):
    target = ROOT / "tests/fixtures/vectors"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "LICENCE", target / "LICENCE")
    for path in sorted(source.glob("*.safetensors")):
        kept = {}
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            for name in TYPES:
                if f"{name}.d" not in file.keys():
                    continue
                columns = {part: file.get_tensor(f"{name}.{part}") for part in "abcd"}
                rows = chosen(*columns.values(), name)
                kept |= {f"{name}.{part}": column[rows] for part, column in columns.items()}
        metadata["cut"] = f"{KEPT} vectors of each format, chosen by scripts/cut_fixtures.py"
        save_file(kept, target / path.name, metadata)


def cut_captures(source):
    kept = {}
    # The names of NumPy have no bf16; ml_dtypes gives safetensors one.
    with safe_open(source, "np") as file:
        metadata = file.metadata()
        cases = json.loads(metadata["cases"])
        for number, (case, (n, m)) in enumerate(zip(cases, ROWS, strict=True)):
            case[2:4] = [m, n]
            for name in file.keys():
                if not name.startswith(f"c{number}."):
                    continue
                tensor = file.get_tensor(name)
                if name.endswith(".x"):
                    tensor = tensor[:n]
                elif name.endswith(".w"):
                    tensor = tensor[:m]
                elif ".y." in name:
                    tensor = tensor[:n, :m]
                kept[name] = numpy.ascontiguousarray(tensor).reshape(tensor.shape)
        metadata["cases"] = json.dumps(cases)
        metadata["cut"] = "the first rows of x and w of each case, by scripts/cut_fixtures.py"
    save_file(kept, ROOT / "examples/h200-captures/captures.safetensors", metadata)


cut_vectors(pathlib.Path(sys.argv[1]))
cut_captures(pathlib.Path(sys.argv[2]))
