"""The projection-guided criterion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.policies.base import TokenScore
from corematching.protocol import CONTRIBUTIONS, PrefillView


@dataclass(frozen=True)
class ProjectionScore(TokenScore, name="projection"):
    """A token's part of the last token's attention output: attention times projection.

    With ``c_j`` token j's term of that output (attention score and value path, through the output
    projection) and ``o = sum_j c_j``, the score is ``<c_j, o> / ||o||``: how far the token moves
    the output along its own direction. Exact and slow, for analysis ("projection-guided
    criterion", CoreMatching, arXiv:2505.19235).
    """

    needs: ClassVar[frozenset[str]] = frozenset({CONTRIBUTIONS})

    def score(self, view: PrefillView) -> Tensor:
        if view.contributions is None:
            raise ConfigError(
                f"layer {view.layer} shows no contributions: score after layer 0 or a later one"
            )
        terms = view.contributions().float().masked_fill(~view.valid.unsqueeze(-1), 0)  # (B, T, d)
        direction = torch.nn.functional.normalize(terms.sum(1), dim=-1)
        return torch.einsum("btd,bd->bt", terms, direction)
