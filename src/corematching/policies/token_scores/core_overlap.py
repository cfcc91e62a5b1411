"""The paper's token score."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.policies.activated import ACTIVATED_BY, activate
from corematching.policies.base import TokenScore, read_activations
from corematching.policies.check import check_choice, check_ratio
from corematching.policies.core import pick_core_neurons
from corematching.policies.passes import dot_tokens
from corematching.policies.tokens import check_token_set, select_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class CoreOverlap(TokenScore, name="core-overlap"):
    """``|Gamma(x) & C_rho^beta(s)|``: how many of the sentence's core neurons the token activates.

    ``sign`` is the rule of CoreMatching (arXiv:2505.19235): Gamma(x) holds the neurons with a > 0,
    and a token votes for the top ``top_ratio`` of its positive ones (the paper's rho; its beta is
    ``core_ratio``). ``magnitude`` takes the top ``top_ratio`` by ``|a|`` for both.
    """

    top_ratio: float = field(
        default=0.2, metadata={"help": "ratio of a token's neurons that it votes for, in (0, 1]"}
    )
    core_ratio: float = field(
        default=0.4, metadata={"help": "ratio of the neurons that are core, in (0, 1]"}
    )
    activated_by: str = field(default="sign", metadata={"help": "sign | magnitude"})
    token_set: str = field(
        default="all",
        metadata={"help": "tokens whose core neurons count: all | text | question | image"},
    )

    def __post_init__(self) -> None:
        check_ratio("top_ratio", self.top_ratio)
        check_ratio("core_ratio", self.core_ratio)
        check_choice("activated_by", self.activated_by, ACTIVATED_BY)
        check_token_set(self.token_set)

    def score(self, view: PrefillView) -> Tensor:
        activations = read_activations(view)
        voters = select_tokens(view, self.token_set)
        core = pick_core_neurons(
            activations, voters, self.top_ratio, self.core_ratio, self.activated_by
        )
        activated = activate(activations, self.activated_by, self.top_ratio)  # (B, T, F)
        is_core = torch.zeros_like(activated[:, 0]).scatter(1, core, True)  # (B, F)
        return dot_tokens(activated, is_core.float())
