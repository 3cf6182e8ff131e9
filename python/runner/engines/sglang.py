"""SGLang in this process: its model runner, or a pass of a folder through its own one-batch path.

`sglang.Engine` computes in another process, which hooks do not see: `load` gives what does.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, Sequence

from .._errors import CaptureError
from . import fused

HOW = (
    "capture `runner.engines.sglang.load(folder)`, which is SGLang's own one-batch path in this process: "
    'with runner.capture(engine, "run.safetensors"): engine.run(tokens, decode=8)'
)


def is_engine(value: Any) -> bool:
    """Whether it is something of SGLang's: an engine, a model runner, or what `load` made."""
    return isinstance(value, OneBatch) or type(value).__module__.split(".")[0] == "sglang"


class OneBatch:
    """A model that SGLang loaded into this process, and its own one-batch path."""

    def __init__(self, runner: Any, one_batch: Any, server: Any) -> None:
        self.runner, self.one_batch, self.server = runner, one_batch, server
        self.model_runner = runner.torch_runner

    def run(self, tokens: Sequence[int], decode: int = 1, others: Sequence[Sequence[int]] = ()) -> List[int]:
        """Runs a prompt, with others of its length beside it, and goes on for `decode` tokens.

        Returns:
            The decoded tokens of the first prompt.
        """
        prompts = [list(tokens), *map(list, others)]
        requests = self.one_batch.prepare_synthetic_inputs_for_latency_test(len(prompts), len(tokens), prompts)
        ids, _, batch = self.runner.extend(requests)
        decoded = [int(ids[0])]
        for _ in range(decode - 1):
            ids, _ = self.runner.decode(ids, batch)
            decoded.append(int(ids[0]))
        return decoded


def load(folder: str, **arguments: Any) -> OneBatch:
    """Loads a Hugging Face folder into this process, eager, with SGLang's own code.

    `arguments` are those of `sglang.srt.server_args.ServerArgs`, as `quantization="fp8"` or
    `attention_backend="triton"`.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    settings: Dict[str, Any] = dict(
        model_path=folder,
        skip_tokenizer_init=True,
        cuda_graph_backend_prefill="disabled",
        cuda_graph_backend_decode="disabled",
        sampling_backend="pytorch",
        random_seed=0,
        log_level="warning",
    )
    settings.update(arguments)
    server = ServerArgs(**settings)
    one_batch.get_tokenizer = lambda *_, **__: None
    one_batch._set_envs_and_config(server)
    ports = PortArgs.init_new(server)
    for name in ["initialize_moe_config", "initialize_fp8_gemm_config", "initialize_fp4_gemm_config"]:
        getattr(one_batch, name, lambda _: None)(server)
    runner, _ = one_batch.load_model(server, ports, 0, 0)
    return OneBatch(runner, one_batch, server)


def attach(engine: Any, recording: Any) -> List[Any]:
    """Hooks on the model; what is returned must be removed.

    Raises:
        CaptureError: hooks cannot see the model, or its modules are not known.
    """
    runner = engine.model_runner if isinstance(engine, OneBatch) else engine
    model = getattr(runner, "model", None)
    if model is None or not hasattr(model, "logits_processor"):
        raise CaptureError(f"{type(engine).__name__} computes in another process, which hooks do not see: {HOW}")
    server = runner.server_args
    graphs = getattr(runner, "cuda_graph_runner", None) or getattr(runner, "graph_runner", None)
    if graphs is not None and type(graphs).__name__ not in ("NoneType", "EagerRunner"):
        raise CaptureError(f"this SGLang replays CUDA graphs ({type(graphs).__name__}), whose kernels hooks do not see: {HOW}")
    if getattr(runner, "tp_size", 1) > 1:
        raise CaptureError(f"the model is cut over {runner.tp_size} GPUs, whose shards are not put together here")
    sequences, handles = fused.follow(model, recording, "SGLang")
    recording.about.update(about(server, model))
    handles += fused.every_logit(model, model.logits_processor, "_compute_lm_head", recording, sequences)
    return handles


def about(server: Any, model: Any) -> Dict[str, str]:
    quantization = server.quantization or ""
    dtype = str(model.model.embed_tokens.weight.dtype).rpartition(".")[2]
    return {
        "engine": f"SGLang {sys.modules['sglang'].__version__}",
        "engine_file": {"": "sglang", "fp8": "sglang-fp8"}.get(quantization, ""),
        "arithmetic": quantization or dtype,
        "dtype": dtype,
        "attention": str(server.attention_backend),
        "model": str(server.model_path),
    }
