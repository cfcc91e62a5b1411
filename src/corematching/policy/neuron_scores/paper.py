"""The paper's neuron score."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.policy.activated import activate_top_positive
from corematching.policy.base import NeuronScore, read_activations
from corematching.policy.check import check_share
from corematching.policy.core import count_activations
from corematching.policy.tokens import check_over, select_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class Paper(NeuronScore, name="paper"):
    """``f_rho(n; s)``, in how many tokens the neuron is in the top ``rho`` of the positive ones.

    CoreInfer (arXiv:2410.18311) and CoreMatching (arXiv:2505.19235): the highest are the sentence's
    core neurons.
    """

    rho: float = field(
        default=0.2, metadata={"help": "top fraction of a token's positive entries, in (0, 1]"}
    )
    over: str = field(
        default="all", metadata={"help": "tokens that count: all | kept | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_share("rho", self.rho)
        check_over(self.over)

    def score(self, view: PrefillView) -> Tensor:
        activated = activate_top_positive(read_activations(view), self.rho)
        return count_activations(activated, select_tokens(view, self.over))
