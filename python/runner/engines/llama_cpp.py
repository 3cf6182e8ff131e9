"""llama.cpp's tensors, through llama-cpp-python: each node of its graph when it has been computed.

A context says when it is made who observes it. A capture therefore gives the `Llama` a new context,
with an empty cache; it keeps it afterwards, unobserved, with the tokens that it has computed by then.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from typing import Any, Callable, Collection, Dict, List, Optional, Tuple

from .._dtypes import Values
from .._errors import CaptureError
from .fused import Undo

# What llama.cpp calls a site's tensor. Several nodes may have one name: the last of these
# operations makes the site, a bias that is added after a product among them. Graphs that give a
# product no name are known by its weight.
NAMES: Dict[str, Tuple[str, List[str]]] = {
    "inp_embd": ("embed", ["GET_ROWS"]),
    "attn_norm": ("attn_norm", ["MUL"]),
    "Qcur": ("q", ["MUL_MAT", "ADD"]),
    "Kcur": ("k", ["MUL_MAT", "ADD"]),
    "Vcur": ("v", ["MUL_MAT", "ADD"]),
    "Qcur_normed": ("q_norm", ["MUL"]),
    "Kcur_normed": ("k_norm", ["MUL"]),
    "kqv_out": ("attn", ["CONT"]),
    "attn_out": ("attn_out", ["MUL_MAT"]),
    "ffn_inp": ("attn_residual", ["ADD"]),
    "ffn_norm": ("ffn_norm", ["MUL"]),
    "ffn_gate": ("ffn_gate", ["MUL_MAT"]),
    "ffn_up": ("ffn_up", ["MUL_MAT"]),
    "ffn_swiglu": ("ffn_swiglu", ["SWIGLU"]),
    "ffn_out": ("ffn_down", ["MUL_MAT"]),
    "l_out": ("ffn_residual", ["ADD"]),
    "result_norm": ("output_norm", ["MUL"]),
    "result_output": ("logits", ["MUL_MAT"]),
}
ROTATED = {"Qcur": "q_rope", "Kcur": "k_rope"}
BY_WEIGHT = {"attn_output": "attn_out"}
# A CUDA graph of one node that is observed may be launched for another: with CUDA graphs, what
# llama.cpp computes while it is observed is not what it computes otherwise.
NO_GRAPHS = "GGML_CUDA_DISABLE_GRAPHS"


class Node(ctypes.Structure):
    """The head of a `ggml_tensor`, down to the first of its sources."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    ]


class Observer:
    """Is shown every node of the graph when it has been computed, and copies the sites.

    `keep` gets each site with its rows; `rows` says how many the step has. What goes wrong in it
    is kept in `error`: llama.cpp calls it, and nobody hears an exception there.
    """

    def __init__(self, llama_cpp: Any, keep: Callable[[str, Values], None], wanted: Optional[Collection[str]] = None) -> None:
        self.keep, self.wanted, self.rows, self.ended = keep, wanted, 0, False
        self.error: Optional[BaseException] = None
        self.ggml = ctypes.CDLL(os.path.join(libraries(llama_cpp), "libggml-base.so"))
        for function in ["ggml_get_name", "ggml_op_desc"]:
            self.declare(function, ctypes.c_char_p)
        self.declare("ggml_nbytes", ctypes.c_size_t)
        get = self.ggml.ggml_backend_tensor_get
        get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        # Kept as long as llama.cpp may call it.
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.observe)

    def declare(self, function: str, result: Any) -> None:
        getattr(self.ggml, function).argtypes = [ctypes.c_void_p]
        getattr(self.ggml, function).restype = result

    def observe(self, node: int, ask: bool, _: Any) -> bool:
        if self.ended:
            # Nothing is asked for, so that llama.cpp computes its graph as it does by itself.
            return not ask
        site = self.site_of(node)
        wanted = site is not None and (self.wanted is None or site in self.wanted)
        if wanted and site is not None and not ask and self.error is None:
            size = self.ggml.ggml_nbytes(node)
            data = bytearray(size)
            self.ggml.ggml_backend_tensor_get(node, (ctypes.c_char * size).from_buffer(data), 0, size)
            width = size // 4 // self.rows
            try:
                self.keep(site, Values("F32", (self.rows, width), memoryview(data)))
            except BaseException as error:
                self.error = error
        # When it is asked: whether it wants to see this node.
        return wanted if ask else True

    def tell(self) -> None:
        """Raises what went wrong while llama.cpp computed."""
        if self.error is not None:
            raise self.error

    def site_of(self, node: int) -> Optional[str]:
        name = self.ggml.ggml_get_name(node).decode()
        made_by = self.ggml.ggml_op_desc(node).decode()
        match = re.fullmatch(r"(.*?)(?:-(\d+))?", name)
        name, layer = match.groups() if match else (name, None)
        site, operations = NAMES.get(name, (None, []))
        if made_by == "ROPE":
            site, operations = ROTATED.get(name), ["ROPE"]
        if site is None and made_by == "MUL_MAT":
            return self.by_weight(node)
        if site is None or made_by not in operations:
            return None
        return site if layer is None else f"blk.{layer}.{site}"

    def by_weight(self, node: int) -> Optional[str]:
        weight = ctypes.cast(node, ctypes.POINTER(Node)).contents.src[0]
        name = self.ggml.ggml_get_name(weight).decode() if weight else ""
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        site = found and BY_WEIGHT.get(found[2])
        return f"blk.{found[1]}.{site}" if found and site else None


