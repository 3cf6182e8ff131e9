"""`compare`: one product, one norm, or two tensors, judged in one call."""

from __future__ import annotations

import html
import json
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ._dtypes import Values, text_of, values_of
from ._errors import RunnerError
from ._program import ask
from ._store import read_header, write

# The tensors of each operation, in order, as the command names them.
OPERANDS = {
    "same": ("a", "b"),
    "matmul": ("x", "w", "y"),
    "norm": ("x", "weight", "y"),
    "rope": ("x", "y"),
    "attention": ("q", "k", "v", "y"),
    "swiglu": ("gate", "up", "y"),
    "softmax": ("x", "y"),
}
GOOD = ("to-the-bit", "within-rounding")


@dataclass(frozen=True)
class Comparison:
    """The answer: `to-the-bit`, `within-rounding` or `wrong`, with what it is.

    `sentence` says it in words; `differing` of `values` are not the values that they should be; `schedule` is the known schedule whose bits these are,
    or how b follows from a; `causes`
    are what a wrong result looks like, the likeliest first; `z` is the error beside what rounding
    leaves (1 is expected, or less); `answers` holds all that the command says, as JSON.
    """

    answer: str
    sentence: str
    schedule: Optional[str]
    causes: Tuple[str, ...]
    z: Optional[float]
    differing: int
    values: int
    operands: Tuple[str, ...]
    remarks: Tuple[str, ...]
    answers: Mapping[str, Any] = field(repr=False)

    def __bool__(self) -> bool:
        """Whether nothing is wrong."""
        return self.answer in GOOD

    def __str__(self) -> str:
        return "\n".join([self.sentence, *self.remarks])

    def _repr_html_(self) -> str:
        colour = "#1a7f37" if self.answer == "to-the-bit" else "#0b5cad" if self else "#b42318"
        facts = [
            ("values", f"{self.values:,}"),
            ("differing", f"{self.differing:,}"),
            ("z", "" if self.z is None else f"{self.z:.4g}"),
            ("schedule", self.schedule or ""),
            ("operands", "; ".join(self.operands)),
            ("causes", "; ".join(self.causes)),
        ]
        rows = "".join(
            f"<tr><td style='text-align:left'><b>{name}</b></td><td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in facts
            if value
        )
        remarks = "".join(f"<p><small>{html.escape(remark)}</small></p>" for remark in self.remarks)
        return f"<div><p style='color:{colour}'>{html.escape(self.sentence)}</p><table>{rows}</table>{remarks}</div>"


def compare(*tensors: Any, op: Optional[str] = None, **options: Any) -> Comparison:
    """Judges one operation from its operands and its result.

    ::

        runner.compare(x, w, y)                          # y = x w^T: whose arithmetic is it?
        runner.compare(x, w, y, scale_x=sx, scale_w=sw)  # FP8, with scales of any block
        runner.compare(x, weight, y, op="norm", eps=1e-6)
        runner.compare(a, b)                             # two tensors that should be the same

    Args:
        tensors: tensors of PyTorch, NumPy or ml_dtypes, in the operation's order. `matmul`: x
            [N, K], w [M, K], y [N, M], and leading dimensions are batches; `norm`: x, weight, y;
            `rope`: x, y; `attention`: q, k, v, y; `swiglu`: gate, up, y; `softmax`: x, y; `same`:
            a, b.
        op: the operation; by default `same` for two tensors and `matmul` for three.
        options: those of ``runner judge``, a `-` being a `_`: `bias`, `alpha`, `scale_x`, `scale_w`,
            `dtype_x`, `output`, `chip`, `transposed_w=True`, `eps`, `theta`, `heads`, ... A
            tensor may stand where a number may.

    Returns:
        The answer; it is true unless something is wrong.

    Raises:
        RunnerError: shapes, formats or options do not fit; the text says which.
    """
    op = op or {2: "same", 3: "matmul"}.get(len(tensors), "")
    if op not in OPERANDS:
        known = "; ".join(f"{name}: {', '.join(operands)}" for name, operands in OPERANDS.items())
        raise RunnerError(f"op={op!r} with {len(tensors)} tensors: say which operation it is. {known}")
    names = OPERANDS[op]
    if len(tensors) != len(names):
        raise RunnerError(f"op={op!r} takes {len(names)} tensors ({', '.join(names)}), and {len(tensors)} are given")
    held = {name: values_of(tensor, name) for name, tensor in zip(names, tensors)}
    with tempfile.TemporaryDirectory(dir=roomy(held)) as folder:
        path = os.path.join(folder, "operands.safetensors")
        said_as: Dict[str, Any] = {}
        for key, value in options.items():
            if value is None or isinstance(value, (bool, int, float, str)):
                said_as[key] = value
            elif option_is_number(value):
                said_as[key] = float(value)
            else:
                held[key] = values_of(value, key)
                said_as[key] = f"{path}:{key}"
        write(path, held)
        places = [f"{path}:{name}" for name in names]
        try:
            printed = judged(op, places, said_as)
        except RunnerError as error:
            raise RunnerError(str(error).replace(f"{path}:", "").replace(path, "the operands")) from None
        return comparison_of(json.loads(printed.replace(f"{path}:", "")))


