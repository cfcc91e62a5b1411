"""Attention from the last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from corematching.errors import ConfigError
from corematching.policies.base import TokenScore
from corematching.protocol import ATTENTION, PrefillView


@dataclass(frozen=True)
class Attention(TokenScore, name="attention"):
    """The last token's attention to a token, averaged over heads (FastV, arXiv:2403.06764)."""

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})

    def score(self, view: PrefillView) -> Tensor:
        if view.attention is None:
            raise ConfigError(
                f"layer {view.layer} shows no attention: score after layer 0 or later"
            )
        rows = view.attention(view.last.unsqueeze(1))  # (B, H, 1, T)
        return rows.float().mean(1).squeeze(1)
