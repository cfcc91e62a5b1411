"""CoreInfer."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import NeuronRule
from corematching.policies.check import check_ratio
from corematching.policies.neuron_scores.coreinfer import CoreInferScore
from corematching.policies.schedules import DenseEnds


@dataclass(frozen=True)
class CoreInfer(BaseMethod, name="coreinfer"):
    """The sentence's core neurons in the decode; all tokens.

    "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive
    Sparse Activation", arXiv:2410.18311, as in its released code: one k for all tokens, layers 6
    to 26 of 32 thinned out (as ratios of other depths) and the others dense.
    """

    neuron_ratio: float = field(
        default=0.4, metadata={"help": "ratio of the neurons kept in each of those layers"}
    )
    top_ratio: float = field(
        default=0.2,
        metadata={"help": "ratio of the mean count of positive activations that votes"},
    )
    dense_first: int | float = field(
        default=6 / 32,
        metadata={"help": "first layers that keep all neurons: int or ratio of depth"},
    )
    dense_last: int | float = field(
        default=5 / 32,
        metadata={"help": "last layers that keep all neurons: int or ratio of depth"},
    )

    def __post_init__(self) -> None:
        check_ratio("neuron_ratio", self.neuron_ratio)
        super().__post_init__()

    def make_neurons(self) -> NeuronRule:
        schedule = DenseEnds(
            self.neuron_ratio, first=self.dense_first, last=self.dense_last, multiple=1
        )
        return NeuronRule(CoreInferScore(self.top_ratio), schedule)