def option_is_number(value: Any) -> bool:
    """Whether an option is a tensor of one value, which is then a number."""
    count = getattr(value, "numel", None) or getattr(value, "size", None)
    return (count() if callable(count) else count) == 1


def roomy(held: Mapping[str, Values]) -> Optional[str]:
    """Memory for the operands, where this machine has a folder of it with room; else the usual place."""
    size = sum(len(values.data) for values in held.values())
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return None
    return "/dev/shm" if room.f_bavail * room.f_frsize > 2 * size + (1 << 26) and os.access("/dev/shm", os.W_OK) else None


def comparison_of(said: Mapping[str, Any]) -> Comparison:
    """The answer from what the command says; of several results the worst stands for all."""
    order = {"wrong": 0, "within-rounding": 1, "to-the-bit": 2}
    worst = min(said["judgements"], key=lambda judgement: order.get(judgement["answer"], 0))
    bits = worst.get("bits") or {}
    z = (worst.get("z") or {}).get("rms")
    return Comparison(
        answer=said["answer"],
        sentence=worst["sentence"],
        schedule=bits.get("schedule") or worst.get("relation"),
        causes=tuple(f"{cause['cause']}: {cause['detail']}" for cause in worst.get("causes", [])),
        z=None if z is None else float(z),
        # The command counts against the exact result, from which the bits of a schedule may differ.
        differing=0 if worst["answer"] == "to-the-bit" else int((worst.get("steps") or {}).get("differ", 0)),
        values=int(worst["values"]),
        operands=tuple(said["operands"]),
        remarks=tuple(said["remarks"]),
        answers=said,
    )


@dataclass(frozen=True)
class Operation:
    """One operation of a capture of `level="operations"`, with where its tensors lie."""

    index: int
    name: str
    arguments: Mapping[str, Any]
    results: Tuple[Any, ...]
    written: Mapping[str, Any]
    path: str = field(repr=False)

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            return f"{value['dtype']}{text_of(value['shape'])}" if isinstance(value, dict) else repr(value)

        inputs = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        return f"{self.index:5} {self.name}({inputs}) -> {', '.join(map(shown, self.results))}"

    def compare(self, **options: Any) -> Comparison:
        """Judges the operation: a product, or a norm, of PyTorch, vLLM or SGLang.

        Raises:
            RunnerError: it is none that is known here; call :func:`compare` with its tensors.
        """
        roles = ROLES.get(self.name)
        if roles is None:
            raise RunnerError(
                f"{self.name} is no product or norm that is known here ({', '.join(sorted(ROLES))}): give its tensors "
                f"to runner.compare; they lie in {self.path} under {self.index:05d}."
            )
        op, names, extra = roles
        if self.arguments.get("beta", 1) != 1:
            raise RunnerError(f"{self.name} adds {self.arguments['beta']} times its first operand: judge it by hand")
        asked: Dict[str, Any] = {}
        places = [f"{self.path}:{self.tensor(name)['tensor']}" for name in names]
        with tempfile.TemporaryDirectory() as folder:
            for option, source in extra.items():
                value = True if source is True else self.arguments.get(source)
                if option == "alpha" and value == 1 or value is None:
                    continue
                if isinstance(value, dict):
                    value = self.option(option, value, extra, folder)
                asked[option] = value
            return comparison_of(json.loads(judged(op, places, {**asked, **options})))

    def tensor(self, name: str) -> Mapping[str, Any]:
        """A result, or an argument: as it was left, where the operation wrote into it."""
        value = self.written.get(name) or self.arguments.get(name)
        if value is None and name == "result" and self.results:
            value = self.results[0]
        if not isinstance(value, dict) or "tensor" not in value:
            raise RunnerError(f"{self.name} of {self.path} has no tensor `{name}`: it was not kept")
        return value

    def option(self, option: str, value: Mapping[str, Any], extra: Mapping[str, Any], folder: str) -> str:
        """Where an option's tensor lies. A scale for each output of a weight that is stored as [K, M] is a row."""
        count = 1
        for width in value["shape"]:
            count *= width
        if option != "scale_w" or "transposed_w" not in extra or count == 1 or value["shape"] == [1, count]:
            return f"{self.path}:{value['tensor']}"
        header, start = read_header(self.path)
        part = header[value["tensor"]]
        with open(self.path, "rb") as file:
            file.seek(start + part["data_offsets"][0])
            data = memoryview(file.read(part["data_offsets"][1] - part["data_offsets"][0]))
        path = os.path.join(folder, f"{option}.safetensors")
        write(path, {option: Values(part["dtype"], (1, count), data)})
        return f"{path}:{option}"


