#!/usr/bin/env python3
"""Makes tests/fixtures/config_keys.json: every key that transformers and `gguf` know of the
architectures that are computed.

    python3 -m venv venv && venv/bin/pip install transformers==5.17.0 gguf==0.19.0
    venv/bin/python scripts/config_keys.py

Of transformers: the fields of each configuration class with what they are where a file says nothing,
the other names that the class knows them by, and the fields of `GenerationConfig`. Of transformers'
ways to quantise: the arguments of each. Of `gguf`: every metadata key of its constants.
"""

import inspect
import json
import pathlib

import gguf
from transformers import GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3", "glm4",
    "stablelm", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next",
]
WAYS = ["fp8", "compressed-tensors", "modelopt", "gptq", "awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "mxfp4"]


def plain(value):
    """What JSON can hold of a default; sets and classes are none."""
    try:
        json.dumps(value)
        return value
    except TypeError:
        return None


def of_class(kind):
    fields = {name: plain(field.default) for name, field in getattr(kind, "__dataclass_fields__", {}).items()}
    fields.update({name: plain(value) for name, value in kind().to_dict().items()})
    fields.update({name: None for name in getattr(kind, "attribute_map", {})})
    return dict(sorted(fields.items()))


def main():
    configs = {name: of_class(CONFIG_MAPPING[name]) for name in ARCHITECTURES}
    base = of_class(PretrainedConfig)
    shared = {name: base[name] for name in base if all(config.get(name) == base[name] for config in configs.values())}
    own = {
        name: {key: value for key, value in config.items() if key not in shared}
        for name, config in configs.items()
    }
    ways = {}
    for way in WAYS:
        kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(way)
        if kind is not None:
            arguments = inspect.signature(kind.__init__).parameters
            ways[way] = sorted(name for name in arguments if name not in ("self", "kwargs", "args"))
    keys = set()

    def collect(group):
        for name, value in vars(group).items():
            if isinstance(value, type):
                collect(value)
            elif isinstance(value, str) and not name.startswith("_"):
                keys.add(value)

    collect(gguf.constants.Keys)
    written = {
        "shared": shared,
        "configs": own,
        "generation": sorted(vars(GenerationConfig())),
        "quantization": ways,
        "gguf": sorted(keys),
    }
    out = pathlib.Path(__file__).parent.parent / "tests/fixtures/config_keys.json"
    out.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out.name}: {len(own)} architectures, {len(keys)} keys of GGUF, {len(ways)} ways to quantise")


if __name__ == "__main__":
    main()
