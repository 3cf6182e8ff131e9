"""vLLM's logits for the runner's external arm: f32 [tokens, vocabulary].

Written after vLLM's documentation of `LLM`, `SamplingParams` and `logprobs_mode`; it was
not run by the runner's authors, who had no GPU with vLLM at hand. It checks what it
relies on and ends with a sentence where that does not hold.

    pip install vllm

The model is a Hugging Face folder. `logprobs_mode="raw_logits"` gives logits in place of
log-probabilities, and -1 the whole vocabulary. Of a prompt, vLLM scores what follows each
token: row i is at place i + 1 of the prompt's scores, and the last row is that of the one
token that is generated.
"""

import argparse
import json
import math
import os
import sys

try:
    import torch
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams
except ImportError as error:
    sys.exit(f"{error}: pip install vllm")


def main():
    options = read_options()
    with open("request.json") as file:
        request = json.load(file)
    if request["sites"] != ["logits"]:
        sys.exit('this adapter gives `logits` alone: write `capture = "logits"` in [forward]')
    if not os.path.isdir(request["model"]):
        sys.exit("give a Hugging Face folder as `model`: vLLM's support of GGUF is experimental")
    tokens = request["tokens"]
    engine = LLM(
        model=request["model"],
        skip_tokenizer_init=True,
        dtype=options.dtype,
        tensor_parallel_size=options.gpus,
        max_model_len=len(tokens) + 1,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        # Kernels as they are written, one pass over the whole prompt, nothing remembered.
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        seed=0,
    )
    asked = SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=-1, prompt_logprobs=-1, detokenize=False
    )
    (answer,) = engine.generate([{"prompt_token_ids": tokens}], asked)
    rows = list(answer.prompt_logprobs[1:]) + [answer.outputs[0].logprobs[0]]
    save_file({"logits": table(rows, len(tokens))}, "tensors.safetensors")


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--gpus", type=int, default=1, help="over which the weights are cut")
    return parser.parse_args()


def table(rows, tokens):
    if len(rows) != tokens:
        sys.exit(f"vLLM scored {len(rows)} of {tokens} tokens: is the prefix cache off?")
    width = len(rows[0])
    logits = torch.full((tokens, width), math.nan)
    for row, scores in zip(logits, rows):
        if sorted(scores) != list(range(width)):
            sys.exit(f"a row has {len(scores)} scores and not one for each of {width} tokens")
        row[list(scores)] = torch.tensor([score.logprob for score in scores.values()])
    # Probabilities sum to one, logits to anything else.
    if logits.double().logsumexp(dim=1).abs().max() < 1e-3:
        sys.exit("this vLLM gives log-probabilities: it needs one that heeds `raw_logits` in prompts")
    return logits


if __name__ == "__main__":
    main()
