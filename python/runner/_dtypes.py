"""Number formats by the names that safetensors gives them, and the bytes of anybody's tensor.

Knows tensors of PyTorch, NumPy and `ml_dtypes`, and whatever can be made a NumPy array. It looks
at tensors and never changes one; bytes are those of the tensor itself wherever it is contiguous.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple, Sequence, Tuple

from ._errors import RunnerError

# safetensors' name of a format, by what PyTorch, NumPy or ml_dtypes call it.
FORMATS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
BYTES.update({"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1})


class Values(NamedTuple):
    """A tensor as safetensors holds it: its format, its shape, its bytes in C order."""

    format: str
    shape: Tuple[int, ...]
    data: memoryview


def is_torch(value: Any) -> bool:
    """Whether it is a tensor of PyTorch, without importing PyTorch for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def values_of(tensor: Any, what: str) -> Values:
    """The values of a tensor of PyTorch, NumPy or ml_dtypes; `what` names it in errors."""
    if is_torch(tensor):
        return torch_values(tensor, what)
    return numpy_values(tensor, what)


def torch_values(tensor: Any, what: str) -> Values:
    """A view of a PyTorch tensor's bytes; one that is elsewhere, or in strides, is copied."""
    format = format_of(str(tensor.dtype).rpartition(".")[2], what)
    plain = tensor.detach().cpu().contiguous()
    size = plain.numel() * plain.element_size()
    if size == 0:
        return Values(format, tuple(plain.shape), memoryview(b""))
    # Not by way of NumPy, which knows no bfloat16. The buffer keeps the tensor alive.
    block: Any = (ctypes.c_char * size).from_address(plain.data_ptr())
    block.tensor = plain
    return Values(format, tuple(plain.shape), memoryview(block).cast("B"))


def numpy_values(value: Any, what: str) -> Values:
    """A view of an array's bytes; what is no array yet is made one."""
    try:
        import numpy
    except ImportError as error:
        raise RunnerError(f"{what} is no tensor of PyTorch, and NumPy is not there: {error}") from error
    array = numpy.asarray(value)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    format = format_of(array.dtype.name, what)
    data: Any = numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)
    return Values(format, array.shape, memoryview(data))


def format_of(name: str, what: str) -> str:
    """safetensors' name of a format."""
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise RunnerError(f"{what} holds {name}, which is no format known here: {known}")
    return FORMATS[name]


def text_of(shape: Sequence[int]) -> str:
    """A shape for reading: `[12, 896]`."""
    return f"[{', '.join(map(str, shape))}]"
