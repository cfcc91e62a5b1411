"""The neuron score of CoreInfer's released code."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.policies.activated import activate_shared_top_positive
from corematching.policies.base import NeuronScore, read_activations
from corematching.policies.check import check_ratio
from corematching.policies.core import count_activations
from corematching.policies.tokens import check_token_set, select_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class CoreInferScore(NeuronScore, name="coreinfer"):
    """In how many tokens the neuron is in the top k, with one k for all tokens of a sample.

    As `PaperScore`, but with CoreInfer's (arXiv:2410.18311) released choice of k: ``top_ratio``
    times the mean number of positive entries, where the paper's text takes each token's own.
    """

    top_ratio: float = field(
        default=0.2,
        metadata={"help": "ratio of the mean positive count that votes, in (0, 1]"},
    )
    token_set: str = field(
        default="all", metadata={"help": "tokens that count: all | kept | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_ratio("top_ratio", self.top_ratio)
        check_token_set(self.token_set)

    def score(self, view: PrefillView) -> Tensor:
        tokens = select_tokens(view, self.token_set)
        activated = activate_shared_top_positive(read_activations(view), self.top_ratio, tokens)
        return count_activations(activated, tokens)
