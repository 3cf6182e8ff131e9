"""`matmul`: a product as a chip's tensor cores compute it, bit for bit, on the CPU."""

from __future__ import annotations

import os
import tempfile
from typing import Any, List, Optional

from ._compare import option_is_number, roomy
from ._dtypes import Values, is_torch, values_of
from ._errors import RunnerError
from ._program import ask
from ._store import read_header, write

OUTPUTS = ("f32", "bf16", "f16")
ACCUMULATIONS = ("promoted", "fast")


def matmul(
    x: Any,
    w: Any,
    *,
    chip: str = "hopper",
    format: Optional[str] = None,
    scale_x: Any = None,
    scale_w: Any = None,
    scales_x: Any = None,
    scales_w: Any = None,
    accumulate: str = "promoted",
    split_k: int = 1,
    output: str = "f32",
) -> Any:
    """What a chip returns for y = x w^T, in every bit; no GPU takes part.

    ::

        y = runner.matmul(x, w, chip="hopper", format="e4m3", output="bf16")
        y = runner.matmul(x, w, chip="blackwell", format="nvfp4")
        y = runner.matmul(codes, w_codes, chip="blackwell", format="nvfp4", scales_x=sx, scales_w=sw)

    Args:
        x: [N, K], of PyTorch, NumPy or ml_dtypes.
        w: [M, K], likewise.
        chip: whose arithmetic; ``runner chip list`` says what it rests on.
        format: what both are multiplied in: ``f32``, ``tf32``, ``bf16``, ``f16``, ``e4m3``, ``e5m2``,
            ``e4m3fnuz``, ``e5m2fnuz``, ``int8``,
            ``mxfp8``, ``mxfp8-e5m2``, ``mxfp6-e2m3``, ``mxfp6-e3m2``, ``mxfp4`` or ``nvfp4``; f32
            values are converted, and `uint8` holds codes. By default the tensors' own.
        scale_x, scale_w: the scale of a whole operand, a number. Of values that are converted to FP8 or int8 it is
            absmax / largest by default, of codes 1.
        scales_x, scales_w: FP8 and int8: a scale for each row, f32 [rows]. Block-scaled codes: the codes of the
            blocks' scales, `uint8` [rows, K / block]; codes of 4 bits stand two in a byte, the first in the lower half.
        accumulate: ``promoted``: FP8 sums go to f32 every 128 elements of K; ``fast``: the tensor core's
            accumulator carries all along K, as it does for every other format.
        split_k: parts that K is cut into, as cuBLASLt deals them out.
        output: the type of y: ``f32``, ``bf16`` or ``f16``.

    Returns:
        y, [N, M]: a tensor of PyTorch of that type where x is one, else a NumPy array, of f32 where NumPy
        has no bf16.

    Raises:
        RunnerError: the chip does not multiply these formats, or shapes, scales or names do not fit.
    """
    if accumulate not in ACCUMULATIONS:
        raise RunnerError(f"accumulate={accumulate!r}: it is one of {', '.join(ACCUMULATIONS)}")
    if output not in OUTPUTS:
        raise RunnerError(f"output={output!r}: it is one of {', '.join(OUTPUTS)}")
    held = {"x": values_of(x, "x"), "w": values_of(w, "w")}
    options: List[str] = ["--chip", chip, "--output", output, "--split-k", str(split_k)]
    with tempfile.TemporaryDirectory(dir=roomy(held)) as folder:
        path = os.path.join(folder, "operands.safetensors")
        for name, scale, scales in (("x", scale_x, scales_x), ("w", scale_w, scales_w)):
            if format is not None:
                options += [f"--{name}-format", format]
            if scale is not None:
                if not (isinstance(scale, (int, float)) or option_is_number(scale)):
                    raise RunnerError(f"scale_{name} is one number; scales_{name} takes one for each row or block")
                options += [f"--{name}-scale={float(scale)!r}"]
            if scales is not None:
                held[f"scales_{name}"] = values_of(scales, f"scales_{name}")
                options += [f"--{name}-scales", f"{path}:scales_{name}"]
        if accumulate == "fast":
            options.append("--fast")
        write(path, held)
        made = os.path.join(folder, "y.safetensors")
        try:
            ask(["chip", "multiply", f"{path}:x", f"{path}:w", *options, "--save", made])
        except RunnerError as error:
            raise RunnerError(str(error).replace(f"{path}:", "").replace(path, "the operands")) from None
        return as_type(read(made), output, is_torch(x))


def read(path: str) -> Values:
    """The one tensor of a file."""
    header, start = read_header(path)
    part = header["y"]
    first, end = part["data_offsets"]
    with open(path, "rb") as file:
        file.seek(start + first)
        data = bytearray(file.read(end - first))
    return Values(part["dtype"], tuple(part["shape"]), memoryview(data))


def as_type(y: Values, output: str, torch_wanted: bool) -> Any:
    """f32 values as a tensor of the type that they were rounded to."""
    if torch_wanted:
        import torch

        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[output]
        return torch.frombuffer(y.data, dtype=torch.float32).reshape(y.shape).to(dtype)
    try:
        import numpy
    except ImportError as error:
        raise RunnerError(f"y is to be a NumPy array, and NumPy is not there: {error}") from error
    array = numpy.frombuffer(y.data, dtype=numpy.float32).reshape(y.shape)
    return array.astype(numpy.float16) if output == "f16" else array
