"""llama.cpp's tensors through llama-cpp-python: a recording, or the runner's external arm.

    pip install llama-cpp-python==0.3.16

    python llamacpp.py --model FILE.gguf --tokens 1,2,3 --gpu --decode 8 --out capture.safetensors
    python llamacpp.py                        # as a program of [external]: reads request.json

It writes a tensor for each site, f32 [tokens, width]. With `--decode N` the engine goes on for N
tokens with its key/value cache, one step each: the recording then has the rows of the prompt and of
every decoded token but the last, and `ids` says which tokens they are. `--cache f16` is what
llama.cpp keeps by itself; as a program of [external] the cache is f32, so that what is left to
explain is the GEMMs, and the pass runs on the CPU.

The package compiles llama.cpp, which takes minutes. Where a llama.cpp of the same
version is there already, its folder of shared libraries does as well, in
`LLAMA_CPP_LIB_PATH` (listed in the manifest's `env`), and nothing is compiled:

    CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install llama-cpp-python==0.3.16
"""

import argparse
import ctypes
import json
import os
import re
import struct
import sys

# A CUDA graph of one node that is observed may be launched for another: with CUDA graphs, what
# llama.cpp computes while it is observed is not what it computes otherwise.
os.environ.setdefault("GGML_CUDA_DISABLE_GRAPHS", "1")

try:
    import llama_cpp
except ImportError as error:
    sys.exit(f"{error}: pip install llama-cpp-python==0.3.16")

# What llama.cpp calls a site's tensor. Several nodes may have one name: the last of these
# operations makes the site, a bias that is added after a product among them. Graphs that give a
# product no name are known by its weight.
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
BY_WEIGHT = {"attn_output": "attn_out"}
CACHES = {"f32": 0, "f16": 1}


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


def main():
    options = read_options()
    load_backends()
    if options.model:
        tokens = [int(token) for token in options.tokens.split(",")]
        observer = Observer(None)
        tokens = decode(options.model, tokens, observer, options)
        write(options.out, observer.tensors(), tokens)
        return
    with open("request.json") as file:
        request = json.load(file)
    observer = Observer(set(request["sites"]))
    decode(request["model"], request["tokens"], observer, options)
    kept = observer.tensors()
    missing = [site for site in request["sites"] if site not in kept]
    if missing:
        shown = ", ".join(missing[:5])
        sys.exit(f"this llama.cpp's graph has no tensor for {len(missing)} sites: {shown}")
    write("tensors.safetensors", {site: kept[site] for site in request["sites"]})


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a GGUF file; without it, request.json says what to do")
    parser.add_argument("--tokens", help="the prompt's token ids, 1,2,3")
    parser.add_argument("--out", help="the recording to write")
    parser.add_argument("--decode", type=int, default=1, help="how many tokens to generate")
    parser.add_argument("--gpu", action="store_true", help="all layers on the GPU")
    parser.add_argument("--cache", default=None, choices=CACHES, help="f16 where --model stands")
    options = parser.parse_args()
    if options.model and not (options.tokens and options.out):
        parser.error("--model needs --tokens and --out")
    options.cache = options.cache or ("f16" if options.model else "f32")
    return options


def decode(path, tokens, observer, options):
    """One pass over the whole prompt, and a step for each decoded token but the last."""
    llama_cpp.llama_backend_init()
    of_model = llama_cpp.llama_model_default_params()
    of_model.n_gpu_layers = 999 if options.gpu else 0
    nowhere = (ctypes.c_void_p * 1)(None)
    if not options.gpu:
        # Else a library with CUDA gives it products of many rows even so.
        of_model.devices = ctypes.cast(nowhere, ctypes.c_void_p)
    model = llama_cpp.llama_model_load_from_file(path.encode(), of_model)
    if not model:
        sys.exit(f"llama.cpp cannot load {path}; its log says why")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max(64, len(tokens) + options.decode)
    params.n_batch = params.n_ubatch = params.n_ctx
    params.type_k = params.type_v = CACHES[options.cache]
    params.cb_eval = observer.callback
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp cannot make a context; its log says why")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    seen, call = [], list(tokens)
    for _ in range(max(1, options.decode)):
        step(context, call, len(seen), observer)
        seen += call
        logits = llama_cpp.llama_get_logits_ith(context, len(call) - 1)
        call = [max(range(vocabulary), key=lambda token: logits[token])]
    return seen


def step(context, tokens, first, observer):
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = observer.rows = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, first + place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        # Without it the last layer drops the rows of all tokens but the last.
        batch.logits[place] = 1
    status = llama_cpp.llama_decode(context, batch)
    if status != 0:
        sys.exit(f"llama_decode ended with {status}")
    observer.end_step()


class Observer:
    """Is shown every node of the graph when it has been computed, and copies the sites."""

    def __init__(self, wanted):
        # Of each step the sites' rows; `wanted` is None where all are.
        self.wanted, self.rows, self.kept, self.steps = wanted, 0, {}, []
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
        wanted = site is not None and (self.wanted is None or site in self.wanted)
        if wanted and not ask:
            size = self.ggml.ggml_nbytes(node)
            data = ctypes.create_string_buffer(size)
            self.ggml.ggml_backend_tensor_get(node, data, 0, size)
            self.kept[site] = ([self.rows, size // 4 // self.rows], data.raw)
        # When it is asked: whether it wants to see this node.
        return wanted if ask else True

    def end_step(self):
        self.steps.append(self.kept)
        self.kept = {}

    def tensors(self):
        """Every site with its rows of all steps."""
        whole = {}
        for site in self.steps[0]:
            parts = [step[site] for step in self.steps]
            shape = [sum(part[0][0] for part in parts), parts[0][0][1]]
            whole[site] = (shape, b"".join(part[1] for part in parts))
        return whole

    def site_of(self, node):
        name = self.ggml.ggml_get_name(node).decode()
        made_by = self.ggml.ggml_op_desc(node).decode()
        name, layer = re.fullmatch(r"(.*?)(?:-(\d+))?", name).groups()
        site, operations = NAMES.get(name, (None, []))
        if made_by == "ROPE":
            site, operations = ROTATED.get(name), ["ROPE"]
        if site is None and made_by == "MUL_MAT":
            return self.by_weight(node)
        if site is None or made_by not in operations:
            return None
        return site if layer is None else f"blk.{layer}.{site}"

    def by_weight(self, node):
        weight = ctypes.cast(node, ctypes.POINTER(Node)).contents.src[0]
        name = self.ggml.ggml_get_name(weight).decode() if weight else ""
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        site = found and BY_WEIGHT.get(found[2])
        return f"blk.{found[1]}.{site}" if site else None


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


def write(path, tensors, ids=None):
    """A safetensors file of f32 tensors, name to (shape, little-endian bytes), and of token ids."""
    parts = {name: ("F32", *tensor) for name, tensor in tensors.items()}
    if ids is not None:
        parts["ids"] = ("I64", [len(ids)], struct.pack(f"<{len(ids)}q", *ids))
    header, end = {}, 0
    for name, (kind, shape, data) in parts.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in parts.values():
            file.write(data)


main()
