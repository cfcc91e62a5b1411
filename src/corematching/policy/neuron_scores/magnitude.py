"""How often a neuron is among a token's largest."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.policy.activated import activate_by_magnitude
from corematching.policy.base import NeuronScore, read_activations
from corematching.policy.check import check_share
from corematching.policy.core import count_activations
from corematching.policy.tokens import check_over, select_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class Magnitude(NeuronScore, name="magnitude"):
    """In how many tokens the neuron is in the top ``share`` by ``|a|``."""

    share: float = field(
        default=0.2, metadata={"help": "share of a token's neurons that it votes for, in (0, 1]"}
    )
    over: str = field(
        default="all", metadata={"help": "tokens that count: all | kept | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_over(self.over)

    def score(self, view: PrefillView) -> Tensor:
        activated = activate_by_magnitude(read_activations(view), self.share)
        return count_activations(activated, select_tokens(view, self.over))
