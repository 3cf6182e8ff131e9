"""Every site of a model as vLLM computes it: a recording, or the runner's external arm.

Loads a Hugging Face folder with vLLM's offline engine, hooks its modules, runs the prompt
through the engine's own scheduler and writes a tensor for each site, `[tokens, width]`.

    pip install vllm ./python           # the latter is this project's own package

    python vllm_sites.py --model FOLDER --tokens 1,2,3 --decode 8 --out capture.safetensors
    python vllm_sites.py                      # as a program of [external]: reads request.json

With `--decode N` the engine goes on for N tokens with its KV cache, one step each: the
recording then has the rows of the prompt and of every decoded token but the last, and
`ids` says which tokens they are. With `--batch N` the prompt is the first of N of the same
length, of which the others are drawn; its rows alone are kept. Logits are the engine's own `compute_logits` of one
position of every prompt at a time, as it computes them for each token that it generates; those
that it computed itself in the pass must have the same bits, or nothing is written.

The engine runs in this process, eager, without CUDA graphs and without a prefix cache:
hooks see nothing else.
"""

import argparse
import json
import os
import random
import sys

for key, value in {
    # The engine in this process, where hooks see it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # DeepGEMM for few tokens too: with FlashInfer installed, vLLM takes a kernel of it there,
    # which is not known to the bit.
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(key, value)

try:
    import runner
    import vllm
    from safetensors.torch import load_file, save_file
except ImportError as error:
    sys.exit(f"{error}: pip install vllm, and the runner's own package (./python)")


def main():
    options = read_options()
    if options.model:
        tokens = [int(token) for token in options.tokens.split(",")]
        record(options.model, tokens, options, options.out)
        return
    with open("request.json") as file:
        request = json.load(file)
    record(request["model"], request["tokens"], options, "capture.safetensors")
    kept = load_file("capture.safetensors")
    os.remove("capture.safetensors")
    missing = [site for site in request["sites"] if site not in kept]
    if missing:
        sys.exit(f"vLLM's modules do not make {len(missing)} sites: {', '.join(missing[:5])}")
    save_file({site: kept[site].float() for site in request["sites"]}, "tensors.safetensors")


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a Hugging Face folder; without it request.json says it")
    parser.add_argument("--tokens", help="ids of the prompt, with commas")
    parser.add_argument("--decode", type=int, default=0, help="tokens to go on for")
    parser.add_argument("--batch", type=int, default=1, help="prompts that are computed together")
    parser.add_argument("--out", default="capture.safetensors")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--quantization", help="fp8, fp8_per_channel, fp8_per_block")
    parser.add_argument("--memory", type=float, default=0.9, help="of the GPU, that vLLM may take")
    parser.add_argument("--cache", type=float, help="GiB of the KV cache; else what --memory leaves")
    options = parser.parse_args()
    if options.model and not options.tokens:
        parser.error("--model goes with --tokens")
    if not options.model and (options.decode or options.batch != 1):
        parser.error("--decode and --batch are for recordings: give --model and --tokens")
    if options.batch < 1 or options.decode < 0:
        parser.error("--batch is 1 or more, --decode 0 or more")
    return options


def record(path, tokens, options, out):
    """Captures a prompt and what the engine makes of it."""
    if not os.path.isdir(path):
        sys.exit("give a Hugging Face folder: vLLM's support of GGUF is experimental")
    length = len(tokens) + max(1, options.decode)
    # With a cache of a given size vLLM does not look at the GPU's memory, which engines side by
    # side change under each other.
    cache = {"kv_cache_memory_bytes": int(options.cache * 2**30)} if options.cache else {}
    engine = vllm.LLM(
        model=path,
        skip_tokenizer_init=True,
        dtype=options.dtype,
        quantization=options.quantization,
        max_model_len=length,
        # The whole prompt, and all of them, in one pass.
        max_num_batched_tokens=max(2048, length * options.batch),
        max_num_seqs=options.batch,
        gpu_memory_utilization=options.memory,
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        seed=0,
        **cache,
    )
    asked = vllm.SamplingParams(
        temperature=0.0, max_tokens=max(1, options.decode), ignore_eos=True, detokenize=False
    )
    prompts = [tokens, *others(tokens, options.batch - 1, engine)]
    asked_for = [{"prompt_token_ids": prompt} for prompt in prompts]
    with runner.capture(engine, out, row=0):
        engine.generate(asked_for, asked, use_tqdm=False)


def others(tokens, count, engine):
    """Prompts as long as this one, the same in every call."""
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    dice = random.Random(0)
    return [[dice.randrange(vocabulary) for _ in tokens] for _ in range(count)]


if __name__ == "__main__":
    main()
