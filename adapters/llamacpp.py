"""llama.cpp's logits for the runner's external arm, through llama-cpp-python.

Reads `request.json` in the working folder and writes `tensors.safetensors`:
`logits`, f32 [tokens, vocabulary]. Other sites cannot be had from llama.cpp, and
asking for one is an error.

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
import struct
import sys

import llama_cpp


def main():
    with open("request.json") as file:
        request = json.load(file)
    if request["sites"] != ["logits"]:
        sys.exit("this adapter gives `logits` alone: write `capture = \"logits\"` in [forward]")
    load_backends()
    f32 = llama_cpp.GGML_TYPE_F32 if hasattr(llama_cpp, "GGML_TYPE_F32") else 0
    tokens = request["tokens"]
    model = llama_cpp.Llama(
        model_path=request["model"],
        n_ctx=max(64, len(tokens)),
        n_batch=max(64, len(tokens)),
        logits_all=True,
        type_k=f32,
        type_v=f32,
        n_gpu_layers=0,
        verbose=False,
    )
    model.eval(tokens)
    width = model.n_vocab()
    pointer = llama_cpp.llama_get_logits(model.ctx)
    data = ctypes.string_at(pointer, 4 * width * len(tokens))
    write("tensors.safetensors", {"logits": ([len(tokens), width], data)})


def load_backends():
    """A llama.cpp that was built elsewhere may keep its kernels in libraries of their own,
    one for each kind of processor, and looks for them beside the program that started it,
    which is Python. They are where its other libraries are."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder:
        ggml = ctypes.CDLL(os.path.join(folder, "libggml.so"))
        ggml.ggml_backend_load_all_from_path(os.fsencode(folder))


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
