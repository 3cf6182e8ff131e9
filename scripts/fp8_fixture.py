"""Writes tests/fixtures/fp8.json: what ml_dtypes makes of FP8 codes and values.

Run from the repository's root: python3 scripts/fp8_fixture.py
Needs numpy and ml_dtypes. ml_dtypes does not saturate, so values beyond the
largest finite one are left to the unit tests of src/dtype.rs.
"""

import json
import pathlib

import ml_dtypes
import numpy as np

TYPES = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (ml_dtypes.float8_e5m2, 57344.0),
    "e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, 240.0),
    "e5m2fnuz": (ml_dtypes.float8_e5m2fnuz, 57344.0),
}

fixture = {}
for name, (dtype, largest) in TYPES.items():
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    random = np.random.default_rng(1)
    spread = random.standard_normal(1500) * np.exp2(random.integers(-20, 16, 1500))
    finite = values[np.isfinite(values)]
    middles = np.sort(finite)[:-1] / 2 + np.sort(finite)[1:] / 2
    inputs = np.concatenate([spread, middles, np.nextafter(middles, np.float32(0))])
    inputs = np.clip(inputs.astype(np.float32), -largest, largest)
    fixture[name] = {
        "decoded": [int(bits) for bits in values.view(np.uint32)],
        "inputs": [int(bits) for bits in inputs.view(np.uint32)],
        "encoded": [int(code) for code in inputs.astype(dtype).view(np.uint8)],
    }

path = pathlib.Path("tests/fixtures/fp8.json")
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps(fixture, separators=(",", ":")) + "\n")
