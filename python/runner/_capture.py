"""`capture`: hooks on somebody's model while one pass runs, and a file of what it computed."""

from __future__ import annotations

import os
import sys
from typing import Any, Collection, Dict, List, Mapping, Optional, Type

from ._errors import CaptureError
from ._recording import Recording

LEVELS = ("modules", "operations")


class capture:
    """Captures one pass of a model, site by site, in a safetensors file.

    ::

        with runner.capture(model, "run.safetensors"):
            model(input_ids)

    `model` is a PyTorch module (transformers' model classes, or any module with `names`), a
    `vllm.LLM`, SGLang's model runner or `runner.engines.sglang.load(...)`, or a `llama_cpp.Llama`.
    The pass is a prompt and, with a cache, the tokens that follow it; `ids` in the file says which
    they are. Tensors keep the types that they have. They go to disk while the model runs; at most
    `buffer` bytes wait (4 GiB, or a quarter of a GPU's free memory). Nothing that the model
    computes changes.

    Args:
        model: what runs.
        path: the file. Until the pass has ended whole it is called `PATH.partial`.
        names: for modules that are not known, site to module: ``{"blk.*.q": "layers.*.attn.wq"}``;
            ``:input`` after a module is what it reads, ``*`` the layer's number.
        sites: the sites to keep; all by default.
        row: which prompt of a batch is kept. The others must have its length.
        buffer: bytes of copies that may wait for the disk.
        level: `modules`, or `operations` for every operation that PyTorch dispatches, with its
            operands (:func:`runner.operations` reads them).
        only: for `operations`, the beginnings of names that are kept, as ``["aten::mm", "_C::"]``.

    Raises:
        CaptureError: the model is not known, the pass is none that can be captured (several
            prompts, padding, two passes, CUDA graphs, torch.compile), or the disk is full. No
            file is left then.
    """

    def __init__(
        self,
        model: Any,
        path: "str | os.PathLike[str]",
        *,
        names: Optional[Mapping[str, str]] = None,
        sites: Optional[Collection[str]] = None,
        row: Optional[int] = None,
        buffer: Optional[int] = None,
        level: str = "modules",
        only: Collection[str] = ("",),
    ) -> None:
        if level not in LEVELS:
            raise CaptureError(f"level={level!r}: it is {' or '.join(map(repr, LEVELS))}")
        if buffer is not None and (not isinstance(buffer, int) or buffer < 1):
            raise CaptureError(f"buffer={buffer!r}: it is a number of bytes, 1 or more")
        if names is not None and not (isinstance(names, Mapping) and all(isinstance(name, str) for name in names.values())):
            raise CaptureError('names: a dictionary from site to the name of a module, as {"blk.*.q": "layers.*.attn.wq"}')
        if isinstance(sites, str):
            raise CaptureError(f'sites={sites!r}: a list of sites, as ["{sites}"]')
        if level == "operations" and not (names is None and sites is None and row is None):
            raise CaptureError('names, sites and row are for level="modules"; `only` says which operations are kept')
        self.model, self.path = model, place_of(os.fspath(path))
        self.names, self.sites, self.row, self.buffer = names, sites, row, buffer
        self.level, self.only = level, (only,) if isinstance(only, str) else tuple(only)
        self.handles: List[Any] = []
        self.recording: Any = None

    def __enter__(self) -> "capture":
        if self.level == "operations":
            from .engines.operations import Operations

            self.recording = Operations(self.path, self.only)
            self.recording.__enter__()
            return self
        self.recording = Recording(self.path, self.sites, self.row, self.buffer)
        try:
            self.recording.about.update(self.provenance())
            self.handles = attach(self.model, self.recording, self.names)
        except BaseException:
            self.recording.discard()
            raise
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Any, trace: Any) -> None:
        if self.level == "operations":
            self.recording.__exit__(kind, error, trace)
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if kind is not None:
            self.recording.discard()
        else:
            self.recording.end()

    def provenance(self) -> Dict[str, str]:
        """What ran, as far as it is the machine's."""
        from . import __version__

        arguments = [os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]]
        about = {"captured_by": f"runner {__version__}", "arguments": " ".join(arguments)[:2000]}
        torch = sys.modules.get("torch")
        if torch is not None:
            about["torch"] = f"PyTorch {torch.__version__}"
            about["device"] = "cpu"
            if torch.cuda.is_available():
                about["device"] = "cuda"
                about["gpu"] = torch.cuda.get_device_name()
                about["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
                about["cuda"] = str(torch.version.cuda)
        return about

    @property
    def left_out(self) -> Dict[str, str]:
        """Sites that the file lacks, and why; known when the pass has ended."""
        return dict(self.recording.left_out) if self.recording is not None else {}


def place_of(path: str) -> str:
    """Where the file goes: links are followed, and what is no file stays."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise CaptureError(f"{path} is there and is no file: give a path for a new one")
    return path


def attach(model: Any, recording: Recording, names: Optional[Mapping[str, str]]) -> List[Any]:
    """The hooks of whatever the model is."""
    from .engines import llama_cpp, sglang, vllm

    if vllm.is_engine(model):
        return vllm.attach(model, recording)
    if sglang.is_engine(model):
        return sglang.attach(model, recording)
    if llama_cpp.is_engine(model):
        if names is not None:
            raise CaptureError("names are for PyTorch modules; llama.cpp's nodes have names of their own")
        return llama_cpp.attach(model, recording)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise CaptureError(
            f"{type(model).__module__}.{type(model).__qualname__} is nothing that can be captured: give a PyTorch "
            "module, a vllm.LLM, a llama_cpp.Llama, or runner.engines.sglang.load(folder)"
        )
    from .engines import modules

    return modules.attach(model, recording, names, torch)
