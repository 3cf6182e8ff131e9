"""Every operation that PyTorch dispatches, with its operands: what modules do not show.

Quantised codes and scales, fused kernels of an engine: an operand is kept before the call, and once
more after it where the operation writes into it. Kernels that are launched without PyTorch's
dispatcher (most of Triton's) do not show. It knows operations, and no model.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Dict, List, Optional, Sequence, Type

from .._dtypes import FORMATS, torch_values
from .._errors import CaptureError
from .._store import Store

INDEX = "operations"


class Operations:
    """Keeps operations while it is entered, in a safetensors file whose metadata lists them."""

    def __init__(self, path: str, only: Sequence[str]) -> None:
        if "torch" not in sys.modules:
            raise CaptureError('level="operations" sees PyTorch\'s operations: import torch first')
        self.path, self.only = os.fspath(path), tuple(only)
        self.store: Optional[Store] = None
        self.calls: List[Dict[str, Any]] = []
        self.left_out: Dict[str, str] = {}
        self.mode: Any = None

    def __enter__(self) -> "Operations":
        self.store = Store(self.path)
        self.mode = mode_of(self)
        self.mode.__enter__()
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Any, trace: Any) -> None:
        assert self.store is not None
        try:
            self.mode.__exit__(kind, error, trace)
            if kind is None:
                self.end()
        except BaseException:
            self.store.discard()
            raise
        if kind is not None:
            self.store.discard()

    def end(self) -> None:
        assert self.store is not None
        if not self.calls:
            kept = ", ".join(self.only)
            raise CaptureError(f"no operation ran within the capture whose name begins with {kept!r}: nothing was written")
        torch = sys.modules["torch"]
        about = {"torch": f"PyTorch {torch.__version__}", INDEX: json.dumps(self.calls)}
        if torch.cuda.is_available():
            about["gpu"] = torch.cuda.get_device_name()
        self.store.end(about)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Computes an operation, and keeps it if it is wanted."""
        schema = getattr(func, "_schema", None)
        name = schema.name if schema else f"higher_order::{func.name()}"
        if not name.startswith(self.only):
            return func(*args, **kwargs)
        index = len(self.calls)
        names = [argument.name for argument in schema.arguments] if schema else []
        given = {(names[at] if at < len(names) else str(at)): value for at, value in enumerate(args)}
        given.update(kwargs)
        call: Dict[str, Any] = {"name": name, "arguments": {}, "results": [], "written": {}}
        self.calls.append(call)
        for argument, value in given.items():
            call["arguments"][argument] = self.keep(f"{index:05d}.{argument}", value)
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        call["results"] = [self.keep(f"{index:05d}.result{at}", value) for at, value in enumerate(outputs)]
        if schema and schema.is_mutable:
            for argument in schema.arguments:
                value = given.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write and is_tensor(value):
                    call["written"][argument.name] = self.keep(f"{index:05d}.{argument.name}.after", value)
        return result

    def keep(self, key: str, value: Any) -> Any:
        """What the list says of a value: the name of its tensor in the file, or itself."""
        if isinstance(value, (int, float, bool, str, type(None))):
            return value
        if not is_tensor(value):
            return str(value)
        said = {"dtype": str(value.dtype).rpartition(".")[2], "shape": list(value.shape)}
        if said["dtype"] in FORMATS and value.device.type != "meta" and value.numel():
            assert self.store is not None
            values = torch_values(value, key)
            self.store.add(key, values if values.shape else values._replace(shape=(1,)))
            said["tensor"] = key
        return said


def is_tensor(value: Any) -> bool:
    return isinstance(value, sys.modules["torch"].Tensor)


def mode_of(operations: Operations) -> Any:
    """A mode of PyTorch's dispatcher that hands every operation over."""
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        raise CaptureError(f"this PyTorch has no dispatch modes ({error}): 2.0 or newer has") from error

    class Mode(TorchDispatchMode):
        # Without it torchao's int8 product falls back to f32 without a word.
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return operations.call(func, args, kwargs or {})

    return Mode()
