"""llama.cpp's tensors for the runner's external arm, through llama-cpp-python.

Reads `request.json` in the working folder and writes `tensors.safetensors`: a tensor for
each site, f32 [tokens, width].

    pip install llama-cpp-python==0.3.16

The package compiles llama.cpp, which takes minutes. Where a llama.cpp of the same
version is there already, its folder of shared libraries does as well, in
`LLAMA_CPP_LIB_PATH` (listed in the manifest's `env`), and nothing is compiled:

    CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install llama-cpp-python==0.3.16

The key/value cache is kept in f32, so that what is left to explain is the GEMMs.
"""

import ctypes
import json
import os
import re
import struct
import sys

try:
    import llama_cpp
except ImportError as error:
    sys.exit(f"{error}: pip install llama-cpp-python==0.3.16")

# What llama.cpp calls a site's tensor. Several nodes may have one name: the last of these
# operations makes the site, a bias that is added after a product among them.
NAMES = {
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
F32 = 0


def main():
    with open("request.json") as file:
        request = json.load(file)
    tokens, sites = request["tokens"], request["sites"]
    load_backends()
    observer = Observer(set(sites), len(tokens))
    decode(request["model"], tokens, observer)
    missing = [site for site in sites if site not in observer.kept]
    if missing:
        shown = ", ".join(missing[:5])
        sys.exit(f"this llama.cpp's graph has no tensor for {len(missing)} sites: {shown}")
    write("tensors.safetensors", {site: observer.kept[site] for site in sites})


def decode(path, tokens, observer):
    """One pass over the whole prompt, on the CPU."""
    llama_cpp.llama_backend_init()
    of_model = llama_cpp.llama_model_default_params()
    of_model.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), of_model)
    if not model:
        sys.exit(f"llama.cpp cannot load {path}; its log says why")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(tokens))
    params.type_k = params.type_v = F32
    params.cb_eval = observer.callback
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp cannot make a context; its log says why")
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        # Without it the last layer drops the rows of all tokens but the last.
        batch.logits[place] = 1
    status = llama_cpp.llama_decode(context, batch)
    if status != 0:
        sys.exit(f"llama_decode ended with {status}")


class Observer:
    """Is shown every node of the graph when it has been computed, and copies the sites."""

    def __init__(self, wanted, rows):
        self.wanted, self.rows, self.kept = wanted, rows, {}
        self.ggml = ctypes.CDLL(os.path.join(libraries(), "libggml-base.so"))
        for function in ["ggml_get_name", "ggml_op_desc"]:
            self.declare(function, ctypes.c_char_p)
        self.declare("ggml_nbytes", ctypes.c_size_t)
        get = self.ggml.ggml_backend_tensor_get
        get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        # Kept as long as llama.cpp may call it.
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.observe)

    def declare(self, function, result):
        getattr(self.ggml, function).argtypes = [ctypes.c_void_p]
        getattr(self.ggml, function).restype = result

    def observe(self, node, ask, _):
        site = self.site_of(node)
        if site in self.wanted and not ask:
            size = self.ggml.ggml_nbytes(node)
            data = ctypes.create_string_buffer(size)
            self.ggml.ggml_backend_tensor_get(node, data, 0, size)
            self.kept[site] = ([self.rows, size // 4 // self.rows], data.raw)
        # When it is asked: whether it wants to see this node.
        return site in self.wanted if ask else True

    def site_of(self, node):
        name = self.ggml.ggml_get_name(node).decode()
        made_by = self.ggml.ggml_op_desc(node).decode()
        name, layer = re.fullmatch(r"(.*?)(?:-(\d+))?", name).groups()
        site, operations = NAMES.get(name, (None, []))
        if made_by == "ROPE":
            site, operations = ROTATED.get(name), ["ROPE"]
        if site is None or made_by not in operations:
            return None
        return site if layer is None else f"blk.{layer}.{site}"


def libraries():
    """The folder of llama.cpp's shared libraries."""
    package = os.path.join(os.path.dirname(llama_cpp.__file__), "lib")
    return os.environ.get("LLAMA_CPP_LIB_PATH", package)


def load_backends():
    """A llama.cpp that was built elsewhere may keep its kernels in libraries of their own,
    one for each kind of processor, and looks for them beside the program that started it,
    which is Python. They are where its other libraries are."""
    if "LLAMA_CPP_LIB_PATH" in os.environ:
        ggml = ctypes.CDLL(os.path.join(libraries(), "libggml.so"))
        ggml.ggml_backend_load_all_from_path(os.fsencode(libraries()))


def write(path, tensors):
    """A safetensors file of f32 tensors: name to (shape, little-endian bytes)."""
    header, end = {}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, data in tensors.values():
            file.write(data)


main()