def libraries(llama_cpp: Any) -> str:
    """The folder of llama.cpp's shared libraries."""
    package = os.path.join(os.path.dirname(llama_cpp.__file__), "lib")
    return os.environ.get("LLAMA_CPP_LIB_PATH", package)


def load_backends(llama_cpp: Any) -> None:
    """A llama.cpp that was built elsewhere may keep its kernels in libraries of their own,
    one for each kind of processor, and looks for them beside the program that started it,
    which is Python. They are where its other libraries are."""
    if "LLAMA_CPP_LIB_PATH" in os.environ:
        ggml = ctypes.CDLL(os.path.join(libraries(llama_cpp), "libggml.so"))
        ggml.ggml_backend_load_all_from_path(os.fsencode(libraries(llama_cpp)))


def is_engine(value: Any) -> bool:
    """Whether it is a `llama_cpp.Llama`."""
    return type(value).__module__.split(".")[0] == "llama_cpp" and hasattr(value, "_ctx")


def attach(llm: Any, recording: Any) -> List[Any]:
    """Gives the `Llama` a context that is observed; what is returned must be removed.

    Raises:
        CaptureError: it would not compute all rows, or not as it does unobserved.
    """
    llama_cpp = sys.modules["llama_cpp"]
    on_gpu = llm.model_params.n_gpu_layers != 0 and bool(llama_cpp.llama_supports_gpu_offload())
    if not llm._logits_all:
        raise CaptureError(
            "this Llama drops the rows of all tokens but the last in its last layer: make it with logits_all=True"
        )
    if on_gpu and os.environ.get(NO_GRAPHS, "0") in ("", "0"):
        raise CaptureError(
            "with CUDA graphs, llama.cpp computes something else while it is observed: start Python with "
            f"{NO_GRAPHS}=1 in the environment"
        )
    if recording.row not in (None, 0):
        raise CaptureError(f"row={recording.row}: a Llama has one prompt")
    if llm.n_tokens:
        raise CaptureError(
            f"{llm.n_tokens} tokens stand in this Llama's cache already, and a capture begins with the prompt: call its "
            "reset() before, or open the capture before the prompt"
        )
    if getattr(llm, "_lora_adapter", None) is not None:
        raise CaptureError("this Llama has a LoRA adapter, which no GGUF file here holds: capture it without, or merge it")
    if getattr(llm._ctx, "observed", False):
        raise CaptureError("this Llama is being captured already: end that capture first")
    observer = Observer(llama_cpp, recording.keep_values, recording.wanted)
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.cb_eval = observer.callback
    params.cb_eval_user_data = None
    own = llm._ctx
    context = type(own)(model=llm._model, params=params, verbose=llm.verbose)
    compute = context.decode

    def decode(batch: Any) -> None:
        rows = batch.batch.n_tokens
        if rows > params.n_ubatch:
            raise CaptureError(
                f"the prompt's {rows} tokens run in parts of {params.n_ubatch}, of which the arithmetic is not known: "
                f"make Llama with n_batch and n_ubatch of {rows} or more"
            )
        ids = [int(batch.batch.token[place]) for place in range(rows)]
        recording.step(ids, rows, int(batch.batch.pos[0]))
        observer.rows = rows
        compute(batch)
        observer.tell()

    context.decode, context.observed, context.observer = decode, True, observer
    llm._ctx = context
    own.close()

    def end() -> None:
        observer.ended, context.observed = True, False
        del context.decode

    recording.about.update(
        {
            "engine": f"llama.cpp by llama-cpp-python {llama_cpp.__version__}",
            "engine_file": "llama-cpp-cuda" if on_gpu else "llama-cpp-cpu",
            "model": os.path.abspath(llm.model_path),
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "cache": str(params.type_k),
            "flash_attn": str(bool(getattr(params, "flash_attn", False))).lower(),
            "device": "cuda" if on_gpu else "cpu",
        }
    )
    return [Undo(end)]
