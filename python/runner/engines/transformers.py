"""Every site of a model of transformers, or of a module that is built as they are.

Knows the kinds of `KINDS`: modules that read and write, and the one function that rotates. Another
kind, or one with other modules, is refused, with what was found and what is missing: a name that
fits does not say that a module does the same.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from .._errors import CaptureError

# Keeps a site's tensor, `[batch, tokens, ...]`.
Keep = Callable[[str, Any], None]

# Kinds of model (`model_type` of their config) whose modules mean what is said of them here.
KINDS = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "gemma3_text", "olmo2", "granite", "smollm3", "glm4"]
# Kinds that do something with what the output matrix makes, before it is the logits.
LATE_LOGITS = ["gemma2", "gemma3", "gemma3_text", "granite"]
# What a capture says of its model, as config.json does.
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What a layer must have, besides one of the two forms of its projections.
LAYER = ["self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"]
FORMS = {
    "self_attn": (["self_attn.qkv_proj"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    "mlp": (["mlp.gate_up_proj"], ["mlp.gate_proj", "mlp.up_proj"]),
}


def what_is_missing(model: Any) -> Optional[str]:
    """Which modules this file does not find in a model, in words; None if it knows them all."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is not None and kind not in KINDS:
        return f"its config says model_type = {kind!r}, and known are {', '.join(KINDS)}"
    missing = [name for name in ["model.embed_tokens", "model.layers", "model.norm", "lm_head"] if at(model, name) is None]
    if hasattr(model, "get_base_model"):
        return "it is wrapped by PEFT, and what it computes no folder holds: merge the adapter (merge_and_unload) and give that model"
    if missing and at(model, "module.lm_head") is not None:
        return "it is wrapped: give what it wraps, `model.module`"
    if missing and at(model, "layers") is not None and at(model, "embed_tokens") is not None:
        return "it has no output matrix: give the whole model, of a class ...ForCausalLM"
    layers = at(model, "model.layers")
    layer = layers[0] if layers is not None and len(layers) else None
    if layer is not None:
        missing += [f"model.layers.0.{name}" for name in LAYER if at(layer, name) is None]
        for fused, apart in FORMS.values():
            if not any(all(at(layer, name) is not None for name in form) for form in (fused, apart)):
                missing.append(f"model.layers.0.{' and '.join(apart)} (or {fused[0]})")
        if head_dim_of(model) is None:
            missing.append("the width of a head (self_attn.head_dim, or head_dim of the config)")
    if not missing:
        return None
    found = [name for name, _ in (layer or model).named_modules() if name.count(".") < 2 and name]
    where = "model.layers.0" if layer is not None else type(model).__name__
    return f"missing: {', '.join(missing)}; found in {where}: {', '.join(found[:24]) or 'no modules'}"


