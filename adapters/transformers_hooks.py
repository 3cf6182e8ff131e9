"""Every site of a model as PyTorch computes it: a recording, or the runner's external arm.

Loads the model with transformers, hooks its modules, runs the prompt and writes a tensor for
each site, `[tokens, width]`.

    pip install torch "transformers>=4.56" accelerate gguf

    python transformers_hooks.py --model FOLDER --tokens 1,2,3 --device cuda --dtype bfloat16 \\
        --attention sdpa --decode 8 --out capture.safetensors
    python transformers_hooks.py              # as a program of [external]: reads request.json

The model is a GGUF file, which transformers dequantises, or a Hugging Face folder. With
`--decode N` the model goes on for N tokens with its KV cache, one step each: the recording then
has the rows of the prompt and of every decoded token but the last, and `ids` says which tokens
they are. With `--batch N` the prompt is the first of N of the same length, of which the others
are drawn; its rows alone are kept.

As a program it writes `tensors.safetensors`, in f32. Its options then stand in the manifest's
`argv`, so that they are part of the result's key: a device that was found by itself would not be.
"""

import argparse
import json
import os
import random
import sys

try:
    import torch
    import transformers
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f'{error}: pip install torch "transformers>=4.56" accelerate gguf')

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main():
    options = read_options()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here; list what it needs in `env`, or use cpu")
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    if options.model:
        record(options)
        return
    with open("request.json") as file:
        request = json.load(file)
    model = load(request["model"], options)
    hooks = Hooks(model, set(request["sites"]), request["parameters"]["rope"]["layout"])
    tokens = torch.tensor([request["tokens"]], device=options.device)
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    save_file(hooks.tensors(request["sites"]), "tensors.safetensors")
    print(", ".join(about(options).values()))


