"""The token score of the authors' released code."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.policies.activated import ACTIVATED_BY, activate
from corematching.policies.base import TokenScore, read_activations
from corematching.policies.check import check_choice, check_ratio
from corematching.policies.passes import dot_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class TokenOverlap(TokenScore, name="token-overlap"):
    """``|Gamma(x) & Gamma(t)|`` with one token t near the end of the prompt, at the same layer.

    The released code takes the fifth token from the end (``offset=-5``) and activation by sign. An
    offset that reaches before the prompt's start stops at its first token.
    """

    offset: int = field(
        default=-1, metadata={"help": "position of the token from the end: -1 is the last one"}
    )
    activated_by: str = field(default="sign", metadata={"help": "sign | magnitude"})
    top_ratio: float = field(
        default=0.2, metadata={"help": "ratio of neurons activated, for magnitude, in (0, 1]"}
    )

    def __post_init__(self) -> None:
        if isinstance(self.offset, bool) or not isinstance(self.offset, int) or self.offset >= 0:
            raise ConfigError(f"offset={self.offset!r}: count from the end, -1 is the last token")
        check_choice("activated_by", self.activated_by, ACTIVATED_BY)
        check_ratio("top_ratio", self.top_ratio)

    def score(self, view: PrefillView) -> Tensor:
        activated = activate(read_activations(view), self.activated_by, self.top_ratio)
        first = view.valid.to(torch.int8).argmax(1)
        position = (view.last + 1 + self.offset).maximum(first)
        rows = torch.arange(len(position), device=position.device)
        return dot_tokens(activated, activated[rows, position].float())