def at(module: Any, name: str) -> Any:
    """The part of a module that has this dotted name, or None."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def head_dim_of(model: Any) -> Optional[int]:
    attention = model.model.layers[0].self_attn
    config = getattr(model, "config", None)
    width = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    if width is None and config is not None and getattr(config, "num_attention_heads", None):
        width = config.hidden_size // config.num_attention_heads
    return width


class Hooks:
    """Shows `keep` what the modules of a model read and write, by the site's name.

    transformers rotates the halves of a head, and permutes the queries and keys of a llama's GGUF
    to fit; with `interleaved` they come in the file's order, in which neighbours turn.
    """

    def __init__(self, model: Any, keep: Keep, interleaved: bool = False) -> None:
        missing = what_is_missing(model)
        if missing:
            raise CaptureError(
                f"{type(model).__name__} is not built as a model that is known here: {missing}. Give "
                "`names`, from site to module: {\"blk.*.q\": \"layers.*.attention.wq\", ...}"
            )
        self.keep = keep
        self.interleaved = interleaved
        self.head_dim: int = head_dim_of(model) or 0
        self.blocks: List[str] = []
        self.sites: List[str] = []
        self.handles: List[Any] = []
        self.undo: List[Callable[[], None]] = []
        config = getattr(model, "config", None)
        # Gemma's embedding multiplies by a factor itself, Granite's model does.
        scales_embedding = hasattr(model.model.embed_tokens, "embed_scale")
        self.output_of(model.model.embed_tokens, "embed_scaled" if scales_embedding else "embed")
        if scales_embedding:
            self.rows_of(model.model.embed_tokens, "embed")
        if (getattr(config, "embedding_multiplier", 1) or 1) != 1:
            self.input_of(model.model.layers[0], "embed_scaled")
        for number, layer in enumerate(model.model.layers):
            self.hook_layer(layer, f"blk.{number}", config)
        self.output_of(model.model.norm, "output_norm")
        # Kinds that may change what the output matrix makes, whatever their config says now.
        if getattr(config, "model_type", None) in LATE_LOGITS:
            self.output_of(model.lm_head, "logits_raw")
            self.sites.append("logits")
            handle = model.register_forward_hook(lambda _, __, result: self.keep("logits", result.logits))
            self.handles.append(handle)
        else:
            self.output_of(model.lm_head, "logits")
        self.hook_rope(model.model.layers[0].self_attn)

    def hook_layer(self, layer: Any, block: str, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.blocks.append(block)
        # The rotation is a function, not a module: it is called within this layer's attention.
        self.handles.append(attention.register_forward_pre_hook(lambda *_: self.enter(block)))
        self.handles.append(attention.register_forward_hook(lambda *_: self.enter(None)))
        if hasattr(layer, "input_layernorm"):
            self.output_of(layer.input_layernorm, f"{block}.attn_norm")
        if hasattr(attention, "qkv_proj"):
            of = getattr(attention, "config", None) or config
            keys = of.num_key_value_heads * self.head_dim
            widths = [of.num_attention_heads * self.head_dim, keys, keys]
            self.parts_of(attention.qkv_proj, widths, [f"{block}.{name}" for name in "qkv"])
        else:
            self.output_of(attention.q_proj, f"{block}.q", self.in_file_order)
            self.output_of(attention.k_proj, f"{block}.k", self.in_file_order)
            self.output_of(attention.v_proj, f"{block}.v")
        # Gemma 3 norms heads that stand before the tokens: [batch, heads, tokens, head_dim].
        kind = getattr(getattr(attention, "config", None) or config, "model_type", None) or ""
        turned = kind.startswith("gemma3")

        def of_heads(tensor: Any) -> Any:
            return self.in_file_order(tensor.transpose(1, 2) if turned else tensor)

        for name in ["q_norm", "k_norm"]:
            if hasattr(attention, name):
                self.output_of(getattr(attention, name), f"{block}.{name}", of_heads)
        self.input_of(attention.o_proj, f"{block}.attn")
        self.output_of(attention.o_proj, f"{block}.attn_out")
        before, after = norms_of(layer)
        for norm, site in zip(after, ["attn_post_norm", "ffn_post_norm"]):
            self.output_of(norm, f"{block}.{site}")
        # Without a norm in between, the network reads the residual stream.
        self.input_of(before if before is not None else mlp, f"{block}.attn_residual")
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

    def hook_rope(self, attention: Any) -> None:
        """The attention looks its rotation up in its module at every call."""
        module = sys.modules[type(attention).__module__]
        if hasattr(module, ROTATION):
            self.sites += [f"{block}.{name}" for block in self.blocks for name in ("q_rope", "k_rope")]
            self.undo.append(watch_rotation(module))

    def enter(self, block: Optional[str]) -> None:
        """This thread computes a layer's attention now, or none."""
        within = rotating()
        if block is None:
            within.pop(id(self), None)
        else:
            within[id(self)] = lambda name, heads: self.keep(f"{block}.{name}", self.in_file_order(heads))

    def parts_of(self, module: Any, widths: Sequence[int], sites: Sequence[str]) -> None:
        """The columns of a fused projection."""
        self.sites += sites

        def hook(_: Any, __: Any, output: Any) -> None:
            for part, site in zip(output.split(list(widths), dim=-1), sites):
                self.keep(site, part)

        self.handles.append(module.register_forward_hook(hook))

    def output_of(self, module: Any, site: str, order: Callable[[Any], Any] = lambda tensor: tensor) -> None:
        self.sites.append(site)

        def hook(_: Any, __: Any, output: Any) -> None:
            self.keep(site, order(output[0] if isinstance(output, tuple) else output))

        self.handles.append(module.register_forward_hook(hook))

    def rows_of(self, module: Any, site: str) -> None:
        """The rows of a table that a module looks up before it multiplies them."""
        self.sites.append(site)
        hook = module.register_forward_pre_hook(lambda module, inputs: self.keep(site, module.weight[inputs[0]]))
        self.handles.append(hook)

    def input_of(self, module: Any, site: str) -> None:
        self.sites.append(site)
        hook = module.register_forward_pre_hook(lambda _, inputs: self.keep(site, inputs[0]))
        self.handles.append(hook)

    def in_file_order(self, tensor: Any) -> Any:
        """Heads whose halves turn against each other as heads whose neighbours do."""
        if not self.interleaved:
            return tensor
        halves = tensor.reshape(*tensor.shape[:2], -1, 2, self.head_dim // 2)
        return halves.transpose(-1, -2)

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self.handles:
            handle.remove()
        for undo in self.undo:
            undo()
        rotating().pop(id(self), None)
        self.handles, self.undo = [], []


ROTATION = "apply_rotary_pos_emb"
# Modules whose rotation is watched: the function that was there, and for how many captures.
watched: Dict[Any, List[Any]] = {}
lock = threading.Lock()
of_thread = threading.local()


def rotating() -> Dict[int, Callable[[str, Any], None]]:
    """Who wants to see the rotations of this thread: captures that are within an attention."""
    within: Optional[Dict[int, Callable[[str, Any], None]]] = getattr(of_thread, "within", None)
    if within is None:
        within = of_thread.within = {}
    return within


def watch_rotation(module: Any) -> Callable[[], None]:
    """Shows the rotations of a module to whoever is within an attention; returns what ends that.

    However many captures there are, the function is replaced once, and is the module's own again
    when the last of them has ended.
    """
    with lock:
        if module not in watched:
            rotate = getattr(module, ROTATION)

            def shown(*arguments: Any, **named: Any) -> Tuple[Any, Any]:
                q, k = rotate(*arguments, **named)
                for keep in list(rotating().values()):
                    # [batch, heads, tokens, head_dim], and a row of ours holds all its heads.
                    keep("q_rope", q.transpose(1, 2))
                    keep("k_rope", k.transpose(1, 2))
                return q, k

            watched[module] = [rotate, 0]
            setattr(module, ROTATION, shown)
        watched[module][1] += 1

    def end() -> None:
        with lock:
            watched[module][1] -= 1
            if watched[module][1] == 0:
                setattr(module, ROTATION, watched.pop(module)[0])

    return end


def norms_of(layer: Any) -> Tuple[Any, List[Any]]:
    """The norm before the feed-forward network, if there is one, and those after attention and it."""

    def of(name: str) -> Any:
        return getattr(layer, name, None)

    if of("post_self_attn_layernorm") is not None:
        return of("post_attention_layernorm"), [of("post_self_attn_layernorm"), of("post_mlp_layernorm")]
    if of("post_feedforward_layernorm") is not None:
        after = [of("post_attention_layernorm"), of("post_feedforward_layernorm")]
        return of("pre_feedforward_layernorm"), after
    return of("post_attention_layernorm"), []


def about(model: Any, torch: Any) -> Dict[str, str]:
    """What ran, for the file: versions, device, types, the folder of the model."""
    transformers = sys.modules.get("transformers")
    config = getattr(model, "config", None)
    parameter = next(model.parameters(), None)
    dtype = "" if parameter is None else str(parameter.dtype).rpartition(".")[2]
    said = {
        "engine": f"transformers {transformers.__version__}" if transformers else "a PyTorch module",
        "engine_file": engine_of(model, dtype),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "dtype": dtype,
        "attention": str(getattr(config, "_attn_implementation", None) or "unknown"),
        "tf32": str(bool(torch.backends.cuda.matmul.allow_tf32)).lower(),
    }
    if parameter is not None:
        # Where it runs, which need not be where the machine's GPU is.
        said["device"] = parameter.device.type
    for key in SHAPE:
        value = getattr(config, key, None)
        if value is not None:
            said[key] = str(value)
    folder = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if folder:
        said["model"] = str(folder)
    return said


def engine_of(model: Any, dtype: str) -> str:
    """The engine whose kernels these are, as the runner's files call it; empty if it has none."""
    kinds = {type(parameter).__module__.split(".")[0] for parameter in model.parameters()}
    kinds |= {type(module).__module__.split(".")[0] for module in model.modules()}
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if "torchao" in kinds:
        return "torchao"
    if "bitsandbytes" in kinds or quantised is not None:
        return ""
    return "f32" if dtype == "float32" else "transformers"