def record(options):
    """Writes the recording of a prompt, of what the model makes of it, and of which tokens."""
    tokens = read_tokens(options.tokens)
    model = load(options.model, options)
    beyond = [token for token in tokens if not 0 <= token < model.config.vocab_size]
    if beyond:
        known = model.config.vocab_size
        sys.exit(f"--tokens: {beyond[0]} is no token of this model, whose vocabulary has {known}")
    hooks = Hooks(model, None, "halves")
    prompts = [tokens, *others(tokens, options.batch - 1, model.config.vocab_size)]
    ids = list(tokens)
    tokens = torch.tensor(prompts, device=options.device)
    cache = None
    parts = []
    with torch.inference_mode():
        for step in range(max(1, options.decode)):
            if step > 0:
                ids.append(int(tokens[0]))
            result = model(input_ids=tokens, past_key_values=cache, use_cache=options.decode > 0)
            cache = result.past_key_values
            tokens = result.logits[:, -1:].argmax(-1)
            parts.append(hooks.kept)
            hooks.kept = {}
    kept = {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
    kept["ids"] = torch.tensor([ids])
    metadata = about(options) | {"batch": str(options.batch)}
    save_file(kept, options.out, metadata=metadata)
    print(f"{options.out}: {len(kept) - 1} sites of {len(ids)} tokens, {', '.join(metadata.values())}")


def read_tokens(text):
    try:
        return [int(token) for token in text.split(",")]
    except ValueError as error:
        sys.exit(f"--tokens {text}: ids with commas, please: {error}")


def others(tokens, count, vocabulary):
    """Prompts as long as this one, the same in every call."""
    dice = random.Random(0)
    return [[dice.randrange(vocabulary) for _ in tokens] for _ in range(count)]


def about(options):
    return {
        "torch": f"PyTorch {torch.__version__}",
        "engine": f"transformers {transformers.__version__}",
        "gpu": name_of(options.device),
        "arithmetic": f"{options.quantization or options.dtype}, {options.attention}",
    }


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a Hugging Face folder; without it request.json says it")
    parser.add_argument("--tokens", help="ids of the prompt, with commas")
    parser.add_argument("--decode", type=int, default=0, help="tokens to go on for")
    parser.add_argument("--batch", type=int, default=1, help="prompts that are computed together")
    parser.add_argument("--out", default="capture.safetensors")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    parser.add_argument("--tf32", action="store_true", help="f32 products on tensor cores")
    parser.add_argument("--quantization", choices=["torchao-fp8-row"], help="of all linear layers but the last")
    options = parser.parse_args()
    if options.model and not options.tokens:
        parser.error("--model goes with --tokens")
    if options.model and not os.path.isdir(options.model):
        parser.error(f"--model {options.model}: no such folder; a recording is of a Hugging Face folder")
    if not options.model and (options.decode or options.batch != 1):
        parser.error("--decode and --batch are for recordings: give --model and --tokens")
    if options.quantization and options.dtype != "bfloat16":
        parser.error("--quantization goes with --dtype bfloat16")
    if options.batch < 1 or options.decode < 0:
        parser.error("--batch is 1 or more, --decode 0 or more")
    return options


def name_of(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def load(path, options):
    """The model of a GGUF file or of a Hugging Face folder; nothing is fetched."""
    place, gguf = (path, {}) if os.path.isdir(path) else (
        os.path.dirname(path),
        {"gguf_file": os.path.basename(path)},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place,
        dtype=DTYPES[options.dtype],
        attn_implementation=options.attention,
        local_files_only=True,
        **gguf,
    )
    model = model.to(options.device).eval()
    if options.quantization:
        quantise(model)
    return model


def quantise(model):
    """torchao's FP8 in every linear layer but the one that makes the logits."""
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        sys.exit(f"{error}: pip install torchao")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and (layer.in_features % 16 or layer.out_features % 16):
            if layer is not model.lm_head:
                sys.exit(f"{name} is {layer.out_features} by {layer.in_features}: torchao leaves out what is no multiple of 16")
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model, config, lambda module, _: isinstance(module, torch.nn.Linear) and module is not model.lm_head)


class Hooks:
    """Keeps what the modules of a model read and write, by the site's name.

    Knows llama, qwen2, qwen3, mistral, phi3, gemma2, gemma3, olmo2, granite, smollm3 and glm4. Of a
    batch the first sequence's is kept. `wanted` are the sites to keep; all for None.
    """

    def __init__(self, model, wanted, layout):
        self.kept = {}
        self.wanted = wanted
        # transformers rotates the halves of a head, and permutes the queries and keys of a
        # llama's GGUF to fit; the runner keeps the file's order, in which neighbours turn.
        self.interleaved = layout == "interleaved"
        self.head_dim = model.model.layers[0].self_attn.head_dim
        self.layer = None
        config = model.config
        # Gemma's embedding multiplies by a factor itself, Granite's model does.
        scales_embedding = hasattr(model.model.embed_tokens, "embed_scale")
        self.output_of(model.model.embed_tokens, "embed_scaled" if scales_embedding else "embed")
        if getattr(config, "embedding_multiplier", 1) != 1:
            self.input_of(model.model.layers[0], "embed_scaled")
        for number, layer in enumerate(model.model.layers):
            self.hook_layer(layer, f"blk.{number}")
        self.output_of(model.model.norm, "output_norm")
        divided = getattr(config, "logits_scaling", 1) != 1
        if divided or getattr(config, "final_logit_softcapping", None) is not None:
            self.output_of(model.lm_head, "logits_raw")
            model.register_forward_hook(lambda _, __, result: self.keep("logits", result.logits))
        else:
            self.output_of(model.lm_head, "logits")
        self.hook_rope(model.model.layers[0].self_attn)

    def hook_layer(self, layer, block):
        attention, mlp = layer.self_attn, layer.mlp
        # The rotation is a function, not a module: it is called within this layer's attention.
        attention.register_forward_pre_hook(lambda *_: setattr(self, "layer", block))
        if hasattr(layer, "input_layernorm"):
            self.output_of(layer.input_layernorm, f"{block}.attn_norm")
        if hasattr(attention, "qkv_proj"):
            config = attention.config
            keys = config.num_key_value_heads * self.head_dim
            widths = [config.num_attention_heads * self.head_dim, keys, keys]
            self.parts_of(attention.qkv_proj, widths, [f"{block}.{name}" for name in "qkv"])
        else:
            self.output_of(attention.q_proj, f"{block}.q", self.in_file_order)
            self.output_of(attention.k_proj, f"{block}.k", self.in_file_order)
            self.output_of(attention.v_proj, f"{block}.v")
        # Gemma 3 norms heads that stand before the tokens: [batch, heads, tokens, head_dim].
        turned = attention.config.model_type.startswith("gemma3")
        of_heads = lambda tensor: self.in_file_order(tensor.transpose(1, 2) if turned else tensor)
        for name in ["q_norm", "k_norm"]:
            if hasattr(attention, name):
                self.output_of(getattr(attention, name), f"{block}.{name}", of_heads)
        self.input_of(attention.o_proj, f"{block}.attn")
        self.output_of(attention.o_proj, f"{block}.attn_out")
        before, after = norms_of(layer)
        for norm, site in zip(after, ["attn_post_norm", "ffn_post_norm"]):
            self.output_of(norm, f"{block}.{site}")
        # Without a norm in between, the network reads the residual stream.
        self.input_of(before or mlp, f"{block}.attn_residual")
        if before is not None:
            self.output_of(before, f"{block}.ffn_norm")
        if hasattr(mlp, "gate_up_proj"):
            width = mlp.gate_up_proj.out_features // 2
            sites = [f"{block}.ffn_gate", f"{block}.ffn_up"]
            self.parts_of(mlp.gate_up_proj, [width, width], sites)
        else:
            self.output_of(mlp.gate_proj, f"{block}.ffn_gate")
            self.output_of(mlp.up_proj, f"{block}.ffn_up")
        self.input_of(mlp.down_proj, f"{block}.ffn_swiglu")
        self.output_of(mlp.down_proj, f"{block}.ffn_down")
        self.output_of(layer, f"{block}.ffn_residual")

    def hook_rope(self, attention):
        """The attention looks its rotation up in its module at every call."""
        module = sys.modules[type(attention).__module__]
        rotate = getattr(module, "apply_rotary_pos_emb", None)
        if rotate is None:
            return

        def recorded(*arguments, **named):
            q, k = rotate(*arguments, **named)
            for name, heads in [("q_rope", q), ("k_rope", k)]:
                # [batch, heads, tokens, head_dim], and a row of ours holds all its heads.
                self.keep(f"{self.layer}.{name}", self.in_file_order(heads.transpose(1, 2)))
            return q, k

        module.apply_rotary_pos_emb = recorded

    def parts_of(self, module, widths, sites):
        """The columns of a fused projection."""

        def hook(_, __, output):
            for part, site in zip(output.split(widths, dim=-1), sites):
                self.keep(site, part)

        module.register_forward_hook(hook)

    def output_of(self, module, site, order=lambda tensor: tensor):
        def hook(_, __, output):
            self.keep(site, order(output[0] if isinstance(output, tuple) else output))

        module.register_forward_hook(hook)

    def input_of(self, module, site):
        module.register_forward_pre_hook(lambda _, inputs: self.keep(site, inputs[0]))

    def in_file_order(self, tensor):
        """Heads whose halves turn against each other as heads whose neighbours do."""
        if not self.interleaved:
            return tensor
        halves = tensor.reshape(*tensor.shape[:2], -1, 2, self.head_dim // 2)
        return halves.transpose(-1, -2)

    def keep(self, site, tensor):
        if self.wanted is None or site in self.wanted:
            rows = tensor.shape[1]
            # A copy: the model may go on to write where it stands.
            self.kept[site] = tensor[0].detach().float().cpu().reshape(rows, -1).clone()

    def tensors(self, sites):
        missing = [site for site in sites if site not in self.kept]
        if missing:
            shown = ", ".join(missing[:5])
            sys.exit(f"this model's modules do not make {len(missing)} of the sites: {shown}")
        return {site: self.kept[site].contiguous() for site in sites}


def norms_of(layer):
    """The norm before the feed-forward network, if there is one, and those after attention and it."""
    of = lambda name: getattr(layer, name, None)
    if of("post_self_attn_layernorm") is not None:
        return of("post_attention_layernorm"), [of("post_self_attn_layernorm"), of("post_mlp_layernorm")]
    if of("post_feedforward_layernorm") is not None:
        after = [of("post_attention_layernorm"), of("post_feedforward_layernorm")]
        return of("pre_feedforward_layernorm"), after
    return of("post_attention_layernorm"), []


if __name__ == "__main__":
    main()
