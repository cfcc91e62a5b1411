"""GRIFFIN's neuron score."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.policy.base import NeuronScore, read_activations
from corematching.policy.tokens import check_over, select_tokens
from corematching.protocol import PrefillView

TINY = 1e-24
"""Keeps a token without activations from dividing by zero; it then counts nothing."""


@dataclass(frozen=True)
class Griffin(NeuronScore, name="griffin"):
    """``sqrt(sum_t (a_n(t) / ||a(t)||)^2)``, the l2 norm over the tokens' unit activations.

    GRIFFIN, arXiv:2404.01365.
    """

    over: str = field(
        default="all", metadata={"help": "tokens that count: all | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_over(self.over)

    def score(self, view: PrefillView) -> Tensor:
        tokens = select_tokens(view, self.over).unsqueeze(-1)
        squares = read_activations(view).float().square().masked_fill_(~tokens, 0)  # (B, T, F)
        weights = 1 / squares.sum(-1, keepdim=True).clamp(min=TINY)  # 1 / ||a(t)||^2
        return (weights.transpose(1, 2) @ squares).squeeze(1).sqrt()
