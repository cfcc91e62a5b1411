"""Overlap with what the text activates."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.backends.kernels.selection import weigh_rarity
from corematching.policies.activated import activate_by_magnitude, activate_by_sign
from corematching.policies.base import TokenScore, read_activations
from corematching.policies.check import check_choice, check_number, check_ratio
from corematching.policies.passes import dot_tokens, sum_tokens
from corematching.policies.tokens import check_token_set, select_tokens
from corematching.protocol import PrefillView

PROFILES = {
    "sign": lambda activations, ratio: activate_by_sign(activations),
    "magnitude": activate_by_magnitude,
    "size": lambda activations, ratio: torch.nn.functional.normalize(
        activations.float().abs(), dim=-1
    ),
    "value": lambda activations, ratio: torch.nn.functional.normalize(activations.float(), dim=-1),
}


@dataclass(frozen=True)
class TextOverlap(TokenScore, name="text-overlap"):
    """Agreement of a token's neurons with those that the text tokens activate, summed over these.

    With p(x) a token's profile over the F neurons, the score is ``sum_n w_n * p_n(x) * q_n`` with
    ``q = sum_t p(t)`` over the text tokens t. The profile is 0/1 by ``sign`` (a > 0) or by
    ``magnitude`` (the ``top_ratio`` of ``|a|``), or ``|a| / ||a||`` (``size``), or ``a / ||a||``
    (``value``). ``w_n = idf_n ** rarity`` lowers the weight of neurons that every patch activates:
    ``idf_n = log((1 + N) / (1/2 + sum_j |p_n(j)|))`` over the N image tokens j, at least 0.

    On pictures with much background the sentence's core neurons are the background's, and so is
    much of what the text activates; the rarity takes out what every patch has, and leaves the
    neurons that the question shares with few of them.
    """

    top_ratio: float = field(
        default=0.2, metadata={"help": "ratio of a token's neurons that count, in (0, 1]"}
    )
    activated_by: str = field(
        default="magnitude", metadata={"help": "profile: sign | magnitude | size | value"}
    )
    token_set: str = field(
        default="question", metadata={"help": "tokens to match: question | text | all"}
    )
    rarity: float = field(
        default=1.0, metadata={"help": "power of the neurons' rarity over image tokens; 0: none"}
    )
    normalize: str = field(
        default="none", metadata={"help": "none | cosine: divide by the weighted profile's norm"}
    )

    def __post_init__(self) -> None:
        check_ratio("top_ratio", self.top_ratio)
        check_choice("activated_by", self.activated_by, PROFILES)
        check_token_set(self.token_set)
        check_number("rarity", self.rarity, least=0)
        check_choice("normalize", self.normalize, ("none", "cosine"))

    def score(self, view: PrefillView) -> Tensor:
        profiles = PROFILES[self.activated_by](read_activations(view), self.top_ratio)  # (B, T, F)
        chosen = select_tokens(view, self.token_set)
        if self.rarity and self.normalize == "none":
            weighed = weigh_rarity(profiles, chosen, view.image, self.rarity)
            if weighed is not None:
                return dot_tokens(profiles, weighed)
        target = sum_tokens(profiles, chosen)  # (B, F)
        weights = self._weigh(profiles, view.image)
        scores = dot_tokens(profiles, weights * target)
        if self.normalize == "cosine":
            norms = dot_tokens(profiles * profiles, weights).sqrt()
            scores = scores / norms.clamp(min=1e-6)
        return scores

    def _weigh(self, profiles: Tensor, image: Tensor) -> Tensor:
        """(B, F), each neuron's weight."""
        if self.rarity == 0:
            return torch.ones_like(profiles[:, 0], dtype=torch.float32)
        total = image.sum(1, keepdim=True)
        users = sum_tokens(profiles, image, absolute=True)
        return ((1 + total) / (0.5 + users)).log().clamp(min=0) ** self.rarity
