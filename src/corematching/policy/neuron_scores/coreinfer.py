"""The neuron score of CoreInfer's released code."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.policy.activated import activate_shared_top_positive
from corematching.policy.base import NeuronScore, read_activations
from corematching.policy.check import check_share
from corematching.policy.core import count_activations
from corematching.policy.tokens import check_over, select_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class CoreInfer(NeuronScore, name="coreinfer"):
    """In how many tokens the neuron is in the top k, with one k for all tokens of a sample.

    As `Paper`, but with CoreInfer's (arXiv:2410.18311) released choice of k: ``rho`` times the mean
    number of positive entries, where the paper's text takes each token's own.
    """

    rho: float = field(
        default=0.2, metadata={"help": "top fraction of the mean positive count, in (0, 1]"}
    )
    over: str = field(
        default="all", metadata={"help": "tokens that count: all | kept | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_share("rho", self.rho)
        check_over(self.over)

    def score(self, view: PrefillView) -> Tensor:
        tokens = select_tokens(view, self.over)
        activated = activate_shared_top_positive(read_activations(view), self.rho, tokens)
        return count_activations(activated, tokens)
