"""What to keep: tensors in, tensors out, no model in sight."""

from typing import Any, cast

from corematching.policy.base import NeuronScore, TokenScore
from corematching.policy.budgets import Budget, Count, Knee, Ratio
from corematching.policy.component import Component, build, names
from corematching.policy.neuron_scores import (
    CoreInfer,
    Griffin,
    Magnitude,
    OutputWeighted,
    Paper,
    RandomNeurons,
)
from corematching.policy.schedules import DenseEnds, PerLayer, Schedule, Uniform
from corematching.policy.token_scores import (
    Attention,
    CoreOverlap,
    Norm,
    Projection,
    RandomTokens,
    TextOverlap,
    TokenOverlap,
)


def score_by_name(name: str, **params: Any) -> TokenScore:
    """A token score by its name; an unknown one is a ConfigError that names the nearest."""
    return cast(TokenScore, build(TokenScore.kind, name, **params))


def neuron_score_by_name(name: str, **params: Any) -> NeuronScore:
    """A neuron score by its name; an unknown one is a ConfigError that names the nearest."""
    return cast(NeuronScore, build(NeuronScore.kind, name, **params))


__all__ = [
    "Attention",
    "Budget",
    "Component",
    "CoreInfer",
    "CoreOverlap",
    "Count",
    "DenseEnds",
    "Griffin",
    "Knee",
    "Magnitude",
    "NeuronScore",
    "Norm",
    "OutputWeighted",
    "Paper",
    "PerLayer",
    "Projection",
    "RandomNeurons",
    "RandomTokens",
    "Ratio",
    "Schedule",
    "TextOverlap",
    "TokenOverlap",
    "TokenScore",
    "Uniform",
    "names",
    "neuron_score_by_name",
    "score_by_name",
]
