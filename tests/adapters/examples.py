"""Runs every folder of examples/ with the real engines and holds each verdict to what is
written here. A folder that is not written here fails.

Usage: examples.py RUNNER [--torch], with `python3` in PATH as the examples shall find it. Without
`--torch` this Python has no PyTorch, and the examples that need it must say so.
"""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

RUNNER = pathlib.Path(sys.argv[1]).resolve()
TORCH = sys.argv[2:] == ["--torch"]
ROOT = pathlib.Path(__file__).resolve().parents[2]

# Each example's exit status, and of each of its stages or families the verdict and words
# of the reason.
EXPECTED = {
    "single-ops": (0, {"attention": ("pass", ""), "down": ("pass", ""), "rope": ("pass", "")}),
    "golden-output": (0, {"F": ("pass", "status 0; wrote text.txt")}),
    "h200-captures": (
        0,
        {
            "fp8": ("pass", "recorded = emulated, 0 of "),
            "fp8-unit": ("pass", "recorded = emulated, 0 of "),
            "half": ("pass", "recorded = emulated, 0 of "),
            "mixed": ("pass", "recorded = emulated, 0 of "),
            "mixed-unit": ("pass", "recorded = emulated, 0 of "),
        },
    ),
    "llama-cpp": (
        0,
        {
            "L": ("pass", "the engine's activations are quantised to 8 bits: that must cost"),
            "S": ("pass", "the engine's activations are quantised to 8 bits: that must cost"),
        },
    ),
    "transformers-bf16": (
        0,
        {
            "sites": ("pass", "31 of 31 sites to the bit"),
            "pass": ("pass", "recorded = emulated, 0 of 321,024 values differ"),
            "rounding": ("pass", ""),
        },
    ),
    "architectures": (
        0,
        dict.fromkeys(
            ["llama-yarn", "llama3", "qwen2-linear", "mistral", "phi3", "gemma2", "gemma3"]
            + ["olmo2", "granite", "smollm3", "glm4"],
            ("pass", "recorded = emulated, 0 of "),
        ),
    ),
    "llama-cpp-cuda": (
        0,
        {
            "sites": ("pass", "33 of 33 sites to the bit"),
            "pass": ("pass", "recorded = emulated, 0 of "),
            "rounding": ("pass", "33 of 33 sites to the bit"),
        },
    ),
    "sglang": (
        0,
        {
            "bf16": ("pass", "27 of 33 sites to the bit"),
            "fp8": ("pass", "27 of 33 sites to the bit"),
        },
    ),
    "public-bugs": (
        1,
        {
            "angles-in-bf16": ("structural", "layer 0, q_rope; rope-precision: "),
            "another-base": ("structural", "layer 0, q_rope; rope-base: the base is 500000"),
            "cache-in-e4m3": ("structural", "layer 0, attn; kv-cache-format: "),
            "keys-for-query-heads": ("structural", "layer 0, k; head-permutation: "),
            "scale-not-loaded": ("structural", "layer 1, q; scale-missing: "),
            "scales-of-another-slice": ("structural", "layer 1, k; scale-slice: "),
            "sglang-another-base": ("structural", "layer 0, q_rope; rope-base: the base is 500000"),
            "sglang-scales-of-another-slice": ("structural", "layer 1, k; scale-slice: "),
            "scales-up-codes-kept": ("structural", "layer 1, q; scale-power-of-two: "),
            "zero-point-off-by-one": ("structural", "layer 0, ffn_up; zero-point: "),
        },
    ),
    "batch-invariance": (
        1,
        {
            "alone": ("pass", "33 of 33 sites to the bit"),
            "within": ("pass", "33 of 33 sites to the bit"),
            "G": ("drift", "layer 1, ffn_gate; other-schedule"),
        },
    ),
    "torchao": (
        0,
        {
            "sites": ("pass", "33 of 33 sites to the bit"),
            "pass": ("pass", "recorded = emulated, 0 of 337,920 values differ"),
        },
    ),
    "vllm-checkpoints": (
        0,
        {
            f"{kind}-{what}": ("pass", "18 of 18 sites to the bit")
            for kind in ["block", "channel", "int8", "static"]
            for what in ["sites", "pass"]
        },
    ),
    "vllm": (
        0,
        {
            f"{kind}-{what}": ("pass", "33 of 33 sites to the bit")
            for kind in ["bf16", "fp8", "fp8-channel", "fp8-block"]
            for what in ["sites", "pass"]
        },
    ),
}
# What PyTorch's examples come to with it, and without it.
KERNELS = ["attention", "embed", "matmul", "rms-norm", "rope", "swiglu"]
PYTORCH = (0, ("pass", "")) if TORCH else (4, ("error", "No module named 'torch': pip install"))
EXPECTED["pytorch-ops"] = (PYTORCH[0], dict.fromkeys(KERNELS, PYTORCH[1]))
EXPECTED["transformers"] = (PYTORCH[0], {"T": PYTORCH[1]})
FITS = "is taken into account: the difference fits"


