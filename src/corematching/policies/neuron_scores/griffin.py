"""GRIFFIN's neuron score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching.backends.kernels.statistics import sum_both, sum_rows
from corematching.policies.base import NeuronScore, read_activations
from corematching.policies.passes import read_blocks
from corematching.policies.tokens import check_token_set, select_tokens
from corematching.protocol import PrefillView

TINY = 1e-24
"""Keeps a token without activations from dividing by zero; it then counts nothing."""


@dataclass(frozen=True)
class GriffinScore(NeuronScore, name="griffin"):
    """``sqrt(sum_t (a_n(t) / ||a(t)||)^2)``, the l2 norm over the tokens' unit activations.

    GRIFFIN, arXiv:2404.01365.
    """

    in_parts: ClassVar[bool] = True

    token_set: str = field(
        default="all", metadata={"help": "tokens that count: all | kept | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_token_set(self.token_set)

    def sum_parts(self, view: PrefillView, out: Tensor) -> bool:
        tokens = select_tokens(view, self.token_set)
        return sum_both(read_activations(view), tokens, view.valid, out)

    def finish(self, total: Tensor) -> Tensor:
        return total.sqrt()

    def score(self, view: PrefillView) -> Tensor:
        activations, tokens = read_activations(view), select_tokens(view, self.token_set)
        found = sum_rows(activations, tokens, "unit squares")
        if found is not None:
            return found.sqrt()
        total = activations.new_zeros((len(tokens), activations.shape[-1]), dtype=torch.float32)
        for sample, _, block in read_blocks(activations, tokens):
            squares = block.square_()
            weights = 1 / squares.sum(-1).clamp(min=TINY)  # 1 / ||a(t)||^2
            total[sample] += weights @ squares
        return total.sqrt()
