"""llama.cpp's tensors through llama-cpp-python: a recording, or the runner's external arm.

    pip install llama-cpp-python==0.3.16 ./python        # the latter is this project's own package

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
import struct
import sys

# A CUDA graph of one node that is observed may be launched for another: with CUDA graphs, what
# llama.cpp computes while it is observed is not what it computes otherwise.
os.environ.setdefault("GGML_CUDA_DISABLE_GRAPHS", "1")

try:
    import llama_cpp
    from runner._dtypes import Values
    from runner._store import Store
    from runner.engines.llama_cpp import Observer, load_backends
except ImportError as error:
    sys.exit(f"{error}: pip install llama-cpp-python==0.3.16, and the runner's own package (./python)")

CACHES = {"f32": 0, "f16": 1}


def main():
    options = read_options()
    load_backends(llama_cpp)
    if options.model:
        store = Store(options.out)
        tokens = [int(token) for token in options.tokens.split(",")]
        tokens = decode(options.model, tokens, Observer(llama_cpp, store.add), options)
        store.add("ids", Values("I64", (len(tokens),), memoryview(struct.pack(f"<{len(tokens)}q", *tokens))))
        store.end({})
        return
    with open("request.json") as file:
        request = json.load(file)
    store = Store("tensors.safetensors")
    decode(request["model"], request["tokens"], Observer(llama_cpp, store.add, set(request["sites"])), options)
    missing = [site for site in request["sites"] if site not in store.tensors]
    if missing:
        store.discard()
        shown = ", ".join(missing[:5])
        sys.exit(f"this llama.cpp's graph has no tensor for {len(missing)} sites: {shown}")
    store.end({})


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
    observer.tell()


main()
