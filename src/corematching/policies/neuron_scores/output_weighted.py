"""The size of a neuron's output in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.errors import ConfigError
from corematching.policies.base import NeuronScore, read_activations
from corematching.policies.tokens import check_token_set, select_tokens
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class OutputWeighted(NeuronScore, name="output-weighted"):
    """Mean ``|a_n|`` over the tokens, times the norm of the neuron's column of ``down_proj``."""

    token_set: str = field(
        default="all", metadata={"help": "tokens that count: all | kept | text | question | image"}
    )

    def __post_init__(self) -> None:
        check_token_set(self.token_set)

    def score(self, view: PrefillView) -> Tensor:
        if view.down_proj is None:
            raise ConfigError(
                "output-weighted needs the weight of down_proj, which this model does not show "
                "(a quantised layer?): use 'griffin'"
            )
        tokens = select_tokens(view, self.token_set)
        size = read_activations(view).float().abs().masked_fill(~tokens.unsqueeze(-1), 0).sum(1)
        mean = size / tokens.sum(1, keepdim=True).clamp(min=1)
        return mean * view.down_proj.float().norm(dim=0)
