"""Every site of a model as vLLM computes it: a recording, or the runner's external arm.

Loads a Hugging Face folder with vLLM's offline engine, hooks its modules, runs the prompt
through the engine's own scheduler and writes a tensor for each site, `[tokens, width]`.

    pip install vllm

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
    import torch
    import vllm
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f"{error}: pip install vllm")


def main():
    options = read_options()
    if options.model:
        tokens = [int(token) for token in options.tokens.split(",")]
        kept, about = record(options.model, tokens, options)
        save_file(kept, options.out, metadata=about)
        return
    with open("request.json") as file:
        request = json.load(file)
    kept, about = record(request["model"], request["tokens"], options)
    missing = [site for site in request["sites"] if site not in kept]
    if missing:
        sys.exit(f"vLLM's modules do not make {len(missing)} sites: {', '.join(missing[:5])}")
    save_file({site: kept[site].float() for site in request["sites"]}, "tensors.safetensors")
    print(", ".join(about.values()))


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


def record(path, tokens, options):
    """The sites of a prompt and of what the engine makes of it, and what ran."""
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
    (sites,) = engine.apply_model(lambda model: Sites(model, options.batch))
    asked = vllm.SamplingParams(
        temperature=0.0, max_tokens=max(1, options.decode), ignore_eos=True, detokenize=False
    )
    prompts = [tokens, *others(tokens, options.batch - 1, engine)]
    asked_for = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = engine.generate(asked_for, asked, use_tqdm=False)
    decoded = list(answers[0].outputs[0].token_ids)
    sites.end(len(tokens))
    ids = tokens + decoded[: max(1, options.decode) - 1]
    kept = sites.joined(len(ids))
    kept["ids"] = torch.tensor([ids])
    about = {
        "engine": f"vLLM {vllm.__version__}",
        "torch": f"PyTorch {torch.__version__}",
        "gpu": torch.cuda.get_device_name(),
        "arithmetic": options.quantization or options.dtype,
        "batch": str(options.batch),
        "decoded": ",".join(map(str, decoded)),
    }
    return kept, about


def others(tokens, count, engine):
    """Prompts as long as this one, the same in every call."""
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    dice = random.Random(0)
    return [[dice.randrange(vocabulary) for _ in tokens] for _ in range(count)]


class Sites:
    """Keeps what the modules of a llama, qwen2 or qwen3 return, by the site's name."""

    def __init__(self, model, batch):
        self.kept = {}
        self.batch = batch
        self.model = model
        self.ended = False
        inner = getattr(model, "model", None)
        if not hasattr(inner, "layers") or not hasattr(inner.layers[0], "self_attn"):
            sys.exit(f"{type(model).__name__} has no layers with attention as llama's: not known")
        self.hook(inner.embed_tokens, ["embed"])
        for number, layer in enumerate(inner.layers):
            self.hook_layer(layer, number)
        self.hook(inner.norm, ["output_norm", f"blk.{len(inner.layers) - 1}.ffn_residual"])
        self.compute_logits = model.compute_logits
        self.own_logits = []
        model.compute_logits = self.logits

    def hook_layer(self, layer, number):
        block, attention, mlp = f"blk.{number}", layer.self_attn, layer.mlp
        # A norm adds the residual stream itself, and returns the sum beside the norm.
        self.hook(layer.input_layernorm, [f"{block}.attn_norm", f"blk.{number - 1}.ffn_residual"])
        widths = [attention.q_size, attention.kv_size, attention.kv_size]
        self.hook(attention.qkv_proj, [[f"{block}.{name}" for name in "qkv"]], widths)
        for name in ["q_norm", "k_norm"]:
            if hasattr(attention, name):
                self.hook(getattr(attention, name), [f"{block}.{name}"])
        # The rotation's module may be one for all layers; the layer's attention calls it.
        attention.register_forward_pre_hook(lambda *_: setattr(self, "block", block))
        if number == 0 or attention.rotary_emb is not self.rotary:
            self.rotary = attention.rotary_emb
            self.rotary.register_forward_hook(self.rotated)
        self.hook(attention.attn, [f"{block}.attn"])
        self.hook(attention.o_proj, [f"{block}.attn_out"])
        norm = layer.post_attention_layernorm
        self.hook(norm, [f"{block}.ffn_norm", f"{block}.attn_residual"])
        both = [f"{block}.ffn_gate", f"{block}.ffn_up"]
        self.hook(mlp.gate_up_proj, [both])
        self.hook(mlp.act_fn, [f"{block}.ffn_swiglu"])
        self.hook(mlp.down_proj, [f"{block}.ffn_down"])

    def rotated(self, _, __, output):
        for name, tensor in zip(["q_rope", "k_rope"], output):
            self.keep(f"{self.block}.{name}", tensor)

    def hook(self, module, names, widths=None):
        """Keeps a module's outputs; a list among the names are parts of one, side by side."""

        def kept(_, __, output):
            outputs = output if isinstance(output, tuple) else (output,)
            for name, tensor in zip(names, outputs):
                if isinstance(name, list):
                    parts = tensor.split(widths or tensor.shape[-1] // len(name), dim=-1)
                    for part, tensor in zip(name, parts):
                        self.keep(part, tensor)
                else:
                    self.keep(name, tensor)

        module.register_forward_hook(kept)

    def keep(self, name, tensor):
        if self.ended or tensor is None:
            return
        # A copy, at once: kernels go on to write where the tensor stands.
        rows = tensor.detach().reshape(tensor.shape[0], -1)
        self.kept.setdefault(name, []).append(rows.to("cpu", copy=True))

    def logits(self, hidden):
        result = self.compute_logits(hidden)
        if not self.ended:
            self.own_logits.append(result.detach().to("cpu", copy=True))
        return result

    def end(self, prompt):
        """No more is kept; logits of every position follow, one position at a time.

        The engine computes the rows of all prompts below one another: the prompts' first, and
        then one row of each for every decoded token.
        """
        self.ended = True
        steps = self.kept["embed"]
        expected = [prompt] + [1] * (len(steps) - 1)
        if [len(step) for step in steps] != [rows * self.batch for rows in expected]:
            shown = ", ".join(str(len(step)) for step in steps[:5])
            sys.exit(f"the engine did not compute all prompts in each step: it had {shown} rows")
        device = next(self.model.parameters()).device
        normed = [step.reshape(self.batch, -1, step.shape[-1]) for step in self.kept["output_norm"]]
        normed = torch.cat(normed, dim=1).to(device)
        with torch.inference_mode():
            positions = range(normed.shape[1])
            rows = [self.compute_logits(normed[:, at].contiguous()).cpu() for at in positions]
        own = torch.cat(self.own_logits)
        if not torch.equal(own, torch.cat(rows[len(rows) - len(self.own_logits) :])):
            sys.exit("logits of one position differ from those that the engine computed itself")
        self.kept["logits"] = rows

    def joined(self, rows):
        """The first prompt's rows of all steps."""
        kept = {}
        for name, steps in self.kept.items():
            first = [step.reshape(self.batch, step.shape[0] // self.batch, -1)[0] for step in steps]
            # Queries and keys that a norm took head by head have a row for each token again.
            kept[name] = torch.cat(first).reshape(rows, -1).contiguous()
        return kept


if __name__ == "__main__":
    main()
