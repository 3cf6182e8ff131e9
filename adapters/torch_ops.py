"""One op of a layer as PyTorch computes it, for the runner's external arm beside a single op.

Reads `request.json` and `inputs.safetensors`, which holds the op's inputs by their keys and
the model's weights by their names, and writes `tensors.safetensors`: a tensor for each site,
f32 [tokens, width].

    pip install torch numpy safetensors
"""

import argparse
import json
import sys

try:
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional
except ImportError as error:
    sys.exit(f"{error}: pip install torch numpy safetensors")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main():
    options = read_options()
    with open("request.json") as file:
        request = json.load(file)
    ((name, op),) = request["op"].items()
    if name not in OPS:
        sys.exit(f"`{name}` is not a single op; adapters/transformers_hooks.py answers `forward`")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here; list what it needs in `env`, or use cpu")
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    tensors = load_file(request["inputs"], device=options.device)
    tensors = {key: tensor.to(DTYPES[options.dtype]) for key, tensor in tensors.items()}
    with torch.inference_mode():
        made = OPS[name](op, request, tensors)
    made = {site: tensor.float().cpu().contiguous() for site, tensor in zip(request["sites"], made)}
    save_file(made, request["output"])
    print(f"PyTorch {torch.__version__}, {options.device}, {options.dtype}")


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--tf32", action="store_true", help="f32 products on tensor cores")
    return parser.parse_args()


def embed(op, request, tensors):
    weight = tensors[f"{op['weight']}.weight"]
    return [functional.embedding(torch.tensor(request["tokens"], device=weight.device), weight)]


def rms_norm(op, request, tensors):
    gain = tensors[f"{op['weight']}.weight"].flatten()
    eps = request["parameters"]["rms_norm_eps"]
    return [functional.rms_norm(tensors["input"], gain.shape, gain, eps)]


def matmul(op, _, tensors):
    def projection(name):
        # A model whose embedding is its output matrix too has no other.
        tied = name == "output" and "output.weight" not in tensors
        bias = tensors.get(f"{name}.bias")
        bias = None if bias is None else bias.flatten()
        return functional.linear(
            tensors["input"], tensors["token_embd.weight" if tied else f"{name}.weight"], bias
        )

    return [projection(name) for name in op["weights"]]


def rope(_, request, tensors):
    """Angles in f32, as engines make them; row `i` stands at position `i`."""
    x, rope = tensors["input"], request["parameters"]["rope"]
    known = rope["dimensions"] == request["parameters"]["head_dim"] and rope["magnitude"] == 1
    if not known or request["parameters"]["sliding"]["rope"]:
        refuse("RoPE of this model")
    width, rows = rope["dimensions"], tensors["input"].shape[0]
    exponents = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    frequencies = rope["theta"] ** -exponents / rope["linear_scale"]
    if rope["factors"]:
        frequencies = frequencies / torch.tensor(rope["factors"], device=x.device)
    positions = torch.arange(rows, device=x.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)[:, None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    heads = x.reshape(rows, -1, width)
    if rope["layout"] == "interleaved":
        first, second = heads[..., 0::2], heads[..., 1::2]
    else:
        first, second = heads[..., : width // 2], heads[..., width // 2 :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if rope["layout"] == "interleaved":
        return [torch.stack(turned, dim=-1).reshape(rows, -1)]
    return [torch.cat(turned, dim=-1).reshape(rows, -1)]


def attention(_, request, tensors):
    parameters = request["parameters"]
    width = parameters["head_dim"]
    if parameters["sliding"]["window"] or parameters["factors"]["scores"] or parameters["caps"]["scores"]:
        refuse("attention with a window, a soft cap or a scale of its own")

    def heads(key):
        return tensors[key].reshape(1, tensors[key].shape[0], -1, width).transpose(1, 2)

    made = functional.scaled_dot_product_attention(
        heads("q"), heads("k"), heads("v"), is_causal=True, enable_gqa=True
    )
    return [made.transpose(1, 2).reshape(tensors["q"].shape)]


def swiglu(_, request, tensors):
    if request["parameters"]["activation"] != "silu":
        refuse("a gated activation that is not SiLU")
    return [functional.silu(tensors["gate"]) * tensors["up"]]


def refuse(what):
    sys.exit(f"{what} is not among the ops of this program; write your engine's own")


OPS = {
    "embed": embed,
    "rms_norm": rms_norm,
    "matmul": matmul,
    "rope": rope,
    "attention": attention,
    "swiglu": swiglu,
}

main()
