"""Records passes of small random GGUF models by llama.cpp: as many questions of which the answer is "clean".

    pip install llama-cpp-python==0.3.16 gguf numpy      # built with CUDA for --gpu
    python scripts/clean_llama_passes.py --out clean --count 24 --gpu
    runner run clean/stages

Each pass is judged by the contracts `exact-engine`, `exact-pass` (where no weight is f32, f16 or bf16, whose
products cuBLAS adds in an order of its own) and `llama-cpp-cuda`: what does not pass is a false alarm, or
a kernel that is not known. The shapes follow from the seed alone: llama, qwen2 and qwen3; 13 types of weight;
1 to 700 tokens, some with four decoded ones; caches in f16 and f32.
"""

import argparse
import json
import os
import random
import struct
import subprocess
import sys

try:
    import gguf
    import numpy
except ImportError as error:
    sys.exit(f"{error}: pip install gguf numpy")

HERE = os.path.dirname(os.path.abspath(__file__))
# Values and bytes of a block, and ggml's number, of the types that the gguf package cannot write.
BLOCKS = {
    "q2_K": (256, 84, 10),
    "q3_K": (256, 110, 11),
    "q4_K": (256, 144, 12),
    "q5_K": (256, 176, 13),
    "q6_K": (256, 210, 14),
}
KINDS = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", *BLOCKS, "f16", "bf16", "f32"]


def main():
    options = read_options()
    out = os.path.abspath(options.out)
    os.makedirs(os.path.join(out, "stages"), exist_ok=True)
    write(out, "stages/pipeline.toml", PIPELINE.format(contracts=os.path.abspath(options.contracts)))
    with open(os.path.join(HERE, "..", "engines", "llama-cpp-cuda.toml")) as file:
        own = file.read().replace('"ggml-cuda-f16-cache", ', "").replace('"llama-cpp-cuda"', '"f32-cache"')
    write(out, "f32-cache.toml", own)
    for seed in range(options.seed, options.seed + options.count):
        case = draw(random.Random(seed))
        record(options, out, seed, case)
        print(f"{seed}: {case}", flush=True)


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="a folder for models, recordings and stages")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1, help="of the first pass; the next ones count up")
    parser.add_argument("--gpu", action="store_true", help="all layers on the GPU")
    parser.add_argument("--contracts", default=os.path.join(HERE, "..", "contracts"))
    return parser.parse_args()


def draw(dice):
    """A shape, a type of weight, a number of tokens and a cache."""
    kind, architecture = dice.choice(KINDS), dice.choice(["llama", "qwen2", "qwen3"])
    head, key_heads = dice.choice([32, 64, 64, 96, 128]), dice.choice([1, 2, 3, 4])
    heads = max(2, key_heads * dice.choice([1, 2, 3, 4]))
    unit = dice.choice([32, 64])
    hidden, ffn = unit * dice.randint(1, 30), unit * dice.randint(1, 40)
    if kind in BLOCKS:
        hidden, ffn = 256 * dice.randint(1, 4), 256 * dice.randint(1, 6)
        head = dice.choice([64, 128])
        heads = dice.choice([256, 512, 768, 1024]) // head
        key_heads = dice.choice([count for count in [1, 2, 3, 4, 8] if heads % count == 0])
    if architecture == "qwen2":
        # llama.cpp allows no other width.
        hidden = heads * head
    lengths = [1, 2, (3, 8), (9, 16), (17, 64), (65, 300), (301, 700)]
    length = dice.choice(lengths)
    return {
        "type": kind,
        "architecture": architecture,
        "hidden": hidden,
        "head": head,
        "heads": heads,
        "key_heads": key_heads,
        "ffn": ffn,
        "layers": dice.randint(1, 3),
        "vocabulary": dice.choice([250, 256, 500, 1000, 2048]),
        "theta": dice.choice([1e4, 1e5, 1e6]),
        "length": length if isinstance(length, int) else dice.randint(*length),
        "decoded": dice.choice([0, 0, 4]),
        "cache": dice.choice(["f16", "f16", "f32"]),
    }