# Of each operation: what it computes, its operands in order, and the options that others are.
Roles = Tuple[str, Tuple[str, ...], Dict[str, Any]]
ROLES: Dict[str, Roles] = {
    "aten::mm": ("matmul", ("self", "mat2", "result"), {"transposed_w": True}),
    "aten::bmm": ("matmul", ("self", "mat2", "result"), {"transposed_w": True}),
    "aten::addmm": ("matmul", ("mat1", "mat2", "result"), {"transposed_w": True, "bias": "self", "alpha": "alpha"}),
    "aten::linear": ("matmul", ("input", "weight", "result"), {"bias": "bias"}),
    "aten::_scaled_mm": (
        "matmul",
        ("self", "mat2", "result"),
        {"transposed_w": True, "scale_x": "scale_a", "scale_w": "scale_b", "bias": "bias"},
    ),
    "_C::cutlass_scaled_mm": (
        "matmul",
        ("a", "b", "out"),
        {"transposed_w": True, "scale_x": "a_scales", "scale_w": "b_scales", "bias": "bias"},
    ),
    "sgl_kernel::fp8_scaled_mm": (
        "matmul",
        ("mat_a", "mat_b", "result"),
        {"transposed_w": True, "scale_x": "scales_a", "scale_w": "scales_b", "bias": "bias"},
    ),
    "vllm::fp8_gemm_nt_op": (
        "matmul",
        ("q_input", "weight", "output"),
        {"scale_x": "input_scale", "scale_w": "weight_scale"},
    ),
    "_C::rms_norm": ("norm", ("input", "weight", "result"), {"eps": "epsilon"}),
    # What it leaves: the sum in the place of the residual, its norm in the place of the input.
    "_C::fused_add_rms_norm": ("norm", ("residual", "weight", "input"), {"eps": "epsilon"}),
}


def judged(op: str, places: List[str], options: Mapping[str, Any]) -> str:
    """What the command says of an operation, as JSON; an option that is true is a flag."""
    arguments: List[str] = ["--op", op]
    for key, value in options.items():
        if value is not None and value is not False:
            flag = f"--{key.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, str(value)]
    return ask(["judge", *places, *arguments, "--format", "json"]).stdout


def operations(path: "str | os.PathLike[str]") -> List[Operation]:
    """The operations of a capture of ``level="operations"``, in the order in which they ran.

    Raises:
        CaptureError: the file cannot be read.
        RunnerError: it is a capture of modules, or of something else.
    """
    path = os.path.abspath(os.fspath(path))
    header, _ = read_header(path)
    listed = (header.get("__metadata__") or {}).get("operations")
    if listed is None:
        raise RunnerError(f'{path} lists no operations: capture them with level="operations"')
    try:
        calls = json.loads(listed)
        return [operation_of(index, call, path) for index, call in enumerate(calls)]
    except (ValueError, KeyError, TypeError) as error:
        raise RunnerError(f"{path}: its list of operations is damaged ({error}): capture them again") from error


def operation_of(index: int, call: Mapping[str, Any], path: str) -> Operation:
    return Operation(index, call["name"], call["arguments"], tuple(call["results"]), call["written"], path)