def main():
    folders = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir()}
    assert folders == set(EXPECTED), f"not expected, or not there: {folders ^ set(EXPECTED)}"
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        # A copy is run, so that nothing is left in the folder.
        shutil.copytree(ROOT / "examples", work / "examples", symlinks=True)
        for name in ["contracts", "adapters", "models"]:
            (work / name).symlink_to(ROOT / name)
        for name, (status, stages) in EXPECTED.items():
            check(work, name, status, stages)
        recording_of_llama_cpp(work)
    print(f"{len(EXPECTED)} examples have their verdicts")


def check(work, name, status, stages):
    command = [RUNNER, "run", f"examples/{name}/stages", "--runs", "runs", "--format", "json"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == status, f"{name}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    run = json.loads(done.stdout)
    seen = {}
    for stage in run["stages"]:
        seen.setdefault(stage.get("family") or stage["id"], []).append(stage)
    assert set(seen) == set(stages), f"{name}: stages {sorted(seen)}"
    for stage, (verdict, words) in stages.items():
        for member in seen[stage]:
            why = member.get("why") or ""
            assert member["verdict"] == verdict and words in why, f"{name}: {member['id']}: {why}"
    if name == "llama-cpp":
        assert all(FITS in stage["why"] for stage in run["stages"]), run["stages"]
    print(f"{name}: {', '.join(f'{stage} {verdict}' for stage, (verdict, _) in stages.items())}")


def recording_of_llama_cpp(work):
    """What the adapter records by itself: every site of a graph that does not name them all."""
    command = ["python3", "adapters/llamacpp.py", "--model", "examples/llama-cpp-cuda/model.gguf"]
    pass_ = ["--tokens", "7,42,9", "--decode", "3"]
    command += [*pass_, "--out", "recording.safetensors"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    data = (work / "recording.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    start, end = header.pop("ids")["data_offsets"]
    ids = struct.unpack("<5q", data[8 + size + start : 8 + size + end])
    assert ids[:3] == (7, 42, 9), ids
    # 15 sites of each of 2 layers, the embedding, the last norm and the logits.
    assert len(header) == 33 and "blk.1.attn_out" in header, sorted(header)
    assert all(tensor["shape"][0] == 5 for tensor in header.values()), header
    # The runner itself, which needs no Python, writes the same.
    for cache in ["f16", "f32"]:
        subprocess.run([*command, "--cache", cache], cwd=work, capture_output=True, check=True)
        captured = [RUNNER, "capture", "llama.cpp", *command[2:4], *pass_, "--cache", cache]
        captured += ["--library", os.environ["LLAMA_CPP_LIB_PATH"], "--out", "captured.safetensors"]
        subprocess.run(captured, cwd=work, check=True)
        same = (work / "captured.safetensors").read_bytes()
        assert same == (work / "recording.safetensors").read_bytes(), f"other bytes, {cache}"
    print(f"llama.cpp's recording: {len(header)} sites, ids {ids}")


main()
