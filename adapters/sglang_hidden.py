"""SGLang's last hidden state for the runner's external arm: `output_norm`, f32 [tokens, width].

Written after SGLang's documentation of the offline engine and of `return_hidden_states`; it
was not run by the runner's authors, who had no GPU with SGLang at hand. It checks what it
relies on and ends with a sentence where that does not hold.

    pip install "sglang[all]"

The model is a Hugging Face folder. SGLang gives out log-probabilities and no logits; what it
multiplies with the output matrix is the last norm's result, and that is a site. The stage has
`capture = "every-site"`: other sites read as unmeasured, so its contract should name this one.
"""

import argparse
import json
import os
import sys

try:
    import sglang
    import torch
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f'{error}: pip install "sglang[all]"')


def main():
    options = read_options()
    with open("request.json") as file:
        request = json.load(file)
    if "output_norm" not in request["sites"]:
        sys.exit('this adapter gives `output_norm`: write `capture = "every-site"` in [forward]')
    if not os.path.isdir(request["model"]):
        sys.exit("give a Hugging Face folder as `model`")
    tokens = request["tokens"]
    engine = sglang.Engine(
        model_path=request["model"],
        skip_tokenizer_init=True,
        dtype=options.dtype,
        tp_size=options.gpus,
        enable_return_hidden_states=True,
        # Kernels as they are written, one pass over the whole prompt, nothing remembered.
        disable_cuda_graph=True,
        disable_radix_cache=True,
        chunked_prefill_size=-1,
        random_seed=0,
    )
    try:
        answer = engine.generate(
            input_ids=tokens,
            sampling_params={"temperature": 0.0, "max_new_tokens": 1},
            return_hidden_states=True,
        )
    finally:
        engine.shutdown()
    # The first entry is the prompt's, a row for each token; each later one is a new token's.
    # Some versions put a batch of one around it.
    hidden = torch.tensor(answer["meta_info"]["hidden_states"][0], dtype=torch.float32)
    hidden = hidden.squeeze(0) if hidden.dim() == 3 else hidden
    if hidden.dim() != 2 or hidden.shape[0] != len(tokens):
        sys.exit(f"SGLang gave hidden states of the shape {list(hidden.shape)}, not one per token")
    save_file({"output_norm": hidden}, "tensors.safetensors")


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--gpus", type=int, default=1, help="over which the weights are cut")
    return parser.parse_args()


# SGLang starts processes that import this file again.
if __name__ == "__main__":
    main()
