"""vLLM's offline engine, `vllm.LLM`, eager, in this process.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List

from .._errors import CaptureError
from . import fused

# What an engine must have been started with.
SETTINGS = (
    'start Python with VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment, and make the engine as '
    "LLM(model, enforce_eager=True, enable_prefix_caching=False)"
)
ENGINES = {
    "": "vllm",
    "fp8": "vllm-fp8",
    "fp8_per_tensor": "vllm-fp8",
    "fp8_per_channel": "vllm-fp8-channel",
    "fp8_per_block": "vllm-fp8-block",
}


def is_engine(value: Any) -> bool:
    """Whether it is a `vllm.LLM`."""
    return type(value).__module__.split(".")[0] == "vllm" and hasattr(value, "llm_engine")


def attach(llm: Any, recording: Any) -> List[Any]:
    """Hooks on the engine's model; what is returned must be removed.

    Raises:
        CaptureError: hooks cannot see the model, or its modules are not known.
    """
    config = llm.llm_engine.vllm_config
    check(llm, config)
    (model,) = llm.apply_model(lambda model: model)
    sequences, handles = fused.follow(model, recording, "vLLM")
    recording.about.update(about(llm, config, model))
    handles += fused.every_logit(model, model, "compute_logits", recording, sequences)
    return handles


def check(llm: Any, config: Any) -> None:
    core = type(llm.llm_engine.engine_core).__name__
    wrong = []
    if core != "InprocClient":
        wrong.append(f"the model runs in another process ({core})")
    if not config.model_config.enforce_eager:
        wrong.append("it may run as CUDA graphs and compiled (enforce_eager=False)")
    if config.cache_config.enable_prefix_caching:
        wrong.append("it may take rows from its prefix cache (enable_prefix_caching=True)")
    if config.parallel_config.world_size > 1:
        wrong.append(f"it is cut over {config.parallel_config.world_size} GPUs, whose shards are not put together here")
    if wrong:
        raise CaptureError(f"hooks cannot see all of this vLLM: {'; '.join(wrong)}. To be captured, {SETTINGS}")


def about(llm: Any, config: Any, model: Any) -> Dict[str, str]:
    vllm = sys.modules["vllm"]
    quantization = config.model_config.quantization or ""
    return {
        "engine": f"vLLM {vllm.__version__}",
        "engine_file": quantised_as(model) or ENGINES.get(str(quantization), ""),
        "arithmetic": str(quantization) or str(config.model_config.dtype).rpartition(".")[2],
        "dtype": str(config.model_config.dtype).rpartition(".")[2],
        "cache": str(config.cache_config.cache_dtype),
        "model": str(config.model_config.model),
        "settings": " ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("VLLM_")),
    }


def quantised_as(model: Any) -> str:
    """The engine's file of a checkpoint that is quantised already; empty where it is not one."""
    layer = model.model.layers[0].self_attn.qkv_proj
    scheme = type(getattr(layer, "scheme", None)).__name__
    if scheme == "CompressedTensorsW8A8Int8":
        return "vllm-int8"
    if scheme == "CompressedTensorsW8A8Fp8":
        strategy = str(getattr(layer.scheme, "strategy", "")).lower()
        return "vllm-fp8-channel" if "channel" in strategy else "vllm-fp8"
    method = getattr(layer, "quant_method", None)
    if type(method).__name__ == "Fp8LinearMethod":
        return "vllm-fp8-block" if getattr(method, "block_quant", False) else "vllm-fp8"
    return ""
