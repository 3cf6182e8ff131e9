"""Every site of the model classes of vLLM and of SGLang, which fuse what transformers keeps apart.

One product makes queries, keys and values, one makes gate and up, and a norm adds the residual
stream itself. Rows of all prompts stand below one another. Knows llama, qwen2 and qwen3 and what
is built as they are; a model with other modules is refused, with what is missing.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

from .._errors import CaptureError
from .transformers import at

Keep = Callable[[str, Any], None]

LAYER = [
    "self_attn.qkv_proj",
    "self_attn.rotary_emb",
    "self_attn.attn",
    "self_attn.o_proj",
    "self_attn.q_size",
    "self_attn.kv_size",
    "input_layernorm",
    "post_attention_layernorm",
    "mlp.gate_up_proj",
    "mlp.act_fn",
    "mlp.down_proj",
]


class Hooks:
    """Shows `keep` what the modules return, by the site's name, `[rows, ...]`."""

    def __init__(self, model: Any, keep: Keep, engine: str) -> None:
        missing = [name for name in ["model.embed_tokens", "model.layers", "model.norm"] if at(model, name) is None]
        layers = at(model, "model.layers")
        if layers:
            missing += [f"model.layers.0.{name}" for name in LAYER if at(layers[0], name) is None]
        if missing:
            found = [name for name, _ in (layers[0] if layers else model).named_modules() if name.count(".") < 2 and name]
            raise CaptureError(
                f"{type(model).__name__} of {engine} is not built as llama, qwen2 or qwen3 are there; missing: "
                f"{', '.join(missing)}; found: {', '.join(found[:24])}. Capture its operations "
                'instead: level="operations"'
            )
        self.keep = keep
        self.handles: List[Any] = []
        self.block: Optional[str] = None
        self.sites: List[str] = []
        rotations: List[Any] = []
        inner = model.model
        self.hook(inner.embed_tokens, ["embed"])
        for number, layer in enumerate(inner.layers):
            self.hook_layer(layer, number)
            # The rotation's module may be one for all layers; the layer's attention calls it.
            rotation = layer.self_attn.rotary_emb
            if not any(rotation is other for other in rotations):
                rotations.append(rotation)
                self.handles.append(rotation.register_forward_hook(self.rotated))
        self.hook(inner.norm, ["output_norm", f"blk.{len(inner.layers) - 1}.ffn_residual"])

    def hook_layer(self, layer: Any, number: int) -> None:
        block, attention, mlp = f"blk.{number}", layer.self_attn, layer.mlp
        # A norm adds the residual stream itself, and returns the sum beside the norm.
        self.hook(layer.input_layernorm, [f"{block}.attn_norm", f"blk.{number - 1}.ffn_residual"])
        widths = [attention.q_size, attention.kv_size, attention.kv_size]
        self.hook(attention.qkv_proj, [[f"{block}.{name}" for name in "qkv"]], widths)
        for name in ["q_norm", "k_norm"]:
            if hasattr(attention, name):
                self.hook(getattr(attention, name), [f"{block}.{name}"])
        self.handles.append(attention.register_forward_pre_hook(lambda *_: self.enter(block)))
        self.handles.append(attention.register_forward_hook(lambda *_: self.enter(None)))
        self.sites += [f"{block}.q_rope", f"{block}.k_rope"]
        self.hook(attention.attn, [f"{block}.attn"])
        self.hook(attention.o_proj, [f"{block}.attn_out"])
        norm = layer.post_attention_layernorm
        self.hook(norm, [f"{block}.ffn_norm", f"{block}.attn_residual"])
        self.hook(mlp.gate_up_proj, [[f"{block}.ffn_gate", f"{block}.ffn_up"]])
        self.hook(mlp.act_fn, [f"{block}.ffn_swiglu"])
        self.hook(mlp.down_proj, [f"{block}.ffn_down"])

    def enter(self, block: Optional[str]) -> None:
        self.block = block

    def rotated(self, _: Any, __: Any, output: Tuple[Any, ...]) -> None:
        for name, tensor in zip(["q_rope", "k_rope"], output):
            if self.block is not None and tensor is not None:
                self.keep(f"{self.block}.{name}", tensor)

    def hook(
        self,
        module: Any,
        names: Sequence[Union[str, List[str]]],
        widths: Optional[List[int]] = None,
    ) -> None:
        """Keeps a module's outputs; a list among the names are parts of one, side by side."""
        for name in names:
            self.sites += name if isinstance(name, list) else [name]

        def kept(_: Any, __: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for name, tensor in zip(names, outputs):
                if tensor is None:
                    continue
                if isinstance(name, list):
                    parts = tensor.split(widths or tensor.shape[-1] // len(name), dim=-1)
                    for site, part in zip(name, parts):
                        self.keep(site, part)
                else:
                    self.keep(name, tensor)

        self.handles.append(module.register_forward_hook(kept))

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Sequences:
    """Which rows of a step are which prompt's: rows stand below one another, with their positions."""

    def __init__(self, row: Optional[int]) -> None:
        self.row = row
        self.lengths: List[int] = []
        self.first: int = 0
        self.of: slice = slice(0)

    def step(self, positions: List[int]) -> None:
        """Finds the rows of the prompt that is kept, from the positions of a step's rows.

        Raises:
            CaptureError: several prompts, and nobody said which; or not each of them in this step.
        """
        starts = [at for at, position in enumerate(positions) if self.begins(positions, at)]
        bounds = list(zip(starts, [*starts[1:], len(positions)]))
        if not self.lengths:
            lengths = [end - start for start, end in bounds]
            if len(bounds) > 1 and self.row is None:
                raise CaptureError(
                    f"{len(bounds)} prompts ran in one step, of {', '.join(map(str, lengths[:8]))} tokens: "
                    "one is captured at a time; say which, `row=0`, or send one alone"
                )
            if len(set(lengths)) > 1:
                raise CaptureError(
                    f"the prompts have different lengths ({', '.join(map(str, lengths[:8]))} tokens): what an engine "
                    "makes of such a batch is not known; send prompts of one length"
                )
            self.lengths = lengths
        if len(bounds) != len(self.lengths):
            raise CaptureError(
                f"{len(bounds)} prompts ran in this step, and {len(self.lengths)} in the first: let all go on for as "
                "many tokens (ignore_eos=True), in one pass each"
            )
        row = self.row or 0
        if not 0 <= row < len(bounds):
            raise CaptureError(f"row={row}, and {len(bounds)} prompts ran")
        start, end = bounds[row]
        self.first, self.of = positions[start], slice(start, end)

    def begins(self, positions: List[int], at: int) -> bool:
        """Whether another prompt begins at this row. In a step of one token each, every row does."""
        if at == 0 or self.lengths and len(positions) == len(self.lengths):
            return True
        return positions[at] != positions[at - 1] + 1


def follow(model: Any, recording: Any, engine: str) -> Tuple[Sequences, List[Any]]:
    """Hooks on a model that feed a recording; its sequences, and what must be removed.

    A call of the model says the ids and positions of a step. SGLang calls the model in a way that
    hooks do not see, and vLLM the module of its layers: the first of both that is seen counts.
    """
    sequences = Sequences(recording.row)
    step_rows = [0]

    def keep(site: str, tensor: Any) -> None:
        rows = step_rows[0]
        if tensor.dim() != 2 or tensor.shape[0] != rows:
            # Queries and keys that a norm took head by head have a row for each token again.
            tensor = tensor.reshape(rows, -1)
        of = sequences.of
        recording.keep(site, tensor if of.stop - of.start == rows else tensor[of])

    def begin(arguments: Tuple[Any, ...], named: Any) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        positions = named.get("positions", arguments[1] if len(arguments) > 1 else None)
        if positions is None:
            raise CaptureError(f"{engine} called the model without positions: capture one of its own passes")
        positions = positions[0] if positions.dim() > 1 else positions
        step_rows[0] = positions.shape[0]
        sequences.step([int(position) for position in positions.tolist()])
        recording.batch = len(sequences.lengths)
        of = sequences.of
        recording.step(None if ids is None else ids[of].tolist(), of.stop - of.start, sequences.first)

    within = [False]

    def outer(arguments: Tuple[Any, ...], named: Any) -> None:
        within[0] = True
        begin(arguments, named)

    def inner(arguments: Tuple[Any, ...], named: Any) -> None:
        if not within[0]:
            begin(arguments, named)

    def after(*_: Any) -> None:
        within[0] = False

    hooks = Hooks(model, keep, engine)
    recording.expect(hooks.sites)
    handles = [
        hooks,
        Undo(before_each_call(model, outer)),
        model.register_forward_hook(after),
        Undo(before_each_call(model.model, inner)),
    ]
    return sequences, handles


def every_logit(model: Any, owner: Any, name: str, recording: Any, sequences: Sequences) -> List[Any]:
    """Adds the site `logits`: a row for each position, where an engine computes the last one's.

    The rows are the engine's own product (`name` of `owner`) of one position of every prompt at a
    time, as it computes them for each token that it generates. Those that it computed in the pass
    must have the same bits, or nothing is written.
    """
    if not recording.wants("logits"):
        return []
    product = getattr(owner, name)
    own: List[Any] = []
    others: List[Any] = []
    normed: List[Any] = []

    def observed(hidden: Any, *arguments: Any, **named: Any) -> Any:
        result = product(hidden, *arguments, **named)
        own.append(result.detach().clone())
        others[:] = [arguments, named]
        return result

    def of_norm(_: Any, __: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        normed.append(output.detach().clone())

    def at_end() -> None:
        if not own:
            return
        torch = sys.modules["torch"]
        prompts = len(sequences.lengths)
        hidden = torch.cat([step.reshape(prompts, -1, step.shape[-1]) for step in normed], dim=1)
        arguments, named = others
        with torch.inference_mode():
            rows = [
                product(hidden[:, at].contiguous(), *arguments, **named).cpu()
                for at in range(hidden.shape[1])
            ]
        if not torch.equal(torch.cat(own).cpu(), torch.cat(rows)[-sum(map(len, own)) :]):
            raise CaptureError(
                "the logits of one position differ from those that the engine computed in the pass: was "
                "a logits processor or speculative decoding at work? Switch it off, or leave `logits` out (`sites=`)"
            )
        recording.keep("logits", torch.stack([row[sequences.row or 0] for row in rows]))

    own_value = vars(owner).get(name)
    setattr(owner, name, observed)
    recording.at_end.append(at_end)

    def put_back() -> None:
        # What the class has is there again when the instance's own is gone.
        delattr(owner, name)
        if own_value is not None:
            setattr(owner, name, own_value)

    return [Undo(put_back), model.model.norm.register_forward_hook(of_norm)]


class Undo:
    """Something to be undone, as a hook is removed."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.remove = undo


def before_each_call(model: Any, begin: Any) -> Any:
    """Lets `begin` see the arguments of each call of a module; returns what undoes it."""
    try:
        return model.register_forward_pre_hook(lambda _, inputs, named: begin(inputs, named), with_kwargs=True).remove
    except TypeError:
        # Before PyTorch 2.0 a hook does not see arguments by name.
        forward = model.forward

        def called(*inputs: Any, **named: Any) -> Any:
            begin(inputs, named)
            return forward(*inputs, **named)

        model.forward = called
        return lambda: delattr(model, "forward")
