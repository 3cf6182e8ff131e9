#!/usr/bin/env python3
"""Fits the rows of the special function unit and writes src/compute/engine_kernels/sfu_rows.rs.

    fit_special_functions.py TABLES PROBES OUT.rs

TABLES is a safetensors file with `ex2_frac`, `rcp_1_2`, `rsqrt_1_4`, `sqrt_1_4` (deltas to the correctly rounded
result, two bits each) and samples `in.sin`, `out.sin`; PROBES is the folder of scripts/probe_kernels.py, for lg2 and
sin. A row is a value, a slope and a curvature. The slope and the curvature are found by linear programming on the
intervals that the results leave; of the integers around them those are kept that meet every result with a value on
the function's grid. A row that no integers meet, or more than one triple, is an error. Needs NumPy and SciPy.
"""
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scipy.optimize import linprog

# value's shift, curvature's shift, bias, final shift.
SHAPES = {
    "EX2": (13, 0, 0x77E2, 15), "RCP": (13, 0, 0x47E7, 15), "RSQRT": (14, 2, 0x7FFF, 16), "SQRT": (15, 1, 0x7FFF, 17),
    "LG2": (12, 1, 0x3345, 2), "SIN": (11, 0, 0, 0),
}
ABOUT = {
    "EX2": "2^x for x in [0, 1), 64 rows of 2^17 steps of 2^-23",
    "RCP": "1/x for x in [1, 2), 128 rows of 2^16 steps of 2^-23",
    "RSQRT": "1/sqrt(x) for x in [1, 2) and [2, 4), 64 rows each of 2^17 fractions",
    "SQRT": "Sqrt(x) for x in [1, 2) and [2, 4), 64 rows each of 2^17 fractions",
    "LG2": "Log2(x) for x in [1, 2), 64 rows of 2^17 steps of 2^-23",
    "SIN": "The sine of a quarter turn, 64 rows of 2^17 steps of 2^-25 turns",
}


def square(x):
    total = np.zeros_like(x)
    for bit in range(17):
        total += np.where(x >> bit & 1, x >> (18 - bit), 0)
    return total >> 1


def fit(name, x, low, high):
    """The one row whose result lies in [low, high) at every x; x of 17 bits, low and high before the last shift."""
    value_shift, curvature_shift, bias, _ = SHAPES[name]
    curve = square(x << 1 if name == "RCP" else x) << curvature_shift
    matrix = np.stack([np.ones(len(x)), x / 2**17, curve / 2**15], 1)
    start, unit = low.min(), float(2 ** max(int(np.ptp(low)).bit_length() - 10, 0))
    lower, upper = (low - start) / unit, (high - start) / unit
    chosen = np.unique(np.linspace(0, len(x) - 1, 300).astype(int))
    for _ in range(40):
        part, ones = matrix[chosen], np.ones((len(chosen), 1))
        rows = np.block([[part, ones], [-part, ones]])
        bounds = np.r_[upper[chosen], -lower[chosen]]
        found = linprog([0, 0, 0, -1], A_ub=rows, b_ub=bounds, bounds=[(None, None)] * 4, method="highs").x
        slack = np.minimum(upper - matrix @ found[:3], matrix @ found[:3] - lower)
        if slack.min() >= found[3] - 1e-9:
            break
        chosen = np.unique(np.r_[chosen, np.argsort(slack)[:40]])
    slope, curvature = round(found[1] * unit / 2**17), round(found[2] * unit / 2**15)
    rows = []
    for s in range(slope - 2, slope + 3):
        for c in range(curvature - 3, curvature + 4):
            rest = s * x + c * curve + bias
            least, most = (low - rest).max(), (high - rest).min()
            first = -(-least >> value_shift) if least < 0 else (least + (1 << value_shift) - 1) >> value_shift
            rows += [(int(v), s, c) for v in range(int(first), int(first) + 3) if least <= v << value_shift < most]
    if len(rows) != 1:
        sys.exit(f"{name}: {len(rows)} rows meet the results: {rows[:4]}")
    return rows[0]


def deltas(packed):
    return np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).reshape(-1).astype(np.int64) - 2


