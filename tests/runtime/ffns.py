"""FFNs of three forms, and choices of their neurons."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from corematching.backends.sparse_ffn import SparseFFN
from corematching.protocol import NeuronChoice

HIDDEN, WIDTH, KEPT = 16, 24, 7


class GatedFFN(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedFFN(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(HIDDEN, 2 * WIDTH, bias=bias)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.activation_fn = nn.GELU()

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class PlainFFN(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.fc2 = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.activation_fn = F.relu

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


FORMS = [GatedFFN, FusedFFN, PlainFFN]


def make(form=GatedFFN, bias=False, count=KEPT) -> SparseFFN:
    torch.manual_seed(0)
    sparse = SparseFFN(form(bias).eval(), count)
    sparse.install()
    return sparse


def choose(batch: int, count: int = KEPT, seed: int = 1, mean: bool = False) -> NeuronChoice:
    rng = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, WIDTH, generator=rng).argsort(1)
    indices = order[:, :count].sort(1).values
    means = torch.randn(batch, WIDTH, generator=rng).scatter(1, indices, 0.0)
    return NeuronChoice(indices, means if mean else None)
