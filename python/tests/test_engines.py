"""Hooks of vLLM and SGLang, on small modules that are built as theirs are; and sequences in a step.

The engines themselves need a GPU: `scripts/capture_engines.py` runs them, and the receipts are kept.
"""

import pytest
import torch
from safetensors.torch import load_file

from runner import CaptureError
from runner._recording import Recording
from runner.engines import fused, llama_cpp, sglang, vllm

class Linear(torch.nn.Module):
    """Returns its product, and a bias that it did not add."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs) / inputs)

    def forward(self, x):
        return x @ self.weight.T, None


class Norm(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x, residual=None):
        if residual is None:
            return x * self.weight
        residual += x
        return residual * self.weight, residual


class Rotary(torch.nn.Module):
    def forward(self, positions, q, k):
        # In place, as the engines' kernels do.
        return q.mul_(2), k.mul_(3)


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return q + torch.cat([k, k], -1) + torch.cat([v, v], -1)


class Attention(torch.nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.q_size, self.kv_size = 8, 4
        self.qkv_proj, self.o_proj = Linear(8, 16), Linear(8, 8)
        self.rotary_emb, self.attn = rotary, Attend()

    def forward(self, positions, x):
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split([8, 4, 4], -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = Linear(8, 24), Linear(12, 8), Act()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Act(torch.nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, -1)
        return gate * up


class Layer(torch.nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(8), Norm(8)
        self.self_attn, self.mlp = Attention(rotary), Mlp()

    def forward(self, positions, x, residual):
        if residual is None:
            residual, x = x.clone(), self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, x), residual)
        return self.mlp(x), residual


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm = torch.nn.Embedding(32, 8), Norm(8)
        rotary = Rotary()
        self.layers = torch.nn.ModuleList([Layer(rotary), Layer(rotary)])

    def forward(self, input_ids, positions):
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)[0]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.head = Inner(), torch.nn.Linear(8, 32)

    def compute_logits(self, hidden):
        return self.head(hidden)

    def forward(self, input_ids, positions):
        return self.model(input_ids, positions)


class AsVllm(Model):
    """vLLM's module of the layers is called in a way that hooks do not see."""

    def forward(self, input_ids, positions):
        return self.model.forward(input_ids, positions)


def run(model, steps, calls=lambda model: model):
    """A prompt and its decoded tokens; the logits of the last row of each step."""
    logits, at = [], 0
    with torch.no_grad():
        for ids in steps:
            hidden = calls(model)(torch.tensor(ids), torch.arange(at, at + len(ids)))
            logits.append(model.compute_logits(hidden[-1:]))
            at += len(ids)
    return logits


def captured(model, path, steps, calls=lambda model: model, row=None):
    recording = Recording(str(path), row=row)
    sequences, handles = fused.follow(model, recording, "an engine")
    handles += fused.every_logit(model, model, "compute_logits", recording, sequences)
    try:
        logits = run(model, steps, calls)
    finally:
        for handle in handles:
            handle.remove()
    recording.end()
    return logits


AS = {
    "vLLM": (AsVllm, lambda model: model),
    "SGLang": (Model, lambda model: model.forward),
    "both are seen": (Model, lambda model: model),
}


@pytest.mark.parametrize("engine", AS)
def test_every_site_of_a_prompt_and_its_decoded_tokens_is_kept(engine, tmp_path):
    torch.manual_seed(0)
    kind, calls = AS[engine]
    model, steps = kind(), [[3, 5, 7], [9], [11]]
    before = run(model, steps, calls)
    within = captured(model, tmp_path / "run.safetensors", steps, calls)
    assert all(map(torch.equal, before, within))
    assert all(map(torch.equal, before, run(model, steps, calls)))
    kept = load_file(tmp_path / "run.safetensors")
    assert kept["ids"].tolist() == [3, 5, 7, 9, 11]
    of_layer = ["attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn", "attn_out", "attn_residual", "ffn_norm"]
    of_layer += ["ffn_gate", "ffn_up", "ffn_swiglu", "ffn_down", "ffn_residual"]
    sites = ["embed", "output_norm", "logits", "ids"] + [f"blk.{layer}.{site}" for layer in range(2) for site in of_layer]
    assert sorted(kept) == sorted(sites)
    assert all(tensor.shape[0] == 5 for tensor in kept.values())
    # What a kernel wrote into later is kept as it was.
    assert torch.equal(kept["blk.1.q_rope"], 2 * kept["blk.1.q"]) and torch.equal(kept["blk.1.k_rope"], 3 * kept["blk.1.k"])
    assert torch.equal(kept["blk.0.attn_residual"] + kept["blk.0.ffn_down"], kept["blk.0.ffn_residual"])
    assert torch.equal(kept["logits"][-1:], within[-1])
    assert "compute_logits" not in vars(model)


def test_logits_that_the_engine_computed_otherwise_leave_nothing(tmp_path):
    torch.manual_seed(0)
    model = Model()
    compute, calls = model.compute_logits, []

    def changing(hidden):
        calls.append(1)
        return compute(hidden) * (2 if len(calls) == 1 else 1)

    model.compute_logits = changing
    with pytest.raises(CaptureError, match="logits of one position differ from those that the engine computed"):
        captured(model, tmp_path / "run.safetensors", [[3, 5], [7]])
    assert not list(tmp_path.iterdir())


def test_a_model_of_other_modules_is_refused_with_what_is_missing(tmp_path):
    model = Model()
    del model.model.layers[0].mlp.gate_up_proj
    recording = Recording(str(tmp_path / "run.safetensors"))
    with pytest.raises(CaptureError, match=r"missing: model.layers.0.mlp.gate_up_proj; found: .*self_attn.qkv_proj"):
        fused.follow(model, recording, "an engine")
    recording.discard()


@pytest.mark.parametrize(
    ("steps", "row", "words"),
    [
        ([[0, 1, 2, 0, 1, 2]], None, "2 prompts ran in one step, of 3, 3 tokens"),
        ([[0, 1, 2, 0, 1]], 0, "different lengths"),
        ([[0, 1, 0, 1], [2]], 0, "1 prompts ran in this step, and 2 in the first"),
        ([[0, 1, 0, 1]], 2, "row=2, and 2 prompts ran"),
    ],
)
def test_prompts_that_are_not_known_apart_are_refused(steps, row, words):
    sequences = fused.Sequences(row)
    with pytest.raises(CaptureError, match=words):
        for positions in steps:
            sequences.step(positions)


def test_the_rows_of_one_prompt_of_a_batch_are_found():
    sequences = fused.Sequences(1)
    sequences.step([0, 1, 2, 0, 1, 2])
    assert (sequences.of, sequences.first) == (slice(3, 6), 0)
    sequences.step([3, 3])
    assert (sequences.of, sequences.first) == (slice(1, 2), 3)
    # Positions that follow one another by chance are two prompts all the same.
    sequences.step([4, 5])
    assert (sequences.of, sequences.first) == (slice(1, 2), 5)


def test_what_is_no_engine_is_none_of_them():
    for value in [None, "model", torch.nn.Linear(2, 2), object()]:
        assert not (vllm.is_engine(value) or sglang.is_engine(value) or llama_cpp.is_engine(value))
