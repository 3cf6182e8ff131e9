#!/usr/bin/env python3
"""Makes src/model/grids.bin: the lookup tables of ggml's IQ formats, as the `gguf` package has them.

    python3 -m venv venv && venv/bin/pip install gguf==0.19.0
    venv/bin/python scripts/make-grids.py

One byte a value, tables one after the other: IQ2_XXS [256, 8], IQ2_XS [512, 8], IQ2_S [1024, 8],
IQ3_XXS [256, 4], IQ3_S [512, 4], IQ1_S [2048, 8] (signed), and the 128 patterns of signs.
"""

import pathlib

import numpy as np
from gguf import quants

TABLES = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"]

data = b""
for name in TABLES:
    kind = getattr(quants, name)
    kind.init_grid()
    grid = np.array(kind.grid, np.float32).reshape(kind.grid_shape)
    assert (grid == np.round(grid)).all()
    print(name, grid.shape)
    data += grid.astype(np.int8 if name == "IQ1_S" else np.uint8).tobytes()
# The eighth sign makes their number even.
signs = [byte | (bin(byte).count("1") % 2) << 7 for byte in range(128)]
assert bytes(signs) == bytes(quants.IQ2_XXS.ksigns)
data += bytes(signs)
pathlib.Path(__file__).parent.parent.joinpath("src/model/grids.bin").write_bytes(data)
print(len(data))
