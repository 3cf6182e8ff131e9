"""Decodes greedily five times: argv is MODEL PROMPT STOP...; the text goes to text.txt.

Texts that differ from each other end with status 1: an engine that does not repeat
itself has no golden output. A text ends at the model's end of text, at any STOP,
and after 64 tokens, whichever comes first.
"""

import ctypes
import os
import sys

import llama_cpp


def main(path, prompt, stops):
    load_backends()
    model = llama_cpp.Llama(model_path=path, n_ctx=256, seed=1, n_gpu_layers=0, verbose=False)
    texts = []
    for _ in range(5):
        model.reset()
        made = model.create_completion(prompt, max_tokens=64, temperature=0.0, stop=stops)
        texts.append(made["choices"][0]["text"])
        print(f"finished by {made['choices'][0]['finish_reason']}")
    with open("text.txt", "w") as file:
        file.write(texts[0])
    different = sum(text != texts[0] for text in texts)
    print(f"{different} of 5 texts differ")
    sys.exit(1 if different else 0)


def load_backends():
    """Kernels in libraries of their own are beside the llama.cpp that was built elsewhere."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder:
        ggml = ctypes.CDLL(os.path.join(folder, "libggml.so"))
        ggml.ggml_backend_load_all_from_path(os.fsencode(folder))


main(sys.argv[1], sys.argv[2], sys.argv[3:])
