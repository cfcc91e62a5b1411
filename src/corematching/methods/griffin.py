"""GRIFFIN."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import NeuronRule
from corematching.policies.check import check_ratio
from corematching.policies.neuron_scores.griffin import GriffinScore
from corematching.policies.schedules import Uniform


@dataclass(frozen=True)
class Griffin(BaseMethod, name="griffin"):
    """The neurons with the largest part in the prompt's activations in the decode; all tokens.

    "Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation", arXiv:2404.01365:
    in every layer the top neurons by the l2 norm over the prompt of each token's
    activations scaled to length 1, fixed for the decode.
    """

    neuron_ratio: float = field(
        default=0.5, metadata={"help": "ratio of the neurons kept in each layer; published: 0.5"}
    )

    def __post_init__(self) -> None:
        check_ratio("neuron_ratio", self.neuron_ratio)
        super().__post_init__()

    def make_neurons(self) -> NeuronRule:
        return NeuronRule(GriffinScore(), Uniform(self.neuron_ratio, multiple=1))
