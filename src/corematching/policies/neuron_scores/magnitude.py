"""The number of tokens in which a neuron is among the largest."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.policies.activated import activate_by_magnitude
from corematching.policies.base import NeuronScore, read_activations
from corematching.policies.check import check_ratio
from corematching.policies.core import count_activations
from corematching.policies.tokens import check_token_set, select_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class Magnitude(NeuronScore, name="magnitude"):
    """In how many tokens the neuron is in the top ``top_ratio`` by ``|a|``."""

    top_ratio: float = field(
        default=0.2, metadata={"help": "ratio of a token's neurons that it votes for, in (0, 1]"}
    )
    token_set: str = field(
        default="all", metadata={"help": "tokens that count: all | kept | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_ratio("top_ratio", self.top_ratio)
        check_token_set(self.token_set)

    def score(self, view: PrefillView) -> Tensor:
        activated = activate_by_magnitude(read_activations(view), self.top_ratio)
        return count_activations(activated, select_tokens(view, self.token_set))