def mantissa_rows(name, tables):
    """Rows of a function whose whole table is there."""
    delta = deltas(tables[{"EX2": "ex2_frac", "RCP": "rcp_1_2", "RSQRT": "rsqrt_1_4", "SQRT": "sqrt_1_4"}[name]])
    if name == "EX2":
        exact, base = np.exp2(np.arange(len(delta)) / 2**23), 0x3F800000
    else:
        x = (np.arange(len(delta), dtype=np.int64) + 0x3F800000).astype(np.int32).view(np.float32).astype(np.float64)
        exact = {"RCP": 1 / x, "RSQRT": 1 / np.sqrt(x), "SQRT": np.sqrt(x)}[name]
        base = 0x3F800000 if name == "SQRT" else 0x3F000000
    significand = exact.astype(np.float32).view(np.int32).astype(np.int64) + delta - base + (1 << 23)
    size, shift = (1 << 16 if name == "RCP" else 1 << 17), SHAPES[name][3]
    rows = []
    for first in range(0, len(delta), size):
        x = np.arange(size, dtype=np.int64)
        y = significand[first : first + size]
        if name == "RSQRT" and first == 0:
            x, y = x[1:], y[1:]  # 1 / sqrt(1) is 1 by itself
        rows.append(fit(name, x, y << shift, (y + 1) << shift))
    return rows


def table(path):
    """Inputs and results of a stretch that scripts/probe_kernels.py wrote, as bits."""
    raw = zlib.decompress(path.read_bytes())
    end = raw.index(b"\0")
    head, second = json.loads(raw[:end]), np.frombuffer(raw[end + 1 :], np.int8).astype(np.int64)
    second[np.array(head["at"], int)] = head["are"]
    b0, b1 = head["head"]
    first = np.r_[b1 - b0, b1 - b0 + np.cumsum(second)]
    return head["first"] + head["step"] * np.arange(head["count"], dtype=np.int64), np.r_[b0, b0 + np.cumsum(first)]


def grouped_rows(name, index, x, low, high):
    rows = []
    for row in range(64):
        chosen = np.nonzero(index == row)[0]
        if len(chosen) > 60_000:
            chosen = chosen[:: len(chosen) // 60_000]
        rows.append(fit(name, x[chosen], low[chosen], high[chosen]))
    return rows


def fixed_point(bits, point):
    """[low, high) of a magnitude in units of 2^-point that was cut to a float."""
    exponent = (bits >> 23 & 0xFF) - 127
    significand = bits & 0x7FFFFF | 0x800000
    up, down = np.maximum(exponent - 23 + point, 0), np.minimum(np.maximum(23 - point - exponent, 0), 24)
    # A small magnitude was not cut: the float holds more places than the fixed point.
    low = (significand >> down) << up
    return low, low + (1 << up)


def lg2_rows(folder):
    x, y = table(folder / "table.lg2.approx.ftz.f32.z")
    keep = x > 0x3F800000  # of [1/2, 1) the same rows are read; 1 itself is an exception
    x, y = x[keep], y[keep]
    low, high = fixed_point(y, 36)
    fraction = x & 0x7FFFFF
    return grouped_rows("LG2", fraction >> 17, fraction & 0x1FFFF, low << 2, high << 2)


def sin_rows(folder, tables):
    x, y = table(folder / "table.sin.approx.ftz.f32.z")
    x = np.r_[x.astype(np.uint32).view(np.float32), tables["in.sin"]]
    y = np.r_[y, tables["out.sin"].view(np.uint32).astype(np.int64)]
    exact = x.astype(np.float64) * float(np.float32(0.15915494309189535))
    turns = exact.astype(np.float32)
    turns = np.where(np.abs(turns.astype(np.float64)) > np.abs(exact), np.nextafter(turns, np.float32(0)), turns)
    fixed = (np.abs(turns.astype(np.float64)) * 2**25).astype(np.int64)
    within = np.where(fixed >> 23 & 1, ~fixed & 0x7FFFFF, fixed & 0x7FFFFF)
    low, high = fixed_point(y & 0x7FFFFFFF, 37)
    return grouped_rows("SIN", within >> 17, within & 0x1FFFF, low, high)


def main():
    tables, folder, out = load_file(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    text = """//! The rows of the special function unit of an H100 and H200, as
//! `scripts/fit_special_functions.py` writes them.
//!
//! A row is a value, a slope and a curvature in integers; `sfu.rs` says what they
//! are multiplied with. It holds numbers only.

/// Value, slope and curvature at the start of a row.
pub(super) type Row = [i32; 3];
"""
    for name in SHAPES:
        rows = {"LG2": lambda: lg2_rows(folder), "SIN": lambda: sin_rows(folder, tables)}.get(
            name, lambda: mantissa_rows(name, tables)
        )()
        text += f"\n/// {ABOUT[name]}.\n#[rustfmt::skip]\npub(super) static {name}: [Row; {len(rows)}] = [\n"
        for first in range(0, len(rows), 3):
            text += "    " + " ".join(f"[{a}, {b}, {c}]," for a, b, c in rows[first : first + 3]) + "\n"
        text += "];\n"
        print(name, len(rows), "rows", flush=True)
    out.write_text(text)


if __name__ == "__main__":
    main()