def record(options, out, seed, case):
    folder = os.path.join(out, str(seed))
    os.makedirs(folder, exist_ok=True)
    model, capture = (os.path.join(folder, name) for name in ["model.gguf", "capture.safetensors"])
    make_model(model, seed, case)
    dice = random.Random(seed)
    tokens = [dice.randrange(case["vocabulary"]) for _ in range(case["length"])]
    adapter = os.path.join(HERE, "..", "adapters", "llamacpp.py")
    command = [sys.executable, adapter, "--model", model, "--out", capture, "--cache", case["cache"]]
    command += ["--tokens", ",".join(map(str, tokens)), "--decode", str(case["decoded"] + 1)]
    done = subprocess.run(command + ["--gpu"] * options.gpu, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{seed}: {case}\n{done.stderr[-2000:]}")
    decoded = f", decoded = {case['decoded']}" if case["decoded"] else ""
    for letter, contract in [("x", "exact-engine"), ("p", "exact-pass"), ("c", "llama-cpp-cuda")]:
        whole = contract == "exact-pass"
        if whole and case["type"] in ["f16", "bf16", "f32"]:
            continue
        engine = "../f32-cache.toml" if whole and case["cache"] == "f32" else "llama-cpp-cuda"
        recipe = f'{{ engine = "{engine}"{decoded} }}'
        stage = STAGE.format(letter=letter, seed=seed, contract=contract, tokens=ids_of(capture), recipe=recipe)
        write(out, f"stages/{letter}{seed}.toml", f"# {case}\n{stage}")


def ids_of(capture):
    with open(capture, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        start, end = json.loads(file.read(size))["ids"]["data_offsets"]
        file.seek(8 + size + start)
        return list(struct.unpack(f"<{(end - start) // 8}q", file.read(end - start)))


def make_model(path, seed, case):
    dice = numpy.random.default_rng(seed)
    heads, keys = case["heads"] * case["head"], case["key_heads"] * case["head"]
    hidden, ffn, kind = case["hidden"], case["ffn"], case["type"]
    file = gguf.GGUFWriter(path, case["architecture"])
    file.add_block_count(case["layers"])
    file.add_context_length(4096)
    file.add_embedding_length(hidden)
    file.add_feed_forward_length(ffn)
    file.add_head_count(case["heads"])
    file.add_head_count_kv(case["key_heads"])
    file.add_key_length(case["head"])
    file.add_value_length(case["head"])
    file.add_rope_dimension_count(case["head"])
    file.add_rope_freq_base(case["theta"])
    file.add_layer_norm_rms_eps(1e-6)
    file.add_vocab_size(case["vocabulary"])
    file.add_tokenizer_model("no_vocab")

    def vector(name, width):
        values = dice.standard_normal(width, numpy.float32) * numpy.float32(0.1)
        file.add_tensor(name, values + numpy.float32("norm" in name))

    def matrix(name, rows, width, kind=kind):
        if kind in BLOCKS:
            of_type = gguf.GGMLQuantizationType(BLOCKS[kind][2])
            file.add_tensor(name, random_blocks(dice, kind, rows, width), raw_dtype=of_type)
            return
        values = dice.standard_normal((rows, width), numpy.float32) * numpy.float32(width**-0.5)
        if kind == "f32":
            file.add_tensor(name, values)
            return
        of_type = gguf.GGMLQuantizationType[kind.upper()]
        file.add_tensor(name, gguf.quants.quantize(values, of_type), raw_dtype=of_type)

    matrix("token_embd.weight", case["vocabulary"], hidden, "q8_0" if kind in BLOCKS else kind)
    vector("output_norm.weight", hidden)
    matrix("output.weight", case["vocabulary"], hidden)
    for layer in range(case["layers"]):
        block = f"blk.{layer}."
        for name in ["attn_norm", "ffn_norm"]:
            vector(f"{block}{name}.weight", hidden)
        for name, rows in [("q", heads), ("k", keys), ("v", keys)]:
            matrix(f"{block}attn_{name}.weight", rows, hidden)
            if case["architecture"] == "qwen2":
                vector(f"{block}attn_{name}.bias", rows)
        if case["architecture"] == "qwen3":
            for name in ["q", "k"]:
                vector(f"{block}attn_{name}_norm.weight", case["head"])
        matrix(f"{block}attn_output.weight", hidden, heads)
        matrix(f"{block}ffn_gate.weight", ffn, hidden)
        matrix(f"{block}ffn_up.weight", ffn, hidden)
        matrix(f"{block}ffn_down.weight", hidden, ffn)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def random_blocks(dice, kind, rows, width):
    """Random codes, with scales that make the values about as large as those of other types."""
    values, size, _ = BLOCKS[kind]
    count = rows * width // values
    blocks = dice.integers(0, 256, (count, size), dtype=numpy.uint8)
    spread = (0.5 + dice.random(count, dtype=numpy.float32)) * width**-0.5
    places = {
        "q2_K": {80: 1 / 10, 82: 1 / 10},
        "q3_K": {108: 1 / 40},
        "q4_K": {0: 1 / 128, 2: 1 / 32},
        "q5_K": {0: 1 / 256, 2: 1 / 32},
        "q6_K": {208: 1 / 1152},
    }
    for place, factor in places[kind].items():
        halves = (spread * factor).astype(numpy.float16)
        blocks[:, place : place + 2] = halves.reshape(-1, 1).view(numpy.uint8)
    return blocks.reshape(rows, -1)


def write(folder, name, text):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


PIPELINE = """contracts = "{contracts}"
arms = ["reference", "emulated", "recorded"]
"""

STAGE = """id       = "{letter}{seed}"
title    = "Is a clean pass of llama.cpp called clean?"
contract = "{contract}"
model    = "../{seed}/model.gguf"
tokens   = {tokens}
recipe   = {recipe}

[forward]
capture = "every-site"

[recorded]
file = "../{seed}/capture.safetensors"
"""

if __name__ == "__main__":
    main()
