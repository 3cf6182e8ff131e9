"""A pass of a PyTorch module: which tokens each call of it reads, and which prompt is kept.

Knows how transformers calls a model (ids, cache, mask); what the modules inside are called is
`transformers.py`'s or the owner's `names`.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

from .._errors import CaptureError
from . import named, transformers
from .fused import Undo, before_each_call


def attach(model: Any, recording: Any, names: Optional[Mapping[str, str]], torch: Any) -> List[Any]:
    """Hooks on the model and in it; what is returned must be removed.

    Raises:
        CaptureError: it is compiled, or its modules are not known.
    """
    check(model, torch)
    calls = Calls(recording, torch)

    def keep(site: str, tensor: Any) -> None:
        recording.keep(site, calls.own(site, tensor))

    hooks: Any
    handles: List[Any]
    if names is None:
        hooks = transformers.Hooks(model, keep)
        handles = [hooks, *every_logit(model, recording, calls, torch)]
    else:
        hooks = named.Hooks(model, names, keep)
        handles = [hooks]
    try:
        recording.expect(hooks.sites)
        recording.about.update(transformers.about(model, torch))
        handles.append(Undo(before_each_call(model, calls.begin)))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return handles


def every_logit(model: Any, recording: Any, calls: "Calls", torch: Any) -> List[Any]:
    """The rows of `logits` that a call leaves out, as `generate` does for all but the last token.

    They are the model's own product of one position at a time, as it computes the one that it
    keeps; where a call computes all rows, nothing is added.
    """
    normed: List[Any] = []
    made: List[int] = []

    def of_head(_: Any, inputs: Any) -> None:
        made.append(int(inputs[0].shape[-2]))

    def of_norm(_: Any, __: Any, output: Any) -> None:
        normed.append(calls.own("output_norm", output).detach().clone())

    def at_end() -> None:
        rows = sum(recording.steps)
        if not made or sum(made) == rows or sum(map(len, normed)) != rows:
            return
        with torch.inference_mode():
            each = [model.lm_head(row[None, None]).reshape(1, -1) for step in normed for row in step]
        recording.instead["logits"] = torch.cat(each)

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in transformers.LATE_LOGITS or not recording.wants("logits"):
        return []
    recording.at_end.append(at_end)
    return [model.lm_head.register_forward_pre_hook(of_head), model.model.norm.register_forward_hook(of_norm)]


def check(model: Any, torch: Any) -> None:
    """Raises what makes hooks blind, or a pass that no second one repeats."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(forward, "_torchdynamo_orig_callable"):
            what = f"its module {name}" if name else "the model"
            raise CaptureError(f"{what} is compiled (torch.compile), and hooks see nothing of it: give the model as it was before")
        if module.training and isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            raise CaptureError(f"the model is in training mode, and {name} drops values at random: call model.eval() first")
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise CaptureError("the model has no weights (device `meta`): load them first")


class Calls:
    """The calls of a model, each a step of the pass."""

    def __init__(self, recording: Any, torch: Any) -> None:
        self.recording, self.torch = recording, torch
        self.batch, self.rows, self.batched, self.one_row = 1, 0, True, False

    def begin(self, inputs: Tuple[Any, ...], named: Dict[str, Any]) -> None:
        torch = self.torch
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise CaptureError("the pass is recorded as a CUDA graph, whose kernels hooks do not see: switch CUDA graphs off")
        compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)
        if compiling():
            raise CaptureError("the model is being compiled (torch.compile), and hooks see nothing of it: switch it off")
        ids = named.get("input_ids", inputs[0] if inputs else None)
        shown = ids if ids is not None else named.get("inputs_embeds")
        if shown is None or not isinstance(shown, torch.Tensor) or shown.dim() < 1:
            raise CaptureError("the model was called without token ids or embeddings that could be found: pass input_ids")
        # Ids are [tokens] or [batch, tokens]; what is no id has its width as the last dimension.
        is_ids = not shown.is_floating_point()
        self.batched = shown.dim() >= (2 if is_ids else 3)
        self.one_row = not is_ids and shown.dim() == 1
        if self.one_row:
            shown = shown.unsqueeze(0)
        if not self.batched:
            shown = shown.unsqueeze(0)
        batch, rows = shown.shape[:2]
        row = self.recording.row
        if batch > 1 and row is None:
            raise CaptureError(
                f"{batch} prompts ran in one pass: one is captured at a time; say which, `row=0`, or run one alone"
            )
        if not 0 <= (row or 0) < batch:
            raise CaptureError(f"row={row}, and {batch} prompts ran")
        mask = named.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.bool().all()):
            raise CaptureError(
                "the pass has padding (an attention_mask with zeros): run the prompt alone, without padding, or with "
                "others of its length"
            )
        self.batch, self.rows = batch, rows
        self.recording.batch = batch
        own = shown[row or 0].tolist() if ids is not None and is_ids and shown.dim() == 2 else None
        self.recording.step(own, rows, first_of(named, torch))

    def own(self, site: str, tensor: Any) -> Any:
        """The rows of the prompt that is kept; a tensor may have the dimension of the batch or not."""
        if not isinstance(tensor, self.torch.Tensor):
            raise CaptureError(f"the module of {site} gives {type(tensor).__name__}, which is no tensor")
        if self.one_row:
            return tensor.reshape(1, -1)
        if self.batched and tensor.dim() >= 2 and tensor.shape[0] == self.batch and (self.batch > 1 or tensor.dim() >= 3):
            tensor = tensor[self.recording.row or 0]
        return tensor


def first_of(named: Mapping[str, Any], torch: Any) -> Optional[int]:
    """The position of a call's first token: what stands in the cache; None where nobody says."""
    positions = named.get("cache_position")
    if isinstance(positions, torch.Tensor) and positions.numel():
        return int(positions.reshape(-1)[0])
    cache = named.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, (tuple, list)):
        # [layers][keys, values], of the shape [batch, heads, tokens, width].
        return int(cache[0][0].shape[2]) if cache else 0
    return None
