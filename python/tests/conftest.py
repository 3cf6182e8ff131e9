"""What the tests share: a small model that is built as those of transformers, and places."""

import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Norm(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(torch.nn.Module):
    """A block with names of its own, which no file here knows."""

    def __init__(self, width):
        super().__init__()
        self.norm = Norm(width)
        self.w1, self.w2 = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.w2(torch.nn.functional.silu(self.w1(self.norm(x))))


class Own(torch.nn.Module):
    """Somebody's own model: ids in, logits out."""

    def __init__(self, width=16, layers=2, vocabulary=32):
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(layers))
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


NAMES = {"embed": "table", "blk.*.ffn_norm": "blocks.*.norm", "blk.*.ffn_up": "blocks.*.w1", "logits": "head"}
NAMES["blk.*.ffn_swiglu"] = "blocks.*.w2:input"


@pytest.fixture
def own():
    torch.manual_seed(0)
    return Own().eval()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")
