"""Controls for comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import NeuronRule, TokenRule
from corematching.policies.budgets import Knee, budget_of
from corematching.policies.check import check_ratio, normalize_amount
from corematching.policies.neuron_scores import RandomNeurons
from corematching.policies.schedules import DenseEnds
from corematching.policies.token_scores import RandomTokens, TokenOverlap


@dataclass(frozen=True)
class Dense(BaseMethod, name="dense"):
    """Nothing is dropped: the model as it is, with a report."""


@dataclass(frozen=True)
class Random(BaseMethod, name="random"):
    """Random tokens and random neurons: others for each sample, the same for it in any batch."""

    keep_ratio: float | None = field(
        default=None, metadata={"help": "ratio of the image tokens kept; default: 0.3"}
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )
    layer: int | float = field(
        default=0.3,
        metadata={"help": "image tokens go after this layer (int) or ratio of the depth (float)"},
    )
    neuron_ratio: float = field(
        default=0.6, metadata={"help": "ratio of the neurons kept for the whole answer"}
    )
    compensate: bool = field(
        default=False, metadata={"help": "replace dropped neurons by their mean over the prompt"}
    )
    proportional: bool = field(
        default=False,
        metadata={"help": "attention to a kept token counts for the dropped ones most like it too"},
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 0.3)
        check_ratio("neuron_ratio", self.neuron_ratio)
        super().__post_init__()

    def make_tokens(self) -> TokenRule:
        budget = budget_of(self.keep_ratio, self.keep_tokens)
        return TokenRule(RandomTokens(), budget, (self.layer,), self.proportional)

    def make_neurons(self) -> NeuronRule:
        schedule = DenseEnds(self.neuron_ratio, first=4 / 32, last=3 / 32, multiple=8)
        return NeuronRule(RandomNeurons(), schedule, self.compensate)


@dataclass(frozen=True)
class ReleasedCode(BaseMethod, name="released-code"):
    """The rule of CoreMatching's released code, with tokens that are dropped and not zeroed.

    Overlap by sign with the fifth token from the end, cut at the knee after each of the layers 5 to
    18 of 32 (as a ratio of other depths); all neurons.
    """

    offset: int = field(
        default=-5, metadata={"help": "position of the token from the end: -1 is the last one"}
    )

    def make_tokens(self) -> TokenRule:
        after = tuple((layer + 1) / 32 for layer in range(5, 19))
        return TokenRule(TokenOverlap(offset=self.offset), Knee(), after=after)
